//! TLS and proxies end to end, with real handshakes on loopback sockets.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::net::SocketAddr;

use http::Version;
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::upstream::tests::registry::{Registry, manifest, response};
use crate::upstream::tests::{MANIFEST, accept, anonymous, blob, digest, tag};
use crate::upstream::{ProxyChoice, RangeSpec, ResponseKind, Settings, SettingsError, TlsError, Upstream};

/// A registry with TLS for `localhost`, and its CA.
struct TlsRegistry {
    address: SocketAddr,
    ca: Vec<u8>,
    registry: Arc<Registry>,
}

impl TlsRegistry {
    async fn start(registry: Registry, protocols: &[&[u8]]) -> TlsRegistry {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let leaf = leaf.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();

        let mut config =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(
                    vec![leaf.der().clone()],
                    PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
                )
                .unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(config));

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let registry = Arc::new(registry);
        let serving = Arc::clone(&registry);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, serving) = (acceptor.clone(), Arc::clone(&serving));
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        serving.serve(stream).await;
                    }
                });
            }
        });
        TlsRegistry {
            address,
            ca: ca_certificate.der().to_vec(),
            registry,
        }
    }

    fn settings(&self, host: &str) -> Settings {
        Settings {
            roots: vec![self.ca.clone()],
            proxy: ProxyChoice::None,
            ..Settings::new(
                "a",
                vec![format!("https://{host}:{}", self.address.port()).parse().unwrap()],
            )
        }
    }
}

async fn response_kind(settings: Settings) -> ResponseKind {
    Upstream::new(settings, &Transport::system())
        .unwrap()
        .head(&anonymous(), &tag(), &accept())
        .await
        .kind
}

#[tokio::test]
async fn configured_root_is_trusted_and_h2_negotiated() {
    for (protocols, version) in [
        (&[&b"h2"[..], b"http/1.1"][..], Version::HTTP_2),
        (&[b"http/1.1"], Version::HTTP_11),
        (&[], Version::HTTP_11),
    ] {
        let secure = TlsRegistry::start(Registry::start(|_| manifest()).await, protocols).await;
        assert_eq!(
            response_kind(secure.settings("localhost")).await,
            ResponseKind::Digest(digest(MANIFEST))
        );
        assert_eq!(secure.registry.seen()[0].version, version);
    }
}

#[tokio::test]
async fn unknown_ca_or_wrong_name_is_a_tls_failure() {
    let secure = TlsRegistry::start(Registry::start(|_| manifest()).await, &[b"h2"]).await;
    let strange = Settings {
        roots: Vec::new(),
        ..secure.settings("localhost")
    };
    assert_eq!(
        response_kind(strange).await,
        ResponseKind::Unavailable(UpstreamFailure::Tls(TlsFailure::UnknownIssuer))
    );
    assert_eq!(
        response_kind(secure.settings("127.0.0.1")).await,
        ResponseKind::Unavailable(UpstreamFailure::Tls(TlsFailure::WrongName))
    );
    let plain = Registry::start(|_| manifest()).await;
    let url = plain.url().replace("http:", "https:").parse().unwrap();
    let plain = Settings {
        urls: vec![url],
        ..secure.settings("localhost")
    };
    assert_eq!(
        response_kind(plain).await,
        ResponseKind::Unavailable(UpstreamFailure::Tls(TlsFailure::NotTls))
    );
    assert!(secure.registry.seen().is_empty());
}

#[tokio::test]
async fn redirect_never_leaves_tls() {
    let plain = Registry::start(|_| manifest()).await;
    let url = plain.url();
    let registry = Registry::start(move |_| response(307).header("location", &url)).await;
    let secure = TlsRegistry::start(registry, &[b"h2"]).await;
    assert_eq!(
        response_kind(secure.settings("localhost")).await,
        ResponseKind::Unavailable(UpstreamFailure::Redirects(RedirectFailure::Downgrade))
    );
    assert!(plain.seen().is_empty());
}

#[test]
fn invalid_root_is_reported_by_index() {
    let settings = Settings {
        roots: vec![vec![1, 2, 3]],
        ..Settings::new("a", vec!["https://a".parse().unwrap()])
    };
    let error = Upstream::new(settings, &Transport::system()).err();
    assert_eq!(error, Some(SettingsError::Tls(TlsError::Root(0))));
}

#[tokio::test]
async fn plain_upstream_uses_the_proxy_in_absolute_form() {
    let proxy = Registry::start(|_| manifest()).await;
    let through = proxy.url().replace("http://", "http://user:secret@");
    let settings = Settings {
        proxy: ProxyChoice::Url(through),
        ..Settings::new("a", vec!["http://reg.example".parse().unwrap()])
    };
    assert_eq!(
        response_kind(settings).await,
        ResponseKind::Digest(digest(MANIFEST))
    );
    let seen = &proxy.seen()[0];
    assert_eq!(seen.uri, "http://reg.example/v2/library/a/manifests/latest");
    assert_eq!(seen.header("proxy-authorization"), Some("Basic dXNlcjpzZWNyZXQ="));
}

