//! Edits of configuration files that keep comments, order and layout.
//!
//! `json` and `toml` change the text and parse the result again: it must mean what the file meant, and the change.

pub(super) mod json;
pub(super) mod toml;

use std::path::{Path, PathBuf};

use similar::{ChangeTag, TextDiff};

use super::SetupError;
use super::plan::FileSource;

const BOM: &str = "\u{feff}";

/// The text of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text {
    pub(super) path: PathBuf,
    /// As in the file.
    raw: String,
    /// Without byte order mark, with line ends `\n`.
    pub(super) body: String,
}

impl Text {
    /// Reads a file; a missing one is empty.
    pub(super) fn read(path: impl AsRef<Path>, files: &dyn FileSource) -> Result<Self, SetupError> {
        let path = path.as_ref();
        let raw = String::from_utf8(files.read(path)?.unwrap_or_default()).map_err(|error| {
            let valid = error.as_bytes().get(..error.utf8_error().valid_up_to());
            let line = 1 + String::from_utf8_lossy(valid.unwrap_or_default())
                .matches('\n')
                .count();
            SetupError::unreadable(path, line, "not UTF-8 text")
        })?;
        let body = raw.strip_prefix(BOM).unwrap_or(&raw).replace("\r\n", "\n");
        let path = path.to_owned();
        Ok(Self { path, raw, body })
    }

    /// The same file with another body. Unchanged lines keep their line ends, others get that of the first line.
    pub(super) fn with(&self, body: String) -> Self {
        let (bom, raw) = match self.raw.strip_prefix(BOM) {
            Some(raw) => (BOM, raw),
            None => ("", &*self.raw),
        };
        let lines = |text| str::split_inclusive(text, '\n').collect::<Vec<_>>();
        let (raw, before, after) = (lines(raw), lines(&self.body), lines(&body));
        let end = if raw.first().is_some_and(|line| line.ends_with("\r\n")) {
            "\r\n"
        } else {
            "\n"
        };
        let mut edited = bom.to_owned();
        for change in TextDiff::from_slices(&before, &after).iter_all_changes() {
            match (change.tag(), change.old_index().and_then(|line| raw.get(line))) {
                (ChangeTag::Delete, _) => {}
                (ChangeTag::Equal, Some(line)) => edited.push_str(line),
                _ => edited.push_str(&change.value().replace('\n', end)),
            }
        }
        Self {
            path: self.path.clone(),
            raw: edited,
            body,
        }
    }

    /// The bytes to write.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.raw.into_bytes()
    }

    /// The line of a byte of the body, from 1.
    pub(super) fn line_of(&self, at: usize) -> usize {
        1 + self.body.get(..at).unwrap_or(&self.body).matches('\n').count()
    }

    /// Whether the text is blank.
    pub(super) fn is_blank(&self) -> bool {
        self.body.trim().is_empty()
    }

    /// The error for a conflict in this file.
    pub(super) fn conflict(&self, what: impl Into<String>, remedy: impl Into<String>) -> SetupError {
        SetupError::conflict(&self.path, what, remedy)
    }

    /// The error for a file that names other mirrors.
    pub(super) fn other_mirrors(&self, subject: &str, names: &[&str], url: &str) -> SetupError {
        self.conflict(
            format!("{subject}already names {}", without_userinfo(&names.join(", "))),
            format!("Use --force to put {url} before it; it is then tried next."),
        )
    }
}

/// Hides user and password in a line of a client's file, with or without a scheme: in each word, what is between the
/// first `=` or `//` and the last `@`.
pub(super) fn without_userinfo(line: &str) -> String {
    let mut before = '\0';
    let is_end = |letter: char| {
        // An escaped quote belongs to the word.
        let is_quote = matches!(letter, '"' | '\'') && before != '\\';
        before = letter;
        is_quote || letter.is_whitespace()
    };
    let words = line.split_inclusive(is_end);
    words
        .map(|word| hidden(word).unwrap_or_else(|| word.to_owned()))
        .collect()
}

fn hidden(word: &str) -> Option<String> {
    let (credentials, host) = word.rsplit_once('@')?;
    let starts = ["=", "//"].map(|start| credentials.find(start).map(|at| at + start.len()));
    let start = starts.into_iter().flatten().min().unwrap_or_default();
    let (head, userinfo) = credentials.split_at_checked(start)?;
    (!userinfo.is_empty()).then(|| format!("{head}…@{host}"))
}
