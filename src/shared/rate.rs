//! Cap of requests to the bucket per second. Pure; time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// Requests of one process to the bucket per second. Storages charge for each.
pub(super) const REQUESTS_PER_SECOND_MAX: u32 = 200;

/// Token bucket that holds the requests of one second, or another burst.
#[derive(Debug)]
pub(super) struct Rate {
    /// When it was full, or will be.
    full_at: Instant,
    per_second: u32,
    burst: u32,
}

impl Rate {
    pub(super) fn new(now: Instant) -> Self {
        Self::of(REQUESTS_PER_SECOND_MAX, REQUESTS_PER_SECOND_MAX, now)
    }

    /// A cap of `per_second`, which must not be 0, after a burst of so many.
    pub(super) fn of(per_second: u32, burst: u32, now: Instant) -> Self {
        Self {
            full_at: now,
            per_second,
            burst,
        }
    }

    /// Takes one request. `false`: the cap is reached.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let one = Duration::from_secs(1) / self.per_second;
        let full_at = self.full_at.max(now) + one;
        if full_at.saturating_duration_since(now) > one * self.burst {
            return false;
        }
        self.full_at = full_at;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_beyond_the_cap_are_refused() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        let taken = (0..1000).filter(|_| rate.take(start)).count();
        assert_eq!(taken, 200);
        let later = start + Duration::from_millis(500);
        let taken = (0..1000).filter(|_| rate.take(later)).count();
        assert_eq!(taken, 100, "half a second later, half as many");
    }
}
