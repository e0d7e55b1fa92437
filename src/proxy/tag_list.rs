//! Single flight for lists of tags: one request for all who may share it.

use std::sync::{Arc, Mutex, PoisonError};

use super::listing::{FetchedList, Listing};
use super::manifest_fetch::UpstreamRequest;
use super::revalidate::CoalesceKey;
use super::{ProxyService, StreamedList};
use crate::oci::UpstreamFailure;
use crate::policy::Revalidation;
use crate::store::listings::ListingKey;
use crate::upstream::UpstreamResponse;

/// What the upstream said instead of a list.
pub(super) type ListError = (Revalidation, Option<Arc<UpstreamResponse>>);

/// The response, for each that waits for it.
#[derive(Clone)]
pub(super) enum SharedList {
    Buffered(Listing),
    /// It is passed on as it arrives, so one client alone is given it.
    Streamed(Arc<Mutex<Option<Box<StreamedList>>>>),
    Failed(ListError),
}

impl ProxyService {
    /// A list of tags, kept where there is a `key`. The request goes on when its asker leaves.
    pub(super) async fn shared_tags(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        key: Option<ListingKey>,
    ) -> Result<FetchedList, ListError> {
        let call = self
            .tag_lists
            .share((CoalesceKey::new(self, wanted), key.is_some()), || {
                let (pull, wanted, key) = (Arc::clone(self), wanted.clone(), key.clone());
                async move {
                    match pull.tags(&wanted, key).await {
                        Ok(FetchedList::Buffered(listing)) => SharedList::Buffered(listing),
                        Ok(FetchedList::Streamed(list)) => {
                            SharedList::Streamed(Arc::new(Mutex::new(Some(list))))
                        }
                        Err(unlisted) => SharedList::Failed(unlisted),
                    }
                }
            });
        match call.wait().await {
            Some(SharedList::Buffered(listing)) => Ok(FetchedList::Buffered(listing)),
            Some(SharedList::Failed(unlisted)) => Err(unlisted),
            Some(SharedList::Streamed(list)) => {
                let list = list.lock().unwrap_or_else(PoisonError::into_inner).take();
                match list {
                    Some(list) => Ok(FetchedList::Streamed(list)),
                    None => self.tags(wanted, key).await,
                }
            }
            None => Err((Revalidation::Unavailable(UpstreamFailure::Busy), None)),
        }
    }
}
