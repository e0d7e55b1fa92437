//! Eviction: the cache stays within its quota, and evicted images are downloaded again.

use crate::proxy::{Proxy, Setup, files_below};
use crate::registry::{Image, Upstream, noise};
use std::time::{Duration, SystemTime};

const LAYER_BYTES: usize = 600_000;

fn image(seed: u64) -> Image {
    Image::with_layers(&[noise(seed, LAYER_BYTES)])
}

/// Sets all access times so many hours back.
#[expect(
    clippy::disallowed_methods,
    reason = "the times of files are set beside those that the system gives"
)]
fn has_been_idle(setup: &Setup, hours: u64) {
    let then = SystemTime::now() - Duration::from_secs(hours * 3600);
    for folder in ["blobs", "manifests", "refs"] {
        for path in files_below(&setup.data().join(folder)) {
            let file = std::fs::File::open(path).unwrap();
            if file.metadata().unwrap().modified().unwrap() > then {
                file.set_modified(then).unwrap();
            }
        }
    }
}

async fn pull(proxy: &Proxy, tag: &str, image: &Image) {
    proxy.pull("library/demo", tag, image).await;
}

#[tokio::test]
async fn eviction_removes_least_recently_used_image() {
    let upstream = Upstream::start().await;
    let images: Vec<Image> = (0..4)
        .map(|seed| upstream.push("library/demo", &seed.to_string(), image(seed)))
        .collect();
    let setup = Setup::over(&upstream).tail("[store]\nsize = \"2.2 MB\"\nfree = \"0 B\"");
    let mut proxy = setup.start().await;
    for (number, image) in images[..3].iter().enumerate() {
        pull(&proxy, &number.to_string(), image).await;
        // After a restart, access times come from the files.
        has_been_idle(proxy.setup(), 9 - number as u64);
        proxy = proxy.crash().await;
    }
    proxy
        .until(
            "what is held to be counted",
            |proxy| proxy.admin("/api/v1/status"),
            |reply| reply.json()["store"]["is_counted"] == true,
        )
        .await;
    pull(&proxy, "3", &images[3]).await;

    let status = proxy.admin("/api/v1/status").await.json();
    let held =
        status["store"]["blob_bytes"].as_u64().unwrap() + status["store"]["manifest_bytes"].as_u64().unwrap();
    assert!(held <= 2_200_000, "{status}");
    assert_eq!(status["store"]["evicted"]["tags"], 1, "{status}");
    assert_eq!(proxy.setup().kept_blob(&images[0].blobs[1].digest), None);
    let metrics = String::from_utf8(proxy.admin("/metrics").await.body.to_vec()).unwrap();
    assert!(
        metrics.contains("ifnewer_store_evicted_total{limit=\"size\"} 3"),
        "{metrics}"
    );

    upstream.refuses();
    pull(&proxy, "1", &images[1]).await;
    upstream.recovers();
    has_been_idle(proxy.setup(), 4);
    let proxy = proxy.crash().await;
    proxy
        .until(
            "what is held to be counted",
            |proxy| proxy.admin("/api/v1/status"),
            |reply| reply.json()["store"]["is_counted"] == true,
        )
        .await;
    pull(&proxy, "0", &images[0]).await;
}

#[tokio::test]
async fn blob_without_space_is_forwarded_and_reported() {
    let upstream = Upstream::start().await;
    let proxy = Setup::over(&upstream)
        .tail("[store]\nsize = \"1 MiB\"\nfree = \"0 B\"")
        .start()
        .await;
    let first = upstream.push("library/demo", "first", image(1));
    let second = upstream.push("library/demo", "second", image(2));
    pull(&proxy, "first", &first).await;
    proxy.manifest("library/demo", "second").await.is_image(&second);
    let passed = proxy.blob("library/demo", &second.blobs[1].digest).await;
    passed.is_blob(&second.blobs[1]);
    assert!(
        passed.cache_status().contains("passthrough"),
        "{}",
        passed.cache_status()
    );
    let ready = proxy.admin("/readyz").await;
    let text = String::from_utf8_lossy(&ready.body).into_owned();
    assert!(
        ready.status == 200 && text.contains("degraded: no space"),
        "{text}"
    );
    pull(&proxy, "first", &first).await;
}
