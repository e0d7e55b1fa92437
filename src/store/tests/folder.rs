//! What only a real folder has: a lock, permissions, and an index that stays.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::*;

fn data(ground: &Ground) -> PathBuf {
    ground.folder.as_ref().unwrap().path().join("data")
}

fn filled(ground: &Ground) {
    let store = ground.open();
    keep_blob(&store, b"layer").unwrap();
    put_manifest(&store, &manifest(1), "library/alpine").unwrap();
    store.put_tag(&key("3"), variant(1, b"image", 1)).unwrap();
    store.put_tag(&key("3"), variant(1, b"image", 60)).unwrap();
    store
        .add_member(UPSTREAM, &repository("library/alpine"), &digest(b"layer"))
        .unwrap();
    store
        .set_public(UPSTREAM, &repository("library/alpine"), Some(at(0)))
        .unwrap();
    store.put_grant(UPSTREAM, &repository("acme/secret"), &[1; 32], at(7));
    store.close();
}

/// Everything but what only the index knows.
fn assert_found_again(store: &Store) {
    assert_eq!(read_blob(store, &digest(b"layer")).unwrap(), b"layer");
    assert_eq!(
        store.manifest(&digest(&manifest(1))).unwrap().unwrap().media_type,
        image()
    );
    assert_eq!(only_variant(store, "3").digest, digest(b"image"));
    assert_eq!(store.tags(None, 10).len(), 1);
    assert!(store.is_member(UPSTREAM, &repository("library/alpine"), &digest(b"layer")));
    assert_eq!(
        store.public_since(UPSTREAM, &repository("library/alpine")),
        Some(at(0))
    );
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if is_so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("never {what}");
}

#[test]
fn a_second_opening_is_refused_and_names_the_process() {
    let ground = Ground::directory();
    let store = ground.open();
    let second = Store::open(&Settings::default(), Arc::clone(&ground.fs), at(0)).unwrap_err();
    let pid = std::process::id();
    assert_eq!(
        second,
        OpenError::Locked {
            folder: data(&ground),
            pid: Some(pid)
        }
    );
    assert!(second.to_string().contains(&pid.to_string()), "{second}");
    drop(store);
    ground.open();
}

#[test]
fn the_data_folder_and_all_in_it_are_the_owners() {
    let ground = Ground::directory();
    filled(&ground);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&data(&ground)), 0o700);
    assert_eq!(
        mode(&data(&ground).join("index")),
        0o700,
        "sled's files are readable by all"
    );
    for file in ["install-secret", "LOCK", "store-id"]
        .map(PathBuf::from)
        .into_iter()
        .chain(ground.files("refs"))
    {
        assert_eq!(mode(&data(&ground).join(&file)), 0o600, "{}", file.display());
    }
    assert_eq!(
        mode(&data(&ground).join(&ground.files("blobs")[0])),
        0o400,
        "a blob is sealed"
    );
}

#[test]
fn a_secret_that_others_may_read_is_refused_with_the_remedy() {
    let ground = Ground::directory();
    drop(ground.open());
    let path = data(&ground).join("install-secret");
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    let refused = Store::open(&Settings::default(), Arc::clone(&ground.fs), at(0)).unwrap_err();
    assert_eq!(
        refused,
        OpenError::SecretReadable {
            path: path.clone(),
            mode: 0o640
        }
    );
    assert!(
        refused
            .to_string()
            .contains(&format!("chmod 600 {}", path.display())),
        "{refused}"
    );
}

#[test]
fn a_secret_of_the_wrong_length_is_refused() {
    for wrong in [&b"short"[..], &[7; 33], b""] {
        let ground = Ground::directory();
        drop(ground.open());
        let path = data(&ground).join("install-secret");
        fs::write(&path, wrong).unwrap();
        let refused = Store::open(&Settings::default(), Arc::clone(&ground.fs), at(0)).unwrap_err();
        assert_eq!(refused, OpenError::SecretDamaged { path });
    }
}

