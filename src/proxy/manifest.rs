//! Manifest requests by tag and by digest.

use std::sync::Arc;

use tokio::time::{Instant, timeout_at};

use super::candidates::{CachedManifest, Candidates};
use super::cooling::TagClient;
use super::manifest_fetch::UpstreamRequest;
use super::revalidate::Revalidated;
use super::{AuthContext, ProxyResponse, ProxyService, Request, ServeInfo, ServeReason, denied, passthrough};
use crate::oci::{AnyDigest, Digest, Reference, Repository, Tag, UpstreamFailure};
use crate::policy::min_age::Maturity;
use crate::policy::rules::EffectivePolicy;
use crate::policy::{
    AgeFacts, Authorization, CacheState, ContentKind, CredentialOwner, Decision, DenyReason, HitReason,
    MissReason, Revalidation, decide,
};
use crate::store::manifests::StoredManifest;
use crate::store::tags::TagKey;
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Largest manifest that is forwarded without being stored. No client accepts larger ones.
const PASSTHROUGH_MANIFEST_BYTES_MAX: u64 = 16 * 1024 * 1024;

impl ProxyService {
    pub(super) async fn manifest(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        reference: Reference,
    ) -> ProxyResponse {
        let context = self.context(request, repository).await;
        match reference {
            Reference::Tag(tag) => self.by_tag(request, repository, &context, &tag).await,
            Reference::Digest(AnyDigest::Supported(digest)) => {
                self.by_digest(request, repository, &context, digest).await
            }
            Reference::Digest(digest @ AnyDigest::Unsupported(_)) => {
                let rule = request.registry.rule(repository, None);
                let cooling = self
                    .digest_facts(&request.registry, repository, &digest, rule, request.now)
                    .await;
                if cooling.is_some_and(|cooling| !cooling.named.is_mature()) {
                    let state = context
                        .state(rule, ContentKind::Manifest, None, false, request.now)
                        .with_cooling(cooling);
                    let manifest_request = ManifestRequest::new(self, request, repository, &context, rule);
                    return Box::pin(manifest_request.execute(&state, None)).await;
                }
                passthrough::fetch_uncached(
                    self,
                    request,
                    repository,
                    &context.caller,
                    PASSTHROUGH_MANIFEST_BYTES_MAX,
                )
                .await
            }
        }
    }

    async fn by_tag(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        context: &AuthContext,
        tag: &Tag,
    ) -> ProxyResponse {
        if tag.is_referrers_tag() {
            // Boxed: few requests are for a referrers tag, and the future of all others stays small.
            return Box::pin(self.referrers_tag(request, repository, context, tag)).await;
        }
        let rule = request.registry.rule(repository, Some(tag));
        let client = TagClient::new(&request.accept, &context.caller);
        let what = (tag, Some(client));
        let (candidates, cooling) = self
            .tag_facts(&request.registry, repository, what, rule, request.now)
            .await;
        let entry = candidates.as_ref().map(Candidates::entry);
        let state = context
            .state(rule, ContentKind::Tag, entry, true, request.now)
            .with_blocked(candidates.as_ref().and_then(Candidates::blocked))
            .with_cooling(cooling);
        let manifest_request = ManifestRequest::new(self, request, repository, context, rule);
        manifest_request.execute(&state, candidates).await
    }

    /// Executes the decision for a referrers tag.
    pub(super) async fn execute_referrers_tag(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        context: &AuthContext,
        state: &CacheState,
        candidates: Option<Candidates>,
    ) -> ProxyResponse {
        let rule = request.registry.rule(repository, request.tag());
        let manifest_request = ManifestRequest::new(self, request, repository, context, rule);
        manifest_request.execute(state, candidates).await
    }

