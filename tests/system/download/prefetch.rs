//! Prefetch: a request for one layer starts the download of the others.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, Upstream, noise};

const DEMO: &str = "library/demo";

#[tokio::test]
async fn prefetch_starts_config_then_layers() {
    let upstream = Upstream::start().await;
    let image = upstream.push(
        DEMO,
        "latest",
        Image::with_layers(&["one", "two", "three", "four"]),
    );
    let proxy = Setup::over(&upstream).prefetching().start().await;

    proxy.manifest(DEMO, "latest").await.is_image(&image);
    proxy.until_kept(&image.config().digest).await;
    let first = image.layer(0);
    proxy.blob(DEMO, &first.digest).await.is_blob(first);
    for blob in &image.blobs {
        proxy.until_kept(&blob.digest).await;
    }
    upstream.refuses();
    proxy.pull(DEMO, "latest", &image).await.is_stale();
    assert_eq!(upstream.all_blob_gets(), image.blobs.len());
}

#[tokio::test]
async fn a_client_joins_what_was_begun_ahead() {
    const LAYER: usize = 1024 * 1024;
    let upstream = Upstream::start().await;
    let image = Image::with_layers(&[noise(1, LAYER), b"first".to_vec()]);
    let image = upstream.push(DEMO, "latest", image);
    let gate = upstream.holds_blob(&image.layer(0).digest, LAYER / 2);
    let proxy = Setup::over(&upstream).prefetching().start().await;

    proxy.manifest(DEMO, "latest").await.is_image(&image);
    let first = image.layer(1);
    proxy.blob(DEMO, &first.digest).await.is_blob(first);
    gate.reached().await;
    let mut layer = proxy.blob(DEMO, &image.layer(0).digest).stream().await;
    layer.read(LAYER / 4).await;
    gate.release();
    layer.rest().await.expect("the rest of the layer");
    assert_eq!(upstream.blob_gets(&image.layer(0).digest), 1);
}

#[tokio::test]
async fn of_an_index_the_platform_asked_for_comes_ahead_and_no_other() {
    let upstream = Upstream::start().await;
    let children = [Image::with_layers(&["amd"]), Image::with_layers(&["arm"])];
    let index = upstream.push(DEMO, "latest", Image::index(&children));
    let proxy = Setup::over(&upstream).prefetching().start().await;

    proxy.manifest(DEMO, "latest").await.is_image(&index);
    proxy
        .manifest(DEMO, &children[1].digest)
        .await
        .is_image(&children[1]);
    let layer = children[1].layer(0);
    proxy.blob(DEMO, &layer.digest).await.is_blob(layer);
    for blob in &children[1].blobs {
        proxy.until_kept(&blob.digest).await;
    }
    assert_eq!(upstream.blob_gets(&children[0].layer(0).digest), 0);
}

#[tokio::test]
async fn what_is_held_is_not_fetched_ahead_again() {
    let upstream = Upstream::start().await;
    let old = upstream.push(DEMO, "latest", Image::with_layers(&["base", "one"]));
    let proxy = Setup::over(&upstream).prefetching().start().await;
    proxy.pull(DEMO, "latest", &old).await;
    let new = upstream.moves(DEMO, "latest", Image::with_layers(&["base", "two"]));
    upstream.clear_log();

    proxy.pull(DEMO, "latest", &new).await;
    assert_eq!(upstream.blob_gets(&new.layer(0).digest), 0);
    assert_eq!(upstream.blob_gets(&new.layer(1).digest), 1);
}

/// A client that has the base layer from another image never requests it here, so prefetch must prove it.
#[tokio::test]
async fn layer_shared_with_other_image_completes_this_one() {
    const OTHER: &str = "library/other";
    let upstream = Upstream::start().await;
    let demo = upstream.push(DEMO, "latest", Image::with_layers(&["base", "one"]));
    let other = upstream.push(OTHER, "latest", Image::with_layers(&["base", "two"]));
    let base = other.layer(0);
    let proxy = Setup::over(&upstream).prefetching().start().await;
    proxy.pull(DEMO, "latest", &demo).await;
    proxy.until_kept(&base.digest).await;

    proxy.manifest(OTHER, "latest").await.is_image(&other);
    let own = other.layer(1);
    proxy.blob(OTHER, &own.digest).await.is_blob(own);
    let of_base = format!("/v2/{OTHER}/blobs/{}", base.digest);
    upstream
        .until("the base layer to be asked about", |seen| {
            seen.iter()
                .any(|seen| seen.method == "HEAD" && seen.path == of_base)
        })
        .await;
    proxy.until_kept(&other.layer(1).digest).await;
    upstream.answers(|seen| seen.path.contains("/manifests/"), 503);
    proxy
        .until(
            "the image to be whole",
            |proxy| proxy.manifest(OTHER, "latest"),
            |reply| reply.status == 200,
        )
        .await
        .is_stale();
    upstream.refuses();
    proxy.blob(OTHER, &base.digest).await.is_blob(base);
    assert_eq!(upstream.blob_gets(&base.digest), 1);
}

#[tokio::test]
async fn a_rule_can_switch_it_off() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let rule = "[[rule]]\nimages = [\"docker.io/library/*\"]\nprefetch = false";
    let proxy: Proxy = Setup::over(&upstream).prefetching().tail(rule).start().await;

    // After a complete pull each blob was fetched once, by its client, and none by prefetch.
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    proxy.has_turned(16).await;
    assert_eq!(upstream.all_blob_gets(), 0);
}
