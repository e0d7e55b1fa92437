//! The files of an archive, as they come: blobs into the store, each under the digest that it has; the documents to whoever
//! follows them.

use std::cell::Cell;
use std::io::{self, Read};

use super::{Brought, ENTRIES_MAX, Object, Refused};
use crate::archive::STEP_BYTES;
use crate::archive::layout::{self, LAYOUT_BYTES_MAX, Place};
use crate::oci::manifest::MANIFEST_BYTES_MAX;
use crate::oci::{Digest, Hasher};
use crate::store::blobs::Verified;
use crate::store::ingest::Ingest;
use crate::store::{Store, StoreError};

/// What may stand between two files: headers, long names, extended attributes. The tar crate keeps it in memory.
const HEAD_BYTES_MAX: u64 = 64 * 1024;

/// A reader that gives out a set number of bytes, and then an error.
struct Limited<'a, R> {
    inner: R,
    left: &'a Cell<u64>,
}

impl<R: Read> Read for Limited<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.left.get()).unwrap_or(usize::MAX);
        if left == 0 {
            return Err(io::Error::other("too much stands before a file"));
        }
        let count = into.len().min(left);
        let read = self.inner.read(into.get_mut(..count).unwrap_or_default())?;
        self.left.set(self.left.get() - read as u64);
        Ok(read)
    }
}

/// Takes every blob; gives `index.json`.
pub(super) fn receive(
    store: &Store,
    archive: impl Read,
    brought: &mut Brought<'_>,
) -> Result<Vec<u8>, Refused> {
    let left = Cell::new(HEAD_BYTES_MAX);
    let mut archive = tar::Archive::new(Limited {
        inner: archive,
        left: &left,
    });
    let (mut layout, mut index) = (None, None);
    for (count, entry) in archive.entries()?.enumerate() {
        let mut entry = entry?;
        if count == ENTRIES_MAX {
            return Err(Refused::TooMuch("files", ENTRIES_MAX as u64));
        }
        let (place, name) = placed(&entry)?;
        let size = entry.size();
        // For its content, and the rest of its last block.
        left.set(size.saturating_add(HEAD_BYTES_MAX));
        match place {
            Place::Folder => {}
            Place::Layout => document(&mut entry, &mut layout, name, LAYOUT_BYTES_MAX)?,
            Place::Index => document(&mut entry, &mut index, name, MANIFEST_BYTES_MAX as u64)?,
            Place::Docker => document(&mut entry, &mut None, name, MANIFEST_BYTES_MAX as u64)?,
            Place::Blob(digest) => {
                if brought.objects.contains_key(&digest) {
                    return Err(Refused::Twice(name));
                }
                let object = blob(store, &mut entry, digest, size)?;
                brought.objects.insert(digest, object);
            }
        }
        left.set(HEAD_BYTES_MAX);
    }
    let absent = |file| Refused::Document {
        file,
        reason: "it is not in the archive, so this is no OCI image layout".to_owned(),
    };
    let layout: Vec<u8> = layout.ok_or_else(|| absent(layout::LAYOUT_FILE))?;
    if !layout::is_layout(&layout) {
        return Err(Refused::Document {
            file: layout::LAYOUT_FILE,
            reason: "it is of another version than 1.0.0".to_owned(),
        });
    }
    index.ok_or_else(|| absent(layout::INDEX_FILE))
}

/// Where an entry belongs. Only files and folders of a layout do.
fn placed<R: Read>(entry: &tar::Entry<'_, R>) -> Result<(Place, String), Refused> {
    let path = entry.path_bytes();
    let name = String::from_utf8_lossy(&path).into_owned();
    let kind = entry.header().entry_type();
    let what = match Place::of(&name) {
        Some(Place::Folder) if kind.is_dir() => return Ok((Place::Folder, name)),
        Some(place) if place != Place::Folder && kind.is_file() => return Ok((place, name)),
        _ if kind.is_symlink() || kind.is_hard_link() => "a link",
        _ if kind.is_file() || kind.is_dir() => "a file or folder",
        _ => "a device or something else",
    };
    Err(Refused::NoPlace { name, what })
}

fn document(
    entry: &mut impl Read,
    into: &mut Option<Vec<u8>>,
    name: String,
    bytes_max: u64,
) -> Result<(), Refused> {
    let mut bytes = Vec::new();
    entry.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(Refused::TooMuch("bytes in a document", bytes_max));
    }
    if into.replace(bytes).is_some() {
        return Err(Refused::Twice(name));
    }
    Ok(())
}

/// Receives a blob by the way that every blob takes. One that is held is only read: that its bytes are here is the proof
/// that whoever made the archive had them.
fn blob(store: &Store, entry: &mut impl Read, digest: Digest, size: u64) -> Result<Object, Refused> {
    let is_held = store.blob(&digest)?.is_some() || store.manifest(&digest)?.is_some();
    let ingest = if is_held {
        None
    } else {
        Some(store.begin(&digest, Some(size))?)
    };
    let file = ingest.as_ref().map(Ingest::file);
    let mut hasher = Hasher::new(digest.algorithm());
    let mut step = vec![0; STEP_BYTES];
    let mut received = 0;
    loop {
        let count = match entry.read(&mut step) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        let bytes = step.get(..count).unwrap_or_default();
        hasher.update(bytes);
        if let Some(file) = &file {
            let written = file.write_at(bytes, received);
            written.map_err(|error| StoreError::io("write", layout::blob_name(&digest), &error))?;
        }
        received += count as u64;
    }
    if received < size {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let verified = Verified::check(hasher, &digest, received, Some(size))
        .map_err(|mismatch| Refused::WrongBytes(mismatch.to_string()))?;
    let is_new = ingest.is_some();
    if let Some(ingest) = ingest {
        ingest.commit(verified)?;
    }
    Ok(Object { bytes: size, is_new })
}
