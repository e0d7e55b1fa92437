//! Cap of requests to the bucket per second. Pure; time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// Requests of one process to the bucket per second. Storages charge for each.
pub(super) const REQUESTS_PER_SECOND_MAX: u32 = 200;

/// Token bucket that holds the requests of one second.
#[derive(Debug)]
pub(super) struct Rate {
    /// When it was full, or will be.
    full_at: Instant,
}

impl Rate {
    pub(super) fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// Takes one request. `false`: the cap is reached.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let one = Duration::from_secs(1) / REQUESTS_PER_SECOND_MAX;
        let full_at = self.full_at.max(now) + one;
        if full_at.saturating_duration_since(now) > Duration::from_secs(1) {
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
