//! Content of records, and the merge of two of them. Pure: the storage's time is an argument.
//!
//! Several caches write one record. [`Merge`] does not depend on their order: for each statement, the later time counts.
//! So a record never goes back, in whatever order caches write it. A time in the future is no time: that of a statement that opens
//! something counts as the oldest, and that of a denial or a deletion as now.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::oci::{Digest, MediaType};

/// Sets of accepted media types in one tag record, as in the store.
const VARIANTS_MAX: usize = crate::store::tags::VARIANTS_MAX;

/// Children in one content record. Images in use have fewer than a hundred.
pub const CHILDREN_MAX: usize = 1024;

/// A statement of several caches.
pub(in crate::shared) trait Merge: Sized + Clone + PartialEq {
    /// What both say together. Times after `now`, in seconds, count as 0; those of denials and deletions as `now`.
    fn merge(self, other: Self, now: u64) -> Self;

    /// The same statement with its times moved from those of the cache to those of the storage.
    fn shift(self, by: impl Fn(u64) -> u64) -> Self;

    /// Whether it says as much as `other`, of which a difference of `slack` seconds is none.
    fn covers(&self, other: &Self, slack: u64) -> bool;

    /// Whether it is written if there is no record yet.
    fn is_new(&self) -> bool {
        true
    }
}

/// What a tag names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagState {
    /// When the tag was last seen to be deleted or to change in a way that is not known; 0 for never. Digests
    /// that were seen until then do not count.
    pub unnamed_at: u64,
    /// For each set of accepted media types, the digest that the upstream named.
    pub variants: Vec<TagVariant>,
}

/// The digest that a tag named for one set of accepted media types.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagVariant {
    /// Key of the set ([`crate::oci::Accept::key`]), 16 hexadecimal digits.
    #[serde(with = "hexadecimal")]
    pub accept: u64,
    /// The digest.
    #[serde(with = "text")]
    pub digest: Digest,
    /// The media type that the upstream sent.
    #[serde(with = "text")]
    pub media_type: MediaType,
    /// Whether the set lists both index types.
    pub accepts_indexes: bool,
    /// When the request was sent to which the upstream gave this response, in seconds.
    pub at: u64,
    /// Seconds from the first time that the tag was seen to name the digest until `at`. `None`: not known, because a cache of
    /// an earlier version wrote it, or one whose clock differed from the storage's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_for: Option<u64>,
}

impl TagVariant {
    /// This without a time that is in the future.
    fn past(self, now: u64) -> Self {
        if self.at <= now {
            return self;
        }
        Self {
            at: 0,
            seen_for: None,
            ..self
        }
    }

    /// When the digest was first seen, if that is known; negative before the first time that the clock can show.
    fn first_seen_at(&self) -> Option<i128> {
        Some(i128::from(self.at) - i128::from(self.seen_for?))
    }

    /// The later one of two responses for one set of media types. If both name the same digest, it was seen since the earlier
    /// of both first sights.
    fn later(self, other: Self) -> Self {
        let (mut later, earlier) = if rank(&self) >= rank(&other) {
            (self, other)
        } else {
            (other, self)
        };
        // At the time 0 the digest was never seen.
        if later.digest == earlier.digest && earlier.at > 0 {
            let between = later.at.saturating_sub(earlier.at);
            let since_earlier = earlier.seen_for.map(|seen| seen.saturating_add(between));
            later.seen_for = later.seen_for.max(since_earlier);
        }
        later
    }
}

impl TagState {
    /// The tag names this digest.
    pub fn naming(variant: TagVariant) -> Self {
        Self {
            unnamed_at: 0,
            variants: vec![variant],
        }
    }

    /// The tag was deleted or changed at this time.
    pub fn unnamed(at: u64) -> Self {
        Self {
            unnamed_at: at,
            variants: Vec::new(),
        }
    }
}

