//! Scheduled refresh: background revalidation of tags in use, so that the next pull finds a moved tag in the cache.
//!
//! `policy::refresh` decides in which slot a tag is due. From time to time one pass over the index plans the slots of
//! the next window ([`planning`]); each slot then becomes a [`run`] of its tag: one `HEAD`, and the download of the
//! image if the tag moved. Nothing is persisted: the slots follow from the names of the tags, and the rest from the
//! stored confirmations and uses.
//!
//! A run never delays a client: it has the lowest class of every queue, and each upstream gets few at once. It uses
//! the cache's own credential, or none if the repository is public, and never that of a client. What a run learns
//! counts as for any request: an anonymous success or denial renews or withdraws the public mark of a repository.

mod fetch;
mod pause;
mod planning;
mod run;
mod view;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use self::pause::Paused;
use super::{ProxyService, UpstreamRegistry};
use crate::policy::refresh::Failures;
use crate::store::LogLimit;
use crate::store::tags::TagKey;

pub use self::pause::RefreshPause;
pub use self::planning::{RUNS_PER_MINUTE_MAX, TAGS_PER_MINUTE_MAX};
pub use self::view::{RefreshStatus, TagRefresh, TagRefreshState};

/// Concurrent revalidations at one upstream.
const HEADS_PER_UPSTREAM_MAX: usize = 2;

/// Concurrent downloads of moved images from one upstream.
const FETCHES_PER_UPSTREAM_MAX: usize = 2;

/// Runs that wait for their `HEAD` at one upstream or have sent it. Beyond that a run is skipped, and the tag waits for
/// its next slot.
const RUNS_PER_UPSTREAM_MAX: usize = 1024;

/// Downloads of moved images that wait at one upstream. Each holds the manifests that the tag has now. Beyond that a
/// download is skipped until the tag's next slot, so that revalidations go on while downloads are slow.
const FETCHES_WAITING_MAX: usize = 64;

/// Failing tags that are remembered. Beyond that some are retried in every slot.
const FAILURES_MAX: usize = 16_384;

/// Pause before the next attempt to plan, after the index was unavailable.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// State of scheduled refreshes. The process has one.
pub(super) struct ScheduledRefresh {
    upstreams: Mutex<Arc<Upstreams>>,
    /// Notified when a reload replaced the upstreams.
    reloaded: Notify,
    lanes: Mutex<HashMap<Arc<str>, Arc<UpstreamRuns>>>,
    failing: Cache<u64, Failing>,
    totals: [AtomicU64; RefreshResult::ALL.len()],
    census: Mutex<TagCounts>,
    failure_log: LogLimit,
}

/// The upstreams by name.
type Upstreams = HashMap<Arc<str>, Arc<UpstreamRegistry>>;

/// Runs at one upstream.
struct UpstreamRuns {
    heads: Semaphore,
    fetches: Semaphore,
    state: Mutex<LaneState>,
}

#[derive(Default)]
struct LaneState {
    /// Tags with a run that waits or is under way, by the hash of their name. A tag has one run at a time: a second one
    /// would find the manifest that the first one fetched, and move the tag to it while its layers are missing.
    tags: HashSet<u64>,
    /// The runs of these tags that wait for their `HEAD`, by slot.
    waiting: BTreeSet<(SystemTime, u64)>,
    /// How many of these runs download an image or wait for that.
    fetches: usize,
    paused: Option<Paused>,
}

/// A tag whose last refresh failed.
#[derive(Clone, Copy)]
struct Failing {
    failures: Failures,
    result: RefreshResult,
}

/// Numbers of tags in the last planning pass.
#[derive(Clone, Copy, Default)]
struct TagCounts {
    in_use: u64,
    unused: u64,
    private: u64,
    stride: u64,
}

/// Result of a scheduled refresh. The names are those of the manual one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefreshResult {
    /// The tag still points to the cached image.
    Revalidated,
    /// The tag moved, and the new image is cached.
    NewDigest,
    /// The tag still points to the cached image, and what was missing of it is cached now.
    Completed,
    /// The tag names a digest that is younger than `min_age`. It is not fetched, and its age is known from now on.
    TooYoung,
    /// The tag moved to a digest that the operator blocked. It is not fetched.
    Blocked,
    /// The tag does not exist upstream.
    NotFound,
    /// The upstream denied the request.
    Denied,
    /// The upstream was unavailable.
    Unavailable,
    /// The tag moved, and the new image could not be fetched whole.
    FetchFailed,
    /// The tag moved, and its image is fetched after a later slot: too many downloads wait, refreshes were paused or turned
    /// off while it waited, or the tag moved again during the download.
    FetchSkipped,
}