    async fn by_digest(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        context: &AuthContext,
        digest: Digest,
    ) -> ProxyResponse {
        let rule = request.registry.rule(repository, None);
        if context.has_no_grant(rule, request.now) {
            let manifest_request = ManifestRequest::new(self, request, repository, context, rule);
            return Box::pin(manifest_request.authorize_first(digest)).await;
        }
        let (candidates, is_in_repository) = self
            .candidate_for_digest(&request.registry, repository, &digest, request.now)
            .await;
        let entry = candidates.as_ref().map(Candidates::entry);
        let state = context
            .state(rule, ContentKind::Manifest, entry, is_in_repository, request.now)
            .with_blocked(self.blocked(&request.registry, repository, digest))
            .with_cooling(
                self.digest_facts(&request.registry, repository, &digest.into(), rule, request.now)
                    .await,
            );
        let manifest_request = ManifestRequest::new(self, request, repository, context, rule);
        manifest_request.execute(&state, candidates).await
    }
}

/// Context of one manifest request.
struct ManifestRequest<'a> {
    proxy: &'a Arc<ProxyService>,
    request: &'a Request,
    repository: &'a Repository,
    context: &'a AuthContext,
    rule: &'a EffectivePolicy,
    /// If there is a cached fallback, the time at which it is served instead of a response of the upstream.
    deadline: Instant,
}

impl<'a> ManifestRequest<'a> {
    fn new(
        proxy: &'a Arc<ProxyService>,
        request: &'a Request,
        repository: &'a Repository,
        context: &'a AuthContext,
        rule: &'a EffectivePolicy,
    ) -> Self {
        Self {
            proxy,
            request,
            repository,
            context,
            rule,
            deadline: Instant::now() + rule.revalidate_timeout,
        }
    }

    fn tag_client(&self) -> TagClient {
        TagClient::new(&self.request.accept, &self.context.caller)
    }

    fn upstream_request(&self) -> UpstreamRequest {
        UpstreamRequest {
            has_no_grant: self.context.has_no_grant(self.rule, self.request.now),
            ..UpstreamRequest::of(self.request, self.repository, &self.context.caller)
        }
    }

    /// Executes the decision: revalidates and decides again, then fetches or probes layers. If that fails, a last
    /// decision chooses the fallback.
    async fn execute(&self, state: &CacheState, candidates: Option<Candidates>) -> ProxyResponse {
        match decide(state) {
            Decision::Revalidate => self.revalidate_and_serve(state, candidates).await,
            // Clients that only compare digests send `HEAD`; a `GET` would count as a pull at Docker Hub.
            Decision::Fetch(_) if self.request.head => self.head_uncached(state).await,
            // Boxed: a request that goes upstream can afford it, and the future of all others stays small.
            Decision::Fetch(why) => Box::pin(self.fetch(why, state, candidates)).await,
            Decision::Serve(served) => self.serve(served, candidates, None),
            Decision::ProbeLayers(served) => self.probe_and_serve(served, state, candidates, None).await,
            Decision::Deny(refusal) => denied(refusal, None, false),
        }
    }

    /// For a caller without a grant that requests a digest: revalidates before the digest is looked up in the cache
    /// (see [`AuthContext::has_no_grant`]).
    async fn authorize_first(&self, digest: Digest) -> ProxyResponse {
        let (registry, repository, now) = (&self.request.registry, self.repository, self.request.now);
        let is_limited = self.rule.age_limit.is_on_by_digest();
        // The age is not looked up before the authorization. Until then, it only prevents forwarding.
        let unjudged = is_limited.then(|| AgeFacts::of_digest(Maturity::Mature));
        let unseen = self
            .context
            .state(self.rule, ContentKind::Manifest, None, false, now)
            .with_cooling(unjudged);
        if let Decision::Deny(refusal) = decide(&unseen) {
            return denied(refusal, None, false);
        }
        let revalidated = self.revalidate(&unseen).await;
        if !matches!(
            revalidated.revalidation,
            Revalidation::Digest { .. } | Revalidation::NoDigest
        ) {
            return Box::pin(self.on_revalidated(&unseen, None, revalidated)).await;
        }
        let (candidates, _) = self
            .proxy
            .candidate_for_digest(registry, repository, &digest, now)
            .await;
        if candidates.is_none() && self.request.head && !is_limited {
            return self.respond_to_head(&unseen, revalidated).await;
        }
        let entry = candidates.as_ref().map(Candidates::entry);
        let state = self
            .context
            .state(self.rule, ContentKind::Manifest, entry, true, now)
            .with_blocked(self.proxy.blocked(registry, repository, digest))
            .with_cooling(unjudged);
        Box::pin(self.on_revalidated(&state, candidates, revalidated)).await
    }

