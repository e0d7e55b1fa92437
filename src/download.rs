//! One upstream transfer per digest, many readers.
//!
//! The problem: a hundred jobs start at once and want the same 300 MiB layer. One transfer must serve them all, from
//! its first byte on, and none of them may slow, break or end it for the others.
//!
//! The flow: whoever [`Downloads::join`]s first is the [`Leader`] and says how to reach the bytes (its [`Source`]); the
//! transfer then runs apart from every client, in a task of its own. It writes the bytes to an ingest file and
//! publishes how far readers may go. A [`Reader`] reads that growing file at any offset, waits where it has caught up,
//! and costs one buffer. The last [`WITHHELD_BYTES`] are published only when the digest is right, so no reader ever
//! holds a whole wrong blob; a failure is an error to every reader, never a clean end. The blob is fsynced and named after
//! the readers have their bytes, not before.
//!
//! A transfer waits for its place in a [`Queue`], in the turn of each request that waits for it. Being queued is no failure.
//! What nobody waits for ends while it is queued and until the upstream's yes; later only if nobody wanted more than a small
//! part, or if it comes so slowly that it would hold its place for long.
//!
//! A transfer that breaks, drips or is answered with an error midway is resumed from where it stopped, at the next address if
//! the upstream has several, while its readers wait. One that ends all the same, or with the process, leaves what it wrote to
//! the next asker of that blob, who gets those bytes at once: they are read again and agree with the marks that
//! were made as they arrived, so they are exactly as good as when they did. If what was put together from several
//! answers is wrong in the end, it is fetched once more from the start; readers that were given some of the
//! wrong bytes break, the others never notice.
//!
//! A disk that takes no more in the middle ends the transfer, but not its readers: each reads what is there and asks the
//! upstream for the rest itself, unstored and verified. So does a reader whose answer began while the transfer was queued, if
//! that fails before its first byte.
//!
//! Scope: who may join is not decided here. The road lets nobody follow on another's right; a transfer only remembers its
//! [`Requester`].
//!
//! * `joining`: led, followed or held. * `progress`: a transfer as its readers see it. * `reader`: also the parts that lie far ahead. * `transfer`: from the first
//!   answer to the name. * `receive`: from the upstream, again and again. * `writer`: into the file.
//! * `stranded`: readers without a disk. * `verifying`: bytes that pass by.

mod joining;
mod progress;
mod reader;
mod receive;
mod stranded;
mod transfer;
mod verifying;
mod view;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, Semaphore};

pub use view::Transfer;

use crate::oci::{Digest, Repository, UpstreamFailure};
use crate::queue::{Demand, Full, NoPlace, Place as Admitted, Queue, Waiter, Waiters};
use crate::store::blobs::{BlobHandle, Mismatch};
use crate::store::file_read::BufferPool;
use crate::store::{Store, StoreError};
use crate::upstream::{ResponseStream, UpstreamResponse};

use self::joining::Looking;
pub use self::progress::Opened;
use self::progress::{Download, Place};
pub use self::reader::{AHEAD_BYTES_MAX, FAR_AHEAD_BYTES, Reader};
pub use self::stranded::Stranded;
pub use self::verifying::Verifying;

/// How much of a blob is kept from every reader until its digest is known to be right.
pub const WITHHELD_BYTES: u64 = 64 * 1024;

/// Parts far ahead that are asked for at once; the others wait for the fill.
const AHEAD_PARTS_MAX: usize = 16;

/// Write steps at a time, of all transfers together: each holds a thread of the blocking pool for as long as it lasts.
const WRITE_STEPS_MAX: usize = 32;

/// Bytes on their way from the network to the disk, of all transfers together.
const QUEUED_BYTES_MAX: usize = 32 * 1024 * 1024;

/// The transfers now running. A value owned by the server, not a global.
#[derive(Clone)]
pub struct Downloads {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<Store>,
    buffers: BufferPool,
    running: Mutex<Running>,
    left: Notify,
    queue: Queue,
    write_steps: Arc<Semaphore>,
    queued_bytes: Arc<Semaphore>,
    ahead_places: Arc<Semaphore>,
    counts: Arc<view::Counts>,
}

