//! Blob store. A blob becomes visible only after its digest was verified, and is immutable from then on.

mod quarantine;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokio::time::Instant;

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

/// Largest blob that the in-memory cache stores in full. Image configurations are a few KiB.
pub const SMALL_BLOB_BYTES_MAX: u64 = 64 * 1024;

pub(super) const TREE: &str = "blobs";

/// Proof that content was hashed and matches its digest. [`Verified::check`] is the only constructor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    digest: Digest,
    size: u64,
}

/// The received bytes do not match the request. The upstream, or the network path to it, is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The digest differs.
    #[error(transparent)]
    Digest(#[from] Box<DigestMismatch>),
    /// The length differs from the announced one.
    #[error("expected {expected} bytes, found {found}")]
    Size {
        /// Announced length.
        expected: u64,
        /// Received length.
        found: u64,
    },
}

/// The digest of the content is not the expected one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected digest {expected}, got {found}")]
pub struct DigestMismatch {
    /// Expected digest.
    pub expected: Digest,
    /// Digest of the content.
    pub found: Digest,
}

impl Verified {
    /// Compares the hash and the length of the content, `size` bytes, with the expected ones.
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
            return Err(Box::new(DigestMismatch {
                expected: *expected,
                found,
            })
            .into());
        }
        Ok(Self { digest: found, size })
    }

    /// The verified digest.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The verified length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Store {
    /// Opens the blob if it is stored.
    pub fn blob(&self, digest: &Digest) -> Result<Option<BlobHandle>, StoreError> {
        self.blobs.find(digest)
    }

    /// Returns the blob if its file is already open. Reads memory alone, so it never blocks. `None` does not mean
    /// that the disk lacks the blob.
    pub fn blob_in_memory(&self, digest: &Digest) -> Option<BlobHandle> {
        self.blobs.in_memory(digest)
    }

    /// Returns the content of a stored blob of at most [`SMALL_BLOB_BYTES_MAX`] bytes from memory. The first call
    /// reads and verifies it.
    pub fn small_blob(&self, digest: &Digest) -> Option<Bytes> {
        self.blobs.find_small(digest)
    }

    /// Removes a blob. Returns whether it was stored. Current readers can still read it to its end.
    pub fn remove_blob(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.blobs.remove(digest)
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
    /// Serializes the check for an existing blob, the rename to its name, and removals.
    rename_lock: Mutex<()>,
    removed: Arc<RemovedDigests>,
    /// Count of removals. A caller that opened a file meanwhile checks again whether the blob still exists.
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

    /// Returns the blob if its file is open and no read or disk error is known.
    pub(super) fn in_memory(&self, digest: &Digest) -> Option<BlobHandle> {
        let blob = self.open.get(digest)?;
        (!blob.is_unreadable() && !self.disk_health.is_failing()).then_some(blob)
    }

    /// Returns whether the blob's file is open.
    pub(super) fn is_open(&self, digest: &Digest) -> bool {
        self.open.peek(digest).is_some()
    }

    /// [`Self::find_small`] without disk access. The outer `None` means that memory does not hold the result.
    #[expect(
        clippy::option_option,
        reason = "outer: whether memory knows; inner: the content"
    )]
    pub(super) fn small_in_memory(&self, digest: &Digest) -> Option<Option<Bytes>> {
        if let Some(bytes) = self.small.get(digest) {
            return Some(Some(bytes));
        }
        let open = self.open.peek(digest)?;
        (open.size > SMALL_BLOB_BYTES_MAX).then_some(None)
    }

    pub(super) fn find(&self, digest: &Digest) -> Result<Option<BlobHandle>, StoreError> {
        let path = content_path(TREE, digest);
        if let Some(blob) = self.open.get(digest) {
            if blob.is_unreadable() {
                self.quarantine(digest, "failed to read a blob from disk");
                return Ok(None);
            }
            // On a failing disk an open file may be unreadable. Test it before the caller promises the blob to a
            // client.
            if self.disk_health.is_failing()
                && blob.size > 0
                && let Err(error) = blob.file.read_at(&mut [0], 0)
            {
                self.open.remove(digest);
                return Err(StoreError::io("read", path, &error));
            }
            return Ok(Some(blob));
        }
        let removals = self.removals.load(Ordering::SeqCst);
        let file = match self.fs.open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("open", path, &error)),
        };
        let size = file
            .size()
            .map_err(|error| StoreError::io("get the size of", &path, &error))?;
        if self.known_size(digest).is_some_and(|known| known != size) {
            self.quarantine(digest, "blob size differs from the verified size");
            return Ok(None);
        }
        let blob = BlobHandle::found(size, file);
        self.open.insert(*digest, blob.clone());
        if self.removals.load(Ordering::SeqCst) != removals && size_of(self.fs.as_ref(), &path).is_none() {
            // The blob was removed meanwhile. The caller can still read it, but the cache must not keep its file
            // open.
            self.open.remove(digest);
        }
        Ok(Some(blob))
    }

    /// Returns whether the blob is stored. Does not add the file to the cache of open files, so a scan of many blobs
    /// evicts no entry from it.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.open.peek(digest).is_some() || size_of(self.fs.as_ref(), &content_path(TREE, digest)).is_some()
    }

    pub(super) fn find_small(&self, digest: &Digest) -> Option<Bytes> {
        if let Some(bytes) = self.small.get(digest) {
            return Some(bytes);
        }
        // On an error, the caller opens the blob itself next and reports the error then.
        let blob = self.find(digest).ok()??;
        if blob.size > SMALL_BLOB_BYTES_MAX {
            return None;
        }
        let bytes = Bytes::from(blob.read_all(SMALL_BLOB_BYTES_MAX).ok()?);
        if Digest::of(digest.algorithm(), &bytes) != *digest {
            self.quarantine_damaged(digest);
            return None;
        }
        self.small.insert(*digest, bytes.clone());
        Some(bytes)
    }

    /// The verified size, if the index still has it.
    fn known_size(&self, digest: &Digest) -> Option<u64> {
        let value = self.index.get(size_key(digest)).ok()??;
        Some(u64::from_be_bytes(value.try_into().ok()?))
    }

    fn remove(&self, digest: &Digest) -> Result<bool, StoreError> {
        let _rename_lock = self.rename_lock.lock();
        self.remove_locked(digest)
    }

    fn remove_locked(&self, digest: &Digest) -> Result<bool, StoreError> {
        let path = content_path(TREE, digest);
        let removed = self
            .usage
            .on_remove(ContentKind::Blob, &path, || remove_file(self.fs.as_ref(), &path));
        self.drop_from_caches(digest);
        removed
    }

    /// Removes a blob if `is_free` returns true. Returns its size, or `None` if it was not removed.
    pub(super) fn evict(
        &self,
        digest: &Digest,
        is_free: impl FnOnce() -> bool,
    ) -> Result<Option<u64>, StoreError> {
        let _rename_lock = self.rename_lock.lock();
        if !is_free() {
            return Ok(None);
        }
        let size = size_of(self.fs.as_ref(), &content_path(TREE, digest)).unwrap_or(0);
        self.remove_locked(digest).map(|_| Some(size))
    }

    /// Returns whether a reader has the blob open.
    pub(super) fn is_in_use(&self, digest: &Digest) -> bool {
        // Two references are not a reader's: the one in the cache and the clone returned above.
        let blob = self.open.get(digest);
        blob.is_some_and(|blob| Arc::strong_count(&blob.file) > 2)
    }

    /// Renames a verified file to the blob's name, unless the blob exists already.
    fn link(&self, from: &Path, to: &Path, size: u64) -> Result<(), StoreError> {
        let _rename_lock = self.rename_lock.lock();
        self.usage.on_add(ContentKind::Blob, to, size, || {
            if size_of(self.fs.as_ref(), to).is_some() {
                return Ok(false);
            }
            let named = self.fs.rename(from, to);
            named
                .map(|()| true)
                .map_err(|error| StoreError::io("rename a file to", to, &error))
        })
    }

    /// Fsyncs the verified file at `from` and renames it to the blob's name. After an error the blob is not stored.
    pub(super) fn commit(
        &self,
        from: &Path,
        file: &Arc<dyn FsFile>,
        proof: Verified,
    ) -> Result<BlobHandle, StoreError> {
        let digest = proof.digest;
        let path = content_path(TREE, &digest);
        self.access_times.record_arrival(ContentId::Blob(digest));
        if let Some(blob) = self.find(&digest)? {
            return Ok(blob);
        }
        let written = file
            .size()
            .map_err(|error| StoreError::io("get the size of", &path, &error))?;
        if written != proof.size {
            return Err(StoreError::Corrupt {
                path: from.to_owned(),
            });
        }
        file.sync()
            .map_err(|error| StoreError::io("fsync", &path, &error))?;
        file.make_read_only()
            .map_err(|error| StoreError::io("make read-only", &path, &error))?;
        self.index
            .put(size_key(&digest), proof.size.to_be_bytes().to_vec());
        self.link(from, &path, proof.size)?;
        let folder = path.parent().unwrap_or(Path::new(TREE));
        if let Err(error) = self.fs.sync_dir(folder) {
            // The first error is the one to report. A file that could not be removed is found and verified later.
            let _ = self.remove(&digest);
            return Err(StoreError::io("fsync the folder of", &path, &error));
        }
        let blob = BlobHandle::written(proof.size, Arc::clone(file), Instant::now());
        self.open.insert(digest, blob.clone());
        Ok(blob)
    }

    fn drop_from_caches(&self, digest: &Digest) {
        self.removals.fetch_add(1, Ordering::SeqCst);
        self.removed.record(digest);
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