impl Merge for TagState {
    fn merge(self, other: Self, now: u64) -> Self {
        let unnamed_at = self.unnamed_at.max(other.unnamed_at).min(now);
        let mut variants: Vec<TagVariant> = Vec::new();
        for variant in self.variants.into_iter().chain(other.variants) {
            let variant = variant.past(now);
            if variant.at <= unnamed_at && unnamed_at > 0 {
                continue;
            }
            match variants.iter_mut().find(|known| known.accept == variant.accept) {
                None => variants.push(variant),
                Some(known) => *known = variant.later(known.clone()),
            }
        }
        variants.sort_by_key(|variant| Reverse(rank(variant)));
        variants.truncate(VARIANTS_MAX);
        Self { unnamed_at, variants }
    }

    fn shift(self, by: impl Fn(u64) -> u64) -> Self {
        let moved = |variant: TagVariant| TagVariant {
            at: by(variant.at),
            ..variant
        };
        Self {
            unnamed_at: if self.unnamed_at == 0 {
                0
            } else {
                by(self.unnamed_at)
            },
            variants: self.variants.into_iter().map(moved).collect(),
        }
    }

    fn covers(&self, other: &Self, slack: u64) -> bool {
        let is_older = |known: Option<i128>, seen: Option<i128>| match (known, seen) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(known), Some(seen)) => known <= seen + i128::from(slack),
        };
        let has = |variant: &TagVariant| {
            self.variants.iter().any(|known| {
                (known.accept, known.digest) == (variant.accept, variant.digest)
                    && known.at.saturating_add(slack) >= variant.at
                    && is_older(known.first_seen_at(), variant.first_seen_at())
            })
        };
        self.unnamed_at >= other.unnamed_at && other.variants.iter().all(has)
    }

    fn is_new(&self) -> bool {
        // A deletion is news only for a tag that was recorded.
        !self.variants.is_empty()
    }
}

impl TagState {
    /// This without first sights.
    pub(in crate::shared) fn without_sights(mut self) -> Self {
        for variant in &mut self.variants {
            variant.seen_for = None;
        }
        self
    }

    /// This with every time set.
    pub(in crate::shared) fn at(self, at: u64) -> Self {
        let is_unnamed = self.variants.is_empty();
        Self {
            unnamed_at: if is_unnamed { at } else { 0 },
            ..self.shift(|_| at)
        }
    }
}

/// Order of responses for one set of media types. Within one second any order is right, and all caches choose the same.
fn rank(variant: &TagVariant) -> (u64, Digest, u64) {
    (variant.at, variant.digest, variant.accept)
}

/// That a repository has a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentState {
    /// When the upstream last confirmed it, in seconds; 0 if that is not known. Then it passes no deletion.
    pub at: u64,
    /// When the manifest was deleted; 0 for never. Its children may exist without it.
    pub deleted_at: u64,
    /// The blobs and manifests of the manifest that the upstream was seen to have in the repository.
    #[serde(with = "text_set")]
    pub children: BTreeSet<Digest>,
}

impl ContentState {
    /// Whether the repository has the manifest.
    pub fn is_present(&self) -> bool {
        self.at > self.deleted_at || self.deleted_at == 0
    }
}

impl Merge for ContentState {
    fn merge(self, other: Self, now: u64) -> Self {
        let past = |at: u64| if at > now { 0 } else { at };
        let mut merged = Self {
            at: past(self.at).max(past(other.at)),
            deleted_at: self.deleted_at.max(other.deleted_at).min(now),
            children: self.children,
        };
        merged.children.extend(other.children);
        while merged.children.len() > CHILDREN_MAX {
            merged.children.pop_last();
        }
        merged
    }

    fn shift(self, by: impl Fn(u64) -> u64) -> Self {
        Self {
            at: if self.at == 0 { 0 } else { by(self.at) },
            deleted_at: if self.deleted_at == 0 {
                0
            } else {
                by(self.deleted_at)
            },
            ..self
        }
    }

    fn covers(&self, other: &Self, slack: u64) -> bool {
        // A manifest that was seen again after a deletion is news.
        (self.is_present() || other.at <= self.deleted_at)
            && self.deleted_at >= other.deleted_at
            && self.at.saturating_add(slack) >= other.at
            && other.children.is_subset(&self.children)
    }

