//! A 404 for referrers is a cacheable response, repeated while the registry is unavailable.

use super::scripts::{APP, DOCKERD_29, KUBELET, OF_ONE_PLATFORM, PODMAN, every, referrers_tag};
use super::{attested, registry};
use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Image, Upstream};
use serde_json::json;

fn referrers_path(subject: &Image) -> String {
    format!("/v2/{APP}/referrers/{}", subject.digest)
}

#[tokio::test]
async fn m01_a_404_for_referrers_outlives_outage_and_restart() {
    let (upstream, image) = registry().await;
    let proxy = Proxy::over(&upstream).await;
    DOCKERD_29.pulls(&proxy, "1", &image).await;
    upstream.refuses();
    let subject = &image.children[2];
    let proxy = proxy.restart().await;
    for path in [
        referrers_path(subject),
        format!("/v2/{APP}/manifests/{}", referrers_tag(subject)),
    ] {
        proxy.get(&path).await.is_refused(404);
        proxy.head(&path).await.is_refused(404);
    }
    let filtered = format!("{}?artifactType=text/spdx", referrers_path(subject));
    assert_eq!(proxy.get(&filtered).await.is_refused(404).code(), "UNSUPPORTED");
}

/// Until the cache has requested the referrers of this attestation by itself.
async fn until_referrers_requested(upstream: &Upstream, attestation: &Image) {
    let tag = referrers_tag(attestation);
    upstream
        .until("the referrers of the attestation to be requested", |seen| {
            seen.iter().any(|seen| seen.path.ends_with(&tag))
        })
        .await;
}

#[tokio::test]
async fn m01_what_an_older_client_warmed_is_enough_for_dockerd() {
    let (upstream, image) = registry().await;
    let proxy = Setup::over(&upstream).prefetching().start().await;
    PODMAN.pulls(&proxy, "1", &image).await;
    until_referrers_requested(&upstream, &image.children[2]).await;
    for script in OF_ONE_PLATFORM {
        upstream.refuses();
        script.pulls(&proxy, "1", &image).await;
    }
    let arm64 = &image.children[3].digest;
    assert!(upstream.requests().iter().all(|seen| !seen.path.ends_with(arm64)));
}

#[tokio::test]
async fn m01_a_pull_ahead_brings_the_attestation_and_its_signature() {
    let upstream = Upstream::start().await;
    let image = upstream.push(APP, "1", attested("1"));
    let attestation = &image.children[2];
    let signature = Image::attached_to(attestation, "application/signature", b"signed");
    let signature = upstream.push_untagged(APP, signature);
    let proxy = Proxy::over(&upstream).await;
    pulls_ahead(&proxy, &["linux/amd64"]).await;
    upstream.refuses();
    for script in OF_ONE_PLATFORM {
        script.pulls(&proxy, "1", &image).await;
    }
    let listed = proxy.get(&referrers_path(attestation)).await;
    assert_eq!(listed.json()["manifests"][0]["digest"], signature.digest);
    proxy.pull(APP, &signature.digest, &signature).await;
    proxy.pull(APP, &attestation.digest, attestation).await;
}

#[tokio::test]
async fn m01_all_platforms_pulled_ahead_are_enough_for_every_client() {
    let (upstream, image) = registry().await;
    let proxy = Proxy::over(&upstream).await;
    pulls_ahead(&proxy, &["all"]).await;
    upstream.refuses();
    for script in every() {
        script.pulls(&proxy, "1", &image).await;
    }
}

#[tokio::test]
async fn m01_every_client_lives_on_what_it_warmed_itself() {
    for script in every() {
        let (upstream, image) = registry().await;
        let proxy = Setup::over(&upstream).prefetching().start().await;
        script.pulls(&proxy, "1", &image).await;
        let Some(layer) = script.wants_layers().then(|| image.children[0].layer(1)) else {
            continue;
        };
        proxy.until_kept(&layer.digest).await;
        until_referrers_requested(&upstream, &image.children[2]).await;
        let moved = upstream.moves(APP, "1", attested("2"));
        script.pulls(&proxy, "1", &moved).await;
        until_referrers_requested(&upstream, &moved.children[2]).await;
        upstream.refuses();
        let proxy = proxy.restart().await;
        script.pulls(&proxy, "1", &moved).await;
    }
}

