//! TOML document as tables of known keys with source spans; values are not interpreted yet.

use std::borrow::Cow;
use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{Checked, Origin, Report, Reported, Subject, secret_value};
use super::schema::{KEYS, Section};
use super::setting::{Entry, Table};
use super::value::nearest;
use super::{Sources, env};

/// A parsed configuration file.
#[derive(Default)]
pub(super) struct Document<'a> {
    fixed: BTreeMap<Section, Table<'a>>,
    /// Sections in the order of the file.
    pub(super) upstreams: Vec<Table<'a>>,
    pub(super) rules: Vec<Table<'a>>,
    pub(super) allows: Vec<Table<'a>>,
}

impl<'a> Document<'a> {
    /// Reads all sources.
    pub(super) fn read(sources: &'a Sources<'_>, report: &mut Report<'_>) -> Checked<Self> {
        let mut document = Self::parse(sources.text, report)?;
        env::apply_overrides(&mut document, sources, report);
        Ok(document)
    }

    /// Parses the text. If it is not TOML, only syntax errors are reported, because the parsed remainder is unreliable.
    fn parse(text: &'a str, report: &mut Report<'_>) -> Checked<Self> {
        let (root, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            report_syntax_errors(text, &errors, report);
            return Err(Reported);
        }
        let mut document = Self::default();
        for (key, value) in root.get_ref() {
            document.read_root_key(key, value, report);
        }
        document.upstreams.sort_by_key(|table| match &table.origin {
            Origin::Span(span) => span.start,
            _ => 0,
        });
        Ok(document)
    }

    /// A section that occurs at most once.
    pub(super) fn fixed(&self, section: Section) -> Table<'a> {
        let default = || Table::new(section, "", Origin::Default);
        self.fixed.get(&section).cloned().unwrap_or_else(default)
    }

    /// Sets a value of a section that occurs at most once.
    pub(super) fn set(&mut self, section: Section, key: &'static str, entry: Entry<'a>) {
        let mut table = self.fixed(section);
        table.set(key, entry);
        self.fixed.insert(section, table);
    }

    fn read_root_key(
        &mut self,
        key: &Spanned<Cow<'a, str>>,
        value: &Spanned<DeValue<'a>>,
        report: &mut Report<'_>,
    ) {
        let name = key.get_ref().as_ref();
        let origin = Origin::Span(key.span());
        let subject = Subject::new(origin.clone(), name);
        let sections = || Section::ALL.iter().copied().skip(1);
        let section = sections().find(|section| section.name() == name);
        match (section, value.get_ref()) {
            (None, _) => {
                let mut top = self.fixed(Section::Top);
                read_key(&mut top, key, value, report);
                self.fixed.insert(Section::Top, top);
            }
            (Some(Section::Upstream), DeValue::Table(upstreams)) => self.read_upstreams(upstreams, report),
            (Some(section @ Section::Rule), DeValue::Array(tables)) => {
                self.rules = read_numbered(section, tables, report);
            }
            (Some(section @ Section::Allow), DeValue::Array(tables)) => {
                self.allows = read_numbered(section, tables, report);
            }
            (Some(section), DeValue::Table(keys)) if section.is_fixed() => {
                let table = read_table(Table::new(section, "", origin), keys, report);
                self.fixed.insert(section, table);
            }
            (Some(section), _) if section.is_fixed() => {
                let help = format!("write {} on its own line", section.header());
                report.emit(&subject, format!("`{name}` is a section"), help);
            }
            (Some(section), _) => {
                let help = format!("begin each one with {}", section.header());
                report.emit(&subject, format!("`{name}` is a list of sections"), help);
            }
        }
    }

    fn read_upstreams(&mut self, upstreams: &DeTable<'a>, report: &mut Report<'_>) {
        for (key, value) in upstreams {
            let name = key.get_ref().as_ref();
            let table = Table::new(Section::Upstream, name, Origin::Span(key.span()));
            let DeValue::Table(keys) = value.get_ref() else {
                let help = "begin the upstream with [upstream.\"ghcr.io\"]";
                report.emit(&table.subject(), "an upstream is a section of its own", help);
                continue;
            };
            if let Some(rest) = dotted_rest(keys) {
                let message = "an upstream's name with dots needs quotes";
                report.emit(
                    &table.subject(),
                    message,
                    format!("write [upstream.\"{name}.{rest}\"]"),
                );
            } else {
                self.upstreams.push(read_table(table, keys, report));
            }
        }
    }
}

