//! One upstream transfer per digest, many readers.
//!
//! The problem: a hundred jobs start at once and want the same 300 MiB layer. One transfer must serve them all, from
//! its first byte on, and none of them may slow, break or end it for the others.
//!
//! The flow: whoever [`Downloads::join`]s first is the [`Leader`] and says how to reach the bytes (its [`Source`]); the
//! transfer then runs apart from every client, in a task of its own. It writes the bytes to an ingest file and
//! publishes how far readers may go. A [`Reader`] reads that growing file at any offset, waits where it has caught up,
//! and costs one buffer. The last [`WITHHELD_BYTES`] are published only when the digest is right, so no reader ever
//! holds a whole wrong blob; a failure is an error to every reader, never a clean end. A transfer that breaks is resumed from
//! where it stopped. The blob is fsynced and named after the readers have their bytes, not before.
//!
//! Scope: who may join is not decided here. The road lets nobody follow on another's right.

mod transfer;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};

use crate::oci::{Cause, Digest};
use crate::store::blobs::{HeldBlob, Mismatch};
use crate::store::step::{Buffers, STEP_BYTES, read_step};
use crate::store::volume::VolumeFile;
use crate::store::{Fault, Store};
use crate::upstream::{Answer, Fetched};

/// How much of a blob is kept from every reader until its digest is known to be right.
pub const WITHHELD_BYTES: u64 = 64 * 1024;

/// The transfers now running. A value owned by the server, not a global.
#[derive(Clone)]
pub struct Downloads {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<Store>,
    buffers: Buffers,
    running: Mutex<HashMap<Digest, Arc<Download>>>,
    places: Semaphore,
    transfers_max: usize,
}

/// What one finds on joining.
pub enum Joined {
    /// It became held meanwhile.
    Held(HeldBlob),
    /// Nobody is fetching it: this caller must.
    Leader(Leader),
    /// It is being fetched.
    Follower(Reader),
}

/// How the bytes are reached. Opened again, from where the transfer stopped, each time the upstream breaks.
pub trait Source: Send + 'static {
    /// Opens the blob from byte `from` on. A stream that starts earlier is accepted; the surplus is skipped.
    fn open(&mut self, from: u64) -> impl Future<Output = Result<Stream, Answer>> + Send;
}

/// An opened transfer.
pub struct Stream {
    /// The offset of the first byte that [`Self::body`] gives.
    pub start: u64,
    /// The size of the whole blob, where the upstream says it.
    pub total: Option<u64>,
    /// The bytes.
    pub body: Box<dyn Chunks>,
}

/// The next bytes, on their way.
pub type Chunk<'a> = Pin<Box<dyn Future<Output = Option<Result<Bytes, Cause>>> + Send + 'a>>;

/// Bytes as they arrive.
pub trait Chunks: Send {
    /// The next bytes; `None` at the end; a body cut short is an error.
    fn chunk(&mut self) -> Chunk<'_>;
}

impl Chunks for Fetched {
    fn chunk(&mut self) -> Chunk<'_> {
        Box::pin(Fetched::chunk(self))
    }
}

/// Why a transfer failed.
#[derive(Debug)]
pub enum Failure {
    /// The upstream refused the leader, or was silent, before the first byte. It concerns the leader's right alone:
    /// others join again with their own.
    Refused(Box<Answer>),
    /// The upstream broke off, and resuming did not help.
    Broken(Cause),
    /// The upstream sent other bytes than it was asked for.
    Wrong(Mismatch),
    /// The disk could not take it before the first byte: it can still be passed through.
    Unstorable(Fault),
    /// The disk failed in the middle.
    Store(Fault),
    /// Whoever was to lead went away before it began.
    Abandoned,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(answer) => write!(f, "the upstream did not begin: {:?}", answer.said),
            Self::Broken(cause) => write!(f, "the upstream {cause}"),
            Self::Wrong(mismatch) => write!(f, "the upstream sent wrong bytes: {mismatch}"),
            Self::Unstorable(fault) | Self::Store(fault) => write!(f, "{fault}"),
            Self::Abandoned => f.write_str("abandoned before it began"),
        }
    }
}

