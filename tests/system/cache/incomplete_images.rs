//! Incomplete images: the manifest is cached and its blobs are not.

use crate::proxy::{Proxy, Setup, blob_path};
use crate::registry::{Image, Upstream};

/// Only the manifest was requested.
async fn manifest_alone(policy: &str) -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Setup::over(&upstream)
        .default_keys(&format!("policy = \"{policy}\""))
        .start()
        .await;
    proxy.manifest("library/demo", "latest").await.is_image(&image);
    upstream.clear_log();
    (upstream, proxy, image)
}

#[tokio::test]
async fn unchanged_manifest_is_served_and_blobs_fetched_later() {
    let (upstream, proxy, image) = manifest_alone("if-newer").await;
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    assert_eq!(
        (upstream.manifest_gets("library/demo"), upstream.all_blob_gets()),
        (0, image.blobs.len())
    );
}

#[tokio::test]
async fn if_not_present_fetches_missing_blobs_once() {
    let (upstream, proxy, image) = manifest_alone("if-not-present").await;
    proxy.pull("library/demo", "latest", &image).await.is_hit();
    // Usable only if the upstream can provide the blobs, so it is revalidated.
    assert_eq!(
        (
            upstream.heads("library/demo"),
            upstream.manifest_gets("library/demo"),
            upstream.all_blob_gets()
        ),
        (1, 0, image.blobs.len())
    );
    upstream.clear_log();
    proxy.pull("library/demo", "latest", &image).await.is_hit();
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn under_never_its_blobs_are_not_found_and_nobody_is_asked() {
    let (upstream, proxy, image) = manifest_alone("if-newer").await;
    let never = proxy
        .setup()
        .clone()
        .without_defaults()
        .default_keys("policy = \"never\"");
    let proxy = proxy.restart_as(never).await;
    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_refused(404);
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn an_index_is_complete_when_one_of_its_images_is() {
    let upstream = Upstream::start().await;
    let children = [Image::with_layers(&["amd"]), Image::with_layers(&["arm"])];
    let index = upstream.push("library/multi", "1", Image::index(&children));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/multi", "1", &index).await;
    proxy
        .pull("library/multi", &children[0].digest, &children[0])
        .await;
    upstream.refuses();

    proxy.pull("library/multi", "1", &index).await.is_stale();
    proxy
        .pull("library/multi", &children[0].digest, &children[0])
        .await
        .is_hit();
    proxy
        .head(&blob_path("library/multi", &children[1].layer(0).digest))
        .await
        .is_unreachable();
}

#[tokio::test]
async fn a_quota_on_manifests_does_not_keep_the_blobs_away() {
    let (upstream, proxy, image) = manifest_alone("if-newer").await;
    upstream.rate_limits_manifests(Some("60"));
    proxy.pull("library/demo", "latest", &image).await.is_stale();
}

/// As `ctr` of containerd 2: manifests and configs of every platform, layers of its own.
async fn pulls_as_ctr(proxy: &Proxy, repository: &str, reference: &str, index: &Image) {
    proxy.manifest(repository, reference).await.is_image(index);
    for child in &index.children {
        proxy.manifest(repository, &child.digest).await.is_image(child);
        proxy
            .blob(repository, &child.blobs[0].digest)
            .await
            .is_blob(&child.blobs[0]);
    }
    for blob in &index.children[0].blobs {
        proxy.blob(repository, &blob.digest).await.is_blob(blob);
    }
    for blob in index.children.iter().flat_map(|child| &child.blobs).take(3) {
        proxy.until_kept(&blob.digest).await;
    }
}

#[tokio::test]
async fn m02_by_digest_what_is_cached_is_served_in_an_outage() {
    let image = |name: &str| {
        Image::index(&[
            Image::with_layers(&[format!("{name} amd")]),
            Image::with_layers(&[format!("{name} arm")]),
        ])
    };
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let old = upstream.push("library/demo", "latest", image("old"));
    pulls_as_ctr(&proxy, "library/demo", "latest", &old).await;
    let new = upstream.moves("library/demo", "latest", image("new"));
    pulls_as_ctr(&proxy, "library/demo", "latest", &new).await;
    upstream.refuses();
    pulls_as_ctr(&proxy, "library/demo", "latest", &new).await;
    pulls_as_ctr(&proxy, "library/demo", &old.digest, &old).await;
    let proxy = proxy.restart().await;
    pulls_as_ctr(&proxy, "library/demo", "latest", &new).await;
    pulls_as_ctr(&proxy, "library/demo", &old.digest, &old).await;
    let never = proxy.setup().clone().default_keys("policy = \"never\"");
    let proxy = proxy.restart_as(never).await;
    pulls_as_ctr(&proxy, "library/demo", &old.digest, &old).await;
}
