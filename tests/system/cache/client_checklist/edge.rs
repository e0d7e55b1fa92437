//! Rows about the cache's own HTTP behaviour: 5, 31, 36, 37.

use crate::proxy::{Proxy, blob_path, manifest_path};
use crate::registry::{Image, Upstream};
use crate::robustness::http::warm;

#[tokio::test]
async fn row_36_the_catalog_is_never_served() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    for method in ["GET", "HEAD"] {
        proxy
            .ask(method, "/v2/_catalog")
            .unchecked()
            .await
            .is_refused(404);
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn row_37_the_head_of_what_is_not_held_knows_an_etag_too() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    for (path, digest) in [
        (manifest_path("library/demo", "latest"), &image.digest),
        (
            blob_path("library/demo", &image.layer(0).digest),
            &image.layer(0).digest,
        ),
    ] {
        let known = proxy
            .head(&path)
            .header("if-none-match", &format!("\"{digest}\""))
            .await;
        assert_eq!(
            (known.status, known.header("content-type")),
            (304, None),
            "{known:#?}"
        );
        let other = proxy
            .head(&path)
            .header("if-none-match", "\"sha256:other\"")
            .await;
        assert_eq!(other.status, 200);
    }
}

#[tokio::test]
async fn row_05_mirror_ping_does_not_wait_for_upstream() {
    let upstream = Upstream::start().await;
    upstream.hangs();
    let proxy = Proxy::over(&upstream).await;
    for (method, path) in [("GET", "/v2/"), ("HEAD", "/v2/"), ("GET", "/v2")] {
        assert_eq!(proxy.ask(method, path).await.status, 200, "{method} {path}");
    }
    assert_eq!(upstream.requests().len(), 0, "nobody was asked");
}

#[tokio::test]
async fn row_37_an_etag_that_still_holds_is_304() {
    let (_upstream, proxy, image) = warm().await;
    let paths = [
        (manifest_path("library/demo", "latest"), &image.digest),
        (manifest_path("library/demo", &image.digest), &image.digest),
        (
            blob_path("library/demo", &image.layer(0).digest),
            &image.layer(0).digest,
        ),
    ];
    for (path, digest) in paths {
        for condition in [
            format!("\"{digest}\""),
            format!("W/\"{digest}\""),
            format!("\"other\", \"{digest}\""),
            "*".to_owned(),
        ] {
            let reply = proxy.get(&path).header("if-none-match", &condition).await;
            assert_eq!(reply.status, 304, "{path} {condition}: {reply:#?}");
            assert_eq!(reply.header("etag"), Some(format!("\"{digest}\"").as_str()));
        }
        let reply = proxy.get(&path).header("if-none-match", "\"sha256:other\"").await;
        assert_eq!(reply.status, 200, "{path}");
    }
}

#[tokio::test]
async fn row_36_a_write_through_a_mirror_is_unsupported() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let digest = crate::registry::sha256(b"x");
    let writes = [
        ("POST", "/v2/library/demo/blobs/uploads/".to_owned()),
        ("PATCH", "/v2/library/demo/blobs/uploads/1".to_owned()),
        ("PUT", "/v2/library/demo/blobs/uploads/1?digest=x".to_owned()),
        ("PUT", manifest_path("library/demo", "latest")),
        ("DELETE", manifest_path("library/demo", "latest")),
        ("DELETE", blob_path("library/demo", &digest)),
    ];
    for (method, path) in writes {
        let reply = proxy.ask(method, &path).body(b"body").await;
        assert_eq!(reply.is_refused(405).code(), "UNSUPPORTED", "{method} {path}");
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn row_31_plain_and_tls_and_both_protocols_share_one_port() {
    let (_upstream, proxy, image) = warm().await;
    let ca = proxy.ca_pem();
    for protocols in [&["h2"][..], &["http/1.1"], &["h2", "http/1.1"], &[]] {
        let dress = |ask: crate::proxy::Ask| ask.tls(&ca, protocols);
        proxy
            .pull_with("library/demo", "latest", &image, dress)
            .await
            .is_unchanged();
        assert_eq!(dress(proxy.get("/v2/")).await.status, 200);
        dress(proxy.manifest("library/demo", "no-such-tag"))
            .await
            .is_refused(404);
        let part = dress(proxy.blob("library/demo", &image.layer(0).digest))
            .header("range", "bytes=1-2")
            .await;
        assert_eq!(part.status, 206);
    }
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
}
