//! Joining a transfer, or leading it.
//!
//! A blob is looked up on the disk before the lock under which transfers are entered, never under it: a slow disk would
//! stop every other pull. Between that look and the lock a whole transfer can have come and gone, and must not be led
//! again. So who looks says so under the lock first, and a transfer that ends marks those that look for its blob: they
//! look again.

use std::collections::hash_map::Entry;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::progress::{Download, Place, Progress};
use super::{Downloads, Joined, Leader, Reader, Requester, Shared, Wish};
use crate::oci::Digest;
use crate::queue::Waiters;

/// Those who look for one blob on the disk.
#[derive(Default)]
pub(super) struct Looking {
    count: usize,
    /// How many transfers of it have ended since the first of them began to look.
    ended: u64,
}

/// One who looks, until it is dropped.
pub(super) struct Look {
    shared: Arc<Shared>,
    digest: Digest,
    /// How many transfers had ended when it began to look.
    ended: u64,
}

/// What one finds before the look, or after.
pub(super) enum Found {
    Joined(Joined),
    /// Nobody fetches it: look for it on the disk.
    Look(Look),
    /// Its transfer is being given up: join again once it is over.
    Ending(watch::Receiver<Progress>),
}

impl Downloads {
    /// Joins the transfer of `digest`, or becomes its leader.
    pub async fn join(&self, digest: Digest, requester: Requester, wish: Wish) -> Joined {
        loop {
            let look = match self.look(digest, &requester, wish) {
                Found::Joined(joined) => return joined,
                Found::Look(look) => look,
                Found::Ending(mut progress) => {
                    // An error says that it is over as well.
                    let _over = progress.wait_for(Progress::is_over).await;
                    continue;
                }
            };
            if let Some(held) = self.shared.store.blob_in_memory(&digest) {
                return Joined::Held(held);
            }
            let store = Arc::clone(&self.shared.store);
            let held = spawn_blocking(move || store.blob(&digest)).await;
            // A fault here is a miss; the transfer itself will meet it again and say so.
            if let Ok(Ok(Some(held))) = held {
                return Joined::Held(held);
            }
            if let Some(joined) = look.enter(&requester, wish) {
                return joined;
            }
        }
    }

    /// Follows a transfer that runs, or begins a look.
    pub(super) fn look(&self, digest: Digest, requester: &Requester, wish: Wish) -> Found {
        let mut running = self.shared.running();
        if let Some(download) = running.downloads.get(&digest) {
            return follow(download, &self.shared, requester, wish)
                .map_or_else(|| Found::Ending(download.progress.subscribe()), Found::Joined);
        }
        let looking = running.looking.entry(digest).or_default();
        looking.count += 1;
        Found::Look(Look {
            shared: Arc::clone(&self.shared),
            digest,
            ended: looking.ended,
        })
    }
}

impl Look {
    /// It was not on the disk: follows or leads; `None` if a transfer of it has ended meanwhile, or is being given up.
    pub(super) fn enter(self, requester: &Requester, wish: Wish) -> Option<Joined> {
        let mut running = self.shared.running();
        let has_ended = |looking: &Looking| looking.ended != self.ended;
        if running.looking.get(&self.digest).is_some_and(has_ended) {
            return None;
        }
        match running.downloads.entry(self.digest) {
            Entry::Occupied(entry) => follow(entry.get(), &self.shared, requester, wish),
            Entry::Vacant(place) => {
                let (progress, _) = watch::channel(Progress::Opening);
                let (waiters, waiter) = Waiters::alone(wish.demand);
                if wish.is_whole {
                    waiters.want_whole();
                }
                let download = Arc::new(Download {
                    digest: self.digest,
                    requester: requester.clone(),
                    progress,
                    waiters,
                    began: tokio::time::Instant::now(),
                    counts: Arc::clone(&self.shared.counts),
                });
                place.insert(Arc::clone(&download));
                Some(Joined::Leader(Leader {
                    place: Place {
                        shared: Arc::clone(&self.shared),
                        download,
                    },
                    waiter,
                }))
            }
        }
    }
}

/// `None` if it is being given up for want of waiters: what has been written may look like the beginning of an answer,
/// and the rest would never come.
fn follow(download: &Arc<Download>, shared: &Shared, requester: &Requester, wish: Wish) -> Option<Joined> {
    let waiter = download.waiters.join(wish.demand);
    if waiter.is_none() && download.verified_size().is_none() {
        return None;
    }
    if wish.is_whole {
        download.waiters.want_whole();
    }
    let is_same = download.requester == *requester;
    Some(Joined::Follower {
        reader: Reader::new(download, shared, waiter),
        began_by_same: is_same.then_some(download.began),
    })
}

impl Drop for Look {
    fn drop(&mut self) {
        let mut running = self.shared.running();
        if let Some(looking) = running.looking.get_mut(&self.digest) {
            looking.count -= 1;
            if looking.count == 0 {
                running.looking.remove(&self.digest);
            }
        }
    }
}

impl super::Running {
    /// A transfer of this blob has ended.
    pub(super) fn ended(&mut self, digest: &Digest) {
        if let Some(looking) = self.looking.get_mut(digest) {
            looking.ended += 1;
        }
    }
}
