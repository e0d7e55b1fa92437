//! Tag records that are read before the upstream is asked: two caches with one bucket, and clocks that are stepped.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use ifnewer::oci::Digest;
use ifnewer::policy::Policy;
use ifnewer::policy::min_age::OnUnknownAge;
use ifnewer::policy::rules::{EffectivePolicy, PolicyOverrides, Rules};
use ifnewer::proxy::invalidation::{WriteEffect, WriteOutcome};
use ifnewer::shared::SharedSettings;
use tokio::time::Instant;

use super::bucket::Bucket;
use super::cache::{Cache, ClientRequest, Got, PROVEN, SHARED};
use super::min_age::{REPOSITORY, of, pass, pulled_tag, registry, rules_of, tag};
use super::registry::{Condition, No, OCI_INDEX, Registry, jump};
use super::slow_disk::Gated;

pub const HOUR: Duration = Duration::from_secs(3_600);

/// No minimum age, and this policy.
pub fn rules(policy: Policy, max_age: Duration) -> Rules {
    let none = rules_of(0, policy, OnUnknownAge::Refuse);
    let default = EffectivePolicy {
        max_age,
        ..none.default_for("").clone()
    };
    let upstreams = [PROVEN, SHARED].map(|name| (Arc::from(name), PolicyOverrides::default()));
    Rules::new(default, upstreams, Vec::new()).unwrap()
}

pub fn cache(registry: &Registry, bucket: &Bucket, rules: Rules) -> Cache {
    behind(registry, bucket.settings("a"), rules)
}

fn behind(registry: &Registry, settings: SharedSettings, rules: Rules) -> Cache {
    let cache = Cache::new(registry, rules);
    cache.proxy.shared().configure(Some(settings));
    cache
}

/// A cache that only reads.
pub fn reader(registry: &Registry, bucket: &Bucket, rules: Rules) -> Cache {
    let settings = SharedSettings {
        write: false,
        ..bucket.settings("a")
    };
    behind(registry, settings, rules)
}

/// A registry with the tag, a bucket with its image and its record, and the cache that wrote them.
pub async fn recorded() -> (Registry, Bucket, Cache, Digest) {
    let (registry, bucket) = (registry(), Bucket::new());
    let digest = registry.push(REPOSITORY, "1", "one", &[100]);
    registry.push(REPOSITORY, "other", "other", &[]);
    let first = cache(&registry, &bucket, rules(Policy::IfNewer, Duration::ZERO));
    pull_layers(&first, digest).await;
    (registry, bucket, first, digest)
}

/// Pulls the tag with its blobs, until the bucket has all of it.
pub async fn pull_layers(cache: &Cache, digest: Digest) {
    pull_at(PROVEN, cache, digest).await;
}

