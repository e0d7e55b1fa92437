//! Failure detection and circuit breakers for one upstream: a state machine without tasks, timers or I/O.
//!
//! A failure is attributed to a [`FailureScope`]: all connections, one kind of request, or one kind of request in one
//! repository. A scope is closed, suspected, open or half-open. While it is suspected or half-open, a caller with a
//! cached copy waits for [`SHORT_WAIT`], and its request is still sent. While it is open, such a caller sends
//! nothing, and a probe repeats the request that failed. A request without a cached copy is always sent, and its
//! response counts like a probe's.
//!
//! | event | its repository | its kind of request | all connections |
//! | --- | --- | --- | --- |
//! | response | closes | closes | closes |
//! | 401, 403 | open → half-open | open → half-open | closes |
//! | a probe without any of these | open → half-open | open → half-open | open → half-open |
//! | 5xx | third failure opens it for that request | closes | closes |
//! | timeout or closed connection | suspected, third failure opens it | the same, unless another response arrived meanwhile; opens only if several repositories fail | unchanged |
//! | no connection | unchanged | unchanged | suspected, third failure opens it |
//!
//! An upstream may answer only some credentials with a 5xx or a closed connection. A scope that opens by these
//! failures alone is open only for the principals that met them.
//!
//! A registry may send a 401 before it looks anything up, so a 401 only shows that something responds.

use std::time::Duration;

use tokio::time::Instant;

use super::response::{ResponseKind, UpstreamResponse};
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::name::Repository;

mod breaker;
mod pending;
mod scope;

use breaker::{Bounded, Breaker, FailureMode, Granularity};
use pending::{PendingRequests, SentRequest};
pub use scope::{FailureScope, RequestKind};

/// How long a caller with a cached copy waits for a suspected or slow upstream.
pub(super) const SHORT_WAIT: Duration = Duration::from_millis(50);
/// Repositories per upstream with a recorded failure or slow response. Clients choose the names, so the number is
/// bounded.
const REPOSITORIES_MAX: usize = 512;
/// Repositories of one upstream that are probed at a time, the most recently requested first.
const PROBED_MAX: usize = 8;
/// A repository that no client requested for this long is no longer probed. For the same time after a slow response,
/// the next one is expected to be slow.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// A response slower than this triggers a check whether the upstream or only one repository is slow.
const SLOW_MIN: Duration = Duration::from_millis(250);
/// Minimum interval between two such checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// How long a caller with a cached copy waits for a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitLimit {
    /// Its full timeout.
    Full,
    /// At most `SHORT_WAIT`.
    Short,
    /// Not at all: no request is sent.
    None,
}

/// Outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestOutcome {
    /// A response for which the registry had to look something up.
    Response,
    /// 401 or 403.
    Denied,
    /// 5xx or 408, or a redirect to an unreachable host.
    ServerError(UpstreamFailure),
    /// A timeout, or the connection was closed.
    NoResponse(UpstreamFailure),
    /// No connection could be established.
    NoConnection(UpstreamFailure),
    /// No request was sent, or the response is not about the registry.
    Unknown,
}

impl RequestOutcome {
    /// The outcome of the requests to all URLs together. `is_unavailable`: no URL gave a usable response.
    pub(super) fn of(response: &UpstreamResponse, is_unavailable: bool) -> Self {
        let cause = match response.kind {
            ResponseKind::Unavailable(cause) => cause,
            ResponseKind::Denied => return Self::Denied,
            _ => return Self::Response,
        };
        match cause {
            // The registry responded, even if the response is not usable.
            UpstreamFailure::RateLimited
            | UpstreamFailure::Malformed
            | UpstreamFailure::TooLarge
            | UpstreamFailure::Redirects(_)
            | UpstreamFailure::DigestMismatch
            | UpstreamFailure::Unverifiable => Self::Response,
            _ if !is_unavailable => Self::Unknown,
            // The redirect was a response. Storage behind one repository does not affect others.
            UpstreamFailure::ConnectionRefused | UpstreamFailure::Unreachable | UpstreamFailure::Dns | UpstreamFailure::Tls(_) | UpstreamFailure::ConnectTimeout
                if response.is_redirect_target =>
            {
                Self::ServerError(cause)
            }
            UpstreamFailure::ConnectionRefused
            | UpstreamFailure::Unreachable
            | UpstreamFailure::Dns
            | UpstreamFailure::Tls(_)
            | UpstreamFailure::ConnectTimeout
            // The outbound proxy requires a credential.
            | UpstreamFailure::Status(407) => Self::NoConnection(cause),
            UpstreamFailure::Timeout | UpstreamFailure::ConnectionReset => Self::NoResponse(cause),
            UpstreamFailure::Status(status) if status >= 500 || status == 408 => Self::ServerError(cause),
            // Storage behind the registry rejected one object.
            UpstreamFailure::Status(_)
            // A cache refused the request of one client, for the caches that it had passed.
            | UpstreamFailure::Loop
            // Recorded where the token is fetched.
            | UpstreamFailure::TokenService
            | UpstreamFailure::InsecureRealm
            // An HTML page sent to clients without access must not keep clients with access from a fresh response.
            | UpstreamFailure::NotRegistry
            | UpstreamFailure::RevalidateTimeout
            | UpstreamFailure::BreakerOpen
            | UpstreamFailure::Offline
            | UpstreamFailure::PolicyNever
            | UpstreamFailure::CacheCredential
            | UpstreamFailure::Abandoned
            | UpstreamFailure::ClientQueueFull
            | UpstreamFailure::QueueFull => Self::Unknown,
        }
    }
}

