//! HTTP semantics: HEAD, ranges, conditional requests, connections and protocol versions.

use crate::proxy::{Proxy, Reply, Session, Setup, blob_path, manifest_path, raw};
use crate::registry::{Image, Upstream, noise, sha512};

/// A cache with the complete image, whose layer has 10,000 bytes.
pub async fn warm() -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&[noise(1, 10_000)]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    (upstream, proxy, image)
}

#[tokio::test]
async fn a_head_says_what_the_get_would() {
    let (_upstream, proxy, image) = warm().await;
    let paths = [
        manifest_path("library/demo", "latest"),
        manifest_path("library/demo", &image.digest),
        blob_path("library/demo", &image.layer(0).digest),
        blob_path("library/demo", &image.config().digest),
        manifest_path("library/demo", "no-such-tag"),
        "/v2/".to_owned(),
    ];
    for path in paths {
        let (get, head) = (proxy.get(&path).await, proxy.head(&path).await);
        assert_eq!(get.status, head.status, "{path}");
        for (name, value) in &get.headers {
            if !matches!(name.as_str(), "date" | "age" | "content-length")
                || (name == "content-length" && get.status == 200)
            {
                assert_eq!(head.headers.get(name), Some(value), "{path}: {name}");
            }
        }
    }
}

#[tokio::test]
async fn a_head_of_what_is_not_held_is_complete_too() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy
        .head(&manifest_path("library/demo", "latest"))
        .await
        .is_image(&image);
    proxy
        .head(&blob_path("library/demo", &image.layer(0).digest))
        .await
        .is_blob(image.layer(0));
    assert_eq!(upstream.all_blob_gets(), 0, "a HEAD is not turned into a GET");
}

#[tokio::test]
async fn one_connection_carries_many_requests_of_every_kind() {
    let (_upstream, proxy, image) = warm().await;
    let mut session = Session::open(proxy.registry_address()).await;
    for _ in 0..3 {
        session
            .ask("HEAD", &manifest_path("library/demo", "latest"))
            .await
            .is_image(&image);
        session
            .ask("GET", &manifest_path("library/demo", "latest"))
            .await
            .is_image(&image);
        session
            .ask("HEAD", &blob_path("library/demo", &image.layer(0).digest))
            .await
            .is_blob(image.layer(0));
        session
            .ask("GET", &blob_path("library/demo", &image.layer(0).digest))
            .await
            .is_blob(image.layer(0));
        session
            .ask("GET", &manifest_path("library/demo", "no-such-tag"))
            .await
            .is_refused(404);
        session
            .ask("HEAD", &manifest_path("library/demo", "no-such-tag"))
            .await
            .is_refused(404);
        session.ask("GET", "/v2/Bad/manifests/x").await.is_refused(400);
    }
}

#[tokio::test]
async fn requests_sent_ahead_are_answered_in_order() {
    let (_upstream, proxy, _image) = warm().await;
    let two = b"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\nHEAD /v2/library/demo/manifests/latest HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
    let reply = raw(proxy.registry_address(), two).await;
    assert_eq!(
        (reply.status(), reply.replies()),
        (Some(200), 2),
        "{}",
        reply.text
    );
}

#[tokio::test]
async fn a_broken_transfer_is_broken_over_tls_too() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(1, 1_000_000));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    upstream.corrupts_blob();
    let ca = proxy.ca_pem();
    for protocol in ["h2", "http/1.1"] {
        let ask = proxy
            .blob("library/demo", &image.layer(0).digest)
            .tls(&ca, &[protocol]);
        ask.visibly_fails().await;
    }
}

#[tokio::test]
async fn the_certificate_is_the_same_after_a_restart() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let ca = proxy.ca_pem();
    let proxy = proxy.restart().await;
    assert_eq!(proxy.ca_pem(), ca);
    assert_eq!(proxy.get("/v2/").tls(&ca, &[]).await.status, 200);
}

#[tokio::test]
async fn who_is_not_trusted_with_plain_http_is_turned_away() {
    let upstream = Upstream::start().await;
    let proxy = Setup::over(&upstream)
        .listen_keys("plain_http = \"off\"")
        .start()
        .await;
    let reply = raw(
        proxy.registry_address(),
        b"GET /v2/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(!matches!(reply.status(), Some(200..=299)), "{}", reply.text);
    assert_eq!(proxy.get("/v2/").tls(&proxy.ca_pem(), &[]).await.status, 200);
}

#[tokio::test]
async fn a_blob_of_no_bytes_is_a_blob() {
    let upstream = Upstream::start().await;
    let empty = upstream.push_blob("library/demo", b"");
    upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    assert_eq!(
        proxy.manifest("library/demo", "1").await.status,
        200,
        "rights come with manifests"
    );
    for _ in 0..2 {
        proxy.blob("library/demo", &empty.digest).await.is_blob(&empty);
        proxy
            .head(&blob_path("library/demo", &empty.digest))
            .await
            .is_blob(&empty);
    }
    proxy.until_kept(&empty.digest).await;
    upstream.refuses();
    proxy
        .blob("library/demo", &empty.digest)
        .await
        .is_blob(&empty)
        .is_hit();
}

#[tokio::test]
async fn what_arrives_for_a_sha512_is_named_by_its_sha512() {
    let upstream = Upstream::start().await;
    let digest = sha512(b"content");
    upstream.push_named("library/demo", &digest, b"content");
    upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    assert_eq!(
        proxy.manifest("library/demo", "1").await.status,
        200,
        "rights come with manifests"
    );
    for _ in 0..2 {
        let reply: Reply = proxy.blob("library/demo", &digest).await;
        assert_eq!(
            (reply.status, reply.header("docker-content-digest")),
            (200, Some(digest.as_str())),
            "{reply:#?}"
        );
        assert_eq!(reply.body, "content");
    }
    assert_eq!(upstream.blob_gets(&digest), 1);
}
