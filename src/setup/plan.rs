//! Plan of a setup: desired files and manual steps, and their rendering.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use similar::TextDiff;

use super::SetupError;

/// A source of files. Paths are absolute, as the client sees them.
pub trait FileSource {
    /// Content of a file; `None` if it does not exist.
    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, SetupError>;

    /// Files of a folder, sorted by name; empty if it does not exist.
    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>, SetupError>;

    /// Output of `PROGRAM --version`; `None` if the program is absent or belongs to another root.
    fn version_of(&self, _program: &str) -> Option<String> {
        None
    }
}

/// A host without configuration.
pub(super) struct EmptyFs;

impl FileSource for EmptyFs {
    fn read(&self, _: &Path) -> Result<Option<Vec<u8>>, SetupError> {
        Ok(None)
    }

    fn list(&self, _: &Path) -> Result<Vec<PathBuf>, SetupError> {
        Ok(Vec::new())
    }
}

/// A desired file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredFile {
    /// The path.
    pub path: PathBuf,
    /// The content.
    pub bytes: Vec<u8>,
}

/// A plan: desired files, manual steps and notes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The files.
    pub files: Vec<DesiredFile>,
    /// Manual steps if anything changes, one sentence each.
    pub by_hand: Vec<String>,
    /// Notes that apply in any case.
    pub notes: Vec<String>,
}

impl Plan {
    pub(super) fn file(&mut self, path: impl Into<PathBuf>, bytes: impl Into<Vec<u8>>) {
        self.files.push(DesiredFile {
            path: path.into(),
            bytes: bytes.into(),
        });
    }

    pub(super) fn by_hand(&mut self, what: impl Into<String>) {
        self.by_hand.push(what.into());
    }

    pub(super) fn note(&mut self, what: impl Into<String>) {
        self.notes.push(what.into());
    }
}

/// Renders new files completely and changed ones as a diff. Returns an error if a file cannot be read.
pub(super) fn render(plan: &Plan, files: &dyn FileSource) -> (String, Option<SetupError>) {
    let mut text = String::new();
    let mut unreadable = None;
    for desired in &plan.files {
        let path = desired.path.display();
        let now = files.read(&desired.path).unwrap_or_else(|refused| {
            unreadable = Some(refused);
            None
        });
        let _ = match now {
            Some(now) if now == desired.bytes => writeln!(text, "# {path} is up to date"),
            Some(now) => writeln!(text, "# {path} changes:\n{}", difference(&now, &desired.bytes)),
            None => writeln!(text, "# {path}\n{}", String::from_utf8_lossy(&desired.bytes)),
        };
    }
    for what in &plan.by_hand {
        let _ = writeln!(text, "# to do: {what}");
    }
    for note in &plan.notes {
        let _ = writeln!(text, "# note: {note}");
    }
    (text, unreadable)
}

/// A unified diff.
pub(super) fn difference(before: &[u8], after: &[u8]) -> String {
    let (before, after) = (String::from_utf8_lossy(before), String::from_utf8_lossy(after));
    let difference = TextDiff::from_lines(&*before, &*after);
    difference.unified_diff().context_radius(2).to_string()
}
