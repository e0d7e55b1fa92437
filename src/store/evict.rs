//! Eviction: takes a snapshot of the stored images ([`Graph`]), plans the removals (`plan`), and executes them in a
//! crash-safe order.
//!
//! Of each image the tag is removed first, and the removal is made durable before the manifests are removed, and
//! those before the blobs. So a stop or a power cut leaves unreferenced content, which a later round removes, and
//! never an image without its content. If content is needed between snapshot and removal, the round ends and starts
//! again with a new snapshot.
//!
//! Garbage collection of unused content (`gc`) and deletion of images (`delete`) work the same way.
//!
//! Rounds run on a background thread before the store is full, and on the thread of a pull that finds no space.

mod delete;
mod execute;
mod gc;
mod plan;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::{Condvar, Mutex};

pub use self::delete::DeleteError;
use self::plan::plan;
use super::access_times::AccessTimes;
use super::blobs::Blobs;
use super::fs::FileSystem;
use super::graph::{Graph, Sources};
use super::manifests::Manifests;
use super::pins::Pins;
use super::quota::{Quota, QuotaKind, Reservation, Shortfall};
use super::tags::Tags;
use super::usage::Counters;
use super::{QUARANTINE_FOLDER, StoreError};

/// Content stored or used more recently than this is not evicted.
pub const EVICTION_MIN_AGE: Duration = Duration::from_secs(3600);

/// Most attempts per round. A round is repeated if planned content was needed meanwhile.
const ROUNDS_MAX: u32 = 4;

/// After a round without progress, no new snapshot is taken for this long.
const NO_PROGRESS_PAUSE: Duration = Duration::from_secs(10);

/// Quarantined files are kept this long for inspection, if space allows.
const QUARANTINE_AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Eviction counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evictions {
    /// Blobs and manifests removed because of the size limit.
    pub for_size: u64,
    /// Blobs and manifests removed because of the minimum free space.
    pub for_free: u64,
    /// Blobs and manifests removed by garbage collection.
    pub collected: u64,
    /// Tags removed with them.
    pub tags: u64,
    /// Bytes of the removed blobs and manifests.
    pub bytes: u64,
    /// Blobs that did not fit and were passed through unstored.
    pub refused: u64,
    /// Idle time of the least recently used image at the last eviction.
    pub longest_idle: Option<Duration>,
}

#[derive(Default)]
struct Totals {
    for_size: AtomicU64,
    for_free: AtomicU64,
    collected: AtomicU64,
    tags: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
    longest_idle: Mutex<Option<Duration>>,
}

pub(super) struct Evictor {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) blobs: Arc<Blobs>,
    pub(super) manifests: Arc<Manifests>,
    pub(super) tags: Arc<Tags>,
    pub(super) pins: Arc<Pins>,
    pub(super) access_times: Arc<AccessTimes>,
    pub(super) quota: Arc<Quota>,
    usage: Arc<Counters>,
    pub(super) stop: Arc<AtomicBool>,
    state: State,
}

#[derive(Default)]
struct State {
    totals: Totals,
    /// Serializes rounds. After a round without progress, records how long and for which size another one is
    /// useless.
    round: Mutex<Option<NoProgress>>,
    /// Folders with tag removals that are not durable yet.
    unsynced: Mutex<BTreeSet<PathBuf>>,
    /// The last round freed too little.
    is_short: AtomicBool,
    is_requested: Mutex<bool>,
    requested: Condvar,
}

#[derive(Clone, Copy)]
struct NoProgress {
    at: SystemTime,
    /// Most bytes that could be freed.
    bytes: u64,
}

impl NoProgress {
    /// Whether a round for at least so many bytes is still useless. A clock that was set back ends the pause.
    fn applies(&self, now: SystemTime, bytes_min: u64) -> bool {
        let is_recent = now
            .duration_since(self.at)
            .is_ok_and(|age| age < NO_PROGRESS_PAUSE);
        is_recent && self.bytes < bytes_min
    }
}

/// Result of a round.
enum Round {
    Reclaimed,
    /// Only so many bytes can be freed at present.
    TooLittle(u64),
    /// Planned content was needed meanwhile.
    Conflict,
}

