//! Malformed requests: rejected without an upstream request.

use crate::proxy::{Proxy, raw};
use crate::registry::{Image, Upstream};

const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Paths and their permitted status codes.
fn paths() -> Vec<(String, &'static [u16])> {
    const BAD: &[u16] = &[400, 404];
    const NONE: &[u16] = &[404];
    let long = "a".repeat(256);
    [
        ("/", NONE),
        ("/v1/", NONE),
        ("/v2/_catalog", NONE),
        ("/v2/demo", NONE),
        ("/v2/demo/manifests", NONE),
        ("/v2/demo/manifests/", BAD),
        ("/v2/manifests/latest", BAD),
        ("/v2//manifests/latest", BAD),
        ("/v2/Demo/manifests/latest", BAD),
        ("/v2/demo/Sub/manifests/latest", BAD),
        ("/v2/../manifests/latest", BAD),
        ("/v2/library/../demo/manifests/latest", BAD),
        ("/v2/%2e%2e/manifests/latest", BAD),
        ("/v2/demo%2Fapp/manifests/latest", BAD),
        ("/v2/demo%00/manifests/latest", BAD),
        ("/v2/_catalog/manifests/latest", BAD),
        ("/v2/\u{2024}\u{2024}/manifests/latest", BAD),
        ("/v2/library\u{ff0f}demo/manifests/latest", BAD),
        ("/v2/library/demo/blobs/sha256:..%2f..%2fetc%2fpasswd", BAD),
        ("/v2/library/demo/manifests/la%74est", BAD),
        ("/v2/library/demo/manifests/-latest", BAD),
        ("/v2/library/demo/manifests/.latest", BAD),
        ("/v2/library/demo/manifests/sha256:short", BAD),
        ("/v2/library/demo/manifests/sha256:", BAD),
        ("/v2/library/demo/manifests/@latest", BAD),
        ("/v2/library/demo/blobs/latest", BAD),
        ("/v2/library/demo/blobs/sha256:short", BAD),
        ("/v2/library/demo/blobs/", BAD),
        ("/v2/library/demo/blobs/sha256:../../../../etc/passwd", BAD),
        ("/v2/library/demo/blobs/../manifests/latest/", BAD),
        ("/v2/library/demo/referrers/latest", BAD),
        ("/v2/library/demo/tags", NONE),
        ("/v2/library/demo/tags/list/", NONE),
        ("/v2/library/demo/tags/list?n=many", BAD),
        ("/v2/library/demo/tags/list?n=-1", BAD),
        ("/v2/de__mo___x/manifests/latest", BAD),
        ("/v2/demo./manifests/latest", BAD),
        ("/v2/-demo/manifests/latest", BAD),
    ]
    .into_iter()
    .map(|(path, statuses)| (path.to_owned(), statuses))
    .chain([
        (format!("/v2/{long}/manifests/latest"), BAD),
        (format!("/v2/{}/manifests/latest", "a".repeat(10 * 1024)), BAD),
        (format!("/v2/library/demo/manifests/{}", "t".repeat(129)), BAD),
        (
            format!("/v2/library/demo/blobs/sha256:{}", HEX.to_uppercase()),
            BAD,
        ),
        (format!("/v2/library/demo/blobs/sha256:{HEX}0"), BAD),
        (format!("/v2/library/demo/blobs/SHA256:{HEX}"), BAD),
        (format!("/v2/library/demo/manifests/latest@sha256:{HEX}"), BAD),
        (format!("/v2/library/demo/blobs/sha256:{HEX}/more"), BAD),
    ])
    .collect()
}

#[tokio::test]
async fn malformed_path_is_rejected_without_upstream_request() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["x"]));
    let proxy = Proxy::over(&upstream).await;
    for (path, statuses) in paths() {
        for method in ["GET", "HEAD"] {
            // On a raw socket, because a client library would normalize some of them.
            let reply = raw(proxy.registry_address(), &request(method, &path)).await;
            let status = reply
                .status()
                .unwrap_or_else(|| panic!("{method} {path}: no reply"));
            assert!(
                statuses.contains(&status),
                "{method} {path}: {status}, expected one of {statuses:?}"
            );
            if method == "GET" {
                assert!(reply.text.contains("\"errors\":["), "{path}: {}", reply.text);
            }
        }
    }
    assert_eq!(upstream.requests().len(), 0, "{:#?}", upstream.requests());
}

