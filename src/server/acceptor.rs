//! Connection acceptor: admission, TLS handshake, HTTP/1.1 and HTTP/2, and draining at shutdown.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::auth::PeerCredentials;
use super::connections::{Bounds, Connections, Entering, Handle, Refused, Slot, Wait};
use super::idle_timeout::{IdlePause, IdleTimeoutStream};
use super::listener::{AcceptedStream, Listener, PeerAddr};
use super::routing::ConnectionInfo;
use super::sendfile::{SendfileQueue, SendfileStream};
use super::tls::client_cert;
use super::tls::{Handshake, ServerTls};
use super::{Body, RegistryService};
use crate::config::{Limits, PlainHttp};
use crate::store::LogLimit;

/// Pause after a failed `accept`, mostly for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

const HEADER_BYTES_MAX: usize = 64 * 1024;
const H2_HEADER_LIST_BYTES_MAX: u32 = 16 * 1024;

/// An HTTP/2 stream gets its next chunk when less than this of the previous one is unsent.
const H2_SEND_BYTES_MAX: usize = 64 * 1024;

/// Receive window: the upload bytes that one HTTP/2 connection may have in memory. That is 64 MiB on the 256
/// connections of an address, and enough for 250 MB/s at 1 ms.
const H2_RECEIVED_BYTES_MAX: u32 = 256 * 1024;

pub(super) type ServeResult = Result<(), Box<dyn Error + Send + Sync>>;

/// Accepts and serves the connections of a listener.
#[derive(Clone)]
pub struct Acceptor(Arc<Inner>);

struct Inner {
    service: RegistryService,
    /// The certificate now in effect.
    tls: Arc<ArcSwap<ServerTls>>,
    plain_http: PlainHttp,
    limits: Limits,
    /// Cancelled at shutdown.
    ending: CancellationToken,
    tunnels: Arc<Semaphore>,
    connections: Connections,
    refused: LogLimit,
}

impl Acceptor {
    /// An acceptor without connections. `plain`: which clients may use plain HTTP; `ending`: cancelled at shutdown.
    pub fn new(
        service: RegistryService,
        tls: Arc<ArcSwap<ServerTls>>,
        plain_http: PlainHttp,
        limits: Limits,
        ending: CancellationToken,
    ) -> Self {
        let bounds = Bounds {
            places: limits.connections_max,
            per_address: limits.connections_per_peer_max,
            waiting: limits.connections_waiting_max(),
            closes_at_address: false,
        };
        Self(Arc::new(Inner {
            connections: Connections::new("registry", bounds, service.telemetry.clone()),
            service,
            tls,
            plain_http,
            limits,
            ending,
            tunnels: Arc::new(Semaphore::new(limits.tunnels_max)),
            refused: LogLimit::default(),
        }))
    }

    /// Accepts until shutdown, then waits for open connections up to `drain`.
    pub async fn run(self, listener: Listener) {
        let tasks = TaskTracker::new();
        while let Some((accepted, entering)) = self.accept(&listener).await {
            match entering {
                Entering::Admitted(seat) => {
                    // Accepts no further connection until this one has a permit of the process.
                    let slot = tokio::select! {
                        () = self.0.ending.cancelled() => break,
                        slot = self.0.connections.place(seat) => slot,
                    };
                    let serving = self.clone().serve(accepted, slot, tasks.clone());
                    tasks.spawn(serving);
                }
                Entering::Waits(wait) => {
                    let waiting = self.clone().wait(accepted, wait, tasks.clone());
                    tasks.spawn(waiting);
                }
                Entering::Refused(refused) => self.log_refused(accepted.peer(), refused),
            }
        }
        drop(listener);
        tasks.close();
        let drain = self.0.limits.drain;
        if timeout(drain, tasks.wait()).await.is_err() {
            tracing::warn!(
                "closed connections that were still busy after {} s of draining",
                drain.as_secs()
            );
        }
    }

