//! TOML edit: sets keys and sections in the text. After an edit the text is parsed again, and the edit is kept only if
//! the result equals the old document plus the key.

use std::path::Path;

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use crate::setup::SetupError;
use crate::setup::edit::text::Text;

/// Parses the text.
pub(in crate::setup) fn read(path: &Path, text: &Text) -> Result<Table, SetupError> {
    toml::from_str(&text.body).map_err(|error: toml::de::Error| {
        let at = error.span().map_or(0, |span| span.start);
        let before = text.body.get(..at).unwrap_or(&text.body);
        SetupError::Unreadable {
            path: path.to_owned(),
            line: 1 + before.matches('\n').count(),
            detail: error.message().to_owned(),
        }
    })
}

/// The table at `path`, if every element on the way is a table.
pub(in crate::setup) fn table<'a>(root: &'a Table, path: &[&str]) -> Option<&'a Table> {
    path.iter()
        .try_fold(root, |table, name| table.get(*name)?.as_table())
}

/// Sets `key = value` in `section`, which is appended if it is missing. `None` if that would change something else.
pub(in crate::setup) fn set(text: &Text, section: &[&str], key: &str, value: &Value) -> Option<Text> {
    let meant = {
        let mut root: Table = toml::from_str(&text.body).ok()?;
        let table = section.iter().try_fold(&mut root, |table, name| {
            let entry = table.entry((*name).to_owned());
            entry.or_insert_with(|| Value::Table(Table::new())).as_table_mut()
        })?;
        if table.insert(key.to_owned(), value.clone()).is_some() {
            return None;
        }
        root
    };
    let line = format!("{} = {value}\n", quoted(key));
    let appended = text.appended(&format!("{}\n{line}", header(section)));
    after_headers(text, section, &line)
        .into_iter()
        .chain(Some(appended))
        .find(|edited| toml::from_str::<Table>(&edited.body).is_ok_and(|got| got == meant))
}

/// Replaces the value of `key` in `section` and keeps everything else. `None` if there is no such value, or only a
/// rewrite could do it.
pub(in crate::setup) fn replace(text: &Text, section: &[&str], key: &str, value: &Value) -> Option<Text> {
    let mut meant: Table = toml::from_str(&text.body).ok()?;
    let table = section
        .iter()
        .try_fold(&mut meant, |table, name| table.get_mut(*name)?.as_table_mut())?;
    *table.get_mut(key)? = value.clone();
    let root = DeTable::parse(&text.body).ok()?;
    let table = section
        .iter()
        .try_fold(root.get_ref(), |table, name| match table.get(*name)?.get_ref() {
            DeValue::Table(inner) => Some(inner),
            _ => None,
        })?;
    let span = table.get(key)?.span();
    let (before, after) = (text.body.get(..span.start)?, text.body.get(span.end..)?);
    let edited = text.with(format!("{before}{value}{after}"));
    toml::from_str::<Table>(&edited.body)
        .is_ok_and(|got| got == meant)
        .then_some(edited)
}

/// Candidates with `line` inserted after each possible header of `section`.
pub(in crate::setup) fn after_headers(text: &Text, section: &[&str], line: &str) -> Vec<Text> {
    headers(text)
        .filter(|(_, path)| path.iter().eq(section))
        .map(|(at, _)| text.inserted(at + 1, &format!("{}{line}", indent(text, at + 1))))
        .collect()
}

/// Adds a section with these lines before the first section whose path begins with `before`, or at the end. `None` if
/// that would change something else.
pub(in crate::setup) fn add(
    text: &Text,
    section: &[&str],
    body: &Table,
    before: Option<&str>,
) -> Option<Text> {
    let meant = {
        let mut root: Table = toml::from_str(&text.body).ok()?;
        let (last, endpoint) = section.split_last()?;
        let parent = endpoint.iter().try_fold(&mut root, |table, name| {
            let entry = table.entry((*name).to_owned());
            entry.or_insert_with(|| Value::Table(Table::new())).as_table_mut()
        })?;
        if parent
            .insert((*last).to_owned(), Value::Table(body.clone()))
            .is_some()
        {
            return None;
        }
        root
    };
    let block = format!("{}\n{body}", header(section));
    let first =
        before.and_then(|name| headers(text).find(|(_, path)| path.first().is_some_and(|p| p == name)));
    let edited = match first {
        Some((at, _)) => text.inserted(at, &format!("{block}\n")),
        None => text.appended(&block),
    };
    toml::from_str::<Table>(&edited.body)
        .is_ok_and(|got| got == meant)
        .then_some(edited)
}

/// `[a."b.c"]`
pub(in crate::setup) fn header(section: &[&str]) -> String {
    let names: Vec<String> = section.iter().map(|name| quoted(name)).collect();
    format!("[{}]", names.join("."))
}

