//! `CONNECT` (RFC 9110 §9.3.6): TLS interception for configured upstreams and tunnels to allowed hosts.
//!
//! For a configured upstream the cache ends TLS with a leaf certificate of its CA, then serves the requests as on any
//! other route. For other hosts it opens a tunnel and does not read it. A tunnel needs a rule of the operator, or the
//! host must be the token service of an upstream. Everything else is rejected, because the cache would be an open
//! proxy otherwise.

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::header::CONNECTION;
use http::uri::Authority;
use http::{HeaderValue, Request, Response, Version};
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::acceptor::{Connection, INTERCEPTED_SESSIONS_MAX};
use super::access_log::AccessLogEntry;
use super::access_log::AccessLogFields;
use super::auth::{CredentialHeader, PeerCredentials};
use super::connections::InFlight;
use super::routing::{ConnectionInfo, RouteKind, canonical_host};
use super::tls::Handshake;
use super::tls::client_cert;
use super::{Body, ServingState, response};
use super::{error::Rejection, request};
use crate::config::{TunnelRule, host_part};
use crate::telemetry::{self, CacheResult, LastAgent, ResourceKind};
use crate::trace_context::TraceId;
use crate::upstream::Stream;
use crate::upstream::TunnelDialer;
use crate::upstream::ip_scope::IpScope;

/// Buffer of each direction of a tunnel.
const BUFFER_BYTES: usize = 16 * 1024;

/// Shutdown does not drain tunnels. They get this time for bytes under way.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// Tunnel rules of the operator, and the dialer for tunnels.
pub struct TunnelRules {
    allowed: Vec<TunnelRule>,
    dialer: TunnelDialer,
}

impl TunnelRules {
    /// Allows the targets of `allowed` and connects by `dialer`.
    pub fn new(allowed: Vec<TunnelRule>, dialer: TunnelDialer) -> Self {
        Self { allowed, dialer }
    }

    /// The narrowest IP scope that the rules allow for this host. `None` if no rule matches. An exact host rule
    /// may reach any address; a glob rule may not reach loopback or link-local addresses.
    fn narrowest_scope(&self, host: &str, port: u16) -> Option<IpScope> {
        let rules = self.allowed.iter().filter(|rule| rule.allows(host, port));
        rules
            .map(|rule| {
                if rule.is_exact() {
                    IpScope::LinkLocal
                } else {
                    IpScope::Private
                }
            })
            .max()
    }
}

/// Target of a `CONNECT`.
enum ConnectTarget {
    /// Intercepted.
    Intercept(InterceptedSession, Arc<crate::proxy::UpstreamRegistry>),
    /// Tunnelled without reading.
    Tunnel(Box<dyn Stream>, TunnelPermit),
}

/// An intercepted TLS session.
struct InterceptedSession {
    /// The upstream's canonical host.
    name: Arc<str>,
    /// The credentials of the connection.
    credentials: PeerCredentials,
    permit: OwnedSemaphorePermit,
}

/// Permit for one tunnel. Fields drop in order: the permit is released before the gauge is decremented, so an
/// observer of the gauge can always acquire.
struct TunnelPermit {
    _permit: OwnedSemaphorePermit,
    counted: telemetry::TunnelCounter,
    _request: InFlight,
}

