//! Status, gauges and health as the operator sees them.

use crate::proxy::{Ask, Proxy, Setup, raw};
use crate::registry::{Image, Upstream};
use serde_json::json;

#[tokio::test]
async fn health_and_readiness_are_told() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    assert_eq!(proxy.admin("/healthz").await.status, 200);
    assert_eq!(proxy.admin("/readyz").await.status, 200);
    upstream.refuses();
    proxy.manifest("library/demo", "latest").await.is_unreachable();
    assert_eq!(
        proxy.admin("/readyz").await.status,
        200,
        "a silent upstream is no reason to be restarted"
    );
}

#[tokio::test]
async fn metrics_are_in_the_text_format_and_name_no_repository() {
    let upstream = Upstream::start().await;
    let image = upstream.push("acme/secret-project", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("acme/secret-project", "latest", &image).await;
    proxy.pull("acme/secret-project", "latest", &image).await;

    let reply = proxy.admin("/metrics").await;
    assert_eq!(reply.status, 200);
    let kind = reply.header("content-type").unwrap();
    assert!(
        kind.starts_with("application/openmetrics-text") || kind.starts_with("text/plain"),
        "{kind}"
    );
    let text = String::from_utf8(reply.body.to_vec()).unwrap();
    assert!(
        text.lines()
            .any(|line| line.starts_with("ifnewer_") && line.contains("docker.io")),
        "{text}"
    );
    assert!(
        text.contains("# TYPE ifnewer_") && text.contains("# HELP ifnewer_"),
        "{text}"
    );
    assert!(!text.contains("secret-project"), "{text}");
    for line in text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
    {
        assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
    }
}

#[tokio::test]
async fn the_held_images_are_listed() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;

    let reply = proxy.admin("/api/v1/images").await;
    assert_eq!(
        (reply.status, reply.header("content-type")),
        (200, Some("application/json")),
        "{reply:#?}"
    );
    let text = reply.json().to_string();
    for part in ["docker.io", "library/demo", "latest", &image.digest] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[tokio::test]
async fn it_can_be_asked_why() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let rule = "[[rule]]\nimages = [\"docker.io/library/demo:*\"]\npolicy = \"if-not-present\"";
    let proxy = Setup::over(&upstream).tail(rule).start().await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.clear_log();

    let reply = proxy
        .admin("/api/v1/why?image=docker.io/library/demo:latest")
        .await;
    assert_eq!(reply.status, 200, "{reply:#?}");
    assert!(
        reply.json().to_string().contains("if-not-present"),
        "{}",
        reply.json()
    );
    let by_digest = format!("/api/v1/why?image=docker.io/library/demo@{}", image.digest);
    let reply = proxy.admin(&by_digest).await;
    assert!(
        reply.json().to_string().contains("\"immutable\""),
        "{}",
        reply.json()
    );
    assert_eq!(upstream.requests().len(), 0, "asking why asks nobody");
    assert_eq!(proxy.admin("/api/v1/why?image=").await.status, 400);
    assert_eq!(proxy.admin("/api/v1/why").await.status, 400);
}

