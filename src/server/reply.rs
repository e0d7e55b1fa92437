//! An outcome becomes an HTTP response. Nothing else builds one, and each reason has exactly one form here.
//!
//! * `asked`: what of the request shapes its answer. * `blob`: whole, one part, several. * `refusal`: status, code and
//!   sentence of each no. * `how`: why and how old, in headers.

mod asked;
mod blob;
mod how;
mod refusal;

use http::header::{
    ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, ETAG, LINK, PROXY_AUTHENTICATE, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};

use super::gate::Turned;
use super::{Body, Front};
use crate::oci::header::{
    CACHE_STATUS, DOCKER_CONTENT_DIGEST, DOCKER_DISTRIBUTION_API_VERSION, OCI_FILTERS_APPLIED,
};
use crate::oci::{Digest, ErrorBody};
use crate::proxy::passthrough::Passthrough;
use crate::proxy::{Listing, ProxyResponse, ServeInfo, ServeReason};
use crate::store::AsyncStore;
use crate::store::manifests::StoredManifest;
use crate::telemetry;

pub(super) use asked::Asked;
pub(super) use blob::within;
pub(super) use refusal::not_passed;

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// How an outcome counts, and its reason's name.
pub(super) fn told(outcome: &ProxyResponse) -> (telemetry::CacheResult, &'static str) {
    let info = match outcome {
        ProxyResponse::Ping => return (telemetry::CacheResult::Local, "ping"),
        ProxyResponse::Challenged(_) => return (telemetry::CacheResult::Local, "challenge"),
        ProxyResponse::ManifestHead { .. } => return (telemetry::CacheResult::Miss, "head"),
        ProxyResponse::Passthrough(_) => {
            return (telemetry::CacheResult::Miss, ServeReason::Passthrough.name());
        }
        ProxyResponse::Denied(refused) => return (telemetry::CacheResult::Refused, refused.reason.name()),
        ProxyResponse::Manifest(_, info)
        | ProxyResponse::Blob { info, .. }
        | ProxyResponse::Listing(_, info)
        | ProxyResponse::StreamedList(_, info) => info,
    };
    let result = match info.reason {
        ServeReason::Cached(served) if served.cause().is_some() || served.may_be_outdated() => {
            telemetry::CacheResult::Stale
        }
        ServeReason::Cached(_) => telemetry::CacheResult::Hit,
        ServeReason::Collapsed => telemetry::CacheResult::Coalesced,
        ServeReason::Fetched(_) | ServeReason::Passthrough => telemetry::CacheResult::Miss,
    };
    (result, info.reason.name())
}

/// The response to a request that was understood.
pub(super) fn answer(
    outcome: ProxyResponse,
    asked: &Asked,
    front: &Front,
    store: &AsyncStore,
) -> Response<Body> {
    match outcome {
        ProxyResponse::Ping => {
            let mut response = respond(StatusCode::OK, Body::whole("{}".into()));
            response.headers_mut().insert(CONTENT_TYPE, JSON);
            sized(&mut response, 2, asked.head);
            response
        }
        ProxyResponse::Challenged(lines) => refusal::challenged(lines, asked),
        ProxyResponse::Manifest(manifest, info) => manifest_answer(&manifest, info, asked),
        ProxyResponse::ManifestHead {
            digest,
            media_type,
            size,
        } => {
            let etag = etag(&digest);
            let is_known = asked.has_already(&etag);
            let status = if is_known {
                StatusCode::NOT_MODIFIED
            } else {
                StatusCode::OK
            };
            let mut response = respond(status, Body::empty());
            let headers = response.headers_mut();
            named(headers, &digest, &etag);
            put(headers, CACHE_STATUS, "ifnewer; fwd=miss; detail=head");
            if !is_known {
                put(headers, CONTENT_TYPE, media_type.as_str());
                headers.insert(CONTENT_LENGTH, size.into());
            }
            response
        }
        ProxyResponse::Blob {
            digest,
            size,
            content,
            info,
        } => blob::Answered {
            digest,
            size,
            info,
            asked,
            front,
            store,
        }
        .with(content),
        ProxyResponse::Listing(listing, info) => {
            let (size, bytes) = (listing.bytes.len() as u64, listing.bytes.clone());
            let mut response = respond(StatusCode::OK, Body::whole(bytes));
            sized(&mut response, size, asked.head);
            listing_answer(response, &listing, info, asked)
        }
        ProxyResponse::StreamedList(list, info) => {
            let (size, head) = (list.size, list.head().clone());
            let body = if asked.head {
                Body::empty()
            } else {
                Body::long_list(*list, size, front.telemetry.clone())
            };
            let mut response = respond(StatusCode::OK, body);
            if let Some(size) = size {
                response.headers_mut().insert(CONTENT_LENGTH, size.into());
            }
            listing_answer(response, &head, info, asked)
        }
        ProxyResponse::Passthrough(passed) => passed_answer(passed, front),
        ProxyResponse::Denied(refused) => refusal::answer(&refused, asked),
    }
}

/// The response to a request that was turned away.
pub(super) fn turned(turned: &Turned, method: &Method) -> Response<Body> {
    let mut response = problem(
        turned.status(),
        &ErrorBody::new(turned.code(), turned.to_string()),
        *method == Method::HEAD,
    );
    if turned.status() == StatusCode::METHOD_NOT_ALLOWED {
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    if turned.status() == StatusCode::SERVICE_UNAVAILABLE {
        let seconds = HeaderValue::from_static("5");
        response.headers_mut().insert(RETRY_AFTER, seconds);
    }
    let challenge = match turned.status() {
        StatusCode::UNAUTHORIZED => Some(WWW_AUTHENTICATE),
        StatusCode::PROXY_AUTHENTICATION_REQUIRED => Some(PROXY_AUTHENTICATE),
        _ => None,
    };
    if let Some(name) = challenge {
        let basic = HeaderValue::from_static("Basic realm=\"ifnewer\"");
        response.headers_mut().insert(name, basic);
    }
    if turned.closes() {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn manifest_answer(manifest: &StoredManifest, info: ServeInfo, asked: &Asked) -> Response<Body> {
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
    how::tell(response.headers_mut(), info, asked);
    response
}

fn listing_answer(
    mut response: Response<Body>,
    listing: &Listing,
    info: ServeInfo,
    asked: &Asked,
) -> Response<Body> {
    let headers = response.headers_mut();
    put(headers, CONTENT_TYPE, listing.media_type.as_str());
    if let Some(next) = listing.next.as_ref().and_then(|next| asked.next_page(next)) {
        put(headers, LINK, &format!("<{next}>; rel=\"next\""));
    }
    if let Some(filters) = &listing.filters {
        put(headers, OCI_FILTERS_APPLIED, filters);
    }
    how::tell(headers, info, asked);
    response
}

fn passed_answer(passed: Passthrough, front: &Front) -> Response<Body> {
    let body = match passed.body {
        Some(fetched) => Body::fetched(*fetched, passed.size, front.telemetry.clone()),
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
    put(headers, CACHE_STATUS, "ifnewer; fwd=bypass; detail=passthrough");
    if let Some(size) = passed.size {
        headers.insert(CONTENT_LENGTH, size.into());
    }
    response
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

fn problem(status: StatusCode, problem: &ErrorBody, head: bool) -> Response<Body> {
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

/// A value that cannot be a header is left out; all of ours are printable by their types.
fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}
