#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::Algorithm;
use super::*;

fn digest(content: &str) -> Digest {
    Digest::of(Algorithm::Sha256, content.as_bytes())
}

fn descriptor(content: &str) -> Value {
    json!({ "mediaType": "application/octet-stream", "digest": digest(content).to_string(), "size": content.len() })
}

fn read(value: &Value) -> Result<Manifest, ManifestError> {
    Manifest::read(value.to_string().as_bytes())
}

fn roles(manifest: &Manifest) -> Vec<(DescriptorKind, AnyDigest)> {
    manifest
        .descriptors
        .iter()
        .map(|child| (child.kind, child.digest.clone()))
        .collect()
}

#[test]
fn manifest_in_memory_has_no_spare_capacity() {
    let digest = format!("sha256:{}", "a".repeat(64));
    let text = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"{digest}"}},"layers":[{{"digest":"{digest}"}}]}}"#
    );
    let manifest = Manifest::read(text.as_bytes()).unwrap();
    assert_eq!(
        (manifest.descriptors.len(), manifest.descriptors.capacity()),
        (2, 2)
    );
}

#[test]
fn image_lists_config_and_layers_in_order() {
    let image = read(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config"),
        "layers": [descriptor("one"), { "digest": digest("two").to_string(), "urls": ["https://elsewhere"] }],
        "subject": descriptor("subject"),
        "annotations": { "a": "b" },
    }))
    .unwrap();
    assert_eq!(
        (image.kind, image.unparsed, image.subject),
        (ManifestKind::Image, 0, Some(digest("subject")))
    );
    assert_eq!(
        roles(&image),
        [
            (DescriptorKind::Config, digest("config").into()),
            (DescriptorKind::Layer, digest("one").into()),
            (DescriptorKind::Layer, digest("two").into())
        ]
    );
    assert_eq!(
        image
            .descriptors
            .iter()
            .map(|child| (child.size, child.has_urls))
            .collect::<Vec<_>>(),
        [(Some(6), false), (Some(3), false), (None, true)]
    );
}

#[test]
fn index_lists_manifests_and_platforms() {
    let mut arm = descriptor("arm");
    arm["mediaType"] = json!("application/vnd.oci.image.manifest.v1+json");
    arm["platform"] = json!({ "os": "linux", "architecture": "arm", "variant": "v7", "os.version": "1" });
    let mut untyped = descriptor("untyped");
    untyped["mediaType"] = Value::Null;
    untyped["platform"] = json!({ "os": 7 });
    // A build cache lists blobs in an index.
    let index = read(&json!({ "manifests": [arm, untyped, descriptor("blob")] })).unwrap();
    assert_eq!(
        (index.kind, index.media_type.is_none(), index.unparsed),
        (ManifestKind::Index, true, 0)
    );
    assert_eq!(
        index
            .descriptors
            .iter()
            .map(|child| child.kind)
            .collect::<Vec<_>>(),
        [
            DescriptorKind::Manifest,
            DescriptorKind::Manifest,
            DescriptorKind::Layer
        ]
    );
    assert_eq!(
        index.descriptors[0].platform.as_ref().unwrap().to_string(),
        "linux/arm/v7"
    );
    assert_eq!(index.descriptors[1].platform, None);
}

#[test]
fn unparsable_descriptor_is_counted_and_others_stay() {
    let image = read(&json!({
        "config": "nonsense",
        "layers": [
            descriptor("one"), 7, null, {}, { "digest": "sha256:short" }, { "digest": 7 },
            { "digest": digest("two").to_string(), "size": -1, "mediaType": 7, "urls": "x", "platform": [] },
            { "digest": "blake3:00" },
        ],
    }))
    .unwrap();
    assert_eq!((image.kind, image.unparsed), (ManifestKind::Image, 6));
    assert_eq!(
        roles(&image),
        [
            (DescriptorKind::Layer, digest("one").into()),
            (DescriptorKind::Layer, digest("two").into()),
            (DescriptorKind::Layer, "blake3:00".parse().unwrap())
        ]
    );
    assert_eq!(
        (
            image.descriptors[1].size,
            image.descriptors[1].media_type.clone(),
            image.descriptors[1].has_urls
        ),
        (None, None, false)
    );
}

#[test]
fn other_manifest_kinds_parse_as_far_as_possible() {
    let old =
        read(&json!({ "schemaVersion": 1, "fsLayers": [{ "blobSum": digest("old").to_string() }, {}] }))
            .unwrap();
    assert_eq!(
        (old.kind, roles(&old), old.unparsed),
        (
            ManifestKind::Other,
            vec![(DescriptorKind::Layer, digest("old").into())],
            1
        )
    );
    let artifact = read(&json!({
        "mediaType": "application/vnd.oci.artifact.manifest.v1+json", "blobs": [descriptor("b")],
    }))
    .unwrap();
    assert_eq!(
        (artifact.kind, artifact.descriptors.len()),
        (ManifestKind::Other, 1)
    );
    let empty = read(&json!({ "mediaType": 7, "layers": null, "manifests": null, "subject": "x" })).unwrap();
    assert_eq!(
        (empty.kind, empty.descriptors.len(), empty.unparsed, empty.subject),
        (ManifestKind::Other, 0, 0, None)
    );
    let empty_index = json!({ "mediaType": "application/vnd.oci.image.index.v1+json" });
    assert_eq!(read(&empty_index).unwrap().kind, ManifestKind::Index);
}

