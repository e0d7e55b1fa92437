//! Tests of verdicts: restart, damage, limits, a full disk and power cuts.

use super::power_cut::PowerCutFs;
use super::*;
use crate::store::verdicts::{
    NOTE_BYTES_MAX, VERDICTS_MAX, VerdictError, VerdictKey, VerdictKind, VerdictNote, VerdictScope,
};

const ALPINE: &str = "library/alpine";

fn here() -> VerdictScope {
    VerdictScope::Repository {
        upstream: UPSTREAM.into(),
        repository: repository(ALPINE),
    }
}

fn verdict(kind: VerdictKind, scope: VerdictScope, content: &[u8]) -> VerdictKey {
    VerdictKey {
        kind,
        scope,
        digest: digest(content),
    }
}

fn block(scope: VerdictScope, content: &[u8]) -> VerdictKey {
    verdict(VerdictKind::Blocked, scope, content)
}

fn note(by: &str) -> VerdictNote {
    VerdictNote {
        at: at(7),
        by: by.to_owned(),
        reason: Some("CVE-2026-1".to_owned()),
    }
}

fn is_blocked(store: &Store, name: &str, content: &[u8]) -> bool {
    let found = store.verdict(
        VerdictKind::Blocked,
        UPSTREAM,
        &repository(name),
        &digest(content),
    );
    found.is_some()
}

fn is_approved(store: &Store, content: &[u8]) -> bool {
    let of = repository(ALPINE);
    let found = store.verdict(VerdictKind::Approved, UPSTREAM, &of, &digest(content));
    found.is_some()
}

#[test]
fn verdicts_survive_a_restart_in_their_scope() {
    on_every_fs(|fixture| {
        let approved = verdict(VerdictKind::Approved, here(), b"both");
        let keys = [
            block(VerdictScope::Everywhere, b"everywhere"),
            block(here(), b"here"),
            block(here(), b"both"),
        ];
        {
            let store = fixture.open();
            for key in keys.iter().chain([&approved]) {
                assert!(store.put_verdict(key, note("alice")).unwrap());
            }
            assert!(!store.put_verdict(&keys[0], note("bob")).unwrap());
            store.close();
        }
        let store = fixture.open();
        assert!(is_blocked(&store, "library/debian", b"everywhere"));
        assert!(is_blocked(&store, ALPINE, b"here"));
        assert!(!is_blocked(&store, "library/debian", b"here"));
        let other = store.verdict(
            VerdictKind::Blocked,
            "ghcr.io",
            &repository(ALPINE),
            &digest(b"here"),
        );
        assert_eq!(other, None, "another upstream");
        assert!(is_approved(&store, b"both") && !is_approved(&store, b"here"));
        let blocked = store.verdicts(VerdictKind::Blocked);
        assert_eq!(blocked.len(), 3);
        let (_, first) = blocked
            .iter()
            .find(|(key, _)| key.scope == VerdictScope::Everywhere)
            .unwrap();
        assert_eq!(**first, note("bob"), "the last note counts");

        for key in &keys {
            assert!(store.remove_verdict(key).unwrap());
            assert!(!store.remove_verdict(key).unwrap());
        }
        assert!(
            is_approved(&store, b"both"),
            "an approval is taken back by itself"
        );
        drop(store);
        let store = fixture.open();
        assert_eq!(store.verdicts(VerdictKind::Blocked), []);
        assert_eq!(fixture.files("blocks"), Vec::<PathBuf>::new());
    });
}

#[test]
fn damaged_block_holds_everywhere_until_taken_back() {
    on_every_fs(|fixture| {
        let key = block(here(), b"bad");
        fixture.open().put_verdict(&key, note("alice")).unwrap();
        let file = fixture.files("blocks").remove(0);
        fixture.overwrite(&file, b"{\"verdict\":\"blo");
        let store = fixture.open();
        assert!(is_blocked(&store, ALPINE, b"bad"));
        assert!(is_blocked(&store, "library/debian", b"bad"));
        let everywhere = block(VerdictScope::Everywhere, b"bad");
        assert!(store.remove_verdict(&everywhere).unwrap());
        assert_eq!(fixture.files("blocks"), Vec::<PathBuf>::new());
        drop(store);
        assert!(!is_blocked(&fixture.open(), ALPINE, b"bad"));
    });
}

#[test]
fn block_given_again_replaces_its_damaged_record() {
    on_every_fs(|fixture| {
        let key = block(here(), b"bad");
        fixture.open().put_verdict(&key, note("alice")).unwrap();
        let file = fixture.files("blocks").remove(0);
        fixture.overwrite(&file, b"garbage");
        let store = fixture.open();
        assert!(store.put_verdict(&key, note("bob")).unwrap());
        assert_eq!(store.verdicts(VerdictKind::Blocked).len(), 1);
        assert!(!is_blocked(&store, "library/debian", b"bad"));
        let everywhere = block(VerdictScope::Everywhere, b"bad");
        assert!(!store.remove_verdict(&everywhere).unwrap());
        drop(store);
        let store = fixture.open();
        assert!(is_blocked(&store, ALPINE, b"bad"));
        assert_eq!(fixture.files("blocks").len(), 1);
    });
}

