//! Deadline of a request with a cached copy, which waits for other caches move.

use std::pin::pin;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

/// Share of the time of a request that its waits for other caches take at most, as a divisor.
const PAUSE_SHARE: u32 = 3;

/// A shorter wait for another cache is none: the create of a claim alone may take as long.
const PAUSE_MIN: Duration = Duration::from_millis(300);

/// The time at which a cached copy is served instead of a response of the upstream. A wait for another cache that requests
/// the manifest is not counted: otherwise it would be the reason that an earlier image is served although the upstream
/// responds.
pub(super) struct Deadline(Mutex<State>);

struct State {
    at: Instant,
    /// How much later it may become.
    left: Duration,
}

impl Deadline {
    pub(super) fn new(began: Instant, within: Duration) -> Self {
        Self(Mutex::new(State {
            at: began + within,
            left: within / PAUSE_SHARE,
        }))
    }

    pub(super) fn at(&self) -> Instant {
        self.0.lock().at
    }

    /// The output of `work`, which may move the deadline, or `None` after it.
    pub(super) async fn run<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        loop {
            let at = self.at();
            match timeout_at(at, work.as_mut()).await {
                Ok(output) => return Some(output),
                Err(_) if self.at() > at => {}
                Err(_) => return None,
            }
        }
    }

    /// Moves it by the longest wait for another cache of a request that has so much time, and returns this wait.
    pub(super) fn allow_pause(&self, within: Duration) -> Duration {
        let mut state = self.0.lock();
        let max = state.left.min(within / PAUSE_SHARE);
        let max = if max < PAUSE_MIN { Duration::ZERO } else { max };
        state.at += max;
        state.left = state.left.saturating_sub(max);
        max
    }

    /// Takes the rest of an allowed wait back.
    pub(super) fn end_pause(&self, allowed: Duration, paused: Duration) {
        let rest = allowed.saturating_sub(paused);
        let mut state = self.0.lock();
        state.at = state.at.checked_sub(rest).unwrap_or(state.at);
        state.left += rest;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn work_that_waits_for_another_cache_has_longer() {
        let (began, within) = (Instant::now(), 3 * SECOND);
        let deadline = Deadline::new(began, within);
        let work = async {
            let allowed = deadline.allow_pause(within);
            sleep(within + allowed / 2).await;
            deadline.end_pause(allowed, allowed / 2);
            // The rest of the wait is left for another manifest, and ends with it.
            assert_eq!(deadline.allow_pause(within), allowed / 2);
        };
        assert_eq!(deadline.run(work).await, Some(()));
        assert_eq!(deadline.allow_pause(within), Duration::ZERO);
        let never = deadline.run(std::future::pending::<()>());
        assert_eq!(never.await, None);
        assert_eq!(began.elapsed(), within + SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn short_time_has_no_room_for_a_wait() {
        let deadline = Deadline::new(Instant::now(), 2 * PAUSE_MIN);
        assert_eq!(deadline.allow_pause(2 * PAUSE_MIN), Duration::ZERO);
        let deadline = Deadline::new(Instant::now(), 9 * PAUSE_MIN);
        assert_eq!(deadline.allow_pause(PAUSE_MIN), Duration::ZERO);
    }
}
