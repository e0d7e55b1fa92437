//! Unpacking of an archive: blobs are verified and written to the store, documents are returned.

use std::cell::Cell;
use std::io::{self, Read};

use super::{ENTRIES_MAX, ImportError, ImportTransaction, Object};
use crate::archive::BUFFER_BYTES;
use crate::archive::layout::{self, EntryKind, LAYOUT_BYTES_MAX};
use crate::oci::manifest::MANIFEST_BYTES_MAX;
use crate::oci::{Digest, Hasher};
use crate::store::StoreError;
use crate::store::blobs::Verified;
use crate::store::ingest::Ingest;

/// Maximum size of data between two files: headers, long names, extended attributes. The tar crate buffers it in
/// memory.
const HEADER_BYTES_MAX: u64 = 64 * 1024;

/// A reader that fails after a given number of bytes, which limits what the tar crate buffers.
struct HeaderLimit<'a, R> {
    inner: R,
    remaining: &'a Cell<u64>,
}

impl<R: Read> Read for HeaderLimit<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let remaining = usize::try_from(self.remaining.get()).unwrap_or(usize::MAX);
        if remaining == 0 {
            return Err(io::Error::other("the data before a file is too large"));
        }
        let count = into.len().min(remaining);
        let read = self.inner.read(into.get_mut(..count).unwrap_or_default())?;
        self.remaining.set(self.remaining.get() - read as u64);
        Ok(read)
    }
}

/// Stores every blob and returns `index.json`.
pub(super) fn unpack(
    archive: impl Read,
    transaction: &mut ImportTransaction<'_>,
) -> Result<Vec<u8>, ImportError> {
    let remaining = Cell::new(HEADER_BYTES_MAX);
    let mut archive = tar::Archive::new(HeaderLimit {
        inner: archive,
        remaining: &remaining,
    });
    let (mut layout, mut index) = (None, None);
    for (count, entry) in archive.entries()?.enumerate() {
        let mut entry = entry?;
        if count == ENTRIES_MAX {
            return Err(ImportError::TooMany("files", ENTRIES_MAX as u64));
        }
        let (kind, name) = entry_kind(&entry)?;
        let size = entry.size();
        // For its content and the padding of its last block.
        remaining.set(size.saturating_add(HEADER_BYTES_MAX));
        match kind {
            EntryKind::Folder => {}
            EntryKind::Layout => document(&mut entry, &mut layout, name, LAYOUT_BYTES_MAX)?,
            EntryKind::Index => document(&mut entry, &mut index, name, MANIFEST_BYTES_MAX as u64)?,
            EntryKind::Docker => document(&mut entry, &mut None, name, MANIFEST_BYTES_MAX as u64)?,
            EntryKind::Blob(digest) => {
                if transaction.objects.contains_key(&digest) {
                    return Err(ImportError::Duplicate(name));
                }
                let object = blob(transaction, &mut entry, digest, size)?;
                transaction.add(digest, object);
            }
        }
        remaining.set(HEADER_BYTES_MAX);
    }
    let absent = |file| ImportError::Document {
        file,
        reason: "it is missing, so the archive is not an OCI image layout".to_owned(),
    };
    let layout: Vec<u8> = layout.ok_or_else(|| absent(layout::LAYOUT_FILE))?;
    if !layout::is_layout(&layout) {
        return Err(ImportError::Document {
            file: layout::LAYOUT_FILE,
            reason: "unsupported layout version, expected 1.0.0".to_owned(),
        });
    }
    index.ok_or_else(|| absent(layout::INDEX_FILE))
}

/// Classifies an entry. Only files and folders of a layout are accepted.
fn entry_kind<R: Read>(entry: &tar::Entry<'_, R>) -> Result<(EntryKind, String), ImportError> {
    let path = entry.path_bytes();
    let name = String::from_utf8_lossy(&path).into_owned();
    let tar_type = entry.header().entry_type();
    let what = match EntryKind::of(&name) {
        Some(EntryKind::Folder) if tar_type.is_dir() => return Ok((EntryKind::Folder, name)),
        Some(kind) if kind != EntryKind::Folder && tar_type.is_file() => return Ok((kind, name)),
        _ if tar_type.is_symlink() || tar_type.is_hard_link() => "a link",
        _ if tar_type.is_file() || tar_type.is_dir() => "a file or folder",
        _ => "a device or something else",
    };
    Err(ImportError::UnexpectedEntry { name, what })
}

fn document(
    entry: &mut impl Read,
    into: &mut Option<Vec<u8>>,
    name: String,
    bytes_max: u64,
) -> Result<(), ImportError> {
    let mut bytes = Vec::new();
    entry.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(ImportError::TooMany("bytes in a document", bytes_max));
    }
    if into.replace(bytes).is_some() {
        return Err(ImportError::Duplicate(name));
    }
    Ok(())
}

/// Stores a blob. A blob that is cached is only verified: its presence in the archive proves that the archive's
/// creator had it.
fn blob(
    transaction: &mut ImportTransaction<'_>,
    entry: &mut impl Read,
    digest: Digest,
    size: u64,
) -> Result<Object, ImportError> {
    let store = transaction.store;
    transaction.record_uses();
    let is_cached = store.blob(&digest)?.is_some() || store.manifest(&digest)?.is_some();
    let ingest = if is_cached {
        None
    } else {
        Some(store.begin(&digest, Some(size))?)
    };
    let file = ingest.as_ref().map(Ingest::file);
    let mut hasher = Hasher::new(digest.algorithm());
    let mut step = vec![0; BUFFER_BYTES];
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
        transaction.record_uses();
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
        .map_err(|mismatch| ImportError::DigestMismatch(mismatch.to_string()))?;
    let is_new = ingest.is_some();
    if let Some(ingest) = ingest {
        ingest.commit(verified)?;
    }
    Ok(Object { bytes: size, is_new })
}
