//! Upstream side of a transfer: reads the stream and resumes it after interruptions.
//!
//! A resumption requests the missing range (`Range`) from the registry itself, never from the storage that it
//! redirected to, because signed URLs expire. If an upstream ignores the range and answers 200, the stream is
//! read from its start and the bytes already received are skipped. Skipped bytes are not compared: only the
//! written bytes count, and the digest is that of the file. For the same reason a changed `ETag` does not
//! matter. A changed size does: such a response is not used.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use super::parallel::{Front, Helpers};
use super::{Source, Stream};
use crate::oci::UpstreamFailure;
use crate::queue::Waiters;
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Chunks of one transfer between network and disk. A full queue slows the upstream instead of growing memory.
pub(super) const QUEUE_CHUNKS_MAX: usize = 16;

/// Bytes of one transfer between network and disk.
pub(super) const QUEUE_BYTES_MAX: usize = 1024 * 1024;

/// Bytes that the writer reads back in one step.
const ADOPT_BYTES_MAX: u64 = 1024 * 1024;

/// A body without a length ends when it is this much longer than the manifest states. Space for each byte is made by
/// evicting other content.
const SURPLUS_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Consecutive resumptions without a received byte.
const FAILURES_IN_A_ROW_MAX: u32 = 7;

/// Resumptions that a transfer may use in any case. Further ones depend on [`RESUME_BYTES_MIN`].
const RESUMES_MIN: u64 = 64;
/// Bytes that a transfer must receive for each further resumption, on average. Otherwise an upstream that sends a few
/// bytes at a time could keep a transfer running without end.
const RESUME_BYTES_MIN: u64 = 16 * 1024;

/// Doubled with each consecutive failure, up to [`RESUME_PAUSE_MAX`]: the pause before a resumption. A stream that ended at a
/// segment has not failed, and the next one is opened at once.
const RESUME_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause before a resumption. All pauses add up to about 20 s, so a registry that restarts breaks no pull.
const RESUME_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Longest `Retry-After` that is waited out while clients wait.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);

/// Time of waiting for bytes over which the throughput is measured. Time spent waiting for the local disk is not
/// counted.
const RATE_WINDOW: Duration = Duration::from_secs(30);
/// If fewer bytes arrive in a [`RATE_WINDOW`] (1 KiB/s), the stream counts as interrupted.
const RATE_WINDOW_BYTES_MIN: u64 = 30 * 1024;

/// Like [`RATE_WINDOW_BYTES_MIN`], for a transfer that no client waits for: below 32 KiB/s it ends and gives its permit
/// to others. A later request resumes its partial download.
const NO_CLIENT_WINDOW_BYTES_MIN: u64 = 32 * RATE_WINDOW_BYTES_MIN;

/// How long a transfer that only served a small range keeps its connection without reading from it. Buffers on
/// the path receive some megabytes in that time.
const RANGE_IDLE_CONNECTION: Duration = Duration::from_millis(100);

/// How much longer it then waits for another request before it ends.
const RANGE_REJOIN_WINDOW: Duration = Duration::from_secs(2);

/// Why fetching ended early.
pub(super) enum FetchError {
    /// Resuming failed.
    Upstream(UpstreamFailure),
    /// No request waits for the download.
    Unwanted,
    /// The writer has ended; its result has the reason.
    WriterGone,
}

/// Message to the writer.
pub(super) enum WriterMsg {
    /// The next bytes, and their share of the in-flight limits.
    Chunk(Bytes, InFlightBytes),
    /// The next bytes are in the file already.
    Adopt(u64),
    /// Asks whether the bytes so far match the digest.
    CheckDigest(oneshot::Sender<bool>),
    /// End of the blob.
    End,
}

/// Bytes counted against the in-flight limits until dropped.
pub(super) struct InFlightBytes {
    _of_transfer: Option<OwnedSemaphorePermit>,
    _of_all: Option<OwnedSemaphorePermit>,
}

/// Queue to the writer.
pub(super) struct WriterQueue {
    messages: mpsc::Sender<WriterMsg>,
    of_transfer: Arc<Semaphore>,
    of_all: Arc<Semaphore>,
}

