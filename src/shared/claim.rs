//! Claim of one cache over the download of a blob: an advisory lease in the bucket. Pure; time is an argument.
//!
//! Of several caches that miss a blob at once, one creates the claim and fetches from the upstream. The others follow it.
//! All bytes are verified by their digest, so a lost claim costs bytes and never correctness.
//!
//! A claim is alive while its version changes. Only the watcher's own monotonic time counts, or the bucket's clock alone:
//! clocks of two hosts are never compared.

#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::trace_context::TraceContext;

/// Maximum size of a claim.
pub(super) const RECORD_BYTES_MAX: u64 = 4096;

/// A claim whose version rested for this long is dead.
pub(super) const DEAD_AFTER: Duration = Duration::from_secs(10);

/// A claim that is older than this by the bucket's clock alone is dead, even at the first look.
const DEAD_AGE: Duration = Duration::from_secs(15);

/// Interval at which an owner writes its claim.
const BEAT: Duration = Duration::from_secs(3);

/// Interval at which an owner looks whether another cache wants the parts, at first and later.
const LOOK: Duration = Duration::from_millis(250);
const LOOK_LATER: Duration = Duration::from_secs(1);
/// How long it looks often: caches that miss at the same moment come early.
const EARLY: Duration = Duration::from_secs(5);

/// How long a claim without progress is followed. Longer than [`DEAD_AFTER`], because the follower's own write of `wanted`
/// changes the version once: a dead owner must not pass for one that stalls.
pub(super) const STALLED_AFTER: Duration = Duration::from_secs(12);

/// How long a claim is followed while its owner receives bytes and none reach the follower. Less than the window in which
/// a download must receive some.
pub(super) const UNDELIVERED_MAX: Duration = Duration::from_secs(25);

/// Looks of one entry.
const LOOKS_MAX: u32 = 4;

/// Size of the first part, and of each further one.
const FIRST_PART_BYTES: u64 = 1024 * 1024;
const PART_BYTES: u64 = 5 * 1024 * 1024;

/// First byte of the part that has this one.
pub(super) fn part_start(offset: u64) -> u64 {
    match offset.checked_sub(FIRST_PART_BYTES) {
        None => 0,
        Some(beyond) => FIRST_PART_BYTES + beyond / PART_BYTES * PART_BYTES,
    }
}

/// First byte of the part after the one that begins at `start`.
pub(super) fn part_end(start: u64) -> u64 {
    start.saturating_add(if start == 0 { FIRST_PART_BYTES } else { PART_BYTES })
}

/// Identity of a process, random at its start. It is stored nowhere, so no two processes have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BootId(String);

impl BootId {
    pub(super) fn random() -> Self {
        Self(TraceContext::new_root().id().to_string())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// A number from 0 to 1 that differs between processes.
    pub(super) fn share(&self) -> f64 {
        let first = self
            .0
            .get(..2)
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        f64::from(first.unwrap_or_default()) / 255.0
    }
}

/// Content of a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClaimRecord {
    /// Boot id of the cache that holds it.
    owner: String,
    beat: u64,
    /// Size of the blob, once the upstream has stated it.
    pub(super) size: Option<u64>,
    /// Bytes that the owner has. They show a slow upstream from one that stalls.
    received: u64,
    /// The bytes before this one are in parts.
    pub(super) published: u64,
    /// Whether another cache reads the parts.
    pub(super) wanted: bool,
}

impl ClaimRecord {
    pub(super) fn new(me: &BootId) -> Self {
        Self {
            owner: me.0.clone(),
            beat: 0,
            size: None,
            received: 0,
            published: 0,
            wanted: false,
        }
    }

    /// A claim of which this process has written so many others. Some storages derive the version from the bytes, and a version
    /// that was waited for in vain is not waited for again.
    pub(super) fn numbered(me: &BootId, number: u64) -> Self {
        Self {
            beat: number,
            ..Self::new(me)
        }
    }

    /// `None` if these bytes are no claim.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let record: Self = serde_json::from_slice(bytes).ok()?;
        let is_possible = record.size.is_none_or(|size| record.published <= size);
        (!record.owner.is_empty() && is_possible).then_some(record)
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub(super) fn is_of(&self, me: &BootId) -> bool {
        self.owner == me.0
    }
}

