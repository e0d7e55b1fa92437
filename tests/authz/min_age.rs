//! Minimum age, with a wall clock that is stepped: moved tags, outages, restarts, reloads, lying registries.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use ifnewer::oci::{Algorithm, Digest};
use ifnewer::policy::min_age::{AgeLimit, AgeOverrides, OnUnknownAge};
use ifnewer::policy::refresh::RefreshPolicy;
use ifnewer::policy::rules::{EffectivePolicy, PolicyOverrides, Rules, StaleLimit};
use ifnewer::policy::{OnNotFound, Policy};
use ifnewer::store::verdicts::{VerdictKey, VerdictKind, VerdictNote, VerdictScope};

use super::cache::{Cache, ClientRequest, Got, PROVEN, SHARED};
use super::registry::{Condition, OCI_INDEX, OCI_MANIFEST, Registry, jump, now};

const HOUR: i64 = 3_600;
pub const DAY: i64 = 24 * HOUR;
pub const REPOSITORY: &str = "acme/app";

pub fn rules_of(days: i64, policy: Policy, on_unknown_age: OnUnknownAge) -> Rules {
    let default = EffectivePolicy {
        name: Arc::from("default"),
        policy,
        max_age: Duration::ZERO,
        stale_if_error: None,
        revalidate_timeout: Duration::from_secs(2),
        on_not_found: OnNotFound::Refuse,
        grant_ttl: Duration::from_secs(300),
        grant_ttl_offline: Duration::from_secs(365 * 86_400),
        prefetch: false,
        refresh: RefreshPolicy::OFF,
        age_limit: AgeLimit {
            min_age: Duration::from_secs((days * DAY).unsigned_abs()),
            on_unknown_age,
            trust_created: false,
            by_digest: false,
        },
    };
    let upstreams = [PROVEN, SHARED].map(|name| (Arc::from(name), PolicyOverrides::default()));
    Rules::new(default, upstreams, Vec::new()).unwrap()
}

pub fn rules() -> Rules {
    rules_of(3, Policy::IfNewer, OnUnknownAge::Refuse)
}

/// [`rules`] with these changes.
fn rules_with(age_limit: AgeOverrides) -> Rules {
    rules_changed(PolicyOverrides {
        age_limit,
        ..PolicyOverrides::default()
    })
}

fn rules_changed(changes: PolicyOverrides) -> Rules {
    let upstreams = [(Arc::from(PROVEN), changes)];
    Rules::new(rules().default_for("").clone(), upstreams, Vec::new()).unwrap()
}

pub fn registry() -> Registry {
    let registry = Registry::new();
    registry.user("service", "service-secret");
    registry.lets("service", REPOSITORY);
    registry.state().public.insert(REPOSITORY.to_owned());
    registry
}

/// Time that passes, on every clock. A step of the wall clock alone is a `jump`.
pub async fn pass(seconds: i64) {
    jump(seconds);
    tokio::time::advance(Duration::from_secs(seconds.unsigned_abs())).await;
}

/// Pushes an image without layers that its storage got `days` ago.
pub fn push_old(registry: &Registry, mark: &str, days: i64) -> Digest {
    let digest = registry.push(REPOSITORY, "1", mark, &[]);
    let at = now() - Duration::from_secs((days * DAY).unsigned_abs());
    registry.state().last_modified.insert(digest, at);
    digest
}

pub fn push(registry: &Registry, mark: &str) -> Digest {
    registry.push(REPOSITORY, "1", mark, &[])
}

pub fn of(reference: &str) -> ClientRequest {
    ClientRequest {
        site: PROVEN,
        path: format!("/v2/{REPOSITORY}/manifests/{reference}"),
        head: false,
        shows: String::new(),
    }
}

/// What the tag gives to `GET` and `HEAD` alike: a digest, or the reason of the denial.
pub async fn tag(cache: &Cache) -> Result<Digest, &'static str> {
    get(cache, &of("1")).await
}

/// What a request gives to `GET` and `HEAD` alike.
pub async fn get(cache: &Cache, request: &ClientRequest) -> Result<Digest, &'static str> {
    let result = |got| match got {
        Got::Content(digest, _) => Ok(digest),
        Got::No(reason) => Err(reason),
        Got::List => panic!("a list"),
    };
    let head = ClientRequest {
        head: true,
        ..request.clone()
    };
    let head = result(cache.get(&head).await);
    let got = result(cache.get(request).await);
    assert_eq!(head, got, "HEAD and GET differ");
    got
}

