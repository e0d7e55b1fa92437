//! Scheduled refreshes: which requests they send and when, and what clients get afterwards.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ifnewer::oci::Digest;
use ifnewer::policy::min_age::AgeOverrides;
use ifnewer::policy::refresh::{RefreshInterval, RefreshOverrides, RefreshPolicy};
use ifnewer::policy::rules::{PolicyOverrides, Rules};
use ifnewer::proxy::RefreshResult;
use tokio::task::JoinHandle;

use super::cache::{Cache, ClientRequest, Got, PROVEN, SHARED};
use super::random_walk::default_policy;
use super::registry::{Condition, Registry, jump};

pub const MINUTE: u64 = 60;
pub const HOUR: u64 = 3600;

/// Every tag is refreshed each hour, and counts as in use for six hours.
pub fn hourly() -> Rules {
    refreshed(RefreshInterval::Every(Duration::from_secs(HOUR)))
}

pub fn refreshed(interval: RefreshInterval) -> Rules {
    let changes = PolicyOverrides {
        refresh: RefreshOverrides {
            interval: Some(interval),
            used_within: Some(Duration::from_secs(6 * HOUR)),
            quota_floor: None,
        },
        ..PolicyOverrides::default()
    };
    with(changes)
}

pub fn with(changes: PolicyOverrides) -> Rules {
    let sites = [PROVEN, SHARED].map(|name| (Arc::from(name), changes));
    assert_eq!(default_policy().refresh, RefreshPolicy::OFF);
    Rules::new(default_policy(), sites, Vec::new()).unwrap()
}

/// A registry with one public repository of these tags, all of one image.
pub fn public(tags: usize) -> (Registry, Digest) {
    let registry = Registry::new();
    let digest = registry.push("acme/app", "1", "one", &[100, 200]);
    let mut state = registry.state();
    state.public.insert("acme/app".to_owned());
    for tag in 2..=tags {
        let place = state.shelves.get_mut("acme/app").unwrap();
        place.tags.insert(tag.to_string(), digest);
    }
    drop(state);
    (registry, digest)
}

pub fn runs(cache: &Cache) -> JoinHandle<()> {
    tokio::spawn(Arc::clone(&cache.proxy).run_scheduled_refreshes(pending()))
}

/// Lets this time pass, on both clocks.
pub async fn pass(seconds: u64) {
    const STEP: u64 = 5;
    for _ in 0..seconds / STEP {
        jump(i64::try_from(STEP).unwrap());
        tokio::time::sleep(Duration::from_secs(STEP)).await;
    }
}

pub fn request(site: &'static str, path: &str, shows: &str) -> ClientRequest {
    ClientRequest {
        site,
        path: path.to_owned(),
        head: false,
        shows: shows.to_owned(),
    }
}

async fn get(cache: &Cache, path: &str) -> (Digest, Bytes) {
    match cache.get(&request(PROVEN, path, "")).await {
        Got::Content(digest, Some(bytes)) => (digest, bytes),
        other => panic!("{path}: {other:?}"),
    }
}

/// Pulls a tag with all its content, without a credential. Returns the digest of the tag.
pub async fn pull(cache: &Cache, tag: &str) -> Digest {
    pull_by(cache, PROVEN, tag, "").await
}

async fn pull_by(cache: &Cache, site: &'static str, tag: &str, shows: &str) -> Digest {
    let path = format!("/v2/acme/app/manifests/{tag}");
    let Got::Content(digest, Some(manifest)) = cache.get(&request(site, &path, shows)).await else {
        panic!("{tag} is not served")
    };
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layers = manifest["layers"].as_array().into_iter().flatten();
    for blob in layers.chain(manifest.get("config")) {
        let path = format!("/v2/acme/app/blobs/{}", blob["digest"].as_str().unwrap());
        let got = cache.get(&request(site, &path, shows)).await;
        assert!(matches!(got, Got::Content(..)), "{got:?}");
    }
    cache.proxy.downloads().idle().await;
    digest
}

/// Takes the log of requests for content.
pub fn requests(registry: &Registry) -> Vec<String> {
    let mut state = registry.state();
    let log = std::mem::take(&mut state.request_log);
    log.into_iter().filter(|line| !line.ends_with("/token")).collect()
}

/// Revalidations, with those that were answered by a challenge because the token had expired.
pub fn heads(log: &[String]) -> usize {
    log.iter()
        .filter(|line| line.starts_with("HEAD") && line.contains("/manifests/"))
        .count()
}

