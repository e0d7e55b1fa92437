//! Lifecycle of a transfer: opens the source or resumes a partial download, fetches, verifies and commits. A
//! resumed download with a digest mismatch restarts once from the first byte, as does one whose source may send other bytes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use super::fetch::{FetchError, Fetcher, QUEUE_CHUNKS_MAX, WriterQueue};
use super::parallel::{self, Helpers};
use super::state::{Attempt, Download, DownloadGuard, DownloadInfo};
use super::writer::Writer;
use super::{DownloadError, Source, Stream};
use crate::blocking;
use crate::oci::{Hasher, UpstreamFailure};
use crate::queue::AcquireError;
use crate::store::StoreError;
use crate::store::blobs::Verified;
use crate::store::ingest::Ingest;
use crate::store::partial::{PartialDownload, Resumed};
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Longest response that is read to its end although it cannot be stored.
const DRAIN_BYTES_MAX: u64 = 1024 * 1024;
/// Longest time for that.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs one transfer to its end and removes it from the map of running downloads.
pub(super) async fn run<S: Source>(guard: DownloadGuard, mut source: S) {
    let result = fill(&guard, &mut source).await;
    source.ended(result.as_ref().err());
    if let Err(failure) = result {
        tracing::debug!(digest = %guard.download.digest, %failure, "download failed");
        guard.download.counts.failed(&failure);
        guard.fail(failure);
    }
}

async fn fill<S: Source>(guard: &DownloadGuard, source: &mut S) -> Result<(), DownloadError> {
    let Download {
        requester, waiters, ..
    } = guard.download.as_ref();
    let admitted = guard.shared.queue.acquire(&requester.upstream, waiters);
    let _admitted = admitted.await.map_err(|error| match error {
        AcquireError::Full(full) => DownloadError::QueueFull(full),
        AcquireError::Abandoned => DownloadError::Abandoned,
    })?;
    let opened = begin(guard, source).await?;
    let total = opened.total;
    let (ended, resumed_midway) = transfer(guard, source, opened, true).await;
    let may_differ = match ended {
        Err(DownloadError::DigestMismatch(_)) => source.rejected() || resumed_midway,
        _ => false,
    };
    let (ingest, verified) = match ended {
        Err(DownloadError::DigestMismatch(mismatch)) if may_differ => {
            tracing::warn!(digest = %guard.download.digest, %mismatch, "digest mismatch, restarting the download from the first byte");
            // If the restart fails as well, the first failure is reported.
            let Ok(opened) = restart(guard, source, total).await else {
                return Err(DownloadError::DigestMismatch(mismatch));
            };
            let restarted = transfer(guard, source, opened, false).await.0?;
            if resumed_midway {
                // The blob is right at the registry, so the parts were wrong.
                guard
                    .shared
                    .use_one_connection(&requester.upstream, parallel::WRONG_RANGE_PERIOD);
            }
            restarted
        }
        ended => ended?,
    };
    commit(guard, ingest, verified).await;
    Ok(())
}

/// A transfer whose first response has arrived.
struct OpenedTransfer {
    stream: Stream,
    total: Option<u64>,
    resumed: Resumed,
}

async fn begin<S: Source>(guard: &DownloadGuard, source: &mut S) -> Result<OpenedTransfer, DownloadError> {
    let (store, digest) = (Arc::clone(&guard.shared.store), guard.download.digest);
    let partial = blocking::run(&guard.shared.starts, move || store.take_partial(&digest)).await;
    if let Ok(Some(partial)) = partial
        && let Some(opened) = resume_partial(guard, source, partial).await?
    {
        return Ok(opened);
    }
    let stream = lead(guard, source, 0).await.map_err(not_started)?;
    start(guard, stream, Attempt::First).await
}

/// Opens the source for the first time, and records who has opened it.
async fn lead<S: Source>(
    guard: &DownloadGuard,
    source: &mut S,
    from: u64,
) -> Result<Stream, UpstreamResponse> {
    let stream = source.open(from, None).await?;
    let is_led_elsewhere = &guard.download.is_led_elsewhere;
    is_led_elsewhere.store(!source.is_led_by_upstream(), Ordering::Relaxed);
    Ok(stream)
}

