//! Which repositories' proofs are in memory beside the cache, so that no two of one repository are.
//!
//! The cache lets go of a repository also while someone is about to write to its file. A second one, loaded from the file
//! meanwhile, would not know what the first one is about to append, and neither would write down what ends it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::SharedRepoDigests;
use crate::store::cache_key::RepoKey;

/// At this many, those no longer used are looked for; and at twice as many as were left then.
const SWEEP_MIN: usize = 1024;

#[derive(Default)]
pub(super) struct LiveRepos(Mutex<Repos>);

#[derive(Default)]
struct Repos {
    used: HashMap<RepoKey, Weak<SharedRepoDigests>>,
    /// Those whose file lacks a line that takes something back: only memory knows it.
    pending: HashMap<RepoKey, Arc<SharedRepoDigests>>,
    sweep_at: usize,
}

impl LiveRepos {
    pub(super) fn find(&self, key: &RepoKey) -> Option<Arc<SharedRepoDigests>> {
        self.lock().used.get(key)?.upgrade()
    }

    /// Notes what was loaded; not at the same time as another load of the same repository.
    pub(super) fn enter(&self, key: &RepoKey, repo: &Arc<SharedRepoDigests>) {
        let mut repos = self.lock();
        if repos.used.len() >= repos.sweep_at.max(SWEEP_MIN) {
            repos.used.retain(|_, used| used.strong_count() > 0);
            repos.sweep_at = 2 * repos.used.len();
        }
        repos.used.insert(key.clone(), Arc::downgrade(repo));
    }

    /// Keeps those whose file could not be appended to, or no longer does.
    pub(super) fn set_pending(&self, key: &RepoKey, repo: &Arc<SharedRepoDigests>, is_pending: bool) {
        let mut repos = self.lock();
        if is_pending {
            repos.pending.insert(key.clone(), Arc::clone(repo));
        } else if !repos.pending.is_empty() {
            repos.pending.remove(key);
        }
    }

    /// Those whose file lacks a line that takes something back.
    pub(super) fn pending(&self) -> Vec<(RepoKey, Arc<SharedRepoDigests>)> {
        let repos = self.lock();
        let pending = repos.pending.iter();
        pending
            .map(|(key, repo)| (key.clone(), Arc::clone(repo)))
            .collect()
    }

    /// The map is whole between any two statements under its lock.
    fn lock(&self) -> MutexGuard<'_, Repos> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
