//! Out of the store: planned first, so that what is missing is said before the first byte.
//!
//! The same content gives the same archive, to the byte: no times, no names of machines, an order that follows from the
//! manifests. What the manifests name of platforms that are not held stays out, as image-layout.md allows; their bytes,
//! and so their digests, are never changed.

mod look;

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::SystemTime;

use super::layout::{self, Entry, INDEX_FILE, LAYOUT_FILE, blob_name};
use super::{DEPTH_MAX, Image, listed};
use crate::oci::{Digest, Hasher};
use crate::store::blobs::HeldBlob;
use crate::store::manifests::StoredManifest;
use crate::store::uses::Used;
use crate::store::{Store, StoreError};

use self::look::Look;
pub(super) use self::look::referrers_of;

/// The unit of a tar archive, and what it ends with.
const BLOCK_BYTES: u64 = 512;
const END_BYTES: u64 = 2 * BLOCK_BYTES;

/// A longer name takes an entry of its own (GNU tar, "long name").
const NAME_BYTES_MAX: usize = 100;

/// Why nothing is exported.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It is not held at all.
    #[error("{0} is not held; `ifnewer pull` it first")]
    NotHeld(String),
    /// Of an index, no image of a platform wanted is held whole.
    #[error("{0} is not held whole for the platform wanted; `ifnewer pull --platform …` it first")]
    NoPlatform(String),
    /// Something of it is not held.
    #[error("{image} is not held whole: {} {}; `ifnewer pull` it first", listed(.missing), if missing.len() == 1 { "is missing" } else { "are missing" })]
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
    Held,
    /// Those of which this says yes, all of which must be held whole.
    Selected(&'a dyn Fn(&str) -> bool),
}

/// What an archive will hold, all of it in the store.
#[derive(Debug)]
pub struct Plan {
    entries: Vec<Entry>,
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
enum Part {
    Manifest(Arc<StoredManifest>),
    Blob { digest: Digest, size: u64 },
}

impl Part {
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
    ) -> Result<Self, Refused> {
        let mut plan = Self {
            entries: Vec::new(),
            parts: Vec::new(),
        };
        let mut known = HashSet::new();
        for image in images {
            let mut look = Look {
                store,
                image,
                platforms,
                parts: Vec::new(),
            };
            let root = look.root()?;
            look.add(&root, DEPTH_MAX)?;
            let entry = Entry::named(
                root.digest,
                root.media_type.clone(),
                root.bytes.len() as u64,
                &image.name,
            );
            plan.entries.push(entry);
            plan.entries.extend(look.referrers());
            plan.parts.extend(look.parts);
        }
        plan.parts.retain(|part| known.insert(*part.digest()));
        let mut named = HashSet::new();
        plan.entries
            .retain(|entry| named.insert((entry.digest, entry.name.clone())));
        for part in &plan.parts {
            let used = match part {
                Part::Manifest(held) => Used::Manifest(held.digest),
                Part::Blob { digest, .. } => Used::Blob(*digest),
            };
            store.note_use(used, now);
        }
        Ok(plan)
    }

    /// The length of the archive.
    pub fn bytes(&self) -> u64 {
        let documents = [
            entry_bytes(LAYOUT_FILE.len(), layout::layout_document().len() as u64),
            entry_bytes(INDEX_FILE.len(), self.index().len() as u64),
        ];
        let parts = self.parts.iter();
        let parts = parts.map(|part| entry_bytes(blob_name(part.digest()).len(), part.size()));
        documents.into_iter().chain(parts).sum::<u64>() + END_BYTES
    }

    fn index(&self) -> Vec<u8> {
        layout::index_document(self.entries.iter())
    }

    /// Writes the archive. After an error what was written is no archive: its end is missing. Blocks.
    pub fn write(&self, store: &Store, out: impl Write) -> io::Result<()> {
        let mut archive = tar::Builder::new(out);
        append(&mut archive, LAYOUT_FILE, &layout::layout_document())?;
        append(&mut archive, INDEX_FILE, &self.index())?;
        for part in &self.parts {
            let name = blob_name(part.digest());
            match part {
                Part::Manifest(held) => append(&mut archive, &name, &held.bytes)?,
                Part::Blob { digest, size } => {
                    let held = store.blob(digest).map_err(io::Error::other)?;
                    let held = held.filter(|held| held.size == *size);
                    let held =
                        held.ok_or_else(|| io::Error::other(format!("{digest} has gone meanwhile")))?;
                    let mut content = Content::new(&held, *digest);
                    archive.append_data(&mut header(*size), &name, &mut content)?;
                    if !content.ended_right() {
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
    let long_name = if name > NAME_BYTES_MAX {
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
struct Content<'a> {
    held: &'a HeldBlob,
    digest: Digest,
    offset: u64,
    hasher: Hasher,
}

impl<'a> Content<'a> {
    fn new(held: &'a HeldBlob, digest: Digest) -> Self {
        Self {
            held,
            digest,
            offset: 0,
            hasher: Hasher::new(digest.algorithm()),
        }
    }

    fn ended_right(self) -> bool {
        self.offset == self.held.size && self.hasher.finish() == self.digest
    }
}

impl Read for Content<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.held.file.read_at(into, self.offset)?;
        self.hasher.update(into.get(..read).unwrap_or_default());
        self.offset += read as u64;
        Ok(read)
    }
}
