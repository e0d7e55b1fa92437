//! Evidence for the decision about a manifest: the cached manifests that may be served, read from the store.
//!
//! A read error is logged and counts as a miss.

use std::fmt::Display;
use std::sync::Arc;
use std::time::SystemTime;

use super::pipeline::ReadContext;
use super::{ProxyService, UpstreamRegistry};
use crate::oci::{Accept, AnyDigest, Digest, Repository, Tag};
use crate::policy::{AgeFacts, CacheState, CachedEntry, Completeness, ContentKind, Presence};
use crate::store::manifests::StoredManifest;
use crate::store::tags::{ResolvedTag, TagKey, TagReader};
use crate::store::{StoreError, View};

/// The state of a request for a manifest, and the cached manifests that it describes.
pub(super) struct Evidence {
    pub(super) state: CacheState,
    pub(super) candidates: Option<Candidates>,
}

impl Evidence {
    /// `state` with these candidates for its tag.
    pub(super) fn of_tag(state: &CacheState, (candidates, cooling): TagFacts) -> Self {
        let state = CacheState {
            cached: candidates.as_ref().map(Candidates::entry),
            blocked: candidates.as_ref().and_then(Candidates::blocked),
            cooling,
            ..*state
        };
        Self { state, candidates }
    }
}

/// Client for which the image of a tag is chosen. A registry's response depends on both.
#[derive(Clone)]
pub(super) struct TagClient {
    pub(super) accept: Accept,
    pub(super) principal: [u8; 32],
}

impl TagClient {
    pub(super) fn reader(client: Option<&Self>) -> TagReader<'_> {
        client.map_or(TagReader::Operator, |client| TagReader::Client(&client.accept))
    }
}

/// The candidates for a tag, and whether they are old enough if a minimum age applies.
pub(super) type TagFacts = (Option<Candidates>, Option<AgeFacts>);

impl ReadContext<'_> {
    /// Evidence for a tag and this client, or for the operator (`None`).
    pub(super) async fn tag_evidence(&self, tag: &Tag, client: Option<TagClient>) -> Evidence {
        let facts = self.tag_facts(tag, client, self.request.now).await;
        Evidence::of_tag(&self.state(ContentKind::Tag, None, true), facts)
    }

    /// Candidates for a tag and this client, or for the operator (`None`). If a minimum age applies, they begin with the
    /// newest manifest that is old enough, or with one that is too young if there is no other.
    pub(super) async fn tag_facts(&self, tag: &Tag, client: Option<TagClient>, now: SystemTime) -> TagFacts {
        let registry = &self.request.registry;
        let key = TagKey {
            upstream: registry.shared_name(),
            repository: self.repository.clone(),
            tag: tag.clone(),
        };
        let (limit, now) = (self.rule.age_limit, registry.checked_time().bound(now));
        self.proxy
            .read_cache(registry, self.repository, move |cached| {
                if limit.is_on() {
                    cached.mature_candidates(&key, client.as_ref(), &limit, now)
                } else {
                    let reader = TagClient::reader(client.as_ref());
                    (cached.candidates_for_tag(&key, reader), None)
                }
            })
            .await
    }

    /// The client for which the image of a tag is chosen.
    pub(super) fn tag_client(&self) -> TagClient {
        TagClient {
            accept: self.request.accept.clone(),
            principal: self.caller.principal,
        }
    }

    /// Evidence for the manifest of this digest.
    pub(super) async fn digest_evidence(&self, digest: &AnyDigest) -> Evidence {
        let (candidates, is_in_repository) = match digest {
            AnyDigest::Supported(digest) => self.candidate_for_digest(*digest).await,
            AnyDigest::Unsupported(_) => (None, false),
        };
        let entry = candidates.as_ref().map(Candidates::entry);
        let blocked = match digest {
            AnyDigest::Supported(digest) => self.blocked(*digest),
            AnyDigest::Unsupported(_) => None,
        };
        let state = self
            .state(ContentKind::Manifest, entry, is_in_repository)
            .with_blocked(blocked)
            .with_cooling(self.digest_facts(digest).await);
        Evidence { state, candidates }
    }

    /// Candidate for a manifest digest, and whether the digest belongs to the repository.
    pub(super) async fn candidate_for_digest(&self, digest: Digest) -> (Option<Candidates>, bool) {
        let now = self.request.now;
        self.proxy
            .read_cache(&self.request.registry, self.repository, move |cached| {
                (
                    cached.candidate_for_digest(&digest, now),
                    cached.is_member(&digest),
                )
            })
            .await
    }
}

/// Cached content of one repository in one view of the store.
pub(super) struct CacheView<'a> {
    pub(super) proxy: &'a ProxyService,
    pub(super) view: &'a View<'a>,
    pub(super) registry: &'a UpstreamRegistry,
    pub(super) repository: &'a Repository,
}

