//! Denials (401, 403) in unusual places. Each revokes the client's grant.

use crate::proxy::{Ask, Proxy, blob_path, manifest_path};
use crate::registry::{Image, Scripted, Seen, Upstream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

fn alice(ask: Ask) -> Ask {
    ask.basic("alice", "secret")
}

/// A private image that alice has pulled.
async fn pulled_by_alice() -> (Upstream, Image, Proxy) {
    let upstream = Upstream::start().await;
    upstream.requires_basic("alice", "secret");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes", "more"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    (upstream, image, proxy)
}

/// In an outage she gets nothing from the cache.
async fn has_no_grant(upstream: &Upstream, proxy: &Proxy, image: &Image) {
    upstream.refuses();
    for path in [
        manifest_path("acme/app", "1"),
        blob_path("acme/app", &image.layer(0).digest),
    ] {
        let reply = alice(proxy.get(&path)).await;
        assert!(
            matches!(reply.status, 401 | 403 | 502..=504),
            "{path}: {reply:#?}"
        );
    }
}

fn is_head(seen: &Seen) -> bool {
    seen.method == "HEAD"
}

fn is_get_of_content(seen: &Seen) -> bool {
    seen.method == "GET" && seen.path.starts_with("/v2/acme/")
}

#[tokio::test]
async fn r02_head_403_stands_where_only_gets_are_limited() {
    for limit in [
        Scripted::too_many(),
        Scripted::too_many().header("retry-after", "30"),
        Scripted::new(503, "{}").header("retry-after", "30"),
        Scripted::new(500, "{}"),
    ] {
        let (upstream, image, proxy) = pulled_by_alice().await;
        upstream.answers(is_head, 403);
        upstream.answers_next(usize::MAX, is_get_of_content, limit);
        for _ in 0..2 {
            alice(proxy.manifest("acme/app", "1")).await.is_refused(403);
        }
        has_no_grant(&upstream, &proxy, &image).await;
    }
}

#[tokio::test]
async fn r02_head_403_with_get_403_toomanyrequests_is_a_limit() {
    let body = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#;
    let (upstream, image, proxy) = pulled_by_alice().await;
    upstream.answers(is_head, 403);
    upstream.answers_next(usize::MAX, is_get_of_content, Scripted::new(403, body));
    for _ in 0..2 {
        alice(proxy.manifest("acme/app", "1"))
            .await
            .is_image(&image)
            .is_stale();
    }
    upstream.refuses();
    proxy.pull_with("acme/app", "1", &image, alice).await.is_stale();
}

#[tokio::test]
async fn r01_denial_of_a_foreign_digest_ends_the_grant() {
    let foreign = format!("blake3:{}", "a".repeat(64));
    for (method, path) in [
        ("GET", manifest_path("acme/app", &foreign)),
        ("HEAD", manifest_path("acme/app", &foreign)),
        ("GET", blob_path("acme/app", &foreign)),
        ("HEAD", blob_path("acme/app", &foreign)),
    ] {
        let (upstream, image, proxy) = pulled_by_alice().await;
        upstream.forbids("acme/app");
        alice(proxy.ask(method, &path)).await.is_refused(403);
        has_no_grant(&upstream, &proxy, &image).await;
    }
}

/// Replaces a folder by a file, so that writes below it fail for every user.
fn made_unwritable(folder: &Path) {
    std::fs::remove_dir_all(folder).unwrap();
    std::fs::write(folder, "").unwrap();
}

#[tokio::test]
async fn r01_denial_of_a_blob_passed_through_ends_the_grant() {
    let (upstream, image, proxy) = pulled_by_alice().await;
    let layer = upstream.push("acme/app", "2", Image::with_layers(&["not cached"]));
    let layer = blob_path("acme/app", &layer.layer(0).digest);
    made_unwritable(&proxy.setup().data().join("ingest"));
    // The blob cannot be stored and is requested once more.
    let gets = AtomicUsize::new(0);
    let is_second = {
        let layer = layer.clone();
        move |seen: &Seen| {
            seen.method == "GET" && seen.path.starts_with(&layer) && gets.fetch_add(1, Ordering::SeqCst) > 0
        }
    };
    let denied = r#"{"errors":[{"code":"DENIED","message":"no"}]}"#;
    upstream.answers_next(usize::MAX, is_second, Scripted::new(403, denied));
    alice(proxy.get(&layer)).await.is_refused(403);
    has_no_grant(&upstream, &proxy, &image).await;
}
