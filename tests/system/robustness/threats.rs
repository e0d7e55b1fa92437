//! Hostile inputs outside of other topics. Each is listed in `docs/security.md`.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::json;

use crate::proxy::{Ask, Proxy, Setup, manifest_path, raw};
use crate::registry::{DOCKER_MANIFEST, Image, OCI_INDEX, OCI_MANIFEST, Upstream};

/// Nested too deeply for any parser.
const DEEP: usize = 100_000;

#[tokio::test]
async fn redirect_into_private_network_is_not_followed() {
    for location in [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/latest/meta-data/",
        "http://[fe80::1]/",
        "http://224.0.0.1/",
    ] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
        let proxy = Proxy::over(&upstream).await;
        proxy.manifest("library/demo", "1").await;
        upstream.redirects_blobs_with(307, location);
        let reply = proxy.blob("library/demo", &image.layer(0).digest).await;
        assert!(
            reply
                .is_unreachable()
                .message()
                .contains("to an address that is not allowed"),
            "{location}: {reply:#?}"
        );
    }
}

#[tokio::test]
async fn jwt_claims_of_a_client_token_are_ignored() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    let image = upstream.push("acme/app", "1", Image::with_layers(&["private bytes"]));
    let proxy = Proxy::over(&upstream).await;
    let alice = |ask: Ask| ask.basic("alice", "a-secret");
    proxy.pull_with("acme/app", "1", &image, alice).await;
    let part = |value: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({"sub": "alice", "aud": "scripted", "exp": 4_000_000_000_u64,
        "access": [{"type": "repository", "name": "acme/app", "actions": ["pull"]}]});
    let own_key = json!({"kty": "oct", "k": part(json!("the key that signs it"))});
    for header in [json!({"alg": "none"}), json!({"alg": "HS256", "jwk": own_key})] {
        let token = format!("{}.{}.{}", part(header), part(claims.clone()), "AAAA");
        upstream.clear_log();
        let ask = proxy.manifest("acme/app", "1").bearer(&token);
        ask.await.is_refused(401);
        let seen = upstream.requests();
        assert_eq!(
            seen[0].header("authorization"),
            Some(format!("Bearer {token}").as_str())
        );
        let by_digest = proxy.manifest("acme/app", &image.digest).bearer(&token);
        by_digest.await.is_refused(401);
    }
    upstream.refuses();
    let unsigned = format!("{}.{}.", part(json!({"alg": "none"})), part(claims));
    let ask = proxy.manifest("acme/app", "1").bearer(&unsigned);
    ask.await.is_unreachable();
}

#[tokio::test]
async fn tag_is_cached_separately_for_each_accept() {
    let upstream = Upstream::start().await;
    let child = Image::with_layers(&["amd64"]);
    upstream.push_untagged("library/demo", child.clone());
    let index = upstream.push("library/demo", "1", Image::index(&[child]));
    let flat = upstream.push_also("library/demo", "1", Image::docker_with_layers(&["flat"]));
    let proxy = Proxy::over(&upstream).await;
    let path = manifest_path("library/demo", "1");
    for _ in 0..2 {
        for (accept, image) in [(OCI_INDEX, &index), (DOCKER_MANIFEST, &flat)] {
            proxy.get(&path).accept(&[accept]).await.is_image(image);
        }
        let old = "application/vnd.docker.distribution.manifest.v1+prettyjws";
        let direct = upstream.ask("GET", &path).accept(&[old]).unchecked().await;
        let reply = proxy.get(&path).accept(&[old]).await;
        // Neither has that type, and the registry converts nothing.
        assert_eq!(direct.status, 404);
        reply.is_refused(404);
    }
}

