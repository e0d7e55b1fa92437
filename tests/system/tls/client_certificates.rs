//! Client certificates (mTLS): handshake, authorization, expiry, CA removal and session resumption.

use crate::auth::cache_users::USERS;
use crate::proxy::{Ask, Authority, Identity, Proxy, Session, Setup, manifest_path, raw};
use crate::registry::{Image, Upstream};

/// A cache that accepts certificates of this CA. docker.io grants `acme/app` to its user alice.
async fn guarded(authority: &Authority, more: &str) -> (Upstream, Image, Proxy) {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "up-secret", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes"]));
    let setup = Setup::over(&upstream);
    let ca = setup.file("clients.pem", authority.pem());
    let setup = setup.tail(&format!("[access]\nclient_ca = {ca:?}\n{more}"));
    (upstream, image, setup.start().await)
}

/// On each route, with this certificate and protocol.
fn doors(proxy: &Proxy, identity: &Identity) -> Vec<(&'static str, Ask)> {
    let ca = proxy.ca_pem();
    let path = manifest_path("acme/app", "1");
    let ask = |path: &str, protocol: &str| proxy.get(path).tls(&ca, &[protocol]).identity(identity);
    vec![
        ("mirror", ask(&path, "http/1.1")),
        ("mirror, h2", ask(&path, "h2")),
        ("ns", ask(&format!("{path}?ns=docker.io"), "h2")),
        ("prefix", ask(&manifest_path("docker.io/acme/app", "1"), "h2")),
        ("host", ask(&path, "h2").server_name("docker.io")),
        (
            "CONNECT, shown to the proxy",
            ask(&path, "h2")
                .through_connect("docker.io:443")
                .with_tls_to_proxy(),
        ),
    ]
}

#[tokio::test]
async fn it_opens_every_door_and_authorization_stays_the_upstreams() {
    let authority = Authority::new("clients");
    let (upstream, image, proxy) = guarded(&authority, "").await;
    for (door, ask) in doors(&proxy, &authority.client("node-7")) {
        let reply = ask.clone().basic("alice", "up-secret").await;
        assert_eq!(reply.status, 200, "{door}: {reply:#?}");
        reply.is_image(&image);
        // A client certificate grants nothing at the upstream.
        let stranger = ask.unchecked().await;
        assert_eq!(stranger.status, 401, "{door}: {stranger:#?}");
        assert!(
            stranger
                .header("www-authenticate")
                .unwrap()
                .starts_with("Bearer ")
        );
    }
    let (ca, other) = (proxy.ca_pem(), authority.client("node-8"));
    let as_alice = |ask: Ask| ask.tls(&ca, &[]).identity(&other).basic("alice", "up-secret");
    proxy.pull_with("acme/app", "1", &image, as_alice).await;
    upstream.refuses();
    let stale = proxy.pull_with("acme/app", "1", &image, as_alice).await;
    stale.is_stale();
}

#[tokio::test]
async fn request_without_certificate_reaches_no_upstream() {
    let authority = Authority::new("clients");
    let (upstream, _, proxy) = guarded(&authority, "").await;
    let (ca, path) = (proxy.ca_pem(), manifest_path("acme/app", "1"));
    let asks = [
        ("plain", proxy.get(&path)),
        ("plain, /v2/", proxy.get("/v2/")),
        ("TLS", proxy.get(&path).tls(&ca, &["http/1.1"])),
        ("h2", proxy.get(&path).tls(&ca, &["h2"])),
        (
            "host",
            proxy.get(&path).tls(&ca, &["h2"]).server_name("docker.io"),
        ),
        (
            "host, a login",
            proxy.get("/v2/").tls(&ca, &[]).server_name("docker.io"),
        ),
        (
            "host, a push",
            proxy
                .ask("PUT", &path)
                .body(b"{}")
                .tls(&ca, &["http/1.1"])
                .server_name("docker.io"),
        ),
    ];
    for (way, ask) in asks {
        let reply = ask.basic("alice", "up-secret").unchecked().await;
        reply.is_refused(403);
        assert_eq!(reply.code(), "DENIED", "{way}");
        assert!(
            reply.message().contains("client certificate required"),
            "{way}: {reply:#?}"
        );
    }
    let connect = b"CONNECT docker.io:443 HTTP/1.1\r\nHost: docker.io:443\r\nConnection: close\r\n\r\n";
    let refused = raw(proxy.registry_address(), connect).await;
    assert_eq!(refused.status(), Some(403), "{}", refused.text);
    assert_eq!(upstream.connections(), 0);
    let metrics = proxy.admin("/metrics").await;
    assert!(String::from_utf8_lossy(&metrics.body).contains("reason=\"no-client-certificate\""));
}

