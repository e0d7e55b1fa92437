//! File system trait of the store. Tests replace the disk here.
//!
//! All paths are relative to the root. [`DirectoryFs`] is a local folder; [`MemoryFs`] serves tests.

mod directory;
pub(super) mod disk_errors;
mod memory;
pub(super) mod monitored;
pub(super) mod pending;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::net::SendFlags;
use tokio::runtime::{Handle, RuntimeFlavor};

pub use directory::DirectoryFs;
pub use memory::MemoryFs;

/// Folder for files that do not have their final name yet. When the store is opened, its content is removed, except
/// for resumable partial downloads.
pub const INGEST_DIR: &str = "ingest";

/// Attempts to find an unused temporary name. Only files that a crash left behind are in the way.
const TEMP_NAME_TRIES_MAX: u32 = 64;

/// One entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name within the folder.
    pub name: String,
    /// Whether it is a folder.
    pub is_folder: bool,
    /// Its size in bytes; 0 for a folder.
    pub size: u64,
    /// Modification time, or the last access set with [`FileSystem::set_modified`], if the file system records it.
    pub modified: Option<SystemTime>,
}

/// The file operations that the store needs. All paths are relative to the root.
pub trait FileSystem: Send + Sync + 'static {
    /// The local folder, if this is one. The lock and the index need a local folder.
    fn folder(&self) -> Option<&Path>;

    /// Creates a file for reading and writing, which must not exist. Creates missing parent folders.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>>;

    /// Opens a file for reading.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>>;

    /// Opens a file for reading and writing. By default every open file is writable.
    fn open_for_writing(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.open(path)
    }

    /// Modification time of a file, if the file system records it.
    fn modified(&self, _path: &Path) -> io::Result<Option<SystemTime>> {
        Ok(None)
    }

    /// Appends `bytes` in one write and fsyncs them. Creates the file if it is missing.
    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Renames a file or folder and replaces an existing file. Creates missing parent folders.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes a folder and its content. A missing folder is not an error.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Fsyncs a folder, so that its names are durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Lists a folder, sorted by name. A missing folder is empty.
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>>;

    /// Sets the time that [`Entry::modified`] returns. Does nothing if the file system does not record it.
    fn set_modified(&self, _path: &Path, _at: SystemTime) -> io::Result<()> {
        Ok(())
    }

    /// The permission bits of a file, if the file system has them.
    fn mode(&self, path: &Path) -> io::Result<Option<u32>>;

    /// Free space in bytes.
    fn free_bytes(&self) -> io::Result<u64>;

    /// Replaces a file atomically with fsynced content. The name itself is not durable before [`Self::sync_dir`]. A
    /// concurrent reader sees the old content or the new one, never a mixture.
    fn write_atomic(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let (unnamed, file) = create_temp(self)?;
        let written = file
            .reserve(bytes.len() as u64)
            .and_then(|()| file.write_at(bytes, 0));
        let placed = written
            .and_then(|()| file.sync())
            .and_then(|()| self.rename(&unnamed, path));
        if placed.is_err() {
            // Report the first error. The temporary file is removed when the store is next opened.
            let _ = self.remove(&unnamed);
        }
        placed
    }

    /// [`Self::write_atomic`], then fsyncs the folder.
    fn write_durable(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.write_atomic(path, bytes)?;
        path.parent().map_or(Ok(()), |folder| self.sync_dir(folder))
    }

    /// Reads a file of at most `bytes_max`. A longer one is [`io::ErrorKind::FileTooLarge`].
    fn read_file(&self, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
        let file = self.open(path)?;
        read_all(file.as_ref(), bytes_max)
    }
}

/// An open file of a [`FileSystem`]. Reads and writes take an offset, so handles can be shared.
pub trait FsFile: Send + Sync {
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Reads at `offset`. Returns 0 at the end of the file. May read less than requested.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Reads from the page cache. Returns [`io::ErrorKind::WouldBlock`] if the read would wait for the disk, or if
    /// the system cannot tell.
    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;

    /// The size in bytes.
    fn size(&self) -> io::Result<u64>;

    /// Fsyncs the content. The first error is final, because the kernel may report it only once.
    fn sync(&self) -> io::Result<()>;

    /// Preallocates `bytes`, so that a full disk is detected before the first byte. Returns an error only if the
    /// disk is full. A file system without preallocation returns success.
    fn reserve(&self, bytes: u64) -> io::Result<()>;

    /// Frees space that was preallocated beyond the end of the file. By default there is none.
    fn release_reserved(&self) -> io::Result<()> {
        Ok(())
    }

    /// Removes the write permission.
    fn make_read_only(&self) -> io::Result<()>;

    /// Sends up to `length` bytes at `offset` to a socket. Returns the number of bytes sent, 0 at the end of the
    /// file, or [`io::ErrorKind::WouldBlock`] if the socket is full. Waits for the disk if the page cache does not
    /// have the bytes.
    fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<usize> {
        send_copy(self, socket, offset, length)
    }
}

/// Bytes copied by one [`send_copy`].
const SEND_COPY_BYTES_MAX: usize = 64 * 1024;

/// [`FsFile::send_to`] through user memory, for files without `sendfile(2)`.
fn send_copy<F: FsFile + ?Sized>(
    file: &F,
    socket: BorrowedFd<'_>,
    offset: u64,
    length: usize,
) -> io::Result<usize> {
    let mut bytes = vec![0; length.min(SEND_COPY_BYTES_MAX)];
    let read = file.read_at(&mut bytes, offset)?;
    match bytes.get(..read) {
        None | Some([]) => Ok(0),
        Some(bytes) => Ok(rustix::net::send(
            socket,
            bytes,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )?),
    }
}

/// Reads an open file of at most `bytes_max`.
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

/// A unique name within this process below [`INGEST_DIR`].
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

/// Panics in debug builds on a worker of the multi-threaded runtime, where a blocking call would stop all tasks of
/// that worker. All system tests run with this check. A single-threaded runtime, as in unit tests, is exempt.
#[inline]
pub(in crate::store) fn assert_may_block() {
    if cfg!(debug_assertions) {
        let flavor = Handle::try_current().map(|runtime| runtime.runtime_flavor());
        if !matches!(flavor, Ok(RuntimeFlavor::CurrentThread)) {
            let lock = tokio::sync::Mutex::new(());
            // Tokio panics here on a runtime worker, and only there.
            drop(lock.blocking_lock());
        }
    }
}
