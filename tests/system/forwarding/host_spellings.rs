//! Spellings of a registry's host (RFC 3986 §6.2): all of them mean the same upstream.

use crate::forwarding::host_routing::two_upstreams;
use crate::proxy::{Ask, Proxy, Setup, manifest_path, raw};
use crate::registry::{Image, Upstream};

/// GHCR.IO's image, read by `ns`, prefix, `Host`, server name and `CONNECT`.
#[tokio::test]
async fn k7_every_spelling_of_a_host_is_one_registry() {
    let (hub, other, proxy) = two_upstreams().await;
    let image = other.push("team/demo", "1", Image::with_layers(&["other"]));
    let ours = hub.push("library/demo", "1", Image::with_layers(&["hub"]));
    let path = manifest_path("team/demo", "1");
    for ns in [
        "ghcr.io",
        "GHCR.io",
        "ghcr.io.",
        "ghcr.io:",
        "ghcr.io:443",
        "GHCR.IO.:0443",
        "ghcr%2Eio",
        "ghcr.io%3A443",
    ] {
        let reply = proxy.get(&format!("{path}?ns={ns}")).unchecked().await;
        assert_eq!(reply.status, 200, "ns={ns}: {reply:#?}");
        reply.is_image(&image);
    }
    for prefix in ["ghcr.io", "GHCR.io", "ghcr.io.", "ghcr.io:443"] {
        let prefixed = manifest_path(&format!("{prefix}/team/demo"), "1");
        for query in ["", "?ns=ghcr.io", "?ns=GHCR.IO.:443"] {
            let reply = proxy.get(&format!("{prefixed}{query}")).unchecked().await;
            assert_eq!(reply.status, 200, "{prefixed}{query}: {reply:#?}");
            reply.is_image(&image);
        }
    }
    for host in [
        "ghcr.io",
        "GHCR.IO",
        "ghcr.io.",
        "ghcr.io:443",
        "ghcr.io:80",
        "ghcr.io.:",
    ] {
        for query in ["", "?ns=ghcr.io:443"] {
            let ask = proxy.get(&format!("{path}{query}")).header("host", host);
            let reply = ask.unchecked().await;
            assert_eq!(reply.status, 200, "Host: {host} {query}: {reply:#?}");
            reply.is_image(&image);
        }
    }
    let ca = proxy.ca_pem();
    for protocol in ["http/1.1", "h2"] {
        for host in ["ghcr.io", "GHCR.IO", "ghcr.io.", "ghcr.io:443"] {
            let tls = || proxy.get(&path).header("host", host).tls(&ca, &[protocol]);
            let asks: [(&str, Ask); 3] = [
                ("server name", tls().server_name("ghcr.io")),
                ("CONNECT", tls().through_connect("ghcr.io:443")),
                (
                    "CONNECT, spelled otherwise",
                    tls().through_connect("GHCR.IO.:443").server_name("ghcr.io"),
                ),
            ];
            for (door, ask) in asks {
                let reply = ask.unchecked().await;
                assert_eq!(reply.status, 200, "{door}, {protocol}, {host}: {reply:#?}");
                reply.is_image(&image);
            }
        }
    }
    for (target, host) in [
        ("http://ghcr.io", "ghcr.io:80"),
        ("http://GHCR.IO:80", "ghcr.io"),
        ("http://ghcr.io.", "ghcr.io"),
    ] {
        let bytes = format!("GET {target}{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert_eq!(reply.status(), Some(200), "{target} {host}: {}", reply.text);
    }
    for alias in [
        "INDEX.docker.io",
        "registry-1.docker.io.",
        "docker.io:443",
        "index.docker.io:443",
    ] {
        let path = manifest_path("library/demo", "1");
        proxy.get(&format!("{path}?ns={alias}")).await.is_image(&ours);
        let prefixed = manifest_path(&format!("{alias}/library/demo"), "1");
        proxy.get(&prefixed).await.is_image(&ours);
        proxy
            .get(&format!("{prefixed}?ns=docker.io"))
            .await
            .is_image(&ours);
        proxy.get(&path).header("host", alias).await.is_image(&ours);
    }
    // One registry has one key in the store.
    assert_eq!(
        (
            other.manifest_gets("team/demo"),
            hub.manifest_gets("library/demo")
        ),
        (1, 1)
    );
}

#[tokio::test]
async fn k7_contradictory_names_are_refused() {
    let (hub, other, proxy) = two_upstreams().await;
    let image = other.push("docker.io/team/demo", "1", Image::with_layers(&["other"]));
    hub.push("team/demo", "1", Image::with_layers(&["hub"]));
    let plain = manifest_path("team/demo", "1");
    let prefixed = manifest_path("docker.io/team/demo", "1");
    let tls = |path: &str| proxy.get(path).tls(&proxy.ca_pem(), &["h2"]);
    let by_ns = |ns: &str| format!("{plain}?ns={ns}");
    let asks = [
        ("ns and path", proxy.get(&format!("{prefixed}?ns=ghcr.io"))),
        ("ns and path, an alias", {
            let path = manifest_path("index.docker.io:443/team/demo", "1");
            proxy.get(&format!("{path}?ns=ghcr.io"))
        }),
        (
            "Host and ns",
            proxy.get(&by_ns("docker.io")).header("host", "ghcr.io"),
        ),
        (
            "Host and a strange ns",
            proxy.get(&by_ns("evil.example")).header("host", "ghcr.io"),
        ),
        (
            "Host and no host in ns",
            proxy.get(&by_ns("https://ghcr.io")).header("host", "ghcr.io"),
        ),
        (
            "server name and ns",
            tls(&by_ns("docker.io")).server_name("ghcr.io"),
        ),
        (
            "CONNECT and ns",
            tls(&by_ns("docker.io")).through_connect("ghcr.io:443"),
        ),
    ];
    for (what, ask) in asks {
        let reply = ask.unchecked().await;
        assert_eq!(
            (reply.status, reply.code().as_str()),
            (400, "NAME_INVALID"),
            "{what}: {reply:#?}"
        );
        let message = reply.message();
        assert!(
            message.contains("ns names `") && message.contains("ghcr.io"),
            "{what}: {message}"
        );
    }
    assert_eq!(hub.connections(), 0);
    let is_challenge = |seen: &crate::registry::Seen| seen.path == "/v2/";
    assert!(
        other.requests().iter().all(is_challenge),
        "{:#?}",
        other.requests()
    );
    // As the error advises: both names in the path.
    let both = manifest_path("ghcr.io/docker.io/team/demo", "1");
    proxy.get(&both).await.is_image(&image);
    proxy.get(&format!("{both}?ns=ghcr.io")).await.is_image(&image);
}

#[tokio::test]
async fn k7_no_spelling_leads_to_another_registry() {
    let (hub, other, proxy) = two_upstreams().await;
    let path = manifest_path("team/demo", "1");
    for (ns, status) in [
        ("https://ghcr.io", 400),
        ("//ghcr.io", 400),
        ("ghcr.io/", 400),
        ("ghcr.io/team", 400),
        ("user@ghcr.io", 400),
        ("ghcr.io..", 400),
        (".", 400),
        (":443", 400),
        ("ghcr.io:443:443", 400),
        ("ghcr.io:%2B443", 400),
        ("ghcr.io:-1", 400),
        ("ghcr.io:https", 400),
        ("ghcr.io:65979", 400),
        ("ghcr.io%00", 400),
        ("ghcr.io%20", 400),
        ("%20ghcr.io", 400),
        ("ghcr%252Eio", 400),
        ("ghcr.io%0D%0A", 400),
        ("gh%C3%A7r.io", 400),
        ("ghcr.io%FF", 400),
        ("ghcr.io%", 400),
        ("[::1", 400),
        ("::1", 400),
        ("[::1]x", 400),
        ("[fe80::1%25eth0]", 400),
        ("[ghcr.io]", 400),
        (".ghcr.io", 404),
        ("ghcr.io:80", 404),
        ("ghcr.io:8443", 404),
        ("[::1]", 404),
        ("[::1]:443", 404),
        ("[::ffff:127.0.0.1]", 404),
        ("ghcr.io.evil.example", 404),
        ("ghcr", 404),
        ("ghcr.io&ns=ghcr.io", 400),
        ("ghcr.io&ns=docker.io", 400),
        ("&ns=ghcr.io", 400),
        ("ghcr.io&n%73=docker.io", 400),
    ] {
        for path in [&path, "/v2/"] {
            let reply = proxy.get(&format!("{path}?ns={ns}")).unchecked().await;
            assert_eq!(reply.status, status, "{path} ns={ns}: {reply:#?}");
        }
    }
    for host in [
        "user@ghcr.io",
        "ghcr%2eio",
        "ghcr.io..",
        "ghcr.io:x",
        "ghcr.io:99999",
        "ghcr.io:443:443",
        "https://ghcr.io",
        "ghcr.io/v2",
        "[::1",
        "ghcr.io, quay.io",
        "",
    ] {
        let bytes = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert_eq!(reply.status(), Some(400), "Host: {host}: {}", reply.text);
    }
    for target in [
        "ghcr.io.:80",
        "ghcr.io:0",
        "ghcr.io..:443",
        "user@ghcr.io:443",
        "ghcr.io:",
    ] {
        let bytes = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n");
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert!(
            matches!(reply.status(), Some(400 | 403)),
            "CONNECT {target}: {}",
            reply.text
        );
    }
    assert_eq!((hub.connections(), other.connections()), (0, 0));
}

/// An empty `ns` is the same as none.
#[tokio::test]
async fn k7_an_empty_ns_names_the_default_upstream() {
    let (hub, _other, proxy) = two_upstreams().await;
    let image = hub.push("library/demo", "1", Image::with_layers(&["hub"]));
    for query in ["?ns=", "?ns", "?&ns=&"] {
        let path = manifest_path("library/demo", "1");
        proxy.get(&format!("{path}{query}")).await.is_image(&image);
    }
}

async fn with_port(name: &str) -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push("team/demo", "1", Image::with_layers(&["one"]));
    let proxy = Setup::empty().also(name, &upstream).start().await;
    (upstream, proxy, image)
}

