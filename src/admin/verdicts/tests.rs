//! Change of a verdict: its log line, and an unreadable index.

use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use parking_lot::Mutex;

use super::*;
use crate::oci::{Algorithm, Digest};
use crate::store::Settings;
use crate::store::fs::{Entry, FileSystem, FsFile, MemoryFs};

/// An in-memory file system. Its manifests can become unreadable.
#[derive(Default)]
struct Fs {
    inner: MemoryFs,
    is_broken: AtomicBool,
}

impl FileSystem for Fs {
    fn folder(&self) -> Option<&Path> {
        None
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.inner.create(path)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        if path.starts_with("manifests") && self.is_broken.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.inner.open(path)
    }
    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.inner.append(path, bytes)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner.remove(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir_all(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.sync_dir(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.inner.list(path)
    }
    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        self.inner.mode(path)
    }
    fn free_bytes(&self) -> io::Result<u64> {
        self.inner.free_bytes()
    }
}

#[derive(Clone, Default)]
struct Journal(Arc<Mutex<Vec<u8>>>);

impl Write for Journal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn logged<T>(work: impl FnOnce() -> T) -> (T, String) {
    let journal = Journal::default();
    let writer = journal.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone());
    let done = tracing::subscriber::with_default(subscriber.finish(), work);
    let text = String::from_utf8(journal.0.lock().clone()).unwrap();
    (done, text)
}

fn note() -> VerdictNote {
    VerdictNote {
        at: SystemTime::UNIX_EPOCH,
        by: "alice".to_owned(),
        reason: Some("CVE-2026-1".to_owned()),
    }
}

fn open(fs: &Arc<Fs>) -> Store {
    let fs = Arc::clone(fs) as Arc<dyn FileSystem>;
    Store::open(&Settings::default(), fs, SystemTime::UNIX_EPOCH).unwrap()
}

#[test]
fn change_is_logged_by_the_blocking_work() {
    let fs = Arc::new(Fs::default());
    let store = open(&fs);
    let target = Target::Digest(Digest::of(Algorithm::Sha256, b"bad"));
    let block = |is_given| logged(|| set(&store, &target, (VerdictKind::Blocked, is_given), note()));
    for is_given in [true, false] {
        let (changed, journal) = block(is_given);
        assert_eq!(changed.unwrap().was, !is_given);
        for part in [
            "verdict changed on request",
            "alice",
            "CVE-2026-1",
            &target.name(),
        ] {
            assert!(journal.contains(part), "{part}: {journal}");
        }
    }
    let long = Motive {
        by: Some("alice".to_owned()),
        reason: Some("r".repeat(60_000)),
    };
    assert!(
        long.note(SystemTime::UNIX_EPOCH).reason.unwrap().len() <= 1024,
        "as stored"
    );
    fs.inner.set_bytes_max(0);
    let (changed, journal) = block(true);
    assert!(changed.is_err());
    assert!(
        journal.contains("failed to change verdict on request") && journal.contains("until the next restart"),
        "{journal}"
    );
}

#[test]
fn block_succeeds_if_its_manifest_cannot_be_read() {
    let fs = Arc::new(Fs::default());
    let index = br#"{"schemaVersion":2,"manifests":[]}"#;
    let digest = Digest::of(Algorithm::Sha256, index);
    let media_type = "application/vnd.oci.image.index.v1+json".parse().unwrap();
    open(&fs)
        .put_manifest(
            Bytes::from_static(index),
            media_type,
            digest,
            "docker.io",
            &"library/demo".parse().unwrap(),
        )
        .unwrap();
    let store = open(&fs);
    fs.is_broken.store(true, Ordering::SeqCst);
    assert!(store.manifest(&digest).is_err());
    let target = Target::Digest(digest);
    let (changed, journal) = logged(|| set(&store, &target, (VerdictKind::Blocked, true), note()));
    let changed = changed.unwrap();
    assert!(changed.is_blocked && changed.images.is_empty());
    assert!(
        journal.contains("failed to read which images") && journal.contains("verdict changed"),
        "{journal}"
    );
}
