//! Manifest requests by tag and by digest.

use std::ops::Deref;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::deadline::Deadline;
use super::evidence::{CachedManifest, Candidates, Evidence};
use super::manifest_fetch::UpstreamRequest;
use super::pipeline::{ReadContext, denied, denied_after};
use super::revalidate::Revalidated;
use super::shared_records::Given;
use super::{ProxyResponse, ServeInfo, ServeReason};
use crate::oci::{AnyDigest, Digest, Reference, UpstreamFailure};
use crate::policy::min_age::Maturity;
use crate::policy::{
    AgeFacts, Authorization, CacheState, ContentKind, Decision, DenyReason, HitReason, MissReason,
    Revalidation, decide,
};
use crate::store::StoreError;
use crate::store::manifests::StoredManifest;
use crate::store::tags::{TagKey, Variant};
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Largest manifest that is forwarded without being stored. No client accepts larger ones.
const PASSTHROUGH_MANIFEST_BYTES_MAX: u64 = 16 * 1024 * 1024;

impl ReadContext<'_> {
    pub(super) async fn manifest(&self, reference: &Reference) -> ProxyResponse {
        if self.proxy.shared.has_records() {
            // Boxed, so that the future of all other requests stays small.
            return Box::pin(self.manifest_with_records(reference)).await;
        }
        self.manifest_of_upstream(reference).await
    }

    /// The response with the records of other caches, if the upstream is unavailable and nothing is cached.
    async fn manifest_with_records(&self, reference: &Reference) -> ProxyResponse {
        if let Some(cause) = self.known_outage() {
            if let Some(read) = self.by_recorded_grant().await {
                return Box::pin(read.manifest_with_records(reference)).await;
            }
            // No client waits for the bucket while a copy can be served.
            let fallback = match reference {
                Reference::Tag(tag) => self.tag_evidence(tag, Some(self.tag_client())).await.state,
                Reference::Digest(digest) => self.digest_evidence(digest).await.state,
            };
            if !fallback.has_fallback()
                && let Some(recorded) = self.recorded_manifest(reference, cause).await
            {
                return recorded;
            }
        }
        let outcome = match reference {
            _ if self.may_use_records_alone() => {
                let serving: BoxFuture<'_, ProxyResponse> =
                    Box::pin(self.manifest_without_upstream(reference));
                serving.await
            }
            Reference::Tag(tag) if !tag.is_referrers_tag() => {
                let evidence = self.tag_evidence(tag, Some(self.tag_client())).await;
                let evidence = self.with_tag_record(tag, evidence).await;
                ManifestRequest::new(self).execute(evidence).await
            }
            _ => self.manifest_of_upstream(reference).await,
        };
        if let Some(read) = self.unmarked_if_revoked(Given::of(&outcome)).await {
            return read.manifest_of_upstream(reference).await;
        }
        match self.outage(&outcome) {
            Some(cause) => self.recorded_manifest(reference, cause).await.unwrap_or(outcome),
            None => outcome,
        }
    }

    pub(super) async fn manifest_of_upstream(&self, reference: &Reference) -> ProxyResponse {
        let evidence = match reference {
            // Boxed: few requests are for a referrers tag, and the future of all others stays small.
            Reference::Tag(tag) if tag.is_referrers_tag() => return Box::pin(self.referrers_tag(tag)).await,
            Reference::Tag(tag) => self.tag_evidence(tag, Some(self.tag_client())).await,
            Reference::Digest(AnyDigest::Supported(digest)) if self.has_no_grant() => {
                let manifest_request = ManifestRequest::new(self);
                return Box::pin(manifest_request.authorize_first(*digest)).await;
            }
            Reference::Digest(digest @ AnyDigest::Supported(_)) => self.digest_evidence(digest).await,
            Reference::Digest(digest @ AnyDigest::Unsupported(_)) => {
                let evidence = self.digest_evidence(digest).await;
                if evidence
                    .state
                    .cooling
                    .is_none_or(|cooling| cooling.named.is_mature())
                {
                    return Box::pin(self.fetch_uncached(PASSTHROUGH_MANIFEST_BYTES_MAX)).await;
                }
                evidence
            }
        };
        ManifestRequest::new(self).execute(evidence).await
    }
}

