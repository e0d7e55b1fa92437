//! Interleavings that were found dangerous.

use std::sync::Arc;
use std::time::Duration;

use ifnewer::oci::Digest;
use ifnewer::proxy::invalidation::{WriteEffect, WriteOutcome};
use tokio::task::JoinHandle;

use super::cache::{Cache, ClientRequest, Got, PROVEN, SHARED};
use super::random_walk::{basic, rules};
use super::registry::{Condition, No, Registry, jump};

fn alice() -> String {
    basic("alice", "alice-secret")
}

fn bob() -> String {
    basic("bob", "bob-secret")
}

/// Alice may read `acme/app`, bob may not; `pub/one` is public.
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

fn tag(repository: &str, tag: &str, shows: String) -> ClientRequest {
    ClientRequest {
        site: PROVEN,
        path: format!("/v2/{repository}/manifests/{tag}"),
        head: false,
        shows,
    }
}

/// First layer of the tag's image.
fn layer(registry: &Registry, repository: &str, shows: String) -> ClientRequest {
    let digest = registry.state().shelves[repository]
        .blobs
        .keys()
        .next()
        .copied()
        .unwrap();
    ClientRequest {
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
            ClientRequest {
                path,
                ..tag(repository, "", shows.to_owned())
            },
        )
        .await;
    }
    settle().await;
}

async fn gets(cache: &Cache, client_request: ClientRequest) {
    let got = cache.get(&client_request).await;
    assert!(!matches!(got, Got::No(_)), "{client_request:?}: {got:?}");
}

async fn gets_nothing(cache: &Cache, client_request: ClientRequest) {
    let got = cache.get(&client_request).await;
    assert!(matches!(got, Got::No(_)), "{client_request:?}: {got:?}");
}

/// Waits for background work.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(200)).await;
}

#[tokio::test(start_paused = true)]
async fn late_success_does_not_restore_denied_grant() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    jump(3600);
    // Decided before the denial, delivered after it.
    registry.set_condition(Condition::Stalled);
    let late = tokio::spawn({
        let cache = Arc::clone(&cache);
        async move { cache.get(&tag("acme/app", "2", alice())).await }
    });
    settle().await;
    registry.state().condition = Condition::Healthy;
    registry.revokes("alice", "acme/app");
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    registry.set_condition(Condition::Healthy);
    late.await.unwrap();

    registry.set_condition(Condition::Down);
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn t01_request_after_denial_does_not_join_older_one() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    // Decided before the denial, delivered after it.
    registry.set_condition(Condition::Stalled);
    let ask = || {
        let cache = Arc::clone(&cache);
        tokio::spawn(async move { cache.get(&tag("acme/app", "2", alice())).await })
    };
    let early = ask();
    settle().await;
    registry.state().condition = Condition::Healthy;
    registry.revokes("alice", "acme/app");
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    let late = ask();
    settle().await;
    registry.set_condition(Condition::Healthy);
    early.await.unwrap();
    let late = late.await.unwrap();
    assert!(matches!(late, Got::No(_)), "{late:?}");
}

/// A cached tag that is served without revalidation, and a delayed revalidation with the response from before a push.
async fn question_before_a_push() -> (Registry, Arc<Cache>, JoinHandle<Got>, ClientRequest) {
    let (registry, cache) = stocked();
    for user in ["alice", "bob"] {
        registry.lets(user, "acme/present");
    }
    registry.push("acme/present", "1", "old", &[40]);
    // An incomplete image is not served in an outage.
    pulls(&cache, &registry, "acme/present", &alice()).await;
    registry.set_condition(Condition::HoldsTokenResponses);
    let late = tokio::spawn({
        let cache = Arc::clone(&cache);
        async move { cache.get(&tag("acme/present", "1", bob())).await }
    });
    settle().await;
    registry.state().condition = Condition::Healthy;
    (registry, cache, late, tag("acme/present", "1", alice()))
}

async fn pushes(cache: &Cache, registry: &Registry) -> Digest {
    let change = WriteEffect::Tags("acme/present".parse().unwrap(), vec!["1".parse().unwrap()]);
    let pending = cache.proxy.begin_write(&cache.proven, change).await;
    let new = registry.push("acme/present", "1", "new", &[40]);
    cache.proxy.finish_write(pending, WriteOutcome::Succeeded).await;
    new
}

#[tokio::test(start_paused = true)]
async fn t01_late_response_after_reload_does_not_undo_push() {
    let (registry, cache, late, client_request) = question_before_a_push().await;
    let cache = Arc::new(cache.reload(rules(false), false));
    let new = pushes(&cache, &registry).await;
    registry.set_condition(Condition::Healthy);
    late.await.unwrap();
    settle().await;
    let got = cache.get(&client_request).await;
    assert!(matches!(got, Got::Content(digest, _) if digest == new), "{got:?}");
}

