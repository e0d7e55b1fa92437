//! Baseline of a setup job: the files without the job's changes, and the changes to make, with a rollback on failure.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::plan::{FileSource, Plan};
use super::root_fs::{Owner, RootFs};
use super::undo::{BackupDir, FileState, Original, UndoRecord, WrittenFile};
use super::{SetupError, plan};

/// The files as they were before the job first changed them. A file that someone else modified since is read as it is.
pub(super) struct Baseline<'a> {
    root: &'a RootFs,
    backup: BackupDir<'a>,
    pub(super) record: Option<UndoRecord>,
}

impl FileSource for Baseline<'_> {
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, SetupError> {
        let now = self.root.read(path)?;
        match self.record.as_ref().and_then(|record| record.find(path)) {
            Some(written) if written.state(now.as_deref()) == FileState::AsWritten => {
                let original = written.before.as_ref();
                original
                    .map(|original| self.backup.read_bytes(&original.digest))
                    .transpose()
            }
            _ => Ok(now),
        }
    }

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>, SetupError> {
        let mut paths = self.root.list(folder)?;
        let mut existing = Vec::new();
        for path in paths.drain(..) {
            if self.read(&path)?.is_some() {
                existing.push(path);
            }
        }
        Ok(existing)
    }

    fn version_of(&self, program: &str) -> Option<String> {
        self.root.version_of(program)
    }
}

/// The change of one file.
pub(super) struct FileChange {
    pub(super) path: PathBuf,
    /// The current content.
    pub(super) now: Option<Vec<u8>>,
    /// The content that undoing restores.
    baseline: Option<Vec<u8>>,
    /// The desired content.
    pub(super) after: Option<Vec<u8>>,
}

impl<'a> Baseline<'a> {
    /// Opens the baseline with the undo record of this name.
    pub(super) fn open(record_name: &str, root: &'a RootFs) -> Result<Self, SetupError> {
        let backup = BackupDir::of(record_name, root);
        let record = backup.load()?;
        Ok(Self { root, backup, record })
    }

    /// Makes the plan. If that fails and a file that the job wrote was modified since, the modification is reported
    /// instead.
    pub(super) fn plan(
        &self,
        force: bool,
        command: &str,
        plan: &dyn Fn(&dyn FileSource) -> Result<Plan, SetupError>,
    ) -> Result<Plan, SetupError> {
        plan(self).map_err(|refused| match self.check_unmodified(command) {
            Err(changed) if !force => changed,
            _ => refused,
        })
    }

    /// Fails if a written file was modified since, so that the modification is not lost.
    pub(super) fn check_unmodified(&self, command: &str) -> Result<(), SetupError> {
        for written in self.record.iter().flat_map(|record| &record.files) {
            let now = self.root.read(&written.path)?;
            if written.state(now.as_deref()) == FileState::Changed {
                let after = self.backup.read_bytes(&written.after).unwrap_or_default();
                return Err(SetupError::Changed {
                    job: command.to_owned(),
                    path: self.root.resolve(&written.path),
                    difference: plan::difference(&after, &now.unwrap_or_default()),
                });
            }
        }
        Ok(())
    }

    /// The change of each planned file, and of earlier written files that the plan omits.
    pub(super) fn changes(&self, plan: &Plan) -> Result<Vec<FileChange>, SetupError> {
        let original = self
            .record
            .iter()
            .flat_map(|record| &record.files)
            .map(|written| &written.path);
        let paths: BTreeSet<&PathBuf> = plan
            .files
            .iter()
            .map(|desired| &desired.path)
            .chain(original)
            .collect();
        let mut changes = Vec::new();
        for path in paths {
            let baseline = self.read(path)?;
            let desired = plan.files.iter().find(|desired| desired.path == *path);
            changes.push(FileChange {
                path: path.clone(),
                now: self.root.read(path)?,
                after: desired
                    .map(|desired| desired.bytes.clone())
                    .or_else(|| baseline.clone()),
                baseline,
            });
        }
        Ok(changes)
    }

    pub(super) fn apply_changes(&self, changes: &[FileChange]) -> Result<(), SetupError> {
        let record = self.new_record(changes)?;
        self.backup.save(&record)?;
        for (position, change) in changes.iter().enumerate() {
            if let Err(refused) = self.apply_change(change, &record) {
                self.roll_back(changes.get(..position).unwrap_or_default(), &record);
                return Err(refused);
            }
        }
        if record.files.is_empty() {
            self.backup.clear()?;
        }
        Ok(())
    }

    fn new_record(&self, changes: &[FileChange]) -> Result<UndoRecord, SetupError> {
        let mut folders = self
            .record
            .as_ref()
            .map(|record| record.folders.clone())
            .unwrap_or_default();
        let mut files = Vec::new();
        for change in changes {
            let Some(after) = change.after.as_ref().filter(|_| change.after != change.baseline) else {
                continue;
            };
            for folder in self.root.missing_folders(&change.path) {
                if !folders.contains(&folder) {
                    folders.push(folder);
                }
            }
            let before = match &change.baseline {
                Some(bytes) => Some(Original {
                    digest: self.backup.save_bytes(bytes)?,
                    owner: self.former_owner(&change.path)?,
                }),
                None => None,
            };
            files.push(WrittenFile {
                path: change.path.clone(),
                before,
                after: self.backup.save_bytes(after)?,
            });
        }
        Ok(UndoRecord::new(files, folders))
    }

    /// The owner before the first application, because the mode may have changed since.
    fn former_owner(&self, path: &Path) -> Result<Owner, SetupError> {
        let recorded = self
            .record
            .as_ref()
            .and_then(|record| record.find(path)?.before.as_ref());
        match recorded {
            Some(original) => Ok(original.owner),
            None => self.root.owner(path)?.ok_or_else(|| SetupError::OutsideRoot {
                path: self.root.resolve(path),
            }),
        }
    }

    fn apply_change(&self, change: &FileChange, record: &UndoRecord) -> Result<(), SetupError> {
        if change.now == change.after {
            return Ok(());
        }
        // Another process may have changed the file since it was read.
        if self.root.read(&change.path)? != change.now {
            return Err(SetupError::Conflict {
                path: self.root.resolve(&change.path),
                what: "was modified during this command".to_owned(),
                remedy: "Run the command again.".to_owned(),
            });
        }
        let original = record
            .find(&change.path)
            .and_then(|written| written.before.as_ref());
        match &change.after {
            Some(bytes) => {
                let owner = match original {
                    Some(original) => Some(original.owner),
                    None => self.root.owner(&change.path)?,
                };
                self.root.write(&change.path, bytes, owner)
            }
            None => self.root.remove(&change.path),
        }
    }

    /// Best effort: the caller reports the first error, and --undo repairs the remainder.
    fn roll_back(&self, changes: &[FileChange], record: &UndoRecord) {
        let mut complete = true;
        for change in changes.iter().filter(|change| change.now != change.after) {
            let back = match &change.now {
                Some(bytes) => {
                    let owner = self.root.owner(&change.path).ok().flatten();
                    self.root.write(&change.path, bytes, owner)
                }
                None => self.root.remove(&change.path),
            };
            complete &= back.is_ok();
        }
        if !complete {
            return;
        }
        let _ = match &self.record {
            Some(original) => self.backup.save(original),
            None => self.backup.clear(),
        };
        if self.record.is_none() {
            for folder in record.folders.iter().rev() {
                self.root.remove_folder(folder);
            }
        }
    }
}