impl WriterQueue {
    pub(super) fn new(messages: mpsc::Sender<WriterMsg>, of_all: &Arc<Semaphore>) -> Self {
        Self {
            messages,
            of_transfer: Arc::new(Semaphore::new(QUEUE_BYTES_MAX)),
            of_all: Arc::clone(of_all),
        }
    }

    /// Waits for the in-flight limits, then sends these bytes.
    async fn chunk(&self, bytes: Bytes) -> Result<(), FetchError> {
        // No larger than the smaller of the two limits, or it would wait forever.
        let count = u32::try_from(bytes.len().min(QUEUE_BYTES_MAX)).unwrap_or(u32::MAX);
        // Neither semaphore is ever closed.
        let in_flight = InFlightBytes {
            _of_transfer: Arc::clone(&self.of_transfer).acquire_many_owned(count).await.ok(),
            _of_all: Arc::clone(&self.of_all).acquire_many_owned(count).await.ok(),
        };
        self.send(WriterMsg::Chunk(bytes, in_flight)).await
    }

    async fn send(&self, message: WriterMsg) -> Result<(), FetchError> {
        self.messages
            .send(message)
            .await
            .map_err(|_| FetchError::WriterGone)
    }
}

/// Reads the source, resumes it, and sends the bytes to the writer.
pub(super) struct Fetcher<'a, S> {
    pub(super) source: &'a mut S,
    pub(super) queue: WriterQueue,
    /// Size of the complete blob, if known.
    pub(super) total: Option<u64>,
    /// Offset of the next byte to receive.
    pub(super) received: u64,
    /// Whether the source was opened more than once.
    pub(super) resumed: bool,
    pub(super) failures_in_a_row: u32,
    /// Number of resumptions.
    pub(super) resumes: u64,
    /// The requests that wait for the download.
    pub(super) waiters: &'a Waiters,
    /// Offset at which the stream ends, if that is not the end of the blob.
    pub(super) bound: Option<u64>,
    /// Further connections, if the blob is fetched by several.
    pub(super) helpers: Option<Helpers>,
    /// Time spent waiting for the writer.
    pub(super) stalled: Duration,
}

