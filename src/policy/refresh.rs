//! Schedule of background revalidations: in which slot of its interval a tag is revalidated, and whether it is due.
//! Pure.
//!
//! Time is divided into intervals of the length that the setting `refresh` states, counted from the Unix epoch. Each
//! tag has one slot in every interval, at a [`Phase`] that is a hash of its name. So the slots of many tags are spread
//! evenly, and they do not depend on when the process started, on reloads or on earlier runs. A restart repeats no
//! slot. A slot that was missed while the process was down is not made up for.
//!
//! A tag is due in its slot unless it was confirmed in the half interval before, so that the pulls of a busy tag
//! replace its refreshes. The longest time between two confirmations is one and a half intervals.

#[cfg(test)]
mod tests;

use std::time::{Duration, SystemTime};

use crate::age;

/// Shortest interval.
pub const INTERVAL_MIN: Duration = Duration::from_secs(60);

/// Longest interval.
pub const INTERVAL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Longest backoff, in slots. A failing tag uses the next slot after its first failure, then every 2nd, 4th and at last
/// every 8th.
const BACKOFF_SLOTS_MAX: u32 = 8;

/// Longest backoff, as a time, unless the tag's interval is longer.
const BACKOFF_MAX: Duration = Duration::from_secs(24 * 3600);

/// Settings of scheduled refreshes for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefreshPolicy {
    /// How often a tag is revalidated in the background. `None`: never.
    pub interval: Option<Duration>,
    /// Only tags that a client pulled within this time are refreshed.
    pub used_within: Duration,
    /// Share of the upstream's pull quota that is left to clients.
    pub quota_floor: QuotaFloor,
}

/// Settings of scheduled refreshes that a rule or an upstream's section overrides. `None` keeps the value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefreshOverrides {
    /// See [`RefreshPolicy::interval`].
    pub interval: Option<RefreshInterval>,
    /// See [`RefreshPolicy::used_within`].
    pub used_within: Option<Duration>,
    /// See [`RefreshPolicy::quota_floor`].
    pub quota_floor: Option<QuotaFloor>,
}

/// The setting `refresh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefreshInterval {
    /// No scheduled refreshes.
    Off,
    /// One in each interval of this length.
    Every(Duration),
}

impl RefreshInterval {
    /// The interval, or `None` if off.
    pub fn interval(self) -> Option<Duration> {
        match self {
            Self::Off => None,
            Self::Every(interval) => Some(interval),
        }
    }
}

impl RefreshPolicy {
    /// The default: no scheduled refreshes.
    pub const OFF: Self = Self {
        interval: None,
        used_within: Duration::from_secs(7 * 24 * 3600),
        quota_floor: QuotaFloor(25),
    };

    /// Returns these settings with `changes`.
    #[must_use]
    pub fn with_overrides(self, changes: &RefreshOverrides) -> Self {
        Self {
            interval: changes.interval.map_or(self.interval, RefreshInterval::interval),
            used_within: changes.used_within.unwrap_or(self.used_within),
            quota_floor: changes.quota_floor.unwrap_or(self.quota_floor),
        }
    }
}

/// Share of a pull quota in percent, 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaFloor(u8);

impl QuotaFloor {
    /// A share in percent; `None` above 100.
    pub fn new(percent: u8) -> Option<Self> {
        (percent <= 100).then_some(Self(percent))
    }

    /// The share in percent.
    pub fn percent(self) -> u8 {
        self.0
    }

    /// Whether fewer pulls remain than this share of `limit`.
    pub fn is_below(self, remaining: u64, limit: u64) -> bool {
        u128::from(remaining) * 100 < u128::from(limit) * u128::from(self.0)
    }
}

/// Position of a tag in its interval, from a hash of its name. The hash is keyed by the installation, so that many
/// caches do not revalidate one tag at the same moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase(u64);

impl Phase {
    /// The phase of a tag whose name has this hash.
    pub fn of_hash(hash: u64) -> Self {
        Self(hash)
    }

    /// The first slot at or after `from`.
    pub fn slot_from(self, interval: Duration, from: SystemTime) -> Slot {
        let length = millis(interval).max(1);
        let from = millis(from.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        // Scales the hash from 64 bits to `0..length`.
        let offset = u64::try_from((u128::from(self.0) * u128::from(length)) >> 64).unwrap_or_default();
        let number = from.saturating_sub(offset).div_ceil(length);
        let at = number.saturating_mul(length).saturating_add(offset);
        Slot {
            number,
            at: SystemTime::UNIX_EPOCH + Duration::from_millis(at),
        }
    }

    /// The slots from `from` until before `until`, in order.
    pub fn slots(
        self,
        interval: Duration,
        (from, until): (SystemTime, SystemTime),
    ) -> impl Iterator<Item = Slot> {
        let first = self.slot_from(interval, from);
        let next = move |slot: &Slot| Some(self.slot_from(interval, slot.at + Duration::from_millis(1)));
        std::iter::successors(Some(first), next).take_while(move |slot| slot.at < until)
    }

    /// Whether the tag uses this slot if it uses one of every `stride` slots. `stride` is a power of two.
    fn uses(self, slot: Slot, stride: u64) -> bool {
        slot.number.wrapping_add(self.0) & (stride - 1) == 0
    }
}

/// A time at which a tag may be refreshed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Number of the interval since the Unix epoch.
    pub number: u64,
    /// The time.
    pub at: SystemTime,
}

