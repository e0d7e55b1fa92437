//! Further connection of a transfer: fetches segments and writes each at its offset.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep};

use super::Transfer;
use super::plan::{Plan, Segment};
use crate::blocking::run;
use crate::download::fetch::QUEUE_BYTES_MAX;
use crate::download::{ByteStream, RangeSource};
use crate::queue::Permit;

/// A helper that receives nothing for this long has failed.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes that a helper collects before it writes them.
const WRITE_BYTES: u64 = 256 * 1024;

/// A helper writes what it has after this time, so that the front of the file can follow a slow stream.
const BATCH_TIME_MAX: Duration = Duration::from_millis(500);

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
pub(super) struct Helper {
    pub(super) transfer: Arc<Transfer>,
    pub(super) plan: Arc<Mutex<Plan>>,
    pub(super) source: Box<dyn RangeSource>,
    pub(super) is_silent: bool,
    pub(super) permit: HelperPermit,
}

/// Permits of a connection.
pub(super) struct HelperPermit {
    /// Given up if another download waits for it.
    pub(super) queue: Option<Permit>,
    /// Of a connection that was opened for a reader.
    pub(super) ahead: Option<OwnedSemaphorePermit>,
}

impl HelperPermit {
    fn is_awaited(&self) -> bool {
        self.queue.as_ref().is_some_and(Permit::is_awaited)
    }
}

impl Helper {
    pub(super) async fn run(mut self) {
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
    pub(super) async fn run_once(mut self, segment: Arc<Segment>) {
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
                // Later, the credential of the first request may have expired.
                self.plan.lock().was_denied |= self.permit.ahead.is_none() && self.is_silent;
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

impl Transfer {
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