#[test]
fn times_and_grants_survive_reopening() {
    let ground = Ground::directory();
    filled(&ground);
    let store = ground.open();
    assert_found_again(&store);
    let expected = Variant {
        first_seen_at: at(1),
        ..variant(1, b"image", 60)
    };
    assert_eq!(only_variant(&store, "3"), expected);
    assert_eq!(
        store.grant(UPSTREAM, &repository("acme/secret"), &[1; 32]),
        Some(at(7))
    );
    assert_eq!(store.index_state(), IndexState::Ready);
}

#[test]
fn without_the_index_everything_is_found_again_from_the_files() {
    let ground = Ground::directory();
    filled(&ground);
    fs::remove_dir_all(data(&ground).join("index")).unwrap();
    let store = ground.open();
    assert_found_again(&store);
    assert_eq!(
        only_variant(&store, "3").confirmed_at,
        at(1),
        "the time in the file"
    );
    wait_until("listed from the index", || store.index.is_complete());
    assert_eq!(store.tags(None, 10).len(), 1);
}

#[test]
fn a_damaged_index_is_set_aside_and_everything_found_again_from_the_files() {
    for (name, damage) in [
        (
            "garbage",
            &(|path: &Path| fs::write(path, [0xa5; 4096]).unwrap()) as &dyn Fn(&Path),
        ),
        ("emptied", &|path| fs::write(path, []).unwrap()),
        ("cut", &|path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("flipped", &|path| {
            let mut bytes = fs::read(path).unwrap();
            for place in (100..bytes.len()).step_by(97) {
                bytes[place] ^= 0x10;
            }
            fs::write(path, bytes).unwrap();
        }),
    ] {
        for file in ["db", "conf"] {
            let ground = Ground::directory();
            filled(&ground);
            damage(&data(&ground).join("index").join(file));
            let store = ground.open();
            assert_found_again(&store);
            wait_until("ready", || store.index_state() == IndexState::Ready);
            store.put_tag(&key("3"), variant(1, b"newer", 99)).unwrap();
            drop(store);
            let store = ground.open();
            let found = Variant {
                // Until when the tag named what it did before, only the lost index knew.
                history: Vec::new(),
                ..only_variant(&store, "3")
            };
            assert_eq!(found, variant(1, b"newer", 99), "{name} {file}");
        }
    }
}

#[test]
fn the_index_of_another_store_is_not_used() {
    let (ground, other) = (Ground::directory(), Ground::directory());
    filled(&ground);
    filled(&other);
    other
        .open()
        .put_grant(UPSTREAM, &repository("acme/others"), &[9; 32], at(7));
    fs::remove_dir_all(data(&ground).join("index")).unwrap();
    fs::rename(data(&other).join("index"), data(&ground).join("index")).unwrap();
    let store = ground.open();
    assert_found_again(&store);
    assert_eq!(store.grant(UPSTREAM, &repository("acme/others"), &[9; 32]), None);
    let names = ground.fs.list(Path::new("")).unwrap();
    assert_eq!(
        names
            .iter()
            .filter(|entry| entry.name.starts_with("index.broken-"))
            .count(),
        1
    );
}

#[test]
fn an_older_copy_of_the_index_is_not_used() {
    let ground = Ground::directory();
    filled(&ground);
    let copy = tempfile::tempdir().unwrap();
    for name in ["db", "conf"] {
        fs::copy(data(&ground).join("index").join(name), copy.path().join(name)).unwrap();
    }
    ground
        .open()
        .revoke_grant(UPSTREAM, &repository("acme/secret"), &[1; 32]);
    fs::remove_dir_all(data(&ground).join("index")).unwrap();
    fs::create_dir(data(&ground).join("index")).unwrap();
    for name in ["db", "conf"] {
        fs::copy(copy.path().join(name), data(&ground).join("index").join(name)).unwrap();
    }
    let store = ground.open();
    assert_eq!(
        store.grant(UPSTREAM, &repository("acme/secret"), &[1; 32]),
        None,
        "a dropped grant stays dropped"
    );
    assert_found_again(&store);
}

#[test]
fn an_index_that_cannot_be_made_leaves_the_store_working_and_is_made_once_it_can() {
    let ground = Ground::directory();
    filled(&ground);
    fs::remove_dir_all(data(&ground).join("index")).unwrap();
    fs::write(data(&ground).join("index"), b"a file where a folder should be").unwrap();
    let store = ground.open();
    assert_found_again(&store);
    keep_blob(&store, b"another").unwrap();
    store.put_tag(&key("4"), variant(1, b"image", 1)).unwrap();
    assert_eq!(store.tags(None, 10).len(), 2);
    assert!(matches!(store.index_state(), IndexState::Degraded { .. }));
    fs::remove_file(data(&ground).join("index")).unwrap();
    wait_until("ready", || store.index_state() == IndexState::Ready);
    assert!(
        !store.index.is_complete(),
        "it has missed what was kept meanwhile"
    );
    assert_eq!(store.tags(None, 10).len(), 2);
    store.tick(at(2));
    wait_until("filled from the files", || store.index.is_complete());
    assert_eq!(store.tags(None, 10).len(), 2);
}

#[test]
fn a_blob_that_lost_its_end_is_quarantined_and_a_miss() {
    let ground = Ground::directory();
    let large = vec![7; 100_000];
    {
        let store = ground.open();
        keep_blob(&store, &large).unwrap();
        store.close();
    }
    ground.overwrite(&ground.files("blobs")[0], &large[1..]);
    let store = ground.open();
    assert!(store.blob(&digest(&large)).unwrap().is_none());
    assert_eq!(ground.files("quarantine").len(), 1);
    keep_blob(&store, &large).unwrap();
    assert!(store.blob(&digest(&large)).unwrap().is_some());
}

#[test]
fn a_held_file_is_read_from_the_page_cache_or_says_that_it_is_not_there() {
    let ground = Ground::directory();
    let store = ground.open();
    keep_blob(&store, b"layer").unwrap();
    let held = store.blob(&digest(b"layer")).unwrap().unwrap();
    let mut bytes = [0; 16];
    match held.file.read_at_nowait(&mut bytes, 1) {
        Ok(read) => assert_eq!(&bytes[..read], b"ayer"),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
    }
    assert_eq!(held.file.read_at(&mut bytes, 5).unwrap(), 0, "the end");
}

#[test]
fn a_grant_taken_back_while_the_index_is_down_does_not_return_with_it() {
    let ground = Ground::directory();
    filled(&ground);
    let (index, away) = (data(&ground).join("index"), data(&ground).join("away"));
    fs::rename(&index, &away).unwrap();
    fs::write(&index, b"a file where a folder should be").unwrap();
    let store = ground.open();
    let degraded = || matches!(store.index_state(), IndexState::Degraded { .. });
    wait_until("degraded", degraded);
    store.revoke_grant(UPSTREAM, &repository("acme/secret"), &[1; 32]);
    store.put_grant(UPSTREAM, &repository("acme/new"), &[2; 32], at(9));
    store.index.flush();
    fs::remove_file(&index).unwrap();
    fs::rename(&away, &index).unwrap();
    wait_until("ready", || store.index_state() == IndexState::Ready);
    drop(store);
    let store = ground.open();
    assert_eq!(store.grant(UPSTREAM, &repository("acme/secret"), &[1; 32]), None);
    assert_eq!(
        store.grant(UPSTREAM, &repository("acme/new"), &[2; 32]),
        Some(at(9))
    );
}

/// The folder as `kill -9` would leave it now: what was written is there, what was only in memory is not.
fn as_killed(ground: &Ground) -> Ground {
    let left = Ground::directory();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(data(ground).join(&folder)).unwrap() {
            let name = folder.join(entry.unwrap().file_name());
            let (from, to) = (data(ground).join(&name), data(&left).join(&name));
            if from.is_dir() {
                fs::create_dir_all(&to).unwrap();
                folders.push(name);
            } else {
                fs::copy(&from, &to).unwrap();
            }
        }
    }
    left
}

