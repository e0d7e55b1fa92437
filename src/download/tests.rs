//! Step-by-step tests of downloads: scripted upstream, in-memory disk, paused time.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

mod ahead;
mod client_ranges;
mod disk_failure;
mod parallel;
mod partial;
mod queueing;
mod resume;
mod sharing;

use std::collections::VecDeque;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::join::JoinStep;
use super::state::{Attempt, Progress};
use super::*;
use crate::oci::{Algorithm, Hasher};
use crate::queue::{Class, Peer};
use crate::store::Settings;
use crate::store::blobs::Verified;
use crate::store::fs::{FileSystem, MemoryFs};
use crate::upstream::ResponseKind;

const MIB: usize = 1024 * 1024;

/// Next event of a scripted stream. Dropping the sender ends the stream cleanly.
type Wire = UnboundedSender<Result<Bytes, UpstreamFailure>>;

struct Arriving(UnboundedReceiver<Result<Bytes, UpstreamFailure>>);

impl ByteStream for Arriving {
    fn chunk(&mut self) -> Pin<Box<dyn Future<Output = Option<Result<Bytes, UpstreamFailure>>> + Send + '_>> {
        Box::pin(self.0.recv())
    }
}

/// Scripted source: each opening gets the next response of the script, and after the last one no response.
#[derive(Clone, Default)]
struct Script {
    answers: Arc<Mutex<VecDeque<Result<Stream, UpstreamResponse>>>>,
    offsets: Arc<Mutex<Vec<u64>>>,
    /// Whether the responses are not the upstream's.
    is_elsewhere: bool,
    /// Size in the manifest.
    stated: Option<u64>,
}

impl Source for Script {
    fn open(
        &mut self,
        from: u64,
        _until: Option<u64>,
    ) -> impl Future<Output = Result<Stream, UpstreamResponse>> + Send {
        self.offsets.lock().push(from);
        let answer = self.answers.lock().pop_front();
        async move {
            answer.unwrap_or(Err(UpstreamResponse::unavailable(
                UpstreamFailure::ConnectionRefused,
            )))
        }
    }

    fn is_led_by_upstream(&self) -> bool {
        !self.is_elsewhere
    }

    fn stated_size(&self) -> Option<u64> {
        self.stated
    }
}

impl Script {
    /// A stream that the test feeds step by step.
    fn stream(&self, start: usize, total: Option<usize>) -> Wire {
        let (wire, arriving) = unbounded_channel();
        self.answers.lock().push_back(Ok(Stream {
            start: start as u64,
            total: total.map(|total| total as u64),
            body: Box::new(Arriving(arriving)),
        }));
        wire
    }

    /// A stream that sends `bytes` and is then interrupted.
    fn breaking(&self, start: usize, total: usize, bytes: &[u8]) {
        let wire = self.stream(start, Some(total));
        send(&wire, bytes);
        wire.send(Err(UpstreamFailure::ConnectionReset)).unwrap();
    }

    /// A stream that sends `bytes` and ends cleanly.
    fn ending(&self, start: usize, total: Option<usize>, bytes: &[u8]) {
        send(&self.stream(start, total), bytes);
    }

    fn no_response(&self, cause: UpstreamFailure) {
        self.answer(UpstreamResponse::unavailable(cause));
    }

    fn answer(&self, answer: UpstreamResponse) {
        self.answers.lock().push_back(Err(answer));
    }

    fn offsets(&self) -> Vec<u64> {
        self.offsets.lock().clone()
    }

    /// Waits until the source was opened this many times.
    async fn was_opened(&self, times: usize) {
        while self.offsets().len() < times {
            tokio::task::yield_now().await;
        }
    }
}

fn send(wire: &Wire, bytes: &[u8]) {
    for chunk in bytes.chunks(10_000) {
        wire.send(Ok(Bytes::copy_from_slice(chunk))).unwrap();
    }
}

fn requester() -> Requester {
    Requester {
        upstream: "docker.io".into(),
        repository: "library/demo".parse().unwrap(),
        principal: [0; 32],
    }
}

