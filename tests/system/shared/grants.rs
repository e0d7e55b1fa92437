//! Grant records: two caches with one key and a bucket, and clients of a private repository.

use std::os::unix::fs::PermissionsExt;

use super::bucket::{Bucket, Mode};
use super::{DEMO, digests, metric};
use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Image, Upstream};

const WAITING: &str = "ifnewer_shared_revocations_waiting";

fn with_keys(bucket: &Bucket, upstream: &Upstream, keys: &str) -> Setup {
    on_bucket(bucket, Setup::over(upstream), keys)
}

fn on_bucket(bucket: &Bucket, setup: Setup, keys: &str) -> Setup {
    let key = setup.file("records.key", &"5".repeat(64));
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
    bucket.behind_with(setup, &format!("key_file = {key:?}\n{keys}"))
}

async fn cache(bucket: &Bucket, upstream: &Upstream) -> Proxy {
    with_keys(bucket, upstream, "grants = true").start().await
}

fn alice(ask: Ask) -> Ask {
    ask.basic("alice", "a-secret")
}

fn bob(ask: Ask) -> Ask {
    ask.basic("bob", "b-secret")
}

fn guesses(ask: Ask) -> Ask {
    ask.basic("alice", "guessed")
}

fn shows_nothing(ask: Ask) -> Ask {
    ask
}

/// A private image that Alice has pulled through one cache, which has recorded that. Bob has an account without access.
async fn private() -> (Upstream, Bucket, Image, Proxy) {
    let (upstream, bucket) = (Upstream::start().await, Bucket::start().await);
    // A clock that rests would move denials after a restart into the past.
    bucket.set_clock_right();
    upstream.requires_basic("root", "r-secret");
    upstream.lets("alice", "a-secret", DEMO);
    upstream.lets("bob", "b-secret", "bob/own");
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["private", "more"]));
    let first = cache(&bucket, &upstream).await;
    first.pull_with(DEMO, "latest", &image, alice).await;
    bucket.has(digests(&image)).await;
    bucket
        .until("records", |bucket| {
            ["tag", "content", "grant"].map(|class| bucket.records(class).len()) == [1, 1, 1]
        })
        .await;
    (upstream, bucket, image, first)
}

async fn is_refused_everything(cache: &Proxy, image: &Image, client: fn(Ask) -> Ask) {
    let tag = client(cache.manifest(DEMO, "latest")).await;
    assert!(tag.status >= 400, "{tag:#?}");
    for digest in digests(image) {
        let replies = [
            client(cache.manifest(DEMO, digest)).await,
            client(cache.blob(DEMO, digest)).await,
        ];
        for reply in replies {
            assert!(reply.status >= 400, "{reply:#?}");
        }
    }
}

#[tokio::test]
async fn born_cache_serves_a_private_image_by_its_record() {
    let (upstream, bucket, image, _first) = private().await;
    bucket.pass(3600);
    upstream.refuses();
    let second = cache(&bucket, &upstream).await;
    for client in [bob, guesses, shows_nothing] {
        is_refused_everything(&second, &image, client).await;
    }
    second.pull_with(DEMO, "latest", &image, alice).await.is_stale();
    // By digest, and from the disk.
    alice(second.manifest(DEMO, &image.digest)).await.is_image(&image);
    second.pull_with(DEMO, "latest", &image, alice).await.is_stale();
    for client in [bob, guesses, shows_nothing] {
        is_refused_everything(&second, &image, client).await;
    }
    // The same credential in another spelling.
    let spelled = "basic YWxpY2U6YS1zZWNyZXQ=";
    let reply = second.manifest(DEMO, "latest").header("authorization", spelled);
    reply.await.is_image(&image);
}

