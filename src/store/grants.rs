//! Grants: when an upstream last authorized a principal in a repository, or issued it a token.
//!
//! Grants are in memory and in the index only: a lost grant costs one upstream request. A revoked grant must never be
//! found again, so a revocation is made durable at once.
//!
//! Most principals that are looked up have no grant, because each CI job brings its own token. So memory also has a
//! hash of every grant in the index, and the index is read only if it may have one.

mod filter;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use quick_cache::sync::Cache;

use self::filter::GrantFilter;
use super::cache_key::{GrantKey, GrantRef, RepoKeyRef, bounded_cache};
use super::checksummed_json::{from_millis, to_millis};
use super::index::handle::{DurableRemoval, IndexHandle};
use super::{AsyncStore, Store};
use crate::oci::Repository;

/// Maximum number of grants in the index. CI jobs bring a new credential each, so their number is unbounded.
const GRANTS_MAX: usize = 65_536;

/// Cached lookups, including negative ones.
const READY_MAX: usize = 65_536;

/// No configuration uses an older grant.
const RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);

/// Number of puts between two prunings.
const PRUNE_EVERY: u64 = 16_384;

/// How often a lookup is retried because of a concurrent revocation.
const LOOKUP_ATTEMPTS_MAX: usize = 4;

const KEY_PREFIX: u8 = b'g';
const SCAN_PAGE: usize = 1000;

/// Key of a grant: a principal in a repository or, without one, at the upstream's token service.
#[derive(Clone, Copy)]
pub struct GrantId<'a> {
    /// The name of the upstream.
    pub upstream: &'a str,
    /// The repository at the upstream.
    pub repository: Option<&'a Repository>,
    /// Hash of the credential or account.
    pub principal: &'a [u8; 32],
}

impl Store {
    /// Number of principals with a grant in this repository.
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
        let is_intact = |(_, value): &&(Vec<u8>, Vec<u8>)| !value.is_empty();
        found.map_or(0, |found| found.iter().filter(is_intact).count())
    }
}

impl AsyncStore {
    /// When the upstream last authorized this; the outer `None` if the index must be read.
    pub fn grant_in_memory(&self, id: GrantId<'_>) -> Option<Option<SystemTime>> {
        self.store.grants.in_memory(id.key(), || id.owned())
    }

    /// When the upstream last authorized this, as far as the index answers in time.
    pub async fn grant(&self, id: GrantId<'_>) -> Option<SystemTime> {
        if let Some(known) = self.grant_in_memory(id) {
            return known;
        }
        let key = id.owned();
        self.on_index(move |store| store.grants.find(&key)).await
    }

    /// Records that the upstream authorized this at `at`.
    pub fn put_grant(&self, id: GrantId<'_>, at: SystemTime) {
        self.store.grants.put(id, at);
    }

    /// Revokes a grant: in memory at once, and durably when the future resolves to `true`.
    pub fn revoke_grant(&self, id: GrantId<'_>) -> impl Future<Output = bool> + Send + use<> {
        let revocation = self.store.grants.revoke(id);
        let this = self.clone();
        async move {
            match revocation {
                None => true,
                Some(revocation) => {
                    this.on_index(move |store| store.grants.finish_revocation(revocation))
                        .await
                }
            }
        }
    }
}

/// A revocation that is not yet durable.
struct Revocation {
    key: GrantKey,
    expunging: DurableRemoval,
}

/// Cached result of a grant lookup.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CachedGrant {
    Granted(SystemTime),
    Absent,
    /// Revoked; not known to be durable yet.
    Revoked,
}

impl CachedGrant {
    fn at(self) -> Option<SystemTime> {
        match self {
            Self::Granted(at) => Some(at),
            Self::Absent | Self::Revoked => None,
        }
    }
}

pub(super) struct Grants {
    index: Arc<IndexHandle>,
    ready: Cache<GrantKey, CachedGrant>,
    /// Held while `ready` and the index are changed together, to keep both in the same order.
    order: Mutex<()>,
    /// Number of revocations. A lookup that overlaps one is retried.
    revocations: AtomicU64,
    filter: GrantFilter,
    puts: AtomicU64,
}

impl Grants {
    pub(super) fn new(index: &Arc<IndexHandle>) -> Self {
        Self {
            index: Arc::clone(index),
            ready: bounded_cache(READY_MAX),
            order: Mutex::default(),
            revocations: AtomicU64::new(0),
            filter: GrantFilter::default(),
            puts: AtomicU64::new(0),
        }
    }

