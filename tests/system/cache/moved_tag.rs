//! Moved tags: the new image is fetched, and shared layers are not transferred again.

use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream};

#[tokio::test]
async fn a_moved_tag_costs_one_head_and_what_is_new() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["base", "one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &old).await;
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["base", "two"]));
    upstream.clear_log();

    let reply = proxy.pull("library/demo", "latest", &new).await;
    assert!(
        reply.is_fetched().cache_status().contains("new-digest"),
        "{reply:#?}"
    );
    assert_eq!(
        (
            upstream.heads("library/demo"),
            upstream.manifest_gets("library/demo")
        ),
        (1, 1)
    );
    assert_eq!(
        upstream.blob_gets(&new.layer(0).digest),
        0,
        "the base layer is held"
    );
    assert_eq!(
        (upstream.blob_gets(&new.layer(1).digest), upstream.all_blob_gets()),
        (1, 2)
    );
    proxy.pull("library/demo", "latest", &new).await.is_unchanged();
}

#[tokio::test]
async fn the_old_image_stays_readable_by_digest() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &old).await;
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    proxy.pull("library/demo", "latest", &new).await;
    upstream.clear_log();

    proxy.pull("library/demo", &old.digest, &old).await.is_hit();
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn a_tag_that_moved_back_costs_one_head() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &old).await;
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    proxy.pull("library/demo", "latest", &new).await;
    upstream.moves("library/demo", "latest", old.clone());
    upstream.clear_log();

    proxy
        .pull("library/demo", "latest", &old)
        .await
        .is_hit()
        .is_not_stale();
    assert_eq!(
        (upstream.heads("library/demo"), upstream.requests().len()),
        (1, 1)
    );
}

#[tokio::test]
async fn a_second_tag_of_a_held_image_costs_no_content() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1.0", Image::with_layers(&["one"]));
    upstream.push("library/demo", "latest", image.clone());
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "1.0", &image).await;
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await;
    assert_eq!(upstream.all_blob_gets(), 0);
}

#[tokio::test]
async fn the_same_layer_in_another_repository_is_fetched_once() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/one", "1", Image::with_layers(&["shared"]));
    upstream.push("library/two", "1", image.clone());
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/one", "1", &image).await;

    proxy.pull("library/two", "1", &image).await;
    assert_eq!(
        upstream.blob_gets(&image.layer(0).digest),
        1,
        "proved by HEAD, not fetched again"
    );
}

#[tokio::test]
async fn fetch_failure_of_newer_image_serves_last_complete() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &old).await;
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    upstream.answers_manifest_gets_with(503);

    let reply = proxy.pull("library/demo", "latest", &old).await;
    assert!(reply.is_hit().header("warning").is_some(), "{reply:#?}");
    upstream.recovers();
    proxy.pull("library/demo", "latest", &new).await;
}

#[tokio::test]
async fn a_head_never_promises_what_a_get_would_not_give() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &old).await;
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    upstream.answers_manifest_gets_with(503);

    let head = proxy.head(&manifest_path("library/demo", "latest")).await;
    let promised = head.header("docker-content-digest").unwrap().to_owned();
    let get = proxy.get(&manifest_path("library/demo", &promised)).await;
    assert_eq!(
        get.status, 200,
        "HEAD promised {promised} (old {}, new {}): {get:#?}",
        old.digest, new.digest
    );
}

#[tokio::test]
async fn a_fresh_tag_is_not_asked_for_even_when_it_moved() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("max_age = \"1h\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &old).await;
    upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));

    proxy.pull("library/demo", "latest", &old).await.is_hit();
}
