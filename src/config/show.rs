//! Output of `ifnewer config show` (effective settings with their origins) and `ifnewer config reference`. Both are
//! generated from the schema, so that they are complete.
//!
//! The output of `show` is a valid configuration file. It contains no secrets, because settings name the files of secrets.

use std::fmt::{self, Display, Formatter, Write as _};

use super::diagnostic::{Location, Report};
use super::document::Document;
use super::schema::{KEYS, Key, Section};
use super::table::{Table, Value};
use super::{Config, Diagnostics, Sources, env};

/// Effective settings, printed as a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    sections: Vec<(String, Vec<Setting>)>,
    /// Whether to print the origin of each setting.
    pub with_origin: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    name: &'static str,
    /// Value as written in the file; `None`: not set.
    value: Option<String>,
    origin: Location,
}

impl Settings {
    /// Loads the settings. An invalid configuration is an error.
    pub fn read(sources: &Sources<'_>) -> Result<Self, Diagnostics> {
        let config = Config::gather(sources)?;
        let mut report = Report::new(sources.text, sources.origin);
        let mut document = Document::read(sources.text, &mut report);
        env::apply_overrides(&mut document, sources, &mut report);
        let fixed = Section::FIXED.into_iter().map(|section| {
            let header = match section {
                Section::Top => String::new(),
                section => format!("[{}]", section.name()),
            };
            let mut settings = settings(&document.fixed(section), &report, true);
            if let Some(data) = settings.iter_mut().find(|setting| setting.name == "data") {
                let folder = || quoted(&sources.data.to_string_lossy());
                data.value.get_or_insert_with(folder);
            }
            let is_tls = section == Section::Tls && sources.origin.as_os_str().is_empty();
            if is_tls && let Some(folder) = settings.iter_mut().find(|setting| setting.name == "folder") {
                folder.value = Some(quoted(&config.tls.folder.to_string_lossy()));
            }
            (header, settings)
        });
        let mut sections: Vec<_> = fixed.collect();
        for (header, tables) in [
            (None, &document.upstreams),
            (Some("[[rule]]"), &document.rules),
            (Some("[[allow]]"), &document.allows),
        ] {
            sections.extend(tables.iter().map(|table| {
                let named = || format!("[upstream.{}]", quoted(&table.name));
                let header = header.map_or_else(named, str::to_owned);
                (header, settings(table, &report, false))
            }));
        }
        Ok(Self {
            sections,
            with_origin: false,
        })
    }
}

/// Settings of a section: all, or only those that are set or have a default.
fn settings(table: &Table, report: &Report<'_>, with_unset: bool) -> Vec<Setting> {
    let keys = table.section.keys();
    let read = keys.map(|key| Setting {
        name: key.name,
        value: table.value(key.name).map(|value| written(key, value)),
        origin: report.location(table.entry_at(key.name)),
    });
    read.filter(|setting| with_unset || setting.value.is_some())
        .collect()
}

/// Formats a value as TOML.
fn written(key: &Key, value: &Value) -> String {
    match value {
        Value::Text(text) => quoted(text),
        Value::Number(number) => number.to_string(),
        Value::Bool(on) => on.to_string(),
        Value::List(entries) => {
            let all: Vec<_> = entries.iter().map(|entry| written(key, &entry.value)).collect();
            format!("[{}]", all.join(", "))
        }
        Value::Other(kind) => (*kind).to_owned(),
        // The default determines the type; keys without a default are strings.
        Value::Raw(text) => match key.default.and_then(|default| default.chars().next()) {
            Some('[') => {
                let all: Vec<_> = text
                    .split(',')
                    .map(str::trim)
                    .filter(|one| !one.is_empty())
                    .map(quoted)
                    .collect();
                format!("[{}]", all.join(", "))
            }
            Some('"') | None => quoted(text),
            Some(_) => text.clone(),
        },
    }
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

impl Display for Settings {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (header, settings) in &self.sections {
            if !header.is_empty() {
                writeln!(f, "\n{header}")?;
            }
            for setting in settings {
                let (name, origin) = (setting.name, Origin(&setting.origin));
                match (&setting.value, self.with_origin) {
                    (Some(value), true) => writeln!(f, "{:<40} # {origin}", format!("{name} = {value}"))?,
                    (Some(value), false) => writeln!(f, "{name} = {value}")?,
                    (None, true) => writeln!(f, "{:<40} # not set", format!("#{name} ="))?,
                    (None, false) => {}
                }
            }
        }
        Ok(())
    }
}

