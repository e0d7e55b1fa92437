//! Documentation against the program: decision tables, configurations, commands, messages, names and links.
//!
//! `UPDATE_DOCS=1 cargo test --test docs` rewrites the tables.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

#[path = "docs/commands.rs"]
mod commands;
#[path = "docs/decisions.rs"]
mod decisions;
#[path = "docs/quotes.rs"]
mod quotes;
#[path = "docs/text.rs"]
mod text;

use std::path::Path;

use ifnewer::config::{Config, KEYS};
use text::{blocks, documents, links, read};

/// Sections of client configuration files in the documentation.
const OF_CLIENTS: [&str; 7] = [
    "capabilities",
    "host",
    "plugins",
    "registry",
    "runners",
    "server",
    "version",
];

#[test]
fn every_toml_is_a_valid_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let mut ours = 0;
    for block in blocks(&["toml"]) {
        let at = block.place();
        let table: toml::Table = block.text.parse().unwrap_or_else(|error| panic!("{at}: {error}"));
        let is_ours = |key: &String| {
            KEYS.iter()
                .any(|known| known.path().split('.').next() == Some(key))
        };
        if table.keys().all(is_ours) {
            ours += 1;
            let text = with_its_files(&block.text, folder.path());
            Config::read(&text, Path::new(&at)).unwrap_or_else(|faults| panic!("{faults}"));
        } else {
            let unknown = table.keys().find(|key| !OF_CLIENTS.contains(&key.as_str()));
            assert_eq!(unknown, None, "{at}: an unknown key");
        }
    }
    assert!(ours > 6, "hardly any configuration was found: {ours}");
}

/// Creates the files that a configuration names.
fn with_its_files(text: &str, folder: &Path) -> String {
    let text = text.replace("/etc/ifnewer/", &format!("{}/", folder.display()));
    for path in text.split('"').filter(|word| Path::new(word).starts_with(folder)) {
        let is_certificate = Path::new(path)
            .extension()
            .is_some_and(|extension| extension == "pem");
        let content = if is_certificate {
            let certified = rcgen::generate_simple_self_signed(["regional.example.org".to_owned()]);
            certified.unwrap().cert.pem()
        } else {
            "a".repeat(64)
        };
        std::fs::write(path, content).unwrap();
    }
    text
}

/// A line that is only a link to a file is followed by its text.
#[test]
fn every_quoted_file_is_verbatim() {
    let mut checked = 0;
    for document in documents() {
        let text = read(&document);
        for (at, _) in text.match_indices("):\n\n```") {
            let (before, after) = (&text[..at], &text[at..]);
            let line = before.rsplit('\n').next().unwrap();
            let Some((_, target)) = line.split_once("](").filter(|_| line.starts_with("[`")) else {
                continue;
            };
            let file = std::fs::read_to_string(document.parent().unwrap().join(target)).unwrap();
            let (_, block) = after.split_once("```").unwrap();
            let (_, block) = block.split_once('\n').unwrap();
            assert!(
                block.starts_with(&format!("{file}```\n")),
                "{}: {target}",
                document.display()
            );
            checked += 1;
        }
    }
    assert!(checked > 5, "hardly any file was found: {checked}");
}

#[test]
fn every_json_block_is_valid() {
    for block in blocks(&["json"]) {
        serde_json::from_str::<serde_json::Value>(&block.text)
            .unwrap_or_else(|error| panic!("{}: {error}", block.place()));
    }
}

#[test]
fn every_link_target_exists() {
    for document in documents() {
        let folder = document.parent().unwrap();
        for link in links(&document) {
            assert!(
                folder.join(&link).exists(),
                "{}: {link} does not exist",
                document.display()
            );
        }
    }
}
