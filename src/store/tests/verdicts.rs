//! Tests of verdicts: restart, damage, limits, a full disk and power cuts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use parking_lot::Mutex;

use super::power_cut::PowerCutFs;
use super::*;
use crate::store::fs::{Entry, FsFile};
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
fn unblock_removes_every_damaged_record_of_a_digest() {
    on_every_fs(|fixture| {
        let elsewhere = VerdictScope::Repository {
            upstream: UPSTREAM.into(),
            repository: repository("library/debian"),
        };
        let everywhere = block(VerdictScope::Everywhere, b"bad");
        for keys in [
            vec![block(here(), b"bad"), block(elsewhere, b"bad")],
            vec![block(here(), b"bad"), everywhere.clone()],
        ] {
            let store = fixture.open();
            for key in &keys {
                store.put_verdict(key, note("alice")).unwrap();
            }
            drop(store);
            let mut files = fixture.files("blocks");
            files.retain(|file| {
                let bytes = fixture.fs.read_file(file, 4096).unwrap();
                !String::from_utf8_lossy(&bytes).contains("\"repository\":null")
            });
            for file in files {
                fixture.overwrite(&file, b"garbage");
            }
            let store = fixture.open();
            let listed = store.verdicts(VerdictKind::Blocked);
            assert_eq!(listed.len(), 1, "{listed:?}");
            assert_eq!(
                *listed[0].1 == note("alice"),
                keys.contains(&everywhere),
                "a readable note is kept"
            );
            // A block given again in between hides no damaged record.
            store.put_verdict(&everywhere, note("bob")).unwrap();
            assert!(store.remove_verdict(&everywhere).unwrap());
            assert_eq!(fixture.files("blocks"), Vec::<PathBuf>::new());
            drop(store);
            assert!(!is_blocked(&fixture.open(), ALPINE, b"bad"));
        }
    });
}

#[test]
fn block_here_keeps_a_block_everywhere_over_damage() {
    on_every_fs(|fixture| {
        let (in_alpine, everywhere) = (block(here(), b"bad"), block(VerdictScope::Everywhere, b"bad"));
        fixture.open().put_verdict(&in_alpine, note("alice")).unwrap();
        let file = fixture.files("blocks").remove(0);
        fixture.overwrite(&file, b"garbage");
        let store = fixture.open();
        store.put_verdict(&everywhere, note("bob")).unwrap();
        store.put_verdict(&in_alpine, note("carol")).unwrap();
        assert!(is_blocked(&store, "library/debian", b"bad"));
        drop(store);
        let store = fixture.open();
        assert!(is_blocked(&store, "library/debian", b"bad"));
        assert_eq!(store.verdicts(VerdictKind::Blocked).len(), 2);
        assert!(
            store
                .remove_verdicts_of(VerdictKind::Blocked, &digest(b"bad"))
                .unwrap()
        );
        assert_eq!(fixture.files("blocks"), Vec::<PathBuf>::new());
    });
}

