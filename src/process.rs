//! Process lifecycle: startup, reload on SIGHUP, and graceful shutdown.

mod certificate_renewal;
mod registry;
mod signals;
mod systemd;

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::task::{JoinSet, block_in_place};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::admin::{self, Admin, AdminAuth, AdminDeps, TokenError};
use crate::bucket::BucketSettingsError;
use crate::clock::Clock;
use crate::config::{self, Config, Diagnostics, Limits};
use crate::download::{Downloads, ParallelLimits};
use crate::oci::digest::hmac_sha256;
use crate::server::acceptor::Acceptor;
use crate::server::listener::{InheritedSockets, Listener, SocketFile, bind, bind_unix, listeners};
use crate::server::tls::{ServerTls, TlsError};
use crate::server::{Egress, RegistryService, VerifiedBlobs};
use crate::shared::SharedStorage;
use crate::store::file_read::BufferPool;
use crate::store::fs::DirectoryFs;
use crate::store::{Limits as StoreLimits, OpenError, Settings as StoreSettings, Store};
use crate::telemetry::Telemetry;
use crate::terminal;
use crate::upstream::{Offline, OriginError, SettingsError};
pub use registry::upstream;
use registry::{ServedRepositories, SharedState, UpstreamContext, registry, shared_storage};
use signals::{Signal, Signals};

/// How long shutdown waits for downloads that have no readers.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval of store maintenance, and how many runs pass between two cleanups.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(5);
const TIDY_EVERY_RUNS: u32 = 60;

/// Error that prevents or ends serving.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// An operating system call failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The data folder cannot be used.
    #[error("{0}")]
    Store(#[from] OpenError),
    /// The certificate cannot be used.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// An upstream has invalid settings.
    #[error("upstream {name}: {error}")]
    Upstream {
        /// The upstream.
        name: Arc<str>,
        /// The reason.
        error: SettingsError,
    },
    /// The shared storage cannot be set up.
    #[error("[shared]: {0}")]
    Shared(#[from] BucketSettingsError),
    /// A URL of an upstream is invalid.
    #[error("upstream {name}: {error}")]
    Url {
        /// The upstream.
        name: Arc<str>,
        /// The reason.
        error: OriginError,
    },
    /// The admin listener is reachable from other machines and has no token.
    #[error(
        "listen.admin = \"{0}\" is reachable from other machines and shows the names of private repositories; \
             use a loopback address or \"unix:/run/ifnewer/admin.sock\", or set listen.admin_token_file"
    )]
    AdminExposed(SocketAddr),
    /// The admin token cannot be used.
    #[error("{0}")]
    AdminToken(#[from] TokenError),
    /// No upstream is configured.
    #[error("no upstream is configured; add a section [upstream.\"docker.io\"]")]
    NoUpstream,
}

