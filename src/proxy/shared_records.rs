//! Records of the shared storage in the request path: those that this cache writes, and those that it reads.
//!
//! A record is evidence and decides nothing. In an outage, a request that would be denied because nothing is cached is
//! decided once more, after the records of its tag and its manifests were brought into the store, as if this cache had
//! asked the upstream at the time of the record. Before that, the client needs a right: one that this cache remembers, or
//! a record that the repository is public. Such a record counts as an expired public mark, so that it opens something
//! only while the upstream is unavailable.

mod grant;
mod report;
mod tags;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use quick_cache::sync::Cache;
use tokio::time::{Instant, timeout};

use self::grant::EndedRights;
use super::evidence::Evidence;
use super::manifest::ManifestRequest;
use super::manifest_fetch::{UpstreamRequest, verify};
use super::pipeline::ReadContext;
use super::prefetch::ContentKey;
use super::{Denied, ProxyResponse, ProxyService, ServeReason, UpstreamRegistry, log_store_error};
use crate::oci::manifest::{DescriptorKind, MANIFEST_BYTES_MAX, ManifestKind};
use crate::oci::{AnyDigest, Digest, Endpoint, MediaType, Reference, Repository, Tag, UpstreamFailure};
use crate::policy::authz::public_by_record;
use crate::policy::{Authorization, Decision, DenyReason, HitReason, Policy, Revalidation, decide};
use crate::shared::{
    ContentState, PublicState, RecordPlace, RecordRead, SharedContent, TagState, TagVariant,
};
use crate::store::manifests::StoredManifest;

pub use self::report::RecordedImage;
pub(super) use self::tags::TagRecordUses;

/// Longest time to bring an image's records and manifests. Clients give up after 30 s without a response, and may have
/// waited for the upstream before.
const BRING_TIMEOUT: Duration = Duration::from_secs(5);

/// Images of an index that are brought. An index is complete if one of its images is.
const IMAGES_MAX: usize = 4;

/// Concurrent requests to the bucket for one image.
const CONCURRENCY_MAX: usize = 8;

/// Nesting depth of indexes, as for their completeness.
const INDEX_DEPTH_MAX: u32 = 2;

/// Children of manifests that were served, and manifests that were noted.
const NOTED_MAX: usize = 16_384;

/// Manifests of one child that are remembered.
const PARENTS_MAX: usize = 4;

/// Time after which the content of a manifest that is served is noted again.
const NOTE_AGAIN_AFTER: Duration = Duration::from_secs(60 * 60);

/// Manifests whose content is recorded.
pub(super) struct NotedContent {
    /// Manifests that were served, by their children.
    parents: Cache<ContentKey, Arc<[Digest]>>,
    noted: Cache<ContentKey, Noted>,
}

/// When a manifest was noted, and the request to which the upstream last confirmed it.
#[derive(Clone, Copy)]
struct Noted {
    at: Instant,
    confirmed: Option<Instant>,
}

impl Default for NotedContent {
    fn default() -> Self {
        Self {
            parents: Cache::new(NOTED_MAX),
            noted: Cache::new(NOTED_MAX),
        }
    }
}

impl NotedContent {
    /// Whether the manifest is not noted lately, or was not confirmed. Remembers it, by its children too.
    fn enter(
        &self,
        (registry, repository): (&UpstreamRegistry, &Repository),
        manifest: &StoredManifest,
        confirmed: Option<Instant>,
    ) -> bool {
        let upstream: Arc<str> = registry.shared_name();
        let key = |digest| (Arc::clone(&upstream), repository.clone(), digest);
        let (own, now) = (key(manifest.digest), Instant::now());
        let noted = self.noted.get(&own);
        let is_enough = |noted: Noted| {
            let is_lately = now.saturating_duration_since(noted.at) < NOTE_AGAIN_AFTER;
            is_lately && (noted.confirmed.is_some() || confirmed.is_none())
        };
        if noted.is_some_and(is_enough) {
            return false;
        }
        let confirmed = confirmed.or_else(|| noted?.confirmed);
        self.noted.insert(own, Noted { at: now, confirmed });
        for child in children_of(manifest) {
            let key = key(child);
            let known = self.parents.get(&key).unwrap_or_default();
            if !known.contains(&manifest.digest) {
                let parents = std::iter::once(&manifest.digest).chain(known.iter());
                self.parents
                    .insert(key, parents.take(PARENTS_MAX).copied().collect());
            }
        }
        true
    }
}

