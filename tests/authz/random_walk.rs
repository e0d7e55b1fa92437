//! Random walk. After each step, every response is checked against the model.

use std::collections::BTreeMap;

use ifnewer::oci::{Digest, UpstreamFailure};
use ifnewer::policy::min_age::AgeLimit;
use ifnewer::policy::refresh::RefreshPolicy;
use ifnewer::policy::rules::{EffectivePolicy, PolicyOverrides, Rules};
use ifnewer::policy::{OnNotFound, Policy};
use tokio::task::JoinSet;

use super::cache::{Cache, ClientRequest, Got, PROVEN, SHARED};
use super::model::{Claim, GRANT, OFFLINE_GRANT, entitles};
use super::registry::{Condition, No, Registry, RegistryResponse, jump, now};
use std::sync::Arc;
use std::time::Duration;

pub const USERS: [&str; 3] = ["alice", "bob", "eve"];
pub const REPOSITORIES: [&str; 7] = [
    "pub/one",
    "acme/app",
    "acme/kept",
    "acme/never",
    "acme/present",
    "acme/fresh",
    "evil/app",
];
pub const TAGS: [&str; 3] = ["1", "2", "gone"];

/// 10,000 steps in memory and a shorter walk on a disk; more on request.
pub fn steps(usual: usize) -> usize {
    let wanted = std::env::var("IFNEWER_MODEL_STEPS")
        .ok()
        .and_then(|steps| steps.parse().ok());
    wanted.map_or(usual, |wanted: usize| wanted.max(usual))
}

pub fn seed() -> u64 {
    std::env::var("IFNEWER_MODEL_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(7)
}

#[tokio::test(start_paused = true)]
async fn client_never_receives_unauthorized_content() {
    let registry = stocked();
    let mut walk = Walk::new(&registry, Cache::new(&registry, rules(false)), seed());
    walk.run(steps(10_000)).await;
    walk.covered();
}

#[tokio::test(start_paused = true)]
async fn restarts_open_nothing_unauthorized() {
    let registry = stocked();
    let mut walk = Walk::new(&registry, Cache::on_disk(&registry, rules(false)), seed() + 1);
    walk.run(steps(1_500)).await;
}

#[tokio::test(start_paused = true)]
async fn fresh_and_local_tokens_open_nothing_unauthorized() {
    let registry = stocked();
    let mut walk = Walk::new(
        &registry,
        Cache::giving_tokens(&registry, rules(false)),
        seed() + 2,
    );
    walk.gives_tokens = true;
    walk.run(steps(6_000)).await;
    let served = walk.counts.get("served by its account alone in an outage");
    assert!(served.is_some_and(|times| *times > 25), "{:#?}", walk.counts);
    let refused = walk.counts.get("denied a local token in an outage");
    assert!(refused.is_some_and(|times| *times > 50), "{:#?}", walk.counts);
}

/// The policy of images that no rule covers.
pub fn default_policy() -> EffectivePolicy {
    EffectivePolicy {
        name: Arc::from("default"),
        policy: Policy::IfNewer,
        max_age: Duration::ZERO,
        stale_if_error: None,
        revalidate_timeout: Duration::from_secs(2),
        on_not_found: OnNotFound::Refuse,
        grant_ttl: GRANT,
        grant_ttl_offline: OFFLINE_GRANT,
        prefetch: false,
        refresh: RefreshPolicy::OFF,
        age_limit: AgeLimit::OFF,
    }
}

/// `sealed`: policy `never` for `acme/never`; otherwise it is filled like any other.
pub fn rules(sealed: bool) -> Rules {
    let default = default_policy();
    let of = |images: &str, changes: PolicyOverrides| (vec![images.parse().unwrap()], changes);
    let with_policy = |policy| PolicyOverrides {
        policy: Some(policy),
        ..PolicyOverrides::default()
    };
    let rules = vec![
        of(
            "registry.test/acme/never",
            with_policy(if sealed { Policy::Never } else { Policy::IfNewer }),
        ),
        of("registry.test/acme/present", with_policy(Policy::IfNotPresent)),
        of(
            "registry.test/acme/fresh",
            PolicyOverrides {
                max_age: Some(Duration::from_secs(60)),
                prefetch: Some(true),
                ..PolicyOverrides::default()
            },
        ),
        of(
            "registry.test/acme/kept",
            PolicyOverrides {
                on_not_found: Some(OnNotFound::ServeStale),
                ..PolicyOverrides::default()
            },
        ),
    ];
    let upstreams = [PROVEN, SHARED].map(|name| (Arc::from(name), PolicyOverrides::default()));
    Rules::new(default, upstreams, rules).unwrap()
}

pub fn stocked() -> Registry {
    let registry = Registry::new();
    registry.user("service", "service-secret");
    for user in USERS {
        registry.user(user, &format!("{user}-secret"));
        registry.bearer(user);
    }
    for repository in REPOSITORIES {
        registry.lets("service", repository);
        for tag in TAGS {
            registry.push(repository, tag, &format!("first {tag}"), &[40, 90_000]);
        }
        if repository.starts_with("acme/") {
            registry.lets("alice", repository);
        }
    }
    registry.state().public.insert("pub/one".to_owned());
    registry.state().public.insert("evil/app".to_owned());
    let private = registry.state().shelves["acme/app"].tags["1"];
    registry.names_what_is_in("evil/app", "1", "acme/app", private);
    for user in USERS {
        registry
            .state()
            .lists
            .insert((user.to_owned(), "acme/app".to_owned()));
    }
    registry
}

/// xorshift64*: the same walk for the same seed on every machine.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % sides
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.roll(of.len())]
    }
}

