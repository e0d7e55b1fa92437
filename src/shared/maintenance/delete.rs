//! Deletion of objects at a bounded rate.
//!
//! One request for each object. A request for a thousand objects at once is not part of every storage's API, and the
//! parser of its response in `object_store` ends the program if the response names an object that was not requested.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::retry_pause;
use crate::bucket::{BucketError, Listed, ObjectStorage};

/// Objects in a batch, and the shortest time of one: 500 a second, of 3,500 that S3 accepts for a prefix.
pub(super) const BATCH: usize = 50;
const BATCH_TIME: Duration = Duration::from_millis(100);

/// Longest wait for the deletions that run when the operator interrupts them.
const INTERRUPT_TIMEOUT: Duration = Duration::from_secs(2);

/// Concurrent requests.
const CONCURRENCY_MAX: usize = 16;

/// Deletes these objects, and calls `deleted` for each. `interrupt` ends it soon. Returns whether it did.
pub async fn delete(
    bucket: &Arc<dyn ObjectStorage>,
    objects: &[Listed],
    mut deleted: impl FnMut(&Listed),
    interrupt: impl Future<Output = ()>,
) -> Result<bool, BucketError> {
    let mut interrupt = std::pin::pin!(interrupt);
    for batch in objects.chunks(BATCH) {
        if delete_batch(bucket, batch, &mut deleted, interrupt.as_mut()).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Deletes a batch, and calls `deleted` for each object that is deleted. `interrupt` ends it soon. Returns whether it did.
/// After a failure that does not pass, no other deletion begins.
pub(super) async fn delete_batch(
    bucket: &Arc<dyn ObjectStorage>,
    batch: &[Listed],
    mut deleted: impl FnMut(&Listed),
    mut interrupt: Pin<&mut impl Future<Output = ()>>,
) -> Result<bool, BucketError> {
    let end = Instant::now() + BATCH_TIME;
    let deletions = batch.iter().map(|listed| async move {
        let deletion = delete_one(bucket, listed).await;
        deletion.map(|()| listed)
    });
    let mut deletions = futures_util::stream::iter(deletions).buffer_unordered(CONCURRENCY_MAX);
    let deleting = async {
        while let Some(deletion) = deletions.next().await {
            deleted(deletion?);
        }
        sleep_until(end).await;
        Ok(())
    };
    let mut deleting = std::pin::pin!(deleting);
    tokio::select! {
        biased;
        done = &mut deleting => return done.map(|()| false),
        () = &mut interrupt => {}
    }
    // The result of those that take longer is not known.
    let done = timeout(INTERRUPT_TIMEOUT, deleting).await;
    done.unwrap_or(Ok(())).map(|()| true)
}

async fn delete_one(bucket: &Arc<dyn ObjectStorage>, listed: &Listed) -> Result<(), BucketError> {
    let mut failures = 0;
    loop {
        let Err(error) = bucket.delete(&listed.key).await else {
            return Ok(());
        };
        failures += 1;
        match retry_pause(&error, failures) {
            Some(pause) => sleep(pause).await,
            None => return Err(error),
        }
    }
}
