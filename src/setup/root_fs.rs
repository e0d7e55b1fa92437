//! Files below a root folder, written atomically.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::SetupError;
use super::plan::FileSource;

/// Maximum size of a file that is read or written.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The folder that stands for `/`, for images and tests.
#[derive(Clone, Debug)]
pub struct RootFs(PathBuf);

/// A file: content, mode and owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stored {
    #[serde(rename = "base64", with = "super::journal::in_base64")]
    pub(super) bytes: Vec<u8>,
    #[serde(flatten)]
    pub(super) owner: Owner,
}

/// Owner and mode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl RootFs {
    /// Opens the folder at `path`, which must exist.
    pub fn open(path: &Path) -> Result<Self, SetupError> {
        let opened = fs::canonicalize(path);
        opened
            .map(Self)
            .map_err(SetupError::file("failed to use as --root", path))
    }

    /// Whether this is `/` of the machine. Only there commands are run and processes notified.
    pub fn is_real(&self) -> bool {
        self.0 == Path::new("/")
    }

    /// The location of `path`, which is absolute as the client sees it.
    pub fn resolve(&self, path: &Path) -> PathBuf {
        let below = path
            .components()
            .filter(|part| matches!(part, Component::Normal(_)));
        self.0.join(below.collect::<PathBuf>())
    }

    /// Resolves symbolic links: the link stays, its target is read and written.
    pub(super) fn target(&self, path: &Path) -> Result<PathBuf, SetupError> {
        let full_path = self.resolve(path);
        let outside = || SetupError::OutsideRoot(full_path.clone());
        // Resolve the deepest existing part; missing parts below it are created.
        let mut existing = full_path.as_path();
        let mut missing = Vec::new();
        while let Err(error) = fs::symlink_metadata(existing) {
            if error.kind() != io::ErrorKind::NotFound {
                return Err(SetupError::file("failed to read", existing)(error));
            }
            let (Some(parent), Some(name)) = (existing.parent(), existing.file_name()) else {
                return Err(outside());
            };
            missing.push(name);
            existing = parent;
        }
        let mut target = fs::canonicalize(existing).map_err(|_| outside())?;
        if !target.starts_with(&self.0) {
            return Err(outside());
        }
        target.extend(missing.iter().rev());
        Ok(target)
    }

    /// Reads a file with its owner.
    pub(super) fn load(&self, path: &Path) -> Result<Option<Stored>, SetupError> {
        let target = self.target(path)?;
        let load = || {
            let metadata = fs::metadata(&target)?;
            check_size(metadata.len())?;
            let owner = Owner {
                mode: metadata.permissions().mode() & 0o7777,
                uid: metadata.uid(),
                gid: metadata.gid(),
            };
            let bytes = fs::read(&target)?;
            Ok(Stored { bytes, owner })
        };
        present(load()).map_err(SetupError::file("failed to read", &target))
    }

    /// Writes a file atomically: temporary file, sync, rename. Creates missing folders.
    pub(super) fn write(&self, path: &Path, bytes: &[u8], owner: Option<Owner>) -> Result<(), SetupError> {
        let target = self.target(path)?;
        let folder = target.parent().unwrap_or(&self.0);
        fs::create_dir_all(folder).map_err(SetupError::file("failed to create the folder", folder))?;
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".ifnewer-new");
        let temporary = target.with_file_name(name);
        let written = write_new(&temporary, bytes, owner).and_then(|()| fs::rename(&temporary, &target));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written.map_err(SetupError::file("failed to write", &target))?;
        sync(folder)
    }

    /// Removes a file if it exists.
    pub(super) fn remove(&self, path: &Path) -> Result<(), SetupError> {
        let target = self.target(path)?;
        match present(fs::remove_file(&target)).map_err(SetupError::file("failed to remove", &target))? {
            Some(()) => sync(target.parent().unwrap_or(&self.0)),
            None => Ok(()),
        }
    }

    /// Missing parent folders of `path`.
    pub(super) fn missing_folders(&self, path: &Path) -> impl Iterator<Item = PathBuf> {
        let folders = path.ancestors().skip(1);
        folders
            .take_while(|folder| !self.resolve(folder).exists())
            .map(Path::to_owned)
    }

    /// Removes those of the folders that are empty.
    pub(super) fn remove_empty(&self, folders: &BTreeSet<PathBuf>) {
        for target in folders.iter().rev().filter_map(|folder| self.target(folder).ok()) {
            let _ = fs::remove_dir(target);
        }
    }
}

impl FileSource for RootFs {
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, SetupError> {
        Ok(self.load(path)?.map(|stored| stored.bytes))
    }

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>, SetupError> {
        let full_path = self.resolve(folder);
        let entries = present(fs::read_dir(&full_path)).and_then(|entries| {
            let entries = entries.into_iter().flatten();
            entries.collect::<io::Result<Vec<_>>>()
        });
        let entries = entries.map_err(SetupError::file("failed to read", &full_path))?;
        let files = entries.iter().filter(|entry| entry.path().is_file());
        let mut paths: Vec<_> = files.map(|entry| folder.join(entry.file_name())).collect();
        paths.sort();
        Ok(paths)
    }

    fn version_of(&self, program: &str) -> Option<String> {
        if !self.is_real() {
            return None;
        }
        let output = Command::new(program).arg("--version").output().ok()?;
        String::from_utf8(output.stdout).ok()
    }
}

/// `None` for what does not exist.
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

fn check_size(bytes: u64) -> io::Result<()> {
    if bytes > FILE_BYTES_MAX {
        return Err(io::Error::other("the file is too large for a configuration"));
    }
    Ok(())
}

fn write_new(path: &Path, bytes: &[u8], owner: Option<Owner>) -> io::Result<()> {
    check_size(bytes.len() as u64)?;
    // Left by an interrupted write, or a symbolic link by which a container's user leads root out of --root.
    present(fs::remove_file(path))?;
    // O_EXCL follows no link. The mode is restricted, because the file may contain credentials.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    if let Some(owner) = owner {
        let existing = file.metadata()?;
        if (existing.uid(), existing.gid()) != (owner.uid, owner.gid) {
            fchown(&file, Some(owner.uid), Some(owner.gid))?;
        }
    }
    file.set_permissions(Permissions::from_mode(owner.map_or(0o644, |owner| owner.mode)))?;
    file.sync_all()
}

fn sync(folder: &Path) -> Result<(), SetupError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(SetupError::file("failed to sync", folder))
}
