//! Tag records: the digest that a tag had at the last revalidation.
//!
//! The file of a tag is written only when a digest changes. The time of each confirmation goes to the index; losing it
//! costs one revalidation. The record in memory merges both.

mod encoding;
mod merge;
mod record;
mod reindex;
mod resolve;
pub mod sightings;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard};
use quick_cache::sync::Cache;

use super::cache_key::bounded_cache;
use super::checksummed_json::{RECORD_BYTES_MAX, checksum};
use super::fs::FileSystem;
use super::graph::{TagNode, TargetsChecksum};
use super::index::handle::{IndexHandle, VALUE_BYTES_MAX};
use super::invalidations::InvalidationKey;
use super::manifests::StoredManifest;
use super::usage::{ContentKind, Counters};
use super::walk::record_files;
use super::{AsyncStore, Store, StoreError, View, remove_file};
use crate::oci::{AnyDigest, Digest, Repository, Tag};

use self::record::KEY_PREFIX;
pub use self::record::{
    HISTORY_MAX, HistoryEntry, NEVER_CONFIRMED, Previous, TagKey, TagRecord, VARIANTS_MAX, Variant,
};
pub(super) use self::record::{TREE, path_of};
pub use self::resolve::{ResolvedTag, TagReader};

/// Tag records cached in memory.
const READY_MAX: usize = 16_384;

const STRIPES: usize = 64;

impl Store {
    /// The record of a tag: from memory, or from its file and the index together.
    pub fn tag(&self, key: &TagKey) -> Result<Option<Arc<TagRecord>>, StoreError> {
        self.tags.find(key)
    }

    /// Stores a tag as confirmed at `variant.confirmed_at`. Visible to readers at once, also if the disk write fails.
    pub fn put_tag(&self, key: &TagKey, variant: Variant) -> Result<(), StoreError> {
        let received_at = variant.confirmed_at;
        self.record_response(key, variant, received_at)
    }

    /// Stores an upstream response that arrived at `received_at` to a request sent at `variant.confirmed_at`, unless a
    /// later response is stored. Visible to readers at once, also if the disk write fails.
    pub fn record_response(
        &self,
        key: &TagKey,
        variant: Variant,
        received_at: SystemTime,
    ) -> Result<(), StoreError> {
        let digest = variant.digest;
        self.access_times.mark_needed([digest]);
        let view = self.view();
        let is_complete = |digest: &Digest| view.is_tag_complete(key, digest);
        let result = self.tags.put(key, variant, received_at, &is_complete);
        // An eviction that began after the first call and listed the tags before the write has seen neither.
        self.access_times.mark_needed_and_wait([digest]);
        result
    }

    /// Stores a response of the upstream to another cache, unless the tag was confirmed here later.
    pub fn record_earlier_response(&self, key: &TagKey, variant: Variant) -> Result<(), StoreError> {
        let digest = variant.digest;
        self.access_times.mark_needed([digest]);
        let view = self.view();
        let is_complete = |digest: &Digest| view.is_tag_complete(key, digest);
        let result = self.tags.put_earlier(key, variant, &is_complete);
        // As in `record_response`.
        self.access_times.mark_needed_and_wait([digest]);
        result
    }

    /// [`View::resolve_tag`] on the disk view. Blocks.
    pub fn resolve_tag(
        &self,
        key: &TagKey,
        record: &TagRecord,
        reader: TagReader<'_>,
    ) -> Option<ResolvedTag> {
        self.view().resolve_tag(key, record, reader)
    }

    /// [`View::last_complete`] on the disk view. Blocks.
    pub fn last_complete(
        &self,
        record: &TagRecord,
        reader: TagReader<'_>,
        is_complete: &dyn Fn(&StoredManifest) -> bool,
    ) -> Option<ResolvedTag> {
        self.view().last_complete(record, reader, is_complete)
    }

    /// Removes a tag and its invalidation durably. Returns whether the tag was known. If the removal may not be
    /// durable, the tag is invalidated: after a restart it is revalidated before it is served.
    pub fn remove_tag(&self, key: &TagKey) -> Result<bool, StoreError> {
        let invalidation = InvalidationKey::from(key);
        let since = self.invalidated_since(&invalidation);
        let removed = self.tags.remove(key, since.is_some());
        match &removed {
            // An invalidation by a later write stays.
            Ok(removed) if removed.is_durable => {
                self.clear_invalidation(&invalidation, |now| Some(now) == since)?;
            }
            _ if since.is_none() => {
                self.invalidate(&invalidation, self.access_times.now())?;
            }
            _ => {}
        }
        removed.map(|removed| removed.was_known)
    }