pub fn count(cache: &Cache, result: RefreshResult) -> u64 {
    let status = cache.proxy.refresh_status(super::registry::now());
    status.results.iter().find(|(one, _)| *one == result).unwrap().1
}

/// Waits for the index, which opens on a thread of its own.
pub async fn until_indexed(cache: &Cache) {
    let store = cache.proxy.store();
    while store.on_disk(|view| view.indexed_tags(None, 1).is_none()).await {
        tokio::task::yield_now().await;
    }
}

/// In the 65 minutes before, each tag was revalidated, and few of them twice.
fn each_once(cache: &Cache, tags: u64) {
    let revalidated = count(cache, RefreshResult::Revalidated);
    assert!((tags..=tags * 5 / 4).contains(&revalidated), "{revalidated}");
}

#[tokio::test(start_paused = true)]
async fn moved_tag_is_cached_before_client_asks() {
    let (registry, old) = public(1);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    assert_eq!(pull(&cache, "1").await, old);
    let new = registry.push("acme/app", "1", "two", &[100, 300]);
    pass(2 * HOUR).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 1);
    requests(&registry);

    assert_eq!(pull(&cache, "1").await, new);
    let log = requests(&registry);
    assert_eq!((heads(&log), log.len()), (1, 1), "{log:?}");
    // In an outage too.
    registry.set_condition(Condition::Down);
    assert_eq!(pull(&cache, "1").await, new);
}

#[tokio::test(start_paused = true)]
async fn refreshed_cache_knows_ages_that_another_does_not() {
    let (registry, old) = public(1);
    let stored_at = super::registry::now() - Duration::from_secs(240 * HOUR);
    registry.state().last_modified.insert(old, stored_at);
    let aged = |interval| {
        let changes = PolicyOverrides {
            refresh: RefreshOverrides {
                interval: Some(interval),
                used_within: Some(Duration::from_secs(12 * HOUR)),
                quota_floor: None,
            },
            age_limit: AgeOverrides {
                min_age: Some(Duration::from_secs(3 * HOUR)),
                ..AgeOverrides::default()
            },
            ..PolicyOverrides::default()
        };
        Cache::new(&registry, with(changes))
    };
    let refreshed = aged(RefreshInterval::Every(Duration::from_secs(HOUR)));
    let other = aged(RefreshInterval::Off);
    let _runs = (runs(&refreshed), runs(&other));
    for cache in [&refreshed, &other] {
        assert_eq!(pull(cache, "1").await, old);
    }
    let new = registry.push("acme/app", "1", "two", &[100, 300]);
    requests(&registry);
    pass(2 * HOUR + 30 * MINUTE).await;
    assert!(count(&refreshed, RefreshResult::TooYoung) >= 1);
    let log = requests(&registry);
    assert_eq!(heads(&log), log.len(), "nothing young is fetched: {log:?}");
    assert_eq!(pull(&refreshed, "1").await, old);
    pass(4 * HOUR).await;
    assert_eq!(
        count(&refreshed, RefreshResult::NewDigest),
        1,
        "old enough, and cached"
    );
    assert_eq!(pull(&refreshed, "1").await, new);
    assert_eq!(pull(&other, "1").await, old, "first seen just now");
}

#[tokio::test(start_paused = true)]
async fn unchanged_tag_costs_one_head_an_interval() {
    let (registry, _) = public(1);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    pass(HOUR).await;
    requests(&registry);
    pass(4 * HOUR).await;
    let log = requests(&registry);
    // A challenge comes first when the token has expired.
    let answered = log.iter().filter(|line| line.starts_with("HEAD")).count();
    assert!((4..=8).contains(&answered), "{log:?}");
    assert_eq!(log.len(), answered, "{log:?}");
    let revalidated = count(&cache, RefreshResult::Revalidated);
    assert!((4..=5).contains(&revalidated), "{revalidated}");
}

#[tokio::test(start_paused = true)]
async fn pulls_of_clients_replace_refreshes() {
    let (registry, _) = public(1);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    for _ in 0..20 {
        pull(&cache, "1").await;
        pass(20 * MINUTE).await;
    }
    assert_eq!(count(&cache, RefreshResult::Revalidated), 0);
}

