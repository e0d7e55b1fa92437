//! Revalidation: a coalesced `HEAD` to the upstream, and the grants, tags and membership recorded from its response.

use std::sync::Arc;

use tokio::time::Instant;

use super::local_tokens::is_local_token;
use super::log_store_error;
use super::manifest_fetch::{CoalesceKey, UpstreamRequest};
use super::pipeline::ReadContext;
use super::{ProxyService, UpstreamRegistry};
use crate::oci::{AnyDigest, Digest, Endpoint, MediaType, Reference, Repository, UpstreamFailure};
use crate::policy::authz::{GrantEvidence, authorize};
use crate::policy::{Authorization, CacheState, CredentialOwner, Presence, Revalidation};
use crate::queue::Class;
use crate::single_flight::SharedCall;
use crate::store::membership::MembershipUpdate;
use crate::store::tags::{TagKey, Variant};
use crate::upstream::{Caller, ResponseKind, UpstreamResponse};

/// Minimum size of content that counts as grant evidence. An empty blob, an empty JSON object and an empty layer are
/// the same in every repository.
const EVIDENCE_BYTES_MIN: u64 = 64;

/// Result of a revalidation.
pub struct Revalidated {
    /// Classification for the decision.
    pub revalidation: Revalidation,
    /// Upstream response, if there was one.
    pub response: Option<Arc<UpstreamResponse>>,
}

impl Revalidated {
    /// Without a response.
    pub(super) fn unavailable(cause: UpstreamFailure) -> Self {
        Self {
            revalidation: Revalidation::Unavailable(cause),
            response: None,
        }
    }

    /// Whether the upstream has the content and gives it to this caller.
    pub(super) fn is_success(&self) -> bool {
        matches!(
            self.revalidation,
            Revalidation::Digest { .. } | Revalidation::NoDigest
        )
    }

    /// Whether the response is a success without proof that the registry itself sent it.
    pub(super) fn is_unproven(&self) -> bool {
        let response = self.response.as_ref();
        matches!(
            self.revalidation,
            Revalidation::Unavailable(UpstreamFailure::NotRegistry)
        ) && response.is_some_and(|response| matches!(response.kind, ResponseKind::UnprovenDigest(_)))
    }
}

impl ReadContext<'_> {
    /// Revalidates with the upstream. If the cached entry could be served without a response, the wait is at most
    /// `revalidate_timeout`, and shorter or zero while the upstream is known to be unavailable.
    pub(super) async fn revalidate(&self, state: &CacheState) -> Revalidated {
        let (proxy, upstream) = (self.proxy, self.request.registry.upstream());
        let mut upstream_request = self.upstream_request();
        upstream_request.has_no_grant = self.has_no_grant();
        upstream_request.cached = state.cached.map(|cached| cached.digest);
        let mut wait = None;
        if state.has_fallback() {
            let (caller, endpoint) = (&upstream_request.caller, (&upstream_request.endpoint, true));
            match upstream.wait_limit(caller, endpoint, self.rule.revalidate_timeout) {
                Ok(limit) => wait = Some(limit),
                Err(cause) => return Revalidated::unavailable(cause),
            }
            // Serve the cached entry instead of waiting for a rate limit.
            upstream_request.caller.wait_deadline = None;
            upstream_request.caller.class = Class::Revalidation;
        }
        let call = proxy.coalesced_head(&upstream_request);
        let waiters = call.waiters().clone();
        let asking = proxy.head_or_get(call, &upstream_request, state.authorization);
        let response = match wait {
            None => asking.await,
            Some(wait) => {
                if let Ok(response) = tokio::time::timeout(wait, asking).await {
                    response
                } else {
                    // A request that is still queued here is no evidence about the upstream.
                    if !waiters.is_queued() {
                        upstream.record_timeout(&upstream_request.caller, &upstream_request.endpoint, wait);
                    }
                    // The response is still recorded when it arrives late.
                    waiters.detach();
                    return Revalidated::unavailable(UpstreamFailure::RevalidateTimeout);
                }
            }
        };
        let Some(response) = response else {
            return Revalidated::unavailable(UpstreamFailure::Abandoned);
        };
        self.request.upstream_caches.record(response.caches.as_ref());
        let revalidation = proxy
            .classify_for(&upstream_request, &response, Some(state))
            .await;
        // A request with a local token is sent without a credential. If the upstream denies it while the token service
        // is unavailable, report the outage. Otherwise report the 401, so that the client gets a real token.
        let is_local = self.request.authorization.as_ref().is_some_and(is_local_token);
        if is_local && matches!(revalidation, Revalidation::Denied(_)) && upstream.has_failed_realm() {
            return Revalidated::unavailable(UpstreamFailure::TokenService);
        }
        Revalidated {
            revalidation,
            response: Some(response),
        }
    }
}

