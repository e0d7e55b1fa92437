//! How much the proofs may take together. A stranger can ask for one public repository after the other, and each leaves a
//! file; so at the limit nothing more is written down until something was let go.
//!
//! What goes are whole files, those that were written to least recently first, and only of repositories of which no content
//! is held: their proofs open nothing. Losing one too many costs a question.
//!
//! What takes a right back is written whatever the limit says.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use super::{FILE_BYTES_MAX, MembershipStore, RepoDigests, TREE, content_of, header_line};
use crate::oci::Digest;
use crate::store::cache_key::{RepoKey, RepoKeyRef};
use crate::store::evict::EVICTION_MIN_AGE;

/// Proofs on the disk, of all repositories together; at [`BLOCK_BYTES`] for each, those of a quarter of a million.
pub(in crate::store) const MEMBERSHIP_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// What a file takes at least.
pub(super) const BLOCK_BYTES: u64 = 4096;

/// Letting go begins at this share of the limit, and ends at the lower one.
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
    /// Counts what is there already.
    pub(in crate::store) fn count(&self, stop: &AtomicBool) {
        let files = self.files(stop);
        self.bytes
            .fetch_add(files.iter().map(File::counted).sum(), Ordering::Relaxed);
    }

    /// Whether something more may be written down that can be asked for again.
    pub(super) fn has_quota(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) < self.bytes_max
    }

    /// Lets go of what is too much. `is_cached`: whether the content of this digest is here. Blocks.
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
        // In place of what was estimated while it was written; what is written meanwhile counts the next time.
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
            tracing::info!(
                bytes = before - bytes,
                "let go of proofs of repositories of which nothing is held"
            );
        }
        if !self.has_quota() {
            tracing::warn!(
                "the proofs of what repositories have take all the room they may; new ones are lost at a restart"
            );
        }
    }

    /// Says whether it is gone.
    fn remove_unless_cached(&self, file: &File, is_cached: &dyn Fn(&Digest) -> bool) -> bool {
        let Ok(text) = self.fs.read_file(&file.path, FILE_BYTES_MAX) else {
            return false;
        };
        // One that does not say whose it is proves nothing.
        let key = text.split(|byte| *byte == b'\n').find_map(key_of_header);
        if let Some(key) = &key {
            let (repo, _) = RepoDigests::from_lines(key, &text);
            if repo.digests.iter().any(is_cached) {
                return false;
            }
        }
        let _order = self.order.write().unwrap_or_else(PoisonError::into_inner);
        // Whoever wrote to it since the look has use for it.
        let size = self.fs.open(&file.path).and_then(|file| file.size());
        if size.ok() != Some(text.len() as u64) || self.fs.remove(&file.path).is_err() {
            return false;
        }
        if let Some(key) = key {
            // Those who hold it still begin a new file.
            if let Some(repo) = self.in_use.find(&key) {
                repo.write(RepoDigests::forget_file);
            }
            self.ready
                .remove(&RepoKeyRef::new(&key.upstream, &key.repository));
        }
        true
    }

    fn files(&self, stop: &AtomicBool) -> Vec<File> {
        let mut files = Vec::new();
        for folder in self.fs.list(Path::new(TREE)).unwrap_or_default() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let folder = Path::new(TREE).join(folder.name);
            let entries = self.fs.list(&folder).unwrap_or_default();
            files.extend(entries.into_iter().map(|entry| File {
                path: folder.join(entry.name),
                bytes: entry.size,
                modified: entry.modified.unwrap_or(SystemTime::UNIX_EPOCH),
            }));
        }
        files
    }
}

