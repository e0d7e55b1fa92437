//! Lets go of what no tag leads to and nobody has used for long, when the operator wants it.
//!
//! What was pulled by its digest alone has no tag either, and is kept as long as it is used. What is about an image that
//! is held, such as its signature, stays with it.

use std::collections::HashSet;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use super::super::plan::{Plan, Snapshot, plan};
use super::super::usage_report::Reclaimed;
use super::super::{Store, StoreError};
use super::{Done, Evictor, ROUNDS_MAX, YOUNG};

impl Store {
    /// Removes what no tag leads to and was not used for `unused_for`, at least for [`YOUNG`]; with `is_trial`, only
    /// says what that would be. What is pinned or being read stays. Blocks.
    pub fn collect(&self, unused_for: Duration, is_trial: bool) -> Result<Reclaimed, StoreError> {
        self.evictor.collect(unused_for.max(YOUNG), is_trial)
    }
}

impl Evictor {
    fn collect(&self, unused_for: Duration, is_trial: bool) -> Result<Reclaimed, StoreError> {
        let _one_at_a_time = self.state.round.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.uses.now();
        let spared_since = now.checked_sub(unused_for).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut freed = Reclaimed::default();
        for _ in 0..ROUNDS_MAX {
            self.uses.watch();
            let mut snapshot = self.look();
            keep_tagged(&mut snapshot);
            let plan = plan(&snapshot, u64::MAX, spared_since);
            let done = if is_trial {
                Ok(trial(&plan))
            } else {
                self.carry_out(plan, None)
            };
            self.uses.stop_watching();
            let done = done?;
            freed.tags += done.freed.tags;
            freed.manifests += done.freed.manifests;
            freed.blobs += done.freed.blobs;
            freed.bytes += done.freed.bytes;
            // Otherwise something was needed meanwhile: another look.
            if done.is_whole {
                break;
            }
        }
        Ok(freed)
    }
}

/// No tag goes, and so nothing that one leads to; nor what is about something held.
fn keep_tagged(snapshot: &mut Snapshot) {
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
            listed.content.is_kept = true;
        }
    }
}

fn trial(plan: &Plan) -> Done {
    let mut freed = Reclaimed::default();
    for step in &plan.steps {
        freed.count(step, 0);
    }
    freed.bytes = plan.bytes;
    Done {
        freed,
        is_whole: true,
    }
}
