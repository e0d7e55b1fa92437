//! Admission to a bounded number of places, fair over clients.
//!
//! The problem: one client asks for four thousand blobs, or an upstream drips, and everybody else waits behind that. A
//! semaphore serves in the order of arrival, so whoever asks most has most.
//!
//! A [`Queue`] gives places in turn (see `core`): by class, then round robin over clients and their flows. Being queued is
//! no failure and has no timeout; it ends with the last request that waits. What waits is bounded, for each client and in
//! all, and beyond that the answer is [`Full`] at once.
//!
//! Work that several requests share waits once, in the turn of each of them: see [`Waiters`].
//!
//! * `core`: the order; pure. * `waiters`: the requests that wait for one piece of work. * `demand`, `peer`: what tells
//!   requests apart. * `ring`: round robin.

mod core;
mod demand;
mod peer;
mod ring;
mod waiters;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use self::core::{Bounds, Core, Entry, Grant, Met, Taken, Ticket};
pub use self::demand::{Class, Demand, flow};
pub use self::peer::Peer;
pub use self::waiters::{ABANDONED_WITHIN, Waiter, Waiters};

/// Requests of one client that may wait in one queue. Ten jobs of 40 layers, or 100 of 3, are fewer.
pub const WAITING_PER_PEER_MAX: usize = 1024;

/// Requests of all clients that may wait in one queue.
pub const WAITING_MAX: usize = 4096;

/// The longest `Retry-After` that a full queue states.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);

/// How often refusals are logged.
const LOGGED_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Places, given in turn. Clones are the same queue.
#[derive(Clone)]
pub struct Queue(Arc<Shared>);

struct Shared {
    /// In the log.
    name: &'static str,
    state: Mutex<State>,
}

struct State {
    core: Core,
    pending: HashMap<Ticket, Pending>,
    counts: Counts,
    /// How long a place is held, as a moving mean.
    held_for: Duration,
    /// When a refusal was logged last.
    logged: Option<Instant>,
}

struct Pending {
    reply: oneshot::Sender<Result<Place, Full>>,
    since: Instant,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// Too many wait already.
    Full(Full),
    /// No request waits for it any more.
    Abandoned,
}

/// Too many wait already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Whether they are the client's own, and not all of them together.
    pub is_clients_own: bool,
    /// How long those that wait now are likely to take.
    pub retry_after: Duration,
}

/// What happened since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Places given.
    pub granted: u64,
    /// The waits for them, together.
    pub waited: Duration,
    /// Requests refused because their client had too many waiting.
    pub refused_by_client: u64,
    /// Requests refused because too many waited in all.
    pub refused_in_all: u64,
    /// Waits that ended because no request was left.
    pub abandoned: u64,
}

/// One place, until it is dropped.
pub struct Place {
    queue: Arc<Shared>,
    taken: Taken,
    since: Instant,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Place")
    }
}

impl Default for Queue {
    /// Without a place; see [`Queue::resize`].
    fn default() -> Self {
        Self::new("requests", 0)
    }
}

impl Queue {
    /// So many places, of one group.
    pub fn new(name: &'static str, max: usize) -> Self {
        Self::of(name, Core::new(max, false, BOUNDS))
    }

    /// So many places for several groups, of which none holds more than three quarters of them.
    pub fn shared(name: &'static str, max: usize) -> Self {
        Self::of(name, Core::new(max, true, BOUNDS))
    }

    fn of(name: &'static str, core: Core) -> Self {
        let state = State {
            core,
            pending: HashMap::new(),
            counts: Counts::default(),
            held_for: Duration::ZERO,
            logged: None,
        };
        Self(Arc::new(Shared {
            name,
            state: Mutex::new(state),
        }))
    }

    /// A place in this group for the work that `waiters` wait for.
    pub async fn acquire(&self, group: &Arc<str>, waiters: &Waiters) -> Result<Place, NoPlace> {
        let mut queued = waiters.enter(&self.0, group)?;
        let place = match queued.granted().await {
            Some(Ok(place)) => place,
            Some(Err(full)) => return Err(NoPlace::Full(full)),
            None if waiters.is_closed() => return Err(NoPlace::Abandoned),
            // Others wait who had to make room, and the one in whose turn the work still was has left.
            None => return Err(NoPlace::Full(self.0.state().full(Met::All))),
        };
        if !waiters.took(&queued, &place) {
            return Err(NoPlace::Abandoned);
        }
        Ok(place)
    }

    /// From now on so many places. Those in use count.
    pub fn resize(&self, max: usize) {
        self.0.change(|core| core.resize(max));
    }

    /// The same for one group.
    pub fn resize_group(&self, group: &Arc<str>, max: usize) {
        self.0.change(|core| core.resize_group(group, max));
    }

    /// How many places are in use.
    pub fn in_use(&self) -> usize {
        self.0.state().core.in_use()
    }

    /// How many of one group's places are in use.
    pub fn in_use_of(&self, group: &str) -> usize {
        self.0.state().core.in_use_of(group)
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        self.0.state().core.waiting()
    }

    /// How many requests of a class wait.
    pub fn waiting_in(&self, class: Class) -> usize {
        self.0.state().core.waiting_in(class)
    }

    /// How much work of one group waits.
    pub fn waiting_of(&self, group: &str) -> usize {
        self.0.state().core.waiting_of_group(group)
    }

    /// What happened since the start.
    pub fn counts(&self) -> Counts {
        self.0.state().counts
    }
}

const BOUNDS: Bounds = Bounds {
    waiting_max: WAITING_MAX,
    waiting_per_peer_max: WAITING_PER_PEER_MAX,
};

