//! Response bodies. A body that cannot be completed ends with an error and never as if it were complete.

mod byteranges;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body::{Frame, SizeHint};
use quick_cache::sync::Cache;

use crate::blocking;
use crate::download::{DownloadError, Piece, Reader};
use crate::oci::{Digest, Hasher, Repository, UpstreamFailure};
use crate::proxy::StreamedList;
use crate::proxy::passthrough::VerifyingStream;
use crate::store::AsyncStore;
use crate::store::file_read::{BufferPool, READ_CHUNK_BYTES, buffer_bytes, read_blocking, read_nowait};
use crate::store::fs::FsFile;
use crate::telemetry::{BodyEnd, ByteSource, Telemetry};
use crate::upstream::ResponseStream;
use crate::upstream::forward::ForwardResponse;

use crate::server::access_log::AccessLogEntry;
use crate::server::egress::{Account, Charge};
use crate::server::idle_timeout::{IdlePause, IdlePauseGuard};
use crate::server::sendfile::{
    FileSender, RANGE_BYTES_MAX, SENDFILE_BYTES_MIN, SendfileQueue, is_placeholder,
};

pub(in crate::server) use byteranges::{BlobSource, MultipartRanges};

use byteranges::MultipartBody;

/// The body of a response.
pub struct Body {
    source: Source,
    /// The access log entry, written when the body ends.
    record: Option<AccessLogEntry>,
    /// The account for its bytes in memory. Boxed, here and below, because a body is moved several times.
    account: Option<Box<Account>>,
    /// The reservation for the read under way.
    charge: Option<Charge>,
    /// Pauses the idle timeout of the connection.
    idle_pause: Option<IdlePause>,
    /// Held while the body waits for bytes of an upstream, or until it may read.
    idle_paused: Option<IdlePauseGuard>,
    /// Ends the body once its content is blocked.
    block_watch: Option<Box<BlockWatch>>,
}

/// Whether an operator blocks content while it is being sent. Checked before each chunk, in memory.
pub(in crate::server) struct BlockWatch {
    pub(in crate::server) store: AsyncStore,
    pub(in crate::server) upstream: Arc<str>,
    pub(in crate::server) repository: Repository,
    pub(in crate::server) digest: Digest,
}

impl BlockWatch {
    fn is_blocked(&self) -> bool {
        self.store
            .block_of(&self.upstream, &self.repository, &self.digest)
            .is_some()
    }
}

enum Source {
    Memory(Option<Bytes>),
    File(File),
    Sendfile(FileSender, Telemetry),
    Verifying(Box<VerifyingFile>),
    ByteRanges(Box<MultipartBody>),
    Stream {
        stream: ChunkStream,
        size: Option<u64>,
        telemetry: Telemetry,
    },
    Forwarded {
        stream: ChunkStream,
        size: Option<u64>,
    },
}

/// Why a body failed. The client sees the connection end before `Content-Length`.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The file on disk no longer matches its digest. It is quarantined and will be downloaded again.
    #[error("cached blob {0} is corrupt on disk; it is quarantined and will be downloaded again")]
    Corrupt(Digest),
    /// The file could not be read.
    #[error("failed to read a cached blob: {0}")]
    File(#[from] io::Error),
    /// The download failed.
    #[error("{0}")]
    Download(Arc<DownloadError>),
    /// The upstream interrupted the response.
    #[error("the upstream {0}")]
    Upstream(UpstreamFailure),
    /// The operator blocked the content while it was sent.
    #[error("{0} was blocked while it was sent")]
    Blocked(Digest),
}

impl BodyError {
    fn ended(&self) -> BodyEnd {
        match self {
            Self::Corrupt(_) => BodyEnd::Damage,
            Self::File(_) => BodyEnd::Disk,
            Self::Download(failure) if failure.is_disk_error() => BodyEnd::Disk,
            Self::Download(_) | Self::Upstream(_) => BodyEnd::Upstream,
            Self::Blocked(_) => BodyEnd::Blocked,
        }
    }
}

impl Body {
    fn of(source: Source) -> Self {
        Self {
            source,
            record: None,
            account: None,
            charge: None,
            idle_pause: None,
            idle_paused: None,
            block_watch: None,
        }
    }

    /// Ends the body with an error once its content is blocked.
    pub(in crate::server) fn end_when_blocked(&mut self, watch: BlockWatch) {
        self.block_watch = Some(Box::new(watch));
    }

