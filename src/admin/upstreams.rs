//! Upstreams endpoint: state of each upstream and its rate limits.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::format::rfc3339;
use crate::oci::UpstreamFailure;
use crate::proxy::UpstreamRegistry;
use crate::queue::Queue;
use crate::server::ServingState;
use crate::telemetry::QuotaGauge;

/// All upstreams as JSON. A credential is identified by its kind, a client's by an id that is meaningless elsewhere.
pub(super) fn to_json(registry: &ServingState, now: SystemTime) -> Value {
    let upstream_registries = registry.router.all().iter();
    let upstreams: Vec<Value> = upstream_registries
        .map(|upstream_registry| upstream_json(upstream_registry, registry.proxy.downloads().queue(), now))
        .collect();
    json!({ "upstreams": upstreams })
}

fn upstream_json(upstream_registry: &UpstreamRegistry, downloads: &Queue, now: SystemTime) -> Value {
    let (name, state) = (upstream_registry.name(), upstream_registry.upstream().status());
    let last = state.last_failure.map(|(cause, _)| cause);
    let silence = |(cause, ago): (UpstreamFailure, Duration)| {
        let detail = state.last_detail.as_deref().filter(|_| last == Some(cause));
        json!({ "cause": cause.name(), "text": format!("{name} {cause}"), "detail": detail, "seconds": ago.as_secs() })
    };
    let failures: Vec<Value> = state
        .failures
        .iter()
        .map(|failure| {
            json!({
                "scope": failure.scope.to_string(),
                "cause": failure.cause.name(),
                "open_seconds": failure.open.map(|since| since.as_secs()),
            })
        })
        .collect();
    let allowances: Vec<Value> = state
        .quotas
        .iter()
        .map(|allowance| {
            json!({
                "credential": allowance.owner.to_string(),
                "limit": allowance.limit.limit,
                "remaining": allowance.limit.remaining,
                "window_seconds": allowance.limit.window_s,
                "resets_at": allowance.resets_at(now).map(rfc3339),
                "source": allowance.limit.source,
                "seconds_ago": allowance.ago.as_secs(),
            })
        })
        .collect();
    json!({
        "name": name,
        "unavailable": state.open.map(|open| silence((open.cause, open.open.unwrap_or_default()))),
        "failures": failures,
        "last_failure": state.last_failure.map(silence),
        "last_head": state.last_head.map(|(took, ago)| json!({ "ms": took.as_millis(), "seconds_ago": ago.as_secs() })),
        "identity": upstream_registry.identity(),
        "in_flight": state.in_flight + downloads.in_use_of(name),
        "waiting": state.waiting + downloads.waiting_of(name),
        "quirks": state.quirks.iter().map(|quirk| quirk.name()).collect::<Vec<_>>(),
        "rate_limits": allowances,
    })
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
