//! What an upstream said to a question: status and headers become an [`UpstreamResponse`]. Pure.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::time::Instant;

use crate::oci::digest::Digest;
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::header::{DOCKER_CONTENT_DIGEST, RateLimit};
use crate::oci::manifest::MediaType;
use crate::queue::AcquireError;

use super::http_client::{HttpFailure, content_length};
use super::proof::{self, Sender};
use super::rate_limit::Pause;
use super::retry_after::is_limit;

/// The answer to one question.
#[derive(Clone)]
pub struct UpstreamResponse {
    /// What it comes down to.
    pub kind: ResponseKind,
    /// The status, if there was one.
    pub status: Option<StatusCode>,
    /// Every `WWW-Authenticate` line, bytes intact, to be passed on with a 401. Lines written before a token was sent
    /// are preferred to those that complain about the token: containerd gives up at the sight of `error=`.
    pub challenge: Vec<HeaderValue>,
    /// `Retry-After` as it came, or what is left of it.
    pub retry_after: Option<HeaderValue>,
    /// `Content-Type` of the manifest or blob, without parameters.
    pub media_type: Option<MediaType>,
    /// `Docker-Content-Digest`, if there is one that can be computed: a label, whatever [`Self::kind`] makes of it.
    pub header_digest: Option<Digest>,
    /// Length in bytes of the manifest or blob asked about, not of the answer.
    pub length: Option<u64>,
    /// What the upstream says is left of the caller's allowance.
    pub rate_limit: RateLimit,
    /// The upstream's own error code, cleaned: of what was asked by GET and refused.
    pub code: Option<String>,
    /// The upstream's own error text, cleaned.
    pub message: Option<String>,
    /// Why there is no usable answer, in words for the operator: it may name hosts that a client does not know.
    pub detail: Option<Arc<str>>,
    /// Whether it is another host that gave none, to which the upstream redirected the request.
    pub is_redirect_target: bool,
    /// The whole manifest, where a GET had to stand in for the HEAD: it need not be fetched again.
    pub body: Option<(Bytes, MediaType)>,
    /// The pause that the upstream asked for, or within which it was not asked at all.
    pub pause: Option<Pause>,
    /// How long the upstream says to wait: of a limit, and of a 503.
    pub stated_wait: Option<Duration>,
}

/// What an answer comes down to. A denial, an absence and a silence can never be confused, and neither can a yes that
/// is proven and one that is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseKind {
    /// Yes, and this is the digest: proven by the registry's own marks, or by bytes that hash to it.
    Digest(Digest),
    /// A 200 that may be a yes for this digest: of another origin after a redirect, or without the registry's marks. No
    /// grant, no publicness and no membership follow from it.
    UnprovenDigest(Digest),
    /// A 200 to what has no digest that we can use: a list, a ping, content of a foreign algorithm. Opens nothing.
    NoDigest,
    /// 404 or 410.
    NotFound,
    /// 401 or 403: not to this caller.
    Denied,
    /// Nothing usable, and why.
    Unavailable(UpstreamFailure),
    /// Any other 4xx, to be passed on.
    Other(StatusCode),
}

impl fmt::Display for ResponseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(digest) => write!(f, "it names {digest}"),
            Self::UnprovenDigest(digest) => write!(f, "it may name {digest}, and does not prove it"),
            Self::NoDigest => f.write_str("it names no digest"),
            Self::NotFound => f.write_str("it says that there is no such thing"),
            Self::Denied => f.write_str("it does not let this client read it"),
            Self::Unavailable(cause) => write!(f, "it {cause}"),
            Self::Other(status) => write!(f, "it answered {status}"),
        }
    }
}

impl ResponseKind {
    /// Whether it may be a yes, proven or not.
    pub fn is_success(self) -> bool {
        matches!(self, Self::Digest(_) | Self::UnprovenDigest(_) | Self::NoDigest)
    }
}

impl UpstreamResponse {
    /// No usable answer.
    pub fn unavailable(cause: UpstreamFailure) -> UpstreamResponse {
        UpstreamResponse {
            kind: ResponseKind::Unavailable(cause),
            status: None,
            challenge: Vec::new(),
            retry_after: None,
            media_type: None,
            header_digest: None,
            length: None,
            rate_limit: RateLimit::default(),
            code: None,
            message: None,
            detail: None,
            is_redirect_target: false,
            body: None,
            pause: None,
            stated_wait: None,
        }
    }

    /// No usable answer, with the reason in words.
    pub(super) fn from_failure(unavailable: HttpFailure) -> UpstreamResponse {
        UpstreamResponse {
            detail: unavailable.detail,
            is_redirect_target: unavailable.is_redirect_target,
            ..UpstreamResponse::unavailable(unavailable.cause)
        }
    }

