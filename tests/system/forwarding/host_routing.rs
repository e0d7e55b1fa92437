//! Routing by host: an upstream's own name resolves to the cache, which serves it with a certificate of its CA.

use crate::proxy::{Ask, Proxy, Setup, manifest_path, raw};
use crate::registry::{Image, Upstream, within};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// docker.io and ghcr.io, each an upstream of its own.
pub async fn two_upstreams() -> (Upstream, Upstream, Proxy) {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let proxy = Setup::over(&hub).also("ghcr.io", &other).start().await;
    (hub, other, proxy)
}

#[tokio::test]
async fn one_image_is_held_once_whatever_the_door() {
    let (_hub, other, proxy) = two_upstreams().await;
    let image = other.push("team/demo", "1", Image::with_layers(&["one"]));
    let ca = proxy.ca_pem();
    proxy.pull("ghcr.io/team/demo", "1", &image).await.is_fetched();
    other.clear_log();

    let path = manifest_path("team/demo", "1");
    let here = || proxy.get(&path);
    let doors: [(&str, Ask); 8] = [
        ("prefix", proxy.get(&manifest_path("ghcr.io/team/demo", "1"))),
        ("ns", proxy.get(&format!("{path}?ns=ghcr.io"))),
        ("Host", here().header("host", "ghcr.io")),
        ("SNI, no ALPN", here().tls(&ca, &[]).server_name("ghcr.io")),
        (
            "SNI, HTTP/1.1",
            here().tls(&ca, &["http/1.1"]).server_name("ghcr.io"),
        ),
        ("SNI, h2", here().tls(&ca, &["h2"]).server_name("ghcr.io")),
        (
            "CONNECT, no ALPN",
            here().tls(&ca, &[]).through_connect("ghcr.io:443"),
        ),
        (
            "CONNECT, h2",
            here().tls(&ca, &["h2"]).through_connect("ghcr.io:443"),
        ),
    ];
    for (door, ask) in doors {
        let reply = ask.await;
        assert_eq!(reply.status, 200, "{door}: {reply:#?}");
        reply.is_image(&image).is_unchanged();
    }
    assert_eq!(other.manifest_gets("team/demo"), 0);
    let metrics = proxy.admin("/metrics").await;
    let text = String::from_utf8_lossy(&metrics.body).into_owned();
    for door in ["prefix", "ns", "host", "connect"] {
        let label = format!("upstream=\"ghcr.io\",route=\"{door}\",kind=\"tag\"");
        assert!(text.contains(&label), "{door}: {text}");
    }
}

#[tokio::test]
async fn every_name_of_an_upstream_is_its_door() {
    let (hub, _other, proxy) = two_upstreams().await;
    let image = hub.push("library/demo", "1", Image::with_layers(&["one"]));
    let ca = proxy.ca_pem();
    for name in [
        "docker.io",
        "index.docker.io",
        "registry-1.docker.io",
        "REGISTRY-1.docker.io",
    ] {
        let ask = proxy.get(&manifest_path("library/demo", "1")).tls(&ca, &[]);
        ask.server_name(name).await.is_image(&image);
    }
    assert_eq!(hub.manifest_gets("library/demo"), 1);
}

#[tokio::test]
async fn a_path_means_what_it_says_to_the_registry_itself() {
    let (hub, other, proxy) = two_upstreams().await;
    hub.push("team/demo", "1", Image::with_layers(&["hub"]));
    let theirs = other.push("docker.io/team/demo", "1", Image::with_layers(&["theirs"]));
    let path = manifest_path("docker.io/team/demo", "1");
    let ask = |path: &str| proxy.get(path).header("host", "ghcr.io");
    ask(&path).await.is_image(&theirs);
    ask(&format!("{path}?ns=ghcr.io")).await.is_image(&theirs);
    assert_eq!(hub.requests().len(), 0);
}