/// A circuit breaker that opened or closed, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BreakerChange {
    pub(super) scope: FailureScope,
    /// Why it opened; `None`: it closed.
    pub(super) opened: Option<UpstreamFailure>,
}

/// A scope that is not closed.
#[derive(Clone, Debug)]
pub(super) struct FailingScope {
    pub(super) scope: FailureScope,
    pub(super) cause: UpstreamFailure,
    /// Since when it is open or half-open; `None`: it is suspected.
    pub(super) open_since: Option<Instant>,
    pub(super) is_half_open: bool,
}

/// State of one kind of request, over all repositories.
#[derive(Debug, Default)]
struct KindHealth {
    breaker: Option<Breaker>,
    responded_at: Option<Instant>,
    /// Duration of the last response, and when it arrived. A slow response does not count if a faster one overtook
    /// it.
    took: Option<(Duration, Instant)>,
    /// The last operation with a fast response: probed if another repository is slow or does not respond.
    last_fast: Option<Endpoint>,
    /// The operation to probe because of a slow response.
    check: Option<Endpoint>,
    checked_at: Option<Instant>,
}

/// State of one kind of request in one repository.
#[derive(Debug, Default)]
struct RepositoryHealth {
    breaker: Option<Breaker>,
    took: Option<(Duration, Instant)>,
}

impl RepositoryHealth {
    fn is_empty(&self) -> bool {
        self.breaker.is_none() && self.took.is_none()
    }
}

/// The failure detector of one upstream.
#[derive(Debug)]
pub(super) struct FailureDetector {
    connection: Option<Breaker>,
    kinds: [KindHealth; RequestKind::COUNT],
    repositories: Bounded<(RequestKind, Repository), RepositoryHealth>,
    pending: PendingRequests,
}

impl Default for FailureDetector {
    fn default() -> Self {
        Self {
            connection: None,
            kinds: std::array::from_fn(|_| KindHealth::default()),
            repositories: Bounded::new(REPOSITORIES_MAX),
            pending: PendingRequests::default(),
        }
    }
}

/// A request that a caller with a cached copy is about to send.
pub(super) struct WaitQuery<'a> {
    pub(super) kind: RequestKind,
    pub(super) endpoint: &'a Endpoint,
    pub(super) principal: [u8; 32],
    /// Whether a token must be fetched first if the registry requires one.
    pub(super) needs_token: bool,
}

impl FailureDetector {
    /// Records that a request is sent.
    pub(super) fn sent(
        &mut self,
        kind: RequestKind,
        endpoint: &Endpoint,
        principal: [u8; 32],
        now: Instant,
    ) -> u64 {
        self.pending.add(SentRequest {
            kind,
            endpoint: endpoint.clone(),
            principal,
            since: now,
        })
    }

    /// Pauses or resumes a request while the cache itself is busy, e.g. with a credential helper.
    pub(super) fn set_paused(&mut self, id: u64, is_paused: bool, now: Instant) {
        self.pending.set_paused(id, is_paused, now);
    }

    /// The request now waits for the token service.
    pub(super) fn waiting_for_token(&mut self, id: u64, now: Instant) {
        self.pending.waiting_for_token(id, now);
    }

