//! Blobs: visible only once verified, then immutable.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::access_times::{AccessTimes, ContentId};
pub use super::blob_handle::BlobHandle;
use super::cache_key::{bounded_cache, weighted_cache};
use super::completeness::RemovedDigests;
use super::fs::monitored::DiskHealth;
use super::fs::{FileSystem, FsFile};
use super::index::handle::IndexHandle;
use super::partial::PartialDownloads;
use super::usage::{ContentKind, Counters};
use super::{Settings, Store, StoreError, content_path, remove_file, size_of};
use crate::oci::{Algorithm, Digest, Hasher};

/// A blob of at most this size is kept in memory as a whole. Image configurations are a few KiB.
pub const SMALL_BLOB_BYTES_MAX: u64 = 64 * 1024;

pub(super) const TREE: &str = "blobs";

/// Proof that bytes were hashed and are those of a digest. [`Verified::check`] is the only way to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    digest: Digest,
    size: u64,
}

/// The bytes received are not those asked for. The upstream's fault, or the path's to it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Other content.
    #[error(transparent)]
    Digest(#[from] Box<WrongDigest>),
    /// Another length than was announced.
    #[error("expected {expected} bytes, found {found}")]
    Size {
        /// As announced.
        expected: u64,
        /// As received.
        found: u64,
    },
}

/// Bytes of another digest than expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected the bytes of {expected}, found those of {found}")]
pub struct WrongDigest {
    /// What they were to be.
    pub expected: Digest,
    /// What they are.
    pub found: Digest,
}

impl Verified {
    /// Compares what was hashed, `size` bytes of it, with what was to come.
    pub fn check(
        hasher: Hasher,
        expected: &Digest,
        size: u64,
        expected_size: Option<u64>,
    ) -> Result<Self, Mismatch> {
        if let Some(expected) = expected_size.filter(|expected| *expected != size) {
            return Err(Mismatch::Size {
                expected,
                found: size,
            });
        }
        let found = hasher.finish();
        if found != *expected {
            return Err(Box::new(WrongDigest {
                expected: *expected,
                found,
            })
            .into());
        }
        Ok(Self { digest: found, size })
    }

    /// Of which digest.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// How many bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Store {
    /// The blob, if it is held.
    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobHandle>, StoreError> {
        self.blobs.find(digest)
    }

    /// The blob, if its file is open: from memory alone, so it never blocks. `None` says nothing of the disk.
    pub fn blob_in_memory(&self, digest: &Digest) -> Option<BlobHandle> {
        self.blobs.in_memory(digest)
    }

    /// The whole blob from memory, if it is held and at most [`SMALL_BLOB_BYTES_MAX`] long. Read and verified the first time.
    pub fn small_blob(&self, digest: &Digest) -> Option<Bytes> {
        self.blobs.find_small(digest)
    }

    /// Removes a blob; says whether it was there. Whoever reads it now reads it to its end.
    pub fn remove_blob(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.blobs.remove(digest)
    }

    /// Sets a blob aside that was found to be damaged; it is a miss from now on.
    pub fn quarantine_blob(&self, digest: &Digest) {
        self.blobs.quarantine(digest, "a blob is not what its name says");
    }
}

#[derive(Clone)]
struct ByLength;

impl Weighter<Digest, Bytes> for ByLength {
    fn weight(&self, _: &Digest, bytes: &Bytes) -> u64 {
        bytes.len() as u64 + 256
    }
}

pub(super) struct Blobs {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) partials: PartialDownloads,
    index: Arc<IndexHandle>,
    usage: Arc<Counters>,
    access_times: Arc<AccessTimes>,
    disk_health: DiskHealth,
    open: Cache<Digest, BlobHandle>,
    small: Cache<Digest, Bytes, ByLength>,
    /// Held while a name is looked for and given.
    rename_lock: Mutex<()>,
    removed: Arc<RemovedDigests>,
    /// How many names were taken away: whoever opened a file in between looks once more.
    removals: AtomicU64,
}

