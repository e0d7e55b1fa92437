//! Admission queue: a bounded number of permits, fair across clients.
//!
//! One client may request four thousand blobs, or an upstream may be slow. With a plain semaphore, which serves
//! in order of arrival, every other client would wait behind them.
//!
//! A [`Queue`] grants permits by class, then round robin over clients and their flows (see `scheduler`).
//! Waiting is not a failure and has no timeout; it ends with the last waiting request. The number of waiting
//! requests is limited per client and in total. Beyond a limit, the result is [`QueueFull`] at once.
//!
//! Work that several requests share waits once, in the turn of each of them: see [`Waiters`].
//!
//! * `scheduler`: the order, pure.
//! * `waiters`: requests that wait for shared work.
//! * `demand`: client, flow and class of a request.
//! * `round_robin`: round robin over keys.

mod demand;
mod pause;
mod round_robin;
mod scheduler;
mod waiters;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

pub use self::demand::{Class, Demand, Peer, flow};
pub use self::pause::Pause;
use self::scheduler::{Entry, Grant, LimitHit, Limits, PermitId, Scheduler, Ticket};
pub use self::waiters::{ABANDON_GRACE, Waiter, Waiters};

/// Waiting requests of one client per queue. Ten jobs of 40 layers, or 100 of 3, stay below it.
pub const WAITING_PER_PEER_MAX: usize = 1024;

/// Waiting requests of all clients per queue.
pub const WAITING_MAX: usize = 4096;

/// Longest `Retry-After` of a full queue.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);

/// Minimum time between two log lines about a full queue.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Fair semaphore. Clones share the permits.
#[derive(Clone)]
pub struct Queue(Arc<Shared>);

struct Shared {
    /// Name in the log.
    name: &'static str,
    state: Mutex<State>,
}

struct State {
    scheduler: Scheduler,
    pending: HashMap<Ticket, Pending>,
    counts: Counts,
    /// Moving average of the time between the grant and the release of a permit.
    mean_hold: Duration,
    /// When a full queue was logged last.
    logged: Option<Instant>,
}

struct Pending {
    reply: oneshot::Sender<Result<Permit, QueueFull>>,
    since: Instant,
}

/// Error of [`Queue::acquire`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcquireError {
    /// Too many requests are waiting.
    Full(QueueFull),
    /// No request waits for the work any more.
    Abandoned,
}

/// Too many requests are waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull {
    /// Whether the client's own limit was reached, not the total limit.
    pub is_client_limit: bool,
    /// Estimated time until the waiting requests are served.
    pub retry_after: Duration,
}

/// Counters since process start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Granted permits.
    pub granted: u64,
    /// Total waiting time of the granted permits.
    pub waited: Duration,
    /// Requests denied at the limit per client.
    pub refused_by_client: u64,
    /// Requests denied at the total limit.
    pub refused_in_all: u64,
    /// Waits that ended because no request was left.
    pub abandoned: u64,
}

/// A permit. Dropping it releases it.
pub struct Permit {
    queue: Arc<Shared>,
    id: PermitId,
    since: Instant,
}

