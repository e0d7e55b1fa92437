//! The receiving side of a transfer: bytes from the upstream, asked for again where they stop coming.
//!
//! What is asked for again is asked from the last byte on (`Range`), and each time of the registry itself, never of the storage
//! that it had redirected to: signed addresses expire. An upstream that answers with the whole (200) is read from its
//! start, and what was had already is skipped. The skipped bytes are not looked at: what counts is what was written, and the
//! digest is that of the file. For the same reason a changed `ETag` says nothing here; another size does, and
//! such an answer is not used.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use super::{Source, Stream};
use crate::oci::UpstreamFailure;
use crate::queue::Waiters;
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Chunks of one transfer on their way from the network to the disk; a full queue slows the upstream, not the memory.
pub(super) const QUEUE_CHUNKS_MAX: usize = 16;

/// The same in bytes.
pub(super) const QUEUE_BYTES_MAX: usize = 1024 * 1024;

/// Resumptions in a row that brought no byte.
const FRUITLESS_RESUMES_MAX: u32 = 7;

/// Resumptions that every transfer may have; one that breaks more often must get further each time, by …
const RESUMES_MIN: u64 = 64;
/// … this much on average. Else an upstream that gives a few bytes at a time could keep a transfer for ever.
const RESUME_BYTES_MIN: u64 = 16 * 1024;

/// Before the first resumption; doubled for each fruitless one, up to …
const RESUME_PAUSE: Duration = Duration::from_millis(100);
/// … this. All of them together are some 20 s: a registry that restarts breaks no pull.
const RESUME_PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long an upstream may ask us to wait (`Retry-After`) while clients wait for the rest.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);

/// Over this much waiting for bytes …
const RATE_WINDOW: Duration = Duration::from_secs(30);
/// … at least 1 KiB a second must come, or the transfer counts as broken. Time in which it was our disk that was slow does
/// not count.
const RATE_WINDOW_BYTES_MIN: u64 = 30 * 1024;

/// The same for a transfer that no client waits for: at least 32 KiB a second, else it gives its place to others. What it
/// wrote is gone on with when a client asks.
const UNWAITED_WINDOW_BYTES_MIN: u64 = 32 * RATE_WINDOW_BYTES_MIN;

/// How long a transfer of which a small part was wanted keeps its connection without taking bytes from it. The buffers on the
/// way take some megabytes in that time.
const PART_KEEPS_CONNECTION: Duration = Duration::from_millis(100);

/// How much longer it waits for another request before it ends.
const PART_WAITS: Duration = Duration::from_secs(2);

/// Why receiving ended early.
pub(super) enum Stopped {
    /// Asking again did not help.
    Upstream(UpstreamFailure),
    /// No request waits for it.
    Unwanted,
    /// Nobody takes the bytes any more: the writer knows why.
    Writer,
}

/// What the writer gets.
pub(super) enum Piece {
    /// The next bytes, and their share of what may be on its way.
    Chunk(Bytes, Share),
    /// Whether the bytes so far are those of the digest.
    IsWhole(oneshot::Sender<bool>),
    /// That was all.
    End,
}

/// Bytes counted as on their way, until it is dropped.
pub(super) struct Share {
    _own: Option<OwnedSemaphorePermit>,
    _of_all: Option<OwnedSemaphorePermit>,
}

/// The way to the writer.
pub(super) struct Outgoing {
    pieces: mpsc::Sender<Piece>,
    own: Arc<Semaphore>,
    of_all: Arc<Semaphore>,
}

impl Outgoing {
    pub(super) fn new(pieces: mpsc::Sender<Piece>, of_all: &Arc<Semaphore>) -> Self {
        Self {
            pieces,
            own: Arc::new(Semaphore::new(QUEUE_BYTES_MAX)),
            of_all: Arc::clone(of_all),
        }
    }

