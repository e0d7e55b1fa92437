//! Listeners: who may connect, in which protocol, and for how long.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Front;
use super::gate::Peer;
use super::idle::Watched;
use super::tls::ServerTls;
use crate::config::{Limits, Plain};

/// The first byte of a TLS record that opens a handshake; no HTTP method begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// A failed `accept` (out of descriptors, mostly) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

const HEADER_BYTES_MAX: usize = 64 * 1024;
const H2_HEADER_LIST_BYTES_MAX: u32 = 16 * 1024;

/// A peer is sent this much of one answer at a time over h2 before it must make room.
const H2_SEND_BYTES_MAX: usize = 1024 * 1024;

/// What a listener needs.
#[derive(Clone)]
pub struct Accepting {
    /// Who answers.
    pub front: Front,
    /// The certificate now in effect.
    pub tls: Arc<ArcSwap<ServerTls>>,
    /// Who may speak without TLS.
    pub plain: Plain,
    /// The limits.
    pub limits: Limits,
    /// Set when the process is to end.
    pub ending: CancellationToken,
    places: Arc<Semaphore>,
    peers: Peers,
}

impl Accepting {
    /// Nobody connected yet.
    pub fn new(
        front: Front,
        tls: Arc<ArcSwap<ServerTls>>,
        plain: Plain,
        limits: Limits,
        ending: CancellationToken,
    ) -> Self {
        let places = Arc::new(Semaphore::new(limits.connections_max));
        Self {
            front,
            tls,
            plain,
            limits,
            ending,
            places,
            peers: Peers::default(),
        }
    }

    /// Accepts until the process ends, then waits for what is under way.
    pub async fn run(self, listener: TcpListener) {
        let graceful = Arc::new(GracefulShutdown::new());
        loop {
            let Some((stream, address, place)) = self.next(&listener).await else {
                break;
            };
            let Some(peer) = self
                .peers
                .enter(address.ip(), self.limits.connections_per_peer_max)
            else {
                tracing::debug!(%address, "too many connections from one peer");
                continue;
            };
            let watcher = graceful.watcher();
            let accepting = self.clone();
            tokio::spawn(async move {
                // Held until the connection ends.
                let _place = (place, peer);
                if let Err(error) = accepting.serve(stream, address, watcher).await {
                    tracing::debug!(%address, %error, "a connection ended badly");
                }
            });
        }
        drop(listener);
        let Some(graceful) = Arc::into_inner(graceful) else {
            return;
        };
        if timeout(self.limits.drain, graceful.shutdown()).await.is_err() {
            tracing::warn!(
                "connections were still busy after {:?}; they are cut",
                self.limits.drain
            );
        }
    }

    /// The next connection, once there is a place for it; `None` when the process is to end.
    async fn next(&self, listener: &TcpListener) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        loop {
            let place = tokio::select! {
                () = self.ending.cancelled() => return None,
                place = Arc::clone(&self.places).acquire_owned() => place.ok()?,
            };
            let accepted = tokio::select! {
                () = self.ending.cancelled() => return None,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => return Some((stream, address, place)),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn serve(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        watcher: hyper_util::server::graceful::Watcher,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        stream.set_nodelay(true)?;
        let mut first = [0];
        let read = timeout(self.limits.header_timeout, stream.peek(&mut first)).await??;
        if read == 0 {
            return Ok(());
        }
        let patience = self.limits.write_timeout.max(self.limits.idle_timeout);
        if first == [TLS_HANDSHAKE] {
            let tls = self.tls.load_full();
            let stream = timeout(self.limits.handshake_timeout, tls.accept(stream)).await??;
            self.speak(Watched::new(stream, patience), Peer { may_speak: true }, watcher)
                .await
        } else {
            let may_speak = match self.plain {
                Plain::Loopback => address.ip().to_canonical().is_loopback(),
                Plain::Any => true,
                Plain::Nobody => false,
            };
            self.speak(Watched::new(stream, patience), Peer { may_speak }, watcher)
                .await
        }
    }

    async fn speak<S>(
        &self,
        stream: S,
        peer: Peer,
        watcher: hyper_util::server::graceful::Watcher,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let front = self.front.clone();
        let service = service_fn(move |request| {
            let front = front.clone();
            async move { Ok::<_, Infallible>(front.answer(request, peer).await) }
        });
        let builder = self.protocol();
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        watcher.watch(connection).await
    }

    fn protocol(&self) -> Builder<TokioExecutor> {
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_timeout)
            .max_buf_size(HEADER_BYTES_MAX);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(self.limits.streams_per_connection_max)
            .max_header_list_size(H2_HEADER_LIST_BYTES_MAX)
            .max_send_buf_size(H2_SEND_BYTES_MAX)
            .keep_alive_interval(self.limits.idle_timeout / 2)
            .keep_alive_timeout(self.limits.idle_timeout / 2);
        builder
    }
}

/// How many connections each peer has.
#[derive(Clone, Default)]
struct Peers(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Peers {
    fn enter(&self, peer: IpAddr, connections_max: usize) -> Option<Entered> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(peer).or_default();
        if *count >= connections_max {
            return None;
        }
        *count += 1;
        Some(Entered {
            peers: self.clone(),
            peer,
        })
    }
}

struct Entered {
    peers: Peers,
    peer: IpAddr,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut counts = self.peers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.peer);
            }
        }
    }
}

/// Binds an address, saying which one could not be had.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot listen on {address}: {error}; is another process there?"),
        )
    })
}
