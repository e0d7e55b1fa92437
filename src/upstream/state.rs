//! Learned state of an upstream, which outlives configuration reloads.
//!
//! The state is keyed by the upstream's name. A reload builds a new [`Upstream`] with new settings over the same
//! state, and [`Upstream::activate`] makes it the active one. Requests in flight finish on the connections of the old
//! one and count towards the same limits. State about one URL is keyed by that URL, so a reload may change the list
//! of URLs. Failures are tied to the connection settings: if these change, the failure state is reset.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::credentials::{CredentialProvider, CredentialSource, Names};
use super::health::{BreakerChange, FailureDetector, FailureScope, RequestKind, RequestOutcome};
use super::origin::Origin;
use super::proxy_rules::ProxyChoice;
use super::quirks::Quirks;
use super::rate_limit::RateLimits;
use super::redirect_rules::RedirectRule;
use super::settings::{Caller, Credential, Settings};
use super::tls::ClientCertificate;
use super::token::TokenCache;
use super::{Inner, Upstream, probe};
use crate::oci::endpoint::Endpoint;
use crate::oci::failure::UpstreamFailure;
use crate::queue::Queue;

/// Interval at which the same failure of an upstream is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Interval at which circuit breakers of repositories are logged, over all repositories: clients choose the names, so
/// their number is unbounded.
const REPOSITORY_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Permits for other requests per permit for lists.
const LIST_PERMIT_RATIO: usize = 8;

/// Learned state of one upstream. Clones share it.
#[derive(Clone, Default)]
pub struct LearnedState(pub(super) Arc<Learned>);

#[derive(Default)]
pub(super) struct Learned {
    pub(super) limits: RateLimits,
    pub(super) quirks: Quirks,
    pub(super) tokens: Arc<TokenCache>,
    pub(super) requests: Queue,
    /// Lists have a queue of their own, so that many slow lists do not delay tags.
    pub(super) lists: Queue,
    health: Mutex<Health>,
    /// Notified when the next probe may have become due earlier.
    changed: Arc<Notify>,
    active: Mutex<Active>,
}

/// The active settings of an upstream.
#[derive(Default)]
struct Active {
    upstream: Weak<Inner>,
    connection: Option<Arc<ConnectionSettings>>,
    credentials: Option<Arc<CredentialProvider>>,
}

#[derive(Default)]
pub(super) struct Health {
    pub(super) detector: FailureDetector,
    pub(super) last_failure: Option<(UpstreamFailure, Instant)>,
    /// Description of the last failure.
    pub(super) last_detail: Option<Arc<str>>,
    /// The failure that was logged last.
    logged: Option<(UpstreamFailure, Option<Arc<str>>, Instant)>,
    pub(super) last_head: Option<(Duration, Instant)>,
    /// The URLs that failed when the upstream was last unavailable.
    pub(super) unavailable_urls: Vec<Origin>,
    /// Principal of callers without a credential; probes count towards their rate limits.
    anonymous: [u8; 32],
    /// Principal of callers that use the configured credential.
    configured: [u8; 32],
    repository_logged: Option<Instant>,
    prober: Option<AbortHandle>,
    /// Id of the connection settings that this health belongs to.
    connection: u64,
}

impl Health {
    /// Whether to log a failure that the operator can fix and that was not logged lately.
    pub(super) fn should_log(&mut self, cause: UpstreamFailure, detail: Option<&str>, now: Instant) -> bool {
        if !matches!(
            cause,
            UpstreamFailure::Tls(_) | UpstreamFailure::Redirects(_) | UpstreamFailure::TokenService
        ) {
            return false;
        }
        let should_log = self.logged.as_ref().is_none_or(|(last, reason, at)| {
            *last != cause
                || reason.as_deref() != detail
                || now.saturating_duration_since(*at) >= LOG_INTERVAL
        });
        if should_log {
            self.logged = Some((cause, detail.map(Arc::from), now));
        }
        should_log
    }

    fn may_log_repository(&mut self, now: Instant) -> bool {
        let is_due = |at| now.saturating_duration_since(at) >= REPOSITORY_LOG_INTERVAL;
        let may_log = self.repository_logged.is_none_or(is_due);
        if may_log {
            self.repository_logged = Some(now);
        }
        may_log
    }
}

/// The settings that determine where an upstream is and how it is reached.
pub(super) struct ConnectionSettings {
    /// Unique in this process.
    pub(super) id: u64,
    urls: Vec<Origin>,
    roots: Vec<Vec<u8>>,
    proxy: ProxyChoice,
    token_hosts: Vec<String>,
    redirects: Vec<RedirectRule>,
    client_certificate: Option<ClientCertificate>,
    connect_timeout: Duration,
}

