//! Referrers of a manifest: the referrers API, and the referrers tag (`sha256-<hex>`) of registries without that API.
//!
//! Current clients request referrers with every pull of an attested image, and a response other than 200 or 404 fails
//! that pull. So the last response is cached, including a 404, and served while the upstream is unavailable. If none
//! is cached and the subject is, the response is 404; a client that requires a signature then fails by itself. As for
//! all cached content, both need a grant in the repository.
//!
//! The subject is immutable and one pull repeats the request, so a response is fresh for the lifetime of a grant. A
//! write through this cache ends that at once. After that, the list is fetched again, and the tag is revalidated by
//! `HEAD`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use quick_cache::sync::Cache;
use tokio::time::timeout;

use super::evidence::{CacheView, Candidates, Evidence};
use super::listing::cached_list_response;
use super::manifest::ManifestRequest;
use super::manifest_fetch::CoalesceKey;
use super::pipeline::{ReadContext, denied, denied_after};
use super::revalidate::Revalidated;
use super::{ProxyResponse, ServeInfo, ServeReason};
use crate::oci::{Algorithm, AnyDigest, Digest, Endpoint, Query, Tag, UpstreamFailure};
use crate::policy::{
    Authorization, CacheState, CachedEntry, Completeness, ContentKind, Decision, DenyReason, HitReason,
    MissReason, Policy, Revalidation, decide,
};
use crate::store::listings::{ListingKey, StoredListResponse, StoredNotFound};
use crate::upstream::{ResponseKind, UpstreamResponse};

/// The only query parameter that filters a list. Clients that send it filter the response themselves too.
const FILTER_PARAMETER: &str = "artifactType";

/// Requests with a remembered confirmation time.
const CONFIRMED_MAX: usize = 16_384;

/// Longer error codes are not stored. Those of the spec have at most 23 bytes.
const CODE_BYTES_MAX: usize = 64;

/// When the upstream last confirmed a referrers response, and the write counter of the repository at that time. In
/// memory only: after a restart the first request goes upstream.
pub(super) struct ConfirmedReferrers(Cache<ListingKey, (SystemTime, u64)>);

impl Default for ConfirmedReferrers {
    fn default() -> Self {
        Self(Cache::new(CONFIRMED_MAX))
    }
}

/// Response available without the upstream.
enum Fallback {
    /// The cached last response.
    Cached(StoredListResponse),
    /// 404, because no response is cached and the subject is.
    Assumed,
}

/// Result of the checks before any upstream request.
enum Precheck {
    /// The final response.
    Respond(Box<ProxyResponse>),
    /// The upstream is known to be unavailable, and there is a fallback.
    Unavailable(UpstreamFailure),
    /// An upstream request is needed. With a fallback, it may take this long.
    Request(Duration),
}

/// Context of one referrers request.
struct ReferrersRequest<'a> {
    read: &'a ReadContext<'a>,
    key: ListingKey,
    fallback: Option<Fallback>,
    /// State before any upstream request.
    state: CacheState,
    /// Whether the cached response is fresh.
    is_fresh: bool,
}