impl ProxyService {
    /// Response to the `HEAD`. If its success is not proven to be the registry's and the caller has no current grant, a
    /// manifest is requested by `GET`, because its bytes prove the content. A blob is not fetched for this.
    async fn head_or_get(
        self: &Arc<Self>,
        call: SharedCall<Arc<UpstreamResponse>>,
        upstream_request: &UpstreamRequest,
        authorization: Authorization,
    ) -> Option<Arc<UpstreamResponse>> {
        let response = call.wait().await?;
        let needs_bytes = matches!(upstream_request.endpoint, Endpoint::Manifest { .. })
            && authorization != Authorization::Granted
            && matches!(response.kind, ResponseKind::UnprovenDigest(_))
            && response.body.is_none();
        if !needs_bytes {
            return Some(response);
        }
        Some(
            match Box::pin(self.fetch_manifest_at_once(upstream_request.clone())).await {
                Ok(manifest) => Arc::new(UpstreamResponse {
                    kind: if self.is_authorized(upstream_request).await {
                        ResponseKind::Digest(manifest.digest)
                    } else {
                        ResponseKind::UnprovenDigest(manifest.digest)
                    },
                    media_type: Some(manifest.media_type.clone()),
                    length: Some(manifest.bytes.len() as u64),
                    body: Some((manifest.bytes.clone(), manifest.media_type.clone())),
                    // The bytes prove the content, and not the times that the other sender states.
                    last_modified: None,
                    date: None,
                    ..response.as_ref().clone()
                }),
                Err(response) => response,
            },
        )
    }

    /// Whether the digest may be fabricated: the upstream did not name it for this request, and no manifest seen here
    /// references it. Such a request has the lowest priority and ends with its last waiter. Any other request continues
    /// once it was sent: a registry that first fetches the content itself takes longer than clients wait, and the clients
    /// retry.
    pub(super) fn may_be_fabricated(&self, upstream_request: &UpstreamRequest) -> bool {
        may_be_fabricated(
            &upstream_request.endpoint,
            upstream_request.has_no_grant,
            upstream_request.named,
            |digest| self.is_referenced(upstream_request, digest),
        )
    }

