//! Shared state of a download, its entry in the download map, and its status for operators.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::parallel::ReaderSegments;
use super::{DownloadError, Downloads, Requester, Shared, WITHHELD_BYTES};
use crate::oci::Digest;
use crate::queue::Waiters;
use crate::store::fs::FsFile;

/// A download.
pub(super) struct Download {
    pub(super) digest: Digest,
    pub(super) requester: Requester,
    pub(super) progress: watch::Sender<Progress>,
    /// Receivers of `progress` that are no readers.
    pub(super) observers: Arc<AtomicUsize>,
    /// The requests that wait for it.
    pub(super) waiters: Waiters,
    /// For the status.
    pub(super) began: Instant,
    /// Whether it was opened without a response of the upstream to the leader.
    pub(super) is_led_elsewhere: AtomicBool,
    pub(super) counts: Arc<Counts>,
    /// The segments of the running transfer, if readers may read them.
    pub(super) segments: Arc<Mutex<Option<Arc<ReaderSegments>>>>,
}

/// Facts about a download that are known from the upstream's first response.
#[derive(Clone)]
pub struct DownloadInfo {
    /// Size of the complete blob, if the upstream stated it.
    pub size: Option<u64>,
    pub(super) file: Arc<dyn FsFile>,
    pub(super) attempt: Attempt,
}

impl DownloadInfo {
    /// Length of the readable prefix when `written` bytes are in an unverified file.
    pub(super) fn readable_len(&self, written: u64) -> u64 {
        match self.size {
            Some(size) => written.min(size.saturating_sub(WITHHELD_BYTES)),
            None => written.saturating_sub(WITHHELD_BYTES),
        }
    }
}

/// Which file is being written. A reader that got bytes of an earlier file with a wrong digest must fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    First,
    Retry,
}

#[derive(Clone)]
pub(super) enum Progress {
    Opening,
    /// Bytes before this offset are readable.
    Filling(DownloadInfo, u64),
    /// Verified, with this size.
    Complete(DownloadInfo, u64),
    Failed(Arc<DownloadError>),
}

impl Progress {
    /// Whether this is a final state.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::Complete(..) | Self::Failed(_))
    }
}

impl Download {
    /// Whether the upstream has begun to send the blob.
    pub(super) fn is_open(&self) -> bool {
        matches!(
            &*self.progress.borrow(),
            Progress::Filling(..) | Progress::Complete(..)
        )
    }

    /// The size, if verified.
    pub(super) fn verified_size(&self) -> Option<u64> {
        match &*self.progress.borrow() {
            Progress::Complete(_, size) => Some(*size),
            Progress::Opening | Progress::Filling(..) | Progress::Failed(_) => None,
        }
    }

    /// A file exists; no byte of it is readable yet.
    pub(super) fn begin(&self, opened: DownloadInfo) {
        self.progress.send_replace(Progress::Filling(opened, 0));
    }

    /// The first `written` bytes are in the file. Publishes all but the withheld end.
    pub(super) fn publish(&self, written: u64) {
        self.progress.send_if_modified(|progress| {
            let Progress::Filling(opened, readable) = progress else {
                return false;
            };
            let now_readable = opened.readable_len(written);
            let more = now_readable > *readable;
            if more {
                *readable = now_readable;
            }
            more
        });
    }

    /// The blob is verified and `size` bytes long.
    pub(super) fn complete(&self, size: u64) {
        self.progress.send_modify(|progress| {
            if let Progress::Filling(opened, _) = progress {
                *progress = Progress::Complete(opened.clone(), size);
            }
        });
    }
}

/// Entry of a download in the map. Dropping it removes the entry, so the next request can lead.
pub(super) struct DownloadGuard {
    pub(super) shared: Arc<Shared>,
    pub(super) download: Arc<Download>,
}

impl DownloadGuard {
    /// Removes the entry before it notifies the readers, so that a reader which joins again never finds the
    /// failed download.
    pub(super) fn fail(&self, failure: DownloadError) {
        self.leave();
        let failed = Progress::Failed(Arc::new(failure));
        self.download.progress.send_replace(failed);
    }

    /// Removes the entry. The next request finds the blob cached, or leads.
    pub(super) fn leave(&self) {
        let digest = &self.download.digest;
        let is_this = |found: &Arc<Download>| Arc::ptr_eq(found, &self.download);
        let mut running = self.shared.running.lock();
        if running.downloads.get(digest).is_some_and(is_this) {
            running.downloads.remove(digest);
            running.ended(digest);
        }
        drop(running);
        self.shared.left.notify_waiters();
    }
}

impl Drop for DownloadGuard {
    fn drop(&mut self) {
        self.leave();
        let unfinished = matches!(
            &*self.download.progress.borrow(),
            Progress::Opening | Progress::Filling(..)
        );
        if unfinished {
            let failed = Progress::Failed(Arc::new(DownloadError::Abandoned));
            self.download.progress.send_replace(failed);
        }
    }
}

/// Status of a running download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DownloadStatus {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the complete blob, if the upstream stated it.
    pub size: Option<u64>,
    /// Readable bytes. More may be written and not yet verified.
    pub received: u64,
    /// Number of readers. A download without readers continues.
    pub readers: usize,
    /// Time since it was created, queueing included.
    pub elapsed: Duration,
    /// Whether it waits for a permit.
    pub is_queued: bool,
}

impl Downloads {
    /// Status of the running downloads, the oldest first.
    pub fn statuses(&self) -> Vec<DownloadStatus> {
        let now = Instant::now();
        let running = self.shared.running.lock();
        let mut transfers: Vec<DownloadStatus> = running
            .downloads
            .values()
            .map(|download| {
                let (received, size) = match &*download.progress.borrow() {
                    Progress::Filling(opened, received) => (*received, opened.size),
                    Progress::Complete(_, size) => (*size, Some(*size)),
                    Progress::Opening | Progress::Failed(_) => (0, None),
                };
                DownloadStatus {
                    digest: download.digest,
                    size,
                    received,
                    readers: download
                        .progress
                        .receiver_count()
                        .saturating_sub(download.observers.load(Ordering::Relaxed)),
                    elapsed: now.saturating_duration_since(download.began),
                    is_queued: download.waiters.is_queued(),
                }
            })
            .collect();
        drop(running);
        transfers.sort_by_key(|transfer| (std::cmp::Reverse(transfer.elapsed), transfer.digest));
        transfers
    }

    /// Bytes written since process start. Resumed bytes count once.
    pub fn fetched_bytes(&self) -> u64 {
        self.shared.counts.fetched_bytes.load(Ordering::Relaxed)
    }

    /// Transfers abandoned since process start, because no request waited or their throughput was too low for
    /// prefetch.
    pub fn abandoned(&self) -> u64 {
        self.shared.counts.abandoned.load(Ordering::Relaxed)
    }

    /// Digest mismatches since process start.
    pub fn digest_mismatches(&self) -> u64 {
        self.shared.counts.digest_mismatches.load(Ordering::Relaxed)
    }
}

/// Counters since process start.
#[derive(Default)]
pub(super) struct Counts {
    fetched_bytes: AtomicU64,
    digest_mismatches: AtomicU64,
    abandoned: AtomicU64,
}

impl Counts {
    pub(super) fn fetched(&self, bytes: u64) {
        self.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, failure: &DownloadError) {
        match failure {
            DownloadError::DigestMismatch(_) => self.digest_mismatches.fetch_add(1, Ordering::Relaxed),
            DownloadError::Abandoned => self.abandoned.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
    }
}