/// Requests the remainder of a partial download. Clients may read the partial bytes only after a 2xx. After a denial
/// the partial download stays in the store. `None`: it was unusable and is discarded.
async fn resume_partial<S: Source>(
    guard: &DownloadGuard,
    source: &mut S,
    partial: PartialDownload,
) -> Result<Option<OpenedTransfer>, DownloadError> {
    // First, so that few responses wait unread in a connection that others share. The semaphore is never closed.
    let permit = Arc::clone(&guard.shared.resumptions).acquire_owned().await.ok();
    let stream = match lead(guard, source, partial.bytes()).await {
        Ok(stream) => stream,
        // The upstream rejects the range.
        Err(response) if rejects_ranges(&response) => {
            partial.discard();
            return Ok(None);
        }
        Err(response) => return Err(not_started(response)),
    };
    // The upstream ignored the range. Such a response may be any page, so it does not prove that the client may read
    // the partial bytes.
    if stream.start == 0 && partial.bytes() > 0 {
        partial.discard();
        return start(guard, stream, Attempt::First).await.map(Some);
    }
    let same = |(one, other): (u64, u64)| one == other;
    if !stream.total.zip(partial.size()).is_none_or(same) {
        partial.discard();
        return Ok(None);
    }
    let total = stream.total.or(partial.size());
    guard.download.begin(DownloadInfo {
        size: total,
        file: partial.file(),
        attempt: Attempt::First,
    });
    // Readers get the verified prefix at once, while the upstream's bytes wait in the connection.
    let download = Arc::clone(&guard.download);
    let read = blocking::run_with(permit, move || partial.reverify(|bytes| download.publish(bytes)));
    let Ok(Some(resumed)) = read.await else {
        return Err(DownloadError::Abandoned);
    };
    tracing::info!(digest = %guard.download.digest, bytes = resumed.written, "resuming a partial download");
    Ok(Some(OpenedTransfer {
        stream,
        total,
        resumed,
    }))
}

async fn restart<S: Source>(
    guard: &DownloadGuard,
    source: &mut S,
    total: Option<u64>,
) -> Result<OpenedTransfer, DownloadError> {
    let mut stream = source.open(0, None).await.map_err(not_started)?;
    // The responses to clients have begun, with the first `Content-Length`.
    let differs = |(stated, begun)| stated != begun;
    if stream.total.zip(total).is_some_and(differs) {
        return Err(DownloadError::Interrupted(UpstreamFailure::Malformed));
    }
    stream.total = stream.total.or(total);
    start(guard, stream, Attempt::Retry).await
}

async fn start(
    guard: &DownloadGuard,
    stream: Stream,
    attempt: Attempt,
) -> Result<OpenedTransfer, DownloadError> {
    let (store, digest, total) = (
        Arc::clone(&guard.shared.store),
        guard.download.digest,
        stream.total,
    );
    let ingest = match blocking::run(&guard.shared.starts, move || store.begin(&digest, total)).await {
        Ok(Ok(ingest)) => ingest,
        Ok(Err(fault)) => {
            // A disk that is full or read-only stays so, and has descriptors.
            let is_from_upstream = !guard.download.is_led_elsewhere.load(Ordering::Relaxed);
            if is_from_upstream && matches!(fault, StoreError::Io { .. }) {
                drain(stream).await;
            }
            return Err(DownloadError::Unstorable(fault));
        }
        Err(_) => return Err(DownloadError::Abandoned),
    };
    guard.download.begin(DownloadInfo {
        size: total,
        file: ingest.file(),
        attempt,
    });
    let hasher = Hasher::new(digest.algorithm());
    let resumed = Resumed {
        ingest,
        hasher,
        written: 0,
    };
    Ok(OpenedTransfer {
        stream,
        total,
        resumed,
    })
}

/// Reads a small response to its end, so that its connection serves the request that forwards the blob. Otherwise that
/// request would need a new one, which a process without free descriptors cannot open.
async fn drain(mut stream: Stream) {
    let is_small = |total: u64| total.saturating_sub(stream.start) <= DRAIN_BYTES_MAX;
    if !stream.total.is_some_and(is_small) {
        return;
    }
    let reading = async {
        let mut left = DRAIN_BYTES_MAX;
        while let Some(Ok(chunk)) = stream.body.chunk().await {
            let Some(rest) = left.checked_sub(chunk.len() as u64) else {
                break;
            };
            left = rest;
        }
    };
    // The connection of a slow response is closed.
    let _ = timeout(DRAIN_TIMEOUT, reading).await;
}

