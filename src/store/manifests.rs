//! Manifest store: the exact bytes and, in a metadata file, the media type and source repositories.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http::HeaderValue;
use parking_lot::{Mutex, MutexGuard};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};

use super::access_times::{AccessTimes, ContentId};
use super::blobs::DigestMismatch;
use super::cache_key::weighted_cache;
use super::checksummed_json::{RECORD_BYTES_MAX, decode, encode};
use super::completeness::RemovedDigests;
use super::fs::FileSystem;
use super::usage::{ContentKind, Counters};
use super::{Settings, Store, StoreError, content_path, remove_file, size_of};
use crate::oci::manifest::{MANIFEST_BYTES_MAX, ManifestKind};
use crate::oci::{AnyDigest, Digest, Manifest, MediaType, Repository};

/// Maximum number of source repositories per manifest; the oldest are dropped.
pub const SOURCES_MAX: usize = 256;

pub(super) const TREE: &str = "manifests";

/// Number of writer locks, selected by the first byte of the digest.
const STRIPES: usize = 16;

/// A verified manifest, ready to be served.
#[derive(Clone, Debug)]
pub struct StoredManifest {
    /// Digest of `bytes`.
    pub digest: Digest,
    /// The exact bytes that the upstream sent.
    pub bytes: Bytes,
    /// The media type that the upstream sent.
    pub media_type: MediaType,
    /// The parsed manifest.
    pub manifest: Manifest,
    /// The headers of its responses.
    headers: ManifestHeaders,
}

/// Header values of a manifest, built once for all its responses. A value that no header can have is left out.
#[derive(Clone, Debug)]
pub struct ManifestHeaders {
    /// `Content-Type`.
    pub content_type: Option<HeaderValue>,
    /// `Content-Length`.
    pub content_length: HeaderValue,
    /// `Docker-Content-Digest`.
    pub digest: Option<HeaderValue>,
    /// `ETag`.
    pub etag: Option<HeaderValue>,
}

impl StoredManifest {
    /// A manifest whose bytes were verified.
    pub fn new(digest: Digest, bytes: Bytes, media_type: MediaType, manifest: Manifest) -> Self {
        let headers = ManifestHeaders {
            content_type: HeaderValue::from_str(media_type.as_str()).ok(),
            content_length: bytes.len().into(),
            digest: HeaderValue::try_from(digest.to_string()).ok(),
            etag: HeaderValue::try_from(format!("\"{digest}\"")).ok(),
        };
        Self {
            digest,
            bytes,
            media_type,
            manifest,
            headers,
        }
    }

    /// The headers of its responses.
    pub fn headers(&self) -> &ManifestHeaders {
        &self.headers
    }

    /// Verifies that the bytes match `digest` and are a manifest.
    pub fn verify(bytes: Bytes, media_type: MediaType, digest: Digest) -> Result<Self, StoreError> {
        let manifest = read(&bytes, digest)?;
        Ok(Self::new(digest, bytes, media_type, manifest))
    }
}

