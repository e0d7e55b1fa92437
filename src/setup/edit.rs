//! Edits of configuration files in the text, which preserve comments, order and formatting.

pub(super) mod json;
pub(super) mod text;
pub(super) mod toml;
