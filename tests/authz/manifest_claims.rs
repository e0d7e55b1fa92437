//! Claims of manifests: caches over one bucket that miss a manifest at the same moment, and what a wait must not change.

use std::time::Duration;

use ifnewer::bucket::ObjectKey;
use ifnewer::oci::Digest;
use ifnewer::policy::min_age::OnUnknownAge;
use ifnewer::policy::{Policy, rules::Rules};
use ifnewer::shared::SharedSettings;
use tokio::time::Instant;

use super::bucket::Bucket;
use super::cache::{Cache, ClientRequest, Got};
use super::min_age::{REPOSITORY, gets_of, of, registry, rules_of};
use super::random_walk::basic;
use super::registry::{Condition, Registry};

/// As the rules of these tests say.
const REVALIDATE_TIMEOUT: Duration = Duration::from_secs(2);

const SECOND: Duration = Duration::from_secs(1);

/// Requests of manifests, as the registry logs them.
const MANIFESTS: &str = "GET /v2/acme/app/manifests/";

fn rules() -> Rules {
    rules_of(0, Policy::IfNewer, OnUnknownAge::Refuse)
}

/// A cache that knows that the bucket keeps conditions.
async fn cache(registry: &Registry, bucket: &Bucket) -> Cache {
    let settings = SharedSettings {
        claims: true,
        records: None,
        ..bucket.settings("a")
    };
    let cache = Cache::new(registry, rules());
    cache.proxy.shared().configure(Some(settings));
    tokio::time::sleep(SECOND).await;
    cache
}

async fn got(cache: &Cache, request: &ClientRequest) -> Result<Digest, &'static str> {
    match cache.get(request).await {
        Got::Content(digest, _) => Ok(digest),
        Got::No(reason) => Err(reason),
        Got::List => panic!("a list"),
    }
}

/// A cache with the earlier image of a tag, the digest of that image, and the digest that the tag names now.
async fn with_moved_tag(registry: &Registry, bucket: &Bucket) -> (Cache, Digest, Digest) {
    let earlier = registry.push(REPOSITORY, "1", "one", &[]);
    let cache = cache(registry, bucket).await;
    super::min_age::pull(&cache, earlier).await;
    assert_eq!(got(&cache, &of("1")).await, Ok(earlier));
    (cache, earlier, registry.push(REPOSITORY, "1", "two", &[]))
}

/// Another cache has claimed this manifest a moment ago.
fn claims(bucket: &Bucket, digest: Digest) {
    let claim = r#"{"owner":"x","beat":0,"size":null,"received":0,"published":0,"wanted":false}"#;
    bucket.puts(&ObjectKey::manifest_claim(&digest), claim.into());
}

fn claim_requests(bucket: &Bucket) -> usize {
    let requests = bucket.requests();
    requests.iter().filter(|line| line.contains("/claims/m-")).count()
}

fn gets_of_tag(registry: &Registry) -> usize {
    let log = registry.request_log();
    log.iter()
        .filter(|line| **line == format!("GET /v2/{REPOSITORY}/manifests/1"))
        .count()
}

#[tokio::test(start_paused = true)]
async fn caches_at_once_request_a_manifest_once() {
    let (registry, bucket) = (registry(), Bucket::new());
    let digest = registry.push(REPOSITORY, "1", "one", &[]);
    registry.slows(MANIFESTS, Duration::from_millis(200));
    let (one, two, three) = (
        cache(&registry, &bucket).await,
        cache(&registry, &bucket).await,
        cache(&registry, &bucket).await,
    );
    let request = of("1");
    let all = tokio::join!(got(&one, &request), got(&two, &request), got(&three, &request));
    assert_eq!(all, (Ok(digest), Ok(digest), Ok(digest)));
    assert_eq!(gets_of_tag(&registry) + gets_of(&registry, digest), 1);
    tokio::time::sleep(2 * SECOND).await;
    assert_eq!(bucket.names("v1/claims/"), Vec::<String>::new());
    // Each has it on its disk now.
    bucket.forget_requests();
    assert_eq!(got(&two, &request).await, Ok(digest));
    assert_eq!(bucket.requests(), Vec::<String>::new());
}

