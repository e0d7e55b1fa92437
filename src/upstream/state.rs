//! State of an upstream, learned from its responses, which outlives reloads of the configuration.
//!
//! It belongs to the upstream's name. A reload builds a new [`Upstream`] from the new settings over the same state, and
//! [`Upstream::activate`] puts it into effect. Requests under way finish on the connections of the old one and count in
//! the same limits. What was learned of one address is kept by that address, so a reload that changes the list of urls
//! does not confuse two of them. An open breaker is a statement about the connection settings: other ones begin closed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::breaker::{self, Breaker};
use super::limits::Limits;
use super::origin::Origin;
use super::own::{CredentialSource, Names, Own};
use super::quirk::Quirks;
use super::route::ProxyChoice;
use super::settings::Settings;
use super::target::RedirectRule;
use super::tls::ClientCertificate;
use super::token::TokenCache;
use super::{Inner, Upstream};
use crate::oci::cause::Cause;
use crate::queue::Queue;

/// How often the same reason for which an upstream is unavailable is logged.
const LOGGED_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// The state of one upstream. Clones are the same state.
#[derive(Clone, Default)]
pub struct LearnedState(pub(super) Arc<Learned>);

#[derive(Default)]
pub(super) struct Learned {
    pub(super) limits: Limits,
    pub(super) quirks: Quirks,
    pub(super) tokens: Arc<TokenCache>,
    pub(super) questions: Queue,
    health: Mutex<Health>,
    active: Mutex<Active>,
}

/// What is in effect now.
#[derive(Default)]
struct Active {
    upstream: Weak<Inner>,
    connection: Option<Arc<Connection>>,
    own: Option<Arc<Own>>,
}

#[derive(Default)]
pub(super) struct Health {
    pub(super) breaker: Breaker,
    pub(super) last_silence: Option<(Cause, Instant)>,
    /// Its reason in words.
    pub(super) last_detail: Option<Arc<str>>,
    /// The reason that was logged last.
    logged: Option<(Cause, Option<Arc<str>>, Instant)>,
    pub(super) last_head: Option<(Duration, Instant)>,
    /// The URLs that were unavailable when the upstream was so last.
    pub(super) unavailable: Vec<Origin>,
    probe: Option<AbortHandle>,
    /// Whose health it is.
    connection: u64,
}

impl Health {
    /// Whether the operator has something to mend and was not told of it lately.
    pub(super) fn is_news(&mut self, cause: Cause, detail: Option<&str>, now: Instant) -> bool {
        if !matches!(cause, Cause::Tls(_) | Cause::Redirects(_) | Cause::TokenService) {
            return false;
        }
        let is_news = self.logged.as_ref().is_none_or(|(last, reason, at)| {
            *last != cause
                || reason.as_deref() != detail
                || now.saturating_duration_since(*at) >= LOGGED_AGAIN_AFTER
        });
        if is_news {
            self.logged = Some((cause, detail.map(Arc::from), now));
        }
        is_news
    }
}

/// The settings that decide where an upstream is and whether it can be reached.
pub(super) struct Connection {
    /// Tells it from every other of this process.
    pub(super) id: u64,
    urls: Vec<Origin>,
    roots: Vec<Vec<u8>>,
    proxy: ProxyChoice,
    token_hosts: Vec<String>,
    redirects: Vec<RedirectRule>,
    client_certificate: Option<ClientCertificate>,
    connect_within: Duration,
}

impl Connection {
    pub(super) fn of(settings: &Settings) -> Self {
        static MADE: AtomicU64 = AtomicU64::new(1);
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
            fetches_max: _,
            offline: _,
            observer: _,
            served: _,
        } = settings;
        Self {
            id: MADE.fetch_add(1, Ordering::Relaxed),
            urls: urls.clone(),
            roots: roots.clone(),
            proxy: proxy.clone(),
            token_hosts: token_hosts.clone(),
            redirects: redirects.clone(),
            client_certificate: client_certificate.clone(),
            connect_within: timeouts.connect,
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        self.urls == other.urls
            && self.roots == other.roots
            && self.proxy == other.proxy
            && self.token_hosts == other.token_hosts
            && self.redirects == other.redirects
            && self.client_certificate == other.client_certificate
            && self.connect_within == other.connect_within
    }
}

