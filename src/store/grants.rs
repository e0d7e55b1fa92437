//! Grants: when an upstream last said yes to a principal in a repository, or gave it a token. In memory and in the index only: a lost one
//! costs one question. One that was taken back must not be found again, so that is made durable at once.
//!
//! Most principals that are looked up have no grant: each CI job brings a token of its own. So memory also has a hash of
//! every grant in the index, and the index is asked only where one may be there.

mod filter;

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;

use self::filter::GrantFilter;
use super::cache_key::{GrantKey, GrantRef, RepoKeyRef, bounded_cache};
use super::checksummed_json::{from_millis, to_millis};
use super::index::handle::{DurableRemoval, IndexHandle};
use super::{AsyncStore, Store};
use crate::oci::Repository;

/// Grants kept in the index. CI jobs bring a credential of their own each, so there is no end to them.
const GRANTS_MAX: usize = 65_536;

/// Grants kept ready in memory, and the knowledge that there is none.
const READY_MAX: usize = 65_536;

/// No configuration makes use of an older one.
const RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);

/// So many new grants later, the old ones are looked through.
const PRUNE_EVERY: u64 = 16_384;

/// How often a look-up begins again because a grant was taken back meanwhile.
const LOOKUP_ATTEMPTS_MAX: usize = 4;

const KEY_PREFIX: u8 = b'g';
const SCAN_PAGE: usize = 1000;

/// A principal's right: to a repository, or (without one) to a token of the upstream's token service.
#[derive(Clone, Copy)]
pub struct GrantId<'a> {
    /// The name of the upstream.
    pub upstream: &'a str,
    /// The repository there.
    pub repository: Option<&'a Repository>,
    /// Whose right.
    pub principal: &'a [u8; 32],
}

impl Store {
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
}

impl AsyncStore {
    /// When the upstream last said yes; `None` where it takes the index to know.
    pub fn grant_in_memory(&self, id: GrantId<'_>) -> Option<Option<SystemTime>> {
        self.store.grants.in_memory(id.key(), || id.owned())
    }

    /// When the upstream last said yes, as far as the index says in time.
    pub async fn grant(&self, id: GrantId<'_>) -> Option<SystemTime> {
        if let Some(known) = self.grant_in_memory(id) {
            return known;
        }
        let key = id.owned();
        self.on_index(move |store| store.grants.find(&key)).await
    }

    /// Keeps that the upstream said yes at `at`.
    pub fn put_grant(&self, id: GrantId<'_>, at: SystemTime) {
        self.store.grants.put(id, at);
    }

    /// Forgets the upstream's yes: at once, and when the future ends so that no crash brings it back, if that says `true`.
    pub fn revoke_grant(&self, id: GrantId<'_>) -> impl Future<Output = bool> + Send + use<> {
        let revocation = self.store.grants.revoke(id);
        let own = self.clone();
        async move {
            match revocation {
                None => true,
                Some(revocation) => {
                    own.on_index(move |store| store.grants.finish_revocation(revocation))
                        .await
                }
            }
        }
    }
}

/// A right that is being taken back.
struct Revocation {
    key: GrantKey,
    expunging: DurableRemoval,
}

