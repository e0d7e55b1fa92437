//! Corrupt content: it is not stored, and no client gets a complete wrong object.

use crate::proxy::{Proxy, Setup, files_below};
use crate::registry::{Blob, Image, Upstream};
use std::path::Path;

pub const SIZE: usize = 1024 * 1024;

pub async fn with_a_layer(seed: u64) -> (Upstream, Proxy, Blob) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(seed, SIZE));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_image(&image);
    (upstream, proxy, image.layer(0).clone())
}

pub fn overwrite(path: &Path, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn a_transfer_that_breaks_is_resumed_inside_the_same_reply() {
    for cut in [0, 1, SIZE / 10, SIZE / 2, SIZE - 1] {
        let (upstream, proxy, blob) = with_a_layer(cut as u64).await;
        upstream.truncates_blobs_at(cut, 1);

        proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
        let ranges: Vec<_> = upstream
            .requests()
            .iter()
            .filter_map(|seen| seen.header("range").map(str::to_owned))
            .collect();
        if cut > 0 {
            assert_eq!(ranges, [format!("bytes={cut}-")], "resumed where it broke");
        }
        proxy.until_kept(&blob.digest).await;
    }
}

#[tokio::test]
async fn a_transfer_that_breaks_twice_is_resumed_twice() {
    let (upstream, proxy, blob) = with_a_layer(1).await;
    upstream.truncates_blobs_at(SIZE * 2 / 5, 2);
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
    assert_eq!(upstream.blob_gets(&blob.digest), 3);
}

#[tokio::test]
async fn an_upstream_without_ranges_is_read_again_from_the_start() {
    let (upstream, proxy, blob) = with_a_layer(2).await;
    upstream.ignores_range();
    upstream.truncates_blobs_at(SIZE / 2, 1);
    let reply = proxy.blob("library/demo", &blob.digest).await;
    assert!(!reply.whole || reply.body == blob.bytes);
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
}

#[tokio::test]
async fn repeatedly_interrupted_download_aborts_the_response() {
    let (upstream, proxy, blob) = with_a_layer(3).await;
    upstream.ignores_range();
    upstream.truncates_blob_at(SIZE / 2);

    proxy.blob("library/demo", &blob.digest).visibly_fails().await;
    assert_eq!(proxy.setup().kept_blob(&blob.digest), None);
    upstream.recovers();
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
}

#[tokio::test]
async fn a_clean_end_that_comes_too_early_is_no_end() {
    let (upstream, proxy, blob) = with_a_layer(4).await;
    upstream.ignores_range();
    upstream.ends_blob_early_at(SIZE / 2);

    // The upstream sends no length.
    let ask = proxy.blob("library/demo", &blob.digest).unchecked();
    ask.visibly_fails().await;
    assert_eq!(proxy.setup().kept_blob(&blob.digest), None);
    upstream.recovers();
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
}

#[tokio::test]
async fn wrong_bytes_of_the_right_length_are_cut_before_their_end() {
    let (upstream, proxy, blob) = with_a_layer(5).await;
    upstream.corrupts_blob();

    proxy.blob("library/demo", &blob.digest).visibly_fails().await;
    assert_eq!(proxy.setup().kept_blob(&blob.digest), None);
    upstream.recovers();
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
}

#[tokio::test]
async fn wrong_bytes_of_a_small_blob_are_not_served_either() {
    let upstream = Upstream::start().await;
    let image = upstream.push(
        "library/demo",
        "latest",
        Image::with_layers(&["a layer of a few bytes"]),
    );
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    upstream.corrupts_blob();

    for blob in &image.blobs {
        proxy.blob("library/demo", &blob.digest).visibly_fails().await;
        assert_eq!(proxy.setup().kept_blob(&blob.digest), None);
    }
}

#[tokio::test]
async fn everybody_who_joined_a_wrong_transfer_is_told() {
    let (upstream, proxy, blob) = with_a_layer(6).await;
    upstream.corrupts_blob();
    let gate = upstream.holds_blob(&blob.digest, SIZE / 2);
    let mut streams = Vec::new();
    for _ in 0..8 {
        streams.push(proxy.blob("library/demo", &blob.digest).stream().await);
    }
    gate.release();
    for mut stream in streams {
        let cut = stream.rest().await.expect_err("a whole wrong blob");
        assert!(cut.len() < SIZE);
    }
}

#[tokio::test]
async fn a_part_of_a_wrong_transfer_does_not_reach_its_end_either() {
    let (upstream, proxy, blob) = with_a_layer(7).await;
    upstream.corrupts_blob();
    let tail = format!("bytes={}-", SIZE - 1000);
    let ask = proxy.blob("library/demo", &blob.digest).header("range", &tail);
    ask.visibly_fails().await;
}

#[tokio::test]
async fn a_slow_upstream_is_a_slow_pull_and_no_failure() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(8, 100_000));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    upstream.drips(100_000);
    proxy
        .blob("library/demo", &image.layer(0).digest)
        .await
        .is_blob(image.layer(0));
}

#[tokio::test]
async fn a_kill_in_the_middle_leaves_nothing_half() {
    let (upstream, proxy, blob) = with_a_layer(9).await;
    let gate = upstream.holds_blob(&blob.digest, SIZE / 2);
    let mut stream = proxy.blob("library/demo", &blob.digest).stream().await;
    stream.read(SIZE / 4).await;
    gate.reached().await;

    let proxy = proxy.crash().await;
    assert!(
        stream.rest().await.is_err(),
        "a body that broke is not a whole one"
    );
    upstream.recovers();
    assert_eq!(proxy.setup().kept_blob(&blob.digest), None);
    proxy.blob("library/demo", &blob.digest).await.is_blob(&blob);
}

#[tokio::test]
async fn a_manifest_that_rotted_on_the_disk_is_fetched_again() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    let setup = stopped(proxy).await;
    let hex = image.digest.strip_prefix("sha256:").unwrap();
    let files = files_below(&setup.data().join("manifests"));
    let file = files
        .iter()
        .find(|path| path.file_name().unwrap() == hex)
        .expect("the manifest on the disk");
    overwrite(file, |bytes| bytes[5] ^= 1);

    let proxy = setup.start().await;
    proxy.pull("library/demo", "latest", &image).await;
    assert_eq!(upstream.manifest_gets("library/demo"), 2);
}

pub async fn stopped(mut proxy: Proxy) -> Setup {
    let setup = proxy.setup().clone();
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
    setup
}

/// First truncated, failed or right, and finally right. (`check.rs` fails on a complete wrong body.)
pub async fn heals(proxy: &Proxy, blob: &Blob) {
    let ask = |proxy: &Proxy| proxy.blob("library/demo", &blob.digest);
    proxy
        .until("the blob to be right again", ask, |reply| {
            reply.status == 200 && reply.whole
        })
        .await
        .is_blob(blob);
}

#[tokio::test]
async fn blob_failing_before_first_byte_is_an_error_response() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(9, 1024 * 1024));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    upstream.truncates_blob_at(0);

    let reply = proxy.blob("library/demo", &image.layer(0).digest).await;
    reply.is_refused(502);
    assert!(reply.message().contains("docker.io"), "{}", reply.message());
}
