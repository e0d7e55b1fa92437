//! File of a verdict: its name, its record and its damage.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::super::checksummed_json::{RECORD_BYTES_MAX, checksum, decode, from_millis, hex, to_millis};
use super::super::fs::FileSystem;
use super::super::walk::record_files;
use super::super::{StoreError, quarantine};
use super::{Entry, VerdictKey, VerdictKind, VerdictNote, VerdictScope};
use crate::oci::Digest;

/// The last time that RFC 3339 can express, in milliseconds since 1970.
const AT_MILLIS_MAX: u64 = 253_402_300_799_999;

#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    verdict: String,
    digest: String,
    upstream: Option<String>,
    repository: Option<String>,
    at_ms: u64,
    by: String,
    reason: Option<String>,
}

impl VerdictKey {
    /// `<tree>/<first two digits>/<algorithm>-<hex>-<hash of the scope>`.
    pub(super) fn path(&self) -> PathBuf {
        let scope = match &self.scope {
            VerdictScope::Everywhere => String::new(),
            VerdictScope::Repository { upstream, repository } => {
                format!("{upstream}\0{}", repository.as_str())
            }
        };
        let name = format!(
            "{}-{}-{}",
            self.digest.algorithm(),
            self.digest.hex(),
            hex(&checksum(scope.as_bytes()))
        );
        folder_of(self.kind, &self.digest).join(name)
    }
}

impl Record {
    pub(super) fn of(key: &VerdictKey, note: &VerdictNote) -> Self {
        let (upstream, repository) = match &key.scope {
            VerdictScope::Everywhere => (None, None),
            VerdictScope::Repository { upstream, repository } => {
                (Some(upstream.to_string()), Some(repository.as_str().to_owned()))
            }
        };
        Self {
            verdict: key.kind.name().to_owned(),
            digest: key.digest.to_string(),
            upstream,
            repository,
            at_ms: to_millis(note.at),
            by: note.by.clone(),
            reason: note.reason.clone(),
        }
    }

    fn parse(self, kind: VerdictKind, digest: &Digest) -> Option<(VerdictScope, VerdictNote)> {
        if self.verdict != kind.name() || self.digest.parse::<Digest>().ok()? != *digest {
            return None;
        }
        let scope = match (self.upstream, self.repository) {
            (None, None) => VerdictScope::Everywhere,
            (Some(upstream), Some(repository)) => VerdictScope::Repository {
                upstream: upstream.into(),
                repository: repository.parse().ok()?,
            },
            _ => return None,
        };
        let note = VerdictNote {
            at: from_millis(self.at_ms.min(AT_MILLIS_MAX)),
            by: self.by,
            reason: self.reason,
        };
        Some((scope, note))
    }
}

/// Reads one file. `None` if its name has no digest, or if it is a damaged or unreadable approval.
pub(super) fn load(fs: &dyn FileSystem, kind: VerdictKind, path: PathBuf) -> Option<(Digest, Entry)> {
    let Some(digest) = digest_in(&path) else {
        quarantine(fs, &path, "verdict with a foreign name");
        return None;
    };
    let read = fs.read_file(&path, RECORD_BYTES_MAX);
    let found = read.as_ref().ok().and_then(|bytes| decode::<Record>(bytes));
    let (scope, note) = match (found.and_then(|record| record.parse(kind, &digest)), kind) {
        (Some(found), _) => found,
        (None, VerdictKind::Blocked) => {
            tracing::error!(path = %path.display(), %digest,
                "block is damaged or unreadable; it holds in every repository");
            let note = VerdictNote {
                at: SystemTime::UNIX_EPOCH,
                by: "unknown".to_owned(),
                reason: Some("the record of this block is damaged".to_owned()),
            };
            (VerdictScope::Everywhere, note)
        }
        (None, VerdictKind::Approved) if read.is_ok() => {
            quarantine(fs, &path, "damaged approval, the digest is not approved");
            return None;
        }
        (None, VerdictKind::Approved) => {
            tracing::error!(path = %path.display(), %digest,
                "failed to read approval; the digest is not approved");
            return None;
        }
    };
    let entry = Entry {
        kind,
        scope,
        note: Arc::new(note),
        paths: vec![path],
        is_durable: true,
    };
    Some((digest, entry))
}

/// The digest in the name of a verdict's file.
fn digest_in(path: &Path) -> Option<Digest> {
    let name = path.file_name()?.to_str()?;
    let (algorithm, rest) = name.split_once('-')?;
    let (hex, _) = rest.split_once('-')?;
    format!("{algorithm}:{hex}").parse().ok()
}

/// The files of all verdicts of this kind.
pub(super) fn files(fs: &dyn FileSystem, kind: VerdictKind) -> Result<Vec<PathBuf>, StoreError> {
    let files = record_files(fs, kind.tree()).map(|file| file.map(|(path, _)| path));
    files
        .collect::<Result<_, _>>()
        .map_err(|error| StoreError::io("list", kind.tree(), &error))
}

/// The files of this kind that are named after `digest`.
pub(super) fn files_of(
    fs: &dyn FileSystem,
    kind: VerdictKind,
    digest: &Digest,
) -> Result<Vec<PathBuf>, StoreError> {
    let folder = folder_of(kind, digest);
    let files = fs
        .list(&folder)
        .map_err(|error| StoreError::io("list", &folder, &error))?;
    let paths = files.into_iter().map(|file| folder.join(file.name));
    Ok(paths
        .filter(|path| digest_in(path).as_ref() == Some(digest))
        .collect())
}

fn folder_of(kind: VerdictKind, digest: &Digest) -> PathBuf {
    let hex = digest.hex();
    Path::new(kind.tree()).join(hex.get(..2).unwrap_or_default())
}
