//! The copies of a manifest that this client could be given.

use std::sync::Arc;
use std::time::SystemTime;

use super::cache_view::CacheView;
use super::{AuthContext, ProxyService, Request, UpstreamRegistry};
use crate::oci::{Accept, AnyDigest, Digest, Repository, Tag};
use crate::policy::rules::EffectivePolicy;
use crate::policy::{CacheState, CachedEntry, Completeness, ContentKind, Presence};
use crate::store::manifests::StoredManifest;
use crate::store::tags::{ResolvedTag, TagKey, TagReader};

/// A manifest in the store, and when the upstream last confirmed that the tag names it.
#[derive(Clone)]
pub(super) struct CachedManifest {
    pub(super) manifest: Arc<StoredManifest>,
    pub(super) confirmed_at: SystemTime,
}

/// What could be served: the newest copy, and where that is not whole, the last one that is.
pub(super) struct Candidates {
    pub(super) newest: CachedManifest,
    /// Whether the tag was seen to name something else since the newest copy was confirmed.
    is_moved: bool,
    pub(super) completeness: Completeness,
    pub(super) earlier: Option<CachedManifest>,
    /// Whether a write may have changed upstream what the newest is named by.
    pub(super) is_invalidated: bool,
}

impl Candidates {
    /// As the decision sees it.
    pub(super) fn held(&self) -> CachedEntry {
        CachedEntry {
            digest: self.newest.manifest.digest,
            confirmed_at: self.newest.confirmed_at,
            is_moved: self.is_moved,
            completeness: self.completeness,
            is_invalidated: self.is_invalidated,
        }
    }

    /// The same of an index that only lists manifests: each is asked for by itself, by those who want it.
    pub(super) fn of_list(self) -> Self {
        Self {
            completeness: Completeness::Complete,
            earlier: None,
            ..self
        }
    }

    /// The copy that is whole, if there is one: the image that would be served instead of one that cannot be had.
    pub(super) fn whole(&self) -> Option<&CachedManifest> {
        match self.completeness {
            Completeness::Complete => Some(&self.newest),
            Completeness::Incomplete { .. } => self.earlier.as_ref(),
        }
    }
}

impl ProxyService {
    /// The copies of a tag for a client that takes `accept`, or for the operator (`None`).
    pub(super) async fn copies_of_tag(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        tag: &Tag,
        accept: Option<&Accept>,
    ) -> Option<Candidates> {
        let key = TagKey {
            upstream: site.name().into(),
            repository: repository.clone(),
            tag: tag.clone(),
        };
        let accept = accept.cloned();
        self.look_up(site, repository, move |cached| {
            let reader = accept.as_ref().map_or(TagReader::Operator, TagReader::Client);
            cached.copies_of_tag(&key, reader)
        })
        .await
    }

    /// The copy of a manifest asked for by digest, and whether the digest was seen in the repository.
    pub(super) async fn copy_of_digest(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: &Digest,
        now: SystemTime,
    ) -> (Option<Candidates>, bool) {
        let digest = *digest;
        self.look_up(site, repository, move |cached| {
            (cached.copy_of_digest(&digest, now), cached.is_member(&digest))
        })
        .await
    }

    pub(super) async fn digest_situation(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        (context, rule): (&AuthContext, &EffectivePolicy),
        repository: &Repository,
        digest: &AnyDigest,
        now: SystemTime,
    ) -> CacheState {
        let (copies, seen) = match digest {
            AnyDigest::Supported(digest) => self.copy_of_digest(site, repository, digest, now).await,
            AnyDigest::Unsupported(_) => (None, false),
        };
        let held = copies.as_ref().map(Candidates::held);
        context.situation(rule, ContentKind::Manifest, held, seen, now)
    }

    /// How much is held of what an upstream named.
    pub(super) async fn holding(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: &Digest,
    ) -> Presence {
        let digest = *digest;
        self.look_up(site, repository, move |cached| cached.holding(&digest))
            .await
    }

