#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]
use super::super::access_times::ContentId;
use super::super::tests::power_cut::CutVolume;
use super::super::tests::{Ground, UPSTREAM, at, digest, keep_blob, key, manifest, put_manifest, variant};
use super::*;
use crate::store::{Settings, Store};

/// An image that is old enough to go, and what a round would do about it.
fn about_to_go(store: &Store) -> Plan {
    keep_blob(store, &1_u32.to_be_bytes()).unwrap();
    put_manifest(store, &manifest(1), "library/alpine").unwrap();
    store.put_tag(&key("1"), variant(1, &manifest(1), 0)).unwrap();
    store.tick(at(7200));
    store.evictor.access_times.start_tracking();
    let plan = plan(&store.evictor.snapshot(), u64::MAX, at(3600));
    assert_eq!(plan.steps.len(), 3, "a tag, a manifest and a blob");
    plan
}

fn carries_out(store: &Store, plan: Plan) -> bool {
    store
        .evictor
        .execute(plan, Some(QuotaKind::Size))
        .unwrap()
        .is_complete
}

fn is_complete(store: &Store) -> bool {
    store.tag(&key("1")).unwrap().is_some()
        && store.manifest(&digest(&manifest(1))).unwrap().is_some()
        && store.blob(&digest(&1_u32.to_be_bytes())).unwrap().is_some()
}

/// Whatever makes it needed between the look and the removal leaves it whole.
fn stays_whole_if(what: &str, happens: impl Fn(&Store)) {
    for ground in [Ground::directory(), Ground::memory()] {
        let store = ground.open();
        let plan = about_to_go(&store);
        happens(&store);
        assert!(!carries_out(&store, plan), "{what}");
        assert!(is_complete(&store), "{what}");
    }
}

#[test]
fn an_image_used_between_the_look_and_the_removal_stays() {
    stays_whole_if("used", |store| {
        store.touch(ContentId::Manifest(digest(&manifest(1))), at(7200));
    });
}

#[test]
fn an_image_fetched_again_between_the_look_and_the_removal_stays() {
    stays_whole_if("kept again", |store| {
        put_manifest(store, &manifest(1), "library/alpine").unwrap();
    });
}

#[test]
fn a_tag_that_moves_or_is_pinned_between_the_look_and_the_removal_stays() {
    stays_whole_if("moved", |store| {
        store.put_tag(&key("1"), variant(1, b"another", 7200)).unwrap();
    });
    stays_whole_if("pinned", |store| {
        store.pin(&Pin::Tag(key("1"))).unwrap();
    });
    stays_whole_if("pinned by its digest", |store| {
        store.pin(&Pin::Digest(digest(&manifest(1)))).unwrap();
    });
}

#[test]
fn a_layer_that_a_new_manifest_needs_stays_though_its_old_image_goes() {
    let ground = Ground::directory();
    let store = ground.open();
    let plan = about_to_go(&store);
    let layer = digest(&1_u32.to_be_bytes());
    let newer = format!(r#"{{"schemaVersion":2,"layers":[{{"digest":"{layer}","size":4}}]}}"#);
    put_manifest(&store, &newer.into_bytes().into(), "library/alpine").unwrap();
    assert!(!carries_out(&store, plan));
    assert!(store.blob(&layer).unwrap().is_some());
    assert!(store.tag(&key("1")).unwrap().is_none());
}

/// A store in which `write` is about to name a file in `tree` while an eviction looks; then `write` ends, and what was
/// planned is carried out. Says whether all of it was.
fn evict_looks_during(
    tree: &'static str,
    held: impl Fn(&Store),
    write: impl Fn(&Store) + Sync,
) -> (Store, bool) {
    let fs = Arc::new(CutVolume::new(usize::MAX));
    let store = Store::open(&Settings::default(), Arc::clone(&fs) as _, at(0)).unwrap();
    held(&store);
    store.tick(at(7200));
    let gate = fs.gate(tree);
    let plan = std::thread::scope(|scope| {
        scope.spawn(|| write(&store));
        gate.wait();
        store.evictor.access_times.start_tracking();
        let plan = plan(&store.evictor.snapshot(), u64::MAX, at(3600));
        gate.wait();
        plan
    });
    assert_eq!(plan.steps.len(), 1);
    let is_complete = carries_out(&store, plan);
    (store, is_complete)
}

#[test]
fn layer_of_a_manifest_written_after_the_look_stays() {
    let layer = 1_u32.to_be_bytes();
    let (store, is_complete) = evict_looks_during(
        "manifests",
        |store| keep_blob(store, &layer).unwrap(),
        |store| {
            put_manifest(store, &manifest(1), "library/alpine").unwrap();
        },
    );
    assert!(!is_complete);
    assert!(store.blob(&digest(&layer)).unwrap().is_some());
}

#[test]
fn manifest_of_a_tag_written_after_the_look_stays() {
    let (store, is_complete) = evict_looks_during(
        "refs",
        |store| {
            put_manifest(store, &manifest(1), "library/alpine").unwrap();
        },
        |store| store.put_tag(&key("1"), variant(1, &manifest(1), 0)).unwrap(),
    );
    assert!(!is_complete);
    assert!(store.manifest(&digest(&manifest(1))).unwrap().is_some());
}

#[test]
fn power_cut_after_an_eviction_brings_back_no_tag() {
    let fs = Arc::new(CutVolume::new(usize::MAX));
    let store = Store::open(&Settings::default(), Arc::clone(&fs) as _, at(0)).unwrap();
    put_manifest(&store, &manifest(1), "library/alpine").unwrap();
    let tags = ["1", "2", "3", "4"].map(key);
    for tag in &tags {
        store.put_tag(tag, variant(1, &manifest(1), 0)).unwrap();
    }
    store.tick(at(7200));
    store.evictor.access_times.start_tracking();
    let mut plan = plan(&store.evictor.snapshot(), u64::MAX, at(3600));
    // The round is stopped before the manifest goes.
    plan.steps.retain(|step| matches!(step, Step::Tag(..)));
    assert!(carries_out(&store, plan));
    for chance in 0..8 {
        let store = Store::open(
            &Settings::default(),
            Arc::new(fs.after_by_chance(chance)),
            at(7200),
        )
        .unwrap();
        assert!(tags.iter().all(|tag| store.tag(tag).unwrap().is_none()));
    }
}

#[test]
fn undisturbed_it_goes_whole() {
    for ground in [Ground::directory(), Ground::memory()] {
        let store = ground.open();
        let plan = about_to_go(&store);
        assert!(carries_out(&store, plan));
        assert!(store.tag(&key("1")).unwrap().is_none());
        assert_eq!(
            ground.files("blobs").len() + ground.files("manifests").len() + ground.files("refs").len(),
            0
        );
        assert!(
            store
                .tags(None, 10)
                .iter()
                .all(|(key, _)| *key.upstream != *UPSTREAM)
        );
        assert_eq!(store.evictions().tags, 1);
        assert_eq!(store.evictions().for_size, 2);
    }
}

#[test]
fn t08_pin_waits_for_an_eviction_that_found_no_pin() {
    let ground = Ground::memory();
    let store = ground.open();
    let (pinned, is_pinned) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let evicting = store.pins.evicting();
        scope.spawn(|| {
            store.pin(&Pin::Tag(key("1"))).unwrap();
            pinned.send(()).unwrap();
        });
        assert!(is_pinned.recv_timeout(Duration::from_millis(50)).is_err());
        drop(evicting);
        is_pinned.recv().unwrap();
    });
}
