//! Records in the bucket: two caches with one key, of which one starts while the upstream is unavailable.

use std::os::unix::fs::PermissionsExt;

use super::bucket::{Bucket, Mode};
use super::{DEMO, digests, metric};
use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Image, Upstream};

/// A cache with the bucket, a key of this digit, and further keys of `[default]`.
fn with_key(bucket: &Bucket, upstream: &Upstream, digit: &str, default: &str) -> Setup {
    let setup = Setup::over(upstream).default_keys(default);
    let key = setup.file("records.key", &digit.repeat(64));
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
    bucket.behind_with(setup, &format!("key_file = {key:?}"))
}

fn cache(bucket: &Bucket, upstream: &Upstream) -> Setup {
    with_key(bucket, upstream, "5", "")
}

/// Waits until the bucket has as many records of each class: tag, content, public.
async fn has_records(bucket: &Bucket, counts: [usize; 3]) {
    bucket
        .until("records", |bucket| {
            ["tag", "content", "public"].map(|class| bucket.records(class).len()) == counts
        })
        .await;
}

/// A public image that one cache has pulled and recorded. Nothing responds any more.
async fn recorded() -> (Upstream, Bucket, Image, Proxy) {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    let image = upstream.push(
        DEMO,
        "latest",
        Image::with_layers(&[vec![1; 100], vec![2; 70_000]]),
    );
    let first = cache(&bucket, &upstream).start().await;
    first.pull(DEMO, "latest", &image).await;
    bucket.has(digests(&image)).await;
    bucket.has_no_claims().await;
    has_records(&bucket, [1, 1, 1]).await;
    (upstream, bucket, image, first)
}

#[tokio::test]
async fn cache_born_in_an_outage_serves_a_public_image() {
    let (upstream, bucket, image, _first) = recorded().await;
    bucket.pass(3600);
    upstream.refuses();
    let second = cache(&bucket, &upstream).start().await;
    let reply = second.pull(DEMO, "latest", &image).await;
    reply.is_stale();
    let age: u64 = reply.header("age").unwrap().parse().unwrap();
    assert!((3600..3700).contains(&age), "by the storage's clock: {age}");
    // It has its own copy now.
    bucket.forget_asked();
    second.pull(DEMO, "latest", &image).await.is_stale();
    let read = bucket
        .asked()
        .into_iter()
        .filter(|asked| !asked.object.contains("public"));
    assert_eq!(read.filter(|asked| asked.method == "GET").count(), 0);
    assert_eq!(
        second
            .head(&crate::proxy::manifest_path(DEMO, "latest"))
            .await
            .status,
        200
    );
    // By digest, on yet another cache.
    let third = cache(&bucket, &upstream).start().await;
    third.manifest(DEMO, &image.digest).await.is_image(&image);
    third
        .blob(DEMO, &image.layer(0).digest)
        .await
        .is_blob(image.layer(0));
    let line = "ifnewer_shared_records_total{class=\"tag\",result=\"read\"}";
    assert_eq!(metric(&second, line).await, "1");
}

#[tokio::test]
async fn public_mark_from_a_record_ends_with_the_outage() {
    let (upstream, bucket, image, _first) = recorded().await;
    upstream.refuses();
    let second = cache(&bucket, &upstream).start().await;
    second.pull(DEMO, "latest", &image).await.is_stale();
    upstream.recovers();
    upstream.requires_token();
    for digest in digests(&image) {
        let (manifest, blob) = (
            second.manifest(DEMO, digest).await,
            second.blob(DEMO, digest).await,
        );
        assert_eq!((manifest.status, blob.status), (401, 401));
    }
}

fn alice(ask: Ask) -> Ask {
    ask.basic("alice", "a-secret")
}

