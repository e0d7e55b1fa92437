//! Pages of `ListObjectsV2`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use object_store::ObjectMeta;

use super::{age_at, within};
use crate::bucket::listing::{Listed, Listing, ListingNext};
use crate::bucket::{BucketError, ObjectKey, StorageClock};

/// Limit of a page. Storages take seconds for a page of a large bucket, and no client waits for one.
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) struct Pages {
    pub(super) stream: BoxStream<'static, object_store::Result<ObjectMeta>>,
    /// Prefix of every name, without slashes at its ends.
    pub(super) prefix: String,
    pub(super) clock: Arc<StorageClock>,
    /// `Date` of the page.
    pub(super) date: Option<SystemTime>,
}

impl Pages {
    async fn next_object(&mut self) -> Option<Result<Listed, BucketError>> {
        loop {
            let next = async { self.stream.next().await.transpose() };
            let listed = match within(PAGE_TIMEOUT, &self.clock, next).await {
                Ok((meta, date)) => {
                    // Only the first object of a page has an exchange of its own.
                    self.date = date.or(self.date);
                    self.listed(&meta?)
                }
                Err(error) => Err(error),
            };
            match listed {
                Ok(None) => {}
                Ok(Some(listed)) => return Some(Ok(listed)),
                Err(error) => {
                    self.stream = futures_util::stream::empty().boxed();
                    return Some(Err(error));
                }
            }
        }
    }

    /// `None`: the marker of the folder `v1/`, which programs with a view of folders write.
    fn listed(&self, meta: &ObjectMeta) -> Result<Option<Listed>, BucketError> {
        let path = meta.location.as_ref();
        let name = match self.prefix.as_str() {
            "" => Some(path),
            prefix => path.strip_prefix(prefix).and_then(|name| name.strip_prefix('/')),
        };
        // The crate removes the slash at the end.
        if name == Some("v1") {
            return Ok(None);
        }
        // A storage that lists other objects than those below the prefix.
        let key = name.and_then(ObjectKey::listed).ok_or(BucketError::Malformed)?;
        Ok(Some(Listed {
            key,
            size: meta.size,
            age: age_at(self.date, meta),
            date: self.date,
        }))
    }
}

impl Listing for Pages {
    fn next(&mut self) -> ListingNext<'_> {
        Box::pin(self.next_object())
    }
}