impl Blobs {
    pub(super) fn new(
        settings: &Settings,
        fs: &Arc<dyn FileSystem>,
        index: &Arc<IndexHandle>,
        (usage, removed): (&Arc<Counters>, &Arc<RemovedDigests>),
        partials: PartialDownloads,
        access_times: &Arc<AccessTimes>,
        disk_health: &DiskHealth,
    ) -> Self {
        Self {
            fs: Arc::clone(fs),
            partials,
            index: Arc::clone(index),
            usage: Arc::clone(usage),
            access_times: Arc::clone(access_times),
            disk_health: disk_health.clone(),
            open: bounded_cache(settings.open_blobs_max),
            small: weighted_cache(settings.small_blob_cache_bytes_max, 4096, ByLength),
            rename_lock: Mutex::default(),
            removed: Arc::clone(removed),
            removals: AtomicU64::new(0),
        }
    }

    /// The blob, if its file is open and nothing suggests that it cannot be read.
    pub(super) fn in_memory(&self, digest: &Digest) -> Option<BlobHandle> {
        let held = self.open.get(digest)?;
        (!held.is_unreadable() && !self.disk_health.is_failing()).then_some(held)
    }

    /// Whether the blob's file is open.
    pub(super) fn is_open(&self, digest: &Digest) -> bool {
        self.open.peek(digest).is_some()
    }

    /// [`Self::find_small`], where memory is enough to know.
    #[expect(clippy::option_option, reason = "whether it is known, and what is known")]
    pub(super) fn small_in_memory(&self, digest: &Digest) -> Option<Option<Bytes>> {
        if let Some(bytes) = self.small.get(digest) {
            return Some(Some(bytes));
        }
        let open = self.open.peek(digest)?;
        (open.size > SMALL_BLOB_BYTES_MAX).then_some(None)
    }

