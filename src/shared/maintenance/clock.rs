//! Check of the storage's time before a deletion by age.
//!
//! Ages are the difference between two times of the storage. If a proxy in front of it writes the `Date` by a clock that is
//! ahead, every object seems to be old. So an object is written first, and its age must be near 0. No clock of a host is read.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::bucket::{BucketError, ObjectKey, ObjectStorage};
use crate::trace_context::TraceContext;

/// Age of an object that was just written. Servers of one storage differ by seconds.
const AGE_MAX: Duration = Duration::from_secs(60);

/// Why nothing can be deleted by age.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClockError {
    /// A request failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// An object that was just written seems to be old.
    #[error(
        "nothing is deleted, because the time of the storage is wrong: an object that was just written is {} s old by \
         `Date` and `Last-Modified`; check the clocks of the storage and of proxies in front of it", .0.as_secs()
    )]
    Ahead(Duration),
}

/// Writes an object of a probe, and compares its age with 0. Storage that states no time has no ages, so nothing is deleted
/// there.
pub(super) async fn check_clock(bucket: &Arc<dyn ObjectStorage>) -> Result<(), ClockError> {
    let key = ObjectKey::probe(&TraceContext::new_root().id().to_bytes());
    bucket.put(&key, Bytes::from_static(b"clock"), None).await?;
    let found = bucket.head(&key).await;
    // One that is left over is deleted after a day.
    let _ = bucket.delete(&key).await;
    let age = found?.age.unwrap_or_default();
    if age > AGE_MAX {
        return Err(ClockError::Ahead(age));
    }
    Ok(())
}
