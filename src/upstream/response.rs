//! Classified upstream response: status and headers of a response become an [`UpstreamResponse`]. No I/O.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{AGE, DATE, LAST_MODIFIED, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tokio::time::Instant;

use crate::oci::digest::Digest;
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::header::{CacheHeaders, DOCKER_CONTENT_DIGEST, RateLimit};
use crate::oci::manifest::MediaType;
use crate::queue::AcquireError;

use super::http_client::{HttpFailure, content_length};
use super::proof::{self, Sender};
use super::rate_limit::Pause;
use super::retry_after::is_limit;

/// The response to one request, or the reason why there is none.
#[derive(Clone)]
pub struct UpstreamResponse {
    /// The classification.
    pub kind: ResponseKind,
    /// The status code, if there was a response.
    pub status: Option<StatusCode>,
    /// All `WWW-Authenticate` lines, unchanged, to be forwarded with a 401. The lines received before a token was
    /// sent are preferred: containerd gives up on a challenge with `error=`.
    pub challenge: Vec<HeaderValue>,
    /// `Retry-After` as received, or the remaining pause.
    pub retry_after: Option<HeaderValue>,
    /// `Content-Type` of the manifest or blob, without parameters.
    pub media_type: Option<MediaType>,
    /// `Docker-Content-Digest`, if its algorithm is supported. It is only a claim; [`Self::kind`] says whether it is
    /// proven.
    pub header_digest: Option<Digest>,
    /// Size in bytes of the manifest or blob, not of the response body.
    pub length: Option<u64>,
    /// `Last-Modified` of a success: when the registry's storage got the content.
    pub last_modified: Option<SystemTime>,
    /// When the response was made: its `Date`, plus its `Age` in a cache on the way.
    pub date: Option<SystemTime>,
    /// What caches before this one say about a success.
    pub caches: Option<CacheHeaders>,
    /// The rate-limit headers.
    pub rate_limit: RateLimit,
    /// The registry's error code, cleaned, from the body of a failed GET.
    pub code: Option<String>,
    /// The registry's error message, cleaned.
    pub message: Option<String>,
    /// Description of a failure, for the operator: it may contain hosts that clients must not learn.
    pub detail: Option<Arc<str>>,
    /// Whether the failure is that of another host, to which the upstream redirected the request.
    pub is_redirect_target: bool,
    /// The complete manifest, if a GET replaced the HEAD; it need not be fetched again.
    pub body: Option<(Bytes, MediaType)>,
    /// The rate-limit pause that follows from this response, or that kept the request from being sent.
    pub pause: Option<Pause>,
    /// The wait that the upstream stated, for a rate limit or a 503.
    pub stated_wait: Option<Duration>,
}

/// Classification of a response. Denied, not found and unavailable are distinct, as are a proven and an unproven
/// digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseKind {
    /// Success with this digest, proven by the registry's headers or by the bytes.
    Digest(Digest),
    /// A 200 that may mean success with this digest, but comes from another origin after a redirect or lacks the
    /// registry's headers. It must not create a grant, a public mark or a repository membership.
    UnprovenDigest(Digest),
    /// A 200 without a usable digest: a list, a ping, or content with an unsupported digest algorithm. It creates no
    /// grant.
    NoDigest,
    /// 404 or 410.
    NotFound,
    /// 401 or 403 for this caller.
    Denied,
    /// No usable response, and why.
    Unavailable(UpstreamFailure),
    /// Any other 4xx, to be forwarded.
    Other(StatusCode),
}

impl fmt::Display for ResponseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(digest) => write!(f, "digest {digest}"),
            Self::UnprovenDigest(digest) => write!(f, "unproven digest {digest}"),
            Self::NoDigest => f.write_str("no digest"),
            Self::NotFound => f.write_str("not found"),
            Self::Denied => f.write_str("access denied"),
            Self::Unavailable(cause) => write!(f, "unavailable: it {cause}"),
            Self::Other(status) => write!(f, "status {status}"),
        }
    }
}

impl ResponseKind {
    /// Whether it is a success, proven or not.
    pub fn is_success(self) -> bool {
        matches!(self, Self::Digest(_) | Self::UnprovenDigest(_) | Self::NoDigest)
    }
}

