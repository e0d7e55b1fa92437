//! Failure detection and circuit breaking for one upstream: a pure state machine, told the time.
//!
//! A failure is attributed to a [`Scope`]: all connections, one kind of request, or one kind of request in one repository.
//! A scope is closed, suspected, open or half-open. While it is suspected or half-open, an asker with a cached copy waits
//! for [`SHORT_WAIT`], and its request still goes out. While it is open, such an asker waits for nothing, and a probe sends
//! what had no response. A request without a cached copy is always sent, and its response counts as a probe's would.
//!
//! | event | its repository | its kind of request | all connections |
//! | --- | --- | --- | --- |
//! | response | closes | closes | closes |
//! | 401, 403 | open → half-open | open → half-open | closes |
//! | a probe without any of these | open → half-open | open → half-open | open → half-open |
//! | 5xx | opens for what failed, at the third | closes | closes |
//! | no response in time | suspected, opens at the third | the same, unless another response came meanwhile; opens over several repositories | nothing |
//! | no connection | nothing | nothing | suspected, opens at the third |
//!
//! A 5xx or a connection that breaks may be the upstream's way with a credential, so what opens by those alone is open for
//! the principals who met them, and for all others closed.
//!
//! A 401 comes from in front of what a registry looks up, so it shows no more than that something is alive. No task, no
//! timer, no I/O.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::answer::{Answer, Said};
use crate::oci::cause::Cause;
use crate::oci::name::Repository;
use crate::oci::operation::Operation;

mod scope;
mod trouble;

pub use scope::{Kind, Scope};
use trouble::{Bounded, Extent, Nature, Trouble};

/// How long an asker with a cached copy waits for an upstream that is suspected or slow.
pub(super) const SHORT_WAIT: Duration = Duration::from_millis(50);
/// Repositories of which a failure or a slow response is known, per upstream. Clients choose their names.
const REPOSITORIES_MAX: usize = 512;
/// Repositories of one upstream that are probed, those first that clients asked for last.
const PROBED_MAX: usize = 8;
/// A repository that no client asked for so long is probed no more, and a slow response is so long a sign of the next.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
/// A response that takes longer is worth a look whether it is the upstream that is slow, or one repository of it …
const SLOW_MIN: Duration = Duration::from_millis(250);
/// … so often at most.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// How long an asker with a cached copy waits for the upstream's response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The whole budget.
    Budget,
    /// `SHORT_WAIT` at most.
    Short,
    /// Not at all: nothing is sent for it.
    Nothing,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// A response that the registry had to look something up for.
    Response,
    /// 401 or 403.
    Denied,
    /// 5xx or 408, or a redirect to what cannot be reached.
    ServerError(Cause),
    /// Nothing came within the time limit, or the connection broke.
    NoResponse(Cause),
    /// No connection came about.
    NoConnection(Cause),
    /// Nothing was sent, or what came says nothing of the registry.
    Unknown,
}

impl Ended {
    /// What the response of all URLs together comes down to; `is_unavailable`: no URL gave a usable one.
    pub(super) fn of(answer: &Answer, is_unavailable: bool) -> Self {
        let cause = match answer.said {
            Said::Silent(cause) => cause,
            Said::Forbidden => return Self::Denied,
            _ => return Self::Response,
        };
        match cause {
            // Those bring the registry's own words, whatever they are worth to the asker.
            Cause::RateLimited
            | Cause::Malformed
            | Cause::TooLarge
            | Cause::Redirects(_)
            | Cause::WrongDigest
            | Cause::Unverifiable => Self::Response,
            _ if !is_unavailable => Self::Unknown,
            // The redirect is a response, and storage behind one repository says nothing of the others.
            Cause::Refused | Cause::Unreachable | Cause::Dns | Cause::Tls(_) | Cause::ConnectTimeout
                if answer.is_elsewheres =>
            {
                Self::ServerError(cause)
            }
            Cause::Refused
            | Cause::Unreachable
            | Cause::Dns
            | Cause::Tls(_)
            | Cause::ConnectTimeout
            // The proxy on the way to every upstream wants a credential.
            | Cause::Status(407) => Self::NoConnection(cause),
            Cause::Timeout | Cause::Reset => Self::NoResponse(cause),
            Cause::Status(status) if status >= 500 || status == 408 => Self::ServerError(cause),
            // A refusal by storage behind the registry is about one object.
            Cause::Status(_)
            // Attributed where the token is fetched.
            | Cause::TokenService
            | Cause::PlainRealm
            // A page that strangers are sent to must not keep those with a right from a fresh response.
            | Cause::NotRegistry
            | Cause::Budget
            | Cause::BreakerOpen
            | Cause::Offline
            | Cause::OwnCredential
            | Cause::Busy
            | Cause::ClientQueueFull
            | Cause::QueueFull => Self::Unknown,
        }
    }
}

