//! Applying, applying again and undoing, with the originals restored byte for byte.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::TempDir;

use super::*;

pub(super) const DAEMON: &str = "/etc/docker/daemon.json";

/// A root in a temporary folder.
pub(super) struct Host {
    folder: TempDir,
    pub(super) root: RootFs,
}

impl Host {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = RootFs::open(folder.path()).unwrap();
        Self { folder, root }
    }

    pub(super) fn resolve(&self, path: &str) -> PathBuf {
        self.root.resolve(Path::new(path))
    }

    pub(super) fn put(&self, path: &str, bytes: &[u8]) {
        let full_path = self.resolve(path);
        fs::create_dir_all(full_path.parent().unwrap()).unwrap();
        fs::write(full_path, bytes).unwrap();
    }

    pub(super) fn text(&self, path: &str) -> String {
        fs::read_to_string(self.resolve(path)).unwrap()
    }

    pub(super) fn apply(&self, endpoint: &CacheEndpoint, force: bool) -> Result<Applied, SetupError> {
        let options = Options {
            force,
            ..options(Client::Docker)
        };
        Job::setup(Client::Docker).apply(&self.root, force, &|files| plan_for(endpoint, &options, files))
    }

    pub(super) fn undo(&self, force: bool) -> Result<Applied, SetupError> {
        undo(Client::Docker, force, &self.root)
    }

    /// Every file and folder except the lock.
    pub(super) fn all(&self) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.starts_with(self.resolve("/var/lib/ifnewer-setup"))
                    || path == self.resolve("/var/lib")
                {
                    continue;
                }
                let is_folder = path.is_dir();
                found.insert(
                    path.clone(),
                    (!is_folder).then(|| fs::read(&path).unwrap_or_default()),
                );
                if is_folder {
                    folders.push(path);
                }
            }
        }
        found.remove(&self.resolve("/var"));
        found
    }
}

#[test]
fn undo_restores_files_byte_for_byte() {
    let before: [Option<&[u8]>; 7] = [
        None,
        Some(b""),
        Some(b"{}"),
        Some(b"\xef\xbb\xbf{ }\r\n"),
        Some(b"{\"a\":1}"),
        Some(b"{\r\n \"a\" : 1\r\n}\r\n\r\n"),
        Some(b"{\n\t\"registry-mirrors\": [],\n\t\"b\": 2}"),
    ];
    for bytes in before {
        let host = Host::new();
        if let Some(bytes) = bytes {
            host.put(DAEMON, bytes);
        }
        let all = host.all();
        let done = host.apply(&remote(), false).unwrap();
        assert_eq!(done.changed.len(), 2, "{done}");
        assert!(host.text(DAEMON).contains("https://cache.example.org:5000"));
        host.undo(false).unwrap();
        assert_eq!(host.all(), all, "{bytes:?}");
    }
}

#[test]
fn the_second_time_changes_nothing_and_says_so() {
    let host = Host::new();
    host.put(DAEMON, b"{\"a\":1}");
    host.apply(&local(), false).unwrap();
    let modified = fs::metadata(host.resolve(DAEMON)).unwrap().modified().unwrap();
    let done = host.apply(&local(), false).unwrap();
    assert!(done.changed.is_empty());
    assert!(done.to_string().starts_with("nothing to do"), "{done}");
    assert_eq!(
        fs::metadata(host.resolve(DAEMON)).unwrap().modified().unwrap(),
        modified
    );
    host.undo(false).unwrap();
    assert_eq!(host.text(DAEMON), "{\"a\":1}");
}

#[test]
fn reapply_replaces_address_and_undo_restores_original() {
    let host = Host::new();
    host.put(DAEMON, b"{\"a\":1}");
    let all = host.all();
    host.apply(&remote(), false).unwrap();
    host.apply(&local(), false).unwrap();
    assert!(
        !host.text(DAEMON).contains("cache.example.org"),
        "{}",
        host.text(DAEMON)
    );
    assert!(
        !host
            .resolve("/etc/docker/certs.d/cache.example.org:5000/ca.crt")
            .exists()
    );
    host.undo(false).unwrap();
    assert_eq!(host.all(), all);
}

