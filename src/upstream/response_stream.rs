//! GET with failover between URLs, and its response as a stream.

use std::fmt;
use std::time::SystemTime;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

use super::failover::{self, FailoverRound};
use super::health::RequestKind;
use super::http_client::Body;
use super::rate_limit::LimitClass;
use super::response::{UpstreamResponse, response_date};
use super::settings::Caller;
use super::{Upstream, pause_ended};
use crate::oci::accept::Accept;
use crate::oci::digest::Digest;
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::header::RateLimit;
use crate::oci::manifest::MediaType;
use crate::queue::Permit;

/// Index of one of an upstream's URLs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UrlIndex(pub(super) usize);

impl UrlIndex {
    /// The URL before this one. After it, this one is tried first.
    pub fn previous(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }
}

/// Byte range of a GET, and the URL to try last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RangeSpec {
    /// The first byte.
    pub from: u64,
    /// The byte after the last; `None`: to the end.
    pub until: Option<u64>,
    /// The URL whose transfer failed last; the next URLs are tried before it.
    pub after: Option<UrlIndex>,
    /// Whether the caller can do without the response. A rate limit then pauses no other request.
    pub is_optional: bool,
    /// Whether a client sets the pace at which the body is read. It then gets a connection that other responses do not share.
    pub is_client_paced: bool,
}

impl RangeSpec {
    /// The `Range` header; `None` for the complete content.
    pub(super) fn range(&self) -> Option<String> {
        match (self.from, self.until) {
            (0, None) => None,
            (from, None) => Some(format!("bytes={from}-")),
            (from, Some(until)) => Some(format!("bytes={from}-{}", until.saturating_sub(1))),
        }
    }
}

/// Response to a GET with its body as a stream. Dropping it ends the transfer. Nothing is verified: digest and size
/// are only claims.
pub struct ResponseStream {
    /// 200, or 206 if a range was requested and returned.
    pub status: StatusCode,
    /// `Docker-Content-Digest`, if its algorithm is supported.
    pub digest: Option<Digest>,
    /// `Content-Type`.
    pub media_type: Option<MediaType>,
    /// Length of this body in bytes.
    pub length: Option<u64>,
    /// Offset of the body's first byte. 0 for a 200, even if a range was requested.
    pub start: u64,
    /// Size of the complete content in bytes.
    pub total: Option<u64>,
    /// The rate-limit headers.
    pub rate_limit: RateLimit,
    /// The URL that sent the response.
    pub url: UrlIndex,
    /// Whether another origin sent it, to which the registry redirected the request.
    pub is_redirect_target: bool,
    /// All response headers. Only selected ones may be forwarded (`Link`, `OCI-Filters-Applied`).
    pub headers: HeaderMap,
    pub(super) body: Body,
    /// Held until the transfer ends.
    pub(super) permit: Option<Permit>,
}

impl ResponseStream {
    /// When the response was made, as [`UpstreamResponse::date`].
    pub fn date(&self) -> Option<SystemTime> {
        response_date(&self.headers)
    }
}

impl Upstream {
    /// Fetches `endpoint`, starting at byte `from` if given (`Range: bytes=N-`). An upstream that ignores the range
    /// starts at 0, see [`ResponseStream::start`]. `Err` is any response other than 200 or 206.
    pub async fn get(
        &self,
        caller: &Caller,
        endpoint: &Endpoint,
        accept: &Accept,
        from: Option<u64>,
    ) -> Result<ResponseStream, UpstreamResponse> {
        let part = RangeSpec {
            from: from.unwrap_or(0),
            ..RangeSpec::default()
        };
        self.get_part(caller, endpoint, accept, part).await
    }

    /// Fetches a range of `endpoint`, trying the URL that failed last only after all others. A negative response of
    /// one URL is then not final: the first URL served the content, and a mirror may lack it. A rate limit is waited
    /// out until the caller's deadline.
    pub async fn get_part(
        &self,
        caller: &Caller,
        endpoint: &Endpoint,
        accept: &Accept,
        part: RangeSpec,
    ) -> Result<ResponseStream, UpstreamResponse> {
        loop {
            match Box::pin(self.get_now(caller, endpoint, accept, part)).await {
                Err(response) if pause_ended(&response, caller).await => {}
                got => return got,
            }
        }
    }

