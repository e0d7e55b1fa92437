//! Eviction: the least recently used images make room for new ones.

use super::*;
use crate::store::access_times::ContentId;
use crate::store::pins::Pin;

const LAYER_BYTES: usize = 1000;
/// Long after the files were written, in steps of two hours.
const LATER: u64 = 2 * 3600;

fn layer(number: u32) -> Vec<u8> {
    let mut bytes = number.to_be_bytes().repeat(LAYER_BYTES / 4);
    bytes.truncate(LAYER_BYTES);
    bytes
}

/// A manifest with one layer of its own and an optional shared one.
fn image_of(number: u32, base: Option<&[u8]>) -> Bytes {
    let layers: Vec<String> = [Some(&layer(number)[..]), base]
        .into_iter()
        .flatten()
        .map(|bytes| {
            format!(
                r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{}","size":{}}}"#,
                digest(bytes),
                bytes.len()
            )
        })
        .collect();
    Bytes::from(format!(
        r#"{{"schemaVersion":2,"mediaType":"{IMAGE}","layers":[{}]}}"#,
        layers.join(",")
    ))
}

/// Stores an image as a pull does: manifest, tag and layers, each with an access.
fn pull(store: &Store, number: u32, base: Option<&[u8]>, seconds: u64) -> Result<(), StoreError> {
    let bytes = image_of(number, base);
    store.tick(at(seconds));
    put_manifest(store, &bytes, "library/alpine")?;
    store.put_tag(&key(&number.to_string()), variant(1, &bytes, seconds))?;
    store.touch(ContentId::Manifest(digest(&bytes)), at(seconds));
    for blob in [Some(&layer(number)[..]), base].into_iter().flatten() {
        put_blob(store, blob)?;
        store.touch(ContentId::Blob(digest(blob)), at(seconds));
    }
    Ok(())
}

fn is_listed(store: &Store, number: u32) -> bool {
    store.tag(&key(&number.to_string())).unwrap().is_some()
}

fn is_complete(store: &Store, number: u32, base: Option<&[u8]>) -> bool {
    is_listed(store, number)
        && store
            .manifest(&digest(&image_of(number, base)))
            .unwrap()
            .is_some()
        && read_blob(store, &digest(&layer(number))).is_some_and(|bytes| bytes == layer(number))
        && base.is_none_or(|base| read_blob(store, &digest(base)).is_some())
}

#[test]
fn evict_keeps_size_limit_and_removes_lru_image() {
    on_every_fs(|fixture| {
        let store = fixture.open_with_limit(6000, at(0));
        let base = vec![9; 1000];
        for number in 0..8 {
            pull(&store, number, Some(&base), u64::from(number) * LATER).unwrap();
            let usage = store.usage();
            assert!(usage.blob_bytes + usage.manifest_bytes <= 6000, "{usage:?}");
        }
        assert!(!is_listed(&store, 0));
        assert!(read_blob(&store, &digest(&layer(0))).is_none());
        assert!(
            store
                .manifest(&digest(&image_of(0, Some(&base))))
                .unwrap()
                .is_none()
        );
        let kept: Vec<u32> = (0..8).filter(|number| is_listed(&store, *number)).collect();
        assert!(kept.len() >= 2 && kept.ends_with(&[6, 7]), "{kept:?}");
        for number in &kept {
            assert!(is_complete(&store, *number, Some(&base)), "{number} of {kept:?}");
        }
        let evicted = store.evictions();
        assert!(evicted.tags >= 2 && evicted.for_size >= 2 * evicted.tags && evicted.for_free == 0);
        assert!(evicted.bytes >= 2000, "{evicted:?}");
    });
}

#[test]
fn evict_keeps_used_image_over_newer_unused_one() {
    on_every_fs(|fixture| {
        let store = fixture.open_with_limit(4200, at(0));
        pull(&store, 0, None, 0).unwrap();
        pull(&store, 1, None, LATER).unwrap();
        store.touch(ContentId::Manifest(digest(&image_of(0, None))), at(2 * LATER));
        pull(&store, 2, None, 4 * LATER).unwrap();
        pull(&store, 3, None, 5 * LATER).unwrap();
        assert!(is_complete(&store, 0, None) && !is_listed(&store, 1));
    });
}