impl ReadContext<'_> {
    /// `GET /v2/<name>/referrers/<digest>`.
    pub(super) async fn referrers(&self, subject: &AnyDigest, query: &Query) -> ProxyResponse {
        let subject = match subject {
            AnyDigest::Supported(digest) => Some(*digest),
            AnyDigest::Unsupported(_) => None,
        };
        let referrers_request = ReferrersRequest::new(self, subject, query).await;
        let revalidation = match referrers_request.precheck(false) {
            Precheck::Respond(outcome) => return *outcome,
            Precheck::Unavailable(cause) => Err((Revalidation::Unavailable(cause), None)),
            Precheck::Request(wait) => referrers_request.fetch_list(wait).await,
        };
        match revalidation {
            Ok(listing) => {
                referrers_request.mark_confirmed();
                let info = ServeInfo {
                    reason: ServeReason::Fetched(MissReason::NoDigest),
                    confirmed_at: Some(self.request.now),
                };
                ProxyResponse::Listing(listing, info)
            }
            Err((revalidation, response)) => {
                referrers_request
                    .respond_without_list(revalidation, response)
                    .await
            }
        }
    }

    /// `GET` or `HEAD` of a manifest by a referrers tag.
    pub(super) async fn referrers_tag(&self, tag: &Tag) -> ProxyResponse {
        let subject = tag.subject();
        let (registry, accept) = (&self.request.registry, Some(&self.request.accept));
        let candidates = self
            .proxy
            .candidates_for_tag(registry, self.repository, tag, accept)
            .await;
        if let Some(candidates) = candidates.map(Candidates::without_children) {
            let mut state = self.state(ContentKind::Tag, Some(candidates.entry()), true);
            if self.is_subject_cached(subject).await {
                state.max_age = state.max_age.max(self.rule.grant_ttl);
            }
            let candidates = Some(candidates);
            let evidence = Evidence { state, candidates };
            return ManifestRequest::new(self).execute(evidence).await;
        }
        let referrers_request = ReferrersRequest::new(self, subject, &Query::default()).await;
        let is_kept = matches!(referrers_request.fallback, Some(Fallback::Cached(_)));
        let wait = match referrers_request.precheck(is_kept) {
            Precheck::Respond(outcome) => return *outcome,
            Precheck::Unavailable(cause) => {
                return referrers_request
                    .respond_without_list(Revalidation::Unavailable(cause), None)
                    .await;
            }
            Precheck::Request(wait) => wait,
        };
        // The cached 404 came from a `GET`, so a `HEAD` is enough to confirm it.
        if is_kept {
            let revalidated = self.revalidate(&referrers_request.state).await;
            if !revalidated.is_success() {
                return referrers_request
                    .respond_without_list(revalidated.revalidation, revalidated.response)
                    .await;
            }
        }
        let manifest_request = ManifestRequest::new(self);
        let fetching = manifest_request.execute(Evidence {
            state: self.state(ContentKind::Tag, None, true),
            candidates: None,
        });
        let outcome = if referrers_request.state.has_fallback() {
            if let Ok(outcome) = timeout(wait, fetching).await {
                outcome
            } else {
                referrers_request.report_timeout(wait);
                return referrers_request
                    .respond_without_list(
                        Revalidation::Unavailable(UpstreamFailure::RevalidateTimeout),
                        None,
                    )
                    .await;
            }
        } else {
            fetching.await
        };
        match outcome {
            ProxyResponse::Denied(denied) => match denied.reason {
                DenyReason::NotFound => {
                    referrers_request
                        .respond_without_list(Revalidation::NotFound, denied.response)
                        .await
                }
                DenyReason::UpstreamUnavailable(cause) if referrers_request.state.has_fallback() => {
                    referrers_request
                        .respond_without_list(Revalidation::Unavailable(cause), denied.response)
                        .await
                }
                _ => ProxyResponse::Denied(denied),
            },
            outcome => outcome,
        }
    }

    /// Whether this manifest is cached and belongs to this repository.
    async fn is_subject_cached(&self, subject: Option<Digest>) -> bool {
        let Some(subject) = subject else { return false };
        self.proxy
            .read_cache(&self.request.registry, self.repository, move |cached| {
                cached.has_subject(&subject)
            })
            .await
    }
}

impl CacheView<'_> {
    fn has_subject(&self, subject: &Digest) -> bool {
        self.is_member(subject) && self.manifest(subject).is_some()
    }

    fn referrers_response(&self, key: &ListingKey) -> Option<StoredListResponse> {
        self.proxy
            .cached(self.registry, self.repository, self.view.listing_response(key))
    }
}

/// Stored responses for a referrers request.
struct CachedReferrers {
    /// Whether the subject is cached.
    is_cached: bool,
    /// The last response to the same request.
    exact: Option<StoredListResponse>,
    /// The last response to the unfiltered request, if this request has a filter and no cached response of its own.
    unfiltered: Option<(ListingKey, StoredListResponse)>,
}

