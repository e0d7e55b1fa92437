//! Refreshes: one on request, and the state of the scheduled ones as a whole and of one tag.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use http::HeaderValue;
use serde::Serialize;
use utoipa::ToSchema;

use super::Admin;
use super::extract::JsonBody;
use super::format::{describe_refresh, duration, rfc3339};
use super::image_ref::{ImageRef, ImageRequest};
use super::names::{PauseReason, RefreshOutcome, RefreshState};
use super::pull_jobs::{Platforms, PullSpec, request};
use super::response::Problem;
use crate::oci::{Endpoint, Reference, UpstreamFailure};
use crate::proxy::{ProxyService, RefreshResult, Refreshed, TagRefresh, TagRefreshState, UpstreamRegistry};
use crate::store::View;
use crate::store::tags::TagKey;

/// State of all scheduled refreshes.
#[derive(Serialize, ToSchema)]
#[schema(as = Refreshes)]
pub(super) struct RefreshesStatus {
    /// Tags that are refreshed, at the last planning.
    pub(super) tags: u64,
    /// Tags that no client pulled within `refresh_used_within`.
    pub(super) unused: u64,
    /// Tags that only clients can read.
    pub(super) private: u64,
    /// How many times longer the intervals are, because there are too many tags. 1: as configured.
    pub(super) longer_by: u64,
    /// Ended refreshes since the start, by result.
    pub(super) results: BTreeMap<&'static str, u64>,
    /// Time since the slot of the refresh that has waited longest.
    pub(super) overdue_seconds: Option<u64>,
    /// Upstreams at which nothing is refreshed for now.
    pub(super) paused: Vec<PausedUpstream>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct PausedUpstream {
    pub(super) upstream: String,
    #[schema(value_type = PauseReason)]
    pub(super) reason: &'static str,
}

/// State of one tag's refreshes.
#[derive(Clone, Serialize, ToSchema)]
#[schema(as = TagRefresh)]
pub(super) struct RefreshView {
    /// The interval.
    pub(super) every_seconds: u64,
    /// `unused`: no client pulled it within `refresh_used_within`. `private`: only clients can read it.
    #[schema(value_type = RefreshState)]
    pub(super) state: &'static str,
    /// Why nothing is refreshed at its upstream for now.
    #[schema(value_type = Option<PauseReason>)]
    pub(super) paused_by: Option<&'static str>,
    /// Time of the next refresh, unless a client pulls the tag before.
    #[schema(format = DateTime)]
    pub(super) next_at: Option<String>,
    /// The last result, if it was a failure.
    #[schema(value_type = Option<RefreshOutcome>)]
    pub(super) failed: Option<&'static str>,
    /// The state as a sentence.
    pub(super) sentence: String,
}

impl RefreshesStatus {
    pub(super) fn of(proxy: &ProxyService, now: SystemTime) -> Self {
        let status = proxy.refresh_status(now);
        let paused = status.paused.iter().map(|(upstream, pause)| PausedUpstream {
            upstream: upstream.to_string(),
            reason: pause.name(),
        });
        let results = status.results.iter();
        Self {
            tags: status.tags,
            unused: status.unused,
            private: status.private,
            longer_by: status.stride,
            results: results.map(|(result, count)| (result.name(), *count)).collect(),
            overdue_seconds: status.overdue.map(|late| late.as_secs()),
            paused: paused.collect(),
        }
    }
}

impl RefreshView {
    /// The state of this tag; `None` if no rule refreshes it. Blocks.
    pub(super) fn read(
        proxy: &ProxyService,
        registry: &UpstreamRegistry,
        view: &View<'_>,
        key: &TagKey,
        now: SystemTime,
    ) -> Option<Self> {
        let refresh = proxy.tag_refresh(registry, view, key, now)?;
        Some(Self {
            every_seconds: refresh.interval.as_secs(),
            state: refresh.state.name(),
            paused_by: match refresh.state {
                TagRefreshState::Paused(pause) => Some(pause.name()),
                _ => None,
            },
            next_at: refresh.next_at.map(rfc3339),
            failed: refresh.failed.map(RefreshResult::name),
            sentence: describe(&refresh, registry.name()),
        })
    }

