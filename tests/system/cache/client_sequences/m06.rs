//! Referrers responses act as a grant: until it expires, no upstream request is made.

use super::scripts::{APP, DOCKERD_29, every, referrers_tag};
use super::{attested, registry};
use crate::proxy::{Proxy, Setup, manifest_path};
use crate::registry::{Image, Upstream};
use serde_json::json;

fn requests(upstream: &Upstream) -> Vec<String> {
    let line = |seen: crate::registry::Seen| format!("{} {}", seen.method, seen.path);
    upstream.requests().into_iter().map(line).collect()
}

#[tokio::test]
async fn m06_unchanged_every_client_costs_one_head() {
    for script in every() {
        let (upstream, image) = registry().await;
        let proxy = Proxy::over(&upstream).await;
        script.pulls(&proxy, "1", &image).await;
        super::fills(&proxy, &image).await;
        upstream.clear_log();
        script.pulls(&proxy, "1", &image).await;
        let asked = requests(&upstream);
        let is_tag = |line: &String| *line == format!("HEAD {}", manifest_path(APP, "1"));
        // Renovate asks for the tag by HEAD and by GET.
        let of_tag = script
            .steps
            .iter()
            .filter(|step| step.1 == super::scripts::What::Tag);
        assert!(
            asked.iter().all(is_tag) && asked.len() == of_tag.count(),
            "{}: {asked:#?}",
            script.name
        );
    }
}

#[tokio::test]
async fn m06_listed_referrers_are_as_good_as_a_404() {
    let upstream = Upstream::start().await;
    let image = upstream.push(APP, "1", attested("1"));
    let signature = upstream.push_untagged(
        APP,
        Image::attached_to(&image.children[2], "application/signature", b"signed"),
    );
    let proxy = Proxy::over(&upstream).await;
    DOCKERD_29.pulls(&proxy, "1", &image).await;
    super::fills(&proxy, &image).await;
    upstream.clear_log();
    DOCKERD_29.pulls(&proxy, "1", &image).await;
    assert_eq!(requests(&upstream), [format!("HEAD {}", manifest_path(APP, "1"))]);
    let path = format!("/v2/{APP}/referrers/{}", image.children[2].digest);
    let filtered = format!("{path}?artifactType=text/spdx");
    assert_eq!(proxy.get(&filtered).await.json()["manifests"], json!([]));
    // An unfiltered list serves a filtered request, because the client filters too.
    upstream.refuses();
    for path in [path.clone(), format!("{path}?artifactType=application/signature")] {
        let listed = proxy.get(&path).await;
        assert_eq!(listed.json()["manifests"][0]["digest"], signature.digest);
        assert_eq!(listed.header("oci-filters-applied"), None);
    }
}

#[tokio::test]
async fn m06_after_its_grant_a_404_costs_a_head_and_no_get() {
    let (upstream, image) = registry().await;
    let proxy = Setup::over(&upstream)
        .default_keys("grant_ttl = \"0s\"")
        .start()
        .await;
    DOCKERD_29.pulls(&proxy, "1", &image).await;
    let tag = referrers_tag(&image.children[2]);
    // The first 404 to a HEAD is verified by a GET, because some registries send it for existing content.
    proxy.manifest(APP, &tag).await.is_refused(404);
    upstream.clear_log();
    proxy.manifest(APP, &tag).await.is_refused(404);
    assert_eq!(
        requests(&upstream),
        [format!("HEAD {}", manifest_path(APP, &tag))]
    );
    let signature = upstream.push(APP, &tag, Image::index(&[]));
    proxy.manifest(APP, &tag).await.is_image(&signature);
}

#[tokio::test]
async fn m06_a_push_through_here_ends_what_was_known_of_referrers() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let image = other.push(APP, "1", Image::with_layers(&["one"]));
    let proxy = Setup::over(&hub).also("ghcr.io", &other).start().await;
    proxy.manifest("ghcr.io/library/app", "1").await.is_image(&image);
    let put = |path: String, manifest: &Image| {
        let ask = proxy.ask("PUT", &path).tls(&proxy.ca_pem(), &["http/1.1"]);
        let ask = ask.server_name("ghcr.io").unchecked();
        ask.header("content-type", &manifest.media_type)
            .body(&manifest.manifest)
    };
    let referrers = format!("/v2/ghcr.io/{APP}/referrers/{}", image.digest);
    let tag = referrers_tag(&image);
    let fallback = manifest_path(&format!("ghcr.io/{APP}"), &tag);
    assert_eq!(proxy.get(&referrers).await.json()["manifests"], json!([]));
    proxy.get(&fallback).await.is_refused(404);

    let signature = Image::attached_to(&image, "application/signature", b"signed");
    for blob in &signature.blobs {
        other.push_blob(APP, &blob.bytes);
    }
    let pushed = put(manifest_path(APP, &signature.digest), &signature).await;
    assert_eq!(pushed.status, 201, "{pushed:#?}");
    let listed = proxy.get(&referrers).await;
    assert_eq!(listed.json()["manifests"][0]["digest"], signature.digest);
    let list = Image::index(std::slice::from_ref(&signature));
    let pushed = put(manifest_path(APP, &tag), &list).await;
    assert_eq!(pushed.status, 201, "{pushed:#?}");
    proxy.get(&fallback).await.is_image(&list);
}