impl Evictor {
    #[expect(clippy::too_many_arguments, reason = "dependencies; called once")]
    pub(super) fn new(
        fs: &Arc<dyn FileSystem>,
        blobs: &Arc<Blobs>,
        manifests: &Arc<Manifests>,
        tags: &Arc<Tags>,
        pins: &Arc<Pins>,
        access_times: &Arc<AccessTimes>,
        quota: &Arc<Quota>,
        usage: &Arc<Counters>,
        stop: &Arc<AtomicBool>,
    ) -> Self {
        Self {
            fs: Arc::clone(fs),
            blobs: Arc::clone(blobs),
            manifests: Arc::clone(manifests),
            tags: Arc::clone(tags),
            pins: Arc::clone(pins),
            access_times: Arc::clone(access_times),
            quota: Arc::clone(quota),
            usage: Arc::clone(usage),
            stop: Arc::clone(stop),
            state: State::default(),
        }
    }

    /// Reserves space for a blob, evicting other content if necessary.
    pub(super) fn reserve(&self, bytes: u64) -> Result<Reservation, StoreError> {
        let mut reserved = self.quota.reserve(bytes);
        if reserved.is_ok() {
            self.wake_if_needed();
        } else if self.quota.fits_limit(bytes) {
            let shortfall = || {
                reserved = self.quota.reserve(bytes);
                reserved.as_ref().err().copied()
            };
            self.evict_for(shortfall, true);
        }
        let reserved = reserved.or_else(|_| self.quota.reserve(bytes));
        reserved.map_err(|shortfall| {
            self.state.totals.refused.fetch_add(1, Ordering::Relaxed);
            StoreError::OverQuota {
                bytes,
                limit: shortfall.quota_kind.name(),
            }
        })
    }

    /// Evicts content for `bytes` more on a full disk. Returns whether anything was freed.
    pub(super) fn relieve_full_disk(&self, bytes: u64) -> bool {
        let before = self.totals().bytes;
        let freed = || self.totals().bytes.saturating_sub(before);
        let shortfall = || {
            let lacking = bytes.max(1).saturating_sub(freed());
            (lacking > 0).then_some(Shortfall {
                quota_kind: QuotaKind::Free,
                bytes_min: 1,
                bytes_target: lacking,
            })
        };
        self.evict_for(shortfall, false);
        freed() > 0
    }

    pub(super) fn totals(&self) -> Evictions {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let totals = &self.state.totals;
        Evictions {
            for_size: read(&totals.for_size),
            for_free: read(&totals.for_free),
            collected: read(&totals.collected),
            tags: read(&totals.tags),
            bytes: read(&totals.bytes),
            refused: read(&totals.refused),
            longest_idle: *totals.longest_idle.lock(),
        }
    }

    /// Returns whether the last round could not free enough.
    pub(super) fn is_short(&self) -> bool {
        self.state.is_short.load(Ordering::Relaxed)
    }

    /// Wakes the background thread if a limit is exceeded.
    pub(super) fn wake_if_needed(&self) {
        match self.quota.background_shortfall() {
            Some(_) => self.wake(),
            None => self.state.is_short.store(false, Ordering::Relaxed),
        }
    }

    pub(super) fn wake(&self) {
        *self.state.is_requested.lock() = true;
        self.state.requested.notify_one();
    }

    /// Main loop of the eviction thread.
    pub(super) fn run(&self) {
        loop {
            let mut is_requested = self.state.is_requested.lock();
            let condition = |is_requested: &mut bool| !*is_requested;
            self.state.requested.wait_while(&mut is_requested, condition);
            *is_requested = false;
            drop(is_requested);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            self.evict_for(|| self.quota.background_shortfall(), false);
        }
    }

