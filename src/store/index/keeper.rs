//! The one thread that touches the index.
//!
//! What was written is made durable when nothing has been asked for a moment, or after so many writes. A fault ends the
//! index's use: it is closed or, damaged, set aside, and opened again after a pause; until then every read is
//! [`NoAnswer`] and every write is dropped.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::thread::{Home, IndexState, Message, NoAnswer, Shared};
use super::{Index, IndexFault, MemoryIndex, Opened, SledIndex, disk, guarded, set_aside};
use crate::store::record::{RECORD_BYTES_MAX, checksum, hex, opened, sealed};
use crate::store::secret::random;
use crate::store::volume::Volume;

/// Nothing asked for this long: time to make durable what was written.
const SYNC_AFTER_IDLE: Duration = Duration::from_millis(100);

const SYNC_AFTER_WRITES: u32 = 256;

const REOPEN_FIRST: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 1000 });
const REOPEN_LAST: Duration = Duration::from_secs(30);

/// Another handle of this process may need a moment to let go; one that never does was leaked.
const BUSY_MAX: u32 = 10;

const STORE_ID: &str = "store-id";
const IDENTITY_KEY: &[u8] = b"m\0store-id";
const CHECKSUM_BYTES: usize = 8;

/// What both the index and the file beside it know, so that a lost or foreign index is noticed.
#[derive(Clone, Serialize, Deserialize)]
struct Identity {
    id: String,
    generation: u64,
}

/// The thread's own state.
pub(super) struct Keeper {
    home: Home,
    shared: Arc<Shared>,
    sender: SyncSender<Message>,
    index: Option<Box<dyn Index>>,
    back_off: Duration,
    set_aside: u32,
    busy: u32,
    unsynced: u32,
}

impl Keeper {
    pub(super) fn new(home: Home, shared: Arc<Shared>, sender: SyncSender<Message>) -> Self {
        Self {
            home,
            shared,
            sender,
            index: None,
            back_off: REOPEN_FIRST,
            set_aside: 0,
            busy: 0,
            unsynced: 0,
        }
    }

