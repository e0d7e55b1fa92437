//! Connections: who may come, in which protocol, and for how long.

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

use super::certificate;
use super::connections::{Bounds, Connections, Entering, Handle, Refused, Slot, Wait};
use super::door::Peer;
use super::entry::Shown;
use super::idle::{Pardon, Watched};
use super::listen::{From, Listener, Wire};
use super::tls::{ServerTls, Shaken};
use super::{Body, Front};
use crate::config::{Limits, PlainHttp};
use crate::store::LogLimit;

/// A failed `accept` (out of descriptors, mostly) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

const HEADER_BYTES_MAX: usize = 64 * 1024;
const H2_HEADER_LIST_BYTES_MAX: u32 = 16 * 1024;

/// An h2 stream is given its next chunk when less than this of the last one is unsent.
const H2_SEND_BYTES_MAX: usize = 64 * 1024;

/// A client may have this much of its uploads in our memory on one h2 connection: 64 MiB on the 256 connections of an
/// address. Enough for 250 MB/s at 1 ms.
const H2_RECEIVED_BYTES_MAX: u32 = 256 * 1024;

pub(super) type Ended = Result<(), Box<dyn Error + Send + Sync>>;

/// What a listener needs.
#[derive(Clone)]
pub struct Accepting(Arc<Inner>);

struct Inner {
    front: Front,
    /// The certificate now in effect.
    tls: Arc<ArcSwap<ServerTls>>,
    plain_http: PlainHttp,
    limits: Limits,
    /// Set when the process is to end.
    ending: CancellationToken,
    tunnels: Arc<Semaphore>,
    connections: Connections,
    refused: LogLimit,
}

