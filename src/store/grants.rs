//! Grants: when an upstream last said yes to a principal in a repository, or gave it a token. In memory and in the index only: a lost one
//! costs one question. One that was taken back must not be found again, so that is made durable at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;

use super::Store;
use super::cache::{GrantKey, GrantRef, PlaceRef, counted};
use super::index::thread::IndexHandle;
use super::record::{from_millis, to_millis};
use crate::oci::Repository;

/// Grants kept in the index. CI jobs bring a credential of their own each, so there is no end to them.
const GRANTS_MAX: usize = 65_536;

/// Grants kept ready in memory, and the knowledge that there is none.
const READY_MAX: usize = 65_536;

/// No configuration makes use of an older one.
const KEPT_FOR: Duration = Duration::from_secs(30 * 24 * 3600);

/// So many new grants later, the old ones are looked through.
const PRUNE_EVERY: u64 = 16_384;

const KEY_PREFIX: u8 = b'g';
const SCAN_PAGE: usize = 1000;

impl Store {
    /// When the upstream last said yes to `principal` in this repository.
    pub fn grant(&self, upstream: &str, repository: &Repository, principal: &[u8; 32]) -> Option<SystemTime> {
        self.grants.find(upstream, Some(repository), principal)
    }

    /// How many principals the upstream has said yes to in this repository, as far as is remembered.
    pub fn grants_count(&self, upstream: &str, repository: &Repository) -> usize {
        let prefix = [
            &[KEY_PREFIX],
            upstream.as_bytes(),
            b"\0",
            repository.as_str().as_bytes(),
            b"\0",
        ]
        .concat();
        let found = self.grants.index.scan(prefix, Vec::new(), GRANTS_MAX);
        found.map_or(0, |found| found.len())
    }

    /// Keeps that the upstream said yes at `at`.
    pub fn note_grant(&self, upstream: &str, repository: &Repository, principal: &[u8; 32], at: SystemTime) {
        self.grants.note(upstream, Some(repository), principal, at);
    }

    /// Forgets the upstream's yes, so that no crash brings it back; `false` if that is not sure. Blocks, unless it is known
    /// that there is none.
    pub fn drop_grant(&self, upstream: &str, repository: &Repository, principal: &[u8; 32]) -> bool {
        self.grants.forget(upstream, Some(repository), principal)
    }

    /// When the upstream's token service last gave `principal` a token.
    pub fn login(&self, upstream: &str, principal: &[u8; 32]) -> Option<SystemTime> {
        self.grants.find(upstream, None, principal)
    }

    /// Keeps that the token service gave one at `at`.
    pub fn note_login(&self, upstream: &str, principal: &[u8; 32], at: SystemTime) {
        self.grants.note(upstream, None, principal, at);
    }

    /// As [`Self::drop_grant`], of the token service's yes.
    pub fn drop_login(&self, upstream: &str, principal: &[u8; 32]) -> bool {
        self.grants.forget(upstream, None, principal)
    }
}

pub(super) struct Grants {
    index: Arc<IndexHandle>,
    /// `None` is the knowledge that there is none.
    ready: Cache<GrantKey, Option<SystemTime>>,
    noted: AtomicU64,
}

impl Grants {
    pub(super) fn new(index: &Arc<IndexHandle>) -> Self {
        Self {
            index: Arc::clone(index),
            ready: counted(READY_MAX),
            noted: AtomicU64::new(0),
        }
    }

    fn find(
        &self,
        upstream: &str,
        repository: Option<&Repository>,
        principal: &[u8; 32],
    ) -> Option<SystemTime> {
        let key = key(upstream, repository, principal);
        if let Some(known) = self.ready.get(&key) {
            return known;
        }
        let value = self.index.get(index_key(key)).ok()?;
        let at = value.and_then(|value| Some(from_millis(u64::from_be_bytes(value.try_into().ok()?))));
        // Not over what was noted meanwhile.
        self.ready
            .get_or_insert_with(&key.owned(repository), || Ok::<_, std::convert::Infallible>(at))
            .unwrap_or(at)
    }

    fn note(&self, upstream: &str, repository: Option<&Repository>, principal: &[u8; 32], at: SystemTime) {
        let key = key(upstream, repository, principal);
        let value = to_millis(at).to_be_bytes().to_vec();
        self.index.put(index_key(key), value);
        self.ready.insert(key.owned(repository), Some(at));
        if self.noted.fetch_add(1, Ordering::Relaxed) % PRUNE_EVERY == PRUNE_EVERY - 1 {
            let pruning = std::thread::Builder::new()
                .name("grants-prune".to_owned())
                .spawn(self.pruner(at));
            // Without a thread now, the next time.
            drop(pruning);
        }
    }

    fn forget(&self, upstream: &str, repository: Option<&Repository>, principal: &[u8; 32]) -> bool {
        let key = key(upstream, repository, principal);
        if self.ready.get(&key) == Some(None) {
            return true;
        }
        self.ready.insert(key.owned(repository), None);
        self.index.expunge(index_key(key))
    }

    /// Removes from the index what is too old, and what is too many, the oldest first.
    pub(super) fn pruner(&self, now: SystemTime) -> impl FnOnce() + Send + 'static {
        let index = Arc::downgrade(&self.index);
        let oldest = to_millis(now.checked_sub(KEPT_FOR).unwrap_or(SystemTime::UNIX_EPOCH));
        move || {
            let Some(index) = index.upgrade() else { return };
            let mut kept: Vec<(u64, Vec<u8>)> = Vec::new();
            let mut after = Vec::new();
            while let Ok(page) = index.scan(vec![KEY_PREFIX], after.clone(), SCAN_PAGE) {
                let Some((last, _)) = page.last() else { break };
                after.clone_from(last);
                for (key, value) in page {
                    let at = value.try_into().map_or(0, u64::from_be_bytes);
                    if at < oldest {
                        index.remove(key);
                    } else {
                        kept.push((at, key));
                    }
                }
            }
            let surplus = kept.len().saturating_sub(GRANTS_MAX);
            kept.sort_unstable();
            for (_, key) in kept.into_iter().take(surplus) {
                index.remove(key);
            }
        }
    }
}

fn key<'a>(upstream: &'a str, repository: Option<&'a Repository>, principal: &'a [u8; 32]) -> GrantRef<'a> {
    let repository = repository.map_or("", Repository::as_str);
    GrantRef {
        place: PlaceRef { upstream, repository },
        principal,
    }
}

fn index_key(key: GrantRef<'_>) -> Vec<u8> {
    [
        &[KEY_PREFIX],
        key.place.upstream.as_bytes(),
        b"\0",
        key.place.repository.as_bytes(),
        b"\0",
        key.principal,
    ]
    .concat()
}
