//! Tests of the objects of an image, over a bucket in memory.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::sync::Arc;

use bytes::Bytes;

use super::*;
use crate::bucket::in_memory;
use crate::oci::Algorithm;
use crate::shared::tests::settings_over;

fn images(bucket: &Arc<dyn ObjectStorage>) -> BucketImages {
    BucketImages::new(settings_over(Arc::clone(bucket)))
}

fn place() -> RecordPlace {
    RecordPlace {
        upstream: "https://registry-1.docker.io".into(),
        repository: "library/demo".parse().unwrap(),
    }
}

fn digest(content: &str) -> Digest {
    Digest::of(Algorithm::Sha256, content.as_bytes())
}

async fn put(bucket: &Arc<dyn ObjectStorage>, key: ObjectKey, content: &str) {
    bucket
        .put(&key, Bytes::from(content.to_owned()), None)
        .await
        .unwrap();
}

async fn put_manifest(bucket: &Arc<dyn ObjectStorage>, content: &str) -> Digest {
    put(bucket, ObjectKey::manifest(&digest(content)), content).await;
    digest(content)
}

fn descriptor(digest: Digest, more: &str) -> String {
    format!(r#"{{"digest": "{digest}", "size": 5{more}}}"#)
}

fn manifest(config: &str, layers: &[&str]) -> String {
    let layers: Vec<_> = layers.iter().map(|layer| descriptor(digest(layer), "")).collect();
    format!(
        r#"{{"schemaVersion": 2, "config": {}, "layers": [{}]}}"#,
        descriptor(digest(config), ""),
        layers.join(",")
    )
}

fn index(children: &[Digest]) -> String {
    let platform = r#", "platform": {"os": "linux", "architecture": "arm64"}"#;
    let children: Vec<_> = children
        .iter()
        .map(|child| descriptor(*child, platform))
        .collect();
    format!(r#"{{"schemaVersion": 2, "manifests": [{}]}}"#, children.join(","))
}

#[tokio::test]
async fn objects_of_an_image_are_found_or_missing() {
    let bucket = in_memory();
    let one = put_manifest(&bucket, &manifest("config", &["layer", "absent"])).await;
    let missing = digest("no such manifest");
    let damaged = digest("another manifest");
    put(&bucket, ObjectKey::manifest(&damaged), "other bytes").await;
    for content in ["config", "layer"] {
        put(&bucket, ObjectKey::blob(&digest(content)), content).await;
    }
    let index = put_manifest(&bucket, &index(&[one, missing, damaged, one])).await;
    let found = images(&bucket).objects(&place(), &[index]).await.unwrap();
    let states: Vec<_> = found
        .objects
        .iter()
        .map(|object| (object.role.name(), object.digest, object.listed().is_some()))
        .collect();
    let expected = [
        ("manifest", index, true),
        ("manifest", one, true),
        ("manifest", missing, false),
        ("manifest", damaged, true),
        ("config", digest("config"), true),
        ("layer", digest("layer"), true),
        ("layer", digest("absent"), false),
    ];
    assert_eq!(states, expected);
    assert_eq!(found.objects[1].platform.as_deref(), Some("linux/arm64"));
    assert_eq!(found.objects[3].state, ObjectState::Damaged);
    assert_eq!(found.unread_manifests(), 2);
    let steps = |has_blobs| {
        let steps = found.deletion_steps(has_blobs).into_iter();
        let keys = steps.map(|step| step.into_iter().map(|listed| listed.key).collect::<Vec<_>>());
        keys.collect::<Vec<_>>()
    };
    let blobs = ["config", "layer"].map(|content| ObjectKey::blob(&digest(content)));
    let children = [one, damaged].map(|child| ObjectKey::manifest(&child));
    let top = [ObjectKey::manifest(&index)];
    assert_eq!(steps(true), [blobs.to_vec(), children.to_vec(), top.to_vec()]);
    assert_eq!(steps(false), [Vec::new(), children.to_vec(), top.to_vec()]);
    assert!(
        !found.is_truncated && found.has_unknown_objects(),
        "one is damaged"
    );
}

#[tokio::test]
async fn manifests_that_cannot_be_followed_are_counted() {
    let bucket = in_memory();
    let whole = manifest("config", &["layer"]);
    let missing = digest("no such manifest");
    let unsupported = |list: &str| {
        let hex = "ab".repeat(48);
        let children = format!(r#"[{{"digest": "sha384:{hex}", "size": 5}}]"#);
        format!(r#"{{"schemaVersion": 2, "{list}": {children}}}"#)
    };
    let wrong_layer = r#"{"schemaVersion": 2, "layers": [{"digest": 1}]}"#;
    let mut deep = put_manifest(&bucket, &index(&[missing])).await;
    for _ in 0..2 {
        deep = put_manifest(&bucket, &index(&[deep])).await;
    }
    // Unparsed manifests, deep indexes, manifests with unsupported digests.
    for (content, expected) in [
        (whole.as_str(), [0, 0, 0]),
        (&index(&[missing]), [0, 0, 0]),
        ("no manifest", [1, 0, 0]),
        (wrong_layer, [1, 0, 0]),
        (&index(&[deep]), [0, 1, 0]),
        (&unsupported("manifests"), [0, 0, 1]),
        // No cache stores such a layer.
        (&unsupported("layers"), [0, 0, 0]),
    ] {
        let top = put_manifest(&bucket, content).await;
        let found = images(&bucket).objects(&place(), &[top]).await.unwrap();
        let counts = [
            found.unparsed_manifests,
            found.deep_indexes,
            found.unsupported_manifests,
        ];
        assert_eq!(counts, expected, "{content}");
        assert_eq!(found.has_unknown_objects(), expected != [0; 3], "{content}");
    }
}

#[tokio::test]
async fn index_that_lists_itself_or_too_much_ends() {
    let bucket = in_memory();
    // An index within an index, and so on.
    let mut innermost = put_manifest(&bucket, &manifest("config", &[])).await;
    for _ in 0..5 {
        innermost = put_manifest(&bucket, &index(&[innermost])).await;
    }
    let found = images(&bucket).objects(&place(), &[innermost]).await.unwrap();
    assert_eq!(found.objects.len(), 3, "two levels below the outermost");

    let layers: Vec<_> = (0..9_999).map(|number| number.to_string()).collect();
    let layers: Vec<_> = layers.iter().map(String::as_str).collect();
    let large = put_manifest(&bucket, &manifest("config", &layers)).await;
    let found = images(&bucket).objects(&place(), &[large]).await.unwrap();
    assert_eq!((found.objects.len(), found.is_truncated), (OBJECTS_MAX, true));
    assert!(found.has_unknown_objects());
}

#[tokio::test]
async fn objects_of_a_digest_are_blob_claim_and_parts() {
    let (bucket, content) = (in_memory(), "layer");
    let own = digest(content);
    let keys = [
        ObjectKey::blob(&own),
        ObjectKey::claim(&own),
        ObjectKey::part(&own, 0),
        ObjectKey::part(&own, 5),
    ];
    for key in &keys {
        put(&bucket, key.clone(), content).await;
    }
    put(&bucket, ObjectKey::part(&digest("other"), 0), content).await;
    let found = images(&bucket).objects_of(&own).await.unwrap();
    let found: Vec<_> = found.into_iter().map(|listed| listed.key).collect();
    assert_eq!(found, keys);
}

#[tokio::test]
async fn tag_without_a_key_is_refused() {
    let found = images(&in_memory()).tag(&place(), &"1".parse().unwrap()).await;
    assert_eq!(found, Err(TagRecordError::NoKey));
}
