//! Concurrency helpers: tasks that outlive their client, and a lock for each key.

use std::collections::HashMap;
use std::future::pending;
use std::hash::Hash;
use std::panic::resume_unwind;
use std::sync::Arc;

/// Runs `work` in a detached task. The server drops the future of a request whose client has left, but a grant or
/// denial must still be recorded completely.
pub(super) async fn detached<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // The process is shutting down, and the caller ends with it.
            Err(_) => pending().await,
        },
    }
}

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

type Locks<K> = HashMap<K, Arc<tokio::sync::Mutex<()>>>;

/// Locks by key: work on one key is serialized, work on different keys is not. Holds only keys with a holder or a
/// waiter.
pub(super) struct KeyedLocks<K>(Arc<Mutex<Locks<K>>>);

impl<K> Default for KeyedLocks<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

/// Guard of one key; released when dropped.
pub(super) struct KeyedGuard<K: Eq + Hash> {
    key: K,
    lock: Option<OwnedMutexGuard<()>>,
    locks: Arc<Mutex<Locks<K>>>,
}

impl<K: Eq + Hash + Clone> KeyedLocks<K> {
    /// Waits for the lock of `key`.
    pub(super) async fn lock(&self, key: K) -> KeyedGuard<K> {
        // Created before waiting, so that a cancelled waiter also removes its entry.
        let mut guard = KeyedGuard {
            key: key.clone(),
            lock: None,
            locks: Arc::clone(&self.0),
        };
        let lock = Arc::clone(self.0.lock().entry(key).or_default());
        guard.lock = Some(lock.lock_owned().await);
        guard
    }
}

impl<K: Eq + Hash> Drop for KeyedGuard<K> {
    fn drop(&mut self) {
        drop(self.lock.take());
        let mut locks = self.locks.lock();
        // Holders and waiters have a clone of their own, and new clones are made only under this lock.
        if locks
            .get(&self.key)
            .is_some_and(|lock| Arc::strong_count(lock) == 1)
        {
            locks.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::pin::pin;
    use std::task::{Context, Waker};

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn t08_detached_work_survives_dropped_request() {
        let (release, is_released) = oneshot::channel();
        let (done, is_done) = oneshot::channel();
        {
            let work = pin!(detached(async move {
                is_released.await.unwrap();
                done.send(()).unwrap();
            }));
            let is_pending = work.poll(&mut Context::from_waker(Waker::noop())).is_pending();
            assert!(is_pending);
        }
        release.send(()).unwrap();
        is_done.await.unwrap();
    }

    #[tokio::test]
    async fn t07_keyed_lock_blocks_only_its_own_key() {
        let locks = KeyedLocks::default();
        let first = locks.lock("a").await;
        let _other = locks.lock("b").await;
        let mut waiting = Box::pin(locks.lock("a"));
        assert!(futures_now(&mut waiting).is_none());
        drop(first);
        let second = waiting.await;
        assert_eq!(locks.0.lock().len(), 2);
        drop(second);
        assert_eq!(locks.0.lock().len(), 1);
    }

    #[tokio::test]
    async fn dropped_waiter_removes_its_lock() {
        let locks = KeyedLocks::default();
        let first = locks.lock("a").await;
        let mut waiting = Box::pin(locks.lock("a"));
        assert!(futures_now(&mut waiting).is_none());
        drop(first);
        drop(waiting);
        assert!(locks.0.lock().is_empty());
    }

    fn futures_now<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
        let mut context = Context::from_waker(Waker::noop());
        match std::pin::Pin::new(future).poll(&mut context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }
}