impl std::error::Error for Failure {}

impl Downloads {
    /// No transfers yet; blobs go to `store`. Of more than `transfers_max` at once, the further ones wait for a place.
    pub fn new(store: Arc<Store>, buffers: Buffers, transfers_max: usize) -> Self {
        let shared = Shared {
            store,
            buffers,
            running: Mutex::default(),
            places: Semaphore::new(transfers_max),
            transfers_max,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Joins the transfer of `digest`, or becomes its leader.
    ///
    /// Looks into the store a second time, under the same lock under which a transfer is entered and removed: between
    /// a caller's first look and this one a whole transfer can have come and gone, and it must not lead another.
    pub fn join(&self, digest: Digest) -> Joined {
        let mut running = self.shared.running();
        match running.entry(digest) {
            Entry::Occupied(download) => Joined::Follower(Reader::new(download.get(), &self.shared.buffers)),
            Entry::Vacant(place) => {
                // A fault here is a miss; the transfer itself will meet it again and say so.
                if let Ok(Some(held)) = self.shared.store.blob(&digest) {
                    return Joined::Held(held);
                }
                let (progress, _) = watch::channel(Progress::Opening);
                let download = Arc::new(Download {
                    digest,
                    opened: OnceLock::new(),
                    progress,
                });
                place.insert(Arc::clone(&download));
                Joined::Leader(Leader {
                    place: Place {
                        shared: Arc::clone(&self.shared),
                        download,
                    },
                })
            }
        }
    }

    /// Waits until no transfer runs, each one kept or failed.
    pub async fn idle(&self) {
        // Every place free is no transfer running; the semaphore is never closed.
        let places = u32::try_from(self.shared.transfers_max).unwrap_or(u32::MAX);
        let _ = self.shared.places.acquire_many(places).await;
    }

    /// Whether the upstream has begun to send this blob.
    pub fn is_arriving(&self, digest: &Digest) -> bool {
        let running = self.shared.running();
        running
            .get(digest)
            .is_some_and(|download| download.opened.get().is_some())
    }

    /// Whether at least half of the places are free, so that what nobody waits for may be begun.
    pub fn has_room(&self) -> bool {
        2 * self.shared.places.available_permits() >= self.shared.transfers_max
    }

    /// How many transfers run.
    pub fn count(&self) -> usize {
        self.shared.running().len()
    }
}

impl Shared {
    /// The map is whole between any two statements under its lock, so a poisoned lock is as good as another.
    fn running(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Download>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One transfer, as its readers see it.
struct Download {
    digest: Digest,
    opened: OnceLock<Opened>,
    progress: watch::Sender<Progress>,
}

/// What is known once the upstream has begun to answer.
#[derive(Clone)]
pub struct Opened {
    /// The size of the whole blob, where the upstream said it.
    pub size: Option<u64>,
    file: Arc<dyn VolumeFile>,
}

#[derive(Clone)]
enum Progress {
    Opening,
    /// Bytes before this offset may be read.
    Readable(u64),
    /// Verified; this is its size.
    Complete(u64),
    Failed(Arc<Failure>),
}

/// A transfer's place in the map: leaving it, however that comes about, lets the next asker lead.
struct Place {
    shared: Arc<Shared>,
    download: Arc<Download>,
}

impl Place {
    /// Leaves first and tells the readers after, so that one who joins again on a failure never finds the failed one.
    fn leave(&self, last: Progress) {
        self.shared.running().remove(&self.download.digest);
        self.download.progress.send_replace(last);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut running = self.shared.running();
        if running
            .get(&self.download.digest)
            .is_some_and(|found| Arc::ptr_eq(found, &self.download))
        {
            running.remove(&self.download.digest);
        }
        drop(running);
        let unfinished = matches!(
            &*self.download.progress.borrow(),
            Progress::Opening | Progress::Readable(_)
        );
        if unfinished {
            self.download
                .progress
                .send_replace(Progress::Failed(Arc::new(Failure::Abandoned)));
        }
    }
}

/// The duty to bring the bytes. Dropped unused, it fails its followers, who then join again.
#[must_use = "followers wait for the leader to start"]
pub struct Leader {
    place: Place,
}

impl Leader {
    /// Starts the transfer in a task of its own, which no client's leaving ends.
    pub fn start<S: Source>(self, source: S) -> Reader {
        let reader = Reader::new(&self.place.download, &self.place.shared.buffers);
        tokio::spawn(transfer::run(self.place, source));
        reader
    }
}

/// Reads a blob while it arrives.
pub struct Reader {
    download: Arc<Download>,
    progress: watch::Receiver<Progress>,
    buffers: Buffers,
    position: u64,
    end: Option<u64>,
}

impl Reader {
    fn new(download: &Arc<Download>, buffers: &Buffers) -> Self {
        Self {
            progress: download.progress.subscribe(),
            download: Arc::clone(download),
            buffers: buffers.clone(),
            position: 0,
            end: None,
        }
    }

    /// Waits until the upstream has begun to answer.
    pub async fn opened(&mut self) -> Result<Opened, Arc<Failure>> {
        loop {
            if let Progress::Failed(failure) = &*self.progress.borrow_and_update() {
                return Err(Arc::clone(failure));
            }
            if let Some(opened) = self.download.opened.get() {
                return Ok(opened.clone());
            }
            if self.progress.changed().await.is_err() {
                return Err(Arc::new(Failure::Abandoned));
            }
        }
    }

    /// Waits until the blob is verified, or known not to be.
    pub async fn settled(&mut self) -> Result<(), Arc<Failure>> {
        let over = |progress: &Progress| matches!(progress, Progress::Complete(_) | Progress::Failed(_));
        match self.progress.wait_for(over).await.as_deref() {
            Ok(Progress::Failed(failure)) => Err(Arc::clone(failure)),
            Ok(_) => Ok(()),
            Err(_) => Err(Arc::new(Failure::Abandoned)),
        }
    }

    /// Limits the reader to the bytes from `start` up to, not including, `end`.
    #[must_use]
    pub fn within(mut self, start: u64, end: u64) -> Self {
        self.position = start;
        self.end = Some(end);
        self
    }

    /// The next bytes, as soon as there are any; `None` at the end. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<Result<Bytes, Arc<Failure>>> {
        let opened = match self.opened().await {
            Ok(opened) => opened,
            Err(failure) => return Some(Err(failure)),
        };
        loop {
            let (readable, complete) = match &*self.progress.borrow_and_update() {
                Progress::Failed(failure) => return Some(Err(Arc::clone(failure))),
                Progress::Opening => (0, false),
                Progress::Readable(readable) => (*readable, false),
                Progress::Complete(size) => (*size, true),
            };
            let readable = self.end.map_or(readable, |end| readable.min(end));
            if readable > self.position {
                return Some(self.read(&opened.file, readable).await);
            }
            if complete || self.end.is_some_and(|end| self.position >= end) {
                return None;
            }
            if self.progress.changed().await.is_err() {
                return Some(Err(Arc::new(Failure::Abandoned)));
            }
        }
    }

    async fn read(&mut self, file: &Arc<dyn VolumeFile>, until: u64) -> Result<Bytes, Arc<Failure>> {
        let wanted = usize::try_from(until - self.position)
            .unwrap_or(STEP_BYTES)
            .min(STEP_BYTES);
        let bytes = read_step(file, self.position, wanted, &self.buffers)
            .await
            .map_err(|error| Arc::new(Failure::Store(unreadable(&error))))?;
        self.position += bytes.len() as u64;
        Ok(bytes)
    }
}

fn unreadable(error: &io::Error) -> Fault {
    Fault::io("read the ingest of a download", "ingest", error)
}
