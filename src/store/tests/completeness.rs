//! Image completeness, and the previous complete image of a tag.

use super::*;
use crate::store::tags::Previous;

const PLACE: &str = "library/alpine";

/// Whether the image can be pulled from this store alone, through its repository.
fn is_complete(store: &Store, manifest: &Bytes) -> bool {
    let held = store.manifest(&digest(manifest)).unwrap().unwrap();
    store.is_image_complete(UPSTREAM, &repository(PLACE), &held, &|_| false)
}

fn see(store: &Store, content: &[u8]) {
    store
        .add_member(UPSTREAM, &repository(PLACE), &digest(content))
        .unwrap();
}

/// An index of these manifests and an attestation of the first.
fn index(children: &[&Bytes]) -> Bytes {
    let last = children.len() - 1;
    let descriptor = |(number, child): (usize, &&Bytes)| {
        let os = if number == last { "unknown" } else { "linux" };
        let digest = digest(child);
        format!(
            r#"{{"mediaType":"{IMAGE}","digest":"{digest}","size":{},"platform":{{"os":"{os}","architecture":"a{number}"}}}}"#,
            child.len()
        )
    };
    let children: Vec<_> = children.iter().enumerate().map(descriptor).collect();
    Bytes::from(format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{}]}}"#,
        children.join(",")
    ))
}

/// Stores a manifest and its one blob, both as members of the repository.
fn keep_image(store: &Store, number: u32) -> Bytes {
    let bytes = manifest(number);
    put_manifest(store, &bytes, PLACE).unwrap();
    put_blob(store, &number.to_be_bytes()).unwrap();
    see(store, &number.to_be_bytes());
    bytes
}

#[test]
fn image_is_complete_if_blobs_are_cached_members() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let bytes = manifest(1);
        put_manifest(&store, &bytes, PLACE).unwrap();
        assert!(!is_complete(&store, &bytes), "only the manifest is cached");
        see(&store, &1_u32.to_be_bytes());
        assert!(!is_complete(&store, &bytes), "member, but not cached");
        let held = store.manifest(&digest(&bytes)).unwrap().unwrap();
        let arriving = |blob: &Digest| *blob == digest(&1_u32.to_be_bytes());
        assert!(store.is_image_complete(UPSTREAM, &repository(PLACE), &held, &arriving));
        assert!(
            !is_complete(&store, &bytes),
            "a download in flight is not cached as complete"
        );
        put_blob(&store, &1_u32.to_be_bytes()).unwrap();
        assert!(is_complete(&store, &bytes));
        assert!(
            !store.is_image_complete(UPSTREAM, &repository("library/other"), &held, &|_| false),
            "the blob is not a member of the other repository"
        );
    });
}

#[test]
fn removal_makes_image_incomplete() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let bytes = keep_image(&store, 1);
        assert!(is_complete(&store, &bytes));
        store.remove_blob(&digest(&1_u32.to_be_bytes())).unwrap();
        assert!(!is_complete(&store, &bytes));
        put_blob(&store, &1_u32.to_be_bytes()).unwrap();
        assert!(is_complete(&store, &bytes));
        fixture.overwrite(&content_path("blobs", &digest(&1_u32.to_be_bytes())), b"????");
        store.quarantine_blob(&digest(&1_u32.to_be_bytes()));
        assert!(!is_complete(&store, &bytes));
    });
}

#[test]
fn index_is_complete_if_one_image_is_attestations_ignored() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let index = index(&[&manifest(1), &manifest(2), &manifest(3)]);
        put_manifest(&store, &index, PLACE).unwrap();
        assert!(!is_complete(&store, &index));
        see(&store, &keep_image(&store, 3));
        assert!(!is_complete(&store, &index), "the attestation alone");
        see(&store, &keep_image(&store, 2));
        assert!(is_complete(&store, &index));
        let held = store.manifest(&digest(&index)).unwrap().unwrap();
        let place = repository(PLACE);
        let view = store.view();
        let whole = view.complete_children(UPSTREAM, &place, &held);
        let platforms: Vec<_> = whole
            .filter_map(|child| Some(child.platform.as_ref()?.to_string()))
            .collect();
        assert_eq!(platforms, ["linux/a1"]);
    });
}

#[test]
fn tag_keeps_previous_complete_image_until_new_is_complete() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let (old, newer, newest) = (keep_image(&store, 1), manifest(2), manifest(3));
        put_manifest(&store, &newer, PLACE).unwrap();
        put_manifest(&store, &newest, PLACE).unwrap();
        let previous = Some(Previous {
            digest: digest(&old),
            media_type: image(),
            confirmed_at: at(1),
        });

        store.put_tag(&key("3"), variant(1, &old, 1)).unwrap();
        assert_eq!(only_variant(&store, "3").previous, None);
        store.put_tag(&key("3"), variant(1, &newer, 2)).unwrap();
        assert_eq!(only_variant(&store, "3").previous, previous);
        store.put_tag(&key("3"), variant(1, &newest, 3)).unwrap();
        assert_eq!(
            only_variant(&store, "3").previous,
            previous,
            "an incomplete image does not replace the previous one"
        );
        drop(store);

        let store = fixture.open();
        assert_eq!(
            only_variant(&store, "3").previous,
            previous,
            "after a restart too"
        );
        keep_image(&store, 3);
        store.put_tag(&key("3"), variant(1, &newest, 4)).unwrap();
        assert_eq!(only_variant(&store, "3").previous, None);
    });
}

#[test]
fn tag_that_moved_back_has_no_previous_image() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let (old, newer) = (keep_image(&store, 1), manifest(2));
        put_manifest(&store, &newer, PLACE).unwrap();
        store.put_tag(&key("3"), variant(1, &old, 1)).unwrap();
        store.put_tag(&key("3"), variant(1, &newer, 2)).unwrap();
        store.remove_blob(&digest(&1_u32.to_be_bytes())).unwrap();
        store.put_tag(&key("3"), variant(1, &old, 3)).unwrap();
        assert_eq!(only_variant(&store, "3").previous, None);
    });
}
