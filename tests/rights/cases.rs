//! The interleavings found dangerous, one by one.

use std::sync::Arc;
use std::time::Duration;

use ifnewer::oci::Digest;
use ifnewer::proxy::invalidation::{WriteEffect, WriteOutcome};
use tokio::task::JoinHandle;

use super::cache::{Cache, Got, PROVEN, SHARED, Wish};
use super::registry::{Mood, No, Registry, jump};
use super::walk::{basic, rules};

fn alice() -> String {
    basic("alice", "alice-secret")
}

fn bob() -> String {
    basic("bob", "bob-secret")
}

/// Alice may read `acme/app`, bob may not; `pub/one` is everybody's.
fn stocked() -> (Registry, Arc<Cache>) {
    let registry = Registry::new();
    for user in ["alice", "bob", "service"] {
        registry.user(user, &format!("{user}-secret"));
    }
    registry.lets("alice", "acme/app");
    registry.lets("service", "acme/app");
    registry.state().public.insert("pub/one".to_owned());
    for repository in ["acme/app", "pub/one"] {
        registry.push(repository, "1", "one", &[40]);
        registry.push(repository, "2", "two", &[40]);
    }
    let cache = Arc::new(Cache::new(&registry, rules(false)));
    (registry, cache)
}

fn tag(repository: &str, tag: &str, shows: String) -> Wish {
    Wish {
        site: PROVEN,
        path: format!("/v2/{repository}/manifests/{tag}"),
        head: false,
        shows,
    }
}

/// The first layer of what the tag names.
fn layer(registry: &Registry, repository: &str, shows: String) -> Wish {
    let digest = registry.state().shelves[repository]
        .blobs
        .keys()
        .next()
        .copied()
        .unwrap();
    Wish {
        path: format!("/v2/{repository}/blobs/{digest}"),
        ..tag(repository, "", shows)
    }
}

async fn pulls(cache: &Cache, registry: &Registry, repository: &str, shows: &str) {
    gets(cache, tag(repository, "1", shows.to_owned())).await;
    let blobs: Vec<_> = registry.state().shelves[repository]
        .blobs
        .keys()
        .copied()
        .collect();
    for blob in blobs {
        let path = format!("/v2/{repository}/blobs/{blob}");
        gets(
            cache,
            Wish {
                path,
                ..tag(repository, "", shows.to_owned())
            },
        )
        .await;
    }
    settle().await;
}

async fn gets(cache: &Cache, wish: Wish) {
    let got = cache.get(&wish).await;
    assert!(!matches!(got, Got::No(_)), "{wish:?}: {got:?}");
}

async fn gets_nothing(cache: &Cache, wish: Wish) {
    let got = cache.get(&wish).await;
    assert!(matches!(got, Got::No(_)), "{wish:?}: {got:?}");
}

/// What goes on in the background ends.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(200)).await;
}

#[tokio::test(start_paused = true)]
async fn a_yes_that_a_no_has_overtaken_brings_no_right_back() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    jump(3600);
    // Decided while she might, and on its way until after she was refused.
    registry.mood(Mood::Stalls);
    let late = tokio::spawn({
        let cache = Arc::clone(&cache);
        async move { cache.get(&tag("acme/app", "2", alice())).await }
    });
    settle().await;
    registry.state().mood = Mood::Well;
    registry.revokes("alice", "acme/app");
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    registry.mood(Mood::Well);
    late.await.unwrap();

    registry.mood(Mood::Gone);
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn t01_who_asks_after_a_denial_does_not_share_an_older_question() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    // Decided while she might read, and on its way until after she was refused.
    registry.mood(Mood::Stalls);
    let ask = || {
        let cache = Arc::clone(&cache);
        tokio::spawn(async move { cache.get(&tag("acme/app", "2", alice())).await })
    };
    let early = ask();
    settle().await;
    registry.state().mood = Mood::Well;
    registry.revokes("alice", "acme/app");
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    let late = ask();
    settle().await;
    registry.mood(Mood::Well);
    early.await.unwrap();
    let late = late.await.unwrap();
    assert!(matches!(late, Got::No(_)), "{late:?}");
}

