//! Registry of the repositories in memory, so that there is never a second copy of one.
//!
//! The cache can evict a repository while a caller is about to append to its file. A second copy, loaded from the file
//! in the meantime, would lack the lines that the first is about to append, and neither copy would write the line that
//! revokes them.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::SharedRepoDigests;
use crate::store::cache_key::RepoKey;

/// At this many entries, unused ones are removed; the next time at twice the remaining number.
const SWEEP_MIN: usize = 1024;

#[derive(Default)]
pub(super) struct LiveRepos(Mutex<Repos>);

#[derive(Default)]
struct Repos {
    used: HashMap<RepoKey, Weak<SharedRepoDigests>>,
    /// Repositories whose file lacks a revoking line, which only memory has.
    pending: HashMap<RepoKey, Arc<SharedRepoDigests>>,
    sweep_at: usize,
}

impl LiveRepos {
    pub(super) fn find(&self, key: &RepoKey) -> Option<Arc<SharedRepoDigests>> {
        self.0.lock().used.get(key)?.upgrade()
    }

    /// Registers a loaded repository. Must not run concurrently with another load of the same repository.
    pub(super) fn enter(&self, key: &RepoKey, repo: &Arc<SharedRepoDigests>) {
        let mut repos = self.0.lock();
        if repos.used.len() >= repos.sweep_at.max(SWEEP_MIN) {
            repos.used.retain(|_, used| used.strong_count() > 0);
            repos.sweep_at = 2 * repos.used.len();
        }
        repos.used.insert(key.clone(), Arc::downgrade(repo));
    }

    /// Adds or removes a repository whose file lacks a revoking line.
    pub(super) fn set_pending(&self, key: &RepoKey, repo: &Arc<SharedRepoDigests>, is_pending: bool) {
        let mut repos = self.0.lock();
        if is_pending {
            repos.pending.insert(key.clone(), Arc::clone(repo));
        } else if !repos.pending.is_empty() {
            repos.pending.remove(key);
        }
    }

    /// Repositories whose file lacks a revoking line.
    pub(super) fn pending(&self) -> Vec<(RepoKey, Arc<SharedRepoDigests>)> {
        let repos = self.0.lock();
        let pending = repos.pending.iter();
        pending
            .map(|(key, repo)| (key.clone(), Arc::clone(repo)))
            .collect()
    }
}
