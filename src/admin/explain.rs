//! Explain endpoint: the decision that a client would get now, with its reasons.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use http::HeaderValue;
use serde::Serialize;
use utoipa::ToSchema;

use super::Admin;
use super::extract::{JsonBody, Params};
use super::format::{
    confirmed, describe_denial, describe_fetch, describe_serve, describe_young_digest, describe_youth,
    duration, rfc3339, short_digest,
};
use super::image_ref::{ImageQuery, ImageRef, ImageRequest};
use super::names::{AuthorizationName, OnNotFoundName, PolicyName};
use super::records::{RecordsView, sentences};
use super::refreshes::RefreshView;
use super::response::Problem;
use crate::oci::{Algorithm, Digest, UpstreamFailure};
use crate::policy::min_age::{AgeSource, Maturity, YoungDigest};
use crate::policy::{
    AgeFacts, Authorization, CacheState, CachedEntry, Completeness, ContentKind, CredentialOwner, Decision,
    OnNotFound, Policy, Presence, Revalidation, decide,
};
use crate::server::ServingState;
use crate::store::tags::NEVER_CONFIRMED;

/// Response of the explain endpoint.
#[derive(Serialize, ToSchema)]
pub(super) struct Explanation {
    pub(super) image: String,
    pub(super) rule: String,
    #[schema(value_type = PolicyName)]
    pub(super) policy: &'static str,
    pub(super) cached: Option<CachedCopy>,
    /// State of this principal's grant: what the upstream has shown about its right.
    #[schema(value_type = AuthorizationName)]
    pub(super) authorization: &'static str,
    pub(super) max_age_seconds: u64,
    /// Null: no limit.
    pub(super) stale_if_error_seconds: Option<u64>,
    #[schema(value_type = OnNotFoundName)]
    pub(super) on_not_found: &'static str,
    /// Reason why the upstream is unavailable, if it is.
    pub(super) upstream_unavailable: Option<&'static str>,
    /// Reason of the decision, as in `Cache-Status`, log and metrics.
    pub(super) reason: &'static str,
    /// The decision as a sentence.
    pub(super) sentence: String,
    /// Facts that lead to the decision.
    pub(super) because: Vec<String>,
    /// The decision for each possible upstream response.
    pub(super) what_if: Vec<WhatIf>,
    /// Records of other caches about the image. Null without `key_file` in `[shared]`.
    pub(super) records: Option<RecordsView>,
    /// Scheduled refreshes of the tag, if a rule has them.
    pub(super) refresh: Option<RefreshView>,
    /// The decision and its facts as `name=value`, for bug reports.
    #[expect(clippy::struct_field_names, reason = "the name of the field in the API")]
    pub(super) explanation: String,
}

#[derive(Serialize, ToSchema)]
pub(super) struct CachedCopy {
    pub(super) digest: String,
    /// Null for an imported image that no upstream has confirmed.
    #[schema(format = DateTime)]
    pub(super) confirmed_at: Option<String>,
    pub(super) complete: bool,
    /// Whether the confirmation was that of another cache, by its record in the shared storage.
    pub(super) confirmed_by_record: bool,
}

#[derive(Serialize, ToSchema)]
pub(super) struct WhatIf {
    pub(super) upstream_response: &'static str,
    pub(super) client_gets: String,
}

/// Explains the current decision for a client without a credential. Sends no upstream request.
#[utoipa::path(get, path = "/api/v1/why", params(ImageQuery), responses((status = 200, body = Explanation)))]
pub(super) async fn why(
    State(admin): State<Admin>,
    Params(query): Params<ImageQuery>,
) -> Result<Json<Explanation>, Problem> {
    let registry = admin.registry.load_full();
    let named = ImageRef::parse(&query.image, &registry)?;
    Ok(Json(explain(&registry, &named, None, admin.clock.now()).await))
}

/// Explains the current decision for a credential, which is neither stored nor logged.
#[utoipa::path(
    post,
    path = "/api/v1/why",
    request_body = ImageRequest,
    responses((status = 200, body = Explanation))
)]
pub(super) async fn why_with_credential(
    State(admin): State<Admin>,
    JsonBody(request): JsonBody<ImageRequest>,
) -> Result<Json<Explanation>, Problem> {
    let registry = admin.registry.load_full();
    let named = ImageRef::parse(&request.image, &registry)?;
    let authorization = request.authorization()?;
    Ok(Json(
        explain(&registry, &named, authorization.as_ref(), admin.clock.now()).await,
    ))
}

