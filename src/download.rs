//! Shared blob downloads: one upstream transfer per digest, many readers.
//!
//! When a hundred jobs request the same 300 MiB layer at once, one transfer serves them all from its first byte
//! on. No client can slow, break or end it for the others.
//!
//! The first caller of [`Downloads::join`] becomes the [`Leader`] and provides the [`Source`] of the bytes. The
//! transfer then runs in a task of its own, independent of every client. It writes the bytes to an ingest file
//! and publishes how far readers may go. A [`Reader`] reads the growing file at any offset, waits at its end,
//! and costs one buffer. The last [`WITHHELD_BYTES`] are published only after the digest is verified, so no
//! reader gets a complete corrupt blob. A failure is an error for every reader, never a clean end. The blob is
//! fsynced and named after its readers have their bytes, not before.
//!
//! A transfer waits for a permit of a [`Queue`], in the turn of each request that waits for it. Waiting in the
//! queue is not a failure. A transfer without waiting requests ends while it is queued and until the upstream's
//! 2xx. After that it ends only if no request needed more than a small range, or if its throughput is so low
//! that it would hold its permit for long.
//!
//! An interrupted, slow or failing transfer is resumed from its last byte, at the next URL if the upstream has
//! several, while its readers wait. If it ends anyway, or the process does, a partial download remains for the
//! next request of that blob. Its bytes are read again and compared with the checksums made on arrival, then
//! given to readers at once. If the digest of a resumed download is wrong, the download restarts once from the
//! first byte. Readers that got some of the wrong bytes fail, the others do not notice.
//!
//! If the disk fails midway, the transfer ends but its readers continue: each reads the file so far and fetches
//! the remainder from the upstream, verified and not stored. A reader whose response began while the transfer
//! was queued does the same if the transfer fails before its first byte.
//!
//! Authorization is not decided here. The proxy lets no client follow a download that another client's
//! credential opened; a download only records its [`Requester`].
//!
//! * `join`: lead, follow or find the blob cached.
//! * `state`: a download as its readers and operators see it.
//! * `observer`: reads what has arrived, without a request.
//! * `reader`: reads the growing file, and fetches ranges far ahead of it.
//! * `transfer`: from the first response to the stored blob.
//! * `fetch`: reads the upstream, with resumption.
//! * `writer`: writes the file.
//! * `disk_failure`: readers after a disk failure.
//! * `verify`: verified streams that are not stored.

mod disk_failure;
mod fetch;
mod join;
mod observer;
mod parallel;
mod reader;
mod state;
mod transfer;
mod verify;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use crate::blocking::Operation;
use crate::oci::{Digest, Repository, UpstreamFailure};
use crate::queue::{AcquireError, Demand, Permit, Queue, QueueFull, Waiter, Waiters};
use crate::store::blobs::{BlobHandle, Mismatch};
use crate::store::file_read::BufferPool;
use crate::store::{Store, StoreError};
use crate::upstream::{ResponseStream, UpstreamResponse};

pub use self::disk_failure::DiskFailed;
use self::join::PendingLookups;
pub use self::observer::Observer;
pub use self::parallel::ParallelLimits;
pub use self::reader::{AHEAD_BYTES_MAX, FAR_AHEAD_BYTES, Piece, Reader};
use self::state::{Download, DownloadGuard};
pub use self::state::{DownloadInfo, DownloadStatus};
pub use self::verify::VerifyingStream;

/// Bytes at the end of a blob that are withheld from readers until the digest is verified.
pub const WITHHELD_BYTES: u64 = 64 * 1024;

/// Ranges far ahead that are fetched at once. Further ones wait for the transfer.
const AHEAD_RANGES_MAX: usize = 16;

/// Bytes between network and disk, of all transfers together.
const QUEUED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Upstreams remembered for [`Shared::uses_one_connection`].
const SINGLE_CONNECTION_MAX: usize = 1024;

/// The running downloads. Owned by the server, not a global.
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
    lookups: Arc<Semaphore>,
    starts: Arc<Semaphore>,
    resumptions: Arc<Semaphore>,
    commits: Arc<Semaphore>,
    write_steps: Arc<Semaphore>,
    queued_bytes: Arc<Semaphore>,
    ahead_permits: Arc<Semaphore>,
    parallel: ParallelLimits,
    /// Upstreams from which a blob is fetched over one connection, until this time.
    single_connection: Mutex<HashMap<Arc<str>, Instant>>,
    counts: Arc<state::Counts>,
}

#[derive(Default)]
struct Running {
    downloads: HashMap<Digest, Arc<Download>>,
    /// Blobs that prospective leaders look up on the disk at the moment.
    lookups: HashMap<Digest, PendingLookups>,
}

/// Options of a request for a blob.
#[derive(Clone, Copy, Debug)]
pub struct JoinOptions {
    /// Client, flow and class for admission.
    pub demand: Demand,
    /// Whether the request needs the complete blob, or so much that the rest is worth fetching.
    pub wants_complete: bool,
}

