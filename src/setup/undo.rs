//! Undo record: a JSON file, and the original contents beside it, named by their digests.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::SetupError;
use super::plan::FileSource;
use super::root_fs::{Owner, RootFs};
use crate::oci::digest::{Algorithm, Digest};

/// Folder of undo records. Not in the cache's folders: contents restored as root must not be writable by the cache's
/// user.
const RECORDS_FOLDER: &str = "/var/lib/ifnewer-setup";

/// Readable by the owner only, because original files may contain credentials.
const OWNER_ONLY: u32 = 0o600;

/// The files written by one job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UndoRecord {
    version: u32,
    pub(super) files: Vec<WrittenFile>,
    /// Created folders, outermost first.
    pub(super) folders: Vec<PathBuf>,
}

/// A written file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WrittenFile {
    pub(super) path: PathBuf,
    /// The original; `None` if the file did not exist.
    pub(super) before: Option<Original>,
    /// Digest of the written content.
    pub(super) after: String,
}

/// The original of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Original {
    pub(super) digest: String,
    pub(super) owner: Owner,
}

/// State of a written file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    /// As written.
    AsWritten,
    /// As before the job changed it: restored by hand.
    AsBefore,
    /// Modified.
    Changed,
}

impl UndoRecord {
    pub(super) fn new(files: Vec<WrittenFile>, folders: Vec<PathBuf>) -> Self {
        Self {
            version: 1,
            files,
            folders,
        }
    }

    pub(super) fn find(&self, path: &Path) -> Option<&WrittenFile> {
        self.files.iter().find(|written| written.path == path)
    }

    /// Digests that undoing or a diff needs.
    fn digests(&self) -> impl Iterator<Item = &str> {
        self.files.iter().flat_map(|written| {
            let before = written.before.as_ref().map(|original| original.digest.as_str());
            before.into_iter().chain(Some(written.after.as_str()))
        })
    }
}

impl WrittenFile {
    /// Compares the current content with the written one.
    pub(super) fn state(&self, now: Option<&[u8]>) -> FileState {
        let digest = now.map(digest);
        if digest.as_ref() == Some(&self.after) {
            FileState::AsWritten
        } else if digest.as_ref() == self.before.as_ref().map(|original| &original.digest) {
            FileState::AsBefore
        } else {
            FileState::Changed
        }
    }
}

/// The digest that names saved contents.
pub(super) fn digest(bytes: &[u8]) -> String {
    Digest::of(Algorithm::Sha256, bytes).hex()
}

/// Folder of one job's undo record.
pub(super) struct BackupDir<'a> {
    root: &'a RootFs,
    folder: PathBuf,
}

impl<'a> BackupDir<'a> {
    pub(super) fn of(job: &str, root: &'a RootFs) -> Self {
        Self {
            root,
            folder: Path::new(RECORDS_FOLDER).join(job),
        }
    }

    fn record(&self) -> PathBuf {
        self.folder.join("record.json")
    }

    /// Takes the lock, which is released when dropped.
    pub(super) fn lock(&self) -> Result<File, SetupError> {
        let folder = self.root.target(Path::new(RECORDS_FOLDER))?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|error| SetupError::file("failed to create the folder", &folder, error))?;
        let path = folder.join("LOCK");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(OWNER_ONLY)
            .open(&path)
            .map_err(|error| SetupError::file("failed to open", &path, error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(SetupError::Locked { path }),
            Err(errno) => Err(SetupError::file("failed to lock", &path, errno.into())),
        }
    }

    /// Loads the record, if there is one.
    pub(super) fn load(&self) -> Result<Option<UndoRecord>, SetupError> {
        let Some(bytes) = self.root.read(&self.record())? else {
            return Ok(None);
        };
        let wrong = |detail: String| SetupError::BadRecord {
            path: self.root.resolve(&self.record()),
            detail,
        };
        let record: UndoRecord = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        match record.version {
            1 => Ok(Some(record)),
            other => Err(wrong(format!("version {other} is not supported by this ifnewer"))),
        }
    }

    /// Saves contents that a record will name.
    pub(super) fn save_bytes(&self, bytes: &[u8]) -> Result<String, SetupError> {
        let name = digest(bytes);
        let path = self.folder.join(&name);
        if self.root.read(&path)?.as_deref() != Some(bytes) {
            self.root.write(&path, bytes, Some(private()))?;
        }
        Ok(name)
    }

    /// Reads saved contents.
    pub(super) fn read_bytes(&self, name: &str) -> Result<Vec<u8>, SetupError> {
        let wrong = |detail: &str| SetupError::BadRecord {
            path: self.root.resolve(&self.record()),
            detail: format!("{name} {detail}"),
        };
        let bytes = self
            .root
            .read(&self.folder.join(name))?
            .ok_or_else(|| wrong("is missing"))?;
        if digest(&bytes) == name {
            Ok(bytes)
        } else {
            Err(wrong("is damaged"))
        }
    }

    /// Writes the record after its contents, then removes contents that it does not name.
    pub(super) fn save(&self, record: &UndoRecord) -> Result<(), SetupError> {
        let text = serde_json::to_vec_pretty(record).unwrap_or_default();
        self.root.write(&self.record(), &text, Some(private()))?;
        for path in self.root.list(&self.folder)? {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if name != "record.json" && !record.digests().any(|digest| digest == name) {
                self.root.remove(&path)?;
            }
        }
        Ok(())
    }

    /// Removes the record first and its contents after it, so that an interruption leaves no partial record.
    pub(super) fn clear(&self) -> Result<(), SetupError> {
        self.root.remove(&self.record())?;
        for path in self.root.list(&self.folder)? {
            self.root.remove(&path)?;
        }
        self.root.remove_folder(&self.folder);
        Ok(())
    }
}

fn private() -> Owner {
    Owner {
        mode: OWNER_ONLY,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    }
}
