//! How much is held: counted once in the background, and kept up to date by those who add and remove.

use std::convert::Infallible;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use super::fs::{Entry, FileSystem};
use super::{quarantine, size_of};

/// How much is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blobs held.
    pub blobs: u64,
    /// Their size.
    pub blob_bytes: u64,
    /// Manifests held.
    pub manifests: u64,
    /// Their size.
    pub manifest_bytes: u64,
    /// Tags known.
    pub tags: u64,
    /// Whether what an earlier process left has been counted in full.
    pub is_complete: bool,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContentKind {
    Blob,
    Manifest,
    Tag,
}

/// The trees in the order in which they are counted.
const TREES: [(ContentKind, &str); 5] = [
    (ContentKind::Blob, "blobs/sha256"),
    (ContentKind::Blob, "blobs/sha512"),
    (ContentKind::Manifest, "manifests/sha256"),
    (ContentKind::Manifest, "manifests/sha512"),
    (ContentKind::Tag, "refs"),
];

const SHARDS: u32 = 256;

#[derive(Default)]
struct Counter {
    count: AtomicU64,
    bytes: AtomicU64,
}

/// The counts. A folder is counted while no file comes or goes, and a file that comes or goes counts by itself only
/// where its folder has been counted already: so each counts once.
#[derive(Default)]
pub(super) struct Counters {
    blobs: Counter,
    manifests: Counter,
    tags: Counter,
    /// How often something came, went or was written anew.
    changes: AtomicU64,
    is_complete: AtomicBool,
    /// How many folders have been counted; `u32::MAX` at the end. Held while files come and go.
    counted: RwLock<u32>,
}

impl Counters {
    pub(super) fn read(&self) -> Usage {
        // First: what is not yet complete must not be called so a moment later. No lock: `counted` is held over the disk.
        let is_complete = self.is_complete.load(Ordering::Acquire);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Usage {
            blobs: read(&self.blobs.count),
            blob_bytes: read(&self.blobs.bytes),
            manifests: read(&self.manifests.count),
            manifest_bytes: read(&self.manifests.bytes),
            tags: read(&self.tags.count),
            is_complete,
        }
    }

    /// How often a blob, a manifest or what a tag names came, went or changed. What was seen before the last time may be
    /// outdated.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Does `op`, which gives the file `path` of `bytes` its name; counts it if `op` says that it is new.
    pub(super) fn on_add<E>(
        &self,
        kind: ContentKind,
        path: &Path,
        bytes: u64,
        op: impl FnOnce() -> Result<bool, E>,
    ) -> Result<(), E> {
        let counted = self.counted.read().unwrap_or_else(PoisonError::into_inner);
        let is_new = op()?;
        self.changes.fetch_add(1, Ordering::Release);
        if is_new && position(kind, path) < *counted {
            let counter = self.counter(kind);
            counter.count.fetch_add(1, Ordering::Relaxed);
            counter.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Does `op`, which takes the file `path` away; `op` says how many bytes it had, if it was there.
    pub(super) fn on_remove<E>(
        &self,
        kind: ContentKind,
        path: &Path,
        op: impl FnOnce() -> Result<Option<u64>, E>,
    ) -> Result<bool, E> {
        let counted = self.counted.read().unwrap_or_else(PoisonError::into_inner);
        let Some(bytes) = op()? else { return Ok(false) };
        self.changes.fetch_add(1, Ordering::Release);
        if position(kind, path) < *counted {
            let counter = self.counter(kind);
            // A file that was changed behind our back is as long as it is, not as long as it was counted.
            let _ = counter
                .count
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
            let _ = counter
                .bytes
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |all| {
                    Some(all.saturating_sub(bytes))
                });
        }
        Ok(true)
    }

    /// Sets a damaged file aside.
    pub(super) fn quarantine(&self, kind: ContentKind, fs: &dyn FileSystem, path: &Path, why: &str) {
        let moved = self.on_remove(kind, path, || -> Result<_, Infallible> {
            let size = size_of(fs, path);
            Ok(quarantine(fs, path, why).then(|| size.unwrap_or(0)))
        });
        match moved {
            Ok(_) => {}
        }
    }

    fn counter(&self, kind: ContentKind) -> &Counter {
        match kind {
            ContentKind::Blob => &self.blobs,
            ContentKind::Manifest => &self.manifests,
            ContentKind::Tag => &self.tags,
        }
    }
}

/// Where the folder of `path` comes in the order of counting.
fn position(kind: ContentKind, path: &Path) -> u32 {
    let folder = path.parent().unwrap_or(Path::new(""));
    let shard = folder
        .file_name()
        .and_then(|name| u32::from_str_radix(name.to_str()?, 16).ok())
        .unwrap_or(0);
    let tree = folder.parent().unwrap_or(Path::new(""));
    let tree = TREES
        .iter()
        .position(|(known, name)| *known == kind && tree == Path::new(name))
        .unwrap_or(0);
    u32::try_from(tree).unwrap_or(0) * SHARDS + shard
}

/// Counts what is there already, folder by folder.
pub(super) fn count_existing(fs: &dyn FileSystem, counters: &Counters, stop: &AtomicBool) {
    for (kind, tree) in TREES {
        for shard in 0..SHARDS {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let folder = Path::new(tree).join(format!("{shard:02x}"));
            let mut counted = counters.counted.write().unwrap_or_else(PoisonError::into_inner);
            // A folder that cannot be read counts as empty: the counts are for the eye and for eviction.
            let entries = fs.list(&folder).unwrap_or_default();
            let files = entries.iter().filter(|entry| is_content(entry));
            let (count, bytes) = files.fold((0, 0), |(count, bytes), file| (count + 1, bytes + file.size));
            let counter = counters.counter(kind);
            counter.count.fetch_add(count, Ordering::Relaxed);
            counter.bytes.fetch_add(bytes, Ordering::Relaxed);
            *counted += 1;
        }
    }
    *counters.counted.write().unwrap_or_else(PoisonError::into_inner) = u32::MAX;
    counters.is_complete.store(true, Ordering::Release);
}

/// Not the record beside a manifest.
fn is_content(entry: &Entry) -> bool {
    !entry.is_folder && !entry.name.contains('.')
}