    /// Whether its bytes are charged to the memory budget.
    pub(in crate::server) fn is_charged(&self) -> bool {
        !self.source.is_uncharged()
    }

    /// Charges its bytes in memory to `account`.
    pub(in crate::server) fn charge_to(&mut self, account: Account) {
        self.account = Some(Box::new(account));
    }

    /// Pauses the idle timeout whenever this body waits for an upstream or for its permit.
    pub(in crate::server) fn pause_idle_timeout_by(&mut self, idle_pause: &IdlePause) {
        self.idle_pause = Some(idle_pause.clone());
    }

    /// Attaches the access log entry.
    pub(in crate::server) fn attach_log(&mut self, record: AccessLogEntry) {
        self.record = Some(record);
    }

    /// An empty body.
    pub fn empty() -> Self {
        Self::of(Source::Memory(None))
    }

    /// A body of these bytes.
    pub fn from_bytes(bytes: Bytes) -> Self {
        Self::of(Source::Memory(Some(bytes).filter(|bytes| !bytes.is_empty())))
    }

    /// The range `start..end` of a file.
    pub(in crate::server) fn file(
        file: Arc<dyn FsFile>,
        start: u64,
        end: u64,
        buffers: BufferPool,
        telemetry: Telemetry,
    ) -> Self {
        Self::of(Source::File(File {
            from: file,
            position: start,
            end,
            buffers,
            telemetry,
            waiting: None,
        }))
    }

    /// A range of a file, sent without copying it.
    pub(in crate::server) fn sendfile(sender: FileSender, telemetry: Telemetry) -> Self {
        Self::of(Source::Sendfile(sender, telemetry))
    }

    /// A complete blob that was not verified since the start. It is hashed while it is sent, and its last chunk is
    /// withheld until the digest matches.
    pub(in crate::server) fn verified_file(
        digest: Digest,
        file: Arc<dyn FsFile>,
        size: u64,
        buffers: BufferPool,
        telemetry: Telemetry,
        verified: VerifiedBlobs,
        store: AsyncStore,
    ) -> Self {
        let file = File {
            from: file,
            position: 0,
            end: size,
            buffers,
            telemetry,
            waiting: None,
        };
        let hasher = Some(Hasher::new(digest.algorithm()));
        Self::of(Source::Verifying(Box::new(VerifyingFile {
            digest,
            file,
            hasher,
            verified,
            store,
        })))
    }

    /// Several ranges of a cached blob.
    pub(in crate::server) fn byteranges(plan: MultipartRanges, from: BlobSource) -> Self {
        Self::of(Source::ByteRanges(Box::new(MultipartBody::new(plan, from))))
    }

    /// A forwarded response, of `size` bytes if the registry sent its length.
    pub(in crate::server) fn forwarded(
        passed: ForwardResponse,
        size: Option<u64>,
        telemetry: &Telemetry,
    ) -> Self {
        let stream = stream(
            (passed, telemetry.clone()),
            |(mut passed, telemetry): (ForwardResponse, Telemetry), _| async move {
                let next = passed.chunk().await.map(|next| next.map_err(BodyError::Upstream));
                if let Some(Ok(bytes)) = &next {
                    telemetry.add_bytes_sent(ByteSource::Passed, bytes.len() as u64);
                }
                ((passed, telemetry), next)
            },
        );
        Self::of(Source::Forwarded { stream, size })
    }

    /// A download, of which `size` bytes are sent: without copying them, if the connection has a `queue` and `size` is
    /// known. Without a size the body is chunked, and each chunk would take a system call more for its length.
    pub(in crate::server) fn download(
        reader: Reader,
        size: Option<u64>,
        queue: Option<SendfileQueue>,
        telemetry: Telemetry,
    ) -> Self {
        let queue = queue.filter(|_| size.is_some_and(|size| size >= SENDFILE_BYTES_MIN));
        let stream = match queue {
            Some(queue) => stream(
                (reader, queue),
                |(mut reader, queue): (Reader, SendfileQueue), step_bytes| async move {
                    let next = reader.next_piece(step_bytes, RANGE_BYTES_MAX).await.map(|next| {
                        next.map(|piece| match piece {
                            Piece::Bytes(bytes) => bytes,
                            Piece::Range(range) => queue.push(range),
                        })
                        .map_err(BodyError::Download)
                    });
                    ((reader, queue), next)
                },
            ),
            None => stream(reader, |mut reader: Reader, step_bytes| async move {
                let next = reader.next_within(step_bytes).await;
                (reader, next.map(|next| next.map_err(BodyError::Download)))
            }),
        };
        Self::of(Source::Stream {
            stream,
            size,
            telemetry,
        })
    }

