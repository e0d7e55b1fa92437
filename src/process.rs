//! The life of the process: built from a configuration, announced, reloaded, drained.

mod certificates;
mod proofs;
mod service;
mod signals;

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::task::{JoinSet, block_in_place};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::admin::{self, Admin, AdminAuth, AdminDeps, TokenError};
use crate::clock::Clock;
use crate::config::{self, Access, Config, Credential, Faults, Limits, Proxy, UpstreamConfig};
use crate::download::Downloads;
use crate::oci::digest::keyed;
use crate::policy::rules::Rules;
use crate::proxy::{self, ProxyService, RegistryStates, UpstreamRegistry};
use crate::server::accept::Accepting;
use crate::server::listen::{Listener, Passed, SocketFile, bind, bind_unix, listeners};
use crate::server::tls::{ServerTls, TlsError};
use crate::server::{Doors, Egress, Entry, Front, Passwords, Registry, Sound, Tunnels};
use crate::store::fs::DirectoryFs;
use crate::store::step::Buffers;
use crate::store::{Limits as StoreLimits, OpenError, Settings as StoreSettings, Store};
use crate::telemetry::{Telemetry, UpstreamRecord};
use crate::terminal;
use crate::upstream::TunnelDialer;
use crate::upstream::origin::Origin;
use crate::upstream::{
    CredentialSource, LearnedState, Observer, Offline, OriginError, ProxyChoice, ServedStore, Settings,
    SettingsError, Transport, Upstream,
};
use proofs::Proofs;
use signals::{Signals, Wanted};

/// How long the end waits for downloads that no client waits for any more.
const SETTLE: Duration = Duration::from_secs(5);

/// How often the store is told the time and looks after itself, and how many times rarer it tidies up.
const TEND_EVERY: Duration = Duration::from_secs(5);
const TIDY_EVERY_TENDS: u32 = 60;

/// Why the process cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The operating system refused something.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The data folder cannot be used.
    #[error("{0}")]
    Store(#[from] OpenError),
    /// The certificate cannot be used.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// An upstream cannot be set up.
    #[error("upstream {name}: {error}")]
    Upstream {
        /// Which.
        name: Arc<str>,
        /// Why.
        error: SettingsError,
    },
    /// An address of an upstream cannot be used.
    #[error("upstream {name}: {error}")]
    Url {
        /// Which.
        name: Arc<str>,
        /// Why.
        error: OriginError,
    },
    /// An admin listener that others could reach.
    #[error(
        "listen.admin = \"{0}\" can be reached from other machines, and it names private repositories; \
             use a loopback address or \"unix:/run/ifnewer/admin.sock\", or name a token with listen.admin_token_file"
    )]
    AdminExposed(SocketAddr),
    /// The admin token cannot be used.
    #[error("{0}")]
    AdminToken(#[from] TokenError),
    /// Nothing would be served.
    #[error("no upstream is configured")]
    NoUpstream,
}