impl Permit {
    /// Whether a request waits that could start if this group returned its permits of this one's class. Requests at
    /// another group's limit, or at the share of a lower class, do not count: no permit like this one serves them.
    pub fn is_awaited(&self) -> bool {
        self.queue.state.lock().scheduler.is_awaited(self.id)
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

impl Default for Queue {
    /// Without permits; see [`Queue::resize`].
    fn default() -> Self {
        Self::new("requests", 0)
    }
}

impl Queue {
    /// A queue of `max` permits for one group.
    pub fn new(name: &'static str, max: usize) -> Self {
        Self::of(name, Scheduler::new(max, false, LIMITS))
    }

    /// A queue of `max` permits for several groups. One group holds at most three quarters of them.
    pub fn shared(name: &'static str, max: usize) -> Self {
        Self::of(name, Scheduler::new(max, true, LIMITS))
    }

    fn of(name: &'static str, scheduler: Scheduler) -> Self {
        let state = State {
            scheduler,
            pending: HashMap::new(),
            counts: Counts::default(),
            mean_hold: Duration::ZERO,
            logged: None,
        };
        Self(Arc::new(Shared {
            name,
            state: Mutex::new(state),
        }))
    }

    /// Acquires a permit of this group for the work that `waiters` wait for.
    pub async fn acquire(&self, group: &Arc<str>, waiters: &Waiters) -> Result<Permit, AcquireError> {
        let mut queued = waiters.enter(&self.0, group)?;
        let permit = match queued.granted().await {
            Some(Ok(permit)) => permit,
            Some(Err(full)) => return Err(AcquireError::Full(full)),
            None if waiters.is_closed() => return Err(AcquireError::Abandoned),
            // Other requests still wait, but the total limit removed them from the queue, and the request whose
            // turn the work kept has left.
            None => return Err(AcquireError::Full(self.0.state.lock().full(LimitHit::Total))),
        };
        if !waiters.attach_permit(&queued, &permit) {
            return Err(AcquireError::Abandoned);
        }
        Ok(permit)
    }

    /// A permit of this group for work that does not wait. `None` unless the next permit of this class is free and no
    /// request waits for it.
    pub fn try_acquire(&self, group: &Arc<str>, class: Class) -> Option<Permit> {
        let demand = Demand {
            class,
            ..Demand::BACKGROUND
        };
        let (reply, mut receiver) = oneshot::channel();
        let mut state = self.0.state.lock();
        let ticket = state.scheduler.enter(group, [demand]);
        let since = Instant::now();
        state.pending.insert(ticket, Pending { reply, since });
        let granted = self.0.grant(&mut state);
        if state.scheduler.is_waiting(ticket) {
            state.scheduler.withdraw(ticket);
            state.pending.remove(&ticket);
        }
        drop(state);
        notify(granted);
        receiver.try_recv().ok()?.ok()
    }

    /// Sets the number of permits. Permits in use count.
    pub fn resize(&self, max: usize) {
        self.0.change(|scheduler| scheduler.resize(max));
    }

    /// Sets the number of permits of one group.
    pub fn resize_group(&self, group: &Arc<str>, max: usize) {
        self.0.change(|scheduler| scheduler.resize_group(group, max));
    }

    /// Number of permits in use.
    pub fn in_use(&self) -> usize {
        self.0.state.lock().scheduler.in_use()
    }

    /// Number of one group's permits in use.
    pub fn in_use_of(&self, group: &str) -> usize {
        self.0.state.lock().scheduler.in_use_of(group)
    }

    /// Number of waiting requests.
    pub fn waiting(&self) -> usize {
        self.0.state.lock().scheduler.waiting()
    }

    /// Number of waiting requests of a class.
    pub fn waiting_in(&self, class: Class) -> usize {
        self.0.state.lock().scheduler.waiting_in(class)
    }

    /// Number of waiting tickets of one group.
    pub fn waiting_of(&self, group: &str) -> usize {
        self.0.state.lock().scheduler.waiting_of_group(group)
    }

    /// Counters since process start.
    pub fn counts(&self) -> Counts {
        self.0.state.lock().counts
    }
}

const LIMITS: Limits = Limits {
    waiting_max: WAITING_MAX,
    waiting_per_peer_max: WAITING_PER_PEER_MAX,
};

/// Results to deliver after the lock is released. An undelivered permit is dropped, and dropping one takes the
/// lock.
type Granted = Vec<Notification>;

/// The channel of a waiting ticket, and its result.
type Notification = (
    oneshot::Sender<Result<Permit, QueueFull>>,
    Result<Permit, QueueFull>,
);

impl Shared {
    fn change(self: &Arc<Self>, change: impl FnOnce(&mut Scheduler)) {
        let mut state = self.state.lock();
        change(&mut state.scheduler);
        let granted = self.grant(&mut state);
        drop(state);
        notify(granted);
    }

    /// Grants the free permits.
    fn grant(self: &Arc<Self>, state: &mut State) -> Granted {
        let mut granted = Granted::new();
        while let Some(Grant { ticket, permit }) = state.scheduler.next() {
            // A waiting ticket has a receiver, until it is withdrawn under this lock.
            let Some(Pending { reply, since }) = state.pending.remove(&ticket) else {
                state.scheduler.release(permit);
                continue;
            };
            let now = Instant::now();
            state.counts.granted += 1;
            state.counts.waited += now.saturating_duration_since(since);
            let permit = Permit {
                queue: Arc::clone(self),
                id: permit,
                since: now,
            };
            granted.push((reply, Ok(permit)));
        }
        granted
    }

    /// Adds new work to the queue, unless a limit is reached.
    fn enter(
        self: &Arc<Self>,
        group: &Arc<str>,
        demands: impl Iterator<Item = Demand> + Clone,
    ) -> (Ticket, Vec<(Demand, Entry)>, Receiver) {
        let (reply, receiver) = oneshot::channel();
        let mut state = self.state.lock();
        let ticket = state.scheduler.enter(group, std::iter::empty());
        let entries: Vec<_> = demands
            .filter_map(|demand| Some((demand, state.scheduler.join(ticket, demand)?)))
            .collect();
        let since = Instant::now();
        state.pending.insert(ticket, Pending { reply, since });
        let mut notifications = self.grant(&mut state);
        let is_over_limit = |(demand, _): &(Demand, Entry)| state.scheduler.is_over_client_limit(demand.peer);
        if state.scheduler.is_waiting(ticket) && entries.iter().all(is_over_limit) {
            state.scheduler.withdraw(ticket);
            notifications.extend(state.refuse(ticket, LimitHit::Client));
        }
        while let Some(entry) = state.scheduler.entry_over_limit() {
            if let Some(ticket) = state.scheduler.leave(entry) {
                notifications.extend(state.refuse(ticket, LimitHit::Total));
            }
        }
        let denied = notifications
            .iter()
            .find_map(|(_, notifications)| notifications.as_ref().err().copied());
        let to_log = denied.filter(|_| state.should_log(since));
        let waiting = state.scheduler.waiting();
        drop(state);
        if let Some(full) = to_log {
            let client = entries.first().map(|(demand, _)| demand.peer);
            let reason = if full.is_client_limit {
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
                "upstream queue full, denying requests with Retry-After"
            );
        }
        notify(notifications);
        (ticket, entries, receiver)
    }

    /// Adds a request to queued work, which starts if the class of the request may have a free permit.
    fn join(self: &Arc<Self>, ticket: Ticket, demand: Demand) -> Option<Entry> {
        let mut entry = None;
        self.change(|scheduler| entry = scheduler.join(ticket, demand));
        entry
    }

    /// Removes a request from work that others may still wait for.
    fn leave(&self, entry: Entry) {
        let mut state = self.state.lock();
        let pending = state.scheduler.leave(entry).and_then(|ticket| {
            state.counts.abandoned += 1;
            state.pending.remove(&ticket)
        });
        drop(state);
        drop(pending);
    }

    fn withdraw(&self, ticket: Ticket) {
        let mut state = self.state.lock();
        state.scheduler.withdraw(ticket);
        let pending = state.pending.remove(&ticket);
        state.counts.abandoned += u64::from(pending.is_some());
        drop(state);
        drop(pending);
    }

    fn raise(self: &Arc<Self>, permit: PermitId, class: Class) {
        self.change(|scheduler| scheduler.raise(permit, class));
    }
}

type Receiver = oneshot::Receiver<Result<Permit, QueueFull>>;

impl State {
    /// Result for a ticket that was withdrawn at a limit.
    fn refuse(&mut self, ticket: Ticket, limit: LimitHit) -> Option<Notification> {
        let pending = self.pending.remove(&ticket)?;
        match limit {
            LimitHit::Client => self.counts.refused_by_client += 1,
            LimitHit::Total => self.counts.refused_in_all += 1,
        }
        Some((pending.reply, Err(self.full(limit))))
    }

    fn full(&self, limit: LimitHit) -> QueueFull {
        QueueFull {
            is_client_limit: limit == LimitHit::Client,
            retry_after: self.estimated_wait(),
        }
    }

    /// Whether a full queue is to be logged now.
    fn should_log(&mut self, now: Instant) -> bool {
        let should_log = self
            .logged
            .is_none_or(|at| now.saturating_duration_since(at) >= LOG_INTERVAL);
        if should_log {
            self.logged = Some(now);
        }
        should_log
    }

    /// Estimated time until the waiting requests are served, from the average hold time.
    fn estimated_wait(&self) -> Duration {
        let waiting = u32::try_from(self.scheduler.waiting()).unwrap_or(u32::MAX);
        let places = u32::try_from(self.scheduler.permits_max())
            .unwrap_or(u32::MAX)
            .max(1);
        let all = self.mean_hold.saturating_mul(waiting) / places;
        all.clamp(Duration::from_secs(1), RETRY_AFTER_MAX)
    }
}

fn notify(granted: Granted) {
    for (reply, notifications) in granted {
        // A receiver that is gone releases the permit by dropping it.
        drop(reply.send(notifications));
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock();
        state.scheduler.release(self.id);
        let mean_hold = self.since.elapsed();
        state.mean_hold = state.mean_hold / 8 * 7 + mean_hold / 8;
        let granted = self.queue.grant(&mut state);
        drop(state);
        notify(granted);
    }
}
