//! Connector of one upstream: opens the connection for a URI, directly or through an outbound proxy, with or without
//! TLS.
//!
//! It also keeps redirects and token realms out of IP scopes narrower than the upstream's own (see [`IpScope`]).

use std::error::Error;
use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderValue, Uri};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use tokio::time::Instant;
use tower_service::Service;

use super::dialer::{DialError, DialedStream, Dialer, Stream};
use super::ip_scope::IpScope;
use super::origin::{Origin, address, is_one_of, port_of, same_host};
use super::proxy_rules::{ProxyRoute, ProxyRules};
use super::redirect_rules::{AddressLimit, RedirectRule, RedirectRules, allow_entry};
use super::tcp::{TcpDialer, resolved};
use super::tls::{ClientCertificate, Tls, TlsError, Trust, io_cause};
use crate::oci::failure::{RedirectFailure, TlsFailure, UpstreamFailure};

/// The dialer and the system's trust anchors, shared by all upstreams.
#[derive(Clone)]
pub struct Transport {
    dial: Arc<dyn Dialer>,
    trust: Trust,
}

impl Transport {
    /// TCP with the system's certificate authorities, or the bundled ones if there are none (scratch images). Reads
    /// files; opens no connection.
    pub fn system() -> Transport {
        Transport {
            dial: Arc::new(TcpDialer),
            trust: Trust::system(),
        }
    }

    /// [`Transport::system`] with another dialer, for tests.
    pub fn with_dialer(dial: Arc<dyn Dialer>) -> Transport {
        Transport {
            dial,
            trust: Trust::system(),
        }
    }
}

impl Transport {
    pub(super) fn dial(&self) -> Arc<dyn Dialer> {
        Arc::clone(&self.dial)
    }

    pub(super) fn trust(&self) -> &Trust {
        &self.trust
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("anchors", &self.trust.anchors())
            .finish_non_exhaustive()
    }
}

/// Settings of a [`UpstreamConnector`].
pub(super) struct ConnectorSettings<'a> {
    /// Further trusted roots, DER.
    pub(super) roots: &'a [Vec<u8>],
    /// Used for the configured URLs only.
    pub(super) client_certificate: Option<ClientCertificate>,
    pub(super) proxy_rules: ProxyRules,
    /// The configured URLs; connections to these may lead to any address.
    pub(super) origins: Vec<Origin>,
    /// Further trusted hosts.
    pub(super) hosts: Vec<String>,
    /// Further allowed redirect targets.
    pub(super) redirects: Vec<RedirectRule>,
    /// Timeout up to the end of the TLS handshake.
    pub(super) connect_timeout: Duration,
}

/// Connector of one upstream, for the hyper client.
#[derive(Clone)]
pub(super) struct UpstreamConnector(Arc<Inner>);

struct Inner {
    dial: Arc<dyn Dialer>,
    /// Offers h2 and HTTP/1.1.
    tls: Tls,
    /// Like `tls`, with the client certificate.
    client_auth_tls: Tls,
    /// Offers HTTP/1.1 only, because `CONNECT` is sent in it.
    proxy_tls: Tls,
    proxy_rules: ProxyRules,
    configured: Vec<Uri>,
    hosts: Vec<String>,
    redirects: RedirectRules,
    /// The narrowest scope of the configured URLs' addresses so far, as `IpScope as u8`.
    narrowest_scope: AtomicU8,
    connect_timeout: Duration,
}

impl UpstreamConnector {
    pub(super) fn new(
        transport: &Transport,
        settings: ConnectorSettings<'_>,
    ) -> Result<UpstreamConnector, TlsError> {
        let trust = transport.trust().with(settings.roots)?;
        let both: &[&[u8]] = &[b"h2", b"http/1.1"];
        Ok(UpstreamConnector(Arc::new(Inner {
            dial: transport.dial(),
            tls: Tls::new(&trust, both, None)?,
            client_auth_tls: Tls::new(&trust, both, settings.client_certificate)?,
            proxy_tls: Tls::new(&trust, &[b"http/1.1"], None)?,
            proxy_rules: settings.proxy_rules,
            configured: settings
                .origins
                .iter()
                .filter_map(|origin| origin.join("/"))
                .collect(),
            hosts: settings.hosts,
            redirects: RedirectRules(settings.redirects),
            narrowest_scope: AtomicU8::new(IpScope::Public as u8),
            connect_timeout: settings.connect_timeout,
        })))
    }

