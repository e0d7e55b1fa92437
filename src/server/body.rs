//! Bytes on their way to a client. A body that cannot be finished breaks; it never ends cleanly short.

mod parts;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use quick_cache::sync::Cache;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::download::{DownloadError, Reader};
use crate::oci::{Digest, Hasher, UpstreamFailure};
use crate::proxy::StreamedList;
use crate::proxy::passthrough::VerifyingStream;
use crate::store::AsyncStore;
use crate::store::file_read::{BufferPool, READ_CHUNK_BYTES, buffer_bytes, read_blocking, read_nowait};
use crate::store::fs::FsFile;
use crate::telemetry::{BodyEnd, ByteSource, Telemetry};
use crate::upstream::ResponseStream;
use crate::upstream::forward::ForwardResponse;

use super::egress::{Account, Charge};
use super::idle::{Pardon, Pardoned};
use super::record::Open;

pub(super) use parts::{From as PartsFrom, Plan};

use parts::Parts;

/// The body of an answer.
pub struct Body {
    kind: Kind,
    /// The access record, written when the body has ended.
    record: Option<Open>,
    /// What it has in memory.
    account: Option<Account>,
    /// For the step under way.
    charge: Option<Charge>,
    /// Of the connection that it is sent on.
    pardon: Option<Pardon>,
    /// Held while the bytes are waited for, so that the connection is not taken for stalled.
    pardoned: Option<Pardoned>,
}

enum Kind {
    Whole(Option<Bytes>),
    File(File),
    Checked(Box<Checked>),
    Parts(Box<Parts>),
    Flow {
        flow: Flow,
        size: Option<u64>,
        telemetry: Telemetry,
    },
    Passed {
        flow: Flow,
        size: Option<u64>,
    },
}

/// Why a body broke. The client sees a connection that ends before its length.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The file no longer holds what was written: the disk changed it. It was set aside, to be fetched again.
    #[error("the held bytes of {0} are not what was written; they are set aside and will be fetched again")]
    Rotten(Digest),
    /// The file could not be read.
    #[error("reading a held blob failed: {0}")]
    File(#[from] io::Error),
    /// The download it followed failed.
    #[error("{0}")]
    Download(Arc<DownloadError>),
    /// The upstream broke off.
    #[error("the upstream {0}")]
    Upstream(UpstreamFailure),
}

impl Broken {
    fn ended(&self) -> BodyEnd {
        match self {
            Self::Rotten(_) => BodyEnd::Damage,
            Self::File(_) => BodyEnd::Disk,
            Self::Download(failure) if failure.is_disk_error() => BodyEnd::Disk,
            Self::Download(_) | Self::Upstream(_) => BodyEnd::Upstream,
        }
    }
}

impl Body {
    fn of(kind: Kind) -> Self {
        Self {
            kind,
            record: None,
            account: None,
            charge: None,
            pardon: None,
            pardoned: None,
        }
    }

    /// From now on, what it reads is counted on `account`.
    pub(super) fn count(&mut self, account: Account) {
        self.account = Some(account);
    }

    /// From now on the connection may be quiet while this body waits for an upstream.
    pub(super) fn pardon_by(&mut self, pardon: &Pardon) {
        self.pardon = Some(pardon.clone());
    }

    /// From now on, `record` goes with this body, and is written when it ends.
    pub(super) fn record(&mut self, record: Open) {
        self.record = Some(record);
    }

    /// No bytes.
    pub fn empty() -> Self {
        Self::of(Kind::Whole(None))
    }

    /// These bytes.
    pub fn whole(bytes: Bytes) -> Self {
        Self::of(Kind::Whole(Some(bytes).filter(|bytes| !bytes.is_empty())))
    }

    /// The bytes of `file` from `start` up to, not including, `end`.
    pub(super) fn file(
        file: Arc<dyn FsFile>,
        start: u64,
        end: u64,
        buffers: BufferPool,
        telemetry: Telemetry,
    ) -> Self {
        Self::of(Kind::File(File {
            from: file,
            position: start,
            end,
            buffers,
            telemetry,
            waiting: None,
        }))
    }

