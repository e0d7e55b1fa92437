//! What goes wrong here, and whose it is to mend.

use std::io;
use std::path::{Path, PathBuf};

use super::Limits;
use super::blobs::WrongDigest;
use crate::oci::Digest;

/// Why the store cannot be opened. The operator's to mend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another process has the folder.
    #[error(
        "{} is in use by {}; stop it or choose another folder with `data`",
        .folder.display(),
        .pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Locked {
        /// The data folder.
        folder: PathBuf,
        /// The process that has it, where its number could be read.
        pid: Option<u32>,
    },
    /// The folder cannot be used.
    #[error(
        "the data folder {} cannot be used: {}: {kind}; {}", .folder.display(), .path.display(), remedy(*kind)
    )]
    Folder {
        /// The data folder.
        folder: PathBuf,
        /// What of it failed: itself, a folder above it, or a file in it.
        path: PathBuf,
        /// What the system says.
        kind: io::ErrorKind,
    },
    /// Others may read the install secret.
    #[error("{} has mode {mode:04o}, so others may read it; run `chmod 600 {}`", .path.display(), .path.display())]
    SecretReadable {
        /// Its path.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The install secret is not 32 bytes.
    #[error("{} is damaged; remove it and a new one is made (clients will have to be vouched for again)", .path.display())]
    SecretDamaged {
        /// Its path.
        path: PathBuf,
    },
    /// Something below the folder cannot be used.
    #[error(transparent)]
    StoreError(#[from] StoreError),
}

/// What to do about a data folder, by what the system says.
fn remedy(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::PermissionDenied => {
            "let this user write there, or choose another folder with `data` (--data PATH, IFNEWER_DATA=PATH)"
        }
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
            "a file is in the way: move it, or choose another folder with `data` (--data PATH, IFNEWER_DATA=PATH)"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space, or choose a folder on another disk with `data` (--data PATH, IFNEWER_DATA=PATH)"
        }
        _ => "choose a folder on a disk that takes writes with `data` (--data PATH, IFNEWER_DATA=PATH)",
    }
}

/// What went wrong on our side of a pull.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No room: no bytes, no inodes, or no quota.
    #[error(
        "the disk is full: could not {what} {}: {reason}; free some space (`df`, and `df -i`) or lower `store.size`",
        .path.display()
    )]
    Full {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// As the system says it.
        reason: String,
    },
    /// The file system takes no writes.
    #[error("the disk is read-only: could not {what} {}; look into the kernel's log", .path.display())]
    ReadOnly {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
    },
    /// Anything else that the system refuses.
    #[error("could not {what} {}: {reason}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The kind of error.
        kind: io::ErrorKind,
        /// As the system says it.
        reason: String,
    },
    /// A file is not what it was; it is fetched again.
    #[error("{} is damaged", .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
    },
    /// The limits leave no room for a blob, and nothing else may go for it.
    #[error(
        "no room for {bytes} bytes within `store.{limit}`: what is held is pinned, in use or younger than an hour; {}",
        if *limit == "size" { "raise `store.size`" } else { "free some of the disk or lower `store.free`" }
    )]
    OverQuota {
        /// How large it is, as far as is known.
        bytes: u64,
        /// The setting that is in the way.
        limit: &'static str,
    },
    /// The bytes to be kept are not those of the digest they were to be kept under. Nothing was kept.
    #[error(transparent)]
    DigestMismatch(#[from] Box<WrongDigest>),
    /// The bytes to be kept as a manifest are none. Nothing was kept.
    #[error("{digest} is not a manifest: {reason}")]
    NotAManifest {
        /// Their digest.
        digest: Digest,
        /// Why not.
        reason: String,
    },
}

impl StoreError {
    /// The fault behind `error`, met when trying to do `what` (a verb, such as "write") with the file `path`.
    pub fn io(what: &'static str, path: impl AsRef<Path>, error: &io::Error) -> Self {
        let path = path.as_ref().to_owned();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full {
                what,
                path,
                reason: error.to_string(),
            },
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly { what, path },
            kind => Self::Io {
                what,
                path,
                kind,
                reason: error.to_string(),
            },
        }
    }
}

/// What keeps the store from doing its work. For the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HealthIssue {
    /// Times and grants are not kept.
    #[error("the index is down; serving from the files ({reason})")]
    Index {
        /// Why.
        reason: String,
    },
    /// The disk refuses to be written.
    #[error("{0}; what is held is served, the rest passes through unstored; tried again every few seconds")]
    Disk(StoreError),
    /// The disk hangs, or is very slow.
    #[error(
        "the disk has not finished to {operation} a file for {seconds} s; what is in memory is served, and what needs \
         the disk waits for it"
    )]
    Slow {
        /// What it was asked to do.
        operation: &'static str,
        /// For how long it has done that.
        seconds: u64,
    },
    /// The limits are reached, and nothing else may go.
    #[error(
        "no room: `store.size` ({} bytes) or `store.free` ({} bytes) is reached, and what is held is pinned, in use or \
         younger than an hour; pulls pass through unstored until that changes",
        .limits.bytes_max, .limits.free_bytes_min
    )]
    OverQuota {
        /// As set.
        limits: Limits,
    },
}
