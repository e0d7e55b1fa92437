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
const REMEMBERED_MAX: usize = 131_072;

/// Something that was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Used {
    /// A blob.
    Blob(Digest),
    /// A manifest.
    Manifest(Digest),
}

impl Used {
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
    pub fn last_use(&self, used: Used) -> Option<SystemTime> {
        let modified = self.fs.modified(&used.path()).ok()?;
        Some(self.uses.last(used, modified))
    }

    /// Notes that a client was given this at `now`: it is kept longer than what was not asked for since.
    pub fn note_use(&self, used: Used, now: SystemTime) {
        self.uses.note(used, now);
    }
}

#[derive(Default)]
pub(super) struct Uses {
    now_ms: AtomicU64,
    unwritten: Mutex<HashMap<Used, SystemTime>>,
    is_watched: AtomicBool,
    /// What was used or needed anew while someone watches.
    meanwhile: Mutex<HashSet<Digest>>,
}

impl Uses {
    pub(super) fn new(now: SystemTime) -> Self {
        let uses = Self::default();
        uses.tell(now);
        uses
    }

    /// The latest time anyone told.
    pub(super) fn now(&self) -> SystemTime {
        from_millis(self.now_ms.load(Ordering::Relaxed))
    }

    pub(super) fn tell(&self, now: SystemTime) {
        self.now_ms.fetch_max(to_millis(now), Ordering::Relaxed);
    }

    pub(super) fn note(&self, used: Used, now: SystemTime) {
        self.tell(now);
        let mut unwritten = self.unwritten();
        if unwritten.len() < REMEMBERED_MAX || unwritten.contains_key(&used) {
            unwritten.insert(used, now);
        }
        drop(unwritten);
        self.needed([*used.digest()]);
    }

    /// What arrives, even if it was held already, is as young as what is used.
    pub(super) fn note_arrival(&self, used: Used) {
        self.note(used, self.now());
    }

    /// Notes that something was used, or that something that was kept leads to it: what was planned without that
    /// knowledge must not be done to it.
    pub(super) fn needed(&self, digests: impl IntoIterator<Item = Digest>) {
        if self.is_watched.load(Ordering::SeqCst) {
            self.meanwhile().extend(digests);
        }
    }

    /// Begins to remember what is needed, afresh.
    pub(super) fn watch(&self) {
        self.meanwhile().clear();
        self.is_watched.store(true, Ordering::SeqCst);
    }

    pub(super) fn stop_watching(&self) {
        self.is_watched.store(false, Ordering::SeqCst);
        *self.meanwhile() = HashSet::new();
    }

    pub(super) fn was_needed(&self, digest: &Digest) -> bool {
        self.meanwhile().contains(digest)
    }

    /// When it was last used: by what is not yet written, else by the time of its file.
    pub(super) fn last(&self, used: Used, modified: Option<SystemTime>) -> SystemTime {
        let noted = self.unwritten().get(&used).copied();
        self.believed(noted).max(self.believed(modified))
    }

    /// A time that a file tells. One of the future, from a clock that was set back, says nothing.
    pub(super) fn believed(&self, told: Option<SystemTime>) -> SystemTime {
        let known = told.unwrap_or(SystemTime::UNIX_EPOCH);
        match known.duration_since(self.now()) {
            Ok(ahead) if ahead > super::evict::YOUNG => SystemTime::UNIX_EPOCH,
            _ => known,
        }
    }

    /// Writes what was noted since the last time.
    pub(super) fn write(&self, fs: &dyn FileSystem) {
        let batch = std::mem::take(&mut *self.unwritten());
        for (used, at) in batch {
            // Gone meanwhile, or not to be written: it counts as used when its file says.
            let _ = fs.set_modified(&used.path(), at);
        }
    }

    fn unwritten(&self) -> MutexGuard<'_, HashMap<Used, SystemTime>> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn meanwhile(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.meanwhile.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