    /// Opens a stream to the host and port of `to` without TLS. Addresses narrower than `narrowest_scope` are
    /// rejected; the upstream's own rules do not apply.
    pub(super) async fn connect_raw(
        &self,
        to: &Uri,
        narrowest_scope: IpScope,
    ) -> Result<Box<dyn Stream>, DialError> {
        let reached = tokio::time::timeout(
            self.0.connect_timeout,
            self.0.dial_route(to, &narrowest_scope.into()),
        )
        .await;
        let (stream, _) = reached.unwrap_or_else(|_| Err(UpstreamFailure::ConnectTimeout.into()))?;
        Ok(stream)
    }

    /// The narrowest scope in which the upstream's own addresses were found.
    pub(super) fn narrowest_scope(&self) -> IpScope {
        self.0.narrowest_scope()
    }

    /// Whether a redirect may leave https for `to`.
    pub(super) fn allows_plain(&self, to: &Uri) -> bool {
        self.0.redirects.allow_plain(to)
    }

    /// Why the server at `to` closed a connection after the TLS handshake, no earlier than `since`.
    pub(super) fn close_reason(&self, to: &Uri, since: Instant) -> Option<(TlsFailure, String)> {
        self.0.tls_for(to).close_reason(to, since)
    }

    /// The `Proxy-Authorization` for a plain request to `destination`, if a forward proxy requires one.
    pub(super) fn proxy_authorization(&self, destination: &Uri) -> Option<HeaderValue> {
        match self.0.proxy_rules.to(destination) {
            ProxyRoute::Forward(proxy) => proxy.authorization,
            ProxyRoute::Direct | ProxyRoute::Tunnel(_) | ProxyRoute::Socks { .. } => None,
        }
    }
}

impl Inner {
    /// The addresses that a connection to `to` may have. Any for configured URLs; otherwise none narrower than the
    /// upstream's own, and those that `hosts` and `redirects` allow.
    fn limit(&self, to: &Uri) -> AddressLimit {
        if self.is_configured(to) {
            return IpScope::LinkLocal.into();
        }
        if let Some(scope) = self.scope_of_host(to) {
            return scope.max(self.narrowest_scope()).into();
        }
        self.redirects
            .limit(to, self.narrowest_scope(), self.is_downgrade(to))
    }

    /// The narrowest scope to which `hosts` allows `to`, as for redirects: no name leads to link-local addresses.
    fn scope_of_host(&self, to: &Uri) -> Option<IpScope> {
        let matching = self
            .hosts
            .iter()
            .filter(|host| is_one_of(slice::from_ref(*host), to));
        let scope = |host: &String| match to.host().and_then(address) {
            Some(_) => IpScope::LinkLocal,
            None if host.starts_with('*') => IpScope::Private,
            None => IpScope::Loopback,
        };
        matching.map(scope).max()
    }

    fn tls_for(&self, to: &Uri) -> &Tls {
        if self.is_configured(to) {
            &self.client_auth_tls
        } else {
            &self.tls
        }
    }

    /// Whether `to` is plain HTTP although all configured URLs are https.
    fn is_downgrade(&self, to: &Uri) -> bool {
        let is_plain = |uri: &Uri| uri.scheme_str() == Some("http");
        is_plain(to) && !self.configured.is_empty() && !self.configured.iter().any(is_plain)
    }

