//! Store errors and health issues.

use std::io;
use std::path::{Path, PathBuf};

use super::Limits;
use super::blobs::DigestMismatch;
use crate::oci::Digest;

/// Reason why the store cannot be opened. The operator must fix it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another process uses the folder.
    #[error(
        "{} is in use by {}; stop it or choose another folder with `data`",
        .folder.display(),
        .pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Locked {
        /// The data folder.
        folder: PathBuf,
        /// The process ID of the other process, if it could be read.
        pid: Option<u32>,
    },
    /// The folder cannot be used.
    #[error(
        "the data folder {} cannot be used: {}: {kind}; {}", .folder.display(), .path.display(), remedy(*kind)
    )]
    Folder {
        /// The data folder.
        folder: PathBuf,
        /// The path that failed: the folder itself, a parent folder, or a file in it.
        path: PathBuf,
        /// The error kind that the system returned.
        kind: io::ErrorKind,
    },
    /// The install secret is readable by other users.
    #[error("{} has mode {mode:04o}, so others may read it; run `chmod 600 {}`", .path.display(), .path.display())]
    SecretReadable {
        /// Its path.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The install secret is not 32 bytes.
    #[error("{} is damaged; remove it to create a new one (this invalidates all stored grants, so clients must authenticate again)", .path.display())]
    SecretDamaged {
        /// Its path.
        path: PathBuf,
    },
    /// A file below the folder cannot be used.
    #[error(transparent)]
    StoreError(#[from] StoreError),
}

/// Advice for the operator, by error kind.
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

/// An error of the local store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The disk is full: no bytes, no inodes, or no file-system quota.
    #[error(
        "the disk is full: could not {what} {}: {reason}; free some space (`df`, and `df -i`) or lower `store.size`",
        .path.display()
    )]
    Full {
        /// The attempted operation.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The error message of the system.
        reason: String,
    },
    /// The file system is read-only.
    #[error("the disk is read-only: could not {what} {}; look into the kernel's log", .path.display())]
    ReadOnly {
        /// The attempted operation.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Any other I/O error.
    #[error("could not {what} {}: {reason}", .path.display())]
    Io {
        /// The attempted operation.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The kind of error.
        kind: io::ErrorKind,
        /// The error message of the system.
        reason: String,
    },
    /// A file is damaged. Its content is fetched again.
    #[error("{} is damaged", .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
    },
    /// The quota has no room for a blob, and nothing can be evicted for it.
    #[error(
        "no space for {bytes} bytes within `store.{limit}`: everything cached is pinned, in use or younger than an hour; {}",
        if *limit == "size" { "raise `store.size`" } else { "free some of the disk or lower `store.free`" }
    )]
    OverQuota {
        /// Size of the blob, as far as known.
        bytes: u64,
        /// The setting that is exceeded.
        limit: &'static str,
    },
    /// The bytes do not match the digest. Nothing was stored.
    #[error(transparent)]
    DigestMismatch(#[from] Box<DigestMismatch>),
    /// The bytes are not a manifest. Nothing was stored.
    #[error("{digest} is not a manifest: {reason}")]
    NotAManifest {
        /// The digest of the bytes.
        digest: Digest,
        /// The parse error.
        reason: String,
    },
}

impl StoreError {
    /// Wraps an I/O error met when trying to do `what` (a verb, such as "write") with the file `path`.
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

/// A health issue of the store, for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HealthIssue {
    /// The index is unavailable: confirmation times and grants are not persisted.
    #[error("index unavailable: {reason}; serving from the files, grants are not persisted")]
    Index {
        /// The cause.
        reason: String,
    },
    /// The disk cannot be written.
    #[error(
        "{0}; cached content is served, other pulls are forwarded without caching; retried every few seconds"
    )]
    Disk(StoreError),
    /// The disk hangs or is very slow.
    #[error(
        "disk operation `{operation}` has been running for {seconds} s; requests that need the disk wait, others are \
         served from memory"
    )]
    Slow {
        /// The operation.
        operation: &'static str,
        /// How long it has been running.
        seconds: u64,
    },
    /// The quota is reached, and nothing can be evicted.
    #[error(
        "no space: `store.size` ({} bytes) or `store.free` ({} bytes) is reached, and everything cached is pinned, in use \
         or younger than an hour; pulls are forwarded without caching",
        .limits.bytes_max, .limits.free_bytes_min
    )]
    OverQuota {
        /// The configured quota.
        limits: Limits,
    },
}
