//! One scheduled refresh: the `HEAD` of a tag in its slot, and the effects of the response.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::Instant;

use super::{Failing, LaneRun, ProxyService, RefreshResult, UpstreamRegistry, UpstreamRuns};
use crate::oci::{Accept, Algorithm, Digest, Endpoint, Reference, Repository, UpstreamFailure};
use crate::policy::refresh::{Failures, Phase, RefreshPolicy, TagFacts};
use crate::policy::{Completeness, Revalidation};
use crate::proxy::UpstreamCaches;
use crate::proxy::evidence::Candidates;
use crate::proxy::manifest_fetch::UpstreamRequest;
use crate::store::View;
use crate::store::manifests::StoredManifest;
use crate::store::tags::TagKey;
use crate::trace_context::TraceContext;
use crate::upstream::{Caller, ResponseKind, UpstreamResponse};

/// How a run ended.
pub(super) struct Outcome {
    pub(super) result: RefreshResult,
    pub(super) cause: Option<UpstreamFailure>,
}

impl Outcome {
    pub(super) fn of(result: RefreshResult) -> Self {
        Self { result, cause: None }
    }

    pub(super) fn failed(result: RefreshResult, cause: UpstreamFailure) -> Self {
        Self {
            cause: Some(cause),
            ..Self::of(result)
        }
    }
}

/// What follows from the `HEAD`.
enum Head {
    /// Nothing is left to do.
    Done(Outcome),
    /// The image with this digest must be fetched: the tag moved to it, or the cached one is incomplete.
    Fetch(Digest, Box<Candidates>),
}

impl ProxyService {
    /// Runs the refresh of a tag once its upstream has a permit.
    pub(super) async fn run_in_lane(self: &Arc<Self>, run: &mut LaneRun, key: &TagKey) {
        let lane = Arc::clone(&run.lane);
        // An error would mean that the semaphore is closed, which never happens.
        let permit = lane.heads.acquire().await;
        run.start();
        let Some((request, policy)) = self.current_request(key).await else {
            return;
        };
        let (proxy, of) = (Arc::clone(self), key.clone());
        let facts = self
            .store
            .on_disk(move |view| proxy.refresh_facts(view, &of, policy))
            .await;
        let Some(facts) = facts.filter(|facts| facts.is_due(run.slot_at, self.clock.now())) else {
            return;
        };
        if !self.may_refresh(&request) {
            return;
        }
        let outcome = match self.refresh_head(&request, key, facts.used_at).await {
            Head::Done(outcome) => outcome,
            Head::Fetch(digest, candidates) => {
                drop(permit);
                if run.begin_fetch() {
                    let _permit = lane.fetches.acquire().await;
                    self.refresh_image(key, (digest, &candidates), facts.used_at)
                        .await
                } else {
                    Outcome::of(RefreshResult::FetchSkipped)
                }
            }
        };
        self.record_refresh(key, &outcome);
    }

    /// Inputs that determine when a tag is refreshed; `None` if it is not cached any more. Blocks.
    pub(super) fn refresh_facts(
        &self,
        view: &View<'_>,
        key: &TagKey,
        policy: RefreshPolicy,
    ) -> Option<TagFacts> {
        let record = view.tag(key).ok()??;
        let hash = self.tag_hash(key);
        Some(TagFacts {
            policy,
            phase: Phase::of_hash(hash),
            confirmed_at: record.confirmed_at(),
            used_at: view.last_use(&record),
            failures: self.scheduled.failing.get(&hash).map(|failing| failing.failures),
        })
    }

    /// The request for a tag, and the settings, under the current configuration: a reload may have changed it since the
    /// planning, or during a wait. `None`: the tag is not refreshed any more.
    pub(super) async fn current_request(
        self: &Arc<Self>,
        key: &TagKey,
    ) -> Option<(UpstreamRequest, RefreshPolicy)> {
        let registry = self.scheduled.upstreams().get(&key.upstream).cloned()?;
        let policy = registry.rule(&key.repository, Some(&key.tag)).scheduled_refresh();
        policy.interval?;
        let caller = self.refresh_caller(&registry, &key.repository).await?;
        Some((self.refresh_request(&registry, key, &caller), policy))
    }

