//! Forwarding of clients' requests to the upstream: pushes, logins and token requests.
//!
//! The request keeps the client's headers, including its credential. Nothing is followed, retried, decoded or stored,
//! and both bodies are streamed.

use std::error::Error;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, LOCATION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use hyper_util::client::legacy;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

use super::Upstream;
use super::connector::UpstreamConnector;
use super::http_client::{self, Body, HttpFailure, POOL_IDLE_MAX, content_length};
use super::location::resolve;
use super::origin::Origin;
use crate::oci::failure::UpstreamFailure;

/// Timeout for the response after the request body was sent. The registry may be assembling a large layer.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// Longest pause within a request body.
const BODY_IDLE_MAX: Duration = Duration::from_secs(60);

/// Body of a forwarded request.
pub type ForwardBody = UnsyncBoxBody<Bytes, Box<dyn Error + Send + Sync>>;

/// A request to forward.
pub struct ForwardRequest {
    /// The client's method.
    pub method: Method,
    /// The client's path and query: `/v2/…` for the registry API, any other path for the registry's root.
    pub path_and_query: String,
    /// The client's headers.
    pub headers: HeaderMap,
    /// Streamed.
    pub body: ForwardBody,
    /// The base URL that the client uses, e.g. `https://ghcr.io`; `Location` headers are rewritten to it.
    pub base: String,
}

/// Response to a forwarded request.
pub struct ForwardResponse {
    /// The status, unchanged.
    pub status: StatusCode,
    /// The end-to-end headers.
    pub headers: HeaderMap,
    /// Length of the body in bytes, if known.
    pub length: Option<u64>,
    body: Body,
}

impl ForwardResponse {
    /// The next bytes; `None` only at the end.
    pub async fn chunk(&mut self) -> Option<Result<Bytes, UpstreamFailure>> {
        self.body.chunk().await
    }
}

pub(super) type Client = legacy::Client<UpstreamConnector, ProgressBody>;

pub(super) fn client(connector: &UpstreamConnector) -> Client {
    http_client::client(connector.clone(), POOL_IDLE_MAX)
}

impl Upstream {
    /// Forwards a request to the upstream's first URL.
    pub async fn forward(&self, request: ForwardRequest) -> Result<ForwardResponse, UpstreamFailure> {
        let origin = self.0.urls.first().ok_or(UpstreamFailure::Unreachable)?;
        self.forward_to(origin, request).await
    }

    /// Forwards a request to the host of the upstream's token service.
    pub async fn forward_to_realm(
        &self,
        realm: &Origin,
        request: ForwardRequest,
    ) -> Result<ForwardResponse, UpstreamFailure> {
        self.forward_to(&realm.root(), request).await
    }

    async fn forward_to(
        &self,
        origin: &Origin,
        request: ForwardRequest,
    ) -> Result<ForwardResponse, UpstreamFailure> {
        let ForwardRequest {
            method,
            path_and_query,
            mut headers,
            body,
            base,
        } = request;
        let is_api = path_and_query == "/v2" || path_and_query.starts_with("/v2/");
        let uri = if is_api {
            origin.join(&path_and_query)
        } else {
            origin.join_root(&path_and_query)
        };
        let uri = uri.ok_or(UpstreamFailure::Malformed)?;
        remove_hop_by_hop(&mut headers);
        for name in [HOST, EXPECT, CONTENT_LENGTH] {
            headers.remove(name);
        }
        if let Some(authorization) = self.0.auth_client.http.connector().proxy_authorization(&uri) {
            headers.insert(PROXY_AUTHORIZATION, authorization);
        }
        let progress = Progress::default();
        let body = ProgressBody {
            body,
            progress: progress.clone(),
        };
        let is_head = method == Method::HEAD;
        let mut outgoing = http::Request::builder()
            .method(method)
            .uri(uri.clone())
            .body(body)
            .map_err(|_| UpstreamFailure::Malformed)?;
        *outgoing.headers_mut() = headers;
        let since = Instant::now();
        let (mut head, incoming) = progress
            .awaiting(self.0.forward_client.request(outgoing))
            .await?
            .map_err(|error| {
                HttpFailure::of(&error, &uri, (self.0.auth_client.http.connector(), since)).cause
            })?
            .into_parts();
        remove_hop_by_hop(&mut head.headers);
        rewrite_location(&mut head.headers, origin, &uri, &base);
        let length = content_length(&head.headers);
        let promised = length.filter(|_| !is_head && head.status != StatusCode::NOT_MODIFIED);
        Ok(ForwardResponse {
            status: head.status,
            headers: head.headers,
            length,
            body: Body::new(incoming, promised, self.0.timeouts.idle),
        })
    }
}

/// Removes hop-by-hop headers (RFC 9110 §7.6.1).
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let fixed = [
        CONNECTION,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
    ];
    for name in named.into_iter().chain(fixed) {
        headers.remove(name);
    }
}

