//! Further connections of a transfer.
//!
//! Storage of registries and CDNs limit the throughput of each connection. So while the first stream fills the file from
//! its start, helpers fetch later segments by `Range` requests and write each at its offset. When the front of the file
//! reaches a segment, the fetcher adopts it: the writer reads the segment back and hashes it, so the digest covers the
//! bytes on the disk. Readers see the contiguous front, and readers of ranges also segments.
//!
//! Segments are assigned in order, and a helper fetches one after the other. A connection is added only while the last
//! one raised the throughput, only while a client waits for the complete blob, and only if the queue has a permit that no
//! other download waits for. A helper ends as soon as another download waits that could use its permit; one at the limit
//! of another upstream could not. A stream to the end of the blob is closed only at a segment of which bytes have arrived, because
//! an upstream may reject every range. After a connection that gained nothing, none is added for some seconds, each time for
//! twice as long. A helper that fails is not replaced, and another stream continues at the first missing
//! byte, up to the next segment.
//!
//! Clients that read at several offsets open connections there (`reader_segments`). Those for short ranges have no permit of the
//! queue, and do not end for other downloads. Then no others are added for a while:
//! each would fetch the bytes that such a client requests next. None is added either while many transfers of the upstream run.
//!
//! An interrupted transfer keeps its front as a partial download. The segments beyond the front are fetched again.

mod plan;
mod reader_segments;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use self::plan::Plan;
pub(super) use self::plan::Segment;
pub(super) use self::reader_segments::{ReaderRange, ReaderSegments, SegmentBytes};
use super::fetch::QUEUE_BYTES_MAX;
use super::{ByteStream, RangeSource, Source};
use crate::blocking::run;
use crate::queue::{Class, Demand, Permit, Queue, Waiters};
use crate::store::fs::FsFile;

/// Limits of the connections of one transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParallelLimits {
    /// Connections of one transfer, the first stream included. 1 disables further ones.
    pub connections_max: usize,
    /// Smaller blobs are fetched by one connection.
    pub blob_bytes_min: u64,
}

impl Default for ParallelLimits {
    fn default() -> Self {
        Self {
            connections_max: 1,
            blob_bytes_min: u64::MAX,
        }
    }
}

/// Time over which the throughput is measured before a connection is added.
const MEASURE_WINDOW: Duration = Duration::from_millis(250);

/// The last connection must have brought this part of what it would bring if each were limited alone.
const GAIN_MIN: f64 = 0.4;

/// Windows in a row that show no gain: a single one may fall into a pause of the machine, and the segment of the last
/// connection lasts longer than one.
const NO_GAIN_WINDOWS: u32 = 2;

/// Pause after a connection that gained nothing, doubled each time. Where the limit is shared, a connection costs less than
/// 80 ms: a round trip and the bytes under way when a stream is closed.
const REST: Duration = Duration::from_secs(8);
const RESTS_DOUBLED_MAX: u32 = 8;

/// If the writer needs more than this part of a window, the disk limits the throughput, and the window shows nothing.
const DISK_SHARE_MAX: f64 = 0.5;

/// No connection is added while the transfers of an upstream have this many times the connections of one. Ten layers at once
/// are limited by the machine, and each first stream that is closed has megabytes under way.
const TRANSFERS_AT_ONCE_MAX: usize = 3;

/// A helper that receives nothing for this long has failed.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);

/// The fetcher waits this long at a time for a segment at the front.
const FRONT_WINDOW: Duration = Duration::from_secs(2);

/// If a segment at the front grows slower than this part of the first stream's rate, the fetcher takes it over.
const FRONT_RATE_MIN: f64 = 0.25;

/// A slower segment is passed at any rate of the first stream, which is unknown if clients opened connections at once.
const FRONT_BYTES_PER_SECOND_MIN: f64 = 1024.0;

/// Bytes that a helper collects before it writes them.
const WRITE_BYTES: u64 = 256 * 1024;

/// A helper writes what it has after this time, so that the front of the file can follow a slow stream.
const BATCH_TIME_MAX: Duration = Duration::from_millis(500);

/// How long blobs of an upstream are fetched over one connection after it gave no further one: it may limit them.
pub(super) const DENIED_RANGE_PERIOD: Duration = Duration::from_secs(10 * 60);