struct Walk {
    registry: Registry,
    cache: Arc<Cache>,
    dice: Dice,
    pushes: usize,
    /// All digests with their bytes.
    bytes: BTreeMap<Digest, bytes::Bytes>,
    /// Half of the clients fetch a token for each pull.
    gives_tokens: bool,
    /// As [`rules`] has it.
    is_sealed: bool,
    /// Number of steps by result.
    counts: BTreeMap<String, usize>,
    done: usize,
}

struct Step {
    client_request: ClientRequest,
    /// Login with which the client fetches a token first, if it does; empty for none.
    logs_in: Option<String>,
    repository: &'static str,
    before: usize,
    silent: bool,
    /// The registry would respond with a success, and nothing prevents that.
    must: bool,
}

impl Walk {
    fn new(registry: &Registry, cache: Cache, seed: u64) -> Walk {
        let mut walk = Walk {
            registry: registry.clone(),
            cache: Arc::new(cache),
            dice: Dice(seed.max(1)),
            pushes: 0,
            bytes: BTreeMap::new(),
            gives_tokens: false,
            is_sealed: false,
            counts: BTreeMap::new(),
            done: 0,
        };
        walk.note_bytes();
        walk
    }

    async fn run(&mut self, steps: usize) {
        while self.done < steps {
            match self.dice.roll(20) {
                0 => self.change_rights(),
                1 => self.change_content(),
                2 => self.change_clock(),
                3 => self.change_mood().await,
                4 if self.dice.roll(6) == 0 => self.restart().await,
                _ => self.pulls().await,
            }
        }
    }

    fn change_rights(&mut self) {
        let (user, repository) = (*self.dice.pick(&USERS[..2]), *self.dice.pick(&REPOSITORIES));
        if self.gives_tokens && self.dice.roll(6) == 0 {
            // A password is changed and changed back.
            if self.dice.roll(4) == 0 {
                self.registry.forgets(user);
            } else {
                self.registry.user(user, &format!("{user}-secret"));
            }
        }
        match self.dice.roll(6) {
            0..=2 => self.registry.lets(user, repository),
            3 => self.registry.revokes(user, repository),
            4 => {
                let mut state = self.registry.state();
                if !state.public.remove(repository) {
                    // The private repository of the hostile user stays private.
                    if repository == "pub/one" || repository == "evil/app" || repository == "acme/fresh" {
                        state.public.insert(repository.to_owned());
                    }
                }
            }
            _ => {
                let no = *self
                    .dice
                    .pick(&[No::Unauthorized, No::Unauthorized, No::Denied, No::Masked]);
                self.registry.state().no = no;
            }
        }
        self.done += 1;
    }

