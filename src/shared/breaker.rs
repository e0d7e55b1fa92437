//! Circuit breaker of the bucket: three requests without a response within 30 s stop all requests until a probe is
//! answered. Pure; time is an argument.
//!
//! A client waits for the bucket only where nothing is cached, and then at most for `first_byte_timeout`. So a bucket
//! that hangs costs clients three such waits, and nothing while the breaker is open: probes are sent in the background.
//!
//! A bucket may answer and yet send no bytes of objects. So a body that stopped is outweighed only by a body that
//! arrived.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::bucket::{BucketError, Fault};

/// Silences that open the breaker.
const SILENCES_MAX: usize = 3;
/// Time within which they count.
const WINDOW: Duration = Duration::from_secs(30);
/// Pause before the first probe. It doubles with each probe without an answer, up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_secs(1);
/// Longest pause before a probe.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Circuit breaker of one kind of requests.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    silences: VecDeque<Silence>,
    open: Option<Open>,
}

#[derive(Clone, Copy, Debug)]
struct Silence {
    at: Instant,
    of_body: bool,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    since: Instant,
    /// A body stopped, so only a body that arrives closes the breaker.
    needs_body: bool,
    next_probe: Instant,
    pause: Duration,
}

impl Open {
    /// The next probe is sent after twice the pause.
    fn delay(&mut self, now: Instant) {
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.next_probe = now + self.pause;
    }
}

/// What a response means for the bucket as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The bucket responds.
    Answered,
    /// The bytes of an object arrived.
    Arrived,
    /// No usable response.
    Silent,
    /// The bytes of an object did not arrive, or too slowly.
    Stalled,
    /// It denies access, which the next request will not change.
    Denied,
}

impl Outcome {
    pub(super) fn of<T>(result: &Result<T, BucketError>) -> Outcome {
        match result.as_ref().err().map(BucketError::fault) {
            None | Some(Fault::None) => Outcome::Answered,
            Some(Fault::Operator) => Outcome::Denied,
            Some(Fault::Service) => Outcome::Silent,
        }
    }
}

/// Whether a request may be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// The breaker is closed.
    Granted,
    /// As the probe that is due.
    Probe,
    /// Not before this time.
    Later(Instant),
}

/// Change of the state by an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transition {
    None,
    Opened,
    /// Open for this long before.
    Closed(Duration),
}

impl Breaker {
    /// Since when the breaker has been open.
    pub(super) fn open_since(&self) -> Option<Instant> {
        self.open.map(|open| open.since)
    }

    /// Whether a request was not answered since then.
    pub(super) fn was_silent_since(&self, since: Instant) -> bool {
        self.open.is_some() || self.silences.iter().any(|silence| silence.at >= since)
    }

    /// When the next probe is due. `None`: the breaker is closed.
    pub(super) fn next_probe(&self) -> Option<Instant> {
        self.open.map(|open| open.next_probe)
    }

    /// Admits a request, or one probe at a time while the breaker is open: further ones wait for the next.
    pub(super) fn admit(&mut self, now: Instant) -> Admission {
        match &mut self.open {
            None => Admission::Granted,
            Some(open) if now < open.next_probe => Admission::Later(open.next_probe),
            Some(open) => {
                open.delay(now);
                Admission::Probe
            }
        }
    }

    /// Whether only the bytes of an object close the breaker.
    pub(super) fn needs_body(&self) -> bool {
        self.open.is_some_and(|open| open.needs_body)
    }

    /// Records the outcome of a request or of a probe. A request from before the breaker opened, which
    /// times out later, delays the next probe no further.
    pub(super) fn record(&mut self, outcome: Outcome, now: Instant) -> Transition {
        match (outcome, &mut self.open) {
            // An answer outweighs one timeout, so a bucket that answers less than half of the time is closed off.
            (Outcome::Answered, None) => {
                let first = self.silences.iter().position(|silence| !silence.of_body);
                let _outweighed = first.and_then(|first| self.silences.remove(first));
                Transition::None
            }
            (Outcome::Arrived, None) => {
                self.silences.pop_front();
                Transition::None
            }
            (Outcome::Answered, Some(open)) if open.needs_body => Transition::None,
            (Outcome::Answered | Outcome::Arrived, Some(open)) => {
                let since = open.since;
                *self = Self::default();
                Transition::Closed(now.saturating_duration_since(since))
            }
            (outcome @ (Outcome::Silent | Outcome::Stalled | Outcome::Denied), Some(open)) => {
                open.needs_body |= outcome == Outcome::Stalled;
                if now >= open.next_probe {
                    open.delay(now);
                }
                Transition::None
            }
            (outcome @ (Outcome::Silent | Outcome::Stalled), None) => {
                self.silences
                    .retain(|silence| now.saturating_duration_since(silence.at) < WINDOW);
                let of_body = outcome == Outcome::Stalled;
                self.silences.push_back(Silence { at: now, of_body });
                if self.silences.len() < SILENCES_MAX {
                    return Transition::None;
                }
                self.open(now)
            }
            (Outcome::Denied, None) => self.open(now),
        }
    }

