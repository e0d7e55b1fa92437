//! Manifests: their exact bytes, and beside them the media type and the repositories they were seen in.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};

use super::access_times::{AccessTimes, ContentId};
use super::blobs::WrongDigest;
use super::cache_key::weighted_cache;
use super::checksummed_json::{RECORD_BYTES_MAX, decode, encode};
use super::completeness::RemovedDigests;
use super::fs::FileSystem;
use super::usage::{ContentKind, Counters};
use super::{Settings, Store, StoreError, content_path, remove_file, size_of};
use crate::oci::manifest::{MANIFEST_BYTES_MAX, ManifestKind};
use crate::oci::{AnyDigest, Digest, Manifest, MediaType, Repository};

/// How many repositories a manifest's record names; the oldest go first.
pub const SOURCES_MAX: usize = 256;

pub(super) const TREE: &str = "manifests";

/// Writers of records that share a lock do so by the digest's first byte.
const STRIPES: usize = 16;

/// A manifest with all that is needed to serve it.
#[derive(Clone, Debug)]
pub struct StoredManifest {
    /// Of exactly these bytes.
    pub digest: Digest,
    /// As the upstream sent them.
    pub bytes: Bytes,
    /// As the upstream named it.
    pub media_type: MediaType,
    /// What it refers to.
    pub manifest: Manifest,
}

impl StoredManifest {
    /// Reads and verifies: the bytes must be those of `digest`, and a manifest.
    pub fn verify(bytes: Bytes, media_type: MediaType, digest: Digest) -> Result<Self, StoreError> {
        let manifest = read(&bytes, digest)?;
        Ok(Self {
            digest,
            bytes,
            media_type,
            manifest,
        })
    }
}

fn read(bytes: &Bytes, digest: Digest) -> Result<Manifest, StoreError> {
    let found = Digest::of(digest.algorithm(), bytes);
    if found != digest {
        return Err(Box::new(WrongDigest {
            expected: digest,
            found,
        })
        .into());
    }
    Manifest::read(bytes).map_err(|error| StoreError::NotAManifest {
        digest,
        reason: error.to_string(),
    })
}

/// The record beside a manifest.
#[derive(Serialize, Deserialize)]
struct ManifestMetadata {
    media_type: String,
    #[serde(rename = "seen_in")]
    sources: Vec<SourceRepository>,
}

#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct SourceRepository {
    upstream: String,
    repository: String,
}

impl Store {
    /// The manifest, if it is held: verified when it comes from the disk, ready when it comes from memory.
    pub fn manifest(&self, digest: &Digest) -> Result<Option<Arc<StoredManifest>>, StoreError> {
        self.manifests.find(digest)
    }

    /// Keeps a manifest that `upstream` has in `repository`. One that is held already keeps its media type.
    pub fn put_manifest(
        &self,
        bytes: Bytes,
        media_type: MediaType,
        digest: Digest,
        upstream: &str,
        repository: &Repository,
    ) -> Result<Arc<StoredManifest>, StoreError> {
        let source = SourceRepository {
            upstream: upstream.to_owned(),
            repository: repository.as_str().to_owned(),
        };
        self.manifests
            .put(StoredManifest::verify(bytes, media_type, digest)?, source)
    }

    /// Removes a manifest; says whether it was there.
    pub fn remove_manifest(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.manifests.remove(digest)
    }
}

#[derive(Clone)]
struct ByLength;

impl Weighter<Digest, Arc<StoredManifest>> for ByLength {
    /// The bytes, and about as much for what was read from them.
    fn weight(&self, _: &Digest, held: &Arc<StoredManifest>) -> u64 {
        held.bytes.len() as u64 + 192 * held.manifest.descriptors.len() as u64 + 512
    }
}

pub(super) struct Manifests {
    fs: Arc<dyn FileSystem>,
    usage: Arc<Counters>,
    access_times: Arc<AccessTimes>,
    ready: Cache<Digest, Arc<StoredManifest>, ByLength>,
    writers: [Mutex<()>; STRIPES],
    removed: Arc<RemovedDigests>,
}

