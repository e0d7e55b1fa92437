//! Settings with their origins: the values of a section as written, and each as its type.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use toml::de::DeValue;

use super::diagnostic::{Checked, Origin, Report, Reported, Subject};
use super::schema::Section;
use super::value::{Written, deserialize, kind};

/// Section with configured or default values.
#[derive(Clone)]
pub(super) struct Table<'a> {
    pub(super) section: Section,
    /// Upstream name, or number of the rule or list.
    pub(super) name: String,
    pub(super) origin: Origin,
    entries: BTreeMap<&'static str, Entry<'a>>,
}

/// Value as written, and its origin.
#[derive(Clone)]
pub(super) struct Entry<'a> {
    pub(super) origin: Origin,
    pub(super) value: DeValue<'a>,
}

impl<'a> Table<'a> {
    /// Section with default values.
    pub(super) fn new(section: Section, name: impl Into<String>, origin: Origin) -> Self {
        let default = |text| DeValue::parse(text).ok().map(toml::Spanned::into_inner);
        let entries = section.keys().filter_map(|key| {
            let (origin, value) = (Origin::Default, default(key.default?)?);
            Some((key.name, Entry { origin, value }))
        });
        Self {
            section,
            name: name.into(),
            origin,
            entries: entries.collect(),
        }
    }

    pub(super) fn set(&mut self, key: &'static str, entry: Entry<'a>) {
        self.entries.insert(key, entry);
    }

    /// Value and origin of a key; `None`: not set, and without a default.
    pub(super) fn entry(&self, key: &str) -> Option<&Entry<'a>> {
        self.entries.get(key)
    }

    /// Full name of a key in messages.
    pub(super) fn path(&self, key: &str) -> String {
        let section = self.section.name();
        match self.section {
            Section::Top => key.to_owned(),
            Section::Upstream => format!("{section}.\"{}\".{key}", self.name),
            Section::Rule | Section::Allow => format!("{section} {}: {key}", self.name),
            _ => format!("{section}.{key}"),
        }
    }

    /// The section itself, as the subject of diagnostics.
    pub(super) fn subject(&self) -> Subject {
        let key = match self.section {
            Section::Upstream => format!("upstream.\"{}\"", self.name),
            section => section.name().to_owned(),
        };
        Subject::new(self.origin.clone(), key)
    }

    /// Reads a key; an invalid value is reported.
    pub(super) fn read<T: Setting>(&self, key: &'static str, report: &mut Report<'_>) -> Field<T> {
        let entry = self.entries.get(key);
        let set = entry.filter(|entry| entry.origin != Origin::Default);
        let origin = set.map_or(&self.origin, |entry| &entry.origin).clone();
        let subject = Subject::new(origin, self.path(key));
        let value = T::read(entry, &subject, report);
        let is_set = set.is_some();
        Field {
            subject,
            is_set,
            value,
        }
    }
}

/// A setting.
pub(super) struct Field<T> {
    /// Its key and its origin; that of the section if it is not set.
    pub(super) subject: Subject,
    /// Whether it is configured, validly or not, and not only a default.
    pub(super) is_set: bool,
    value: Checked<T>,
}

impl<T> Field<T> {
    /// Its key, if it is set.
    pub(super) fn set(&self) -> Option<&Subject> {
        self.is_set.then_some(&self.subject)
    }
}

impl<T: Clone> Field<T> {
    pub(super) fn get(&self) -> Checked<T> {
        self.value.clone()
    }
}

/// Checks that both of two keys are set, or neither. `hint` follows the missing key.
pub(super) fn both<A, B>(
    one: &Field<A>,
    other: &Field<B>,
    hint: &str,
    report: &mut Report<'_>,
) -> Checked<()> {
    let (Ok(_), Ok(_)) = (&one.value, &other.value) else {
        return Err(Reported);
    };
    let (given, missing) = match (one.is_set, other.is_set) {
        (true, false) => (&one.subject, &other.subject),
        (false, true) => (&other.subject, &one.subject),
        _ => return Ok(()),
    };
    let (name, missing) = (given.name(), missing.name());
    let message = format!("`{name}` without `{missing}`");
    Err(report.emit(given, message, format!("add `{missing}`{hint}")))
}

/// A type of settings.
pub(super) trait Setting: Sized {
    /// Reads a value that is set or has a default.
    fn read(entry: Option<&Entry<'_>>, subject: &Subject, report: &mut Report<'_>) -> Checked<Self>;
}

impl<T: DeserializeOwned> Setting for T {
    fn read(entry: Option<&Entry<'_>>, subject: &Subject, report: &mut Report<'_>) -> Checked<Self> {
        let read = deserialize(entry.map(|entry| &entry.value));
        read.map_err(|error| report.emit(subject, error.message, error.help))
    }
}

/// List of values with their origins; empty if it is not set. If `OR_ONE`, a single value counts as a list.
#[derive(Clone)]
pub(super) struct List<T, const OR_ONE: bool = false>(pub(super) Vec<(Subject, T)>);

/// A value or a list of values.
pub(super) type OneOrMany<T> = List<T, true>;

impl<T, const OR_ONE: bool> List<T, OR_ONE> {
    /// The values without their origins.
    pub(super) fn values<U: From<T>>(self) -> Vec<U> {
        self.0.into_iter().map(|(_, value)| value.into()).collect()
    }

    /// The values with their origins.
    pub(super) fn located<U: From<T>>(self) -> Vec<(Subject, U)> {
        let items = self.0.into_iter();
        items.map(|(subject, value)| (subject, value.into())).collect()
    }
}

impl<T: DeserializeOwned + Written, const OR_ONE: bool> Setting for List<T, OR_ONE> {
    /// Reads all values, so that each invalid one is reported.
    fn read(entry: Option<&Entry<'_>>, subject: &Subject, report: &mut Report<'_>) -> Checked<Self> {
        let Some(Entry { origin, value }) = entry else {
            return Ok(Self(Vec::new()));
        };
        let items: Vec<_> = match value {
            DeValue::Array(items) => {
                let items = items.iter();
                items
                    .map(|item| (origin.of_item(item.span()), item.get_ref()))
                    .collect()
            }
            DeValue::String(_) if OR_ONE => vec![(origin.clone(), value)],
            other => {
                let message = format!("expected a list, found {}", kind(other));
                let help = format!("write [{}]", T::EXAMPLE);
                return Err(report.emit(subject, message, help));
            }
        };
        let read = items.into_iter().map(|(origin, value)| {
            let subject = Subject::new(origin, &subject.key);
            match deserialize(Some(value)) {
                Ok(value) => Ok((subject, value)),
                Err(error) => Err(report.emit(&subject, error.message, error.help)),
            }
        });
        // All are read before the first error is returned.
        let read: Vec<_> = read.collect();
        read.into_iter().collect::<Result<_, _>>().map(Self)
    }
}