#[tokio::test]
async fn cache_born_in_an_outage_refuses_a_private_image() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    upstream.requires_token();
    upstream.lets("alice", "a-secret", DEMO);
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["private"]));
    let first = cache(&bucket, &upstream).start().await;
    first.pull_with(DEMO, "latest", &image, alice).await;
    bucket.has(digests(&image)).await;
    bucket.has_no_claims().await;
    has_records(&bucket, [1, 1, 0]).await;
    upstream.refuses();
    let second = cache(&bucket, &upstream).start().await;
    bucket.forget_asked();
    for client in [alice, |ask| ask] {
        client(second.manifest(DEMO, "latest")).await.is_unreachable();
        for digest in digests(&image) {
            client(second.manifest(DEMO, digest)).await.is_unreachable();
            client(second.blob(DEMO, digest)).await.is_unreachable();
        }
    }
    let asked = bucket.asked();
    let is_public = |asked: &super::bucket::Asked| asked.object.contains("records/public");
    assert!(
        asked.iter().all(is_public),
        "nothing else is looked up: {asked:?}"
    );
}

#[tokio::test]
async fn repository_that_became_private_is_refused_elsewhere() {
    let (upstream, bucket, image, first) = recorded().await;
    upstream.refuses();
    let second = cache(&bucket, &upstream).start().await;
    second.pull(DEMO, "latest", &image).await.is_stale();
    upstream.recovers();
    upstream.requires_token();
    let yes = bucket.records("public");
    assert_eq!(first.manifest(DEMO, "latest").await.status, 401);
    assert_ne!(bucket.records("public"), yes, "recorded before the response");
    upstream.refuses();
    // A record that was read counts for a second.
    let second = second.restart().await;
    second.manifest(DEMO, "latest").await.is_unreachable();
    for digest in digests(&image) {
        second.manifest(DEMO, digest).await.is_unreachable();
        second.blob(DEMO, digest).await.is_unreachable();
    }
    let third = cache(&bucket, &upstream).start().await;
    third.manifest(DEMO, "latest").await.is_unreachable();
}

/// A public image of which two caches have a mark of their own. Then the first one records that it is private.
async fn revoked() -> (Upstream, Bucket, Image, Proxy) {
    let (upstream, bucket, image, first) = recorded().await;
    let second = cache(&bucket, &upstream).start().await;
    second.pull(DEMO, "latest", &image).await;
    assert_eq!(second.get(&tags_of(DEMO)).await.status, 200);
    upstream.requires_token();
    assert_eq!(first.manifest(DEMO, "latest").await.status, 401);
    upstream.refuses();
    (upstream, bucket, image, second)
}

fn tags_of(repository: &str) -> String {
    format!("/v2/{repository}/tags/list")
}

#[tokio::test]
async fn denial_elsewhere_ends_a_current_public_mark() {
    let (_upstream, _bucket, image, second) = revoked().await;
    second.manifest(DEMO, "latest").await.is_unreachable();
    for digest in digests(&image) {
        second.manifest(DEMO, digest).await.is_unreachable();
        second.blob(DEMO, digest).await.is_unreachable();
    }
}

#[tokio::test]
async fn denial_elsewhere_ends_cached_lists() {
    let (_upstream, _bucket, _image, second) = revoked().await;
    second.get(&tags_of(DEMO)).await.is_unreachable();
}

#[tokio::test]
async fn mark_by_a_record_needs_the_record() {
    let (upstream, bucket, image, _first) = recorded().await;
    upstream.refuses();
    let second = cache(&bucket, &upstream).start().await;
    second.pull(DEMO, "latest", &image).await.is_stale();
    bucket.set(Mode::Status(403, "AccessDenied"));
    let second = second.restart().await;
    second.manifest(DEMO, "latest").await.is_unreachable();
    second.manifest(DEMO, "latest").await.is_unreachable();
    second.blob(DEMO, &image.layer(0).digest).await.is_unreachable();
    bucket.set(Mode::Normal);
    // The record is too old now.
    bucket.pass(13 * 3600);
    let second = second.restart().await;
    second.manifest(DEMO, "latest").await.is_unreachable();
}

#[tokio::test]
async fn record_is_as_old_as_the_storage_says() {
    let (upstream, bucket, image, _first) = recorded().await;
    upstream.refuses();
    bucket.pass(3600);
    for (limit, is_served) in [("30m", false), ("2h", true)] {
        let keys = format!("stale_if_error = \"{limit}\"");
        let second = with_key(&bucket, &upstream, "5", &keys).start().await;
        let reply = second.manifest(DEMO, "latest").await;
        if is_served {
            reply.is_image(&image).is_stale();
        } else {
            reply.is_unreachable();
        }
    }
    // A public record counts as long as a grant in an outage.
    bucket.pass(11 * 3600);
    let second = cache(&bucket, &upstream).start().await;
    second.manifest(DEMO, "latest").await.is_unreachable();
}

