//! State over reloads: grants, pushed tags, coalesced lists, the download queue and connections.

use super::connection_limits::{asks, counts, from, is_closed, patient};
use crate::download::queue::until_queued;
use crate::proxy::{Ask, Proxy, Reply, Setup, blob_path, manifest_path};
use crate::registry::{Gate, Image, Seen, Upstream};
use serde_json::json;
use tokio::task::JoinHandle;

const TAGS: &str = "/v2/library/demo/tags/list";

/// Reloads the configuration and waits until it is in effect. Once per process.
pub async fn reload(proxy: &Proxy) {
    proxy.program().reload();
    proxy.program().says("configuration reloaded").await;
}

async fn reload_as(proxy: &Proxy, setup: &Setup) {
    proxy.setup().file("ifnewer.toml", &setup.toml());
    reload(proxy).await;
}

fn alice(ask: Ask) -> Ask {
    ask.basic("alice", "a-secret")
}

fn bob(ask: Ask) -> Ask {
    ask.basic("bob", "b-secret")
}

async fn private() -> (Upstream, Image) {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "bob/own");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes"]));
    upstream.push("acme/app", "2", image.clone());
    (upstream, image)
}

async fn gets_nothing(proxy: &Proxy, image: &Image, dress: fn(Ask) -> Ask) {
    for path in [
        manifest_path("acme/app", "1"),
        manifest_path("acme/app", &image.digest),
        blob_path("acme/app", &image.layer(0).digest),
    ] {
        let reply = dress(proxy.get(&path)).await;
        assert!(
            matches!(reply.status, 401 | 403 | 502..=504),
            "{path}: {reply:#?}"
        );
        reply.is_refused(reply.status);
    }
}

fn is_of_2(seen: &Seen) -> bool {
    seen.path.ends_with("/manifests/2")
}

#[tokio::test]
async fn t01_right_revoked_after_a_reload_stays_revoked_by_a_late_yes() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    let gate = upstream.holds_answers(is_of_2);
    let late = tokio::spawn(alice(proxy.manifest("acme/app", "2")).into_reply());
    gate.reached().await;
    reload(&proxy).await;
    upstream.revokes("alice");
    let denied = alice(proxy.manifest("acme/app", "1")).await;
    denied.is_refused(denied.status);
    // The earlier request gets its response last, with a grant.
    upstream.lets("alice", "a-secret", "acme/app");
    gate.release();
    late.await.unwrap();
    upstream.refuses();
    gets_nothing(&proxy, &image, alice).await;
    let proxy = proxy.restart().await;
    gets_nothing(&proxy, &image, alice).await;
}

#[tokio::test]
async fn t01_slow_question_before_a_reload_brings_no_pushed_tag_back() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let setup = Setup::over(&hub)
        .also("ghcr.io", &other)
        .default_keys("policy = \"if-not-present\"");
    let proxy = setup.start().await;
    let old = other.push("team/demo", "1", Image::with_layers(&["old"]));
    let path = manifest_path("team/demo", "1");
    let gate = other.holds_bodies(|seen| seen.method == "GET" && seen.path.ends_with("/manifests/1"));
    let early = tokio::spawn(proxy.get(&format!("{path}?ns=ghcr.io")).into_reply());
    gate.reached().await;
    reload(&proxy).await;
    let new = Image::with_layers(&["new"]);
    other.push_untagged("team/demo", new.clone());
    let put = proxy.ask("PUT", &path).header("host", "ghcr.io");
    let put = put.header("content-type", &new.media_type).body(&new.manifest);
    assert_eq!(put.unchecked().await.status, 201);
    gate.release();
    assert_eq!(early.await.unwrap().body, old.manifest);
    for _ in 0..2 {
        proxy.pull("ghcr.io/team/demo", "1", &new).await;
    }
    proxy.restart().await.pull("ghcr.io/team/demo", "1", &new).await;
}

#[tokio::test]
async fn t01_retry_after_is_kept_over_a_reload() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "1", &image).await;
    upstream.rate_limits(Some("300"));
    proxy.manifest("library/demo", "1").await.is_stale();
    reload(&proxy).await;
    upstream.recovers();
    upstream.clear_log();
    proxy.manifest("library/demo", "1").await.is_stale();
    assert_eq!(upstream.requests().len(), 0, "{:#?}", upstream.requests());
}

