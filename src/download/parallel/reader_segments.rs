//! Segments that begin where clients read.
//!
//! A client that fetches a blob by several ranges at once reads far ahead of the front. A connection of the transfer is
//! opened at such an offset, and the client reads the segment as it is written, so the upstream sends each byte once.
//! These bytes are not verified yet, as a range cannot be verified by itself.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use super::Transfer;
use super::helper::{Helper, HelperPermit};
use super::plan::{Plan, Segment, SegmentProgress};
use crate::download::RangeSource;

/// Access of readers to the segments of a transfer.
pub(in crate::download) struct ReaderSegments {
    pub(super) transfer: Arc<Transfer>,
    pub(super) plan: Arc<Mutex<Plan>>,
    /// Makes the sources of further connections.
    pub(super) source: Mutex<Box<dyn RangeSource>>,
    pub(super) running: Mutex<JoinSet<()>>,
}

/// Bytes that a reader waits for.
#[derive(Clone, Copy)]
pub(in crate::download) struct ReaderRange {
    /// Offset of the next byte.
    pub(in crate::download) position: u64,
    /// Where the range ends; `None` if the client most likely stops earlier.
    pub(in crate::download) until: Option<u64>,
    /// Whether the connection needs a permit that no other download waits for.
    pub(in crate::download) needs_permit: bool,
}

impl ReaderSegments {
    /// The segment that has the next byte of the reader, or has it soon. If none does, one that begins there is opened,
    /// unless the front is near or a permit lacks.
    pub(in crate::download) fn segment(
        &self,
        range: ReaderRange,
        ahead_permits: &Arc<Semaphore>,
    ) -> Option<Arc<Segment>> {
        {
            let plan = self.plan.lock();
            if let Some(segment) = plan.segment_at(range.position) {
                return Some(segment);
            }
            if !plan.is_worth_a_segment(range.position) {
                return None;
            }
        }
        let ahead = Arc::clone(ahead_permits).try_acquire_owned().ok()?;
        let permit = if range.needs_permit {
            Some(self.transfer.spare_permit()?)
        } else {
            None
        };
        self.open(range, HelperPermit::of_reader(permit, ahead))
    }

    fn open(&self, range: ReaderRange, permit: HelperPermit) -> Option<Arc<Segment>> {
        let source = self.source.lock().another()?;
        // Under the lock, so that the end of the transfer waits for this helper.
        let mut plan = self.plan.lock();
        let segment = plan.assign_to_client(range.position, range.until)?;
        let helper = Helper {
            transfer: Arc::clone(&self.transfer),
            plan: Arc::clone(&self.plan),
            source,
            is_silent: false,
            permit,
        };
        let mut running = self.running.lock();
        while running.try_join_next().is_some() {}
        running.spawn(helper.run_once(Arc::clone(&segment)));
        drop((running, plan));
        Some(segment)
    }

    /// Waits until no helper writes any more. The plan is ending already.
    pub(super) async fn end(&self) {
        let mut running = std::mem::take(&mut *self.running.lock());
        while running.join_next().await.is_some() {}
    }
}

impl HelperPermit {
    fn of_reader(queue: Option<crate::queue::Permit>, ahead: OwnedSemaphorePermit) -> Self {
        Self {
            queue,
            ahead: Some(ahead),
        }
    }
}

/// Bytes of a segment for a reader.
pub(in crate::download) enum SegmentBytes {
    /// The file has the bytes from the position up to this one.
    Readable(u64),
    /// They arrive: wait for a change.
    Arriving(watch::Receiver<SegmentProgress>),
    /// It does not bring them.
    Elsewhere,
}

impl Segment {
    /// The bytes from `position` on.
    pub(in crate::download) fn bytes(&self, position: u64) -> SegmentBytes {
        let mut progress = self.progress.subscribe();
        let seen = *progress.borrow_and_update();
        let readable = (self.start + seen.written).min(self.end());
        if (self.start..readable).contains(&position) {
            SegmentBytes::Readable(readable)
        } else if seen.has_ended || !(self.start..self.end()).contains(&position) {
            SegmentBytes::Elsewhere
        } else {
            SegmentBytes::Arriving(progress)
        }
    }
}
