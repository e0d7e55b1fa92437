//! Usage counters, install secret and concurrency.

use super::*;

#[test]
fn usage_counts_each_file_once() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        for number in 0..40_u32 {
            put_blob(&store, &number.to_be_bytes()).unwrap();
            put_manifest(&store, &manifest(number), "library/alpine").unwrap();
            store
                .put_tag(&key(&format!("t{number}")), variant(1, b"image", 1))
                .unwrap();
        }
        store.remove_blob(&digest(&7_u32.to_be_bytes())).unwrap();
        store.remove_manifest(&digest(&manifest(7))).unwrap();
        store.remove_tag(&key("t7")).unwrap();
        let expected = Usage {
            blobs: 39,
            blob_bytes: 39 * 4,
            manifests: 39,
            manifest_bytes: 39 * manifest(1).len() as u64,
            tags: 39,
            is_complete: true,
        };
        assert_eq!(counted_usage(&store), expected);
        drop(store);
        assert_eq!(counted_usage(&fixture.open()), expected);
    });
}

#[test]
fn install_secret_is_stable_and_differs_per_store() {
    on_every_fs(|fixture| {
        let secret = *fixture.open().install_secret();
        assert_eq!(*fixture.open().install_secret(), secret);
        assert_ne!(*Fixture::memory().open().install_secret(), secret);
    });
}

#[test]
fn concurrent_threads_see_consistent_content() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for number in 0..20_u32 {
                        put_blob(&store, &number.to_be_bytes()).unwrap();
                        put_manifest(&store, &manifest(number), "library/alpine").unwrap();
                        let alpine = repository("library/alpine");
                        store
                            .add_member(UPSTREAM, &alpine, &digest(&number.to_be_bytes()))
                            .unwrap();
                        store
                            .put_tag(&key("3"), variant(1, &number.to_be_bytes(), 1))
                            .unwrap();
                        assert!(store.is_member(UPSTREAM, &alpine, &digest(&number.to_be_bytes())));
                        assert_eq!(
                            read_blob(&store, &digest(&number.to_be_bytes())).unwrap(),
                            number.to_be_bytes()
                        );
                    }
                });
            }
        });
        let usage = counted_usage(&store);
        assert_eq!((usage.blobs, usage.manifests, usage.tags), (20, 20, 1));
        assert_eq!(fixture.ingests(), 0);
    });
}
