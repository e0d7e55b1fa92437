//! Undo journal: one JSON file for each job, which is on disk before the first file changes.
//!
//! `/var/lib/ifnewer-setup/<job>.json`, readable by the owner only, because original files may contain credentials:
//! `version`; `files` by path, each with `before` (`base64`, `mode`, `uid`, `gid`; null if it did not exist) and `after`
//! (base64); `folders` that were created; `sha256` of the JSON of `files` and `folders`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::SetupError;
use super::root_fs::{Owner, RootFs, Stored};
use crate::oci::digest::{Algorithm, Digest};

/// Folder of the journals. Not in the cache's folders: contents restored as root must not be writable by the cache's
/// user.
const FOLDER: &str = "/var/lib/ifnewer-setup";

/// 1 was a folder with a file for each content.
const VERSION: u32 = 2;

/// The files written by one job, by path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Journal {
    pub(super) files: BTreeMap<PathBuf, WrittenFile>,
    /// Created folders.
    pub(super) folders: BTreeSet<PathBuf>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    #[serde(flatten)]
    journal: Journal,
    sha256: String,
}

/// A written file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WrittenFile {
    /// The original; `None` if the file did not exist.
    pub(super) before: Option<Stored>,
    /// The written content.
    #[serde(with = "in_base64")]
    pub(super) after: Vec<u8>,
    /// The file that it replaces, until that is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) replaced: Option<Stored>,
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

impl WrittenFile {
    /// Compares the current content with the written one.
    pub(super) fn state(&self, now: Option<&Stored>) -> FileState {
        let bytes = |file: Option<&Stored>| file.map(|file| file.bytes.clone());
        match bytes(now) {
            now if now.as_ref() == Some(&self.after) => FileState::AsWritten,
            now if now == bytes(self.before.as_ref()) => FileState::AsBefore,
            // An application was interrupted before this file.
            now if now.is_some() && now == bytes(self.replaced.as_ref()) => FileState::AsWritten,
            _ => FileState::Changed,
        }
    }
}

impl Journal {
    /// Loads the journal of a job; an empty one if there is none.
    pub(super) fn load(job: &str, root: &RootFs) -> Result<Self, SetupError> {
        let path = path_of(job);
        let former = root.resolve(&path.with_extension(""));
        if former.is_dir() {
            let remedy = "Undo with that version, or restore the files in it, which are named by their digests, and \
                          remove it.";
            return Err(SetupError::conflict(
                &former,
                "is the undo record of an earlier ifnewer",
                remedy,
            ));
        }
        let Some(stored) = root.load(&path)? else {
            return Ok(Self::default());
        };
        let unusable = |what: String| {
            let remedy = "The original files are in it, in base64 (docs/clients.md).";
            SetupError::conflict(&root.resolve(&path), what, remedy)
        };
        let damaged = |detail: &dyn Display| unusable(format!("is damaged ({detail})"));
        let value: Value = serde_json::from_slice(&stored.bytes).map_err(|error| damaged(&error))?;
        match value.get("version") {
            Some(version) if *version != VERSION => Err(unusable(format!(
                "has version {version}, which this ifnewer does not support"
            ))),
            _ => match serde_json::from_value::<Document>(value) {
                Ok(document) if document.sha256 == document.journal.digest() => Ok(document.journal),
                Ok(_) => Err(damaged(&"its digest differs")),
                Err(error) => Err(damaged(&error)),
            },
        }
    }

    /// Replaces the journal of a job. An empty one is removed.
    pub(super) fn save(&self, job: &str, root: &RootFs) -> Result<(), SetupError> {
        if self.files.is_empty() {
            return root.remove(&path_of(job));
        }
        let document = Document {
            version: VERSION,
            journal: self.clone(),
            sha256: self.digest(),
        };
        let text = serde_json::to_vec_pretty(&document).unwrap_or_default();
        let owner = Owner {
            mode: 0o600,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        root.write(&path_of(job), &text, Some(owner))
    }

    fn digest(&self) -> String {
        let text = serde_json::to_vec(self).unwrap_or_default();
        Digest::of(Algorithm::Sha256, &text).hex()
    }
}

fn path_of(job: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{job}.json"))
}

/// The lock of all jobs, which is released when dropped.
#[derive(Debug)]
pub(super) struct JobLock(File);

impl Drop for JobLock {
    /// Closing the folder is not enough: a process that is being started shares its lock until it runs its program.
    fn drop(&mut self) {
        // A lock that stays is released when the process ends.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Takes the lock of all jobs.
pub(super) fn lock(root: &RootFs) -> Result<JobLock, SetupError> {
    let path = root.target(Path::new(FOLDER))?;
    // Only the last folder is restricted: other programs need /var/lib.
    let parents = fs::create_dir_all(path.parent().unwrap_or(&path));
    let created = parents.and_then(|()| match DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        created => created,
    });
    created.map_err(SetupError::file("failed to create the folder", &path))?;
    let folder = File::open(&path).map_err(SetupError::file("failed to open", &path))?;
    match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(JobLock(folder)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(SetupError::Locked(path)),
        Err(errno) => Err(SetupError::file("failed to lock", &path)(errno.into())),
    }
}

/// Bytes in JSON.
pub(super) mod in_base64 {
    use serde::{Deserializer, Serializer, de::Error as _};

    use super::*;

    pub(in crate::setup) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&BASE64_STANDARD.encode(bytes))
    }

    pub(in crate::setup) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        BASE64_STANDARD
            .decode(String::deserialize(from)?)
            .map_err(D::Error::custom)
    }
}