impl UpstreamResponse {
    /// A response that stands for a failure.
    pub fn unavailable(cause: UpstreamFailure) -> UpstreamResponse {
        UpstreamResponse {
            kind: ResponseKind::Unavailable(cause),
            status: None,
            challenge: Vec::new(),
            retry_after: None,
            media_type: None,
            header_digest: None,
            length: None,
            last_modified: None,
            date: None,
            caches: None,
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

    /// Like [`Self::unavailable`], with the failure's description.
    pub(super) fn from_failure(unavailable: HttpFailure) -> UpstreamResponse {
        UpstreamResponse {
            detail: unavailable.detail,
            is_redirect_target: unavailable.is_redirect_target,
            ..UpstreamResponse::unavailable(unavailable.cause)
        }
    }

    /// Why this response delivers no content: the failure, or its status.
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

    /// A request that was not sent because it got no permit.
    pub fn not_admitted(refused: AcquireError) -> UpstreamResponse {
        match refused {
            AcquireError::Abandoned => UpstreamResponse::unavailable(UpstreamFailure::Abandoned),
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

    /// A request that was not sent because of a rate-limit pause.
    pub(super) fn paused(pause: Pause) -> UpstreamResponse {
        UpstreamResponse::unavailable(pause.cause()).with_pause(pause)
    }

    /// Adds the pause, with its remaining time as `Retry-After`.
    pub(super) fn with_pause(self, pause: Pause) -> UpstreamResponse {
        let left = pause.left(Instant::now());
        let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
        UpstreamResponse {
            retry_after: Some(HeaderValue::from(seconds)),
            pause: Some(pause),
            ..self
        }
    }

    /// Why to wait before the next request: a rate limit, or a 503 that states a wait.
    pub(super) fn backoff_cause(&self) -> Option<UpstreamFailure> {
        match self.kind {
            ResponseKind::Unavailable(UpstreamFailure::RateLimited) => Some(UpstreamFailure::RateLimited),
            ResponseKind::Unavailable(cause @ UpstreamFailure::Status(503)) if self.stated_wait.is_some() => {
                Some(cause)
            }
            _ => None,
        }
    }

    /// Classifies a response to `endpoint` by its status, headers and sender.
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
            // A proxy on the way sends 407 and 408, so they are not the registry's response. A 3xx that could not be
            // followed is malformed.
            508 => ResponseKind::Unavailable(UpstreamFailure::Loop),
            407 | 408 | 500..=599 => ResponseKind::Unavailable(UpstreamFailure::Status(status.as_u16())),
            400..=499 => ResponseKind::Other(status),
            _ => ResponseKind::Unavailable(UpstreamFailure::Malformed),
        };
        UpstreamResponse {
            kind,
            status: Some(status),
            challenge: headers.get_all(WWW_AUTHENTICATE).iter().cloned().collect(),
            // `Retry-After` of other responses is ignored.
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
            last_modified: http_date(headers, LAST_MODIFIED).filter(|_| status.is_success()),
            date: response_date(headers),
            caches: CacheHeaders::read(headers).filter(|_| status.is_success()),
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

    /// The failure, if the upstream gave no usable response.
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

/// A header with a time (RFC 9110 §5.6.7). `None` if it is missing, repeated or invalid.
fn http_date(headers: &HeaderMap, name: HeaderName) -> Option<SystemTime> {
    let mut lines = headers.get_all(name).iter();
    let (line, None) = (lines.next()?, lines.next()) else {
        return None;
    };
    httpdate::parse_http_date(line.to_str().ok()?).ok()
}

/// Longest `Age` that counts. No cache keeps a response of a registry for longer.
const AGE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Latest `Date` that counts, in the year 8307. A time that is computed from a later one may have no RFC 3339 text.
const DATE_MAX_AFTER_EPOCH: Duration = Duration::from_secs(200_000_000_000);

/// When the response was made: its `Date`, plus its `Age` in a cache on the way.
pub(super) fn response_date(headers: &HeaderMap) -> Option<SystemTime> {
    let age = headers.get(AGE).and_then(|age| age.to_str().ok()?.parse().ok());
    let age = Duration::from_secs(age.unwrap_or(0)).min(AGE_MAX);
    let date = http_date(headers, DATE)?;
    let since_epoch = date.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    (since_epoch <= DATE_MAX_AFTER_EPOCH).then(|| date.checked_add(age))?
}

/// `Docker-Content-Digest`. `None` if it is missing, ambiguous or of an unsupported algorithm.
pub(super) fn header_digest(headers: &HeaderMap) -> Option<Digest> {
    let mut lines = headers.get_all(DOCKER_CONTENT_DIGEST).iter();
    let first = lines.next()?;
    if lines.any(|other| other != first) {
        return None;
    }
    first.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn date_and_age_of_a_liar_are_bounded() {
        let read = |date: &str, age: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(DATE, date.parse().unwrap());
            headers.insert(AGE, age.parse().unwrap());
            response_date(&headers)
        };
        let date = "Fri, 15 Jan 2027 08:00:00 GMT";
        let at = |seconds: u64| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds));
        assert_eq!(read(date, "60"), at(60));
        for age in ["9223372035054775807", "18446744073709551615", "31536001"] {
            assert_eq!(read(date, age), at(365 * 86_400), "{age}");
        }
        assert_eq!(read(date, "-1"), at(0));
        assert_eq!(read("Fri, 31 Dec 9999 23:59:59 GMT", "60"), None);
    }
}
