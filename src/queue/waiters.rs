//! Set of requests that wait for one piece of shared work.
//!
//! The work is queued once, with an entry for each request, and starts at the first turn of any of them. A client that
//! joins another client's download therefore does not wait behind that client's other requests. Work without waiting
//! requests ends where that is safe: while it is queued, and until the upstream's response.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::scheduler::{Entry, PermitId, Ticket};
use super::{AcquireError, Class, Demand, Pause, Permit, QueueFull, Receiver, Shared};

/// How long an upstream request continues without a waiting client. Its response mostly arrives within that
/// time, which keeps the connection reusable. It also keeps a client that disconnects at once from causing more
/// upstream requests than one that waits.
pub const ABANDON_GRACE: Duration = Duration::from_secs(1);

/// Requests that wait for one piece of work. Clones share the set.
#[derive(Clone, Default)]
pub struct Waiters(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Notify,
    pause: Pause,
}

#[derive(Default)]
struct State {
    /// Number of waiting requests of each demand.
    waiting: BTreeMap<Demand, usize>,
    queued: Vec<Queued>,
    /// The permit that the work acquired last.
    permit: Option<(Arc<Shared>, PermitId)>,
    /// Whether the work continues without waiting requests once it has begun.
    is_detached: bool,
    /// Whether a request needed the complete result.
    is_complete_wanted: bool,
    /// Whether the work has ended because no request waited.
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

/// One waiting request. Dropping it leaves the set.
pub struct Waiter {
    waiters: Waiters,
    demand: Demand,
}

impl Waiters {
    /// A set with one request.
    pub fn with(demand: Demand) -> (Self, Option<Waiter>) {
        let waiters = Self::default();
        let waiter = waiters.join(demand);
        (waiters, waiter)
    }

    /// Adds a request. `None` if the work has ended because no request waited.
    pub fn join(&self, demand: Demand) -> Option<Waiter> {
        let mut state = self.0.state.lock();
        if state.is_closed {
            return None;
        }
        let State {
            waiting,
            queued,
            permit,
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
        if let Some((queue, permit)) = permit {
            queue.raise(*permit, demand.class);
        }
        drop(state);
        self.0.changed.notify_waiters();
        Some(Waiter {
            waiters: self.clone(),
            demand,
        })
    }

    /// Runs `work` while a request waits. Without one it returns `None`: at once while the work is queued,
    /// otherwise after [`ABANDON_GRACE`]. No request can join after that.
    pub async fn while_waited_for<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            // Polled first, because work that is removed from the queue fails at the same moment.
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
                let state = self.0.state.lock();
                (!state.waiting.is_empty(), state.is_queued(), state.is_detached)
            };
            if is_wanted || (is_detached && !is_queued) {
                changed.await;
            } else if is_queued {
                if self.close_if(|state| state.waiting.is_empty() && state.is_queued()) {
                    return;
                }
            } else if timeout(ABANDON_GRACE, changed).await.is_err()
                && self.close_if(|state| state.waiting.is_empty() && !state.is_detached)
            {
                return;
            }
        }
    }

    /// Lets the work continue without waiting requests once it has begun, because its result is needed however
    /// late. Queued work still ends with its last waiting request.
    pub fn detach(&self) {
        self.0.state.lock().is_detached = true;
        self.0.changed.notify_waiters();
    }

    /// Whether no request waits, and none needed the complete result.
    pub fn is_abandoned(&self) -> bool {
        let state = self.0.state.lock();
        state.waiting.is_empty() && !state.is_complete_wanted
    }

    /// Waits for a request to join while abandoned. `false` if none joined within this time.
    pub async fn rejoined_within(&self, within: Duration) -> bool {
        let again = async {
            loop {
                let mut changed = pin!(self.0.changed.notified());
                changed.as_mut().enable();
                if !self.is_abandoned() {
                    return;
                }
                changed.await;
            }
        };
        timeout(within, again).await.is_ok()
    }

    /// Like [`Self::rejoined_within`], and closes the set if none joined.
    pub async fn rejoined_or_closed_within(&self, within: Duration) -> bool {
        self.rejoined_within(within).await
            || !self.close_if(|state| state.waiting.is_empty() && !state.is_complete_wanted)
    }

    /// Records that a request needs the complete result, even after it has left.
    pub fn want_complete(&self) {
        self.0.state.lock().is_complete_wanted = true;
        self.0.changed.notify_waiters();
    }

    /// Whether a client's request waits.
    pub fn serves_client(&self) -> bool {
        self.0.state.lock().serves_client()
    }

    /// Whether a client's request waits, and one needs the complete result.
    pub fn serves_complete_pull(&self) -> bool {
        let state = self.0.state.lock();
        state.is_complete_wanted && state.serves_client()
    }

    /// Closes the set unless a client's request waits. Returns whether it is closed. No request can join after
    /// that.
    pub fn close_unless_client(&self) -> bool {
        self.close_if(|state| !state.serves_client())
    }

    /// Pauses of the work.
    pub fn pause(&self) -> &Pause {
        &self.0.pause
    }

    /// Whether the work waits for a permit.
    pub fn is_queued(&self) -> bool {
        self.0.state.lock().is_queued()
    }

    /// Whether the work has ended because no request waited.
    pub(super) fn is_closed(&self) -> bool {
        self.0.state.lock().is_closed
    }

    fn close_if(&self, is_over: impl FnOnce(&State) -> bool) -> bool {
        let mut state = self.0.state.lock();
        state.is_closed = state.is_closed || is_over(&state);
        state.is_closed
    }

    /// Adds the work to a queue. Work that has begun and has no waiting request counts as background work.
    pub(super) fn enter(&self, queue: &Arc<Shared>, group: &Arc<str>) -> Result<InQueue, AcquireError> {
        let mut state = self.0.state.lock();
        // All requests may have left before the work's task first ran.
        state.is_closed |= state.waiting.is_empty() && state.permit.is_none();
        if state.is_closed {
            return Err(AcquireError::Abandoned);
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

    /// Records that the work has this permit and its ticket no longer waits. `false` if the last request left
    /// after the grant.
    pub(super) fn attach_permit(&self, queued: &InQueue, permit: &Permit) -> bool {
        let mut state = self.0.state.lock();
        if state.is_closed {
            return false;
        }
        state
            .queued
            .retain(|of| of.ticket != queued.ticket || !Arc::ptr_eq(&of.queue, &permit.queue));
        // A request may have joined after the grant.
        if let Some(highest) = state.waiting.keys().map(|demand| demand.class).min() {
            permit.queue.raise(permit.id, highest);
        }
        state.permit = Some((Arc::clone(&permit.queue), permit.id));
        true
    }

    #[cfg(test)]
    pub(super) fn entry_of(&self, demand: Demand) -> Option<Entry> {
        let state = self.0.state.lock();
        state.queued.first()?.entries.get(&demand).copied()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut state = self.waiters.0.state.lock();
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
                // Set under this lock, so that no request joins work that is removed from the queue.
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

/// The work while it is queued. Dropping it removes it from the queue.
pub(super) struct InQueue {
    waiters: Waiters,
    ticket: Ticket,
    receiver: Receiver,
}

impl InQueue {
    /// The permit, or the limit that was reached. `None` if all requests have left.
    pub(super) async fn granted(&mut self) -> Option<Result<Permit, QueueFull>> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for InQueue {
    fn drop(&mut self) {
        let mut state = self.waiters.0.state.lock();
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
