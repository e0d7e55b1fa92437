//! The requests that wait for one piece of work that they share.
//!
//! The work waits in a queue once, in the turn of each of them: who joins a download that another began does not wait
//! behind all else that the other wants. What none of them waits for any more ends, as long as that is safe: while it is
//! queued, and until the upstream's response.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use super::core::{Entry, Taken, Ticket};
use super::{Class, Demand, Full, NoPlace, Place, Receiver, Shared};

/// How long a request that was sent to an upstream goes on when no client waits for it any more. Its response mostly comes
/// within that time, and keeps the connection; and a client that leaves at once gets no more sent than one that waits.
pub const ABANDONED_WITHIN: Duration = Duration::from_secs(1);

/// The requests that wait for one piece of work. Clones are the same.
#[derive(Clone, Default)]
pub struct Waiters(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// How many there are of each.
    waiting: BTreeMap<Demand, usize>,
    queued: Vec<Queued>,
    /// The place that the work got last.
    place: Option<(Arc<Shared>, Taken)>,
    /// Whether the work goes on without them once it has begun.
    is_detached: bool,
    /// Whether one of them wanted all of what the work brings.
    is_whole_wanted: bool,
    /// Whether the work has ended for want of waiters.
    is_closed: bool,
}

/// The work in a queue.
struct Queued {
    queue: Arc<Shared>,
    ticket: Ticket,
    entries: BTreeMap<Demand, Entry>,
}

impl State {
    fn is_queued(&self) -> bool {
        !self.queued.is_empty()
    }

    fn serves_client(&self) -> bool {
        self.waiting
            .keys()
            .any(|demand| demand.class != Class::Background)
    }
}

/// One of them, until it is dropped.
pub struct Waiter {
    waiters: Waiters,
    demand: Demand,
}

impl Waiters {
    /// The only one of them, so far.
    pub fn alone(demand: Demand) -> (Self, Option<Waiter>) {
        let waiters = Self::default();
        let waiter = waiters.join(demand);
        (waiters, waiter)
    }

    /// One more; `None` if the work has ended for want of waiters.
    pub fn join(&self, demand: Demand) -> Option<Waiter> {
        let mut state = self.state();
        if state.is_closed {
            return None;
        }
        let State {
            waiting,
            queued,
            place,
            ..
        } = &mut *state;
        *waiting.entry(demand).or_default() += 1;
        for queued in queued {
            let Queued {
                queue,
                ticket,
                entries,
            } = queued;
            if !entries.contains_key(&demand)
                && let Some(entry) = queue.join(*ticket, demand)
            {
                entries.insert(demand, entry);
            }
        }
        if let Some((queue, taken)) = place {
            queue.raise(*taken, demand.class);
        }
        drop(state);
        self.0.changed.notify_waiters();
        Some(Waiter {
            waiters: self.clone(),
            demand,
        })
    }

