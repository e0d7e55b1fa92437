//! Joining a download as follower or leader.
//!
//! The store is searched before the lock of the download map is taken, never under it: a slow disk would block
//! every other pull. A complete transfer can come and go between that lookup and the lock, and must not be
//! repeated. So a caller registers its lookup under the lock first. A transfer that ends marks the registered
//! lookups of its blob, and those callers look again.

use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use super::state::{Download, DownloadGuard, Progress};
use super::{Downloads, JoinOptions, Joined, Leader, Reader, Requester, Shared};
use crate::blocking::run;
use crate::oci::Digest;
use crate::queue::Waiters;

/// Callers that look up one blob on the disk.
#[derive(Default)]
pub(super) struct PendingLookups {
    count: usize,
    /// Number of its transfers that ended since the first of them registered.
    ended: u64,
}

/// A registered lookup. Dropping it deregisters.
pub(super) struct Lookup {
    shared: Arc<Shared>,
    digest: Digest,
    /// Value of [`PendingLookups::ended`] at registration.
    ended: u64,
}

/// Result of a step of joining.
pub(super) enum JoinStep {
    Joined(Joined),
    /// No transfer is running: search the store.
    Lookup(Lookup),
    /// Its transfer is being abandoned: join again when it has ended.
    Closing(watch::Receiver<Progress>),
}

impl Downloads {
    /// Joins the download of `digest`, or leads it.
    pub async fn join(&self, digest: Digest, requester: Requester, options: JoinOptions) -> Joined {
        loop {
            let lookup = match self.lookup(digest, &requester, options) {
                JoinStep::Joined(joined) => return joined,
                JoinStep::Lookup(lookup) => lookup,
                JoinStep::Closing(mut progress) => {
                    // A closed channel means that it ended as well.
                    let _over = progress.wait_for(Progress::is_over).await;
                    continue;
                }
            };
            if let Some(cached) = self.shared.store.blob_in_memory(&digest) {
                return Joined::Cached(cached);
            }
            let store = Arc::clone(&self.shared.store);
            let cached = run(&self.shared.lookups, move || store.blob(&digest)).await;
            // A store error counts as a miss. The transfer meets the same error and reports it.
            if let Ok(Ok(Some(cached))) = cached {
                return Joined::Cached(cached);
            }
            if let Some(joined) = lookup.enter(&requester, options) {
                return joined;
            }
        }
    }

    /// Follows a running download, or registers a lookup.
    pub(super) fn lookup(&self, digest: Digest, requester: &Requester, options: JoinOptions) -> JoinStep {
        let mut running = self.shared.running.lock();
        if let Some(download) = running.downloads.get(&digest) {
            return follow(download, &self.shared, requester, options).map_or_else(
                || JoinStep::Closing(download.progress.subscribe()),
                JoinStep::Joined,
            );
        }
        let lookups = running.lookups.entry(digest).or_default();
        lookups.count += 1;
        JoinStep::Lookup(Lookup {
            shared: Arc::clone(&self.shared),
            digest,
            ended: lookups.ended,
        })
    }
}

impl Lookup {
    /// The blob is not on the disk: follows or leads. `None` if a transfer of it ended meanwhile, or is being
    /// abandoned.
    pub(super) fn enter(self, requester: &Requester, options: JoinOptions) -> Option<Joined> {
        let mut running = self.shared.running.lock();
        let has_ended = |lookups: &PendingLookups| lookups.ended != self.ended;
        if running.lookups.get(&self.digest).is_some_and(has_ended) {
            return None;
        }
        match running.downloads.entry(self.digest) {
            Entry::Occupied(entry) => follow(entry.get(), &self.shared, requester, options),
            Entry::Vacant(guard) => {
                let (progress, _) = watch::channel(Progress::Opening);
                let (waiters, waiter) = Waiters::with(options.demand);
                if options.wants_complete {
                    waiters.want_complete();
                }
                let download = Arc::new(Download {
                    digest: self.digest,
                    requester: requester.clone(),
                    progress,
                    observers: Arc::default(),
                    waiters,
                    began: tokio::time::Instant::now(),
                    is_led_elsewhere: AtomicBool::new(false),
                    counts: Arc::clone(&self.shared.counts),
                    segments: Arc::default(),
                });
                guard.insert(Arc::clone(&download));
                Some(Joined::Leader(Leader {
                    guard: DownloadGuard {
                        shared: Arc::clone(&self.shared),
                        download,
                    },
                    waiter,
                }))
            }
        }
    }
}

/// `None` if the transfer is being abandoned: the bytes written so far could be served as the beginning of a
/// response whose remainder never comes.
fn follow(
    download: &Arc<Download>,
    shared: &Shared,
    requester: &Requester,
    options: JoinOptions,
) -> Option<Joined> {
    let waiter = download.waiters.join(options.demand);
    if waiter.is_none() && download.verified_size().is_none() {
        return None;
    }
    if options.wants_complete {
        download.waiters.want_complete();
    }
    let is_same = download.requester == *requester && !download.is_led_elsewhere.load(Ordering::Relaxed);
    Some(Joined::Follower {
        reader: Reader::new(download, shared, waiter),
        began_by_same: is_same.then_some(download.began),
    })
}

impl Drop for Lookup {
    fn drop(&mut self) {
        let mut running = self.shared.running.lock();
        if let Some(lookups) = running.lookups.get_mut(&self.digest) {
            lookups.count -= 1;
            if lookups.count == 0 {
                running.lookups.remove(&self.digest);
            }
        }
    }
}

impl super::Running {
    /// Records the end of a transfer of this blob.
    pub(super) fn ended(&mut self, digest: &Digest) {
        if let Some(lookups) = self.lookups.get_mut(digest) {
            lookups.ended += 1;
        }
    }
}