    /// At most `limit` tags in order, after `after`. Read from the index or, while it is incomplete, from the files,
    /// which is slower.
    pub fn tags(&self, after: Option<&TagKey>, limit: usize) -> Vec<(TagKey, TagRecord)> {
        self.tags
            .list(&after.map(TagKey::to_index).unwrap_or_default(), limit)
    }

    /// At most `limit` tags of one repository of an upstream in order, after `after`. As [`Self::tags`], but no other
    /// repository's index entries are read.
    pub fn tags_of(
        &self,
        (upstream, repository): (&str, &Repository),
        after: Option<&Tag>,
        limit: usize,
    ) -> Vec<(TagKey, TagRecord)> {
        let prefix = TagKey::index_prefix(upstream, repository);
        let after = after.map(|tag| [&prefix, tag.as_str().as_bytes()].concat());
        self.tags.list_below(&prefix, &after.unwrap_or_default(), limit)
    }

    /// At most `limit` tags in order, after the first `skip`, of which only the keys are read.
    pub fn tags_from(&self, skip: usize, limit: usize) -> Vec<(TagKey, TagRecord)> {
        self.tags.list_from(skip, limit)
    }
}

impl AsyncStore {
    /// [`Store::record_response`]. Does not write to the disk if the tag's file does not change.
    pub async fn record_response(
        &self,
        key: TagKey,
        variant: Variant,
        received_at: SystemTime,
    ) -> Result<(), StoreError> {
        self.store.access_times.mark_needed([variant.digest]);
        let result = self.in_memory(|view| self.store.tags.put_in_memory(&key, &variant, received_at, view));
        if result == Some(true) {
            return Ok(());
        }
        self.write(move |store| store.record_response(&key, variant, received_at))
            .await
    }
}

impl View<'_> {
    /// Whether the manifest and everything it refers to are cached.
    fn is_tag_complete(&self, key: &TagKey, digest: &Digest) -> bool {
        let manifest = self.manifest(digest).ok().flatten();
        manifest
            .is_some_and(|stored| self.is_image_complete(&key.upstream, &key.repository, &stored, &|_| false))
    }

    /// The image that a tag resolves to for this reader: the newest cached one or, if none is cached, the newest. See
    /// `resolve`.
    pub fn resolve_tag(
        &self,
        key: &TagKey,
        record: &TagRecord,
        reader: TagReader<'_>,
    ) -> Option<ResolvedTag> {
        let lists = |index: &Digest, image: &Digest| self.lists(index, image);
        let cached = |digest: &Digest| {
            self.is_member(&key.upstream, &key.repository, digest)
                && matches!(self.manifest(digest), Ok(Some(_)))
        };
        // With one variant there is no choice, whether it is cached or not.
        if record.variants.len() == 1 {
            return record.newest(reader, &lists, &|_| true);
        }
        let newest = record.newest(reader, &lists, &cached);
        newest.or_else(|| record.newest(reader, &lists, &|_| true))
    }

    /// The newest image, current or previous, for which `is_complete` holds.
    pub fn last_complete(
        &self,
        record: &TagRecord,
        reader: TagReader<'_>,
        is_complete: &dyn Fn(&StoredManifest) -> bool,
    ) -> Option<ResolvedTag> {
        let lists = |index: &Digest, image: &Digest| self.lists(index, image);
        let complete =
            |digest: &Digest| matches!(self.manifest(digest), Ok(Some(stored)) if is_complete(&stored));
        record.newest_or_previous(reader, &lists, &complete)
    }

    fn lists(&self, index: &Digest, image: &Digest) -> Option<bool> {
        let stored = self.manifest(index).ok().flatten()?;
        let image = AnyDigest::Supported(*image);
        Some(
            stored
                .manifest
                .descriptors
                .iter()
                .any(|child| child.digest == image),
        )
    }
}

/// Index keys read per page while skipping.
const SKIP_PAGE: usize = 256;

/// A tag record loaded from the disk.
struct Loaded {
    record: Arc<TagRecord>,
    /// False if a write failed or the file was damaged, and only the index has the tag.
    has_file: bool,
    /// False if the index lost the tag or is unavailable.
    is_indexed: bool,
}

/// Where a removed tag was found.
struct UnlinkedTag {
    had_file: bool,
    was_ready: bool,
}

/// Result of a tag removal.
struct RemovedTag {
    was_known: bool,
    /// Whether the removal survives a crash.
    is_durable: bool,
}