/// The same after ranges that were wrong while the complete blob was right.
pub(super) const WRONG_RANGE_PERIOD: Duration = Duration::from_secs(60 * 60);

/// What the connections of a transfer share.
pub(super) struct Transfer {
    pub(super) upstream: Arc<str>,
    pub(super) file: Arc<dyn FsFile>,
    /// Permits for further connections.
    pub(super) queue: Queue,
    /// Limits concurrent writes, see [`super::writer`].
    pub(super) write_steps: Arc<Semaphore>,
    /// Budget of bytes between network and disk, of all transfers.
    pub(super) queued_bytes: Arc<Semaphore>,
    pub(super) connections_max: usize,
}

/// The helpers of a transfer and their segments.
pub(super) struct Helpers {
    transfer: Arc<Transfer>,
    plan: Arc<Mutex<Plan>>,
    running: JoinSet<()>,
    of_readers: Option<Arc<ReaderSegments>>,
    ramp: Ramp,
    is_first_stream_open: bool,
    watch: Option<FrontWatch>,
}

/// Growth of the segment at the front since a point in time.
struct FrontWatch {
    start: u64,
    since: Instant,
    written: u64,
}

/// State of the front of the file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Front {
    /// A segment has this many bytes more: adopt them.
    Grew(u64),
    /// No segment has the next byte.
    Missing,
    /// A segment is to have the next byte. Ask again.
    Waiting,
}

impl Helpers {
    /// Helpers for a blob of `total` bytes, of which the first `front` are in the file. `source` makes the sources of the
    /// connections that readers open; without one they open none.
    pub(super) fn new(
        transfer: Transfer,
        front: u64,
        total: u64,
        source: Option<Box<dyn RangeSource>>,
    ) -> Self {
        let plan = Plan::new(front, total, transfer.connections_max as u64);
        let (transfer, plan) = (Arc::new(transfer), Arc::new(Mutex::new(plan)));
        let of_readers = source.map(|source| {
            Arc::new(ReaderSegments {
                transfer: Arc::clone(&transfer),
                plan: Arc::clone(&plan),
                source: Mutex::new(source),
                running: Mutex::default(),
            })
        });
        Self {
            transfer,
            plan,
            running: JoinSet::new(),
            of_readers,
            ramp: Ramp::default(),
            is_first_stream_open: true,
            watch: None,
        }
    }

    /// Access of readers to the segments.
    pub(super) fn of_readers(&self) -> Option<Arc<ReaderSegments>> {
        self.of_readers.clone()
    }

    /// The first stream received `length` bytes. Returns how many of them lie before the next segment.
    pub(super) fn advance(&self, length: u64) -> u64 {
        self.plan.lock().advance(length)
    }

    /// Adds a connection if the last one raised the throughput. `stalled`: how long the first stream has waited for the
    /// writer so far.
    pub(super) async fn ramp_up<S: Source>(&mut self, stalled: Duration, source: &mut S) {
        let (received, helpers, is_interrupted, has_failed) = {
            let plan = self.plan.lock();
            let is_interrupted = plan.silent > 0 || plan.follows_clients();
            (plan.received, plan.helpers, is_interrupted, plan.has_failed)
        };
        self.ramp.is_settled |= has_failed;
        if is_interrupted {
            return self.ramp.restart();
        }
        let connections = helpers + usize::from(self.is_first_stream_open);
        self.ramp.is_first_stream_open = self.is_first_stream_open;
        match self.ramp.measure(Instant::now(), received, stalled, connections) {
            Measured::NoGain => self.plan.lock().helpers_max = helpers.saturating_sub(1),
            Measured::Gain if connections < self.transfer.connections_max => {
                if self.add(source).await {
                    self.ramp.added(connections + 1);
                }
            }
            Measured::Gain | Measured::Nothing => {}
        }
    }

    /// Where a stream from the front may end.
    pub(super) fn stream_end(&self) -> Option<u64> {
        self.plan.lock().stream_end()
    }

    /// The first stream is closed, because it has reached a segment.
    pub(super) fn close_first_stream(&mut self) {
        self.is_first_stream_open = false;
        self.plan.lock().pass_silent_segments();
    }