    /// Caller of a refresh: the cache itself if access is shared, an anonymous one if the repository is public.
    /// `None`: only clients can read it.
    async fn refresh_caller(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
    ) -> Option<Caller> {
        let is_readable = registry.is_shared() || self.public_since(registry, repository).await.is_some();
        is_readable.then(|| registry.background_caller(&self.principals))
    }

    pub(super) fn refresh_request(
        &self,
        registry: &Arc<UpstreamRegistry>,
        key: &TagKey,
        caller: &Caller,
    ) -> UpstreamRequest {
        UpstreamRequest {
            registry: Arc::clone(registry),
            repository: key.repository.clone(),
            endpoint: Endpoint::Manifest {
                repository: key.repository.clone(),
                reference: Reference::Tag(key.tag.clone()),
            },
            accept: Accept::manifests(),
            caller: Caller {
                trace: TraceContext::new_root(),
                ..caller.clone()
            },
            arrived_at: self.clock.now(),
            since: Instant::now(),
            writes: registry.writes(&key.repository),
            for_push: false,
            named: None,
            cached: None,
            has_no_grant: false,
            upstream_caches: UpstreamCaches::default(),
        }
    }

    async fn refresh_head(
        self: &Arc<Self>,
        request: &UpstreamRequest,
        key: &TagKey,
        used_at: Option<SystemTime>,
    ) -> Head {
        let accept = Some(&request.accept);
        let candidates = self
            .candidates_for_tag(&request.registry, &request.repository, &key.tag, accept)
            .await;
        let (digest, response) = match self.tag_digest(request, used_at).await {
            Ok(named) => named,
            Err(outcome) => return Head::Done(outcome),
        };
        let limit = request
            .registry
            .rule(&request.repository, Some(&key.tag))
            .age_limit;
        let shown = (Some((request, &*response)), self.clock.now());
        let maturity = self.judge(
            &request.registry,
            &request.repository,
            (&key.tag, digest),
            &limit,
            shown,
        );
        if !maturity.await.is_mature() {
            return Head::Done(Outcome::of(RefreshResult::TooYoung));
        }
        match candidates {
            // Without a cached image, no platform is known to be in use.
            None => Head::Done(Outcome::of(RefreshResult::Revalidated)),
            Some(candidates) => {
                let entry = candidates.entry();
                // The digest may be unchanged, but its image is incomplete: an outage would serve the previous one.
                let is_left_behind =
                    matches!(entry.completeness, Completeness::Incomplete { previous: Some(_) });
                if entry.digest == digest && !is_left_behind {
                    Head::Done(Outcome::of(RefreshResult::Revalidated))
                } else {
                    Head::Fetch(digest, Box::new(candidates))
                }
            }
        }
    }

