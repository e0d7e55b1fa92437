//! Index compaction. sled's file only grows, so an idle worker copies the live records to a new index, one page per
//! step, and then swaps the two.
//!
//! During the copy each write goes to both. After a crash at any time, the old index is at its path or beside it, where
//! [`recover`] finds it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Index, IndexError, SledIndex, disk, sync_paths};

/// A smaller file is not compacted.
pub(super) const FILE_BYTES_MIN: u64 = if cfg!(test) { 4 << 20 } else { 64 << 20 };

/// Largest ratio of file size to live bytes. sled's ratio starts at two.
const GROWTH_MAX: u64 = 4;

const PAGE: usize = 256;

pub(super) struct Compaction {
    folder: PathBuf,
    /// The last key read.
    after: Vec<u8>,
    live_bytes: u64,
    copy: Option<SledIndex>,
}

/// Result of a step.
pub(super) enum Next {
    Step,
    /// Everything is copied. Call [`Compaction::swap`].
    Swap,
    /// The file is small enough.
    NotNeeded,
}

impl Compaction {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            after: Vec::new(),
            live_bytes: 0,
            copy: None,
        }
    }

    /// Reads one page of `index`. The first pass measures the live bytes, the second copies them.
    pub(super) fn step(&mut self, index: &dyn Index) -> Result<Next, IndexError> {
        let page = index.scan(b"", &self.after, PAGE)?;
        let is_last = page.len() < PAGE;
        for (key, value) in page {
            match &mut self.copy {
                Some(copy) => copy.put(&key, &value)?,
                None => self.live_bytes += (key.len() + value.len()) as u64,
            }
            self.after = key;
        }
        match &mut self.copy {
            _ if !is_last => Ok(Next::Step),
            Some(copy) => copy.sync().map(|()| Next::Swap),
            None if index.file_bytes() / GROWTH_MAX <= self.live_bytes => Ok(Next::NotNeeded),
            None => {
                let aside = sibling(&self.folder, "new");
                remove(&aside)?;
                self.copy = Some(SledIndex::open(&aside)?.index);
                self.after.clear();
                Ok(Next::Step)
            }
        }
    }

    /// Repeats a write of the index on the copy; `None` removes the key.
    pub(super) fn write(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), IndexError> {
        match (&mut self.copy, value) {
            (None, _) => Ok(()),
            (Some(copy), Some(value)) => copy.put(key, value),
            (Some(copy), None) => copy.remove(key),
        }
    }

    /// Closes the copy. Its files are removed when the index is next opened.
    pub(super) fn abandon(self, fault: &IndexError) {
        if let Some(copy) = self.copy {
            Box::new(copy).abandon(fault);
        }
    }

    /// Replaces the closed index by the copy.
    pub(super) fn swap(mut self) -> Result<(), IndexError> {
        drop(self.copy.take());
        let (old, new) = (sibling(&self.folder, "old"), sibling(&self.folder, "new"));
        fs::rename(&self.folder, &old).map_err(disk)?;
        fs::rename(&new, &self.folder).map_err(disk)?;
        // Make the new names durable before the old content is removed.
        sync_paths(&self.folder)?;
        remove(&old)
    }
}

/// Completes or undoes an interrupted swap. Call before the index in `folder` is opened.
pub(super) fn recover(folder: &Path) -> Result<(), IndexError> {
    let old = sibling(folder, "old");
    if fs::symlink_metadata(folder).is_err() && fs::symlink_metadata(&old).is_ok() {
        fs::rename(&old, folder).map_err(disk)?;
    }
    remove(&old)?;
    remove(&sibling(folder, "new"))
}

fn remove(folder: &Path) -> Result<(), IndexError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk(error)),
        _ => Ok(()),
    }
}

fn sibling(folder: &Path, kind: &str) -> PathBuf {
    let mut aside = folder.as_os_str().to_owned();
    aside.push(".");
    aside.push(kind);
    aside.into()
}