/// Serves until a signal ends it, on the sockets that were `passed` to the process, if any. It may have so many
/// `descriptors` open. `reload` reads the configuration again, on SIGHUP. What happens is told to
/// `telemetry`.
pub async fn serve(
    config: Config,
    passed: Passed,
    descriptors: usize,
    reload: impl Fn() -> Result<Config, Faults>,
    clock: Clock,
    telemetry: Telemetry,
) -> Result<(), RunError> {
    let token = admin_token(&config)?;
    let mut signals = Signals::new()?;
    let limits = affordable(&config, descriptors);
    // The lock first: a second process must refuse before it disturbs anything of the first.
    let (store, offline) = block_in_place(|| open_store(&config, descriptors, clock))?;
    let told = Told {
        telemetry,
        offline,
        served: Arc::new(Proofs(Arc::clone(&store))),
        clock,
    };
    let (buffers, egress) = (Buffers::default(), Egress::default());
    let downloads = Downloads::new(Arc::clone(&store), buffers.clone(), limits.fetches_max);
    let lasting = Lasting::new(&store, &downloads, &told);
    let build = |config: &Config| registry(config, &lasting, &told);
    let registry = build(&config)?;
    registry.activate();
    let registry = Arc::new(ArcSwap::from_pointee(registry));
    let front = Front {
        registry: Arc::clone(&registry),
        telemetry: told.telemetry.clone(),
        buffers,
        egress: egress.clone(),
        sound: Sound::default(),
        clock,
    };
    let ending = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let listeners = listeners(&config.listen, passed)?;
    let addresses: Vec<_> = listeners.iter().filter_map(Listener::ip).collect();
    let certificates = |config: &Config| certificates(config, &addresses, clock);
    let tls = Arc::new(ArcSwap::from_pointee(certificates(&config)?));
    let accepting = Accepting::new(
        front,
        Arc::clone(&tls),
        config.listen.plain,
        limits,
        ending.clone(),
    );
    let registry_addresses = listeners.iter().filter_map(Listener::address).collect();
    for listener in listeners {
        announce("registry", &listener.name());
        tasks.spawn(accepting.clone().run(listener));
    }
    let admin = Admin::new(AdminDeps {
        registry: Arc::clone(&registry),
        telemetry: told.telemetry.clone(),
        egress,
        clock,
        offline: told.offline.clone(),
        auth: AdminAuth::new(token, config.tls.names.clone(), process_secret(&store, clock)),
        tls: Arc::clone(&tls),
        ca: config.tls.own.is_none().then(|| config.tls.folder.join("ca.pem")),
        registry_addresses,
        ending: ending.clone(),
        connections_max: admin::connections_max(descriptors),
    });
    // Not waited for at the end, which may take its time.
    tokio::spawn(admin.clone().beat());
    tasks.spawn(admin.clone().sample());
    tasks.spawn(tend(Arc::clone(&store), clock, ending.clone()));
    tasks.spawn(certificates::tend(Arc::clone(&tls), clock, ending.clone()));
    let _socket = operate(&config.listen.admin, admin, &mut tasks)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), data = %config.data.display(), "serving");
    let watchdog = tokio::spawn(service::watchdog());
    service::ready();

    while matches!(signals.next().await, Wanted::Reload) {
        let _reloading = service::Reloading::begin();
        let Some(new) = right(reload()) else { continue };
        match (build(&new), certificates(&new)) {
            (Ok(serving), Ok(certificate)) => {
                serving.activate();
                registry.store(Arc::new(serving));
                tls.store(Arc::new(certificate));
                block_in_place(|| adjust(&store, &new));
                warn_of_restart(&config, &new);
                tracing::info!("the configuration was read again and is in effect");
            }
            (Err(error), _) => {
                tracing::error!(%error, "the new configuration cannot be used; the old one stays");
            }
            (_, Err(error)) => {
                tracing::error!(%error, "the new certificate cannot be used; the old one stays");
            }
        }
    }
    tracing::info!("ending: finishing what is under way");
    service::stopping();
    watchdog.abort();
    ending.cancel();
    finish(tasks, &mut signals, &downloads, store).await;
    tracing::info!("ended");
    Ok(())
}

