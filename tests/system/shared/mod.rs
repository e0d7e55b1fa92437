//! Shared storage: a bucket behind two caches, that works, hangs, denies, lies and loses objects.

mod bucket;
mod claims;
mod grants;
mod records;
mod redirect;

use bucket::{Bucket, Mode};

use crate::proxy::{Proxy, Setup};
use crate::registry::{Blob, Front, Image, Seen, Upstream};

const DEMO: &str = "library/demo";
const MIB: usize = 1024 * 1024;

fn digests(image: &Image) -> Vec<&str> {
    let blobs = image.blobs.iter().map(|blob| blob.digest.as_str());
    blobs.chain([image.digest.as_str()]).collect()
}

/// An image that one cache has pulled and written to the bucket, and another cache with an empty disk.
async fn warm_bucket(image: Image) -> (Upstream, Bucket, Image, Proxy) {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    let image = upstream.push(DEMO, "latest", image);
    let first = bucket.behind(Setup::over(&upstream)).start().await;
    first.pull(DEMO, "latest", &image).await;
    bucket.has(digests(&image)).await;
    bucket.has_no_claims().await;
    let second = bucket.behind(Setup::over(&upstream)).start().await;
    upstream.clear_log();
    bucket.forget_asked();
    (upstream, bucket, image, second)
}

async fn metric(proxy: &Proxy, line: &str) -> String {
    let text = proxy.admin("/metrics").await;
    let text = String::from_utf8(text.body.to_vec()).unwrap();
    let found = text.lines().find_map(|found| found.strip_prefix(line));
    found.unwrap_or_default().trim().to_owned()
}

#[tokio::test]
async fn second_cache_reads_blobs_from_the_bucket() {
    let image = Image::with_layers(&[vec![1; 100], vec![2; 9 * MIB]]);
    let (upstream, bucket, image, second) = warm_bucket(image).await;
    assert_eq!(second.manifest(DEMO, "latest").await.is_image(&image).status, 200);
    for blob in &image.blobs {
        let reply = second.blob(DEMO, &blob.digest).await;
        reply.is_blob(blob);
        assert_eq!(reply.cache_status(), "ifnewer; hit; detail=shared");
        second.until_kept(&blob.digest).await;
    }
    assert_eq!(upstream.all_blob_gets(), 0, "only the rights were asked for");
    for blob in &image.blobs {
        let heads = upstream.requests();
        let heads = heads.iter().filter(|seen| seen.path.ends_with(&blob.digest));
        assert_eq!(
            heads.map(|seen| seen.method.as_str()).collect::<Vec<_>>(),
            ["HEAD"]
        );
        assert_eq!(bucket.count("GET", &blob.digest), 1);
        assert_eq!(bucket.count("PUT", &blob.digest), 0, "it came from there");
    }
    // Only the first cache has written, after one probe of conditions.
    assert!(
        bucket
            .asked()
            .iter()
            .all(|asked| asked.method != "PUT" || !asked.object.contains("blobs"))
    );
    let received = metric(
        &second,
        "ifnewer_shared_object_bytes_total{direction=\"received\"}",
    )
    .await;
    let blobs: usize = image.blobs.iter().map(|blob| blob.bytes.len()).sum();
    assert_eq!(received, (image.manifest.len() + blobs).to_string());
    assert_eq!(
        metric(&second, "ifnewer_shared_up{bucket=\"s3://images/team-a\"}").await,
        "1"
    );
    second.pull(DEMO, "latest", &image).await.is_hit();
}

#[tokio::test]
async fn every_metric_of_the_alerts_exists() {
    let (_upstream, _bucket, _image, second) = warm_bucket(Image::with_layers(&["one"])).await;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/prometheus/rules.yml");
    let rules = std::fs::read_to_string(path).unwrap();
    let words = rules.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let names: Vec<&str> = words.filter(|word| word.starts_with("ifnewer_shared_")).collect();
    assert!(!names.is_empty());
    for name in names {
        assert_ne!(metric(&second, name).await, "", "{name}");
    }
}

