//! Which grants the index may have: a set of hashes, so that the index is not asked for what it cannot have.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The hashes of all grants in the index, and of some that are no longer there. Some 1.5 MiB at most: the index has no more
/// than [`super::GRANTS_MAX`] grants, and those noted until the next look through them.
#[derive(Default)]
pub(super) struct GrantFilter {
    hasher: RandomState,
    sets: Mutex<Sets>,
}

#[derive(Default)]
struct Sets {
    /// `None` until the index was looked through once.
    now: Option<HashSet<u64>>,
    /// What takes its place, while the index is looked through.
    next: Option<HashSet<u64>>,
}

/// A look through the index. Dropped unfinished, it changes nothing.
pub(super) struct FilterRebuild<'a> {
    filter: &'a GrantFilter,
    is_finished: bool,
}

impl GrantFilter {
    fn sets(&self) -> MutexGuard<'_, Sets> {
        self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the index has no grant of this key for sure.
    pub(super) fn excludes(&self, key: &[u8]) -> bool {
        let hash = self.hasher.hash_one(key);
        let sets = self.sets();
        sets.now.as_ref().is_some_and(|now| !now.contains(&hash))
    }

    /// Whether the index was looked through.
    pub(super) fn is_complete(&self) -> bool {
        self.sets().now.is_some()
    }

    /// A grant is about to be put into the index.
    pub(super) fn add(&self, key: &[u8]) {
        let hash = self.hasher.hash_one(key);
        let Sets { now, next } = &mut *self.sets();
        for set in [now, next].into_iter().flatten() {
            set.insert(hash);
        }
    }

    /// Begins a look through the index, unless there is one already. `_order` is what [`Self::add`] and the put that follows
    /// it are done under: a put that came later than the look would be in the index and not in the list.
    pub(super) fn begin(&self, _order: &MutexGuard<'_, ()>) -> Option<FilterRebuild<'_>> {
        let mut sets = self.sets();
        if sets.next.is_some() {
            return None;
        }
        sets.next = Some(HashSet::new());
        Some(FilterRebuild {
            filter: self,
            is_finished: false,
        })
    }
}

impl FilterRebuild<'_> {
    /// The index has a grant of this key.
    pub(super) fn add(&mut self, key: &[u8]) {
        let hash = self.filter.hasher.hash_one(key);
        if let Some(next) = &mut self.filter.sets().next {
            next.insert(hash);
        }
    }

    /// The index has no others.
    pub(super) fn finish(&mut self) {
        self.is_finished = true;
    }
}

impl Drop for FilterRebuild<'_> {
    fn drop(&mut self) {
        let mut sets = self.filter.sets();
        let next = sets.next.take();
        if self.is_finished {
            sets.now = next;
        }
    }
}
