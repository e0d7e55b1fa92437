//! What an operator sees and steers: health, metrics, the API under `/api/v1/`, and the page at `/` that is made from it.
//! On a listener of its own.
//!
//! * `guard`: who may come, and who may change something. * `routes`: which path is what, `metrics` one of them. * `reply`:
//!   how it is answered.
//! * `status`, `images`, `keeping`, `why`, `upstreams`, `transfers`, `events`, `work`, `archive`: one kind of thing each; `words`: the same
//!   words everywhere. * `page`: all of it for people. * `probe`, `client`: asking a running cache from the command line.
//!
//! The page and the command line know nothing that the API does not say. `openapi.json` describes it, and the tests hold
//! every answer against that.

mod archive;
pub mod client;
mod events;
mod guard;
mod images;
mod keeping;
mod metrics;
mod named;
mod notices;
mod page;
mod piped;
pub mod probe;
mod reply;
mod routes;
mod status;
mod transfers;
mod upkeep;
mod upstreams;
mod why;
pub mod words;
mod work;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use guard::{Guard, TokenError, token};

use crate::clock::Clock;
use crate::event::Events;
use crate::server::tls::ServerTls;
use crate::server::{Egress, Registry};
use crate::upstream::Offline;
use guard::Way;
use notices::Notices;
use work::Works;

const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Who watches decisions as they are made, at a time.
const WATCHERS_MAX: usize = 64;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 256;

/// How often the counts are noted for the plots.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);

/// Answers the operator. Cheap to clone.
#[derive(Clone)]
pub struct Admin(Arc<Inner>);

/// What the operator's side knows of the rest.
pub struct Surroundings {
    /// The registry now in effect.
    pub registry: Arc<ArcSwap<Registry>>,
    /// What was counted.
    pub events: Events,
    /// The budget of response bytes.
    pub egress: Egress,
    /// The time of day.
    pub clock: Clock,
    /// The switch that keeps every upstream from being asked.
    pub offline: Offline,
    /// Who may come.
    pub guard: Arc<Guard>,
    /// The certificates now in effect.
    pub tls: Arc<ArcSwap<ServerTls>>,
    /// The certificate that clients may have to trust, PEM; none where the operator brought one.
    pub ca: Option<PathBuf>,
    /// Where clients reach the registry.
    pub registry_addresses: Vec<SocketAddr>,
    /// Set when the process is to end.
    pub ending: CancellationToken,
}

/// Reached through [`Admin`].
pub struct Inner {
    surroundings: Surroundings,
    started_at: SystemTime,
    works: Works,
    notices: Notices,
    watchers: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    archives: Arc<Semaphore>,
}

impl std::ops::Deref for Admin {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl std::ops::Deref for Inner {
    type Target = Surroundings;

    fn deref(&self) -> &Surroundings {
        &self.surroundings
    }
}

impl Admin {
    /// Nothing asked yet.
    pub fn new(surroundings: Surroundings) -> Self {
        let started_at = surroundings.clock.now();
        Self(Arc::new(Inner {
            surroundings,
            started_at,
            works: Works::default(),
            notices: Notices::default(),
            watchers: Arc::new(Semaphore::new(WATCHERS_MAX)),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            archives: Arc::new(Semaphore::new(archive::ARCHIVES_MAX)),
        }))
    }

    /// Notes what was counted, for the plots, until the process ends.
    pub async fn sample(self) {
        loop {
            let fetched = self.registry.load().pull.downloads().fetched_bytes();
            self.events.sample(self.clock.now(), fetched);
            tokio::select! {
                () = self.ending.cancelled() => return,
                () = tokio::time::sleep(SAMPLE_EVERY) => {}
            }
        }
    }

    /// Serves a TCP listener until the process ends.
    pub async fn run(self, listener: TcpListener) {
        let is_loopback = listener
            .local_addr()
            .is_ok_and(|address| address.ip().is_loopback());
        let way = if is_loopback { Way::Loopback } else { Way::Network };
        loop {
            tokio::select! {
                () = self.ending.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.spawn(stream, way),
                    Err(error) => pause(&error).await,
                }
            }
        }
    }

    /// Serves a unix socket until the process ends.
    pub async fn run_unix(self, listener: UnixListener) {
        loop {
            tokio::select! {
                () = self.ending.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.spawn(stream, Way::Socket),
                    Err(error) => pause(&error).await,
                }
            }
        }
    }

    fn spawn<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, stream: S, way: Way) {
        let Ok(place) = Arc::clone(&self.connections).try_acquire_owned() else {
            tracing::warn!("too many admin connections; this one is closed");
            return;
        };
        let admin = self.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let admin = admin.clone();
            async move { Ok::<_, Infallible>(admin.answer(request, way).await) }
        });
        tokio::spawn(async move {
            let _place = place;
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an admin connection ended badly");
            }
        });
    }
}

async fn pause(error: &std::io::Error) {
    tracing::warn!(%error, "an admin connection could not be accepted");
    tokio::time::sleep(Duration::from_millis(50)).await;
}