#[tokio::test]
async fn m01_an_image_whose_attestation_is_lost_is_whole() {
    let (upstream, image) = registry().await;
    upstream.deletes_manifest(APP, &image.children[2].digest);
    let proxy = Setup::over(&upstream).prefetching().start().await;
    pulls_ahead(&proxy, &["linux/amd64"]).await;
    upstream.refuses();
    KUBELET.pulls(&proxy, "1", &image).await;
}

/// `ifnewer pull`.
async fn pulls_ahead(proxy: &Proxy, platforms: &[&str]) {
    let asked = json!({ "image": format!("{APP}:1"), "platforms": platforms });
    let begun = Ask::new(proxy.admin_address(), "POST", "/api/v1/pulls")
        .header("content-type", "application/json")
        .body(asked.to_string().as_bytes())
        .unchecked()
        .await;
    let path = format!("/api/v1/pulls/{}", begun.json()["id"]);
    let ended = proxy
        .until(
            "the pull to end",
            |proxy| proxy.admin(&path),
            |reply| matches!(reply.json()["state"].as_str(), Some("done" | "failed")),
        )
        .await;
    assert_eq!(ended.json()["state"], "done", "{ended:#?}");
}

#[tokio::test]
async fn m01_what_was_never_asked_is_404_where_the_subject_is_cached() {
    let (upstream, image) = registry().await;
    let proxy = Proxy::over(&upstream).await;
    let cached = &image.children[0];
    proxy.manifest(APP, &cached.digest).await.is_image(cached);
    // A slow upstream is treated like an unavailable one: the response comes within the revalidation timeout.
    for make_unavailable in [Upstream::hangs, Upstream::refuses] {
        make_unavailable(&upstream);
        proxy.get(&referrers_path(cached)).await.is_refused(404);
        proxy.manifest(APP, &referrers_tag(cached)).await.is_refused(404);
    }
    let unknown = attested("other");
    proxy.get(&referrers_path(&unknown)).await.is_unreachable();
    proxy
        .manifest(APP, &referrers_tag(&unknown))
        .await
        .is_unreachable();
}

#[tokio::test]
async fn m01_a_stranger_learns_nothing_of_a_private_subject() {
    let (upstream, image) = registry().await;
    upstream.requires_token();
    upstream.lets("alice", "a-secret", APP);
    let alice = |ask: Ask| ask.basic("alice", "a-secret");
    let proxy = Proxy::over(&upstream).await;
    DOCKERD_29.pulls_as(&proxy, "1", &image, alice).await;
    upstream.refuses();
    let (subject, unknown) = (&image.children[2], &attested("other").children[2]);
    for (held, absent) in [
        (referrers_path(subject), referrers_path(unknown)),
        (
            format!("/v2/{APP}/manifests/{}", referrers_tag(subject)),
            format!("/v2/{APP}/manifests/{}", referrers_tag(unknown)),
        ),
    ] {
        alice(proxy.get(&held)).await.is_refused(404);
        for dress in [|ask: Ask| ask.basic("eve", "e-secret"), |ask: Ask| ask] {
            let (held, absent) = (dress(proxy.get(&held)).await, dress(proxy.get(&absent)).await);
            assert_ne!(held.status, 404, "{held:#?}");
            assert_eq!(held.status, absent.status);
        }
    }
}

#[tokio::test]
async fn m01_a_404_to_a_stranger_is_not_the_registrys_word() {
    let upstream = Upstream::start().await;
    let image = upstream.push(APP, "1", attested("1"));
    let subject = &image.children[2];
    upstream.push_untagged(APP, Image::attached_to(subject, "text/spdx", b"sbom"));
    let proxy = Proxy::over(&upstream).await;
    DOCKERD_29.pulls(&proxy, "1", &image).await;
    let listed = proxy.get(&referrers_path(subject)).await;
    // No grant exists for this credential, and some registries send 404 without access.
    upstream.answers(|seen| seen.authorized() && seen.path.contains("/referrers/"), 404);
    let other = format!("{}?artifactType=text/spdx", referrers_path(subject));
    proxy.get(&other).basic("eve", "e-secret").await;
    upstream.refuses();
    assert_eq!(proxy.get(&referrers_path(subject)).await.body, listed.body);
}