#[tokio::test]
async fn operator_sees_the_use_of_the_bucket() {
    let (upstream, bucket, image, second) = warm_bucket(Image::with_layers(&["one"])).await;
    second.pull(DEMO, "latest", &image).await;
    let storage = second.admin("/api/v1/shared").await.json()["storage"].clone();
    assert_eq!(storage["name"], "s3://images/team-a");
    assert_eq!(storage["reads_stopped"], serde_json::Value::Null);
    assert_eq!(storage["since_start"]["objects_read"], digests(&image).len());
    let shown = String::from_utf8(second.admin("/").await.body.to_vec()).unwrap();
    assert!(shown.contains("Shared storage"), "{shown}");
    assert!(shown.contains("3 objects read"), "{shown}");
    bucket.set(Mode::Status(403, "AccessDenied"));
    let other = upstream.push(DEMO, "other", Image::with_layers(&["two"]));
    second.pull(DEMO, "other", &other).await;
    second.program().says("shared storage unavailable").await;
    let storage = second.admin("/api/v1/shared").await.json()["storage"].clone();
    let failure = storage["reads_stopped"]["failure"].as_str().unwrap();
    assert!(failure.contains("denies access"), "{failure}");
    let shown = String::from_utf8(second.admin("/").await.body.to_vec()).unwrap();
    assert!(shown.contains(failure), "{shown}");
}

#[tokio::test]
async fn new_tag_costs_one_head_if_the_bucket_has_its_manifest() {
    let (upstream, bucket, image, second) = warm_bucket(Image::with_layers(&["one"])).await;
    second.manifest(DEMO, "latest").await.is_image(&image);
    let seen = upstream.requests();
    let methods: Vec<_> = seen
        .iter()
        .filter(|seen| seen.path.contains("/manifests/"))
        .map(|seen| (seen.method.as_str(), seen.path.ends_with("/latest")))
        .collect();
    assert_eq!(methods, [("HEAD", true)]);
    assert_eq!(bucket.count("GET", &image.digest), 1);
}

#[tokio::test]
async fn manifest_by_digest_is_read_from_the_bucket() {
    let (upstream, bucket, one, second) = warm_bucket(Image::with_layers(&["one"])).await;
    let two = upstream.push(DEMO, "two", Image::with_layers(&["two"]));
    second.manifest(DEMO, "two").await.is_image(&two);
    upstream.clear_log();
    second.manifest(DEMO, &one.digest).await.is_image(&one);
    assert_eq!(upstream.manifest_gets(DEMO), 0);
    assert_eq!(bucket.count("GET", &one.digest), 1);
    // Wrong bytes are not used, and are replaced.
    let third = bucket.behind(Setup::over(&upstream)).start().await;
    bucket.replace(&one.digest, "{}");
    third.manifest(DEMO, "two").await.is_image(&two);
    third.manifest(DEMO, &one.digest).await.is_image(&one);
    bucket
        .until("the right bytes", |bucket| {
            bucket.object(&one.digest).unwrap() == one.manifest
        })
        .await;
}

/// A client without a right learns nothing from the bucket, and the bucket is not asked for it.
#[tokio::test]
async fn bucket_gives_nothing_to_clients_without_a_right() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "bob/own");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private"]));
    let own = upstream.push("bob/own", "1", Image::with_layers(&["own"]));
    let first = bucket.behind(Setup::over(&upstream)).start().await;
    let alice = |ask: crate::proxy::Ask| ask.basic("alice", "a-secret");
    first.pull_with("acme/app", "1", &image, alice).await;
    bucket.has(digests(&image)).await;
    bucket.has_no_claims().await;
    let second = bucket.behind(Setup::over(&upstream)).start().await;
    bucket.forget_asked();
    let bob = |ask: crate::proxy::Ask| ask.basic("bob", "b-secret");
    for digest in digests(&image) {
        for ask in [
            second.blob("acme/app", digest),
            second.manifest("acme/app", digest),
        ] {
            let reply = bob(ask).await;
            assert!(reply.status >= 400, "{reply:#?}");
        }
        let anonymous = second.blob("acme/app", digest).await;
        assert!(anonymous.status >= 400, "{anonymous:#?}");
    }
    assert!(bucket.asked().is_empty(), "{:?}", bucket.asked());
    // With a right in his own repository, the digest is not there.
    second.pull_with("bob/own", "1", &own, bob).await;
    let layer = image.layer(0);
    let reply = bob(second.blob("bob/own", &layer.digest)).await;
    assert_eq!(reply.status, 404, "{reply:#?}");
    assert!(bucket.requests_of(&layer.digest).is_empty());
    second.pull_with("acme/app", "1", &image, alice).await;
}