/// Waits for what is under way, but not for ever, and closes the store.
async fn finish(mut tasks: JoinSet<()>, signals: &mut Signals, downloads: &Downloads, store: Arc<Store>) {
    tokio::select! {
        () = async { while tasks.join_next().await.is_some() {} } => {}
        () = signals.end() => tracing::warn!("a second signal: ending now"),
    }
    // The last client has its last byte a moment before the blob has its name.
    if tokio::time::timeout(SETTLE, downloads.idle()).await.is_err() {
        tracing::info!("downloads that nobody waits for are given up");
    }
    // Flushing the index is the last write; it blocks, and nothing else runs any more.
    let _ = tokio::task::spawn_blocking(move || store.close()).await;
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

/// The limits that a process with so few descriptors can keep.
fn affordable(config: &Config, descriptors: usize) -> Limits {
    let limits = config.limits.within(descriptors);
    if limits != config.limits {
        tracing::warn!(
            descriptors,
            connections = limits.connections_max,
            fetches = limits.fetches_max,
            "the process may open few files, which lowers [limits]; raise LimitNOFILE= of its unit"
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

/// What a reload changes of the store.
fn adjust(store: &Store, new: &Config) {
    store.set_limits(store_limits(new));
    store.set_scrub_rate(new.store.scrub_rate);
}

fn open_store(config: &Config, descriptors: usize, clock: Clock) -> Result<(Arc<Store>, Offline), RunError> {
    let fs = Arc::new(DirectoryFs::open(&config.data)?);
    let settings = store_settings(config, descriptors);
    let store = Store::open(&settings, fs, clock.now())?;
    let offline = as_left(&store);
    Ok((Arc::new(store), offline))
}

/// An operator who switched offline mode on before an upgrade must not find upstreams asked after it.
fn as_left(store: &Store) -> Offline {
    let offline = Offline::default();
    if store.is_offline_persisted() {
        tracing::warn!(
            "offline mode is on, as it was left: no upstream is asked until `ifnewer offline off`"
        );
        offline.set(true);
    }
    offline
}

fn right(reread: Result<Config, Faults>) -> Option<Config> {
    reread
        .inspect_err(|faults| {
            tracing::error!("the new configuration is wrong; the old one stays:\n{faults}");
        })
        .ok()
}

fn store_limits(config: &Config) -> StoreLimits {
    StoreLimits {
        bytes_max: config.store.bytes_max,
        free_bytes_min: config.store.free_bytes_min,
    }
}

/// Lets the store look after itself until the end.
async fn tend(store: Arc<Store>, clock: Clock, ending: CancellationToken) {
    let mut tends = 0_u32;
    while ending
        .run_until_cancelled(tokio::time::sleep(TEND_EVERY))
        .await
        .is_some()
    {
        tends = tends.wrapping_add(1);
        let (store, now) = (Arc::clone(&store), clock.now());
        let tended = tokio::task::spawn_blocking(move || {
            store.tick(now);
            if tends.is_multiple_of(TIDY_EVERY_TENDS) {
                store.housekeeping();
            }
        });
        if tended.await.is_err() {
            tracing::error!("looking after the store ended in a panic; it is tried again");
        }
    }
}

/// The token that the admin listener asks for; one that others can reach must have one.
fn admin_token(config: &Config) -> Result<Option<Zeroizing<String>>, RunError> {
    let token = admin::token(&config.listen)?;
    match config.listen.admin {
        config::Admin::Tcp(address) if !address.ip().is_loopback() && token.is_none() => {
            Err(RunError::AdminExposed(address))
        }
        _ => Ok(token),
    }
}

/// What every upstream shares, over all configurations of this process.
struct Told {
    telemetry: Telemetry,
    offline: Offline,
    served: Arc<dyn ServedStore>,
    clock: Clock,
}

impl Told {
    /// Tells of exchanges with an upstream.
    fn observer(&self) -> Observer {
        let (telemetry, clock) = (self.telemetry.clone(), self.clock);
        Observer::new(move |exchanged| {
            telemetry.record_upstream(&UpstreamRecord {
                upstream: exchanged.upstream,
                operation: exchanged.operation,
                code: exchanged.code,
                ended: clock.now(),
                took: exchanged.took,
                trace: exchanged.trace,
            });
        })
    }
}

/// What is learned and under way, over all configurations of this process: a reload exchanges settings alone.
struct Lasting {
    pull: Arc<ProxyService>,
    sites: RegistryStates,
    passwords: Arc<Passwords>,
    connector: Transport,
}

impl Lasting {
    fn new(store: &Arc<Store>, downloads: &Downloads, told: &Told) -> Self {
        let pull = ProxyService::new(
            Arc::clone(store),
            downloads.clone(),
            (told.clock, told.telemetry.clone()),
        );
        Self {
            pull: Arc::new(pull),
            sites: RegistryStates::default(),
            passwords: Arc::default(),
            connector: Transport::system(),
        }
    }
}

/// New with each process, and as secret as the store's own.
fn process_secret(store: &Store, clock: Clock) -> [u8; 32] {
    keyed(
        store.install_secret(),
        format!("admin since {:?}", clock.now()).as_bytes(),
    )
}

/// What serves requests, from the configuration.
fn registry(config: &Config, lasting: &Lasting, told: &Told) -> Result<Registry, RunError> {
    let rules = Arc::new(config.rules.clone());
    let mut sites = Vec::new();
    for upstream in &config.upstreams {
        let fetches_max = config.limits.fetches_per_upstream_max;
        sites.push((
            Arc::new(site(upstream, fetches_max, &rules, (lasting, told))?),
            upstream.hosts.clone(),
        ));
    }
    let is_default = |site: &Arc<UpstreamRegistry>| site.name() == &*config.default_upstream;
    let default = sites
        .iter()
        .map(|(site, _)| site)
        .find(|site| is_default(site))
        .or(sites.first().map(|(s, _)| s));
    let default = Arc::clone(default.ok_or(RunError::NoUpstream)?);
    let way = TunnelDialer::new(&lasting.connector).map_err(|error| RunError::Upstream {
        name: Arc::from("[connect]"),
        error,
    })?;
    let entry = config.entry.as_ref();
    let secret = *lasting.pull.store().install_secret();
    let entry = entry.map(|entry| Entry::new(entry, secret, Arc::clone(&lasting.passwords)));
    Ok(Registry {
        doors: Doors::new(sites, default),
        pull: Arc::clone(&lasting.pull),
        tunnels: Tunnels::new(config.tunnels.clone(), way),
        entry: entry.transpose()?,
    })
}

fn site(
    config: &UpstreamConfig,
    fetches_max: usize,
    rules: &Arc<Rules>,
    (lasting, told): (&Lasting, &Told),
) -> Result<UpstreamRegistry, RunError> {
    let state = lasting.sites.of(&config.name);
    let access = match config.access {
        Access::Proven => proxy::Access::PerClient,
        Access::Shared => proxy::Access::Shared {
            own_credential: config.credential.is_some(),
        },
    };
    let upstream = upstream(
        config,
        fetches_max,
        (&lasting.connector, state.upstream()),
        (
            told.offline.clone(),
            told.observer(),
            Some(Arc::clone(&told.served)),
        ),
    )?;
    let site = UpstreamRegistry::new(Arc::new(upstream), access, Arc::clone(rules), state);
    let Some(realm) = &config.local_tokens else {
        return Ok(site);
    };
    let realm = realm.parse().map_err(|error| RunError::Url {
        name: Arc::clone(&config.name),
        error,
    })?;
    Ok(site.with_local_tokens(realm))
}

/// The client side of one upstream, as its section says, over what is known of it.
pub fn upstream(
    config: &UpstreamConfig,
    fetches_max: usize,
    (connector, state): (&Transport, &LearnedState),
    (offline, observer, served): (Offline, Observer, Option<Arc<dyn ServedStore>>),
) -> Result<Upstream, RunError> {
    let refused = |error| RunError::Upstream {
        name: Arc::clone(&config.name),
        error,
    };
    let urls = config
        .urls
        .iter()
        .map(|url| {
            let origin: Origin = url.address.parse()?;
            Ok(match &url.repository_prefix {
                Some(prefix) => origin.with_repository_prefix(prefix.clone()),
                None => origin,
            })
        })
        .collect::<Result<Vec<_>, _>>();
    let urls = urls.map_err(|error| RunError::Url {
        name: Arc::clone(&config.name),
        error,
    })?;
    let mut settings = Settings::new(&*config.name, urls);
    settings.fetches_max = fetches_max;
    settings.offline = offline;
    settings.observer = observer;
    settings.served = served;
    settings.roots.clone_from(&config.roots);
    settings.client_certificate.clone_from(&config.client_certificate);
    settings.redirects.clone_from(&config.redirects);
    settings.timeouts.connect = config.connect_timeout;
    settings.timeouts.headers = config.first_byte_timeout;
    settings.proxy = match &config.proxy {
        Proxy::Environment => ProxyChoice::Environment,
        Proxy::None => ProxyChoice::None,
        Proxy::Url(url) => ProxyChoice::Url(url.clone()),
    };
    settings.credential = config.credential.as_ref().map(|own| match own.clone() {
        Credential::Password { username, file } => CredentialSource::PasswordFile { username, path: file },
        Credential::DockerConfig(path) => CredentialSource::DockerConfig { path },
        Credential::Helper(name) => CredentialSource::Helper(name),
    });
    settings.hosts.clone_from(&config.hosts);
    settings.token_hosts.clone_from(&config.token_hosts);
    // Who names it trusts it.
    settings
        .token_hosts
        .extend(config.token_host().map(str::to_owned));
    Upstream::with_state(state, settings, connector).map_err(refused)
}

fn operate(
    listen: &config::Admin,
    admin: Admin,
    tasks: &mut JoinSet<()>,
) -> Result<Option<SocketFile>, RunError> {
    match listen {
        config::Admin::Off => Ok(None),
        config::Admin::Tcp(address) => {
            let listener = bind(*address, false)?;
            announce("admin", &listener.local_addr()?.to_string());
            tasks.spawn(admin.serve(admin::Listener::Tcp(listener))?);
            Ok(None)
        }
        config::Admin::Unix(path) => {
            let (listener, file) = bind_unix(path, 0o600)?;
            announce("admin", &format!("unix:{}", path.display()));
            tasks.spawn(admin.serve(admin::Listener::Unix(listener))?);
            Ok(Some(file))
        }
    }
}

/// On standard output, for people and for scripts that let the system choose the port.
fn announce(what: &str, address: &str) {
    let mut out = terminal::stdout(false);
    // A closed standard output is no reason not to serve.
    let _ = writeln!(out, "{what} listening on {address}");
    let _ = out.flush();
}

fn warn_of_restart(old: &Config, new: &Config) {
    let limits = |config: &Config| Limits {
        fetches_per_upstream_max: 0,
        ..config.limits
    };
    if old.data != new.data || old.listen != new.listen || limits(old) != limits(new) {
        tracing::warn!(
            "`data`, [listen] and [limits] but fetches_per_upstream_max take effect at the next start"
        );
    }
}