impl Connection {
    /// Responds to a `CONNECT`, then serves the upgraded connection in a task.
    pub(super) async fn connect(self: Arc<Self>, mut request: Request<Incoming>) -> Response<Body> {
        let began = tokio::time::Instant::now();
        let upgrade = hyper::upgrade::on(&mut request);
        let (head, _) = request.into_parts();
        let target = head.uri.authority().map_or("", Authority::as_str).to_owned();
        let service = self.acceptor.service();
        let trace = service.telemetry.trace(&head.headers);
        let mut record = AccessLogEntry::new(
            &service.telemetry,
            &head,
            &self.peer,
            (service.clock.now(), began, &trace),
        );
        record.set_route(None, RouteKind::Connect);
        record.set_subject(ResourceKind::Connect, Some(target.clone()));
        let registry = service.registry.load_full();
        let target_kind = self.resolve_target(&head, &registry).await;
        let (response, fields) = match target_kind {
            Ok(ConnectTarget::Intercept(session, upstream_registry)) => {
                record.set_route(Some(&upstream_registry), RouteKind::Connect);
                registry.proxy.prefetch_challenge(&upstream_registry);
                let intercepted = Arc::clone(&self).serve_intercepted(session, upgrade);
                self.tasks.spawn(intercepted);
                let fields = AccessLogFields::connected(CacheResult::Local, "intercepted");
                (Response::new(Body::empty()), fields)
            }
            Ok(ConnectTarget::Tunnel(stream, permit)) => {
                let carried = TunnelLog {
                    target,
                    began,
                    trace_id: trace.id(),
                };
                let tunnelled = Arc::clone(&self).run_tunnel(stream, permit, upgrade, carried);
                self.tasks.spawn(tunnelled);
                let fields = AccessLogFields::connected(CacheResult::Forwarded, "tunnelled");
                (Response::new(Body::empty()), fields)
            }
            Err(error) => {
                let fields = AccessLogFields::rejected(error.name());
                let mut response = response::request_error(&error, &head.method);
                // The following bytes may be meant for the tunnel, so they must not be parsed as a request.
                if head.version < Version::HTTP_2 {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                (response, fields)
            }
        };
        record.attach_to(fields, &head.method, response)
    }

    async fn resolve_target(
        &self,
        head: &http::request::Parts,
        registry: &Arc<ServingState>,
    ) -> Result<ConnectTarget, Rejection> {
        if !self.peer.http_allowed {
            return Err(Rejection::PlainHttp);
        }
        let mut credentials = self.peer.credentials.clone();
        if let Some(auth) = &registry.auth {
            let now = self.acceptor.service().clock.now();
            let who = auth
                .authenticate(head, &self.peer, CredentialHeader::ProxyAuthorization, now)
                .await?;
            credentials.user = who.user();
        }
        // RFC 9110 §9.3.6: the target is a host and a port.
        let target = head.uri.authority().cloned().ok_or(Rejection::InvalidHost)?;
        let name = canonical_host(&target, true)
            .ok_or(Rejection::InvalidHost)?
            .into_owned();
        let port = target.port_u16().ok_or(Rejection::InvalidHost)?;
        if let Some(host) = request::host_header(head)?
            && canonical_host(&host, true).ok_or(Rejection::InvalidHost)? != name
        {
            return Err(Rejection::Misdirected);
        }
        if self.peer.connect.is_some() {
            return Err(Rejection::TunnelNotAllowed(name));
        }
        if let Some(upstream_registry) = registry.router.by_host(&name) {
            match self.acceptor.tls().leaf(host_part(&name)) {
                Ok(_) => {
                    let permit = Arc::clone(&self.sessions).try_acquire_owned();
                    let session = InterceptedSession {
                        name: name.into(),
                        credentials,
                        permit: permit.map_err(|_| Rejection::TooManySessions(INTERCEPTED_SESSIONS_MAX))?,
                    };
                    return Ok(ConnectTarget::Intercept(session, Arc::clone(upstream_registry)));
                }
                Err(error) if registry.router.by_name(&name).is_some() => {
                    return Err(Rejection::NoCertificate(error.to_string()));
                }
                // If name constraints forbid the host of a token service, tunnel to it, as without `local_tokens`.
                Err(_) => {}
            }
        }
        let host = host_part(&name);
        let nearest = match registry.tunnels.narrowest_scope(host, port) {
            Some(nearest) => nearest,
            None => token_service(registry, host, port)
                .await
                .ok_or_else(|| Rejection::TunnelNotAllowed(target.to_string()))?,
        };
        let permit = Arc::clone(self.acceptor.tunnels()).try_acquire_owned();
        let permit = TunnelPermit {
            _permit: permit.map_err(|_| Rejection::TooManyTunnels)?,
            counted: self.acceptor.service().telemetry.count_tunnel(),
            _request: self.peer.connection.request(),
        };
        let stream = registry.tunnels.dialer.open(host, port, nearest).await;
        let stream = stream.map_err(|cause| Rejection::TunnelFailed(target.to_string(), cause))?;
        Ok(ConnectTarget::Tunnel(stream, permit))
    }

    /// Boxed, because the inner connection may create this future again.
    fn serve_intercepted(
        self: Arc<Self>,
        session: InterceptedSession,
        upgrade: OnUpgrade,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let InterceptedSession {
                name,
                credentials,
                permit: _permit,
            } = session;
            let Ok(upgraded) = upgrade.await else { return };
            let (tls, limit) = (self.acceptor.tls(), self.acceptor.limits().handshake_timeout);
            let unsent = self.acceptor.service().egress.unsent(self.peer.address);
            let handshaking = tls.accept_for_host(host_part(&name), TokioIo::new(upgraded), unsent);
            let Handshake {
                stream,
                server_name,
                certificate,
            } = match tokio::select! {
                handshake = timeout(limit, handshaking) => handshake,
                () = self.peer.connection.closing() => return,
            } {
                Ok(Ok(handshake)) => handshake,
                Ok(Err(error)) => {
                    if let Some(why) = client_cert::rejection_reason(&error) {
                        tracing::warn!(host = &*name, why, "client certificate rejected");
                        return;
                    }
                    tracing::info!(host = &*name, %error,
                        "TLS handshake inside CONNECT failed, does the client trust ca.pem?");
                    return;
                }
                Err(_) => return,
            };
            let inner = Arc::new(Self {
                acceptor: self.acceptor.clone(),
                peer: ConnectionInfo {
                    address: self.peer.address,
                    http_allowed: true,
                    is_tls: true,
                    server_name,
                    connect: Some(name),
                    credentials: PeerCredentials {
                        certificate: certificate.or(credentials.certificate),
                        user: credentials.user,
                    },
                    idle_pause: self.peer.idle_pause.clone(),
                    connection: self.peer.connection.clone(),
                    sendfile: None,
                    agent: LastAgent::default(),
                },
                permit: Arc::clone(&self.permit),
                sessions: Arc::clone(&self.sessions),
                tasks: self.tasks.clone(),
            });
            if let Err(error) = inner.serve_http(stream).await {
                tracing::debug!(%error, "connection inside CONNECT failed");
            }
        })
    }

    async fn run_tunnel(
        self: Arc<Self>,
        stream: Box<dyn Stream>,
        permit: TunnelPermit,
        upgrade: OnUpgrade,
        tunnel: TunnelLog,
    ) {
        let Ok(upgraded) = upgrade.await else { return };
        let quiet_max = self.acceptor.limits().idle_timeout;
        let carried = relay(TokioIo::new(upgraded), stream, &permit.counted, quiet_max);
        let ending = self.acceptor.ending();
        let ended = async {
            ending.cancelled().await;
            tokio::time::sleep(SHUTDOWN_GRACE).await;
        };
        let ended = tokio::select! {
            ended = carried => ended,
            () = ended => "shutdown",
        };
        tunnel.log(self.peer.address, &permit.counted, ended);
    }
}