#[test]
fn mode_owner_and_link_stay() {
    let host = Host::new();
    host.put("/srv/daemon.json", b"{\"a\":1}");
    fs::set_permissions(
        host.resolve("/srv/daemon.json"),
        fs::Permissions::from_mode(0o640),
    )
    .unwrap();
    fs::create_dir_all(host.resolve("/etc/docker")).unwrap();
    symlink("../../srv/daemon.json", host.resolve(DAEMON)).unwrap();
    host.apply(&local(), false).unwrap();
    assert!(host.resolve(DAEMON).is_symlink());
    assert!(host.text("/srv/daemon.json").contains("registry-mirrors"));
    let mode = |path: &str| fs::metadata(host.resolve(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("/srv/daemon.json"), 0o640);
    host.undo(false).unwrap();
    assert!(host.resolve(DAEMON).is_symlink());
    assert_eq!(host.text("/srv/daemon.json"), "{\"a\":1}");
    assert_eq!(mode("/srv/daemon.json"), 0o640);
}

#[test]
fn link_out_of_root_or_dangling_is_rejected() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("daemon.json"), "{}").unwrap();
    for target in [outside.path().join("daemon.json"), outside.path().join("absent")] {
        let host = Host::new();
        fs::create_dir_all(host.resolve("/etc/docker")).unwrap();
        symlink(&target, host.resolve(DAEMON)).unwrap();
        let refused = host.apply(&local(), false).unwrap_err();
        assert!(matches!(refused, SetupError::OutsideRoot { .. }), "{refused}");
        assert!(
            !host.resolve("/var").exists(),
            "nothing was written, not even a folder"
        );
    }
    assert_eq!(
        fs::read_to_string(outside.path().join("daemon.json")).unwrap(),
        "{}"
    );
}

#[test]
fn undo_record_stays_below_the_root() {
    let outside = tempfile::tempdir().unwrap();
    let host = Host::new();
    fs::create_dir_all(host.resolve("/var")).unwrap();
    symlink(outside.path(), host.resolve("/var/lib")).unwrap();
    assert!(matches!(
        host.apply(&local(), false),
        Err(SetupError::OutsideRoot { .. })
    ));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn rejected_plan_leaves_no_files() {
    for wrong in ["{", "[]", r#"{"registry-mirrors":["https://m"]}"#] {
        let host = Host::new();
        host.put(DAEMON, wrong.as_bytes());
        let all = host.all();
        host.apply(&local(), false).unwrap_err();
        assert_eq!(host.all(), all);
        assert!(!host.resolve("/var").exists());
    }
}

#[test]
fn modified_file_is_not_overwritten() {
    let host = Host::new();
    host.put(DAEMON, b"{\"a\":1}\n");
    host.apply(&local(), false).unwrap();
    let changed = host.text(DAEMON).replace("\"a\":1", "\"a\":1,\"b\":2");
    host.put(DAEMON, changed.as_bytes());
    for refused in [
        host.undo(false).unwrap_err(),
        host.apply(&remote(), false).unwrap_err(),
    ] {
        let told = refused.to_string();
        assert!(matches!(refused, SetupError::Changed { .. }), "{told}");
        assert!(
            told.contains("\n+{") && told.contains("\"b\":2"),
            "the difference is shown: {told}"
        );
        assert_eq!(host.text(DAEMON), changed);
    }
    let done = host.apply(&local(), false).unwrap();
    assert!(done.changed.is_empty(), "our part is still there: {done}");
    host.undo(true).unwrap();
    assert_eq!(host.text(DAEMON), "{\"a\":1}\n");
}

#[test]
fn what_was_taken_back_by_hand_is_no_change() {
    let host = Host::new();
    host.put(DAEMON, b"{\"a\":1}");
    host.apply(&local(), false).unwrap();
    host.put(DAEMON, b"{\"a\":1}");
    let states = Job::setup(Client::Docker).states(&host.root).unwrap().unwrap();
    assert_eq!(states, [(PathBuf::from(DAEMON), FileState::AsBefore)]);
    host.undo(false).unwrap();
    assert!(matches!(host.undo(false), Err(SetupError::NothingToUndo(_))));
}

#[test]
fn interrupted_apply_can_be_undone() {
    let host = Host::new();
    host.put(DAEMON, b"{\"a\":1}");
    let all = host.all();
    host.apply(&remote(), false).unwrap();
    // As after an interruption between the two files.
    host.put(DAEMON, b"{\"a\":1}");
    host.undo(false).unwrap();
    assert_eq!(host.all(), all);
}

#[test]
fn failed_apply_rolls_back() {
    let host = Host::new();
    host.put(DAEMON, b"{\"a\":1}");
    // The folder of the second file is a file, so that writing fails.
    host.put("/etc/docker/certs.d", b"");
    let all = host.all();
    host.apply(&remote(), false).unwrap_err();
    assert_eq!(host.all(), all);
    assert!(matches!(host.undo(false), Err(SetupError::NothingToUndo(_))));
}

#[test]
fn two_at_once_do_not_mix() {
    let host = Host::new();
    let lock = journal::lock(&host.root).unwrap();
    assert!(matches!(
        host.apply(&local(), false),
        Err(SetupError::Locked { .. })
    ));
    drop(lock);
    host.apply(&local(), false).unwrap();
}

const JOURNAL: &str = "/var/lib/ifnewer-setup/docker.json";

#[test]
fn saved_originals_are_readable_by_owner_only() {
    let host = Host::new();
    host.put(DAEMON, b"{\"token\":1}");
    host.apply(&local(), false).unwrap();
    let mode = fs::metadata(host.resolve(JOURNAL)).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0);
}