impl Accepting {
    /// Nobody connected yet. `plain`: who may speak without TLS; `ending`: set when the process is to end.
    pub fn new(
        front: Front,
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
            connections: Connections::new("registry", bounds, front.telemetry.clone()),
            front,
            tls,
            plain_http,
            limits,
            ending,
            tunnels: Arc::new(Semaphore::new(limits.tunnels_max)),
            refused: LogLimit::default(),
        }))
    }

    /// Accepts until the process ends, then waits for what is under way.
    pub async fn run(self, listener: Listener) {
        let tasks = TaskTracker::new();
        while let Some((wire, entering)) = self.next(&listener).await {
            match entering {
                Entering::Seated(seat) => {
                    // No further connection is accepted until there is a place for this one.
                    let slot = tokio::select! {
                        () = self.0.ending.cancelled() => break,
                        slot = self.0.connections.place(seat) => slot,
                    };
                    let serving = self.clone().serve(wire, slot, tasks.clone());
                    tasks.spawn(serving);
                }
                Entering::Waits(wait) => {
                    let waiting = self.clone().wait(wire, wait, tasks.clone());
                    tasks.spawn(waiting);
                }
                Entering::Refused(refused) => self.refuse(wire.peer(), refused),
            }
        }
        drop(listener);
        tasks.close();
        let drain = self.0.limits.drain;
        if timeout(drain, tasks.wait()).await.is_err() {
            tracing::warn!(
                "connections were still busy after {} s; they are cut",
                drain.as_secs()
            );
        }
    }

    /// The next connection; `None` when the process is to end.
    async fn next(&self, listener: &Listener) -> Option<(Wire, Entering)> {
        loop {
            let accepted = tokio::select! {
                () = self.0.ending.cancelled() => return None,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(wire) => {
                    let entering = self.0.connections.enter(wire.peer().ip());
                    return Some((wire, entering));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    self.0.connections.accept_failed(&error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// A connection whose address has as many as it may.
    async fn wait(self, wire: Wire, wait: Wait, tasks: TaskTracker) {
        let slot = tokio::select! {
            () = self.0.ending.cancelled() => return,
            slot = wait.slot(self.0.limits.idle_timeout) => slot,
        };
        match slot {
            Some(slot) => self.serve(wire, slot, tasks).await,
            None => self.refuse(wire.peer(), Refused::Address),
        }
    }

    fn refuse(&self, peer: From, refused: Refused) {
        self.0.front.telemetry.record_connection_refused();
        if let Some(skipped) = self.0.refused.admits() {
            let (connections, reason) = (self.0.limits.connections_per_peer_max, refused.name());
            tracing::warn!(%peer, connections, reason, skipped,
                "a connection was closed, for its address has too many; raise limits.connections_per_peer_max, or let \
                 the balancer in front send the PROXY protocol");
        }
    }

    /// Serves a connection until it ends. Its stages are on the heap one by one: in one future, the largest of them would
    /// take 17 KiB for as long as the connection lasts.
    async fn serve(self, mut wire: Wire, slot: Slot, tasks: TaskTracker) {
        let accepted_from = wire.peer();
        if self.in_time(&slot.handle(), wire.announced()).await.is_none() {
            return;
        }
        let slot = match wire.peer().ip() {
            // The client behind a balancer, not the balancer, is what connections are counted by.
            Some(client) if accepted_from.ip() != Some(client) => {
                let announced = tokio::select! {
                    () = self.0.ending.cancelled() => return,
                    announced = Box::pin(slot.announced(client, self.0.limits.idle_timeout)) => announced,
                };
                match announced {
                    Ok(slot) => slot,
                    Err(refused) => return self.refuse(wire.peer(), refused),
                }
            }
            _ => slot,
        };
        let Some(Some(is_tls)) = self.in_time(&slot.handle(), wire.first_byte_is_tls()).await else {
            return;
        };
        let peer = wire.peer();
        if let Err(error) = Box::pin(self.speak(wire, is_tls, slot, tasks)).await {
            tracing::debug!(%peer, %error, "a connection ended badly");
        }
    }

    /// What a connection says before its first byte of HTTP or TLS. `None` if it does not come in time, or its place was
    /// needed.
    async fn in_time<T>(&self, handle: &Handle, said: impl Future<Output = io::Result<T>>) -> Option<T> {
        tokio::select! {
            () = self.0.ending.cancelled() => None,
            () = handle.closing() => None,
            said = timeout(self.0.limits.header_timeout, said) => match said {
                Ok(Ok(said)) => Some(said),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a connection ended before its first request");
                    None
                }
                Err(_) => None,
            },
        }
    }

    async fn speak(&self, wire: Wire, is_tls: bool, slot: Slot, tasks: TaskTracker) -> Ended {
        let limits = self.0.limits;
        let (peer, handle) = (wire.peer(), slot.handle());
        let held = Held(slot);
        let (patience, pardon) = (limits.write_timeout.max(limits.idle_timeout), Pardon::default());
        if is_tls {
            let tls = self.tls();
            let shaken = tokio::select! {
                () = handle.closing() => return Ok(()),
                shaken = timeout(limits.handshake_timeout, Box::pin(tls.accept(wire))) => shaken?,
            };
            if let Some(why) = shaken.as_ref().err().and_then(certificate::refused) {
                tracing::warn!(%peer, why, "a client certificate was refused");
            }
            let Shaken {
                stream,
                server_name,
                certificate,
            } = shaken?;
            let peer = Peer {
                address: peer.ip(),
                may_speak: true,
                secure: true,
                server_name,
                connect: None,
                shown: Shown {
                    certificate,
                    user: None,
                },
                pardon: pardon.clone(),
                connection: handle.clone(),
            };
            let connection = self.connection(peer, held, tasks);
            let stream = Watched::new(stream, patience, pardon).of(handle);
            Box::pin(connection.speak(stream)).await
        } else {
            let may_speak = match self.0.plain_http {
                PlainHttp::Loopback => peer.is_local(),
                PlainHttp::Any => true,
                PlainHttp::Off => false,
            };
            let peer = Peer {
                address: peer.ip(),
                may_speak,
                secure: false,
                server_name: None,
                connect: None,
                shown: Shown::default(),
                pardon: pardon.clone(),
                connection: handle.clone(),
            };
            let connection = self.connection(peer, held, tasks);
            let stream = Watched::new(wire, patience, pardon).of(handle);
            Box::pin(connection.speak(stream)).await
        }
    }

    fn connection(&self, peer: Peer, held: Held, tasks: TaskTracker) -> Arc<Connection> {
        Arc::new(Connection {
            accepting: self.clone(),
            peer,
            held: Arc::new(held),
            tasks,
        })
    }

    /// The certificate now in effect.
    pub(super) fn tls(&self) -> Arc<ServerTls> {
        self.0.tls.load_full()
    }

    /// Who answers.
    pub(super) fn front(&self) -> &Front {
        &self.0.front
    }

    /// The limits.
    pub(super) fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Set when the process is to end.
    pub(super) fn ending(&self) -> &CancellationToken {
        &self.0.ending
    }

    /// The places for tunnels.
    pub(super) fn tunnels(&self) -> &Arc<Semaphore> {
        &self.0.tunnels
    }

    fn protocol(&self) -> Builder<TokioExecutor> {
        let limits = &self.0.limits;
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
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
}

/// What is held until a connection ends, and with it all that came to be within it.
pub(super) struct Held(#[expect(dead_code, reason = "held for its end")] Slot);

/// A connection, or what a client speaks within its tunnel.
pub(super) struct Connection {
    pub(super) accepting: Accepting,
    pub(super) peer: Peer,
    pub(super) held: Arc<Held>,
    /// Waited for when the process ends.
    pub(super) tasks: TaskTracker,
}

impl Connection {
    /// Answers its requests until it ends.
    pub(super) async fn speak<S>(self: Arc<Self>, stream: S) -> Ended
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let builder = self.accepting.protocol();
        let (ending, handle) = (self.accepting.ending().clone(), self.peer.connection.clone());
        let service = service_fn(move |request| {
            let connection = Arc::clone(&self);
            // On the heap, to be freed at the head: in place, its 8 KiB would stay with each stream until the end of the
            // body.
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
            self.accepting.0.front.answer(request, &self.peer).await
        }
    }
}