impl ConnectionSettings {
    pub(super) fn of(settings: &Settings) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        // Destructured without `..`, so that a new setting must be listed here.
        let Settings {
            name: _,
            urls,
            roots,
            proxy,
            credential: _,
            hosts: _,
            token_hosts,
            redirects,
            client_certificate,
            timeouts,
            manifest_bytes_max: _,
            downloads_max: _,
            offline: _,
            observer: _,
            served: _,
        } = settings;
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            urls: urls.clone(),
            roots: roots.clone(),
            proxy: proxy.clone(),
            token_hosts: token_hosts.clone(),
            redirects: redirects.clone(),
            client_certificate: client_certificate.clone(),
            connect_timeout: timeouts.connect,
        }
    }

    /// Whether the registry can tell this cache from other clients before any credential.
    pub(super) fn has_client_certificate(&self) -> bool {
        self.client_certificate.is_some()
    }

    fn is_same(&self, other: &Self) -> bool {
        self.urls == other.urls
            && self.roots == other.roots
            && self.proxy == other.proxy
            && self.token_hosts == other.token_hosts
            && self.redirects == other.redirects
            && self.client_certificate == other.client_certificate
            && self.connect_timeout == other.connect_timeout
    }
}

impl Learned {
    /// The active connection settings if they equal the new ones, else the new ones.
    pub(super) fn connection(&self, settings: &Settings) -> Arc<ConnectionSettings> {
        let new = ConnectionSettings::of(settings);
        let active = self.active.lock().connection.clone();
        active
            .filter(|active| active.is_same(&new))
            .unwrap_or_else(|| Arc::new(new))
    }

    /// The active credential provider with its cache if the source is the same, else a new one.
    pub(super) fn credentials(
        &self,
        source: Option<CredentialSource>,
        names: Names,
    ) -> Option<Arc<CredentialProvider>> {
        let source = source?;
        let active = self.active.lock().credentials.clone();
        active
            .filter(|active| active.is_from(&source, &names))
            .or_else(|| Some(Arc::new(CredentialProvider::new(source, names))))
    }

    /// Whether settings are or were active.
    pub(super) fn has_been_active(&self) -> bool {
        self.active.lock().connection.is_some()
    }

    /// The health under these connection settings. `None` if others are active.
    pub(super) fn health(&self, connection: &ConnectionSettings) -> Option<MutexGuard<'_, Health>> {
        let health = self.health.lock();
        (health.connection == connection.id).then_some(health)
    }

    /// Starts the prober if a scope fails and none is running.
    pub(super) fn start_probing(self: &Arc<Self>, health: &mut Health) {
        let is_running = health.prober.as_ref().is_some_and(|prober| !prober.is_finished());
        if is_running {
            self.changed.notify_one();
        } else if health.detector.next_probe(Instant::now()).is_some() {
            let probes = probe::run_probes(Arc::downgrade(self), Arc::clone(&self.changed));
            health.prober = Some(tokio::spawn(probes).abort_handle());
        }
    }

    /// The active upstream.
    pub(super) fn active_upstream(&self) -> Option<Arc<Inner>> {
        self.active.lock().upstream.upgrade()
    }

    /// The next probe and when it is due. Without one, the prober ends.
    pub(super) fn next_probe(&self, inner: &Inner) -> Option<(Instant, FailureScope)> {
        let mut health = self.health(&inner.connection)?;
        let next = health.detector.next_probe(Instant::now());
        if next.is_none() {
            health.prober = None;
        }
        next
    }

    /// Marks a probe as sent and returns the operation to send.
    pub(super) fn take_probe(&self, inner: &Inner, scope: &FailureScope) -> Option<Endpoint> {
        let mut health = self.health(&inner.connection)?;
        health.detector.take_probe(scope, Instant::now())
    }

    /// Records that the prober has ended, even if a scope still fails.
    pub(super) fn probing_stopped(&self) {
        self.health.lock().prober = None;
    }

    /// Principal of callers with this credential, unless it is a client's own.
    pub(super) fn principal_for(&self, credential: &Credential) -> [u8; 32] {
        let health = self.health.lock();
        match credential {
            Credential::Configured => health.configured,
            Credential::Anonymous | Credential::Client(_) => health.anonymous,
        }
    }
}

impl Drop for Learned {
    fn drop(&mut self) {
        let health = self.health.get_mut();
        if let Some(prober) = health.prober.take() {
            prober.abort();
        }
    }
}

/// Guard of a sent request in failure detection. If dropped without a result, the request is recorded as cancelled.
pub(super) struct InFlightRequest<'a> {
    inner: &'a Inner,
    id: Option<u64>,
}