/// Serves until SIGTERM or SIGINT, on the `inherited` sockets if there are any. `descriptors` is the file descriptor
/// limit. `reload` reads the configuration again on SIGHUP.
#[expect(clippy::too_many_lines, reason = "builds every part of the process, in order")]
pub async fn serve(
    config: Config,
    inherited: InheritedSockets,
    descriptors: usize,
    reload: impl Fn() -> Result<Config, Diagnostics>,
    clock: Clock,
    telemetry: Telemetry,
) -> Result<(), RunError> {
    let token = admin_token(&config)?;
    let mut signals = Signals::new()?;
    let limits = cap_limits_to_descriptors(&config, descriptors);
    // Take the lock first: a second process must fail before it disturbs the first one.
    let (store, offline) = block_in_place(|| open_store(&config, descriptors, clock))?;
    let context = UpstreamContext {
        telemetry,
        offline,
        served: Arc::new(ServedRepositories(Arc::clone(&store))),
        clock,
    };
    let (buffers, egress) = (BufferPool::default(), Egress::default());
    let downloads = Downloads::with_parallel(
        Arc::clone(&store),
        buffers.clone(),
        limits.downloads_max,
        ParallelLimits {
            connections_max: limits.parallel_connections,
            blob_bytes_min: limits.parallel_bytes_min,
        },
    );
    let shared = SharedState::new(&store, &downloads, &context);
    let build = |config: &Config| registry(config, &shared, &context);
    let registry = build(&config)?;
    let storage = Arc::clone(shared.proxy.shared());
    storage.configure(shared_storage(&config, &shared)?);
    let mut is_shared = config.shared.clone();
    registry.activate();
    let registry = Arc::new(ArcSwap::from_pointee(registry));
    let front = RegistryService {
        registry: Arc::clone(&registry),
        telemetry: context.telemetry.clone(),
        buffers,
        egress: egress.clone(),
        verified: VerifiedBlobs::default(),
        clock,
    };
    let shutdown = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let listeners = listeners(&config.listen, inherited)?;
    let addresses: Vec<_> = listeners.iter().filter_map(Listener::ip).collect();
    let load_certificates = |config: &Config| certificates(config, &addresses, clock);
    let tls = Arc::new(ArcSwap::from_pointee(load_certificates(&config)?));
    let acceptor = Acceptor::new(
        front,
        Arc::clone(&tls),
        config.listen.plain_http,
        limits,
        shutdown.clone(),
    );
    let registry_addresses = listeners.iter().filter_map(Listener::address).collect();
    for listener in listeners {
        print_listening("registry", &listener.name());
        tasks.spawn(acceptor.clone().run(listener));
    }
    let admin = Admin::new(AdminDeps {
        registry: Arc::clone(&registry),
        telemetry: context.telemetry.clone(),
        egress,
        clock,
        offline: context.offline.clone(),
        auth: AdminAuth::new(token, config.tls.names.clone(), process_secret(&store, clock)),
        tls: Arc::clone(&tls),
        ca: config
            .tls
            .certificate
            .is_none()
            .then(|| config.tls.folder.join("ca.pem")),
        registry_addresses,
        ending: shutdown.clone(),
        connections_max: admin::connections_max(descriptors),
    });
    // Not awaited at shutdown, which may take long.
    tokio::spawn(admin.clone().beat());
    tasks.spawn(admin.clone().sample());
    let refreshing = Arc::clone(&shared.proxy);
    tasks.spawn(refreshing.run_scheduled_refreshes(shutdown.clone().cancelled_owned()));
    tasks.spawn(maintenance_loop(Arc::clone(&store), clock, shutdown.clone()));
    tasks.spawn(certificate_renewal::renewal_loop(
        Arc::clone(&tls),
        clock,
        shutdown.clone(),
    ));
    let _socket = spawn_admin(&config.listen.admin, admin, &mut tasks)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), data = %config.data.display(), "serving");
    let watchdog = tokio::spawn(systemd::watchdog());
    systemd::ready();

    while matches!(signals.next().await, Signal::Reload) {
        let _reloading = systemd::Reloading::begin();
        let Some(new) = log_config_error(reload()) else {
            continue;
        };
        let opened = shared_storage(&new, &shared);
        let serving = build(&new).and_then(|serving| Ok((serving, opened?)));
        match (serving, load_certificates(&new)) {
            (Ok((serving, opened)), Ok(certificate)) => {
                // Unchanged settings keep what was learned of the bucket, and its uploads.
                if new.shared != is_shared {
                    storage.configure(opened);
                    is_shared.clone_from(&new.shared);
                }
                serving.activate();
                registry.store(Arc::new(serving));
                tls.store(Arc::new(certificate));
                block_in_place(|| apply_store_settings(&store, &new));
                warn_restart_needed(&config, &new);
                tracing::info!("configuration reloaded");
            }
            (Err(error), _) => {
                tracing::error!(%error, "failed to apply the new configuration, keeping the current one");
            }
            (_, Err(error)) => {
                tracing::error!(%error, "failed to load the new certificate, keeping the current one");
            }
        }
    }
    tracing::info!("shutting down: finishing running requests");
    systemd::stopping();
    watchdog.abort();
    shutdown.cancel();
    let ends = Instant::now() + config.limits.drain;
    drain(tasks, &mut signals, &downloads, (&storage, ends)).await;
    // Flushing the index blocks. No other task runs at this point.
    let _ = tokio::task::spawn_blocking(move || store.close()).await;
    tracing::info!("shutdown complete");
    Ok(())
}

/// Waits for running requests, downloads and uploads within limits. Uploads have until `ends`.
async fn drain(
    mut tasks: JoinSet<()>,
    signals: &mut Signals,
    downloads: &Downloads,
    (storage, ends): (&SharedStorage, Instant),
) {
    let is_hurried = tokio::select! {
        () = async { while tasks.join_next().await.is_some() {} } => false,
        () = signals.wait_for_shutdown() => true,
    };
    if is_hurried {
        tracing::warn!("second signal received, terminating now");
    }
    // Responses complete before the blob is committed, so wait briefly for commits.
    if tokio::time::timeout(COMMIT_TIMEOUT, downloads.idle())
        .await
        .is_err()
    {
        tracing::info!("aborting downloads without readers");
    }
    if is_hurried {
        return;
    }
    tokio::select! {
        drained = tokio::time::timeout_at(ends, storage.drain()) => if drained.is_err() {
            tracing::info!("aborting uploads to the shared storage");
        },
        () = signals.wait_for_shutdown() => tracing::warn!("second signal received, terminating now"),
    }
    storage.hand_over_claims().await;
}

fn certificates(config: &Config, addresses: &[IpAddr], clock: Clock) -> Result<ServerTls, TlsError> {
    ServerTls::prepare(
        &config.tls,
        addresses,
        config.hosts(),
        config.client_roots(),
        clock,
    )
}

