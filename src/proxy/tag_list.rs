//! Single flight for lists of tags: one request for all who may share it.

use std::sync::{Arc, Mutex, PoisonError};

use super::asking::Key;
use super::fetching::Wanted;
use super::listing::{Listing, Received};
use super::{LongList, Pull};
use crate::oci::Cause;
use crate::policy::Heard;
use crate::store::listings::ListingKey;
use crate::upstream::Answer;

/// What the upstream said instead of a list.
pub(super) type Unlisted = (Heard, Option<Arc<Answer>>);

/// The response, for each that waits for it.
#[derive(Clone)]
pub(super) enum Shared {
    Whole(Listing),
    /// It is passed on as it arrives, so one client alone is given it.
    Long(Arc<Mutex<Option<Box<LongList>>>>),
    Unlisted(Unlisted),
}

impl Pull {
    /// A list of tags, kept where there is a `key`. The request goes on when its asker leaves.
    pub(super) async fn shared_tags(
        self: &Arc<Self>,
        wanted: &Wanted,
        key: Option<ListingKey>,
    ) -> Result<Received, Unlisted> {
        let flight = self.tag_lists.share((Key::new(self, wanted), key.is_some()), || {
            let (pull, wanted, key) = (Arc::clone(self), wanted.clone(), key.clone());
            async move {
                match pull.tags(&wanted, key).await {
                    Ok(Received::Whole(listing)) => Shared::Whole(listing),
                    Ok(Received::Long(list)) => Shared::Long(Arc::new(Mutex::new(Some(list)))),
                    Err(unlisted) => Shared::Unlisted(unlisted),
                }
            }
        });
        match flight.landed().await {
            Some(Shared::Whole(listing)) => Ok(Received::Whole(listing)),
            Some(Shared::Unlisted(unlisted)) => Err(unlisted),
            Some(Shared::Long(list)) => {
                let list = list.lock().unwrap_or_else(PoisonError::into_inner).take();
                match list {
                    Some(list) => Ok(Received::Long(list)),
                    None => self.tags(wanted, key).await,
                }
            }
            None => Err((Heard::Silent(Cause::Busy), None)),
        }
    }
}
