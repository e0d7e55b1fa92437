//! Connection acceptor: admission, TLS handshake, HTTP/1.1 and HTTP/2, and draining at shutdown.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::auth::PeerCredentials;
use super::connections::{Bounds, Connections, Entering, Handle, Refused, Slot, Wait};
use super::http_version::{HttpVersion, Replayed, detect};
use super::idle_timeout::{IdlePause, IdleTimeoutStream};
use super::listener::{AcceptedStream, Listener, PeerAddr};
use super::routing::ConnectionInfo;
use super::sendfile::{SendfileQueue, SendfileStream};
use super::tls::client_cert;
use super::tls::{Handshake, ServerTls};
use super::{Body, RegistryService};
use crate::config::{Limits, PlainHttp};
use crate::store::LogLimit;
use crate::telemetry::LastAgent;

/// Pause after a failed `accept`, mostly for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

const HEADER_BYTES_MAX: usize = 64 * 1024;
const H2_HEADER_LIST_BYTES_MAX: u32 = 16 * 1024;

/// An HTTP/2 stream gets its next chunk when less than this of the previous one is unsent.
const H2_SEND_BYTES_MAX: usize = 64 * 1024;

/// Receive window: the upload bytes that one HTTP/2 connection may have in memory. That is 64 MiB on the 256
/// connections of an address, and enough for 250 MB/s at 1 ms.
const H2_RECEIVED_BYTES_MAX: u32 = 256 * 1024;

/// TLS sessions inside the `CONNECT` streams of one connection. Each may have as many streams and bytes in memory as a
/// connection of its own, and counts as none. Clients use HTTP/1.1 to a proxy, which allows one.
pub(super) const INTERCEPTED_SESSIONS_MAX: usize = 4;

pub(super) type ServeError = Box<dyn Error + Send + Sync>;
pub(super) type ServeResult = Result<(), ServeError>;

/// HTTP on a connection, until it ends. The stages before it have been freed.
type Serving = Pin<Box<dyn Future<Output = ServeResult> + Send>>;

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

    /// Serves a connection until it ends. Its stages are on the heap one by one, and each ends before the next one begins: in
    /// one future, the largest of them would take 17 KiB for as long as the connection lasts.
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
        let serving = Box::pin(self.begin_http(accepted, is_tls, slot, tasks)).await;
        let ended = match serving {
            Ok(Some(serving)) => serving.await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
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

    /// TLS handshake and detection of the HTTP version. `None` if the connection ended before them.
    async fn begin_http(
        &self,
        accepted: AcceptedStream,
        is_tls: bool,
        slot: Slot,
        tasks: TaskTracker,
    ) -> Result<Option<Serving>, ServeError> {
        let limits = self.0.limits;
        let (peer, handle) = (accepted.peer(), slot.handle());
        let permit = ConnectionPermit(slot);
        let (idle_timeout, idle_pause) = (
            limits.write_timeout.max(limits.idle_timeout),
            IdlePause::default(),
        );
        if is_tls {
            let tls = self.tls();
            let unsent = self.0.service.egress.unsent(peer.ip());
            // Below TLS, because up to 512 KiB are encrypted at once and count as sent with their last byte. A slow client may
            // take longer for them than the timeout.
            let stream =
                IdleTimeoutStream::new(accepted, idle_timeout, idle_pause.clone()).of(handle.clone());
            let handshake = Box::pin(tls.accept(stream, unsent));
            let handshake = tokio::select! {
                () = handle.closing() => return Ok(None),
                handshake = timeout(limits.handshake_timeout, handshake) => handshake?,
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
                idle_pause,
                connection: handle,
                sendfile: None,
                agent: LastAgent::default(),
            };
            let connection = self.connection(peer, permit, tasks);
            connection.begin_http(stream).await
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
                agent: LastAgent::default(),
            };
            let connection = self.connection(peer, permit, tasks);
            let stream = SendfileStream::new(accepted, queue);
            let stream = IdleTimeoutStream::new(stream, idle_timeout, idle_pause).of(handle);
            connection.begin_http(stream).await
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
            sessions: Arc::new(Semaphore::new(INTERCEPTED_SESSIONS_MAX)),
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

/// HTTP/1 with these limits.
pub(super) fn http1(limits: &Limits) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        // Frames are queued by reference; `sendfile` depends on it. Pipelined flushes would copy them.
        .writev(true)
        .pipeline_flush(false)
        // The buffer may grow beyond its limit in one read, so it does not limit the header.
        .max_header_size(HEADER_BYTES_MAX)
        .max_buf_size(HEADER_BYTES_MAX);
    builder
}

/// HTTP/2 with these limits.
fn http2(limits: &Limits) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
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
    /// Permits for the TLS sessions inside `CONNECT`.
    pub(super) sessions: Arc<Semaphore>,
    /// Tasks that shutdown waits for.
    pub(super) tasks: TaskTracker,
}

