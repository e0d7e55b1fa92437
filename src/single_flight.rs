//! Request coalescing (single flight): concurrent callers with equal keys share one call.
//!
//! The call runs in a task of its own. A caller that leaves or times out does not end it, so a late response
//! still takes effect. A call started with [`SingleFlight::share_for`] knows its waiting callers and may end
//! itself when none is left. The key contains the principal, so a response to one credential is never given to
//! another.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::queue::{Demand, Waiter, Waiters};

/// The calls in progress.
pub struct SingleFlight<K, V> {
    running: Arc<Mutex<CallMap<K, V>>>,
}

type CallMap<K, V> = HashMap<K, ActiveCall<V>>;

/// A call in progress.
struct ActiveCall<V> {
    value: watch::Receiver<Option<V>>,
    waiters: Waiters,
    /// Distinguishes it from an earlier call with the same key that was abandoned.
    id: u64,
}

impl<K, V> Default for SingleFlight<K, V> {
    fn default() -> Self {
        Self {
            running: Arc::default(),
        }
    }
}

impl<K, V> SingleFlight<K, V>
where
    K: Eq + Hash + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Joins the call of `key`, or starts it by running `work` to its end.
    pub fn share<F, W>(&self, key: K, work: W) -> SharedCall<V>
    where
        W: FnOnce() -> F,
        F: Future<Output = V> + Send + 'static,
    {
        self.share_for(key, Demand::BACKGROUND, |_| {
            let work = work();
            async { Some(work.await) }
        })
    }

    /// Like [`Self::share`], for a request with this demand. `work` gets the waiting requests, and ends without a
    /// value when none is left.
    pub fn share_for<F, W>(&self, key: K, demand: Demand, work: W) -> SharedCall<V>
    where
        W: FnOnce(Waiters) -> F,
        F: Future<Output = Option<V>> + Send + 'static,
    {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let mut running = self.running.lock();
        if let Some(ActiveCall { value, waiters, .. }) = running.get(&key)
            && let Some(waiter) = waiters.join(demand)
        {
            return SharedCall {
                value: value.clone(),
                waiters: waiters.clone(),
                _waiter: Some(waiter),
            };
        }
        let (sender, value) = watch::channel(None);
        let (waiters, waiter) = Waiters::with(demand);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let shared = ActiveCall {
            value: value.clone(),
            waiters: waiters.clone(),
            id,
        };
        running.insert(key.clone(), shared);
        drop(running);
        let entry = RemoveOnDrop {
            running: Arc::clone(&self.running),
            key,
            id,
        };
        let work = work(waiters.clone());
        tokio::spawn(async move {
            let value = work.await;
            // Removed from the map before the value is sent: later callers start a new call, earlier ones get
            // this value.
            drop(entry);
            if value.is_some() {
                sender.send_replace(value);
            }
        });
        SharedCall {
            value,
            waiters,
            _waiter: waiter,
        }
    }

    /// Like [`Self::share_for`], for work that takes its place in a queue with the waiting requests it gets: it ends with the
    /// last of them while it is queued, and only then.
    pub fn share_queued<F, W>(&self, key: K, demand: Demand, work: W) -> SharedCall<V>
    where
        W: FnOnce(Waiters) -> F,
        F: Future<Output = V> + Send + 'static,
    {
        self.share_for(key, demand, |waiters| {
            waiters.detach();
            let work = work(waiters.clone());
            async move { waiters.while_waited_for(work).await }
        })
    }

    /// Number of calls in progress.
    pub fn count(&self) -> usize {
        self.running.lock().len()
    }
}

/// Removes the map entry when the call ends, also by a panic.
struct RemoveOnDrop<K: Eq + Hash, V> {
    running: Arc<Mutex<CallMap<K, V>>>,
    key: K,
    id: u64,
}

impl<K: Eq + Hash, V> Drop for RemoveOnDrop<K, V> {
    fn drop(&mut self) {
        let mut running = self.running.lock();
        if running.get(&self.key).is_some_and(|shared| shared.id == self.id) {
            running.remove(&self.key);
        }
    }
}

/// A pending result.
pub struct SharedCall<V> {
    value: watch::Receiver<Option<V>>,
    waiters: Waiters,
    _waiter: Option<Waiter>,
}

impl<V: Clone> SharedCall<V> {
    /// All requests that wait for it.
    pub fn waiters(&self) -> &Waiters {
        &self.waiters
    }

    /// Waits for the value. `None` if the call ended without one: it panicked, was abandoned, or the runtime
    /// stops.
    pub async fn wait(mut self) -> Option<V> {
        match self.value.wait_for(Option::is_some).await {
            Ok(value) => value.clone(),
            Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::Notify;

    use super::*;

    /// Race: a call was abandoned and is still in the map when the next caller arrives.
    #[tokio::test(start_paused = true)]
    async fn t08_caller_during_abandonment_starts_a_new_call() {
        let single_flight = SingleFlight::<&str, usize>::default();
        let gate = Arc::new(Notify::new());
        let ending = Arc::clone(&gate);
        let first = single_flight.share_for("tag", Demand::BACKGROUND, |waiters| async move {
            let never = waiters.while_waited_for(std::future::pending::<usize>()).await;
            ending.notified().await;
            never
        });
        drop(first);
        tokio::time::sleep(2 * crate::queue::ABANDON_GRACE).await;
        assert_eq!(single_flight.count(), 1, "the abandoned call is still in the map");
        let second = single_flight.share_for("tag", Demand::BACKGROUND, |_| async { Some(2) });
        gate.notify_one();
        assert_eq!(second.wait().await, Some(2));
        tokio::task::yield_now().await;
        assert_eq!(single_flight.count(), 0);
    }

    #[tokio::test]
    async fn concurrent_callers_share_a_value_and_later_ones_do_not() {
        let single_flight = SingleFlight::<&str, usize>::default();
        let calls = Arc::new(AtomicUsize::new(0));
        let gate = Arc::new(Notify::new());
        let call = || {
            let (calls, gate) = (Arc::clone(&calls), Arc::clone(&gate));
            single_flight.share("tag", move || async move {
                gate.notified().await;
                calls.fetch_add(1, Ordering::SeqCst) + 1
            })
        };
        let (first, second) = (call(), call());
        gate.notify_one();
        assert_eq!((first.wait().await, second.wait().await), (Some(1), Some(1)));
        let third = call();
        gate.notify_one();
        assert_eq!(third.wait().await, Some(2));
        assert_eq!(single_flight.count(), 0);
    }

    #[tokio::test]
    async fn call_outlives_its_callers() {
        let single_flight = SingleFlight::<&str, ()>::default();
        let (begin, done) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let caller = {
            let (begin, done) = (Arc::clone(&begin), Arc::clone(&done));
            single_flight.share("tag", move || async move {
                begin.notified().await;
                done.notify_one();
            })
        };
        drop(caller);
        begin.notify_one();
        done.notified().await;
    }

    #[tokio::test]
    async fn panicking_call_returns_none_and_frees_its_key() {
        let single_flight = SingleFlight::<&str, usize>::default();
        let fails = single_flight.share("tag", || async { panic!("on purpose") });
        assert_eq!(fails.wait().await, None);
        assert_eq!(single_flight.share("tag", || async { 7 }).wait().await, Some(7));
    }
}