    /// Lets a helper use the connection of the closed first stream.
    pub(super) async fn replace_first_stream<S: Source>(&mut self, source: &mut S) {
        let may_add = {
            let plan = self.plan.lock();
            plan.helpers < plan.helpers_max && !plan.has_failed && !plan.follows_clients()
        };
        if may_add {
            let _ = self.add(source).await;
        }
    }

    /// Whether the upstream gave no response with a segment.
    pub(super) fn were_denied(&self) -> bool {
        self.plan.lock().was_denied
    }

    /// Returns whether a connection was added. Without a spare permit, it is tried again.
    async fn add<S: Source>(&mut self, source: &mut S) -> bool {
        let (total, is_all_assigned) = {
            let plan = self.plan.lock();
            (plan.total, plan.next_hole().is_none())
        };
        if is_all_assigned || self.transfer.is_one_of_many() {
            return false;
        }
        let Some(source) = source.segments(total) else {
            self.ramp.is_settled = true;
            return false;
        };
        let Some(permit) = self.transfer.spare_permit().await else {
            return false;
        };
        {
            let mut plan = self.plan.lock();
            plan.helpers += 1;
            plan.helpers_max = plan.helpers_max.max(plan.helpers);
            plan.silent += 1;
        }
        let helper = Helper {
            transfer: Arc::clone(&self.transfer),
            plan: Arc::clone(&self.plan),
            source,
            is_silent: true,
            permit: HelperPermit {
                queue: Some(permit),
                ahead: None,
            },
        };
        tracing::debug!(
            upstream = &*self.transfer.upstream,
            total,
            "added a connection to a download"
        );
        self.running.spawn(helper.run());
        true
    }

    /// The next bytes at the front. A segment of which nothing arrives, or that grows much slower than the first stream
    /// did, is taken from its helper.
    pub(super) async fn front(&mut self) -> Front {
        let Some(segment) = self.plan.lock().segment_at_front() else {
            return self.missing();
        };
        let mut progress = segment.progress.subscribe();
        let seen = *progress.borrow_and_update();
        let grown = self.plan.lock().adopt(&segment, seen);
        if grown > 0 {
            self.cancel_if_slow(&segment, seen.written);
            return Front::Grew(grown);
        }
        if seen.has_ended {
            // It has left the plan. Another segment may begin there.
            return Front::Waiting;
        }
        self.cancel_if_slow(&segment, seen.written);
        if timeout(FRONT_WINDOW, progress.changed()).await.is_err() {
            self.cancel_if_slow(&segment, seen.written);
        }
        Front::Waiting
    }

    /// The fetcher opens a stream of its own again, which counts as a connection.
    fn missing(&mut self) -> Front {
        self.watch = None;
        self.is_first_stream_open = true;
        let mut plan = self.plan.lock();
        plan.helpers_max = plan
            .helpers_max
            .min(self.transfer.connections_max.saturating_sub(1));
        Front::Missing
    }

    fn cancel_if_slow(&mut self, segment: &Segment, written: u64) {
        let now = Instant::now();
        let watch = self.watch.take().filter(|watch| watch.start == segment.start);
        let watch = watch.unwrap_or(FrontWatch {
            start: segment.start,
            since: now,
            written,
        });
        let elapsed = now.saturating_duration_since(watch.since);
        if elapsed < FRONT_WINDOW {
            self.watch = Some(watch);
            return;
        }
        let rate = rate(written.saturating_sub(watch.written), elapsed);
        if rate < (self.ramp.first_rate * FRONT_RATE_MIN).max(FRONT_BYTES_PER_SECOND_MIN) {
            segment.cancelled.cancel();
        }
    }

    /// Ends the helpers, and waits until none of them writes any more.
    pub(super) async fn end(&mut self) {
        self.plan.lock().ending.cancel();
        while self.running.join_next().await.is_some() {}
        if let Some(of_readers) = &self.of_readers {
            of_readers.end().await;
        }
    }
}

impl Transfer {
    /// Whether so many transfers of the upstream run that further connections bring nothing.
    fn is_one_of_many(&self) -> bool {
        self.queue.in_use_of(&self.upstream) >= TRANSFERS_AT_ONCE_MAX * self.connections_max
    }

