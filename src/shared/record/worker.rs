//! Task that writes records.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep};

use super::exchange::Updated;
use super::key::Class;
use super::queue::{Denial, RecordId, Update};
use super::records::CLOCK_DIFFERENCE_MAX;
#[cfg(all(test, feature = "shared"))]
use super::records::{Dated, RecordRead};
use super::state::{Merge, PublicState};
use crate::bucket::{BucketError, Fault, ObjectKey};
use crate::shared::Active;
use crate::shared::upload::admitted;

/// Attempts of an update that the bucket did not answer. A denial or a deletion has no limit.
const ATTEMPTS_MAX: u32 = 3;

/// Longest pause between the attempts of a denial or a deletion. They double from 2 s.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Interval of checks whether the bucket can be read again.
const READS_PAUSE: Duration = Duration::from_secs(1);

/// Age at which an unchanged tag is recorded again. The age matters in an outage, where limits are hours. At this age,
/// 1000 tags in constant use cost $1.44 a day for writes; at an age of a minute, five times as much.
pub(super) const TAG_RENEWAL: Duration = Duration::from_secs(5 * 60);

/// Age at which an unchanged public repository is recorded again. It counts for `grant_ttl_offline`, 12 hours.
pub(in crate::shared) const PUBLIC_RENEWAL: Duration = Duration::from_secs(60 * 60);

/// Result of an update that is made again.
const RETRIED: &str = "retried";

/// Pause after so many attempts of a denial or a deletion.
fn pause_after(attempts: u32) -> Duration {
    Duration::from_secs(1 << attempts.clamp(1, 5)).min(PAUSE_MAX)
}

/// Waits until the bucket can be read and written. Whether a write is a probe; `None`: the queue was closed.
async fn ready(active: &Active) -> Option<bool> {
    while active.are_reads_stopped() {
        if active.uploads.is_closed() {
            return None;
        }
        // Another task sends the probes.
        sleep(READS_PAUSE).await;
    }
    admitted(active).await
}

/// The task that writes records, until the queue is closed.
pub(in crate::shared) async fn work(active: Arc<Active>) {
    let Some(records) = &active.records else { return };
    while let Some((id, update, attempts)) = records.updates.next().await {
        let Some(is_probe) = ready(&active).await else {
            // Who closed the queue has taken the update over.
            records.updates.end(id, None);
            return;
        };
        // Not a later denial, which may have been queued meanwhile.
        let denial = records.updates.running_denial();
        let attempts = attempts + u32::from(!is_probe);
        let done = if id.class == Class::Content {
            active.update(&id, update.clone(), denial.is_known).await
        } else {
            match active.keeps_conditions().await {
                Ok(true) => active.update(&id, update.clone(), denial.is_known).await,
                Ok(false) => {
                    // Simultaneous writers would bring an earlier statement back.
                    active
                        .telemetry
                        .shared()
                        .record_record(id.class.name(), "unconditional");
                    records.finish(&id, denial);
                    records.updates.end(id, None);
                    continue;
                }
                Err(error) => Err(error),
            }
        };
        let (result, written) = match &done {
            Ok(updated @ (Updated::Written | Updated::Known)) => (updated.name(), Some(update.clone())),
            Ok(Updated::Lost) if update.is_urgent() => {
                let due = Some(Instant::now() + pause_after(attempts));
                records
                    .updates
                    .push_again(id.clone(), (update, denial), attempts, due);
                (RETRIED, None)
            }
            Ok(updated) => (updated.name(), None),
            Err(error)
                if update.is_urgent()
                    || error.fault() != Fault::None && (is_probe || attempts < ATTEMPTS_MAX) =>
            {
                tracing::debug!(class = id.class.name(), %error, "failed to write a record, trying again");
                let due = update.is_urgent().then(|| Instant::now() + pause_after(attempts));
                records
                    .updates
                    .push_again(id.clone(), (update, denial), attempts, due);
                (RETRIED, None)
            }
            Err(error) => {
                tracing::debug!(class = id.class.name(), %error, "failed to write a record");
                ("failed", None)
            }
        };
        active.telemetry.shared().record_record(id.class.name(), result);
        if matches!(done, Ok(Updated::Later)) && denial != Denial::default() {
            tracing::error!(
                class = id.class.name(),
                "a record of a later version takes no denial of this version, other caches may not get it"
            );
        }
        // Whoever closed the queue has taken an urgent update over, perhaps to another bucket.
        if result != RETRIED && !active.uploads.is_closed() {
            records.finish(&id, denial);
        }
        records.updates.end(id, written);
    }
}

