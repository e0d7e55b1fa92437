//! The choice of the connection that is closed to make room for another. Pure.

use std::time::Duration;

/// So long a quiet connection is left alone: its handshake or its next request may be under way.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// An address with more quiet connections than this share of all places has many.
const MANY_SHARE: usize = 8;

/// So long a quiet connection of an address that has many is protected from a newcomer of an address that has many: as
/// long as a client takes from its connection to its request on a busy machine.
pub(super) const GRACE_AMONG_MANY: Duration = Duration::from_millis(400);

/// So long it is protected from a newcomer of another address.
pub(super) const GRACE_FROM_FEW: Duration = Duration::from_millis(50);

/// Whether so many connections of one address are many, for so many places in all.
pub(super) fn is_many(connections: usize, places: usize) -> bool {
    connections > places / MANY_SHARE
}

/// The address of the connection that needs a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Newcomer {
    /// It replaces one of its own address.
    SameAddress,
    /// It has few connections.
    Few,
    /// It has many.
    Many,
}

/// A connection without a request in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<T> {
    pub(super) what: T,
    /// How many such connections its address has.
    pub(super) of_address: usize,
    pub(super) quiet_for: Duration,
    /// Whether its address opens connections and sends no request: they have no grace.
    pub(super) is_unused: bool,
}

/// Which one goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice<T> {
    /// This one.
    Close(T),
    /// None before that time has passed.
    NotBefore(Duration),
    /// None: each has a request in flight.
    NoneQuiet,
}

/// The connection that goes first: of the address with the most quiet ones, that which has been quiet for the longest. An
/// address that has many makes room alone: its grace is waited for, and no other address makes room in its place. Within
/// one address there is no grace.
pub(super) fn victim<T>(
    candidates: impl Iterator<Item = Candidate<T>>,
    places: usize,
    newcomer: Newcomer,
) -> Choice<T> {
    let (share, grace) = match newcomer {
        Newcomer::SameAddress => (0, Duration::ZERO),
        Newcomer::Few => (places, GRACE_FROM_FEW),
        Newcomer::Many => (places, GRACE_AMONG_MANY),
    };
    let order = |one: &Candidate<T>| (one.of_address, one.quiet_for);
    let precedes = |one: &Candidate<T>, other: &Option<Candidate<T>>| {
        other.as_ref().is_none_or(|other| order(one) > order(other))
    };
    let (mut crowded, mut first, mut left) = (None, None, None);
    for candidate in candidates {
        if is_many(candidate.of_address, share) {
            if precedes(&candidate, &crowded) {
                crowded = Some(candidate);
            }
        } else if candidate.quiet_for < GRACE {
            let wait = GRACE.saturating_sub(candidate.quiet_for);
            left = Some(left.map_or(wait, |left: Duration| left.min(wait)));
        } else if precedes(&candidate, &first) {
            first = Some(candidate);
        }
    }
    if let Some(crowded) = crowded {
        let grace = if crowded.is_unused { Duration::ZERO } else { grace };
        let wait = grace.saturating_sub(crowded.quiet_for);
        return if wait.is_zero() {
            Choice::Close(crowded.what)
        } else {
            Choice::NotBefore(wait)
        };
    }
    match (first, left) {
        (Some(first), _) => Choice::Close(first.what),
        (None, Some(left)) => Choice::NotBefore(left),
        (None, None) => Choice::NoneQuiet,
    }
}
