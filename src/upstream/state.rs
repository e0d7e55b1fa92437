//! State of an upstream, learned from its responses, which outlives reloads of the configuration.
//!
//! It belongs to the upstream's name. A reload builds a new [`Upstream`] from the new settings over the same state, and
//! [`Upstream::activate`] puts it into effect. Requests under way finish on the connections of the old one and count in
//! the same limits. What was learned of one address is kept by that address, so a reload that changes the list of urls
//! does not confuse two of them. Failures are a statement about the connection settings: other ones begin without.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

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

/// How often the same reason for which an upstream is unavailable is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How often the circuit breaker of a repository is logged, whichever it is: clients choose the names.
const REPOSITORY_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// One place for lists to so many for other requests.
const LIST_PERMIT_RATIO: usize = 8;

/// The state of one upstream. Clones are the same state.
#[derive(Clone, Default)]
pub struct LearnedState(pub(super) Arc<Learned>);

#[derive(Default)]
pub(super) struct Learned {
    pub(super) limits: RateLimits,
    pub(super) quirks: Quirks,
    pub(super) tokens: Arc<TokenCache>,
    pub(super) requests: Queue,
    /// Lists have places of their own, so that however many there are keep no tag waiting.
    pub(super) lists: Queue,
    health: Mutex<Health>,
    /// Notified when a probe may be due earlier.
    changed: Arc<Notify>,
    active: Mutex<Active>,
}

/// What is in effect now.
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
    /// Its reason in words.
    pub(super) last_detail: Option<Arc<str>>,
    /// The reason that was logged last.
    logged: Option<(UpstreamFailure, Option<Arc<str>>, Instant)>,
    pub(super) last_head: Option<(Duration, Instant)>,
    /// The URLs that were unavailable when the upstream was so last.
    pub(super) unavailable_urls: Vec<Origin>,
    /// The principal of callers without a credential, whose limits a probe keeps to …
    anonymous: [u8; 32],
    /// … and that of callers with the proxy's own.
    configured: [u8; 32],
    repository_logged: Option<Instant>,
    prober: Option<AbortHandle>,
    /// Whose health it is.
    connection: u64,
}

impl Health {
    /// Whether the operator has something to mend and was not told of it lately.
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

/// The settings that decide where an upstream is and whether it can be reached.
pub(super) struct ConnectionSettings {
    /// Tells it from every other of this process.
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
        // Without `..`: a new setting is either named here or is known to change nothing of what was learned.
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
    /// The connection settings in effect if these are the same, else these.
    pub(super) fn connection(&self, settings: &Settings) -> Arc<ConnectionSettings> {
        let new = ConnectionSettings::of(settings);
        let active = self.active().connection.clone();
        active
            .filter(|active| active.is_same(&new))
            .unwrap_or_else(|| Arc::new(new))
    }

    /// The own credentials in effect, with all that is cached of them, if they come from the same source; else new ones.
    pub(super) fn credentials(
        &self,
        source: Option<CredentialSource>,
        names: Names,
    ) -> Option<Arc<CredentialProvider>> {
        let source = source?;
        let active = self.active().credentials.clone();
        active
            .filter(|active| active.is_from(&source, &names))
            .or_else(|| Some(Arc::new(CredentialProvider::new(source, names))))
    }

    /// Whether some settings are in effect, or were.
    pub(super) fn has_been_active(&self) -> bool {
        self.active().connection.is_some()
    }

    fn active(&self) -> MutexGuard<'_, Active> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The health of who has these connection settings; `None` if others are in effect by now.
    pub(super) fn health(&self, connection: &ConnectionSettings) -> Option<MutexGuard<'_, Health>> {
        // Every change under this lock is complete in one statement; a panic elsewhere leaves nothing half done.
        let health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        (health.connection == connection.id).then_some(health)
    }