#[tokio::test]
async fn invalid_client_certificate_ends_handshake_and_is_logged() {
    let authority = Authority::new("clients");
    let (upstream, _, proxy) = guarded(&authority, "").await;
    for (identity, why) in [
        (
            Authority::new("clients").client("node-7"),
            "no CA of `access.client_ca` has signed it",
        ),
        (authority.expired("node-7"), "it has expired"),
        (authority.server("node-7"), "it is not for client authentication"),
    ] {
        let ask = proxy.get("/v2/").tls(&proxy.ca_pem(), &["http/1.1"]);
        ask.identity(&identity).fails().await;
        let line = proxy.program().says(why).await;
        assert!(line.contains("client certificate rejected"), "{line}");
    }
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn allow_lists_apply_to_certificate_names() {
    let authority = Authority::new("clients");
    let lists = "[[allow]]\nusers = [\"node-*\", \"spiffe://example.org/ci/*\"]\nimages = \"docker.io/acme/*\"\n\
                 [[allow]]\nusers = \"other\"\nimages = \"docker.io/open/*\"";
    let (upstream, image, proxy) = guarded(&authority, lists).await;
    for identity in [
        authority.client("node-7"),
        authority.workload("spiffe://example.org/ci/build"),
    ] {
        for (_, ask) in doors(&proxy, &identity) {
            ask.basic("alice", "up-secret").await.is_image(&image);
        }
    }
    upstream.clear_log();
    for identity in [
        authority.client("other"),
        authority.client("spiffe://example.org"),
        authority.workload("spiffe://example.org/c"),
    ] {
        for (door, ask) in doors(&proxy, &identity) {
            let reply = ask.basic("alice", "up-secret").await;
            assert_eq!((reply.status, reply.code().as_str()), (403, "DENIED"), "{door}");
        }
        let upload = proxy
            .ask("POST", "/v2/acme/app/blobs/uploads/")
            .tls(&proxy.ca_pem(), &[]);
        let upload = upload
            .server_name("docker.io")
            .identity(&identity)
            .basic("alice", "up-secret");
        upload.await.is_refused(403);
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn certificate_or_password_suffices_and_is_not_forwarded() {
    let authority = Authority::new("clients");
    let upstream = Upstream::start().await;
    upstream.requires_basic("service", "s-secret");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes"]));
    let setup = Setup::over(&upstream);
    let (password, users) = (setup.file("password", "s-secret"), setup.file("users", USERS));
    let ca = setup.file("clients.pem", authority.pem());
    let keys = format!("auth = \"shared\"\nusername = \"service\"\npassword_file = {password:?}");
    let access = format!("[access]\nhtpasswd = {users:?}\nclient_ca = {ca:?}");
    let proxy = setup
        .upstream_keys("docker.io", &keys)
        .tail(&access)
        .start()
        .await;

    let ask = || proxy.manifest("acme/app", "1").tls(&proxy.ca_pem(), &["h2"]);
    let identity = authority.client("node-7");
    ask().identity(&identity).await.is_image(&image);
    ask().basic("alice", "a-secret").await.is_image(&image);
    // The header belongs to the cache and is dropped.
    let both = ask().identity(&identity).basic("alice", "a-secret");
    both.await.is_image(&image);
    let plain = proxy.manifest("acme/app", "1").basic("alice", "a-secret");
    plain.await.is_image(&image);
    let neither = ask().unchecked().await;
    assert_eq!(
        neither.header("www-authenticate"),
        Some("Basic realm=\"ifnewer\"")
    );
    let by_name = || ask().server_name("docker.io");
    by_name().identity(&identity).await.is_image(&image);
    by_name()
        .basic("alice", "a-secret")
        .unchecked()
        .await
        .is_refused(403);
    let alice = "Basic YWxpY2U6YS1zZWNyZXQ=";
    let seen = upstream.requests();
    assert!(
        seen.iter()
            .all(|seen| seen.header("authorization") != Some(alice))
    );
}

#[tokio::test]
async fn removed_client_ca_ends_open_connections() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let (_upstream, _, proxy) = guarded(&old, "").await;
    let identity = old.client("node-7");
    let mut open = Session::open_as(proxy.registry_address(), &proxy.ca_pem(), &identity).await;
    assert_eq!(open.ask("GET", "/v2/").await.status, 200);

    proxy.setup().file("clients.pem", new.pem());
    proxy.program().reload();
    proxy.program().says("configuration reloaded").await;
    let refused = open.ask_unchecked("GET", "/v2/").await;
    refused.is_refused(403);
    assert!(
        refused
            .message()
            .contains("no CA of `access.client_ca` has signed it"),
        "{refused:#?}"
    );
    let ask = || proxy.get("/v2/").tls(&proxy.ca_pem(), &[]);
    ask().identity(&identity).fails().await;
    assert_eq!(ask().identity(&new.client("node-7")).await.status, 200);
}

#[tokio::test]
async fn resumed_tls_session_keeps_its_client_identity() {
    let authority = Authority::new("clients");
    let lists = "[[allow]]\nusers = \"node-7\"\nimages = \"docker.io/acme/*\"";
    let (_upstream, image, proxy) = guarded(&authority, lists).await;
    let client = authority.client("node-7").remembering(&proxy.ca_pem());
    for resumed in [false, true, true] {
        let ask = proxy.manifest("acme/app", "1").basic("alice", "up-secret");
        let (reply, was_resumed) = ask.by(&client).await;
        reply.is_image(&image);
        assert_eq!(was_resumed, resumed);
    }
}
