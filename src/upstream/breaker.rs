//! When to stop asking an upstream that does not answer: a pure state machine, told the time.
//!
//! It decides nothing about serving: it only says "open", and whoever holds a copy then does not ask. A caller
//! without a copy asks all the same, and its success closes the breaker as a probe's would. No task, no timer, no I/O.

use std::time::Duration;

use tokio::time::Instant;

use crate::oci::cause::Cause;

/// So many silences …
pub(super) const SILENCES_MAX: usize = 3;
/// … within so long, with no answer in between, open the breaker.
pub(super) const WINDOW: Duration = Duration::from_secs(30);
/// First wait before a probe.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// Longest wait between probes: how late the return of a registry may be noticed.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// Closed with the silences counted so far, or open.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    /// When the last silences came, oldest first; never more than [`SILENCES_MAX`].
    silences: Vec<Instant>,
    open: Option<Open>,
    /// Counts openings, so that a probe of an earlier one knows it is not wanted any more.
    openings: u64,
}

/// What is known while the breaker is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Open {
    /// When it opened.
    pub(super) since: Instant,
    /// The silence that opened it.
    pub(super) cause: Cause,
}

impl Breaker {
    /// An upstream was silent. `Some(opening)` if that opened the breaker just now: start the probe of that number.
    pub(super) fn silence(&mut self, now: Instant, cause: Cause) -> Option<u64> {
        if self.open.is_some() || !counts(cause) {
            return None;
        }
        self.silences
            .retain(|at| now.saturating_duration_since(*at) <= WINDOW);
        self.silences.push(now);
        if self.silences.len() < SILENCES_MAX {
            return None;
        }
        self.silences.clear();
        self.open = Some(Open { since: now, cause });
        self.openings += 1;
        Some(self.openings)
    }

    /// The upstream answered, whatever it said.
    pub(super) fn answer(&mut self) {
        self.silences.clear();
        self.open = None;
    }

    /// Whether the breaker is open, and since when.
    pub(super) fn open(&self) -> Option<Open> {
        self.open
    }

    /// Which opening it is, while it is open.
    pub(super) fn opening(&self) -> Option<u64> {
        self.open.map(|_| self.openings)
    }

    /// Whether the probe of this opening is still wanted.
    pub(super) fn awaits(&self, opening: u64) -> bool {
        self.open.is_some() && self.openings == opening
    }
}

/// How long to wait before the probe after `failed` failed ones: 1, 2, 4, … 30 s.
pub(super) fn backoff(failed: u32) -> Duration {
    BACKOFF_MIN
        .saturating_mul(2_u32.saturating_pow(failed.min(16)))
        .min(BACKOFF_MAX)
}

/// Whether a silence says something about the upstream as a whole. A rate limit is an answer of a living registry, a
/// broken object is one object's, and being busy is our own doing.
fn counts(cause: Cause) -> bool {
    match cause {
        Cause::Refused
        | Cause::Reset
        | Cause::Unreachable
        | Cause::Dns
        | Cause::Tls(_)
        | Cause::ConnectTimeout
        | Cause::Timeout
        | Cause::TokenService
        | Cause::PlainRealm => true,
        // A refusal by storage behind the registry is about one object.
        Cause::Status(status) => status >= 500 || matches!(status, 407 | 408),
        Cause::Budget
        | Cause::BreakerOpen
        | Cause::RateLimited
        | Cause::Malformed
        // A page that only strangers are sent to must not keep those with a right from being answered.
        | Cause::NotRegistry
        | Cause::TooLarge
        | Cause::Redirects(_)
        | Cause::WrongDigest
        | Cause::Unverifiable
        | Cause::Offline
        | Cause::OwnCredential
        | Cause::Busy
        | Cause::ClientQueueFull
        | Cause::QueueFull => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::oci::cause::RedirectFault;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn three_silences_within_the_window_open_it_once() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        assert_eq!(breaker.silence(start, Cause::Refused), None);
        assert_eq!(breaker.silence(at(start, 10), Cause::Refused), None);
        assert_eq!(breaker.silence(at(start, 30), Cause::Timeout), Some(1));
        assert_eq!(
            breaker.open(),
            Some(Open {
                since: at(start, 30),
                cause: Cause::Timeout
            })
        );
        assert_eq!(
            breaker.silence(at(start, 31), Cause::Refused),
            None,
            "it is open already"
        );
        assert!(breaker.awaits(1));
    }

    #[test]
    fn an_answer_between_starts_the_count_again() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        breaker.silence(start, Cause::Refused);
        breaker.silence(start, Cause::Refused);
        breaker.answer();
        assert_eq!(breaker.silence(start, Cause::Refused), None);
        assert_eq!(breaker.open(), None);
    }

    #[test]
    fn silences_far_apart_never_open_it() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        for seconds in (0..200).step_by(16) {
            assert_eq!(breaker.silence(at(start, seconds), Cause::Refused), None);
        }
    }

    #[test]
    fn a_rate_limit_or_a_broken_object_never_opens_it() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        for cause in [
            Cause::RateLimited,
            Cause::Malformed,
            Cause::TooLarge,
            Cause::Redirects(RedirectFault::TooMany),
            Cause::Busy,
        ] {
            for _ in 0..10 {
                assert_eq!(breaker.silence(start, cause), None);
            }
        }
    }

    #[test]
    fn a_probe_of_an_earlier_opening_is_not_wanted() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        let open = |breaker: &mut Breaker| {
            (0..SILENCES_MAX)
                .filter_map(|_| breaker.silence(start, Cause::Dns))
                .last()
        };
        assert_eq!(open(&mut breaker), Some(1));
        breaker.answer();
        assert!(!breaker.awaits(1));
        assert_eq!(open(&mut breaker), Some(2));
        assert!(!breaker.awaits(1));
        assert!(breaker.awaits(2));
    }

    #[test]
    fn probes_wait_ever_longer_but_never_more_than_the_longest() {
        let waits: Vec<_> = (0..8).map(|n| backoff(n).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(backoff(u32::MAX), BACKOFF_MAX);
    }
}