    /// Whether the image can be pulled whole without another word of the upstream.
    pub(super) async fn is_whole(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        manifest: &Arc<StoredManifest>,
    ) -> bool {
        let manifest = Arc::clone(manifest);
        self.look_up(site, repository, move |cached| cached.is_whole(&manifest))
            .await
    }
}

impl CacheView<'_> {
    /// The copies of a tag for this reader, in the order of [`crate::store::tags::newest`].
    fn copies_of_tag(&self, key: &TagKey, reader: TagReader<'_>) -> Option<Candidates> {
        let Self {
            pull,
            view,
            site,
            repository,
        } = *self;
        let image = format_args!("{repository}:{}", key.tag);
        let record = pull.cached(site, &image, view.tag(key))?;
        let named = view.resolve_tag(key, &record, reader)?;
        let newest = self.copy(&named)?;
        let is_moved = named.is_moved;
        let is_invalidated = pull.is_invalidated(site, repository, key.tag.clone().into())
            || pull.is_invalidated(site, repository, newest.manifest.digest.into());
        if self.is_whole(&newest.manifest) {
            return Some(Candidates {
                newest,
                is_moved,
                completeness: Completeness::Complete,
                earlier: None,
                is_invalidated,
            });
        }
        let is_whole = |manifest: &StoredManifest| self.is_whole(manifest);
        let complete = view.last_complete(&record, reader, &is_whole);
        let earlier = complete.and_then(|named| self.copy(&named));
        Some(Candidates {
            newest,
            is_moved,
            completeness: Completeness::Incomplete {
                previous: earlier.as_ref().map(|copy| copy.confirmed_at),
            },
            earlier,
            is_invalidated,
        })
    }

    fn copy(&self, named: &ResolvedTag) -> Option<CachedManifest> {
        let manifest = self.manifest(&named.digest)?;
        let confirmed_at = named.confirmed_at;
        Some(CachedManifest {
            manifest,
            confirmed_at,
        })
    }

    fn copy_of_digest(&self, digest: &Digest, now: SystemTime) -> Option<Candidates> {
        let manifest = self.manifest(digest)?;
        let rest = if self.is_whole(&manifest) {
            Completeness::Complete
        } else {
            Completeness::Incomplete { previous: None }
        };
        let newest = CachedManifest {
            manifest,
            confirmed_at: now,
        };
        Some(Candidates {
            newest,
            is_moved: false,
            completeness: rest,
            earlier: None,
            is_invalidated: self
                .pull
                .is_invalidated(self.site, self.repository, (*digest).into()),
        })
    }

    fn holding(&self, digest: &Digest) -> Presence {
        if !self.is_member(digest) {
            return Presence::None;
        }
        match self.manifest(digest) {
            Some(manifest) if self.is_whole(&manifest) => Presence::Complete,
            Some(_) => Presence::ManifestOnly,
            None => Presence::None,
        }
    }

    /// Whether this blob is arriving, for this repository or for one that has it as well.
    pub(super) fn is_arriving(&self, digest: &Digest) -> bool {
        let is_here =
            || self.pull.arriving.is_in(self.site, self.repository, *digest) || self.is_member(digest);
        self.pull.downloads.is_arriving(digest) && is_here()
    }

    pub(super) fn is_whole(&self, manifest: &StoredManifest) -> bool {
        let arriving = |digest: &Digest| self.is_arriving(digest);
        self.view
            .is_image_complete(self.site.name(), self.repository, manifest, &arriving)
    }
}

impl Request {
    /// The tag asked for, if it is one.
    pub(super) fn tag(&self) -> Option<&Tag> {
        use crate::oci::{Endpoint, Reference};
        match &self.endpoint {
            Endpoint::Manifest {
                reference: Reference::Tag(tag),
                ..
            } => Some(tag),
            _ => None,
        }
    }
}