#[tokio::test(start_paused = true)]
async fn t16_late_response_does_not_undo_push_in_outage() {
    let (registry, cache, late, client_request) = question_before_a_push().await;
    pushes(&cache, &registry).await;
    registry.set_condition(Condition::Healthy);
    late.await.unwrap();
    settle().await;
    registry.set_condition(Condition::Down);
    gets_nothing(&cache, client_request).await;
}

/// A write of unknown outcome, such as one whose client left after the request head, needs no right to push.
#[tokio::test(start_paused = true)]
async fn t16_unfinished_write_removes_no_tag() {
    let (registry, cache, late, client_request) = question_before_a_push().await;
    let change = WriteEffect::Tags("acme/present".parse().unwrap(), vec!["1".parse().unwrap()]);
    drop(cache.proxy.begin_write(&cache.proven, change).await);
    registry.set_condition(Condition::Healthy);
    late.await.unwrap();
    settle().await;
    registry.set_condition(Condition::Down);
    gets(&cache, client_request).await;
}

#[tokio::test(start_paused = true)]
async fn t16_tag_cached_during_push_is_invalidated_after_kill() {
    let (registry, cache) = stocked();
    registry.lets("alice", "acme/present");
    registry.push("acme/present", "1", "old", &[40]);
    let change = WriteEffect::Tags("acme/present".parse().unwrap(), vec!["1".parse().unwrap()]);
    let pending = cache.proxy.begin_write(&cache.proven, change).await;
    // Not cached when the push was forwarded, so nothing was invalidated then.
    gets(&cache, tag("acme/present", "1", alice())).await;
    settle().await;
    let new = registry.push("acme/present", "1", "new", &[40]);
    drop(pending);
    registry.cut();
    let cache = Arc::into_inner(cache).unwrap().kill(rules(false)).await;
    for _ in 0..2 {
        let got = cache.get(&tag("acme/present", "1", alice())).await;
        assert!(matches!(got, Got::Content(digest, _) if digest == new), "{got:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn t01_denial_before_kill_holds_in_outage() {
    let (registry, _) = stocked();
    let cache = Cache::on_disk(&registry, rules(false));
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.revokes("alice", "acme/app");
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    registry.set_condition(Condition::Down);
    registry.cut();
    let cache = cache.kill(rules(false)).await;
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn list_access_is_not_pull_access() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry
        .state()
        .lists
        .insert(("bob".to_owned(), "acme/app".to_owned()));
    let list = ClientRequest {
        path: "/v2/acme/app/tags/list".to_owned(),
        ..tag("acme/app", "", bob())
    };
    gets(&cache, list.clone()).await;
    gets_nothing(&cache, layer(&registry, "acme/app", bob())).await;
    gets(&cache, list).await;

    registry.set_condition(Condition::Down);
    gets_nothing(&cache, tag("acme/app", "1", bob())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", bob())).await;
}

#[tokio::test(start_paused = true)]
async fn denial_of_one_client_closes_public_repository() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "pub/one", "").await;
    registry.state().public.remove("pub/one");
    gets_nothing(&cache, tag("pub/one", "1", bob())).await;
    settle().await;

    gets_nothing(&cache, layer(&registry, "pub/one", String::new())).await;
    registry.set_condition(Condition::Down);
    for shows in [String::new(), alice(), bob()] {
        gets_nothing(&cache, tag("pub/one", "1", shows.clone())).await;
        gets_nothing(&cache, layer(&registry, "pub/one", shows)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn wrong_password_keeps_public_repository_open() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "pub/one", "").await;
    gets_nothing(&cache, tag("pub/one", "1", basic("bob", "guess"))).await;
    settle().await;

    registry.set_condition(Condition::Down);
    gets(&cache, tag("pub/one", "1", String::new())).await;
    gets(&cache, layer(&registry, "pub/one", String::new())).await;
}

#[tokio::test(start_paused = true)]
async fn not_found_response_grants_nothing() {
    let (registry, cache) = stocked();
    registry.state().no = No::Masked;
    pulls(&cache, &registry, "acme/app", &alice()).await;
    gets_nothing(&cache, tag("acme/app", "1", bob())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", bob())).await;

    registry.set_condition(Condition::Down);
    gets_nothing(&cache, tag("acme/app", "1", bob())).await;
    gets_nothing(&cache, layer(&registry, "acme/app", bob())).await;
    gets(&cache, tag("acme/app", "1", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn not_found_for_another_accept_removes_no_tag() {
    let (registry, cache) = stocked();
    let mut cache = Arc::into_inner(cache).unwrap();
    pulls(&cache, &registry, "pub/one", "").await;
    let named = registry.state().shelves["pub/one"].tags["1"];
    registry.state().needs_listed_type.insert(named);
    let of_anyone = || tag("pub/one", "1", String::new());
    cache.accept = Some("*/*");
    gets_nothing(&cache, of_anyone()).await;
    registry.set_condition(Condition::Down);
    cache.accept = None;
    gets(&cache, of_anyone()).await;

    // A client with a credential but no grant, as one with the token of a pull.
    registry.set_condition(Condition::Healthy);
    let deleted = |state: &mut super::registry::State| {
        state.shelves.get_mut("pub/one").unwrap().tags.remove("1");
    };
    deleted(&mut registry.state());
    gets_nothing(&cache, tag("pub/one", "1", alice())).await;
    registry.set_condition(Condition::Down);
    gets_nothing(&cache, of_anyone()).await;
}

#[tokio::test(start_paused = true)]
async fn not_found_after_a_lost_right_removes_no_tag() {
    let (registry, cache) = stocked();
    registry.state().no = No::Masked;
    registry.lets("bob", "acme/app");
    pulls(&cache, &registry, "acme/app", &alice()).await;
    gets(&cache, tag("acme/app", "1", bob())).await;
    registry.revokes("bob", "acme/app");
    // Longer than `grant_ttl`.
    jump(3600);
    gets_nothing(&cache, tag("acme/app", "1", bob())).await;
    registry.set_condition(Condition::Down);
    gets(&cache, tag("acme/app", "1", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn registry_denial_counts_in_token_service_outage() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.revokes("alice", "acme/app");
    registry.set_condition(Condition::TokenServiceDown);
    // Her token is still valid and the registry denies it. The token service outage must not hide that.
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
    registry.set_condition(Condition::Down);
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn token_service_outage_revokes_no_grant() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.set_condition(Condition::TokenServiceDown);
    tokio::time::sleep(Duration::from_secs(400)).await;
    jump(400);
    gets(&cache, tag("acme/app", "1", alice())).await;
    gets_nothing(&cache, tag("acme/app", "1", bob())).await;
}

#[tokio::test(start_paused = true)]
async fn clock_set_back_keeps_grants_recorded_since() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    pulls(&cache, &registry, "pub/one", "").await;
    jump(-3600);
    gets(&cache, tag("acme/app", "1", alice())).await;
    gets(&cache, tag("pub/one", "1", String::new())).await;

    registry.set_condition(Condition::Down);
    gets(&cache, tag("acme/app", "1", alice())).await;
    gets(&cache, layer(&registry, "acme/app", alice())).await;
    gets(&cache, tag("pub/one", "1", String::new())).await;
}

#[tokio::test(start_paused = true)]
async fn t17_clock_set_back_in_outage_keeps_grants_for_an_hour() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.set_condition(Condition::Down);
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
async fn t17_clock_set_back_does_not_skip_revalidation() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    registry.revokes("alice", "acme/app");
    jump(-1800);
    gets_nothing(&cache, layer(&registry, "acme/app", alice())).await;
    registry.set_condition(Condition::Down);
    gets_nothing(&cache, tag("acme/app", "1", alice())).await;
}

#[tokio::test(start_paused = true)]
async fn shared_upstream_content_needs_grant_at_per_client() {
    let (registry, cache) = stocked();
    let shared = |client_request: ClientRequest| ClientRequest {
        site: SHARED,
        ..client_request
    };
    gets(&cache, shared(tag("acme/app", "1", String::new()))).await;
    gets(&cache, shared(layer(&registry, "acme/app", String::new()))).await;

    for condition in [Condition::Healthy, Condition::Down] {
        registry.set_condition(condition);
        for shows in [String::new(), bob()] {
            gets_nothing(&cache, tag("acme/app", "1", shows.clone())).await;
            gets_nothing(&cache, layer(&registry, "acme/app", shows)).await;
        }
        gets(&cache, shared(layer(&registry, "acme/app", bob()))).await;
    }
}

#[tokio::test(start_paused = true)]
async fn grant_time_is_time_of_request() {
    let (registry, cache) = stocked();
    pulls(&cache, &registry, "acme/app", &alice()).await;
    jump(3600);
    registry.set_condition(Condition::Stalled);
    let late = tokio::spawn({
        let cache = Arc::clone(&cache);
        async move { cache.get(&tag("acme/app", "1", alice())).await }
    });
    settle().await;
    // Longer than `grant_ttl`.
    jump(400);
    registry.set_condition(Condition::Healthy);
    late.await.unwrap();
    tokio::time::sleep(Duration::from_secs(40)).await;

    let before = registry.request_log().len();
    gets(&cache, layer(&registry, "acme/app", alice())).await;
    assert!(
        registry.request_log().len() > before,
        "served with an expired grant"
    );
}