#[tokio::test]
async fn grant_record_needs_the_key_and_reveals_nothing() {
    let (upstream, bucket, image, _first) = private().await;
    for (name, bytes) in bucket.records("grant") {
        let text = format!("{name} {}", String::from_utf8_lossy(&bytes));
        for secret in ["alice", "a-secret", "YWxpY2U6YS1zZWNyZXQ", DEMO, "demo"] {
            assert!(!text.contains(secret), "{text}");
        }
    }
    upstream.refuses();
    let setup = Setup::over(&upstream);
    let key = setup.file("records.key", &"6".repeat(64));
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
    let keys = format!("key_file = {key:?}\ngrants = true");
    let foreign = bucket.behind_with(setup, &keys).start().await;
    is_refused_everything(&foreign, &image, alice).await;
}

#[tokio::test]
async fn without_grants_nothing_is_written_or_read() {
    let (upstream, bucket, image, _first) = private().await;
    let other = with_keys(&bucket, &upstream, "").start().await;
    bucket.forget_asked();
    other.pull_with(DEMO, "latest", &image, alice).await;
    upstream.revokes("alice");
    assert_eq!(alice(other.manifest(DEMO, "latest")).await.status, 403);
    upstream.refuses();
    let born = with_keys(&bucket, &upstream, "").start().await;
    is_refused_everything(&born, &image, alice).await;
    let asked = bucket.asked();
    assert!(!asked.is_empty());
    let of_grants = asked
        .iter()
        .filter(|asked| asked.object.contains("records/grant"));
    assert_eq!(of_grants.count(), 0, "{asked:?}");
}

#[tokio::test]
async fn grant_by_a_record_ends_with_the_outage() {
    let (upstream, bucket, image, _first) = private().await;
    upstream.refuses();
    let second = cache(&bucket, &upstream).await;
    second.pull_with(DEMO, "latest", &image, alice).await.is_stale();
    upstream.revokes("alice");
    upstream.recovers();
    let asking = |second: &Proxy| alice(second.manifest(DEMO, "latest"));
    second
        .until("the end of the outage", asking, |reply| reply.status == 403)
        .await;
    is_refused_everything(&second, &image, alice).await;
    // The denial ended the record too.
    upstream.refuses();
    let third = cache(&bucket, &upstream).await;
    is_refused_everything(&third, &image, alice).await;
}

#[tokio::test]
async fn grant_record_counts_for_grant_ttl_offline() {
    let (upstream, bucket, image, _first) = private().await;
    upstream.refuses();
    bucket.pass(13 * 3600);
    let second = cache(&bucket, &upstream).await;
    is_refused_everything(&second, &image, alice).await;
}

#[tokio::test]
async fn denial_elsewhere_ends_a_grant_of_this_cache() {
    let (upstream, bucket, image, first) = private().await;
    let second = cache(&bucket, &upstream).await;
    second.pull_with(DEMO, "latest", &image, alice).await;
    upstream.revokes("alice");
    let granted = bucket.records("grant");
    assert_eq!(alice(first.manifest(DEMO, "latest")).await.status, 403);
    assert_ne!(bucket.records("grant"), granted, "recorded before the response");
    upstream.refuses();
    is_refused_everything(&second, &image, alice).await;
    assert_eq!(metric(&first, WAITING).await, "0");
}

#[tokio::test]
async fn denial_at_a_cache_without_the_grant_ends_the_record() {
    let (upstream, bucket, image, _first) = private().await;
    upstream.revokes("alice");
    let other = cache(&bucket, &upstream).await;
    assert_eq!(alice(other.manifest(DEMO, "latest")).await.status, 403);
    upstream.refuses();
    let born = cache(&bucket, &upstream).await;
    is_refused_everything(&born, &image, alice).await;
}

#[tokio::test]
async fn wrong_passwords_create_no_records() {
    let (_upstream, bucket, image, first) = private().await;
    for client in [bob, guesses] {
        is_refused_everything(&first, &image, client).await;
    }
    assert_eq!(bucket.records("grant").len(), 1);
    first.pull_with(DEMO, "latest", &image, alice).await;
}

