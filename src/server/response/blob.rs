//! Blob responses: full, single range (RFC 9110 §14.4) and multipart/byteranges.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION};
use http::{HeaderValue, Response, StatusCode};
use tokio::time::Instant;

use super::{
    OCTETS, ResponseContext, cache_status, error_response, etag, set_digest_headers, set_header, with_status,
};
use crate::oci::range::{ByteSpan, ResolvedRange, content_range, unsatisfied_content_range};
use crate::oci::{Digest, ErrorBody, ErrorCode};
use crate::proxy::{BlobBody, ServeInfo};
use crate::server::response::body::{BlobSource, BlockWatch, MultipartRanges};
use crate::server::sendfile::{FileSender, SENDFILE_BYTES_MIN};
use crate::server::{Body, RegistryService};
use crate::store::AsyncStore;
use crate::store::fs::FsFile;
use crate::telemetry::ByteSource;

/// Inputs of a blob response.
pub(super) struct BlobResponse<'a> {
    pub(super) digest: Digest,
    /// Size in bytes. Unknown only while the blob comes from an upstream that did not send its length.
    pub(super) size: Option<u64>,
    pub(super) info: ServeInfo,
    pub(super) context: &'a ResponseContext,
    pub(super) service: &'a RegistryService,
    pub(super) store: &'a AsyncStore,
}

