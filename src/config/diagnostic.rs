//! Configuration diagnostics: where, what, and a hint.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use annotate_snippets::{AnnotationKind, Group, Level, Origin as SnippetOrigin, Renderer, Snippet};

use super::parsers::FilePath;
use super::setting::Field;

/// All diagnostics, in the order of the file. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostics(pub(super) Vec<Diagnostic>);

impl Diagnostics {
    /// A single diagnostic, about a file or a variable as a whole.
    pub fn of_source(source: &Path, message: &str, help: Option<String>) -> Self {
        Self(vec![Diagnostic {
            source: source.display().to_string(),
            position: None,
            message: printable(message),
            help,
        }])
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, diagnostic) in self.0.iter().enumerate() {
            let separator = if index > 0 { "\n\n" } else { "" };
            write!(f, "{separator}{diagnostic}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

/// One error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Diagnostic {
    /// File, variable or flag; the key of a default.
    pub(super) source: String,
    /// Position in the file.
    pub(super) position: Option<Position>,
    pub(super) message: String,
    /// Suggested fix.
    pub(super) help: Option<String>,
}

/// Position in the configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Position {
    /// Line, from 1.
    pub(super) line: usize,
    /// Columns in characters, from 1.
    pub(super) columns: Range<usize>,
    /// The line with secrets masked.
    text: String,
    /// Byte in the file.
    start: usize,
}

/// Prints the error with its line, a caret and the hint.
impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = Group::with_title(Level::ERROR.primary_title(&self.message));
        let group = match &self.position {
            None => group.element(SnippetOrigin::path(&self.source)),
            Some(Position {
                line, columns, text, ..
            }) => {
                // Masking may have shortened the line, and a value may end on another one.
                let byte = |column: usize| text.char_indices().nth(column - 1);
                let byte = |column| byte(column).map_or(text.len(), |(byte, _)| byte);
                let carets = AnnotationKind::Primary.span(byte(columns.start)..byte(columns.end));
                let snippet = Snippet::source(text).line_start(*line).path(&self.source);
                group.element(snippet.annotation(carets))
            }
        };
        let help = self.help.iter().map(|help| Level::HELP.message(help));
        f.write_str(&Renderer::plain().render(&[group.elements(help)]))
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

impl Origin {
    /// Origin of an item of a list with this origin. Only items in the file have spans.
    pub(super) fn of_item(&self, span: Range<usize>) -> Self {
        match self {
            Self::Span(_) => Self::Span(span),
            other => other.clone(),
        }
    }
}

/// What a diagnostic is about.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) origin: Origin,
    /// Key, such as `store.size`.
    pub(super) key: String,
}

impl Subject {
    pub(super) fn new(origin: Origin, key: impl Into<String>) -> Self {
        let key = key.into();
        Self { origin, key }
    }

    /// The same key with its default value.
    pub(super) fn as_default(&self) -> Self {
        Self::new(Origin::Default, &self.key)
    }

    /// Name of the key in its section.
    pub(super) fn name(&self) -> &str {
        self.key.rsplit(['.', ' ']).next().unwrap_or(&self.key)
    }
}

/// Marker error: the [`Report`] already has a diagnostic.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reported;

/// A valid value.
pub(super) type Checked<T> = Result<T, Reported>;

/// Collects the diagnostics of one load.
pub(super) struct Report<'a> {
    text: &'a str,
    file: &'a Path,
    diagnostics: Vec<Diagnostic>,
}

impl<'a> Report<'a> {
    pub(super) fn new(text: &'a str, file: &'a Path) -> Self {
        let diagnostics = Vec::new();
        Self {
            text,
            file,
            diagnostics,
        }
    }

