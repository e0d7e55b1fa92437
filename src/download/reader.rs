//! Reader of a blob while it is downloaded.
//!
//! A reader waits when it has caught up with the transfer. If its range lies far ahead, it has a connection of the transfer
//! opened there, and reads that segment as it is written. If the transfer has one connection only, or the range is small, it
//! fetches the range from the upstream with its own credential (see [`RangeSource`]). Those bytes go to this reader only. They are
//! neither stored nor verified, as a range cannot be verified by itself; the same holds for a range read from
//! an incomplete file. A client that requests ranges assembles and verifies the blob itself, or has a digest
//! per range, as lazy pullers do. A complete blob is never served this way.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

use super::parallel::{ReaderRange, ReaderSegments, Segment, SegmentBytes};
use super::state::{Attempt, Download, DownloadInfo, Progress};
use super::{ByteStream, DownloadError, RangeSource, Shared, VerifyingStream, WITHHELD_BYTES};
use crate::oci::{Digest, UpstreamFailure};
use crate::queue::{Waiter, Waiters};
use crate::store::StoreError;
use crate::store::file_read::{BufferPool, FileRange, READ_CHUNK_BYTES, read_chunk};
use crate::store::fs::FsFile;

/// A range that begins this far beyond the received bytes is fetched separately.
pub const FAR_AHEAD_BYTES: u64 = 8 * 1024 * 1024;

/// A longer range waits for the transfer, because fetching its bytes twice would cost the upstream too much.
pub const AHEAD_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// A shorter range far ahead is fetched for its reader only: it costs little, and the reader has its bytes sooner.
const SEGMENT_RANGE_BYTES_MIN: u64 = 1024 * 1024;

/// Pause between two attempts to open a segment. Each enters the queue for a permit.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// Reads a blob while it is downloaded.
pub struct Reader {
    /// Boxed, because readers are moved by value.
    pub(super) digest: Box<Digest>,
    /// Whether this reader's own request leads the download.
    pub(super) leads: bool,
    pub(super) progress: watch::Receiver<Progress>,
    buffers: BufferPool,
    pub(super) position: u64,
    pub(super) end: Option<u64>,
    step_bytes: usize,
    /// File that the reader got its bytes from.
    pub(super) served_attempt: Option<Attempt>,
    pub(super) ahead: Option<Box<dyn RangeSource>>,
    pub(super) ahead_permits: Arc<Semaphore>,
    pub(super) ahead_range: Option<AheadRange>,
    pub(super) remainder: Option<Box<RemainderStream>>,
    /// Never fetches a range far ahead, or has already tried.
    waits_for_fill: bool,
    in_segments: Box<SegmentReading>,
    waiters: Waiters,
    _waiter: Option<Waiter>,
}

/// How a reader of a range uses the segments of the transfer. Boxed, because readers are moved by value.
#[derive(Default)]
struct SegmentReading {
    /// The client most likely disconnects before the end of its range.
    is_open_ended: bool,
    /// Length of the range, if the reader is restricted to one.
    range_bytes: Option<u64>,
    segments: Arc<Mutex<Option<Arc<ReaderSegments>>>>,
    /// The segment that is read.
    segment: Option<Arc<Segment>>,
    /// Offset at which a segment was requested last.
    requested_at: Option<u64>,
    /// When none was opened last, for lack of a permit, for example.
    refused_at: Option<Instant>,
}

/// A range that is fetched for this reader only.
pub(super) struct AheadRange {
    body: Box<dyn ByteStream>,
    until: u64,
    _permit: OwnedSemaphorePermit,
}

impl AheadRange {
    pub(super) fn new(body: Box<dyn ByteStream>, until: u64, permit: OwnedSemaphorePermit) -> Self {
        Self {
            body,
            until,
            _permit: permit,
        }
    }
}

/// The remainder of a blob, fetched for this reader only.
pub(super) struct RemainderStream {
    pub(super) verifying: VerifyingStream,
    pub(super) _permit: Option<OwnedSemaphorePermit>,
}

/// Next step of a reader without a download.
pub(super) enum FallbackStep {
    /// Bytes from the file.
    Read(Bytes),
    /// The missing bytes were requested.
    Asked,
    /// The reader has everything.
    End,
}

/// The next part of a blob.
pub enum Piece {
    /// Bytes in memory.
    Bytes(Bytes),
    /// A range of a file.
    Range(FileRange),
}

enum Step {
    Bytes(Bytes),
    /// The file has the bytes from the position up to this one.
    File(Arc<dyn FsFile>, u64),
}

enum ReadState {
    Readable(Arc<dyn FsFile>, u64),
    Wait { readable: u64 },
    End,
    Failed(Arc<DownloadError>),
}

