//! Sightings: when a tag was first seen to name each digest, for `min_age`.
//!
//! They are kept apart from the tag record, because they outlive it: an evicted or removed image was still seen. A
//! sighting is written when a tag is seen to name a digest that it did not name just before, and never for an unchanged
//! tag.
//!
//! A sighting is evidence of an age, so a doubtful time makes it younger, never older:
//!
//! * A first sight in the future was recorded before the clock was set back. It counts from the next time that the
//!   upstream names the digest.
//! * An import is no sighting. Only a response of the upstream is: to this cache or, by a sealed record in the shared
//!   storage, to another one.
//! * A clock that was set ahead cannot be detected here. The proxy judges ages at no later time than the registries'
//!   `Date` allows.
//!
//! What a tag's sighting says about a digest is kept for the digest too, without the tag. It is the age of a request by
//! digest.
//!
//! At most [`SIGHTINGS_MAX`] digests are kept per tag. Beyond that the one goes that was first seen soonest after
//! another, so that a tag which moves often keeps digests of every age. The newest one and those in use stay.

mod files;

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::record::{NEVER_CONFIRMED, TagKey, TagRecord, Variant};
use crate::oci::{Digest, MediaType, Reference, Repository};
use crate::store::checksummed_json::{decode, encode, from_millis, to_millis};

pub(in crate::store) use self::files::SightingFiles;

/// Maximum number of digests with a sighting per tag.
pub const SIGHTINGS_MAX: usize = 64;

/// Resolution of the times.
const TICK: Duration = Duration::from_millis(1);

/// Subject of a sighting: a tag, or a digest that was requested directly.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SightingKey {
    /// The name of the upstream.
    pub upstream: Arc<str>,
    /// The repository at the upstream.
    pub repository: Repository,
    /// The tag or the digest.
    pub reference: Reference,
}

impl SightingKey {
    /// A digest in the repository of this key.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            reference: digest.into(),
            ..self.clone()
        }
    }
}

impl From<&TagKey> for SightingKey {
    fn from(key: &TagKey) -> Self {
        Self {
            upstream: Arc::clone(&key.upstream),
            repository: key.repository.clone(),
            reference: Reference::Tag(key.tag.clone()),
        }
    }
}

/// A response of the upstream that names a digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The digest.
    pub digest: Digest,
    /// The media type that the upstream sent.
    pub media_type: MediaType,
    /// The key of the set of accepted media types ([`crate::oci::Accept::key`]).
    pub accept: u64,
    /// Whether the set lists both index types ([`crate::oci::Accept::lists_indexes`]).
    pub accepts_indexes: bool,
    /// `Last-Modified` of the manifest or its config, if it is known.
    pub last_modified: Option<SystemTime>,
    /// `created` of the config, if it is known.
    pub created_at: Option<SystemTime>,
}

/// Time of a response that names a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SightTime {
    /// By this host's clock, as the times of a tag record.
    pub host: SystemTime,
    /// The registry's time if this host's clock is behind it, otherwise the same as `host`. Ages count from it.
    pub at: SystemTime,
}

impl From<SystemTime> for SightTime {
    fn from(now: SystemTime) -> Self {
        Self { host: now, at: now }
    }
}

impl SightTime {
    fn is_host_behind(self) -> bool {
        self.at != self.host
    }

    fn to_millis(self) -> Self {
        let rounded = |time| from_millis(to_millis(time));
        Self {
            host: rounded(self.host),
            at: rounded(self.at),
        }
    }
}

/// A digest that a tag was seen to name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The response that named it. Its `last_modified` and `created_at` are the first ones known.
    pub seen: Seen,
    /// When the upstream first named it.
    pub first_seen_at: SystemTime,
    /// When the upstream named it after it had named another one.
    pub named_at: SystemTime,
    /// The same by this host's clock ([`SightTime::host`]).
    pub named_at_by_host: SystemTime,
    /// When the upstream last named another digest before `first_seen_at`.
    pub other_seen_at: Option<SystemTime>,
}

