//! The transfer itself: begun anew or with what an interrupted one left, and verified; wrong bytes that were put
//! together from several answers are fetched once more from the start.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::progress::{Attempt, Download, Opened, Place};
use super::receive::{Outgoing, QUEUE_CHUNKS_MAX, Receiving, Stopped};
use super::writer::Writer;
use super::{Failure, Source, Stream};
use crate::oci::{Hasher, UpstreamFailure};
use crate::queue::NoPlace;
use crate::store::blobs::Verified;
use crate::store::ingest::Ingest;
use crate::store::partial::{PartialDownload, Resumed};
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Runs one transfer to its end and leaves the map.
pub(super) async fn run<S: Source>(place: Place, mut source: S) {
    let filled = fill(&place, &mut source).await;
    source.ended(filled.as_ref().err());
    if let Err(failure) = filled {
        tracing::debug!(digest = %place.download.digest, %failure, "download failed");
        place.download.counts.failed(&failure);
        place.fail(failure);
    }
}

async fn fill<S: Source>(place: &Place, source: &mut S) -> Result<(), Failure> {
    let Download {
        requester, waiters, ..
    } = place.download.as_ref();
    let admitted = place.shared.queue.acquire(&requester.upstream, waiters);
    let _admitted = admitted.await.map_err(|refused| match refused {
        NoPlace::Full(full) => Failure::Crowded(full),
        NoPlace::Abandoned => Failure::Abandoned,
    })?;
    let begun = begin(place, source).await?;
    let total = begun.total;
    let (ended, mended) = transfer(place, source, begun).await;
    let (ingest, verified) = match ended {
        Err(Failure::Wrong(mismatch)) if mended => {
            tracing::warn!(digest = %place.download.digest, %mismatch, "bytes put together from several answers are wrong; fetching once more from the start");
            // If that fails as well, the first failure is the one to tell.
            let Ok(begun) = begin_again(place, source, total).await else {
                return Err(Failure::Wrong(mismatch));
            };
            transfer(place, source, begun).await.0?
        }
        ended => ended?,
    };
    keep(place, ingest, verified).await;
    Ok(())
}

/// A transfer whose first answer is there.
struct Begun {
    stream: Stream,
    total: Option<u64>,
    resumed: Resumed,
}

async fn begin<S: Source>(place: &Place, source: &mut S) -> Result<Begun, Failure> {
    let (store, digest) = (Arc::clone(&place.shared.store), place.download.digest);
    let partial = spawn_blocking(move || store.take_partial(&digest)).await;
    if let Ok(Some(partial)) = partial
        && let Some(begun) = go_on(place, source, partial).await?
    {
        return Ok(begun);
    }
    let stream = source.open(0).await.map_err(refused)?;
    start(place, stream, Attempt::First).await
}

/// Asks for the rest of what an interrupted transfer left. Only the upstream's yes opens what is there already; a no leaves
/// it where it is. `None`: it is of no use.
async fn go_on<S: Source>(
    place: &Place,
    source: &mut S,
    partial: PartialDownload,
) -> Result<Option<Begun>, Failure> {
    let stream = match source.open(partial.bytes()).await {
        Ok(stream) => stream,
        // It is the range that it does not like.
        Err(answer) if dislikes_ranges(&answer) => {
            partial.discard();
            return Ok(None);
        }
        Err(answer) => return Err(refused(answer)),
    };
    // The whole may be anything, and what is there already is shown to nobody because of it.
    if stream.start == 0 && partial.bytes() > 0 {
        partial.discard();
        return start(place, stream, Attempt::First).await.map(Some);
    }
    let same = |(one, other): (u64, u64)| one == other;
    if !stream.total.zip(partial.size()).is_none_or(same) {
        partial.discard();
        return Ok(None);
    }
    let total = stream.total.or(partial.size());
    place.download.begin(Opened {
        size: total,
        file: partial.file(),
        attempt: Attempt::First,
    });
    // Readers get what is proven at once, while the upstream's bytes wait in the connection.
    let download = Arc::clone(&place.download);
    let read = spawn_blocking(move || partial.reverify(|bytes| download.publish(bytes)));
    let Ok(Some(resumed)) = read.await else {
        return Err(Failure::Abandoned);
    };
    tracing::info!(digest = %place.download.digest, bytes = resumed.written, "going on with what an interrupted download left");
    Ok(Some(Begun {
        stream,
        total,
        resumed,
    }))
}

