//! Referrers of a manifest: by the referrers API, and by the referrers tag (`sha256-<hex>`) of registries without it.
//!
//! Clients of today ask for them with every pull of an attested image, and a response other than 200 or 404 fails that
//! pull. So the last answer is kept, a 404 too, and repeated while the upstream is unavailable; where none is kept and
//! the subject is cached, the answer is 404 as well: a client that insists on a signature then refuses by itself.
//! Whoever is given either has shown a right to the repository, as for everything that is cached.
//!
//! The subject is immutable and the same pull asks again and again, so an answer is good for as long as a grant; a write
//! that passed through here ends that at once. Afterwards the list is fetched again, and the tag revalidated by `HEAD`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use quick_cache::sync::Cache;
use tokio::time::timeout;

use super::cache_view::CacheView;
use super::candidates::Candidates;
use super::listing::given;
use super::manifest::refused;
use super::manifest_fetch::UpstreamRequest;
use super::revalidate::CoalesceKey;
use super::{AuthContext, ProxyResponse, ProxyService, Request, ServeInfo, ServeReason, UpstreamRegistry};
use crate::oci::{Algorithm, AnyDigest, Digest, Endpoint, Query, Repository, Tag, UpstreamFailure};
use crate::policy::rules::EffectivePolicy;
use crate::policy::{
    Authorization, CacheState, CachedEntry, Completeness, ContentKind, CredentialOwner, Decision, DenyReason,
    HitReason, MissReason, Policy, Revalidation, decide,
};
use crate::store::listings::{ListingKey, StoredListResponse, StoredNotFound};
use crate::upstream::{ResponseKind, UpstreamResponse};

/// The one parameter that only leaves something out of a list. Whoever sends it filters the answer all the same.
const FILTER: &str = "artifactType";

/// Questions of which it is known when they were last answered.
const CONFIRMED_MAX: usize = 16_384;

/// An error code that is longer is not kept. Those of the spec have 23 bytes at most.
const CODE_BYTES_MAX: usize = 64;

/// When the upstream last answered a question about referrers, and how often something had been written in the
/// repository by then. In memory alone: after a restart the first question goes out.
pub(super) struct ConfirmedReferrers(Cache<ListingKey, (SystemTime, u64)>);

impl Default for ConfirmedReferrers {
    fn default() -> Self {
        Self(Cache::new(CONFIRMED_MAX))
    }
}

/// What can be answered without the upstream.
enum Fallback {
    /// What it last answered.
    Cached(StoredListResponse),
    /// Nothing is kept, and the subject is cached.
    Assumed,
}

/// What is known before the upstream is asked.
enum Precheck {
    /// The answer.
    Respond(Box<ProxyResponse>),
    /// The upstream is known to be unavailable, and there is something else to answer.
    Unavailable(UpstreamFailure),
    /// Nothing that is enough. So long is the upstream waited for, where there is something else to answer.
    Request(Duration),
}

/// One question about referrers.
struct ReferrersRequest<'a> {
    pull: &'a Arc<ProxyService>,
    request: &'a Request,
    repository: &'a Repository,
    rule: &'a EffectivePolicy,
    key: ListingKey,
    stand_in: Option<Fallback>,
    /// Before anything was asked.
    situation: CacheState,
    /// Whether the upstream answered so lately that it is not asked again.
    is_fresh: bool,
}

impl ProxyService {
    /// `GET /v2/<name>/referrers/<digest>`.
    pub(super) async fn referrers(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        subject: &AnyDigest,
        query: &Query,
    ) -> ProxyResponse {
        let context = self.context(request, repository).await;
        let rule = request.site.rule(repository, None);
        let subject = match subject {
            AnyDigest::Supported(digest) => Some(*digest),
            AnyDigest::Unsupported(_) => None,
        };
        let lookup = ReferrersRequest::new(self, request, repository, (&context, rule), subject, query).await;
        let revalidation = match lookup.before_asking(&context, false) {
            Precheck::Respond(outcome) => return *outcome,
            Precheck::Unavailable(cause) => Err((Revalidation::Unavailable(cause), None)),
            Precheck::Request(wait) => lookup.list(&context, wait).await,
        };
        match revalidation {
            Ok(listing) => {
                lookup.confirm();
                let how = ServeInfo {
                    reason: ServeReason::Fetched(MissReason::NoDigest),
                    confirmed_at: Some(request.now),
                };
                ProxyResponse::Listing(listing, how)
            }
            Err((revalidation, answer)) => lookup.conclude(revalidation, answer).await,
        }
    }

