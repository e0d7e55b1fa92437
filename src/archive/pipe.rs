//! An archive on its way: a thread that may wait writes or reads it, and the other end is a connection that must not.
//!
//! The end of an archive is said, never guessed: whoever breaks off leaves an error behind, and not an end.

use std::io::{self, Read, Write};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::STEP_BYTES;

/// Pieces on their way at a time, of 256 KiB at most.
const PIECES_MAX: usize = 8;

/// The other end may be slow: it may be waiting for a registry. But not for ever.
const IDLE_MAX: Duration = Duration::from_secs(300);

/// A piece of an archive, or why there is no more.
pub type Piece = io::Result<Bytes>;

/// The two ends of a pipe.
pub fn pipe() -> (mpsc::Sender<Piece>, mpsc::Receiver<Piece>) {
    mpsc::channel(PIECES_MAX)
}

/// The writing end, for a thread that may wait.
pub struct Sink {
    pieces: mpsc::Sender<Piece>,
    gathered: BytesMut,
    runtime: Handle,
}

impl Sink {
    /// Writes into `pieces`. To be made within a runtime, and used on a thread of its blocking pool.
    pub fn new(pieces: mpsc::Sender<Piece>) -> Self {
        Self {
            pieces,
            gathered: BytesMut::with_capacity(STEP_BYTES),
            runtime: Handle::current(),
        }
    }

    /// Tells the other end how it ended: an archive whose end nobody says is a broken one.
    pub fn end(mut self, result: io::Result<()>) {
        let last = result.and_then(|()| self.flush()).err();
        if let Some(error) = last {
            // Whoever has gone needs no reason.
            let _ = self.send(Err(error));
        }
    }

    fn send(&mut self, piece: Piece) -> io::Result<()> {
        let sent = self
            .runtime
            .block_on(async { self.pieces.send_timeout(piece, IDLE_MAX).await });
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.gathered.extend_from_slice(bytes);
        if self.gathered.len() >= STEP_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let piece = self.gathered.split().freeze();
        self.send(Ok(piece))
    }
}

/// The reading end, for a thread that may wait.
pub struct Spring {
    pieces: mpsc::Receiver<Piece>,
    rest: Bytes,
    runtime: Handle,
}

impl Spring {
    /// Reads from `pieces`. To be made within a runtime, and used on a thread of its blocking pool.
    pub fn new(pieces: mpsc::Receiver<Piece>) -> Self {
        Self {
            pieces,
            rest: Bytes::new(),
            runtime: Handle::current(),
        }
    }
}

impl Read for Spring {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            let next = self
                .runtime
                .block_on(async { tokio::time::timeout(IDLE_MAX, self.pieces.recv()).await });
            match next {
                Ok(Some(piece)) => self.rest = piece?,
                Ok(None) => return Ok(0),
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        let count = self.rest.len().min(into.len());
        if let Some(into) = into.get_mut(..count) {
            self.rest.copy_to_slice(into);
        }
        Ok(count)
    }
}
