//! Export: resolves the images first, so that missing objects are reported before the first byte.
//!
//! The same content gives the same archive, byte for byte: no times, no host names, and an order given by the
//! manifests. Platforms of an index that are not cached are left out, as image-layout.md allows. Manifests are never
//! changed, so their digests stay valid.

mod resolve;

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::SystemTime;

use super::layout::{self, Entry, INDEX_FILE, LAYOUT_FILE, blob_name};
use super::{INDEX_DEPTH_MAX, Image, list_missing};
use crate::oci::{Digest, Hasher};
use crate::store::access_times::ContentId;
use crate::store::blobs::BlobHandle;
use crate::store::manifests::StoredManifest;
use crate::store::verdicts::VerdictKind;
use crate::store::{Store, StoreError};

use self::resolve::ImageResolver;
pub(super) use self::resolve::referrers_key;

/// Block size and end marker of a tar archive.
const BLOCK_BYTES: u64 = 512;
const END_BYTES: u64 = 2 * BLOCK_BYTES;

/// A longer name needs an extra entry (GNU tar, "long name").
const TAR_NAME_BYTES_MAX: usize = 100;

/// Error of an export.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The image is not cached.
    #[error("{0} is not cached; run `ifnewer pull` first")]
    NotCached(String),
    /// No selected platform of the index is completely cached.
    #[error("{0} is incomplete for the selected platform; run `ifnewer pull --platform …` first")]
    NoPlatform(String),
    /// The image is incomplete.
    #[error("{image} is incomplete: {} {}; run `ifnewer pull` first", list_missing(.missing), if missing.len() == 1 { "is missing" } else { "are missing" })]
    Incomplete {
        /// The image.
        image: String,
        /// The missing digests, in manifest order.
        missing: Vec<String>,
    },
    /// The operator blocked the image or a part of it.
    #[error(
        "{image} is not exported, because {digest} is blocked; `ifnewer unblock {digest}` removes the block"
    )]
    Blocked {
        /// The image.
        image: String,
        /// The blocked digest.
        digest: Digest,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Platform selection for an index.
#[derive(Clone, Copy)]
pub enum Platforms<'a> {
    /// All that are completely cached.
    Cached,
    /// Those that the predicate accepts, all of which must be complete.
    Selected(&'a dyn Fn(&str) -> bool),
}

/// Bytes of an archive between two checks for blocks.
const BLOCK_CHECK_BYTES: u64 = 1024 * 1024;

/// The resolved content of an archive.
#[derive(Debug)]
pub struct Plan {
    images: Vec<Image>,
    entries: Vec<Entry>,
    objects: Vec<PlannedObject>,
}

#[derive(Debug)]
struct PlannedObject {
    object: ArchiveObject,
    /// Numbers of the images that contain it.
    images: Vec<usize>,
}

#[derive(Clone, Debug)]
enum ArchiveObject {
    Manifest(Arc<StoredManifest>),
    Blob { digest: Digest, size: u64 },
}

impl ArchiveObject {
    fn digest(&self) -> &Digest {
        match self {
            Self::Manifest(stored) => &stored.digest,
            Self::Blob { digest, .. } => digest,
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Manifest(stored) => stored.bytes.len() as u64,
            Self::Blob { size, .. } => *size,
        }
    }
}

impl Plan {
    /// Resolves `images` with their cached referrers. Marks all objects as used at `now`, so that they are not evicted
    /// for an hour ([`EVICTION_MIN_AGE`](crate::store::EVICTION_MIN_AGE)). Blocks.
    pub fn new(
        store: &Store,
        images: &[Image],
        platforms: Platforms<'_>,
        now: SystemTime,
    ) -> Result<Self, ExportError> {
        let mut plan = Self {
            images: images.to_vec(),
            entries: Vec::new(),
            objects: Vec::new(),
        };
        let mut positions = HashMap::new();
        for (number, image) in images.iter().enumerate() {
            let mut resolver = ImageResolver {
                store,
                image,
                platforms,
                objects: Vec::new(),
            };
            let root = resolver.root()?;
            resolver.add(&root, INDEX_DEPTH_MAX)?;
            let entry = Entry::named(
                root.digest,
                root.media_type.clone(),
                root.bytes.len() as u64,
                &image.name,
            );
            plan.entries.push(entry);
            plan.entries.extend(resolver.referrers());
            for object in resolver.objects {
                let at = *positions.entry(*object.digest()).or_insert(plan.objects.len());
                let images = vec![number];
                match plan.objects.get_mut(at) {
                    Some(planned) if planned.images.contains(&number) => {}
                    Some(planned) => planned.images.push(number),
                    None => plan.objects.push(PlannedObject { object, images }),
                }
            }
        }
        let mut named = HashSet::new();
        plan.entries
            .retain(|entry| named.insert((entry.digest, entry.name.clone())));
        for PlannedObject { object, .. } in &plan.objects {
            let used = match object {
                ArchiveObject::Manifest(stored) => ContentId::Manifest(stored.digest),
                ArchiveObject::Blob { digest, .. } => ContentId::Blob(*digest),
            };
            store.touch(used, now);
        }
        Ok(plan)
    }

    /// The length of the archive in bytes.
    pub fn bytes(&self) -> u64 {
        let documents = [
            entry_bytes(LAYOUT_FILE.len(), layout::layout_document().len() as u64),
            entry_bytes(INDEX_FILE.len(), self.index().len() as u64),
        ];
        let objects = self.objects.iter().map(|planned| &planned.object);
        let objects = objects.map(|object| entry_bytes(blob_name(object.digest()).len(), object.size()));
        documents.into_iter().chain(objects).sum::<u64>() + END_BYTES
    }

    fn index(&self) -> Vec<u8> {
        layout::index_document(self.entries.iter())
    }

    /// Returns an error if a digest of the archive is blocked.
    fn refuse_blocked(&self, store: &Store) -> io::Result<()> {
        for planned in &self.objects {
            let images = planned.images.iter();
            for image in images.filter_map(|number| self.images.get(*number)) {
                refuse_blocked(store, image, planned.object.digest()).map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    /// Writes the archive. Ends with an error if a digest of it is blocked meanwhile. After an error the output lacks the
    /// end marker and is not a valid archive. Blocks.
    pub fn write(&self, store: &Store, out: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(out);
        append(&mut archive, LAYOUT_FILE, &layout::layout_document())?;
        append(&mut archive, INDEX_FILE, &self.index())?;
        for PlannedObject { object, .. } in &self.objects {
            self.refuse_blocked(store)?;
            let name = blob_name(object.digest());
            match object {
                ArchiveObject::Manifest(stored) => append(&mut archive, &name, &stored.bytes)?,
                ArchiveObject::Blob { digest, size } => {
                    let stored = store.blob(digest).map_err(io::Error::other)?;
                    let stored = stored.filter(|stored| stored.size == *size);
                    let stored = stored
                        .ok_or_else(|| io::Error::other(format!("{digest} was removed during the export")))?;
                    let refuse_blocked = || self.refuse_blocked(store);
                    let mut content = VerifyingReader::new(&stored, *digest, &refuse_blocked);
                    archive.append_data(&mut header(*size), &name, &mut content)?;
                    if !content.into_verified() {
                        store.quarantine_blob(digest);
                        return Err(io::Error::other(format!("{digest} does not match its digest")));
                    }
                }
            }
        }
        self.refuse_blocked(store)?;
        archive.into_inner()?.flush()
    }
}

fn refuse_blocked(store: &Store, image: &Image, digest: &Digest) -> Result<(), ExportError> {
    let (upstream, repository) = (&image.upstream, &image.repository);
    match store.verdict(VerdictKind::Blocked, upstream, repository, digest) {
        Some(_) => Err(ExportError::Blocked {
            image: image.name.clone(),
            digest: *digest,
        }),
        None => Ok(()),
    }
}

fn entry_bytes(name: usize, content: u64) -> u64 {
    let blocks = |bytes: u64| bytes.div_ceil(BLOCK_BYTES) * BLOCK_BYTES;
    let long_name = if name > TAR_NAME_BYTES_MAX {
        BLOCK_BYTES + blocks(name as u64 + 1)
    } else {
        0
    };
    long_name + BLOCK_BYTES + blocks(content)
}

fn append(archive: &mut tar::Builder<impl Write>, name: &str, bytes: &[u8]) -> io::Result<()> {
    archive.append_data(&mut header(bytes.len() as u64), name, bytes)
}

/// A header without time and owner, so that archives are reproducible.
fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// A blob reader that verifies the digest, and ends when a digest of the archive is blocked.
struct VerifyingReader<'a> {
    stored: &'a BlobHandle,
    digest: Digest,
    offset: u64,
    hasher: Hasher,
    refuse_blocked: &'a dyn Fn() -> io::Result<()>,
    /// Offset of the next check for blocks.
    check_at: u64,
}

impl<'a> VerifyingReader<'a> {
    fn new(stored: &'a BlobHandle, digest: Digest, refuse_blocked: &'a dyn Fn() -> io::Result<()>) -> Self {
        Self {
            stored,
            digest,
            offset: 0,
            hasher: Hasher::new(digest.algorithm()),
            refuse_blocked,
            check_at: BLOCK_CHECK_BYTES,
        }
    }

    fn into_verified(self) -> bool {
        self.offset == self.stored.size && self.hasher.finish() == self.digest
    }
}

impl Read for VerifyingReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.offset >= self.check_at {
            (self.refuse_blocked)()?;
            self.check_at = self.offset + BLOCK_CHECK_BYTES;
        }
        let read = self.stored.file.read_at(into, self.offset)?;
        self.hasher.update(into.get(..read).unwrap_or_default());
        self.offset += read as u64;
        Ok(read)
    }
}