/// The children of a manifest that a registry has.
fn children_of(manifest: &StoredManifest) -> impl Iterator<Item = Digest> {
    let own = manifest
        .manifest
        .descriptors
        .iter()
        .filter(|child| !child.has_urls);
    own.filter_map(|child| match child.digest {
        AnyDigest::Supported(digest) => Some(digest),
        AnyDigest::Unsupported(_) => None,
    })
}

/// Why a request failed, if a copy of another cache may be served instead.
fn outage_of(outcome: &ProxyResponse) -> Option<UpstreamFailure> {
    match outcome {
        ProxyResponse::Denied(Denied {
            reason:
                DenyReason::UpstreamUnavailable(cause)
                | DenyReason::Incomplete(cause)
                | DenyReason::StaleLimitExceeded(cause),
            ..
        }) => Some(*cause),
        _ => None,
    }
}

/// How a response depends on the cache.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Given {
    /// A copy, because the upstream is unavailable.
    Stale,
    /// A copy, or that there is none, without a request to the upstream.
    Cached,
    /// Nothing.
    Nothing,
}

impl Given {
    pub(super) fn of(outcome: &ProxyResponse) -> Self {
        let info = match outcome {
            ProxyResponse::Manifest(_, info)
            | ProxyResponse::Blob { info, .. }
            | ProxyResponse::Listing(_, info) => info,
            // A list of referrers that was cached as absent, or is assumed to be.
            ProxyResponse::Denied(Denied {
                reason: DenyReason::NotFound,
                response: None,
                ..
            }) => return Self::Cached,
            _ => return Self::Nothing,
        };
        match info.reason {
            ServeReason::Cached(served)
                if served.may_be_outdated() || matches!(served, HitReason::ExpiredGrant(_)) =>
            {
                Self::Stale
            }
            ServeReason::Cached(HitReason::Revalidated | HitReason::TagMoved) => Self::Nothing,
            ServeReason::Cached(_) | ServeReason::Redirected => Self::Cached,
            _ => Self::Nothing,
        }
    }
}

impl UpstreamRegistry {
    /// A repository in records.
    pub(super) fn record_place(&self, repository: &Repository) -> RecordPlace {
        RecordPlace {
            upstream: Arc::clone(self.identity_in_records()),
            repository: repository.clone(),
        }
    }

    /// Whether content that the registry serves to this cache without a credential is public for other caches too.
    fn has_public_records(&self) -> bool {
        !self.upstream().has_client_certificate()
    }
}

/// Writes of records.
impl ProxyService {
    /// Notes the digest of a tag that the upstream named.
    pub(super) async fn note_tag(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        reference: &Reference,
        digest: Digest,
        media_type: Option<&MediaType>,
    ) {
        let (Reference::Tag(tag), Some(media_type)) = (reference, media_type) else {
            return;
        };
        if tag.is_referrers_tag() || !self.shared.writes_records() {
            return;
        }
        let UpstreamRequest {
            registry,
            repository,
            accept,
            since,
            ..
        } = upstream_request;
        let variant = TagVariant {
            accept: accept.key(),
            digest,
            media_type: media_type.clone(),
            accepts_indexes: accept.lists_indexes(),
            at: 0,
            seen_for: self.seen_for(upstream_request, tag, digest).await,
        };
        let place = registry.record_place(repository);
        self.shared
            .note_tag(&place, tag, TagState::naming(variant), *since);
    }

