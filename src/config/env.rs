//! Overrides from environment variables and command-line flags.

use std::borrow::Cow;

use toml::Spanned;
use toml::de::DeValue;

use super::Sources;
use super::diagnostic::{Origin, Report, Subject};
use super::document::Document;
use super::schema::{KEYS, Key, Section};
use super::setting::Entry;
use super::value::nearest;

const PREFIX: &str = "IFNEWER_";

/// Short variable names that match the flags.
const ALIASES: &[(&str, &str)] = &[
    ("IFNEWER_LISTEN", "IFNEWER_LISTEN_REGISTRY"),
    ("IFNEWER_ADMIN", "IFNEWER_LISTEN_ADMIN"),
    ("IFNEWER_LOG", "IFNEWER_LOG_LEVEL"),
];

/// Variables that the command line reads; they are not settings.
const NON_SETTINGS: &[&str] = &["IFNEWER_CONFIG"];

/// A setting of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    /// Flag name, such as `--listen`.
    pub name: &'static str,
    /// Key, such as `listen.registry`.
    pub key: &'static str,
    /// Value; several values are joined by commas.
    pub value: String,
}

/// Applies variables over the file, then flags over both.
pub(super) fn apply_overrides<'a>(
    document: &mut Document<'a>,
    sources: &'a Sources<'_>,
    report: &mut Report<'_>,
) {
    for (name, value) in &sources.variables {
        let is_ours = name.starts_with(PREFIX) && !NON_SETTINGS.contains(&name.as_str());
        if !is_ours || is_kubernetes_service_variable(name) {
            continue;
        }
        let origin = Origin::Variable(name.clone());
        match key_of(name) {
            // Compose files set unused variables to the empty string.
            Some(_) if value.is_empty() => {}
            Some(key) => replace(document, key, origin, value),
            None => {
                let (message, help) = match renamed(name) {
                    Some(new) => (format!("`{name}` is now `{new}`"), format!("set `{new}` instead")),
                    None => ("no setting has this name".to_owned(), suggestion(name)),
                };
                report.emit(&Subject::new(origin, name), message, help);
            }
        }
    }
    for flag in &sources.flags {
        if let Some(key) = KEYS.iter().find(|key| key.path() == flag.key) {
            replace(document, key, Origin::Flag(flag.name), &flag.value);
        }
    }
}

/// Sets a key to the value of a variable or a flag. The default shows its kind; keys without a default are strings.
fn replace<'a>(document: &mut Document<'a>, key: &Key, origin: Origin, text: &'a str) {
    let string = |text: &'a str| DeValue::String(Cow::Borrowed(text));
    let value = match key.default.and_then(|default| default.chars().next()) {
        Some('[') => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            DeValue::Array(items.map(|item| Spanned::new(0..0, string(item))).collect())
        }
        Some('"') | None => string(text),
        Some(_) => match DeValue::parse(text).map(Spanned::into_inner) {
            Ok(value) if value.is_integer() || value.is_bool() => value,
            _ => string(text),
        },
    };
    document.set(key.section, key.name, Entry { origin, value });
}

/// New variable name of a renamed key.
fn renamed(variable: &str) -> Option<String> {
    let lower = variable.to_lowercase();
    Section::ALL.iter().find_map(|section| {
        let old = lower.strip_prefix(&format!("ifnewer_{}_", section.name()))?;
        section.renamed(old)?.variable()
    })
}

fn suggestion(variable: &str) -> String {
    let known = KEYS.iter().filter_map(Key::variable);
    let known: Vec<_> = known.map(|name| name.to_lowercase()).collect();
    match nearest(variable, known.iter().map(String::as_str)) {
        Some(name) => format!("did you mean `{}`?", name.to_uppercase()),
        None => "a variable is IFNEWER_SECTION_KEY, as in IFNEWER_STORE_SIZE".to_owned(),
    }
}

fn key_of(variable: &str) -> Option<&'static Key> {
    let alias = ALIASES.iter().find(|(short, _)| *short == variable);
    let full = alias.map_or(variable, |(_, full)| full);
    KEYS.iter().find(|key| key.variable().as_deref() == Some(full))
}

/// Whether Kubernetes set the variable for a service of the pod's namespace. A service named `ifnewer` or `ifnewer-…`
/// must not prevent the start: `IFNEWER_SERVICE_HOST`, `IFNEWER_PORT`, `IFNEWER_PORT_5000_TCP_ADDR`.
fn is_kubernetes_service_variable(name: &str) -> bool {
    let after = |word: &str| name.split_once(word).map(|(_, rest)| rest);
    name.ends_with("_SERVICE_HOST")
        || after("_SERVICE_PORT").is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        || after("_PORT").is_some_and(|rest| {
            let number = rest.trim_start_matches('_');
            rest.is_empty() || (rest.starts_with('_') && number.starts_with(|c: char| c.is_ascii_digit()))
        })
}
