#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
use proptest::prelude::*;

use super::*;

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
fn a_panic_in_the_index_is_damage_and_not_the_end() {
    let fault = guarded(|| -> Result<(), IndexFault> { std::panic::panic_any("torn page") }).unwrap_err();
    assert_eq!(fault, IndexFault::Damaged("torn page".to_owned()));
}

#[test]
fn a_second_handle_is_busy_and_not_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let first = SledIndex::open(folder.path()).unwrap();
    assert_eq!(SledIndex::open(folder.path()).err(), Some(IndexFault::Busy));
    drop(first);
}

#[test]
fn the_newest_two_of_those_set_aside_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("index");
    for count in 1..=4 {
        fs::create_dir(&index).unwrap();
        set_aside(&index, 1_700_000_000, count).unwrap();
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
