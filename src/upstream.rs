//! The network outwards: one [`Upstream`] per configured registry, asked by HEAD and GET.
//!
//! A caller gets what the registry *said* ([`Said`]): yes and which digest, absent, forbidden; or that it was silent,
//! and why ([`Cause`]). The three are never confused, for the first two are answers and only the last lets a held copy
//! be served. Tokens, redirects, retries, rate limits, odd registries and the breaker are dealt with in here.
//!
//! Deliberately not here: what to do with an answer (`policy`), keeping bytes (`store`), sharing a transfer
//! (`download`). Bodies are not verified; whoever keeps them hashes them.
//!
//! Reading order: `answer` (what can be said) → `proof` (when a 2xx is a yes) → `question` (HEAD and its substitutes) → `exchange` (credential,
//! challenge, token) → `token` → `client` (one request) → `line` (one connection) → `dial`, `tcp`, `tls`; `health` (which failures are known, and of what), `probe` (whether they are over), `limits`, `retry_after`, `quirk`, `state` (what outlives reloads), `route`,
//! `location`, `no_proxy`, `origin`, `target` (where redirects may lead) and `zone` are small and stand alone. Beside all that: `pass` (what is not asked by us but handed on),
//! `realm` (the same at a token service) and `tunnel` (what is not even read).

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use crate::oci::accept::Accept;
use crate::oci::cause::Cause;
use crate::oci::name::Repository;
use crate::oci::operation::Operation;
use crate::queue::{Place, Waiters};
use crate::trace_context::Trace;

pub mod answer;
mod client;
pub mod dial;
mod exchange;
mod fetched;
mod health;
mod limits;
mod line;
mod location;
mod no_proxy;
pub mod origin;
mod own;
pub mod pass;
mod probe;
mod proof;
mod question;
mod quirk;
mod realm;
mod redirected;
mod retry_after;
mod route;
mod settings;
mod state;
mod switch;
mod target;
mod tcp;
mod tls;
mod token;
pub mod tunnel;
mod urls;
pub mod zone;

pub use answer::{Answer, Said};
pub use dial::{Connector, Dial, DialError, Dialled, Dialling, Stream};
pub use fetched::{Address, Fetched, Part};
pub use health::{Kind, Scope, Wait};
pub use limits::{Allowance, Pause, Who};
pub use origin::{Origin, OriginError};
pub use own::{
    CredentialSource, DockerConfig, DockerConfigError, HelperName, HelperNameError, OwnCredential,
};
pub use quirk::Quirk;
pub use realm::{Issued, TokenReply};
pub use route::{ProxyChoice, ProxyError};
pub use settings::{Caller, Credential, FETCHES_MAX, Settings, SettingsError, Timeouts};
pub use state::LearnedState;
pub use switch::{Exchanged, Observer, Offline};
pub use target::{HostPattern, Limit, Network, NetworkError, RedirectRule, RedirectTarget};
pub use tls::{ClientCertificate, ClientCertificateError, TlsError};
pub use urls::Memory;

use client::Http;

use exchange::Exchange;
use health::{Asker, Ended, Failing, SHORT_WAIT};
use limits::{Lane, Turn};
use line::{Line, LineSettings};
use question::Question;
use route::Routes;
use state::{Connection, Learned, Pending};
use token::Tokens;
use urls::{Outcome, Reported, Round, Served};

/// How an upstream is doing, for the operator.
#[derive(Clone, Debug)]
pub struct State {
    /// `Some` while the circuit breaker of the upstream as a whole is open.
    pub open: Option<Failure>,
    /// All that has no response, the widest scope first; of repositories some.
    pub failures: Vec<Failure>,
    /// The last silence, and how long ago it was.
    pub last_silence: Option<(Cause, Duration)>,
    /// Its reason in words, with the host that failed.
    pub last_detail: Option<Arc<str>>,
    /// The last question that it answered without sending anything: how long that took, and how long ago it was.
    pub last_head: Option<(Duration, Duration)>,
    /// What it last said of its callers' allowances.
    pub allowances: Vec<Allowance>,
    /// What the registry does its own way.
    pub quirks: Vec<Quirk>,
    /// Requests under way, without the transfers of blobs.
    pub in_flight: usize,
    /// Requests that wait for a place.
    pub waiting: usize,
}

/// A part of an upstream that fails, for the operator.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What of it.
    pub scope: Scope,
    /// Why.
    pub cause: Cause,
    /// How long its circuit breaker has been open; `None`: it is suspected.
    pub open: Option<Duration>,
}

/// Repositories that fail, as told to the operator.
const FAILURES_TOLD_MAX: usize = 32;

/// One registry. Cheap to clone.
#[derive(Clone)]
pub struct Upstream(Arc<Inner>);