    /// Adds the `redirects` entry that would allow a rejected address.
    fn with_allow_hint(&self, mut error: DialError, to: &Uri) -> DialError {
        if error.cause != UpstreamFailure::Redirects(RedirectFailure::NarrowerScope) {
            return error;
        }
        let address = error.denied_address();
        let entry = allow_entry(to, address, self.is_downgrade(to));
        let address = address.map_or_else(|| "an address".to_owned(), |address| address.to_string());
        error.detail = Some(
            format!(
                "it leads to {address}, which is in a narrower IP scope or not allowed for plain http; if \
                 this is correct, allow it with redirects = [\"{entry}\"]"
            )
            .into(),
        );
        error
    }

    fn narrowest_scope(&self) -> IpScope {
        let narrowest_scope = self.narrowest_scope.load(Ordering::Relaxed);
        [
            IpScope::Public,
            IpScope::Private,
            IpScope::Loopback,
            IpScope::LinkLocal,
        ]
        .into_iter()
        .find(|zone| *zone as u8 == narrowest_scope)
        .unwrap_or(IpScope::Public)
    }

    fn is_configured(&self, to: &Uri) -> bool {
        self.configured
            .iter()
            .any(|own| same_host(own, to) && port_of(own) == port_of(to))
    }

    async fn dial(&self, to: &Uri, limit: &AddressLimit) -> Result<Box<dyn Stream>, DialError> {
        let DialedStream { stream, peer } = self.dial.dial(to, limit, self.connect_timeout).await?;
        if let Some(peer) = peer
            && self.is_configured(to)
        {
            self.narrowest_scope
                .fetch_max(IpScope::of(peer) as u8, Ordering::Relaxed);
        }
        Ok(stream)
    }

    /// Opens the stream to `to` without TLS, and tells whether it leads to a forward proxy.
    async fn dial_route(
        self: &Arc<Self>,
        to: &Uri,
        limit: &AddressLimit,
    ) -> Result<(Box<dyn Stream>, bool), DialError> {
        let route = self.proxy_rules.to(to);
        if !matches!(route, ProxyRoute::Direct) {
            match to.host().and_then(address) {
                Some(address) if !limit.allows(address) => return Err(DialError::scope_denied(address)),
                None if !limit.is_for_names() => {
                    return Err(UpstreamFailure::Redirects(RedirectFailure::NarrowerScope).into());
                }
                Some(_) | None => {}
            }
        }
        let proxy_connector = ProxyConnector(Arc::clone(self));
        Ok(match route {
            ProxyRoute::Direct => (self.dial(to, limit).await?, false),
            ProxyRoute::Forward(proxy) => (proxy_connector.clone().call(proxy.uri).await?.into_inner(), true),
            ProxyRoute::Tunnel(proxy) => {
                let mut tunnel = Tunnel::new(proxy.uri, proxy_connector);
                if let Some(authorization) = proxy.authorization {
                    tunnel = tunnel.with_auth(authorization);
                }
                (
                    tunnel.call(to.clone()).await.map_err(proxy_error)?.into_inner(),
                    false,
                )
            }
            ProxyRoute::Socks {
                proxy,
                login,
                remote_dns,
            } => {
                let to = self.socks_destination(to, limit, remote_dns).await?;
                let mut socks = SocksV5::new(with_port(&proxy)?, proxy_connector);
                if let Some((user, password)) = login {
                    socks = socks.with_auth(user, password);
                }
                (socks.call(to).await.map_err(proxy_error)?.into_inner(), false)
            }
        })
    }

    /// The host and port that a SOCKS proxy is to connect to: the name, or an address of it that `limit` allows.
    async fn socks_destination(
        &self,
        to: &Uri,
        limit: &AddressLimit,
        remote_dns: bool,
    ) -> Result<Uri, DialError> {
        let host = to.host().unwrap_or_default();
        if remote_dns || address(host).is_some() {
            return with_port(to);
        }
        let found = resolved(host, limit).await?;
        if self.is_configured(to) {
            self.narrowest_scope
                .fetch_max(IpScope::of(found) as u8, Ordering::Relaxed);
        }
        uri_of(&SocketAddr::new(found, port_of(to)).to_string())
    }