#[tokio::test]
async fn admin_api_is_not_served_on_registry_port() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    for path in [
        "/healthz",
        "/readyz",
        "/metrics",
        "/api/v1/images",
        "/api/v1/why?image=x",
        "/",
    ] {
        assert_eq!(proxy.get(path).unchecked().await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn cross_site_page_cannot_use_admin_api() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let ask = Ask::new(proxy.admin_address(), "GET", "/api/v1/images")
        .header("host", "evil.example")
        .unchecked();
    let reply = ask.await;
    assert!(matches!(reply.status, 400 | 403 | 421), "{reply:#?}");
    let reply = raw(
        proxy.admin_address(),
        b"GET /api/v1/images HTTP/1.1\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(!matches!(reply.status(), Some(200)), "{}", reply.text);
}

#[tokio::test]
async fn healthcheck_asks_the_running_cache() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let admin = proxy.admin_address().to_string();
    let config = proxy.setup().file("ifnewer.toml", &proxy.setup().toml());
    let arguments = [
        "healthcheck",
        "--config",
        config.to_str().unwrap(),
        "--admin",
        &admin,
    ];
    let mut program = proxy.setup().run(&arguments);
    assert_eq!(program.exit().await, Some(0), "{}", program.stderr());
    let setup = proxy.setup().clone();
    drop(proxy);
    let mut program = setup.run(&arguments);
    assert_eq!(program.exit().await, Some(1), "{}", program.stderr());
}

#[tokio::test]
async fn upstream_quota_is_shown_per_owner_without_credential() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.tells_rate_limit(100, 73);
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    upstream.tells_rate_limit(200, 9);
    proxy.manifest("library/demo", "latest").bearer("canary").await;

    let text = String::from_utf8(proxy.admin("/metrics").await.body.to_vec()).unwrap();
    for line in [
        "ifnewer_upstream_ratelimit_remaining{upstream=\"docker.io\",credential=\"anonymous\"} 73",
        "ifnewer_upstream_ratelimit_limit{upstream=\"docker.io\",credential=\"anonymous\"} 100",
        "ifnewer_upstream_ratelimit_remaining{upstream=\"docker.io\",credential=\"client\"} 9",
    ] {
        assert!(text.lines().any(|shown| shown == line), "{line}: {text}");
    }
    let shown = proxy.admin("/api/v1/upstreams").await;
    let hub = shown.json()["upstreams"]
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["name"] == "docker.io")
        .unwrap()
        .clone();
    let limits = hub["rate_limits"].as_array().unwrap();
    assert_eq!(limits.len(), 2, "{hub}");
    assert_eq!(limits[0]["credential"], "anonymous");
    assert_eq!(
        (&limits[0]["remaining"], &limits[0]["window_seconds"]),
        (&json!(73), &json!(21_600))
    );
    assert_eq!(limits[0]["source"], "192.0.2.7", "{hub}");
    assert!(
        limits[1]["credential"].as_str().unwrap().starts_with("client-"),
        "{hub}"
    );
    assert!(!text.contains("canary") && !shown.body.windows(6).any(|part| part == b"canary"));
}

#[tokio::test]
async fn the_last_pulls_are_told_newest_first() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    assert_eq!(
        proxy.admin("/api/v1/events").await.json()["events"]
            .as_array()
            .unwrap()
            .len(),
        0
    );

    proxy.pull("library/demo", "latest", &image).await;
    proxy.pull("docker.io/library/demo", "latest", &image).await;
    let absent = proxy
        .head("/v2/library/demo/manifests/absent?ns=docker.io")
        .header("user-agent", "docker/29");
    assert_eq!(absent.await.status, 404);

    let told = proxy.admin("/api/v1/events").await.json();
    let told = told["events"].as_array().unwrap();
    let field = |name: &str| told.iter().map(|event| event[name].clone()).collect::<Vec<_>>();
    assert_eq!(field("id"), [3, 2, 1]);
    assert_eq!(field("route"), ["ns", "prefix", "mirror"]);
    assert_eq!(field("reference"), ["absent", "latest", "latest"]);
    assert_eq!(field("result"), ["denied", "hit", "miss"]);
    assert_eq!(field("status"), [404, 200, 200]);
    for event in told {
        assert_eq!(
            (&event["upstream"], &event["repository"]),
            (&"docker.io".into(), &"library/demo".into())
        );
        assert_eq!(event["client"], "127.0.0.1");
        assert!(!event["reason"].as_str().unwrap().is_empty(), "{event}");
    }
    assert_eq!(told[0]["user_agent"], "docker/29");

    let some = |query: &str| proxy.admin(&format!("/api/v1/events?{query}"));
    assert_eq!(some("limit=1").await.json()["events"][0]["id"], 3);
    assert_eq!(
        some("after=2").await.json()["events"].as_array().unwrap().len(),
        1
    );
    for wrong in ["limit=x", "after=-1"] {
        assert_eq!(some(wrong).await.status, 400, "{wrong}");
    }
}
