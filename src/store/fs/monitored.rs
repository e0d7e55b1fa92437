//! File system wrapper that tracks disk health and counts I/O errors.
//!
//! It does not change behaviour: every write is still tried, and its caller gets the error. The wrapper lets the
//! operator see one log line per disk failure instead of one per pull.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::io::Errno;

use super::assert_may_block;
use super::disk_errors::{DiskErrors, IoOperation};
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
    fn lock(&self) -> MutexGuard<'_, Option<StoreError>> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether writes fail. One atomic load, cheap enough for every read.
    pub(in crate::store) fn is_failing(&self) -> bool {
        self.0.is_failing.load(Ordering::Relaxed)
    }

    /// The last write error, until a write succeeds again.
    pub(in crate::store) fn last_error(&self) -> Option<StoreError> {
        self.lock().clone()
    }

    fn note(&self, what: &'static str, path: &Path, error: &io::Error) {
        if !is_disk_failure(error) {
            return;
        }
        let fault = StoreError::io(what, path, error);
        let before = self.lock().replace(fault.clone());
        self.0.is_failing.store(true, Ordering::Relaxed);
        if before.is_none() {
            tracing::error!(%fault, "disk is not writable, serving stored content and forwarding the rest");
        }
    }

    fn recovered(&self) {
        self.0.is_failing.store(false, Ordering::Relaxed);
        if self.lock().take().is_some() {
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

/// A file system that tracks disk health.
pub(in crate::store) struct MonitoredFs {
    inner: Arc<dyn FileSystem>,
    health: DiskHealth,
    errors: DiskErrors,
}

impl MonitoredFs {
    pub(in crate::store) fn new(inner: Arc<dyn FileSystem>, health: &DiskHealth) -> Self {
        Self {
            inner,
            health: health.clone(),
            errors: DiskErrors::default(),
        }
    }

    /// Errors since the start, by operation.
    pub(in crate::store) fn errors(&self) -> Vec<(&'static str, u64)> {
        self.errors.totals()
    }

    /// If writes have failed, tests whether the disk is writable again.
    pub(in crate::store) fn probe(&self) {
        if self.health.last_error().is_none() {
            return;
        }
        let path = Path::new(PROBE);
        // Written through the wrapper, so a new error replaces the old one.
        let written = self.write_atomic(path, &PROBE_BYTES);
        let removed = self.remove(path);
        if written.is_ok() && removed.is_ok() {
            self.health.recovered();
        }
    }

    fn wrap(&self, path: &Path, inner: Arc<dyn FsFile>) -> Arc<dyn FsFile> {
        Arc::new(MonitoredFile {
            inner,
            path: path.to_owned(),
            health: self.health.clone(),
            errors: self.errors.clone(),
        })
    }

    fn record<T>(
        &self,
        (operation, what): (IoOperation, &'static str),
        path: &Path,
        done: io::Result<T>,
    ) -> io::Result<T> {
        done.inspect_err(|error| {
            self.errors.note(operation, path, error);
            self.health.note(what, path, error);
        })
    }

    fn count<T>(&self, operation: IoOperation, path: &Path, done: io::Result<T>) -> io::Result<T> {
        done.inspect_err(|error| self.errors.note(operation, path, error))
    }
}

impl FileSystem for MonitoredFs {
    fn folder(&self) -> Option<&Path> {
        self.inner.folder()
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        assert_may_block();
        let inner = self.record((IoOperation::Write, "create"), path, self.inner.create(path))?;
        Ok(self.wrap(path, inner))
    }

    fn open_for_writing(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        assert_may_block();
        let inner = self.record(
            (IoOperation::Open, "open"),
            path,
            self.inner.open_for_writing(path),
        )?;
        Ok(self.wrap(path, inner))
    }

    fn modified(&self, path: &Path) -> io::Result<Option<SystemTime>> {
        assert_may_block();
        self.inner.modified(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        assert_may_block();
        let inner = self.count(IoOperation::Open, path, self.inner.open(path))?;
        Ok(self.wrap(path, inner))
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        assert_may_block();
        self.record(
            (IoOperation::Write, "append to"),
            path,
            self.inner.append(path, bytes),
        )
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        assert_may_block();
        self.record(
            (IoOperation::Rename, "rename a file to"),
            to,
            self.inner.rename(from, to),
        )
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        assert_may_block();
        self.record((IoOperation::Remove, "remove"), path, self.inner.remove(path))
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        assert_may_block();
        self.record(
            (IoOperation::Remove, "remove"),
            path,
            self.inner.remove_dir_all(path),
        )
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        assert_may_block();
        self.record((IoOperation::Sync, "fsync"), path, self.inner.sync_dir(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        assert_may_block();
        self.count(IoOperation::List, path, self.inner.list(path))
    }

    fn set_modified(&self, path: &Path, at: SystemTime) -> io::Result<()> {
        assert_may_block();
        self.inner.set_modified(path, at)
    }

    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        assert_may_block();
        self.inner.mode(path)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        assert_may_block();
        self.inner.free_bytes()
    }
}

/// An open file that tracks disk health.
struct MonitoredFile {
    inner: Arc<dyn FsFile>,
    path: PathBuf,
    health: DiskHealth,
    errors: DiskErrors,
}

impl MonitoredFile {
    fn record<T>(
        &self,
        (operation, what): (IoOperation, &'static str),
        done: io::Result<T>,
    ) -> io::Result<T> {
        done.inspect_err(|error| {
            self.errors.note(operation, &self.path, error);
            self.health.note(what, &self.path, error);
        })
    }

    fn record_read<T>(&self, done: io::Result<T>) -> io::Result<T> {
        done.inspect_err(|error| self.errors.note(IoOperation::Read, &self.path, error))
    }
}

impl FsFile for MonitoredFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert_may_block();
        self.record((IoOperation::Write, "write"), self.inner.write_at(bytes, offset))
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        assert_may_block();
        self.record_read(self.inner.read_at(into, offset))
    }

    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.record_read(self.inner.read_at_nowait(into, offset))
    }

    fn size(&self) -> io::Result<u64> {
        assert_may_block();
        self.record_read(self.inner.size())
    }

    fn sync(&self) -> io::Result<()> {
        assert_may_block();
        self.record((IoOperation::Sync, "fsync"), self.inner.sync())
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        assert_may_block();
        self.record(
            (IoOperation::Write, "reserve space for"),
            self.inner.reserve(bytes),
        )
    }

    fn make_read_only(&self) -> io::Result<()> {
        assert_may_block();
        self.record(
            (IoOperation::Write, "make read-only"),
            self.inner.make_read_only(),
        )
    }

    fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<usize> {
        self.inner.send_to(socket, offset, length).inspect_err(|error| {
            // Other errors are the socket's.
            if error.raw_os_error() == Some(Errno::IO.raw_os_error()) {
                self.errors.note(IoOperation::Read, &self.path, error);
            }
        })
    }
}