impl Manifests {
    pub(super) fn new(
        settings: &Settings,
        fs: &Arc<dyn FileSystem>,
        usage: &Arc<Counters>,
        access_times: &Arc<AccessTimes>,
        removed: &Arc<RemovedDigests>,
    ) -> Self {
        Self {
            fs: Arc::clone(fs),
            usage: Arc::clone(usage),
            access_times: Arc::clone(access_times),
            ready: weighted_cache(settings.manifest_cache_bytes_max, 4096, ByLength),
            writers: std::array::from_fn(|_| Mutex::default()),
            removed: Arc::clone(removed),
        }
    }

    /// The manifest, if it is in memory.
    pub(super) fn ready(&self, digest: &Digest) -> Option<Arc<StoredManifest>> {
        self.ready.get(digest)
    }

    pub(super) fn find(&self, digest: &Digest) -> Result<Option<Arc<StoredManifest>>, StoreError> {
        if let Some(held) = self.ready.get(digest) {
            return Ok(Some(held));
        }
        let path = content_path(TREE, digest);
        let bytes = match self.fs.read_file(&path, MANIFEST_BYTES_MAX as u64) {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Bytes::new(),
            Err(error) => return Err(StoreError::io("read", path, &error)),
        };
        let Ok(manifest) = read(&bytes, *digest) else {
            self.quarantine(digest, "a manifest is not what its name says");
            return Ok(None);
        };
        let stored = self
            .metadata(digest)
            .and_then(|metadata| metadata.media_type.parse().ok());
        let is_stored = stored.is_some();
        let Some(media_type) = stored.or_else(|| media_type(&manifest)) else {
            self.quarantine(digest, "the media type of a manifest is lost");
            return Ok(None);
        };
        if !is_stored {
            self.repair_metadata(digest, &media_type);
        }
        let held = Arc::new(StoredManifest {
            digest: *digest,
            bytes,
            media_type,
            manifest,
        });
        self.ready.insert(*digest, Arc::clone(&held));
        Ok(Some(held))
    }

