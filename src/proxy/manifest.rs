//! Manifests: by tag, where the decision lives, and by digest, where nothing can change.

use std::sync::Arc;

use tokio::time::{Instant, timeout_at};

use super::candidates::{CachedManifest, Candidates};
use super::manifest_fetch::UpstreamRequest;
use super::revalidate::Revalidated;
use super::{AuthContext, Denied, ProxyResponse, ProxyService, Request, ServeInfo, ServeReason, passthrough};
use crate::oci::{AnyDigest, Digest, Reference, Repository, Tag, UpstreamFailure};
use crate::policy::rules::EffectivePolicy;
use crate::policy::{
    Authorization, CacheState, ContentKind, CredentialOwner, Decision, DenyReason, HitReason, MissReason,
    Revalidation, decide,
};
use crate::store::manifests::StoredManifest;
use crate::store::tags::TagKey;
use crate::upstream::{ResponseKind, UpstreamResponse};

/// A manifest that is too large to be kept is passed on as it comes, up to this size. Larger ones, no client takes.
const PASSED_MANIFEST_BYTES_MAX: u64 = 16 * 1024 * 1024;

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
            Reference::Digest(AnyDigest::Unsupported(_)) => {
                passthrough::unverifiable(
                    self,
                    request,
                    repository,
                    &context.caller,
                    PASSED_MANIFEST_BYTES_MAX,
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
            // On the heap: few requests are for such a tag, and the state of all others stays as small as it is.
            return Box::pin(self.referrers_tag(request, repository, context, tag)).await;
        }
        let rule = request.site.rule(repository, Some(tag));
        let accept = Some(&request.accept);
        let copies = self.copies_of_tag(&request.site, repository, tag, accept).await;
        let held = copies.as_ref().map(Candidates::held);
        let situation = context.situation(rule, ContentKind::Tag, held, true, request.now);
        let road = ManifestRequest::new(self, request, repository, context, rule);
        road.carry_out(situation, copies).await
    }

    /// Carries out what is decided about a referrers tag.
    pub(super) async fn judged(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        context: &AuthContext,
        situation: CacheState,
        copies: Option<Candidates>,
    ) -> ProxyResponse {
        let rule = request.site.rule(repository, request.tag());
        let road = ManifestRequest::new(self, request, repository, context, rule);
        road.carry_out(situation, copies).await
    }

    async fn by_digest(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        context: &AuthContext,
        digest: Digest,
    ) -> ProxyResponse {
        let rule = request.site.rule(repository, None);
        if context.is_stranger(rule, request.now) {
            let road = ManifestRequest::new(self, request, repository, context, rule);
            return road.introduced(digest).await;
        }
        let (copies, seen) = self
            .copy_of_digest(&request.site, repository, &digest, request.now)
            .await;
        let held = copies.as_ref().map(Candidates::held);
        let situation = context.situation(rule, ContentKind::Manifest, held, seen, request.now);
        let road = ManifestRequest::new(self, request, repository, context, rule);
        road.carry_out(situation, copies).await
    }
}

/// The facts that carrying out a verdict needs.
struct ManifestRequest<'a> {
    pull: &'a Arc<ProxyService>,
    request: &'a Request,
    repository: &'a Repository,
    context: &'a AuthContext,
    rule: &'a EffectivePolicy,
    /// Until when a client waits that could be given a copy.
    deadline: Instant,
}

impl<'a> ManifestRequest<'a> {
    fn new(
        pull: &'a Arc<ProxyService>,
        request: &'a Request,
        repository: &'a Repository,
        context: &'a AuthContext,
        rule: &'a EffectivePolicy,
    ) -> Self {
        Self {
            pull,
            request,
            repository,
            context,
            rule,
            deadline: Instant::now() + rule.revalidate_timeout,
        }
    }

    fn wanted(&self) -> UpstreamRequest {
        UpstreamRequest {
            is_strangers: self.context.is_stranger(self.rule, self.request.now),
            ..UpstreamRequest::of(self.request, self.repository, &self.context.caller)
        }
    }

    /// Decide, ask if need be, decide again, fetch or check if need be, and decide once more if that failed.
    async fn carry_out(&self, situation: CacheState, copies: Option<Candidates>) -> ProxyResponse {
        match decide(&situation) {
            Decision::Revalidate => self.after_asking(situation, copies).await,
            // A head alone is asked for by those who only compare; a GET would count as a pull at Docker Hub.
            Decision::Fetch(_) if self.request.head => self.head_of_unheld(situation).await,
            Decision::Fetch(why) => self.fetch(why, situation, copies).await,
            Decision::Serve(served) => self.serve(served, copies, None),
            Decision::ProbeLayers(served) => self.check(served, situation, copies, None).await,
            Decision::Deny(refusal) => refused(refusal, None, false),
        }
    }