    /// One coalesced `HEAD` for all callers with the same key. Its response is recorded even if it arrives late.
    pub(super) fn coalesced_head(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
    ) -> SharedCall<Arc<UpstreamResponse>> {
        let key = CoalesceKey::new(self, upstream_request);
        let is_fabricated = self.may_be_fabricated(upstream_request);
        self.revalidations
            .share_for(key, upstream_request.demand(is_fabricated), |waiters| {
                if !is_fabricated {
                    waiters.detach();
                }
                let (proxy, upstream_request) = (Arc::clone(self), upstream_request.clone());
                async move {
                    let UpstreamRequest {
                        registry,
                        repository,
                        endpoint,
                        accept,
                        caller,
                        ..
                    } = &upstream_request;
                    let sent_at = Instant::now();
                    let caller = Caller {
                        waiters: Some(waiters.clone()),
                        ..caller.clone()
                    };
                    let asking = async {
                        if upstream_request.for_push {
                            registry.upstream().head_for_push(&caller, endpoint, accept).await
                        } else {
                            registry.upstream().head(&caller, endpoint, accept).await
                        }
                    };
                    let response = waiters.while_waited_for(asking).await?;
                    let (response, is_evidence) = proxy.check_evidence(&upstream_request, response).await;
                    if is_evidence || !response.kind.is_success() {
                        proxy.record_response(&upstream_request, &response, sent_at).await;
                    }
                    let is_trusted = is_evidence || proxy.is_authorized(&upstream_request).await;
                    if let (Some(tag), ResponseKind::Digest(digest), Some(media_type)) =
                        (upstream_request.tag(), response.kind, &response.media_type)
                        && is_trusted
                    {
                        proxy
                            .record_sighting(&upstream_request, tag, (digest, media_type), Some(&response))
                            .await;
                    }
                    match (endpoint, response.kind) {
                        (Endpoint::Manifest { reference, .. }, ResponseKind::Digest(digest))
                            if is_trusted =>
                        {
                            if proxy.may_update_tag(&upstream_request, reference, &digest).await {
                                let media_type = response.media_type.as_ref();
                                proxy
                                    .record_tag_if_current(&upstream_request, reference, digest, media_type)
                                    .await;
                            } else {
                                proxy.add_member(registry, repository, digest).await;
                            }
                        }
                        // The digest is not proven to be the registry's. It suffices to confirm the tag if it is a
                        // known digest of this repository and the principal is authorized.
                        (Endpoint::Manifest { reference, .. }, ResponseKind::UnprovenDigest(digest))
                            if proxy.is_member(registry, repository, digest).await
                                && proxy.is_authorized(&upstream_request).await
                                && proxy.may_update_tag(&upstream_request, reference, &digest).await =>
                        {
                            let media_type = response.media_type.as_ref();
                            proxy
                                .record_tag_if_current(&upstream_request, reference, digest, media_type)
                                .await;
                        }
                        // Proof that the upstream has this blob in this repository.
                        (
                            Endpoint::Blob {
                                digest: AnyDigest::Supported(digest),
                                ..
                            },
                            ResponseKind::Digest(_),
                        ) if is_trusted => {
                            proxy.add_member(registry, repository, *digest).await;
                            proxy
                                .settle_on_confirmation(&upstream_request, (*digest).into())
                                .await;
                        }
                        _ => {}
                    }
                    Some(Arc::new(response))
                }
            })
    }

    /// The response, and whether its success is evidence of a grant. A proxy or login page before the registry may
    /// answer 200 to everything and repeat the digest, which the client chose.
    ///
    /// If the content was seen in this repository and the stated length is correct, the success is evidence. Otherwise,
    /// if the content is cached or downloading and the caller has no grant, the success becomes unproven. If it is
    /// neither, there is nothing to give out without a fetch from the upstream.
    async fn check_evidence(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        response: UpstreamResponse,
    ) -> (UpstreamResponse, bool) {
        let (ResponseKind::Digest(digest), None) = (response.kind, &response.body) else {
            return (response, true);
        };
        let cached = match &upstream_request.endpoint {
            Endpoint::Manifest {
                reference: Reference::Digest(_),
                ..
            } => self
                .cached_manifest(&upstream_request.registry, &upstream_request.repository, &digest)
                .await
                .map(|manifest| manifest.bytes.len() as u64),
            Endpoint::Blob { .. } => {
                let found = self.store.read(move |view| view.blob(&digest)).await;
                let image = format_args!("{}@{digest}", upstream_request.repository);
                self.cached(&upstream_request.registry, &image, found)
                    .map(|handle| handle.size)
            }
            _ => return (response, true),
        };
        let is_evidence = match cached.filter(|size| response.length == Some(*size)) {
            Some(size) => self.is_evidence(upstream_request, digest, size).await,
            None => false,
        };
        let shows_nothing = cached.is_none() && !self.downloads.is_arriving(&digest);
        if is_evidence || shows_nothing || self.is_authorized(upstream_request).await {
            return (response, is_evidence);
        }
        let unproven = UpstreamResponse {
            kind: ResponseKind::UnprovenDigest(digest),
            ..response
        };
        (unproven, false)
    }

    /// Whether serving content of this digest and size to the caller proves access to the repository. The digest must
    /// belong to the repository, so that the caller cannot have invented it, and the content must be longer than the
    /// trivial content that all repositories share.
    pub(super) async fn is_evidence(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
        size: u64,
    ) -> bool {
        size >= EVIDENCE_BYTES_MIN
            && (self.is_referenced(upstream_request, digest)
                || self
                    .is_member(&upstream_request.registry, &upstream_request.repository, digest)
                    .await)
    }

