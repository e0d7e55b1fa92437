#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]
use super::super::access_times::ContentId;
use super::super::graph::Node;
use super::super::pins::Pin;
use super::super::tests::power_cut::PowerCutFs;
use super::super::tests::{
    Fixture, UPSTREAM, at, counted_usage, digest, key, manifest, put_blob, put_manifest, variant,
};
use super::plan::Plan;
use super::*;
use crate::store::usage_report::Reclaimed;
use crate::store::{Limits, Settings, Store, content_path};

/// Stores an image that is old enough to evict. Returns the plan of a round.
fn evictable_image(store: &Store) -> Plan {
    put_blob(store, &1_u32.to_be_bytes()).unwrap();
    put_manifest(store, &manifest(1), "library/alpine").unwrap();
    store.put_tag(&key("1"), variant(1, &manifest(1), 0)).unwrap();
    store.tick(at(7200));
    store.evictor.access_times.start_tracking();
    let plan = plan(store.evictor.snapshot().unwrap(), u64::MAX, at(3600));
    assert_eq!(plan.steps.len(), 3, "a tag, a manifest and a blob");
    plan
}

fn executes(store: &Store, plan: &Plan) -> bool {
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

/// Asserts that the image stays complete if `happens` makes it needed after the snapshot.
fn assert_kept_if(what: &str, happens: impl Fn(&Store)) {
    for fixture in [Fixture::directory(), Fixture::memory()] {
        let store = fixture.open();
        let plan = evictable_image(&store);
        happens(&store);
        assert!(!executes(&store, &plan), "{what}");
        assert!(is_complete(&store), "{what}");
    }
}

#[test]
fn evict_keeps_image_used_since_the_snapshot() {
    assert_kept_if("used", |store| {
        store.touch(ContentId::Manifest(digest(&manifest(1))), at(7200));
    });
}

#[test]
fn evict_keeps_image_fetched_since_the_snapshot() {
    assert_kept_if("kept again", |store| {
        put_manifest(store, &manifest(1), "library/alpine").unwrap();
    });
}

#[test]
fn evict_keeps_tag_moved_or_pinned_since_the_snapshot() {
    assert_kept_if("moved", |store| {
        store.put_tag(&key("1"), variant(1, b"another", 7200)).unwrap();
    });
    assert_kept_if("pinned", |store| {
        store.pin(&Pin::Tag(key("1"))).unwrap();
    });
    assert_kept_if("pinned by its digest", |store| {
        store.pin(&Pin::Digest(digest(&manifest(1)))).unwrap();
    });
}

#[test]
fn evict_keeps_layer_referenced_by_a_new_manifest() {
    let fixture = Fixture::directory();
    let store = fixture.open();
    let plan = evictable_image(&store);
    let layer = digest(&1_u32.to_be_bytes());
    let newer = format!(r#"{{"schemaVersion":2,"layers":[{{"digest":"{layer}","size":4}}]}}"#);
    put_manifest(&store, &newer.into_bytes().into(), "library/alpine").unwrap();
    assert!(!executes(&store, &plan));
    assert!(store.blob(&layer).unwrap().is_some());
    assert!(store.tag(&key("1")).unwrap().is_none());
}

/// Starts `write`, which is about to rename a file into `tree` while an eviction takes its snapshot. Then `write`
/// completes and the plan is executed. Returns whether all of the plan was executed.
fn evict_during_write(
    tree: &'static str,
    stored: impl Fn(&Store),
    write: impl Fn(&Store) + Sync,
) -> (Store, bool) {
    let fs = Arc::new(PowerCutFs::new(usize::MAX));
    let store = Store::open(&Settings::default(), Arc::clone(&fs) as _, at(0)).unwrap();
    stored(&store);
    store.tick(at(7200));
    let gate = fs.gate(tree);
    let plan = std::thread::scope(|scope| {
        scope.spawn(|| write(&store));
        gate.wait();
        store.evictor.access_times.start_tracking();
        let plan = plan(store.evictor.snapshot().unwrap(), u64::MAX, at(3600));
        gate.wait();
        plan
    });
    assert_eq!(plan.steps.len(), 1);
    let is_complete = executes(&store, &plan);
    (store, is_complete)
}

#[test]
fn evict_keeps_layer_of_manifest_stored_since_the_snapshot() {
    let layer = 1_u32.to_be_bytes();
    let (store, is_complete) = evict_during_write(
        "manifests",
        |store| put_blob(store, &layer).unwrap(),
        |store| {
            put_manifest(store, &manifest(1), "library/alpine").unwrap();
        },
    );
    assert!(!is_complete);
    assert!(store.blob(&digest(&layer)).unwrap().is_some());
}

#[test]
fn evict_keeps_manifest_of_tag_stored_since_the_snapshot() {
    let (store, is_complete) = evict_during_write(
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
fn power_cut_after_eviction_restores_no_tag() {
    let fs = Arc::new(PowerCutFs::new(usize::MAX));
    let store = Store::open(&Settings::default(), Arc::clone(&fs) as _, at(0)).unwrap();
    put_manifest(&store, &manifest(1), "library/alpine").unwrap();
    let tags = ["1", "2", "3", "4"].map(key);
    for tag in &tags {
        store.put_tag(tag, variant(1, &manifest(1), 0)).unwrap();
    }
    store.tick(at(7200));
    store.evictor.access_times.start_tracking();
    let mut plan = plan(store.evictor.snapshot().unwrap(), u64::MAX, at(3600));
    // Stop the round before the manifest is removed.
    let mut steps = std::mem::take(&mut plan.steps);
    steps.retain(|id| matches!(plan.step(*id), Some((Node::Tag(_), _))));
    plan.steps = steps;
    assert!(executes(&store, &plan));
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
fn evict_removes_complete_image_without_conflict() {
    for fixture in [Fixture::directory(), Fixture::memory()] {
        let store = fixture.open();
        let plan = evictable_image(&store);
        assert!(executes(&store, &plan));
        assert!(store.tag(&key("1")).unwrap().is_none());
        assert_eq!(
            fixture.files("blobs").len() + fixture.files("manifests").len() + fixture.files("refs").len(),
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
fn evict_removes_nothing_if_a_manifest_is_unreadable() {
    let fixture = Fixture::directory();
    let store = fixture.open();
    let plan = evictable_image(&store);
    drop(plan);
    store.evictor.access_times.stop_tracking();
    // Opening it fails otherwise than for a file that is missing or damaged. Its layer seems unused without it.
    let path = content_path("manifests", &digest(&manifest(1)));
    let path = fixture.folder.as_ref().unwrap().path().join("data").join(path);
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&path, &path).unwrap();
    assert!(!store.evictor.relieve_full_disk(u64::MAX));
    assert!(store.tag(&key("1")).unwrap().is_some());
    assert!(store.blob(&digest(&1_u32.to_be_bytes())).unwrap().is_some());
    assert!(store.collect(Duration::ZERO, true).is_err());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, manifest(1)).unwrap();
    assert!(!store.evictor.relieve_full_disk(u64::MAX), "not so soon again");
    store.tick(at(7200) + NO_PROGRESS_PAUSE);
    store.evictor.relieve_full_disk(u64::MAX);
    assert!(store.tag(&key("1")).unwrap().is_none());
}

#[test]
fn evict_keeps_tag_with_damaged_file() {
    for fixture in [Fixture::directory(), Fixture::memory()] {
        let store = fixture.open();
        drop(evictable_image(&store));
        fixture.overwrite(&key("1").path(), b"damaged");
        let plan = plan(store.evictor.snapshot().unwrap(), u64::MAX, at(3600));
        assert_eq!(plan.reclaimed().tags, 0);
    }
}

#[test]
fn content_of_damaged_tag_is_referenced_by_the_index() {
    for fixture in [Fixture::directory(), Fixture::memory()] {
        let store = fixture.open();
        drop(evictable_image(&store));
        store.evictor.access_times.stop_tracking();
        assert!(store.tags.reindex(&AtomicBool::new(false)));
        fixture.overwrite(&key("1").path(), b"damaged");
        assert_eq!(store.collect(Duration::ZERO, true).unwrap(), Reclaimed::default());
    }
}

/// A folder that cannot be listed: a symbolic link to itself.
fn make_unlistable(fixture: &Fixture, path: &Path) {
    let path = fixture.folder.as_ref().unwrap().path().join("data").join(path);
    let _absent = std::fs::remove_dir_all(&path);
    std::os::unix::fs::symlink(&path, &path).unwrap();
}

#[test]
fn unlistable_folder_ends_eviction_if_it_may_hold_references() {
    let fixture = Fixture::directory();
    let store = fixture.open();
    drop(evictable_image(&store));
    store.evictor.access_times.stop_tracking();
    // Not the store's, and a shard of blobs, which refer to nothing.
    make_unlistable(&fixture, Path::new("blobs/sha256/loop"));
    make_unlistable(&fixture, Path::new("refs/loop"));
    let shard = content_path("blobs", &digest(b"of another image"));
    make_unlistable(&fixture, shard.parent().unwrap());
    assert_eq!(store.collect(Duration::ZERO, true).unwrap(), Reclaimed::default());
    let folder = key("1").path();
    make_unlistable(&fixture, folder.parent().unwrap());
    let fault = store.collect(Duration::ZERO, true).unwrap_err().to_string();
    assert!(
        fault.contains(folder.parent().unwrap().to_str().unwrap()),
        "{fault}"
    );
    assert!(!store.evictor.relieve_full_disk(u64::MAX));
    assert!(store.evictor.is_short(), "an operator sees it");
    assert!(store.blob(&digest(&1_u32.to_be_bytes())).unwrap().is_some());
}

#[test]
fn store_manifest_waits_for_a_removal_of_its_layer() {
    let fixture = Fixture::memory();
    let store = fixture.open();
    let (written, is_written) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let removing = store.access_times.removing();
        scope.spawn(|| {
            put_manifest(&store, &manifest(1), "library/alpine").unwrap();
            written.send(()).unwrap();
        });
        assert!(is_written.recv_timeout(Duration::from_millis(50)).is_err());
        drop(removing);
        is_written.recv().unwrap();
    });
}

#[test]
fn t08_pin_waits_for_running_eviction() {
    let fixture = Fixture::memory();
    let store = fixture.open();
    let (pinned, is_pinned) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let removing = store.access_times.removing();
        scope.spawn(|| {
            store.pin(&Pin::Tag(key("1"))).unwrap();
            pinned.send(()).unwrap();
        });
        assert!(is_pinned.recv_timeout(Duration::from_millis(50)).is_err());
        drop(removing);
        is_pinned.recv().unwrap();
    });
}

#[test]
fn waiting_reservation_evicts_nothing_after_space_was_freed() {
    let fixture = Fixture::memory();
    let store = fixture.open();
    for number in 0..10_u32 {
        put_blob(&store, &number.to_be_bytes().repeat(250)).unwrap();
    }
    counted_usage(&store);
    store.access_times.set_now(at(7200));
    // Each of them needs one blob less, and evicts down to 90 % of the limit: two.
    store.quota.set_limits(Limits {
        bytes_max: 10_000,
        free_bytes_min: 0,
    });
    let (sender, reserved) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let round = store.evictor.state.round.lock();
        for _ in 0..2 {
            let (sender, evictor) = (sender.clone(), &store.evictor);
            scope.spawn(move || sender.send(evictor.reserve(500)).unwrap());
        }
        assert!(reserved.recv_timeout(Duration::from_millis(50)).is_err());
        drop(round);
        let reservations = [reserved.recv().unwrap(), reserved.recv().unwrap()];
        assert!(reservations.iter().all(Result::is_ok));
    });
    assert_eq!(store.evictions().for_size, 2);
}