#[test]
fn a_grant_taken_back_does_not_return_though_the_process_is_killed_at_once() {
    let ground = Ground::directory();
    filled(&ground);
    let store = ground.open();
    let (secret, principal) = (repository("acme/secret"), [1; 32]);
    assert_eq!(
        as_killed(&ground).open().grant(UPSTREAM, &secret, &principal),
        Some(at(7))
    );
    assert!(store.revoke_grant(UPSTREAM, &secret, &principal));
    assert_eq!(
        as_killed(&ground).open().grant(UPSTREAM, &secret, &principal),
        None
    );
}

#[test]
fn nor_if_the_index_was_down_when_it_was_taken_back() {
    let ground = Ground::directory();
    filled(&ground);
    let (index, away) = (data(&ground).join("index"), data(&ground).join("away"));
    fs::rename(&index, &away).unwrap();
    fs::write(&index, b"a file where a folder should be").unwrap();
    let store = ground.open();
    wait_until("degraded", || {
        matches!(store.index_state(), IndexState::Degraded { .. })
    });
    let (secret, principal) = (repository("acme/secret"), [1; 32]);
    assert!(store.revoke_grant(UPSTREAM, &secret, &principal));
    // The disk is well again, and the old index is back, before this process has noticed.
    let left = as_killed(&ground);
    fs::remove_file(data(&left).join("index")).unwrap();
    fs::rename(data(&left).join("away"), data(&left).join("index")).unwrap();
    let store = left.open();
    assert_eq!(store.grant(UPSTREAM, &secret, &principal), None);
    assert_found_again(&store);
}