    /// Like [`Self::read`], on a blocking thread.
    pub(super) async fn load(
        proxy: &Arc<ProxyService>,
        registry: &Arc<UpstreamRegistry>,
        key: TagKey,
        now: SystemTime,
    ) -> Option<Self> {
        let (reader, registry) = (Arc::clone(proxy), Arc::clone(registry));
        let read = proxy
            .store()
            .on_disk(move |view| Self::read(&reader, &registry, view, &key, now));
        Box::pin(read).await
    }
}

/// The result of a refresh on request.
#[derive(Serialize, ToSchema)]
#[schema(as = Refreshed)]
pub(super) struct RefreshedView {
    image: String,
    #[schema(value_type = RefreshOutcome)]
    result: &'static str,
    digest: Option<String>,
    cause: Option<&'static str>,
    sentence: String,
}

/// Revalidate a tag now, and fetch a newer image.
#[utoipa::path(
    post,
    path = "/api/v1/refresh",
    request_body = ImageRequest,
    responses((status = 200, body = RefreshedView))
)]
pub(super) async fn refresh(
    State(admin): State<Admin>,
    JsonBody(request): JsonBody<ImageRequest>,
) -> Result<Json<RefreshedView>, Problem> {
    let authorization = request.authorization()?;
    let (image, refreshed) = admin.refresh(&request.image, authorization).await?;
    let (result, digest, cause) = match refreshed {
        Refreshed::Unchanged(digest) => ("revalidated", Some(digest), None),
        Refreshed::Newer(digest) => ("new-digest", Some(digest), None),
        Refreshed::TooYoung(youth) => ("too-young", youth.digest, None),
        Refreshed::Blocked(digest) => ("blocked", Some(digest), None),
        Refreshed::NotFound => ("not-found", None, None),
        Refreshed::Denied => ("denied", None, None),
        Refreshed::Unavailable(cause) => ("upstream-unavailable", None, Some(cause)),
        Refreshed::FetchFailed(cause) => ("fetch-failed", None, Some(cause)),
    };
    Ok(Json(RefreshedView {
        image: image.to_string(),
        result,
        digest: digest.map(|digest| digest.to_string()),
        cause: cause.map(UpstreamFailure::name),
        sentence: describe_refresh(refreshed, image.upstream_registry.name()),
    }))
}

impl Admin {
    /// Revalidates a tag now.
    pub(super) async fn refresh(
        &self,
        image: &str,
        authorization: Option<HeaderValue>,
    ) -> Result<(ImageRef, Refreshed), Problem> {
        let registry = self.registry.load_full();
        let named = ImageRef::parse(image, &registry)?;
        if matches!(named.reference, Reference::Digest(_)) {
            return Err(Problem::bad_request("a tag is required: a digest is immutable"));
        }
        let endpoint = Endpoint::Manifest {
            repository: named.repository.clone(),
            reference: named.reference.clone(),
        };
        let spec = PullSpec {
            named: named.clone(),
            platforms: Platforms::local(),
            authorization,
        };
        let refreshed = registry
            .proxy
            .refresh(&request(&spec, endpoint, self.clock))
            .await;
        Ok((named, refreshed))
    }
}

fn describe(refresh: &TagRefresh, upstream: &str) -> String {
    let every = duration(refresh.interval);
    let state = match (refresh.state, refresh.next_at) {
        (TagRefreshState::Unused, _) => {
            "not now, because no client pulled it within `refresh_used_within`".to_owned()
        }
        (TagRefreshState::Private, _) => format!(
            "not now, because the cache has no credential for {upstream} and the repository is not known to be public"
        ),
        (TagRefreshState::Paused(pause), _) => format!("paused at {upstream}: {}", pause.describe()),
        (TagRefreshState::Planned, Some(at)) => format!("next at {}", rfc3339(at)),
        (TagRefreshState::Planned, None) => "planned".to_owned(),
    };
    let failed = refresh
        .failed
        .map(|result| format!("; the last one failed: {}", result.name()));
    format!(
        "refreshed every {every} in the background: {state}{}",
        failed.unwrap_or_default()
    )
}
