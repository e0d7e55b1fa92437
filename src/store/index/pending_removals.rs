//! Removals for which the queue of the index thread had no room. Until they are sent, the index still has what they remove,
//! and no look-up may find it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Removals kept. With one more the index is not read until it was made anew.
pub(super) const REMOVALS_MAX: usize = 4096;

/// The removals that wait for room in the queue.
#[derive(Default)]
pub(super) struct PendingRemovals {
    /// Of `removals`, and one more where the index is to be made anew: most of the time there is nothing to look for.
    count: AtomicUsize,
    removals: Mutex<RemovalSet>,
}

#[derive(Default)]
pub(super) struct RemovalSet {
    keys: HashSet<Vec<u8>>,
    /// There were too many.
    is_overflowed: bool,
}

impl PendingRemovals {
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Changes the removals. What is sent meanwhile comes in the order of these changes.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut RemovalSet) -> T) -> T {
        let mut removals = self.lock();
        let changed = change(&mut removals);
        let count = removals.keys.len() + usize::from(removals.is_overflowed);
        self.count.store(count, Ordering::Release);
        changed
    }

    fn lock(&self) -> MutexGuard<'_, RemovalSet> {
        self.removals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RemovalSet {
    pub(super) fn add(&mut self, key: Vec<u8>) {
        if self.keys.len() < REMOVALS_MAX {
            self.keys.insert(key);
        } else {
            self.is_overflowed |= !self.keys.contains(&key);
        }
    }

    pub(super) fn has(&self, key: &[u8]) -> bool {
        self.keys.contains(key)
    }

    /// Whether the index is to be made anew, and not to be read before.
    pub(super) fn is_overflowed(&self) -> bool {
        self.is_overflowed
    }

    /// The removal of `key` was sent, or something else was put there.
    pub(super) fn end(&mut self, key: &[u8]) {
        self.keys.remove(key);
    }

    /// Ends those that `send` says are sent.
    pub(super) fn end_sent(&mut self, mut send: impl FnMut(&[u8]) -> bool) {
        self.keys.retain(|key| !send(key));
    }

    /// A new index has none of all that.
    pub(super) fn end_all(&mut self) {
        *self = Self::default();
    }
}
