//! Rows about blobs: 3, 4, 9, 10, 12, 13, 24, 27.

use crate::download::corruption::{SIZE, heals, overwrite, stopped, with_a_layer};
use crate::download::ranges::SEVERAL;
use crate::proxy::{Proxy, blob_path};
use crate::registry::{Blob, Image, Upstream, noise, sha512};
use crate::robustness::http::warm;
use tokio::task::JoinSet;

const LAYER: usize = 4_000_000;

#[tokio::test]
async fn row_03_a_blob_is_whole_wherever_the_upstream_breaks_off() {
    for every in [7_000, 65_535, 65_536, 65_537, 200_000, 299_999] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "latest", Image::of_noise(every as u64, 300_000));
        let proxy = Proxy::over(&upstream).await;
        proxy.manifest("library/demo", "latest").await;
        // Each response breaks after so many bytes, also those to the resuming `Range`.
        upstream.truncates_blob_at(every);
        let mut clients = JoinSet::new();
        for _ in 0..3 {
            clients.spawn(proxy.blob("library/demo", &image.layer(0).digest).into_reply());
        }
        for reply in clients.join_all().await {
            reply.is_blob(image.layer(0));
        }
    }
}

#[tokio::test]
async fn row_10_every_answer_with_a_blob_says_its_length() {
    for (fault, inject) in [
        ("none", (|_| {}) as fn(&Upstream)),
        ("no length anywhere", Upstream::omits_length),
        ("no length and no ranges", |upstream| {
            upstream.omits_length();
            upstream.ignores_range();
        }),
        ("no HEAD of blobs", Upstream::refuses_blob_heads),
    ] {
        for knows_manifest in [true, false] {
            let upstream = Upstream::start().await;
            let image = upstream.push("library/demo", "latest", Image::of_noise(1, 300_000));
            inject(&upstream);
            let proxy = Proxy::over(&upstream).await;
            if knows_manifest {
                proxy.manifest("library/demo", "latest").await;
            }
            let layer = image.layer(0);
            let path = blob_path("library/demo", &layer.digest);
            // The size in a manifest is a hint. If the upstream sends no length, the cache sends none either.
            if fault == "no length and no ranges" {
                let head = proxy.head(&path).unchecked().await;
                assert_eq!(
                    (head.status, head.header("content-length")),
                    (200, None),
                    "{head:#?}"
                );
            } else {
                proxy.head(&path).await.is_blob(layer);
            }
            proxy.get(&path).await.is_blob(layer);
            // Without a manifest there is no grant, so nothing is served from the cache.
            if knows_manifest {
                proxy.until_kept(&layer.digest).await;
                proxy.head(&path).await.is_blob(layer).is_hit();
                proxy.get(&path).await.is_blob(layer).is_hit();
            }
        }
    }
}

/// `Range` → response for 4,000,000 bytes: the cases of the conformance suite, moved near the end.
const RANGES: &[(&str, Option<(usize, usize)>)] = &[
    ("bytes=500-1499", Some((500, 1_500))),
    ("bytes=0-0", Some((0, 1))),
    ("bytes=500-", Some((500, LAYER))),
    ("bytes=-500", Some((LAYER - 500, LAYER))),
    ("bytes=-5000000", Some((0, LAYER))),
    ("bytes=3999000-5000000", Some((3_999_000, LAYER))),
    ("bytes=500-0", None),
    ("bytes=5000000-10000000", None),
    ("bytes=4000000-", None),
    ("bytes=-0", None),
];

#[tokio::test]
async fn row_12_range_is_exact_before_during_and_after_fill() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(5, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 1_000_000);
    let ask = |range: &str| proxy.blob("library/demo", &layer.digest).header("range", range);
    // The first range starts the download. Bytes already received are served while the upstream stalls.
    for (range, (start, end)) in [
        ("bytes=10-19", (10, 20)),
        ("bytes=900000-900009", (900_000, 900_010)),
    ] {
        let reply = ask(range).await;
        assert_eq!(
            (reply.status, &reply.body[..]),
            (206, &layer.bytes[start..end]),
            "{range}"
        );
    }
    let mut during = JoinSet::new();
    for (range, expected) in RANGES {
        let ask = ask(range);
        during.spawn(async move { (range, expected, ask.await) });
    }
    gate.release();
    let mut replies = during.join_all().await;
    proxy.until_kept(&layer.digest).await;
    for (range, expected) in RANGES {
        replies.push((range, expected, ask(range).await));
    }
    for (range, expected, reply) in replies {
        if let Some((start, end)) = expected {
            let content_range = format!("bytes {start}-{}/{LAYER}", end - 1);
            assert_eq!(
                (reply.status, reply.header("content-range")),
                (206, Some(content_range.as_str())),
                "{range}"
            );
            assert!(reply.whole && reply.body == layer.bytes[*start..*end], "{range}");
        } else {
            let content_range = format!("bytes */{LAYER}");
            assert_eq!(
                (reply.status, reply.header("content-range")),
                (416, Some(content_range.as_str())),
                "{range}"
            );
        }
    }
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
}

#[tokio::test]
async fn row_13_clients_that_close_early_end_no_fill() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(6, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 2_000_000);
    // As containerd does: an open-ended range, a chunk of it, and the connection closed.
    for from in [0, 500_000, 1_000_000] {
        let ask = proxy
            .blob("library/demo", &layer.digest)
            .header("range", &format!("bytes={from}-"));
        let mut stream = ask.stream().await;
        assert_eq!(stream.status, 206);
        assert_eq!(stream.read(100_000).await, layer.bytes[from..from + 100_000]);
    }
    gate.release();
    proxy.until_kept(&layer.digest).await;
    proxy
        .blob("library/demo", &layer.digest)
        .await
        .is_blob(layer)
        .is_hit();
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
}

