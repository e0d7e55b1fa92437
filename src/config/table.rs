//! Configuration section: the value and origin of each key.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::DeValue;

use super::diagnostic::{Origin, Report, Reported};
use super::parsers::ValueParser;
use super::schema::Section;

/// Section with configured or default values.
#[derive(Clone)]
pub(super) struct Table {
    pub(super) section: Section,
    /// Upstream name, or number of the rule or list.
    pub(super) name: String,
    pub(super) at: Origin,
    entries: BTreeMap<&'static str, Entry>,
}

/// Value and its origin.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) at: Origin,
    pub(super) value: Value,
}

/// Untyped value.
#[derive(Clone)]
pub(super) enum Value {
    Text(String),
    Number(i64),
    Bool(bool),
    List(Vec<Entry>),
    /// Kind that no key accepts.
    Other(&'static str),
    /// String from a variable or a flag.
    Raw(String),
}

impl Table {
    /// Section with default values.
    pub(super) fn new(section: Section, name: impl Into<String>, at: Origin) -> Self {
        let entries = section
            .keys()
            .filter_map(|key| {
                let value = DeValue::parse(key.default?).ok()?;
                Some((key.name, Entry::from_default(value.get_ref())))
            })
            .collect();
        Self {
            section,
            name: name.into(),
            at,
            entries,
        }
    }

    /// Full name of a key in messages.
    pub(super) fn path(&self, key: &str) -> String {
        match self.section {
            Section::Top => key.to_owned(),
            Section::Upstream => format!("upstream.\"{}\".{key}", self.name),
            Section::Rule => format!("rule {}: {key}", self.name),
            Section::Allow => format!("allow {}: {key}", self.name),
            section => format!("{}.{key}", section.name()),
        }
    }

    /// Origin of a configured key, or else of the section.
    pub(super) fn at(&self, key: &str) -> &Origin {
        self.entries
            .get(key)
            .map(|entry| &entry.at)
            .filter(|at| **at != Origin::Default)
            .unwrap_or(&self.at)
    }

    /// Origin of a key's value, which may be the default.
    pub(super) fn entry_at(&self, key: &str) -> &Origin {
        self.entries.get(key).map_or(&Origin::Default, |entry| &entry.at)
    }

    /// Value of a key, which may be the default.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.entries.get(key).map(|entry| &entry.value)
    }

    /// Whether a key is configured, not only a default.
    pub(super) fn is_set(&self, key: &str) -> bool {
        self.entries
            .get(key)
            .is_some_and(|entry| entry.at != Origin::Default)
    }

    pub(super) fn set(&mut self, key: &'static str, entry: Entry) {
        self.entries.insert(key, entry);
    }

    /// String value that is configured or has a default.
    pub(super) fn text<T>(
        &self,
        report: &mut Report<'_>,
        key: &str,
        kind: &ValueParser<T>,
    ) -> Result<T, Reported> {
        self.text_if_set(report, key, kind)?
            .ok_or_else(|| self.unset(report, key))
    }

    /// Optional string value.
    pub(super) fn text_if_set<T>(
        &self,
        report: &mut Report<'_>,
        key: &str,
        kind: &ValueParser<T>,
    ) -> Result<Option<T>, Reported> {
        let Some(entry) = self.entries.get(key) else {
            return Ok(None);
        };
        one(report, &self.path(key), entry, kind).map(Some)
    }

    /// Optional list of string values with their origins. With `or_one`, a single value counts as a list.
    pub(super) fn list_if_set<T>(
        &self,
        report: &mut Report<'_>,
        key: &str,
        kind: &ValueParser<T>,
        or_one: bool,
    ) -> Result<Option<Vec<(Origin, T)>>, Reported> {
        let Some(entry) = self.entries.get(key) else {
            return Ok(None);
        };
        let path = self.path(key);
        let read: Vec<_> = match &entry.value {
            Value::List(entries) => entries
                .iter()
                .map(|entry| Ok((entry.at.clone(), one(report, &path, entry, kind)?)))
                .collect(),
            Value::Raw(text) => text
                .split(',')
                .map(str::trim)
                .filter(|text| !text.is_empty())
                .map(|text| Entry {
                    at: entry.at.clone(),
                    value: Value::Raw(text.to_owned()),
                })
                .map(|entry| Ok((entry.at.clone(), one(report, &path, &entry, kind)?)))
                .collect(),
            Value::Text(_) if or_one => {
                vec![one(report, &path, entry, kind).map(|value| (entry.at.clone(), value))]
            }
            other => {
                let message = format!("expected a list, found {}", other.kind());
                vec![Err(report.emit(
                    &entry.at,
                    path,
                    message,
                    Some(format!("write [{}]", kind.example)),
                ))]
            }
        };
        read.into_iter().collect::<Result<Vec<_>, Reported>>().map(Some)
    }

