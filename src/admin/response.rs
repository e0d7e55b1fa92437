//! Responses and response bodies of the admin listener, and flash messages.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION, REFERRER_POLICY,
    RETRY_AFTER, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body::{Frame, SizeHint};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::archive::pipe::Chunk;

/// An admin response.
pub(super) type ApiResponse = Response<Body>;

/// The page may load its own resources only, and may not be framed.
const CONTENT_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; \
     form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
);

/// A response body.
pub(super) enum Body {
    /// A complete body.
    Full(Option<Bytes>),
    /// Server-sent events, until the sender is dropped.
    Events(mpsc::Receiver<Bytes>),
    /// An archive stream.
    Stream(StreamBody),
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut *self {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Events(lines) => lines
                .poll_recv(context)
                .map(|line| line.map(|line| Ok(Frame::data(line)))),
            Self::Stream(piped) => Pin::new(piped).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Full(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Events(_) => SizeHint::default(),
            Self::Stream(piped) => piped.size_hint(),
        }
    }
}

/// Problem details of a failed request (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) detail: String,
    /// Similar names.
    pub(super) nearest: Vec<String>,
    /// Value of `Retry-After` in seconds.
    pub(super) retry_after_s: Option<u64>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            status,
            detail: detail.into(),
            nearest: Vec::new(),
            retry_after_s: None,
        }
    }

    /// 503: a limit is reached.
    pub(super) fn busy(detail: impl Into<String>) -> Self {
        let problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, detail);
        problem.retry_after(1)
    }

    /// 500: the task panicked or was cancelled.
    pub(super) fn task_failed() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal error: the task panicked; see the log",
        )
    }

    pub(super) fn retry_after(self, seconds: u64) -> Self {
        Self {
            retry_after_s: Some(seconds),
            ..self
        }
    }

    pub(super) fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    pub(super) fn response(&self) -> ApiResponse {
        let title = self.status.canonical_reason().unwrap_or("error");
        let mut body = json!({
            "type": "about:blank",
            "title": title,
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        if !self.nearest.is_empty()
            && let Some(fields) = body.as_object_mut()
        {
            fields.insert("nearest".to_owned(), json!(self.nearest));
        }
        let mut response = full(self.status, "application/problem+json", body.to_string());
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl From<crate::store::StoreError> for Problem {
    fn from(fault: crate::store::StoreError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, fault.to_string())
    }
}

/// 200 with JSON.
pub(super) fn json_response(value: &Value) -> ApiResponse {
    json_with_status(StatusCode::OK, value)
}

/// JSON with this status.
pub(super) fn json_with_status(status: StatusCode, value: &Value) -> ApiResponse {
    full(status, "application/json", value.to_string())
}

/// A complete body of this content type.
pub(super) fn full(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> ApiResponse {
    let body = body.into();
    let length = body.len();
    let mut response = with_headers(status, kind, Body::Full(Some(body)));
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    response
}

/// A stream of server-sent events.
pub(super) fn event_stream(lines: mpsc::Receiver<Bytes>) -> ApiResponse {
    with_headers(StatusCode::OK, "text/event-stream", Body::Events(lines))
}

/// An archive stream of known length.
pub(super) fn stream(kind: &'static str, chunks: mpsc::Receiver<Chunk>, bytes: u64) -> ApiResponse {
    with_headers(
        StatusCode::OK,
        kind,
        Body::Stream(StreamBody::new(chunks, Some(bytes))),
    )
}

/// 303 redirect after a form submission.
pub(super) fn see_other(to: &str) -> ApiResponse {
    let mut response = full(StatusCode::SEE_OTHER, "text/plain; charset=utf-8", Bytes::new());
    if let Ok(to) = HeaderValue::from_str(to) {
        response.headers_mut().insert(LOCATION, to);
    }
    response
}

fn with_headers(status: StatusCode, kind: &'static str, body: Body) -> ApiResponse {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    let fixed: [(HeaderName, HeaderValue); 6] = [
        (CONTENT_TYPE, HeaderValue::from_static(kind)),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        (REFERRER_POLICY, HeaderValue::from_static("same-origin")),
        (CONTENT_SECURITY_POLICY, CONTENT_POLICY),
    ];
    headers.extend(fixed);
    response
}

/// A body read from an archive pipe. A pipe error aborts the message.
pub(super) struct StreamBody {
    chunks: mpsc::Receiver<Chunk>,
    /// The length, if known.
    bytes: Option<u64>,
}

impl StreamBody {
    pub(super) fn new(chunks: mpsc::Receiver<Chunk>, bytes: Option<u64>) -> Self {
        Self { chunks, bytes }
    }
}

impl http_body::Body for StreamBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.chunks
            .poll_recv(context)
            .map(|chunk| chunk.map(|chunk| chunk.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        self.bytes.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Maximum number of stored messages.
const FLASH_MESSAGES_MAX: usize = 32;

/// The last messages shown after a form redirect. Stored on the server, because a message in the URL could be forged.
#[derive(Default)]
pub(super) struct FlashMessages(Mutex<(u64, VecDeque<(u64, String)>)>);

impl FlashMessages {
    /// Stores a message and returns its id.
    pub(super) fn add(&self, text: String) -> u64 {
        let mut messages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        messages.0 += 1;
        let number = messages.0;
        if messages.1.len() >= FLASH_MESSAGES_MAX {
            messages.1.pop_front();
        }
        messages.1.push_back((number, text));
        number
    }

    pub(super) fn get(&self, number: u64) -> Option<String> {
        let messages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        messages
            .1
            .iter()
            .find(|(id, _)| *id == number)
            .map(|(_, text)| text.clone())
    }
}
