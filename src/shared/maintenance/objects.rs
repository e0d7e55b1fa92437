//! Listing of a folder of the bucket, with retries. It has one page in memory, whatever the number of objects.
//!
//! A storage that ignores the name from which a listing goes on would list the same objects after each retry, so that is an
//! error.

use std::sync::Arc;

use tokio::time::sleep;

use super::retry_pause;
use crate::bucket::{BucketError, Listed, Listing, ObjectKey, ObjectStorage};

/// The objects below a folder.
pub(super) struct Objects {
    bucket: Arc<dyn ObjectStorage>,
    folder: String,
    listing: Box<dyn Listing>,
    last: Option<ObjectKey>,
    /// The last name was listed twice.
    is_twice: bool,
    failures: u32,
    /// A page was requested again, and no name has followed.
    is_resumed: bool,
    repetition: Repetition,
}

impl Objects {
    pub(super) fn new(bucket: &Arc<dyn ObjectStorage>, folder: &str) -> Self {
        Self {
            listing: bucket.list(folder, None),
            bucket: Arc::clone(bucket),
            folder: folder.to_owned(),
            last: None,
            is_twice: false,
            failures: 0,
            is_resumed: false,
            repetition: Repetition::default(),
        }
    }

    /// The next object. A failed page is requested again.
    pub(super) async fn next(&mut self) -> Option<Result<Listed, BucketError>> {
        loop {
            let error = match self.listing.next().await? {
                Ok(listed) => {
                    if std::mem::take(&mut self.is_resumed) && self.precedes_last(&listed.key) {
                        return Some(Err(BucketError::Malformed));
                    }
                    // `name` and the marker of a folder `name/`: the client removes the slash.
                    if self.last.as_ref() == Some(&listed.key) && !self.is_twice {
                        self.is_twice = true;
                        continue;
                    }
                    (self.is_twice, self.failures) = (false, 0);
                    if self.repetition.is_seen(&listed.key) {
                        return Some(Err(BucketError::Malformed));
                    }
                    self.last = Some(listed.key.clone());
                    return Some(Ok(listed));
                }
                Err(error) => error,
            };
            self.failures += 1;
            let Some(pause) = retry_pause(&error, self.failures) else {
                return Some(Err(error));
            };
            sleep(pause).await;
            self.listing = self.bucket.list(&self.folder, self.last.as_ref());
            (self.is_resumed, self.is_twice) = (true, false);
        }
    }

    /// Whether a name is before the last one, also if it is a marker of a folder.
    fn precedes_last(&self, key: &ObjectKey) -> bool {
        let is_before = |last: &ObjectKey| format!("{key}/").as_str() <= last.as_str();
        self.last.as_ref().is_some_and(is_before)
    }
}

/// Detection of a storage that repeats pages forever (Brent's algorithm): a name is compared with one earlier name, which
/// is replaced after 1, 2, 4, 8 … names.
#[derive(Default)]
struct Repetition {
    earlier: Option<ObjectKey>,
    count: u64,
}

impl Repetition {
    fn is_seen(&mut self, key: &ObjectKey) -> bool {
        if self.earlier.as_ref() == Some(key) {
            return true;
        }
        self.count += 1;
        if self.count.is_power_of_two() {
            self.earlier = Some(key.clone());
        }
        false
    }
}