    /// For one who has shown no right here and asks by digest: see [`AuthContext::is_stranger`].
    async fn introduced(&self, digest: Digest) -> ProxyResponse {
        let (site, repository, now) = (&self.request.site, self.repository, self.request.now);
        let unseen = self
            .context
            .situation(self.rule, ContentKind::Manifest, None, false, now);
        if let Decision::Deny(refusal) = decide(&unseen) {
            return refused(refusal, None, false);
        }
        let asked = self.ask(&unseen).await;
        if !matches!(
            asked.revalidation,
            Revalidation::Digest { .. } | Revalidation::NoDigest
        ) {
            return self.after_answer(unseen, None, asked).await;
        }
        let (copies, _) = self.pull.copy_of_digest(site, repository, &digest, now).await;
        if copies.is_none() && self.request.head {
            return self.head_said(unseen, asked).await;
        }
        let held = copies.as_ref().map(Candidates::held);
        let situation = self
            .context
            .situation(self.rule, ContentKind::Manifest, held, true, now);
        self.after_answer(situation, copies, asked).await
    }

    async fn after_asking(&self, situation: CacheState, copies: Option<Candidates>) -> ProxyResponse {
        let asked = self.ask(&situation).await;
        self.after_answer(situation, copies, asked).await
    }

    async fn after_answer(
        &self,
        situation: CacheState,
        copies: Option<Candidates>,
        asked: Revalidated,
    ) -> ProxyResponse {
        if asked.revalidation == Revalidation::Unavailable(UpstreamFailure::Unverifiable) {
            return self.pass().await;
        }
        if asked.is_unproven()
            && let Some(manifest) = self.brought(asked.answer.as_deref()).await
        {
            // Whoever sent it, it is what this caller was given. Nothing cached is shown for it.
            return self.manifest(manifest, ServeReason::Passthrough);
        }
        let situation = situation.with_revalidation(asked.revalidation);
        match decide(&situation) {
            Decision::Serve(HitReason::TagMoved) => self.serve_moved(situation, copies, asked).await,
            Decision::Serve(served) => self.serve(served, copies, Some(asked.revalidation)),
            Decision::ProbeLayers(served) => self.check(served, situation, copies, asked.answer).await,
            Decision::Fetch(why) => match self.brought(asked.answer.as_deref()).await {
                Some(manifest) => self.fetched(manifest, why, situation, copies).await,
                None => self.fetch(why, situation, copies).await,
            },
            Decision::Deny(refusal) => {
                if refusal == DenyReason::NotFound {
                    self.forget(&situation).await;
                }
                refused(refusal, asked.answer, own_credential(asked.revalidation))
            }
            // A law of the decision: nothing is asked twice.
            Decision::Revalidate => refused(
                DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
                asked.answer,
                false,
            ),
        }
    }

    async fn ask(&self, situation: &CacheState) -> Revalidated {
        self.pull
            .ask(
                self.request,
                self.repository,
                self.context,
                situation,
                self.rule.revalidate_timeout,
            )
            .await
    }

    async fn brought(&self, answer: Option<&UpstreamResponse>) -> Option<Arc<StoredManifest>> {
        self.pull.brought(&self.wanted(), answer?).await
    }

    /// A tag deleted upstream must not come back with the next outage. Only a principal that may read the repository
    /// is believed: some registries say 404 to all others.
    async fn forget(&self, situation: &CacheState) {
        let Some(tag) = self.request.tag() else { return };
        if situation.authorization == Authorization::Unknown || situation.cached.is_none() {
            return;
        }
        let key = TagKey {
            upstream: self.request.site.name().into(),
            repository: self.repository.clone(),
            tag: tag.clone(),
        };
        let forgotten = self.pull.store.write(move |store| store.remove_tag(&key)).await;
        super::revalidate::report(forgotten, "forget a tag that was deleted upstream");
    }

    /// The head of something not held, as the upstream gives it; fetched whole where the head does not say enough.
    async fn head_of_unheld(&self, situation: CacheState) -> ProxyResponse {
        let asked = self.ask(&situation).await;
        self.head_said(situation, asked).await
    }