/// With a right elsewhere, a private digest in the bucket and one that no registry has lead to the same requests.
#[tokio::test]
async fn requests_do_not_tell_what_the_bucket_has() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "bob/own");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private"]));
    let own = upstream.push("bob/own", "1", Image::with_layers(&["own"]));
    let first = bucket.behind(Setup::over(&upstream)).start().await;
    let alice = |ask: crate::proxy::Ask| ask.basic("alice", "a-secret");
    first.pull_with("acme/app", "1", &image, alice).await;
    bucket.has(digests(&image)).await;
    bucket.has_no_claims().await;
    let second = bucket.behind(Setup::over(&upstream)).start().await;
    let bob = |ask: crate::proxy::Ask| ask.basic("bob", "b-secret");
    second.pull_with("bob/own", "1", &own, bob).await;
    bucket.forget_asked();
    let absent = format!("sha256:{}", "ab".repeat(32));
    let private = [image.layer(0).digest.as_str(), image.digest.as_str()];
    let mut sequences = Vec::new();
    for digest in [absent.as_str()].into_iter().chain(private) {
        upstream.clear_log();
        for ask in [second.blob("bob/own", digest), second.manifest("bob/own", digest)] {
            let reply = bob(ask).await;
            assert_eq!(reply.status, 404, "{reply:#?}");
        }
        let seen = upstream.requests();
        let of_it = seen.iter().filter(|seen| seen.path.ends_with(digest));
        let sequence = of_it.map(|seen| {
            let kind = if seen.path.contains("/blobs/") {
                "blob"
            } else {
                "manifest"
            };
            let range = seen.header("range").unwrap_or_default().to_owned();
            (seen.method.clone(), kind, range)
        });
        sequences.push(sequence.collect::<Vec<_>>());
        assert!(bucket.requests_of(digest).is_empty());
    }
    assert!(
        sequences.iter().all(|sequence| *sequence == sequences[0]),
        "{sequences:#?}"
    );
    assert_eq!(sequences[0][0].0, "HEAD");
    let complete = |(method, kind, range): &&(String, &str, String)| {
        method == "GET" && *kind == "blob" && range.is_empty()
    };
    assert_eq!(sequences[0].iter().filter(complete).count(), 0);
}

/// The right to a blob is asked for once: an upstream that does not respond is not asked again by `GET`.
#[tokio::test]
async fn unavailable_head_is_the_result_of_the_request() {
    let (upstream, bucket, image, second) = warm_bucket(Image::with_layers(&["one"])).await;
    second.manifest(DEMO, "latest").await.is_image(&image);
    let layer = &image.layer(0).digest;
    bucket.forget_asked();
    upstream.answers(|seen| seen.method == "HEAD" && seen.path.contains("/blobs/"), 503);
    let reply = second.blob(DEMO, layer).await;
    assert!(reply.status >= 500, "{reply:#?}");
    assert_eq!((upstream.blob_gets(layer), bucket.count("GET", layer)), (0, 0));
    upstream.recovers();
}

fn is_blob_head(seen: &Seen) -> bool {
    seen.method == "HEAD" && seen.path.contains("/blobs/")
}

/// A cache whose upstream has confirmed the first of two layers, and the second one.
async fn confirmed() -> (Upstream, Bucket, Proxy, Blob) {
    let image = Image::with_layers(&[vec![1; 100], vec![2; MIB]]);
    let (upstream, bucket, image, second) = warm_bucket(image).await;
    second.manifest(DEMO, "latest").await.is_image(&image);
    second
        .blob(DEMO, &image.layer(0).digest)
        .await
        .is_blob(image.layer(0));
    let layer = image.layer(1).clone();
    (upstream, bucket, second, layer)
}

#[tokio::test]
async fn bucket_is_read_while_the_upstream_confirms_a_blob() {
    let (upstream, bucket, second, layer) = confirmed().await;
    let gate = upstream.holds_answers(is_blob_head);
    let pull = tokio::spawn(second.blob(DEMO, &layer.digest).into_reply());
    bucket
        .until("a read", |bucket| bucket.count("GET", &layer.digest) == 1)
        .await;
    gate.release();
    let reply = pull.await.unwrap();
    assert_eq!(
        reply.is_blob(&layer).cache_status(),
        "ifnewer; hit; detail=shared"
    );
    assert_eq!(bucket.count("GET", &layer.digest), 1);
    assert_eq!(upstream.blob_gets(&layer.digest), 0);
}

