//! Large blobs over several upstream connections.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Blob, Image, Upstream};

const MIB: usize = 1024 * 1024;
const SIZE: usize = 28 * MIB;

/// Rate of each connection: what storage services grant, and slow enough that further connections are worth it.
const BYTES_PER_SECOND: u64 = 10_000_000;

/// A cold layer of an upstream that limits each connection, and a proxy that fetches it over several.
async fn limited(seed: u64) -> (Upstream, Proxy, Blob) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(seed, SIZE));
    let proxy = Setup::over(&upstream)
        .tail("[limits]\nparallel_min = \"16 MiB\"")
        .start()
        .await;
    proxy.manifest("library/demo", "latest").await;
    upstream.drips(BYTES_PER_SECOND);
    upstream.clear_log();
    (upstream, proxy, image.layer(0).clone())
}

/// The first and last byte of each requested segment.
fn segments(upstream: &Upstream, blob: &Blob) -> Vec<(usize, usize)> {
    let requests = upstream.requests().into_iter();
    requests
        .filter(|seen| seen.path.ends_with(&blob.digest))
        .filter_map(|seen| {
            let (start, end) = seen.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
            Some((start.parse().unwrap(), end.parse().ok()?))
        })
        .collect()
}

#[tokio::test]
async fn large_blob_is_fetched_by_ranges_and_stored_once() {
    let (upstream, proxy, blob) = limited(41).await;
    let response = proxy.blob("library/demo", &blob.digest).await;
    assert!(response.whole && response.body == blob.bytes);
    proxy.until_kept(&blob.digest).await;
    let mut fetched = segments(&upstream, &blob);
    // How many connections are worth it depends on the machine.
    assert!(!fetched.is_empty());
    fetched.sort_unstable();
    assert!(
        fetched.is_sorted_by(|one, next| one.1 < next.0),
        "no byte twice: {fetched:?}"
    );
    upstream.clear_log();
    let again = proxy.blob("library/demo", &blob.digest).await;
    assert!(again.whole && again.body == blob.bytes);
    assert!(upstream.requests().is_empty());
}

#[tokio::test]
async fn rejected_range_costs_one_request() {
    for status in [429, 416, 403] {
        let (upstream, proxy, blob) = limited(u64::from(status)).await;
        upstream.fails_ranges(status, usize::MAX);
        let response = proxy.blob("library/demo", &blob.digest).await;
        assert!(response.whole && response.body == blob.bytes, "{status}");
        proxy.until_kept(&blob.digest).await;
        assert_eq!(segments(&upstream, &blob).len(), 1, "{status}");
    }
}

#[tokio::test]
async fn upstream_that_ignores_ranges_is_read_once() {
    let (upstream, proxy, blob) = limited(43).await;
    upstream.ignores_range();
    let response = proxy.blob("library/demo", &blob.digest).await;
    assert!(response.whole && response.body == blob.bytes);
    proxy.until_kept(&blob.digest).await;
    assert_eq!(segments(&upstream, &blob).len(), 1);
}
