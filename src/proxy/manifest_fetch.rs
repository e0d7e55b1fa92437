//! Manifest fetch: coalesced `GET`, verification against digest and media type, storage.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::HeaderValue;
use quick_cache::sync::Cache;
use tokio::time::{Instant, timeout_at};

use super::concurrency::detached;
use super::deadline::Deadline;
use super::invalidation::WriteSnapshot;
use super::shared_read::SharedManifest;
use super::{ProxyService, Request, UpstreamCaches, UpstreamRegistry};
use crate::download::Requester;
use crate::oci::cdn_loop::CdnLoop;
use crate::oci::manifest::MANIFEST_BYTES_MAX;
use crate::oci::{
    Accept, Algorithm, AnyDigest, CacheHeaders, Digest, Endpoint, Manifest, MediaType, Reference, Repository,
    Tag, UpstreamFailure,
};
use crate::policy::{Authorization, Revalidation};
use crate::queue::{Class, Demand};
use crate::shared::SharedContent;
use crate::single_flight::SharedCall;
use crate::store::manifests::StoredManifest;
use crate::store::tags::TagKey;
use crate::upstream::{Caller, Credential, ResponseKind, ResponseStream, UpstreamResponse};

/// A request to the upstream on behalf of a client.
#[derive(Clone)]
pub(super) struct UpstreamRequest {
    pub(super) registry: Arc<UpstreamRegistry>,
    pub(super) repository: Repository,
    pub(super) endpoint: Endpoint,
    pub(super) accept: Accept,
    pub(super) caller: Caller,
    /// Arrival time of the client's [`Request`]; the upstream request is not older.
    pub(super) arrived_at: SystemTime,
    /// The same by the monotonic clock, or later; the upstream request is not older.
    pub(super) since: Instant,
    /// As in the client's [`Request`].
    pub(super) writes: WriteSnapshot,
    /// As in the client's [`Request`].
    pub(super) for_push: bool,
    /// The digest that the upstream named: by a `HEAD`, for a fetch of a moved tag, or in a verified manifest. A request
    /// for that digest is not fabricated by the client.
    pub(super) named: Option<Digest>,
    /// Digest of the manifest that is cached for this request, if that was looked up.
    pub(super) cached: Option<Digest>,
    /// Whether the caller has no grant in the repository, so that cached content must not influence the request.
    pub(super) has_no_grant: bool,
    /// As in the client's [`Request`].
    pub(super) upstream_caches: UpstreamCaches,
}

impl UpstreamRequest {
    pub(super) fn of(request: &Request, repository: &Repository, caller: &Caller) -> Self {
        Self {
            registry: Arc::clone(&request.registry),
            repository: repository.clone(),
            endpoint: request.endpoint.clone(),
            accept: request.accept.clone(),
            caller: caller.clone(),
            arrived_at: request.now,
            since: request.since,
            writes: request.writes,
            for_push: request.for_push,
            named: None,
            cached: None,
            has_no_grant: false,
            upstream_caches: request.upstream_caches.clone(),
        }
    }

    /// A fetch of the tag after a revalidation showed that it moved.
    pub(super) fn naming(self, revalidation: Revalidation) -> Self {
        let named = match revalidation {
            Revalidation::Digest { digest, .. } => Some(digest),
            _ => None,
        };
        Self { named, ..self }
    }

    /// This request, for a digest that the upstream named, instead of the tag.
    pub(super) fn by_digest(self, digest: Digest) -> Self {
        let endpoint = Endpoint::Manifest {
            repository: self.repository.clone(),
            reference: Reference::Digest(AnyDigest::Supported(digest)),
        };
        Self {
            endpoint,
            named: Some(digest),
            ..self
        }
    }

    /// The requested tag, if the request is by tag.
    pub(super) fn tag(&self) -> Option<&Tag> {
        match &self.endpoint {
            Endpoint::Manifest {
                reference: Reference::Tag(tag),
                ..
            } => Some(tag),
            _ => None,
        }
    }

    fn is_for_referrers_tag(&self) -> bool {
        self.tag().is_some_and(Tag::is_referrers_tag)
    }

    /// Demand on the queue. A digest that the client may have fabricated comes last.
    pub(super) fn demand(&self, is_fabricated: bool) -> Demand {
        let demand = self.caller.demand(&self.endpoint);
        let is_last = is_fabricated && demand.class == Class::Interactive;
        Demand {
            class: if is_last { Class::Bulk } else { demand.class },
            ..demand
        }
    }