pub(super) struct Tags {
    fs: Arc<dyn FileSystem>,
    index: Arc<IndexHandle>,
    usage: Arc<Counters>,
    ready: Cache<TagKey, Arc<TagRecord>>,
    writers: [Mutex<()>; STRIPES],
    /// Number of removals. A reader that loaded a tag during a removal loads it again.
    removals: AtomicU64,
    /// Serialises [`Self::reindex`].
    reindexing: Mutex<()>,
}

impl Tags {
    pub(super) fn new(fs: &Arc<dyn FileSystem>, index: &Arc<IndexHandle>, usage: &Arc<Counters>) -> Self {
        Self {
            fs: Arc::clone(fs),
            index: Arc::clone(index),
            usage: Arc::clone(usage),
            ready: bounded_cache(READY_MAX),
            writers: std::array::from_fn(|_| Mutex::default()),
            removals: AtomicU64::new(0),
            reindexing: Mutex::default(),
        }
    }

    /// The record of a tag, if in memory.
    pub(super) fn ready(&self, key: &TagKey) -> Option<Arc<TagRecord>> {
        self.ready.get(key)
    }

    fn find(&self, key: &TagKey) -> Result<Option<Arc<TagRecord>>, StoreError> {
        if let Some(record) = self.ready.get(key) {
            return Ok(Some(record));
        }
        let removals = self.removals.load(Ordering::SeqCst);
        let Some(mut loaded) = self.load(key)? else {
            return Ok(None);
        };
        if self.removals.load(Ordering::SeqCst) != removals {
            // The removal may have been of this tag, between the load and the cache insertion. Load it again under the
            // writer lock.
            let _writing = self.lock_writer(&key.path());
            self.ready.remove(key);
            match self.load(key)? {
                Some(reloaded) => loaded = reloaded,
                None => return Ok(None),
            }
        }
        if !loaded.has_file || !loaded.is_indexed {
            self.complete(key, &loaded);
        }
        Ok(Some(loaded.record))
    }

    fn load(&self, key: &TagKey) -> Result<Option<Loaded>, StoreError> {
        let (on_disk, indexed) = (self.read_file(key)?, self.read_index(key));
        let (has_file, is_indexed) = (on_disk.is_some(), indexed.is_some());
        let Some(record) = TagRecord::merge(on_disk, indexed) else {
            return Ok(None);
        };
        // Do not overwrite a record that a writer cached in the meantime.
        let record = self
            .ready
            .get_or_insert_with(key, || Ok::<_, StoreError>(Arc::new(record)))?;
        Ok(Some(Loaded {
            record,
            has_file,
            is_indexed,
        }))
    }

    /// Writes a tag to the index or file that lacked it, under the writer lock.
    fn complete(&self, key: &TagKey, loaded: &Loaded) {
        let path = key.path();
        let _writing = self.lock_writer(&path);
        // The cached record is newer than `loaded` if another writer was first, and absent if the tag was removed.
        let Some(record) = self.ready.get(key) else { return };
        if !loaded.is_indexed {
            self.write_index(key, &record);
        }
        if !loaded.has_file
            && let Err(error) = self.write_file(key, &record, &path)
        {
            tracing::debug!(%error, "failed to write the file of a tag that only the index has");
        }
    }

    /// [`Self::put`], if the tag's file does not change and no other writer holds the lock. Returns whether it was
    /// done.
    fn put_in_memory(
        &self,
        key: &TagKey,
        variant: &Variant,
        received_at: SystemTime,
        view: &View<'_>,
    ) -> bool {
        let Some(_writing) = self.try_lock_writer(&key.path()) else {
            return false;
        };
        let Some(before) = self.ready.get(key) else {
            return false;
        };
        let is_complete = |digest: &Digest| view.is_tag_complete(key, digest);
        let Some(record) = before.with_response(variant.clone(), received_at, &is_complete) else {
            return view.needed_no_disk();
        };
        let accept = variant.accept;
        let is_same = match (before.for_accept(accept), record.for_accept(accept)) {
            (Some(old), Some(new)) => new.equals_on_disk(old),
            _ => false,
        };
        if !is_same || !view.needed_no_disk() {
            return false;
        }
        self.write_index(key, &record);
        self.ready.insert(key.clone(), Arc::new(record));
        true
    }

