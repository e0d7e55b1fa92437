//! Text edits of a configuration file that preserve comments, order and line ends. `json` and `toml` interpret the
//! text and verify each edit.

use std::path::Path;

use crate::setup::SetupError;

const BOM: &str = "\u{feff}";

/// The text of a file without its byte order mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::setup) struct Text {
    has_bom: bool,
    pub(in crate::setup) body: String,
}

impl Text {
    /// Decodes the bytes of `path`; a missing file is empty.
    pub(in crate::setup) fn read(path: &Path, bytes: Option<Vec<u8>>) -> Result<Self, SetupError> {
        let text = String::from_utf8(bytes.unwrap_or_default()).map_err(|error| {
            let good = error.as_bytes().get(..error.utf8_error().valid_up_to());
            let line = String::from_utf8_lossy(good.unwrap_or_default())
                .matches('\n')
                .count()
                + 1;
            SetupError::Unreadable {
                path: path.to_owned(),
                line,
                detail: "not UTF-8 text".to_owned(),
            }
        })?;
        Ok(match text.strip_prefix(BOM) {
            Some(body) => Self {
                has_bom: true,
                body: body.to_owned(),
            },
            None => Self {
                has_bom: false,
                body: text,
            },
        })
    }

    /// The same file with another text.
    pub(in crate::setup) fn with(&self, body: String) -> Self {
        Self {
            has_bom: self.has_bom,
            body,
        }
    }

    /// The bytes to write.
    pub(in crate::setup) fn into_bytes(self) -> Vec<u8> {
        if self.has_bom {
            [BOM.as_bytes(), self.body.as_bytes()].concat()
        } else {
            self.body.into_bytes()
        }
    }

    /// Whether the text is blank.
    pub(in crate::setup) fn is_blank(&self) -> bool {
        self.body.trim().is_empty()
    }

    /// Line ending of the file.
    pub(in crate::setup) fn line_end(&self) -> &'static str {
        match self.body.find('\n') {
            Some(at) if self.body.get(..at).is_some_and(|line| line.ends_with('\r')) => "\r\n",
            _ => "\n",
        }
    }

    /// Appends `block`, whose lines end in `\n`, after a blank line.
    pub(in crate::setup) fn appended(&self, block: &str) -> Self {
        let end = self.line_end();
        let mut body = self.body.clone();
        if !body.is_empty() {
            if !body.ends_with('\n') {
                body.push_str(end);
            }
            body.push_str(end);
        }
        body.push_str(&block.replace('\n', end));
        self.with(body)
    }

    /// Inserts `block`, whose lines end in `\n`, before this line (from 0).
    pub(in crate::setup) fn inserted(&self, line: usize, block: &str) -> Self {
        let end = self.line_end();
        let mut body = String::with_capacity(self.body.len() + block.len());
        let mut lines = self.body.split_inclusive('\n');
        for existing in lines.by_ref().take(line) {
            body.push_str(existing);
        }
        if !body.is_empty() && !body.ends_with('\n') {
            body.push_str(end);
        }
        body.push_str(&block.replace('\n', end));
        body.extend(lines);
        self.with(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8]) -> Text {
        Text::read(Path::new("/f"), Some(bytes.to_vec())).unwrap()
    }

    #[test]
    fn what_is_not_changed_comes_back_as_it_was() {
        for bytes in [&b""[..], b"\xef\xbb\xbf{}", b"a\r\nb", b"\n\n", b"x"] {
            assert_eq!(text(bytes).into_bytes(), bytes);
        }
    }

    #[test]
    fn a_block_takes_the_line_ends_of_the_file() {
        assert_eq!(text(b"a\r\nb").appended("c\n").body, "a\r\nb\r\n\r\nc\r\n");
        assert_eq!(text(b"a\nb\n").appended("c\n").body, "a\nb\n\nc\n");
        assert_eq!(text(b"").appended("c\n").body, "c\n");
        assert_eq!(text(b"a\r\nb\r\n").inserted(1, "c\n").body, "a\r\nc\r\nb\r\n");
        assert_eq!(
            text(b"a").inserted(1, "c\n").body,
            "a\nc\n",
            "no newline at the end"
        );
    }

    #[test]
    fn what_is_not_text_is_refused_with_its_line() {
        let refused = Text::read(Path::new("/f"), Some(b"a\nb\xff".to_vec())).unwrap_err();
        assert!(
            matches!(refused, SetupError::Unreadable { line: 2, .. }),
            "{refused}"
        );
    }
}