#[tokio::test]
async fn o03_open_breaker_and_tokens_are_kept_over_a_reload() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    let tokens = upstream.token_requests().len();
    reload(&proxy).await;
    let tag = || alice(proxy.manifest("acme/app", "1"));
    tag().await.is_unchanged();
    assert_eq!(upstream.token_requests().len(), tokens, "the token is still good");

    let proxy = proxy.restart().await;
    let tag = || alice(proxy.manifest("acme/app", "1"));
    upstream.refuses();
    for _ in 0..3 {
        tag().await.is_stale();
    }
    assert!(tag().await.cache_status().contains("breaker"));
    reload(&proxy).await;
    assert!(tag().await.cache_status().contains("breaker"));
    let state = proxy.admin("/api/v1/upstreams").await.json();
    assert!(state.to_string().contains("refused"), "{state:#}");
    upstream.recovers();
    proxy
        .until(
            "the probe to find the upstream",
            |_| tag(),
            |reply| reply.cache_status().contains("revalidated"),
        )
        .await;
}

#[tokio::test]
async fn o03_quirk_is_kept_over_a_reload() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    upstream.head_not_allowed();
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "1", &image).await;
    proxy.pull("library/demo", "1", &image).await.is_unchanged();
    reload(&proxy).await;
    upstream.clear_log();
    proxy.pull("library/demo", "1", &image).await.is_unchanged();
    assert_eq!(upstream.heads("library/demo"), 0);
}

#[tokio::test]
async fn o03_yes_under_shared_is_no_clients_grant_once_it_is_proven() {
    let (upstream, image) = private().await;
    let setup = Setup::over(&upstream);
    setup.file("password", "a-secret");
    let keys = format!(
        "auth = \"shared\"\nusername = \"alice\"\npassword_file = {:?}",
        setup.folder().join("password")
    );
    let shared = setup.clone().upstream_keys("docker.io", &keys);
    let proxy = shared.start().await;
    proxy.pull("acme/app", "1", &image).await;
    let gate = upstream.holds_answers(is_of_2);
    let late = tokio::spawn(proxy.manifest("acme/app", "2").into_reply());
    gate.reached().await;
    reload_as(&proxy, &setup).await;
    gate.release();
    late.await.unwrap();
    for dress in [bob, |ask| ask] {
        gets_nothing(&proxy, &image, dress).await;
    }
    upstream.refuses();
    for dress in [alice, bob, |ask| ask] {
        gets_nothing(&proxy, &image, dress).await;
    }
}

#[tokio::test]
async fn o03_upstream_removed_and_added_again_keeps_its_denials() {
    let (upstream, image) = private().await;
    let hub = Upstream::start().await;
    let setup = Setup::over(&hub).also("reg.test", &upstream);
    let proxy = setup.clone().start().await;
    let path = |tag: &str| format!("{}?ns=reg.test", manifest_path("acme/app", tag));
    alice(proxy.get(&path("1"))).await.is_image(&image);
    let is_known = |status| matches!(status, 200 | 401 | 403);
    let gate = upstream.holds_answers(is_of_2);
    let late = tokio::spawn(alice(proxy.get(&path("2"))).into_reply());
    gate.reached().await;
    upstream.revokes("alice");
    let denied = alice(proxy.get(&path("1"))).await;
    denied.is_refused(denied.status);
    reload_as(&proxy, &setup.clone().without("reg.test")).await;
    let gone = |proxy: &Proxy| alice(proxy.get(&path("1"))).unchecked();
    proxy
        .until("it to be gone", gone, |reply| !is_known(reply.status))
        .await;
    proxy.setup().file("ifnewer.toml", &setup.toml());
    proxy.program().reload();
    let back = |proxy: &Proxy| alice(proxy.get(&path("1"))).unchecked();
    proxy
        .until("it to be back", back, |reply| is_known(reply.status))
        .await;
    upstream.lets("alice", "a-secret", "acme/app");
    gate.release();
    late.await.unwrap();
    upstream.refuses();
    let reply = alice(proxy.get(&path("1"))).await;
    assert_ne!(reply.status, 200, "{reply:#?}");
}

#[tokio::test]
async fn list_in_flight_over_a_reload_is_kept_for_an_outage() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    // A list is kept for principals with a grant.
    proxy.manifest("library/demo", "1").await;
    let gate = upstream.holds_answers(|seen| seen.path.ends_with("/tags/list"));
    let early = tokio::spawn(proxy.get(TAGS).into_reply());
    gate.reached().await;
    reload(&proxy).await;
    let late = tokio::spawn(proxy.get(TAGS).into_reply());
    gate.release();
    for reply in [early.await.unwrap(), late.await.unwrap()] {
        assert_eq!((reply.status, reply.json()["tags"].clone()), (200, json!(["1"])));
    }
    upstream.refuses();
    let kept = proxy.get(TAGS).await;
    assert_eq!(kept.json()["tags"], json!(["1"]), "{kept:#?}");
}

