//! A refusal becomes a status, a code and a sentence. The user often sees nothing else: it names the upstream and the
//! cause.

use http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, Response, StatusCode};
use hyper::ext::ReasonPhrase;

use super::{Asked, Body, problem, put};
use crate::oci::header::CACHE_STATUS;
use crate::oci::{ErrorBody, ErrorCode, UpstreamFailure};
use crate::policy::DenyReason;
use crate::proxy::Denied;
use crate::upstream::ResponseKind;

pub(super) fn answer(refused: &Denied, asked: &Asked) -> Response<Body> {
    let (status, code, sentence) = refusal(refused, asked);
    let (upstream, answer) = (asked.upstream(), refused.answer.as_deref());
    // A refusal is told in our words alone: asked by HEAD or by GET, held or not, it must look the same.
    let theirs = match refused.reason {
        DenyReason::UpstreamUnavailable(_)
        | DenyReason::StaleLimitExceeded(_)
        | DenyReason::Incomplete(_) => answer.and_then(|answer| answer.message.as_deref()),
        DenyReason::NotCached
        | DenyReason::NotAuthorized
        | DenyReason::Forbidden
        | DenyReason::AuthRequired
        | DenyReason::NotFound => None,
    };
    let message = match theirs {
        Some(theirs) => format!("{sentence} ({upstream}: {theirs})"),
        None => sentence,
    };
    let mut response = problem(status, &ErrorBody::new(code, message), asked.head);
    if let DenyReason::UpstreamUnavailable(cause)
    | DenyReason::StaleLimitExceeded(cause)
    | DenyReason::Incomplete(cause) = refused.reason
        && status.is_server_error()
    {
        // Docker shows the status line of a 5xx, and never its body.
        let setting = cause.setting();
        let setting = setting.map_or_else(String::new, |setting| format!("; see `{setting}`"));
        let phrase = format!(
            "{} ({upstream} {cause}{setting})",
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
        &format!("ifnewer; fwd=miss; detail={}", refused.reason.name()),
    );
    response
}

/// The registry's own challenge, as it would give it.
pub(super) fn challenged(lines: Vec<HeaderValue>, asked: &Asked) -> Response<Body> {
    let message = format!("{} wants a credential", asked.upstream());
    let said = ErrorBody::new(ErrorCode::Unauthorized, message);
    let mut response = problem(StatusCode::UNAUTHORIZED, &said, asked.head);
    for line in lines {
        response.headers_mut().append(WWW_AUTHENTICATE, line);
    }
    response
}

/// The response to a request that the registry was to answer, and did not.
pub(in crate::server) fn not_passed(upstream: &str, cause: UpstreamFailure, head: bool) -> Response<Body> {
    let (status, code) = silence(cause);
    let message = format!("{upstream} {cause}, and only it can answer this");
    problem(status, &ErrorBody::new(code, message), head)
}

/// Each refusal's status, code and sentence. Exhaustive: a new refusal does not compile until it has its own.
fn refusal(refused: &Denied, asked: &Asked) -> (StatusCode, ErrorCode, String) {
    let answer = refused.answer.as_deref();
    let unknown = asked.unknown(answer);
    let (upstream, image) = (asked.upstream(), asked.image());
    match refused.reason {
        // The same words for what is absent and what is not for this client: a stranger learns nothing.
        DenyReason::NotCached | DenyReason::NotAuthorized => (
            StatusCode::NOT_FOUND,
            unknown,
            format!(
                "{upstream}/{image} is not held for you here, and the policy `never` forbids asking {upstream}"
            ),
        ),
        DenyReason::AuthRequired => (
            StatusCode::UNAUTHORIZED,
            ErrorCode::Unauthorized,
            format!(
                "{upstream} cannot be asked now whether anyone may read {image}; a credential that it has let read it \
                 before may be enough"
            ),
        ),
        DenyReason::NotFound if unknown == ErrorCode::Unsupported => (
            StatusCode::NOT_FOUND,
            unknown,
            format!("{upstream} has no list of what refers to a manifest of {image}"),
        ),
        DenyReason::NotFound => (
            StatusCode::NOT_FOUND,
            unknown,
            format!("{upstream} says that {image} does not exist"),
        ),
        DenyReason::Forbidden if refused.proxy_credential => (
            StatusCode::FORBIDDEN,
            ErrorCode::Denied,
            format!(
                "{upstream} refuses the credential that ifnewer is configured with; check [upstream.\"{upstream}\"]"
            ),
        ),
        DenyReason::Forbidden => match answer.and_then(|answer| answer.status) {
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
        DenyReason::UpstreamUnavailable(cause) => {
            if let Some(ResponseKind::Other(status)) = answer.map(|answer| answer.kind) {
                (
                    status,
                    ErrorCode::Unknown,
                    format!("{upstream} answered {status} for {image}"),
                )
            } else {
                let (status, code) = silence(cause);
                let setting = cause.setting().map_or_else(String::new, |setting| {
                    format!("; see `{setting}` of [upstream.\"{upstream}\"] in ifnewer's configuration")
                });
                let sentence = format!(
                    "{upstream} {cause}, and no copy of {image} is held that may be served instead{setting}"
                );
                (status, code, sentence)
            }
        }
        DenyReason::StaleLimitExceeded(cause) => {
            let (status, code) = silence(cause);
            let sentence = format!(
                "{upstream} {cause}, and the held copy of {image} was confirmed longer ago than `stale_if_error` allows"
            );
            (status, code, sentence)
        }
        DenyReason::Incomplete(cause) => {
            let (status, code) = silence(cause);
            let sentence = format!(
                "{upstream} {cause}, and of {image} only a part is held: no client could pull it whole"
            );
            (status, code, sentence)
        }
    }
}

fn silence(cause: UpstreamFailure) -> (StatusCode, ErrorCode) {
    match cause {
        UpstreamFailure::RateLimited => (StatusCode::TOO_MANY_REQUESTS, ErrorCode::TooManyRequests),
        UpstreamFailure::Timeout | UpstreamFailure::ConnectTimeout | UpstreamFailure::RevalidateTimeout => {
            (StatusCode::GATEWAY_TIMEOUT, ErrorCode::Unavailable)
        }
        UpstreamFailure::ClientQueueFull | UpstreamFailure::QueueFull => {
            (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::TooManyRequests)
        }
        UpstreamFailure::BreakerOpen
        | UpstreamFailure::Busy
        | UpstreamFailure::Offline
        | UpstreamFailure::Status(503) => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable),
        _ => (StatusCode::BAD_GATEWAY, ErrorCode::Unavailable),
    }
}
