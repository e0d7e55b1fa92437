//! The transfers as an operator sees them. Looks, and changes nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::progress::Progress;
use super::{Downloads, Failure};
use crate::oci::Digest;

/// A transfer under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Of which blob.
    pub digest: Digest,
    /// The size of the whole blob, where the upstream said it.
    pub size: Option<u64>,
    /// Bytes that readers may have already; some more may be written and not yet verified.
    pub received: u64,
    /// Clients that read it now. One that nobody reads is kept all the same.
    pub readers: usize,
    /// Since when it runs, the wait for a place included.
    pub elapsed: Duration,
    /// Whether it waits for a place.
    pub is_queued: bool,
}

impl Downloads {
    /// The transfers under way, the longest running first.
    pub fn transfers(&self) -> Vec<Transfer> {
        let now = Instant::now();
        let running = self.shared.running();
        let mut transfers: Vec<Transfer> = running
            .downloads
            .values()
            .map(|download| {
                let (received, size) = match &*download.progress.borrow() {
                    Progress::Filling(opened, received) => (*received, opened.size),
                    Progress::Complete(_, size) => (*size, Some(*size)),
                    Progress::Opening | Progress::Failed(_) => (0, None),
                };
                Transfer {
                    digest: download.digest,
                    size,
                    received,
                    readers: download.progress.receiver_count(),
                    elapsed: now.saturating_duration_since(download.began),
                    is_queued: download.waiters.is_queued(),
                }
            })
            .collect();
        drop(running);
        transfers.sort_by_key(|transfer| (std::cmp::Reverse(transfer.elapsed), transfer.digest));
        transfers
    }

    /// Bytes written since the start, resumed ones once.
    pub fn fetched_bytes(&self) -> u64 {
        self.shared.counts.fetched_bytes.load(Ordering::Relaxed)
    }

    /// Transfers since the start that were given up, for nobody waited for them or they came too slowly for prefetch.
    pub fn given_up(&self) -> u64 {
        self.shared.counts.given_up.load(Ordering::Relaxed)
    }

    /// Transfers since the start whose bytes were not those of their digest.
    pub fn digest_mismatches(&self) -> u64 {
        self.shared.counts.digest_mismatches.load(Ordering::Relaxed)
    }
}

/// Counts since the start.
#[derive(Default)]
pub(super) struct Counts {
    fetched_bytes: AtomicU64,
    digest_mismatches: AtomicU64,
    given_up: AtomicU64,
}

impl Counts {
    pub(super) fn fetched(&self, bytes: u64) {
        self.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, failure: &Failure) {
        match failure {
            Failure::Wrong(_) => self.digest_mismatches.fetch_add(1, Ordering::Relaxed),
            Failure::Abandoned => self.given_up.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
    }
}
