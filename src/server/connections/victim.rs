//! The choice of the connection that is closed to make room for another. Pure.

use std::time::Duration;

/// So long a quiet connection is left alone: its handshake or its next request may be under way.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// An address with more quiet connections than this share of all places has no grace: it makes room by itself.
const CROWD_SHARE: usize = 8;

/// A connection without a request in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<T> {
    pub(super) what: T,
    /// How many such connections its address has.
    pub(super) of_address: usize,
    pub(super) quiet_for: Duration,
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

/// The connection that goes first: of the address with the most quiet ones, that which has been quiet for the longest.
/// Within one address (`at_address`) there is no grace.
pub(super) fn victim<T>(
    candidates: impl Iterator<Item = Candidate<T>>,
    places: usize,
    at_address: bool,
) -> Choice<T> {
    let crowd = places / CROWD_SHARE;
    let mut first: Option<Candidate<T>> = None;
    let mut left: Option<Duration> = None;
    for candidate in candidates {
        let is_free = at_address || candidate.of_address > crowd;
        if !is_free && candidate.quiet_for < GRACE {
            let wait = GRACE.saturating_sub(candidate.quiet_for);
            left = Some(left.map_or(wait, |left| left.min(wait)));
            continue;
        }
        let order = |one: &Candidate<T>| (one.of_address, one.quiet_for);
        if first
            .as_ref()
            .is_none_or(|first| order(&candidate) > order(first))
        {
            first = Some(candidate);
        }
    }
    match (first, left) {
        (Some(first), _) => Choice::Close(first.what),
        (None, Some(left)) => Choice::NotBefore(left),
        (None, None) => Choice::NoneQuiet,
    }
}