/// The same for a tag that moved, in caches that have the earlier image.
#[tokio::test(start_paused = true)]
async fn moved_tag_is_requested_once_by_caches_with_a_copy() {
    let (registry, bucket) = (registry(), Bucket::new());
    let earlier = registry.push(REPOSITORY, "1", "one", &[]);
    let (one, two) = (cache(&registry, &bucket).await, cache(&registry, &bucket).await);
    for cache in [&one, &two] {
        super::min_age::pull(cache, earlier).await;
        assert_eq!(got(cache, &of("1")).await, Ok(earlier));
    }
    tokio::time::sleep(2 * SECOND).await;
    let digest = registry.push(REPOSITORY, "1", "two", &[]);
    registry.slows(MANIFESTS, Duration::from_millis(200));
    registry.state().request_log.clear();
    let request = of("1");
    let both = tokio::join!(got(&one, &request), got(&two, &request));
    assert_eq!(both, (Ok(digest), Ok(digest)));
    assert_eq!(gets_of_tag(&registry) + gets_of(&registry, digest), 1);
}

/// The same for the image of the platform in use, which is requested before the moved index is served.
#[tokio::test(start_paused = true)]
async fn image_of_a_moved_index_is_requested_once() {
    let (registry, bucket) = (registry(), Bucket::new());
    let earlier = registry.push_index(REPOSITORY, "1", "one", &["amd64"]);
    let (mut one, mut two) = (cache(&registry, &bucket).await, cache(&registry, &bucket).await);
    for cache in [&mut one, &mut two] {
        cache.takes_indexes = true;
        assert_eq!(got(cache, &of("1")).await, Ok(earlier[0]));
        super::min_age::pull(cache, earlier[1]).await;
    }
    tokio::time::sleep(2 * SECOND).await;
    let moved = registry.push_index(REPOSITORY, "1", "two", &["amd64"]);
    registry.slows(MANIFESTS, Duration::from_millis(200));
    registry.state().request_log.clear();
    let request = of("1");
    let both = tokio::join!(got(&one, &request), got(&two, &request));
    assert_eq!(both, (Ok(moved[0]), Ok(moved[0])));
    assert_eq!(gets_of_tag(&registry) + gets_of(&registry, moved[0]), 1);
    assert_eq!(gets_of(&registry, moved[1]), 1);
}

/// The bad interleaving: a claim is left behind, and the tag moves. The registry responds within `revalidate_timeout`, so its
/// image is served and not the earlier one.
#[tokio::test(start_paused = true)]
async fn wait_for_a_claim_never_brings_an_earlier_image() {
    for millis in [100, 1_200, 1_700] {
        let (registry, bucket) = (registry(), Bucket::new());
        let (cache, _, digest) = with_moved_tag(&registry, &bucket).await;
        claims(&bucket, digest);
        bucket.forget_requests();
        registry.slows(MANIFESTS, Duration::from_millis(millis));
        let began = Instant::now();
        assert_eq!(got(&cache, &of("1")).await, Ok(digest), "{millis} ms");
        let (took, waited) = (began.elapsed(), REVALIDATE_TIMEOUT / 3);
        assert!(
            claim_requests(&bucket) > 0,
            "it has waited: {:?}",
            bucket.requests()
        );
        let within = REVALIDATE_TIMEOUT.max(Duration::from_millis(millis) + waited + SECOND / 10);
        assert!(took < within, "{millis} ms: {took:?}");
    }
}

/// The `HEAD` ends after 0.8 s, the wait after 1.2 s, and then the registry denies one `GET` for a second. Without the wait,
/// the next `GET` would be within `revalidate_timeout`.
#[tokio::test(start_paused = true)]
async fn wait_for_a_claim_takes_no_time_from_a_rate_limit() {
    let (registry, bucket) = (registry(), Bucket::new());
    let (cache, _, digest) = with_moved_tag(&registry, &bucket).await;
    claims(&bucket, digest);
    registry.slows("HEAD /v2/acme/app/manifests/", SECOND * 8 / 10);
    let (began, request) = (Instant::now(), of("1"));
    let limiting = async {
        tokio::time::sleep(SECOND).await;
        registry.set_condition(Condition::Status(429));
        tokio::time::sleep(SECOND / 2).await;
        registry.set_condition(Condition::Healthy);
    };
    let (found, ()) = tokio::join!(got(&cache, &request), limiting);
    assert_eq!(found, Ok(digest), "{:?}", registry.request_log());
    assert!(began.elapsed() > REVALIDATE_TIMEOUT, "{:?}", began.elapsed());
}