impl CacheView<'_> {
    pub(super) fn manifest(&self, digest: &Digest) -> Option<Arc<StoredManifest>> {
        let image = format_args!("{}@{digest}", self.repository);
        self.proxy
            .cached(self.registry, &image, self.view.manifest(digest))
    }

    /// Whether the upstream is known to have `digest` in this repository.
    pub(super) fn is_member(&self, digest: &Digest) -> bool {
        self.view.is_member(self.registry.name(), self.repository, digest)
    }
}

impl ProxyService {
    /// The value read for `image`; `None` after an error, which is logged. The store counts the error.
    pub(super) fn cached<T>(
        &self,
        registry: &UpstreamRegistry,
        image: &dyn Display,
        read: Result<Option<T>, StoreError>,
    ) -> Option<T> {
        read.unwrap_or_else(|fault| {
            if let Some(skipped) = self.unreadable.admits() {
                tracing::warn!(upstream = registry.name(), %image, %fault, skipped,
                    "failed to read store, treating request as a miss");
            }
            None
        })
    }

    /// Runs `read` on this repository: from memory if possible, else on a blocking thread. `read` must have no side
    /// effects, because it may run twice.
    pub(super) async fn read_cache<T: Send + 'static>(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        read: impl Fn(&CacheView<'_>) -> T + Send + 'static,
    ) -> T {
        let found = self.store.in_memory(|view| {
            read(&CacheView {
                proxy: self,
                view,
                registry,
                repository,
            })
        });
        if let Some(found) = found {
            return found;
        }
        let (proxy, registry, repository) = (Arc::clone(self), Arc::clone(registry), repository.clone());
        let on_disk = self.store.on_disk(move |view| {
            read(&CacheView {
                proxy: &proxy,
                view,
                registry: &registry,
                repository: &repository,
            })
        });
        // Boxed, so that the future of a request served from memory stays small.
        Box::pin(on_disk).await
    }

    pub(super) async fn cached_manifest(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<Arc<StoredManifest>> {
        let digest = *digest;
        self.read_cache(registry, repository, move |cached| cached.manifest(&digest))
            .await
    }
}

/// A cached manifest, and when the upstream last confirmed it for the tag.
#[derive(Clone)]
pub(super) struct CachedManifest {
    pub(super) manifest: Arc<StoredManifest>,
    pub(super) confirmed_at: SystemTime,
}

/// Manifests that could be served: the newest, and the last complete one if the newest is incomplete.
pub(super) struct Candidates {
    pub(super) newest: CachedManifest,
    /// Whether the tag moved since the newest manifest was confirmed.
    pub(super) is_moved: bool,
    pub(super) completeness: Completeness,
    pub(super) earlier: Option<CachedManifest>,
    /// Whether a write may have changed the tag or the digest upstream.
    pub(super) is_invalidated: bool,
    /// Whether the operator blocked the newest manifest. `earlier` is never blocked.
    pub(super) is_blocked: bool,
}

impl Candidates {
    /// The digest of the newest manifest, if it is blocked.
    pub(super) fn blocked(&self) -> Option<Digest> {
        self.is_blocked.then_some(self.newest.manifest.digest)
    }

    /// Input of the decision.
    pub(super) fn entry(&self) -> CachedEntry {
        CachedEntry {
            digest: self.newest.manifest.digest,
            confirmed_at: self.newest.confirmed_at,
            is_moved: self.is_moved,
            completeness: self.completeness,
            is_invalidated: self.is_invalidated,
        }
    }

    /// These candidates for an index that only lists manifests, such as a referrers list. It counts as complete,
    /// because clients request its manifests separately.
    pub(super) fn without_children(self) -> Self {
        Self {
            completeness: Completeness::Complete,
            earlier: None,
            ..self
        }
    }

    /// The newest complete manifest, if any. It is served if a newer one cannot be fetched.
    pub(super) fn complete(&self) -> Option<&CachedManifest> {
        match self.completeness {
            Completeness::Complete => Some(&self.newest),
            Completeness::Incomplete { .. } => self.earlier.as_ref(),
        }
    }
}

impl ProxyService {
    /// Whether the operator blocked this digest in this repository. Reads memory only.
    pub(super) fn is_blocked(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        digest: &Digest,
    ) -> bool {
        self.store.block_of(registry.name(), repository, digest).is_some()
    }

    /// Candidates for a tag and a client with this `Accept`, or for the operator (`None`).
    pub(super) async fn candidates_for_tag(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        tag: &Tag,
        accept: Option<&Accept>,
    ) -> Option<Candidates> {
        let key = TagKey {
            upstream: registry.shared_name(),
            repository: repository.clone(),
            tag: tag.clone(),
        };
        let accept = accept.cloned();
        self.read_cache(registry, repository, move |cached| {
            let reader = accept.as_ref().map_or(TagReader::Operator, TagReader::Client);
            cached.candidates_for_tag(&key, reader)
        })
        .await
    }

