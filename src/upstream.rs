//! The network outwards: one [`Upstream`] per configured registry, asked by HEAD and GET.
//!
//! A caller gets what the registry *said* ([`ResponseKind`]): yes and which digest, absent, forbidden; or that it was silent,
//! and why ([`UpstreamFailure`]). The three are never confused, for the first two are answers and only the last lets a held copy
//! be served. Tokens, redirects, retries, rate limits, odd registries and the breaker are dealt with in here.
//!
//! Deliberately not here: what to do with an answer (`policy`), keeping bytes (`store`), sharing a transfer
//! (`download`). Bodies are not verified; whoever keeps them hashes them.
//!
//! Reading order: `answer` (what can be said) → `proof` (when a 2xx is a yes) → `question` (HEAD and its substitutes) → `auth_client` (credential,
//! challenge, token) → `token` → `client` (one request) → `line` (one connection) → `dial`, `tcp`, `tls`; `health` (which failures are known, and of what), `probe` (whether they are over), `limits`, `retry_after`, `quirk`, `state` (what outlives reloads), `route`,
//! `location`, `no_proxy`, `origin`, `target` (where redirects may lead) and `zone` are small and stand alone. Beside all that: `pass` (what is not asked by us but handed on),
//! `realm` (the same at a token service) and `tunnel` (what is not even read).

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

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
mod no_proxy;
mod observer;
pub mod origin;
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

pub use connector::{Transport, TunnelDialer};
pub use credentials::{
    CredentialSource, DockerConfig, DockerConfigError, HelperName, HelperNameError, UpstreamCredential,
};
pub use dialer::{DialError, DialFuture, DialedStream, Dialer, Stream};
pub use failover::ServedStore;
pub use health::{FailureScope, RequestKind, WaitLimit};
pub use observer::{ObservedRequest, Observer};
pub use origin::{Origin, OriginError};
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

/// How an upstream is doing, for the operator.
#[derive(Clone, Debug)]
pub struct UpstreamStatus {
    /// `Some` while the circuit breaker of the upstream as a whole is open.
    pub open: Option<ScopeFailure>,
    /// All that has no response, the widest scope first; of repositories some.
    pub failures: Vec<ScopeFailure>,
    /// The last silence, and how long ago it was.
    pub last_failure: Option<(UpstreamFailure, Duration)>,
    /// Its reason in words, with the host that failed.
    pub last_detail: Option<Arc<str>>,
    /// The last question that it answered without sending anything: how long that took, and how long ago it was.
    pub last_head: Option<(Duration, Duration)>,
    /// What it last said of its callers' allowances.
    pub quotas: Vec<PullQuota>,
    /// What the registry does its own way.
    pub quirks: Vec<Quirk>,
    /// Requests under way, without the transfers of blobs.
    pub in_flight: usize,
    /// Requests that wait for a place.
    pub waiting: usize,
}

/// A part of an upstream that fails, for the operator.
#[derive(Clone, Debug)]
pub struct ScopeFailure {
    /// What of it.
    pub scope: FailureScope,
    /// Why.
    pub cause: UpstreamFailure,
    /// How long its circuit breaker has been open; `None`: it is suspected.
    pub open: Option<Duration>,
}

/// Repositories that fail, as told to the operator.
const FAILURES_REPORTED_MAX: usize = 32;

/// One registry. Cheap to clone.
#[derive(Clone)]
pub struct Upstream(Arc<Inner>);

struct Inner {
    name: String,
    /// Its name as admission has it.
    group: Arc<str>,
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

impl Upstream {
    /// Sets an upstream up of which nothing is known yet, and puts it into effect. Makes no connection.
    pub fn new(settings: Settings, transport: &Transport) -> Result<Upstream, SettingsError> {
        Self::with_state(&LearnedState::default(), settings, transport)
    }

    /// Sets an upstream up over what is known of it. Where other settings are in effect, [`Upstream::activate`] exchanges
    /// them for these.
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
            group: settings.name.as_str().into(),
            name: settings.name,
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

    /// The name in references.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Tells the settings that decide what an answer means from any others: whoever asks under other ones does not wait
    /// for an answer to these.
    pub fn settings_id(&self) -> (u64, u64) {
        let own = self
            .0
            .auth_client
            .credentials
            .as_ref()
            .map_or(0, |own| own.serial());
        (self.0.connection.id, own)
    }