    /// Records the outcome of the token request; the request continues.
    pub(super) fn token_finished(
        &mut self,
        id: u64,
        ended: RequestOutcome,
        now: Instant,
    ) -> Vec<BreakerChange> {
        let sent = self.pending.token_finished(id, now);
        sent.map_or_else(Vec::new, |sent| self.record(&sent, ended, now))
    }

    /// Records the outcome of a request.
    pub(super) fn finish(&mut self, id: u64, ended: RequestOutcome, now: Instant) -> Vec<BreakerChange> {
        let sent = self.pending.remove(id);
        sent.map_or_else(Vec::new, |sent| self.record(&sent, ended, now))
    }

    /// The request was cancelled without an outcome.
    pub(super) fn cancel(&mut self, id: u64) {
        self.pending.remove(id);
    }

    /// Records that a caller waited `waited` for this principal's request without a response. A request that is still
    /// queued is no evidence about the upstream. Requests that were sent late for their own callers may count now.
    /// `needs_token`: whether a token must be fetched first if the registry requires one.
    pub(super) fn record_timeout(
        &mut self,
        principal: [u8; 32],
        (endpoint, needs_token): (&Endpoint, bool),
        waited: Duration,
        now: Instant,
    ) -> Vec<BreakerChange> {
        let kinds = &self.kinds;
        let is_suspected = |kind: RequestKind| kind.of(kinds).breaker.is_some();
        let overdue = self
            .pending
            .overdue((principal, endpoint, needs_token), waited, is_suspected, now);
        let ended = RequestOutcome::NoResponse(UpstreamFailure::RevalidateTimeout);
        let changes = overdue.iter().map(|sent| self.record(sent, ended, now));
        changes.collect::<Vec<_>>().concat()
    }

    fn record(&mut self, sent: &SentRequest, ended: RequestOutcome, now: Instant) -> Vec<BreakerChange> {
        let (kind, endpoint) = (sent.kind, &sent.endpoint);
        let mut changes = Vec::new();
        match ended {
            RequestOutcome::Unknown => return changes,
            RequestOutcome::NoConnection(cause) => {
                let as_new =
                    || Breaker::new((FailureMode::NoResponse, Granularity::Everything), endpoint, now);
                let breaker = self.connection.get_or_insert_with(as_new);
                if breaker.fail(cause, (endpoint, None), now) {
                    changes.push(opened(FailureScope::Connection, cause));
                }
            }
            RequestOutcome::NoResponse(cause) => {
                self.record_no_response(sent, cause, now, &mut changes);
            }
            RequestOutcome::ServerError(cause) => {
                self.record_response(sent, now, &mut changes);
                self.record_failure(sent, (FailureMode::Error, cause), now, &mut changes);
            }
            RequestOutcome::Denied => {
                close(&mut self.connection, FailureScope::Connection, &mut changes);
                let by_kind = self.kind_health_mut(kind);
                by_kind.responded_at = Some(now);
                if let Some(breaker) = &mut by_kind.breaker {
                    breaker.half_open();
                }
                self.update_repository(kind, endpoint, |entry, _| {
                    if let Some(breaker) = &mut entry.breaker {
                        breaker.half_open();
                    }
                });
            }
            RequestOutcome::Response => {
                self.record_response(sent, now, &mut changes);
                self.update_repository(kind, endpoint, |entry, scope| {
                    if entry
                        .breaker
                        .as_ref()
                        .is_some_and(|breaker| breaker.is_closed_by(endpoint))
                    {
                        close(&mut entry.breaker, scope, &mut changes);
                    }
                });
            }
        }
        changes
    }

    /// Any response closes the scope of all connections and that of its kind of request.
    fn record_response(&mut self, sent: &SentRequest, now: Instant, changes: &mut Vec<BreakerChange>) {
        let (kind, endpoint) = (sent.kind, &sent.endpoint);
        let took = now.saturating_duration_since(sent.since);
        close(&mut self.connection, FailureScope::Connection, changes);
        let by_kind = self.kind_health_mut(kind);
        close(&mut by_kind.breaker, FailureScope::Kind(kind), changes);
        by_kind.responded_at = Some(now);
        let is_outpaced = by_kind
            .took
            .is_some_and(|(quick, at)| at > sent.since && quick < took);
        if !is_outpaced {
            by_kind.took = Some((took, now));
        }
        if took < SLOW_MIN {
            by_kind.last_fast = Some(endpoint.clone());
            by_kind.check = None;
        } else if !is_outpaced
            && let Some(last_fast) = &by_kind.last_fast
            && last_fast.repository() != endpoint.repository()
            && by_kind
                .checked_at
                .is_none_or(|at| now.saturating_duration_since(at) >= CHECK_INTERVAL)
        {
            by_kind.check = Some(last_fast.clone());
        }
        self.update_repository(kind, endpoint, |entry, _| {
            entry.took = (took > SHORT_WAIT).then_some((took, now));
        });
    }

