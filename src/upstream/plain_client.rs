//! HTTP client for a service that is no registry, over the same connector: TLS, outbound proxies and pooling are those
//! of upstreams.
//!
//! It follows no redirect, and connects to no other origin than those it is given. Nothing that a client or an
//! upstream sends can lead it elsewhere.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::connector::{ConnectorSettings, Transport, UpstreamConnector};
use super::http_client::{Follow, HttpClient, HttpRequest, cause_of};
use super::origin::{Origin, same_origin};
use super::proxy_rules::{ProxyChoice, ProxyRules};
use super::settings::SettingsError;
use crate::oci::failure::{RedirectFailure, UpstreamFailure};

/// Settings of a [`PlainClient`].
pub struct PlainSettings<'a> {
    /// The only origins that it requests. They may have any address.
    pub origins: Vec<Origin>,
    /// Further trusted roots, DER.
    pub roots: &'a [Vec<u8>],
    /// Outbound proxy.
    pub proxy: &'a ProxyChoice,
    /// Timeout up to the end of the TLS handshake.
    pub connect_timeout: Duration,
}

/// HTTP client for a service that is no registry.
pub struct PlainClient {
    http: HttpClient,
    origins: Vec<Uri>,
}

/// Why there is no response.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause}")]
pub struct PlainFailure {
    /// The cause.
    pub cause: UpstreamFailure,
    /// For the operator: the host that failed, and details of its certificate.
    pub detail: Option<Arc<str>>,
}

impl From<UpstreamFailure> for PlainFailure {
    fn from(cause: UpstreamFailure) -> Self {
        PlainFailure { cause, detail: None }
    }
}

impl PlainClient {
    /// Creates a client. Opens no connection.
    pub fn new(settings: PlainSettings<'_>, transport: &Transport) -> Result<PlainClient, SettingsError> {
        let origins = settings.origins.iter().filter_map(|origin| origin.join("/"));
        let origins = origins.collect();
        let connector = ConnectorSettings {
            roots: settings.roots,
            client_certificate: None,
            proxy_rules: ProxyRules::new(settings.proxy)?,
            origins: settings.origins,
            hosts: Vec::new(),
            redirects: Vec::new(),
            connect_timeout: settings.connect_timeout,
        };
        Ok(PlainClient {
            http: HttpClient::new(UpstreamConnector::new(transport, connector)?),
            origins,
        })
    }

    /// Whether `uri` has one of the origins of this client.
    pub fn is_for(&self, uri: &Uri) -> bool {
        self.origins.iter().any(|origin| same_origin(origin, uri))
    }

    /// Sends a request and returns the response, whatever its status. `timeout`: up to the response's headers. If the
    /// connection closes before a response, an idempotent request is sent again on a new connection.
    pub async fn send(
        &self,
        method: Method,
        uri: Uri,
        headers: HeaderMap,
        (body, timeout): (Bytes, Duration),
    ) -> Result<http::Response<PlainBody>, PlainFailure> {
        if !self.is_for(&uri) {
            return Err(UpstreamFailure::Redirects(RedirectFailure::OtherHost).into());
        }
        let request = HttpRequest {
            method,
            uri,
            headers,
            body,
            follow: Follow::SameOrigin,
            other_origin: None,
            timeout,
            is_client_paced: false,
        };
        match self.http.send_unfollowed(request).await {
            Ok(response) => Ok(response.map(PlainBody)),
            Err(failure) => Err(PlainFailure {
                cause: failure.cause,
                detail: failure.detail,
            }),
        }
    }
}

/// Body of a response.
#[derive(Debug)]
pub struct PlainBody(Incoming);

impl Body for PlainBody {
    type Data = Bytes;
    type Error = PlainFailure;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, PlainFailure>>> {
        let frame = ready!(Pin::new(&mut self.0).poll_frame(context));
        Poll::Ready(frame.map(|frame| frame.map_err(|error| cause_of(&error).into())))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}
