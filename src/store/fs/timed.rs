//! File-system wrapper that tracks pending operations. A disk that hangs returns no error, so only a pending operation
//! reveals it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::{Entry, FileSystem, FsFile};

/// An operation that takes longer is reported as a health issue.
const SLOW_AFTER: Duration = Duration::from_secs(3);

/// The pending operations. Cheap to clone.
#[derive(Clone, Default)]
pub(in crate::store) struct PendingIo(Arc<Mutex<PendingOperations>>);

#[derive(Default)]
struct PendingOperations {
    next: u64,
    /// Ordered by start.
    operations: BTreeMap<u64, (&'static str, Instant)>,
}

impl PendingIo {
    fn lock(&self) -> MutexGuard<'_, PendingOperations> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<T>(&self, operation: &'static str, work: impl FnOnce() -> T) -> T {
        let mut begun = self.lock();
        let id = begun.next;
        begun.next += 1;
        begun.operations.insert(id, (operation, Instant::now()));
        drop(begun);
        let _ended = PendingGuard { pending: self, id };
        work()
    }

    /// The oldest pending operation and its duration, if it is slow.
    pub(in crate::store) fn slow(&self, now: Instant) -> Option<(&'static str, Duration)> {
        let begun = self.lock();
        let (_, (operation, since)) = begun.operations.first_key_value()?;
        let took = now.saturating_duration_since(*since);
        (took >= SLOW_AFTER).then_some((operation, took))
    }
}

struct PendingGuard<'a> {
    pending: &'a PendingIo,
    id: u64,
}

impl Drop for PendingGuard<'_> {
    fn drop(&mut self) {
        self.pending.lock().operations.remove(&self.id);
    }
}

/// A file system that tracks its operations.
pub(in crate::store) struct TimedFs {
    inner: Arc<dyn FileSystem>,
    pending: PendingIo,
}

impl TimedFs {
    pub(in crate::store) fn new(inner: Arc<dyn FileSystem>, pending: &PendingIo) -> Self {
        Self {
            inner,
            pending: pending.clone(),
        }
    }

    fn wrap(&self, inner: Arc<dyn FsFile>) -> Arc<dyn FsFile> {
        Arc::new(TimedFile {
            inner,
            pending: self.pending.clone(),
        })
    }
}

impl FileSystem for TimedFs {
    fn folder(&self) -> Option<&Path> {
        self.inner.folder()
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let inner = self.pending.run("create", || self.inner.create(path))?;
        Ok(self.wrap(inner))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let inner = self.pending.run("open", || self.inner.open(path))?;
        Ok(self.wrap(inner))
    }

    fn open_for_writing(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let inner = self.pending.run("open", || self.inner.open_for_writing(path))?;
        Ok(self.wrap(inner))
    }

    fn modified(&self, path: &Path) -> io::Result<Option<SystemTime>> {
        self.pending.run("stat", || self.inner.modified(path))
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.pending.run("append", || self.inner.append(path, bytes))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.pending.run("rename", || self.inner.rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.pending.run("remove", || self.inner.remove(path))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        // Not tracked: it takes longer the more files there are.
        self.inner.remove_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.pending.run("fsync", || self.inner.sync_dir(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.pending.run("list", || self.inner.list(path))
    }

    fn set_modified(&self, path: &Path, at: SystemTime) -> io::Result<()> {
        self.pending.run("touch", || self.inner.set_modified(path, at))
    }

    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        self.pending.run("stat", || self.inner.mode(path))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.pending.run("statfs", || self.inner.free_bytes())
    }
}

struct TimedFile {
    inner: Arc<dyn FsFile>,
    pending: PendingIo,
}

impl FsFile for TimedFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.pending.run("write", || self.inner.write_at(bytes, offset))
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.pending.run("read", || self.inner.read_at(into, offset))
    }

    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        // Not tracked: it never waits for the disk.
        self.inner.read_at_nowait(into, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.pending.run("stat", || self.inner.size())
    }

    fn sync(&self) -> io::Result<()> {
        self.pending.run("fsync", || self.inner.sync())
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.pending.run("fallocate", || self.inner.reserve(bytes))
    }

    fn make_read_only(&self) -> io::Result<()> {
        self.pending.run("chmod", || self.inner.make_read_only())
    }

    fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<usize> {
        // Not tracked: its caller makes sure that the page cache has the bytes.
        self.inner.send_to(socket, offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e15_pending_io_reports_the_slowest_operation() {
        let (pending, start) = (PendingIo::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let seen = pending.run("open", || {
            pending.run("read", || pending.slow(after(3_600)));
            (pending.slow(start), pending.slow(after(3_600)))
        });
        let (at_once, later) = seen;
        assert_eq!(at_once, None);
        assert!(matches!(later, Some(("open", took)) if took > Duration::from_secs(3_000)));
        assert_eq!(pending.slow(after(3_600)), None, "it has ended");
    }
}
