//! Standard output and standard error with escaping of terminal control sequences. All output goes through this
//! module.
//!
//! Names, numbers, errors and log fields come from archives, registries, clients and files. C0 and C1 control
//! characters, bidirectional overrides and zero-width characters are written as JSON escapes (`\u001b`): readable as
//! text and exact in JSON. Colours of this program are passed through if enabled.

mod log_buffer;
mod log_fields;
mod log_time;

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use tracing_subscriber::fmt::MakeWriter;

pub use log_buffer::{LogBuffer, LogThread};
pub use log_fields::LogFields;
pub use log_time::LogTime;

/// Length of the longest incomplete colour sequence, which is buffered until it is complete.
const BUFFERED_BYTES_MAX: usize = 4;

/// Standard output. If `colour` is set, colour sequences are passed through.
pub fn stdout(colour: bool) -> Printable<io::Stdout> {
    Printable::new(io::stdout(), colour)
}

/// Standard error without colours.
pub fn stderr() -> Printable<io::Stderr> {
    Printable::new(io::stderr(), false)
}

/// Standard output for binary data. Not for a terminal.
pub fn raw_stdout() -> io::Stdout {
    io::stdout()
}

/// Whether standard output is a terminal.
pub fn is_stdout_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Whether standard error is a terminal.
pub fn is_stderr_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Log writer: a buffer of standard error, with or without colours.
#[derive(Clone)]
pub struct Log {
    colour: bool,
    buffer: LogBuffer,
}

impl Log {
    /// Starts the thread that writes the lines. If `colour` is set, colour sequences are passed through.
    pub fn start(colour: bool) -> io::Result<(Self, LogThread)> {
        let buffer = LogBuffer::default();
        let thread = buffer.write_to(io::stderr())?;
        Ok((Self { colour, buffer }, thread))
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Printable<LogBuffer>;

    fn make_writer(&'a self) -> Self::Writer {
        Printable::new(self.buffer.clone(), self.colour)
    }
}

/// A text writer that escapes unprintable characters.
pub struct Printable<W: Write> {
    inner: W,
    colour: bool,
    /// An incomplete character or colour sequence.
    buffered: Vec<u8>,
}

impl<W: Write> Printable<W> {
    /// Writes to `inner`. If `colour` is set, colour sequences are passed through.
    pub fn new(inner: W, colour: bool) -> Self {
        Self {
            inner,
            colour,
            buffered: Vec::new(),
        }
    }

    fn pass(&mut self, text: &str) -> io::Result<()> {
        if !self.colour {
            return self.inner.write_all(printable(text).as_bytes());
        }
        // In one write, so that a line is not mixed with another.
        let (mut rest, mut line) = (text, String::with_capacity(text.len()));
        while let Some((before, sequence, after)) = next_colour(rest) {
            line.push_str(&printable(before));
            line.push_str(sequence);
            rest = after;
        }
        line.push_str(&printable(rest));
        self.inner.write_all(line.as_bytes())
    }

    /// Length of the prefix of `bytes` that can be written now. The remainder may be completed by the next write.
    fn complete_prefix(&self, bytes: &[u8]) -> usize {
        let tail = bytes.len().saturating_sub(BUFFERED_BYTES_MAX);
        let last_escape = bytes
            .iter()
            .rposition(|byte| *byte == 0x1b)
            .filter(|at| self.colour && *at >= tail);
        if let Some(at) = last_escape
            && bytes.get(at + 1..).is_some_and(is_begun_colour)
        {
            return at;
        }
        match std::str::from_utf8(bytes) {
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            _ => bytes.len(),
        }
    }

    fn pass_held(&mut self) -> io::Result<()> {
        let held = std::mem::take(&mut self.buffered);
        self.pass(&String::from_utf8_lossy(&held))
    }
}

impl<W: Write> Write for Printable<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Most lines are plain text, which needs no copy.
        if self.buffered.is_empty() && is_all_plain(bytes) {
            return self.inner.write_all(bytes).map(|()| bytes.len());
        }
        self.buffered.extend_from_slice(bytes);
        let complete = self.complete_prefix(&self.buffered);
        let rest = self.buffered.split_off(complete);
        self.pass_held()?;
        self.buffered = rest;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<W: Write> Drop for Printable<W> {
    fn drop(&mut self) {
        // Errors of a closed stream cannot be reported.
        let _ = self.pass_held().and_then(|()| self.inner.flush());
    }
}

/// `text` as [`stdout`] would write it, for output next to a progress bar.
pub fn line(text: &str, colour: bool) -> String {
    let mut line = Vec::with_capacity(text.len());
    let mut writer = Printable::new(&mut line, colour);
    // Writing to memory does not fail.
    let _ = writer.write_all(text.as_bytes());
    drop(writer);
    String::from_utf8_lossy(&line).into_owned()
}

/// `text` with control sequences escaped.
pub fn printable(text: &str) -> Cow<'_, str> {
    use std::fmt::Write as _;
    if !text.chars().any(is_control_or_format) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_control_or_format(c) {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                // Writing to a string does not fail.
                let _ = write!(escaped, "\\u{unit:04x}");
            }
        } else {
            escaped.push(c);
        }
    }
    escaped.into()
}

