//! Construction of the registry from the configuration: upstreams, routes, tunnels and authentication.

use std::sync::Arc;

use crate::bucket;
use crate::clock::Clock;
use crate::config::{AuthMode, Config, Credential, Proxy, UpstreamConfig};
use crate::download::Downloads;
use crate::policy::rules::Rules;
use crate::proxy::{self, ProxyService, RegistryStates, UpstreamRegistry};
use crate::server::{Authenticator, PasswordCache, Router, ServingState, TunnelRules};
use crate::shared::SharedSettings;
use crate::store::Store;
use crate::telemetry::{Telemetry, UpstreamRecord};
use crate::upstream::TunnelDialer;
use crate::upstream::{
    CredentialSource, LearnedState, Observer, Offline, ProxyChoice, ServedStore, Settings, Transport,
    Upstream,
};

use super::RunError;
use crate::oci::Repository;

/// What all upstreams share across reloads.
pub(super) struct UpstreamContext {
    pub(super) telemetry: Telemetry,
    pub(super) offline: Offline,
    pub(super) served: Arc<dyn ServedStore>,
    pub(super) clock: Clock,
}

impl UpstreamContext {
    /// Records upstream requests in the telemetry.
    pub(super) fn observer(&self) -> Observer {
        let (telemetry, clock) = (self.telemetry.clone(), self.clock);
        Observer::new(move |exchanged| {
            telemetry.record_upstream(&UpstreamRecord {
                upstream: exchanged.upstream,
                operation: exchanged.endpoint,
                code: exchanged.code,
                ended: clock.now(),
                took: exchanged.took,
                trace: exchanged.trace,
            });
        })
    }
}

/// State that survives a reload. A reload replaces settings only.
pub(super) struct SharedState {
    pub(super) proxy: Arc<ProxyService>,
    pub(super) upstream_registries: RegistryStates,
    pub(super) passwords: Arc<PasswordCache>,
    pub(super) connector: Transport,
}

impl SharedState {
    pub(super) fn new(store: &Arc<Store>, downloads: &Downloads, context: &UpstreamContext) -> Self {
        let proxy = ProxyService::new(
            Arc::clone(store),
            downloads.clone(),
            (context.clock, context.telemetry.clone()),
        );
        Self {
            proxy: Arc::new(proxy),
            upstream_registries: RegistryStates::default(),
            passwords: Arc::default(),
            connector: Transport::system(),
        }
    }
}

/// Opens the bucket of the shared storage. Sends no request.
pub(super) fn shared_storage(
    config: &Config,
    shared: &SharedState,
) -> Result<Option<SharedSettings>, RunError> {
    let Some(configured) = &config.shared else {
        return Ok(None);
    };
    let bucket = bucket::open(&configured.bucket, &shared.connector)?;
    Ok(Some(configured.settings(bucket)))
}

/// Builds the registry from the configuration.
pub(super) fn registry(
    config: &Config,
    shared: &SharedState,
    context: &UpstreamContext,
) -> Result<ServingState, RunError> {
    let rules = Arc::new(config.rules.clone());
    let mut upstream_registries = Vec::new();
    for upstream in &config.upstreams {
        let downloads_max = config.limits.downloads_per_upstream_max;
        upstream_registries.push((
            Arc::new(upstream_registry(
                upstream,
                downloads_max,
                &rules,
                (shared, context),
            )?),
            upstream.hosts.clone(),
        ));
    }
    let is_default =
        |upstream_registry: &Arc<UpstreamRegistry>| upstream_registry.name() == &*config.default_upstream;
    let default = upstream_registries
        .iter()
        .map(|(upstream_registry, _)| upstream_registry)
        .find(|upstream_registry| is_default(upstream_registry))
        .or(upstream_registries.first().map(|(s, _)| s));
    let default = Arc::clone(default.ok_or(RunError::NoUpstream)?);
    let way = TunnelDialer::new(&shared.connector).map_err(|error| RunError::Upstream {
        name: Arc::from("[connect]"),
        error,
    })?;
    let entry = config.access.as_ref();
    let secret = *shared.proxy.store().install_secret();
    let entry = entry.map(|entry| Authenticator::new(entry, secret, Arc::clone(&shared.passwords)));
    Ok(ServingState {
        router: Router::new(upstream_registries, default),
        proxy: Arc::clone(&shared.proxy),
        tunnels: TunnelRules::new(config.tunnels.clone(), way),
        auth: entry.transpose()?,
    })
}

fn upstream_registry(
    config: &UpstreamConfig,
    downloads_max: usize,
    rules: &Arc<Rules>,
    (shared, context): (&SharedState, &UpstreamContext),
) -> Result<UpstreamRegistry, RunError> {
    let state = shared.upstream_registries.of(&config.name);
    let access = match config.auth {
        AuthMode::PerClient => proxy::Access::PerClient,
        AuthMode::Shared => proxy::Access::Shared {
            proxy_credential: config.credential.is_some(),
        },
    };
    let upstream = upstream(
        config,
        downloads_max,
        (&shared.connector, state.upstream()),
        (
            context.offline.clone(),
            context.observer(),
            Some(Arc::clone(&context.served)),
        ),
    )?;
    let upstream_registry = UpstreamRegistry::new(Arc::new(upstream), access, Arc::clone(rules), state);
    let Some(realm) = &config.local_tokens else {
        return Ok(upstream_registry);
    };
    let realm = realm.parse().map_err(|error| RunError::Url {
        name: Arc::clone(&config.name),
        error,
    })?;
    Ok(upstream_registry.with_local_tokens(realm))
}

/// Builds the client of one upstream from its configuration and learned state.
pub fn upstream(
    config: &UpstreamConfig,
    downloads_max: usize,
    (connector, state): (&Transport, &LearnedState),
    (offline, observer, served): (Offline, Observer, Option<Arc<dyn ServedStore>>),
) -> Result<Upstream, RunError> {
    let refused = |error| RunError::Upstream {
        name: Arc::clone(&config.name),
        error,
    };
    let urls = config.origins().map_err(|error| RunError::Url {
        name: Arc::clone(&config.name),
        error,
    })?;
    let mut settings = Settings::new(&*config.name, urls);
    settings.downloads_max = downloads_max;
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
    // A configured token host is trusted.
    settings
        .token_hosts
        .extend(config.token_host().map(str::to_owned));
    Upstream::with_state(state, settings, connector).map_err(refused)
}

/// Durable record of which URL has served which repository. It is stored beside the repository memberships, so that
/// both are lost together or not at all.
pub(super) struct ServedRepositories(pub(super) Arc<Store>);

impl ServedStore for ServedRepositories {
    fn has_served(&self, upstream: &str, url: &str, repository: &Repository) -> bool {
        self.0.has_served(upstream, url, repository)
    }

    fn record_served(&self, upstream: &str, url: &str, repository: &Repository) {
        if let Err(fault) = self.0.record_served(upstream, url, repository) {
            tracing::warn!(upstream, url, %repository, %fault, "failed to record that a URL served a repository");
        }
    }
}
