//! State of scheduled refreshes, for the operator.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use super::{ProxyService, RefreshPause, RefreshResult, UpstreamRegistry};
use crate::policy::refresh::Outlook;
use crate::store::View;
use crate::store::tags::TagKey;

/// State of all scheduled refreshes.
#[derive(Clone, Debug)]
pub struct RefreshStatus {
    /// Tags that are refreshed, as of the last planning.
    pub tags: u64,
    /// Tags under a rule with `refresh` that no client pulled within `refresh_used_within`.
    pub unused: u64,
    /// Tags that only clients can read, because the cache has no credential and the repository is not public.
    pub private: u64,
    /// Each tag uses one of this many slots, because too many tags are refreshed. 1: every slot.
    pub stride: u64,
    /// Ended refreshes since the start, by result.
    pub results: Vec<(RefreshResult, u64)>,
    /// Time since the slot of the refresh that has waited longest; `None` if none waits.
    pub overdue: Option<Duration>,
    /// Upstreams at which a refresh found a pause that still applies.
    pub paused: Vec<(Arc<str>, RefreshPause)>,
}

/// State of one tag's refreshes.
#[derive(Clone, Copy, Debug)]
pub struct TagRefresh {
    /// The interval.
    pub interval: Duration,
    /// The state.
    pub state: TagRefreshState,
    /// Time of the next run; `None` if none is planned.
    pub next_at: Option<SystemTime>,
    /// The last result, if it was a failure.
    pub failed: Option<RefreshResult>,
}

/// The plan for a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagRefreshState {
    /// It is refreshed.
    Planned,
    /// No client pulled it within `refresh_used_within`.
    Unused,
    /// Only clients can read it.
    Private,
    /// Nothing is refreshed at its upstream for now.
    Paused(RefreshPause),
}

impl TagRefreshState {
    /// Name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Unused => "unused",
            Self::Private => "private",
            Self::Paused(_) => "paused",
        }
    }
}

impl ProxyService {
    /// State of all scheduled refreshes at `now`.
    pub fn refresh_status(&self, now: SystemTime) -> RefreshStatus {
        let census = *self.scheduled.census.lock();
        let upstreams = self.scheduled.upstreams();
        let lanes = self.scheduled.lanes.lock();
        let overdue = lanes
            .values()
            .filter_map(|lane| now.duration_since(lane.oldest_waiting()?).ok());
        let overdue = overdue.max();
        let paused = lanes.iter().filter_map(|(name, lane)| {
            let key = lane.state.lock().paused.as_ref()?.key.clone();
            Some((Arc::clone(name), self.pause_of(upstreams.get(name)?, &key)?))
        });
        let mut paused: Vec<_> = paused.collect();
        paused.sort_by(|(a, _), (b, _)| a.cmp(b));
        let totals = self.scheduled.totals.iter();
        RefreshStatus {
            tags: census.in_use,
            unused: census.unused,
            private: census.private,
            stride: census.stride.max(1),
            results: RefreshResult::ALL
                .into_iter()
                .zip(totals.map(|total| total.load(Ordering::Relaxed)))
                .collect(),
            overdue,
            paused,
        }
    }

    /// State of one tag's refreshes at `now`; `None` if it is not cached or no rule refreshes it. Blocks.
    pub fn tag_refresh(
        &self,
        registry: &UpstreamRegistry,
        view: &View<'_>,
        key: &TagKey,
        now: SystemTime,
    ) -> Option<TagRefresh> {
        let policy = registry.rule(&key.repository, Some(&key.tag)).scheduled_refresh();
        let interval = policy.interval?;
        let facts = self.refresh_facts(view, key, policy)?;
        let failing = self.scheduled.failing.get(&self.tag_hash(key));
        let refresh = |state, next_at| TagRefresh {
            interval,
            state,
            next_at,
            failed: failing.map(|failing| failing.result),
        };
        let next_at = match facts.outlook(now) {
            Outlook::Off => return None,
            Outlook::Unused => return Some(refresh(TagRefreshState::Unused, None)),
            Outlook::Planned(next_at) => next_at,
        };
        if !registry.is_shared() && view.public_since(&key.upstream, &key.repository).is_none() {
            return Some(refresh(TagRefreshState::Private, None));
        }
        let state = match self.pause_of(registry, key) {
            Some(pause) => TagRefreshState::Paused(pause),
            None => TagRefreshState::Planned,
        };
        Some(refresh(state, Some(next_at)))
    }
}
