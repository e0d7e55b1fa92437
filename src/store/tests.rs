//! Store tests that run on every file system. Tests that need a local folder (lock, durable index) are in
//! [`folder`]. Power cuts at each writing call are in [`power_cut`].
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

mod any_order;
mod basics;
mod blobs;
mod completeness;
mod eviction;
mod folder;
mod health;
mod image_pages;
mod manifests;
mod membership;
mod partial;
pub(super) mod power_cut;
mod removals;
mod revocations;
mod sightings;
mod tag_use;
mod tags;
mod upkeep;
mod verdicts;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::blobs::Verified;
use super::fs::{DirectoryFs, FileSystem, MemoryFs};
use super::manifests::StoredManifest;
use super::tags::{TagKey, Variant};
use super::*;
use crate::oci::{Algorithm, Digest, Hasher, MediaType, Repository};

pub(super) const UPSTREAM: &str = "docker.io";
pub(super) const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";

/// A file system on which a store is opened repeatedly.
pub(super) struct Fixture {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) folder: Option<tempfile::TempDir>,
}

impl Fixture {
    pub(super) fn directory() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fs = DirectoryFs::open(folder.path().join("data")).unwrap();
        Self {
            fs: Arc::new(fs),
            folder: Some(folder),
        }
    }

    pub(super) fn memory() -> Self {
        Self {
            fs: Arc::new(MemoryFs::new()),
            folder: None,
        }
    }

    pub(super) fn open(&self) -> Store {
        Store::open(&Settings::default(), Arc::clone(&self.fs), at(0)).unwrap()
    }

    /// Opens the store with a size limit, after the startup scan has finished.
    pub(super) fn open_with_limit(&self, bytes_max: u64, now: SystemTime) -> Store {
        let limits = Limits {
            bytes_max,
            free_bytes_min: 0,
        };
        let settings = Settings {
            limits,
            ..Settings::default()
        };
        let store = Store::open(&settings, Arc::clone(&self.fs), now).unwrap();
        counted_usage(&store);
        store
    }

    /// All files below `folder`.
    pub(super) fn files(&self, folder: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![PathBuf::from(folder)];
        while let Some(folder) = folders.pop() {
            for entry in self.fs.list(&folder).unwrap() {
                let path = folder.join(entry.name);
                if entry.is_folder {
                    folders.push(path);
                } else {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }

    /// The ingests in progress. (The index thread may also write a temporary file there.)
    fn ingests(&self) -> usize {
        let entries = self.fs.list(Path::new("ingest")).unwrap();
        entries.iter().filter(|entry| entry.is_folder).count()
    }

    /// Overwrites a file, even if it is read-only.
    pub(super) fn overwrite(&self, path: &Path, bytes: &[u8]) {
        self.fs.remove(path).unwrap();
        self.fs.create(path).unwrap().write_at(bytes, 0).unwrap();
    }
}

/// Runs `test` on a local folder and in memory.
fn on_every_fs(test: impl Fn(&Fixture)) {
    test(&Fixture::directory());
    test(&Fixture::memory());
}

pub(super) fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds)
}

pub(super) fn repository(name: &str) -> Repository {
    name.parse().unwrap()
}

pub(super) fn digest(bytes: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, bytes)
}

pub(super) fn image() -> MediaType {
    IMAGE.parse().unwrap()
}

pub(super) fn manifest(number: u32) -> Bytes {
    let config = digest(&number.to_be_bytes());
    Bytes::from(format!(
        r#"{{"schemaVersion":2,"mediaType":"{IMAGE}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":4}},"layers":[]}}"#
    ))
}

pub(super) fn key(tag: &str) -> TagKey {
    TagKey {
        upstream: UPSTREAM.into(),
        repository: repository("library/alpine"),
        tag: tag.parse().unwrap(),
    }
}

pub(super) fn variant(accept: u64, content: &[u8], seconds: u64) -> Variant {
    Variant {
        accept,
        digest: digest(content),
        media_type: image(),
        accepts_indexes: true,
        confirmed_at: at(seconds),
        first_seen_at: at(seconds),
        previous: None,
        is_by_record: false,
        history: Vec::new(),
    }
}

pub(super) fn verified(bytes: &[u8]) -> Verified {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(bytes);
    Verified::check(hasher, &digest(bytes), bytes.len() as u64, None).unwrap()
}

pub(super) fn put_blob(store: &Store, bytes: &[u8]) -> Result<(), StoreError> {
    let ingest = store.begin(&digest(bytes), Some(bytes.len() as u64))?;
    ingest
        .file()
        .write_at(bytes, 0)
        .map_err(|error| StoreError::io("write", "ingest", &error))?;
    ingest.commit(verified(bytes)).map(drop)
}

pub(super) fn put_manifest(
    store: &Store,
    bytes: &Bytes,
    repo: &str,
) -> Result<Arc<StoredManifest>, StoreError> {
    store.put_manifest(bytes.clone(), image(), digest(bytes), UPSTREAM, &repository(repo))
}

pub(super) fn read_blob(store: &Store, of: &Digest) -> Option<Vec<u8>> {
    let held = store.blob(of).unwrap()?;
    let bytes = fs::read_all(held.file.as_ref(), u64::MAX).unwrap();
    assert_eq!(bytes.len() as u64, held.size);
    Some(bytes)
}

/// The variant of a tag that was observed once.
pub(super) fn past(content: &[u8], seconds: u64) -> crate::store::tags::HistoryEntry {
    crate::store::tags::HistoryEntry {
        digest: digest(content),
        first_seen_at: at(seconds),
        confirmed_at: at(seconds),
    }
}

pub(super) fn only_variant(store: &Store, tag: &str) -> Variant {
    let record = store.tag(&key(tag)).unwrap().unwrap();
    assert_eq!(record.variants.len(), 1);
    record.variants[0].clone()
}

/// Waits for the startup scan.
pub(super) fn counted_usage(store: &Store) -> Usage {
    for _ in 0..10_000 {
        let usage = store.usage();
        if usage.is_complete {
            return usage;
        }
        std::thread::yield_now();
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the usage scan does not finish");
}
