//! A response after which the server closes the connection says `Connection: close` (RFC 9112 §9.6).

use crate::forwarding::host_routing::two_upstreams;
use crate::proxy::{Proxy, manifest_path, raw};
use crate::registry::{Image, Upstream, within};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Whether the first of these responses has `Connection: close`.
fn says_close(text: &str) -> bool {
    let head = text
        .split("\r\n\r\n")
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase();
    head.lines().any(|line| line == "connection: close")
}

#[tokio::test]
async fn k7_a_response_before_the_end_of_a_body_says_close() {
    let (hub, other, proxy) = two_upstreams().await;
    hub.push("library/demo", "1", Image::with_layers(&["hub"]));
    let path = manifest_path("library/demo", "1");
    other.refuses();
    for (what, status, head) in [
        (
            "a body that is not needed",
            200,
            format!("GET {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf"),
        ),
        (
            "a HEAD with a body",
            200,
            format!("HEAD {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf"),
        ),
        (
            "a ping with a body",
            200,
            "GET /v2/ HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n".to_owned(),
        ),
        (
            "a body that is expected",
            200,
            format!("GET {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"),
        ),
        (
            "a push",
            405,
            format!("PUT {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf"),
        ),
        (
            "an unknown method",
            405,
            format!("BREW {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf"),
        ),
        (
            "a wrong path",
            404,
            "GET /v3/ HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf".to_owned(),
        ),
        (
            "a wrong name",
            400,
            "GET /v2/A/manifests/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf".to_owned(),
        ),
        (
            "no such upstream",
            404,
            format!("GET {path}?ns=evil.example HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf"),
        ),
        (
            "a body too long",
            413,
            format!("GET {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 999999\r\n\r\nhalf"),
        ),
        (
            "chunks",
            400,
            format!("GET {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf"),
        ),
        (
            "a CONNECT with a body",
            403,
            "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\nContent-Length: 9\r\n\r\nhalf"
                .to_owned(),
        ),
        (
            "an upstream that is down",
            502,
            "PUT /v2/team/demo/manifests/1 HTTP/1.1\r\nHost: ghcr.io\r\nContent-Length: 9\r\n\r\nhalf"
                .to_owned(),
        ),
    ] {
        let reply = raw(proxy.registry_address(), head.as_bytes()).await;
        let text = reply
            .text
            .strip_prefix("HTTP/1.1 100 Continue\r\n\r\n")
            .unwrap_or(&reply.text);
        assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {text}");
        assert!(says_close(text), "{what}: {text}");
    }
}

#[tokio::test]
async fn k7_a_response_to_malformed_http_says_close() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let many = format!("x-filler: {}\r\n", "y".repeat(1000)).repeat(70);
    for (what, bytes) in [
        ("no Host", "GET /v2/ HTTP/1.1\r\n\r\n".to_owned()),
        (
            "two Hosts",
            "GET /v2/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".to_owned(),
        ),
        (
            "a Host that is none",
            "GET /v2/ HTTP/1.1\r\nHost: a b\r\n\r\n".to_owned(),
        ),
        (
            "two lengths",
            "GET /v2/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx".to_owned(),
        ),
        (
            "a length that is none",
            "GET /v2/ HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n".to_owned(),
        ),
        (
            "a space in a name",
            "GET /v2/ HTTP/1.1\r\nHost : a\r\n\r\n".to_owned(),
        ),
        ("no HTTP", "hello\r\n\r\n".to_owned()),
        (
            "another version",
            "GET /v2/ HTTP/4.2\r\nHost: a\r\n\r\n".to_owned(),
        ),
        (
            "a target with a space",
            "GET /v2/ x HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        ),
        (
            "a long target",
            format!("GET /v2/{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(70_000)),
        ),
        (
            "many headers",
            format!("GET /v2/ HTTP/1.1\r\nHost: a\r\n{many}\r\n"),
        ),
    ] {
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert!(
            matches!(reply.status(), Some(400 | 414 | 431)),
            "{what}: {}",
            reply.text
        );
        assert!(says_close(&reply.text), "{what}: {}", reply.text);
    }
}

/// The bytes after a rejected `CONNECT` were meant for the tunnel.
#[tokio::test]
async fn k7_a_refused_connect_ends_its_connection() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    for target in ["evil.example:443", "ghcr.io:22", "docker.io"] {
        let bytes = format!(
            "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n\
             GET /v2/library/demo/manifests/1 HTTP/1.1\r\nHost: a\r\n\r\n"
        );
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert!(
            matches!(reply.status(), Some(400 | 403)),
            "{target}: {}",
            reply.text
        );
        assert!(says_close(&reply.text), "{target}: {}", reply.text);
        assert_eq!(reply.replies(), 1, "{target}: {}", reply.text);
    }
    assert_eq!(upstream.connections(), 0);
}

/// A push whose body was read completely keeps its connection.
#[tokio::test]
async fn k7_a_body_read_whole_keeps_the_connection() {
    let (_hub, other, proxy) = two_upstreams().await;
    other.push("team/demo", "1", Image::with_layers(&["one"]));
    let mut stream = TcpStream::connect(proxy.registry_address()).await.unwrap();
    for _ in 0..2 {
        let request =
            b"POST /v2/team/demo/blobs/uploads/ HTTP/1.1\r\nHost: ghcr.io\r\nContent-Length: 4\r\n\r\nbody";
        stream.write_all(request).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within("a response", stream.read_u8()).await.unwrap());
        }
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        assert!(!says_close(&head), "{head}");
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let length = length.map_or(0, |length| length.parse().unwrap());
        let mut body = vec![0; length];
        within("its body", stream.read_exact(&mut body)).await.unwrap();
    }
}

#[tokio::test]
async fn k7_a_response_while_the_process_ends_says_close() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let mut proxy = Proxy::over(&upstream).await;
    let gate = upstream.delays_answers(|seen| seen.path.contains("/manifests/"));
    let path = manifest_path("library/demo", "1");
    let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
    let address = proxy.registry_address();
    let asked = tokio::spawn(async move { raw(address, request.as_bytes()).await });
    gate.reached().await;
    proxy.terminate();
    proxy.until_closed().await;
    gate.release();
    let reply = asked.await.unwrap();
    assert_eq!(reply.status(), Some(200), "{}", reply.text);
    assert!(says_close(&reply.text), "{}", reply.text);
    assert_eq!(proxy.exit().await, Some(0));
}
