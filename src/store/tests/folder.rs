//! Tests that need a local folder: the lock, permissions, and a durable index.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::*;

fn data(fixture: &Fixture) -> PathBuf {
    fixture.folder.as_ref().unwrap().path().join("data")
}

fn filled(fixture: &Fixture) {
    let store = fixture.open();
    put_blob(&store, b"layer").unwrap();
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

/// Asserts that everything is found except the data that only the index holds.
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
fn second_open_fails_and_names_the_process() {
    let fixture = Fixture::directory();
    let store = fixture.open();
    let second = Store::open(&Settings::default(), Arc::clone(&fixture.fs), at(0)).unwrap_err();
    let pid = std::process::id();
    assert_eq!(
        second,
        OpenError::Locked {
            folder: data(&fixture),
            pid: Some(pid)
        }
    );
    assert!(second.to_string().contains(&pid.to_string()), "{second}");
    drop(store);
    fixture.open();
}

#[test]
fn data_folder_is_accessible_to_the_owner_only() {
    let fixture = Fixture::directory();
    filled(&fixture);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&data(&fixture)), 0o700);
    assert_eq!(
        mode(&data(&fixture).join("index")),
        0o700,
        "sled's files are readable by all"
    );
    for file in ["install-secret", "LOCK", "store-id"]
        .map(PathBuf::from)
        .into_iter()
        .chain(fixture.files("refs"))
    {
        assert_eq!(mode(&data(&fixture).join(&file)), 0o600, "{}", file.display());
    }
    assert_eq!(
        mode(&data(&fixture).join(&fixture.files("blobs")[0])),
        0o400,
        "a blob is sealed"
    );
}

