//! The file operations that the store needs, and nothing else: the seam at which tests replace the disk.
//!
//! Paths are relative to the file system. [`DirectoryFs`] is a folder of this machine; [`MemoryFs`] forgets everything at the
//! end of the process and serves tests.

mod directory;
pub(super) mod disk_errors;
mod memory;
pub(super) mod monitored;
pub(super) mod timed;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use tokio::runtime::{Handle, RuntimeFlavor};

pub use directory::DirectoryFs;
pub use memory::MemoryFs;

/// Where files are written before they get their name. What is there when the store is opened is removed, but for
/// ingests that can be continued.
pub const INGEST_DIR: &str = "ingest";

/// How many names are tried for a file that has none yet. Only leftovers that could not be removed are in the way.
const TEMP_NAME_TRIES_MAX: u32 = 64;

/// One entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name within the folder.
    pub name: String,
    /// Whether it is itself a folder.
    pub is_folder: bool,
    /// Its size in bytes; 0 for a folder.
    pub size: u64,
    /// When it was last written, or said to have been used ([`FileSystem::set_modified`]), where the file system knows.
    pub modified: Option<SystemTime>,
}

/// A place for files. All paths are relative to it.
pub trait FileSystem: Send + Sync + 'static {
    /// The folder of this machine that it is, if it is one: the lock and the index live only in such.
    fn folder(&self) -> Option<&Path>;

    /// Makes a file that must not exist yet, for reading and writing; missing folders are made.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>>;

    /// Opens a file for reading.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>>;

    /// Opens a file for reading and writing. (Unless said otherwise, every opened file takes writes.)
    fn open_for_writing(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.open(path)
    }

    /// When a file was last written, where the file system keeps that.
    fn modified(&self, _path: &Path) -> io::Result<Option<SystemTime>> {
        Ok(None)
    }

    /// Appends `bytes` in one write and makes them durable; the file is made when it is missing.
    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Gives a file or folder another name, replacing a file of that name; missing folders are made.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes a folder and what is in it. One that is missing is no error.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// What is in a folder, ordered by name; nothing in one that is missing.
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>>;

    /// Sets the time that [`Entry::modified`] tells. Nobody relies on it: where a file system has no such times, nothing happens.
    fn set_modified(&self, _path: &Path, _at: SystemTime) -> io::Result<()> {
        Ok(())
    }

    /// The permission bits of a file, where the file system has such.
    fn mode(&self, path: &Path) -> io::Result<Option<u32>>;

    /// How many bytes may still be written.
    fn free_bytes(&self) -> io::Result<u64>;

    /// Writes a whole file under its name, durable but for the name itself: [`Self::sync_dir`] is still to be called.
    /// Whoever reads meanwhile finds the old content or the new, never a part.
    fn write_atomic(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let (unnamed, file) = create_temp(self)?;
        let written = file
            .reserve(bytes.len() as u64)
            .and_then(|()| file.write_at(bytes, 0));
        let placed = written
            .and_then(|()| file.sync())
            .and_then(|()| self.rename(&unnamed, path));
        if placed.is_err() {
            // The error that counts is the first; a leftover goes when the store is next opened.
            let _ = self.remove(&unnamed);
        }
        placed
    }

    /// [`Self::write_atomic`], and the name made durable too.
    fn write_durable(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.write_atomic(path, bytes)?;
        path.parent().map_or(Ok(()), |folder| self.sync_dir(folder))
    }

    /// Reads a whole file of at most `bytes_max`; a longer one is [`io::ErrorKind::FileTooLarge`].
    fn read_file(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        let file = self.open(path)?;
        read_all(file.as_ref(), bytes_max)
    }
}

/// A file of a [`FileSystem`]. Reads and writes name their offset, so a handle can be shared.
pub trait FsFile: Send + Sync {
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Reads at `offset`; 0 at the end of the file. May read less than asked for.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Reads what is in memory already; [`io::ErrorKind::WouldBlock`] when the disk would have to be waited for, or
    /// where the system cannot tell.
    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The size in bytes.
    fn size(&self) -> io::Result<u64>;

    /// Makes the content durable. The first error is final: the kernel may report it once only.
    fn sync(&self) -> io::Result<()>;

    /// Reserves room for `bytes`, so that a full disk shows before the first byte. Where a file system cannot, it says
    /// yes; only a full one is an error.
    fn reserve(&self, bytes: u64) -> io::Result<()>;

    /// Takes away the permission to write.
    fn make_read_only(&self) -> io::Result<()>;
}

/// Reads a whole open file of at most `bytes_max`.
pub(super) fn read_all(file: &dyn FsFile, bytes_max: u64) -> io::Result<Vec<u8>> {
    let size = file.size()?;
    if size > bytes_max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(|_| io::ErrorKind::FileTooLarge)?];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// A name that no other file of this process has, below [`INGEST_DIR`].
pub(super) fn temp_path() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    Path::new(INGEST_DIR).join(format!("{:08x}", NEXT.fetch_add(1, Ordering::Relaxed)))
}

fn create_temp<V: FileSystem + ?Sized>(fs: &V) -> io::Result<(PathBuf, Arc<dyn FsFile>)> {
    let mut last = io::ErrorKind::AlreadyExists.into();
    for _ in 0..TEMP_NAME_TRIES_MAX {
        let path = temp_path();
        match fs.create(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// Panics, in debug builds, on a worker of the server's runtime: a call that may block would stop every task there. All
/// tests of the whole program run with it. A runtime of a single thread, as unit tests have, is let pass.
#[inline]
pub(in crate::store) fn assert_may_block() {
    if cfg!(debug_assertions) {
        let flavor = Handle::try_current().map(|runtime| runtime.runtime_flavor());
        if !matches!(flavor, Ok(RuntimeFlavor::CurrentThread)) {
            let lock = tokio::sync::Mutex::new(());
            // Tokio refuses this on its workers, and nowhere else.
            drop(lock.blocking_lock());
        }
    }
}
