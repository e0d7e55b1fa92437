//! Mislabelled content: right bytes with a wrong size, digest header or type. The digest decides.

use crate::proxy::{Proxy, Setup, blob_path, files_below, manifest_path};
use crate::registry::{Image, OCI_INDEX, OCI_MANIFEST, Scripted, Seen, Upstream, noise, sha256, sha512};
use serde_json::{Value, json};

const SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";

/// More than any disk has.
const HUGE: u64 = 1 << 60;

/// The same image, with `size` as the size of its config and layers.
fn stating(size: u64, image: &Image) -> Image {
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["config"]["size"] = json!(size);
    for layer in manifest["layers"].as_array_mut().unwrap() {
        layer["size"] = json!(size);
    }
    Image {
        blobs: image.blobs.clone(),
        ..Image::raw(OCI_MANIFEST, manifest.to_string().as_bytes())
    }
}

/// An index with `size` as the size of this image.
fn index_stating(size: u64, image: &Image) -> Image {
    let mut index: Value =
        serde_json::from_slice(&Image::index(std::slice::from_ref(image)).manifest).unwrap();
    index["manifests"][0]["size"] = json!(size);
    Image {
        children: vec![image.clone()],
        ..Image::raw(OCI_INDEX, index.to_string().as_bytes())
    }
}

type Fault = fn(&Upstream);

const LENGTHS: [(&str, Fault); 3] = [
    ("with lengths", |_| {}),
    ("chunked", Upstream::omits_length),
    ("chunked, no ranges", |upstream| {
        upstream.omits_length();
        upstream.ignores_range();
    }),
];

#[tokio::test]
async fn k7_a_stated_size_that_is_wrong_spoils_no_pull() {
    for (lengths, inject) in LENGTHS {
        for stated in [0, 1, 299_999, 300_001, HUGE] {
            let upstream = Upstream::start().await;
            let image = stating(stated, &Image::of_noise(stated, 300_000));
            let index = upstream.push("library/demo", "latest", index_stating(stated, &image));
            inject(&upstream);
            let setup = Setup::over(&upstream).tail("[store]\nsize = \"64 MiB\"");
            let proxy = setup.start().await;
            proxy.manifest("library/demo", "latest").await.is_image(&index);
            let child = proxy.manifest("library/demo", &image.digest).await;
            child.is_image(&image);
            for blob in &image.blobs {
                let (case, path) = (
                    format!("{lengths}, {stated}"),
                    blob_path("library/demo", &blob.digest),
                );
                let head = proxy.head(&path).unchecked().await;
                let length = blob.bytes.len().to_string();
                let said = head.header("content-length");
                assert_eq!(head.status, 200, "{case}: {head:#?}");
                assert!(said.is_none_or(|said| said == length), "{case}: {head:#?}");
                proxy.get(&path).await.is_blob(blob);
                // Within the quota for any stated size.
                proxy.until_kept(&blob.digest).await;
                proxy.head(&path).await.is_blob(blob).is_hit();
                let part = proxy.get(&path).header("range", "bytes=5-14").await;
                assert_eq!((part.status, &part.body[..]), (206, &blob.bytes[5..15]), "{case}");
            }
        }
    }
}

#[tokio::test]
async fn k7_a_stated_size_is_not_promised_while_a_blob_arrives() {
    let upstream = Upstream::start().await;
    let image = stating(HUGE, &Image::of_noise(1, 1_000_000));
    upstream.push("library/demo", "latest", image.clone());
    upstream.omits_length();
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_image(&image);
    let blob = image.layer(0);
    let gate = upstream.holds_blob(&blob.digest, 500_000);
    let mut pull = proxy.blob("library/demo", &blob.digest).stream().await;
    assert_eq!(pull.read(100_000).await, blob.bytes[..100_000]);
    gate.release();
    assert_eq!(pull.rest().await.unwrap(), blob.bytes[100_000..]);
    proxy.until_kept(&blob.digest).await;
}

