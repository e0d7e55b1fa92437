//! Applying a plan, and undoing it.
//!
//! A plan starts from the files before the first application. Applying again with another address or upstream
//! therefore equals undoing and applying, and undoing restores the original state. The undo journal is on disk before
//! the first file changes, so that undoing works after an interruption at any point.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use super::clients::docker::{DAEMON, MIRRORS};
use super::edit::Text;
use super::edit::json::Object;
use super::journal::{self, FileState, Journal, WrittenFile};
use super::plan::{FileSource, Plan, difference};
use super::root_fs::{RootFs, Stored};
use super::{Client, SetupError};

/// A set of changes that is applied and undone together.
#[derive(Clone, Debug)]
pub struct Job {
    /// Name of its undo journal.
    name: String,
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
        Self::named(client.name(), &format!("setup {}", client.name()))
    }

    /// A job of another command.
    pub fn named(name: &str, command: &str) -> Self {
        Self {
            name: name.to_owned(),
            command: command.to_owned(),
        }
    }

    /// The files as they were before this job.
    pub(super) fn baseline<'a>(&'a self, root: &'a RootFs) -> Result<Baseline<'a>, SetupError> {
        Journal::load(&self.name, root).map(|journal| Baseline {
            job: self,
            root,
            journal,
        })
    }

    /// The state of each file of this job; `None` if it was never applied.
    pub fn states(&self, root: &RootFs) -> Result<Option<Vec<(PathBuf, FileState)>>, SetupError> {
        let journal = Journal::load(&self.name, root)?;
        let state_of = |(path, written): (&PathBuf, &WrittenFile)| {
            let now = root.load(path)?;
            Ok((path.clone(), written.state(now.as_ref())))
        };
        let states: Vec<_> = journal
            .files
            .iter()
            .map(state_of)
            .collect::<Result<_, SetupError>>()?;
        Ok((!states.is_empty()).then_some(states))
    }

    /// Plans and applies the changes.
    pub fn apply(
        &self,
        root: &RootFs,
        force: bool,
        plan: &dyn Fn(&dyn FileSource) -> Result<Plan, SetupError>,
    ) -> Result<Applied, SetupError> {
        let planned = || {
            let baseline = self.baseline(root)?;
            // A modification since the last application may be why the plan failed.
            let plan = plan(&baseline).map_err(|refused| match baseline.check_unmodified() {
                Err(changed) if !force => changed,
                _ => refused,
            })?;
            Ok((baseline, plan))
        };
        // Plan without the lock first, because locking creates files, and an error must leave nothing behind.
        planned()?;
        let _lock = journal::lock(root)?;
        let (baseline, plan) = planned()?;
        baseline.carry_out(Some(plan), force)
    }

    /// Restores all files.
    pub fn undo(&self, root: &RootFs, force: bool) -> Result<Applied, SetupError> {
        if self.baseline(root)?.journal.files.is_empty() {
            return Err(SetupError::NothingToUndo(self.command.clone()));
        }
        let _lock = journal::lock(root)?;
        let mut applied = self.baseline(root)?.carry_out(None, force)?;
        if !applied.notified.is_empty() && !names_mirrors(root) {
            applied.by_hand(
                "restart dockerd, because a reload does not remove a mirror that its file no longer names: \
                 systemctl restart docker",
            );
        }
        if self.name != Client::Docker.name() {
            applied.by_hand("restart the service, if the setup needed a restart");
        }
        Ok(applied)
    }
}

/// The files as they were before the job first changed them. A file that someone else modified since is read as it is.
pub(super) struct Baseline<'a> {
    job: &'a Job,
    root: &'a RootFs,
    journal: Journal,
}

impl FileSource for Baseline<'_> {
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, SetupError> {
        let original = self.original(path, self.root.load(path)?);
        Ok(original.map(|original| original.bytes))
    }

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>, SetupError> {
        let mut paths = self.root.list(folder)?;
        // Files that the job created did not exist before it.
        paths.retain(|path| {
            self.journal
                .files
                .get(path)
                .is_none_or(|written| written.before.is_some())
        });
        Ok(paths)
    }

    fn version_of(&self, program: &str) -> Option<String> {
        self.root.version_of(program)
    }
}

