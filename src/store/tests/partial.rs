//! Partial downloads: found again after a restart, limited, and resumed only up to a valid checkpoint.

use super::*;
use crate::store::ingest::CHECKPOINT_BYTES;

const CHECKPOINT: usize = 1024 * 1024;

fn content(length: usize) -> Vec<u8> {
    let numbers = (0_u32..).flat_map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes());
    numbers.take(length).collect()
}

fn hashed(bytes: &[u8]) -> Hasher {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(bytes);
    hasher
}

/// Writes the beginning of a blob and suspends the ingest.
fn suspend_at(store: &Store, blob: &[u8], length: usize) {
    let ingest = store.begin(&digest(blob), Some(blob.len() as u64)).unwrap();
    ingest.file().write_at(&blob[..length], 0).unwrap();
    ingest.suspend(length as u64, &hashed(&blob[..length]));
}

/// Resumable bytes of the partial download of `blob`.
fn resumable_bytes(store: &Store, blob: &[u8]) -> Option<u64> {
    store.take_partial(&digest(blob)).map(|partial| partial.bytes())
}

#[test]
fn partial_download_is_resumed_and_committed() {
    on_every_fs(|fixture| {
        let blob = content(3 * CHECKPOINT);
        suspend_at(&fixture.open(), &blob, 2 * CHECKPOINT);
        let store = fixture.open();
        let partial = store.take_partial(&digest(&blob)).unwrap();
        assert_eq!(
            (partial.bytes(), partial.size()),
            (2 * CHECKPOINT_BYTES, Some(3 * CHECKPOINT_BYTES))
        );
        assert_eq!(resumable_bytes(&store, &blob), None, "taken");
        let mut verified = Vec::new();
        let resumed = partial.reverify(|bytes| verified.push(bytes)).unwrap();
        assert_eq!(
            (resumed.written, verified),
            (2 * CHECKPOINT_BYTES, vec![2 * CHECKPOINT_BYTES])
        );
        let mut hasher = resumed.hasher;
        hasher.update(&blob[2 * CHECKPOINT..]);
        let file = resumed.ingest.file();
        file.write_at(&blob[2 * CHECKPOINT..], 2 * CHECKPOINT_BYTES)
            .unwrap();
        let proof = Verified::check(hasher, &digest(&blob), 3 * CHECKPOINT_BYTES, None).unwrap();
        resumed.ingest.commit(proof).unwrap();
        assert_eq!(read_blob(&store, &digest(&blob)).unwrap(), blob);
        assert_eq!((fixture.ingests(), resumable_bytes(&store, &blob)), (0, None));
    });
}

#[test]
fn unused_partial_download_stays_available() {
    on_every_fs(|fixture| {
        let (store, blob) = (fixture.open(), content(2 * CHECKPOINT));
        suspend_at(&store, &blob, CHECKPOINT + 7);
        for _ in 0..2 {
            assert_eq!(resumable_bytes(&store, &blob), Some(CHECKPOINT_BYTES + 7));
        }
        store.take_partial(&digest(&blob)).unwrap().discard();
        assert_eq!((resumable_bytes(&store, &blob), fixture.ingests()), (None, 0));
    });
}

#[test]
fn killed_process_leaves_its_checkpoints() {
    on_every_fs(|fixture| {
        let (store, blob) = (fixture.open(), content(4 * CHECKPOINT));
        let mut ingest = store.begin(&digest(&blob), None).unwrap();
        let mut hasher = Hasher::new(Algorithm::Sha256);
        for (at, part) in blob[..3 * CHECKPOINT].chunks(CHECKPOINT / 4).enumerate() {
            ingest
                .file()
                .write_at(part, (at * CHECKPOINT / 4) as u64)
                .unwrap();
            hasher.update(part);
            ingest.checkpoint_if_due(((at + 1) * CHECKPOINT / 4) as u64, &hasher);
        }
        // The process is killed, so the ingest is neither suspended nor dropped.
        let next = fixture.fs.list(Path::new("ingest")).unwrap();
        assert_eq!(next.iter().filter(|entry| entry.is_folder).count(), 1);
        std::mem::forget(ingest);
        drop(store);
        let store = fixture.open();
        let partial = store.take_partial(&digest(&blob)).unwrap();
        let mut verified = Vec::new();
        partial.reverify(|bytes| verified.push(bytes)).unwrap();
        assert_eq!(
            verified,
            [CHECKPOINT_BYTES, 2 * CHECKPOINT_BYTES, 3 * CHECKPOINT_BYTES]
        );
    });
}

