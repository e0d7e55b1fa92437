#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
use super::super::tests::{Ground, at, digest, keep_blob, manifest, put_manifest};
use super::*;

const RATE: u64 = u64::MAX;

#[test]
fn what_the_disk_changed_is_set_aside_before_anyone_asks() {
    for ground in [Ground::directory(), Ground::memory()] {
        let store = ground.open();
        let large = vec![7; 600_000];
        for blob in [&large[..], b"small"] {
            keep_blob(&store, blob).unwrap();
        }
        put_manifest(&store, &manifest(1), "library/alpine").unwrap();
        let damaged = content_path(blobs::TREE, &digest(&large));
        ground.overwrite(&damaged, &[&large[1..], b"!"].concat());
        // Without waking the thread: this one reads.
        store.scrub.rate.store(RATE, Ordering::Relaxed);
        store.scrub.round();
        let ScrubTotals {
            objects,
            bytes,
            damaged,
        } = store.scrubbed();
        assert_eq!((objects, damaged), (3, 1));
        assert_eq!(bytes, 600_005 + manifest(1).len() as u64);
        assert_eq!(ground.files("quarantine").len(), 1);
        assert!(store.blob(&digest(&large)).unwrap().is_none());
        assert!(store.blob(&digest(b"small")).unwrap().is_some());
        assert!(!store.scrub.is_due(), "not again for a week");
        store.tick(at(8 * 24 * 3600));
        assert!(store.scrub.is_due());
    }
}

#[test]
fn a_restart_goes_on_where_it_was() {
    for ground in [Ground::directory(), Ground::memory()] {
        let mut names: Vec<String> = Vec::new();
        {
            let store = ground.open();
            for number in 0..20_u32 {
                keep_blob(&store, &number.to_be_bytes()).unwrap();
                names.push(format!("blobs/{}", digest(&number.to_be_bytes())));
            }
            names.sort();
            let after = names.get(14).unwrap().clone();
            let progress = Progress {
                after,
                ended_at_ms: None,
            };
            store.scrub.write_progress(&progress);
        }
        let store = ground.open();
        assert!(store.scrub.is_due());
        // Without waking the thread: this one reads.
        store.scrub.rate.store(RATE, Ordering::Relaxed);
        store.scrub.round();
        assert_eq!(store.scrubbed().objects, 5);
    }
}

#[test]
fn switched_off_it_reads_nothing() {
    let ground = Ground::memory();
    let store = ground.open();
    keep_blob(&store, b"layer").unwrap();
    store.scrub.round();
    assert_eq!(store.scrubbed(), ScrubTotals::default());
}
