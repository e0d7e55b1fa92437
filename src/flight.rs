//! One question for many askers.
//!
//! The work runs in a task of its own: an asker that leaves, or whose patience ends, does not end it, so a late answer
//! still has its effects. Who may share is said by the key: it holds the principal, so that no answer to one
//! credential is ever given to another.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// The questions now under way.
pub struct Flights<K, V> {
    running: Arc<Mutex<Running<K, V>>>,
}

type Running<K, V> = HashMap<K, watch::Receiver<Option<V>>>;

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self {
            running: Arc::default(),
        }
    }
}

impl<K, V> Flights<K, V>
where
    K: Eq + Hash + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Joins the question under `key`, or puts it by running `work`.
    pub fn share<F, W>(&self, key: K, work: W) -> Flight<V>
    where
        W: FnOnce() -> F,
        F: Future<Output = V> + Send + 'static,
    {
        let mut running = lock(&self.running);
        if let Some(answer) = running.get(&key) {
            return Flight {
                answer: answer.clone(),
            };
        }
        let (landing, answer) = watch::channel(None);
        running.insert(key.clone(), answer.clone());
        drop(running);
        let entry = Entered {
            running: Arc::clone(&self.running),
            key,
        };
        let work = work();
        tokio::spawn(async move {
            let value = work.await;
            // Leave first: whoever asks from here on asks anew, and whoever asked before gets this answer.
            drop(entry);
            landing.send_replace(Some(value));
        });
        Flight { answer }
    }

    /// How many questions are under way.
    pub fn count(&self) -> usize {
        lock(&self.running).len()
    }
}

/// Leaves the map however the work ends, by a panic too.
struct Entered<K: Eq + Hash, V> {
    running: Arc<Mutex<Running<K, V>>>,
    key: K,
}

impl<K: Eq + Hash, V> Drop for Entered<K, V> {
    fn drop(&mut self) {
        lock(&self.running).remove(&self.key);
    }
}

/// The map is whole between any two statements under its lock, so a poisoned lock is as good as another.
fn lock<K, V>(running: &Mutex<Running<K, V>>) -> MutexGuard<'_, Running<K, V>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An answer on its way.
pub struct Flight<V> {
    answer: watch::Receiver<Option<V>>,
}

impl<V: Clone> Flight<V> {
    /// Waits for the answer; `None` if the work ended without one (it panicked, or the runtime stops).
    pub async fn landed(mut self) -> Option<V> {
        match self.answer.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone(),
            Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn askers_of_one_question_share_its_answer_and_the_next_asks_anew() {
        let flights = Flights::<&str, usize>::default();
        let asked = Arc::new(AtomicUsize::new(0));
        let gate = Arc::new(Notify::new());
        let ask = || {
            let (asked, gate) = (Arc::clone(&asked), Arc::clone(&gate));
            flights.share("tag", move || async move {
                gate.notified().await;
                asked.fetch_add(1, Ordering::SeqCst) + 1
            })
        };
        let (first, second) = (ask(), ask());
        gate.notify_one();
        assert_eq!((first.landed().await, second.landed().await), (Some(1), Some(1)));
        let third = ask();
        gate.notify_one();
        assert_eq!(third.landed().await, Some(2));
        assert_eq!(flights.count(), 0);
    }

    #[tokio::test]
    async fn a_question_outlives_its_askers() {
        let flights = Flights::<&str, ()>::default();
        let (begin, done) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let asker = {
            let (begin, done) = (Arc::clone(&begin), Arc::clone(&done));
            flights.share("tag", move || async move {
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
        let flights = Flights::<&str, usize>::default();
        let fails = flights.share("tag", || async { panic!("on purpose") });
        assert_eq!(fails.landed().await, None);
        assert_eq!(flights.share("tag", || async { 7 }).landed().await, Some(7));
    }
}
