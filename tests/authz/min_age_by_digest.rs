//! Minimum age of manifests requested by digest, with a wall clock that is stepped.

use std::sync::Arc;
use std::time::Duration;

use ifnewer::oci::Digest;
use ifnewer::policy::Policy;
use ifnewer::policy::min_age::{AgeLimit, AgeOverrides, OnUnknownAge};
use ifnewer::policy::rules::{EffectivePolicy, PolicyOverrides, Rules};
use ifnewer::store::verdicts::VerdictKind;

use super::cache::{Cache, ClientRequest, PROVEN};
use super::min_age::{
    DAY, REPOSITORY, get, gets_of, give, of, pass, pull, pulled_tag, push, push_old, registry, rules_of, tag,
};
use super::registry::{Condition, Registry, now};

const YOUNG: Result<Digest, &str> = Err("too-young");

fn by_digest_rules(on_unknown_age: OnUnknownAge) -> Rules {
    let rules = rules_of(3, Policy::IfNewer, on_unknown_age);
    let default = rules.default_for("").clone();
    let limit = AgeLimit {
        by_digest: true,
        ..default.age_limit
    };
    let default = EffectivePolicy {
        age_limit: limit,
        ..default
    };
    let none = PolicyOverrides {
        age_limit: AgeOverrides {
            min_age: Some(Duration::ZERO),
            ..AgeOverrides::default()
        },
        ..PolicyOverrides::default()
    };
    let free = format!("{PROVEN}/{REPOSITORY}:free").parse().unwrap();
    let upstreams = [(Arc::from(PROVEN), PolicyOverrides::default())];
    Rules::new(default, upstreams, vec![(vec![free], none)]).unwrap()
}

fn rules() -> Rules {
    by_digest_rules(OnUnknownAge::Refuse)
}

/// Without `min_age_by_digest`.
fn tag_rules() -> Rules {
    rules_of(3, Policy::IfNewer, OnUnknownAge::Refuse)
}

async fn digest(cache: &Cache, digest: Digest) -> Result<Digest, &'static str> {
    get(cache, &of(&digest.to_string())).await
}

/// Pushes an index of two images that its storage got `days` ago. Nothing shows the age of the images.
fn push_old_index(registry: &Registry, mark: &str, days: i64) -> Vec<Digest> {
    let all = registry.push_index(REPOSITORY, "1", mark, &["amd64", "arm64"]);
    let at = now() - Duration::from_secs((days * DAY).unsigned_abs());
    registry.state().last_modified.insert(all[0], at);
    all
}

#[tokio::test(start_paused = true)]
async fn young_digest_is_refused_until_old_enough() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    let new = push(&registry, "two");
    assert_eq!(digest(&cache, old).await, Ok(old), "by its Last-Modified");
    assert_eq!(digest(&cache, new).await, YOUNG);
    assert_eq!(gets_of(&registry, new), 1, "for the age of its config");
    pass(3 * DAY - 1).await;
    assert_eq!(digest(&cache, new).await, YOUNG);
    pass(1).await;
    assert_eq!(digest(&cache, new).await, Ok(new), "requested three days ago");
}

#[tokio::test(start_paused = true)]
async fn digest_is_as_old_as_its_oldest_tag_saw_it() {
    let registry = registry();
    let cache = Cache::on_disk(&registry, rules());
    let image = push(&registry, "one");
    assert_eq!(tag(&cache).await, YOUNG);
    pass(DAY).await;
    registry.push(REPOSITORY, "2", "one", &[]);
    assert_eq!(get(&cache, &of("2")).await, YOUNG);
    push(&registry, "two");
    assert!(tag(&cache).await.is_err());
    pass(2 * DAY - 1).await;
    assert_eq!(digest(&cache, image).await, YOUNG);
    let cache = cache.restart(rules()).await;
    pass(1).await;
    assert_eq!(
        digest(&cache, image).await,
        Ok(image),
        "tag 1 named it three days ago"
    );
}