async fn pull_at(site: &'static str, cache: &Cache, digest: Digest) {
    let request = ClientRequest { site, ..of("1") };
    let Got::Content(found, Some(manifest)) = cache.get(&request).await else {
        panic!("no manifest");
    };
    assert_eq!(found, digest);
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    for blob in layers.iter().chain([&manifest["config"]]) {
        let path = format!("/v2/{REPOSITORY}/blobs/{}", blob["digest"].as_str().unwrap());
        let got = cache
            .get(&ClientRequest {
                path,
                ..request.clone()
            })
            .await;
        assert!(matches!(got, Got::Content(..)), "{got:?}");
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    cache.proxy.shared().drain().await;
}

/// A second cache, to which the repository is known to be public by another tag.
pub async fn second(registry: &Registry, bucket: &Bucket, rules: Rules) -> Cache {
    let second = reader(registry, bucket, rules);
    second.get(&of("other")).await;
    registry.state().request_log.clear();
    bucket.forget_requests();
    second
}

/// The digest that one `GET` of the tag returns.
async fn once(cache: &Cache) -> Digest {
    match cache.get(&of("1")).await {
        Got::Content(digest, _) => digest,
        got => panic!("{got:?}"),
    }
}

fn tag_requests(registry: &Registry) -> usize {
    let log = registry.request_log();
    log.iter().filter(|line| line.ends_with("/manifests/1")).count()
}

#[tokio::test(start_paused = true)]
async fn recent_record_confirms_an_uncached_tag() {
    let (registry, bucket, _first, digest) = recorded().await;
    pass(600).await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    assert_eq!(tag(&second).await, Ok(digest));
    assert_eq!(registry.request_log(), Vec::<String>::new());
    assert_eq!(bucket.tag_reads(), 1);
    assert_eq!(tag(&second).await, Ok(digest));
    assert_eq!(bucket.tag_reads(), 1, "the confirmation is kept");
    pass(3_000).await;
    once(&second).await;
    assert_eq!(tag_requests(&registry), 1, "it is as old as the record");
}

#[tokio::test(start_paused = true)]
async fn record_older_than_max_age_confirms_nothing() {
    let (registry, bucket, _first, digest) = recorded().await;
    pass(3_600).await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    assert_eq!(once(&second).await, digest);
    assert_eq!((tag_requests(&registry), bucket.tag_reads()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn record_is_not_read_without_max_age() {
    let (registry, bucket, _first, digest) = recorded().await;
    for rules in [
        rules(Policy::IfNewer, Duration::ZERO),
        rules(Policy::Always, HOUR),
    ] {
        let second = second(&registry, &bucket, rules).await;
        assert_eq!(tag(&second).await, Ok(digest));
        assert!(tag_requests(&registry) > 0);
        assert_eq!(bucket.tag_reads(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn record_renews_a_confirmation_of_this_cache() {
    let (registry, bucket, first, digest) = recorded().await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    pull_layers(&second, digest).await;
    pass(3_500).await;
    pulled_tag(&first).await;
    first.proxy.shared().drain().await;
    registry.state().request_log.clear();
    bucket.forget_requests();
    assert_eq!(tag(&second).await, Ok(digest));
    assert_eq!(
        bucket.requests(),
        Vec::<String>::new(),
        "its own is recent enough"
    );
    pass(200).await;
    assert_eq!(tag(&second).await, Ok(digest));
    assert_eq!(registry.request_log(), Vec::<String>::new());
    // The one of the tag, and the one that the repository is public.
    assert_eq!(bucket.requests().len(), 2, "{:?}", bucket.requests());
    assert_eq!(bucket.tag_reads(), 1);
    // A tag that moved is fetched from the bucket.
    let new = registry.push(REPOSITORY, "1", "two", &[100]);
    pass(3_600).await;
    pull_layers(&first, new).await;
    registry.state().request_log.clear();
    assert_eq!(tag(&second).await, Ok(new));
    assert_eq!(registry.request_log(), Vec::<String>::new());
}

/// The record is older than the confirmation of this cache, and younger than `max_age`.
#[tokio::test(start_paused = true)]
async fn record_never_replaces_a_later_confirmation() {
    let (registry, bucket, first, old) = recorded().await;
    let mut second = second(&registry, &bucket, rules(Policy::IfNewer, Duration::ZERO)).await;
    pull_layers(&second, old).await;
    pass(400).await;
    pulled_tag(&first).await;
    first.proxy.shared().drain().await;
    pass(10).await;
    // Another kind of client has seen the move.
    let new = registry.push_index(REPOSITORY, "1", "two", &["amd64"]);
    second.accept = Some(OCI_INDEX);
    assert_eq!(once(&second).await, new[0]);
    let second = second.reload(rules(Policy::IfNewer, HOUR), false);
    registry.state().request_log.clear();
    bucket.forget_requests();
    once(&second).await;
    assert_eq!((tag_requests(&registry), bucket.tag_reads()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn record_from_the_future_confirms_nothing() {
    let (registry, bucket) = (registry(), Bucket::new());
    let digest = registry.push(REPOSITORY, "1", "one", &[100]);
    let ahead = bucket.settings_ahead("a", 2 * HOUR);
    let liar = behind(&registry, ahead, rules(Policy::IfNewer, Duration::ZERO));
    pull_layers(&liar, digest).await;
    registry.push(REPOSITORY, "other", "other", &[]);
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    assert_eq!(tag(&second).await, Ok(digest));
    assert!(bucket.tag_reads() == 1 && tag_requests(&registry) > 0);
}

#[tokio::test(start_paused = true)]
async fn record_of_another_key_confirms_nothing() {
    let (registry, bucket, _first, digest) = recorded().await;
    let second = behind(&registry, bucket.settings("b"), rules(Policy::IfNewer, HOUR));
    second.get(&of("other")).await;
    registry.state().request_log.clear();
    assert_eq!(tag(&second).await, Ok(digest));
    assert!(tag_requests(&registry) > 0);
}

/// The time of a denial, and the requests, do not depend on what other caches have seen.
#[tokio::test(start_paused = true)]
async fn client_without_a_grant_causes_no_read_of_records() {
    let (registry, bucket, _first, _) = recorded().await;
    registry.user("bob", "b");
    registry.state().no = No::Masked;
    let second = reader(&registry, &bucket, rules(Policy::IfNewer, HOUR));
    registry.state().public.clear();
    bucket.forget_requests();
    let bob = ClientRequest {
        shows: registry.bearer("bob"),
        ..of("1")
    };
    for request in [of("1"), bob] {
        let got = second.get(&request).await;
        assert!(matches!(got, Got::No(_)), "{got:?}");
    }
    assert_eq!(bucket.requests(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn slow_bucket_delays_a_tag_once() {
    // With a mark that a public record could end, and without one.
    for site in [PROVEN, SHARED] {
        let (registry, bucket, first, digest) = recorded().await;
        pull_at(site, &first, digest).await;
        let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
        pull_at(site, &second, digest).await;
        pass(3_601).await;
        bucket.forget_requests();
        bucket.delays(Duration::from_secs(10));
        registry.hold(&format!("HEAD /v2/{REPOSITORY}/manifests/1"));
        // The upstream does not respond either, so that the tag stays unconfirmed.
        let mut waits = Vec::new();
        for _ in 0..2 {
            let began = Instant::now();
            let request = ClientRequest { site, ..of("1") };
            let got = second.get(&request).await;
            assert!(matches!(got, Got::Content(..)), "{site}: {got:?}");
            waits.push(began.elapsed().as_millis());
        }
        // In the outage, a mark needs the public record.
        let of_mark = if site == PROVEN { 1_000 } else { 0 };
        let expected = 3_000 + of_mark;
        assert!(
            (expected..expected + 100).contains(&waits[0]),
            "{site}: 1 s, then `revalidate_timeout`: {waits:?}"
        );
        assert!(waits[1] <= 2_100, "{site}: {waits:?}");
        assert_eq!(bucket.tag_reads(), 1, "{site}");
    }
}

/// The bucket answers each request shortly before the limit, and the image takes several.
#[tokio::test(start_paused = true)]
async fn second_request_waits_no_longer_than_the_first() {
    // With a mark, each request reads the public record between the tag record and the image, for `wait_max` in all.
    for (site, waited_max) in [(PROVEN, 1_000), (SHARED, 100)] {
        let (registry, bucket, first, old) = recorded().await;
        pull_at(site, &first, old).await;
        let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
        pull_at(site, &second, old).await;
        let new = registry.push(REPOSITORY, "1", "two", &[100]);
        pass(3_601).await;
        pull_at(site, &first, new).await;
        {
            let mut state = registry.state();
            let shelf = state.shelves.get_mut(REPOSITORY).unwrap();
            shelf.tags.insert("1".to_owned(), old);
        }
        bucket.delays(Duration::from_millis(900));
        let request = ClientRequest { site, ..of("1") };
        let later = async {
            tokio::time::sleep(Duration::from_millis(950)).await;
            let began = Instant::now();
            let got = second.get(&request).await;
            (got, began.elapsed().as_millis())
        };
        let (one, (two, waited)) = tokio::join!(second.get(&request), later);
        for got in [one, two] {
            let is_old = matches!(&got, Got::Content(found, _) if *found == old);
            assert!(is_old, "{site}: {got:?}");
        }
        assert!(waited <= waited_max, "{site}: {waited} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn silent_bucket_delays_a_cold_tag_once() {
    let (registry, bucket, _first, digest) = recorded().await;
    pass(600).await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    bucket.falls_silent();
    let began = Instant::now();
    assert_eq!(once(&second).await, digest);
    let waited = began.elapsed().as_millis();
    assert!((900..1_100).contains(&waited), "{waited} ms");
}

/// The monotonic clock stands still, and the wall clock does not.
#[tokio::test(start_paused = true)]
async fn suspended_host_makes_no_record_younger() {
    let (registry, bucket, _first, digest) = recorded().await;
    pass(600).await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    assert_eq!(once(&second).await, digest);
    assert_eq!((tag_requests(&registry), bucket.tag_reads()), (0, 1));
    jump(3_100);
    assert_eq!(once(&second).await, digest);
    assert_eq!((tag_requests(&registry), bucket.tag_reads()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn simultaneous_requests_read_a_record_once() {
    let (registry, bucket, _first, digest) = recorded().await;
    let mut second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    let release = bucket.holds_reads();
    let (one, two) = (of("1"), of("1"));
    let releasing = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        release.send_replace(true);
    };
    let (one, two, ()) = tokio::join!(second.get(&one), second.get(&two), releasing);
    for got in [one, two] {
        assert!(
            matches!(got, Got::Content(found, _) if found == digest),
            "{got:?}"
        );
    }
    // A client with another `Accept` uses the same read.
    second.accept = Some(OCI_INDEX);
    let _denied = second.get(&of("1")).await;
    assert_eq!(bucket.tag_reads(), 1);
}

#[tokio::test(start_paused = true)]
async fn reload_during_the_read_makes_it_count_for_nothing() {
    let (registry, bucket, _first, digest) = recorded().await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    let release = bucket.holds_reads();
    let reloading = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        second.proxy.shared().configure(Some(Bucket::new().settings("a")));
        release.send_replace(true);
    };
    let request = of("1");
    let (got, ()) = tokio::join!(second.get(&request), reloading);
    assert!(
        matches!(got, Got::Content(found, _) if found == digest),
        "{got:?}"
    );
    assert!(tag_requests(&registry) > 0);
}

fn change() -> WriteEffect {
    WriteEffect::Tags(REPOSITORY.parse().unwrap(), vec!["1".parse().unwrap()])
}

/// The one bad interleaving: a push through this cache ends between the read of the record and its use.
#[tokio::test(start_paused = true)]
async fn push_during_the_read_is_not_undone() {
    let (registry, bucket, _first, _) = recorded().await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    let release = bucket.holds_reads();
    let pushing = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let pending = second.proxy.begin_write(&second.proven, change()).await;
        registry.push(REPOSITORY, "1", "two", &[]);
        second.proxy.finish_write(pending, WriteOutcome::Succeeded).await;
        release.send_replace(true);
    };
    let request = of("1");
    let (_, ()) = tokio::join!(second.get(&request), pushing);
    registry.state().request_log.clear();
    tag(&second).await.unwrap();
    assert!(
        tag_requests(&registry) > 0,
        "nothing older than the push is fresh"
    );
}

/// The record is recent, and from before the push.
#[tokio::test(start_paused = true)]
async fn record_from_before_a_push_is_not_used() {
    for outcome in [Some(WriteOutcome::Succeeded), Some(WriteOutcome::Unknown), None] {
        let (registry, bucket, _first, _) = recorded().await;
        pass(600).await;
        let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
        let pending = second.proxy.begin_write(&second.proven, change()).await;
        let new = registry.push(REPOSITORY, "1", "two", &[]);
        match outcome {
            Some(outcome) => second.proxy.finish_write(pending, outcome).await,
            None => drop(pending),
        }
        pass(60).await;
        assert_eq!(once(&second).await, new, "{outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn record_from_before_a_push_brings_no_tag_in_outage() {
    let (registry, bucket, _first, _) = recorded().await;
    pass(600).await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, Duration::ZERO)).await;
    let pending = second.proxy.begin_write(&second.proven, change()).await;
    second.proxy.finish_write(pending, WriteOutcome::Succeeded).await;
    registry.set_condition(Condition::Status(503));
    let got = second.get(&of("1")).await;
    assert!(matches!(got, Got::No(_)), "{got:?}");
}

/// The upstream rejects a write that begins while the image of a record is read.
#[tokio::test(start_paused = true)]
async fn rejected_write_during_the_read_evicts_nothing() {
    let (registry, bucket, first, old) = recorded().await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    pull_layers(&second, old).await;
    let new = registry.push(REPOSITORY, "1", "two", &[100]);
    pass(3_600).await;
    pull_layers(&first, new).await;
    registry.set_condition(Condition::Status(503));
    let release = bucket.holds_reads_of("v1/manifests/");
    let writing = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let pending = second.proxy.begin_write(&second.proven, change()).await;
        release.send_replace(true);
        tokio::time::sleep(Duration::from_millis(500)).await;
        second.proxy.finish_write(pending, WriteOutcome::Rejected).await;
    };
    let request = of("1");
    let (got, ()) = tokio::join!(second.get(&request), writing);
    assert!(matches!(got, Got::Content(found, _) if found == old), "{got:?}");
    // A tag that is not cached would be brought from the record.
    let second = second.reload(rules(Policy::IfNewer, Duration::ZERO), false);
    assert_eq!(once(&second).await, old);
}

/// Another cache deletes the manifest, and does not know the tag that names it. Its blobs are cached.
#[tokio::test(start_paused = true)]
async fn deleted_manifest_is_not_confirmed_by_its_tag() {
    let (registry, bucket, first, old) = recorded().await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    pull_layers(&second, old).await;
    let deleted = {
        let mut state = registry.state();
        let shelf = state.shelves.get_mut(REPOSITORY).unwrap();
        let manifest: Bytes = [&shelf.manifests[&old][..], b" "].concat().into();
        let digest = super::registry::of(&manifest);
        shelf.manifests.insert(digest, manifest);
        shelf.tags.insert("1".to_owned(), digest);
        digest
    };
    pass(3_600).await;
    pull_layers(&first, deleted).await;
    pass(60).await;
    let third = cache(&registry, &bucket, rules(Policy::IfNewer, HOUR));
    third.get(&of("other")).await;
    let deletion = WriteEffect::Deleted(REPOSITORY.parse().unwrap(), deleted);
    let pending = third.proxy.begin_write(&third.proven, deletion).await;
    third.proxy.finish_write(pending, WriteOutcome::Succeeded).await;
    third.proxy.shared().drain().await;
    pass(60).await;
    registry.state().request_log.clear();
    bucket.forget_requests();
    once(&second).await;
    assert!(tag_requests(&registry) > 0);
    assert_eq!(bucket.tag_reads(), 1);
}

/// Authorized clients of another cache renew the record of a tag that has become private.
#[tokio::test(start_paused = true)]
async fn denial_elsewhere_ends_the_use_of_tag_records() {
    let (registry, bucket, first, digest) = recorded().await;
    registry.user("bob", "b");
    registry.lets("bob", REPOSITORY);
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    pull_layers(&second, digest).await;
    registry.state().public.clear();
    let denied = first.get(&of("1")).await;
    assert!(matches!(denied, Got::No(_)), "{denied:?}");
    pass(3_600).await;
    let bob = ClientRequest {
        shows: registry.bearer("bob"),
        ..of("1")
    };
    let got = first.get(&bob).await;
    assert!(matches!(got, Got::Content(..)), "{got:?}");
    first.proxy.shared().drain().await;
    pass(10).await;
    let got = second.get(&of("1")).await;
    assert!(matches!(got, Got::No(_)), "{got:?}");
}

/// A client whose grant has expired, as it is denied elsewhere.
#[tokio::test(start_paused = true)]
async fn expired_grant_alone_opens_no_tag_record() {
    let (registry, bucket, first, _digest) = recorded().await;
    let users = ["alice", "bob"].map(|name| {
        registry.user(name, name);
        registry.lets(name, REPOSITORY);
        ClientRequest {
            shows: registry.bearer(name),
            ..of("1")
        }
    });
    let [alice, bob] = users;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    let got = second.get(&bob).await;
    assert!(matches!(got, Got::Content(..)), "{got:?}");
    registry.state().public.clear();
    registry.revokes("bob", REPOSITORY);
    let denied = first.get(&of("1")).await;
    assert!(matches!(denied, Got::No(_)), "{denied:?}");
    pass(3_600).await;
    let got = first.get(&alice).await;
    assert!(matches!(got, Got::Content(..)), "{got:?}");
    first.proxy.shared().drain().await;
    pass(10).await;
    let got = second.get(&bob).await;
    assert!(matches!(got, Got::No(_)), "{got:?}");
}

#[tokio::test(start_paused = true)]
async fn push_through_another_cache_ends_a_confirmation() {
    let (registry, bucket, first, old) = recorded().await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, Duration::ZERO)).await;
    pull_layers(&second, old).await;
    let mut second = second.reload(rules(Policy::IfNewer, HOUR), false);
    pass(60).await;
    let pending = first.proxy.begin_write(&first.proven, change()).await;
    let new = registry.push(REPOSITORY, "1", "two", &[]);
    first.proxy.finish_write(pending, WriteOutcome::Succeeded).await;
    first.proxy.shared().drain().await;
    pass(60).await;
    bucket.forget_requests();
    assert_eq!(tag(&second).await, Ok(old), "fresh by its own confirmation");
    second.accept = Some(OCI_INDEX);
    let _denied = second.get(&of("1")).await;
    assert_eq!(bucket.tag_reads(), 1);
    second.accept = None;
    assert_eq!(tag(&second).await, Ok(new));
}

/// The client leaves as soon as the registry has accepted its push.
#[tokio::test(start_paused = true)]
async fn push_of_a_client_that_left_ends_the_record() {
    let (registry, bucket, disk) = (registry(), Bucket::new(), Arc::new(Gated::default()));
    let old = registry.push(REPOSITORY, "1", "one", &[100]);
    registry.push(REPOSITORY, "other", "other", &[]);
    let first = Cache::over(&registry, rules(Policy::IfNewer, Duration::ZERO), &disk);
    first.proxy.shared().configure(Some(bucket.settings("a")));
    pull_layers(&first, old).await;
    pass(600).await;
    let pending = first.proxy.begin_write(&first.proven, change()).await;
    let new = registry.push(REPOSITORY, "1", "two", &[]);
    disk.close();
    let finishing = first.proxy.finish_write(pending, WriteOutcome::Succeeded);
    assert!(finishing.now_or_never().is_none());
    disk.reopen();
    // The clock stands still while the store writes.
    tokio::time::sleep(Duration::from_secs(2)).await;
    first.proxy.shared().drain().await;
    pass(60).await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    assert_eq!(once(&second).await, new);
}

const DAYS: i64 = 86_400;

/// [`rules`] that serve a tag as long as this after its confirmation.
pub fn rules_within(policy: Policy, stale_if_error: Option<Duration>) -> Rules {
    let default = EffectivePolicy {
        stale_if_error,
        ..rules(policy, Duration::ZERO).default_for("").clone()
    };
    let upstreams = [PROVEN, SHARED].map(|name| (Arc::from(name), PolicyOverrides::default()));
    Rules::new(default, upstreams, Vec::new()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn if_not_present_takes_an_uncached_tag_from_a_record() {
    let (registry, bucket, _first, digest) = recorded().await;
    pass(3 * DAYS).await;
    for (limit, requests) in [(None, 0), (Some(4 * 24 * HOUR), 0), (Some(HOUR), 1)] {
        let second = second(&registry, &bucket, rules_within(Policy::IfNotPresent, limit)).await;
        assert_eq!(once(&second).await, digest);
        assert_eq!(tag_requests(&registry), requests, "{limit:?}");
        assert_eq!(bucket.tag_reads(), 1);
        bucket.forget_requests();
        once(&second).await;
        assert_eq!(bucket.tag_reads(), 0, "it is present");
    }
}

/// Under `never`, a cache that has seen nothing serves public images alone, and only while a record allows it.
#[tokio::test(start_paused = true)]
async fn never_serves_a_public_image_until_a_denial() {
    let (registry, bucket, first, digest) = recorded().await;
    registry.state().request_log.clear();
    let second = reader(&registry, &bucket, rules_within(Policy::Never, None));
    pull_layers(&second, digest).await;
    assert_eq!(tag(&second).await, Ok(digest));
    assert_eq!(registry.request_log(), Vec::<String>::new());
    registry.state().public.clear();
    let denied = first.get(&of("1")).await;
    assert!(matches!(denied, Got::No(_)), "{denied:?}");
    first.proxy.shared().drain().await;
    pass(2).await;
    registry.state().request_log.clear();
    for reference in ["1", &digest.to_string()] {
        let got = second.get(&of(reference)).await;
        assert!(matches!(got, Got::No("not-authorized")), "{reference}: {got:?}");
    }
    let third = reader(&registry, &bucket, rules_within(Policy::Never, None));
    assert_eq!(tag(&third).await, Err("not-authorized"));
    assert_eq!(registry.request_log(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn never_serves_nothing_private_or_too_old_by_records() {
    let (registry, bucket, _first, digest) = recorded().await;
    pass(3 * 3_600).await;
    let second = reader(&registry, &bucket, rules_within(Policy::Never, Some(HOUR)));
    assert_eq!(tag(&second).await, Err("not-cached"));
    // A public record counts as long as a grant in an outage.
    pass(366 * DAYS).await;
    let second = reader(&registry, &bucket, rules_within(Policy::Never, None));
    bucket.forget_requests();
    for reference in ["1", "absent", &digest.to_string()] {
        let got = second.get(&of(reference)).await;
        assert!(matches!(got, Got::No("not-authorized")), "{reference}: {got:?}");
    }
    let is_public = |line: &String| line.starts_with("GET v1/records/public/");
    assert!(bucket.requests().iter().all(is_public), "{:?}", bucket.requests());
}

#[tokio::test(start_paused = true)]
async fn never_without_the_bucket_denies_as_without_records() {
    let (registry, bucket, _first, _) = recorded().await;
    registry.state().request_log.clear();
    let second = reader(&registry, &bucket, rules_within(Policy::Never, None));
    bucket.fails();
    assert_eq!(tag(&second).await, Err("not-authorized"));
    assert_eq!(registry.request_log(), Vec::<String>::new());
}

/// The bucket loses a blob that it was seen to have.
#[tokio::test(start_paused = true)]
async fn never_asks_no_upstream_for_a_lost_object() {
    let (registry, bucket, _first, digest) = recorded().await;
    registry.state().request_log.clear();
    let second = reader(&registry, &bucket, rules_within(Policy::Never, None));
    let Got::Content(found, Some(manifest)) = second.get(&of("1")).await else {
        panic!("no manifest");
    };
    assert_eq!(found, digest);
    bucket.loses("v1/blobs/");
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let layer = manifest["layers"][0]["digest"].as_str().unwrap();
    let path = format!("/v2/{REPOSITORY}/blobs/{layer}");
    let got = second.get(&ClientRequest { path, ..of("1") }).await;
    assert!(matches!(got, Got::No(_)), "{got:?}");
    assert_eq!(registry.request_log(), Vec::<String>::new());
}

/// `min_age` of three days.
fn cooling() -> Rules {
    rules_of(3, Policy::IfNewer, OnUnknownAge::Refuse)
}

#[tokio::test(start_paused = true)]
async fn new_cache_does_not_start_the_age_again() {
    let (registry, bucket) = (registry(), Bucket::with_right_clock());
    let digest = registry.push(REPOSITORY, "1", "one", &[100]);
    let first = cache(&registry, &bucket, cooling());
    assert_eq!(tag(&first).await, Err("too-young"));
    pass(2 * DAYS).await;
    assert_eq!(tag(&first).await, Err("too-young"));
    first.proxy.shared().drain().await;
    let early = reader(&registry, &bucket, cooling());
    assert_eq!(tag(&early).await, Err("too-young"), "two days old");
    pass(DAYS + 10).await;
    let second = reader(&registry, &bucket, cooling());
    assert_eq!(tag(&second).await, Ok(digest));
    assert_eq!(tag(&early).await, Ok(digest), "it has kept the first sight");
    assert_eq!(
        bucket_reads_of(&registry, &second, &bucket).await,
        0,
        "it has learned it"
    );
    // Without the record, the age begins again.
    let third = Cache::new(&registry, cooling());
    assert_eq!(tag(&third).await, Err("too-young"));
}

/// `min_age` of three days, with these settings.
fn cooling_within(max_age: Duration, stale_if_error: Option<Duration>) -> Rules {
    let default = EffectivePolicy {
        max_age,
        stale_if_error,
        ..cooling().default_for("").clone()
    };
    let upstreams = [PROVEN, SHARED].map(|name| (Arc::from(name), PolicyOverrides::default()));
    Rules::new(default, upstreams, Vec::new()).unwrap()
}

/// A registry and a bucket with a record of a digest that is four days old.
async fn recorded_old() -> (Registry, Bucket, Digest) {
    let (registry, bucket) = (registry(), Bucket::with_right_clock());
    let digest = registry.push(REPOSITORY, "1", "one", &[100]);
    registry.push(REPOSITORY, "other", "other", &[]);
    let first = cache(&registry, &bucket, cooling());
    assert_eq!(tag(&first).await, Err("too-young"));
    pass(4 * DAYS).await;
    pull_layers(&first, digest).await;
    (registry, bucket, digest)
}

/// The record is recent, and its image is not in the bucket.
#[tokio::test(start_paused = true)]
async fn record_that_confirms_nothing_has_first_sights() {
    let (registry, bucket, digest) = recorded_old().await;
    bucket.loses("v1/manifests/");
    let rules = cooling_within(HOUR, None);
    let second = second(&registry, &bucket, rules).await;
    assert_eq!(once(&second).await, digest);
    assert!(tag_requests(&registry) > 0);
    assert_eq!(bucket.tag_reads(), 1);
}

/// This cache has seen the tag move since the time of the record.
#[tokio::test(start_paused = true)]
async fn min_age_makes_no_record_younger() {
    for (days, served) in [(1, true), (3, false)] {
        let (registry, bucket) = (registry(), Bucket::with_right_clock());
        let old = registry.push(REPOSITORY, "1", "one", &[100]);
        let first = cache(&registry, &bucket, cooling());
        let rules = cooling_within(Duration::ZERO, Some(2 * 24 * HOUR));
        let second = reader(&registry, &bucket, rules);
        for cache in [&first, &second] {
            assert_eq!(tag(cache).await, Err("too-young"));
        }
        pass(4 * DAYS).await;
        pull_layers(&first, old).await;
        pull_layers(&second, old).await;
        pass(60).await;
        registry.push(REPOSITORY, "1", "two", &[100]);
        assert_eq!(once(&second).await, old, "the new one is too young");
        pass(days * DAYS).await;
        registry.set_condition(Condition::Status(503));
        let got = second.get(&of("1")).await;
        let is_served = matches!(got, Got::Content(found, _) if found == old);
        assert_eq!(is_served, served, "{days} days: {got:?}");
    }
}

async fn bucket_reads_of(registry: &Registry, cache: &Cache, bucket: &Bucket) -> usize {
    bucket.forget_requests();
    registry.state().request_log.clear();
    tag(cache).await.unwrap();
    assert!(tag_requests(registry) > 0);
    bucket.tag_reads()
}

#[tokio::test(start_paused = true)]
async fn record_from_the_future_makes_no_digest_older() {
    let (registry, bucket) = (registry(), Bucket::with_right_clock());
    registry.push(REPOSITORY, "1", "one", &[100]);
    let ahead = bucket.settings_ahead("a", 24 * 30 * HOUR);
    let liar = behind(&registry, ahead, cooling());
    assert_eq!(tag(&liar).await, Err("too-young"));
    pass(4 * DAYS).await;
    tag(&liar).await.unwrap();
    liar.proxy.shared().drain().await;
    let second = reader(&registry, &bucket, cooling());
    assert_eq!(tag(&second).await, Err("too-young"));
}

/// Each digest has its own age, and a foreign key states none.
#[tokio::test(start_paused = true)]
async fn first_sight_is_of_one_digest_and_one_key() {
    let (registry, bucket) = (registry(), Bucket::with_right_clock());
    let old = registry.push(REPOSITORY, "1", "one", &[100]);
    let first = cache(&registry, &bucket, cooling());
    assert_eq!(tag(&first).await, Err("too-young"));
    pass(4 * DAYS).await;
    assert_eq!(once(&first).await, old);
    registry.push(REPOSITORY, "1", "two", &[100]);
    once(&first).await;
    first.proxy.shared().drain().await;
    let second = reader(&registry, &bucket, cooling());
    assert_eq!(tag(&second).await, Err("too-young"), "the new digest");
    registry
        .state()
        .shelves
        .get_mut(REPOSITORY)
        .unwrap()
        .tags
        .insert("1".to_owned(), old);
    let foreign = behind(&registry, bucket.settings("b"), cooling());
    assert_eq!(tag(&foreign).await, Err("too-young"));
}

/// The storage's clock is set forward by mistake, and later right again.
#[tokio::test(start_paused = true)]
async fn step_of_the_storages_clock_ages_no_digest() {
    let (registry, bucket) = (registry(), Bucket::with_right_clock());
    let digest = registry.push(REPOSITORY, "1", "one", &[100]);
    let first = cache(&registry, &bucket, cooling());
    for _ in 0..2 {
        assert_eq!(tag(&first).await, Err("too-young"));
        pass(600).await;
        first.proxy.shared().drain().await;
    }
    bucket.steps(30 * 24 * HOUR);
    let second = reader(&registry, &bucket, cooling());
    assert_eq!(tag(&second).await, Err("too-young"));
    bucket.steps(Duration::ZERO);
    pass(3 * DAYS - 1_000).await;
    let third = reader(&registry, &bucket, cooling());
    assert_eq!(tag(&third).await, Ok(digest), "by the record");
}

/// When the record is read, the clock is right again.
#[tokio::test(start_paused = true)]
async fn first_sight_by_a_slow_storage_is_not_written() {
    let (registry, bucket) = (registry(), Bucket::new());
    registry.push(REPOSITORY, "1", "one", &[100]);
    let first = cache(&registry, &bucket, cooling());
    for _ in 0..2 {
        assert_eq!(tag(&first).await, Err("too-young"));
        pass(600).await;
        first.proxy.shared().drain().await;
    }
    bucket.sets_clock_right();
    let second = reader(&registry, &bucket, cooling());
    assert_eq!(tag(&second).await, Err("too-young"));
}
