#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
use bytes::Bytes;

use super::*;
use crate::store::access_times::ContentId;
use crate::store::tests::{Fixture, at, digest, key, manifest, put_blob, put_manifest, variant};

/// Stores an image with one blob.
fn stored_image(store: &Store) {
    put_blob(store, &1_u32.to_be_bytes()).unwrap();
    put_manifest(store, &manifest(1), "library/alpine").unwrap();
    store.put_tag(&key("1"), variant(1, &manifest(1), 0)).unwrap();
}

fn has_content(store: &Store) -> (bool, bool) {
    let has_manifest = store.manifest(&digest(&manifest(1))).unwrap().is_some();
    (
        has_manifest,
        store.blob(&digest(&1_u32.to_be_bytes())).unwrap().is_some(),
    )
}

/// Deletes the image. `meanwhile` runs on another thread after the snapshot; the tag is removed once `is_visible`.
fn delete_during(store: &Store, meanwhile: impl FnOnce() + Send, is_visible: impl Fn() -> bool) -> Reclaimed {
    std::thread::scope(|scope| {
        let meanwhile = std::cell::Cell::new(Some(meanwhile));
        let remove_tag = |key: &TagKey| {
            scope.spawn(meanwhile.take().unwrap());
            while !is_visible() {
                std::thread::yield_now();
            }
            store.remove_tag(key).map(drop)
        };
        store.evictor.delete(&[&key("1")], remove_tag).unwrap()
    })
}

#[test]
fn deletion_keeps_layer_of_manifest_stored_meanwhile() {
    let store = Fixture::directory().open();
    stored_image(&store);
    let layer = digest(&1_u32.to_be_bytes());
    let other = Bytes::from(format!(
        r#"{{"schemaVersion":2,"layers":[{{"digest":"{layer}","size":4}}]}}"#
    ));
    let pull = || drop(put_manifest(&store, &other, "library/alpine").unwrap());
    let is_stored = || store.manifest(&digest(&other)).unwrap().is_some();
    let freed = delete_during(&store, pull, is_stored);
    assert_eq!((freed.manifests, freed.blobs), (1, 0));
    assert!(store.tag(&key("1")).unwrap().is_none());
    assert_eq!(has_content(&store), (false, true));
}

#[test]
fn deletion_keeps_content_pinned_meanwhile() {
    let store = Fixture::memory().open();
    stored_image(&store);
    let pin = Pin::Digest(digest(&manifest(1)));
    let freed = delete_during(&store, || _ = store.pin(&pin).unwrap(), || store.is_pinned(&pin));
    assert_eq!((freed.manifests, freed.blobs), (0, 0));
    assert_eq!(has_content(&store), (true, true));
}

#[test]
fn deletion_is_repeated_for_content_used_meanwhile() {
    let store = Fixture::memory().open();
    stored_image(&store);
    let reading = store.blob(&digest(&1_u32.to_be_bytes())).unwrap().unwrap();
    let used = ContentId::Manifest(digest(&manifest(1)));
    let freed = delete_during(
        &store,
        || store.touch(used, at(7200)),
        || store.evictor.access_times.was_needed(&digest(&manifest(1))),
    );
    assert_eq!((freed.manifests, freed.blobs), (1, 1));
    assert_eq!(has_content(&store), (false, false));
    assert_eq!(reading.read_all(4).unwrap(), 1_u32.to_be_bytes());
}

#[test]
fn image_with_pinned_content_is_not_deleted() {
    let store = Fixture::memory().open();
    stored_image(&store);
    for pin in [
        Pin::Tag(key("1")),
        Pin::Digest(digest(&manifest(1))),
        Pin::Digest(digest(&1_u32.to_be_bytes())),
    ] {
        store.pin(&pin).unwrap();
        let error = store.delete_images(&[key("1")], false).unwrap_err();
        assert!(
            matches!(&error, DeleteError::Pinned(found) if *found == pin),
            "{error}"
        );
        assert!(store.tag(&key("1")).unwrap().is_some());
        assert_eq!(has_content(&store), (true, true));
        assert_eq!(store.delete_images(&[key("1")], true).unwrap().manifests, 1);
        store.unpin(&pin).unwrap();
    }
    let freed = store
        .delete_images(&[key("1"), key("1"), key("absent")], false)
        .unwrap();
    assert_eq!((freed.tags, freed.manifests, freed.blobs), (1, 1, 1));
    assert_eq!(has_content(&store), (false, false));
}
