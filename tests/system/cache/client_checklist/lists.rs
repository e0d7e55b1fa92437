//! Rows about lists: 25 (referrers), 26 (tags).

use crate::cache::tags_and_referrers::pages;
use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, OCI_INDEX, Upstream};
use serde_json::json;

#[tokio::test]
async fn row_25_referrers_are_filtered_paged_and_served_in_outage() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    for n in 0..3 {
        let kind = if n == 0 {
            "application/signature"
        } else {
            "text/spdx"
        };
        let content = format!("attached {n}");
        upstream.push_untagged(
            "library/demo",
            Image::attached_to(&image, kind, content.as_bytes()),
        );
    }
    upstream.pages_referrers_by(2);
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_image(&image);
    let path = format!("/v2/library/demo/referrers/{}", image.digest);
    let filtered = format!("{path}?artifactType=text/spdx");

    // oras probes for the API this way.
    let zero = format!("/v2/library/demo/referrers/sha256:{}", "0".repeat(64));
    let ping = proxy.get(&zero).await;
    assert_eq!(
        (ping.status, ping.header("content-type")),
        (200, Some(OCI_INDEX)),
        "{ping:#?}"
    );
    assert_eq!(ping.json()["manifests"], json!([]));

    let count = |pages: &[serde_json::Value]| -> usize {
        pages
            .iter()
            .map(|page| page["manifests"].as_array().unwrap().len())
            .sum()
    };
    let (all, links) = pages(&proxy, &path).await;
    assert_eq!((count(&all), links.len()), (3, 1));
    let (some, _) = pages(&proxy, &filtered).await;
    assert_eq!(count(&some), 2);
    let reply = proxy.get(&filtered).await;
    assert_eq!(reply.header("oci-filters-applied"), Some("artifactType"));
    let asked = upstream.requests();
    assert_eq!(
        asked.last().unwrap().query.as_deref(),
        Some("artifactType=text/spdx")
    );

    upstream.refuses();
    for path in [&path, &filtered, &zero] {
        let reply = proxy.get(path).await;
        assert_eq!(
            (reply.status, reply.header("content-type")),
            (200, Some(OCI_INDEX)),
            "{reply:#?}"
        );
        reply.is_hit();
    }
    // Its subject is not cached, so it is requested each time.
    proxy.get(&zero).await.is_stale();
    assert_eq!(
        proxy.get(&filtered).await.header("oci-filters-applied"),
        Some("artifactType")
    );
    let (kept, _) = pages(&proxy, &path).await;
    assert_eq!(kept, all, "also the second page, and the link to it");
}

#[tokio::test]
async fn row_25_where_the_upstream_has_no_referrers_404_stays_404() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.has_no_referrers_api();
    let proxy = Proxy::over(&upstream).await;
    for digest in [image.digest.clone(), format!("sha256:{}", "0".repeat(64))] {
        let path = format!("/v2/library/demo/referrers/{digest}");
        let reply = proxy.get(&path).await;
        assert_ne!(
            reply.is_refused(404).code(),
            "NAME_UNKNOWN",
            "oras takes that for an error"
        );
        proxy.head(&path).await.is_refused(404);
    }
}

#[tokio::test]
async fn row_26_tag_list_paging_links_point_to_cache() {
    let upstream = Upstream::start_tls().await;
    for tag in ["a", "b", "c", "d", "e"] {
        upstream.push("library/demo", tag, Image::with_layers(&[tag]));
    }
    let proxy = Setup::over(&upstream).start().await;
    // A client with a grant to read, and not only to list, gets the stored list.
    proxy.manifest("library/demo", "a").await;
    let tags = |query: &str| proxy.get(&format!("/v2/library/demo/tags/list{query}"));
    for (query, expected, link) in [
        ("", json!(["a", "b", "c", "d", "e"]), None),
        (
            "?n=2",
            json!(["a", "b"]),
            Some("</v2/library/demo/tags/list?n=2&last=b>; rel=\"next\""),
        ),
        (
            "?n=2&last=b",
            json!(["c", "d"]),
            Some("</v2/library/demo/tags/list?n=2&last=d>; rel=\"next\""),
        ),
        ("?n=2&last=d", json!(["e"]), None),
        ("?last=c", json!(["d", "e"]), None),
        ("?last=e", json!([]), None),
        ("?n=0", json!([]), None),
    ] {
        let reply = tags(query).await;
        assert_eq!((reply.status, reply.header("link")), (200, link), "{query}");
        assert_eq!(
            reply.json(),
            json!({"name": "library/demo", "tags": expected}),
            "{query}"
        );
    }
    let (all, _) = pages(&proxy, "/v2/library/demo/tags/list?n=1").await;
    assert_eq!(all.len(), 5);
    upstream.refuses();
    let (kept, _) = pages(&proxy, "/v2/library/demo/tags/list?n=1").await;
    assert_eq!(kept, all);
    tags("?n=2").await.is_stale();
    assert_eq!(
        tags("?n=4").await.is_stale().json()["tags"],
        json!(["a", "b", "c", "d"])
    );
    proxy.get("/v2/library/other/tags/list").await.is_unreachable();
}
