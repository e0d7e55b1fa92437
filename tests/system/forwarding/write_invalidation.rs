//! Invalidation by forwarded writes: affected tags are durably marked until the outcome of the write is known.

use crate::proxy::{Ask, Proxy, Setup, manifest_path};
use crate::registry::{Image, Seen, Upstream};

const REPOSITORY: &str = "ghcr.io/team/demo";

/// The tag `1` of the returned image is cached, under a policy without revalidation.
async fn unasked() -> (Upstream, Image, Proxy) {
    let (hub, upstream) = (Upstream::start().await, Upstream::start().await);
    let setup = Setup::over(&hub)
        .also("ghcr.io", &upstream)
        .default_keys("policy = \"if-not-present\"");
    let proxy = setup.start().await;
    let old = upstream.push("team/demo", "1", Image::with_layers(&["old"]));
    proxy.pull(REPOSITORY, "1", &old).await;
    upstream.clear_log();
    let unasked = proxy.pull(REPOSITORY, "1", &old).await;
    assert!(unasked.cache_status().contains("not-revalidated"), "{unasked:#?}");
    assert_eq!(upstream.requests().len(), 0);
    (upstream, old, proxy)
}

fn put(proxy: &Proxy, image: &Image) -> Ask {
    let put = proxy.ask("PUT", &manifest_path("team/demo", "1"));
    put.header("host", "ghcr.io")
        .header("content-type", &image.media_type)
        .body(&image.manifest)
        .unchecked()
}

fn is_put(seen: &Seen) -> bool {
    seen.method == "PUT"
}

#[tokio::test]
async fn kill_9_during_push_does_not_keep_old_tag() {
    let (upstream, old, proxy) = unasked().await;
    let gate = upstream.holds_answers(is_put);
    let pushing = tokio::spawn({
        let push = put(&proxy, &Image::with_layers(&["new"]));
        async move { push.tried().await }
    });
    gate.reached().await;
    let killed = proxy.crash();
    // The registry executed the write, and no process is left to record that.
    let new = upstream.push("team/demo", "1", Image::with_layers(&["new"]));
    let proxy = killed.await;
    drop(pushing);

    // In an outage, the last confirmed image.
    upstream.refuses();
    proxy.pull(REPOSITORY, "1", &old).await.is_stale();
    upstream.recovers();
    let ask = |proxy: &Proxy| proxy.manifest(REPOSITORY, "1");
    proxy
        .until("the new image", ask, |reply| reply.body == new.manifest)
        .await;
}

#[tokio::test]
async fn t16_kill_9_during_a_delete_by_digest_leaves_it_in_doubt() {
    let (upstream, old, proxy) = unasked().await;
    let gate = upstream.holds_answers(|seen| seen.method == "DELETE");
    let path = manifest_path("team/demo", &old.digest);
    let delete = proxy.ask("DELETE", &path).header("host", "ghcr.io").unchecked();
    let deleting = tokio::spawn(async move { delete.tried().await });
    gate.reached().await;
    let killed = proxy.crash();
    upstream.deletes_tag("team/demo", "1");
    let proxy = killed.await;
    drop(deleting);
    upstream.clear_log();
    proxy.manifest(REPOSITORY, "1").await.is_refused(404);
    let by_digest = proxy.manifest(REPOSITORY, &old.digest).await;
    by_digest.is_image(&old);
    assert_eq!(upstream.heads("team/demo"), 2, "each is asked about");
}

#[tokio::test]
async fn t16_client_that_leaves_during_a_push_leaves_the_tag_in_doubt() {
    let (upstream, _old, proxy) = unasked().await;
    let gate = upstream.holds_answers(is_put);
    let new = Image::with_layers(&["new"]);
    upstream.push_untagged("team/demo", new.clone());
    let push = put(&proxy, &new);
    let pushing = tokio::spawn(async move { push.tried().await });
    gate.reached().await;
    pushing.abort();
    upstream.push("team/demo", "1", new.clone());
    let ask = |proxy: &Proxy| proxy.manifest(REPOSITORY, "1");
    ask(&proxy).await.is_image(&new);
}

#[tokio::test]
async fn t16_refused_push_costs_nothing_and_evicts_nothing() {
    let (upstream, old, proxy) = unasked().await;
    for status in [401, 403, 405, 413] {
        upstream.answers(is_put, status);
        assert_eq!(put(&proxy, &old).await.status, status);
    }
    upstream.clear_log();
    let unasked = proxy.pull(REPOSITORY, "1", &old).await;
    assert!(unasked.cache_status().contains("not-revalidated"), "{unasked:#?}");
    assert_eq!(upstream.requests().len(), 0);
}

