//! Access times of blobs and manifests, and the store's time.
//!
//! Accesses are recorded in memory and written in batches as the modification times of the files. Nothing else
//! depends on these times. A lost batch costs little, because the older time of the file remains. `find -mtime +30`
//! lists content that has not been used for 30 days.
//!
//! The store never reads the clock. A periodic caller sets its time, also back. Between its calls, the latest time that
//! an access had counts.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard};

use super::checksummed_json::{from_millis, to_millis};
use super::fs::FileSystem;
use super::{Store, blobs, content_path, manifests};
use crate::oci::Digest;

/// Most accesses recorded between two batches. Further ones are dropped until the batch is written.
const PENDING_MAX: usize = 131_072;

/// A clock that goes back by less was not set: a request may have read it after the periodic caller.
const CLOCK_STEP_MS_MIN: u64 = 1000;

/// Identifies stored content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ContentId {
    /// A blob.
    Blob(Digest),
    /// A manifest.
    Manifest(Digest),
}

impl ContentId {
    fn digest(&self) -> &Digest {
        match self {
            Self::Blob(digest) | Self::Manifest(digest) => digest,
        }
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Blob(digest) => content_path(blobs::TREE, digest),
            Self::Manifest(digest) => content_path(manifests::TREE, digest),
        }
    }
}

impl Store {
    /// When a client last read this, or when it was stored. `None` if it is not stored.
    pub fn last_access(&self, content: ContentId) -> Option<SystemTime> {
        let modified = self.fs.modified(&content.path()).ok()?;
        Some(self.access_times.last_access(content, modified))
    }

    /// Whether this is stored.
    pub fn is_stored(&self, content: ContentId) -> bool {
        match content {
            ContentId::Blob(digest) => self.blobs.has(&digest),
            ContentId::Manifest(digest) => self.manifests.has(&digest),
        }
    }

    /// Records that a client read this at `now`. Least recently used content is evicted first.
    pub fn touch(&self, content: ContentId, now: SystemTime) {
        self.access_times.record(content, now);
    }

    /// The time of the store.
    pub fn now(&self) -> SystemTime {
        self.access_times.now()
    }
}

#[derive(Default)]
pub(super) struct AccessTimes {
    now_ms: AtomicU64,
    pending: Mutex<HashMap<ContentId, SystemTime>>,
    is_tracking: AtomicBool,
    /// Content used or referenced since tracking started.
    needed: Mutex<HashSet<Digest>>,
    removing: Mutex<()>,
}

impl AccessTimes {
    pub(super) fn new(now: SystemTime) -> Self {
        let access_times = Self::default();
        access_times.set_now(now);
        access_times
    }

    /// The time of the store.
    pub(super) fn now(&self) -> SystemTime {
        from_millis(self.now_ms.load(Ordering::Relaxed))
    }

    /// Sets the time. If the clock was set back, recorded accesses count as made now: they would count as unknown
    /// otherwise, and content in use would be evicted first.
    pub(super) fn set_now(&self, now: SystemTime) {
        let before = self.now_ms.swap(to_millis(now), Ordering::Relaxed);
        if to_millis(now).saturating_add(CLOCK_STEP_MS_MIN) < before {
            for accessed_at in self.pending.lock().values_mut() {
                *accessed_at = now.min(*accessed_at);
            }
        }
    }

    pub(super) fn record(&self, content: ContentId, now: SystemTime) {
        self.now_ms.fetch_max(to_millis(now), Ordering::Relaxed);
        let mut pending = self.pending.lock();
        if pending.len() < PENDING_MAX || pending.contains_key(&content) {
            pending.insert(content, now);
        }
        drop(pending);
        self.mark_needed([*content.digest()]);
    }

    /// Sets the last access of content to `used_at`, even if its storage at `stored_at` was later. Of an access after that,
    /// or any access if `stored_at` is `None`, and `used_at` the later counts.
    pub(super) fn put_back(
        &self,
        fs: &dyn FileSystem,
        content: ContentId,
        (stored_at, used_at): (Option<SystemTime>, SystemTime),
    ) {
        let modified = fs.modified(&content.path()).ok().flatten();
        let mut pending = self.pending.lock();
        let recorded = pending.get(&content).copied();
        let accessed_at = self.plausible(recorded).max(self.plausible(modified));
        if accessed_at >= used_at && stored_at.is_none_or(|stored_at| accessed_at > stored_at) {
            return;
        }
        pending.insert(content, used_at);
        // An access that is recorded now counts, because the later of the two times does.
        drop(pending);
        // If this fails, the next batch writes it.
        let _ = fs.set_modified(&content.path(), used_at);
    }

    /// Stored content counts as used now, even if it was stored before.
    pub(super) fn record_arrival(&self, content: ContentId) {
        self.record(content, self.now());
    }

    /// Records that content was used or that a stored manifest or tag now references it. An eviction planned without
    /// this knowledge must not remove it.
    pub(super) fn mark_needed(&self, digests: impl IntoIterator<Item = Digest>) {
        if self.is_tracking.load(Ordering::SeqCst) {
            self.needed.lock().extend(digests);
        }
    }

    /// [`Self::mark_needed`] for content that was just written. Waits for a running removal, so content that is stored
    /// afterwards is not removed.
    pub(super) fn mark_needed_and_wait(&self, digests: impl IntoIterator<Item = Digest>) {
        self.mark_needed(digests);
        drop(self.removing());
    }

    /// Held by an eviction from the decision to remove something until it is removed.
    pub(super) fn removing(&self) -> MutexGuard<'_, ()> {
        self.removing.lock()
    }

    /// Starts to track needed content, with an empty set.
    pub(super) fn start_tracking(&self) {
        self.needed.lock().clear();
        self.is_tracking.store(true, Ordering::SeqCst);
    }

    pub(super) fn stop_tracking(&self) {
        self.is_tracking.store(false, Ordering::SeqCst);
        *self.needed.lock() = HashSet::new();
    }

    pub(super) fn was_needed(&self, digest: &Digest) -> bool {
        self.needed.lock().contains(digest)
    }

    /// The last access: the recorded one, or the time of the file if that is later.
    pub(super) fn last_access(&self, content: ContentId, modified: Option<SystemTime>) -> SystemTime {
        let pending = self.pending.lock().get(&content).copied();
        self.plausible(pending).max(self.plausible(modified))
    }

    /// Checks a recorded time against the store's time. A time in the future comes from a clock that was set back;
    /// it counts as unknown.
    pub(super) fn plausible(&self, recorded: Option<SystemTime>) -> SystemTime {
        let time = recorded.unwrap_or(SystemTime::UNIX_EPOCH);
        match time.duration_since(self.now()) {
            Ok(ahead) if ahead > super::evict::EVICTION_MIN_AGE => SystemTime::UNIX_EPOCH,
            _ => time,
        }
    }

    /// Writes the accesses recorded since the last batch.
    pub(super) fn write(&self, fs: &dyn FileSystem) {
        let batch = std::mem::take(&mut *self.pending.lock());
        for (content, at) in batch {
            // If the file is gone or read-only, the time it has remains.
            let _ = fs.set_modified(&content.path(), at);
        }
    }
}