/// A denial that the bucket did not accept. The cache is still running.
async fn waiting_denial() -> (Upstream, Bucket, Image, Proxy) {
    let (upstream, bucket, image, first) = private().await;
    upstream.revokes("alice");
    bucket.set(Mode::ReadOnly);
    assert_eq!(alice(first.manifest(DEMO, "latest")).await.status, 403);
    assert_eq!(metric(&first, WAITING).await, "1");
    let storage = first.admin("/api/v1/shared").await.json()["storage"].clone();
    let waiting = &storage["revocations_waiting"];
    assert_eq!(waiting["count"], 1, "{storage}");
    assert!(waiting["oldest_seconds"].as_u64().unwrap() < 60, "{storage}");
    let page = String::from_utf8(first.admin("/").await.body.to_vec()).unwrap();
    assert!(
        page.contains("1 denials not in the bucket, the oldest for"),
        "{page}"
    );
    (upstream, bucket, image, first)
}

async fn is_delivered(upstream: &Upstream, bucket: &Bucket, image: &Image, first: &Proxy) {
    let is_empty =
        |reply: &crate::proxy::Reply| String::from_utf8_lossy(&reply.body).contains(&format!("{WAITING} 0"));
    first
        .until("the denial", |first| first.admin("/metrics"), is_empty)
        .await;
    let storage = first.admin("/api/v1/shared").await.json()["storage"].clone();
    assert_eq!(storage["revocations_waiting"], serde_json::Value::Null);
    upstream.refuses();
    let born = cache(bucket, upstream).await;
    is_refused_everything(&born, image, alice).await;
}

#[tokio::test]
async fn waiting_denial_survives_a_kill() {
    let (upstream, bucket, image, first) = waiting_denial().await;
    let first = first.crash().await;
    first
        .until(
            "the list",
            |first| first.admin("/metrics"),
            |reply| String::from_utf8_lossy(&reply.body).contains(&format!("{WAITING} 1")),
        )
        .await;
    bucket.set(Mode::Normal);
    is_delivered(&upstream, &bucket, &image, &first).await;
}

#[tokio::test]
async fn waiting_denial_survives_a_reload() {
    let (upstream, bucket, image, first) = waiting_denial().await;
    let toml = first
        .setup()
        .toml()
        .replace("grants = true", "grants = true\nuploads_max = 2");
    first.setup().file("ifnewer.toml", &toml);
    first.program().reload();
    first.program().says("configuration reloaded").await;
    bucket.set(Mode::Normal);
    is_delivered(&upstream, &bucket, &image, &first).await;
}

#[tokio::test]
async fn account_of_a_local_token_has_a_grant_record() {
    let (upstream, bucket) = (Upstream::start_tls().await, Bucket::start().await);
    upstream.requires_token();
    upstream.lets("alice", "a-secret", DEMO);
    upstream.lets("bob", "b-secret", "bob/own");
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["private"]));
    let start = async || {
        let keys = format!("local_tokens = \"{}/token\"", upstream.url());
        let setup = Setup::over(&upstream).upstream_keys("docker.io", &keys);
        on_bucket(&bucket, setup, "grants = true").start().await
    };
    let token = async |cache: &Proxy, client: fn(Ask) -> Ask| {
        let path = format!("/token?service=scripted&scope=repository:{DEMO}:pull");
        let ask = cache.get(&path).header("host", &upstream.address().to_string());
        let reply = client(ask.unchecked()).await;
        reply.json()["token"].as_str().unwrap().to_owned()
    };
    let first = start().await;
    let hers = token(&first, alice).await;
    first
        .pull_with(DEMO, "latest", &image, |ask| ask.bearer(&hers))
        .await;
    bucket.has(digests(&image)).await;
    bucket
        .until("records", |bucket| {
            ["tag", "content", "grant"].map(|class| bucket.records(class).len()) == [1, 1, 2]
        })
        .await;
    upstream.refuses();
    let second = start().await;
    let hers = token(&second, alice).await;
    assert!(hers.starts_with("ifnewer-local-"), "{hers}");
    let reply = second
        .pull_with(DEMO, "latest", &image, |ask| ask.bearer(&hers))
        .await;
    reply.is_stale();
    for client in [bob, guesses, shows_nothing] {
        let token = token(&second, client).await;
        let reply = second.manifest(DEMO, "latest").bearer(&token).await;
        assert!(reply.status >= 400, "{reply:#?}");
    }
}