    /// What stands before the name of each repository at each of its URLs.
    pub fn repository_prefixes(&self) -> impl Iterator<Item = Option<&Repository>> {
        self.0.urls.iter().map(Origin::repository_prefix)
    }

    /// The name of a repository where it is another one there.
    pub fn upstream_names<'a>(&'a self, repository: &'a Repository) -> impl Iterator<Item = Repository> + 'a {
        let elsewhere = |url: &&Origin| url.repository_prefix().is_some();
        let urls = self.0.urls.iter().filter(elsewhere);
        urls.map(|url| url.name_of(repository))
    }

    /// What the upstream says about `endpoint` without sending it: which digest a tag names, whether a blob may be
    /// read. Asks also while a circuit breaker is open; an asker with a cached copy looks at [`Upstream::wait`] first.
    /// A rate limit is waited out as long as the caller waits.
    pub async fn head(&self, caller: &Caller, endpoint: &Endpoint, accept: &Accept) -> UpstreamResponse {
        self.head_for(caller, endpoint, accept, false).await
    }

    /// The same for who pushes: a no to the HEAD is the answer, though a GET might say yes. What the registry itself
    /// takes for missing has to be pushed.
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
            // Boxed, for the futures of the callers nest deeply.
            let answer = Box::pin(self.head_now(caller, endpoint, accept, trusts_head)).await;
            if !pause_ended(&answer, caller).await {
                return answer;
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
        let _place = match self.admit(caller, endpoint).await {
            Ok(place) => place,
            Err(answer) => return *answer,
        };
        self.head_round(caller, (endpoint, accept), trusts_head).await
    }

    /// The HEAD to one URL after the other, until one has the last word.
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
            let answer = match limits.admit(origin, class, caller, Instant::now()) {
                Err(pause) => UpstreamResponse::paused(pause),
                Ok(permit) => {
                    let (began, trace) = (Instant::now(), caller.trace.child());
                    let mut request = self.request((origin, &pending), caller, (endpoint, accept), &trace);
                    request.trusts_head = trusts_head;
                    let answer = request.head().await;
                    self.0.observe((endpoint, true), Some(&answer), began, &trace);
                    let answer = self.0.record_limits((origin, class), caller, permit, answer);
                    if answer.failure().is_none()
                        && let Some(mut health) = self.0.health()
                    {
                        health.last_head = Some((began.elapsed(), Instant::now()));
                    }
                    answer
                }
            };
            match self.outcome(origin, endpoint, &answer).await {
                UrlOutcome::Yes => return self.finish_success(pending, (origin, endpoint), answer).await,
                outcome if round.add(origin, outcome, answer) => break,
                _ => {}
            }
        }
        self.finish_failure(pending, round)
    }

    /// The nearest zone that the upstream turned out to be in: where it leads may be no nearer.
    pub fn innermost_scope(&self) -> ip_scope::IpScope {
        self.0.auth_client.http.connector().innermost_scope()
    }

    /// Why the upstream as a whole is known to have no response, while it has none: [`UpstreamFailure::BreakerOpen`] or
    /// [`UpstreamFailure::Offline`].
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

    /// How long an asker with a cached copy waits for a response to this; `Err`: not at all, and nothing is sent.
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

    /// An asker with a cached copy waited so long for a request of this caller's, and no response came.
    pub fn record_timeout(&self, caller: &Caller, endpoint: &Endpoint, waited: Duration) {
        let Some(mut health) = self.0.health() else { return };
        let now = Instant::now();
        let changes = health
            .detector
            .record_timeout(caller.principal, endpoint, waited, now);
        self.0.apply_changes(&mut health, changes);
    }

    /// How the upstream is doing.
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

    /// How many circuit breakers are open, by the name of what they concern.
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

    /// A place among the requests to this upstream. Being queued is no failure, and lasts as long as the request that
    /// waits.
    pub async fn admit(&self, caller: &Caller, endpoint: &Endpoint) -> Result<Permit, Box<UpstreamResponse>> {
        let (alone, _waiter) = Waiters::with(caller.demand(endpoint));
        let waiters = caller.waiters.as_ref().unwrap_or(&alone);
        let learned = &self.0.learned;
        let places = match endpoint {
            Endpoint::Tags { .. } | Endpoint::Referrers { .. } => &learned.lists,
            Endpoint::Ping | Endpoint::Manifest { .. } | Endpoint::Blob { .. } => &learned.requests,
        };
        let place = places.acquire(&self.0.group, waiters);
        place
            .await
            .map_err(|refused| Box::new(UpstreamResponse::not_admitted(refused)))
    }

    /// The queues of requests: lists, and all others without the transfers of blobs.
    pub fn queues(&self) -> [&crate::queue::Queue; 2] {
        [&self.0.learned.requests, &self.0.learned.lists]
    }

    /// Requests under way at once, and as many blob transfers.
    pub fn downloads_max(&self) -> usize {
        self.0.downloads_max
    }

    /// What the answer of one URL comes down to.
    async fn outcome(&self, origin: &Origin, endpoint: &Endpoint, answer: &UpstreamResponse) -> UrlOutcome {
        let named = (self.0.name.as_str(), origin);
        self.0.served.outcome(named, endpoint, answer).await
    }

    /// A URL said yes: what follows for the others, and for the health of the upstream.
    async fn finish_success<T>(
        &self,
        pending: InFlightRequest<'_>,
        (origin, endpoint): (&Origin, &Endpoint),
        yes: T,
    ) -> T {
        pending.finish(RequestOutcome::Response);
        if self.0.urls.len() > 1 {
            self.0.served.record(&self.0.name, origin, endpoint).await;
        }
        yes
    }

    /// No URL said yes.
    fn finish_failure(&self, pending: InFlightRequest<'_>, round: FailoverRound) -> UpstreamResponse {
        let RoundResult {
            answer,
            is_unavailable,
            unavailable,
            is_sent,
        } = round.finish();
        if !is_sent {
            return answer;
        }
        if let Some(cause) = answer.failure().filter(|_| is_unavailable)
            // Other connections are in effect by now, of which this says nothing.
            && let Some(mut health) = self.0.health()
        {
            let now = Instant::now();
            health.last_failure = Some((cause, now));
            health.unavailable_urls = unavailable;
            health.last_detail.clone_from(&answer.detail);
            let detail = answer.detail.as_deref();
            if health.should_log(cause, detail, now) {
                tracing::warn!(upstream = self.0.name, %cause, detail, "unavailable");
            }
        }
        pending.finish(RequestOutcome::of(&answer, is_unavailable));
        answer
    }
}

