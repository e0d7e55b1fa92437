//! Last use of tags that are refreshed: pulls by clients count, also during a refresh, and refreshes do not.

use std::time::{Duration, SystemTime};

use ifnewer::policy::Policy;
use ifnewer::policy::refresh::{RefreshInterval, RefreshOverrides};
use ifnewer::policy::rules::PolicyOverrides;
use ifnewer::proxy::RefreshResult;

use super::cache::{Cache, Got};
use super::registry::{Registry, now};
use super::scheduled_refresh::{HOUR, count, hourly, pass, public, pull, requests, runs, with};
use super::scheduled_refresh_races::{BLOBS, compare, key, move_tags, until_requested};

const DIGESTS: &str = "GET /v2/acme/app/manifests/sha256:";

async fn last_use(cache: &Cache, tag: &str) -> Option<SystemTime> {
    let key = key(tag);
    let store = cache.proxy.store();
    store
        .on_disk(move |view| view.last_use(&view.tag(&key).unwrap().unwrap()))
        .await
}

/// Lets time pass, in which clients request something else. The store learns the time from them.
async fn pass_with_clients(cache: &Cache, hours: u64) {
    for _ in 0..hours * 12 {
        pass(300).await;
        compare(cache, "busy").await;
    }
}

/// Lets time pass until the registry got such a request, then a client requests the tag. Returns when.
async fn pull_while_held(registry: &Registry, cache: &Cache, prefix: &str) -> SystemTime {
    registry.hold(prefix);
    requests(registry);
    until_requested(registry, prefix).await;
    pass(5).await;
    let pulled_at = now();
    assert!(matches!(compare(cache, "1").await, Got::Content(..)));
    pass(5).await;
    registry.release();
    pass(5).await;
    pulled_at
}

#[tokio::test(start_paused = true)]
async fn pull_during_refresh_counts_as_use() {
    let (registry, _) = public(1);
    let mut cache = Cache::new(&registry, hourly());
    cache.accepts_all = true;
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    pass(HOUR).await;
    move_tags(&registry, 1);
    // The new manifest is cached already, so the client gets that.
    let pulled_at = pull_while_held(&registry, &cache, BLOBS).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 1);
    assert_eq!(last_use(&cache, "1").await, Some(pulled_at));
}

#[tokio::test(start_paused = true)]
async fn pull_of_previous_image_during_refresh_counts_as_use() {
    for prefix in [DIGESTS, BLOBS] {
        let (registry, old) = public(1);
        let rules = with(PolicyOverrides {
            policy: Some(Policy::IfNotPresent),
            refresh: RefreshOverrides {
                interval: Some(RefreshInterval::Every(Duration::from_secs(HOUR))),
                ..RefreshOverrides::default()
            },
            ..PolicyOverrides::default()
        });
        let mut cache = Cache::new(&registry, rules);
        cache.accepts_all = true;
        let _runs = runs(&cache);
        assert_eq!(pull(&cache, "1").await, old);
        pass(HOUR).await;
        move_tags(&registry, 1);
        let pulled_at = pull_while_held(&registry, &cache, prefix).await;
        assert_eq!(count(&cache, RefreshResult::NewDigest), 1);
        assert_eq!(last_use(&cache, "1").await, Some(pulled_at), "{prefix}");
    }
}

#[tokio::test(start_paused = true)]
async fn move_to_cached_image_keeps_later_use() {
    let (registry, _) = public(1);
    let other = registry.push("acme/app", "2", "two", &[100]);
    let mut cache = Cache::new(&registry, hourly());
    cache.accepts_all = true;
    pull(&cache, "2").await;
    pass(HOUR).await;
    pull(&cache, "1").await;
    let pulled_at = now();
    let _runs = runs(&cache);
    {
        let mut state = registry.state();
        let shelf = state.shelves.get_mut("acme/app").unwrap();
        shelf.tags.insert("1".to_owned(), other);
    }
    pass_with_clients(&cache, 2).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 1);
    assert_eq!(last_use(&cache, "1").await, Some(pulled_at));
}

#[tokio::test(start_paused = true)]
async fn fetch_that_failed_before_counts_as_no_use() {
    let (registry, _) = public(1);
    registry.push("acme/app", "busy", "busy", &[100]);
    let mut cache = Cache::new(&registry, hourly());
    cache.accepts_all = true;
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    let pulled_at = now();
    move_tags(&registry, 1);
    let layers = std::mem::take(&mut registry.state().shelves.get_mut("acme/app").unwrap().blobs);
    pass_with_clients(&cache, 2).await;
    assert!(count(&cache, RefreshResult::FetchFailed) >= 1);
    registry.state().shelves.get_mut("acme/app").unwrap().blobs = layers;
    pass_with_clients(&cache, 3).await;
    let results = [RefreshResult::NewDigest, RefreshResult::Completed];
    assert_eq!(results.map(|result| count(&cache, result)).iter().sum::<u64>(), 1);
    assert_eq!(last_use(&cache, "1").await, Some(pulled_at));
}

#[tokio::test(start_paused = true)]
async fn manifest_instead_of_digest_counts_as_no_use() {
    let (registry, _) = public(1);
    registry.push("acme/app", "busy", "busy", &[100]);
    registry.state().states_no_digest = true;
    let mut cache = Cache::new(&registry, hourly());
    cache.accepts_all = true;
    let _runs = runs(&cache);
    pull(&cache, "1").await;
    let pulled_at = now();
    pass_with_clients(&cache, 3).await;
    assert!(count(&cache, RefreshResult::Revalidated) >= 2);
    assert_eq!(last_use(&cache, "1").await, Some(pulled_at));
    move_tags(&registry, 1);
    pass_with_clients(&cache, 2).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 1);
    assert_eq!(last_use(&cache, "1").await, Some(pulled_at));
}