/// What a cache finds at the key of a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Look {
    Absent,
    Present {
        etag: String,
        /// Time since it was written, by the bucket's clock.
        age: Option<Duration>,
        /// `None`: this is no claim, or one of a later version.
        record: Option<ClaimRecord>,
    },
    /// The bucket did not tell.
    Failed,
}

/// Result of a conditional write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// With the new version.
    Done(String),
    /// There is a claim, or another version of it. Some storages say so of a conflict without any claim.
    Refused,
    /// The bucket did not tell. The write may have taken effect.
    Unknown,
}

/// Liveness of a claim, watched by one cache.
#[derive(Clone, Debug, Default)]
pub(super) struct Watch {
    seen: Option<(String, Instant)>,
}

impl Watch {
    /// Version of the claim at the last look.
    pub(super) fn etag(&self) -> Option<String> {
        self.seen.as_ref().map(|(etag, _)| etag.clone())
    }

    /// Whether the claim, as it was read now, is alive.
    pub(super) fn is_alive(&mut self, etag: &str, age: Option<Duration>, now: Instant) -> bool {
        let rested = match &self.seen {
            Some((known, since)) if known == etag => now.saturating_duration_since(*since),
            _ => {
                self.seen = Some((etag.to_owned(), now));
                Duration::ZERO
            }
        };
        rested < DEAD_AFTER && age.is_none_or(|age| age <= DEAD_AGE)
    }
}

/// Why a cache asks the upstream without a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alone {
    /// The bucket did not tell.
    Unavailable,
    /// Other caches changed the claim at each attempt.
    Contended,
    /// The claim cannot be parsed, or contradicts the known size of the blob.
    Invalid,
    /// This cache may not write, and no parts are published.
    ReadOnly,
}

impl Alone {
    /// Label in the metrics. Stable.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Contended => "contended",
            Self::Invalid => "invalid",
            Self::ReadOnly => "read-only",
        }
    }
}

/// Next step of an [`Entry`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Read the claim.
    Look,
    /// Write this unless there is a claim.
    Create(ClaimRecord),
    /// Write this over that version.
    TakeOver(ClaimRecord, String),
    /// This cache holds the claim.
    Lead(Held),
    /// Another cache holds it.
    Follow(Followed),
    /// Ask the upstream.
    Alone(Alone),
}

/// A cache that misses a blob: takes the claim, takes over a dead one, or follows.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    me: BootId,
    may_write: bool,
    /// Size of the blob by a manifest.
    stated: Option<u64>,
    looks: u32,
    /// The last record that was written.
    written: Option<ClaimRecord>,
    /// A write may have taken effect later.
    is_unsure: bool,
}

impl Entry {
    /// Begins with [`Step::Look`]: a refused create is slow where many caches create at once.
    pub(super) fn new(me: &BootId, may_write: bool, stated: Option<u64>) -> Self {
        Self {
            me: me.clone(),
            may_write,
            stated,
            looks: 0,
            written: None,
            is_unsure: false,
        }
    }

    pub(super) fn looked(&mut self, look: Look, watch: &mut Watch, now: Instant) -> Step {
        self.looks += 1;
        match look {
            Look::Failed => Step::Alone(Alone::Unavailable),
            Look::Absent if !self.may_write => Step::Alone(Alone::ReadOnly),
            Look::Absent if self.is_unsure => Step::Alone(Alone::Unavailable),
            Look::Absent => self.write(ClaimRecord::new(&self.me), None),
            Look::Present { etag, age, record } => self.found(etag, age, record, (watch, now)),
        }
    }

    fn found(
        &mut self,
        etag: String,
        age: Option<Duration>,
        record: Option<ClaimRecord>,
        (watch, now): (&mut Watch, Instant),
    ) -> Step {
        // The reply to an own write was lost.
        if let Some(record) = record.as_ref().filter(|record| record.is_of(&self.me)) {
            let mut held = Held::new(&self.me, etag, record.clone(), now);
            // It may have rested for long.
            (held.is_changed, held.confirmed_at) = (true, None);
            return Step::Lead(held);
        }
        let is_alive = watch.is_alive(&etag, age, now);
        match record {
            _ if !is_alive && !self.may_write => Step::Alone(Alone::ReadOnly),
            record if !is_alive => {
                let earlier = record.unwrap_or_else(|| ClaimRecord::new(&self.me));
                let is_boundary = part_start(earlier.published) == earlier.published;
                let record = ClaimRecord {
                    owner: self.me.0.clone(),
                    beat: earlier.beat.wrapping_add(1),
                    size: None,
                    received: 0,
                    published: if is_boundary { earlier.published } else { 0 },
                    wanted: earlier.wanted,
                };
                self.write(record, Some(etag))
            }
            None => Step::Alone(Alone::Invalid),
            Some(record) if !fits(record.size, self.stated) => Step::Alone(Alone::Invalid),
            Some(record) if !self.may_write && !record.wanted => Step::Alone(Alone::ReadOnly),
            Some(record) => Step::Follow(Followed::new(record, now)),
        }
    }

