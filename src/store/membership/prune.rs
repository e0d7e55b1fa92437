//! Size limit of the membership files. Any client can create one file per public repository. At the limit, nothing more
//! is persisted until files have been pruned.
//!
//! Whole files are pruned, the least recently written first, and only of repositories without cached content. A file
//! pruned too early costs one upstream request per digest.
//!
//! Lines that revoke something are written regardless of the limit.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use super::{FILE_BYTES_MAX, MembershipStore, RepoDigests, TREE, content_of, header_line};
use crate::oci::Digest;
use crate::store::cache_key::{RepoKey, RepoKeyRef};
use crate::store::evict::EVICTION_MIN_AGE;
use crate::store::walk::record_files;

/// Limit of all files together: at [`BLOCK_BYTES`] each, a quarter of a million repositories.
pub(in crate::store) const MEMBERSHIP_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// Minimum disk usage of a file.
pub(super) const BLOCK_BYTES: u64 = 4096;

/// Pruning begins at this share of the limit and ends at the lower one.
const BEGIN_PERCENT: u64 = 95;
const END_PERCENT: u64 = 80;

struct File {
    path: PathBuf,
    bytes: u64,
    modified: SystemTime,
}

impl File {
    fn counted(&self) -> u64 {
        self.bytes.max(BLOCK_BYTES)
    }
}

impl MembershipStore {
    /// Adds the existing files to the estimate.
    pub(in crate::store) fn count(&self, stop: &AtomicBool) {
        let files = self.files(stop);
        self.bytes
            .fetch_add(files.iter().map(File::counted).sum(), Ordering::Relaxed);
    }

    /// Whether more lines may be persisted, other than revoking ones.
    pub(super) fn has_quota(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) < self.bytes_max
    }

    /// Prunes files down to the limit. `is_cached`: whether the content of a digest is cached. Blocks.
    pub(in crate::store) fn prune(
        &self,
        now: SystemTime,
        is_cached: &dyn Fn(&Digest) -> bool,
        stop: &AtomicBool,
    ) {
        let share = |percent| self.bytes_max / 100 * percent;
        if self.bytes.load(Ordering::Relaxed) < share(BEGIN_PERCENT) {
            return;
        }
        let mut files = self.files(stop);
        // Replaces the estimate; lines written meanwhile count the next time.
        let mut bytes: u64 = files.iter().map(File::counted).sum();
        let before = bytes;
        files.sort_by_key(|file| file.modified);
        let is_young = |file: &File| {
            now.duration_since(file.modified)
                .is_ok_and(|age| age < EVICTION_MIN_AGE)
        };
        for file in files.iter().filter(|file| !is_young(file)) {
            if bytes <= share(END_PERCENT) || stop.load(Ordering::Relaxed) {
                break;
            }
            if self.remove_unless_cached(file, is_cached) {
                bytes -= file.counted();
            }
        }
        self.bytes.store(bytes, Ordering::Relaxed);
        if bytes < before {
            tracing::info!(bytes = before - bytes, "membership files pruned");
        }
        if !self.has_quota() {
            tracing::warn!("membership files reached their size limit; new members are lost at a restart");
        }
    }

    /// Returns whether the file was removed.
    fn remove_unless_cached(&self, file: &File, is_cached: &dyn Fn(&Digest) -> bool) -> bool {
        let Ok(text) = self.fs.read_file(&file.path, FILE_BYTES_MAX) else {
            return false;
        };
        // A file without a valid header line is of no use.
        let key = text.split(|byte| *byte == b'\n').find_map(key_of_header);
        if let Some(key) = &key {
            let (repo, _) = RepoDigests::from_lines(key, &text);
            if repo.digests.iter().any(is_cached) {
                return false;
            }
        }
        let _order = self.order.write();
        // A file that was written since the scan is in use.
        let size = self.fs.open(&file.path).and_then(|file| file.size());
        if size.ok() != Some(text.len() as u64) || self.fs.remove(&file.path).is_err() {
            return false;
        }
        if let Some(key) = key {
            // Remaining users start a new file.
            if let Some(repo) = self.in_use.find(&key) {
                repo.write(RepoDigests::forget_file);
            }
            self.ready
                .remove(&RepoKeyRef::new(&key.upstream, &key.repository));
        }
        true
    }

    fn files(&self, stop: &AtomicBool) -> Vec<File> {
        let files = record_files(self.fs.as_ref(), TREE).filter_map(Result::ok);
        let files = files.take_while(|_| !stop.load(Ordering::Relaxed));
        let files = files.map(|(path, entry)| File {
            path,
            bytes: entry.size,
            modified: entry.modified.unwrap_or(SystemTime::UNIX_EPOCH),
        });
        files.collect()
    }
}

