//! Appends to the files of proofs: in the order in which memory learned, and with one fsync for all lines that wait.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, TryLockError};

use super::{SeenFiles, SharedSeen, head_line, limit, path, push_line};
use crate::oci::{Digest, Repository};
use crate::store::cache::{Place, PlaceRef};
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

    /// Appends what is not in the file yet. When this returns, all that was learned before is there.
    pub(super) fn append(&self, place: &Place, seen: &SharedSeen) -> Result<(), Fault> {
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
        let block = if is_headed { 0 } else { limit::BLOCK_BYTES };
        self.bytes
            .fetch_add(lines.len() as u64 + block, Ordering::Relaxed);
        let path = path(place);
        self.volume.append(&path, lines.as_bytes()).map_err(|error| {
            // For the next attempt, before what was learned since.
            seen.write(|seen| {
                seen.is_headed = is_headed;
                if contents.len() <= UNWRITTEN_MAX {
                    seen.unwritten.splice(..0, contents);
                }
            });
            Fault::io("append to", path, &error)
        })
    }
}
