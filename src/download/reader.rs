//! Reading a blob while it arrives.
//!
//! A reader waits for the fill where it has caught up with it. One whose part lies far ahead does not: it asks the upstream
//! for that part alone, with its own asker's right (see [`Ahead`]). Those bytes go to this reader only; they are neither
//! stored nor verified, as no part can be verified by itself. Nor are the parts that are read from the file before it is
//! whole: whoever asks for a part puts the whole together and verifies that, or has a digest of the part (as lazy
//! pullers do, from a table that they verified). A whole blob is never served this way.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::progress::{Attempt, Download, Opened, Progress};
use super::stranded::{Alone, Rest};
use super::{Ahead, Chunks, Failure, Shared};
use crate::oci::{Digest, UpstreamFailure};
use crate::queue::{Waiter, Waiters};
use crate::store::StoreError;
use crate::store::file_read::{BufferPool, READ_CHUNK_BYTES, read_chunk};
use crate::store::fs::FsFile;

/// A part that begins so far from what has arrived is far ahead.
pub const FAR_AHEAD_BYTES: u64 = 8 * 1024 * 1024;

/// A longer part waits for the fill, wherever it begins: its bytes would cost the upstream too much twice.
pub const AHEAD_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Reads a blob while it arrives.
pub struct Reader {
    /// Boxed, for readers are moved about by value.
    pub(super) digest: Box<Digest>,
    /// Whether its own request leads the transfer.
    pub(super) leads: bool,
    pub(super) progress: watch::Receiver<Progress>,
    buffers: BufferPool,
    pub(super) position: u64,
    pub(super) end: Option<u64>,
    step_bytes: usize,
    /// Whose bytes it was given.
    pub(super) given: Option<Attempt>,
    pub(super) ahead: Option<Box<dyn Ahead>>,
    pub(super) ahead_places: Arc<Semaphore>,
    pub(super) part: Option<Part>,
    pub(super) rest: Option<Box<Rest>>,
    /// Asks for no part that lies far ahead, or has asked.
    is_patient: bool,
    waiters: Waiters,
    _waiter: Option<Waiter>,
}

/// A part on its way from the upstream to this reader alone.
pub(super) struct Part {
    body: Box<dyn Chunks>,
    until: u64,
    _place: OwnedSemaphorePermit,
}

impl Part {
    pub(super) fn new(body: Box<dyn Chunks>, until: u64, place: OwnedSemaphorePermit) -> Self {
        Self {
            body,
            until,
            _place: place,
        }
    }
}