/// Result of joining.
pub enum Joined {
    /// The blob is cached by now.
    Cached(BlobHandle),
    /// No download is running: this caller leads.
    Leader(Leader),
    /// It is being fetched.
    Follower {
        /// Reads the growing file.
        reader: Reader,
        /// When this same requester started the download. `None` if another did, or if the upstream did not open it.
        began_by_same: Option<Instant>,
    },
}

/// Identity on whose authorization a blob is fetched: a principal in a repository of an upstream. Equal
/// requesters may read each other's downloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requester {
    /// Name of the upstream.
    pub upstream: Arc<str>,
    /// Repository of the request.
    pub repository: Repository,
    /// Keyed hash of the credential.
    pub principal: [u8; 32],
}

/// Opens the upstream stream of a blob. Opened again at the current offset after each interruption.
pub trait Source: Send + 'static {
    /// Opens the blob at byte `from`. The bytes from `until` on are not needed. A stream that starts earlier or ends later
    /// is accepted and its surplus skipped. After an interruption it should use another URL, if there is one.
    fn open(
        &mut self,
        from: u64,
        until: Option<u64>,
    ) -> impl Future<Output = Result<Stream, UpstreamResponse>> + Send;

    /// The last stream ended where another connection continues, and was not interrupted: the next one may use its URL.
    fn ended_at_segment(&mut self) {}

    /// Size stated by a manifest. A hint, not a promise of the upstream.
    fn stated_size(&self) -> Option<u64> {
        None
    }

    /// A source of ranges of this blob of `_total` bytes for one further connection. `None`: not supported.
    fn segments(&self, _total: u64) -> Option<Box<dyn RangeSource>> {
        None
    }

    /// Called when `_size` bytes are verified and the last of them are still withheld. Records made here are
    /// visible to every reader of the complete blob.
    fn verified(&mut self, _size: u64) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// Called if the bytes do not match the digest. Returns whether other bytes may come if the blob is opened again.
    fn rejected(&mut self) -> bool {
        false
    }

    /// Whether the stream that was opened last is the upstream's response to the leader, and so authorizes the leader.
    fn is_led_by_upstream(&self) -> bool {
        true
    }

    /// Called at the end of the transfer, with the failure if there was one.
    fn ended(&self, _failure: Option<&DownloadError>) {}
}

/// Opens a range far ahead of the transfer, or the remainder of a failed download, with the reader's own
/// credential.
pub trait RangeSource: Send + 'static {
    /// Requests the bytes from `from` up to, not including, `until`, or to the end. `None` if the upstream does
    /// not serve the range. A request for the complete blob waits for a permit of the queue.
    fn open(&mut self, from: u64, until: Option<u64>) -> RangeFuture<'_>;

    /// A source of the same blob for one further connection. `None`: not supported.
    fn another(&self) -> Option<Box<dyn RangeSource>> {
        None
    }
}

/// A pending range request.
pub type RangeFuture<'a> = Pin<Box<dyn Future<Output = Option<Box<dyn ByteStream>>> + Send + 'a>>;

/// An open upstream stream.
pub struct Stream {
    /// Offset of the first byte of [`Self::body`].
    pub start: u64,
    /// Size of the complete blob, if the upstream states it.
    pub total: Option<u64>,
    /// The bytes.
    pub body: Box<dyn ByteStream>,
}

/// A pending read of the next bytes.
pub type ChunkFuture<'a> = Pin<Box<dyn Future<Output = Option<Result<Bytes, UpstreamFailure>>> + Send + 'a>>;

/// A stream of bytes.
pub trait ByteStream: Send {
    /// The next bytes, or `None` at the end. A truncated body is an error.
    fn chunk(&mut self) -> ChunkFuture<'_>;
}

impl ByteStream for ResponseStream {
    fn chunk(&mut self) -> ChunkFuture<'_> {
        Box::pin(ResponseStream::chunk(self))
    }
}

/// Error of a download.
#[derive(Debug)]
pub enum DownloadError {
    /// The upstream denied the leader's request, or was unavailable, before the first byte. It concerns the
    /// leader's credential only: followers join again with their own.
    NotStarted(Box<UpstreamResponse>),
    /// The upstream interrupted the transfer, and resuming failed.
    Interrupted(UpstreamFailure),
    /// The bytes do not match the digest.
    DigestMismatch(Mismatch),
    /// The disk failed before the first byte. The blob can still be streamed unstored.
    Unstorable(StoreError),
    /// The ingest file could not be read.
    Store(StoreError),
    /// The disk failed midway. Readers continue from the upstream.
    DiskFailed(Box<DiskFailed>),
    /// The leader was dropped before the start, or no request waits any more.
    Abandoned,
    /// Too many downloads are queued.
    QueueFull(QueueFull),
}

impl fmt::Display for DownloadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotStarted(answer) => write!(f, "the upstream did not start the transfer: {}", answer.kind),
            Self::Interrupted(cause) => write!(f, "the upstream {cause}"),
            Self::DigestMismatch(mismatch) => {
                write!(f, "the upstream sent bytes with a wrong digest: {mismatch}")
            }
            Self::Unstorable(fault) | Self::Store(fault) => write!(f, "{fault}"),
            Self::DiskFailed(disk_failed) => write!(f, "{disk_failed}"),
            Self::Abandoned => f.write_str("abandoned, because no request waits for it"),
            Self::QueueFull(_) => f.write_str("too many downloads are queued"),
        }
    }
}