/// Rewrites a `Location` at the upstream's own URL to the client's base URL. A `Location` elsewhere (signed storage)
/// stays unchanged.
fn rewrite_location(headers: &mut HeaderMap, origin: &Origin, request_url: &Uri, base: &str) {
    let Some(location) = headers.get(LOCATION).map(HeaderValue::as_bytes) else {
        return;
    };
    let Some(target) = resolve(request_url, location) else {
        return;
    };
    let Some(path) = origin.strip(&target) else { return };
    let is_right =
        location == path.as_bytes() || location.strip_prefix(base.as_bytes()) == Some(path.as_bytes());
    if !is_right && let Ok(value) = HeaderValue::from_str(&format!("{base}{path}")) {
        headers.insert(LOCATION, value);
    }
}

/// Progress of a request's body, for its timeouts.
#[derive(Clone)]
struct Progress(Arc<Mutex<(Instant, bool)>>);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(Mutex::new((Instant::now(), false))))
    }
}

impl Progress {
    fn moved(&self, ended: bool) {
        *self.0.lock() = (Instant::now(), ended);
    }

    fn deadline(&self) -> Instant {
        let (at, ended) = *self.0.lock();
        at + if ended { RESPONSE_TIMEOUT } else { BODY_IDLE_MAX }
    }

    /// Waits while the body makes progress, and then for the response.
    async fn awaiting<T>(&self, reply: impl Future<Output = T>) -> Result<T, UpstreamFailure> {
        let mut reply = pin!(reply);
        loop {
            let deadline = self.deadline();
            let left = deadline.saturating_duration_since(Instant::now());
            match timeout(left, reply.as_mut()).await {
                Ok(reply) => return Ok(reply),
                Err(_) if self.deadline() > deadline => {}
                Err(_) => return Err(UpstreamFailure::Timeout),
            }
        }
    }
}

/// Body that records its progress.
pub(super) struct ProgressBody {
    body: ForwardBody,
    progress: Progress,
}

impl http_body::Body for ProgressBody {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = self.body.frame();
        let polled = pin!(frame).poll(cx);
        if let Poll::Ready(next) = &polled {
            self.progress.moved(next.is_none() || self.body.is_end_stream());
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        let ended = self.body.is_end_stream();
        if ended {
            self.progress.moved(true);
        }
        ended
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn forwarded_location_is_rewritten() {
        let request_url = Uri::from_static("http://10.0.0.9:5000/sub/v2/team/demo/blobs/uploads/");
        let origin: Origin = "http://10.0.0.9:5000/sub".parse().unwrap();
        for (sent, expected) in [
            (
                "http://10.0.0.9:5000/sub/v2/team/demo/blobs/uploads/7?x=1",
                "https://reg.example/v2/team/demo/blobs/uploads/7?x=1",
            ),
            (
                "/sub/v2/team/demo/blobs/uploads/7",
                "https://reg.example/v2/team/demo/blobs/uploads/7",
            ),
            ("https://reg.example/v2/a", "https://reg.example/v2/a"),
            (
                "https://storage.example/x?sig=1",
                "https://storage.example/x?sig=1",
            ),
        ] {
            let mut headers = HeaderMap::from_iter([(LOCATION, sent.parse().unwrap())]);
            rewrite_location(&mut headers, &origin, &request_url, "https://reg.example");
            assert_eq!(headers[LOCATION], expected, "{sent}");
        }
        let plain: Origin = "https://reg.example".parse().unwrap();
        let request_url = Uri::from_static("https://reg.example/v2/team/demo/blobs/uploads/");
        for sent in ["/v2/a?b", "https://reg.example/v2/a?b"] {
            let mut headers = HeaderMap::from_iter([(LOCATION, sent.parse().unwrap())]);
            rewrite_location(&mut headers, &plain, &request_url, "https://reg.example");
            assert_eq!(headers[LOCATION], sent, "a correct Location stays unchanged");
        }
    }

    #[test]
    fn hop_by_hop_headers_are_removed() {
        let mut headers: HeaderMap = [
            ("connection", "keep-alive, X-Secret"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("proxy-authorization", "Basic eA=="),
            ("authorization", "Bearer t"),
            ("content-range", "0-9"),
        ]
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .into_iter()
        .collect();
        remove_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "content-range"]);
    }

    #[tokio::test(start_paused = true)]
    async fn stalled_body_times_out_and_slow_response_does_not() {
        let progress = Progress::default();
        let started = Instant::now();
        let waited = progress.awaiting(std::future::pending::<()>()).await;
        assert_eq!(
            (waited, started.elapsed()),
            (Err(UpstreamFailure::Timeout), BODY_IDLE_MAX)
        );
        progress.moved(true);
        let late = tokio::time::sleep(RESPONSE_TIMEOUT / 2);
        assert!(progress.awaiting(late).await.is_ok());
    }
}
