//! Rate-limit window: a pause after a limited request, then a slow start.
//!
//! While a window is closed, no request is sent. When the pause ends, one request is sent first. Each response that
//! is not limited allows one more concurrent request, so that queued requests do not all meet the same limit again. A
//! limited response closes the window again. In a burst of limited responses only the first counts, because the
//! others were sent before the pause.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::oci::failure::UpstreamFailure;

/// The first pause if the upstream states none. It doubles while responses stay limited.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// The longest pause if the upstream states none.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A shorter pause that an upstream states is extended to this.
const STATED_MIN: Duration = Duration::from_millis(100);
/// A longer pause that an upstream states is cut to this.
const STATED_MAX: Duration = Duration::from_secs(3600);
/// The longest pause for a 503, whose `Retry-After` only estimates when the service recovers.
const STATED_503_MAX: Duration = Duration::from_secs(60);
/// Concurrent requests at which the slow start ends.
const SLOW_START_MAX: u32 = 16;
/// Polling interval of a waiting request, in case a notification went to a request that was then cancelled.
const RECHECK: Duration = Duration::from_secs(1);

/// Window of one key.
#[derive(Debug)]
pub(super) struct Window {
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug)]
struct State {
    closed_until: Instant,
    /// A rate limit, or a 503.
    cause: UpstreamFailure,
    /// Number of pauses so far. Identifies responses to requests sent before the last pause.
    round: u64,
    /// Consecutive pauses without an unlimited response.
    limited: u32,
    /// Maximum number of concurrent requests; `None`: unlimited.
    concurrency_max: Option<u32>,
    /// Requests of this round in flight.
    in_flight: u32,
}

/// A pause: the window permits no request now.
#[derive(Clone, Debug)]
pub struct Pause {
    window: Arc<Window>,
    cause: UpstreamFailure,
    until: Instant,
}

/// Permit for one request. If dropped without a result, it does not change the limit.
#[derive(Debug)]
pub(in crate::upstream) struct SendPermit {
    window: Option<Arc<Window>>,
    round: u64,
}

impl PartialEq for Pause {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.window, &other.window) && self.until == other.until
    }
}

impl Eq for Pause {}

impl Pause {
    /// What closed the window.
    pub(in crate::upstream) fn cause(&self) -> UpstreamFailure {
        self.cause
    }

    /// Remaining time. At least a moment, because the end of a slow start is unknown.
    pub(in crate::upstream) fn left(&self, now: Instant) -> Duration {
        self.until.saturating_duration_since(now).max(STATED_MIN)
    }

    /// Waits until the window may permit a request. `false` if that is after `deadline`.
    pub(in crate::upstream) async fn wait_until_open(&self, deadline: Instant) -> bool {
        loop {
            let freed = self.window.freed.notified();
            tokio::pin!(freed);
            // Registered before the check, so that no notification is missed.
            freed.as_mut().enable();
            let now = Instant::now();
            let again = match self.window.state.lock().is_open(now) {
                Ok(()) => return true,
                Err(until) if until > deadline => return false,
                Err(until) if until > now => until,
                Err(_) => now + RECHECK,
            };
            if now >= deadline {
                return false;
            }
            // Whether it timed out or was notified, check again.
            let _ = timeout_at(again.min(deadline), freed).await;
        }
    }
}

impl SendPermit {
    /// Permit for a key without a window.
    pub(super) fn unlimited() -> SendPermit {
        SendPermit {
            window: None,
            round: 0,
        }
    }

    /// The response was not limited.
    pub(in crate::upstream) fn not_limited(mut self) {
        if let Some(window) = self.window.take() {
            window.state.lock().end(self.round, true);
            // One for the freed slot, one for the additional slot.
            window.freed.notify_one();
            window.freed.notify_one();
        }
    }

    /// The response was limited, or a 503 that states a wait. `window` must be that of this permit's key.
    pub(super) fn limited(
        mut self,
        window: &Arc<Window>,
        cause: UpstreamFailure,
        stated: Option<Duration>,
    ) -> Pause {
        self.window = None;
        let now = Instant::now();
        let mut state = window.state.lock();
        state.close(self.round, cause, stated, now);
        Pause {
            window: Arc::clone(window),
            cause: state.cause,
            until: state.closed_until,
        }
    }
}

