//! Request coalescing: concurrent requests share one upstream request and one transfer.

use crate::proxy::{Proxy, blob_path, manifest_path};
use crate::registry::{Image, Upstream, noise};
use tokio::task::JoinSet;

const CLIENTS: usize = 64;
const LAYER: usize = 4 * 1024 * 1024;

#[tokio::test]
async fn cold_clients_share_one_transfer_with_right_bytes() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(1, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    upstream.clear_log();
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, LAYER / 2);

    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let mut stream = proxy.blob("library/demo", &layer.digest).stream().await;
        clients.spawn(async move {
            let first = stream.read(LAYER / 4).await;
            (first, stream)
        });
    }
    let early = clients.join_all().await;
    assert_eq!(
        gate.arrived(),
        1,
        "all have their first bytes while upstream is held"
    );
    gate.release();
    for (first, mut stream) in early {
        let rest = stream.rest().await.expect("a whole body");
        assert!([&first[..], &rest[..]].concat() == layer.bytes, "the wrong bytes");
    }
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
    assert_eq!(upstream.bytes_sent(), LAYER as u64);
}

#[tokio::test]
async fn many_cold_clients_ask_for_a_tag_once() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let gate = upstream.holds_answers(|seen| seen.path.contains("/manifests/"));
    let proxy = Proxy::over(&upstream).await;

    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(proxy.manifest("library/demo", "latest").into_reply());
    }
    gate.reached().await;
    proxy.has_turned(CLIENTS).await;
    assert_eq!(gate.arrived(), 1, "nobody else asks while the question is out");
    gate.release();
    for reply in clients.join_all().await {
        reply.is_image(&image);
    }
    assert_eq!(upstream.manifest_gets("library/demo"), 1);
}

#[tokio::test]
async fn many_warm_clients_ask_for_a_tag_once() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.clear_log();
    let gate = upstream.holds_answers(|seen| seen.method == "HEAD");

    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(proxy.manifest("library/demo", "latest").into_reply());
    }
    gate.reached().await;
    proxy.has_turned(CLIENTS).await;
    assert_eq!(gate.arrived(), 1, "nobody else asks while the question is out");
    gate.release();
    for reply in clients.join_all().await {
        reply.is_image(&image).is_hit();
    }
}

#[tokio::test]
async fn the_same_layer_through_two_repositories_is_one_transfer() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/one", "1", Image::of_noise(2, LAYER));
    upstream.push("library/two", "1", image.clone());
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/one", "1").await;
    proxy.manifest("library/two", "1").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, LAYER / 2);

    let mut one = proxy.blob("library/one", &layer.digest).stream().await;
    gate.reached().await;
    let mut two = proxy.blob("library/two", &layer.digest).stream().await;
    two.read(LAYER / 4).await;
    gate.release();
    assert!(one.rest().await.unwrap() == layer.bytes);
    assert_eq!(two.rest().await.unwrap().len(), LAYER - LAYER / 4);
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
}

#[tokio::test]
async fn the_download_ends_though_its_first_client_left() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(3, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, LAYER / 2);

    let mut leaver = proxy.blob("library/demo", &layer.digest).stream().await;
    leaver.read(1000).await;
    gate.reached().await;
    let mut stayer = proxy.blob("library/demo", &layer.digest).stream().await;
    stayer.read(1000).await;
    drop(leaver);
    gate.release();
    assert_eq!(stayer.rest().await.unwrap().len(), LAYER - 1000);
    proxy.blob("library/demo", &layer.digest).await.is_blob(layer);
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
}

#[tokio::test]
async fn the_download_ends_though_all_its_clients_left() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(4, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, LAYER / 2);

    let mut leaver = proxy.blob("library/demo", &layer.digest).stream().await;
    leaver.read(1000).await;
    gate.reached().await;
    drop(leaver);
    gate.release();
    let ask = |proxy: &Proxy| proxy.blob("library/demo", &layer.digest);
    proxy
        .until("the blob to be held", ask, |reply| {
            reply.cache_status().contains("hit")
        })
        .await
        .is_blob(layer);
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
}

#[tokio::test]
async fn client_that_does_not_read_delays_no_other_client() {
    const LARGE: usize = 24 * 1024 * 1024;
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(5, LARGE));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);

    let idle = proxy.blob("library/demo", &layer.digest).stream().await;
    proxy.blob("library/demo", &layer.digest).await.is_blob(layer);
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
    let mut idle = idle;
    assert!(idle.rest().await.unwrap() == layer.bytes);
}

#[tokio::test]
async fn ranges_and_heads_are_answered_during_the_download() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(6, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, LAYER / 2);
    let mut whole = proxy.blob("library/demo", &layer.digest).stream().await;
    gate.reached().await;

    let path = blob_path("library/demo", &layer.digest);
    proxy.head(&path).await.is_blob(layer);
    let part = proxy.get(&path).header("range", "bytes=100-199").await;
    assert_eq!((part.status, &part.body[..]), (206, &layer.bytes[100..200]));
    assert_eq!(
        part.header("content-range"),
        Some(format!("bytes 100-199/{LAYER}").as_str())
    );
    let mut tail = proxy
        .get(&path)
        .header("range", &format!("bytes={}-", LAYER / 2 - 10))
        .stream()
        .await;
    assert_eq!(tail.status, 206);
    assert_eq!(tail.read(5).await, layer.bytes[LAYER / 2 - 10..LAYER / 2 - 5]);
    gate.release();
    assert_eq!(tail.rest().await.unwrap(), layer.bytes[LAYER / 2 - 5..]);
    assert!(whole.rest().await.unwrap() == layer.bytes);
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
}

#[tokio::test]
async fn two_tags_are_not_one_question() {
    let upstream = Upstream::start().await;
    let one = upstream.push("library/demo", "one", Image::with_layers(&[noise(1, 10)]));
    let two = upstream.push("library/demo", "two", Image::with_layers(&[noise(2, 10)]));
    let gate = upstream.holds_answers(|seen| seen.path.ends_with("/one"));
    let proxy = Proxy::over(&upstream).await;

    let waiting = tokio::spawn(proxy.manifest("library/demo", "one").into_reply());
    gate.reached().await;
    proxy
        .get(&manifest_path("library/demo", "two"))
        .await
        .is_image(&two);
    gate.release();
    waiting.await.unwrap().is_image(&one);
}