/// The change of one file.
pub(super) struct Change {
    path: PathBuf,
    /// The current file.
    now: Option<Stored>,
    /// The file that undoing restores.
    before: Option<Stored>,
    /// The desired content.
    after: Option<Vec<u8>>,
}

impl Change {
    fn is_needed(&self) -> bool {
        self.now.as_ref().map(|now| &now.bytes) != self.after.as_ref()
    }

    /// What undoing needs, if there is something to undo.
    fn written(&self) -> Option<(PathBuf, WrittenFile)> {
        let written = WrittenFile {
            before: self.before.clone(),
            after: self.after.clone()?,
            replaced: self.now.clone(),
        };
        let is_change = self.before.as_ref().map(|before| &before.bytes) != Some(&written.after);
        is_change.then(|| (self.path.clone(), written))
    }

    pub(super) fn write(&self, root: &RootFs) -> Result<(), SetupError> {
        if !self.is_needed() {
            return Ok(());
        }
        // Another process may have changed the file since it was read.
        if root.load(&self.path)? != self.now {
            let (what, remedy) = ("was modified during this command", "Run the command again.");
            return Err(SetupError::conflict(&root.resolve(&self.path), what, remedy));
        }
        let former = self.before.as_ref().or(self.now.as_ref());
        match &self.after {
            Some(bytes) => root.write(&self.path, bytes, former.map(|file| file.owner)),
            None => root.remove(&self.path),
        }
    }
}

impl Baseline<'_> {
    fn original(&self, path: &Path, now: Option<Stored>) -> Option<Stored> {
        match self.journal.files.get(path) {
            Some(written) if written.state(now.as_ref()) != FileState::Changed => written.before.clone(),
            _ => now,
        }
    }

    /// Fails if a written file was modified since, so that the modification is not lost.
    fn check_unmodified(&self) -> Result<(), SetupError> {
        for (path, written) in &self.journal.files {
            let now = self.root.load(path)?;
            if written.state(now.as_ref()) == FileState::Changed {
                let now = now.map(|now| now.bytes).unwrap_or_default();
                return Err(SetupError::Changed {
                    job: self.job.command.clone(),
                    path: self.root.resolve(path),
                    difference: difference(&written.after, &now),
                });
            }
        }
        Ok(())
    }

    /// The change of each planned file, and of earlier written files that the plan omits. Without a plan, those that
    /// undo the job.
    pub(super) fn changes(&self, plan: Option<&Plan>) -> Result<Vec<Change>, SetupError> {
        let planned = plan.map_or(&[][..], |plan| &plan.files);
        let paths = planned.iter().map(|desired| &desired.path);
        let paths: BTreeSet<&PathBuf> = paths.chain(self.journal.files.keys()).collect();
        let change_of = |path: &PathBuf| {
            let now = self.root.load(path)?;
            let before = match self.journal.files.get(path) {
                Some(written) if plan.is_none() => written.before.clone(),
                _ => self.original(path, now.clone()),
            };
            let desired = planned.iter().find(|desired| desired.path == *path);
            let after = desired.map(|desired| &desired.bytes);
            Ok(Change {
                path: path.clone(),
                after: after.or(before.as_ref().map(|before| &before.bytes)).cloned(),
                now,
                before,
            })
        };
        paths.into_iter().map(change_of).collect()
    }

    /// Carries out the plan, or without one undoes the job.
    fn carry_out(&self, plan: Option<Plan>, force: bool) -> Result<Applied, SetupError> {
        let changes = self.changes(plan.as_ref())?;
        let is_undo = plan.is_none();
        let plan = plan.unwrap_or_default();
        let mut applied = Applied {
            notes: plan.notes,
            ..Applied::default()
        };
        if !is_undo && !changes.iter().any(Change::is_needed) {
            return Ok(applied);
        }
        if !force {
            self.check_unmodified()?;
        }
        self.write(&changes)?;
        applied.by_hand = plan.by_hand;
        for change in changes.iter().filter(|change| change.is_needed()) {
            let action = match (&change.now, &change.after) {
                (_, None) => "removed",
                _ if is_undo => "restored",
                (None, _) => "created",
                _ => "changed",
            };
            let path = self.root.resolve(&change.path);
            applied.changed.push(format!("{action} {}", path.display()));
        }
        let is_read = |change: &Change| change.path == Path::new(DAEMON) && (is_undo || change.is_needed());
        if changes.iter().any(is_read) {
            applied.reload_dockerd(self.root);
        }
        Ok(applied)
    }

    /// The journal until the files are in place, which also has those that are taken back, and the one after that.
    pub(super) fn journals(&self, changes: &[Change]) -> (Journal, Journal) {
        let written = || changes.iter().filter_map(Change::written);
        let mut interim = self.journal.clone();
        interim.files.extend(written());
        let folders = interim
            .files
            .keys()
            .flat_map(|path| self.root.missing_folders(path));
        interim.folders.extend(folders);
        let mut next = Journal {
            files: written().collect(),
            folders: interim.folders.clone(),
        };
        next.files
            .values_mut()
            .for_each(|written| written.replaced = None);
        (interim, next)
    }

    /// Writes the journal, then the files. On failure the files that were already written are restored.
    pub(super) fn write(&self, changes: &[Change]) -> Result<(), SetupError> {
        let name = &self.job.name;
        let (interim, next) = self.journals(changes);
        interim.save(name, self.root)?;
        for (position, change) in changes.iter().enumerate() {
            if let Err(refused) = change.write(self.root) {
                // A write fails after its rename if the folder cannot be synced. A conflict is found before it.
                let is_begun = !matches!(refused, SetupError::Conflict { .. });
                self.roll_back(changes, position + usize::from(is_begun), &next);
                return Err(refused);
            }
        }
        next.save(name, self.root)?;
        self.root.remove_empty(&next.folders);
        Ok(())
    }

    /// Restores the first `begun` files, and the former journal if all of them are as before. Otherwise the interim
    /// journal stays, because it alone has the originals: `--undo` restores the remainder.
    pub(super) fn roll_back(&self, changes: &[Change], begun: usize, next: &Journal) {
        let begun = changes.iter().take(begun);
        let remaining = begun.filter(|change| !self.take_back(change)).count();
        if remaining == 0 {
            let _ = self.journal.save(&self.job.name, self.root);
            self.root.remove_empty(&next.folders);
        }
    }

    /// Whether the file is as before this command, or could be restored.
    fn take_back(&self, change: &Change) -> bool {
        let Ok(current) = self.root.load(&change.path) else {
            return false;
        };
        if current == change.now || !change.is_needed() {
            return true;
        }
        // Someone else's modification is not overwritten.
        if current.map(|current| current.bytes) != change.after {
            return false;
        }
        let taken_back = match &change.now {
            Some(now) => self.root.write(&change.path, &now.bytes, Some(now.owner)),
            None => self.root.remove(&change.path),
        };
        taken_back.is_ok()
    }
}