    /// A manifest by a referrers tag.
    pub(super) async fn referrers_tag(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        context: &AuthContext,
        tag: &Tag,
    ) -> ProxyResponse {
        let rule = request.site.rule(repository, Some(tag));
        let subject = tag.subject();
        let accept = Some(&request.accept);
        let copies = self.copies_of_tag(&request.site, repository, tag, accept).await;
        if let Some(copies) = copies.map(Candidates::of_list) {
            let held = Some(copies.held());
            let mut situation = context.situation(rule, ContentKind::Tag, held, true, request.now);
            if self.is_subject_cached(&request.site, repository, subject).await {
                situation.max_age = situation.max_age.max(rule.grant_ttl);
            }
            return self
                .judged(request, repository, context, situation, Some(copies))
                .await;
        }
        let lookup = ReferrersRequest::new(
            self,
            request,
            repository,
            (context, rule),
            subject,
            &Query::default(),
        )
        .await;
        let is_kept = matches!(lookup.stand_in, Some(Fallback::Cached(_)));
        let wait = match lookup.before_asking(context, is_kept) {
            Precheck::Respond(outcome) => return *outcome,
            Precheck::Unavailable(cause) => {
                return lookup.conclude(Revalidation::Unavailable(cause), None).await;
            }
            Precheck::Request(wait) => wait,
        };
        // A 404 was had by GET before, so a HEAD is enough to hear that it still holds.
        if is_kept {
            let asked = self
                .ask(
                    request,
                    repository,
                    context,
                    &lookup.situation,
                    rule.revalidate_timeout,
                )
                .await;
            if !matches!(
                asked.revalidation,
                Revalidation::Digest { .. } | Revalidation::NoDigest
            ) {
                return lookup.conclude(asked.revalidation, asked.answer).await;
            }
        }
        let unheld = context.situation(rule, ContentKind::Tag, None, true, request.now);
        let fetching = self.judged(request, repository, context, unheld, None);
        let outcome = if lookup.can_do_without() {
            if let Ok(outcome) = timeout(wait, fetching).await {
                outcome
            } else {
                lookup.expired(context, wait);
                return lookup
                    .conclude(
                        Revalidation::Unavailable(UpstreamFailure::RevalidateTimeout),
                        None,
                    )
                    .await;
            }
        } else {
            fetching.await
        };
        match outcome {
            ProxyResponse::Denied(refused) => match refused.refusal {
                DenyReason::NotFound => lookup.conclude(Revalidation::NotFound, refused.answer).await,
                DenyReason::UpstreamUnavailable(cause) if lookup.can_do_without() => {
                    lookup
                        .conclude(Revalidation::Unavailable(cause), refused.answer)
                        .await
                }
                _ => ProxyResponse::Denied(refused),
            },
            outcome => outcome,
        }
    }

    /// Whether this manifest is cached, and was seen in this repository.
    async fn is_subject_cached(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        subject: Option<Digest>,
    ) -> bool {
        let Some(subject) = subject else { return false };
        self.look_up(site, repository, move |cached| cached.has_subject(&subject))
            .await
    }
}

impl CacheView<'_> {
    fn has_subject(&self, subject: &Digest) -> bool {
        self.is_member(subject) && self.manifest(subject).is_some()
    }

    fn answer(&self, key: &ListingKey) -> Option<StoredListResponse> {
        self.pull
            .cached(self.site, self.repository, self.view.listing_response(key))
    }
}

/// What the store has for a question about referrers.
struct CachedReferrers {
    /// Whether the subject is cached.
    is_cached: bool,
    /// The last answer to this question.
    own: Option<StoredListResponse>,
    /// The last answer to the question without a filter, where this one has one and no answer.
    whole: Option<(ListingKey, StoredListResponse)>,
}