    async fn connect(self: Arc<Self>, to: Uri) -> Result<ConnectedStream, DialError> {
        let reached = self.dial_route(&to, &self.limit(&to)).await;
        let (stream, is_forward_proxy) = reached.map_err(|error| self.with_allow_hint(error, &to))?;
        if to.scheme_str() != Some("https") {
            return Ok(ConnectedStream {
                io: TokioIo::new(stream),
                h2: false,
                is_forward_proxy,
            });
        }
        let (stream, h2) = self.tls_for(&to).handshake(&to, stream).await?;
        Ok(ConnectedStream {
            io: TokioIo::new(stream),
            h2,
            is_forward_proxy: false,
        })
    }
}

/// The host and port of a URI, with the default port of its scheme. The SOCKS client takes 443 for any URI without one.
fn with_port(uri: &Uri) -> Result<Uri, DialError> {
    uri_of(&format!("{}:{}", uri.host().unwrap_or_default(), port_of(uri)))
}

fn uri_of(authority: &str) -> Result<Uri, DialError> {
    let uri = Uri::builder()
        .scheme("http")
        .authority(authority)
        .path_and_query("/");
    uri.build()
        .map_err(|error| DialError::new(UpstreamFailure::Unreachable, error))
}

/// A failure of the proxy or behind it, with the cause from the chain of sources.
fn proxy_error<E: Error + Send + Sync + 'static>(error: E) -> DialError {
    let mut next: Option<&(dyn Error + 'static)> = Some(&error);
    let (mut cause, mut detail) = (UpstreamFailure::Unreachable, None);
    while let Some(one) = next {
        if let Some(dialled) = one.downcast_ref::<DialError>() {
            cause = dialled.cause;
            detail.clone_from(&dialled.detail);
            break;
        }
        if let Some(io) = one.downcast_ref::<io::Error>() {
            cause = io_cause(io);
        }
        next = one.source();
    }
    let detail = detail.unwrap_or_else(|| format!("through the proxy: {error}").into());
    DialError {
        detail: Some(detail),
        ..DialError::new(cause, error)
    }
}

impl Service<Uri> for UpstreamConnector {
    type Response = ConnectedStream;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<ConnectedStream, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let connect_timeout = inner.connect_timeout;
            let connected = tokio::time::timeout(connect_timeout, inner.connect(to)).await;
            connected.unwrap_or_else(|_| Err(UpstreamFailure::ConnectTimeout.into()))
        })
    }
}

/// Connector to the proxy itself. The operator configured it, so any address is allowed.
#[derive(Clone)]
struct ProxyConnector(Arc<Inner>);

impl Service<Uri> for ProxyConnector {
    type Response = TokioIo<Box<dyn Stream>>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<TokioIo<Box<dyn Stream>>, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, proxy: Uri) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let DialedStream { mut stream, .. } = inner
                .dial
                .dial(&proxy, &IpScope::LinkLocal.into(), inner.connect_timeout)
                .await?;
            if proxy.scheme_str() == Some("https") {
                (stream, _) = inner
                    .proxy_tls
                    .handshake(&proxy, stream)
                    .await
                    .map_err(|mut error| {
                        let detail = error.detail.as_deref().unwrap_or_default();
                        error.detail = Some(format!("at the proxy: {detail}").into());
                        error
                    })?;
            }
            Ok(TokioIo::new(stream))
        })
    }
}

/// An established connection, for hyper.
pub(super) struct ConnectedStream {
    io: TokioIo<Box<dyn Stream>>,
    h2: bool,
    /// The peer is a forward proxy, which requires the absolute form.
    is_forward_proxy: bool,
}

impl Connection for ConnectedStream {
    fn connected(&self) -> Connected {
        let connected = Connected::new().proxy(self.is_forward_proxy);
        if self.h2 {
            connected.negotiated_h2()
        } else {
            connected
        }
    }
}

impl Read for ConnectedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for ConnectedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    /// Otherwise hyper copies each body, such as a part of 8 MiB for the bucket, behind its head.
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
