//! Rate limits (429): limited requests are delayed and retried, later ones are paced, and no grant is revoked.

use crate::proxy::{Proxy, Setup, blob_path, manifest_path};
use crate::registry::{Image, Scripted, Seen, Upstream};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// The first pause without `Retry-After`.
const PAUSE: Duration = Duration::from_secs(1);
/// Response header timeout of dockerd and containerd.
const CLIENTS_WAIT: Duration = Duration::from_secs(30);

fn any(_: &Seen) -> bool {
    true
}

fn blob_get(seen: &Seen) -> bool {
    seen.method == "GET" && seen.path.contains("/blobs/")
}

fn manifest(seen: &Seen) -> bool {
    seen.path.contains("/manifests/")
}

#[tokio::test]
async fn r02_one_429_without_retry_after_costs_a_second() {
    for (name, limited, paused) in [
        ("manifest", manifest as fn(&Seen) -> bool, true),
        ("blob", blob_get, true),
        ("list", |seen| seen.path.ends_with("/tags/list"), true),
        ("token", |seen| seen.path == "/token", true),
        ("nothing", |_| false, false),
    ] {
        let upstream = Upstream::start().await;
        upstream.requires_token();
        upstream.makes_public("library/demo");
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
        upstream.answers_next(1, limited, Scripted::too_many());
        let proxy = Proxy::over(&upstream).await;

        let began = Instant::now();
        proxy.pull("library/demo", "latest", &image).await;
        let tags = proxy.get("/v2/library/demo/tags/list").await;
        assert_eq!(tags.status, 200, "{name}: {tags:#?}");
        let took = began.elapsed();
        assert_eq!(took >= PAUSE, paused, "{name}: {took:?}");
        assert!(took < CLIENTS_WAIT / 2, "{name}: {took:?}");
    }
}

#[tokio::test]
async fn r02_twenty_layers_come_at_five_requests_a_second() {
    let upstream = Upstream::start().await;
    let layers: Vec<String> = (0..20).map(|n| format!("layer {n}")).collect();
    let image = upstream.push("library/demo", "latest", Image::with_layers(&layers));
    upstream.allows_each_second(5, blob_get, Scripted::too_many());
    let proxy = Proxy::over(&upstream).await;

    let began = Instant::now();
    proxy.manifest("library/demo", "latest").await.is_image(&image);
    let mut clients = JoinSet::new();
    for blob in image.blobs.clone() {
        let ask = proxy.blob("library/demo", &blob.digest);
        clients.spawn(async move {
            ask.await.is_blob(&blob);
        });
    }
    clients.join_all().await;
    // A direct client that pauses for a second takes 4 s.
    let took = began.elapsed();
    assert!(took < Duration::from_secs(12), "{took:?}");
    // 21 successful requests and the first burst. After each pause few more are sent than allowed.
    let gets = upstream.all_blob_gets();
    assert!((21..=60).contains(&gets), "{gets} requests for 21 blobs");
}

#[tokio::test]
async fn r02_retry_after_is_understood_in_fractions_units_and_text() {
    let ghcr =
        r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"retry-after: 1.5s, allowed: 44000/minute"}]}"#;
    let dated = Scripted::too_many()
        .header("date", "Sun, 06 Nov 1994 08:49:37 GMT")
        .header("retry-after", "Sun, 06 Nov 1994 08:49:39 GMT");
    for (response, at_least, at_most) in [
        (Scripted::too_many().header("retry-after", "0.3"), 300, 900),
        (Scripted::too_many().header("retry-after", "400ms"), 400, 1000),
        (Scripted::too_many().header("retry-after", "2"), 2000, 6000),
        (Scripted::new(429, ghcr), 1500, 6000),
        (dated, 2000, 6000),
    ] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        upstream.answers_next(1, blob_get, response.clone());
        let proxy = Proxy::over(&upstream).await;
        let layer = image.layer(0);
        let began = Instant::now();
        proxy.blob("library/demo", &layer.digest).await.is_blob(layer);
        let took = began.elapsed().as_millis();
        assert!(took >= at_least, "{response:?}: {took} ms");
        assert!(took < at_most + 3000, "{response:?}: {took} ms");
    }
}

#[tokio::test]
async fn r02_a_wait_beyond_the_clients_patience_is_passed_on() {
    for (stated, told) in [("45", 45), ("315360000", 3600), ("99999999999999999999", 3600)] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        upstream.rate_limits(Some(stated));
        let proxy = Proxy::over(&upstream).await;
        for path in [
            manifest_path("library/demo", "latest"),
            blob_path("library/demo", &image.layer(0).digest),
            "/v2/library/demo/tags/list".to_owned(),
        ] {
            let reply = proxy.get(&path).await;
            assert_eq!(reply.is_refused(429).code(), "TOOMANYREQUESTS");
            let after: u64 = reply.header("retry-after").unwrap().parse().unwrap();
            assert!((told - 40..=told).contains(&after), "{stated}: {after}");
        }
    }
}

#[tokio::test]
async fn r02_a_limit_that_goes_on_ends_before_clients_give_up() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.rate_limits(None);
    let proxy = Proxy::over(&upstream).await;
    let began = Instant::now();
    let reply = proxy.manifest("library/demo", "latest").await;
    reply.is_refused(429);
    assert!(began.elapsed() < CLIENTS_WAIT, "{:?}", began.elapsed());
    // Pauses of 1, 2, 4 and 8 s. The next one exceeds the client's timeout.
    let asked = upstream.manifest_gets("library/demo");
    assert!((3..=5).contains(&asked), "{asked}");
    let after: u64 = reply.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=16).contains(&after), "{after}");
}

