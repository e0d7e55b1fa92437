//! Division of a blob among the connections of a transfer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Shorter segments cost more round trips than they save.
pub(super) const SEGMENT_BYTES_MIN: u64 = 4 * 1024 * 1024;

/// Longer segments leave more to fetch again after an interruption.
pub(super) const SEGMENT_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Clients that read at several offsets open a connection for each. For this long after one, no other connection is added.
const CLIENT_SEGMENT_PERIOD: Duration = Duration::from_secs(2);

/// A shorter segment costs a request for few bytes.
const CLIENT_SEGMENT_BYTES_MIN: u64 = 1024 * 1024;

/// Bytes that such a client most likely reads at once.
const CLIENT_RANGE_BYTES: u64 = 8 * 1024 * 1024;

/// Offsets of open-ended ranges that are remembered, to estimate how far apart a client's ranges lie.
const OPEN_STARTS_MAX: usize = 64;

/// A range of the blob that one helper fetches.
pub(in crate::download) struct Segment {
    pub(super) start: u64,
    /// Lowered under the lock of the plan, if the helper ends early or another one takes over the rest.
    end: AtomicU64,
    pub(super) progress: watch::Sender<SegmentProgress>,
    pub(super) cancelled: CancellationToken,
}

impl Segment {
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    pub(super) fn is_live(&self) -> bool {
        self.progress.borrow().is_live
    }

    /// Bytes arrive. Returns whether they are still wanted. Called under the lock of the plan.
    pub(super) fn go_live(&self) -> bool {
        let is_wanted = !self.cancelled.is_cancelled();
        if is_wanted {
            self.progress.send_modify(|progress| progress.is_live = true);
        }
        is_wanted
    }

    /// Offset of the first byte that is not in the file.
    pub(super) fn arrived(&self) -> u64 {
        self.start + self.progress.borrow().written
    }

    fn has(&self, offset: u64) -> bool {
        (self.start..self.end()).contains(&offset)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::download) struct SegmentProgress {
    /// Bytes of it have arrived. Changed under the lock of the plan.
    pub(super) is_live: bool,
    /// Bytes in the file, from the start of the segment.
    pub(super) written: u64,
    /// The helper writes no more of it.
    pub(super) has_ended: bool,
}

/// The segments of a transfer and the state that its connections share.
pub(super) struct Plan {
    pub(super) total: u64,
    /// The bytes before are in the file, or in the queue to the writer.
    pub(super) front: u64,
    connections_max: u64,
    /// Segments that the front has not passed, in the order of their start. They do not overlap.
    pub(super) segments: VecDeque<Arc<Segment>>,
    /// Bytes received by all connections.
    pub(super) received: u64,
    pub(super) helpers: usize,
    /// Helpers beyond this number end after their segment.
    pub(super) helpers_max: usize,
    /// Helpers that have not received a byte yet.
    pub(super) silent: usize,
    /// Whether a helper failed.
    pub(super) has_failed: bool,
    /// Whether a helper got no response with its segment.
    pub(super) was_denied: bool,
    /// Whether a connection that was opened for a reader failed. No further one is opened for readers.
    pub(super) has_failed_for_reader: bool,
    /// Cancels all segments.
    pub(super) ending: CancellationToken,
    /// When a segment began where a client reads.
    client_segment_at: Option<Instant>,
    /// Where open-ended ranges of clients began.
    open_starts: VecDeque<u64>,
    /// Least distance between them.
    open_bytes: Option<u64>,
}

impl Plan {
    pub(super) fn new(front: u64, total: u64, connections_max: u64) -> Self {
        Self {
            total,
            front,
            connections_max: connections_max.max(1),
            segments: VecDeque::new(),
            received: 0,
            helpers: 0,
            helpers_max: usize::try_from(connections_max).unwrap_or(usize::MAX),
            silent: 0,
            has_failed: false,
            was_denied: false,
            has_failed_for_reader: false,
            ending: CancellationToken::new(),
            client_segment_at: None,
            open_starts: VecDeque::from([front]),
            open_bytes: None,
        }
    }

    /// Moves the front over bytes of the first stream, up to the first segment of which bytes have arrived. Returns how
    /// many count. Segments without bytes are cancelled when the front passes their start.
    pub(super) fn advance(&mut self, length: u64) -> u64 {
        let until = self.front.saturating_add(length);
        while let Some(first) = self.segments.front() {
            if first.is_live() || first.start >= until {
                break;
            }
            first.cancelled.cancel();
            self.segments.pop_front();
        }
        let left = self
            .segments
            .front()
            .map_or(u64::MAX, |segment| segment.start.saturating_sub(self.front));
        let accepted = length.min(left);
        self.front += accepted;
        self.received += accepted;
        accepted
    }

    /// Where a stream from the front may end: at the next segment, or, while clients open connections, after as many bytes as
    /// such a client reads at once. The next one most likely begins there. `None`: at the end of the blob.
    pub(super) fn stream_end(&self) -> Option<u64> {
        let mut starts = self.segments.iter().map(|segment| segment.start);
        let next = starts.find(|start| *start > self.front);
        let is_client_next = self.follows_clients();
        let bytes = self
            .open_bytes
            .unwrap_or(CLIENT_RANGE_BYTES)
            .max(SEGMENT_BYTES_MIN);
        let part = is_client_next.then_some(self.front + bytes);
        next.into_iter().chain(part).min().filter(|end| *end < self.total)
    }

    /// Cancels segments that the front has reached and of which no byte has arrived.
    pub(super) fn pass_silent_segments(&mut self) {
        while let Some(first) = self.segments.front() {
            if first.is_live() || first.start > self.front {
                break;
            }
            first.cancelled.cancel();
            self.segments.pop_front();
        }
    }