/// Whether all bytes are plain. Without an early exit within a block, the compiler compares 16 at a time.
fn is_all_plain(bytes: &[u8]) -> bool {
    let is_block_plain = |block: &[u8]| block.iter().fold(true, |is_all, byte| is_all & is_plain(*byte));
    bytes.chunks(64).all(is_block_plain)
}

/// Whether a byte is a printable ASCII character, a tab or a newline.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~' | b'\n' | b'\t')
}

/// Whether a character is a control or formatting character: C0 except tab and newline, DEL and C1; bidirectional
/// marks, embeddings, overrides and isolates; zero-width characters; line and paragraph separators; tags and
/// annotations.
fn is_control_or_format(c: char) -> bool {
    match c {
        '\n' | '\t' => false,
        '\u{ad}'
        | '\u{61c}'
        | '\u{180e}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e007f}' => true,
        c => c.is_control(),
    }
}

/// Colours used by this program and its log (ECMA-48 SGR, `ESC [ 31 m`). None of them hides text, so such a sequence in
/// foreign text can only colour it.
const COLOURS: [&str; 10] = ["0", "1", "2", "3", "31", "32", "33", "34", "35", "36"];

/// The first colour sequence in `text`, with the text before and after it.
fn next_colour(text: &str) -> Option<(&str, &str, &str)> {
    text.match_indices("\u{1b}[").find_map(|(at, _)| {
        let (before, from) = text.split_at_checked(at)?;
        let (code, after) = from.get(2..)?.split_once('m')?;
        let sequence = from.get(..code.len() + 3)?;
        COLOURS.contains(&code).then_some((before, sequence, after))
    })
}

/// Whether these bytes after ESC may be completed to a colour sequence.
fn is_begun_colour(bytes: &[u8]) -> bool {
    match bytes.split_first() {
        None => true,
        Some((b'[', digits)) => digits.len() <= 2 && digits.iter().all(u8::is_ascii_digit),
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn printed(pieces: &[&[u8]], colour: bool) -> String {
        let mut out = Vec::new();
        let mut printable = Printable::new(&mut out, colour);
        for piece in pieces {
            printable.write_all(piece).unwrap();
        }
        drop(printable);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn t15_control_sequences_are_escaped() {
        for (text, expected) in [
            ("a\tb\nc é 漢 🦀", "a\tb\nc é 漢 🦀"),
            ("\u{1b}]0;title\u{7}", "\\u001b]0;title\\u0007"),
            ("\u{9b}2J\u{7f}\r\u{8}", "\\u009b2J\\u007f\\u000d\\u0008"),
            (
                "\u{202e}gpj\u{2066}\u{200b}\u{feff}",
                "\\u202egpj\\u2066\\u200b\\ufeff",
            ),
            ("\u{e0041}", "\\udb40\\udc41"),
        ] {
            assert_eq!(printable(text), expected);
            assert_eq!(printed(&[text.as_bytes()], true), expected);
            let json = serde_json::Value::String(text.to_owned());
            let text = printed(&[json.to_string().as_bytes()], false);
            assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), json);
        }
        assert_eq!(printed(&[b"a\xffb"], false), "a\u{fffd}b");
    }

    #[test]
    fn t15_only_enabled_colours_pass() {
        let red = "\u{1b}[31mno\u{1b}[0m";
        assert_eq!(printed(&[red.as_bytes()], true), red);
        assert_eq!(printed(&[red.as_bytes()], false), "\\u001b[31mno\\u001b[0m");
        for wrong in [
            "\u{1b}[8m",
            "\u{1b}[30;40m",
            "\u{1b}[2J",
            "\u{1b}[1;",
            "\u{1b}[",
            "\u{1b}",
            "\u{1b}[?25l",
            "\u{1b}[31",
        ] {
            assert!(
                !printed(&[wrong.as_bytes()], true).contains('\u{1b}'),
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn t15_split_sequences_are_reassembled() {
        let text = "\u{1b}[32mé\u{202e}\u{1b}[0m\u{1b}[2J漢";
        let expected = printed(&[text.as_bytes()], true);
        assert_eq!(expected, "\u{1b}[32mé\\u202e\u{1b}[0m\\u001b[2J漢");
        for cut in 0..=text.len() {
            let (one, other) = text.as_bytes().split_at(cut);
            assert_eq!(printed(&[one, other], true), expected, "cut at {cut}");
        }
        let each: Vec<&[u8]> = text.as_bytes().chunks(1).collect();
        assert_eq!(printed(&each, true), expected);
    }
}
