//! Parser for the documents: code blocks, commands and links.

use std::path::{Path, PathBuf};

/// A fenced block.
pub(crate) struct Block {
    document: PathBuf,
    /// Its first line, from 1.
    line: usize,
    pub(crate) text: String,
}

impl Block {
    /// Location in the form that editors follow.
    pub(crate) fn place(&self) -> String {
        format!("{}:{}", self.document.display(), self.line)
    }
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The documents for users.
pub(crate) fn documents() -> Vec<PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    all.push(root().join("README.md"));
    all.sort();
    all
}

pub(crate) fn read(document: &Path) -> String {
    std::fs::read_to_string(document).unwrap()
}

/// The blocks of these languages in all documents.
pub(crate) fn blocks(languages: &[&str]) -> Vec<Block> {
    let mut found = Vec::new();
    for document in documents() {
        let mut open: Option<(bool, Block)> = None;
        for (at, line) in read(&document).lines().enumerate() {
            match (open.take(), line.strip_prefix("```")) {
                (Some((wanted, block)), Some(_)) => found.extend(wanted.then_some(block)),
                (Some((wanted, mut block)), None) => {
                    block.text += line;
                    block.text.push('\n');
                    open = Some((wanted, block));
                }
                (None, Some(language)) => {
                    let block = Block {
                        document: document.clone(),
                        line: at + 1,
                        text: String::new(),
                    };
                    open = Some((languages.contains(&language), block));
                }
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{}: a block without an end", document.display());
    }
    found
}

/// The files that a document links to.
pub(crate) fn links(document: &Path) -> Vec<String> {
    let text = read(document);
    let targets = text
        .split("](")
        .skip(1)
        .chain(text.split("srcset=\"").skip(1))
        .chain(text.split("src=\"").skip(1));
    targets
        .filter_map(|rest| rest.split([')', '"', '#']).next())
        .filter(|target| !target.is_empty() && !target.contains("://"))
        .map(str::to_owned)
        .collect()
}

/// The spans in code quotes outside of blocks.
pub(crate) fn prose_spans(document: &Path) -> Vec<String> {
    let text = read(document);
    let mut found = Vec::new();
    let mut is_block = false;
    for line in text.lines() {
        if line.starts_with("```") {
            is_block = !is_block;
        } else if !is_block {
            let mut rest = line;
            while let Some((_, after)) = rest.split_once('`') {
                let quote = if after.starts_with('`') { "``" } else { "`" };
                let after = after.strip_prefix('`').unwrap_or(after);
                let Some((span, after)) = after.split_once(quote) else {
                    break;
                };
                found.push(span.trim().to_owned());
                rest = after;
            }
        }
    }
    found
}
