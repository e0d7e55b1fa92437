//! Unreachable upstreams: cached content is served with `Warning`, for every cause.

use crate::proxy::{Proxy, Reply, Setup, manifest_path};
use crate::registry::{Image, Upstream};

/// Cached, then unavailable: served with a warning by `GET` and `HEAD`, also after a restart. Uncached: a clear error
/// and never
/// 404. Upstream back: normal responses.
async fn serves_what_is_held_when(upstream: Upstream, misbehaves: impl Fn(&Upstream)) {
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    upstream.push("library/demo", "never-seen", Image::with_layers(&["three"]));
    let proxy = Setup::over(&upstream)
        .default_keys("revalidate_timeout = \"500ms\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &image).await;

    misbehaves(&upstream);
    let reply = proxy.pull("library/demo", "latest", &image).await;
    assert!(
        reply.is_stale().header("warning").unwrap().contains("docker.io"),
        "{reply:#?}"
    );
    proxy
        .head(&manifest_path("library/demo", "latest"))
        .await
        .is_image(&image)
        .is_stale();

    let proxy = proxy.restart().await;
    proxy.pull("library/demo", "latest", &image).await.is_stale();
    let missing = proxy.manifest("library/demo", "never-seen").await;
    assert!(matches!(missing.status, 429 | 502..=504), "{missing:#?}");
    missing.is_refused(missing.status);

    upstream.recovers();
    let ask = |proxy: &Proxy| proxy.manifest("library/demo", "latest");
    let reply = proxy
        .until("upstream to be asked again", ask, |reply| {
            reply.header("warning").is_none()
        })
        .await;
    reply.is_image(&image).is_unchanged();
}

#[tokio::test]
async fn a_refused_connection_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start().await, Upstream::refuses).await;
}

#[tokio::test]
async fn a_reset_connection_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start().await, Upstream::resets).await;
}

#[tokio::test]
async fn a_connection_closed_without_an_answer_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start().await, Upstream::drops_requests).await;
}

#[tokio::test]
async fn status_500_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start().await, |upstream| upstream.answers_status(500)).await;
}

#[tokio::test]
async fn status_502_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start().await, |upstream| upstream.answers_status(502)).await;
}

#[tokio::test]
async fn status_503_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start().await, |upstream| upstream.answers_status(503)).await;
}

#[tokio::test]
async fn status_504_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start().await, |upstream| upstream.answers_status(504)).await;
}

#[tokio::test]
async fn too_many_requests_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start().await, |upstream| upstream.rate_limits(None)).await;
}

#[tokio::test]
async fn a_captive_portal_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start().await, Upstream::answers_html).await;
}

#[tokio::test]
async fn a_certificate_nobody_trusts_serves_what_is_held() {
    serves_what_is_held_when(
        Upstream::start_tls().await,
        Upstream::presents_foreign_certificate,
    )
    .await;
}

#[tokio::test]
async fn a_refused_tls_connection_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start_tls().await, Upstream::refuses).await;
}

#[tokio::test]
async fn a_handshake_that_never_ends_serves_what_is_held() {
    serves_what_is_held_when(Upstream::start_tls().await, Upstream::is_mute).await;
}

#[tokio::test]
async fn a_token_service_that_is_down_serves_what_is_held() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.makes_public("library/demo");
    serves_what_is_held_when(upstream, |upstream| {
        upstream.expires_tokens();
        upstream.answers_tokens_with(503);
    })
    .await;
}

#[tokio::test]
async fn a_name_that_does_not_resolve_serves_what_is_held() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let setup = Setup::over(&upstream);
    let proxy = setup.clone().start().await;
    proxy.pull("library/demo", "latest", &image).await;

    let nowhere = setup
        .without("docker.io")
        .upstream("docker.io", "url = \"http://registry.invalid\"");
    let proxy = proxy.restart_as(nowhere).await;
    proxy.pull("library/demo", "latest", &image).await.is_stale();
    proxy
        .manifest("library/demo", "never-seen")
        .await
        .is_unreachable();
}

#[tokio::test]
async fn cached_tag_is_served_within_revalidate_timeout() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("revalidate_timeout = \"300ms\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &image).await;

    upstream.hangs();
    // The response arrives while the upstream still holds the request.
    proxy.pull("library/demo", "latest", &image).await.is_stale();
    let proxy = proxy.restart().await;
    proxy.pull("library/demo", "latest", &image).await.is_stale();
}