impl Drop for SendPermit {
    fn drop(&mut self) {
        if let Some(window) = self.window.take() {
            window.state.lock().end(self.round, false);
            window.freed.notify_one();
        }
    }
}

impl Window {
    pub(super) fn new(now: Instant) -> Window {
        let state = State {
            closed_until: now,
            cause: UpstreamFailure::RateLimited,
            round: 0,
            limited: 0,
            concurrency_max: None,
            in_flight: 0,
        };
        Window {
            state: Mutex::new(state),
            freed: Notify::new(),
        }
    }

    /// Permits a request, or returns the pause.
    pub(super) fn admit(self: &Arc<Self>, now: Instant) -> Result<SendPermit, Pause> {
        let mut state = self.state.lock();
        match state.is_open(now) {
            Ok(()) => {
                state.in_flight = state.in_flight.saturating_add(1);
                Ok(SendPermit {
                    window: Some(Arc::clone(self)),
                    round: state.round,
                })
            }
            Err(until) => Err(Pause {
                window: Arc::clone(self),
                cause: state.cause,
                until,
            }),
        }
    }

    /// The pause, if the window is closed; `None` during a slow start.
    pub(super) fn current_pause(self: &Arc<Self>, now: Instant) -> Option<Pause> {
        let state = self.state.lock();
        (state.closed_until > now).then(|| Pause {
            window: Arc::clone(self),
            cause: state.cause,
            until: state.closed_until,
        })
    }
}

impl State {
    /// `Err`: when to retry; the current time if the maximum of concurrent requests is reached.
    fn is_open(&self, now: Instant) -> Result<(), Instant> {
        if self.closed_until > now {
            return Err(self.closed_until);
        }
        if self
            .concurrency_max
            .is_some_and(|concurrency_max| self.in_flight >= concurrency_max)
        {
            return Err(now);
        }
        Ok(())
    }

