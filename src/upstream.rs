//! Client for upstream registries: one [`Upstream`] per configured registry.
//!
//! Each response is classified as a [`ResponseKind`]: a digest, not found, denied or unavailable. Not found and
//! denied are results of the registry itself. Only if the upstream is unavailable may a stale cached copy be served.
//! This module handles tokens, redirects, retries, rate limits, registry quirks and circuit breakers.
//!
//! Other modules decide on a response (`policy`), store bytes (`store`) and share transfers
//! (`download`). Bodies are not verified here: the code that stores a body verifies its digest.
//!
//! Reading order:
//!
//! * One request: `response` (classification), `proof` (which 2xx responses prove a digest), `registry_request` (HEAD
//!   and its fallbacks), `auth_client` (credentials and challenges), `token`, `redirect_auth`, `credentials`,
//!   `http_client`, `connector`, `dialer`, `tcp` and `tls`.
//! * Several URLs: `response_stream` (GET) and `failover`.
//! * What is learned about an upstream: `state` (outlives reloads), `health` (failure detection, circuit breakers),
//!   `probe`, `rate_limit`, `retry_after` and `quirks`.
//! * Rules about addresses: `origin`, `ip_scope`, `redirect_rules`, `proxy_rules`, `no_proxy` and `location`.
//! * Forwarding of clients' requests: `forward` (to the registry), `token_forward` (to its token service)
//!   and `tunnel` (CONNECT). `plain_client` is for services that are no registries.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::oci::accept::Accept;
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::oci::name::Repository;
use crate::queue::{Permit, Waiters};
use crate::trace_context::TraceContext;

mod auth_client;
mod connector;
mod credentials;
mod dialer;
mod failover;
pub mod forward;
mod health;
mod http_client;
pub mod ip_scope;
mod location;
mod name_lookup;
mod no_proxy;
mod observer;
pub mod origin;
mod plain_client;
mod probe;
mod proof;
mod proxy_rules;
mod quirks;
mod rate_limit;
mod redirect_auth;
mod redirect_rules;
mod registry_request;
pub mod response;
mod response_stream;
mod retry_after;
mod settings;
mod state;
mod tcp;
mod tls;
mod token;
mod token_forward;
mod tunnel;

pub use connector::Transport;
pub use credentials::{
    CredentialSource, DockerConfig, DockerConfigError, HelperName, HelperNameError, UpstreamCredential,
};
pub use dialer::{DialError, DialFuture, DialedStream, Dialer, Stream};
pub use failover::ServedStore;
pub use health::{FailureScope, RequestKind, WaitLimit};
pub use observer::{ObservedRequest, Observer};
pub use origin::{Origin, OriginError};
pub use plain_client::{PlainBody, PlainClient, PlainFailure, PlainSettings};
pub use proxy_rules::{ProxyChoice, ProxyError};
pub use quirks::Quirk;
pub use rate_limit::{Pause, PullQuota, QuotaOwner};
pub use redirect_rules::{AddressLimit, HostPattern, Network, NetworkError, RedirectRule, RedirectTarget};
pub use response::{ResponseKind, UpstreamResponse};
pub use response_stream::{RangeSpec, ResponseStream, UrlIndex};
pub use settings::{Caller, Credential, DOWNLOADS_MAX, Offline, Settings, SettingsError, Timeouts};
pub use state::LearnedState;
pub use tls::{ClientCertificate, ClientCertificateError, TlsError};
pub use token_forward::{ForwardedToken, TokenResponse};
pub use tunnel::TunnelDialer;

use http_client::HttpClient;

use auth_client::AuthClient;
use connector::{ConnectorSettings, UpstreamConnector};
use failover::{FailoverRound, RoundResult, ServedHistory, UrlOutcome};
use health::{FailingScope, RequestOutcome, SHORT_WAIT, WaitQuery};
use proxy_rules::ProxyRules;
use rate_limit::{LimitClass, SendPermit};
use registry_request::RegistryRequest;
use state::{ConnectionSettings, InFlightRequest, Learned};
use token::Tokens;

