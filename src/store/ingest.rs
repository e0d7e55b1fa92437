//! Ingest: writes one blob to a temporary folder and commits it.
//!
//! An ingest is a folder of three files. `data` holds the bytes received so far. `meta` names the expected blob.
//! `marks` holds the checkpoints: one line per [`CHECKPOINT_BYTES`] with the digest of all bytes up to that offset.
//!
//! Data is not fsynced before the commit, because a download must not wait for the disk. After a restart each
//! checkpoint is therefore verified again (see `partial`): blocks that a power cut zeroed do not match their
//! checkpoint. The length of `data` proves nothing, so each checkpoint states its offset.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::blobs::{BlobHandle, Blobs, DigestMismatch, Verified};
use super::checksummed_json::encode;
use super::evict::Evictor;
use super::fs::{FileSystem, FsFile, temp_path};
use super::partial::PartialEntry;
use super::quota::Reservation;
use super::{Store, StoreError};
use crate::oci::{Digest, Hasher};

/// Distance between two checkpoints. A crash loses at most this much of a download.
pub const CHECKPOINT_BYTES: u64 = 1024 * 1024;

/// Step in which space is reserved for a blob of unknown size, if so much is available. Otherwise the exact amount
/// is reserved.
const RESERVE_STEP_BYTES: u64 = 8 * 1024 * 1024;

/// Attempts to find an unused folder name. See [`temp_path`].
const INGEST_TRIES_MAX: u32 = 64;

impl Store {
    /// Begins to write a blob. A known `size` is reserved at once, so that a full disk is detected before the first
    /// byte. If space is short, partial downloads are removed, and then the least recently used images are evicted, which
    /// may take a while.
    pub fn begin(&self, digest: &Digest, size: Option<u64>) -> Result<Ingest, StoreError> {
        let wanted = size.unwrap_or(0);
        let reservation = match SpaceReservation::of(&self.evictor, wanted) {
            Err(StoreError::OverQuota { .. }) if self.remove_partials() > 0 => {
                SpaceReservation::of(&self.evictor, wanted)?
            }
            reserved => reserved?,
        };
        match Ingest::begin(&self.blobs, digest, size, reservation) {
            // Other programs also fill the disk. Retry once after freeing what the store can spare.
            Err(StoreError::Full { .. })
                if self.remove_partials() > 0 || self.evictor.relieve_full_disk(wanted) =>
            {
                Ingest::begin(
                    &self.blobs,
                    digest,
                    size,
                    SpaceReservation::of(&self.evictor, wanted)?,
                )
            }
            begun => begun,
        }
    }
}

/// Identity of an ingest, read again after a restart.
#[derive(Serialize, Deserialize)]
pub(super) struct Meta {
    pub(super) digest: String,
    pub(super) size: Option<u64>,
}

/// A blob being written. Readers of the download see its bytes. The store does not show it before the commit.
/// Dropping it removes its files.
pub struct Ingest {
    pub(super) blobs: Arc<Blobs>,
    pub(super) digest: Digest,
    pub(super) folder: PathBuf,
    pub(super) file: Arc<dyn FsFile>,
    pub(super) checkpoints: Checkpoints,
    pub(super) is_suspended: bool,
    pub(super) reservation: SpaceReservation,
}

/// Space reserved for one blob. It counts as used until the blob itself is counted.
pub(super) struct SpaceReservation {
    evictor: Arc<Evictor>,
    reserved: Reservation,
}

impl SpaceReservation {
    pub(super) fn of(evictor: &Arc<Evictor>, bytes: u64) -> Result<Self, StoreError> {
        Ok(Self {
            evictor: Arc::clone(evictor),
            reserved: evictor.reserve(bytes)?,
        })
    }

    fn grow(&mut self, bytes: u64) -> Result<(), StoreError> {
        let lacking = bytes.saturating_sub(self.reserved.bytes());
        if lacking == 0 {
            return Ok(());
        }
        // The rest of the step may never arrive, so nothing is evicted for it.
        let step = self.evictor.quota.reserve(lacking.max(RESERVE_STEP_BYTES));
        self.reserved.merge(match step {
            Ok(step) => step,
            Err(_) => self.evictor.reserve(lacking)?,
        });
        Ok(())
    }
}

/// Writer of the checkpoint list.
#[derive(Clone, Default)]
pub(super) struct Checkpoints {
    /// `None` before the first checkpoint and after a failed write.
    pub(super) file: Option<Arc<dyn FsFile>>,
    /// Length of the list in bytes.
    pub(super) length: u64,
    /// Offset of the last checkpoint in the blob.
    pub(super) last: u64,
}

impl fmt::Debug for Ingest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ingest")
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