/// What an operator is told: a circuit breaker that opened or closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) scope: Scope,
    /// Why it opened; `None`: it closed.
    pub(super) opened: Option<Cause>,
}

/// A scope that is not closed.
#[derive(Clone, Debug)]
pub(super) struct Failing {
    pub(super) scope: Scope,
    pub(super) cause: Cause,
    /// Since when it is open or half-open; `None`: it is suspected.
    pub(super) open_since: Option<Instant>,
    pub(super) is_half_open: bool,
}

/// A request that was sent and has no final response.
#[derive(Debug)]
struct Pending {
    kind: Kind,
    operation: Operation,
    principal: [u8; 32],
    /// `None` while nothing is sent for it (a credential helper runs).
    waits_for: Option<Peer>,
    /// Since when it waits for that.
    since: Instant,
    /// When an asker's wait for it last ended without a response.
    counted_at: Option<Instant>,
}

/// Whose response is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    Registry,
    TokenService,
}

impl Pending {
    /// Whose response is missing: the token service has a kind of its own.
    fn waiting(&self) -> Option<Kind> {
        self.waits_for.map(|peer| match peer {
            Peer::Registry => self.kind,
            Peer::TokenService => Kind::Token,
        })
    }
}

/// What is known of one kind of request, whatever the repository.
#[derive(Debug, Default)]
struct Whole {
    trouble: Option<Trouble>,
    responded_at: Option<Instant>,
    /// How long the last response took, and when it came. A slow one that a quick one overtook does not count.
    took: Option<(Duration, Instant)>,
    /// What had a quick response last: worth a probe when another repository has none, or a slow one.
    witness: Option<Operation>,
    /// A probe because of a slow response.
    check: Option<Operation>,
    checked_at: Option<Instant>,
}

/// What is known of one kind of request in one repository.
#[derive(Debug, Default)]
struct Part {
    trouble: Option<Trouble>,
    took: Option<(Duration, Instant)>,
}

impl Part {
    fn is_empty(&self) -> bool {
        self.trouble.is_none() && self.took.is_none()
    }
}

/// The state machine.
#[derive(Debug)]
pub(super) struct Detector {
    connection: Option<Trouble>,
    whole: [Whole; Kind::COUNT],
    parts: Bounded<(Kind, Repository), Part>,
    pending: HashMap<u64, Pending>,
    next: u64,
}

impl Default for Detector {
    fn default() -> Self {
        Self {
            connection: None,
            whole: std::array::from_fn(|_| Whole::default()),
            parts: Bounded::new(REPOSITORIES_MAX),
            pending: HashMap::new(),
            next: 0,
        }
    }
}

/// A request that was sent, as its outcome is attributed.
#[derive(Clone, Copy)]
struct Sent<'a> {
    kind: Kind,
    operation: &'a Operation,
    principal: [u8; 32],
}

/// What an asker with a cached copy is about to send.
pub(super) struct Asker<'a> {
    pub(super) kind: Kind,
    pub(super) operation: &'a Operation,
    pub(super) principal: [u8; 32],
    /// Whether a token must be fetched first, should the registry want one.
    pub(super) needs_token: bool,
}

impl Detector {
    /// A request is sent.
    pub(super) fn sent(
        &mut self,
        kind: Kind,
        operation: &Operation,
        principal: [u8; 32],
        now: Instant,
    ) -> u64 {
        let id = self.next;
        self.next += 1;
        let pending = Pending {
            kind,
            operation: operation.clone(),
            principal,
            waits_for: Some(Peer::Registry),
            since: now,
            counted_at: None,
        };
        self.pending.insert(id, pending);
        id
    }