    /// Assigns the next segment.
    pub(super) fn take(&mut self) -> Option<Arc<Segment>> {
        let (start, end) = self.next_hole()?;
        Some(self.assign(start, end))
    }

    /// Start and end of the segment that is assigned next: of the first hole beyond the front. The first one leaves as much
    /// to the first stream. Segments get shorter towards the end, so that all connections end at about the same time.
    pub(super) fn next_hole(&self) -> Option<(u64, u64)> {
        let mut segments = self.segments.iter();
        let mut start = match segments.next() {
            Some(first) => first.end(),
            None => self.front + self.length(self.front),
        };
        for next in segments {
            if next.start > start {
                return Some((start, self.end_within(start, next.start)));
            }
            start = next.end();
        }
        let fits = start + SEGMENT_BYTES_MIN <= self.total;
        fits.then(|| (start, self.end_within(start, self.total)))
    }

    fn length(&self, start: u64) -> u64 {
        let share = self.total.saturating_sub(start) / (2 * self.connections_max);
        share.clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
    }

    /// The end of a segment in a hole. No short rest is left.
    fn end_within(&self, start: u64, hole_end: u64) -> u64 {
        let end = start + self.length(start);
        if end + SEGMENT_BYTES_MIN > hole_end {
            hole_end
        } else {
            end
        }
    }

    fn assign(&mut self, start: u64, end: u64) -> Arc<Segment> {
        let segment = Arc::new(Segment {
            start,
            end: AtomicU64::new(end),
            progress: watch::Sender::default(),
            cancelled: self.ending.child_token(),
        });
        let at = self.segments.partition_point(|other| other.start < start);
        self.segments.insert(at, Arc::clone(&segment));
        segment
    }

    /// The segment that has the byte at `offset`, or has it soon.
    pub(super) fn segment_at(&self, offset: u64) -> Option<Arc<Segment>> {
        let mut segments = self.segments.iter();
        let found = segments.find(|segment| segment.has(offset))?;
        (offset < found.arrived() + SEGMENT_BYTES_MIN).then(|| Arc::clone(found))
    }

    /// Whether a segment that begins at `start` brings its bytes much earlier than the others do.
    pub(super) fn is_worth_a_segment(&self, start: u64) -> bool {
        let has_failed = self.has_failed || self.has_failed_for_reader;
        let is_open = !has_failed && !self.ending.is_cancelled() && start < self.total;
        is_open && start >= self.front + SEGMENT_BYTES_MIN && self.segment_at(start).is_none()
    }

    /// Assigns a segment that begins where a client reads. A segment in which `start` lies ends there. `until`: where the
    /// client's range ends, or `None` if it most likely reads less.
    pub(super) fn assign_to_client(&mut self, start: u64, until: Option<u64>) -> Option<Arc<Segment>> {
        if !self.is_worth_a_segment(start) {
            return None;
        }
        let until = until.unwrap_or_else(|| self.open_end(start));
        let other = self.segments.iter().find(|other| other.has(start));
        let next = self.segments.iter().find(|other| other.start > start);
        let hole_end = match (other, next) {
            (Some(other), _) => other.end(),
            (None, Some(next)) => next.start,
            (None, None) => self.total,
        };
        let end = until.min(hole_end).min(start + SEGMENT_BYTES_MAX);
        if end < start + CLIENT_SEGMENT_BYTES_MIN && end < self.total {
            return None;
        }
        if let Some(other) = other {
            other.end.store(start, Ordering::Release);
        }
        self.client_segment_at = Some(Instant::now());
        Some(self.assign(start, end))
    }

    /// Whether clients have offsets of their own at which connections are opened.
    pub(super) fn follows_clients(&self) -> bool {
        self.client_segment_at
            .is_some_and(|at| at.elapsed() < CLIENT_SEGMENT_PERIOD)
    }

    /// Where a client that sent an open-ended range most likely stops: it closes the connection where its next range begins.
    fn open_end(&mut self, start: u64) -> u64 {
        let distances = self.open_starts.iter().map(|other| other.abs_diff(start));
        let nearest = distances.filter(|distance| *distance > 0).min();
        self.open_bytes = self.open_bytes.into_iter().chain(nearest).min();
        if self.open_starts.len() >= OPEN_STARTS_MAX {
            self.open_starts.pop_front();
        }
        self.open_starts.push_back(start);
        let bytes = self.open_bytes.unwrap_or_else(|| self.length(start));
        start + bytes.clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX)
    }

    /// The helper writes no more of the segment. The rest of it is a hole again.
    pub(super) fn ended(&mut self, segment: &Arc<Segment>) {
        let arrived = segment.arrived();
        segment.end.fetch_min(arrived, Ordering::AcqRel);
        if arrived == segment.start {
            self.segments.retain(|other| !Arc::ptr_eq(other, segment));
        }
        segment.progress.send_modify(|progress| progress.has_ended = true);
    }

    pub(super) fn segment_at_front(&self) -> Option<Arc<Segment>> {
        let first = self.segments.front();
        first
            .filter(|segment| segment.start <= self.front)
            .map(Arc::clone)
    }

    /// Moves the front over the written bytes of the segment at the front. Returns by how much. A segment that is
    /// complete or has ended leaves the plan.
    pub(super) fn adopt(&mut self, segment: &Arc<Segment>, seen: SegmentProgress) -> u64 {
        let front = self.front;
        self.front = front.max(segment.start + seen.written);
        let is_first = |first: &Arc<Segment>| Arc::ptr_eq(first, segment);
        if self.front >= segment.end() && self.segments.front().is_some_and(is_first) {
            self.segments.pop_front();
        }
        self.front - front
    }
}
