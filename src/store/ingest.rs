//! A blob being written.
//!
//! An ingest is a folder of three files: `data`, the bytes so far; `meta`, which blob they are to be; `marks`, a line for
//! every [`MARK_BYTES`] with the digest of all bytes up to there. Nothing of it is fsynced before the blob is whole:
//! a download must not wait for the disk. Instead nothing of it is believed afterwards (see `leftover`): what a power cut
//! turned into zeros does not agree with its mark. The length of `data` says nothing, so the marks are counted in bytes.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::blobs::{Blobs, HeldBlob, Verified, WrongDigest};
use super::checksummed_json::encode;
use super::evict::Evictor;
use super::fs::{FileSystem, FsFile, temp_path};
use super::leftover::Kept;
use super::room::Reservation;
use super::{Store, StoreError};
use crate::oci::{Digest, Hasher};

/// How far two marks are apart: so much of a download, at most, is lost with the process.
pub const MARK_BYTES: u64 = 1024 * 1024;

/// Room for a blob of unknown size is set aside in steps of this many bytes, where there is so much; else as it comes.
const ROOM_STEP_BYTES: u64 = 8 * 1024 * 1024;

/// How many names are tried for an ingest; see [`temp_path`].
const INGEST_TRIES_MAX: u32 = 64;

impl Store {
    /// Begins to write a blob. `size`, where it is known, is reserved at once: a full disk shows before the first byte.
    /// What interrupted downloads left and what is used least make room for it, which may take a while.
    pub fn begin(&self, digest: &Digest, size: Option<u64>) -> Result<Ingest, StoreError> {
        let wanted = size.unwrap_or(0);
        let room = match Space::of(&self.evictor, wanted) {
            Err(StoreError::OverQuota { .. }) if self.remove_leftovers() > 0 => {
                Space::of(&self.evictor, wanted)?
            }
            reserved => reserved?,
        };
        match Ingest::begin(&self.blobs, digest, size, room) {
            // Others fill the disk as well: once more, with what can be spared given to them.
            Err(StoreError::Full { .. })
                if self.remove_leftovers() > 0 || self.evictor.relieve_full_disk(wanted) =>
            {
                Ingest::begin(&self.blobs, digest, size, Space::of(&self.evictor, wanted)?)
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
    pub(super) marks: Marks,
    pub(super) is_left: bool,
    pub(super) room: Space,
}

/// The room of one blob: counted as taken until the blob itself is.
pub(super) struct Space {
    evictor: Arc<Evictor>,
    reserved: Reservation,
}

impl Space {
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
        let step = self.evictor.room.reserve(lacking.max(ROOM_STEP_BYTES));
        self.reserved.absorb(match step {
            Ok(step) => step,
            Err(_) => self.evictor.reserve(lacking)?,
        });
        Ok(())
    }
}

/// The list of marks, as it is written.
#[derive(Clone, Default)]
pub(super) struct Marks {
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
        room: Space,
    ) -> Result<Self, StoreError> {
        let (folder, file) = create(blobs.fs.as_ref())?;
        let ingest = Self {
            blobs: Arc::clone(blobs),
            digest: *digest,
            folder,
            file,
            marks: Marks::default(),
            is_left: false,
            room,
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
    pub fn make_room(&mut self, bytes: u64) -> Result<(), StoreError> {
        self.room.grow(bytes)
    }

    /// The first `written` bytes are in the file, and `hasher` has taken them: noted every [`MARK_BYTES`].
    pub fn wrote(&mut self, written: u64, hasher: &Hasher) {
        if written.saturating_sub(self.marks.last) >= MARK_BYTES {
            self.mark(written, hasher);
        }
    }

    /// Leaves what was written to whoever asks for the blob next. The hasher has taken the first `written` bytes.
    pub fn leave(mut self, written: u64, hasher: &Hasher) {
        if written > self.marks.last {
            self.mark(written, hasher);
        }
        if self.marks.last > 0 {
            self.put_away();
        }
    }

    /// Makes the blob durable and gives it its name. After an error nothing is held: the first failed fsync is final.
    pub fn commit(self, proof: Verified) -> Result<HeldBlob, StoreError> {
        if proof.digest() != self.digest {
            let (expected, found) = (self.digest, proof.digest());
            return Err(Box::new(WrongDigest { expected, found }).into());
        }
        self.blobs.admit(&self.folder.join("data"), &self.file, proof)
    }

    /// A mark that cannot be written costs a later download some bytes, and this one nothing.
    fn mark(&mut self, written: u64, hasher: &Hasher) {
        let path = self.folder.join("marks");
        let file = match self.marks.file.take() {
            Some(file) => Ok(file),
            None if self.marks.last == 0 => self.blobs.fs.create(&path),
            None => return,
        };
        let line = format!("{written} {}\n", hasher.clone().finish());
        let noted = file.and_then(|file| file.write_at(line.as_bytes(), self.marks.length).map(|()| file));
        match noted {
            Ok(file) => {
                self.marks = Marks {
                    file: Some(file),
                    length: self.marks.length + line.len() as u64,
                    last: written,
                };
            }
            Err(error) => {
                tracing::debug!(%error, "a download could not be marked; it cannot be resumed later");
            }
        }
    }

    fn put_away(&mut self) {
        let kept = Kept {
            digest: self.digest,
            bytes: self.marks.last,
        };
        let (fs, folder) = (self.blobs.fs.as_ref(), kept.folder());
        if self.folder != folder {
            // Of two interrupted downloads of one blob the later one is kept.
            let _ = fs.remove_dir_all(&folder);
            if fs.rename(&self.folder, &folder).is_err() {
                return;
            }
        }
        self.is_left = true;
        self.blobs.leftovers.put(fs, kept);
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        if !self.is_left {
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
