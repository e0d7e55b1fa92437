//! TLS to upstreams: trusted certificates, error messages for others, and the client certificate.

use crate::proxy::{Authority, Proxy, Setup, manifest_path};
use crate::registry::{Image, Presented, Upstream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// The host name of the upstream.
const NAMES: [&str; 2] = ["localhost", "127.0.0.1"];

/// docker.io is this upstream, with this `ca_file`.
fn pinning(upstream: &Upstream, pem: &str) -> Setup {
    let setup = Setup::empty();
    let file = setup.file("pinned.pem", pem);
    setup.upstream(
        "docker.io",
        &format!("url = \"{}\"\nca_file = {file:?}", upstream.url()),
    )
}

/// The last failure of docker.io in the admin API.
async fn last_failure(proxy: &Proxy) -> (String, String) {
    let listed = proxy.admin("/api/v1/upstreams").await.json();
    let upstreams = listed["upstreams"].as_array().unwrap();
    let hub = upstreams.iter().find(|one| one["name"] == "docker.io").unwrap();
    let text = |name: &str| hub["last_failure"][name].as_str().unwrap_or_default().to_owned();
    (text("text"), text("detail"))
}

#[tokio::test]
async fn r07_self_signed_or_leaf_in_ca_file_is_trusted() {
    for presented in [
        Presented::self_signed(&NAMES),
        Presented::self_signed_leaf(&NAMES),
        Presented::of_an_unknown_authority(&NAMES),
    ] {
        let upstream = Upstream::start_tls().await;
        let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
        let setup = pinning(&upstream, &presented.pem);
        upstream.presents(presented);
        let proxy = setup.start().await;
        proxy.pull("library/demo", "1", &image).await;
    }
}

/// The presented certificate, the pins, and the messages for client and operator.
#[tokio::test]
async fn r07_reason_of_a_tls_failure_is_told() {
    let pinned_and = |presented: Presented| (presented.pem.clone(), presented);
    let authority = Upstream::start_tls().await;
    let known = || authority.ca_pem().to_owned();
    let (issued, leaf) = Presented::issued_by_a_leaf(&NAMES);
    for ((pem, presented), told, detail) in [
        (
            pinned_and(Presented::self_signed(&["a.example", "b.example"])),
            "its TLS certificate is for another name",
            "its certificate is for a.example, b.example, not for 127.0.0.1",
        ),
        (
            pinned_and(Presented::self_signed(&[])),
            "its TLS certificate is for another name",
            "it has no subject alternative name",
        ),
        (
            pinned_and(Presented::self_signed_and_expired(&NAMES)),
            "its TLS certificate has expired",
            "its certificate expired on 2021-02-03",
        ),
        (
            (known(), Presented::of_an_unknown_authority(&NAMES)),
            "an unknown authority issued its TLS certificate",
            "issued by \"scripted upstream\"",
        ),
        (
            (known(), Presented::self_signed(&NAMES)),
            "its TLS certificate is self-signed",
            "add it to `ca_file`",
        ),
        // A pinned leaf certificate is trusted by itself.
        (
            (leaf, issued),
            "an unknown authority issued its TLS certificate",
            "issued by \"pinned\"",
        ),
    ] {
        let upstream = Upstream::start_tls().await;
        upstream.push("library/demo", "1", Image::with_layers(&["one"]));
        let setup = pinning(&upstream, &pem);
        upstream.presents(presented);
        let proxy = setup.start().await;
        failure_is_reported(&proxy, told, detail).await;
        assert!(upstream.requests().is_empty());
    }
}

#[tokio::test]
async fn r07_plain_http_or_an_old_tls_version_is_told() {
    let upstream = Upstream::start_tls().await;
    let proxy = Proxy::over(&upstream).await;
    upstream.speaks_plain();
    failure_is_reported(&proxy, "does not speak TLS at that port", "use http:// in `url`").await;

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let old = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 1024]).await;
            // RFC 8446 §6.2: alert, fatal, protocol_version.
            let _ = stream.write_all(&[21, 3, 1, 0, 2, 2, 70]).await;
        }
    });
    let setup = Setup::empty().upstream("docker.io", &format!("url = \"{url}\""));
    let proxy = setup.start().await;
    failure_is_reported(
        &proxy,
        "offers no TLS version",
        "no protocol version (TLS 1.2, 1.3)",
    )
    .await;
    old.abort();
}

/// The response, the log and the admin API, each with its part of the reason.
async fn failure_is_reported(proxy: &Proxy, told: &str, detail: &str) {
    let reply = proxy.manifest("library/demo", "1").await;
    reply.is_refused(502);
    let message = reply.message();
    assert!(
        message.contains("docker.io") && message.contains(told),
        "{message}"
    );
    assert!(
        !message.contains("127.0.0.1"),
        "a client learns no host: {message}"
    );
    let (text, found) = last_failure(proxy).await;
    assert!(text.contains(told), "{text}");
    assert!(found.contains(detail) && found.contains("127.0.0.1:"), "{found}");
    proxy.program().says(&detail.replace('"', "\\\"")).await;
}

