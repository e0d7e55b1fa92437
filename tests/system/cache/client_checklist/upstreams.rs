//! Rows about upstream requests and responses: 15, 16, 17, 20 to 23, 28, 29, 30, 38.

use crate::proxy::{Proxy, Setup, blob_path, manifest_path};
use crate::registry::{Image, Seen, Upstream};

#[tokio::test]
async fn row_15_a_silence_serves_what_is_held_and_a_no_never_does() {
    fn any(seen: &Seen) -> bool {
        seen.path.starts_with("/v2/")
    }
    for status in [429, 500, 502, 503, 504, 401, 403, 404] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        let proxy = Proxy::over(&upstream).await;
        proxy.pull("library/demo", "latest", &image).await;
        upstream.answers(any, status);
        for method in ["GET", "HEAD"] {
            let reply = proxy.ask(method, &manifest_path("library/demo", "latest")).await;
            if matches!(status, 401 | 403 | 404) {
                reply.is_refused(status);
            } else {
                reply.is_image(&image).is_stale();
                assert!(
                    reply.header("warning").unwrap().contains("docker.io"),
                    "{reply:#?}"
                );
            }
        }
    }
}

#[tokio::test]
async fn row_16_token_is_fetched_once_and_again_after_401() {
    for style in [
        (|_| {}) as fn(&Upstream),
        Upstream::omits_expires_in,
        Upstream::names_it_access_token,
        |upstream| {
            upstream.omits_expires_in();
            upstream.names_it_access_token();
        },
    ] {
        let upstream = Upstream::start().await;
        upstream.requires_token();
        upstream.makes_public("library/demo");
        style(&upstream);
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
        let proxy = Proxy::over(&upstream).await;
        // Concurrent requests share one token request.
        let mut clients = tokio::task::JoinSet::new();
        for blob in &image.blobs {
            clients.spawn(proxy.blob("library/demo", &blob.digest).into_reply());
            clients.spawn(proxy.manifest("library/demo", "latest").into_reply());
        }
        assert!(clients.join_all().await.iter().all(|reply| reply.status == 200));
        assert_eq!(upstream.token_requests().len(), 1);
        upstream.expires_tokens();
        proxy.pull("library/demo", "latest", &image).await.is_unchanged();
        assert_eq!(upstream.token_requests().len(), 2);
    }
}

#[tokio::test]
async fn row_16_a_token_that_helps_nothing_is_not_fetched_for_ever() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.push("library/secret", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/secret", "latest").await.is_refused(401);
    assert_eq!(
        upstream.manifest_gets("library/secret"),
        2,
        "once without and once with a token"
    );
}

#[tokio::test]
async fn row_20_ns_contacts_only_configured_upstreams() {
    let (hub, other, ported) = (
        Upstream::start().await,
        Upstream::start().await,
        Upstream::start().await,
    );
    let proxy = Setup::over(&hub)
        .also("ghcr.io", &other)
        .also("registry.example:5000", &ported)
        .start()
        .await;
    for (upstream, names) in [
        (
            &hub,
            &["docker.io", "index.docker.io", "registry-1.docker.io"][..],
        ),
        (&other, &["ghcr.io"]),
        (&ported, &["registry.example:5000"]),
    ] {
        let image = upstream.push("team/demo", "1", Image::with_layers(&[names[0]]));
        for ns in names {
            let path = format!("{}?ns={ns}", manifest_path("team/demo", "1"));
            proxy.get(&path).await.is_image(&image);
            let layer = image.layer(0);
            let path = format!("{}?ns={ns}", blob_path("team/demo", &layer.digest));
            proxy.get(&path).await.is_blob(layer);
        }
        assert!(
            upstream.requests().iter().all(|seen| seen.query.is_none()),
            "ns stays here"
        );
        upstream.clear_log();
    }
    for ns in [
        "evil.example",
        "registry.example",
        "registry.example:5001",
        "169.254.169.254",
        "ghcr.io:444",
    ] {
        proxy
            .get(&format!("{}?ns={ns}", manifest_path("team/demo", "1")))
            .await
            .is_refused(404);
    }
    for upstream in [&hub, &other, &ported] {
        assert_eq!(
            upstream.connections(),
            0,
            "no connection for a name nobody configured"
        );
    }
}