    /// A permit that no other download waits for: the queue serves those that wait first.
    async fn spare_permit(&self) -> Option<Permit> {
        let demand = Demand {
            class: Class::Bulk,
            ..Demand::BACKGROUND
        };
        let (waiters, _waiter) = Waiters::with(demand);
        tokio::select! {
            biased;
            permit = self.queue.acquire(&self.upstream, &waiters) => permit.ok(),
            () = std::future::ready(()) => None,
        }
    }

    /// The share of a chunk in the budget of bytes in memory. A helper waits for it with an empty batch only, because
    /// helpers that hold a part each could wait for each other. `None`: write the batch first.
    async fn share_of_budget(&self, chunk: &Bytes, batch: &Batch) -> Option<OwnedSemaphorePermit> {
        let count = u32::try_from(chunk.len().min(QUEUE_BYTES_MAX)).unwrap_or(u32::MAX);
        let budget = Arc::clone(&self.queued_bytes);
        if batch.bytes == 0 {
            // The semaphore is never closed.
            return budget.acquire_many_owned(count).await.ok();
        }
        budget.try_acquire_many_owned(count).ok()
    }

    /// Writes a batch. Returns whether that succeeded; the first stream meets the same disk and reports it.
    async fn write(&self, mut offset: u64, batch: Batch) -> bool {
        let file = Arc::clone(&self.file);
        let written = run(&self.write_steps, move || {
            batch.chunks.iter().try_for_each(|chunk| {
                file.write_at(chunk, offset)?;
                offset += chunk.len() as u64;
                Ok::<_, std::io::Error>(())
            })
        });
        matches!(written.await, Ok(Ok(())))
    }
}

/// When a connection is added.
#[derive(Default)]
struct Ramp {
    window: Option<Window>,
    /// Bytes per second in the last window that counted.
    rate: f64,
    /// Bytes per second of the first stream alone.
    first_rate: f64,
    is_first_stream_open: bool,
    /// Connections since one was added to compare, and whether that one gains is not known yet.
    compared: Option<usize>,
    /// Windows in a row with the same result, if that is not acted on at once.
    repeated: u32,
    /// After a connection that gained nothing, none is added until then.
    rests_until: Option<Instant>,
    /// Number of these rests.
    rests: u32,
    /// Bytes per second and connections when the first of these rests began.
    rejected: Option<(f64, usize)>,
    /// No further connection is possible.
    is_settled: bool,
}

#[derive(Clone, Copy)]
struct Window {
    since: Instant,
    received: u64,
    stalled: Duration,
}

#[derive(Debug, PartialEq, Eq)]
enum Measured {
    /// The window has not ended, or no further connection is added.
    Nothing,
    /// The last connection raised the throughput.
    Gain,
    /// It did not.
    NoGain,
}

impl Ramp {
    /// Begins a new window, because a connection has not sent anything yet, or clients open connections.
    fn restart(&mut self) {
        self.window = None;
    }

    /// A connection was added to those before.
    fn added(&mut self, connections: usize) {
        self.compared = Some(connections);
        self.repeated = 0;
    }

    fn measure(&mut self, now: Instant, received: u64, stalled: Duration, connections: usize) -> Measured {
        if self.is_settled {
            return Measured::Nothing;
        }
        let window = *self.window.get_or_insert(Window {
            since: now,
            received,
            stalled,
        });
        let elapsed = now.saturating_duration_since(window.since);
        if elapsed < MEASURE_WINDOW {
            return Measured::Nothing;
        }
        self.window = None;
        let stalled = stalled.saturating_sub(window.stalled);
        if stalled.as_secs_f64() > DISK_SHARE_MAX * elapsed.as_secs_f64() {
            return Measured::Nothing;
        }
        let rate = rate(received.saturating_sub(window.received), elapsed);
        if connections == 1 && self.is_first_stream_open {
            self.first_rate = rate;
        }
        if self.is_resting(now, rate, connections) {
            return Measured::Nothing;
        }
        // A connection that has ended since leaves nothing to compare with.
        let is_compared = self.compared == Some(connections);
        if !is_compared || rate >= self.rate * gain_min(connections) {
            (self.compared, self.repeated, self.rate) = (None, 0, rate);
            return Measured::Gain;
        }
        if !self.is_repeated() {
            return Measured::Nothing;
        }
        self.rest(now, rate, connections);
        Measured::NoGain
    }

