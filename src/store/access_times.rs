//! When content was last used, and what time it is.
//!
//! Uses are kept in memory and written in batches, as the times of the files themselves: nothing else has to agree with
//! them, a lost batch costs little (the file's last time holds), and `find -mtime +30` shows what nobody wants.
//!
//! The store reads no clock: the time is the latest that anyone told it.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::checksummed_json::{from_millis, to_millis};
use super::fs::FileSystem;
use super::{Store, blobs, content_path, manifests};
use crate::oci::Digest;

/// Uses remembered between two batches; further ones are not, until those are written.
const PENDING_MAX: usize = 131_072;

/// Something that was used.
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
    /// When this was last given to a client, or arrived; `None` where it is not held.
    pub fn last_access(&self, content: ContentId) -> Option<SystemTime> {
        let modified = self.fs.modified(&content.path()).ok()?;
        Some(self.access_times.last_access(content, modified))
    }

    /// Notes that a client was given this at `now`: it is kept longer than what was not asked for since.
    pub fn touch(&self, content: ContentId, now: SystemTime) {
        self.access_times.record(content, now);
    }
}

#[derive(Default)]
pub(super) struct AccessTimes {
    now_ms: AtomicU64,
    pending: Mutex<HashMap<ContentId, SystemTime>>,
    is_tracking: AtomicBool,
    /// What was used or needed anew while someone watches.
    needed: Mutex<HashSet<Digest>>,
}

impl AccessTimes {
    pub(super) fn new(now: SystemTime) -> Self {
        let access_times = Self::default();
        access_times.set_now(now);
        access_times
    }

    /// The latest time anyone told.
    pub(super) fn now(&self) -> SystemTime {
        from_millis(self.now_ms.load(Ordering::Relaxed))
    }

    pub(super) fn set_now(&self, now: SystemTime) {
        self.now_ms.fetch_max(to_millis(now), Ordering::Relaxed);
    }

    pub(super) fn record(&self, content: ContentId, now: SystemTime) {
        self.set_now(now);
        let mut pending = self.pending();
        if pending.len() < PENDING_MAX || pending.contains_key(&content) {
            pending.insert(content, now);
        }
        drop(pending);
        self.mark_needed([*content.digest()]);
    }

    /// What arrives, even if it was held already, is as young as what is used.
    pub(super) fn record_arrival(&self, content: ContentId) {
        self.record(content, self.now());
    }

    /// Notes that something was used, or that something that was kept leads to it: what was planned without that
    /// knowledge must not be done to it.
    pub(super) fn mark_needed(&self, digests: impl IntoIterator<Item = Digest>) {
        if self.is_tracking.load(Ordering::SeqCst) {
            self.needed().extend(digests);
        }
    }

    /// Begins to remember what is needed, afresh.
    pub(super) fn start_tracking(&self) {
        self.needed().clear();
        self.is_tracking.store(true, Ordering::SeqCst);
    }

    pub(super) fn stop_tracking(&self) {
        self.is_tracking.store(false, Ordering::SeqCst);
        *self.needed() = HashSet::new();
    }

    pub(super) fn was_needed(&self, digest: &Digest) -> bool {
        self.needed().contains(digest)
    }

    /// When it was last used: by what is not yet written, else by the time of its file.
    pub(super) fn last_access(&self, content: ContentId, modified: Option<SystemTime>) -> SystemTime {
        let noted = self.pending().get(&content).copied();
        self.plausible(noted).max(self.plausible(modified))
    }

    /// A time that a file tells. One of the future, from a clock that was set back, says nothing.
    pub(super) fn plausible(&self, told: Option<SystemTime>) -> SystemTime {
        let known = told.unwrap_or(SystemTime::UNIX_EPOCH);
        match known.duration_since(self.now()) {
            Ok(ahead) if ahead > super::evict::EVICTION_MIN_AGE => SystemTime::UNIX_EPOCH,
            _ => known,
        }
    }

    /// Writes what was noted since the last time.
    pub(super) fn write(&self, fs: &dyn FileSystem) {
        let batch = std::mem::take(&mut *self.pending());
        for (content, at) in batch {
            // Gone meanwhile, or not to be written: it counts as used when its file says.
            let _ = fs.set_modified(&content.path(), at);
        }
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<ContentId, SystemTime>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn needed(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.needed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