/// Reads repeatable sections in order; they are numbered from one.
fn read_numbered<'a>(
    section: Section,
    tables: &[Spanned<DeValue<'a>>],
    report: &mut Report<'_>,
) -> Vec<Table<'a>> {
    let mut read = Vec::new();
    for (value, number) in tables.iter().zip(1..) {
        let table = Table::new(section, format!("{number}"), Origin::Span(value.span()));
        if let DeValue::Table(keys) = value.get_ref() {
            read.push(read_table(table, keys, report));
            continue;
        }
        let message = match section {
            Section::Rule => "a rule is a section",
            _ => "an allow list is a section",
        };
        let help = format!("begin each one with [[{}]]", section.name());
        report.emit(&table.subject(), message, help);
    }
    read
}

/// Reports one syntax error per line, because further errors of a line mostly follow from the first.
fn report_syntax_errors(text: &str, errors: &[toml::de::Error], report: &mut Report<'_>) {
    let mut reported_lines = Vec::new();
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        let before = text.get(..span.start).unwrap_or_default();
        let line = before.matches('\n').count();
        if reported_lines.contains(&line) {
            continue;
        }
        reported_lines.push(line);
        let unquoted = error.message().starts_with("string values must be quoted");
        let (message, help) = match text.get(span.clone()) {
            Some(word) if unquoted => {
                let setting = before.rsplit('\n').next().unwrap_or_default();
                let word = if secret_value(setting).is_some() {
                    "…"
                } else {
                    word
                };
                ("a string needs quotes", format!("write \"{word}\""))
            }
            _ => (error.message(), String::new()),
        };
        report.emit(&Subject::new(Origin::Span(span), ""), message, help);
    }
}

fn read_table<'a>(mut table: Table<'a>, keys: &DeTable<'a>, report: &mut Report<'_>) -> Table<'a> {
    for (key, value) in keys {
        read_key(&mut table, key, value, report);
    }
    table
}

fn read_key<'a>(
    table: &mut Table<'a>,
    key: &Spanned<Cow<'a, str>>,
    value: &Spanned<DeValue<'a>>,
    report: &mut Report<'_>,
) {
    let name = key.get_ref().as_ref();
    if let Some(key) = table.section.key(name) {
        let (origin, value) = (Origin::Span(value.span()), value.get_ref().clone());
        table.set(key.name, Entry { origin, value });
        return;
    }
    let (message, help) = match table.section.renamed(name) {
        Some(new) => (
            format!("`{name}` is now `{}`", new.name),
            format!("write `{}` instead", new.name),
        ),
        None => (format!("unknown key `{name}`"), suggestion(table.section, name)),
    };
    let subject = Subject::new(Origin::Span(key.span()), table.path(name));
    report.emit(&subject, message, help);
}

/// Hint for an unknown key of this section.
fn suggestion(section: Section, name: &str) -> String {
    if section == Section::Upstream && name == "password" {
        return "passwords are not accepted here; put it into a file and set `password_file`".to_owned();
    }
    if let Some(key) = KEYS.iter().find(|key| key.name == name) {
        return format!("`{name}` belongs to {}", key.section.header());
    }
    let own = section.keys().map(|key| key.name);
    let sections = Section::ALL.iter().map(|section| section.name()).skip(1);
    let sections = sections.filter(|_| section == Section::Top);
    if let Some(near) = nearest(name, own.clone().chain(sections)) {
        return format!("did you mean `{near}`?");
    }
    let elsewhere = nearest(name, KEYS.iter().map(|key| key.name));
    match KEYS.iter().find(|key| Some(key.name) == elsewhere) {
        Some(key) => format!(
            "did you mean `{}`? It belongs to {}",
            key.name,
            key.section.header()
        ),
        None => format!(
            "the keys of this section are {}",
            own.collect::<Vec<_>>().join(", ")
        ),
    }
}

/// The rest of the name in `[upstream.docker.io]`: a table that contains only a table, under a name that is not a key.
fn dotted_rest(keys: &DeTable<'_>) -> Option<String> {
    let mut entries = keys.iter();
    let (Some((name, value)), None) = (entries.next(), entries.next()) else {
        return None;
    };
    let (name, inner) = (name.get_ref(), value.get_ref().as_table()?);
    let rest = || dotted_rest(inner).map_or(String::new(), |rest| format!(".{rest}"));
    Section::Upstream
        .key(name)
        .is_none()
        .then(|| format!("{name}{}", rest()))
}
