//! Files of sightings: one per tag and one per digest, and the last used ones in memory.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard};
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::{Seen, SightTime, Sighting, SightingKey, Sightings, TagKey, TagRecord};
use crate::oci::{Digest, Reference};
use crate::store::cache_key::weighted_cache;
use crate::store::checksummed_json::{RECORD_BYTES_MAX, checksum};
use crate::store::fs::FileSystem;
use crate::store::tags::resolve::ResolvedTag;
use crate::store::tags::{TagReader, record};
use crate::store::walk::record_files;
use crate::store::{AsyncStore, LogLimit, Store, StoreError, View, hashed_path, remove_file};

/// Maximum number of files. A client that requests many tags or digests of a public registry makes as many.
const FILES_MAX: usize = 131_072;

/// A full tree is pruned by this share, so that each new tag does not list all files.
const PRUNED_SHARE: usize = 16;

/// Sightings in memory, over all tags: some 8 MiB.
const READY_MAX: u64 = 32_768;

/// Typical number of sightings of a tag.
const TYPICAL: u64 = 2;

const STRIPES: usize = 64;

const TREE: &str = "sightings";

impl SightingKey {
    fn path(&self) -> PathBuf {
        let reference = self.reference.to_string();
        hashed_path(TREE, &[&self.upstream, self.repository.as_str(), &reference])
    }

    fn tag_key(&self) -> Option<TagKey> {
        let Reference::Tag(tag) = &self.reference else {
            return None;
        };
        Some(TagKey {
            upstream: Arc::clone(&self.upstream),
            repository: self.repository.clone(),
            tag: tag.clone(),
        })
    }
}

impl Store {
    /// The sightings of a tag or digest, from memory or from the file. Without a file, or if it cannot be read, those
    /// that follow from the tag's record.
    pub fn sightings(&self, key: &SightingKey) -> Arc<Sightings> {
        self.sightings.find(key, || self.record_of(key))
    }

    /// Records that the upstream named a digest at `now`, durably when this returns. Visible to readers at once, also if
    /// the write fails. Writes nothing if the tag names what it named before. Returns whether the digest is new to the
    /// tag.
    pub fn record_sighting(
        &self,
        key: &SightingKey,
        seen: &Seen,
        now: impl Into<SightTime>,
    ) -> Result<bool, StoreError> {
        self.sightings
            .record(key, seen, now.into(), || self.record_of(key))
    }

    /// Joins what a tag was seen to say about this digest into the sightings of the digest itself, durably when this
    /// returns. Writes nothing if it adds nothing, and for the key of a digest.
    pub fn join_sighting(
        &self,
        key: &SightingKey,
        digest: &Digest,
        now: SystemTime,
    ) -> Result<(), StoreError> {
        if !matches!(key.reference, Reference::Tag(_)) {
            return Ok(());
        }
        match self.sightings(key).get(digest) {
            Some(of_tag) => self.sightings.join(&key.with_digest(*digest), of_tag, now),
            None => Ok(()),
        }
    }

    /// Records that another cache has seen the tag name this digest since `first_seen_at`, durably when this returns. Writes
    /// nothing if this cache has seen it no later, or never.
    pub fn record_earlier_sight(
        &self,
        key: &SightingKey,
        digest: &Digest,
        (first_seen_at, now): (SystemTime, SystemTime),
    ) -> Result<(), StoreError> {
        self.sightings
            .record_since(key, digest, first_seen_at, || self.record_of(key))?;
        self.join_sighting(key, digest, now)
    }

    fn record_of(&self, key: &SightingKey) -> Option<Arc<TagRecord>> {
        // An unreadable record is no evidence.
        self.tag(&key.tag_key()?).ok().flatten()
    }
}

impl AsyncStore {
    /// [`Store::record_sighting`] and [`Store::join_sighting`]. Does not wait for the disk if they add nothing.
    pub async fn record_sighting(
        &self,
        key: SightingKey,
        seen: Seen,
        now: SightTime,
    ) -> Result<bool, StoreError> {
        let is_known = self.in_memory(|view| {
            let sightings = view.sightings(&key);
            let is_joined = |of_tag: &Sighting| {
                let of_digest = view.sightings(&key.with_digest(seen.digest));
                of_digest.joined(of_tag, now.at).is_none()
            };
            let is_by_tag = matches!(key.reference, Reference::Tag(_));
            sightings.with(&seen, None, now).is_none()
                && (!is_by_tag || sightings.get(&seen.digest).is_some_and(is_joined))
        });
        if is_known == Some(true) {
            return Ok(false);
        }
        self.write(move |store| {
            let is_new = store.record_sighting(&key, &seen, now)?;
            store.join_sighting(&key, &seen.digest, now.at)?;
            Ok(is_new)
        })
        .await
    }
}

