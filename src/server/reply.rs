//! An outcome becomes an HTTP response. Nothing else builds one, and each reason has exactly one form here.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::header::{
    ACCEPT_RANGES, AGE, ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH,
    IF_RANGE, LINK, RANGE, RETRY_AFTER, WARNING, WWW_AUTHENTICATE,
};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};

use hyper::ext::ReasonPhrase;

use super::gate::Turned;
use super::{Body, Front};
use crate::event;
use crate::oci::header::{
    CACHE_STATUS, DOCKER_CONTENT_DIGEST, DOCKER_DISTRIBUTION_API_VERSION, OCI_FILTERS_APPLIED,
};
use crate::oci::range::{ByteRange, Span, content_range, unsatisfied};
use crate::oci::{Cause, Digest, ErrorCode, Operation, Problem, RangeRequest, Reference};
use crate::policy::{Refusal, Served, Why};
use crate::pull::passing::Passed;
use crate::pull::{Content, How, Listing, Outcome, Reason, Refused, Request, Site};
use crate::store::Store;
use crate::store::manifests::HeldManifest;
use crate::upstream::Said;

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What of a request shapes its answer.
pub(super) struct Asked {
    site: Arc<Site>,
    operation: Operation,
    head: bool,
    if_none_match: Option<HeaderValue>,
    if_range: Option<HeaderValue>,
    range: RangeRequest,
    now: SystemTime,
}

impl Asked {
    pub(super) fn new(head: &Parts, request: &Request) -> Self {
        Self {
            site: Arc::clone(&request.site),
            operation: request.operation.clone(),
            head: request.head,
            if_none_match: head.headers.get(IF_NONE_MATCH).cloned(),
            if_range: head.headers.get(IF_RANGE).cloned(),
            range: RangeRequest::read(head.headers.get(RANGE)),
            now: request.now,
        }
    }

    fn upstream(&self) -> &str {
        self.site.name()
    }

    /// What was asked for, in words: written only for those who are told no.
    fn image(&self) -> String {
        match &self.operation {
            Operation::Ping => String::new(),
            Operation::Manifest {
                repository,
                reference: Reference::Tag(tag),
            } => format!("{repository}:{tag}"),
            Operation::Manifest {
                repository,
                reference: Reference::Digest(digest),
            }
            | Operation::Blob { repository, digest } => format!("{repository}@{digest}"),
            Operation::Tags { repository, .. } | Operation::Referrers { repository, .. } => {
                repository.to_string()
            }
        }
    }

    /// The code for "there is no such thing".
    fn unknown(&self) -> ErrorCode {
        match &self.operation {
            Operation::Blob { .. } => ErrorCode::BlobUnknown,
            Operation::Manifest { .. } => ErrorCode::ManifestUnknown,
            Operation::Ping | Operation::Tags { .. } | Operation::Referrers { .. } => ErrorCode::NameUnknown,
        }
    }

    /// The one part asked for, if one was; `Err` if it lies outside. Several parts are answered with the whole, as
    /// RFC 9110 §14.2 allows.
    fn span(&self, size: u64, etag: &str) -> Result<Option<Span>, ()> {
        let unchanged = self
            .if_range
            .as_ref()
            .is_none_or(|tag| tag.as_bytes() == etag.as_bytes());
        match &self.range {
            RangeRequest::Single(range) if unchanged => range.resolve(size).map(Some).ok_or(()),
            _ => Ok(None),
        }
    }

    fn has_already(&self, etag: &str) -> bool {
        let tags = self.if_none_match.as_ref().and_then(|tags| tags.to_str().ok());
        tags.is_some_and(|tags| {
            tags.split(',')
                .map(str::trim)
                .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
        })
    }
}