/// Pulls the image by digest with its config, so that it is complete in the cache.
pub async fn pull(cache: &Cache, digest: Digest) {
    let Got::Content(found, Some(bytes)) = cache.get(&of(&digest.to_string())).await else {
        panic!("{digest} is not served");
    };
    assert_eq!(found, digest);
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    for blob in layers.iter().chain([&manifest["config"]]) {
        let path = format!("/v2/{REPOSITORY}/blobs/{}", blob["digest"].as_str().unwrap());
        let got = cache.get(&ClientRequest { path, ..of("1") }).await;
        assert!(matches!(got, Got::Content(..)), "{got:?}");
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
}

pub async fn pulled_tag(cache: &Cache) -> Digest {
    let digest = tag(cache).await.unwrap();
    pull(cache, digest).await;
    digest
}

pub fn gets_of(registry: &Registry, digest: Digest) -> usize {
    let line = format!("GET /v2/{REPOSITORY}/manifests/{digest}");
    registry.request_log().iter().filter(|one| **one == line).count()
}

#[tokio::test(start_paused = true)]
async fn moved_tag_is_served_once_old_enough() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    assert_eq!(pulled_tag(&cache).await, old);
    pass(DAY).await;
    let new = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    assert_eq!(gets_of(&registry, new), 0, "a young image is not fetched");
    pass(3 * DAY - 1).await;
    assert_eq!(tag(&cache).await, Ok(old));
    pass(1).await;
    assert_eq!(pulled_tag(&cache).await, new);
    assert_eq!(tag(&cache).await, Ok(new));
}

#[tokio::test(start_paused = true)]
async fn pull_by_digest_is_not_delayed() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(1).await;
    let new = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    pull(&cache, new).await;
    assert_eq!(tag(&cache).await, Ok(old), "cached, and still young by tag");
    pull(&cache, old).await;
}

#[tokio::test(start_paused = true)]
async fn young_copy_is_not_served_in_an_outage() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(1).await;
    let new = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    pull(&cache, new).await;
    registry.set_condition(Condition::Down);
    assert_eq!(tag(&cache).await, Ok(old));
    pass(3 * DAY).await;
    assert_eq!(tag(&cache).await, Ok(new), "seen three days ago, and cached");
}

#[tokio::test(start_paused = true)]
async fn unknown_age_is_refused_until_seen_long_enough() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let digest = push(&registry, "one");
    assert_eq!(tag(&cache).await, Err("too-young"));
    assert_eq!(gets_of(&registry, digest), 1, "for the age of its config");
    pass(3 * DAY - 1).await;
    assert_eq!(tag(&cache).await, Err("too-young"));
    pass(1).await;
    assert_eq!(tag(&cache).await, Ok(digest));
}

/// Pushes this manifest or index under the tag.
fn push_manifest(registry: &Registry, manifest: &serde_json::Value) -> Digest {
    let manifest = manifest.to_string();
    let digest = Digest::of(Algorithm::Sha256, manifest.as_bytes());
    let mut state = registry.state();
    let shelf = state.shelves.entry(REPOSITORY.to_owned()).or_default();
    shelf.manifests.insert(digest, manifest.into());
    shelf.tags.insert("1".to_owned(), digest);
    digest
}

/// Sets `Last-Modified` of this content.
fn stored_days_ago(registry: &Registry, digest: Digest, days: i64) {
    let at = now() - Duration::from_secs((days * DAY).unsigned_abs());
    registry.state().last_modified.insert(digest, at);
}

/// Config of an image in the registry.
fn config_of(registry: &Registry, image: Digest) -> Digest {
    let state = registry.state();
    let manifest = &state.shelves[REPOSITORY].manifests[&image];
    let manifest: serde_json::Value = serde_json::from_slice(manifest).unwrap();
    manifest["config"]["digest"].as_str().unwrap().parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn new_digest_is_as_old_as_its_config_in_storage() {
    for (days, expected) in [(3, true), (2, false)] {
        let registry = registry();
        let cache = Cache::on_disk(&registry, rules());
        let image = push(&registry, "one");
        let at = now() - Duration::from_secs((days * DAY).unsigned_abs());
        let config = config_of(&registry, image);
        registry.state().last_modified.insert(config, at);
        let expected = if expected { Ok(image) } else { Err("too-young") };
        assert_eq!(tag(&cache).await, expected);
        let cache = cache.restart(rules()).await;
        registry.state().request_log.clear();
        assert_eq!(tag(&cache).await, expected, "recorded");
        let asked = |line: &String| line.contains("/blobs/");
        assert!(
            !registry.request_log().iter().any(asked),
            "{:?}",
            registry.request_log()
        );
        pass((3 - days) * DAY).await;
        assert_eq!(tag(&cache).await, Ok(image));
    }
}

#[tokio::test(start_paused = true)]
async fn image_annotated_as_attestation_counts_for_the_age() {
    for (platform, expected) in [("linux/amd64", false), ("unknown/unknown", true)] {
        let registry = registry();
        let mut cache = Cache::new(&registry, rules());
        cache.takes_indexes = true;
        let (old, young) = (push(&registry, "old"), push(&registry, "young"));
        let (os, architecture) = platform.split_once('/').unwrap();
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            {"mediaType": OCI_MANIFEST, "digest": old.to_string(), "size": 400,
                "platform": {"os": "linux", "architecture": "arm64"}},
            {"mediaType": OCI_MANIFEST, "digest": young.to_string(), "size": 400,
                "platform": {"os": os, "architecture": architecture},
                "annotations": {"vnd.docker.reference.type": "attestation-manifest",
                    "vnd.docker.reference.digest": old.to_string()}},
        ]});
        let index = push_manifest(&registry, &index);
        stored_days_ago(&registry, config_of(&registry, old), 10);
        let expected = if expected { Ok(index) } else { Err("too-young") };
        assert_eq!(tag(&cache).await, expected, "{platform}");
    }
}