#[tokio::test]
async fn row_23_a_registry_that_is_odd_about_heads_is_asked_by_get() {
    fn head_of_manifest(seen: &Seen) -> bool {
        seen.method == "HEAD" && seen.path.contains("/manifests/")
    }
    for oddity in [
        Upstream::head_not_allowed as fn(&Upstream),
        Upstream::omits_digest,
        Upstream::omits_length,
        |upstream| upstream.answers_text(head_of_manifest, 404),
        |upstream| upstream.answers(head_of_manifest, 501),
    ] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        oddity(&upstream);
        let proxy = Proxy::over(&upstream).await;
        proxy
            .head(&manifest_path("library/demo", "latest"))
            .await
            .is_image(&image);
        proxy.pull("library/demo", "latest", &image).await;
        proxy.pull("library/demo", "latest", &image).await.is_hit();
        let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
        proxy.pull("library/demo", "latest", &new).await;
    }
}

#[tokio::test]
async fn row_23_expired_token_is_replaced_on_any_denial_form() {
    for status in [400, 403] {
        let upstream = Upstream::start().await;
        upstream.requires_token();
        upstream.makes_public("library/demo");
        upstream.answers_expired_tokens_with(status);
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        let proxy = Proxy::over(&upstream).await;
        proxy.manifest("library/demo", "latest").await.is_image(&image);
        upstream.expires_tokens();
        proxy
            .blob("library/demo", &image.layer(0).digest)
            .await
            .is_blob(image.layer(0));
        assert_eq!(upstream.token_requests().len(), 2, "{status}");
    }
}

#[tokio::test]
async fn row_28_an_error_names_the_upstream_and_the_cause() {
    for (inject, status, cause) in [
        (Upstream::refuses as fn(&Upstream), 502, "refused the connection"),
        (Upstream::resets, 502, "broke the connection"),
        (Upstream::gzips, 502, "a malformed response"),
        (
            |upstream| upstream.answers_status(500),
            502,
            "responded with status 500",
        ),
        (
            |upstream| upstream.answers_status(503),
            503,
            "responded with status 503",
        ),
        (
            |upstream| upstream.answers_status(451),
            451,
            "responded with status 451",
        ),
        (|upstream| upstream.answers_status(403), 403, "denies access"),
        (
            |upstream| upstream.answers_status(401),
            401,
            "requires a credential",
        ),
        (|upstream| upstream.answers_status(404), 404, "does not exist"),
        (
            |upstream| upstream.rate_limits(Some("60")),
            429,
            "limits the rate",
        ),
    ] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        inject(&upstream);
        let proxy = Proxy::over(&upstream).await;
        for path in [
            manifest_path("library/demo", "latest"),
            blob_path("library/demo", &image.layer(0).digest),
            "/v2/library/demo/tags/list".to_owned(),
        ] {
            // The error body and the upstream's name in it are checked for every error (`support/proxy/check.rs`).
            let reply = proxy.get(&path).await;
            let message = reply.is_refused(status).message();
            assert!(
                message.contains(cause) && message.contains("docker.io"),
                "{path}: {message}"
            );
        }
    }
}

