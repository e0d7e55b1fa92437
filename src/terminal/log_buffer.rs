//! Log buffer: lines wait in memory until a thread writes them.
//!
//! No request waits for the reader of the log: a pipe whose reader is stopped, or a full disk. Lines that arrive within
//! [`BATCH_INTERVAL`] share one write.

use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Size of the buffer. Further lines are dropped and counted.
const BUFFER_BYTES_MAX: usize = 1024 * 1024;

/// Time between two writes, and so the most that a line is late while the reader keeps up.
const BATCH_INTERVAL: Duration = Duration::from_millis(5);

/// The most that the program waits at its end for the reader of the log.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Lines that wait to be written. Cheap to clone.
#[derive(Clone, Default)]
pub struct LogBuffer(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the idle thread.
    added: Condvar,
    /// Wakes [`LogThread::close`].
    written: Condvar,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    /// Lines dropped since the last write.
    dropped: u64,
    /// Whether the thread waits for `added`.
    is_idle: bool,
    is_closed: bool,
    /// Whether the thread has written all lines of the closed buffer.
    is_done: bool,
}

/// The thread that writes a buffer. Dropped, it writes the rest.
pub struct LogThread(LogBuffer);

impl LogBuffer {
    /// Starts the thread that writes these and all later lines to `output`.
    pub(super) fn write_to(&self, output: impl Write + Send + 'static) -> io::Result<LogThread> {
        let buffer = self.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || buffer.run(output))?;
        Ok(LogThread(self.clone()))
    }

    fn add(&self, line: &[u8]) {
        let mut state = self.0.state.lock();
        if state.lines.len() + line.len() > BUFFER_BYTES_MAX {
            state.dropped += 1;
            return;
        }
        state.lines.extend_from_slice(line);
        if state.is_idle {
            state.is_idle = false;
            drop(state);
            self.0.added.notify_one();
        }
    }

    fn run(&self, mut output: impl Write) {
        let mut batch = Vec::new();
        while let Some(dropped) = self.next(&mut batch) {
            // An error of a closed stream cannot be reported.
            let _ = output.write_all(&batch).and_then(|()| output.flush());
            batch.clear();
            if dropped > 0 {
                tracing::warn!(dropped, "log lines dropped, because the log was not read in time");
            }
            self.wait_for_more();
        }
        self.0.state.lock().is_done = true;
        self.0.written.notify_all();
    }

    /// Moves the waiting lines into the empty `batch`, as soon as there are some. Returns how many were dropped after
    /// them; `None` if the buffer is closed and empty.
    fn next(&self, batch: &mut Vec<u8>) -> Option<u64> {
        let mut state = self.0.state.lock();
        while state.lines.is_empty() {
            if state.is_closed {
                return None;
            }
            state.is_idle = true;
            self.0.added.wait(&mut state);
        }
        state.is_idle = false;
        std::mem::swap(&mut state.lines, batch);
        Some(std::mem::take(&mut state.dropped))
    }

    /// Waits for the rest of the next batch, unless the buffer is closed.
    fn wait_for_more(&self) {
        let mut state = self.0.state.lock();
        if !state.is_closed {
            self.0.added.wait_for(&mut state, BATCH_INTERVAL);
        }
    }
}

impl Write for LogBuffer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.add(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LogThread {
    fn drop(&mut self) {
        let Shared {
            state,
            added,
            written,
        } = &*self.0.0;
        let mut state = state.lock();
        state.is_closed = true;
        added.notify_one();
        written.wait_while_for(&mut state, |state| !state.is_done, CLOSE_TIMEOUT);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::sync::mpsc;

    use super::*;

    /// An output whose every write waits for permission.
    struct Gated {
        permits: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.permits.recv();
            self.written.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn gated() -> (Gated, mpsc::Sender<()>, Arc<Mutex<Vec<u8>>>) {
        let (permit, permits) = mpsc::channel();
        let written = Arc::default();
        let output = Gated {
            permits,
            written: Arc::clone(&written),
        };
        (output, permit, written)
    }

    #[test]
    fn lines_are_written_in_order_and_all_at_the_end() {
        let (output, permits, written) = gated();
        let buffer = LogBuffer::default();
        buffer.add(b"before the thread\n");
        let thread = buffer.write_to(output).unwrap();
        let mut expected = b"before the thread\n".to_vec();
        for number in 0..100 {
            let line = format!("{number}\n");
            buffer.add(line.as_bytes());
            expected.extend(line.bytes());
        }
        drop(permits);
        drop(thread);
        assert_eq!(*written.lock(), expected);
    }

    #[test]
    fn output_that_is_not_read_blocks_no_line() {
        let (output, permits, written) = gated();
        let buffer = LogBuffer::default();
        let thread = buffer.write_to(output).unwrap();
        let line = [b'.'; 1024];
        for _ in 0..4 * BUFFER_BYTES_MAX / line.len() {
            buffer.add(&line);
        }
        assert!(buffer.0.state.lock().lines.len() <= BUFFER_BYTES_MAX);
        drop(permits);
        drop(thread);
        // The buffer, and one batch in the hands of the thread.
        let written = written.lock().len();
        assert!(
            (BUFFER_BYTES_MAX..=2 * BUFFER_BYTES_MAX).contains(&written),
            "{written}"
        );
    }

    #[test]
    fn dropped_lines_are_reported_once() {
        let (output, permits, written) = gated();
        let buffer = LogBuffer::default();
        let sink = buffer.clone();
        let subscriber = tracing_subscriber::fmt()
            .without_time()
            .with_ansi(false)
            .with_writer(move || sink.clone())
            .finish();
        for _ in 0..2 {
            buffer.add(&vec![b'.'; BUFFER_BYTES_MAX]);
        }
        drop(permits);
        buffer.0.state.lock().is_closed = true;
        tracing::subscriber::with_default(subscriber, || buffer.run(output));
        let text = String::from_utf8(written.lock().split_off(BUFFER_BYTES_MAX)).unwrap();
        assert_eq!(text.matches("dropped=1").count(), 1, "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }

    #[test]
    fn end_waits_a_limited_time_for_the_reader() {
        let (output, permits, _) = gated();
        let buffer = LogBuffer::default();
        let thread = buffer.write_to(output).unwrap();
        buffer.add(b"never written\n");
        // Returns, although the output never accepts a byte.
        drop(thread);
        assert!(!buffer.0.state.lock().is_done);
        drop(permits);
    }
}
