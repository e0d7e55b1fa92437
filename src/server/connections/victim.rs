//! Choice of the idle connection that is closed for a new one. Pure.

use std::time::Duration;

/// An idle connection is not closed before this time, because its handshake or next request may be under way.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// An address has many connections if it has more than this share of the limit: one in `MANY_SHARE`.
const MANY_SHARE: usize = 8;

/// Grace of an idle connection whose address has many, if the new connection's address has many too. A client on a busy
/// machine needs this long from its connection to its request.
pub(super) const GRACE_AMONG_MANY: Duration = Duration::from_millis(400);

/// Grace of an idle connection whose address has many, if the new connection's address has few.
pub(super) const GRACE_FROM_FEW: Duration = Duration::from_millis(50);

/// Whether one address with this number of connections has many, at this limit of the process.
pub(super) fn is_many(connections: usize, limit: usize) -> bool {
    connections > limit / MANY_SHARE
}

/// The address of the new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Newcomer {
    /// It has reached its limit, so it replaces a connection of its own.
    SameAddress,
    /// It has few connections.
    Few,
    /// It has many connections.
    Many,
}

/// A connection without a request in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<T> {
    pub(super) connection: T,
    /// The number of idle connections of its address.
    pub(super) of_address: usize,
    pub(super) idle_for: Duration,
    /// Whether its address opens connections and sends no requests. They have no grace.
    pub(super) has_no_grace: bool,
}

/// The connection to close, if any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice<T> {
    /// Close this one.
    Close(T),
    /// None for this time.
    NotBefore(Duration),
    /// None, because each has a request in flight.
    NoneIdle,
}

/// Chooses the longest idle connection of the address with the most idle ones. If an address has many, only its
/// connections are closed: during their grace, no connection of another address is closed instead. If the new connection
/// replaces one of its own address, there is no grace.
pub(super) fn victim<T>(
    candidates: impl Iterator<Item = Candidate<T>>,
    limit: usize,
    newcomer: Newcomer,
) -> Choice<T> {
    let (share, grace) = match newcomer {
        Newcomer::SameAddress => (0, Duration::ZERO),
        Newcomer::Few => (limit, GRACE_FROM_FEW),
        Newcomer::Many => (limit, GRACE_AMONG_MANY),
    };
    let order = |one: &Candidate<T>| (one.of_address, one.idle_for);
    let precedes = |one: &Candidate<T>, other: &Option<Candidate<T>>| {
        other.as_ref().is_none_or(|other| order(one) > order(other))
    };
    let (mut crowded, mut first, mut left) = (None, None, None);
    for candidate in candidates {
        if is_many(candidate.of_address, share) {
            if precedes(&candidate, &crowded) {
                crowded = Some(candidate);
            }
        } else if candidate.idle_for < GRACE {
            let wait = GRACE.saturating_sub(candidate.idle_for);
            left = Some(left.map_or(wait, |left: Duration| left.min(wait)));
        } else if precedes(&candidate, &first) {
            first = Some(candidate);
        }
    }
    if let Some(crowded) = crowded {
        let grace = if crowded.has_no_grace {
            Duration::ZERO
        } else {
            grace
        };
        let wait = grace.saturating_sub(crowded.idle_for);
        return if wait.is_zero() {
            Choice::Close(crowded.connection)
        } else {
            Choice::NotBefore(wait)
        };
    }
    match (first, left) {
        (Some(first), _) => Choice::Close(first.connection),
        (None, Some(left)) => Choice::NotBefore(left),
        (None, None) => Choice::NoneIdle,
    }
}
