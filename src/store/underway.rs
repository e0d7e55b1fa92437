//! A volume whose operations under way are known: a disk that hangs returns no error, so nothing else shows it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::volume::{Entry, Volume, VolumeFile};

/// An operation that takes longer is one that the operator should know of.
const SLOW_AFTER: Duration = Duration::from_secs(3);

/// The operations under way. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Underway(Arc<Mutex<Begun>>);

#[derive(Default)]
struct Begun {
    next: u64,
    /// In the order in which they began.
    operations: BTreeMap<u64, (&'static str, Instant)>,
}

impl Underway {
    fn begun(&self) -> MutexGuard<'_, Begun> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<T>(&self, operation: &'static str, work: impl FnOnce() -> T) -> T {
        let mut begun = self.begun();
        let id = begun.next;
        begun.next += 1;
        begun.operations.insert(id, (operation, Instant::now()));
        drop(begun);
        let _ended = Ended { underway: self, id };
        work()
    }

    /// The operation that has taken longest, and how long, if that is too long.
    pub(super) fn slow(&self, now: Instant) -> Option<(&'static str, Duration)> {
        let begun = self.begun();
        let (_, (operation, since)) = begun.operations.first_key_value()?;
        let took = now.saturating_duration_since(*since);
        (took >= SLOW_AFTER).then_some((operation, took))
    }
}

struct Ended<'a> {
    underway: &'a Underway,
    id: u64,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.underway.begun().operations.remove(&self.id);
    }
}

/// A volume that notes its operations.
pub(super) struct Noting {
    inner: Arc<dyn Volume>,
    underway: Underway,
}

impl Noting {
    pub(super) fn new(inner: Arc<dyn Volume>, underway: &Underway) -> Self {
        Self {
            inner,
            underway: underway.clone(),
        }
    }

    fn file(&self, inner: Arc<dyn VolumeFile>) -> Arc<dyn VolumeFile> {
        Arc::new(NotingFile {
            inner,
            underway: self.underway.clone(),
        })
    }
}

impl Volume for Noting {
    fn folder(&self) -> Option<&Path> {
        self.inner.folder()
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn VolumeFile>> {
        let inner = self.underway.run("create", || self.inner.create(path))?;
        Ok(self.file(inner))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn VolumeFile>> {
        let inner = self.underway.run("open", || self.inner.open(path))?;
        Ok(self.file(inner))
    }

    fn open_for_writing(&self, path: &Path) -> io::Result<Arc<dyn VolumeFile>> {
        let inner = self.underway.run("open", || self.inner.open_for_writing(path))?;
        Ok(self.file(inner))
    }

    fn modified(&self, path: &Path) -> io::Result<Option<SystemTime>> {
        self.underway.run("stat", || self.inner.modified(path))
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.underway.run("append", || self.inner.append(path, bytes))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.underway.run("rename", || self.inner.rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.underway.run("remove", || self.inner.remove(path))
    }

    fn remove_folder_all(&self, path: &Path) -> io::Result<()> {
        // As long as there are files in it.
        self.inner.remove_folder_all(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.underway.run("fsync", || self.inner.sync_folder(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.underway.run("list", || self.inner.list(path))
    }

    fn set_modified(&self, path: &Path, at: SystemTime) -> io::Result<()> {
        self.underway.run("touch", || self.inner.set_modified(path, at))
    }

    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        self.underway.run("stat", || self.inner.mode(path))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.underway.run("statfs", || self.inner.free_bytes())
    }
}

struct NotingFile {
    inner: Arc<dyn VolumeFile>,
    underway: Underway,
}

impl VolumeFile for NotingFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.underway.run("write", || self.inner.write_at(bytes, offset))
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.underway.run("read", || self.inner.read_at(into, offset))
    }

    fn read_at_cached(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        // It never waits for the disk.
        self.inner.read_at_cached(into, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.underway.run("stat", || self.inner.size())
    }

    fn sync(&self) -> io::Result<()> {
        self.underway.run("fsync", || self.inner.sync())
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.underway.run("fallocate", || self.inner.reserve(bytes))
    }

    fn seal(&self) -> io::Result<()> {
        self.underway.run("chmod", || self.inner.seal())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e15_the_slowest_operation_under_way_is_known() {
        let (underway, start) = (Underway::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let seen = underway.run("open", || {
            underway.run("read", || underway.slow(after(3_600)));
            (underway.slow(start), underway.slow(after(3_600)))
        });
        let (at_once, later) = seen;
        assert_eq!(at_once, None);
        assert!(matches!(later, Some(("open", took)) if took > Duration::from_secs(3_000)));
        assert_eq!(underway.slow(after(3_600)), None, "it has ended");
    }
}