    /// The request waits for something of ours, or goes out after it.
    pub(super) fn held(&mut self, id: u64, is_held: bool, now: Instant) {
        if let Some(pending) = self.pending.get_mut(&id) {
            pending.waits_for = (!is_held).then_some(Peer::Registry);
            pending.since = now;
        }
    }

    /// The request waits for a token.
    pub(super) fn token_wanted(&mut self, id: u64, now: Instant) {
        if let Some(pending) = self.pending.get_mut(&id) {
            pending.waits_for = Some(Peer::TokenService);
            pending.since = now;
        }
    }

    /// The token service responded or not, and the request goes on.
    pub(super) fn token_ended(&mut self, id: u64, ended: Ended, now: Instant) -> Vec<Change> {
        let Some(pending) = self.pending.get_mut(&id) else {
            return Vec::new();
        };
        let since = std::mem::replace(&mut pending.since, now);
        pending.waits_for = Some(Peer::Registry);
        let (operation, principal) = (pending.operation.clone(), pending.principal);
        let sent = Sent {
            kind: Kind::Token,
            operation: &operation,
            principal,
        };
        self.took_in(sent, ended, (since, now))
    }

    /// What became of the request.
    pub(super) fn ended(&mut self, id: u64, ended: Ended, now: Instant) -> Vec<Change> {
        match self.pending.remove(&id) {
            Some(Pending {
                kind,
                operation,
                principal,
                since,
                ..
            }) => {
                let sent = Sent {
                    kind,
                    operation: &operation,
                    principal,
                };
                self.took_in(sent, ended, (since, now))
            }
            None => Vec::new(),
        }
    }

    /// The request was given up; nothing is known of its response.
    pub(super) fn abandoned(&mut self, id: u64) {
        self.pending.remove(&id);
    }

    /// An asker waited so long for a request of this principal's, and no response came. One that waits for a place and
    /// was not sent is no sign of the upstream.
    pub(super) fn expired(
        &mut self,
        principal: [u8; 32],
        operation: &Operation,
        waited: Duration,
        now: Instant,
    ) -> Vec<Change> {
        let mut silent = Vec::new();
        for pending in self.pending.values_mut() {
            let is_own = pending.principal == principal && pending.operation == *operation;
            let is_old = now.saturating_duration_since(pending.since) >= waited / 2;
            // Many askers may wait for one request, and it is one failure.
            let is_counted = pending
                .counted_at
                .is_some_and(|at| at >= pending.since && now.saturating_duration_since(at) < SHORT_WAIT / 2);
            if let Some(kind) = pending.waiting().filter(|_| is_own && is_old && !is_counted) {
                pending.counted_at = Some(now);
                silent.push((kind, pending.since));
            }
        }
        let mut changes = Vec::new();
        for (kind, since) in silent {
            let sent = Sent {
                kind,
                operation,
                principal,
            };
            changes.extend(self.took_in(sent, Ended::NoResponse(Cause::Budget), (since, now)));
        }
        changes
    }

    fn took_in(&mut self, sent: Sent<'_>, ended: Ended, (since, now): (Instant, Instant)) -> Vec<Change> {
        let Sent { kind, operation, .. } = sent;
        let mut changes = Vec::new();
        match ended {
            Ended::Unknown => return changes,
            Ended::NoConnection(cause) => {
                let as_new = || Trouble::new((Nature::Silence, Extent::Everything), operation, now);
                let trouble = self.connection.get_or_insert_with(as_new);
                if trouble.fail(cause, (operation, None), now) {
                    changes.push(opened(Scope::Connection, cause));
                }
            }
            Ended::NoResponse(cause) => self.no_response(sent, cause, (since, now), &mut changes),
            Ended::ServerError(cause) => {
                self.responded(kind, operation, (since, now), &mut changes);
                self.fails(sent, (Nature::Error, cause), now, &mut changes);
            }
            Ended::Denied => {
                closes(&mut self.connection, Scope::Connection, &mut changes);
                let whole = self.whole_mut(kind);
                whole.responded_at = Some(now);
                if let Some(trouble) = &mut whole.trouble {
                    trouble.half_opens();
                }
                self.edit(kind, operation, |part, _| {
                    if let Some(trouble) = &mut part.trouble {
                        trouble.half_opens();
                    }
                });
            }
            Ended::Response => {
                self.responded(kind, operation, (since, now), &mut changes);
                self.edit(kind, operation, |part, scope| {
                    if part
                        .trouble
                        .as_ref()
                        .is_some_and(|trouble| trouble.ends_by(operation))
                    {
                        closes(&mut part.trouble, scope, &mut changes);
                    }
                });
            }
        }
        changes
    }

