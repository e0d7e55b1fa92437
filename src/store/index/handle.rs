//! The handle by which others ask the thread that owns the index ([`super::worker`]).
//!
//! Reads wait for a reply, but not for long: they are made for what is not in memory, and a miss is safe. Writes do not
//! wait at all. Where the thread lets someone wait in vain, nobody else waits for it until it has done something again.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Pair;
use super::pending_removals::PendingRemovals;
use super::worker::Worker;
use crate::store::fs::FileSystem;
use crate::store::fs::assert_may_block;

const QUEUE_MESSAGES_MAX: usize = 4096;

/// A record of a page or more would make sled write a file of its own for it.
pub(in crate::store) const VALUE_BYTES_MAX: usize = 4000;

const REPLY_TIMEOUT: Duration = Duration::from_secs(2);

/// How often a full queue is tried, and how long in between, for what may not be dropped.
const SEND_TRIES: u32 = 100;
const SEND_PAUSE: Duration = Duration::from_millis(20);

/// How the index is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IndexState {
    /// Being opened; reads wait a moment for it.
    Opening,
    /// Reading and writing.
    Ready,
    /// Not usable now. The files answer; times and grants written meanwhile are lost at a restart. It is opened again
    /// by itself.
    Degraded {
        /// Why, for the operator.
        reason: String,
    },
}

/// Where an index lives.
pub(in crate::store) enum Location {
    /// In a folder of this machine, beside the files of `fs`.
    Folder {
        fs: Arc<dyn FileSystem>,
        index: PathBuf,
        /// Seconds since 1970, for the names of what is set aside.
        opened_at: u64,
    },
    Memory,
    /// For tests: this one, once.
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
    /// Removes so that no crash brings it back; the reply says whether that worked out.
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
    /// Begins a new one.
    Rebuild,
    Close,
}

/// The index is slow or down: whether it holds what was asked for is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct IndexUnavailable;

/// A removal that is to be durable.
pub(in crate::store) struct DurableRemoval {
    /// With its key, where the queue was full.
    pending_removals: Option<(Vec<u8>, Message)>,
    answer: Receiver<bool>,
}

/// What the thread and the handle both see.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<IndexState>,
    /// It let someone wait in vain; nobody else waits until it has done something again.
    pub(super) is_stuck: AtomicBool,
    /// How often something that was put may have been lost.
    losses: AtomicU64,
    /// One more than the losses after which everything had been put again.
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

    pub(super) fn state(&self) -> MutexGuard<'_, IndexState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn record_loss(&self) {
        self.losses.fetch_add(1, Ordering::AcqRel);
    }
}

/// Asks the index thread. Dropped, it lets the thread finish and waits for that.
pub(in crate::store) struct IndexHandle {
    sender: SyncSender<Message>,
    shared: Arc<Shared>,
    pending_removals: PendingRemovals,
    thread: Option<JoinHandle<()>>,
}

impl IndexHandle {
    /// Starts the thread, which opens the index; nobody waits for that.
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

    /// How the index is.
    pub(in crate::store) fn state(&self) -> IndexState {
        self.shared.state().clone()
    }

    /// Whether it is known to name every tag that has a file.
    pub(in crate::store) fn is_complete(&self) -> bool {
        self.shared.complete_after.load(Ordering::Acquire) == self.losses() + 1
    }

    /// How often something that was put may have been lost; for [`Self::set_complete`].
    pub(in crate::store) fn losses(&self) -> u64 {
        self.shared.losses.load(Ordering::Acquire)
    }

    /// Says that every tag that has a file has been put, since there were so many `losses`.
    pub(in crate::store) fn set_complete(&self, losses: u64) {
        self.shared.complete_after.store(losses + 1, Ordering::Release);
    }

    /// The value of `key`. `None` may also mean that the index has lost it.
    pub(in crate::store) fn get(&self, key: Vec<u8>) -> Result<Option<Vec<u8>>, IndexUnavailable> {
        if !self.pending_removals.is_empty() {
            let (is_overflowed, is_removed) = self
                .pending_removals
                .change(|removals| (removals.is_overflowed(), removals.has(&key)));
            if is_removed {
                return Ok(None);
            }
            if is_overflowed {
                return Err(IndexUnavailable);
            }
        }
        self.request(|reply| Message::Get { key, reply })
    }