    /// The client's credential as forwarded upstream.
    pub(super) fn client_credential(&self) -> Option<&HeaderValue> {
        match &self.caller.credential {
            Credential::Client(shown) => Some(shown),
            Credential::Anonymous | Credential::Configured => None,
        }
    }

    /// Identity under which a blob is downloaded.
    pub(super) fn requester(&self) -> Requester {
        Requester {
            upstream: self.registry.shared_name(),
            repository: self.repository.clone(),
            principal: self.caller.principal,
        }
    }
}

/// Result of a coalesced `GET`: the stored manifest, and what the caches before this one said about it.
pub(super) type FetchedManifest = (
    Result<Arc<StoredManifest>, Arc<UpstreamResponse>>,
    Option<CacheHeaders>,
);

/// Coalescing key: callers with equal keys share one upstream request. They agree in path, media types and principal.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct CoalesceKey {
    upstream: Arc<str>,
    path: String,
    accept: u64,
    principal: [u8; 32],
    /// A request after a write must not share a response from before it.
    writes: WriteSnapshot,
    /// A request after a reload must not share one with other settings.
    settings: (u64, u64),
    for_push: bool,
    named: Option<Digest>,
    /// A request after a denial must not share one from before it, whose response may be an older success.
    denied_at: Option<Instant>,
    /// The upstream may refuse a list of caches that one client sent.
    passed: Option<CdnLoop>,
}

impl CoalesceKey {
    pub(super) fn new(proxy: &ProxyService, upstream_request: &UpstreamRequest) -> Self {
        Self {
            upstream: upstream_request.registry.shared_name(),
            path: upstream_request.endpoint.path_and_query(),
            accept: upstream_request.accept.key(),
            principal: upstream_request.caller.principal,
            writes: upstream_request.writes,
            settings: upstream_request.registry.upstream().settings_id(),
            for_push: upstream_request.for_push,
            named: upstream_request.named,
            denied_at: proxy.denied_at(upstream_request),
            passed: upstream_request.caller.trace.refusable_caches().cloned(),
        }
    }
}

impl ProxyService {
    /// Fetches a manifest, stores it and records the resulting grant. Coalesced by [`CoalesceKey`].
    pub(super) async fn fetch_manifest(
        self: &Arc<Self>,
        upstream_request: UpstreamRequest,
    ) -> Result<Arc<StoredManifest>, Arc<UpstreamResponse>> {
        let upstream_caches = upstream_request.upstream_caches.clone();
        let call = self.coalesced_manifest(upstream_request);
        received(call, &upstream_caches).await
    }

    /// The same without a wait for another cache that requests the manifest.
    pub(super) async fn fetch_manifest_at_once(
        self: &Arc<Self>,
        upstream_request: UpstreamRequest,
    ) -> Result<Arc<StoredManifest>, Arc<UpstreamResponse>> {
        let upstream_caches = upstream_request.upstream_caches.clone();
        let call = self.coalesced_manifest(upstream_request);
        call.waiters().pause().end_by(Instant::now());
        received(call, &upstream_caches).await
    }

    /// The same within a time, after which a cached copy is served. A wait for another cache moves `deadline`, and the end of
    /// this time too. `None`: the time is over, and the fetch continues.
    pub(super) async fn fetch_manifest_within(
        self: &Arc<Self>,
        upstream_request: UpstreamRequest,
        (began, within): (Instant, Duration),
        deadline: &Deadline,
    ) -> Option<Result<Arc<StoredManifest>, Arc<UpstreamResponse>>> {
        let upstream_caches = upstream_request.upstream_caches.clone();
        let call = self.coalesced_manifest(upstream_request);
        let waiters = call.waiters().clone();
        let before = waiters.pause().total(Instant::now());
        let allowed = deadline.allow_pause(within);
        waiters.pause().end_by(began + allowed);
        let mut fetching = pin!(received(call, &upstream_caches));
        let in_time = timeout_at(began + within, fetching.as_mut()).await;
        let paused = waiters.pause().total(Instant::now()).saturating_sub(before);
        deadline.end_pause(allowed, paused);
        match in_time {
            Ok(fetched) => Some(fetched),
            Err(_) => timeout_at(began + within + paused, fetching).await.ok(),
        }
    }

