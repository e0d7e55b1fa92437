//! Download queue: requests beyond the limit are served in turn, and those without a waiting client are dropped.

use crate::proxy::{Proxy, Setup, blob_path, manifest_path};
use crate::registry::{Image, Upstream, noise};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const DEMO: &str = "library/demo";
const MIB: usize = 1024 * 1024;

/// Limits of requests and downloads per upstream.
fn few(upstream: &Upstream, places: usize) -> Setup {
    let limits = format!("[limits]\ndownloads_per_upstream_max = {places}\n");
    Setup::over(upstream).tail(&limits)
}

/// The downloads in the API, queued and running.
async fn transfers(proxy: &Proxy, queued: bool) -> usize {
    let listed = proxy.admin("/api/v1/transfers").await.json();
    let listed = listed["transfers"].as_array().cloned().unwrap_or_default();
    listed.iter().filter(|one| one["queued"] == queued).count()
}

pub async fn until_queued(proxy: &Proxy, count: usize) {
    while transfers(proxy, true).await != count {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn t02_forty_cold_layers_of_one_upstream_all_arrive() {
    let upstream = Upstream::start().await;
    let layers: Vec<String> = (0..40).map(|number| format!("layer {number}")).collect();
    let image = upstream.push(DEMO, "latest", Image::with_layers(&layers));
    let proxy = few(&upstream, 8)
        .upstream_keys("docker.io", "first_byte_timeout = \"300ms\"")
        .start()
        .await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    let gate = upstream.holds_bodies(|seen| seen.path.contains("/blobs/"));
    let mut clients = JoinSet::new();
    for number in 0..40 {
        let layer = image.layer(number).clone();
        let asked = proxy.blob(DEMO, &layer.digest);
        clients.spawn(async move { asked.await.is_blob(&layer).status });
    }
    gate.reached_by(7).await;
    until_queued(&proxy, 33).await;
    // A hanging one exceeds the header timeout, and started after them.
    let slow = upstream.holds_answers(|seen| seen.path.ends_with("/manifests/none"));
    proxy.manifest(DEMO, "none").await.is_refused(504);
    slow.release();
    gate.release();
    assert!(clients.join_all().await.iter().all(|status| *status == 200));
}

/// The connection may be idle for longer than the idle timeout.
#[tokio::test]
async fn t02_head_goes_out_while_the_download_is_queued() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one", "two", "three"]));
    let limits = "[limits]\ndownloads_per_upstream_max = 1\nidle_timeout = \"1s\"\nwrite_timeout = \"1s\"\n";
    let proxy = Setup::over(&upstream).tail(limits).start().await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    let gate = upstream.holds_bodies(|seen| seen.path.contains("/blobs/"));
    let first = tokio::spawn(proxy.blob(DEMO, &image.layer(0).digest).into_reply());
    gate.reached().await;
    let mut second = proxy.blob(DEMO, &image.layer(1).digest).stream().await;
    let mut third = proxy.blob(DEMO, &image.layer(2).digest).stream().await;
    assert_eq!(
        transfers(&proxy, true).await,
        2,
        "both heads came without an answer"
    );
    assert_eq!(upstream.blob_gets(&image.layer(1).digest), 0);
    gate.release();
    assert_eq!(second.rest().await.expect("a whole body"), image.layer(1).bytes);
    assert_eq!(third.rest().await.expect("a whole body"), image.layer(2).bytes);
    first.await.unwrap().is_blob(image.layer(0));
}

#[tokio::test]
async fn t12_small_blob_is_not_behind_large_ones() {
    let upstream = Upstream::start().await;
    let large: Vec<_> = (0..8).map(|seed| noise(seed, 2 * MIB)).collect();
    let large = upstream.push(DEMO, "large", Image::with_layers(&large));
    let small = upstream.push("library/small", "latest", Image::with_layers(&["small"]));
    let proxy = few(&upstream, 4).start().await;
    proxy.manifest(DEMO, "large").await.is_image(&large);
    proxy.manifest("library/small", "latest").await.is_image(&small);
    let mut gates = Vec::new();
    let mut clients = JoinSet::new();
    for number in 0..8 {
        gates.push(upstream.holds_blob(&large.layer(number).digest, MIB));
        clients.spawn(proxy.blob(DEMO, &large.layer(number).digest).into_reply());
    }
    until_queued(&proxy, 5).await;
    proxy
        .blob("library/small", &small.layer(0).digest)
        .await
        .is_blob(small.layer(0));
    for gate in &gates {
        gate.release();
    }
    for reply in clients.join_all().await {
        assert_eq!(reply.status, 200);
    }
}

#[tokio::test]
async fn t12_slow_upstream_leaves_places_to_others() {
    let (slow, other) = (Upstream::start().await, Upstream::start().await);
    let layers: Vec<String> = (0..8).map(|number| format!("layer {number}")).collect();
    let held = slow.push(DEMO, "latest", Image::with_layers(&layers));
    let image = other.push("org/app", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Setup::over(&slow)
        .also("ghcr.io", &other)
        .tail("[limits]\ndownloads_max = 6\n")
        .start()
        .await;
    proxy.manifest(DEMO, "latest").await.is_image(&held);
    let gate = slow.holds_bodies(|seen| seen.path.contains("/blobs/"));
    let mut clients = JoinSet::new();
    for number in 0..8 {
        clients.spawn(proxy.blob(DEMO, &held.layer(number).digest).into_reply());
    }
    gate.reached_by(5).await;
    until_queued(&proxy, 3).await;
    proxy.pull("ghcr.io/org/app", "latest", &image).await;
    gate.release();
    clients.join_all().await;
}

#[tokio::test]
async fn t08_client_that_leaves_the_queue_costs_no_request() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one", "two", "three"]));
    let proxy = few(&upstream, 1).start().await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    let gate = upstream.holds_bodies(|seen| seen.path.contains("/blobs/"));
    let first = tokio::spawn(proxy.blob(DEMO, &image.layer(0).digest).into_reply());
    gate.reached().await;
    let leaving = tokio::spawn(proxy.blob(DEMO, &image.layer(1).digest).into_reply());
    until_queued(&proxy, 1).await;
    leaving.abort();
    until_queued(&proxy, 0).await;
    gate.release();
    first.await.unwrap().is_blob(image.layer(0));
    proxy
        .blob(DEMO, &image.layer(2).digest)
        .await
        .is_blob(image.layer(2));
    assert_eq!(upstream.blob_gets(&image.layer(1).digest), 0);
}

#[tokio::test]
async fn t08_small_range_that_left_does_not_fetch_the_whole() {
    const LAYER: usize = 16 * MIB;
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::of_noise(1, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, MIB);
    let part = proxy.blob(DEMO, &layer.digest).header("range", "bytes=0-0").await;
    assert_eq!((part.status, part.body.len()), (206, 1));
    gate.release();
    while transfers(&proxy, false).await > 0 {
        tokio::task::yield_now().await;
    }
    assert!(upstream.bytes_sent() < LAYER as u64);
    assert!(proxy.setup().kept_blob(&layer.digest).is_none());
}

#[tokio::test]
async fn t09_made_up_digests_do_not_hold_up_cached_tags() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one"]));
    let proxy = few(&upstream, 4).start().await;
    proxy.pull(DEMO, "latest", &image).await;
    let gate = upstream.holds_answers(|seen| seen.path.contains("/manifests/sha256:"));
    let mut clients = JoinSet::new();
    for number in 0..20 {
        let made_up = format!("sha256:{number:064x}");
        clients.spawn(proxy.get(&manifest_path(DEMO, &made_up)).into_reply());
    }
    gate.reached_by(3).await;
    proxy
        .manifest(DEMO, "latest")
        .await
        .is_image(&image)
        .is_not_stale();
    assert_eq!(gate.arrived(), 3, "one place of four is kept");
    gate.release();
    for reply in clients.join_all().await {
        reply.is_refused(404);
    }
}

