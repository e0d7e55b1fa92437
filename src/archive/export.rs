//! Out of the store: planned first, so that what is missing is said before the first byte.
//!
//! The same content gives the same archive, to the byte: no times, no names of machines, an order that follows from the
//! manifests. What the manifests name of platforms that are not held stays out, as image-layout.md allows; their bytes,
//! and so their digests, are never changed.

mod resolve;

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::SystemTime;

use super::layout::{self, Entry, INDEX_FILE, LAYOUT_FILE, blob_name};
use super::{INDEX_DEPTH_MAX, Image, list_missing};
use crate::oci::{Digest, Hasher};
use crate::store::access_times::ContentId;
use crate::store::blobs::BlobHandle;
use crate::store::manifests::StoredManifest;
use crate::store::{Store, StoreError};

use self::resolve::ImageResolver;
pub(super) use self::resolve::referrers_key;

/// The unit of a tar archive, and what it ends with.
const BLOCK_BYTES: u64 = 512;
const END_BYTES: u64 = 2 * BLOCK_BYTES;

/// A longer name takes an entry of its own (GNU tar, "long name").
const TAR_NAME_BYTES_MAX: usize = 100;

/// Why nothing is exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// It is not held at all.
    #[error("{0} is not held; `ifnewer pull` it first")]
    NotHeld(String),
    /// Of an index, no image of a platform wanted is held whole.
    #[error("{0} is not held whole for the platform wanted; `ifnewer pull --platform …` it first")]
    NoPlatform(String),
    /// Something of it is not held.
    #[error("{image} is not held whole: {} {}; `ifnewer pull` it first", list_missing(.missing), if missing.len() == 1 { "is missing" } else { "are missing" })]
    Incomplete {
        /// The image.
        image: String,
        /// What is missing, in the order of the manifests.
        missing: Vec<String>,
    },
    /// The disk cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Which platforms of an index are wanted.
#[derive(Clone, Copy)]
pub enum Platforms<'a> {
    /// Those held whole.
    Cached,
    /// Those of which this says yes, all of which must be held whole.
    Selected(&'a dyn Fn(&str) -> bool),
}

/// What an archive will hold, all of it in the store.
#[derive(Debug)]
pub struct Plan {
    entries: Vec<Entry>,
    objects: Vec<ArchiveObject>,
}

#[derive(Clone, Debug)]
enum ArchiveObject {
    Manifest(Arc<StoredManifest>),
    Blob { digest: Digest, size: u64 },
}

impl ArchiveObject {
    fn digest(&self) -> &Digest {
        match self {
            Self::Manifest(held) => &held.digest,
            Self::Blob { digest, .. } => digest,
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Manifest(held) => held.bytes.len() as u64,
            Self::Blob { size, .. } => *size,
        }
    }
}

impl Plan {
    /// Looks everything up that belongs to `images`, their referrers too as far as those are held. It counts as used at
    /// `now`, so that nothing of it is evicted meanwhile. Blocks.
    pub fn new(
        store: &Store,
        images: &[Image],
        platforms: Platforms<'_>,
        now: SystemTime,
    ) -> Result<Self, ExportError> {
        let mut plan = Self {
            entries: Vec::new(),
            objects: Vec::new(),
        };
        let mut seen_digests = HashSet::new();
        for image in images {
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
            plan.objects.extend(resolver.objects);
        }
        plan.objects
            .retain(|object| seen_digests.insert(*object.digest()));
        let mut named = HashSet::new();
        plan.entries
            .retain(|entry| named.insert((entry.digest, entry.name.clone())));
        for object in &plan.objects {
            let used = match object {
                ArchiveObject::Manifest(held) => ContentId::Manifest(held.digest),
                ArchiveObject::Blob { digest, .. } => ContentId::Blob(*digest),
            };
            store.touch(used, now);
        }
        Ok(plan)
    }

    /// The length of the archive.
    pub fn bytes(&self) -> u64 {
        let documents = [
            entry_bytes(LAYOUT_FILE.len(), layout::layout_document().len() as u64),
            entry_bytes(INDEX_FILE.len(), self.index().len() as u64),
        ];
        let objects = self.objects.iter();
        let objects = objects.map(|object| entry_bytes(blob_name(object.digest()).len(), object.size()));
        documents.into_iter().chain(objects).sum::<u64>() + END_BYTES
    }

    fn index(&self) -> Vec<u8> {
        layout::index_document(self.entries.iter())
    }

    /// Writes the archive. After an error what was written is no archive: its end is missing. Blocks.
    pub fn write(&self, store: &Store, out: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(out);
        append(&mut archive, LAYOUT_FILE, &layout::layout_document())?;
        append(&mut archive, INDEX_FILE, &self.index())?;
        for object in &self.objects {
            let name = blob_name(object.digest());
            match object {
                ArchiveObject::Manifest(held) => append(&mut archive, &name, &held.bytes)?,
                ArchiveObject::Blob { digest, size } => {
                    let held = store.blob(digest).map_err(io::Error::other)?;
                    let held = held.filter(|held| held.size == *size);
                    let held =
                        held.ok_or_else(|| io::Error::other(format!("{digest} has gone meanwhile")))?;
                    let mut content = VerifyingReader::new(&held, *digest);
                    archive.append_data(&mut header(*size), &name, &mut content)?;
                    if !content.is_verified() {
                        store.quarantine_blob(digest);
                        return Err(io::Error::other(format!("{digest} is not what its name says")));
                    }
                }
            }
        }
        archive.into_inner()?.flush()
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

/// Without a time, an owner, or anything else that two machines would not agree on.
fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

/// A blob as it leaves, hashed on the way.
struct VerifyingReader<'a> {
    held: &'a BlobHandle,
    digest: Digest,
    offset: u64,
    hasher: Hasher,
}

impl<'a> VerifyingReader<'a> {
    fn new(held: &'a BlobHandle, digest: Digest) -> Self {
        Self {
            held,
            digest,
            offset: 0,
            hasher: Hasher::new(digest.algorithm()),
        }
    }

    fn is_verified(self) -> bool {
        self.offset == self.held.size && self.hasher.finish() == self.digest
    }
}

impl Read for VerifyingReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.held.file.read_at(into, self.offset)?;
        self.hasher.update(into.get(..read).unwrap_or_default());
        self.offset += read as u64;
        Ok(read)
    }
}
