//! GET: which part, from which address, and its 2xx answer with a body that arrives.

use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

use super::answer::Answer;
use super::client::Body;
use super::health::Kind;
use super::limits::Lane;
use super::settings::Caller;
use super::urls::{self, Round};
use super::{Upstream, passes};
use crate::oci::accept::Accept;
use crate::oci::cause::Cause;
use crate::oci::digest::Digest;
use crate::oci::header::RateLimit;
use crate::oci::manifest::MediaType;
use crate::oci::operation::Operation;
use crate::queue::Place;

/// One of an upstream's addresses, by its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub(super) usize);

/// Which bytes are asked for, and where not to begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// The first byte.
    pub from: u64,
    /// The byte after the last; `None`: to the end.
    pub until: Option<u64>,
    /// The address that broke off last time: the next ones are asked before it.
    pub after: Option<Address>,
}

impl Part {
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
pub struct Fetched {
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
    pub address: Address,
    /// Whether another origin sent it, to which the registry redirected the request.
    pub is_elsewheres: bool,
    /// All headers of the answer. Only named ones may be passed on (`Link`, `OCI-Filters-Applied`).
    pub headers: HeaderMap,
    pub(super) body: Body,
    /// Held until the transfer ends.
    pub(super) place: Option<Place>,
}

impl Upstream {
    /// Fetches `operation`, from byte `from` on if given (`Range: bytes=N-`; an upstream that ignores it answers from
    /// the start, see [`Fetched::start`]). `Err` is whatever is not a 200 or 206.
    pub async fn get(
        &self,
        caller: &Caller,
        operation: &Operation,
        accept: &Accept,
        from: Option<u64>,
    ) -> Result<Fetched, Answer> {
        let part = Part {
            from: from.unwrap_or(0),
            ..Part::default()
        };
        self.get_part(caller, operation, accept, part).await
    }

    /// Fetches a part of `operation`, not first from where it broke off. Among several URLs a no is then not final: the
    /// one that began it has said yes, and a mirror may lack what another has. A rate limit is waited out as long as the
    /// caller waits.
    pub async fn get_part(
        &self,
        caller: &Caller,
        operation: &Operation,
        accept: &Accept,
        part: Part,
    ) -> Result<Fetched, Answer> {
        loop {
            match Box::pin(self.get_now(caller, operation, accept, part)).await {
                Err(answer) if passes(&answer, caller).await => {}
                got => return got,
            }
        }
    }

    async fn get_now(
        &self,
        caller: &Caller,
        operation: &Operation,
        accept: &Accept,
        part: Part,
    ) -> Result<Fetched, Answer> {
        if let Some(cause) = self.0.offline.cause() {
            return Err(Answer::silent(cause));
        }
        // Who fetches a blob has a place among the downloads, which lasts as long as the transfer.
        let place = if matches!(operation, Operation::Blob { .. }) {
            None
        } else {
            Some(self.admit(caller, operation).await.map_err(|answer| *answer)?)
        };
        let mut fetched = self.get_round(caller, (operation, accept), part).await?;
        fetched.place = place;
        Ok(fetched)
    }

    /// The GET to one URL after the other, until one has the last word.
    pub(super) async fn get_round(
        &self,
        caller: &Caller,
        (operation, accept): (&Operation, &Accept),
        part: Part,
    ) -> Result<Fetched, Answer> {
        let pending = self.0.sent(Kind::of_request(operation, false), operation, caller);
        let resumed = part.after.map(|Address(last)| last + 1);
        let request = resumed.map_or(urls::Request::First, |_| urls::Request::Resumed);
        let (count, lane) = (self.0.urls.len(), Lane::of(operation, true));
        let mut round = Round::new(request);
        for step in 0..count {
            let position = (resumed.unwrap_or(0) + step) % count;
            let Some(origin) = self.0.urls.get(position) else {
                continue;
            };
            let limits = &self.0.learned.limits;
            let got = match limits.admit(origin, lane, caller, Instant::now()) {
                Err(pause) => Err(Answer::paused(pause).into()),
                Ok(turn) => {
                    let (began, trace) = (Instant::now(), caller.trace.within());
                    let question = self.question((origin, &pending), caller, (operation, accept), &trace);
                    let got = question.get(part, Address(position), self.0.timeouts.idle).await;
                    let told = got.as_ref().err().map(Box::as_ref);
                    self.0.tell((operation, false), told, began, &trace);
                    match got {
                        Ok(fetched) => {
                            limits.note(caller, &fetched.rate_limit, Instant::now());
                            turn.passed();
                            Ok(fetched)
                        }
                        Err(answer) => Err(Box::new(self.0.note((origin, lane), caller, turn, *answer))),
                    }
                }
            };
            match got {
                Ok(fetched) => return Ok(self.served(pending, (origin, operation), fetched).await),
                Err(answer) => {
                    let outcome = self.outcome(origin, operation, &answer).await;
                    if round.take(origin, outcome, *answer) {
                        break;
                    }
                }
            }
        }
        Err(self.ended(pending, round))
    }
}

impl Fetched {
    /// Gives its place back before the transfer ends: what a client takes at its own pace holds none from others.
    #[must_use]
    pub fn without_place(self) -> Self {
        Self { place: None, ..self }
    }

    /// Holds a place among the downloads until the transfer ends.
    #[must_use]
    pub fn holding(self, place: Place) -> Self {
        Self {
            place: Some(place),
            ..self
        }
    }

    /// The next bytes; `None` at the end and only there. A body shorter than its `Content-Length` is an error
    /// ([`Cause::Reset`]), as is one that pauses for longer than the idle limit ([`Cause::Timeout`]).
    pub async fn chunk(&mut self) -> Option<Result<Bytes, Cause>> {
        self.body.chunk().await
    }

    /// The whole body; [`Cause::TooLarge`] as soon as it is known to be longer than `bytes_max`.
    pub async fn collect(self, bytes_max: usize) -> Result<Bytes, Cause> {
        let Fetched { body, place, .. } = self;
        let collected = body.collect(bytes_max).await;
        drop(place);
        collected
    }
}

impl fmt::Debug for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetched")
            .field("status", &self.status)
            .field("digest", &self.digest)
            .field("length", &self.length)
            .field("start", &self.start)
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}