    async fn revalidate_and_serve(
        &self,
        state: &CacheState,
        candidates: Option<Candidates>,
    ) -> ProxyResponse {
        let revalidated = self.revalidate(state).await;
        Box::pin(self.on_revalidated(state, candidates, revalidated)).await
    }

    async fn on_revalidated(
        &self,
        state: &CacheState,
        candidates: Option<Candidates>,
        revalidated: Revalidated,
    ) -> ProxyResponse {
        // Forwarded content has no known age, so nothing is forwarded if a minimum age applies.
        let may_pass = state.cooling.is_none();
        if may_pass && revalidated.revalidation == Revalidation::Unavailable(UpstreamFailure::Unverifiable) {
            return self.pass_through().await;
        }
        if may_pass
            && revalidated.is_unproven()
            && let Some(manifest) = self.take_inline_body(revalidated.response.as_deref()).await
        {
            // The upstream sent this body to this very caller, so it may have it, even without proof that the sender is
            // the registry. No cached content is sent.
            return self.manifest(manifest, ServeReason::Passthrough);
        }
        let state = state.with_revalidation(revalidated.revalidation);
        let (state, candidates) = if state.cooling.is_some() {
            let requests = (self.request, &self.upstream_request(), self.deadline);
            let facts = (state, candidates);
            // Boxed, so that the future of all other requests stays small.
            Box::pin(self.proxy.with_ages(requests, self.rule, facts, &revalidated)).await
        } else {
            (state, candidates)
        };
        match decide(&state) {
            Decision::Serve(served @ (HitReason::TagMoved | HitReason::Cooling(_))) => {
                self.serve_target(served, &state, candidates).await
            }
            Decision::Serve(served) => self.serve(served, candidates, Some(revalidated.revalidation)),
            Decision::ProbeLayers(served) => {
                self.probe_and_serve(served, &state, candidates, revalidated.response)
                    .await
            }
            Decision::Fetch(why @ MissReason::Cooling(_)) => {
                Box::pin(self.fetch_older(why, &state, candidates)).await
            }
            Decision::Fetch(_) if self.request.head && state.cooling.is_some() && candidates.is_none() => {
                self.respond_to_head(&state, revalidated).await
            }
            Decision::Fetch(why) => match self.take_inline_body(revalidated.response.as_deref()).await {
                Some(manifest) => self.serve_fetched(manifest, why, &state, candidates).await,
                None => self.fetch(why, &state, candidates).await,
            },
            Decision::Deny(refusal) => {
                if refusal == DenyReason::NotFound {
                    self.remove_deleted_tag(&state).await;
                }
                denied(
                    refusal,
                    revalidated.response,
                    is_proxy_credential_denied(revalidated.revalidation),
                )
            }
            // Invariant of `decide`: no second revalidation.
            Decision::Revalidate => denied(
                DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
                revalidated.response,
                false,
            ),
        }
    }

    async fn revalidate(&self, state: &CacheState) -> Revalidated {
        self.proxy
            .revalidate(
                self.request,
                self.repository,
                self.context,
                state,
                self.rule.revalidate_timeout,
            )
            .await
    }

    async fn take_inline_body(&self, response: Option<&UpstreamResponse>) -> Option<Arc<StoredManifest>> {
        self.proxy
            .take_inline_body(&self.upstream_request(), response?)
            .await
    }

