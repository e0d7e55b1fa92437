//! Whether the operator wants no upstream to be asked: kept over restarts, for an upgrade in the middle of an outage must
//! not begin to ask.
//!
//! A file that is there says yes. It explains itself to whoever finds it, and can be removed by hand.

use std::io;
use std::path::Path;

use super::fs::FileSystem as _;
use super::{Store, StoreError, remove_file};

const FILE: &str = "offline";

const TEXT: &[u8] = b"While this file is here, ifnewer asks no upstream. `ifnewer offline off` removes it.\n";

impl Store {
    /// What the operator wanted last.
    pub fn is_offline_persisted(&self) -> bool {
        // A file that is there and cannot be opened still says yes.
        let opened = self.fs.open(Path::new(FILE));
        !matches!(opened, Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Keeps what the operator wants. Durable when it returns.
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