    /// The cached grant; `None` if the index must be read.
    #[expect(clippy::option_option, reason = "whether it is known, and what is known")]
    fn in_memory(&self, key: GrantRef<'_>, owned: impl FnOnce() -> GrantKey) -> Option<Option<SystemTime>> {
        if let Some(known) = self.ready.get(&key) {
            return Some(known.at());
        }
        if !self.filter.excludes(&index_key(key)) {
            return None;
        }
        // Do not overwrite a concurrent put.
        let known = self.ready.get_or_insert_with(&owned(), || {
            Ok::<_, std::convert::Infallible>(CachedGrant::Absent)
        });
        Some(known.ok().and_then(CachedGrant::at))
    }

    /// Reads the index if needed. Blocks.
    fn find(&self, key: &GrantKey) -> Option<SystemTime> {
        for _ in 0..LOOKUP_ATTEMPTS_MAX {
            if let Some(known) = self.in_memory(key.borrowed(), || key.clone()) {
                return known;
            }
            let revocations = self.revocations.load(Ordering::SeqCst);
            let value = self.index.get(index_key(key.borrowed())).ok()?;
            let at = value.and_then(|value| Some(from_millis(u64::from_be_bytes(value.try_into().ok()?))));
            let _order = self.order.lock();
            if self.revocations.load(Ordering::SeqCst) == revocations {
                let found = at.map_or(CachedGrant::Absent, CachedGrant::Granted);
                // Do not overwrite a concurrent put.
                let known = self
                    .ready
                    .get_or_insert_with(key, || Ok::<_, std::convert::Infallible>(found));
                return known.unwrap_or(found).at();
            }
        }
        None
    }

    fn put(self: &Arc<Self>, id: GrantId<'_>, at: SystemTime) {
        let key = index_key(id.key());
        {
            let _order = self.order.lock();
            self.filter.add(&key);
            self.index.put(key, to_millis(at).to_be_bytes().to_vec());
            self.ready.insert(id.owned(), CachedGrant::Granted(at));
        }
        if self.puts.fetch_add(1, Ordering::Relaxed) % PRUNE_EVERY == PRUNE_EVERY - 1 {
            let this = Arc::downgrade(self);
            let pruning = std::thread::Builder::new()
                .name("grants-prune".to_owned())
                .spawn(move || this.upgrade().map(|this| this.prune(at)));
            // If no thread can be started, the next put retries.
            drop(pruning);
        }
    }

    /// Starts a revocation; `None` if there is no grant. If an earlier revocation of the same grant is not durable yet,
    /// this one waits for durability as well.
    fn revoke(&self, id: GrantId<'_>) -> Option<Revocation> {
        let key = id.owned();
        let _order = self.order.lock();
        if self.ready.get(&key) == Some(CachedGrant::Absent) {
            return None;
        }
        self.revocations.fetch_add(1, Ordering::SeqCst);
        self.ready.insert(key.clone(), CachedGrant::Revoked);
        let expunging = self.index.remove_durable(index_key(id.key()));
        Some(Revocation { key, expunging })
    }

    /// Waits until the revocation is durable; `false` if it may not be. Blocks.
    fn finish_revocation(&self, revocation: Revocation) -> bool {
        let Revocation { key, expunging } = revocation;
        let is_expunged = self.index.wait_durable(expunging);
        if is_expunged {
            let _order = self.order.lock();
            if self.ready.peek(&key) == Some(CachedGrant::Revoked) {
                self.ready.insert(key, CachedGrant::Absent);
            }
        }
        is_expunged
    }

    /// Whether the filter covers all grants in the index.
    pub(super) fn is_filter_complete(&self) -> bool {
        self.filter.is_complete()
    }

    /// Removes grants from the index that are too old or, the oldest first, too many, and rebuilds the filter. Blocks.
    pub(super) fn prune(&self, now: SystemTime) {
        // Under the same lock as `put`: a grant is either put before the scan begins, or added to the filter by `put`.
        let rebuild = {
            let order = self.order.lock();
            self.filter.begin(&order)
        };
        let Some(mut rebuild) = rebuild else {
            return;
        };
        let oldest = to_millis(now.checked_sub(RETENTION).unwrap_or(SystemTime::UNIX_EPOCH));
        let mut remaining: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut after = Vec::new();
        while let Ok(page) = self.index.scan(vec![KEY_PREFIX], after.clone(), SCAN_PAGE) {
            let Some((last, _)) = page.last() else {
                rebuild.finish();
                break;
            };
            after.clone_from(last);
            for (key, value) in page {
                rebuild.add(&key);
                let at = value.try_into().map_or(0, u64::from_be_bytes);
                if at < oldest {
                    self.index.remove(key);
                } else {
                    remaining.push((at, key));
                }
            }
        }
        let surplus = remaining.len().saturating_sub(GRANTS_MAX);
        remaining.sort_unstable();
        for (_, key) in remaining.into_iter().take(surplus) {
            self.index.remove(key);
        }
    }
}