    /// One coalesced `GET` for all callers with the same key.
    fn coalesced_manifest(
        self: &Arc<Self>,
        upstream_request: UpstreamRequest,
    ) -> SharedCall<FetchedManifest> {
        let key = CoalesceKey::new(self, &upstream_request);
        let is_fabricated = self.may_be_fabricated(&upstream_request);
        let demand = upstream_request.demand(is_fabricated);
        self.manifests.share_for(key, demand, |waiters| {
            if !is_fabricated {
                waiters.detach();
            }
            let proxy = Arc::clone(self);
            async move {
                let UpstreamRequest {
                    registry,
                    endpoint,
                    accept,
                    caller,
                    ..
                } = &upstream_request;
                let began = upstream_request.since;
                let reading = proxy.read_or_claim_manifest(&upstream_request, &waiters);
                let (found, lease) = waiters.while_waited_for(reading).await?;
                match found {
                    SharedManifest::Read(manifest, age) => {
                        let content = SharedContent::Manifest(manifest.digest);
                        let stored = proxy.store_manifest(&upstream_request, Ok(*manifest)).await;
                        if let Ok(manifest) = &stored {
                            proxy.learn_children(&upstream_request, manifest, began).await;
                        }
                        // It is uploaded from the store.
                        proxy.shared.offer_renewal(content, age);
                        return Some((stored, None));
                    }
                    SharedManifest::Refused(response) => return Some((Err(response), None)),
                    SharedManifest::Absent(_) | SharedManifest::Missing => {}
                }
                let sent_at = Instant::now();
                let paused = waiters.pause().total(sent_at);
                let caller = Caller {
                    waiters: Some(waiters.clone()),
                    // A wait for another cache leaves a rate limit as much time as before.
                    wait_deadline: caller.wait_deadline.map(|deadline| deadline + paused),
                    ..caller.clone()
                };
                let getting = registry.upstream().get(&caller, endpoint, accept, None);
                let got = waiters.while_waited_for(getting).await?;
                Some(match got {
                    Ok(fetched) => {
                        let is_from_registry = !fetched.is_redirect_target;
                        let date = fetched.date();
                        let caches = CacheHeaders::read(&fetched.headers);
                        let received = proxy.read_and_verify(&upstream_request, fetched).await;
                        let received = match received {
                            Ok(manifest) => {
                                Ok(proxy.prefer_named_manifest(&upstream_request, manifest).await)
                            }
                            Err(cause) => Err(cause),
                        };
                        if let Ok(manifest) = &received
                            && proxy
                                .is_grant_evidence(&upstream_request, manifest, is_from_registry)
                                .await
                        {
                            if let Some(date) = date.filter(|_| is_from_registry) {
                                registry.checked_time().learn(date);
                            }
                            proxy.record_grant(&upstream_request, sent_at).await;
                        }
                        let stored = proxy.store_manifest(&upstream_request, received).await;
                        if let Ok(manifest) = &stored {
                            // First, because other caches wait for it.
                            if !lease.is_some_and(|lease| lease.stored(manifest.digest)) {
                                proxy.shared.offer(SharedContent::Manifest(manifest.digest));
                            }
                            proxy.learn_children(&upstream_request, manifest, began).await;
                        }
                        (stored, caches)
                    }
                    Err(response) => {
                        proxy.record_response(&upstream_request, &response, sent_at).await;
                        (Err(Arc::new(response)), None)
                    }
                })
            }
        })
    }

    /// Replaces a stale `GET` response. If the `GET` by tag returned a digest that the tag had before, a lagging
    /// replica sent it, and the digest from the `HEAD` is fetched instead. A digest that is new here may be newer
    /// than the `HEAD`, so it is used.
    async fn prefer_named_manifest(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        received: StoredManifest,
    ) -> StoredManifest {
        let Some(named) = upstream_request.named.filter(|named| *named != received.digest) else {
            return received;
        };
        if !self.was_named_by_tag(upstream_request, received.digest).await {
            return received;
        }
        let by_digest = upstream_request.clone().by_digest(named);
        let UpstreamRequest {
            registry,
            accept,
            caller,
            ..
        } = upstream_request;
        let fetched = registry
            .upstream()
            .get(caller, &by_digest.endpoint, accept, None)
            .await;
        match fetched {
            Ok(fetched) => self
                .read_and_verify(&by_digest, fetched)
                .await
                .unwrap_or(received),
            Err(_) => received,
        }
    }

    /// Whether the tag is known to have pointed to this digest.
    async fn was_named_by_tag(self: &Arc<Self>, upstream_request: &UpstreamRequest, digest: Digest) -> bool {
        let Endpoint::Manifest {
            reference: Reference::Tag(tag),
            ..
        } = &upstream_request.endpoint
        else {
            return false;
        };
        let key = TagKey {
            upstream: upstream_request.registry.shared_name(),
            repository: upstream_request.repository.clone(),
            tag: tag.clone(),
        };
        let record = self.store.read(move |view| view.tag(&key)).await;
        matches!(record, Ok(Some(record)) if record.has_pointed_to(&digest))
    }