#[test]
fn access_times_survive_restart() {
    on_every_fs(|fixture| {
        {
            let store = fixture.open_with_limit(4200, at(0));
            for number in 0..2 {
                pull(&store, number, None, LATER * u64::from(number)).unwrap();
            }
            for used in [
                ContentId::Manifest(digest(&image_of(0, None))),
                ContentId::Blob(digest(&layer(0))),
            ] {
                store.touch(used, at(2 * LATER));
            }
            store.close();
        }
        let store = fixture.open_with_limit(4200, at(4 * LATER));
        pull(&store, 2, None, 4 * LATER).unwrap();
        pull(&store, 3, None, 5 * LATER).unwrap();
        assert!(is_complete(&store, 0, None) && !is_listed(&store, 1));
    });
}

#[test]
fn evict_keeps_recent_image_and_reports_quota_error() {
    on_every_fs(|fixture| {
        let store = fixture.open_with_limit(3000, at(0));
        pull(&store, 0, None, 0).unwrap();
        pull(&store, 1, None, 1800).unwrap();
        let refused = pull(&store, 2, None, 3500).unwrap_err();
        assert!(matches!(
            refused,
            StoreError::OverQuota {
                bytes: 1000,
                limit: "size"
            }
        ));
        assert!(refused.to_string().contains("raise `store.size`"), "{refused}");
        assert!(is_complete(&store, 0, None) && is_complete(&store, 1, None));
        assert_eq!((store.evictions().tags, store.evictions().refused), (0, 1));
        // One hour after its last use, and just after the last snapshot.
        pull(&store, 2, None, 3700).unwrap();
        assert!(!is_listed(&store, 0));
    });
}

#[test]
fn blob_larger_than_the_quota_evicts_nothing() {
    on_every_fs(|fixture| {
        let store = fixture.open_with_limit(3000, at(0));
        pull(&store, 0, None, 0).unwrap();
        store.tick(at(LATER));
        assert!(matches!(
            put_blob(&store, &[1; 3001]),
            Err(StoreError::OverQuota { bytes: 3001, .. })
        ));
        assert!(is_complete(&store, 0, None));
    });
}

#[test]
fn evict_keeps_pinned_image_after_restart() {
    on_every_fs(|fixture| {
        let pins = [Pin::Tag(key("0")), Pin::Digest(digest(&image_of(1, None)))];
        {
            let store = fixture.open_with_limit(5500, at(0));
            for pin in &pins {
                assert!(store.pin(pin).unwrap());
                assert!(!store.pin(pin).unwrap());
            }
            for number in 0..2 {
                pull(&store, number, None, 0).unwrap();
            }
            store.close();
        }
        let store = fixture.open_with_limit(5500, at(LATER));
        assert_eq!(store.pins(), pins);
        for number in 2..6 {
            pull(&store, number, None, LATER * u64::from(number)).unwrap();
        }
        assert!(is_complete(&store, 0, None));
        assert!(
            read_blob(&store, &digest(&layer(1))).is_some(),
            "its digest is pinned"
        );
        for pin in &pins {
            assert!(store.unpin(pin).unwrap());
            assert!(!store.unpin(pin).unwrap());
        }
        assert_eq!(fixture.files("pins"), Vec::<PathBuf>::new());
        for number in 6..10 {
            pull(&store, number, None, LATER * u64::from(number)).unwrap();
        }
        assert!(!is_listed(&store, 0) && read_blob(&store, &digest(&layer(1))).is_none());
    });
}

#[test]
fn evict_keeps_blob_with_open_reader() {
    on_every_fs(|fixture| {
        let store = fixture.open_with_limit(3000, at(0));
        pull(&store, 0, None, 0).unwrap();
        let reading = store.blob(&digest(&layer(0))).unwrap().unwrap();
        pull(&store, 1, None, LATER).unwrap();
        pull(&store, 2, None, LATER + 1000).unwrap_err();
        assert!(read_blob(&store, &digest(&layer(0))).is_some());
        drop(reading);
        pull(&store, 2, None, 3 * LATER).unwrap();
        assert!(read_blob(&store, &digest(&layer(0))).is_none());
    });
}

