//! Denials that wait for the bucket: each is tried again until the bucket has it, also after a restart or a reload.
//!
//! The list is in the data folder (`store::revocations`). A denial of what this cache had granted is in it before it is
//! sent to the bucket. Another one, of a credential that may be known to other caches only, is added if the bucket did
//! not take it at once; anyone can cause such denials, so they have a limit of their own.

#[cfg(all(test, feature = "shared"))]
mod tests;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard};
use tokio::time::{Instant, sleep, timeout};

use super::rate::Rate;
use super::record::{Class, Denial, GrantState, PublicState, RecordId, SETTLE_TIMEOUT, Update};
use super::{Active, SharedStorage};
use crate::store::revocations::Revocation;
use crate::store::{AsyncStore, Store};
use crate::telemetry::Telemetry;

/// Denials of what this cache had granted. A further one waits in memory only.
const KNOWN_MAX: usize = 2048;

/// Denials of other credentials. A further one waits in memory only.
const UNKNOWN_MAX: usize = 256;

/// Interval at which denials that wait are queued again, in case the queue was full.
const QUEUE_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Locks of files. Two denials may have one in common.
const LOCKS: usize = 64;

/// The list.
pub(super) struct Revocations {
    store: AsyncStore,
    telemetry: Telemetry,
    waiting: Mutex<HashMap<RecordId, Entry>>,
    /// Taken while the file of a denial is written or removed, by a hash of the denial, so that no removal follows a later
    /// write.
    files: [AsyncMutex<()>; LOCKS],
    /// Taken while the list of earlier processes is read.
    loading: AsyncMutex<()>,
    is_tried: AtomicBool,
    is_loaded: AtomicBool,
    /// Log events that the list is full.
    reports: Mutex<Rate>,
}

struct Entry {
    /// When the denial arrived; after a restart, when the list was read.
    at: Instant,
    is_known: bool,
    /// Number of the last denial that was added.
    added: u64,
}

impl Revocations {
    pub(super) fn new(store: AsyncStore, telemetry: Telemetry) -> Self {
        Self {
            store,
            telemetry,
            waiting: Mutex::default(),
            files: std::array::from_fn(|_| AsyncMutex::default()),
            loading: AsyncMutex::default(),
            is_tried: AtomicBool::new(false),
            is_loaded: AtomicBool::new(false),
            reports: Mutex::new(Rate::of(1, 1, Instant::now())),
        }
    }

    /// Waits for the first attempt to read the list of earlier processes. Whether it was read.
    pub(super) async fn loaded(&self) -> bool {
        if !self.is_tried.load(Ordering::Acquire) {
            self.load().await;
        }
        self.is_loaded()
    }

    fn is_loaded(&self) -> bool {
        self.is_loaded.load(Ordering::Acquire)
    }

    /// Reads the list of earlier processes, once. If that fails, what could be read counts, and the next call tries again.
    async fn load(&self) {
        let _loading = self.loading.lock().await;
        if self.is_loaded() {
            return;
        }
        let (found, failure) = self.store.write(Store::revocations).await;
        let now = Instant::now();
        {
            let mut waiting = self.waiting.lock();
            for revocation in found {
                let is_known = revocation.is_known;
                waiting.entry(id_of(revocation)).or_insert(Entry {
                    at: now,
                    is_known,
                    added: 1,
                });
            }
        }
        self.count();
        match failure {
            Some(error) => tracing::error!(%error,
                "failed to read the denials that wait for the shared storage, records give no right until that succeeds"),
            None => self.is_loaded.store(true, Ordering::Release),
        }
        self.is_tried.store(true, Ordering::Release);
    }

    /// When a denial that waits for this record arrived, under any key that both cover.
    pub(super) fn waits_since(&self, id: &RecordId) -> Option<Instant> {
        let waiting = self.waiting.lock();
        let same = waiting.iter().filter(|(waiting, _)| is_same(waiting, id));
        same.map(|(_, entry)| entry.at).max()
    }