impl<'a> ReferrersRequest<'a> {
    async fn new(
        pull: &'a Arc<ProxyService>,
        request: &'a Request,
        repository: &'a Repository,
        (context, rule): (&'a AuthContext, &'a EffectivePolicy),
        subject: Option<Digest>,
        query: &Query,
    ) -> Self {
        let site = &request.site;
        let key = ListingKey {
            upstream: site.name().into(),
            path: request.endpoint.path_and_query(),
        };
        // The whole list holds what a filter leaves of it.
        let whole = (!query.is_empty() && query.has_only(FILTER))
            .then_some(subject)
            .flatten();
        let whole = whole.map(|subject| ListingKey {
            upstream: site.name().into(),
            path: Endpoint::Referrers {
                repository: repository.clone(),
                digest: AnyDigest::Supported(subject),
                query: Query::default(),
            }
            .path_and_query(),
        });
        let found = {
            let key = key.clone();
            pull.look_up(site, repository, move |cached| {
                let own = cached.answer(&key);
                let whole = whole.as_ref().filter(|_| own.is_none());
                CachedReferrers {
                    is_cached: subject.is_some_and(|subject| cached.has_subject(&subject)),
                    whole: whole.and_then(|key| Some((key.clone(), cached.answer(key)?))),
                    own,
                }
            })
            .await
        };
        let is_cached = found.is_cached;
        let confirmed = |key: &ListingKey| {
            let (at, writes) = pull.referrers_confirmed.0.get(key)?;
            let is_fresh = is_cached
                && writes == request.writes.ended()
                && request
                    .now
                    .duration_since(at)
                    .is_ok_and(|age| age < rule.grant_ttl);
            is_fresh.then_some(at)
        };
        let own = found.own.map(|answer| (answer, confirmed(&key)));
        // But it is longer, so as long as the upstream can filter it, it is asked to.
        let found = own.or_else(|| {
            let (key, answer) = found.whole?;
            let is_absent = matches!(answer, StoredListResponse::NotFound(_));
            Some((answer, confirmed(&key).filter(|_| is_absent)))
        });
        // A caller without a right sees no difference between what is kept and what is not.
        let (stand_in, fresh_since) = match found {
            _ if context.is_stranger(rule, request.now) => (None, None),
            Some((answer, fresh_since)) => (Some(Fallback::Cached(answer)), fresh_since),
            None if is_cached => (Some(Fallback::Assumed), None),
            None => (None, None),
        };
        let held = stand_in
            .as_ref()
            .map(|stand_in| stand_in.held(fresh_since, request.now));
        let mut situation = context.situation(rule, ContentKind::Tag, held, true, request.now);
        situation.max_age = fresh_since.map_or(Duration::ZERO, |_| rule.grant_ttl);
        // Its subject is served by digest for however long the upstream is unavailable.
        situation.stale_if_error = None;
        Self {
            pull,
            request,
            repository,
            rule,
            key,
            stand_in,
            situation,
            is_fresh: fresh_since.is_some(),
        }
    }

    /// `by_head`: whether a HEAD is sent first.
    fn before_asking(&self, context: &AuthContext, by_head: bool) -> Precheck {
        match decide(&self.situation) {
            Decision::Deny(refusal) => return Precheck::Respond(Box::new(refused(refusal, None, false))),
            Decision::Serve(served) if self.is_fresh || self.rule.policy == Policy::Never => {
                return Precheck::Respond(Box::new(self.answer(served)));
            }
            _ => {}
        }
        if !self.can_do_without() {
            return Precheck::Request(self.rule.revalidate_timeout);
        }
        let (upstream, asked) = (self.request.site.upstream(), (&self.request.endpoint, by_head));
        match upstream.wait_limit(&context.caller, asked, self.rule.revalidate_timeout) {
            Ok(wait) => Precheck::Request(wait),
            Err(cause) => Precheck::Unavailable(cause),
        }
    }

    /// The upstream was waited for so long, and no response came.
    fn expired(&self, context: &AuthContext, waited: Duration) {
        let upstream = self.request.site.upstream();
        upstream.record_timeout(&context.caller, &self.request.endpoint, waited);
    }

    fn can_do_without(&self) -> bool {
        let unavailable = self
            .situation
            .with_revalidation(Revalidation::Unavailable(UpstreamFailure::RevalidateTimeout));
        matches!(decide(&unavailable), Decision::Serve(_))
    }

    /// Fetches the list, waiting no longer than `wait` where there is something else to answer. The fetch goes on.
    async fn list(&self, context: &AuthContext, wait: Duration) -> super::listing::ListResult {
        let wanted = UpstreamRequest::of(self.request, self.repository, &context.caller);
        let shared = (CoalesceKey::new(self.pull, &wanted), self.is_believed());
        let call = self.pull.lists.share(shared, || {
            let key = self.is_believed().then(|| self.key.clone());
            let pull = Arc::clone(self.pull);
            async move { pull.list(&wanted, key).await }
        });
        let unavailable = |cause| Err((Revalidation::Unavailable(cause), None));
        if !self.can_do_without() {
            return call
                .wait()
                .await
                .unwrap_or_else(|| unavailable(UpstreamFailure::Busy));
        }
        if let Ok(listed) = timeout(wait, call.wait()).await {
            listed.unwrap_or_else(|| unavailable(UpstreamFailure::Busy))
        } else {
            self.expired(context, wait);
            unavailable(UpstreamFailure::RevalidateTimeout)
        }
    }

