//! Planted links, failed writes, modes of folders, and originals taken from a journal by hand.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Command;

use super::applied::{DAEMON, Host};
use super::*;

/// The name under which a new `daemon.json` is written.
const TEMPORARY: &str = "/etc/docker/daemon.json.ifnewer-new";

#[test]
fn planted_link_does_not_lead_out_of_root() {
    let outside = tempfile::tempdir().unwrap();
    let (victim, absent) = (outside.path().join("shadow"), outside.path().join("absent"));
    fs::write(&victim, "root:x").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let owner = fs::metadata(&victim).unwrap().uid();
    for target in [&victim, &absent] {
        let host = Host::new();
        host.put(DAEMON, b"{\"a\":1}");
        if rustix::process::geteuid().is_root() {
            chown(host.resolve(DAEMON), Some(1234), Some(1234)).unwrap();
        }
        let before = fs::metadata(host.resolve(DAEMON)).unwrap();
        symlink(target, host.resolve(TEMPORARY)).unwrap();
        host.apply(&local(), false).unwrap();
        let after = fs::symlink_metadata(host.resolve(DAEMON)).unwrap();
        assert!(after.is_file(), "the link did not replace the file");
        assert_eq!((after.uid(), after.mode()), (before.uid(), before.mode()));
        assert!(host.text(DAEMON).contains("registry-mirrors"));
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "root:x");
    let kept = fs::metadata(&victim).unwrap();
    assert_eq!((kept.uid(), kept.mode() & 0o777), (owner, 0o600));
    assert!(!absent.exists(), "no file was created outside");
}

#[test]
fn leftover_of_an_interrupted_write_is_replaced() {
    let host = Host::new();
    host.put(TEMPORARY, b"half");
    fs::set_permissions(host.resolve(TEMPORARY), fs::Permissions::from_mode(0o666)).unwrap();
    host.apply(&local(), false).unwrap();
    assert!(!host.resolve(TEMPORARY).exists());
    assert!(host.text(DAEMON).starts_with('{'));
}

/// The bad interleaving: a file is renamed into place, and syncing its folder fails.
#[test]
fn failure_after_the_rename_keeps_the_original() {
    for can_be_taken_back in [true, false] {
        let host = Host::new();
        host.put(DAEMON, b"{\"a\":1}");
        let all = host.all();
        let job = Job::setup(Client::Docker);
        let baseline = job.baseline(&host.root).unwrap();
        let plan = plan_for(&local(), &options(Client::Docker), &baseline).unwrap();
        let changes = baseline.changes(Some(&plan)).unwrap();
        let (interim, next) = baseline.journals(&changes);
        interim.save("docker", &host.root).unwrap();
        changes[0].write(&host.root).unwrap();
        assert!(host.text(DAEMON).contains("registry-mirrors"));
        if !can_be_taken_back {
            // A folder under the temporary name makes the next write fail.
            fs::create_dir(host.resolve(TEMPORARY)).unwrap();
        }
        baseline.roll_back(&changes, 1, &next);
        if !can_be_taken_back {
            fs::remove_dir(host.resolve(TEMPORARY)).unwrap();
            assert!(host.text(DAEMON).contains("registry-mirrors"));
            host.undo(false).expect("the journal still has the original");
        }
        assert_eq!(host.all(), all);
        assert!(matches!(host.undo(false), Err(SetupError::NothingToUndo(_))));
    }
}

#[test]
fn rollback_keeps_a_modification_of_someone_else() {
    for is_begun in [false, true] {
        let host = Host::new();
        host.put(DAEMON, b"{\"a\":1}");
        let job = Job::setup(Client::Docker);
        let baseline = job.baseline(&host.root).unwrap();
        let plan = plan_for(&local(), &options(Client::Docker), &baseline).unwrap();
        let changes = baseline.changes(Some(&plan)).unwrap();
        host.put(DAEMON, b"{\"a\":2}");
        if is_begun {
            let (interim, next) = baseline.journals(&changes);
            interim.save("docker", &host.root).unwrap();
            baseline.roll_back(&changes, 1, &next);
            assert!(matches!(host.undo(false), Err(SetupError::Changed { .. })));
        } else {
            let refused = baseline.write(&changes).unwrap_err();
            assert!(conflict(&refused).contains("was modified during this command"));
            assert!(matches!(host.undo(false), Err(SetupError::NothingToUndo(_))));
        }
        assert_eq!(host.text(DAEMON), "{\"a\":2}");
    }
}

#[test]
fn only_the_journal_folder_is_restricted() {
    let host = Host::new();
    host.put(DAEMON, b"{}");
    let mode = |path: &str| fs::metadata(host.resolve(path)).unwrap().mode() & 0o777;
    host.apply(&local(), false).unwrap();
    assert_eq!((mode("/var"), mode("/var/lib")), (mode("/etc"), mode("/etc")));
    assert_eq!(mode("/var/lib/ifnewer-setup"), 0o700);
}

#[test]
fn documented_command_prints_the_original_bytes() {
    let journal = "/var/lib/ifnewer-setup/docker.json";
    let document = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/clients.md")).unwrap();
    let mut quoted = document.split('`');
    let command = quoted.find(|text| text.starts_with("jq ")).expect("the command");
    assert!(
        command.contains(journal) && command.ends_with("| base64 -d"),
        "{command}"
    );
    if Command::new("jq").arg("--version").output().is_err() {
        return;
    }
    let host = Host::new();
    host.put(DAEMON, b"{\"a\":1}");
    host.apply(&local(), false).unwrap();
    // Not UTF-8, without a newline at the end.
    let altered = host.text(journal).replace("eyJhIjoxfQ==", "AP8NCg3/");
    host.put(journal, altered.as_bytes());
    let command = command.replace(journal, &host.resolve(journal).display().to_string());
    let printed = Command::new("sh").args(["-c", &command]).output().unwrap();
    assert_eq!(printed.stdout, b"\x00\xff\r\n\r\xff", "{printed:?}");
}
