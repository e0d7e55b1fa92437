//! Index worker: the only thread that uses the index database.
//!
//! Writes are made durable when the worker is idle, or after a number of writes. After an error the index is closed,
//! quarantined if it is corrupt, and opened again after a pause. Until then writes are buffered
//! ([`super::write_buffer`]), and reads of other keys return [`IndexUnavailable`]. When the worker is idle, an
//! oversized file is compacted ([`super::compaction`]).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::Duration;

use super::compaction::{Compaction, FILE_BYTES_MIN, Next, recover};
use super::handle::{IndexState, IndexUnavailable, Location, Message, Reply, Shared};
use super::identity::{identify, invalidate};
use super::write_buffer::WriteBuffer;
use super::{Index, IndexError, MemoryIndex, Opened, SledIndex, catch_panic, quarantine};
use crate::store::checksummed_json::checksum;

/// Idle time before writes are made durable.
const SYNC_AFTER_IDLE: Duration = Duration::from_millis(100);

/// Most writes lost in a power cut, each of which costs one revalidation. The limit is high because filling a new
/// index must not wait for many flushes.
const SYNC_AFTER_WRITES: u32 = 2048;

/// Most messages served between a durable removal and its flush, so that several removals share the flush.
const REMOVAL_BATCH_MAX: usize = 1024;

/// Interval of the file size check while idle, and pause between two compaction steps.
const SIZE_CHECK_INTERVAL: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 600_000 });
const COMPACTION_STEP_PAUSE: Duration = Duration::from_millis(5);

/// Attempts to open the index after a swap, and the pause between them.
const SWAP_TRIES: u32 = 50;
const SWAP_PAUSE: Duration = Duration::from_millis(20);

const REOPEN_FIRST: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 1000 });
const REOPEN_LAST: Duration = Duration::from_secs(30);

/// Attempts to open a locked index. Another handle of this process may release it soon; a leaked one never does.
const BUSY_MAX: u32 = 10;

const CHECKSUM_BYTES: usize = 8;

/// State of the worker thread.
pub(super) struct Worker {
    location: Location,
    shared: Arc<Shared>,
    sender: SyncSender<Message>,
    index: Option<Box<dyn Index>>,
    back_off: Duration,
    quarantined: u32,
    busy: u32,
    unsynced: u32,
    /// Keys of removals that are not durable yet, with the callers that wait.
    durable_removals: Vec<(Vec<u8>, Reply<bool>)>,
    write_buffer: WriteBuffer,
    compaction: Option<Compaction>,
}

impl Worker {
    pub(super) fn new(location: Location, shared: Arc<Shared>, sender: SyncSender<Message>) -> Self {
        Self {
            location,
            shared,
            sender,
            index: None,
            back_off: REOPEN_FIRST,
            quarantined: 0,
            busy: 0,
            unsynced: 0,
            durable_removals: Vec::new(),
            write_buffer: WriteBuffer::default(),
            compaction: None,
        }
    }

