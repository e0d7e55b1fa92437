//! TOML document as tables of known keys with source spans; values are not interpreted yet.

use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{Origin, Report};
use super::parsers::nearest;
use super::schema::{KEYS, Section};
use super::table::{Entry, Table};

/// A parsed configuration file.
pub(super) struct Document {
    /// Whether the text is not TOML; then no table is filled.
    pub(super) is_malformed: bool,
    fixed: BTreeMap<Section, Table>,
    /// Sections in the order of the file.
    pub(super) upstreams: Vec<Table>,
    pub(super) rules: Vec<Table>,
    pub(super) allows: Vec<Table>,
}

impl Document {
    /// Parses the text. Invalid TOML yields syntax errors only, because the parsed remainder is unreliable.
    pub(super) fn read(text: &str, report: &mut Report<'_>) -> Self {
        let (root, errors) = DeTable::parse_recoverable(text);
        report_syntax_errors(text, &errors, report);
        let fixed = Section::FIXED
            .into_iter()
            .map(|section| (section, Table::new(section, "", Origin::Default)));
        let is_malformed = !errors.is_empty();
        let mut document = Self {
            is_malformed,
            fixed: fixed.collect(),
            upstreams: Vec::new(),
            rules: Vec::new(),
            allows: Vec::new(),
        };
        if !is_malformed {
            document.read_root(root.get_ref(), report);
            document.upstreams.sort_by_key(|table| match &table.at {
                Origin::Span(span) => span.start,
                _ => 0,
            });
        }
        document
    }

    /// A section that occurs at most once.
    pub(super) fn fixed(&self, section: Section) -> Table {
        self.fixed
            .get(&section)
            .cloned()
            .unwrap_or_else(|| Table::new(section, "", Origin::Default))
    }

    /// Overrides a value of the file.
    pub(super) fn replace(&mut self, section: Section, key: &'static str, entry: Entry) {
        if let Some(table) = self.fixed.get_mut(&section) {
            table.set(key, entry);
        }
    }

    fn read_root(&mut self, root: &DeTable<'_>, report: &mut Report<'_>) {
        for (key, value) in root {
            let name = key.get_ref().as_ref();
            let at = Origin::Span(key.span());
            let section = Section::FIXED
                .into_iter()
                .find(|s| *s != Section::Top && s.name() == name);
            match (section, name, value.get_ref()) {
                (Some(section), _, DeValue::Table(keys)) => {
                    let table = read_table(Table::new(section, "", at), keys, report);
                    self.fixed.insert(section, table);
                }
                (_, "upstream", DeValue::Table(upstreams)) => self.read_upstreams(upstreams, report),
                (_, "rule", DeValue::Array(rules)) => {
                    self.rules = read_numbered(Section::Rule, rules, report);
                }
                (_, "allow", DeValue::Array(allows)) => {
                    self.allows = read_numbered(Section::Allow, allows, report);
                }
                (Some(section), ..) => {
                    let message = format!("`{name}` is a section");
                    report.emit(
                        &at,
                        name,
                        message,
                        Some(format!("write {} on its own line", section.header())),
                    );
                }
                (_, "upstream" | "rule" | "allow", _) => {
                    let header = match name {
                        "rule" => "`[[rule]]`",
                        "allow" => "`[[allow]]`",
                        _ => "`[upstream.\"ghcr.io\"]`",
                    };
                    let message = format!("`{name}` is a list of sections");
                    report.emit(&at, name, message, Some(format!("begin each one with {header}")));
                }
                (None, ..) => {
                    if let Some(top) = self.fixed.get_mut(&Section::Top) {
                        put(top, key.get_ref(), &at, value, report);
                    }
                }
            }
        }
    }

    fn read_upstreams(&mut self, upstreams: &DeTable<'_>, report: &mut Report<'_>) {
        for (name, value) in upstreams {
            let at = Origin::Span(name.span());
            let path = format!("upstream.\"{}\"", name.get_ref());
            match value.get_ref() {
                DeValue::Table(keys) if is_dotted_name(keys) => {
                    let full = format!("{}.{}", name.get_ref(), first_key(keys));
                    let message = "an upstream's name with dots needs quotes";
                    report.emit(&at, path, message, Some(format!("write [upstream.\"{full}\"]")));
                }
                DeValue::Table(keys) => {
                    let table = Table::new(Section::Upstream, name.get_ref().as_ref(), at);
                    let table = read_table(table, keys, report);
                    self.upstreams.push(table);
                }
                _ => {
                    let help = "begin the upstream with [upstream.\"ghcr.io\"]".to_owned();
                    report.emit(&at, path, "an upstream is a section of its own", Some(help));
                }
            }
        }
    }
}

