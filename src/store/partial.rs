//! Partial downloads: bytes of interrupted downloads on the disk, resumed by the next request for the blob.
//!
//! A partial download survives a restart. Before it is resumed, its data is hashed again: only bytes that match a
//! checkpoint count as received. The digest of the complete blob is verified at the end in any case.
//!
//! The number, the total size and, at startup, the age of partial downloads are limited. They count to the size of the
//! store, by the length of their files: the space preallocated for the rest is freed when a download is suspended. If space
//! is short, they are removed before images are evicted, the oldest first.

use std::fmt;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use super::blobs::{Blobs, TREE};
use super::checksummed_json::{RECORD_BYTES_MAX, decode};
use super::file_read::READ_CHUNK_BYTES;
use super::fs::{FileSystem, FsFile, INGEST_DIR, read_all};
use super::ingest::{Checkpoints, Ingest, Meta, SpaceReservation};
use super::{Store, content_path};
use crate::oci::{Digest, Hasher};

/// Most partial downloads stored at a time. The oldest is removed first.
const PARTIALS_MAX: usize = 32;

/// Most bytes of all partial downloads together.
const PARTIAL_BYTES_MAX: u64 = 16 * 1024 * 1024 * 1024;

/// Greatest age at startup, by the last write. An older partial download is removed.
const PARTIAL_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Largest checkpoint list that is read: the list of a blob of 128 GiB or more.
const CHECKPOINTS_BYTES_MAX: u64 = 16 * 1024 * 1024;

impl Store {
    /// Takes the partial download of `digest` if a usable one exists. No other caller gets it meanwhile.
    pub fn take_partial(&self, digest: &Digest) -> Option<PartialDownload> {
        let mut partial = PartialDownload::take(&self.blobs, digest)?;
        let bytes = partial.size.unwrap_or(partial.bytes());
        // If the complete blob does not fit the quota, the partial download stays for a later request.
        partial.reservation = Some(SpaceReservation::of(&self.evictor, bytes).ok()?);
        // The rest of it was freed when it was suspended. A full disk is detected before the first byte.
        partial.file.reserve(bytes).ok()?;
        Some(partial)
    }

    /// Removes all partial downloads. Returns their size in bytes.
    pub fn remove_partials(&self) -> u64 {
        self.blobs.partials.free(self.blobs.fs.as_ref(), u64::MAX)
    }
}

/// A partial download. Dropped unused, it becomes available again.
pub struct PartialDownload {
    blobs: Arc<Blobs>,
    entry: Option<PartialEntry>,
    size: Option<u64>,
    file: Arc<dyn FsFile>,
    list: Checkpoints,
    checkpoints: Vec<Checkpoint>,
    /// Space for the complete blob.
    reservation: Option<SpaceReservation>,
}

/// Digest of the first `bytes` bytes.
struct Checkpoint {
    bytes: u64,
    digest: Digest,
}

/// A resumed partial download.
pub struct Resumed {
    /// The ingest to continue at offset `written`.
    pub ingest: Ingest,
    /// Hash state after the first `written` bytes.
    pub hasher: Hasher,
    /// Count of verified bytes.
    pub written: u64,
}