impl RefreshResult {
    /// All results.
    pub const ALL: [Self; 10] = [
        Self::Revalidated,
        Self::NewDigest,
        Self::Completed,
        Self::TooYoung,
        Self::Blocked,
        Self::NotFound,
        Self::Denied,
        Self::Unavailable,
        Self::FetchFailed,
        Self::FetchSkipped,
    ];

    /// Name in the log, the metrics and the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Revalidated => "revalidated",
            Self::NewDigest => "new-digest",
            Self::Completed => "completed",
            Self::TooYoung => "too-young",
            Self::Blocked => "blocked",
            Self::NotFound => "not-found",
            Self::Denied => "denied",
            Self::Unavailable => "upstream-unavailable",
            Self::FetchFailed => "fetch-failed",
            Self::FetchSkipped => "fetch-skipped",
        }
    }

    fn is_failure(self) -> bool {
        !matches!(
            self,
            Self::Revalidated
                | Self::NewDigest
                | Self::Completed
                | Self::TooYoung
                | Self::Blocked
                | Self::FetchSkipped
        )
    }
}

impl Default for ScheduledRefresh {
    fn default() -> Self {
        Self {
            upstreams: Mutex::default(),
            reloaded: Notify::new(),
            lanes: Mutex::default(),
            failing: Cache::new(FAILURES_MAX),
            totals: Default::default(),
            census: Mutex::default(),
            failure_log: LogLimit::default(),
        }
    }
}

impl ScheduledRefresh {
    fn upstreams(&self) -> Arc<Upstreams> {
        Arc::clone(&self.upstreams.lock())
    }

    fn lane(&self, upstream: &Arc<str>) -> Arc<UpstreamRuns> {
        Arc::clone(self.lanes.lock().entry(Arc::clone(upstream)).or_default())
    }