/// How an outcome counts, and its reason's name.
pub(super) fn told(outcome: &Outcome) -> (event::Outcome, &'static str) {
    let how = match outcome {
        Outcome::Ping => return (event::Outcome::Local, "ping"),
        Outcome::ManifestHead { .. } => return (event::Outcome::Miss, "head"),
        Outcome::Passed(_) => return (event::Outcome::Miss, Reason::Passed.name()),
        Outcome::Refused(refused) => return (event::Outcome::Refused, refused.refusal.name()),
        Outcome::Manifest(_, how) | Outcome::Blob { how, .. } | Outcome::Listing(_, how) => how,
    };
    let result = match how.reason {
        Reason::Held(served) if served.cause().is_some() || served.may_be_outdated() => event::Outcome::Stale,
        Reason::Held(_) => event::Outcome::Hit,
        Reason::Joined => event::Outcome::Coalesced,
        Reason::Fetched(_) | Reason::Passed => event::Outcome::Miss,
    };
    (result, how.reason.name())
}

/// The response to a request that was understood.
pub(super) fn answer(outcome: Outcome, asked: &Asked, front: &Front, store: &Arc<Store>) -> Response<Body> {
    match outcome {
        Outcome::Ping => {
            let mut response = respond(StatusCode::OK, Body::whole("{}".into()));
            response.headers_mut().insert(CONTENT_TYPE, JSON);
            sized(&mut response, 2, asked.head);
            response
        }
        Outcome::Manifest(manifest, how) => manifest_answer(&manifest, how, asked),
        Outcome::ManifestHead {
            digest,
            media_type,
            size,
        } => {
            let mut response = respond(StatusCode::OK, Body::empty());
            let headers = response.headers_mut();
            named(headers, &digest, &etag(&digest));
            put(headers, CONTENT_TYPE, media_type.as_str());
            put(headers, CACHE_STATUS, "ifnewer; fwd=miss; detail=head");
            headers.insert(CONTENT_LENGTH, size.into());
            response
        }
        Outcome::Blob {
            digest,
            size,
            content,
            how,
        } => blob_answer(&digest, size, content, how, asked, (front, store)),
        Outcome::Listing(listing, how) => listing_answer(listing, how, asked),
        Outcome::Passed(passed) => passed_answer(passed, front),
        Outcome::Refused(refused) => refusal_answer(&refused, asked),
    }
}

