//! Lists of tags that are too long to be held in memory: passed on as they arrive.
//!
//! A list that is not too long for that is copied on the way, and kept once it has arrived whole.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::listing::{Listing, is_tags};
use super::{ProxyService, revalidate};
use crate::oci::UpstreamFailure;
use crate::store::listings::{LISTING_BYTES_MAX, ListingKey, StoredListing};
use crate::upstream::ResponseStream;

/// Long lists copied at a time. With more, the others are passed on and not kept, so the copies of all take at most
/// this many times [`LISTING_BYTES_MAX`].
const COPIES_MAX: usize = 4;

/// Places for copies of long lists.
pub(super) struct CopyPermits(Arc<Semaphore>);

impl Default for CopyPermits {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(COPIES_MAX)))
    }
}

/// A list on its way from the upstream.
pub struct StreamedList {
    /// Its type, next page and filters; of its bytes those that have arrived.
    pub(super) head: Listing,
    /// Its size in bytes, if the upstream said it.
    pub size: Option<u64>,
    rest: ResponseStream,
    given: bool,
    copy: Option<CacheCopy>,
}

struct CacheCopy {
    bytes: Vec<u8>,
    pull: Arc<ProxyService>,
    key: ListingKey,
    _place: OwnedSemaphorePermit,
}

impl StreamedList {
    /// `key`: as what it is kept, if it may be; `head`: what has arrived; `size`: of the whole, if it is known.
    pub(super) fn new(
        pull: &Arc<ProxyService>,
        key: Option<ListingKey>,
        (head, size): (Listing, Option<u64>),
        rest: ResponseStream,
    ) -> Self {
        let fits = size.is_none_or(|size| size <= LISTING_BYTES_MAX as u64);
        let copy = key.filter(|_| fits).and_then(|key| {
            let place = Arc::clone(&pull.list_copies.0).try_acquire_owned().ok()?;
            Some(CacheCopy {
                bytes: head.bytes.to_vec(),
                pull: Arc::clone(pull),
                key,
                _place: place,
            })
        });
        Self {
            head,
            size,
            rest: rest.without_permit(),
            given: false,
            copy,
        }
    }

    /// What is known of it before it has arrived.
    pub fn head(&self) -> &Listing {
        &self.head
    }

    /// The next bytes; `None` at the end and only there.
    pub async fn next(&mut self) -> Option<Result<Bytes, UpstreamFailure>> {
        if !std::mem::replace(&mut self.given, true) {
            return Some(Ok(self.head.bytes.clone()));
        }
        let next = self.rest.chunk().await;
        match (&next, self.copy.take()) {
            (Some(Ok(chunk)), Some(mut copy)) => {
                if copy.bytes.len() + chunk.len() <= LISTING_BYTES_MAX {
                    copy.bytes.extend_from_slice(chunk);
                    // A body whose stated length has been given is asked for nothing more.
                    if self.size == Some(copy.bytes.len() as u64) {
                        copy.keep(&self.head);
                    } else {
                        self.copy = Some(copy);
                    }
                }
            }
            (None, Some(copy)) => copy.keep(&self.head),
            (Some(Err(_)), _) | (_, None) => {}
        }
        next
    }
}

impl CacheCopy {
    /// Apart from the client, which has its bytes.
    fn keep(self, head: &Listing) {
        let (media_type, next, filters) = (head.media_type.clone(), head.next.clone(), head.filters.clone());
        tokio::spawn(async move {
            let Self {
                bytes,
                pull,
                key,
                _place,
            } = self;
            let now = pull.clock.now();
            let kept = pull.store.write(move |store| {
                if is_tags(&bytes) {
                    let listing = StoredListing::new(bytes.into(), media_type, next, filters, now);
                    store.put_listing(&key, listing)
                } else {
                    Ok(())
                }
            });
            revalidate::report(kept.await, "keep a long list");
        });
    }
}