    /// A verified blob that is not stored.
    pub(in crate::server) fn passthrough(
        passing: VerifyingStream,
        size: Option<u64>,
        telemetry: Telemetry,
    ) -> Self {
        let stream = stream(passing, |mut passing: VerifyingStream, _| async move {
            let next = passing.next().await.map(|next| next.map_err(BodyError::Upstream));
            (passing, next)
        });
        Self::of(Source::Stream {
            stream,
            size,
            telemetry,
        })
    }

    /// A list streamed from the upstream, of `size` bytes if it sent its length.
    pub(in crate::server) fn list(list: StreamedList, size: Option<u64>, telemetry: Telemetry) -> Self {
        let stream = stream(list, |mut list: StreamedList, _| async move {
            let next = list.next().await.map(|next| next.map_err(BodyError::Upstream));
            (list, next)
        });
        Self::of(Source::Stream {
            stream,
            size,
            telemetry,
        })
    }

    /// Upstream content without verification.
    pub(in crate::server) fn from_upstream(
        fetched: ResponseStream,
        size: Option<u64>,
        telemetry: Telemetry,
    ) -> Self {
        let stream = stream(fetched, |mut fetched: ResponseStream, _| async move {
            let next = fetched
                .chunk()
                .await
                .map(|next| next.map_err(BodyError::Upstream));
            (fetched, next)
        });
        Self::of(Source::Stream {
            stream,
            size,
            telemetry,
        })
    }
}

impl Body {
    /// The next chunk, read within a reservation and charged to the account.
    fn poll_charged(&mut self, context: &mut Context<'_>) -> Poll<Next> {
        let (Some(account), false) = (&mut self.account, self.source.is_uncharged()) else {
            return self.poll_source(context, READ_CHUNK_BYTES);
        };
        if self.source.is_exhausted() {
            return self.poll_source(context, READ_CHUNK_BYTES);
        }
        let charge = match self.charge.take() {
            Some(charge) => charge,
            None => match account.poll_reserve(context) {
                Poll::Ready(charge) => charge,
                Poll::Pending => {
                    // Another body decides how long this one is queued.
                    let is_queued = account.is_queued();
                    self.pause_idle_timeout(is_queued);
                    return Poll::Pending;
                }
            },
        };
        match self.poll_source(context, charge.bytes()) {
            Poll::Ready(Some(Ok(chunk))) if is_placeholder(&chunk) => Poll::Ready(Some(Ok(chunk))),
            Poll::Ready(Some(Ok(chunk))) => {
                let held = buffer_bytes(chunk.len());
                Poll::Ready(Some(Ok(charge.onto(chunk, held))))
            }
            Poll::Pending => {
                self.charge = self.source.reads_a_file().then_some(charge);
                Poll::Pending
            }
            ended @ Poll::Ready(_) => ended,
        }
    }

    fn poll_source(&mut self, context: &mut Context<'_>, step_bytes: usize) -> Poll<Next> {
        let next = self.source.poll(context, step_bytes);
        let waits_for_upstream =
            next.is_pending() && matches!(self.source, Source::Stream { .. } | Source::Forwarded { .. });
        self.pause_idle_timeout(waits_for_upstream);
        next
    }

    fn pause_idle_timeout(&mut self, is_paused: bool) {
        if !is_paused {
            self.idle_paused = None;
        } else if self.idle_paused.is_none() {
            self.idle_paused = self.idle_pause.as_ref().map(IdlePause::pause);
        }
    }
}

type Next = Option<Result<Bytes, BodyError>>;

/// A stream of chunks whose maximal size is chosen for each read.
type ChunkStream = Pin<Box<dyn PollChunk>>;

trait PollChunk: Send {
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>, step_bytes: usize) -> Poll<Next>;
}

struct Unfold<S, F, W> {
    step: fn(S, usize) -> F,
    now: Option<Pin<Box<F>>>,
    rest: Option<S>,
    _next: std::marker::PhantomData<W>,
}

impl<S: Send + Unpin, F: Future<Output = (S, Next)> + Send> PollChunk for Unfold<S, F, ()> {
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>, step_bytes: usize) -> Poll<Next> {
        let this = self.get_mut();
        if this.now.is_none()
            && let Some(source) = this.rest.take()
        {
            this.now = Some(Box::pin((this.step)(source, step_bytes)));
        }
        let Some(step) = &mut this.now else {
            return Poll::Ready(None);
        };
        let (source, next) = ready!(step.as_mut().poll(context));
        this.now = None;
        // The source is dropped after its end or an error.
        this.rest = matches!(next, Some(Ok(_))).then_some(source);
        Poll::Ready(next)
    }
}

