//! Manifests: exactly as they were kept, or a miss.

use super::*;

#[test]
fn a_manifest_is_served_as_it_was_kept() {
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
fn bytes_of_another_digest_and_what_is_no_manifest_are_not_kept() {
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
fn a_damaged_manifest_is_quarantined_and_a_miss_until_it_is_kept_again() {
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
fn a_manifest_without_its_record_keeps_the_type_it_states_of_itself() {
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
        assert_eq!(fixture.files("manifests").len(), 2, "its record is written again");
    });
}

#[test]
fn the_record_of_a_manifest_that_was_damaged_is_written_anew() {
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
        "no record"
    );
}

#[test]
fn the_record_of_a_manifest_names_each_repository_once() {
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
