//! A request that is not asked by us but handed on: a client's push, its login, its question to the token service.
//!
//! One hop with the client's own headers, its credential among them; nothing is followed, tried again, decoded or kept,
//! and neither body is ever whole in memory.

use std::error::Error;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
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
use tokio::time::{Instant, timeout};

use super::Upstream;
use super::connector::UpstreamConnector;
use super::http_client::{self, Body, HttpFailure, POOL_IDLE_MAX, content_length};
use super::location::resolve;
use super::origin::Origin;
use crate::oci::failure::UpstreamFailure;

/// How long a registry may think once it has all of a request: it may be putting a large layer together.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// How long a request's body may rest on its way.
const BODY_IDLE_MAX: Duration = Duration::from_secs(60);

/// The body of a request that is handed on.
pub type ForwardBody = UnsyncBoxBody<Bytes, Box<dyn Error + Send + Sync>>;

/// A request that is handed on.
pub struct ForwardRequest {
    /// As the client sent it.
    pub method: Method,
    /// As the client sent it: `/v2/…` at the registry, anything else beside it.
    pub path_and_query: String,
    /// All that the client sent.
    pub headers: HeaderMap,
    /// Streamed.
    pub body: ForwardBody,
    /// Where the client thinks it is, as in `https://ghcr.io`: a `Location` at the upstream becomes one there.
    pub base: String,
}

/// An answer that is handed back.
pub struct ForwardResponse {
    /// As the upstream sent it.
    pub status: StatusCode,
    /// All that concerns the client.
    pub headers: HeaderMap,
    /// The length of the body in bytes, if it was said.
    pub length: Option<u64>,
    body: Body,
}

impl ForwardResponse {
    /// The next bytes; `None` at the end and only there.
    pub async fn chunk(&mut self) -> Option<Result<Bytes, UpstreamFailure>> {
        self.body.chunk().await
    }
}

pub(super) type Client = legacy::Client<UpstreamConnector, ProgressBody>;

pub(super) fn client(connector: &UpstreamConnector) -> Client {
    http_client::client(connector.clone(), POOL_IDLE_MAX)
}

impl Upstream {
    /// Hands a request on to the upstream's first address, and its answer back.
    pub async fn forward(&self, request: ForwardRequest) -> Result<ForwardResponse, UpstreamFailure> {
        let origin = self.0.urls.first().ok_or(UpstreamFailure::Unreachable)?;
        self.forward_to(origin, request).await
    }

    /// The same to the host of the upstream's token service.
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

/// RFC 9110 §7.6.1: what is between two neighbours only.
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

/// A `Location` at the upstream's own address leads the client on through us, at the address that it knows; one
/// elsewhere (signed storage) stays as it is.
fn rewrite_location(headers: &mut HeaderMap, origin: &Origin, asked: &Uri, base: &str) {
    let Some(location) = headers.get(LOCATION).map(HeaderValue::as_bytes) else {
        return;
    };
    let Some(target) = resolve(asked, location) else {
        return;
    };
    let Some(path) = origin.strip(&target) else { return };
    let is_right =
        location == path.as_bytes() || location.strip_prefix(base.as_bytes()) == Some(path.as_bytes());
    if !is_right && let Ok(value) = HeaderValue::from_str(&format!("{base}{path}")) {
        headers.insert(LOCATION, value);
    }
}

/// When a request's body last moved.
#[derive(Clone)]
struct Progress(Arc<Mutex<(Instant, bool)>>);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(Mutex::new((Instant::now(), false))))
    }
}

impl Progress {
    fn moved(&self, ended: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), ended);
    }

    fn deadline(&self) -> Instant {
        let (at, ended) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        at + if ended { RESPONSE_TIMEOUT } else { BODY_IDLE_MAX }
    }

    /// Waits as long as the body moves, and then for the reply.
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

/// A body that tells when it moves.
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
    fn a_location_leads_on_through_us() {
        let asked = Uri::from_static("http://10.0.0.9:5000/sub/v2/team/demo/blobs/uploads/");
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
            rewrite_location(&mut headers, &origin, &asked, "https://reg.example");
            assert_eq!(headers[LOCATION], expected, "{sent}");
        }
        let plain: Origin = "https://reg.example".parse().unwrap();
        let asked = Uri::from_static("https://reg.example/v2/team/demo/blobs/uploads/");
        for sent in ["/v2/a?b", "https://reg.example/v2/a?b"] {
            let mut headers = HeaderMap::from_iter([(LOCATION, sent.parse().unwrap())]);
            rewrite_location(&mut headers, &plain, &asked, "https://reg.example");
            assert_eq!(
                headers[LOCATION], sent,
                "what is right stays as it was, byte for byte"
            );
        }
    }

    #[test]
    fn what_is_between_neighbours_stays_there() {
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
    async fn a_body_that_rests_is_given_up_and_a_registry_may_think() {
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
