//! HTTP client for upstreams: connection pools, redirects and timeouts. The only file of this layer that uses the
//! hyper client.
//!
//! The client knows nothing about registries: its callers handle tokens, digests and access. It never decodes a body,
//! and sends no header of a client's request unless the caller sets it.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, LOCATION, PROXY_AUTHORIZATION,
    USER_AGENT,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::{Instant, timeout, timeout_at};

use super::connector::UpstreamConnector;
use super::dialer::DialError;
use super::location::resolve;
use super::origin::same_origin;
use super::redirect_rules::allow_entry;
use super::tls::{self, io_cause};
use crate::oci::cdn_loop::{CDN_LOOP, CdnLoop};
use crate::oci::failure::{RedirectFailure, TlsFailure, UpstreamFailure};
use crate::trace_context::{TRACEPARENT, TRACESTATE};

/// Maximum number of redirects followed.
const REDIRECTS_MAX: usize = 10;
/// Maximum size of a response's header names and values.
const HEADER_BYTES_MAX: usize = 64 * 1024;
/// Read buffer of an HTTP/1 connection. Larger than the header limit for the throughput of bodies.
const READ_BYTES_MAX: usize = 256 * 1024;
/// How long an idle connection stays in the pool.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of idle connections per host.
pub(super) const POOL_IDLE_MAX: usize = 32;
/// h2 flow control windows (RFC 9113 §5.2), as stream and connection. Requests to a host share a connection, so unread streams
/// must not take all of its window.
struct Windows(u32, u32);

impl Windows {
    /// One stream fills a 1 Gbit/s line at 30 ms. Six resumptions leave theirs unread while they read the disk.
    const USUAL: Self = Self(4 * 1024 * 1024, 32 * 1024 * 1024);
    /// For bodies that are read at a client's pace: 16 ranges leave as much for others.
    const CLIENT_PACED: Self = Self(1024 * 1024, 32 * 1024 * 1024);
}
/// Average rate below which a body that is read into memory is given up: a manifest or a list.
const COLLECTED_BYTES_PER_SECOND_MIN: u64 = 16 * 1024;
/// Interval of h2 keep-alive pings on a connection with open streams.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// Time after which an h2 connection without a ping response is closed.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// HTTP client of one upstream.
pub(super) struct HttpClient {
    pooled: Client<UpstreamConnector, Full<Bytes>>,
    /// For bodies that are read at a client's pace: unread, they stop the others of their connection.
    client_paced: Client<UpstreamConnector, Full<Bytes>>,
    /// Opens a new connection for each request. Used for the retry after a pooled connection turned out to be closed.
    unpooled: Client<UpstreamConnector, Full<Bytes>>,
    connector: UpstreamConnector,
}

/// A request to send.
pub(super) struct HttpRequest {
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) follow: Follow,
    /// The `Authorization` header for one other origin, in case of a redirect to it.
    pub(super) other_origin: Option<(Uri, HeaderValue)>,
    /// From the call to the last response's headers, redirects included.
    pub(super) timeout: Duration,
    /// Whether the body is read at a client's pace.
    pub(super) is_client_paced: bool,
}

/// Failure to get a response: the cause, and a description for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HttpFailure {
    pub(super) cause: UpstreamFailure,
    /// The host that failed, and details of its certificate or redirect.
    pub(super) detail: Option<Arc<str>>,
    /// Another host failed, to which the upstream redirected the request.
    pub(super) is_redirect_target: bool,
}

impl From<UpstreamFailure> for HttpFailure {
    fn from(cause: UpstreamFailure) -> Self {
        HttpFailure {
            cause,
            detail: None,
            is_redirect_target: false,
        }
    }
}

impl HttpFailure {
    /// Describes an error of hyper for a request to `uri` over `connector`, sent at `since`.
    pub(super) fn of(
        error: &(dyn Error + 'static),
        uri: &Uri,
        (connector, since): (&UpstreamConnector, Instant),
    ) -> HttpFailure {
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        let (mut cause, mut reason) = (cause_of(error), reason_of(error));
        // hyper keeps at most the text of a TLS error, and often reports only a closed connection.
        if matches!(
            cause,
            UpstreamFailure::ConnectionReset | UpstreamFailure::Tls(TlsFailure::Other)
        ) && let Some((failure, detail)) = connector.close_reason(uri, since)
        {
            (cause, reason) = (UpstreamFailure::Tls(failure), Some(detail));
        }
        let detail = match reason {
            Some(reason) => format!("{authority}: {reason}"),
            None => authority.to_owned(),
        };
        HttpFailure {
            detail: Some(detail.into()),
            ..HttpFailure::from(cause)
        }
    }
}

/// Which redirects to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Follow {
    /// To any origin. When the first origin is left, `Authorization`, the trace headers, and the other caches in `CDN-Loop`
    /// are dropped.
    Anywhere,
    /// Only within the origin: a token service has no reason to redirect elsewhere.
    SameOrigin,
}

