//! Byte channel between a blocking thread that writes or reads an archive and an async connection.
//!
//! The writer must signal the end explicitly; dropping it early is an error for the reader.

use std::io::{self, Read, Write};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::BUFFER_BYTES;

/// Maximum number of buffered chunks, of 256 KiB each.
const CHUNKS_MAX: usize = 8;

/// Timeout for the other end, which may be waiting for a registry.
const IDLE_MAX: Duration = Duration::from_secs(300);

/// A chunk of an archive, or the error that ended it.
pub type Chunk = io::Result<Bytes>;

/// Creates a pipe.
pub fn pipe() -> (mpsc::Sender<Chunk>, mpsc::Receiver<Chunk>) {
    mpsc::channel(CHUNKS_MAX)
}

/// The writing end, for a blocking thread.
pub struct PipeWriter {
    chunks: mpsc::Sender<Chunk>,
    buffer: BytesMut,
    runtime: Handle,
}

impl PipeWriter {
    /// Writes to `chunks`. Must be created within a runtime and used on a thread of its blocking pool.
    pub fn new(chunks: mpsc::Sender<Chunk>) -> Self {
        Self {
            chunks,
            buffer: BytesMut::with_capacity(BUFFER_BYTES),
            runtime: Handle::current(),
        }
    }

    /// Ends the archive with its result. Without this call, the reader sees a broken archive.
    pub fn finish(mut self, result: io::Result<()>) {
        let last = result.and_then(|()| self.flush()).err();
        if let Some(error) = last {
            // A closed receiver needs no error.
            let _ = self.send(Err(error));
        }
    }

    fn send(&mut self, chunk: Chunk) -> io::Result<()> {
        let sent = self
            .runtime
            .block_on(async { self.chunks.send_timeout(chunk, IDLE_MAX).await });
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for PipeWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = self.buffer.split().freeze();
        self.send(Ok(chunk))
    }
}

/// The reading end, for a blocking thread.
pub struct PipeReader {
    chunks: mpsc::Receiver<Chunk>,
    unread: Bytes,
    runtime: Handle,
}

impl PipeReader {
    /// Reads from `chunks`. Must be created within a runtime and used on a thread of its blocking pool.
    pub fn new(chunks: mpsc::Receiver<Chunk>) -> Self {
        Self {
            chunks,
            unread: Bytes::new(),
            runtime: Handle::current(),
        }
    }
}

impl Read for PipeReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.unread.is_empty() {
            let next = self
                .runtime
                .block_on(async { tokio::time::timeout(IDLE_MAX, self.chunks.recv()).await });
            match next {
                Ok(Some(chunk)) => self.unread = chunk?,
                Ok(None) => return Ok(0),
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        let count = self.unread.len().min(into.len());
        if let Some(into) = into.get_mut(..count) {
            self.unread.copy_to_slice(into);
        }
        Ok(count)
    }
}