    /// Main loop, until closed. Opens the index first, while requests queue.
    pub(super) fn run(mut self, receiver: &Receiver<Message>) {
        self.open();
        let mut is_closed = false;
        loop {
            let pause = match (self.unsynced, &self.compaction) {
                (1.., _) => SYNC_AFTER_IDLE,
                (0, Some(_)) => COMPACTION_STEP_PAUSE,
                (0, None) => SIZE_CHECK_INTERVAL,
            };
            let message = match receiver.recv_timeout(pause) {
                Ok(message) => Some(message),
                Err(RecvTimeoutError::Timeout) => {
                    self.on_idle();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => None,
            };
            match message {
                None | Some(Message::Close) => break,
                Some(message) => self.serve(message),
            }
            // All removals queued by now share one flush.
            for _ in 0..REMOVAL_BATCH_MAX {
                if self.durable_removals.is_empty() || is_closed {
                    break;
                }
                match receiver.try_recv() {
                    Ok(Message::Close) => is_closed = true,
                    Ok(message) => self.serve(message),
                    Err(_) => break,
                }
            }
            self.remove_durable();
            if is_closed {
                break;
            }
            if self.unsynced >= SYNC_AFTER_WRITES {
                self.sync();
            }
        }
        self.sync();
    }

    /// Serves one message. A reply is dropped if its caller has timed out.
    fn serve(&mut self, message: Message) {
        self.shared.is_stuck.store(false, Ordering::Relaxed);
        match message {
            Message::Get { key, reply } => {
                let found = self.with_index(|index| index.get(&key));
                let found = found.or_else(|| self.write_buffer.get(&key).cloned());
                let _ = reply.send(
                    found
                        .map(|value| self.decode_record(&key, value?))
                        .ok_or(IndexUnavailable),
                );
            }
            Message::Put { key, value } => self.put(key, value),
            Message::PutIfAbsent { key, value } => {
                let found = self.with_index(|index| index.get(&key));
                let found = found.or_else(|| self.write_buffer.get(&key).cloned()).flatten();
                if found.is_none() {
                    self.put(key, value);
                }
            }
            Message::Remove { key } => self.write(key, None),
            Message::RemoveDurable { key, reply } => {
                self.write(key.clone(), None);
                self.durable_removals.push((key, reply));
            }
            Message::Scan {
                prefix,
                after,
                limit,
                reply,
            } => {
                let found = self.with_index(|index| index.scan(&prefix, &after, limit));
                let found = found.map(|pairs| {
                    let pairs = pairs.into_iter();
                    pairs
                        .map(|(key, value)| {
                            let value = decode_record(&key, value).unwrap_or_default();
                            (key, value)
                        })
                        .collect()
                });
                let _ = reply.send(found.ok_or(IndexUnavailable));
            }
            Message::Flush { reply } => {
                self.sync();
                let _ = reply.send(());
            }
            Message::Reopen if self.index.is_none() => self.open(),
            Message::Rebuild => {
                if let Some(index) = self.index.take() {
                    index.abandon(&IndexError::Busy);
                }
                self.abort_compaction(&IndexError::Busy);
                self.quarantine(&IndexError::Foreign("is to be rebuilt"));
                self.shared.record_loss();
                self.open();
            }
            Message::Reopen | Message::Close => {}
        }
    }

    fn decode_record(&mut self, key: &[u8], value: Vec<u8>) -> Option<Vec<u8>> {
        let value = decode_record(key, value);
        if value.is_none() {
            tracing::warn!("corrupt index record, reading its file instead");
            self.write(key.to_vec(), None);
        }
        value
    }

    fn put(&mut self, key: Vec<u8>, mut value: Vec<u8>) {
        value.extend_from_slice(&record_checksum(&key, &value));
        self.write(key, Some(value));
    }

    /// Writes a value, or removes the key for `None`.
    fn write(&mut self, key: Vec<u8>, value: Option<Vec<u8>>) {
        let written = self.with_index(|index| match &value {
            Some(value) => index.put(&key, value),
            None => index.remove(&key),
        });
        if written.is_none() {
            self.write_buffer.write(key, value);
            return;
        }
        self.unsynced += 1;
        if let Some(compaction) = &mut self.compaction
            && let Err(fault) = catch_panic(|| compaction.write(&key, value.as_deref()))
        {
            self.abort_compaction(&fault);
        }
    }

    /// Makes the pending removals durable with one flush and replies to their callers.
    fn remove_durable(&mut self) {
        if self.durable_removals.is_empty() {
            return;
        }
        let is_synced = self.sync();
        let (keys, replies): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.durable_removals).into_iter().unzip();
        let is_durable = is_synced || self.invalidate_on_disk(keys);
        for reply in replies {
            let _ = reply.send(is_durable);
        }
    }

    /// Called if a removal cannot be made durable. The index on disk is marked invalid, so all grants are lost, but
    /// a revoked grant does not return.
    fn invalidate_on_disk(&mut self, keys: Vec<Vec<u8>>) -> bool {
        for key in keys {
            self.write_buffer.write(key, None);
        }
        let Location::Folder { fs, .. } = &self.location else {
            return true;
        };
        let invalidated = invalidate(fs.as_ref());
        if let Err(fault) = &invalidated {
            tracing::error!(%fault, "failed to persist a grant revocation, a crash now would restore the grant");
        }
        invalidated.is_ok()
    }

    /// Idle work: a flush if writes are pending, otherwise compaction.
    fn on_idle(&mut self) {
        if self.unsynced > 0 {
            self.sync();
            return;
        }
        let (Some(index), Location::Folder { index: folder, .. }) = (&self.index, &self.location) else {
            return;
        };
        let Some(compaction) = &mut self.compaction else {
            if index.file_bytes() >= FILE_BYTES_MIN {
                self.compaction = Some(Compaction::new(folder));
            }
            return;
        };
        match catch_panic(|| compaction.step(index.as_ref())) {
            Ok(Next::Step) => {}
            Ok(Next::NotNeeded) => self.compaction = None,
            Ok(Next::Swap) => self.swap(),
            Err(fault) => self.abort_compaction(&fault),
        }
    }

    fn abort_compaction(&mut self, fault: &IndexError) {
        if let Some(compaction) = self.compaction.take() {
            tracing::warn!(%fault, "index compaction failed, trying again later");
            compaction.abandon(fault);
        }
    }

    /// Replaces the index by the compacted copy. Requests queue meanwhile.
    fn swap(&mut self) {
        let Some(compaction) = self.compaction.take() else {
            return;
        };
        let before = self.index.as_ref().map_or(0, |index| index.file_bytes());
        self.sync();
        if let Some(index) = self.index.take() {
            index.abandon(&IndexError::Busy);
        }
        if let Err(fault) = catch_panic(|| compaction.swap()) {
            tracing::warn!(%fault, "failed to swap in the compacted index");
        }
        for _ in 0..SWAP_TRIES {
            match self.try_open() {
                Err(IndexError::Busy) => std::thread::sleep(SWAP_PAUSE),
                Ok(index) => {
                    let after = index.file_bytes();
                    tracing::info!(before, after, "index compacted");
                    self.index = Some(index);
                    return;
                }
                Err(_) => break,
            }
        }
        self.open();
    }

