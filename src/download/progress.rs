//! One transfer as its readers see it, and its place among the others.

use std::sync::Arc;

use tokio::sync::watch;

use super::{Failure, Requester, Shared, WITHHELD_BYTES};
use crate::oci::Digest;
use crate::queue::Waiters;
use crate::store::fs::FsFile;

/// One transfer.
pub(super) struct Download {
    pub(super) digest: Digest,
    pub(super) requester: Requester,
    pub(super) progress: watch::Sender<Progress>,
    /// The requests that wait for it.
    pub(super) waiters: Waiters,
    /// For those who look.
    pub(super) began: tokio::time::Instant,
    pub(super) counts: Arc<super::view::Counts>,
}

/// What is known once the upstream has begun to answer.
#[derive(Clone)]
pub struct Opened {
    /// The size of the whole blob, where the upstream said it.
    pub size: Option<u64>,
    pub(super) file: Arc<dyn FsFile>,
    pub(super) attempt: Attempt,
}

impl Opened {
    /// How many of so many bytes `written` may be read before the whole is verified.
    pub(super) fn safe(&self, written: u64) -> u64 {
        match self.size {
            Some(size) => written.min(size.saturating_sub(WITHHELD_BYTES)),
            None => written.saturating_sub(WITHHELD_BYTES),
        }
    }
}

/// Which file it is being written to: whoever was given bytes of an earlier one, which turned out wrong, must be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    First,
    Again,
}

#[derive(Clone)]
pub(super) enum Progress {
    Opening,
    /// Bytes before this offset may be read.
    Filling(Opened, u64),
    /// Verified; this is its size.
    Complete(Opened, u64),
    Failed(Arc<Failure>),
}

impl Progress {
    /// Whether nothing more comes of it.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::Complete(..) | Self::Failed(_))
    }
}

impl Download {
    /// Whether the upstream has begun to send it.
    pub(super) fn is_open(&self) -> bool {
        matches!(
            &*self.progress.borrow(),
            Progress::Filling(..) | Progress::Complete(..)
        )
    }

    /// Its size, once it is verified.
    pub(super) fn verified_size(&self) -> Option<u64> {
        match &*self.progress.borrow() {
            Progress::Complete(_, size) => Some(*size),
            Progress::Opening | Progress::Filling(..) | Progress::Failed(_) => None,
        }
    }

    /// A file has been begun; nothing of it may be read yet.
    pub(super) fn begin(&self, opened: Opened) {
        self.progress.send_replace(Progress::Filling(opened, 0));
    }

    /// The first `written` bytes are in the file: all but the last of the blob may be read.
    pub(super) fn publish(&self, written: u64) {
        self.progress.send_if_modified(|progress| {
            let Progress::Filling(opened, readable) = progress else {
                return false;
            };
            let safe = opened.safe(written);
            let more = safe > *readable;
            if more {
                *readable = safe;
            }
            more
        });
    }

    /// It is verified, `size` bytes long.
    pub(super) fn complete(&self, size: u64) {
        self.progress.send_modify(|progress| {
            if let Progress::Filling(opened, _) = progress {
                *progress = Progress::Complete(opened.clone(), size);
            }
        });
    }
}

/// A transfer's place in the map: leaving it, however that comes about, lets the next asker lead.
pub(super) struct Place {
    pub(super) shared: Arc<Shared>,
    pub(super) download: Arc<Download>,
}

impl Place {
    /// Leaves first and tells the readers after, so that one who joins again on a failure never finds the failed one.
    pub(super) fn fail(&self, failure: Failure) {
        self.leave();
        let failed = Progress::Failed(Arc::new(failure));
        self.download.progress.send_replace(failed);
    }

    /// The next asker finds the blob held, or leads.
    pub(super) fn leave(&self) {
        let digest = &self.download.digest;
        let is_this = |found: &Arc<Download>| Arc::ptr_eq(found, &self.download);
        let mut running = self.shared.running();
        if running.downloads.get(digest).is_some_and(is_this) {
            running.downloads.remove(digest);
            running.ended(digest);
        }
        drop(running);
        self.shared.left.notify_waiters();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
        let unfinished = matches!(
            &*self.download.progress.borrow(),
            Progress::Opening | Progress::Filling(..)
        );
        if unfinished {
            let failed = Progress::Failed(Arc::new(Failure::Abandoned));
            self.download.progress.send_replace(failed);
        }
    }
}
