//! What a write changes: a push or a deletion passes through us, and what is cached of it is no longer what the upstream
//! has.
//!
//! The write itself is handed on and not understood; here is only what follows from it. Before it is handed on, what it may
//! change is put in doubt, durably ([`crate::store::doubts`]): it is revalidated before it is served, and served while the
//! upstream is unavailable. A response then says what became of the write. An acknowledged one makes the cache forget the
//! tag, and that a deleted digest was ever seen. A refused one changes nothing, so that nobody evicts a tag by a push without
//! the right to it. Anything else leaves the doubt.
//!
//! A response that the upstream gave before the write must not bring back what the write ended: who asked in a repository
//! in which something was written meanwhile does not learn from the response.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::manifest_fetch::UpstreamRequest;
use super::revalidate::report;
pub use super::write_effect::WriteEffect;
use super::{ProxyService, UpstreamRegistry};
use crate::oci::{Digest, MediaType, Reference, Repository};
use crate::store::Store;
use crate::store::invalidations::InvalidationKey;
use crate::store::tags::TagKey;

/// Repositories that share a counter only learn a little less than they could.
const COUNTERS: usize = 256;

/// Tags looked through at a time.
const TAGS_PAGE: usize = 1024;

/// How old a doubt is before a revalidation settles it. A registry may still commit a write whose connection is gone.
const SETTLED_AFTER: Duration = Duration::from_secs(60);

/// Which writes there were in a repository when a request came: compared with a later value, whether there was one in
/// between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WriteSnapshot {
    /// How many may have been done.
    ended: u64,
    /// How many were begun; `None` while one is under way.
    begun: Option<u64>,
}

impl WriteSnapshot {
    /// How many may have been done.
    pub(super) fn ended(self) -> u64 {
        self.ended
    }
}

/// Counts the writes at an upstream, by repository.
pub(super) struct WriteGenerations([Counter; COUNTERS]);

#[derive(Default)]
struct Counter {
    ended: AtomicU64,
    begun: AtomicU64,
    under_way: AtomicU64,
}

impl Default for WriteGenerations {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl WriteGenerations {
    /// How many were begun.
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