#[tokio::test]
async fn denial_waits_for_no_bucket_that_is_read_ahead() {
    let (upstream, bucket, second, layer) = confirmed().await;
    bucket.set(Mode::Silent);
    upstream.deletes_blob(DEMO, &layer.digest);
    let gate = upstream.holds_answers(is_blob_head);
    let pull = tokio::spawn(second.blob(DEMO, &layer.digest).into_reply());
    bucket
        .until("a read", |bucket| bucket.count("GET", &layer.digest) == 1)
        .await;
    gate.release();
    let reply = pull.await.unwrap();
    assert_eq!(reply.status, 404, "{reply:#?}");
    // The read was not waited for, so it has no result.
    let silent = "ifnewer_shared_requests_total{op=\"get\",result=\"silent\"}";
    assert!(["", "0"].contains(&metric(&second, silent).await.as_str()));
    // After a denial, the next blob is not read ahead.
    bucket.set(Mode::Normal);
    upstream.recovers();
    bucket.forget_asked();
    let gate = upstream.holds_answers(is_blob_head);
    let pull = tokio::spawn(second.blob(DEMO, &layer.digest).into_reply());
    gate.reached().await;
    second.has_turned(20).await;
    assert_eq!(bucket.count("GET", &layer.digest), 0);
    gate.release();
    assert_eq!(pull.await.unwrap().status, 404);
}

/// Otherwise a client would wait for the blob, and then for the claim.
#[tokio::test]
async fn silent_bucket_that_is_read_ahead_is_asked_once() {
    let (upstream, bucket, second, layer) = confirmed().await;
    bucket.set(Mode::Silent);
    bucket.forget_asked();
    second.blob(DEMO, &layer.digest).await.is_blob(&layer);
    let asked = bucket.requests_of(&layer.digest);
    let reads: Vec<_> = asked.iter().filter(|asked| asked.method == "GET").collect();
    assert_eq!(reads.len(), 1, "{reads:?}");
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
}

/// Whatever the bucket does, pulls succeed and the local cache is whole.
#[tokio::test]
async fn faulty_bucket_fails_no_pull() {
    for mode in [
        Mode::Silent,
        Mode::Status(503, "SlowDown"),
        Mode::Status(403, "AccessDenied"),
        Mode::Status(404, "NoSuchBucket"),
        Mode::Corrupt,
        Mode::Truncated,
        Mode::Eaten,
        Mode::ReadOnly,
    ] {
        let image = Image::with_layers(&[vec![3; 60_000], vec![4; 50], vec![5; 70], vec![6; 80]]);
        let (_upstream, bucket, image, second) = warm_bucket(image).await;
        bucket.set(mode);
        second.pull(DEMO, "latest", &image).await;
        bucket.forget_asked();
        let again = second.pull(DEMO, "latest", &image).await;
        again.is_hit();
        let reads = bucket.asked().into_iter().filter(|asked| asked.method == "GET");
        assert_eq!(reads.count(), 0, "{mode:?}: what is cached needs no bucket");
    }
}

#[tokio::test]
async fn silent_bucket_is_asked_three_times_and_then_probed() {
    let layers: Vec<String> = (0..8).map(|number| format!("layer {number}")).collect();
    let (upstream, bucket, image, second) = warm_bucket(Image::with_layers(&layers)).await;
    bucket.set(Mode::Silent);
    second.pull(DEMO, "latest", &image).await;
    let asked = bucket.asked();
    let reads = asked.iter().filter(|asked| asked.method != "PUT");
    assert_eq!(reads.count(), 3, "{asked:?}");
    second.program().says("shared storage unavailable").await;
    assert_eq!(
        metric(&second, "ifnewer_shared_up{bucket=\"s3://images/team-a\"}").await,
        "0"
    );
    let health = second.admin("/readyz").await;
    let problem = "degraded: shared storage s3://images/team-a cannot be read";
    assert_eq!(health.status, 200);
    assert!(
        String::from_utf8_lossy(&health.body).contains(problem),
        "{health:#?}"
    );
    assert!(upstream.all_blob_gets() > 0);
    bucket.set(Mode::Normal);
    second.program().says("shared storage available again").await;
}