    async fn head_said(&self, situation: CacheState, asked: Revalidated) -> ProxyResponse {
        if let Some(manifest) = self.brought(asked.answer.as_deref()).await {
            return self.manifest(manifest, ServeReason::Fetched(MissReason::NoDigest));
        }
        if let Some(answer) = &asked.answer
            && let (ResponseKind::Digest(digest), Some(media_type), Some(size)) =
                (answer.kind, &answer.media_type, answer.length)
        {
            return ProxyResponse::ManifestHead {
                digest,
                media_type: media_type.clone(),
                size,
            };
        }
        if asked.revalidation == Revalidation::Unavailable(UpstreamFailure::Unverifiable) {
            return self.pass().await;
        }
        let situation = situation.with_revalidation(asked.revalidation);
        match decide(&situation) {
            Decision::Deny(refusal) => refused(refusal, asked.answer, own_credential(asked.revalidation)),
            _ => self.fetch(MissReason::NoDigest, situation, None).await,
        }
    }

    /// The manifest that the tag names now is held: look it up once more, for it may just have been evicted.
    async fn serve_moved(
        &self,
        situation: CacheState,
        copies: Option<Candidates>,
        asked: Revalidated,
    ) -> ProxyResponse {
        match self.named(asked.revalidation).await {
            Some(manifest) => self.manifest(manifest, ServeReason::Cached(HitReason::TagMoved)),
            None => self.fetch(MissReason::NewDigest, situation, copies).await,
        }
    }

    /// The manifest of the digest that was named just now.
    async fn named(&self, revalidation: Revalidation) -> Option<Arc<StoredManifest>> {
        match revalidation {
            Revalidation::Digest { digest, .. } => {
                self.pull
                    .cached_manifest(&self.request.site, self.repository, &digest)
                    .await
            }
            _ => None,
        }
    }

    /// Serves a manifest of which not all is held, if the upstream has the rest.
    async fn check(
        &self,
        served: HitReason,
        situation: CacheState,
        copies: Option<Candidates>,
        answer: Option<Arc<UpstreamResponse>>,
    ) -> ProxyResponse {
        let newest = copies.as_ref().map(|copies| Arc::clone(&copies.newest.manifest));
        let manifest = match served {
            HitReason::TagMoved => self.named(situation.revalidation).await,
            _ => newest,
        };
        let Some(manifest) = manifest else {
            return self.fetch(MissReason::NewDigest, situation, copies).await;
        };
        match self.rest_of(&manifest, copies.as_ref()).await {
            Ok(()) => self.manifest(manifest, ServeReason::Cached(served)),
            Err(cause) => self.instead(situation, copies, cause, answer),
        }
    }

    /// Whether the upstream has what of `manifest` is not held; asked only where there is something else to serve.
    async fn rest_of(
        &self,
        manifest: &Arc<StoredManifest>,
        copies: Option<&Candidates>,
    ) -> Result<(), UpstreamFailure> {
        let Some(instead) = copies.and_then(Candidates::whole) else {
            return Ok(());
        };
        if instead.manifest.digest == manifest.digest {
            return Ok(());
        }
        let mut wanted = self.wanted();
        wanted.caller.wait_deadline = Some(self.deadline);
        // Most of the time is left for questions about those whose turn has not come.
        let begin_for = self.rule.prefetch.then(|| self.rule.revalidate_timeout / 3);
        let checking = self.pull.check(wanted, begin_for, manifest, &instead.manifest);
        // What was asked goes on being asked; the next who comes finds the answers.
        let checked = timeout_at(self.deadline, checking).await;
        checked.unwrap_or(Err(UpstreamFailure::RevalidateTimeout))
    }

    async fn fetch(
        &self,
        why: MissReason,
        situation: CacheState,
        copies: Option<Candidates>,
    ) -> ProxyResponse {
        let can_do_without = matches!(
            decide(
                &situation.with_revalidation(Revalidation::FetchFailed(UpstreamFailure::RevalidateTimeout))
            ),
            Decision::Serve(_)
        );
        let mut wanted = self.wanted().naming(situation.revalidation);
        let fetched = if can_do_without {
            let (upstream, began) = (self.request.site.upstream(), Instant::now());
            let budget = self.deadline.saturating_duration_since(began);
            let wait = match upstream.wait_limit(&wanted.caller, (&wanted.endpoint, false), budget) {
                Ok(wait) => wait,
                Err(cause) => return self.instead(situation, copies, cause, None),
            };
            wanted.caller.wait_deadline = Some(self.deadline);
            let (caller, endpoint) = (wanted.caller.clone(), wanted.endpoint.clone());
            if let Ok(fetched) = timeout_at(began + wait, self.pull.fetch_manifest(wanted)).await {
                fetched
            } else {
                // The fetch goes on; the next asker finds its result.
                upstream.record_timeout(&caller, &endpoint, wait);
                return self.instead(situation, copies, UpstreamFailure::RevalidateTimeout, None);
            }
        } else {
            self.pull.fetch_manifest(wanted).await
        };
        match fetched {
            Ok(manifest) => self.fetched(manifest, why, situation, copies).await,
            Err(answer)
                if answer.cause() == UpstreamFailure::Unverifiable
                    || (answer.cause() == UpstreamFailure::TooLarge && copies.is_none()) =>
            {
                self.pass().await
            }
            Err(answer) => self.after_failed_fetch(situation, copies, answer).await,
        }
    }