#[tokio::test]
async fn tls_upstream_uses_a_proxy_tunnel() {
    for (reply, expected) in [
        ("HTTP/1.1 200 OK\r\n\r\n", ResponseKind::Digest(digest(MANIFEST))),
        (
            "HTTP/1.1 407 No\r\n\r\n",
            ResponseKind::Unavailable(UpstreamFailure::Unreachable),
        ),
    ] {
        let secure = TlsRegistry::start(Registry::start(|_| manifest()).await, &[b"h2"]).await;
        let target = secure.address;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = format!("http://user:secret@{}", listener.local_addr().unwrap());
        let received = Arc::new(Mutex::new(String::new()));
        let seen = Arc::clone(&received);
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(client.read_u8().await.unwrap());
            }
            *seen.lock() = String::from_utf8(head).unwrap();
            client.write_all(reply.as_bytes()).await.unwrap();
            if reply.contains(" 200 ") {
                let mut server = TcpStream::connect(target).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            }
        });
        let settings = Settings {
            proxy: ProxyChoice::Url(proxy),
            ..secure.settings("localhost")
        };
        assert_eq!(response_kind(settings).await, expected);
        let received = received.lock();
        assert!(
            received.starts_with(&format!("CONNECT localhost:{} HTTP/1.1\r\n", target.port())),
            "{received}"
        );
        assert!(
            received.contains("Proxy-Authorization: Basic dXNlcjpzZWNyZXQ="),
            "{received}"
        );
    }
}

#[tokio::test]
async fn unread_bodies_of_clients_stop_no_other_over_h2() {
    let large = "x".repeat(2 * 1024 * 1024);
    let registry = Registry::start(move |_| response(200).body(&large)).await;
    let secure = TlsRegistry::start(registry, &[b"h2"]).await;
    let upstream = Upstream::new(secure.settings("localhost"), &Transport::system()).unwrap();
    let (caller, blob, accept) = (anonymous(), blob("x"), accept());
    let client_paced = RangeSpec {
        is_client_paced: true,
        ..RangeSpec::default()
    };
    let mut unread = Vec::new();
    for _ in 0..40 {
        unread.push(
            upstream
                .get_part(&caller, &blob, &accept, client_paced)
                .await
                .unwrap(),
        );
    }
    let other = upstream.get(&caller, &blob, &accept, None).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(10), other.collect(4 * 1024 * 1024));
    assert_eq!(read.await.unwrap().unwrap().len(), 2 * 1024 * 1024);
}

/// A SOCKS5 proxy that grants one request without connecting anywhere. Returns its URL, and the request that it gets.
async fn socks_proxy(scheme: &str) -> (String, tokio::task::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("{scheme}://{}", listener.local_addr().unwrap());
    let request = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut greeting = [0; 3];
        stream.read_exact(&mut greeting).await.unwrap();
        stream.write_all(&[5, 0]).await.unwrap();
        let mut request = vec![0; 5];
        stream.read_exact(&mut request).await.unwrap();
        let left = match request[3] {
            1 => 3 + 2,
            3 => usize::from(request[4]) + 2,
            _ => 15 + 2,
        };
        let mut rest = vec![0; left];
        stream.read_exact(&mut rest).await.unwrap();
        stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await.unwrap();
        [request, rest].concat()
    });
    (url, request)
}

fn connector_through(proxy: &str) -> UpstreamConnector {
    connector(&ProxyChoice::Url(proxy.to_owned()), Vec::new())
}

fn connector(proxy: &ProxyChoice, hosts: Vec<String>) -> UpstreamConnector {
    let settings = ConnectorSettings {
        roots: &[],
        client_certificate: None,
        proxy_rules: ProxyRules::new(proxy).unwrap(),
        origins: Vec::new(),
        hosts,
        redirects: Vec::new(),
        connect_timeout: Duration::from_secs(5),
    };
    UpstreamConnector::new(&Transport::system(), settings).unwrap()
}

#[tokio::test]
async fn socks_proxy_gets_an_address_or_a_name_and_the_port() {
    let to = Uri::from_static("http://localhost/v2/");
    for (scheme, is_name) in [("socks5", false), ("socks5h", true)] {
        let (proxy, request) = socks_proxy(scheme).await;
        let connector = connector_through(&proxy);
        connector.connect_raw(&to, IpScope::LinkLocal).await.unwrap();
        let request = request.await.unwrap();
        assert_eq!(request[3] == 3, is_name, "{request:?}");
        assert_eq!(request[request.len() - 2..], [0, 80]);
    }
}

#[tokio::test]
async fn name_behind_a_socks_proxy_keeps_to_the_ip_scope() {
    let connector = connector_through("socks5://127.0.0.1:9");
    let to = Uri::from_static("http://localhost/");
    let error = connector.connect_raw(&to, IpScope::Public).await.err().unwrap();
    assert_eq!(
        error.cause,
        UpstreamFailure::Redirects(RedirectFailure::NarrowerScope)
    );
}

#[test]
fn trusted_host_leads_to_link_local_only_by_its_address() {
    let hosts = ["*.corp", "auth.example", "169.254.1.1"].map(str::to_owned);
    let connector = connector(&ProxyChoice::None, hosts.to_vec());
    for (to, allowed, denied) in [
        ("https://a.corp/", Some("10.0.0.1"), "127.0.0.1"),
        ("https://auth.example/", Some("127.0.0.1"), "169.254.169.254"),
        ("https://169.254.1.1/", Some("169.254.1.1"), ""),
        ("https://other.example/", None, "10.0.0.1"),
    ] {
        let limit = connector.0.limit(&to.parse().unwrap());
        assert!(
            allowed.is_none_or(|address| limit.allows(address.parse().unwrap())),
            "{to}"
        );
        assert!(
            denied.parse().is_ok_and(|address| !limit.allows(address)) || denied.is_empty(),
            "{to}"
        );
    }
}