impl Connection {
    /// Serves HTTP requests until the connection ends.
    pub(super) async fn serve_http<S>(self: Arc<Self>, stream: S) -> ServeResult
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let serving = self.begin_http(stream).await?;
        match serving {
            Some(serving) => serving.await,
            None => Ok(()),
        }
    }

    /// Detects the HTTP version. `None` if the connection is to end before its first request.
    async fn begin_http<S>(self: Arc<Self>, stream: S) -> Result<Option<Serving>, ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (version, stream) = tokio::select! {
            () = self.acceptor.ending().cancelled() => return Ok(None),
            () = self.peer.connection.closing() => return Ok(None),
            detected = detect(stream, self.acceptor.limits().header_timeout) => detected?,
        };
        Ok(Some(match version {
            HttpVersion::Http1 => self.serve_http1(stream),
            HttpVersion::Http2 => self.serve_http2(stream),
        }))
    }

    fn serve_http1<S>(self: Arc<Self>, stream: Replayed<S>) -> Serving
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (acceptor, handle) = (self.acceptor.clone(), self.peer.connection.clone());
        let service = service_fn(move |request| Arc::clone(&self).call(request));
        let serving = http1(acceptor.limits())
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let shut_down = http1::UpgradeableConnection::graceful_shutdown;
        Box::pin(until_ended(Box::pin(serving), shut_down, acceptor, handle))
    }

    fn serve_http2<S>(self: Arc<Self>, stream: Replayed<S>) -> Serving
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (acceptor, handle) = (self.acceptor.clone(), self.peer.connection.clone());
        let service = service_fn(move |request| Arc::clone(&self).call(request));
        let serving = http2(acceptor.limits()).serve_connection(TokioIo::new(stream), service);
        let shut_down = http2::Connection::graceful_shutdown;
        Box::pin(until_ended(Box::pin(serving), shut_down, acceptor, handle))
    }

    /// The response to a request. On the heap, so that it is freed when the response head is sent. Inline, it would stay
    /// with each stream until the end of the body.
    fn call(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Pin<Box<impl Future<Output = Result<Response<Body>, Infallible>> + Send>> {
        // The future is copied to the heap for each request, so everything below that few requests need is boxed.
        Box::pin(self.answer(request))
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        Ok(if *request.method() == Method::CONNECT {
            Box::pin(self.connect(request)).await
        } else {
            self.acceptor.0.service.answer(request, &self.peer).await
        })
    }
}

/// Serves a connection until it ends. At shutdown, or if it is chosen to be closed, it accepts no further request. `serving`
/// is boxed, because an async function would hold it twice: as an argument and as a pinned value.
async fn until_ended<C, E>(
    mut serving: Pin<Box<C>>,
    shut_down: impl Fn(Pin<&mut C>),
    acceptor: Acceptor,
    handle: Handle,
) -> ServeResult
where
    C: Future<Output = Result<(), E>>,
    E: Into<ServeError>,
{
    tokio::select! {
        ended = serving.as_mut() => return ended.map_err(Into::into),
        () = acceptor.ending().cancelled() => shut_down(serving.as_mut()),
        () = handle.closing() => {
            shut_down(serving.as_mut());
            return match handle.ended(serving).await {
                Some(ended) => ended.map_err(Into::into),
                None => Ok(()),
            };
        }
    }
    serving.await.map_err(Into::into)
}