/// Uploads that the bucket denies are not lost, and cost one probe at a time, at growing pauses.
#[tokio::test]
async fn denied_uploads_wait_until_writes_are_allowed() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["a", "b", "c", "d", "e"]));
    let setup = bucket.behind_with(Setup::over(&upstream), "claims = false");
    let proxy = setup.start().await;
    bucket.set(Mode::ReadOnly);
    proxy.pull(DEMO, "latest", &image).await;
    proxy.program().says("shared storage accepts no uploads").await;
    let ready = proxy.admin("/readyz").await;
    assert!(
        String::from_utf8_lossy(&ready.body).contains("accepts no uploads"),
        "{ready:#?}"
    );
    // Each attempt begins with 16 writes, which show whether conditions are kept.
    let writes = |bucket: &Bucket| {
        let asked = bucket.asked_with_probes();
        asked.iter().filter(|asked| asked.method == "PUT").count()
    };
    bucket
        .until("three attempts", |bucket| writes(bucket) >= 3 * 16)
        .await;
    assert_eq!(
        metric(&proxy, "ifnewer_shared_uploads_total{result=\"failed\"}").await,
        ""
    );
    bucket.set(Mode::Normal);
    bucket.has(digests(&image)).await;
    proxy.program().says("shared storage accepts uploads again").await;
}

/// A pull beside an object of these bytes, which are not those of the layer.
async fn is_replaced(object: Vec<u8>) -> Proxy {
    let (upstream, bucket, image, second) = warm_bucket(Image::with_layers(&[vec![7; 5000]])).await;
    let layer = image.layer(0);
    bucket.replace(&layer.digest, object);
    second.pull(DEMO, "latest", &image).await;
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
    bucket
        .until("the right bytes", |bucket| {
            bucket.object(&layer.digest).unwrap() == layer.bytes
        })
        .await;
    assert_eq!(metric(&second, "ifnewer_shared_wrong_objects_total").await, "1");
    second
}

#[tokio::test]
async fn wrong_bytes_reach_no_client_and_are_replaced() {
    let second = is_replaced(vec![8; 5000]).await;
    second.program().says("does not match its digest").await;
}

#[tokio::test]
async fn object_of_another_size_is_replaced() {
    is_replaced(vec![7; 100]).await;
}

/// The bucket is not blamed for bytes that the upstream has sent.
#[tokio::test]
async fn wrong_continuation_of_the_upstream_blames_no_object() {
    let (upstream, bucket, image, second) = warm_bucket(Image::of_noise(6, MIB)).await;
    let layer = image.layer(0).clone();
    bucket.set(Mode::Eaten);
    let wrong = Front::new(206, "application/octet-stream", &vec![9; MIB / 2])
        .header("content-range", "bytes 524288-1048575/1048576")
        .header("docker-distribution-api-version", "registry/2.0");
    upstream.is_fronted(|seen| seen.header("range") == Some("bytes=524288-"), &wrong);
    second.manifest(DEMO, "latest").await.is_image(&image);
    // A client that has some of the bytes already is cut off.
    second.blob(DEMO, &layer.digest).broken_or_reply().await;
    second.until_kept(&layer.digest).await;
    let gets = upstream.requests();
    let gets = gets
        .iter()
        .filter(|seen| seen.method == "GET" && seen.path.ends_with(&layer.digest));
    let ranges: Vec<_> = gets
        .map(|seen| seen.header("range").unwrap_or_default().to_owned())
        .collect();
    assert_eq!(ranges, ["bytes=524288-", ""]);
    assert_eq!(metric(&second, "ifnewer_shared_wrong_objects_total").await, "0");
}

/// The hints of sizes are in memory, and the manifest is on the disk.
#[tokio::test]
async fn blob_from_the_bucket_has_a_length_after_a_restart() {
    let (_upstream, bucket, image, second) = warm_bucket(Image::of_noise(7, 9 * MIB)).await;
    second.manifest(DEMO, "latest").await.is_image(&image);
    let second = second.restart().await;
    second.manifest(DEMO, "latest").await.is_image(&image);
    bucket.set(Mode::Stalled);
    let flow = second.blob(DEMO, &image.layer(0).digest).stream().await;
    let length = flow.headers.get("content-length").expect("a length");
    assert_eq!(length.to_str().unwrap(), (9 * MIB).to_string());
}

/// The upstream sends only what is missing.
#[tokio::test]
async fn upstream_continues_where_the_bucket_broke_off() {
    let (upstream, bucket, image, second) = warm_bucket(Image::of_noise(5, MIB)).await;
    let layer = image.layer(0);
    bucket.set(Mode::Eaten);
    second.pull(DEMO, "latest", &image).await;
    let requests = upstream.requests();
    let gets = requests
        .iter()
        .filter(|seen| seen.method == "GET" && seen.path.ends_with(&layer.digest));
    let ranges: Vec<_> = gets
        .map(|seen| seen.header("range").unwrap_or_default().to_owned())
        .collect();
    assert_eq!(ranges, [format!("bytes={}-", MIB / 2)]);
}

