//! What should be on the disk, before anything is written.

use std::path::{Path, PathBuf};

use super::Refused;

/// What is on the disk. Paths are absolute, as the client sees them.
pub trait Files {
    /// The bytes of a file; `None` if there is none.
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, Refused>;

    /// The files of a folder, sorted by name; none if there is no folder.
    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>, Refused>;

    /// What `PROGRAM --version` prints; `None` where the program is absent or belongs to another root.
    fn version_of(&self, _program: &str) -> Option<String> {
        None
    }
}

/// A host on which nothing is configured.
pub(super) struct Nothing;

impl Files for Nothing {
    fn read(&self, _: &Path) -> Result<Option<Vec<u8>>, Refused> {
        Ok(None)
    }

    fn list(&self, _: &Path) -> Result<Vec<PathBuf>, Refused> {
        Ok(Vec::new())
    }
}

/// A file as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Where.
    pub path: PathBuf,
    /// What it holds.
    pub bytes: Vec<u8>,
}

/// What should be on the disk, and what else there is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The files.
    pub files: Vec<Wanted>,
    /// What has to be done by hand when something was changed, one sentence each.
    pub by_hand: Vec<String>,
    /// What is worth knowing either way.
    pub notes: Vec<String>,
}

impl Plan {
    pub(super) fn file(&mut self, path: impl Into<PathBuf>, bytes: impl Into<Vec<u8>>) {
        self.files.push(Wanted {
            path: path.into(),
            bytes: bytes.into(),
        });
    }

    pub(super) fn by_hand(&mut self, what: impl Into<String>) {
        self.by_hand.push(what.into());
    }

    pub(super) fn note(&mut self, what: impl Into<String>) {
        self.notes.push(what.into());
    }
}