    /// A whole blob that this process has not read before: hashed on the way, its end withheld until it is right.
    pub(super) fn checked(
        digest: Digest,
        file: Arc<dyn FsFile>,
        size: u64,
        buffers: BufferPool,
        telemetry: Telemetry,
        sound: Sound,
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
        Self::of(Kind::Checked(Box::new(Checked {
            digest,
            file,
            hasher,
            sound,
            store,
        })))
    }

    /// Several parts of a held blob.
    pub(super) fn parts(plan: Plan, from: PartsFrom) -> Self {
        Self::of(Kind::Parts(Box::new(Parts::new(plan, from))))
    }

    /// What is handed back, of `size` bytes if that was said.
    pub(super) fn passed(passed: ForwardResponse, size: Option<u64>, telemetry: &Telemetry) -> Self {
        let flow = flow(
            (passed, telemetry.clone()),
            |(mut passed, telemetry): (ForwardResponse, Telemetry), _| async move {
                let next = passed.chunk().await.map(|next| next.map_err(Broken::Upstream));
                if let Some(Ok(bytes)) = &next {
                    telemetry.add_bytes_sent(ByteSource::Passed, bytes.len() as u64);
                }
                ((passed, telemetry), next)
            },
        );
        Self::of(Kind::Passed { flow, size })
    }

    /// What a download brings, of which `size` bytes are wanted.
    pub(super) fn download(reader: Reader, size: Option<u64>, telemetry: Telemetry) -> Self {
        let flow = flow(reader, |mut reader: Reader, step_bytes| async move {
            let next = reader
                .next_within(step_bytes)
                .await
                .map(|next| next.map_err(Broken::Download));
            (reader, next)
        });
        Self::of(Kind::Flow {
            flow,
            size,
            telemetry,
        })
    }

    /// What passes through unstored but verified.
    pub(super) fn passing(passing: VerifyingStream, size: Option<u64>, telemetry: Telemetry) -> Self {
        let flow = flow(passing, |mut passing: VerifyingStream, _| async move {
            let next = passing.next().await.map(|next| next.map_err(Broken::Upstream));
            (passing, next)
        });
        Self::of(Kind::Flow {
            flow,
            size,
            telemetry,
        })
    }

    /// A list that passes through, of `size` bytes if that was said.
    pub(super) fn long_list(list: StreamedList, size: Option<u64>, telemetry: Telemetry) -> Self {
        let flow = flow(list, |mut list: StreamedList, _| async move {
            let next = list.next().await.map(|next| next.map_err(Broken::Upstream));
            (list, next)
        });
        Self::of(Kind::Flow {
            flow,
            size,
            telemetry,
        })
    }

    /// What passes through as it is.
    pub(super) fn fetched(fetched: ResponseStream, size: Option<u64>, telemetry: Telemetry) -> Self {
        let flow = flow(fetched, |mut fetched: ResponseStream, _| async move {
            let next = fetched.chunk().await.map(|next| next.map_err(Broken::Upstream));
            (fetched, next)
        });
        Self::of(Kind::Flow {
            flow,
            size,
            telemetry,
        })
    }
}

impl Body {
    /// The next chunk, read within the budget and counted on it.
    fn poll_step(&mut self, context: &mut Context<'_>) -> Poll<Next> {
        let (Some(account), false) = (&mut self.account, self.kind.is_in_memory()) else {
            return self.poll_source(context, READ_CHUNK_BYTES);
        };
        if self.kind.is_spent() {
            return self.poll_source(context, READ_CHUNK_BYTES);
        }
        let charge = match self.charge.take() {
            Some(charge) => charge,
            None => ready!(account.poll_reserve(context)),
        };
        match self.poll_source(context, charge.bytes()) {
            Poll::Ready(Some(Ok(chunk))) => {
                let held = buffer_bytes(chunk.len());
                Poll::Ready(Some(Ok(charge.onto(chunk, held))))
            }
            Poll::Pending => {
                self.charge = self.kind.reads_a_file().then_some(charge);
                Poll::Pending
            }
            ended @ Poll::Ready(_) => ended,
        }
    }

