//! Blobs: whole, one part, several parts.

use bytes::Bytes;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE};
use http::{HeaderValue, Response, StatusCode};

use super::{Asked, OCTETS, etag, how, named, problem, put, respond};
use crate::oci::range::{ByteSpan, ResolvedRange, content_range, unsatisfied_content_range};
use crate::oci::{Digest, ErrorBody, ErrorCode};
use crate::proxy::{BlobBody, ServeInfo};
use crate::server::body::{PartsFrom, Plan};
use crate::server::{Body, Front};
use crate::store::AsyncStore;
use crate::telemetry::ByteSource;

/// A blob to be sent.
pub(super) struct Answered<'a> {
    pub(super) digest: Digest,
    /// In bytes; unknown only while it comes from an upstream that does not say it.
    pub(super) size: Option<u64>,
    pub(super) info: ServeInfo,
    pub(super) asked: &'a Asked,
    pub(super) front: &'a Front,
    pub(super) store: &'a AsyncStore,
}

impl Answered<'_> {
    /// The answer with this content.
    pub(super) fn with(&self, content: BlobBody) -> Response<Body> {
        let etag = etag(&self.digest);
        if self.asked.has_already(&etag) {
            let mut response = respond(StatusCode::NOT_MODIFIED, Body::empty());
            named(response.headers_mut(), &self.digest, &etag);
            how::tell(response.headers_mut(), self.info, self.asked);
            return response;
        }
        let is_held = !matches!(content, BlobBody::Download(_));
        let sent = match self.size {
            // What passes through is verified as a whole, so it is sent as a whole.
            Some(size) if !matches!(content, BlobBody::Passthrough(_)) => {
                self.asked.sent(size, &etag, is_held)
            }
            _ => ResolvedRange::Full,
        };
        let mut response = match (sent, content) {
            (ResolvedRange::Unsatisfiable, _) => return self.unsatisfiable(),
            (ResolvedRange::Multi(spans), BlobBody::Memory(bytes)) => {
                self.parts(spans, PartsFrom::Memory(bytes))
            }
            (ResolvedRange::Multi(spans), BlobBody::File(held)) => {
                let (buffers, telemetry) = (self.front.buffers.clone(), self.front.telemetry.clone());
                self.parts(spans, PartsFrom::File(held.file, buffers, telemetry))
            }
            (ResolvedRange::Single(span), content) => self.part(span, content),
            (_, content) => self.whole(content),
        };
        let headers = response.headers_mut();
        named(headers, &self.digest, &etag);
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        how::tell(headers, self.info, self.asked);
        response
    }

    fn whole(&self, content: BlobBody) -> Response<Body> {
        let telemetry = self.front.telemetry.clone();
        let body = match content {
            _ if self.asked.head => Body::empty(),
            BlobBody::Head => Body::empty(),
            BlobBody::Memory(bytes) => self.memory(bytes),
            BlobBody::File(held) if self.front.sound.knows(&self.digest) => {
                Body::file(held.file, 0, held.size, self.front.buffers.clone(), telemetry)
            }
            BlobBody::File(held) => Body::checked(
                self.digest,
                held.file,
                held.size,
                self.front.buffers.clone(),
                telemetry,
                self.front.sound.clone(),
                self.store.clone(),
            ),
            BlobBody::Download(reader) => Body::download(reader, self.size, telemetry),
            BlobBody::Passthrough(passing) => Body::passing(*passing, self.size, telemetry),
        };
        let mut response = respond(StatusCode::OK, body);
        response.headers_mut().insert(CONTENT_TYPE, OCTETS);
        if let Some(size) = self.size {
            response.headers_mut().insert(CONTENT_LENGTH, size.into());
        }
        response
    }

    fn memory(&self, bytes: Bytes) -> Body {
        self.front
            .telemetry
            .add_bytes_sent(ByteSource::Disk, bytes.len() as u64);
        Body::whole(bytes)
    }

    fn part(&self, span: ByteSpan, content: BlobBody) -> Response<Body> {
        let ByteSpan { start, end_exclusive } = span;
        let telemetry = self.front.telemetry.clone();
        let body = match content {
            BlobBody::Memory(bytes) => self.memory(within(&bytes, span)),
            BlobBody::File(held) => {
                let buffers = self.front.buffers.clone();
                Body::file(held.file, start, end_exclusive, buffers, telemetry)
            }
            BlobBody::Download(reader) => {
                let reader = reader.within(start, end_exclusive);
                let reader = if self.asked.is_open_ended() {
                    reader.waiting_for_fill()
                } else {
                    reader
                };
                Body::download(reader, Some(span.len()), telemetry)
            }
            // Neither has parts: `Head` answers no GET, and `Passing` is whole or nothing.
            BlobBody::Head | BlobBody::Passthrough(_) => Body::empty(),
        };
        let mut response = respond(StatusCode::PARTIAL_CONTENT, body);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, OCTETS);
        put(
            headers,
            CONTENT_RANGE,
            &content_range(span, self.size.unwrap_or_default()),
        );
        headers.insert(CONTENT_LENGTH, span.len().into());
        response
    }

    fn parts(&self, spans: Vec<ByteSpan>, from: PartsFrom) -> Response<Body> {
        let plan = Plan::new(&self.digest, self.size.unwrap_or_default(), spans);
        let (content_type, length) = (plan.content_type(), plan.length());
        let mut response = respond(StatusCode::PARTIAL_CONTENT, Body::parts(plan, from));
        let headers = response.headers_mut();
        put(headers, CONTENT_TYPE, &content_type);
        headers.insert(CONTENT_LENGTH, length.into());
        response
    }

    fn unsatisfiable(&self) -> Response<Body> {
        let size = self.size.unwrap_or_default();
        let message = format!(
            "{}/{} has {size} bytes; none of the bytes asked for exist",
            self.asked.upstream(),
            self.asked.image()
        );
        let mut response = problem(
            StatusCode::RANGE_NOT_SATISFIABLE,
            &ErrorBody::new(ErrorCode::SizeInvalid, message),
            self.asked.head,
        );
        put(
            response.headers_mut(),
            CONTENT_RANGE,
            &unsatisfied_content_range(size),
        );
        response
    }
}

/// The bytes of a span, as far as there are any.
pub(in crate::server) fn within(bytes: &Bytes, span: ByteSpan) -> Bytes {
    let at = |offset: u64| usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()));
    bytes.slice(at(span.start)..at(span.end_exclusive))
}