impl Reader {
    pub(super) fn new(download: &Download, shared: &Shared, waiter: Option<Waiter>) -> Self {
        Self {
            digest: Box::new(download.digest),
            leads: false,
            progress: download.progress.subscribe(),
            buffers: shared.buffers.clone(),
            position: 0,
            end: None,
            step_bytes: READ_CHUNK_BYTES,
            served_attempt: None,
            ahead: None,
            ahead_permits: Arc::clone(&shared.ahead_permits),
            ahead_range: None,
            remainder: None,
            waits_for_fill: false,
            in_segments: Box::new(SegmentReading {
                segments: Arc::clone(&download.segments),
                ..SegmentReading::default()
            }),
            waiters: download.waiters.clone(),
            _waiter: waiter,
        }
    }

    /// Another reader of the same download, for its first `length` bytes.
    #[must_use]
    pub fn head_reader(&self, length: u64) -> Self {
        Self {
            digest: self.digest.clone(),
            leads: false,
            progress: self.progress.clone(),
            buffers: self.buffers.clone(),
            position: 0,
            end: Some(length),
            step_bytes: READ_CHUNK_BYTES,
            served_attempt: None,
            ahead: None,
            ahead_permits: Arc::clone(&self.ahead_permits),
            ahead_range: None,
            remainder: None,
            waits_for_fill: true,
            in_segments: Box::default(),
            waiters: self.waiters.clone(),
            _waiter: None,
        }
    }

    /// Whether the download waits for a permit.
    pub fn is_queued(&self) -> bool {
        self.waiters.is_queued()
    }

    /// Waits for the upstream's first response.
    pub async fn info(&mut self) -> Result<DownloadInfo, Arc<DownloadError>> {
        let has_started = |progress: &Progress| !matches!(progress, Progress::Opening);
        match self.progress.wait_for(has_started).await.as_deref() {
            Ok(Progress::Filling(opened, _) | Progress::Complete(opened, _)) => Ok(opened.clone()),
            Ok(Progress::Failed(failure)) => Err(Arc::clone(failure)),
            Ok(Progress::Opening) | Err(_) => Err(Arc::new(DownloadError::Abandoned)),
        }
    }

    /// Waits until bytes are readable, or the download has ended.
    pub async fn first_bytes(&mut self) -> Result<(), Arc<DownloadError>> {
        let some = |progress: &Progress| match progress {
            Progress::Opening => false,
            Progress::Filling(_, readable) => *readable > 0,
            Progress::Complete(..) | Progress::Failed(_) => true,
        };
        match self.progress.wait_for(some).await.as_deref() {
            Ok(Progress::Failed(failure)) => Err(Arc::clone(failure)),
            Ok(_) => Ok(()),
            Err(_) => Err(Arc::new(DownloadError::Abandoned)),
        }
    }

    /// Waits for the end of the download and returns the verified size.
    pub async fn settled(&mut self) -> Result<u64, Arc<DownloadError>> {
        match self.progress.wait_for(Progress::is_over).await.as_deref() {
            Ok(Progress::Failed(failure)) => Err(Arc::clone(failure)),
            Ok(Progress::Complete(_, size)) => Ok(*size),
            Ok(Progress::Opening | Progress::Filling(..)) | Err(_) => Err(Arc::new(DownloadError::Abandoned)),
        }
    }

    /// Restricts the reader to the bytes from `start` up to, not including, `end`.
    #[must_use]
    pub fn within(mut self, start: u64, end: u64) -> Self {
        self.position = start;
        self.end = Some(end);
        self.in_segments.range_bytes = Some(end.saturating_sub(start));
        self
    }

    /// Sets the source for ranges far ahead.
    #[must_use]
    pub fn with_range_source(mut self, ahead: impl RangeSource) -> Self {
        self.ahead = Some(Box::new(ahead));
        self
    }

    /// Makes the reader use no connection of its own, however far ahead its range lies: only those of the transfer. For
    /// ranges without an end: most clients that send one read a little of it and disconnect.
    #[must_use]
    pub fn waiting_for_fill(mut self) -> Self {
        self.waits_for_fill = true;
        self.in_segments.is_open_ended = true;
        self
    }

    /// The next bytes, as soon as there are any, or `None` at the end. Nothing follows an error.
    pub async fn next(&mut self) -> Option<Result<Bytes, Arc<DownloadError>>> {
        self.next_within(READ_CHUNK_BYTES).await
    }

