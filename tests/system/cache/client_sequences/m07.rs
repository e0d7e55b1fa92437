//! Blob requests go upstream only if nothing cached authorizes them.

use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Image, Seen, Upstream};

const APP: &str = "acme/app";

fn alice(ask: Ask) -> Ask {
    ask.basic("alice", "a-secret")
}

fn blob_heads(upstream: &Upstream) -> usize {
    let is_blob_head = |seen: &&Seen| seen.method == "HEAD" && seen.path.contains("/blobs/");
    upstream.requests().iter().filter(is_blob_head).count()
}

async fn private() -> (Upstream, Image, Proxy) {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", APP);
    let image = upstream.push(APP, "1", Image::with_layers(&["one", "two"]));
    let proxy = Proxy::over(&upstream).await;
    alice(proxy.manifest(APP, "1")).await.is_image(&image);
    (upstream, image, proxy)
}

#[tokio::test]
async fn m07_who_began_a_download_joins_it_without_a_head() {
    let (upstream, image, proxy) = private().await;
    let layer = image.layer(0);
    let digest = layer.digest.clone();
    let gate = upstream.holds_answers(move |seen| seen.path.ends_with(&digest));

    let first = tokio::spawn(alice(proxy.blob(APP, &layer.digest)).into_future());
    gate.reached().await;
    let second = tokio::spawn(alice(proxy.blob(APP, &layer.digest)).into_future());
    proxy.has_turned(16).await;
    gate.release();
    first.await.unwrap().is_blob(layer);
    second.await.unwrap().is_blob(layer);
    assert_eq!((blob_heads(&upstream), upstream.blob_gets(&layer.digest)), (0, 1));
}

#[tokio::test]
async fn m07_who_was_refused_since_is_asked_about_again() {
    let (upstream, image, proxy) = private().await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 0);
    let first = tokio::spawn(alice(proxy.blob(APP, &layer.digest)).into_future());
    gate.reached().await;

    upstream.revokes("alice");
    upstream.expires_tokens();
    alice(proxy.blob(APP, &image.layer(1).digest))
        .await
        .is_refused(401);
    alice(proxy.blob(APP, &layer.digest)).await.is_refused(401);
    gate.release();
    first.await.unwrap().is_blob(layer);
}

/// An image with 41 unshared layers.
fn of_41_layers(version: &str) -> Image {
    let layers = (0..41).map(|n| format!("layer {n} {version}"));
    Image::with_layers(&layers.collect::<Vec<_>>())
}

#[tokio::test]
async fn m07_the_gets_of_a_moved_tag_are_its_check() {
    let upstream = Upstream::start().await;
    let old = upstream.push(APP, "1", of_41_layers("old"));
    let proxy = Setup::over(&upstream)
        .prefetching()
        .default_keys("revalidate_timeout = \"20s\"")
        .start()
        .await;
    proxy.pull(APP, "1", &old).await;
    let new = upstream.moves(APP, "1", of_41_layers("new"));
    upstream.clear_log();
    proxy.pull(APP, "1", &new).await.is_fetched();
    assert_eq!((blob_heads(&upstream), upstream.all_blob_gets()), (0, 42));
}

#[tokio::test]
async fn m07_a_moved_tag_that_lacks_any_layer_is_held_back() {
    for lacking in [0, 20, 40] {
        let upstream = Upstream::start().await;
        let old = upstream.push(APP, "1", of_41_layers("old"));
        let proxy = Setup::over(&upstream)
            .prefetching()
            .default_keys("revalidate_timeout = \"20s\"")
            .start()
            .await;
        proxy.pull(APP, "1", &old).await;
        let new = upstream.moves(APP, "1", of_41_layers("new"));
        upstream.deletes_blob(APP, &new.layer(lacking).digest);
        proxy.pull(APP, "1", &old).await.is_hit();
    }
}

#[tokio::test]
async fn m07_slow_layers_are_not_waited_for_by_the_check() {
    let upstream = Upstream::start().await;
    let old = upstream.push(APP, "1", of_41_layers("old"));
    let proxy = Setup::over(&upstream)
        .prefetching()
        .default_keys("revalidate_timeout = \"20s\"")
        .start()
        .await;
    proxy.pull(APP, "1", &old).await;
    let new = upstream.moves(APP, "1", of_41_layers("new"));
    // No download ends, so only the first few are started.
    let gate = upstream.holds_bodies(|seen| seen.path.contains("/blobs/"));
    proxy.manifest(APP, "1").await.is_image(&new);
    gate.release();
}
