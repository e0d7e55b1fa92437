//! Invalidations (RFC 9111 §4.4): cached tags and digests that a forwarded write may have changed.
//!
//! An invalidation is durable before its write is forwarded. So neither a crash nor a lost response makes the cache
//! serve overwritten or deleted content as current. It is cleared by the response to the write, or by a later
//! revalidation.
//!
//! Each is a small file, and all are in memory. Only cached tags and digests are invalidated, which bounds their
//! number, as does `INVALIDATIONS_MAX`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use super::checksummed_json::{RECORD_BYTES_MAX, checksum, decode, encode, from_millis, to_millis};
use super::fs::FileSystem;
use super::tags::TagKey;
use super::walk::record_files;
use super::{Store, StoreError, hashed_path, remove_file};
use crate::oci::{AnyDigest, Reference, Repository, Tag};

/// Maximum number of invalidations. A further write is forwarded without one.
const INVALIDATIONS_MAX: usize = 65_536;

const STRIPES: usize = 64;

const TREE: &str = "doubts";

/// Key of an invalidation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InvalidationKey {
    /// The name of the upstream.
    pub upstream: Arc<str>,
    /// The repository at the upstream.
    pub repository: Repository,
    /// The tag, or the digest of a manifest or blob.
    pub reference: Reference,
}

#[derive(Serialize, Deserialize)]
struct Record {
    upstream: String,
    repository: String,
    reference: String,
    since_ms: u64,
}

impl InvalidationKey {
    fn tag_key(&self, tag: &Tag) -> TagKey {
        TagKey {
            upstream: Arc::clone(&self.upstream),
            repository: self.repository.clone(),
            tag: tag.clone(),
        }
    }

    fn path(&self) -> PathBuf {
        let reference = self.reference.to_string();
        hashed_path(TREE, &[&self.upstream, self.repository.as_str(), &reference])
    }

    fn read(file: &[u8]) -> Option<(Self, SystemTime)> {
        let record: Record = decode(file)?;
        let key = Self {
            upstream: record.upstream.into(),
            repository: record.repository.parse().ok()?,
            reference: record.reference.parse().ok()?,
        };
        Some((key, from_millis(record.since_ms)))
    }
}

impl From<&TagKey> for InvalidationKey {
    fn from(key: &TagKey) -> Self {
        Self {
            upstream: Arc::clone(&key.upstream),
            repository: key.repository.clone(),
            reference: Reference::Tag(key.tag.clone()),
        }
    }
}

impl Store {
    /// Invalidates `key`, durably when this returns. `true` if it was not invalidated before.
    pub fn invalidate(&self, key: &InvalidationKey, since: SystemTime) -> Result<bool, StoreError> {
        self.invalidations.add(key, since)
    }

    /// Whether `key` is cached, or may be. Blocks.
    pub fn has_cached(&self, key: &InvalidationKey) -> bool {
        match &key.reference {
            Reference::Tag(tag) => !matches!(self.tag(&key.tag_key(tag)), Ok(None)),
            Reference::Digest(AnyDigest::Supported(digest)) => {
                self.blobs.has(digest) || self.manifests.has(digest)
            }
            Reference::Digest(AnyDigest::Unsupported(_)) => false,
        }
    }

    /// The time since when `key` is invalidated.
    pub fn invalidated_since(&self, key: &InvalidationKey) -> Option<SystemTime> {
        self.invalidations.since(key)
    }

    /// Whether any tag or digest is invalidated.
    pub fn has_invalidations(&self) -> bool {
        self.invalidations.count.load(Ordering::Acquire) > 0
    }

    /// Clears the invalidation if `is_superseded` holds for its time. Serialised with [`Self::invalidate`].
    pub fn clear_invalidation(
        &self,
        key: &InvalidationKey,
        is_superseded: impl FnOnce(SystemTime) -> bool,
    ) -> Result<(), StoreError> {
        self.invalidations.clear(key, is_superseded)
    }