    /// Some response: neither the connections nor this kind of request as a whole are at fault.
    fn responded(
        &mut self,
        kind: Kind,
        operation: &Operation,
        (since, now): (Instant, Instant),
        changes: &mut Vec<Change>,
    ) {
        let took = now.saturating_duration_since(since);
        closes(&mut self.connection, Scope::Connection, changes);
        let whole = self.whole_mut(kind);
        closes(&mut whole.trouble, Scope::Kind(kind), changes);
        whole.responded_at = Some(now);
        let is_overtaken = whole.took.is_some_and(|(quick, at)| at > since && quick < took);
        if !is_overtaken {
            whole.took = Some((took, now));
        }
        if took < SLOW_MIN {
            whole.witness = Some(operation.clone());
            whole.check = None;
        } else if !is_overtaken
            && let Some(witness) = &whole.witness
            && witness.repository() != operation.repository()
            && whole
                .checked_at
                .is_none_or(|at| now.saturating_duration_since(at) >= CHECK_INTERVAL)
        {
            whole.check = Some(witness.clone());
        }
        self.edit(kind, operation, |part, _| {
            part.took = (took > SHORT_WAIT).then_some((took, now));
        });
    }

    fn no_response(
        &mut self,
        sent: Sent<'_>,
        cause: Cause,
        (since, now): (Instant, Instant),
        changes: &mut Vec<Change>,
    ) {
        let Sent { kind, operation, .. } = sent;
        self.fails(sent, (Nature::Silence, cause), now, changes);
        let whole = self.whole_mut(kind);
        if whole.responded_at.is_some_and(|at| at > since) {
            return;
        }
        let witness = whole
            .witness
            .clone()
            .filter(|witness| whole.trouble.is_none() && witness.repository() != operation.repository());
        let as_new = || Trouble::new((Nature::Silence, Extent::Repositories), operation, now);
        let trouble = whole.trouble.get_or_insert_with(as_new);
        if trouble.fail(cause, (operation, shown_by(sent, cause)), now) {
            changes.push(opened(Scope::Kind(kind), cause));
        }
        if let Some(witness) = witness {
            trouble.probes_first(witness);
        }
    }

    /// A failure in one repository.
    fn fails(
        &mut self,
        sent: Sent<'_>,
        (nature, cause): (Nature, Cause),
        now: Instant,
        changes: &mut Vec<Change>,
    ) {
        let Sent { kind, operation, .. } = sent;
        let shown_by = match nature {
            Nature::Error => Some(sent.principal),
            Nature::Silence => shown_by(sent, cause),
        };
        self.edit(kind, operation, |part, scope| {
            if part
                .trouble
                .as_ref()
                .is_some_and(|trouble| trouble.nature() != nature)
            {
                closes(&mut part.trouble, scope.clone(), changes);
            }
            let as_new = || Trouble::new((nature, Extent::Requests), operation, now);
            if part
                .trouble
                .get_or_insert_with(as_new)
                .fail(cause, (operation, shown_by), now)
            {
                changes.push(opened(scope, cause));
            }
        });
    }

    /// How long an asker with a cached copy waits.
    pub(super) fn wait(&mut self, asker: &Asker<'_>, budget: Duration, now: Instant) -> Wait {
        let operation = asker.operation;
        let mut wait = waits(&mut self.connection, asker, now);
        let kinds = [Some(asker.kind), asker.needs_token.then_some(Kind::Token)];
        for kind in kinds.into_iter().flatten() {
            let whole = waits(&mut self.whole_mut(kind).trouble, asker, now);
            let mut part = Wait::Budget;
            let repository = operation.repository().cloned();
            if let Some(known) = repository.and_then(|name| self.parts.get_mut(&(kind, name))) {
                part = waits(&mut known.trouble, asker, now);
                if is_patient(kind) && is_slow(known.took, budget, now) {
                    part = part.shorter(Wait::Short);
                }
            }
            let slow = if is_patient(kind) && is_slow(self.whole(kind).took, budget, now) {
                Wait::Short
            } else {
                Wait::Budget
            };
            wait = wait.shorter(whole).shorter(part).shorter(slow);
        }
        wait
    }