    fn poll_source(&mut self, context: &mut Context<'_>, step_bytes: usize) -> Poll<Next> {
        let next = self.kind.poll(context, step_bytes);
        let awaits_upstream =
            next.is_pending() && matches!(self.kind, Kind::Flow { .. } | Kind::Passed { .. });
        if !awaits_upstream {
            self.pardoned = None;
        } else if self.pardoned.is_none() {
            self.pardoned = self.pardon.as_ref().map(Pardon::hold);
        }
        next
    }
}

type Next = Option<Result<Bytes, Broken>>;

/// A source of bytes that is asked anew for each step, as one value to poll.
type Flow = Pin<Box<dyn FlowState>>;

trait FlowState: Send {
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>, step_bytes: usize) -> Poll<Next>;
}

struct Steps<S, F, W> {
    step: fn(S, usize) -> F,
    now: Option<Pin<Box<F>>>,
    rest: Option<S>,
    _next: std::marker::PhantomData<W>,
}

impl<S: Send + Unpin, F: Future<Output = (S, Next)> + Send> FlowState for Steps<S, F, ()> {
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
        // After an end or an error there is nothing more to ask for.
        this.rest = matches!(next, Some(Ok(_))).then_some(source);
        Poll::Ready(next)
    }
}

fn flow<S, F>(source: S, step: fn(S, usize) -> F) -> Flow
where
    S: Send + Unpin + 'static,
    F: Future<Output = (S, Next)> + Send + 'static,
{
    Box::pin(Steps {
        step,
        now: None,
        rest: Some(source),
        _next: std::marker::PhantomData::<()>,
    })
}

/// The blobs whose files this process has read whole and found right. What is not here is hashed on its way out, so that
/// what rotted while nobody looked reaches no client whole.
#[derive(Clone)]
pub struct Sound(Arc<Cache<Digest, ()>>);

/// Blobs remembered as sound; a forgotten one is hashed once more.
const SOUND_MAX: usize = 65_536;

impl Default for Sound {
    fn default() -> Self {
        Self(Arc::new(Cache::new(SOUND_MAX)))
    }
}

impl Sound {
    pub(super) fn knows(&self, digest: &Digest) -> bool {
        self.0.get(digest).is_some()
    }
}

struct Checked {
    digest: Digest,
    file: File,
    hasher: Option<Hasher>,
    sound: Sound,
    store: AsyncStore,
}

impl Checked {
    /// The last step is given once the whole was found right.
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
            // Without a byte, it has no last step.
            None => Poll::Ready(self.end(None)),
        }
    }

    fn end(&mut self, last: Option<Bytes>) -> Next {
        let hasher = self.hasher.take()?;
        if hasher.finish() == self.digest {
            self.sound.0.insert(self.digest, ());
            return last.map(Ok);
        }
        tracing::error!(digest = %self.digest, "a held blob rotted on the disk; it is set aside");
        let (store, digest) = (self.store.clone(), self.digest);
        tokio::spawn(async move { store.write(move |store| store.quarantine_blob(&digest)).await });
        Some(Err(Broken::Rotten(self.digest)))
    }
}

struct File {
    from: Arc<dyn FsFile>,
    position: u64,
    end: u64,
    buffers: BufferPool,
    telemetry: Telemetry,
    waiting: Option<JoinHandle<io::Result<Bytes>>>,
}

