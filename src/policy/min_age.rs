//! Minimum age of a digest: the time for which a tag must have named it before clients get it by that tag. Pure.
//!
//! The proxy collects [`AgeEvidence`], [`AgeLimit::judge`] evaluates it. There are three kinds, here from the most to
//! the least trustworthy. The earliest time among them counts:
//!
//! 1. *First sight.* This cache, or another one by its record, saw the tag name the digest at that time. Neither registry
//!    nor publisher can change it.
//! 2. *`Last-Modified`* of the manifest or its config, set by the registry's storage. A time that is far in
//!    the future, or before there were container images, is no evidence.
//! 3. *`created`* of the image's config, set by its publisher. It counts only with `trust_created`.
//!
//! A digest is *known to be young* if the tag named another digest less than the minimum age ago, or if its storage or
//! config says so. It counts as such while the record of this cache cannot be read. Otherwise a young first sight proves nothing, because the tag may have named the digest long before:
//! the age is *unknown*, and `on_unknown_age` decides.

use std::time::{Duration, SystemTime};

use serde::Deserialize;

use crate::age::AHEAD_MAX;
use crate::oci::Digest;

/// Longest minimum age.
pub const MIN_AGE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Earliest plausible `Last-Modified` or `created`: the first release of Docker. Reproducible builds and some storages
/// state 1970 or 1980.
pub const PLAUSIBLE_AFTER_EPOCH: Duration = Duration::from_secs(1_363_737_600);

/// Action for a digest of unknown age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case", expecting = "a choice")]
pub enum OnUnknownAge {
    /// Treats it as too young.
    #[default]
    Refuse,
    /// Treats it as old enough.
    Serve,
}

impl OnUnknownAge {
    /// All variants.
    pub const ALL: [Self; 2] = [Self::Refuse, Self::Serve];

    /// Name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Serve => "serve",
        }
    }
}

/// The minimum age in effect for an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgeLimit {
    /// Minimum age. Zero: no limit.
    pub min_age: Duration,
    /// Action for a digest of unknown age.
    pub on_unknown_age: OnUnknownAge,
    /// Whether `created` of the config is evidence.
    pub trust_created: bool,
    /// Whether it applies to manifests requested by digest too.
    pub by_digest: bool,
}

/// Settings of the minimum age that a rule or an upstream's section overrides. `None` keeps the value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgeOverrides {
    /// See [`AgeLimit::min_age`].
    pub min_age: Option<Duration>,
    /// See [`AgeLimit::on_unknown_age`].
    pub on_unknown_age: Option<OnUnknownAge>,
    /// See [`AgeLimit::trust_created`].
    pub trust_created: Option<bool>,
    /// See [`AgeLimit::by_digest`].
    pub by_digest: Option<bool>,
}

/// The known age of a digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgeEvidence {
    /// When this cache, or another one by its record, first saw the tag name the digest.
    pub first_seen_at: Option<SystemTime>,
    /// When this cache last saw the tag name another digest, before it first saw this one.
    pub other_seen_at: Option<SystemTime>,
    /// `Last-Modified` of the manifest or its config.
    pub last_modified: Option<SystemTime>,
    /// `created` of the config.
    pub created_at: Option<SystemTime>,
    /// Whether the record of this cache could not be read now. It may say that the digest is young.
    pub is_unreadable: bool,
    /// Whether the operator approved the digest.
    pub is_approved: bool,
}

/// Source of an age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AgeSource {
    /// This cache saw the tag name the digest.
    FirstSeen,
    /// This cache saw the digest in the repository, for a request by digest.
    FirstSeenByDigest,
    /// The storage of the registry.
    LastModified,
    /// The config of the image.
    Created,
}

impl AgeSource {
    /// Name in the admin API and in facts.
    pub fn name(self) -> &'static str {
        match self {
            Self::FirstSeen => "first-seen",
            Self::FirstSeenByDigest => "first-seen-by-digest",
            Self::LastModified => "last-modified",
            Self::Created => "created",
        }
    }
}

/// Whether a digest is old enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maturity {
    /// Old enough, approved, or not limited.
    Mature,
    /// Too young, or of unknown age where that is refused.
    Young(YoungDigest),
}

/// A digest that is too young.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct YoungDigest {
    /// The digest; `None` if the upstream names none.
    pub digest: Option<Digest>,
    /// Since when the digest is known to exist under the tag or in the registry's storage, and by which evidence;
    /// `None` if nothing is known.
    pub since: Option<(SystemTime, AgeSource)>,
    /// Whether it may be older than `since`, because nothing shows when the tag moved.
    pub may_be_older: bool,
    /// When it will be old enough, unless the limit changes; `None` if the upstream names no digest.
    pub served_from: Option<SystemTime>,
}