#[test]
fn partial_download_resumes_at_last_valid_checkpoint() {
    for (damaged, resumed_at) in [
        (0, 0),
        (CHECKPOINT + 1, CHECKPOINT),
        (2 * CHECKPOINT, 2 * CHECKPOINT),
    ] {
        on_every_fs(|fixture| {
            let (store, blob) = (fixture.open(), content(3 * CHECKPOINT));
            let mut ingest = store.begin(&digest(&blob), None).unwrap();
            for checkpoints in 1..=2 {
                let part = &blob[..checkpoints * CHECKPOINT];
                ingest.file().write_at(part, 0).unwrap();
                ingest.checkpoint_if_due(part.len() as u64, &hashed(part));
            }
            ingest.file().write_at(&[!blob[damaged]], damaged as u64).unwrap();
            ingest.suspend(2 * CHECKPOINT_BYTES, &hashed(&blob[..2 * CHECKPOINT]));
            drop(store);
            let partial = fixture.open().take_partial(&digest(&blob)).unwrap();
            let resumed = partial.reverify(|_| {}).unwrap();
            assert_eq!(resumed.written, resumed_at as u64);
            assert_eq!(resumed.hasher.finish(), digest(&blob[..resumed_at]));
        });
    }
}

#[test]
fn unusable_partial_downloads_are_removed() {
    on_every_fs(|fixture| {
        let (store, blob) = (fixture.open(), content(2 * CHECKPOINT));
        let ingest = store.begin(&digest(b"x"), None).unwrap();
        ingest.suspend(0, &hashed(b""));
        assert_eq!(fixture.ingests(), 0, "no byte of it");
        drop(store);
        for spoiled in ["meta", "marks", "data"] {
            suspend_at(&fixture.open(), &blob, CHECKPOINT);
            let files = fixture.files("ingest");
            let file = files.iter().find(|path| path.ends_with(spoiled)).unwrap();
            fixture.overwrite(file, b"?");
            assert_eq!(resumable_bytes(&fixture.open(), &blob), None, "{spoiled}");
            assert_eq!(fixture.ingests(), 0, "{spoiled}");
        }
        let store = fixture.open();
        suspend_at(&store, &blob, CHECKPOINT);
        put_blob(&store, &blob).unwrap();
        drop(store);
        assert_eq!(
            (resumable_bytes(&fixture.open(), &blob), fixture.ingests()),
            (None, 0)
        );
    });
}

#[test]
fn old_partial_download_is_removed_at_start() {
    let (fixture, blob) = (Fixture::directory(), content(2 * CHECKPOINT));
    suspend_at(&fixture.open(), &blob, CHECKPOINT);
    let written_at = fixture.fs.modified(&fixture.files("ingest")[0]).unwrap().unwrap();
    let open = |hours: u64| {
        let now = written_at + Duration::from_secs(hours * 3600);
        Store::open(&Settings::default(), Arc::clone(&fixture.fs), now).unwrap()
    };
    assert_eq!(resumable_bytes(&open(23), &blob), Some(CHECKPOINT_BYTES));
    assert_eq!(resumable_bytes(&open(25), &blob), None);
    assert_eq!(fixture.ingests(), 0);
}

#[test]
fn partial_downloads_are_limited_oldest_first() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let blobs: Vec<Vec<u8>> = (0..40_u8)
            .map(|number| [&[number][..], &[0; 99]].concat())
            .collect();
        for blob in &blobs {
            suspend_at(&store, blob, 50);
        }
        assert_eq!(fixture.ingests(), 32);
        assert_eq!(resumable_bytes(&store, &blobs[7]), None);
        assert_eq!(resumable_bytes(&store, &blobs[8]), Some(50));
        assert_eq!(store.remove_partials(), 32 * 50);
        assert_eq!(fixture.ingests(), 0);
    });
}

#[test]
fn partial_downloads_count_and_make_room_before_images() {
    on_every_fs(|fixture| {
        let store = fixture.open_with_limit(6000, at(0));
        put_manifest(&store, &manifest(1), "library/alpine").unwrap();
        store.put_tag(&key("1"), variant(1, &manifest(1), 0)).unwrap();
        let blobs: Vec<Vec<u8>> = (0..3_u8)
            .map(|number| [&[number][..], &[0; 1999]].concat())
            .collect();
        for blob in &blobs {
            suspend_at(&store, blob, 1000);
        }
        store.access_times.set_now(at(7200));
        // Removes the oldest one, and no more than it must.
        let ingest = store.begin(&digest(b"other"), Some(3000)).unwrap();
        assert_eq!(resumable_bytes(&store, &blobs[0]), None);
        assert_eq!(store.remove_partials(), 2000);
        assert!(store.tag(&key("1")).unwrap().is_some());
        drop(ingest);
    });
}

#[test]
fn suspended_download_keeps_no_space_for_its_rest() {
    use std::os::unix::fs::MetadataExt as _;
    let (fixture, blob) = (Fixture::directory(), content(16 * CHECKPOINT));
    let store = fixture.open();
    suspend_at(&store, &blob, CHECKPOINT);
    let data = fixture.files("ingest");
    let data = data.iter().find(|path| path.ends_with("data")).unwrap();
    let folder = fixture.folder.as_ref().unwrap().path().join("data");
    let metadata = std::fs::metadata(folder.join(data)).unwrap();
    assert_eq!(metadata.len(), CHECKPOINT_BYTES);
    assert!(metadata.blocks() * 512 < 2 * CHECKPOINT_BYTES, "{metadata:?}");
}
