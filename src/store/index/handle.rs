//! Handle to the index worker ([`super::worker`]).
//!
//! Reads wait for a reply with a short timeout. They serve lookups that memory could not answer, and a miss is safe.
//! Writes do not wait. After one timeout, further reads fail at once until the worker makes progress.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use super::Pair;
use super::pending_removals::PendingRemovals;
use super::worker::Worker;
use crate::store::fs::FileSystem;
use crate::store::fs::assert_may_block;

const QUEUE_MESSAGES_MAX: usize = 4096;

/// sled would write a record of a page or more to a separate file.
pub(in crate::store) const VALUE_BYTES_MAX: usize = 4000;

const REPLY_TIMEOUT: Duration = Duration::from_secs(2);

/// Attempts to send to a full queue, and the pause between them, for messages that must not be dropped.
const SEND_TRIES: u32 = 100;
const SEND_PAUSE: Duration = Duration::from_millis(20);

/// State of the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IndexState {
    /// Being opened. Reads wait until their timeout.
    Opening,
    /// In use.
    Ready,
    /// Down. The files serve all reads. Times and grants written meanwhile are lost at a restart. The worker opens
    /// the index again after a pause.
    Degraded {
        /// Reason, shown to the operator.
        reason: String,
    },
}

/// Location of an index.
pub(in crate::store) enum Location {
    /// In a local folder, beside the files of `fs`.
    Folder {
        fs: Arc<dyn FileSystem>,
        index: PathBuf,
        /// Unix time in seconds, used in the names of quarantined indexes.
        opened_at: u64,
    },
    Memory,
    /// For tests: this index, once.
    #[cfg(test)]
    Given(Mutex<Option<Box<dyn super::Index>>>),
}

pub(super) type Reply<T> = SyncSender<T>;

type Response<T> = Result<T, IndexUnavailable>;

pub(super) enum Message {
    Get {
        key: Vec<u8>,
        reply: Reply<Response<Option<Vec<u8>>>>,
    },
    Put {
        key: Vec<u8>,
        value: Vec<u8>,
    },
    PutIfAbsent {
        key: Vec<u8>,
        value: Vec<u8>,
    },
    Remove {
        key: Vec<u8>,
    },
    /// Removes a key so that a crash does not restore it. The reply states whether the removal is durable.
    RemoveDurable {
        key: Vec<u8>,
        reply: Reply<bool>,
    },
    Scan {
        prefix: Vec<u8>,
        after: Vec<u8>,
        limit: usize,
        reply: Reply<Response<Vec<Pair>>>,
    },
    Flush {
        reply: Reply<()>,
    },
    Reopen,
    /// Quarantines the index and creates a new one.
    Rebuild,
    Close,
}

/// The index is slow or down, so the value is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct IndexUnavailable;

/// A durable removal in progress.
pub(in crate::store) struct DurableRemoval {
    /// The message with its key, if the queue was full.
    pending_removals: Option<(Vec<u8>, Message)>,
    answer: Receiver<bool>,
}

/// State shared by worker and handle.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) state: Mutex<IndexState>,
    /// Set after a timeout. Reads fail at once until the worker makes progress.
    pub(super) is_stuck: AtomicBool,
    /// Number of times that written records may have been lost.
    losses: AtomicU64,
    /// One more than the value of `losses` for which all tags have been written again.
    complete_after: AtomicU64,
}

impl Shared {
    fn new() -> Self {
        Self {
            state: Mutex::new(IndexState::Opening),
            is_stuck: AtomicBool::new(false),
            losses: AtomicU64::new(0),
            complete_after: AtomicU64::new(0),
        }
    }

    pub(super) fn record_loss(&self) {
        self.losses.fetch_add(1, Ordering::AcqRel);
    }
}

/// Handle to the index worker. Dropping it stops the worker and joins its thread.
pub(in crate::store) struct IndexHandle {
    sender: SyncSender<Message>,
    shared: Arc<Shared>,
    pending_removals: PendingRemovals,
    thread: Option<JoinHandle<()>>,
}

