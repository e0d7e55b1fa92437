//! The four pull policies, and the order of rules.

use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream};

async fn under(policy: &str) -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys(&format!("policy = \"{policy}\""))
        .start()
        .await;
    (upstream, proxy, image)
}

#[tokio::test]
async fn always_asks_each_time_and_fetches_only_what_is_new() {
    let (upstream, proxy, image) = under("always").await;
    proxy.pull("library/demo", "latest", &image).await.is_fetched();
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    assert_eq!(
        (upstream.heads("library/demo"), upstream.requests().len()),
        (1, 1)
    );
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    proxy.pull("library/demo", "latest", &new).await.is_fetched();
}

#[tokio::test]
async fn if_newer_is_what_nothing_configured_means() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await.is_fetched();
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    upstream.refuses();
    proxy.pull("library/demo", "latest", &image).await.is_stale();
}

#[tokio::test]
async fn if_not_present_asks_once() {
    let (upstream, proxy, image) = under("if-not-present").await;
    proxy.pull("library/demo", "latest", &image).await.is_fetched();
    upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    upstream.clear_log();

    proxy
        .pull("library/demo", "latest", &image)
        .await
        .is_hit()
        .is_not_stale();
    proxy
        .head(&manifest_path("library/demo", "latest"))
        .await
        .is_image(&image);
    assert_eq!(upstream.requests().len(), 0, "{:#?}", upstream.requests());
}

#[tokio::test]
async fn if_not_present_is_no_way_around_the_right_to_read() {
    let (upstream, proxy, image) = under("if-not-present").await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "*");
    upstream.lets("bob", "b-secret", "bob/own");
    proxy
        .pull_with("library/demo", "latest", &image, |ask| {
            ask.basic("alice", "a-secret")
        })
        .await;

    proxy
        .manifest("library/demo", "latest")
        .basic("bob", "b-secret")
        .await
        .is_refused(401);
    proxy.manifest("library/demo", "latest").await.is_refused(401);
    upstream.refuses();
    let reply = proxy
        .manifest("library/demo", "latest")
        .basic("bob", "b-secret")
        .await;
    reply.is_refused(reply.status);
}

#[tokio::test]
async fn never_serves_what_is_held_and_asks_nobody() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.push("library/demo", "other", Image::with_layers(&["two"]));
    let setup = Setup::over(&upstream);
    let proxy = setup.clone().start().await;
    proxy.pull("library/demo", "latest", &image).await;
    let proxy = proxy.restart_as(setup.default_keys("policy = \"never\"")).await;
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await.is_hit();
    proxy.manifest("library/demo", "other").await.is_refused(404);
    proxy
        .blob("library/demo", &crate::registry::sha256(b"not held"))
        .await
        .is_refused(404);
    assert_eq!((upstream.requests().len(), upstream.connections()), (0, 0));
}

#[tokio::test]
async fn the_first_rule_that_matches_applies() {
    let upstream = Upstream::start().await;
    let pinned = upstream.push("acme/app", "v1", Image::with_layers(&["pinned"]));
    let nightly = upstream.push("acme/app", "nightly-1", Image::with_layers(&["nightly"]));
    let rules = r#"
        [[rule]]
        images = ["docker.io/acme/*:nightly-*"]
        policy = "always"
        [[rule]]
        images = ["docker.io/acme/*"]
        policy = "if-not-present"
    "#;
    let proxy = Setup::over(&upstream).tail(rules).start().await;
    proxy.pull("acme/app", "v1", &pinned).await;
    proxy.pull("acme/app", "nightly-1", &nightly).await;
    upstream.moves("acme/app", "v1", Image::with_layers(&["moved"]));
    upstream.refuses();

    proxy
        .pull("acme/app", "v1", &pinned)
        .await
        .is_hit()
        .is_not_stale();
    proxy.manifest("acme/app", "nightly-1").await.is_unreachable();
}

#[tokio::test]
async fn each_upstream_may_have_its_own_policy() {
    let hub = Upstream::start().await;
    let other = Upstream::start().await;
    let ours = hub.push("library/demo", "1", Image::with_layers(&["hub"]));
    let theirs = other.push("team/demo", "1", Image::with_layers(&["other"]));
    let setup = Setup::over(&hub)
        .also("ghcr.io", &other)
        .upstream_keys("ghcr.io", "policy = \"if-not-present\"");
    let proxy = setup.start().await;
    proxy.pull("library/demo", "1", &ours).await;
    proxy.pull("ghcr.io/team/demo", "1", &theirs).await;
    hub.clear_log();
    other.clear_log();

    proxy.pull("library/demo", "1", &ours).await.is_unchanged();
    proxy.pull("ghcr.io/team/demo", "1", &theirs).await.is_hit();
    assert_eq!((hub.requests().len(), other.requests().len()), (1, 0));
}
