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
        let next = async { self.stream.next().await.transpose() };
        let listed = match within(PAGE_TIMEOUT, &self.clock, next).await {
            Ok((meta, date)) => {
                // Only the first object of a page has an exchange of its own.
                self.date = date.or(self.date);
                self.listed(&meta?)
            }
            Err(error) => Err(error),
        };
        if listed.is_err() {
            self.stream = futures_util::stream::empty().boxed();
        }
        Some(listed)
    }

    fn listed(&self, meta: &ObjectMeta) -> Result<Listed, BucketError> {
        let path = meta.location.as_ref();
        let name = match self.prefix.as_str() {
            "" => Some(path),
            prefix => path.strip_prefix(prefix).and_then(|name| name.strip_prefix('/')),
        };
        // A storage that lists other objects than those below the prefix.
        let key = name.and_then(ObjectKey::listed).ok_or(BucketError::Malformed)?;
        Ok(Listed {
            key,
            size: meta.size,
            age: age_at(self.date, meta),
            date: self.date,
        })
    }
}

impl Listing for Pages {
    fn next(&mut self) -> ListingNext<'_> {
        Box::pin(self.next_object())
    }
}