/// Bytes without repetition over longer stretches.
fn content(length: usize) -> Vec<u8> {
    let numbers = (0_u32..16_384).flat_map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes());
    let block: Vec<u8> = numbers.collect();
    let mut bytes = Vec::with_capacity(length + block.len());
    for number in 0_u64.. {
        if bytes.len() >= length {
            break;
        }
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&block);
    }
    bytes.truncate(length);
    bytes
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, bytes)
}

fn downloads() -> Downloads {
    downloads_on(&Arc::new(MemoryFs::new()))
}

/// State after a process start.
fn downloads_on(disk: &Arc<MemoryFs>) -> Downloads {
    let disk = Arc::clone(disk) as Arc<dyn FileSystem>;
    let store = Store::open(&Settings::default(), disk, SystemTime::UNIX_EPOCH).unwrap();
    Downloads::new(Arc::new(store), BufferPool::default(), 16)
}

fn options() -> JoinOptions {
    let demand = Demand {
        peer: Peer::Local,
        flow: 0,
        class: Class::Bulk,
    };
    JoinOptions {
        demand,
        wants_complete: true,
    }
}

/// Joins without a thread for the store lookup.
fn join(downloads: &Downloads, digest: Digest) -> Joined {
    join_as(downloads, digest, options())
}

fn join_as(downloads: &Downloads, digest: Digest, options: JoinOptions) -> Joined {
    match downloads.lookup(digest, &requester(), options) {
        JoinStep::Joined(joined) => joined,
        JoinStep::Closing(_) => panic!("it is being abandoned"),
        JoinStep::Lookup(lookup) => match downloads.shared.store.blob(&digest).unwrap() {
            Some(held) => Joined::Cached(held),
            None => lookup.enter(&requester(), options).unwrap(),
        },
    }
}

fn leader(downloads: &Downloads, digest: Digest) -> Leader {
    match join(downloads, digest) {
        Joined::Leader(leader) => leader,
        Joined::Cached(_) => panic!("held already"),
        Joined::Follower { .. } => panic!("another reader leads already"),
    }
}

fn follower(downloads: &Downloads, digest: Digest) -> Reader {
    match join(downloads, digest) {
        Joined::Follower { reader, .. } => reader,
        Joined::Cached(_) => panic!("held already"),
        Joined::Leader(_) => panic!("nobody leads"),
    }
}

fn held(downloads: &Downloads, digest: Digest) -> Option<Vec<u8>> {
    let held = downloads.shared.store.blob(&digest).unwrap()?;
    let mut bytes = vec![0; usize::try_from(held.size).unwrap()];
    let read = held.file.read_at(&mut bytes, 0).unwrap();
    assert_eq!(read, bytes.len());
    Some(bytes)
}

/// Reads exactly `length` bytes, which must be available or arriving.
async fn take(reader: &mut Reader, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < length {
        bytes.extend_from_slice(&reader.next().await.unwrap().unwrap());
    }
    bytes
}

/// All bytes that a reader gets, and its end.
async fn read_to_end(mut reader: Reader) -> (Vec<u8>, Result<(), Arc<DownloadError>>) {
    let mut bytes = Vec::new();
    loop {
        match reader.next().await {
            Some(Ok(more)) => bytes.extend_from_slice(&more),
            Some(Err(failure)) => return (bytes, Err(failure)),
            None => return (bytes, Ok(())),
        }
    }
}

async fn read_all(reader: Reader) -> Vec<u8> {
    let (bytes, end) = read_to_end(reader).await;
    end.unwrap();
    bytes
}

/// Advances the paused time while `work` runs. It does not advance by itself, because a transfer's writer is a
/// waiting thread, which counts as work.
async fn stepped<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = tokio::time::advance(Duration::from_millis(50)) => {}
        }
    }
}

/// Waits until the download restarts from the first byte.
async fn begun_again(reader: &Reader) {
    let again = |progress: &Progress| match progress {
        Progress::Filling(opened, _) | Progress::Complete(opened, _) => opened.attempt == Attempt::Retry,
        _ => false,
    };
    while !again(&reader.progress.borrow()) {
        tokio::task::yield_now().await;
    }
}

async fn failure(reader: Reader) -> Arc<DownloadError> {
    read_to_end(reader).await.1.unwrap_err()
}