#[test]
fn renamed_block_blocks_no_other_digest_silently() {
    on_every_fs(|fixture| {
        fixture
            .open()
            .put_verdict(&block(here(), b"bad"), note("alice"))
            .unwrap();
        let file = fixture.files("blocks").remove(0);
        let bytes = fixture.fs.read_file(&file, 4096).unwrap();
        let other = Path::new("blocks/00").join(format!("sha256-{}-00", digest(b"other").hex()));
        fixture.fs.write_durable(&other, &bytes).unwrap();
        fixture
            .fs
            .write_durable(Path::new("blocks/00/notes.txt"), b"hello")
            .unwrap();
        let store = fixture.open();
        let found = store.verdict(
            VerdictKind::Blocked,
            UPSTREAM,
            &repository(ALPINE),
            &digest(b"other"),
        );
        let reason = found.unwrap().reason.clone();
        assert_eq!(reason.as_deref(), Some("the record of this block is damaged"));
        assert_eq!(fixture.files("quarantine").len(), 1, "a foreign file");
    });
}

#[test]
fn damaged_approval_is_quarantined_and_does_not_hold() {
    on_every_fs(|fixture| {
        let key = verdict(VerdictKind::Approved, here(), b"new");
        fixture.open().put_verdict(&key, note("alice")).unwrap();
        let file = fixture.files("approvals").remove(0);
        fixture.overwrite(&file, b"garbage");
        assert!(!is_approved(&fixture.open(), b"new"));
        assert_eq!(fixture.files("quarantine").len(), 1);
    });
}

#[test]
fn verdicts_and_their_notes_are_bounded() {
    let store = Fixture::memory().open();
    for number in 0..VERDICTS_MAX {
        let key = block(VerdictScope::Everywhere, &number.to_be_bytes());
        store.put_verdict(&key, note("alice")).unwrap();
    }
    let more = block(VerdictScope::Everywhere, b"more");
    assert_eq!(
        store.put_verdict(&more, note("alice")),
        Err(VerdictError::TooMany)
    );
    let known = block(VerdictScope::Everywhere, &0_usize.to_be_bytes());
    let long = VerdictNote {
        at: at(8),
        by: "a\nb\u{1b}c".to_owned(),
        reason: Some("é".repeat(NOTE_BYTES_MAX)),
    };
    assert!(
        !store.put_verdict(&known, long).unwrap(),
        "a known one may change"
    );
    let found = store
        .verdict(VerdictKind::Blocked, UPSTREAM, &repository(ALPINE), &known.digest)
        .unwrap();
    assert_eq!(found.by, "abc");
    assert_eq!(found.reason.as_ref().unwrap().len(), NOTE_BYTES_MAX);
    store.remove_verdict(&known).unwrap();
    assert!(store.put_verdict(&more, note("alice")).unwrap());
}

#[test]
fn block_on_a_full_disk_holds_until_restart() {
    let memory = Arc::new(MemoryFs::new());
    let open = || {
        Store::open(
            &Settings::default(),
            Arc::clone(&memory) as Arc<dyn FileSystem>,
            at(0),
        )
        .unwrap()
    };
    let store = open();
    memory.set_bytes_max(0);
    let (blocked, approved) = (
        block(here(), b"bad"),
        verdict(VerdictKind::Approved, here(), b"new"),
    );
    let fault = store.put_verdict(&blocked, note("alice")).unwrap_err();
    assert!(matches!(fault, VerdictError::NotDurable(_)), "{fault}");
    assert!(store.put_verdict(&approved, note("alice")).is_err());
    assert!(is_blocked(&store, ALPINE, b"bad"));
    assert!(!is_approved(&store, b"new"));
    assert!(store.remove_verdict(&blocked).unwrap(), "it can be taken back");
    assert!(!is_blocked(&store, ALPINE, b"bad"));

    store.put_verdict(&blocked, note("alice")).unwrap_err();
    memory.set_bytes_max(u64::MAX);
    assert!(!store.put_verdict(&blocked, note("alice")).unwrap());
    drop(store);
    assert!(is_blocked(&open(), ALPINE, b"bad"), "the second try wrote it");
}

#[test]
fn power_cut_at_any_call_keeps_acknowledged_verdicts() {
    let (first, second) = (
        block(here(), b"first"),
        block(VerdictScope::Everywhere, b"second"),
    );
    let approved = verdict(VerdictKind::Approved, here(), b"first");
    for last in 0.. {
        let fs = Arc::new(PowerCutFs::new(last));
        let Ok(store) = Store::open(
            &Settings::default(),
            Arc::clone(&fs) as Arc<dyn FileSystem>,
            at(0),
        ) else {
            continue;
        };
        let put = |key: &VerdictKey| store.put_verdict(key, note("alice")).is_ok();
        let (is_kept, is_second, is_approval) = (put(&first), put(&second), put(&approved));
        let is_removed = store.remove_verdict(&second) == Ok(true);
        let is_disapproved = store.remove_verdict(&approved) == Ok(true);
        drop(store);
        for chance in 0..8 {
            let found = Store::open(&Settings::default(), Arc::new(fs.after_by_chance(chance)), at(9));
            let found = found.unwrap();
            assert!(!is_kept || is_blocked(&found, ALPINE, b"first"));
            assert!(!is_removed || !is_blocked(&found, ALPINE, b"second"));
            assert!(!is_disapproved || !is_approved(&found, b"first"));
            assert!(found.fs.list(Path::new("quarantine")).unwrap().is_empty());
        }
        if is_kept && is_second && is_approval && is_removed && is_disapproved {
            assert!(last > 10, "the scenario writes in {last} calls only");
            return;
        }
    }
}
