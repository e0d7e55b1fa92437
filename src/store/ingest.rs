//! A blob being written.
//!
//! An ingest is a folder of three files: `data`, the bytes so far; `meta`, which blob they are to be; `checkpoints`, a line for
//! every [`CHECKPOINT_BYTES`] with the digest of all bytes up to there. Nothing of it is fsynced before the blob is whole:
//! a download must not wait for the disk. Instead nothing of it is believed afterwards (see `partial`): what a power cut
//! turned into zeros does not agree with its mark. The length of `data` says nothing, so the marks are counted in bytes.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::blobs::{BlobHandle, Blobs, Verified, WrongDigest};
use super::checksummed_json::encode;
use super::evict::Evictor;
use super::fs::{FileSystem, FsFile, temp_path};
use super::partial::PartialEntry;
use super::quota::Reservation;
use super::{Store, StoreError};
use crate::oci::{Digest, Hasher};

/// How far two marks are apart: so much of a download, at most, is lost with the process.
pub const CHECKPOINT_BYTES: u64 = 1024 * 1024;

/// Room for a blob of unknown size is set aside in steps of this many bytes, where there is so much; else as it comes.
const RESERVE_STEP_BYTES: u64 = 8 * 1024 * 1024;

/// How many names are tried for an ingest; see [`temp_path`].
const INGEST_TRIES_MAX: u32 = 64;

impl Store {
    /// Begins to write a blob. `size`, where it is known, is reserved at once: a full disk shows before the first byte.
    /// What interrupted downloads left and what is used least make room for it, which may take a while.
    pub fn begin(&self, digest: &Digest, size: Option<u64>) -> Result<Ingest, StoreError> {
        let wanted = size.unwrap_or(0);
        let reservation = match SpaceReservation::of(&self.evictor, wanted) {
            Err(StoreError::OverQuota { .. }) if self.remove_partials() > 0 => {
                SpaceReservation::of(&self.evictor, wanted)?
            }
            reserved => reserved?,
        };
        match Ingest::begin(&self.blobs, digest, size, reservation) {
            // Others fill the disk as well: once more, with what can be spared given to them.
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

/// What an ingest is, for whoever finds it after a stop.
#[derive(Serialize, Deserialize)]
pub(super) struct Meta {
    pub(super) digest: String,
    pub(super) size: Option<u64>,
}

/// A blob being written: followed by readers, visible to nobody else. Dropped, it leaves nothing.
pub struct Ingest {
    pub(super) blobs: Arc<Blobs>,
    pub(super) digest: Digest,
    pub(super) folder: PathBuf,
    pub(super) file: Arc<dyn FsFile>,
    pub(super) checkpoints: Checkpoints,
    pub(super) is_suspended: bool,
    pub(super) reservation: SpaceReservation,
}

/// The room of one blob: counted as taken until the blob itself is.
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
        // Nothing is evicted for what may never come.
        let step = self.evictor.quota.reserve(lacking.max(RESERVE_STEP_BYTES));
        self.reserved.merge(match step {
            Ok(step) => step,
            Err(_) => self.evictor.reserve(lacking)?,
        });
        Ok(())
    }
}

/// The list of marks, as it is written.
#[derive(Clone, Default)]
pub(super) struct Checkpoints {
    /// `None` before the first, and after one that could not be written.
    pub(super) file: Option<Arc<dyn FsFile>>,
    /// The length of the list in bytes.
    pub(super) length: u64,
    /// How much of the blob the last one covers.
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
            reserved.map_err(|error| StoreError::io("reserve room for", &ingest.folder, &error))?;
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

    /// Sees to it that there is room for the first `bytes`: by the size that was announced there is, without one it is
    /// looked for as the bytes come. To be asked before they are written.
    pub fn ensure_reserved(&mut self, bytes: u64) -> Result<(), StoreError> {
        self.reservation.grow(bytes)
    }

    /// The first `written` bytes are in the file, and `hasher` has taken them: noted every [`CHECKPOINT_BYTES`].
    pub fn checkpoint_if_due(&mut self, written: u64, hasher: &Hasher) {
        if written.saturating_sub(self.checkpoints.last) >= CHECKPOINT_BYTES {
            self.write_checkpoint(written, hasher);
        }
    }

    /// Leaves what was written to whoever asks for the blob next. The hasher has taken the first `written` bytes.
    pub fn suspend(mut self, written: u64, hasher: &Hasher) {
        if written > self.checkpoints.last {
            self.write_checkpoint(written, hasher);
        }
        if self.checkpoints.last > 0 {
            self.persist_partial();
        }
    }

    /// Makes the blob durable and gives it its name. After an error nothing is held: the first failed fsync is final.
    pub fn commit(self, proof: Verified) -> Result<BlobHandle, StoreError> {
        if proof.digest() != self.digest {
            let (expected, found) = (self.digest, proof.digest());
            return Err(Box::new(WrongDigest { expected, found }).into());
        }
        self.blobs.commit(&self.folder.join("data"), &self.file, proof)
    }

    /// A mark that cannot be written costs a later download some bytes, and this one nothing.
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
                tracing::debug!(%error, "a download could not be marked; it cannot be resumed later");
            }
        }
    }

    fn persist_partial(&mut self) {
        let entry = PartialEntry {
            digest: self.digest,
            bytes: self.checkpoints.last,
        };
        let (fs, folder) = (self.blobs.fs.as_ref(), entry.folder());
        if self.folder != folder {
            // Of two interrupted downloads of one blob the later one is kept.
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
            // What stays is found when the store is next opened.
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
