//! Range requests on cached and uncached blobs.

use crate::proxy::Proxy;
use crate::registry::{Image, Upstream, noise};
use crate::robustness::http::warm;

/// `Range` → status, `Content-Range`, bytes; of 10,000.
const RANGES: &[(&str, u16, &str, (usize, usize))] = &[
    ("bytes=0-0", 206, "bytes 0-0/10000", (0, 1)),
    ("bytes=500-1499", 206, "bytes 500-1499/10000", (500, 1500)),
    ("bytes=500-", 206, "bytes 500-9999/10000", (500, 10_000)),
    ("bytes=0-", 206, "bytes 0-9999/10000", (0, 10_000)),
    ("bytes=-500", 206, "bytes 9500-9999/10000", (9500, 10_000)),
    ("bytes=-20000", 206, "bytes 0-9999/10000", (0, 10_000)),
    ("bytes=9000-50000", 206, "bytes 9000-9999/10000", (9000, 10_000)),
    ("bytes=9999-", 206, "bytes 9999-9999/10000", (9999, 10_000)),
    ("bytes=10000-", 416, "bytes */10000", (0, 0)),
    ("bytes=20000-30000", 416, "bytes */10000", (0, 0)),
    ("bytes=-0", 416, "bytes */10000", (0, 0)),
    ("bytes=99999999999999999999999-", 416, "bytes */10000", (0, 0)),
];

#[tokio::test]
async fn a_range_is_answered_with_exactly_that_part() {
    let (_upstream, proxy, image) = warm().await;
    let layer = image.layer(0);
    for (range, status, content_range, (start, end)) in RANGES {
        let reply = proxy
            .blob("library/demo", &layer.digest)
            .header("range", range)
            .await;
        if *range == "bytes=99999999999999999999999-" && reply.status == 200 {
            continue; // A number too large to read makes the header malformed: ignoring it is right too.
        }
        assert_eq!(
            (reply.status, reply.header("content-range")),
            (*status, Some(*content_range)),
            "{range}: {reply:#?}"
        );
        if *status == 206 {
            assert_eq!(reply.body, layer.bytes[*start..*end], "{range}");
            assert_eq!(
                reply.header("content-length"),
                Some((end - start).to_string().as_str()),
                "{range}"
            );
        }
    }
}

#[tokio::test]
async fn a_range_that_is_none_is_ignored() {
    let (_upstream, proxy, image) = warm().await;
    for range in [
        "lines=1-2",
        "bytes",
        "bytes=",
        "bytes=a-b",
        "bytes=5-1",
        "bytes=1",
        "bytes=--1",
    ] {
        let reply = proxy
            .blob("library/demo", &image.layer(0).digest)
            .header("range", range)
            .await;
        // The conformance suite expects 416 for an end before its start.
        if reply.status != 416 || range != "bytes=5-1" {
            reply.is_blob(image.layer(0));
        }
    }
}

#[tokio::test]
async fn range_of_cold_blob_is_served_and_blob_cached() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&[noise(1, 10_000)]));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let reply = proxy
        .blob("library/demo", &layer.digest)
        .header("range", "bytes=500-1499")
        .await;
    assert_eq!(
        (reply.status, reply.header("content-range")),
        (206, Some("bytes 500-1499/10000")),
        "{reply:#?}"
    );
    assert_eq!(reply.body, layer.bytes[500..1500]);
    proxy.blob("library/demo", &layer.digest).await.is_blob(layer);
    assert_eq!(upstream.blob_gets(&layer.digest), 1);
}

/// `bytes=…` and the expected parts, of 10,000 bytes.
pub const SEVERAL: &[(&str, &[(usize, usize)])] = &[
    ("bytes=0-9,100-109", &[(0, 10), (100, 110)]),
    ("bytes=100-109, 0-9", &[(100, 110), (0, 10)]),
    ("bytes=0-0,-1", &[(0, 1), (9999, 10_000)]),
    ("bytes=0-99,100-199", &[(0, 100), (100, 200)]),
    ("bytes=9990-20000,5-6", &[(9990, 10_000), (5, 7)]),
    // Unsatisfiable ranges are omitted. A single remaining one is still multipart, because several were requested.
    ("bytes=0-9,10000-", &[(0, 10)]),
    // Overlapping ranges are merged.
    ("bytes=0-99,50-149,500-509", &[(0, 150), (500, 510)]),
    ("bytes=0-,0-,0-,0-", &[(0, 10_000)]),
];

#[tokio::test]
async fn several_ranges_of_a_large_held_blob_come_from_its_file() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(3, 3_000_000));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    let layer = image.layer(0);
    // podman requests changed parts this way: hundreds of ranges, some longer than one file read.
    let spans: Vec<(usize, usize)> = (0..500)
        .map(|n| (n * 2_000, n * 2_000 + 700))
        .chain([(1_100_000, 2_900_000)])
        .collect();
    let text: Vec<String> = spans
        .iter()
        .map(|(start, end)| format!("{start}-{}", end - 1))
        .collect();
    let reply = proxy
        .blob("library/demo", &layer.digest)
        .header("range", &format!("bytes={}", text.join(",")))
        .await;
    assert_eq!(reply.status, 206);
    let parts = reply.parts();
    assert_eq!(parts.len(), spans.len());
    for ((_, bytes), (start, end)) in parts.iter().zip(&spans) {
        assert_eq!(bytes, &layer.bytes[*start..*end]);
    }
}

#[tokio::test]
async fn several_ranges_none_of_which_exists_are_416() {
    let (_upstream, proxy, image) = warm().await;
    let reply = proxy
        .blob("library/demo", &image.layer(0).digest)
        .header("range", "bytes=10000-,20000-30000")
        .await;
    assert_eq!(
        (reply.status, reply.header("content-range")),
        (416, Some("bytes */10000"))
    );
}

#[tokio::test]
async fn more_ranges_than_anybody_needs_are_answered_with_the_whole() {
    let (_upstream, proxy, image) = warm().await;
    let many = vec!["0-0"; 1025].join(",");
    let ask = proxy.blob("library/demo", &image.layer(0).digest);
    ask.header("range", &format!("bytes={many}"))
        .await
        .is_blob(image.layer(0));
}

#[tokio::test]
async fn if_range_mismatch_returns_full_blob() {
    let (_upstream, proxy, image) = warm().await;
    let layer = image.layer(0);
    let same = format!("\"{}\"", layer.digest);
    let others = [
        "\"other\"".to_owned(),
        format!("W/{same}"),
        "Sat, 01 Jan 2000 00:00:00 GMT".to_owned(),
    ];
    for range in ["bytes=0-9", "bytes=0-9,100-109"] {
        let ask = || proxy.blob("library/demo", &layer.digest).header("range", range);
        assert_eq!(ask().header("if-range", &same).await.status, 206, "{range}");
        for other in &others {
            ask().header("if-range", other).await.is_blob(layer);
        }
    }
}

#[tokio::test]
async fn a_range_means_nothing_to_a_head() {
    let (_upstream, proxy, image) = warm().await;
    let path = crate::proxy::blob_path("library/demo", &image.layer(0).digest);
    for range in ["bytes=0-9", "bytes=0-9,100-109", "bytes=10000-"] {
        proxy
            .head(&path)
            .header("range", range)
            .await
            .is_blob(image.layer(0));
    }
}
