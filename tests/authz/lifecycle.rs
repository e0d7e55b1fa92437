//! Process lifecycle under random events: reloads, restarts, kills, pushes and deletions through the cache and past
//! it, revocations, outages, clock jumps, and responses that arrive late over any of these.
//!
//! Two invariants. Authorization: no client receives content that no response of the registry authorizes (`model`).
//! Order: no client receives an image older than a write that the cache acknowledged before the request. While the
//! registry responds, none is older than what the policy allows without revalidation, and a write of unknown outcome
//! forces a revalidation.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ifnewer::oci::Digest;
use ifnewer::proxy::UpstreamRegistry;
use ifnewer::proxy::invalidation::{WriteEffect, WriteOutcome};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::cache::{Cache, ClientRequest, Got, PROVEN, SHARED};
use super::model::{Claim, entitles};
use super::random_walk::{Dice, REPOSITORIES, TAGS, USERS, basic, rules, seed, steps, stocked};
use super::registry::{Condition, No, Registry, jump, now};

type Tag = (&'static str, &'static str);
type Place = (&'static str, Tag);
type Answer = (Ask, Got, SystemTime);

#[tokio::test(start_paused = true)]
async fn no_event_order_restores_revoked_grant_or_tag() {
    let registry = stocked();
    let mut life = Life::new(&registry, Cache::new(&registry, rules(false)), seed() + 10);
    life.run(steps(10_000)).await;
    life.covered(20);
}

#[tokio::test(start_paused = true)]
async fn persistent_index_restores_no_grant_or_tag() {
    let registry = stocked();
    let mut life = Life::new(&registry, Cache::on_disk(&registry, rules(false)), seed() + 11);
    life.run(steps(1_500)).await;
    life.covered(1);
}

/// A request with the known state at its start.
struct Ask {
    client_request: ClientRequest,
    place: Place,
    /// Whether it is by tag.
    is_by_tag: bool,
    before: usize,
    is_silent: bool,
    is_opened: bool,
    /// Version of the last acknowledged write.
    acknowledged: usize,
    /// Current version at the registry, and version of the last write of unknown outcome.
    current: usize,
    unknown: usize,
    /// Number of outages so far.
    troubles: usize,
}

#[expect(
    clippy::struct_excessive_bools,
    reason = "independent switches of the registry"
)]
struct Life {
    registry: Registry,
    cache: Arc<Cache>,
    dice: Dice,
    seed: u64,
    /// Versions of each tag in order; `None` for a deletion.
    versions: BTreeMap<Tag, Vec<Option<Digest>>>,
    acknowledged: BTreeMap<Place, usize>,
    unknown: BTreeMap<Place, usize>,
    /// Requests with a delayed response.
    late: JoinSet<Answer>,
    is_sealed: bool,
    is_opened: bool,
    is_stalled: bool,
    /// The registry responds and delays earlier requests.
    is_held_back: bool,
    /// Tag and client of most events for a while.
    focus: (Place, &'static str),
    troubles: usize,
    pushes: usize,
    counts: BTreeMap<&'static str, usize>,
    done: usize,
}

impl Drop for Life {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "IFNEWER_MODEL_SEED with which it fails: {} (step {})",
                self.seed, self.done
            );
        }
    }
}

impl Life {
    fn new(registry: &Registry, cache: Cache, seed: u64) -> Life {
        let mut versions: BTreeMap<Tag, Vec<_>> = BTreeMap::new();
        for repository in REPOSITORIES {
            for tag in TAGS {
                let named = registry.state().shelves[repository].tags[tag];
                versions.insert((repository, tag), vec![Some(named)]);
            }
        }
        Life {
            registry: registry.clone(),
            cache: Arc::new(cache),
            dice: Dice(seed.max(1)),
            seed,
            versions,
            acknowledged: BTreeMap::new(),
            unknown: BTreeMap::new(),
            late: JoinSet::new(),
            is_sealed: false,
            is_opened: false,
            is_stalled: false,
            is_held_back: false,
            focus: ((PROVEN, (REPOSITORIES[1], TAGS[0])), USERS[0]),
            troubles: 0,
            pushes: 0,
            counts: BTreeMap::new(),
            done: 0,
        }
    }