#[test]
fn an_index_that_has_grown_is_made_small_while_it_is_used() {
    let ground = Ground::directory();
    let store = ground.open();
    store.put_tag(&key("3"), variant(1, b"image", 1)).unwrap();
    let name = |number: u16| [b"x".as_slice(), &number.to_be_bytes()].concat();
    for number in 0..2000 {
        store.index.put(name(number), vec![29; 4000]);
    }
    store.index.flush();
    for number in 100..2000 {
        store.index.remove(name(number));
    }
    store.index.flush();
    let length = || fs::metadata(data(&ground).join("index/db")).map_or(u64::MAX, |file| file.len());
    let before = length();
    assert!(before > 4 << 20, "{before}");
    wait_until("small", || length() * 2 < before);
    wait_until("ready", || store.index_state() == IndexState::Ready);
    assert_eq!(store.index.get(name(99)), Ok(Some(vec![29; 4000])));
    drop(store);
    assert_eq!(ground.open().tags(None, 10).len(), 1);
}

#[test]
fn an_index_that_lost_something_is_filled_again_without_anybody_asking() {
    let ground = Ground::directory();
    filled(&ground);
    fs::remove_dir_all(data(&ground).join("index")).unwrap();
    fs::write(data(&ground).join("index"), b"a file where a folder should be").unwrap();
    let store = ground.open();
    counted_usage(&store);
    fs::remove_file(data(&ground).join("index")).unwrap();
    wait_until("ready", || store.index_state() == IndexState::Ready);
    wait_until("complete", || {
        store.tick(at(5));
        store.index.is_complete()
    });
}

#[test]
fn what_the_index_knows_worse_than_the_files_is_put_right_and_the_rest_is_not_touched() {
    let ground = Ground::directory();
    let store = ground.open();
    for tag in ["old", "unknown", "newer", "strange"] {
        store.put_tag(&key(tag), variant(1, b"now", 100)).unwrap();
    }
    wait_until("complete", || {
        store.tick(at(2));
        store.index.is_complete()
    });
    let indexed = |tag: &str| {
        store
            .tags(None, 10)
            .into_iter()
            .find(|(known, _)| *known == key(tag))
    };
    let put = |tag: &str, content: &[u8], seconds| {
        let variants = vec![variant(1, content, seconds)];
        let packed = crate::store::tags::TagRecord { variants }.to_index(4000);
        store.index.put(key(tag).to_index(), packed);
    };
    put("old", b"before", 50);
    put("newer", b"after", 5_000_000_000);
    store.index.remove(key("unknown").to_index());
    store
        .index
        .put(key("strange").to_index(), b"[of another version".to_vec());
    store.index.set_complete(u64::MAX / 2);
    assert!(store.tags.reindex(&AtomicBool::new(false)));
    for (tag, content) in [
        ("old", b"now".as_slice()),
        ("unknown", b"now"),
        ("strange", b"now"),
        ("newer", b"after"),
    ] {
        let (_, record) = indexed(tag).unwrap();
        assert_eq!(record.variants[0].digest, digest(content), "{tag}");
    }
}