#[test]
fn a_damaged_record_is_not_believed() {
    let host = Host::new();
    host.put(DAEMON, b"{\"a\":1}");
    host.apply(&local(), false).unwrap();
    let applied = host.text(DAEMON);
    let journal = host.text(JOURNAL);
    let original = "eyJhIjoxfQ==";
    assert!(journal.contains(original), "{journal}");
    for (damaged, part) in [
        (
            journal.replace(original, "eyJhIjoyfQ=="),
            "damaged (its digest differs)",
        ),
        (journal.replace("420", "511"), "damaged (its digest differs)"),
        (journal[..journal.len() / 2].to_owned(), "damaged (EOF"),
        (String::new(), "damaged (EOF"),
        (
            journal.replace("\"version\": 2", "\"version\": 3"),
            "version 3, which this ifnewer does not support",
        ),
    ] {
        host.put(JOURNAL, damaged.as_bytes());
        for refused in [host.undo(false), host.undo(true), host.apply(&remote(), true)] {
            let told = refused.unwrap_err().to_string();
            assert!(
                told.contains(part) && told.contains("nothing was written"),
                "{told}"
            );
        }
        assert_eq!(host.text(DAEMON), applied, "nothing was half undone");
    }
}

#[test]
fn journal_of_an_earlier_version_is_refused() {
    let host = Host::new();
    host.put(DAEMON, b"{\"a\":1}");
    host.put("/var/lib/ifnewer-setup/docker/record.json", b"{\"version\":1}");
    for refused in [host.undo(false), host.apply(&local(), true)] {
        let told = refused.unwrap_err().to_string();
        assert!(told.contains("earlier ifnewer"), "{told}");
    }
    assert_eq!(host.text(DAEMON), "{\"a\":1}");
}

#[test]
fn undo_restores_bytes_that_are_not_text() {
    let host = Host::new();
    let ca = "/etc/docker/certs.d/cache.example.org:5000/ca.crt";
    host.put(ca, b"\x00\xff\r\n");
    host.apply(&remote(), false).unwrap();
    assert_eq!(host.text(ca), CA);
    host.undo(false).unwrap();
    assert_eq!(fs::read(host.resolve(ca)).unwrap(), b"\x00\xff\r\n");
}

/// The bad interleaving: a second application ends after its journal and before, between or after its files.
#[test]
fn interrupted_reapply_can_be_undone() {
    let second = CacheEndpoint {
        port: 6000,
        ..remote()
    };
    for files_done in 0..=3 {
        let host = Host::new();
        host.put(DAEMON, b"{\"a\":1}");
        let all = host.all();
        host.apply(&remote(), false).unwrap();
        let job = Job::setup(Client::Docker);
        let baseline = job.baseline(&host.root).unwrap();
        let plan = plan_for(&second, &options(Client::Docker), &baseline).unwrap();
        let changes = baseline.changes(Some(&plan)).unwrap();
        assert_eq!(changes.len(), 3, "the former CA is taken back");
        let (interim, _) = baseline.journals(&changes);
        interim.save("docker", &host.root).unwrap();
        for change in changes.iter().take(files_done) {
            change.write(&host.root).unwrap();
        }
        if files_done % 2 == 0 {
            host.apply(&second, false).unwrap();
            assert!(host.text(DAEMON).contains(":6000"));
        }
        host.undo(false).unwrap();
        assert_eq!(host.all(), all, "{files_done} files");
    }
}
