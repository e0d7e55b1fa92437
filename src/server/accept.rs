//! Connections: who may come, in which protocol, and for how long.

use std::collections::HashMap;
use std::convert::Infallible;
use std::error::Error;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::certificate;
use super::door::Peer;
use super::entry::Shown;
use super::idle::{Pardon, Watched};
use super::listen::{Listener, Wire};
use super::tls::{ServerTls, Shaken};
use super::{Body, Front};
use crate::config::{Limits, Plain};
use crate::store::LogLimit;

/// A failed `accept` (out of descriptors, mostly) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

const HEADER_BYTES_MAX: usize = 64 * 1024;
const H2_HEADER_LIST_BYTES_MAX: u32 = 16 * 1024;

/// A peer is sent this much of one answer at a time over h2 before it must make room.
const H2_SEND_BYTES_MAX: usize = 1024 * 1024;

pub(super) type Ended = Result<(), Box<dyn Error + Send + Sync>>;

/// What a listener needs.
#[derive(Clone)]
pub struct Accepting(Arc<Inner>);

struct Inner {
    front: Front,
    /// The certificate now in effect.
    tls: Arc<ArcSwap<ServerTls>>,
    plain: Plain,
    limits: Limits,
    /// Set when the process is to end.
    ending: CancellationToken,
    places: Arc<Semaphore>,
    tunnels: Arc<Semaphore>,
    peers: Peers,
    refused: LogLimit,
}

impl Accepting {
    /// Nobody connected yet. `plain`: who may speak without TLS; `ending`: set when the process is to end.
    pub fn new(
        front: Front,
        tls: Arc<ArcSwap<ServerTls>>,
        plain: Plain,
        limits: Limits,
        ending: CancellationToken,
    ) -> Self {
        Self(Arc::new(Inner {
            front,
            tls,
            plain,
            limits,
            ending,
            places: Arc::new(Semaphore::new(limits.connections_max)),
            tunnels: Arc::new(Semaphore::new(limits.tunnels_max)),
            peers: Peers::default(),
            refused: LogLimit::default(),
        }))
    }

    /// Accepts until the process ends, then waits for what is under way.
    pub async fn run(self, listener: Listener) {
        let connections = TaskTracker::new();
        while let Some((wire, place)) = self.next(&listener).await {
            let accepting = self.clone();
            let tasks = connections.clone();
            connections.spawn(async move {
                let peer = wire.peer();
                if let Err(error) = accepting.serve(wire, place, tasks).await {
                    tracing::debug!(%peer, %error, "a connection ended badly");
                }
            });
        }
        drop(listener);
        connections.close();
        let drain = self.0.limits.drain;
        if timeout(drain, connections.wait()).await.is_err() {
            tracing::warn!(
                "connections were still busy after {} s; they are cut",
                drain.as_secs()
            );
        }
    }

