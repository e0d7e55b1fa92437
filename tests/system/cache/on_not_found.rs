//! 404 of the upstream, under `on_not_found`.

use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream};

#[tokio::test]
async fn a_deleted_tag_is_gone_here_too() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.deletes_tag("library/demo", "latest");

    let reply = proxy.manifest("library/demo", "latest").await;
    assert_eq!(reply.is_refused(404).code(), "MANIFEST_UNKNOWN");
    proxy
        .head(&manifest_path("library/demo", "latest"))
        .await
        .is_refused(404);
    proxy.pull("library/demo", &image.digest, &image).await.is_hit();
}

#[tokio::test]
async fn a_rule_may_keep_what_was_deleted() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("on_not_found = \"serve-stale\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.deletes_tag("library/demo", "latest");

    let reply = proxy.pull("library/demo", "latest", &image).await;
    assert!(
        reply.is_hit().cache_status().contains("retained-deleted"),
        "{reply:#?}"
    );
    proxy.manifest("library/demo", "never-was").await.is_refused(404);
}

#[tokio::test]
async fn a_deleted_tag_does_not_come_back_with_an_outage() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.deletes_tag("library/demo", "latest");
    proxy.manifest("library/demo", "latest").await.is_refused(404);
    upstream.refuses();

    let reply = proxy.manifest("library/demo", "latest").await;
    assert!(matches!(reply.status, 404 | 502..=504), "{reply:#?}");
}

#[tokio::test]
async fn a_blob_that_is_gone_upstream_is_had_only_by_who_has_it() {
    let upstream = Upstream::start().await;
    let held = upstream.push("library/demo", "held", Image::with_layers(&["one"]));
    let missing = upstream.push("library/demo", "missing", Image::with_layers(&["two"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "held", &held).await;
    proxy.manifest("library/demo", "missing").await;
    upstream.deletes_blob("library/demo", &held.layer(0).digest);
    upstream.deletes_blob("library/demo", &missing.layer(0).digest);

    let reply = proxy.blob("library/demo", &held.layer(0).digest).await;
    reply.is_blob(held.layer(0)).is_hit();
    let reply = proxy.blob("library/demo", &missing.layer(0).digest).await;
    assert_eq!(reply.is_refused(404).code(), "BLOB_UNKNOWN");
}
