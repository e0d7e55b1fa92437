//! Rows about manifests: 1, 2, 7, 8, 11, 24, 33, 35.

use crate::cache::registry_quirks::manifest_of;
use crate::proxy::{Proxy, Session, Setup, manifest_path};
use crate::registry::{
    DOCKER_LIST, DOCKER_MANIFEST, Image, OCI_INDEX, OCI_MANIFEST, Upstream, sha256, sha512,
};

#[tokio::test]
async fn row_01_manifest_is_byte_exact_and_wrong_one_is_rejected() {
    let upstream = Upstream::start().await;
    let child = Image::with_layers(&["one"]);
    // Formatted unlike any library: spaces, order, escapes, a final newline.
    let text = format!(
        "{{ \n\t\"manifests\" : [{{\"size\":{}, \"digest\":\"{}\",\"mediaType\":\"{OCI_MANIFEST}\"}}],\r\n\"annotations\":{{\"\\u0061\":\"\\/\"}},\"mediaType\":\"{OCI_INDEX}\",\"schemaVersion\":2}}\n\n",
        child.manifest.len(),
        child.digest
    );
    let index = Image {
        children: vec![child.clone()],
        ..Image::raw(OCI_INDEX, text.as_bytes())
    };
    upstream.push("library/demo", "latest", index.clone());
    // The digest of one manifest, the bytes of another.
    let lie = Image {
        digest: sha256(b"another manifest"),
        ..Image::with_layers(&["wrong"])
    };
    upstream.push_untagged("library/demo", lie.clone());
    let proxy = Proxy::over(&upstream).await;

    for _ in 0..2 {
        proxy.manifest("library/demo", "latest").await.is_image(&index);
        proxy
            .manifest("library/demo", &index.digest)
            .await
            .is_image(&index);
        proxy
            .manifest("library/demo", &child.digest)
            .await
            .is_image(&child);
        proxy.manifest("library/demo", &lie.digest).await.is_refused(502);
    }
    proxy.pull("library/demo", &child.digest, &child).await;
    let proxy = proxy.restart().await;
    upstream.refuses();
    proxy
        .manifest("library/demo", "latest")
        .await
        .is_image(&index)
        .is_stale();
    proxy
        .manifest("library/demo", &index.digest)
        .await
        .is_image(&index);
    proxy.manifest("library/demo", &lie.digest).await.is_unreachable();
}

#[tokio::test]
async fn row_02_the_media_type_has_no_parameters_and_is_never_a_guess() {
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    for sent in [
        format!("{docker}; charset=utf-8"),
        format!("{docker};charset=UTF-8;x=y"),
        String::new(),
        "application/json".to_owned(),
        "text/plain; charset=utf-8".to_owned(),
    ] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "latest", Image::docker_with_layers(&["one"]));
        upstream.types_manifests(&sent);
        let proxy = Proxy::over(&upstream).await;
        // `is_image` compares the whole text of the header.
        proxy.manifest("library/demo", "latest").await.is_image(&image);
        proxy
            .manifest("library/demo", &image.digest)
            .await
            .is_image(&image);
        proxy.pull("library/demo", "latest", &image).await;
        upstream.refuses();
        let proxy = proxy.restart().await;
        proxy
            .manifest("library/demo", "latest")
            .await
            .is_image(&image)
            .is_stale();
    }
}

#[tokio::test]
async fn row_08_manifest_head_is_complete_and_keeps_connection() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let other = upstream.push("library/demo", "other", Image::with_layers(&["two"]));
    let proxy = Proxy::over(&upstream).await;
    let mut session = Session::open(proxy.registry_address()).await;
    for _ in 0..2 {
        for (reference, image) in [
            ("latest", &image),
            (image.digest.as_str(), &image),
            ("other", &other),
            (other.digest.as_str(), &other),
        ] {
            let path = manifest_path("library/demo", reference);
            session.ask("HEAD", &path).await.is_image(image);
        }
        let path = manifest_path("library/demo", "latest");
        session.ask("GET", &path).await.is_image(&image);
        session.ask("HEAD", &path).await.is_image(&image);
    }
    assert_eq!(upstream.manifest_gets("library/demo"), 1, "no HEAD became a GET");
}

#[tokio::test]
async fn row_24_manifest_by_sha512_is_verified_by_sha512() {
    let upstream = Upstream::start().await;
    let image = Image::with_layers(&["one"]);
    let by_512 = Image {
        digest: sha512(&image.manifest),
        ..image.clone()
    };
    upstream.push_untagged("library/demo", by_512.clone());
    upstream.push("library/demo", "latest", image.clone());
    upstream.push("library/demo", "by-512", by_512.clone());
    let wrong = Image {
        digest: sha512(b"something else"),
        ..image.clone()
    };
    upstream.push_untagged("library/demo", wrong.clone());
    let proxy = Proxy::over(&upstream).await;
    for _ in 0..2 {
        for method in ["HEAD", "GET"] {
            let path = manifest_path("library/demo", &by_512.digest);
            proxy.ask(method, &path).await.is_image(&by_512);
            proxy
                .ask(method, &manifest_path("library/demo", "by-512"))
                .await
                .is_image(&by_512);
            proxy
                .ask(method, &manifest_path("library/demo", "latest"))
                .await
                .is_image(&image);
        }
        proxy
            .manifest("library/demo", &wrong.digest)
            .await
            .is_refused(502);
    }
    proxy.pull("library/demo", "latest", &image).await;
    upstream.refuses();
    let proxy = proxy.restart().await;
    proxy
        .manifest("library/demo", &by_512.digest)
        .await
        .is_image(&by_512);
    proxy
        .manifest("library/demo", &image.digest)
        .await
        .is_image(&image);
}