struct Inner {
    name: String,
    /// Its name as admission has it.
    group: Arc<str>,
    urls: Vec<Origin>,
    exchange: Exchange,
    passing: pass::Client,
    timeouts: Timeouts,
    manifest_bytes_max: usize,
    fetches_max: usize,
    served: Served,
    offline: Offline,
    observer: Observer,
    connection: Arc<Connection>,
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
    pub fn new(settings: Settings, connector: &Connector) -> Result<Upstream, SettingsError> {
        Self::over(&LearnedState::default(), settings, connector)
    }

    /// Sets an upstream up over what is known of it. Where other settings are in effect, [`Upstream::activate`] exchanges
    /// them for these.
    pub fn over(
        state: &LearnedState,
        settings: Settings,
        connector: &Connector,
    ) -> Result<Upstream, SettingsError> {
        let learned = Arc::clone(&state.0);
        let connection = learned.connection(&settings);
        if settings.urls.is_empty() {
            return Err(SettingsError::NoUrl);
        }
        let line = LineSettings {
            roots: &settings.roots,
            client_certificate: settings.client_certificate,
            routes: Routes::new(&settings.proxy)?,
            origins: settings.urls.clone(),
            hosts: settings.token_hosts.clone(),
            redirects: settings.redirects,
            patience: settings.timeouts.connect,
        };
        let names = own::Names::new(&settings.name, settings.hosts, settings.urls.first());
        let exchange = Exchange {
            http: Http::new(Line::new(connector, line)?),
            tokens: Tokens::new(
                Arc::clone(&learned.tokens),
                settings.token_hosts,
                settings.timeouts.token,
            ),
            own: learned.own(settings.credential, names),
            own_holder: Mutex::default(),
            headers_within: settings.timeouts.headers,
        };
        let passing = pass::client(exchange.http.line());
        let is_first = !learned.is_in_use();
        let upstream = Upstream(Arc::new(Inner {
            passing,
            group: settings.name.as_str().into(),
            name: settings.name,
            urls: settings.urls,
            exchange,
            timeouts: settings.timeouts,
            manifest_bytes_max: settings.manifest_bytes_max,
            fetches_max: settings.fetches_max,
            served: Served::new(settings.served),
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
        let own = self.0.exchange.own.as_ref().map_or(0, |own| own.serial());
        (self.0.connection.id, own)
    }

    /// What stands before the name of each repository at each of its URLs.
    pub fn repository_prefixes(&self) -> impl Iterator<Item = Option<&Repository>> {
        self.0.urls.iter().map(Origin::repository_prefix)
    }

    /// The name of a repository where it is another one there.
    pub fn names_there<'a>(&'a self, repository: &'a Repository) -> impl Iterator<Item = Repository> + 'a {
        let elsewhere = |url: &&Origin| url.repository_prefix().is_some();
        let urls = self.0.urls.iter().filter(elsewhere);
        urls.map(|url| url.name_of(repository))
    }

    /// What the upstream says about `operation` without sending it: which digest a tag names, whether a blob may be
    /// read. Asks also while a circuit breaker is open; an asker with a cached copy looks at [`Upstream::wait`] first.
    /// A rate limit is waited out as long as the caller waits.
    pub async fn head(&self, caller: &Caller, operation: &Operation, accept: &Accept) -> Answer {
        self.head_for(caller, operation, accept, false).await
    }

    /// The same for who pushes: a no to the HEAD is the answer, though a GET might say yes. What the registry itself
    /// takes for missing has to be pushed.
    pub async fn head_for_push(&self, caller: &Caller, operation: &Operation, accept: &Accept) -> Answer {
        self.head_for(caller, operation, accept, true).await
    }

    async fn head_for(
        &self,
        caller: &Caller,
        operation: &Operation,
        accept: &Accept,
        takes_heads_word: bool,
    ) -> Answer {
        loop {
            // Boxed, for the futures of the callers nest deeply.
            let answer = Box::pin(self.head_now(caller, operation, accept, takes_heads_word)).await;
            if !passes(&answer, caller).await {
                return answer;
            }
        }
    }

    async fn head_now(
        &self,
        caller: &Caller,
        operation: &Operation,
        accept: &Accept,
        takes_heads_word: bool,
    ) -> Answer {
        if let Some(cause) = self.0.offline.cause() {
            return Answer::silent(cause);
        }
        let _place = match self.admit(caller, operation).await {
            Ok(place) => place,
            Err(answer) => return *answer,
        };
        self.head_round(caller, (operation, accept), takes_heads_word)
            .await
    }

    /// The HEAD to one URL after the other, until one has the last word.
    async fn head_round(
        &self,
        caller: &Caller,
        (operation, accept): (&Operation, &Accept),
        takes_heads_word: bool,
    ) -> Answer {
        let pending = self.0.sent(Kind::of_request(operation, true), operation, caller);
        let mut round = Round::new(urls::Request::First);
        for origin in &self.0.urls {
            let lane = Lane::of(operation, self.0.answers_no_heads(origin, operation));
            let limits = &self.0.learned.limits;
            let answer = match limits.admit(origin, lane, caller, Instant::now()) {
                Err(pause) => Answer::paused(pause),
                Ok(turn) => {
                    let (began, trace) = (Instant::now(), caller.trace.within());
                    let mut question = self.question((origin, &pending), caller, (operation, accept), &trace);
                    question.takes_heads_word = takes_heads_word;
                    let answer = question.head().await;
                    self.0.tell((operation, true), Some(&answer), began, &trace);
                    let answer = self.0.note((origin, lane), caller, turn, answer);
                    if answer.silence().is_none()
                        && let Some(mut health) = self.0.health()
                    {
                        health.last_head = Some((began.elapsed(), Instant::now()));
                    }
                    answer
                }
            };
            match self.outcome(origin, operation, &answer).await {
                Outcome::Yes => return self.served(pending, (origin, operation), answer).await,
                outcome if round.take(origin, outcome, answer) => break,
                _ => {}
            }
        }
        self.ended(pending, round)
    }

    /// The nearest zone that the upstream turned out to be in: where it leads may be no nearer.
    pub fn nearest(&self) -> zone::Zone {
        self.0.exchange.http.line().nearest()
    }

    /// Why the upstream as a whole is known to have no response, while it has none: [`Cause::BreakerOpen`] or
    /// [`Cause::Offline`].
    pub fn silent_now(&self) -> Option<Cause> {
        if let Some(cause) = self.0.offline.cause() {
            return Some(cause);
        }
        self.0.health()?.detector.open().map(|_| Cause::BreakerOpen)
    }

    /// How long an asker with a cached copy waits for a response to this; `Err`: not at all, and nothing is sent.
    pub fn wait(
        &self,
        caller: &Caller,
        (operation, is_head): (&Operation, bool),
        budget: Duration,
    ) -> Result<Duration, Cause> {
        if let Some(cause) = self.0.offline.cause() {
            return Err(cause);
        }
        let asker = Asker {
            kind: Kind::of_request(operation, is_head),
            operation,
            principal: caller.principal,
            needs_token: self.0.exchange.needs_token(&self.0.urls, caller, operation),
        };
        let Some(mut health) = self.0.health() else {
            return Ok(budget);
        };
        let wait = health.detector.wait(&asker, budget, Instant::now());
        if wait != Wait::Budget {
            self.0.learned.start_probing(&mut health);
        }
        match wait {
            Wait::Budget => Ok(budget),
            Wait::Short => Ok(budget.min(SHORT_WAIT)),
            Wait::Nothing => Err(Cause::BreakerOpen),
        }
    }

    /// An asker with a cached copy waited so long for a request of this caller's, and no response came.
    pub fn expired(&self, caller: &Caller, operation: &Operation, waited: Duration) {
        let Some(mut health) = self.0.health() else { return };
        let now = Instant::now();
        let changes = health.detector.expired(caller.principal, operation, waited, now);
        self.0.took_in(&mut health, changes);
    }

    /// How the upstream is doing.
    pub fn state(&self) -> State {
        let now = Instant::now();
        let health = self.0.health();
        let health = health.as_deref();
        let ago = |at| now.saturating_duration_since(at);
        let told = |failing: Failing| Failure {
            scope: failing.scope,
            cause: failing.cause,
            open: failing.open_since.map(ago),
        };
        let detector = health.map(|health| &health.detector);
        let failures =
            detector.map(|detector| detector.failing().take(FAILURES_TOLD_MAX).map(told).collect());
        let learned = &self.0.learned;
        let mut quirks: Vec<_> = self
            .0
            .urls
            .iter()
            .flat_map(|origin| learned.quirks.at(origin).known(now))
            .collect();
        quirks.sort_unstable();
        quirks.dedup();
        State {
            open: detector.and_then(health::Detector::open).map(told),
            failures: failures.unwrap_or_default(),
            last_silence: health
                .and_then(|health| health.last_silence)
                .map(|(cause, at)| (cause, ago(at))),
            last_detail: health.and_then(|health| health.last_detail.clone()),
            last_head: health
                .and_then(|health| health.last_head)
                .map(|(took, at)| (took, ago(at))),
            allowances: learned.limits.allowances(now),
            quirks,
            in_flight: learned.questions.in_use() + learned.lists.in_use(),
            waiting: learned.questions.waiting() + learned.lists.waiting(),
        }
    }

    /// How many circuit breakers are open, by the name of what they concern.
    pub fn open_breakers(&self) -> Vec<(&'static str, u64)> {
        let names = std::iter::once(Scope::Connection.name()).chain(Kind::ALL.map(Kind::name));
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

    fn question<'a>(
        &'a self,
        (origin, pending): (&'a Origin, &'a Pending<'a>),
        caller: &'a Caller,
        (operation, accept): (&'a Operation, &'a Accept),
        trace: &'a Trace,
    ) -> Question<'a> {
        Question {
            exchange: &self.0.exchange,
            pending,
            quirks: self.0.learned.quirks.at(origin),
            origin,
            caller,
            operation,
            accept,
            manifest_bytes_max: self.0.manifest_bytes_max,
            trace,
            takes_heads_word: false,
        }
    }

    /// A place among the requests to this upstream. Being queued is no failure, and lasts as long as the request that
    /// waits.
    pub async fn admit(&self, caller: &Caller, operation: &Operation) -> Result<Place, Box<Answer>> {
        let (alone, _waiter) = Waiters::alone(caller.demand(operation));
        let waiters = caller.waiters.as_ref().unwrap_or(&alone);
        let learned = &self.0.learned;
        let places = match operation {
            Operation::Tags { .. } | Operation::Referrers { .. } => &learned.lists,
            Operation::Ping | Operation::Manifest { .. } | Operation::Blob { .. } => &learned.questions,
        };
        let place = places.acquire(&self.0.group, waiters);
        place.await.map_err(|refused| Box::new(Answer::unplaced(refused)))
    }

    /// The queues of requests: lists, and all others without the transfers of blobs.
    pub fn queues(&self) -> [&crate::queue::Queue; 2] {
        [&self.0.learned.questions, &self.0.learned.lists]
    }

    /// Requests under way at once, and as many blob transfers.
    pub fn fetches_max(&self) -> usize {
        self.0.fetches_max
    }

    /// What the answer of one URL comes down to.
    async fn outcome(&self, origin: &Origin, operation: &Operation, answer: &Answer) -> Outcome {
        let named = (self.0.name.as_str(), origin);
        self.0.served.outcome(named, operation, answer).await
    }

    /// A URL said yes: what follows for the others, and for the health of the upstream.
    async fn served<T>(&self, pending: Pending<'_>, (origin, operation): (&Origin, &Operation), yes: T) -> T {
        pending.ended(Ended::Response);
        if self.0.urls.len() > 1 {
            self.0.served.note(&self.0.name, origin, operation).await;
        }
        yes
    }

    /// No URL said yes.
    fn ended(&self, pending: Pending<'_>, round: Round) -> Answer {
        let Reported {
            answer,
            is_unavailable,
            unavailable,
            asked,
        } = round.end();
        if !asked {
            return answer;
        }
        if let Some(cause) = answer.silence().filter(|_| is_unavailable)
            // Other connections are in effect by now, of which this says nothing.
            && let Some(mut health) = self.0.health()
        {
            let now = Instant::now();
            health.last_silence = Some((cause, now));
            health.unavailable = unavailable;
            health.last_detail.clone_from(&answer.detail);
            let detail = answer.detail.as_deref();
            if health.is_news(cause, detail, now) {
                tracing::warn!(upstream = self.0.name, %cause, detail, "unavailable");
            }
        }
        pending.ended(Ended::of(&answer, is_unavailable));
        answer
    }
}

impl Inner {
    fn tell(&self, asked: (&Operation, bool), answer: Option<&Answer>, began: Instant, trace: &Trace) {
        self.observer
            .tell(&self.name, asked, answer, began.elapsed(), trace);
    }

    /// Whether a HEAD of this would be answered by a GET, as this upstream is known to need.
    fn answers_no_heads(&self, origin: &Origin, operation: &Operation) -> bool {
        let (now, quirks) = (Instant::now(), self.learned.quirks.at(origin));
        matches!(operation, Operation::Manifest { .. })
            && (quirks.has(Quirk::HeadRefused, now) || quirks.has(Quirk::NoDigest, now))
    }

    /// Keeps what an answer says about limits, and passes it on with the pause that follows.
    fn note(&self, (origin, lane): (&Origin, Lane), caller: &Caller, turn: Turn, answer: Answer) -> Answer {
        self.learned
            .limits
            .note(caller, &answer.rate_limit, Instant::now());
        // A pause that is there already is that of the token service.
        if let Some(cause) = answer.asks_to_wait().filter(|_| answer.pause.is_none()) {
            let told = (cause, answer.stated_wait);
            let pause = self.learned.limits.limited((origin, lane), caller, turn, told);
            return answer.within(pause);
        }
        if answer.silence().is_none() {
            turn.passed();
        }
        answer
    }
}

/// Whether the pause within which this is the answer passes while the caller waits; returns when it has.
async fn passes(answer: &Answer, caller: &Caller) -> bool {
    match (&answer.pause, caller.waits_until) {
        (Some(pause), Some(until)) => pause.passes(until).await,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