/// Status of an upstream, for the admin API and the metrics.
#[derive(Clone, Debug)]
pub struct UpstreamStatus {
    /// `Some` while a circuit breaker for all connections or for a kind of request is open.
    pub open: Option<ScopeFailure>,
    /// Scopes that fail, the widest first. At most 32.
    pub failures: Vec<ScopeFailure>,
    /// The last failure, and how long ago it occurred.
    pub last_failure: Option<(UpstreamFailure, Duration)>,
    /// Description of the last failure, with the host that failed.
    pub last_detail: Option<Arc<str>>,
    /// Duration of the last successful HEAD, and how long ago it ended.
    pub last_head: Option<(Duration, Duration)>,
    /// Pull quotas, as the upstream last reported them for each credential.
    pub quotas: Vec<PullQuota>,
    /// How the registry departs from the specification.
    pub quirks: Vec<Quirk>,
    /// Requests in flight, without blob transfers.
    pub in_flight: usize,
    /// Requests waiting for a permit.
    pub waiting: usize,
}

/// A failing scope of an upstream, for the operator.
#[derive(Clone, Debug)]
pub struct ScopeFailure {
    /// Which requests fail.
    pub scope: FailureScope,
    /// Why they fail.
    pub cause: UpstreamFailure,
    /// How long the circuit breaker has been open. `None`: failures are suspected, and the breaker is closed.
    pub open: Option<Duration>,
}

/// Failing scopes that a status contains at most.
const FAILURES_REPORTED_MAX: usize = 32;

/// Client for one upstream registry. Cheap to clone.
#[derive(Clone)]
pub struct Upstream(Arc<Inner>);

struct Inner {
    name: Arc<str>,
    urls: Vec<Origin>,
    auth_client: AuthClient,
    forward_client: forward::Client,
    timeouts: Timeouts,
    manifest_bytes_max: usize,
    downloads_max: usize,
    served: ServedHistory,
    offline: Offline,
    observer: Observer,
    connection: Arc<ConnectionSettings>,
    learned: Arc<Learned>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("name", &self.0.name)
            .field("urls", &self.0.urls)
            .finish_non_exhaustive()
    }
}

/// Identity of a registry, whatever its name at a cache: its URLs in their order, with their repository prefixes.
pub fn identity(urls: &[Origin]) -> String {
    let urls: Vec<_> = urls.iter().map(ToString::to_string).collect();
    urls.join(" ")
}

impl Upstream {
    /// Creates an upstream without learned state and activates it. Opens no connection.
    pub fn new(settings: Settings, transport: &Transport) -> Result<Upstream, SettingsError> {
        Self::with_state(&LearnedState::default(), settings, transport)
    }

    /// Creates an upstream over learned state. If other settings are active for that state, [`Upstream::activate`]
    /// replaces them.
    pub fn with_state(
        state: &LearnedState,
        settings: Settings,
        transport: &Transport,
    ) -> Result<Upstream, SettingsError> {
        let learned = Arc::clone(&state.0);
        let connection = learned.connection(&settings);
        if settings.urls.is_empty() {
            return Err(SettingsError::NoUrl);
        }
        let connector_settings = ConnectorSettings {
            roots: &settings.roots,
            client_certificate: settings.client_certificate,
            proxy_rules: ProxyRules::new(&settings.proxy)?,
            origins: settings.urls.clone(),
            hosts: settings.token_hosts.clone(),
            redirects: settings.redirects,
            connect_timeout: settings.timeouts.connect,
        };
        let names = credentials::Names::new(&settings.name, settings.hosts, settings.urls.first());
        let auth_client = AuthClient {
            http: HttpClient::new(UpstreamConnector::new(transport, connector_settings)?),
            tokens: Tokens::new(
                Arc::clone(&learned.tokens),
                settings.token_hosts,
                settings.timeouts.token,
            ),
            credentials: learned.credentials(settings.credential, names),
            configured_owner: Mutex::default(),
            headers_timeout: settings.timeouts.headers,
        };
        let forward_client = forward::client(auth_client.http.connector());
        let is_first = !learned.has_been_active();
        let upstream = Upstream(Arc::new(Inner {
            forward_client,
            name: settings.name.into(),
            urls: settings.urls,
            auth_client,
            timeouts: settings.timeouts,
            manifest_bytes_max: settings.manifest_bytes_max,
            downloads_max: settings.downloads_max,
            served: ServedHistory::new(settings.served),
            offline: settings.offline,
            observer: settings.observer,
            connection,
            learned,
        }));
        if is_first {
            upstream.activate();
        }
        Ok(upstream)
    }

