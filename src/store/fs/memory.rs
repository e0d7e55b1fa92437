//! In-memory file system for tests.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::{Mutex, RwLock};

use super::{Entry, FileSystem, FsFile};

/// Files in memory. All content counts as durable at once.
#[derive(Default)]
pub struct MemoryFs {
    files: Mutex<BTreeMap<PathBuf, Arc<MemoryFile>>>,
    extent: Arc<Extent>,
}

/// Capacity and used bytes. Removed files count while they are open.
struct Extent {
    bytes_max: AtomicU64,
    bytes: AtomicU64,
}

impl Default for Extent {
    fn default() -> Self {
        Self {
            bytes_max: AtomicU64::new(u64::MAX),
            bytes: AtomicU64::new(0),
        }
    }
}

impl Extent {
    fn take(&self, bytes: u64) -> io::Result<()> {
        let bytes_max = self.bytes_max.load(Ordering::SeqCst);
        let taken = self
            .bytes
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |taken| {
                taken.checked_add(bytes).filter(|all| *all <= bytes_max)
            });
        taken.map(drop).map_err(|_| io::ErrorKind::StorageFull.into())
    }
}

impl MemoryFs {
    /// An empty file system.
    pub fn new() -> Self {
        Self::default()
    }

    /// Limits the capacity from now on.
    pub fn set_bytes_max(&self, bytes_max: u64) {
        self.extent.bytes_max.store(bytes_max, Ordering::SeqCst);
    }

    fn new_file(&self) -> Arc<MemoryFile> {
        Arc::new(MemoryFile {
            extent: Arc::clone(&self.extent),
            bytes: RwLock::default(),
            sealed: AtomicBool::new(false),
            modified: Mutex::default(),
        })
    }

    fn find(&self, path: &Path) -> io::Result<Arc<MemoryFile>> {
        self.files
            .lock()
            .get(path)
            .cloned()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl FileSystem for MemoryFs {
    fn folder(&self) -> Option<&Path> {
        None
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let mut files = self.files.lock();
        if files.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = self.new_file();
        files.insert(path.to_owned(), Arc::clone(&file));
        Ok(Arc::new(Handle(file)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        Ok(Arc::new(Handle(self.find(path)?)))
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.extent.take(bytes.len() as u64)?;
        let file = Arc::clone(
            self.files
                .lock()
                .entry(path.to_owned())
                .or_insert_with(|| self.new_file()),
        );
        let mut content = file.bytes.write();
        content.extend_from_slice(bytes);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut files = self.files.lock();
        let moved: Vec<PathBuf> = files
            .keys()
            .filter(|path| path.starts_with(from))
            .cloned()
            .collect();
        if moved.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        for path in moved {
            let rest = path.strip_prefix(from).unwrap_or(Path::new(""));
            let name = if rest.as_os_str().is_empty() {
                to.to_owned()
            } else {
                to.join(rest)
            };
            if let Some(file) = files.remove(&path) {
                files.insert(name, file);
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.files
            .lock()
            .remove(path)
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.files.lock().retain(|file, _| !file.starts_with(path));
        Ok(())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let files = self.files.lock();
        let mut folders = BTreeSet::new();
        let mut found = Vec::new();
        for (file, content) in files.iter() {
            let Ok(rest) = file.strip_prefix(path) else {
                continue;
            };
            let mut parts = rest
                .components()
                .map(|part| part.as_os_str().to_string_lossy().into_owned());
            match (parts.next(), parts.next()) {
                (Some(name), None) => found.push(Entry {
                    name,
                    is_folder: false,
                    size: content.size(),
                    modified: *content.modified.lock(),
                }),
                (Some(name), Some(_)) if folders.insert(name.clone()) => {
                    found.push(Entry {
                        name,
                        is_folder: true,
                        size: 0,
                        modified: None,
                    });
                }
                _ => {}
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    fn set_modified(&self, path: &Path, at: SystemTime) -> io::Result<()> {
        let file = self.find(path)?;
        *file.modified.lock() = Some(at);
        Ok(())
    }

    fn mode(&self, _: &Path) -> io::Result<Option<u32>> {
        Ok(None)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let bytes_max = self.extent.bytes_max.load(Ordering::SeqCst);
        Ok(bytes_max.saturating_sub(self.extent.bytes.load(Ordering::SeqCst)))
    }
}

struct MemoryFile {
    extent: Arc<Extent>,
    bytes: RwLock<Vec<u8>>,
    sealed: AtomicBool,
    modified: Mutex<Option<SystemTime>>,
}

impl MemoryFile {
    fn size(&self) -> u64 {
        self.bytes.read().len() as u64
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        let bytes = self.bytes.get_mut();
        self.extent.bytes.fetch_sub(bytes.len() as u64, Ordering::SeqCst);
    }
}

/// An open file. As on a disk, it stays readable after its name is removed.
struct Handle(Arc<MemoryFile>);

impl FsFile for Handle {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.0.sealed.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let end = start
            .checked_add(bytes.len())
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let mut content = self.0.bytes.write();
        if content.len() < end {
            self.0.extent.take((end - content.len()) as u64)?;
            content.resize(end, 0);
        }
        if let Some(place) = content.get_mut(start..end) {
            place.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = self.0.bytes.read();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = content.get(start..).unwrap_or_default();
        let length = rest.len().min(into.len());
        for (to, from) in into.iter_mut().zip(rest) {
            *to = *from;
        }
        Ok(length)
    }

    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(into, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.bytes.read().len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        let (bytes_max, taken) = (&self.0.extent.bytes_max, &self.0.extent.bytes);
        if bytes
            > bytes_max
                .load(Ordering::SeqCst)
                .saturating_sub(taken.load(Ordering::SeqCst))
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn make_read_only(&self) -> io::Result<()> {
        self.0.sealed.store(true, Ordering::Relaxed);
        Ok(())
    }
}