    fn put(
        &self,
        key: &TagKey,
        variant: Variant,
        received_at: SystemTime,
        is_complete: &dyn Fn(&Digest) -> bool,
    ) -> Result<(), StoreError> {
        let path = key.path();
        let _writing = self.lock_writer(&path);
        self.put_locked(key, &path, (variant, received_at), is_complete)
    }

    /// [`Self::put`], unless the tag was confirmed after `variant`.
    fn put_earlier(
        &self,
        key: &TagKey,
        variant: Variant,
        is_complete: &dyn Fn(&Digest) -> bool,
    ) -> Result<(), StoreError> {
        let path = key.path();
        let _writing = self.lock_writer(&path);
        let known = match self.ready.get(key) {
            Some(record) => Some(record),
            None => self.load(key)?.map(|loaded| loaded.record),
        };
        if known.is_some_and(|known| known.confirmed_at() > variant.confirmed_at) {
            return Ok(());
        }
        let received_at = variant.confirmed_at;
        self.put_locked(key, &path, (variant, received_at), is_complete)
    }

    fn put_locked(
        &self,
        key: &TagKey,
        path: &Path,
        (variant, received_at): (Variant, SystemTime),
        is_complete: &dyn Fn(&Digest) -> bool,
    ) -> Result<(), StoreError> {
        let loaded = match self.ready.get(key) {
            Some(record) => Some(Loaded {
                record,
                has_file: true,
                is_indexed: true,
            }),
            // An unreadable file is overwritten.
            None => self.load(key).unwrap_or_default(),
        };
        let before = loaded.as_ref().map(|loaded| loaded.record.as_ref());
        let accept = variant.accept;
        let Some(record) =
            before
                .unwrap_or(&TagRecord::default())
                .with_response(variant, received_at, is_complete)
        else {
            return Ok(());
        };
        let record = Arc::new(record);
        let old = before.and_then(|before| before.for_accept(accept));
        let is_same = match (old, record.for_accept(accept)) {
            (Some(old), Some(new)) => new.equals_on_disk(old),
            _ => false,
        };
        let is_changed = !is_same || loaded.as_ref().is_some_and(|loaded| !loaded.has_file);
        self.ready.insert(key.clone(), Arc::clone(&record));
        self.write_index(key, &record);
        if is_changed {
            self.write_file(key, &record, path)
        } else {
            Ok(())
        }
    }

