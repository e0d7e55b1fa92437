//! Sightings on disk: restart, eviction, damage, limits and power cuts.

use super::power_cut::PowerCutFs;
use super::*;
use crate::store::tags::TagReader;
use crate::store::tags::sightings::{Seen, SightingKey, Sightings};

fn seen(content: &[u8]) -> Seen {
    Seen {
        digest: digest(content),
        media_type: image(),
        accept: 1,
        accepts_indexes: true,
        last_modified: None,
        created_at: None,
    }
}

fn sighting_key(tag: &str) -> SightingKey {
    SightingKey::from(&key(tag))
}

fn see(store: &Store, tag: &str, content: &[u8], seconds: u64) -> Result<bool, StoreError> {
    store.record_sighting(&sighting_key(tag), &seen(content), at(seconds))
}

fn first_seen(store: &Store, tag: &str, content: &[u8]) -> Option<SystemTime> {
    let sightings = store.sightings(&sighting_key(tag));
    sightings
        .get(&digest(content))
        .map(|sighting| sighting.first_seen_at)
}

#[test]
fn sightings_survive_restart_and_removal_of_the_tag() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        see(&store, "3", b"old", 1).unwrap();
        see(&store, "3", b"new", 2).unwrap();
        store.put_tag(&key("3"), variant(1, b"new", 2)).unwrap();
        store.remove_tag(&key("3")).unwrap();
        drop(store);
        let store = fixture.open();
        assert_eq!(first_seen(&store, "3", b"old"), Some(at(1)));
        assert_eq!(first_seen(&store, "3", b"new"), Some(at(2)));
        assert_eq!(first_seen(&store, "4", b"new"), None);
    });
}

#[test]
fn unchanged_tag_writes_no_sighting() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        assert_eq!(see(&store, "3", b"image", 1), Ok(true));
        let file = fixture.files("sightings").remove(0);
        fixture.fs.remove(&file).unwrap();
        assert_eq!(see(&store, "3", b"image", 500), Ok(false));
        assert!(fixture.files("sightings").is_empty());
        assert_eq!(see(&store, "3", b"other", 501), Ok(true));
        assert_eq!(fixture.files("sightings"), [file]);
    });
}

#[test]
fn store_without_sightings_takes_them_from_tag_records() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        store.put_tag(&key("3"), variant(1, b"old", 1)).unwrap();
        store.put_tag(&key("3"), variant(1, b"new", 7)).unwrap();
        assert!(fixture.files("sightings").is_empty());
        drop(store);
        let store = fixture.open();
        assert_eq!(first_seen(&store, "3", b"old"), Some(at(1)));
        assert_eq!(first_seen(&store, "3", b"new"), Some(at(7)));
        see(&store, "3", b"newest", 9).unwrap();
        drop(store);
        assert_eq!(first_seen(&fixture.open(), "3", b"old"), Some(at(1)));
    });
}

#[test]
fn damaged_sightings_are_no_evidence() {
    on_every_fs(|fixture| {
        see(&fixture.open(), "3", b"image", 1).unwrap();
        let file = fixture.files("sightings").remove(0);
        let mut bytes = fixture.fs.read_file(&file, 10_000).unwrap();
        bytes[30] ^= 1;
        fixture.overwrite(&file, &bytes);
        let store = fixture.open();
        assert_eq!(*store.sightings(&sighting_key("3")), Sightings::default());
        see(&store, "3", b"image", 50).unwrap();
        drop(store);
        assert_eq!(first_seen(&fixture.open(), "3", b"image"), Some(at(50)));
    });
}

#[test]
fn unreadable_sightings_are_kept_and_read_again() {
    let fs = Arc::new(PowerCutFs::new(usize::MAX));
    let open = || {
        let disk = Arc::clone(&fs) as Arc<dyn FileSystem>;
        Store::open(&Settings::default(), disk, at(0)).unwrap()
    };
    let store = open();
    see(&store, "3", b"old", 1).unwrap();
    store
        .join_sighting(&sighting_key("3"), &digest(b"old"), at(1))
        .unwrap();
    drop(store);
    let store = open();
    let of_digest = sighting_key("3").with_digest(digest(b"old"));
    fs.set_unreadable(Some("sightings"));
    for key in [&sighting_key("3"), &of_digest] {
        assert!(store.sightings(key).is_unreadable());
    }
    assert!(see(&store, "3", b"new", 5).is_err());
    assert!(store.record_sighting(&of_digest, &seen(b"old"), at(5)).is_err());
    fs.set_unreadable(None);
    assert_eq!(first_seen(&store, "3", b"old"), Some(at(1)), "read again");
    assert!(!store.sightings(&of_digest).is_unreadable());
    assert_eq!(see(&store, "3", b"new", 6), Ok(true));
    drop(store);
    let store = open();
    assert_eq!(first_seen(&store, "3", b"old"), Some(at(1)), "not overwritten");
    assert_eq!(first_seen(&store, "3", b"new"), Some(at(6)));
}