impl Ingest {
    fn begin(
        blobs: &Arc<Blobs>,
        digest: &Digest,
        size: Option<u64>,
        reservation: SpaceReservation,
    ) -> Result<Self, StoreError> {
        let (folder, file) = create(blobs.fs.as_ref())?;
        let ingest = Self {
            blobs: Arc::clone(blobs),
            digest: *digest,
            folder,
            file,
            checkpoints: Checkpoints::default(),
            is_suspended: false,
            reservation,
        };
        if let Some(size) = size {
            let reserved = ingest.file.reserve(size);
            reserved.map_err(|error| StoreError::io("reserve space for", &ingest.folder, &error))?;
        }
        let meta = encode(&Meta {
            digest: digest.to_string(),
            size,
        });
        let path = ingest.folder.join("meta");
        let noted = blobs.fs.create(&path).and_then(|file| file.write_at(&meta, 0));
        noted.map_err(|error| StoreError::io("write", &path, &error))?;
        Ok(ingest)
    }

    /// The file being written, for the writer and for readers.
    pub fn file(&self) -> Arc<dyn FsFile> {
        Arc::clone(&self.file)
    }

    /// Ensures that space for the first `bytes` is reserved. If the size was announced, it already is. Call before
    /// the bytes are written.
    pub fn ensure_reserved(&mut self, bytes: u64) -> Result<(), StoreError> {
        self.reservation.grow(bytes)
    }

    /// Writes a checkpoint every [`CHECKPOINT_BYTES`]. The first `written` bytes are in the file, and `hasher`
    /// covers exactly those.
    pub fn checkpoint_if_due(&mut self, written: u64, hasher: &Hasher) {
        if written.saturating_sub(self.checkpoints.last) >= CHECKPOINT_BYTES {
            self.write_checkpoint(written, hasher);
        }
    }

    /// Stores the bytes as a partial download that the next request for the blob resumes. `hasher` covers the first
    /// `written` bytes.
    pub fn suspend(mut self, written: u64, hasher: &Hasher) {
        if written > self.checkpoints.last {
            self.write_checkpoint(written, hasher);
        }
        if self.checkpoints.last > 0 {
            self.persist_partial();
        }
    }

    /// Makes the blob durable and links it under its digest. After an error the blob is not stored: an fsync error
    /// is final.
    pub fn commit(self, proof: Verified) -> Result<BlobHandle, StoreError> {
        if proof.digest() != self.digest {
            let (expected, found) = (self.digest, proof.digest());
            return Err(Box::new(DigestMismatch { expected, found }).into());
        }
        self.blobs.commit(&self.folder.join("data"), &self.file, proof)
    }

    /// A failed checkpoint does not affect this download. A later one has to fetch more bytes again.
    fn write_checkpoint(&mut self, written: u64, hasher: &Hasher) {
        let path = self.folder.join("marks");
        let file = match self.checkpoints.file.take() {
            Some(file) => Ok(file),
            None if self.checkpoints.last == 0 => self.blobs.fs.create(&path),
            None => return,
        };
        let line = format!("{written} {}\n", hasher.clone().finish());
        let noted = file.and_then(|file| {
            file.write_at(line.as_bytes(), self.checkpoints.length)
                .map(|()| file)
        });
        match noted {
            Ok(file) => {
                self.checkpoints = Checkpoints {
                    file: Some(file),
                    length: self.checkpoints.length + line.len() as u64,
                    last: written,
                };
            }
            Err(error) => {
                tracing::debug!(%error, "failed to write a download checkpoint");
            }
        }
    }

    fn persist_partial(&mut self) {
        // The blob may never be requested again. If this fails, the space is free when the download is removed.
        let _ = self.file.release_reserved();
        let entry = PartialEntry {
            digest: self.digest,
            // Segments may have been written beyond the last checkpoint.
            bytes: self.file.size().unwrap_or(self.checkpoints.last),
        };
        let (fs, folder) = (self.blobs.fs.as_ref(), entry.folder());
        if self.folder != folder {
            // Of two interrupted downloads of one blob, the later one replaces the other.
            let _ = fs.remove_dir_all(&folder);
            if fs.rename(&self.folder, &folder).is_err() {
                return;
            }
        }
        self.is_suspended = true;
        self.blobs.partials.put(fs, entry);
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        if !self.is_suspended {
            // If this fails, the folder is found again when the store is next opened.
            let _ = self.blobs.fs.remove_dir_all(&self.folder);
        }
    }
}

fn create(fs: &dyn FileSystem) -> Result<(PathBuf, Arc<dyn FsFile>), StoreError> {
    let mut tries = 0;
    loop {
        let folder = temp_path();
        let path = folder.join("data");
        match fs.create(&path) {
            Ok(file) => return Ok((folder, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < INGEST_TRIES_MAX => {
                tries += 1;
            }
            Err(error) => return Err(StoreError::io("create", path, &error)),
        }
    }
}