/// One request for a manifest.
pub(super) struct ManifestRequest<'a> {
    read: &'a ReadContext<'a>,
    began: Instant,
    /// Used if there is a cached fallback.
    deadline: Deadline,
}

impl<'a> Deref for ManifestRequest<'a> {
    type Target = ReadContext<'a>;

    fn deref(&self) -> &Self::Target {
        self.read
    }
}

impl<'a> ManifestRequest<'a> {
    pub(super) fn new(read: &'a ReadContext<'a>) -> Self {
        let began = Instant::now();
        Self {
            read,
            began,
            deadline: Deadline::new(began, read.rule.revalidate_timeout),
        }
    }

    fn upstream_request(&self) -> UpstreamRequest {
        UpstreamRequest {
            has_no_grant: self.has_no_grant(),
            ..self.read.upstream_request()
        }
    }

    /// Executes the decision: revalidates and decides again, then fetches or probes layers. If that fails, a last
    /// decision chooses the fallback.
    pub(super) async fn execute(&self, evidence: Evidence) -> ProxyResponse {
        match decide(&evidence.state) {
            // Boxed, here and below: a request that goes upstream can afford it, and the future of all others stays
            // small.
            Decision::Revalidate => {
                let revalidated = Box::pin(self.revalidate(&evidence.state)).await;
                Box::pin(self.on_revalidated(evidence, revalidated)).await
            }
            // Clients that only compare digests send `HEAD`; a `GET` would count as a pull at Docker Hub.
            Decision::Fetch(_) if self.request.head => {
                let revalidated = Box::pin(self.revalidate(&evidence.state)).await;
                Box::pin(self.respond_to_head(&evidence.state, revalidated)).await
            }
            // The shared storage may have the manifest of the digest that the tag names.
            Decision::Fetch(_) if self.request.tag().is_some() && self.proxy.shared.is_readable() => {
                let revalidated = self.revalidate(&evidence.state).await;
                Box::pin(self.on_revalidated(evidence, revalidated)).await
            }
            Decision::Fetch(why) => Box::pin(self.fetch(why, &evidence)).await,
            Decision::Serve(served) => self.serve(served, &evidence, None),
            Decision::ProbeLayers(served) => Box::pin(self.probe_and_serve(served, &evidence, None)).await,
            Decision::Deny(refusal) => denied(refusal, None, false),
        }
    }

    /// For a caller without a grant that requests a digest: revalidates before the digest is looked up in the cache
    /// (see [`ReadContext::has_no_grant`]).
    async fn authorize_first(&self, digest: Digest) -> ProxyResponse {
        let is_limited = self.rule.age_limit.is_on_by_digest();
        // The age is not looked up before the authorization. Until then, it only prevents forwarding.
        let unjudged = is_limited.then(|| AgeFacts::of_digest(Maturity::Mature));
        let unseen = self
            .state(ContentKind::Manifest, None, false)
            .with_cooling(unjudged);
        if let Decision::Deny(refusal) = decide(&unseen) {
            return denied(refusal, None, false);
        }
        let revalidated = self.revalidate(&unseen).await;
        let mut evidence = Evidence {
            state: unseen,
            candidates: None,
        };
        if revalidated.is_success() {
            let (candidates, _) = self.candidate_for_digest(digest).await;
            if candidates.is_none() && self.request.head && !is_limited {
                return self.respond_to_head(&unseen, revalidated).await;
            }
            let entry = candidates.as_ref().map(Candidates::entry);
            let state = self
                .state(ContentKind::Manifest, entry, true)
                .with_blocked(self.blocked(digest))
                .with_cooling(unjudged);
            evidence = Evidence { state, candidates };
        }
        Box::pin(self.on_revalidated(evidence, revalidated)).await
    }

