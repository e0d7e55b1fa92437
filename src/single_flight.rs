//! One question for many askers.
//!
//! The work runs in a task of its own: an asker that leaves, or whose patience ends, does not end it by itself, so a late
//! answer still has its effects. Work that is shared by [`SingleFlight::share_for`] knows who waits for it, and may end itself
//! when none does. Who may share is said by the key: it holds the principal, so that no answer to one
//! credential is ever given to another.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::queue::{Demand, Waiter, Waiters};

/// The questions now under way.
pub struct SingleFlight<K, V> {
    running: Arc<Mutex<CallMap<K, V>>>,
}

type CallMap<K, V> = HashMap<K, ActiveCall<V>>;

/// One question under way.
struct ActiveCall<V> {
    answer: watch::Receiver<Option<V>>,
    waiters: Waiters,
    /// Tells it from an earlier one under the same key, which has ended for want of waiters.
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
    /// Joins the question under `key`, or puts it by running `work` to its end.
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

    /// The same for a request with this demand. `work` is told of all that wait for it, and ends without an answer when
    /// none is left.
    pub fn share_for<F, W>(&self, key: K, demand: Demand, work: W) -> SharedCall<V>
    where
        W: FnOnce(Waiters) -> F,
        F: Future<Output = Option<V>> + Send + 'static,
    {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let mut running = lock(&self.running);
        if let Some(ActiveCall { answer, waiters, .. }) = running.get(&key)
            && let Some(waiter) = waiters.join(demand)
        {
            return SharedCall {
                answer: answer.clone(),
                waiters: waiters.clone(),
                _waiter: Some(waiter),
            };
        }
        let (sender, answer) = watch::channel(None);
        let (waiters, waiter) = Waiters::alone(demand);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let shared = ActiveCall {
            answer: answer.clone(),
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
            // Leave first: whoever asks from here on asks anew, and whoever asked before gets this answer.
            drop(entry);
            if value.is_some() {
                sender.send_replace(value);
            }
        });
        SharedCall {
            answer,
            waiters,
            _waiter: waiter,
        }
    }

    /// How many questions are under way.
    pub fn count(&self) -> usize {
        lock(&self.running).len()
    }
}

/// Leaves the map however the work ends, by a panic too.
struct RemoveOnDrop<K: Eq + Hash, V> {
    running: Arc<Mutex<CallMap<K, V>>>,
    key: K,
    id: u64,
}

impl<K: Eq + Hash, V> Drop for RemoveOnDrop<K, V> {
    fn drop(&mut self) {
        let mut running = lock(&self.running);
        if running.get(&self.key).is_some_and(|shared| shared.id == self.id) {
            running.remove(&self.key);
        }
    }
}

/// The map is whole between any two statements under its lock, so a poisoned lock is as good as another.
fn lock<K, V>(running: &Mutex<CallMap<K, V>>) -> MutexGuard<'_, CallMap<K, V>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An answer on its way.
pub struct SharedCall<V> {
    answer: watch::Receiver<Option<V>>,
    waiters: Waiters,
    _waiter: Option<Waiter>,
}

impl<V: Clone> SharedCall<V> {
    /// All that wait for it.
    pub fn waiters(&self) -> &Waiters {
        &self.waiters
    }

    /// Waits for the answer; `None` if the work ended without one (it panicked, or the runtime stops).
    pub async fn wait(mut self) -> Option<V> {
        match self.answer.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone(),
            Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::Notify;

    use super::*;

    /// The bad interleaving: a question has ended for want of askers and is not gone yet when the next one asks.
    #[tokio::test(start_paused = true)]
    async fn t08_who_asks_as_a_question_is_given_up_asks_anew() {
        let single_flight = SingleFlight::<&str, usize>::default();
        let gate = Arc::new(Notify::new());
        let ending = Arc::clone(&gate);
        let first = single_flight.share_for("tag", Demand::BACKGROUND, |waiters| async move {
            let never = waiters.while_wanted(std::future::pending::<usize>()).await;
            ending.notified().await;
            never
        });
        drop(first);
        tokio::time::sleep(2 * crate::queue::ABANDONED_WITHIN).await;
        assert_eq!(single_flight.count(), 1, "it is given up and not gone");
        let second = single_flight.share_for("tag", Demand::BACKGROUND, |_| async { Some(2) });
        gate.notify_one();
        assert_eq!(second.wait().await, Some(2));
        tokio::task::yield_now().await;
        assert_eq!(single_flight.count(), 0);
    }

    #[tokio::test]
    async fn askers_of_one_question_share_its_answer_and_the_next_asks_anew() {
        let single_flight = SingleFlight::<&str, usize>::default();
        let asked = Arc::new(AtomicUsize::new(0));
        let gate = Arc::new(Notify::new());
        let ask = || {
            let (asked, gate) = (Arc::clone(&asked), Arc::clone(&gate));
            single_flight.share("tag", move || async move {
                gate.notified().await;
                asked.fetch_add(1, Ordering::SeqCst) + 1
            })
        };
        let (first, second) = (ask(), ask());
        gate.notify_one();
        assert_eq!((first.wait().await, second.wait().await), (Some(1), Some(1)));
        let third = ask();
        gate.notify_one();
        assert_eq!(third.wait().await, Some(2));
        assert_eq!(single_flight.count(), 0);
    }

    #[tokio::test]
    async fn a_question_outlives_its_askers() {
        let single_flight = SingleFlight::<&str, ()>::default();
        let (begin, done) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let asker = {
            let (begin, done) = (Arc::clone(&begin), Arc::clone(&done));
            single_flight.share("tag", move || async move {
                begin.notified().await;
                done.notify_one();
            })
        };
        drop(asker);
        begin.notify_one();
        done.notified().await;
    }

    #[tokio::test]
    async fn a_question_that_panics_answers_nobody_and_blocks_nobody() {
        let single_flight = SingleFlight::<&str, usize>::default();
        let fails = single_flight.share("tag", || async { panic!("on purpose") });
        assert_eq!(fails.wait().await, None);
        assert_eq!(single_flight.share("tag", || async { 7 }).wait().await, Some(7));
    }
}