    fn write(&mut self, record: ClaimRecord, over: Option<String>) -> Step {
        if self.looks > LOOKS_MAX {
            return Step::Alone(Alone::Contended);
        }
        self.written = Some(record.clone());
        match over {
            None => Step::Create(record),
            Some(etag) => Step::TakeOver(record, etag),
        }
    }

    pub(super) fn written(&mut self, written: Written, now: Instant) -> Step {
        match (written, self.written.take()) {
            (Written::Done(etag), Some(record)) => Step::Lead(Held::new(&self.me, etag, record, now)),
            (Written::Done(_), None) => Step::Alone(Alone::Unavailable),
            (Written::Refused, _) => Step::Look,
            (Written::Unknown, _) => {
                self.is_unsure = true;
                Step::Look
            }
        }
    }
}

/// Whether the sizes may be of one blob.
fn fits(one: Option<u64>, other: Option<u64>) -> bool {
    one.zip(other).is_none_or(|(one, other)| one == other)
}

/// Next step of a [`Held`] claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum HeldStep {
    /// Write this over that version.
    Write(ClaimRecord, String),
    /// Read the claim.
    Look,
    /// Nothing before this time.
    Rest(Instant),
    /// Another cache holds the claim, or none does. The download goes on, and nothing is published.
    Lost,
}

/// A claim that this cache holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    me: BootId,
    etag: String,
    record: ClaimRecord,
    since: Instant,
    /// Time of the last write that is known to have taken effect. `None`: it was found in the bucket, and another cache may
    /// be about to take it over.
    confirmed_at: Option<Instant>,
    looked_at: Instant,
    /// The record differs from the one in the bucket.
    is_changed: bool,
    /// The result of the last write is not known.
    is_unsure: bool,
    is_lost: bool,
}

impl Held {
    fn new(me: &BootId, etag: String, record: ClaimRecord, now: Instant) -> Self {
        Self {
            me: me.clone(),
            etag,
            record,
            since: now,
            confirmed_at: Some(now),
            looked_at: now,
            is_changed: false,
            is_unsure: false,
            is_lost: false,
        }
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.record.wanted
    }

    pub(super) fn published(&self) -> u64 {
        self.record.published
    }

    /// Whether no other cache can have taken it over yet.
    pub(super) fn is_current(&self, now: Instant) -> bool {
        self.confirmed_at.is_some() && !self.is_expired(now)
    }

    fn is_expired(&self, now: Instant) -> bool {
        self.is_lost || now.saturating_duration_since(self.written_at()) >= DEAD_AFTER
    }

    fn written_at(&self) -> Instant {
        self.confirmed_at.unwrap_or(self.since)
    }

    /// The upstream has stated the size.
    pub(super) fn set_size(&mut self, size: u64) {
        self.is_changed |= self.record.size != Some(size);
        self.record.size = Some(size);
    }

    /// These many bytes have arrived. The next beat says so.
    pub(super) fn receive(&mut self, received: u64) {
        self.record.received = received;
    }

    /// The bytes before `until` are in parts.
    pub(super) fn publish(&mut self, until: u64) {
        self.is_changed |= until > self.record.published;
        self.record.published = self.record.published.max(until);
    }

    fn look_at(&self) -> Instant {
        let is_early = self.looked_at.saturating_duration_since(self.since) < EARLY;
        self.looked_at + if is_early { LOOK } else { LOOK_LATER }
    }

    pub(super) fn next(&mut self, now: Instant) -> HeldStep {
        if self.is_expired(now) {
            self.is_lost = true;
            return HeldStep::Lost;
        }
        let (look_at, beat_at) = (self.look_at(), self.written_at() + BEAT);
        if self.is_unsure {
            return if now < look_at {
                HeldStep::Rest(look_at)
            } else {
                HeldStep::Look
            };
        }
        if self.is_changed || now >= beat_at {
            self.record.beat = self.record.beat.wrapping_add(1);
            return HeldStep::Write(self.record.clone(), self.etag.clone());
        }
        match (self.record.wanted, now < look_at) {
            (true, _) => HeldStep::Rest(beat_at),
            (false, true) => HeldStep::Rest(look_at.min(beat_at)),
            (false, false) => HeldStep::Look,
        }
    }