impl fmt::Debug for PartialDownload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PartialDownload")
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Resumed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resumed")
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl PartialDownload {
    fn take(blobs: &Arc<Blobs>, digest: &Digest) -> Option<Self> {
        let entry = blobs.partials.take(digest)?;
        let read = || {
            let (fs, folder) = (blobs.fs.as_ref(), entry.folder());
            let meta: Meta = decode(&fs.read_file(&folder.join("meta"), RECORD_BYTES_MAX).ok()?)?;
            let file = fs.open_for_writing(&folder.join("data")).ok()?;
            let list = fs.open_for_writing(&folder.join("marks")).ok()?;
            let text = read_all(list.as_ref(), CHECKPOINTS_BYTES_MAX).ok()?;
            let below = meta
                .size
                .unwrap_or(u64::MAX)
                .min(file.size().ok()?.saturating_add(1));
            let (checkpoints, length) = read_checkpoints(&text, below);
            let list = Checkpoints {
                file: Some(list),
                length,
                last: checkpoints.last()?.bytes,
            };
            Some((meta.size, file, list, checkpoints))
        };
        let Some((size, file, list, checkpoints)) = read() else {
            entry.remove(blobs.fs.as_ref());
            return None;
        };
        Some(Self {
            blobs: Arc::clone(blobs),
            entry: Some(entry),
            size,
            file,
            list,
            checkpoints,
            reservation: None,
        })
    }

    /// Offset of the last checkpoint. The bytes up to it are not verified yet. Always less than the blob's size, so
    /// at least one byte remains to be fetched.
    pub fn bytes(&self) -> u64 {
        self.list.last
    }

    /// Announced size of the complete blob.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// The file, for readers of the bytes that [`Self::reverify`] has verified.
    pub fn file(&self) -> Arc<dyn FsFile> {
        Arc::clone(&self.file)
    }

    /// Removes the partial download.
    pub fn discard(mut self) {
        if let Some(entry) = self.entry.take() {
            entry.remove(self.blobs.fs.as_ref());
        }
    }

    /// Hashes the data from the start, up to the first checkpoint that does not match. `proven` is called with the
    /// offset of each checkpoint that does. Blocks on the disk and the hash. Returns `None` if the partial download was
    /// discarded.
    pub fn reverify(mut self, mut proven: impl FnMut(u64)) -> Option<Resumed> {
        let (reservation, entry) = (self.reservation.take()?, self.entry.take()?);
        let mut hasher = Hasher::new(entry.digest.algorithm());
        let (mut verified, mut written) = (hasher.clone(), 0);
        let mut buffer = vec![0; READ_CHUNK_BYTES];
        for checkpoint in &self.checkpoints {
            let read = read_span(
                self.file.as_ref(),
                (written, checkpoint.bytes),
                &mut buffer,
                &mut hasher,
            );
            if read.is_err() || hasher.clone().finish() != checkpoint.digest {
                tracing::warn!(digest = %entry.digest, from = written, "partial download is corrupt, fetching again from this offset");
                break;
            }
            (verified, written) = (hasher.clone(), checkpoint.bytes);
            proven(written);
        }
        let ingest = Ingest {
            blobs: Arc::clone(&self.blobs),
            digest: entry.digest,
            folder: entry.folder(),
            file: Arc::clone(&self.file),
            checkpoints: Checkpoints {
                last: written,
                ..self.list.clone()
            },
            is_suspended: false,
            reservation,
        };
        Some(Resumed {
            ingest,
            hasher: verified,
            written,
        })
    }
}

impl Drop for PartialDownload {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.blobs.partials.put(self.blobs.fs.as_ref(), entry);
        }
    }
}

/// Hashes a range of the file.
fn read_span(
    file: &dyn FsFile,
    (mut at, until): (u64, u64),
    buffer: &mut [u8],
    hasher: &mut Hasher,
) -> io::Result<()> {
    while at < until {
        let wanted = usize::try_from(until - at)
            .unwrap_or(READ_CHUNK_BYTES)
            .min(buffer.len());
        let space = buffer.get_mut(..wanted).unwrap_or_default();
        let read = match file.read_at(space, at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        hasher.update(space.get(..read).unwrap_or_default());
        at += read as u64;
    }
    Ok(())
}

/// Parses the checkpoints below `size`. Also returns the length of the valid text. A later checkpoint replaces
/// earlier ones with an equal or greater offset. The first malformed line ends the list.
fn read_checkpoints(text: &[u8], size: u64) -> (Vec<Checkpoint>, u64) {
    let (mut checkpoints, mut length) = (Vec::<Checkpoint>::new(), 0);
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let checkpoint = line.strip_suffix(b"\n").and_then(|line| {
            let (bytes, digest) = std::str::from_utf8(line).ok()?.split_once(' ')?;
            Some(Checkpoint {
                bytes: bytes.parse().ok()?,
                digest: digest.parse().ok()?,
            })
        });
        let Some(checkpoint) = checkpoint else { break };
        length += line.len() as u64;
        while checkpoints
            .last()
            .is_some_and(|before| before.bytes >= checkpoint.bytes)
        {
            checkpoints.pop();
        }
        if checkpoint.bytes < size {
            checkpoints.push(checkpoint);
        }
    }
    (checkpoints, length)
}

/// The available partial downloads.
#[derive(Default)]
pub(super) struct PartialDownloads {
    /// Oldest first.
    entries: Mutex<Vec<PartialEntry>>,
    /// Their size, for the quota.
    bytes: Arc<AtomicU64>,
}

pub(super) struct PartialEntry {
    pub(super) digest: Digest,
    /// Length of the data.
    pub(super) bytes: u64,
}

