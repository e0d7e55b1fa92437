//! Room is made by letting go of what was used least, image by image.

use super::*;
use crate::store::access_times::ContentId;
use crate::store::pins::Pin;

const LAYER_BYTES: usize = 1000;
/// Long after the files were written, and two hours apart.
const LATER: u64 = 2 * 3600;

fn layer(number: u32) -> Vec<u8> {
    let mut bytes = number.to_be_bytes().repeat(LAYER_BYTES / 4);
    bytes.truncate(LAYER_BYTES);
    bytes
}

/// A manifest of one layer, and perhaps one that others have too.
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

/// Pulls an image as the road does: the manifest, the tag, the layers, and a use of each.
fn pull(store: &Store, number: u32, base: Option<&[u8]>, seconds: u64) -> Result<(), StoreError> {
    let bytes = image_of(number, base);
    store.tick(at(seconds));
    put_manifest(store, &bytes, "library/alpine")?;
    store.put_tag(&key(&number.to_string()), variant(1, &bytes, seconds))?;
    store.touch(ContentId::Manifest(digest(&bytes)), at(seconds));
    for blob in [Some(&layer(number)[..]), base].into_iter().flatten() {
        keep_blob(store, blob)?;
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
fn the_size_holds_and_the_least_recently_used_image_goes_whole() {
    everywhere(|ground| {
        let store = ground.open_with_room(6000, at(0));
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
fn an_image_that_is_used_outlives_a_younger_one_that_is_not() {
    everywhere(|ground| {
        let store = ground.open_with_room(4200, at(0));
        pull(&store, 0, None, 0).unwrap();
        pull(&store, 1, None, LATER).unwrap();
        store.touch(ContentId::Manifest(digest(&image_of(0, None))), at(2 * LATER));
        pull(&store, 2, None, 4 * LATER).unwrap();
        pull(&store, 3, None, 5 * LATER).unwrap();
        assert!(is_complete(&store, 0, None) && !is_listed(&store, 1));
    });
}

#[test]
fn uses_written_down_count_after_a_restart() {
    everywhere(|ground| {
        {
            let store = ground.open_with_room(4200, at(0));
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
        let store = ground.open_with_room(4200, at(4 * LATER));
        pull(&store, 2, None, 4 * LATER).unwrap();
        pull(&store, 3, None, 5 * LATER).unwrap();
        assert!(is_complete(&store, 0, None) && !is_listed(&store, 1));
    });
}

#[test]
fn what_was_used_within_the_hour_stays_and_what_finds_no_room_is_told_why() {
    everywhere(|ground| {
        let store = ground.open_with_room(3000, at(0));
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
        // An hour after its last use, and a moment after the last look.
        pull(&store, 2, None, 3700).unwrap();
        assert!(!is_listed(&store, 0));
    });
}

#[test]
fn a_blob_larger_than_the_store_evicts_nothing() {
    everywhere(|ground| {
        let store = ground.open_with_room(3000, at(0));
        pull(&store, 0, None, 0).unwrap();
        store.tick(at(LATER));
        assert!(matches!(
            keep_blob(&store, &[1; 3001]),
            Err(StoreError::OverQuota { bytes: 3001, .. })
        ));
        assert!(is_complete(&store, 0, None));
    });
}

#[test]
fn a_pinned_image_stays_also_after_a_restart_until_it_is_unpinned() {
    everywhere(|ground| {
        let pins = [Pin::Tag(key("0")), Pin::Digest(digest(&image_of(1, None)))];
        {
            let store = ground.open_with_room(5500, at(0));
            for pin in &pins {
                assert!(store.pin(pin).unwrap());
                assert!(!store.pin(pin).unwrap());
            }
            for number in 0..2 {
                pull(&store, number, None, 0).unwrap();
            }
            store.close();
        }
        let store = ground.open_with_room(5500, at(LATER));
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
        assert_eq!(ground.files("pins"), Vec::<PathBuf>::new());
        for number in 6..10 {
            pull(&store, number, None, LATER * u64::from(number)).unwrap();
        }
        assert!(!is_listed(&store, 0) && read_blob(&store, &digest(&layer(1))).is_none());
    });
}

#[test]
fn what_is_being_read_is_not_evicted() {
    everywhere(|ground| {
        let store = ground.open_with_room(3000, at(0));
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
fn a_disk_that_others_fill_is_relieved_too() {
    let memory = Arc::new(MemoryFs::new());
    let ground = Ground {
        fs: Arc::clone(&memory) as Arc<dyn FileSystem>,
        folder: None,
    };
    let store = ground.open_with_room(u64::MAX, at(0));
    pull(&store, 0, None, 0).unwrap();
    pull(&store, 1, None, LATER).unwrap();
    memory.set_bytes_max(u64::MAX - ground.fs.free_bytes().unwrap() + 800);
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
fn what_was_pulled_by_digest_and_what_nothing_names_go_in_their_turn() {
    everywhere(|ground| {
        let store = ground.open_with_room(4500, at(0));
        let untagged = image_of(7, None);
        put_manifest(&store, &untagged, "library/alpine").unwrap();
        keep_blob(&store, &layer(7)).unwrap();
        keep_blob(&store, &[3; 1000]).unwrap();
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
fn a_manifest_evicted_and_kept_again_is_on_the_disk_again() {
    everywhere(|ground| {
        let bytes = image_of(1, None);
        {
            let store = ground.open();
            put_manifest(&store, &bytes, "library/alpine").unwrap();
            // As one does who read it just before it went.
            let path = content_path("manifests", &digest(&bytes));
            ground.fs.remove(&path).unwrap();
            assert!(store.manifest(&digest(&bytes)).unwrap().is_some(), "from memory");
            put_manifest(&store, &bytes, "library/alpine").unwrap();
        }
        assert!(ground.open().manifest(&digest(&bytes)).unwrap().is_some());
    });
}

#[test]
fn a_blob_of_unknown_size_takes_only_the_room_there_is() {
    const MIB: u64 = 1024 * 1024;
    let ground = Ground::memory();
    let store = ground.open_with_room(20 * MIB, at(0));
    let digest = digest(b"whatever comes");
    let mut one = store.begin(&digest, None).unwrap();
    one.ensure_reserved(MIB).unwrap();
    let mut other = store.begin(&digest, None).unwrap();
    other.ensure_reserved(9 * MIB).unwrap();
    // Both were given more than they asked for, and yet never more than there is.
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
fn a_blob_of_unknown_size_leaves_free_what_is_to_be_left() {
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