    fn end(&mut self, round: u64, passed: bool) {
        if round != self.round {
            return;
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        if passed {
            self.limited = 0;
            self.concurrency_max = self
                .concurrency_max
                .map(|concurrency_max| concurrency_max + 1)
                .filter(|concurrency_max| *concurrency_max <= SLOW_START_MAX);
        }
    }

    fn close(&mut self, round: u64, cause: UpstreamFailure, stated: Option<Duration>, now: Instant) {
        if round == self.round {
            self.round += 1;
            self.limited = self.limited.saturating_add(1);
            (self.concurrency_max, self.in_flight) = (Some(1), 0);
            self.cause = cause;
            self.closed_until = now + pause(cause, stated, self.limited);
        } else if stated.is_some() {
            self.closed_until = self.closed_until.max(now + pause(cause, stated, 1));
        }
    }
}

/// Length of the `nth` consecutive pause. If a stated wait proves too short, the pause is doubled.
fn pause(cause: UpstreamFailure, stated: Option<Duration>, nth: u32) -> Duration {
    let doubled = |times: u32| {
        PAUSE_MIN
            .saturating_mul(2_u32.saturating_pow(times.min(16)))
            .min(PAUSE_MAX)
    };
    let stated_max = if cause == UpstreamFailure::RateLimited {
        STATED_MAX
    } else {
        STATED_503_MAX
    };
    match (stated, nth) {
        (None, nth) => doubled(nth.saturating_sub(1)),
        (Some(stated), 0 | 1) => stated.clamp(STATED_MIN, stated_max),
        (Some(stated), nth) => stated
            .clamp(STATED_MIN, stated_max)
            .max(doubled(nth.saturating_sub(2))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn limited(window: &Arc<Window>, permit: SendPermit, stated: Option<Duration>) -> Duration {
        let pause = permit.limited(window, UpstreamFailure::RateLimited, stated);
        pause.left(Instant::now())
    }

    #[tokio::test(start_paused = true)]
    async fn r02_pauses_double_while_limited_up_to_a_cap() {
        let window = Arc::new(Window::new(Instant::now()));
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            let permit = window.admit(Instant::now()).unwrap();
            assert_eq!(limited(&window, permit, None), Duration::from_secs(seconds));
            assert!(window.admit(Instant::now()).is_err());
            tokio::time::advance(Duration::from_secs(seconds)).await;
        }
        window.admit(Instant::now()).unwrap().not_limited();
        let permit = window.admit(Instant::now()).unwrap();
        assert_eq!(
            limited(&window, permit, None),
            Duration::from_secs(1),
            "begun anew"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn r02_burst_of_limits_is_one_pause() {
        let window = Arc::new(Window::new(Instant::now()));
        let permits: Vec<_> = (0..20).map(|_| window.admit(Instant::now()).unwrap()).collect();
        for permit in permits {
            assert_eq!(limited(&window, permit, None), Duration::from_secs(1));
        }
    }

    #[test]
    fn r02_stated_waits_are_clamped_and_doubled_if_too_short() {
        let (ms, limit) = (Duration::from_millis, UpstreamFailure::RateLimited);
        for (cause, stated, nth, wait) in [
            (limit, ms(0), 1, ms(100)),
            (limit, ms(500), 1, ms(500)),
            (limit, Duration::MAX, 1, ms(3_600_000)),
            (limit, Duration::from_secs(315_360_000), 1, ms(3_600_000)),
            (limit, ms(0), 2, ms(1000)),
            (limit, ms(0), 3, ms(2000)),
            (limit, ms(0), 60, ms(30_000)),
            (limit, ms(90_000), 3, ms(90_000)),
            (UpstreamFailure::Status(503), ms(5000), 1, ms(5000)),
            (UpstreamFailure::Status(503), Duration::MAX, 1, ms(60_000)),
        ] {
            assert_eq!(
                pause(cause, Some(stated), nth),
                wait,
                "{cause:?} {stated:?} {nth}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn r02_slow_start_after_a_pause() {
        let window = Arc::new(Window::new(Instant::now()));
        let permit = window.admit(Instant::now()).unwrap();
        limited(&window, permit, None);
        tokio::time::advance(Duration::from_secs(1)).await;
        let free = || std::iter::from_fn(|| window.admit(Instant::now()).ok()).collect::<Vec<_>>();
        for expected in [1, 2, 4, 8, 16] {
            let permits = free();
            assert_eq!(permits.len(), expected);
            permits.into_iter().for_each(SendPermit::not_limited);
        }
        let open: Vec<_> = (0..100).map(|_| window.admit(Instant::now())).collect();
        assert!(open.iter().all(Result::is_ok), "the slow start is over");
    }

    #[tokio::test(start_paused = true)]
    async fn r02_cancelled_request_frees_its_slot() {
        let window = Arc::new(Window::new(Instant::now()));
        let permit = window.admit(Instant::now()).unwrap();
        limited(&window, permit, None);
        let waiting = |window: &Arc<Window>| window.admit(Instant::now()).unwrap_err();
        assert!(
            !waiting(&window).wait_until_open(Instant::now()).await,
            "the deadline has passed"
        );
        let deadline = Instant::now() + Duration::from_secs(20);
        assert!(waiting(&window).wait_until_open(deadline).await);
        let first = window.admit(Instant::now()).unwrap();
        let second = waiting(&window);
        let second = tokio::spawn(async move { second.wait_until_open(deadline).await });
        tokio::task::yield_now().await;
        drop(first);
        assert!(second.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn r02_pause_beyond_deadline_is_not_waited_for() {
        let window = Arc::new(Window::new(Instant::now()));
        let permit = window.admit(Instant::now()).unwrap();
        let pause = permit.limited(
            &window,
            UpstreamFailure::RateLimited,
            Some(Duration::from_secs(30)),
        );
        let began = Instant::now();
        assert!(!pause.wait_until_open(began + Duration::from_secs(20)).await);
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
