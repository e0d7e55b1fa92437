//! Garbage collection: removes unused content that no tag references, on request of the operator.
//!
//! Content that was pulled by digest also has no tag. It stays as long as it is used. Referrers of a stored image,
//! such as its signature, stay with the image.

use std::time::{Duration, SystemTime};

use super::super::usage_report::Reclaimed;
use super::super::{Store, StoreError};
use super::execute::PlanOutcome;
use super::plan::plan;
use super::{EVICTION_MIN_AGE, Evictor, ROUNDS_MAX};

impl Store {
    /// Removes content that no tag references and that was not used for `unused_for`, or for [`EVICTION_MIN_AGE`] if
    /// that is longer. With `is_dry_run`, only returns what would be removed. Pinned content and content with
    /// readers stays. Blocks.
    pub fn collect(&self, unused_for: Duration, is_dry_run: bool) -> Result<Reclaimed, StoreError> {
        self.evictor.collect(unused_for.max(EVICTION_MIN_AGE), is_dry_run)
    }
}

impl Evictor {
    fn collect(&self, unused_for: Duration, is_dry_run: bool) -> Result<Reclaimed, StoreError> {
        let _one_at_a_time = self.state.round.lock();
        let now = self.access_times.now();
        let protected_since = now.checked_sub(unused_for).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut freed = Reclaimed::default();
        for _ in 0..ROUNDS_MAX {
            self.access_times.start_tracking();
            let done = self.snapshot().and_then(|mut graph| {
                // What tags reference is referenced, so it stays.
                graph.keep_tags_and_referrers();
                let plan = plan(graph, u64::MAX, protected_since);
                if is_dry_run {
                    return Ok(PlanOutcome {
                        freed: plan.reclaimed(),
                        is_complete: true,
                    });
                }
                self.execute(&plan, None)
            });
            self.access_times.stop_tracking();
            let done = done?;
            freed.tags += done.freed.tags;
            freed.manifests += done.freed.manifests;
            freed.blobs += done.freed.blobs;
            freed.bytes += done.freed.bytes;
            // If not, content of the plan was used meanwhile. Take another snapshot and plan again.
            if done.is_complete {
                break;
            }
        }
        Ok(freed)
    }
}
