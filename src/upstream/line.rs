//! One upstream's way out: a URI becomes a connection hyper can use, straight or through a proxy, plain or in TLS.
//!
//! It also keeps redirects and token realms from leading nearer than the upstream itself (see [`Zone`]).

use std::error::Error;
use std::io;
use std::pin::Pin;
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

use super::dial::{Connector, Dial, DialError, Dialled, Stream, io_cause};
use super::origin::{Origin, address, is_one_of, port_of, same_host};
use super::route::{Route, Routes};
use super::target::{Limit, RedirectRule, RedirectRules, entry};
use super::tls::{ClientCertificate, Tls, TlsError};
use super::zone::Zone;
use crate::oci::cause::{Cause, RedirectFault, TlsFault};

/// What a [`Line`] is made of.
pub(super) struct LineSettings<'a> {
    /// Further trusted roots, DER.
    pub(super) roots: &'a [Vec<u8>],
    /// For the configured addresses alone.
    pub(super) client_certificate: Option<ClientCertificate>,
    pub(super) routes: Routes,
    /// Configured addresses: connections to these may lead anywhere.
    pub(super) origins: Vec<Origin>,
    /// Further hosts the operator trusts, wherever they are.
    pub(super) hosts: Vec<String>,
    /// Where redirects may lead besides.
    pub(super) redirects: Vec<RedirectRule>,
    /// For everything up to the end of the TLS handshake.
    pub(super) patience: Duration,
}

/// One upstream's way out: a URI becomes a connection hyper can use.
#[derive(Clone)]
pub(super) struct Line(Arc<Inner>);

struct Inner {
    dial: Arc<dyn Dial>,
    /// Offers h2 and HTTP/1.1.
    tls: Tls,
    /// The same with the client certificate.
    own_tls: Tls,
    /// Offers HTTP/1.1 only, which is what `CONNECT` is written in.
    proxy_tls: Tls,
    routes: Routes,
    own: Vec<Uri>,
    hosts: Vec<String>,
    redirects: RedirectRules,
    /// The nearest zone one of our own addresses turned out to be in, as `Zone as u8`.
    nearest: AtomicU8,
    patience: Duration,
}

impl Line {
    pub(super) fn new(connector: &Connector, settings: LineSettings<'_>) -> Result<Line, TlsError> {
        let trust = connector.trust().with(settings.roots)?;
        let both: &[&[u8]] = &[b"h2", b"http/1.1"];
        Ok(Line(Arc::new(Inner {
            dial: connector.dial(),
            tls: Tls::new(&trust, both, None)?,
            own_tls: Tls::new(&trust, both, settings.client_certificate)?,
            proxy_tls: Tls::new(&trust, &[b"http/1.1"], None)?,
            routes: settings.routes,
            own: settings
                .origins
                .iter()
                .filter_map(|origin| origin.join("/"))
                .collect(),
            hosts: settings.hosts,
            redirects: RedirectRules(settings.redirects),
            nearest: AtomicU8::new(Zone::Public as u8),
            patience: settings.patience,
        })))
    }

    /// The bare bytes to the host and port of `to`, which no limit of this line's own upstream concerns; no nearer than
    /// `nearest`.
    pub(super) async fn raw(&self, to: &Uri, nearest: Zone) -> Result<Box<dyn Stream>, DialError> {
        let reached = tokio::time::timeout(self.0.patience, self.0.reach(to, &nearest.into())).await;
        let (stream, _) = reached.unwrap_or_else(|_| Err(Cause::ConnectTimeout.into()))?;
        Ok(stream)
    }

    /// The nearest zone that this line's own upstream turned out to be in.
    pub(super) fn nearest(&self) -> Zone {
        self.0.nearest()
    }

    /// Whether a redirect may leave https for `to`.
    pub(super) fn allows_plain(&self, to: &Uri) -> bool {
        self.0.redirects.allow_plain(to)
    }

    /// Why the server at `to` ended a connection after the TLS handshake, no earlier than `since`.
    pub(super) fn ended(&self, to: &Uri, since: Instant) -> Option<(TlsFault, String)> {
        self.0.tls_for(to).ended(to, since)
    }

    /// What an HTTP proxy wants to see on a plain request to `destination` that it forwards.
    pub(super) fn proxy_authorization(&self, destination: &Uri) -> Option<HeaderValue> {
        match self.0.routes.to(destination) {
            Route::Forward(proxy) => proxy.authorization,
            Route::Direct | Route::Tunnel(_) | Route::Socks { .. } => None,
        }
    }
}

impl Inner {
    /// Where a connection to `to` may lead: anywhere for addresses and hosts the operator named; for all others no nearer
    /// than those, and where `redirects` allows it.
    fn limit(&self, to: &Uri) -> Limit {
        if self.is_own(to) || is_one_of(&self.hosts, to) {
            return Zone::Link.into();
        }
        self.redirects.limit(to, self.nearest(), self.is_downgrade(to))
    }

    fn tls_for(&self, to: &Uri) -> &Tls {
        if self.is_own(to) { &self.own_tls } else { &self.tls }
    }

    /// Plain HTTP, where the upstream itself has only https addresses.
    fn is_downgrade(&self, to: &Uri) -> bool {
        let is_plain = |uri: &Uri| uri.scheme_str() == Some("http");
        is_plain(to) && !self.own.is_empty() && !self.own.iter().any(is_plain)
    }