#[tokio::test(start_paused = true)]
async fn config_of_an_artifact_is_no_evidence() {
    let image = "application/vnd.oci.image.config.v1+json";
    for (media_type, config, expected) in [
        (image, r#"{"rootfs":{"diff_ids":[]}}"#, true),
        (
            "application/vnd.docker.container.image.v1+json",
            r#"{"rootfs":{}}"#,
            true,
        ),
        ("application/vnd.oci.empty.v1+json", "{}", false),
        (image, "{}", false),
        (
            "application/vnd.cncf.helm.config.v1+json",
            r#"{"name":"chart"}"#,
            false,
        ),
    ] {
        let registry = registry();
        let cache = Cache::new(&registry, rules());
        let digest = Digest::of(Algorithm::Sha256, config.as_bytes());
        let artifact = push_manifest(
            &registry,
            &serde_json::json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [],
                "config": {"mediaType": media_type, "digest": digest.to_string(), "size": config.len()}}),
        );
        {
            let mut state = registry.state();
            let shelf = state.shelves.get_mut(REPOSITORY).unwrap();
            shelf.blobs.insert(digest, config.into());
        }
        stored_days_ago(&registry, digest, 10);
        let expected = if expected { Ok(artifact) } else { Err("too-young") };
        assert_eq!(tag(&cache).await, expected, "{media_type} {config}");
    }
}

#[tokio::test(start_paused = true)]
async fn created_of_the_config_counts_only_if_trusted() {
    for trust_created in [false, true] {
        let registry = registry();
        let limit = AgeOverrides {
            trust_created: Some(trust_created),
            ..AgeOverrides::default()
        };
        let cache = Cache::new(&registry, rules_with(limit));
        let image = push(&registry, "one");
        let expected = if trust_created {
            Ok(image)
        } else {
            Err("too-young")
        };
        assert_eq!(tag(&cache).await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn storage_that_states_no_time_is_requested_once() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let image = push(&registry, "one");
    let config = format!("HEAD /v2/{REPOSITORY}/blobs/{}", config_of(&registry, image));
    for _ in 0..3 {
        assert_eq!(tag(&cache).await, Err("too-young"));
    }
    let log = registry.request_log();
    let heads = log.iter().filter(|line| **line == config).count();
    assert_eq!((heads, gets_of(&registry, image)), (1, 1), "{log:?}");
}

#[tokio::test(start_paused = true)]
async fn storage_that_states_an_implausible_time_is_requested_once() {
    let registry = registry();
    let limit = AgeOverrides {
        trust_created: Some(true),
        ..AgeOverrides::default()
    };
    let cache = Cache::new(&registry, rules_with(limit));
    let config = r#"{"created":"1970-01-01T00:00:00Z","rootfs":{}}"#;
    let digest = Digest::of(Algorithm::Sha256, config.as_bytes());
    push_manifest(
        &registry,
        &serde_json::json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [], "config":
            {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest.to_string(),
                "size": config.len()}}),
    );
    {
        let mut state = registry.state();
        state
            .shelves
            .get_mut(REPOSITORY)
            .unwrap()
            .blobs
            .insert(digest, config.into());
        state.last_modified.insert(digest, SystemTime::UNIX_EPOCH);
    }
    for _ in 0..3 {
        assert_eq!(tag(&cache).await, Err("too-young"));
    }
    let log = registry.request_log();
    let asked = log.iter().filter(|line| line.contains("/blobs/")).count();
    assert_eq!(asked, 2, "one HEAD and one GET: {log:?}");
}

