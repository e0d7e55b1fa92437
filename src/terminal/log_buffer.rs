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
    /// Lines that were not written, since the last report.
    dropped: u64,
    /// Whether the report is being added, which is never dropped.
    is_reporting: bool,
    /// Whether the thread waits for `added`.
    is_idle: bool,
    phase: Phase,
}

#[derive(Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Open,
    /// No further lines are expected.
    Closed,
    /// The thread has written all lines of the closed buffer.
    Written,
}

/// The thread that writes a buffer. Dropped, it writes the rest.
pub struct LogThread(LogBuffer);

impl LogThread {
    /// Ends the log with this line. Not by standard error itself, whose lock the thread may hold while it waits for the reader.
    pub fn end_with(self, line: &str) {
        self.0.add(super::line(&format!("{line}\n"), false).as_bytes());
    }
}

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
        if state.lines.len() + line.len() > BUFFER_BYTES_MAX && !state.is_reporting {
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
        let (mut batch, mut is_line_open) = (Vec::new(), false);
        while self.next(&mut batch) {
            is_line_open = self.write_batch(&mut output, &mut batch, is_line_open);
            self.wait_for_more();
        }
        self.0.state.lock().phase = Phase::Written;
        self.0.written.notify_all();
    }

    /// Writes and empties a batch. `is_line_open`: whether the output ends within a line, because of an error. Returns
    /// whether it does now.
    fn write_batch(&self, output: &mut impl Write, batch: &mut Vec<u8>, is_line_open: bool) -> bool {
        if is_line_open {
            batch.insert(0, b'\n');
        }
        let written = write_until_error(output, batch);
        let (done, lost) = batch.split_at_checked(written).unwrap_or((batch, &[]));
        let is_line_open = done.last().map_or(is_line_open, |last| *last != b'\n');
        match lost.split(|byte| *byte == b'\n').skip(1).count() {
            0 => self.report_dropped(),
            lost => self.0.state.lock().dropped += lost as u64,
        }
        batch.clear();
        is_line_open
    }

    /// Moves the waiting lines into the empty `batch`, as soon as there are some. False if the buffer is closed and empty.
    fn next(&self, batch: &mut Vec<u8>) -> bool {
        let mut state = self.0.state.lock();
        while state.lines.is_empty() {
            if state.phase == Phase::Closed {
                return false;
            }
            state.is_idle = true;
            self.0.added.wait(&mut state);
        }
        state.is_idle = false;
        std::mem::swap(&mut state.lines, batch);
        true
    }

    /// Adds a line with the number of lines that were not written.
    fn report_dropped(&self) {
        let mut state = self.0.state.lock();
        let dropped = std::mem::take(&mut state.dropped);
        if dropped == 0 {
            return;
        }
        state.is_reporting = true;
        drop(state);
        tracing::warn!(
            dropped,
            "log lines dropped, because the log was not written in time"
        );
        self.0.state.lock().is_reporting = false;
    }

    /// Waits for the rest of the next batch, unless the buffer is closed.
    fn wait_for_more(&self) {
        let mut state = self.0.state.lock();
        if state.phase == Phase::Open {
            self.0.added.wait_for(&mut state, BATCH_INTERVAL);
        }
    }
}

/// Writes until all is written or a write fails. Returns the number of bytes written.
fn write_until_error(output: &mut impl Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        match output.write(rest) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    // An error of a closed stream cannot be reported.
    let _ = output.flush();
    written
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
        state.phase = Phase::Closed;
        added.notify_one();
        written.wait_while_for(&mut state, |state| state.phase != Phase::Written, CLOSE_TIMEOUT);
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

    /// Runs `work`, whose log goes to the buffer.
    fn reporting_to<T>(buffer: &LogBuffer, work: impl FnOnce() -> T) -> T {
        let sink = buffer.clone();
        let subscriber = tracing_subscriber::fmt()
            .without_time()
            .with_ansi(false)
            .with_writer(move || sink.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, work)
    }

    #[test]
    fn dropped_lines_are_reported_once() {
        let (output, permits, written) = gated();
        let buffer = LogBuffer::default();
        let mut line = vec![b'.'; BUFFER_BYTES_MAX];
        *line.last_mut().unwrap() = b'\n';
        for _ in 0..2 {
            buffer.add(&line);
        }
        drop(permits);
        buffer.0.state.lock().phase = Phase::Closed;
        reporting_to(&buffer, || buffer.run(output));
        let text = String::from_utf8(written.lock().split_off(BUFFER_BYTES_MAX)).unwrap();
        assert_eq!(text.matches("dropped=1").count(), 1, "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }

    /// An output with space for some bytes at a time, like a full disk that is cleaned up.
    struct Full {
        space: Arc<Mutex<usize>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut space = self.space.lock();
            if *space == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let count = bytes.len().min(*space);
            *space -= count;
            self.written
                .lock()
                .extend_from_slice(bytes.get(..count).unwrap_or_default());
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_of_a_failed_write_are_counted_and_cut_lines_end() {
        let (space, written) = (Arc::new(Mutex::new(3)), Arc::<Mutex<Vec<u8>>>::default());
        let mut output = Full {
            space: Arc::clone(&space),
            written: Arc::clone(&written),
        };
        let buffer = LogBuffer::default();
        let mut batch = Vec::new();
        let mut write = |line: &[u8], is_line_open| {
            buffer.add(line);
            assert!(buffer.next(&mut batch));
            reporting_to(&buffer, || {
                buffer.write_batch(&mut output, &mut batch, is_line_open)
            })
        };
        assert!(write(b"first\nsecond\n", false));
        *space.lock() = usize::MAX;
        assert!(!write(b"third\n", true));
        assert!(!write(b"fourth\n", false));
        let text = String::from_utf8(written.lock().clone()).unwrap();
        assert!(text.starts_with("fir\nthird\n"), "{text}");
        assert_eq!(text.matches("dropped=2").count(), 1, "{text}");
        assert!(text.ends_with("fourth\n"), "{text}");
    }

    #[test]
    fn end_waits_a_limited_time_for_the_reader() {
        let (output, permits, _) = gated();
        let buffer = LogBuffer::default();
        let thread = buffer.write_to(output).unwrap();
        buffer.add(b"never written\n");
        // Returns, although the output never accepts a byte.
        drop(thread);
        assert!(buffer.0.state.lock().phase == Phase::Closed);
        drop(permits);
    }
}