impl Learned {
    /// The connection settings in effect if these are the same, else these.
    pub(super) fn connection(&self, settings: &Settings) -> Arc<Connection> {
        let new = Connection::of(settings);
        let active = self.active().connection.clone();
        active
            .filter(|active| active.is_same(&new))
            .unwrap_or_else(|| Arc::new(new))
    }

    /// The own credentials in effect, with all that is cached of them, if they come from the same source; else new ones.
    pub(super) fn own(&self, source: Option<CredentialSource>, names: Names) -> Option<Arc<Own>> {
        let source = source?;
        let active = self.active().own.clone();
        active
            .filter(|active| active.is_from(&source, &names))
            .or_else(|| Some(Arc::new(Own::new(source, names))))
    }

    /// Whether some settings are in effect, or were.
    pub(super) fn is_in_use(&self) -> bool {
        self.active().connection.is_some()
    }

    fn active(&self) -> MutexGuard<'_, Active> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The health of who has these connection settings; `None` if others are in effect by now.
    pub(super) fn health(&self, connection: &Connection) -> Option<MutexGuard<'_, Health>> {
        // Every change under this lock is complete in one statement; a panic elsewhere leaves nothing half done.
        let health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        (health.connection == connection.id).then_some(health)
    }

    /// Starts the probe of this opening of the breaker.
    pub(super) fn start_probe(self: &Arc<Self>, health: &mut Health, opening: u64) {
        let probe = tokio::spawn(probe(Arc::downgrade(self), opening));
        if let Some(earlier) = health.probe.replace(probe.abort_handle()) {
            earlier.abort();
        }
    }

    fn open(&self, opening: u64) -> Option<breaker::Open> {
        let health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        health.breaker.open().filter(|_| health.breaker.awaits(opening))
    }
}

impl Drop for Learned {
    fn drop(&mut self) {
        let health = self.health.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(probe) = health.probe.take() {
            probe.abort();
        }
    }
}

impl Upstream {
    /// Puts these settings into effect over the state of the upstream. Needs a runtime if the breaker is open.
    pub fn activate(&self) {
        let (inner, learned) = (&self.0, &self.0.learned);
        let own = inner.exchange.own.clone();
        if let Some(own) = &own {
            own.look_again();
        }
        learned.limits.set_own(own.as_ref().map_or(0, |own| own.serial()));
        learned.questions.resize(inner.fetches_max);
        *learned.active() = Active {
            upstream: Arc::downgrade(inner),
            connection: Some(Arc::clone(&inner.connection)),
            own,
        };
        let mut health = learned.health.lock().unwrap_or_else(PoisonError::into_inner);
        if health.connection != inner.connection.id {
            health.connection = inner.connection.id;
            health.breaker.answer();
            (health.last_silence, health.last_head) = (None, None);
            (health.last_detail, health.logged) = (None, None);
            learned.tokens.note_realm(None, false);
            return;
        }
        let is_probed = health.probe.as_ref().is_some_and(|probe| !probe.is_finished());
        if let Some(opening) = health.breaker.opening().filter(|_| !is_probed) {
            learned.start_probe(&mut health, opening);
        }
    }
}

/// Asks ever more rarely until the upstream is back, by this or by a caller's success, or is no longer configured.
async fn probe(learned: Weak<Learned>, opening: u64) {
    for failed in 0_u32.. {
        tokio::time::sleep(breaker::backoff(failed)).await;
        let Some(learned) = learned.upgrade() else { return };
        let Some(open) = learned.open(opening) else { return };
        let active = learned.active().upstream.upgrade();
        let Some(inner) = active else { return };
        // Switched off by the operator: not even a probe goes out.
        if !inner.offline.is_on() && inner.is_back(open.cause).await {
            if let Some(mut health) = learned.health(&inner.connection) {
                health.breaker.answer();
            }
            tracing::info!(upstream = inner.name, "answers again");
            return;
        }
    }
}