    /// Whether the index may have this tag but cannot be read.
    fn may_be_indexed(&self, key: &InvalidationKey) -> bool {
        match &key.reference {
            Reference::Tag(tag) => self.tags.is_index_unavailable(&key.tag_key(tag)),
            Reference::Digest(_) => false,
        }
    }

    /// Loads the invalidations of earlier processes. Those of content that is no longer cached are removed.
    pub(super) fn load_invalidations(&self) {
        for (key, since) in self.invalidations.read() {
            if self.has_cached(&key) || self.may_be_indexed(&key) {
                self.invalidations.entries.lock().insert(key, since);
            } else if let Err(error) = remove_file(self.invalidations.fs.as_ref(), &key.path()) {
                tracing::debug!(%error, "failed to remove an obsolete invalidation");
            }
        }
        let count = self.invalidations.entries.lock().len();
        self.invalidations.count.store(count, Ordering::Release);
    }
}

pub(super) struct Invalidations {
    fs: Arc<dyn FileSystem>,
    entries: Mutex<HashMap<InvalidationKey, SystemTime>>,
    /// Number of `entries`. Usually 0, which saves the lock.
    count: AtomicUsize,
    /// Held while a file is written or removed. Readers do not take it.
    writers: [Mutex<()>; STRIPES],
}

impl Invalidations {
    pub(super) fn new(fs: &Arc<dyn FileSystem>) -> Self {
        Self {
            fs: Arc::clone(fs),
            entries: Mutex::default(),
            count: AtomicUsize::new(0),
            writers: std::array::from_fn(|_| Mutex::default()),
        }
    }

    fn since(&self, key: &InvalidationKey) -> Option<SystemTime> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.entries.lock().get(key).copied()
    }

    fn add(&self, key: &InvalidationKey, since: SystemTime) -> Result<bool, StoreError> {
        let path = key.path();
        let _writing = self.lock_writer(&path);
        let is_new = {
            let mut entries = self.entries.lock();
            if entries.len() >= INVALIDATIONS_MAX && !entries.contains_key(key) {
                return Err(StoreError::io(
                    "write",
                    path,
                    &std::io::Error::other(format!("{INVALIDATIONS_MAX} invalidations exist already")),
                ));
            }
            let is_new = entries.insert(key.clone(), since).is_none();
            self.count.store(entries.len(), Ordering::Release);
            is_new
        };
        let record = encode(&Record {
            upstream: key.upstream.to_string(),
            repository: key.repository.as_str().to_owned(),
            reference: key.reference.to_string(),
            since_ms: to_millis(since),
        });
        self.fs
            .write_durable(&path, &record)
            .map_err(|error| StoreError::io("write", path, &error))?;
        Ok(is_new)
    }

    fn clear(
        &self,
        key: &InvalidationKey,
        is_superseded: impl FnOnce(SystemTime) -> bool,
    ) -> Result<(), StoreError> {
        if self.since(key).is_none() {
            return Ok(());
        }
        let path = key.path();
        let _writing = self.lock_writer(&path);
        if !self.since(key).is_some_and(is_superseded) {
            return Ok(());
        }
        // The file first: a crash in between leaves a superfluous invalidation, which costs one revalidation.
        remove_file(self.fs.as_ref(), &path)?;
        let mut entries = self.entries.lock();
        entries.remove(key);
        self.count.store(entries.len(), Ordering::Release);
        Ok(())
    }

    fn read(&self) -> Vec<(InvalidationKey, SystemTime)> {
        let mut found = Vec::new();
        for (path, _) in record_files(self.fs.as_ref(), TREE).filter_map(Result::ok) {
            let bytes = self.fs.read_file(&path, RECORD_BYTES_MAX);
            found.extend(bytes.ok().and_then(|bytes| InvalidationKey::read(&bytes)));
            if found.len() >= INVALIDATIONS_MAX {
                break;
            }
        }
        found
    }

    fn lock_writer(&self, path: &Path) -> Option<MutexGuard<'_, ()>> {
        let sum = checksum(path.as_os_str().as_encoded_bytes());
        let stripe = self.writers.get(usize::from(sum.first().copied()?) % STRIPES)?;
        Some(stripe.lock())
    }
}