/// The space that was freed has room for the reservation once, and not twice.
#[test]
fn waiting_reservation_counts_its_bytes_once() {
    let fixture = Fixture::memory();
    let store = fixture.open();
    let blobs: Vec<Vec<u8>> = (0..10_u32)
        .map(|number| number.to_be_bytes().repeat(250))
        .collect();
    for blob in &blobs {
        put_blob(&store, blob).unwrap();
    }
    counted_usage(&store);
    store.access_times.set_now(at(7200));
    store.quota.set_limits(Limits {
        bytes_max: 10_000,
        free_bytes_min: 0,
    });
    let (sender, reserved) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let round = store.evictor.state.round.lock();
        scope.spawn(|| sender.send(store.evictor.reserve(600)).unwrap());
        assert!(reserved.recv_timeout(Duration::from_millis(50)).is_err());
        store.remove_blob(&digest(&blobs[0])).unwrap();
        drop(round);
        assert!(reserved.recv().unwrap().is_ok());
    });
    assert_eq!(store.evictions().for_size, 0);
}

#[test]
fn dry_run_of_gc_does_not_wait_for_an_eviction() {
    let fixture = Fixture::memory();
    let store = fixture.open();
    let (sender, found) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let round = store.evictor.state.round.lock();
        scope.spawn(|| sender.send(store.collect(Duration::ZERO, true)).unwrap());
        let found = found.recv_timeout(Duration::from_secs(10));
        drop(round);
        assert!(found.is_ok());
    });
}

#[test]
fn used_content_is_protected_after_the_clock_was_set_back() {
    for fixture in [Fixture::directory(), Fixture::memory()] {
        let store = fixture.open();
        drop(evictable_image(&store));
        store.evictor.access_times.stop_tracking();
        let used = [
            ContentId::Manifest(digest(&manifest(1))),
            ContentId::Blob(digest(&1_u32.to_be_bytes())),
        ];
        let touch = |seconds| used.iter().for_each(|content| store.touch(*content, at(seconds)));
        let is_evicted = || store.evictor.relieve_full_disk(u64::MAX);
        // An access while the clock was ahead counts as made when it was set back.
        store.tick(at(7 * 3600));
        touch(7 * 3600);
        store.tick(at(3 * 3600));
        assert!(!is_evicted());
        // And an access after that counts at its time, for an hour.
        store.tick(at(5 * 3600));
        touch(5 * 3600);
        store.tick(at(6 * 3600 - 60));
        assert!(!is_evicted());
        store.tick(at(7 * 3600));
        assert!(is_evicted());
    }
}
