//! The copies of a manifest that this client could be given.

use std::sync::Arc;
use std::time::SystemTime;

use super::{Context, Pull, Request, Site};
use crate::oci::{AnyDigest, Digest, Repository, Tag};
use crate::policy::rules::Rule;
use crate::policy::{Held, Holding, Rest, Situation, Subject};
use crate::store::manifests::HeldManifest;
use crate::store::refs::{Named, TagKey, TagReader};

/// A manifest in the store, and when the upstream last confirmed that the tag names it.
#[derive(Clone)]
pub(super) struct Copy {
    pub(super) manifest: Arc<HeldManifest>,
    pub(super) confirmed_at: SystemTime,
}

/// What could be served: the newest copy, and where that is not whole, the last one that is.
pub(super) struct Copies {
    pub(super) newest: Copy,
    /// Whether the tag was seen to name something else since the newest copy was confirmed.
    is_moved: bool,
    pub(super) rest: Rest,
    pub(super) earlier: Option<Copy>,
    /// Whether a write may have changed upstream what the newest is named by.
    pub(super) is_in_doubt: bool,
}

impl Copies {
    /// As the decision sees it.
    pub(super) fn held(&self) -> Held {
        Held {
            digest: self.newest.manifest.digest,
            confirmed_at: self.newest.confirmed_at,
            is_moved: self.is_moved,
            rest: self.rest,
            is_in_doubt: self.is_in_doubt,
        }
    }

    /// The same of an index that only lists manifests: each is asked for by itself, by those who want it.
    pub(super) fn of_list(self) -> Self {
        Self {
            rest: Rest::Held,
            earlier: None,
            ..self
        }
    }

    /// The copy that is whole, if there is one: the image that would be served instead of one that cannot be had.
    pub(super) fn whole(&self) -> Option<&Copy> {
        match self.rest {
            Rest::Held => Some(&self.newest),
            Rest::Missing { .. } => self.earlier.as_ref(),
        }
    }
}

impl Pull {
    /// The copies of a tag for this reader, in the order of [`crate::store::refs::newest`].
    pub(super) fn copies_of_tag(
        &self,
        site: &Site,
        repository: &Repository,
        tag: &Tag,
        reader: TagReader<'_>,
    ) -> Option<Copies> {
        let key = TagKey {
            upstream: site.name().into(),
            repository: repository.clone(),
            tag: tag.clone(),
        };
        let record = self.cached(site, &format_args!("{repository}:{tag}"), self.store.tag(&key))?;
        let named = self.store.named(&key, &record, reader)?;
        let newest = self.copy(site, repository, &named)?;
        let is_moved = named.is_moved;
        let is_in_doubt = self.is_in_doubt(site, repository, tag.clone().into())
            || self.is_in_doubt(site, repository, newest.manifest.digest.into());
        if self.is_whole(site, repository, &newest.manifest) {
            return Some(Copies {
                newest,
                is_moved,
                rest: Rest::Held,
                earlier: None,
                is_in_doubt,
            });
        }
        let is_whole = |manifest: &HeldManifest| self.is_whole(site, repository, manifest);
        let complete = self.store.last_complete(&record, reader, &is_whole);
        let earlier = complete.and_then(|named| self.copy(site, repository, &named));
        Some(Copies {
            newest,
            is_moved,
            rest: Rest::Missing {
                earlier: earlier.as_ref().map(|copy| copy.confirmed_at),
            },
            earlier,
            is_in_doubt,
        })
    }

    fn copy(&self, site: &Site, repository: &Repository, named: &Named) -> Option<Copy> {
        let manifest = self.cached_manifest(site, repository, &named.digest)?;
        let confirmed_at = named.confirmed_at;
        Some(Copy {
            manifest,
            confirmed_at,
        })
    }

    /// The copy of a manifest asked for by digest.
    pub(super) fn copy_of_digest(
        &self,
        site: &Site,
        repository: &Repository,
        digest: &Digest,
        now: SystemTime,
    ) -> Option<Copies> {
        let manifest = self.cached_manifest(site, repository, digest)?;
        let rest = if self.is_whole(site, repository, &manifest) {
            Rest::Held
        } else {
            Rest::Missing { earlier: None }
        };
        let newest = Copy {
            manifest,
            confirmed_at: now,
        };
        Some(Copies {
            newest,
            is_moved: false,
            rest,
            earlier: None,
            is_in_doubt: self.is_in_doubt(site, repository, (*digest).into()),
        })
    }

    pub(super) fn digest_situation(
        &self,
        site: &Site,
        context: &Context,
        rule: &Rule,
        repository: &Repository,
        digest: &AnyDigest,
        now: SystemTime,
    ) -> Situation {
        let copies = match digest {
            AnyDigest::Known(digest) => self.copy_of_digest(site, repository, digest, now),
            AnyDigest::Foreign(_) => None,
        };
        let seen = self.seen(site, repository, digest);
        let held = copies.as_ref().map(Copies::held);
        context.situation(rule, Subject::Manifest, held, seen, now)
    }

    /// How much is held of what an upstream named.
    pub(super) fn holding(&self, site: &Site, repository: &Repository, digest: &Digest) -> Holding {
        if !self.store.has_seen(site.name(), repository, digest) {
            return Holding::Nothing;
        }
        match self.cached_manifest(site, repository, digest) {
            Some(manifest) if self.is_whole(site, repository, &manifest) => Holding::Whole,
            Some(_) => Holding::Manifest,
            None => Holding::Nothing,
        }
    }

    /// Whether this blob is arriving, for this repository or for one that has it as well.
    pub(super) fn is_arriving(&self, site: &Site, repository: &Repository, digest: &Digest) -> bool {
        let is_here = || {
            self.arriving.is_in(site, repository, *digest)
                || self.store.has_seen(site.name(), repository, digest)
        };
        self.downloads.is_arriving(digest) && is_here()
    }

    /// Whether the image can be pulled whole without another word of the upstream.
    pub(super) fn is_whole(&self, site: &Site, repository: &Repository, manifest: &HeldManifest) -> bool {
        let arriving = |digest: &Digest| self.is_arriving(site, repository, digest);
        self.store.is_whole(site.name(), repository, manifest, &arriving)
    }
}

impl Request {
    /// The tag asked for, if it is one.
    pub(super) fn tag(&self) -> Option<&Tag> {
        use crate::oci::{Operation, Reference};
        match &self.operation {
            Operation::Manifest {
                reference: Reference::Tag(tag),
                ..
            } => Some(tag),
            _ => None,
        }
    }
}