#[tokio::test]
async fn r02_a_cached_tag_does_not_wait_for_a_limit() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.rate_limits(Some("5"));
    let began = Instant::now();
    for _ in 0..5 {
        proxy.pull("library/demo", "latest", &image).await.is_stale();
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(upstream.heads("library/demo"), 1, "{:#?}", upstream.requests());
}

#[tokio::test]
async fn r02_a_503_with_retry_after_is_waited_out() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let busy = Scripted::new(503, "{}").header("retry-after", "1");
    upstream.answers_next(1, blob_get, busy);
    let proxy = Proxy::over(&upstream).await;
    let began = Instant::now();
    let layer = image.layer(0);
    proxy.blob("library/demo", &layer.digest).await.is_blob(layer);
    assert!(began.elapsed() >= PAUSE, "{:?}", began.elapsed());
    assert_eq!(upstream.blob_gets(&layer.digest), 2);
}

#[tokio::test]
async fn r02_the_next_url_is_asked_within_a_pause() {
    let (first, second) = (Upstream::start().await, Upstream::start().await);
    let image = Image::with_layers(&["one"]);
    first.push("library/demo", "latest", image.clone());
    second.push("library/demo", "latest", image.clone());
    first.rate_limits(Some("3600"));
    let urls = format!("url = [\"{}\", \"{}\"]", first.url(), second.url());
    let proxy = Setup::empty().upstream("docker.io", &urls).start().await;
    let began = Instant::now();
    proxy.pull("library/demo", "latest", &image).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// A private image pulled by alice, and the cache before an upstream that limits her.
async fn pulled_by_alice() -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    upstream.requires_basic("alice", "secret");
    let image = upstream.push("acme/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy
        .pull_with("acme/demo", "latest", &image, |ask| ask.basic("alice", "secret"))
        .await;
    (upstream, proxy, image)
}

#[tokio::test]
async fn k7_a_limit_told_otherwise_takes_no_right_away() {
    let code = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#;
    let quota = r#"{"errors":[{"code":"DENIED","message":"Quota exceeded for quota metric 'Requests per project per user' and limit 'x'"}]}"#;
    let github = r#"{"message":"API rate limit exceeded for 192.0.2.1."}"#;
    for response in [
        Scripted::new(429, ""),
        Scripted::new(420, ""),
        Scripted::new(509, ""),
        Scripted::new(503, "").header("retry-after", "3600"),
        Scripted::new(403, code),
        Scripted::new(403, quota),
        Scripted::new(403, github)
            .header("x-ratelimit-remaining", "0")
            .header("x-ratelimit-reset", "4000000000"),
        Scripted::new(403, "").header("ratelimit-remaining", "0;w=21600"),
        Scripted::new(400, code),
    ] {
        let (upstream, proxy, image) = pulled_by_alice().await;
        upstream.answers_next(usize::MAX, any, response.clone());
        let alice = proxy
            .manifest("acme/demo", "latest")
            .basic("alice", "secret")
            .await;
        assert_eq!(alice.status, 200, "{response:?}: {alice:#?}");
        alice.is_image(&image).is_stale();
        // Her grant is kept: she is served in an outage, and others are not.
        upstream.refuses();
        let layer = image.layer(0);
        let blob = proxy
            .blob("acme/demo", &layer.digest)
            .basic("alice", "secret")
            .await;
        blob.is_blob(layer);
        let stranger = proxy.blob("acme/demo", &layer.digest).await;
        assert_ne!(stranger.status, 200, "{response:?}: {stranger:#?}");
    }
}

#[tokio::test]
async fn k7_a_denial_is_not_taken_for_a_rate_limit() {
    let denied = r#"{"errors":[{"code":"DENIED","message":"rate limit quota exceeded, too many requests, retry after 1s"}]}"#;
    let text = r#"{"message":"You have exceeded a secondary rate limit"}"#;
    for (response, status) in [
        (Scripted::new(403, denied), 403),
        (Scripted::new(403, denied).header("retry-after", "60"), 403),
        (
            Scripted::new(403, text).header("x-ratelimit-remaining", "12"),
            403,
        ),
        (Scripted::new(401, denied).header("retry-after", "60"), 401),
    ] {
        let (upstream, proxy, image) = pulled_by_alice().await;
        upstream.answers_next(usize::MAX, any, response.clone());
        let alice = proxy
            .manifest("acme/demo", "latest")
            .basic("alice", "secret")
            .await;
        alice.is_refused(status);
        assert_eq!(alice.header("retry-after"), None, "{response:?}");
        // The grant is gone for good.
        upstream.refuses();
        let layer = image.layer(0);
        let blob = proxy
            .blob("acme/demo", &layer.digest)
            .basic("alice", "secret")
            .await;
        assert_ne!(blob.status, 200, "{response:?}: {blob:#?}");
    }
}

#[tokio::test]
async fn k7_ratelimit_remaining_0_on_a_yes_is_no_limit() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.tells_rate_limit(100, 0);
    let proxy = Proxy::over(&upstream).await;
    let began = Instant::now();
    proxy.pull("library/demo", "latest", &image).await.is_fetched();
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}