    fn change_content(&mut self) {
        let (repository, tag) = (*self.dice.pick(&REPOSITORIES), *self.dice.pick(&TAGS));
        self.pushes += 1;
        if self.dice.roll(5) == 0 {
            let mut state = self.registry.state();
            let place = state.shelves.get_mut(repository).unwrap();
            place.tags.remove(tag);
        } else {
            self.registry.push(
                repository,
                tag,
                &format!("push {}", self.pushes),
                &[50, 90_000, 100_000],
            );
        }
        self.note_bytes();
        self.done += 1;
    }

    fn change_clock(&mut self) {
        jump(
            *self
                .dice
                .pick(&[1, 20, 100, 250, 320, 3_700, 13 * 3_600, -30, -400, -1_800, -3_700]),
        );
        self.done += 1;
    }

    async fn change_mood(&mut self) {
        let moods = [
            Condition::Down,
            Condition::Stalled,
            Condition::Status(503),
            Condition::Status(429),
            Condition::TokenServiceDown,
        ];
        let is_well = self.registry.state().condition == Condition::Healthy;
        let condition = if is_well && self.dice.roll(3) == 0 {
            *self.dice.pick(&moods)
        } else {
            Condition::Healthy
        };
        self.registry.set_condition(condition);
        if condition == Condition::Healthy && !is_well {
            self.until_available().await;
        }
        self.done += 1;
    }

