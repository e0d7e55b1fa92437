//! Completeness: a manifest is served only if its config and layers are cached or available now. Otherwise the last
//! complete image is served, or an error that lets the client try its next registry.

use crate::proxy::{Proxy, manifest_path};
use crate::registry::{Image, Upstream};

const DEMO: &str = "library/demo";

/// A completely pulled image, and a second one that the tag names now.
async fn moved() -> (Upstream, Proxy, Image, Image) {
    let upstream = Upstream::start().await;
    let old = upstream.push(DEMO, "latest", Image::with_layers(&["base", "one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull(DEMO, "latest", &old).await;
    let new = upstream.moves(DEMO, "latest", Image::with_layers(&["base", "two"]));
    upstream.clear_log();
    (upstream, proxy, old, new)
}

/// Requests the tag by HEAD and GET and expects this image, for this reason.
async fn serves(proxy: &Proxy, image: &Image, detail: &str) {
    for reply in [
        proxy.head(&manifest_path(DEMO, "latest")).await,
        proxy.manifest(DEMO, "latest").await,
    ] {
        reply.is_image(image);
        assert!(reply.cache_status().contains(detail), "{detail}: {reply:#?}");
    }
}

#[tokio::test]
async fn row_14_manifest_without_layers_is_not_served_in_outage() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    upstream.refuses();

    for reply in [
        proxy.head(&manifest_path(DEMO, "latest")).await,
        proxy.manifest(DEMO, "latest").await,
    ] {
        reply.is_unreachable();
        assert!(reply.cache_status().contains("detail=incomplete"), "{reply:#?}");
    }
    // By digest there is no fallback, and the client requests only the parts it needs.
    proxy.manifest(DEMO, &image.digest).await.is_image(&image);
    let message = proxy.manifest(DEMO, "latest").await.message();
    assert!(
        message.contains("docker.io") && message.contains("is incomplete"),
        "{message}"
    );
    upstream.recovers();
    proxy
        .until(
            "the upstream to be asked again",
            |proxy| proxy.manifest(DEMO, "latest"),
            |reply| reply.status == 200,
        )
        .await
        .is_image(&image);
}

#[tokio::test]
async fn newer_image_missing_layer_serves_last_complete() {
    let (upstream, proxy, old, new) = moved().await;
    upstream.deletes_blob(DEMO, &new.layer(1).digest);

    serves(&proxy, &old, "-status").await;
    let reply = proxy.pull(DEMO, "latest", &old).await;
    let warning = reply.header("warning").expect("the client is told");
    assert!(
        warning.contains("last complete") && warning.contains("responded with status 404"),
        "{warning}"
    );

    upstream.moves(DEMO, "latest", new.clone());
    proxy.pull(DEMO, "latest", &new).await.is_not_stale();
    proxy.pull(DEMO, "latest", &new).await.is_unchanged();
}

#[tokio::test]
async fn interrupted_newer_image_leaves_last_complete_for_outage() {
    let (upstream, proxy, old, new) = moved().await;
    // The new manifest is served, because the upstream has the missing layers. Then the upstream fails before they
    // are requested.
    serves(&proxy, &new, "ifnewer").await;
    upstream.refuses();

    serves(&proxy, &old, "detail=previous-complete-connection-refused").await;
    proxy.pull(DEMO, "latest", &old).await;
    let proxy = proxy.restart().await;
    serves(&proxy, &old, "detail=previous-complete").await;
    proxy.manifest(DEMO, &new.digest).await.is_image(&new);
    let never = proxy.setup().clone().default_keys("policy = \"never\"");
    let proxy = proxy.restart_as(never).await;
    serves(&proxy, &old, "detail=previous-complete").await;
}

#[tokio::test]
async fn once_the_newer_image_is_whole_the_earlier_one_is_forgotten() {
    let (upstream, proxy, old, new) = moved().await;
    proxy.pull(DEMO, "latest", &new).await;
    proxy.manifest(DEMO, "latest").await.is_unchanged();
    upstream.refuses();
    proxy.pull(DEMO, "latest", &new).await.is_stale();
    // By digest it is still served.
    proxy.pull(DEMO, &old.digest, &old).await.is_hit();
}

#[tokio::test]
async fn newer_image_losing_layers_is_not_confirmed() {
    let (upstream, proxy, old, new) = moved().await;
    serves(&proxy, &new, "ifnewer").await;
    // A restart forgets the recent layer probe.
    let proxy = proxy.restart().await;
    upstream.deletes_blob(DEMO, &new.layer(1).digest);
    serves(&proxy, &old, "detail=previous-complete-http-status").await;
}

#[tokio::test]
async fn layer_probe_asks_once_for_missing_layers_only() {
    let (upstream, proxy, _, new) = moved().await;
    for _ in 0..3 {
        proxy.manifest(DEMO, "latest").await.is_image(&new);
    }
    let asked = |digest: &str| {
        let requests = upstream.requests();
        requests.iter().filter(|seen| seen.path.ends_with(digest)).count()
    };
    assert_eq!(asked(&new.layer(0).digest), 0, "the base layer is held");
    assert_eq!(asked(&new.layer(1).digest), 1);
    assert_eq!(upstream.manifest_gets(DEMO), 1);
}

#[tokio::test]
async fn an_image_that_is_arriving_counts_as_whole() {
    const LAYER: usize = 1024 * 1024;
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::of_noise(1, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest(DEMO, "latest").await;
    let config = &image.blobs[0];
    proxy.blob(DEMO, &config.digest).await.is_blob(config);
    let gate = upstream.holds_blob(&image.layer(0).digest, LAYER / 2);
    let mut layer = proxy.blob(DEMO, &image.layer(0).digest).stream().await;
    gate.reached().await;
    upstream.clear_log();

    proxy
        .manifest(DEMO, &image.digest)
        .await
        .is_image(&image)
        .is_hit();
    assert_eq!(upstream.requests().len(), 0, "it is not asked about");
    gate.release();
    assert!(layer.rest().await.unwrap() == image.layer(0).bytes);
}

/// An index of two platforms, one of them pulled, and a newer index of the same two.
async fn moved_index() -> (Upstream, Proxy, Image, Image) {
    let upstream = Upstream::start().await;
    let images =
        |version: &str| ["amd", "arm"].map(|arch| Image::with_layers(&[format!("{arch} {version}")]));
    let old = upstream.push(DEMO, "latest", Image::index(&images("1")));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull(DEMO, "latest", &old).await;
    let pulled = &old.children[0];
    proxy.pull(DEMO, &pulled.digest, pulled).await;
    let new = upstream.moves(DEMO, "latest", Image::index(&images("2")));
    (upstream, proxy, old, new)
}

#[tokio::test]
async fn newer_index_waits_for_platform_in_use() {
    let (upstream, proxy, old, new) = moved_index().await;
    upstream.deletes_blob(DEMO, &new.children[0].layer(0).digest);
    serves(&proxy, &old, "-status").await;
    proxy.pull(DEMO, &old.children[0].digest, &old.children[0]).await;
}

#[tokio::test]
async fn newer_index_ignores_missing_unused_platform() {
    let (upstream, proxy, _, new) = moved_index().await;
    upstream.deletes_blob(DEMO, &new.children[1].layer(0).digest);
    serves(&proxy, &new, "ifnewer").await;
    proxy.pull(DEMO, &new.children[0].digest, &new.children[0]).await;
}

#[tokio::test]
async fn a_stranger_does_not_learn_that_a_part_is_held() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let alice = |tag: &str| proxy.manifest("acme/app", tag).basic("alice", "a-secret");
    alice("1").await.is_image(&image);
    upstream.refuses();

    let stranger = |tag: &str| proxy.manifest("acme/app", tag).basic("eve", "e-secret");
    let (held, unknown) = (stranger("1").await, stranger("2").await);
    assert!(
        alice("1")
            .await
            .is_unreachable()
            .cache_status()
            .contains("incomplete")
    );
    assert_eq!(held.status, unknown.status);
    assert_eq!(held.message().replace(":1", ":2"), unknown.message());
}
