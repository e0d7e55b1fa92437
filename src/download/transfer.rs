//! The transfer itself: upstream → file, hashed on the way, resumed when it breaks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::{Download, Failure, Opened, Place, Progress, Source, Stream, WITHHELD_BYTES};
use crate::oci::{Cause, Hasher};
use crate::store::Fault;
use crate::store::blobs::{Ingest, Verified};

/// Chunks on their way from the network to the disk; a full queue slows the upstream, not the memory.
const QUEUE_CHUNKS_MAX: usize = 16;

/// Resumptions in a row that brought no byte.
const FRUITLESS_RESUMES_MAX: u32 = 5;

const RESUME_PAUSE: Duration = Duration::from_millis(100);

/// Runs one transfer to its end and leaves the map.
pub(super) async fn run<S: Source>(place: Place, source: S) {
    match fill(&place, source).await {
        Ok(()) => {}
        Err(failure) => {
            tracing::debug!(digest = %place.download.digest, %failure, "download failed");
            place.leave(Progress::Failed(Arc::new(failure)));
        }
    }
}

async fn fill<S: Source>(place: &Place, mut source: S) -> Result<(), Failure> {
    // The semaphore is never closed; were it, running without a limit would be the lesser harm.
    let _permit = place.shared.places.acquire().await.ok();
    let stream = source
        .open(0)
        .await
        .map_err(|answer| Failure::Refused(Box::new(answer)))?;
    let total = stream.total;
    let ingest = begin(place, total).await?;
    let opened = Opened {
        size: total,
        file: ingest.file(),
    };
    place.download.opened.get_or_init(|| opened);
    place.download.progress.send_replace(Progress::Readable(0));

    let (queue, chunks) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let download = Arc::clone(&place.download);
    let writer = spawn_blocking(move || Writer::new(ingest, total, download).run(chunks));
    let received = receive(&mut source, stream, &queue).await;
    if received.is_ok() {
        // Fails only if the writer has failed, which its own result tells.
        let _ = queue.send(Piece::End).await;
    }
    drop(queue);
    let written = writer.await.unwrap_or(Err(Failure::Abandoned));
    match (received, written) {
        (Err(Stopped::Upstream(cause)), _) => Err(Failure::Broken(cause)),
        (_, Err(failure)) => Err(failure),
        (Err(Stopped::Writer), Ok(_)) => Err(Failure::Abandoned),
        (Ok(()), Ok(verified)) => {
            keep(place, verified).await;
            Ok(())
        }
    }
}

async fn begin(place: &Place, total: Option<u64>) -> Result<Ingest, Failure> {
    let store = Arc::clone(&place.shared.store);
    let digest = place.download.digest;
    match spawn_blocking(move || store.begin(&digest, total)).await {
        Ok(begun) => begun.map_err(Failure::Unstorable),
        Err(_) => Err(Failure::Abandoned),
    }
}

/// Makes it durable and gives it its name. The readers have all their bytes already, so a disk that fails now costs a
/// later download and nothing else.
async fn keep(place: &Place, (ingest, verified): (Ingest, Verified)) {
    let size = verified.size();
    let kept = spawn_blocking(move || ingest.commit(verified)).await;
    if let Ok(Err(fault)) = kept {
        tracing::error!(digest = %place.download.digest, %fault, "a verified blob could not be kept; it will be fetched again");
    }
    place.leave(Progress::Complete(size));
}

enum Stopped {
    Upstream(Cause),
    Writer,
}

enum Piece {
    Chunk(Bytes),
    End,
}

/// Passes the bytes on to the writer, opening the source again where it breaks.
async fn receive<S: Source>(
    source: &mut S,
    mut stream: Stream,
    queue: &mpsc::Sender<Piece>,
) -> Result<(), Stopped> {
    let total = stream.total;
    let mut received = 0_u64;
    let mut fruitless = 0_u32;
    loop {
        let before = received;
        let broke = match drain(&mut stream, &mut received, queue).await? {
            // A clean end before the known end is no end.
            None if total.is_none_or(|total| received >= total) => return Ok(()),
            None => Cause::Reset,
            Some(cause) => cause,
        };
        fruitless = if received > before { 1 } else { fruitless + 1 };
        if fruitless > FRUITLESS_RESUMES_MAX {
            return Err(Stopped::Upstream(broke));
        }
        tracing::debug!(received, cause = %broke, "download broke; resuming");
        stream = reopen(source, received, &mut fruitless).await?;
    }
}