    /// The next connection. `None` at shutdown.
    async fn accept(&self, listener: &Listener) -> Option<(AcceptedStream, Entering)> {
        loop {
            let accepted = tokio::select! {
                () = self.0.ending.cancelled() => return None,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(accepted) => {
                    let entering = self.0.connections.enter(accepted.peer().ip());
                    return Some((accepted, entering));
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection");
                    self.0.connections.accept_failed(&error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Waits for a permit of the address, which has as many connections as allowed.
    async fn wait(self, accepted: AcceptedStream, wait: Wait, tasks: TaskTracker) {
        let slot = tokio::select! {
            () = self.0.ending.cancelled() => return,
            slot = wait.slot(self.0.limits.idle_timeout) => slot,
        };
        match slot {
            Some(slot) => self.serve(accepted, slot, tasks).await,
            None => self.log_refused(accepted.peer(), Refused::Address),
        }
    }

    fn log_refused(&self, peer: PeerAddr, refused: Refused) {
        self.0.service.telemetry.record_connection_refused();
        if let Some(skipped) = self.0.refused.admits() {
            let (connections, reason) = (self.0.limits.connections_per_peer_max, refused.name());
            tracing::warn!(%peer, connections, reason, skipped,
                "connection closed, too many from its address; raise limits.connections_per_peer_max, or enable \
                 the PROXY protocol on the load balancer");
        }
    }

    /// Serves a connection until it ends. Its stages are on the heap one by one: in one future, the largest of them would
    /// take 17 KiB for as long as the connection lasts.
    async fn serve(self, mut accepted: AcceptedStream, slot: Slot, tasks: TaskTracker) {
        let accepted_from = accepted.peer();
        if self
            .within_header_timeout(&slot.handle(), accepted.read_proxy_header())
            .await
            .is_none()
        {
            return;
        }
        let slot = match accepted.peer().ip() {
            // With the PROXY protocol, connections are counted by the client's address and not by the balancer's.
            Some(client) if accepted_from.ip() != Some(client) => {
                let announced = tokio::select! {
                    () = self.0.ending.cancelled() => return,
                    announced = Box::pin(slot.announced(client, self.0.limits.idle_timeout)) => announced,
                };
                match announced {
                    Ok(slot) => slot,
                    Err(refused) => return self.log_refused(accepted.peer(), refused),
                }
            }
            _ => slot,
        };
        let Some(Some(is_tls)) = self
            .within_header_timeout(&slot.handle(), accepted.first_byte_is_tls())
            .await
        else {
            return;
        };
        let peer = accepted.peer();
        if let Err(error) = Box::pin(self.serve_http(accepted, is_tls, slot, tasks)).await {
            tracing::debug!(%peer, %error, "connection failed");
        }
    }

    /// Awaits `said`, which a connection sends before HTTP or TLS. `None` after `header_timeout`, at shutdown, or if
    /// the connection is being closed to make room.
    async fn within_header_timeout<T>(
        &self,
        handle: &Handle,
        said: impl Future<Output = io::Result<T>>,
    ) -> Option<T> {
        tokio::select! {
            () = self.0.ending.cancelled() => None,
            () = handle.closing() => None,
            said = timeout(self.0.limits.header_timeout, said) => match said {
                Ok(Ok(said)) => Some(said),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "connection failed before its first request");
                    None
                }
                Err(_) => None,
            },
        }
    }

    async fn serve_http(
        &self,
        accepted: AcceptedStream,
        is_tls: bool,
        slot: Slot,
        tasks: TaskTracker,
    ) -> ServeResult {
        let limits = self.0.limits;
        let (peer, handle) = (accepted.peer(), slot.handle());
        let permit = ConnectionPermit(slot);
        let (idle_timeout, idle_pause) = (
            limits.write_timeout.max(limits.idle_timeout),
            IdlePause::default(),
        );
        if is_tls {
            let tls = self.tls();
            let handshake = tokio::select! {
                () = handle.closing() => return Ok(()),
                handshake = timeout(limits.handshake_timeout, Box::pin(tls.accept(accepted))) => handshake?,
            };
            if let Some(why) = handshake.as_ref().err().and_then(client_cert::rejection_reason) {
                tracing::warn!(%peer, why, "client certificate rejected");
            }
            let Handshake {
                stream,
                server_name,
                certificate,
            } = handshake?;
            let peer = ConnectionInfo {
                address: peer.ip(),
                http_allowed: true,
                is_tls: true,
                server_name,
                connect: None,
                credentials: PeerCredentials {
                    certificate,
                    user: None,
                },
                idle_pause: idle_pause.clone(),
                connection: handle.clone(),
                sendfile: None,
            };
            let connection = self.connection(peer, permit, tasks);
            let stream = IdleTimeoutStream::new(stream, idle_timeout, idle_pause).of(handle);
            Box::pin(connection.serve_http(stream)).await
        } else {
            let http_allowed = match self.0.plain_http {
                PlainHttp::Loopback => peer.is_local(),
                PlainHttp::Any => true,
                PlainHttp::Off => false,
            };
            let queue = SendfileQueue::default();
            let peer = ConnectionInfo {
                address: peer.ip(),
                http_allowed,
                is_tls: false,
                server_name: None,
                connect: None,
                credentials: PeerCredentials::default(),
                idle_pause: idle_pause.clone(),
                connection: handle.clone(),
                sendfile: Some(queue.clone()),
            };
            let connection = self.connection(peer, permit, tasks);
            let stream = SendfileStream::new(accepted, queue);
            let stream = IdleTimeoutStream::new(stream, idle_timeout, idle_pause).of(handle);
            Box::pin(connection.serve_http(stream)).await
        }
    }

    fn connection(
        &self,
        peer: ConnectionInfo,
        permit: ConnectionPermit,
        tasks: TaskTracker,
    ) -> Arc<Connection> {
        Arc::new(Connection {
            acceptor: self.clone(),
            peer,
            permit: Arc::new(permit),
            tasks,
        })
    }

    /// The certificate now in effect.
    pub(super) fn tls(&self) -> Arc<ServerTls> {
        self.0.tls.load_full()
    }

    /// The service that handles requests.
    pub(super) fn service(&self) -> &RegistryService {
        &self.0.service
    }

    /// The limits of connections and timeouts.
    pub(super) fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Cancelled at shutdown.
    pub(super) fn ending(&self) -> &CancellationToken {
        &self.0.ending
    }

    /// The permits for tunnels.
    pub(super) fn tunnels(&self) -> &Arc<Semaphore> {
        &self.0.tunnels
    }
}

/// HTTP/1 and HTTP/2 with these limits.
pub(super) fn protocol(limits: &Limits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        // Frames are queued by reference; `sendfile` depends on it. Pipelined flushes would copy them.
        .writev(true)
        .pipeline_flush(false)
        .max_buf_size(HEADER_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams_per_connection_max)
        .max_header_list_size(H2_HEADER_LIST_BYTES_MAX)
        .max_send_buf_size(H2_SEND_BYTES_MAX)
        .initial_stream_window_size(H2_RECEIVED_BYTES_MAX)
        .initial_connection_window_size(H2_RECEIVED_BYTES_MAX)
        .keep_alive_interval(limits.idle_timeout / 2)
        .keep_alive_timeout(limits.idle_timeout / 2);
    builder
}
/// Permit of a connection, shared with the TLS session inside its `CONNECT` and released when both have ended.
pub(super) struct ConnectionPermit(#[expect(dead_code, reason = "held for its end")] Slot);

/// A connection, or the TLS session inside an intercepted `CONNECT`.
pub(super) struct Connection {
    pub(super) acceptor: Acceptor,
    pub(super) peer: ConnectionInfo,
    pub(super) permit: Arc<ConnectionPermit>,
    /// Tasks that shutdown waits for.
    pub(super) tasks: TaskTracker,
}

impl Connection {
    /// Serves HTTP requests until the connection ends.
    pub(super) async fn serve_http<S>(self: Arc<Self>, stream: S) -> ServeResult
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let builder = protocol(self.acceptor.limits());
        let (ending, handle) = (self.acceptor.ending().clone(), self.peer.connection.clone());
        let service = service_fn(move |request| {
            let connection = Arc::clone(&self);
            // Boxed, so that it is freed when the response head is sent. Inline, its 8 KiB would stay with each
            // stream until the end of the body.
            let answer = Box::pin(connection.answer(request));
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let mut serving = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
        tokio::select! {
            ended = serving.as_mut() => return ended,
            () = ending.cancelled() => serving.as_mut().graceful_shutdown(),
            () = handle.closing() => {
                serving.as_mut().graceful_shutdown();
                return handle.ended(serving).await.unwrap_or(Ok(()));
            }
        }
        serving.await
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        if *request.method() == Method::CONNECT {
            self.connect(request).await
        } else {
            self.acceptor.0.service.answer(request, &self.peer).await
        }
    }
}
