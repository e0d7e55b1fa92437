//! Local folder as a file system.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

#[cfg(target_os = "linux")]
use super::send_copy;
use super::{Entry, FileSystem, FsFile};
use crate::store::OpenError;

/// The data folder names the contents of private repositories, so only its owner may read it.
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
const READ_ONLY_MODE: u32 = 0o400;

/// A local folder as a [`FileSystem`].
#[derive(Debug)]
pub struct DirectoryFs {
    root: PathBuf,
}

impl DirectoryFs {
    /// Opens `root`, and creates it with mode 0700 if it is missing. An existing folder keeps its mode.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let root = root.into();
        match make_dir(&root) {
            Ok(()) if root.is_dir() => Ok(Self { root }),
            made => {
                let kind = made.map_or_else(|error| error.kind(), |()| io::ErrorKind::NotADirectory);
                // The topmost missing ancestor, or the ancestor that is not a folder.
                let above: Vec<_> = root.ancestors().filter(|path| !path.is_dir()).collect();
                let path = above
                    .last()
                    .map_or_else(|| root.clone(), |path| path.to_path_buf());
                Err(OpenError::Folder {
                    folder: root,
                    path,
                    kind,
                })
            }
        }
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    /// Runs `op`. If the parent folder of `path` is missing, creates it and runs `op` again.
    fn with_parent_dir<T>(path: &Path, op: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match op() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                path.parent().map_or(Ok(()), make_dir)?;
                op()
            }
            done => done,
        }
    }
}

/// Creates a folder and its ancestors. Fsyncs each parent, because a file in a folder that is not durable is lost
/// with the folder.
fn make_dir(path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    make_dir(parent)?;
    match DirBuilder::new().mode(DIR_MODE).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        Ok(()) => sync_dir_at(parent),
    }
}

fn sync_dir_at(path: &Path) -> io::Result<()> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    File::open(path)?.sync_all()
}

impl FileSystem for DirectoryFs {
    fn folder(&self) -> Option<&Path> {
        Some(&self.root)
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let path = self.at(path);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(FILE_MODE);
        let file = Self::with_parent_dir(&path, || options.open(&path))?;
        Ok(Arc::new(DirectoryFile(file)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        Ok(Arc::new(DirectoryFile(File::open(self.at(path))?)))
    }

    fn open_for_writing(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let file = OpenOptions::new().read(true).write(true).open(self.at(path))?;
        Ok(Arc::new(DirectoryFile(file)))
    }

    fn modified(&self, path: &Path) -> io::Result<Option<SystemTime>> {
        fs::metadata(self.at(path))?.modified().map(Some)
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let path = self.at(path);
        let mut options = OpenOptions::new();
        options.append(true).mode(FILE_MODE);
        let (mut file, is_new) = match options.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                options.create(true);
                (Self::with_parent_dir(&path, || options.open(&path))?, true)
            }
            opened => (opened?, false),
        };
        file.write_all(bytes)?;
        file.sync_data()?;
        if is_new {
            path.parent().map_or(Ok(()), sync_dir_at)
        } else {
            Ok(())
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (self.at(from), self.at(to));
        match fs::rename(&from, &to) {
            // The error does not say which path is missing. Create the target folder and try again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                to.parent().map_or(Ok(()), make_dir)?;
                fs::rename(&from, &to)
            }
            done => done,
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.at(path))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        match fs::remove_dir_all(self.at(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        sync_dir_at(&self.at(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let entries = match fs::read_dir(self.at(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            // Removed since it was listed, or a name that the store did not create.
            let (Ok(metadata), Ok(name)) = (entry.metadata(), entry.file_name().into_string()) else {
                continue;
            };
            let is_folder = metadata.is_dir();
            found.push(Entry {
                name,
                is_folder,
                size: if is_folder { 0 } else { metadata.len() },
                modified: metadata.modified().ok(),
            });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    fn set_modified(&self, path: &Path, at: SystemTime) -> io::Result<()> {
        // The owner may set the times of a read-only file without opening it for writing.
        File::open(self.at(path))?.set_modified(at)
    }

    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        Ok(Some(fs::metadata(self.at(path))?.permissions().mode() & 0o7777))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let status = rustix::fs::statvfs(&self.root)?;
        Ok(status.f_bavail.saturating_mul(status.f_frsize))
    }
}

struct DirectoryFile(File);

impl FsFile for DirectoryFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(into, offset)
    }

    #[cfg(target_os = "linux")]
    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        use rustix::io::{Errno, ReadWriteFlags, preadv2};
        let mut into = [io::IoSliceMut::new(into)];
        preadv2(&self.0, &mut into, offset, ReadWriteFlags::NOWAIT).map_err(|errno| match errno {
            // Not supported by this file system or kernel, or blocked by a sandbox.
            Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM | Errno::INVAL | Errno::INTR => {
                io::ErrorKind::WouldBlock.into()
            }
            errno => errno.into(),
        })
    }

    #[cfg(not(target_os = "linux"))]
    fn read_at_nowait(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    #[cfg(target_os = "linux")]
    fn reserve(&self, bytes: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        if bytes == 0 {
            return Ok(());
        }
        match fallocate(&self.0, FallocateFlags::KEEP_SIZE, 0, bytes) {
            Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::ROFS)) => Err(errno.into()),
            _ => Ok(()),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn reserve(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn release_reserved(&self) -> io::Result<()> {
        // Setting the size that it has frees the blocks beyond it.
        self.0.set_len(self.0.metadata()?.len())
    }

    fn make_read_only(&self) -> io::Result<()> {
        self.0.set_permissions(Permissions::from_mode(READ_ONLY_MODE))
    }

    #[cfg(target_os = "linux")]
    fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<usize> {
        use rustix::io::Errno;
        let mut position = offset;
        match rustix::fs::sendfile(socket, &self.0, Some(&mut position), length) {
            // This file system cannot map its files, or a sandbox forbids the call.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {
                send_copy(self, socket, offset, length)
            }
            sent => Ok(sent?),
        }
    }
}
