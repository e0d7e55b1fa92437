//! Redirects to storage: followed by the cache, without the client's credential, and never sent to the client.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, Upstream, noise};

#[tokio::test]
async fn a_token_stays_with_the_registry_too() {
    let upstream = Upstream::start().await;
    let storage = Upstream::start().await;
    upstream.requires_token();
    upstream.makes_public("library/demo");
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    upstream.redirects_blobs_to(&storage);
    let proxy = Proxy::over(&upstream).await;

    proxy.pull("library/demo", "1", &image).await;
    assert!(storage.requests().iter().all(|seen| !seen.authorized()));
}

#[tokio::test]
async fn every_kind_of_redirect_is_followed_also_a_relative_one() {
    for status in [301, 302, 303, 307, 308] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
        upstream.redirects_blobs_with(status, "/storage/{digest}");
        let proxy = Proxy::over(&upstream).await;
        proxy.pull("library/demo", "1", &image).await;
        proxy
            .head(&crate::proxy::blob_path("library/demo", &image.layer(0).digest))
            .await
            .is_blob(image.layer(0));
    }
}

#[tokio::test]
async fn a_redirect_in_a_circle_ends() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "1").await;
    upstream.redirects_blobs_with(307, "/v2/library/demo/blobs/{digest}");
    upstream.clear_log();

    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_refused(502);
    assert!(
        upstream.requests().len() <= 40,
        "{} requests",
        upstream.requests().len()
    );
}

#[tokio::test]
async fn a_redirect_that_leads_nowhere_is_the_upstreams_fault() {
    for location in [
        "",
        "http://",
        "ftp://127.0.0.1/x",
        "http://storage.invalid/x",
        "http://127.0.0.1:1/x",
    ] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
        let proxy = Proxy::over(&upstream).await;
        proxy.manifest("library/demo", "1").await;
        upstream.redirects_blobs_with(307, location);
        let reply = proxy.blob("library/demo", &image.layer(0).digest).await;
        assert!(matches!(reply.status, 502..=504), "`{location}`: {reply:#?}");
    }
}

#[tokio::test]
async fn storage_interruption_resumes_from_registry() {
    let upstream = Upstream::start().await;
    let storage = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&[noise(1, 500_000)]));
    upstream.redirects_blobs_to(&storage);
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "1").await;
    storage.truncates_blobs_at(200_000, 1);

    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_blob(image.layer(0));
    assert_eq!(
        upstream.blob_gets(&image.layer(0).digest),
        2,
        "a signed URL may have expired"
    );
    let ranges: Vec<_> = storage
        .requests()
        .iter()
        .map(|seen| seen.header("range").map(str::to_owned))
        .collect();
    assert_eq!(ranges, [None, Some("bytes=200000-".to_owned())]);
}

#[tokio::test]
async fn storage_that_is_down_is_not_a_missing_blob() {
    let upstream = Upstream::start().await;
    let storage = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    upstream.redirects_blobs_to(&storage);
    storage.refuses();
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "1").await;
    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_unreachable();
}

#[tokio::test]
async fn location_with_unescaped_characters_is_followed() {
    for location in [
        "/storage/{digest}?response-content-disposition=attachment; filename=\"a b.tar\"",
        "/storage/{digest}?a|b=[c]&{d}=<e>^`\\",
        "/storage/{digest}?name=größe✓",
        "/storage/{digest}?sig=a%2Fb%zz%&x=+",
        "/storage/{digest}#part",
        "  /storage/{digest}  ",
    ] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
        upstream.redirects_blobs_with(307, location);
        let proxy = Proxy::over(&upstream).await;
        proxy.pull("library/demo", "1", &image).await;
    }
}