/// The sightings of a tag, the last named first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sightings {
    all: Vec<Sighting>,
    /// Whether the last write failed.
    is_unsaved: bool,
    /// See [`Self::is_unreadable`].
    is_unreadable: bool,
}

impl Sighting {
    fn first(seen: &Seen, now: SightTime) -> Self {
        Self {
            seen: seen.clone(),
            first_seen_at: now.at,
            named_at: now.at,
            named_at_by_host: now.host,
            other_seen_at: None,
        }
    }

    fn may_be_substitute(&self) -> bool {
        !self.seen.accepts_indexes && !self.seen.media_type.is_index()
    }

    /// Whether a tag that did not move can name both: an index and a substitute for it, or two substitutes for
    /// different sets (see `resolve`).
    fn is_alternative(&self, other: &Self) -> bool {
        let (one, two) = (self.may_be_substitute(), other.may_be_substitute());
        (self.seen.media_type.is_index() && two)
            || (other.seen.media_type.is_index() && one)
            || (one && two && self.seen.accept != other.seen.accept)
    }
}

impl Sightings {
    /// The sighting of this digest.
    pub fn get(&self, digest: &Digest) -> Option<&Sighting> {
        self.all.iter().find(|sighting| sighting.seen.digest == *digest)
    }

    /// The digest that the tag was last seen to name.
    pub fn newest(&self) -> Option<&Sighting> {
        self.all.first()
    }

    /// When the tag was last seen to name another digest, for one that it was not seen to name: by a response that is not
    /// proven to be the registry's. `seen`: that response; without it, each other digest counts. `record`: as for
    /// [`Self::with`].
    pub fn other_seen_at(
        &self,
        digest: &Digest,
        seen: Option<&Seen>,
        record: Option<&TagRecord>,
        now: SystemTime,
    ) -> Option<SystemTime> {
        if let Some(seen) = seen {
            return last_other(&Sighting::first(seen, now.into()), &self.all, record, now.into());
        }
        let seen = self.all.iter().map(|other| (other.seen.digest, other.named_at));
        let variants = record.into_iter().flat_map(|record| &record.variants);
        let confirmed = variants.map(|variant| (variant.digest, variant.confirmed_at));
        seen.chain(confirmed)
            .filter(|(other, at)| other != digest && *at != NEVER_CONFIRMED)
            .map(|(_, at)| at.min(now))
            .max()
    }

    /// All sightings, the last named first.
    pub fn iter(&self) -> impl Iterator<Item = &Sighting> {
        self.all.iter()
    }

    /// Whether the file exists and could not be read now. These sightings may then lack some that are on the disk.
    pub fn is_unreadable(&self) -> bool {
        self.is_unreadable
    }

    fn len(&self) -> usize {
        self.all.len()
    }

    /// The sightings that follow from a tag record alone, for a store from before sightings, or one that lost them.
    pub(in crate::store) fn of_record(record: &TagRecord) -> Self {
        let mut all: Vec<Sighting> = Vec::new();
        for variant in &record.variants {
            let past = variant
                .history
                .iter()
                .map(|past| (past.digest, past.first_seen_at, past.confirmed_at));
            let now = (variant.digest, variant.first_seen_at, variant.confirmed_at);
            for (digest, first_seen_at, named_at) in std::iter::once(now).chain(past) {
                let is_known = all.iter().any(|sighting| sighting.seen.digest == digest);
                if named_at == NEVER_CONFIRMED || is_known || all.len() >= SIGHTINGS_MAX {
                    continue;
                }
                all.push(Sighting {
                    seen: Seen {
                        digest,
                        media_type: variant.media_type.clone(),
                        accept: variant.accept,
                        accepts_indexes: variant.accepts_indexes,
                        last_modified: None,
                        created_at: None,
                    },
                    first_seen_at,
                    named_at,
                    named_at_by_host: named_at,
                    other_seen_at: None,
                });
            }
        }
        all.sort_by_key(|sighting| Reverse(sighting.named_at));
        all.shrink_to_fit();
        Self {
            all,
            ..Self::default()
        }
    }

