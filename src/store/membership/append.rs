//! Appends to the files of proofs: in the order in which memory learned, and with one fsync for all lines that wait.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, TryLockError};

use super::{MembershipStore, SharedRepoDigests, header_line, path, prune, push_line};
use crate::oci::{Digest, Repository};
use crate::store::cache_key::{RepoKey, RepoKeyRef};
use crate::store::{AsyncStore, StoreError};

/// Lines kept for another attempt while a file cannot be written to. Proofs that are lost cost a question each.
const PENDING_LINES_MAX: usize = 4096;

/// A proof that is in memory and not on the disk.
#[derive(Clone)]
pub struct PendingAppend {
    key: RepoKey,
    repo: Arc<SharedRepoDigests>,
}

/// What became of a proof in memory.
pub enum MembershipUpdate {
    /// It was known, or is not to be written down.
    Known,
    /// It is known now.
    Pending(PendingAppend),
    /// It takes the disk to know.
    NotInMemory,
}

impl AsyncStore {
    /// Keeps in memory the proof that the upstream has `digest` in this repository. Lost before it is written down, it
    /// costs one question.
    pub fn add_member(&self, upstream: &str, repository: &Repository, digest: &Digest) -> MembershipUpdate {
        self.store.membership.add_if_cached(upstream, repository, digest)
    }

    /// Writes a proof down.
    pub async fn persist_membership(&self, pending_lines: PendingAppend) -> Result<(), StoreError> {
        self.write(move |store| store.membership.persist_membership(&pending_lines))
            .await
    }
}

impl MembershipStore {
    fn add_if_cached(&self, upstream: &str, repository: &Repository, digest: &Digest) -> MembershipUpdate {
        // Not while a file is let go of, which takes the disk.
        let _order = match self.order.try_read() {
            Ok(order) => order,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return MembershipUpdate::NotInMemory,
        };
        let Some(ready) = self.ready.get(&RepoKeyRef::new(upstream, repository)) else {
            return MembershipUpdate::NotInMemory;
        };
        let repo = ready.repo;
        match self.add_in_memory(upstream, repository, digest, &repo) {
            Some(key) => MembershipUpdate::Pending(PendingAppend { key, repo }),
            None => MembershipUpdate::Known,
        }
    }

    fn persist_membership(&self, pending_lines: &PendingAppend) -> Result<(), StoreError> {
        let _order = self.order.read().unwrap_or_else(PoisonError::into_inner);
        self.append(&pending_lines.key, &pending_lines.repo)
    }

    /// Tries again to write down what takes something back. Blocks.
    pub(in crate::store) fn append_pending(&self) {
        for (key, repo) in self.in_use.pending() {
            let _order = self.order.read().unwrap_or_else(PoisonError::into_inner);
            if self.append(&key, &repo).is_err() {
                // The disk is told of elsewhere; the others would fail too.
                return;
            }
        }
    }

    /// Appends what is not in the file yet. When this returns, all that was learned before is there.
    pub(super) fn append(&self, key: &RepoKey, repo: &Arc<SharedRepoDigests>) -> Result<(), StoreError> {
        let _appending = repo.appending.lock().unwrap_or_else(PoisonError::into_inner);
        let (has_header, contents) = repo.write(|repo| {
            let contents = std::mem::take(&mut repo.pending_lines);
            let had_header = repo.has_header;
            repo.has_header |= !contents.is_empty();
            (had_header, contents)
        });
        // Another has written it.
        if contents.is_empty() {
            return Ok(());
        }
        let mut lines = String::new();
        if !has_header {
            push_line(&mut lines, key, &header_line(key));
        }
        for content in &contents {
            push_line(&mut lines, key, content);
        }
        let block = if has_header { 0 } else { prune::BLOCK_BYTES };
        self.bytes
            .fetch_add(lines.len() as u64 + block, Ordering::Relaxed);
        let path = path(key);
        let appended = self.fs.append(&path, lines.as_bytes());
        let is_pending = appended.is_err() && {
            // For the next attempt, before what was learned since.
            repo.write(|repo| {
                repo.has_header = has_header;
                repo.pending_lines.splice(..0, retained_lines(contents));
                repo.pending_lines.iter().any(|line| is_removal(line))
            })
        };
        self.in_use.set_pending(key, repo, is_pending);
        appended.map_err(|error| StoreError::io("append to", path, &error))
    }
}

/// What is tried again of lines that could not be appended: all of them or, where they are too many, what takes something
/// back, each line once.
fn retained_lines(contents: Vec<String>) -> Vec<String> {
    if contents.len() <= PENDING_LINES_MAX {
        return contents;
    }
    let mut kept = HashSet::new();
    let taking_back = contents.into_iter().filter(|line| is_removal(line));
    taking_back.filter(|line| kept.insert(line.clone())).collect()
}

/// Whether the line ends what an earlier one says.
fn is_removal(line: &str) -> bool {
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

    fn membership_on(disk: &Arc<MemoryFs>) -> MembershipStore {
        let fs = Arc::clone(disk) as Arc<dyn FileSystem>;
        MembershipStore::with_quota(&fs, u64::MAX)
    }

    fn has(repo: &MembershipStore, repository: &Repository, number: usize) -> bool {
        let repo = repo.get(UPSTREAM, repository).unwrap();
        repo.read(|repo| repo.digests.contains(&digest(number)))
    }

    fn evict(repo: &MembershipStore, repository: &Repository) {
        repo.ready.remove(&RepoKeyRef::new(UPSTREAM, repository));
    }

    #[test]
    fn t08_queued_proof_is_not_written_over_its_deletion() {
        let disk = Arc::new(MemoryFs::new());
        let repo = membership_on(&disk);
        let app: Repository = "acme/app".parse().unwrap();
        assert!(!has(&repo, &app, 1));
        let MembershipUpdate::Pending(queued) = repo.add_if_cached(UPSTREAM, &app, &digest(1)) else {
            panic!("it is in memory and not written down");
        };
        evict(&repo, &app);
        repo.remove_member(UPSTREAM, &app, &digest(1)).unwrap();
        repo.persist_membership(&queued).unwrap();
        assert!(!has(&repo, &app, 1));
        assert!(!has(&membership_on(&disk), &app, 1));
    }

    #[test]
    fn t08_deletion_that_no_disk_took_is_written_later() {
        let disk = Arc::new(MemoryFs::new());
        let repo = membership_on(&disk);
        let app: Repository = "acme/app".parse().unwrap();
        repo.add(UPSTREAM, &app, &digest(0)).unwrap();
        repo.set_public(UPSTREAM, &app, Some(std::time::SystemTime::UNIX_EPOCH))
            .unwrap();
        disk.set_bytes_max(0);
        repo.remove_member(UPSTREAM, &app, &digest(0)).unwrap_err();
        repo.set_public(UPSTREAM, &app, None).unwrap_err();
        for number in 1..=PENDING_LINES_MAX {
            repo.add(UPSTREAM, &app, &digest(number)).unwrap_err();
        }
        evict(&repo, &app);
        assert!(!has(&repo, &app, 0));
        disk.set_bytes_max(u64::MAX);
        repo.append_pending();
        assert!(repo.in_use.pending().is_empty());
        let again = membership_on(&disk);
        assert!(!has(&again, &app, 0));
        assert_eq!(again.public_in_memory(UPSTREAM, &app), Some(None));
    }
}
