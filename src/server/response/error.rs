//! Error responses for denials. The message names the upstream and the cause, because users often see nothing else.

use http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, Response, StatusCode};
use hyper::ext::ReasonPhrase;

use super::{Body, ResponseContext, error_response, set_header};
use crate::oci::header::CACHE_STATUS;
use crate::oci::{Digest, Endpoint, ErrorBody, ErrorCode, Reference, UpstreamFailure};
use crate::policy::DenyReason;
use crate::policy::min_age::YoungDigest;
use crate::proxy::Denied;
use crate::store::verdicts::VerdictNote;
use crate::upstream::ResponseKind;

pub(super) fn build(refused: &Denied, context: &ResponseContext) -> Response<Body> {
    let (status, code, message_text) = describe(refused, context);
    let (upstream, answer) = (context.upstream(), refused.response.as_deref());
    // A denial uses the cache's own message only. It must look the same for HEAD and GET, and for cached and uncached
    // content.
    let upstream_message = match refused.reason {
        DenyReason::UpstreamUnavailable(_)
        | DenyReason::StaleLimitExceeded(_)
        | DenyReason::Incomplete(_) => answer.and_then(|answer| answer.message.as_deref()),
        DenyReason::NotCached
        | DenyReason::NotAuthorized
        | DenyReason::Forbidden
        | DenyReason::AuthRequired
        | DenyReason::NotFound
        | DenyReason::TooYoung(_)
        | DenyReason::Blocked(_) => None,
    };
    let message = match upstream_message {
        Some(upstream_message) => format!("{message_text} ({upstream}: {upstream_message})"),
        None => message_text,
    };
    let mut response = error_response(status, &ErrorBody::new(code, message), context.head);
    if let DenyReason::UpstreamUnavailable(cause)
    | DenyReason::StaleLimitExceeded(cause)
    | DenyReason::Incomplete(cause) = refused.reason
        && status.is_server_error()
    {
        // Docker shows the status line of a 5xx and not its body.
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
    if let Some(text) = operators_reason(refused)
        && let Ok(phrase) = ReasonPhrase::try_from(format!("Forbidden ({text})"))
    {
        response.extensions_mut().insert(phrase);
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
    set_header(
        headers,
        CACHE_STATUS,
        &format!("ifnewer; fwd=miss; detail={}", refused.reason.name()),
    );
    response
}

/// Why the operator does not let the content be served, for the status line: containerd resolves a tag by HEAD and shows
/// nothing else.
fn operators_reason(refused: &Denied) -> Option<String> {
    match refused.reason {
        DenyReason::Blocked(_) => {
            let note = refused.block.as_deref().and_then(|note| note.reason.as_deref());
            Some(note.map_or_else(
                || "blocked in this cache".to_owned(),
                |reason| format!("blocked in this cache: {reason}"),
            ))
        }
        DenyReason::TooYoung(_) => Some("not known to be old enough for `min_age`".to_owned()),
        _ => None,
    }
}

/// 401 with the registry's own challenge.
pub(super) fn unauthorized(lines: Vec<HeaderValue>, context: &ResponseContext) -> Response<Body> {
    let message = format!("{} requires a credential", context.upstream());
    let said = ErrorBody::new(ErrorCode::Unauthorized, message);
    let mut response = error_response(StatusCode::UNAUTHORIZED, &said, context.head);
    for line in lines {
        response.headers_mut().append(WWW_AUTHENTICATE, line);
    }
    response
}

/// The response if a request could not be forwarded.
pub(in crate::server) fn forward_failed(
    upstream: &str,
    cause: UpstreamFailure,
    head: bool,
) -> Response<Body> {
    let (status, code) = failure_status(cause);
    let message = format!("{upstream} {cause}; this request cannot be served from the cache");
    error_response(status, &ErrorBody::new(code, message), head)
}

/// Status, code and message of each denial. The match is exhaustive, so a new denial does not compile without its
/// own.
fn describe(refused: &Denied, context: &ResponseContext) -> (StatusCode, ErrorCode, String) {
    let answer = refused.response.as_deref();
    let unknown = context.not_found_code(answer);
    let (upstream, image) = (context.upstream(), context.endpoint.image());
    match refused.reason {
        // The same message for missing and unauthorized content, so that a client without a grant learns nothing.
        DenyReason::NotCached | DenyReason::NotAuthorized => (
            StatusCode::NOT_FOUND,
            unknown,
            format!(
                "{upstream}/{image} is not cached for this client; policy `never` disables requests to {upstream}"
            ),
        ),
        DenyReason::AuthRequired => (
            StatusCode::UNAUTHORIZED,
            ErrorCode::Unauthorized,
            format!(
                "{upstream} is unavailable, so anonymous access to {image} cannot be checked; send a credential that had \
                 access before"
            ),
        ),
        DenyReason::NotFound if unknown == ErrorCode::Unsupported => (
            StatusCode::NOT_FOUND,
            unknown,
            format!("{upstream} has no referrers API for {image}"),
        ),
        DenyReason::NotFound => (
            StatusCode::NOT_FOUND,
            unknown,
            format!("{upstream} reports that {image} does not exist"),
        ),
        DenyReason::Forbidden if refused.proxy_credential => (
            StatusCode::FORBIDDEN,
            ErrorCode::Denied,
            format!(
                "{upstream} rejected the credential configured for ifnewer; check [upstream.\"{upstream}\"]"
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
                format!("{upstream} responded with status {status} for {image}"),
            ),
            _ => (
                StatusCode::UNAUTHORIZED,
                ErrorCode::Unauthorized,
                format!("{upstream} requires a credential with read access to {image}"),
            ),
        },
        DenyReason::UpstreamUnavailable(cause) => {
            if let Some(ResponseKind::Other(status)) = answer.map(|answer| answer.kind) {
                (
                    status,
                    ErrorCode::Unknown,
                    format!("{upstream} responded with status {status} for {image}"),
                )
            } else {
                let (status, code) = failure_status(cause);
                let setting = cause.setting().map_or_else(String::new, |setting| {
                    format!("; see `{setting}` of [upstream.\"{upstream}\"] in ifnewer's configuration")
                });
                let message_text =
                    format!("{upstream} {cause}; no cached copy of {image} may be served{setting}");
                (status, code, message_text)
            }
        }
        DenyReason::StaleLimitExceeded(cause) => {
            let (status, code) = failure_status(cause);
            let message_text = format!(
                "{upstream} {cause}, and the cached copy of {image} is older than `stale_if_error` allows"
            );
            (status, code, message_text)
        }
        DenyReason::Incomplete(cause) => {
            let (status, code) = failure_status(cause);
            let message_text = format!("{upstream} {cause}; the cached copy of {image} is incomplete");
            (status, code, message_text)
        }
        DenyReason::TooYoung(youth) => (
            StatusCode::FORBIDDEN,
            ErrorCode::Denied,
            too_young(&youth, context),
        ),
        DenyReason::Blocked(digest) => (
            StatusCode::FORBIDDEN,
            ErrorCode::Denied,
            blocked_message(&digest, refused.block.as_deref(), context),
        ),
    }
}

/// The message for a digest below `min_age`.
fn too_young(youth: &YoungDigest, context: &ResponseContext) -> String {
    let (upstream, image) = (context.upstream(), context.endpoint.image());
    let Some(digest) = youth.digest else {
        let is_by_digest = matches!(
            &context.endpoint,
            Endpoint::Manifest {
                reference: Reference::Digest(_),
                ..
            }
        );
        let why = if is_by_digest {
            "digests of this algorithm cannot be verified".to_owned()
        } else {
            format!("{upstream} names no digest")
        };
        return format!(
            "{upstream}/{image} is denied by `min_age`, because its age cannot be known: {why}; `on_unknown_age = \"serve\"` \
             serves such images"
        );
    };
    let repository = context.endpoint.repository().map(ToString::to_string);
    format!(
        "{upstream}/{image} is not known to be old enough for `min_age`: it is {digest}, {}; {}; to have it served now, ask \
         the operator of the cache to run `ifnewer approve {upstream}/{}@{digest}`",
        youth.describe(context.now),
        youth.describe_served_from(),
        repository.unwrap_or_default(),
    )
}

/// Who blocked the digest, when and why, and how to take the block back.
fn blocked_message(digest: &Digest, block: Option<&VerdictNote>, context: &ResponseContext) -> String {
    let (upstream, image) = (context.upstream(), context.endpoint.image());
    let by = block.map_or_else(String::new, |note| {
        let at = humantime::format_rfc3339_seconds(note.at);
        let reason = note.reason.as_deref();
        let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
        format!(" by {} at {at}{reason}", note.by)
    });
    format!(
        "{upstream}/{image} is blocked in this cache: {digest} was blocked{by}; use another version, or ask the \
         operator of the cache, who can take it back with `ifnewer unblock {digest}`"
    )
}

fn failure_status(cause: UpstreamFailure) -> (StatusCode, ErrorCode) {
    match cause {
        UpstreamFailure::RateLimited => (StatusCode::TOO_MANY_REQUESTS, ErrorCode::TooManyRequests),
        UpstreamFailure::Timeout | UpstreamFailure::ConnectTimeout | UpstreamFailure::RevalidateTimeout => {
            (StatusCode::GATEWAY_TIMEOUT, ErrorCode::Unavailable)
        }
        // So that the cache that sent the request reports the loop too.
        UpstreamFailure::Loop => (StatusCode::LOOP_DETECTED, ErrorCode::Unavailable),
        UpstreamFailure::ClientQueueFull | UpstreamFailure::QueueFull => {
            (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::TooManyRequests)
        }
        UpstreamFailure::BreakerOpen
        | UpstreamFailure::Abandoned
        | UpstreamFailure::Offline
        | UpstreamFailure::PolicyNever
        | UpstreamFailure::Status(503) => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable),
        _ => (StatusCode::BAD_GATEWAY, ErrorCode::Unavailable),
    }
}