    /// As [`Self::next`], with at most `step_bytes` of the file.
    pub async fn next_within(&mut self, step_bytes: usize) -> Option<Result<Bytes, Arc<DownloadError>>> {
        self.step_bytes = step_bytes;
        Some(match self.next_step().await? {
            Ok(Step::Bytes(bytes)) => Ok(bytes),
            Ok(Step::File(file, until)) => self.read(&file, until).await,
            Err(failure) => Err(failure),
        })
    }

    /// As [`Self::next_within`], but a range of the file, of at most `range_bytes`, is returned without reading it. The
    /// page cache has it.
    pub async fn next_piece(
        &mut self,
        step_bytes: usize,
        range_bytes: usize,
    ) -> Option<Result<Piece, Arc<DownloadError>>> {
        self.step_bytes = step_bytes;
        Some(match self.next_step().await? {
            Ok(Step::Bytes(bytes)) => Ok(Piece::Bytes(bytes)),
            Ok(Step::File(file, until)) => self.range(file, until, range_bytes).await.map(Piece::Range),
            Err(failure) => Err(failure),
        })
    }

    async fn next_step(&mut self) -> Option<Result<Step, Arc<DownloadError>>> {
        loop {
            if let Some(remainder) = &mut self.remainder {
                let next = remainder.verifying.next().await?;
                let next = next.map_err(|cause| Arc::new(DownloadError::Interrupted(cause)));
                return Some(next.map(Step::Bytes));
            }
            if let Some(bytes) = self.next_ahead().await {
                return Some(Ok(Step::Bytes(bytes)));
            }
            let readable = match self.read_state() {
                ReadState::Readable(file, until) => return Some(Ok(Step::File(file, until))),
                ReadState::Failed(failure) => match self.continue_from_upstream(&failure).await {
                    Ok(FallbackStep::Asked) => continue,
                    Ok(FallbackStep::Read(bytes)) => return Some(Ok(Step::Bytes(bytes))),
                    Ok(FallbackStep::End) => return None,
                    Err(failure) => return Some(Err(failure)),
                },
                ReadState::End => return None,
                ReadState::Wait { readable } => readable,
            };
            match self.segment_bytes() {
                Some((file, SegmentBytes::Readable(until))) => return Some(Ok(Step::File(file, until))),
                Some((_, SegmentBytes::Arriving(mut segment))) => {
                    tokio::select! {
                        changed = self.progress.changed() => if changed.is_err() {
                            return Some(Err(Arc::new(DownloadError::Abandoned)));
                        },
                        _ = segment.changed() => {}
                    }
                    continue;
                }
                _ => {}
            }
            if self.is_far_ahead(readable) && self.open_ahead().await {
                continue;
            }
            if self.progress.changed().await.is_err() {
                return Some(Err(Arc::new(DownloadError::Abandoned)));
            }
        }
    }

    fn read_state(&mut self) -> ReadState {
        let (opened, readable, complete) = match &*self.progress.borrow_and_update() {
            Progress::Failed(failure) => return ReadState::Failed(Arc::clone(failure)),
            Progress::Opening => return ReadState::Wait { readable: 0 },
            Progress::Filling(opened, readable) => (opened.clone(), *readable, false),
            Progress::Complete(opened, size) => (opened.clone(), *size, true),
        };
        if self
            .served_attempt
            .is_some_and(|attempt| attempt != opened.attempt)
        {
            // Its bytes came from a file with a wrong digest.
            return ReadState::Failed(Arc::new(DownloadError::Interrupted(
                UpstreamFailure::DigestMismatch,
            )));
        }
        let until = self.end.map_or(readable, |end| readable.min(end));
        if until > self.position {
            self.served_attempt = Some(opened.attempt);
            return ReadState::Readable(opened.file, until);
        }
        if complete || self.end.is_some_and(|end| self.position >= end) {
            return ReadState::End;
        }
        ReadState::Wait { readable }
    }