#[tokio::test(start_paused = true)]
async fn tag_that_nobody_pulls_is_left_even_if_it_moves() {
    let (registry, _) = public(1);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    for hour in 0..12 {
        registry.push("acme/app", "1", &format!("hour {hour}"), &[100]);
        pass(HOUR).await;
    }
    let moved = count(&cache, RefreshResult::NewDigest);
    assert!((5..=6).contains(&moved), "{moved}");
    requests(&registry);
    pass(3 * HOUR).await;
    assert_eq!(requests(&registry), Vec::<String>::new());
    // A pull brings it back.
    pull(&cache, "1").await;
    registry.push("acme/app", "1", "again", &[100]);
    pass(2 * HOUR).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), moved + 1);
}

#[tokio::test(start_paused = true)]
async fn restart_keeps_last_use_of_moved_tag() {
    let (registry, _) = public(1);
    let cache = Cache::on_disk(&registry, hourly());
    let task = runs(&cache);
    pull(&cache, "1").await;
    for hour in 0..3 {
        registry.push("acme/app", "1", &format!("hour {hour}"), &[100]);
        pass(HOUR).await;
    }
    assert!(count(&cache, RefreshResult::NewDigest) >= 2);
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    let cache = cache.restart(hourly()).await;
    until_indexed(&cache).await;
    let _runs = runs(&cache);
    pass(4 * HOUR).await;
    requests(&registry);
    pass(2 * HOUR).await;
    assert_eq!(
        requests(&registry),
        Vec::<String>::new(),
        "six hours after the pull"
    );
}

#[tokio::test(start_paused = true)]
async fn pull_between_refreshes_counts_as_use() {
    let (registry, _) = public(1);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    for hour in 0..5 {
        registry.push("acme/app", "1", &format!("hour {hour}"), &[100]);
        pass(HOUR).await;
    }
    pull(&cache, "1").await;
    let before = count(&cache, RefreshResult::NewDigest);
    for hour in 5..10 {
        registry.push("acme/app", "1", &format!("hour {hour}"), &[100]);
        pass(HOUR).await;
    }
    assert!(count(&cache, RefreshResult::NewDigest) >= before + 4);
}

#[tokio::test(start_paused = true)]
async fn platforms_in_use_are_fetched_and_no_others() {
    let registry = Registry::new();
    let platforms = ["amd64", "arm64", "riscv64"];
    let old = registry.push_index("acme/app", "1", "one", &platforms);
    registry.state().public.insert("acme/app".to_owned());
    let mut cache = Cache::new(&registry, hourly());
    cache.takes_indexes = true;
    let _runs = runs(&cache);
    assert_eq!(pull(&cache, "1").await, old[0]);
    pull(&cache, &old[2].to_string()).await;
    let new = registry.push_index("acme/app", "1", "two", &platforms);
    pass(2 * HOUR).await;
    let log = requests(&registry);
    for (image, is_fetched) in [(new[1], false), (new[2], true), (new[3], false)] {
        let got = log.contains(&format!("GET /v2/acme/app/manifests/{image}"));
        assert_eq!(got, is_fetched, "{log:?}");
    }
    assert_eq!(pull(&cache, "1").await, new[0]);
    assert_eq!(pull(&cache, &new[2].to_string()).await, new[2]);
    let log = requests(&registry);
    assert_eq!((heads(&log), log.len()), (1, 1), "{log:?}");
}

#[tokio::test(start_paused = true)]
async fn tag_stays_whole_until_new_image_is_whole() {
    let (registry, old) = public(1);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    let new = registry.push("acme/app", "1", "two", &[100, 300]);
    let layers = std::mem::take(&mut registry.state().shelves.get_mut("acme/app").unwrap().blobs);
    pass(2 * HOUR).await;
    assert!(count(&cache, RefreshResult::FetchFailed) >= 1);
    registry.set_condition(Condition::Down);
    assert_eq!(pull(&cache, "1").await, old);
    registry.set_condition(Condition::Healthy);
    registry.state().shelves.get_mut("acme/app").unwrap().blobs = layers;
    pass(4 * HOUR).await;
    // It moved, or was completed if it had failed twice.
    let results = [RefreshResult::NewDigest, RefreshResult::Completed];
    assert_eq!(results.map(|result| count(&cache, result)).iter().sum::<u64>(), 1);
    registry.set_condition(Condition::Down);
    assert_eq!(pull(&cache, "1").await, new);
}

