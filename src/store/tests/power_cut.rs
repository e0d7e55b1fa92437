//! Power cut test: the power fails at each writing call in turn. Half of that call is executed and no later call is,
//! and only durable data remains. Content that the store acknowledged must then be complete. Other content is
//! complete or a miss.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::*;
use crate::store::fs::{Entry, FsFile};

/// Counts writing calls and fails all after the last one.
struct Power {
    calls: AtomicUsize,
    last: usize,
}

impl Power {
    fn is_cut(&self) -> bool {
        self.calls.fetch_add(1, Ordering::SeqCst) >= self.last
    }

    fn spend(&self) -> io::Result<()> {
        if self.is_cut() {
            Err(io::Error::other("no power"))
        } else {
            Ok(())
        }
    }
}

type Names = BTreeMap<PathBuf, Arc<PowerCutFile>>;

/// A disk that records which names and which bytes are durable.
pub(in crate::store) struct PowerCutFs {
    power: Arc<Power>,
    names: Mutex<Names>,
    durable: Mutex<Names>,
    /// Barrier that the next rename into the folder waits at twice.
    gate: Mutex<Option<(&'static str, Arc<Barrier>)>>,
    /// Folder in which no file can be opened.
    unreadable: Mutex<Option<&'static str>>,
}

pub(super) struct PowerCutFile {
    power: Arc<Power>,
    bytes: Mutex<Vec<u8>>,
    durable: Mutex<Vec<u8>>,
}

impl PowerCutFs {
    pub(in crate::store) fn new(last: usize) -> Self {
        let power = Arc::new(Power {
            calls: AtomicUsize::new(0),
            last,
        });
        Self {
            power,
            names: Mutex::default(),
            durable: Mutex::default(),
            gate: Mutex::default(),
            unreadable: Mutex::default(),
        }
    }

    /// From now on, files in `tree` cannot be opened; with `None`, all can.
    pub(in crate::store) fn set_unreadable(&self, tree: Option<&'static str>) {
        *self.unreadable.lock() = tree;
    }

    /// Makes the next rename into `tree` wait at this barrier: once before the test continues, and once after.
    pub(in crate::store) fn gate(&self, tree: &'static str) -> Arc<Barrier> {
        let barrier = Arc::new(Barrier::new(2));
        *self.gate.lock() = Some((tree, Arc::clone(&barrier)));
        barrier
    }

    /// The disk after a power cut, which can lose power again. Any of the renames and removals that were not durable
    /// may have reached the disk; `chance` selects them.
    pub(in crate::store) fn after_by_chance(&self, chance: u64) -> Self {
        let found = Self::new(usize::MAX);
        let (names, durable) = (self.names.lock(), self.durable.lock());
        let files: Names = durable
            .iter()
            .chain(names.iter())
            .map(|(path, file)| (path.clone(), Arc::clone(file)))
            .collect();
        for (path, file) in &files {
            let is_certain = names.contains_key(path) && durable.contains_key(path);
            let text = format!("{chance}{}", path.display());
            if !is_certain && digest(text.as_bytes()).as_bytes()[0].is_multiple_of(2) {
                continue;
            }
            let kept = found.new_file();
            let bytes = file.durable.lock();
            kept.bytes.lock().clone_from(&bytes);
            kept.durable.lock().clone_from(&bytes);
            found.names.lock().insert(path.clone(), Arc::clone(&kept));
            found.durable.lock().insert(path.clone(), kept);
        }
        found
    }

    /// The disk after a power cut.
    fn after(&self) -> MemoryFs {
        let found = MemoryFs::new();
        for (path, file) in self.durable.lock().iter() {
            let bytes = file.durable.lock();
            found.create(path).unwrap().write_at(&bytes, 0).unwrap();
        }
        found
    }