    /// Whether a verified manifest is evidence of a grant. The registry's own origin sent it and it references
    /// content, or it is known in the repository.
    async fn is_grant_evidence(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        manifest: &StoredManifest,
        is_from_registry: bool,
    ) -> bool {
        let is_placeholder = manifest.manifest.descriptors.is_empty();
        !is_placeholder
            && (is_from_registry
                || self
                    .is_evidence(upstream_request, manifest.digest, manifest.bytes.len() as u64)
                    .await)
    }

    /// The manifest from a `GET` that replaced the `HEAD`, so that it is not fetched twice.
    pub(super) async fn take_inline_body(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        response: &UpstreamResponse,
    ) -> Option<Arc<StoredManifest>> {
        let (bytes, media_type) = response.body.clone()?;
        let named = match response.kind {
            ResponseKind::Digest(digest) | ResponseKind::UnprovenDigest(digest) => Some(digest),
            _ => None,
        };
        let received = verify(bytes, named, Some(&media_type), &upstream_request.endpoint);
        let (proxy, upstream_request) = (Arc::clone(self), upstream_request.clone());
        detached(async move { proxy.store_manifest(&upstream_request, received).await.ok() }).await
    }

    /// Stores a verified manifest for an authorized caller: its bytes, its membership in the repository and its tag.
    /// If the disk fails, or nothing proves that the registry sent it, it is served without being stored.
    async fn store_manifest(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        received: Result<StoredManifest, UpstreamFailure>,
    ) -> Result<Arc<StoredManifest>, Arc<UpstreamResponse>> {
        let UpstreamRequest {
            registry,
            repository,
            endpoint,
            ..
        } = upstream_request;
        let manifest = received.map_err(|cause| {
            if cause == UpstreamFailure::DigestMismatch {
                tracing::error!(upstream = registry.name(), %repository, path = %endpoint.path_and_query(),
                    "upstream manifest does not match its digest, nothing stored");
            }
            Arc::new(UpstreamResponse::unavailable(cause))
        })?;
        let manifest = Arc::new(manifest);
        if !self.is_authorized(upstream_request).await {
            return Ok(manifest);
        }
        self.size_hints.record(registry, repository, &manifest.manifest);
        let stored = {
            let (registry, repository) = (Arc::clone(registry), repository.clone());
            let manifest = Arc::clone(&manifest);
            self.store
                .write(move |store| {
                    let StoredManifest {
                        digest,
                        bytes,
                        media_type,
                        ..
                    } = manifest.as_ref();
                    store.put_manifest(
                        bytes.clone(),
                        media_type.clone(),
                        *digest,
                        registry.name(),
                        &repository,
                    )
                })
                .await
        };
        let served = match &stored {
            Ok(stored) => Arc::clone(stored),
            Err(_) => manifest,
        };
        super::log_store_error(stored, "store manifest");
        // As for a list of the referrers API: a registry may also respond to clients that may not read the
        // repository.
        let is_trusted = !upstream_request.is_for_referrers_tag()
            || self.authorization_of(upstream_request).await != Authorization::Unknown;
        if let Endpoint::Manifest { reference, .. } = endpoint
            && is_trusted
        {
            let media_type = Some(&served.media_type);
            self.record_tag_if_current(upstream_request, reference, served.digest, media_type)
                .await;
        }
        Ok(served)
    }

    /// Reads a manifest and verifies it.
    ///
    /// The bytes decide, never a header. By digest, they must hash to it. By tag, they must hash to the
    /// `Docker-Content-Digest` of the same response, or without that header to the digest of a `HEAD`. They must also
    /// parse as a manifest: an HTML page with status 200 is rejected.
    async fn read_and_verify(
        &self,
        upstream_request: &UpstreamRequest,
        fetched: ResponseStream,
    ) -> Result<StoredManifest, UpstreamFailure> {
        let UpstreamRequest {
            registry,
            endpoint,
            accept,
            caller,
            ..
        } = upstream_request;
        let (header, media_type) = (fetched.digest, fetched.media_type.clone());
        let is_page = media_type.as_ref().is_some_and(MediaType::is_page);
        let bytes = fetched.collect(MANIFEST_BYTES_MAX).await?;
        let mut received = verify(bytes.clone(), header, media_type.as_ref(), endpoint);
        if matches!(received, Err(UpstreamFailure::DigestMismatch))
            && by_tag(endpoint)
            && let ResponseKind::Digest(named) = registry.upstream().head(caller, endpoint, accept).await.kind
        {
            received = verify(bytes, Some(named), media_type.as_ref(), endpoint);
        }
        if is_page {
            received.map_err(|_| UpstreamFailure::NotRegistry)
        } else {
            received
        }
    }
}

