//! The upstreams as an operator sees them: how each is doing, and what is left of whose allowance there.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::event::AllowanceLevel;
use crate::oci::Cause;
use crate::server::Registry;
use crate::upstream::State;

/// All upstreams, as JSON. Credentials are told by kind, a client's by an id that means nothing elsewhere.
pub(super) fn listed(registry: &Registry) -> Value {
    let sites = registry.doors.all().iter();
    let upstreams: Vec<Value> = sites
        .map(|site| described(site.name(), &site.upstream().state()))
        .collect();
    json!({ "upstreams": upstreams })
}

fn described(name: &str, state: &State) -> Value {
    let silence = |(cause, ago): (Cause, Duration)| json!({ "cause": cause.name(), "text": format!("{name} {cause}"), "seconds": ago.as_secs() });
    let allowances: Vec<Value> = state
        .allowances
        .iter()
        .map(|allowance| {
            json!({
                "credential": allowance.who.to_string(),
                "limit": allowance.limit.limit,
                "remaining": allowance.limit.remaining,
                "window_seconds": allowance.limit.window_s,
                "source": allowance.limit.source,
                "seconds_ago": allowance.ago.as_secs(),
            })
        })
        .collect();
    json!({
        "name": name,
        "silent": state.open.map(|(since, cause)| silence((cause, since))),
        "last_silence": state.last_silence.map(silence),
        "in_flight": state.in_flight,
        "quirks": state.quirks.iter().map(|quirk| quirk.name()).collect::<Vec<_>>(),
        "rate_limits": allowances,
    })
}

/// What is left of whose allowance: of several clients, of the one with the fewest pulls left.
pub(super) fn allowances(registry: &Registry) -> Vec<AllowanceLevel> {
    let mut levels = Vec::new();
    for site in registry.doors.all() {
        let mut fewest = BTreeMap::new();
        for allowance in site.upstream().state().allowances {
            let level = AllowanceLevel {
                upstream: site.name().into(),
                credential: allowance.who.name(),
                limit: allowance.limit.limit,
                remaining: allowance.limit.remaining,
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
