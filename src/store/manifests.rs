//! Manifests: their exact bytes, and beside them the media type and the repositories they were seen in.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};

use super::blobs::WrongDigest;
use super::cache_key::weighted;
use super::checksummed_json::{RECORD_BYTES_MAX, opened, sealed};
use super::completeness::Removed;
use super::fs::FileSystem;
use super::usage::{Counters, Kind};
use super::uses::{Used, Uses};
use super::{Fault, Settings, Store, content_path, remove_file, size_of};
use crate::oci::manifest::{Kind as ManifestKind, MANIFEST_BYTES_MAX};
use crate::oci::{AnyDigest, Digest, Manifest, MediaType, Repository};

/// How many repositories a manifest's record names; the oldest go first.
pub const SEEN_IN_MAX: usize = 256;

pub(super) const TREE: &str = "manifests";

/// Writers of records that share a lock do so by the digest's first byte.
const STRIPES: usize = 16;

/// A manifest with all that is needed to serve it.
#[derive(Clone, Debug)]
pub struct HeldManifest {
    /// Of exactly these bytes.
    pub digest: Digest,
    /// As the upstream sent them.
    pub bytes: Bytes,
    /// As the upstream named it.
    pub media_type: MediaType,
    /// What it refers to.
    pub manifest: Manifest,
}

impl HeldManifest {
    /// Reads and verifies: the bytes must be those of `digest`, and a manifest.
    pub fn check(bytes: Bytes, media_type: MediaType, digest: Digest) -> Result<Self, Fault> {
        let manifest = read(&bytes, digest)?;
        Ok(Self {
            digest,
            bytes,
            media_type,
            manifest,
        })
    }
}

fn read(bytes: &Bytes, digest: Digest) -> Result<Manifest, Fault> {
    let found = Digest::of(digest.algorithm(), bytes);
    if found != digest {
        return Err(Box::new(WrongDigest {
            expected: digest,
            found,
        })
        .into());
    }
    Manifest::read(bytes).map_err(|error| Fault::NotAManifest {
        digest,
        reason: error.to_string(),
    })
}

/// The record beside a manifest.
#[derive(Serialize, Deserialize)]
struct Meta {
    media_type: String,
    seen_in: Vec<SeenIn>,
}

#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct SeenIn {
    upstream: String,
    repository: String,
}

impl Store {
    /// The manifest, if it is held: verified when it comes from the disk, ready when it comes from memory.
    pub fn manifest(&self, digest: &Digest) -> Result<Option<Arc<HeldManifest>>, Fault> {
        self.manifests.find(digest)
    }

    /// Keeps a manifest that `upstream` has in `repository`. One that is held already keeps its media type.
    pub fn keep_manifest(
        &self,
        bytes: Bytes,
        media_type: MediaType,
        digest: Digest,
        upstream: &str,
        repository: &Repository,
    ) -> Result<Arc<HeldManifest>, Fault> {
        let seen_in = SeenIn {
            upstream: upstream.to_owned(),
            repository: repository.as_str().to_owned(),
        };
        self.manifests
            .keep(HeldManifest::check(bytes, media_type, digest)?, seen_in)
    }

    /// Removes a manifest; says whether it was there.
    pub fn remove_manifest(&self, digest: &Digest) -> Result<bool, Fault> {
        self.manifests.remove(digest)
    }
}

#[derive(Clone)]
struct ByLength;

impl Weighter<Digest, Arc<HeldManifest>> for ByLength {
    /// The bytes, and about as much for what was read from them.
    fn weight(&self, _: &Digest, held: &Arc<HeldManifest>) -> u64 {
        held.bytes.len() as u64 + 192 * held.manifest.children.len() as u64 + 512
    }
}

pub(super) struct Manifests {
    fs: Arc<dyn FileSystem>,
    usage: Arc<Counters>,
    uses: Arc<Uses>,
    ready: Cache<Digest, Arc<HeldManifest>, ByLength>,
    records: [Mutex<()>; STRIPES],
    removed: Arc<Removed>,
}

impl Manifests {
    pub(super) fn new(
        settings: &Settings,
        fs: &Arc<dyn FileSystem>,
        usage: &Arc<Counters>,
        uses: &Arc<Uses>,
        removed: &Arc<Removed>,
    ) -> Self {
        Self {
            fs: Arc::clone(fs),
            usage: Arc::clone(usage),
            uses: Arc::clone(uses),
            ready: weighted(settings.manifest_cache_bytes_max, 4096, ByLength),
            records: std::array::from_fn(|_| Mutex::default()),
            removed: Arc::clone(removed),
        }
    }

    /// The manifest, if it is in memory.
    pub(super) fn ready(&self, digest: &Digest) -> Option<Arc<HeldManifest>> {
        self.ready.get(digest)
    }

