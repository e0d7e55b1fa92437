//! Scheduled refreshes in the running program: what the API, the commands and the page say about them. When they run and
//! what they send is tested with a clock of its own (`tests/authz/scheduled_refresh.rs`).

use crate::proxy::{Proxy, Reply, Setup};
use crate::registry::{Image, Upstream};
use serde_json::Value;

async fn refresh_of(proxy: &Proxy, image: &str) -> Value {
    let reply = proxy.admin(&format!("/api/v1/image?image={image}")).await;
    reply.json()["refresh"].clone()
}

fn body(reply: &Reply) -> String {
    String::from_utf8(reply.body.to_vec()).unwrap()
}

async fn command(proxy: &Proxy, arguments: &[&str]) -> String {
    let admin = proxy.admin_address().to_string();
    let mut program = proxy.setup().run(&[arguments, &["--admin", &admin]].concat());
    assert_eq!(program.exit().await, Some(0), "{}", program.stderr());
    program.stdout()
}

#[tokio::test]
async fn refresh_is_shown_with_its_state_and_next_run() {
    let (hub, private) = (Upstream::start().await, Upstream::start().await);
    let image = hub.push("library/demo", "latest", Image::with_layers(&["one"]));
    private.requires_basic("alice", "a-secret");
    let secret = private.push("acme/app", "1", Image::with_layers(&["two"]));
    private.lets("alice", "a-secret", "acme/app");
    let proxy = Setup::over(&hub)
        .also("ghcr.io", &private)
        .default_keys("refresh = \"1h\"")
        .tail("[[rule]]\nimages = [\"docker.io/library/still\"]\nrefresh = \"off\"")
        .start()
        .await;
    proxy.pull("library/demo", "latest", &image).await;
    hub.push("library/still", "1", image.clone());
    proxy.pull("library/still", "1", &image).await;
    proxy
        .pull_with("ghcr.io/acme/app", "1", &secret, |ask| {
            ask.basic("alice", "a-secret")
        })
        .await;

    let demo = refresh_of(&proxy, "docker.io/library/demo:latest").await;
    assert_eq!(
        (&demo["state"], &demo["every_seconds"]),
        (&"planned".into(), &3600.into()),
        "{demo}"
    );
    assert!(demo["next_at"].is_string(), "{demo}");
    assert_eq!(refresh_of(&proxy, "docker.io/library/still:1").await, Value::Null);
    let secret = refresh_of(&proxy, "ghcr.io/acme/app:1").await;
    assert_eq!(
        (&secret["state"], &secret["next_at"]),
        (&"private".into(), &Value::Null),
        "{secret}"
    );

    let why = command(&proxy, &["why", "docker.io/library/demo:latest"]).await;
    assert!(
        why.contains("refreshed every 1h in the background: next at"),
        "{why}"
    );
    let why = command(&proxy, &["why", "ghcr.io/acme/app:1"]).await;
    assert!(why.contains("the cache has no credential for ghcr.io"), "{why}");
    let list = command(&proxy, &["ls"]).await;
    assert!(list.contains("REFRESH") && list.contains("private"), "{list}");
    let page = proxy.admin("/").await;
    assert!(body(&page).contains("refreshed: private"), "{}", body(&page));

    command(&proxy, &["offline", "on"]).await;
    let demo = refresh_of(&proxy, "docker.io/library/demo:latest").await;
    assert_eq!(
        (&demo["state"], &demo["paused_by"]),
        (&"paused".into(), &"offline".into()),
        "{demo}"
    );
}

#[tokio::test]
async fn refresh_state_survives_restart_and_follows_reload() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let setup = Setup::over(&upstream).default_keys("refresh = \"1d\"");
    let proxy = setup.clone().start().await;
    proxy.pull("library/demo", "latest", &image).await;
    let before = refresh_of(&proxy, "docker.io/library/demo:latest").await;
    let proxy = proxy.restart().await;
    let after = refresh_of(&proxy, "docker.io/library/demo:latest").await;
    assert_eq!(before, after, "the slot follows from the name");

    let hourly = Setup::over(&upstream).default_keys("refresh = \"1h\"");
    let hourly = setup
        .without_defaults()
        .with_upstreams_of(&hourly)
        .default_keys("refresh = \"1h\"");
    proxy.setup().file("ifnewer.toml", &hourly.toml());
    proxy.program().reload();
    proxy.program().says("configuration reloaded").await;
    let reloaded = refresh_of(&proxy, "docker.io/library/demo:latest").await;
    assert_eq!(reloaded["every_seconds"], 3600);
    let metrics = proxy
        .until(
            "the tag to be planned",
            |proxy| proxy.admin("/metrics"),
            |reply| body(reply).contains("ifnewer_refresh_tags{state=\"in-use\"} 1"),
        )
        .await;
    assert!(
        body(&metrics).contains("ifnewer_refresh_runs_total{result=\"new-digest\"} 0"),
        "{}",
        body(&metrics)
    );
    let status = proxy.admin("/api/v1/status").await.json();
    assert_eq!(
        (&status["refreshes"]["tags"], &status["refreshes"]["longer_by"]),
        (&1.into(), &1.into())
    );
}