impl Active {
    /// `is_known`: the update records a denial of what this cache had granted.
    async fn update(
        self: &Arc<Self>,
        id: &RecordId,
        update: Update,
        is_known: bool,
    ) -> Result<Updated, BucketError> {
        let Some(records) = &self.records else {
            return Ok(Updated::NotNeeded);
        };
        let clock = || self.settings.bucket.clock();
        let earliest = || clock().and_then(|clock| clock.earliest(records.base));
        if earliest().is_none() {
            // Any response tells the time.
            self.get_record::<PublicState>(&ObjectKey::probe(&[0; 16]))
                .await?;
        }
        let Some(base) = earliest() else {
            return Ok(Updated::NotNeeded);
        };
        // A denial counts from its latest possible time, because a success that preceded it must not outlast it.
        let latest = clock().and_then(|clock| clock.latest(records.base));
        let base = match &update {
            Update::Public(_) | Update::Grant(_) if update.is_urgent() => latest.unwrap_or(base),
            _ => base,
        };
        let by = |at: u64| base.saturating_add(at).saturating_sub(1);
        match update {
            Update::Tag(state) => {
                // Otherwise the age of a digest would contain a step of the storage's clock while the update waited.
                let agreed = *records.agreed.lock();
                let has_stepped =
                    agreed.is_none_or(|agreed| agreed.abs_diff(base) > CLOCK_DIFFERENCE_MAX.as_secs());
                let state = if has_stepped {
                    state.without_sights()
                } else {
                    state
                };
                self.swap_shifted(id, state.shift(by), (is_known, TAG_RENEWAL))
                    .await
            }
            Update::Content(state) => {
                let renewal = self.settings.keep / 2;
                self.swap_shifted(id, state.shift(by), (is_known, renewal)).await
            }
            Update::Public(state) => {
                self.swap_shifted(id, state.shift(by), (is_known, PUBLIC_RENEWAL))
                    .await
            }
            Update::Grant(state) => {
                self.swap_shifted(id, state.shift(by), (is_known, PUBLIC_RENEWAL))
                    .await
            }
        }
    }

    async fn swap_shifted<S>(
        self: &Arc<Self>,
        id: &RecordId,
        state: S,
        (is_known, renewal): (bool, Duration),
    ) -> Result<Updated, BucketError>
    where
        S: Merge + Serialize + DeserializeOwned,
    {
        let is_new = is_known || state.is_new();
        self.swap(id, (&state, is_new), renewal.as_secs()).await
    }
}

#[cfg(all(test, feature = "shared"))]
impl Active {
    pub(super) async fn update_of(
        self: &Arc<Self>,
        id: &RecordId,
        update: Update,
    ) -> Result<&'static str, BucketError> {
        self.update(id, update, false).await.map(|updated| updated.name())
    }

    pub(super) async fn read_raw<S: Merge + DeserializeOwned>(
        self: &Arc<Self>,
        id: &RecordId,
    ) -> RecordRead<S> {
        self.read_record(id).await
    }

    pub(super) async fn read_of<S: Merge + DeserializeOwned>(
        self: &Arc<Self>,
        id: &RecordId,
    ) -> Option<Dated<S>> {
        self.read_record(id).await.found()
    }
}
