//! Caches whose upstream is another cache: what the client learns about both.

use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream};

const REPOSITORY: &str = "library/demo";

fn leading_to(proxy: &Proxy) -> Setup {
    Setup::empty().upstream(
        "docker.io",
        &format!("url = \"http://{}\"", proxy.registry_address()),
    )
}

/// A cache over this registry, and one over that cache.
async fn pair(upstream: &Upstream) -> (Proxy, Proxy) {
    let regional = Proxy::over(upstream).await;
    let sidecar = leading_to(&regional).start().await;
    (regional, sidecar)
}

#[tokio::test]
async fn cache_status_lists_both_caches_in_order() {
    let upstream = Upstream::start().await;
    let image = upstream.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let (regional, sidecar) = pair(&upstream).await;
    let head = sidecar.head(&manifest_path(REPOSITORY, "latest")).await;
    let miss = "ifnewer; fwd=miss; detail=";
    assert_eq!(head.cache_status(), format!("{miss}head, {miss}head"));
    let cold = sidecar.manifest(REPOSITORY, "latest").await;
    cold.is_image(&image);
    assert_eq!(cold.cache_status(), format!("{miss}not-cached, {miss}not-cached"));
    sidecar.pull(REPOSITORY, "latest", &image).await;
    let hit = "ifnewer; hit; detail=";
    let unchanged = sidecar.manifest(REPOSITORY, "latest").await;
    assert_eq!(
        unchanged.cache_status(),
        format!("{hit}revalidated, {hit}revalidated")
    );
    let own = sidecar.manifest(REPOSITORY, &image.digest).await;
    assert_eq!(
        own.cache_status(),
        format!("{hit}immutable"),
        "nobody else was asked"
    );
    drop(regional);
}

#[tokio::test]
async fn stale_copy_of_another_cache_is_marked_as_stale() {
    let upstream = Upstream::start().await;
    let image = upstream.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let (_regional, sidecar) = pair(&upstream).await;
    sidecar.pull(REPOSITORY, "latest", &image).await.is_not_stale();
    upstream.refuses();
    let reply = sidecar.manifest(REPOSITORY, "latest").await;
    reply.is_image(&image).is_stale();
    assert_eq!(
        reply.cache_status(),
        "ifnewer; hit; detail=stale-if-error-connection-refused, ifnewer; hit; detail=revalidated"
    );
}