    async fn run(&mut self, steps: usize) {
        while self.done < steps {
            if self.dice.roll(30) == 0 {
                self.focus = (self.some_place(), *self.dice.pick(&USERS[..2]));
            }
            if self.is_held_back {
                self.live_with_late_answers().await;
            } else {
                self.live().await;
            }
            self.done += 1;
            self.judge_late();
        }
        self.release().await;
    }

    async fn live(&mut self) {
        match self.dice.roll(24) {
            0..=2 => self.change_rights(),
            3 => {
                let place = self.place();
                let _ = self.write(place.1);
            }
            4 => {
                let seconds = [1, 20, 61, 100, 320, 3_700, 13 * 3_600, -30, -400];
                jump(*self.dice.pick(&seconds));
            }
            5..=8 => self.change_mood().await,
            9 if self.dice.roll(2) == 0 => self.end_after_denial().await,
            9 => self.reload(),
            10 if self.dice.roll(4) == 0 => self.restart().await,
            11..=13 => self.write_through().await,
            _ => self.pulls().await,
        }
    }

    /// Delayed responses while the registry answers other requests, with random events in between. Mostly followed by
    /// an outage, in which only recorded state is used.
    async fn live_with_late_answers(&mut self) {
        let mut telemetry = [0, 1, 2, 3];
        for last in (1..telemetry.len()).rev() {
            telemetry.swap(last, self.dice.roll(last + 1));
        }
        for event in telemetry {
            if self.dice.roll(3) == 0 || !self.is_held_back {
                continue;
            }
            match event {
                0 => self.reload(),
                1 => {
                    self.registry.revokes(self.focus.1, self.focus.0.1.0);
                    // A request for the same tag would join the delayed one and miss the denial.
                    self.pulls_of(Some(self.beside_focus())).await;
                    self.pulls_of(Some(self.focus.0)).await;
                }
                2 => self.write_through().await,
                _ => self.pulls().await,
            }
        }
        self.release().await;
        if self.dice.roll(4) != 0 {
            self.troubles += 1;
            self.registry.set_condition(Condition::Down);
            self.pulls_of(Some(self.focus.0)).await;
        }
    }

    /// A denial, a process end and an outage: only the state on disk remains.
    async fn end_after_denial(&mut self) {
        self.release().await;
        let (place, user) = self.focus;
        self.registry.lets(user, place.1.0);
        self.pulls_of(Some(place)).await;
        self.registry.revokes(user, place.1.0);
        self.pulls_of(Some(place)).await;
        if self.dice.roll(3) == 0 {
            self.restart().await;
        } else {
            self.kill().await;
        }
        self.troubles += 1;
        self.registry.set_condition(Condition::Down);
        self.pulls_of(Some(place)).await;
        self.count("end after a denial, then an outage");
    }

