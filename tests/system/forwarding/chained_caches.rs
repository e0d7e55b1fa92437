//! Caches whose upstream is another cache: what the client learns about both, and request loops.

use std::time::Duration;

use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Front, Image, Seen, Upstream};

const REPOSITORY: &str = "library/demo";

/// By then a request that waits for another one would have been served.
const WAIT: Duration = Duration::from_secs(10);

fn leading_to(proxy: &Proxy) -> Setup {
    Setup::empty().upstream(
        "docker.io",
        &format!("url = \"http://{}\"", proxy.registry_address()),
    )
}

/// A cache over this registry, and one over that cache.
async fn pair(upstream: &Upstream) -> (Proxy, Proxy) {
    let regional = Proxy::over(upstream).await;
    let sidecar = leading_to(&regional).start().await;
    (regional, sidecar)
}

#[tokio::test]
async fn cache_status_lists_both_caches_in_order() {
    let upstream = Upstream::start().await;
    let image = upstream.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let (regional, sidecar) = pair(&upstream).await;
    let head = sidecar.head(&manifest_path(REPOSITORY, "latest")).await;
    let miss = "ifnewer; fwd=miss; detail=";
    assert_eq!(head.cache_status(), format!("{miss}head, {miss}head"));
    let cold = sidecar.manifest(REPOSITORY, "latest").await;
    cold.is_image(&image);
    assert_eq!(cold.cache_status(), format!("{miss}not-cached, {miss}not-cached"));
    sidecar.pull(REPOSITORY, "latest", &image).await;
    let hit = "ifnewer; hit; detail=";
    let unchanged = sidecar.manifest(REPOSITORY, "latest").await;
    assert_eq!(
        unchanged.cache_status(),
        format!("{hit}revalidated, {hit}revalidated")
    );
    let own = sidecar.manifest(REPOSITORY, &image.digest).await;
    assert_eq!(
        own.cache_status(),
        format!("{hit}immutable"),
        "nobody else was asked"
    );
    drop(regional);
}

#[tokio::test]
async fn cache_status_of_a_shared_request_lists_both_caches() {
    let upstream = Upstream::start().await;
    let image = upstream.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let (_regional, sidecar) = pair(&upstream).await;
    let gate = upstream.holds_answers(|seen| seen.path.contains("/manifests/"));
    let path = manifest_path(REPOSITORY, "latest");
    let ask = || tokio::spawn(sidecar.get(&path).into_reply());
    let mut replies = vec![ask()];
    gate.reached().await;
    replies.extend((0..8).map(|_| ask()));
    sidecar.ask("GET", "/v2/").await;
    gate.release();
    for reply in replies {
        let reply = reply.await.expect("the request ends");
        reply.is_image(&image);
        let status = reply.cache_status();
        assert_eq!(status.matches("ifnewer;").count(), 2, "{status}");
    }
}

#[tokio::test]
async fn stale_copy_of_another_cache_is_marked_as_stale() {
    let upstream = Upstream::start().await;
    let image = upstream.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let (_regional, sidecar) = pair(&upstream).await;
    sidecar.pull(REPOSITORY, "latest", &image).await.is_not_stale();
    upstream.refuses();
    let reply = sidecar.manifest(REPOSITORY, "latest").await;
    reply.is_image(&image).is_stale();
    assert_eq!(
        reply.cache_status(),
        "ifnewer; hit; detail=stale-if-error-connection-refused, ifnewer; hit; detail=revalidated"
    );
}

#[tokio::test]
async fn upstream_requests_name_the_caches_they_passed() {
    let upstream = Upstream::start().await;
    let image = upstream.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let (_regional, sidecar) = pair(&upstream).await;
    let edge = "edge.example; trace=\"a, b\"";
    let ask = sidecar.manifest(REPOSITORY, "latest").header("cdn-loop", edge);
    ask.await.is_image(&image);
    let requests = upstream.requests();
    let list = requests[0].header("cdn-loop").unwrap();
    let added = list.strip_prefix(edge).unwrap_or_else(|| panic!("{list}"));
    let ids: Vec<_> = added.split(", ").skip(1).collect();
    assert!(ids.len() == 2 && ids[0] != ids[1], "{list}");
    assert!(ids.iter().all(|id| id.starts_with("ifnewer-")), "{list}");
}

