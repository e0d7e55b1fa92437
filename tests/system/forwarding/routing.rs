//! Routing by mirror, `?ns=` and path prefix, with the same cache behind each.

use crate::proxy::{Proxy, Setup, blob_path, manifest_path, raw};
use crate::registry::{Image, Upstream};

async fn two_upstreams() -> (Upstream, Upstream, Proxy) {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let proxy = Setup::over(&hub).also("ghcr.io", &other).start().await;
    (hub, other, proxy)
}

#[tokio::test]
async fn one_image_is_held_once_whatever_the_door() {
    let (_hub, other, proxy) = two_upstreams().await;
    let image = other.push("team/demo", "1", Image::with_layers(&["one"]));
    proxy.pull("ghcr.io/team/demo", "1", &image).await.is_fetched();
    other.clear_log();

    proxy.pull("ghcr.io/team/demo", "1", &image).await.is_unchanged();
    let path = format!("{}?ns=ghcr.io", manifest_path("team/demo", "1"));
    proxy.get(&path).await.is_image(&image).is_unchanged();
    let layer = format!("{}?ns=ghcr.io", blob_path("team/demo", &image.layer(0).digest));
    proxy.get(&layer).await.is_blob(image.layer(0)).is_hit();
    assert_eq!((other.manifest_gets("team/demo"), other.all_blob_gets()), (0, 0));
}

#[tokio::test]
async fn the_aliases_of_docker_hub_are_docker_hub() {
    let (hub, _other, proxy) = two_upstreams().await;
    let image = hub.push("library/demo", "1", Image::with_layers(&["one"]));
    for ns in ["docker.io", "index.docker.io", "registry-1.docker.io"] {
        proxy
            .get(&format!("/v2/library/demo/manifests/1?ns={ns}"))
            .await
            .is_image(&image);
    }
    assert_eq!(hub.manifest_gets("library/demo"), 1);
}

#[tokio::test]
async fn same_name_at_two_upstreams_is_two_images() {
    let (hub, other, proxy) = two_upstreams().await;
    let ours = hub.push("team/demo", "1", Image::with_layers(&["hub"]));
    let theirs = other.push("team/demo", "1", Image::with_layers(&["other"]));
    for _ in 0..2 {
        proxy.pull("team/demo", "1", &ours).await;
        proxy.pull("ghcr.io/team/demo", "1", &theirs).await;
    }
    hub.refuses();
    other.refuses();
    proxy.pull("team/demo", "1", &ours).await.is_stale();
    proxy.pull("ghcr.io/team/demo", "1", &theirs).await.is_stale();
}

#[tokio::test]
async fn connect_does_not_tunnel_to_any_host() {
    let (hub, other, proxy) = two_upstreams().await;
    for authority in [
        "evil.example:443",
        &hub.address().to_string(),
        "169.254.169.254:80",
    ] {
        let bytes = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
        let reply = raw(proxy.registry_address(), bytes.as_bytes()).await;
        assert!(
            !matches!(reply.status(), Some(200..=399)),
            "{authority}: {}",
            reply.text
        );
    }
    let absolute = format!(
        "GET {}/v2/ HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
        hub.url(),
        hub.address()
    );
    raw(proxy.registry_address(), absolute.as_bytes()).await;
    assert_eq!((hub.connections(), other.connections()), (0, 0));
}