impl Applied {
    fn by_hand(&mut self, step: &str) {
        self.by_hand.push(step.to_owned());
    }

    /// dockerd reloads its mirrors on SIGHUP without affecting running containers.
    fn reload_dockerd(&mut self, root: &RootFs) {
        let Some(process) = dockerd(root) else {
            let note = "dockerd is not running; it reads the file at its start";
            return self.notes.push(note.to_owned());
        };
        let pid = process.as_raw_nonzero();
        if kill_process(process, Signal::HUP).is_ok() {
            self.notified.push(format!("reloaded dockerd (process {pid})"));
        } else {
            self.by_hand
                .push(format!("reload dockerd as root: kill -HUP {pid}"));
        }
    }
}

/// Whether `daemon.json` sets mirrors. On SIGHUP dockerd keeps settings that the file does not contain.
fn names_mirrors(root: &RootFs) -> bool {
    let text = Text::read(DAEMON, root);
    text.is_ok_and(|text| Object::read(&text).is_ok_and(|object| object.get(MIRRORS).is_some()))
}

/// The process of dockerd's pid file, if it is a dockerd.
fn dockerd(root: &RootFs) -> Option<Pid> {
    let files = ["/run/docker.pid", "/var/run/docker.pid"];
    files.iter().find_map(|path| {
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
        for (kind, lines) in [
            ("", &self.changed),
            ("", &self.notified),
            ("to do: ", &self.by_hand),
            ("note: ", &self.notes),
        ] {
            for line in lines {
                writeln!(f, "{kind}{line}")?;
            }
        }
        Ok(())
    }
}
