//! JSON edit: sets one member of an object in its text. Everything else keeps its bytes: order, indentation, and
//! numbers beyond the parser's range.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::setup::SetupError;
use crate::setup::edit::text::Text;

/// Members of an object with the positions of their values.
pub(in crate::setup) struct Object<'a> {
    path: &'a Path,
    text: &'a Text,
    members: Vec<(String, Range<usize>)>,
}

impl<'a> Object<'a> {
    /// Parses a text that is one object. A blank text is an empty object, as for dockerd.
    pub(in crate::setup) fn read(path: &'a Path, text: &'a Text) -> Result<Self, SetupError> {
        if text.is_blank() {
            return Ok(Self {
                path,
                text,
                members: Vec::new(),
            });
        }
        let read: Members<'_> = serde_json::from_str(&text.body).map_err(|error| SetupError::Unreadable {
            path: path.to_owned(),
            line: error.line(),
            detail: error.to_string(),
        })?;
        let start = text.body.as_ptr() as usize;
        let members = read.0.into_iter().map(|(name, value)| {
            let at = value.get().as_ptr() as usize - start;
            (name, at..at + value.get().len())
        });
        let members: Vec<_> = members.collect();
        for (position, (name, at)) in members.iter().enumerate() {
            if members.iter().take(position).any(|(earlier, _)| earlier == name) {
                return Err(SetupError::Unreadable {
                    path: path.to_owned(),
                    line: 1 + text
                        .body
                        .get(..at.start)
                        .unwrap_or_default()
                        .matches('\n')
                        .count(),
                    detail: format!("\"{name}\" occurs twice"),
                });
            }
        }
        Ok(Self { path, text, members })
    }

    /// The value of a member.
    pub(in crate::setup) fn get(&self, name: &str) -> Option<Value> {
        serde_json::from_str(self.source(name)?).ok()
    }

    /// The text of a member's value.
    pub(in crate::setup) fn source(&self, name: &str) -> Option<&str> {
        let (_, at) = self.members.iter().find(|(member, _)| member == name)?;
        self.text.body.get(at.clone())
    }

    /// Sets a member to `value` (JSON).
    pub(in crate::setup) fn with(&self, name: &str, value: &str) -> Result<Text, SetupError> {
        let body = &self.text.body;
        let edited = match self.members.iter().find(|(member, _)| member == name) {
            Some((_, at)) => splice(body, at, value),
            None if self.text.is_blank() => format!("{{\n  \"{name}\": {value}\n}}\n"),
            None => self.with_first(name, value),
        };
        let edited = self.text.with(edited);
        self.proven(name, value, edited)
    }

    /// Inserts before the first member, with its indentation.
    fn with_first(&self, name: &str, value: &str) -> String {
        let body = &self.text.body;
        let inside = body.find('{').map_or(0, |at| at + 1);
        let (head, rest) = body.split_at(inside);
        let blank = rest.len() - rest.trim_start().len();
        let end = self.text.line_end();
        if self.members.is_empty() {
            let rest = rest.trim_start();
            return format!("{head}{end}  \"{name}\": {value}{end}{rest}");
        }
        let indent = rest.get(..blank).unwrap_or_default();
        format!(
            "{head}{indent}\"{name}\": {value},{}{rest}",
            if indent.is_empty() { " " } else { "" }
        )
    }

    /// Verifies the edit: the result must equal the old object plus the change, or nothing is written.
    fn proven(&self, name: &str, value: &str, edited: Text) -> Result<Text, SetupError> {
        let read = |text: &str| serde_json::from_str::<Value>(text).ok();
        let before = if self.text.is_blank() {
            Some(Value::Object(serde_json::Map::new()))
        } else {
            read(&self.text.body)
        };
        let meant = before.and_then(|mut object| {
            object.as_object_mut()?.insert(name.to_owned(), read(value)?);
            Some(object)
        });
        match (meant, read(&edited.body)) {
            (Some(meant), Some(got)) if meant == got => Ok(edited),
            _ => Err(SetupError::Unreadable {
                path: self.path.to_owned(),
                line: 1,
                detail: format!("\"{name}\" cannot be set automatically; set it to {value} by hand"),
            }),
        }
    }
}

fn splice(body: &str, at: &Range<usize>, value: &str) -> String {
    let (head, rest) = body.split_at(at.start);
    format!("{head}{value}{}", rest.get(at.len()..).unwrap_or_default())
}

/// Members in text order, including duplicates.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object: { … }")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(body: &str) -> Result<String, SetupError> {
        let path = Path::new("/daemon.json");
        let text = Text::read(path, Some(body.as_bytes().to_vec()))?;
        let edited = Object::read(path, &text)?.with("m", r#"["u"]"#)?;
        Ok(String::from_utf8(edited.into_bytes()).unwrap())
    }

    #[test]
    fn all_else_keeps_its_bytes() {
        for (before, after) in [
            ("", "{\n  \"m\": [\"u\"]\n}\n"),
            (" \n", "{\n  \"m\": [\"u\"]\n}\n"),
            ("{}", "{\n  \"m\": [\"u\"]\n}"),
            ("{ }\n", "{\n  \"m\": [\"u\"]\n}\n"),
            (r#"{"b":1,"a":2}"#, r#"{"m": ["u"], "b":1,"a":2}"#),
            (
                "{\n\t\"z\": 1e400,\n\t\"a\": 12345678901234567890123\n}",
                "{\n\t\"m\": [\"u\"],\n\t\"z\": 1e400,\n\t\"a\": 12345678901234567890123\n}",
            ),
            (
                "{\r\n  \"b\": 1\r\n}\r\n",
                "{\r\n  \"m\": [\"u\"],\r\n  \"b\": 1\r\n}\r\n",
            ),
            ("\u{feff}{\"b\":1}", "\u{feff}{\"m\": [\"u\"], \"b\":1}"),
            (
                "{\"m\": [ ] , \"b\" : {\"m\":1}}",
                "{\"m\": [\"u\"] , \"b\" : {\"m\":1}}",
            ),
        ] {
            match set(before) {
                Ok(got) => assert_eq!(got, after),
                // A number that f64 cannot represent is rejected by serde_json, not changed.
                Err(refused) => assert!(before.contains("1e400"), "{before}: {refused}"),
            }
        }
    }

    #[test]
    fn invalid_file_is_rejected_with_its_line() {
        for (body, line) in [
            ("{\n  \"a\": 1,\n}", 3),
            ("{\n// hello\n}", 2),
            ("[]", 1),
            ("{\"a\":1} x", 1),
            ("{\"a\":1,\n\"a\":2}", 2),
            ("{", 1),
        ] {
            match set(body) {
                Err(SetupError::Unreadable { line: reported, .. }) => assert_eq!(reported, line, "{body}"),
                other => panic!("{body}: {other:?}"),
            }
        }
    }
}