/// The narrowest IP scope for a tunnel to an upstream's token service: that of the upstream itself. `None` if
/// the host is not a token service.
async fn token_service(registry: &Arc<ServingState>, host: &str, port: u16) -> Option<IpScope> {
    for upstream_registry in registry.router.all() {
        if registry.proxy.is_token_realm(upstream_registry, host, port).await {
            return Some(upstream_registry.upstream().narrowest_scope());
        }
    }
    None
}

/// Log record of a tunnel, written when it has ended.
struct TunnelLog {
    target: String,
    began: tokio::time::Instant,
    trace_id: TraceId,
}

impl TunnelLog {
    fn log(&self, client: Option<IpAddr>, counted: &telemetry::TunnelCounter, ended: &'static str) {
        let (to_host, to_client) = counted.carried();
        let (client, ms) = (
            client.map(tracing::field::display),
            self.began.elapsed().as_millis(),
        );
        tracing::info!(host = self.target, client, to_host, to_client, ms, ended, trace_id = %self.trace_id,
            "tunnel closed");
    }
}

/// Copies bytes in both directions until both have ended or nothing moves for `quiet_max`. Returns which it was.
async fn relay(
    client: TokioIo<Upgraded>,
    host: Box<dyn Stream>,
    counted: &telemetry::TunnelCounter,
    quiet_max: Duration,
) -> &'static str {
    let (from_client, to_client) = tokio::io::split(client);
    let (from_host, to_host) = tokio::io::split(host);
    let moved = tokio::sync::Notify::new();
    let out = relay_one_way(from_client, to_host, &moved, |bytes| counted.to_host(bytes));
    let back = relay_one_way(from_host, to_client, &moved, |bytes| counted.to_client(bytes));
    let both = async { tokio::join!(out, back) };
    let quiet = async { while timeout(quiet_max, moved.notified()).await.is_ok() {} };
    tokio::select! {
        _ = both => "complete",
        () = quiet => "idle",
    }
}

async fn relay_one_way(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    moved: &tokio::sync::Notify,
    count: impl Fn(u64),
) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let read = from.read(&mut buffer).await?;
        moved.notify_one();
        if read == 0 {
            return to.shutdown().await;
        }
        // Counted before they are sent, so that a client with its response finds the bytes counted.
        count(read as u64);
        to.write_all(buffer.get(..read).unwrap_or_default()).await?;
        to.flush().await?;
    }
}