    /// Whether the manifest is here.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.ready.peek(digest).is_some() || size_of(self.fs.as_ref(), &content_path(TREE, digest)).is_some()
    }

    /// Writes a record anew that was lost or damaged. Where a writer is at it, or the disk refuses, that is left for later.
    fn repair_metadata(&self, digest: &Digest, media_type: &MediaType) {
        let Some(Ok(_writing)) = self.stripe(digest).map(Mutex::try_lock) else {
            return;
        };
        // Not beside a manifest that was removed meanwhile.
        if size_of(self.fs.as_ref(), &content_path(TREE, digest)).is_some() {
            tracing::warn!(%digest, "the record beside a manifest was lost or damaged; it is written anew");
            let media_type = media_type.as_str().to_owned();
            let metadata = ManifestMetadata {
                media_type,
                sources: Vec::new(),
            };
            let _ = self.write_metadata(digest, &metadata);
        }
    }

    fn metadata(&self, digest: &Digest) -> Option<ManifestMetadata> {
        decode(&self.fs.read_file(&metadata_path(digest), RECORD_BYTES_MAX).ok()?)
    }

    fn put(
        &self,
        checked: StoredManifest,
        source: SourceRepository,
    ) -> Result<Arc<StoredManifest>, StoreError> {
        let digest = checked.digest;
        let children = checked.manifest.descriptors.iter();
        let children = children.filter_map(|child| match &child.digest {
            AnyDigest::Supported(child) => Some(*child),
            AnyDigest::Unsupported(_) => None,
        });
        let children: Vec<Digest> = children.collect();
        self.access_times.record_arrival(ContentId::Manifest(digest));
        self.access_times.mark_needed(children.iter().copied());
        let written = self.write(checked, source);
        // An eviction that began since the first note, and listed the manifests before the write, knows of neither.
        self.access_times.mark_needed(children);
        written
    }

    fn write(
        &self,
        checked: StoredManifest,
        source: SourceRepository,
    ) -> Result<Arc<StoredManifest>, StoreError> {
        let digest = checked.digest;
        let _writing = self.lock_writer(&digest);
        let path = content_path(TREE, &digest);
        // In memory it may outlive its file by a moment.
        let is_on_disk = size_of(self.fs.as_ref(), &path).is_some();
        if let Some(held) = self.find(&digest)?.filter(|_| is_on_disk) {
            self.add_source(&held, source)?;
            return Ok(held);
        }
        let size = checked.bytes.len() as u64;
        let written = self.usage.on_add(ContentKind::Manifest, &path, size, || {
            self.fs.write_atomic(&path, &checked.bytes).map(|()| true)
        });
        written.map_err(|error| StoreError::io("write", &path, &error))?;
        let metadata = ManifestMetadata {
            media_type: checked.media_type.as_str().to_owned(),
            sources: vec![source],
        };
        self.write_metadata(&digest, &metadata)?;
        let held = Arc::new(checked);
        self.ready.insert(digest, Arc::clone(&held));
        Ok(held)
    }

    fn add_source(&self, held: &StoredManifest, source: SourceRepository) -> Result<(), StoreError> {
        let stored = self.metadata(&held.digest);
        let is_complete = stored.is_some();
        let mut metadata = stored.unwrap_or_else(|| ManifestMetadata {
            media_type: held.media_type.as_str().to_owned(),
            sources: Vec::new(),
        });
        if is_complete && metadata.sources.contains(&source) {
            return Ok(());
        }
        metadata.sources.push(source);
        let surplus = metadata.sources.len().saturating_sub(SOURCES_MAX);
        metadata.sources.drain(..surplus);
        self.write_metadata(&held.digest, &metadata)
    }

    /// Makes the folder durable too, and with it the name of the manifest.
    fn write_metadata(&self, digest: &Digest, metadata: &ManifestMetadata) -> Result<(), StoreError> {
        let path = metadata_path(digest);
        let written = self.fs.write_durable(&path, &encode(metadata));
        written.map_err(|error| StoreError::io("write", path, &error))
    }

    fn remove(&self, digest: &Digest) -> Result<bool, StoreError> {
        let _writing = self.lock_writer(digest);
        self.remove_locked(digest)
    }

    /// Removes a manifest if it `is_free` to go, and says how long it was; `None` where it is not.
    pub(super) fn evict(
        &self,
        digest: &Digest,
        is_free: impl FnOnce() -> bool,
    ) -> Result<Option<u64>, StoreError> {
        let _writing = self.lock_writer(digest);
        if !is_free() {
            return Ok(None);
        }
        let size = size_of(self.fs.as_ref(), &content_path(TREE, digest)).unwrap_or(0);
        self.remove_locked(digest).map(|_| Some(size))
    }

    /// Writers of one manifest and its record come one after the other.
    fn lock_writer(&self, digest: &Digest) -> Option<MutexGuard<'_, ()>> {
        let stripe = self.stripe(digest)?;
        Some(stripe.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn stripe(&self, digest: &Digest) -> Option<&Mutex<()>> {
        let stripe = digest.as_bytes().first().copied().unwrap_or_default();
        self.writers.get(usize::from(stripe) % STRIPES)
    }

    fn remove_locked(&self, digest: &Digest) -> Result<bool, StoreError> {
        let path = content_path(TREE, digest);
        let was_there = self.usage.on_remove(ContentKind::Manifest, &path, || {
            remove_file(self.fs.as_ref(), &path)
        })?;
        // After the file, so that nobody reads it into memory in between; who was quicker is told by `keep`.
        self.ready.remove(digest);
        self.removed.note(digest);
        // Without its manifest the record says nothing.
        let _ = self.fs.remove(&metadata_path(digest));
        Ok(was_there)
    }

    pub(super) fn quarantine(&self, digest: &Digest, why: &str) {
        self.ready.remove(digest);
        self.usage.quarantine(
            ContentKind::Manifest,
            self.fs.as_ref(),
            &content_path(TREE, digest),
            why,
        );
        self.removed.note(digest);
    }
}

/// Where its record is lost: what a manifest says of itself or looks like.
fn media_type(manifest: &Manifest) -> Option<MediaType> {
    manifest.media_type.clone().or_else(|| {
        let like = match manifest.kind {
            ManifestKind::Index => "application/vnd.oci.image.index.v1+json",
            ManifestKind::Image => "application/vnd.oci.image.manifest.v1+json",
            ManifestKind::Other => return None,
        };
        like.parse().ok()
    })
}

fn metadata_path(digest: &Digest) -> PathBuf {
    let path = content_path(TREE, digest);
    let folder = path.parent().unwrap_or(Path::new(TREE));
    folder.join(format!("{}.meta", digest.hex()))
}
