//! Threads for blocking operations, and how many of them each kind of operation may use.
//!
//! The kinds have separate permits, so that neither a slow disk nor one kind of operation occupies the threads of the
//! others. Further operations of a kind wait without a thread. The runtime has [`THREADS_MAX`] threads, because it starts
//! one whenever none is idle yet: with permits alone, 600 downloads at once took 124 to 374.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;
use tokio::task::{JoinError, JoinHandle, spawn_blocking};
use tokio_util::task::AbortOnDropHandle;

/// Threads of the runtime for blocking operations: those of all kinds, and the reserve.
pub const THREADS_MAX: usize = 174 + RESERVE;

/// Time after which an idle thread ends. Each has a stack and a cache of the allocator.
pub const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Threads for operations that have limits of their own: 2 for passwords, 2 for exports and imports, 1 for maintenance, 1 for
/// certificates.
const RESERVE: usize = 6;

/// A kind of blocking operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads of the store, without the bytes of blobs.
    StoreRead,
    /// Writes to the store. Most of their time is an fsync.
    StoreWrite,
    /// Waits for the index. After one has timed out, the others fail fast.
    IndexWait,
    /// Lookups of blobs before a download.
    BlobLookup,
    /// Starts of downloads.
    DownloadStart,
    /// Resumptions of downloads, which read the bytes that arrived before.
    DownloadResumption,
    /// Commits of downloads.
    DownloadCommit,
    /// Writes of bytes that arrive, with their hash.
    DownloadWrite,
    /// Reads of bytes of blobs that the page cache lacks.
    FileRead,
    /// Writes of which URLs of an upstream have served which repositories.
    ServedUrlsWrite,
    /// Reads of the same.
    ServedUrlsRead,
    /// Reads of credential files.
    CredentialFile,
    /// Requests to the admin API, most of them reads.
    Admin,
    /// Blocks, approvals, pins and offline mode.
    AdminSwitch,
    /// Garbage collection and deletion, which wait for evictions.
    Removal,
    /// Lookups of configured host names.
    NameLookup,
    /// Lookups of host names that an upstream chose.
    TargetLookup,
}

impl Operation {
    /// Maximum concurrent operations of this kind.
    pub const fn threads_max(self) -> usize {
        match self {
            Self::StoreRead | Self::StoreWrite | Self::IndexWait | Self::DownloadWrite => 24,
            Self::FileRead => 16,
            Self::BlobLookup => 14,
            Self::DownloadStart => 10,
            Self::DownloadCommit | Self::NameLookup => 8,
            Self::DownloadResumption => 6,
            Self::TargetLookup => 4,
            Self::Admin => 3,
            Self::ServedUrlsWrite | Self::ServedUrlsRead | Self::CredentialFile | Self::AdminSwitch => 2,
            Self::Removal => 1,
        }
    }

    /// New permits for operations of this kind.
    pub fn permits(self) -> Arc<Semaphore> {
        Arc::new(Semaphore::new(self.threads_max()))
    }
}

/// Runs an operation on a blocking thread, which keeps a permit until the operation ends, also if the caller is cancelled.
pub async fn run<T: Send + 'static>(
    permits: &Arc<Semaphore>,
    operation: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    // The semaphore is never closed.
    let permit = Arc::clone(permits).acquire_owned().await.ok();
    run_with(permit, operation).await
}

/// As [`run`], with a permit.
pub fn run_with<T: Send + 'static>(
    permit: impl Send + 'static,
    operation: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    spawn_blocking(move || {
        let _permit = permit;
        operation()
    })
}

/// Permits of [`Operation::FileRead`]. Of the process, because every open file is read by itself.
static FILE_READS: Semaphore = Semaphore::const_new(Operation::FileRead.threads_max());

/// Reads a file on a blocking thread.
pub fn read_file<T: Send + 'static>(
    read: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> BoxFuture<'static, io::Result<T>> {
    // In a task of its own: a permit that a caller received and does not use yet would be missing to the others.
    let reading = AbortOnDropHandle::new(tokio::spawn(async move {
        // The semaphore is never closed.
        let permit = FILE_READS.acquire().await.ok();
        run_with(permit, read).await
    }));
    Box::pin(async move {
        let done = reading.await.and_then(|read| read);
        done.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use tokio::runtime::Builder;
    use tokio::task::yield_now;

    use super::*;

    const ALL: [Operation; 17] = [
        Operation::StoreRead,
        Operation::StoreWrite,
        Operation::IndexWait,
        Operation::BlobLookup,
        Operation::DownloadStart,
        Operation::DownloadResumption,
        Operation::DownloadCommit,
        Operation::DownloadWrite,
        Operation::FileRead,
        Operation::ServedUrlsWrite,
        Operation::ServedUrlsRead,
        Operation::CredentialFile,
        Operation::Admin,
        Operation::AdminSwitch,
        Operation::Removal,
        Operation::NameLookup,
        Operation::TargetLookup,
    ];

    #[test]
    fn each_kind_of_operation_has_its_threads() {
        let threads: usize = ALL.map(Operation::threads_max).iter().sum();
        assert_eq!(threads + RESERVE, THREADS_MAX);
    }

    /// Operations that answer nothing take all threads of their kinds. Passwords are still checked.
    #[test]
    fn hanging_disk_leaves_threads_for_the_rest() {
        let runtime = Builder::new_current_thread()
            .max_blocking_threads(THREADS_MAX)
            .build()
            .unwrap();
        let (hanging, released) = mpsc::channel::<()>();
        let released = Arc::new(parking_lot::Mutex::new(released));
        runtime.block_on(async {
            let (mut running, begun) = (Vec::new(), Arc::new(AtomicUsize::new(0)));
            for operation in ALL {
                let permits = operation.permits();
                for _ in 0..operation.threads_max() + 8 {
                    let (permits, released) = (Arc::clone(&permits), Arc::clone(&released));
                    let begun = Arc::clone(&begun);
                    let hangs = move || {
                        begun.fetch_add(1, Ordering::Relaxed);
                        released.lock().recv()
                    };
                    running.push(tokio::spawn(async move { run(&permits, hangs).await }));
                }
            }
            let kinds = ALL.map(Operation::threads_max);
            while begun.load(Ordering::Relaxed) < kinds.iter().sum() {
                yield_now().await;
            }
            assert_eq!(spawn_blocking(|| 1).await.unwrap(), 1);
            drop(hanging);
            for operation in running {
                assert!(operation.await.unwrap().unwrap().is_err());
            }
        });
    }

    #[tokio::test]
    async fn cancelled_caller_leaves_the_permit_to_the_operation() {
        let permits = Arc::new(Semaphore::new(1));
        let (release, released) = mpsc::channel::<()>();
        let caller = Arc::clone(&permits);
        let waiting = tokio::spawn(async move { run(&caller, move || released.recv()).await });
        while permits.available_permits() > 0 {
            yield_now().await;
        }
        waiting.abort();
        assert!(waiting.await.unwrap_err().is_cancelled());
        assert_eq!(permits.available_permits(), 0);
        drop(release);
        run(&permits, || ()).await.unwrap();
    }
}