    fn is_new(&self) -> bool {
        self.is_present()
    }
}

/// Whether a repository is public.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicState {
    /// When the request without a credential was sent, in seconds.
    pub at: u64,
    /// The upstream served it.
    pub is_public: bool,
}

impl Merge for PublicState {
    fn merge(self, other: Self, now: u64) -> Self {
        // Within one second, a denial counts.
        let is_future = |state: &Self| state.is_public && state.at > now;
        let past = |state: &Self| if is_future(state) { 0 } else { state.at.min(now) };
        let rank = |state: &Self| (past(state), !state.is_public);
        let later = if rank(&self) >= rank(&other) { self } else { other };
        Self {
            at: rank(&later).0,
            ..later
        }
    }

    fn shift(self, by: impl Fn(u64) -> u64) -> Self {
        Self {
            at: by(self.at),
            ..self
        }
    }

    fn covers(&self, other: &Self, slack: u64) -> bool {
        let slack = if other.is_public { slack } else { 0 };
        self.is_public == other.is_public && self.at.saturating_add(slack) >= other.at
    }

    fn is_new(&self) -> bool {
        // Most private repositories were never public, and anyone can request names that do not exist.
        self.is_public
    }
}

mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr,
        D: Deserializer<'de>,
    {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|_| de::Error::custom("not valid"))
    }
}

mod text_set {
    use std::collections::BTreeSet;

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    use crate::oci::Digest;

    pub(super) fn serialize<S: Serializer>(set: &BTreeSet<Digest>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(set.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeSet<Digest>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        let digests = texts.iter().map(|text| text.parse());
        digests
            .collect::<Result<_, _>>()
            .map_err(|_| de::Error::custom("not a digest"))
    }
}

mod hexadecimal {
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
    pub(super) fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:016x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map_err(|_| de::Error::custom("not hexadecimal"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may fail loudly"
    )]
    use proptest::prelude::*;

    use super::*;
    use crate::oci::Algorithm;

    fn digest(number: u8) -> Digest {
        Digest::of(Algorithm::Sha256, &[number])
    }

    fn variant(accept: u64, number: u8, at: u64) -> TagVariant {
        TagVariant {
            accept,
            digest: digest(number),
            media_type: "application/vnd.oci.image.index.v1+json".parse().unwrap(),
            accepts_indexes: true,
            at,
            seen_for: Some(0),
        }
    }

    fn tag_states() -> impl Strategy<Value = TagState> {
        let seen_for = proptest::option::of(0_u64..9);
        let variants = proptest::collection::vec((0_u64..3, 0_u8..3, 1_u64..12, seen_for), 0..3);
        (0_u64..12, variants).prop_map(|(unnamed_at, variants)| {
            let variants = variants
                .into_iter()
                .map(|(accept, number, at, seen_for)| TagVariant {
                    seen_for,
                    ..variant(accept, number, at)
                });
            let state = TagState {
                unnamed_at,
                variants: variants.collect(),
            };
            // One for each set of media types.
            state.clone().merge(state, u64::MAX)
        })
    }

    /// Without the first sights. Those of a digest that the tag named, left and named again depend on the order.
    fn without_first_sights(state: TagState) -> TagState {
        let variants = state.variants.into_iter();
        TagState {
            variants: variants
                .map(|one| TagVariant {
                    seen_for: None,
                    ..one
                })
                .collect(),
            ..state
        }
    }

    fn content_states() -> impl Strategy<Value = ContentState> {
        let children = proptest::collection::btree_set((0_u8..6).prop_map(digest), 0..4);
        (0_u64..12, 0_u64..12, children).prop_map(|(at, deleted_at, children)| ContentState {
            at,
            deleted_at,
            children,
        })
    }

    fn public_states() -> impl Strategy<Value = PublicState> {
        (0_u64..12, any::<bool>()).prop_map(|(at, is_public)| PublicState { at, is_public })
    }

    const NOW: u64 = 10;