    /// These sightings after a response at `now`; `None` if it adds nothing. `record` is the tag's record, which knows
    /// when digests were last confirmed, and which are in use.
    #[must_use]
    pub fn with(&self, seen: &Seen, record: Option<&TagRecord>, now: impl Into<SightTime>) -> Option<Self> {
        let now = now.into().to_millis();
        let mut all = self.all.clone();
        let before = all
            .iter()
            .position(|sighting| sighting.seen.digest == seen.digest)
            .map(|at| all.remove(at));
        let fresh = Sighting::first(seen, now);
        let sighting = match &before {
            None => Sighting {
                other_seen_at: last_other(&fresh, &all, record, now),
                ..fresh
            },
            Some(before) => before.seen_again(&fresh, &all, now),
        };
        if before.as_ref() == Some(&sighting) && !self.is_unsaved {
            return None;
        }
        for other in &mut all {
            // The clock was set back.
            for (named_at, now) in [
                (&mut other.named_at, now.at),
                (&mut other.named_at_by_host, now.host),
            ] {
                if *named_at > now {
                    *named_at = now.checked_sub(TICK).unwrap_or(NEVER_CONFIRMED);
                }
            }
        }
        // First among those of the same millisecond.
        all.insert(0, sighting);
        all.sort_by_key(|sighting| Reverse(sighting.named_at));
        thin_out(
            &mut all,
            &seen.digest,
            &record.map(TagRecord::digests).unwrap_or_default(),
        );
        // Most tags have one, and it stays in memory.
        all.shrink_to_fit();
        Some(Self {
            all,
            ..Self::default()
        })
    }

    /// These sightings of a digest, together with what a tag's sighting says about it; `None` if that adds nothing.
    pub(in crate::store) fn joined(&self, of_tag: &Sighting, now: SystemTime) -> Option<Self> {
        let before = self.get(&of_tag.seen.digest);
        let joined = before.map_or_else(|| of_tag.clone(), |before| before.joined(of_tag, now));
        if before == Some(&joined) && !self.is_unsaved {
            return None;
        }
        Some(Self {
            all: vec![joined],
            ..Self::default()
        })
    }

    /// These sightings if another cache has seen the tag name this digest since `first_seen_at`; `None` if that adds nothing.
    /// The digest must have a sighting here.
    pub(in crate::store) fn since(&self, digest: &Digest, first_seen_at: SystemTime) -> Option<Self> {
        let first_seen_at = from_millis(to_millis(first_seen_at));
        let mut all = self.all.clone();
        let sighting = all.iter_mut().find(|sighting| sighting.seen.digest == *digest)?;
        if sighting.first_seen_at <= first_seen_at {
            return None;
        }
        sighting.first_seen_at = first_seen_at;
        Some(Self {
            all,
            ..Self::default()
        })
    }

    /// The sightings as the responses of a tag record, for the choice of an image: by this host's clock, as its times are
    /// compared with it. `record` has later confirmations.
    pub(in crate::store) fn as_record(&self, record: Option<&TagRecord>) -> TagRecord {
        let confirmed_at = |digest: &Digest| {
            let variants = record.into_iter().flat_map(|record| &record.variants);
            let same = variants.filter(|variant| variant.digest == *digest);
            same.map(|variant| variant.confirmed_at).max()
        };
        let variant = |sighting: &Sighting| Variant {
            accept: sighting.seen.accept,
            digest: sighting.seen.digest,
            media_type: sighting.seen.media_type.clone(),
            accepts_indexes: sighting.seen.accepts_indexes,
            confirmed_at: confirmed_at(&sighting.seen.digest)
                .map_or(sighting.named_at_by_host, |at| at.max(sighting.named_at_by_host)),
            first_seen_at: sighting.first_seen_at,
            previous: None,
            is_by_record: false,
            history: Vec::new(),
        };
        TagRecord {
            variants: self.all.iter().map(variant).collect(),
        }
    }
}