#[tokio::test]
async fn policy_always_uses_no_record() {
    let (upstream, bucket, _image, _first) = recorded().await;
    upstream.refuses();
    let second = with_key(&bucket, &upstream, "5", "policy = \"always\"")
        .start()
        .await;
    let reply = second.manifest(DEMO, "latest").await;
    assert!(reply.status >= 400, "{reply:#?}");
}

#[tokio::test]
async fn policy_never_serves_an_image_of_the_bucket() {
    let (upstream, bucket, image, _first) = recorded().await;
    upstream.clear_log();
    let second = with_key(&bucket, &upstream, "5", "policy = \"never\"")
        .start()
        .await;
    let reply = second.pull(DEMO, "latest", &image).await;
    assert_eq!(reply.cache_status(), "ifnewer; hit; detail=not-revalidated");
    // The whole image is cached now.
    for blob in &image.blobs {
        second.until_kept(&blob.digest).await;
    }
    second.pull(DEMO, "latest", &image).await.is_hit();
    assert_eq!(upstream.requests().len(), 0, "{:#?}", upstream.requests());
}

#[tokio::test]
async fn forged_and_foreign_records_are_absent() {
    let (upstream, bucket, image, first) = recorded().await;
    let other = upstream.push(DEMO, "other", Image::with_layers(&["other"]));
    first.pull(DEMO, "other", &other).await;
    bucket.has(digests(&other)).await;
    has_records(&bucket, [2, 2, 1]).await;
    upstream.refuses();
    let foreign = with_key(&bucket, &upstream, "6", "").start().await;
    foreign.manifest(DEMO, "latest").await.is_unreachable();
    // Each record in the place of the other one.
    let tags = bucket.records("tag");
    bucket.put(&tags[0].0, tags[1].1.clone());
    bucket.put(&tags[1].0, tags[0].1.clone());
    let second = cache(&bucket, &upstream).start().await;
    second.manifest(DEMO, "latest").await.is_unreachable();
    let line = "ifnewer_shared_records_total{class=\"tag\",result=\"unsealed\"}";
    assert_eq!(metric(&second, line).await, "1");
    // By digest it is the same image.
    second.manifest(DEMO, &image.digest).await.is_image(&image);
}

#[tokio::test]
async fn incomplete_image_in_the_bucket_is_not_served() {
    let (upstream, bucket, image, _first) = recorded().await;
    upstream.refuses();
    let layer = image.layer(1).digest.clone();
    bucket.remove(&layer);
    let second = cache(&bucket, &upstream).start().await;
    second.manifest(DEMO, "latest").await.is_unreachable();
}

#[tokio::test]
async fn tag_deleted_at_the_registry_is_served_nowhere() {
    let (upstream, bucket, _image, first) = recorded().await;
    let named = bucket.records("tag");
    // Later than the last confirmation, by the second.
    bucket.pass(5);
    upstream.deletes_tag(DEMO, "latest");
    assert_eq!(first.manifest(DEMO, "latest").await.status, 404);
    bucket
        .until("the record", |bucket| bucket.records("tag") != named)
        .await;
    upstream.refuses();
    let second = cache(&bucket, &upstream).start().await;
    second.manifest(DEMO, "latest").await.is_unreachable();
}

#[tokio::test]
async fn storage_that_ignores_conditions_has_content_records_only() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    bucket.set(Mode::IgnoresConditions);
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let first = cache(&bucket, &upstream).start().await;
    first.pull(DEMO, "latest", &image).await;
    bucket.has(digests(&image)).await;
    has_records(&bucket, [0, 1, 0]).await;
    let is_counted = |reply: &crate::proxy::Reply| {
        String::from_utf8_lossy(&reply.body).contains("{class=\"tag\",result=\"unconditional\"}")
    };
    first
        .until("the record", |first| first.admin("/metrics"), is_counted)
        .await;
}