    /// Serves until told to close. Opens the index first; what is asked meanwhile waits.
    pub(super) fn run(mut self, receiver: &Receiver<Message>) {
        self.open();
        loop {
            let message = if self.unsynced == 0 {
                receiver.recv().ok()
            } else {
                match receiver.recv_timeout(SYNC_AFTER_IDLE) {
                    Ok(message) => Some(message),
                    Err(RecvTimeoutError::Timeout) => {
                        self.sync();
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => None,
                }
            };
            match message {
                None | Some(Message::Close) => break,
                Some(message) => self.serve(message),
            }
            if self.unsynced >= SYNC_AFTER_WRITES {
                self.sync();
            }
        }
        self.sync();
    }

    /// Replies that nobody waits for any more are dropped.
    fn serve(&mut self, message: Message) {
        self.shared.is_stuck.store(false, Ordering::Relaxed);
        match message {
            Message::Get { key, reply } => {
                let found = self.with(|index| index.get(&key));
                let _ = reply.send(found.map(|value| self.unsealed(&key, value?)).ok_or(NoAnswer));
            }
            Message::Put { key, mut value } => {
                value.extend_from_slice(&record_checksum(&key, &value));
                self.write(|index| index.put(&key, &value));
            }
            Message::Remove { key } => self.write(|index| index.remove(&key)),
            Message::Scan {
                prefix,
                after,
                limit,
                reply,
            } => {
                let found = self.with(|index| index.scan(&prefix, &after, limit));
                let found = found.map(|pairs| {
                    let pairs = pairs.into_iter();
                    pairs
                        .filter_map(|(key, value)| unsealed(&key, value).map(|value| (key, value)))
                        .collect()
                });
                let _ = reply.send(found.ok_or(NoAnswer));
            }
            Message::Flush { reply } => {
                self.sync();
                let _ = reply.send(());
            }
            Message::Reopen if self.index.is_none() => self.open(),
            Message::Reopen | Message::Close => {}
        }
    }

    fn unsealed(&mut self, key: &[u8], value: Vec<u8>) -> Option<Vec<u8>> {
        let value = unsealed(key, value);
        if value.is_none() {
            tracing::warn!("a record of the index is damaged; it is read from its file");
            self.write(|index| index.remove(key));
        }
        value
    }

    fn write(&mut self, deed: impl FnOnce(&mut Box<dyn Index>) -> Result<(), IndexFault>) {
        if self.with(deed).is_some() {
            self.unsynced += 1;
        }
    }

    fn sync(&mut self) {
        self.unsynced = 0;
        self.with(|index| index.sync());
    }

    /// Does `deed` with the index, if there is one; a fault ends its use for now.
    fn with<T>(&mut self, deed: impl FnOnce(&mut Box<dyn Index>) -> Result<T, IndexFault>) -> Option<T> {
        let index = self.index.as_mut()?;
        match guarded(|| deed(index)) {
            Ok(done) => Some(done),
            Err(fault) => {
                self.fail(&fault);
                None
            }
        }
    }

    fn fail(&mut self, fault: &IndexFault) {
        let may_reopen = self.index.take().is_none_or(|index| index.abandon(fault));
        // Files that a leaked handle still locks cannot be opened again: they are as good as damaged.
        if !may_reopen || fault.is_lasting() {
            self.put_aside(fault);
        }
        self.degrade(fault);
    }

    fn degrade(&mut self, fault: &IndexFault) {
        self.unsynced = 0;
        self.shared.note_loss();
        tracing::warn!(%fault, "the index is down; serving from the files, opening it again in {:?}", self.back_off);
        *self.shared.state() = IndexState::Degraded {
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
            tracing::error!("no thread to wait on; the index stays down until a restart");
        }
    }

    fn put_aside(&mut self, fault: &IndexFault) {
        let Home::Folder { index, opened_at, .. } = &self.home else {
            return;
        };
        self.set_aside += 1;
        match set_aside(index, *opened_at, self.set_aside) {
            Ok(aside) => {
                tracing::error!(%fault, aside = %aside.display(), "set the index aside; a new one fills from the files");
            }
            Err(second) => tracing::error!(%fault, %second, "the index could not be set aside"),
        }
    }

    /// Opens the index; a damaged one is set aside and a fresh one opened in its place, once.
    fn open(&mut self) {
        let opened = match self.try_open() {
            Err(fault) if fault.is_lasting() => {
                self.put_aside(&fault);
                self.try_open()
            }
            Err(IndexFault::Busy) if self.busy >= BUSY_MAX => {
                self.put_aside(&IndexFault::Busy);
                self.try_open()
            }
            opened => opened,
        };
        match opened {
            Ok(index) => {
                self.index = Some(index);
                self.back_off = REOPEN_FIRST;
                self.busy = 0;
                *self.shared.state() = IndexState::Ready;
            }
            Err(fault) => {
                self.busy += u32::from(fault == IndexFault::Busy);
                self.degrade(&fault);
            }
        }
    }

    fn try_open(&mut self) -> Result<Box<dyn Index>, IndexFault> {
        let (volume, folder) = match &self.home {
            Home::Memory => return Ok(Box::new(MemoryIndex::default())),
            Home::Folder { volume, index, .. } => (Arc::clone(volume), index.clone()),
        };
        let Opened { index, is_emptied } = SledIndex::open(&folder)?;
        if is_emptied {
            tracing::warn!("the index had files but is empty; it fills again from the files of the store");
            self.shared.note_loss();
        }
        let mut index: Box<dyn Index> = Box::new(index);
        match guarded(|| identify(volume.as_ref(), index.as_mut())) {
            Ok(()) => Ok(index),
            Err(fault) => {
                index.abandon(&fault);
                Err(fault)
            }
        }
    }
}

/// Compares the identities inside and beside the index, and steps both to the next generation: the inner one first, so
/// that a stop in between is no loss.
fn identify(volume: &dyn Volume, index: &mut dyn Index) -> Result<(), IndexFault> {
    let path = Path::new(STORE_ID);
    let beside: Option<Identity> = volume
        .read_whole(path, RECORD_BYTES_MAX)
        .ok()
        .and_then(|record| opened(&record));
    let inside: Option<Identity> = index.get(IDENTITY_KEY)?.and_then(|record| opened(&record));
    match (&beside, &inside) {
        (Some(beside), Some(inside)) if beside.id != inside.id => {
            return Err(IndexFault::Foreign("belongs to another store"));
        }
        (Some(beside), Some(inside)) if beside.generation > inside.generation => {
            return Err(IndexFault::Foreign("is older than its store"));
        }
        _ => {}
    }
    let generation = beside
        .iter()
        .chain(&inside)
        .map(|identity| identity.generation)
        .max()
        .unwrap_or(0)
        + 1;
    let id = match beside.or(inside) {
        Some(identity) => identity.id,
        None => hex(&random::<16>().map_err(disk)?),
    };
    let record = sealed(&Identity { id, generation });
    index.put(IDENTITY_KEY, &record)?;
    index.sync()?;
    if let Err(error) = volume.write_whole(path, &record) {
        tracing::warn!(%error, "could not write {STORE_ID}; a loss of the index might go unnoticed");
    }
    Ok(())
}

fn record_checksum(key: &[u8], value: &[u8]) -> [u8; CHECKSUM_BYTES] {
    checksum(&[key, value].concat())
}

fn unsealed(key: &[u8], mut value: Vec<u8>) -> Option<Vec<u8>> {
    let length = value.len().checked_sub(CHECKSUM_BYTES)?;
    let (content, sum) = value.split_at_checked(length)?;
    let is_right = record_checksum(key, content) == sum;
    value.truncate(length);
    is_right.then_some(value)
}
