//! A volume that is watched: notices when the disk refuses to be written, and finds out when it takes bytes again. Errors
//! of every kind are counted.
//!
//! Nothing is done differently meanwhile. Each write is still tried, and who tries is told; this is for the operator, who
//! should hear of it once and not for each pull.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::io::Errno;

use super::Fault;
use super::errors::{Errors, Operation};
use super::guard::assert_may_block;
use super::volume::{Entry, Volume, VolumeFile};

/// Written to find out whether the disk takes bytes again; never left there.
const PROBE: &str = "probe";
const PROBE_BYTES: [u8; 4096] = [0; 4096];

/// What the disk last refused.
#[derive(Clone, Default)]
pub(super) struct Refusal(Arc<Noted>);

#[derive(Default)]
struct Noted {
    last: Mutex<Option<Fault>>,
    is_any: AtomicBool,
}

impl Refusal {
    fn of(&self) -> MutexGuard<'_, Option<Fault>> {
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the disk refuses; cheap enough to ask at each read.
    pub(super) fn is_any(&self) -> bool {
        self.0.is_any.load(Ordering::Relaxed)
    }

    /// What the disk refuses, if it does.
    pub(super) fn now(&self) -> Option<Fault> {
        self.of().clone()
    }

    fn note(&self, what: &'static str, path: &Path, error: &io::Error) {
        if !is_the_disks(error) {
            return;
        }
        let fault = Fault::io(what, path, error);
        let before = self.of().replace(fault.clone());
        self.0.is_any.store(true, Ordering::Relaxed);
        if before.is_none() {
            tracing::error!(%fault, "the disk cannot be written; what is held is served, the rest passes through unstored");
        }
    }

    fn end(&self) {
        self.0.is_any.store(false, Ordering::Relaxed);
        if self.of().take().is_some() {
            tracing::info!("the disk can be written again");
        }
    }
}

/// Not the fault of a single file: full, read-only, failing, or out of handles.
fn is_the_disks(error: &io::Error) -> bool {
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

/// A volume whose refusals to write are noted.
pub(super) struct Watched {
    inner: Arc<dyn Volume>,
    refusal: Refusal,
    errors: Errors,
}

impl Watched {
    pub(super) fn new(inner: Arc<dyn Volume>, refusal: &Refusal) -> Self {
        Self {
            inner,
            refusal: refusal.clone(),
            errors: Errors::default(),
        }
    }

    /// Errors since the start, by operation.
    pub(super) fn errors(&self) -> Vec<(&'static str, u64)> {
        self.errors.totals()
    }

    /// Where the disk refused: tries whether it still does.
    pub(super) fn probe(&self) {
        if self.refusal.now().is_none() {
            return;
        }
        let path = Path::new(PROBE);
        // Through the watch: a new refusal takes the place of the old one.
        let written = self.place(path, &PROBE_BYTES);
        let removed = self.remove(path);
        if written.is_ok() && removed.is_ok() {
            self.refusal.end();
        }
    }

    fn watch(&self, path: &Path, inner: Arc<dyn VolumeFile>) -> Arc<dyn VolumeFile> {
        Arc::new(WatchedFile {
            inner,
            path: path.to_owned(),
            refusal: self.refusal.clone(),
            errors: self.errors.clone(),
        })
    }

    fn noting<T>(
        &self,
        (operation, what): (Operation, &'static str),
        path: &Path,
        done: io::Result<T>,
    ) -> io::Result<T> {
        done.inspect_err(|error| {
            self.errors.note(operation, path, error);
            self.refusal.note(what, path, error);
        })
    }

    fn counting<T>(&self, operation: Operation, path: &Path, done: io::Result<T>) -> io::Result<T> {
        done.inspect_err(|error| self.errors.note(operation, path, error))
    }
}

impl Volume for Watched {
    fn folder(&self) -> Option<&Path> {
        self.inner.folder()
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn VolumeFile>> {
        assert_may_block();
        let inner = self.noting((Operation::Write, "create"), path, self.inner.create(path))?;
        Ok(self.watch(path, inner))
    }

    fn open_for_writing(&self, path: &Path) -> io::Result<Arc<dyn VolumeFile>> {
        assert_may_block();
        let inner = self.noting((Operation::Open, "open"), path, self.inner.open_for_writing(path))?;
        Ok(self.watch(path, inner))
    }

    fn modified(&self, path: &Path) -> io::Result<Option<SystemTime>> {
        assert_may_block();
        self.inner.modified(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn VolumeFile>> {
        assert_may_block();
        let inner = self.counting(Operation::Open, path, self.inner.open(path))?;
        Ok(self.watch(path, inner))
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        assert_may_block();
        self.noting(
            (Operation::Write, "append to"),
            path,
            self.inner.append(path, bytes),
        )
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        assert_may_block();
        self.noting((Operation::Rename, "name"), to, self.inner.rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        assert_may_block();
        self.noting((Operation::Remove, "remove"), path, self.inner.remove(path))
    }

    fn remove_folder_all(&self, path: &Path) -> io::Result<()> {
        assert_may_block();
        self.noting(
            (Operation::Remove, "remove"),
            path,
            self.inner.remove_folder_all(path),
        )
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        assert_may_block();
        self.noting(
            (Operation::Sync, "make durable"),
            path,
            self.inner.sync_folder(path),
        )
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        assert_may_block();
        self.counting(Operation::List, path, self.inner.list(path))
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

/// A file of a watched volume.
struct WatchedFile {
    inner: Arc<dyn VolumeFile>,
    path: PathBuf,
    refusal: Refusal,
    errors: Errors,
}

impl WatchedFile {
    fn noting<T>(&self, (operation, what): (Operation, &'static str), done: io::Result<T>) -> io::Result<T> {
        done.inspect_err(|error| {
            self.errors.note(operation, &self.path, error);
            self.refusal.note(what, &self.path, error);
        })
    }

    fn reading<T>(&self, done: io::Result<T>) -> io::Result<T> {
        done.inspect_err(|error| self.errors.note(Operation::Read, &self.path, error))
    }
}

impl VolumeFile for WatchedFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert_may_block();
        self.noting((Operation::Write, "write"), self.inner.write_at(bytes, offset))
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        assert_may_block();
        self.reading(self.inner.read_at(into, offset))
    }

    fn read_at_cached(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.reading(self.inner.read_at_cached(into, offset))
    }

    fn size(&self) -> io::Result<u64> {
        assert_may_block();
        self.reading(self.inner.size())
    }

    fn sync(&self) -> io::Result<()> {
        assert_may_block();
        self.noting((Operation::Sync, "make durable"), self.inner.sync())
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        assert_may_block();
        self.noting((Operation::Write, "reserve room for"), self.inner.reserve(bytes))
    }

    fn seal(&self) -> io::Result<()> {
        assert_may_block();
        self.noting((Operation::Write, "seal"), self.inner.seal())
    }
}
