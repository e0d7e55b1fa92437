//! Garbage collection: removes unused content that no tag references, on request of the operator.
//!
//! Content that was pulled by digest also has no tag. It stays as long as it is used. Referrers of a stored image,
//! such as its signature, stay with the image.

use std::time::{Duration, SystemTime};

use super::super::usage_report::Reclaimed;
use super::super::{Store, StoreError};
use super::plan::{Plan, plan};
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
        let now = self.access_times.now();
        let protected_since = now.checked_sub(unused_for).unwrap_or(SystemTime::UNIX_EPOCH);
        if is_dry_run {
            // It removes nothing, so a pull that needs space does not wait for it.
            return Ok(self.unused(protected_since)?.reclaimed());
        }
        let mut freed = Reclaimed::default();
        for _ in 0..ROUNDS_MAX {
            // Per round, so that a pull that needs space waits for one of them at most.
            let _one_at_a_time = self.state.round.lock();
            let done = self.tracked(|| self.execute(&self.unused(protected_since)?, None))?;
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

    /// Plans the removal of content that no tag references and that was not used since `protected_since`.
    fn unused(&self, protected_since: SystemTime) -> Result<Plan, StoreError> {
        let mut graph = self.snapshot()?;
        // What tags reference is referenced, so it stays.
        graph.keep_tags_and_referrers();
        Ok(plan(graph, u64::MAX, protected_since))
    }
}