impl<S: Source> Fetcher<'_, S> {
    /// Reads `stream` and its resumptions to the end of the blob. Afterwards, no helper writes any more.
    pub(super) async fn run(&mut self, stream: Stream) -> Result<(), FetchError> {
        let ended = self.fetch(stream).await;
        if let Some(helpers) = &mut self.helpers {
            helpers.end().await;
        }
        ended
    }

    async fn fetch(&mut self, mut stream: Stream) -> Result<(), FetchError> {
        if stream.start > self.received {
            // The partial download had fewer bytes than its record states.
            stream = self.resume().await?;
        }
        loop {
            let before = self.received;
            let interrupted = match self.read_stream(&mut stream).await? {
                StreamEnd::Ended => None,
                StreamEnd::Interrupted(interrupted) => Some(interrupted),
                StreamEnd::ReachedSegment => {
                    drop(stream);
                    self.follow_segments().await?;
                    if self.total.is_some_and(|total| self.received >= total) {
                        let _ = self.queue.send(WriterMsg::End).await;
                        return Ok(());
                    }
                    self.failures_in_a_row = 0;
                    self.source.ended_at_segment();
                    stream = self.resume().await?;
                    continue;
                }
                StreamEnd::Unwanted => {
                    drop(stream);
                    if !self.waiters.rejoined_or_closed_within(RANGE_REJOIN_WINDOW).await {
                        return Err(FetchError::Unwanted);
                    }
                    self.failures_in_a_row = 0;
                    stream = self.resume().await?;
                    continue;
                }
            };
            let is_complete = self.total.is_some_and(|total| self.received >= total);
            let interrupted = match interrupted {
                _ if is_complete => None,
                // A clean end before the known size is an interruption.
                None if self.total.is_some() => Some(Interrupted::by(UpstreamFailure::ConnectionReset)),
                None if self.is_shorter_than_stated() && !self.matches_digest().await? => {
                    Some(Interrupted::by(UpstreamFailure::ConnectionReset))
                }
                interrupted => interrupted,
            };
            let Some(Interrupted { cause, too_slow, .. }) = interrupted else {
                // Fails only if the writer has failed; the writer's result has the reason.
                let _ = self.queue.send(WriterMsg::End).await;
                return Ok(());
            };
            let has_progress = self.received > before && !too_slow;
            self.failures_in_a_row = if has_progress {
                1
            } else {
                self.failures_in_a_row + 1
            };
            self.resumes += 1;
            let may_resume = self.resumes <= RESUMES_MIN + self.received / RESUME_BYTES_MIN;
            if self.failures_in_a_row > FAILURES_IN_A_ROW_MAX || !may_resume {
                return Err(FetchError::Upstream(cause));
            }
            tracing::debug!(received = self.received, %cause, "download interrupted, resuming");
            // Closes the connection before another is opened.
            drop(stream);
            stream = self.resume().await?;
        }
    }

    /// Adopts segments while they have the next bytes.
    async fn follow_segments(&mut self) -> Result<(), FetchError> {
        let Some(helpers) = &mut self.helpers else {
            return Ok(());
        };
        // Bytes of more than one response: a digest mismatch restarts the download.
        self.resumed = true;
        helpers.close_first_stream();
        if self.waiters.serves_complete_pull() {
            helpers.replace_first_stream(self.source);
        }
        loop {
            if self.waiters.serves_complete_pull() {
                helpers.ramp_up(self.stalled, self.source);
            }
            match helpers.front().await {
                Front::Waiting => {}
                Front::Grew(mut length) => {
                    self.received += length;
                    while length > 0 {
                        let part = length.min(ADOPT_BYTES_MAX);
                        length -= part;
                        let began = Instant::now();
                        self.queue.send(WriterMsg::Adopt(part)).await?;
                        self.stalled += began.elapsed();
                    }
                }
                Front::Missing => return Ok(()),
            }
        }
    }

    /// The most bytes that the blob may have.
    fn bytes_max(&self) -> Option<u64> {
        self.total
            .or_else(|| Some(self.source.stated_size()?.saturating_add(SURPLUS_BYTES_MAX)))
    }

    fn is_shorter_than_stated(&self) -> bool {
        self.source
            .stated_size()
            .is_some_and(|stated| self.received < stated)
    }

    /// Whether the bytes so far match the digest. Without a `Content-Length`, the stream may have ended too early, and
    /// the size stated in the manifest may be wrong.
    async fn matches_digest(&mut self) -> Result<bool, FetchError> {
        let (reply, is_complete) = oneshot::channel();
        self.queue.send(WriterMsg::CheckDigest(reply)).await?;
        is_complete.await.map_err(|_| FetchError::WriterGone)
    }

    async fn resume(&mut self) -> Result<Stream, FetchError> {
        self.resumed = true;
        let mut wait = Duration::ZERO;
        loop {
            sleep(pause_after(self.failures_in_a_row).max(wait)).await;
            // Another connection fetches the next segment. Of an open-ended response, some of its bytes would be under way when
            // the connection is closed.
            self.bound = self.helpers.as_ref().and_then(Helpers::stream_end);
            let (cause, tries) = match self.source.open(self.received, self.bound).await {
                Ok(stream) if stream.start <= self.received && self.fits(stream.total) => {
                    self.total = self.total.or(stream.total);
                    return Ok(stream);
                }
                Ok(_) => (UpstreamFailure::Malformed, 1),
                Err(response) => {
                    wait = retry_after(&response);
                    // Counts a definite denial as three failures, an unavailable upstream as one.
                    let tries = if response.failure().is_some() { 1 } else { 3 };
                    (response.cause(), tries)
                }
            };
            self.failures_in_a_row += tries;
            if self.failures_in_a_row > FAILURES_IN_A_ROW_MAX || wait > RETRY_AFTER_MAX {
                return Err(FetchError::Upstream(cause));
            }
        }
    }

    fn fits(&self, total: Option<u64>) -> bool {
        total.is_none() || self.total.is_none() || total == self.total
    }

    /// Reads `stream` while requests wait for it. Bytes already received are skipped.
    async fn read_stream(&mut self, stream: &mut Stream) -> Result<StreamEnd, FetchError> {
        let mut position = stream.start;
        let mut pace = Throughput::default();
        loop {
            if self.waiters.is_abandoned() && !self.waiters.rejoined_within(RANGE_IDLE_CONNECTION).await {
                return Ok(StreamEnd::Unwanted);
            }
            let chunk = match pace.next(stream, self.waiters).await {
                None if self.bound == Some(self.received) => return Ok(StreamEnd::ReachedSegment),
                None => return Ok(StreamEnd::Ended),
                Some(Err(Interrupted {
                    no_client_waits: true,
                    ..
                })) => return Err(FetchError::Unwanted),
                Some(Err(interrupted)) => return Ok(StreamEnd::Interrupted(interrupted)),
                Some(Ok(chunk)) => chunk,
            };
            let skipped = self.received.saturating_sub(position).min(chunk.len() as u64);
            position += chunk.len() as u64;
            let new_bytes = chunk.slice(usize::try_from(skipped).unwrap_or(chunk.len())..);
            if new_bytes.is_empty() {
                continue;
            }
            let accepted = self.helpers.as_ref().map_or(new_bytes.len() as u64, |helpers| {
                helpers.advance(new_bytes.len() as u64)
            });
            let reaches_segment = accepted < new_bytes.len() as u64;
            self.received += accepted;
            let began = Instant::now();
            let new_bytes = new_bytes.slice(..usize::try_from(accepted).unwrap_or(new_bytes.len()));
            self.queue.chunk(new_bytes).await?;
            if reaches_segment {
                return Ok(StreamEnd::ReachedSegment);
            }
            self.stalled += began.elapsed();
            if let Some(helpers) = &mut self.helpers
                && self.waiters.serves_complete_pull()
            {
                helpers.ramp_up(self.stalled, self.source);
            }
            if self.bytes_max().is_some_and(|most| self.received > most) {
                // The blob is too long already, and the remainder could be endless.
                return Ok(StreamEnd::Ended);
            }
        }
    }
}