    fn laws<S: Merge + std::fmt::Debug>(
        (one, two, three): (&S, &S, &S),
        in_any_order: impl Fn(S) -> S,
    ) -> Result<(), TestCaseError> {
        let merge = |one: &S, other: &S| one.clone().merge(other.clone(), NOW);
        prop_assert_eq!(merge(one, two), merge(two, one));
        let (left, right) = (merge(&merge(one, two), three), merge(one, &merge(two, three)));
        prop_assert_eq!(in_any_order(left), in_any_order(right));
        let both = merge(one, two);
        prop_assert_eq!(merge(&both, one), both.clone());
        prop_assert_eq!(merge(&both, &both), both);
        Ok(())
    }

    proptest! {
        #[test]
        fn order_of_tag_writers_does_not_matter(one in tag_states(), two in tag_states(), three in tag_states()) {
            laws((&one, &two, &three), without_first_sights)?;
        }

        /// A first sight is one that somebody has stated for this digest, or a confirmation, and never in the future.
        #[test]
        fn merge_makes_no_digest_older_than_stated(one in tag_states(), two in tag_states()) {
            let stated: Vec<_> = one.variants.iter().chain(&two.variants).cloned().collect();
            let merged = one.merge(two, NOW);
            for variant in merged.variants.iter().filter(|variant| variant.seen_for.is_some()) {
                let same = stated.iter().filter(|stated| {
                    (stated.accept, stated.digest) == (variant.accept, variant.digest) && stated.at <= NOW
                });
                let earliest = same.filter_map(TagVariant::first_seen_at).min();
                prop_assert!(earliest.is_some() && variant.first_seen_at() >= earliest);
            }
        }

        #[test]
        fn order_of_content_writers_does_not_matter(one in content_states(), two in content_states(), three in content_states()) {
            laws((&one, &two, &three), |state| state)?;
        }

        #[test]
        fn order_of_public_writers_does_not_matter(one in public_states(), two in public_states(), three in public_states()) {
            laws((&one, &two, &three), |state| state)?;
        }
    }

    #[test]
    fn later_response_names_the_digest() {
        let (old, new) = (
            TagState::naming(variant(1, 1, 5)),
            TagState::naming(variant(1, 2, 6)),
        );
        assert_eq!(new.clone().merge(old.clone(), NOW), new);
        assert!(new.covers(&TagState::naming(variant(1, 2, 306)), 300));
        assert!(!new.covers(&TagState::naming(variant(1, 2, 307)), 300));
        assert!(!new.covers(&old, 300), "another digest");
    }

    #[test]
    fn first_sight_of_a_digest_is_kept() {
        let seen = |number, at, seen_for| {
            TagState::naming(TagVariant {
                seen_for,
                ..variant(1, number, at)
            })
        };
        let merged = |one: TagState, other| one.merge(other, NOW).variants[0].seen_for;
        assert_eq!(
            merged(seen(1, 3, Some(0)), seen(1, 9, Some(0))),
            Some(6),
            "confirmed before"
        );
        assert_eq!(merged(seen(1, 3, Some(100)), seen(1, 9, None)), Some(106));
        assert_eq!(merged(seen(1, 3, Some(100)), seen(1, 9, Some(200))), Some(200));
        assert_eq!(
            merged(seen(1, 3, Some(100)), seen(2, 9, Some(1))),
            Some(1),
            "another digest"
        );
        assert_eq!(
            merged(seen(1, NOW + 1, Some(100)), seen(1, 9, Some(1))),
            Some(1),
            "from the future"
        );
        assert_eq!(
            merged(seen(1, 0, Some(0)), seen(1, 9, Some(1))),
            Some(1),
            "never confirmed"
        );
        assert_eq!(
            merged(seen(1, 3, None), seen(1, 9, None)),
            None,
            "by no trusted clock"
        );
        assert_eq!(merged(seen(1, 3, None), seen(1, 9, Some(1))), Some(1));
        assert!(!seen(1, 9, None).covers(&seen(1, 9, Some(0)), 300), "news");
        assert!(seen(1, 9, Some(0)).covers(&seen(1, 9, None), 300));
        assert!(!seen(1, 9, Some(0)).covers(&seen(1, 9, Some(301)), 300), "news");
        assert!(seen(1, 9, Some(0)).covers(&seen(1, 9, Some(300)), 300));
    }