#[tokio::test(start_paused = true)]
async fn child_of_a_served_index_is_not_delayed() {
    let registry = registry();
    let mut cache = Cache::on_disk(&registry, rules());
    cache.takes_indexes = true;
    let all = push_old_index(&registry, "one", 10);
    let [index, amd, arm] = all[..] else {
        panic!("{all:?}")
    };
    assert_eq!(digest(&cache, amd).await, YOUNG, "no index of it was served");
    assert_eq!(tag(&cache).await, Ok(index));
    assert_eq!(digest(&cache, index).await, Ok(index));
    assert_eq!(digest(&cache, amd).await, Ok(amd));
    registry.set_condition(Condition::Down);
    assert_eq!(digest(&cache, amd).await, Ok(amd), "also in an outage");
    registry.set_condition(Condition::Healthy);
    let mut cache = cache.restart(rules()).await;
    cache.takes_indexes = true;
    assert_eq!(
        digest(&cache, arm).await,
        YOUNG,
        "no index was served since the restart"
    );
    let head = ClientRequest {
        head: true,
        ..of("1")
    };
    cache.get(&head).await;
    assert_eq!(digest(&cache, arm).await, Ok(arm), "a HEAD by tag suffices");
    let young = registry.push_index(REPOSITORY, "1", "two", &["amd64"]);
    assert_eq!(tag(&cache).await, Ok(index));
    assert_eq!(digest(&cache, young[0]).await, YOUNG);
    assert_eq!(digest(&cache, young[1]).await, YOUNG);
}

#[tokio::test(start_paused = true)]
async fn approved_index_lets_its_images_through_until_blocked() {
    let registry = registry();
    let mut cache = Cache::new(&registry, rules());
    cache.takes_indexes = true;
    let all = push_old_index(&registry, "one", 0);
    let [index, amd, _] = all[..] else {
        panic!("{all:?}")
    };
    assert_eq!(digest(&cache, index).await, YOUNG);
    assert_eq!(digest(&cache, amd).await, YOUNG);
    give(&cache, VerdictKind::Approved, index).await;
    assert_eq!(digest(&cache, index).await, Ok(index));
    assert_eq!(digest(&cache, amd).await, Ok(amd));
    give(&cache, VerdictKind::Blocked, index).await;
    assert_eq!(digest(&cache, index).await, Err("blocked"));
    assert_eq!(digest(&cache, amd).await, YOUNG, "its index is no longer served");
    give(&cache, VerdictKind::Approved, amd).await;
    assert_eq!(digest(&cache, amd).await, Ok(amd));
    give(&cache, VerdictKind::Blocked, amd).await;
    assert_eq!(digest(&cache, amd).await, Err("blocked"));
}

#[tokio::test(start_paused = true)]
async fn pull_by_tag_without_min_age_continues_by_digest() {
    let registry = registry();
    let mut cache = Cache::new(&registry, rules());
    cache.takes_indexes = true;
    let all = registry.push_index(REPOSITORY, "free", "one", &["amd64"]);
    assert_eq!(digest(&cache, all[0]).await, YOUNG);
    assert_eq!(get(&cache, &of("free")).await, Ok(all[0]));
    assert_eq!(digest(&cache, all[0]).await, Ok(all[0]));
    assert_eq!(
        digest(&cache, all[1]).await,
        Ok(all[1]),
        "through the index and the tag"
    );
}

#[tokio::test(start_paused = true)]
async fn referrers_tag_makes_no_digest_older() {
    let registry = registry();
    let mut cache = Cache::new(&registry, rules());
    cache.takes_indexes = true;
    let subject = push_old(&registry, "one", 10);
    let referrers = subject.to_string().replace(':', "-");
    let all = registry.push_index(REPOSITORY, &referrers, "two", &["amd64"]);
    assert_eq!(
        get(&cache, &of(&referrers)).await,
        Ok(all[0]),
        "the tag is not delayed"
    );
    assert_eq!(digest(&cache, all[0]).await, YOUNG);
    assert_eq!(digest(&cache, all[1]).await, YOUNG);
}

#[tokio::test(start_paused = true)]
async fn older_digest_that_stands_in_continues_by_digest() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    assert_eq!(pulled_tag(&cache).await, old);
    pass(1).await;
    let new = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    pull(&cache, old).await;
    assert_eq!(digest(&cache, new).await, YOUNG);
    pass(3 * DAY).await;
    assert_eq!(pulled_tag(&cache).await, new);
}

