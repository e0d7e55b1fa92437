#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
use super::super::tests::{Fixture, at, digest, manifest, put_blob, put_manifest};
use super::*;

const RATE: u64 = u64::MAX;

#[test]
fn scrub_quarantines_corrupt_content() {
    for fixture in [Fixture::directory(), Fixture::memory()] {
        let store = fixture.open();
        let large = vec![7; 600_000];
        for blob in [&large[..], b"small"] {
            put_blob(&store, blob).unwrap();
        }
        put_manifest(&store, &manifest(1), "library/alpine").unwrap();
        let damaged = content_path(blobs::TREE, &digest(&large));
        fixture.overwrite(&damaged, &[&large[1..], b"!"].concat());
        // Sets the rate without waking the thread, so that this test reads.
        store.scrub.rate.store(RATE, Ordering::Relaxed);
        store.scrub.round();
        let ScrubTotals {
            objects,
            bytes,
            damaged,
        } = store.scrubbed();
        assert_eq!((objects, damaged), (3, 1));
        assert_eq!(bytes, 600_005 + manifest(1).len() as u64);
        assert_eq!(fixture.files("quarantine").len(), 1);
        assert!(store.blob(&digest(&large)).unwrap().is_none());
        assert!(store.blob(&digest(b"small")).unwrap().is_some());
        assert!(!store.scrub.is_due(), "not again for a week");
        store.tick(at(8 * 24 * 3600));
        assert!(store.scrub.is_due());
    }
}

#[test]
fn scrub_resumes_after_restart() {
    for fixture in [Fixture::directory(), Fixture::memory()] {
        let mut names: Vec<String> = Vec::new();
        {
            let store = fixture.open();
            for number in 0..20_u32 {
                put_blob(&store, &number.to_be_bytes()).unwrap();
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
        let store = fixture.open();
        assert!(store.scrub.is_due());
        // Sets the rate without waking the thread, so that this test reads.
        store.scrub.rate.store(RATE, Ordering::Relaxed);
        store.scrub.round();
        assert_eq!(store.scrubbed().objects, 5);
    }
}

#[test]
fn scrub_with_rate_zero_reads_nothing() {
    let fixture = Fixture::memory();
    let store = fixture.open();
    put_blob(&store, b"layer").unwrap();
    store.scrub.round();
    assert_eq!(store.scrubbed(), ScrubTotals::default());
}
