//! Persisted offline mode. It survives restarts, because an upgrade in the middle of an outage must not start to
//! contact upstreams.
//!
//! The presence of a file means "on". The file explains itself and can be removed by hand.

use std::io;
use std::path::Path;

use super::fs::FileSystem as _;
use super::{Store, StoreError, remove_file};

const FILE: &str = "offline";

const TEXT: &[u8] =
    b"While this file is here, ifnewer contacts no upstream. `ifnewer offline off` removes it.\n";

impl Store {
    /// Whether offline mode was last on.
    pub fn is_offline_persisted(&self) -> bool {
        // A file that exists but cannot be opened counts as present.
        let opened = self.fs.open(Path::new(FILE));
        !matches!(opened, Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Persists offline mode. Durable when it returns.
    pub fn persist_offline(&self, on: bool) -> Result<(), StoreError> {
        let path = Path::new(FILE);
        if on {
            return self
                .fs
                .write_durable(path, TEXT)
                .map_err(|error| StoreError::io("write", path, &error));
        }
        remove_file(&*self.fs, path)?;
        self.fs
            .sync_dir(Path::new(""))
            .map_err(|error| StoreError::io("sync the folder of", path, &error))
    }
}