#[tokio::test(start_paused = true)]
async fn reload_of_min_age_by_digest_applies_to_cached_copies() {
    let registry = registry();
    let cache = Cache::new(&registry, tag_rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(1).await;
    let new = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    pull(&cache, new).await;
    let cache = cache.reload(rules(), false);
    assert_eq!(digest(&cache, new).await, YOUNG);
    assert_eq!(digest(&cache, old).await, Ok(old));
    registry.set_condition(Condition::Down);
    assert_eq!(digest(&cache, new).await, YOUNG, "also in an outage");
    assert_eq!(digest(&cache, old).await, Ok(old));
    pass(3 * DAY).await;
    assert_eq!(
        digest(&cache, new).await,
        Ok(new),
        "seen under its tag before the reload"
    );
    registry.set_condition(Condition::Healthy);
    let cache = cache.reload(tag_rules(), false);
    assert_eq!(digest(&cache, new).await, Ok(new));
}

#[tokio::test(start_paused = true)]
async fn first_request_by_digest_survives_a_kill() {
    let registry = registry();
    let cache = Cache::on_disk(&registry, rules());
    let image = push(&registry, "one");
    assert_eq!(digest(&cache, image).await, YOUNG);
    registry.cut();
    let cache = cache.kill(rules()).await;
    pass(3 * DAY - 1).await;
    assert_eq!(digest(&cache, image).await, YOUNG);
    pass(1).await;
    assert_eq!(digest(&cache, image).await, Ok(image));
}

#[tokio::test(start_paused = true)]
async fn unknown_digest_is_served_unless_its_tag_just_moved() {
    let registry = registry();
    let cache = Cache::new(&registry, by_digest_rules(OnUnknownAge::Serve));
    let first = push(&registry, "one");
    assert_eq!(digest(&cache, first).await, Ok(first), "nothing shows its age");
    assert_eq!(pulled_tag(&cache).await, first);
    pass(1).await;
    let second = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(first));
    assert_eq!(
        digest(&cache, second).await,
        YOUNG,
        "the tag has just moved to it"
    );
    pass(3 * DAY).await;
    assert_eq!(digest(&cache, second).await, Ok(second));
}

#[tokio::test(start_paused = true)]
async fn age_of_a_digest_is_told_to_authorized_clients_alone() {
    let registry = registry();
    registry.state().public.clear();
    for user in ["alice", "bob"] {
        registry.user(user, "secret");
    }
    registry.lets("alice", REPOSITORY);
    let cache = Cache::new(&registry, rules());
    let image = push(&registry, "one");
    let request = |user: &str| ClientRequest {
        shows: registry.bearer(user),
        ..of(&image.to_string())
    };
    assert_eq!(get(&cache, &request("alice")).await, YOUNG);
    assert_eq!(get(&cache, &request("bob")).await, Err("forbidden"));
    pass(3 * DAY).await;
    assert_eq!(get(&cache, &request("alice")).await, Ok(image));
    assert_eq!(get(&cache, &request("bob")).await, Err("forbidden"));
    registry.lets("bob", REPOSITORY);
    pass(DAY).await;
    assert_eq!(get(&cache, &request("bob")).await, Ok(image), "a second client");
}

#[tokio::test(start_paused = true)]
async fn blob_of_a_young_image_is_not_delayed() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let image = registry.push(REPOSITORY, "1", "one", &[100]);
    assert_eq!(digest(&cache, image).await, YOUNG);
    let manifest = registry.state().shelves[REPOSITORY].manifests[&image].clone();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layer = manifest["layers"][0]["digest"].as_str().unwrap();
    let blob = ClientRequest {
        path: format!("/v2/{REPOSITORY}/blobs/{layer}"),
        ..of("1")
    };
    assert!(get(&cache, &blob).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn t17_clock_set_ahead_matures_no_digest() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let image = push(&registry, "one");
    registry.state().date = Some(now());
    assert_eq!(digest(&cache, image).await, YOUNG);
    super::registry::jump(100 * DAY);
    assert_eq!(digest(&cache, image).await, YOUNG, "the registry knows the time");
    super::registry::jump(-100 * DAY);
    registry.state().date = None;
    pass(3 * DAY).await;
    assert_eq!(digest(&cache, image).await, Ok(image));
}