#[tokio::test(start_paused = true)]
async fn age_of_an_index_is_found_for_every_accept() {
    let registry = registry();
    let mut cache = Cache::new(&registry, rules());
    let all = registry.push_index(REPOSITORY, "1", "one", &["amd64"]);
    let [index, image] = all[..] else {
        panic!("{all:?}")
    };
    registry.state().needs_listed_type.extend([index, image]);
    stored_days_ago(&registry, config_of(&registry, image), 10);
    cache.accept = Some(OCI_INDEX);
    assert_eq!(tag(&cache).await, Ok(index), "a client that accepts no image");
    cache.accept = None;
    cache.takes_indexes = true;
    assert_eq!(tag(&cache).await, Ok(index));
    assert_eq!(config_heads(&registry, image), 1, "{:?}", registry.request_log());
}

fn config_heads(registry: &Registry, image: Digest) -> usize {
    let line = format!("HEAD /v2/{REPOSITORY}/blobs/{}", config_of(registry, image));
    registry.request_log().iter().filter(|one| **one == line).count()
}

#[tokio::test(start_paused = true)]
async fn slow_storage_delays_no_pull_beyond_the_timeout() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(4 * DAY).await;
    let new = push(&registry, "two");
    stored_days_ago(&registry, config_of(&registry, new), 10);
    registry.hold(&format!("HEAD /v2/{REPOSITORY}/blobs/"));
    let began = tokio::time::Instant::now();
    let got = cache.get(&of("1")).await;
    assert!(matches!(got, Got::Content(digest, _) if digest == old), "{got:?}");
    assert!(
        began.elapsed() <= Duration::from_millis(2_100),
        "revalidate_timeout: {:?}",
        began.elapsed()
    );
    registry.release();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(config_heads(&registry, new), 1);
    assert_eq!(tag(&cache).await, Ok(new), "the late response counts");
}

#[tokio::test(start_paused = true)]
async fn failed_request_of_an_age_is_repeated_after_a_minute() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let image = push(&registry, "one");
    let config = config_of(&registry, image);
    let blobs = |change: &dyn Fn(&mut BTreeMap<Digest, Bytes>)| {
        change(&mut registry.state().shelves.get_mut(REPOSITORY).unwrap().blobs);
    };
    let bytes = registry.state().shelves[REPOSITORY].blobs[&config].clone();
    blobs(&|blobs| _ = blobs.remove(&config));
    for _ in 0..3 {
        assert_eq!(tag(&cache).await, Err("too-young"));
    }
    assert_eq!(config_heads(&registry, image), 1, "{:?}", registry.request_log());
    blobs(&|blobs| _ = blobs.insert(config, bytes.clone()));
    stored_days_ago(&registry, config, 10);
    pass(60).await;
    assert_eq!(tag(&cache).await, Ok(image));
    assert_eq!(config_heads(&registry, image), 2);
}

#[tokio::test(start_paused = true)]
async fn implausible_time_hides_no_good_one() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let image = push(&registry, "one");
    registry
        .state()
        .last_modified
        .insert(image, SystemTime::UNIX_EPOCH);
    stored_days_ago(&registry, config_of(&registry, image), 10);
    assert_eq!(tag(&cache).await, Ok(image), "by its config");
    let next = push(&registry, "two");
    registry
        .state()
        .last_modified
        .insert(next, SystemTime::UNIX_EPOCH);
    pass(4 * DAY).await;
    let cache = Cache::new(&registry, rules());
    assert_eq!(tag(&cache).await, Err("too-young"));
    stored_days_ago(&registry, next, 10);
    assert_eq!(tag(&cache).await, Ok(next), "the first time was not kept");
}

#[tokio::test(start_paused = true)]
async fn unknown_age_is_served_and_a_move_still_cools() {
    let registry = registry();
    let cache = Cache::new(&registry, rules_of(3, Policy::IfNewer, OnUnknownAge::Serve));
    let first = push(&registry, "one");
    assert_eq!(pulled_tag(&cache).await, first);
    pass(1).await;
    let second = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(first), "the tag has just moved");
    pass(3 * DAY).await;
    assert_eq!(tag(&cache).await, Ok(second));
}

#[tokio::test(start_paused = true)]
async fn unproven_digest_after_a_move_is_not_served() {
    let registry = registry();
    let cache = Cache::new(
        &registry,
        rules_changed(PolicyOverrides {
            grant_ttl: Some(Duration::from_secs(30 * 86_400)),
            age_limit: AgeOverrides {
                on_unknown_age: Some(OnUnknownAge::Serve),
                ..AgeOverrides::default()
            },
            ..PolicyOverrides::default()
        }),
    );
    let first = push(&registry, "one");
    assert_eq!(pulled_tag(&cache).await, first);
    pass(1).await;
    let second = push(&registry, "two");
    registry.state().redirects_manifests = true;
    for _ in 0..2 {
        assert_eq!(tag(&cache).await, Ok(first), "the tag has just moved");
    }
    assert_eq!(gets_of(&registry, second), 0);
    pass(3 * DAY).await;
    for _ in 0..2 {
        assert_eq!(tag(&cache).await, Ok(second));
    }
}