/// Origin of a setting, on one line.
struct Origin<'a>(&'a Location);

impl Display for Origin<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0 {
            Location::Text { file, line, .. } => write!(f, "{}:{line}", file.display()),
            Location::File(file) => write!(f, "{}", file.display()),
            Location::Variable(name) | Location::Flag(name) => f.write_str(name),
            Location::Default => f.write_str("default"),
        }
    }
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
    let mut last = None;
    for key in KEYS {
        if last != Some(key.section) {
            last = Some(key.section);
            let title = match key.section {
                Section::Top => "At the top",
                section => section.header(),
            };
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "\n## {title}\n\n| key | default | variable | |\n| --- | --- | --- | --- |"
            );
        }
        let code = |text: String| {
            if text.is_empty() {
                text
            } else {
                format!("`{text}`")
            }
        };
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} |",
            key.name,
            code(key.default.unwrap_or_default().to_owned()),
            code(key.variable().unwrap_or_default()),
            key.doc.replace('|', "\\|"),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::config::Flag;

    const TEXT: &str = "data = \"d\"\n[store]\nsize = \"9 GiB\"\n[connect]\ntunnel = [\"a.example\"]\n\
                        [upstream.\"ghcr.io\"]\nurl = \"https://mirror.example\"\n[[rule]]\nimages = [\"ghcr.io/a/*\"]\nmax_age = \"1m\"\n";

    fn sources() -> Sources<'static> {
        let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        Sources {
            data: PathBuf::from("/var/cache/ifnewer"),
            working_dir_certs: None,
            text: TEXT,
            origin: Path::new("i.toml"),
            variables: vec![
                variable("IFNEWER_TLS_NAMES", "one.example, two.example"),
                variable("IFNEWER_LIMITS_TUNNELS_MAX", "7"),
            ],
            flags: vec![Flag {
                name: "--log",
                key: "log.level",
                value: "debug".to_owned(),
            }],
        }
    }

    #[test]
    fn each_setting_shows_its_origin() {
        let mut settings = Settings::read(&sources()).unwrap();
        settings.with_origin = true;
        let text = settings.to_string();
        let lines: Vec<_> = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        for line in [
            "data = \"d\" # i.toml:1",
            "size = \"9 GiB\" # i.toml:3",
            "free = \"5 GiB\" # default",
            "tunnel = [\"a.example\"] # i.toml:5",
            "names = [\"one.example\", \"two.example\"] # IFNEWER_TLS_NAMES",
            "tunnels_max = 7 # IFNEWER_LIMITS_TUNNELS_MAX",
            "level = \"debug\" # --log",
            "#htpasswd = # not set",
            "[upstream.\"ghcr.io\"]",
            "url = \"https://mirror.example\" # i.toml:7",
            "max_age = \"1m\" # i.toml:10",
        ] {
            assert!(lines.iter().any(|shown| shown == line), "{line}: {text}");
        }
        for key in Section::FIXED.into_iter().flat_map(Section::keys) {
            assert!(
                text.contains(&format!("{} =", key.name)),
                "{}: {text}",
                key.path()
            );
        }
    }

    #[test]
    fn shown_settings_parse_to_the_same_configuration() {
        let shown = Settings::read(&sources()).unwrap();
        let text = shown.to_string();
        let again = Sources {
            text: &text,
            variables: Vec::new(),
            flags: Vec::new(),
            ..sources()
        };
        assert_eq!(Settings::read(&again).unwrap().to_string(), text);
        let (one, other) = (
            Config::gather(&sources()).unwrap(),
            Config::gather(&again).unwrap(),
        );
        assert_eq!(one.summary().to_string(), other.summary().to_string());
    }

    #[test]
    fn invalid_configuration_shows_no_settings() {
        let error = Sources {
            text: "polcy = 1",
            ..sources()
        };
        assert!(Settings::read(&error).is_err());
    }
}
