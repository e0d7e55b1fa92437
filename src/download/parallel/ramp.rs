//! Ramp of a transfer: when a connection is added.

use std::time::Duration;

use tokio::time::Instant;

/// Time over which the throughput is measured before a connection is added.
pub(super) const MEASURE_WINDOW: Duration = Duration::from_millis(250);

/// The last connection must have brought this part of what it would bring if each were limited alone.
const GAIN_MIN: f64 = 0.4;

/// Windows in a row that show no gain: a single one may fall into a pause of the machine, and the segment of the last
/// connection lasts longer than one.
const NO_GAIN_WINDOWS: u32 = 2;

/// Pause after a connection that gained nothing, doubled each time. Where the limit is shared, a connection costs less than
/// 80 ms: a round trip and the bytes under way when a stream is closed.
const REST: Duration = Duration::from_secs(8);
const RESTS_DOUBLED_MAX: u32 = 8;

/// If the writer needs more than this part of a window, the disk limits the throughput, and the window shows nothing.
const DISK_SHARE_MAX: f64 = 0.5;

/// When a connection is added.
#[derive(Default)]
pub(super) struct Ramp {
    window: Option<Window>,
    /// Bytes per second in the last window that counted.
    rate: f64,
    /// Bytes per second of the first stream alone.
    pub(super) first_rate: f64,
    pub(super) is_first_stream_open: bool,
    /// Connections since one was added to compare, and whether that one gains is not known yet.
    compared: Option<usize>,
    /// Windows in a row with the same result, if that is not acted on at once.
    repeated: u32,
    /// After a connection that gained nothing, none is added until then.
    rests_until: Option<Instant>,
    /// Number of these rests.
    rests: u32,
    /// Bytes per second and connections when the first of these rests began.
    rejected: Option<(f64, usize)>,
    /// No further connection is possible.
    pub(super) is_settled: bool,
}

#[derive(Clone, Copy)]
struct Window {
    since: Instant,
    received: u64,
    stalled: Duration,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Measured {
    /// The window has not ended, or no further connection is added.
    Nothing,
    /// The last connection raised the throughput.
    Gain,
    /// It did not.
    NoGain,
}

impl Ramp {
    /// Begins a new window, because a connection has not sent anything yet, or clients open connections.
    pub(super) fn restart(&mut self) {
        self.window = None;
    }

    /// A connection was added to those before.
    pub(super) fn added(&mut self, connections: usize) {
        self.compared = Some(connections);
        self.repeated = 0;
    }

    pub(super) fn measure(
        &mut self,
        now: Instant,
        received: u64,
        stalled: Duration,
        connections: usize,
    ) -> Measured {
        if self.is_settled {
            return Measured::Nothing;
        }
        let window = *self.window.get_or_insert(Window {
            since: now,
            received,
            stalled,
        });
        let elapsed = now.saturating_duration_since(window.since);
        if elapsed < MEASURE_WINDOW {
            return Measured::Nothing;
        }
        self.window = None;
        let stalled = stalled.saturating_sub(window.stalled);
        if stalled.as_secs_f64() > DISK_SHARE_MAX * elapsed.as_secs_f64() {
            return Measured::Nothing;
        }
        let rate = rate(received.saturating_sub(window.received), elapsed);
        if connections == 1 && self.is_first_stream_open {
            self.first_rate = rate;
        }
        if self.is_resting(now, rate, connections) {
            return Measured::Nothing;
        }
        // A connection that has ended since leaves nothing to compare with.
        let is_compared = self.compared == Some(connections);
        if !is_compared || rate >= self.rate * gain_min(connections) {
            (self.compared, self.repeated, self.rate) = (None, 0, rate);
            return Measured::Gain;
        }
        if !self.is_repeated() {
            return Measured::Nothing;
        }
        self.rest(now, rate, connections);
        Measured::NoGain
    }

    /// Whether no connection is added because the last one gained nothing. If the throughput was higher with it than it is
    /// without, the rate before was that of a burst, and the first rest ends.
    fn is_resting(&mut self, now: Instant, rate: f64, connections: usize) -> bool {
        if self.rests_until.is_none_or(|until| now >= until) {
            self.rests_until = None;
            return false;
        }
        let was_faster = |(before, with)| connections < with && rate * gain_min(with) <= before;
        if !self.rejected.is_some_and(was_faster) {
            self.repeated = 0;
            return true;
        }
        if !self.is_repeated() {
            return true;
        }
        (self.rests_until, self.rejected) = (None, None);
        false
    }

    fn rest(&mut self, now: Instant, rate: f64, connections: usize) {
        self.rejected = (self.rests == 0).then_some((rate, connections));
        self.rests_until = Some(now + REST * 2_u32.saturating_pow(self.rests.min(RESTS_DOUBLED_MAX)));
        self.rests += 1;
        self.compared = None;
    }

    /// Counts a window. Returns whether as many as needed had the same result.
    fn is_repeated(&mut self) -> bool {
        self.repeated += 1;
        let is_repeated = self.repeated >= NO_GAIN_WINDOWS;
        if is_repeated {
            self.repeated = 0;
        }
        is_repeated
    }
}

/// The least factor by which the last of `connections` must raise the throughput. Were each limited alone, it would add
/// 1/(n-1) to the rate before it.
fn gain_min(connections: usize) -> f64 {
    let others = u32::try_from(connections)
        .unwrap_or(u32::MAX)
        .saturating_sub(1)
        .max(1);
    1.0 + GAIN_MIN / f64::from(others)
}

pub(super) fn rate(bytes: u64, within: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "compared with other rates only")]
    let bytes = bytes as f64;
    bytes / within.as_secs_f64().max(f64::EPSILON)
}
