//! Response building: the only place where a proxy response becomes an HTTP response.
//!
//! * `context`: the request headers that shape the response. * `blob`: full, single-range and multipart blob
//!   responses.
//! * `body`: response bodies. * `error`: status, code and message of each denial. * `cache_status`: `Cache-Status`,
//!   `Age` and `Warning`.

mod blob;
pub(super) mod body;
mod cache_status;
mod context;
mod error;

use std::fmt::Write as _;

use http::header::{
    ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, ETAG, LINK, PROXY_AUTHENTICATE, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};

use super::RegistryService;
use super::error::Rejection;
use crate::oci::header::{
    CACHE_STATUS, DOCKER_CONTENT_DIGEST, DOCKER_DISTRIBUTION_API_VERSION, OCI_FILTERS_APPLIED,
};
use crate::oci::{Digest, ErrorBody};
use crate::proxy::passthrough::Passthrough;
use crate::proxy::{Listing, ProxyResponse, ServeInfo, ServeReason};
use crate::store::AsyncStore;
use crate::store::manifests::StoredManifest;
use crate::telemetry;

pub(super) use blob::slice;
pub use body::{Body, VerifiedBlobs};
pub(super) use context::ResponseContext;
pub(super) use error::forward_failed;

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Headers of most responses, at most. With room for them, the map does not grow while they are set.
const HEADERS_MAX: usize = 12;

/// Bytes of the `ETag` of a SHA-256 digest.
const ETAG_BYTES: usize = 73;

/// Cache result and reason of a response.
pub(super) fn classify(outcome: &ProxyResponse) -> (telemetry::CacheResult, &'static str) {
    let info = match outcome {
        ProxyResponse::Ping => return (telemetry::CacheResult::Local, "ping"),
        ProxyResponse::Challenged(_) => return (telemetry::CacheResult::Local, "challenge"),
        ProxyResponse::ManifestHead { .. } => return (telemetry::CacheResult::Miss, "head"),
        ProxyResponse::Passthrough(_) => {
            return (telemetry::CacheResult::Miss, ServeReason::Passthrough.name());
        }
        ProxyResponse::Denied(refused) => return (telemetry::CacheResult::Denied, refused.reason.name()),
        ProxyResponse::Manifest(_, info)
        | ProxyResponse::Blob { info, .. }
        | ProxyResponse::Listing(_, info)
        | ProxyResponse::StreamedList(_, info) => info,
    };
    let result = match info.reason {
        ServeReason::Cached(served) if served.cause().is_some() || served.may_be_outdated() => {
            telemetry::CacheResult::Stale
        }
        ServeReason::Cached(_) | ServeReason::Shared | ServeReason::Redirected => telemetry::CacheResult::Hit,
        ServeReason::Collapsed => telemetry::CacheResult::Collapsed,
        ServeReason::Fetched(_) | ServeReason::Passthrough => telemetry::CacheResult::Miss,
    };
    (result, info.reason.name())
}

/// The HTTP response for a proxy response.
pub(super) fn build(
    outcome: ProxyResponse,
    context: &ResponseContext,
    service: &RegistryService,
    store: &AsyncStore,
) -> Response<Body> {
    match outcome {
        ProxyResponse::Ping => {
            let mut response = with_status(StatusCode::OK, Body::from_bytes("{}".into()));
            response.headers_mut().insert(CONTENT_TYPE, JSON);
            set_length(&mut response, 2, context.head);
            response
        }
        ProxyResponse::Challenged(lines) => error::unauthorized(lines, context),
        ProxyResponse::Manifest(manifest, info) => manifest_response(&manifest, info, context),
        ProxyResponse::ManifestHead {
            digest,
            media_type,
            size,
        } => {
            let etag = etag(&digest);
            let is_known = context.matches_if_none_match(&etag);
            let status = if is_known {
                StatusCode::NOT_MODIFIED
            } else {
                StatusCode::OK
            };
            let mut response = with_status(status, Body::empty());
            let headers = response.headers_mut();
            set_digest_headers(headers, &etag);
            cache_status::set_cache_status(headers, "ifnewer; fwd=miss; detail=head".into(), context);
            if !is_known {
                set_header(headers, CONTENT_TYPE, media_type.as_str());
                headers.insert(CONTENT_LENGTH, size.into());
            }
            response
        }
        ProxyResponse::Blob {
            digest,
            size,
            content,
            info,
        } => blob::BlobResponse {
            digest,
            size,
            info,
            context,
            service,
            store,
        }
        .build(content),
        ProxyResponse::Listing(listing, info) => {
            let (size, bytes) = (listing.bytes.len() as u64, listing.bytes.clone());
            let mut response = with_status(StatusCode::OK, Body::from_bytes(bytes));
            set_length(&mut response, size, context.head);
            list_response(response, &listing, info, context)
        }
        ProxyResponse::StreamedList(list, info) => {
            let (size, head) = (list.size, list.head().clone());
            let body = if context.head {
                Body::empty()
            } else {
                Body::list(*list, size, service.telemetry.clone())
            };
            let mut response = with_status(StatusCode::OK, body);
            if let Some(size) = size {
                response.headers_mut().insert(CONTENT_LENGTH, size.into());
            }
            list_response(response, &head, info, context)
        }
        ProxyResponse::Passthrough(passed) => passthrough_response(passed, service),
        ProxyResponse::Denied(refused) => error::build(&refused, context),
    }
}