#[test]
fn sightings_of_another_tag_are_ignored() {
    on_every_fs(|fixture| {
        see(&fixture.open(), "3", b"image", 1).unwrap();
        let from = fixture.files("sightings").remove(0);
        see(&fixture.open(), "4", b"other", 1).unwrap();
        let mut files = fixture.files("sightings");
        files.retain(|file| *file != from);
        fixture.fs.rename(&from, &files[0]).unwrap();
        assert_eq!(first_seen(&fixture.open(), "4", b"image"), None);
    });
}

#[test]
fn full_tree_prunes_sightings_of_uncached_tags_first() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        store.sightings.set_files_max(32);
        store.put_tag(&key("cached"), variant(1, b"image", 0)).unwrap();
        see(&store, "cached", b"image", 0).unwrap();
        for number in 0..200 {
            see(&store, &number.to_string(), b"image", 1 + number).unwrap();
            assert!(fixture.files("sightings").len() <= 32);
        }
        drop(store);
        let store = fixture.open();
        see(&store, "cached", b"image", 900).unwrap();
        assert_eq!(first_seen(&store, "cached", b"image"), Some(at(0)));
    });
}

#[test]
fn newest_seen_digest_that_is_eligible_is_chosen() {
    let store = Fixture::memory().open();
    for (content, seconds) in [(b"a", 1), (b"b", 2), (b"c", 3)] {
        see(&store, "3", content, seconds).unwrap();
    }
    see(&store, "3", b"a", 4).unwrap();
    let sightings = store.sightings(&sighting_key("3"));
    let newest = |is_eligible: &dyn Fn(&Digest) -> bool| {
        let view = store.view();
        let found = view.newest_seen(&sightings, None, TagReader::Operator, is_eligible);
        found.map(|found| found.digest)
    };
    assert_eq!(newest(&|_| true), Some(digest(b"a")), "named last");
    assert_eq!(newest(&|one| *one != digest(b"a")), Some(digest(b"c")));
    assert_eq!(newest(&|one| *one == digest(b"b")), Some(digest(b"b")));
    assert_eq!(newest(&|_| false), None);
}

#[test]
fn power_cut_never_makes_a_digest_older() {
    for last in 0.. {
        let fs = Arc::new(PowerCutFs::new(last));
        let disk = Arc::clone(&fs) as Arc<dyn FileSystem>;
        let Ok(store) = Store::open(&Settings::default(), disk, at(0)) else {
            continue;
        };
        let moves = [(b"a", 10), (b"b", 20), (b"a", 30), (b"c", 40)];
        let is_kept = moves.map(|(content, seconds)| see(&store, "3", content, seconds).is_ok());
        drop(store);
        for chance in 0..8 {
            let found = Store::open(&Settings::default(), Arc::new(fs.after_by_chance(chance)), at(99));
            let found = found.unwrap();
            for (at_move, (content, seconds)) in [(0, (b"a", 10)), (1, (b"b", 20)), (3, (b"c", 40))] {
                let first = first_seen(&found, "3", content);
                assert!(first.is_none_or(|first| first >= at(seconds)));
                assert!(!is_kept[at_move] || first == Some(at(seconds)), "{last} {chance}");
            }
        }
        if is_kept == [true; 4] {
            assert!(last > 10, "the scenario writes in {last} calls only");
            return;
        }
    }
}

#[test]
fn digest_keeps_what_its_tags_were_seen_to_name() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let of_digest = |store: &Store| {
            let sightings = store.sightings(&sighting_key("3").with_digest(digest(b"new")));
            sightings
                .get(&digest(b"new"))
                .map(|sighting| (sighting.first_seen_at, sighting.other_seen_at))
        };
        see(&store, "3", b"old", 1).unwrap();
        see(&store, "3", b"new", 5).unwrap();
        let join = |store: &Store, tag: &str| {
            store
                .join_sighting(&sighting_key(tag), &digest(b"new"), at(9))
                .unwrap();
        };
        join(&store, "3");
        assert_eq!(of_digest(&store), Some((at(5), Some(at(1)))));
        let files = fixture.files("sightings");
        join(&store, "3");
        assert_eq!(fixture.files("sightings"), files);
        drop(store);
        let store = fixture.open();
        assert_eq!(of_digest(&store), Some((at(5), Some(at(1)))));
        see(&store, "4", b"new", 7).unwrap();
        join(&store, "4");
        assert_eq!(
            of_digest(&store),
            Some((at(5), None)),
            "not known to be new under 4"
        );
    });
}

#[test]
fn pruned_sighting_of_a_digest_returns_with_its_tag() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let key = sighting_key("3");
        let of_digest = key.with_digest(digest(b"image"));
        see(&store, "3", b"image", 1).unwrap();
        let tags = fixture.files("sightings");
        store.join_sighting(&key, &digest(b"image"), at(1)).unwrap();
        let mut files = fixture.files("sightings");
        files.retain(|file| !tags.contains(file));
        fixture.fs.remove(&files[0]).unwrap();
        drop(store);
        let store = fixture.open();
        assert_eq!(*store.sightings(&of_digest), Sightings::default());
        store.join_sighting(&key, &digest(b"image"), at(900)).unwrap();
        drop(store);
        let found = fixture.open().sightings(&of_digest);
        assert_eq!(found.get(&digest(b"image")).unwrap().first_seen_at, at(1));
    });
}