#[tokio::test]
async fn list_page_size_is_limited_and_loops_end() {
    let upstream = Upstream::start().await;
    for tag in ["a", "b"] {
        upstream.push("library/demo", tag, Image::with_layers(&[tag]));
    }
    let proxy = Proxy::over(&upstream).await;
    for n in ["999999999999", "99999999999999999999999999999999"] {
        let reply = proxy.get(&format!("/v2/library/demo/tags/list?n={n}")).await;
        assert_eq!(reply.json()["tags"], json!(["a", "b"]));
        let seen = upstream.requests();
        assert_eq!(seen.last().unwrap().query, Some(format!("n={n}")));
    }
    upstream.links_lists_to_themselves();
    upstream.clear_log();
    let path = "/v2/library/demo/tags/list?n=2";
    let reply = proxy.get(path).await;
    assert_eq!(
        reply.header("link"),
        Some(format!("<{path}>; rel=\"next\"").as_str())
    );
    assert_eq!(upstream.requests().len(), 1, "who follows it does so himself");
}

#[tokio::test]
async fn deeply_nested_json_does_not_crash() {
    let upstream = Upstream::start().await;
    let deep = "[".repeat(DEEP);
    for (tag, text) in [
        ("bare", deep.clone()),
        ("closed", format!("{{\"layers\":{deep}{}}}", "]".repeat(DEEP))),
    ] {
        let image = upstream.push("library/demo", tag, Image::raw(OCI_MANIFEST, text.as_bytes()));
        let proxy = Proxy::over(&upstream).await;
        let reply = proxy.manifest("library/demo", tag).await;
        if reply.status == 200 {
            assert_eq!(reply.body, image.manifest);
        } else {
            reply.is_unreachable();
        }
        assert_eq!(proxy.get("/v2/").await.status, 200, "it lives on");
        let posted = Ask::new(proxy.admin_address(), "POST", "/api/v1/offline").unchecked();
        let posted = posted
            .header("content-type", "application/json")
            .body(text.as_bytes());
        assert!(matches!(posted.await.status, 400..=499));
        assert_eq!(proxy.admin("/healthz").await.status, 200);
    }
}

#[tokio::test]
async fn no_header_log_or_terminal_injection() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "1", Image::with_layers(&["x"]));
    for format in ["human", "json"] {
        let log = format!("[log]\nformat = \"{format}\"\nlevel = \"debug\"");
        let proxy = Setup::over(&upstream).tail(&log).start().await;
        for path in [
            "/v2/library/demo%0d%0aX:%20y/manifests/1",
            "/v2/library/demo/manifests/1%0d%0aX:%20y",
            "/v2/library/demo/manifests/1?ns=docker.io%0d%0aX:%20y",
            "/v2/library/demo/tags/list?last=a%0d%0aX:%20y",
            "/v2/%1b[31mdemo/manifests/1",
            "/v2/\u{1b}[31mdemo/manifests/1",
            "/v2/\u{9b}31mdemo/manifests/1",
            "/v2/library/\u{202e}demo/manifests/1",
        ] {
            for agent in ["curl/8", "\u{1b}[2Jevil", "evil\u{9b}2J", "%0d%0aX: y"] {
                let head = format!(
                    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: {agent}\r\nConnection: close\r\n\r\n"
                );
                let reply = raw(proxy.registry_address(), head.as_bytes()).await;
                assert!(!reply.text.contains("\nX: y"), "{}", reply.text);
            }
        }
        let whole = proxy.get(&manifest_path("library/demo", "1"));
        whole.header("user-agent", "\u{9b}2J").await;
        proxy.program().says("/v2/%1b[31mdemo/manifests/1").await;
        let log = proxy.program().stderr();
        let steering = |c: &char| c.is_control() && *c != '\n' || *c == '\u{202e}';
        let line = log.lines().find(|line| line.chars().any(|c| steering(&c)));
        assert!(line.is_none(), "{format}: {line:?}");
        assert!(!log.contains("\nX: y"), "{log}");
    }
    for seen in upstream.requests() {
        assert_eq!(seen.header("x"), None, "{seen:#?}");
    }
}

#[tokio::test]
async fn core_dumps_are_disabled() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", proxy.program().id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size"));
    let words: Vec<_> = core.unwrap().split_whitespace().collect();
    assert_eq!(&words[4..6], ["0", "0"], "{words:?}");
}
