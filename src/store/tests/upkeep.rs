//! Maintenance on request: verify, garbage collection, and index rebuild.

use super::*;
use crate::store::access_times::ContentId;
use crate::store::pins::Pin;
use crate::store::verify::Verification;

const LONG: Duration = Duration::from_secs(7 * 24 * 3600);

fn run_verify_job(store: &Store) -> Verification {
    assert!(store.start_verification().unwrap());
    for _ in 0..10_000 {
        let verification = store.verification().unwrap();
        if !verification.is_running {
            assert!(verification.is_complete);
            return verification;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the verification does not end");
}

#[test]
fn verify_job_reads_everything_and_quarantines_corruption() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        assert_eq!(store.verification(), None);
        for number in 0_u32..5 {
            put_blob(&store, &number.to_be_bytes()).unwrap();
            put_manifest(&store, &manifest(number), "library/alpine").unwrap();
        }
        let verification = run_verify_job(&store);
        assert_eq!((verification.objects, verification.damaged), (10, 0));
        fixture.overwrite(&fixture.files("blobs")[2], b"????");
        let verification = run_verify_job(&store);
        assert_eq!((verification.objects, verification.damaged), (10, 1));
        let damaged = verification.damaged_digests[0];
        assert!(store.blob(&damaged).unwrap().is_none(), "it is a miss");
        assert_eq!(run_verify_job(&store).objects, 9);
    });
}

/// Stores a tagged image, an untagged one, and a signature of the first.
fn some_of_each(store: &Store) -> (Bytes, Bytes, Bytes) {
    let (tagged, untagged) = (manifest(1), manifest(2));
    let about = String::from_utf8(manifest(3).to_vec()).unwrap();
    let subject = format!(
        r#","subject":{{"mediaType":"{IMAGE}","digest":"{}","size":1}}}}"#,
        digest(&tagged)
    );
    let signature = Bytes::from(about.strip_suffix('}').unwrap().to_owned() + &subject);
    for (bytes, number) in [(&tagged, 1_u32), (&untagged, 2), (&signature, 3)] {
        put_manifest(store, bytes, "library/alpine").unwrap();
        put_blob(store, &number.to_be_bytes()).unwrap();
    }
    store.put_tag(&key("3"), variant(1, &tagged, 1)).unwrap();
    (tagged, untagged, signature)
}

/// Time between storing the images and the collection.
fn later(fixture: &Fixture, seconds: u64) -> Store {
    for tree in ["blobs", "manifests"] {
        for path in fixture.files(tree) {
            fixture.fs.set_modified(&path, at(0)).unwrap();
        }
    }
    Store::open(&Settings::default(), Arc::clone(&fixture.fs), at(seconds)).unwrap()
}

#[test]
fn gc_removes_untagged_content_after_a_dry_run() {
    on_every_fs(|fixture| {
        let (tagged, untagged, signature) = some_of_each(&fixture.open());
        let store = later(fixture, 8 * 24 * 3600);
        let trial = store.collect(LONG, true).unwrap();
        assert_eq!((trial.tags, trial.manifests, trial.blobs), (0, 1, 1));
        assert!(store.manifest(&digest(&untagged)).unwrap().is_some());
        assert_eq!(store.collect(LONG, false).unwrap(), trial);
        assert!(store.manifest(&digest(&untagged)).unwrap().is_none());
        assert_eq!(fixture.files("blobs").len(), 2);
        for kept in [&tagged, &signature] {
            assert!(store.manifest(&digest(kept)).unwrap().is_some());
        }
        assert_eq!(store.collect(LONG, false).unwrap().bytes, 0);
    });
}

#[test]
fn gc_keeps_pinned_and_recent_content() {
    on_every_fs(|fixture| {
        let (_, untagged, _) = some_of_each(&fixture.open());
        let store = later(fixture, 3 * 24 * 3600);
        assert_eq!(store.collect(LONG, false).unwrap().bytes, 0, "too young");
        store.touch(ContentId::Manifest(digest(&untagged)), at(8 * 24 * 3600));
        store.tick(at(9 * 24 * 3600));
        assert_eq!(store.collect(LONG, false).unwrap().manifests, 0, "used since");
        store.tick(at(20 * 24 * 3600));
        store.pin(&Pin::Digest(digest(&untagged))).unwrap();
        assert_eq!(store.collect(LONG, false).unwrap().bytes, 0, "pinned");
        store.unpin(&Pin::Digest(digest(&untagged))).unwrap();
        assert_eq!(store.collect(Duration::ZERO, false).unwrap().manifests, 1);
    });
}

#[test]
fn rebuilt_index_has_all_tags_and_no_grants() {
    let fixture = Fixture::directory();
    let store = fixture.open();
    some_of_each(&store);
    store.put_grant(UPSTREAM, &repository("acme/secret"), &[1; 32], at(7));
    counted_usage(&store);
    store.rebuild_index();
    store.index.flush();
    assert_eq!(store.tags(None, 10).len(), 1);
    drop(store);
    let store = fixture.open();
    assert_eq!(store.grant(UPSTREAM, &repository("acme/secret"), &[1; 32]), None);
    assert_eq!(store.index_state(), IndexState::Ready);
    assert_eq!(store.tags(None, 10).len(), 1);
}