impl YoungDigest {
    /// Time since `since`; `None` if nothing is known.
    pub fn age(&self, now: SystemTime) -> Option<Duration> {
        let (since, _) = self.since?;
        Some(now.duration_since(since).unwrap_or_default())
    }

    /// The age and its evidence, as in `first seen under this tag 2h ago`.
    pub fn describe(&self, now: SystemTime) -> String {
        let Some((_, source)) = self.since else {
            return "its age is unknown, so `on_unknown_age` decides".to_owned();
        };
        let age = self.age(now).unwrap_or_default();
        // Rounded down to seconds, minutes or hours, by the size of the age.
        let unit = match age.as_secs() {
            0..3_600 => 1,
            3_600..86_400 => 60,
            _ => 3_600,
        };
        let age = humantime::format_duration(Duration::from_secs(age.as_secs() / unit * unit));
        let known = match source {
            AgeSource::FirstSeen => format!("first seen under this tag {age} ago"),
            AgeSource::FirstSeenByDigest => format!("first seen in this repository {age} ago"),
            AgeSource::LastModified => format!("stored at the registry {age} ago, by its Last-Modified"),
            AgeSource::Created => format!("built {age} ago, by its config"),
        };
        if self.may_be_older {
            format!("{known}, and nothing shows that it is older, so `on_unknown_age` decides")
        } else {
            known
        }
    }

    /// When it will be served, as in `served from 2026-12-02T04:00:00Z on`.
    pub fn describe_served_from(&self) -> String {
        self.served_from.map_or_else(
            || "not served while its age is unknown".to_owned(),
            |from| format!("served from {} on", humantime::format_rfc3339_seconds(from)),
        )
    }
}

impl Maturity {
    /// Whether it is [`Maturity::Mature`].
    pub fn is_mature(self) -> bool {
        self == Self::Mature
    }

    /// The same for a request by digest, to which no tag belongs.
    #[must_use]
    pub fn by_digest(self) -> Self {
        match self {
            Self::Young(
                youth @ YoungDigest {
                    since: Some((since, AgeSource::FirstSeen)),
                    ..
                },
            ) => Self::Young(YoungDigest {
                since: Some((since, AgeSource::FirstSeenByDigest)),
                ..youth
            }),
            other => other,
        }
    }

    /// The youth, if too young.
    pub fn youth(self) -> Option<YoungDigest> {
        match self {
            Self::Mature => None,
            Self::Young(youth) => Some(youth),
        }
    }
}

impl AgeLimit {
    /// No minimum age.
    pub const OFF: Self = Self {
        min_age: Duration::ZERO,
        on_unknown_age: OnUnknownAge::Refuse,
        trust_created: false,
        by_digest: false,
    };

    /// These settings with `changes`.
    #[must_use]
    pub fn with_overrides(&self, changes: &AgeOverrides) -> Self {
        Self {
            min_age: changes.min_age.unwrap_or(self.min_age),
            on_unknown_age: changes.on_unknown_age.unwrap_or(self.on_unknown_age),
            trust_created: changes.trust_created.unwrap_or(self.trust_created),
            by_digest: changes.by_digest.unwrap_or(self.by_digest),
        }
    }

    /// Whether there is a limit.
    pub fn is_on(&self) -> bool {
        !self.min_age.is_zero()
    }

    /// Whether there is a limit for manifests requested by digest.
    pub fn is_on_by_digest(&self) -> bool {
        self.is_on() && self.by_digest
    }

    /// Judges a digest by its evidence.
    pub fn judge(&self, digest: Digest, evidence: &AgeEvidence, now: SystemTime) -> Maturity {
        if !self.is_on() || evidence.is_approved {
            return Maturity::Mature;
        }
        let oldest = self.known(evidence, now).min_by_key(|(since, _)| *since);
        let is_old = |since: SystemTime| now.duration_since(since).is_ok_and(|age| age >= self.min_age);
        if oldest.is_some_and(|(since, _)| is_old(since)) {
            return Maturity::Mature;
        }
        let is_known_young = self
            .known(evidence, now)
            .any(|(_, source)| source != AgeSource::FirstSeen)
            || evidence.is_unreadable
            || evidence.other_seen_at.is_some_and(|other| !is_old(other));
        if !is_known_young && self.on_unknown_age == OnUnknownAge::Serve {
            return Maturity::Mature;
        }
        Maturity::Young(YoungDigest {
            digest: Some(digest),
            since: oldest,
            may_be_older: !is_known_young,
            served_from: oldest.map_or(now, |(since, _)| since).checked_add(self.min_age),
        })
    }

