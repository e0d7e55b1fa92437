//! The async face of the store: its only entry for the tasks that serve requests.
//!
//! What is in memory is answered on the spot. Everything else runs on a thread that may block, and its caller alone
//! waits for it. Reads and writes have places of their own, so that neither a slow disk nor one kind of work takes all
//! of the runtime's blocking threads.

use std::future::pending;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinError, spawn_blocking};

use super::access_times::ContentId;
use super::invalidations::InvalidationKey;
use super::{Evictions, HealthIssue, Limits, ScrubTotals, Store, Usage, View};

/// Reads of the disk at a time. Others wait their turn, without a thread.
const READS_MAX: usize = 64;

/// Writes at a time. Most of their time is an fsync.
const WRITES_MAX: usize = 64;

/// Waits for the index at a time. Where it lets one wait in vain, the others no longer wait.
const INDEX_WAITS_MAX: usize = 32;

/// The store as async tasks see it. Cheap to clone.
#[derive(Clone)]
pub struct AsyncStore {
    pub(super) store: Arc<Store>,
    reads: Arc<Semaphore>,
    writes: Arc<Semaphore>,
    index_waits: Arc<Semaphore>,
}

impl AsyncStore {
    /// The async face of `store`.
    pub fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            reads: Arc::new(Semaphore::new(READS_MAX)),
            writes: Arc::new(Semaphore::new(WRITES_MAX)),
            index_waits: Arc::new(Semaphore::new(INDEX_WAITS_MAX)),
        }
    }

    /// What `read` finds in memory; `None` where it takes the disk to know.
    pub fn in_memory<T>(&self, read: impl FnOnce(&View<'_>) -> T) -> Option<T> {
        View::in_memory(&self.store, read)
    }

    /// What `read` finds: in memory, or else on the disk. It has no effect but its result, which counts once.
    pub async fn read<T: Send + 'static>(&self, read: impl Fn(&View<'_>) -> T + Send + 'static) -> T {
        match self.in_memory(&read) {
            Some(found) => found,
            None => Box::pin(self.on_disk(move |view| read(view))).await,
        }
    }

    /// What `read` finds on the disk, for what [`Self::in_memory`] did not know.
    pub async fn on_disk<T: Send + 'static>(&self, read: impl FnOnce(&View<'_>) -> T + Send + 'static) -> T {
        let permit = Arc::clone(&self.reads).acquire_owned().await.ok();
        self.on_thread(permit, move |store| read(&store.view())).await
    }

    /// What the index says in time.
    pub(super) async fn on_index<T: Send + 'static>(
        &self,
        wait: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> T {
        let permit = Arc::clone(&self.index_waits).acquire_owned().await.ok();
        self.on_thread(permit, wait).await
    }

    /// Does something to the store. It is done also where the caller does not wait for the end.
    pub async fn write<T: Send + 'static>(&self, operation: impl FnOnce(&Store) -> T + Send + 'static) -> T {
        if let Ok(permit) = Arc::clone(&self.writes).try_acquire_owned() {
            return self.on_thread(Some(permit), operation).await;
        }
        let own = self.clone();
        let queued = tokio::spawn(async move {
            let permit = Arc::clone(&own.writes).acquire_owned().await.ok();
            own.on_thread(permit, operation).await
        });
        finished(queued.await).await
    }

    async fn on_thread<T: Send + 'static>(
        &self,
        permit: Option<OwnedSemaphorePermit>,
        operation: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> T {
        let store = Arc::clone(&self.store);
        let work = spawn_blocking(move || {
            // Its place is free when the work ends, not when its caller leaves.
            let _permit = permit;
            operation(&store)
        });
        finished(work.await).await
    }

    /// The store itself, for threads that may block. On an async worker its calls panic in debug builds.
    pub fn blocking(&self) -> &Store {
        &self.store
    }

    /// The secret under which principals are hashed. Never leaves this machine.
    pub fn install_secret(&self) -> &[u8; 32] {
        self.store.install_secret()
    }

    /// Notes that a client was given this at `now`.
    pub fn touch(&self, used: ContentId, now: SystemTime) {
        self.store.touch(used, now);
    }

    /// Whether anything is in doubt.
    pub fn has_invalidations(&self) -> bool {
        self.store.has_invalidations()
    }

    /// Since when `key` is in doubt.
    pub fn invalidated_since(&self, key: &InvalidationKey) -> Option<SystemTime> {
        self.store.invalidated_since(key)
    }

    /// What keeps the store from doing its work, if anything does.
    pub fn health_issues(&self) -> Vec<HealthIssue> {
        self.store.health_issues()
    }

    /// Errors of the disk since the start, by operation.
    pub fn errors(&self) -> Vec<(&'static str, u64)> {
        self.store.errors()
    }

    /// How much is held.
    pub fn usage(&self) -> Usage {
        self.store.usage()
    }

    /// How much may be held.
    pub fn limits(&self) -> Limits {
        self.store.limits()
    }

    /// What was evicted since the start.
    pub fn evictions(&self) -> Evictions {
        self.store.evictions()
    }

    /// How many bytes the disk still took when that was last measured, some seconds ago.
    pub fn free_bytes(&self) -> Option<u64> {
        self.store.quota.last_free_bytes()
    }

    /// How much is pinned.
    pub fn pins_count(&self) -> usize {
        self.store.pins.count()
    }

    /// What was read again since the start.
    pub fn scrubbed(&self) -> ScrubTotals {
        self.store.scrubbed()
    }
}

/// The result of work on another thread. A panic goes on in the caller; work that the end of the process cut off has no
/// result, and its caller ends with the process too.
async fn finished<T>(done: Result<T, JoinError>) -> T {
    match done {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => pending().await,
        },
    }
}
