//! Registries with unusual responses.

use crate::proxy::{Proxy, manifest_path};
use crate::registry::{Image, OCI_MANIFEST, Upstream, noise, sha256};

#[tokio::test]
async fn upstream_without_head_is_revalidated_by_get() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.head_not_allowed();
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    proxy.pull("library/demo", "latest", &image).await.is_hit();
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await.is_hit();
    proxy
        .head(&manifest_path("library/demo", "latest"))
        .await
        .is_image(&image)
        .is_hit();
    assert_eq!((upstream.heads("library/demo"), upstream.all_blob_gets()), (0, 0));
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    proxy.pull("library/demo", "latest", &new).await;
    upstream.refuses();
    proxy.pull("library/demo", "latest", &new).await.is_stale();
}

#[tokio::test]
async fn an_upstream_that_names_no_digest_is_hashed() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.omits_digest();
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    upstream.clear_log();

    proxy.pull("library/demo", "latest", &image).await.is_hit();
    assert_eq!(upstream.all_blob_gets(), 0);
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    upstream.clear_log();
    proxy.manifest("library/demo", "latest").await.is_image(&new);
    assert_eq!(
        upstream.manifest_gets("library/demo"),
        1,
        "the GET that asked has brought it"
    );
}

#[tokio::test]
async fn the_bytes_are_believed_rather_than_the_digest_of_a_head() {
    let upstream = Upstream::start().await;
    let old = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &old).await;
    let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
    upstream.lies_about_digest_in_heads(&sha256(b"something else"));

    proxy.pull("library/demo", "latest", &new).await;
    proxy
        .manifest("library/demo", &sha256(b"something else"))
        .await
        .is_refused(404);
}

#[tokio::test]
async fn manifest_contradicting_digest_header_is_not_cached() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let lie = sha256(b"something else");
    upstream.lies_about_digest(&lie);
    let proxy = Proxy::over(&upstream).await;

    let reply = proxy.manifest("library/demo", "latest").await;
    if reply.status == 200 {
        reply.is_image(&image);
    } else {
        reply.is_refused(502);
    }
    proxy.manifest("library/demo", &lie).await.is_refused(404);
    upstream.recovers();
    proxy.manifest("library/demo", "latest").await.is_image(&image);
}

#[tokio::test]
async fn a_digest_header_that_is_none_is_no_digest() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    for nonsense in ["", "sha256:short", "latest", "md5:0123", "sha256:ZZ"] {
        upstream.lies_about_digest(nonsense);
        proxy.manifest("library/demo", "latest").await.is_image(&image);
    }
}

#[tokio::test]
async fn manifest_digest_mismatch_is_an_upstream_error() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.oversize_manifest(image.manifest.len() + 1);
    let proxy = Proxy::over(&upstream).await;

    proxy
        .manifest("library/demo", &image.digest)
        .await
        .is_refused(502);
    upstream.recovers();
    proxy
        .manifest("library/demo", &image.digest)
        .await
        .is_image(&image);
}

#[tokio::test]
async fn oversized_manifest_is_not_read_into_memory() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "huge", manifest_of(32 * 1024 * 1024));
    let proxy = Proxy::over(&upstream).await;

    let reply = proxy.manifest("library/demo", "huge").await;
    assert_eq!(reply.is_refused(502).status, 502);
    assert!(
        upstream.bytes_sent() < 16 * 1024 * 1024,
        "{} bytes were taken",
        upstream.bytes_sent()
    );
    assert_eq!(proxy.get("/v2/").await.status, 200);
}

#[tokio::test]
async fn captive_portal_page_is_not_stored_as_manifest() {
    let upstream = Upstream::start().await;
    upstream.answers_html();
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_unreachable();
}

#[tokio::test]
async fn an_upstream_that_refuses_heads_of_blobs_is_still_usable() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.refuses_blob_heads();
    let proxy = Proxy::over(&upstream).await;

    let layer = crate::proxy::blob_path("library/demo", &image.layer(0).digest);
    proxy.manifest("library/demo", "latest").await;
    proxy.head(&layer).await.is_blob(image.layer(0));
    proxy.pull("library/demo", "latest", &image).await;
}

#[tokio::test]
async fn unknown_upstream_length_is_known_after_download() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(1, 300_000));
    upstream.omits_length();
    let proxy = Proxy::over(&upstream).await;

    proxy.pull("library/demo", "latest", &image).await;
    proxy
        .head(&crate::proxy::blob_path("library/demo", &image.layer(0).digest))
        .await
        .is_blob(image.layer(0));
}

#[tokio::test]
async fn nothing_of_the_client_but_what_is_needed_goes_upstream() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy
        .manifest("library/demo", "latest")
        .header("cookie", "session=1")
        .header("x-forwarded-for", "10.0.0.1")
        .header("te", "trailers")
        .header("user-agent", "secret-client/1")
        .await;

    for seen in upstream.requests() {
        for name in [
            "cookie",
            "x-forwarded-for",
            "te",
            "connection",
            "proxy-authorization",
        ] {
            assert!(!seen.headers.contains_key(name), "{name}: {seen:?}");
        }
        assert!(
            seen.header("user-agent").unwrap().starts_with("ifnewer/"),
            "{seen:?}"
        );
        assert_eq!(seen.header("host"), Some(upstream.address().to_string().as_str()));
    }
}

/// A well-formed manifest of about this size.
pub fn manifest_of(size: usize) -> Image {
    let empty = format!(
        "{{\"schemaVersion\":2,\"mediaType\":\"{OCI_MANIFEST}\",\"config\":{{\"mediaType\":\"application/vnd.oci.empty.v1+json\",\"digest\":\"{}\",\"size\":2}},\"layers\":[],\"annotations\":{{\"x\":\"\"}}}}",
        sha256(b"{}")
    );
    let filler: String = noise(9, size - empty.len())
        .iter()
        .map(|byte| char::from(b'a' + byte % 26))
        .collect();
    let text = empty.replace("\"x\":\"\"", &format!("\"x\":\"{filler}\""));
    Image {
        blobs: vec![crate::registry::Blob::of(b"{}")],
        ..Image::raw(OCI_MANIFEST, text.as_bytes())
    }
}
