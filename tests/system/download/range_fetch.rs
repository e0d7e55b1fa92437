//! Ranges of a cold blob at any offset: lazy pulling, and parallel pulls by ranges (rows 12 and 13).

use crate::proxy::{Proxy, blob_path};
use crate::registry::{Blob, Gate, Image, Upstream};

const MIB: usize = 1024 * 1024;
const SIZE: usize = 24 * MIB;

/// A cold layer whose download stalls after 1 MiB.
async fn stalled_download(seed: u64) -> (Upstream, Proxy, Blob, Gate) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(seed, SIZE));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let gate = upstream.holds_blob(&image.layer(0).digest, MIB);
    upstream.clear_log();
    (upstream, proxy, image.layer(0).clone(), gate)
}

fn ranges(upstream: &Upstream) -> Vec<Option<String>> {
    let requests = upstream.requests().into_iter();
    requests
        .filter(|seen| seen.method == "GET" && seen.path.contains("/blobs/"))
        .map(|seen| seen.header("range").map(str::to_owned))
        .collect()
}

#[tokio::test]
async fn a_part_far_ahead_of_the_transfer_comes_at_once() {
    let (upstream, proxy, blob, gate) = stalled_download(1).await;
    let mut whole = proxy.blob("library/demo", &blob.digest).stream().await;
    gate.reached().await;
    let (start, end) = (20 * MIB, 20 * MIB + 100_000);
    let range = format!("bytes={start}-{}", end - 1);
    let part = proxy
        .blob("library/demo", &blob.digest)
        .header("range", &range)
        .await;
    assert_eq!(part.status, 206);
    assert_eq!(
        part.header("content-range"),
        Some(format!("bytes {start}-{}/{SIZE}", end - 1).as_str())
    );
    assert!(part.whole && part.body == blob.bytes[start..end]);
    assert_eq!(ranges(&upstream), [None, Some(range)], "that part and no more");
    gate.release();
    assert!(whole.rest().await.unwrap() == blob.bytes);
    proxy.until_kept(&blob.digest).await;
}

#[tokio::test]
async fn a_lazy_pull_of_a_cold_blob_waits_for_nothing() {
    let (upstream, proxy, blob, gate) = stalled_download(2).await;
    let path = blob_path("library/demo", &blob.digest);
    let part = async |range: &str| proxy.get(&path).header("range", range).await;

    let probe = part("bytes=0-1").await;
    assert_eq!((probe.status, &probe.body[..]), (206, &blob.bytes[..2]));
    proxy.head(&path).await.is_blob(&blob);
    let footer = part("bytes=-51").await;
    assert_eq!((footer.status, &footer.body[..]), (206, &blob.bytes[SIZE - 51..]));
    let table = part(&format!("bytes={}-{}", SIZE - 900_000, SIZE - 52)).await;
    assert!(table.whole && table.body == blob.bytes[SIZE - 900_000..SIZE - 51]);
    let near = part("bytes=100000-299999").await;
    assert_eq!(near.body, blob.bytes[100_000..300_000]);
    let beyond = part(&format!("bytes={SIZE}-")).await;
    assert_eq!(beyond.status, 416);

    gate.release();
    proxy.until_kept(&blob.digest).await;
    let whole = ranges(&upstream).iter().filter(|range| range.is_none()).count();
    assert_eq!(whole, 1, "and the blob was fetched once meanwhile");
    proxy
        .blob("library/demo", &blob.digest)
        .await
        .is_hit()
        .is_blob(&blob);
}

#[tokio::test]
async fn early_closed_open_ranges_share_one_transfer() {
    let (upstream, proxy, blob, gate) = stalled_download(3).await;
    let mut pulls = Vec::new();
    for start in (0..SIZE).step_by(SIZE / 6) {
        let range = format!("bytes={start}-");
        let ask = proxy.blob("library/demo", &blob.digest).header("range", &range);
        pulls.push((start, ask.stream().await));
    }
    gate.release();
    for (start, mut pull) in pulls {
        assert_eq!(pull.status, 206);
        assert_eq!(pull.read(1000).await, blob.bytes[start..start + 1000]);
    }
    proxy.until_kept(&blob.digest).await;
    assert_eq!(ranges(&upstream), [None]);
}

#[tokio::test]
async fn all_clients_of_ranges_may_leave_and_the_blob_is_kept() {
    let (upstream, proxy, blob, gate) = stalled_download(4).await;
    for start in [0, 12 * MIB] {
        let range = format!("bytes={start}-");
        let ask = proxy.blob("library/demo", &blob.digest).header("range", &range);
        drop(ask.stream().await);
    }
    gate.release();
    proxy.until_kept(&blob.digest).await;
    assert_eq!(ranges(&upstream), [None]);
}

#[tokio::test]
async fn where_upstream_knows_no_ranges_a_part_waits_for_the_transfer() {
    let (upstream, proxy, blob, gate) = stalled_download(5).await;
    upstream.ignores_range();
    let mut whole = proxy.blob("library/demo", &blob.digest).stream().await;
    gate.reached().await;
    let mut part = proxy
        .blob("library/demo", &blob.digest)
        .header("range", "bytes=20000000-20000099")
        .stream()
        .await;
    upstream
        .until("the part to be asked for", |log| {
            log.iter().any(|seen| seen.header("range").is_some())
        })
        .await;
    gate.release();
    assert_eq!(part.rest().await.unwrap(), blob.bytes[20_000_000..20_000_100]);
    assert!(whole.rest().await.unwrap() == blob.bytes);
}

#[tokio::test]
async fn a_part_far_ahead_is_asked_for_with_the_askers_own_credential() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("carol", "c-secret", "acme/app");
    let image = upstream.push("acme/app", "1", Image::of_noise(6, SIZE));
    let proxy = Proxy::over(&upstream).await;
    let layer = image.layer(0);
    for (user, password) in [("alice", "a-secret"), ("carol", "c-secret")] {
        let manifest = proxy.manifest("acme/app", "1").basic(user, password).await;
        assert_eq!(manifest.status, 200, "rights come with manifests");
    }
    let gate = upstream.holds_blob(&layer.digest, MIB);
    let hers = proxy.blob("acme/app", &layer.digest).basic("alice", "a-secret");
    let mut hers = hers.stream().await;
    gate.reached().await;
    let far = proxy
        .blob("acme/app", &layer.digest)
        .basic("carol", "c-secret")
        .header("range", "bytes=20000000-20000099");
    assert_eq!(far.await.body, layer.bytes[20_000_000..20_000_100]);
    let log = upstream.requests();
    let credential_of = |ranged: bool| {
        let served = log.iter().rfind(|seen| {
            seen.method == "GET"
                && seen.path.contains("/blobs/")
                && seen.header("range").is_some() == ranged
                && seen.authorized()
        });
        served.unwrap().header("authorization").unwrap().to_owned()
    };
    assert_ne!(credential_of(true), credential_of(false));
    gate.release();
    assert!(hers.rest().await.unwrap() == layer.bytes);
}