    /// Removes a tag that was deleted upstream, so that the next outage does not restore it. Only for a principal
    /// with a grant, because some registries return 404 to all others.
    async fn remove_deleted_tag(&self, state: &CacheState) {
        let Some(tag) = self.request.tag() else { return };
        if state.authorization == Authorization::Unknown || state.cached.is_none() {
            return;
        }
        let key = TagKey {
            upstream: self.request.registry.name().into(),
            repository: self.repository.clone(),
            tag: tag.clone(),
        };
        let forgotten = self.proxy.store.write(move |store| store.remove_tag(&key)).await;
        super::cache_view::log_store_error(forgotten, "remove tag that was deleted upstream");
    }

    /// Responds to `HEAD` for an uncached manifest. Fetches it if the upstream's headers are incomplete.
    async fn head_uncached(&self, state: &CacheState) -> ProxyResponse {
        let revalidated = self.revalidate(state).await;
        self.respond_to_head(state, revalidated).await
    }

    async fn respond_to_head(&self, state: &CacheState, revalidated: Revalidated) -> ProxyResponse {
        if let Revalidation::Blocked(digest) = revalidated.revalidation {
            return denied(DenyReason::Blocked(digest), revalidated.response, false);
        }
        if let Some(manifest) = self.take_inline_body(revalidated.response.as_deref()).await {
            return self.manifest(manifest, ServeReason::Fetched(MissReason::NoDigest));
        }
        if let Some(response) = &revalidated.response
            && let (ResponseKind::Digest(digest), Some(media_type), Some(size)) =
                (response.kind, &response.media_type, response.length)
        {
            return ProxyResponse::ManifestHead {
                digest,
                media_type: media_type.clone(),
                size,
            };
        }
        if state.cooling.is_none()
            && revalidated.revalidation == Revalidation::Unavailable(UpstreamFailure::Unverifiable)
        {
            return self.pass_through().await;
        }
        let state = state.with_revalidation(revalidated.revalidation);
        match decide(&state) {
            Decision::Deny(refusal) => denied(
                refusal,
                revalidated.response,
                is_proxy_credential_denied(revalidated.revalidation),
            ),
            _ => self.fetch(MissReason::NoDigest, &state, None).await,
        }
    }

    /// Serves [`CacheState::target`]: the cached manifest that the tag moved to, or the older one if that is too young.
    /// It is looked up again, because it may have been evicted since.
    async fn serve_target(
        &self,
        served: HitReason,
        state: &CacheState,
        candidates: Option<Candidates>,
    ) -> ProxyResponse {
        match self.target(state).await {
            Some(manifest) => self.manifest(manifest, ServeReason::Cached(served)),
            None => self.fetch(reason_to_fetch(served), state, candidates).await,
        }
    }

    /// Cached manifest with the digest [`CacheState::target`].
    async fn target(&self, state: &CacheState) -> Option<Arc<StoredManifest>> {
        self.proxy
            .cached_manifest(&self.request.registry, self.repository, &state.target()?)
            .await
    }

    /// Serves an incomplete manifest if the upstream has its missing layers.
    async fn probe_and_serve(
        &self,
        served: HitReason,
        state: &CacheState,
        candidates: Option<Candidates>,
        response: Option<Arc<UpstreamResponse>>,
    ) -> ProxyResponse {
        let newest = candidates
            .as_ref()
            .map(|candidates| Arc::clone(&candidates.newest.manifest));
        let manifest = match served {
            HitReason::TagMoved | HitReason::Cooling(_) => self.target(state).await,
            _ => newest,
        };
        let Some(manifest) = manifest else {
            return self.fetch(reason_to_fetch(served), state, candidates).await;
        };
        match self.probe_missing_layers(&manifest, candidates.as_ref()).await {
            Ok(()) => self.manifest(manifest, ServeReason::Cached(served)),
            Err(cause) => self.serve_fallback(state, candidates, cause, response),
        }
    }

