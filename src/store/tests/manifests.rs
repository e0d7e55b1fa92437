//! A manifest is read exactly as stored, or it is a miss.

use super::*;

#[test]
fn manifest_is_read_back_unchanged() {
    on_every_fs(|fixture| {
        let (bytes, store) = (manifest(1), fixture.open());
        assert!(store.manifest(&digest(&bytes)).unwrap().is_none());
        let kept = put_manifest(&store, &bytes, "library/alpine").unwrap();
        assert!(Arc::ptr_eq(
            &kept,
            &store.manifest(&digest(&bytes)).unwrap().unwrap()
        ));
        drop(store);
        let held = fixture.open().manifest(&digest(&bytes)).unwrap().unwrap();
        assert_eq!(
            (held.digest, &held.bytes, &held.media_type),
            (digest(&bytes), &bytes, &image())
        );
    });
}

#[test]
fn mismatching_or_invalid_manifest_is_not_stored() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let repo = repository("library/alpine");
        let wrong = store
            .put_manifest(manifest(1), image(), digest(b"other"), UPSTREAM, &repo)
            .unwrap_err();
        assert!(matches!(wrong, StoreError::DigestMismatch(_)), "{wrong}");
        let page = Bytes::from_static(b"<html>sign in</html>");
        let none = store
            .put_manifest(page.clone(), image(), digest(&page), UPSTREAM, &repo)
            .unwrap_err();
        assert!(matches!(none, StoreError::NotAManifest { .. }), "{none}");
        assert_eq!(fixture.files("manifests"), [] as [PathBuf; 0]);
    });
}

#[test]
fn damaged_manifest_is_quarantined_and_a_miss() {
    on_every_fs(|fixture| {
        let bytes = manifest(1);
        put_manifest(&fixture.open(), &bytes, "library/alpine").unwrap();
        fixture.overwrite(&fixture.files("manifests")[0], &manifest(2));
        let store = fixture.open();
        assert!(store.manifest(&digest(&bytes)).unwrap().is_none());
        assert_eq!(fixture.files("quarantine").len(), 1);
        assert_eq!(counted_usage(&store).manifests, 0);
        put_manifest(&store, &bytes, "library/alpine").unwrap();
        assert_eq!(counted_usage(&store).manifests, 1);
        drop(store);
        assert_eq!(
            fixture.open().manifest(&digest(&bytes)).unwrap().unwrap().bytes,
            bytes
        );
    });
}

#[test]
fn manifest_without_metadata_keeps_its_own_media_type() {
    on_every_fs(|fixture| {
        let bytes = manifest(1);
        put_manifest(&fixture.open(), &bytes, "library/alpine").unwrap();
        fixture.fs.remove(&fixture.files("manifests")[1]).unwrap();
        let store = fixture.open();
        assert_eq!(
            store.manifest(&digest(&bytes)).unwrap().unwrap().media_type,
            image()
        );
        put_manifest(&store, &bytes, "library/alpine").unwrap();
        assert_eq!(fixture.files("manifests").len(), 2, "its metadata is recreated");
    });
}

#[test]
fn damaged_manifest_metadata_is_recreated() {
    let fixture = Fixture::directory();
    let bytes = manifest(1);
    drop(put_manifest(&fixture.open(), &bytes, "library/alpine").unwrap());
    let record = || {
        let mut files = fixture.files("manifests").into_iter();
        files.find(|path| path.extension().is_some()).unwrap()
    };
    fixture.overwrite(&record(), b"damaged");
    let held = fixture.open().manifest(&digest(&bytes)).unwrap().unwrap();
    assert_eq!(held.media_type, image());
    let after = fixture.fs.read_file(&record(), 4096).unwrap();
    assert!(
        checksummed_json::decode::<serde_json::Value>(&after).is_some(),
        "no metadata"
    );
}

#[test]
fn manifest_metadata_lists_each_repository_once() {
    on_every_fs(|fixture| {
        let (bytes, store) = (manifest(1), fixture.open());
        for repo in ["library/alpine", "acme/alpine", "library/alpine"] {
            put_manifest(&store, &bytes, repo).unwrap();
        }
        let record = fixture
            .fs
            .read_file(&fixture.files("manifests")[1], 10_000)
            .unwrap();
        let record = String::from_utf8(record).unwrap();
        assert_eq!(record.matches("library/alpine").count(), 1, "{record}");
        assert_eq!(record.matches("acme/alpine").count(), 1, "{record}");
    });
}