    /// Boxed by its callers. What only few revalidations need is boxed here, so that the future of an unchanged tag is
    /// small.
    async fn on_revalidated(&self, evidence: Evidence, revalidated: Revalidated) -> ProxyResponse {
        // Forwarded content has no known age, so nothing is forwarded if a minimum age applies.
        let may_pass = evidence.state.cooling.is_none();
        if may_pass && revalidated.revalidation == Revalidation::Unavailable(UpstreamFailure::Unverifiable) {
            return Box::pin(self.fetch_uncached(PASSTHROUGH_MANIFEST_BYTES_MAX)).await;
        }
        if may_pass
            && revalidated.is_unproven()
            && let Some(manifest) = self.take_inline_body(revalidated.response.as_deref()).await
        {
            // The upstream sent this body to this very caller, so it may have it, even without proof that the sender is
            // the registry. No cached content is sent.
            return self.confirmed(manifest, ServeReason::Passthrough);
        }
        let mut evidence = Evidence {
            state: evidence.state.with_revalidation(revalidated.revalidation),
            ..evidence
        };
        if evidence.state.cooling.is_some() {
            let upstream_request = self.upstream_request();
            // Boxed, so that the future of all other requests stays small.
            evidence =
                Box::pin(self.with_ages(&upstream_request, self.deadline.at(), evidence, &revalidated)).await;
        }
        let evidence = &evidence;
        match decide(&evidence.state) {
            Decision::Serve(served @ (HitReason::TagMoved | HitReason::Cooling(_))) => {
                Box::pin(self.serve_target(served, evidence)).await
            }
            Decision::Serve(served) => self.serve(served, evidence, Some(revalidated.revalidation)),
            Decision::ProbeLayers(served) => {
                Box::pin(self.probe_and_serve(served, evidence, revalidated.response)).await
            }
            Decision::Fetch(why @ MissReason::Cooling(_)) => Box::pin(self.fetch_older(why, evidence)).await,
            Decision::Fetch(_)
                if self.request.head && evidence.state.cooling.is_some() && evidence.candidates.is_none() =>
            {
                Box::pin(self.respond_to_head(&evidence.state, revalidated)).await
            }
            Decision::Fetch(why) => match self.take_inline_body(revalidated.response.as_deref()).await {
                Some(manifest) => Box::pin(self.serve_fetched(manifest, why, evidence)).await,
                None => Box::pin(self.fetch(why, evidence)).await,
            },
            Decision::Deny(refusal) => {
                if refusal == DenyReason::NotFound {
                    self.remove_deleted_tag(&evidence.state).await;
                }
                denied_after(refusal, revalidated)
            }
            // Invariant of `decide`: no second revalidation.
            Decision::Revalidate => denied(
                DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
                revalidated.response,
                false,
            ),
        }
    }

    async fn take_inline_body(&self, response: Option<&UpstreamResponse>) -> Option<Arc<StoredManifest>> {
        self.proxy
            .take_inline_body(&self.upstream_request(), response?)
            .await
    }

    /// Removes a tag that was deleted upstream, so that the next outage does not restore it. Some registries respond 404 to a
    /// client without a right, and to one that does not accept the manifest's media type. So the client needs a current right,
    /// and its request must concern each recorded response.
    async fn remove_deleted_tag(&self, state: &CacheState) {
        let Some(tag) = self.request.tag() else { return };
        if state.cached.is_none() || state.authorization != Authorization::Granted {
            return;
        }
        let key = TagKey {
            upstream: self.request.registry.shared_name(),
            repository: self.repository.clone(),
            tag: tag.clone(),
        };
        let accept = self.request.accept.clone();
        let removed = self.proxy.store.write(move |store| {
            let record = store.tag(&key)?.unwrap_or_default();
            let concerns =
                |variant: &Variant| variant.accept == accept.key() || accept.lists(&variant.media_type);
            let is_gone = record.variants.iter().all(concerns);
            if is_gone {
                store.remove_tag(&key)?;
            }
            Ok::<_, StoreError>(is_gone)
        });
        let removed = removed.await;
        let is_kept = matches!(removed, Ok(false));
        super::log_store_error(removed, "remove tag that was deleted upstream");
        if !is_kept {
            self.proxy
                .note_unnamed_tags(&self.request.registry, self.repository, [tag], self.began);
        }
    }