impl<'a> ReferrersRequest<'a> {
    async fn new(read: &'a ReadContext<'a>, subject: Option<Digest>, query: &Query) -> Self {
        let (proxy, request, repository) = (read.proxy, read.request, read.repository);
        let registry = &request.registry;
        let key = ListingKey {
            upstream: registry.shared_name(),
            path: request.endpoint.path_and_query(),
        };
        // The unfiltered list contains every filtered one.
        let unfiltered = (!query.is_empty() && query.has_only(FILTER_PARAMETER))
            .then_some(subject)
            .flatten();
        let unfiltered = unfiltered.map(|subject| ListingKey {
            upstream: registry.shared_name(),
            path: Endpoint::Referrers {
                repository: repository.clone(),
                digest: AnyDigest::Supported(subject),
                query: Query::default(),
            }
            .path_and_query(),
        });
        let found = {
            let key = key.clone();
            proxy
                .read_cache(registry, repository, move |cached| {
                    let exact = cached.referrers_response(&key);
                    let unfiltered = unfiltered.as_ref().filter(|_| exact.is_none());
                    CachedReferrers {
                        is_cached: subject.is_some_and(|subject| cached.has_subject(&subject)),
                        unfiltered: unfiltered
                            .and_then(|key| Some((key.clone(), cached.referrers_response(key)?))),
                        exact,
                    }
                })
                .await
        };
        let is_cached = found.is_cached;
        let confirmed = |key: &ListingKey| {
            let (at, writes) = proxy.confirmed_referrers.0.get(key)?;
            let is_fresh = is_cached
                && writes == request.writes.ended()
                && request
                    .now
                    .duration_since(at)
                    .is_ok_and(|age| age < read.rule.grant_ttl);
            is_fresh.then_some(at)
        };
        let exact = found.exact.map(|response| (response, confirmed(&key)));
        // It is longer, so it is used only if the upstream cannot filter.
        let found = exact.or_else(|| {
            let (key, response) = found.unfiltered?;
            let is_absent = matches!(response, StoredListResponse::NotFound(_));
            Some((response, confirmed(&key).filter(|_| is_absent)))
        });
        // For a caller without a grant, cached and uncached must look the same.
        let (fallback, fresh_since) = match found {
            _ if read.has_no_grant() => (None, None),
            Some((response, fresh_since)) => (Some(Fallback::Cached(response)), fresh_since),
            None if is_cached => (Some(Fallback::Assumed), None),
            None => (None, None),
        };
        let entry = fallback
            .as_ref()
            .map(|fallback| fallback.entry(fresh_since, request.now));
        let mut state = read.state(ContentKind::Tag, entry, true);
        state.max_age = fresh_since.map_or(Duration::ZERO, |_| read.rule.grant_ttl);
        // The subject is served by digest for the whole outage, so its referrers are too.
        state.stale_if_error = None;
        Self {
            read,
            key,
            fallback,
            state,
            is_fresh: fresh_since.is_some(),
        }
    }

    /// `by_head`: whether a `HEAD` is sent first.
    fn precheck(&self, by_head: bool) -> Precheck {
        match decide(&self.state) {
            Decision::Deny(refusal) => return Precheck::Respond(Box::new(denied(refusal, None, false))),
            Decision::Serve(served) if self.is_fresh || self.read.rule.policy == Policy::Never => {
                return Precheck::Respond(Box::new(self.serve_fallback(served)));
            }
            _ => {}
        }
        if !self.state.has_fallback() {
            return Precheck::Request(self.read.rule.revalidate_timeout);
        }
        let (upstream, upstream_request) = (
            self.read.request.registry.upstream(),
            (&self.read.request.endpoint, by_head),
        );
        match upstream.wait_limit(
            &self.read.caller,
            upstream_request,
            self.read.rule.revalidate_timeout,
        ) {
            Ok(wait) => Precheck::Request(wait),
            Err(cause) => Precheck::Unavailable(cause),
        }
    }

    /// Reports a timeout of the upstream.
    fn report_timeout(&self, waited: Duration) {
        let upstream = self.read.request.registry.upstream();
        upstream.record_timeout(&self.read.caller, &self.read.request.endpoint, waited);
    }

