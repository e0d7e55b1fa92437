//! File system wrapper that tracks disk health and pending operations, and counts I/O errors.
//!
//! It does not change behaviour: every write is still tried, and its caller gets the error. The wrapper lets the
//! operator see one log line per disk failure instead of one per pull.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::assert_may_block;
use super::disk_errors::{DiskErrors, IoOperation};
use super::pending::PendingIo;
use super::{Entry, FileSystem, FsFile};
use crate::store::StoreError;

/// File written to test whether the disk is writable again. It is removed at once.
const PROBE: &str = "probe";
const PROBE_BYTES: [u8; 4096] = [0; 4096];

/// Last write failure of the disk.
#[derive(Clone, Default)]
pub(in crate::store) struct DiskHealth(Arc<DiskState>);

#[derive(Default)]
struct DiskState {
    last: Mutex<Option<StoreError>>,
    is_failing: AtomicBool,
}

impl DiskHealth {
    /// Returns whether writes fail. One atomic load, cheap enough for every read.
    pub(in crate::store) fn is_failing(&self) -> bool {
        self.0.is_failing.load(Ordering::Relaxed)
    }

    /// The last write error, until a write succeeds again.
    pub(in crate::store) fn last_error(&self) -> Option<StoreError> {
        self.0.last.lock().clone()
    }

    fn note(&self, what: &'static str, path: &Path, error: &io::Error) {
        if !is_disk_failure(error) {
            return;
        }
        let fault = StoreError::io(what, path, error);
        let before = self.0.last.lock().replace(fault.clone());
        self.0.is_failing.store(true, Ordering::Relaxed);
        if before.is_none() {
            tracing::error!(%fault, "disk is not writable, serving stored content and forwarding the rest");
        }
    }

    fn recovered(&self) {
        self.0.is_failing.store(false, Ordering::Relaxed);
        if self.0.last.lock().take().is_some() {
            tracing::info!("disk is writable again");
        }
    }
}

/// Returns whether the error affects the disk and not a single file: full, read-only, failing, or out of file
/// handles.
fn is_disk_failure(error: &io::Error) -> bool {
    let numbers = [Errno::IO, Errno::MFILE, Errno::NFILE, Errno::NODEV, Errno::STALE];
    let numbers = numbers.map(Errno::raw_os_error);
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::OutOfMemory
    ) || error
        .raw_os_error()
        .is_some_and(|number| numbers.contains(&number))
}

/// A file-system operation.
struct Operation {
    /// Its name while it is pending. `None` if it may take long, as one that removes many files.
    pending: Option<&'static str>,
    /// Its error counter.
    counter: Option<IoOperation>,
    /// What a failure prevented, if that concerns the health of the disk.
    what: Option<&'static str>,
}

const fn reading(pending: &'static str, counter: IoOperation) -> Operation {
    Operation {
        pending: Some(pending),
        counter: Some(counter),
        what: None,
    }
}

const fn writing(pending: &'static str, counter: IoOperation, what: &'static str) -> Operation {
    Operation {
        pending: Some(pending),
        counter: Some(counter),
        what: Some(what),
    }
}

const fn uncounted(pending: &'static str) -> Operation {
    Operation {
        pending: Some(pending),
        counter: None,
        what: None,
    }
}

const REMOVE_ALL: Operation = Operation {
    pending: None,
    counter: Some(IoOperation::Remove),
    what: Some("remove"),
};

/// What the operations of a file system and its open files report to.
#[derive(Clone)]
struct Monitor {
    health: DiskHealth,
    pending: PendingIo,
    errors: DiskErrors,
}

impl Monitor {
    fn run<T>(
        &self,
        operation: &Operation,
        path: &Path,
        work: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        assert_may_block();
        let done = match operation.pending {
            Some(pending) => self.pending.run(pending, work),
            None => work(),
        };
        done.inspect_err(|error| {
            if let Some(counter) = operation.counter {
                self.errors.note(counter, path, error);
            }
            if let Some(what) = operation.what {
                self.health.note(what, path, error);
            }
        })
    }
}

/// A file system that tracks the disk.
pub(in crate::store) struct MonitoredFs {
    inner: Arc<dyn FileSystem>,
    monitor: Monitor,
}

impl MonitoredFs {
    pub(in crate::store) fn new(
        inner: Arc<dyn FileSystem>,
        health: &DiskHealth,
        pending: &PendingIo,
    ) -> Self {
        let monitor = Monitor {
            health: health.clone(),
            pending: pending.clone(),
            errors: DiskErrors::default(),
        };
        Self { inner, monitor }
    }

    /// Errors since the start, by operation.
    pub(in crate::store) fn errors(&self) -> Vec<(&'static str, u64)> {
        self.monitor.errors.totals()
    }