impl<'a> GrantId<'a> {
    fn key(&self) -> GrantRef<'a> {
        let repository = self.repository.map_or("", Repository::as_str);
        GrantRef {
            repo: RepoKeyRef {
                upstream: self.upstream,
                repository,
            },
            principal: self.principal,
        }
    }

    fn owned(&self) -> GrantKey {
        self.key().owned(self.repository)
    }
}

fn index_key(key: GrantRef<'_>) -> Vec<u8> {
    [
        &[KEY_PREFIX],
        key.repo.upstream.as_bytes(),
        b"\0",
        key.repo.repository.as_bytes(),
        b"\0",
        key.principal,
    ]
    .concat()
}

/// Blocking API for tests without a runtime.
#[cfg(test)]
impl Store {
    pub(super) fn grant(
        &self,
        upstream: &str,
        repository: &Repository,
        principal: &[u8; 32],
    ) -> Option<SystemTime> {
        self.grants
            .find(&GrantId::to(upstream, repository, principal).owned())
    }

    pub(super) fn put_grant(
        &self,
        upstream: &str,
        repository: &Repository,
        principal: &[u8; 32],
        at: SystemTime,
    ) {
        self.grants.put(GrantId::to(upstream, repository, principal), at);
    }

    pub(super) fn revoke_grant(&self, upstream: &str, repository: &Repository, principal: &[u8; 32]) -> bool {
        let revocation = self.grants.revoke(GrantId::to(upstream, repository, principal));
        revocation.is_none_or(|revocation| self.grants.finish_revocation(revocation))
    }
}

#[cfg(test)]
impl<'a> GrantId<'a> {
    fn to(upstream: &'a str, repository: &'a Repository, principal: &'a [u8; 32]) -> Self {
        Self {
            upstream,
            repository: Some(repository),
            principal,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    #![allow(clippy::option_option, reason = "whether it is known, and what is known")]
    use super::*;
    use crate::store::index::slow::slow_index;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn cached(grants: &Grants, id: GrantId<'_>) -> Option<Option<SystemTime>> {
        grants.in_memory(id.key(), || id.owned())
    }

    #[test]
    fn t07_put_grant_does_not_wait_for_another_revocation() {
        let (index, flushes) = slow_index();
        let grants = Arc::new(Grants::new(&index));
        grants.prune(NOW);
        let repository = "acme/app".parse().unwrap();
        let id = |principal| GrantId::to("ghcr.io", &repository, principal);
        let (alice, bob) = (&[1; 32], &[2; 32]);
        grants.put(id(alice), NOW);
        assert_eq!(cached(&grants, id(alice)), Some(Some(NOW)));
        let first = grants.revoke(id(alice)).unwrap();
        flushes.begun();
        // None of these calls reads the index, which is busy with a flush.
        assert_eq!(cached(&grants, id(alice)), Some(None));
        assert_eq!(cached(&grants, id(bob)), Some(None));
        grants.put(id(bob), NOW);
        assert_eq!(cached(&grants, id(bob)), Some(Some(NOW)));
        // A second revocation waits for its own flush.
        let second = grants.revoke(id(alice)).unwrap();
        flushes.let_through();
        assert!(grants.finish_revocation(first));
        flushes.begun();
        flushes.let_through();
        assert!(grants.finish_revocation(second));
        assert!(grants.revoke(id(alice)).is_none());
        drop(flushes);
    }

    #[test]
    fn t07_grant_of_earlier_process_found_after_rebuild() {
        let (index, flushes) = slow_index();
        drop(flushes);
        let repository = "acme/app".parse().unwrap();
        let id = |principal| GrantId::to("ghcr.io", &repository, principal);
        let (alice, bob) = (&[1; 32], &[2; 32]);
        Arc::new(Grants::new(&index)).put(id(alice), NOW);
        let grants = Arc::new(Grants::new(&index));
        // Until the filter is built, the index must be read.
        assert_eq!(cached(&grants, id(alice)), None);
        assert_eq!(cached(&grants, id(bob)), None);
        grants.prune(NOW);
        assert_eq!(cached(&grants, id(alice)), None);
        assert_eq!(grants.find(&id(alice).owned()), Some(NOW));
        assert_eq!(cached(&grants, id(bob)), Some(None));
    }
}
