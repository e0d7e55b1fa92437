//! A lock for each key: work on one key comes one after the other, and does not wait for work on another.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

type Locks<K> = HashMap<K, Arc<tokio::sync::Mutex<()>>>;

/// The locks that are held or waited for.
pub(super) struct KeyedLocks<K>(Arc<Mutex<Locks<K>>>);

impl<K> Default for KeyedLocks<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

/// The lock of one key. Given back when dropped.
pub(super) struct KeyedGuard<K: Eq + Hash> {
    key: K,
    lock: Option<OwnedMutexGuard<()>>,
    locks: Arc<Mutex<Locks<K>>>,
}

impl<K: Eq + Hash + Clone> KeyedLocks<K> {
    /// Waits for the lock of `key`.
    pub(super) async fn turn(&self, key: K) -> KeyedGuard<K> {
        // Made first: a caller that leaves while it waits takes its lock away with it.
        let mut turn = KeyedGuard {
            key: key.clone(),
            lock: None,
            locks: Arc::clone(&self.0),
        };
        let lock = Arc::clone(locked(&self.0).entry(key).or_default());
        turn.lock = Some(lock.lock_owned().await);
        turn
    }
}

impl<K: Eq + Hash> Drop for KeyedGuard<K> {
    fn drop(&mut self) {
        drop(self.lock.take());
        let mut locks = locked(&self.locks);
        // Others that hold or wait for it have one of their own; a new one is only given out under this lock.
        if locks
            .get(&self.key)
            .is_some_and(|lock| Arc::strong_count(lock) == 1)
        {
            locks.remove(&self.key);
        }
    }
}

/// The map is whole between any two statements under its lock.
fn locked<K>(locks: &Mutex<Locks<K>>) -> MutexGuard<'_, Locks<K>> {
    locks.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn t07_a_lock_is_waited_for_by_its_own_key_alone() {
        let turns = KeyedLocks::default();
        let first = turns.turn("a").await;
        let _other = turns.turn("b").await;
        let mut waiting = Box::pin(turns.turn("a"));
        assert!(futures_now(&mut waiting).is_none());
        drop(first);
        let second = waiting.await;
        assert_eq!(locked(&turns.0).len(), 2);
        drop(second);
        assert_eq!(locked(&turns.0).len(), 1);
    }

    #[tokio::test]
    async fn a_waiter_that_leaves_leaves_no_lock_behind() {
        let turns = KeyedLocks::default();
        let first = turns.turn("a").await;
        let mut waiting = Box::pin(turns.turn("a"));
        assert!(futures_now(&mut waiting).is_none());
        drop(first);
        drop(waiting);
        assert!(locked(&turns.0).is_empty());
    }

    fn futures_now<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(future).poll(&mut context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }
}