#[tokio::test(start_paused = true)]
async fn unproven_last_modified_is_no_evidence() {
    let registry = registry();
    registry.state().public.clear();
    registry.user("alice", "secret");
    registry.lets("alice", REPOSITORY);
    let cache = Cache::new(&registry, rules());
    let image = push(&registry, "one");
    let request = ClientRequest {
        shows: registry.bearer("alice"),
        ..of("1")
    };
    assert_eq!(get(&cache, &request).await, Err("too-young"));
    // The grant has expired, so the bytes are fetched as evidence of a new one.
    pass(HOUR).await;
    registry.state().redirects_manifests = true;
    stored_days_ago(&registry, image, 10);
    let got = cache.get(&request).await;
    assert!(
        matches!(got, Got::No("too-young")),
        "another host stated the time: {got:?}"
    );
    let gets = format!("GET /v2/{REPOSITORY}/manifests/1");
    assert!(
        registry.request_log().contains(&gets),
        "{:?}",
        registry.request_log()
    );
    registry.state().redirects_manifests = false;
    assert_eq!(
        get(&cache, &request).await,
        Ok(image),
        "the registry states the time"
    );
}

#[tokio::test(start_paused = true)]
async fn reload_of_min_age_applies_to_cached_copies() {
    let registry = registry();
    let cache = Cache::new(&registry, rules_of(0, Policy::IfNewer, OnUnknownAge::Refuse));
    let digest = push(&registry, "one");
    assert_eq!(pulled_tag(&cache).await, digest);
    let cache = cache.reload(rules(), false);
    assert_eq!(tag(&cache).await, Err("too-young"));
    registry.set_condition(Condition::Down);
    assert_eq!(tag(&cache).await, Err("too-young"), "also in an outage");
    let cache = cache.reload(rules_of(0, Policy::IfNewer, OnUnknownAge::Refuse), false);
    assert_eq!(tag(&cache).await, Ok(digest));
    let cache = cache.reload(rules(), false);
    pass(3 * DAY).await;
    assert_eq!(
        tag(&cache).await,
        Ok(digest),
        "seen while there was no minimum age"
    );
}

#[tokio::test(start_paused = true)]
async fn first_sight_survives_a_restart_and_a_kill() {
    let registry = registry();
    let cache = Cache::on_disk(&registry, rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(1).await;
    let new = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    let cache = cache.restart(rules()).await;
    pass(2 * DAY).await;
    assert_eq!(tag(&cache).await, Ok(old));
    registry.cut();
    let cache = cache.kill(rules()).await;
    assert_eq!(tag(&cache).await, Ok(old));
    pass(DAY).await;
    assert_eq!(tag(&cache).await, Ok(new));
}

#[tokio::test(start_paused = true)]
async fn implausible_last_modified_is_no_evidence() {
    for at in [
        now() + Duration::from_secs(1_000),
        SystemTime::UNIX_EPOCH,
        SystemTime::UNIX_EPOCH + Duration::from_secs(315_532_800),
    ] {
        let registry = registry();
        let cache = Cache::new(&registry, rules());
        let digest = push(&registry, "one");
        registry.state().last_modified.insert(digest, at);
        assert_eq!(tag(&cache).await, Err("too-young"), "{at:?}");
        pass(3 * DAY).await;
        assert_eq!(tag(&cache).await, Ok(digest), "seen for three days");
    }
}

#[tokio::test(start_paused = true)]
async fn flip_flop_keeps_the_age_of_each_digest() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let one = push(&registry, "one");
    assert_eq!(tag(&cache).await, Err("too-young"));
    pass(DAY).await;
    let two = push(&registry, "two");
    for _ in 0..20 {
        for mark in ["one", "two"] {
            pass(1).await;
            push(&registry, mark);
            assert_eq!(tag(&cache).await, Err("too-young"));
        }
    }
    pass(2 * DAY).await;
    assert_eq!(
        tag(&cache).await,
        Ok(one),
        "named by the tag three days ago, fetched by digest"
    );
    pull(&cache, one).await;
    push(&registry, "one");
    assert_eq!(tag(&cache).await, Ok(one));
    push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(one));
    pass(DAY).await;
    assert_eq!(tag(&cache).await, Ok(two));
}