/// A tag that is served unasked is cached, and a question about it is held back, with the answer from before a push.
async fn question_before_a_push() -> (Registry, Arc<Cache>, JoinHandle<Got>, Wish) {
    let (registry, cache) = stocked();
    for user in ["alice", "bob"] {
        registry.lets(user, "acme/present");
    }
    registry.push("acme/present", "1", "old", &[40]);
    // An incomplete image is not served in an outage.
    pulls(&cache, &registry, "acme/present", &alice()).await;
    registry.mood(Mood::Holds);
    let late = tokio::spawn({
        let cache = Arc::clone(&cache);
        async move { cache.get(&tag("acme/present", "1", bob())).await }
    });
    settle().await;
    registry.state().mood = Mood::Well;
    (registry, cache, late, tag("acme/present", "1", alice()))
}

async fn pushes(cache: &Cache, registry: &Registry) -> Digest {
    let change = WriteEffect::Tags("acme/present".parse().unwrap(), vec!["1".parse().unwrap()]);
    let handed = cache.pull.hands_on(&cache.proven, change).await;
    let new = registry.push("acme/present", "1", "new", &[40]);
    cache.pull.written(handed, WriteOutcome::Succeeded).await;
    new
}

#[tokio::test(start_paused = true)]
async fn t01_late_response_over_a_reload_brings_no_pushed_tag_back() {
    let (registry, cache, late, wish) = question_before_a_push().await;
    let cache = Arc::new(cache.reload(rules(false), false));
    let new = pushes(&cache, &registry).await;
    registry.mood(Mood::Well);
    late.await.unwrap();
    settle().await;
    let got = cache.get(&wish).await;
    assert!(matches!(got, Got::Content(digest, _) if digest == new), "{got:?}");
}

#[tokio::test(start_paused = true)]
async fn t16_late_response_brings_no_pushed_tag_back_in_an_outage() {
    let (registry, cache, late, wish) = question_before_a_push().await;
    pushes(&cache, &registry).await;
    registry.mood(Mood::Well);
    late.await.unwrap();
    settle().await;
    registry.mood(Mood::Gone);
    gets_nothing(&cache, wish).await;
}

