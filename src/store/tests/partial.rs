//! What interrupted downloads leave: found again, bounded, and believed only where it agrees with its marks.

use super::*;
use crate::store::ingest::CHECKPOINT_BYTES;

const MARK: usize = 1024 * 1024;

fn content(length: usize) -> Vec<u8> {
    let numbers = (0_u32..).flat_map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes());
    numbers.take(length).collect()
}

fn hashed(bytes: &[u8]) -> Hasher {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(bytes);
    hasher
}

/// Writes the beginning of a blob and leaves it.
fn leave(store: &Store, blob: &[u8], length: usize) {
    let ingest = store.begin(&digest(blob), Some(blob.len() as u64)).unwrap();
    ingest.file().write_at(&blob[..length], 0).unwrap();
    ingest.suspend(length as u64, &hashed(&blob[..length]));
}

/// What may be gone on with.
fn left(store: &Store, blob: &[u8]) -> Option<u64> {
    store.take_partial(&digest(blob)).map(|leftover| leftover.bytes())
}

#[test]
fn what_was_left_is_gone_on_with_and_committed() {
    everywhere(|ground| {
        let blob = content(3 * MARK);
        leave(&ground.open(), &blob, 2 * MARK);
        let store = ground.open();
        let leftover = store.take_partial(&digest(&blob)).unwrap();
        assert_eq!(
            (leftover.bytes(), leftover.size()),
            (2 * CHECKPOINT_BYTES, Some(3 * CHECKPOINT_BYTES))
        );
        assert_eq!(left(&store, &blob), None, "taken");
        let mut proven = Vec::new();
        let resumed = leftover.reverify(|bytes| proven.push(bytes)).unwrap();
        assert_eq!(
            (resumed.written, proven),
            (2 * CHECKPOINT_BYTES, vec![2 * CHECKPOINT_BYTES])
        );
        let mut hasher = resumed.hasher;
        hasher.update(&blob[2 * MARK..]);
        let file = resumed.ingest.file();
        file.write_at(&blob[2 * MARK..], 2 * CHECKPOINT_BYTES).unwrap();
        let proof = Verified::check(hasher, &digest(&blob), 3 * CHECKPOINT_BYTES, None).unwrap();
        resumed.ingest.commit(proof).unwrap();
        assert_eq!(read_blob(&store, &digest(&blob)).unwrap(), blob);
        assert_eq!((ground.ingests(), left(&store, &blob)), (0, None));
    });
}

#[test]
fn what_was_taken_and_not_used_is_there_for_the_next() {
    everywhere(|ground| {
        let (store, blob) = (ground.open(), content(2 * MARK));
        leave(&store, &blob, MARK + 7);
        for _ in 0..2 {
            assert_eq!(left(&store, &blob), Some(CHECKPOINT_BYTES + 7));
        }
        store.take_partial(&digest(&blob)).unwrap().discard();
        assert_eq!((left(&store, &blob), ground.ingests()), (None, 0));
    });
}

#[test]
fn a_killed_process_leaves_what_it_had_marked() {
    everywhere(|ground| {
        let (store, blob) = (ground.open(), content(4 * MARK));
        let mut ingest = store.begin(&digest(&blob), None).unwrap();
        let mut hasher = Hasher::new(Algorithm::Sha256);
        for (at, part) in blob[..3 * MARK].chunks(MARK / 4).enumerate() {
            ingest.file().write_at(part, (at * MARK / 4) as u64).unwrap();
            hasher.update(part);
            ingest.checkpoint_if_due(((at + 1) * MARK / 4) as u64, &hasher);
        }
        // It is neither left nor dropped.
        let next = ground.fs.list(Path::new("ingest")).unwrap();
        assert_eq!(next.iter().filter(|entry| entry.is_folder).count(), 1);
        std::mem::forget(ingest);
        drop(store);
        let store = ground.open();
        let leftover = store.take_partial(&digest(&blob)).unwrap();
        let mut proven = Vec::new();
        leftover.reverify(|bytes| proven.push(bytes)).unwrap();
        assert_eq!(
            proven,
            [CHECKPOINT_BYTES, 2 * CHECKPOINT_BYTES, 3 * CHECKPOINT_BYTES]
        );
    });
}

#[test]
fn only_what_agrees_with_its_marks_is_believed() {
    for (damaged, believed) in [(0, 0), (MARK + 1, MARK), (2 * MARK, 2 * MARK)] {
        everywhere(|ground| {
            let (store, blob) = (ground.open(), content(3 * MARK));
            let mut ingest = store.begin(&digest(&blob), None).unwrap();
            for marks in 1..=2 {
                let part = &blob[..marks * MARK];
                ingest.file().write_at(part, 0).unwrap();
                ingest.checkpoint_if_due(part.len() as u64, &hashed(part));
            }
            ingest.file().write_at(&[!blob[damaged]], damaged as u64).unwrap();
            ingest.suspend(2 * CHECKPOINT_BYTES, &hashed(&blob[..2 * MARK]));
            drop(store);
            let leftover = ground.open().take_partial(&digest(&blob)).unwrap();
            let resumed = leftover.reverify(|_| {}).unwrap();
            assert_eq!(resumed.written, believed as u64);
            assert_eq!(resumed.hasher.finish(), digest(&blob[..believed]));
        });
    }
}

#[test]
fn what_is_too_little_damaged_or_held_already_is_removed() {
    everywhere(|ground| {
        let (store, blob) = (ground.open(), content(2 * MARK));
        let ingest = store.begin(&digest(b"x"), None).unwrap();
        ingest.suspend(0, &hashed(b""));
        assert_eq!(ground.ingests(), 0, "no byte of it");
        drop(store);
        for spoiled in ["meta", "marks", "data"] {
            leave(&ground.open(), &blob, MARK);
            let files = ground.files("ingest");
            let file = files.iter().find(|path| path.ends_with(spoiled)).unwrap();
            ground.overwrite(file, b"?");
            assert_eq!(left(&ground.open(), &blob), None, "{spoiled}");
            assert_eq!(ground.ingests(), 0, "{spoiled}");
        }
        let store = ground.open();
        leave(&store, &blob, MARK);
        keep_blob(&store, &blob).unwrap();
        drop(store);
        assert_eq!((left(&ground.open(), &blob), ground.ingests()), (None, 0));
    });
}

#[test]
fn what_is_older_than_a_day_is_removed_at_the_start() {
    let (ground, blob) = (Ground::directory(), content(2 * MARK));
    leave(&ground.open(), &blob, MARK);
    let written_at = ground.fs.modified(&ground.files("ingest")[0]).unwrap().unwrap();
    let open = |hours: u64| {
        let now = written_at + Duration::from_secs(hours * 3600);
        Store::open(&Settings::default(), Arc::clone(&ground.fs), now).unwrap()
    };
    assert_eq!(left(&open(23), &blob), Some(CHECKPOINT_BYTES));
    assert_eq!(left(&open(25), &blob), None);
    assert_eq!(ground.ingests(), 0);
}

#[test]
fn there_are_never_many_and_the_oldest_goes_first() {
    everywhere(|ground| {
        let store = ground.open();
        let blobs: Vec<Vec<u8>> = (0..40_u8)
            .map(|number| [&[number][..], &[0; 99]].concat())
            .collect();
        for blob in &blobs {
            leave(&store, blob, 50);
        }
        assert_eq!(ground.ingests(), 32);
        assert_eq!(left(&store, &blobs[7]), None);
        assert_eq!(left(&store, &blobs[8]), Some(50));
        assert_eq!(store.remove_partials(), 32 * 50);
        assert_eq!(ground.ingests(), 0);
    });
}
