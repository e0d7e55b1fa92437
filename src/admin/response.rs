//! Responses of the admin listener, problem documents, and flash messages.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};

use axum::Json;
use axum::response::{AppendHeaders, IntoResponse, Response};
use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, RETRY_AFTER, WWW_AUTHENTICATE,
    X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderName, HeaderValue, StatusCode};
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinError;
use utoipa::ToSchema;

use crate::archive::pipe::Chunk;
use crate::blocking::{self, Operation};

/// Content type of a problem document (RFC 9457).
pub(super) const PROBLEM: &str = "application/problem+json";

/// Header fields of every response. The page may load its own resources only, and may not be framed.
const FIXED: [(HeaderName, HeaderValue); 5] = [
    (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (REFERRER_POLICY, HeaderValue::from_static("same-origin")),
    (
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; \
             form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        ),
    ),
];

/// A browser prompts for the token as a password.
const CHALLENGES: AppendHeaders<[(HeaderName, &str); 2]> = AppendHeaders([
    (WWW_AUTHENTICATE, "Bearer realm=\"ifnewer admin\""),
    (
        WWW_AUTHENTICATE,
        "Basic realm=\"ifnewer admin\", charset=\"UTF-8\"",
    ),
]);

/// The response with the header fields that all have.
pub(super) fn with_fixed_headers(mut response: Response) -> Response {
    for (name, value) in FIXED {
        response.headers_mut().insert(name, value);
    }
    response
}

/// What sets the pace of a response body, if not the client alone. A response extension that the listener reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// New events.
    Events,
    /// The disk, or the pipe of an archive.
    Archive,
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

/// Problem details (RFC 9457).
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct ProblemDocument {
    #[serde(rename = "type")]
    kind: &'static str,
    title: &'static str,
    status: u16,
    /// The problem and its remedy.
    detail: String,
    /// The closest valid values.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    nearest: Vec<String>,
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
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let document = Json(ProblemDocument {
            kind: "about:blank",
            title: self.status.canonical_reason().unwrap_or("error"),
            status: self.status.as_u16(),
            detail: self.detail,
            nearest: self.nearest,
        });
        let mut response = (self.status, [(CONTENT_TYPE, PROBLEM)], document).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        match self.status {
            StatusCode::UNAUTHORIZED => (CHALLENGES, response).into_response(),
            _ => response,
        }
    }
}

impl From<crate::store::StoreError> for Problem {
    fn from(fault: crate::store::StoreError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, fault.to_string())
    }
}

/// Permits of [`Operation::Admin`].
static PERMITS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Operation::Admin.permits());

/// Permits of [`Operation::AdminSwitch`].
static SWITCH_PERMITS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Operation::AdminSwitch.permits());

/// Permits of [`Operation::Removal`].
static REMOVAL_PERMITS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Operation::Removal.permits());

/// Runs blocking work on a blocking thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    finished(blocking::run(&PERMITS, work).await)
}

/// As [`blocking`], for blocks, pins and the like: no other request keeps them waiting.
pub(super) async fn switching<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    finished(blocking::run(&SWITCH_PERMITS, work).await)
}

/// As [`blocking`], for removals, which may wait for an eviction and run one after the other.
pub(super) async fn removing<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    finished(blocking::run(&REMOVAL_PERMITS, work).await)
}

/// As [`blocking`], for work that has a permit of its own.
pub(super) async fn blocking_with<T: Send + 'static>(
    permit: OwnedSemaphorePermit,
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    finished(blocking::run_with(permit, work).await)
}

fn finished<T>(done: Result<Result<T, Problem>, JoinError>) -> Result<T, Problem> {
    done.unwrap_or_else(|_| Err(Problem::task_failed()))
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

impl Body for StreamBody {
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
        let mut messages = self.0.lock();
        messages.0 += 1;
        let number = messages.0;
        if messages.1.len() >= FLASH_MESSAGES_MAX {
            messages.1.pop_front();
        }
        messages.1.push_back((number, text));
        number
    }

    pub(super) fn get(&self, number: u64) -> Option<String> {
        let messages = self.0.lock();
        messages
            .1
            .iter()
            .find(|(id, _)| *id == number)
            .map(|(_, text)| text.clone())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[tokio::test]
    async fn switch_waits_for_no_list_and_no_removal() {
        let mut held = Vec::new();
        for permits in [&PERMITS, &REMOVAL_PERMITS] {
            while let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
                held.push(permit);
            }
        }
        assert!(switching(|| Ok(())).await.is_ok());
        let permits = Arc::new(Semaphore::new(1));
        let permit = Arc::clone(&permits).acquire_owned().await.unwrap();
        assert!(blocking_with(permit, || Ok(())).await.is_ok());
        drop(held);
    }
}
