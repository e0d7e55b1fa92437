#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]
use std::sync::Arc;

use proptest::prelude::*;

use super::compaction::{Compaction, FILE_BYTES_MIN, Next, recover};
use super::handle::{IndexHandle, Location, VALUE_BYTES_MAX};
use super::write_buffer::WriteBuffer;
use super::*;
use crate::store::fs::DirectoryFs;

#[derive(Clone, Debug)]
enum Step {
    Put(Vec<u8>, Vec<u8>),
    Remove(Vec<u8>),
    Scan(Vec<u8>, Vec<u8>, usize),
}

fn key() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(b'a'..b'd', 0..4)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (key(), proptest::collection::vec(any::<u8>(), 0..8)).prop_map(|(key, value)| Step::Put(key, value)),
        key().prop_map(Step::Remove),
        (key(), key(), 0_usize..6).prop_map(|(prefix, after, limit)| Step::Scan(prefix, after, limit)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn sled_and_memory_agree(steps in proptest::collection::vec(step(), 0..40)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index");
        let mut sled = SledIndex::open(&path).unwrap().index;
        let mut memory = MemoryIndex::default();
        for step in steps {
            match step {
                Step::Put(key, value) => {
                    sled.put(&key, &value).unwrap();
                    memory.put(&key, &value).unwrap();
                    prop_assert_eq!(sled.get(&key).unwrap(), Some(value));
                }
                Step::Remove(key) => {
                    sled.remove(&key).unwrap();
                    memory.remove(&key).unwrap();
                    prop_assert_eq!(sled.get(&key).unwrap(), None);
                }
                Step::Scan(prefix, after, limit) => {
                    let found = sled.scan(&prefix, &after, limit).unwrap();
                    prop_assert_eq!(found, memory.scan(&prefix, &after, limit).unwrap());
                }
            }
        }
        sled.sync().unwrap();
    }
}

#[test]
fn index_panic_is_reported_as_corruption() {
    let fault = catch_panic(|| -> Result<(), IndexError> { std::panic::panic_any("torn page") }).unwrap_err();
    assert_eq!(fault, IndexError::Damaged("torn page".to_owned()));
}

#[test]
fn second_index_handle_is_busy() {
    let folder = tempfile::tempdir().unwrap();
    let first = SledIndex::open(folder.path()).unwrap();
    assert_eq!(SledIndex::open(folder.path()).err(), Some(IndexError::Busy));
    drop(first);
}

#[test]
fn two_newest_quarantined_indexes_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    for count in 1..=4 {
        fs::create_dir(&index).unwrap();
        quarantine(&index, 1_700_000_000, count).unwrap();
    }
    let mut names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["index.broken-001700000000-0003", "index.broken-001700000000-0004"]
    );
}

/// An index whose file is far larger than its live content.
fn grown(folder: &Path) -> SledIndex {
    let mut index = SledIndex::open(folder).unwrap().index;
    for key in 0_u16..2000 {
        index.put(&key.to_be_bytes(), &[29; 4000]).unwrap();
    }
    index.sync().unwrap();
    for key in 100_u16..2000 {
        index.remove(&key.to_be_bytes()).unwrap();
    }
    index.sync().unwrap();
    assert!(index.file_bytes() > FILE_BYTES_MIN, "{}", index.file_bytes());
    index
}

fn compacted(index: &dyn Index, compaction: &mut Compaction) {
    while let Next::Step = compaction.step(index).unwrap() {}
}

#[test]
fn compacted_index_is_small_and_has_concurrent_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index");
    let mut index = grown(&path);
    let before = index.file_bytes();
    let mut compaction = Compaction::new(&path);
    // The measuring pass, then the first page of the copy.
    compaction.step(&index).unwrap();
    compaction.step(&index).unwrap();
    let mut both = |key: u16, value: Option<&[u8]>| {
        match value {
            Some(value) => index.put(&key.to_be_bytes(), value).unwrap(),
            None => index.remove(&key.to_be_bytes()).unwrap(),
        }
        compaction.write(&key.to_be_bytes(), value).unwrap();
    };
    both(3, None);
    both(4, Some(b"newer"));
    both(3000, Some(b"added"));
    compacted(&index, &mut compaction);
    drop(index);
    compaction.swap().unwrap();
    let index = SledIndex::open(&path).unwrap().index;
    assert!(
        index.file_bytes() * 2 < before,
        "{} of {before}",
        index.file_bytes()
    );
    assert_eq!(index.scan(b"", b"", 1000).unwrap().len(), 100);
    assert_eq!(index.get(&3_u16.to_be_bytes()).unwrap(), None);
    assert_eq!(index.get(&4_u16.to_be_bytes()).unwrap().unwrap(), b"newer");
    assert_eq!(index.get(&5_u16.to_be_bytes()).unwrap().unwrap(), [29; 4000]);
    let entries = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(entries, 1, "nothing of the old one is left");
}

