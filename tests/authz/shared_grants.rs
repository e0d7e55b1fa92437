//! Random walk over two caches with one bucket and grant records: users come and go at the registry, which is available
//! or not. Each content that a client receives is checked against the registry's last response to that client.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use super::bucket::Bucket;
use super::cache::{Cache, ClientRequest, Got, PROVEN};
use super::min_age::pass;
use super::model::{GRANT, OFFLINE_GRANT};
use super::random_walk::{Dice, basic, rules, seed, steps, stocked};
use super::registry::{Condition, No, Registry, now};

const REPOSITORY: &str = "acme/app";
const USERS: [&str; 3] = ["alice", "bob", "eve"];

/// After this time, no circuit breaker is open.
const SETTLED: i64 = 120;

struct Walk {
    registry: Registry,
    bucket: Bucket,
    caches: [Cache; 2],
    /// The last response to a user through each cache since that started: whether it is a success, and its time.
    own: BTreeMap<(usize, &'static str), (bool, SystemTime)>,
    dice: Dice,
    is_out: bool,
    counts: BTreeMap<&'static str, usize>,
}

fn cache(registry: &Registry, bucket: &Bucket) -> Cache {
    let cache = Cache::new(registry, rules(false));
    cache.proxy.shared().configure(Some(bucket.settings("a")));
    cache
}

fn shows(user: &str) -> String {
    basic(user, &format!("{user}-secret"))
}

impl Walk {
    /// The last response of the registry to this client.
    fn last_response(&self, shows: &str) -> Option<(bool, SystemTime)> {
        let state = self.registry.state();
        let here =
            |word: &&super::registry::RegistryResponse| word.to == shows && word.repository == REPOSITORY;
        let last = state.responses.iter().rfind(here)?;
        Some((last.yes, last.at))
    }

    async fn step(&mut self) {
        match self.dice.roll(12) {
            0 if self.is_out => {
                self.registry.set_condition(Condition::Healthy);
                self.is_out = false;
                pass(SETTLED).await;
            }
            0 | 1 if !self.is_out => {
                self.registry.set_condition(Condition::Down);
                self.is_out = true;
            }
            2 => self.registry.lets(USERS[self.dice.roll(3)], REPOSITORY),
            3 => {
                self.registry.state().no = *self.dice.pick(&[No::Denied, No::Unauthorized]);
                self.registry.revokes(USERS[self.dice.roll(3)], REPOSITORY);
            }
            4 => pass(i64::try_from(self.dice.roll(5 * 3600)).unwrap()).await,
            5 => {
                let at = self.dice.roll(2);
                self.caches[at] = cache(&self.registry, &self.bucket);
                self.own.retain(|(of, _), _| *of != at);
            }
            _ => self.request().await,
        }
    }

    async fn request(&mut self) {
        // A record that was read counts for a second.
        pass(2).await;
        let (at, user) = (self.dice.roll(2), USERS[self.dice.roll(3)]);
        let digest = self.registry.state().shelves[REPOSITORY].tags["1"];
        let path = match self.dice.roll(3) {
            0 => format!("/v2/{REPOSITORY}/manifests/{digest}"),
            _ => format!("/v2/{REPOSITORY}/manifests/1"),
        };
        let request = ClientRequest {
            site: PROVEN,
            path,
            head: false,
            shows: shows(user),
        };
        let before = self.registry.state().responses.len();
        let (got, cause) = self.caches[at].get_with_cause(&request).await;
        // A circuit breaker may still be open after the outage.
        let is_out = self.is_out || cause.is_some();
        tokio::time::sleep(Duration::from_millis(100)).await;
        self.caches[at].proxy.shared().drain().await;
        let last = self.last_response(&request.shows);
        if self.registry.state().responses[before..]
            .iter()
            .any(|word| word.to == request.shows)
        {
            self.own.insert((at, user), last.unwrap());
        }
        let own = self.own.get(&(at, user)).copied();
        let within = |response: Option<(bool, SystemTime)>, lifetime| {
            response.is_some_and(|(yes, at)| yes && now().duration_since(at).is_ok_and(|age| age < lifetime))
        };
        // By digest, a cache asks neither the registry nor the bucket while its own grant is current and no outage is known.
        let is_current = cause.is_none() && within(own, GRANT);
        let is_entitled = is_current || within(last, if is_out { OFFLINE_GRANT } else { GRANT });
        let is_content = matches!(got, Got::Content(..));
        assert!(
            is_entitled || !is_content,
            "{user} at {at}: {request:?} {last:?} {own:?}, in an outage: {is_out}"
        );
        let what = match (is_out, is_content, own) {
            (false, true, _) => "served by the registry's response",
            (false, false, _) => "denied by the registry",
            (true, true, Some((true, _))) => "served by a grant in an outage",
            (true, true, _) => "served by a record alone in an outage",
            (true, false, Some((true, _))) if last.is_some_and(|(yes, _)| !yes) => {
                "denied by a record alone in an outage"
            }
            (true, false, _) => "denied in an outage",
        };
        *self.counts.entry(what).or_default() += 1;
    }
}

#[tokio::test(start_paused = true)]
async fn two_caches_serve_only_what_the_registry_allowed() {
    let (registry, bucket) = (stocked(), Bucket::new());
    let caches = [cache(&registry, &bucket), cache(&registry, &bucket)];
    let mut walk = Walk {
        registry,
        bucket,
        caches,
        own: BTreeMap::new(),
        dice: Dice(seed() + 3),
        is_out: false,
        counts: BTreeMap::new(),
    };
    for _ in 0..steps(3_000) {
        walk.step().await;
    }
    eprintln!("{:#?}", walk.counts);
    for (what, least) in [
        ("served by the registry's response", 50),
        ("served by a grant in an outage", 20),
        ("served by a record alone in an outage", 20),
        ("denied by a record alone in an outage", 5),
    ] {
        assert!(
            walk.counts.get(what).is_some_and(|times| *times >= least),
            "{:#?}",
            walk.counts
        );
    }
}
