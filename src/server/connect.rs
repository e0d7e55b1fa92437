//! `CONNECT`: what a client with `HTTPS_PROXY` sends before it speaks TLS with a registry.
//!
//! A configured upstream is intercepted: the client speaks TLS with us, under a certificate that our CA made for the
//! upstream's host, and what it asks is answered as through any other door. Other hosts are reached by a tunnel, unread,
//! if the operator names them, or if an upstream sends its clients there for a token. Everything else is refused, or this
//! would be an open proxy.

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

use super::accept::Connection;
use super::certificate;
use super::connections::InFlight;
use super::door::{Door, Peer, name_of};
use super::entry::{Shown, Way};
use super::gate::{self, Turned};
use super::record::Open;
use super::tls::Shaken;
use super::told::Told;
use super::{Body, Registry, reply};
use crate::config::{TunnelRule, host_part};
use crate::telemetry::{self, CacheResult, ResourceKind};
use crate::trace_context::TraceId;
use crate::upstream::Stream;
use crate::upstream::TunnelDialer;
use crate::upstream::ip_scope::IpScope;

/// How much of each direction of a tunnel is in memory.
const STEP_BYTES: usize = 16 * 1024;

/// A tunnel is not what is waited for when the process ends: what it carries goes on elsewhere.
const LAST_BYTES_WITHIN: Duration = Duration::from_secs(1);

/// Where tunnels may lead besides the upstreams' own token services, and how.
pub struct Tunnels {
    allowed: Vec<TunnelRule>,
    way: TunnelDialer,
}

impl Tunnels {
    /// To those of `allowed`, by `way`.
    pub fn new(allowed: Vec<TunnelRule>, way: TunnelDialer) -> Self {
        Self { allowed, way }
    }

