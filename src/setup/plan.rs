//! Plan of a setup: desired files and manual steps, and their rendering.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use similar::TextDiff;

use super::SetupError;
use super::edit::{Text, without_userinfo};
use super::endpoint::CacheEndpoint;

/// A source of files; by default a host without any. Paths are absolute, as the client sees them.
pub trait FileSource {
    /// Content of a file; `None` if it does not exist.
    fn read(&self, _path: &Path) -> Result<Option<Vec<u8>>, SetupError> {
        Ok(None)
    }

    /// Files of a folder, sorted by name; empty if it does not exist.
    fn list(&self, _folder: &Path) -> Result<Vec<PathBuf>, SetupError> {
        Ok(Vec::new())
    }

    /// Output of `PROGRAM --version`; `None` if the program is absent or belongs to another root.
    fn version_of(&self, _program: &str) -> Option<String> {
        None
    }
}

/// A host without configuration.
pub(super) struct EmptyFs;

impl FileSource for EmptyFs {}

/// What a plan depends on.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) endpoint: &'a CacheEndpoint,
    pub(super) files: &'a dyn FileSource,
    /// Overrides conflicts that name this flag.
    pub(super) force: bool,
}

impl Context<'_> {
    /// Reads a configuration file.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> Result<Text, SetupError> {
        Text::read(path, self.files)
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
        let (path, bytes) = (path.into(), bytes.into());
        self.files.push(DesiredFile { path, bytes });
    }

    pub(super) fn edited(&mut self, text: Text) {
        self.file(text.path.clone(), text.into_bytes());
    }

    /// The CA, if the client needs it.
    pub(super) fn ca(&mut self, endpoint: &CacheEndpoint, path: impl Into<PathBuf>) {
        if let Some(ca) = &endpoint.ca {
            self.file(path, ca.pem());
        }
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
    for (kind, lines) in [("to do", &plan.by_hand), ("note", &plan.notes)] {
        for line in lines {
            let _ = writeln!(text, "# {kind}: {line}");
        }
    }
    (text, unreadable)
}

/// A unified diff without the credentials of its lines.
pub(super) fn difference(before: &[u8], after: &[u8]) -> String {
    let (before, after) = (String::from_utf8_lossy(before), String::from_utf8_lossy(after));
    let difference = TextDiff::from_lines(&*before, &*after);
    let difference = difference.unified_diff().context_radius(2).to_string();
    // The first character is that of the diff; `@` begins a header.
    let lines = difference
        .split_inclusive('\n')
        .map(|line| match line.split_at_checked(1) {
            Some((kind @ (" " | "+" | "-"), text)) => {
                format!("{kind}{}", without_secret(&without_userinfo(text)))
            }
            _ => line.to_owned(),
        });
    lines.collect()
}

/// Words in the names of settings whose values are secret.
const SECRET_NAMES: [&str; 6] = ["token", "passw", "secret", "auth", "credential", "private"];

/// Hides the value of a setting with such a name: a client's file also has settings that are not the cache's.
fn without_secret(line: &str) -> Cow<'_, str> {
    let lower = line.to_ascii_lowercase();
    let name = SECRET_NAMES.iter().filter_map(|name| lower.find(name)).min();
    let value = name.and_then(|name| Some(name + lower.get(name..)?.find(['=', ':'])? + 1));
    let Some((name, value)) = value.and_then(|value| line.split_at_checked(value)) else {
        return Cow::Borrowed(line);
    };
    if value.trim().is_empty() {
        return Cow::Borrowed(line);
    }
    let end = if line.ends_with('\n') { "\n" } else { "" };
    Cow::Owned(format!("{name} …{end}"))
}