impl IndexHandle {
    /// Starts the worker thread, which opens the index. Does not wait for it.
    pub(in crate::store) fn start(location: Location) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(QUEUE_MESSAGES_MAX);
        let shared = Arc::new(Shared::new());
        let worker = Worker::new(location, Arc::clone(&shared), sender.clone());
        let thread = std::thread::Builder::new()
            .name("index".to_owned())
            .spawn(move || worker.run(&receiver))?;
        Ok(Self {
            sender,
            shared,
            pending_removals: PendingRemovals::default(),
            thread: Some(thread),
        })
    }

    /// State of the index.
    pub(in crate::store) fn state(&self) -> IndexState {
        self.shared.state.lock().clone()
    }

    /// Returns whether the index is known to contain every tag that has a file.
    pub(in crate::store) fn is_complete(&self) -> bool {
        self.shared.complete_after.load(Ordering::Acquire) == self.losses() + 1
    }

    /// Number of times that written records may have been lost. Argument of [`Self::set_complete`].
    pub(in crate::store) fn losses(&self) -> u64 {
        self.shared.losses.load(Ordering::Acquire)
    }

    /// Records that every tag that has a file has been written since there were so many `losses`.
    pub(in crate::store) fn set_complete(&self, losses: u64) {
        self.shared.complete_after.store(losses + 1, Ordering::Release);
    }

    /// Reads the value of `key`. `None` may also mean that the index has lost it.
    pub(in crate::store) fn get(&self, key: Vec<u8>) -> Result<Option<Vec<u8>>, IndexUnavailable> {
        if !self.pending_removals.is_empty() {
            let (is_overflowed, is_removed) = self
                .pending_removals
                .change(|removals| (removals.is_overflowed(), removals.contains(&key)));
            if is_removed {
                return Ok(None);
            }
            if is_overflowed {
                return Err(IndexUnavailable);
            }
        }
        self.request(|reply| Message::Get { key, reply })
    }

    /// Queues a write. A value too long for a record is dropped.
    pub(in crate::store) fn put(&self, key: Vec<u8>, value: Vec<u8>) {
        if value.len() > VALUE_BYTES_MAX {
            return;
        }
        if self.pending_removals.is_empty() {
            self.send(Message::Put { key, value });
            return;
        }
        self.pending_removals.change(|removals| {
            let name = key.clone();
            if self.send(Message::Put { key, value }) {
                removals.remove(&name);
            }
        });
    }

    /// [`Self::put`], unless the index has a value for `key`. Returns `false` if the queue is full; the caller tries
    /// again.
    pub(in crate::store) fn put_if_absent(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        // The existing value is about to be removed, so the removal must come first.
        if !self.pending_removals.is_empty()
            && self.pending_removals.change(|removals| removals.contains(&key))
        {
            return false;
        }
        let put = self.sender.try_send(Message::PutIfAbsent { key, value });
        !matches!(put, Err(TrySendError::Full(_)))
    }

    /// Queues a removal.
    pub(in crate::store) fn remove(&self, key: Vec<u8>) {
        self.send(Message::Remove { key });
    }

    /// Removes a key so that no crash and no power cut restores it. Does not block. The removal is queued before
    /// this returns, so later reads and writes follow it. If the queue is full, reads no longer find the key, and
    /// [`Self::send_pending_removals`] removes it.
    pub(in crate::store) fn remove_durable(&self, key: Vec<u8>) -> DurableRemoval {
        let (reply, answer) = sync_channel(1);
        let name = key.clone();
        let pending_removals = match self.sender.try_send(Message::RemoveDurable { key, reply }) {
            Err(TrySendError::Full(message)) => {
                self.pending_removals
                    .change(|removals| removals.add(name.clone()));
                Some((name, message))
            }
            Ok(()) | Err(TrySendError::Disconnected(_)) => None,
        };
        DurableRemoval {
            pending_removals,
            answer,
        }
    }

    /// Waits for a removal with a timeout. Returns `false` if it may not be durable. A stuck worker is not waited
    /// for; it removes the key when it continues.
    pub(in crate::store) fn wait_durable(&self, durable_removals: DurableRemoval) -> bool {
        assert_may_block();
        let DurableRemoval {
            pending_removals,
            answer,
        } = durable_removals;
        let is_sent = pending_removals.is_none_or(|(key, message)| self.send_removal(&key, message));
        if !is_sent || self.is_stuck() {
            return false;
        }
        answer.recv_timeout(REPLY_TIMEOUT).unwrap_or_else(|error| {
            if error == RecvTimeoutError::Timeout {
                self.note_stuck();
            }
            false
        })
    }

    /// Returns at most `limit` pairs in key order, starting after `after`. A shorter page is the last one, so the value
    /// of a corrupt record is empty instead of missing.
    pub(in crate::store) fn scan(
        &self,
        prefix: Vec<u8>,
        after: Vec<u8>,
        limit: usize,
    ) -> Result<Vec<Pair>, IndexUnavailable> {
        // Pending removals could fill the page, and a page without them would look like the last one.
        if !self.pending_removals.is_empty() {
            return Err(IndexUnavailable);
        }
        self.request(|reply| Message::Scan {
            prefix,
            after,
            limit,
            reply,
        })
    }

    /// Quarantines the index. A new one is filled from the files.
    pub(in crate::store) fn rebuild(&self) {
        self.shared.record_loss();
        self.send(Message::Rebuild);
    }

    fn request<T>(&self, question: impl FnOnce(Reply<Response<T>>) -> Message) -> Response<T> {
        assert_may_block();
        if self.is_stuck() {
            return Err(IndexUnavailable);
        }
        let (reply, answer) = sync_channel(1);
        self.sender
            .try_send(question(reply))
            .map_err(|_| IndexUnavailable)?;
        answer.recv_timeout(REPLY_TIMEOUT).unwrap_or_else(|_| {
            self.note_stuck();
            Err(IndexUnavailable)
        })
    }

    /// Returns whether a read has timed out and the worker has made no progress since.
    pub(in crate::store) fn is_stuck(&self) -> bool {
        self.shared.is_stuck.load(Ordering::Relaxed)
    }

    pub(in crate::store) fn note_stuck(&self) {
        self.shared.is_stuck.store(true, Ordering::Relaxed);
    }

    /// Waits until all writes are durable, with a timeout.
    pub(in crate::store) fn flush(&self) {
        assert_may_block();
        let (reply, answer) = sync_channel(1);
        if self.send_blocking(Message::Flush { reply }) {
            let _ = answer.recv_timeout(REPLY_TIMEOUT * 5);
        }
    }

    /// Sends pending removals as far as the queue has space. Call every few seconds.
    pub(in crate::store) fn send_pending_removals(&self) {
        if self.pending_removals.is_empty() {
            return;
        }
        self.pending_removals.change(|removals| {
            if removals.is_overflowed() {
                if self.sender.try_send(Message::Rebuild).is_ok() {
                    self.shared.record_loss();
                    removals.clear();
                }
                return;
            }
            removals.remove_sent(|key| {
                let (reply, _) = sync_channel(1);
                let key = key.to_vec();
                self.sender
                    .try_send(Message::RemoveDurable { key, reply })
                    .is_ok()
            });
        });
    }

    /// [`Self::send_blocking`], unless the removal has been sent meanwhile or a newer value was written.
    fn send_removal(&self, key: &[u8], mut message: Message) -> bool {
        for _ in 0..SEND_TRIES {
            let sent = self.pending_removals.change(|removals| {
                if !removals.contains(key) {
                    return Err(None);
                }
                match self.sender.try_send(message) {
                    Ok(()) => {
                        removals.remove(key);
                        Ok(())
                    }
                    Err(TrySendError::Disconnected(_)) => Err(None),
                    Err(TrySendError::Full(back)) => Err(Some(back)),
                }
            });
            match sent {
                Ok(()) => return true,
                Err(None) => return false,
                Err(Some(back)) => message = back,
            }
            std::thread::sleep(SEND_PAUSE);
        }
        false
    }

    /// Sends a message that must not be dropped when the queue is full.
    fn send_blocking(&self, mut message: Message) -> bool {
        for _ in 0..SEND_TRIES {
            match self.sender.try_send(message) {
                Ok(()) => return true,
                Err(TrySendError::Disconnected(_)) => return false,
                Err(TrySendError::Full(back)) => message = back,
            }
            std::thread::sleep(SEND_PAUSE);
        }
        false
    }

    /// Sends a write without waiting. A full queue means that the disk is too slow; then the write is dropped, which
    /// is safe. Returns `false` if it was dropped.
    fn send(&self, message: Message) -> bool {
        let is_full = matches!(self.sender.try_send(message), Err(TrySendError::Full(_)));
        if is_full {
            self.shared.record_loss();
            tracing::debug!("index queue full, write dropped");
        }
        !is_full
    }
}

impl Drop for IndexHandle {
    fn drop(&mut self) {
        // The worker waits for a hung disk. Do not join it, because the process is about to end.
        if self.shared.is_stuck.load(Ordering::Relaxed) {
            return;
        }
        let closing = self.sender.send(Message::Close);
        if let (Ok(()), Some(thread)) = (closing, self.thread.take()) {
            // The panic hook has already reported a panic of the worker.
            let _ = thread.join();
        }
    }
}
