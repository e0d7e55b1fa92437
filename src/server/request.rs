//! Request parsing and validation, before any other code runs or any upstream is contacted.
//!
//! hyper parses HTTP. This module rejects what hyper accepts but a cache must not: two framings of one body, several
//! hosts, or a host that differs from the connection's. Later code relies on each request having one meaning.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::SystemTime;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, IF_RANGE, RANGE, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::error::Rejection;
use super::response::ResponseContext;
use super::routing::{ConnectionInfo, RouteKind, Router, canonical_host, is_absolute, with_full_name};
use crate::oci::cdn_loop;
use crate::oci::path;
use crate::oci::query::Query;
use crate::oci::{Accept, Endpoint, RangeRequest, Repository, RequestError};
use crate::proxy::invalidation::{WriteEffect, WriteSnapshot};
use crate::proxy::{Request, UpstreamCaches, UpstreamRegistry, is_local_token};
use crate::queue;
use crate::trace_context::TraceContext;
use crate::upstream::origin::Origin;

/// Largest body of a request that needs none. A larger one is rejected with 413.
const UNUSED_BODY_BYTES_MAX: u64 = 64 * 1024;

/// `:` in base64.
const EMPTY_BASIC_CREDENTIAL: &str = "Og==";

/// A valid request, by the way it is handled.
pub(super) enum ParsedRequest {
    /// A read, served by the cache. Boxed, because it is passed on several times.
    Read(Box<RoutedRead>),
    /// `GET /v2/` under an upstream's host, which asks for the registry's own challenge.
    ApiCheck(Box<RoutedRead>),
    /// A request that only the registry can answer, under the registry's host name. Boxed, here and below, so that the
    /// value of a read is small.
    Forward(Box<ForwardTarget>),
    /// A request to the token service at this address.
    Token(Box<ForwardTarget>, Box<Origin>),
}

impl ParsedRequest {
    /// Upstream, repository and route.
    pub(super) fn subject(&self) -> (&Arc<UpstreamRegistry>, Option<&Repository>, RouteKind) {
        match self {
            Self::Read(read) | Self::ApiCheck(read) => {
                let request = &read.request;
                (&request.registry, request.endpoint.repository(), read.route)
            }
            Self::Forward(target) | Self::Token(target, _) => (
                &target.upstream_registry,
                target.repository.as_ref(),
                target.route,
            ),
        }
    }
}

/// A read, parsed and routed.
pub(super) struct RoutedRead {
    /// What the proxy handles.
    pub(super) request: Request,
    pub(super) route: RouteKind,
    /// What the response takes from the request.
    pub(super) context: ResponseContext,
}

/// A request that is forwarded to the registry.
pub(super) struct ForwardTarget {
    pub(super) upstream_registry: Arc<UpstreamRegistry>,
    pub(super) route: RouteKind,
    /// The repository in its path, if there is one.
    pub(super) repository: Option<Repository>,
    /// Repositories from which a blob is mounted.
    pub(super) mount_sources: Vec<Repository>,
    /// Whether the path may name a repository that this parser cannot extract.
    pub(super) is_ambiguous: bool,
    /// The token service, if the request is for its host.
    pub(super) token_service: Option<Origin>,
    /// Base URL in the client's view, for `Location` headers.
    pub(super) base: String,
    /// The cached content that the write changes.
    pub(super) change: Option<WriteEffect>,
}

