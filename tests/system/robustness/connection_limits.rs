//! Connection limits per address and for the process, and the choice of the idle connection to close.

use crate::proxy::{Program, Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream, within};
use std::net::{Ipv4Addr, SocketAddr};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// A cache without idle timeout for connections.
pub async fn patient(limits: &str, listen: &str) -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let limits = format!("[limits]\nheader_timeout = \"10m\"\nidle_timeout = \"10m\"\n{limits}");
    let proxy = Setup::over(&upstream)
        .listen_keys(listen)
        .tail(&limits)
        .start()
        .await;
    (upstream, proxy, image)
}

/// A connection from 127.0.0.`last`.
pub async fn from(last: u8, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
    within("a connection", socket.connect(to)).await.unwrap()
}

/// Sends one request and reads its reply; the connection stays open.
pub async fn asks(stream: &mut TcpStream, before: &str) -> String {
    let request = format!("{before}GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = [0; 1024];
    let read = within("an answer", stream.read(&mut reply)).await.unwrap();
    String::from_utf8_lossy(&reply[..read]).into_owned()
}

pub async fn is_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let ended = within("the connection to be closed", stream.read_to_end(&mut rest)).await;
    assert!(
        ended.is_err() || rest.is_empty(),
        "{}",
        String::from_utf8_lossy(&rest)
    );
}

/// Waits until `/metrics` has this line.
pub async fn counts(proxy: &Proxy, line: &str) {
    let line = format!("{line}\n");
    proxy
        .until(
            &line,
            |proxy| proxy.admin("/metrics"),
            |reply| String::from_utf8_lossy(&reply.body).contains(&line),
        )
        .await;
}

#[tokio::test]
async fn t10_idle_connections_of_one_address_stop_no_other() {
    let limits = "connections_max = 8\nconnections_per_peer_max = 4";
    let (_upstream, proxy, _image) = patient(limits, "").await;
    let mut idle = Vec::new();
    for _ in 0..8 {
        idle.push(from(1, proxy.registry_address()).await);
    }
    counts(
        &proxy,
        "ifnewer_connections{listener=\"registry\",state=\"open\"} 4",
    )
    .await;
    counts(
        &proxy,
        "ifnewer_connections{listener=\"registry\",state=\"waiting\"} 4",
    )
    .await;
    // As many permits are free as before.
    let mut others = Vec::new();
    for last in 2..6 {
        let mut other = from(last, proxy.registry_address()).await;
        assert!(asks(&mut other, "").await.starts_with("HTTP/1.1 200 "));
        others.push(other);
    }
    let metrics = proxy.admin("/metrics").await;
    let metrics = String::from_utf8_lossy(&metrics.body);
    assert!(
        !metrics.contains("ifnewer_connections_closed_total{"),
        "{metrics}"
    );
}

#[tokio::test]
async fn t10_the_oldest_quiet_connection_is_closed_for_another() {
    let limits = "connections_max = 3\nconnections_per_peer_max = 3";
    let (_upstream, proxy, _image) = patient(limits, "").await;
    let address = proxy.registry_address();
    let (mut silent, mut idle) = (from(1, address).await, from(2, address).await);
    assert!(asks(&mut idle, "").await.starts_with("HTTP/1.1 200 "));
    let mut third = from(3, address).await;
    assert!(asks(&mut third, "").await.starts_with("HTTP/1.1 200 "));
    let mut newcomer = from(4, address).await;
    assert!(asks(&mut newcomer, "").await.starts_with("HTTP/1.1 200 "));
    is_closed(&mut silent).await;
    assert!(asks(&mut idle, "").await.starts_with("HTTP/1.1 200 "));
    // The most recently active one.
    let mut another = from(5, address).await;
    assert!(asks(&mut another, "").await.starts_with("HTTP/1.1 200 "));
    is_closed(&mut third).await;
    assert!(asks(&mut idle, "").await.starts_with("HTTP/1.1 200 "));
    proxy
        .program()
        .says("closed an idle connection for a new one")
        .await;
    counts(
        &proxy,
        "ifnewer_connections_closed_total{listener=\"registry\",reason=\"connection-limit\"} 2",
    )
    .await;
}