    /// Whether a manifest served to an authorized client of this repository references this content.
    pub(super) fn is_referenced(&self, upstream_request: &UpstreamRequest, digest: Digest) -> bool {
        self.size_hints
            .get(&upstream_request.registry, &upstream_request.repository, digest)
            .is_some()
    }

    /// Whether this caller has a current grant in the repository.
    pub(super) async fn is_authorized(self: &Arc<Self>, upstream_request: &UpstreamRequest) -> bool {
        self.authorization_of(upstream_request).await == Authorization::Granted
    }

    /// Current authorization of this caller in the repository.
    pub(super) async fn authorization_of(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
    ) -> Authorization {
        let UpstreamRequest {
            registry,
            repository,
            caller,
            ..
        } = upstream_request;
        let account = self.account(registry, repository, upstream_request.client_credential());
        let grants = self
            .grants_of(registry, repository, caller.principal, account)
            .await;
        let evidence = GrantEvidence {
            is_in_repository: true,
            ..grants
        };
        let rule = registry.rule(repository, upstream_request.tag());
        authorize(&evidence, &rule.grant_ttls(), self.clock.now())
    }

    /// Classification of `response` for a client with this state, or for the cache itself (`None`), which is authorized.
    /// With a current grant, an unproven success for a manifest counts as its digest, because the bytes are verified
    /// against it.
    pub(super) async fn classify_for(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        response: &UpstreamResponse,
        state: Option<&CacheState>,
    ) -> Revalidation {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        let is_manifest = matches!(upstream_request.endpoint, Endpoint::Manifest { .. });
        let is_granted = state.is_none_or(|state| state.authorization == Authorization::Granted);
        let digest = match response.kind {
            ResponseKind::Digest(digest) => digest,
            ResponseKind::UnprovenDigest(digest) if is_manifest && is_granted => digest,
            _ => return self.classify(registry, repository, response).await,
        };
        let needs_presence = state.is_none_or(|state| state.needs_presence(&digest));
        self.classify_digest(registry, repository, digest, needs_presence)
            .await
    }

    /// Classification of `response` for this repository.
    pub(super) async fn classify(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        response: &UpstreamResponse,
    ) -> Revalidation {
        match response.kind {
            ResponseKind::UnprovenDigest(_) | ResponseKind::NoDigest => {
                Revalidation::Unavailable(UpstreamFailure::NotRegistry)
            }
            ResponseKind::Digest(digest) => self.classify_digest(registry, repository, digest, true).await,
            ResponseKind::NotFound => Revalidation::NotFound,
            // Any other 4xx (451, 423, …) is a denial too. A cached entry must never hide a denial.
            ResponseKind::Denied | ResponseKind::Other(_) if registry.has_proxy_credential() => {
                Revalidation::Denied(CredentialOwner::Proxy)
            }
            ResponseKind::Denied | ResponseKind::Other(_) => Revalidation::Denied(CredentialOwner::Client),
            ResponseKind::Unavailable(cause) => Revalidation::Unavailable(cause),
        }
    }

    /// Classification of a 2xx with this digest.
    async fn classify_digest(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: Digest,
        needs_presence: bool,
    ) -> Revalidation {
        if self.is_blocked(registry, repository, &digest) {
            return Revalidation::Blocked(digest);
        }
        let presence = if needs_presence {
            self.presence_of(registry, repository, &digest).await
        } else {
            Presence::None
        };
        Revalidation::Digest { digest, presence }
    }

    /// Whether the tag record may be set to `digest`. If the new manifest is not cached and another candidate is, the
    /// record stays: if the fetch failed, the cached manifest could no longer be found by its tag.
    async fn may_update_tag(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        reference: &Reference,
        digest: &Digest,
    ) -> bool {
        let Reference::Tag(tag) = reference else {
            return true;
        };
        if upstream_request.cached == Some(*digest) {
            return true;
        }
        let UpstreamRequest {
            registry,
            repository,
            accept,
            ..
        } = upstream_request;
        self.cached_manifest(registry, repository, digest).await.is_some()
            || self
                .candidates_for_tag(registry, repository, tag, Some(accept))
                .await
                .is_none()
    }