async fn begin_again<S: Source>(place: &Place, source: &mut S, total: Option<u64>) -> Result<Begun, Failure> {
    let stream = source.open(0).await.map_err(refused)?;
    if stream.total != total {
        // Clients were told another size.
        return Err(Failure::Broken(UpstreamFailure::Malformed));
    }
    start(place, stream, Attempt::Again).await
}

async fn start(place: &Place, stream: Stream, attempt: Attempt) -> Result<Begun, Failure> {
    let (store, digest, total) = (
        Arc::clone(&place.shared.store),
        place.download.digest,
        stream.total,
    );
    let ingest = match spawn_blocking(move || store.begin(&digest, total)).await {
        Ok(begun) => begun.map_err(Failure::Unstorable)?,
        Err(_) => return Err(Failure::Abandoned),
    };
    place.download.begin(Opened {
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
    Ok(Begun {
        stream,
        total,
        resumed,
    })
}

/// Says also whether the bytes came from more than one answer.
async fn transfer<S: Source>(
    place: &Place,
    source: &mut S,
    begun: Begun,
) -> (Result<(Ingest, Verified), Failure>, bool) {
    let Begun {
        stream,
        total,
        resumed,
    } = begun;
    let (queue, chunks) = mpsc::channel(QUEUE_CHUNKS_MAX);
    let queue = Outgoing::new(queue, &place.shared.queued_bytes);
    let mut receiving = Receiving {
        source,
        queue,
        total,
        received: resumed.written,
        resumed: resumed.written > 0,
        fruitless: 0,
        resumes: 0,
        waiters: &place.download.waiters,
    };
    let writer = Writer::new(resumed, &place.download, total);
    let steps = Arc::clone(&place.shared.write_steps);
    let writing = tokio::spawn(writer.run(chunks, steps));
    let received = receiving.run(stream).await;
    let mended = receiving.resumed;
    // Ends the writer's queue.
    drop(receiving);
    let written = writing.await.unwrap_or(Err(Failure::Abandoned));
    let ended = match received {
        Err(Stopped::Upstream(cause)) => Err(Failure::Broken(cause)),
        Err(Stopped::Unwanted) => Err(Failure::Abandoned),
        Err(Stopped::Writer) | Ok(()) => written,
    };
    let (ingest, verified, size) = match ended {
        Ok(written) => written,
        Err(failure) => return (Err(failure), mended),
    };
    source.verified(size).await;
    place.download.complete(size);
    (Ok((ingest, verified)), mended)
}

/// Makes it durable and gives it its name. The readers have all their bytes already, so a disk that fails now costs a
/// later download and nothing else.
async fn keep(place: &Place, ingest: Ingest, verified: Verified) {
    let kept = spawn_blocking(move || ingest.commit(verified)).await;
    if let Ok(Err(fault)) = kept {
        tracing::error!(digest = %place.download.digest, %fault, "a verified blob could not be kept; it will be fetched again");
    }
    place.leave();
}

fn refused(answer: UpstreamResponse) -> Failure {
    Failure::Refused(Box::new(answer))
}

fn dislikes_ranges(answer: &UpstreamResponse) -> bool {
    matches!(
        answer.kind,
        ResponseKind::Other(_)
            | ResponseKind::Unavailable(UpstreamFailure::Malformed | UpstreamFailure::Status(501))
    )
}