#[test]
fn small_index_is_not_compacted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index");
    let mut index = SledIndex::open(&path).unwrap().index;
    for key in 0_u16..600 {
        index.put(&key.to_be_bytes(), &[1; 4000]).unwrap();
    }
    index.sync().unwrap();
    let mut compaction = Compaction::new(&path);
    let last = loop {
        match compaction.step(&index).unwrap() {
            Next::Step => {}
            last => break last,
        }
    };
    assert!(matches!(last, Next::NotNeeded));
}

#[test]
fn interrupted_index_swap_leaves_old_or_new_index() {
    let folder = tempfile::tempdir().unwrap();
    let (path, old, new) = (
        folder.path().join("index"),
        folder.path().join("index.old"),
        folder.path().join("index.new"),
    );
    let mark = |path: &Path| {
        fs::create_dir(path).unwrap();
        fs::write(path.join("which"), path.as_os_str().as_encoded_bytes()).unwrap();
    };
    let which = || fs::read(path.join("which")).unwrap();
    // During the copy.
    mark(&path);
    mark(&new);
    recover(&path).unwrap();
    assert_eq!(which(), path.as_os_str().as_encoded_bytes());
    assert!(!new.exists());
    // Between the two renames.
    fs::remove_dir_all(&path).unwrap();
    mark(&old);
    mark(&new);
    recover(&path).unwrap();
    assert_eq!(which(), old.as_os_str().as_encoded_bytes());
    assert!(!new.exists() && !old.exists());
    // Before the old index was removed.
    mark(&old);
    recover(&path).unwrap();
    assert!(path.exists() && !old.exists());
}

#[test]
fn buffered_writes_and_removals_reach_reopened_index() {
    let mut index = MemoryIndex::default();
    index.put(b"grant", b"yes").unwrap();
    let mut write_buffer = WriteBuffer::default();
    write_buffer.write(b"grant".to_vec(), None);
    write_buffer.write(b"tag".to_vec(), Some(b"3".to_vec()));
    assert_eq!(write_buffer.get(b"grant"), Some(&None));
    assert_eq!(write_buffer.get(b"other"), None, "the index may know it");
    write_buffer.replay(&mut index).unwrap();
    assert_eq!(index.get(b"grant").unwrap(), None);
    assert_eq!(index.get(b"tag").unwrap().unwrap(), b"3");
    assert!(!write_buffer.is_overflowed());
}

#[test]
fn index_is_discarded_after_write_buffer_overflow() {
    let mut write_buffer = WriteBuffer::default();
    for key in 0_u32..5000 {
        write_buffer.write(key.to_be_bytes().to_vec(), Some(vec![0; 4000]));
    }
    assert!(write_buffer.is_overflowed());
    assert_eq!(
        write_buffer.get(&0_u32.to_be_bytes()),
        None,
        "and takes no memory"
    );
}

/// Opens the index once another handle of this process has released it.
fn opened(path: &Path) -> SledIndex {
    loop {
        match SledIndex::open(path) {
            Ok(opened) => return opened.index,
            Err(IndexError::Busy) => std::thread::yield_now(),
            Err(fault) => panic!("{fault}"),
        }
    }
}

fn handle(folder: &Path) -> IndexHandle {
    let location = Location::Folder {
        fs: Arc::new(DirectoryFs::open(folder.to_owned()).unwrap()),
        index: folder.join("index"),
        opened_at: 0,
    };
    IndexHandle::start(location).unwrap()
}

#[test]
fn corrupt_index_record_is_a_miss_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index");
    let mut index = opened(&path);
    index.put(b"key", b"a value, and no checksum of it").unwrap();
    index.sync().unwrap();
    drop(index);
    let handle = handle(folder.path());
    // Its place in a page remains, because a page that is too short would look like the last one.
    let pairs = handle.scan(b"k".to_vec(), Vec::new(), 9);
    assert_eq!(pairs, Ok(vec![(b"key".to_vec(), Vec::new())]));
    assert_eq!(handle.get(b"key".to_vec()), Ok(None));
    handle.flush();
    drop(handle);
    assert_eq!(opened(&path).get(b"key").unwrap(), None);
}