    async fn lock(&self, id: &RecordId) -> Option<MutexGuard<'_, ()>> {
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        let at = usize::try_from(hasher.finish() % LOCKS as u64).ok()?;
        Some(self.files.get(at)?.lock().await)
    }

    /// Adds a denial. Durable when this returns its number; `None`: the list is full, or the disk failed.
    async fn add(&self, id: &RecordId, at: Instant, is_known: bool) -> Option<u64> {
        let _file = self.lock(id).await;
        {
            let mut waiting = self.waiting.lock();
            if let Some(entry) = waiting.get_mut(id) {
                // Also if the entry of an unknown client cannot become one of a known client.
                entry.added += 1;
                entry.at = entry.at.max(at);
                if entry.is_known || !is_known {
                    return Some(entry.added);
                }
            }
            let alike = waiting.values().filter(|entry| entry.is_known == is_known);
            let (count_max, reason) = if is_known {
                (KNOWN_MAX, "full")
            } else {
                (UNKNOWN_MAX, "full-unknown")
            };
            if alike.count() >= count_max {
                drop(waiting);
                self.telemetry.shared().record_unlisted_revocation(reason);
                if self.reports.lock().take(Instant::now()) {
                    tracing::error!(
                        "too many denials wait for the shared storage, a further one is lost if this cache restarts before the bucket has it"
                    );
                }
                return None;
            }
        }
        let revocation = revocation_of(id, is_known);
        let written = self.store.write(move |store| store.put_revocation(&revocation));
        if let Err(error) = written.await {
            self.telemetry.shared().record_unlisted_revocation("disk");
            tracing::error!(%error, "failed to keep a denial for the shared storage, it is lost if this cache restarts before the bucket has it");
            return None;
        }
        let added = {
            let mut waiting = self.waiting.lock();
            let entry = waiting.entry(id.clone()).or_insert(Entry {
                at,
                is_known,
                added: 1,
            });
            entry.is_known |= is_known;
            entry.added
        };
        self.count();
        Some(added)
    }

    /// Adds a denial as [`Self::add`] does, for at most a second. Afterwards, it is added in the background and queued by
    /// [`work`].
    async fn add_soon(self: &Arc<Self>, id: &RecordId, at: Instant, is_known: bool) -> Option<u64> {
        let (this, id) = (Arc::clone(self), id.clone());
        let adding = tokio::spawn(async move { this.add(&id, at, is_known).await });
        timeout(SETTLE_TIMEOUT, adding).await.ok()?.ok()?
    }

    /// The bucket has the denials up to the one with this number. If there is no later one, removes the file in the
    /// background.
    pub(super) fn finish(self: &Arc<Self>, id: &RecordId, number: u64) {
        let (this, id) = (Arc::clone(self), id.clone());
        tokio::spawn(async move {
            let _file = this.lock(&id).await;
            let is_last = |entry: &Entry| entry.added == number;
            if !this.waiting.lock().get(&id).is_some_and(is_last) {
                return;
            }
            let revocation = revocation_of(&id, false);
            let removed = this
                .store
                .write(move |store| store.remove_revocation(&revocation));
            if let Err(error) = removed.await {
                // Sent again after a restart.
                tracing::warn!(%error, "failed to remove a denial that the shared storage has");
            }
            this.waiting.lock().remove(&id);
            this.count();
        });
    }

    /// Number of denials that wait, and how long the first one has.
    pub(super) fn status(&self) -> Option<(usize, Duration)> {
        let waiting = self.waiting.lock();
        let first = waiting.values().map(|entry| entry.at).min()?;
        Some((waiting.len(), first.elapsed()))
    }

    fn all(&self) -> Vec<(RecordId, Instant, Denial)> {
        let waiting = self.waiting.lock();
        let all = waiting.iter().map(|(id, entry)| {
            let denial = Denial {
                number: entry.added,
                is_known: entry.is_known,
            };
            (id.clone(), entry.at, denial)
        });
        all.collect()
    }

    fn count(&self) {
        let waiting = self.waiting.lock().len() as u64;
        self.telemetry.shared().set_revocations_waiting(waiting);
    }
}

impl SharedStorage {
    /// Records a denial that arrived at `now`. Returns when the bucket has it, or when it waits in the list.
    pub(super) async fn deny(&self, id: RecordId, now: Instant, is_known: bool) {
        let mut number = None;
        if is_known {
            number = self.revocations.add_soon(&id, now, true).await;
        }
        let queue = |number: Option<u64>| {
            let denied = Denial {
                number: number.unwrap_or(0),
                is_known,
            };
            self.queue_update(
                (&id, now),
                |at| denial(id.class, at),
                |updates, update| updates.push_denial(id.clone(), update, denied),
            );
        };
        queue(number);
        let waits = is_known || self.has_few_unknown();
        if waits {
            self.settled(&id).await;
        }
        // Many wrong passwords write no files while the bucket accepts their denials.
        if !is_known && (waits || self.are_writes_stopped()) && self.is_update_waiting(&id) {
            let number = self.revocations.add_soon(&id, now, false).await;
            if number.is_some() {
                queue(number);
            }
        }
    }

    fn has_few_unknown(&self) -> bool {
        let active = self.active.load();
        let records = active.as_ref().and_then(|active| active.records.as_ref());
        records.is_none_or(|records| records.updates.has_few_unknown())
    }

    fn are_writes_stopped(&self) -> bool {
        let active = self.active.load();
        active.as_ref().is_some_and(|active| active.is_stopped())
    }

    fn is_update_waiting(&self, id: &RecordId) -> bool {
        let active = self.active.load();
        let records = active.as_ref().and_then(|active| active.records.as_ref());
        records.is_some_and(|records| records.updates.has(id))
    }
}

/// The task that queues the denials of the list, of earlier processes too, until the settings are replaced.
pub(super) async fn work(active: Arc<Active>) {
    let Some(records) = &active.records else { return };
    let Some(list) = &records.revocations else { return };
    while !active.uploads.is_closed() {
        // Reads ask the list too.
        list.load().await;
        if active.settings.write {
            for (id, at, denied) in list.all() {
                // Those of an earlier process arrived before the time 1.
                let update = denial(id.class, records.time(at).unwrap_or(1));
                records.updates.push_denial(id, update, denied);
            }
        }
        sleep(QUEUE_AGAIN_AFTER).await;
    }
}

fn denial(class: Class, at: u64) -> Update {
    match class {
        Class::Grant => Update::Grant(GrantState {
            at,
            is_granted: false,
        }),
        _ => Update::Public(PublicState { at, is_public: false }),
    }
}

/// Whether both are one record, under a key that both cover.
fn is_same(one: &RecordId, other: &RecordId) -> bool {
    let parts = |id: &RecordId| (id.class, Arc::clone(&id.upstream), id.repository.clone());
    let mut items = one.item.split(',');
    parts(one) == parts(other) && items.any(|item| other.item.split(',').any(|other| other == item))
}

fn revocation_of(id: &RecordId, is_known: bool) -> Revocation {
    Revocation {
        upstream: Arc::clone(&id.upstream),
        repository: id.repository.clone(),
        principal: Arc::clone(&id.item),
        is_known,
    }
}

fn id_of(revocation: Revocation) -> RecordId {
    let class = if revocation.principal.is_empty() {
        Class::Public
    } else {
        Class::Grant
    };
    RecordId {
        class,
        upstream: revocation.upstream,
        repository: revocation.repository,
        item: revocation.principal,
    }
}
