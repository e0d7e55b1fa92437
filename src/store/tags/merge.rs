//! Merges an upstream response into a tag record.
//!
//! Responses can arrive out of order. A response states what the tag pointed to at some moment between its request and
//! its arrival, so a variant counts as confirmed when the request was sent (RFC 9111 §4.2.3). A slow response with a
//! digest that the tag had before does therefore not replace the response to a later request. A digest that is new for
//! the tag counts from the arrival of the response, because it proves that the tag has moved.
//!
//! No time in a record should be later than the arrival of its last response. If one is, the clock was set back. Such
//! confirmations are then moved to just before the request of this response, in their order.

use std::cmp::Reverse;
use std::time::{Duration, SystemTime};

use super::record::{HISTORY_MAX, HistoryEntry, NEVER_CONFIRMED, Previous, TagRecord, VARIANTS_MAX, Variant};
use crate::oci::Digest;
use crate::store::checksummed_json::{from_millis, to_millis};

/// Time resolution of a tag file.
const TICK: Duration = Duration::from_millis(1);

impl TagRecord {
    /// This record after a response that arrived at `received_at`; `variant.confirmed_at` is when its request was sent.
    /// `None` if a later request with the same `Accept` set already got another digest.
    pub(super) fn with_response(
        &self,
        mut variant: Variant,
        received_at: SystemTime,
        is_complete: &dyn Fn(&Digest) -> bool,
    ) -> Option<Self> {
        let same_set = |old: &&Variant| old.accept == variant.accept;
        if variant.confirmed_at == NEVER_CONFIRMED {
            // A tag set by the operator applies to all sets of accepted media types.
            let before = self.variants.iter().find(same_set);
            let variant = before.map_or(variant.clone(), |before| variant.replacing(before, is_complete));
            return Some(Self {
                variants: vec![variant],
            });
        }
        let received_at = in_millis(received_at);
        let requested_at = in_millis(variant.confirmed_at).min(received_at);
        variant.confirmed_at = if self.has_pointed_to(&variant.digest) {
            requested_at
        } else {
            received_at
        };
        variant.first_seen_at = in_millis(variant.first_seen_at);
        let mut others = self.not_after(received_at, requested_at);
        if let Some(at) = others.iter().position(|old| same_set(&old)) {
            let before = others.remove(at);
            if before.digest == variant.digest {
                if before.confirmed_at > variant.confirmed_at {
                    (variant.confirmed_at, variant.is_by_record) = (before.confirmed_at, before.is_by_record);
                }
            } else if before.confirmed_at > variant.confirmed_at {
                return None;
            }
            variant = variant.replacing(&before, is_complete);
        }
        others.insert(0, variant);
        Some(Self::from_variants(others))
    }

    /// At most [`VARIANTS_MAX`] of these variants, the last confirmed first. Of variants with the same digest, the
    /// older ones are dropped first, so that a client that sends many `Accept` sets does not displace the digests that
    /// other sets got.
    pub(super) fn from_variants(mut variants: Vec<Variant>) -> Self {
        variants.sort_by_key(|variant| Reverse(variant.confirmed_at));
        while variants.len() > VARIANTS_MAX {
            let is_repeated = |at: &usize| {
                let (newer, rest) = variants.split_at(*at);
                let names = |one: &Variant| newer.iter().any(|other| other.digest == one.digest);
                rest.first().is_some_and(names)
            };
            let repeated = (0..variants.len()).rev().find(is_repeated);
            variants.remove(repeated.unwrap_or(VARIANTS_MAX));
        }
        // Most tags have one, and it stays in memory.
        variants.shrink_to_fit();
        Self { variants }
    }

    /// Whether the tag has pointed to this digest, now or before.
    pub fn has_pointed_to(&self, digest: &Digest) -> bool {
        self.variants.iter().any(|variant| {
            let previous = variant.previous.iter().map(|previous| &previous.digest);
            let past = variant.history.iter().map(|past| &past.digest);
            variant.digest == *digest || previous.chain(past).any(|named| named == digest)
        })
    }

    /// The variants, with confirmations after `received_at` moved to just before `requested_at`.
    fn not_after(&self, received_at: SystemTime, requested_at: SystemTime) -> Vec<Variant> {
        let mut variants = self.variants.clone();
        variants.sort_by_key(|variant| Reverse(variant.confirmed_at));
        let mut latest = requested_at;
        for variant in &mut variants {
            if variant.confirmed_at > received_at {
                latest = latest.checked_sub(TICK).unwrap_or(NEVER_CONFIRMED);
                variant.confirmed_at = latest;
                variant.first_seen_at = variant.first_seen_at.min(latest);
                if let Some(previous) = &mut variant.previous {
                    previous.confirmed_at = previous.confirmed_at.min(latest);
                }
            }
        }
        variants
    }
}

impl Variant {
    /// This variant in place of `before`. While it is not `is_complete`, it keeps a reference to a previous complete
    /// image.
    fn replacing(mut self, before: &Self, is_complete: &dyn Fn(&Digest) -> bool) -> Self {
        if self.digest == before.digest {
            self.first_seen_at = before.first_seen_at;
        }
        self.history.clone_from(&before.history);
        if self.digest != before.digest {
            let past = HistoryEntry {
                digest: before.digest,
                first_seen_at: before.first_seen_at,
                confirmed_at: before.confirmed_at,
            };
            self.history.insert(0, past);
            self.history.truncate(HISTORY_MAX);
        }
        self.previous = if is_complete(&self.digest) {
            None
        } else if before.digest != self.digest && is_complete(&before.digest) {
            Some(Previous {
                digest: before.digest,
                media_type: before.media_type.clone(),
                confirmed_at: before.confirmed_at,
            })
        } else {
            let other = |previous: &Previous| previous.digest != self.digest;
            before.previous.clone().filter(other)
        };
        self
    }
}

/// Rounds to the resolution of a tag file.
fn in_millis(time: SystemTime) -> SystemTime {
    from_millis(to_millis(time))
}
