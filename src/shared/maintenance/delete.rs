//! Deletion of objects at a bounded rate.
//!
//! One request for each object. A request for a thousand objects at once is not part of every storage's API, and the
//! parser of its response in `object_store` ends the program if the response names an object that was not requested.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::retry_pause;
use crate::bucket::{BucketError, Fault, Listed, ObjectStorage};

/// Objects in a batch, and the shortest time of one: 500 a second, of 3,500 that S3 accepts for a prefix.
pub(super) const BATCH: usize = 50;
const BATCH_TIME: Duration = Duration::from_millis(100);

/// Longest wait for the deletions that run when the operator interrupts them, or after one has failed.
const INTERRUPT_TIMEOUT: Duration = Duration::from_secs(2);

/// Concurrent requests.
const CONCURRENCY_MAX: usize = 16;

/// Precision of ages: a page states the time of writing in milliseconds, and a response in seconds.
const AGE_PRECISION: Duration = Duration::from_secs(2);

/// Which objects are deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deletes {
    /// All of them.
    All,
    /// Those that were not written since they were listed. This takes one more request for each.
    Unchanged,
}

/// What became of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deletion {
    /// It was deleted.
    Deleted,
    /// It is kept: it was written since it was listed.
    Rewritten,
    /// There was no object with this name.
    Absent,
}

/// Deletes these objects, and calls `deleted` for each. `interrupt` ends it soon. Returns whether it did.
pub async fn delete(
    bucket: &Arc<dyn ObjectStorage>,
    objects: &[Listed],
    mut deleted: impl FnMut(&Listed),
    interrupt: impl Future<Output = ()>,
) -> Result<bool, BucketError> {
    let mut interrupt = std::pin::pin!(interrupt);
    for batch in objects.chunks(BATCH) {
        let done = |listed: &Listed, _| deleted(listed);
        if delete_batch((bucket, Deletes::All), batch, done, interrupt.as_mut()).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Deletes a batch, and calls `done` for each object. `interrupt` ends it soon. Returns whether it did. After a failure that
/// does not pass, no other deletion begins, and `done` is called for those that run.
pub(super) async fn delete_batch(
    (bucket, deletes): (&Arc<dyn ObjectStorage>, Deletes),
    batch: &[Listed],
    mut done: impl FnMut(&Listed, Deletion),
    mut interrupt: Pin<&mut impl Future<Output = ()>>,
) -> Result<bool, BucketError> {
    // An interrupt between two batches begins no deletion.
    if interrupt.as_mut().now_or_never().is_some() {
        return Ok(true);
    }
    let end = Instant::now() + BATCH_TIME;
    let is_failed = &AtomicBool::new(false);
    let deletions = batch.iter().take_while(|_| !is_failed.load(Ordering::Relaxed));
    let deletions = deletions.map(|listed| async move {
        let deletion = delete_one((bucket, deletes), listed, is_failed).await;
        deletion.map(|deletion| (listed, deletion))
    });
    let mut deletions = futures_util::stream::iter(deletions).buffer_unordered(CONCURRENCY_MAX);
    let deleting = async {
        while let Some(deletion) = deletions.next().await {
            let error = match deletion {
                Ok((listed, deletion)) => {
                    done(listed, deletion);
                    continue;
                }
                Err(error) => error,
            };
            is_failed.store(true, Ordering::Relaxed);
            let running = async {
                while let Some(deletion) = deletions.next().await {
                    if let Ok((listed, deletion)) = deletion {
                        done(listed, deletion);
                    }
                }
            };
            // The result of those that take longer is not known.
            let _ = timeout(INTERRUPT_TIMEOUT, running).await;
            return Err(error);
        }
        sleep_until(end).await;
        Ok(())
    };
    let mut deleting = std::pin::pin!(deleting);
    tokio::select! {
        biased;
        ended = &mut deleting => return ended.map(|()| false),
        () = &mut interrupt => {}
    }
    // The result of those that take longer is not known.
    let ended = timeout(INTERRUPT_TIMEOUT, deleting).await;
    ended.unwrap_or(Ok(())).map(|()| true)
}

/// Deletes an object, with retries until another deletion has failed.
async fn delete_one(
    (bucket, deletes): (&Arc<dyn ObjectStorage>, Deletes),
    listed: &Listed,
    is_failed: &AtomicBool,
) -> Result<Deletion, BucketError> {
    let mut failures = 0;
    loop {
        let error = match attempt(bucket, deletes, listed).await {
            Ok(deletion) => return Ok(deletion),
            Err(error) => error,
        };
        failures += 1;
        match retry_pause(&error, failures) {
            Some(pause) => sleep(pause).await,
            None => return Err(error),
        }
        if is_failed.load(Ordering::Relaxed) {
            return Err(error);
        }
    }
}

async fn attempt(
    bucket: &Arc<dyn ObjectStorage>,
    deletes: Deletes,
    listed: &Listed,
) -> Result<Deletion, BucketError> {
    if deletes == Deletes::Unchanged {
        match bucket.head(&listed.key).await {
            Ok(info) if is_unchanged(listed.age, info.age) => {}
            Ok(_) => return Ok(Deletion::Rewritten),
            // The marker of a folder, or another operator has deleted it.
            Err(BucketError::Absent) => return Ok(Deletion::Absent),
            // No cache can read it.
            Err(error) if error.fault() == Fault::None => {}
            Err(error) => return Err(error),
        }
    }
    bucket.delete(&listed.key).await.map(|()| Deletion::Deleted)
}

/// Whether an object of the age `now` was not written since it was listed with the age `listed`.
fn is_unchanged(listed: Option<Duration>, now: Option<Duration>) -> bool {
    matches!((listed, now), (Some(listed), Some(now)) if now + AGE_PRECISION >= listed)
}