    /// Runs `work` as long as one of them waits: `None` if none is left, at once while it is queued and after
    /// [`ABANDONED_WITHIN`] when it is not. Nobody joins after that.
    pub async fn while_wanted<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            // First, for the work that is taken out of the queue fails at the same moment.
            biased;
            () = self.abandoned() => None,
            done = work => Some(done),
        }
    }

    async fn abandoned(&self) {
        loop {
            let mut changed = pin!(self.0.changed.notified());
            changed.as_mut().enable();
            let (is_wanted, is_queued, is_detached) = {
                let state = self.state();
                (!state.waiting.is_empty(), state.is_queued(), state.is_detached)
            };
            if is_wanted || (is_detached && !is_queued) {
                changed.await;
            } else if is_queued {
                if self.close_if(|state| state.waiting.is_empty() && state.is_queued()) {
                    return;
                }
            } else if timeout(ABANDONED_WITHIN, changed).await.is_err()
                && self.close_if(|state| state.waiting.is_empty() && !state.is_detached)
            {
                return;
            }
        }
    }

    /// From now on the work goes on without them once it has begun: its outcome is wanted, however late. Work that is
    /// still queued ends with the last of them all the same.
    pub fn detach(&self) {
        self.state().is_detached = true;
        self.0.changed.notify_waiters();
    }

    /// Whether only a part was wanted, and none of them waits any more.
    pub fn is_unwanted(&self) -> bool {
        let state = self.state();
        state.waiting.is_empty() && !state.is_whole_wanted
    }

    /// Waits for one more while it is so; `false` if none came within this time.
    pub async fn wanted_again(&self, within: Duration) -> bool {
        let again = async {
            loop {
                let mut changed = pin!(self.0.changed.notified());
                changed.as_mut().enable();
                if !self.is_unwanted() {
                    return;
                }
                changed.await;
            }
        };
        timeout(within, again).await.is_ok()
    }

    /// The same, and nobody joins after that.
    pub async fn wanted_within(&self, within: Duration) -> bool {
        self.wanted_again(within).await
            || !self.close_if(|state| state.waiting.is_empty() && !state.is_whole_wanted)
    }

    /// One of them wants all of what the work brings, also when it has left.
    pub fn want_whole(&self) {
        self.state().is_whole_wanted = true;
        self.0.changed.notify_waiters();
    }

    /// Whether one of them is a client's.
    pub fn serves_client(&self) -> bool {
        self.state().serves_client()
    }

    /// Ends the work unless one of them is a client's; says whether it has ended. Nobody joins after that.
    pub fn close_unless_client(&self) -> bool {
        self.close_if(|state| !state.serves_client())
    }

    /// Whether the work waits for a place.
    pub fn is_queued(&self) -> bool {
        self.state().is_queued()
    }

    /// Whether the work has ended for want of waiters.
    pub(super) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    fn close_if(&self, is_over: impl FnOnce(&State) -> bool) -> bool {
        let mut state = self.state();
        state.is_closed = state.is_closed || is_over(&state);
        state.is_closed
    }

    /// Puts the work into a queue. Work that has begun and has no waiter any more waits as work of the cache itself.
    pub(super) fn enter(&self, queue: &Arc<Shared>, group: &Arc<str>) -> Result<InQueue, NoPlace> {
        let mut state = self.state();
        // All may have left before the work's task ran for the first time.
        state.is_closed |= state.waiting.is_empty() && state.place.is_none();
        if state.is_closed {
            return Err(NoPlace::Abandoned);
        }
        let none = state.waiting.is_empty().then_some(Demand::BACKGROUND);
        let demands = state.waiting.keys().copied().chain(none);
        let (ticket, entries, receiver) = queue.enter(group, demands);
        state.queued.push(Queued {
            queue: Arc::clone(queue),
            ticket,
            entries: entries.into_iter().collect(),
        });
        drop(state);
        self.0.changed.notify_waiters();
        Ok(InQueue {
            waiters: self.clone(),
            ticket,
            receiver,
        })
    }

    /// The work has this place now, and waits no longer under this ticket; `false` if the last waiter left between the
    /// grant and now.
    pub(super) fn took(&self, queued: &InQueue, place: &Place) -> bool {
        let mut state = self.state();
        if state.is_closed {
            return false;
        }
        state
            .queued
            .retain(|of| of.ticket != queued.ticket || !Arc::ptr_eq(&of.queue, &place.queue));
        // One that joined between the grant and now.
        if let Some(highest) = state.waiting.keys().map(|demand| demand.class).min() {
            place.queue.raise(place.taken, highest);
        }
        state.place = Some((Arc::clone(&place.queue), place.taken));
        true
    }

    #[cfg(test)]
    pub(super) fn entry_of(&self, demand: Demand) -> Option<Entry> {
        let state = self.state();
        state.queued.first()?.entries.get(&demand).copied()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is complete before it is given back.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut state = self.waiters.state();
        let State {
            waiting,
            queued,
            is_closed,
            ..
        } = &mut *state;
        if let Some(count) = waiting.get_mut(&self.demand) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.demand);
                // Said under this lock, so that nobody joins what is taken out of the queue.
                *is_closed |= waiting.is_empty() && !queued.is_empty();
                for Queued { queue, entries, .. } in queued {
                    if let Some(entry) = entries.remove(&self.demand) {
                        queue.leave(entry);
                    }
                }
            }
        }
        drop(state);
        self.waiters.0.changed.notify_waiters();
    }
}

/// The work while it is in a queue; dropped, it leaves it.
pub(super) struct InQueue {
    waiters: Waiters,
    ticket: Ticket,
    receiver: Receiver,
}

impl InQueue {
    /// The place, or why there is none; `None` if all have left.
    pub(super) async fn granted(&mut self) -> Option<Result<Place, Full>> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for InQueue {
    fn drop(&mut self) {
        let mut state = self.waiters.state();
        let position = state
            .queued
            .iter()
            .position(|queued| queued.ticket == self.ticket);
        let queued = position.map(|position| state.queued.swap_remove(position));
        drop(state);
        if let Some(queued) = queued {
            queued.queue.withdraw(self.ticket);
        }
        self.waiters.0.changed.notify_waiters();
    }
}