    /// Waits until these bytes may be on their way, and sends them off.
    async fn chunk(&self, bytes: Bytes) -> Result<(), Stopped> {
        // No larger than the smaller of the two, or it would wait for ever.
        let count = u32::try_from(bytes.len().min(QUEUE_BYTES_MAX)).unwrap_or(u32::MAX);
        // Neither semaphore is ever closed.
        let share = Share {
            _own: Arc::clone(&self.own).acquire_many_owned(count).await.ok(),
            _of_all: Arc::clone(&self.of_all).acquire_many_owned(count).await.ok(),
        };
        self.send(Piece::Chunk(bytes, share)).await
    }

    async fn send(&self, piece: Piece) -> Result<(), Stopped> {
        self.pieces.send(piece).await.map_err(|_| Stopped::Writer)
    }
}

/// Passes the bytes on to the writer, opening the source again where it breaks.
pub(super) struct Receiving<'a, S> {
    pub(super) source: &'a mut S,
    pub(super) queue: Outgoing,
    /// The size of the whole, where it is known.
    pub(super) total: Option<u64>,
    /// How much there is already.
    pub(super) received: u64,
    /// Whether the source was opened again.
    pub(super) resumed: bool,
    pub(super) fruitless: u32,
    /// How often the source was opened again.
    pub(super) resumes: u64,
    /// The requests that wait for it.
    pub(super) waiters: &'a Waiters,
}

impl<S: Source> Receiving<'_, S> {
    /// Receives everything from `stream` and what follows it.
    pub(super) async fn run(&mut self, mut stream: Stream) -> Result<(), Stopped> {
        if stream.start > self.received {
            // A leftover held less than it promised.
            stream = self.reopen().await?;
        }
        loop {
            let before = self.received;
            let broke = match self.drain(&mut stream).await? {
                Drained::Ended => None,
                Drained::Broke(broke) => Some(broke),
                Drained::Unwanted => {
                    drop(stream);
                    if !self.waiters.wanted_within(PART_WAITS).await {
                        return Err(Stopped::Unwanted);
                    }
                    self.fruitless = 0;
                    stream = self.reopen().await?;
                    continue;
                }
            };
            let is_whole = self.total.is_some_and(|total| self.received >= total);
            let broke = match broke {
                _ if is_whole => None,
                // A clean end before the known end is no end.
                None if self.total.is_some() => Some(Broke::off(UpstreamFailure::ConnectionReset)),
                None if self.is_shorter_than_stated() && !self.has_whole().await? => {
                    Some(Broke::off(UpstreamFailure::ConnectionReset))
                }
                broke => broke,
            };
            let Some(Broke { cause, dripped, .. }) = broke else {
                // Fails only if the writer has failed, which its own result tells.
                let _ = self.queue.send(Piece::End).await;
                return Ok(());
            };
            let fruitful = self.received > before && !dripped;
            self.fruitless = if fruitful { 1 } else { self.fruitless + 1 };
            self.resumes += 1;
            let is_worth_it = self.resumes <= RESUMES_MIN + self.received / RESUME_BYTES_MIN;
            if self.fruitless > FRUITLESS_RESUMES_MAX || !is_worth_it {
                return Err(Stopped::Upstream(cause));
            }
            tracing::debug!(received = self.received, %cause, "download broke; resuming");
            // The connection is not kept open while another is asked for.
            drop(stream);
            stream = self.reopen().await?;
        }
    }

    fn is_shorter_than_stated(&self) -> bool {
        self.source
            .stated_size()
            .is_some_and(|stated| self.received < stated)
    }

    /// An end that no length announced may come too early, and a stated size may be wrong: the digest tells.
    async fn has_whole(&mut self) -> Result<bool, Stopped> {
        let (reply, is_whole) = oneshot::channel();
        self.queue.send(Piece::IsWhole(reply)).await?;
        is_whole.await.map_err(|_| Stopped::Writer)
    }

    async fn reopen(&mut self) -> Result<Stream, Stopped> {
        self.resumed = true;
        let mut wait = Duration::ZERO;
        loop {
            let pause = RESUME_PAUSE * 2_u32.saturating_pow(self.fruitless);
            sleep(pause.min(RESUME_PAUSE_MAX).max(wait)).await;
            let (cause, tries) = match self.source.open(self.received).await {
                Ok(stream) if stream.start <= self.received && self.fits(stream.total) => {
                    self.total = self.total.or(stream.total);
                    return Ok(stream);
                }
                Ok(_) => (UpstreamFailure::Malformed, 1),
                Err(answer) => {
                    wait = asked_to_wait(&answer);
                    // A no is believed sooner than a silence.
                    let tries = if answer.failure().is_some() { 1 } else { 3 };
                    (answer.cause(), tries)
                }
            };
            self.fruitless += tries;
            if self.fruitless > FRUITLESS_RESUMES_MAX || wait > RETRY_AFTER_MAX {
                return Err(Stopped::Upstream(cause));
            }
        }
    }

    fn fits(&self, total: Option<u64>) -> bool {
        total.is_none() || self.total.is_none() || total == self.total
    }

    /// Reads `stream` as long as it is wanted. Bytes that were had already are skipped.
    async fn drain(&mut self, stream: &mut Stream) -> Result<Drained, Stopped> {
        let mut position = stream.start;
        let mut pace = Pace::default();
        loop {
            if self.waiters.is_unwanted() && !self.waiters.wanted_again(PART_KEEPS_CONNECTION).await {
                return Ok(Drained::Unwanted);
            }
            let chunk = match pace.next(stream, self.waiters).await {
                None => return Ok(Drained::Ended),
                Some(Err(Broke {
                    is_unwaited: true, ..
                })) => return Err(Stopped::Unwanted),
                Some(Err(broke)) => return Ok(Drained::Broke(broke)),
                Some(Ok(chunk)) => chunk,
            };
            let surplus = self.received.saturating_sub(position).min(chunk.len() as u64);
            position += chunk.len() as u64;
            let fresh = chunk.slice(usize::try_from(surplus).unwrap_or(chunk.len())..);
            if fresh.is_empty() {
                continue;
            }
            self.received += fresh.len() as u64;
            self.queue.chunk(fresh).await?;
            if self.total.is_some_and(|total| self.received > total) {
                // Wrong already; the rest of it could be endless.
                return Ok(Drained::Ended);
            }
        }
    }
}