    fn record_no_response(
        &mut self,
        sent: &SentRequest,
        cause: UpstreamFailure,
        now: Instant,
        changes: &mut Vec<BreakerChange>,
    ) {
        let (kind, endpoint) = (sent.kind, &sent.endpoint);
        self.record_failure(sent, (FailureMode::NoResponse, cause), now, changes);
        let by_kind = self.kind_health_mut(kind);
        if by_kind.responded_at.is_some_and(|at| at > sent.since) {
            return;
        }
        let last_fast = by_kind
            .last_fast
            .clone()
            .filter(|last_fast| by_kind.breaker.is_none() && last_fast.repository() != endpoint.repository());
        let as_new = || {
            Breaker::new(
                (FailureMode::NoResponse, Granularity::Repositories),
                endpoint,
                now,
            )
        };
        let breaker = by_kind.breaker.get_or_insert_with(as_new);
        if breaker.fail(cause, (endpoint, principal(sent, cause)), now) {
            changes.push(opened(FailureScope::Kind(kind), cause));
        }
        if let Some(last_fast) = last_fast {
            breaker.set_next_probe(last_fast);
        }
    }

    /// Records a failure in one repository.
    fn record_failure(
        &mut self,
        sent: &SentRequest,
        (mode, cause): (FailureMode, UpstreamFailure),
        now: Instant,
        changes: &mut Vec<BreakerChange>,
    ) {
        let (kind, endpoint) = (sent.kind, &sent.endpoint);
        let principal = match mode {
            FailureMode::Error => Some(sent.principal),
            FailureMode::NoResponse => principal(sent, cause),
        };
        self.update_repository(kind, endpoint, |entry, scope| {
            if entry
                .breaker
                .as_ref()
                .is_some_and(|breaker| breaker.mode() != mode)
            {
                close(&mut entry.breaker, scope.clone(), changes);
            }
            let as_new = || Breaker::new((mode, Granularity::Requests), endpoint, now);
            if entry
                .breaker
                .get_or_insert_with(as_new)
                .fail(cause, (endpoint, principal), now)
            {
                changes.push(opened(scope, cause));
            }
        });
    }

    /// How long a caller with a cached copy waits.
    pub(super) fn wait(&mut self, query: &WaitQuery<'_>, timeout: Duration, now: Instant) -> WaitLimit {
        let endpoint = query.endpoint;
        let mut wait = wait_for(&mut self.connection, query, now);
        let kinds = [Some(query.kind), query.needs_token.then_some(RequestKind::Token)];
        for kind in kinds.into_iter().flatten() {
            let by_kind = wait_for(&mut self.kind_health_mut(kind).breaker, query, now);
            let mut entry = WaitLimit::Full;
            let repository = endpoint.repository().cloned();
            if let Some(known) = repository.and_then(|name| self.repositories.get_mut(&(kind, name))) {
                entry = wait_for(&mut known.breaker, query, now);
                if is_late_response_useful(kind) && is_slow(known.took, timeout, now) {
                    entry = entry.shorter(WaitLimit::Short);
                }
            }
            let slow = if is_late_response_useful(kind) && is_slow(self.kind_health(kind).took, timeout, now)
            {
                WaitLimit::Short
            } else {
                WaitLimit::Full
            };
            wait = wait.shorter(by_kind).shorter(entry).shorter(slow);
        }
        wait
    }

    /// The widest open breaker, not counting repositories.
    pub(super) fn open_breaker(&self) -> Option<FailingScope> {
        self.failing().find(|failing| {
            failing.open_since.is_some()
                && !failing.is_half_open
                && !matches!(failing.scope, FailureScope::Repository(..))
        })
    }

    /// Whether an open breaker stops the pulls of this principal in every repository.
    pub(super) fn stops_pulls(&self, principal: [u8; 32], needs_token: bool) -> bool {
        let token = needs_token.then_some(RequestKind::Token);
        let kinds = [RequestKind::Head, RequestKind::Get, RequestKind::Blob]
            .into_iter()
            .chain(token);
        let by_kind = kinds.filter_map(|kind| self.kind_health(kind).breaker.as_ref());
        let mut breakers = self.connection.iter().chain(by_kind);
        breakers.any(|breaker| breaker.stops_all_of(principal))
    }