/// The key of a file, from its header line.
fn key_of_header(line: &[u8]) -> Option<RepoKey> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.strip_prefix("repository ")?.split(' ');
    let key = RepoKey::of(words.next()?, &words.next()?.parse().ok()?);
    (content_of(&key, line)? == header_line(&key)).then_some(key)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::oci::{Algorithm, Repository};
    use crate::store::fs::{FileSystem, MemoryFs};

    const UPSTREAM: &str = "docker.io";

    fn repository(number: u64) -> Repository {
        format!("library/image-{number}").parse().unwrap()
    }

    fn digest(number: u64) -> Digest {
        Digest::of(Algorithm::Sha256, &number.to_be_bytes())
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// A store with a quota for so many repositories.
    fn membership_with(disk: &Arc<MemoryFs>, repositories: u64) -> MembershipStore {
        let fs = Arc::clone(disk) as Arc<dyn FileSystem>;
        let repo = MembershipStore::with_quota(&fs, repositories * BLOCK_BYTES);
        repo.count(&AtomicBool::new(false));
        repo
    }

    fn add(store: &MembershipStore, disk: &MemoryFs, number: u64) {
        let repository = repository(number);
        store.add(UPSTREAM, &repository, &digest(number)).unwrap();
        let path = super::super::path(&RepoKey::of(UPSTREAM, &repository));
        // The in-memory file system has no clock: each file gets its number as its time.
        let _ = disk.set_modified(&path, at(number));
    }

    fn has(store: &MembershipStore, number: u64) -> bool {
        let repo = store.get(UPSTREAM, &repository(number)).unwrap();
        repo.read(|repo| repo.digests.contains(&digest(number)))
    }

    #[test]
    fn membership_size_is_limited_for_many_repositories() {
        let disk = Arc::new(MemoryFs::new());
        let store = membership_with(&disk, 100);
        for number in 0..1000 {
            add(&store, &disk, number);
            assert!(has(&store, number), "it is still in memory");
        }
        let files = store.files(&AtomicBool::new(false));
        assert!(files.len() <= 100, "{}", files.len());
        let again = membership_with(&disk, 100);
        assert!(
            has(&again, 0) && !has(&again, 999),
            "members beyond the limit are lost at a restart"
        );
        assert!(
            again.bytes.load(Ordering::Relaxed) > 90 * BLOCK_BYTES,
            "existing files are counted"
        );
    }

    #[test]
    fn prune_removes_oldest_files_without_cached_content() {
        let disk = Arc::new(MemoryFs::new());
        let store = membership_with(&disk, 100);
        for number in 0..100 {
            add(&store, &disk, number);
        }
        let held = [digest(3), digest(5)];
        let long_after = at(1_000_000);
        store.prune(
            long_after,
            &|digest| held.contains(digest),
            &AtomicBool::new(false),
        );
        assert!(
            has(&store, 3) && has(&store, 5),
            "repositories with cached content stay"
        );
        assert!(!has(&store, 0) && !has(&store, 10), "pruned from disk and memory");
        assert!(has(&store, 90), "only as much as needed is pruned");
        add(&store, &disk, 200);
        let again = membership_with(&disk, 100);
        assert!(has(&again, 200) && has(&again, 3) && !has(&again, 0));
    }

    #[test]
    fn prune_keeps_files_written_within_the_hour() {
        let disk = Arc::new(MemoryFs::new());
        let store = membership_with(&disk, 100);
        for number in 0..100 {
            add(&store, &disk, number);
        }
        store.prune(at(99), &|_| false, &AtomicBool::new(false));
        assert!((0..90).all(|number| has(&membership_with(&disk, 100), number)));
    }

    #[test]
    fn prune_keeps_file_written_after_the_scan() {
        let disk = Arc::new(MemoryFs::new());
        let store = membership_with(&disk, 100);
        for number in 0..94 {
            add(&store, &disk, number);
        }
        let is_cached = |_: &Digest| {
            // The scan of the first file is over, but not its removal.
            store.add(UPSTREAM, &repository(0), &digest(1000)).unwrap();
            false
        };
        store.prune(at(1_000_000), &is_cached, &AtomicBool::new(false));
        let again = membership_with(&disk, 1000);
        assert!(has(&again, 0) && !has(&again, 1));
    }

    #[test]
    fn revocation_is_persisted_beyond_the_limit() {
        let disk = Arc::new(MemoryFs::new());
        let store = membership_with(&disk, 10);
        let first = repository(0);
        store.set_public(UPSTREAM, &first, Some(at(7))).unwrap();
        for number in 0..100 {
            add(&store, &disk, number);
        }
        assert!(!store.has_quota());
        store.set_public(UPSTREAM, &first, None).unwrap();
        store.remove_member(UPSTREAM, &first, &digest(0)).unwrap();
        let again = membership_with(&disk, 10);
        let again = again.get(UPSTREAM, &first).unwrap();
        assert!(again.read(|repo| repo.public.is_none() && repo.digests.is_empty()));
    }
}