    fn open(&mut self, now: Instant) -> Transition {
        let needs_body = self.silences.drain(..).any(|silence| silence.of_body);
        self.open = Some(Open {
            since: now,
            needs_body,
            next_probe: now + PAUSE,
            pause: PAUSE,
        });
        Transition::Opened
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn after(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn three_silences_in_30_s_open_it() {
        let start = Instant::now();
        for (silences, opens) in [(&[0, 10, 29][..], true), (&[0, 10, 30], false), (&[0, 29], false)] {
            let mut breaker = Breaker::default();
            for at in silences {
                breaker.record(Outcome::Silent, after(start, *at));
            }
            assert_eq!(breaker.open_since().is_some(), opens, "{silences:?}");
        }
    }

    #[test]
    fn answers_outweigh_as_many_silences() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        for _ in 0..20 {
            breaker.record(Outcome::Silent, start);
            breaker.record(Outcome::Answered, start);
        }
        assert_eq!(breaker.open_since(), None);
    }

    #[test]
    fn answers_outweigh_no_silent_body() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        for _ in 0..3 {
            breaker.record(Outcome::Answered, start);
            breaker.record(Outcome::Stalled, start);
            breaker.record(Outcome::Answered, start);
        }
        assert!(breaker.open_since().is_some() && breaker.needs_body());
        assert_eq!(breaker.record(Outcome::Answered, start), Transition::None);
        let closed = breaker.record(Outcome::Arrived, start);
        assert_eq!(closed, Transition::Closed(Duration::ZERO));
        for _ in 0..20 {
            breaker.record(Outcome::Stalled, start);
            breaker.record(Outcome::Arrived, start);
        }
        assert_eq!(breaker.open_since(), None, "half of the bodies arrive");
    }

    #[test]
    fn denial_opens_it_at_once() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        assert_eq!(breaker.record(Outcome::Denied, start), Transition::Opened);
        assert_eq!(
            breaker.record(Outcome::Denied, start),
            Transition::None,
            "told once"
        );
    }

    #[test]
    fn probes_follow_at_growing_pauses_until_an_answer() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        breaker.record(Outcome::Denied, start);
        let mut pauses = Vec::new();
        let mut last = start;
        for _ in 0..7 {
            let next = breaker.next_probe().unwrap();
            pauses.push((next - last).as_secs());
            breaker.record(Outcome::Silent, next);
            last = next;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        let closed = breaker.record(Outcome::Answered, last);
        assert_eq!(closed, Transition::Closed(last - start));
        assert_eq!(breaker.next_probe(), None);
    }

    #[test]
    fn one_probe_is_admitted_at_a_time() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        assert_eq!(breaker.admit(start), Admission::Granted);
        breaker.record(Outcome::Denied, start);
        let mut pauses = Vec::new();
        let mut last = start;
        for _ in 0..6 {
            let Admission::Later(at) = breaker.admit(last) else {
                unreachable!("the probe before it is not answered");
            };
            assert_eq!(breaker.admit(at), Admission::Probe);
            breaker.record(Outcome::Denied, at);
            pauses.push((at - last).as_secs());
            last = at;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30]);
        breaker.record(Outcome::Answered, last);
        assert_eq!(breaker.admit(last), Admission::Granted);
    }

    #[test]
    fn late_silences_delay_no_probe() {
        let (start, mut breaker) = (Instant::now(), Breaker::default());
        breaker.record(Outcome::Denied, start);
        let next = breaker.next_probe();
        for _ in 0..9 {
            breaker.record(Outcome::Silent, start);
        }
        assert_eq!(breaker.next_probe(), next);
    }
}