    /// Whether no connection is added because the last one gained nothing. If the throughput was higher with it than it is
    /// without, the rate before was that of a burst, and the first rest ends.
    fn is_resting(&mut self, now: Instant, rate: f64, connections: usize) -> bool {
        if self.rests_until.is_none_or(|until| now >= until) {
            self.rests_until = None;
            return false;
        }
        let was_faster = |(before, with)| connections < with && rate * gain_min(with) <= before;
        if !self.rejected.is_some_and(was_faster) {
            self.repeated = 0;
            return true;
        }
        if !self.is_repeated() {
            return true;
        }
        (self.rests_until, self.rejected) = (None, None);
        false
    }

    fn rest(&mut self, now: Instant, rate: f64, connections: usize) {
        self.rejected = (self.rests == 0).then_some((rate, connections));
        self.rests_until = Some(now + REST * 2_u32.saturating_pow(self.rests.min(RESTS_DOUBLED_MAX)));
        self.rests += 1;
        self.compared = None;
    }

    /// Counts a window. Returns whether as many as needed had the same result.
    fn is_repeated(&mut self) -> bool {
        self.repeated += 1;
        let is_repeated = self.repeated >= NO_GAIN_WINDOWS;
        if is_repeated {
            self.repeated = 0;
        }
        is_repeated
    }
}

/// The least factor by which the last of `connections` must raise the throughput. Were each limited alone, it would add
/// 1/(n-1) to the rate before it.
fn gain_min(connections: usize) -> f64 {
    let others = u32::try_from(connections)
        .unwrap_or(u32::MAX)
        .saturating_sub(1)
        .max(1);
    1.0 + GAIN_MIN / f64::from(others)
}

fn rate(bytes: u64, within: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "compared with other rates only")]
    let bytes = bytes as f64;
    bytes / within.as_secs_f64().max(f64::EPSILON)
}

/// Result of fetching a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fetched {
    Complete,
    /// The first stream passed its start before a byte of it arrived, or the transfer ended.
    Passed,
    /// Another download waits for its permit.
    Yielded,
    Failed,
}

/// One further connection.
struct Helper {
    transfer: Arc<Transfer>,
    plan: Arc<Mutex<Plan>>,
    source: Box<dyn RangeSource>,
    is_silent: bool,
    permit: HelperPermit,
}

/// Permits of a connection.
struct HelperPermit {
    /// Given up if another download waits for it.
    queue: Option<Permit>,
    /// Of a connection that was opened for a reader.
    ahead: Option<OwnedSemaphorePermit>,
}

impl HelperPermit {
    fn is_awaited(&self) -> bool {
        self.queue.as_ref().is_some_and(Permit::is_awaited)
    }
}

impl Helper {
    async fn run(mut self) {
        loop {
            let Some(segment) = self.plan.lock().take() else {
                break;
            };
            let fetched = self.fetch(&segment).await;
            let may_go_on = {
                let mut plan = self.plan.lock();
                plan.ended(&segment);
                plan.has_failed |= fetched == Fetched::Failed;
                fetched != Fetched::Failed && plan.helpers <= plan.helpers_max && !plan.ending.is_cancelled()
            };
            if !may_go_on || self.permit.is_awaited() {
                break;
            }
        }
        let mut plan = self.plan.lock();
        plan.helpers -= 1;
        plan.silent -= usize::from(self.is_silent);
    }

    /// Fetches one segment.
    async fn run_once(mut self, segment: Arc<Segment>) {
        let fetched = self.fetch(&segment).await;
        let mut plan = self.plan.lock();
        plan.ended(&segment);
        // It says nothing about the other connections: the credential of the first request may have expired since.
        plan.has_failed_for_reader |= fetched == Fetched::Failed;
    }

