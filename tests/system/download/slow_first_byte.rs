//! Upstreams with a late first byte, because they fetch the content themselves.

use crate::proxy::{Proxy, Setup, blob_path, manifest_path};
use crate::registry::{Gate, Image, Upstream};

/// docker.io is this upstream, with this header timeout.
async fn waiting(upstream: &Upstream, first_byte_timeout: &str) -> Proxy {
    let keys = format!("first_byte_timeout = \"{first_byte_timeout}\"");
    Setup::over(upstream)
        .upstream_keys("docker.io", &keys)
        .start()
        .await
}

#[tokio::test]
async fn r12_the_504_names_first_byte_timeout() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = waiting(&upstream, "200ms").await;
    proxy.manifest("library/demo", "1").await.is_image(&image);
    upstream.hangs();
    for refused in [
        proxy.blob("library/demo", &image.layer(0).digest).await,
        proxy.manifest("library/demo", "2").await,
    ] {
        refused.is_refused(504);
        let message = refused.message();
        assert!(
            message.contains("see `first_byte_timeout` of [upstream.\"docker.io\"]"),
            "{message}"
        );
    }
    // A longer timeout takes effect on reload.
    upstream.recovers();
    let text = proxy.setup().toml().replace("200ms", "5m");
    proxy.setup().file("ifnewer.toml", &text);
    proxy.program().reload();
    proxy.program().says("configuration reloaded").await;
    let gate = upstream.holds_answers(|seen| seen.path.contains("/blobs/"));
    let digest = &image.layer(0).digest;
    let (blob, ()) = tokio::join!(async { proxy.blob("library/demo", digest).await }, async {
        gate.reached().await;
        // Well over the 200 ms of the earlier timeout, as many requests as that takes.
        let began = tokio::time::Instant::now();
        while began.elapsed().as_millis() < 400 {
            proxy.has_turned(1).await;
        }
        gate.release();
    });
    blob.is_blob(image.layer(0));
}

#[tokio::test]
async fn r12_who_comes_again_finds_what_the_first_waited_for() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let proxy = waiting(&upstream, "5m").await;
    let digest = image.layer(0).digest.clone();
    let gate = upstream.holds_answers(|seen| seen.path.contains("/manifests/"));
    leaves(&proxy, &manifest_path("library/demo", "1"), &gate).await;
    gate.release();
    proxy
        .until(
            "the manifest to be kept",
            |proxy| proxy.manifest("library/demo", "1"),
            |reply| reply.cache_status().contains("hit"),
        )
        .await
        .is_image(&image);
    assert_eq!(
        upstream.manifest_gets("library/demo"),
        1,
        "the first client's, and no other"
    );

    let gate = upstream.holds_answers(|seen| seen.path.contains("/blobs/"));
    leaves(&proxy, &blob_path("library/demo", &digest), &gate).await;
    gate.release();
    proxy.until_kept(&digest).await;
    proxy.blob("library/demo", &digest).await.is_blob(image.layer(0));
    assert_eq!(upstream.blob_gets(&digest), 1);
}

/// A client that leaves before its first byte, after its request reached the upstream.
async fn leaves(proxy: &Proxy, path: &str, gate: &Gate) {
    let leaving = tokio::spawn(proxy.get(path).stream());
    gate.reached().await;
    leaving.abort();
    let _ = leaving.await;
}