    #[test]
    fn record_of_an_earlier_version_has_no_first_sight() {
        let unseen = TagVariant {
            seen_for: None,
            ..variant(1, 1, 5)
        };
        let earlier = serde_json::to_string(&unseen).unwrap();
        assert!(!earlier.contains("seen_for"), "{earlier}");
        assert_eq!(serde_json::from_str::<TagVariant>(&earlier).unwrap(), unseen);
    }

    #[test]
    fn deleted_tag_names_nothing_until_it_is_seen_again() {
        let named = TagState::naming(variant(1, 1, 5));
        let gone = named.merge(TagState::unnamed(6), NOW);
        assert!(gone.variants.is_empty());
        let late = gone.clone().merge(TagState::naming(variant(1, 1, 6)), NOW);
        assert!(late.variants.is_empty(), "a response from before the deletion");
        let again = gone.merge(TagState::naming(variant(1, 1, 7)), NOW);
        assert_eq!(again.variants, [variant(1, 1, 7)]);
    }

    #[test]
    fn future_time_counts_as_the_oldest() {
        let future = TagState::naming(variant(1, 1, NOW + 1));
        let merged = future.merge(TagState::naming(variant(1, 2, 1)), NOW);
        assert_eq!(merged.variants, [variant(1, 2, 1)]);
        let yes = PublicState {
            at: NOW + 1,
            is_public: true,
        };
        let no = PublicState {
            at: 1,
            is_public: false,
        };
        assert_eq!(yes.merge(no, NOW), no);
    }

    #[test]
    fn future_denial_or_deletion_counts_as_now() {
        let deleted = TagState::unnamed(NOW + 1).merge(TagState::naming(variant(1, 1, 3)), NOW);
        assert_eq!(deleted, TagState::unnamed(NOW));
        let again = deleted.merge(TagState::naming(variant(1, 1, NOW + 2)), NOW + 2);
        assert_eq!(again.variants, [variant(1, 1, NOW + 2)], "seen again later");
        let public = |at, is_public| PublicState { at, is_public };
        let denied = public(NOW + 1, false).merge(public(3, true), NOW);
        assert_eq!(denied, public(NOW, false));
        let content = |at, deleted_at| ContentState {
            at,
            deleted_at,
            children: BTreeSet::new(),
        };
        let deleted = content(0, NOW + 1).merge(content(3, 0), NOW);
        assert_eq!(deleted, content(3, NOW));
        assert!(!deleted.is_present());
        assert!(content(0, 0).is_present(), "served from a disk");
        assert!(!content(0, 0).merge(content(5, 6), NOW).is_present());
    }

    #[test]
    fn records_round_trip_through_json() {
        let tag = TagState::naming(variant(u64::MAX, 1, 5));
        let text = serde_json::to_string(&tag).unwrap();
        assert!(text.contains("\"ffffffffffffffff\""), "{text}");
        assert_eq!(serde_json::from_str::<TagState>(&text).unwrap(), tag);
        let content = ContentState {
            at: 1,
            deleted_at: 0,
            children: [digest(1), digest(2)].into(),
        };
        let text = serde_json::to_string(&content).unwrap();
        assert_eq!(serde_json::from_str::<ContentState>(&text).unwrap(), content);
        assert!(
            serde_json::from_str::<ContentState>("{\"at\":1,\"deleted_at\":0,\"children\":[\"x\"]}").is_err()
        );
    }

    #[test]
    fn record_of_many_parts_is_bounded() {
        let children: BTreeSet<_> = (0_u32..3000)
            .map(|number| Digest::of(Algorithm::Sha512, &number.to_be_bytes()))
            .collect();
        let content = ContentState {
            at: 1,
            deleted_at: 0,
            children,
        };
        let merged = content.clone().merge(content, NOW);
        assert_eq!(merged.children.len(), CHILDREN_MAX);
        let bytes = serde_json::to_vec(&merged).unwrap();
        assert!(bytes.len() < super::super::key::RECORD_BYTES_MAX);
    }
}