async fn reopen<S: Source>(source: &mut S, from: u64, fruitless: &mut u32) -> Result<Stream, Stopped> {
    loop {
        tokio::time::sleep(RESUME_PAUSE * 2_u32.saturating_pow(*fruitless)).await;
        let cause = match source.open(from).await {
            Ok(stream) if stream.start <= from => return Ok(stream),
            Ok(_) => Cause::Malformed,
            Err(answer) => answer.cause(),
        };
        *fruitless += 1;
        if *fruitless > FRUITLESS_RESUMES_MAX {
            return Err(Stopped::Upstream(cause));
        }
    }
}

/// Reads `stream` until it ends (`None`) or breaks (`Some`). Bytes before `received` were had already.
async fn drain(
    stream: &mut Stream,
    received: &mut u64,
    queue: &mpsc::Sender<Piece>,
) -> Result<Option<Cause>, Stopped> {
    let mut position = stream.start;
    loop {
        let chunk = match stream.body.chunk().await {
            None => return Ok(None),
            Some(Err(cause)) => return Ok(Some(cause)),
            Some(Ok(chunk)) => chunk,
        };
        let surplus = received.saturating_sub(position).min(chunk.len() as u64);
        position += chunk.len() as u64;
        let fresh = chunk.slice(usize::try_from(surplus).unwrap_or(chunk.len())..);
        if fresh.is_empty() {
            continue;
        }
        *received += fresh.len() as u64;
        queue
            .send(Piece::Chunk(fresh))
            .await
            .map_err(|_| Stopped::Writer)?;
    }
}

/// Writes and hashes, on a thread of the blocking pool. Publishes each chunk before it is hashed: readers need not
/// wait for the hash, only the end of the blob does.
struct Writer {
    ingest: Ingest,
    hasher: Hasher,
    total: Option<u64>,
    written: u64,
    download: Arc<Download>,
}

impl Writer {
    fn new(ingest: Ingest, total: Option<u64>, download: Arc<Download>) -> Self {
        let hasher = Hasher::new(download.digest.algorithm());
        Self {
            ingest,
            hasher,
            total,
            written: 0,
            download,
        }
    }

    fn run(mut self, mut chunks: mpsc::Receiver<Piece>) -> Result<(Ingest, Verified), Failure> {
        let file = self.ingest.file();
        while let Some(piece) = chunks.blocking_recv() {
            let chunk = match piece {
                Piece::Chunk(chunk) => chunk,
                Piece::End => return self.verify(),
            };
            file.write_at(&chunk, self.written).map_err(|error| {
                Failure::Store(Fault::io(
                    "write a blob",
                    self.download.digest.to_string(),
                    &error,
                ))
            })?;
            self.written += chunk.len() as u64;
            self.publish();
            self.hasher.update(&chunk);
        }
        // The transfer stopped without an end; the receiving side says why.
        Err(Failure::Abandoned)
    }

    fn publish(&self) {
        let safe = match self.total {
            Some(total) => self.written.min(total.saturating_sub(WITHHELD_BYTES)),
            None => self.written.saturating_sub(WITHHELD_BYTES),
        };
        self.download
            .progress
            .send_if_modified(|progress| match progress {
                Progress::Readable(readable) if *readable < safe => {
                    *readable = safe;
                    true
                }
                _ => false,
            });
    }

    fn verify(self) -> Result<(Ingest, Verified), Failure> {
        let verified = Verified::check(self.hasher, &self.download.digest, self.written, self.total)
            .map_err(Failure::Wrong)?;
        self.download
            .progress
            .send_replace(Progress::Complete(self.written));
        Ok((self.ingest, verified))
    }
}