/// The response to a request that was turned away.
pub(super) fn turned(turned: &Turned, method: &Method) -> Response<Body> {
    let mut response = problem(
        turned.status(),
        &Problem::new(turned.code(), turned.to_string()),
        *method == Method::HEAD,
    );
    if turned.status() == StatusCode::METHOD_NOT_ALLOWED {
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    if turned.closes() {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn manifest_answer(manifest: &HeldManifest, how: How, asked: &Asked) -> Response<Body> {
    let etag = etag(&manifest.digest);
    let mut response = if asked.has_already(&etag) {
        respond(StatusCode::NOT_MODIFIED, Body::empty())
    } else if asked.head {
        respond(StatusCode::OK, Body::empty())
    } else {
        respond(StatusCode::OK, Body::whole(manifest.bytes.clone()))
    };
    if response.status() == StatusCode::OK {
        put(response.headers_mut(), CONTENT_TYPE, manifest.media_type.as_str());
        sized(&mut response, manifest.bytes.len() as u64, asked.head);
    }
    named(response.headers_mut(), &manifest.digest, &etag);
    tell_how(response.headers_mut(), how, asked);
    response
}

fn blob_answer(
    digest: &Digest,
    size: Option<u64>,
    content: Content,
    how: How,
    asked: &Asked,
    (front, store): (&Front, &Arc<Store>),
) -> Response<Body> {
    let etag = etag(digest);
    if asked.has_already(&etag) {
        let mut response = respond(StatusCode::NOT_MODIFIED, Body::empty());
        named(response.headers_mut(), digest, &etag);
        tell_how(response.headers_mut(), how, asked);
        return response;
    }
    let span = match size.map(|size| asked.span(size, &etag)) {
        // What passes through is verified as a whole, so it is sent as a whole.
        _ if matches!(content, Content::Passing(_)) => None,
        Some(Ok(span)) => span,
        Some(Err(())) => return unsatisfiable(size.unwrap_or_default(), asked),
        None => None,
    };
    let (start, end) = match (span, size) {
        (Some(span), _) => (span.start, Some(span.end_exclusive)),
        (None, size) => (0, size),
    };
    let length = end.map(|end| end - start);
    let events = front.events.clone();
    let body = match content {
        _ if asked.head => Body::empty(),
        Content::Head => Body::empty(),
        Content::Memory(bytes) => Body::whole(part(&bytes, start, end)),
        Content::File(held) if span.is_none() && !front.sound.knows(digest) => {
            let (buffers, sound) = (front.buffers.clone(), front.sound.clone());
            Body::checked(
                *digest,
                held.file,
                held.size,
                buffers,
                events,
                sound,
                Arc::clone(store),
            )
        }
        Content::File(held) => Body::file(
            held.file,
            start,
            end.unwrap_or(held.size),
            front.buffers.clone(),
            events,
        ),
        Content::Download(reader) => {
            let reader = if span.is_some() {
                reader.within(start, end.unwrap_or(u64::MAX))
            } else {
                reader
            };
            let reader = match asked.range {
                RangeRequest::Single(ByteRange::From(_)) => reader.patient(),
                _ => reader,
            };
            Body::download(reader, length, events)
        }
        Content::Passing(passing) => Body::passing(*passing, length, events),
    };
    let status = if span.is_some() {
        StatusCode::PARTIAL_CONTENT
    } else {
        StatusCode::OK
    };
    let mut response = respond(status, body);
    let headers = response.headers_mut();
    named(headers, digest, &etag);
    headers.insert(CONTENT_TYPE, OCTETS);
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if let (Some(span), Some(size)) = (span, size) {
        put(headers, CONTENT_RANGE, &content_range(span, size));
    }
    tell_how(headers, how, asked);
    if let Some(length) = length {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    response
}

fn part(bytes: &bytes::Bytes, start: u64, end: Option<u64>) -> bytes::Bytes {
    let within = |offset: u64| usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()));
    bytes.slice(within(start)..within(end.unwrap_or(u64::MAX)))
}

fn unsatisfiable(size: u64, asked: &Asked) -> Response<Body> {
    let message = format!(
        "{}/{} has {size} bytes; none of the bytes asked for exist",
        asked.upstream(),
        asked.image()
    );
    let mut response = problem(
        StatusCode::RANGE_NOT_SATISFIABLE,
        &Problem::new(ErrorCode::SizeInvalid, message),
        asked.head,
    );
    put(response.headers_mut(), CONTENT_RANGE, &unsatisfied(size));
    response
}

fn listing_answer(listing: Listing, how: How, asked: &Asked) -> Response<Body> {
    let length = listing.bytes.len() as u64;
    let body = if asked.head {
        Body::empty()
    } else {
        Body::whole(listing.bytes)
    };
    let mut response = respond(StatusCode::OK, body);
    sized(&mut response, length, asked.head);
    let headers = response.headers_mut();
    put(headers, CONTENT_TYPE, listing.media_type.as_str());
    if let Some(next) = listing.next {
        put(headers, LINK, &format!("<{next}>; rel=\"next\""));
    }
    if let Some(filters) = listing.filters {
        put(headers, OCI_FILTERS_APPLIED, &filters);
    }
    tell_how(headers, how, asked);
    response
}

fn passed_answer(passed: Passed, front: &Front) -> Response<Body> {
    let body = match passed.body {
        Some(fetched) => Body::fetched(*fetched, passed.size, front.events.clone()),
        None => Body::empty(),
    };
    let mut response = respond(StatusCode::OK, body);
    let headers = response.headers_mut();
    match passed.media_type {
        Some(media_type) => put(headers, CONTENT_TYPE, media_type.as_str()),
        None => {
            headers.insert(CONTENT_TYPE, OCTETS);
        }
    }
    if let Some(digest) = passed.digest {
        put(headers, DOCKER_CONTENT_DIGEST, &digest);
    }
    put(headers, CACHE_STATUS, "ifnewer; fwd=bypass; detail=passed");
    if let Some(size) = passed.size {
        headers.insert(CONTENT_LENGTH, size.into());
    }
    response
}

fn refusal_answer(refused: &Refused, asked: &Asked) -> Response<Body> {
    let (status, code, sentence) = refusal(refused, asked);
    let (upstream, answer) = (asked.upstream(), refused.answer.as_deref());
    // A refusal is told in our words alone: asked by HEAD or by GET, held or not, it must look the same.
    let theirs = match refused.refusal {
        Refusal::Silent(_) | Refusal::TooStale(_) | Refusal::Incomplete(_) => {
            answer.and_then(|answer| answer.message.as_deref())
        }
        Refusal::NotHeld | Refusal::NotVouched | Refusal::Forbidden | Refusal::Absent => None,
    };
    let message = match theirs {
        Some(theirs) => format!("{sentence} ({upstream}: {theirs})"),
        None => sentence,
    };
    let mut response = problem(status, &Problem::new(code, message), asked.head);
    if let Refusal::Silent(cause) | Refusal::TooStale(cause) | Refusal::Incomplete(cause) = refused.refusal
        && status.is_server_error()
    {
        // Docker shows the status line of a 5xx, and never its body.
        let phrase = format!(
            "{} ({upstream} {cause})",
            status.canonical_reason().unwrap_or_default()
        );
        if let Ok(phrase) = ReasonPhrase::try_from(phrase) {
            response.extensions_mut().insert(phrase);
        }
    }
    let headers = response.headers_mut();
    if status == StatusCode::UNAUTHORIZED {
        for line in answer
            .map(|answer| answer.challenge.as_slice())
            .unwrap_or_default()
        {
            headers.append(WWW_AUTHENTICATE, line.clone());
        }
    }
    if let Some(after) = answer.and_then(|answer| answer.retry_after.clone()) {
        headers.insert(RETRY_AFTER, after);
    } else if status == StatusCode::TOO_MANY_REQUESTS {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("30"));
    }
    put(
        headers,
        CACHE_STATUS,
        &format!("ifnewer; fwd=miss; detail={}", refused.refusal.name()),
    );
    response
}

/// Each refusal's status, code and sentence. Exhaustive: a new refusal does not compile until it has its own.
fn refusal(refused: &Refused, asked: &Asked) -> (StatusCode, ErrorCode, String) {
    let unknown = asked.unknown();
    let (upstream, image) = (asked.upstream(), asked.image());
    let answer = refused.answer.as_deref();
    match refused.refusal {
        // The same words for what is absent and what is not for this client: a stranger learns nothing.
        Refusal::NotHeld | Refusal::NotVouched => (
            StatusCode::NOT_FOUND,
            unknown,
            format!(
                "{upstream}/{image} is not held for you here, and the policy `never` forbids asking {upstream}"
            ),
        ),
        Refusal::Absent => (
            StatusCode::NOT_FOUND,
            unknown,
            format!("{upstream} says that {image} does not exist"),
        ),
        Refusal::Forbidden if refused.own_credential => (
            StatusCode::FORBIDDEN,
            ErrorCode::Denied,
            format!(
                "{upstream} refuses the credential that ifnewer is configured with; check [upstream.\"{upstream}\"]"
            ),
        ),
        Refusal::Forbidden => match answer.and_then(|answer| answer.status) {
            Some(StatusCode::FORBIDDEN) => (
                StatusCode::FORBIDDEN,
                ErrorCode::Denied,
                format!("{upstream} denies access to {image}"),
            ),
            Some(status) if status.is_client_error() && status != StatusCode::UNAUTHORIZED => (
                status,
                ErrorCode::Denied,
                format!("{upstream} answered {status} for {image}"),
            ),
            _ => (
                StatusCode::UNAUTHORIZED,
                ErrorCode::Unauthorized,
                format!("{upstream} wants a credential that may read {image}"),
            ),
        },
        Refusal::Silent(cause) => {
            if let Some(Said::Other(status)) = answer.map(|answer| answer.said) {
                (
                    status,
                    ErrorCode::Unknown,
                    format!("{upstream} answered {status} for {image}"),
                )
            } else {
                let (status, code) = silence(cause);
                (
                    status,
                    code,
                    format!("{upstream} {cause}, and no copy of {image} is held that may be served instead"),
                )
            }
        }
        Refusal::TooStale(cause) => {
            let (status, code) = silence(cause);
            let sentence = format!(
                "{upstream} {cause}, and the held copy of {image} was confirmed longer ago than `stale` allows"
            );
            (status, code, sentence)
        }
        Refusal::Incomplete(cause) => {
            let (status, code) = silence(cause);
            let sentence = format!(
                "{upstream} {cause}, and of {image} only a part is held: no client could pull it whole"
            );
            (status, code, sentence)
        }
    }
}

fn silence(cause: Cause) -> (StatusCode, ErrorCode) {
    match cause {
        Cause::RateLimited => (StatusCode::TOO_MANY_REQUESTS, ErrorCode::TooManyRequests),
        Cause::Timeout | Cause::ConnectTimeout | Cause::Budget => {
            (StatusCode::GATEWAY_TIMEOUT, ErrorCode::Unavailable)
        }
        Cause::BreakerOpen | Cause::Busy | Cause::Offline | Cause::Status(503) => {
            (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable)
        }
        _ => (StatusCode::BAD_GATEWAY, ErrorCode::Unavailable),
    }
}

fn respond(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(
        DOCKER_DISTRIBUTION_API_VERSION,
        HeaderValue::from_static("registry/2.0"),
    );
    response
}

fn problem(status: StatusCode, problem: &Problem, head: bool) -> Response<Body> {
    let bytes = problem.body();
    let length = bytes.len() as u64;
    let mut response = respond(status, if head { Body::empty() } else { Body::whole(bytes) });
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    sized(&mut response, length, head);
    response
}

/// States the length where hyper cannot know it: the answer to a HEAD has the length of a body that is not sent.
fn sized(response: &mut Response<Body>, length: u64, head: bool) {
    if head {
        *response.body_mut() = Body::empty();
    }
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
}

fn etag(digest: &Digest) -> String {
    format!("\"{digest}\"")
}

fn named(headers: &mut HeaderMap, digest: &Digest, etag: &str) {
    put(headers, DOCKER_CONTENT_DIGEST, &digest.to_string());
    put(headers, ETAG, etag);
}

/// RFC 9211 `Cache-Status`, `Age`, and `Warning` where the client may get something outdated.
fn tell_how(headers: &mut HeaderMap, how: How, asked: &Asked) {
    let status = match how.reason {
        Reason::Held(served) => match served.cause() {
            Some(cause) => format!("ifnewer; hit; detail={}-{}", served.name(), cause.name()),
            None => format!("ifnewer; hit; detail={}", served.name()),
        },
        Reason::Fetched(Why::Newer) => "ifnewer; fwd=stale; detail=newer".to_owned(),
        Reason::Fetched(why) => format!("ifnewer; fwd=miss; detail={}", why.name()),
        Reason::Joined => "ifnewer; fwd=miss; collapsed; detail=joined".to_owned(),
        Reason::Passed => "ifnewer; fwd=bypass; detail=passed".to_owned(),
    };
    put(headers, CACHE_STATUS, &status);
    let Some(age) = how
        .confirmed_at
        .map(|at| asked.now.duration_since(at).unwrap_or_default())
    else {
        return;
    };
    if let Reason::Held(served) = how.reason {
        headers.insert(AGE, age.as_secs().into());
        if served.may_be_outdated() {
            put(headers, WARNING, &warning(served, asked.upstream(), age));
        }
    }
}

/// RFC 7234 §5.5.7's 299, which podman and containerd show to the user.
fn warning(served: Served, upstream: &str, age: Duration) -> String {
    let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
    let why = match served {
        Served::NewUnavailable(cause) => {
            format!("{upstream} has a newer image that could not be had: it {cause}")
        }
        Served::LastComplete(cause) => {
            let cause = cause.map_or_else(|| "is not asked".to_owned(), |cause| cause.to_string());
            format!(
                "the newest image is not held whole and {upstream} {cause}; this is the last complete one"
            )
        }
        Served::KeptAbsent => format!("{upstream} no longer has this tag"),
        Served::CredentialRefused => format!("{upstream} refuses the credential of the cache"),
        other => match other.cause() {
            Some(cause) => format!("{upstream} {cause}"),
            None => format!("{upstream} was not asked"),
        },
    };
    let text: String = why.chars().filter(|c| !matches!(c, '"' | '\\')).collect();
    format!("299 ifnewer \"served from the cache, confirmed {age} ago: {text}\"")
}

/// A value that cannot be a header is left out; all of ours are printable by their types.
fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}