    /// Judges a response that names no digest: its age cannot be known.
    pub fn judge_unnamed(&self) -> Maturity {
        if !self.is_on() || self.on_unknown_age == OnUnknownAge::Serve {
            return Maturity::Mature;
        }
        Maturity::Young(YoungDigest {
            digest: None,
            since: None,
            may_be_older: true,
            served_from: None,
        })
    }

    /// The evidence that counts.
    fn known(
        &self,
        evidence: &AgeEvidence,
        now: SystemTime,
    ) -> impl Iterator<Item = (SystemTime, AgeSource)> {
        let stated = |at: Option<SystemTime>| at.filter(|at| is_plausible(*at));
        let created_at = stated(evidence.created_at).filter(|_| self.trust_created);
        [
            (evidence.first_seen_at, AgeSource::FirstSeen),
            (stated(evidence.last_modified), AgeSource::LastModified),
            (created_at, AgeSource::Created),
        ]
        .into_iter()
        .filter_map(move |(at, source)| Some((at.filter(|at| *at <= now)?, source)))
    }
}

/// A `Last-Modified` or `created` as evidence. Clocks differ, so a time up to [`AHEAD_MAX`] ahead counts as `now`; `None`
/// if it is further ahead or implausible.
pub fn evident_time(stated: SystemTime, now: SystemTime) -> Option<SystemTime> {
    let ahead = stated.duration_since(now).unwrap_or_default();
    (is_plausible(stated) && ahead <= AHEAD_MAX).then(|| stated.min(now))
}