    /// How much of a manifest's content is cached.
    pub(super) async fn presence_of(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: &Digest,
    ) -> Presence {
        let digest = *digest;
        self.read_cache(registry, repository, move |cached| cached.presence_of(&digest))
            .await
    }

    /// Whether the complete image can be served without the upstream.
    pub(super) async fn is_complete(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        manifest: &Arc<StoredManifest>,
    ) -> bool {
        let manifest = Arc::clone(manifest);
        self.read_cache(registry, repository, move |cached| cached.is_complete(&manifest))
            .await
    }
}

impl CacheView<'_> {
    /// Candidates for this reader, in the order of [`crate::store::tags::newest`].
    pub(super) fn candidates_for_tag(&self, key: &TagKey, reader: TagReader<'_>) -> Option<Candidates> {
        let Self {
            proxy,
            view,
            registry,
            repository,
        } = *self;
        let image = format_args!("{repository}:{}", key.tag);
        let record = proxy.cached(registry, &image, view.tag(key))?;
        let named = view.resolve_tag(key, &record, reader)?;
        let newest = self.candidate(&named)?;
        let is_moved = named.is_moved;
        let is_invalidated = proxy.is_invalidated(registry, repository, key.tag.clone().into())
            || proxy.is_invalidated(registry, repository, newest.manifest.digest.into());
        let is_blocked = self.is_blocked(&newest.manifest.digest);
        if !is_blocked && self.is_complete(&newest.manifest) {
            return Some(Candidates {
                newest,
                is_moved,
                completeness: Completeness::Complete,
                earlier: None,
                is_invalidated,
                is_blocked,
            });
        }
        // The images of a blocked index belong to the blocked release, so they are not served in its place.
        let is_of_blocked_index = |digest: &Digest| {
            let children = &newest.manifest.manifest.descriptors;
            is_blocked
                && children
                    .iter()
                    .any(|child| matches!(&child.digest, AnyDigest::Supported(child) if child == digest))
        };
        let is_whole = |manifest: &StoredManifest| {
            !self.is_blocked(&manifest.digest)
                && !is_of_blocked_index(&manifest.digest)
                && self.is_complete(manifest)
        };
        let complete = view.last_complete(&record, reader, &is_whole);
        let earlier = complete.and_then(|named| self.candidate(&named));
        Some(Candidates {
            newest,
            is_moved,
            completeness: Completeness::Incomplete {
                previous: earlier.as_ref().map(|candidate| candidate.confirmed_at),
            },
            earlier,
            is_invalidated,
            is_blocked,
        })
    }

    pub(super) fn candidate(&self, named: &ResolvedTag) -> Option<CachedManifest> {
        let manifest = self.manifest(&named.digest)?;
        let confirmed_at = named.confirmed_at;
        Some(CachedManifest {
            manifest,
            confirmed_at,
        })
    }

    fn candidate_for_digest(&self, digest: &Digest, now: SystemTime) -> Option<Candidates> {
        let manifest = self.manifest(digest)?;
        let completeness = if self.is_complete(&manifest) {
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
            completeness,
            earlier: None,
            is_invalidated: self
                .proxy
                .is_invalidated(self.registry, self.repository, (*digest).into()),
            is_blocked: self.is_blocked(digest),
        })
    }

    /// Whether the operator blocked this digest in this repository.
    pub(super) fn is_blocked(&self, digest: &Digest) -> bool {
        self.proxy.is_blocked(self.registry, self.repository, digest)
    }

    pub(super) fn presence_of(&self, digest: &Digest) -> Presence {
        if !self.is_member(digest) {
            return Presence::None;
        }
        match self.manifest(digest) {
            Some(manifest) if self.is_complete(&manifest) => Presence::Complete,
            Some(_) => Presence::ManifestOnly,
            None => Presence::None,
        }
    }

    /// Whether this blob is downloading, for this repository or for one that has it too.
    pub(super) fn is_arriving(&self, digest: &Digest) -> bool {
        let is_here = || {
            self.proxy
                .active_downloads
                .contains(self.registry, self.repository, *digest)
                || self.is_member(digest)
        };
        self.proxy.downloads.is_arriving(digest) && is_here()
    }

    pub(super) fn is_complete(&self, manifest: &StoredManifest) -> bool {
        let shared = &self.proxy.shared;
        // In an outage, the shared storage was seen to have it a moment ago.
        let arriving = |digest: &Digest| {
            self.is_arriving(digest) || (shared.had_lately(digest) && self.is_member(digest))
        };
        self.view
            .is_image_complete(self.registry.name(), self.repository, manifest, &arriving)
    }
}