    /// A refused address, with what would allow it.
    fn explained(&self, mut error: DialError, to: &Uri) -> DialError {
        if error.cause != Cause::Redirects(RedirectFault::TooNear) {
            return error;
        }
        let address = error.refused_address();
        let entry = entry(to, address, self.is_downgrade(to));
        let address = address.map_or_else(|| "an address".to_owned(), |address| address.to_string());
        error.detail = Some(
            format!(
                "it leads to {address}, which is nearer than the registry itself or not where plain http is allowed; if \
                 that is right, allow it by redirects = [\"{entry}\"]"
            )
            .into(),
        );
        error
    }

    fn nearest(&self) -> Zone {
        let nearest = self.nearest.load(Ordering::Relaxed);
        [Zone::Public, Zone::Private, Zone::Loopback, Zone::Link]
            .into_iter()
            .find(|zone| *zone as u8 == nearest)
            .unwrap_or(Zone::Public)
    }

    fn is_own(&self, to: &Uri) -> bool {
        self.own
            .iter()
            .any(|own| same_host(own, to) && port_of(own) == port_of(to))
    }

    async fn dial(&self, to: &Uri, limit: &Limit) -> Result<Box<dyn Stream>, DialError> {
        let Dialled { stream, peer } = self.dial.dial(to, limit, self.patience).await?;
        if let Some(peer) = peer
            && self.is_own(to)
        {
            self.nearest.fetch_max(Zone::of(peer) as u8, Ordering::Relaxed);
        }
        Ok(stream)
    }

    /// The stream to `to`, before TLS, and whether it is an HTTP proxy's that wants the absolute form.
    async fn reach(self: &Arc<Self>, to: &Uri, limit: &Limit) -> Result<(Box<dyn Stream>, bool), DialError> {
        let route = self.routes.to(to);
        if !matches!(route, Route::Direct) {
            match to.host().and_then(address) {
                Some(address) if !limit.allows(address) => return Err(DialError::too_near(address)),
                None if !limit.is_for_names() => {
                    return Err(Cause::Redirects(RedirectFault::TooNear).into());
                }
                Some(_) | None => {}
            }
        }
        let leg = Leg(Arc::clone(self));
        Ok(match route {
            Route::Direct => (self.dial(to, limit).await?, false),
            Route::Forward(proxy) => (leg.clone().call(proxy.uri).await?.into_inner(), true),
            Route::Tunnel(proxy) => {
                let mut tunnel = Tunnel::new(proxy.uri, leg);
                if let Some(authorization) = proxy.authorization {
                    tunnel = tunnel.with_auth(authorization);
                }
                (
                    tunnel.call(to.clone()).await.map_err(through_proxy)?.into_inner(),
                    false,
                )
            }
            Route::Socks {
                proxy,
                login,
                remote_dns,
            } => {
                let mut socks = SocksV5::new(proxy, leg).local_dns(!remote_dns);
                if let Some((user, password)) = login {
                    socks = socks.with_auth(user, password);
                }
                (
                    socks.call(to.clone()).await.map_err(through_proxy)?.into_inner(),
                    false,
                )
            }
        })
    }

    async fn connect(self: Arc<Self>, to: Uri) -> Result<Wire, DialError> {
        let reached = self.reach(&to, &self.limit(&to)).await;
        let (stream, forwarded) = reached.map_err(|error| self.explained(error, &to))?;
        if to.scheme_str() != Some("https") {
            return Ok(Wire {
                io: TokioIo::new(stream),
                h2: false,
                forwarded,
            });
        }
        let (stream, h2) = self.tls_for(&to).secure(&to, stream).await?;
        Ok(Wire {
            io: TokioIo::new(stream),
            h2,
            forwarded: false,
        })
    }
}

/// A failure of a proxy, or behind it: as precise as the chain of errors is.
fn through_proxy<E: Error + Send + Sync + 'static>(error: E) -> DialError {
    let mut next: Option<&(dyn Error + 'static)> = Some(&error);
    let (mut cause, mut detail) = (Cause::Unreachable, None);
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

impl Service<Uri> for Line {
    type Response = Wire;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Wire, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let patience = inner.patience;
            let connected = tokio::time::timeout(patience, inner.connect(to)).await;
            connected.unwrap_or_else(|_| Err(Cause::ConnectTimeout.into()))
        })
    }
}

/// The way to the proxy itself, which the operator chose: no limit on where it is.
#[derive(Clone)]
struct Leg(Arc<Inner>);

impl Service<Uri> for Leg {
    type Response = TokioIo<Box<dyn Stream>>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<TokioIo<Box<dyn Stream>>, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, proxy: Uri) -> Self::Future {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            let Dialled { mut stream, .. } = inner
                .dial
                .dial(&proxy, &Zone::Link.into(), inner.patience)
                .await?;
            if proxy.scheme_str() == Some("https") {
                (stream, _) = inner
                    .proxy_tls
                    .secure(&proxy, stream)
                    .await
                    .map_err(|mut error| {
                        let detail = error.detail.as_deref().unwrap_or_default();
                        error.detail = Some(format!("of the proxy: {detail}").into());
                        error
                    })?;
            }
            Ok(TokioIo::new(stream))
        })
    }
}

/// A finished connection, as hyper wants it.
pub(super) struct Wire {
    io: TokioIo<Box<dyn Stream>>,
    h2: bool,
    /// The other end is a proxy that wants the absolute form.
    forwarded: bool,
}

impl Connection for Wire {
    fn connected(&self) -> Connected {
        let connected = Connected::new().proxy(self.forwarded);
        if self.h2 {
            connected.negotiated_h2()
        } else {
            connected
        }
    }
}

impl Read for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