#[tokio::test(start_paused = true)]
async fn refresh_stops_below_quota_floor() {
    let (registry, _) = public(1);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    registry.state().quota = Some((100, 24));
    pull(&cache, "1").await;
    requests(&registry);
    pass(4 * HOUR).await;
    assert_eq!(requests(&registry), Vec::<String>::new());
    let status = cache.proxy.refresh_status(super::registry::now());
    assert_eq!(
        status.paused.first().map(|(_, pause)| pause.name()),
        Some("quota-floor")
    );
    // A client learns that the quota is back.
    registry.state().quota = Some((100, 25));
    pull(&cache, "1").await;
    let status = cache.proxy.refresh_status(super::registry::now());
    assert_eq!(status.paused, [], "before the next run");
    pass(2 * HOUR).await;
    assert!(count(&cache, RefreshResult::Revalidated) >= 1);
}

#[tokio::test(start_paused = true)]
async fn breaker_of_one_repository_is_no_pause_of_upstream() {
    let (registry, _) = public(1);
    let rules = refreshed(RefreshInterval::Every(Duration::from_secs(20)));
    let cache = Cache::new(&registry, rules);
    pull(&cache, "1").await;
    until_indexed(&cache).await;
    let _runs = runs(&cache);
    registry.state().broken.insert("acme/app".to_owned());
    for _ in 0..3 {
        pull(&cache, "1").await;
    }
    requests(&registry);
    assert_eq!(cache.proven.upstream().status().failures.len(), 1);
    for _ in 0..24 {
        pass(5).await;
        let status = cache.proxy.refresh_status(super::registry::now());
        assert_eq!(status.paused, []);
    }
    assert_eq!(count(&cache, RefreshResult::Unavailable), 0);
}

#[tokio::test(start_paused = true)]
async fn report_of_quota_counts_within_its_window() {
    let (registry, _) = public(1);
    let rules = with(PolicyOverrides {
        refresh: RefreshOverrides {
            interval: Some(RefreshInterval::Every(Duration::from_secs(HOUR))),
            used_within: Some(Duration::from_secs(48 * HOUR)),
            quota_floor: None,
        },
        ..PolicyOverrides::default()
    });
    let cache = Cache::new(&registry, rules);
    let _runs = runs(&cache);
    registry.state().quota = Some((100, 0));
    pull(&cache, "1").await;
    registry.state().quota = Some((100, 100));
    pass(5 * HOUR).await;
    assert_eq!(count(&cache, RefreshResult::Revalidated), 0);
    pass(3 * HOUR).await;
    assert!(count(&cache, RefreshResult::Revalidated) >= 1);
}

#[tokio::test(start_paused = true)]
async fn rate_limit_pauses_and_resumes_spread() {
    let (registry, _) = public(60);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    for tag in 1..=60 {
        pull(&cache, &tag.to_string()).await;
    }
    pass(HOUR).await;
    registry.state().retry_after = 30 * MINUTE;
    registry.set_condition(Condition::Status(429));
    requests(&registry);
    pass(29 * MINUTE).await;
    let log = requests(&registry);
    assert!(log.len() <= 4, "{log:?}");
    registry.set_condition(Condition::Healthy);
    pass(5 * MINUTE).await;
    requests(&registry);
    for _ in 0..6 {
        pass(5 * MINUTE).await;
        let log = requests(&registry);
        assert!(heads(&log) <= 20, "{log:?}");
    }
    // Half of the tags in the first hour, because they were just pulled; then those after the pause.
    let revalidated = count(&cache, RefreshResult::Revalidated);
    assert!((40..=80).contains(&revalidated), "{revalidated}");
}

#[tokio::test(start_paused = true)]
async fn offline_mode_pauses_and_resumes_spread() {
    let (registry, _) = public(60);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    for tag in 1..=60 {
        pull(&cache, &tag.to_string()).await;
    }
    cache.offline.set(true);
    requests(&registry);
    pass(3 * HOUR).await;
    assert_eq!(requests(&registry), Vec::<String>::new());
    let paused = || cache.proxy.refresh_status(super::registry::now()).paused;
    assert_eq!(paused().first().map(|(_, pause)| pause.name()), Some("offline"));
    cache.offline.set(false);
    assert!(paused().is_empty());
    for _ in 0..13 {
        pass(5 * MINUTE).await;
        let log = requests(&registry);
        assert!(heads(&log) <= 20, "{log:?}");
    }
    each_once(&cache, 60);
}

