//! Appends to membership files: in the order of the changes in memory, and with one fsync for all pending lines.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{MembershipStore, SharedRepoDigests, header_line, path, prune, push_line};
use crate::oci::{Digest, Repository};
use crate::store::cache_key::{RepoKey, RepoKeyRef};
use crate::store::{AsyncStore, StoreError};

/// Lines kept for a retry while a file cannot be written. Each lost member costs one upstream request.
const PENDING_LINES_MAX: usize = 4096;

/// A member that is in memory and not yet in the file.
#[derive(Clone)]
pub struct PendingAppend {
    key: RepoKey,
    repo: Arc<SharedRepoDigests>,
}

/// Result of adding a member in memory.
pub enum MembershipUpdate {
    /// It was already known, or must not be persisted.
    Known,
    /// It was added and must be persisted.
    Pending(PendingAppend),
    /// The repository is not in memory; use the blocking API.
    NotInMemory,
}

impl AsyncStore {
    /// Adds a member in memory. If it is lost before it is persisted, it costs one upstream request.
    pub fn add_member(&self, upstream: &str, repository: &Repository, digest: &Digest) -> MembershipUpdate {
        self.store.membership.add_if_cached(upstream, repository, digest)
    }

    /// Appends a pending member to its file.
    pub async fn persist_membership(&self, pending: PendingAppend) -> Result<(), StoreError> {
        self.write(move |store| store.membership.persist_membership(&pending))
            .await
    }
}

impl MembershipStore {
    fn add_if_cached(&self, upstream: &str, repository: &Repository, digest: &Digest) -> MembershipUpdate {
        // Do not wait for the removal of a file, which needs the disk.
        let Some(_order) = self.order.try_read() else {
            return MembershipUpdate::NotInMemory;
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

    fn persist_membership(&self, pending: &PendingAppend) -> Result<(), StoreError> {
        let _order = self.order.read();
        self.append(&pending.key, &pending.repo)
    }

    /// Retries pending lines that remove a member or make a repository private. Blocks.
    pub(in crate::store) fn append_pending(&self) {
        for (key, repo) in self.in_use.pending() {
            let _order = self.order.read();
            if self.append(&key, &repo).is_err() {
                // Disk errors are reported elsewhere; further appends would fail too.
                return;
            }
        }
    }

    /// Appends all pending lines. When this returns, every change made before the call is in the file.
    pub(super) fn append(&self, key: &RepoKey, repo: &Arc<SharedRepoDigests>) -> Result<(), StoreError> {
        let _appending = repo.appending.lock();
        let (has_header, contents) = repo.write(|repo| {
            let contents = std::mem::take(&mut repo.pending_lines);
            let had_header = repo.has_header;
            repo.has_header |= !contents.is_empty();
            (had_header, contents)
        });
        // Another caller has written it.
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
            // For the next attempt, ahead of newer lines.
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

/// Lines to retry after a failed append: all of them or, beyond the limit, only the removals, each once.
fn retained_lines(contents: Vec<String>) -> Vec<String> {
    if contents.len() <= PENDING_LINES_MAX {
        return contents;
    }
    let mut kept = HashSet::new();
    let removals = contents.into_iter().filter(|line| is_removal(line));
    removals.filter(|line| kept.insert(line.clone())).collect()
}

/// Whether the line revokes an earlier one.
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

    fn has(store: &MembershipStore, repository: &Repository, number: usize) -> bool {
        let repo = store.get(UPSTREAM, repository).unwrap();
        repo.read(|repo| repo.digests.contains(&digest(number)))
    }

    fn evict(store: &MembershipStore, repository: &Repository) {
        store.ready.remove(&RepoKeyRef::new(UPSTREAM, repository));
    }

    #[test]
    fn t08_queued_member_is_not_persisted_after_its_removal() {
        let disk = Arc::new(MemoryFs::new());
        let store = membership_on(&disk);
        let app: Repository = "acme/app".parse().unwrap();
        assert!(!has(&store, &app, 1));
        let MembershipUpdate::Pending(queued) = store.add_if_cached(UPSTREAM, &app, &digest(1)) else {
            panic!("it is in memory and not written down");
        };
        evict(&store, &app);
        store.remove_member(UPSTREAM, &app, &digest(1)).unwrap();
        store.persist_membership(&queued).unwrap();
        assert!(!has(&store, &app, 1));
        assert!(!has(&membership_on(&disk), &app, 1));
    }

    #[test]
    fn t08_removal_refused_by_disk_is_persisted_later() {
        let disk = Arc::new(MemoryFs::new());
        let store = membership_on(&disk);
        let app: Repository = "acme/app".parse().unwrap();
        store.add(UPSTREAM, &app, &digest(0)).unwrap();
        store
            .set_public(UPSTREAM, &app, Some(std::time::SystemTime::UNIX_EPOCH))
            .unwrap();
        disk.set_bytes_max(0);
        store.remove_member(UPSTREAM, &app, &digest(0)).unwrap_err();
        store.set_public(UPSTREAM, &app, None).unwrap_err();
        for number in 1..=PENDING_LINES_MAX {
            store.add(UPSTREAM, &app, &digest(number)).unwrap_err();
        }
        evict(&store, &app);
        assert!(!has(&store, &app, 0));
        disk.set_bytes_max(u64::MAX);
        store.append_pending();
        assert!(store.in_use.pending().is_empty());
        let again = membership_on(&disk);
        assert!(!has(&again, &app, 0));
        assert_eq!(again.public_in_memory(UPSTREAM, &app), Some(None));
    }
}