fn stream<S, F>(source: S, step: fn(S, usize) -> F) -> ChunkStream
where
    S: Send + Unpin + 'static,
    F: Future<Output = (S, Next)> + Send + 'static,
{
    Box::pin(Unfold {
        step,
        now: None,
        rest: Some(source),
        _next: std::marker::PhantomData::<()>,
    })
}

/// Blobs whose files were read and verified since the start. Other blobs are hashed while they are sent, unless their
/// file is open since they were downloaded, a few minutes ago. So bit rot on disk reaches no client as a complete blob.
#[derive(Clone)]
pub struct VerifiedBlobs(Arc<Cache<Digest, ()>>);

/// Verified blobs remembered. An evicted entry costs one more hash.
const VERIFIED_MAX: usize = 65_536;

impl Default for VerifiedBlobs {
    fn default() -> Self {
        Self(Arc::new(Cache::new(VERIFIED_MAX)))
    }
}

impl VerifiedBlobs {
    pub(in crate::server) fn contains(&self, digest: &Digest) -> bool {
        self.0.get(digest).is_some()
    }
}

struct VerifyingFile {
    digest: Digest,
    file: File,
    hasher: Option<Hasher>,
    verified: VerifiedBlobs,
    store: AsyncStore,
}

impl VerifyingFile {
    /// The last chunk is returned after the digest matched.
    fn poll(&mut self, context: &mut Context<'_>, step_bytes: usize) -> Poll<Next> {
        let Some(hasher) = &mut self.hasher else {
            return Poll::Ready(None);
        };
        match ready!(self.file.poll(context, step_bytes)) {
            Some(Ok(bytes)) => {
                hasher.update(&bytes);
                if self.file.position < self.file.end {
                    return Poll::Ready(Some(Ok(bytes)));
                }
                Poll::Ready(self.end(Some(bytes)))
            }
            Some(Err(error)) => {
                self.hasher = None;
                Poll::Ready(Some(Err(error.into())))
            }
            // An empty blob has no last chunk.
            None => Poll::Ready(self.end(None)),
        }
    }

    fn end(&mut self, last: Option<Bytes>) -> Next {
        let hasher = self.hasher.take()?;
        if hasher.finish() == self.digest {
            self.verified.0.insert(self.digest, ());
            return last.map(Ok);
        }
        tracing::error!(digest = %self.digest, "corrupt blob quarantined");
        let (store, digest) = (self.store.clone(), self.digest);
        tokio::spawn(async move { store.write(move |store| store.quarantine_blob(&digest)).await });
        Some(Err(BodyError::Corrupt(self.digest)))
    }
}

struct File {
    from: Arc<dyn FsFile>,
    position: u64,
    end: u64,
    buffers: BufferPool,
    telemetry: Telemetry,
    waiting: Option<BoxFuture<'static, io::Result<Bytes>>>,
}

impl File {
    /// Reads in place if the page cache has the bytes, and on a blocking thread otherwise.
    fn poll(&mut self, context: &mut Context<'_>, step_bytes: usize) -> Poll<Option<io::Result<Bytes>>> {
        if self.position >= self.end {
            return Poll::Ready(None);
        }
        let wanted = usize::try_from(self.end - self.position)
            .unwrap_or(step_bytes)
            .min(step_bytes);
        let read = match &mut self.waiting {
            Some(waiting) => {
                let read = ready!(waiting.as_mut().poll(context));
                self.waiting = None;
                read
            }
            None => read_nowait(self.from.as_ref(), self.position, wanted, &self.buffers),
        };
        match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let (file, buffers, position) = (Arc::clone(&self.from), self.buffers.clone(), self.position);
                let read = move || read_blocking(file.as_ref(), position, wanted, &buffers);
                let waiting = self.waiting.insert(blocking::read_file(read));
                let read = ready!(waiting.as_mut().poll(context));
                self.waiting = None;
                Poll::Ready(Some(self.advance(read)))
            }
            read => Poll::Ready(Some(self.advance(read))),
        }
    }

    fn advance(&mut self, read: io::Result<Bytes>) -> io::Result<Bytes> {
        let bytes = read?;
        self.position += bytes.len() as u64;
        self.telemetry
            .add_bytes_sent(ByteSource::Disk, bytes.len() as u64);
        Ok(bytes)
    }
}