/// Explains the decision for a client with this `Authorization`. Sends no upstream request, and reads the records of the
/// shared storage.
async fn explain(
    registry: &ServingState,
    named: &ImageRef,
    authorization: Option<&HeaderValue>,
    now: SystemTime,
) -> Explanation {
    let upstream_registry = &named.upstream_registry;
    let (situation, decision, rule, is_complete) = registry
        .proxy
        .explain(
            upstream_registry,
            &named.repository,
            &named.reference,
            authorization,
            now,
        )
        .await;
    let unavailable = upstream_registry.upstream().unavailable_now();
    // A known outage is applied before any request is sent.
    let explained = match (decision, unavailable) {
        (Decision::Revalidate | Decision::Fetch(_), Some(cause)) => {
            decide(&situation.with_revalidation(Revalidation::Unavailable(cause)))
        }
        _ => decision,
    };
    let refresh = match named.tag_key() {
        Some(key) => RefreshView::load(&registry.proxy, upstream_registry, key, now).await,
        None => None,
    };
    let mut because = reasons(
        (&situation, is_complete),
        upstream_registry.name(),
        &rule,
        authorization.is_some(),
        unavailable,
    );
    because.extend(refresh.iter().map(|refresh| refresh.sentence.clone()));
    let confirmed_by_record = match (named.tag_key(), situation.cached) {
        (Some(key), Some(copy)) => {
            let proxy = &registry.proxy;
            proxy
                .is_confirmed_by_record(key, copy.digest, copy.confirmed_at)
                .await
        }
        _ => false,
    };
    if confirmed_by_record {
        because.push("another cache has confirmed the copy, by its record".to_owned());
    }
    let recorded = registry.proxy.recorded_image(
        upstream_registry,
        &named.repository,
        &named.reference,
        situation.cached.map(|copy| copy.digest),
    );
    let recorded = recorded.await;
    because.extend(recorded.iter().flat_map(sentences));
    Explanation {
        image: named.to_string(),
        rule: rule.to_string(),
        policy: situation.policy.name(),
        cached: situation.cached.map(|copy| CachedCopy {
            digest: copy.digest.to_string(),
            confirmed_at: confirmed(copy.confirmed_at),
            complete: is_complete,
            confirmed_by_record,
        }),
        authorization: authorization_name(situation.authorization),
        max_age_seconds: situation.max_age.as_secs(),
        stale_if_error_seconds: situation.stale_if_error.map(|stale| stale.as_secs()),
        on_not_found: situation.on_not_found.name(),
        upstream_unavailable: unavailable.map(UpstreamFailure::name),
        reason: explained.name(),
        sentence: sentence(explained, upstream_registry.name()),
        because,
        what_if: match explained {
            Decision::Revalidate | Decision::ProbeLayers(_) => what_ifs(&situation, upstream_registry.name()),
            Decision::Serve(_) | Decision::Fetch(_) | Decision::Deny(_) => Vec::new(),
        },
        records: recorded.as_ref().map(RecordsView::new),
        refresh,
        explanation: facts(decision, &situation, is_complete),
    }
}

/// The facts of a decision in one line, named as in the log, the configuration and the API.
fn facts(decision: Decision, situation: &CacheState, is_complete: bool) -> String {
    let subject = match situation.kind {
        ContentKind::Tag => "tag",
        ContentKind::Manifest => "manifest",
        ContentKind::Blob => "blob",
    };
    let seconds = |duration: std::time::Duration| format!("{}s", duration.as_secs());
    let copy = situation.cached.map_or_else(
        || "cached=none".to_owned(),
        |copy| {
            let complete = match (is_complete, copy.completeness) {
                (true, Completeness::Incomplete { previous: Some(_) }) => "yes, a previous image too",
                (true, _) => "yes",
                (false, Completeness::Incomplete { previous: Some(_) }) => "no, a previous image is",
                (false, _) => "no",
            };
            let blocked = if situation.blocked == Some(copy.digest) {
                "yes"
            } else {
                "no"
            };
            let confirmed_at = confirmed(copy.confirmed_at).unwrap_or_else(|| "never".to_owned());
            format!(
                "cached={} complete={complete} blocked={blocked} confirmed_at={confirmed_at}",
                copy.digest
            )
        },
    );
    format!(
        "reason={} subject={subject} policy={} authorization={} max_age={} stale_if_error={} on_not_found={} {copy} now={}",
        decision.name(),
        situation.policy.name(),
        authorization_name(situation.authorization),
        seconds(situation.max_age),
        situation
            .stale_if_error
            .map_or_else(|| "forever".to_owned(), seconds),
        situation.on_not_found.name(),
        rfc3339(situation.now),
    )
}

fn sentence(decision: Decision, upstream: &str) -> String {
    match decision {
        Decision::Revalidate => {
            format!("revalidate at {upstream} by HEAD, with the client's credential")
        }
        Decision::Serve(how) => describe_serve(how, upstream),
        Decision::ProbeLayers(how) => format!(
            "{}, if {upstream} has the missing layers",
            describe_serve(how, upstream)
        ),
        Decision::Fetch(why) => describe_fetch(why, upstream),
        Decision::Deny(refusal) => describe_denial(refusal, upstream),
    }
}