/// Parses a request head.
pub(super) fn parse(
    head: &Parts,
    peer: &ConnectionInfo,
    router: &Router,
    (now, trace): (SystemTime, &TraceContext),
) -> Result<ParsedRequest, Rejection> {
    if cdn_loop::is_loop(&head.headers) {
        return Err(Rejection::Loop);
    }
    let host = host(head, peer.is_tls)?;
    let intercepted = router.intercept_target(host.as_ref(), is_absolute(head), peer)?;
    let is_forwarded = intercepted.is_some() && is_write(&head.method);
    framing(head, is_forwarded)?;
    if !peer.http_allowed {
        return Err(Rejection::PlainHttp);
    }
    path::check(head.uri.path()).map_err(RequestError::from)?;
    let Some((upstream_registry, route)) = intercepted else {
        let (upstream_registry, endpoint, route) = router.route(head)?;
        let client = (peer, host);
        return read(head, (upstream_registry, endpoint, route), client, (now, trace))
            .map(ParsedRequest::Read);
    };
    // Under the registry's own host, the first path component is part of the repository name.
    let upstream_registry = Arc::clone(upstream_registry);
    let name = host
        .as_ref()
        .and_then(|host| canonical_host(host, peer.is_tls))
        .unwrap_or_default();
    if let Some(realm) = router.token_service_at(&name, &upstream_registry).cloned() {
        let asks = matches!(head.method, Method::GET | Method::POST) && head.uri.path() == realm.path();
        if asks || router.by_name(&name).is_none() {
            let target = forward_target(head, upstream_registry, route, host.as_ref(), peer)?;
            return Ok(if asks {
                ParsedRequest::Token(target, Box::new(realm))
            } else {
                ParsedRequest::Forward(Box::new(ForwardTarget {
                    token_service: Some(realm),
                    change: None,
                    ..*target
                }))
            });
        }
    }
    let endpoint = match Endpoint::parse(&head.method, head.uri.path(), head.uri.query()) {
        Ok(endpoint) => endpoint,
        Err(RequestError::Path | RequestError::Write { .. }) => {
            return forward_target(head, upstream_registry, route, host.as_ref(), peer)
                .map(ParsedRequest::Forward);
        }
        Err(malformed) => return Err(malformed.into()),
    };
    if endpoint.repository().is_none() {
        // `docker login` checks its credential here, and only the registry can verify it.
        let shown = head.headers.get(AUTHORIZATION);
        if shown.is_some_and(|shown| !is_local_token(shown)) {
            return forward_target(head, upstream_registry, route, host.as_ref(), peer)
                .map(ParsedRequest::Forward);
        }
        let client = (peer, host);
        return read(head, (upstream_registry, endpoint, route), client, (now, trace))
            .map(ParsedRequest::ApiCheck);
    }
    router.check_ns(&upstream_registry, head.uri.query())?;
    let endpoint = with_full_name(&upstream_registry, endpoint)?;
    let mut read = read(
        head,
        (upstream_registry, endpoint, route),
        (peer, host),
        (now, trace),
    )?;
    // A client that pushes checks by HEAD which layers the registry has. A pull does not use HEAD on blobs.
    read.request.for_push = read.request.head && matches!(read.request.endpoint, Endpoint::Blob { .. });
    Ok(ParsedRequest::Read(read))
}

fn read(
    head: &Parts,
    (upstream_registry, endpoint, route): (Arc<UpstreamRegistry>, Endpoint, RouteKind),
    (peer, host): (&ConnectionInfo, Option<Authority>),
    (now, trace): (SystemTime, &TraceContext),
) -> Result<Box<RoutedRead>, Rejection> {
    let writes = endpoint
        .repository()
        .map_or_else(WriteSnapshot::default, |repository| {
            upstream_registry.writes(repository)
        });
    let request = Request {
        range: ranges(&head.headers, &endpoint),
        registry: upstream_registry,
        endpoint,
        head: head.method == Method::HEAD,
        accept: Accept::read(&head.headers)?,
        authorization: authorization(&head.headers),
        host,
        now,
        since: tokio::time::Instant::now(),
        writes,
        for_push: false,
        trace: trace.clone(),
        peer: queue::Peer::of(peer.address),
        needs_length: head.version <= Version::HTTP_10,
        upstream_caches: UpstreamCaches::default(),
    };
    let context = ResponseContext::new(head, &request, peer);
    Ok(Box::new(RoutedRead {
        request,
        route,
        context,
    }))
}

