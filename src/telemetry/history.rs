//! History of the totals, one entry per minute for a day, for the plots on the page. Does not replace Prometheus.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

/// The minutes of a day, and one before as the baseline.
const MINUTES_MAX: usize = 24 * 60 + 1;

const MINUTE: Duration = Duration::from_secs(60);

/// Totals since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pulls by tag.
    pub pulls: u64,
    /// Those served from the store.
    pub hits: u64,
    /// Those served from the store while the upstream was unavailable.
    pub stale: u64,
    /// Those denied.
    pub refused: u64,
    /// Blob bytes sent to clients.
    pub sent_bytes: u64,
    /// Blob bytes fetched from upstreams.
    pub fetched_bytes: u64,
}

impl Totals {
    /// The difference to `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            pulls: self.pulls.saturating_sub(before.pulls),
            hits: self.hits.saturating_sub(before.hits),
            stale: self.stale.saturating_sub(before.stale),
            refused: self.refused.saturating_sub(before.refused),
            sent_bytes: self.sent_bytes.saturating_sub(before.sent_bytes),
            fetched_bytes: self.fetched_bytes.saturating_sub(before.fetched_bytes),
        }
    }

    /// Bytes sent to clients that were not fetched from an upstream.
    pub fn saved_bytes(&self) -> u64 {
        self.sent_bytes.saturating_sub(self.fetched_bytes)
    }

    /// The share of bytes sent to clients that was not fetched from an upstream. `None` if none were sent.
    pub fn byte_hit_ratio(&self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "a ratio for display")]
        let ratio = |saved: u64, sent: u64| saved as f64 / sent as f64;
        (self.sent_bytes > 0).then(|| ratio(self.saved_bytes(), self.sent_bytes))
    }
}

/// The totals at the end of a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Minute {
    /// Minutes since 1970.
    number: u64,
    totals: Totals,
}

/// The totals of the last day.
#[derive(Default)]
pub(super) struct History(Mutex<VecDeque<Minute>>);

impl History {
    /// Records the current totals. Call this several times a minute.
    pub(super) fn record(&self, now: SystemTime, totals: Totals) {
        let number = minute_of(now);
        let mut minutes = self.0.lock();
        match minutes.back_mut() {
            Some(last) if last.number >= number => last.totals = totals,
            _ => {
                if minutes.len() >= MINUTES_MAX {
                    minutes.pop_front();
                }
                minutes.push_back(Minute { number, totals });
            }
        }
    }

    /// The totals of each of the last `count` intervals of `minutes` minutes, oldest first. The last one ends now.
    pub(super) fn spans(&self, now: SystemTime, count: u64, minutes: u64, totals: Totals) -> Vec<Totals> {
        let known = self.0.lock();
        // Events between two records count for the minute of the later one.
        let upto = |number: u64| {
            let before = known.iter().rev().find(|minute| minute.number <= number);
            before.map(|minute| minute.totals).unwrap_or_default()
        };
        let last = minute_of(now);
        let mut spans = Vec::new();
        for back in (0..count).rev() {
            let end = last.saturating_sub(back * minutes);
            let until = if back == 0 { totals } else { upto(end) };
            spans.push(until.since(&upto(end.saturating_sub(minutes))));
        }
        spans
    }
}

fn minute_of(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_secs() / MINUTE.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(pulls: u64) -> Totals {
        Totals {
            pulls,
            ..Totals::default()
        }
    }

    #[test]
    fn history_interval_has_its_totals() {
        let (history, minute) = (History::default(), |n: u64| {
            SystemTime::UNIX_EPOCH + MINUTE * u32::try_from(n).unwrap_or(0)
        });
        for (at, count) in [(100, 5), (101, 5), (102, 9)] {
            history.record(minute(at), totals(count));
        }
        let spans = |count, minutes| {
            let spans = history.spans(minute(102), count, minutes, totals(10));
            spans.iter().map(|span| span.pulls).collect::<Vec<_>>()
        };
        assert_eq!(spans(4, 1), [0, 5, 0, 5]);
        assert_eq!(spans(2, 2), [5, 5]);
    }

    #[test]
    fn history_keeps_a_day_despite_clock_set_back() {
        let history = History::default();
        for number in 0..3_000 {
            history.record(SystemTime::UNIX_EPOCH + MINUTE * number, totals(1));
        }
        history.record(SystemTime::UNIX_EPOCH, totals(2));
        let recorded = history.0.lock();
        assert_eq!(recorded.len(), MINUTES_MAX);
        assert_eq!(recorded.back().map(|last| last.number), Some(2_999));
    }

    #[test]
    fn unused_prefetch_saves_no_bytes() {
        let wasted = Totals {
            sent_bytes: 10,
            fetched_bytes: 30,
            ..Totals::default()
        };
        assert_eq!((wasted.saved_bytes(), wasted.byte_hit_ratio()), (0, Some(0.0)));
        assert_eq!(Totals::default().byte_hit_ratio(), None);
    }
}
