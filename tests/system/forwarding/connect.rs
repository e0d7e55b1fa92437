//! `CONNECT`: upstreams are intercepted, allowed hosts tunnelled, and others rejected.

use crate::forwarding::host_routing::two_upstreams;
use crate::proxy::{Ask, Proxy, Setup, manifest_path, raw};
use crate::registry::{Image, Upstream, within};
use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

async fn connect(proxy: &Proxy, target: &str) -> crate::proxy::RawReply {
    let bytes = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n");
    raw(proxy.registry_address(), bytes.as_bytes()).await
}

/// An open tunnel and the bytes received through it.
async fn open(proxy: &Proxy, target: &str) -> TcpStream {
    let mut stream = TcpStream::connect(proxy.registry_address()).await.unwrap();
    let bytes = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut reply = Vec::new();
    while !reply.ends_with(b"\r\n\r\n") {
        reply.push(within("the tunnel", stream.read_u8()).await.unwrap());
    }
    let reply = String::from_utf8(reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
    stream
}

async fn metrics(proxy: &Proxy) -> String {
    String::from_utf8_lossy(&proxy.admin("/metrics").await.body).into_owned()
}

#[tokio::test]
async fn connect_to_unconfigured_host_is_rejected() {
    let (hub, other, proxy) = two_upstreams().await;
    let address = hub.address().to_string();
    for target in [
        "evil.example:443",
        "evil.example:22",
        "ghcr.io:22",
        "ghcr.io:80",
        "127.0.0.1:22",
        "169.254.169.254:80",
        "[::1]:443",
        address.as_str(),
        "user@ghcr.io:443",
    ] {
        let reply = connect(&proxy, target).await;
        assert!(
            matches!(reply.status(), Some(400 | 403)),
            "{target}: {}",
            reply.text
        );
        if target == "evil.example:443" {
            assert!(
                reply.text.contains("add it to [connect] tunnel"),
                "{}",
                reply.text
            );
        }
    }
    for malformed in ["ghcr.io", "/v2/", "*", "http://ghcr.io/", ":443"] {
        let reply = connect(&proxy, malformed).await;
        assert!(
            matches!(reply.status(), Some(400..=499) | None),
            "{malformed}: {}",
            reply.text
        );
    }
    assert_eq!((hub.connections(), other.connections()), (0, 0));
    assert!(metrics(&proxy).await.contains("reason=\"tunnel-not-allowed\""));
}

#[tokio::test]
async fn a_whole_pull_goes_through_it() {
    let (_hub, other, proxy) = two_upstreams().await;
    let image = other.push("team/demo", "1", Image::with_layers(&["one", "two"]));
    let ca = proxy.ca_pem();
    let dress = |ask: Ask| ask.tls(&ca, &[]).through_connect("ghcr.io:443");
    proxy
        .pull_with("team/demo", "1", &image, dress)
        .await
        .is_fetched();
    other.refuses();
    proxy.pull_with("team/demo", "1", &image, dress).await.is_stale();
    let by_tls = |ask: Ask| {
        ask.tls(&ca, &["h2"])
            .through_connect("ghcr.io:443")
            .with_tls_to_proxy()
    };
    proxy.pull_with("team/demo", "1", &image, by_tls).await.is_stale();
}

#[tokio::test]
async fn a_named_host_is_tunnelled_to_unread_and_counted() {
    let (hub, elsewhere) = (Upstream::start().await, Upstream::start_tls().await);
    let target = elsewhere.address().to_string();
    let proxy = Setup::over(&hub)
        .tail(&format!("[connect]\ntunnel = [\"{target}\"]"))
        .start()
        .await;
    // The client sees the certificate of that host.
    let ask = proxy.get("/v2/").tls(elsewhere.ca_pem(), &["h2"]);
    let reply = ask.through_connect(&target).unchecked().await;
    assert_eq!(
        (reply.status, reply.header("cache-status")),
        (200, None),
        "{reply:#?}"
    );
    assert_eq!(elsewhere.requests().len(), 1);

    let stream = open(&proxy, &target).await;
    // The first one has ended by then.
    proxy
        .until(
            "one tunnel",
            |proxy| proxy.admin("/metrics"),
            |reply| String::from_utf8_lossy(&reply.body).contains("ifnewer_tunnels 1\n"),
        )
        .await;
    drop(stream);
    let counted = |direction: &'static str| {
        let name = format!("ifnewer_tunnel_bytes_total{{direction=\"{direction}\"}} ");
        move |text: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(&name).map(str::to_owned));
            line.and_then(|bytes| bytes.parse::<u64>().ok()).unwrap_or(0)
        }
    };
    let text = metrics(&proxy).await;
    assert!(
        counted("to-host")(&text) > 100 && counted("to-client")(&text) > 100,
        "{text}"
    );
    proxy
        .until(
            "the tunnel to end",
            |proxy| proxy.admin("/metrics"),
            |reply| String::from_utf8_lossy(&reply.body).contains("ifnewer_tunnels 0"),
        )
        .await;
}

#[tokio::test]
async fn upstream_glob_reaches_no_local_address() {
    let (hub, elsewhere) = (Upstream::start().await, Upstream::start().await);
    let port = elsewhere.address().port();
    let proxy = Setup::over(&hub)
        .tail(&format!("[connect]\ntunnel = [\"*:{port}\", \"*:80\"]"))
        .start()
        .await;
    for target in [
        format!("127.0.0.1:{port}"),
        format!("localhost:{port}"),
        "169.254.169.254:80".to_owned(),
    ] {
        let reply = connect(&proxy, &target).await;
        assert_eq!(reply.status(), Some(403), "{target}: {}", reply.text);
    }
    assert_eq!(elsewhere.connections(), 0);
}

