//! Scheduled refreshes while something else happens: slow layers, a quota that runs out, a block, a client's pull. Each
//! interleaving is fixed by responses that the registry holds.

use std::time::Duration;

use ifnewer::oci::Digest;
use ifnewer::policy::refresh::RefreshInterval;
use ifnewer::policy::rules::Rules;
use ifnewer::proxy::RefreshResult;
use ifnewer::store::tags::TagKey;
use ifnewer::store::verdicts::VerdictKind;
use tokio::task::JoinHandle;

use super::cache::{Cache, Got, PROVEN};
use super::min_age::give;
use super::registry::{Condition, Registry, now};
use super::scheduled_refresh::{
    count, heads, pass, public, pull, refreshed, request, requests, runs, until_indexed,
};

pub const BLOBS: &str = "GET /v2/acme/app/blobs/";

fn every(seconds: u64) -> Rules {
    refreshed(RefreshInterval::Every(Duration::from_secs(seconds)))
}

/// Moves these tags to an image each.
pub fn move_tags(registry: &Registry, tags: usize) -> Vec<Digest> {
    let moved =
        (1..=tags).map(|tag| registry.push("acme/app", &tag.to_string(), &format!("new {tag}"), &[100]));
    moved.collect()
}

/// Lets time pass until the registry has got such a request.
pub async fn until_requested(registry: &Registry, prefix: &str) {
    while !registry.request_log().iter().any(|line| line.starts_with(prefix)) {
        pass(5).await;
    }
}

/// The images in `moved` whose manifests were requested.
fn fetched(registry: &Registry, moved: &[Digest]) -> Vec<Digest> {
    let log = registry.request_log();
    let requested = |digest: &&Digest| log.contains(&format!("GET /v2/acme/app/manifests/{digest}"));
    moved.iter().filter(requested).copied().collect()
}

/// A client requests a manifest, and nothing else.
pub async fn compare(cache: &Cache, tag: &str) -> Got {
    let path = format!("/v2/acme/app/manifests/{tag}");
    cache.get(&request(PROVEN, &path, "")).await
}

pub fn key(tag: &str) -> TagKey {
    TagKey {
        upstream: PROVEN.into(),
        repository: "acme/app".parse().unwrap(),
        tag: tag.parse().unwrap(),
    }
}

async fn digest_of(cache: &Cache, tag: &str) -> Digest {
    let key = key(tag);
    let record = cache.proxy.store().on_disk(move |view| view.tag(&key)).await;
    record.unwrap().unwrap().variants[0].digest
}

/// The scheduled refreshes, once the index can be read. So the first window begins now.
async fn started(cache: &Cache) -> JoinHandle<()> {
    until_indexed(cache).await;
    runs(cache)
}

#[tokio::test(start_paused = true)]
async fn fetch_longer_than_interval_is_one_run() {
    let (registry, old) = public(1);
    let cache = Cache::new(&registry, every(10));
    pull(&cache, "1").await;
    let _runs = started(&cache).await;
    let new = move_tags(&registry, 1)[0];
    registry.hold(BLOBS);
    requests(&registry);
    until_requested(&registry, BLOBS).await;
    requests(&registry);
    pass(15).await;
    assert_eq!(requests(&registry), Vec::<String>::new());
    assert_eq!(digest_of(&cache, "1").await, old);
    registry.release();
    pass(5).await;
    assert_eq!(digest_of(&cache, "1").await, new);
    assert_eq!(count(&cache, RefreshResult::NewDigest), 1);
    // Its next slots are used again.
    pass(40).await;
    assert!(count(&cache, RefreshResult::Revalidated) >= 1);
}

#[tokio::test(start_paused = true)]
async fn fetches_that_wait_are_bounded_and_heads_go_on() {
    let (registry, _) = public(80);
    let cache = Cache::new(&registry, every(20));
    for tag in 1..=80 {
        pull(&cache, &tag.to_string()).await;
    }
    let _runs = started(&cache).await;
    move_tags(&registry, 80);
    registry.hold(BLOBS);
    requests(&registry);
    pass(30).await;
    let log = requests(&registry);
    assert!(heads(&log) >= 80, "{}", heads(&log));
    // Two fetch and 64 wait.
    let skipped = count(&cache, RefreshResult::FetchSkipped);
    assert!(skipped >= 14, "{skipped}");
    registry.release();
    pass(60).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 80);
}

