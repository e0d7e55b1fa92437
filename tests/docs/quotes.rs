//! Names of tests and files, and quoted messages, in the documentation.

use std::fmt::Write as _;
use std::path::Path;

use crate::text::{documents, prose_spans, read, root};

/// Messages of other programs that the documentation quotes.
const OF_OTHERS: [&str; 5] = [
    "Attempting next endpoint for pull after error",
    "certificate is valid for …, not",
    "http: server gave HTTP response to HTTPS client",
    "proxyconnect tcp: … connection refused",
    "x509: certificate signed by unknown authority",
];

/// First words of commands, which are not messages.
const COMMANDS: [&str; 14] = [
    "ca",
    "cargo",
    "config",
    "containerd",
    "ctr",
    "curl",
    "docker",
    "gzip",
    "ifnewer",
    "kill",
    "setup",
    "skopeo",
    "systemctl",
    "write",
];

/// Words from which a span in code quotes is taken for a message.
const WORDS_MIN: usize = 3;

#[test]
fn every_quoted_message_is_in_the_snapshot() {
    let snapshot = read(&root().join("tests/messages.txt"));
    let known: Vec<String> = snapshot.lines().map(without_placeholders).collect();
    let (mut checked, mut unknown) = (0, String::new());
    for document in documents() {
        for span in prose_spans(&document) {
            let Some(message) = message(&span) else { continue };
            checked += 1;
            let is_known =
                OF_OTHERS.contains(&message.as_str()) || known.iter().any(|text| is_in(&message, text));
            if !is_known {
                writeln!(unknown, "{}: `{span}`", document.display()).unwrap();
            }
        }
    }
    assert_eq!(unknown, "", "no such message in tests/messages.txt");
    assert!(checked > 30, "hardly any message was found: {checked}");
}

/// The message of a span, without log fields and with `…` for numbers. `None` for commands, settings and code.
fn message(span: &str) -> Option<String> {
    let words: Vec<&str> = span.split_whitespace().collect();
    let is_number = |word: &str| word.chars().all(|c| c.is_ascii_digit());
    let text: Vec<&str> = words
        .iter()
        .filter(|word| !word.contains("=\""))
        .map(|word| if is_number(word) { "…" } else { word })
        .collect();
    let has_fields = text.len() < words.len();
    let is_prose = text
        .iter()
        .all(|word| !word.contains(['=', '[', ']', '{', '}', '(', '$', '|', '>', '"']));
    let is_command = text.first().is_none_or(|word| COMMANDS.contains(word));
    let length = text.iter().filter(|word| **word != "…").count();
    let is_message = is_prose && !is_command && (length >= WORDS_MIN || has_fields && length > 1);
    let text = text.join(" ");
    is_message.then(|| {
        text.trim_end_matches(" …")
            .trim_start_matches("degraded: ")
            .to_owned()
    })
}

/// Whether the parts between the dots of `message` follow each other in `text`.
fn is_in(message: &str, text: &str) -> bool {
    let mut rest = text;
    message
        .split('…')
        .map(str::trim)
        .all(|part| match rest.split_once(part) {
            Some((_, after)) => {
                rest = after;
                true
            }
            None => false,
        })
}

/// A literal of the source with `…` for each placeholder.
fn without_placeholders(literal: &str) -> String {
    let mut text = String::new();
    let mut rest = literal;
    while let Some((before, after)) = rest.split_once('{') {
        text.push_str(before);
        text.push('…');
        rest = after.split_once('}').map_or("", |(_, after)| after);
    }
    text + rest
}

#[test]
fn every_named_test_and_file_exists() {
    let mut sources = String::new();
    for folder in ["src", "tests"] {
        collect(&root().join(folder), &mut sources);
    }
    let (mut checked, mut missing) = (0, String::new());
    for document in ["ARCHITECTURE.md", "docs/security.md"] {
        for span in prose_spans(&root().join(document)) {
            let extension = Path::new(span.as_str()).extension();
            let is_source = extension.is_some_and(|extension| extension == "rs" || extension == "sh");
            let is_path = span.contains('/') && is_source;
            let is_test = span.matches('_').count() >= 3
                && span
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            let exists = match (is_path, is_test) {
                (true, _) => ["", "src", "tests"]
                    .iter()
                    .any(|folder| root().join(folder).join(&span).exists()),
                (_, true) => {
                    sources.contains(&format!("fn {span}(")) || sources.contains(&format!("\n{span}()"))
                }
                _ => continue,
            };
            checked += 1;
            if !exists {
                writeln!(missing, "{document}: {span}").unwrap();
            }
        }
    }
    assert_eq!(missing, "", "no such test or file");
    assert!(checked > 200, "hardly any name was found: {checked}");
}

/// Appends the sources below `folder`.
fn collect(folder: &Path, sources: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, sources);
        } else if path
            .extension()
            .is_some_and(|extension| extension == "rs" || extension == "sh")
        {
            sources.push_str(&read(&path));
        }
    }
}