    /// Records the digest of a tag, and that the digest belongs to this repository.
    pub(super) async fn record_tag(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        reference: &Reference,
        digest: Digest,
        media_type: Option<&MediaType>,
    ) {
        let UpstreamRequest {
            registry,
            repository,
            accept,
            arrived_at,
            ..
        } = upstream_request;
        self.add_member(registry, repository, digest).await;
        let (Reference::Tag(tag), Some(media_type)) = (reference, media_type) else {
            return;
        };
        self.record_sighting(upstream_request, tag, (digest, media_type), None)
            .await;
        let key = TagKey {
            upstream: registry.shared_name(),
            repository: repository.clone(),
            tag: tag.clone(),
        };
        let now = self.clock.now();
        let variant = Variant {
            accept: accept.key(),
            digest,
            media_type: media_type.clone(),
            accepts_indexes: accept.lists_indexes(),
            confirmed_at: *arrived_at,
            first_seen_at: registry.checked_time().time_of_sight(now).at,
            previous: None,
            is_by_record: false,
            history: Vec::new(),
        };
        let stored = self.store.record_response(key, variant, now).await;
        log_store_error(stored, "store tag");
    }

    /// Records that the upstream has `digest` in this repository.
    pub(super) async fn add_member(
        &self,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: Digest,
    ) {
        const ACTION: &str = "store repository membership";
        match self.store.add_member(registry.name(), repository, &digest) {
            MembershipUpdate::Known => {}
            // Later steps read it from memory, so no request waits for the disk.
            MembershipUpdate::Pending(unwritten) => {
                let store = self.store.clone();
                tokio::spawn(
                    async move { log_store_error(store.persist_membership(unwritten).await, ACTION) },
                );
            }
            MembershipUpdate::NotInMemory => {
                let (registry, repository) = (Arc::clone(registry), repository.clone());
                let noted = self
                    .store
                    .write(move |store| store.add_member(registry.name(), &repository, &digest))
                    .await;
                log_store_error(noted, ACTION);
            }
        }
    }

    /// Whether the upstream is known to have `digest` in this repository.
    pub(super) async fn is_member(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: Digest,
    ) -> bool {
        self.read_cache(registry, repository, move |cached| cached.is_member(&digest))
            .await
    }
}

/// See [`ProxyService::may_be_fabricated`]. For a caller without a grant the result does not depend on whether the
/// digest is referenced, because priority and duration of the upstream request would reveal it.
fn may_be_fabricated(
    endpoint: &Endpoint,
    has_no_grant: bool,
    named: Option<Digest>,
    is_referenced: impl FnOnce(Digest) -> bool,
) -> bool {
    match endpoint {
        Endpoint::Manifest {
            reference: Reference::Digest(AnyDigest::Supported(digest)),
            ..
        }
        | Endpoint::Blob {
            digest: AnyDigest::Supported(digest),
            ..
        } => named != Some(*digest) && (has_no_grant || !is_referenced(*digest)),
        Endpoint::Manifest {
            reference: Reference::Digest(AnyDigest::Unsupported(_)),
            ..
        }
        | Endpoint::Blob { .. } => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use http::Method;

    use super::*;

    #[test]
    fn r01_digest_without_grant_may_be_fabricated() {
        let digest = Digest::of(crate::oci::Algorithm::Sha256, b"layer");
        for (path, by_digest) in [
            (format!("/v2/team/demo/blobs/{digest}"), true),
            (format!("/v2/team/demo/manifests/{digest}"), true),
            ("/v2/team/demo/manifests/1".to_owned(), false),
        ] {
            let endpoint = Endpoint::parse(&Method::HEAD, &path, None).unwrap();
            let may_be =
                |has_no_grant, is_known| may_be_fabricated(&endpoint, has_no_grant, None, |_| is_known);
            assert_eq!(may_be(true, true), may_be(true, false), "{path}");
            assert_eq!(may_be(true, true), by_digest, "{path}");
            assert_eq!((may_be(false, true), may_be(false, false)), (false, by_digest));
            let is_named = |named| !may_be_fabricated(&endpoint, true, Some(named), |_| false);
            assert!(is_named(digest), "the upstream named it to this caller");
            assert_eq!(
                is_named(Digest::of(crate::oci::Algorithm::Sha256, b"other")),
                !by_digest
            );
        }
    }
}