impl Sighting {
    /// The evidence of both. The digest is no younger than under either, so that a pull by tag that goes on by digest is
    /// not interrupted.
    fn joined(&self, of_tag: &Self, now: SystemTime) -> Self {
        let mut joined = self.clone();
        // A first sight in the future is no evidence.
        if self.first_seen_at > now || of_tag.first_seen_at < self.first_seen_at {
            joined.first_seen_at = of_tag.first_seen_at;
        }
        let both = self.other_seen_at.zip(of_tag.other_seen_at);
        joined.other_seen_at = both.map(|(one, two)| one.min(two));
        let seen = &mut joined.seen;
        seen.last_modified = seen.last_modified.or(of_tag.seen.last_modified);
        seen.created_at = seen.created_at.or(of_tag.seen.created_at);
        joined
    }

    /// This sighting after the same digest was named again.
    fn seen_again(&self, fresh: &Self, others: &[Self], now: SightTime) -> Self {
        let mut again = self.clone();
        let (old, new) = (&mut again.seen, &fresh.seen);
        // A set that lists indexes shows that an image is no substitute.
        if new.accepts_indexes && !old.accepts_indexes {
            (old.accept, old.accepts_indexes) = (new.accept, true);
        }
        old.last_modified = old.last_modified.or(new.last_modified);
        old.created_at = old.created_at.or(new.created_at);
        if again.first_seen_at > now.at {
            again.first_seen_at = now.at;
        }
        let is_back = |other: &Self| other.named_at >= self.named_at && !other.is_alternative(fresh);
        if self.named_at > now.at || others.iter().any(is_back) {
            (again.named_at, again.named_at_by_host) = (now.at, now.host);
        }
        if again.named_at_by_host > now.host {
            again.named_at_by_host = now.host;
        }
        again
    }
}

/// When the tag was last seen to name another digest than `fresh`, at `now` at the latest. If that is not known because
/// this host's clock is behind, at `now`, so that an unknown age counts as young.
fn last_other(
    fresh: &Sighting,
    others: &[Sighting],
    record: Option<&TagRecord>,
    now: SightTime,
) -> Option<SystemTime> {
    let seen = others.iter().filter(|other| !other.is_alternative(fresh));
    let variants = record.into_iter().flat_map(|record| &record.variants);
    let confirmed = variants.filter(|variant| {
        let is_other = variant.digest != fresh.seen.digest && variant.confirmed_at != NEVER_CONFIRMED;
        let may_be_substitute = !variant.accepts_indexes && !variant.media_type.is_index();
        let is_alternative = (variant.media_type.is_index() && fresh.may_be_substitute())
            || (fresh.seen.media_type.is_index() && may_be_substitute)
            || (may_be_substitute && fresh.may_be_substitute() && variant.accept != fresh.seen.accept);
        is_other && !is_alternative
    });
    let times = seen
        .map(|other| other.named_at)
        .chain(confirmed.map(|variant| variant.confirmed_at));
    // A clock that is behind dated the confirmations. Later, they would seem older than they are.
    let is_dated = |at: SystemTime| {
        if now.is_host_behind() {
            now.at
        } else {
            at.min(now.at)
        }
    };
    times.max().map(is_dated)
}