    /// The upstream's name in image references.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// [`Self::name`], for keys that hold it.
    pub fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.0.name)
    }

    /// Identity of the registry, see [`identity`].
    pub fn identity(&self) -> String {
        identity(&self.0.urls)
    }

    /// Whether this cache shows a client certificate. What the registry then serves without a credential may be public to
    /// this cache alone.
    pub fn has_client_certificate(&self) -> bool {
        self.0.connection.has_client_certificate()
    }

    /// Identifies the settings that affect responses. Requests are coalesced only between callers with equal ids.
    pub fn settings_id(&self) -> (u64, u64) {
        let own = self
            .0
            .auth_client
            .credentials
            .as_ref()
            .map_or(0, |own| own.serial());
        (self.0.connection.id, own)
    }

    /// The repository prefix of each URL.
    pub fn repository_prefixes(&self) -> impl Iterator<Item = Option<&Repository>> {
        self.0.urls.iter().map(Origin::repository_prefix)
    }

    /// The repository's name at each URL with a repository prefix.
    pub fn upstream_names<'a>(&'a self, repository: &'a Repository) -> impl Iterator<Item = Repository> + 'a {
        let has_prefix = |url: &&Origin| url.repository_prefix().is_some();
        let urls = self.0.urls.iter().filter(has_prefix);
        urls.map(|url| url.name_of(repository))
    }

    /// Checks `endpoint` without transferring content: which digest a tag has, or whether a blob may be read. A
    /// request is also sent while a circuit breaker is open, so a caller with a cached copy calls
    /// [`Upstream::wait_limit`] first. A rate limit is waited out until the caller's deadline.
    pub async fn head(&self, caller: &Caller, endpoint: &Endpoint, accept: &Accept) -> UpstreamResponse {
        self.head_for(caller, endpoint, accept, false).await
    }

    /// Checks for existence before a push. A 404 to the HEAD is final, even if a GET might succeed: the client must
    /// push what the registry itself reports as missing.
    pub async fn head_for_push(
        &self,
        caller: &Caller,
        endpoint: &Endpoint,
        accept: &Accept,
    ) -> UpstreamResponse {
        self.head_for(caller, endpoint, accept, true).await
    }

    async fn head_for(
        &self,
        caller: &Caller,
        endpoint: &Endpoint,
        accept: &Accept,
        trusts_head: bool,
    ) -> UpstreamResponse {
        loop {
            // Boxed because the callers' futures nest deeply.
            let response = Box::pin(self.head_now(caller, endpoint, accept, trusts_head)).await;
            if !pause_ended(&response, caller).await {
                return response;
            }
        }
    }

    async fn head_now(
        &self,
        caller: &Caller,
        endpoint: &Endpoint,
        accept: &Accept,
        trusts_head: bool,
    ) -> UpstreamResponse {
        if let Some(cause) = self.0.offline.cause() {
            return UpstreamResponse::unavailable(cause);
        }
        let _permit = match self.admit(caller, endpoint).await {
            Ok(permit) => permit,
            Err(response) => return *response,
        };
        self.head_round(caller, (endpoint, accept), trusts_head).await
    }

    /// Sends the HEAD to one URL after the other until a response is final.
    async fn head_round(
        &self,
        caller: &Caller,
        (endpoint, accept): (&Endpoint, &Accept),
        trusts_head: bool,
    ) -> UpstreamResponse {
        let pending = self
            .0
            .sent(RequestKind::of_request(endpoint, true), endpoint, caller);
        let mut round = FailoverRound::new(failover::Attempt::First);
        for origin in &self.0.urls {
            let class = LimitClass::of(endpoint, self.0.head_needs_get(origin, endpoint));
            let limits = &self.0.learned.limits;
            let response = match limits.admit(origin, class, caller, Instant::now()) {
                Err(pause) => UpstreamResponse::paused(pause),
                Ok(permit) => {
                    let (began, trace) = (Instant::now(), caller.trace.child());
                    let mut request = self.request((origin, &pending), caller, (endpoint, accept), &trace);
                    request.trusts_head = trusts_head;
                    let response = request.head().await;
                    self.0.observe((endpoint, true), Some(&response), began, &trace);
                    let response = self.0.record_limits((origin, class), caller, permit, response);
                    if response.failure().is_none()
                        && let Some(mut health) = self.0.health()
                    {
                        health.last_head = Some((began.elapsed(), Instant::now()));
                    }
                    response
                }
            };
            match self.outcome(origin, endpoint, &response).await {
                UrlOutcome::Success => {
                    return self.finish_success(pending, (origin, endpoint), response).await;
                }
                outcome if round.add(origin, outcome, response) => break,
                _ => {}
            }
        }
        self.finish_failure(pending, round)
    }

    /// The narrowest IP scope in which the upstream's own addresses were found. Its redirects may not lead to a
    /// narrower one.
    pub fn narrowest_scope(&self) -> ip_scope::IpScope {
        self.0.auth_client.http.connector().narrowest_scope()
    }

    /// Why the upstream as a whole is unavailable: [`UpstreamFailure::BreakerOpen`] or [`UpstreamFailure::Offline`].
    pub fn unavailable_now(&self) -> Option<UpstreamFailure> {
        if let Some(cause) = self.0.offline.cause() {
            return Some(cause);
        }
        self.0
            .health()?
            .detector
            .open_breaker()
            .map(|_| UpstreamFailure::BreakerOpen)
    }

    /// Why pulls of this caller fail in every repository: [`UpstreamFailure::BreakerOpen`] or
    /// [`UpstreamFailure::Offline`]. Unlike for [`Self::unavailable_now`], circuit breakers of other credentials and of
    /// lists do not count.
    pub fn unavailable_to(&self, caller: &Caller, endpoint: &Endpoint) -> Option<UpstreamFailure> {
        if let Some(cause) = self.0.offline.cause() {
            return Some(cause);
        }
        let needs_token = self.0.auth_client.needs_token(&self.0.urls, caller, endpoint);
        let health = self.0.health()?;
        let is_stopped = health.detector.stops_pulls(caller.principal, needs_token);
        is_stopped.then_some(UpstreamFailure::BreakerOpen)
    }

    /// How long a caller with a cached copy should wait for a response. `Err`: it should send no request.
    pub fn wait_limit(
        &self,
        caller: &Caller,
        (endpoint, is_head): (&Endpoint, bool),
        timeout: Duration,
    ) -> Result<Duration, UpstreamFailure> {
        if let Some(cause) = self.0.offline.cause() {
            return Err(cause);
        }
        let query = WaitQuery {
            kind: RequestKind::of_request(endpoint, is_head),
            endpoint,
            principal: caller.principal,
            needs_token: self.0.auth_client.needs_token(&self.0.urls, caller, endpoint),
        };
        let Some(mut health) = self.0.health() else {
            return Ok(timeout);
        };
        let wait = health.detector.wait(&query, timeout, Instant::now());
        if wait != WaitLimit::Full {
            self.0.learned.start_probing(&mut health);
        }
        match wait {
            WaitLimit::Full => Ok(timeout),
            WaitLimit::Short => Ok(timeout.min(SHORT_WAIT)),
            WaitLimit::None => Err(UpstreamFailure::BreakerOpen),
        }
    }

    /// How long a rate limit pauses the caller's HEADs of this manifest at every URL. `None`: one may be sent now.
    pub fn head_pause(&self, caller: &Caller, endpoint: &Endpoint) -> Option<Duration> {
        let (now, limits) = (Instant::now(), &self.0.learned.limits);
        let pauses = self.0.urls.iter().map(|origin| {
            let class = LimitClass::of(endpoint, self.0.head_needs_get(origin, endpoint));
            let pause = limits.current_pause(origin, class, caller, now);
            pause.map(|pause| pause.left(now))
        });
        pauses.collect::<Option<Vec<_>>>()?.into_iter().min()
    }

    /// The caller's pull quota, as the upstream last reported it.
    pub fn quota_of(&self, caller: &Caller) -> Option<PullQuota> {
        self.0.learned.limits.quota_of(caller, Instant::now())
    }

    /// Records that a caller with a cached copy waited `waited` for a response that did not arrive.
    pub fn record_timeout(&self, caller: &Caller, endpoint: &Endpoint, waited: Duration) {
        let needs_token = self.0.auth_client.needs_token(&self.0.urls, caller, endpoint);
        let Some(mut health) = self.0.health() else { return };
        let now = Instant::now();
        let changes = health
            .detector
            .record_timeout(caller.principal, (endpoint, needs_token), waited, now);
        self.0.apply_changes(&mut health, changes);
    }

    /// The upstream's status.
    pub fn status(&self) -> UpstreamStatus {
        let now = Instant::now();
        let health = self.0.health();
        let health = health.as_deref();
        let ago = |at| now.saturating_duration_since(at);
        let failed = |failing: FailingScope| ScopeFailure {
            scope: failing.scope,
            cause: failing.cause,
            open: failing.open_since.map(ago),
        };
        let detector = health.map(|health| &health.detector);
        let failures = detector.map(|detector| {
            detector
                .failing()
                .take(FAILURES_REPORTED_MAX)
                .map(failed)
                .collect()
        });
        let learned = &self.0.learned;
        let mut quirks: Vec<_> = self
            .0
            .urls
            .iter()
            .flat_map(|origin| learned.quirks.at(origin).known(now))
            .collect();
        quirks.sort_unstable();
        quirks.dedup();
        UpstreamStatus {
            open: detector
                .and_then(health::FailureDetector::open_breaker)
                .map(failed),
            failures: failures.unwrap_or_default(),
            last_failure: health
                .and_then(|health| health.last_failure)
                .map(|(cause, at)| (cause, ago(at))),
            last_detail: health.and_then(|health| health.last_detail.clone()),
            last_head: health
                .and_then(|health| health.last_head)
                .map(|(took, at)| (took, ago(at))),
            quotas: learned.limits.quotas(now),
            quirks,
            in_flight: learned.requests.in_use() + learned.lists.in_use(),
            waiting: learned.requests.waiting() + learned.lists.waiting(),
        }
    }

    /// Number of open circuit breakers by scope name.
    pub fn open_breakers(&self) -> Vec<(&'static str, u64)> {
        let names =
            std::iter::once(FailureScope::Connection.name()).chain(RequestKind::ALL.map(RequestKind::name));
        let mut counts: Vec<_> = names.map(|name| (name, 0)).collect();
        if let Some(health) = self.0.health() {
            for failing in health
                .detector
                .failing()
                .filter(|failing| failing.open_since.is_some())
            {
                let name = failing.scope.name();
                if let Some((_, count)) = counts.iter_mut().find(|(known, _)| *known == name) {
                    *count += 1;
                }
            }
        }
        counts
    }

    fn request<'a>(
        &'a self,
        (origin, pending): (&'a Origin, &'a InFlightRequest<'a>),
        caller: &'a Caller,
        (endpoint, accept): (&'a Endpoint, &'a Accept),
        trace: &'a TraceContext,
    ) -> RegistryRequest<'a> {
        RegistryRequest {
            auth_client: &self.0.auth_client,
            pending,
            quirks: self.0.learned.quirks.at(origin),
            origin,
            caller,
            endpoint,
            accept,
            manifest_bytes_max: self.0.manifest_bytes_max,
            trace,
            trusts_head: false,
        }
    }

    /// Acquires a permit for a request to this upstream. Waiting in the queue does not count as a failure.
    pub async fn admit(&self, caller: &Caller, endpoint: &Endpoint) -> Result<Permit, Box<UpstreamResponse>> {
        let (alone, _waiter) = Waiters::with(caller.demand(endpoint));
        let waiters = caller.waiters.as_ref().unwrap_or(&alone);
        let learned = &self.0.learned;
        let queue = match endpoint {
            Endpoint::Tags { .. } | Endpoint::Referrers { .. } => &learned.lists,
            Endpoint::Ping | Endpoint::Manifest { .. } | Endpoint::Blob { .. } => &learned.requests,
        };
        let permit = queue.acquire(&self.0.name, waiters);
        permit
            .await
            .map_err(|refused| Box::new(UpstreamResponse::not_admitted(refused)))
    }

    /// The two request queues: all requests except lists and blob transfers, and lists.
    pub fn queues(&self) -> [&crate::queue::Queue; 2] {
        [&self.0.learned.requests, &self.0.learned.lists]
    }

    /// Maximum number of concurrent requests, and of concurrent blob transfers.
    pub fn downloads_max(&self) -> usize {
        self.0.downloads_max
    }

    /// Classifies one URL's response for failover.
    async fn outcome(&self, origin: &Origin, endpoint: &Endpoint, response: &UpstreamResponse) -> UrlOutcome {
        let named = (&*self.0.name, origin);
        self.0.served.outcome(named, endpoint, response).await
    }

    /// Records a successful response: for failover between URLs and for the upstream's health.
    async fn finish_success<T>(
        &self,
        pending: InFlightRequest<'_>,
        (origin, endpoint): (&Origin, &Endpoint),
        success: T,
    ) -> T {
        pending.finish(RequestOutcome::Response);
        if self.0.urls.len() > 1 {
            self.0.served.record(&self.0.name, origin, endpoint).await;
        }
        success
    }

    /// Records that no URL returned a successful response.
    fn finish_failure(&self, pending: InFlightRequest<'_>, round: FailoverRound) -> UpstreamResponse {
        let RoundResult {
            response,
            is_unavailable,
            unavailable,
            is_sent,
        } = round.finish();
        if !is_sent {
            return response;
        }
        if let Some(cause) = response.failure().filter(|_| is_unavailable)
            // `None` if a reload has activated other connection settings; the failure does not concern those.
            && let Some(mut health) = self.0.health()
        {
            let now = Instant::now();
            health.last_failure = Some((cause, now));
            health.unavailable_urls = unavailable;
            health.last_detail.clone_from(&response.detail);
            let detail = response.detail.as_deref();
            if health.should_log(cause, detail, now) {
                tracing::warn!(upstream = &*self.0.name, %cause, detail, "upstream unavailable");
            }
        }
        pending.finish(RequestOutcome::of(&response, is_unavailable));
        response
    }
}

