//! What the operator has the store do: verify, let go of what is unused, make the index anew.

use super::*;
use crate::store::access_times::ContentId;
use crate::store::pins::Pin;
use crate::store::verify::Verification;

const LONG: Duration = Duration::from_secs(7 * 24 * 3600);

fn verified_whole(store: &Store) -> Verification {
    assert!(store.begin_verification().unwrap());
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
fn a_verification_reads_everything_and_sets_aside_what_is_damaged() {
    everywhere(|ground| {
        let store = ground.open();
        assert_eq!(store.verification(), None);
        for number in 0_u32..5 {
            keep_blob(&store, &number.to_be_bytes()).unwrap();
            put_manifest(&store, &manifest(number), "library/alpine").unwrap();
        }
        let verification = verified_whole(&store);
        assert_eq!((verification.objects, verification.damaged), (10, 0));
        ground.overwrite(&ground.files("blobs")[2], b"????");
        let verification = verified_whole(&store);
        assert_eq!((verification.objects, verification.damaged), (10, 1));
        let damaged = verification.damaged_digests[0];
        assert!(store.blob(&damaged).unwrap().is_none(), "it is a miss");
        assert_eq!(verified_whole(&store).objects, 9);
    });
}

/// A tagged image, one that nobody tagged, and a signature of the first.
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
        keep_blob(store, &number.to_be_bytes()).unwrap();
    }
    store.put_tag(&key("3"), variant(1, &tagged, 1)).unwrap();
    (tagged, untagged, signature)
}

/// So long after everything was kept.
fn later(ground: &Ground, seconds: u64) -> Store {
    for tree in ["blobs", "manifests"] {
        for path in ground.files(tree) {
            ground.fs.set_modified(&path, at(0)).unwrap();
        }
    }
    Store::open(&Settings::default(), Arc::clone(&ground.fs), at(seconds)).unwrap()
}

#[test]
fn what_no_tag_leads_to_goes_after_a_trial_that_removes_nothing() {
    everywhere(|ground| {
        let (tagged, untagged, signature) = some_of_each(&ground.open());
        let store = later(ground, 8 * 24 * 3600);
        let trial = store.collect(LONG, true).unwrap();
        assert_eq!((trial.tags, trial.manifests, trial.blobs), (0, 1, 1));
        assert!(store.manifest(&digest(&untagged)).unwrap().is_some());
        assert_eq!(store.collect(LONG, false).unwrap(), trial);
        assert!(store.manifest(&digest(&untagged)).unwrap().is_none());
        assert_eq!(ground.files("blobs").len(), 2);
        for kept in [&tagged, &signature] {
            assert!(store.manifest(&digest(kept)).unwrap().is_some());
        }
        assert_eq!(store.collect(LONG, false).unwrap().bytes, 0);
    });
}

#[test]
fn what_is_pinned_or_was_used_lately_stays() {
    everywhere(|ground| {
        let (_, untagged, _) = some_of_each(&ground.open());
        let store = later(ground, 3 * 24 * 3600);
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
fn an_index_made_anew_has_every_tag_again_and_forgets_the_grants() {
    let ground = Ground::directory();
    let store = ground.open();
    some_of_each(&store);
    store.put_grant(UPSTREAM, &repository("acme/secret"), &[1; 32], at(7));
    counted_usage(&store);
    store.rebuild_index();
    store.index.flush();
    assert_eq!(store.tags(None, 10).len(), 1);
    drop(store);
    let store = ground.open();
    assert_eq!(store.grant(UPSTREAM, &repository("acme/secret"), &[1; 32]), None);
    assert_eq!(store.index_state(), IndexState::Ready);
    assert_eq!(store.tags(None, 10).len(), 1);
}
