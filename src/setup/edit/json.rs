//! JSON edit: puts a string into a list of an object. Comments are kept, although dockerd accepts none.

use std::collections::{HashMap, HashSet};

use jsonc_parser::ast::Value as Node;
use jsonc_parser::common::Ranged;
use jsonc_parser::{CollectOptions, CommentCollectionStrategy, ParseOptions, parse_to_ast};
use serde_json::{Map, Value};

use super::Text;
use crate::setup::SetupError;

/// A file that is one object.
pub(in crate::setup) struct Object<'a> {
    text: &'a Text,
    members: Map<String, Value>,
    /// The opening bracket of the object and of each list in it, and whether it is empty.
    brackets: HashMap<Option<String>, (usize, bool)>,
    /// The line of the first comment.
    pub(in crate::setup) comment: Option<usize>,
}

impl<'a> Object<'a> {
    /// Parses the text. A blank text is an empty object, as for dockerd.
    pub(in crate::setup) fn read(text: &'a Text) -> Result<Self, SetupError> {
        let mut object = Self {
            text,
            members: Map::new(),
            brackets: HashMap::new(),
            comment: None,
        };
        if text.is_blank() {
            return Ok(object);
        }
        let unreadable = |line, detail: String| SetupError::unreadable(&text.path, line, detail);
        let collect = CollectOptions {
            comments: CommentCollectionStrategy::Separate,
            tokens: false,
        };
        let parsed = parse_to_ast(&text.body, &collect, &ParseOptions::default())
            .map_err(|error| unreadable(error.line_display(), error.kind().to_string()))?;
        // The parser also accepts what JSON and dockerd do not, so that without comments the text must be strict JSON.
        let mut strict = text.body.clone().into_bytes();
        for comment in parsed
            .comments
            .iter()
            .flat_map(|all| all.values())
            .flat_map(|list| list.iter())
        {
            let line = text.line_of(comment.start());
            object.comment = Some(object.comment.map_or(line, |first| first.min(line)));
            let bytes = strict.get_mut(comment.start()..comment.end()).unwrap_or_default();
            bytes
                .iter_mut()
                .filter(|byte| **byte != b'\n')
                .for_each(|byte| *byte = b' ');
        }
        object.members =
            serde_json::from_slice(&strict).map_err(|error| unreadable(error.line(), error.to_string()))?;
        let Some(Node::Object(root)) = &parsed.value else {
            return Ok(object);
        };
        object
            .brackets
            .insert(None, (root.start(), root.properties.is_empty()));
        let mut names = HashSet::new();
        for member in &root.properties {
            let name = member.name.as_str();
            if !names.insert(name) {
                return Err(unreadable(
                    text.line_of(member.start()),
                    format!("\"{name}\" occurs twice"),
                ));
            }
            if let Node::Array(list) = &member.value {
                object
                    .brackets
                    .insert(Some(name.to_owned()), (list.start(), list.elements.is_empty()));
            }
        }
        Ok(object)
    }

    /// The value of a member.
    pub(in crate::setup) fn get(&self, name: &str) -> Option<&Value> {
        self.members.get(name)
    }

    /// Puts `item` before the items of a list, which is created if it is missing.
    pub(in crate::setup) fn with_first(&self, list: &str, item: &str) -> Result<Text, SetupError> {
        let item = Value::from(item);
        let mut meant = self.members.clone();
        if let Some(items) = meant
            .entry(list)
            .or_insert_with(|| Value::Array(Vec::new()))
            .as_array_mut()
        {
            items.insert(0, item.clone());
        }
        match self.inserted(list, &item).map(|body| self.text.with(body)) {
            Some(edited) if Object::read(&edited).is_ok_and(|got| got.members == meant) => Ok(edited),
            _ => {
                let detail = format!("{item} cannot be added to \"{list}\" automatically; add it by hand");
                Err(SetupError::unreadable(&self.text.path, 1, detail))
            }
        }
    }

    fn inserted(&self, list: &str, item: &Value) -> Option<String> {
        let in_list = self.brackets.get(&Some(list.to_owned()));
        let Some((bracket, is_empty)) = in_list.or_else(|| self.brackets.get(&None)) else {
            return Some(format!("{{\n  \"{list}\": [{item}]\n}}\n"));
        };
        let (head, rest) = self.text.body.split_at_checked(bracket + 1)?;
        let further = rest.trim_start();
        let gap = rest.strip_suffix(further)?;
        let separator = if gap.is_empty() { " " } else { gap };
        Some(match (in_list, is_empty) {
            (Some(_), true) => format!("{head}{item}{further}"),
            (Some(_), false) => format!("{head}{gap}{item},{separator}{further}"),
            (None, true) => format!("{head}\n  \"{list}\": [{item}]\n{further}"),
            (None, false) => format!("{head}{gap}\"{list}\": [{item}],{separator}{further}"),
        })
    }
}
