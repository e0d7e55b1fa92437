//! Limits of the admin listener: health checks are served under load, and wrong tokens are delayed.

use crate::proxy::{Ask, Proxy, Setup, blob_path};
use crate::registry::{Image, Upstream, within};
use std::net::Ipv4Addr;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// Sends bytes to the admin listener from 127.0.0.`last` and returns the start of the response.
async fn sent(proxy: &Proxy, last: u8, bytes: &[u8]) -> (TcpStream, String) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
    let mut stream = within("a connection", socket.connect(proxy.admin_address()))
        .await
        .unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut reply = vec![0; 2048];
    let read = if bytes.is_empty() {
        0
    } else {
        within("an answer", stream.read(&mut reply)).await.unwrap()
    };
    (stream, String::from_utf8_lossy(&reply[..read]).into_owned())
}

/// `ifnewer healthcheck` and `/metrics` respond.
async fn is_healthy(proxy: &Proxy) {
    let address = proxy.admin_address().to_string();
    let config = proxy.setup().folder().join("ifnewer.toml");
    let mut program = proxy.setup().run(&[
        "healthcheck",
        "--config",
        config.to_str().unwrap(),
        "--admin",
        &address,
    ]);
    assert_eq!(program.exit().await, Some(0), "{}", program.stderr());
    assert_eq!(proxy.admin("/healthz").await.status, 200);
    assert_eq!(proxy.admin("/metrics").await.status, 200);
}

#[tokio::test]
async fn t14_idle_admin_connections_do_not_stop_health() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(sent(&proxy, 1, b"").await.0);
    }
    is_healthy(&proxy).await;
    proxy.program().says("address-limit").await;
    // Another address has its own permits.
    let (_stream, reply) = sent(
        &proxy,
        2,
        b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n",
    )
    .await;
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
}

#[tokio::test]
async fn t14_event_streams_do_not_stop_health_nor_requests() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let (mut streams, mut watching) = (Vec::new(), 0);
    for _ in 0..300 {
        let ask = b"GET /api/v1/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let (stream, reply) = sent(&proxy, 1, ask).await;
        let is_watching = reply.starts_with("HTTP/1.1 200 ");
        assert!(is_watching || reply.starts_with("HTTP/1.1 503 "), "{reply}");
        assert!(is_watching || reply.contains("retry-after: 1\r\n"), "{reply}");
        watching += usize::from(is_watching);
        streams.push(stream);
    }
    assert_eq!(watching, 32);
    is_healthy(&proxy).await;
    assert_eq!(proxy.admin("/api/v1/status").await.status, 200);
    // Another address has permits left.
    let ask = b"GET /api/v1/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let (_stream, reply) = sent(&proxy, 2, ask).await;
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
}

#[tokio::test]
async fn t14_bodies_that_never_come_do_not_stop_health() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let head = b"POST /api/v1/refresh HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                 Content-Length: 9\r\nExpect: 100-continue\r\n\r\n";
    let (mut waiting, mut refused) = (Vec::new(), 0);
    for _ in 0..200 {
        let (stream, reply) = sent(&proxy, 1, head).await;
        let is_asked = reply.starts_with("HTTP/1.1 100 ");
        assert!(is_asked || reply.starts_with("HTTP/1.1 503 "), "{reply}");
        refused += usize::from(!is_asked);
        waiting.push(stream);
    }
    assert_eq!(refused, 200 - 64);
    is_healthy(&proxy).await;
}

#[tokio::test]
async fn t14_wrong_admin_tokens_are_slowed_logged_and_counted() {
    let upstream = Upstream::start().await;
    let setup = Setup::over(&upstream);
    let token = setup.file("admin.token", "0123456789abcdef\n");
    let proxy = setup
        .listen_keys(&format!("admin_token_file = {token:?}"))
        .start()
        .await;
    let guesses: Vec<_> = (0..40)
        .map(|at| {
            tokio::spawn(
                proxy
                    .admin("/api/v1/status")
                    .bearer(&format!("wrong-{at}"))
                    .tried(),
            )
        })
        .collect();
    let mut statuses = Vec::new();
    for guess in guesses {
        let reply = guess.await.unwrap().unwrap();
        if reply.status == 429 {
            assert!(reply.header("retry-after").is_some(), "{reply:#?}");
        }
        statuses.push(reply.status);
    }
    let compared = statuses.iter().filter(|status| **status == 401).count();
    assert!((10..40).contains(&compared), "{statuses:?}");
    assert!(statuses.iter().all(|status| matches!(status, 401 | 429)));
    let line = proxy.program().says("wrong admin token").await;
    assert!(line.contains("client=127.0.0.1 wrong=1"), "{line}");
    let metrics = proxy.admin("/metrics").await;
    let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
    for (reason, count) in [("wrong", compared), ("too-many", 40 - compared)] {
        let line = format!("ifnewer_admin_tokens_refused_total{{reason=\"{reason}\"}} {count}\n");
        assert!(metrics.contains(&line), "{metrics}");
    }
    // Other clients are not delayed, and the right token from the same address is accepted.
    let right =
        b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer 0123456789abcdef\r\n\r\n";
    for last in [2, 1] {
        let (_stream, reply) = sent(&proxy, last, right).await;
        assert!(reply.starts_with("HTTP/1.1 200 "), "127.0.0.{last}: {reply}");
    }
}

#[tokio::test]
async fn e15_health_is_answered_while_the_disk_does_not_answer() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    let proxy = proxy.restart().await;
    // Opening a FIFO blocks until a writer opens it, as opening a file does on a hung disk.
    let digest = &image.blobs[1].digest;
    let file = proxy.setup().kept_blob(digest).unwrap();
    std::fs::remove_file(&file).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&file).status().unwrap();
    assert!(made.success());
    let mut waiting = Vec::new();
    for _ in 0..16 {
        let ask = Ask::new(
            proxy.registry_address(),
            "GET",
            &blob_path("library/demo", digest),
        );
        waiting.push(tokio::spawn(ask.unchecked().tried()));
    }
    for _ in 0..20 {
        is_healthy(&proxy).await;
    }
    // The response names the cause.
    proxy
        .until(
            "the disk to be named",
            |proxy| proxy.admin("/readyz"),
            |reply| {
                let said = String::from_utf8_lossy(&reply.body);
                assert!(reply.status == 200 && said.starts_with("ready\n"), "{said}");
                said.contains("disk operation `open` has been running for")
            },
        )
        .await;
    is_healthy(&proxy).await;
}