#[tokio::test]
async fn k7_an_early_end_is_not_believed_where_more_is_stated() {
    for stated in [300_000, 300_001, HUGE] {
        let upstream = Upstream::start().await;
        let image = stating(stated, &Image::of_noise(2, 300_000));
        upstream.push("library/demo", "latest", image.clone());
        let proxy = Proxy::over(&upstream).await;
        proxy.manifest("library/demo", "latest").await.is_image(&image);
        upstream.ends_blob_early_at(100_000);
        let blob = image.layer(0);
        let reply = proxy.blob("library/demo", &blob.digest).unchecked().await;
        assert_eq!((reply.status, reply.whole), (200, true), "{stated}");
        assert!(reply.body == blob.bytes, "{stated}: {} bytes", reply.body.len());
    }
}

#[tokio::test]
async fn k7_prefetch_is_not_misled_by_a_stated_size() {
    for (_, inject) in LENGTHS {
        for stated in [0, HUGE] {
            let upstream = Upstream::start().await;
            let image = stating(
                stated,
                &Image::with_layers(&[noise(3, 200_000), noise(4, 100_000)]),
            );
            upstream.push("library/demo", "latest", image.clone());
            inject(&upstream);
            let proxy = Setup::over(&upstream).prefetching().start().await;
            proxy.manifest("library/demo", "latest").await.is_image(&image);
            proxy
                .blob("library/demo", &image.layer(0).digest)
                .await
                .is_blob(image.layer(0));
            for blob in &image.blobs {
                proxy.until_kept(&blob.digest).await;
            }
            upstream.refuses();
            proxy.pull("library/demo", "latest", &image).await.is_stale();
        }
    }
}

#[tokio::test]
async fn k7_a_wrong_digest_header_of_a_get_is_checked_by_head() {
    let lies = [sha256(b"a lie"), sha512(b"a lie"), "sha256:short".to_owned()];
    for lie in lies {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
        upstream.lies_about_digest_in_gets(&lie);
        let proxy = Proxy::over(&upstream).await;
        // By digest first, by tag first, and moved.
        let by_digest = proxy.manifest("library/demo", &image.digest).await;
        by_digest.is_image(&image);
        proxy.manifest("library/demo", "latest").await.is_image(&image);
        let new = upstream.moves("library/demo", "latest", Image::with_layers(&["two"]));
        proxy.pull("library/demo", "latest", &new).await;
        let other = upstream.push("library/demo", "cold", Image::with_layers(&["three"]));
        proxy.pull("library/demo", "cold", &other).await;
        upstream.refuses();
        for (tag, image) in [("latest", &new), ("cold", &other)] {
            proxy.pull("library/demo", tag, image).await.is_stale();
        }
    }
}

#[tokio::test]
async fn k7_a_digest_header_that_no_head_confirms_is_believed() {
    let upstream = Upstream::start().await;
    upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    upstream.lies_about_digest(&sha256(b"a lie"));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_refused(502);
    assert!(files_below(&proxy.setup().data().join("manifests")).is_empty());
}

#[tokio::test]
async fn k7_by_digest_the_shape_decides_where_no_type_is_stated() {
    let image = Image::with_layers(&["one"]);
    let index = Image::index(std::slice::from_ref(&image));
    for (image, kind, other) in [
        (&image, OCI_MANIFEST, OCI_INDEX),
        (&index, OCI_INDEX, OCI_MANIFEST),
    ] {
        let mut untyped: Value = serde_json::from_slice(&image.manifest).unwrap();
        untyped.as_object_mut().unwrap().remove("mediaType");
        let untyped = Image::raw(kind, untyped.to_string().as_bytes());
        for sent in ["", "application/json", "text/plain", "text/html", other] {
            for untagged in [image, &untyped] {
                let upstream = Upstream::start().await;
                upstream.push_untagged("library/demo", untagged.clone());
                upstream.types_manifests(sent);
                let proxy = Proxy::over(&upstream).await;
                let path = manifest_path("library/demo", &untagged.digest);
                for _ in 0..2 {
                    proxy.get(&path).await.is_image(untagged);
                    proxy.head(&path).await.is_image(untagged);
                }
            }
        }
    }
}