    /// The bytes at the position in a segment of the transfer, and the file. `None`: the front brings them, or a request of
    /// the reader's own.
    fn segment_bytes(&mut self) -> Option<(Arc<dyn FsFile>, SegmentBytes)> {
        let range_bytes = self
            .in_segments
            .range_bytes
            .filter(|bytes| *bytes >= SEGMENT_RANGE_BYTES_MIN)?;
        let opened = match &*self.progress.borrow() {
            Progress::Filling(opened, _) if opened.attempt == Attempt::First => opened.clone(),
            _ => return None,
        };
        let is_short = range_bytes <= AHEAD_BYTES_MAX && !self.in_segments.is_open_ended;
        let withheld = if is_short { 0 } else { WITHHELD_BYTES };
        let end = self.end?.min(opened.size?.saturating_sub(withheld));
        if self.position >= end {
            return None;
        }
        loop {
            if let Some(segment) = &self.in_segments.segment {
                match segment.bytes(self.position) {
                    SegmentBytes::Elsewhere => self.in_segments.segment = None,
                    SegmentBytes::Readable(until) => {
                        self.served_attempt = Some(opened.attempt);
                        return Some((opened.file, SegmentBytes::Readable(until.min(end))));
                    }
                    arriving @ SegmentBytes::Arriving(_) => return Some((opened.file, arriving)),
                }
            }
            if self.in_segments.requested_at == Some(self.position) || !self.waiters.serves_complete_pull() {
                return None;
            }
            let segments = self.in_segments.segments.lock().clone()?;
            let range = ReaderRange {
                position: self.position,
                until: self.end.filter(|_| !self.in_segments.is_open_ended),
                needs_permit: !is_short,
            };
            if self
                .in_segments
                .refused_at
                .is_some_and(|at| at.elapsed() < RETRY_INTERVAL)
            {
                return None;
            }
            let Some(segment) = segments.segment(range, &self.ahead_permits) else {
                self.in_segments.refused_at = Some(Instant::now());
                return None;
            };
            self.in_segments.requested_at = Some(self.position);
            self.in_segments.segment = Some(segment);
        }
    }

    pub(super) async fn read(
        &mut self,
        file: &Arc<dyn FsFile>,
        until: u64,
    ) -> Result<Bytes, Arc<DownloadError>> {
        let len = usize::try_from(until - self.position)
            .unwrap_or(READ_CHUNK_BYTES)
            .min(self.step_bytes);
        let bytes = read_chunk(file, self.position, len, &self.buffers)
            .await
            .map_err(|error| Arc::new(DownloadError::Store(read_error(&error))))?;
        self.position += bytes.len() as u64;
        Ok(bytes)
    }

    async fn range(
        &mut self,
        file: Arc<dyn FsFile>,
        until: u64,
        range_bytes: usize,
    ) -> Result<FileRange, Arc<DownloadError>> {
        let range = FileRange {
            file,
            offset: self.position,
            length: usize::try_from(until - self.position)
                .unwrap_or(range_bytes)
                .min(range_bytes),
        };
        let range = range
            .into_page_cache()
            .await
            .map_err(|error| Arc::new(DownloadError::Store(read_error(&error))))?;
        self.position += range.length as u64;
        Ok(range)
    }

    fn is_far_ahead(&self, readable: u64) -> bool {
        let opening = matches!(&*self.progress.borrow(), Progress::Opening);
        let short = self
            .end
            .is_some_and(|end| end.saturating_sub(self.position) <= AHEAD_BYTES_MAX);
        !opening
            && short
            && !self.waits_for_fill
            && self.ahead.is_some()
            && self.position.saturating_sub(readable) > FAR_AHEAD_BYTES
    }

    /// Requests the range, unless the transfer reaches it first. Returns whether the state may have changed.
    async fn open_ahead(&mut self) -> bool {
        let (position, Some(until)) = (self.position, self.end) else {
            return false;
        };
        // Without a free permit it waits for the transfer, and tries again when that has advanced.
        let Ok(permit) = Arc::clone(&self.ahead_permits).try_acquire_owned() else {
            return false;
        };
        let Some(ahead) = &mut self.ahead else {
            return false;
        };
        self.waits_for_fill = true;
        let fill_is_ahead = |progress: &Progress| match progress {
            Progress::Opening => false,
            Progress::Filling(_, readable) => *readable > position,
            Progress::Complete(..) | Progress::Failed(_) => true,
        };
        // Requested once. If the upstream denies or interrupts it, the reader waits for the transfer.
        tokio::select! {
            body = ahead.open(position, Some(until)) => {
                self.ahead_range = body.map(|body| AheadRange::new(body, until, permit));
            }
            () = async { drop(self.progress.wait_for(fill_is_ahead).await) } => {}
        }
        true
    }

    /// The next bytes of the separately fetched range. At its end, or if it is interrupted, the transfer takes
    /// over.
    async fn next_ahead(&mut self) -> Option<Bytes> {
        let ahead_range = self.ahead_range.as_mut()?;
        let left = ahead_range.until.saturating_sub(self.position);
        match ahead_range.body.chunk().await {
            Some(Ok(mut bytes)) if left > 0 => {
                bytes.truncate(usize::try_from(left).unwrap_or(bytes.len()));
                self.position += bytes.len() as u64;
                if self.position >= ahead_range.until {
                    self.ahead_range = None;
                }
                Some(bytes)
            }
            _ => {
                self.ahead_range = None;
                None
            }
        }
    }
}

fn read_error(error: &io::Error) -> StoreError {
    StoreError::io("read a partial download", "ingest", error)
}