/// Response to a request.
pub(super) struct HttpResponse {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Incoming,
    /// Another origin sent the response after a redirect, without having received its own `Authorization`. Its 401 or
    /// 403 is not the registry's.
    pub(super) from_other_origin: bool,
    /// The URL that sent the response, if its origin is not that of the request.
    pub(super) final_url: Option<Uri>,
}

impl HttpClient {
    pub(super) fn new(connector: UpstreamConnector) -> HttpClient {
        HttpClient {
            pooled: client(connector.clone(), POOL_IDLE_MAX),
            client_paced: client_with(connector.clone(), POOL_IDLE_MAX, &Windows::CLIENT_PACED),
            unpooled: client(connector.clone(), 0),
            connector,
        }
    }

    /// The connector of this client.
    pub(super) fn connector(&self) -> &UpstreamConnector {
        &self.connector
    }

    /// Sends a request and follows its redirects.
    pub(super) async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpFailure> {
        let within = request.timeout;
        timeout(within, self.follow(request))
            .await
            .unwrap_or_else(|_| Err(UpstreamFailure::Timeout.into()))
    }

    /// Sends a request and returns its response, even if it is a redirect.
    pub(super) async fn send_unfollowed(
        &self,
        mut request: HttpRequest,
    ) -> Result<http::Response<Incoming>, HttpFailure> {
        add_own_headers(&mut request.headers);
        let within = request.timeout;
        let response = timeout(within, self.send_once(&request))
            .await
            .unwrap_or_else(|_| Err(UpstreamFailure::Timeout.into()))?;
        check(response.headers())?;
        Ok(response)
    }

