//! Age checks that tolerate a clock which was set back.
//!
//! A time in the future was recorded before the clock was set back, so its age is unknown. If a revalidation is
//! possible, such a time counts as too old ([`is_within`]). In an outage no revalidation is possible, and a grant from
//! minutes ago should not be lost. So a time at most [`AHEAD_MAX`] in the future counts as now
//! ([`is_within_or_ahead`]). This extends a lifetime by as much as the clock was set back, and by no more.

use std::time::{Duration, SystemTime};

/// In an outage, a recorded time that is at most this far in the future still counts.
pub const AHEAD_MAX: Duration = Duration::from_secs(3600);

/// Whether `at` is less than `lifetime` ago. A time in the future is not.
pub fn is_within(at: SystemTime, lifetime: Duration, now: SystemTime) -> bool {
    now.duration_since(at).is_ok_and(|age| age < lifetime)
}

/// Whether `at` is less than `lifetime` ago, where a time at most [`AHEAD_MAX`] ahead counts as now.
pub fn is_within_or_ahead(at: SystemTime, lifetime: Duration, now: SystemTime) -> bool {
    match now.duration_since(at) {
        Ok(age) => age < lifetime,
        Err(ahead) => ahead.duration() <= AHEAD_MAX && !lifetime.is_zero(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t17_future_time_counts_only_without_revalidation() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10_000_000);
        let second = Duration::from_secs(1);
        let lifetime = 300 * second;
        for (at, revalidated, in_outage) in [
            (now, true, true),
            (now - 299 * second, true, true),
            (now - lifetime, false, false),
            (now + second, false, true),
            (now + AHEAD_MAX, false, true),
            (now + AHEAD_MAX + second, false, false),
        ] {
            assert_eq!(is_within(at, lifetime, now), revalidated, "{at:?}");
            assert_eq!(is_within_or_ahead(at, lifetime, now), in_outage, "{at:?}");
            assert!(!is_within(at, Duration::ZERO, now) && !is_within_or_ahead(at, Duration::ZERO, now));
        }
    }
}