/// The response to a rejected request.
pub(super) fn request_error(request_error: &Rejection, method: &Method) -> Response<Body> {
    let mut response = error_response(
        request_error.status(),
        &ErrorBody::new(request_error.code(), request_error.to_string()),
        *method == Method::HEAD,
    );
    if request_error.status() == StatusCode::METHOD_NOT_ALLOWED {
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    if request_error.status() == StatusCode::SERVICE_UNAVAILABLE {
        let seconds = HeaderValue::from_static("5");
        response.headers_mut().insert(RETRY_AFTER, seconds);
    }
    let challenge = match request_error.status() {
        StatusCode::UNAUTHORIZED => Some(WWW_AUTHENTICATE),
        StatusCode::PROXY_AUTHENTICATION_REQUIRED => Some(PROXY_AUTHENTICATE),
        _ => None,
    };
    if let Some(name) = challenge {
        let basic = HeaderValue::from_static("Basic realm=\"ifnewer\"");
        response.headers_mut().insert(name, basic);
    }
    if request_error.closes_connection() {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn manifest_response(
    manifest: &StoredManifest,
    info: ServeInfo,
    context: &ResponseContext,
) -> Response<Body> {
    let values = manifest.headers();
    let etag = values.etag.as_ref().and_then(|etag| etag.to_str().ok());
    let mut response = if etag.is_some_and(|etag| context.matches_if_none_match(etag)) {
        with_status(StatusCode::NOT_MODIFIED, Body::empty())
    } else if context.head {
        with_status(StatusCode::OK, Body::empty())
    } else {
        with_status(StatusCode::OK, Body::from_bytes(manifest.bytes.clone()))
    };
    let is_sent = response.status() == StatusCode::OK;
    let headers = response.headers_mut();
    if is_sent {
        set_value(headers, CONTENT_TYPE, values.content_type.as_ref());
        headers.insert(CONTENT_LENGTH, values.content_length.clone());
    }
    set_value(headers, DOCKER_CONTENT_DIGEST, values.digest.as_ref());
    set_value(headers, ETAG, values.etag.as_ref());
    cache_status::set_cache_headers(headers, info, context);
    response
}

fn list_response(
    mut response: Response<Body>,
    listing: &Listing,
    info: ServeInfo,
    context: &ResponseContext,
) -> Response<Body> {
    let headers = response.headers_mut();
    set_header(headers, CONTENT_TYPE, listing.media_type.as_str());
    if let Some(next) = listing.next.as_ref().and_then(|next| context.next_page(next)) {
        set_header(headers, LINK, &format!("<{next}>; rel=\"next\""));
    }
    if let Some(filters) = &listing.filters {
        set_header(headers, OCI_FILTERS_APPLIED, filters);
    }
    cache_status::set_cache_headers(headers, info, context);
    response
}

fn passthrough_response(passed: Passthrough, service: &RegistryService) -> Response<Body> {
    let body = match passed.body {
        Some(fetched) => Body::from_upstream(*fetched, passed.size, service.telemetry.clone()),
        None => Body::empty(),
    };
    let mut response = with_status(StatusCode::OK, body);
    let headers = response.headers_mut();
    match passed.media_type {
        Some(media_type) => set_header(headers, CONTENT_TYPE, media_type.as_str()),
        None => {
            headers.insert(CONTENT_TYPE, OCTETS);
        }
    }
    if let Some(digest) = passed.digest {
        set_header(headers, DOCKER_CONTENT_DIGEST, &digest);
    }
    set_header(headers, CACHE_STATUS, "ifnewer; fwd=bypass; detail=passthrough");
    if let Some(size) = passed.size {
        headers.insert(CONTENT_LENGTH, size.into());
    }
    response
}

fn with_status(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = HeaderMap::with_capacity(HEADERS_MAX);
    response.headers_mut().insert(
        DOCKER_DISTRIBUTION_API_VERSION,
        HeaderValue::from_static("registry/2.0"),
    );
    response
}

fn error_response(status: StatusCode, error: &ErrorBody, head: bool) -> Response<Body> {
    let bytes = error.body();
    let length = bytes.len() as u64;
    let mut response = with_status(
        status,
        if head {
            Body::empty()
        } else {
            Body::from_bytes(bytes)
        },
    );
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    set_length(&mut response, length, head);
    response
}

/// Sets `Content-Length`. hyper cannot know it for HEAD, whose response has the length of a body that is not sent.
fn set_length(response: &mut Response<Body>, length: u64, head: bool) {
    if head {
        *response.body_mut() = Body::empty();
    }
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
}

fn etag(digest: &Digest) -> String {
    let mut etag = String::with_capacity(ETAG_BYTES);
    // Writing to a `String` cannot fail.
    let _infallible = write!(etag, "\"{digest}\"");
    etag
}

/// Sets the headers that name the digest in `etag`.
fn set_digest_headers(headers: &mut HeaderMap, etag: &str) {
    set_header(headers, DOCKER_CONTENT_DIGEST, etag.trim_matches('"'));
    set_header(headers, ETAG, etag);
}

/// Sets a header that was built before, if it could be.
fn set_value(headers: &mut HeaderMap, name: HeaderName, value: Option<&HeaderValue>) {
    if let Some(value) = value {
        headers.insert(name, value.clone());
    }
}

/// Sets a header. An invalid value is left out; all values used here are printable by their types.
fn set_header(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}