#[test]
fn unreadable_approval_is_taken_back() {
    let memory = Arc::new(MemoryFs::new());
    let open = |is_readable| {
        let fs = Arc::new(Faulty {
            inner: Arc::clone(&memory),
            is_readable,
            hang: None,
        });
        Store::open(&Settings::default(), fs, at(0)).unwrap()
    };
    let approved = verdict(VerdictKind::Approved, here(), b"new");
    for by_digest in [false, true] {
        open(true).put_verdict(&approved, note("alice")).unwrap();
        let store = open(false);
        assert!(!is_approved(&store, b"new"));
        let take_back = || {
            if by_digest {
                store.remove_verdicts_of(VerdictKind::Approved, &approved.digest)
            } else {
                store.remove_verdict(&approved)
            }
        };
        assert_eq!(take_back(), Ok(true), "by digest: {by_digest}");
        assert_eq!(take_back(), Ok(false));
        drop(store);
        assert!(!is_approved(&open(true), b"new"));
    }
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
fn first_verdicts_are_the_first_of_all_in_order() {
    let store = Fixture::memory().open();
    let scopes = [VerdictScope::Everywhere, here()];
    for number in 0..20_u8 {
        let scope = scopes[usize::from(number % 2)].clone();
        store
            .put_verdict(&block(scope, &[number]), note("alice"))
            .unwrap();
        let approved = verdict(VerdictKind::Approved, here(), &[number]);
        store.put_verdict(&approved, note("bob")).unwrap();
    }
    let all = store.verdicts(VerdictKind::Blocked);
    assert!(all.len() == 20 && all.is_sorted_by_key(|(key, _)| key));
    for count_max in [0, 1, 7, 19, 20, 21] {
        let first = store.first_verdicts(VerdictKind::Blocked, count_max);
        assert_eq!(first.verdicts, all[..count_max.min(20)]);
        assert_eq!(first.total, 20);
    }
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
fn note_of_a_durable_block_is_lost_alone_on_full_disk() {
    let memory = Arc::new(MemoryFs::new());
    let store = Store::open(
        &Settings::default(),
        Arc::clone(&memory) as Arc<dyn FileSystem>,
        at(0),
    )
    .unwrap();
    let (durable, new) = (block(here(), b"bad"), block(here(), b"new"));
    store.put_verdict(&durable, note("alice")).unwrap();
    memory.set_bytes_max(0);
    let fault = store.put_verdict(&durable, note("bob")).unwrap_err();
    assert!(matches!(fault, VerdictError::NoteNotDurable(_)), "{fault}");
    for _ in 0..2 {
        let fault = store.put_verdict(&new, note("bob")).unwrap_err();
        assert!(matches!(fault, VerdictError::NotDurable(_)), "{fault}");
    }
    // Once its file is removed, it is new.
    store.remove_verdict(&durable).unwrap();
    let fault = store.put_verdict(&durable, note("bob")).unwrap_err();
    assert!(matches!(fault, VerdictError::NotDurable(_)), "{fault}");
}

/// A store whose first change of a block can hang; the receiver says that it hangs, the sender ends that.
fn hanging() -> (Arc<Faulty>, Store, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let (hang, reached, release) = Hang::new();
    let fs = Arc::new(Faulty {
        inner: Arc::new(MemoryFs::new()),
        is_readable: true,
        hang: Some(hang),
    });
    let store = Store::open(
        &Settings::default(),
        Arc::clone(&fs) as Arc<dyn FileSystem>,
        at(0),
    )
    .unwrap();
    (fs, store, reached, release)
}

/// Waits until the note of the block is by `by`. A test that hangs here is ended by its runner.
fn until_blocked_by(store: &Store, content: &[u8], by: &str) {
    loop {
        let found = store.verdict(
            VerdictKind::Blocked,
            UPSTREAM,
            &repository(ALPINE),
            &digest(content),
        );
        if found.is_some_and(|note| note.by == by) {
            return;
        }
        thread::yield_now();
    }
}

#[test]
fn block_holds_while_another_waits_for_the_disk() {
    let (fs, store, reached, release) = hanging();
    let (first, second) = (block(here(), b"first"), block(here(), b"second"));
    fs.arm();
    thread::scope(|scope| {
        // After a failed assertion, the drop ends the first write, so that the test does not hang.
        let release = ReleaseOnDrop(release);
        let one = scope.spawn(|| store.put_verdict(&first, note("alice")));
        reached.recv().unwrap();
        let two = scope.spawn(|| store.put_verdict(&second, note("bob")));
        until_blocked_by(&store, b"second", "bob");
        assert!(!one.is_finished() && !two.is_finished());
        drop(release);
        assert_eq!(one.join().unwrap(), Ok(true));
        assert_eq!(two.join().unwrap(), Ok(true));
    });
    drop(store);
    let store = Store::open(&Settings::default(), fs as Arc<dyn FileSystem>, at(0)).unwrap();
    assert!(is_blocked(&store, ALPINE, b"first") && is_blocked(&store, ALPINE, b"second"));
}

#[test]
fn block_given_during_its_removal_holds() {
    let (fs, store, reached, release) = hanging();
    let key = block(here(), b"bad");
    store.put_verdict(&key, note("alice")).unwrap();
    fs.arm();
    thread::scope(|scope| {
        let release = ReleaseOnDrop(release);
        let removal = scope.spawn(|| store.remove_verdict(&key));
        reached.recv().unwrap();
        let again = scope.spawn(|| store.put_verdict(&key, note("bob")));
        until_blocked_by(&store, b"bad", "bob");
        drop(release);
        assert_eq!(removal.join().unwrap(), Ok(true));
        assert_eq!(again.join().unwrap(), Ok(true), "the removal took the first one");
    });
    assert!(is_blocked(&store, ALPINE, b"bad"));
    drop(store);
    let store = Store::open(&Settings::default(), fs as Arc<dyn FileSystem>, at(0)).unwrap();
    assert!(is_blocked(&store, ALPINE, b"bad"));
}

struct ReleaseOnDrop(mpsc::Sender<()>);

impl Drop for ReleaseOnDrop {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
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

/// Stops the first removal of a block, or the first block that gets its name.
struct Hang {
    is_armed: AtomicBool,
    reached: mpsc::Sender<()>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Hang {
    fn new() -> (Self, mpsc::Receiver<()>, mpsc::Sender<()>) {
        let ((reached, is_reached), (release, go_on)) = (mpsc::channel(), mpsc::channel());
        let hang = Self {
            is_armed: AtomicBool::new(false),
            reached,
            go_on: Mutex::new(go_on),
        };
        (hang, is_reached, release)
    }

    fn hang(&self, path: &Path) {
        if path.starts_with("blocks") && self.is_armed.swap(false, Ordering::SeqCst) {
            self.reached.send(()).unwrap();
            self.go_on.lock().recv().unwrap();
        }
    }
}

/// An in-memory file system: approvals can be unreadable, changes of blocks can hang.
struct Faulty {
    inner: Arc<MemoryFs>,
    is_readable: bool,
    hang: Option<Hang>,
}

impl Faulty {
    fn arm(&self) {
        let hang = self.hang.as_ref().unwrap();
        hang.is_armed.store(true, Ordering::SeqCst);
    }
}

impl FileSystem for Faulty {
    fn folder(&self) -> Option<&Path> {
        None
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.inner.create(path)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        if path.starts_with("approvals") && !self.is_readable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.inner.open(path)
    }
    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.inner.append(path, bytes)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.hang.iter().for_each(|hang| hang.hang(to));
        self.inner.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.hang.iter().for_each(|hang| hang.hang(path));
        self.inner.remove(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_dir_all(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.sync_dir(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.inner.list(path)
    }
    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        self.inner.mode(path)
    }
    fn free_bytes(&self) -> io::Result<u64> {
        self.inner.free_bytes()
    }
}