#[tokio::test(start_paused = true)]
async fn older_digest_that_is_gone_denies_as_too_young() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    // Known to be young, so its config is not requested.
    let one = push_old(&registry, "one", 0);
    assert_eq!(tag(&cache).await, Err("too-young"));
    pass(3 * DAY).await;
    push(&registry, "two");
    let shelf = |registry: &Registry| {
        let mut state = registry.state();
        state.shelves.get_mut(REPOSITORY).unwrap().manifests.remove(&one)
    };
    shelf(&registry).unwrap();
    assert_eq!(tag(&cache).await, Err("too-young"));
}

#[tokio::test(start_paused = true)]
async fn next_older_digest_is_served_if_one_is_gone() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    // Known to be young, so its config is not requested.
    let one = push_old(&registry, "one", 0);
    assert_eq!(tag(&cache).await, Err("too-young"));
    pass(DAY).await;
    let two = push(&registry, "two");
    assert_eq!(tag(&cache).await, Err("too-young"));
    pass(3 * DAY).await;
    push(&registry, "three");
    let remove = || {
        let mut state = registry.state();
        state.shelves.get_mut(REPOSITORY).unwrap().manifests.remove(&two)
    };
    remove().unwrap();
    for _ in 0..3 {
        assert_eq!(tag(&cache).await, Ok(one));
    }
    let log = registry.request_log();
    assert_eq!(gets_of(&registry, two), 1, "{log:?}");
    assert_eq!(gets_of(&registry, one), 1, "{log:?}");
    pass(5 * 60).await;
    assert_eq!(tag(&cache).await, Ok(one));
    assert_eq!(gets_of(&registry, two), 2, "it may be back after five minutes");
}

/// An image that is old enough and not cached, after which the tag moved to a young one.
async fn moved_from_uncached(registry: &Registry, cache: &Cache, first: &ClientRequest) -> Digest {
    // Known to be young, so its config is not requested.
    let one = push_old(registry, "one", 0);
    assert_eq!(get(cache, first).await, Err("too-young"));
    pass(3 * DAY).await;
    push(registry, "two");
    one
}

#[tokio::test(start_paused = true)]
async fn older_digest_gone_for_one_accept_is_served_to_others() {
    let registry = registry();
    let mut cache = Cache::new(&registry, rules());
    let one = moved_from_uncached(&registry, &cache, &of("1")).await;
    registry.state().needs_listed_type.insert(one);
    cache.accept = Some("*/*");
    for _ in 0..2 {
        assert_eq!(tag(&cache).await, Err("too-young"), "404 for this Accept");
    }
    assert_eq!(gets_of(&registry, one), 1, "the 404 is remembered");
    cache.accept = None;
    assert_eq!(tag(&cache).await, Ok(one));
}

#[tokio::test(start_paused = true)]
async fn older_digest_gone_for_one_principal_is_served_to_others() {
    let registry = registry();
    registry.state().public.clear();
    let [alice, bob] = ["alice", "bob"].map(|user| {
        registry.user(user, "secret");
        registry.lets(user, REPOSITORY);
        ClientRequest {
            shows: registry.bearer(user),
            ..of("1")
        }
    });
    let cache = Cache::new(&registry, rules());
    let one = moved_from_uncached(&registry, &cache, &alice).await;
    let manifests = |change: &dyn Fn(&mut BTreeMap<Digest, Bytes>)| {
        change(&mut registry.state().shelves.get_mut(REPOSITORY).unwrap().manifests);
    };
    let bytes = registry.state().shelves[REPOSITORY].manifests[&one].clone();
    manifests(&|manifests| _ = manifests.remove(&one));
    assert_eq!(get(&cache, &alice).await, Err("too-young"));
    manifests(&|manifests| _ = manifests.insert(one, bytes.clone()));
    assert_eq!(
        get(&cache, &alice).await,
        Err("too-young"),
        "its 404 is remembered"
    );
    assert_eq!(get(&cache, &bob).await, Ok(one));
}

#[tokio::test(start_paused = true)]
async fn older_image_is_confirmed_by_naming_a_young_one() {
    let registry = registry();
    let cache = Cache::new(
        &registry,
        rules_changed(PolicyOverrides {
            stale_if_error: Some(StaleLimit::Within(Duration::from_secs(86_400))),
            max_age: Some(Duration::from_secs(3_600)),
            ..PolicyOverrides::default()
        }),
    );
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(2 * HOUR).await;
    let new = push(&registry, "two");
    for _ in 0..2 {
        assert_eq!(tag(&cache).await, Ok(old));
        pass(20 * HOUR).await;
    }
    registry.set_condition(Condition::Down);
    assert_eq!(tag(&cache).await, Ok(old), "revalidated 20 hours ago");
    pass(5 * HOUR).await;
    assert_eq!(tag(&cache).await, Err("stale-limit-exceeded"));
    registry.set_condition(Condition::Healthy);
    assert_eq!(tag(&cache).await, Ok(old));
    give(&cache, VerdictKind::Approved, new).await;
    assert_eq!(tag(&cache).await, Ok(new), "not fresh under max_age");
}