    /// The failure of the upstream as a whole that is open, the widest first.
    pub(super) fn open(&self) -> Option<Failing> {
        self.failing().find(|failing| {
            failing.open_since.is_some()
                && !failing.is_half_open
                && !matches!(failing.scope, Scope::Repository(..))
        })
    }

    /// Every scope that is not closed, the widest first.
    pub(super) fn failing(&self) -> impl Iterator<Item = Failing> + '_ {
        let connection = self.connection.iter().map(|trouble| (Scope::Connection, trouble));
        let whole = Kind::ALL.iter().filter_map(|kind| {
            let trouble = self.whole(*kind).trouble.as_ref()?;
            Some((Scope::Kind(*kind), trouble))
        });
        let parts = self.parts.iter().filter_map(|((kind, name), part)| {
            Some((Scope::Repository(*kind, name.clone()), part.trouble.as_ref()?))
        });
        connection
            .chain(whole)
            .chain(parts)
            .map(|(scope, trouble)| Failing {
                scope,
                cause: trouble.cause(),
                open_since: trouble.open_since(),
                is_half_open: trouble.is_half_open(),
            })
    }

    /// The probe that is due next, and when. Forgets repositories that no client asks for.
    pub(super) fn next_probe(&mut self, now: Instant) -> Option<(Instant, Scope)> {
        let is_forgotten = |part: &Part| {
            let is_quiet =
                |trouble: &Trouble| now.saturating_duration_since(trouble.asked_at()) >= FORGOTTEN_AFTER;
            part.trouble.as_ref().is_some_and(is_quiet)
        };
        self.parts.retain(|part| !is_forgotten(part));
        if let Some(trouble) = &self.connection {
            return Some((trouble.due(), Scope::Connection));
        }
        let whole = Kind::ALL.iter().filter_map(|kind| {
            let whole = self.whole(*kind);
            let check = whole.check.as_ref().map(|_| now);
            let due = check.or_else(|| whole.trouble.as_ref().map(Trouble::due))?;
            Some((due, Scope::Kind(*kind)))
        });
        let mut parts: Vec<_> = self
            .parts
            .iter()
            .filter(|((kind, _), _)| self.whole(*kind).trouble.is_none())
            .filter_map(|(key, part)| Some((key, part.trouble.as_ref()?)))
            .filter(|(_, trouble)| trouble.is_probed())
            .collect();
        parts.sort_by_key(|(_, trouble)| std::cmp::Reverse(trouble.asked_at()));
        let parts = parts
            .into_iter()
            .take(PROBED_MAX)
            .map(|((kind, name), trouble)| (trouble.due(), Scope::Repository(*kind, name.clone())));
        whole.chain(parts).min_by_key(|(due, _)| *due)
    }

    /// A probe of this scope is sent: for what.
    pub(super) fn probed(&mut self, scope: &Scope, now: Instant) -> Option<Operation> {
        if let Scope::Kind(kind) = scope {
            let whole = self.whole_mut(*kind);
            if let Some(check) = whole.check.take() {
                whole.checked_at = Some(now);
                return Some(check);
            }
        }
        Some(self.trouble_mut(scope)?.probed(now))
    }

    /// A probe of this scope that began then has ended. If it brought neither a response nor a failure, the next request
    /// decides: what the probe was told, as a stranger or within a pause, may concern nobody else. So it is with all
    /// within the scope, which is not probed meanwhile.
    pub(super) fn probe_ended(&mut self, scope: &Scope, began: Instant) {
        let has_failed = |trouble: &Trouble| trouble.failed_at() >= began;
        let is_open_still = self
            .trouble_mut(scope)
            .is_some_and(|trouble| !has_failed(trouble));
        if !is_open_still || self.connection.as_ref().is_some_and(has_failed) {
            return;
        }
        let connection = self
            .connection
            .iter_mut()
            .map(|trouble| (Scope::Connection, trouble));
        let whole = self.whole.iter_mut().zip(Kind::ALL);
        let whole = whole.filter_map(|(whole, kind)| Some((Scope::Kind(kind), whole.trouble.as_mut()?)));
        let parts = self.parts.iter_mut().filter_map(|((kind, name), part)| {
            Some((Scope::Repository(*kind, name.clone()), part.trouble.as_mut()?))
        });
        for (inner, trouble) in connection.chain(whole).chain(parts) {
            if inner.is_within(scope) && !has_failed(trouble) {
                trouble.half_opens();
            }
        }
    }

    fn trouble_mut(&mut self, scope: &Scope) -> Option<&mut Trouble> {
        match scope {
            Scope::Connection => self.connection.as_mut(),
            Scope::Kind(kind) => self.whole_mut(*kind).trouble.as_mut(),
            Scope::Repository(kind, name) => {
                let part = self.parts.get_mut(&(*kind, name.clone()));
                part.and_then(|part| part.trouble.as_mut())
            }
        }
    }

    /// A probe without a kind of request found the upstream, or its token service, alive.
    pub(super) fn is_back(&mut self, scope: &Scope) -> Vec<Change> {
        let mut changes = Vec::new();
        match scope {
            Scope::Connection => closes(&mut self.connection, Scope::Connection, &mut changes),
            Scope::Kind(kind) => {
                let whole = self.whole_mut(*kind);
                closes(&mut whole.trouble, scope.clone(), &mut changes);
            }
            Scope::Repository(kind, name) => {
                let key = (*kind, name.clone());
                if let Some(part) = self.parts.get_mut(&key) {
                    closes(&mut part.trouble, scope.clone(), &mut changes);
                }
            }
        }
        changes
    }

    fn whole(&self, kind: Kind) -> &Whole {
        kind.of(&self.whole)
    }

    fn whole_mut(&mut self, kind: Kind) -> &mut Whole {
        kind.of_mut(&mut self.whole)
    }

    /// Changes what is known of a repository, and keeps it only if there is something to know.
    fn edit(&mut self, kind: Kind, operation: &Operation, change: impl FnOnce(&mut Part, Scope)) {
        let Some(name) = operation.repository() else {
            return;
        };
        let key = (kind, name.clone());
        let mut part = self.parts.remove(&key).unwrap_or_default();
        change(&mut part, Scope::Repository(kind, name.clone()));
        if !part.is_empty() {
            self.parts.insert(key, part);
        }
    }
}

