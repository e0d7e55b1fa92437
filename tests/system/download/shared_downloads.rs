//! Shared downloads: clients with a grant join a running download on any route, clients without one do not.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, Upstream};

const LAYER: usize = 2 * 1024 * 1024;

#[tokio::test]
async fn askers_at_two_upstreams_share_the_bytes_of_one() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let image = hub.push("library/one", "1", Image::of_noise(1, LAYER));
    other.push("org/two", "1", image.clone());
    let proxy = Setup::over(&hub).also("other.example", &other).start().await;
    let layer = image.layer(0);
    for (repository, tag) in [("library/one", "1"), ("other.example/org/two", "1")] {
        assert_eq!(
            proxy.manifest(repository, tag).await.status,
            200,
            "rights come with manifests"
        );
    }
    let gate = hub.holds_blob(&layer.digest, LAYER / 2);
    let mut one = proxy.blob("library/one", &layer.digest).stream().await;
    gate.reached().await;

    let mut two = proxy.blob("other.example/org/two", &layer.digest).stream().await;
    assert_eq!(two.read(LAYER / 4).await, layer.bytes[..LAYER / 4]);
    let stranger = proxy.blob("other.example/org/three", &layer.digest).await;
    assert_eq!(stranger.status, 404, "it is not in there");
    gate.release();
    assert!(one.rest().await.unwrap() == layer.bytes);
    assert!(two.rest().await.unwrap() == layer.bytes[LAYER / 4..]);
    assert_eq!(
        (hub.blob_gets(&layer.digest), other.blob_gets(&layer.digest)),
        (1, 1),
        "the second upstream's no was checked by a GET"
    );
}

#[tokio::test]
async fn a_follower_whose_leader_is_refused_leads_with_its_own_right() {
    let upstream = Upstream::start().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", "acme/app");
    upstream.lets("bob", "b-secret", "bob/own");
    let image = upstream.push("acme/app", "1", Image::of_noise(2, LAYER));
    let proxy = Proxy::over(&upstream).await;
    let layer = image.layer(0);
    let gate = upstream.holds_answers(|seen| seen.method == "GET" && seen.path.contains("/blobs/"));
    let his = proxy.blob("acme/app", &layer.digest).basic("bob", "b-secret");
    let his = tokio::spawn(his.into_reply());
    gate.reached().await;
    let hers = proxy.blob("acme/app", &layer.digest).basic("alice", "a-secret");
    let hers = tokio::spawn(hers.into_reply());
    // She joined, and sends her own authorization request.
    upstream
        .until("her own question", |log| {
            log.iter()
                .any(|seen| seen.method == "HEAD" && seen.path.contains("/blobs/"))
        })
        .await;
    gate.release();
    let his = his.await.unwrap();
    assert!(matches!(his.status, 401 | 403), "{his:#?}");
    hers.await.unwrap().is_blob(layer);
}

#[tokio::test]
async fn a_late_joiner_has_its_first_bytes_from_the_disk() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::of_noise(3, LAYER));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "1").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, LAYER / 2);
    let mut first = proxy.blob("library/demo", &layer.digest).stream().await;
    first.read(LAYER / 2).await;
    gate.reached().await;
    upstream.clear_log();
    // The upstream sends no byte and no request reaches it.
    let mut late = proxy.blob("library/demo", &layer.digest).stream().await;
    assert_eq!(late.read(LAYER / 2).await, layer.bytes[..LAYER / 2]);
    assert_eq!((upstream.bytes_sent(), upstream.all_blob_gets()), (0, 0));
    gate.release();
    assert!(late.rest().await.unwrap() == layer.bytes[LAYER / 2..]);
}