fn forward_target(
    head: &Parts,
    upstream_registry: Arc<UpstreamRegistry>,
    route: RouteKind,
    host: Option<&Authority>,
    peer: &ConnectionInfo,
) -> Result<Box<ForwardTarget>, Rejection> {
    let is_known = is_write(&head.method) || matches!(head.method, Method::GET | Method::HEAD);
    if !is_known {
        return Err(RequestError::Method.into());
    }
    let path = head.uri.path();
    // Dot segments could leave the part of the host that is this registry.
    if path.split('/').any(|part| matches!(part, "." | "..")) || path.to_ascii_lowercase().contains("%2e") {
        return Err(RequestError::Path.into());
    }
    // With a `repository_prefix`, only paths without a repository can be forwarded unchanged.
    let is_elsewhere = || {
        upstream_registry
            .upstream()
            .repository_prefixes()
            .any(|prefix| prefix.is_some())
    };
    let names_one = path.strip_prefix("/v2/").is_some_and(|rest| !rest.is_empty());
    if names_one && is_elsewhere() {
        return Err(Rejection::ReadOnly(upstream_registry.name().to_owned()));
    }
    let scheme = if peer.is_tls { "https" } else { "http" };
    let repository = repository_in(path).and_then(|named| upstream_registry.full_name(named).ok());
    let mount_sources = if head.method == Method::POST && names_one {
        mount_sources_of(head, &upstream_registry)?
    } else {
        Vec::new()
    };
    Ok(Box::new(ForwardTarget {
        is_ambiguous: repository.is_none() && may_name_repository(path),
        repository,
        mount_sources,
        upstream_registry,
        route,
        token_service: None,
        base: format!("{scheme}://{}", host.map_or("", Authority::as_str)),
        change: WriteEffect::of(&head.method, path, head.uri.query())?,
    }))
}

/// Repositories from which a blob is mounted (distribution spec, end-11).
fn mount_sources_of(
    head: &Parts,
    upstream_registry: &UpstreamRegistry,
) -> Result<Vec<Repository>, Rejection> {
    let named = Query::values(head.uri.query(), "from")?;
    let named = named.iter().filter(|name| !name.is_empty());
    named
        .map(|name| {
            let source = name
                .parse()
                .and_then(|source| upstream_registry.full_name(source));
            source.map_err(|error| RequestError::Repository(error).into())
        })
        .collect()
}

/// Whether a path may name a repository under an unknown endpoint. A repository name does not begin with `_`, and
/// needs an endpoint behind it.
fn may_name_repository(path: &str) -> bool {
    path.strip_prefix("/v2/")
        .is_some_and(|rest| !rest.starts_with('_') && rest.contains('/'))
}

/// The repository of a distribution path, under any endpoint. Extension endpoints begin with `_`.
fn repository_in(path: &str) -> Option<Repository> {
    const ENDPOINTS: [&str; 5] = ["/blobs/", "/manifests/", "/tags/", "/referrers/", "/_"];
    let path = path.strip_prefix("/v2/")?;
    let end = ENDPOINTS
        .iter()
        .filter_map(|endpoint| path.rfind(endpoint))
        .max()?;
    path.get(..end)?.parse().ok()
}

fn is_write(method: &Method) -> bool {
    matches!(
        *method,
        Method::POST | Method::PUT | Method::PATCH | Method::DELETE
    )
}

/// RFC 9112 §6: one framing of the body, and only a small body where none is needed.
fn framing(head: &Parts, is_forwarded: bool) -> Result<(), Rejection> {
    let mut codings = head.headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => {}
        // hyper drops a Content-Length beside Transfer-Encoding, so the two together look like chunked alone. The
        // forwarded request is framed again, and the connection closes after the response (§6.3), so no second
        // request can hide behind the body.
        (Some(coding), None) if is_forwarded && coding.as_bytes().eq_ignore_ascii_case(b"chunked") => {}
        _ => return Err(Rejection::Framing),
    }
    let length = head.headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if !is_forwarded && length.is_some_and(|length| length > UNUSED_BODY_BYTES_MAX) {
        return Err(Rejection::BodyTooLarge(head.method.clone()));
    }
    Ok(())
}

/// Whether to close after this response: with Transfer-Encoding the message length may be ambiguous (RFC 9112 §6.3).
pub(super) fn closes_connection(head: &Parts) -> bool {
    head.version < Version::HTTP_2 && head.headers.contains_key(TRANSFER_ENCODING)
}

/// The host of the request: exactly one, or none in HTTP/1.0.
fn host(head: &Parts, is_tls: bool) -> Result<Option<Authority>, Rejection> {
    let mut lines = head.headers.get_all(HOST).iter();
    match (lines.next(), lines.next(), head.uri.authority()) {
        (Some(host), None, Some(authority)) => {
            let host = parse_host(host).ok_or(Rejection::InvalidHost)?;
            let (host, target) = (canonical_host(&host, is_tls), canonical_host(authority, is_tls));
            if host.ok_or(Rejection::InvalidHost)? == target.ok_or(Rejection::InvalidHost)? {
                Ok(Some(authority.clone()))
            } else {
                Err(Rejection::Misdirected)
            }
        }
        (Some(host), None, None) => parse_host(host).map(Some).ok_or(Rejection::InvalidHost),
        // HTTP/2 sends the host in `:authority`.
        (None, _, Some(authority)) if head.version >= Version::HTTP_2 => Ok(Some(authority.clone())),
        // HTTP/1.0 has no Host header, and `ab` and health probes still use it.
        (None, _, None) if head.version == Version::HTTP_10 => Ok(None),
        _ => Err(Rejection::InvalidHost),
    }
}