/// Receives and verifies the bytes. `may_be_parallel`: whether several connections may be used. Also returns whether
/// the bytes came from more than one response.
async fn transfer<S: Source>(
    guard: &DownloadGuard,
    source: &mut S,
    opened: OpenedTransfer,
    may_be_parallel: bool,
) -> (Result<(Ingest, Verified), DownloadError>, bool) {
    let OpenedTransfer {
        stream,
        total,
        resumed,
    } = opened;
    let (queue, chunks) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let queue = WriterQueue::new(queue, &guard.shared.queued_bytes);
    let helpers = may_be_parallel
        .then(|| helpers(guard, source, &resumed, total))
        .flatten();
    *guard.download.segments.lock() = helpers.as_ref().and_then(Helpers::of_readers);
    let mut fetcher = Fetcher {
        source,
        queue,
        total,
        received: resumed.written,
        resumed: resumed.written > 0,
        failures_in_a_row: 0,
        resumes: 0,
        waiters: &guard.download.waiters,
        bound: None,
        helpers,
        stalled: Duration::ZERO,
    };
    let writer = Writer::new(resumed, &guard.download, total);
    let steps = Arc::clone(&guard.shared.write_steps);
    let writing = tokio::spawn(writer.run(chunks, steps));
    let outcome = fetcher.run(stream).await;
    *guard.download.segments.lock() = None;
    let resumed_midway = fetcher.resumed;
    let fetcher_was_denied = fetcher.helpers.as_ref().is_some_and(Helpers::were_denied);
    // Closes the writer's queue.
    drop(fetcher);
    let written = writing.await.unwrap_or(Err(DownloadError::Abandoned));
    if fetcher_was_denied {
        let upstream = &guard.download.requester.upstream;
        tracing::debug!(
            upstream = &**upstream,
            "the upstream gave no further connection, fetching over one for a while"
        );
        guard
            .shared
            .use_one_connection(upstream, parallel::DENIED_RANGE_PERIOD);
    }
    let ended = match outcome {
        Err(FetchError::Upstream(cause)) => Err(DownloadError::Interrupted(cause)),
        Err(FetchError::Unwanted) => Err(DownloadError::Abandoned),
        Err(FetchError::WriterGone) | Ok(()) => written,
    };
    let (ingest, verified, size) = match ended {
        Ok(written) => written,
        Err(failure) => return (Err(failure), resumed_midway),
    };
    source.verified(size).await;
    guard.download.complete(size);
    (Ok((ingest, verified)), resumed_midway)
}

/// Further connections for what is missing of a large blob.
fn helpers<S: Source>(
    guard: &DownloadGuard,
    source: &S,
    resumed: &Resumed,
    total: Option<u64>,
) -> Option<Helpers> {
    let limits = guard.shared.parallel;
    let total = total.filter(|total| total.saturating_sub(resumed.written) >= limits.blob_bytes_min)?;
    let upstream = &guard.download.requester.upstream;
    if limits.connections_max < 2 || guard.shared.uses_one_connection(upstream) {
        return None;
    }
    let transfer = parallel::Transfer {
        upstream: Arc::clone(upstream),
        file: resumed.ingest.file(),
        queue: guard.shared.queue.clone(),
        write_steps: Arc::clone(&guard.shared.write_steps),
        queued_bytes: Arc::clone(&guard.shared.queued_bytes),
        connections_max: limits.connections_max,
    };
    let of_readers = source.segments(total);
    Some(Helpers::new(transfer, resumed.written, total, of_readers))
}

/// Makes the blob durable and renames it to its digest. The readers can read all bytes already, so after a disk failure
/// here the only loss is that a later request downloads the blob again.
async fn commit(guard: &DownloadGuard, ingest: Ingest, verified: Verified) {
    let committed = blocking::run(&guard.shared.commits, move || ingest.commit(verified)).await;
    if let Ok(Err(fault)) = committed {
        tracing::error!(digest = %guard.download.digest, %fault, "failed to store a verified blob");
    }
    guard.leave();
}

fn not_started(response: UpstreamResponse) -> DownloadError {
    DownloadError::NotStarted(Box::new(response))
}

fn rejects_ranges(response: &UpstreamResponse) -> bool {
    matches!(
        response.kind,
        ResponseKind::Other(_)
            | ResponseKind::Unavailable(UpstreamFailure::Malformed | UpstreamFailure::Status(501))
    )
}
