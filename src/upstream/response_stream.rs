//! GET: which part, from which address, and its 2xx answer with a body that arrives.

use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

use super::failover::{self, FailoverRound};
use super::health::RequestKind;
use super::http_client::Body;
use super::rate_limit::LimitClass;
use super::response::UpstreamResponse;
use super::settings::Caller;
use super::{Upstream, pause_ended};
use crate::oci::accept::Accept;
use crate::oci::digest::Digest;
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::header::RateLimit;
use crate::oci::manifest::MediaType;
use crate::queue::Permit;

/// One of an upstream's addresses, by its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UrlIndex(pub(super) usize);

/// Which bytes are asked for, and where not to begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RangeSpec {
    /// The first byte.
    pub from: u64,
    /// The byte after the last; `None`: to the end.
    pub until: Option<u64>,
    /// The address that broke off last time: the next ones are asked before it.
    pub after: Option<UrlIndex>,
}

impl RangeSpec {
    /// The `Range` header, unless everything is asked for.
    pub(super) fn range(&self) -> Option<String> {
        match (self.from, self.until) {
            (0, None) => None,
            (from, None) => Some(format!("bytes={from}-")),
            (from, Some(until)) => Some(format!("bytes={from}-{}", until.saturating_sub(1))),
        }
    }
}

/// What a GET brought. Dropping it ends the transfer. Nothing in it is verified: digest and length are promises.
pub struct ResponseStream {
    /// 200, or 206 if a range was asked for and given.
    pub status: StatusCode,
    /// `Docker-Content-Digest`, if there is one that can be computed.
    pub digest: Option<Digest>,
    /// `Content-Type`.
    pub media_type: Option<MediaType>,
    /// Length of this body in bytes.
    pub length: Option<u64>,
    /// Offset of this body's first byte; 0 for a 200, also where a range was asked for and not given.
    pub start: u64,
    /// Length of the whole in bytes.
    pub total: Option<u64>,
    /// What the upstream says is left of the caller's allowance.
    pub rate_limit: RateLimit,
    /// Which of the upstream's addresses it came from.
    pub url: UrlIndex,
    /// Whether another origin sent it, to which the registry redirected the request.
    pub is_redirect_target: bool,
    /// All headers of the answer. Only named ones may be passed on (`Link`, `OCI-Filters-Applied`).
    pub headers: HeaderMap,
    pub(super) body: Body,
    /// Held until the transfer ends.
    pub(super) permit: Option<Permit>,
}

impl Upstream {
    /// Fetches `endpoint`, from byte `from` on if given (`Range: bytes=N-`; an upstream that ignores it answers from
    /// the start, see [`ResponseStream::start`]). `Err` is whatever is not a 200 or 206.
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

    /// Fetches a part of `endpoint`, not first from where it broke off. Among several URLs a no is then not final: the
    /// one that began it has said yes, and a mirror may lack what another has. A rate limit is waited out as long as the
    /// caller waits.
    pub async fn get_part(
        &self,
        caller: &Caller,
        endpoint: &Endpoint,
        accept: &Accept,
        part: RangeSpec,
    ) -> Result<ResponseStream, UpstreamResponse> {
        loop {
            match Box::pin(self.get_now(caller, endpoint, accept, part)).await {
                Err(answer) if pause_ended(&answer, caller).await => {}
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
        // Who fetches a blob has a place among the downloads, which lasts as long as the transfer.
        let permit = if matches!(endpoint, Endpoint::Blob { .. }) {
            None
        } else {
            Some(self.admit(caller, endpoint).await.map_err(|answer| *answer)?)
        };
        let mut fetched = self.get_round(caller, (endpoint, accept), part).await?;
        fetched.permit = permit;
        Ok(fetched)
    }

    /// The GET to one URL after the other, until one has the last word.
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
                        Err(answer) => Err(Box::new(self.0.record_limits(
                            (origin, class),
                            caller,
                            permit,
                            *answer,
                        ))),
                    }
                }
            };
            match got {
                Ok(fetched) => return Ok(self.finish_success(pending, (origin, endpoint), fetched).await),
                Err(answer) => {
                    let outcome = self.outcome(origin, endpoint, &answer).await;
                    if round.add(origin, outcome, *answer) {
                        break;
                    }
                }
            }
        }
        Err(self.finish_failure(pending, round))
    }
}

impl ResponseStream {
    /// Gives its place back before the transfer ends: what a client takes at its own pace holds none from others.
    #[must_use]
    pub fn without_permit(self) -> Self {
        Self { permit: None, ..self }
    }

    /// Holds a place among the downloads until the transfer ends.
    #[must_use]
    pub fn holding(self, permit: Permit) -> Self {
        Self {
            permit: Some(permit),
            ..self
        }
    }

    /// The next bytes; `None` at the end and only there. A body shorter than its `Content-Length` is an error
    /// ([`UpstreamFailure::ConnectionReset`]), as is one that pauses for longer than the idle limit ([`UpstreamFailure::Timeout`]).
    pub async fn chunk(&mut self) -> Option<Result<Bytes, UpstreamFailure>> {
        self.body.chunk().await
    }

    /// The whole body; [`UpstreamFailure::TooLarge`] as soon as it is known to be longer than `bytes_max`.
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
