//! Filter of the grants in the index: a set of hashes that avoids index reads for absent grants.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

use parking_lot::{Mutex, MutexGuard};

/// Hashes of all grants in the index, and of some removed ones. At most some 1.5 MiB: the index has at most
/// [`super::GRANTS_MAX`] grants, plus those put until the next pruning.
#[derive(Default)]
pub(super) struct GrantFilter {
    hasher: RandomState,
    sets: Mutex<Sets>,
}

#[derive(Default)]
struct Sets {
    /// `None` until the index has been scanned once.
    now: Option<HashSet<u64>>,
    /// Its replacement, while the index is scanned.
    next: Option<HashSet<u64>>,
}

/// A rebuild of the filter during an index scan. Dropped unfinished, it changes nothing.
pub(super) struct FilterRebuild<'a> {
    filter: &'a GrantFilter,
    is_finished: bool,
}

impl GrantFilter {
    /// Whether the index certainly has no grant with this key.
    pub(super) fn excludes(&self, key: &[u8]) -> bool {
        let hash = self.hasher.hash_one(key);
        let sets = self.sets.lock();
        sets.now.as_ref().is_some_and(|now| !now.contains(&hash))
    }

    /// Whether the index has been scanned.
    pub(super) fn is_complete(&self) -> bool {
        self.sets.lock().now.is_some()
    }

    /// Adds a key that is about to be put into the index.
    pub(super) fn add(&self, key: &[u8]) {
        let hash = self.hasher.hash_one(key);
        let Sets { now, next } = &mut *self.sets.lock();
        for set in [now, next].into_iter().flatten() {
            set.insert(hash);
        }
    }

    /// Starts a rebuild, unless one is running. `_order` is the lock under which [`Self::add`] and the index put
    /// happen: a put after the start of the scan would otherwise be in the index and not in the filter.
    pub(super) fn begin(&self, _order: &MutexGuard<'_, ()>) -> Option<FilterRebuild<'_>> {
        let mut sets = self.sets.lock();
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
    /// Adds a key found in the index.
    pub(super) fn add(&mut self, key: &[u8]) {
        let hash = self.filter.hasher.hash_one(key);
        if let Some(next) = &mut self.filter.sets.lock().next {
            next.insert(hash);
        }
    }

    /// Marks the scan as complete.
    pub(super) fn finish(&mut self) {
        self.is_finished = true;
    }
}

impl Drop for FilterRebuild<'_> {
    fn drop(&mut self) {
        let mut sets = self.filter.sets.lock();
        let next = sets.next.take();
        if self.is_finished {
            sets.now = next;
        }
    }
}