/// With the record of a manifest, the upstream is not asked for each of its blobs.
#[tokio::test]
async fn recorded_blobs_need_no_head() {
    let (upstream, bucket, image, _first) = recorded().await;
    let second = cache(&bucket, &upstream).start().await;
    upstream.clear_log();
    second.pull(DEMO, "latest", &image).await;
    let of_blobs = upstream.requests();
    let of_blobs = of_blobs.iter().filter(|seen| seen.path.contains("/blobs/"));
    assert_eq!(of_blobs.count(), 0, "{:#?}", upstream.requests());
}

/// While the upstream responds, a record opens no repository.
#[tokio::test]
async fn records_open_nothing_while_the_upstream_responds() {
    let (upstream, bucket, image, _first) = recorded().await;
    upstream.requires_token();
    let second = cache(&bucket, &upstream).start().await;
    bucket.forget_asked();
    assert_eq!(second.manifest(DEMO, "latest").await.status, 401);
    for digest in digests(&image) {
        assert_eq!(second.manifest(DEMO, digest).await.status, 401);
        assert_eq!(second.blob(DEMO, digest).await.status, 401);
    }
    // The denials are recorded, after a probe of conditions.
    let is_denial = |asked: &super::bucket::Asked| {
        asked.object.contains("records/public") || asked.object.contains("v1/probe")
    };
    assert!(bucket.asked().iter().all(is_denial), "{:?}", bucket.asked());
}

/// While the registry responds, no client gets an earlier image because of the bucket.
#[tokio::test]
async fn moved_tag_waits_once_for_a_silent_bucket() {
    let (upstream, bucket, _image, first) = recorded().await;
    let moved = upstream.push(DEMO, "latest", Image::with_layers(&[vec![9; 70_000]]));
    bucket.set(Mode::Silent);
    bucket.forget_asked();
    let reply = first.manifest(DEMO, "latest").await;
    assert_eq!(
        reply.header("docker-content-digest"),
        Some(moved.digest.as_str()),
        "{reply:#?}"
    );
    let asked = bucket.asked();
    let is_needed =
        |object: &str| object.starts_with("v1/records/content") || object.starts_with("v1/manifests");
    let waits = asked
        .iter()
        .filter(|asked| asked.method == "GET" && is_needed(&asked.object));
    assert_eq!(waits.count(), 1, "{asked:?}");
}

#[tokio::test]
async fn why_shows_the_records_of_an_image() {
    let (upstream, bucket, image, _first) = recorded().await;
    let other = upstream.push(DEMO, "other", Image::with_layers(&["other"]));
    let second = with_key(&bucket, &upstream, "5", "max_age = \"1h\"")
        .start()
        .await;
    let path = "/api/v1/why?image=docker.io/library/demo:latest";
    let why = second.admin(path).await.json();
    let (tag, content) = (&why["records"]["tag"], &why["records"]["content"]);
    assert_eq!(
        (&tag["state"], &tag["digest"]),
        (&"found".into(), &image.digest.clone().into())
    );
    assert!(tag["age_seconds"].as_u64().unwrap() < 60, "{why}");
    assert_eq!(
        (&content["state"], &content["children"]),
        (&"found".into(), &image.blobs.len().into())
    );
    assert_eq!(why["records"]["public"]["is_public"], true, "{why}");
    // With a grant, the record confirms the tag.
    second.manifest(DEMO, "other").await.is_image(&other);
    upstream.clear_log();
    let reply = second.pull(DEMO, "latest", &image).await;
    assert_eq!(reply.cache_status(), "ifnewer; hit; detail=fresh");
    assert_eq!(upstream.requests().len(), 0, "{:#?}", upstream.requests());
    let why = second.admin(path).await.json();
    assert_eq!(why["cached"]["confirmed_by_record"], true, "{why}");
    let because = why["because"].to_string();
    for part in [
        "the tag record of the caches names",
        "another cache has confirmed the copy",
    ] {
        assert!(because.contains(part), "{part}: {because}");
    }
    // A bucket that does not respond leaves the rest of the answer.
    bucket.set(Mode::Silent);
    let why = second.admin(path).await.json();
    assert_eq!(
        (&why["records"]["tag"]["state"], &why["reason"]),
        (&"unread".into(), &"fresh".into())
    );
    assert!(why["because"].to_string().contains("could not be read"), "{why}");
    let plain = Setup::over(&upstream).start().await;
    assert_eq!(plain.admin(path).await.json()["records"], serde_json::Value::Null);
}