    /// What is answered after the upstream gave no list.
    async fn conclude(
        &self,
        revalidation: Revalidation,
        answer: Option<Arc<UpstreamResponse>>,
    ) -> ProxyResponse {
        let is_absent = revalidation == Revalidation::NotFound;
        match decide(&self.situation.with_revalidation(revalidation)) {
            Decision::Serve(served) => {
                if is_absent && !matches!(self.stand_in, Some(Fallback::Cached(StoredListResponse::List(_))))
                {
                    self.keep_absent(answer.as_deref()).await;
                }
                self.answer(served)
            }
            Decision::Deny(refusal) => {
                if is_absent {
                    self.keep_absent(answer.as_deref()).await;
                }
                refused(
                    refusal,
                    answer,
                    revalidation == Revalidation::Denied(CredentialOwner::Proxy),
                )
            }
            // Laws of the decision: no second question, no fetch.
            Decision::Revalidate | Decision::Fetch(_) | Decision::ProbeLayers(_) => refused(
                DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
                answer,
                false,
            ),
        }
    }

    fn answer(&self, served: HitReason) -> ProxyResponse {
        match &self.stand_in {
            Some(Fallback::Cached(StoredListResponse::List(kept))) => {
                given(kept, ServeReason::Cached(served))
            }
            Some(Fallback::Cached(StoredListResponse::NotFound(absence))) => absent(absence.code.clone()),
            Some(Fallback::Assumed) => absent(None),
            // A law of the decision: nothing is served that is not held.
            None => refused(DenyReason::NotCached, None, false),
        }
    }

    /// Whether the answer to this caller may become the answer to others. Some registries say 404 to all who may not read
    /// the repository, and others give them an empty list.
    fn is_believed(&self) -> bool {
        self.situation.authorization != Authorization::Unknown
    }

    /// Keeps a 404.
    async fn keep_absent(&self, answer: Option<&UpstreamResponse>) {
        if !self.is_believed() || !self.is_unwritten() {
            return;
        }
        let code = answer.and_then(|answer| answer.code.clone());
        let absence = StoredNotFound {
            code: code.filter(|code| code.len() <= CODE_BYTES_MAX),
            received_at: self.pull.clock.now(),
        };
        let key = self.key.clone();
        let kept = self
            .pull
            .store
            .write(move |store| store.put_listing_not_found(&key, absence))
            .await;
        super::revalidate::report(kept, "keep that there is no such list");
        self.confirm();
    }

    fn confirm(&self) {
        if self.is_believed() && self.is_unwritten() {
            let confirmed = (self.request.now, self.request.writes.ended());
            self.pull
                .referrers_confirmed
                .0
                .insert(self.key.clone(), confirmed);
        }
    }

    fn is_unwritten(&self) -> bool {
        self.request.site.writes(self.repository).ended() == self.request.writes.ended()
    }
}

impl Fallback {
    /// As the decision sees it.
    fn held(&self, fresh_since: Option<SystemTime>, now: SystemTime) -> CachedEntry {
        let (digest, answered_at) = match self {
            Self::Cached(StoredListResponse::List(kept)) => (kept.digest, kept.listed_at),
            Self::Cached(StoredListResponse::NotFound(absence)) => {
                (Digest::of(Algorithm::Sha256, &[]), absence.received_at)
            }
            Self::Assumed => (Digest::of(Algorithm::Sha256, &[]), now),
        };
        CachedEntry {
            digest,
            confirmed_at: fresh_since.unwrap_or(answered_at),
            is_moved: false,
            completeness: Completeness::Complete,
            is_invalidated: false,
        }
    }
}

/// 404, as the registry gave it.
fn absent(code: Option<String>) -> ProxyResponse {
    let answer = UpstreamResponse {
        kind: ResponseKind::NotFound,
        status: Some(StatusCode::NOT_FOUND),
        code,
        ..UpstreamResponse::unavailable(UpstreamFailure::Malformed)
    };
    refused(DenyReason::NotFound, Some(Arc::new(answer)), false)
}