impl Wait {
    /// The shorter of two.
    fn shorter(self, other: Self) -> Self {
        match (self, other) {
            (Self::Nothing, _) | (_, Self::Nothing) => Self::Nothing,
            (Self::Short, _) | (_, Self::Short) => Self::Short,
            (Self::Budget, Self::Budget) => Self::Budget,
        }
    }
}

fn opened(scope: Scope, cause: Cause) -> Change {
    Change {
        scope,
        opened: Some(cause),
    }
}

fn closes(trouble: &mut Option<Trouble>, scope: Scope, changes: &mut Vec<Change>) {
    if trouble
        .take()
        .is_some_and(|trouble| trouble.open_since().is_some())
    {
        changes.push(Change { scope, opened: None });
    }
}

fn waits(trouble: &mut Option<Trouble>, asker: &Asker<'_>, now: Instant) -> Wait {
    trouble.as_mut().map_or(Wait::Budget, |trouble| {
        trouble.wait((asker.operation, asker.principal), now)
    })
}

/// Whose request it was, where the failure may be the upstream's way with that: it hung up.
fn shown_by(sent: Sent<'_>, cause: Cause) -> Option<[u8; 32]> {
    (cause == Cause::Reset).then_some(sent.principal)
}

/// Whether a late response of this kind still serves the next asker as well. Of a manifest that is fetched because the tag
/// moved, the asker is given an older one instead; a token is good for many requests.
fn is_patient(kind: Kind) -> bool {
    !matches!(kind, Kind::Get | Kind::Token)
}

/// Whether so slow a response is a sign that the next one uses up most of the budget.
fn is_slow(took: Option<(Duration, Instant)>, budget: Duration, now: Instant) -> bool {
    took.is_some_and(|(took, at)| {
        took > budget / 2 && took > SHORT_WAIT && now.saturating_duration_since(at) < FORGOTTEN_AFTER
    })
}

#[cfg(test)]
mod tests;
