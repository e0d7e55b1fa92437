//! Open blob handle that records read errors of the disk.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use std::time::Duration;

use rustix::io::Errno;
use tokio::time::Instant;

use super::fs::{FsFile, read_all};

/// How long a blob counts as verified after it was written. Its bytes are in the page cache at first. Later a reader gets
/// what the disk returns.
const WRITTEN_TRUST: Duration = Duration::from_secs(600);

/// An open blob. Stays readable while in use, also if the blob is removed.
#[derive(Clone)]
pub struct BlobHandle {
    /// In bytes.
    pub size: u64,
    /// The open file.
    pub file: Arc<dyn FsFile>,
    is_unreadable: Arc<AtomicBool>,
    /// When its bytes had been verified while they were written.
    written_at: Option<Instant>,
}

impl BlobHandle {
    /// A file that was found on the disk.
    pub(super) fn found(size: u64, file: Arc<dyn FsFile>) -> Self {
        Self::new(size, file, None)
    }

    /// A file whose bytes were verified while they were written, until `now`.
    pub(super) fn written(size: u64, file: Arc<dyn FsFile>, now: Instant) -> Self {
        Self::new(size, file, Some(now))
    }

    fn new(size: u64, file: Arc<dyn FsFile>, written_at: Option<Instant>) -> Self {
        let is_unreadable = Arc::new(AtomicBool::new(false));
        let file = Arc::new(BlobFile {
            file,
            is_unreadable: Arc::clone(&is_unreadable),
        });
        Self {
            size,
            file,
            is_unreadable,
            written_at,
        }
    }

    /// Whether its bytes were verified a short time before `now`, so that reading them need not verify them again.
    pub fn is_verified(&self, now: Instant) -> bool {
        self.written_at
            .is_some_and(|at| now.saturating_duration_since(at) < WRITTEN_TRUST)
    }

    /// The complete blob, if it has at most `bytes_max`.
    pub fn read_all(&self, bytes_max: u64) -> io::Result<Vec<u8>> {
        read_all(self.file.as_ref(), bytes_max)
    }

    /// Whether a read failed with an I/O error. A retry would fail too.
    pub(super) fn is_unreadable(&self) -> bool {
        self.is_unreadable.load(Ordering::Relaxed)
    }
}

/// Records an I/O error for later callers.
struct BlobFile {
    file: Arc<dyn FsFile>,
    is_unreadable: Arc<AtomicBool>,
}

impl BlobFile {
    fn note_io_error<T>(&self, read: io::Result<T>) -> io::Result<T> {
        read.inspect_err(|error| {
            if error.raw_os_error() == Some(Errno::IO.raw_os_error()) {
                self.is_unreadable.store(true, Ordering::Relaxed);
            }
        })
    }
}

impl FsFile for BlobFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.note_io_error(self.file.read_at(into, offset))
    }

    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.note_io_error(self.file.read_at_nowait(into, offset))
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.file.reserve(bytes)
    }

    fn make_read_only(&self) -> io::Result<()> {
        self.file.make_read_only()
    }

    fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<usize> {
        self.note_io_error(self.file.send_to(socket, offset, length))
    }
}

impl fmt::Debug for BlobHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobHandle")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::fs::{FileSystem, MemoryFs};
    use std::path::Path;

    /// A file whose bytes from the fifth on are unreadable.
    struct Bad(Arc<dyn FsFile>);

    impl FsFile for Bad {
        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
            self.0.write_at(bytes, offset)
        }
        fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
            match offset {
                0..5 => self.0.read_at(into, offset),
                _ => Err(Errno::IO.into()),
            }
        }
        fn read_at_nowait(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
        fn size(&self) -> io::Result<u64> {
            self.0.size()
        }
        fn sync(&self) -> io::Result<()> {
            self.0.sync()
        }
        fn reserve(&self, bytes: u64) -> io::Result<()> {
            self.0.reserve(bytes)
        }
        fn make_read_only(&self) -> io::Result<()> {
            self.0.make_read_only()
        }
    }

    #[test]
    fn only_an_io_error_marks_a_blob_unreadable() {
        let file = MemoryFs::new().create(Path::new("file")).unwrap();
        file.write_at(b"0123456789", 0).unwrap();
        let held = BlobHandle::found(10, Arc::new(Bad(file)));
        assert!(held.file.read_at_nowait(&mut [0], 7).is_err());
        assert!(held.file.read_at(&mut [0], 0).is_ok());
        assert!(!held.is_unreadable());
        assert!(held.file.read_at(&mut [0], 7).is_err());
        assert!(held.is_unreadable());
    }
}