#[tokio::test]
async fn t13_prefetch_of_a_slow_upstream_does_not_stop_that_of_others() {
    let (slow, other) = (Upstream::start().await, Upstream::start().await);
    let image = other.push("org/app", "latest", Image::with_layers(&["one", "two"]));
    let mut held = Vec::new();
    for number in 0..4 {
        let layers: Vec<String> = (0..5).map(|layer| format!("{number} {layer}")).collect();
        held.push(slow.push(
            &format!("library/{number}"),
            "latest",
            Image::with_layers(&layers),
        ));
    }
    let proxy = Setup::over(&slow)
        .also("ghcr.io", &other)
        .prefetching()
        .start()
        .await;
    for (number, image) in held.iter().enumerate() {
        let repository = format!("library/{number}");
        proxy.manifest(&repository, "latest").await.is_image(image);
        proxy.until_kept(&image.config().digest).await;
    }
    let firsts: Vec<String> = held
        .iter()
        .enumerate()
        .map(|(number, image)| blob_path(&format!("library/{number}"), &image.layer(0).digest))
        .collect();
    let gate = slow.holds_bodies(move |seen| {
        seen.path.contains("/blobs/") && !firsts.iter().any(|first| seen.path.ends_with(first))
    });
    for (number, image) in held.iter().enumerate() {
        let repository = format!("library/{number}");
        let layer = image.layer(0);
        proxy.blob(&repository, &layer.digest).await.is_blob(layer);
    }
    gate.reached_by(6).await;
    proxy.manifest("ghcr.io/org/app", "latest").await.is_image(&image);
    let layer = image.layer(0);
    proxy.blob("ghcr.io/org/app", &layer.digest).await.is_blob(layer);
    proxy.until_kept(&image.layer(1).digest).await;
    gate.release();
}