/// Tags that have moved, of which two are being fetched and the others wait for that.
async fn waiting_fetches(registry: &Registry, cache: &Cache, tags: usize) -> (Vec<Digest>, JoinHandle<()>) {
    for tag in 1..=tags {
        pull(cache, &tag.to_string()).await;
    }
    let runs = started(cache).await;
    let moved = move_tags(registry, tags);
    registry.hold(BLOBS);
    requests(registry);
    pass(30).await;
    assert_eq!(fetched(registry, &moved).len(), 2);
    (moved, runs)
}

#[tokio::test(start_paused = true)]
async fn quota_floor_stops_fetches_that_wait() {
    let (registry, _) = public(20);
    registry.state().quota = Some((100, 90));
    let cache = Cache::new(&registry, every(20));
    registry.push("acme/app", "client", "client", &[100]);
    let (moved, _runs) = waiting_fetches(&registry, &cache, 20).await;
    // A client learns that the quota is used up.
    registry.state().quota = Some((100, 24));
    assert!(matches!(compare(&cache, "client").await, Got::Content(..)));
    registry.release();
    pass(10).await;
    assert_eq!(fetched(&registry, &moved).len(), 2);
    assert_eq!(count(&cache, RefreshResult::FetchSkipped), 18);
    registry.state().quota = Some((100, 90));
    assert!(matches!(compare(&cache, "client").await, Got::Content(..)));
    pass(60).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 20);
}

#[tokio::test(start_paused = true)]
async fn block_stops_fetch_that_waits() {
    let (registry, old) = public(3);
    let cache = Cache::new(&registry, every(20));
    let (moved, _runs) = waiting_fetches(&registry, &cache, 3).await;
    let begun = fetched(&registry, &moved);
    let third = moved.iter().position(|digest| !begun.contains(digest)).unwrap();
    give(&cache, VerdictKind::Blocked, moved[third]).await;
    registry.release();
    pass(5).await;
    assert_eq!(fetched(&registry, &moved), begun);
    assert_eq!(count(&cache, RefreshResult::NewDigest), 2);
    assert!(count(&cache, RefreshResult::Blocked) >= 1);
    assert_eq!(digest_of(&cache, &(third + 1).to_string()).await, old);
}

#[tokio::test(start_paused = true)]
async fn reload_that_turns_refresh_off_stops_fetch_that_waits() {
    let (registry, _) = public(3);
    let cache = Cache::new(&registry, every(20));
    let (moved, _runs) = waiting_fetches(&registry, &cache, 3).await;
    let _reloaded = cache.reload(refreshed(RefreshInterval::Off), false);
    registry.release();
    pass(60).await;
    assert_eq!(fetched(&registry, &moved).len(), 2);
}

/// An index that moved, with two platforms in use. The first platform's blobs are being fetched. Returns the digests
/// of the new index and its two images.
async fn moving_index(registry: &Registry, cache: &mut Cache) -> (Vec<Digest>, JoinHandle<()>) {
    let platforms = ["amd64", "arm64"];
    let old = registry.push_index("acme/app", "1", "one", &platforms);
    registry.state().public.insert("acme/app".to_owned());
    cache.takes_indexes = true;
    pull(cache, "1").await;
    for image in &old[1..] {
        pull(cache, &image.to_string()).await;
    }
    let runs = started(cache).await;
    let new = registry.push_index("acme/app", "1", "two", &platforms);
    registry.hold(BLOBS);
    requests(registry);
    until_requested(registry, BLOBS).await;
    assert_eq!(fetched(registry, &new), new[..2]);
    (new, runs)
}

#[tokio::test(start_paused = true)]
async fn blocked_platform_is_left_out_of_running_fetch() {
    let registry = Registry::new();
    let mut cache = Cache::new(&registry, every(20));
    let (new, _runs) = moving_index(&registry, &mut cache).await;
    give(&cache, VerdictKind::Blocked, new[2]).await;
    registry.release();
    pass(5).await;
    assert_eq!(fetched(&registry, &new), new[..2]);
    assert_eq!(digest_of(&cache, "1").await, new[0]);
}