    /// Caches the complete image, because an incomplete one is not served in an outage.
    async fn completes_focus(&mut self) {
        let (place, user) = self.focus;
        let (site, (repository, tag)) = place;
        self.registry.lets(user, repository);
        let manifest = {
            let state = self.registry.state();
            let contents = &state.shelves[repository];
            let named = contents.tags.get(tag);
            named.and_then(|digest| serde_json::from_slice::<Value>(&contents.manifests[digest]).ok())
        };
        let Some(manifest) = manifest else { return };
        self.pulls_of(Some(place)).await;
        let layers = manifest["layers"].as_array().into_iter().flatten();
        for blob in layers.chain([&manifest["config"]]) {
            let digest = blob["digest"].as_str().unwrap();
            let client_request = ClientRequest {
                site,
                path: format!("/v2/{repository}/blobs/{digest}"),
                head: false,
                shows: basic(user, &format!("{user}-secret")),
            };
            let _ = self.cache.get(&client_request).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    /// Another tag of the same repository.
    fn beside_focus(&self) -> Place {
        let (site, (repository, tag)) = self.focus.0;
        let other = TAGS.iter().find(|other| **other != tag);
        (site, (repository, other.copied().unwrap_or(tag)))
    }

    fn change_rights(&mut self) {
        let (user, repository) = (self.user(), self.place().1.0);
        match self.dice.roll(7) {
            0..=2 => self.registry.lets(user, repository),
            3..=5 => self.registry.revokes(user, repository),
            _ => {
                self.registry.state().no = *self.dice.pick(&[No::Unauthorized, No::Unauthorized, No::Denied]);
            }
        }
    }

    /// Moves or deletes the tag at the registry. Returns the new version.
    fn write(&mut self, tag: Tag) -> usize {
        self.pushes += 1;
        let named = if self.dice.roll(5) == 0 {
            let mut state = self.registry.state();
            state.shelves.get_mut(tag.0).unwrap().tags.remove(tag.1);
            None
        } else {
            let mark = format!("push {}", self.pushes);
            Some(self.registry.push(tag.0, tag.1, &mark, &[50, 70_000]))
        };
        let versions = self.versions.get_mut(&tag).unwrap();
        versions.push(named);
        versions.len() - 1
    }

    fn user(&mut self) -> &'static str {
        if self.dice.roll(4) == 0 {
            let user: &&str = self.dice.pick(&USERS);
            user
        } else {
            self.focus.1
        }
    }

    /// Mostly the same place for a while, so that events interact.
    fn place(&mut self) -> Place {
        if self.dice.roll(5) == 0 {
            self.some_place()
        } else {
            self.focus.0
        }
    }

    fn some_place(&mut self) -> Place {
        let site = if self.dice.roll(6) == 0 { SHARED } else { PROVEN };
        (site, (*self.dice.pick(&REPOSITORIES), *self.dice.pick(&TAGS)))
    }

    fn site(&self, place: Place) -> Arc<UpstreamRegistry> {
        let site = if place.0 == SHARED {
            &self.cache.shared
        } else {
            &self.cache.proven
        };
        Arc::clone(site)
    }

    async fn change_mood(&mut self) {
        self.troubles += 1;
        let is_well = self.registry.state().condition == Condition::Healthy;
        if !is_well || self.is_stalled {
            self.release().await;
            return;
        }
        // A rate limit is paced long after its end, which looks like an outage; `random_walk` covers those.
        let moods = [
            Condition::Down,
            Condition::Stalled,
            Condition::HoldsTokenResponses,
            Condition::HoldsTokenResponses,
            Condition::TokenServiceDown,
        ];
        let condition = *self.dice.pick(&moods);
        if condition == Condition::HoldsTokenResponses && self.dice.roll(2) == 0 {
            self.completes_focus().await;
        }
        self.registry.set_condition(condition);
        if matches!(condition, Condition::Stalled | Condition::HoldsTokenResponses) {
            self.is_stalled = true;
            if self.dice.roll(3) != 0 {
                self.registry.lets(self.focus.1, self.focus.0.1.0);
            }
            self.pulls_of(Some(self.focus.0)).await;
            // Later requests are answered; these stay delayed.
            if self.dice.roll(3) != 0 {
                self.registry.state().condition = Condition::Healthy;
                self.is_held_back = true;
                self.count("delayed responses while the registry answers others");
            }
        }
    }

    /// The registry responds to all delayed requests.
    async fn release(&mut self) {
        self.troubles += 1;
        self.registry.set_condition(Condition::Healthy);
        while let Some(answer) = self.late.join_next().await {
            self.judge(answer.unwrap());
        }
        self.is_stalled = false;
        self.is_held_back = false;
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

    fn reload(&mut self) {
        if self.dice.roll(3) == 0 {
            self.is_opened = !self.is_opened;
        }
        self.is_sealed = self.dice.roll(4) == 0;
        self.cache = Arc::new(self.cache.reload(rules(self.is_sealed), self.is_opened));
        self.count(if self.late.is_empty() {
            "reload"
        } else {
            "reload with requests in flight"
        });
    }

    async fn restart(&mut self) {
        self.release().await;
        let cache = self.taken();
        self.is_opened = false;
        self.cache = Arc::new(cache.restart(rules(self.is_sealed)).await);
        self.count("restart");
    }

    /// Running work ends without a result.
    async fn kill(&mut self) {
        self.troubles += 1;
        self.late.abort_all();
        while self.late.join_next().await.is_some() {}
        self.registry.state().condition = Condition::Down;
        self.registry.cut();
        let cache = self.taken();
        self.is_opened = false;
        self.cache = Arc::new(cache.kill(rules(self.is_sealed)).await);
        self.is_stalled = false;
        self.is_held_back = false;
        self.registry.set_condition(Condition::Healthy);
        self.count("kill");
    }

    fn taken(&mut self) -> Cache {
        let other = Arc::new(Cache::new(&self.registry, rules(false)));
        Arc::into_inner(std::mem::replace(&mut self.cache, other)).unwrap()
    }

    /// A push or deletion through the cache, with pulls before, between and after its steps.
    async fn write_through(&mut self) {
        let place = self.place();
        let (repository, tag) = (place.1.0.parse().unwrap(), place.1.1.parse().unwrap());
        let site = self.site(place);
        let pending = self
            .cache
            .proxy
            .begin_write(&site, WriteEffect::Tags(repository, vec![tag]))
            .await;
        drop(site);
        if self.dice.roll(3) == 0 {
            self.pulls_of(Some(place)).await;
        }
        if self.dice.roll(4) == 0 {
            self.reload();
        }
        match self.dice.roll(6) {
            0..=2 => {
                let version = self.write(place.1);
                if self.dice.roll(3) == 0 {
                    self.pulls_of(Some(place)).await;
                }
                self.cache
                    .proxy
                    .finish_write(pending, WriteOutcome::Succeeded)
                    .await;
                self.acknowledged.insert(place, version);
                self.count("acknowledged write");
            }
            3 => {
                self.cache
                    .proxy
                    .finish_write(pending, WriteOutcome::Rejected)
                    .await;
                self.count("rejected write");
            }
            4 => {
                let version = self.write(place.1);
                self.cache
                    .proxy
                    .finish_write(pending, WriteOutcome::Unknown)
                    .await;
                self.unknown.insert(place, version);
                self.count("write of unknown outcome");
            }
            _ => {
                let version = self.write(place.1);
                self.unknown.insert(place, version);
                drop(pending);
                self.kill().await;
                self.count("kill during a write");
            }
        }
        // A pull records again what a late response would revert.
        if self.dice.roll(2) == 0 {
            self.pulls_of(Some(place)).await;
        }
    }

    async fn pulls(&mut self) {
        let same = (self.dice.roll(2) == 0).then(|| self.place());
        self.pulls_of(same).await;
    }

    /// Pulls by several clients at once. A late response is checked when it arrives.
    async fn pulls_of(&mut self, same: Option<Place>) {
        let mut pulls = JoinSet::new();
        for _ in 0..=self.dice.roll(3) {
            let place = same.unwrap_or_else(|| self.place());
            let ask = self.ask(place);
            let cache = Arc::clone(&self.cache);
            pulls.spawn(async move {
                let got = cache.get(&ask.client_request).await;
                drop(cache);
                (ask, got, now())
            });
        }
        while let Ok(Some(answer)) = timeout(Duration::from_secs(4), pulls.join_next()).await {
            self.judge(answer.unwrap());
        }
        if !pulls.is_empty() {
            self.late
                .spawn(async move { pulls.join_next().await.unwrap().unwrap() });
        }
        // Background work ends before the next event.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    fn ask(&mut self, place: Place) -> Ask {
        let (site, (repository, tag)) = place;
        let user = self.user();
        let shows = match self.dice.roll(7) {
            0 => String::new(),
            1..=5 => basic(user, &format!("{user}-secret")),
            _ => format!("Bearer direct-{user}"),
        };
        let state = self.registry.state();
        let contents = &state.shelves[repository];
        let is_by_tag = self.dice.roll(4) != 0;
        let path = if is_by_tag {
            format!("/v2/{repository}/manifests/{tag}")
        } else if self.dice.roll(2) == 0 {
            let manifests: Vec<_> = contents.manifests.keys().take(6).collect();
            format!("/v2/{repository}/manifests/{}", self.dice.pick(&manifests))
        } else {
            let blobs: Vec<_> = contents.blobs.keys().take(6).collect();
            format!("/v2/{repository}/blobs/{}", self.dice.pick(&blobs))
        };
        let known = |places: &BTreeMap<Place, usize>| places.get(&place).copied().unwrap_or_default();
        Ask {
            client_request: ClientRequest {
                site,
                path,
                head: self.dice.roll(4) == 0,
                shows,
            },
            place,
            is_by_tag,
            before: state.responses.len(),
            is_silent: state.condition != Condition::Healthy || self.is_stalled || self.is_silent(),
            is_opened: self.is_opened,
            acknowledged: known(&self.acknowledged),
            current: self.versions[&(repository, tag)].len() - 1,
            unknown: known(&self.unknown),
            troubles: self.troubles,
        }
    }

    fn judge_late(&mut self) {
        while let Some(answer) = self.late.try_join_next() {
            self.judge(answer.unwrap());
        }
    }

    fn judge(&mut self, (ask, got, at): Answer) {
        self.done += 1;
        let Got::Content(digest, _) = got else {
            self.count("denied");
            return;
        };
        let is_silent = ask.is_silent
            || ask.troubles != self.troubles
            || self.registry.state().condition != Condition::Healthy
            || self.is_silent();
        self.judge_right(&ask, digest, is_silent, at);
        if ask.is_by_tag {
            self.judge_order(&ask, digest, is_silent);
        }
        self.count(if is_silent {
            "served in an outage"
        } else {
            "served"
        });
    }

    fn judge_right(&self, ask: &Ask, digest: Digest, is_silent: bool, at: SystemTime) {
        let (site, (repository, _)) = ask.place;
        if site == SHARED || ask.is_opened || self.is_opened {
            return;
        }
        let state = self.registry.state();
        let claim = Claim {
            shows: &ask.client_request.shows,
            account: "",
            site,
            repository,
            digest: Some(digest),
            before: ask.before,
            // Under `never`, and with a stale response on 404, a grant is valid as long as in an outage.
            silent: is_silent || matches!(repository, "acme/never" | "acme/kept"),
            now: at,
        };
        let own = |word: &&super::registry::RegistryResponse| {
            word.repository == repository && (word.to.is_empty() || word.to == ask.client_request.shows)
        };
        assert!(
            entitles(&state.responses, &claim),
            "step {}, seed {}: {:?} received unauthorized content: {claim:#?}\n{:#?}",
            self.done,
            self.seed,
            ask.client_request,
            state
                .responses
                .iter()
                .filter(own)
                .rev()
                .take(12)
                .collect::<Vec<_>>()
        );
    }

    fn judge_order(&self, ask: &Ask, digest: Digest, is_silent: bool) {
        let (_, tag) = ask.place;
        let versions = &self.versions[&tag];
        let Some(version) = versions.iter().rposition(|named| *named == Some(digest)) else {
            panic!("{:?} got {digest}, which the tag never named", ask.client_request);
        };
        let mut floor = ask.acknowledged;
        if !is_silent {
            floor = floor.max(match tag.0 {
                // No revalidation, or not always.
                "acme/never" => 0,
                "acme/present" | "acme/fresh" => ask.unknown,
                _ => ask.current,
            });
        }
        let is_kept = tag.0 == "acme/kept" && versions[floor..].iter().all(Option::is_none);
        assert!(
            version >= floor || (is_kept && version >= ask.acknowledged),
            "step {}, seed {}: {:?} got version {version}, older than {floor} (acknowledged {}, unknown {}, \
             at the registry {}); in trouble: {is_silent}",
            self.done,
            self.seed,
            ask.client_request,
            ask.acknowledged,
            ask.unknown,
            ask.current,
        );
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Each event must have happened often enough.
    fn covered(&self, times: usize) {
        eprintln!("{} steps: {:#?}", self.done, self.counts);
        for what in [
            "reload",
            "reload with requests in flight",
            "restart",
            "kill",
            "kill during a write",
            "end after a denial, then an outage",
            "acknowledged write",
            "rejected write",
            "write of unknown outcome",
            "delayed responses while the registry answers others",
            "served in an outage",
            "served",
            "denied",
        ] {
            let count = self.counts.get(what).copied().unwrap_or_default();
            assert!(count >= times, "{what}: only {count} times");
        }
    }
}