impl Source {
    fn poll(&mut self, context: &mut Context<'_>, step_bytes: usize) -> Poll<Next> {
        let next = match self {
            Self::Memory(bytes) => bytes.take().map(Ok),
            Self::File(file) => {
                ready!(file.poll(context, step_bytes)).map(|read| read.map_err(BodyError::File))
            }
            Self::Sendfile(sender, telemetry) => {
                let next = ready!(sender.poll(context));
                if let Some(Ok(range)) = &next {
                    telemetry.add_bytes_sent(ByteSource::Disk, range.len() as u64);
                }
                next.map(|next| next.map_err(BodyError::File))
            }
            Self::Verifying(checked) => ready!(checked.poll(context, step_bytes)),
            Self::ByteRanges(parts) => {
                ready!(parts.poll(context, step_bytes)).map(|read| read.map_err(BodyError::File))
            }
            Self::Stream {
                stream,
                size,
                telemetry,
            } => {
                let next = ready!(stream.as_mut().poll(context, step_bytes));
                if let Some(Ok(bytes)) = &next {
                    let length = bytes.len() as u64;
                    *size = size.map(|size| size.saturating_sub(length));
                    telemetry.add_bytes_sent(ByteSource::Download, length);
                }
                next
            }
            Self::Forwarded { stream, size } => {
                let next = ready!(stream.as_mut().poll(context, step_bytes));
                if let Some(Ok(bytes)) = &next {
                    *size = size.map(|size| size.saturating_sub(bytes.len() as u64));
                }
                next
            }
        };
        Poll::Ready(next)
    }

    /// Whether its bytes are not charged to the memory budget: they are in memory in any case, or never.
    fn is_uncharged(&self) -> bool {
        match self {
            Self::Memory(_) | Self::Sendfile(..) => true,
            Self::ByteRanges(parts) => parts.is_in_memory(),
            _ => false,
        }
    }

    fn is_at_end(&self) -> bool {
        match self {
            Self::Memory(bytes) => bytes.is_none(),
            Self::File(file) => file.position >= file.end,
            Self::Sendfile(sender, _) => sender.left() == 0,
            Self::Verifying(checked) => checked.hasher.is_none(),
            Self::ByteRanges(parts) => parts.left() == 0,
            Self::Stream { .. } | Self::Forwarded { .. } => false,
        }
    }

    /// Whether a pending read needs its reservation. A file read does; waiting for an upstream does not.
    fn reads_a_file(&self) -> bool {
        matches!(self, Self::File(_) | Self::Verifying(_) | Self::ByteRanges(_))
    }

    /// Whether all bytes of a known length were returned. hyper then polls no further.
    fn is_exhausted(&self) -> bool {
        match self {
            Self::Stream { size, .. } | Self::Forwarded { size, .. } => *size == Some(0),
            _ => self.is_at_end(),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let blocked = self.block_watch.take_if(|watch| watch.is_blocked());
        let next = match blocked {
            Some(watch) => {
                self.source = Source::Memory(None);
                Some(Err(BodyError::Blocked(watch.digest)))
            }
            None => ready!(self.poll_charged(context)),
        };
        let Self { source, record, .. } = &mut *self;
        if let Some(record) = record {
            match &next {
                Some(Ok(bytes)) => {
                    record.add_bytes(bytes.len());
                    // Written before the last bytes are sent, so that a client with its response finds the record.
                    if source.is_exhausted() {
                        record.end(BodyEnd::Complete, None);
                    }
                }
                Some(Err(broken)) => record.end(broken.ended(), Some(broken)),
                None => record.end(BodyEnd::Complete, None),
            }
        }
        Poll::Ready(next.map(|next| next.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.source.is_at_end()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Memory(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Source::File(file) => SizeHint::with_exact(file.end.saturating_sub(file.position)),
            Source::Sendfile(sender, _) => SizeHint::with_exact(sender.left()),
            Source::Verifying(checked) => {
                SizeHint::with_exact(checked.file.end.saturating_sub(checked.file.position))
            }
            Source::ByteRanges(parts) => SizeHint::with_exact(parts.left()),
            Source::Stream { size: Some(size), .. } | Source::Forwarded { size: Some(size), .. } => {
                SizeHint::with_exact(*size)
            }
            Source::Stream { size: None, .. } | Source::Forwarded { size: None, .. } => SizeHint::default(),
        }
    }
}