    /// If writes have failed, tests whether the disk is writable again.
    pub(in crate::store) fn probe(&self) {
        if self.monitor.health.last_error().is_none() {
            return;
        }
        let path = Path::new(PROBE);
        // Written through the wrapper, so a new error replaces the old one.
        let written = self.write_atomic(path, &PROBE_BYTES);
        let removed = self.remove(path);
        if written.is_ok() && removed.is_ok() {
            self.monitor.health.recovered();
        }
    }

    fn open_with(
        &self,
        operation: &Operation,
        path: &Path,
        open: impl FnOnce() -> io::Result<Arc<dyn FsFile>>,
    ) -> io::Result<Arc<dyn FsFile>> {
        Ok(Arc::new(MonitoredFile {
            inner: self.monitor.run(operation, path, open)?,
            path: path.to_owned(),
            monitor: self.monitor.clone(),
        }))
    }
}

impl FileSystem for MonitoredFs {
    fn folder(&self) -> Option<&Path> {
        self.inner.folder()
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let operation = writing("create", IoOperation::Write, "create");
        self.open_with(&operation, path, || self.inner.create(path))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let operation = reading("open", IoOperation::Open);
        self.open_with(&operation, path, || self.inner.open(path))
    }

    fn open_for_writing(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let operation = writing("open", IoOperation::Open, "open");
        self.open_with(&operation, path, || self.inner.open_for_writing(path))
    }

    fn modified(&self, path: &Path) -> io::Result<Option<SystemTime>> {
        self.monitor
            .run(&uncounted("stat"), path, || self.inner.modified(path))
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let operation = writing("append", IoOperation::Write, "append to");
        self.monitor
            .run(&operation, path, || self.inner.append(path, bytes))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let operation = writing("rename", IoOperation::Rename, "rename a file to");
        self.monitor.run(&operation, to, || self.inner.rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let operation = writing("remove", IoOperation::Remove, "remove");
        self.monitor.run(&operation, path, || self.inner.remove(path))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.monitor
            .run(&REMOVE_ALL, path, || self.inner.remove_dir_all(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let operation = writing("fsync", IoOperation::Sync, "fsync");
        self.monitor.run(&operation, path, || self.inner.sync_dir(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let operation = reading("list", IoOperation::List);
        self.monitor.run(&operation, path, || self.inner.list(path))
    }

    fn set_modified(&self, path: &Path, at: SystemTime) -> io::Result<()> {
        self.monitor
            .run(&uncounted("touch"), path, || self.inner.set_modified(path, at))
    }

    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        self.monitor
            .run(&uncounted("stat"), path, || self.inner.mode(path))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.monitor
            .run(&uncounted("statfs"), Path::new(""), || self.inner.free_bytes())
    }
}

/// An open file that tracks the disk.
struct MonitoredFile {
    inner: Arc<dyn FsFile>,
    path: PathBuf,
    monitor: Monitor,
}

impl MonitoredFile {
    fn run<T>(&self, operation: &Operation, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.monitor.run(operation, &self.path, work)
    }
}

impl FsFile for MonitoredFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let operation = writing("write", IoOperation::Write, "write");
        self.run(&operation, || self.inner.write_at(bytes, offset))
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let operation = reading("read", IoOperation::Read);
        self.run(&operation, || self.inner.read_at(into, offset))
    }

    /// Never waits for the disk.
    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let read = self.inner.read_at_nowait(into, offset);
        read.inspect_err(|error| self.monitor.errors.note(IoOperation::Read, &self.path, error))
    }

    fn size(&self) -> io::Result<u64> {
        let operation = reading("stat", IoOperation::Read);
        self.run(&operation, || self.inner.size())
    }

    fn sync(&self) -> io::Result<()> {
        let operation = writing("fsync", IoOperation::Sync, "fsync");
        self.run(&operation, || self.inner.sync())
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        let operation = writing("fallocate", IoOperation::Write, "reserve space for");
        self.run(&operation, || self.inner.reserve(bytes))
    }

    fn release_reserved(&self) -> io::Result<()> {
        let operation = writing("ftruncate", IoOperation::Write, "release space of");
        self.run(&operation, || self.inner.release_reserved())
    }

    fn make_read_only(&self) -> io::Result<()> {
        let operation = writing("chmod", IoOperation::Write, "make read-only");
        self.run(&operation, || self.inner.make_read_only())
    }

    /// Not pending: its caller makes sure that the page cache has the bytes.
    fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<usize> {
        self.inner.send_to(socket, offset, length).inspect_err(|error| {
            // Other errors are the socket's.
            if error.raw_os_error() == Some(Errno::IO.raw_os_error()) {
                self.monitor.errors.note(IoOperation::Read, &self.path, error);
            }
        })
    }
}