/// A later failure of the download cannot reach a client that has its response head.
#[tokio::test]
async fn t08_blob_without_room_arrives_after_its_early_head() {
    let upstream = Upstream::start().await;
    let layers = [b"one".to_vec(), noise(1, 3 * MIB)];
    let image = upstream.push(DEMO, "latest", Image::with_layers(&layers));
    let limits = "[limits]\ndownloads_per_upstream_max = 1\n[store]\nsize = \"2 MiB\"\nfree = \"0 B\"\n";
    let proxy = Setup::over(&upstream).tail(limits).start().await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    let gate = upstream.holds_bodies(|seen| seen.path.contains("/blobs/"));
    let first = tokio::spawn(proxy.blob(DEMO, &image.layer(0).digest).into_reply());
    gate.reached().await;
    let mut second = proxy.blob(DEMO, &image.layer(1).digest).stream().await;
    assert_eq!(
        transfers(&proxy, true).await,
        1,
        "the head came without an answer"
    );
    gate.release();
    assert_eq!(second.rest().await.expect("a whole body"), image.layer(1).bytes);
    first.await.unwrap().is_blob(image.layer(0));
}

#[tokio::test]
async fn t08_http_1_0_client_gets_no_head_without_a_length() {
    let upstream = Upstream::start().await;
    let image = upstream.push(DEMO, "latest", Image::with_layers(&["one", "two", "three"]));
    let proxy = few(&upstream, 1).start().await;
    proxy.manifest(DEMO, "latest").await.is_image(&image);
    let gate = upstream.holds_bodies(|seen| seen.path.contains("/blobs/"));
    let first = tokio::spawn(proxy.blob(DEMO, &image.layer(0).digest).into_reply());
    gate.reached().await;
    let mut old = TcpStream::connect(proxy.registry_address()).await.unwrap();
    let path = blob_path(DEMO, &image.layer(1).digest);
    let head = format!(
        "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n",
        proxy.registry_address()
    );
    old.write_all(head.as_bytes()).await.unwrap();
    until_queued(&proxy, 1).await;
    // It requests later, and has its response head already.
    let mut newer = proxy.blob(DEMO, &image.layer(2).digest).stream().await;
    assert!(old.try_read(&mut [0]).is_err(), "nothing has come");
    gate.release();
    let mut reply = String::new();
    old.read_to_string(&mut reply).await.unwrap();
    assert!(
        reply.to_lowercase().contains("content-length: 3\r\n") && reply.ends_with("\r\n\r\ntwo"),
        "{reply}"
    );
    assert_eq!(newer.rest().await.expect("a whole body"), image.layer(2).bytes);
    first.await.unwrap().is_blob(image.layer(0));
}