#[tokio::test]
async fn row_24_a_tag_cut_from_a_sha512_is_a_tag() {
    let upstream = Upstream::start().await;
    let tag = sha512(b"subject").replace(':', "-")[.."sha512-".len() + 64].to_owned();
    let image = upstream.push("library/demo", &tag, Image::with_layers(&["signature"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", &tag, &image).await;
    proxy.pull("library/demo", &tag, &image).await.is_unchanged();
}

#[tokio::test]
async fn row_33_signature_tag_changes_are_seen_at_once() {
    let upstream = Upstream::start().await;
    let signed = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let base = signed.digest.replace(':', "-");
    for kind in ["sig", "att", "sbom"] {
        let tag = format!("{base}.{kind}");
        for method in ["HEAD", "GET", "GET"] {
            proxy
                .ask(method, &manifest_path("library/demo", &tag))
                .await
                .is_refused(404);
        }
        let first = upstream.push("library/demo", &tag, Image::with_layers(&[kind, "first"]));
        proxy.manifest("library/demo", &tag).await.is_image(&first);
        let second = upstream.moves("library/demo", &tag, Image::with_layers(&[kind, "second"]));
        proxy.manifest("library/demo", &tag).await.is_image(&second);
        upstream.deletes_tag("library/demo", &tag);
        proxy.manifest("library/demo", &tag).await.is_refused(404);
    }
}

#[tokio::test]
async fn row_33_a_layer_that_appears_is_seen_at_once() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let absent = crate::registry::Blob::of(b"not yet");
    proxy.blob("library/demo", &absent.digest).await.is_refused(404);
    upstream.push_blob("library/demo", b"not yet");
    proxy.blob("library/demo", &absent.digest).await.is_blob(&absent);
}

#[tokio::test]
async fn row_11_what_is_malformed_is_400_or_404_and_never_500() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream).start().await;
    for path in [
        "/v2/library/demo/manifests/sha256:totallywrong",
        "/v2/library/demo/manifests/sha512:0123",
        "/v2/library/demo/blobs/sha256:totallywrong",
        "/v2/library/demo/referrers/sha256:totallywrong",
        "/v2/library/demo/manifests/.dot",
    ] {
        for method in ["GET", "HEAD"] {
            let reply = proxy.ask(method, path).unchecked().await;
            assert!(matches!(reply.status, 400 | 404), "{method} {path}: {reply:#?}");
        }
    }
    assert_eq!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn row_07_accept_order_is_ignored_and_all_lines_forwarded() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let accept = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];
    proxy
        .manifest("library/demo", "latest")
        .accept(&accept)
        .await
        .is_fetched();
    assert_eq!(upstream.requests()[0].accept(), accept, "every line is passed on");
    upstream.clear_log();

    let line = format!("{DOCKER_MANIFEST}, {DOCKER_LIST},{OCI_MANIFEST} ,{OCI_INDEX}");
    proxy
        .manifest("library/demo", "latest")
        .accept(&[&line])
        .await
        .is_image(&image)
        .is_unchanged();
    assert_eq!(upstream.manifest_gets("library/demo"), 0);
}

#[tokio::test]
async fn row_11_missing_content_is_404_with_spec_code() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let unknown = sha256(b"unknown");

    assert_eq!(
        proxy
            .manifest("library/demo", "no-such-tag")
            .await
            .is_refused(404)
            .code(),
        "MANIFEST_UNKNOWN"
    );
    assert_eq!(
        proxy
            .manifest("library/demo", &unknown)
            .await
            .is_refused(404)
            .code(),
        "MANIFEST_UNKNOWN"
    );
    assert_eq!(
        proxy.blob("library/demo", &unknown).await.is_refused(404).code(),
        "BLOB_UNKNOWN"
    );
    proxy
        .manifest("library/no-such-repository", "latest")
        .await
        .is_refused(404);
}

#[tokio::test]
async fn row_02_an_odd_media_type_is_kept_to_the_letter() {
    let upstream = Upstream::start().await;
    let text = r#"{"schemaVersion":2,"mediaType":"application/vnd.example.thing+json","a":1}"#;
    let odd = Image::raw("application/vnd.example.thing+json", text.as_bytes());
    let odd = upstream.push("library/demo", "odd", odd);
    let proxy = Proxy::over(&upstream).await;
    for _ in 0..2 {
        proxy.manifest("library/demo", "odd").await.is_image(&odd);
    }
    let proxy = proxy.restart().await;
    proxy.manifest("library/demo", "odd").await.is_image(&odd);
}

#[tokio::test]
async fn row_35_a_manifest_of_four_mebibytes_is_held() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "large", manifest_of(4 * 1024 * 1024));
    let proxy = Proxy::over(&upstream).await;

    proxy.pull("library/demo", "large", &image).await;
    upstream.refuses();
    proxy.pull("library/demo", "large", &image).await.is_stale();
}

#[tokio::test]
async fn row_35_a_larger_manifest_passes_through_and_is_not_kept() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "larger", manifest_of(5 * 1024 * 1024));
    let proxy = Proxy::over(&upstream).await;

    for reference in ["larger", image.digest.as_str()] {
        for _ in 0..2 {
            let reply = proxy.manifest("library/demo", reference).await;
            assert_eq!((reply.status, reply.whole), (200, true), "{reference}");
            assert!(reply.body == image.manifest, "{reference}: other bytes");
            assert_eq!(reply.header("content-type"), Some(image.media_type.as_str()));
            assert_eq!(reply.header("docker-content-digest"), Some(image.digest.as_str()));
            assert!(
                reply.cache_status().contains("passthrough"),
                "{}",
                reply.cache_status()
            );
        }
    }
    upstream.refuses();
    proxy.manifest("library/demo", "larger").await.is_unreachable();
}