/// Grants whose receivers are to be told once the lock is given back: a place that nobody takes is dropped, and that locks.
type Granted = Vec<Told>;

/// One who waited, and what came of it.
type Told = (oneshot::Sender<Result<Place, Full>>, Result<Place, Full>);

impl Shared {
    /// Every change under this lock is complete before it is given back.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(self: &Arc<Self>, change: impl FnOnce(&mut Core)) {
        let mut state = self.state();
        change(&mut state.core);
        let granted = self.grant(&mut state);
        drop(state);
        tell(granted);
    }

    /// Gives away what there is.
    fn grant(self: &Arc<Self>, state: &mut State) -> Granted {
        let mut granted = Granted::new();
        while let Some(Grant { ticket, taken }) = state.core.next() {
            // A ticket that waits has somebody to be told, until it is withdrawn under this lock.
            let Some(Pending { reply, since }) = state.pending.remove(&ticket) else {
                state.core.release(taken);
                continue;
            };
            let now = Instant::now();
            state.counts.granted += 1;
            state.counts.waited += now.saturating_duration_since(since);
            let place = Place {
                queue: Arc::clone(self),
                taken,
                since: now,
            };
            granted.push((reply, Ok(place)));
        }
        granted
    }

    /// Lets new work wait, unless too much waits already.
    fn enter(
        self: &Arc<Self>,
        group: &Arc<str>,
        demands: impl Iterator<Item = Demand> + Clone,
    ) -> (Ticket, Vec<(Demand, Entry)>, Receiver) {
        let (reply, receiver) = oneshot::channel();
        let mut state = self.state();
        let ticket = state.core.enter(group, std::iter::empty());
        let entries: Vec<_> = demands
            .filter_map(|demand| Some((demand, state.core.join(ticket, demand)?)))
            .collect();
        let since = Instant::now();
        state.pending.insert(ticket, Pending { reply, since });
        let mut told = self.grant(&mut state);
        let is_crowded = |(demand, _): &(Demand, Entry)| state.core.is_crowded_by(demand.peer);
        if state.core.is_waiting(ticket) && entries.iter().all(is_crowded) {
            state.core.withdraw(ticket);
            told.extend(state.refuse(ticket, Met::Peer));
        }
        while let Some(entry) = state.core.surplus() {
            if let Some(ticket) = state.core.leave(entry) {
                told.extend(state.refuse(ticket, Met::All));
            }
        }
        let refused = told.iter().find_map(|(_, told)| told.as_ref().err().copied());
        let news = refused.filter(|_| state.is_news(since));
        let waiting = state.core.waiting();
        drop(state);
        if let Some(full) = news {
            let client = entries.first().map(|(demand, _)| demand.peer);
            let reason = if full.is_clients_own {
                "client-queue-full"
            } else {
                "queue-full"
            };
            tracing::warn!(
                upstream = &**group,
                queue = self.name,
                reason,
                ?client,
                waiting,
                "too many requests wait for the upstream; further ones are refused with Retry-After"
            );
        }
        tell(told);
        (ticket, entries, receiver)
    }

    fn join(&self, ticket: Ticket, demand: Demand) -> Option<Entry> {
        self.state().core.join(ticket, demand)
    }

    /// A request waits no longer for what others may still wait for.
    fn leave(&self, entry: Entry) {
        let mut state = self.state();
        let pending = state.core.leave(entry).and_then(|ticket| {
            state.counts.abandoned += 1;
            state.pending.remove(&ticket)
        });
        drop(state);
        drop(pending);
    }

    fn withdraw(&self, ticket: Ticket) {
        let mut state = self.state();
        state.core.withdraw(ticket);
        let pending = state.pending.remove(&ticket);
        state.counts.abandoned += u64::from(pending.is_some());
        drop(state);
        drop(pending);
    }

    fn raise(self: &Arc<Self>, taken: Taken, class: Class) {
        self.change(|core| core.raise(taken, class));
    }
}

type Receiver = oneshot::Receiver<Result<Place, Full>>;

impl State {
    /// What a ticket that was withdrawn is told.
    fn refuse(&mut self, ticket: Ticket, met: Met) -> Option<Told> {
        let pending = self.pending.remove(&ticket)?;
        match met {
            Met::Peer => self.counts.refused_by_client += 1,
            Met::All => self.counts.refused_in_all += 1,
        }
        Some((pending.reply, Err(self.full(met))))
    }

    fn full(&self, met: Met) -> Full {
        Full {
            is_clients_own: met == Met::Peer,
            retry_after: self.until_served(),
        }
    }

    /// Whether a refusal is to be logged now.
    fn is_news(&mut self, now: Instant) -> bool {
        let is_news = self
            .logged
            .is_none_or(|at| now.saturating_duration_since(at) >= LOGGED_AGAIN_AFTER);
        if is_news {
            self.logged = Some(now);
        }
        is_news
    }

    /// How long those that wait now are likely to take, at the pace of late.
    fn until_served(&self) -> Duration {
        let waiting = u32::try_from(self.core.waiting()).unwrap_or(u32::MAX);
        let places = u32::try_from(self.core.places_max()).unwrap_or(u32::MAX).max(1);
        let all = self.held_for.saturating_mul(waiting) / places;
        all.clamp(Duration::from_secs(1), RETRY_AFTER_MAX)
    }
}

fn tell(granted: Granted) {
    for (reply, told) in granted {
        // Who has left gives the place back by dropping it.
        drop(reply.send(told));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        state.core.release(self.taken);
        let held_for = self.since.elapsed();
        state.held_for = state.held_for / 8 * 7 + held_for / 8;
        let granted = self.queue.grant(&mut state);
        drop(state);
        tell(granted);
    }
}