    /// The next connection, once there is a place for it; `None` when the process is to end.
    async fn next(&self, listener: &Listener) -> Option<(Wire, OwnedSemaphorePermit)> {
        loop {
            let place = tokio::select! {
                () = self.0.ending.cancelled() => return None,
                place = Arc::clone(&self.0.places).acquire_owned() => place.ok()?,
            };
            let accepted = tokio::select! {
                () = self.0.ending.cancelled() => return None,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(wire) => return Some((wire, place)),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn serve(&self, wire: Wire, place: OwnedSemaphorePermit, tasks: TaskTracker) -> Ended {
        let limits = self.0.limits;
        let (wire, is_tls) = tokio::select! {
            () = self.0.ending.cancelled() => return Ok(()),
            begun = timeout(limits.header_timeout, wire.begin()) => match begun?? {
                Some(begun) => begun,
                None => return Ok(()),
            }
        };
        let peer = wire.peer();
        let entering = self.0.peers.enter(peer.ip(), limits.connections_per_peer_max);
        let entered = tokio::select! {
            () = self.0.ending.cancelled() => return Ok(()),
            entered = timeout(limits.idle_timeout, entering) => entered.ok().flatten(),
        };
        let Some(entered) = entered else {
            self.0.front.events.connection_refused();
            if let Some(skipped) = self.0.refused.admits() {
                tracing::warn!(%peer, connections = limits.connections_per_peer_max, skipped,
                    "a connection was closed, for its address has too many; raise limits.connections_per_peer_max, or let \
                     the balancer in front send the PROXY protocol");
            }
            return Ok(());
        };
        let held = Held {
            _place: place,
            _entered: entered,
        };
        let (patience, pardon) = (limits.write_timeout.max(limits.idle_timeout), Pardon::default());
        if is_tls {
            let tls = self.tls();
            let shaken = timeout(limits.handshake_timeout, tls.accept(wire)).await?;
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
            };
            let connection = self.connection(peer, held, tasks);
            connection.speak(Watched::new(stream, patience, pardon)).await
        } else {
            let may_speak = match self.0.plain {
                Plain::Loopback => peer.is_local(),
                Plain::Any => true,
                Plain::Nobody => false,
            };
            let peer = Peer {
                address: peer.ip(),
                may_speak,
                secure: false,
                server_name: None,
                connect: None,
                shown: Shown::default(),
                pardon: pardon.clone(),
            };
            let connection = self.connection(peer, held, tasks);
            connection.speak(Watched::new(wire, patience, pardon)).await
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
            .keep_alive_interval(limits.idle_timeout / 2)
            .keep_alive_timeout(limits.idle_timeout / 2);
        builder
    }
}

/// What is held until a connection ends, and with it all that came to be within it.
pub(super) struct Held {
    _place: OwnedSemaphorePermit,
    _entered: Entered,
}

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
        let ending = self.accepting.ending().clone();
        let service = service_fn(move |request| {
            let connection = Arc::clone(&self);
            async move { Ok::<_, Infallible>(connection.answer(request).await) }
        });
        let mut serving = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
        tokio::select! {
            ended = serving.as_mut() => return ended,
            () = ending.cancelled() => serving.as_mut().graceful_shutdown(),
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

/// The connections of each peer.
#[derive(Clone, Default)]
struct Peers(Arc<Mutex<HashMap<IpAddr, Connections>>>);

struct Connections {
    places: Arc<Semaphore>,
    /// Those that have a place or wait for one.
    present: usize,
}

impl Peers {
    /// Waits for a place among `connections_max`. `None` if as many wait already: many clients may be behind one address,
    /// but each that waits takes a place from all. Those without an address come by a socket file, whose mode says who
    /// may.
    async fn enter(&self, peer: Option<IpAddr>, connections_max: usize) -> Option<Entered> {
        let Some(peer) = peer else {
            return Some(Entered::default());
        };
        let places = {
            let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let connections = peers.entry(peer).or_insert_with(|| Connections {
                places: Arc::new(Semaphore::new(connections_max)),
                present: 0,
            });
            if connections.present >= connections_max.saturating_mul(2) {
                return None;
            }
            connections.present += 1;
            Arc::clone(&connections.places)
        };
        let mut entered = Entered {
            of: Some((self.clone(), peer)),
            place: None,
        };
        entered.place = Some(places.acquire_owned().await.ok()?);
        Some(entered)
    }
}

/// A place among the connections of a peer, or the wait for one.
#[derive(Default)]
struct Entered {
    of: Option<(Peers, IpAddr)>,
    place: Option<OwnedSemaphorePermit>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let Some((peers, peer)) = self.of.take() else {
            return;
        };
        // Free before it is no longer counted.
        drop(self.place.take());
        let mut peers = peers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connections) = peers.get_mut(&peer) {
            connections.present -= 1;
            if connections.present == 0 {
                peers.remove(&peer);
            }
        }
    }
}
