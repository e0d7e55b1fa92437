//! TOML edit: sets keys of a section. The edit is kept only if the result equals the old document and the keys.

use toml::{Table, Value};
use toml_edit::{Decor, DocumentMut, Item, Key};

use super::Text;
use crate::setup::SetupError;

/// Parses the text.
pub(in crate::setup) fn read(text: &Text) -> Result<Table, SetupError> {
    toml::from_str(&text.body).map_err(|error: toml::de::Error| {
        let line = text.line_of(error.span().map_or(0, |span| span.start));
        SetupError::unreadable(&text.path, line, error.message())
    })
}

/// The table at `path`, if every element on the way is a table.
pub(in crate::setup) fn table<'a>(root: &'a Table, path: &[&str]) -> Option<&'a Table> {
    path.iter()
        .try_fold(root, |table, name| table.get(*name)?.as_table())
}

/// A table of one key.
pub(in crate::setup) fn one(key: &str, value: impl Into<Value>) -> Table {
    Table::from_iter([(key.to_owned(), value.into())])
}

/// `[a."b.c"]`
pub(in crate::setup) fn header(section: &[&str]) -> String {
    let names = section
        .iter()
        .map(|name| Key::new(*name).display_repr().into_owned());
    format!("[{}]", names.collect::<Vec<_>>().join("."))
}

/// Where a new section goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::setup) enum Place {
    /// Before the other sections of the same parent.
    First,
    /// At the end of the file.
    Last,
}

/// Sets the keys, or reports what to add by hand.
pub(in crate::setup) fn set(
    text: &Text,
    section: &[&str],
    settings: &Table,
    place: Place,
) -> Result<Text, SetupError> {
    try_set(text, section, settings, place).ok_or_else(|| {
        text.conflict(
            "the TOML layout does not permit an automatic edit",
            by_hand(section, settings),
        )
    })
}

/// The remedy for a section that cannot be edited.
pub(in crate::setup) fn by_hand(section: &[&str], settings: &Table) -> String {
    let settings = settings.to_string().trim_end().replace('\n', ", ");
    format!("Add by hand: {} with {settings}", header(section))
}

/// Sets the keys. A number in `section` is a position in an array of tables. `None` if that would change something
/// else.
pub(in crate::setup) fn try_set(
    text: &Text,
    section: &[&str],
    settings: &Table,
    place: Place,
) -> Option<Text> {
    let mut meant = Value::Table(toml::from_str(&text.body).ok()?);
    let meant_section = section.iter().try_fold(&mut meant, |at, name| match at {
        Value::Table(table) => Some(table.entry(*name).or_insert_with(|| Value::Table(Table::new()))),
        Value::Array(list) => list.get_mut(name.parse::<usize>().ok()?),
        _ => None,
    })?;
    let mut document: DocumentMut = text.body.parse().ok()?;
    let mut comments = document.trailing().as_str().unwrap_or_default().to_owned();
    let first = first_position(&document, section).filter(|_| place == Place::First);
    let table = descend(document.as_table_mut(), section)?;
    for (key, value) in settings {
        let before = meant_section.as_table_mut()?.insert(key.clone(), value.clone());
        assign(table, key, before.as_ref(), value)?;
    }
    let is_new = table.position().is_none() && !table.is_dotted();
    if is_new {
        table.set_position(Some(first.unwrap_or(isize::MAX)));
    }
    if is_new && first.is_none() && !text.is_blank() {
        // Comments at the end of the file belong to what is above them.
        if !comments.is_empty() && !comments.ends_with('\n') {
            comments.push('\n');
        }
        table.decor_mut().set_prefix(comments + "\n");
        document.set_trailing("");
    }
    let edited = text.with(document.to_string());
    (toml::from_str::<Value>(&edited.body).ok()? == meant).then_some(edited)
}

/// The position before the first section beside `section`.
fn first_position(document: &DocumentMut, section: &[&str]) -> Option<isize> {
    let (_, parent) = section.split_last()?;
    let parent = parent
        .iter()
        .try_fold(document.as_item(), |item, name| item.get(name))?;
    let sections = parent
        .as_table()?
        .iter()
        .filter_map(|(_, item)| item.as_table()?.position());
    sections.min().map(|position| position - 1)
}

fn descend<'a>(table: &'a mut toml_edit::Table, section: &[&str]) -> Option<&'a mut toml_edit::Table> {
    let Some((name, rest)) = section.split_first() else {
        return Some(table);
    };
    let new = || {
        let mut table = toml_edit::Table::new();
        table.set_implicit(true);
        Item::Table(table)
    };
    match table.entry(name).or_insert_with(new) {
        Item::Table(inner) => descend(inner, rest),
        Item::ArrayOfTables(list) => {
            let (position, rest) = rest.split_first()?;
            descend(list.get_mut(position.parse().ok()?)?, rest)
        }
        _ => None,
    }
}

/// Sets one key. A list that only grows keeps its layout, and a new key gets the indentation of the last one.
fn assign(table: &mut toml_edit::Table, key: &str, before: Option<&Value>, after: &Value) -> Option<()> {
    if before == Some(after) {
        return Some(());
    }
    let parse = |value: &Value| value.to_string().parse::<toml_edit::Value>().ok();
    if let Some(item) = table.get_mut(key) {
        let current = item.as_value_mut()?;
        let added = match (before, after) {
            (Some(Value::Array(before)), Value::Array(after)) => after.strip_prefix(before.as_slice()),
            _ => None,
        };
        match (current, added) {
            (toml_edit::Value::Array(list), Some(added)) => {
                for value in added {
                    list.push(parse(value)?);
                }
            }
            (current, _) => {
                let decor = current.decor().clone();
                *current = parse(after)?;
                *current.decor_mut() = decor;
            }
        }
        return Some(());
    }
    let last = table.iter().filter(|(_, item)| item.is_value()).last();
    let prefix = last.and_then(|(name, _)| table.key(name)?.leaf_decor().prefix()?.as_str());
    let indent = prefix
        .and_then(|prefix| prefix.rsplit('\n').next())
        .unwrap_or_default();
    let key = Key::new(key).with_leaf_decor(Decor::new(indent, " "));
    table.insert_formatted(&key, Item::Value(parse(after)?));
    Some(())
}