#[test]
fn index_values_stay_below_sled_blob_size() {
    let folder = tempfile::tempdir().unwrap();
    let handle = handle(folder.path());
    let key = |number: u8| vec![number; 600];
    for number in 0..50 {
        handle.put(key(number), vec![number; VALUE_BYTES_MAX]);
    }
    handle.put(key(50), vec![50; VALUE_BYTES_MAX + 1]);
    handle.flush();
    assert_eq!(handle.get(key(49)), Ok(Some(vec![49; VALUE_BYTES_MAX])));
    assert_eq!(handle.get(key(50)), Ok(None), "it is in its file alone");
    let files = fs::read_dir(folder.path().join("index/blobs")).unwrap();
    assert_eq!(files.count(), 0);
}

#[test]
fn index_open_timeout_releases_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index");
    let fault = open_within(path.clone(), Duration::ZERO).err();
    let why = "not opened within 0 s".to_owned();
    assert_eq!(fault, Some(IndexError::Damaged(why)));
    // The abandoned opening may still use its files for a moment.
    let opens = || {
        std::thread::sleep(Duration::from_millis(10));
        SledIndex::open(&path).is_ok()
    };
    assert!((0..1000).any(|_| opens()));
}

#[test]
fn sled_text_io_error_is_a_disk_error() {
    let told = sled::Error::Io(io::Error::from_raw_os_error(122)).clone();
    let quota = IndexError::Disk {
        reason: io::Error::from_raw_os_error(122).to_string(),
        is_failing: false,
    };
    assert_eq!(sled_error(told), quota);
    let told = sled::Error::Io(io::Error::from_raw_os_error(5)).clone();
    assert!(matches!(
        sled_error(told),
        IndexError::Disk { is_failing: true, .. }
    ));
}

#[test]
fn t07_concurrent_revocations_share_one_flush() {
    let (index, flushes) = slow::slow_index();
    let first = index.remove_durable(vec![0]);
    flushes.begun();
    let others: Vec<_> = (1..=16).map(|key| index.remove_durable(vec![key])).collect();
    flushes.let_through();
    assert!(index.wait_durable(first));
    flushes.begun();
    flushes.let_through();
    for other in others {
        assert!(index.wait_durable(other));
    }
}

#[test]
fn t07_stuck_index_fails_further_reads_at_once() {
    let (index, flushes) = slow::slow_index();
    let first = index.remove_durable(vec![0]);
    flushes.begun();
    index.note_stuck();
    // Removed when the worker gets to it, and not reported as durable before.
    let second = index.remove_durable(vec![1]);
    assert!(!index.wait_durable(second));
    assert!(index.get(vec![2]).is_err());
    flushes.let_through();
    flushes.begun();
    flushes.let_through();
    // The second message was served, so the worker makes progress again.
    assert!(index.get(vec![2]).is_ok());
    drop(first);
}

#[test]
fn t08_removal_with_full_queue_is_sent_later() {
    let (index, flushes) = slow::slow_index();
    let (held, other) = (b"held".to_vec(), b"other".to_vec());
    index.put(held.clone(), vec![1]);
    index.put(other.clone(), vec![1]);
    flushes.begun();
    while index.put_if_absent(b"filler".to_vec(), vec![0]) {}
    // Its caller has timed out.
    drop(index.remove_durable(held.clone()));
    drop(index.remove_durable(other.clone()));
    assert_eq!(index.get(held.clone()), Ok(None));
    drop(flushes);
    index.flush();
    assert_eq!(index.get(held.clone()), Ok(None));
    assert_eq!(
        index.scan(Vec::new(), Vec::new(), 9),
        Err(handle::IndexUnavailable)
    );
    // A value written later stays.
    index.put(other.clone(), vec![2]);
    index.send_pending_removals();
    let pairs = index.scan(Vec::new(), Vec::new(), 9).unwrap();
    assert_eq!(pairs, [(b"filler".to_vec(), vec![0]), (other, vec![2])]);
}

#[test]
fn t08_too_many_pending_removals_recreate_the_index() {
    let (index, flushes) = slow::slow_index();
    index.put(b"held".to_vec(), vec![1]);
    flushes.begun();
    while index.put_if_absent(b"filler".to_vec(), vec![0]) {}
    for number in 0..=pending_removals::REMOVALS_MAX {
        drop(index.remove_durable(number.to_be_bytes().to_vec()));
    }
    assert_eq!(index.get(b"held".to_vec()), Err(handle::IndexUnavailable));
    let losses = index.losses();
    drop(flushes);
    index.flush();
    index.send_pending_removals();
    assert!(index.losses() > losses);
    assert_ne!(index.get(b"held".to_vec()), Ok(Some(vec![1])));
}
