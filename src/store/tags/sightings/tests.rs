//! Tests of the sightings of one tag, without a disk.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use super::*;
use crate::oci::Algorithm;
use crate::store::tags::HistoryEntry;

const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

fn digest(name: &str) -> Digest {
    Digest::of(Algorithm::Sha256, name.as_bytes())
}

fn seen(name: &str) -> Seen {
    Seen {
        digest: digest(name),
        media_type: IMAGE.parse().unwrap(),
        accept: 1,
        accepts_indexes: true,
        last_modified: None,
        created_at: None,
    }
}

fn index(name: &str) -> Seen {
    Seen {
        media_type: INDEX.parse().unwrap(),
        ..seen(name)
    }
}

fn substitute(name: &str) -> Seen {
    Seen {
        accept: 2,
        accepts_indexes: false,
        ..seen(name)
    }
}

fn after(all: &[(Seen, u64)]) -> Sightings {
    all.iter()
        .fold(Sightings::default(), |sightings, (seen, seconds)| {
            sightings.with(seen, None, at(*seconds)).unwrap_or(sightings)
        })
}

fn names(sightings: &Sightings) -> Vec<Digest> {
    sightings.iter().map(|sighting| sighting.seen.digest).collect()
}

fn variant(name: &str, first_seen: u64, confirmed_at: SystemTime) -> Variant {
    Variant {
        accept: 1,
        digest: digest(name),
        media_type: IMAGE.parse().unwrap(),
        accepts_indexes: true,
        confirmed_at,
        first_seen_at: at(first_seen),
        previous: None,
        is_by_record: false,
        history: Vec::new(),
    }
}

#[test]
fn sightings_in_memory_have_no_spare_capacity() {
    let sightings = Sightings::default().with(&seen("a"), None, at(0)).unwrap();
    assert_eq!((sightings.all.len(), sightings.all.capacity()), (1, 1));
}

#[test]
fn unchanged_tag_adds_no_sighting() {
    let sightings = after(&[(seen("a"), 0), (seen("b"), 10)]);
    assert_eq!(sightings.with(&seen("b"), None, at(1_000)), None);
    assert_eq!(names(&sightings), [digest("b"), digest("a")]);
}

#[test]
fn flip_flop_keeps_each_first_time() {
    let mut sightings = after(&[(seen("a"), 0), (seen("b"), 10)]);
    for turn in 1..100 {
        for (name, seconds) in [("a", 20 * turn), ("b", 20 * turn + 10)] {
            sightings = sightings.with(&seen(name), None, at(seconds)).unwrap();
            assert_eq!(sightings.newest().unwrap().seen.digest, digest(name));
        }
    }
    assert_eq!(sightings.len(), 2);
    let first = |name| sightings.get(&digest(name)).unwrap().first_seen_at;
    assert_eq!((first("a"), first("b")), (at(0), at(10)));
}

#[test]
fn move_records_when_the_other_digest_was_last_seen() {
    let sightings = after(&[(seen("a"), 0)]);
    let record = TagRecord {
        variants: vec![variant("a", 0, at(500))],
    };
    let moved = sightings.with(&seen("b"), Some(&record), at(600)).unwrap();
    assert_eq!(moved.get(&digest("b")).unwrap().other_seen_at, Some(at(500)));
    assert_eq!(
        after(&[(seen("a"), 0)]).get(&digest("a")).unwrap().other_seen_at,
        None
    );
}

#[test]
fn index_and_substitute_alternate_without_a_write() {
    let sightings = after(&[(index("index"), 0), (substitute("image"), 1)]);
    assert_eq!(sightings.with(&index("index"), None, at(100)), None);
    assert_eq!(sightings.with(&substitute("image"), None, at(101)), None);
    let image = sightings.get(&digest("image")).unwrap();
    assert_eq!(image.other_seen_at, None, "the tag did not move");
}

#[test]
fn t17_future_first_sight_starts_again() {
    let sightings = after(&[(seen("a"), 1_000_000)]);
    let again = sightings.with(&seen("a"), None, at(50)).unwrap();
    assert_eq!(again.get(&digest("a")).unwrap().first_seen_at, at(50));
    let moved = sightings.with(&seen("b"), None, at(50)).unwrap();
    assert_eq!(names(&moved), [digest("b"), digest("a")]);
    assert_eq!(
        moved.get(&digest("a")).unwrap().first_seen_at,
        at(1_000_000),
        "in the future, so no evidence"
    );
    assert_eq!(moved.get(&digest("b")).unwrap().other_seen_at, Some(at(50)));
}

