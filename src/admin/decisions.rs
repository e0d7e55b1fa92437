//! `GET /api/v1/events`: the last pulls, and what was decided about each. The newest first; `?limit=` of them, those
//! `?after=` a number seen before.

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::event::{DECISIONS_MAX, Decision, Events};
use crate::oci::Query;

/// How many without `?limit=`.
const LIMIT: usize = 100;

pub(super) fn list(events: &Events, query: Option<&str>) -> Response<Full<Bytes>> {
    let query = match Query::parse(query) {
        Ok((query, _)) => query,
        Err(error) => return super::problem(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let number = |name: &'static str, otherwise: u64| match query.get(name) {
        None => Ok(otherwise),
        Some(text) => text.parse::<u64>().map_err(|_| name),
    };
    let (limit, after) = match (number("limit", LIMIT as u64), number("after", 0)) {
        (Ok(limit), Ok(after)) => (limit, after),
        (Err(name), _) | (_, Err(name)) => {
            return super::problem(StatusCode::BAD_REQUEST, &format!("`{name}` must be a number"));
        }
    };
    let limit = usize::try_from(limit).unwrap_or(DECISIONS_MAX).min(DECISIONS_MAX);
    let events: Vec<Value> = events
        .decisions(after, limit)
        .iter()
        .map(|decision| told(decision))
        .collect();
    super::answer(&json!({ "events": events }))
}

fn told(decision: &Decision) -> Value {
    json!({
        "number": decision.number,
        "time": humantime::format_rfc3339_millis(decision.at).to_string(),
        "client": decision.client.map(|client| client.to_string()),
        "user_agent": decision.user_agent,
        "door": decision.door,
        "upstream": decision.upstream,
        "repository": decision.repository,
        "reference": decision.reference,
        "outcome": decision.outcome.name(),
        "reason": decision.reason,
        "status": decision.status,
        "ms": (decision.took.as_secs_f64() * 1e6).round() / 1e3,
    })
}