    /// How near the operator lets a tunnel to this host lead; `None` if nowhere. Who names a host means it, wherever it
    /// is; who names many does not mean this machine.
    fn nearest(&self, host: &str, port: u16) -> Option<IpScope> {
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

/// What becomes of a `CONNECT`.
enum Passage {
    /// The client speaks with us; the upstream's host, as upstreams are named, and what the client has shown.
    Intercept(Arc<str>, Arc<crate::proxy::UpstreamRegistry>, Shown),
    /// Bytes go to and fro.
    Tunnel(Box<dyn Stream>, Place),
}

/// One of the places for tunnels. Free before it is counted as free: who sees one, finds one.
struct Place {
    _permit: OwnedSemaphorePermit,
    counted: telemetry::TunnelCounter,
    _request: InFlight,
}

impl Connection {
    /// Answers a `CONNECT`, and sees to what comes after.
    pub(super) async fn connect(self: Arc<Self>, mut request: Request<Incoming>) -> Response<Body> {
        let began = tokio::time::Instant::now();
        let upgrade = hyper::upgrade::on(&mut request);
        let (head, _) = request.into_parts();
        let target = head.uri.authority().map_or("", Authority::as_str).to_owned();
        let front = self.accepting.front();
        let trace = front.telemetry.trace(&head.headers);
        let mut record = Open::new(
            &front.telemetry,
            &head,
            &self.peer,
            (front.clock.now(), began, &trace),
        );
        record.leads_to(None, Door::Connect);
        record.asks_for((ResourceKind::Connect, target.clone()));
        let registry = front.registry.load_full();
        let way = self.way(&head, &registry).await;
        let (response, told) = match way {
            Ok(Passage::Intercept(name, upstream_registry, shown)) => {
                record.leads_to(Some(&upstream_registry), Door::Connect);
                registry.proxy.prefetch_challenge(&upstream_registry);
                let intercepted = Arc::clone(&self).intercepted(name, shown, upgrade);
                self.tasks.spawn(intercepted);
                let told = Told::connected(CacheResult::Local, "intercepted");
                (Response::new(Body::empty()), told)
            }
            Ok(Passage::Tunnel(stream, place)) => {
                let carried = Carried {
                    target,
                    began,
                    trace_id: trace.id(),
                };
                let tunnelled = Arc::clone(&self).tunnelled(stream, place, upgrade, carried);
                self.tasks.spawn(tunnelled);
                let told = Told::connected(CacheResult::Passed, "tunnelled");
                (Response::new(Body::empty()), told)
            }
            Err(turned) => {
                let told = Told::turned(turned.name());
                let mut response = reply::turned(&turned, &head.method);
                // What follows may be meant for the tunnel, and is not read as a request.
                if head.version < Version::HTTP_2 {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                (response, told)
            }
        };
        record.answered(told, &head.method, response)
    }

    async fn way(&self, head: &http::request::Parts, registry: &Arc<Registry>) -> Result<Passage, Turned> {
        if !self.peer.may_speak {
            return Err(Turned::Plain);
        }
        let mut shown = self.peer.shown.clone();
        if let Some(entry) = &registry.entry {
            let now = self.accepting.front().clock.now();
            let who = entry.who(head, &self.peer, Way::Connect, now).await?;
            shown.user = who.user();
        }
        // RFC 9110 §9.3.6: a host and a port, and nothing else.
        let target = head.uri.authority().cloned().ok_or(Turned::Host)?;
        let name = name_of(&target, true).ok_or(Turned::Host)?.into_owned();
        let port = target.port_u16().ok_or(Turned::Host)?;
        if let Some(host) = gate::host_line(head)?
            && name_of(&host, true).ok_or(Turned::Host)? != name
        {
            return Err(Turned::Misdirected);
        }
        if self.peer.connect.is_some() {
            return Err(Turned::NoTunnel(name));
        }
        if let Some(upstream_registry) = registry.doors.reached(&name) {
            match self.accepting.tls().leaf(host_part(&name)) {
                Ok(_) => {
                    return Ok(Passage::Intercept(
                        name.into(),
                        Arc::clone(upstream_registry),
                        shown,
                    ));
                }
                Err(error) if registry.doors.named(&name).is_some() => {
                    return Err(Turned::NoCertificate(error.to_string()));
                }
                // A token service that the CA does not vouch for is tunnelled to, as without `local_tokens`.
                Err(_) => {}
            }
        }
        let host = host_part(&name);
        let nearest = match registry.tunnels.nearest(host, port) {
            Some(nearest) => nearest,
            None => token_service(registry, host, port)
                .await
                .ok_or_else(|| Turned::NoTunnel(target.to_string()))?,
        };
        let place = Arc::clone(self.accepting.tunnels()).try_acquire_owned();
        let place = Place {
            _permit: place.map_err(|_| Turned::TunnelsBusy)?,
            counted: self.accepting.front().telemetry.count_tunnel(),
            _request: self.peer.connection.request(),
        };
        let stream = registry.tunnels.way.open(host, port, nearest).await;
        let stream = stream.map_err(|cause| Turned::TunnelFailed(target.to_string(), cause))?;
        Ok(Passage::Tunnel(stream, place))
    }

    /// Boxed, because what is spoken within may in its turn ask for such a future.
    fn intercepted(
        self: Arc<Self>,
        name: Arc<str>,
        shown: Shown,
        upgrade: OnUpgrade,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let Ok(upgraded) = upgrade.await else { return };
            let (tls, limit) = (self.accepting.tls(), self.accepting.limits().handshake_timeout);
            let shaking = tls.accept_as(host_part(&name), TokioIo::new(upgraded));
            let Shaken {
                stream,
                server_name,
                certificate,
            } = match tokio::select! {
                shaken = timeout(limit, shaking) => shaken,
                () = self.peer.connection.closing() => return,
            } {
                Ok(Ok(shaken)) => shaken,
                Ok(Err(error)) => {
                    if let Some(why) = certificate::refused(&error) {
                        tracing::warn!(host = &*name, why, "a client certificate was refused");
                        return;
                    }
                    tracing::info!(host = &*name, %error,
                        "a client asked for an upstream by CONNECT and then broke off; does it trust ca.pem?");
                    return;
                }
                Err(_) => return,
            };
            let inner = Arc::new(Self {
                accepting: self.accepting.clone(),
                peer: Peer {
                    address: self.peer.address,
                    may_speak: true,
                    secure: true,
                    server_name,
                    connect: Some(name),
                    shown: Shown {
                        certificate: certificate.or(shown.certificate),
                        user: shown.user,
                    },
                    pardon: self.peer.pardon.clone(),
                    connection: self.peer.connection.clone(),
                },
                held: Arc::clone(&self.held),
                tasks: self.tasks.clone(),
            });
            if let Err(error) = inner.speak(stream).await {
                tracing::debug!(%error, "a connection within a CONNECT ended badly");
            }
        })
    }

    async fn tunnelled(
        self: Arc<Self>,
        stream: Box<dyn Stream>,
        place: Place,
        upgrade: OnUpgrade,
        tunnel: Carried,
    ) {
        let Ok(upgraded) = upgrade.await else { return };
        let quiet_max = self.accepting.limits().idle_timeout;
        let carried = carry(TokioIo::new(upgraded), stream, &place.counted, quiet_max);
        let ending = self.accepting.ending();
        let ended = async {
            ending.cancelled().await;
            tokio::time::sleep(LAST_BYTES_WITHIN).await;
        };
        let ended = tokio::select! {
            ended = carried => ended,
            () = ended => "shutdown",
        };
        tunnel.log(self.peer.address, &place.counted, ended);
    }
}

/// How near a tunnel may lead to the host where an upstream sends clients for a token: no nearer than it is itself.
async fn token_service(registry: &Arc<Registry>, host: &str, port: u16) -> Option<IpScope> {
    for upstream_registry in registry.doors.all() {
        if registry.proxy.is_token_realm(upstream_registry, host, port).await {
            return Some(upstream_registry.upstream().innermost_scope());
        }
    }
    None
}

/// What is logged of a tunnel when it has ended.
struct Carried {
    target: String,
    began: tokio::time::Instant,
    trace_id: TraceId,
}

impl Carried {
    fn log(&self, client: Option<IpAddr>, counted: &telemetry::TunnelCounter, ended: &'static str) {
        let (to_host, to_client) = counted.carried();
        let (client, ms) = (
            client.map(tracing::field::display),
            self.began.elapsed().as_millis(),
        );
        tracing::info!(host = self.target, client, to_host, to_client, ms, ended, trace_id = %self.trace_id,
            "a tunnel has ended");
    }
}

/// Carries bytes both ways until both ends are through, or nothing moves for `quiet_max`. Says which it was.
async fn carry(
    client: TokioIo<Upgraded>,
    host: Box<dyn Stream>,
    counted: &telemetry::TunnelCounter,
    quiet_max: Duration,
) -> &'static str {
    let (from_client, to_client) = tokio::io::split(client);
    let (from_host, to_host) = tokio::io::split(host);
    let moved = tokio::sync::Notify::new();
    let out = one_way(from_client, to_host, &moved, |bytes| counted.to_host(bytes));
    let back = one_way(from_host, to_client, &moved, |bytes| counted.to_client(bytes));
    let both = async { tokio::join!(out, back) };
    let quiet = async { while timeout(quiet_max, moved.notified()).await.is_ok() {} };
    tokio::select! {
        _ = both => "complete",
        () = quiet => "idle",
    }
}

async fn one_way(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    moved: &tokio::sync::Notify,
    count: impl Fn(u64),
) -> std::io::Result<()> {
    let mut buffer = vec![0; STEP_BYTES];
    loop {
        let read = from.read(&mut buffer).await?;
        moved.notify_one();
        if read == 0 {
            return to.shutdown().await;
        }
        // Before they leave: who has its answer finds it counted.
        count(read as u64);
        to.write_all(buffer.get(..read).unwrap_or_default()).await?;
        to.flush().await?;
    }
}