#[tokio::test]
async fn the_late_answer_still_counts() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let new = upstream.push("library/demo", "next", Image::with_layers(&["two"]));
    let proxy = Setup::over(&upstream)
        .default_keys("revalidate_timeout = \"300ms\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &old).await;
    proxy.pull("library/demo", "next", &new).await;
    let gate = upstream.holds_answers(|seen| seen.method == "HEAD");
    proxy
        .manifest("library/demo", "latest")
        .await
        .is_image(&old)
        .is_stale();

    // Only the stalled request gets a response. Later ones hang.
    upstream.moves("library/demo", "latest", new.clone());
    upstream.hangs();
    gate.release();
    let ask = |proxy: &Proxy| proxy.manifest("library/demo", "latest");
    let named = |reply: &Reply| reply.header("docker-content-digest") == Some(&new.digest);
    proxy
        .until("the late answer to be heeded", ask, named)
        .await
        .is_image(&new);
}

#[tokio::test]
async fn uncached_tag_waits_full_timeout_and_gets_clear_error() {
    let upstream = Upstream::start().await;
    upstream.hangs();
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_unreachable();
}

#[tokio::test]
async fn what_was_never_seen_gets_a_clear_error_and_never_404() {
    let upstream = Upstream::start().await;
    let image = Image::with_layers(&["one"]);
    upstream.refuses();
    let proxy = Proxy::over(&upstream).await;

    let reply = proxy.manifest("library/demo", "latest").await;
    reply.is_unreachable();
    assert!(
        reply.message().contains("refused"),
        "the cause is named: {}",
        reply.message()
    );
    proxy
        .manifest("library/demo", &image.digest)
        .await
        .is_unreachable();
    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_unreachable();
    proxy
        .head(&manifest_path("library/demo", "latest"))
        .await
        .is_unreachable();
}

#[tokio::test]
async fn a_quota_without_a_copy_is_passed_on_with_its_retry_after() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.rate_limits(Some("45"));
    let proxy = Proxy::over(&upstream).await;

    let reply = proxy.manifest("library/demo", "latest").await;
    assert_eq!(
        (reply.status, reply.header("retry-after")),
        (429, Some("45")),
        "{reply:#?}"
    );
    assert_eq!(reply.code(), "TOOMANYREQUESTS");
}

#[tokio::test]
async fn within_retry_after_upstream_is_left_alone() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.rate_limits(Some("3600"));
    proxy.pull("library/demo", "latest", &image).await.is_stale();
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await.is_stale();
    assert_eq!(upstream.requests().len(), 0, "{:#?}", upstream.requests());
}

#[tokio::test]
async fn no_get_is_sent_within_retry_after() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.rate_limits(Some("3600"));
    let proxy = Proxy::over(&upstream).await;
    let layer = &image.layer(0).digest;
    for round in 0..3 {
        for ask in [
            proxy.manifest("library/demo", "latest"),
            proxy.blob("library/demo", layer),
            proxy.get("/v2/library/demo/tags/list"),
        ] {
            let reply = ask.await;
            assert_eq!(reply.is_refused(429).code(), "TOOMANYREQUESTS");
            let left: u64 = reply.header("retry-after").unwrap().parse().unwrap();
            assert!((3000..=3600).contains(&left), "{left}");
        }
        assert_eq!(
            upstream.requests().len(),
            3,
            "round {round}: {:#?}",
            upstream.requests()
        );
    }
}

#[tokio::test]
async fn exhausted_pull_quota_does_not_stop_revalidation() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &old).await;
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    upstream.rate_limits_pulls(Some("3600"));
    upstream.clear_log();

    for _ in 0..3 {
        let reply = proxy.manifest("library/demo", "latest").await;
        let status = reply.is_image(&old).is_hit().cache_status();
        assert!(status.ends_with("stale-fetch-failed-rate-limited"), "{status}");
        assert!(
            reply.header("warning").unwrap().contains("docker.io"),
            "{reply:#?}"
        );
    }
    assert_eq!(upstream.heads("library/demo"), 3, "a HEAD is no pull");
    assert_eq!(upstream.manifest_gets("library/demo"), 1, "one 429 is enough");
    // Uncached content gets 429 with `Retry-After`. Blobs are counted separately.
    proxy.manifest("library/demo", &new.digest).await.is_refused(429);
    proxy
        .blob("library/demo", &new.layer(0).digest)
        .await
        .is_blob(new.layer(0));
    let moved_back = upstream.moves("library/demo", "latest", old);
    proxy
        .manifest("library/demo", "latest")
        .await
        .is_image(&moved_back)
        .is_unchanged();
}