    async fn follow(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpFailure> {
        add_own_headers(&mut request.headers);
        let (mut from_other_origin, mut at) = (false, None);
        for _ in 0..=REDIRECTS_MAX {
            let sent = self.send_once(&request).await;
            let reply = sent.map_err(|unavailable| HttpFailure {
                is_redirect_target: at.is_some(),
                ..unavailable
            })?;
            let (parts, body) = reply.into_parts();
            check(&parts.headers)?;
            let Some(target) = self.redirect(&request, parts.status, &parts.headers)? else {
                return Ok(HttpResponse {
                    status: parts.status,
                    headers: parts.headers,
                    body,
                    from_other_origin,
                    final_url: at,
                });
            };
            if !same_origin(&request.uri, &target) {
                if request.follow == Follow::SameOrigin {
                    return Err(unfollowed_redirect(&target));
                }
                from_other_origin = true;
                at = Some(target.clone());
                for name in [AUTHORIZATION, TRACEPARENT, TRACESTATE] {
                    request.headers.remove(name);
                }
                if request.headers.contains_key(CDN_LOOP) {
                    // The target may be this cache. Storage does not learn what other caches there are.
                    CdnLoop::default().inject(&mut request.headers);
                }
                let other = request.other_origin.as_ref();
                if let Some((_, authorization)) = other.filter(|(other, _)| same_origin(other, &target)) {
                    from_other_origin = false;
                    request.headers.insert(AUTHORIZATION, authorization.clone());
                }
            }
            request.uri = target;
        }
        Err(UpstreamFailure::Redirects(RedirectFailure::TooMany).into())
    }

    /// The target of a redirect. `None` if the response is not one.
    fn redirect(
        &self,
        request: &HttpRequest,
        status: StatusCode,
        headers: &HeaderMap,
    ) -> Result<Option<Uri>, HttpFailure> {
        if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let location = headers.get(LOCATION);
        let target = location
            .and_then(|location| resolve(&request.uri, location.as_bytes()))
            .ok_or(UpstreamFailure::Redirects(RedirectFailure::Malformed))?;
        if request.method == Method::POST {
            return Err(unfollowed_redirect(&target));
        }
        let downgrade = request.uri.scheme_str() == Some("https") && target.scheme_str() != Some("https");
        if downgrade && !self.connector.allows_plain(&target) {
            let entry = allow_entry(&target, None, true);
            return Err(HttpFailure {
                detail: Some(
                    format!(
                        "{}: it redirects to {entry}, which is not encrypted; if this is correct, allow it with redirects = \
                         [\"{entry}\"]",
                        request.uri.authority().map_or("", |authority| authority.as_str())
                    )
                    .into(),
                ),
                ..HttpFailure::from(UpstreamFailure::Redirects(RedirectFailure::Downgrade))
            });
        }
        Ok(Some(target))
    }

    /// Sends one request without following redirects. If the connection closes before a response, an idempotent
    /// request is sent again on a new connection.
    async fn send_once(&self, request: &HttpRequest) -> Result<http::Response<Incoming>, HttpFailure> {
        let start = Instant::now();
        let client = if request.is_client_paced {
            &self.client_paced
        } else {
            &self.pooled
        };
        let mut result = client.request(self.outgoing(request)?).await;
        if result
            .as_ref()
            .is_err_and(|error| cause_of(error) == UpstreamFailure::ConnectionReset)
            && request.method != Method::POST
        {
            result = self.unpooled.request(self.outgoing(request)?).await;
        }
        // The query is not logged: it may contain a redirect's signature or a token request's account.
        tracing::debug!(
            method = %request.method,
            origin = request.uri.authority().map(http::uri::Authority::as_str),
            path = request.uri.path(),
            status = result.as_ref().ok().map(|response| response.status().as_u16()),
            error = result.as_ref().err().map(|error| error as &(dyn Error + 'static)),
            ms = start.elapsed().as_millis(),
            "sent upstream request"
        );
        result.map_err(|error| HttpFailure::of(&error, &request.uri, (&self.connector, start)))
    }

    fn outgoing(&self, request: &HttpRequest) -> Result<http::Request<Full<Bytes>>, UpstreamFailure> {
        let mut outgoing = http::Request::builder()
            .method(request.method.clone())
            .uri(request.uri.clone())
            .body(Full::new(request.body.clone()))
            .map_err(|_| UpstreamFailure::Malformed)?;
        *outgoing.headers_mut() = request.headers.clone();
        if let Some(authorization) = self.connector.proxy_authorization(&request.uri) {
            outgoing.headers_mut().insert(PROXY_AUTHORIZATION, authorization);
        }
        Ok(outgoing)
    }
}

/// A hyper client over `connector` with at most `idle_max` idle connections per host.
pub(super) fn client<B>(connector: UpstreamConnector, idle_max: usize) -> Client<UpstreamConnector, B>
where
    B: http_body::Body + Send,
    B::Data: Send,
{
    client_with(connector, idle_max, &Windows::USUAL)
}

fn client_with<B>(
    connector: UpstreamConnector,
    idle_max: usize,
    Windows(stream, connection): &Windows,
) -> Client<UpstreamConnector, B>
where
    B: http_body::Body + Send,
    B::Data: Send,
{
    Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(POOL_IDLE_TIMEOUT)
        .pool_max_idle_per_host(idle_max)
        .http1_max_buf_size(READ_BYTES_MAX)
        .http2_max_header_list_size(u32::try_from(HEADER_BYTES_MAX).unwrap_or(u32::MAX))
        .http2_initial_stream_window_size(*stream)
        .http2_initial_connection_window_size(*connection)
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .build(connector)
}

/// Adds the headers that every request has.
fn add_own_headers(headers: &mut HeaderMap) {
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let agent = concat!("ifnewer/", env!("CARGO_PKG_VERSION"));
    headers.insert(USER_AGENT, HeaderValue::from_static(agent));
}

/// Rejects a content coding that was not requested, because stored bytes would not match the digest, and oversized
/// headers.
fn check(headers: &HeaderMap) -> Result<(), UpstreamFailure> {
    let bytes: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum();
    if bytes > HEADER_BYTES_MAX {
        return Err(UpstreamFailure::Malformed);
    }
    let identity =
        |value: &HeaderValue| value.is_empty() || value.as_bytes().eq_ignore_ascii_case(b"identity");
    if headers.get_all(CONTENT_ENCODING).iter().all(identity) {
        Ok(())
    } else {
        Err(UpstreamFailure::Malformed)
    }
}

fn unfollowed_redirect(target: &Uri) -> HttpFailure {
    let authority = target.authority().map_or("", |authority| authority.as_str());
    HttpFailure {
        detail: Some(format!("it redirects to {authority}, which is not followed for this request").into()),
        ..HttpFailure::from(UpstreamFailure::Redirects(RedirectFailure::OtherHost))
    }
}

/// The cause behind an error of hyper, from its chain of sources.
pub(super) fn cause_of(error: &(dyn Error + 'static)) -> UpstreamFailure {
    let mut next = Some(error);
    let mut cause = UpstreamFailure::ConnectionReset;
    while let Some(one) = next {
        if let Some(dialled) = one.downcast_ref::<DialError>() {
            return dialled.cause;
        }
        if let Some(io) = one.downcast_ref::<io::Error>() {
            return io_cause(io);
        }
        if let Some(http) = one.downcast_ref::<hyper::Error>() {
            if http.is_parse() || http.is_user() {
                return UpstreamFailure::Malformed;
            }
            if http.is_timeout() {
                cause = UpstreamFailure::Timeout;
            }
        }
        next = one.source();
    }
    cause
}

/// The description behind an error of hyper, if its chain of sources has one.
fn reason_of(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    let mut last = None;
    while let Some(one) = next {
        if let Some(dialled) = one.downcast_ref::<DialError>() {
            if let Some(detail) = &dialled.detail {
                return Some(detail.to_string());
            }
        } else if let Some(io) = one.downcast_ref::<io::Error>() {
            return Some(tls::reason(io).unwrap_or_else(|| io.to_string()));
        }
        last = Some(one);
        next = one.source();
    }
    last.map(ToString::to_string)
}

/// `Content-Length`, if it is a number.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// Body read chunk by chunk. Ends successfully only after `Content-Length` bytes.
pub(super) struct Body {
    incoming: Incoming,
    idle: Duration,
    /// Remaining bytes, if the length is known.
    left: Option<u64>,
    ended: bool,
}

impl Body {
    pub(super) fn new(incoming: Incoming, length: Option<u64>, idle: Duration) -> Body {
        Body {
            incoming,
            idle,
            left: length,
            ended: false,
        }
    }

    /// The next bytes; `None` at the end. Nothing follows an error.
    pub(super) async fn chunk(&mut self) -> Option<Result<Bytes, UpstreamFailure>> {
        while !self.ended {
            let frame = match timeout(self.idle, self.incoming.frame()).await {
                Err(_) => return Some(self.fail(UpstreamFailure::Timeout)),
                Ok(Some(Err(error))) => return Some(self.fail(cause_of(&error))),
                Ok(None) if self.left.is_some_and(|left| left > 0) => {
                    return Some(self.fail(UpstreamFailure::ConnectionReset));
                }
                Ok(None) => break,
                Ok(Some(Ok(frame))) => frame,
            };
            // Trailers are not used.
            let Ok(bytes) = frame.into_data() else { continue };
            if bytes.is_empty() {
                continue;
            }
            if let Some(left) = &mut self.left {
                match left.checked_sub(bytes.len() as u64) {
                    Some(rest) => *left = rest,
                    None => return Some(self.fail(UpstreamFailure::Malformed)),
                }
            }
            return Some(Ok(bytes));
        }
        self.ended = true;
        None
    }

    fn fail(&mut self, cause: UpstreamFailure) -> Result<Bytes, UpstreamFailure> {
        self.ended = true;
        Err(cause)
    }

    /// The complete body, if it has at most `bytes_max` bytes and arrives at [`COLLECTED_BYTES_PER_SECOND_MIN`], apart
    /// from one idle time. All later clients wait for the same body.
    pub(super) async fn collect(mut self, bytes_max: usize) -> Result<Bytes, UpstreamFailure> {
        if self.left.is_some_and(|left| left > bytes_max as u64) {
            return Err(UpstreamFailure::TooLarge);
        }
        let mut collected =
            Vec::with_capacity(self.left.and_then(|left| usize::try_from(left).ok()).unwrap_or(0));
        let deadline = Instant::now() + self.idle;
        loop {
            let received =
                Duration::from_millis(collected.len() as u64 * 1000 / COLLECTED_BYTES_PER_SECOND_MIN);
            let chunk = match timeout_at(deadline + received, self.chunk()).await {
                Err(_) => return Err(UpstreamFailure::Timeout),
                Ok(None) => break,
                Ok(Some(chunk)) => chunk?,
            };
            if collected.len() + chunk.len() > bytes_max {
                return Err(UpstreamFailure::TooLarge);
            }
            collected.extend_from_slice(&chunk);
        }
        Ok(Bytes::from(collected))
    }
}

impl HttpResponse {
    /// Reads the complete body within `within`, if it has at most `bytes_max` bytes. For tokens, errors and
    /// manifests.
    pub(super) async fn collect(self, bytes_max: usize, within: Duration) -> Result<Bytes, UpstreamFailure> {
        let body = Body::new(self.body, content_length(&self.headers), within);
        timeout(within, body.collect(bytes_max))
            .await
            .unwrap_or(Err(UpstreamFailure::Timeout))
    }
}
