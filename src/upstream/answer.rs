//! What an upstream said to a question: status and headers become an [`Answer`]. Pure.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::time::Instant;

use crate::oci::cause::Cause;
use crate::oci::digest::Digest;
use crate::oci::header::{DOCKER_CONTENT_DIGEST, RateLimit};
use crate::oci::manifest::MediaType;
use crate::oci::operation::Operation;
use crate::queue::NoPlace;

use super::client::{Unavailable, content_length};
use super::limits::Pause;
use super::proof::{self, Sender};
use super::retry_after::is_limit;

/// The answer to one question.
#[derive(Clone)]
pub struct Answer {
    /// What it comes down to.
    pub said: Said,
    /// The status, if there was one.
    pub status: Option<StatusCode>,
    /// Every `WWW-Authenticate` line, bytes intact, to be passed on with a 401. Lines written before a token was sent
    /// are preferred to those that complain about the token: containerd gives up at the sight of `error=`.
    pub challenge: Vec<HeaderValue>,
    /// `Retry-After` as it came, or what is left of it.
    pub retry_after: Option<HeaderValue>,
    /// `Content-Type` of the manifest or blob, without parameters.
    pub media_type: Option<MediaType>,
    /// `Docker-Content-Digest`, if there is one that can be computed: a label, whatever [`Self::said`] makes of it.
    pub named: Option<Digest>,
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
    pub is_elsewheres: bool,
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
pub enum Said {
    /// Yes, and this is the digest: proven by the registry's own marks, or by bytes that hash to it.
    Is(Digest),
    /// A 200 that may be a yes for this digest: of another origin after a redirect, or without the registry's marks. No
    /// grant, no publicness and no membership follow from it.
    Unproven(Digest),
    /// A 200 to what has no digest that we can use: a list, a ping, content of a foreign algorithm. Opens nothing.
    Unnamed,
    /// 404 or 410.
    Absent,
    /// 401 or 403: not to this caller.
    Forbidden,
    /// Nothing usable, and why.
    Silent(Cause),
    /// Any other 4xx, to be passed on.
    Other(StatusCode),
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Is(digest) => write!(f, "it names {digest}"),
            Self::Unproven(digest) => write!(f, "it may name {digest}, and does not prove it"),
            Self::Unnamed => f.write_str("it names no digest"),
            Self::Absent => f.write_str("it says that there is no such thing"),
            Self::Forbidden => f.write_str("it does not let this client read it"),
            Self::Silent(cause) => write!(f, "it {cause}"),
            Self::Other(status) => write!(f, "it answered {status}"),
        }
    }
}

impl Said {
    /// Whether it may be a yes, proven or not.
    pub fn is_yes(self) -> bool {
        matches!(self, Self::Is(_) | Self::Unproven(_) | Self::Unnamed)
    }
}

impl Answer {
    /// No usable answer.
    pub fn silent(cause: Cause) -> Answer {
        Answer {
            said: Said::Silent(cause),
            status: None,
            challenge: Vec::new(),
            retry_after: None,
            media_type: None,
            named: None,
            length: None,
            rate_limit: RateLimit::default(),
            code: None,
            message: None,
            detail: None,
            is_elsewheres: false,
            body: None,
            pause: None,
            stated_wait: None,
        }
    }

    /// No usable answer, with the reason in words.
    pub(super) fn unavailable(unavailable: Unavailable) -> Answer {
        Answer {
            detail: unavailable.detail,
            is_elsewheres: unavailable.is_elsewheres,
            ..Answer::silent(unavailable.cause)
        }
    }

    /// Why this answer brings nothing: its silence, or the status that said no.
    pub fn cause(&self) -> Cause {
        match (self.said, self.status) {
            (Said::Silent(cause), _) => cause,
            (Said::Unproven(_), _) => Cause::NotRegistry,
            (Said::Other(status), _) | (_, Some(status)) => Cause::Status(status.as_u16()),
            (Said::Is(_) | Said::Unnamed | Said::Absent | Said::Forbidden, None) => Cause::Malformed,
        }
    }

    /// Not asked, for there is no place among the requests to the upstream.
    pub fn unplaced(refused: NoPlace) -> Answer {
        match refused {
            NoPlace::Abandoned => Answer::silent(Cause::Busy),
            NoPlace::Full(full) => {
                let cause = if full.is_clients_own {
                    Cause::ClientQueueFull
                } else {
                    Cause::QueueFull
                };
                Answer {
                    retry_after: Some(HeaderValue::from(full.retry_after.as_secs().max(1))),
                    ..Answer::silent(cause)
                }
            }
        }
    }

    /// Not asked, for the upstream said to wait.
    pub(super) fn paused(pause: Pause) -> Answer {
        Answer::silent(pause.cause()).within(pause)
    }

    /// The same, with what is left of the pause to be passed on.
    pub(super) fn within(self, pause: Pause) -> Answer {
        let left = pause.left(Instant::now());
        let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
        Answer {
            retry_after: Some(HeaderValue::from(seconds)),
            pause: Some(pause),
            ..self
        }
    }

    /// What is to be waited for: a limit, or a 503 that says how long.
    pub(super) fn asks_to_wait(&self) -> Option<Cause> {
        match self.said {
            Said::Silent(Cause::RateLimited) => Some(Cause::RateLimited),
            Said::Silent(cause @ Cause::Status(503)) if self.stated_wait.is_some() => Some(cause),
            _ => None,
        }
    }

    /// What status and headers say about `operation`, and who sent them.
    pub(super) fn read(
        operation: &Operation,
        status: StatusCode,
        headers: &HeaderMap,
        sender: Sender,
    ) -> Answer {
        let said = match status.as_u16() {
            200..=299 => proof::read(operation, status, headers, sender),
            _ if is_limit(status, headers) => Said::Silent(Cause::RateLimited),
            401 | 403 => Said::Forbidden,
            404 | 410 if proof::is_absent_page(status, headers) => Said::Silent(Cause::NotRegistry),
            404 | 410 => Said::Absent,
            // 407 and 408 are a proxy's word, and a redirect that leads nowhere is nobody's.
            407 | 408 | 500..=599 => Said::Silent(Cause::Status(status.as_u16())),
            400..=499 => Said::Other(status),
            _ => Said::Silent(Cause::Malformed),
        };
        Answer {
            said,
            status: Some(status),
            challenge: headers.get_all(WWW_AUTHENTICATE).iter().cloned().collect(),
            // With an answer it means nothing.
            retry_after: headers
                .get(RETRY_AFTER)
                .filter(|_| matches!(said, Said::Silent(_)))
                .cloned(),
            media_type: proof::media_type(headers).filter(|_| status.is_success()),
            named: header_digest(headers).filter(|_| status.is_success()),
            length: if status == StatusCode::OK {
                content_length(headers)
            } else {
                None
            },
            rate_limit: RateLimit::read(headers),
            code: None,
            message: None,
            detail: None,
            is_elsewheres: false,
            body: None,
            pause: None,
            stated_wait: None,
        }
    }

    /// Whether the upstream gave no usable answer.
    pub fn silence(&self) -> Option<Cause> {
        match self.said {
            Said::Silent(cause) => Some(cause),
            _ => None,
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("said", &self.said)
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