#[tokio::test]
async fn malformed_http_is_400_and_the_connection_is_closed() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let table: &[(&str, &str)] = &[
        ("no Host", "GET /v2/ HTTP/1.1\r\n\r\n"),
        ("two Hosts", "GET /v2/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
        (
            "two lengths",
            "GET /v2/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        ),
        (
            "length and chunks",
            "POST /v2/ HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "no number",
            "GET /v2/ HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        ),
        ("a space in a name", "GET /v2/ HTTP/1.1\r\nHost : a\r\n\r\n"),
        ("no HTTP", "hello\r\n\r\n"),
        ("a Host that is none", "GET /v2/ HTTP/1.1\r\nHost: a b\r\n\r\n"),
    ];
    for (what, bytes) in table {
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert!(
            matches!(reply.status(), Some(400..=499) | None),
            "{what}: {}",
            reply.text
        );
        assert!(reply.replies() <= 1, "{what}: {}", reply.text);
    }
    assert_eq!(proxy.get("/v2/").await.status, 200);
}

#[tokio::test]
async fn smuggled_second_request_is_not_processed() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    for method in ["GET", "POST"] {
        // By its length the body ends inside the second request, by its chunks before it.
        let bytes = format!(
            "{method} /v2/ HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n\
             GET /v2/library/demo/manifests/latest HTTP/1.1\r\nHost: a\r\n\r\n"
        );
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert!(reply.replies() <= 1, "{method}: {}", reply.text);
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn a_header_without_measure_is_refused() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let mut bytes = b"GET /v2/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n".to_vec();
    for n in 0..2000 {
        bytes.extend(format!("x-filler-{n}: {}\r\n", "y".repeat(1000)).bytes());
    }
    bytes.extend(b"\r\n");
    let reply = raw(proxy.registry_address(), &bytes).await;
    assert!(matches!(reply.status(), Some(400 | 431) | None), "{}", reply.text);
    assert_eq!(proxy.get("/v2/").await.status, 200);
}

#[tokio::test]
async fn a_header_that_never_ends_is_closed() {
    let upstream = Upstream::start().await;
    let proxy = crate::proxy::Setup::over(&upstream)
        .tail("[limits]\nheader_timeout = \"300ms\"")
        .start()
        .await;
    let reply = raw(proxy.registry_address(), b"GET /v2/ HTTP/1.1\r\nHost: a\r\n").await;
    assert!(matches!(reply.status(), Some(408) | None), "{}", reply.text);
}

#[tokio::test]
async fn accept_lines_without_measure_are_refused() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["x"]));
    let proxy = Proxy::over(&upstream).await;
    let many: Vec<String> = (0..500)
        .map(|n| format!("application/vnd.example.{n}+json"))
        .collect();
    let reply = proxy
        .manifest("library/demo", "latest")
        .accept(&[many.join(",").as_str()])
        .await;
    assert!(matches!(reply.status, 400 | 431), "{reply:#?}");
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn unknown_upstream_is_404_without_upstream_request() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let elsewhere = upstream.address();
    for ns in [
        "evil.example",
        &elsewhere.to_string(),
        "127.0.0.1",
        "127.0.0.1:22",
        "169.254.169.254",
        "[::1]:22",
        "localhost",
        "docker.io.evil.example",
    ] {
        let reply = proxy
            .get(&format!("/v2/library/demo/manifests/latest?ns={ns}"))
            .unchecked()
            .await;
        assert!(matches!(reply.status, 400 | 404), "ns={ns}: {reply:#?}");
    }
    for prefix in [
        elsewhere.to_string().as_str(),
        "169.254.169.254",
        "127.0.0.1:22",
        "localhost",
    ] {
        let path = format!("/v2/{prefix}/x/manifests/y");
        let reply = proxy.get(&path).unchecked().await;
        assert!(matches!(reply.status, 400 | 404), "{path}: {reply:#?}");
    }
    assert_eq!((upstream.requests().len(), upstream.connections()), (0, 0));
}

fn request(method: &str, path: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").into_bytes()
}