    pub(super) fn find(&self, digest: &Digest) -> Result<Option<Arc<HeldManifest>>, Fault> {
        if let Some(held) = self.ready.get(digest) {
            return Ok(Some(held));
        }
        let path = content_path(TREE, digest);
        let bytes = match self.fs.read_file(&path, MANIFEST_BYTES_MAX as u64) {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Bytes::new(),
            Err(error) => return Err(Fault::io("read", path, &error)),
        };
        let Ok(manifest) = read(&bytes, *digest) else {
            self.quarantine(digest, "a manifest is not what its name says");
            return Ok(None);
        };
        let recorded = self
            .record(digest)
            .and_then(|record| record.media_type.parse().ok());
        let is_recorded = recorded.is_some();
        let Some(media_type) = recorded.or_else(|| media_type(&manifest)) else {
            self.quarantine(digest, "the media type of a manifest is lost");
            return Ok(None);
        };
        if !is_recorded {
            self.mend_record(digest, &media_type);
        }
        let held = Arc::new(HeldManifest {
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
    fn mend_record(&self, digest: &Digest, media_type: &MediaType) {
        let Some(Ok(_writing)) = self.stripe(digest).map(Mutex::try_lock) else {
            return;
        };
        // Not beside a manifest that was removed meanwhile.
        if size_of(self.fs.as_ref(), &content_path(TREE, digest)).is_some() {
            tracing::warn!(%digest, "the record beside a manifest was lost or damaged; it is written anew");
            let media_type = media_type.as_str().to_owned();
            let record = Meta {
                media_type,
                seen_in: Vec::new(),
            };
            let _ = self.write_record(digest, &record);
        }
    }

    fn record(&self, digest: &Digest) -> Option<Meta> {
        opened(&self.fs.read_file(&record_path(digest), RECORD_BYTES_MAX).ok()?)
    }

    fn keep(&self, checked: HeldManifest, seen_in: SeenIn) -> Result<Arc<HeldManifest>, Fault> {
        let digest = checked.digest;
        let children = checked.manifest.children.iter();
        let children = children.filter_map(|child| match &child.digest {
            AnyDigest::Known(child) => Some(*child),
            AnyDigest::Foreign(_) => None,
        });
        let children: Vec<Digest> = children.collect();
        self.uses.note_arrival(Used::Manifest(digest));
        self.uses.needed(children.iter().copied());
        let kept = self.write(checked, seen_in);
        // An eviction that began since the first note, and listed the manifests before the write, knows of neither.
        self.uses.needed(children);
        kept
    }

    fn write(&self, checked: HeldManifest, seen_in: SeenIn) -> Result<Arc<HeldManifest>, Fault> {
        let digest = checked.digest;
        let _writing = self.writing(&digest);
        let path = content_path(TREE, &digest);
        // In memory it may outlive its file by a moment.
        let is_filed = size_of(self.fs.as_ref(), &path).is_some();
        if let Some(held) = self.find(&digest)?.filter(|_| is_filed) {
            self.extend_record(&held, seen_in)?;
            return Ok(held);
        }
        let size = checked.bytes.len() as u64;
        let written = self.usage.adding(Kind::Manifest, &path, size, || {
            self.fs.write_atomic(&path, &checked.bytes).map(|()| true)
        });
        written.map_err(|error| Fault::io("write", &path, &error))?;
        let record = Meta {
            media_type: checked.media_type.as_str().to_owned(),
            seen_in: vec![seen_in],
        };
        self.write_record(&digest, &record)?;
        let held = Arc::new(checked);
        self.ready.insert(digest, Arc::clone(&held));
        Ok(held)
    }

    fn extend_record(&self, held: &HeldManifest, seen_in: SeenIn) -> Result<(), Fault> {
        let recorded = self.record(&held.digest);
        let is_whole = recorded.is_some();
        let mut record = recorded.unwrap_or_else(|| Meta {
            media_type: held.media_type.as_str().to_owned(),
            seen_in: Vec::new(),
        });
        if is_whole && record.seen_in.contains(&seen_in) {
            return Ok(());
        }
        record.seen_in.push(seen_in);
        let surplus = record.seen_in.len().saturating_sub(SEEN_IN_MAX);
        record.seen_in.drain(..surplus);
        self.write_record(&held.digest, &record)
    }

    /// Makes the folder durable too, and with it the name of the manifest.
    fn write_record(&self, digest: &Digest, record: &Meta) -> Result<(), Fault> {
        let path = record_path(digest);
        let written = self.fs.write_durable(&path, &sealed(record));
        written.map_err(|error| Fault::io("write", path, &error))
    }

    fn remove(&self, digest: &Digest) -> Result<bool, Fault> {
        let _writing = self.writing(digest);
        self.remove_alone(digest)
    }

    /// Removes a manifest if it `is_free` to go, and says how long it was; `None` where it is not.
    pub(super) fn evict(
        &self,
        digest: &Digest,
        is_free: impl FnOnce() -> bool,
    ) -> Result<Option<u64>, Fault> {
        let _writing = self.writing(digest);
        if !is_free() {
            return Ok(None);
        }
        let size = size_of(self.fs.as_ref(), &content_path(TREE, digest)).unwrap_or(0);
        self.remove_alone(digest).map(|_| Some(size))
    }

    /// Writers of one manifest and its record come one after the other.
    fn writing(&self, digest: &Digest) -> Option<MutexGuard<'_, ()>> {
        let stripe = self.stripe(digest)?;
        Some(stripe.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn stripe(&self, digest: &Digest) -> Option<&Mutex<()>> {
        let stripe = digest.as_bytes().first().copied().unwrap_or_default();
        self.records.get(usize::from(stripe) % STRIPES)
    }

    fn remove_alone(&self, digest: &Digest) -> Result<bool, Fault> {
        let path = content_path(TREE, digest);
        let was_there = self
            .usage
            .removing(Kind::Manifest, &path, || remove_file(self.fs.as_ref(), &path))?;
        // After the file, so that nobody reads it into memory in between; who was quicker is told by `keep`.
        self.ready.remove(digest);
        self.removed.note(digest);
        // Without its manifest the record says nothing.
        let _ = self.fs.remove(&record_path(digest));
        Ok(was_there)
    }

    pub(super) fn quarantine(&self, digest: &Digest, why: &str) {
        self.ready.remove(digest);
        self.usage
            .quarantining(Kind::Manifest, self.fs.as_ref(), &content_path(TREE, digest), why);
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

fn record_path(digest: &Digest) -> PathBuf {
    let path = content_path(TREE, digest);
    let folder = path.parent().unwrap_or(Path::new(TREE));
    folder.join(format!("{}.meta", digest.hex()))
}