fn pause_after(failures_in_a_row: u32) -> Duration {
    if failures_in_a_row == 0 {
        return Duration::ZERO;
    }
    let pause = RESUME_PAUSE * 2_u32.saturating_pow(failures_in_a_row);
    pause.min(RESUME_PAUSE_MAX)
}

/// The wait that the upstream states in `Retry-After`.
fn retry_after(response: &UpstreamResponse) -> Duration {
    let is_unavailable = matches!(response.kind, ResponseKind::Unavailable(_));
    let seconds = response
        .retry_after
        .as_ref()
        .filter(|_| is_unavailable)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok());
    Duration::from_secs(seconds.unwrap_or(0))
}

/// Why a stream is not read further.
enum StreamEnd {
    Ended,
    Interrupted(Interrupted),
    /// A helper has or fetches the next byte.
    ReachedSegment,
    /// Only a range was requested, and no request waits for more.
    Unwanted,
}

struct Interrupted {
    cause: UpstreamFailure,
    /// Bytes arrived, but below the minimum throughput.
    too_slow: bool,
    /// Bytes arrived below the minimum throughput of a transfer that no client waits for.
    no_client_waits: bool,
}

impl Interrupted {
    fn by(cause: UpstreamFailure) -> Self {
        Self {
            cause,
            too_slow: false,
            no_client_waits: false,
        }
    }

    fn slow(no_client_waits: bool) -> Self {
        Self {
            cause: UpstreamFailure::Timeout,
            too_slow: true,
            no_client_waits,
        }
    }
}

/// Throughput, measured in windows of waiting time.
#[derive(Default)]
struct Throughput {
    waited: Duration,
    received: u64,
}

impl Throughput {
    async fn next(&mut self, stream: &mut Stream, waiters: &Waiters) -> Option<Result<Bytes, Interrupted>> {
        let mut next = pin!(stream.body.chunk());
        loop {
            let began = Instant::now();
            let left = RATE_WINDOW.saturating_sub(self.waited);
            let next = timeout(left, &mut next).await;
            self.waited += began.elapsed();
            let Ok(next) = next else {
                if self.received < NO_CLIENT_WINDOW_BYTES_MIN && waiters.close_unless_client() {
                    return Some(Err(Interrupted::slow(true)));
                }
                if self.received < RATE_WINDOW_BYTES_MIN {
                    return Some(Err(Interrupted::slow(false)));
                }
                *self = Self::default();
                continue;
            };
            let next = next?.map_err(Interrupted::by);
            if let Ok(chunk) = &next {
                self.received += chunk.len() as u64;
            }
            return Some(next);
        }
    }
}