fn reasons(
    (situation, is_complete): (&CacheState, bool),
    upstream: &str,
    rule: &Arc<str>,
    has_credential: bool,
    unavailable: Option<UpstreamFailure>,
) -> Vec<String> {
    let mut lines = vec![format!("policy {}, by {rule}", situation.policy)];
    lines.push(match situation.cached {
        None => "no cached copy is available to this client".to_owned(),
        Some(copy) => describe_copy(&copy, situation, is_complete),
    });
    let who = if has_credential {
        "this credential"
    } else {
        "a client without a credential"
    };
    lines.push(match situation.authorization {
        Authorization::Granted => format!("{upstream} has authorized {who} for this repository"),
        Authorization::Expired => {
            format!("the grant of {who} for this repository at {upstream} has expired")
        }
        Authorization::Unknown => format!("{upstream} has not authorized {who} for this repository"),
    });
    if let Some(digest) = situation.blocked {
        let digest = short_digest(&digest.to_string());
        lines.push(format!("{digest} is blocked by the operator"));
    }
    if let Some(cause) = unavailable {
        lines.push(format!("{upstream} {cause}"));
    }
    if let Some(youth) = situation.cooling.and_then(|cooling| cooling.named.youth()) {
        let young = match situation.kind {
            ContentKind::Tag => describe_youth(&youth),
            ContentKind::Manifest | ContentKind::Blob => describe_young_digest(&youth),
        };
        lines.push(format!("{young}: {}", youth.describe(situation.now)));
    }
    if situation.on_not_found == OnNotFound::ServeStale {
        lines.push(format!("images deleted at {upstream} are retained, by policy"));
    }
    lines
}

fn describe_copy(copy: &CachedEntry, situation: &CacheState, is_complete: bool) -> String {
    let digest = short_digest(&copy.digest.to_string());
    let state = match (is_complete, copy.completeness) {
        (true, Completeness::Incomplete { previous: Some(_) }) => "complete, and a previous image too",
        (true, _) => "complete",
        (false, Completeness::Incomplete { previous: Some(_) }) => {
            "incomplete, and a previous image complete"
        }
        (false, _) => "incomplete",
    };
    let age = situation
        .now
        .duration_since(copy.confirmed_at)
        .unwrap_or_default();
    match situation.kind {
        ContentKind::Tag if copy.confirmed_at == NEVER_CONFIRMED => {
            format!("{digest} is {state}, imported, not confirmed")
        }
        ContentKind::Tag => {
            let moved = if copy.is_moved {
                "; another client has received a newer image, so it is not fresh"
            } else {
                ""
            };
            format!("{digest} is {state}, confirmed {} ago{moved}", duration(age))
        }
        ContentKind::Manifest | ContentKind::Blob => format!("{digest} is {state}"),
    }
}

/// The decision for each possible upstream response.
fn what_ifs(situation: &CacheState, upstream: &str) -> Vec<WhatIf> {
    let same = situation
        .cached
        .map_or_else(|| Digest::of(Algorithm::Sha256, b""), |copy| copy.digest);
    let other = Digest::of(Algorithm::Sha256, b"another image");
    let named = |digest, holding| Revalidation::Digest {
        digest,
        presence: holding,
    };
    let mut heard = Vec::new();
    if situation.cached.is_some() {
        let again = situation
            .blocked
            .map_or_else(|| named(same, Presence::Complete), Revalidation::Blocked);
        heard.push(("the same digest", again));
    }
    heard.extend([
        ("another digest", named(other, Presence::None)),
        ("401 or 403", Revalidation::Denied(CredentialOwner::Client)),
        ("404", Revalidation::NotFound),
        (
            "nothing usable",
            Revalidation::Unavailable(UpstreamFailure::Timeout),
        ),
    ]);
    if situation.policy == Policy::Never {
        heard.clear();
    }
    heard
        .into_iter()
        .map(|(upstream_response, heard)| WhatIf {
            upstream_response,
            client_gets: sentence(decide(&with_ages_of(situation, heard)), upstream),
        })
        .collect()
}

/// The state after this response. With a minimum age, a digest that the tag was never seen to name is too young.
fn with_ages_of(situation: &CacheState, heard: Revalidation) -> CacheState {
    let state = situation.with_revalidation(heard);
    if situation.kind != ContentKind::Tag {
        return state;
    }
    let (Revalidation::Digest { digest, .. }, Some(cooling)) = (heard, situation.cooling) else {
        return state;
    };
    let named = match (situation.cached, cooling.named) {
        (Some(copy), _) if copy.digest == digest => cooling.cached,
        (_, young @ Maturity::Young(_)) => young,
        // No digest: it is not one that the tag was seen to name.
        (_, Maturity::Mature) => Maturity::Young(YoungDigest {
            digest: None,
            since: Some((situation.now, AgeSource::FirstSeen)),
            may_be_older: false,
            served_from: None,
        }),
    };
    state.with_cooling(Some(AgeFacts { named, ..cooling }))
}

fn authorization_name(authorization: Authorization) -> &'static str {
    match authorization {
        Authorization::Unknown => "unknown",
        Authorization::Expired => "expired",
        Authorization::Granted => "granted",
    }
}