impl BlobResponse<'_> {
    /// Builds the response.
    pub(super) fn build(&self, content: BlobBody) -> Response<Body> {
        let etag = etag(&self.digest);
        if self.context.matches_if_none_match(&etag) {
            let mut response = with_status(StatusCode::NOT_MODIFIED, Body::empty());
            set_digest_headers(response.headers_mut(), &etag);
            cache_status::set_cache_headers(response.headers_mut(), self.info, self.context);
            return response;
        }
        if let BlobBody::Redirect(location) = content {
            return self.redirect(location, &etag);
        }
        let is_cached = !matches!(content, BlobBody::Download(_));
        let sent = match self.size {
            // Uncached passthrough is verified as a unit, so it is sent in full.
            Some(size) if !matches!(content, BlobBody::Passthrough(_)) => {
                self.context.resolve_range(size, is_cached)
            }
            _ => ResolvedRange::Full,
        };
        let mut response = match (sent, content) {
            (ResolvedRange::Unsatisfiable, _) => return self.unsatisfiable(),
            (ResolvedRange::Multi(spans), BlobBody::Memory(bytes)) => {
                self.parts(spans, BlobSource::Memory(bytes))
            }
            (ResolvedRange::Multi(spans), BlobBody::File(blob)) => {
                let (buffers, telemetry) = (self.service.buffers.clone(), self.service.telemetry.clone());
                self.parts(spans, BlobSource::File(blob.file, buffers, telemetry))
            }
            (ResolvedRange::Single(span), content) => self.part(span, content),
            (_, content) => self.complete(content),
        };
        if let Some(repository) = self.context.endpoint.repository() {
            response.body_mut().end_when_blocked(BlockWatch {
                store: self.store.clone(),
                upstream: self.context.shared_upstream(),
                repository: repository.clone(),
                digest: self.digest,
            });
        }
        let headers = response.headers_mut();
        set_digest_headers(headers, &etag);
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        cache_status::set_cache_headers(headers, self.info, self.context);
        response
    }

    /// 307, so that the client repeats its method and ranges there.
    fn redirect(&self, location: HeaderValue, etag: &str) -> Response<Body> {
        let mut response = with_status(StatusCode::TEMPORARY_REDIRECT, Body::empty());
        let headers = response.headers_mut();
        headers.insert(LOCATION, location);
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        set_digest_headers(headers, etag);
        cache_status::set_cache_headers(headers, self.info, self.context);
        response
    }

    fn complete(&self, content: BlobBody) -> Response<Body> {
        let telemetry = self.service.telemetry.clone();
        let body = match content {
            _ if self.context.head => Body::empty(),
            BlobBody::Head | BlobBody::Redirect(_) => Body::empty(),
            BlobBody::Memory(bytes) => self.memory(bytes),
            BlobBody::File(blob)
                if blob.is_verified(Instant::now()) || self.service.verified.contains(&self.digest) =>
            {
                self.file(
                    blob.file,
                    ByteSpan {
                        start: 0,
                        end_exclusive: blob.size,
                    },
                )
            }
            BlobBody::File(blob) => Body::verified_file(
                self.digest,
                blob.file,
                blob.size,
                self.service.buffers.clone(),
                telemetry,
                self.service.verified.clone(),
                self.store.clone(),
            ),
            BlobBody::Download(reader) => {
                Body::download(*reader, self.size, self.context.sendfile.clone(), telemetry)
            }
            BlobBody::Passthrough(passing) => Body::passthrough(*passing, self.size, telemetry),
        };
        let mut response = with_status(StatusCode::OK, body);
        response.headers_mut().insert(CONTENT_TYPE, OCTETS);
        if let Some(size) = self.size {
            response.headers_mut().insert(CONTENT_LENGTH, size.into());
        }
        response
    }

    fn file(&self, file: Arc<dyn FsFile>, span: ByteSpan) -> Body {
        let telemetry = self.service.telemetry.clone();
        match &self.context.sendfile {
            Some(queue) if span.len() >= SENDFILE_BYTES_MIN => {
                let sender = FileSender::new(file, span.start, span.end_exclusive, queue.clone());
                Body::sendfile(sender, telemetry)
            }
            _ => {
                let buffers = self.service.buffers.clone();
                Body::file(file, span.start, span.end_exclusive, buffers, telemetry)
            }
        }
    }

    fn memory(&self, bytes: Bytes) -> Body {
        self.service
            .telemetry
            .add_bytes_sent(ByteSource::Disk, bytes.len() as u64);
        Body::from_bytes(bytes)
    }

    fn part(&self, span: ByteSpan, content: BlobBody) -> Response<Body> {
        let ByteSpan { start, end_exclusive } = span;
        let telemetry = self.service.telemetry.clone();
        let body = match content {
            BlobBody::Memory(bytes) => self.memory(slice(&bytes, span)),
            BlobBody::File(blob) => self.file(blob.file, span),
            BlobBody::Download(reader) => {
                let reader = reader.within(start, end_exclusive);
                let reader = if self.context.is_open_ended() {
                    reader.waiting_for_fill()
                } else {
                    reader
                };
                Body::download(reader, Some(span.len()), self.context.sendfile.clone(), telemetry)
            }
            // Unreachable: a HEAD has no ranges, passthrough is sent in full, and a redirect was sent already.
            BlobBody::Head | BlobBody::Redirect(_) | BlobBody::Passthrough(_) => Body::empty(),
        };
        let mut response = with_status(StatusCode::PARTIAL_CONTENT, body);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, OCTETS);
        set_header(
            headers,
            CONTENT_RANGE,
            &content_range(span, self.size.unwrap_or_default()),
        );
        headers.insert(CONTENT_LENGTH, span.len().into());
        response
    }

    fn parts(&self, spans: Vec<ByteSpan>, from: BlobSource) -> Response<Body> {
        let ranges = MultipartRanges::new(&self.digest, self.size.unwrap_or_default(), spans);
        let (content_type, length) = (ranges.content_type(), ranges.length());
        let mut response = with_status(StatusCode::PARTIAL_CONTENT, Body::byteranges(ranges, from));
        let headers = response.headers_mut();
        set_header(headers, CONTENT_TYPE, &content_type);
        headers.insert(CONTENT_LENGTH, length.into());
        response
    }

    fn unsatisfiable(&self) -> Response<Body> {
        let size = self.size.unwrap_or_default();
        let message = format!(
            "{}/{} has {size} bytes, so the requested range is not satisfiable",
            self.context.upstream(),
            self.context.endpoint.image()
        );
        let mut response = error_response(
            StatusCode::RANGE_NOT_SATISFIABLE,
            &ErrorBody::new(ErrorCode::SizeInvalid, message),
            self.context.head,
        );
        set_header(
            response.headers_mut(),
            CONTENT_RANGE,
            &unsatisfied_content_range(size),
        );
        response
    }
}

/// The bytes of a range, clipped to what exists.
pub(in crate::server) fn slice(bytes: &Bytes, span: ByteSpan) -> Bytes {
    let at = |offset: u64| usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()));
    bytes.slice(at(span.start)..at(span.end_exclusive))
}