#[tokio::test]
async fn request_that_names_other_caches_is_not_shared() {
    let upstream = Upstream::start().await;
    let image = upstream.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let (list, path) = ("cdn.example; loops=9", manifest_path(REPOSITORY, "latest"));
    let names_it = |seen: &Seen| {
        seen.header("cdn-loop")
            .unwrap_or_default()
            .contains("cdn.example")
    };
    let gate = upstream.holds_answers(names_it);
    let held = tokio::spawn(proxy.get(&path).header("cdn-loop", list).into_reply());
    gate.reached().await;
    let other = tokio::time::timeout(WAIT, proxy.manifest(REPOSITORY, "latest").into_reply());
    other.await.expect("it is not held too").is_image(&image);
    gate.release();
    held.await.expect("the request ends").is_image(&image);
    // Further clients read a download while it runs.
    let layer = image.layer(0);
    let blob = proxy.blob(REPOSITORY, &layer.digest).header("cdn-loop", list);
    blob.await.is_blob(layer);
    let is_download = |seen: &&Seen| seen.method == "GET" && seen.path.contains("/blobs/");
    let requests = upstream.requests();
    let mut downloads = requests.iter().filter(is_download).peekable();
    assert!(downloads.peek().is_some());
    assert!(downloads.all(|seen| !names_it(seen)), "{requests:#?}");
}

#[tokio::test]
async fn redirect_to_the_cache_itself_is_a_loop() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let target = format!(
        "http://{}{}",
        proxy.registry_address(),
        manifest_path(REPOSITORY, "unknown")
    );
    let redirect = Front::redirect(301, &target);
    upstream.is_fronted(|seen| seen.path.contains("/manifests/"), &redirect);
    is_refused_as_loop(&proxy).await;
}

#[tokio::test]
async fn upstream_that_is_the_cache_itself_is_a_loop() {
    let upstream = Upstream::start().await;
    let image = upstream.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull(REPOSITORY, "latest", &image).await;
    let looping = proxy.setup().clone().with_upstreams_of(&leading_to(&proxy));
    proxy.setup().file("ifnewer.toml", &looping.toml());
    proxy.program().reload();
    let ask = |proxy: &Proxy| proxy.manifest(REPOSITORY, "latest");
    let reply = proxy
        .until("the loop", ask, |reply| reply.cache_status().contains("loop"))
        .await;
    reply.is_image(&image).is_stale();
    is_refused_as_loop(&proxy).await;
}

#[tokio::test]
async fn loop_through_another_cache_is_refused() {
    let upstream = Upstream::start().await;
    let first = Proxy::over(&upstream).await;
    let second = leading_to(&first).start().await;
    let looping = first.setup().clone().with_upstreams_of(&leading_to(&second));
    first.setup().file("ifnewer.toml", &looping.toml());
    first.program().reload();
    let ask = |proxy: &Proxy| proxy.manifest(REPOSITORY, "unknown");
    first.until("the loop", ask, |reply| reply.status == 508).await;
    is_refused_as_loop(&first).await;
    is_refused_as_loop(&second).await;
}

async fn is_refused_as_loop(proxy: &Proxy) {
    let reply = proxy.manifest(REPOSITORY, "unknown").await;
    reply.is_refused(508);
    assert!(reply.message().contains("leads back to this cache"), "{reply:#?}");
}

#[tokio::test]
async fn overlong_list_of_caches_is_refused() {
    let upstream = Upstream::start().await;
    upstream.push(REPOSITORY, "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let ids = vec!["other-cache.example"; 60].join(", ");
    let ask = proxy.manifest(REPOSITORY, "latest").header("cdn-loop", &ids);
    let reply = ask.await;
    reply.is_refused(508);
    assert!(reply.message().contains("request loop"), "{reply:#?}");
    assert_eq!(upstream.requests().len(), 0);
}