/// The `Host` of a `CONNECT`, whose target has its own authority.
pub(super) fn host_header(head: &Parts) -> Result<Option<Authority>, Rejection> {
    let mut lines = head.headers.get_all(HOST).iter();
    match (lines.next(), lines.next()) {
        (None, _) => Ok(None),
        (Some(host), None) => parse_host(host).map(Some).ok_or(Rejection::InvalidHost),
        _ => Err(Rejection::InvalidHost),
    }
}

fn parse_host(host: &HeaderValue) -> Option<Authority> {
    let host = host.to_str().ok().filter(|host| !host.contains('@'))?;
    host.parse().ok()
}

/// The client's credential. podman sends an empty one (`Og==`, a lone colon) if it has none.
fn authorization(headers: &HeaderMap) -> Option<HeaderValue> {
    let value = headers.get(AUTHORIZATION)?;
    let (scheme, credential) = value.to_str().ok()?.split_once(' ')?;
    let credential = credential.trim();
    // Compared in base64, because decoding would copy a password.
    let empty =
        credential.is_empty() || scheme.eq_ignore_ascii_case("basic") && credential == EMPTY_BASIC_CREDENTIAL;
    if empty {
        return None;
    }
    let mut value = value.clone();
    value.set_sensitive(true);
    Some(value)
}

/// The ranges of a request. An `If-Range` that does not match the blob, or is weak or a date, means the full blob (RFC 9110
/// §13.1.5). A blob never changes, so that is known before it is read.
fn ranges(headers: &HeaderMap, endpoint: &Endpoint) -> RangeRequest {
    let is_same = headers.get(IF_RANGE).is_none_or(|tag| match endpoint {
        Endpoint::Blob { digest, .. } => tag.as_bytes() == format!("\"{digest}\"").as_bytes(),
        _ => false,
    });
    RangeRequest::read(headers.get(RANGE).filter(|_| is_same))
}

/// The body of a request, which records whether it was read to its end. On HTTP/1 the next request cannot be found
/// behind an unread body, so the connection closes with the response (RFC 9112 §9.3 and §9.6).
pub(super) struct RequestBody {
    body: Incoming,
    ended: Ended,
}

/// Whether a body was read to its end. `None`: there is none to read.
#[derive(Clone)]
pub(super) struct Ended(Option<Arc<AtomicBool>>);

impl Ended {
    pub(super) fn is_true(&self) -> bool {
        self.0.as_ref().is_none_or(|ended| ended.load(Ordering::Acquire))
    }
}

impl RequestBody {
    pub(super) fn new(body: Incoming) -> (Self, Ended) {
        let ended = Ended((!body.is_end_stream()).then(Arc::default));
        let received = Self {
            body,
            ended: ended.clone(),
        };
        (received, ended)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(ended) = &self.ended.0
            && (frame.is_none() || self.body.is_end_stream())
        {
            ended.store(true, Ordering::Release);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    /// The download is then not limited to the bytes of the range.
    #[test]
    fn if_range_of_another_entity_means_the_full_blob() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let endpoint = Endpoint::parse(&Method::GET, &format!("/v2/a/b/blobs/{digest}"), None).unwrap();
        let read = |tag: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, HeaderValue::from_static("bytes=0-9"));
            if let Some(tag) = tag {
                headers.insert(IF_RANGE, HeaderValue::from_str(tag).unwrap());
            }
            ranges(&headers, &endpoint)
        };
        let same = format!("\"{digest}\"");
        for tag in [None, Some(&*same)] {
            assert!(matches!(read(tag), RangeRequest::Single(_)), "{tag:?}");
        }
        for tag in [&format!("W/{same}"), "\"x\"", "Thu, 01 Jan 1970 00:00:00 GMT"] {
            assert_eq!(read(Some(tag)), RangeRequest::None, "{tag}");
        }
    }
}