/// Limits that fit the file descriptor limit.
fn cap_limits_to_descriptors(config: &Config, descriptors: usize) -> Limits {
    let limits = config.limits.capped_to(descriptors);
    if limits != config.limits {
        tracing::warn!(
            descriptors,
            connections = limits.connections_max,
            downloads = limits.downloads_max,
            "limits lowered to the file descriptor limit, raise LimitNOFILE= of the unit"
        );
    }
    limits
}

fn store_settings(config: &Config, descriptors: usize) -> StoreSettings {
    let usual = StoreSettings::default();
    StoreSettings {
        limits: store_limits(config),
        scrub_rate: config.store.scrub_rate,
        open_blobs_max: usual.open_blobs_max.min(descriptors / 8),
        ..usual
    }
}

/// Applies the store settings that a reload may change.
fn apply_store_settings(store: &Store, new: &Config) {
    store.set_limits(store_limits(new));
    store.set_scrub_rate(new.store.scrub_rate);
}

fn open_store(config: &Config, descriptors: usize, clock: Clock) -> Result<(Arc<Store>, Offline), RunError> {
    let fs = Arc::new(DirectoryFs::open(&config.data)?);
    let settings = store_settings(config, descriptors);
    let store = Store::open(&settings, fs, clock.now())?;
    let offline = restore_offline_mode(&store);
    Ok((Arc::new(store), offline))
}

/// Restores offline mode, so that an upgrade does not resume upstream requests.
fn restore_offline_mode(store: &Store) -> Offline {
    let offline = Offline::default();
    if store.is_offline_persisted() {
        tracing::warn!("offline mode restored, no upstream is requested until `ifnewer offline off`");
        offline.set(true);
    }
    offline
}

fn log_config_error(loaded: Result<Config, Diagnostics>) -> Option<Config> {
    loaded
        .inspect_err(|faults| {
            tracing::error!("the new configuration is invalid, keeping the current one:\n{faults}");
        })
        .ok()
}

fn store_limits(config: &Config) -> StoreLimits {
    StoreLimits {
        bytes_max: config.store.bytes_max,
        free_bytes_min: config.store.free_bytes_min,
    }
}

/// Runs store maintenance until shutdown.
async fn maintenance_loop(store: Arc<Store>, clock: Clock, shutdown: CancellationToken) {
    let mut runs = 0_u32;
    while shutdown
        .run_until_cancelled(tokio::time::sleep(MAINTENANCE_INTERVAL))
        .await
        .is_some()
    {
        runs = runs.wrapping_add(1);
        let (store, now) = (Arc::clone(&store), clock.now());
        let done = tokio::task::spawn_blocking(move || {
            store.tick(now);
            if runs.is_multiple_of(TIDY_EVERY_RUNS) {
                store.housekeeping();
            }
        });
        if done.await.is_err() {
            tracing::error!("store maintenance panicked, retrying");
        }
    }
}

/// The admin token. A listener that is reachable from other machines requires one.
fn admin_token(config: &Config) -> Result<Option<Zeroizing<String>>, RunError> {
    let token = admin::token(&config.listen)?;
    match config.listen.admin {
        config::Admin::Tcp(address) if !address.ip().is_loopback() && token.is_none() => {
            Err(RunError::AdminExposed(address))
        }
        _ => Ok(token),
    }
}

/// A secret of this process, derived from the secret of the installation.
fn process_secret(store: &Store, clock: Clock) -> [u8; 32] {
    hmac_sha256(
        store.install_secret(),
        format!("admin since {:?}", clock.now()).as_bytes(),
    )
}

fn spawn_admin(
    listen: &config::Admin,
    admin: Admin,
    tasks: &mut JoinSet<()>,
) -> Result<Option<SocketFile>, RunError> {
    match listen {
        config::Admin::Off => Ok(None),
        config::Admin::Tcp(address) => {
            let listener = bind(*address, false)?;
            print_listening("admin", &listener.local_addr()?.to_string());
            tasks.spawn(admin.serve(admin::Listener::Tcp(listener))?);
            Ok(None)
        }
        config::Admin::Unix(path) => {
            let (listener, file) = bind_unix(path, 0o600)?;
            print_listening("admin", &format!("unix:{}", path.display()));
            tasks.spawn(admin.serve(admin::Listener::Unix(listener))?);
            Ok(Some(file))
        }
    }
}

/// Prints a listening address to standard output, for people and for scripts that use port 0.
fn print_listening(what: &str, address: &str) {
    let mut out = terminal::stdout(false);
    // A closed standard output does not prevent serving.
    let _ = writeln!(out, "{what} listening on {address}");
    let _ = out.flush();
}

fn warn_restart_needed(old: &Config, new: &Config) {
    let limits = |config: &Config| Limits {
        downloads_per_upstream_max: 0,
        ..config.limits
    };
    if old.data != new.data || old.listen != new.listen || limits(old) != limits(new) {
        tracing::warn!(
            "`data`, [listen] and [limits] but downloads_per_upstream_max take effect at the next start"
        );
    }
}