impl View<'_> {
    /// The newest image, among all that the tag was seen to name, for which `is_eligible` holds. It is chosen as
    /// [`View::resolve_tag`] does.
    pub fn newest_seen(
        &self,
        sightings: &Sightings,
        record: Option<&TagRecord>,
        reader: TagReader<'_>,
        is_eligible: &dyn Fn(&Digest) -> bool,
    ) -> Option<ResolvedTag> {
        let lists = |index: &Digest, image: &Digest| self.lists(index, image);
        sightings.as_record(record).newest(reader, &lists, is_eligible)
    }
}

fn of_record(record: Option<&TagRecord>) -> Sightings {
    record.map(Sightings::of_record).unwrap_or_default()
}

/// The weight of a tag: its sightings, and one for the key.
#[derive(Clone)]
struct BySightings;

impl Weighter<SightingKey, Arc<Sightings>> for BySightings {
    fn weight(&self, _: &SightingKey, sightings: &Arc<Sightings>) -> u64 {
        sightings.len() as u64 + 1
    }
}

pub(in crate::store) struct SightingFiles {
    fs: Arc<dyn FileSystem>,
    ready: Cache<SightingKey, Arc<Sightings>, BySightings>,
    /// Held while a file is read or written.
    users: [Mutex<()>; STRIPES],
    /// Number of files; `None` before the first one was added.
    count: Mutex<Option<usize>>,
    /// Limits the log lines about unreadable files.
    unreadable: LogLimit,
    files_max: AtomicUsize,
}

impl SightingFiles {
    pub(in crate::store) fn new(fs: &Arc<dyn FileSystem>) -> Self {
        Self {
            fs: Arc::clone(fs),
            ready: weighted_cache(READY_MAX, TYPICAL, BySightings),
            users: std::array::from_fn(|_| Mutex::default()),
            count: Mutex::default(),
            unreadable: LogLimit::default(),
            files_max: AtomicUsize::new(FILES_MAX),
        }
    }

    /// The sightings, if in memory.
    pub(in crate::store) fn ready(&self, key: &SightingKey) -> Option<Arc<Sightings>> {
        self.ready.get(key)
    }

    fn find(&self, key: &SightingKey, record: impl FnOnce() -> Option<Arc<TagRecord>>) -> Arc<Sightings> {
        if let Some(found) = self.ready.get(key) {
            return found;
        }
        // Outside the lock, because it may read another file.
        let record = record();
        let path = key.path();
        let _using = self.lock(&path);
        self.load(key, &path, record.as_deref()).unwrap_or_else(|error| {
            if let Some(skipped) = self.unreadable.admits() {
                tracing::warn!(path = %path.display(), %error, skipped, "failed to read sightings");
            }
            Arc::new(Sightings {
                is_unreadable: true,
                ..of_record(record.as_deref())
            })
        })
    }

    /// The sightings. After an error nothing is kept in memory, because the next read may succeed. Call it under the
    /// lock.
    fn load(&self, key: &SightingKey, path: &Path, record: Option<&TagRecord>) -> io::Result<Arc<Sightings>> {
        if let Some(found) = self.ready.get(key) {
            return Ok(found);
        }
        let on_disk = self.read_file(key, path)?;
        let sightings = Arc::new(on_disk.unwrap_or_else(|| of_record(record)));
        self.ready.insert(key.clone(), Arc::clone(&sightings));
        Ok(sightings)
    }

    /// [`Self::load`] for a writer, which must not overwrite a file that it could not read.
    fn load_to_write(
        &self,
        key: &SightingKey,
        path: &Path,
        record: Option<&TagRecord>,
    ) -> Result<Arc<Sightings>, StoreError> {
        self.load(key, path, record)
            .map_err(|error| StoreError::io("read", path, &error))
    }

    fn record(
        &self,
        key: &SightingKey,
        seen: &Seen,
        now: SightTime,
        record: impl FnOnce() -> Option<Arc<TagRecord>>,
    ) -> Result<bool, StoreError> {
        let record = record();
        let path = key.path();
        let _using = self.lock(&path);
        let before = self.load_to_write(key, &path, record.as_deref())?;
        let Some(sightings) = before.with(seen, record.as_deref(), now) else {
            return Ok(false);
        };
        let is_new = before.get(&seen.digest).is_none();
        self.save(key, &path, sightings).map(|()| is_new)
    }

