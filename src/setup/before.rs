//! A plan against what is there: which files change, from what, and the way back if one of them cannot be written.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::disk::{Owner, Root};
use super::plan::{Files, Plan};
use super::record::{Former, Record, Shelf, State, Written};
use super::{Refused, show};

/// The files as they were before the job; those changed since by someone else, as they are.
pub(super) struct Before<'a> {
    root: &'a Root,
    shelf: Shelf<'a>,
    pub(super) record: Option<Record>,
}

impl Files for Before<'_> {
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, Refused> {
        let now = self.root.read(path)?;
        match self.record.as_ref().and_then(|record| record.find(path)) {
            Some(written) if written.state(now.as_deref()) == State::AsWritten => {
                let former = written.before.as_ref();
                former.map(|former| self.shelf.kept(&former.digest)).transpose()
            }
            _ => Ok(now),
        }
    }

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>, Refused> {
        let mut held = self.root.list(folder)?;
        let mut kept = Vec::new();
        for path in held.drain(..) {
            if self.read(&path)?.is_some() {
                kept.push(path);
            }
        }
        Ok(kept)
    }

    fn version_of(&self, program: &str) -> Option<String> {
        self.root.version_of(program)
    }
}

/// One file of a plan.
pub(super) struct Step {
    pub(super) path: PathBuf,
    /// What is there.
    pub(super) now: Option<Vec<u8>>,
    /// What undoing is to lead back to.
    origin: Option<Vec<u8>>,
    /// What is to be there.
    pub(super) after: Option<Vec<u8>>,
}

impl<'a> Before<'a> {
    /// With what the job whose record has this name has written.
    pub(super) fn open(shelf: &str, root: &'a Root) -> Result<Self, Refused> {
        let shelf = Shelf::of(shelf, root);
        let record = shelf.load()?;
        Ok(Self { root, shelf, record })
    }

    /// Makes the plan. An objection to what stands in a file that was changed since we wrote it is about that change.
    pub(super) fn plan(
        &self,
        force: bool,
        words: &str,
        plan: &dyn Fn(&dyn Files) -> Result<Plan, Refused>,
    ) -> Result<Plan, Refused> {
        plan(self).map_err(|refused| match self.unchanged(words) {
            Err(changed) if !force => changed,
            _ => refused,
        })
    }

    /// A file that someone else has changed since must not lose that without being asked.
    pub(super) fn unchanged(&self, words: &str) -> Result<(), Refused> {
        for written in self.record.iter().flat_map(|record| &record.files) {
            let now = self.root.read(&written.path)?;
            if written.state(now.as_deref()) == State::Changed {
                let after = self.shelf.kept(&written.after).unwrap_or_default();
                return Err(Refused::Changed {
                    job: words.to_owned(),
                    path: self.root.place(&written.path),
                    difference: show::difference(&after, &now.unwrap_or_default()),
                });
            }
        }
        Ok(())
    }

    /// What the plan means for each file, and for those of the last time that it leaves out.
    pub(super) fn steps(&self, plan: &Plan) -> Result<Vec<Step>, Refused> {
        let former = self
            .record
            .iter()
            .flat_map(|record| &record.files)
            .map(|written| &written.path);
        let paths: BTreeSet<&PathBuf> = plan
            .files
            .iter()
            .map(|wanted| &wanted.path)
            .chain(former)
            .collect();
        let mut steps = Vec::new();
        for path in paths {
            let origin = self.read(path)?;
            let wanted = plan.files.iter().find(|wanted| wanted.path == *path);
            steps.push(Step {
                path: path.clone(),
                now: self.root.read(path)?,
                after: wanted
                    .map(|wanted| wanted.bytes.clone())
                    .or_else(|| origin.clone()),
                origin,
            });
        }
        Ok(steps)
    }

    pub(super) fn carry_out(&self, steps: &[Step]) -> Result<(), Refused> {
        let record = self.new_record(steps)?;
        self.shelf.save(&record)?;
        for (position, step) in steps.iter().enumerate() {
            if let Err(refused) = self.carry_out_one(step, &record) {
                self.roll_back(steps.get(..position).unwrap_or_default(), &record);
                return Err(refused);
            }
        }
        if record.files.is_empty() {
            self.shelf.clear()?;
        }
        Ok(())
    }

    fn new_record(&self, steps: &[Step]) -> Result<Record, Refused> {
        let mut folders = self
            .record
            .as_ref()
            .map(|record| record.folders.clone())
            .unwrap_or_default();
        let mut files = Vec::new();
        for step in steps {
            let Some(after) = step.after.as_ref().filter(|_| step.after != step.origin) else {
                continue;
            };
            for folder in self.root.missing_folders(&step.path) {
                if !folders.contains(&folder) {
                    folders.push(folder);
                }
            }
            let before = match &step.origin {
                Some(bytes) => Some(Former {
                    digest: self.shelf.keep(bytes)?,
                    owner: self.former_owner(&step.path)?,
                }),
                None => None,
            };
            files.push(Written {
                path: step.path.clone(),
                before,
                after: self.shelf.keep(after)?,
            });
        }
        Ok(Record::new(files, folders))
    }

    /// As it was before our first time: the file is ours since then, its mode need not be.
    fn former_owner(&self, path: &Path) -> Result<Owner, Refused> {
        let recorded = self
            .record
            .as_ref()
            .and_then(|record| record.find(path)?.before.as_ref());
        match recorded {
            Some(former) => Ok(former.owner),
            None => self.root.owner(path)?.ok_or_else(|| Refused::Outside {
                path: self.root.place(path),
            }),
        }
    }

    fn carry_out_one(&self, step: &Step, record: &Record) -> Result<(), Refused> {
        if step.now == step.after {
            return Ok(());
        }
        // Someone else may have been at it between our reading and now.
        if self.root.read(&step.path)? != step.now {
            return Err(Refused::Conflict {
                path: self.root.place(&step.path),
                what: "it changed while this was at work".to_owned(),
                remedy: "Try again.".to_owned(),
            });
        }
        let former = record
            .find(&step.path)
            .and_then(|written| written.before.as_ref());
        match &step.after {
            Some(bytes) => {
                let owner = match former {
                    Some(former) => Some(former.owner),
                    None => self.root.owner(&step.path)?,
                };
                self.root.write(&step.path, bytes, owner)
            }
            None => self.root.remove(&step.path),
        }
    }

    /// As far as it goes: what fails here is told by the error that led here, and undone by --undo.
    fn roll_back(&self, steps: &[Step], record: &Record) {
        let mut whole = true;
        for step in steps.iter().filter(|step| step.now != step.after) {
            let back = match &step.now {
                Some(bytes) => {
                    let owner = self.root.owner(&step.path).ok().flatten();
                    self.root.write(&step.path, bytes, owner)
                }
                None => self.root.remove(&step.path),
            };
            whole &= back.is_ok();
        }
        if !whole {
            return;
        }
        let _ = match &self.record {
            Some(former) => self.shelf.save(former),
            None => self.shelf.clear(),
        };
        if self.record.is_none() {
            for folder in record.folders.iter().rev() {
                self.root.remove_folder(folder);
            }
        }
    }
}