#[tokio::test(start_paused = true)]
async fn t16_tag_cached_during_a_push_is_in_doubt_after_a_kill() {
    let (registry, cache) = stocked();
    registry.lets("alice", "acme/present");
    registry.push("acme/present", "1", "old", &[40]);
    let change = WriteEffect::Tags("acme/present".parse().unwrap(), vec!["1".parse().unwrap()]);
    let handed = cache.pull.hands_on(&cache.proven, change).await;
    // Not cached when the push was handed on, so nothing was in doubt then.
    gets(&cache, tag("acme/present", "1", alice())).await;
    settle().await;
    let new = registry.push("acme/present", "1", "new", &[40]);
    drop(handed);
    registry.cut();
    let cache = Arc::into_inner(cache).unwrap().kill(rules(false)).await;
    for _ in 0..2 {
        let got = cache.get(&tag("acme/present", "1", alice())).await;
        assert!(matches!(got, Got::Content(digest, _) if digest == new), "{got:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn t01_right_denied_before_a_kill_stays_denied_in_an_outage() {
    let (registry, _) = stocked();
    let cache = Cache::on_disk(&registry, rules(false));
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.revokes("alice", "acme/app");
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    registry.mood(Mood::Gone);
    registry.cut();
    let cache = cache.kill(rules(false)).await;
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn a_list_that_was_shown_is_no_right_to_pull() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry
        .state()
        .lists
        .insert(("bob".to_owned(), "acme/app".to_owned()));
    let list = Wish {
        path: "/v2/acme/app/tags/list".to_owned(),
        ..tag("acme/app", "", bob())
    };
    gets(&cache, list.clone()).await;
    gets_nothing(&cache, layer(&registry, "acme/app", bob())).await;
    gets(&cache, list).await;

    registry.mood(Mood::Gone);
    gets_nothing(&cache, tag("acme/app", "1", bob())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", bob())).await;
}

#[tokio::test(start_paused = true)]
async fn a_repository_that_was_closed_is_closed_to_everybody_though_only_one_was_told() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "pub/one", "").await;
    registry.state().public.remove("pub/one");
    gets_nothing(&cache, tag("pub/one", "1", bob())).await;
    settle().await;

    gets_nothing(&cache, layer(&registry, "pub/one", String::new())).await;
    registry.mood(Mood::Gone);
    for shows in [String::new(), alice(), bob()] {
        gets_nothing(&cache, tag("pub/one", "1", shows.clone())).await;
        gets_nothing(&cache, layer(&registry, "pub/one", shows)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_wrong_password_closes_no_public_repository() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "pub/one", "").await;
    gets_nothing(&cache, tag("pub/one", "1", basic("bob", "guess"))).await;
    settle().await;

    registry.mood(Mood::Gone);
    gets(&cache, tag("pub/one", "1", String::new())).await;
    gets(&cache, layer(&registry, "pub/one", String::new())).await;
}

#[tokio::test(start_paused = true)]
async fn a_404_gives_no_right() {
    let (registry, cache) = stocked();
    registry.state().no = No::Masked;
    pulls(&cache, &registry, "acme/app", &alice()).await;
    gets_nothing(&cache, tag("acme/app", "1", bob())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", bob())).await;

    registry.mood(Mood::Gone);
    gets_nothing(&cache, tag("acme/app", "1", bob())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", bob())).await;
    gets(&cache, tag("acme/app", "1", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn a_token_service_that_is_down_hides_no_refusal_of_the_registry() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.revokes("alice", "acme/app");
    registry.mood(Mood::NoTokens);
    // Her token has not run out, and the registry says no to it. That no new one can be had changes nothing.
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    registry.mood(Mood::Gone);
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn a_token_service_that_is_down_takes_no_right_away() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.mood(Mood::NoTokens);
    tokio::time::sleep(Duration::from_secs(400)).await;
    jump(400);
    gets(&cache, tag("acme/app", "1", alice())).await;
    gets_nothing(&cache, tag("acme/app", "1", bob())).await;
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_was_set_back_costs_nobody_the_right_shown_since() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    pulls(&cache, &registry, "pub/one", "").await;
    jump(-3600);
    gets(&cache, tag("acme/app", "1", alice())).await;
    gets(&cache, tag("pub/one", "1", String::new())).await;

    registry.mood(Mood::Gone);
    gets(&cache, tag("acme/app", "1", alice())).await;
    gets(&cache, layer(&registry, "acme/app", alice())).await;
    gets(&cache, tag("pub/one", "1", String::new())).await;
}

#[tokio::test(start_paused = true)]
async fn t17_a_clock_set_back_in_an_outage_takes_no_right_away_within_an_hour() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.mood(Mood::Gone);
    gets(&cache, tag("acme/app", "1", alice())).await;
    for back in [-1800, -1800] {
        jump(back);
        gets(&cache, tag("acme/app", "1", alice())).await;
        gets(&cache, layer(&registry, "acme/app", alice())).await;
        gets_nothing(&cache, tag("acme/app", "1", bob())).await;
    }
    jump(-1);
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", alice())).await;
    jump(1);
    gets(&cache, tag("acme/app", "1", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn t17_a_clock_set_back_saves_no_question_while_the_registry_answers() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.revokes("alice", "acme/app");
    jump(-1800);
    gets_nothing(&cache, layer(&registry, "acme/app", alice())).await;
    registry.mood(Mood::Gone);
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_shared_upstream_brought_is_nobodys_at_a_proven_one() {
    let (registry, cache) = stocked();
    let shared = |wish: Wish| Wish { site: SHARED, ..wish };
    gets(&cache, shared(tag("acme/app", "1", String::new()))).await;
    gets(&cache, shared(layer(&registry, "acme/app", String::new()))).await;

    for mood in [Mood::Well, Mood::Gone] {
        registry.mood(mood);
        for shows in [String::new(), bob()] {
            gets_nothing(&cache, tag("acme/app", "1", shows.clone())).await;
            gets_nothing(&cache, layer(&registry, "acme/app", shows)).await;
        }
        gets(&cache, shared(layer(&registry, "acme/app", bob()))).await;
    }
}

#[tokio::test(start_paused = true)]
async fn grant_is_dated_by_its_question_and_not_by_its_answer() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    jump(3600);
    registry.mood(Mood::Stalls);
    let late = tokio::spawn({
        let cache = Arc::clone(&cache);
        async move { cache.get(&tag("acme/app", "1", alice())).await }
    });
    settle().await;
    // Longer than a grant lasts.
    jump(400);
    registry.mood(Mood::Well);
    late.await.unwrap();
    tokio::time::sleep(Duration::from_secs(40)).await;

    let before = registry.asked().len();
    gets(&cache, layer(&registry, "acme/app", alice())).await;
    assert!(
        registry.asked().len() > before,
        "served on a grant that has lapsed"
    );
}