impl File {
    /// Reads here while the kernel has the bytes; waits elsewhere when it does not.
    fn poll(&mut self, context: &mut Context<'_>, step_bytes: usize) -> Poll<Option<io::Result<Bytes>>> {
        if self.position >= self.end {
            return Poll::Ready(None);
        }
        let wanted = usize::try_from(self.end - self.position)
            .unwrap_or(step_bytes)
            .min(step_bytes);
        let read = match &mut self.waiting {
            Some(waiting) => {
                let read = ready!(Pin::new(waiting).poll(context));
                self.waiting = None;
                read.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))
            }
            None => read_nowait(self.from.as_ref(), self.position, wanted, &self.buffers),
        };
        match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let (file, buffers, position) = (Arc::clone(&self.from), self.buffers.clone(), self.position);
                let read = move || read_blocking(file.as_ref(), position, wanted, &buffers);
                let waiting = self.waiting.insert(spawn_blocking(read));
                let read = ready!(Pin::new(waiting).poll(context));
                self.waiting = None;
                Poll::Ready(Some(
                    self.advance(read.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))),
                ))
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

impl Kind {
    fn poll(&mut self, context: &mut Context<'_>, step_bytes: usize) -> Poll<Next> {
        let next = match self {
            Self::Whole(bytes) => bytes.take().map(Ok),
            Self::File(file) => ready!(file.poll(context, step_bytes)).map(|read| read.map_err(Broken::File)),
            Self::Checked(checked) => ready!(checked.poll(context, step_bytes)),
            Self::Parts(parts) => {
                ready!(parts.poll(context, step_bytes)).map(|read| read.map_err(Broken::File))
            }
            Self::Flow {
                flow,
                size,
                telemetry,
            } => {
                let next = ready!(flow.as_mut().poll(context, step_bytes));
                if let Some(Ok(bytes)) = &next {
                    let length = bytes.len() as u64;
                    *size = size.map(|size| size.saturating_sub(length));
                    telemetry.add_bytes_sent(ByteSource::Download, length);
                }
                next
            }
            Self::Passed { flow, size } => {
                let next = ready!(flow.as_mut().poll(context, step_bytes));
                if let Some(Ok(bytes)) = &next {
                    *size = size.map(|size| size.saturating_sub(bytes.len() as u64));
                }
                next
            }
        };
        Poll::Ready(next)
    }

    /// Whether its bytes are in memory for others too.
    fn is_in_memory(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Parts(parts) => parts.is_in_memory(),
            _ => false,
        }
    }

    fn is_at_end(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::File(file) => file.position >= file.end,
            Self::Checked(checked) => checked.hasher.is_none(),
            Self::Parts(parts) => parts.left() == 0,
            Self::Flow { .. } | Self::Passed { .. } => false,
        }
    }

    /// Whether a step under way needs memory before it ends: what comes from the disk does, what an upstream has not sent
    /// yet does not.
    fn reads_a_file(&self) -> bool {
        matches!(self, Self::File(_) | Self::Checked(_) | Self::Parts(_))
    }

    /// Whether every byte of a length that was stated has been given: the connection then asks for no further one.
    fn is_spent(&self) -> bool {
        match self {
            Self::Flow { size, .. } | Self::Passed { size, .. } => *size == Some(0),
            _ => self.is_at_end(),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let next = ready!(self.poll_step(context));
        let Self { kind, record, .. } = &mut *self;
        if let Some(record) = record {
            match &next {
                Some(Ok(bytes)) => {
                    record.sent(bytes.len());
                    // Written before the last bytes leave: whoever has them finds the record.
                    if kind.is_spent() {
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
        self.kind.is_at_end()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Kind::File(file) => SizeHint::with_exact(file.end.saturating_sub(file.position)),
            Kind::Checked(checked) => {
                SizeHint::with_exact(checked.file.end.saturating_sub(checked.file.position))
            }
            Kind::Parts(parts) => SizeHint::with_exact(parts.left()),
            Kind::Flow { size: Some(size), .. } | Kind::Passed { size: Some(size), .. } => {
                SizeHint::with_exact(*size)
            }
            Kind::Flow { size: None, .. } | Kind::Passed { size: None, .. } => SizeHint::default(),
        }
    }
}