#[tokio::test(start_paused = true)]
async fn restart_keeps_when_the_young_digest_was_named() {
    let registry = registry();
    let rules = || {
        rules_changed(PolicyOverrides {
            stale_if_error: Some(StaleLimit::Within(Duration::from_secs(86_400))),
            ..PolicyOverrides::default()
        })
    };
    let cache = Cache::on_disk(&registry, rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(23 * HOUR).await;
    push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    let cache = cache.restart(rules()).await;
    pass(23 * HOUR).await;
    registry.set_condition(Condition::Down);
    assert_eq!(tag(&cache).await, Ok(old), "the young one was named 23 hours ago");
    pass(HOUR).await;
    assert_eq!(tag(&cache).await, Err("stale-limit-exceeded"));
}

/// Sets the registry's time to this many days ahead of this host's.
fn date_days_ahead(registry: &Registry, days: i64) {
    registry.state().date = Some(now() + Duration::from_secs((days * DAY).unsigned_abs()));
}

fn stale_for_a_day() -> Rules {
    rules_changed(PolicyOverrides {
        stale_if_error: Some(StaleLimit::Within(Duration::from_secs(86_400))),
        ..PolicyOverrides::default()
    })
}

#[tokio::test(start_paused = true)]
async fn t17_host_behind_keeps_stale_if_error_after_a_restart() {
    let registry = registry();
    let cache = Cache::on_disk(&registry, stale_for_a_day());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(23 * HOUR).await;
    push(&registry, "two");
    date_days_ahead(&registry, 2);
    assert_eq!(tag(&cache).await, Ok(old));
    registry.set_condition(Condition::Down);
    assert_eq!(tag(&cache).await, Ok(old), "confirmed a moment ago");
    let cache = cache.restart(stale_for_a_day()).await;
    pass(23 * HOUR).await;
    assert_eq!(tag(&cache).await, Ok(old), "the young one was named 23 hours ago");
    pass(HOUR).await;
    assert_eq!(tag(&cache).await, Err("stale-limit-exceeded"), "and no longer");
}

#[tokio::test(start_paused = true)]
async fn t17_host_behind_keeps_stale_if_error_after_a_reload() {
    let registry = registry();
    let cache = Cache::new(&registry, rules_of(0, Policy::IfNewer, OnUnknownAge::Refuse));
    let old = push_old(&registry, "one", 10);
    date_days_ahead(&registry, 2);
    assert_eq!(pulled_tag(&cache).await, old);
    pass(1).await;
    let new = push(&registry, "two");
    date_days_ahead(&registry, 2);
    assert_eq!(pulled_tag(&cache).await, new);
    registry.set_condition(Condition::Down);
    let cache = cache.reload(stale_for_a_day(), false);
    assert_eq!(tag(&cache).await, Ok(old), "the young one was named a moment ago");
    pass(DAY).await;
    assert_eq!(tag(&cache).await, Err("stale-limit-exceeded"));
}

#[tokio::test(start_paused = true)]
async fn every_policy_that_asks_upstream_cools() {
    for policy in [Policy::Always, Policy::IfNewer, Policy::IfNotPresent] {
        let registry = registry();
        let cache = Cache::new(&registry, rules_of(3, policy, OnUnknownAge::Refuse));
        let old = push_old(&registry, "one", 10);
        pulled_tag(&cache).await;
        pass(1).await;
        let new = push(&registry, "two");
        assert_eq!(tag(&cache).await, Ok(old), "{policy}");
        pass(3 * DAY).await;
        let expected = if policy == Policy::IfNotPresent { old } else { new };
        // Seen only now, if the policy asked for nothing before.
        assert_eq!(tag(&cache).await, Ok(expected), "{policy}");
    }
}

#[tokio::test(start_paused = true)]
async fn t17_clock_set_ahead_matures_nothing() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(1).await;
    let new = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    pull(&cache, new).await;
    registry.state().date = Some(now());
    jump(100 * DAY);
    assert_eq!(tag(&cache).await, Ok(old), "the registry knows the time");
    registry.set_condition(Condition::Down);
    assert_eq!(tag(&cache).await, Ok(old), "and knew it before the outage");
    registry.set_condition(Condition::Healthy);
    jump(-100 * DAY);
    registry.state().date = None;
    assert_eq!(tag(&cache).await, Ok(old));
    pass(3 * DAY).await;
    assert_eq!(tag(&cache).await, Ok(new));
}