    /// Writes sooner or later. A value too long for a record is not written.
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
                removals.end(&name);
            }
        });
    }

    /// [`Self::put`], unless it has something of `key`. `false` where it does not keep up: to be tried again.
    pub(in crate::store) fn put_if_absent(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        // What it has there is to be removed: the removal comes first.
        if !self.pending_removals.is_empty() && self.pending_removals.change(|removals| removals.has(&key)) {
            return false;
        }
        let put = self.sender.try_send(Message::PutIfAbsent { key, value });
        !matches!(put, Err(TrySendError::Full(_)))
    }

    /// Removes sooner or later.
    pub(in crate::store) fn remove(&self, key: Vec<u8>) {
        self.send(Message::Remove { key });
    }

    /// Removes so that no crash and no power cut can bring it back. Does not wait: the removal takes its place in the queue
    /// before this returns, so that what is asked or written afterwards comes after it. Where the queue is full, no look-up
    /// finds the key from now on, and [`Self::send_pending_removals`] removes it.
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

    /// Waits, not for ever, for the end of a removal; `false` if it is not sure to be durable. A thread that lets others wait
    /// in vain removes it when it comes to it, and is not waited for.
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

    /// At most `limit` pairs in order of their keys, from the first after `after` on.
    pub(in crate::store) fn scan(
        &self,
        prefix: Vec<u8>,
        after: Vec<u8>,
        limit: usize,
    ) -> Result<Vec<Pair>, IndexUnavailable> {
        // What waits to be removed could fill a page, and a page without it would look like the end.
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

    /// Sets the index aside; a new one fills from the files.
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

    /// Whether it let someone wait in vain, and has done nothing since.
    pub(in crate::store) fn is_stuck(&self) -> bool {
        self.shared.is_stuck.load(Ordering::Relaxed)
    }

    pub(in crate::store) fn note_stuck(&self) {
        self.shared.is_stuck.store(true, Ordering::Relaxed);
    }

    /// Waits until everything written is durable; not for ever.
    pub(in crate::store) fn flush(&self) {
        assert_may_block();
        let (reply, answer) = sync_channel(1);
        if self.send_blocking(Message::Flush { reply }) {
            let _ = answer.recv_timeout(REPLY_TIMEOUT * 5);
        }
    }

    /// Sends the removals for which there was no room, as far as there is room now. To be called every few seconds.
    pub(in crate::store) fn send_pending_removals(&self) {
        if self.pending_removals.is_empty() {
            return;
        }
        self.pending_removals.change(|removals| {
            if removals.is_overflowed() {
                if self.sender.try_send(Message::Rebuild).is_ok() {
                    self.shared.record_loss();
                    removals.end_all();
                }
                return;
            }
            removals.end_sent(|key| {
                let (reply, _) = sync_channel(1);
                let key = key.to_vec();
                self.sender
                    .try_send(Message::RemoveDurable { key, reply })
                    .is_ok()
            });
        });
    }

    /// [`Self::send_blocking`], unless the removal was sent by then, or something was put in the place of what it removes.
    fn send_removal(&self, key: &[u8], mut message: Message) -> bool {
        for _ in 0..SEND_TRIES {
            let sent = self.pending_removals.change(|removals| {
                if !removals.has(key) {
                    return Err(None);
                }
                match self.sender.try_send(message) {
                    Ok(()) => {
                        removals.end(key);
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

    /// Tells what may not be dropped because the queue is full.
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

    /// A full queue means a disk that does not keep up: what is written here may be lost, and waiting for it may not.
    /// `false` where it is lost.
    fn send(&self, message: Message) -> bool {
        let is_full = matches!(self.sender.try_send(message), Err(TrySendError::Full(_)));
        if is_full {
            self.shared.record_loss();
            tracing::debug!("the index does not keep up; a write was dropped");
        }
        !is_full
    }
}

impl Drop for IndexHandle {
    fn drop(&mut self) {
        // A thread that waits for a dead disk is left behind; the process is about to end.
        if self.shared.is_stuck.load(Ordering::Relaxed) {
            return;
        }
        let closing = self.sender.send(Message::Close);
        if let (Ok(()), Some(thread)) = (closing, self.thread.take()) {
            // A panic there has been told by the panic hook.
            let _ = thread.join();
        }
    }
}