    /// All scopes that are not closed, the widest first.
    pub(super) fn failing(&self) -> impl Iterator<Item = FailingScope> + '_ {
        let connection = self
            .connection
            .iter()
            .map(|breaker| (FailureScope::Connection, breaker));
        let by_kind = RequestKind::ALL.iter().filter_map(|kind| {
            let breaker = self.kind_health(*kind).breaker.as_ref()?;
            Some((FailureScope::Kind(*kind), breaker))
        });
        let by_repository = self.repositories.iter().filter_map(|((kind, name), entry)| {
            Some((
                FailureScope::Repository(*kind, name.clone()),
                entry.breaker.as_ref()?,
            ))
        });
        connection
            .chain(by_kind)
            .chain(by_repository)
            .map(|(scope, breaker)| FailingScope {
                scope,
                cause: breaker.cause(),
                open_since: breaker.open_since(),
                is_half_open: breaker.is_half_open(),
            })
    }

    /// The next probe and when it is due. Drops repositories that no client requests any more.
    pub(super) fn next_probe(&mut self, now: Instant) -> Option<(Instant, FailureScope)> {
        let is_forgotten = |entry: &RepositoryHealth| {
            let is_quiet =
                |breaker: &Breaker| now.saturating_duration_since(breaker.requested_at()) >= FORGET_AFTER;
            entry.breaker.as_ref().is_some_and(is_quiet)
        };
        self.repositories.retain(|entry| !is_forgotten(entry));
        if let Some(breaker) = &self.connection {
            return Some((breaker.due(), FailureScope::Connection));
        }
        let by_kind = RequestKind::ALL.iter().filter_map(|kind| {
            let by_kind = self.kind_health(*kind);
            let check = by_kind.check.as_ref().map(|_| now);
            let due = check.or_else(|| by_kind.breaker.as_ref().map(Breaker::due))?;
            Some((due, FailureScope::Kind(*kind)))
        });
        let mut by_repository: Vec<_> = self
            .repositories
            .iter()
            .filter(|((kind, _), _)| self.kind_health(*kind).breaker.is_none())
            .filter_map(|(key, entry)| Some((key, entry.breaker.as_ref()?)))
            .filter(|(_, breaker)| breaker.is_probed())
            .collect();
        by_repository.sort_by_key(|(_, breaker)| std::cmp::Reverse(breaker.requested_at()));
        let by_repository = by_repository
            .into_iter()
            .take(PROBED_MAX)
            .map(|((kind, name), breaker)| (breaker.due(), FailureScope::Repository(*kind, name.clone())));
        by_kind.chain(by_repository).min_by_key(|(due, _)| *due)
    }

    /// Marks a probe of this scope as sent and returns the operation to send.
    pub(super) fn take_probe(&mut self, scope: &FailureScope, now: Instant) -> Option<Endpoint> {
        if let FailureScope::Kind(kind) = scope {
            let by_kind = self.kind_health_mut(*kind);
            if let Some(check) = by_kind.check.take() {
                by_kind.checked_at = Some(now);
                return Some(check);
            }
        }
        Some(self.breaker_mut(scope)?.take_probe(now))
    }

    /// A probe of this scope that started at `began` has ended. If it caused neither a response nor a failure, the
    /// scope becomes half-open and the next request decides: the probe's response may concern only callers without a
    /// credential, or a rate-limit pause. The same applies to all scopes within, which are not probed meanwhile.
    pub(super) fn probe_ended(&mut self, scope: &FailureScope, began: Instant) {
        let has_failed = |breaker: &Breaker| breaker.failed_at() >= began;
        let is_open_still = self
            .breaker_mut(scope)
            .is_some_and(|breaker| !has_failed(breaker));
        if !is_open_still || self.connection.as_ref().is_some_and(has_failed) {
            return;
        }
        let connection = self
            .connection
            .iter_mut()
            .map(|breaker| (FailureScope::Connection, breaker));
        let by_kind = self.kinds.iter_mut().zip(RequestKind::ALL);
        let by_kind =
            by_kind.filter_map(|(by_kind, kind)| Some((FailureScope::Kind(kind), by_kind.breaker.as_mut()?)));
        let by_repository = self.repositories.iter_mut().filter_map(|((kind, name), entry)| {
            Some((
                FailureScope::Repository(*kind, name.clone()),
                entry.breaker.as_mut()?,
            ))
        });
        for (inner, breaker) in connection.chain(by_kind).chain(by_repository) {
            if inner.is_within(scope) && !has_failed(breaker) {
                breaker.half_open();
            }
        }
    }

    fn breaker_mut(&mut self, scope: &FailureScope) -> Option<&mut Breaker> {
        match scope {
            FailureScope::Connection => self.connection.as_mut(),
            FailureScope::Kind(kind) => self.kind_health_mut(*kind).breaker.as_mut(),
            FailureScope::Repository(kind, name) => {
                let entry = self.repositories.get_mut(&(*kind, name.clone()));
                entry.and_then(|entry| entry.breaker.as_mut())
            }
        }
    }

    /// A probe of the connection or the token service succeeded: closes the scope.
    pub(super) fn recovered(&mut self, scope: &FailureScope) -> Vec<BreakerChange> {
        let mut changes = Vec::new();
        match scope {
            FailureScope::Connection => close(&mut self.connection, FailureScope::Connection, &mut changes),
            FailureScope::Kind(kind) => {
                let by_kind = self.kind_health_mut(*kind);
                close(&mut by_kind.breaker, scope.clone(), &mut changes);
            }
            FailureScope::Repository(kind, name) => {
                let key = (*kind, name.clone());
                if let Some(entry) = self.repositories.get_mut(&key) {
                    close(&mut entry.breaker, scope.clone(), &mut changes);
                }
            }
        }
        changes
    }

    fn kind_health(&self, kind: RequestKind) -> &KindHealth {
        kind.of(&self.kinds)
    }

    fn kind_health_mut(&mut self, kind: RequestKind) -> &mut KindHealth {
        kind.of_mut(&mut self.kinds)
    }

    /// Updates the state of a repository, and drops it if it is empty.
    fn update_repository(
        &mut self,
        kind: RequestKind,
        endpoint: &Endpoint,
        change: impl FnOnce(&mut RepositoryHealth, FailureScope),
    ) {
        let Some(name) = endpoint.repository() else {
            return;
        };
        let key = (kind, name.clone());
        let mut entry = self.repositories.remove(&key).unwrap_or_default();
        change(&mut entry, FailureScope::Repository(kind, name.clone()));
        if !entry.is_empty() {
            self.repositories.insert(key, entry);
        }
    }
}