    pub(super) fn find(&self, digest: &Digest) -> Result<Option<BlobHandle>, StoreError> {
        let path = content_path(TREE, digest);
        if let Some(held) = self.open.get(digest) {
            if held.is_unreadable() {
                self.quarantine(digest, "the disk cannot read a blob");
                return Ok(None);
            }
            // On a failing disk an open file may be past reading: better known before it is promised to anyone.
            if self.disk_health.is_failing()
                && held.size > 0
                && let Err(error) = held.file.read_at(&mut [0], 0)
            {
                self.open.remove(digest);
                return Err(StoreError::io("read", path, &error));
            }
            return Ok(Some(held));
        }
        let removals = self.removals.load(Ordering::SeqCst);
        let file = match self.fs.open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("open", path, &error)),
        };
        let size = file
            .size()
            .map_err(|error| StoreError::io("measure", &path, &error))?;
        if self.known_size(digest).is_some_and(|known| known != size) {
            self.quarantine(digest, "a blob has another size than when it was verified");
            return Ok(None);
        }
        let held = BlobHandle::new(size, file);
        self.open.insert(*digest, held.clone());
        if self.removals.load(Ordering::SeqCst) != removals && size_of(self.fs.as_ref(), &path).is_none() {
            // It can be read to its end, but it is not held: kept open, it would take its place for nothing.
            self.open.remove(digest);
        }
        Ok(Some(held))
    }

    /// Whether the blob is here; not opened for good, so that a look at many pushes nothing out of the open ones.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.open.peek(digest).is_some() || size_of(self.fs.as_ref(), &content_path(TREE, digest)).is_some()
    }

    pub(super) fn find_small(&self, digest: &Digest) -> Option<Bytes> {
        if let Some(bytes) = self.small.get(digest) {
            return Some(bytes);
        }
        // A fault is met again, and told, by whoever then asks for the blob itself.
        let held = self.find(digest).ok()??;
        if held.size > SMALL_BLOB_BYTES_MAX {
            return None;
        }
        let bytes = Bytes::from(held.read_all(SMALL_BLOB_BYTES_MAX).ok()?);
        if Digest::of(digest.algorithm(), &bytes) != *digest {
            self.quarantine(digest, "a blob is not what its name says");
            return None;
        }
        self.small.insert(*digest, bytes.clone());
        Some(bytes)
    }

    /// The size that was verified, if the index still knows.
    fn known_size(&self, digest: &Digest) -> Option<u64> {
        let value = self.index.get(size_key(digest)).ok()??;
        Some(u64::from_be_bytes(value.try_into().ok()?))
    }

    fn remove(&self, digest: &Digest) -> Result<bool, StoreError> {
        let path = content_path(TREE, digest);
        let removed = self
            .usage
            .on_remove(ContentKind::Blob, &path, || remove_file(self.fs.as_ref(), &path));
        self.drop_from_caches(digest);
        removed
    }

    /// Removes a blob if it `is_free` to go, and says how long it was; `None` where it is not.
    pub(super) fn evict(
        &self,
        digest: &Digest,
        is_free: impl FnOnce() -> bool,
    ) -> Result<Option<u64>, StoreError> {
        let _rename_lock = self.rename_lock.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_free() || self.is_in_use(digest) {
            return Ok(None);
        }
        let size = size_of(self.fs.as_ref(), &content_path(TREE, digest)).unwrap_or(0);
        self.remove(digest).map(|_| Some(size))
    }

    /// Whether someone reads it now.
    pub(super) fn is_in_use(&self, digest: &Digest) -> bool {
        // Besides the reader's: the cache's own, and the one just handed out.
        let held = self.open.get(digest);
        held.is_some_and(|held| Arc::strong_count(&held.file) > 2)
    }

    pub(super) fn quarantine(&self, digest: &Digest, why: &str) {
        self.usage.quarantine(
            ContentKind::Blob,
            self.fs.as_ref(),
            &content_path(TREE, digest),
            why,
        );
        self.drop_from_caches(digest);
    }

    /// Gives a verified file the blob's name, unless another was quicker.
    fn link(&self, from: &Path, to: &Path, size: u64) -> Result<(), StoreError> {
        let _rename_lock = self.rename_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.usage.on_add(ContentKind::Blob, to, size, || {
            if size_of(self.fs.as_ref(), to).is_some() {
                return Ok(false);
            }
            let named = self.fs.rename(from, to);
            named
                .map(|()| true)
                .map_err(|error| StoreError::io("name", to, &error))
        })
    }

    /// Makes the verified file at `from` durable and gives it the blob's name. After an error nothing is held.
    pub(super) fn commit(
        &self,
        from: &Path,
        file: &Arc<dyn FsFile>,
        proof: Verified,
    ) -> Result<BlobHandle, StoreError> {
        let digest = proof.digest;
        let path = content_path(TREE, &digest);
        self.access_times.record_arrival(ContentId::Blob(digest));
        if let Some(held) = self.find(&digest)? {
            return Ok(held);
        }
        let written = file
            .size()
            .map_err(|error| StoreError::io("measure", &path, &error))?;
        if written != proof.size {
            return Err(StoreError::Corrupt {
                path: from.to_owned(),
            });
        }
        file.sync()
            .map_err(|error| StoreError::io("make durable", &path, &error))?;
        file.make_read_only()
            .map_err(|error| StoreError::io("seal", &path, &error))?;
        self.index
            .put(size_key(&digest), proof.size.to_be_bytes().to_vec());
        self.link(from, &path, proof.size)?;
        let folder = path.parent().unwrap_or(Path::new(TREE));
        if let Err(error) = self.fs.sync_dir(folder) {
            // The fault to tell is the first one; what could not be removed is found and verified later.
            let _ = self.remove(&digest);
            return Err(StoreError::io("make durable the name of", &path, &error));
        }
        let held = BlobHandle::new(proof.size, Arc::clone(file));
        self.open.insert(digest, held.clone());
        Ok(held)
    }

    fn drop_from_caches(&self, digest: &Digest) {
        self.removals.fetch_add(1, Ordering::SeqCst);
        self.removed.note(digest);
        self.open.remove(digest);
        self.small.remove(digest);
        self.index.remove(size_key(digest));
    }
}

fn size_key(digest: &Digest) -> Vec<u8> {
    let algorithm = match digest.algorithm() {
        Algorithm::Sha256 => b'2',
        Algorithm::Sha512 => b'5',
    };
    let mut key = vec![b'b', algorithm];
    key.extend_from_slice(digest.as_bytes());
    key
}