/// A proxy in between also sends these, for a write that the registry executed.
#[tokio::test]
async fn t16_push_answered_407_408_429_or_499_leaves_the_tag_in_doubt() {
    for status in [407, 408, 429, 499] {
        let (upstream, _old, proxy) = unasked().await;
        let new = upstream.push("team/demo", "1", Image::with_layers(&["new"]));
        upstream.answers(is_put, status);
        assert_eq!(put(&proxy, &new).await.status, status);
        proxy.manifest(REPOSITORY, "1").await.is_image(&new);
    }
}

#[tokio::test]
async fn t16_push_that_reaches_nobody_evicts_nothing_in_an_outage() {
    let (upstream, old, proxy) = unasked().await;
    upstream.refuses();
    let path = manifest_path("team/demo", "1");
    for method in ["PUT", "DELETE"] {
        let ask = proxy.ask(method, &path).header("host", "ghcr.io").unchecked();
        let status = ask.await.status;
        assert!(matches!(status, 502..=504), "{status}");
    }
    let unasked = proxy.pull(REPOSITORY, "1", &old).await;
    assert!(unasked.cache_status().contains("not-revalidated"), "{unasked:#?}");
}

#[tokio::test]
async fn push_of_unknown_outcome_is_revalidated() {
    let (upstream, old, proxy) = unasked().await;
    upstream.answers(is_put, 500);
    assert_eq!(put(&proxy, &old).await.status, 500);
    upstream.clear_log();
    proxy.pull(REPOSITORY, "1", &old).await.is_unchanged();
    assert_eq!(upstream.heads("team/demo"), 1);
    let proxy = proxy.restart().await;
    upstream.refuses();
    proxy.pull(REPOSITORY, "1", &old).await.is_stale();
}

/// A push of the manifest of `image` to this path and query of the registry.
fn put_at(proxy: &Proxy, target: &str, image: &Image) -> Ask {
    let put = proxy.ask("PUT", target).header("host", "ghcr.io");
    put.header("content-type", &image.media_type)
        .body(&image.manifest)
        .unchecked()
}

#[tokio::test]
async fn t16_push_by_digest_with_tag_in_query_serves_the_new_image() {
    for query in ["tag=1", "tag=other&tag=1"] {
        let (upstream, _old, proxy) = unasked().await;
        let new = upstream.push_untagged("team/demo", Image::with_layers(&["new"]));
        let target = format!("{}?{query}", manifest_path("team/demo", &new.digest));
        assert_eq!(put_at(&proxy, &target, &new).await.status, 201, "{query}");
        proxy.pull(REPOSITORY, "1", &new).await;
    }
}

#[tokio::test]
async fn t16_push_by_digest_of_unknown_outcome_doubts_each_tag() {
    let (upstream, old, proxy) = unasked().await;
    upstream.push("team/demo", "2", old.clone());
    proxy.pull(REPOSITORY, "2", &old).await;
    let new = Image::with_layers(&["new"]);
    let target = format!("{}?tag=1&tag=2", manifest_path("team/demo", &new.digest));
    upstream.answers(is_put, 403);
    assert_eq!(put_at(&proxy, &target, &new).await.status, 403);
    upstream.clear_log();
    for tag in ["1", "2"] {
        let unasked = proxy.pull(REPOSITORY, tag, &old).await;
        assert!(unasked.cache_status().contains("not-revalidated"), "{unasked:#?}");
    }
    assert_eq!(upstream.requests().len(), 0, "a refused push changes nothing");

    upstream.answers(is_put, 500);
    assert_eq!(put_at(&proxy, &target, &new).await.status, 500);
    for tag in ["1", "2"] {
        upstream.push("team/demo", tag, new.clone());
        proxy.pull(REPOSITORY, tag, &new).await;
    }
}

#[tokio::test]
async fn t16_push_to_a_tag_in_another_spelling_reaches_no_registry() {
    let (upstream, old, proxy) = unasked().await;
    let new = Image::with_layers(&["new"]);
    for path in [
        "/v2/team/demo/manifests/%31",
        "/v2/team/demo/manifests%2F1",
        "/v2/team/%64emo/manifests/1",
        "/v2/team/demo//manifests/1",
        "/v2/team/demo/manifests/1;x",
        "//v2/team/demo/manifests/1",
        "/V2/team/demo/manifests/1",
    ] {
        for method in ["PUT", "DELETE"] {
            let write = proxy.ask(method, path).header("host", "ghcr.io");
            let reply = write.body(&new.manifest).unchecked().await;
            reply.is_refused(400);
            assert_eq!(reply.code(), "NAME_INVALID", "{method} {path}");
        }
    }
    // A tag that cannot be read: 404 as for a read.
    let reply = put_at(&proxy, "/v2/team/demo/manifests/1/", &new).await;
    assert_eq!((reply.status, reply.code().as_str()), (404, "TAG_INVALID"));
    assert_eq!(upstream.requests().len(), 0);
    proxy.pull(REPOSITORY, "1", &old).await;
}
