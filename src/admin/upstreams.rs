//! Upstreams endpoint: state of each upstream and its rate limits.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::Admin;
use super::format::rfc3339;
use super::names::Identity;
use crate::oci::UpstreamFailure;
use crate::proxy::UpstreamRegistry;
use crate::queue::Queue;
use crate::server::ServingState;
use crate::telemetry::QuotaGauge;

/// State of each upstream.
#[derive(Serialize, ToSchema)]
pub(super) struct Upstreams {
    pub(super) upstreams: Vec<UpstreamView>,
}

/// State of one upstream.
#[derive(Serialize, ToSchema)]
pub(super) struct UpstreamView {
    pub(super) name: String,
    /// Duration and cause, while the circuit breaker of the whole upstream is open.
    pub(super) unavailable: Option<Failure>,
    /// Scopes without a response: all requests, one kind of request, or one kind in one repository.
    pub(super) failures: Vec<FailingScope>,
    pub(super) last_failure: Option<Failure>,
    /// The last successful request without a body.
    pub(super) last_head: Option<LastHead>,
    /// Credential of its requests: the client's, the cache's, or none.
    #[schema(value_type = Identity)]
    pub(super) identity: &'static str,
    /// Requests and downloads in progress.
    in_flight: usize,
    /// Requests and downloads that wait for a permit.
    waiting: usize,
    pub(super) quirks: Vec<&'static str>,
    pub(super) rate_limits: Vec<RateLimit>,
}

/// A failure of an upstream.
#[derive(Serialize, ToSchema)]
pub(super) struct Failure {
    pub(super) cause: &'static str,
    text: String,
    /// Details: the failed host, the names and dates of its certificate, or the setting that would allow a redirect.
    pub(super) detail: Option<String>,
    pub(super) seconds: u64,
}

#[derive(Serialize, ToSchema)]
pub(super) struct FailingScope {
    /// `connection`, or a kind of request (`head`, `get`, `blob`, `list`, `ping`, `token`), and the repository.
    pub(super) scope: String,
    pub(super) cause: &'static str,
    /// Time since its circuit breaker opened. Null if a failure is suspected: requests with a cached copy then wait for
    /// 50 ms.
    pub(super) open_seconds: Option<u64>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct LastHead {
    pub(super) ms: u64,
    pub(super) seconds_ago: u64,
}

/// The rate limit of one credential. A client's credential is identified by an id that is meaningless elsewhere.
#[derive(Serialize, ToSchema)]
pub(super) struct RateLimit {
    pub(super) credential: String,
    limit: Option<u64>,
    pub(super) remaining: Option<u64>,
    window_seconds: Option<u64>,
    /// Latest time at which the limit is reset.
    #[schema(format = DateTime)]
    pub(super) resets_at: Option<String>,
    source: Option<String>,
    seconds_ago: u64,
}

/// State of each upstream, with its rate limits per credential.
#[utoipa::path(get, path = "/api/v1/upstreams", responses((status = 200, body = Upstreams)))]
pub(super) async fn upstreams(State(admin): State<Admin>) -> Json<Upstreams> {
    Json(Upstreams {
        upstreams: views(&admin.registry.load(), admin.clock.now()),
    })
}

/// State of each upstream.
pub(super) fn views(registry: &ServingState, now: SystemTime) -> Vec<UpstreamView> {
    let (upstreams, downloads) = (registry.router.all().iter(), registry.proxy.downloads().queue());
    upstreams
        .map(|upstream| UpstreamView::of(upstream, downloads, now))
        .collect()
}

impl UpstreamView {
    fn of(upstream_registry: &UpstreamRegistry, downloads: &Queue, now: SystemTime) -> Self {
        let (name, state) = (upstream_registry.name(), upstream_registry.upstream().status());
        let last = state.last_failure.map(|(cause, _)| cause);
        let failure = |(cause, ago): (UpstreamFailure, Duration)| Failure {
            cause: cause.name(),
            text: format!("{name} {cause}"),
            detail: state
                .last_detail
                .as_deref()
                .filter(|_| last == Some(cause))
                .map(str::to_owned),
            seconds: ago.as_secs(),
        };
        let failures = state.failures.iter().map(|failure| FailingScope {
            scope: failure.scope.to_string(),
            cause: failure.cause.name(),
            open_seconds: failure.open.map(|since| since.as_secs()),
        });
        let rate_limits = state.quotas.iter().map(|allowance| RateLimit {
            credential: allowance.owner.to_string(),
            limit: allowance.limit.limit,
            remaining: allowance.limit.remaining,
            window_seconds: allowance.limit.window_s,
            resets_at: allowance.resets_at(now).map(rfc3339),
            source: allowance.limit.source.as_deref().map(str::to_owned),
            seconds_ago: allowance.ago.as_secs(),
        });
        Self {
            unavailable: state
                .open
                .as_ref()
                .map(|open| failure((open.cause, open.open.unwrap_or_default()))),
            failures: failures.collect(),
            last_failure: state.last_failure.map(failure),
            last_head: state.last_head.map(|(took, ago)| LastHead {
                ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                seconds_ago: ago.as_secs(),
            }),
            identity: upstream_registry.identity(),
            in_flight: state.in_flight + downloads.in_use_of(name),
            waiting: state.waiting + downloads.waiting_of(name),
            quirks: state.quirks.iter().map(|quirk| quirk.name()).collect(),
            rate_limits: rate_limits.collect(),
            name: name.to_owned(),
        }
    }
}

/// Rate limits per upstream and kind of credential. Of several clients, the one with the fewest remaining pulls
/// counts.
pub(super) fn allowances(registry: &ServingState, now: SystemTime) -> Vec<QuotaGauge> {
    let mut levels = Vec::new();
    for upstream_registry in registry.router.all() {
        let mut fewest = BTreeMap::new();
        for allowance in upstream_registry.upstream().status().quotas {
            let level = QuotaGauge {
                upstream: upstream_registry.name().into(),
                credential: allowance.owner.name(),
                limit: allowance.limit.limit,
                remaining: allowance.limit.remaining,
                resets_at: allowance.resets_at(now),
            };
            let kept = fewest.entry(level.credential).or_insert_with(|| level.clone());
            let is_fewer = |left| kept.remaining.is_none_or(|kept| left < kept);
            if level.remaining.is_some_and(is_fewer) {
                *kept = level;
            }
        }
        levels.extend(fewest.into_values());
    }
    levels
}