    /// Adds a diagnostic. An empty `help` is none.
    pub(super) fn emit(
        &mut self,
        subject: &Subject,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> Reported {
        let (source, position) = match &subject.origin {
            Origin::Span(span) => (self.file.display().to_string(), Some(self.position(span))),
            Origin::Variable(name) => (name.clone(), None),
            Origin::Flag(name) => ((*name).to_owned(), None),
            Origin::Default => (subject.key.clone(), None),
        };
        self.diagnostics.push(Diagnostic {
            source,
            position,
            message: printable(&mask_userinfo(&message.into())),
            help: Some(printable(&mask_userinfo(&help.into()))).filter(|help| !help.is_empty()),
        });
        Reported
    }

    pub(super) fn is_empty(&self) -> bool {
        self.diagnostics.is_empty()
    }

    /// Sorts diagnostics by their position in the text; those from other origins come last.
    pub(super) fn into_diagnostics(mut self) -> Diagnostics {
        let start = |one: &Diagnostic| {
            one.position
                .as_ref()
                .map_or(usize::MAX, |position| position.start)
        };
        self.diagnostics.sort_by_key(start);
        Diagnostics(self.diagnostics)
    }

    /// Path of a setting. In the file it is relative to the file, in variables and flags to the working directory.
    pub(super) fn path(&self, field: &Field<Option<FilePath>>) -> Checked<Option<PathBuf>> {
        let folder = match field.subject.origin {
            Origin::Span(_) | Origin::Default => self.file.parent(),
            Origin::Variable(_) | Origin::Flag(_) => None,
        };
        let path = field.get()?.map(PathBuf::from);
        Ok(path.map(|path| folder.map_or(path.clone(), |folder| folder.join(path))))
    }

    /// Origin of a setting, on one line.
    pub(super) fn describe(&self, origin: &Origin) -> String {
        match origin {
            Origin::Span(span) => format!("{}:{}", self.file.display(), self.position(span).line),
            Origin::Variable(name) => name.clone(),
            Origin::Flag(name) => (*name).to_owned(),
            Origin::Default => "default".to_owned(),
        }
    }

    fn position(&self, span: &Range<usize>) -> Position {
        let (before, after) = self.text.split_at_checked(span.start).unwrap_or((self.text, ""));
        let line_start = before.rsplit('\n').next().unwrap_or("");
        let line_end = after.split('\n').next().unwrap_or("");
        let column = line_start.chars().count() + 1;
        let width = self
            .text
            .get(span.clone())
            .map_or(1, |text| text.chars().count().max(1));
        let text = format!("{line_start}{line_end}");
        let above = before.strip_suffix(line_start).unwrap_or_default();
        let mut text = if is_within_string(above) {
            "***".to_owned()
        } else {
            mask_secrets(&printable(text.trim_end_matches('\r')))
        };
        // As long as before, up to the value: its column is printed.
        let missing = (column - 1).saturating_sub(text.chars().count());
        text.extend(std::iter::repeat_n(' ', missing));
        Position {
            line: before.matches('\n').count() + 1,
            columns: column..column + width,
            text,
            start: span.start,
        }
    }
}

/// Replaces control characters, because messages quote values, and reach terminals and logs.
fn printable(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\t', "\u{fffd}")
}

/// Whether a multi-line string is open after `text`. Its lines may belong to a secret.
fn is_within_string(text: &str) -> bool {
    ["\"\"\"", "'''"]
        .iter()
        .any(|quotes| text.matches(quotes).count() % 2 == 1)
}

/// Masks secrets of a line, because diagnostics are logged.
fn mask_secrets(line: &str) -> String {
    match secret_value(line) {
        Some(at) => format!("{}= ***", line.get(..at).unwrap_or_default()),
        None => mask_userinfo(line),
    }
}

/// Position of the first `=` after the name of a secret, also in an inline table.
pub(super) fn secret_value(line: &str) -> Option<usize> {
    let mut equals = line.match_indices('=').map(|(at, _)| at);
    equals.find(|at| {
        let before = line.get(..*at).unwrap_or_default();
        let name = before.rsplit(['{', ',']).next().unwrap_or_default();
        let name = name.trim().trim_matches(['"', '\'']).to_lowercase();
        let is_secret = |word: &&str| name.contains(word);
        ["password", "secret", "token"].iter().any(is_secret) && !name.ends_with("_file")
    })
}

/// Masks the user information of URLs and addresses: `https://user:secret@host`, `user:secret@host`.
fn mask_userinfo(text: &str) -> String {
    let mut masked = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('@') {
        masked.push_str(before.get(..user_start(before)).unwrap_or_default());
        masked.push_str("***@");
        rest = after;
    }
    masked + rest
}

/// Where the user information starts that ends `text`: within quotes it may contain anything.
fn user_start(text: &str) -> usize {
    let quote = ['"', '`']
        .into_iter()
        .filter(|quote| text.matches(*quote).count() % 2 == 1);
    let quote = quote.filter_map(|quote| text.rfind(quote)).max();
    let start = quote.or_else(|| text.rfind([' ', '\t', '=', '[', '(', ',', '\'', '"', '`']));
    let start = start.map_or(0, |at| at + 1);
    let scheme = text.get(start..).and_then(|text| text.rfind("://"));
    scheme.map_or(start, |at| start + at + 3)
}