#[tokio::test]
async fn k7_an_upstream_with_a_port_has_every_door() {
    let (upstream, proxy, image) = with_port("registry.example:5000").await;
    let (path, ca) = (manifest_path("team/demo", "1"), proxy.ca_pem());
    let here = || proxy.get(&path);
    let prefixed = |name: &str| proxy.get(&manifest_path(&format!("{name}/team/demo"), "1"));
    let name = "registry.example:5000";
    let sni = |host: &str, protocol: &str| {
        let ask = here().header("host", host).tls(&ca, &[protocol]);
        ask.server_name("registry.example")
    };
    let asks = [
        ("ns", proxy.get(&format!("{path}?ns={name}"))),
        (
            "ns, encoded",
            proxy.get(&format!("{path}?ns=REGISTRY.example.%3A05000")),
        ),
        ("prefix", prefixed(name)),
        (
            "prefix, a zero before the port",
            prefixed("registry.example:05000"),
        ),
        ("prefix and ns", {
            let path = manifest_path(&format!("{name}/team/demo"), "1");
            proxy.get(&format!("{path}?ns={name}"))
        }),
        ("Host", here().header("host", name)),
        (
            "Host, upper case",
            here().header("host", "REGISTRY.EXAMPLE.:5000"),
        ),
        ("SNI, HTTP/1.1", sni(name, "http/1.1")),
        ("SNI, h2", sni(name, "h2")),
        ("CONNECT", here().tls(&ca, &["http/1.1"]).through_connect(name)),
        ("CONNECT, h2", here().tls(&ca, &["h2"]).through_connect(name)),
    ];
    for (door, ask) in asks {
        let reply = ask.unchecked().await;
        assert_eq!(reply.status, 200, "{door}: {reply:#?}");
        reply.is_image(&image);
    }
    let layer = image.layer(0);
    proxy
        .blob("registry.example:5000/team/demo", &layer.digest)
        .await
        .is_blob(layer);
    let tags = proxy.get("/v2/registry.example:5000/team/demo/tags/list").await;
    assert_eq!(tags.status, 200, "{tags:#?}");
    assert_eq!(upstream.manifest_gets("team/demo"), 1);
    upstream.clear_log();

    for (what, status, ask) in [
        ("no port", 404, proxy.get(&format!("{path}?ns=registry.example"))),
        (
            "the usual port",
            404,
            proxy.get(&format!("{path}?ns=registry.example:443")),
        ),
        (
            "another port",
            404,
            proxy.get(&format!("{path}?ns=registry.example:5001")),
        ),
        ("another port in the path", 400, prefixed("registry.example:5001")),
        ("no port in the path", 404, prefixed("registry.example")),
        ("SNI and no port", 404, sni("registry.example", "h2")),
        (
            "SNI and another port",
            404,
            sni("registry.example:5001", "http/1.1"),
        ),
        ("a wrong name below it", 400, prefixed("registry.example:5000/_")),
    ] {
        let reply = ask.unchecked().await;
        assert_eq!(reply.status, status, "{what}: {reply:#?}");
    }
    for target in ["registry.example:443", "registry.example:5001"] {
        let bytes = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n");
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert_eq!(reply.status(), Some(403), "{target}: {}", reply.text);
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn k7_an_upstream_with_an_ipv6_name_has_one_key() {
    let (upstream, proxy, image) = with_port("[2001:db8::1]:5000").await;
    let path = manifest_path("team/demo", "1");
    for name in [
        "[2001:db8::1]:5000",
        "[2001:DB8:0:0::1]:5000",
        "[2001:0db8:0000:0000:0000:0000:0000:0001]:5000",
    ] {
        let reply = proxy.get(&format!("{path}?ns={name}")).unchecked().await;
        assert_eq!(reply.status, 200, "ns={name}: {reply:#?}");
        reply.is_image(&image);
        proxy.get(&path).header("host", name).await.is_image(&image);
        let absolute =
            format!("GET http://{name}{path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n");
        let reply = raw(proxy.registry_address(), absolute.as_bytes()).await;
        assert_eq!(reply.status(), Some(200), "{name}: {}", reply.text);
    }
    let without = proxy.get(&format!("{path}?ns=[2001:db8::1]")).unchecked().await;
    assert_eq!(without.status, 404, "{without:#?}");
    assert_eq!(upstream.manifest_gets("team/demo"), 1);
}

/// Plain HTTP omits port 80 in `Host`.
#[tokio::test]
async fn k7_an_upstream_at_port_80_is_reached_by_plain_http() {
    let (upstream, proxy, image) = with_port("registry.example:80").await;
    let path = manifest_path("team/demo", "1");
    for host in ["registry.example", "registry.example:80", "REGISTRY.example.:080"] {
        proxy.get(&path).header("host", host).await.is_image(&image);
    }
    proxy
        .get(&format!("{path}?ns=registry.example:80"))
        .await
        .is_image(&image);
    let https = proxy
        .get(&format!("{path}?ns=registry.example"))
        .unchecked()
        .await;
    assert_eq!(https.status, 404, "{https:#?}");
    assert_eq!(upstream.manifest_gets("team/demo"), 1);
}