#[tokio::test]
async fn there_are_only_so_many_tunnels() {
    let (hub, elsewhere) = (Upstream::start().await, Upstream::start().await);
    let target = elsewhere.address().to_string();
    let proxy = Setup::over(&hub)
        .tail(&format!(
            "[connect]\ntunnel = [\"{target}\"]\n[limits]\ntunnels_max = 2"
        ))
        .start()
        .await;
    let (first, _second) = (open(&proxy, &target).await, open(&proxy, &target).await);
    within("both to be accepted", async {
        while elsewhere.connections() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let reply = connect(&proxy, &target).await;
    assert_eq!(reply.status(), Some(503), "{}", reply.text);
    assert!(reply.text.contains("retry-after: 5\r\n"), "{}", reply.text);
    assert_eq!(
        elsewhere.connections(),
        2,
        "a tunnel that cannot be had costs no connection"
    );
    drop(first);
    proxy
        .until(
            "a place",
            |proxy| proxy.admin("/metrics"),
            |reply| String::from_utf8_lossy(&reply.body).contains("ifnewer_tunnels 1"),
        )
        .await;
    open(&proxy, &target).await;
}

/// Each `CONNECT` stream of HTTP/2 has a TLS session with streams and windows of its own.
#[tokio::test]
async fn a_connection_has_few_intercepted_sessions() {
    let (_hub, _other, proxy) = two_upstreams().await;
    let stream = TcpStream::connect(proxy.registry_address()).await.unwrap();
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let mut connect = async || {
        let request = Request::connect("ghcr.io:443")
            .body(Empty::<Bytes>::new())
            .unwrap();
        let response = within("the response", sender.send_request(request))
            .await
            .unwrap();
        (response.status().as_u16(), response)
    };
    let mut open = Vec::new();
    for _ in 0..4 {
        let (status, response) = connect().await;
        assert_eq!(status, 200);
        open.push(response);
    }
    let (status, refused) = connect().await;
    assert_eq!(status, 503);
    assert_eq!(refused.headers()["retry-after"], "5");
    assert!(metrics(&proxy).await.contains("reason=\"too-many-sessions\""));
    // Its stream ends with the response.
    open.pop();
    within("a permit", async { while connect().await.0 != 200 {} }).await;
}

#[tokio::test]
async fn a_tunnel_on_which_nothing_moves_is_closed() {
    let (hub, elsewhere) = (Upstream::start().await, Upstream::start().await);
    let target = elsewhere.address().to_string();
    let proxy = Setup::over(&hub)
        .tail(&format!(
            "[connect]\ntunnel = [\"{target}\"]\n[limits]\nidle_timeout = \"300ms\""
        ))
        .start()
        .await;
    let mut stream = open(&proxy, &target).await;
    let mut rest = Vec::new();
    let ended = within("the tunnel to be closed", stream.read_to_end(&mut rest)).await;
    assert!(ended.is_err() || rest.is_empty());
}

#[tokio::test]
async fn a_host_that_is_down_is_told_as_such() {
    let (hub, elsewhere) = (Upstream::start().await, Upstream::start().await);
    let target = elsewhere.address().to_string();
    elsewhere.refuses();
    let proxy = Setup::over(&hub)
        .tail(&format!("[connect]\ntunnel = [\"{target}\"]"))
        .start()
        .await;
    let reply = connect(&proxy, &target).await;
    assert_eq!(reply.status(), Some(502), "{}", reply.text);
    assert!(reply.text.contains(&target), "{}", reply.text);
}

#[tokio::test]
async fn the_host_where_an_upstream_gives_tokens_is_tunnelled_to() {
    let (other, tokens) = (Upstream::start().await, Upstream::start_tls().await);
    other.requires_token();
    let target = tokens.address().to_string();
    other.names_realm(&format!("https://{target}/token"));
    let proxy = Setup::empty().also("ghcr.io", &other).start().await;
    let ping = proxy
        .get("/v2/")
        .tls(&proxy.ca_pem(), &[])
        .through_connect("ghcr.io:443");
    assert_eq!(ping.unchecked().await.status, 401);

    let ask = proxy.get("/token?service=scripted").tls(tokens.ca_pem(), &[]);
    let reply = ask.through_connect(&target).unchecked().await;
    assert_eq!(reply.status, 200, "{reply:#?}");
    assert_eq!(tokens.token_requests().len(), 1);
    // Only this port of the host.
    let reply = connect(&proxy, "127.0.0.1:22").await;
    assert_eq!(reply.status(), Some(403), "{}", reply.text);
}

#[tokio::test]
async fn within_it_there_is_no_further_one() {
    let (_hub, other, proxy) = two_upstreams().await;
    other.push("team/demo", "1", Image::with_layers(&["one"]));
    let ca = proxy.ca_pem();
    let reply = proxy
        .ask("CONNECT", "ghcr.io:443")
        .tls(&ca, &["http/1.1"])
        .through_connect("ghcr.io:443")
        .unchecked()
        .await;
    assert!(matches!(reply.status, 400 | 403 | 421), "{reply:#?}");
    let path = manifest_path("team/demo", "1");
    let ask = proxy.get(&path).tls(&ca, &[]).through_connect("ghcr.io:443");
    assert_eq!(ask.await.status, 200);
}

#[tokio::test]
async fn an_open_tunnel_does_not_hold_up_the_end() {
    let (hub, elsewhere) = (Upstream::start().await, Upstream::start().await);
    let target = elsewhere.address().to_string();
    let mut proxy = Setup::over(&hub)
        .tail(&format!(
            "[connect]\ntunnel = [\"{target}\"]\n[limits]\ndrain = \"10m\""
        ))
        .start()
        .await;
    let _stream = open(&proxy, &target).await;
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
}