/// Reads repeatable sections in order; they are numbered from one.
fn read_numbered(section: Section, tables: &[Spanned<DeValue<'_>>], report: &mut Report<'_>) -> Vec<Table> {
    let mut read = Vec::new();
    for (index, table) in tables.iter().enumerate() {
        let at = Origin::Span(table.span());
        if let DeValue::Table(keys) = table.get_ref() {
            let number = (index + 1).to_string();
            read.push(read_table(Table::new(section, number, at), keys, report));
        } else {
            let name = section.name();
            let message = if section == Section::Rule {
                "a rule is a section"
            } else {
                "an allow list is a section"
            };
            let header = section.header().trim_matches('`');
            report.emit(&at, name, message, Some(format!("begin each one with {header}")));
        }
    }
    read
}

/// Reports one syntax error per line, because further errors of a line mostly follow from the first.
fn report_syntax_errors(text: &str, errors: &[toml::de::Error], report: &mut Report<'_>) {
    let mut reported_lines = Vec::new();
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        let line = text
            .get(..span.start)
            .map_or(0, |before| before.matches('\n').count());
        if reported_lines.contains(&line) {
            continue;
        }
        reported_lines.push(line);
        let unquoted = error.message().starts_with("string values must be quoted");
        let (message, help) = match text.get(span.clone()) {
            Some(word) if unquoted => ("a string needs quotes", Some(format!("write \"{word}\""))),
            _ => (error.message(), None),
        };
        report.emit(&Origin::Span(span), "", message, help);
    }
}

fn read_table(mut table: Table, keys: &DeTable<'_>, report: &mut Report<'_>) -> Table {
    for (key, value) in keys {
        put(
            &mut table,
            key.get_ref(),
            &Origin::Span(key.span()),
            value,
            report,
        );
    }
    table
}

fn put(table: &mut Table, name: &str, at: &Origin, value: &Spanned<DeValue<'_>>, report: &mut Report<'_>) {
    if let Some(key) = table.section.key(name) {
        table.set(key.name, Entry::read(value));
        return;
    }
    let path = table.path(name);
    if let Some(key) = table.section.renamed(name) {
        let message = format!("`{name}` is now `{}`", key.name);
        let help = format!("write `{}` instead", key.name);
        report.emit(at, path, message, Some(help));
        return;
    }
    let message = format!("unknown key `{name}`");
    let help = suggestion(table.section, name);
    report.emit(at, path, message, Some(help));
}

/// Hint for an unknown key of this section.
fn suggestion(section: Section, name: &str) -> String {
    if section == Section::Upstream && name == "password" {
        return "passwords are not accepted here; put it into a file and set `password_file`".to_owned();
    }
    if let Some(key) = KEYS.iter().find(|key| key.name == name && key.section != section) {
        return format!("`{name}` belongs to {}", key.section.header());
    }
    let own = section.keys().map(|key| key.name);
    let sections = Section::FIXED
        .into_iter()
        .chain([Section::Upstream, Section::Rule, Section::Allow])
        .map(Section::name);
    let near = if section == Section::Top {
        nearest(name, own.clone().chain(sections.filter(|name| !name.is_empty())))
    } else {
        nearest(name, own.clone())
    };
    if let Some(near) = near {
        return format!("did you mean `{near}`?");
    }
    let elsewhere = nearest(name, KEYS.iter().map(|key| key.name))
        .and_then(|near| KEYS.iter().find(|key| key.name == near));
    match elsewhere {
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

/// Detects `[upstream.docker.io]`: a table that contains only a table, under a name that is not a key.
fn is_dotted_name(keys: &DeTable<'_>) -> bool {
    let mut values = keys.iter();
    match (values.next(), values.next()) {
        (Some((name, value)), None) => {
            value.get_ref().is_table() && Section::Upstream.key(name.get_ref()).is_none()
        }
        _ => false,
    }
}

fn first_key(keys: &DeTable<'_>) -> String {
    let Some((name, value)) = keys.iter().next() else {
        return String::new();
    };
    match value.get_ref() {
        DeValue::Table(inner) if is_dotted_name(inner) => format!("{}.{}", name.get_ref(), first_key(inner)),
        _ => name.get_ref().to_string(),
    }
}