/// How long the upstream asks us to wait.
fn asked_to_wait(answer: &UpstreamResponse) -> Duration {
    let silent = matches!(answer.kind, ResponseKind::Unavailable(_));
    let seconds = answer
        .retry_after
        .as_ref()
        .filter(|_| silent)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok());
    Duration::from_secs(seconds.unwrap_or(0))
}

/// Why no more is read from a stream.
enum Drained {
    Ended,
    Broke(Broke),
    /// Only a part was wanted, and nobody waits for more.
    Unwanted,
}

struct Broke {
    cause: UpstreamFailure,
    /// Bytes came, but too slowly to go on like that.
    dripped: bool,
    /// They come too slowly for what no client waits for.
    is_unwaited: bool,
}

impl Broke {
    fn off(cause: UpstreamFailure) -> Self {
        Self {
            cause,
            dripped: false,
            is_unwaited: false,
        }
    }

    fn slow(is_unwaited: bool) -> Self {
        Self {
            cause: UpstreamFailure::Timeout,
            dripped: true,
            is_unwaited,
        }
    }
}

/// How fast the bytes come, counted in windows of waiting.
#[derive(Default)]
struct Pace {
    waited: Duration,
    came: u64,
}

impl Pace {
    async fn next(&mut self, stream: &mut Stream, waiters: &Waiters) -> Option<Result<Bytes, Broke>> {
        let mut next = pin!(stream.body.chunk());
        loop {
            let began = Instant::now();
            let left = RATE_WINDOW.saturating_sub(self.waited);
            let next = timeout(left, &mut next).await;
            self.waited += began.elapsed();
            let Ok(next) = next else {
                if self.came < UNWAITED_WINDOW_BYTES_MIN && waiters.close_unless_client() {
                    return Some(Err(Broke::slow(true)));
                }
                if self.came < RATE_WINDOW_BYTES_MIN {
                    return Some(Err(Broke::slow(false)));
                }
                *self = Self::default();
                continue;
            };
            let next = next?.map_err(Broke::off);
            if let Ok(chunk) = &next {
                self.came += chunk.len() as u64;
            }
            return Some(next);
        }
    }
}