    /// Makes all writes durable. Returns whether that succeeded.
    fn sync(&mut self) -> bool {
        self.unsynced = 0;
        self.with_index(|index| index.sync()).is_some()
    }

    /// Runs `op` on the index if it is open. An error closes the index.
    fn with_index<T>(&mut self, op: impl FnOnce(&mut Box<dyn Index>) -> Result<T, IndexError>) -> Option<T> {
        let index = self.index.as_mut()?;
        match catch_panic(|| op(index)) {
            Ok(done) => Some(done),
            Err(fault) => {
                self.fail(&fault);
                None
            }
        }
    }

    fn fail(&mut self, fault: &IndexError) {
        self.abort_compaction(fault);
        let may_reopen = self.index.take().is_none_or(|index| index.abandon(fault));
        // Files locked by a leaked handle cannot be opened again, so they are treated as corrupt.
        if !may_reopen || fault.is_permanent() {
            self.quarantine(fault);
        }
        self.degrade(fault);
    }

    fn degrade(&mut self, fault: &IndexError) {
        self.unsynced = 0;
        self.shared.record_loss();
        tracing::warn!(%fault, "index is down, serving from the files and opening it again in {} s", self.back_off.as_secs());
        *self.shared.state.lock() = IndexState::Degraded {
            reason: fault.to_string(),
        };
        let (sender, pause) = (self.sender.clone(), self.back_off);
        self.back_off = (self.back_off * 2).min(REOPEN_LAST);
        let waiting = std::thread::Builder::new()
            .name("index-reopen".to_owned())
            .spawn(move || {
                std::thread::sleep(pause);
                let _ = sender.send(Message::Reopen);
            });
        if waiting.is_err() {
            tracing::error!("failed to start the reopen thread, the index stays down until a restart");
        }
    }

    fn quarantine(&mut self, fault: &IndexError) {
        let Location::Folder { index, opened_at, .. } = &self.location else {
            return;
        };
        self.quarantined += 1;
        match quarantine(index, *opened_at, self.quarantined) {
            Ok(aside) => {
                tracing::error!(%fault, aside = %aside.display(), "index quarantined, filling a new one from the files");
            }
            Err(second) => tracing::error!(%fault, %second, "failed to quarantine the index"),
        }
    }

    /// Opens the index. If it is corrupt, quarantines it and opens a new one, once.
    fn open(&mut self) {
        if self.write_buffer.is_overflowed() {
            self.quarantine(&IndexError::Foreign("has missed too many writes"));
        }
        let opened = match self.try_open() {
            Err(fault) if fault.is_permanent() => {
                self.quarantine(&fault);
                self.try_open()
            }
            Err(IndexError::Busy) if self.busy >= BUSY_MAX => {
                self.quarantine(&IndexError::Busy);
                self.try_open()
            }
            opened => opened,
        };
        match opened {
            Ok(index) => {
                self.index = Some(index);
                self.write_buffer = WriteBuffer::default();
                self.back_off = REOPEN_FIRST;
                self.busy = 0;
                *self.shared.state.lock() = IndexState::Ready;
            }
            Err(fault) => {
                self.busy += u32::from(fault == IndexError::Busy);
                if fault.is_permanent() {
                    // The new index failed too.
                    self.quarantine(&fault);
                }
                self.degrade(&fault);
            }
        }
    }

    fn try_open(&mut self) -> Result<Box<dyn Index>, IndexError> {
        let (fs, folder) = match &self.location {
            Location::Memory => return Ok(Box::new(MemoryIndex::default())),
            #[cfg(test)]
            Location::Given(index) => {
                let given = index.lock().take();
                return given.ok_or(IndexError::Busy);
            }
            Location::Folder { fs, index, .. } => (Arc::clone(fs), index.clone()),
        };
        recover(&folder)?;
        let Opened { index, is_emptied } = SledIndex::open(&folder)?;
        if is_emptied {
            tracing::warn!("index lost its content, filling it from the files");
            self.shared.record_loss();
        }
        let mut index: Box<dyn Index> = Box::new(index);
        let readied = catch_panic(|| {
            identify(fs.as_ref(), index.as_mut())?;
            self.write_buffer.replay(index.as_mut())
        });
        match readied {
            Ok(()) => Ok(index),
            Err(fault) => {
                // As in `fail`. The caller quarantines an index with a permanent error.
                if !index.abandon(&fault) && !fault.is_permanent() {
                    self.quarantine(&fault);
                }
                Err(fault)
            }
        }
    }
}

fn record_checksum(key: &[u8], value: &[u8]) -> [u8; CHECKSUM_BYTES] {
    checksum(&[key, value].concat())
}

fn decode_record(key: &[u8], mut value: Vec<u8>) -> Option<Vec<u8>> {
    let length = value.len().checked_sub(CHECKSUM_BYTES)?;
    let (content, sum) = value.split_at_checked(length)?;
    let is_right = record_checksum(key, content) == sum;
    value.truncate(length);
    is_right.then_some(value)
}
