//! Carrying a plan out, and taking it back.
//!
//! A plan is made on what was there before our own last time, so that applying again with another address, or after
//! an upstream was added, is the same as undoing and applying; and undoing leads back to the very beginning. The record
//! is on the disk before the first file changes: whenever this is stopped, undoing works.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use super::before::Before;
use super::disk::Root;
use super::plan::{Files, Plan};
use super::record::{Shelf, State};
use super::{Client, Refused};

/// What dockerd reads again when it is told to.
const DAEMON: &str = "/etc/docker/daemon.json";

/// What is applied and undone as one.
#[derive(Clone, Debug)]
pub struct Job {
    /// The folder of its record.
    shelf: String,
    /// As it is called on the command line.
    words: String,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// One line for each file that was changed.
    pub changed: Vec<String>,
    /// What was told to whom.
    pub told: Vec<String>,
    /// What is left to do by hand, if anything was changed.
    pub by_hand: Vec<String>,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

impl Job {
    /// `ifnewer setup <client>`.
    pub fn setup(client: Client) -> Self {
        Self {
            shelf: client.name().to_owned(),
            words: format!("setup {}", client.name()),
        }
    }

    /// Another command that writes into others' files.
    pub fn named(shelf: &str, words: &str) -> Self {
        Self {
            shelf: shelf.to_owned(),
            words: words.to_owned(),
        }
    }

    /// The files as they were before this job.
    pub(super) fn former<'a>(&self, root: &'a Root) -> Result<Before<'a>, Refused> {
        Before::open(&self.shelf, root)
    }

    /// Each file of this job, and how it stands to what was written; `None` if it was never applied.
    pub fn states(&self, root: &Root) -> Result<Option<Vec<(PathBuf, State)>>, Refused> {
        let Some(record) = Shelf::of(&self.shelf, root).load()? else {
            return Ok(None);
        };
        let states = record.files.iter().map(|written| {
            let now = root.read(&written.path)?;
            Ok((written.path.clone(), written.state(now.as_deref())))
        });
        states.collect::<Result<_, _>>().map(Some)
    }

    /// Makes a plan and carries it out.
    pub fn apply(
        &self,
        root: &Root,
        force: bool,
        plan: &dyn Fn(&dyn Files) -> Result<Plan, Refused>,
    ) -> Result<Done, Refused> {
        // First without the lock, which writes: an objection must leave nothing behind, not even a folder.
        self.former(root)?.plan(force, &self.words, plan)?;
        let _lock = Shelf::of(&self.shelf, root).lock()?;
        let before = self.former(root)?;
        let plan = before.plan(force, &self.words, plan)?;
        let steps = before.steps(&plan)?;
        let mut done = Done {
            notes: plan.notes.clone(),
            ..Done::default()
        };
        if steps.iter().all(|step| step.now == step.after) {
            return Ok(done);
        }
        if !force {
            before.unchanged(&self.words)?;
        }
        before.carry_out(&steps)?;
        for step in steps.iter().filter(|step| step.now != step.after) {
            let deed = match (&step.now, &step.after) {
                (None, _) => "made",
                (_, None) => "removed",
                _ => "changed",
            };
            done.changed
                .push(format!("{deed} {}", root.place(&step.path).display()));
        }
        done.by_hand.clone_from(&plan.by_hand);
        if steps
            .iter()
            .any(|step| step.now != step.after && step.path == Path::new(DAEMON))
        {
            done.reload_dockerd(root);
        }
        Ok(done)
    }

    /// Puts everything back as it was before.
    pub fn undo(&self, root: &Root, force: bool) -> Result<Done, Refused> {
        let held = Shelf::of(&self.shelf, root);
        if held.load()?.is_none() {
            return Err(Refused::NothingDone(self.words.clone()));
        }
        let _lock = held.lock()?;
        let before = self.former(root)?;
        let Some(record) = &before.record else {
            return Err(Refused::NothingDone(self.words.clone()));
        };
        if !force {
            before.unchanged(&self.words)?;
        }
        let mut done = Done::default();
        for written in &record.files {
            let now = root.read(&written.path)?;
            let place = root.place(&written.path);
            if written.state(now.as_deref()) == State::AsBefore {
                continue;
            }
            if let Some(former) = &written.before {
                root.write(&written.path, &held.kept(&former.digest)?, Some(former.owner))?;
                done.changed.push(format!("put back {}", place.display()));
            } else {
                root.remove(&written.path)?;
                done.changed.push(format!("removed {}", place.display()));
            }
        }
        for folder in record.folders.iter().rev() {
            root.remove_folder(folder);
        }
        held.clear()?;
        if record.find(Path::new(DAEMON)).is_some() {
            done.reload_dockerd(root);
            if !done.told.is_empty() && !names_mirrors(root)? {
                done.by_hand.push(
                    "dockerd forgets a mirror that its file no longer names only when it is restarted: systemctl \
                     restart docker"
                        .to_owned(),
                );
            }
        }
        if self.shelf != Client::Docker.name() {
            done.by_hand
                .push("restart the service, if it was restarted for this".to_owned());
        }
        Ok(done)
    }
}

impl Done {
    /// dockerd reads its mirrors again on SIGHUP, and running containers notice nothing.
    fn reload_dockerd(&mut self, root: &Root) {
        match dockerd(root) {
            Some(pid) if kill_process(pid, Signal::HUP).is_ok() => {
                self.told.push(format!(
                    "told dockerd (process {}) to read its configuration again",
                    pid.as_raw_nonzero()
                ));
            }
            Some(pid) => self.by_hand.push(format!(
                "dockerd (process {0}) could not be told; as root: kill -HUP {0}",
                pid.as_raw_nonzero()
            )),
            None => self
                .notes
                .push("no dockerd runs here; it reads the file when it starts".to_owned()),
        }
    }
}

/// Whether `daemon.json` says anything about mirrors: what it says nothing about stays as it is on SIGHUP.
fn names_mirrors(root: &Root) -> Result<bool, Refused> {
    let bytes = root.read(Path::new(DAEMON))?.unwrap_or_default();
    let object: Option<serde_json::Map<String, serde_json::Value>> = serde_json::from_slice(&bytes).ok();
    Ok(object.is_some_and(|object| object.contains_key("registry-mirrors")))
}

/// The daemon that its pid file names, if the process is one.
fn dockerd(root: &Root) -> Option<Pid> {
    ["/run/docker.pid", "/var/run/docker.pid"]
        .iter()
        .find_map(|path| {
            let text = fs::read_to_string(root.place(Path::new(path))).ok()?;
            let pid = Pid::from_raw(text.trim().parse().ok()?)?;
            let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).ok()?;
            (name.trim() == "dockerd").then_some(pid)
        })
}