#[tokio::test]
async fn k7_labels_of_a_blob_do_not_count() {
    let blob = noise(5, 100_000);
    for header in [
        sha512(&blob),
        sha512(b"a lie"),
        sha256(b"a lie"),
        "nonsense".to_owned(),
    ] {
        for (_, inject) in LENGTHS {
            let upstream = Upstream::start().await;
            let image = upstream.push(
                "library/demo",
                "latest",
                Image::with_layers(std::slice::from_ref(&blob)),
            );
            let proxy = Proxy::over(&upstream).await;
            proxy.manifest("library/demo", "latest").await.is_image(&image);
            inject(&upstream);
            upstream.lies_about_digest(&header);
            upstream.types_blobs("text/html");
            let layer = image.layer(0);
            proxy.blob("library/demo", &layer.digest).await.is_blob(layer);
            proxy.until_kept(&layer.digest).await;
            proxy
                .head(&blob_path("library/demo", &layer.digest))
                .await
                .is_blob(layer)
                .is_hit();
        }
    }
}

fn is_list(seen: &Seen) -> bool {
    seen.path.ends_with("/tags/list") || seen.path.contains("/referrers/")
}

#[tokio::test]
async fn k7_json_that_is_no_list_of_tags_is_no_list() {
    let long = json!({"errors": [{"code": "UNKNOWN", "message": "x".repeat(600_000)}]}).to_string();
    for body in [
        r#"{"errors":[{"code":"UNAUTHORIZED","message":"log in"}]}"#,
        r#"{"errors":[{"code":"UNKNOWN"}],"name":"library/demo","tags":[]}"#,
        "{}",
        "[]",
        "null",
        r#""tags""#,
        r#"{"name":"library/demo"}"#,
        r#"{"name":"library/demo","tags":"a"}"#,
        r#"{"name":"library/demo","tags":{"a":1}}"#,
        r#"{"name":"library/demo","tags":[1]}"#,
        r#"{"manifests":[]}"#,
        &long,
    ] {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "a", Image::with_layers(&["one"]));
        let proxy = Proxy::over(&upstream).await;
        // Has a grant here.
        proxy.manifest("library/demo", "a").await.is_image(&image);
        let ask = || proxy.get("/v2/library/demo/tags/list");
        upstream.answers_next(1, is_list, Scripted::new(200, body));
        ask().await.is_unreachable();
        let list = ask().await;
        assert_eq!(list.json()["tags"], json!(["a"]), "{body}");
        upstream.answers_next(1, is_list, Scripted::new(200, body));
        let kept = ask().await;
        assert_eq!(kept.json()["tags"], json!(["a"]), "{body}");
        kept.is_stale();
    }
}

#[tokio::test]
async fn k7_tags_that_are_null_are_an_empty_list() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let body = r#"{"name":"library/demo","tags":null,"child":[],"manifest":{}}"#;
    upstream.answers_next(1, is_list, Scripted::new(200, body));
    let list = proxy.get("/v2/library/demo/tags/list").await;
    assert_eq!((list.status, list.json()["tags"].clone()), (200, Value::Null));
}

#[tokio::test]
async fn k7_json_that_is_no_list_of_referrers_is_no_list() {
    for body in [
        r#"{"errors":[{"code":"UNAUTHORIZED","message":"log in"}]}"#,
        r#"{"errors":[{"code":"UNKNOWN"}],"manifests":[]}"#,
        "{}",
        "[]",
        r#"{"schemaVersion":2}"#,
        r#"{"manifests":{}}"#,
        r#"{"manifests":[1]}"#,
        r#"{"manifests":[{}]}"#,
        r#"{"name":"library/demo","tags":[]}"#,
    ] {
        let upstream = Upstream::start().await;
        let subject = upstream.push("library/demo", "a", Image::with_layers(&["one"]));
        let signature = Image::attached_to(&subject, "application/vnd.example.signature", b"s");
        upstream.push_untagged("library/demo", signature.clone());
        let other = upstream.push("library/demo", "b", Image::with_layers(&["two"]));
        let proxy = Proxy::over(&upstream).await;
        // Has a grant here, and the subject is not cached: each request goes upstream.
        proxy.manifest("library/demo", "b").await.is_image(&other);
        let path = format!("/v2/library/demo/referrers/{}", subject.digest);
        upstream.answers_next(1, is_list, Scripted::new(200, body));
        proxy.get(&path).await.is_unreachable();
        let list = proxy.get(&path).await;
        assert_eq!(
            list.json()["manifests"][0]["digest"],
            json!(signature.digest),
            "{body}"
        );
        upstream.answers_next(1, is_list, Scripted::new(200, body));
        let kept = proxy.get(&path).await;
        assert_eq!(
            kept.json()["manifests"][0]["digest"],
            json!(signature.digest),
            "{body}"
        );
        kept.is_stale();
    }
}

