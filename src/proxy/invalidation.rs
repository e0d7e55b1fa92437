//! Invalidation of cached content by a push or a deletion that passes through the cache (RFC 9111 §4.4).
//!
//! The write itself is forwarded unchanged. Before that, the entries that it may change are durably marked as
//! invalidated ([`crate::store::invalidations`]). Such an entry is revalidated before it is served, and served stale
//! while the upstream is unavailable.
//!
//! The upstream's response to the write then decides. After a success, the cache removes the tag, and the membership of
//! a deleted digest. After a rejection its marks are removed, so that a client without push access cannot evict a tag.
//! After any other result the mark remains.
//!
//! A response to a read that the upstream sent before the write must not restore the old state. So such a response is
//! not recorded if a write to the repository ended since the read arrived. What such a response has recorded before the check is
//! removed if the registry accepted the write, and marked as invalidated otherwise.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::concurrency::detached;
use super::log_store_error;
use super::manifest_fetch::UpstreamRequest;
pub use super::write_effect::WriteEffect;
use super::{ProxyService, UpstreamRegistry};
use crate::oci::{Digest, MediaType, Reference, Repository, Tag};
use crate::store::Store;
use crate::store::invalidations::InvalidationKey;
use crate::store::tags::TagKey;

/// Number of write counters. Repositories with the same hash share a counter; the only effect is that some responses
/// are not recorded, or that their records are revalidated.
const COUNTERS: usize = 256;

/// Repositories of one counter for which the last accepted write is remembered.
const ACCEPTED_MAX: usize = 8;

/// Tags read per page.
const TAGS_PAGE_SIZE: usize = 1024;

/// A revalidation clears an invalidation mark only if the mark is at least this old, because a registry may still
/// commit a write whose connection is closed.
const WRITE_SETTLE_TIME: Duration = Duration::from_secs(60);

/// Write counters of a repository at the arrival of a request. Comparing two snapshots shows whether a write happened
/// in between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WriteSnapshot {
    /// Writes that may have taken effect.
    ended: u64,
    /// Writes started; `None` while one is in progress.
    begun: Option<u64>,
}

impl WriteSnapshot {
    /// Writes that may have taken effect.
    pub(super) fn ended(self) -> u64 {
        self.ended
    }

    /// Whether no write was in progress.
    pub(super) fn is_quiet(self) -> bool {
        self.begun.is_some()
    }
}

/// Write counters of an upstream, by repository.
pub(super) struct WriteGenerations([Counter; COUNTERS]);

#[derive(Default)]
struct Counter {
    ended: AtomicU64,
    begun: AtomicU64,
    under_way: AtomicU64,
    last: Mutex<LastWrites>,
}

/// When the last writes ended, at the latest.
#[derive(Default)]
struct LastWrites {
    /// One that the registry accepted.
    accepted: Option<Instant>,
    /// One that may have taken effect.
    possible: Option<Instant>,
    /// The value of `Counter::ended` after the last accepted write of each repository, the oldest first.
    accepted_in: Vec<(Repository, u64)>,
}

impl Default for WriteGenerations {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl WriteGenerations {
    /// Writes started.
    fn begun(&self, repository: &Repository) -> u64 {
        self.counter(repository)
            .map_or(0, |counter| counter.begun.load(Ordering::SeqCst))
    }

    pub(super) fn now(&self, repository: &Repository) -> WriteSnapshot {
        let Some(counter) = self.counter(repository) else {
            return WriteSnapshot::default();
        };
        let ended = counter.ended.load(Ordering::SeqCst);
        let begun = counter.begun.load(Ordering::SeqCst);
        let is_quiet = counter.under_way.load(Ordering::SeqCst) == 0;
        WriteSnapshot {
            ended,
            begun: is_quiet.then_some(begun),
        }
    }

    fn counter(&self, repository: &Repository) -> Option<&Counter> {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        let hash = hasher.hash_one(repository.as_str());
        self.0.get(usize::try_from(hash % COUNTERS as u64).ok()?)
    }

