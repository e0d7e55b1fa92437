//! Appends to the files of proofs: in the order in which memory learned, and with one fsync for all lines that wait.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, TryLockError};

use super::{SeenFiles, SharedSeen, head_line, path, prune, push_line};
use crate::oci::{Digest, Repository};
use crate::store::cache_key::{Place, PlaceRef};
use crate::store::{AsyncStore, Fault};

/// Lines kept for another attempt while a file cannot be written to. Proofs that are lost cost a question each.
const UNWRITTEN_MAX: usize = 4096;

/// A proof that is in memory and not on the disk.
#[derive(Clone)]
pub struct Unwritten {
    place: Place,
    seen: Arc<SharedSeen>,
}

/// What became of a proof in memory.
pub enum Noted {
    /// It was known, or is not to be written down.
    Known,
    /// It is known now.
    Unwritten(Unwritten),
    /// It takes the disk to know.
    NotInMemory,
}

impl AsyncStore {
    /// Keeps in memory the proof that the upstream has `digest` in this repository. Lost before it is written down, it
    /// costs one question.
    pub fn note_seen(&self, upstream: &str, repository: &Repository, digest: &Digest) -> Noted {
        self.store.seen.note_ready(upstream, repository, digest)
    }

    /// Writes a proof down.
    pub async fn write_down(&self, unwritten: Unwritten) -> Result<(), Fault> {
        self.write(move |store| store.seen.write_down(&unwritten)).await
    }
}

impl SeenFiles {
    fn note_ready(&self, upstream: &str, repository: &Repository, digest: &Digest) -> Noted {
        // Not while a file is let go of, which takes the disk.
        let _order = match self.order.try_read() {
            Ok(order) => order,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Noted::NotInMemory,
        };
        let Some(ready) = self.ready.get(&PlaceRef::new(upstream, repository)) else {
            return Noted::NotInMemory;
        };
        let seen = ready.seen;
        match self.take_in(upstream, repository, digest, &seen) {
            Some(place) => Noted::Unwritten(Unwritten { place, seen }),
            None => Noted::Known,
        }
    }

    fn write_down(&self, unwritten: &Unwritten) -> Result<(), Fault> {
        let _order = self.order.read().unwrap_or_else(PoisonError::into_inner);
        self.append(&unwritten.place, &unwritten.seen)
    }

    /// Tries again to write down what takes something back. Blocks.
    pub(in crate::store) fn append_owing(&self) {
        for (place, seen) in self.in_use.owing() {
            let _order = self.order.read().unwrap_or_else(PoisonError::into_inner);
            if self.append(&place, &seen).is_err() {
                // The disk is told of elsewhere; the others would fail too.
                return;
            }
        }
    }

    /// Appends what is not in the file yet. When this returns, all that was learned before is there.
    pub(super) fn append(&self, place: &Place, seen: &Arc<SharedSeen>) -> Result<(), Fault> {
        let _appending = seen.appending.lock().unwrap_or_else(PoisonError::into_inner);
        let (is_headed, contents) = seen.write(|seen| {
            let contents = std::mem::take(&mut seen.unwritten);
            let was_headed = seen.is_headed;
            seen.is_headed |= !contents.is_empty();
            (was_headed, contents)
        });
        // Another has written it.
        if contents.is_empty() {
            return Ok(());
        }
        let mut lines = String::new();
        if !is_headed {
            push_line(&mut lines, place, &head_line(place));
        }
        for content in &contents {
            push_line(&mut lines, place, content);
        }
        let block = if is_headed { 0 } else { prune::BLOCK_BYTES };
        self.bytes
            .fetch_add(lines.len() as u64 + block, Ordering::Relaxed);
        let path = path(place);
        let appended = self.fs.append(&path, lines.as_bytes());
        let is_owing = appended.is_err() && {
            // For the next attempt, before what was learned since.
            seen.write(|seen| {
                seen.is_headed = is_headed;
                seen.unwritten.splice(..0, to_keep(contents));
                seen.unwritten.iter().any(|line| takes_back(line))
            })
        };
        self.in_use.set_owing(place, seen, is_owing);
        appended.map_err(|error| Fault::io("append to", path, &error))
    }
}

/// What is tried again of lines that could not be appended: all of them or, where they are too many, what takes something
/// back, each line once.
fn to_keep(contents: Vec<String>) -> Vec<String> {
    if contents.len() <= UNWRITTEN_MAX {
        return contents;
    }
    let mut kept = HashSet::new();
    let taking_back = contents.into_iter().filter(|line| takes_back(line));
    taking_back.filter(|line| kept.insert(line.clone())).collect()
}

/// Whether the line ends what an earlier one says.
fn takes_back(line: &str) -> bool {
    line == "private" || line.starts_with("gone ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]
    use super::*;
    use crate::oci::Algorithm;
    use crate::store::fs::{FileSystem, MemoryFs};

    const UPSTREAM: &str = "docker.io";

    fn digest(number: usize) -> Digest {
        Digest::of(Algorithm::Sha256, &number.to_be_bytes())
    }

    fn seen_on(disk: &Arc<MemoryFs>) -> SeenFiles {
        let fs = Arc::clone(disk) as Arc<dyn FileSystem>;
        SeenFiles::with_room(&fs, u64::MAX)
    }

    fn has(seen: &SeenFiles, repository: &Repository, number: usize) -> bool {
        let seen = seen.of(UPSTREAM, repository).unwrap();
        seen.read(|seen| seen.digests.contains(&digest(number)))
    }

    fn evict(seen: &SeenFiles, repository: &Repository) {
        seen.ready.remove(&PlaceRef::new(UPSTREAM, repository));
    }

    #[test]
    fn t08_queued_proof_is_not_written_over_its_deletion() {
        let disk = Arc::new(MemoryFs::new());
        let seen = seen_on(&disk);
        let app: Repository = "acme/app".parse().unwrap();
        assert!(!has(&seen, &app, 1));
        let Noted::Unwritten(queued) = seen.note_ready(UPSTREAM, &app, &digest(1)) else {
            panic!("it is in memory and not written down");
        };
        evict(&seen, &app);
        seen.note_gone(UPSTREAM, &app, &digest(1)).unwrap();
        seen.write_down(&queued).unwrap();
        assert!(!has(&seen, &app, 1));
        assert!(!has(&seen_on(&disk), &app, 1));
    }

    #[test]
    fn t08_deletion_that_no_disk_took_is_written_later() {
        let disk = Arc::new(MemoryFs::new());
        let seen = seen_on(&disk);
        let app: Repository = "acme/app".parse().unwrap();
        seen.note(UPSTREAM, &app, &digest(0)).unwrap();
        seen.note_public(UPSTREAM, &app, Some(std::time::SystemTime::UNIX_EPOCH))
            .unwrap();
        disk.set_bytes_max(0);
        seen.note_gone(UPSTREAM, &app, &digest(0)).unwrap_err();
        seen.note_public(UPSTREAM, &app, None).unwrap_err();
        for number in 1..=UNWRITTEN_MAX {
            seen.note(UPSTREAM, &app, &digest(number)).unwrap_err();
        }
        evict(&seen, &app);
        assert!(!has(&seen, &app, 0));
        disk.set_bytes_max(u64::MAX);
        seen.append_owing();
        assert!(seen.in_use.owing().is_empty());
        let again = seen_on(&disk);
        assert!(!has(&again, &app, 0));
        assert_eq!(again.ready_public(UPSTREAM, &app), Some(None));
    }
}