/// Without the wait, the earlier image would be served too.
#[tokio::test(start_paused = true)]
async fn wait_for_a_claim_lets_no_slow_registry_delay_longer() {
    let (registry, bucket) = (registry(), Bucket::new());
    let (cache, earlier, digest) = with_moved_tag(&registry, &bucket).await;
    claims(&bucket, digest);
    registry.slows(MANIFESTS, Duration::from_secs(20));
    let began = Instant::now();
    assert_eq!(got(&cache, &of("1")).await, Ok(earlier));
    let took = began.elapsed();
    assert!(took <= REVALIDATE_TIMEOUT * 4 / 3 + SECOND / 10, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn claim_that_is_left_delays_a_cold_manifest_by_a_second() {
    let (registry, bucket) = (registry(), Bucket::new());
    let digest = registry.push(REPOSITORY, "1", "one", &[]);
    let cache = cache(&registry, &bucket).await;
    claims(&bucket, digest);
    let began = Instant::now();
    assert_eq!(got(&cache, &of("1")).await, Ok(digest));
    let took = began.elapsed();
    assert!(took >= SECOND && took < SECOND * 12 / 10, "{took:?}");
}

/// A client without a right causes no request for a claim, and its denial takes no longer.
#[tokio::test(start_paused = true)]
async fn unauthorized_client_causes_no_claim() {
    let (registry, bucket) = (registry(), Bucket::new());
    registry.state().public.clear();
    registry.user("eve", "eve-secret");
    let digest = registry.push(REPOSITORY, "1", "one", &[]);
    let cache = cache(&registry, &bucket).await;
    claims(&bucket, digest);
    for reference in ["1".to_owned(), digest.to_string()] {
        let request = ClientRequest {
            shows: basic("eve", "eve-secret"),
            ..of(&reference)
        };
        let began = Instant::now();
        assert!(got(&cache, &request).await.is_err());
        assert!(began.elapsed() < SECOND / 10, "{:?}", began.elapsed());
    }
    assert_eq!(claim_requests(&bucket), 0);
    registry.user("alice", "alice-secret");
    registry.lets("alice", REPOSITORY);
    let request = ClientRequest {
        shows: basic("alice", "alice-secret"),
        ..of("1")
    };
    assert_eq!(got(&cache, &request).await, Ok(digest));
    assert!(claim_requests(&bucket) > 0, "an authorized one does");
}

/// The bad interleaving: the right of a client ends while it waits, and then the bucket has the manifest.
#[tokio::test(start_paused = true)]
async fn right_that_ends_during_the_wait_gives_nothing() {
    let (registry, bucket) = (registry(), Bucket::new());
    registry.state().public.clear();
    registry.user("alice", "alice-secret");
    registry.lets("alice", REPOSITORY);
    let digest = registry.push(REPOSITORY, "1", "one", &[]);
    let bytes = registry.state().shelves[REPOSITORY].manifests[&digest].clone();
    let cache = cache(&registry, &bucket).await;
    claims(&bucket, digest);
    let request = ClientRequest {
        shows: basic("alice", "alice-secret"),
        ..of("1")
    };
    let ending = async {
        tokio::time::sleep(SECOND / 2).await;
        assert!(claim_requests(&bucket) > 0, "it waits");
        registry.revokes("alice", REPOSITORY);
        let other = ClientRequest {
            shows: basic("alice", "alice-secret"),
            ..of("other")
        };
        assert!(got(&cache, &other).await.is_err());
        bucket.puts(&ObjectKey::manifest(&digest), bytes);
    };
    let (got, ()) = tokio::join!(got(&cache, &request), ending);
    assert!(got.is_err(), "{got:?}");
}

#[tokio::test(start_paused = true)]
async fn absence_at_the_registry_ends_the_claim() {
    let (registry, bucket) = (registry(), Bucket::new());
    registry.push(REPOSITORY, "1", "one", &[]);
    let cache = cache(&registry, &bucket).await;
    registry.hold(MANIFESTS);
    let request = of("1");
    let ending = async {
        tokio::time::sleep(SECOND / 2).await;
        assert_eq!(bucket.names("v1/claims/").len(), 1);
        registry.state().shelves.clear();
        registry.cut();
        registry.release();
    };
    let (got, ()) = tokio::join!(got(&cache, &request), ending);
    assert!(got.is_err(), "{got:?}");
    tokio::time::sleep(SECOND).await;
    assert_eq!(bucket.names("v1/claims/"), Vec::<String>::new());
}
