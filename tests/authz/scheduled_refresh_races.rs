//! Scheduled refreshes while something else happens: slow layers, a quota that runs out, a block, a client's pull. Each
//! interleaving is fixed by responses that the registry holds.

use std::time::Duration;

use ifnewer::oci::Digest;
use ifnewer::policy::refresh::RefreshInterval;
use ifnewer::policy::rules::Rules;
use ifnewer::proxy::RefreshResult;
use ifnewer::store::tags::TagKey;
use tokio::task::JoinHandle;

use super::cache::{Cache, PROVEN};
use super::registry::Registry;
use super::scheduled_refresh::{count, heads, pass, public, pull, refreshed, requests, runs, until_indexed};

const BLOBS: &str = "GET /v2/acme/app/blobs/";

fn every(seconds: u64) -> Rules {
    refreshed(RefreshInterval::Every(Duration::from_secs(seconds)))
}

/// Moves these tags to an image each.
fn move_tags(registry: &Registry, tags: usize) -> Vec<Digest> {
    let moved =
        (1..=tags).map(|tag| registry.push("acme/app", &tag.to_string(), &format!("new {tag}"), &[100]));
    moved.collect()
}

/// Lets time pass until the registry has got such a request.
async fn until_requested(registry: &Registry, prefix: &str) {
    while !registry.request_log().iter().any(|line| line.starts_with(prefix)) {
        pass(5).await;
    }
}

async fn digest_of(cache: &Cache, tag: &str) -> Digest {
    let key = TagKey {
        upstream: PROVEN.into(),
        repository: "acme/app".parse().unwrap(),
        tag: tag.parse().unwrap(),
    };
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