/// Result of a call that this request waits for.
async fn received(
    call: SharedCall<FetchedManifest>,
    upstream_caches: &UpstreamCaches,
) -> Result<Arc<StoredManifest>, Arc<UpstreamResponse>> {
    let Some((stored, caches)) = call.wait().await else {
        return Err(Arc::new(UpstreamResponse::unavailable(
            UpstreamFailure::Abandoned,
        )));
    };
    upstream_caches.record(caches.as_ref());
    stored
}

fn by_tag(endpoint: &Endpoint) -> bool {
    matches!(
        endpoint,
        Endpoint::Manifest {
            reference: Reference::Tag(_),
            ..
        }
    )
}

pub(super) fn verify(
    bytes: Bytes,
    header: Option<Digest>,
    media_type: Option<&MediaType>,
    endpoint: &Endpoint,
) -> Result<StoredManifest, UpstreamFailure> {
    let requested = match endpoint {
        Endpoint::Manifest {
            reference: Reference::Digest(AnyDigest::Supported(digest)),
            ..
        } => Some(*digest),
        _ => None,
    };
    let expected = requested.or(header);
    let algorithm = expected.map_or(Algorithm::Sha256, |digest| digest.algorithm());
    let digest = Digest::of(algorithm, &bytes);
    let is_right = expected.is_none_or(|expected| expected == digest);
    let read = Manifest::read(&bytes);
    if !(is_right && requested.is_some())
        && let Ok(manifest) = &read
        && manifest.is_signed_schema_1(media_type)
    {
        return Err(UpstreamFailure::Unverifiable);
    }
    if !is_right {
        return Err(UpstreamFailure::DigestMismatch);
    }
    let manifest = read.map_err(|_| UpstreamFailure::Malformed)?;
    let is_page = media_type.is_some_and(MediaType::is_page);
    let media_type = if requested.is_some() {
        manifest.type_by_digest(media_type)
    } else {
        manifest.media_type_for(media_type)
    };
    let media_type = media_type.ok_or(UpstreamFailure::Malformed)?;
    // By tag, only the response names the content, so its media type and shape must agree.
    if requested.is_none() && (is_page || !manifest.has_shape_of(&media_type)) {
        return Err(UpstreamFailure::Malformed);
    }
    Ok(StoredManifest::new(digest, bytes, media_type, manifest))
}

/// Blobs with a remembered size hint.
const SIZES_MAX: usize = 16_384;

/// Size hints: descriptor sizes from the manifests that reference a blob.
///
/// The digest authenticates the bytes of a blob, but nothing authenticates the `size` of a descriptor (OCI image
/// spec, "Descriptors"). So no `Content-Length`, quota or end of a download is derived from it. The hint shows where
/// an early end must be checked against the digest, and whether waiting for a length is worthwhile.
pub(super) struct SizeHints(Cache<(Arc<str>, Repository, Digest), u64>);

impl Default for SizeHints {
    fn default() -> Self {
        Self(Cache::new(SIZES_MAX))
    }
}

impl SizeHints {
    pub(super) fn record(&self, registry: &UpstreamRegistry, repository: &Repository, manifest: &Manifest) {
        let upstream: Arc<str> = registry.shared_name();
        for child in &manifest.descriptors {
            if let (AnyDigest::Supported(digest), Some(size)) = (&child.digest, child.size) {
                self.0
                    .insert((Arc::clone(&upstream), repository.clone(), *digest), size);
            }
        }
    }

    /// As [`Self::record`], unless the last descriptor is known.
    pub(super) fn record_unless_known(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        manifest: &Manifest,
    ) {
        let last = manifest.descriptors.last();
        let is_known = last.is_none_or(|last| match last.digest {
            AnyDigest::Supported(digest) => self.get(registry, repository, digest).is_some(),
            AnyDigest::Unsupported(_) => false,
        });
        if !is_known {
            self.record(registry, repository, manifest);
        }
    }

    pub(super) fn get(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        digest: Digest,
    ) -> Option<u64> {
        self.0.get(&(registry.shared_name(), repository.clone(), digest))
    }
}
