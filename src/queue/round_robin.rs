//! Round robin over keys.

use std::collections::BTreeMap;
use std::ops::Bound;

/// Values by key. The next turn goes to the key after the one served last, in key order and wrapping around.
pub(super) struct RoundRobin<K, V> {
    items: BTreeMap<K, V>,
    /// Key that was served last.
    served: Option<K>,
}

impl<K, V> Default for RoundRobin<K, V> {
    fn default() -> Self {
        Self {
            items: BTreeMap::new(),
            served: None,
        }
    }
}

impl<K: Ord + Clone, V> RoundRobin<K, V> {
    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub(super) fn get_or_default(&mut self, key: K) -> &mut V
    where
        V: Default,
    {
        self.items.entry(key).or_default()
    }

    /// Updates the value of `key`, and removes it if `change` returns that it is empty.
    pub(super) fn update(&mut self, key: &K, change: impl FnOnce(&mut V) -> bool) {
        if let Some(value) = self.items.get_mut(key)
            && change(value)
        {
            self.items.remove(key);
        }
    }

    /// The first result of `find`, in the order of turns.
    pub(super) fn find<T>(&self, mut find: impl FnMut(&K, &V) -> Option<T>) -> Option<T> {
        let after = match &self.served {
            Some(served) => (Bound::Excluded(served), Bound::Unbounded),
            None => (Bound::Unbounded, Bound::Unbounded),
        };
        let around = self.served.iter().flat_map(|served| self.items.range(..=served));
        self.items
            .range::<K, _>(after)
            .chain(around)
            .find_map(|(key, value)| find(key, value))
    }

    /// Records that `key` had its turn.
    pub(super) fn serve(&mut self, key: &K) -> Option<&mut V> {
        self.served = Some(key.clone());
        self.items.get_mut(key)
    }
}
