//! A 404 for what refers to a manifest is an answer of the registry, and is repeated while it is unavailable.

use super::scripts::{APP, DOCKERD_29, referrers_tag};
use super::{attested, registry};
use crate::proxy::{Ask, Proxy};
use crate::upstream::{Image, Upstream};

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

#[tokio::test]
async fn m01_what_was_never_asked_is_404_where_the_subject_is_cached() {
    let (upstream, image) = registry().await;
    let proxy = Proxy::over(&upstream).await;
    let cached = &image.children[0];
    proxy.manifest(APP, &cached.digest).await.is_image(cached);
    // Slow is no better than dead: the answer comes within the budget.
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
    // Nobody is known here who reads with this credential, and some registries say 404 to such.
    upstream.answers(|seen| seen.authorized() && seen.path.contains("/referrers/"), 404);
    let other = format!("{}?artifactType=text/spdx", referrers_path(subject));
    proxy.get(&other).basic("eve", "e-secret").await;
    upstream.refuses();
    assert_eq!(proxy.get(&referrers_path(subject)).await.body, listed.body);
}