#[tokio::test]
async fn t10_a_request_in_flight_is_not_closed_for_another() {
    let limits = "connections_max = 1\nconnections_per_peer_max = 1";
    let (upstream, proxy, image) = patient(limits, "").await;
    let gate = upstream.holds_answers(|seen| seen.path.contains("/manifests/"));
    let busy = tokio::spawn(proxy.manifest("library/demo", "latest").tried());
    within("the request at the upstream", gate.reached()).await;
    let mut newcomer = from(2, proxy.registry_address()).await;
    newcomer
        .write_all(b"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    gate.release();
    busy.await.unwrap().unwrap().is_image(&image);
    let mut reply = [0; 12];
    within("an answer", newcomer.read_exact(&mut reply))
        .await
        .unwrap();
    assert_eq!(&reply, b"HTTP/1.1 200");
}

#[tokio::test]
async fn t10_behind_a_balancer_each_client_has_its_own_places() {
    let (_upstream, proxy, _image) = patient(
        "connections_per_peer_max = 1",
        "proxy_protocol_from = [\"127.0.0.1\"]",
    )
    .await;
    let header = |last: u8| format!("PROXY TCP4 127.0.0.{last} 127.0.0.1 1 2\r\n");
    let mut clients = Vec::new();
    for last in 2..6 {
        let mut client = from(1, proxy.registry_address()).await;
        assert!(
            asks(&mut client, &header(last))
                .await
                .starts_with("HTTP/1.1 200 ")
        );
        clients.push(client);
    }
    // A second connection of the first client waits until the first one ends. The load balancer's does not.
    let mut second = from(1, proxy.registry_address()).await;
    second.write_all(header(2).as_bytes()).await.unwrap();
    counts(
        &proxy,
        "ifnewer_connections{listener=\"registry\",state=\"waiting\"} 1",
    )
    .await;
    let mut other = from(1, proxy.registry_address()).await;
    assert!(asks(&mut other, &header(7)).await.starts_with("HTTP/1.1 200 "));
    drop(clients.remove(0));
    assert!(asks(&mut second, "").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn t10_waiting_and_silent_connections_do_not_delay_the_end() {
    let (_upstream, mut proxy, _image) = patient("connections_per_peer_max = 2\ndrain = \"10m\"", "").await;
    let mut idle = Vec::new();
    for _ in 0..4 {
        idle.push(from(1, proxy.registry_address()).await);
    }
    counts(
        &proxy,
        "ifnewer_connections{listener=\"registry\",state=\"waiting\"} 2",
    )
    .await;
    proxy.terminate();
    assert_eq!(within("the end", proxy.exit()).await, Some(0));
}

#[tokio::test]
async fn t10_check_says_what_few_descriptors_allow() {
    let setup = Setup::empty();
    let file = setup.file("right.toml", &setup.toml());
    let script = "ulimit -n 1024; exec \"$0\" check --config \"$1\"";
    let arguments = [
        "-c",
        script,
        env!("CARGO_BIN_EXE_ifnewer"),
        file.to_str().unwrap(),
    ];
    let mut program = Program::start_with("bash", &arguments, setup.folder());
    assert_eq!(program.exit().await, Some(0), "{}", program.stderr());
    let said = program.stdout();
    assert!(
        said.contains("1024 file descriptors allow 204 connections (connections_max = 4096)"),
        "{said}"
    );
}

#[tokio::test]
async fn t10_with_few_descriptors_idle_connections_stop_no_cold_pull() {
    let upstream = Upstream::start().await;
    let image = upstream.push(
        "library/demo",
        "latest",
        Image::with_layers(&["one", "two", "three"]),
    );
    let proxy = Setup::over(&upstream)
        .tail("[limits]\nheader_timeout = \"10m\"\nidle_timeout = \"10m\"")
        .through(&["bash", "-c", "ulimit -n 256; exec \"$@\"", "limited"])
        .start()
        .await;
    proxy.program().says("connections=51").await;
    let mut idle = Vec::new();
    for _ in 0..400 {
        idle.push(from(1, proxy.registry_address()).await);
    }
    proxy.pull("library/demo", "latest", &image).await;
    let reply = proxy.get(&manifest_path("library/demo", "latest")).await;
    reply.is_image(&image).is_hit();
}