    /// Serialises writers of one tag.
    fn lock_writer(&self, path: &Path) -> Option<MutexGuard<'_, ()>> {
        let stripe = self.stripe(path)?;
        Some(stripe.lock())
    }

    /// [`Self::lock_writer`], unless another writer holds the lock.
    fn try_lock_writer(&self, path: &Path) -> Option<MutexGuard<'_, ()>> {
        self.stripe(path)?.try_lock()
    }

    fn stripe(&self, path: &Path) -> Option<&Mutex<()>> {
        let sum = checksum(path.as_os_str().as_encoded_bytes());
        self.writers.get(usize::from(sum.first().copied()?) % STRIPES)
    }

    /// Removes a tag. `is_invalidated`: an earlier removal of its file may not be durable.
    fn remove(&self, key: &TagKey, is_invalidated: bool) -> Result<RemovedTag, StoreError> {
        let path = key.path();
        let (unlinked, expunging) = {
            let _writing = self.lock_writer(&path);
            self.remove_locked(key, &path, IndexHandle::remove_durable)
        };
        let UnlinkedTag { had_file, was_ready } = unlinked?;
        let is_unlinked = !(had_file || is_invalidated) || self.sync_folder_of(&path);
        // Outside the writer lock, because concurrent removals share one flush.
        let is_expunged = self.index.wait_durable(expunging);
        Ok(RemovedTag {
            was_known: had_file || was_ready,
            is_durable: is_unlinked && is_expunged,
        })
    }

    /// Makes the removal of a file durable.
    fn sync_folder_of(&self, path: &Path) -> bool {
        let Some(folder) = path.parent() else {
            return false;
        };
        match self.fs.sync_dir(folder) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// Removes a tag that still points to the same digests, if `is_free` allows it. `None` if it does not, or if the tag
    /// points to other digests.
    pub(super) fn evict(
        &self,
        tag: &TagNode,
        is_free: impl FnOnce(&TagKey, &[Digest]) -> bool,
    ) -> Result<Option<u64>, StoreError> {
        let path = path_of(&tag.name);
        let _writing = self.lock_writer(&path);
        let found = self.read_named(&tag.name);
        let found = found.map_err(|error| StoreError::io("read", &path, &error))?;
        let Some((key, on_disk)) = found else {
            return Ok(None);
        };
        let targets = self.digests_of(&key, &on_disk);
        if TargetsChecksum::of(&targets) != tag.targets || !is_free(&key, &targets) {
            return Ok(None);
        }
        let (unlinked, ()) = self.remove_locked(&key, &path, IndexHandle::remove);
        unlinked.map(|_| Some(0))
    }

    /// The digests that a tag refers to, sorted: from memory if cached, otherwise from its file.
    pub(super) fn digests_of(&self, key: &TagKey, on_disk: &TagRecord) -> Vec<Digest> {
        let ready = self.ready.get(key);
        let mut named = ready.as_deref().unwrap_or(on_disk).digests();
        named.sort_unstable();
        named.dedup();
        named
    }

    /// Removes the file first and the cached record last, so that a reader that loaded the file just before loads it
    /// again.
    fn remove_locked<T>(
        &self,
        key: &TagKey,
        path: &Path,
        remove_from_index: impl FnOnce(&IndexHandle, Vec<u8>) -> T,
    ) -> (Result<UnlinkedTag, StoreError>, T) {
        let had_file = self.usage.on_remove(ContentKind::Tag, path, || {
            remove_file(self.fs.as_ref(), path).map(|size| size.map(|_| 0))
        });
        let on_remove = remove_from_index(&self.index, key.to_index());
        self.removals.fetch_add(1, Ordering::SeqCst);
        let was_ready = self.ready.remove(key).is_some();
        let unlinked = had_file.map(|had_file| UnlinkedTag { had_file, was_ready });
        (unlinked, on_remove)
    }

    /// Whether the index cannot be read for this tag.
    pub(super) fn is_index_unavailable(&self, key: &TagKey) -> bool {
        self.index.get(key.to_index()).is_err()
    }

    /// The record in the file with this name. `None` if the file is missing or damaged.
    pub(super) fn read_named(&self, name: &Digest) -> io::Result<Option<(TagKey, TagRecord)>> {
        match self.fs.read_file(&path_of(name), RECORD_BYTES_MAX) {
            Ok(bytes) => Ok(TagRecord::from_file(&bytes).filter(|(key, _)| key.name() == *name)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::FileTooLarge
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn read_file(&self, key: &TagKey) -> Result<Option<TagRecord>, StoreError> {
        let path = key.path();
        match self.fs.read_file(&path, RECORD_BYTES_MAX) {
            Ok(bytes) => {
                let found = TagRecord::from_file(&bytes).filter(|(named, _)| named == key);
                if found.is_none() {
                    self.quarantine(&path);
                }
                Ok(found.map(|(_, record)| record))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                self.quarantine(&path);
                Ok(None)
            }
            Err(error) => Err(StoreError::io("read", path, &error)),
        }
    }

    fn write_file(&self, key: &TagKey, record: &TagRecord, path: &Path) -> Result<(), StoreError> {
        let bytes = record.to_file(key);
        let written = self.usage.on_add(ContentKind::Tag, path, 0, || {
            let is_new = self.fs.open(path).is_err();
            self.fs.write_durable(path, &bytes).map(|()| is_new)
        });
        written.map_err(|error| StoreError::io("write", path, &error))
    }

    fn quarantine(&self, path: &Path) {
        self.usage
            .quarantine(ContentKind::Tag, self.fs.as_ref(), path, "damaged tag record");
    }

    fn read_index(&self, key: &TagKey) -> Option<TagRecord> {
        let value = self.index.get(key.to_index()).ok()??;
        TagRecord::from_index(&value)
    }

    fn write_index(&self, key: &TagKey, record: &TagRecord) {
        self.index.put(key.to_index(), record.to_index(VALUE_BYTES_MAX));
    }

    /// Tags after the index key `after`; from the first tag if `after` is empty.
    fn list(&self, after: &[u8], limit: usize) -> Vec<(TagKey, TagRecord)> {
        self.list_below(&[KEY_PREFIX], after, limit)
    }

    /// [`Self::list`] of the tags whose index key begins with `prefix`.
    fn list_below(&self, prefix: &[u8], after: &[u8], limit: usize) -> Vec<(TagKey, TagRecord)> {
        if let Some(tags) = self.list_indexed_below(prefix, after, limit) {
            return tags;
        }
        let after = TagKey::from_index(after);
        let is_after = |key: &TagKey| after.as_ref().is_none_or(|after| key > after);
        self.list_files(|key| key.to_index().starts_with(prefix) && is_after(key), limit)
    }

    /// [`Self::list`] from the index; `None` while it is incomplete or unavailable. A page shorter than `limit` is the
    /// last one, also if entries are corrupt: a record is then read from its file, and an unreadable key skipped.
    pub(super) fn list_indexed(&self, after: &[u8], limit: usize) -> Option<Vec<(TagKey, TagRecord)>> {
        self.list_indexed_below(&[KEY_PREFIX], after, limit)
    }

    fn list_indexed_below(
        &self,
        prefix: &[u8],
        after: &[u8],
        limit: usize,
    ) -> Option<Vec<(TagKey, TagRecord)>> {
        if !self.index.is_complete() {
            return None;
        }
        let (mut tags, mut after) = (Vec::new(), after.to_vec());
        loop {
            let wanted = limit.saturating_sub(tags.len());
            let pairs = self.index.scan(prefix.to_vec(), after, wanted).ok()?;
            let is_last = pairs.len() < wanted;
            after = pairs.last().map(|(key, _)| key.clone()).unwrap_or_default();
            tags.extend(pairs.iter().filter_map(|(key, value)| self.listed(key, value)));
            if is_last || tags.len() >= limit {
                return Some(tags);
            }
        }
    }

    /// A tag as its index entry states it, or from its file if the entry is corrupt.
    fn listed(&self, key: &[u8], value: &[u8]) -> Option<(TagKey, TagRecord)> {
        let key = TagKey::from_index(key)?;
        if let Some(record) = TagRecord::from_index(value) {
            return Some((key, record));
        }
        let record = self.find(&key).ok()??;
        Some((key, record.as_ref().clone()))
    }

    fn list_from(&self, skip: usize, limit: usize) -> Vec<(TagKey, TagRecord)> {
        if self.index.is_complete()
            && let Some(after) = self.key_before(skip)
        {
            return self.list(&after, limit);
        }
        self.list_files_from(skip, limit)
    }

    pub(super) fn list_files_from(&self, skip: usize, limit: usize) -> Vec<(TagKey, TagRecord)> {
        let mut tags = self.list_files(|_| true, skip.saturating_add(limit));
        tags.drain(..skip.min(tags.len()));
        tags
    }

    /// The index key of the last of the first `skip` tags, or of the last tag; empty if there is none. `None` if the
    /// index is unavailable.
    fn key_before(&self, skip: usize) -> Option<Vec<u8>> {
        let (mut left, mut last) = (skip, Vec::new());
        while left > 0 {
            let pairs = self
                .index
                .scan(vec![KEY_PREFIX], last.clone(), left.min(SKIP_PAGE))
                .ok()?;
            let Some((key, _)) = pairs.last() else { break };
            last.clone_from(key);
            left -= pairs.len().min(left);
        }
        Some(last)
    }

    /// The first `limit` matching tags, read from their files. At most twice as many are in memory.
    fn list_files(&self, matches: impl Fn(&TagKey) -> bool, limit: usize) -> Vec<(TagKey, TagRecord)> {
        let mut first = Vec::new();
        let shorten = |tags: &mut Vec<(TagKey, TagRecord)>| {
            tags.sort_by(|(a, _), (b, _)| a.cmp(b));
            tags.truncate(limit);
        };
        self.walk_with_times(&AtomicBool::new(false), |key, on_disk, _| {
            if matches(&key) {
                let indexed = self.read_index(&key);
                let merged = TagRecord::merge(Some(on_disk), indexed).unwrap_or_default();
                first.push((key, merged));
                if first.len() / 2 > limit {
                    shorten(&mut first);
                }
            }
        });
        shorten(&mut first);
        for (key, record) in &mut first {
            if let Some(ready) = self.ready.get(key) {
                record.clone_from(&ready);
            }
        }
        first
    }

    /// Visits every tag file with its modification time. Returns whether it reached the end.
    pub(super) fn walk_with_times(
        &self,
        stop: &AtomicBool,
        mut each: impl FnMut(TagKey, TagRecord, Option<SystemTime>),
    ) -> bool {
        for (path, file) in record_files(self.fs.as_ref(), TREE).filter_map(Result::ok) {
            if stop.load(Ordering::Relaxed) {
                return false;
            }
            // Damaged or removed files are handled when their tag is read.
            let bytes = self.fs.read_file(&path, RECORD_BYTES_MAX);
            if let Some((key, record)) = bytes.ok().and_then(|bytes| TagRecord::from_file(&bytes)) {
                each(key, record, file.modified);
            }
        }
        true
    }
}