    fn record_since(
        &self,
        key: &SightingKey,
        digest: &Digest,
        first_seen_at: SystemTime,
        record: impl FnOnce() -> Option<Arc<TagRecord>>,
    ) -> Result<(), StoreError> {
        let record = record();
        let path = key.path();
        let _using = self.lock(&path);
        let before = self.load_to_write(key, &path, record.as_deref())?;
        before
            .since(digest, first_seen_at)
            .map_or(Ok(()), |sightings| self.save(key, &path, sightings))
    }

    fn join(&self, key: &SightingKey, of_tag: &Sighting, now: SystemTime) -> Result<(), StoreError> {
        let path = key.path();
        let _using = self.lock(&path);
        let before = self.load_to_write(key, &path, None)?;
        before
            .joined(of_tag, now)
            .map_or(Ok(()), |sightings| self.save(key, &path, sightings))
    }

    /// Writes the file. Call it under the lock.
    fn save(&self, key: &SightingKey, path: &Path, mut sightings: Sightings) -> Result<(), StoreError> {
        let written = self.write_file(path, &sightings.to_file(key));
        sightings.is_unsaved = written.is_err();
        self.ready.insert(key.clone(), Arc::new(sightings));
        written
    }

    fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        if self.fs.open(path).is_err() {
            self.make_room();
        }
        self.fs
            .write_durable(path, bytes)
            .map_err(|error| StoreError::io("write", path, &error))
    }

    /// The sightings of the file, if there is one. A damaged file is no evidence. It is overwritten by the next sighting.
    fn read_file(&self, key: &SightingKey, path: &Path) -> io::Result<Option<Sightings>> {
        let bytes = match self.fs.read_file(path, RECORD_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // Longer than any that is written.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Vec::new(),
            Err(error) => return Err(error),
        };
        let found = Sightings::from_file(&bytes).filter(|(named, _)| named == key);
        if found.is_none() {
            tracing::warn!(path = %path.display(), "damaged record of sightings ignored");
        }
        Ok(found.map(|(_, sightings)| sightings))
    }

    /// Makes room for one more file.
    fn make_room(&self) {
        let files_max = self.files_max.load(Ordering::Relaxed);
        let mut count = self.count.lock();
        let known = count.unwrap_or_else(|| self.files().len());
        *count = Some(if known < files_max {
            known + 1
        } else {
            self.prune(files_max - files_max / PRUNED_SHARE) + 1
        });
    }

    /// Removes files until `kept` are left: those of digests and of tags that are not cached first, and the least
    /// recently written first. The next response for a tag writes the file of its digest again. Returns how many are left.
    fn prune(&self, kept: usize) -> usize {
        let mut files: Vec<_> = self
            .files()
            .into_iter()
            .map(|(path, modified)| (self.is_cached(&path), modified, path))
            .collect();
        files.sort();
        let surplus = files.len().saturating_sub(kept);
        let mut left = files.len();
        for (_, _, path) in files.iter().take(surplus) {
            match remove_file(self.fs.as_ref(), path) {
                Ok(_) => left -= 1,
                Err(error) => tracing::debug!(%error, "failed to remove sightings"),
            }
        }
        tracing::info!(removed = surplus, "sightings of tags pruned");
        left
    }

    /// Whether the tag of this file has a record: both are named by the same hash.
    fn is_cached(&self, path: &Path) -> bool {
        path.strip_prefix(TREE)
            .is_ok_and(|name| self.fs.open(&Path::new(record::TREE).join(name)).is_ok())
    }

    fn files(&self) -> Vec<(PathBuf, Option<SystemTime>)> {
        let files = record_files(self.fs.as_ref(), TREE).filter_map(Result::ok);
        files.map(|(path, file)| (path, file.modified)).collect()
    }

    fn lock(&self, path: &Path) -> Option<MutexGuard<'_, ()>> {
        let sum = checksum(path.as_os_str().as_encoded_bytes());
        let stripe = self.users.get(usize::from(sum.first().copied()?) % STRIPES)?;
        Some(stripe.lock())
    }

    #[cfg(test)]
    pub(in crate::store) fn set_files_max(&self, files_max: usize) {
        self.files_max.store(files_max, Ordering::Relaxed);
    }
}