#[tokio::test]
async fn connection_and_request_must_name_one_host() {
    let (hub, other, proxy) = two_upstreams().await;
    let ca = proxy.ca_pem();
    let ask = || proxy.get("/v2/").tls(&ca, &["http/1.1"]).unchecked();
    let h2 = || proxy.get("/v2/").tls(&ca, &["h2"]).unchecked();
    let asks = [
        (
            "another upstream",
            ask().header("host", "quay.io").server_name("ghcr.io"),
        ),
        (
            "the cache",
            ask().header("host", "localhost").server_name("ghcr.io"),
        ),
        (
            "an upstream, by the cache's name",
            ask().header("host", "ghcr.io"),
        ),
        (
            "an alias",
            ask()
                .header("host", "docker.io")
                .server_name("registry-1.docker.io"),
        ),
        (
            "another :authority",
            h2().header("host", "quay.io").server_name("ghcr.io"),
        ),
        (
            "not what CONNECT named",
            ask().header("host", "quay.io").through_connect("ghcr.io:443"),
        ),
        (
            "not what CONNECT named, in TLS",
            ask().through_connect("ghcr.io:443").server_name("quay.io"),
        ),
    ];
    for (what, ask) in asks {
        let reply = ask.await;
        assert_eq!(reply.status, 421, "{what}: {reply:#?}");
        assert_eq!(reply.code(), "UNSUPPORTED", "{what}");
    }
    for (what, head) in [
        (
            "two hosts",
            "GET /v2/ HTTP/1.1\r\nHost: ghcr.io\r\nHost: quay.io\r\n",
        ),
        ("no host", "GET /v2/ HTTP/1.1\r\n"),
        (
            "target and host",
            "GET http://ghcr.io/v2/ HTTP/1.1\r\nHost: quay.io\r\n",
        ),
        (
            "CONNECT and host",
            "CONNECT ghcr.io:443 HTTP/1.1\r\nHost: quay.io:443\r\n",
        ),
    ] {
        let bytes = format!("{head}Connection: close\r\n\r\n");
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        let expected = if what.contains("and") { 421 } else { 400 };
        assert_eq!(reply.status(), Some(expected), "{what}: {}", reply.text);
    }
    assert_eq!(hub.connections(), 0);
    // A client that uses CONNECT follows the registry's challenge, so only that is requested.
    assert!(
        other.requests().iter().all(|seen| seen.path == "/v2/"),
        "{:#?}",
        other.requests()
    );
}

