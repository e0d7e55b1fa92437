//! Ages against lifetimes, where the clock may have been set back.
//!
//! A moment that lies in the future was written before the clock was set back, and its age is not known. Where a request
//! to the upstream can find out, it counts as too old ([`is_within`]). Where nothing can be asked, in an outage, refusing
//! what was granted minutes ago helps nobody, so a moment at most [`AHEAD_MAX`] ahead counts as now
//! ([`is_within_or_ahead`]). A lifetime is longer then by as much as the clock was set back, and by no more than that.

use std::time::{Duration, SystemTime};

/// How far in the future a moment may lie and still count in an outage.
pub const AHEAD_MAX: Duration = Duration::from_secs(3600);

/// Whether `at` is less than `lifetime` ago. A moment in the future is not.
pub fn is_within(at: SystemTime, lifetime: Duration, now: SystemTime) -> bool {
    now.duration_since(at).is_ok_and(|age| age < lifetime)
}

/// Whether `at` is less than `lifetime` ago, where a moment at most [`AHEAD_MAX`] ahead counts as now.
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
    fn t17_a_moment_ahead_counts_only_where_nothing_can_be_asked() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10_000_000);
        let second = Duration::from_secs(1);
        let lifetime = 300 * second;
        for (at, asked, unasked) in [
            (now, true, true),
            (now - 299 * second, true, true),
            (now - lifetime, false, false),
            (now + second, false, true),
            (now + AHEAD_MAX, false, true),
            (now + AHEAD_MAX + second, false, false),
        ] {
            assert_eq!(is_within(at, lifetime, now), asked, "{at:?}");
            assert_eq!(is_within_or_ahead(at, lifetime, now), unasked, "{at:?}");
            assert!(!is_within(at, Duration::ZERO, now) && !is_within_or_ahead(at, Duration::ZERO, now));
        }
    }
}