    /// Responds to `HEAD` for an uncached manifest. Fetches it if the upstream's headers are incomplete.
    async fn respond_to_head(&self, state: &CacheState, revalidated: Revalidated) -> ProxyResponse {
        if let Revalidation::Blocked(digest) = revalidated.revalidation {
            return denied(DenyReason::Blocked(digest), revalidated.response, false);
        }
        if let Some(manifest) = self.take_inline_body(revalidated.response.as_deref()).await {
            return self.confirmed(manifest, ServeReason::Fetched(MissReason::NoDigest));
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
            return self.fetch_uncached(PASSTHROUGH_MANIFEST_BYTES_MAX).await;
        }
        let evidence = Evidence {
            state: state.with_revalidation(revalidated.revalidation),
            candidates: None,
        };
        match decide(&evidence.state) {
            Decision::Deny(refusal) => denied_after(refusal, revalidated),
            _ => self.fetch(MissReason::NoDigest, &evidence).await,
        }
    }

    /// Serves [`CacheState::target`]: the cached manifest that the tag moved to, or the older one if that is too young.
    /// It is looked up again, because it may have been evicted since.
    async fn serve_target(&self, served: HitReason, evidence: &Evidence) -> ProxyResponse {
        match self.target(&evidence.state).await {
            Some(manifest) => self.confirmed(manifest, ServeReason::Cached(served)),
            None => self.fetch(reason_to_fetch(served), evidence).await,
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
        evidence: &Evidence,
        response: Option<Arc<UpstreamResponse>>,
    ) -> ProxyResponse {
        let candidates = evidence.candidates.as_ref();
        let manifest = match served {
            HitReason::TagMoved | HitReason::Cooling(_) => self.target(&evidence.state).await,
            _ => candidates.map(|candidates| Arc::clone(&candidates.newest.manifest)),
        };
        let Some(manifest) = manifest else {
            return self.fetch(reason_to_fetch(served), evidence).await;
        };
        match self.probe_missing_layers(&manifest, candidates).await {
            Ok(()) => self.confirmed(manifest, ServeReason::Cached(served)),
            Err(cause) => self.serve_fallback(evidence, cause, response),
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
        upstream_request.caller.wait_deadline = Some(self.deadline.at());
        // Prefetches get a third of the time. The rest is for probes of the blobs whose prefetches are still queued.
        let prefetch_wait = self.rule.prefetch.then(|| self.rule.revalidate_timeout / 3);
        let images = (manifest, &fallback.manifest);
        let checking = self
            .proxy
            .probe_layers(upstream_request, prefetch_wait, images, &self.deadline);
        // Running probes continue, and the next request uses their results.
        let checked = self.deadline.run(checking).await;
        checked.unwrap_or(Err(UpstreamFailure::RevalidateTimeout))
    }

    /// Fetches the older image that is served instead of a young one. If the registry has deleted it, the next older one
    /// is served or fetched, once.
    async fn fetch_older(&self, why: MissReason, evidence: &Evidence) -> ProxyResponse {
        let outcome = self.fetch(why, evidence).await;
        let (registry, gone) = (&self.request.registry, &self.proxy.gone_digests);
        let client = self.tag_client();
        let is_gone = evidence
            .state
            .target()
            .is_some_and(|digest| gone.contains((&**registry, self.repository, digest), &client));
        let (true, ProxyResponse::Denied(_), Some(tag), Some(ages)) =
            (is_gone, &outcome, self.request.tag(), evidence.state.cooling)
        else {
            return outcome;
        };
        let now = self.proxy.clock.now().max(self.request.now);
        let (candidates, cooling) = self.tag_facts(tag, Some(client), now).await;
        let cooling = cooling.map(|next| AgeFacts {
            named: ages.named,
            ..next
        });
        let next = &Evidence::of_tag(&evidence.state, (candidates, cooling));
        match decide(&next.state) {
            Decision::Fetch(why @ MissReason::Cooling(_)) => self.fetch(why, next).await,
            Decision::Serve(served @ HitReason::Cooling(_)) => self.serve_target(served, next).await,
            Decision::ProbeLayers(served @ HitReason::Cooling(_)) => {
                self.probe_and_serve(served, next, None).await
            }
            _ => outcome,
        }
    }

    async fn fetch(&self, why: MissReason, evidence: &Evidence) -> ProxyResponse {
        let state = &evidence.state;
        let has_fallback = state.has_fallback();
        let mut upstream_request = self.upstream_request().naming(state.revalidation);
        // By tag, the upstream could send a digest that is younger than the one that was judged.
        if let (Some(target), Some(_)) = (state.target(), state.cooling) {
            upstream_request = upstream_request.by_digest(target);
        }
        let fetched = if has_fallback {
            let (upstream, started_at) = (self.request.registry.upstream(), Instant::now());
            let remaining = self.deadline.at().saturating_duration_since(started_at);
            let wait = match upstream.wait_limit(
                &upstream_request.caller,
                (&upstream_request.endpoint, false),
                remaining,
            ) {
                Ok(wait) => wait,
                Err(cause) => return self.serve_fallback(evidence, cause, None),
            };
            upstream_request.caller.wait_deadline = Some(self.deadline.at());
            let (caller, endpoint) = (upstream_request.caller.clone(), upstream_request.endpoint.clone());
            let fetching =
                self.proxy
                    .fetch_manifest_within(upstream_request, (started_at, wait), &self.deadline);
            if let Some(fetched) = fetching.await {
                fetched
            } else {
                // The fetch continues, and the next request uses its result.
                upstream.record_timeout(&caller, &endpoint, wait);
                return self.serve_fallback(evidence, UpstreamFailure::RevalidateTimeout, None);
            }
        } else {
            self.proxy.fetch_manifest(upstream_request).await
        };
        match fetched {
            Ok(manifest) => {
                if state.cooling.is_some() {
                    Box::pin(self.record_judged_tag(state, &manifest)).await;
                }
                self.serve_fetched(manifest, why, evidence).await
            }
            Err(response)
                if state.cooling.is_none()
                    && (response.cause() == UpstreamFailure::Unverifiable
                        || (response.cause() == UpstreamFailure::TooLarge
                            && evidence.candidates.is_none())) =>
            {
                self.fetch_uncached(PASSTHROUGH_MANIFEST_BYTES_MAX).await
            }
            Err(response) => {
                if let (ResponseKind::NotFound, MissReason::Cooling(_), Some(older)) =
                    (response.kind, why, state.target())
                {
                    let content = (&*self.request.registry, self.repository, older);
                    self.proxy.gone_digests.insert(content, &self.tag_client());
                }
                match (self.on_fetch_failed(evidence, response).await, why) {
                    // The 404 is for the older image that would be served instead of a young one, and not for the tag.
                    (ProxyResponse::Denied(denial), MissReason::Cooling(youth))
                        if matches!(
                            denial.reason,
                            DenyReason::NotFound
                                | DenyReason::UpstreamUnavailable(UpstreamFailure::Status(404))
                        ) =>
                    {
                        denied(DenyReason::TooYoung(youth), None, false)
                    }
                    (outcome, _) => outcome,
                }
            }
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

    async fn serve_fetched(
        &self,
        manifest: Arc<StoredManifest>,
        why: MissReason,
        evidence: &Evidence,
    ) -> ProxyResponse {
        // Before a probe, which prefetches the layers.
        if self.is_blocked(&manifest.digest) {
            return denied(DenyReason::Blocked(manifest.digest), None, false);
        }
        let candidates = evidence.candidates.as_ref();
        match self.probe_missing_layers(&manifest, candidates).await {
            Ok(()) => self.confirmed(manifest, ServeReason::Fetched(why)),
            Err(cause) => self.serve_fallback(evidence, cause, None),
        }
    }

    /// Response with a manifest that the upstream has just confirmed or sent.
    fn confirmed(&self, manifest: Arc<StoredManifest>, reason: ServeReason) -> ProxyResponse {
        let confirmed_at = self.request.tag().map(|_| self.request.now);
        ProxyResponse::Manifest(manifest, ServeInfo { reason, confirmed_at })
    }

    /// Handles a failed fetch: a denial denies the request, any other failure falls back to the cached manifest.
    async fn on_fetch_failed(&self, evidence: &Evidence, response: Arc<UpstreamResponse>) -> ProxyResponse {
        let revalidation = match self.classify(&response).await {
            // The `HEAD` named it and the `GET` returned 404: the new manifest is not available.
            Revalidation::NotFound if evidence.candidates.is_some() => {
                Revalidation::FetchFailed(UpstreamFailure::Status(404))
            }
            Revalidation::Unavailable(cause) if evidence.candidates.is_some() => {
                Revalidation::FetchFailed(cause)
            }
            Revalidation::Digest { .. }
            | Revalidation::Blocked(_)
            | Revalidation::NoDigest
            | Revalidation::NotDone => Revalidation::FetchFailed(UpstreamFailure::Malformed),
            revalidation => revalidation,
        };
        let state = evidence.state.with_revalidation(revalidation);
        self.decide_without(&state, evidence, Some(response), UpstreamFailure::Malformed)
    }

    /// Serves the complete cached image instead of a newer one that is not available.
    fn serve_fallback(
        &self,
        evidence: &Evidence,
        cause: UpstreamFailure,
        response: Option<Arc<UpstreamResponse>>,
    ) -> ProxyResponse {
        let state = CacheState {
            // The upstream has just authorized this principal.
            authorization: Authorization::Granted,
            revalidation: Revalidation::FetchFailed(cause),
            ..evidence.state
        };
        self.decide_without(&state, evidence, response, cause)
    }

    /// The last decision, after a fetch or a probe failed: the fallback or a denial.
    fn decide_without(
        &self,
        state: &CacheState,
        evidence: &Evidence,
        response: Option<Arc<UpstreamResponse>>,
        cause: UpstreamFailure,
    ) -> ProxyResponse {
        let revalidation = state.revalidation;
        let refusal = match decide(state) {
            Decision::Serve(served) => return self.serve(served, evidence, Some(revalidation)),
            Decision::Deny(refusal) => refusal,
            // Invariants of `decide`: no second revalidation, no second fetch.
            Decision::Revalidate | Decision::Fetch(_) | Decision::ProbeLayers(_) => {
                return denied(DenyReason::UpstreamUnavailable(cause), response, false);
            }
        };
        denied_after(
            refusal,
            Revalidated {
                revalidation,
                response,
            },
        )
    }

    pub(super) fn serve(
        &self,
        served: HitReason,
        evidence: &Evidence,
        revalidation: Option<Revalidation>,
    ) -> ProxyResponse {
        let candidates = evidence.candidates.as_ref();
        let copy = match served {
            HitReason::PreviousComplete(_) => candidates.and_then(|candidates| candidates.earlier.as_ref()),
            _ => candidates.map(|candidates| &candidates.newest),
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
        let info = ServeInfo {
            reason: ServeReason::Cached(served),
            confirmed_at: Some(if confirmed_now {
                self.request.now
            } else {
                *confirmed_at
            }),
        };
        ProxyResponse::Manifest(Arc::clone(manifest), info)
    }
}

/// Reason to fetch a manifest that was to be served with the reason `served` and is no longer cached.
fn reason_to_fetch(served: HitReason) -> MissReason {
    served.youth().map_or(MissReason::NewDigest, MissReason::Cooling)
}