impl Inner {
    fn observe(
        &self,
        sent: (&Endpoint, bool),
        answer: Option<&UpstreamResponse>,
        began: Instant,
        trace: &TraceContext,
    ) {
        self.observer
            .record(&self.name, sent, answer, began.elapsed(), trace);
    }

    /// Whether a HEAD of this would be answered by a GET, as this upstream is known to need.
    fn head_needs_get(&self, origin: &Origin, endpoint: &Endpoint) -> bool {
        let (now, quirks) = (Instant::now(), self.learned.quirks.at(origin));
        matches!(endpoint, Endpoint::Manifest { .. })
            && (quirks.has(Quirk::HeadRefused, now) || quirks.has(Quirk::NoDigest, now))
    }

    /// Keeps what an answer says about limits, and passes it on with the pause that follows.
    fn record_limits(
        &self,
        (origin, class): (&Origin, LimitClass),
        caller: &Caller,
        permit: SendPermit,
        answer: UpstreamResponse,
    ) -> UpstreamResponse {
        self.learned
            .limits
            .record(caller, &answer.rate_limit, Instant::now());
        // A pause that is there already is that of the token service.
        if let Some(cause) = answer.backoff_cause().filter(|_| answer.pause.is_none()) {
            let failed = (cause, answer.stated_wait);
            let pause = self
                .learned
                .limits
                .limited((origin, class), caller, permit, failed);
            return answer.with_pause(pause);
        }
        if answer.failure().is_none() {
            permit.not_limited();
        }
        answer
    }
}

/// Whether the pause within which this is the answer passes while the caller waits; returns when it has.
async fn pause_ended(answer: &UpstreamResponse, caller: &Caller) -> bool {
    match (&answer.pause, caller.wait_deadline) {
        (Some(pause), Some(until)) => pause.wait_until_open(until).await,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
