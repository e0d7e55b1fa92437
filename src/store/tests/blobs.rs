//! Blobs: visible once verified, whole or a miss.

use super::*;
use crate::store::blobs::{Mismatch, SMALL_BLOB_BYTES_MAX, WrongDigest};

#[test]
fn a_blob_is_held_once_it_is_committed_and_after_reopening() {
    everywhere(|ground| {
        let store = ground.open();
        assert_eq!(read_blob(&store, &digest(b"layer")), None);
        keep_blob(&store, b"layer").unwrap();
        assert_eq!(read_blob(&store, &digest(b"layer")).unwrap(), b"layer");
        drop(store);
        let store = ground.open();
        assert_eq!(read_blob(&store, &digest(b"layer")).unwrap(), b"layer");
        assert_eq!(ground.ingests(), 0);
    });
}

#[test]
fn an_unverified_blob_is_never_visible() {
    everywhere(|ground| {
        let store = ground.open();
        let ingest = store.begin(&digest(b"layer"), Some(5)).unwrap();
        ingest.file().write_at(b"layer", 0).unwrap();
        assert_eq!(
            read_blob(&store, &digest(b"layer")),
            None,
            "not while it is written"
        );
        let fault = ingest.commit(verified(b"other")).unwrap_err();
        let wrong = WrongDigest {
            expected: digest(b"layer"),
            found: digest(b"other"),
        };
        assert_eq!(fault, StoreError::DigestMismatch(Box::new(wrong)));
        assert_eq!(read_blob(&store, &digest(b"layer")), None);
        assert_eq!(ground.files("blobs"), [] as [PathBuf; 0]);
    });
}

#[test]
fn a_blob_shorter_than_its_proof_is_never_visible() {
    everywhere(|ground| {
        let store = ground.open();
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
fn wrong_bytes_give_no_proof() {
    let hashed = |bytes: &[u8]| {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(bytes);
        hasher
    };
    let (right, wrong) = (digest(b"right"), digest(b"wrong"));
    assert_eq!(
        Verified::check(hashed(b"wrong"), &right, 5, Some(5)),
        Err(Mismatch::Digest(Box::new(WrongDigest {
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
fn a_dropped_ingest_leaves_nothing() {
    everywhere(|ground| {
        let store = ground.open();
        let ingest = store.begin(&digest(b"layer"), None).unwrap();
        ingest.file().write_at(b"lay", 0).unwrap();
        assert_eq!(ground.ingests(), 1);
        drop(ingest);
        assert_eq!(ground.ingests(), 0);
    });
}

#[test]
fn what_a_stopped_process_left_in_ingest_is_removed() {
    everywhere(|ground| {
        ground.fs.create(Path::new("ingest/00000000/data")).unwrap();
        let store = ground.open();
        assert_eq!(ground.ingests(), 0);
        keep_blob(&store, b"layer").unwrap();
    });
}

#[test]
fn two_ingests_of_one_blob_end_in_one() {
    everywhere(|ground| {
        let store = ground.open();
        let second = store.begin(&digest(b"layer"), None).unwrap();
        second.file().write_at(b"layer", 0).unwrap();
        keep_blob(&store, b"layer").unwrap();
        assert_eq!(second.commit(verified(b"layer")).unwrap().size, 5);
        assert_eq!(counted_usage(&store).blobs, 1);
        assert_eq!(ground.ingests(), 0);
    });
}

#[test]
fn a_small_blob_comes_whole_and_a_large_one_does_not() {
    everywhere(|ground| {
        let store = ground.open();
        let small = vec![1; usize::try_from(SMALL_BLOB_BYTES_MAX).unwrap()];
        let large = [&small[..], &[1]].concat();
        assert_eq!(store.small_blob(&digest(&small)), None);
        keep_blob(&store, &small).unwrap();
        keep_blob(&store, &large).unwrap();
        assert_eq!(store.small_blob(&digest(&small)).unwrap(), small);
        assert_eq!(store.small_blob(&digest(&large)), None);
    });
}

#[test]
fn a_damaged_small_blob_is_quarantined_and_a_miss() {
    everywhere(|ground| {
        keep_blob(&ground.open(), b"config").unwrap();
        ground.overwrite(&ground.files("blobs")[0], b"c0nfig");
        let store = ground.open();
        assert_eq!(store.small_blob(&digest(b"config")), None);
        assert!(store.blob(&digest(b"config")).unwrap().is_none());
        assert_eq!(ground.files("quarantine").len(), 1);
        keep_blob(&store, b"config").unwrap();
        assert_eq!(store.small_blob(&digest(b"config")).unwrap(), &b"config"[..]);
    });
}

#[test]
fn a_removed_blob_is_a_miss_but_its_readers_read_on() {
    everywhere(|ground| {
        let store = ground.open();
        keep_blob(&store, b"layer").unwrap();
        let held = store.blob(&digest(b"layer")).unwrap().unwrap();
        assert!(store.remove_blob(&digest(b"layer")).unwrap());
        assert!(!store.remove_blob(&digest(b"layer")).unwrap());
        assert!(store.blob(&digest(b"layer")).unwrap().is_none());
        assert_eq!(fs::read_all(held.file.as_ref(), 5).unwrap(), b"layer");
    });
}
