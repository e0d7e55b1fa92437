//! Policy `never` with the records of other caches: no request reaches the upstream, whatever the bucket and the disk do.

use std::sync::Arc;

use ifnewer::bucket::ObjectKey;
use ifnewer::oci::Digest;
use ifnewer::policy::Policy;
use ifnewer::store::fs::MemoryFs;

use super::bucket::Bucket;
use super::cache::{Cache, ClientRequest, Got};
use super::min_age::{REPOSITORY, of, pass, registry, tag};
use super::registry::Registry;
use super::tag_records::{HOUR, cache, pull_layers, reader, recorded, rules, rules_within, second};

const NOTHING: Vec<String> = Vec::new();

/// A cache under `never` that has seen nothing.
fn never(registry: &Registry, bucket: &Bucket) -> Cache {
    registry.state().request_log.clear();
    bucket.forget_requests();
    reader(registry, bucket, rules_within(Policy::Never, None))
}

/// The digest of the first layer of this manifest.
fn layer_of(registry: &Registry, manifest: &Digest) -> Digest {
    let state = registry.state();
    let bytes = &state.shelves[REPOSITORY].manifests[manifest];
    let manifest: serde_json::Value = serde_json::from_slice(bytes).unwrap();
    manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap()
}

fn blob(digest: &str) -> ClientRequest {
    ClientRequest {
        path: format!("/v2/{REPOSITORY}/blobs/{digest}"),
        ..of("1")
    }
}

/// The bucket was seen to have the blobs longer than a minute ago.
#[tokio::test(start_paused = true)]
async fn never_serves_a_tag_again_after_a_minute() {
    let (registry, bucket, _first, digest) = recorded().await;
    let second = never(&registry, &bucket);
    for _ in 0..3 {
        assert_eq!(tag(&second).await, Ok(digest));
        pass(120).await;
    }
    // The image is not complete any more.
    bucket.loses("v1/blobs/");
    assert_eq!(tag(&second).await, Err("not-cached"));
    assert_eq!(registry.request_log(), NOTHING);
}

/// Cached content too: under `never` no response of the upstream would end the mark.
#[tokio::test(start_paused = true)]
async fn denial_elsewhere_ends_an_own_mark_under_never() {
    let (registry, bucket, first, digest) = recorded().await;
    let second = second(&registry, &bucket, rules(Policy::IfNewer, HOUR)).await;
    pull_layers(&second, digest).await;
    let second = second.reload(rules_within(Policy::Never, None), false);
    assert_eq!(tag(&second).await, Ok(digest));
    registry.state().public.clear();
    let denied = first.get(&of("1")).await;
    assert!(matches!(denied, Got::No(_)), "{denied:?}");
    first.proxy.shared().drain().await;
    pass(2).await;
    registry.state().request_log.clear();
    let layer = layer_of(&registry, &digest);
    let requests = [of("1"), of(&digest.to_string()), blob(&layer.to_string())];
    for request in requests {
        let got = second.get(&request).await;
        assert!(matches!(got, Got::No("not-authorized")), "{request:?}: {got:?}");
    }
    assert_eq!(registry.request_log(), NOTHING);
}

/// The time would tell what other repositories have.
#[tokio::test(start_paused = true)]
async fn no_manifest_of_another_repository_is_read() {
    let (registry, bucket, first, own) = recorded().await;
    let other = registry.push("acme/other", "1", "one", &[100]);
    registry.state().public.insert("acme/other".to_owned());
    let path = "/v2/acme/other/manifests/1".to_owned();
    let got = first.get(&ClientRequest { path, ..of("1") }).await;
    assert!(matches!(got, Got::Content(..)), "{got:?}");
    first.proxy.shared().drain().await;
    let second = never(&registry, &bucket);
    let reads = || {
        let requests = bucket.requests();
        requests
            .iter()
            .filter(|line| line.contains("v1/manifests/"))
            .count()
    };
    let got = second.get(&of(&other.to_string())).await;
    assert!(matches!(got, Got::No("not-authorized")), "{got:?}");
    assert_eq!(reads(), 0);
    // That of this repository is.
    let got = second.get(&of(&own.to_string())).await;
    assert!(matches!(got, Got::Content(found, _) if found == own), "{got:?}");
    assert_eq!(reads(), 1);
    assert_eq!(registry.request_log(), NOTHING);
}

#[tokio::test(start_paused = true)]
async fn never_forwards_no_unsupported_digest() {
    let (registry, bucket, _first, digest) = recorded().await;
    let second = never(&registry, &bucket);
    assert_eq!(tag(&second).await, Ok(digest));
    let foreign = format!("blake3:{}", "5".repeat(64));
    for head in [false, true] {
        for request in [of(&foreign), blob(&foreign)] {
            let got = second.get(&ClientRequest { head, ..request }).await;
            assert!(matches!(got, Got::No("not-cached")), "{got:?}");
        }
    }
    assert_eq!(registry.request_log(), NOTHING);
}

#[tokio::test(start_paused = true)]
async fn never_forwards_no_blob_past_a_full_disk() {
    let (registry, bucket, _first, digest) = recorded().await;
    registry.state().request_log.clear();
    let disk = Arc::new(MemoryFs::new());
    let second = Cache::over(&registry, rules_within(Policy::Never, None), &disk);
    second.proxy.shared().configure(Some(bucket.settings("a")));
    assert_eq!(tag(&second).await, Ok(digest));
    disk.set_bytes_max(0);
    let got = second.get(&blob(&layer_of(&registry, &digest).to_string())).await;
    assert!(matches!(got, Got::No("not-cached")), "{got:?}");
    assert_eq!(registry.request_log(), NOTHING);
}

const MIB: usize = 1024 * 1024;

/// The bucket stalls, and a client reads what lies far ahead.
#[tokio::test(start_paused = true)]
async fn never_fetches_no_range_from_the_upstream() {
    let (registry, bucket) = (registry(), Bucket::new());
    let digest = registry.push(REPOSITORY, "1", "one", &[17 * MIB]);
    let layer = layer_of(&registry, &digest);
    let bytes = registry.state().shelves[REPOSITORY].blobs[&layer].clone();
    let size = bytes.len() as u64;
    let first = cache(&registry, &bucket, rules(Policy::IfNewer, HOUR));
    pull_layers(&first, digest).await;
    bucket.puts(&ObjectKey::blob(&layer), bytes);
    let mut second = never(&registry, &bucket);
    assert_eq!(tag(&second).await, Ok(digest));
    bucket.stalls();
    second.within = Some((size - 1, size));
    let got = second.get(&blob(&layer.to_string())).await;
    assert!(matches!(got, Got::No("broken")), "{got:?}");
    assert_eq!(registry.request_log(), NOTHING);
}