/// Its digest is that of its payload, as for schema 1.
fn signed() -> Image {
    let layer = sha256(b"a layer");
    let payload = json!({"schemaVersion": 1, "name": "library/demo", "tag": "old",
        "fsLayers": [{"blobSum": layer}], "history": [{"v1Compatibility": "{}"}]});
    let mut manifest = payload.clone();
    manifest["signatures"] = json!([{"header": {"alg": "ES256"}, "signature": "c2ln", "protected": "e30"}]);
    Image {
        digest: sha256(payload.to_string().as_bytes()),
        ..Image::raw(SIGNED, manifest.to_string().as_bytes())
    }
}

#[tokio::test]
async fn k7_signed_schema_1_is_passed_on_and_never_cached() {
    let quirks: [(&str, &str, Fault); 5] = [
        ("as it is", SIGNED, |_| {}),
        ("no HEAD", SIGNED, Upstream::head_not_allowed),
        ("no lengths", SIGNED, Upstream::omits_length),
        ("typed as JSON", "application/json", |_| {}),
        (
            "typed as unsigned",
            "application/vnd.docker.distribution.manifest.v1+json",
            |_| {},
        ),
    ];
    for (quirk, kind, inject) in quirks {
        let upstream = Upstream::start().await;
        let image = upstream.push("library/demo", "old", signed());
        upstream.types_manifests(kind);
        inject(&upstream);
        let proxy = Proxy::over(&upstream).await;
        for reference in ["old", &image.digest, "old"] {
            let path = manifest_path("library/demo", reference);
            let reply = proxy.get(&path).unchecked().await;
            assert_eq!(
                (reply.status, &reply.body),
                (200, &image.manifest),
                "{quirk} {reference}"
            );
            assert_eq!(reply.header("content-type"), Some(kind), "{quirk} {reference}");
            let digest = reply.header("docker-content-digest");
            assert_eq!(digest, Some(image.digest.as_str()), "{quirk} {reference}");
            let head = proxy.head(&path).unchecked().await;
            let digest = head.header("docker-content-digest");
            assert_eq!(
                (head.status, digest),
                (200, Some(image.digest.as_str())),
                "{quirk} {reference}"
            );
        }
        assert!(
            files_below(&proxy.setup().data().join("manifests")).is_empty(),
            "{quirk}"
        );
        assert!(
            files_below(&proxy.setup().data().join("refs")).is_empty(),
            "{quirk}"
        );
        upstream.refuses();
        for reference in ["old", &image.digest] {
            proxy.manifest("library/demo", reference).await.is_unreachable();
        }
    }
}

#[tokio::test]
async fn k7_a_tag_that_moves_to_signed_schema_1_is_passed_on() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "old", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "old", &image).await;
    let new = upstream.moves("library/demo", "old", signed());
    let path = manifest_path("library/demo", "old");
    let reply = proxy.get(&path).unchecked().await;
    assert_eq!((reply.status, &reply.body), (200, &new.manifest), "{reply:#?}");
    upstream.moves("library/demo", "old", image.clone());
    proxy.pull("library/demo", "old", &image).await.is_hit();
}

#[tokio::test]
async fn k7_schema_1_in_name_alone_opens_nothing() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    upstream.types_manifests(SIGNED);
    let proxy = Proxy::over(&upstream).await;
    // Its own media type differs, and by digest its bytes are right.
    for reference in ["1", &image.digest] {
        proxy.manifest("library/demo", reference).await.is_image(&image);
    }
}