    fn find(&self, path: &Path) -> io::Result<Arc<PowerCutFile>> {
        self.names
            .lock()
            .get(path)
            .cloned()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn new_file(&self) -> Arc<PowerCutFile> {
        let power = Arc::clone(&self.power);
        Arc::new(PowerCutFile {
            power,
            bytes: Mutex::default(),
            durable: Mutex::default(),
        })
    }
}

impl FileSystem for PowerCutFs {
    fn folder(&self) -> Option<&Path> {
        None
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.power.spend()?;
        let mut names = self.names.lock();
        if names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = self.new_file();
        names.insert(path.to_owned(), Arc::clone(&file));
        Ok(Arc::new(Handle(file)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        let unreadable = *self.unreadable.lock();
        if unreadable.is_some_and(|tree| path.starts_with(tree)) {
            return Err(io::Error::other("bad sector"));
        }
        Ok(Arc::new(Handle(self.find(path)?)))
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let file = Arc::clone(
            self.names
                .lock()
                .entry(path.to_owned())
                .or_insert_with(|| self.new_file()),
        );
        let cut = self.power.is_cut();
        let written = if cut { &bytes[..bytes.len() / 2] } else { bytes };
        file.bytes.lock().extend_from_slice(written);
        // A torn append may have reached the disk.
        file.durable.lock().clone_from(&file.bytes.lock());
        self.durable.lock().insert(path.to_owned(), file);
        if cut {
            Err(io::Error::other("no power"))
        } else {
            Ok(())
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let gate = self.gate.lock().take_if(|(tree, _)| to.starts_with(tree));
        if let Some((_, barrier)) = gate {
            barrier.wait();
            barrier.wait();
        }
        self.power.spend()?;
        let mut names = self.names.lock();
        let file = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        names.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.power.spend()?;
        self.names
            .lock()
            .remove(path)
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.power.spend()?;
        self.names.lock().retain(|file, _| !file.starts_with(path));
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.power.spend()?;
        let names = self.names.lock();
        let mut durable = self.durable.lock();
        durable.retain(|file, _| file.parent() != Some(path));
        let here = names.iter().filter(|(file, _)| file.parent() == Some(path));
        durable.extend(here.map(|(path, file)| (path.clone(), Arc::clone(file))));
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let names = self.names.lock();
        let mut found: Vec<Entry> = Vec::new();
        for (file, content) in names.iter() {
            let Ok(rest) = file.strip_prefix(path) else {
                continue;
            };
            let mut parts = rest.components();
            let name = parts.next().unwrap().as_os_str().to_str().unwrap().to_owned();
            let is_folder = parts.next().is_some();
            if found.last().is_none_or(|last| last.name != name) {
                found.push(Entry {
                    name,
                    is_folder,
                    size: if is_folder {
                        0
                    } else {
                        content.bytes.lock().len() as u64
                    },
                    modified: None,
                });
            }
        }
        Ok(found)
    }

    fn mode(&self, _: &Path) -> io::Result<Option<u32>> {
        Ok(None)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

/// An open file.
struct Handle(Arc<PowerCutFile>);

impl FsFile for Handle {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let cut = self.0.power.is_cut();
        let written = if cut { &bytes[..bytes.len() / 2] } else { bytes };
        let mut content = self.0.bytes.lock();
        content.truncate(usize::try_from(offset).unwrap());
        content.extend_from_slice(written);
        if cut {
            Err(io::Error::other("no power"))
        } else {
            Ok(())
        }
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = self.0.bytes.lock();
        let rest = &content[usize::try_from(offset).unwrap().min(content.len())..];
        let length = rest.len().min(into.len());
        into[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    fn read_at_nowait(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read_at(into, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.bytes.lock().len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.power.spend()?;
        let bytes = &self.0.bytes;
        self.0.durable.lock().clone_from(&bytes.lock());
        Ok(())
    }

    fn reserve(&self, _: u64) -> io::Result<()> {
        self.0.power.spend()
    }

    fn make_read_only(&self) -> io::Result<()> {
        self.0.power.spend()
    }
}

/// The acknowledged steps, in the order of the scenario.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent flags, one per step")]
struct Acknowledged {
    secret: Option<[u8; 32]>,
    blob: bool,
    manifest: bool,
    seen: bool,
    tag: bool,
    moved: bool,
    public: bool,
    second_blob: bool,
}

impl Acknowledged {
    /// Continues after an error, as the program does.
    fn play(fs: Arc<dyn FileSystem>) -> Self {
        let mut done = Self::default();
        let Ok(store) = Store::open(&Settings::default(), fs, at(0)) else {
            return done;
        };
        let alpine = repository("library/alpine");
        done.secret = Some(*store.install_secret());
        done.blob = put_blob(&store, b"layer").is_ok();
        done.manifest = put_manifest(&store, &manifest(1), "library/alpine").is_ok();
        done.seen = store.add_member(UPSTREAM, &alpine, &digest(b"layer")).is_ok();
        done.tag = store.put_tag(&key("3"), variant(1, b"old", 1)).is_ok();
        done.moved = store.put_tag(&key("3"), variant(1, b"new", 2)).is_ok();
        done.public = store.set_public(UPSTREAM, &alpine, Some(at(0))).is_ok();
        done.second_blob = put_blob(&store, b"another layer").is_ok();
        done
    }

    fn assert_kept(&self, store: &Store) {
        let alpine = repository("library/alpine");
        if let Some(secret) = self.secret {
            assert_eq!(*store.install_secret(), secret);
        }
        for (kept, bytes) in [(self.blob, &b"layer"[..]), (self.second_blob, b"another layer")] {
            let found = read_blob(store, &digest(bytes));
            assert!(!kept || found.is_some(), "an acknowledged blob is lost");
            assert!(found.is_none_or(|found| found == bytes), "a blob has wrong bytes");
        }
        let found = store.manifest(&digest(&manifest(1))).unwrap();
        assert!(
            !self.manifest || found.is_some(),
            "an acknowledged manifest is lost"
        );
        assert!(found.is_none_or(|held| held.bytes == manifest(1) && held.media_type == image()));
        assert!(
            !self.seen || store.is_member(UPSTREAM, &alpine, &digest(b"layer")),
            "membership is lost"
        );
        assert_eq!(store.public_since(UPSTREAM, &alpine).is_some(), self.public);
        let named = store
            .tag(&key("3"))
            .unwrap()
            .map(|record| record.variants[0].digest);
        match named {
            None => assert!(!self.tag, "an acknowledged tag is lost"),
            Some(named) if self.moved => assert_eq!(named, digest(b"new")),
            Some(named) => assert!([digest(b"old"), digest(b"new")].contains(&named)),
        }
        assert_eq!(
            store.fs.list(Path::new("quarantine")).unwrap(),
            [],
            "content is missing, never corrupt"
        );
    }
}

#[test]
fn power_cut_at_any_call_loses_nothing_acknowledged() {
    for last in 0.. {
        let fs = Arc::new(PowerCutFs::new(last));
        let acknowledged = Acknowledged::play(Arc::clone(&fs) as Arc<dyn FileSystem>);
        let found = Arc::new(fs.after());
        let store = Store::open(&Settings::default(), found, at(9)).unwrap();
        acknowledged.assert_kept(&store);
        drop(store);
        if acknowledged.second_blob && fs.power.calls.load(Ordering::SeqCst) <= last {
            assert!(last > 30, "the scenario writes in {last} calls only");
            return;
        }
    }
}
