//! Upstreams with wrong HEAD responses: one GET detects them, and the quirk is remembered.

use crate::proxy::{Proxy, Setup, blob_path, manifest_path};
use crate::registry::{Image, Seen, Upstream, noise};

fn is_head_of_blob(seen: &Seen) -> bool {
    seen.method == "HEAD" && seen.path.contains("/blobs/")
}

fn is_head_of_manifest(seen: &Seen) -> bool {
    seen.method == "HEAD" && seen.path.contains("/manifests/")
}

/// Cold, the same base layer in a second repository, moved, in an outage.
async fn is_cached_all_the_same(status: u16) {
    let upstream = Upstream::start().await;
    let base = noise(1, 100_000);
    let one = Image::with_layers(&[base.clone(), b"one".to_vec()]);
    let one = upstream.push("library/one", "latest", one);
    let two = upstream.push(
        "library/two",
        "latest",
        Image::with_layers(&[base.clone(), b"two".to_vec()]),
    );
    upstream.answers(is_head_of_blob, status);
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/one", "latest", &one).await;
    proxy.pull("library/two", "latest", &two).await;
    let layer = blob_path("library/two", &two.layer(1).digest);
    proxy.head(&layer).await.is_blob(two.layer(1));

    for mark in ["three", "four"] {
        let moved = Image::with_layers(&[base.clone(), mark.as_bytes().to_vec()]);
        let moved = upstream.moves("library/two", "latest", moved);
        proxy.pull("library/two", "latest", &moved).await.is_fetched();
    }
    let cold = blob_path("library/two", &one.layer(1).digest);
    proxy.head(&cold).await.is_refused(404);
    upstream.refuses();
    proxy.pull("library/one", "latest", &one).await.is_stale();
}

#[tokio::test]
async fn r03_head_of_blob_404_is_checked_by_get() {
    is_cached_all_the_same(404).await;
}

#[tokio::test]
async fn r04_head_of_blob_refused_is_checked_by_get() {
    for status in [400, 403, 405, 500, 501] {
        is_cached_all_the_same(status).await;
    }
}

#[tokio::test]
async fn r03_a_lying_head_of_blobs_is_remembered_and_shown() {
    let upstream = Upstream::start().await;
    let image = upstream.push(
        "library/one",
        "latest",
        Image::with_layers(&["one", "two", "three"]),
    );
    upstream.answers(is_head_of_blob, 404);
    let proxy = Proxy::over(&upstream).await;
    for blob in &image.blobs {
        proxy
            .head(&blob_path("library/one", &blob.digest))
            .await
            .is_blob(blob);
    }
    let heads = upstream
        .requests()
        .iter()
        .filter(|seen| is_head_of_blob(seen))
        .count();
    assert_eq!(heads, 1, "found out once");
    let upstreams = proxy.admin("/api/v1/upstreams").await;
    assert!(
        String::from_utf8_lossy(&upstreams.body).contains("blob-head-untrue"),
        "{upstreams:#?}"
    );
}

#[tokio::test]
async fn r04_a_denial_by_head_and_get_is_a_denial() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes"]));
    let proxy = Proxy::over(&upstream).await;
    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.basic("alice", "a-secret"))
        .await;
    upstream.forbids("acme/app");
    let layer = blob_path("acme/app", &image.layer(0).digest);
    for _ in 0..3 {
        proxy.head(&layer).await.is_refused(403);
        proxy.get(&layer).await.is_refused(403);
    }
}

#[tokio::test]
async fn r05_head_of_manifest_404_is_checked_by_get() {
    for status in [400, 403, 404, 500] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        upstream.answers(is_head_of_manifest, status);
        let proxy = Proxy::over(&upstream).await;
        let path = manifest_path("library/demo", "latest");
        proxy.head(&path).await.is_image(&image);
        proxy.get(&path).await.is_image(&image);
        proxy.get(&path).await.is_image(&image);
        proxy.pull("library/demo", "latest", &image).await.is_not_stale();
        let moved = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
        proxy.pull("library/demo", "latest", &moved).await.is_fetched();
        proxy
            .head(&manifest_path("library/demo", &moved.digest))
            .await
            .is_image(&moved);
        upstream.deletes_tag("library/demo", "latest");
        proxy.get(&path).await.is_refused(404);
        upstream.refuses();
        proxy.get(&path).await.is_unreachable();
    }
}

/// The first is pulled while HEAD is right.
#[tokio::test]
async fn r05_a_404_that_takes_away_what_is_held_is_checked() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream).start().await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.answers(is_head_of_manifest, 404);
    for _ in 0..2 {
        proxy.pull("library/demo", "latest", &image).await.is_not_stale();
    }
    let heads = upstream
        .requests()
        .iter()
        .filter(|seen| is_head_of_manifest(seen))
        .count();
    assert!(heads <= 2, "{heads} heads");
    upstream.refuses();
    proxy.pull("library/demo", "latest", &image).await.is_stale();
}