enum Look {
    Readable(Arc<dyn FsFile>, u64),
    Wait { readable: u64 },
    End,
    Failed(Arc<Failure>),
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
            given: None,
            ahead: None,
            ahead_places: Arc::clone(&shared.ahead_places),
            part: None,
            rest: None,
            is_patient: false,
            waiters: download.waiters.clone(),
            _waiter: waiter,
        }
    }

    /// Another reader of the same transfer, for its first `length` bytes.
    #[must_use]
    pub fn beginning(&self, length: u64) -> Self {
        Self {
            digest: self.digest.clone(),
            leads: false,
            progress: self.progress.clone(),
            buffers: self.buffers.clone(),
            position: 0,
            end: Some(length),
            step_bytes: READ_CHUNK_BYTES,
            given: None,
            ahead: None,
            ahead_places: Arc::clone(&self.ahead_places),
            part: None,
            rest: None,
            is_patient: true,
            waiters: self.waiters.clone(),
            _waiter: None,
        }
    }

    /// Whether the transfer waits for a place.
    pub fn is_queued(&self) -> bool {
        self.waiters.is_queued()
    }

    /// Waits until the upstream has begun to answer.
    pub async fn opened(&mut self) -> Result<Opened, Arc<Failure>> {
        let begun = |progress: &Progress| !matches!(progress, Progress::Opening);
        match self.progress.wait_for(begun).await.as_deref() {
            Ok(Progress::Filling(opened, _) | Progress::Complete(opened, _)) => Ok(opened.clone()),
            Ok(Progress::Failed(failure)) => Err(Arc::clone(failure)),
            Ok(Progress::Opening) | Err(_) => Err(Arc::new(Failure::Abandoned)),
        }
    }

    /// Waits until there is something to read, or it is known that there will be nothing.
    pub async fn begun(&mut self) -> Result<(), Arc<Failure>> {
        let some = |progress: &Progress| match progress {
            Progress::Opening => false,
            Progress::Filling(_, readable) => *readable > 0,
            Progress::Complete(..) | Progress::Failed(_) => true,
        };
        match self.progress.wait_for(some).await.as_deref() {
            Ok(Progress::Failed(failure)) => Err(Arc::clone(failure)),
            Ok(_) => Ok(()),
            Err(_) => Err(Arc::new(Failure::Abandoned)),
        }
    }

    /// Waits until the blob is verified, or known not to be; its size.
    pub async fn settled(&mut self) -> Result<u64, Arc<Failure>> {
        match self.progress.wait_for(Progress::is_over).await.as_deref() {
            Ok(Progress::Failed(failure)) => Err(Arc::clone(failure)),
            Ok(Progress::Complete(_, size)) => Ok(*size),
            Ok(Progress::Opening | Progress::Filling(..)) | Err(_) => Err(Arc::new(Failure::Abandoned)),
        }
    }

    /// Limits the reader to the bytes from `start` up to, not including, `end`.
    #[must_use]
    pub fn within(mut self, start: u64, end: u64) -> Self {
        self.position = start;
        self.end = Some(end);
        self
    }

    /// A part that lies far ahead is asked for through `ahead`.
    #[must_use]
    pub fn with_ahead(mut self, ahead: impl Ahead) -> Self {
        self.ahead = Some(Box::new(ahead));
        self
    }

    /// A part that lies far ahead is waited for. For ranges without an end: most clients that send one read a little of
    /// it and close.
    #[must_use]
    pub fn patient(mut self) -> Self {
        self.is_patient = true;
        self
    }

    /// The next bytes, as soon as there are any; `None` at the end. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<Result<Bytes, Arc<Failure>>> {
        self.next_within(READ_CHUNK_BYTES).await
    }

    /// As [`Self::next`], at most `step_bytes` of what is in the file.
    pub async fn next_within(&mut self, step_bytes: usize) -> Option<Result<Bytes, Arc<Failure>>> {
        self.step_bytes = step_bytes;
        loop {
            if let Some(rest) = &mut self.rest {
                let next = rest.verifying.next().await;
                return next.map(|next| next.map_err(|cause| Arc::new(Failure::Broken(cause))));
            }
            if let Some(bytes) = self.next_of_part().await {
                return Some(Ok(bytes));
            }
            let readable = match self.look() {
                Look::Readable(file, until) => return Some(self.read(&file, until).await),
                Look::Failed(failure) => match self.go_on_alone(&failure).await {
                    Ok(Alone::Asked) => continue,
                    Ok(Alone::Read(bytes)) => return Some(Ok(bytes)),
                    Ok(Alone::End) => return None,
                    Err(failure) => return Some(Err(failure)),
                },
                Look::End => return None,
                Look::Wait { readable } => readable,
            };
            if self.is_far_ahead(readable) && self.open_part().await {
                continue;
            }
            if self.progress.changed().await.is_err() {
                return Some(Err(Arc::new(Failure::Abandoned)));
            }
        }
    }

    fn look(&mut self) -> Look {
        let (opened, readable, complete) = match &*self.progress.borrow_and_update() {
            Progress::Failed(failure) => return Look::Failed(Arc::clone(failure)),
            Progress::Opening => return Look::Wait { readable: 0 },
            Progress::Filling(opened, readable) => (opened.clone(), *readable, false),
            Progress::Complete(opened, size) => (opened.clone(), *size, true),
        };
        if self.given.is_some_and(|attempt| attempt != opened.attempt) {
            // What it was given belongs to a file that turned out wrong.
            return Look::Failed(Arc::new(Failure::Broken(UpstreamFailure::DigestMismatch)));
        }
        let until = self.end.map_or(readable, |end| readable.min(end));
        if until > self.position {
            self.given = Some(opened.attempt);
            return Look::Readable(opened.file, until);
        }
        if complete || self.end.is_some_and(|end| self.position >= end) {
            return Look::End;
        }
        Look::Wait { readable }
    }

    pub(super) async fn read(&mut self, file: &Arc<dyn FsFile>, until: u64) -> Result<Bytes, Arc<Failure>> {
        let wanted = usize::try_from(until - self.position)
            .unwrap_or(READ_CHUNK_BYTES)
            .min(self.step_bytes);
        let bytes = read_chunk(file, self.position, wanted, &self.buffers)
            .await
            .map_err(|error| Arc::new(Failure::Store(unreadable(&error))))?;
        self.position += bytes.len() as u64;
        Ok(bytes)
    }

    fn is_far_ahead(&self, readable: u64) -> bool {
        let opening = matches!(&*self.progress.borrow(), Progress::Opening);
        let short = self
            .end
            .is_some_and(|end| end.saturating_sub(self.position) <= AHEAD_BYTES_MAX);
        !opening
            && short
            && !self.is_patient
            && self.ahead.is_some()
            && self.position.saturating_sub(readable) > FAR_AHEAD_BYTES
    }

    /// Asks for the part, unless the fill comes first. Says whether anything was done, so that it is worth another look.
    async fn open_part(&mut self) -> bool {
        let (position, Some(until)) = (self.position, self.end) else {
            return false;
        };
        // With all places taken it waits for the fill, and tries again when that has come nearer.
        let Ok(place) = Arc::clone(&self.ahead_places).try_acquire_owned() else {
            return false;
        };
        let Some(ahead) = &mut self.ahead else {
            return false;
        };
        self.is_patient = true;
        let overtaken = |progress: &Progress| match progress {
            Progress::Opening => false,
            Progress::Filling(_, readable) => *readable > position,
            Progress::Complete(..) | Progress::Failed(_) => true,
        };
        // Asked once: what the upstream refuses or breaks off is waited for.
        tokio::select! {
            body = ahead.open(position, Some(until)) => {
                self.part = body.map(|body| Part::new(body, until, place));
            }
            () = async { drop(self.progress.wait_for(overtaken).await) } => {}
        }
        true
    }

    /// The next bytes of the part, if one is on its way. At its end, or where it breaks, the fill takes over.
    async fn next_of_part(&mut self) -> Option<Bytes> {
        let part = self.part.as_mut()?;
        let left = part.until.saturating_sub(self.position);
        match part.body.chunk().await {
            Some(Ok(mut bytes)) if left > 0 => {
                bytes.truncate(usize::try_from(left).unwrap_or(bytes.len()));
                self.position += bytes.len() as u64;
                if self.position >= part.until {
                    self.part = None;
                }
                Some(bytes)
            }
            _ => {
                self.part = None;
                None
            }
        }
    }
}

fn unreadable(error: &io::Error) -> StoreError {
    StoreError::io("read the ingest of a download", "ingest", error)
}