    /// Probes the missing layers of `manifest`, only if another image could be served instead.
    async fn probe_missing_layers(
        &self,
        manifest: &Arc<StoredManifest>,
        candidates: Option<&Candidates>,
    ) -> Result<(), UpstreamFailure> {
        let Some(fallback) = candidates.and_then(Candidates::complete) else {
            return Ok(());
        };
        if fallback.manifest.digest == manifest.digest {
            return Ok(());
        }
        let mut upstream_request = self.upstream_request();
        upstream_request.caller.wait_deadline = Some(self.deadline);
        // Prefetches get a third of the time. The rest is for probes of the blobs whose prefetches are still queued.
        let prefetch_wait = self.rule.prefetch.then(|| self.rule.revalidate_timeout / 3);
        let checking = self
            .proxy
            .probe_layers(upstream_request, prefetch_wait, manifest, &fallback.manifest);
        // Running probes continue, and the next request uses their results.
        let checked = timeout_at(self.deadline, checking).await;
        checked.unwrap_or(Err(UpstreamFailure::RevalidateTimeout))
    }

    /// Fetches the older image that is served instead of a young one. If the registry has deleted it, the next older one
    /// is served or fetched, once.
    async fn fetch_older(
        &self,
        why: MissReason,
        state: &CacheState,
        candidates: Option<Candidates>,
    ) -> ProxyResponse {
        let outcome = self.fetch(why, state, candidates).await;
        let (registry, repository) = (&self.request.registry, self.repository);
        let gone = &self.proxy.gone_digests;
        let client = self.tag_client();
        let is_gone = state
            .target()
            .is_some_and(|digest| gone.contains((&**registry, repository, digest), &client));
        let (true, ProxyResponse::Denied(_), Some(tag), Some(ages)) =
            (is_gone, &outcome, self.request.tag(), state.cooling)
        else {
            return outcome;
        };
        let now = self.proxy.clock.now().max(self.request.now);
        let what = (tag, Some(client));
        let (candidates, cooling) = self
            .proxy
            .tag_facts(registry, repository, what, self.rule, now)
            .await;
        let next = CacheState {
            cached: candidates.as_ref().map(Candidates::entry),
            blocked: candidates.as_ref().and_then(Candidates::blocked),
            cooling: cooling.map(|next| AgeFacts {
                named: ages.named,
                ..next
            }),
            ..*state
        };
        match decide(&next) {
            Decision::Fetch(why @ MissReason::Cooling(_)) => self.fetch(why, &next, candidates).await,
            Decision::Serve(served @ HitReason::Cooling(_)) => {
                self.serve_target(served, &next, candidates).await
            }
            Decision::ProbeLayers(served @ HitReason::Cooling(_)) => {
                self.probe_and_serve(served, &next, candidates, None).await
            }
            _ => outcome,
        }
    }

    async fn fetch(
        &self,
        why: MissReason,
        state: &CacheState,
        candidates: Option<Candidates>,
    ) -> ProxyResponse {
        let has_fallback = state.has_fallback();
        let mut upstream_request = self.upstream_request().naming(state.revalidation);
        // By tag, the upstream could send a digest that is younger than the one that was judged.
        if let (Some(target), Some(_)) = (state.target(), state.cooling) {
            upstream_request = upstream_request.by_digest(target);
        }
        let fetched = if has_fallback {
            let (upstream, started_at) = (self.request.registry.upstream(), Instant::now());
            let remaining = self.deadline.saturating_duration_since(started_at);
            let wait = match upstream.wait_limit(
                &upstream_request.caller,
                (&upstream_request.endpoint, false),
                remaining,
            ) {
                Ok(wait) => wait,
                Err(cause) => return self.serve_fallback(state, candidates, cause, None),
            };
            upstream_request.caller.wait_deadline = Some(self.deadline);
            let (caller, endpoint) = (upstream_request.caller.clone(), upstream_request.endpoint.clone());
            if let Ok(fetched) =
                timeout_at(started_at + wait, self.proxy.fetch_manifest(upstream_request)).await
            {
                fetched
            } else {
                // The fetch continues, and the next request uses its result.
                upstream.record_timeout(&caller, &endpoint, wait);
                return self.serve_fallback(state, candidates, UpstreamFailure::RevalidateTimeout, None);
            }
        } else {
            self.proxy.fetch_manifest(upstream_request).await
        };
        match fetched {
            Ok(manifest) => {
                if state.cooling.is_some() {
                    Box::pin(self.record_judged_tag(state, &manifest)).await;
                }
                self.serve_fetched(manifest, why, state, candidates).await
            }
            Err(response)
                if state.cooling.is_none()
                    && (response.cause() == UpstreamFailure::Unverifiable
                        || (response.cause() == UpstreamFailure::TooLarge && candidates.is_none())) =>
            {
                self.pass_through().await
            }
            Err(response) => {
                if let (ResponseKind::NotFound, MissReason::Cooling(_), Some(older)) =
                    (response.kind, why, state.target())
                {
                    let content = (&*self.request.registry, self.repository, older);
                    self.proxy.gone_digests.insert(content, &self.tag_client());
                }
                self.on_older_failed(state, candidates, response, why).await
            }
        }
    }