#[tokio::test]
async fn row_24_blob_by_sha512_is_named_and_verified_by_sha512() {
    let upstream = Upstream::start().await;
    let content = noise(12, 300_000);
    let (right, wrong) = (sha512(&content), sha512(b"something else"));
    upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    upstream.push_named("library/demo", &right, &content);
    upstream.push_named("library/demo", &wrong, &content);
    let proxy = Proxy::over(&upstream).await;
    assert_eq!(
        proxy.manifest("library/demo", "1").await.status,
        200,
        "rights come with manifests"
    );
    let path = blob_path("library/demo", &right);
    for _ in 0..2 {
        let reply = proxy.get(&path).await;
        assert_eq!(
            (reply.status, reply.header("docker-content-digest")),
            (200, Some(right.as_str())),
            "{reply:#?}"
        );
        assert!(reply.body == content);
        let head = proxy.head(&path).await;
        assert_eq!(head.header("docker-content-digest"), Some(right.as_str()));
        assert_eq!(head.header("content-length"), Some("300000"));
        let part = proxy.get(&path).header("range", "bytes=5-9").await;
        assert_eq!((part.status, &part.body[..]), (206, &content[5..10]));
        proxy.until_kept(&right).await;
    }
    assert_eq!(upstream.blob_gets(&right), 1);
    proxy.blob("library/demo", &wrong).visibly_fails().await;
}

#[tokio::test]
async fn row_04_a_blob_that_lost_its_end_on_the_disk_is_fetched_again() {
    let (upstream, proxy, blob) = with_a_layer(10).await;
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
    let file = proxy.until_kept(&blob.digest).await;
    let setup = stopped(proxy).await;
    overwrite(&file, |bytes| {
        bytes.truncate(SIZE / 2);
    });

    let proxy = setup.start().await;
    heals(&proxy, &blob).await;
    assert_eq!(upstream.blob_gets(&blob.digest), 2);
}

#[tokio::test]
async fn row_04_a_blob_that_rotted_on_the_disk_is_never_served_whole() {
    let (_upstream, proxy, blob) = with_a_layer(11).await;
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
    let file = proxy.until_kept(&blob.digest).await;
    let setup = stopped(proxy).await;
    overwrite(&file, |bytes| {
        bytes[SIZE / 2] ^= 1;
    });

    let proxy = setup.start().await;
    heals(&proxy, &blob).await;
}

#[tokio::test]
async fn row_09_an_answer_begins_before_upstream_has_ended() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(2, 2_000_000));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer: &Blob = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 1_000_000);

    let mut stream = proxy.blob("library/demo", &layer.digest).stream().await;
    assert_eq!(stream.status, 200);
    assert_eq!(stream.headers["content-length"], "2000000");
    assert_eq!(stream.read(500_000).await, layer.bytes[..500_000]);
    gate.release();
    assert_eq!(stream.rest().await.unwrap(), layer.bytes[500_000..]);
}

#[tokio::test]
async fn row_13_parallel_open_ranges_of_cold_blob_share_transfer() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(7, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 0);

    let mut clients = JoinSet::new();
    for part in 0..8 {
        let from = part * LAYER / 8;
        let ask = proxy
            .blob("library/demo", &layer.digest)
            .header("range", &format!("bytes={from}-"));
        clients.spawn(async move { (from, ask.await) });
    }
    gate.reached().await;
    gate.release();
    for (from, reply) in clients.join_all().await {
        let expected = &layer.bytes[from..];
        assert!(matches!(reply.status, 200 | 206), "{}", reply.status);
        let came = if reply.status == 206 {
            &reply.body[..]
        } else {
            &reply.body[from..]
        };
        assert!(reply.whole && came == expected, "from {from}");
    }
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
}

#[tokio::test]
async fn row_27_several_ranges_of_a_held_blob_come_as_parts() {
    let (_upstream, proxy, image) = warm().await;
    let ca = proxy.ca_pem();
    let layer = image.layer(0);
    for (range, expected) in SEVERAL {
        for protocols in [None, Some(&["http/1.1"][..]), Some(&["h2"])] {
            let ask = proxy.blob("library/demo", &layer.digest).header("range", range);
            let ask = match protocols {
                Some(protocols) => ask.tls(&ca, protocols),
                None => ask,
            };
            let reply = ask.await;
            assert_eq!(reply.status, 206, "{range}: {reply:#?}");
            assert_eq!(reply.header("content-range"), None, "it stands in each part");
            let parts = reply.parts();
            assert_eq!(parts.len(), expected.len(), "{range}: {parts:?}");
            for ((content_range, bytes), (start, end)) in parts.iter().zip(*expected) {
                assert_eq!(
                    content_range,
                    &format!("bytes {start}-{}/10000", end - 1),
                    "{range}"
                );
                assert_eq!(bytes, &layer.bytes[*start..*end], "{range}");
            }
        }
    }
}

#[tokio::test]
async fn row_27_multiple_ranges_of_cold_blob_get_full_blob() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&[noise(1, 100_000)]));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let ask = proxy.blob("library/demo", &layer.digest);
    ask.header("range", "bytes=0-9,100-109").await.is_blob(layer);
}
