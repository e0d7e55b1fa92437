//! Pauses of scheduled refreshes: why no tag of an upstream is refreshed for now.

use std::time::Duration;

use super::{ProxyService, UpstreamRegistry};
use crate::oci::{Endpoint, Reference, UpstreamFailure};
use crate::proxy::manifest_fetch::UpstreamRequest;
use crate::store::tags::TagKey;
use crate::upstream::PullQuota;

/// Timeout that [`crate::upstream::Upstream::wait_limit`] shortens. Only whether a request is sent matters here.
const HEAD_TIMEOUT: Duration = Duration::from_secs(25);

/// Why nothing is refreshed at an upstream for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefreshPause {
    /// Offline mode is on.
    Offline,
    /// A circuit breaker is open.
    BreakerOpen,
    /// The upstream limits the cache's requests.
    RateLimited,
    /// Less of the pull quota is left than `refresh_quota_floor`.
    QuotaFloor,
}

impl RefreshPause {
    /// Name in the log, the metrics and the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::BreakerOpen => "circuit-breaker",
            Self::RateLimited => "rate-limited",
            Self::QuotaFloor => "quota-floor",
        }
    }

    /// The reason in words.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Offline => "offline mode is on",
            Self::BreakerOpen => "its circuit breaker is open",
            Self::RateLimited => "it limits the rate of the cache's requests",
            Self::QuotaFloor => "less of the pull quota is left than `refresh_quota_floor`",
        }
    }
}

/// A pause that a run found.
pub(super) struct Paused {
    reason: RefreshPause,
    /// The tag of the run. The pause ends when it no longer applies to this tag, because `refresh_quota_floor` may differ
    /// for others.
    pub(super) key: TagKey,
}

impl ProxyService {
    /// Whether this request of a refresh may be sent now. A pause of the whole upstream is recorded, and logged when it
    /// begins or ends.
    pub(super) fn may_refresh(&self, request: &UpstreamRequest) -> bool {
        let (registry, Some(tag)) = (&request.registry, request.tag()) else {
            return false;
        };
        let key = TagKey {
            upstream: registry.shared_name(),
            repository: request.repository.clone(),
            tag: tag.clone(),
        };
        let pause = self.pause_of(registry, &key);
        self.record_pause(registry, key, pause);
        if pause.is_some() {
            return false;
        }
        // A circuit breaker may be open for this repository or credential alone. This call finds that, and starts the
        // probe that may close it.
        let asked = (&request.endpoint, true);
        let wait = registry
            .upstream()
            .wait_limit(&request.caller, asked, HEAD_TIMEOUT);
        if let Err(cause) = wait {
            let upstream = registry.name();
            tracing::debug!(upstream, repository = %request.repository, %cause, "scheduled refresh skipped");
        }
        wait.is_ok()
    }

    fn record_pause(&self, registry: &UpstreamRegistry, key: TagKey, pause: Option<RefreshPause>) {
        let lane = self.scheduled.lane(&key.upstream);
        let upstream = registry.name();
        let mut state = lane.state.lock();
        let before = state.paused.as_ref().map(|paused| paused.reason);
        match (pause, &state.paused) {
            (Some(reason), _) => {
                state.paused = Some(Paused { reason, key });
                drop(state);
                if before != Some(reason) {
                    tracing::info!(upstream, reason = reason.name(), "scheduled refreshes paused");
                }
            }
            (None, Some(paused)) if self.pause_of(registry, &paused.key).is_none() => {
                state.paused = None;
                drop(state);
                tracing::info!(upstream, "scheduled refreshes resumed");
            }
            (None, _) => {}
        }
    }

    /// Why no tag under this tag's rule is refreshed at its upstream for now, as far as it is known without a request.
    pub(super) fn pause_of(&self, registry: &UpstreamRegistry, key: &TagKey) -> Option<RefreshPause> {
        let policy = registry.rule(&key.repository, Some(&key.tag)).scheduled_refresh();
        policy.interval?;
        let caller = registry.background_caller(&self.principals);
        let endpoint = Endpoint::Manifest {
            repository: key.repository.clone(),
            reference: Reference::Tag(key.tag.clone()),
        };
        let upstream = registry.upstream();
        match upstream.unavailable_to(&caller, &endpoint) {
            Some(UpstreamFailure::Offline) => return Some(RefreshPause::Offline),
            Some(_) => return Some(RefreshPause::BreakerOpen),
            None => {}
        }
        if upstream.head_pause(&caller, &endpoint).is_some() {
            return Some(RefreshPause::RateLimited);
        }
        let quota = upstream.quota_of(&caller).filter(PullQuota::is_current)?;
        let (remaining, limit) = (quota.limit.remaining?, quota.limit.limit?);
        let is_below = policy.quota_floor.is_below(remaining, limit);
        is_below.then_some(RefreshPause::QuotaFloor)
    }
}