    /// Waits until no rate limit applies and the circuit breaker is closed.
    async fn until_available(&self) {
        tokio::time::sleep(Duration::from_secs(40)).await;
        while self.is_silent() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    fn is_silent(&self) -> bool {
        let sites = [&self.cache.proven, &self.cache.shared];
        sites
            .iter()
            .any(|site| site.upstream().unavailable_now().is_some())
    }

    async fn restart(&mut self) {
        let cache = Arc::into_inner(std::mem::replace(
            &mut self.cache,
            Arc::new(Cache::new(&self.registry, rules(false))),
        ));
        self.is_sealed = self.dice.roll(2) == 0;
        self.cache = Arc::new(cache.unwrap().restart(rules(self.is_sealed)).await);
        *self.counts.entry("restart".to_owned()).or_default() += 1;
        self.done += 1;
    }

    /// Pulls by several clients at once, half of the time with an access change among them.
    async fn pulls(&mut self) {
        let mut pulls = JoinSet::new();
        let changes = self.dice.roll(4) == 0;
        // Often all request the same content, and often content that is not cached yet.
        let same = (self.dice.roll(3) == 0).then(|| {
            let repository = *self.dice.pick(&REPOSITORIES);
            (repository, self.path(repository))
        });
        for nth in 0..=self.dice.roll(5) {
            if changes && nth == 2 {
                // Earlier requests are at different stages.
                tokio::time::sleep(Duration::from_millis(self.dice.roll(4) as u64)).await;
                self.change_rights();
            }
            let mut step = self.step(changes, same.clone());
            let (cache, registry) = (Arc::clone(&self.cache), self.registry.clone());
            pulls.spawn(async move {
                if let Some(account) = &step.logs_in {
                    let Some(shows) = cache.log_in(account, step.repository).await else {
                        return (step, Got::No("no token"), now());
                    };
                    step.client_request.shows = shows;
                    step.before = registry.state().responses.len();
                }
                let (got, cause) = cache.get_with_cause(&step.client_request).await;
                // After a rate limit, a client's requests resume slowly, one at first. Until its turn it counts as in
                // an outage, but the registry must have sent a limit.
                step.silent |= cause == Some(UpstreamFailure::RateLimited) && registry.state().has_limited;
                (step, got, now())
            });
        }
        while let Some(pull) = pulls.join_next().await {
            let (step, got, now) = pull.unwrap();
            self.judge(&step, &got, now);
            self.done += 1;
        }
        // Background work ends before the next step.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    fn step(&mut self, changes: bool, same: Option<(&'static str, String)>) -> Step {
        let (repository, path) = same.unwrap_or_else(|| {
            let repository = *self.dice.pick(&REPOSITORIES);
            (repository, self.path(repository))
        });
        let site = if self.dice.roll(12) == 0 { SHARED } else { PROVEN };
        let user = *self.dice.pick(&USERS);
        let logs_in = (self.gives_tokens && site == PROVEN && self.dice.roll(4) != 0).then(|| {
            // Mostly one user, so that it returns to earlier content.
            let user = if self.dice.roll(3) == 0 { user } else { "alice" };
            match self.dice.roll(8) {
                0 => String::new(),
                1 => basic(user, "guessed"),
                _ => basic(user, &format!("{user}-secret")),
            }
        });
        let shows = match self.dice.roll(6) {
            0 | 1 => String::new(),
            2 | 3 => basic(user, &format!("{user}-secret")),
            4 => format!("Bearer direct-{user}"),
            _ => basic(user, "guessed"),
        };
        let state = self.registry.state();
        let is_silent = state.condition != Condition::Healthy || self.is_silent();
        let knows = !shows.ends_with(&basic_of("guessed", user)) || state.public.contains(repository);
        let must = logs_in.is_none()
            && !self.gives_tokens
            && !changes
            && !is_silent
            && repository != "acme/never"
            && knows
            && {
                let (kind, reference) = path
                    .rsplit_once('/')
                    .map(|(rest, last)| (rest.rsplit('/').next().unwrap(), last))
                    .unwrap();
                let place = &state.shelves[repository];
                let there = match kind {
                    "manifests" => {
                        place.tags.contains_key(reference)
                            || reference
                                .parse()
                                .is_ok_and(|digest| place.manifests.contains_key(&digest))
                    }
                    "blobs" => reference
                        .parse()
                        .is_ok_and(|digest| place.blobs.contains_key(&digest)),
                    _ => false,
                };
                let may = site == SHARED || state.rights.contains(&(user.to_owned(), repository.to_owned()));
                there
                    && (may && !shows.is_empty() && !shows.ends_with(&basic_of("guessed", user))
                        || site == SHARED
                        || state.public.contains(repository)
                            && (shows.is_empty() || shows.starts_with("Bearer")))
            };
        Step {
            client_request: ClientRequest {
                site,
                path,
                head: self.dice.roll(4) == 0,
                shows,
            },
            logs_in,
            repository,
            before: state.responses.len(),
            silent: is_silent,
            must,
        }
    }

    fn path(&mut self, repository: &str) -> String {
        // Mostly content of this repository, and often of another.
        let from = if self.dice.roll(3) == 0 {
            *self.dice.pick(&REPOSITORIES)
        } else {
            repository
        };
        let state = self.registry.state();
        let place = &state.shelves[from];
        let manifests: Vec<_> = place.manifests.keys().copied().collect();
        let blobs: Vec<_> = place.blobs.keys().copied().collect();
        drop(state);
        match self.dice.roll(10) {
            0..=3 => format!("/v2/{repository}/manifests/{}", self.dice.pick(&TAGS)),
            4 | 5 => format!("/v2/{repository}/manifests/{}", self.some(&manifests)),
            6..=8 => format!("/v2/{repository}/blobs/{}", self.some(&blobs)),
            _ if self.dice.roll(2) == 0 => format!("/v2/{repository}/tags/list"),
            _ => format!("/v2/{repository}/referrers/{}", self.some(&manifests)),
        }
    }

    /// Mostly one of a few, so that requests repeat.
    fn some(&mut self, digests: &[Digest]) -> Digest {
        let few = if self.dice.roll(3) == 0 {
            digests.len()
        } else {
            digests.len().min(6)
        };
        *self.dice.pick(&digests[..few])
    }

    fn judge(&mut self, step: &Step, got: &Got, now: std::time::SystemTime) {
        let state = self.registry.state();
        // With a stale response on 404, a 404 counts as an outage for clients with an earlier grant. The blobs of a
        // deleted tag must be available too.
        let is_content = |path: &str| path.contains("/manifests/") || path.contains("/blobs/");
        let is_archive = step.repository == "acme/kept" && is_content(&step.client_request.path);
        // No revalidation there, so a grant is valid as long as in an outage.
        let is_sealed = self.is_sealed && step.repository == "acme/never";
        let silent = step.silent || state.condition != Condition::Healthy || is_archive || is_sealed;
        let digest = match got {
            Got::Content(digest, bytes) => {
                if let Some(bytes) = bytes {
                    assert_eq!(
                        self.bytes.get(digest),
                        Some(bytes),
                        "other bytes: {:?}",
                        step.client_request
                    );
                }
                Some(*digest)
            }
            Got::List => None,
            Got::No(reason) => {
                let responses: &[RegistryResponse] = &state.responses;
                assert!(
                    !step.must,
                    "denied ({reason}) although the registry allows it: {:?}\n{:#?}",
                    step.client_request,
                    &responses[responses.len().saturating_sub(6)..]
                );
                drop(state);
                self.count("denied", silent);
                if is_ours(&step.client_request.shows) {
                    self.count("denied a local token", silent);
                }
                return;
            }
        };
        let claim = Claim {
            shows: &step.client_request.shows,
            account: step.logs_in.as_deref().unwrap_or_default(),
            site: step.client_request.site,
            repository: step.repository,
            digest,
            before: step.before,
            silent,
            now,
        };
        let entitled = step.client_request.site == SHARED || entitles(&state.responses, &claim);
        let nobodys = Claim { account: "", ..claim };
        let by_account = is_ours(&step.client_request.shows) && !entitles(&state.responses, &nobodys);
        let own = |word: &&RegistryResponse| {
            word.repository == step.repository && (word.to.is_empty() || word.to == step.client_request.shows)
        };
        let responses: Vec<_> = state.responses.iter().filter(own).collect();
        assert!(
            entitled,
            "step {}: {:?} received unauthorized content: {claim:#?}\n{:#?}",
            self.done,
            step.client_request,
            &responses[responses.len().saturating_sub(12)..]
        );
        drop(state);
        let whose = if step.client_request.shows.is_empty() {
            "anonymously"
        } else {
            "with a credential"
        };
        self.count(&format!("served {whose}"), silent);
        if by_account {
            self.count("served by its account alone", silent);
        }
    }

    fn count(&mut self, what: &str, silent: bool) {
        let when = if silent { "in an outage" } else { "else" };
        *self.counts.entry(format!("{what} {when}")).or_default() += 1;
    }

    /// A walk without denials or without hits proves nothing.
    fn covered(&self) {
        eprintln!(
            "{} steps, {} responses of the registry: {:#?}",
            self.done,
            self.registry.state().responses.len(),
            self.counts
        );
        for what in ["denied", "served anonymously", "served with a credential"] {
            for when in ["in an outage", "else"] {
                let count = self
                    .counts
                    .get(&format!("{what} {when}"))
                    .copied()
                    .unwrap_or_default();
                assert!(count > 50, "{what} {when}: only {count} times");
            }
        }
    }

    fn note_bytes(&mut self) {
        let state = self.registry.state();
        for place in state.shelves.values() {
            for (digest, bytes) in place.manifests.iter().chain(&place.blobs) {
                self.bytes.entry(*digest).or_insert_with(|| bytes.clone());
            }
        }
    }
}

fn is_ours(shows: &str) -> bool {
    shows.starts_with("Bearer ifnewer-local-")
}

pub fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", basic_of(password, user))
}

fn basic_of(password: &str, user: &str) -> String {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.encode(format!("{user}:{password}"))
}
