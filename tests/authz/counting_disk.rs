//! File system that counts its reads.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use ifnewer::store::fs::{Entry, FileSystem, FsFile, MemoryFs};

#[derive(Default)]
pub struct Counted {
    disk: MemoryFs,
    looks: AtomicUsize,
}

impl Counted {
    /// Reads so far.
    pub fn reads(&self) -> usize {
        self.looks.load(Ordering::Relaxed)
    }

    fn look(&self) -> &MemoryFs {
        self.looks.fetch_add(1, Ordering::Relaxed);
        &self.disk
    }
}

impl FileSystem for Counted {
    fn folder(&self) -> Option<&Path> {
        self.disk.folder()
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.look().create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.look().open(path)
    }

    fn modified(&self, path: &Path) -> io::Result<Option<SystemTime>> {
        self.look().modified(path)
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.look().append(path, bytes)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.look().rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.look().remove(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.look().remove_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.sync_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.look().list(path)
    }

    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        self.look().mode(path)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes()
    }
}