#[tokio::test]
async fn row_29_429_reaches_uncached_clients_with_retry_after() {
    let upstream = Upstream::start().await;
    let held = upstream.push("library/demo", "held", Image::with_layers(&["one"]));
    let other = upstream.push("library/demo", "other", Image::with_layers(&["two"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "held", &held).await;
    proxy.get("/v2/library/demo/tags/list").await;
    upstream.rate_limits(Some("40"));
    proxy.pull("library/demo", "held", &held).await.is_stale();
    for page in ["", "?n=1"] {
        let page = proxy.get(&format!("/v2/library/demo/tags/list{page}")).await;
        assert_eq!(page.status, 200);
    }
    for path in [
        manifest_path("library/demo", "other"),
        manifest_path("library/demo", &other.digest),
        blob_path("library/demo", &other.layer(0).digest),
        "/v2/library/other/tags/list".to_owned(),
    ] {
        let reply = proxy.get(&path).await;
        let after: u64 = reply
            .is_refused(429)
            .header("retry-after")
            .unwrap()
            .parse()
            .unwrap();
        assert!((1..=40).contains(&after), "{path}: {after}");
        assert_eq!(reply.code(), "TOOMANYREQUESTS");
    }
}

#[tokio::test]
async fn row_38_challenges_are_found_however_they_are_written() {
    for lines in [
        &["Bearer realm=\"{realm}\",service=\"a\",scope=\"{scope}\""][..],
        &["bEaReR  REALM=\"{realm}\" , Service=a, sCoPe=\"{scope}\""],
        &[
            "Negotiate",
            "Basic realm=\"x\"",
            "Bearer realm=\"{realm}\",service=\"a\",scope=\"{scope}\"",
        ],
        &[
            "Basic realm=\"say \\\"a, b\\\"\", Negotiate, Bearer realm=\"{realm}\",service=\"a, \\\"b\\\"\",scope=\"{scope}\"",
        ],
        &[
            "Bearer realm=\"{realm}\",scope=\"{scope}\",service=\"a\",error=\"invalid_token\", Basic realm=\"x\"",
        ],
    ] {
        let upstream = Upstream::start().await;
        upstream.requires_token();
        upstream.makes_public("library/demo");
        upstream.challenges_with(lines);
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        let proxy = Proxy::over(&upstream).await;
        assert_eq!(
            proxy.manifest("library/demo", "latest").await.status,
            200,
            "{lines:?}"
        );
        proxy.pull("library/demo", "latest", &image).await;
        let asked = upstream.token_requests();
        assert_eq!(asked.len(), 1, "{lines:?}");
        let query = asked[0].query.as_deref().unwrap();
        assert!(
            query.contains("scope=repository") && query.contains("library"),
            "{lines:?}: {query}"
        );
    }
}

#[tokio::test]
async fn row_38_a_realm_that_leads_elsewhere_is_not_asked() {
    for realm in [
        "http://169.254.169.254/latest/meta-data".to_owned(),
        "ftp://127.0.0.1/token".to_owned(),
        "/token".to_owned(),
        "https://auth.elsewhere.example/token".to_owned(),
    ] {
        let upstream = Upstream::start().await;
        upstream.requires_token();
        upstream.names_realm(&realm);
        upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        let proxy = Proxy::over(&upstream).await;
        proxy.manifest("library/demo", "latest").await.is_refused(401);
    }
}

#[tokio::test]
async fn row_17_a_redirect_is_followed_here_without_the_credential() {
    let upstream = Upstream::start().await;
    let storage = Upstream::start().await;
    upstream.requires_basic("alice", "a-secret");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["one", "two"]));
    upstream.redirects_blobs_to(&storage);
    let proxy = Proxy::over(&upstream).await;

    proxy
        .pull_with("acme/app", "1", &image, |ask| ask.basic("alice", "a-secret"))
        .await;
    assert_eq!(storage.requests().len(), image.blobs.len());
    assert!(
        storage.requests().iter().all(|seen| !seen.authorized()),
        "{:#?}",
        storage.requests()
    );
    assert!(
        storage
            .requests()
            .iter()
            .all(|seen| seen.query.as_deref() == Some("signature=s"))
    );
}

#[tokio::test]
async fn row_21_one_component_name_means_library_on_hub_only() {
    let upstream = Upstream::start().await;
    let other = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["hub"]));
    let plain = other.push("demo", "latest", Image::with_layers(&["other"]));
    let proxy = Setup::over(&upstream).also("ghcr.io", &other).start().await;

    proxy.pull("demo", "latest", &image).await;
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    proxy.pull("ghcr.io/demo", "latest", &plain).await;
    proxy
        .get("/v2/demo/manifests/latest?ns=ghcr.io")
        .await
        .is_image(&plain)
        .is_unchanged();
    proxy
        .get("/v2/demo/manifests/latest?ns=docker.io")
        .await
        .is_image(&image);
    assert!(
        upstream
            .requests()
            .iter()
            .chain(&other.requests())
            .all(|seen| seen.query.is_none()),
        "ns stays here"
    );
}

#[tokio::test]
async fn row_22_content_encoding_is_not_requested_nor_accepted() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.gzips();
    let proxy = Proxy::over(&upstream).await;
    proxy
        .manifest("library/demo", "latest")
        .header("accept-encoding", "zstd, gzip")
        .await
        .is_unreachable();
    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_unreachable();

    assert!(
        upstream
            .requests()
            .iter()
            .all(|seen| seen.header("accept-encoding") == Some("identity"))
    );
    upstream.recovers();
    let ask = |proxy: &Proxy| proxy.manifest("library/demo", "latest");
    proxy
        .until("upstream to be asked again", ask, |reply| reply.status == 200)
        .await
        .is_image(&image);
}

#[tokio::test]
async fn row_30_an_empty_basic_credential_is_nobody() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.makes_public("library/demo");
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["open"]));
    let proxy = Proxy::over(&upstream).await;

    proxy
        .pull_with("library/demo", "latest", &image, |ask| ask.basic("", ""))
        .await;
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
}