    /// As [`Self::on_fetch_failed`], for any reason of the fetch.
    async fn on_older_failed(
        &self,
        state: &CacheState,
        candidates: Option<Candidates>,
        response: Arc<UpstreamResponse>,
        why: MissReason,
    ) -> ProxyResponse {
        match (self.on_fetch_failed(state, candidates, response).await, why) {
            // The 404 is for the older image that would be served instead of a young one, and not for the tag.
            (ProxyResponse::Denied(denial), MissReason::Cooling(youth))
                if matches!(
                    denial.reason,
                    DenyReason::NotFound | DenyReason::UpstreamUnavailable(UpstreamFailure::Status(404))
                ) =>
            {
                denied(DenyReason::TooYoung(youth), None, false)
            }
            (outcome, _) => outcome,
        }
    }

    /// Records the tag after its manifest was fetched by digest, because of a minimum age.
    async fn record_judged_tag(&self, state: &CacheState, manifest: &StoredManifest) {
        let named = match state.revalidation {
            Revalidation::Digest { digest, .. } => Some(digest),
            _ => None,
        };
        let Some(tag) = self.request.tag() else {
            return;
        };
        let upstream_request = self.upstream_request();
        if named == Some(manifest.digest) && self.proxy.is_authorized(&upstream_request).await {
            let (reference, media_type) = (Reference::Tag(tag.clone()), Some(&manifest.media_type));
            self.proxy
                .record_tag_if_current(&upstream_request, &reference, manifest.digest, media_type)
                .await;
        }
    }

    /// Forwards the upstream's response for content that cannot be stored. Only a denial is recorded from it.
    async fn pass_through(&self) -> ProxyResponse {
        passthrough::fetch_uncached(
            self.proxy,
            self.request,
            self.repository,
            &self.context.caller,
            PASSTHROUGH_MANIFEST_BYTES_MAX,
        )
        .await
    }

    async fn serve_fetched(
        &self,
        manifest: Arc<StoredManifest>,
        why: MissReason,
        state: &CacheState,
        candidates: Option<Candidates>,
    ) -> ProxyResponse {
        let registry = &self.request.registry;
        // Before a probe, which prefetches the layers.
        if self.proxy.is_blocked(registry, self.repository, &manifest.digest) {
            return denied(DenyReason::Blocked(manifest.digest), None, false);
        }
        match self.probe_missing_layers(&manifest, candidates.as_ref()).await {
            Ok(()) => self.manifest(manifest, ServeReason::Fetched(why)),
            Err(cause) => self.serve_fallback(state, candidates, cause, None),
        }
    }

    /// Response with a manifest that the upstream has just confirmed or sent.
    fn manifest(&self, manifest: Arc<StoredManifest>, reason: ServeReason) -> ProxyResponse {
        let confirmed_at = self.request.tag().map(|_| self.request.now);
        ProxyResponse::Manifest(manifest, ServeInfo { reason, confirmed_at })
    }

