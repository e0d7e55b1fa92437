//! Garbage collection: removes unused content that no tag references, on request of the operator.
//!
//! Content that was pulled by digest also has no tag. It stays as long as it is used. Referrers of a stored image,
//! such as its signature, stay with the image.

use std::collections::HashSet;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use super::super::usage_report::Reclaimed;
use super::super::{Store, StoreError};
use super::plan::{Plan, Snapshot, plan};
use super::{EVICTION_MIN_AGE, Evictor, PlanOutcome, ROUNDS_MAX};

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
        let _one_at_a_time = self.state.round.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.access_times.now();
        let protected_since = now.checked_sub(unused_for).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut freed = Reclaimed::default();
        for _ in 0..ROUNDS_MAX {
            self.access_times.start_tracking();
            let mut snapshot = self.snapshot();
            protect_tagged(&mut snapshot);
            let plan = plan(&snapshot, u64::MAX, protected_since);
            let done = if is_dry_run {
                Ok(dry_run(&plan))
            } else {
                self.execute(plan, None)
            };
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

/// Protects all tags, everything they reference, and referrers of stored manifests.
fn protect_tagged(snapshot: &mut Snapshot) {
    for image in &mut snapshot.images {
        image.is_pinned = true;
    }
    let stored: HashSet<_> = snapshot
        .manifests
        .iter()
        .map(|manifest_node| manifest_node.node.digest)
        .collect();
    for manifest_node in &mut snapshot.manifests {
        if manifest_node
            .subject
            .is_some_and(|subject| stored.contains(&subject))
        {
            manifest_node.node.is_protected = true;
        }
    }
}

fn dry_run(plan: &Plan) -> PlanOutcome {
    let mut freed = Reclaimed::default();
    for step in &plan.steps {
        freed.count(step, 0);
    }
    freed.bytes = plan.bytes;
    PlanOutcome {
        freed,
        is_complete: true,
    }
}