#[test]
fn ambiguous_manifest_is_rejected() {
    let both = json!({ "manifests": [], "layers": [] });
    assert_eq!(read(&both), Err(ManifestError::Ambiguous));
    let both = json!({ "manifests": [], "config": descriptor("c") });
    assert_eq!(read(&both), Err(ManifestError::Ambiguous));
    for text in [
        r#"{"layers":[],"layers":[]}"#,
        r#"{"layers":{}}"#,
        "[null,null]",
        "7",
        "",
        "{",
        "{}x",
    ] {
        assert!(
            matches!(Manifest::read(text.as_bytes()), Err(ManifestError::Json { .. })),
            "{text}"
        );
    }
}

#[test]
fn oversized_manifest_is_rejected() {
    let padded = |bytes: usize| [b"{}".to_vec(), vec![b' '; bytes - 2]].concat();
    assert!(Manifest::read(&padded(MANIFEST_BYTES_MAX)).is_ok());
    let found = MANIFEST_BYTES_MAX + 1;
    assert_eq!(
        Manifest::read(&padded(found)),
        Err(ManifestError::TooLarge { found })
    );
    assert_eq!(
        read(&json!({ "layers": vec![0; DESCRIPTORS_MAX] }))
            .unwrap()
            .unparsed,
        DESCRIPTORS_MAX
    );
    let found = DESCRIPTORS_MAX + 5;
    assert_eq!(
        read(&json!({ "layers": vec![0; found] })),
        Err(ManifestError::TooMany { found })
    );
    assert_eq!(
        read(&json!({ "layers": vec![0; DESCRIPTORS_MAX], "blobs": [0] })),
        Err(ManifestError::TooMany {
            found: DESCRIPTORS_MAX + 1
        })
    );
}

#[test]
fn media_types_keep_their_text_and_match_by_essence() {
    for (text, essence, index, image, manifest) in [
        ("application/vnd.oci.image.index.v1+json", None, true, false, true),
        (
            "application/vnd.docker.distribution.manifest.list.v2+json",
            None,
            true,
            false,
            true,
        ),
        (
            "application/vnd.oci.image.manifest.v1+json",
            None,
            false,
            true,
            true,
        ),
        (
            "application/vnd.docker.distribution.manifest.v2+json",
            None,
            false,
            true,
            true,
        ),
        (
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            None,
            false,
            false,
            true,
        ),
        (
            "application/vnd.docker.distribution.manifest.v1+json",
            None,
            false,
            false,
            true,
        ),
        (
            "Application/VND.oci.image.manifest.v1+json; charset=utf-8",
            Some("Application/VND.oci.image.manifest.v1+json"),
            false,
            true,
            true,
        ),
        ("application/json", None, false, false, false),
    ] {
        let media_type: MediaType = text.parse().unwrap();
        assert_eq!(media_type.as_str(), text);
        assert_eq!(media_type.essence(), essence.unwrap_or(text));
        assert_eq!(
            (
                media_type.is_index(),
                media_type.is_image(),
                media_type.is_manifest()
            ),
            (index, image, manifest)
        );
    }
    for text in [
        "", "json", "a/", "/b", "a/b/c", " a/b", "a/b ", "a/b\n", "a/é", "a b/c", ";a/b",
    ] {
        assert_eq!(
            text.parse::<MediaType>(),
            Err(MediaTypeError::Grammar),
            "{text:?}"
        );
    }
    let long = format!("a/{}", "b".repeat(254));
    assert_eq!(
        long.parse::<MediaType>(),
        Err(MediaTypeError::TooLong { found: 256 })
    );
}

proptest! {
    #[test]
    fn every_layer_is_parsed_or_counted(
        layers in proptest::collection::vec(prop_oneof![
            "[a-z]{1,5}".prop_map(|content| descriptor(&content)),
            any::<u8>().prop_map(|number| json!({ "digest": number })),
            Just(json!([])),
        ], 0..40)
    ) {
        let image = read(&json!({ "layers": layers })).unwrap();
        prop_assert_eq!(image.descriptors.len() + image.unparsed, layers.len());
    }

    #[test]
    fn no_bytes_panic(bytes: Vec<u8>, text in "\\{(\"(layers|config|manifests|digest|size)\"[:,]|[\\[\\]{},:0-9]|null){0,30}") {
        let _any = (Manifest::read(&bytes), Manifest::read(text.as_bytes()));
    }
}