#[test]
fn readable_secret_is_rejected_with_a_remedy() {
    let fixture = Fixture::directory();
    drop(fixture.open());
    let path = data(&fixture).join("install-secret");
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    let refused = Store::open(&Settings::default(), Arc::clone(&fixture.fs), at(0)).unwrap_err();
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
fn secret_of_wrong_length_is_rejected() {
    for wrong in [&b"short"[..], &[7; 33], b""] {
        let fixture = Fixture::directory();
        drop(fixture.open());
        let path = data(&fixture).join("install-secret");
        fs::write(&path, wrong).unwrap();
        let refused = Store::open(&Settings::default(), Arc::clone(&fixture.fs), at(0)).unwrap_err();
        assert_eq!(refused, OpenError::SecretDamaged { path });
    }
}

#[test]
fn times_and_grants_survive_reopen() {
    let fixture = Fixture::directory();
    filled(&fixture);
    let store = fixture.open();
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
fn lost_index_is_rebuilt_from_the_files() {
    let fixture = Fixture::directory();
    filled(&fixture);
    fs::remove_dir_all(data(&fixture).join("index")).unwrap();
    let store = fixture.open();
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
fn corrupt_index_is_quarantined_and_rebuilt_from_the_files() {
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
            let fixture = Fixture::directory();
            filled(&fixture);
            damage(&data(&fixture).join("index").join(file));
            let store = fixture.open();
            assert_found_again(&store);
            wait_until("ready", || store.index_state() == IndexState::Ready);
            store.put_tag(&key("3"), variant(1, b"newer", 99)).unwrap();
            drop(store);
            let store = fixture.open();
            let found = Variant {
                // Only the lost index recorded how long the tag had its previous target.
                history: Vec::new(),
                ..only_variant(&store, "3")
            };
            assert_eq!(found, variant(1, b"newer", 99), "{name} {file}");
        }
    }
}

#[test]
fn index_of_another_store_is_not_used() {
    let (fixture, other) = (Fixture::directory(), Fixture::directory());
    filled(&fixture);
    filled(&other);
    other
        .open()
        .put_grant(UPSTREAM, &repository("acme/others"), &[9; 32], at(7));
    fs::remove_dir_all(data(&fixture).join("index")).unwrap();
    fs::rename(data(&other).join("index"), data(&fixture).join("index")).unwrap();
    let store = fixture.open();
    assert_found_again(&store);
    assert_eq!(store.grant(UPSTREAM, &repository("acme/others"), &[9; 32]), None);
    let names = fixture.fs.list(Path::new("")).unwrap();
    assert_eq!(
        names
            .iter()
            .filter(|entry| entry.name.starts_with("index.broken-"))
            .count(),
        1
    );
}

#[test]
fn older_copy_of_the_index_is_not_used() {
    let fixture = Fixture::directory();
    filled(&fixture);
    let copy = tempfile::tempdir().unwrap();
    for name in ["db", "conf"] {
        fs::copy(data(&fixture).join("index").join(name), copy.path().join(name)).unwrap();
    }
    fixture
        .open()
        .revoke_grant(UPSTREAM, &repository("acme/secret"), &[1; 32]);
    fs::remove_dir_all(data(&fixture).join("index")).unwrap();
    fs::create_dir(data(&fixture).join("index")).unwrap();
    for name in ["db", "conf"] {
        fs::copy(copy.path().join(name), data(&fixture).join("index").join(name)).unwrap();
    }
    let store = fixture.open();
    assert_eq!(
        store.grant(UPSTREAM, &repository("acme/secret"), &[1; 32]),
        None,
        "a dropped grant stays dropped"
    );
    assert_found_again(&store);
}

#[test]
fn store_works_without_index_and_creates_it_later() {
    let fixture = Fixture::directory();
    filled(&fixture);
    fs::remove_dir_all(data(&fixture).join("index")).unwrap();
    fs::write(data(&fixture).join("index"), b"a file where a folder should be").unwrap();
    let store = fixture.open();
    assert_found_again(&store);
    put_blob(&store, b"another").unwrap();
    store.put_tag(&key("4"), variant(1, b"image", 1)).unwrap();
    assert_eq!(store.tags(None, 10).len(), 2);
    assert!(matches!(store.index_state(), IndexState::Degraded { .. }));
    fs::remove_file(data(&fixture).join("index")).unwrap();
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
fn truncated_blob_is_quarantined() {
    let fixture = Fixture::directory();
    let large = vec![7; 100_000];
    {
        let store = fixture.open();
        put_blob(&store, &large).unwrap();
        store.close();
    }
    fixture.overwrite(&fixture.files("blobs")[0], &large[1..]);
    let store = fixture.open();
    assert!(store.blob(&digest(&large)).unwrap().is_none());
    assert_eq!(fixture.files("quarantine").len(), 1);
    put_blob(&store, &large).unwrap();
    assert!(store.blob(&digest(&large)).unwrap().is_some());
}

#[test]
fn nowait_read_returns_cached_bytes_or_would_block() {
    let fixture = Fixture::directory();
    let store = fixture.open();
    put_blob(&store, b"layer").unwrap();
    let held = store.blob(&digest(b"layer")).unwrap().unwrap();
    let mut bytes = [0; 16];
    match held.file.read_at_nowait(&mut bytes, 1) {
        Ok(read) => assert_eq!(&bytes[..read], b"ayer"),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
    }
    assert_eq!(held.file.read_at(&mut bytes, 5).unwrap(), 0, "the end");
}

#[test]
fn grant_revoked_while_index_is_down_stays_revoked() {
    let fixture = Fixture::directory();
    filled(&fixture);
    let (index, away) = (data(&fixture).join("index"), data(&fixture).join("away"));
    fs::rename(&index, &away).unwrap();
    fs::write(&index, b"a file where a folder should be").unwrap();
    let store = fixture.open();
    let degraded = || matches!(store.index_state(), IndexState::Degraded { .. });
    wait_until("degraded", degraded);
    store.revoke_grant(UPSTREAM, &repository("acme/secret"), &[1; 32]);
    store.put_grant(UPSTREAM, &repository("acme/new"), &[2; 32], at(9));
    store.index.flush();
    fs::remove_file(&index).unwrap();
    fs::rename(&away, &index).unwrap();
    wait_until("ready", || store.index_state() == IndexState::Ready);
    drop(store);
    let store = fixture.open();
    assert_eq!(store.grant(UPSTREAM, &repository("acme/secret"), &[1; 32]), None);
    assert_eq!(
        store.grant(UPSTREAM, &repository("acme/new"), &[2; 32]),
        Some(at(9))
    );
}

/// A copy of the folder as `kill -9` would leave it now: written data without data that is only in memory.
fn as_killed(fixture: &Fixture) -> Fixture {
    let left = Fixture::directory();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(data(fixture).join(&folder)).unwrap() {
            let name = folder.join(entry.unwrap().file_name());
            let (from, to) = (data(fixture).join(&name), data(&left).join(&name));
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
fn revoked_grant_stays_revoked_after_a_kill() {
    let fixture = Fixture::directory();
    filled(&fixture);
    let store = fixture.open();
    let (secret, principal) = (repository("acme/secret"), [1; 32]);
    assert_eq!(
        as_killed(&fixture).open().grant(UPSTREAM, &secret, &principal),
        Some(at(7))
    );
    assert!(store.revoke_grant(UPSTREAM, &secret, &principal));
    assert_eq!(
        as_killed(&fixture).open().grant(UPSTREAM, &secret, &principal),
        None
    );
}

#[test]
fn grant_revoked_with_index_down_stays_revoked_after_kill() {
    let fixture = Fixture::directory();
    filled(&fixture);
    let (index, away) = (data(&fixture).join("index"), data(&fixture).join("away"));
    fs::rename(&index, &away).unwrap();
    fs::write(&index, b"a file where a folder should be").unwrap();
    let store = fixture.open();
    wait_until("degraded", || {
        matches!(store.index_state(), IndexState::Degraded { .. })
    });
    let (secret, principal) = (repository("acme/secret"), [1; 32]);
    assert!(store.revoke_grant(UPSTREAM, &secret, &principal));
    // The disk works again and the old index is back before this process has noticed.
    let left = as_killed(&fixture);
    fs::remove_file(data(&left).join("index")).unwrap();
    fs::rename(data(&left).join("away"), data(&left).join("index")).unwrap();
    let store = left.open();
    assert_eq!(store.grant(UPSTREAM, &secret, &principal), None);
    assert_found_again(&store);
}

#[test]
fn grown_index_is_compacted_while_in_use() {
    let fixture = Fixture::directory();
    let store = fixture.open();
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
    let length = || fs::metadata(data(&fixture).join("index/db")).map_or(u64::MAX, |file| file.len());
    let before = length();
    assert!(before > 4 << 20, "{before}");
    wait_until("small", || length() * 2 < before);
    wait_until("ready", || store.index_state() == IndexState::Ready);
    assert_eq!(store.index.get(name(99)), Ok(Some(vec![29; 4000])));
    drop(store);
    assert_eq!(fixture.open().tags(None, 10).len(), 1);
}

#[test]
fn index_with_lost_writes_is_refilled() {
    let fixture = Fixture::directory();
    filled(&fixture);
    fs::remove_dir_all(data(&fixture).join("index")).unwrap();
    fs::write(data(&fixture).join("index"), b"a file where a folder should be").unwrap();
    let store = fixture.open();
    counted_usage(&store);
    fs::remove_file(data(&fixture).join("index")).unwrap();
    wait_until("ready", || store.index_state() == IndexState::Ready);
    wait_until("complete", || {
        store.tick(at(5));
        store.index.is_complete()
    });
}

#[test]
fn reindex_repairs_only_outdated_index_records() {
    let fixture = Fixture::directory();
    let store = fixture.open();
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