    /// Fetches and writes a segment. It is cancelled between two writes only, so that no write is under way after its end.
    async fn fetch(&mut self, segment: &Segment) -> Fetched {
        let opening = self.source.open(segment.start, Some(segment.end()));
        let stream = match waited(&self.permit, segment, opening).await {
            Waited::Done(Some(stream)) => stream,
            Waited::Done(None) => {
                self.plan.lock().was_denied |= self.permit.ahead.is_none();
                return Fetched::Failed;
            }
            Waited::Cancelled => return Fetched::Passed,
            Waited::OthersWait => return Fetched::Yielded,
            Waited::TimedOut => return Fetched::Failed,
        };
        let mut arriving = Arriving {
            stream,
            unread: None,
            ended: None,
        };
        let mut position = segment.start;
        while position < segment.end() {
            let Some(batch) = self.next_batch(&mut arriving, segment, position).await else {
                return Fetched::Passed;
            };
            let length = batch.bytes;
            if length > 0 && !self.transfer.write(position, batch).await {
                return Fetched::Failed;
            }
            position += length;
            self.plan.lock().received += length;
            segment
                .progress
                .send_modify(|progress| progress.written += length);
            if let Some(ended) = arriving.ended.filter(|_| position < segment.end()) {
                return ended;
            }
            if self.permit.is_awaited() {
                return Fetched::Yielded;
            }
        }
        Fetched::Complete
    }

    /// Collects the next bytes of a segment. `None`: the first stream has passed its start.
    async fn next_batch(
        &mut self,
        arriving: &mut Arriving,
        segment: &Segment,
        position: u64,
    ) -> Option<Batch> {
        let (mut batch, began) = (Batch::default(), Instant::now());
        while batch.bytes < WRITE_BYTES && position + batch.bytes < segment.end() {
            let Some(mut chunk) = arriving.next(&self.permit, segment).await else {
                return Some(batch);
            };
            if !segment.is_live() && !self.go_live(segment) {
                return None;
            }
            let left = segment.end().saturating_sub(position + batch.bytes);
            chunk.truncate(usize::try_from(left).unwrap_or(chunk.len()));
            let Some(share) = self.transfer.share_of_budget(&chunk, &batch).await else {
                arriving.unread = Some(chunk);
                return Some(batch);
            };
            batch.push(chunk, share);
            if began.elapsed() >= BATCH_TIME_MAX {
                break;
            }
        }
        Some(batch)
    }

    fn go_live(&mut self, segment: &Segment) -> bool {
        let mut plan = self.plan.lock();
        plan.silent -= usize::from(std::mem::take(&mut self.is_silent));
        segment.go_live()
    }
}

/// The response with a segment.
struct Arriving {
    stream: Box<dyn ByteStream>,
    /// A chunk that did not fit into the last batch.
    unread: Option<Bytes>,
    /// Why no further chunk is read.
    ended: Option<Fetched>,
}

impl Arriving {
    async fn next(&mut self, permit: &HelperPermit, segment: &Segment) -> Option<Bytes> {
        if let Some(chunk) = self.unread.take() {
            return Some(chunk);
        }
        self.ended = Some(match waited(permit, segment, self.stream.chunk()).await {
            Waited::Done(Some(Ok(chunk))) => return Some(chunk),
            Waited::Cancelled if !segment.is_live() => Fetched::Passed,
            Waited::OthersWait => Fetched::Yielded,
            Waited::Done(_) | Waited::Cancelled | Waited::TimedOut => Fetched::Failed,
        });
        None
    }
}

/// Result of [`waited`].
enum Waited<T> {
    Done(T),
    Cancelled,
    OthersWait,
    TimedOut,
}

/// Waits for `work` of a helper at most [`HELPER_TIMEOUT`], until the segment is cancelled, and until another download
/// waits for its permit: a silent upstream must not keep one that others need.
async fn waited<T>(permit: &HelperPermit, segment: &Segment, work: impl Future<Output = T>) -> Waited<T> {
    let mut work = std::pin::pin!(work);
    let deadline = Instant::now() + HELPER_TIMEOUT;
    loop {
        tokio::select! {
            biased;
            () = segment.cancelled.cancelled() => return Waited::Cancelled,
            done = &mut work => return Waited::Done(done),
            () = sleep(BATCH_TIME_MAX) => {}
        }
        if permit.is_awaited() {
            return Waited::OthersWait;
        }
        if Instant::now() >= deadline {
            return Waited::TimedOut;
        }
    }
}

/// Bytes to be written at once, and their share of the budget.
#[derive(Default)]
struct Batch {
    chunks: Vec<Bytes>,
    bytes: u64,
    shares: Vec<OwnedSemaphorePermit>,
}

impl Batch {
    fn push(&mut self, chunk: Bytes, share: OwnedSemaphorePermit) {
        self.bytes += chunk.len() as u64;
        self.chunks.push(chunk);
        self.shares.push(share);
    }
}

#[cfg(test)]
mod tests;