#[test]
fn evict_relieves_disk_filled_by_other_programs() {
    let memory = Arc::new(MemoryFs::new());
    let fixture = Fixture {
        fs: Arc::clone(&memory) as Arc<dyn FileSystem>,
        folder: None,
    };
    let store = fixture.open_with_limit(u64::MAX, at(0));
    pull(&store, 0, None, 0).unwrap();
    pull(&store, 1, None, LATER).unwrap();
    memory.set_bytes_max(u64::MAX - fixture.fs.free_bytes().unwrap() + 800);
    pull(&store, 2, None, 3 * LATER).unwrap();
    assert!(!is_listed(&store, 0));
    assert!(store.evictions().for_free > 0 && store.evictions().for_size == 0);
    store.set_limits(Limits {
        bytes_max: u64::MAX,
        free_bytes_min: 1000,
    });
    for _ in 0..10_000 {
        if store.free_bytes().unwrap() >= 1000 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("`free` is not kept");
}

#[test]
fn evict_removes_untagged_content_in_lru_order() {
    on_every_fs(|fixture| {
        let store = fixture.open_with_limit(4500, at(0));
        let untagged = image_of(7, None);
        put_manifest(&store, &untagged, "library/alpine").unwrap();
        put_blob(&store, &layer(7)).unwrap();
        put_blob(&store, &[3; 1000]).unwrap();
        pull(&store, 0, None, LATER).unwrap();
        for number in 1..4 {
            pull(&store, number, None, u64::from(number + 1) * LATER).unwrap();
        }
        assert!(store.manifest(&digest(&untagged)).unwrap().is_none());
        assert!(read_blob(&store, &digest(&layer(7))).is_none());
        assert!(read_blob(&store, &digest(&[3; 1000])).is_none());
    });
}

#[test]
fn evicted_manifest_is_stored_again() {
    on_every_fs(|fixture| {
        let bytes = image_of(1, None);
        {
            let store = fixture.open();
            put_manifest(&store, &bytes, "library/alpine").unwrap();
            // As a client does that read it just before the removal.
            let path = content_path("manifests", &digest(&bytes));
            fixture.fs.remove(&path).unwrap();
            assert!(store.manifest(&digest(&bytes)).unwrap().is_some(), "from memory");
            put_manifest(&store, &bytes, "library/alpine").unwrap();
        }
        assert!(fixture.open().manifest(&digest(&bytes)).unwrap().is_some());
    });
}

#[test]
fn unknown_size_ingest_stays_within_the_size_limit() {
    const MIB: u64 = 1024 * 1024;
    let fixture = Fixture::memory();
    let store = fixture.open_with_limit(20 * MIB, at(0));
    let digest = digest(b"whatever comes");
    let mut one = store.begin(&digest, None).unwrap();
    one.ensure_reserved(MIB).unwrap();
    let mut other = store.begin(&digest, None).unwrap();
    other.ensure_reserved(9 * MIB).unwrap();
    // Both reserved more than they needed, but never more than the disk has.
    one.ensure_reserved(11 * MIB).unwrap();
    let refused = other.ensure_reserved(10 * MIB).unwrap_err();
    assert!(
        matches!(refused, StoreError::OverQuota { limit: "size", .. }),
        "{refused}"
    );
    assert!(
        store.begin(&digest, Some(MIB)).is_err(),
        "what is set aside is taken"
    );
    drop(one);
    other.ensure_reserved(20 * MIB).unwrap();
    let refused = other.ensure_reserved(20 * MIB + 1).unwrap_err();
    assert!(matches!(refused, StoreError::OverQuota { .. }), "{refused}");
    drop(other);
    store.begin(&digest, Some(20 * MIB)).unwrap();
}

#[test]
fn unknown_size_ingest_keeps_the_minimum_free_space() {
    let disk = Arc::new(MemoryFs::new());
    let limits = Limits {
        bytes_max: u64::MAX,
        free_bytes_min: 40_000,
    };
    let settings = Settings {
        limits,
        ..Settings::default()
    };
    let store = Store::open(&settings, Arc::clone(&disk) as Arc<dyn FileSystem>, at(0)).unwrap();
    let before = disk.free_bytes().unwrap();
    disk.set_bytes_max(u64::MAX - before + 100_000);
    let mut ingest = store.begin(&digest(b"whatever comes"), None).unwrap();
    let mut written = 0;
    let refused = loop {
        match ingest.ensure_reserved(written + 1000) {
            Ok(()) => ingest.file().write_at(&[1; 1000], written).unwrap(),
            Err(refused) => break refused,
        }
        written += 1000;
    };
    assert!(
        matches!(refused, StoreError::OverQuota { limit: "free", .. }),
        "{refused}"
    );
    assert!(disk.free_bytes().unwrap() >= 40_000, "{written}");
    assert!(written > 30_000, "{written}");
}
