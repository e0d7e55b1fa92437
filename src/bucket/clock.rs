//! Clock of a storage: its time of day, from the `Date` of its responses and the monotonic time since.
//!
//! Several caches compare times that they wrote to one bucket. Their own clocks may differ by any amount, so none of
//! them is read here. A `Date` has a precision of one second, and a response takes time to arrive. So the time is known
//! as an interval, which each response narrows. A response that contradicts it (the storage's clock was set, or the
//! monotonic clock drifted) replaces it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::time::Instant;

/// A response that took longer states nothing: its interval would be too wide for the second that records have.
const RESPONSE_TIME_MAX: Duration = Duration::from_secs(10);

/// Clock of one storage. Nothing is known before its first response.
pub struct StorageClock {
    base: Instant,
    known: Mutex<Option<Interval>>,
}

/// Bounds of the storage's time of day at the base, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interval {
    earliest: i64,
    latest: i64,
}

impl Default for StorageClock {
    fn default() -> Self {
        Self {
            base: Instant::now(),
            known: Mutex::default(),
        }
    }
}

impl StorageClock {
    /// Learns from a response with this `Date`, to a request sent at `sent` and answered at `received`.
    pub fn learn(&self, date: SystemTime, sent: Instant, received: Instant) {
        let took = received.saturating_duration_since(sent);
        let Some(date) = millis(date).filter(|_| took <= RESPONSE_TIME_MAX) else {
            return;
        };
        let stated = Interval {
            earliest: date.saturating_sub(self.since_base(received)).saturating_sub(1),
            latest: date
                .saturating_add(1000)
                .saturating_sub(self.since_base(sent))
                .saturating_add(1),
        };
        let mut known = self.known.lock();
        let narrowed = known.map(|known| Interval {
            earliest: known.earliest.max(stated.earliest),
            latest: known.latest.min(stated.latest),
        });
        *known = Some(
            narrowed
                .filter(|narrowed| narrowed.earliest <= narrowed.latest)
                .unwrap_or(stated),
        );
    }

    /// The storage's time at `at` in seconds since 1970, or earlier by less than two seconds.
    pub fn earliest(&self, at: Instant) -> Option<u64> {
        let known = (*self.known.lock())?;
        let millis = known.earliest.saturating_add(self.since_base(at));
        u64::try_from(millis.div_euclid(1000)).ok()
    }

    /// The storage's time at `at` in seconds since 1970, or later by as much as the precision allows.
    pub fn latest(&self, at: Instant) -> Option<u64> {
        let known = (*self.known.lock())?;
        let millis = known.latest.saturating_add(self.since_base(at));
        u64::try_from(millis.saturating_add(999).div_euclid(1000)).ok()
    }

    /// The difference at `at` between the storage's time and `own`, the time of day of another clock, or less by as much as
    /// the precision allows.
    pub fn difference(&self, own: SystemTime, at: Instant) -> Option<Duration> {
        let (known, own) = ((*self.known.lock())?, millis(own)?);
        let since = self.since_base(at);
        let behind = known.earliest.saturating_add(since).saturating_sub(own);
        let ahead = own.saturating_sub(known.latest.saturating_add(since));
        Some(Duration::from_millis(behind.max(ahead).max(0).unsigned_abs()))
    }

    /// Milliseconds from the base to `at`, negative before it.
    fn since_base(&self, at: Instant) -> i64 {
        let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        match at.checked_duration_since(self.base) {
            Some(since) => millis(since),
            None => -millis(self.base.saturating_duration_since(at)),
        }
    }
}

fn millis(time: SystemTime) -> Option<i64> {
    let since = time.duration_since(UNIX_EPOCH).ok()?;
    // A date beyond the year 9999 is none, and leaves room for sums.
    i64::try_from(since.as_millis())
        .ok()
        .filter(|millis| *millis < 253_402_300_800_000)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use proptest::prelude::*;

    use super::*;

    fn date(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn nothing_is_known_before_a_response() {
        let clock = StorageClock::default();
        assert_eq!(
            (clock.earliest(clock.base), clock.latest(clock.base)),
            (None, None)
        );
        clock.learn(date(1000), clock.base, clock.base + Duration::from_secs(11));
        assert_eq!(clock.earliest(clock.base), None, "the response took too long");
    }

    #[test]
    fn responses_narrow_the_interval() {
        let clock = StorageClock::default();
        let at = |millis| clock.base + Duration::from_millis(millis);
        // The storage's time at the base is 1000.9.
        clock.learn(date(1000), at(0), at(50));
        assert_eq!(
            (clock.earliest(at(0)), clock.latest(at(0))),
            (Some(999), Some(1002))
        );
        clock.learn(date(1001), at(120), at(140));
        assert_eq!(
            (clock.earliest(at(0)), clock.latest(at(0))),
            (Some(1000), Some(1002))
        );
        assert_eq!(clock.earliest(at(3_600_000)), Some(4600));
    }

    #[test]
    fn clock_that_was_set_is_believed_again() {
        let clock = StorageClock::default();
        let at = clock.base + Duration::from_secs(1);
        for now in [1000, 5000, 900] {
            clock.learn(date(now), at, at);
            assert_eq!(clock.latest(at), Some(now + 2), "{now}");
            assert_eq!(clock.earliest(at), Some(now - 1), "{now}");
        }
    }

    #[test]
    fn difference_to_another_clock_is_what_is_certain() {
        let clock = StorageClock::default();
        let at = clock.base + Duration::from_secs(7);
        assert_eq!(clock.difference(date(1000), at), None);
        clock.learn(date(1000), clock.base, clock.base);
        for (own, seconds) in [(1007, 0), (1008, 0), (1028, 19), (987, 19), (0, 1006)] {
            let difference = clock.difference(date(own), at).unwrap();
            assert_eq!(difference.as_secs(), seconds, "{own}");
        }
    }

    proptest! {
        /// Whatever the delays, the bounds hold.
        #[test]
        fn bounds_hold(start in 0_u64..2_000_000, steps in proptest::collection::vec((0_u64..20_000, 0_u64..3000, 0_u64..3000), 1..20)) {
            let clock = StorageClock::default();
            let origin = 1_700_000_000_000 + start;
            let mut now = 0;
            for (pause, there, back) in steps {
                let sent = now + pause;
                let answered = origin + sent + there;
                now = sent + there + back;
                let instant = |millis| clock.base + Duration::from_millis(millis);
                clock.learn(date(answered / 1000), instant(sent), instant(now));
                let truth = origin + now;
                prop_assert!(clock.earliest(instant(now)).unwrap() * 1000 <= truth);
                prop_assert!(clock.latest(instant(now)).unwrap() * 1000 >= truth);
            }
        }
    }
}
