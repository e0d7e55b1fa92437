//! Injectable wall clock.
//!
//! Decisions take `now` as an argument. For effects after the response (a late revalidation, a finished
//! download), the proxy reads this clock.

use std::time::SystemTime;

/// A source of the wall-clock time.
#[derive(Clone, Copy, Debug)]
pub struct Clock(fn() -> SystemTime);

impl Clock {
    /// The system clock.
    #[expect(
        clippy::disallowed_methods,
        reason = "the only place that reads the system clock"
    )]
    pub fn system() -> Self {
        Self(SystemTime::now)
    }

    /// A clock that calls `read`, for tests.
    pub fn from_fn(read: fn() -> SystemTime) -> Self {
        Self(read)
    }

    /// The current time.
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}