#[tokio::test]
async fn list_revoked_after_a_reload_stays_revoked_by_a_late_list() {
    let (upstream, image) = private().await;
    let proxy = Proxy::over(&upstream).await;
    proxy.pull_with("acme/app", "1", &image, alice).await;
    let path = "/v2/acme/app/tags/list";
    let gate = upstream.holds_answers(|seen| seen.path.ends_with("/tags/list"));
    let late = tokio::spawn(alice(proxy.get(path)).into_reply());
    gate.reached().await;
    reload(&proxy).await;
    upstream.revokes("alice");
    let denied = alice(proxy.manifest("acme/app", "1")).await;
    denied.is_refused(denied.status);
    gate.release();
    late.await.unwrap();
    upstream.refuses();
    for dress in [alice, bob, |ask| ask] {
        let reply = dress(proxy.get(path)).await;
        reply.is_refused(reply.status);
    }
}

/// A cache that downloads one blob at a time, and a gate at which the upstream holds the blobs of an image.
async fn one_at_a_time() -> (Upstream, Image, Proxy, Gate) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one", "two", "three"]));
    let limits = "[limits]\ndownloads_per_upstream_max = 1\n";
    let proxy = Setup::over(&upstream).tail(limits).start().await;
    proxy.manifest("library/demo", "1").await.is_image(&image);
    let gate = upstream.holds_bodies(|seen| seen.path.contains("/blobs/"));
    (upstream, image, proxy, gate)
}

fn get_layer(proxy: &Proxy, image: &Image, number: usize) -> JoinHandle<Reply> {
    tokio::spawn(
        proxy
            .blob("library/demo", &image.layer(number).digest)
            .into_reply(),
    )
}

#[tokio::test]
async fn queued_download_keeps_its_turn_over_a_reload() {
    let (upstream, image, proxy, gate) = one_at_a_time().await;
    let first = get_layer(&proxy, &image, 0);
    gate.reached().await;
    let second = get_layer(&proxy, &image, 1);
    until_queued(&proxy, 1).await;
    reload(&proxy).await;
    let third = get_layer(&proxy, &image, 2);
    until_queued(&proxy, 2).await;
    assert_eq!(upstream.all_blob_gets(), 1, "the reload gave no second place");
    gate.release();
    for (number, reply) in [first, second, third].into_iter().enumerate() {
        reply.await.unwrap().is_blob(image.layer(number));
    }
    let seen = upstream.requests();
    let order = |number: usize| {
        seen.iter()
            .position(|seen| seen.path.ends_with(&image.layer(number).digest))
    };
    assert!(order(0) < order(1) && order(1) < order(2), "{seen:#?}");
}

#[tokio::test]
async fn raised_limit_starts_queued_downloads_at_reload() {
    let (_upstream, image, proxy, gate) = one_at_a_time().await;
    let replies = [0, 1, 2].map(|number| get_layer(&proxy, &image, number));
    gate.reached().await;
    until_queued(&proxy, 2).await;
    let toml = proxy.setup().toml();
    let raised = toml.replace("downloads_per_upstream_max = 1", "downloads_per_upstream_max = 3");
    proxy.setup().file("ifnewer.toml", &raised);
    reload(&proxy).await;
    gate.reached_by(3).await;
    gate.release();
    for (number, reply) in replies.into_iter().enumerate() {
        reply.await.unwrap().is_blob(image.layer(number));
    }
}

#[tokio::test]
async fn connections_are_counted_over_a_reload() {
    let limits = "connections_max = 3\nconnections_per_peer_max = 3";
    let (_upstream, proxy, _image) = patient(limits, "").await;
    let address = proxy.registry_address();
    let mut open = Vec::new();
    for last in 1..4 {
        let mut stream = from(last, address).await;
        assert!(asks(&mut stream, "").await.starts_with("HTTP/1.1 200 "));
        open.push(stream);
    }
    reload(&proxy).await;
    let mut newcomer = from(4, address).await;
    assert!(asks(&mut newcomer, "").await.starts_with("HTTP/1.1 200 "));
    // The one that has been idle for longest, as without a reload.
    is_closed(&mut open[0]).await;
    for stream in &mut open[1..] {
        assert!(asks(stream, "").await.starts_with("HTTP/1.1 200 "));
    }
    let open = "ifnewer_connections{listener=\"registry\",state=\"open\"} 3";
    counts(&proxy, open).await;
}