impl Inner {
    fn observe(
        &self,
        sent: (&Endpoint, bool),
        response: Option<&UpstreamResponse>,
        began: Instant,
        trace: &TraceContext,
    ) {
        self.observer
            .record(&self.name, sent, response, began.elapsed(), trace);
    }

    /// Whether a HEAD of this manifest needs a GET because of a known quirk.
    fn head_needs_get(&self, origin: &Origin, endpoint: &Endpoint) -> bool {
        let (now, quirks) = (Instant::now(), self.learned.quirks.at(origin));
        matches!(endpoint, Endpoint::Manifest { .. })
            && (quirks.has(Quirk::HeadRefused, now) || quirks.has(Quirk::NoDigest, now))
    }

    /// Records a response's rate-limit headers and adds the pause that follows from it.
    fn record_limits(
        &self,
        (origin, class): (&Origin, LimitClass),
        caller: &Caller,
        permit: SendPermit,
        response: UpstreamResponse,
    ) -> UpstreamResponse {
        self.learned
            .limits
            .record(caller, &response.rate_limit, Instant::now());
        // If a pause is set already, it is the token service's.
        if let Some(cause) = response.backoff_cause().filter(|_| response.pause.is_none()) {
            let failed = (cause, response.stated_wait);
            let pause = self
                .learned
                .limits
                .limited((origin, class), caller, permit, failed);
            return response.with_pause(pause);
        }
        if response.failure().is_none() {
            permit.not_limited();
        }
        response
    }
}

/// Waits until the response's rate-limit pause ends. `false` if the caller's deadline comes first or there is no
/// pause.
async fn pause_ended(response: &UpstreamResponse, caller: &Caller) -> bool {
    match (&response.pause, caller.wait_deadline) {
        (Some(pause), Some(until)) => pause.wait_until_open(until).await,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