/// Removes sightings beyond [`SIGHTINGS_MAX`]: of those not in use, the one that was first seen soonest after another.
fn thin_out(all: &mut Vec<Sighting>, newest: &Digest, in_use: &[Digest]) {
    while all.len() > SIGHTINGS_MAX {
        let mut by_age: Vec<(usize, SystemTime)> = all
            .iter()
            .enumerate()
            .map(|(at, sighting)| (at, sighting.first_seen_at))
            .collect();
        by_age.sort_by_key(|(_, first_seen_at)| *first_seen_at);
        let is_free = |at: &usize| {
            all.get(*at).is_some_and(|sighting| {
                sighting.seen.digest != *newest && !in_use.contains(&sighting.seen.digest)
            })
        };
        let earlier = by_age.iter().map(|(_, at)| Some(*at));
        let gaps = by_age.iter().zip(std::iter::once(None).chain(earlier));
        let soonest = gaps
            .filter(|((at, _), _)| is_free(at))
            .min_by_key(|((_, at), earlier)| {
                earlier.map_or(Duration::MAX, |earlier| {
                    at.duration_since(earlier).unwrap_or_default()
                })
            })
            .map(|((at, _), _)| *at);
        // Fewer digests are in use than are kept.
        let Some(at) = soonest else {
            all.truncate(SIGHTINGS_MAX);
            return;
        };
        all.remove(at);
    }
}

#[derive(Serialize, Deserialize)]
struct SightingRecord {
    digest: String,
    media_type: String,
    accept: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    accepts_indexes: bool,
    first_seen_at_ms: u64,
    named_at_ms: u64,
    /// If it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    named_at_by_host_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    other_seen_at_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last_modified_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created_at_ms: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct SightingsFile {
    upstream: String,
    repository: String,
    reference: String,
    sightings: Vec<SightingRecord>,
}

impl Sightings {
    fn to_file(&self, key: &SightingKey) -> Vec<u8> {
        encode(&SightingsFile {
            upstream: key.upstream.to_string(),
            repository: key.repository.as_str().to_owned(),
            reference: key.reference.to_string(),
            sightings: self.all.iter().map(Sighting::to_record).collect(),
        })
    }

    fn from_file(bytes: &[u8]) -> Option<(SightingKey, Self)> {
        let file: SightingsFile = decode(bytes)?;
        let key = SightingKey {
            upstream: file.upstream.into(),
            repository: file.repository.parse().ok()?,
            reference: file.reference.parse().ok()?,
        };
        let mut all: Vec<Sighting> = file
            .sightings
            .iter()
            .filter_map(Sighting::from_record)
            .take(SIGHTINGS_MAX)
            .collect();
        all.sort_by_key(|sighting| Reverse(sighting.named_at));
        Some((
            key,
            Self {
                all,
                ..Self::default()
            },
        ))
    }
}

impl Sighting {
    fn to_record(&self) -> SightingRecord {
        SightingRecord {
            digest: self.seen.digest.to_string(),
            media_type: self.seen.media_type.as_str().to_owned(),
            accept: format!("{:016x}", self.seen.accept),
            accepts_indexes: self.seen.accepts_indexes,
            first_seen_at_ms: to_millis(self.first_seen_at),
            named_at_ms: to_millis(self.named_at),
            named_at_by_host_ms: (self.named_at_by_host != self.named_at)
                .then(|| to_millis(self.named_at_by_host)),
            other_seen_at_ms: self.other_seen_at.map(to_millis),
            last_modified_ms: self.seen.last_modified.map(to_millis),
            created_at_ms: self.seen.created_at.map(to_millis),
        }
    }

    fn from_record(record: &SightingRecord) -> Option<Self> {
        Some(Self {
            seen: Seen {
                digest: record.digest.parse().ok()?,
                media_type: record.media_type.parse().ok()?,
                accept: u64::from_str_radix(&record.accept, 16).ok()?,
                accepts_indexes: record.accepts_indexes,
                last_modified: record.last_modified_ms.map(from_millis),
                created_at: record.created_at_ms.map(from_millis),
            },
            first_seen_at: from_millis(record.first_seen_at_ms),
            named_at: from_millis(record.named_at_ms),
            named_at_by_host: from_millis(record.named_at_by_host_ms.unwrap_or(record.named_at_ms)),
            other_seen_at: record.other_seen_at_ms.map(from_millis),
        })
    }
}
