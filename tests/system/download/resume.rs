//! Resumption within a response: an interrupted download continues while retries make progress.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Blob, Image, Upstream};

const SIZE: usize = 1024 * 1024;

async fn with_a_layer(seed: u64) -> (Upstream, Proxy, Blob) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(seed, SIZE));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_image(&image);
    (upstream, proxy, image.layer(0).clone())
}

/// The `Range` of each request for a blob.
fn ranges(upstream: &Upstream) -> Vec<Option<String>> {
    let requests = upstream.requests().into_iter();
    requests
        .filter(|seen| {
            seen.method == "GET" && (seen.path.contains("/blobs/") || seen.path.contains("/storage/"))
        })
        .map(|seen| seen.header("range").map(str::to_owned))
        .collect()
}

fn from(start: usize) -> String {
    format!("bytes={start}-")
}

#[tokio::test]
async fn interrupted_download_resumes_at_next_url() {
    let (one, two) = (Upstream::start().await, Upstream::start().await);
    let image = one.push("library/demo", "latest", Image::of_noise(1, SIZE));
    two.push("library/demo", "latest", image.clone());
    one.truncates_blob_at(SIZE / 2);
    let urls = format!("url = [\"{}\", \"{}\"]", one.url(), two.url());
    let proxy = Setup::empty().upstream("docker.io", &urls).start().await;
    proxy.manifest("library/demo", "latest").await;

    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_blob(image.layer(0));
    assert_eq!(ranges(&one), [None]);
    assert_eq!(ranges(&two), [Some(from(SIZE / 2))]);
}

#[tokio::test]
async fn a_next_url_that_lacks_the_blob_is_not_the_last_word() {
    let (one, two) = (Upstream::start().await, Upstream::start().await);
    let image = one.push("library/demo", "latest", Image::of_noise(2, SIZE));
    one.truncates_blobs_at(SIZE / 2, 1);
    let urls = format!("url = [\"{}\", \"{}\"]", one.url(), two.url());
    let proxy = Setup::empty().upstream("docker.io", &urls).start().await;
    proxy.manifest("library/demo", "latest").await;

    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_blob(image.layer(0));
    assert_eq!(ranges(&two), [Some(from(SIZE / 2))]);
    assert_eq!(ranges(&one), [None, Some(from(SIZE / 2))]);
}

#[tokio::test]
async fn errors_midway_are_waited_out() {
    for status in [500, 503] {
        let (upstream, proxy, blob) = with_a_layer(3).await;
        upstream.truncates_blobs_at(SIZE / 2, 1);
        upstream.fails_ranges(status, 3);
        proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
        proxy.until_kept(&blob.digest).await;
    }
}

#[tokio::test]
async fn a_registry_that_restarts_breaks_no_pull() {
    let (upstream, proxy, blob) = with_a_layer(4).await;
    let gate = upstream.holds_blob(&blob.digest, SIZE / 2);
    let mut pull = proxy.blob("library/demo", &blob.digest).stream().await;
    gate.reached().await;
    upstream.resets();
    upstream.recovers();
    assert!(pull.rest().await.expect("a whole body") == blob.bytes);
}

#[tokio::test]
async fn a_signed_address_that_expired_is_asked_for_anew() {
    let (upstream, proxy, blob) = with_a_layer(5).await;
    let storage = Upstream::start().await;
    upstream.redirects_blobs_to(&storage);
    storage.truncates_blobs_at(SIZE / 2, 1);
    storage.fails_ranges(403, 1);
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
    assert_eq!(
        ranges(&storage),
        [None, Some(from(SIZE / 2)), Some(from(SIZE / 2))]
    );
    assert_eq!(upstream.blob_gets(&blob.digest), 3, "the registry each time");
}

#[tokio::test]
async fn everybody_in_the_transfer_is_carried_over_a_break() {
    let (upstream, proxy, blob) = with_a_layer(6).await;
    upstream.truncates_blobs_at(SIZE / 2, 1);
    let gate = upstream.holds_blob(&blob.digest, SIZE / 4);
    let mut pulls = Vec::new();
    for _ in 0..8 {
        pulls.push(proxy.blob("library/demo", &blob.digest).stream().await);
    }
    let tail = format!("bytes={}-", SIZE - 100);
    let mut part = proxy
        .blob("library/demo", &blob.digest)
        .header("range", &tail)
        .stream()
        .await;
    gate.release();
    for mut pull in pulls {
        assert!(pull.rest().await.expect("a whole body") == blob.bytes);
    }
    assert_eq!(part.rest().await.unwrap(), blob.bytes[SIZE - 100..]);
    assert_eq!(ranges(&upstream), [None, Some(from(SIZE / 2))]);
}

#[tokio::test]
async fn a_clients_token_that_expired_meanwhile_breaks_no_public_pull() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.makes_public("library/demo");
    upstream.lets("alice", "a-secret", "library/demo");
    let image = upstream.push("library/demo", "1", Image::of_noise(7, SIZE));
    let proxy = Proxy::over(&upstream).await;
    let layer = image.layer(0);
    upstream.truncates_blobs_at(SIZE / 2, 1);
    let gate = upstream.holds_blob(&layer.digest, SIZE / 4);
    let pull = proxy.blob("library/demo", &layer.digest);
    let mut pull = pull.bearer(&upstream.token_for("alice")).stream().await;
    gate.reached().await;
    upstream.expires_tokens();
    gate.release();
    assert!(pull.rest().await.expect("a whole body") == layer.bytes);
}