    fn count(&self, result: RefreshResult) {
        if let Some(total) = self.totals.get(result as usize) {
            total.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Default for UpstreamRuns {
    fn default() -> Self {
        Self {
            heads: Semaphore::new(HEADS_PER_UPSTREAM_MAX),
            fetches: Semaphore::new(FETCHES_PER_UPSTREAM_MAX),
            state: Mutex::default(),
        }
    }
}

impl UpstreamRuns {
    /// Registers a run of the tag with this hash; `None` if there are too many, or if the tag has one.
    fn enter(self: &Arc<Self>, tag: u64, slot_at: SystemTime) -> Option<LaneRun> {
        let mut state = self.state.lock();
        let heads = state.tags.len().saturating_sub(state.fetches);
        if heads >= RUNS_PER_UPSTREAM_MAX || !state.tags.insert(tag) {
            return None;
        }
        state.waiting.insert((slot_at, tag));
        Some(LaneRun {
            lane: Arc::clone(self),
            tag,
            slot_at,
            is_fetch: false,
        })
    }
}

/// A registered run; ends when dropped.
struct LaneRun {
    lane: Arc<UpstreamRuns>,
    tag: u64,
    slot_at: SystemTime,
    /// Whether it counts as a download, and no longer as a `HEAD`.
    is_fetch: bool,
}

impl LaneRun {
    /// The run no longer waits for its `HEAD`.
    fn start(&self) {
        self.lane.state.lock().waiting.remove(&(self.slot_at, self.tag));
    }

    /// Gives the place of its `HEAD` back and takes one of a download. Returns whether there was one.
    fn begin_fetch(&mut self) -> bool {
        let mut state = self.lane.state.lock();
        if state.fetches >= FETCHES_PER_UPSTREAM_MAX + FETCHES_WAITING_MAX {
            return false;
        }
        state.fetches += 1;
        self.is_fetch = true;
        true
    }
}

impl Drop for LaneRun {
    fn drop(&mut self) {
        let mut state = self.lane.state.lock();
        state.waiting.remove(&(self.slot_at, self.tag));
        state.tags.remove(&self.tag);
        if self.is_fetch {
            state.fetches = state.fetches.saturating_sub(1);
        }
    }
}

impl ProxyService {
    /// Sets the upstreams of scheduled refreshes, at the start and after a reload.
    pub fn set_refreshed_upstreams(&self, upstreams: &[Arc<UpstreamRegistry>]) {
        let named = upstreams
            .iter()
            .map(|upstream| (Arc::from(upstream.name()), Arc::clone(upstream)));
        *self.scheduled.upstreams.lock() = Arc::new(named.collect());
        self.scheduled.reloaded.notify_one();
    }

    /// Refreshes tags in their slots until `ended`. Runs under way are then dropped; their downloads end by themselves.
    pub async fn run_scheduled_refreshes(self: Arc<Self>, ended: impl Future<Output = ()>) {
        tokio::pin!(ended);
        let mut runs = JoinSet::new();
        tokio::select! {
            () = &mut ended => {}
            () = self.refresh_loop(&mut runs) => {}
        }
        runs.abort_all();
    }

    async fn refresh_loop(self: &Arc<Self>, runs: &mut JoinSet<()>) {
        let mut begins_at = Instant::now();
        let mut seen = 0;
        loop {
            let Some(shortest) = self.shortest_refresh() else {
                *self.scheduled.census.lock() = TagCounts::default();
                self.scheduled.reloaded.notified().await;
                (begins_at, seen) = (Instant::now(), 0);
                continue;
            };
            // The window begins where the last one ended, even if this pass is late.
            let now = Instant::now();
            let late = now.saturating_duration_since(begins_at);
            let length = planning::window(shortest, seen);
            let clock_now = self.clock.now();
            let from = clock_now.checked_sub(late).unwrap_or(clock_now);
            let until = from.checked_add(length).unwrap_or(from);
            let Some(planned) = self.plan_refreshes((from, until), length).await else {
                tracing::debug!("scheduled refreshes not planned, the index is incomplete");
                self.reloaded_until(now + RETRY_AFTER).await;
                begins_at = Instant::now();
                continue;
            };
            seen = planned.seen;
            let ends_at = begins_at + length;
            let mut is_reloaded = false;
            for due in planned.runs {
                let after = due.slot.at.duration_since(from).unwrap_or_default();
                if self.reloaded_until(begins_at + after).await {
                    is_reloaded = true;
                    break;
                }
                while runs.try_join_next().is_some() {}
                self.start_run(runs, due.tag, due.slot.at);
            }
            if is_reloaded || self.reloaded_until(ends_at).await {
                begins_at = Instant::now();
            } else {
                begins_at = ends_at;
            }
        }
    }

    /// Waits until this time, or until a reload before it. Returns whether there was a reload.
    async fn reloaded_until(&self, until: Instant) -> bool {
        tokio::select! {
            biased;
            () = self.scheduled.reloaded.notified() => true,
            () = sleep_until(until) => false,
        }
    }

    fn shortest_refresh(&self) -> Option<Duration> {
        let upstreams = self.scheduled.upstreams();
        upstreams
            .values()
            .filter_map(|upstream| upstream.shortest_refresh())
            .min()
    }

    fn start_run(self: &Arc<Self>, runs: &mut JoinSet<()>, key: TagKey, slot_at: SystemTime) {
        let lane = self.scheduled.lane(&key.upstream);
        let Some(mut run) = lane.enter(self.tag_hash(&key), slot_at) else {
            tracing::debug!(
                upstream = &*key.upstream,
                image = %format_args!("{}:{}", key.repository, key.tag),
                "scheduled refresh skipped, too many are waiting or one of this tag is under way"
            );
            return;
        };
        let proxy = Arc::clone(self);
        runs.spawn(async move { proxy.run_in_lane(&mut run, &key).await });
    }

    /// Hash of the tag's name, keyed by the installation.
    fn tag_hash(&self, key: &TagKey) -> u64 {
        let name = [
            "refresh",
            &key.upstream,
            key.repository.as_str(),
            key.tag.as_str(),
        ]
        .join("\0");
        let keyed = self.principals.keyed(name.as_bytes());
        keyed.first_chunk().map_or(0, |first| u64::from_be_bytes(*first))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn waiting_fetches_take_no_place_of_heads() {
        let lane = Arc::new(UpstreamRuns::default());
        let at = |second| SystemTime::UNIX_EPOCH + Duration::from_secs(second);
        let mut runs: Vec<_> = (0..1024).map(|tag| lane.enter(tag, at(tag)).unwrap()).collect();
        assert!(lane.enter(2000, at(2000)).is_none(), "too many");
        let fetches = runs.iter_mut().map(LaneRun::begin_fetch);
        assert_eq!(fetches.filter(|begins| *begins).count(), 66);
        assert_eq!(lane.oldest_waiting(), Some(at(0)));
        runs.iter().for_each(LaneRun::start);
        assert_eq!(lane.oldest_waiting(), None);

        let more: Vec<_> = (2000..3000).map_while(|tag| lane.enter(tag, at(tag))).collect();
        assert_eq!(more.len(), 66);
        assert!(runs.pop().is_some());
        assert!(lane.enter(0, at(0)).is_none(), "one run of each tag");
        runs.clear();
        assert!(lane.enter(0, at(0)).is_some());
        drop(more);
        let state = lane.state.lock();
        assert!(state.tags.is_empty() && state.waiting.is_empty());
        assert_eq!(state.fetches, 0);
    }
}
