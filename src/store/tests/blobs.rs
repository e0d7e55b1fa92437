//! Blob store: blobs are visible after verification only, complete or a cache miss.

use tokio::time::Instant;

use super::*;
use crate::store::blobs::{DigestMismatch, Mismatch, SMALL_BLOB_BYTES_MAX};

#[test]
fn committed_blob_is_stored_and_survives_reopen() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        assert_eq!(read_blob(&store, &digest(b"layer")), None);
        put_blob(&store, b"layer").unwrap();
        assert_eq!(read_blob(&store, &digest(b"layer")).unwrap(), b"layer");
        drop(store);
        let store = fixture.open();
        assert_eq!(read_blob(&store, &digest(b"layer")).unwrap(), b"layer");
        assert_eq!(fixture.ingests(), 0);
    });
}

#[test]
fn blob_is_verified_again_after_a_time_or_closing_its_file() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        put_blob(&store, b"layer").unwrap();
        let is_verified_after = |store: &Store, time| {
            let blob = store.blob(&digest(b"layer")).unwrap().unwrap();
            blob.is_verified(Instant::now() + time)
        };
        let is_verified = |store: &Store| is_verified_after(store, Duration::ZERO);
        assert!(is_verified(&store), "it was hashed while it was written");
        assert!(is_verified_after(&store, Duration::from_secs(500)));
        assert!(
            !is_verified_after(&store, Duration::from_secs(600)),
            "the disk may have changed it"
        );
        drop(store);
        let store = fixture.open();
        assert!(!is_verified(&store));
        store.remove_blob(&digest(b"layer")).unwrap();
        put_blob(&store, b"layer").unwrap();
        assert!(is_verified(&store));
    });
}

#[test]
fn unverified_blob_is_never_visible() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let ingest = store.begin(&digest(b"layer"), Some(5)).unwrap();
        ingest.file().write_at(b"layer", 0).unwrap();
        assert_eq!(
            read_blob(&store, &digest(b"layer")),
            None,
            "not while it is written"
        );
        let fault = ingest.commit(verified(b"other")).unwrap_err();
        let wrong = DigestMismatch {
            expected: digest(b"layer"),
            found: digest(b"other"),
        };
        assert_eq!(fault, StoreError::DigestMismatch(Box::new(wrong)));
        assert_eq!(read_blob(&store, &digest(b"layer")), None);
        assert_eq!(fixture.files("blobs"), [] as [PathBuf; 0]);
    });
}

#[test]
fn blob_shorter_than_verified_size_is_never_visible() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let ingest = store.begin(&digest(b"layer"), Some(5)).unwrap();
        ingest.file().write_at(b"lay", 0).unwrap();
        assert!(matches!(
            ingest.commit(verified(b"layer")),
            Err(StoreError::Corrupt { .. })
        ));
        assert_eq!(read_blob(&store, &digest(b"layer")), None);
    });
}

#[test]
fn wrong_digest_fails_verification() {
    let hashed = |bytes: &[u8]| {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        hasher
    };
    let (right, wrong) = (digest(b"right"), digest(b"wrong"));
    assert_eq!(
        Verified::check(hashed(b"wrong"), &right, 5, Some(5)),
        Err(Mismatch::Digest(Box::new(DigestMismatch {
            expected: right,
            found: wrong
        })))
    );
    assert_eq!(
        Verified::check(hashed(b"right"), &right, 5, Some(6)),
        Err(Mismatch::Size {
            expected: 6,
            found: 5
        })
    );
    assert_eq!(
        Verified::check(hashed(b"right"), &right, 5, None).unwrap().size(),
        5
    );
}

#[test]
fn dropped_ingest_leaves_no_files() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let ingest = store.begin(&digest(b"layer"), None).unwrap();
        ingest.file().write_at(b"lay", 0).unwrap();
        assert_eq!(fixture.ingests(), 1);
        drop(ingest);
        assert_eq!(fixture.ingests(), 0);
    });
}

#[test]
fn abandoned_ingest_files_are_removed_at_start() {
    on_every_fs(|fixture| {
        fixture.fs.create(Path::new("ingest/00000000/data")).unwrap();
        let store = fixture.open();
        assert_eq!(fixture.ingests(), 0);
        put_blob(&store, b"layer").unwrap();
    });
}

#[test]
fn concurrent_ingests_of_one_blob_commit_once() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let second = store.begin(&digest(b"layer"), None).unwrap();
        second.file().write_at(b"layer", 0).unwrap();
        put_blob(&store, b"layer").unwrap();
        assert_eq!(second.commit(verified(b"layer")).unwrap().size, 5);
        assert_eq!(counted_usage(&store).blobs, 1);
        assert_eq!(fixture.ingests(), 0);
    });
}

#[test]
fn only_small_blobs_are_served_from_memory() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let small = vec![1; usize::try_from(SMALL_BLOB_BYTES_MAX).unwrap()];
        let large = [&small[..], &[1]].concat();
        assert_eq!(store.small_blob(&digest(&small)), None);
        put_blob(&store, &small).unwrap();
        put_blob(&store, &large).unwrap();
        assert_eq!(store.small_blob(&digest(&small)).unwrap(), small);
        assert_eq!(store.small_blob(&digest(&large)), None);
    });
}

#[test]
fn corrupt_small_blob_is_quarantined() {
    on_every_fs(|fixture| {
        put_blob(&fixture.open(), b"config").unwrap();
        fixture.overwrite(&fixture.files("blobs")[0], b"c0nfig");
        let store = fixture.open();
        assert_eq!(store.small_blob(&digest(b"config")), None);
        assert!(store.blob(&digest(b"config")).unwrap().is_none());
        assert_eq!(fixture.files("quarantine").len(), 1);
        put_blob(&store, b"config").unwrap();
        assert_eq!(store.small_blob(&digest(b"config")).unwrap(), &b"config"[..]);
    });
}

#[test]
fn removed_blob_is_a_miss_but_open_readers_finish() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        put_blob(&store, b"layer").unwrap();
        let held = store.blob(&digest(b"layer")).unwrap().unwrap();
        assert!(store.remove_blob(&digest(b"layer")).unwrap());
        assert!(!store.remove_blob(&digest(b"layer")).unwrap());
        assert!(store.blob(&digest(b"layer")).unwrap().is_none());
        assert_eq!(fs::read_all(held.file.as_ref(), 5).unwrap(), b"layer");
    });
}