    /// Counts a started write and returns the new count.
    fn begin(&self, repository: &Repository) -> u64 {
        let Some(counter) = self.counter(repository) else {
            return 0;
        };
        counter.under_way.fetch_add(1, Ordering::SeqCst);
        counter.begun.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Whether the upstream may have stated this before the last write that may have taken effect, or which it accepted if
    /// `is_accepted`. `age`: of the statement at `now`. While the host is suspended, the time since a write stands still, so
    /// that more statements are from before it.
    pub(super) fn may_predate_write(
        &self,
        repository: &Repository,
        (age, now): (Duration, Instant),
        is_accepted: bool,
    ) -> bool {
        let ended = self.counter(repository).and_then(|counter| {
            let last = counter.last.lock();
            if is_accepted { last.accepted } else { last.possible }
        });
        ended.is_some_and(|ended| now.saturating_duration_since(ended) <= age)
    }

    /// Whether the registry accepted a write to this very repository after `snapshot`. If more than [`ACCEPTED_MAX`] other
    /// repositories were written since, the write may be forgotten.
    pub(super) fn was_accepted_since(&self, repository: &Repository, snapshot: WriteSnapshot) -> bool {
        self.counter(repository).is_some_and(|counter| {
            let last = counter.last.lock();
            let mut accepted = last.accepted_in.iter();
            accepted.any(|(written, ended)| written == repository && *ended > snapshot.ended)
        })
    }

    /// Counts a write that may have taken effect. Responses from before it are no longer recorded.
    fn note(&self, repository: &Repository, is_accepted: bool) {
        if let Some(counter) = self.counter(repository) {
            let now = Instant::now();
            let possible = if is_accepted { now } else { now + WRITE_SETTLE_TIME };
            let mut last = counter.last.lock();
            last.possible = last.possible.max(Some(possible));
            if is_accepted {
                last.accepted = last.accepted.max(Some(now));
            }
            // Under the lock, so that a reader of the count sees the time and the repository.
            let ended = counter.ended.fetch_add(1, Ordering::SeqCst) + 1;
            if is_accepted {
                last.accepted_in.retain(|(written, _)| written != repository);
                if last.accepted_in.len() >= ACCEPTED_MAX {
                    last.accepted_in.remove(0);
                }
                last.accepted_in.push((repository.clone(), ended));
            }
        }
    }

    fn leave(&self, repository: &Repository) {
        if let Some(counter) = self.counter(repository) {
            counter.under_way.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Result of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// The registry accepted it.
    Succeeded,
    /// The registry rejected it, or the request never reached the registry.
    Rejected,
    /// It may have taken effect.
    Unknown,
}

/// A forwarded write. If it is dropped without a result, because its client left, the write may have taken effect.
pub struct PendingWrite {
    registry: Arc<UpstreamRegistry>,
    change: WriteEffect,
    /// Number of this write in the repository's counter.
    generation: u64,
    /// Invalidation marks that only this write set.
    own_doubts: Vec<InvalidationKey>,
    is_rejected: bool,
    is_accepted: bool,
}

impl Drop for PendingWrite {
    fn drop(&mut self) {
        let (write_generations, repository) = (self.registry.write_generations(), self.change.repository());
        if !self.is_rejected {
            write_generations.note(repository, self.is_accepted);
        }
        write_generations.leave(repository);
    }
}

impl ProxyService {
    /// Marks the entries that a write may change as invalidated. When this returns, the marks survive a crash, and
    /// the write may be forwarded.
    pub async fn begin_write(&self, registry: &Arc<UpstreamRegistry>, change: WriteEffect) -> PendingWrite {
        let mut pending = PendingWrite {
            generation: registry.write_generations().begin(change.repository()),
            registry: Arc::clone(registry),
            own_doubts: Vec::new(),
            is_rejected: false,
            is_accepted: false,
            change,
        };
        let keys = pending.change.invalidation_keys(registry);
        if keys.is_empty() {
            return pending;
        }
        let now = self.clock.now();
        let invalidated = self.store.write(move |store| {
            let (mut own, mut outcome) = (Vec::new(), Ok(()));
            for key in keys.into_iter().filter(|key| store.has_cached(key)) {
                match store.invalidate(&key, now) {
                    Ok(true) => own.push(key),
                    Ok(false) => {}
                    Err(fault) => outcome = Err(fault),
                }
            }
            (own, outcome)
        });
        let (own, outcome) = invalidated.await;
        pending.own_doubts = own;
        log_store_error(outcome, "store invalidation mark");
        pending
    }

    /// Applies the result of a write, also if the client leaves meanwhile. When this returns after a success, no client is
    /// served the state from before the write.
    pub async fn finish_write(self: &Arc<Self>, pending: PendingWrite, outcome: WriteOutcome) {
        let proxy = Arc::clone(self);
        detached(async move { proxy.apply_outcome(pending, outcome).await }).await;
    }

    async fn apply_outcome(&self, mut pending: PendingWrite, outcome: WriteOutcome) {
        let registry = Arc::clone(&pending.registry);
        match outcome {
            WriteOutcome::Unknown => {}
            WriteOutcome::Rejected => {
                pending.is_rejected = true;
                for key in std::mem::take(&mut pending.own_doubts) {
                    let is_alone = Self::is_alone(&pending);
                    self.settle(key, is_alone).await;
                }
            }
            WriteOutcome::Succeeded => {
                // Counted first, so that a response in flight is not recorded. Records made earlier are removed
                // below.
                pending.is_accepted = true;
                registry
                    .write_generations()
                    .note(pending.change.repository(), true);
                let (change, repository) = (pending.change.clone(), pending.change.repository().clone());
                let (own, now) = (Arc::clone(&registry), Instant::now());
                let removed = self
                    .store
                    .write(move |store| invalidate(store, &own, change))
                    .await;
                let mut tags = removed.clone().unwrap_or_default();
                log_store_error(removed, "remove written content");
                match &pending.change {
                    // Also those that are not cached here.
                    WriteEffect::Tags(_, changed) => tags.clone_from(changed),
                    WriteEffect::Deleted(_, digest) => {
                        let place = registry.record_place(&repository);
                        self.shared.note_content_deleted(&place, *digest, now);
                    }
                }
                self.note_unnamed_tags(&registry, &repository, &tags, now);
                self.tags_settled(&registry, &repository, &tags).await;
            }
        }
    }

    /// Whether no write started after this one.
    fn is_alone(pending: &PendingWrite) -> impl FnOnce(SystemTime) -> bool + Send + 'static {
        let (registry, repository, generation) = (
            Arc::clone(&pending.registry),
            pending.change.repository().clone(),
            pending.generation,
        );
        move |_| registry.write_generations().begun(&repository) == generation
    }

    async fn settle(
        &self,
        key: InvalidationKey,
        may_settle: impl FnOnce(SystemTime) -> bool + Send + 'static,
    ) {
        if self.store.invalidated_since(&key).is_none() {
            return;
        }
        let settled = self
            .store
            .write(move |store| store.clear_invalidation(&key, may_settle))
            .await;
        log_store_error(settled, "clear invalidation mark");
    }

    /// Whether a write may have changed `reference` since its last revalidation.
    pub(super) fn is_invalidated(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        reference: Reference,
    ) -> bool {
        self.store.has_invalidations() && {
            let key = InvalidationKey {
                upstream: registry.shared_name(),
                repository: repository.clone(),
                reference,
            };
            self.store.invalidated_since(&key).is_some()
        }
    }

    /// Clears the invalidation mark of `reference`, which the upstream confirmed in a request sent after the mark.
    pub(super) async fn settle_on_confirmation(
        &self,
        upstream_request: &UpstreamRequest,
        reference: Reference,
    ) {
        if !self.store.has_invalidations() {
            return;
        }
        let Some(begun) = upstream_request.writes.begun else {
            return;
        };
        let key = InvalidationKey {
            upstream: upstream_request.registry.shared_name(),
            repository: upstream_request.repository.clone(),
            reference,
        };
        let (registry, repository, now) = (
            Arc::clone(&upstream_request.registry),
            upstream_request.repository.clone(),
            self.clock.now(),
        );
        self.settle(key, move |since| {
            let is_old = now
                .duration_since(since)
                .is_ok_and(|age| age >= WRITE_SETTLE_TIME);
            is_old && registry.write_generations().begun(&repository) == begun
        })
        .await;
    }

    /// Marks a tag as invalidated if a write was in progress at any time since the request arrived.
    async fn invalidate_if_concurrent(&self, upstream_request: &UpstreamRequest, reference: &Reference) {
        let begun = upstream_request
            .registry
            .write_generations()
            .begun(&upstream_request.repository);
        if upstream_request.writes.begun == Some(begun) || !matches!(reference, Reference::Tag(_)) {
            return;
        }
        let key = InvalidationKey {
            upstream: upstream_request.registry.shared_name(),
            repository: upstream_request.repository.clone(),
            reference: reference.clone(),
        };
        let now = self.clock.now();
        let invalidated = self.store.write(move |store| store.invalidate(&key, now)).await;
        log_store_error(invalidated, "store invalidation mark");
    }

    /// Records the digest of a tag, unless a write ended in the repository since the request arrived.
    pub(super) async fn record_tag_if_current(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        reference: &Reference,
        digest: Digest,
        media_type: Option<&MediaType>,
    ) {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        let is_same = || registry.writes(repository).ended == upstream_request.writes.ended;
        if is_same() {
            self.invalidate_if_concurrent(upstream_request, reference).await;
            self.record_tag(upstream_request, reference, digest, media_type)
                .await;
            self.invalidate_if_concurrent(upstream_request, reference).await;
            self.settle_on_confirmation(upstream_request, reference.clone())
                .await;
            self.settle_on_confirmation(upstream_request, digest.into()).await;
            if is_same() {
                self.note_tag(upstream_request, reference, digest, media_type)
                    .await;
            }
        }
        if !is_same() {
            self.end_overtaken_record(upstream_request, reference, digest)
                .await;
        }
    }

    /// Ends what a response recorded that a write in the repository overtook. Only a write that the registry accepted removes
    /// it, so that a client without push access cannot evict a tag. The membership, which was recorded with the bytes, may be
    /// outdated too. If the content still exists, that costs one revalidation.
    async fn end_overtaken_record(
        &self,
        upstream_request: &UpstreamRequest,
        reference: &Reference,
        digest: Digest,
    ) {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        let writes = registry.write_generations();
        let was_accepted = writes.was_accepted_since(repository, upstream_request.writes);
        let (registry, repository, now) = (Arc::clone(registry), repository.clone(), self.clock.now());
        let keys = [reference.clone(), digest.into()].map(|reference| InvalidationKey {
            upstream: registry.shared_name(),
            repository: repository.clone(),
            reference,
        });
        let ended = self.store.write(move |store| {
            if was_accepted {
                return invalidate(store, &registry, WriteEffect::Deleted(repository, digest)).map(drop);
            }
            let mut outcome = Ok(());
            for key in keys.iter().filter(|key| store.has_cached(key)) {
                outcome = store.invalidate(key, now).map(drop).and(outcome);
            }
            outcome
        });
        log_store_error(ended.await, "end state recorded during a write");
    }
}

/// Removes what a write changed. Returns the tags that were removed.
fn invalidate(
    store: &Store,
    registry: &UpstreamRegistry,
    change: WriteEffect,
) -> Result<Vec<Tag>, crate::store::StoreError> {
    let upstream: Arc<str> = registry.shared_name();
    match change {
        // A cached referrers list is not served as fresh after a write, so it needs no removal.
        WriteEffect::Tags(repository, tags) => {
            let mut outcome = Ok(());
            for tag in &tags {
                let key = TagKey {
                    upstream: Arc::clone(&upstream),
                    repository: repository.clone(),
                    tag: tag.clone(),
                };
                outcome = store.remove_tag(&key).map(|_| ()).and(outcome);
            }
            outcome.map(|()| tags)
        }
        WriteEffect::Deleted(repository, digest) => {
            store.remove_member(&upstream, &repository, &digest)?;
            let key = InvalidationKey {
                upstream: Arc::clone(&upstream),
                repository: repository.clone(),
                reference: digest.into(),
            };
            store.clear_invalidation(&key, |_| true)?;
            let (mut after, mut removed) = (None::<Tag>, Vec::new());
            loop {
                let page = store.tags_of((&upstream, &repository), after.as_ref(), TAGS_PAGE_SIZE);
                for (key, record) in &page {
                    if record.variants.iter().any(|variant| variant.digest == digest) {
                        store.remove_tag(key)?;
                        removed.push(key.tag.clone());
                    }
                }
                match page.into_iter().last() {
                    Some((last, _)) => after = Some(last.tag),
                    None => return Ok(removed),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn accepted_write_counts_for_its_own_repository() {
        let writes = WriteGenerations::default();
        let own: Repository = "team/app".parse().unwrap();
        let counter = |repository: &Repository| std::ptr::from_ref(writes.counter(repository).unwrap());
        let other = (0..100_000)
            .map(|nth| format!("other/{nth}").parse().unwrap())
            .find(|other| counter(other) == counter(&own))
            .unwrap();
        let before = writes.now(&own);
        writes.note(&other, true);
        writes.note(&own, false);
        assert_ne!(writes.now(&own), before);
        assert!(!writes.was_accepted_since(&own, before));
        writes.note(&own, true);
        assert!(writes.was_accepted_since(&own, before));
        assert!(!writes.was_accepted_since(&own, writes.now(&own)));
    }
}
