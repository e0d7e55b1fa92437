//! Tag lists that are too long to buffer: streamed as they arrive.
//!
//! A list below the storage limit is copied in transit and stored once it is complete.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ProxyService;
use super::listing::{Listing, is_tags};
use crate::oci::UpstreamFailure;
use crate::store::listings::{LISTING_BYTES_MAX, ListingKey, StoredListing};
use crate::upstream::ResponseStream;

/// Concurrent copies of long lists. Further lists are streamed without being stored, so all copies together take at
/// most this many times [`LISTING_KEPT_BYTES_MAX`].
const COPIES_MAX: usize = 4;

/// Permits for copies of long lists.
pub(super) struct CopyPermits(Arc<Semaphore>);

impl Default for CopyPermits {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(COPIES_MAX)))
    }
}

/// A list that is being received from the upstream.
pub struct StreamedList {
    /// Metadata, and the bytes received so far.
    pub(super) head: Listing,
    /// Size in bytes, if the upstream stated it.
    pub size: Option<u64>,
    body: ResponseStream,
    is_head_sent: bool,
    copy: Option<CacheCopy>,
}

struct CacheCopy {
    bytes: Vec<u8>,
    proxy: Arc<ProxyService>,
    key: ListingKey,
    _permit: OwnedSemaphorePermit,
}

impl StreamedList {
    /// `key`: storage key, if it may be stored. `head`: the part received so far. `size`: total size, if known.
    pub(super) fn new(
        proxy: &Arc<ProxyService>,
        key: Option<ListingKey>,
        (head, size): (Listing, Option<u64>),
        body: ResponseStream,
    ) -> Self {
        let fits = size.is_none_or(|size| size <= LISTING_BYTES_MAX as u64);
        let copy = key.filter(|_| fits).and_then(|key| {
            let permit = Arc::clone(&proxy.copy_permits.0).try_acquire_owned().ok()?;
            Some(CacheCopy {
                bytes: head.bytes.to_vec(),
                proxy: Arc::clone(proxy),
                key,
                _permit: permit,
            })
        });
        Self {
            head,
            size,
            body: body.without_permit(),
            is_head_sent: false,
            copy,
        }
    }

    /// Metadata known before the body is complete.
    pub fn head(&self) -> &Listing {
        &self.head
    }

    /// Next chunk; `None` only at the end.
    pub async fn next(&mut self) -> Option<Result<Bytes, UpstreamFailure>> {
        if !std::mem::replace(&mut self.is_head_sent, true) {
            return Some(Ok(self.head.bytes.clone()));
        }
        let next = self.body.chunk().await;
        match (&next, self.copy.take()) {
            (Some(Ok(chunk)), Some(mut copy)) => {
                if copy.bytes.len() + chunk.len() <= LISTING_BYTES_MAX {
                    copy.bytes.extend_from_slice(chunk);
                    // A body is not polled again once its stated length was delivered.
                    if self.size == Some(copy.bytes.len() as u64) {
                        copy.store(&self.head);
                    } else {
                        self.copy = Some(copy);
                    }
                }
            }
            (None, Some(copy)) => copy.store(&self.head),
            (Some(Err(_)), _) | (_, None) => {}
        }
        next
    }
}

impl CacheCopy {
    /// Stores the copy in a detached task, because the client already has its bytes.
    fn store(self, head: &Listing) {
        let (media_type, next, filters) = (head.media_type.clone(), head.next.clone(), head.filters.clone());
        tokio::spawn(async move {
            let Self {
                bytes,
                proxy,
                key,
                _permit,
            } = self;
            let now = proxy.clock.now();
            let stored = proxy.store.write(move |store| {
                if is_tags(&bytes) {
                    let listing = StoredListing::new(bytes.into(), media_type, next, filters, now);
                    store.put_listing(&key, listing)
                } else {
                    Ok(())
                }
            });
            super::log_store_error(stored.await, "store long list");
        });
    }
}