#[tokio::test(start_paused = true)]
async fn blocked_index_ends_running_fetch() {
    let registry = Registry::new();
    let mut cache = Cache::new(&registry, every(20));
    let (new, _runs) = moving_index(&registry, &mut cache).await;
    give(&cache, VerdictKind::Blocked, new[0]).await;
    registry.release();
    pass(5).await;
    assert_eq!(fetched(&registry, &new), new[..2]);
    assert_eq!(count(&cache, RefreshResult::NewDigest), 0);
    assert_eq!(count(&cache, RefreshResult::Blocked), 1);
}

#[tokio::test(start_paused = true)]
async fn quota_floor_ends_running_fetch_between_platforms() {
    let registry = Registry::new();
    registry.state().quota = Some((100, 90));
    let mut cache = Cache::new(&registry, every(20));
    registry.push("acme/app", "client", "client", &[100]);
    let (new, _runs) = moving_index(&registry, &mut cache).await;
    registry.state().quota = Some((100, 24));
    assert!(matches!(compare(&cache, "client").await, Got::Content(..)));
    registry.release();
    pass(5).await;
    assert_eq!(fetched(&registry, &new), new[..2]);
    assert_eq!(count(&cache, RefreshResult::FetchSkipped), 1);
    assert_ne!(digest_of(&cache, "1").await, new[0]);
}

/// Number of refreshes with this result.
fn count_named(cache: &Cache, name: &str) -> u64 {
    let status = cache.proxy.refresh_status(now());
    let result = status.results.iter().find(|(result, _)| result.name() == name);
    result.map_or(0, |(_, count)| *count)
}

/// One tag that moved, while the blobs of its new image are being fetched.
async fn moving_tag(registry: &Registry, cache: &Cache) -> (Digest, JoinHandle<()>) {
    pull(cache, "1").await;
    let runs = started(cache).await;
    let new = move_tags(registry, 1)[0];
    registry.hold(BLOBS);
    requests(registry);
    until_requested(registry, BLOBS).await;
    (new, runs)
}

#[tokio::test(start_paused = true)]
async fn move_that_upstream_does_not_confirm_is_a_failure() {
    let (registry, old) = public(1);
    let cache = Cache::new(&registry, every(20));
    let (new, _runs) = moving_tag(&registry, &cache).await;
    registry.set_condition(Condition::Status(429));
    registry.release();
    pass(5).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 0);
    assert_eq!(count(&cache, RefreshResult::FetchFailed), 1);
    assert_eq!(digest_of(&cache, "1").await, old);
    registry.set_condition(Condition::Healthy);
    pass(60).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 1);
    assert_eq!(digest_of(&cache, "1").await, new);
}

#[tokio::test(start_paused = true)]
async fn tag_that_moves_during_fetch_is_fetched_again() {
    let (registry, old) = public(1);
    let cache = Cache::new(&registry, every(20));
    let (_, _runs) = moving_tag(&registry, &cache).await;
    let newest = registry.push("acme/app", "1", "newest", &[100]);
    registry.release();
    pass(5).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 0);
    assert_eq!(count(&cache, RefreshResult::FetchSkipped), 1);
    assert_eq!(digest_of(&cache, "1").await, old);
    pass(40).await;
    assert_eq!(count(&cache, RefreshResult::NewDigest), 1);
    assert_eq!(digest_of(&cache, "1").await, newest);
}

#[tokio::test(start_paused = true)]
async fn completed_image_is_no_move() {
    let (registry, old) = public(1);
    let cache = Cache::new(&registry, every(20));
    pull(&cache, "1").await;
    let new = move_tags(&registry, 1)[0];
    let layers = std::mem::take(&mut registry.state().shelves.get_mut("acme/app").unwrap().blobs);
    // The tag follows the client's request, which gets the previous image because layers are missing upstream.
    assert!(matches!(compare(&cache, "1").await, Got::Content(digest, _) if digest == old));
    assert_eq!(digest_of(&cache, "1").await, new);
    registry.state().shelves.get_mut("acme/app").unwrap().blobs = layers;
    let _runs = started(&cache).await;
    requests(&registry);
    pass(60).await;
    assert_eq!(count_named(&cache, "completed"), 1);
    assert_eq!(count(&cache, RefreshResult::NewDigest), 0);
    registry.set_condition(Condition::Down);
    assert_eq!(pull(&cache, "1").await, new);
}
