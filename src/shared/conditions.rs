//! Probe of conditional writes: whether the storage lets exactly one of many simultaneous writers win.
//!
//! Some storages ignore conditions, and some pass every sequential check and let all of 16 simultaneous creates win. So
//! the probe is concurrent, on a key of its own.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::bucket::{BucketError, Fault, ObjectKey, ObjectStorage};
use crate::trace_context::TraceContext;

/// Simultaneous writers.
const WRITERS: usize = 16;

/// How a storage treats conditional writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conditions {
    /// Writers of 16 whose `If-None-Match: *` succeeded. One is right.
    pub creates_won: usize,
    /// Writers of 16 whose `If-Match` succeeded. One is right.
    pub updates_won: usize,
}

impl Conditions {
    /// Whether exactly one writer won each time.
    pub fn are_kept(self) -> bool {
        self.creates_won == 1 && self.updates_won == 1
    }
}

/// Probes a bucket and deletes the object that it wrote.
pub async fn probe(bucket: &Arc<dyn ObjectStorage>) -> Result<Conditions, BucketError> {
    let random = TraceContext::new_root().id().to_bytes();
    let key = Arc::new(ObjectKey::probe(&random));
    let result = probe_at(bucket, &key).await;
    let deleted = bucket.delete(&key).await;
    if let Err(error) = deleted {
        tracing::debug!(object = %key, %error, "failed to delete the object of a probe");
    }
    result
}

async fn probe_at(bucket: &Arc<dyn ObjectStorage>, key: &Arc<ObjectKey>) -> Result<Conditions, BucketError> {
    let creates = (0..WRITERS).map(|writer| {
        let (bucket, key) = (Arc::clone(bucket), Arc::clone(key));
        async move { bucket.create(&key, body(writer), None).await }
    });
    let creates_won = winners(creates).await?;
    // The version after all creates, whoever wrote it.
    let Some(etag) = bucket.head(key).await?.etag else {
        return Ok(Conditions {
            creates_won,
            updates_won: 0,
        });
    };
    let etag: Arc<str> = etag.into();
    let updates = (0..WRITERS).map(|writer| {
        let (bucket, key, etag) = (Arc::clone(bucket), Arc::clone(key), Arc::clone(&etag));
        async move { bucket.update(&key, body(WRITERS + writer), &etag).await }
    });
    let updates_won = winners(updates).await?;
    Ok(Conditions {
        creates_won,
        updates_won,
    })
}

/// Different bytes, because storages may take a hash of them as the version.
fn body(writer: usize) -> Bytes {
    format!("writer {writer}").into()
}

/// Number of writers that won. An error if none did and the bucket failed.
async fn winners<F>(writers: impl Iterator<Item = F>) -> Result<usize, BucketError>
where
    F: Future<Output = Result<Option<String>, BucketError>> + Send + 'static,
{
    let mut running: JoinSet<_> = writers.collect();
    let (mut won, mut failure) = (0, None);
    while let Some(written) = running.join_next().await {
        match written {
            Ok(Ok(_)) => won += 1,
            Ok(Err(error)) if error.fault() != Fault::None => failure = Some(error),
            Ok(Err(_)) | Err(_) => {}
        }
    }
    match failure {
        Some(error) if won == 0 => Err(error),
        _ => Ok(won),
    }
}

#[cfg(all(test, feature = "shared"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::bucket::in_memory;

    #[tokio::test]
    async fn storage_with_conditions_has_one_winner() {
        let bucket = in_memory();
        let found = probe(&bucket).await.unwrap();
        assert_eq!((found.creates_won, found.updates_won), (1, 1));
        assert!(found.are_kept());
    }
}
