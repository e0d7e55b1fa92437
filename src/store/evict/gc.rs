//! Lets go of what no tag leads to and nobody has used for long, when the operator wants it.
//!
//! What was pulled by its digest alone has no tag either, and is kept as long as it is used. What is about an image that
//! is held, such as its signature, stays with it.

use std::collections::HashSet;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use super::super::usage_report::Reclaimed;
use super::super::{Store, StoreError};
use super::plan::{Plan, Snapshot, plan};
use super::{EVICTION_MIN_AGE, Evictor, PlanOutcome, ROUNDS_MAX};

impl Store {
    /// Removes what no tag leads to and was not used for `unused_for`, at least for [`EVICTION_MIN_AGE`]; with `is_dry_run`, only
    /// says what that would be. What is pinned or being read stays. Blocks.
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
            // Otherwise something was needed meanwhile: another look.
            if done.is_complete {
                break;
            }
        }
        Ok(freed)
    }
}

/// No tag goes, and so nothing that one leads to; nor what is about something held.
fn protect_tagged(snapshot: &mut Snapshot) {
    for image in &mut snapshot.images {
        image.is_pinned = true;
    }
    let held: HashSet<_> = snapshot
        .manifests
        .iter()
        .map(|listed| listed.content.digest)
        .collect();
    for listed in &mut snapshot.manifests {
        if listed.subject.is_some_and(|subject| held.contains(&subject)) {
            listed.content.is_protected = true;
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
