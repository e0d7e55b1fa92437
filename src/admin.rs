//! What an operator sees and steers: health, metrics, the API under `/api/v1/`, and the page at `/` that is made from it.
//! On a listener of its own.
//!
//! * `serving`: a thread of its own, connections, places. * `health`: what is answered whatever the rest waits for.
//! * `guard`: who may come, and who may change something. * `routes`: which path is what. * `reply`:
//!   how it is answered.
//! * `metrics`, `status`, `images`, `keeping`, `why`, `upstreams`, `transfers`, `telemetry`, `work`, `archive`: one kind of thing each; `words`: the same
//!   words everywhere. * `page`: all of it for people. * `probe`, `client`: asking a running cache from the command line.
//!
//! The page and the command line know nothing that the API does not say. `openapi.json` describes it, and the tests hold
//! every answer against that.

mod archive;
mod auth;
pub mod client;
mod concurrency_limit;
mod events;
mod explain;
pub mod format;
mod health;
mod image_ref;
mod images;
mod listener;
mod maintenance;
mod metrics;
mod page;
mod pull_jobs;
mod response;
mod router;
mod status;
mod upstreams;

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

/// Connections at a time, and where the process may open few files. Half of them is for one address, half for requests,
/// a quarter for event streams.
const CONNECTIONS_MAX: usize = 256;
const CONNECTIONS_MIN: usize = 16;

/// How often the counts are noted for the plots.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);

/// Answers the operator. Cheap to clone.
#[derive(Clone)]
pub struct Admin(Arc<Inner>);

/// What the operator's side knows of the rest.
pub struct AdminDeps {
    /// The registry now in effect.
    pub registry: Arc<ArcSwap<ServingState>>,
    /// What was counted.
    pub telemetry: Telemetry,
    /// The budget of response bytes.
    pub egress: Egress,
    /// The time of day.
    pub clock: Clock,
    /// The switch that keeps every upstream from being asked.
    pub offline: Offline,
    /// Who may come.
    pub auth: Arc<AdminAuth>,
    /// The certificates now in effect.
    pub tls: Arc<ArcSwap<ServerTls>>,
    /// The certificate that clients may have to trust, PEM; none where the operator brought one.
    pub ca: Option<PathBuf>,
    /// Where clients reach the registry.
    pub registry_addresses: Vec<SocketAddr>,
    /// Set when the process is to end.
    pub ending: CancellationToken,
    /// Connections at a time; see [`connections_max`].
    pub connections_max: usize,
}

/// Connections of the admin listener at a time in a process that may open so many files.
pub fn connections_max(descriptors: usize) -> usize {
    (descriptors / 16).clamp(CONNECTIONS_MIN, CONNECTIONS_MAX)
}

/// Reached through [`Admin`].
pub struct Inner {
    deps: AdminDeps,
    started_at: SystemTime,
    pull_jobs: PullJobs,
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
    /// Nothing asked yet.
    pub fn new(deps: AdminDeps) -> Self {
        let started_at = deps.clock.now();
        let connections_max = deps.connections_max;
        Self(Arc::new(Inner {
            deps,
            started_at,
            pull_jobs: PullJobs::default(),
            flash: FlashMessages::default(),
            watchers: ConcurrencyLimit::new(connections_max / 4, connections_max / 8),
            archive_permits: Arc::new(Semaphore::new(archive::ARCHIVES_MAX)),
            refusal_log: LogLimit::default(),
            worker_heartbeat: Heartbeat::new(Instant::now()),
            blocking_reads: BlockingReads::default(),
        }))
    }

    /// Notes what was counted, for the plots, until the process ends.
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