impl PartialEntry {
    pub(super) fn folder(&self) -> PathBuf {
        let mut name = self.digest.algorithm().to_string();
        let _ = write!(name, "-{}", self.digest.hex());
        Path::new(INGEST_DIR).join(name)
    }

    /// Returns its size in bytes.
    fn remove(&self, fs: &dyn FileSystem) -> u64 {
        // If this fails, the folder is found again at the next start.
        let _ = fs.remove_dir_all(&self.folder());
        self.bytes
    }
}

impl PartialDownloads {
    /// Scans the ingest folder at startup. Resumable downloads are registered, everything else is removed.
    pub(super) fn find(fs: &dyn FileSystem, now: SystemTime) -> Self {
        let entries = fs.list(Path::new(INGEST_DIR)).unwrap_or_default();
        let mut found = Vec::new();
        for entry in entries {
            let path = Path::new(INGEST_DIR).join(&entry.name);
            match identify(fs, &path, now).filter(|_| entry.is_folder) {
                Some((entry, written_at)) => found.push((written_at, path, entry)),
                None => remove(fs, &path, entry.is_folder),
            }
        }
        found.sort_by_key(|(written_at, ..)| *written_at);
        let partials = Self::default();
        for (_, path, entry) in found {
            let folder = entry.folder();
            if path == folder
                || (fs.list(&folder).is_ok_and(|there| there.is_empty()) && fs.rename(&path, &folder).is_ok())
            {
                partials.put(fs, entry);
            } else {
                remove(fs, &path, true);
            }
        }
        partials
    }

    /// The size of all, kept current.
    pub(super) fn bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.bytes)
    }

    pub(super) fn put(&self, fs: &dyn FileSystem, entry: PartialEntry) {
        let mut all = self.entries.lock();
        all.retain(|other| other.digest != entry.digest);
        all.push(entry);
        while all.len() > PARTIALS_MAX || (total(&all) > PARTIAL_BYTES_MAX && all.len() > 1) {
            all.remove(0).remove(fs);
        }
        self.bytes.store(total(&all), Ordering::Relaxed);
    }

    fn take(&self, digest: &Digest) -> Option<PartialEntry> {
        let mut all = self.entries.lock();
        let position = all.iter().position(|entry| entry.digest == *digest)?;
        let taken = all.remove(position);
        self.bytes.store(total(&all), Ordering::Relaxed);
        Some(taken)
    }

    /// Removes partial downloads of at least so many bytes, or all. Returns their size in bytes.
    pub(super) fn free(&self, fs: &dyn FileSystem, bytes_min: u64) -> u64 {
        let mut all = self.entries.lock();
        let mut freed = 0;
        while freed < bytes_min && !all.is_empty() {
            freed += all.remove(0).remove(fs);
        }
        self.bytes.store(total(&all), Ordering::Relaxed);
        freed
    }
}

fn total(entries: &[PartialEntry]) -> u64 {
    entries.iter().map(|entry| entry.bytes).sum()
}

/// Reads which blob the ingest in `folder` is of and when it was last written. Returns `None` if it cannot be
/// resumed.
fn identify(
    fs: &dyn FileSystem,
    folder: &Path,
    now: SystemTime,
) -> Option<(PartialEntry, Option<SystemTime>)> {
    let meta: Meta = decode(&fs.read_file(&folder.join("meta"), RECORD_BYTES_MAX).ok()?)?;
    let digest: Digest = meta.digest.parse().ok()?;
    let data = folder.join("data");
    let bytes = fs.open(&data).and_then(|file| file.size()).ok()?;
    let written_at = fs.modified(&data).ok()?;
    let is_old = written_at.is_some_and(|at| now.duration_since(at).is_ok_and(|age| age > PARTIAL_AGE_MAX));
    let is_stored = fs.open(&content_path(TREE, &digest)).is_ok();
    let has_marks = fs.open(&folder.join("marks")).is_ok();
    (has_marks && !is_old && !is_stored).then_some((PartialEntry { digest, bytes }, written_at))
}

fn remove(fs: &dyn FileSystem, path: &Path, is_folder: bool) {
    let removed = if is_folder {
        fs.remove_dir_all(path)
    } else {
        fs.remove(path)
    };
    if let Err(error) = removed {
        tracing::warn!(%error, path = %path.display(), "failed to remove an unfinished ingest");
    }
}