    /// List that is configured or has a default.
    pub(super) fn list<T>(
        &self,
        report: &mut Report<'_>,
        key: &str,
        kind: &ValueParser<T>,
    ) -> Result<Vec<(Origin, T)>, Reported> {
        self.list_if_set(report, key, kind, false)?
            .ok_or_else(|| self.unset(report, key))
    }

    /// Integer within a range.
    pub(super) fn number(
        &self,
        report: &mut Report<'_>,
        key: &str,
        range: Range<usize>,
    ) -> Result<usize, Reported> {
        let Some(entry) = self.entries.get(key) else {
            return Err(self.unset(report, key));
        };
        let number = match &entry.value {
            Value::Number(number) => Some(*number),
            Value::Raw(text) => text.parse().ok(),
            _ => None,
        };
        let Some(number) = number else {
            let message = format!("expected a whole number, found {}", entry.value.kind());
            return Err(report.emit(&entry.at, self.path(key), message, None));
        };
        usize::try_from(number)
            .ok()
            .filter(|number| range.contains(number))
            .ok_or_else(|| {
                let message = format!(
                    "{number} is outside of {} to {}",
                    range.start,
                    range.end.saturating_sub(1)
                );
                report.emit(&entry.at, self.path(key), message, None)
            })
    }

    /// `true` or `false`.
    pub(super) fn bool(&self, report: &mut Report<'_>, key: &str) -> Result<bool, Reported> {
        self.bool_if_set(report, key)?
            .ok_or_else(|| self.unset(report, key))
    }

    /// Optional `true` or `false`.
    pub(super) fn bool_if_set(&self, report: &mut Report<'_>, key: &str) -> Result<Option<bool>, Reported> {
        let Some(entry) = self.entries.get(key) else {
            return Ok(None);
        };
        match &entry.value {
            Value::Bool(on) => Ok(Some(*on)),
            Value::Raw(text) if text == "true" => Ok(Some(true)),
            Value::Raw(text) if text == "false" => Ok(Some(false)),
            other => {
                let message = format!("expected true or false, found {}", other.kind());
                Err(report.emit(
                    &entry.at,
                    self.path(key),
                    message,
                    Some("write true or false, without quotes".to_owned()),
                ))
            }
        }
    }

    /// Reports a missing key that has no default.
    fn unset(&self, report: &mut Report<'_>, key: &str) -> Reported {
        report.emit(&self.at, self.path(key), format!("`{key}` is missing"), None)
    }
}

fn one<T>(report: &mut Report<'_>, path: &str, entry: &Entry, kind: &ValueParser<T>) -> Result<T, Reported> {
    match &entry.value {
        Value::Text(text) | Value::Raw(text) => {
            (kind.parse)(text).map_err(|error| report.emit(&entry.at, path, error.message, error.help))
        }
        other => {
            let message = format!("expected {}, found {}", kind.expected, other.kind());
            Err(report.emit(
                &entry.at,
                path,
                message,
                Some(format!("write it in quotes, as in {}", kind.example)),
            ))
        }
    }
}

impl Entry {
    /// Reads a value of the file.
    pub(super) fn read(value: &Spanned<DeValue<'_>>) -> Self {
        Self::with(value.get_ref(), Origin::Span(value.span()), &Self::read)
    }

    fn from_default(value: &DeValue<'_>) -> Self {
        Self::with(value, Origin::Default, &|element| {
            Self::from_default(element.get_ref())
        })
    }

    fn with(value: &DeValue<'_>, at: Origin, each: &dyn Fn(&Spanned<DeValue<'_>>) -> Self) -> Self {
        let value = match value {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .map_or(Value::Other("a number that is too large"), Value::Number),
            DeValue::Boolean(on) => Value::Bool(*on),
            DeValue::Array(entries) => Value::List(entries.iter().map(each).collect()),
            DeValue::Float(_) => Value::Other("a fraction"),
            DeValue::Datetime(_) => Value::Other("a date"),
            DeValue::Table(_) => Value::Other("a table"),
        };
        Self { at, value }
    }
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) | Self::Raw(_) => "a string",
            Self::Number(_) => "a number",
            Self::Bool(_) => "true or false",
            Self::List(_) => "a list",
            Self::Other(kind) => kind,
        }
    }
}