    /// Removes partial downloads, and then evicts content, until `shortfall` returns `None`. It is measured again before each
    /// round, because other threads free space while this one waits, and so does a round that ends early. With
    /// `is_all_or_nothing`, no content is evicted if the least number of bytes cannot be freed.
    fn evict_for(&self, mut shortfall: impl FnMut() -> Option<Shortfall>, is_all_or_nothing: bool) {
        let mut no_progress = self.state.round.lock();
        // Not measured again if there is none: it may reserve the space.
        let Some(Shortfall { bytes_target, .. }) = shortfall() else {
            return;
        };
        self.blobs.partials.free(self.fs.as_ref(), bytes_target);
        for _ in 0..ROUNDS_MAX {
            let Some(shortfall) = shortfall() else {
                return;
            };
            let now = self.access_times.now();
            if no_progress.is_some_and(|no_progress| no_progress.applies(now, shortfall.bytes_min)) {
                return;
            }
            *no_progress = None;
            let bytes_min = if is_all_or_nothing { shortfall.bytes_min } else { 0 };
            match self.round(shortfall, bytes_min) {
                Ok(Round::Reclaimed) => {
                    self.state.is_short.store(false, Ordering::Relaxed);
                    return;
                }
                Ok(Round::Conflict) => {}
                Ok(Round::TooLittle(bytes)) => {
                    if !self.state.is_short.swap(true, Ordering::Relaxed) {
                        tracing::warn!(
                            limit = shortfall.quota_kind.name(),
                            "eviction freed too little, the remaining content is pinned, in use or younger than an hour"
                        );
                    }
                    *no_progress = Some(NoProgress { at: now, bytes });
                    return;
                }
                Err(fault) => {
                    tracing::warn!(%fault, "eviction failed");
                    self.state.is_short.store(true, Ordering::Relaxed);
                    *no_progress = Some(NoProgress { at: now, bytes: 0 });
                    return;
                }
            }
        }
    }

    fn round(&self, shortfall: Shortfall, bytes_min: u64) -> Result<Round, StoreError> {
        self.tracked(|| self.tracked_round(shortfall, bytes_min))
    }

    /// Takes a snapshot and removes content. Content that is needed meanwhile is tracked.
    fn tracked<T>(&self, remove: impl FnOnce() -> T) -> T {
        self.access_times.start_tracking();
        let done = remove();
        self.access_times.stop_tracking();
        done
    }

    fn tracked_round(&self, shortfall: Shortfall, bytes_min: u64) -> Result<Round, StoreError> {
        if shortfall.quota_kind == QuotaKind::Free {
            self.prune_quarantine(EVICTION_MIN_AGE);
        }
        let now = self.access_times.now();
        let protected_since = now
            .checked_sub(EVICTION_MIN_AGE)
            .unwrap_or(SystemTime::UNIX_EPOCH);
        let graph = self.snapshot()?;
        if self.stop.load(Ordering::Relaxed) {
            // The graph is empty, and nothing is removed any more.
            return Ok(Round::Reclaimed);
        }
        let oldest = graph.oldest_tag();
        let longest_idle = oldest.map(|used_at| now.duration_since(used_at).unwrap_or_default());
        *self.state.totals.longest_idle.lock() = longest_idle;
        let plan = plan(graph, shortfall.bytes_target, protected_since);
        if plan.bytes < bytes_min {
            return Ok(Round::TooLittle(plan.bytes));
        }
        let enough = plan.bytes >= shortfall.bytes_min;
        let done = self.execute(&plan, Some(shortfall.quota_kind))?;
        Ok(match (done.is_complete, enough) {
            (false, _) => Round::Conflict,
            (true, true) => Round::Reclaimed,
            // Everything evictable has been removed.
            (true, false) => Round::TooLittle(0),
        })
    }

    /// Reads the graph of all stored images. Content needed after that is tracked by `AccessTimes::mark_needed`.
    pub(super) fn snapshot(&self) -> Result<Graph, StoreError> {
        Graph::read(&Sources {
            fs: self.fs.as_ref(),
            blobs: &self.blobs,
            tags: &self.tags,
            pins: &self.pins,
            access_times: &self.access_times,
            usage: self.usage.read(),
            stop: &self.stop,
        })
    }

    /// Removes quarantined files older than `age`.
    fn prune_quarantine(&self, age: Duration) {
        let folder = Path::new(QUARANTINE_FOLDER);
        let now = self.access_times.now();
        for entry in self.fs.list(folder).unwrap_or_default() {
            let old = entry.modified.and_then(|at| now.duration_since(at).ok());
            if !entry.is_folder && old.is_some_and(|old| old > age) {
                // If this fails, it is tried again the next time.
                let _ = self.fs.remove(&folder.join(&entry.name));
            }
        }
    }

    /// Periodic work, independent of the limits.
    pub(super) fn tidy(&self) {
        self.access_times.write(self.fs.as_ref());
        self.prune_quarantine(QUARANTINE_AGE_MAX);
    }
}

#[cfg(test)]
mod tests;