/// What is known of a right.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CachedGrant {
    Granted(SystemTime),
    Absent,
    /// Not durably so yet, as far as is known.
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
    /// Held for a change of `ready` and the message to the index that belongs to it, so that both come in one order.
    order: Mutex<()>,
    /// How often a right was taken back: a look-up that was overtaken by one looks again.
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

    /// What memory knows of a right; `None` where it takes the index to know.
    #[expect(clippy::option_option, reason = "whether it is known, and what is known")]
    fn in_memory(&self, key: GrantRef<'_>, owned: impl FnOnce() -> GrantKey) -> Option<Option<SystemTime>> {
        if let Some(known) = self.ready.get(&key) {
            return Some(known.at());
        }
        if !self.filter.excludes(&index_key(key)) {
            return None;
        }
        // Not over what was noted meanwhile.
        let known = self.ready.get_or_insert_with(&owned(), || {
            Ok::<_, std::convert::Infallible>(CachedGrant::Absent)
        });
        Some(known.ok().and_then(CachedGrant::at))
    }

    /// Blocks.
    fn find(&self, key: &GrantKey) -> Option<SystemTime> {
        for _ in 0..LOOKUP_ATTEMPTS_MAX {
            if let Some(known) = self.in_memory(key.borrowed(), || key.clone()) {
                return known;
            }
            let revocations = self.revocations.load(Ordering::SeqCst);
            let value = self.index.get(index_key(key.borrowed())).ok()?;
            let at = value.and_then(|value| Some(from_millis(u64::from_be_bytes(value.try_into().ok()?))));
            let _order = self.order();
            if self.revocations.load(Ordering::SeqCst) == revocations {
                let found = at.map_or(CachedGrant::Absent, CachedGrant::Granted);
                // Not over what was noted meanwhile.
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
            let _order = self.order();
            self.filter.add(&key);
            self.index.put(key, to_millis(at).to_be_bytes().to_vec());
            self.ready.insert(id.owned(), CachedGrant::Granted(at));
        }
        if self.puts.fetch_add(1, Ordering::Relaxed) % PRUNE_EVERY == PRUNE_EVERY - 1 {
            let own = Arc::downgrade(self);
            let pruning = std::thread::Builder::new()
                .name("grants-prune".to_owned())
                .spawn(move || own.upgrade().map(|own| own.prune(at)));
            // Without a thread now, the next time.
            drop(pruning);
        }
    }

    /// Begins to take a right back; `None` where it is known that there is none. A second refusal, while the first is not
    /// durable yet, is one more: its client waits as well.
    fn revoke(&self, id: GrantId<'_>) -> Option<Revocation> {
        let key = id.owned();
        let _order = self.order();
        if self.ready.get(&key) == Some(CachedGrant::Absent) {
            return None;
        }
        self.revocations.fetch_add(1, Ordering::SeqCst);
        self.ready.insert(key.clone(), CachedGrant::Revoked);
        let expunging = self.index.remove_durable(index_key(id.key()));
        Some(Revocation { key, expunging })
    }

    /// Waits for it to be durable; `false` if that is not sure. Blocks.
    fn finish_revocation(&self, revocation: Revocation) -> bool {
        let Revocation { key, expunging } = revocation;
        let is_expunged = self.index.wait_durable(expunging);
        if is_expunged {
            let _order = self.order();
            if self.ready.peek(&key) == Some(CachedGrant::Revoked) {
                self.ready.insert(key, CachedGrant::Absent);
            }
        }
        is_expunged
    }

    fn order(&self) -> MutexGuard<'_, ()> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether memory knows which grants are in the index.
    pub(super) fn is_filter_complete(&self) -> bool {
        self.filter.is_complete()
    }

    /// Removes from the index what is too old, and what is too many, the oldest first, and lists the rest. Blocks.
    pub(super) fn prune(&self, now: SystemTime) {
        // In turn with `note`: a grant is either put before the look begins, or listed by it.
        let rebuild = {
            let order = self.order();
            self.filter.begin(&order)
        };
        let Some(mut rebuild) = rebuild else {
            return;
        };
        let oldest = to_millis(now.checked_sub(RETENTION).unwrap_or(SystemTime::UNIX_EPOCH));
        let mut kept: Vec<(u64, Vec<u8>)> = Vec::new();
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
                    kept.push((at, key));
                }
            }
        }
        let surplus = kept.len().saturating_sub(GRANTS_MAX);
        kept.sort_unstable();
        for (_, key) in kept.into_iter().take(surplus) {
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

/// For tests that have no runtime.
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
    fn t07_first_grant_waits_for_no_revocation_of_another() {
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
        // Nothing of this asks the index, which is in its flush.
        assert_eq!(cached(&grants, id(alice)), Some(None));
        assert_eq!(cached(&grants, id(bob)), Some(None));
        grants.put(id(bob), NOW);
        assert_eq!(cached(&grants, id(bob)), Some(Some(NOW)));
        // Refused again meanwhile, the client waits as well.
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
    fn t07_grant_of_an_earlier_process_is_found_beside_the_list() {
        let (index, flushes) = slow_index();
        drop(flushes);
        let repository = "acme/app".parse().unwrap();
        let id = |principal| GrantId::to("ghcr.io", &repository, principal);
        let (alice, bob) = (&[1; 32], &[2; 32]);
        Arc::new(Grants::new(&index)).put(id(alice), NOW);
        let grants = Arc::new(Grants::new(&index));
        // Before the index was looked through, only it knows.
        assert_eq!(cached(&grants, id(alice)), None);
        assert_eq!(cached(&grants, id(bob)), None);
        grants.prune(NOW);
        assert_eq!(cached(&grants, id(alice)), None);
        assert_eq!(grants.find(&id(alice).owned()), Some(NOW));
        assert_eq!(cached(&grants, id(bob)), Some(None));
    }
}