impl InFlightRequest<'_> {
    /// Pauses or resumes the request while a credential is looked up and nothing is in flight.
    pub(super) fn set_paused(&self, is_paused: bool) {
        self.change(|detector, id, now| {
            detector.set_paused(id, is_paused, now);
            Vec::new()
        });
    }

    /// The request now waits for the token service.
    pub(super) fn waiting_for_token(&self) {
        self.change(|detector, id, now| {
            detector.waiting_for_token(id, now);
            Vec::new()
        });
    }

    /// Records the outcome of the token request.
    pub(super) fn token_finished(&self, ended: RequestOutcome) {
        self.change(|detector, id, now| detector.token_finished(id, ended, now));
    }

    /// Records the outcome of the request.
    pub(super) fn finish(mut self, ended: RequestOutcome) {
        self.change(|detector, id, now| detector.finish(id, ended, now));
        self.id = None;
    }

    fn change(&self, change: impl FnOnce(&mut FailureDetector, u64, Instant) -> Vec<BreakerChange>) {
        if let (Some(id), Some(mut health)) = (self.id, self.inner.health()) {
            let changes = change(&mut health.detector, id, Instant::now());
            self.inner.apply_changes(&mut health, changes);
        }
    }
}

impl Drop for InFlightRequest<'_> {
    fn drop(&mut self) {
        if let (Some(id), Some(mut health)) = (self.id, self.inner.health()) {
            health.detector.cancel(id);
        }
    }
}

impl Inner {
    /// `None` if other connection settings are active.
    pub(super) fn health(&self) -> Option<MutexGuard<'_, Health>> {
        self.learned.health(&self.connection)
    }

    /// Records that a request is sent.
    pub(super) fn sent(
        &self,
        kind: RequestKind,
        endpoint: &Endpoint,
        caller: &Caller,
    ) -> InFlightRequest<'_> {
        let id = self.health().map(|mut health| {
            match caller.credential {
                Credential::Anonymous => health.anonymous = caller.principal,
                Credential::Configured => health.configured = caller.principal,
                Credential::Client(_) => {}
            }
            health
                .detector
                .sent(kind, endpoint, caller.principal, Instant::now())
        });
        InFlightRequest { inner: self, id }
    }

    /// A probe received a response in this scope: closes its circuit breaker.
    pub(super) fn recovered(&self, scope: &FailureScope) {
        if let Some(mut health) = self.health() {
            let changes = health.detector.recovered(scope);
            self.apply_changes(&mut health, changes);
        }
    }

    /// A probe that started at `began` ended, and its response did not close this scope.
    pub(super) fn probe_ended(&self, scope: &FailureScope, began: Instant) {
        if let Some(mut health) = self.health() {
            health.detector.probe_ended(scope, began);
        }
    }

    /// Logs circuit breakers that opened or closed, and starts probing.
    pub(super) fn apply_changes(&self, health: &mut Health, changes: Vec<BreakerChange>) {
        for BreakerChange { scope, opened } in changes {
            if matches!(scope, FailureScope::Repository(..)) && !health.may_log_repository(Instant::now()) {
                continue;
            }
            let (upstream, detail) = (&*self.name, health.last_detail.as_deref());
            if let Some(cause) = opened {
                tracing::warn!(upstream, %scope, %cause, detail, "circuit breaker opened");
            } else {
                tracing::info!(upstream, %scope, "circuit breaker closed");
            }
        }
        self.learned.start_probing(health);
    }
}

impl Upstream {
    /// Activates these settings over the upstream's state. Requires a tokio runtime if a scope fails.
    pub fn activate(&self) {
        let (inner, learned) = (&self.0, &self.0.learned);
        let own = inner.auth_client.credentials.clone();
        if let Some(own) = &own {
            own.check_soon();
        }
        learned
            .limits
            .set_configured_serial(own.as_ref().map_or(0, |own| own.serial()));
        learned.requests.resize(inner.downloads_max);
        learned
            .lists
            .resize(inner.downloads_max.div_ceil(LIST_PERMIT_RATIO));
        *learned.active.lock() = Active {
            upstream: Arc::downgrade(inner),
            connection: Some(Arc::clone(&inner.connection)),
            credentials: own,
        };
        let mut health = learned.health.lock();
        if health.connection != inner.connection.id {
            health.connection = inner.connection.id;
            health.detector = FailureDetector::default();
            (health.last_failure, health.last_head) = (None, None);
            (health.last_detail, health.logged) = (None, None);
            learned.tokens.record_realm(None, false);
            return;
        }
        learned.start_probing(&mut health);
    }
}
