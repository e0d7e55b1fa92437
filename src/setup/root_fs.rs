//! Files below a root folder, written atomically.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use super::SetupError;
use super::plan::FileSource;

/// Maximum size of a configuration file.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The folder that stands for `/`, for images and tests.
#[derive(Clone, Debug)]
pub struct RootFs(PathBuf);

/// Owner and mode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Owner {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl RootFs {
    /// Opens the folder at `path`, which must exist.
    pub fn open(path: &Path) -> Result<Self, SetupError> {
        match fs::canonicalize(path) {
            Ok(path) => Ok(Self(path)),
            Err(error) => Err(SetupError::file("failed to use as --root", path, error)),
        }
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
        let outside = || SetupError::OutsideRoot {
            path: full_path.clone(),
        };
        // Resolve the deepest existing part; missing parts below it are created.
        let mut existing = full_path.as_path();
        let mut missing = Vec::new();
        loop {
            match fs::symlink_metadata(existing) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(SetupError::file("failed to read", existing, error)),
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

    /// Owner of an existing file.
    pub(super) fn owner(&self, path: &Path) -> Result<Option<Owner>, SetupError> {
        let target = self.target(path)?;
        match fs::metadata(&target) {
            Ok(metadata) => Ok(Some(Owner {
                mode: metadata.permissions().mode() & 0o7777,
                uid: metadata.uid(),
                gid: metadata.gid(),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(SetupError::file("failed to read", &target, error)),
        }
    }

    /// Writes a file atomically: temporary file, sync, rename. Creates missing folders.
    pub(super) fn write(&self, path: &Path, bytes: &[u8], owner: Option<Owner>) -> Result<(), SetupError> {
        let target = self.target(path)?;
        let folder = target.parent().unwrap_or(&self.0);
        fs::create_dir_all(folder)
            .map_err(|error| SetupError::file("failed to create the folder", folder, error))?;
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".ifnewer-new");
        let temporary = target.with_file_name(name);
        let written = write_new(&temporary, bytes, owner).and_then(|()| fs::rename(&temporary, &target));
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            return Err(SetupError::file("failed to write", &target, error));
        }
        sync(folder)
    }

    /// Removes a file if it exists.
    pub(super) fn remove(&self, path: &Path) -> Result<(), SetupError> {
        let target = self.target(path)?;
        match fs::remove_file(&target) {
            Ok(()) => sync(target.parent().unwrap_or(&self.0)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(SetupError::file("failed to remove", &target, error)),
        }
    }

    /// Missing parent folders of `path`, outermost first.
    pub(super) fn missing_folders(&self, path: &Path) -> Vec<PathBuf> {
        let mut missing: Vec<PathBuf> = path
            .ancestors()
            .skip(1)
            .take_while(|folder| !self.resolve(folder).exists())
            .map(Path::to_owned)
            .collect();
        missing.reverse();
        missing
    }

    /// Removes a folder if it is empty.
    pub(super) fn remove_folder(&self, folder: &Path) {
        if let Ok(target) = self.target(folder) {
            let _ = fs::remove_dir(target);
        }
    }
}

impl FileSource for RootFs {
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, SetupError> {
        let target = self.target(path)?;
        let read = fs::metadata(&target).and_then(|metadata| {
            if metadata.len() > FILE_BYTES_MAX {
                return Err(io::Error::other("the file is too large for a configuration"));
            }
            fs::read(&target)
        });
        match read {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(SetupError::file("failed to read", &target, error)),
        }
    }

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>, SetupError> {
        let full_path = self.resolve(folder);
        let entries = match fs::read_dir(&full_path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(SetupError::file("failed to read", &full_path, error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| SetupError::file("failed to read", &full_path, error))?;
            if entry.path().is_file() {
                found.push(folder.join(entry.file_name()));
            }
        }
        found.sort();
        Ok(found)
    }

    fn version_of(&self, program: &str) -> Option<String> {
        if !self.is_real() {
            return None;
        }
        let output = Command::new(program).arg("--version").output().ok()?;
        String::from_utf8(output.stdout).ok()
    }
}

fn write_new(path: &Path, bytes: &[u8], owner: Option<Owner>) -> io::Result<()> {
    // Created with restricted mode, because the file may contain credentials.
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    if let Some(owner) = owner {
        let existing = file.metadata()?;
        if (existing.uid(), existing.gid()) != (owner.uid, owner.gid) {
            chown(path, Some(owner.uid), Some(owner.gid))?;
        }
    }
    file.set_permissions(Permissions::from_mode(owner.map_or(0o644, |owner| owner.mode)))?;
    file.sync_all()
}

fn sync(folder: &Path) -> Result<(), SetupError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| SetupError::file("failed to sync", folder, error))
}
