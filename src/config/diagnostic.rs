//! Configuration diagnostics: location, message and hint.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// All diagnostics, in the order of the file. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostics(Vec<Diagnostic>);

impl Diagnostics {
    /// A single diagnostic.
    pub fn one(diagnostic: Diagnostic) -> Self {
        Self(vec![diagnostic])
    }

    /// Iterates in the order of the file.
    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.0.iter()
    }
}

impl<'a> IntoIterator for &'a Diagnostics {
    type Item = &'a Diagnostic;
    type IntoIter = std::slice::Iter<'a, Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, diagnostic) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            diagnostic.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

/// One error. `Display` prints it with its line, a caret and a hint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Location of the error.
    pub location: Location,
    /// Key, such as `store.size`; empty if the file is not TOML.
    pub key: String,
    /// Error message.
    pub message: String,
    /// Suggested fix.
    pub help: Option<String>,
}

/// Location of a setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// Span in the configuration file.
    Text {
        /// Path as passed by the operator.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// Byte range in the text.
        span: Range<usize>,
        /// The line with secrets masked.
        source: String,
    },
    /// An entire file.
    File(PathBuf),
    /// Environment variable.
    Variable(String),
    /// Command-line flag.
    Flag(String),
    /// Built-in default.
    Default,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Location::Text {
                file, line, column, ..
            } => write!(f, "{}:{line}:{column}: ", file.display())?,
            Location::File(file) => write!(f, "{}: ", file.display())?,
            Location::Variable(name) | Location::Flag(name) => write!(f, "{name}: ")?,
            Location::Default => write!(f, "{}: ", self.key)?,
        }
        f.write_str(&self.message)?;
        if let Location::Text {
            line,
            column,
            span,
            source,
            ..
        } = &self.location
        {
            let number = line.to_string();
            let before = source.chars().take(column - 1);
            // Tabs are kept, so that the caret aligns with the value.
            let margin: String = before.map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
            let carets = span
                .len()
                .min(source.chars().count().saturating_sub(column - 1))
                .max(1);
            write!(f, "\n{number} | {source}\n{:1$} | ", "", number.len())?;
            write!(f, "{margin}{}", "^".repeat(carets))?;
        }
        if let Some(help) = &self.help {
            write!(f, "\nhelp: {help}")?;
        }
        Ok(())
    }
}

/// Origin of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Span(Range<usize>),
    Variable(String),
    Flag(&'static str),
    Default,
}

/// Marker error: the [`Report`] already has a diagnostic.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reported;

/// Collects the diagnostics of one load.
pub(super) struct Report<'a> {
    text: &'a str,
    origin: &'a Path,
    diagnostics: Vec<Diagnostic>,
}

impl<'a> Report<'a> {
    pub(super) fn new(text: &'a str, origin: &'a Path) -> Self {
        Self {
            text,
            origin,
            diagnostics: Vec::new(),
        }
    }

    /// Adds a diagnostic.
    pub(super) fn emit(
        &mut self,
        at: &Origin,
        key: impl Into<String>,
        message: impl Into<String>,
        help: Option<String>,
    ) -> Reported {
        let location = self.location(at);
        self.diagnostics.push(Diagnostic {
            location,
            key: key.into(),
            message: message.into(),
            help,
        });
        Reported
    }

    pub(super) fn is_empty(&self) -> bool {
        self.diagnostics.is_empty()
    }

    /// Sorts diagnostics by their position in the text; those from other origins come last.
    pub(super) fn into_diagnostics(mut self) -> Diagnostics {
        self.diagnostics
            .sort_by_key(|diagnostic| match &diagnostic.location {
                Location::Text { span, .. } => span.start,
                _ => usize::MAX,
            });
        Diagnostics(self.diagnostics)
    }

    /// Resolves a path relative to the configuration file; paths of variables and flags are relative to the working directory.
    pub(super) fn resolve(&self, at: &Origin, path: PathBuf) -> PathBuf {
        match at {
            Origin::Span(_) | Origin::Default => self
                .origin
                .parent()
                .map_or(path.clone(), |folder| folder.join(&path)),
            Origin::Variable(_) | Origin::Flag(_) => path,
        }
    }

    /// Printable location of an origin.
    pub(super) fn location(&self, at: &Origin) -> Location {
        match at {
            Origin::Span(span) => self.in_text(span),
            Origin::Variable(name) => Location::Variable(name.clone()),
            Origin::Flag(name) => Location::Flag((*name).to_owned()),
            Origin::Default => Location::Default,
        }
    }

    fn in_text(&self, span: &Range<usize>) -> Location {
        let (before, after) = self.text.split_at_checked(span.start).unwrap_or((self.text, ""));
        let line_start = before.rsplit('\n').next().unwrap_or("");
        let line_end = after.split('\n').next().unwrap_or("");
        Location::Text {
            file: self.origin.to_owned(),
            line: before.matches('\n').count() + 1,
            column: line_start.chars().count() + 1,
            span: span.clone(),
            source: sanitize(&format!("{line_start}{line_end}")),
        }
    }
}

/// Masks secrets and control characters of a line, because diagnostics are logged.
fn sanitize(line: &str) -> String {
    let line: String = line
        .trim_end_matches('\r')
        .chars()
        .map(|c| {
            if c.is_control() && c != '\t' {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect();
    if let Some((key, _)) = line.split_once('=') {
        let name = key.trim().trim_matches(['"', '\'']).to_lowercase();
        let secret = ["password", "secret", "token"]
            .iter()
            .any(|word| name.contains(word));
        if secret && !name.ends_with("_file") {
            return format!("{key}= ***");
        }
    }
    mask_userinfo(&line)
}

/// Masks the user information of URLs: `https://user:secret@host`.
fn mask_userinfo(line: &str) -> String {
    let Some((scheme, rest)) = line.split_once("://") else {
        return line.to_owned();
    };
    let end = rest.find(['"', '\'', ' ', ',']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at_checked(end).unwrap_or((rest, ""));
    match authority.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://***@{host}{}", mask_userinfo(tail)),
        None => format!("{scheme}://{authority}{}", mask_userinfo(tail)),
    }
}
