//! Circuit breaker of one scope: failures, state and probes.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

use super::WaitLimit;
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;

/// Failures within [`WINDOW`], without a response in between, that open a scope.
pub(super) const FAILURES_MAX: usize = 3;
/// Time in which [`FAILURES_MAX`] failures open a scope.
pub(super) const WINDOW: Duration = Duration::from_secs(30);
/// Principals recorded per breaker. If more meet a failure, the oldest are dropped and send requests again.
const PRINCIPALS_MAX: usize = 16;
/// Interval between probes while clients send requests. Otherwise it doubles with each probe.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Longest interval between probes, which bounds how late a recovered registry is detected without client requests.
const PROBE_INTERVAL_MAX: Duration = Duration::from_secs(30);

/// How a scope fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FailureMode {
    /// No response: uses up the caller's wait and affects the whole scope.
    NoResponse,
    /// An error response, soon after the request: affects only that request.
    Error,
}

/// The parts of a scope. If several parts fail, the whole scope does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Granularity {
    /// One part: no connection can be established.
    Everything,
    /// One part per repository, for a kind of request.
    Repositories,
    /// One part per request, for a kind of request in a repository.
    Requests,
}

impl Granularity {
    fn are_distinct(self, one: &Endpoint, other: &Endpoint) -> bool {
        match self {
            Self::Everything => true,
            Self::Repositories => one.repository() != other.repository(),
            Self::Requests => one != other,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Suspected,
    Open(Instant),
    /// A denial arrived, or a probe was inconclusive: the next request decides.
    HalfOpen(Instant),
}

/// Circuit breaker of a scope with failures and no response since.
#[derive(Clone, Debug)]
pub(super) struct Breaker {
    state: State,
    mode: FailureMode,
    granularity: Granularity,
    cause: UpstreamFailure,
    /// Times of the last failures, oldest first; at most [`FAILURES_MAX`].
    failures: Vec<Instant>,
    failed_at: Instant,
    /// Whether a failure was independent of the credential: there was no response at all.
    affects_all: bool,
    /// Principals of the failures that may depend on the credential.
    principals: Vec<[u8; 32]>,
    /// The operation that failed last.
    failed: Endpoint,
    /// Whether several parts of the scope failed.
    is_widespread: bool,
    /// The operation that the next probe sends.
    probe_operation: Endpoint,
    began_at: Instant,
    /// When a client last sent a request whose wait this breaker shortened.
    requested_at: Instant,
    probed_at: Option<Instant>,
    /// Probes since the last request of a client.
    idle_probes: u32,
}

impl Breaker {
    /// A breaker in the suspected state. [`Self::fail`] counts the first failure.
    pub(super) fn new(
        (mode, granularity): (FailureMode, Granularity),
        endpoint: &Endpoint,
        now: Instant,
    ) -> Self {
        Self {
            state: State::Suspected,
            mode,
            granularity,
            cause: UpstreamFailure::RevalidateTimeout,
            failures: Vec::new(),
            failed_at: now,
            affects_all: false,
            principals: Vec::new(),
            failed: endpoint.clone(),
            is_widespread: granularity == Granularity::Everything,
            probe_operation: endpoint.clone(),
            began_at: now,
            requested_at: now,
            probed_at: None,
            idle_probes: 0,
        }
    }

    /// Records a failure, with the principal if it may depend on the credential. `true` if the breaker opened.
    pub(super) fn fail(
        &mut self,
        cause: UpstreamFailure,
        (endpoint, principal): (&Endpoint, Option<[u8; 32]>),
        now: Instant,
    ) -> bool {
        let is_other = self.granularity.are_distinct(&self.failed, endpoint);
        if self.mode == FailureMode::Error && is_other && self.granularity == Granularity::Requests {
            // An error of another request does not repeat the first one, so the count begins again.
            if self.open_since().is_some() {
                return false;
            }
            self.failures.clear();
            self.principals.clear();
        } else {
            self.is_widespread |= is_other;
        }
        match principal {
            None => self.affects_all = true,
            Some(principal) if self.principals.contains(&principal) => {}
            Some(principal) => {
                if self.principals.len() >= PRINCIPALS_MAX {
                    self.principals.remove(0);
                }
                self.principals.push(principal);
            }
        }
        // An expired wait does not replace a concrete cause.
        if cause != UpstreamFailure::RevalidateTimeout {
            self.cause = cause;
        }
        self.failed = endpoint.clone();
        self.failed_at = now;
        self.probe_operation = endpoint.clone();
        self.failures
            .retain(|at| now.saturating_duration_since(*at) <= WINDOW);
        self.failures.push(now);
        // One failing repository does not imply others, so their requests are still sent.
        let may_open = self.granularity != Granularity::Repositories || self.is_widespread;
        match self.state {
            State::Suspected if self.failures.len() >= FAILURES_MAX && may_open => {
                self.failures.clear();
                self.state = State::Open(now);
                return true;
            }
            State::Suspected if self.failures.len() >= FAILURES_MAX => drop(self.failures.remove(0)),
            State::Suspected => {}
            State::Open(since) | State::HalfOpen(since) => {
                self.failures.clear();
                self.state = State::Open(since);
            }
        }
        false
    }

    /// Half-opens the breaker after a denial or an inconclusive probe.
    pub(super) fn half_open(&mut self) {
        if let State::Open(since) = self.state {
            self.state = State::HalfOpen(since);
        }
    }

    /// When it failed last.
    pub(super) fn failed_at(&self) -> Instant {
        self.failed_at
    }

    pub(super) fn mode(&self) -> FailureMode {
        self.mode
    }

    /// Whether a response for `endpoint` closes it.
    pub(super) fn is_closed_by(&self, endpoint: &Endpoint) -> bool {
        self.mode == FailureMode::NoResponse || self.failed == *endpoint
    }

    /// How long a caller with a cached copy waits.
    pub(super) fn wait(&mut self, (endpoint, principal): (&Endpoint, [u8; 32]), now: Instant) -> WaitLimit {
        if !self.affects_all && !self.principals.contains(&principal) {
            return WaitLimit::Full;
        }
        let is_open = matches!(self.state, State::Open(_));
        let is_failed = self.failed == *endpoint;
        let wait = match self.mode {
            FailureMode::Error if is_open && is_failed => WaitLimit::None,
            FailureMode::Error => return WaitLimit::Full,
            FailureMode::NoResponse if is_open && (self.is_widespread || is_failed) => WaitLimit::None,
            // These failures arrive quickly, so the wait need not be shortened.
            FailureMode::NoResponse
                if matches!(
                    self.cause,
                    UpstreamFailure::ConnectionRefused | UpstreamFailure::Tls(_)
                ) =>
            {
                WaitLimit::Full
            }
            FailureMode::NoResponse => WaitLimit::Short,
        };
        self.requested_at = now;
        if wait == WaitLimit::None {
            // The caller sends no request, so only a probe can find out whether this operation works.
            self.probe_operation = endpoint.clone();
        }
        wait
    }

    /// Whether no request of this principal is sent in this scope, for whichever operation.
    pub(super) fn stops_all_of(&self, principal: [u8; 32]) -> bool {
        let is_affected = self.affects_all || self.principals.contains(&principal);
        is_affected && self.is_widespread && matches!(self.state, State::Open(_))
    }

    pub(super) fn cause(&self) -> UpstreamFailure {
        self.cause
    }

    pub(super) fn open_since(&self) -> Option<Instant> {
        match self.state {
            State::Open(since) | State::HalfOpen(since) => Some(since),
            State::Suspected => None,
        }
    }

    pub(super) fn is_half_open(&self) -> bool {
        matches!(self.state, State::HalfOpen(_))
    }

    pub(super) fn requested_at(&self) -> Instant {
        self.requested_at
    }

    /// Probes this operation next, at once.
    pub(super) fn set_next_probe(&mut self, endpoint: Endpoint) {
        self.probe_operation = endpoint;
    }

    /// Whether it is probed. In the suspected state of [`FailureMode::Error`] requests are still sent, so no probe is
    /// needed.
    pub(super) fn is_probed(&self) -> bool {
        self.mode == FailureMode::NoResponse || self.open_since().is_some()
    }

    /// When the next probe is due.
    pub(super) fn due(&self) -> Instant {
        match self.probed_at {
            None if self.probe_operation != self.failed => self.requested_at,
            None => self.began_at + PROBE_INTERVAL,
            Some(at) if self.requested_at > at => at + PROBE_INTERVAL,
            Some(at) => at + backoff(self.idle_probes),
        }
    }

    /// Marks a probe as sent and returns the operation to send.
    pub(super) fn take_probe(&mut self, now: Instant) -> Endpoint {
        let is_requested = self.probed_at.is_none_or(|at| self.requested_at > at);
        self.idle_probes = if is_requested {
            0
        } else {
            self.idle_probes.saturating_add(1)
        };
        self.probed_at = Some(now);
        std::mem::replace(&mut self.probe_operation, self.failed.clone())
    }
}

/// Interval to the next probe after this many without a client request: 1, 2, 4, … 30 s.
fn backoff(idle_probes: u32) -> Duration {
    PROBE_INTERVAL
        .saturating_mul(2_u32.saturating_pow(idle_probes.min(16)))
        .min(PROBE_INTERVAL_MAX)
}

/// Map with a maximum number of entries. The least recently changed one is dropped first.
#[derive(Debug)]
pub(super) struct Bounded<K, V> {
    entries: HashMap<K, (u64, V)>,
    max: usize,
    changes: u64,
}

impl<K: Eq + Hash + Clone, V> Bounded<K, V> {
    pub(super) fn new(max: usize) -> Self {
        Self {
            entries: HashMap::new(),
            max,
            changes: 0,
        }
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        self.changes += 1;
        if self.entries.len() >= self.max && !self.entries.contains_key(&key) {
            let oldest = self.entries.iter().min_by_key(|(_, (changed, _))| *changed);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.entries.remove(&oldest);
            }
        }
        self.entries.insert(key, (self.changes, value));
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        self.entries.remove(key).map(|(_, value)| value)
    }

    pub(super) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key).map(|(_, value)| value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, (_, value))| (key, value))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        self.entries.iter_mut().map(|(key, (_, value))| (key, value))
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&V) -> bool) {
        self.entries.retain(|_, (_, value)| keep(value));
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}
