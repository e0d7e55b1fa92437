//! Answers of the admin listener, and the bodies they have.

use std::io;
use std::pin::Pin;
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

use super::piped::Piped;
use crate::archive::pipe::Piece;

/// An answer.
pub(super) type Reply = Response<Body>;

/// The page may load what is here and nothing else, and nobody may frame it.
const CONTENT_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; \
     form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
);

/// The body of an answer.
pub(super) enum Body {
    /// All of it.
    Whole(Option<Bytes>),
    /// As it comes, until its sender is gone.
    Live(mpsc::Receiver<Bytes>),
    /// An archive.
    Piped(Piped),
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut *self {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Live(lines) => lines
                .poll_recv(context)
                .map(|line| line.map(|line| Ok(Frame::data(line)))),
            Self::Piped(piped) => Pin::new(piped).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Live(_) => SizeHint::default(),
            Self::Piped(piped) => piped.size_hint(),
        }
    }
}

/// Why a request is not done (RFC 9457), in words for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) status: StatusCode,
    pub(super) detail: String,
    /// What may have been meant.
    pub(super) nearest: Vec<String>,
    /// After how many seconds it may be tried again.
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

    /// Too much of this is under way.
    pub(super) fn busy(detail: impl Into<String>) -> Self {
        let problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, detail);
        problem.retry_after(1)
    }

    /// The task that was to answer ended in a panic, or with the process.
    pub(super) fn failed() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the task ended without an answer; the log says why",
        )
    }

    pub(super) fn retry_after(self, seconds: u64) -> Self {
        Self {
            retry_after_s: Some(seconds),
            ..self
        }
    }

    pub(super) fn bad(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    pub(super) fn absent(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    pub(super) fn reply(&self) -> Reply {
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
        let mut reply = whole(self.status, "application/problem+json", body.to_string());
        if let Some(seconds) = self.retry_after_s {
            reply.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        reply
    }
}

impl From<crate::store::Fault> for Problem {
    fn from(fault: crate::store::Fault) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, fault.to_string())
    }
}

/// 200 with JSON.
pub(super) fn answer(value: &Value) -> Reply {
    with_status(StatusCode::OK, value)
}

/// JSON under this status.
pub(super) fn with_status(status: StatusCode, value: &Value) -> Reply {
    whole(status, "application/json", value.to_string())
}

/// A whole body of this type.
pub(super) fn whole(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Reply {
    let body = body.into();
    let length = body.len();
    let mut reply = bare(status, kind, Body::Whole(Some(body)));
    reply.headers_mut().insert(CONTENT_LENGTH, length.into());
    reply
}

/// Events as they come (server-sent events).
pub(super) fn live(lines: mpsc::Receiver<Bytes>) -> Reply {
    bare(StatusCode::OK, "text/event-stream", Body::Live(lines))
}

/// An archive of so many bytes, as it is written.
pub(super) fn piped(kind: &'static str, pieces: mpsc::Receiver<Piece>, bytes: u64) -> Reply {
    bare(StatusCode::OK, kind, Body::Piped(Piped::new(pieces, Some(bytes))))
}

/// Sends a browser on, after a form was done.
pub(super) fn see_other(to: &str) -> Reply {
    let mut reply = whole(StatusCode::SEE_OTHER, "text/plain; charset=utf-8", Bytes::new());
    if let Ok(to) = HeaderValue::from_str(to) {
        reply.headers_mut().insert(LOCATION, to);
    }
    reply
}

fn bare(status: StatusCode, kind: &'static str, body: Body) -> Reply {
    let mut reply = Response::new(body);
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    let fixed: [(HeaderName, HeaderValue); 6] = [
        (CONTENT_TYPE, HeaderValue::from_static(kind)),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        (REFERRER_POLICY, HeaderValue::from_static("same-origin")),
        (CONTENT_SECURITY_POLICY, CONTENT_POLICY),
    ];
    headers.extend(fixed);
    reply
}
