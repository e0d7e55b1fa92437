//! Redirects of clients to the bucket: which requests are redirected, and their URLs.

use super::bucket::{Bucket, Mode};
use super::{DEMO, MIB, digests, metric, warm_bucket};
use crate::cache::blocked_digests::block;
use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Image, Upstream};

const ALWAYS: &str = "redirect = \"always\"";
const UNCACHED: &str = "redirect = \"uncached\"";

fn large() -> Image {
    Image::with_layers(&[vec![1; 100], vec![2; 2 * MIB]])
}

/// A cache that has an image, which is in the bucket too.
async fn redirecting(keys: &str) -> (Upstream, Bucket, Image, Proxy) {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    let image = upstream.push(DEMO, "latest", large());
    let proxy = bucket.behind_with(Setup::over(&upstream), keys).start().await;
    proxy.pull(DEMO, "latest", &image).await;
    bucket.has(digests(&image)).await;
    bucket.set_clock_right();
    bucket.forget_asked();
    (upstream, bucket, image, proxy)
}

async fn blob(proxy: &Proxy, digest: &str) -> (u16, Option<String>) {
    let reply = proxy.blob(DEMO, digest).unchecked().await;
    (reply.status, reply.header("location").map(str::to_owned))
}

#[tokio::test]
async fn large_blob_is_redirected_and_its_url_has_the_bytes() {
    let (_upstream, bucket, image, proxy) = redirecting(ALWAYS).await;
    let (small, layer) = (image.layer(0), image.layer(1));
    let reply = proxy.blob(DEMO, &layer.digest).unchecked().await;
    assert_eq!(reply.status, 307);
    assert_eq!(reply.cache_status(), "ifnewer; hit; detail=redirected");
    assert_eq!(reply.header("docker-content-digest"), Some(layer.digest.as_str()));
    let location = reply.header("location").unwrap();
    assert!(location.contains("X-Amz-Expires=60"), "{location}");
    let (status, bytes) = bucket.follow(location).await;
    assert_eq!((status, &bytes), (200, &layer.bytes));
    // A client whose response broke off continues there, once. The bucket is asked again whether it has the object.
    let rest = || async {
        let ask = proxy.blob(DEMO, &layer.digest).header("range", "bytes=5-");
        ask.unchecked().await.status
    };
    assert_eq!((rest().await, rest().await), (307, 206));
    assert_eq!(blob(&proxy, &layer.digest).await, (200, None), "it asks again");
    assert_eq!(bucket.count("HEAD", &layer.digest), 2);
    assert_eq!(metric(&proxy, "ifnewer_shared_redirects_total").await, "2");

    assert_eq!(
        proxy
            .head(&format!("/v2/{DEMO}/blobs/{}", layer.digest))
            .await
            .status,
        200
    );
    assert_eq!(
        blob(&proxy, &small.digest).await,
        (200, None),
        "small blobs are quicker from here"
    );
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    let logged = proxy.program().stderr();
    assert!(!logged.contains("X-Amz-Signature"), "the URL is a credential");
}

#[tokio::test]
async fn credential_for_the_storages_host_is_not_redirected() {
    let (_upstream, _bucket, image, proxy) = redirecting(ALWAYS).await;
    let layer = image.layer(1);
    let ask = || proxy.blob(DEMO, &layer.digest).basic("alice", "a-secret");
    let reply = ask().header("host", "127.0.0.1:5000").unchecked().await;
    assert_ne!(reply.status, 307, "it would send the credential there too");
    let reply = ask().header("host", "cache.example.org").unchecked().await;
    assert_eq!(reply.status, 307);
}

#[tokio::test]
async fn blob_that_the_bucket_lacks_or_cannot_send_is_served() {
    let (_upstream, bucket, image, proxy) = redirecting(ALWAYS).await;
    let layer = image.layer(1);
    bucket.replace(&layer.digest, vec![2; 2 * MIB + 1]);
    assert_eq!(blob(&proxy, &layer.digest).await, (200, None), "another size");
    bucket.set(Mode::Status(404, "NoSuchKey"));
    assert_eq!(blob(&proxy, &layer.digest).await, (200, None));
    bucket.set(Mode::Status(403, "AccessDenied"));
    assert_eq!(blob(&proxy, &layer.digest).await, (200, None));
    bucket.set(Mode::Silent);
    assert_eq!(blob(&proxy, &layer.digest).await, (200, None));
}

#[tokio::test]
async fn redirect_of_uncached_blobs_needs_the_own_right() {
    let (upstream, bucket, image, _first) = warm_bucket(large()).await;
    bucket.set_clock_right();
    let second = bucket.behind_with(Setup::over(&upstream), UNCACHED).start().await;
    second.manifest(DEMO, "latest").await.is_image(&image);
    upstream.clear_log();
    let layer = image.layer(1);
    let (status, location) = blob(&second, &layer.digest).await;
    assert_eq!(status, 307);
    assert_eq!(bucket.follow(&location.unwrap()).await.1, layer.bytes);
    assert_eq!(upstream.blob_gets(&layer.digest), 0);
}

#[tokio::test]
async fn cached_blob_is_served_if_only_uncached_ones_are_redirected() {
    let (_upstream, bucket, image, proxy) = redirecting(UNCACHED).await;
    assert_eq!(blob(&proxy, &image.layer(1).digest).await, (200, None));
    assert_eq!(bucket.count("HEAD", &image.layer(1).digest), 0);
}

#[tokio::test]
async fn client_without_a_right_is_not_redirected() {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "bob/own");
    let image = upstream.push("acme/app", "1", large());
    for keys in [ALWAYS, UNCACHED] {
        let proxy = bucket.behind_with(Setup::over(&upstream), keys).start().await;
        let alice = |ask: Ask| ask.basic("alice", "a-secret");
        let pulled = alice(proxy.manifest("acme/app", "1")).await;
        pulled.is_image(&image);
        for blob in &image.blobs {
            let reply = alice(proxy.blob("acme/app", &blob.digest)).unchecked().await;
            if reply.status == 307 {
                // The first redirect of a cache is verified in the background.
                let is_read = |bucket: &Bucket| bucket.count("GET", &blob.digest) > 0;
                bucket.until("the verification", is_read).await;
            }
        }
        bucket.has(digests(&image)).await;
        bucket.forget_asked();
        let layer = image.layer(1);
        for ask in [
            proxy.blob("acme/app", &layer.digest),
            proxy.blob("acme/app", &layer.digest).basic("bob", "b-secret"),
            proxy.blob("bob/own", &layer.digest).basic("bob", "b-secret"),
        ] {
            let reply = ask.unchecked().await;
            assert!(reply.status >= 400, "{reply:#?}");
        }
        // The claims of the pull end meanwhile.
        let asked = bucket.asked();
        let reads = asked
            .iter()
            .filter(|asked| matches!(&*asked.method, "GET" | "HEAD"));
        assert_eq!(reads.count(), 0, "{asked:?}");
    }
}

#[tokio::test]
async fn blocked_blob_is_not_redirected() {
    let (_upstream, _bucket, image, proxy) = redirecting(ALWAYS).await;
    let layer = image.layer(1);
    block(&proxy, &layer.digest).await;
    let (status, location) = blob(&proxy, &layer.digest).await;
    assert_eq!((status, location), (403, None));
}