fn read(bytes: &Bytes, digest: Digest) -> Result<Manifest, StoreError> {
    let found = Digest::of(digest.algorithm(), bytes);
    if found != digest {
        return Err(Box::new(DigestMismatch {
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

/// Metadata file of a manifest.
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
    /// The manifest, if cached: verified when read from the disk, without I/O when in memory.
    pub fn manifest(&self, digest: &Digest) -> Result<Option<Arc<StoredManifest>>, StoreError> {
        self.manifests.find(digest)
    }

    /// Stores a manifest that `upstream` has in `repository`. If it is stored already, its media type stays.
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

    /// Removes a manifest. Returns whether it existed.
    pub fn remove_manifest(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.manifests.remove(digest)
    }
}

#[derive(Clone)]
struct ByLength;

impl Weighter<Digest, Arc<StoredManifest>> for ByLength {
    /// The size of the bytes plus an estimate for the parsed manifest and the headers.
    fn weight(&self, _: &Digest, cached: &Arc<StoredManifest>) -> u64 {
        cached.bytes.len() as u64 + 192 * cached.manifest.descriptors.len() as u64 + 1024
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

    /// The manifest, if in memory.
    pub(super) fn ready(&self, digest: &Digest) -> Option<Arc<StoredManifest>> {
        self.ready.get(digest)
    }

    pub(super) fn find(&self, digest: &Digest) -> Result<Option<Arc<StoredManifest>>, StoreError> {
        if let Some(cached) = self.ready.get(digest) {
            return Ok(Some(cached));
        }
        let path = content_path(TREE, digest);
        let bytes = match self.fs.read_file(&path, MANIFEST_BYTES_MAX as u64) {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Bytes::new(),
            Err(error) => return Err(StoreError::io("read", path, &error)),
        };
        let Ok(manifest) = read(&bytes, *digest) else {
            self.quarantine(digest, "manifest does not match its digest");
            return Ok(None);
        };
        let stored = self
            .metadata(digest)
            .and_then(|metadata| metadata.media_type.parse().ok());
        let is_stored = stored.is_some();
        let Some(media_type) = stored.or_else(|| media_type(&manifest)) else {
            self.quarantine(digest, "media type of a manifest lost");
            return Ok(None);
        };
        if !is_stored {
            self.repair_metadata(digest, &media_type);
        }
        let cached = Arc::new(StoredManifest::new(*digest, bytes, media_type, manifest));
        self.ready.insert(*digest, Arc::clone(&cached));
        Ok(Some(cached))
    }

    /// Whether the manifest is cached.
    pub(super) fn has(&self, digest: &Digest) -> bool {
        self.ready.peek(digest).is_some() || size_of(self.fs.as_ref(), &content_path(TREE, digest)).is_some()
    }

    /// Recreates lost or damaged metadata. Skipped if a writer is active or the disk write fails.
    fn repair_metadata(&self, digest: &Digest, media_type: &MediaType) {
        let Some(_writing) = self.stripe(digest).and_then(Mutex::try_lock) else {
            return;
        };
        // The manifest may have been removed in the meantime.
        if size_of(self.fs.as_ref(), &content_path(TREE, digest)).is_some() {
            tracing::warn!(%digest, "manifest metadata lost or damaged, recreated");
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
        // An eviction that began after the first call and listed the manifests before the write has seen neither.
        self.access_times.mark_needed_and_wait(children);
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
        // The cached manifest can briefly outlive its file.
        let is_on_disk = size_of(self.fs.as_ref(), &path).is_some();
        if let Some(cached) = self.find(&digest)?.filter(|_| is_on_disk) {
            self.add_source(&cached, source)?;
            return Ok(cached);
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
        let cached = Arc::new(checked);
        self.ready.insert(digest, Arc::clone(&cached));
        Ok(cached)
    }

    fn add_source(&self, cached: &StoredManifest, source: SourceRepository) -> Result<(), StoreError> {
        let stored = self.metadata(&cached.digest);
        let had_metadata = stored.is_some();
        let mut metadata = stored.unwrap_or_else(|| ManifestMetadata {
            media_type: cached.media_type.as_str().to_owned(),
            sources: Vec::new(),
        });
        if had_metadata && metadata.sources.contains(&source) {
            return Ok(());
        }
        metadata.sources.push(source);
        let surplus = metadata.sources.len().saturating_sub(SOURCES_MAX);
        metadata.sources.drain(..surplus);
        self.write_metadata(&cached.digest, &metadata)
    }

    /// Also fsyncs the folder, which makes the name of the manifest durable.
    fn write_metadata(&self, digest: &Digest, metadata: &ManifestMetadata) -> Result<(), StoreError> {
        let path = metadata_path(digest);
        let written = self.fs.write_durable(&path, &encode(metadata));
        written.map_err(|error| StoreError::io("write", path, &error))
    }

    fn remove(&self, digest: &Digest) -> Result<bool, StoreError> {
        let _writing = self.lock_writer(digest);
        self.remove_locked(digest)
    }

    /// Removes a manifest if `is_free` allows it. Returns its size, or `None` if it does not.
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

    /// Serialises writers of one manifest and its metadata.
    fn lock_writer(&self, digest: &Digest) -> Option<MutexGuard<'_, ()>> {
        let stripe = self.stripe(digest)?;
        Some(stripe.lock())
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
        // After the file, so that no reader caches it in between; `put` checks the file.
        self.ready.remove(digest);
        self.removed.record(digest);
        // Metadata without a manifest has no effect.
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
        self.removed.record(digest);
    }
}

/// The media type if the metadata is lost: as stated in the manifest, or guessed from its structure.
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
