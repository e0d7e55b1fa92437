//! Timestamps of log lines (RFC 3339, in microseconds).

use std::cell::RefCell;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

/// Formats the time of a log line.
#[derive(Clone, Copy, Debug)]
pub struct LogTime {
    /// The time of day.
    pub now: fn() -> SystemTime,
}

thread_local! {
    /// The last second that this thread formatted, and its text up to the fraction.
    static LAST: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
}

impl FormatTime for LogTime {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        // No clock is before 1970 and writes a log.
        let at = (self.now)().duration_since(UNIX_EPOCH).unwrap_or_default();
        LAST.with_borrow_mut(|(second, text)| {
            if *second != at.as_secs() || text.is_empty() {
                let start = UNIX_EPOCH + Duration::from_secs(at.as_secs());
                *text = humantime::format_rfc3339_seconds(start).to_string();
                text.truncate(text.trim_end_matches('Z').len());
                *second = at.as_secs();
            }
            writer.write_str(text)
        })?;
        write!(writer, ".{:06}Z", at.subsec_micros())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn text(now: fn() -> SystemTime) -> String {
        let mut text = String::new();
        LogTime { now }.format_time(&mut Writer::new(&mut text)).unwrap();
        text
    }

    fn at(second: u64, micros: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(second) + Duration::from_micros(micros)
    }

    #[test]
    fn each_time_is_formatted_in_full() {
        let expect = |now: fn() -> SystemTime, expected: &str| assert_eq!(text(now), expected);
        expect(|| UNIX_EPOCH, "1970-01-01T00:00:00.000000Z");
        expect(|| at(1_800_000_000, 1), "2027-01-15T08:00:00.000001Z");
        expect(|| at(1_800_000_000, 999_999), "2027-01-15T08:00:00.999999Z");
        expect(|| at(1_800_000_001, 0), "2027-01-15T08:00:01.000000Z");
    }
}