    /// Result of the write of `record`.
    pub(super) fn written(&mut self, record: &ClaimRecord, written: Written, now: Instant) {
        match written {
            Written::Done(etag) => {
                self.etag = etag;
                self.confirmed_at = Some(now);
                self.is_changed = ClaimRecord {
                    received: record.received,
                    ..self.record.clone()
                } != *record;
            }
            // A follower has set `wanted`, or another cache holds the claim: at once.
            Written::Refused => {
                self.is_unsure = true;
                self.looked_at = now.checked_sub(LOOK_LATER).unwrap_or(self.since);
            }
            Written::Unknown => {
                self.is_unsure = true;
                self.looked_at = now;
            }
        }
    }

    pub(super) fn looked(&mut self, look: Look, now: Instant) {
        self.looked_at = now;
        match look {
            Look::Failed => {}
            Look::Present {
                etag,
                record: Some(found),
                ..
            } if found.is_of(&self.me) => {
                self.etag = etag;
                self.record.wanted |= found.wanted;
                self.is_changed |= self.is_unsure || found.published != self.record.published;
                self.is_unsure = false;
            }
            Look::Absent | Look::Present { .. } => self.is_lost = true,
        }
    }
}

/// Next step of a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FollowStep {
    /// There are parts beyond the position.
    Read,
    /// Look again later.
    Wait,
    /// The claim is gone: the blob is in the bucket, or its owner gave up.
    Gone,
    /// The owner is dead: take over.
    Dead,
    /// The owner is alive, and nothing happens.
    Stalled,
    /// The claim contradicts itself.
    Invalid,
}

/// A claim of another cache, as its follower sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Followed {
    record: ClaimRecord,
    size: Option<u64>,
    /// Last time that anything happened at the owner.
    progressed_at: Instant,
    /// Last time that there was more to read.
    delivered_at: Instant,
}

impl Followed {
    fn new(record: ClaimRecord, now: Instant) -> Self {
        Self {
            size: record.size,
            record,
            progressed_at: now,
            delivered_at: now,
        }
    }

    pub(super) fn size(&self) -> Option<u64> {
        self.size
    }

    pub(super) fn published(&self) -> u64 {
        self.record.published
    }

    /// Bytes were read.
    pub(super) fn progress(&mut self, now: Instant) {
        (self.progressed_at, self.delivered_at) = (now, now);
    }

    /// The object in the bucket ends here.
    pub(super) fn end_at(&mut self, size: u64) {
        self.size = Some(size);
    }

    /// The record with which this follower asks for parts. `None`: they are wanted already.
    pub(super) fn wanted(&self) -> Option<ClaimRecord> {
        (!self.record.wanted).then(|| ClaimRecord {
            wanted: true,
            ..self.record.clone()
        })
    }

    pub(super) fn looked(
        &mut self,
        look: Look,
        position: u64,
        watch: &mut Watch,
        now: Instant,
    ) -> FollowStep {
        match look {
            Look::Failed => {}
            Look::Absent => return FollowStep::Gone,
            Look::Present { etag, age, record } => {
                if !watch.is_alive(&etag, age, now) {
                    return FollowStep::Dead;
                }
                let Some(record) = record else {
                    return FollowStep::Invalid;
                };
                let is_same = record.owner == self.record.owner;
                let shrinks = record.published < self.record.published
                    || record.size.is_none() && self.record.size.is_some();
                if !fits(record.size, self.size) || is_same && shrinks {
                    return FollowStep::Invalid;
                }
                let is_more =
                    record.published > self.record.published || record.received > self.record.received;
                if is_more || record.size.is_some() && self.size.is_none() {
                    self.progressed_at = now;
                }
                if record.published > self.record.published {
                    self.delivered_at = now;
                }
                self.size = self.size.or(record.size);
                self.record = record;
            }
        }
        if self.record.published > position {
            FollowStep::Read
        } else if now.saturating_duration_since(self.progressed_at) >= STALLED_AFTER
            || now.saturating_duration_since(self.delivered_at) >= UNDELIVERED_MAX
        {
            FollowStep::Stalled
        } else {
            FollowStep::Wait
        }
    }
}