#[tokio::test(start_paused = true)]
async fn future_date_of_one_registry_matures_no_other() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(1).await;
    push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    let year = Duration::from_secs(365 * 86_400);
    registry.state().date = Some(now() + year);
    let liar = ClientRequest {
        site: SHARED,
        ..of("1")
    };
    assert!(get(&cache, &liar).await.is_err());
    registry.state().date = Some(now());
    jump(100 * DAY);
    assert_eq!(tag(&cache).await, Ok(old), "by its own Date");
}

#[tokio::test(start_paused = true)]
async fn t17_corrected_clock_makes_no_first_sight_older() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let right = now() + Duration::from_secs((100 * DAY).unsigned_abs());
    registry.state().date = Some(right);
    let image = push(&registry, "one");
    assert_eq!(tag(&cache).await, Err("too-young"));
    jump(100 * DAY);
    registry.state().date = None;
    assert_eq!(tag(&cache).await, Err("too-young"), "first seen a moment ago");
    pass(3 * DAY).await;
    assert_eq!(tag(&cache).await, Ok(image));
}

#[tokio::test(start_paused = true)]
async fn t17_move_seen_by_a_host_behind_still_cools() {
    let registry = registry();
    let cache = Cache::new(&registry, rules_of(1, Policy::IfNewer, OnUnknownAge::Serve));
    let one = push(&registry, "one");
    pulled_tag(&cache).await;
    pass(10 * DAY).await;
    jump(-2 * DAY);
    date_days_ahead(&registry, 2);
    assert_eq!(tag(&cache).await, Ok(one));
    let two = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(one), "the tag has just moved");
    pass(5 * 60).await;
    jump(2 * DAY);
    registry.state().date = None;
    assert_eq!(tag(&cache).await, Ok(one), "the tag moved five minutes ago");
    pass(DAY).await;
    assert_eq!(tag(&cache).await, Ok(two));
}

#[tokio::test(start_paused = true)]
async fn t17_clock_set_back_starts_the_age_again() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 20);
    pulled_tag(&cache).await;
    pass(1).await;
    let new = push(&registry, "two");
    pass(5 * DAY).await;
    assert_eq!(tag(&cache).await, Ok(old), "first seen on the fifth day");
    jump(-5 * DAY);
    assert_eq!(
        tag(&cache).await,
        Ok(old),
        "seen in the future: counts from now on"
    );
    pass(3 * DAY - 1).await;
    assert_eq!(tag(&cache).await, Ok(old));
    pass(1).await;
    assert_eq!(tag(&cache).await, Ok(new));
}

#[tokio::test(start_paused = true)]
async fn slow_manifest_arrives_for_the_next_pull() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(1).await;
    let new = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    pass(3 * DAY).await;
    registry.hold(&format!("GET /v2/{REPOSITORY}/manifests/{new}"));
    let got = cache.get(&of("1")).await;
    assert!(
        matches!(got, Got::Content(digest, _) if digest == old),
        "after revalidate_timeout: {got:?}"
    );
    registry.release();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(tag(&cache).await, Ok(new));
    assert_eq!(gets_of(&registry, new), 1, "the slow request was not cancelled");
}

/// Approves or blocks a digest, as the operator.
pub async fn give(cache: &Cache, kind: VerdictKind, digest: Digest) {
    let key = VerdictKey {
        kind,
        scope: VerdictScope::Repository {
            upstream: PROVEN.into(),
            repository: REPOSITORY.parse().unwrap(),
        },
        digest,
    };
    let note = VerdictNote {
        at: now(),
        by: "operator".to_owned(),
        reason: None,
    };
    cache
        .proxy
        .store()
        .write(move |store| store.put_verdict(&key, note).unwrap())
        .await;
}

#[tokio::test(start_paused = true)]
async fn approved_digest_is_served_at_once_and_a_block_beats_it() {
    let registry = registry();
    let cache = Cache::new(&registry, rules());
    let old = push_old(&registry, "one", 10);
    pulled_tag(&cache).await;
    pass(1).await;
    let new = push(&registry, "two");
    assert_eq!(tag(&cache).await, Ok(old));
    give(&cache, VerdictKind::Approved, new).await;
    assert_eq!(pulled_tag(&cache).await, new);
    give(&cache, VerdictKind::Blocked, new).await;
    assert_eq!(tag(&cache).await, Err("blocked"));
}
