//! Metadata requests do not prefetch layers.

use super::scripts::{APP, CTR_LOCAL, CTR_TRANSFER, KUBELET, RENOVATE_LOOKUP, RESOLVER, SKOPEO_INSPECT};
use super::{attested, registry};
use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream};

/// Number of layer requests for this image.
fn layer_gets(upstream: &Upstream, image: &Image) -> usize {
    let layers = image.blobs[1..].iter();
    layers.map(|layer| upstream.blob_gets(&layer.digest)).sum()
}

async fn are_kept(proxy: &Proxy, image: &Image) {
    for blob in &image.blobs {
        proxy.until_kept(&blob.digest).await;
    }
}

#[tokio::test]
async fn m03_all_platforms_metadata_brings_the_layers_of_one() {
    for script in [&CTR_TRANSFER, &CTR_LOCAL, &KUBELET] {
        let (upstream, index) = registry().await;
        let proxy = Setup::over(&upstream).prefetching().start().await;
        script.pulls(&proxy, "1", &index).await;
        are_kept(&proxy, &index.children[0]).await;
        proxy.has_turned(16).await;
        assert_eq!(layer_gets(&upstream, &index.children[0]), 2, "{}", script.name);
        assert_eq!(layer_gets(&upstream, &index.children[1]), 0, "{}", script.name);
    }
}

#[tokio::test]
async fn m03_who_only_looks_brings_no_layer() {
    for script in [&SKOPEO_INSPECT, &RENOVATE_LOOKUP] {
        let (upstream, index) = registry().await;
        let proxy = Setup::over(&upstream).prefetching().start().await;
        for version in ["1", "2"] {
            let index = if version == "1" {
                index.clone()
            } else {
                upstream.moves(APP, "1", attested(version))
            };
            script.pulls(&proxy, "1", &index).await;
            proxy.has_turned(16).await;
            let fetched: usize = index
                .children
                .iter()
                .map(|child| layer_gets(&upstream, child))
                .sum();
            assert_eq!(fetched, 0, "{}", script.name);
        }
    }
}

#[tokio::test]
async fn m03_the_first_layer_begins_the_others() {
    let (upstream, index) = registry().await;
    let proxy = Setup::over(&upstream).prefetching().start().await;
    let image = &index.children[0];
    proxy.manifest(APP, &image.digest).await.is_image(image);
    proxy
        .head(&format!("/v2/{APP}/blobs/{}", image.layer(0).digest))
        .await;
    proxy.until_kept(&image.config().digest).await;
    proxy.has_turned(16).await;
    assert_eq!(layer_gets(&upstream, image), 0);
    proxy
        .blob(APP, &image.layer(1).digest)
        .await
        .is_blob(image.layer(1));
    are_kept(&proxy, image).await;
    assert_eq!(layer_gets(&upstream, image), 2);
}

#[tokio::test]
async fn m03_a_moved_tag_begins_the_platform_pulled_before() {
    let (upstream, old) = registry().await;
    let proxy = Setup::over(&upstream)
        .prefetching()
        .default_keys("revalidate_timeout = \"20s\"")
        .start()
        .await;
    KUBELET.pulls(&proxy, "1", &old).await;
    are_kept(&proxy, &old.children[0]).await;
    // Its metadata is on disk.
    let proxy = proxy.restart().await;
    let new = upstream.moves(APP, "1", attested("2"));
    let head = proxy.head(&manifest_path(APP, "1")).accept(RESOLVER);
    head.await.is_image(&new);
    are_kept(&proxy, &new.children[0]).await;
    assert_eq!(layer_gets(&upstream, &new.children[1]), 0);
    upstream.refuses();
    KUBELET.pulls(&proxy, "1", &new).await;
}

#[tokio::test]
async fn m03_a_layer_of_two_platforms_tells_neither() {
    let upstream = Upstream::start().await;
    let images = ["amd64", "arm64"].map(|platform| Image::with_layers(&["shared", platform]));
    let index = upstream.push(APP, "1", Image::index(&images));
    let proxy = Setup::over(&upstream).prefetching().start().await;
    for image in &index.children {
        proxy.manifest(APP, &image.digest).await.is_image(image);
    }
    let [amd64, arm64] = &images;
    proxy
        .blob(APP, &amd64.layer(0).digest)
        .await
        .is_blob(amd64.layer(0));
    proxy.has_turned(16).await;
    assert_eq!(upstream.blob_gets(&arm64.layer(1).digest), 0);
    proxy
        .blob(APP, &amd64.layer(1).digest)
        .await
        .is_blob(amd64.layer(1));
    proxy.has_turned(16).await;
    assert_eq!(upstream.blob_gets(&arm64.layer(1).digest), 0);
}
