//! Lists of tags and of what is attached to an image.

use crate::proxy::{Proxy, Setup};
use crate::upstream::{Image, OCI_INDEX, Upstream};
use serde_json::json;

async fn tagged() -> (Upstream, Proxy) {
    let upstream = Upstream::start().await;
    for tag in ["a", "b", "c", "d", "e"] {
        upstream.push("library/demo", tag, Image::with_layers(&[tag]));
    }
    let proxy = Proxy::over(&upstream).await;
    (upstream, proxy)
}

#[tokio::test]
async fn tags_are_those_of_the_upstream_page_by_page() {
    let (_upstream, proxy) = tagged().await;
    let all = proxy.get("/v2/library/demo/tags/list").await;
    assert_eq!(
        (all.status, all.header("content-type")),
        (200, Some("application/json")),
        "{all:#?}"
    );
    assert_eq!(
        all.json(),
        json!({"name": "library/demo", "tags": ["a", "b", "c", "d", "e"]})
    );

    let mut path = "/v2/library/demo/tags/list?n=2".to_owned();
    let mut tags = Vec::new();
    loop {
        let page = proxy.get(&path).await;
        tags.extend(page.json()["tags"].as_array().unwrap().clone());
        let Some(link) = page.header("link").map(str::to_owned) else {
            break;
        };
        let target = link
            .strip_prefix('<')
            .and_then(|rest| rest.split_once('>'))
            .unwrap()
            .0
            .to_owned();
        assert!(
            target.starts_with("/v2/library/demo/tags/list?"),
            "a link stays with us: {link}"
        );
        assert!(link.ends_with("rel=\"next\""), "{link}");
        path = target;
    }
    assert_eq!(tags, ["a", "b", "c", "d", "e"]);
}

#[tokio::test]
async fn the_query_of_a_tag_list_reaches_the_upstream() {
    let (upstream, proxy) = tagged().await;
    assert_eq!(
        proxy.get("/v2/library/demo/tags/list?last=c").await.json()["tags"],
        json!(["d", "e"])
    );
    let none = proxy.get("/v2/library/demo/tags/list?n=0").await;
    assert_eq!(
        (none.json()["tags"].clone(), none.header("link")),
        (json!([]), None)
    );
    proxy.get("/v2/library/demo/tags/list?ns=docker.io&n=1").await;
    assert_eq!(
        upstream.requests().last().unwrap().query.as_deref(),
        Some("n=1"),
        "ns stays here"
    );
}

#[tokio::test]
async fn a_link_leads_back_through_the_door_the_client_came_by() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    for tag in ["a", "b", "c", "d", "e"] {
        hub.push("library/demo", tag, Image::with_layers(&[tag]));
        other.push("team/demo", tag, Image::with_layers(&[tag]));
    }
    let proxy = Setup::over(&hub).also("ghcr.io", &other).start().await;
    for first in [
        "/v2/library/demo/tags/list?n=2",
        "/v2/demo/tags/list?n=2",
        "/v2/docker.io/library/demo/tags/list?n=2",
        "/v2/ghcr.io/team/demo/tags/list?n=2",
        "/v2/team/demo/tags/list?n=2&ns=ghcr.io",
        "/v2/team/demo/tags/list?ns=ghcr.io&n=2",
    ] {
        let (pages, links) = pages(&proxy, first).await;
        let tags: Vec<_> = pages
            .iter()
            .flat_map(|page| page["tags"].as_array().unwrap().clone())
            .collect();
        assert_eq!(tags, ["a", "b", "c", "d", "e"], "{first}: {links:?}");
        let path = first.split('?').next().unwrap();
        assert!(
            links.iter().all(|link| link.starts_with(path)),
            "{first}: {links:?}"
        );
    }
}

/// The pages of a list and the links between them.
pub async fn pages(proxy: &Proxy, first: &str) -> (Vec<serde_json::Value>, Vec<String>) {
    let (mut pages, mut links) = (Vec::new(), Vec::new());
    let mut path = first.to_owned();
    loop {
        let page = proxy.get(&path).await;
        assert_eq!(page.status, 200, "{path}: {page:#?}");
        pages.push(page.json());
        let Some(link) = page.header("link") else {
            return (pages, links);
        };
        assert!(pages.len() < 10, "a circle: {links:?}");
        let (target, relation) = link.strip_prefix('<').unwrap().split_once('>').unwrap();
        assert_eq!(relation, "; rel=\"next\"");
        target.clone_into(&mut path);
        links.push(path.clone());
    }
}

