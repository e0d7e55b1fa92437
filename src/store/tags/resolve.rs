//! The image that a tag names: the choice among the upstream's responses to clients with different `Accept` sets.
//!
//! A registry answers a tag by what the client accepts: with an index those that take indexes, with one image of it those
//! that do not. A [`TagRecord`] keeps one variant per set. All readers of a tag (a pull, `why`, `ls`, `show`, an export, a
//! refresh) choose among them here, so that they mean the same image. The rules:
//!
//! 1. *Order.* Of two variants the *later* one was confirmed later; if at the same time, it began later to name its
//!    digest; if that is equal too, its digest is the greater one.
//! 2. *Substitute.* An image that was given to a set which does not list both types of index may stand for an index. Any
//!    other response names what the tag itself names.
//! 3. *Outdated.* A later variant outdates an earlier one of another digest: the tag has moved in between. It does not
//!    if both are true of one state of the tag: one is an index, the other a substitute, and the substitute is one of the
//!    index's images. Where the index is not cached, its images are not known; the tag is then taken to have moved if the
//!    later variant began to name its digest after the earlier one was confirmed.
//! 4. *Choice.* Of the cached variants that the client accepts, those that another of them outdates are left out. What
//!    remains names at most two digests, an index and a substitute. A client that lists the index's type is given the
//!    index. Any other is given the kind that the upstream last gave to its set, and the index where it gave none. Of
//!    what then remains, the latest.
//! 5. *Moved.* The choice may be older than what is known of the tag: what outdates it is not cached, or not acceptable
//!    to this client. It is then served in an outage, but it is not fresh.
//!
//! The last complete image is chosen by the same rules among the complete ones, with those that the tag named before.

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
    /// The operator: every type will do, and an index is what a client of today is given.
    Operator,
}

/// What a tag names for a reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedTag {
    /// Which image.
    pub digest: Digest,
    /// As the upstream named it.
    pub media_type: MediaType,
    /// When the upstream last confirmed it.
    pub confirmed_at: SystemTime,
    /// Whether the tag was seen to name something else since.
    pub is_moved: bool,
}

/// Whether an index lists an image; `None` where the index is not cached.
pub(super) type Lists<'a> = &'a dyn Fn(&Digest, &Digest) -> Option<bool>;

/// Whether an image comes into question.
pub(super) type Eligible<'a> = &'a dyn Fn(&Digest) -> bool;

/// One response, now or before, as the choice sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Response<'a> {
    digest: &'a Digest,
    media_type: &'a MediaType,
    accept: u64,
    confirmed_at: SystemTime,
    /// When it began to name this digest, as far as known.
    since: SystemTime,
    may_be_substitute: bool,
}

impl TagRecord {
    /// What the tag names for this reader, among what is `eligible`: what is cached.
    pub(super) fn newest(
        &self,
        reader: TagReader<'_>,
        lists: Lists<'_>,
        eligible: Eligible<'_>,
    ) -> Option<ResolvedTag> {
        let responses = self.variants.iter().map(Response::of);
        self.choose(responses.collect(), reader, lists, eligible)
    }

    /// The same among what the tag named before, too: for what is complete.
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
        let stands = |one: &&Response<'_>| !responses.iter().any(|other| other.outdates(one, lists));
        let standing = responses.iter().filter(stands);
        let given = self.kind_given(reader);
        let chosen = standing.max_by_key(|one| (one.preference(reader, given), one.order()))?;
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

    /// Whether the upstream last gave an index to this reader's set.
    fn kind_given(&self, reader: TagReader<'_>) -> Option<bool> {
        let TagReader::Client(accept) = reader else {
            return None;
        };
        let own = self
            .variants
            .iter()
            .find(|variant| variant.accept == accept.key());
        own.map(|own| own.media_type.is_index())
    }
}

impl<'a> Response<'a> {
    fn of(variant: &'a Variant) -> Self {
        Self {
            digest: &variant.digest,
            media_type: &variant.media_type,
            accept: variant.accept,
            confirmed_at: variant.confirmed_at,
            // Later only where the clock was set back.
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

    /// How well its kind suits the reader, whose set was last `given` an index or not.
    fn preference(&self, reader: TagReader<'_>, given: Option<bool>) -> u8 {
        let is_index = self.media_type.is_index();
        match reader {
            TagReader::Client(accept) if is_index && accept.lists(self.media_type) => 2,
            TagReader::Client(_) | TagReader::Operator => u8::from(is_index == given.unwrap_or(true)),
        }
    }

    /// Whether the tag has moved from `previous` to this.
    fn outdates(&self, previous: &Self, lists: Lists<'_>) -> bool {
        if self.digest == previous.digest || self.order() <= previous.order() {
            return false;
        }
        let is_one_of = |index: &Self, image: &Self| {
            (index.media_type.is_index() && image.may_be_substitute)
                .then(|| lists(index.digest, image.digest))
        };
        match is_one_of(self, previous).or_else(|| is_one_of(previous, self)) {
            None => true,
            Some(Some(is_listed)) => !is_listed,
            Some(None) => self.since > previous.confirmed_at,
        }
    }
}