    /// A write begins. Says how many were begun by then.
    fn begin(&self, repository: &Repository) -> u64 {
        let Some(counter) = self.counter(repository) else {
            return 0;
        };
        counter.under_way.fetch_add(1, Ordering::SeqCst);
        counter.begun.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// It may have been done: responses from before are not learned from.
    fn note(&self, repository: &Repository) {
        if let Some(counter) = self.counter(repository) {
            counter.ended.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn leave(&self, repository: &Repository) {
        if let Some(counter) = self.counter(repository) {
            counter.under_way.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// The registry took it.
    Succeeded,
    /// The registry refused it, or never saw it.
    Rejected,
    /// It may have been done.
    Unknown,
}

/// A write that is handed on. Dropped without a word of what became of it, as when its client leaves, it may have been
/// done.
pub struct PendingWrite {
    site: Arc<UpstreamRegistry>,
    change: WriteEffect,
    /// Which write it is, in the count of those begun.
    nth: u64,
    /// The doubts that are of this write alone.
    own_doubts: Vec<InvalidationKey>,
    is_refused: bool,
}

impl Drop for PendingWrite {
    fn drop(&mut self) {
        let (writings, repository) = (self.site.writings(), self.change.repository());
        if !self.is_refused {
            writings.note(repository);
        }
        writings.leave(repository);
    }
}

impl ProxyService {
    /// A write is about to be handed on. When this returns, what it may change is in doubt, and stays so over a crash.
    pub async fn hands_on(&self, site: &Arc<UpstreamRegistry>, change: WriteEffect) -> PendingWrite {
        let mut handed = PendingWrite {
            nth: site.writings().begin(change.repository()),
            site: Arc::clone(site),
            own_doubts: Vec::new(),
            is_refused: false,
            change,
        };
        let keys = handed.change.doubted(site);
        if keys.is_empty() {
            return handed;
        }
        let now = self.clock.now();
        let doubted = self.store.write(move |store| {
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
        let (own, outcome) = doubted.await;
        handed.own_doubts = own;
        report(outcome, "keep that a write may change what is cached");
        handed
    }

    /// What became of a write. When this returns, no asker is told what was true before one that was done.
    pub async fn written(&self, mut handed: PendingWrite, written: WriteOutcome) {
        let site = Arc::clone(&handed.site);
        match written {
            WriteOutcome::Unknown => {}
            WriteOutcome::Rejected => {
                handed.is_refused = true;
                for key in std::mem::take(&mut handed.own_doubts) {
                    let is_alone = Self::is_alone(&handed);
                    self.settle(key, is_alone).await;
                }
            }
            WriteOutcome::Succeeded => {
                // First, so that an answer on its way is not learned from; whoever learned before that is undone below.
                site.writings().note(handed.change.repository());
                let change = handed.change.clone();
                let forgotten = self.store.write(move |store| forget(store, &site, change)).await;
                report(forgotten, "forget what was written upstream");
            }
        }
    }

    /// Whether no write was begun after this one.
    fn is_alone(handed: &PendingWrite) -> impl FnOnce(SystemTime) -> bool + Send + 'static {
        let (site, repository, nth) = (
            Arc::clone(&handed.site),
            handed.change.repository().clone(),
            handed.nth,
        );
        move |_| site.writings().begun(&repository) == nth
    }

    async fn settle(
        &self,
        key: InvalidationKey,
        is_settled: impl FnOnce(SystemTime) -> bool + Send + 'static,
    ) {
        if self.store.invalidated_since(&key).is_none() {
            return;
        }
        let settled = self
            .store
            .write(move |store| store.clear_invalidation(&key, is_settled))
            .await;
        report(settled, "settle a doubt");
    }

    /// Whether a write may have changed this upstream since it was asked for last.
    pub(super) fn is_invalidated(
        &self,
        site: &UpstreamRegistry,
        repository: &Repository,
        reference: Reference,
    ) -> bool {
        self.store.has_invalidations() && {
            let key = InvalidationKey {
                upstream: site.name().into(),
                repository: repository.clone(),
                reference,
            };
            self.store.invalidated_since(&key).is_some()
        }
    }

    /// The upstream has confirmed `reference`: a doubt from before the question is settled.
    pub(super) async fn confirmed(&self, wanted: &UpstreamRequest, reference: Reference) {
        if !self.store.has_invalidations() {
            return;
        }
        let Some(begun) = wanted.writes.begun else { return };
        let key = InvalidationKey {
            upstream: wanted.site.name().into(),
            repository: wanted.repository.clone(),
            reference,
        };
        let (site, repository, now) = (
            Arc::clone(&wanted.site),
            wanted.repository.clone(),
            self.clock.now(),
        );
        self.settle(key, move |since| {
            let is_old = now.duration_since(since).is_ok_and(|age| age >= SETTLED_AFTER);
            is_old && site.writings().begun(&repository) == begun
        })
        .await;
    }

    /// Whether a write was under way at any time since the request came.
    fn is_overlapped(wanted: &UpstreamRequest) -> bool {
        let begun = wanted.site.writings().begun(&wanted.repository);
        wanted.writes.begun != Some(begun)
    }

    /// Puts a tag in doubt of which something was learned beside a write.
    async fn doubt_beside_write(&self, wanted: &UpstreamRequest, reference: &Reference) {
        if !Self::is_overlapped(wanted) || !matches!(reference, Reference::Tag(_)) {
            return;
        }
        let key = InvalidationKey {
            upstream: wanted.site.name().into(),
            repository: wanted.repository.clone(),
            reference: reference.clone(),
        };
        let now = self.clock.now();
        let doubted = self.store.write(move |store| store.invalidate(&key, now)).await;
        report(doubted, "keep that a write may change what is cached");
    }

    /// Keeps which digest a tag names now, unless something was written in the repository since it was asked for.
    pub(super) async fn learn_name_unless_written(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        reference: &Reference,
        digest: Digest,
        media_type: Option<&MediaType>,
    ) {
        let UpstreamRequest { site, repository, .. } = wanted;
        let is_same = || site.writes(repository).ended == wanted.writes.ended;
        if is_same() {
            self.doubt_beside_write(wanted, reference).await;
            self.learn_name(wanted, reference, digest, media_type).await;
            self.doubt_beside_write(wanted, reference).await;
            self.confirmed(wanted, reference.clone()).await;
            self.confirmed(wanted, digest.into()).await;
        }
        // The write may have come between the look and the learning. Bytes were kept with the proof of where they are
        // from, so that is taken back too; what is still there costs one question to be known again.
        if !is_same() {
            let change = WriteEffect::Deleted(repository.clone(), digest);
            let site = Arc::clone(site);
            let forgotten = self.store.write(move |store| forget(store, &site, change)).await;
            report(forgotten, "forget what was learned during a write");
        }
    }
}

fn forget(
    store: &Store,
    site: &UpstreamRegistry,
    change: WriteEffect,
) -> Result<(), crate::store::StoreError> {
    let upstream: Arc<str> = site.name().into();
    match change {
        // What is known of referrers is good only for as long as nothing was written.
        WriteEffect::Tags(repository, tags) => {
            let mut outcome = Ok(());
            for tag in tags {
                let key = TagKey {
                    upstream: Arc::clone(&upstream),
                    repository: repository.clone(),
                    tag,
                };
                outcome = store.remove_tag(&key).map(|_| ()).and(outcome);
            }
            outcome
        }
        WriteEffect::Deleted(repository, digest) => {
            store.remove_member(&upstream, &repository, &digest)?;
            let key = InvalidationKey {
                upstream: Arc::clone(&upstream),
                repository: repository.clone(),
                reference: digest.into(),
            };
            store.clear_invalidation(&key, |_| true)?;
            let mut after = None;
            loop {
                let page = store.tags(after.as_ref(), TAGS_PAGE);
                for (key, record) in &page {
                    let names =
                        |digest: &Digest| record.variants.iter().any(|variant| variant.digest == *digest);
                    if key.upstream == upstream && key.repository == repository && names(&digest) {
                        store.remove_tag(key)?;
                    }
                }
                match page.into_iter().last() {
                    Some((last, _)) => after = Some(last),
                    None => return Ok(()),
                }
            }
        }
    }
}