#[tokio::test]
async fn a_limit_on_blobs_leaves_the_manifests_alone() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.rate_limits_blobs(Some("3600"));
    let proxy = Proxy::over(&upstream).await;
    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_refused(429);
    proxy.manifest("library/demo", "latest").await.is_image(&image);
}

#[tokio::test]
async fn one_clients_quota_is_not_anothers() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.rate_limits(Some("3600"));
    let proxy = Proxy::over(&upstream).await;
    proxy
        .manifest("library/demo", "latest")
        .bearer("a")
        .await
        .is_refused(429);
    upstream.recovers();
    upstream.clear_log();
    proxy
        .manifest("library/demo", "latest")
        .bearer("a")
        .await
        .is_refused(429);
    assert_eq!(upstream.requests().len(), 0);
    proxy
        .manifest("library/demo", "latest")
        .bearer("b")
        .await
        .is_image(&image);
    proxy.manifest("library/demo", "latest").await.is_image(&image);
}

#[tokio::test]
async fn a_server_error_is_tried_once_more_and_no_further() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.answers_status(503);
    upstream.clear_log();

    proxy.manifest("library/demo", "latest").await.is_stale();
    assert_eq!(upstream.heads("library/demo"), 2);
}

#[tokio::test]
async fn open_breaker_serves_stale_and_notices_recovery() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.answers_status(500);
    for _ in 0..4 {
        proxy.manifest("library/demo", "latest").await.is_stale();
    }
    upstream.clear_log();

    for _ in 0..10 {
        let reply = proxy.manifest("library/demo", "latest").await;
        let status = reply.is_image(&image).is_stale().cache_status();
        assert!(
            status.contains("breaker-open"),
            "no puller waits for a dead upstream: {status}"
        );
    }
    // The probe repeats the failed request, because `/v2/` may still respond.
    let path = manifest_path("library/demo", "latest");
    upstream
        .until("a probe in the background", |seen| {
            seen.iter().any(|seen| seen.method == "HEAD" && seen.path == path)
        })
        .await;
    upstream.recovers();
    let ask = |proxy: &Proxy| proxy.manifest("library/demo", "latest");
    proxy
        .until("the recovery to be noticed", ask, |reply| {
            reply.header("warning").is_none()
        })
        .await
        .is_unchanged();
}

#[tokio::test]
async fn policy_always_refuses_rather_than_serve_what_is_held() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("policy = \"always\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.refuses();

    proxy.manifest("library/demo", "latest").await.is_unreachable();
    // Content by digest cannot be stale.
    proxy.pull("library/demo", &image.digest, &image).await.is_hit();
}

#[tokio::test]
async fn a_copy_older_than_stale_allows_is_not_served() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream)
        .default_keys("stale_if_error = \"0s\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.refuses();

    proxy.manifest("library/demo", "latest").await.is_unreachable();
}

#[tokio::test]
async fn the_next_url_is_tried_when_the_first_is_silent() {
    let dead = Upstream::start().await;
    let alive = Upstream::start().await;
    let image = alive.push("library/demo", "latest", Image::with_layers(&["one"]));
    dead.refuses();
    let urls = format!("url = [\"{}\", \"{}\"]", dead.url(), alive.url());
    let proxy = Setup::empty().upstream("docker.io", &urls).start().await;

    proxy.pull("library/demo", "latest", &image).await.is_fetched();
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
}

#[tokio::test]
async fn it_starts_while_upstream_is_down() {
    let upstream = Upstream::start().await;
    upstream.hangs();
    let proxy = Proxy::over(&upstream).await;
    assert_eq!(proxy.get("/v2/").await.status, 200);
    assert_eq!(
        proxy.admin("/readyz").await.status,
        200,
        "a silent upstream is ready"
    );
    assert!(
        upstream.requests().iter().all(|seen| seen.path != "/v2/library"),
        "nothing is asked at the start"
    );
}