    /// Notes that these tags were deleted or changed, seen by a request sent at `since`.
    pub(super) fn note_unnamed_tags<'a>(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        tags: impl IntoIterator<Item = &'a Tag>,
        since: Instant,
    ) {
        if !self.shared.writes_records() {
            return;
        }
        let place = registry.record_place(repository);
        for tag in tags {
            self.shared.note_tag(&place, tag, TagState::unnamed(1), since);
        }
    }

    /// Waits until the updates of these tags are in the bucket, at most a second.
    pub(super) async fn tags_settled(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        tags: &[Tag],
    ) {
        if self.shared.writes_records() {
            let place = registry.record_place(repository);
            let settling = tags.iter().map(|tag| self.shared.tag_settled(&place, tag));
            futures_util::future::join_all(settling).await;
        }
    }

    /// Notes whether a repository is public.
    pub(super) fn note_public(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        is_public: bool,
        since: Instant,
    ) {
        if self.shared.writes_records() && registry.has_public_records() {
            let place = registry.record_place(repository);
            self.shared.note_public(&place, is_public, since);
        }
    }

    /// Records that a repository is not public any more, before the response.
    pub(super) async fn revoke_public(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        now: Instant,
    ) {
        if self.shared.writes_records() && registry.has_public_records() {
            let place = registry.record_place(repository);
            self.shared.revoke_public(&place, now).await;
        }
    }

    /// Notes the content of a manifest that an authorized client was served. `confirmed`: when the request was sent to which
    /// the upstream confirmed it, if it did.
    pub(super) async fn note_content(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        manifest: &Arc<StoredManifest>,
        confirmed: Option<Instant>,
    ) {
        if self.shared.writes_records()
            && self
                .noted_content
                .enter((registry, repository), manifest, confirmed)
        {
            self.note_children(registry, repository, manifest, confirmed)
                .await;
        }
    }

    /// Notes the content of the manifests of a blob or a manifest that is known in the repository now.
    pub(super) fn note_child(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        child: Digest,
    ) {
        if !self.shared.writes_records() {
            return;
        }
        let key = (registry.shared_name(), repository.clone(), child);
        let Some(parents) = self.noted_content.parents.get(&key) else {
            return;
        };
        let (proxy, registry, repository) = (Arc::clone(self), Arc::clone(registry), repository.clone());
        tokio::spawn(async move {
            for parent in parents.iter() {
                if let Some(manifest) = proxy.cached_manifest(&registry, &repository, parent).await {
                    let key = (registry.shared_name(), repository.clone(), *parent);
                    let noted = proxy.noted_content.noted.get(&key);
                    let confirmed = noted.and_then(|noted| noted.confirmed);
                    proxy
                        .note_children(&registry, &repository, &manifest, confirmed)
                        .await;
                }
            }
        });
    }

    /// An image is noted once all of its children are known, so that its record is written once.
    async fn note_children(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        manifest: &Arc<StoredManifest>,
        confirmed: Option<Instant>,
    ) {
        let children: Vec<_> = children_of(manifest).collect();
        let (is_index, digest) = (manifest.manifest.kind == ManifestKind::Index, manifest.digest);
        let known = self.read_cache(registry, repository, move |cached| {
            if !cached.is_member(&digest) {
                return None;
            }
            let known: Vec<_> = children
                .iter()
                .filter(|child| cached.is_member(child))
                .copied()
                .collect();
            (is_index || known.len() == children.len()).then_some(known)
        });
        if let Some(known) = known.await {
            let place = registry.record_place(repository);
            self.shared.note_content(&place, digest, known, confirmed);
        }
    }
}

/// Reads of records.
impl ProxyService {
    /// The children of a manifest that other caches have seen in the repository. `None`: they have not seen the manifest.
    pub(super) async fn recorded_children(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        manifest: Digest,
    ) -> Option<BTreeSet<Digest>> {
        let recorded = self.recorded_content(registry, repository, manifest).await?;
        recorded.is_present().then_some(recorded.children)
    }

    /// What other caches have recorded about a manifest in the repository.
    async fn recorded_content(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        manifest: Digest,
    ) -> Option<ContentState> {
        if !self.shared.has_records() {
            return None;
        }
        let place = registry.record_place(repository);
        let found = self.shared.content_record(&place, manifest).await.found()?;
        Some(found.state)
    }

    /// Learns which children of this manifest other caches have seen in the repository, for a caller with a current grant. So
    /// the upstream is not asked for each of them. Nothing is learned if the bucket was silent since `began`.
    pub(super) async fn learn_children(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        manifest: &Arc<StoredManifest>,
        began: Instant,
    ) {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        if !self.shared.has_records()
            || self.shared.was_silent_since(began)
            || !self.is_authorized(upstream_request).await
        {
            return;
        }
        let children: Vec<_> = children_of(manifest).collect();
        let are_known = self.read_cache(registry, repository, move |cached| {
            children.iter().all(|child| cached.is_member(child))
        });
        if are_known.await {
            return;
        }
        if let Some(recorded) = self
            .recorded_children(registry, repository, manifest.digest)
            .await
        {
            self.add_children(registry, repository, manifest, &recorded).await;
        }
    }