    async fn get_now(
        &self,
        caller: &Caller,
        endpoint: &Endpoint,
        accept: &Accept,
        part: RangeSpec,
    ) -> Result<ResponseStream, UpstreamResponse> {
        if let Some(cause) = self.0.offline.cause() {
            return Err(UpstreamResponse::unavailable(cause));
        }
        // A blob transfer holds a permit of the download queue instead.
        let permit = if matches!(endpoint, Endpoint::Blob { .. }) {
            None
        } else {
            Some(self.admit(caller, endpoint).await.map_err(|response| *response)?)
        };
        let mut fetched = self.get_round(caller, (endpoint, accept), part).await?;
        fetched.permit = permit;
        Ok(fetched)
    }

    /// Sends the GET to one URL after the other until a response is final.
    pub(super) async fn get_round(
        &self,
        caller: &Caller,
        (endpoint, accept): (&Endpoint, &Accept),
        part: RangeSpec,
    ) -> Result<ResponseStream, UpstreamResponse> {
        let pending = self
            .0
            .sent(RequestKind::of_request(endpoint, false), endpoint, caller);
        let resumed = part.after.map(|UrlIndex(last)| last + 1);
        let attempt = resumed.map_or(failover::Attempt::First, |_| failover::Attempt::Resumed);
        let (count, class) = (self.0.urls.len(), LimitClass::of(endpoint, true));
        let mut round = FailoverRound::new(attempt);
        for step in 0..count {
            let position = (resumed.unwrap_or(0) + step) % count;
            let Some(origin) = self.0.urls.get(position) else {
                continue;
            };
            let limits = &self.0.learned.limits;
            let got = match limits.admit(origin, class, caller, Instant::now()) {
                Err(pause) => Err(UpstreamResponse::paused(pause).into()),
                Ok(permit) => {
                    let (began, trace) = (Instant::now(), caller.trace.child());
                    let request = self.request((origin, &pending), caller, (endpoint, accept), &trace);
                    let got = request.get(part, UrlIndex(position), self.0.timeouts.idle).await;
                    let failed = got.as_ref().err().map(Box::as_ref);
                    self.0.observe((endpoint, false), failed, began, &trace);
                    match got {
                        Ok(fetched) => {
                            limits.record(caller, &fetched.rate_limit, Instant::now());
                            permit.not_limited();
                            Ok(fetched)
                        }
                        Err(response) if part.is_optional => Err(response),
                        Err(response) => Err(Box::new(self.0.record_limits(
                            (origin, class),
                            caller,
                            permit,
                            *response,
                        ))),
                    }
                }
            };
            match got {
                Ok(fetched) => return Ok(self.finish_success(pending, (origin, endpoint), fetched).await),
                Err(response) => {
                    let outcome = self.outcome(origin, endpoint, &response).await;
                    if round.add(origin, outcome, *response) {
                        break;
                    }
                }
            }
        }
        Err(self.finish_failure(pending, round))
    }
}

impl ResponseStream {
    /// Releases the permit before the transfer ends, so that a slow client does not occupy it.
    #[must_use]
    pub fn without_permit(self) -> Self {
        Self { permit: None, ..self }
    }

    /// Holds a permit of the download queue until the transfer ends.
    #[must_use]
    pub fn holding(self, permit: Permit) -> Self {
        Self {
            permit: Some(permit),
            ..self
        }
    }

    /// The next bytes; `None` only at the end. A body shorter than its `Content-Length` fails with [`UpstreamFailure::ConnectionReset`].
    /// One that stalls for longer than the idle timeout fails with [`UpstreamFailure::Timeout`].
    pub async fn chunk(&mut self) -> Option<Result<Bytes, UpstreamFailure>> {
        self.body.chunk().await
    }

    /// Reads the complete body. [`UpstreamFailure::TooLarge`] as soon as it exceeds `bytes_max`.
    pub async fn collect(self, bytes_max: usize) -> Result<Bytes, UpstreamFailure> {
        let ResponseStream { body, permit, .. } = self;
        let collected = body.collect(bytes_max).await;
        drop(permit);
        collected
    }
}

impl fmt::Debug for ResponseStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseStream")
            .field("status", &self.status)
            .field("digest", &self.digest)
            .field("length", &self.length)
            .field("start", &self.start)
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}
