//! Injectable wall clock.
//!
//! Decisions do not read it: they take `now`, the time of the request, as an argument. For what happens after the
//! response (a late revalidation, a finished download), the proxy reads this clock again.

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
