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

use super::{FILE_BYTES_MAX, Seen, SeenFiles, TREE, content_of, head_line};
use crate::oci::Digest;
use crate::store::cache_key::{Place, PlaceRef};
use crate::store::evict::YOUNG;

/// Proofs on the disk, of all repositories together; at [`BLOCK_BYTES`] for each, those of a quarter of a million.
pub(in crate::store) const SEEN_BYTES_MAX: u64 = 1024 * 1024 * 1024;

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

impl SeenFiles {
    /// Counts what is there already.
    pub(in crate::store) fn count(&self, stop: &AtomicBool) {
        let files = self.files(stop);
        self.bytes
            .fetch_add(files.iter().map(File::counted).sum(), Ordering::Relaxed);
    }

    /// Whether something more may be written down that can be asked for again.
    pub(super) fn has_room(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) < self.bytes_max
    }

    /// Lets go of what is too much. `is_held`: whether the content of this digest is here. Blocks.
    pub(in crate::store) fn prune(
        &self,
        now: SystemTime,
        is_held: &dyn Fn(&Digest) -> bool,
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
        let is_young = |file: &File| now.duration_since(file.modified).is_ok_and(|age| age < YOUNG);
        for file in files.iter().filter(|file| !is_young(file)) {
            if bytes <= share(END_PERCENT) || stop.load(Ordering::Relaxed) {
                break;
            }
            if self.remove_unless_held(file, is_held) {
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
        if !self.has_room() {
            tracing::warn!(
                "the proofs of what repositories have take all the room they may; new ones are lost at a restart"
            );
        }
    }

    /// Says whether it is gone.
    fn remove_unless_held(&self, file: &File, is_held: &dyn Fn(&Digest) -> bool) -> bool {
        let Ok(text) = self.fs.read_file(&file.path, FILE_BYTES_MAX) else {
            return false;
        };
        // One that does not say whose it is proves nothing.
        let place = text.split(|byte| *byte == b'\n').find_map(place_of_head);
        if let Some(place) = &place {
            let (seen, _) = Seen::of_lines(place, &text);
            if seen.digests.iter().any(is_held) {
                return false;
            }
        }
        let _order = self.order.write().unwrap_or_else(PoisonError::into_inner);
        // Whoever wrote to it since the look has use for it.
        let size = self.fs.open(&file.path).and_then(|file| file.size());
        if size.ok() != Some(text.len() as u64) || self.fs.remove(&file.path).is_err() {
            return false;
        }
        if let Some(place) = place {
            // Those who hold it still begin a new file.
            if let Some(seen) = self.in_use.find(&place) {
                seen.write(Seen::lose_file);
            }
            self.ready
                .remove(&PlaceRef::new(&place.upstream, &place.repository));
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
fn place_of_head(line: &[u8]) -> Option<Place> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.strip_prefix("repository ")?.split(' ');
    let place = Place::of(words.next()?, &words.next()?.parse().ok()?);
    (content_of(&place, line)? == head_line(&place)).then_some(place)
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
    fn seen_with(disk: &Arc<MemoryFs>, repositories: u64) -> SeenFiles {
        let fs = Arc::clone(disk) as Arc<dyn FileSystem>;
        let seen = SeenFiles::with_room(&fs, repositories * BLOCK_BYTES);
        seen.count(&AtomicBool::new(false));
        seen
    }

    fn note(seen: &SeenFiles, disk: &MemoryFs, number: u64) {
        let repository = repository(number);
        seen.note(UPSTREAM, &repository, &digest(number)).unwrap();
        let path = super::super::path(&Place::of(UPSTREAM, &repository));
        // A disk in memory has no clock: written in the order of their numbers.
        let _ = disk.set_modified(&path, at(number));
    }

    fn has(seen: &SeenFiles, number: u64) -> bool {
        let seen = seen.of(UPSTREAM, &repository(number)).unwrap();
        seen.read(|seen| seen.digests.contains(&digest(number)))
    }

    #[test]
    fn a_stranger_who_asks_for_everything_fills_no_disk() {
        let disk = Arc::new(MemoryFs::new());
        let seen = seen_with(&disk, 100);
        for number in 0..1000 {
            note(&seen, &disk, number);
            assert!(has(&seen, number), "in memory it is known all the same");
        }
        let files = seen.files(&AtomicBool::new(false));
        assert!(files.len() <= 100, "{}", files.len());
        let again = seen_with(&disk, 100);
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
        let seen = seen_with(&disk, 100);
        for number in 0..100 {
            note(&seen, &disk, number);
        }
        let held = [digest(3), digest(5)];
        let long_after = at(1_000_000);
        seen.prune(
            long_after,
            &|digest| held.contains(digest),
            &AtomicBool::new(false),
        );
        assert!(has(&seen, 3) && has(&seen, 5), "what opens something stays");
        assert!(
            !has(&seen, 0) && !has(&seen, 10),
            "neither on the disk nor in memory"
        );
        assert!(has(&seen, 90), "no more goes than has to");
        note(&seen, &disk, 200);
        let again = seen_with(&disk, 100);
        assert!(has(&again, 200) && has(&again, 3) && !has(&again, 0));
    }

    #[test]
    fn what_was_written_within_the_hour_stays() {
        let disk = Arc::new(MemoryFs::new());
        let seen = seen_with(&disk, 100);
        for number in 0..100 {
            note(&seen, &disk, number);
        }
        seen.prune(at(99), &|_| false, &AtomicBool::new(false));
        assert!((0..90).all(|number| has(&seen_with(&disk, 100), number)));
    }

    #[test]
    fn what_is_written_to_between_the_look_and_the_removal_stays() {
        let disk = Arc::new(MemoryFs::new());
        let seen = seen_with(&disk, 100);
        for number in 0..94 {
            note(&seen, &disk, number);
        }
        let is_held = |_: &Digest| {
            // Now the look at the first is over but for the answer.
            seen.note(UPSTREAM, &repository(0), &digest(1000)).unwrap();
            false
        };
        seen.prune(at(1_000_000), &is_held, &AtomicBool::new(false));
        let again = seen_with(&disk, 1000);
        assert!(has(&again, 0) && !has(&again, 1));
    }

    #[test]
    fn what_takes_a_right_back_is_written_though_there_is_no_room() {
        let disk = Arc::new(MemoryFs::new());
        let seen = seen_with(&disk, 10);
        let first = repository(0);
        seen.note_public(UPSTREAM, &first, Some(at(7))).unwrap();
        for number in 0..100 {
            note(&seen, &disk, number);
        }
        assert!(!seen.has_room());
        seen.note_public(UPSTREAM, &first, None).unwrap();
        seen.note_gone(UPSTREAM, &first, &digest(0)).unwrap();
        let again = seen_with(&disk, 10);
        let again = again.of(UPSTREAM, &first).unwrap();
        assert!(again.read(|seen| seen.public.is_none() && seen.digests.is_empty()));
    }
}