#[tokio::test]
async fn unknown_host_is_404_and_not_connected_to() {
    let (hub, other, proxy) = two_upstreams().await;
    for target in [
        hub.url(),
        "http://evil.example".to_owned(),
        "http://169.254.169.254".to_owned(),
    ] {
        let host = target.strip_prefix("http://").unwrap();
        let bytes = format!(
            "GET {target}/v2/library/demo/manifests/1 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        );
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert_eq!(reply.status(), Some(404), "{target}: {}", reply.text);
        assert!(reply.text.contains("NAME_UNKNOWN"), "{}", reply.text);
    }
    let wrong_port = proxy
        .get("/v2/")
        .tls(&proxy.ca_pem(), &[])
        .header("host", "ghcr.io:8443");
    let reply = wrong_port.server_name("ghcr.io").unchecked().await;
    assert_eq!(reply.status, 404, "{reply:#?}");
    assert_eq!((hub.connections(), other.connections()), (0, 0));
}

#[tokio::test]
async fn the_real_upstream_is_verified_as_strictly_as_ever() {
    let other = Upstream::start_tls().await;
    other.push("team/demo", "1", Image::with_layers(&["one"]));
    let proxy = Setup::empty().also("ghcr.io", &other).start().await;
    let ask = || {
        proxy
            .get(&manifest_path("team/demo", "1"))
            .tls(&proxy.ca_pem(), &[])
    };
    let through = || ask().through_connect("ghcr.io:443").unchecked();
    assert_eq!(through().await.status, 200);
    other.presents_foreign_certificate();
    let fresh = proxy
        .get(&manifest_path("team/demo", "2"))
        .tls(&proxy.ca_pem(), &[]);
    let reply = fresh.through_connect("ghcr.io:443").unchecked().await;
    assert!(matches!(reply.status, 502..=504), "{reply:#?}");
    let written = proxy
        .ask("PUT", &manifest_path("team/demo", "2"))
        .tls(&proxy.ca_pem(), &[]);
    let reply = written
        .through_connect("ghcr.io:443")
        .body(b"{}")
        .unchecked()
        .await;
    assert!(matches!(reply.status, 502..=504), "{reply:#?}");
}

#[tokio::test]
async fn ca_does_not_issue_for_upstream_added_later() {
    let (hub, late) = (Upstream::start().await, Upstream::start().await);
    let image = late.push("team/demo", "1", Image::with_layers(&["one"]));
    let setup = Setup::over(&hub);
    let proxy = setup.clone().start().await;
    let proxy = proxy.restart_as(setup.also("late.example.org", &late)).await;
    let path = manifest_path("team/demo", "1");
    let raw_reply = raw(
        proxy.registry_address(),
        b"CONNECT late.example.org:443 HTTP/1.1\r\nHost: late.example.org:443\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert_eq!(raw_reply.status(), Some(403), "{}", raw_reply.text);
    assert!(raw_reply.text.contains("ifnewer ca rotate"), "{}", raw_reply.text);
    // The mirror routes need no leaf certificate.
    proxy
        .get(&format!("{path}?ns=late.example.org"))
        .await
        .is_image(&image);

    let config = proxy.setup().folder().join("ifnewer.toml");
    let mut rotated = proxy
        .setup()
        .run(&["ca", "rotate", "--config", config.to_str().unwrap()]);
    assert_eq!(rotated.exit().await, Some(0), "{}", rotated.stderr());
    let proxy = proxy.restart().await;
    let ask = proxy.get(&path).tls(&proxy.ca_pem(), &["h2"]);
    ask.through_connect("late.example.org:443").await.is_image(&image);
}

#[tokio::test]
async fn ca_key_readable_by_others_prevents_start() {
    use std::os::unix::fs::PermissionsExt as _;
    let upstream = Upstream::start().await;
    let setup = Setup::over(&upstream);
    let proxy = setup.clone().start().await;
    let key = setup.folder().join("certs/ca.key");
    let mode = std::fs::metadata(&key).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    drop(proxy);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut program = setup.serve();
    assert_eq!(program.exit().await, Some(2));
    assert!(program.stderr().contains("chmod 600"), "{}", program.stderr());
}

/// The first two bytes of the TLS alert, if the response is one.
async fn alert(proxy: &Proxy, hello: &[u8]) -> Option<[u8; 2]> {
    let mut stream = TcpStream::connect(proxy.registry_address()).await.unwrap();
    stream.write_all(hello).await.unwrap();
    let mut reply = Vec::new();
    let _ = within("the end of the handshake", stream.read_to_end(&mut reply)).await;
    (reply.first() == Some(&21)).then(|| [reply[5], reply[6]])
}

/// A `ClientHello` for ghcr.io with this version and these suites, and supported groups and signatures.
fn hello(version: u16, suites: &[u16]) -> Vec<u8> {
    let name = b"ghcr.io";
    let list = |kind: u16, body: Vec<u8>| {
        let length = u16::try_from(body.len()).unwrap();
        [&kind.to_be_bytes()[..], &length.to_be_bytes(), &body].concat()
    };
    let length = u16::try_from(name.len()).unwrap();
    let server_name = [&(length + 3).to_be_bytes()[..], &[0], &length.to_be_bytes(), name].concat();
    let extensions = [
        list(0, server_name),
        list(10, vec![0, 4, 0, 29, 0, 23]),
        list(11, vec![1, 0]),
        list(13, vec![0, 6, 4, 3, 8, 4, 4, 1]),
        list(23, vec![]),
    ]
    .concat();
    let suites: Vec<u8> = suites.iter().flat_map(|suite| suite.to_be_bytes()).collect();
    let body = [
        &version.to_be_bytes()[..],
        &[7; 32],
        &[0],
        &u16::try_from(suites.len()).unwrap().to_be_bytes(),
        &suites,
        &[1, 0],
        &u16::try_from(extensions.len()).unwrap().to_be_bytes(),
        &extensions,
    ]
    .concat();
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let handshake = [&[1][..], &length[1..], &body].concat();
    let length = u16::try_from(handshake.len()).unwrap().to_be_bytes();
    [&[22, 3, 1][..], &length, &handshake].concat()
}

#[tokio::test]
async fn old_versions_and_weak_suites_are_refused() {
    const FATAL: u8 = 2;
    const PROTOCOL_VERSION: u8 = 70;
    let (_hub, _other, proxy) = two_upstreams().await;
    let good = 0xc02b;
    assert_eq!(
        alert(&proxy, &hello(0x0302, &[good])).await,
        Some([FATAL, PROTOCOL_VERSION]),
        "TLS 1.1"
    );
    assert_eq!(
        alert(&proxy, &hello(0x0300, &[good])).await,
        Some([FATAL, PROTOCOL_VERSION]),
        "SSL 3"
    );
    for (name, suite) in [
        ("no forward secrecy", 0x009c),
        ("CBC", 0xc009),
        ("3DES", 0x000a),
        ("RC4", 0xc007),
        ("no encryption", 0xc006),
        ("anonymous", 0xc018),
        ("export", 0x0003),
    ] {
        let answer = alert(&proxy, &hello(0x0303, &[suite])).await;
        assert!(matches!(answer, Some([FATAL, _])), "{name}: {answer:?}");
    }
    // With a supported suite the handshake continues, so the rejections are about the suites.
    let mut stream = TcpStream::connect(proxy.registry_address()).await.unwrap();
    stream.write_all(&hello(0x0303, &[good])).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), 22, "a ServerHello");
}
