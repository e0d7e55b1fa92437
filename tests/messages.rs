//! Snapshot of all error messages and all log messages of level info and above.
//!
//! Operators search for these texts, so a change must be deliberate. The messages are read from the sources and compared
//! with `tests/messages.txt`. To update that file: `UPDATE_MESSAGES=1 cargo test --test messages`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

const LOG_MACROS: &[&str] = &["tracing::warn!(", "tracing::error!("];
const INFO_MACROS: &[&str] = &["tracing::info!("];

#[test]
fn messages_match_the_snapshot() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut responses, mut problems, mut logs) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let (mut errors, mut events) = (BTreeSet::new(), BTreeSet::new());
    for file in sources(&root.join("src")) {
        let path = file.strip_prefix(root).unwrap().to_string_lossy().into_owned();
        let code = code(&fs::read_to_string(&file).unwrap());
        logs.extend(LOG_MACROS.iter().flat_map(|name| literals_in_calls(&code, name)));
        events.extend(INFO_MACROS.iter().flat_map(|name| literals_in_calls(&code, name)));
        if path.starts_with("src/admin") {
            for start in ["Problem::", "Error::custom(", "Err(format!("] {
                problems.extend(literals_in_calls(&code, start));
            }
        } else if path.starts_with("src/server") {
            responses.extend(literals(&without_logs(&code)));
        } else if path == "src/oci/failure.rs" {
            responses.extend(literals(&code));
        } else if path.starts_with("src/oci") {
            responses.extend(literals_in_calls(&code, "#[error("));
        } else {
            errors.extend(literals_in_calls(&code, "#[error("));
        }
    }
    assert!(
        responses.len() > 80 && problems.len() > 10 && logs.len() > 50,
        "the reader finds too few"
    );
    let mut found = String::new();
    for (title, texts) in [
        ("Registry responses and server errors", responses),
        ("Admin API errors", problems),
        ("Other errors: start, store, configuration and commands", errors),
        ("Log messages of level warn and above", logs),
        ("Log messages of level info", events),
    ] {
        writeln!(found, "# {title}").unwrap();
        for text in texts {
            writeln!(found, "{text}").unwrap();
        }
        found.push('\n');
    }
    let snapshot = root.join("tests/messages.txt");
    #[expect(clippy::disallowed_methods, reason = "the switch of this test alone")]
    let is_update = std::env::var_os("UPDATE_MESSAGES").is_some();
    if is_update {
        fs::write(&snapshot, found).unwrap();
        return;
    }
    let expected = fs::read_to_string(&snapshot).unwrap_or_default();
    let only_in = |one: &str, other: &str| -> Vec<String> {
        let other: BTreeSet<&str> = other.lines().collect();
        one.lines()
            .filter(|line| !other.contains(line))
            .map(str::to_owned)
            .collect()
    };
    assert!(
        found == expected,
        "messages changed. New: {:#?}\nGone: {:#?}\nTo accept them: UPDATE_MESSAGES=1 cargo test --test messages",
        only_in(&found, &expected),
        only_in(&expected, &found)
    );
}

/// Rust files below `folder`, without test modules.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "tests" {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") && name != "tests.rs" {
            found.push(path);
        }
    }
    found
}

/// The text without comments and without the test module, which is the last item of a file.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    text[..end]
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .fold(String::new(), |code, line| code + line + "\n")
}

/// The text without the calls that log, and without the reasons of lints.
fn without_logs(code: &str) -> String {
    let mut rest = code.to_owned();
    for start in ["tracing::", "#[expect(", "#[allow(", "#![", "reason = "] {
        let mut kept = String::new();
        let mut left = rest.as_str();
        while let Some(at) = left.find(start) {
            let open = left[at..].find(['(', '[', '"']).unwrap() + at;
            kept.push_str(&left[..at]);
            left = &left[open + end_of(&left[open..])..];
        }
        rest = kept + left;
    }
    rest
}

/// Literals in the arguments of each call that begins with `start`.
fn literals_in_calls(code: &str, start: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = code;
    while let Some(at) = left.find(start) {
        let Some(open) = left[at..].find('(').map(|open| open + at) else {
            break;
        };
        let end = open + end_of(&left[open..]);
        found.extend(literals(&left[open..end]));
        left = &left[end..];
    }
    found
}

/// The end of the bracket or literal that `text` begins with.
fn end_of(text: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    loop {
        match &text[at..] {
            "" => return text.len(),
            rest if literal(rest).is_some() => {
                at += literal(rest).unwrap().0;
                if depth == 0 {
                    return at;
                }
                continue;
            }
            rest if rest.starts_with(['(', '[', '{']) => depth += 1,
            rest if rest.starts_with([')', ']', '}']) => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
        at += text[at..].chars().next().unwrap().len_utf8();
    }
}

/// String literals that are sentences: those with a space between letters.
fn literals(code: &str) -> Vec<String> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < code.len() {
        let rest = &code[at..];
        if let Some((length, text)) = literal(rest) {
            let words = text
                .split(' ')
                .filter(|word| word.chars().any(char::is_alphabetic));
            if words.count() > 1 {
                found.push(text);
            }
            at += length;
        } else {
            at += rest.chars().next().unwrap().len_utf8();
        }
    }
    found
}

/// The literal that `rest` begins with: its length in the source, and its text with line continuations joined.
fn literal(rest: &str) -> Option<(usize, String)> {
    if let Some(body) = rest.strip_prefix("r#\"") {
        let end = body.find("\"#")?;
        return Some((end + 5, body[..end].to_owned()));
    }
    if rest.starts_with("'\"'") {
        return Some((3, String::new()));
    }
    let body = rest.strip_prefix('"')?;
    let (mut text, mut escaped) = (String::new(), false);
    for (at, c) in body.char_indices() {
        match c {
            '\n' if escaped => {
                text.pop();
                text.push('\n');
                escaped = false;
            }
            _ if escaped => {
                text.push(c);
                escaped = false;
            }
            '"' => {
                let joined = text
                    .split('\n')
                    .enumerate()
                    .fold(String::new(), |joined, (line, part)| {
                        joined + if line == 0 { part } else { part.trim_start() }
                    });
                return Some((at + 2, joined));
            }
            _ => {
                escaped = c == '\\';
                text.push(c);
            }
        }
    }
    None
}
