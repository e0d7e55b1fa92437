//! Output of `ifnewer config show` (effective settings with their origins) and `ifnewer config reference`. Both are
//! generated from the schema, so that they are complete.
//!
//! The output of `show` is a valid configuration file. It contains no secrets, because settings name the files of secrets.

use std::fmt::Write as _;

use toml::de::DeValue;

use super::diagnostic::{Origin, Report};
use super::document::Document;
use super::schema::Section;
use super::setting::{Entry, Table};
use super::{Config, Diagnostics, Sources};

/// Prints the effective settings as a configuration file, on request each with its origin. An invalid configuration is an
/// error.
pub fn show(sources: &Sources<'_>, with_origin: bool) -> Result<String, Diagnostics> {
    let config = Config::gather(sources)?;
    let mut report = Report::new(sources.text, sources.origin);
    let Ok(mut document) = Document::read(sources, &mut report) else {
        return Err(report.into_diagnostics());
    };
    // Defaults that depend on the environment.
    for (section, key, path) in [
        (Section::Top, "data", &config.data),
        (Section::Tls, "folder", &config.tls.folder),
    ] {
        let is_of_environment = section == Section::Top || sources.origin.as_os_str().is_empty();
        let is_set = document
            .fixed(section)
            .entry(key)
            .is_some_and(|entry| entry.origin != Origin::Default);
        if is_of_environment && !is_set {
            let value = DeValue::String(path.to_string_lossy().into_owned().into());
            let origin = Origin::Default;
            document.set(section, key, Entry { origin, value });
        }
    }
    let mut text = String::new();
    let fixed = Section::ALL.iter().filter(|section| section.is_fixed());
    for table in fixed.map(|&section| document.fixed(section)) {
        if table.section != Section::Top {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "\n[{}]", table.section.name());
        }
        write_settings(&mut text, &table, &report, with_origin, with_origin);
    }
    for table in [&document.upstreams, &document.rules, &document.allows]
        .into_iter()
        .flatten()
    {
        let _ = match table.section {
            Section::Upstream => writeln!(text, "\n[upstream.{}]", quoted(&table.name)),
            section => writeln!(text, "\n[[{}]]", section.name()),
        };
        write_settings(&mut text, table, &report, with_origin, false);
    }
    Ok(text)
}

fn write_settings(
    text: &mut String,
    table: &Table<'_>,
    report: &Report<'_>,
    with_origin: bool,
    with_unset: bool,
) {
    for key in table.section.keys() {
        let (name, entry) = (key.name, table.entry(key.name));
        let _ = match entry.map(|entry| (written(&entry.value), report.describe(&entry.origin))) {
            Some((value, origin)) if with_origin => {
                writeln!(text, "{:<40} # {origin}", format!("{name} = {value}"))
            }
            Some((value, _)) => writeln!(text, "{name} = {value}"),
            None if with_unset => writeln!(text, "{:<40} # not set", format!("#{name} =")),
            None => Ok(()),
        };
    }
}

/// Formats a value of a valid setting as TOML.
fn written(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => quoted(text),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| written(item.get_ref())).collect();
            format!("[{}]", items.join(", "))
        }
        other => other.as_bool().unwrap_or_default().to_string(),
    }
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// Reference of all settings, as in `docs/configuration.md`.
pub fn reference() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         <!-- Made by `ifnewer config reference > docs/configuration.md`; a test holds it to the program. -->\n\n\
         An empty file works, and so does no file. `ifnewer check` validates the configuration.\n\
         `ifnewer config show --origin` prints each effective setting with its origin: a flag, a variable, a line of\n\
         the file, or the default, in this order of precedence. SIGHUP reads the file and the certificates again. `data`,\n\
         `[listen]` and `[limits]` need a restart, except `downloads_per_upstream_max`.\n\n\
         The file is `--config`, `IFNEWER_CONFIG` or `/etc/ifnewer/ifnewer.toml`. Durations are written as `\"500ms\"`, `\"30s\"`,\n\
         `\"5m\"`, `\"12h\"`, `\"7d\"`; sizes as `\"500 MiB\"`, `\"50 GiB\"`, `\"1 TB\"`. Lists in variables are separated by commas; an\n\
         empty variable counts as unset. Relative paths start at the directory of the file. Commented template:\n\
         [`config/ifnewer.toml`](../config/ifnewer.toml).\n",
    );
    for section in Section::ALL {
        let title = match section {
            Section::Top => "At the top".to_owned(),
            section => section.header(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\n## {title}\n\n| key | default | variable | |\n| --- | --- | --- | --- |"
        );
        for key in section.keys() {
            let code = |text: String| format!("`{text}`");
            let default = key
                .default
                .map(|default| code(default.to_owned()))
                .unwrap_or_default();
            let variable = key.variable().map(code).unwrap_or_default();
            let doc = key.doc.replace('|', "\\|");
            let _ = writeln!(text, "| `{}` | {default} | {variable} | {doc} |", key.name);
        }
    }
    text
}