impl std::error::Error for DownloadError {}

impl DownloadError {
    /// Whether the disk failed, not the upstream.
    pub fn is_disk_error(&self) -> bool {
        matches!(self, Self::Unstorable(_) | Self::Store(_) | Self::DiskFailed(_))
    }
}

impl Downloads {
    /// No downloads yet. Blobs are stored in `store`. At most `transfers_max` run at once, further ones are
    /// queued.
    pub fn new(store: Arc<Store>, buffers: BufferPool, transfers_max: usize) -> Self {
        Self::with_parallel(store, buffers, transfers_max, ParallelLimits::default())
    }

    /// As [`Self::new`], with several connections for one transfer.
    pub fn with_parallel(
        store: Arc<Store>,
        buffers: BufferPool,
        transfers_max: usize,
        parallel: ParallelLimits,
    ) -> Self {
        let shared = Shared {
            store,
            buffers,
            running: Mutex::default(),
            left: Notify::new(),
            queue: Queue::shared("downloads", transfers_max),
            lookups: Operation::BlobLookup.permits(),
            starts: Operation::DownloadStart.permits(),
            resumptions: Operation::DownloadResumption.permits(),
            commits: Operation::DownloadCommit.permits(),
            write_steps: Operation::DownloadWrite.permits(),
            queued_bytes: Arc::new(Semaphore::new(QUEUED_BYTES_MAX)),
            ahead_permits: Arc::new(Semaphore::new(AHEAD_RANGES_MAX)),
            parallel,
            single_connection: Mutex::default(),
            counts: Arc::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Waits until no transfer runs.
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

    /// Waits until no transfer of this blob runs. Its complete content is stored then, unless the disk failed.
    pub async fn ended(&self, digest: &Digest) {
        loop {
            let mut left = std::pin::pin!(self.shared.left.notified());
            left.as_mut().enable();
            if !self.shared.running.lock().downloads.contains_key(digest) {
                return;
            }
            left.await;
        }
    }

    /// Sets the limit of concurrent transfers from this upstream.
    pub fn resize_upstream(&self, upstream: &str, transfers_max: usize) {
        self.shared.queue.resize_group(&upstream.into(), transfers_max);
    }

    /// A permit for a stream that one client reads and that is not stored.
    pub async fn admit(&self, upstream: &str, demand: Demand) -> Result<Permit, AcquireError> {
        let (alone, _waiter) = Waiters::with(demand);
        self.shared.queue.acquire(&upstream.into(), &alone).await
    }

    /// The queue of transfers.
    pub fn queue(&self) -> &Queue {
        &self.shared.queue
    }

    /// Whether the upstream has begun to send this blob.
    pub fn is_arriving(&self, digest: &Digest) -> bool {
        let running = self.shared.running.lock();
        let download = running.downloads.get(digest);
        download.is_some_and(|download| download.is_open())
    }

    /// Size of a blob that is verified and not yet named in the store.
    pub fn verified_size(&self, digest: &Digest) -> Option<u64> {
        let running = self.shared.running.lock();
        let download = running.downloads.get(digest);
        download.and_then(|download| download.verified_size())
    }

    /// Number of running transfers.
    pub fn count(&self) -> usize {
        self.shared.running.lock().downloads.len()
    }
}

impl Shared {
    /// Whether blobs of this upstream are fetched over one connection.
    fn uses_one_connection(&self, upstream: &str) -> bool {
        let until = self.single_connection.lock().get(upstream).copied();
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Fetches blobs of this upstream over one connection for this long.
    fn use_one_connection(&self, upstream: &Arc<str>, period: Duration) {
        let (mut upstreams, now) = (self.single_connection.lock(), Instant::now());
        upstreams.retain(|_, until| now < *until);
        if upstreams.len() < SINGLE_CONNECTION_MAX {
            upstreams.insert(Arc::clone(upstream), now + period);
        }
    }
}

/// Must call [`Leader::start`]. If dropped unused, its followers get [`DownloadError::Abandoned`] and join
/// again.
#[must_use = "followers wait for the leader to start"]
pub struct Leader {
    guard: DownloadGuard,
    waiter: Option<Waiter>,
}

impl Leader {
    /// The requests that wait for the transfer.
    pub fn waiters(&self) -> &Waiters {
        &self.guard.download.waiters
    }

    /// Starts the transfer in a task of its own. While queued it ends with its last waiting request. Once the
    /// upstream sends a blob that some request needs completely, no disconnect ends it.
    pub fn start<S: Source>(self, source: S) -> Reader {
        let mut reader = Reader::new(&self.guard.download, &self.guard.shared, self.waiter);
        reader.leads = true;
        tokio::spawn(transfer::run(self.guard, source));
        reader
    }
}