/// Whether the stated time is not before the first release of Docker.
fn is_plausible(stated: SystemTime) -> bool {
    stated
        .duration_since(SystemTime::UNIX_EPOCH)
        .is_ok_and(|since| since >= PLAUSIBLE_AFTER_EPOCH)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::oci::Algorithm;

    const DAY: Duration = Duration::from_secs(86_400);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn digest() -> Digest {
        Digest::of(Algorithm::Sha256, b"image")
    }

    fn limits() -> impl Iterator<Item = AgeLimit> {
        OnUnknownAge::ALL.into_iter().flat_map(|on_unknown_age| {
            [false, true].map(|trust_created| AgeLimit {
                min_age: 3 * DAY,
                on_unknown_age,
                trust_created,
                by_digest: false,
            })
        })
    }

    /// Every combination of evidence: none, old, young, in the future, implausible.
    fn every_evidence() -> Vec<AgeEvidence> {
        let times = [
            None,
            Some(now() - 3 * DAY),
            Some(now() - DAY),
            Some(now() + DAY),
            Some(SystemTime::UNIX_EPOCH),
        ];
        let mut all = Vec::new();
        for first_seen_at in times {
            for other_seen_at in times {
                for last_modified in times {
                    for created_at in times {
                        for is_approved in [false, true] {
                            all.push(AgeEvidence {
                                first_seen_at,
                                other_seen_at,
                                last_modified,
                                created_at,
                                is_approved,
                                is_unreadable: false,
                            });
                        }
                    }
                }
            }
        }
        all
    }

    fn is_old(at: Option<SystemTime>) -> bool {
        at.is_some_and(|at| at <= now() - 3 * DAY)
    }

    #[test]
    fn refused_unknown_age_needs_old_evidence() {
        for limit in limits().filter(|limit| limit.on_unknown_age == OnUnknownAge::Refuse) {
            for evidence in every_evidence() {
                let plausible = |at: Option<SystemTime>| is_old(at) && at != Some(SystemTime::UNIX_EPOCH);
                let expected = evidence.is_approved
                    || is_old(evidence.first_seen_at)
                    || plausible(evidence.last_modified)
                    || limit.trust_created && plausible(evidence.created_at);
                let found = limit.judge(digest(), &evidence, now());
                assert_eq!(found.is_mature(), expected, "{limit:?} {evidence:?}");
            }
        }
    }

    #[test]
    fn less_evidence_never_matures() {
        let less = |evidence: AgeEvidence| {
            [
                AgeEvidence {
                    first_seen_at: None,
                    ..evidence
                },
                AgeEvidence {
                    other_seen_at: None,
                    ..evidence
                },
                AgeEvidence {
                    last_modified: None,
                    ..evidence
                },
                AgeEvidence {
                    created_at: None,
                    ..evidence
                },
                AgeEvidence {
                    is_approved: false,
                    ..evidence
                },
            ]
        };
        // The exception: with `on_unknown_age = "serve"`, a digest is served of which nothing shows any more that it is young.
        let is_served_as_unknown = |limit: &AgeLimit, evidence: &AgeEvidence| {
            let refusing = AgeLimit {
                on_unknown_age: OnUnknownAge::Refuse,
                ..*limit
            };
            let youth = refusing.judge(digest(), evidence, now()).youth();
            limit.on_unknown_age == OnUnknownAge::Serve && youth.is_some_and(|youth| youth.may_be_older)
        };
        for limit in limits() {
            for evidence in every_evidence() {
                for less in less(evidence) {
                    assert!(
                        !limit.judge(digest(), &less, now()).is_mature()
                            || limit.judge(digest(), &evidence, now()).is_mature()
                            || is_served_as_unknown(&limit, &less),
                        "{limit:?} {evidence:?} {less:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn unreadable_record_counts_as_young() {
        for limit in limits() {
            for evidence in every_evidence() {
                let unreadable = AgeEvidence {
                    is_unreadable: true,
                    ..evidence
                };
                let judged = limit.judge(digest(), &unreadable, now());
                let refusing = AgeLimit {
                    on_unknown_age: OnUnknownAge::Refuse,
                    ..limit
                };
                let is_old = refusing.judge(digest(), &evidence, now()).is_mature();
                assert_eq!(judged.is_mature(), is_old, "{limit:?} {evidence:?}");
                assert!(judged.youth().is_none_or(|youth| !youth.may_be_older));
            }
        }
    }

    #[test]
    fn served_unknown_age_still_refuses_a_known_move() {
        for evidence in every_evidence() {
            let limit = AgeLimit {
                min_age: 3 * DAY,
                on_unknown_age: OnUnknownAge::Serve,
                trust_created: false,
                by_digest: false,
            };
            let refusing = AgeLimit {
                on_unknown_age: OnUnknownAge::Refuse,
                ..limit
            };
            let is_served = limit.judge(digest(), &evidence, now()).is_mature();
            assert!(is_served || !refusing.judge(digest(), &evidence, now()).is_mature());
            let has_moved = evidence.other_seen_at.is_some_and(|at| at > now() - 3 * DAY);
            if has_moved && !refusing.judge(digest(), &evidence, now()).is_mature() {
                assert!(!is_served, "{evidence:?}");
            }
        }
    }

    #[test]
    fn time_that_passes_never_makes_younger() {
        for limit in limits() {
            for evidence in every_evidence() {
                if !limit.judge(digest(), &evidence, now()).is_mature() {
                    continue;
                }
                // A `Last-Modified` in the future becomes evidence of youth once that time has come.
                if [
                    evidence.last_modified,
                    evidence.created_at,
                    evidence.other_seen_at,
                ]
                .into_iter()
                .flatten()
                .any(|at| at > now())
                {
                    continue;
                }
                assert!(
                    limit.judge(digest(), &evidence, now() + DAY).is_mature(),
                    "{evidence:?}"
                );
            }
        }
    }

    #[test]
    fn t17_clock_set_back_never_makes_older() {
        for limit in limits().filter(|limit| limit.on_unknown_age == OnUnknownAge::Refuse) {
            for evidence in every_evidence() {
                let before = limit.judge(digest(), &evidence, now() - 10 * DAY);
                assert!(!before.is_mature() || limit.judge(digest(), &evidence, now()).is_mature());
            }
        }
    }

    #[test]
    fn stated_time_counts_if_plausible_and_not_far_ahead() {
        let second = Duration::from_secs(1);
        for (stated, expected) in [
            (now() - DAY, Some(now() - DAY)),
            (now(), Some(now())),
            (now() + AHEAD_MAX, Some(now())),
            (now() + AHEAD_MAX + second, None),
            (SystemTime::UNIX_EPOCH, None),
            (SystemTime::UNIX_EPOCH - DAY, None),
            (SystemTime::UNIX_EPOCH + PLAUSIBLE_AFTER_EPOCH - second, None),
        ] {
            assert_eq!(evident_time(stated, now()), expected, "{stated:?}");
        }
    }

    #[test]
    fn youth_tells_age_evidence_and_end() {
        let limit = AgeLimit {
            min_age: 3 * DAY,
            ..AgeLimit::default()
        };
        let evidence = AgeEvidence {
            first_seen_at: Some(now() - DAY),
            last_modified: Some(now() - 2 * DAY),
            ..AgeEvidence::default()
        };
        let youth = limit.judge(digest(), &evidence, now()).youth().unwrap();
        assert_eq!(youth.since, Some((now() - 2 * DAY, AgeSource::LastModified)));
        assert_eq!(youth.served_from, Some(now() + DAY));
        assert_eq!((youth.age(now()), youth.may_be_older), (Some(2 * DAY), false));
        let unknown = limit
            .judge(digest(), &AgeEvidence::default(), now())
            .youth()
            .unwrap();
        assert_eq!((unknown.since, unknown.may_be_older), (None, true));
        assert_eq!(unknown.served_from, Some(now() + 3 * DAY));
    }
}