    /// Handles a failed fetch: a denial denies the request, any other failure falls back to the cached manifest.
    async fn on_fetch_failed(
        &self,
        state: &CacheState,
        candidates: Option<Candidates>,
        response: Arc<UpstreamResponse>,
    ) -> ProxyResponse {
        let revalidation = self
            .proxy
            .classify(&self.request.registry, self.repository, &response)
            .await;
        let revalidation = match revalidation {
            // The `HEAD` named it and the `GET` returned 404: the new manifest is not available.
            Revalidation::NotFound if candidates.is_some() => {
                Revalidation::FetchFailed(UpstreamFailure::Status(404))
            }
            Revalidation::Unavailable(cause) if candidates.is_some() => Revalidation::FetchFailed(cause),
            Revalidation::Digest { .. }
            | Revalidation::Blocked(_)
            | Revalidation::NoDigest
            | Revalidation::NotDone => Revalidation::FetchFailed(UpstreamFailure::Malformed),
            revalidation => revalidation,
        };
        match decide(&state.with_revalidation(revalidation)) {
            Decision::Serve(served) => self.serve(served, candidates, Some(revalidation)),
            Decision::Deny(refusal) => {
                denied(refusal, Some(response), is_proxy_credential_denied(revalidation))
            }
            // Invariants of `decide`: no second revalidation, no second fetch.
            Decision::Revalidate | Decision::Fetch(_) | Decision::ProbeLayers(_) => denied(
                DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
                Some(response),
                false,
            ),
        }
    }

    /// Serves the complete cached image instead of a newer one that is not available.
    fn serve_fallback(
        &self,
        state: &CacheState,
        candidates: Option<Candidates>,
        cause: UpstreamFailure,
        response: Option<Arc<UpstreamResponse>>,
    ) -> ProxyResponse {
        // The upstream has just authorized this principal.
        let revalidation = Revalidation::FetchFailed(cause);
        match decide(&CacheState {
            authorization: Authorization::Granted,
            revalidation,
            ..*state
        }) {
            Decision::Serve(served) => self.serve(served, candidates, Some(revalidation)),
            Decision::Deny(refusal) => denied(refusal, response, false),
            // Invariants of `decide`: no second revalidation, no second fetch.
            Decision::Revalidate | Decision::Fetch(_) | Decision::ProbeLayers(_) => {
                denied(DenyReason::UpstreamUnavailable(cause), response, false)
            }
        }
    }

    fn serve(
        &self,
        served: HitReason,
        candidates: Option<Candidates>,
        revalidation: Option<Revalidation>,
    ) -> ProxyResponse {
        let copy = match (served, candidates) {
            (HitReason::PreviousComplete(_), Some(candidates)) => candidates.earlier,
            (_, Some(candidates)) => Some(candidates.newest),
            (_, None) => None,
        };
        let Some(CachedManifest {
            manifest,
            confirmed_at,
        }) = copy
        else {
            // Invariant of `decide`: it serves only cached content.
            return denied(DenyReason::NotCached, None, false);
        };
        let confirmed_now =
            matches!(revalidation, Some(Revalidation::Digest { .. })) && !served.may_be_outdated();
        let confirmed_at = if confirmed_now {
            self.request.now
        } else {
            confirmed_at
        };
        ProxyResponse::Manifest(
            manifest,
            ServeInfo {
                reason: ServeReason::Cached(served),
                confirmed_at: Some(confirmed_at),
            },
        )
    }
}

/// Reason to fetch a manifest that was to be served with the reason `served` and is no longer cached.
fn reason_to_fetch(served: HitReason) -> MissReason {
    served.youth().map_or(MissReason::NewDigest, MissReason::Cooling)
}

fn is_proxy_credential_denied(revalidation: Revalidation) -> bool {
    revalidation == Revalidation::Denied(CredentialOwner::Proxy)
}
