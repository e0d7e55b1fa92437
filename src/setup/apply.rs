//! Applying a plan, and undoing it.
//!
//! A plan starts from the files before the first application. Applying again with another address or upstream
//! therefore equals undoing and applying, and undoing restores the original state. The undo record is on disk before
//! the first file changes, so that undoing works after an interruption at any point.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use super::baseline::Baseline;
use super::plan::{FileSource, Plan};
use super::root_fs::RootFs;
use super::undo::{BackupDir, FileState};
use super::{Client, SetupError};

/// Configuration that dockerd reloads on SIGHUP.
const DAEMON: &str = "/etc/docker/daemon.json";

/// A set of changes that is applied and undone together.
#[derive(Clone, Debug)]
pub struct Job {
    /// Folder of its undo record.
    record_name: String,
    /// The command line, for messages.
    command: String,
}

/// Report of an applied or undone job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// One line per changed file.
    pub changed: Vec<String>,
    /// Processes that were notified.
    pub notified: Vec<String>,
    /// Remaining manual steps, if anything was changed.
    pub by_hand: Vec<String>,
    /// Notes.
    pub notes: Vec<String>,
}

impl Job {
    /// `ifnewer setup <client>`.
    pub fn setup(client: Client) -> Self {
        Self {
            record_name: client.name().to_owned(),
            command: format!("setup {}", client.name()),
        }
    }

    /// A job of another command.
    pub fn named(record_name: &str, command: &str) -> Self {
        Self {
            record_name: record_name.to_owned(),
            command: command.to_owned(),
        }
    }

    /// The files as they were before this job.
    pub(super) fn baseline<'a>(&self, root: &'a RootFs) -> Result<Baseline<'a>, SetupError> {
        Baseline::open(&self.record_name, root)
    }

    /// The state of each file of this job; `None` if it was never applied.
    pub fn states(&self, root: &RootFs) -> Result<Option<Vec<(PathBuf, FileState)>>, SetupError> {
        let Some(record) = BackupDir::of(&self.record_name, root).load()? else {
            return Ok(None);
        };
        let states = record.files.iter().map(|written| {
            let now = root.read(&written.path)?;
            Ok((written.path.clone(), written.state(now.as_deref())))
        });
        states.collect::<Result<_, _>>().map(Some)
    }

    /// Plans and applies the changes.
    pub fn apply(
        &self,
        root: &RootFs,
        force: bool,
        plan: &dyn Fn(&dyn FileSource) -> Result<Plan, SetupError>,
    ) -> Result<Applied, SetupError> {
        // Plan without the lock first, because locking creates files, and an error must leave nothing behind.
        self.baseline(root)?.plan(force, &self.command, plan)?;
        let _lock = BackupDir::of(&self.record_name, root).lock()?;
        let baseline = self.baseline(root)?;
        let plan = baseline.plan(force, &self.command, plan)?;
        let changes = baseline.changes(&plan)?;
        let mut applied = Applied {
            notes: plan.notes.clone(),
            ..Applied::default()
        };
        if changes.iter().all(|change| change.now == change.after) {
            return Ok(applied);
        }
        if !force {
            baseline.check_unmodified(&self.command)?;
        }
        baseline.apply_changes(&changes)?;
        for change in changes.iter().filter(|change| change.now != change.after) {
            let action = match (&change.now, &change.after) {
                (None, _) => "created",
                (_, None) => "removed",
                _ => "changed",
            };
            applied
                .changed
                .push(format!("{action} {}", root.resolve(&change.path).display()));
        }
        applied.by_hand.clone_from(&plan.by_hand);
        if changes
            .iter()
            .any(|change| change.now != change.after && change.path == Path::new(DAEMON))
        {
            applied.reload_dockerd(root);
        }
        Ok(applied)
    }

    /// Restores all files.
    pub fn undo(&self, root: &RootFs, force: bool) -> Result<Applied, SetupError> {
        let backup = BackupDir::of(&self.record_name, root);
        if backup.load()?.is_none() {
            return Err(SetupError::NothingToUndo(self.command.clone()));
        }
        let _lock = backup.lock()?;
        let baseline = self.baseline(root)?;
        let Some(record) = &baseline.record else {
            return Err(SetupError::NothingToUndo(self.command.clone()));
        };
        if !force {
            baseline.check_unmodified(&self.command)?;
        }
        let mut applied = Applied::default();
        for written in &record.files {
            let now = root.read(&written.path)?;
            let path = root.resolve(&written.path);
            if written.state(now.as_deref()) == FileState::AsBefore {
                continue;
            }
            if let Some(former) = &written.before {
                root.write(
                    &written.path,
                    &backup.read_bytes(&former.digest)?,
                    Some(former.owner),
                )?;
                applied.changed.push(format!("restored {}", path.display()));
            } else {
                root.remove(&written.path)?;
                applied.changed.push(format!("removed {}", path.display()));
            }
        }
        for folder in record.folders.iter().rev() {
            root.remove_folder(folder);
        }
        backup.clear()?;
        if record.find(Path::new(DAEMON)).is_some() {
            applied.reload_dockerd(root);
            if !applied.notified.is_empty() && !names_mirrors(root)? {
                applied.by_hand.push(
                    "restart dockerd, because a reload does not remove a mirror that its file no longer names: \
                     systemctl restart docker"
                        .to_owned(),
                );
            }
        }
        if self.record_name != Client::Docker.name() {
            applied
                .by_hand
                .push("restart the service, if the setup needed a restart".to_owned());
        }
        Ok(applied)
    }
}

impl Applied {
    /// dockerd reloads its mirrors on SIGHUP without affecting running containers.
    fn reload_dockerd(&mut self, root: &RootFs) {
        match dockerd(root) {
            Some(pid) if kill_process(pid, Signal::HUP).is_ok() => {
                self.notified
                    .push(format!("reloaded dockerd (process {})", pid.as_raw_nonzero()));
            }
            Some(pid) => self.by_hand.push(format!(
                "reload dockerd as root: kill -HUP {0}",
                pid.as_raw_nonzero()
            )),
            None => self
                .notes
                .push("dockerd is not running; it reads the file at its start".to_owned()),
        }
    }
}

/// Whether `daemon.json` sets mirrors. On SIGHUP dockerd keeps settings that the file does not contain.
fn names_mirrors(root: &RootFs) -> Result<bool, SetupError> {
    let bytes = root.read(Path::new(DAEMON))?.unwrap_or_default();
    let object: Option<serde_json::Map<String, serde_json::Value>> = serde_json::from_slice(&bytes).ok();
    Ok(object.is_some_and(|object| object.contains_key("registry-mirrors")))
}

/// The process of dockerd's pid file, if it is a dockerd.
fn dockerd(root: &RootFs) -> Option<Pid> {
    ["/run/docker.pid", "/var/run/docker.pid"]
        .iter()
        .find_map(|path| {
            let text = fs::read_to_string(root.resolve(Path::new(path))).ok()?;
            let pid = Pid::from_raw(text.trim().parse().ok()?)?;
            let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).ok()?;
            (name.trim() == "dockerd").then_some(pid)
        })
}

impl Display for Applied {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.changed.is_empty() {
            writeln!(f, "nothing to do: all files are up to date")?;
        }
        for line in self.changed.iter().chain(&self.notified) {
            writeln!(f, "{line}")?;
        }
        for line in &self.by_hand {
            writeln!(f, "to do: {line}")?;
        }
        for line in &self.notes {
            writeln!(f, "note: {line}")?;
        }
        Ok(())
    }
}