#[tokio::test]
async fn denied_writes_are_told_and_reads_go_on() {
    let (upstream, bucket, _image, second) = warm_bucket(Image::with_layers(&["one"])).await;
    bucket.set(Mode::ReadOnly);
    let other = upstream.push(DEMO, "other", Image::with_layers(&["two"]));
    second.pull(DEMO, "other", &other).await;
    second.program().says("shared storage accepts no uploads").await;
    assert_eq!(
        metric(&second, "ifnewer_shared_up{bucket=\"s3://images/team-a\"}").await,
        "1"
    );
}

#[tokio::test]
async fn read_only_cache_writes_nothing() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let proxy = bucket
        .behind_with(Setup::over(&upstream), "write = false")
        .start()
        .await;
    proxy.pull(DEMO, "latest", &image).await;
    let mut proxy = proxy;
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
    assert!(
        bucket
            .asked_with_probes()
            .iter()
            .all(|asked| matches!(asked.method.as_str(), "GET" | "HEAD"))
    );
}

#[tokio::test]
async fn reload_moves_to_another_bucket() {
    let (upstream, one, other) = (
        Upstream::start().await,
        Bucket::start().await,
        Bucket::start().await,
    );
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let setup = Setup::over(&upstream);
    let plain = setup.clone();
    let proxy = one.behind(setup).start().await;
    proxy.pull(DEMO, "latest", &image).await;
    one.has(digests(&image)).await;
    let toml = plain.tail(&other.section("")).toml();
    proxy.setup().file("ifnewer.toml", &toml);
    proxy.program().reload();
    proxy.program().says("configuration reloaded").await;
    let next = upstream.push(DEMO, "next", Image::with_layers(&["two"]));
    proxy.pull(DEMO, "next", &next).await;
    other.has(digests(&next)).await;
    assert!(one.object(&next.digest).is_none());
}

#[tokio::test]
async fn shutdown_waits_for_running_uploads() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let mut proxy = bucket.behind(Setup::over(&upstream)).start().await;
    bucket.has_claims_for(1).await;
    bucket.set(Mode::HoldsWrites);
    proxy.pull(DEMO, "latest", &image).await;
    bucket
        .until("an upload", |bucket| {
            bucket.asked().iter().any(|asked| asked.method == "PUT")
        })
        .await;
    proxy.terminate();
    proxy.program().says("shutting down").await;
    bucket.set(Mode::Normal);
    assert_eq!(proxy.exit().await, Some(0));
    for digest in digests(&image) {
        assert!(bucket.object(digest).is_some(), "{digest}");
    }
}

#[tokio::test]
async fn second_signal_waits_for_no_upload() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    let image = upstream.push(DEMO, "latest", Image::of_noise(6, 2 * MIB));
    let setup = Setup::over(&upstream).tail("[limits]\ndrain = \"10m\"");
    let mut proxy = bucket.behind(setup).start().await;
    bucket.has_claims_for(1).await;
    bucket.set(Mode::HoldsWrites);
    proxy.manifest(DEMO, "latest").await;
    bucket
        .until("an upload", |bucket| {
            bucket.asked().iter().any(|asked| asked.method == "PUT")
        })
        .await;
    let gate = upstream.holds_blob(&image.layer(0).digest, MIB);
    let cold = proxy.blob(DEMO, &image.layer(0).digest).stream().await;
    gate.reached().await;
    proxy.terminate();
    proxy.until_closed().await;
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
    drop(cold);
}

#[tokio::test]
async fn secret_key_is_printed_nowhere() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let setup = bucket
        .behind(Setup::over(&upstream))
        .tail("[log]\nlevel = \"debug\"");
    let proxy = setup.start().await;
    bucket.set(Mode::Status(403, "SignatureDoesNotMatch"));
    proxy.pull(DEMO, "latest", &image).await;
    proxy.program().says("SignatureDoesNotMatch").await;
    let said = proxy.program().stderr() + &proxy.program().stdout();
    assert!(
        !said.contains("canary-secret") && !said.contains("Signature="),
        "{said}"
    );
}