#[tokio::test(start_paused = true)]
async fn outage_costs_few_requests_and_ends_spread() {
    let (registry, _) = public(60);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    for tag in 1..=60 {
        pull(&cache, &tag.to_string()).await;
    }
    pass(30 * MINUTE).await;
    registry.set_condition(Condition::Down);
    pass(2 * HOUR).await;
    let unavailable = count(&cache, RefreshResult::Unavailable);
    // Of 120 slots. The circuit breaker is open most of the time, and the failing tags wait.
    assert!(unavailable <= 60, "{unavailable}");
    registry.set_condition(Condition::Healthy);
    requests(&registry);
    for _ in 0..12 {
        pass(5 * MINUTE).await;
        let log = requests(&registry);
        assert!(heads(&log) <= 20, "{log:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn restart_makes_no_burst() {
    let (registry, _) = public(60);
    let cache = Cache::on_disk(&registry, hourly());
    let task = runs(&cache);
    for tag in 1..=60 {
        pull(&cache, &tag.to_string()).await;
    }
    pass(2 * HOUR).await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    let cache = cache.restart(hourly()).await;
    jump(2 * 3600);
    requests(&registry);
    until_indexed(&cache).await;
    let _runs = runs(&cache);
    for _ in 0..13 {
        pass(5 * MINUTE).await;
        let log = requests(&registry);
        assert!(heads(&log) <= 20, "{log:?}");
    }
    each_once(&cache, 60);
}

#[tokio::test(start_paused = true)]
async fn clock_step_makes_no_burst() {
    for step in [5 * 3600, -5 * 3600] {
        let (registry, _) = public(60);
        let cache = Cache::new(&registry, hourly());
        let _runs = runs(&cache);
        for tag in 1..=60 {
            pull(&cache, &tag.to_string()).await;
        }
        pass(HOUR).await;
        jump(step);
        requests(&registry);
        for _ in 0..6 {
            pass(5 * MINUTE).await;
            let log = requests(&registry);
            assert!(heads(&log) <= 20, "{step}: {log:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn reload_changes_interval_at_once() {
    let (registry, _) = public(1);
    let cache = Cache::new(&registry, with(PolicyOverrides::default()));
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    requests(&registry);
    pass(3 * HOUR).await;
    assert_eq!(requests(&registry), Vec::<String>::new());
    let minutely = RefreshInterval::Every(Duration::from_secs(MINUTE));
    let cache = cache.reload(refreshed(minutely), false);
    pass(10 * MINUTE).await;
    let revalidated = count(&cache, RefreshResult::Revalidated);
    assert!((8..=11).contains(&revalidated), "{revalidated}");
    let cache = cache.reload(hourly(), false);
    pass(10 * MINUTE).await;
    assert!(count(&cache, RefreshResult::Revalidated) <= revalidated + 1);
    let cache = cache.reload(refreshed(RefreshInterval::Off), false);
    requests(&registry);
    pass(2 * HOUR).await;
    assert_eq!(requests(&registry), Vec::<String>::new());
    assert_eq!(cache.proxy.refresh_status(super::registry::now()).tags, 0);
}

#[tokio::test(start_paused = true)]
async fn clients_credential_is_never_used() {
    let registry = Registry::new();
    registry.push("acme/app", "1", "one", &[100]);
    registry.user("alice", "a");
    registry.lets("alice", "acme/app");
    let alice = registry.bearer("alice");
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    pull_by(&cache, PROVEN, "1", &alice).await;
    requests(&registry);
    registry.push("acme/app", "1", "two", &[100]);
    pass(4 * HOUR).await;
    assert_eq!(requests(&registry), Vec::<String>::new());
    let status = cache.proxy.refresh_status(super::registry::now());
    assert_eq!((status.tags, status.private), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn own_credential_refreshes_private_images() {
    let registry = Registry::new();
    registry.push("acme/app", "1", "one", &[100]);
    registry.user("service", "service-secret");
    registry.lets("service", "acme/app");
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    pull_by(&cache, SHARED, "1", "").await;
    let new = registry.push("acme/app", "1", "two", &[100]);
    pass(2 * HOUR).await;
    registry.set_condition(Condition::Down);
    assert_eq!(pull_by(&cache, SHARED, "1", "").await, new);
    // The other upstream has nothing of it.
    let got = cache.get(&request(PROVEN, "/v2/acme/app/manifests/1", "")).await;
    assert!(matches!(got, Got::No(_)), "{got:?}");
}

#[tokio::test(start_paused = true)]
async fn repository_that_becomes_private_is_left() {
    let (registry, _) = public(1);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    registry.state().public.clear();
    pass(2 * HOUR).await;
    assert_eq!(count(&cache, RefreshResult::Denied), 1);
    requests(&registry);
    pass(3 * HOUR).await;
    assert_eq!(requests(&registry), Vec::<String>::new());
    // The denial withdrew the public mark, also for an outage.
    registry.set_condition(Condition::Down);
    let got = cache.get(&request(PROVEN, "/v2/acme/app/manifests/1", "")).await;
    assert!(matches!(got, Got::No(_)), "{got:?}");
}

#[tokio::test(start_paused = true)]
async fn deleted_tag_stays_cached_and_is_asked_for_less_often() {
    let (registry, _) = public(1);
    let rules = with(PolicyOverrides {
        refresh: RefreshOverrides {
            interval: Some(RefreshInterval::Every(Duration::from_secs(HOUR))),
            used_within: Some(Duration::from_secs(48 * HOUR)),
            quota_floor: None,
        },
        ..PolicyOverrides::default()
    });
    let cache = Cache::new(&registry, rules);
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    registry.state().shelves.get_mut("acme/app").unwrap().tags.clear();
    pass(18 * HOUR).await;
    // In the slots 1, 2, 4, 8 and 16 of 18.
    let asked = count(&cache, RefreshResult::NotFound);
    assert!((4..=5).contains(&asked), "{asked}");
    let key = cache.proxy.refresh_status(super::registry::now());
    assert_eq!(key.tags, 1);
}

#[tokio::test(start_paused = true)]
async fn slow_upstream_gets_few_refreshes_and_clients_pass() {
    let (registry, digest) = public(200);
    let cache = Cache::new(
        &registry,
        refreshed(RefreshInterval::Every(Duration::from_secs(MINUTE))),
    );
    let _runs = runs(&cache);
    for tag in 1..=200 {
        pull(&cache, &tag.to_string()).await;
    }
    registry.push("acme/app", "other", "other", &[100]);
    pass(HOUR).await;
    // With a new token, so that nothing waits for one.
    requests(&registry);
    while !registry.request_log().iter().any(|line| line.ends_with("/token")) {
        pass(5).await;
    }
    registry.set_condition(Condition::Stalled);
    requests(&registry);
    pass(20).await;
    let stalled = requests(&registry);
    assert!((1..=2).contains(&stalled.len()), "{stalled:?}");
    let status = cache.proxy.refresh_status(super::registry::now());
    assert!(status.overdue.is_some());
    // A client's request is sent at once, past everything that waits.
    let other = request(PROVEN, "/v2/acme/app/manifests/other", "");
    let asking = cache.get(&other);
    tokio::pin!(asking);
    let sent = async {
        while !registry.request_log().iter().any(|line| line.ends_with("/other")) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        got = &mut asking => panic!("{got:?}"),
        () = sent => {}
    }
    registry.set_condition(Condition::Healthy);
    let Got::Content(other, _) = asking.await else {
        panic!("not served")
    };
    assert_ne!(other, digest);
}

#[tokio::test(start_paused = true)]
async fn policy_if_not_present_serves_what_refresh_brought() {
    let (registry, old) = public(1);
    let rules = with(PolicyOverrides {
        policy: Some(ifnewer::policy::Policy::IfNotPresent),
        refresh: RefreshOverrides {
            interval: Some(RefreshInterval::Every(Duration::from_secs(HOUR))),
            ..RefreshOverrides::default()
        },
        ..PolicyOverrides::default()
    });
    let cache = Cache::new(&registry, rules);
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    let new = registry.push("acme/app", "1", "two", &[100]);
    assert_eq!(pull(&cache, "1").await, old);
    pass(2 * HOUR).await;
    assert_eq!(pull(&cache, "1").await, new);
}

#[tokio::test(start_paused = true)]
async fn wrong_bytes_change_no_tag() {
    let (registry, old) = public(1);
    let cache = Cache::new(&registry, hourly());
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    let new = registry.push("acme/app", "1", "two", &[100]);
    {
        let mut state = registry.state();
        let place = state.shelves.get_mut("acme/app").unwrap();
        place.manifests.insert(new, Bytes::from_static(b"{}"));
    }
    pass(2 * HOUR).await;
    assert!(count(&cache, RefreshResult::FetchFailed) >= 1);
    registry.set_condition(Condition::Down);
    assert_eq!(pull(&cache, "1").await, old);
    let _ = get(&cache, &format!("/v2/acme/app/manifests/{old}")).await;
}
