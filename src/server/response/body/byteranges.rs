//! `multipart/byteranges` bodies (RFC 9110 §14.6) of cached blobs. A blob still being downloaded is sent in full
//! instead, which every client that sends several ranges accepts.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::File;
use crate::oci::Digest;
use crate::oci::range::{ByteSpan, content_range};
use crate::server::response::slice;
use crate::store::file_read::BufferPool;
use crate::store::fs::FsFile;
use crate::telemetry::Telemetry;

/// Hex digits in a boundary, which then has 48 of the 70 characters allowed.
const BOUNDARY_HEX: usize = 40;

/// The ranges of a multipart response and their boundary.
pub(in crate::server) struct MultipartRanges {
    spans: Vec<ByteSpan>,
    size: u64,
    boundary: String,
}

impl MultipartRanges {
    /// Ranges of the blob `digest`, which has `size` bytes.
    ///
    /// The boundary comes from the digest. A blob cannot contain its own digest, so the boundary cannot occur in a
    /// part, and equal requests get equal responses.
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

    /// The `Content-Type` of the response.
    pub(in crate::server) fn content_type(&self) -> String {
        format!("multipart/byteranges; boundary={}", self.boundary)
    }

    /// The `Content-Length` of the response.
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

/// The source of a cached blob.
pub(in crate::server) enum BlobSource {
    /// In memory.
    Memory(Bytes),
    /// On disk.
    File(Arc<dyn FsFile>, BufferPool, Telemetry),
}

impl BlobSource {
    fn part(&self, span: ByteSpan) -> PartSource {
        match self {
            Self::Memory(bytes) => PartSource::Memory(slice(bytes, span)),
            Self::File(file, buffers, telemetry) => PartSource::File(Box::new(File {
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

enum PartSource {
    Memory(Bytes),
    File(Box<File>),
}

/// A multipart body.
pub(super) struct MultipartBody {
    ranges: MultipartRanges,
    from: BlobSource,
    waiting: VecDeque<ByteSpan>,
    now: Option<PartSource>,
    left: u64,
}

impl MultipartBody {
    pub(super) fn new(ranges: MultipartRanges, from: BlobSource) -> Self {
        Self {
            left: ranges.length(),
            waiting: ranges.spans.iter().copied().collect(),
            now: None,
            ranges,
            from,
        }
    }

    /// Bytes still to be sent.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Whether the blob is in memory.
    pub(super) fn is_in_memory(&self) -> bool {
        matches!(self.from, BlobSource::Memory(_))
    }

    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
        step_bytes: usize,
    ) -> Poll<Option<io::Result<Bytes>>> {
        let next = match &mut self.now {
            Some(PartSource::Memory(bytes)) => Some(Ok(std::mem::take(bytes))),
            Some(PartSource::File(file)) => ready!(file.poll(context, step_bytes)),
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
            let is_first = self.waiting.len() + 1 == self.ranges.spans.len();
            self.now = Some(self.from.part(span));
            let head = self.ranges.head(span, is_first);
            return self.sent(head.into());
        }
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let end = self.ranges.end();
        self.sent(end.into())
    }

    fn sent(&mut self, bytes: Bytes) -> Poll<Option<io::Result<Bytes>>> {
        self.left = self.left.saturating_sub(bytes.len() as u64);
        Poll::Ready(Some(Ok(bytes)))
    }
}