#[derive(Default)]
struct Running {
    downloads: HashMap<Digest, Arc<Download>>,
    /// Blobs that are looked up on the disk now, by those who would lead.
    looking: HashMap<Digest, Looking>,
}

/// What a request wants of a blob.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// What it asks of admission.
    pub demand: Demand,
    /// Whether it wants all of it, or so much that the rest is worth having.
    pub is_whole: bool,
}

/// What one finds on joining.
pub enum Joined {
    /// It became held meanwhile.
    Held(BlobHandle),
    /// Nobody is fetching it: this caller must.
    Leader(Leader),
    /// It is being fetched.
    Follower {
        /// Reads what arrives.
        reader: Reader,
        /// When this very requester began it; `None` if another did.
        began_by_same: Option<tokio::time::Instant>,
    },
}

/// On whose right a transfer is fetched: a principal in a repository of an upstream. Equal requesters may read what each
/// of them fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requester {
    /// The name of the upstream.
    pub upstream: Arc<str>,
    /// The repository asked for it.
    pub repository: Repository,
    /// The hash of the credential.
    pub principal: [u8; 32],
}

/// How the bytes are reached. Opened again, from where the transfer stopped, each time the upstream breaks.
pub trait Source: Send + 'static {
    /// Opens the blob from byte `from` on. A stream that starts earlier is accepted; the surplus is skipped. Called again after
    /// a stream broke, it should turn to another address if it has one.
    fn open(&mut self, from: u64) -> impl Future<Output = Result<Stream, UpstreamResponse>> + Send;

    /// The size that a manifest states: a hint, and no promise of the upstream's.
    fn stated_size(&self) -> Option<u64> {
        None
    }

    /// The bytes, so many, are verified, and the last of them are not released yet: what follows from that is noted now, so that
    /// whoever has the whole blob finds it noted.
    fn verified(&mut self, _size: u64) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// The transfer is over, well or not.
    fn ended(&self, _failure: Option<&Failure>) {}
}

/// How a part far ahead of the fill is reached, or the rest of one that failed, with the right of the one who wants it.
pub trait Ahead: Send + 'static {
    /// Asks for exactly the bytes from `from` up to, not including, `until`, or to the end; `None` if they cannot be had
    /// alone. The whole is asked for in its turn among the transfers.
    fn open(&mut self, from: u64, until: Option<u64>) -> Part<'_>;
}

/// A part that is being asked for.
pub type Part<'a> = Pin<Box<dyn Future<Output = Option<Box<dyn Chunks>>> + Send + 'a>>;

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
pub type Chunk<'a> = Pin<Box<dyn Future<Output = Option<Result<Bytes, UpstreamFailure>>> + Send + 'a>>;

/// Bytes as they arrive.
pub trait Chunks: Send {
    /// The next bytes; `None` at the end; a body cut short is an error.
    fn chunk(&mut self) -> Chunk<'_>;
}

impl Chunks for ResponseStream {
    fn chunk(&mut self) -> Chunk<'_> {
        Box::pin(ResponseStream::chunk(self))
    }
}

