//! Tag lists and referrers lists.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, OCI_INDEX, Upstream};
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
async fn pagination_link_keeps_the_route_of_the_client() {
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
async fn missing_referrers_api_differs_from_missing_repository() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let unknown = format!("/v2/library/other/referrers/{}", image.digest);
    assert_eq!(proxy.get(&unknown).await.is_refused(404).code(), "NAME_UNKNOWN");
    upstream.has_no_referrers_api();
    // oras treats NAME_UNKNOWN as an error, and any other 404 as the sign to use the referrers tag.
    let known = format!("/v2/library/demo/referrers/{}", image.digest);
    assert_eq!(proxy.get(&known).await.is_refused(404).code(), "UNSUPPORTED");
}

#[tokio::test]
async fn tags_of_an_unknown_repository_are_404() {
    let (_upstream, proxy) = tagged().await;
    proxy.get("/v2/library/other/tags/list").await.is_refused(404);
}

#[tokio::test]
async fn list_in_outage_is_stale_or_an_error() {
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
async fn missing_referrers_api_stays_404_for_client_fallback() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.has_no_referrers_api();
    let proxy = Proxy::over(&upstream).await;
    proxy
        .get(&format!("/v2/library/demo/referrers/{}", image.digest))
        .await
        .is_refused(404);
}

/// Tags for a list of this size, in the order of registries.
fn many_tags(upstream: &Upstream, count: usize) -> Vec<String> {
    let tags: Vec<String> = (0..count)
        .map(|n| format!("{n:08}-{}", "x".repeat(100)))
        .collect();
    upstream.push_tags("library/demo", &tags, &Image::with_layers(&["one"]));
    tags
}

fn tags_of(reply: &crate::proxy::Reply) -> Vec<String> {
    assert_eq!(reply.status, 200, "{}", reply.status);
    let list = reply.json();
    let tags = list["tags"].as_array().unwrap().iter();
    tags.map(|tag| tag.as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn r09_a_tag_list_of_any_size_passes_and_a_long_one_is_kept() {
    let list = "/v2/library/demo/tags/list";
    // Lists of 1.1 and 5.6 MB are stored for an outage, one of 12 MB is not.
    for (count, kept) in [(10_000, true), (50_000, true), (110_000, false)] {
        let upstream = Upstream::start().await;
        let tags = many_tags(&upstream, count);
        let proxy = Proxy::over(&upstream).await;
        // A pull shows that the repository is public, so the list is served in an outage.
        proxy.manifest("library/demo", &tags[0]).await;
        let first = proxy.get(list).await;
        assert_eq!(tags_of(&first), tags, "{count}");
        assert_eq!(first.header("content-type"), Some("application/json"));
        let head = proxy.head(list).await;
        assert_eq!(
            head.header("content-length"),
            Some(first.body.len().to_string().as_str())
        );
        if !kept {
            upstream.refuses();
            proxy.get(list).await.is_unreachable();
            continue;
        }
        upstream.refuses();
        // It is stored in the background.
        let stale = proxy
            .until(
                "the list to be kept",
                |proxy| proxy.get(list),
                |reply| reply.status == 200,
            )
            .await;
        assert_eq!(tags_of(&stale), tags, "{count}");
        assert!(stale.cache_status().contains("stale"), "{}", stale.cache_status());
        // After a restart it is served too, and paged.
        let proxy = proxy.restart().await;
        let page = proxy.get(&format!("{list}?n=3&last={}", tags[1])).await;
        assert_eq!(tags_of(&page), tags[2..5]);
    }
}

#[tokio::test]
async fn r09_a_long_page_of_something_in_front_is_no_list() {
    let upstream = Upstream::start().await;
    many_tags(&upstream, 10);
    let page = format!("<html>{}</html>", "<p>please log in</p>".repeat(50_000));
    let response = crate::registry::Scripted::new(200, &page);
    upstream.answers_next(usize::MAX, |seen| seen.path.ends_with("/tags/list"), response);
    let proxy = Proxy::over(&upstream).await;
    proxy.get("/v2/library/demo/tags/list").await.is_unreachable();
}

#[tokio::test]
async fn r10_n_is_passed_on_as_asked() {
    let upstream = Upstream::start().await;
    let tags = many_tags(&upstream, 3_500);
    let proxy = Proxy::over(&upstream).await;
    for (n, query) in [
        ("10000", "n=10000"),
        ("1001", "n=1001"),
        ("18446744073709551616", "n=18446744073709551616"),
    ] {
        let reply = proxy.get(&format!("/v2/library/demo/tags/list?n={n}")).await;
        let expected = n.parse().unwrap_or(usize::MAX).min(tags.len());
        assert_eq!(tags_of(&reply).len(), expected, "n={n}");
        assert_eq!(reply.header("link").is_some(), expected < tags.len(), "n={n}");
        let asked = upstream.requests().pop().unwrap().query;
        assert_eq!(asked.as_deref(), Some(query));
    }
    for wrong in ["n=-1", "n=ten", "n=1.5"] {
        let reply = proxy.get(&format!("/v2/library/demo/tags/list?{wrong}")).await;
        reply.is_refused(400);
    }
}

#[tokio::test]
async fn r10_in_an_outage_pages_are_cut_from_the_kept_list() {
    let (upstream, proxy) = tagged().await;
    proxy.manifest("library/demo", "a").await;
    let all = tags_of(&proxy.get("/v2/library/demo/tags/list").await);
    upstream.refuses();
    for n in [1, 2, 3, 5, 9999] {
        let (pages, _) = pages(&proxy, &format!("/v2/library/demo/tags/list?n={n}")).await;
        let tags: Vec<_> = pages
            .iter()
            .flat_map(|page| page["tags"].as_array().unwrap().clone())
            .collect();
        assert_eq!(tags, all, "n={n}");
        assert_eq!(pages.len(), all.len().div_ceil(n), "n={n}");
    }
    for (query, tags) in [
        ("last=c", &["d", "e"][..]),
        ("last=cc", &["d", "e"]),
        ("last=%C3%BC%26%2F", &[]),
        ("n=99999999999999999999999&last=d", &["e"]),
        ("n=0", &[]),
    ] {
        let reply = proxy.get(&format!("/v2/library/demo/tags/list?{query}")).await;
        assert_eq!(tags_of(&reply), tags, "{query}");
        assert!(reply.cache_status().contains("stale"), "{query}: {reply:#?}");
    }
}
