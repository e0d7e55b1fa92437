//! Scheduled refreshes: their state as a whole, and of one tag.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use super::format::{duration, rfc3339};
use crate::proxy::{ProxyService, RefreshResult, TagRefresh, TagRefreshState, UpstreamRegistry};
use crate::store::View;
use crate::store::tags::TagKey;

/// State of all scheduled refreshes.
#[derive(Serialize)]
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

#[derive(Serialize)]
pub(super) struct PausedUpstream {
    pub(super) upstream: String,
    pub(super) reason: &'static str,
}

/// State of one tag's refreshes.
#[derive(Clone, Serialize)]
pub(super) struct RefreshView {
    pub(super) every_seconds: u64,
    pub(super) state: &'static str,
    /// Why its upstream is paused.
    pub(super) paused_by: Option<&'static str>,
    pub(super) next_at: Option<String>,
    /// The last result, if it was a failure.
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
