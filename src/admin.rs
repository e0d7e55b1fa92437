//! The admin side: health, metrics, the API under `/api/v1/` and the HTML page at `/`, on a listener of its own.
//!
//! * `listener`: the admin thread and its connections, bounded by `concurrency_limit`.
//! * `auth`: admin token, host check and CSRF protection, before any route. `router`: the routes. `extract`: query and
//!   body of a request. `response`: problem documents and what all responses have.
//! * `health`: `/healthz`, `/readyz` and `/metrics`, served independently of the main runtime.
//! * `metrics`, `status`, `transfers`, `images`, `explain`, `upstreams`, `events`, `pull_jobs`, `refreshes`, `pins`, `verdicts`,
//!   `offline`, `maintenance`, `archive`, `ca`: one group of endpoints each.
//! * `image_ref`: image names. `format`: values and decisions as text. `page`: the HTML page. `client`: the client
//!   used by the command line.
//!
//! The page and the command line use only data that the API returns. `openapi` generates the description of the API
//! from the handlers and their types, and tests validate every response against it.

mod archive;
mod auth;
mod ca;
pub mod client;
mod concurrency_limit;
mod events;
mod explain;
mod extract;
pub mod format;
mod health;
mod image_ref;
mod images;
mod listener;
mod maintenance;
mod metrics;
mod names;
mod offline;
mod openapi;
mod page;
mod pins;
mod pull_jobs;
mod records;
mod refreshes;
mod response;
mod router;
mod shared;
mod status;
mod transfers;
mod upstreams;
mod verdicts;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use auth::{AdminAuth, TokenError, token};
pub use listener::Listener;

use crate::clock::Clock;
use crate::server::tls::ServerTls;
use crate::server::{Egress, ServingState};
use crate::store::LogLimit;
use crate::telemetry::Telemetry;
use crate::upstream::Offline;
use concurrency_limit::ConcurrencyLimit;
use health::{BlockingReads, Heartbeat};
use pull_jobs::PullJobs;
use response::FlashMessages;

/// Bounds of concurrent connections. One address may use half of them, requests half, event streams a quarter.
const CONNECTIONS_MAX: usize = 256;
const CONNECTIONS_MIN: usize = 16;

/// Interval at which counters are sampled for the plots.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);

/// The admin service. Cheap to clone.
#[derive(Clone)]
pub struct Admin(Arc<Inner>);

/// Dependencies of the admin service.
pub struct AdminDeps {
    /// The current registry.
    pub registry: Arc<ArcSwap<ServingState>>,
    /// Counters, events and seen clients.
    pub telemetry: Telemetry,
    /// The memory budget of response bodies.
    pub egress: Egress,
    /// The wall clock.
    pub clock: Clock,
    /// The offline switch: while it is on, no upstream request is sent.
    pub offline: Offline,
    /// Authorization of admin requests.
    pub auth: Arc<AdminAuth>,
    /// The current TLS configuration.
    pub tls: Arc<ArcSwap<ServerTls>>,
    /// Path of the CA certificate (PEM) that clients have to trust. `None` if the operator configured a certificate.
    pub ca: Option<PathBuf>,
    /// Addresses of the registry listener.
    pub registry_addresses: Vec<SocketAddr>,
    /// Cancelled at shutdown.
    pub ending: CancellationToken,
    /// Maximum number of concurrent connections; see [`connections_max`].
    pub connections_max: usize,
}

/// Maximum number of concurrent admin connections, derived from the file descriptor limit.
pub fn connections_max(descriptors: usize) -> usize {
    (descriptors / 16).clamp(CONNECTIONS_MIN, CONNECTIONS_MAX)
}

/// State shared by all clones of [`Admin`].
pub struct Inner {
    deps: AdminDeps,
    started_at: SystemTime,
    pull_jobs: PullJobs,
    orders: images::Orders,
    flash: FlashMessages,
    watchers: ConcurrencyLimit,
    archive_permits: Arc<Semaphore>,
    refusal_log: LogLimit,
    worker_heartbeat: Heartbeat,
    blocking_reads: BlockingReads,
}

impl std::ops::Deref for Admin {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl std::ops::Deref for Inner {
    type Target = AdminDeps;

    fn deref(&self) -> &AdminDeps {
        &self.deps
    }
}

impl Admin {
    /// Creates the service.
    pub fn new(deps: AdminDeps) -> Self {
        let started_at = deps.clock.now();
        let connections_max = deps.connections_max;
        Self(Arc::new(Inner {
            deps,
            started_at,
            pull_jobs: PullJobs::default(),
            orders: images::Orders::default(),
            flash: FlashMessages::default(),
            watchers: ConcurrencyLimit::new(connections_max / 4, connections_max / 8),
            archive_permits: Arc::new(Semaphore::new(archive::ARCHIVES_MAX)),
            refusal_log: LogLimit::default(),
            worker_heartbeat: Heartbeat::new(Instant::now()),
            blocking_reads: BlockingReads::default(),
        }))
    }

    /// Samples the counters for the plots until shutdown.
    pub async fn sample(self) {
        loop {
            let fetched = self.registry.load().proxy.downloads().fetched_bytes();
            self.telemetry.sample_history(self.clock.now(), fetched);
            tokio::select! {
                () = self.ending.cancelled() => return,
                () = tokio::time::sleep(SAMPLE_EVERY) => {}
            }
        }
    }
}
