//! Durable removals that did not fit the worker's queue. Until they are sent, the index still holds the keys, so
//! reads must skip them.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

/// Most pending removals. With one more, the index is not read until it has been recreated.
pub(super) const REMOVALS_MAX: usize = 4096;

/// Removals that wait for space in the queue.
#[derive(Default)]
pub(super) struct PendingRemovals {
    /// Number of `removals`, plus one if the index must be recreated. Lets callers skip the lock when nothing is
    /// pending.
    count: AtomicUsize,
    removals: Mutex<RemovalSet>,
}

#[derive(Default)]
pub(super) struct RemovalSet {
    keys: HashSet<Vec<u8>>,
    /// More removals were pending than can be stored.
    is_overflowed: bool,
}

impl PendingRemovals {
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Changes the removals under the lock. Messages sent in `change` keep the order of the changes.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut RemovalSet) -> T) -> T {
        let mut removals = self.removals.lock();
        let changed = change(&mut removals);
        let count = removals.keys.len() + usize::from(removals.is_overflowed);
        self.count.store(count, Ordering::Release);
        changed
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

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.keys.contains(key)
    }

    /// Returns whether the index must be recreated before it is read again.
    pub(super) fn is_overflowed(&self) -> bool {
        self.is_overflowed
    }

    /// The removal of `key` was sent, or a newer value was written.
    pub(super) fn remove(&mut self, key: &[u8]) {
        self.keys.remove(key);
    }

    /// Drops the removals for which `send` returns true.
    pub(super) fn remove_sent(&mut self, mut send: impl FnMut(&[u8]) -> bool) {
        self.keys.retain(|key| !send(key));
    }

    /// A new index contains none of the keys.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
