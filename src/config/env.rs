//! Overrides from environment variables and command-line flags.

use super::Sources;
use super::diagnostic::{Origin, Report};
use super::document::Document;
use super::parsers::nearest;
use super::schema::{KEYS, Key, NON_SETTING_VARIABLES, Section, VARIABLE_ALIASES};
use super::table::{Entry, Value};

const PREFIX: &str = "IFNEWER_";

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
pub(super) fn apply_overrides(document: &mut Document, sources: &Sources<'_>, report: &mut Report<'_>) {
    for (name, value) in &sources.variables {
        if !name.starts_with(PREFIX)
            || NON_SETTING_VARIABLES.contains(&name.as_str())
            || is_kubernetes_service_variable(name)
        {
            continue;
        }
        match key_of(name) {
            // Compose files set unused variables to the empty string.
            Some(_) if value.is_empty() => {}
            Some(key) => replace(document, key, Origin::Variable(name.clone()), value),
            None => {
                let at = Origin::Variable(name.clone());
                let (message, help) = match renamed(name) {
                    Some(new) => (format!("`{name}` is now `{new}`"), format!("set `{new}` instead")),
                    None => ("no setting has this name".to_owned(), suggestion(name)),
                };
                report.emit(&at, name.as_str(), message, Some(help));
            }
        }
    }
    for flag in &sources.flags {
        if let Some(key) = KEYS.iter().find(|key| key.path() == flag.key) {
            replace(document, key, Origin::Flag(flag.name), &flag.value);
        }
    }
}

fn replace(document: &mut Document, key: &Key, at: Origin, value: &str) {
    let value = Value::Raw(value.to_owned());
    document.replace(key.section, key.name, Entry { at, value });
}

/// New variable name of a renamed key.
fn renamed(variable: &str) -> Option<String> {
    Section::FIXED.into_iter().find_map(|section| {
        let lower = variable.to_lowercase();
        let old = lower.strip_prefix(&format!("ifnewer_{}_", section.name()))?;
        section.renamed(old)?.variable()
    })
}

fn suggestion(variable: &str) -> String {
    let known: Vec<String> = KEYS
        .iter()
        .filter_map(Key::variable)
        .map(|name| name.to_lowercase())
        .collect();
    match nearest(variable, known.iter().map(String::as_str)) {
        Some(name) => format!("did you mean `{}`?", name.to_uppercase()),
        None => "a variable is IFNEWER_SECTION_KEY, as in IFNEWER_STORE_SIZE".to_owned(),
    }
}

fn key_of(variable: &str) -> Option<&'static Key> {
    let variable = VARIABLE_ALIASES
        .iter()
        .find(|(short, _)| *short == variable)
        .map_or(variable, |(_, full)| full);
    KEYS.iter()
        .find(|key| key.variable().as_deref() == Some(variable))
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