impl WaitLimit {
    /// The shorter of two.
    fn shorter(self, other: Self) -> Self {
        match (self, other) {
            (Self::None, _) | (_, Self::None) => Self::None,
            (Self::Short, _) | (_, Self::Short) => Self::Short,
            (Self::Full, Self::Full) => Self::Full,
        }
    }
}

fn opened(scope: FailureScope, cause: UpstreamFailure) -> BreakerChange {
    BreakerChange {
        scope,
        opened: Some(cause),
    }
}

fn close(breaker: &mut Option<Breaker>, scope: FailureScope, changes: &mut Vec<BreakerChange>) {
    if breaker
        .take()
        .is_some_and(|breaker| breaker.open_since().is_some())
    {
        changes.push(BreakerChange { scope, opened: None });
    }
}

fn wait_for(breaker: &mut Option<Breaker>, query: &WaitQuery<'_>, now: Instant) -> WaitLimit {
    breaker.as_mut().map_or(WaitLimit::Full, |breaker| {
        breaker.wait((query.endpoint, query.principal), now)
    })
}

/// The principal, if the upstream may have closed the connection because of its credential.
fn principal(sent: &SentRequest, cause: UpstreamFailure) -> Option<[u8; 32]> {
    (cause == UpstreamFailure::ConnectionReset).then_some(sent.principal)
}

/// Whether a late response is of use to later callers. A manifest fetched after a tag moved is not, because its
/// caller gets the previous one; a token is reused.
fn is_late_response_useful(kind: RequestKind) -> bool {
    !matches!(kind, RequestKind::Get | RequestKind::Token)
}

/// Whether the last response was slow enough to predict that the next one will exceed half of the timeout.
fn is_slow(took: Option<(Duration, Instant)>, timeout: Duration, now: Instant) -> bool {
    took.is_some_and(|(took, at)| {
        took > timeout / 2 && took > SHORT_WAIT && now.saturating_duration_since(at) < FORGET_AFTER
    })
}

#[cfg(test)]
mod tests;
