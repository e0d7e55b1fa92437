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

mod helper;
mod plan;
mod ramp;
mod reader_segments;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use self::helper::{Helper, HelperPermit};
use self::plan::Plan;
pub(super) use self::plan::Segment;
use self::ramp::{Measured, Ramp, rate};
pub(super) use self::reader_segments::{ReaderRange, ReaderSegments, SegmentBytes};
use super::{RangeSource, Source};
use crate::queue::{Class, Permit, Queue};
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

/// No connection is added while the transfers of an upstream have this many times the connections of one. Ten layers at once
/// are limited by the machine, and each first stream that is closed has megabytes under way.
const TRANSFERS_AT_ONCE_MAX: usize = 3;

/// The fetcher waits this long at a time for a segment at the front.
const FRONT_WINDOW: Duration = Duration::from_secs(2);

/// If a segment at the front grows slower than this part of the first stream's rate, the fetcher takes it over.
const FRONT_RATE_MIN: f64 = 0.25;

/// A slower segment is passed at any rate of the first stream, which is unknown if clients opened connections at once.
const FRONT_BYTES_PER_SECOND_MIN: f64 = 1024.0;

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
    pub(super) fn ramp_up<S: Source>(&mut self, stalled: Duration, source: &mut S) {
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
                if self.add(source) {
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
    pub(super) fn replace_first_stream<S: Source>(&mut self, source: &mut S) {
        let may_add = {
            let plan = self.plan.lock();
            plan.helpers < plan.helpers_max && !plan.has_failed && !plan.follows_clients()
        };
        if may_add {
            let _ = self.add(source);
        }
    }

    /// Whether the upstream gave no response with a segment.
    pub(super) fn were_denied(&self) -> bool {
        self.plan.lock().was_denied
    }

    /// Returns whether a connection was added. Without a spare permit, it is tried again.
    fn add<S: Source>(&mut self, source: &mut S) -> bool {
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
        let Some(permit) = self.transfer.spare_permit() else {
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

    /// A permit that no other download waits for.
    fn spare_permit(&self) -> Option<Permit> {
        self.queue.try_acquire(&self.upstream, Class::Bulk)
    }
}

#[cfg(test)]
mod tests;