#[tokio::test]
async fn referrers_come_page_by_page_through_any_door() {
    let (hub, other) = (Upstream::start().await, Upstream::start().await);
    let image = other.push("team/demo", "latest", Image::with_layers(&["one"]));
    for n in 0..5 {
        let kind = if n == 4 { "text/other" } else { "text/spdx" };
        other.push_untagged(
            "team/demo",
            Image::attached_to(&image, kind, format!("sbom {n}").as_bytes()),
        );
    }
    other.pages_referrers_by(2);
    let proxy = Setup::over(&hub).also("ghcr.io", &other).start().await;
    for (name, query, expected) in [
        ("ghcr.io/team/demo", "", 5),
        ("team/demo", "?ns=ghcr.io", 5),
        ("team/demo", "?ns=ghcr.io&artifactType=text/spdx", 4),
        ("ghcr.io/team/demo", "?artifactType=text/spdx", 4),
    ] {
        let (pages, links) = pages(&proxy, &format!("/v2/{name}/referrers/{}{query}", image.digest)).await;
        let found: usize = pages
            .iter()
            .map(|page| page["manifests"].as_array().unwrap().len())
            .sum();
        assert_eq!(found, expected, "{name}{query}: {links:?}");
    }
}

#[tokio::test]
async fn a_referrers_api_that_is_missing_and_a_repository_that_is_missing_are_told_apart() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let unknown = format!("/v2/library/other/referrers/{}", image.digest);
    assert_eq!(proxy.get(&unknown).await.is_refused(404).code(), "NAME_UNKNOWN");
    upstream.has_no_referrers_api();
    // oras takes NAME_UNKNOWN for an error, and any other 404 for the sign to look for a tag instead.
    let known = format!("/v2/library/demo/referrers/{}", image.digest);
    assert_eq!(proxy.get(&known).await.is_refused(404).code(), "UNSUPPORTED");
}

#[tokio::test]
async fn tags_of_an_unknown_repository_are_404() {
    let (_upstream, proxy) = tagged().await;
    proxy.get("/v2/library/other/tags/list").await.is_refused(404);
}

#[tokio::test]
async fn while_upstream_is_silent_a_list_is_an_old_one_or_an_error_and_never_a_wrong_one() {
    let (upstream, proxy) = tagged().await;
    proxy.get("/v2/library/demo/tags/list").await;
    upstream.refuses();
    let reply = proxy.get("/v2/library/demo/tags/list").await;
    match reply.status {
        200 => {
            let tags = reply.json()["tags"].as_array().unwrap().clone();
            assert!(
                tags.iter().all(|tag| "abcde".contains(tag.as_str().unwrap())),
                "{tags:?}"
            );
        }
        _ => {
            reply.is_unreachable();
        }
    }
}

#[tokio::test]
async fn referrers_are_those_of_the_upstream_filtered_as_asked() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let sbom = upstream.push_untagged("library/demo", Image::attached_to(&image, "text/spdx", b"sbom"));
    upstream.push_untagged(
        "library/demo",
        Image::attached_to(&image, "application/signature", b"signed"),
    );
    let proxy = Proxy::over(&upstream).await;
    let path = format!("/v2/library/demo/referrers/{}", image.digest);

    let all = proxy.get(&path).await;
    assert_eq!(
        (all.status, all.header("content-type")),
        (200, Some(OCI_INDEX)),
        "{all:#?}"
    );
    assert_eq!(all.json()["manifests"].as_array().unwrap().len(), 2);
    let some = proxy.get(&format!("{path}?artifactType=text/spdx")).await;
    assert_eq!(
        some.header("oci-filters-applied"),
        Some("artifactType"),
        "{some:#?}"
    );
    assert_eq!(some.json()["manifests"][0]["digest"], json!(sbom.digest));
    proxy.manifest("library/demo", &sbom.digest).await.is_image(&sbom);
}

#[tokio::test]
async fn an_image_without_referrers_has_an_empty_index() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let reply = proxy
        .get(&format!("/v2/library/demo/referrers/{}", image.digest))
        .await;
    assert_eq!(
        (reply.status, reply.json()["manifests"].clone()),
        (200, json!([])),
        "{reply:#?}"
    );
}

#[tokio::test]
async fn an_upstream_without_the_referrers_api_stays_404_so_that_clients_fall_back() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.has_no_referrers_api();
    let proxy = Proxy::over(&upstream).await;
    proxy
        .get(&format!("/v2/library/demo/referrers/{}", image.digest))
        .await
        .is_refused(404);
}
