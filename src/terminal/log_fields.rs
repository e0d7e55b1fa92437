//! Text of the fields of a log line.
//!
//! The text is that of [`DefaultFields`]. Each pull writes a line, and most of its values are plain text, which needs no
//! formatting.

use std::error::Error;
use std::fmt::{self, Debug};

use tracing::field::{Field, Visit};
use tracing_subscriber::field::{RecordFields, VisitOutput};
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{DefaultFields, DefaultVisitor, Writer};

/// Formats the fields of a log line.
#[derive(Debug, Default)]
pub struct LogFields;

impl<'w> FormatFields<'w> for LogFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        if writer.has_ansi_escapes() {
            return DefaultFields::new().format_fields(writer, fields);
        }
        let mut line = Line {
            writer,
            is_empty: true,
            result: Ok(()),
        };
        fields.record(&mut line);
        line.result
    }
}

/// A line without colours.
struct Line<'w> {
    writer: Writer<'w>,
    is_empty: bool,
    result: fmt::Result,
}

impl Line<'_> {
    /// Begins a field. The message has no name.
    fn begin(&mut self, name: &str) -> fmt::Result {
        if !self.is_empty {
            self.writer.write_char(' ')?;
        }
        self.is_empty = false;
        if name == "message" {
            return Ok(());
        }
        self.writer.write_str(name)?;
        self.writer.write_char('=')
    }

    fn write_plain(&mut self, name: &str, value: &str) -> fmt::Result {
        self.begin(name)?;
        if name == "message" {
            return self.writer.write_str(value);
        }
        self.writer.write_char('"')?;
        self.writer.write_str(value)?;
        self.writer.write_char('"')
    }

    fn write_debug(&mut self, name: &str, value: &dyn Debug) -> fmt::Result {
        self.begin(name)?;
        write!(self.writer, "{value:?}")
    }

    /// Writes a rare kind of field as the default does.
    fn write_default(&mut self, field: &Field, record: impl FnOnce(&mut DefaultVisitor<'_>)) {
        let mut visitor = DefaultVisitor::new(self.writer.by_ref(), self.is_empty);
        record(&mut visitor);
        self.result = visitor.finish();
        // Fields of this name are not written.
        self.is_empty &= field.name().starts_with("log.");
    }
}

/// Whether a field of this name is written as any other.
fn is_ordinary(name: &str) -> bool {
    !name.starts_with("log.") && !name.starts_with("r#")
}

impl Visit for Line<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        let is_plain = |byte: u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\');
        if self.result.is_err() {
            return;
        }
        if is_ordinary(field.name()) && value.bytes().all(is_plain) {
            self.result = self.write_plain(field.name(), value);
        } else {
            self.write_default(field, |visitor| visitor.record_str(field, value));
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        if self.result.is_ok() {
            self.write_default(field, |visitor| visitor.record_error(field, value));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if self.result.is_err() {
            return;
        }
        if is_ordinary(field.name()) && field.name() != "message" {
            self.result = self.write_debug(field.name(), value);
        } else {
            self.write_default(field, |visitor| visitor.record_debug(field, value));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Written {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    fn lines(fields: impl for<'w> FormatFields<'w> + Send + Sync + 'static, colour: bool) -> String {
        let written = Written::default();
        let subscriber = tracing_subscriber::fmt()
            .without_time()
            .with_ansi(colour)
            .with_writer(written.clone())
            .fmt_fields(fields)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let (none, error) = (None::<&str>, io::Error::other("disk \u{1b}[2J"));
            let error: &dyn Error = &error;
            tracing::info!(
                image = "library/alpine:3",
                none,
                some = Some("x"),
                ms = 1.25,
                bytes = 7,
                is = true,
                "served"
            );
            tracing::info!(quoted = "a \"b\" \\ c", "with \"quotes\"");
            tracing::info!(control = "\u{1b}[2J\n\u{202e}é", error, "control \u{1b}[2J");
            tracing::info!(%error, ?none, "formatted {}", 7);
            tracing::info!(r#type = "raw", log.target = "left out", only = "fields");
        });
        String::from_utf8(written.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn text_is_that_of_the_default() {
        for colour in [false, true] {
            let default = lines(DefaultFields::new(), colour);
            assert_eq!(lines(LogFields, colour), default);
            assert!(default.contains("library/alpine:3"), "{default}");
        }
    }
}