    /// Fetches the list. With a fallback, waits at most `wait`; once sent, the fetch continues.
    async fn fetch_list(&self, wait: Duration) -> super::listing::ListResult {
        let mut upstream_request = self.read.upstream_request();
        let call_key = (
            CoalesceKey::new(self.read.proxy, &upstream_request),
            self.may_store(),
        );
        let demand = upstream_request.demand(false);
        let call = self.read.proxy.lists.share_queued(call_key, demand, |waiters| {
            upstream_request.caller.waiters = Some(waiters);
            let key = self.may_store().then(|| self.key.clone());
            let proxy = Arc::clone(self.read.proxy);
            async move { proxy.fetch_list(&upstream_request, key).await }
        });
        let unavailable = |cause| Err((Revalidation::Unavailable(cause), None));
        if !self.state.has_fallback() {
            return call
                .wait()
                .await
                .unwrap_or_else(|| unavailable(UpstreamFailure::Abandoned));
        }
        if let Ok(listed) = timeout(wait, call.wait()).await {
            listed.unwrap_or_else(|| unavailable(UpstreamFailure::Abandoned))
        } else {
            self.report_timeout(wait);
            unavailable(UpstreamFailure::RevalidateTimeout)
        }
    }

    /// Response after the upstream returned no list.
    async fn respond_without_list(
        &self,
        revalidation: Revalidation,
        response: Option<Arc<UpstreamResponse>>,
    ) -> ProxyResponse {
        let is_absent = revalidation == Revalidation::NotFound;
        match decide(&self.state.with_revalidation(revalidation)) {
            Decision::Serve(served) => {
                if is_absent && !matches!(self.fallback, Some(Fallback::Cached(StoredListResponse::List(_))))
                {
                    self.store_not_found(response.as_deref()).await;
                }
                self.serve_fallback(served)
            }
            Decision::Deny(refusal) => {
                if is_absent {
                    self.store_not_found(response.as_deref()).await;
                }
                denied_after(
                    refusal,
                    Revalidated {
                        revalidation,
                        response,
                    },
                )
            }
            // Invariants of `decide`: no second revalidation, no fetch.
            Decision::Revalidate | Decision::Fetch(_) | Decision::ProbeLayers(_) => denied(
                DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
                response,
                false,
            ),
        }
    }

    fn serve_fallback(&self, served: HitReason) -> ProxyResponse {
        match &self.fallback {
            Some(Fallback::Cached(StoredListResponse::List(stored))) => {
                cached_list_response(stored, ServeReason::Cached(served))
            }
            Some(Fallback::Cached(StoredListResponse::NotFound(absence))) => not_found(absence.code.clone()),
            Some(Fallback::Assumed) => not_found(None),
            // Invariant of `decide`: it serves only cached content.
            None => denied(DenyReason::NotCached, None, false),
        }
    }

    /// Whether the response to this caller may be stored for others. Some registries return 404, and others an empty
    /// list, to callers that may not read the repository.
    fn may_store(&self) -> bool {
        self.state.authorization != Authorization::Unknown
    }

    /// Stores a 404.
    async fn store_not_found(&self, response: Option<&UpstreamResponse>) {
        if !self.may_store() || !self.has_no_write_since() {
            return;
        }
        let code = response.and_then(|response| response.code.clone());
        let absence = StoredNotFound {
            code: code.filter(|code| code.len() <= CODE_BYTES_MAX),
            received_at: self.read.proxy.clock.now(),
        };
        let key = self.key.clone();
        let stored = self
            .read
            .proxy
            .store
            .write(move |store| store.put_listing_not_found(&key, absence))
            .await;
        super::log_store_error(stored, "store absence of list");
        self.mark_confirmed();
    }

    fn mark_confirmed(&self) {
        if self.may_store() && self.has_no_write_since() {
            let confirmed = (self.read.request.now, self.read.request.writes.ended());
            self.read
                .proxy
                .confirmed_referrers
                .0
                .insert(self.key.clone(), confirmed);
        }
    }

    fn has_no_write_since(&self) -> bool {
        self.read.request.registry.writes(self.read.repository).ended() == self.read.request.writes.ended()
    }
}

impl Fallback {
    /// Input of the decision.
    fn entry(&self, fresh_since: Option<SystemTime>, now: SystemTime) -> CachedEntry {
        let (digest, answered_at) = match self {
            Self::Cached(StoredListResponse::List(stored)) => (stored.digest, stored.listed_at),
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

/// 404 as the registry sent it.
fn not_found(code: Option<String>) -> ProxyResponse {
    let response = UpstreamResponse {
        kind: ResponseKind::NotFound,
        status: Some(StatusCode::NOT_FOUND),
        code,
        ..UpstreamResponse::unavailable(UpstreamFailure::Malformed)
    };
    denied(DenyReason::NotFound, Some(Arc::new(response)), false)
}