    /// Records the children of this manifest that other caches have seen in the repository.
    pub(super) async fn add_children(
        &self,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        manifest: &StoredManifest,
        recorded: &BTreeSet<Digest>,
    ) {
        let of_manifest: Vec<_> = children_of(manifest)
            .filter(|child| recorded.contains(child))
            .collect();
        let is_index = manifest.manifest.kind == ManifestKind::Index;
        // Only manifests are deleted by their digest, and have records.
        let checks = of_manifest.into_iter().map(|child| async move {
            let may_be_deleted = is_index && self.may_be_deleted(registry, repository, child).await;
            (!may_be_deleted).then_some(child)
        });
        let mut checks = futures_util::stream::iter(checks).buffer_unordered(CONCURRENCY_MAX);
        while let Some(checked) = checks.next().await {
            if let Some(child) = checked {
                self.add_member(registry, repository, child).await;
            }
        }
    }

    /// Whether a record says that a manifest was deleted, or cannot be read.
    async fn may_be_deleted(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        manifest: Digest,
    ) -> bool {
        let place = registry.record_place(repository);
        match self.shared.content_record(&place, manifest).await {
            RecordRead::Found(found) => !found.state.is_present(),
            RecordRead::Absent => false,
            RecordRead::Unread { .. } => true,
        }
    }

    /// Brings a manifest that other caches have seen in the repository, with the children that an image needs. Returns whether it is
    /// there. `named_at`: when the record of a tag last named it, by the storage's clock. A later deletion outweighs it.
    fn bring_manifest<'a>(
        self: &'a Arc<Self>,
        registry: &'a Arc<UpstreamRegistry>,
        repository: &'a Repository,
        (digest, named_at): (Digest, Option<u64>),
        depth: u32,
    ) -> BoxFuture<'a, bool> {
        Box::pin(async move {
            if self.is_blocked(registry, repository, &digest) {
                return false;
            }
            let known = self.cached_manifest(registry, repository, &digest).await;
            let content = SharedContent::Manifest(digest);
            let reading = async {
                match &known {
                    Some(_) => None,
                    None => self.shared.read(content, MANIFEST_BYTES_MAX).await.ok(),
                }
            };
            let recording = self.recorded_content(registry, repository, digest);
            let present = |recorded: Option<ContentState>| {
                let recorded = recorded.filter(ContentState::is_present)?;
                Some(recorded.children)
            };
            let (read, children) = if let Some(named_at) = named_at {
                let (read, recorded) = tokio::join!(reading, recording);
                let deleted_at = recorded.as_ref().map(|recorded| recorded.deleted_at);
                if deleted_at.is_some_and(|deleted_at| deleted_at >= named_at) {
                    return false;
                }
                (read, present(recorded))
            } else {
                let children = present(recording.await);
                // The time of a read would tell a client whether the bucket has a manifest of another repository.
                if children.is_none() && !self.is_member(registry, repository, digest).await {
                    return false;
                }
                (reading.await, children)
            };
            let manifest = match (known, read) {
                (Some(manifest), _) => manifest,
                (None, Some((bytes, object))) => {
                    let endpoint = Endpoint::Manifest {
                        repository: repository.clone(),
                        reference: digest.into(),
                    };
                    let Ok(manifest) = verify(bytes, None, None, &endpoint) else {
                        self.shared.report_wrong(content);
                        return false;
                    };
                    let Some(manifest) = self.keep_manifest(registry, repository, manifest).await else {
                        return false;
                    };
                    self.shared.offer_renewal(content, object.info.age);
                    manifest
                }
                (None, None) => return false,
            };
            self.add_member(registry, repository, digest).await;
            self.size_hints.record(registry, repository, &manifest.manifest);
            if let Some(children) = &children {
                self.add_children(registry, repository, &manifest, children).await;
            }
            self.bring_children(
                registry,
                repository,
                &manifest,
                &children.unwrap_or_default(),
                depth,
            )
            .await;
            true
        })
    }

    async fn keep_manifest(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        manifest: StoredManifest,
    ) -> Option<Arc<StoredManifest>> {
        let (upstream, repository) = (registry.name().to_owned(), repository.clone());
        let stored = self.store.write(move |store| {
            let StoredManifest {
                digest,
                bytes,
                media_type,
                ..
            } = manifest;
            store.put_manifest(bytes, media_type, digest, &upstream, &repository)
        });
        let stored = stored.await;
        let kept = stored.as_ref().ok().map(Arc::clone);
        log_store_error(stored, "store manifest");
        kept
    }

    /// Brings the images of an index, and checks that the bucket has the blobs of an image.
    async fn bring_children(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        manifest: &StoredManifest,
        recorded: &BTreeSet<Digest>,
        depth: u32,
    ) {
        let of_kind = |wanted: bool| {
            let children = manifest.manifest.descriptors.iter();
            children.filter_map(move |child| match child.digest {
                AnyDigest::Supported(digest) => {
                    let is_manifest = child.kind == DescriptorKind::Manifest;
                    (is_manifest == wanted && !child.has_urls).then_some(digest)
                }
                AnyDigest::Unsupported(_) => None,
            })
        };
        if let Some(depth) = depth.checked_sub(1) {
            let images: Vec<_> = of_kind(true)
                .filter(|image| recorded.contains(image))
                .take(IMAGES_MAX)
                .map(|image| self.bring_manifest(registry, repository, (image, None), depth))
                .collect();
            futures_util::future::join_all(images).await;
        }
        let blobs: Vec<_> = of_kind(false).collect();
        let missing = self.missing_from_store(blobs).await;
        let checks = missing
            .into_iter()
            .map(|blob| async move { self.shared.has(SharedContent::Blob(blob)).await });
        let mut checks = futures_util::stream::iter(checks).buffer_unordered(CONCURRENCY_MAX);
        // Without one of them the image is incomplete.
        while checks.next().await == Some(true) {}
    }

    async fn missing_from_store(&self, blobs: Vec<Digest>) -> Vec<Digest> {
        let read = self.store.read(move |view| {
            let is_missing = |blob: &&Digest| !matches!(view.blob(blob), Ok(Some(_)));
            blobs.iter().filter(is_missing).copied().collect()
        });
        read.await
    }
}

