//! Several parts of one held blob, as a `multipart/byteranges` (RFC 9110 §14.6). From the store only: a blob under way is
//! sent whole instead, which every client that asks for several parts understands.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::File;
use crate::oci::Digest;
use crate::oci::range::{ByteSpan, content_range};
use crate::server::reply::within;
use crate::store::file_read::BufferPool;
use crate::store::fs::FsFile;
use crate::telemetry::Telemetry;

/// Hexadecimal digits in a boundary: with them it has 48 characters, of the 70 allowed.
const BOUNDARY_HEX: usize = 40;

/// The parts to be sent of a blob, and how they are kept apart.
pub(in crate::server) struct Plan {
    spans: Vec<ByteSpan>,
    size: u64,
    boundary: String,
}

impl Plan {
    /// These parts of the blob `digest`, which has `size` bytes.
    ///
    /// The boundary is made of the digest: no blob holds its own, so none can end a part early, and the same question
    /// has the same answer.
    pub(in crate::server) fn new(digest: &Digest, size: u64, spans: Vec<ByteSpan>) -> Self {
        let mut boundary = digest.hex();
        boundary.truncate(BOUNDARY_HEX);
        boundary.insert_str(0, "ifnewer-");
        Self {
            spans,
            size,
            boundary,
        }
    }

    /// The `Content-Type` of the answer.
    pub(in crate::server) fn content_type(&self) -> String {
        format!("multipart/byteranges; boundary={}", self.boundary)
    }

    /// The `Content-Length` of the answer.
    pub(in crate::server) fn length(&self) -> u64 {
        let parts = self.spans.iter().enumerate();
        let parts = parts.map(|(place, span)| self.head(*span, place == 0).len() as u64 + span.len());
        parts.sum::<u64>() + self.end().len() as u64
    }

    fn head(&self, span: ByteSpan, is_first: bool) -> String {
        let mut head = String::with_capacity(160);
        if !is_first {
            head.push_str("\r\n");
        }
        // Writing to a `String` cannot fail.
        let _infallible = write!(
            head,
            "--{}\r\nContent-Type: application/octet-stream\r\nContent-Range: {}\r\n\r\n",
            self.boundary,
            content_range(span, self.size)
        );
        head
    }

    fn end(&self) -> String {
        format!("\r\n--{}--\r\n", self.boundary)
    }
}

/// Where the parts are read.
pub(in crate::server) enum From {
    /// In memory.
    Memory(Bytes),
    /// In its file.
    File(Arc<dyn FsFile>, BufferPool, Telemetry),
}

impl From {
    fn part(&self, span: ByteSpan) -> Part {
        match self {
            Self::Memory(bytes) => Part::Memory(within(bytes, span)),
            Self::File(file, buffers, telemetry) => Part::File(Box::new(File {
                from: Arc::clone(file),
                position: span.start,
                end: span.end_exclusive,
                buffers: buffers.clone(),
                telemetry: telemetry.clone(),
                waiting: None,
            })),
        }
    }
}

enum Part {
    Memory(Bytes),
    File(Box<File>),
}

/// A [`Plan`] being carried out.
pub(super) struct Parts {
    plan: Plan,
    from: From,
    waiting: VecDeque<ByteSpan>,
    now: Option<Part>,
    left: u64,
}

impl Parts {
    pub(super) fn new(plan: Plan, from: From) -> Self {
        Self {
            left: plan.length(),
            waiting: plan.spans.iter().copied().collect(),
            now: None,
            plan,
            from,
        }
    }

    /// Bytes still to be sent.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Whether the blob is in memory.
    pub(super) fn is_in_memory(&self) -> bool {
        matches!(self.from, From::Memory(_))
    }

    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
        step_bytes: usize,
    ) -> Poll<Option<io::Result<Bytes>>> {
        let next = match &mut self.now {
            Some(Part::Memory(bytes)) => Some(Ok(std::mem::take(bytes))),
            Some(Part::File(file)) => ready!(file.poll(context, step_bytes)),
            None => None,
        };
        match next {
            Some(Ok(bytes)) if bytes.is_empty() => self.now = None,
            Some(Ok(bytes)) => return self.sent(bytes),
            Some(Err(error)) => {
                (self.left, self.now) = (0, None);
                self.waiting.clear();
                return Poll::Ready(Some(Err(error)));
            }
            None => self.now = None,
        }
        if let Some(span) = self.waiting.pop_front() {
            let is_first = self.waiting.len() + 1 == self.plan.spans.len();
            self.now = Some(self.from.part(span));
            let head = self.plan.head(span, is_first);
            return self.sent(head.into());
        }
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let end = self.plan.end();
        self.sent(end.into())
    }

    fn sent(&mut self, bytes: Bytes) -> Poll<Option<io::Result<Bytes>>> {
        self.left = self.left.saturating_sub(bytes.len() as u64);
        Poll::Ready(Some(Ok(bytes)))
    }
}