/// Whose file it is, by its first line.
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

    /// Room for so many repositories, on a disk.
    fn membership_with(disk: &Arc<MemoryFs>, repositories: u64) -> MembershipStore {
        let fs = Arc::clone(disk) as Arc<dyn FileSystem>;
        let repo = MembershipStore::with_quota(&fs, repositories * BLOCK_BYTES);
        repo.count(&AtomicBool::new(false));
        repo
    }

    fn note(repo: &MembershipStore, disk: &MemoryFs, number: u64) {
        let repository = repository(number);
        repo.add(UPSTREAM, &repository, &digest(number)).unwrap();
        let path = super::super::path(&RepoKey::of(UPSTREAM, &repository));
        // A disk in memory has no clock: written in the order of their numbers.
        let _ = disk.set_modified(&path, at(number));
    }

    fn has(repo: &MembershipStore, number: u64) -> bool {
        let repo = repo.get(UPSTREAM, &repository(number)).unwrap();
        repo.read(|repo| repo.digests.contains(&digest(number)))
    }

    #[test]
    fn a_stranger_who_asks_for_everything_fills_no_disk() {
        let disk = Arc::new(MemoryFs::new());
        let repo = membership_with(&disk, 100);
        for number in 0..1000 {
            note(&repo, &disk, number);
            assert!(has(&repo, number), "in memory it is known all the same");
        }
        let files = repo.files(&AtomicBool::new(false));
        assert!(files.len() <= 100, "{}", files.len());
        let again = membership_with(&disk, 100);
        assert!(
            has(&again, 0) && !has(&again, 999),
            "what found no room is lost at a restart"
        );
        assert!(
            again.bytes.load(Ordering::Relaxed) > 90 * BLOCK_BYTES,
            "it is counted again"
        );
    }

    #[test]
    fn the_oldest_proofs_that_open_nothing_make_room() {
        let disk = Arc::new(MemoryFs::new());
        let repo = membership_with(&disk, 100);
        for number in 0..100 {
            note(&repo, &disk, number);
        }
        let held = [digest(3), digest(5)];
        let long_after = at(1_000_000);
        repo.prune(
            long_after,
            &|digest| held.contains(digest),
            &AtomicBool::new(false),
        );
        assert!(has(&repo, 3) && has(&repo, 5), "what opens something stays");
        assert!(
            !has(&repo, 0) && !has(&repo, 10),
            "neither on the disk nor in memory"
        );
        assert!(has(&repo, 90), "no more goes than has to");
        note(&repo, &disk, 200);
        let again = membership_with(&disk, 100);
        assert!(has(&again, 200) && has(&again, 3) && !has(&again, 0));
    }

    #[test]
    fn what_was_written_within_the_hour_stays() {
        let disk = Arc::new(MemoryFs::new());
        let repo = membership_with(&disk, 100);
        for number in 0..100 {
            note(&repo, &disk, number);
        }
        repo.prune(at(99), &|_| false, &AtomicBool::new(false));
        assert!((0..90).all(|number| has(&membership_with(&disk, 100), number)));
    }

    #[test]
    fn what_is_written_to_between_the_look_and_the_removal_stays() {
        let disk = Arc::new(MemoryFs::new());
        let repo = membership_with(&disk, 100);
        for number in 0..94 {
            note(&repo, &disk, number);
        }
        let is_cached = |_: &Digest| {
            // Now the look at the first is over but for the answer.
            repo.add(UPSTREAM, &repository(0), &digest(1000)).unwrap();
            false
        };
        repo.prune(at(1_000_000), &is_cached, &AtomicBool::new(false));
        let again = membership_with(&disk, 1000);
        assert!(has(&again, 0) && !has(&again, 1));
    }

    #[test]
    fn what_takes_a_right_back_is_written_though_there_is_no_room() {
        let disk = Arc::new(MemoryFs::new());
        let repo = membership_with(&disk, 10);
        let first = repository(0);
        repo.set_public(UPSTREAM, &first, Some(at(7))).unwrap();
        for number in 0..100 {
            note(&repo, &disk, number);
        }
        assert!(!repo.has_quota());
        repo.set_public(UPSTREAM, &first, None).unwrap();
        repo.remove_member(UPSTREAM, &first, &digest(0)).unwrap();
        let again = membership_with(&disk, 10);
        let again = again.get(UPSTREAM, &first).unwrap();
        assert!(again.read(|repo| repo.public.is_none() && repo.digests.is_empty()));
    }
}