impl ReadContext<'_> {
    /// Why the upstream is known to be unavailable to this caller, if records can be read instead.
    pub(super) fn known_outage(&self) -> Option<UpstreamFailure> {
        if !self.may_use_records() {
            return None;
        }
        let upstream = self.request.registry.upstream();
        upstream.unavailable_to(&self.caller, &self.request.endpoint)
    }

    /// The read without the rights by which this outcome gives out something cached in an outage, if another cache has
    /// recorded that they were denied: the client's grants, or the public mark. The request is then made again.
    pub(super) async fn unmarked_if_revoked(&self, given: Given) -> Option<Self> {
        let is_in_outage = match given {
            Given::Nothing => return None,
            Given::Stale => true,
            // While the upstream responds, it is asked before the mark expires. Under `never`, only a record can end a mark.
            Given::Cached => self.known_outage().is_some() || self.rule.policy == Policy::Never,
        };
        let ended = if is_in_outage {
            self.ends_revoked_grant().await
        } else {
            EndedRights::default()
        };
        if ended.any() {
            // Without those that ended.
            let read = ReadContext::new(self.proxy, self.request, self.repository).await;
            let read = if ended.is_capped() {
                read.without_grants()
            } else {
                read
            };
            let is_public = read.public_mark().is_some() && read.is_permitted_by_records().await;
            return Some(if is_public {
                read
            } else {
                read.without_public_mark()
            });
        }
        self.public_mark()?;
        let is_revoked = is_in_outage
            && self.may_use_public_records()
            && self.authorization_of_client() == Authorization::Unknown
            && !self.is_permitted_by_records().await;
        if !is_revoked {
            return None;
        }
        // The grants may have changed.
        let read = ReadContext::new(self.proxy, self.request, self.repository).await;
        Some(read.without_public_mark())
    }

    /// Why this request failed, if the records of other caches may be used instead.
    pub(super) fn outage(&self, outcome: &ProxyResponse) -> Option<UpstreamFailure> {
        outage_of(outcome).filter(|_| self.may_use_records())
    }

    /// Whether records count in an outage. `always` serves nothing that the upstream has not confirmed, and `never` does not
    /// depend on the upstream.
    fn may_use_records(&self) -> bool {
        let is_served_stale = matches!(self.rule.policy, Policy::IfNewer | Policy::IfNotPresent);
        is_served_stale && !self.request.for_push && self.proxy.shared.has_records()
    }

    /// Whether public records count for this request.
    pub(super) fn may_use_public_records(&self) -> bool {
        let may_use = self.may_use_records() || self.may_use_records_alone();
        may_use && self.request.registry.has_public_records()
    }

    /// The manifest by the records of other caches. `None`: it is not served.
    pub(super) async fn recorded_manifest(
        &self,
        reference: &Reference,
        cause: UpstreamFailure,
    ) -> Option<ProxyResponse> {
        let proxy = self.proxy;
        let bringing = async {
            if !self.is_permitted_by_records().await {
                return false;
            }
            match reference {
                Reference::Tag(tag) if !tag.is_referrers_tag() => proxy.bring_tag(self, tag).await,
                Reference::Digest(AnyDigest::Supported(digest)) => {
                    let (registry, repository) = (&self.request.registry, self.repository);
                    proxy
                        .bring_manifest(registry, repository, (*digest, None), INDEX_DEPTH_MAX)
                        .await
                }
                Reference::Tag(_) | Reference::Digest(AnyDigest::Unsupported(_)) => false,
            }
        };
        if !timeout(BRING_TIMEOUT, bringing).await.unwrap_or(false) {
            return None;
        }
        // The grants may have changed.
        let read = ReadContext::new(proxy, self.request, self.repository).await;
        let read = read.with_recorded_grant().await;
        let evidence = match reference {
            Reference::Tag(tag) => read.tag_evidence(tag, Some(read.tag_client())).await,
            Reference::Digest(digest) => read.digest_evidence(digest).await,
        };
        let revalidation = Revalidation::Unavailable(cause);
        let evidence = Evidence {
            state: evidence.state.with_revalidation(revalidation),
            ..evidence
        };
        match decide(&evidence.state) {
            Decision::Serve(served) => {
                Some(ManifestRequest::new(&read).serve(served, &evidence, Some(revalidation)))
            }
            _ => None,
        }
    }

    /// Whether the client may read the repository in an outage: by a right of its own that this cache or the record of
    /// another one remembers, by a public mark of this cache, or by the record of another cache that the repository is
    /// public. A later record of a denial ends such a right.
    pub(super) async fn is_permitted_by_records(&self) -> bool {
        if self.has_own_right().await {
            return true;
        }
        // Both records are read at once.
        let (is_granted, is_public) = tokio::join!(self.is_granted_by_record(), self.is_public_in_outage());
        is_granted || is_public
    }

    /// Whether this cache remembers a right of the client that no recorded denial ends.
    async fn has_own_right(&self) -> bool {
        if self.authorization_of_client() == Authorization::Unknown {
            return false;
        }
        let ended = self.ends_revoked_grant().await;
        if ended.any() && !ended.is_capped() {
            let read = ReadContext::new(self.proxy, self.request, self.repository).await;
            return read.authorization_of_client() != Authorization::Unknown;
        }
        !ended.any()
    }

    /// The public mark, if it is not by the record of another cache.
    fn own_public_mark(&self) -> Option<SystemTime> {
        self.public_mark().filter(|since| *since != public_by_record())
    }

    async fn is_public_in_outage(&self) -> bool {
        let (began, read) = (Instant::now(), self.public_record().await);
        self.is_public_by(read, began).await
    }

    /// The record of the repository. `None` if it does not count here.
    async fn public_record(&self) -> Option<RecordRead<PublicState>> {
        if !self.may_use_public_records() {
            return None;
        }
        let place = self.request.registry.record_place(self.repository);
        let is_known = self.own_public_mark().is_some();
        Some(self.proxy.shared.public_record(&place, is_known).await)
    }

    /// Whether the repository is public by this record, whose read began at `began`, and by the marks of this cache.
    async fn is_public_by(&self, read: Option<RecordRead<PublicState>>, began: Instant) -> bool {
        let own_mark = self.own_public_mark();
        let (registry, repository) = (&self.request.registry, self.repository);
        let found = match read {
            Some(RecordRead::Found(found)) => found,
            None | Some(RecordRead::Absent) => return own_mark.is_some(),
            // What expired needs the record. What did not, needs it as little as while the bucket is unavailable; but no
            // client can use up the requests for the record of another.
            Some(RecordRead::Unread { is_capped }) => {
                return !is_capped
                    && own_mark.is_some()
                    && self.authorization(true) == Authorization::Granted;
            }
        };
        let (age, is_public) = (found.age(found.state.at), found.state.is_public);
        if !is_public {
            self.proxy.end_public_mark(registry, repository, age).await;
        } else if age >= self.rule.grant_ttl_offline {
            return own_mark.is_some();
        } else if self.public_mark().is_none() {
            self.proxy
                .import_public_mark(registry, repository, age, began)
                .await;
        }
        // Unless a denial came in between.
        let since = self.proxy.public_since(registry, repository).await;
        since.is_some()
    }
}