#[test]
fn first_last_modified_is_kept() {
    let modified = |seconds| Seen {
        last_modified: Some(at(seconds)),
        ..seen("a")
    };
    let sightings = after(&[(seen("a"), 100), (modified(10), 101), (modified(50), 102)]);
    let found = sightings.get(&digest("a")).unwrap();
    assert_eq!(
        (found.seen.last_modified, found.first_seen_at),
        (Some(at(10)), at(100))
    );
}

#[test]
fn busy_tag_keeps_digests_of_every_age() {
    let mut sightings = after(&[(seen("served"), 0)]);
    let record = TagRecord {
        variants: vec![variant("served", 0, at(0))],
    };
    // A push every minute for ten days.
    for minute in 1..14_400 {
        let name = minute.to_string();
        sightings = sightings
            .with(&seen(&name), Some(&record), at(60 * minute))
            .unwrap();
        assert!(sightings.len() <= SIGHTINGS_MAX);
        assert_eq!(sightings.newest().unwrap().seen.digest, digest(&name));
    }
    assert!(sightings.get(&digest("served")).is_some(), "in use");
    let now = 60 * 14_399;
    for days in 1..9 {
        let day = 86_400;
        let aged = |sighting: &&Sighting| {
            let age = at(now).duration_since(sighting.first_seen_at).unwrap().as_secs();
            (days * day..(days + 1) * day).contains(&age)
        };
        assert!(sightings.iter().find(aged).is_some(), "none is {days} days old");
    }
}

#[test]
fn import_is_no_sighting() {
    let imported = TagRecord {
        variants: vec![variant("imported", 0, NEVER_CONFIRMED)],
    };
    assert_eq!(Sightings::of_record(&imported).len(), 0);
    let mut confirmed = variant("now", 50, at(60));
    confirmed.history = vec![
        HistoryEntry {
            digest: digest("before"),
            first_seen_at: at(10),
            confirmed_at: at(40),
        },
        HistoryEntry {
            digest: digest("imported"),
            first_seen_at: at(0),
            confirmed_at: NEVER_CONFIRMED,
        },
    ];
    let sightings = Sightings::of_record(&TagRecord {
        variants: vec![confirmed],
    });
    assert_eq!(names(&sightings), [digest("now"), digest("before")]);
    assert_eq!(sightings.get(&digest("before")).unwrap().first_seen_at, at(10));
}

#[test]
fn sightings_file_round_trips_and_detects_damage() {
    let key = SightingKey {
        upstream: "docker.io".into(),
        repository: "library/alpine".parse().unwrap(),
        reference: "3".parse().unwrap(),
    };
    let dated = Seen {
        last_modified: Some(at(3)),
        created_at: Some(at(2)),
        ..seen("b")
    };
    let behind = SightTime {
        host: at(20),
        at: at(9_000),
    };
    let sightings = after(&[(substitute("a"), 0), (dated, 10)]);
    let sightings = sightings.with(&seen("c"), None, behind).unwrap();
    let file = sightings.to_file(&key);
    assert_eq!(Sightings::from_file(&file), Some((key, sightings)));
    for length in 0..file.len() {
        assert_eq!(Sightings::from_file(&file[..length]), None, "{length}");
    }
}

#[test]
fn digest_is_as_old_as_under_its_oldest_tag() {
    let sighting = |sightings: &Sightings, name: &str| sightings.get(&digest(name)).unwrap().clone();
    let moved = sighting(&after(&[(seen("other"), 0), (seen("a"), 50)]), "a");
    let first = sighting(&after(&[(seen("a"), 10)]), "a");
    let joined = Sightings::default().joined(&moved, at(60)).unwrap();
    assert_eq!(sighting(&joined, "a"), moved);
    assert_eq!(joined.joined(&moved, at(70)), None, "adds nothing");
    let joined = joined.joined(&first, at(70)).unwrap();
    let found = sighting(&joined, "a");
    assert_eq!((found.first_seen_at, found.other_seen_at), (at(10), None));
    assert_eq!(joined.joined(&moved, at(80)), None, "younger under that tag");
}

#[test]
fn t17_future_first_sight_of_a_digest_starts_again() {
    let sighting = |seconds| after(&[(seen("a"), seconds)]).get(&digest("a")).unwrap().clone();
    let ahead = Sightings::default()
        .joined(&sighting(1_000_000), at(1_000_000))
        .unwrap();
    let again = ahead.joined(&sighting(50), at(50)).unwrap();
    assert_eq!(again.get(&digest("a")).unwrap().first_seen_at, at(50));
    let other = again.joined(&sighting(1_000_000), at(60));
    assert_eq!(other, None, "the future makes nothing younger");
}