/// A key in TOML notation, bare if possible.
fn quoted(name: &str) -> String {
    let is_bare = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-');
    if !name.is_empty() && name.chars().all(is_bare) {
        name.to_owned()
    } else {
        Value::String(name.to_owned()).to_string()
    }
}

/// Lines that look like a header, with the path of each. A line within a multi-line string also matches; the
/// verification rejects it.
fn headers(text: &Text) -> impl Iterator<Item = (usize, Vec<String>)> + '_ {
    text.body.lines().enumerate().filter_map(|(at, line)| {
        if !line.trim_start().starts_with('[') {
            return None;
        }
        let mut table: Table = toml::from_str(line).ok()?;
        let mut path = Vec::new();
        loop {
            let (name, value) = table.into_iter().next()?;
            path.push(name);
            table = match value {
                Value::Table(inner) if inner.is_empty() => return Some((at, path)),
                Value::Table(inner) => inner,
                Value::Array(list) => match list.into_iter().next()? {
                    Value::Table(inner) if inner.is_empty() => return Some((at, path)),
                    _ => return None,
                },
                _ => return None,
            };
        }
    })
}

/// Indentation of a line.
fn indent(text: &Text, line: usize) -> String {
    let current = text.body.lines().nth(line).unwrap_or_default();
    let blank = current.len() - current.trim_start().len();
    if current.trim().is_empty() {
        String::new()
    } else {
        current.get(..blank).unwrap_or_default().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(body: &str) -> Text {
        Text::read(Path::new("/f"), Some(body.as_bytes().to_vec())).unwrap()
    }

    fn string(value: &str) -> Value {
        Value::String(value.to_owned())
    }

    #[test]
    fn a_key_goes_where_its_section_is() {
        let table = [
            ("", "[a.\"b.c\"]\nk = \"v\"\n"),
            ("x = 1", "x = 1\n\n[a.\"b.c\"]\nk = \"v\"\n"),
            (
                "[a]\n  [a.'b.c'] # mine\n    y = 1 # two\n[z]\n",
                "[a]\n  [a.'b.c'] # mine\n    k = \"v\"\n    y = 1 # two\n[z]\n",
            ),
            (
                "[a]\r\nx = 1\r\n",
                "[a]\r\nx = 1\r\n\r\n[a.\"b.c\"]\r\nk = \"v\"\r\n",
            ),
            (
                "s = '''\n[a.\"b.c\"]\n'''\n[a.\"b.c\"]\n",
                "s = '''\n[a.\"b.c\"]\n'''\n[a.\"b.c\"]\nk = \"v\"\n",
            ),
        ];
        for (before, after) in table {
            let edited = set(&text(before), &["a", "b.c"], "k", &string("v")).unwrap();
            assert_eq!(edited.body, after, "{before:?}");
        }
    }

    #[test]
    fn toml_that_cannot_be_edited_safely_is_unchanged() {
        for before in ["a = 1\n", "[a.\"b.c\"]\nk = 2\n", "a = { x = 1 }\n", "[a\n"] {
            assert_eq!(
                set(&text(before), &["a", "b.c"], "k", &string("v")),
                None,
                "{before:?}"
            );
        }
    }

    #[test]
    fn a_value_is_replaced_where_it_stands() {
        let before = text("[a.'b.c'] # mine\n  k = '' # none\n  l = [1,\n 2]\n");
        let edited = replace(&before, &["a", "b.c"], "k", &string("v")).unwrap();
        assert_eq!(
            edited.body,
            "[a.'b.c'] # mine\n  k = \"v\" # none\n  l = [1,\n 2]\n"
        );
        let edited = replace(&before, &["a", "b.c"], "l", &Value::Array(vec![string("v")])).unwrap();
        assert_eq!(edited.body, "[a.'b.c'] # mine\n  k = '' # none\n  l = [\"v\"]\n");
        assert_eq!(replace(&before, &["a"], "k", &string("v")), None);
        assert_eq!(replace(&before, &["a", "b.c"], "m", &string("v")), None);
    }

    #[test]
    fn a_section_goes_before_its_like() {
        let mut body = Table::new();
        body.insert("k".to_owned(), string("v"));
        let before = text("# top\nserver = \"s\"\n\n[host.\"a\"]\nx = 1\n");
        let edited = add(&before, &["host", "b:1"], &body, Some("host")).unwrap();
        assert_eq!(
            edited.body,
            "# top\nserver = \"s\"\n\n[host.\"b:1\"]\nk = \"v\"\n\n[host.\"a\"]\nx = 1\n"
        );
        let edited = add(&text("# only words"), &["host", "b"], &body, Some("host")).unwrap();
        assert_eq!(edited.body, "# only words\n\n[host.b]\nk = \"v\"\n");
        assert_eq!(add(&before, &["host", "a"], &body, None), None, "it is there");
    }
}
