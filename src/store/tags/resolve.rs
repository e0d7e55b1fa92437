//! Resolves a tag to one image, among the upstream's responses to clients with different `Accept` sets.
//!
//! A registry's response for a tag depends on what the client accepts: clients that accept indexes get the index,
//! others get one image of it. A [`TagRecord`] stores one variant per set. All readers of a tag (a pull, `why`, `ls`,
//! `show`, an export, a refresh) resolve it here, so that they agree on the image. The rules:
//!
//! 1. *Order.* Of two variants, the *later* one was confirmed later; on a tie, it first had its digest later; on a
//!    further tie, its digest is the greater one.
//! 2. *Substitute.* An image that was sent to a set which does not list both index types may be a substitute for an
//!    index. Any other response is what the tag itself points to.
//! 3. *Outdated.* A later variant outdates an earlier one with another digest, because the tag has moved in between.
//!    Exception: one is an index, the other a substitute, and the substitute is one of the index's images. If the index
//!    is not cached, its images are unknown; the tag is then assumed to have moved if the later variant first had its
//!    digest after the earlier one was confirmed.
//! 4. *Choice.* Candidates are the cached variants that the client accepts and that no other candidate outdates. They
//!    have at most two digests, an index and a substitute. A client that lists the index's type gets the index. Any
//!    other client gets the kind that the upstream last sent to its set, or the index if it sent none. Among the rest,
//!    the latest wins.
//! 5. *Moved.* The chosen variant may be outdated by one that is not cached or that the client does not accept. It is
//!    then served in an outage, but it is not fresh.
//!
//! The last complete image is chosen by the same rules among the complete ones, including previous images.

use std::time::SystemTime;

use super::record::{Previous, TagRecord, Variant};
use crate::oci::{Accept, Digest, MediaType};

#[cfg(test)]
mod tests;

/// The reader of a tag.
#[derive(Clone, Copy, Debug)]
pub enum TagReader<'a> {
    /// A client that accepts these types.
    Client(&'a Accept),
    /// The operator: accepts every type and prefers the index.
    Operator,
}

/// The image that a tag resolves to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedTag {
    /// The digest.
    pub digest: Digest,
    /// The media type that the upstream sent.
    pub media_type: MediaType,
    /// When the upstream last confirmed it.
    pub confirmed_at: SystemTime,
    /// Whether the tag is known to have moved since.
    pub is_moved: bool,
}

/// Whether an index lists an image; `None` where the index is not cached.
pub(super) type Lists<'a> = &'a dyn Fn(&Digest, &Digest) -> Option<bool>;

/// Whether an image is a candidate.
pub(super) type Eligible<'a> = &'a dyn Fn(&Digest) -> bool;

/// A current or previous response of the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Response<'a> {
    digest: &'a Digest,
    media_type: &'a MediaType,
    accept: u64,
    confirmed_at: SystemTime,
    /// When the tag first had this digest, as far as known.
    since: SystemTime,
    may_be_substitute: bool,
}

impl TagRecord {
    /// The image for this reader, among the `eligible` (cached) ones.
    pub(super) fn newest(
        &self,
        reader: TagReader<'_>,
        lists: Lists<'_>,
        eligible: Eligible<'_>,
    ) -> Option<ResolvedTag> {
        let responses = self.variants.iter().map(Response::of);
        self.choose(responses.collect(), reader, lists, eligible)
    }

    /// As [`Self::newest`], including previous images; used with completeness as the filter.
    pub(super) fn newest_or_previous(
        &self,
        reader: TagReader<'_>,
        lists: Lists<'_>,
        eligible: Eligible<'_>,
    ) -> Option<ResolvedTag> {
        let before = self.variants.iter().filter_map(|variant| {
            let previous = variant.previous.as_ref()?;
            Some(Response::before(variant, previous))
        });
        let responses = self.variants.iter().map(Response::of).chain(before);
        self.choose(responses.collect(), reader, lists, eligible)
    }

    fn choose(
        &self,
        mut responses: Vec<Response<'_>>,
        reader: TagReader<'_>,
        lists: Lists<'_>,
        eligible: Eligible<'_>,
    ) -> Option<ResolvedTag> {
        responses.retain(|response| response.is_for(reader) && eligible(response.digest));
        let is_current = |one: &&Response<'_>| !responses.iter().any(|other| other.outdates(one, lists));
        let current = responses.iter().filter(is_current);
        let sent_index = self.last_sent_index(reader);
        let chosen = current.max_by_key(|one| (one.preference(reader, sent_index), one.order()))?;
        let is_moved = self
            .variants
            .iter()
            .map(Response::of)
            .any(|other| other.outdates(chosen, lists));
        Some(ResolvedTag {
            digest: *chosen.digest,
            media_type: chosen.media_type.clone(),
            confirmed_at: chosen.confirmed_at,
            is_moved,
        })
    }

    /// Whether the upstream last sent an index to this reader's set.
    fn last_sent_index(&self, reader: TagReader<'_>) -> Option<bool> {
        let TagReader::Client(accept) = reader else {
            return None;
        };
        let same_set = self
            .variants
            .iter()
            .find(|variant| variant.accept == accept.key());
        same_set.map(|same_set| same_set.media_type.is_index())
    }
}

impl<'a> Response<'a> {
    fn of(variant: &'a Variant) -> Self {
        Self {
            digest: &variant.digest,
            media_type: &variant.media_type,
            accept: variant.accept,
            confirmed_at: variant.confirmed_at,
            // `first_seen_at` is later only if the clock was set back.
            since: variant.first_seen_at.min(variant.confirmed_at),
            may_be_substitute: !variant.accepts_indexes && !variant.media_type.is_index(),
        }
    }

    fn before(variant: &'a Variant, previous: &'a Previous) -> Self {
        Self {
            digest: &previous.digest,
            media_type: &previous.media_type,
            accept: variant.accept,
            confirmed_at: previous.confirmed_at,
            since: previous.confirmed_at,
            may_be_substitute: !variant.accepts_indexes && !previous.media_type.is_index(),
        }
    }

    fn order(&self) -> (SystemTime, SystemTime, &Digest, bool) {
        (
            self.confirmed_at,
            self.since,
            self.digest,
            !self.may_be_substitute,
        )
    }

    fn is_for(&self, reader: TagReader<'_>) -> bool {
        match reader {
            TagReader::Client(accept) => self.accept == accept.key() || accept.accepts(self.media_type),
            TagReader::Operator => true,
        }
    }

    /// Preference of the reader for this kind; `sent_index` is whether its set last got an index.
    fn preference(&self, reader: TagReader<'_>, sent_index: Option<bool>) -> u8 {
        let is_index = self.media_type.is_index();
        match reader {
            TagReader::Client(accept) if is_index && accept.lists(self.media_type) => 2,
            TagReader::Client(_) | TagReader::Operator => u8::from(is_index == sent_index.unwrap_or(true)),
        }
    }

    /// Whether the tag has moved from `earlier` to this.
    fn outdates(&self, earlier: &Self, lists: Lists<'_>) -> bool {
        if self.digest == earlier.digest || self.order() <= earlier.order() {
            return false;
        }
        let is_one_of = |index: &Self, image: &Self| {
            (index.media_type.is_index() && image.may_be_substitute)
                .then(|| lists(index.digest, image.digest))
        };
        match is_one_of(self, earlier).or_else(|| is_one_of(earlier, self)) {
            None => true,
            Some(Some(is_listed)) => !is_listed,
            Some(None) => self.since > earlier.confirmed_at,
        }
    }
}
