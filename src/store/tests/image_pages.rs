//! Cost of a page of the image list.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::store::fs::{Entry, FsFile};

const TAGS: u32 = 700;

/// An in-memory file system that counts opened files.
#[derive(Default)]
struct Counting {
    inner: MemoryFs,
    opened: AtomicUsize,
}

impl FileSystem for Counting {
    fn folder(&self) -> Option<&Path> {
        self.inner.folder()
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.inner.create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.opened.fetch_add(1, Ordering::SeqCst);
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

fn tag(number: u32) -> String {
    format!("t{number:04}")
}

fn keep(store: &Store, number: u32) {
    put_manifest(store, &manifest(number), "library/alpine").unwrap();
    put_blob(store, &number.to_be_bytes()).unwrap();
    store
        .put_tag(&key(&tag(number)), variant(1, &manifest(number), 1))
        .unwrap();
}

/// A store with many tags, after its index and usage scan are complete.
fn filled(fs: &Arc<Counting>) -> Store {
    let store = Store::open(&Settings::default(), Arc::clone(fs) as Arc<dyn FileSystem>, at(0)).unwrap();
    for number in 0..TAGS {
        keep(&store, number);
    }
    counted_usage(&store);
    while !store.index.is_complete() {
        std::thread::yield_now();
    }
    store
}

fn tags(page: &[(TagKey, crate::store::tags::TagRecord)]) -> Vec<String> {
    page.iter().map(|(key, _)| key.tag.to_string()).collect()
}

#[test]
fn t18_image_page_reads_only_shown_manifests() {
    let fs = Arc::new(Counting::default());
    let store = filled(&fs);
    store.reference_counts();

    let before = fs.opened.load(Ordering::SeqCst);
    let page = store.tag_usages(600, 10);
    let shares = store.reference_counts();
    let opened = fs.opened.load(Ordering::SeqCst) - before;
    assert!(opened <= 3 * 10, "{opened} files were opened for ten images");
    let names: Vec<_> = page.iter().map(|image| image.key.tag.to_string()).collect();
    assert_eq!(names, (600..610).map(tag).collect::<Vec<_>>());
    let length = manifest(600).len() as u64;
    assert_eq!(shares.sizes(&page[0]), (length + 4, length + 4));
}

#[test]
fn t18_reference_counts_reflect_changes() {
    let fs = Arc::new(Counting::default());
    let store = filled(&fs);
    let blob = digest(&1_u32.to_be_bytes());
    assert_eq!(store.reference_counts().count(&blob), 1);
    store.put_tag(&key("other"), variant(1, &manifest(1), 1)).unwrap();
    assert_eq!(store.reference_counts().count(&blob), 2);
    let image = store.tag_usage(&key("other")).unwrap().unwrap();
    assert_eq!(store.reference_counts().sizes(&image).1, 0);
    store.remove_tag(&key("other")).unwrap();
    assert_eq!(store.reference_counts().count(&blob), 1);
    store.remove_blob(&blob).unwrap();
    assert_eq!(store.reference_counts().count(&blob), 0);
}

#[test]
fn t18_pages_are_contiguous_from_index_and_files() {
    let fs = Arc::new(Counting::default());
    let store = filled(&fs);
    let all: Vec<_> = (0..TAGS).map(tag).collect();
    for skip in [0, 1, 255, 256, 257, 699, 700, 900] {
        let from = all.get(skip..).unwrap_or_default();
        let wanted = &from[..from.len().min(40)];
        assert_eq!(tags(&store.tags_from(skip, 40)), wanted, "after {skip}");
        let from_files = store.tags.list_files_from(skip, 40);
        assert_eq!(tags(&from_files), wanted, "after {skip}, from files");
    }
    let mut seen = Vec::new();
    store.each_tag(|key, _| {
        seen.push(key.tag.to_string());
        std::ops::ControlFlow::Continue(())
    });
    assert_eq!(seen, all);
}
