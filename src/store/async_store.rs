//! Async API of the store, the only one for tasks that serve requests.
//!
//! Reads that memory can answer return at once. Everything else runs on a blocking thread, and only its caller waits.
//! Reads and writes have separate permits.

use std::future::pending;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;

use super::access_times::ContentId;
use super::invalidations::InvalidationKey;
use super::{Evictions, HealthIssue, Limits, ScrubTotals, Store, Usage, View};
use crate::blocking::{Operation, run_with};

/// Async handle of the store. Cheap to clone.
#[derive(Clone)]
pub struct AsyncStore {
    pub(super) store: Arc<Store>,
    reads: Arc<Semaphore>,
    writes: Arc<Semaphore>,
    index_waits: Arc<Semaphore>,
}

impl AsyncStore {
    /// Creates a handle of `store`.
    pub fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            reads: Operation::StoreRead.permits(),
            writes: Operation::StoreWrite.permits(),
            index_waits: Operation::IndexWait.permits(),
        }
    }

    /// Runs `read` on the memory caches; `None` if it needed the disk.
    pub fn in_memory<T>(&self, read: impl FnOnce(&View<'_>) -> T) -> Option<T> {
        View::in_memory(&self.store, read)
    }

    /// Runs `read` on the memory caches and, if it needed the disk, again on a blocking thread. `read` must have no
    /// side effects.
    pub async fn read<T: Send + 'static>(&self, read: impl Fn(&View<'_>) -> T + Send + 'static) -> T {
        match self.in_memory(&read) {
            Some(found) => found,
            None => Box::pin(self.on_disk(move |view| read(view))).await,
        }
    }

    /// Runs `read` on a blocking thread, after [`Self::in_memory`] returned `None`.
    pub async fn on_disk<T: Send + 'static>(&self, read: impl FnOnce(&View<'_>) -> T + Send + 'static) -> T {
        let permit = Arc::clone(&self.reads).acquire_owned().await.ok();
        self.on_thread(permit, move |store| read(&store.view())).await
    }

    /// Runs `wait`, which waits for the index, on a blocking thread.
    pub(super) async fn on_index<T: Send + 'static>(
        &self,
        wait: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> T {
        let permit = Arc::clone(&self.index_waits).acquire_owned().await.ok();
        self.on_thread(permit, wait).await
    }

    /// Runs a write on a blocking thread. It also runs to its end if the caller is cancelled.
    pub async fn write<T: Send + 'static>(&self, operation: impl FnOnce(&Store) -> T + Send + 'static) -> T {
        if let Ok(permit) = Arc::clone(&self.writes).try_acquire_owned() {
            return self.on_thread(Some(permit), operation).await;
        }
        let this = self.clone();
        let queued = tokio::spawn(async move {
            let permit = Arc::clone(&this.writes).acquire_owned().await.ok();
            this.on_thread(permit, operation).await
        });
        finished(queued.await).await
    }

    async fn on_thread<T: Send + 'static>(
        &self,
        permit: Option<OwnedSemaphorePermit>,
        operation: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> T {
        let store = Arc::clone(&self.store);
        finished(run_with(permit, move || operation(&store)).await).await
    }

    /// The blocking API, for threads that may block. On an async worker its calls panic in debug builds.
    pub fn blocking(&self) -> &Store {
        &self.store
    }

    /// The key of the principal hashes. Never leaves this machine.
    pub fn install_secret(&self) -> &[u8; 32] {
        self.store.install_secret()
    }

    /// Sets the access time of this content to `now`.
    pub fn touch(&self, used: ContentId, now: SystemTime) {
        self.store.touch(used, now);
    }

    /// Whether any tag or digest is invalidated.
    pub fn has_invalidations(&self) -> bool {
        self.store.has_invalidations()
    }

    /// The time since when `key` is invalidated.
    pub fn invalidated_since(&self, key: &InvalidationKey) -> Option<SystemTime> {
        self.store.invalidated_since(key)
    }

    /// Current health issues.
    pub fn health_issues(&self) -> Vec<HealthIssue> {
        self.store.health_issues()
    }

    /// Disk errors since the start, by operation.
    pub fn errors(&self) -> Vec<(&'static str, u64)> {
        self.store.errors()
    }

    /// Current usage.
    pub fn usage(&self) -> Usage {
        self.store.usage()
    }

    /// The quota.
    pub fn limits(&self) -> Limits {
        self.store.limits()
    }

    /// Eviction totals since the start.
    pub fn evictions(&self) -> Evictions {
        self.store.evictions()
    }

    /// Free bytes on the disk, as measured some seconds ago.
    pub fn free_bytes(&self) -> Option<u64> {
        self.store.quota.last_free_bytes()
    }

    /// Number of pins.
    pub fn pins_count(&self) -> usize {
        self.store.pins.count()
    }

    /// Totals of the background scrub since the start.
    pub fn scrubbed(&self) -> ScrubTotals {
        self.store.scrubbed()
    }
}

/// The result of a spawned operation. A panic is resumed in the caller. An operation that was cancelled by the end of
/// the process has no result; its caller ends with the process too.
async fn finished<T>(done: Result<T, JoinError>) -> T {
    match done {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => pending().await,
        },
    }
}
