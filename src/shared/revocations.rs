//! Denials that wait for the bucket: each is tried again until the bucket has it, also after a restart or a reload.
//!
//! The list is in the data folder (`store::revocations`). A denial of what this cache had granted is in it before it is
//! sent to the bucket. Another one, of a credential that may be known to other caches only, is added if the bucket did
//! not take it at once; anyone can cause such denials, so they have a limit of their own.

#[cfg(all(test, feature = "shared"))]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep};

use super::record::{Class, GrantState, PUBLIC_RENEWAL, PublicState, RecordId, Update};
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

/// The list.
pub(super) struct Revocations {
    store: AsyncStore,
    telemetry: Telemetry,
    waiting: Mutex<HashMap<RecordId, Entry>>,
    /// Held while a file is read, written or removed, so that no removal follows a later write. Whether the list of earlier
    /// processes was read.
    files: AsyncMutex<bool>,
}

struct Entry {
    /// When the denial arrived; after a restart, when the list was read.
    at: Instant,
    is_known: bool,
    /// Number of the last denial that was added, and of the last one that was given to the queue.
    added: u64,
    queued: u64,
}

impl Revocations {
    pub(super) fn new(store: AsyncStore, telemetry: Telemetry) -> Self {
        Self {
            store,
            telemetry,
            waiting: Mutex::default(),
            files: AsyncMutex::default(),
        }
    }

    /// Reads the list of earlier processes, once.
    async fn load(&self) {
        let mut is_loaded = self.files.lock().await;
        if std::mem::replace(&mut *is_loaded, true) {
            return;
        }
        let found = self.store.write(Store::revocations).await;
        let now = Instant::now();
        {
            let mut waiting = self.waiting.lock();
            for revocation in found {
                waiting.entry(id_of(revocation)).or_insert(Entry {
                    at: now,
                    is_known: true,
                    added: 1,
                    queued: 0,
                });
            }
        }
        drop(is_loaded);
        self.count();
    }

    /// Adds a denial. Durable when this returns its number; `None`: the list is full, or the disk failed.
    async fn add(&self, id: &RecordId, at: Instant, is_known: bool) -> Option<u64> {
        let _files = self.files.lock().await;
        {
            let mut waiting = self.waiting.lock();
            if let Some(entry) = waiting.get_mut(id) {
                entry.added += 1;
                entry.at = entry.at.max(at);
                return Some(entry.added);
            }
            let alike = waiting.values().filter(|entry| entry.is_known == is_known);
            if alike.count() >= if is_known { KNOWN_MAX } else { UNKNOWN_MAX } {
                drop(waiting);
                tracing::error!(
                    "too many denials wait for the shared storage, a further one is lost at a restart"
                );
                return None;
            }
        }
        let revocation = revocation_of(id);
        let written = self.store.write(move |store| store.put_revocation(&revocation));
        if let Err(error) = written.await {
            tracing::error!(%error, "failed to keep a denial for the shared storage, it is lost at a restart");
            return None;
        }
        let entry = Entry {
            at,
            is_known,
            added: 1,
            queued: 0,
        };
        self.waiting.lock().insert(id.clone(), entry);
        self.count();
        Some(1)
    }

    /// The denial with this number, and all before it, were given to the queue.
    fn queued(&self, id: &RecordId, number: u64) {
        if let Some(entry) = self.waiting.lock().get_mut(id) {
            entry.queued = entry.queued.max(number);
        }
    }

    /// Number of the last denial in an update that is taken from the queue now.
    pub(super) fn taken(&self, id: &RecordId) -> Option<u64> {
        self.waiting.lock().get(id).map(|entry| entry.queued)
    }

    /// The bucket has the denials up to the one with this number. If there is no later one, removes the file in the
    /// background.
    pub(super) fn finish(self: &Arc<Self>, id: &RecordId, taken: u64) {
        let (this, id) = (Arc::clone(self), id.clone());
        tokio::spawn(async move {
            let _files = this.files.lock().await;
            let is_last = |entry: &Entry| entry.added == taken;
            if !this.waiting.lock().get(&id).is_some_and(is_last) {
                return;
            }
            let revocation = revocation_of(&id);
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

    fn all(&self) -> Vec<(RecordId, Instant, u64)> {
        let waiting = self.waiting.lock();
        let all = waiting.iter();
        all.map(|(id, entry)| (id.clone(), entry.at, entry.added))
            .collect()
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
            number = self.revocations.add(&id, now, true).await;
        }
        self.note(&id, now, PUBLIC_RENEWAL, |at| denial(id.class, at));
        if let Some(number) = number {
            self.revocations.queued(&id, number);
        }
        self.settled(&id).await;
        if !is_known
            && self.is_update_waiting(&id)
            && let Some(number) = self.revocations.add(&id, now, false).await
        {
            self.revocations.queued(&id, number);
        }
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
    list.load().await;
    while !active.uploads.is_closed() {
        for (id, at, number) in list.all() {
            // Those of an earlier process arrived before the time 1.
            let update = denial(id.class, records.time(at).unwrap_or(1));
            if !records.updates.has(&id) {
                records.updates.push_again(id.clone(), update, 0, None);
                list.queued(&id, number);
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

fn revocation_of(id: &RecordId) -> Revocation {
    Revocation {
        upstream: Arc::clone(&id.upstream),
        repository: id.repository.clone(),
        principal: Arc::clone(&id.item),
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