    /// Probes what has no response, if something has none.
    pub(super) fn start_probing(self: &Arc<Self>, health: &mut Health) {
        let is_running = health.prober.as_ref().is_some_and(|prober| !prober.is_finished());
        if is_running {
            self.changed.notify_one();
        } else if health.detector.next_probe(Instant::now()).is_some() {
            let probes = probe::run_probes(Arc::downgrade(self), Arc::clone(&self.changed));
            health.prober = Some(tokio::spawn(probes).abort_handle());
        }
    }

    /// The settings in effect.
    pub(super) fn active_upstream(&self) -> Option<Arc<Inner>> {
        self.active().upstream.upgrade()
    }

    /// The probe that is due next, and when. Without one, the probing ends.
    pub(super) fn next_probe(&self, inner: &Inner) -> Option<(Instant, FailureScope)> {
        let mut health = self.health(&inner.connection)?;
        let next = health.detector.next_probe(Instant::now());
        if next.is_none() {
            health.prober = None;
        }
        next
    }

    /// A probe is sent: for what.
    pub(super) fn take_probe(&self, inner: &Inner, scope: &FailureScope) -> Option<Endpoint> {
        let mut health = self.health(&inner.connection)?;
        health.detector.take_probe(scope, Instant::now())
    }

    /// The probing ends, whatever has no response.
    pub(super) fn probing_stopped(&self) {
        self.any_health().prober = None;
    }

    /// The principal of those who show this, where it is not a client's own.
    pub(super) fn principal_for(&self, credential: &Credential) -> [u8; 32] {
        let health = self.any_health();
        match credential {
            Credential::Configured => health.configured,
            Credential::Anonymous | Credential::Client(_) => health.anonymous,
        }
    }

    fn any_health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Learned {
    fn drop(&mut self) {
        let health = self.health.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(prober) = health.prober.take() {
            prober.abort();
        }
    }
}

/// A request that was sent, as the detection of failures sees it. Dropped without a word, nothing is known of its
/// response.
pub(super) struct InFlightRequest<'a> {
    inner: &'a Inner,
    id: Option<u64>,
}

impl InFlightRequest<'_> {
    /// A credential is looked up before anything is sent, or was.
    pub(super) fn set_paused(&self, is_paused: bool) {
        self.change(|detector, id, now| {
            detector.set_paused(id, is_paused, now);
            Vec::new()
        });
    }

    /// A token is fetched first.
    pub(super) fn waiting_for_token(&self) {
        self.change(|detector, id, now| {
            detector.waiting_for_token(id, now);
            Vec::new()
        });
    }

    /// What became of the request for a token.
    pub(super) fn token_finished(&self, ended: RequestOutcome) {
        self.change(|detector, id, now| detector.token_finished(id, ended, now));
    }

    /// What became of the request.
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
    /// `None` where other connection settings are in effect by now.
    pub(super) fn health(&self) -> Option<MutexGuard<'_, Health>> {
        self.learned.health(&self.connection)
    }

    /// A request is sent.
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

    /// A probe found a scope alive.
    pub(super) fn recovered(&self, scope: &FailureScope) {
        if let Some(mut health) = self.health() {
            let changes = health.detector.recovered(scope);
            self.apply_changes(&mut health, changes);
        }
    }

    /// A probe that began then has ended, and this was not what its response closed.
    pub(super) fn probe_ended(&self, scope: &FailureScope, began: Instant) {
        if let Some(mut health) = self.health() {
            health.detector.probe_ended(scope, began);
        }
    }

    /// What follows from a change of the health.
    pub(super) fn apply_changes(&self, health: &mut Health, changes: Vec<BreakerChange>) {
        for BreakerChange { scope, opened } in changes {
            if matches!(scope, FailureScope::Repository(..)) && !health.may_log_repository(Instant::now()) {
                continue;
            }
            let (upstream, detail) = (&self.name, health.last_detail.as_deref());
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
    /// Puts these settings into effect over the state of the upstream. Needs a runtime if something has no response.
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
        *learned.active() = Active {
            upstream: Arc::downgrade(inner),
            connection: Some(Arc::clone(&inner.connection)),
            credentials: own,
        };
        let mut health = learned.health.lock().unwrap_or_else(PoisonError::into_inner);
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
