//! Partial downloads: a download interrupted by a stop, crash or outage is resumed, and only the rest is transferred.

use crate::proxy::{Proxy, Setup, files_below};
use crate::registry::{Blob, Gate, Image, Upstream, within};

const MIB: usize = 1024 * 1024;
const SIZE: usize = 4 * MIB;
const HELD_AT: usize = 2 * MIB + MIB / 2;

struct Stage {
    upstream: Upstream,
    proxy: Proxy,
    blob: Blob,
    gate: Gate,
}

/// A pull of which 2.5 of 4 MiB were received and mostly sent to its client.
async fn halfway(seed: u64, tail: &str) -> Stage {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(seed, SIZE));
    let proxy = Setup::over(&upstream).tail(tail).start().await;
    proxy.manifest("library/demo", "latest").await;
    let blob = image.layer(0).clone();
    let gate = upstream.holds_blob(&blob.digest, HELD_AT);
    let mut pull = proxy.blob("library/demo", &blob.digest).stream().await;
    pull.read(HELD_AT - MIB / 8).await;
    until_marked(&proxy, 2 * MIB).await;
    Stage {
        upstream,
        proxy,
        blob,
        gate,
    }
}

/// Waits until the running download has a checkpoint of this size. The client has the bytes slightly earlier.
async fn until_marked(proxy: &Proxy, bytes: usize) {
    let marked = || {
        let files = files_below(&proxy.setup().data().join("ingest"));
        let marks = files.iter().find(|file| file.ends_with("marks"))?;
        let text = std::fs::read_to_string(marks).ok()?;
        let (whole_lines, _) = text.rsplit_once('\n')?;
        whole_lines
            .lines()
            .last()?
            .split(' ')
            .next()?
            .parse::<usize>()
            .ok()
    };
    within("the download to be marked", async {
        while marked().is_none_or(|marked| marked < bytes) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Pulls again: complete and right, with at most the missing bytes from the upstream.
async fn costs_the_rest(upstream: &Upstream, proxy: &Proxy, blob: &Blob) {
    upstream.clear_log();
    proxy.blob("library/demo", &blob.digest).await.is_blob(blob);
    proxy.until_kept(&blob.digest).await;
    assert_eq!(upstream.blob_gets(&blob.digest), 1);
    let sent = upstream.bytes_sent();
    assert!(sent <= (SIZE - 2 * MIB) as u64, "{sent} bytes");
    proxy
        .blob("library/demo", &blob.digest)
        .await
        .is_hit()
        .is_blob(blob);
    // The blob is served once it is renamed into the store, slightly before the folder of its download is deleted.
    let ingest = proxy.setup().data().join("ingest");
    within("the folder of the download to be deleted", async {
        while std::fs::read_dir(&ingest).unwrap().next().is_some() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn after_a_kill_a_download_goes_on_where_it_was() {
    let stage = halfway(1, "").await;
    let proxy = stage.proxy.crash().await;
    stage.upstream.recovers();
    costs_the_rest(&stage.upstream, &proxy, &stage.blob).await;
}

#[tokio::test]
async fn after_two_kills_too() {
    let stage = halfway(2, "").await;
    let proxy = stage.proxy.crash().await;
    stage.gate.release();
    stage.upstream.recovers();
    let gate = stage.upstream.holds_blob(&stage.blob.digest, MIB + MIB / 2);
    let mut pull = proxy.blob("library/demo", &stage.blob.digest).stream().await;
    pull.read(3 * MIB + MIB / 4).await;
    gate.reached().await;
    until_marked(&proxy, 3 * MIB).await;
    let proxy = proxy.crash().await;
    stage.upstream.recovers();
    stage.upstream.clear_log();
    proxy
        .blob("library/demo", &stage.blob.digest)
        .await
        .is_blob(&stage.blob);
    assert!(stage.upstream.bytes_sent() <= MIB as u64);
}

#[tokio::test]
async fn after_a_stop_it_goes_on_too() {
    let mut stage = halfway(3, "[limits]\ndrain = \"100ms\"").await;
    stage.proxy.terminate();
    assert_eq!(stage.proxy.exit().await, Some(0));
    let proxy = stage.proxy.setup().clone().start().await;
    stage.upstream.recovers();
    costs_the_rest(&stage.upstream, &proxy, &stage.blob).await;
}

#[tokio::test]
async fn after_an_outage_it_goes_on_without_a_restart() {
    let stage = halfway(4, "").await;
    let Stage {
        upstream,
        proxy,
        blob,
        ..
    } = &stage;
    let broken = proxy.blob("library/demo", &blob.digest);
    let broken = tokio::spawn(broken.visibly_fails());
    upstream.answers_status(404);
    upstream.resets();
    broken.await.unwrap();
    upstream.recovers();
    costs_the_rest(upstream, proxy, blob).await;
}

#[tokio::test]
async fn what_is_there_comes_before_upstreams_first_byte() {
    let stage = halfway(5, "").await;
    let proxy = stage.proxy.crash().await;
    stage.upstream.recovers();
    let gate = stage.upstream.holds_blob(&stage.blob.digest, 0);
    let mut pull = proxy.blob("library/demo", &stage.blob.digest).stream().await;
    assert_eq!(pull.read(2 * MIB).await, stage.blob.bytes[..2 * MIB]);
    let part = proxy
        .blob("library/demo", &stage.blob.digest)
        .header("range", "bytes=1000000-1000099")
        .await;
    assert_eq!(part.body, stage.blob.bytes[1_000_000..1_000_100]);
    gate.release();
    assert_eq!(pull.rest().await.unwrap(), stage.blob.bytes[2 * MIB..]);
}

#[tokio::test]
async fn what_rotted_meanwhile_reaches_nobody() {
    let stage = halfway(6, "").await;
    let mut proxy = stage.proxy;
    let setup = proxy.setup().clone();
    proxy.terminate();
    proxy.terminate();
    proxy.exit().await;
    let ingest = setup.data().join("ingest");
    let data = files_below(&ingest)
        .into_iter()
        .find(|path| path.ends_with("data"))
        .unwrap();
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[MIB + MIB / 2] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    stage.upstream.recovers();
    let proxy = setup.start().await;
    proxy
        .blob("library/demo", &stage.blob.digest)
        .await
        .is_blob(&stage.blob);
}

#[tokio::test]
async fn partial_download_does_not_bypass_denial() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "bob/own");
    let image = upstream.push("acme/app", "1", Image::of_noise(7, SIZE));
    let proxy = Proxy::over(&upstream).await;
    let alice = |proxy: &Proxy| {
        proxy
            .blob("acme/app", &image.layer(0).digest)
            .basic("alice", "a-secret")
    };
    let gate = upstream.holds_blob(&image.layer(0).digest, HELD_AT);
    let mut pull = alice(&proxy).stream().await;
    pull.read(HELD_AT - MIB / 8).await;
    gate.reached().await;
    let proxy = proxy.crash().await;
    upstream.recovers();

    for ask in [
        proxy
            .blob("acme/app", &image.layer(0).digest)
            .basic("bob", "b-secret"),
        proxy.blob("acme/app", &image.layer(0).digest),
        proxy
            .blob("bob/own", &image.layer(0).digest)
            .basic("bob", "b-secret"),
    ] {
        let reply = ask.header("range", "bytes=0-99").await;
        assert!(matches!(reply.status, 401 | 403 | 404), "{reply:#?}");
        assert!(
            !reply
                .body
                .windows(8)
                .any(|bytes| bytes == &image.layer(0).bytes[..8])
        );
    }
    upstream.clear_log();
    alice(&proxy).await.is_blob(image.layer(0));
    assert!(upstream.bytes_sent() < (SIZE - 2 * MIB + 10_000) as u64);
}