#[tokio::test]
async fn two_urls_that_redirect_to_each_other_end() {
    let (one, two) = (Upstream::start().await, Upstream::start().await);
    let image = one.push("library/demo", "1", Image::with_layers(&["one"]));
    two.push("library/demo", "1", image.clone());
    one.redirects_blobs_with(307, &format!("{}/v2/library/demo/blobs/{{digest}}", two.url()));
    two.redirects_blobs_with(307, &format!("{}/v2/library/demo/blobs/{{digest}}", one.url()));
    let urls = format!("url = [\"{}\", \"{}\"]", one.url(), two.url());
    let proxy = Setup::empty().upstream("docker.io", &urls).start().await;
    proxy.manifest("library/demo", "1").await.is_image(&image);
    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_refused(502);
    let asked = one.requests().len() + two.requests().len();
    assert!(asked <= 80, "{asked} requests");
}

/// An https registry whose storage speaks plain HTTP.
async fn with_plain_storage() -> (Upstream, Upstream, Image) {
    let (upstream, storage) = (Upstream::start_tls().await, Upstream::start().await);
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one", "two"]));
    upstream.redirects_blobs_to(&storage);
    (upstream, storage, image)
}

#[tokio::test]
async fn r13_plain_http_storage_only_where_redirects_names_it() {
    let (upstream, storage, image) = with_plain_storage().await;
    let place = storage.address();
    for other in [
        String::new(),
        format!("\"{place}\""),
        "\"http://127.0.0.1\"".to_owned(),
        "\"http://localhost\", \"127.0.0.0/8\"".to_owned(),
    ] {
        let keys = format!("redirects = [{other}]");
        let proxy = Setup::over(&upstream)
            .upstream_keys("docker.io", &keys)
            .start()
            .await;
        proxy.manifest("library/demo", "1").await.is_image(&image);
        let refused = proxy.blob("library/demo", &image.layer(0).digest).await;
        refused.is_refused(502);
        let message = refused.message();
        assert!(
            message.contains("redirected to plain http") && message.contains("see `redirects`"),
            "{message}"
        );
        assert!(
            !message.contains("127.0.0.1"),
            "a client learns no host: {message}"
        );
        let entry = format!("redirects = [\"http://{place}\"]");
        proxy.program().says(&entry.replace('"', "\\\"")).await;
        let listed = proxy.admin("/api/v1/upstreams").await.json();
        let hub = listed["upstreams"].as_array().unwrap();
        let hub = hub.iter().find(|one| one["name"] == "docker.io").unwrap();
        let detail = hub["last_failure"]["detail"].as_str().unwrap();
        assert!(detail.contains(&entry), "{detail}");
    }
    assert!(storage.requests().is_empty());

    // The named entry works, also after a reload. So does the network.
    for entry in [format!("http://{place}"), "http://127.0.0.0/8".to_owned()] {
        let proxy = Setup::over(&upstream).start().await;
        proxy
            .blob("library/demo", &image.layer(0).digest)
            .await
            .is_refused(502);
        let keys = format!("redirects = [\"{entry}\"]");
        let setup = proxy.setup().clone().upstream_keys("docker.io", &keys);
        setup.file("ifnewer.toml", &setup.toml());
        proxy.program().reload();
        proxy.program().says("configuration reloaded").await;
        proxy.pull("library/demo", "1", &image).await;
    }
    assert!(storage.requests().iter().all(|seen| !seen.authorized()));
}

#[tokio::test]
async fn r13_bytes_of_plain_storage_are_held_to_their_digest() {
    let (upstream, storage, image) = with_plain_storage().await;
    storage.corrupts_blob();
    let keys = format!("redirects = [\"http://{}\"]", storage.address());
    let proxy = Setup::over(&upstream)
        .upstream_keys("docker.io", &keys)
        .start()
        .await;
    let layer = image.layer(0);
    proxy.manifest("library/demo", "1").await.is_image(&image);
    let reply = proxy.blob("library/demo", &layer.digest).broken_or_reply().await;
    assert!(reply.is_none_or(|reply| reply.status != 200));
}