/// docker.io is this upstream, with this client certificate.
fn showing(upstream: &Upstream, (certificate, key): (&str, &str)) -> Setup {
    let setup = Setup::over(upstream);
    let (certificate, key) = (
        setup.file("client.pem", certificate),
        setup.file("client.key", key),
    );
    let keys = format!("client_certificate = {certificate:?}\nclient_key = {key:?}");
    setup.upstream_keys("docker.io", &keys)
}

#[tokio::test]
async fn r14_a_client_certificate_is_shown_to_its_own_host_alone() {
    let clients = Authority::new("clients");
    let (certificate, key) = clients.client("cache").pem();
    let (upstream, storage) = (Upstream::start_tls().await, Upstream::start_tls().await);
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one", "two"]));
    upstream.wants_client_certificates_of(clients.pem());
    storage.asks_for_client_certificates_of(clients.pem());
    upstream.redirects_blobs_to(&storage);
    let setup = showing(&upstream, (&certificate, &key));
    setup.file(
        "docker.io.ca.pem",
        &format!("{}{}", upstream.ca_pem(), storage.ca_pem()),
    );
    let proxy = setup.start().await;

    proxy.pull("library/demo", "1", &image).await;
    assert!(upstream.client_certificates() > 0);
    assert!(!storage.requests().is_empty());
    assert_eq!(
        storage.client_certificates(),
        0,
        "storage elsewhere is not shown it"
    );
}

#[tokio::test]
async fn r14_a_client_certificate_that_is_missing_is_told() {
    let clients = Authority::new("clients");
    let upstream = Upstream::start_tls().await;
    upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    upstream.wants_client_certificates_of(clients.pem());
    let proxy = Proxy::over(&upstream).await;
    failure_is_reported(
        &proxy,
        "requires a TLS client certificate",
        "`client_certificate`",
    )
    .await;

    let (certificate, key) = Authority::new("strangers").client("cache").pem();
    let proxy = showing(&upstream, (&certificate, &key)).start().await;
    failure_is_reported(
        &proxy,
        "requires a TLS client certificate",
        "`client_certificate`",
    )
    .await;
}

#[tokio::test]
async fn r14_a_reload_reads_the_client_certificate_again() {
    let clients = Authority::new("clients");
    let upstream = Upstream::start_tls().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    upstream.wants_client_certificates_of(clients.pem());
    let (certificate, key) = Authority::new("strangers").client("cache").pem();
    let setup = showing(&upstream, (&certificate, &key));
    let proxy = setup.start().await;
    proxy.manifest("library/demo", "1").await.is_refused(502);

    let (certificate, key) = clients.client("cache").pem();
    proxy.setup().file("client.pem", &certificate);
    proxy.program().reload();
    // The key still belongs to the other certificate.
    proxy
        .program()
        .says("the private key is not that of the certificate")
        .await;
    proxy.setup().file("client.key", &key);
    proxy.program().reload();
    proxy.program().says("configuration reloaded").await;
    proxy.pull("library/demo", "1", &image).await;
}

#[tokio::test]
async fn r14_a_wrong_client_certificate_stops_the_start() {
    let (certificate, key) = Authority::new("clients").client("cache").pem();
    let (_, other) = Authority::new("clients").client("cache").pem();
    let upstream = Upstream::start_tls().await;
    for (certificate, key, told) in [
        (
            certificate.as_str(),
            other.as_str(),
            "the private key is not that of the certificate",
        ),
        (certificate.as_str(), "", "there is no private key in the file"),
        (
            certificate.as_str(),
            certificate.as_str(),
            "there is no private key in the file",
        ),
        ("", key.as_str(), "there is no certificate in the file"),
    ] {
        let setup = showing(&upstream, (certificate, key));
        let mut program = setup.serve();
        assert_eq!(program.exit().await, Some(2), "{told}");
        let said = program.stderr();
        assert!(said.contains(told) && said.contains("ifnewer.toml:"), "{said}");
    }
    let setup = Setup::over(&upstream).upstream_keys("docker.io", "client_key = \"absent\"");
    let mut program = setup.serve();
    assert_eq!(program.exit().await, Some(2));
    assert!(
        program
            .stderr()
            .contains("`client_key` without `client_certificate`")
    );
}

#[tokio::test]
async fn r07_r14_a_hit_needs_no_trust_of_the_upstream() {
    let upstream = Upstream::start_tls().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "1", &image).await;
    upstream.presents(Presented::self_signed_and_expired(&NAMES));
    proxy
        .get(&manifest_path("library/demo", "1"))
        .await
        .is_stale()
        .is_image(&image);
}