/// Consecutive failed refreshes of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failures {
    /// How many; at least one.
    pub count: u32,
    /// Time of the last one.
    pub last_at: SystemTime,
}

/// Inputs that determine when a tag is refreshed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TagFacts {
    /// The settings for its image.
    pub policy: RefreshPolicy,
    /// Its position in an interval.
    pub phase: Phase,
    /// When the upstream last confirmed it, to any client or to the cache.
    pub confirmed_at: SystemTime,
    /// When a client last pulled it, if known.
    pub used_at: Option<SystemTime>,
    /// Failed refreshes since the last success.
    pub failures: Option<Failures>,
}

/// The plan for a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// The effective policy has no `refresh`.
    Off,
    /// No client pulled it within `refresh_used_within`.
    Unused,
    /// It is revalidated at this time, unless a client's pull does that before.
    Planned(SystemTime),
}

impl TagFacts {
    /// Whether a client pulled the tag lately.
    pub fn is_in_use(&self, now: SystemTime) -> bool {
        let within = self.policy.used_within;
        self.used_at
            .is_some_and(|at| age::is_within_or_ahead(at, within, now))
    }

    /// Whether the tag is refreshed in the slot at `slot_at`, as known at `now`.
    pub fn is_due(&self, slot_at: SystemTime, now: SystemTime) -> bool {
        self.policy
            .interval
            .is_some_and(|interval| self.is_in_use(now) && self.earliest(interval, now) <= slot_at)
    }

    /// The plan after `now`, if the tag is not pulled until then.
    pub fn outlook(&self, now: SystemTime) -> Outlook {
        let Some(interval) = self.policy.interval else {
            return Outlook::Off;
        };
        if !self.is_in_use(now) {
            return Outlook::Unused;
        }
        let slot = self
            .phase
            .slot_from(interval, self.earliest(interval, now).max(now));
        Outlook::Planned(slot.at)
    }

    /// The earliest time of the next refresh. A recorded time in the future is from before the clock was set back,
    /// and does not count.
    fn earliest(&self, interval: Duration, now: SystemTime) -> SystemTime {
        let after = |at: SystemTime, wait: Duration| {
            if at > now {
                SystemTime::UNIX_EPOCH
            } else {
                at.checked_add(wait).unwrap_or(at)
            }
        };
        let confirmed = after(self.confirmed_at, interval / 2);
        // A confirmation since then came from a client's pull.
        let failures = self
            .failures
            .filter(|failures| failures.last_at >= self.confirmed_at);
        let failed = failures.map_or(SystemTime::UNIX_EPOCH, |failures| {
            after(failures.last_at, backoff(interval, failures.count))
        });
        confirmed.max(failed)
    }
}

/// Wait after the `count`-th failure in a row. It is half an interval shorter than 1, 2, 4 or 8 intervals, so that it
/// has passed when the slot comes that ends it.
fn backoff(interval: Duration, count: u32) -> Duration {
    let slots = 1_u32
        .checked_shl(count.saturating_sub(1))
        .unwrap_or(BACKOFF_SLOTS_MAX)
        .min(BACKOFF_SLOTS_MAX);
    let skipped = interval.saturating_mul(slots).min(BACKOFF_MAX.max(interval));
    skipped.saturating_sub(interval / 2)
}

/// A planned refresh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run<T> {
    /// The tag.
    pub tag: T,
    /// Its slot.
    pub slot: Slot,
    phase: Phase,
}

/// Refreshes of one planning window, bounded in number. If more tags are due, all of them are refreshed less often:
/// each in every second slot, or in every fourth, and so on. So no tag is starved by another.
#[derive(Clone, Debug)]
pub struct Plan<T> {
    runs: Vec<Run<T>>,
    runs_max: usize,
    stride: u64,
}

impl<T> Plan<T> {
    /// An empty plan for at most `runs_max` refreshes.
    pub fn new(runs_max: usize) -> Self {
        Self {
            runs: Vec::new(),
            runs_max: runs_max.max(1),
            stride: 1,
        }
    }

    /// Adds a refresh.
    pub fn add(&mut self, tag: T, phase: Phase, slot: Slot) {
        if !phase.uses(slot, self.stride) {
            return;
        }
        self.runs.push(Run { tag, slot, phase });
        while self.runs.len() > self.runs_max && self.stride < 1 << 32 {
            self.stride *= 2;
            let stride = self.stride;
            self.runs.retain(|run| run.phase.uses(run.slot, stride));
        }
    }

    /// Each tag uses one of this many slots, a power of two. 1: every slot.
    pub fn stride(&self) -> u64 {
        self.stride
    }

    /// The refreshes in the order of their slots.
    pub fn into_runs(mut self) -> Vec<Run<T>> {
        self.runs.sort_by_key(|run| run.slot.at);
        self.runs
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
