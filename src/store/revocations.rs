//! Revocations that wait: denials by an upstream that the shared storage does not have yet.
//!
//! Until other caches can read a denial there, they may honour the right that it ends. So it survives a restart and a power
//! cut: each is a small file, durable before the client gets its denial, and removed once the shared storage has it. The
//! files are read once, at the first use of the shared storage. `shared::revocations` keeps the list and bounds it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::checksummed_json::{RECORD_BYTES_MAX, decode, encode};
use super::fs::FileSystem as _;
use super::walk::record_files;
use super::{Store, StoreError, hashed_path, quarantine, remove_file};
use crate::oci::Repository;

/// Files that are read.
const REVOCATIONS_MAX: usize = 4096;

const TREE: &str = "revocations";

/// A denial that ends a right at other caches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// Identity of the upstream in records.
    pub upstream: Arc<str>,
    /// The repository; without one, the token service of the upstream.
    pub repository: Option<Repository>,
    /// The principal in records; empty for clients without a credential.
    pub principal: Arc<str>,
    /// This cache had granted what the denial ends.
    pub is_known: bool,
}

#[derive(Serialize, Deserialize)]
struct Record {
    upstream: String,
    repository: String,
    principal: String,
    is_known: bool,
}

impl Revocation {
    fn repository(&self) -> &str {
        self.repository.as_ref().map_or("", Repository::as_str)
    }

    fn path(&self) -> std::path::PathBuf {
        hashed_path(TREE, &[&self.upstream, self.repository(), &self.principal])
    }

    fn read(file: &[u8]) -> Option<Self> {
        let record: Record = decode(file)?;
        let repository = match record.repository.as_str() {
            "" => None,
            name => Some(name.parse().ok()?),
        };
        Some(Self {
            upstream: record.upstream.into(),
            repository,
            principal: record.principal.into(),
            is_known: record.is_known,
        })
    }
}

impl Store {
    /// Keeps a revocation. Durable when this returns.
    pub fn put_revocation(&self, revocation: &Revocation) -> Result<(), StoreError> {
        let path = revocation.path();
        let record = encode(&Record {
            upstream: revocation.upstream.to_string(),
            repository: revocation.repository().to_owned(),
            principal: revocation.principal.to_string(),
            is_known: revocation.is_known,
        });
        let written = self.fs.write_durable(&path, &record);
        written.map_err(|error| StoreError::io("write", path, &error))
    }

    /// Removes a revocation, durably: after a power cut, it would end a right that was given since.
    pub fn remove_revocation(&self, revocation: &Revocation) -> Result<(), StoreError> {
        let path = revocation.path();
        remove_file(self.fs.as_ref(), &path)?;
        match path.parent() {
            Some(folder) => self
                .fs
                .sync_dir(folder)
                .map_err(|error| StoreError::io("fsync", folder, &error)),
            None => Ok(()),
        }
    }

    /// The revocations of earlier processes, and the first error, if some could not be read. Blocks.
    pub fn revocations(&self) -> (Vec<Revocation>, Option<StoreError>) {
        let (mut found, mut failure) = (Vec::new(), None);
        for listed in record_files(self.fs.as_ref(), TREE) {
            if found.len() >= REVOCATIONS_MAX {
                break;
            }
            let path = match listed {
                Ok((path, _)) => path,
                Err(error) => {
                    failure.get_or_insert(StoreError::io("list", TREE, &error));
                    continue;
                }
            };
            match self.fs.read_file(&path, RECORD_BYTES_MAX) {
                Ok(bytes) => match Revocation::read(&bytes) {
                    Some(revocation) => found.push(revocation),
                    None => {
                        quarantine(
                            self.fs.as_ref(),
                            &path,
                            "damaged revocation, other caches may not get it",
                        );
                    }
                },
                // Removed meanwhile: the shared storage has it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    failure.get_or_insert(StoreError::io("read", path, &error));
                }
            }
        }
        (found, failure)
    }
}