    /// Why this answer brings nothing: its silence, or the status that said no.
    pub fn cause(&self) -> UpstreamFailure {
        match (self.kind, self.status) {
            (ResponseKind::Unavailable(cause), _) => cause,
            (ResponseKind::UnprovenDigest(_), _) => UpstreamFailure::NotRegistry,
            (ResponseKind::Other(status), _) | (_, Some(status)) => UpstreamFailure::Status(status.as_u16()),
            (
                ResponseKind::Digest(_)
                | ResponseKind::NoDigest
                | ResponseKind::NotFound
                | ResponseKind::Denied,
                None,
            ) => UpstreamFailure::Malformed,
        }
    }

    /// Not asked, for there is no place among the requests to the upstream.
    pub fn not_admitted(refused: AcquireError) -> UpstreamResponse {
        match refused {
            AcquireError::Abandoned => UpstreamResponse::unavailable(UpstreamFailure::Busy),
            AcquireError::Full(full) => {
                let cause = if full.is_client_limit {
                    UpstreamFailure::ClientQueueFull
                } else {
                    UpstreamFailure::QueueFull
                };
                UpstreamResponse {
                    retry_after: Some(HeaderValue::from(full.retry_after.as_secs().max(1))),
                    ..UpstreamResponse::unavailable(cause)
                }
            }
        }
    }

    /// Not asked, for the upstream said to wait.
    pub(super) fn paused(pause: Pause) -> UpstreamResponse {
        UpstreamResponse::unavailable(pause.cause()).with_pause(pause)
    }

    /// The same, with what is left of the pause to be passed on.
    pub(super) fn with_pause(self, pause: Pause) -> UpstreamResponse {
        let left = pause.left(Instant::now());
        let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
        UpstreamResponse {
            retry_after: Some(HeaderValue::from(seconds)),
            pause: Some(pause),
            ..self
        }
    }

    /// What is to be waited for: a limit, or a 503 that says how long.
    pub(super) fn backoff_cause(&self) -> Option<UpstreamFailure> {
        match self.kind {
            ResponseKind::Unavailable(UpstreamFailure::RateLimited) => Some(UpstreamFailure::RateLimited),
            ResponseKind::Unavailable(cause @ UpstreamFailure::Status(503)) if self.stated_wait.is_some() => {
                Some(cause)
            }
            _ => None,
        }
    }

    /// What status and headers say about `endpoint`, and who sent them.
    pub(super) fn read(
        endpoint: &Endpoint,
        status: StatusCode,
        headers: &HeaderMap,
        sender: Sender,
    ) -> UpstreamResponse {
        let kind = match status.as_u16() {
            200..=299 => proof::read(endpoint, status, headers, sender),
            _ if is_limit(status, headers) => ResponseKind::Unavailable(UpstreamFailure::RateLimited),
            401 | 403 => ResponseKind::Denied,
            404 | 410 if proof::is_not_found_page(status, headers) => {
                ResponseKind::Unavailable(UpstreamFailure::NotRegistry)
            }
            404 | 410 => ResponseKind::NotFound,
            // 407 and 408 are a proxy's word, and a redirect that leads nowhere is nobody's.
            407 | 408 | 500..=599 => ResponseKind::Unavailable(UpstreamFailure::Status(status.as_u16())),
            400..=499 => ResponseKind::Other(status),
            _ => ResponseKind::Unavailable(UpstreamFailure::Malformed),
        };
        UpstreamResponse {
            kind,
            status: Some(status),
            challenge: headers.get_all(WWW_AUTHENTICATE).iter().cloned().collect(),
            // With an answer it means nothing.
            retry_after: headers
                .get(RETRY_AFTER)
                .filter(|_| matches!(kind, ResponseKind::Unavailable(_)))
                .cloned(),
            media_type: proof::media_type(headers).filter(|_| status.is_success()),
            header_digest: header_digest(headers).filter(|_| status.is_success()),
            length: if status == StatusCode::OK {
                content_length(headers)
            } else {
                None
            },
            rate_limit: RateLimit::read(headers),
            code: None,
            message: None,
            detail: None,
            is_redirect_target: false,
            body: None,
            pause: None,
            stated_wait: None,
        }
    }

    /// Whether the upstream gave no usable answer.
    pub fn failure(&self) -> Option<UpstreamFailure> {
        match self.kind {
            ResponseKind::Unavailable(cause) => Some(cause),
            _ => None,
        }
    }
}

impl fmt::Debug for UpstreamResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpstreamResponse")
            .field("kind", &self.kind)
            .field("status", &self.status)
            .field("challenge", &self.challenge)
            .field("length", &self.length)
            .field("message", &self.message)
            .finish_non_exhaustive()
    }
}

/// `Docker-Content-Digest`, strictly: none, two different ones, or one we cannot compute are all no digest.
pub(super) fn header_digest(headers: &HeaderMap) -> Option<Digest> {
    let mut lines = headers.get_all(DOCKER_CONTENT_DIGEST).iter();
    let first = lines.next()?;
    if lines.any(|other| other != first) {
        return None;
    }
    first.to_str().ok()?.parse().ok()
}
