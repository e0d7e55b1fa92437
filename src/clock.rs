//! The time of day, let in at one place.
//!
//! Judgement takes `now` as an argument. Where an effect happens after its request was answered (a late `HEAD`, a
//! finished download), the road reads this clock.

use std::time::SystemTime;

/// A source of the time of day.
#[derive(Clone, Copy, Debug)]
pub struct Clock(fn() -> SystemTime);

impl Clock {
    /// The machine's own clock.
    #[expect(clippy::disallowed_methods, reason = "the one place where the clock is read")]
    pub fn system() -> Self {
        Self(SystemTime::now)
    }

    /// A clock of one's own, for tests.
    pub fn from_fn(read: fn() -> SystemTime) -> Self {
        Self(read)
    }

    /// The time now.
    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}