/// Why a transfer failed.
#[derive(Debug)]
pub enum Failure {
    /// The upstream refused the leader, or was silent, before the first byte. It concerns the leader's right alone:
    /// others join again with their own.
    Refused(Box<UpstreamResponse>),
    /// The upstream broke off, and resuming did not help.
    Broken(UpstreamFailure),
    /// The upstream sent other bytes than it was asked for.
    Wrong(Mismatch),
    /// The disk could not take it before the first byte: it can still be passed through.
    Unstorable(StoreError),
    /// The file could not be read.
    Store(StoreError),
    /// The disk failed in the middle: its readers go on without it.
    Stranded(Box<Stranded>),
    /// Whoever was to lead went away before it began, or nobody waits for it any more.
    Abandoned,
    /// Too many downloads wait already.
    Crowded(Full),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(answer) => write!(f, "the upstream did not begin: {}", answer.kind),
            Self::Broken(cause) => write!(f, "the upstream {cause}"),
            Self::Wrong(mismatch) => write!(f, "the upstream sent wrong bytes: {mismatch}"),
            Self::Unstorable(fault) | Self::Store(fault) => write!(f, "{fault}"),
            Self::Stranded(stranded) => write!(f, "{stranded}"),
            Self::Abandoned => f.write_str("given up, for nobody waits for it"),
            Self::Crowded(_) => f.write_str("too many downloads wait already"),
        }
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// Whether it is the disk that failed.
    pub fn is_of_disk(&self) -> bool {
        matches!(self, Self::Unstorable(_) | Self::Store(_) | Self::Stranded(_))
    }
}

impl Downloads {
    /// No transfers yet; blobs go to `store`. Of more than `transfers_max` at once, the further ones wait for a place.
    pub fn new(store: Arc<Store>, buffers: BufferPool, transfers_max: usize) -> Self {
        let shared = Shared {
            store,
            buffers,
            running: Mutex::default(),
            left: Notify::new(),
            queue: Queue::shared("downloads", transfers_max),
            write_steps: Arc::new(Semaphore::new(WRITE_STEPS_MAX)),
            queued_bytes: Arc::new(Semaphore::new(QUEUED_BYTES_MAX)),
            ahead_places: Arc::new(Semaphore::new(AHEAD_PARTS_MAX)),
            counts: Arc::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Waits until no transfer runs, each one kept or failed.
    pub async fn idle(&self) {
        loop {
            let mut left = std::pin::pin!(self.shared.left.notified());
            left.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            left.await;
        }
    }

    /// From now on so many transfers at a time from this upstream.
    pub fn resize_upstream(&self, upstream: &str, transfers_max: usize) {
        self.shared.queue.resize_group(&upstream.into(), transfers_max);
    }

    /// A place for a transfer that is read by one client alone and not stored.
    pub async fn admit(&self, upstream: &str, demand: Demand) -> Result<Admitted, NoPlace> {
        let (alone, _waiter) = Waiters::alone(demand);
        self.shared.queue.acquire(&upstream.into(), &alone).await
    }

    /// The queue of transfers.
    pub fn queue(&self) -> &Queue {
        &self.shared.queue
    }

    /// Whether the upstream has begun to send this blob.
    pub fn is_arriving(&self, digest: &Digest) -> bool {
        let running = self.shared.running();
        let download = running.downloads.get(digest);
        download.is_some_and(|download| download.is_open())
    }

    /// The size of a blob that is verified and being named.
    pub fn verified_size(&self, digest: &Digest) -> Option<u64> {
        let running = self.shared.running();
        let download = running.downloads.get(digest);
        download.and_then(|download| download.verified_size())
    }

    /// How many transfers run.
    pub fn count(&self) -> usize {
        self.shared.running().downloads.len()
    }
}

impl Shared {
    /// The map is whole between any two statements under its lock, so a poisoned lock is as good as another.
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The duty to bring the bytes. Dropped unused, it fails its followers, who then join again.
#[must_use = "followers wait for the leader to start"]
pub struct Leader {
    place: Place,
    waiter: Option<Waiter>,
}

impl Leader {
    /// The requests that wait for the transfer.
    pub fn waiters(&self) -> &Waiters {
        &self.place.download.waiters
    }

    /// Starts the transfer in a task of its own. It ends with the last request that waits as long as it is queued; once the
    /// upstream has begun to send what somebody wanted whole, no client's leaving ends it.
    pub fn start<S: Source>(self, source: S) -> Reader {
        let mut reader = Reader::new(&self.place.download, &self.place.shared, self.waiter);
        reader.leads = true;
        tokio::spawn(transfer::run(self.place, source));
        reader
    }
}
