//! Counters of stored objects and bytes. A background scan counts once at startup; additions and removals keep the
//! counters current.

use std::convert::Infallible;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;

use super::fs::{Entry, FileSystem};
use super::{quarantine, size_of};

/// Stored objects and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Number of blobs.
    pub blobs: u64,
    /// Size of the blobs in bytes.
    pub blob_bytes: u64,
    /// Number of manifests.
    pub manifests: u64,
    /// Size of the manifests in bytes.
    pub manifest_bytes: u64,
    /// Number of tags.
    pub tags: u64,
    /// Whether the startup scan has counted everything that an earlier process stored.
    pub is_complete: bool,
}

/// Kinds of counted objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContentKind {
    Blob,
    Manifest,
    Tag,
}

/// The folders in scan order.
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

/// Counters that the scan and concurrent changes share. The scan holds a lock while it counts a folder, and a change
/// counts only if its folder has already been scanned. So each file counts once.
#[derive(Default)]
pub(super) struct Counters {
    blobs: Counter,
    manifests: Counter,
    tags: Counter,
    /// Number of additions, removals and rewrites.
    changes: AtomicU64,
    is_complete: AtomicBool,
    /// Number of scanned folders; `u32::MAX` when the scan has finished. Changes hold the read lock.
    counted: RwLock<u32>,
}

impl Counters {
    pub(super) fn read(&self) -> Usage {
        // Read first: counters must not be reported as complete if the scan finished only after they were read.
        // `counted` is not locked, because its lock is kept during disk access.
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

    /// Number of changes to blobs, manifests and tags. A snapshot taken before the last change may be outdated.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Runs `op`, which creates the file `path` of `bytes`. Counts the file if `op` returns that it is new.
    pub(super) fn on_add<E>(
        &self,
        kind: ContentKind,
        path: &Path,
        bytes: u64,
        op: impl FnOnce() -> Result<bool, E>,
    ) -> Result<(), E> {
        let counted = self.counted.read();
        let is_new = op()?;
        self.changes.fetch_add(1, Ordering::Release);
        if is_new && position(kind, path) < *counted {
            let of_kind = self.counter(kind);
            of_kind.count.fetch_add(1, Ordering::Relaxed);
            of_kind.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Runs `op`, which removes the file `path`. `op` returns the size of the file if it existed.
    pub(super) fn on_remove<E>(
        &self,
        kind: ContentKind,
        path: &Path,
        op: impl FnOnce() -> Result<Option<u64>, E>,
    ) -> Result<bool, E> {
        let counted = self.counted.read();
        let Some(bytes) = op()? else { return Ok(false) };
        self.changes.fetch_add(1, Ordering::Release);
        if position(kind, path) < *counted {
            let of_kind = self.counter(kind);
            // Another program may have changed the file's size since it was counted.
            let _ = of_kind
                .count
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
            let _ = of_kind
                .bytes
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |all| {
                    Some(all.saturating_sub(bytes))
                });
        }
        Ok(true)
    }

    /// Moves a corrupt file to the quarantine.
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

/// Position of the folder of `path` in scan order.
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

/// Counts the existing files, folder by folder.
pub(super) fn count_existing(fs: &dyn FileSystem, counters: &Counters, stop: &AtomicBool) {
    for (kind, tree) in TREES {
        for shard in 0..SHARDS {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let folder = Path::new(tree).join(format!("{shard:02x}"));
            let mut counted = counters.counted.write();
            // A folder that cannot be read counts as empty. The counters serve display and eviction only.
            let entries = fs.list(&folder).unwrap_or_default();
            let files = entries.iter().filter(|entry| is_content(entry));
            let (count, bytes) = files.fold((0, 0), |(count, bytes), file| (count + 1, bytes + file.size));
            let of_kind = counters.counter(kind);
            of_kind.count.fetch_add(count, Ordering::Relaxed);
            of_kind.bytes.fetch_add(bytes, Ordering::Relaxed);
            *counted += 1;
        }
    }
    *counters.counted.write() = u32::MAX;
    counters.is_complete.store(true, Ordering::Release);
}

/// Excludes the metadata file beside a manifest.
fn is_content(entry: &Entry) -> bool {
    !entry.is_folder && !entry.name.contains('.')
}