    /// The digest that the upstream names for the tag now, with the response. `Err`: there is none to fetch. `used_at`: last
    /// use of the tag.
    pub(super) async fn tag_digest(
        self: &Arc<Self>,
        request: &UpstreamRequest,
        used_at: Option<SystemTime>,
    ) -> Result<(Digest, Arc<UpstreamResponse>), Outcome> {
        let unavailable = |cause| Outcome::failed(RefreshResult::Unavailable, cause);
        let Some(response) = self.coalesced_head(request).wait().await else {
            return Err(unavailable(UpstreamFailure::Abandoned));
        };
        // An unproven digest is verified by the bytes that are fetched for it.
        let heard = self.classify_for(request, &response, None).await;
        let brought = self.take_unused_body(request, &response, used_at).await;
        match (heard, brought) {
            (Revalidation::Blocked(_), _) => Err(Outcome::of(RefreshResult::Blocked)),
            // If the registry states no digest, only the fetched bytes show that it is blocked.
            (_, Some(brought))
                if self.is_blocked(&request.registry, &request.repository, &brought.digest) =>
            {
                Err(Outcome::of(RefreshResult::Blocked))
            }
            (_, Some(brought)) => Ok((brought.digest, response)),
            (Revalidation::Digest { digest, .. }, None) => Ok((digest, response)),
            (Revalidation::NotFound, _) => Err(Outcome::of(RefreshResult::NotFound)),
            (Revalidation::Denied(_), _) => Err(Outcome::of(RefreshResult::Denied)),
            (Revalidation::Unavailable(cause) | Revalidation::FetchFailed(cause), _) => {
                Err(unavailable(cause))
            }
            (Revalidation::NotDone | Revalidation::NoDigest, _) => {
                Err(unavailable(UpstreamFailure::Malformed))
            }
        }
    }

    /// Stores the manifest of a response with content, which some registries send instead of a digest. Its storage does
    /// not count as a use.
    async fn take_unused_body(
        self: &Arc<Self>,
        request: &UpstreamRequest,
        response: &UpstreamResponse,
        used_at: Option<SystemTime>,
    ) -> Option<Arc<StoredManifest>> {
        let (bytes, _) = response.body.as_ref()?;
        let digest = match response.kind {
            ResponseKind::Digest(digest) | ResponseKind::UnprovenDigest(digest) => digest,
            _ => Digest::of(Algorithm::Sha256, bytes),
        };
        let used = move |view: &View<'_>| view.manifest_used_at(digest);
        let before = self.store.on_disk(used).await;
        let brought = self.take_inline_body(request, response).await;
        let stored_at = self.store.on_disk(used).await;
        if let (Some(stored_at), Some(used_at)) = (stored_at, before.or(used_at)) {
            self.store.keep_last_use(digest, Some(stored_at), used_at).await;
        }
        brought
    }

    fn record_refresh(&self, key: &TagKey, outcome: &Outcome) {
        let (scheduled, result) = (&self.scheduled, outcome.result);
        scheduled.count(result);
        if result == RefreshResult::FetchSkipped {
            return;
        }
        let hash = self.tag_hash(key);
        if !result.is_failure() {
            scheduled.failing.remove(&hash);
            return;
        }
        if outcome.cause.is_some_and(is_of_upstream) {
            return;
        }
        let count = scheduled
            .failing
            .get(&hash)
            .map_or(1, |failing| failing.failures.count.saturating_add(1));
        let failures = Failures {
            count,
            last_at: self.clock.now(),
        };
        scheduled.failing.insert(hash, Failing { failures, result });
        // Logged at the first failure of a tag only, and rate-limited if many tags fail.
        if let (1, Some(skipped)) = (count, scheduled.failure_log.admits()) {
            tracing::warn!(
                upstream = &*key.upstream,
                image = %format_args!("{}:{}", key.repository, key.tag),
                reason = result.name(),
                cause = outcome.cause.map(UpstreamFailure::name),
                skipped,
                "scheduled refresh failed, the cached image is kept"
            );
        }
    }
}

/// Whether the failure concerns the whole upstream or the cache's queues, and not the tag.
fn is_of_upstream(cause: UpstreamFailure) -> bool {
    matches!(
        cause,
        UpstreamFailure::Offline
            | UpstreamFailure::BreakerOpen
            | UpstreamFailure::RateLimited
            | UpstreamFailure::Abandoned
            | UpstreamFailure::ClientQueueFull
            | UpstreamFailure::QueueFull
    )
}

impl UpstreamRuns {
    /// The oldest slot whose run has not started.
    pub(super) fn oldest_waiting(&self) -> Option<SystemTime> {
        let state = self.state.lock();
        state.waiting.first().map(|(slot_at, _)| *slot_at)
    }
}