    /// What cannot be kept: the upstream's own response to this caller. Of it only a denial is noted.
    async fn pass(&self) -> ProxyResponse {
        passthrough::unverifiable(
            self.pull,
            self.request,
            self.repository,
            &self.context.caller,
            PASSED_MANIFEST_BYTES_MAX,
        )
        .await
    }

    async fn fetched(
        &self,
        manifest: Arc<StoredManifest>,
        why: MissReason,
        situation: CacheState,
        copies: Option<Candidates>,
    ) -> ProxyResponse {
        match self.rest_of(&manifest, copies.as_ref()).await {
            Ok(()) => self.manifest(manifest, ServeReason::Fetched(why)),
            Err(cause) => self.instead(situation, copies, cause, None),
        }
    }

    /// What the upstream has just confirmed or given.
    fn manifest(&self, manifest: Arc<StoredManifest>, reason: ServeReason) -> ProxyResponse {
        let confirmed_at = self.request.tag().map(|_| self.request.now);
        ProxyResponse::Manifest(manifest, ServeInfo { reason, confirmed_at })
    }

    /// A refusal of the fetch is a refusal; anything else leaves what is held.
    async fn after_failed_fetch(
        &self,
        situation: CacheState,
        copies: Option<Candidates>,
        answer: Arc<UpstreamResponse>,
    ) -> ProxyResponse {
        let revalidation = self
            .pull
            .heard(&self.request.site, self.repository, &answer)
            .await;
        let revalidation = match revalidation {
            // Named by the HEAD, absent a moment later: the new one cannot be had.
            Revalidation::NotFound if copies.is_some() => {
                Revalidation::FetchFailed(UpstreamFailure::Status(404))
            }
            Revalidation::Unavailable(cause) if copies.is_some() => Revalidation::FetchFailed(cause),
            Revalidation::Digest { .. } | Revalidation::NoDigest | Revalidation::NotDone => {
                Revalidation::FetchFailed(UpstreamFailure::Malformed)
            }
            revalidation => revalidation,
        };
        match decide(&situation.with_revalidation(revalidation)) {
            Decision::Serve(served) => self.serve(served, copies, Some(revalidation)),
            Decision::Deny(refusal) => refused(refusal, Some(answer), own_credential(revalidation)),
            // Laws of the decision: no second question, no second fetch.
            Decision::Revalidate | Decision::Fetch(_) | Decision::ProbeLayers(_) => refused(
                DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
                Some(answer),
                false,
            ),
        }
    }

    /// What is held whole, in place of something newer that could not be had.
    fn instead(
        &self,
        situation: CacheState,
        copies: Option<Candidates>,
        cause: UpstreamFailure,
        answer: Option<Arc<UpstreamResponse>>,
    ) -> ProxyResponse {
        // The upstream has just said yes to this principal, so its standing is as good as can be.
        let revalidation = Revalidation::FetchFailed(cause);
        match decide(&CacheState {
            authorization: Authorization::Granted,
            revalidation,
            ..situation
        }) {
            Decision::Serve(served) => self.serve(served, copies, Some(revalidation)),
            Decision::Deny(refusal) => refused(refusal, answer, false),
            // Laws of the decision: no second question, no second fetch.
            Decision::Revalidate | Decision::Fetch(_) | Decision::ProbeLayers(_) => {
                refused(DenyReason::UpstreamUnavailable(cause), answer, false)
            }
        }
    }

    fn serve(
        &self,
        served: HitReason,
        copies: Option<Candidates>,
        revalidation: Option<Revalidation>,
    ) -> ProxyResponse {
        let copy = match (served, copies) {
            (HitReason::PreviousComplete(_), Some(copies)) => copies.earlier,
            (_, Some(copies)) => Some(copies.newest),
            (_, None) => None,
        };
        let Some(CachedManifest {
            manifest,
            confirmed_at,
        }) = copy
        else {
            // A law of the decision: nothing is served that is not held.
            return refused(DenyReason::NotCached, None, false);
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

fn own_credential(revalidation: Revalidation) -> bool {
    revalidation == Revalidation::Denied(CredentialOwner::Proxy)
}

pub(super) fn refused(
    refusal: DenyReason,
    answer: Option<Arc<UpstreamResponse>>,
    own_credential: bool,
) -> ProxyResponse {
    ProxyResponse::Denied(Denied {
        refusal,
        answer,
        own_credential,
    })
}
