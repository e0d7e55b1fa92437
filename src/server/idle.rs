//! A connection that makes no progress is closed: a stalled reader must not hold a place for ever.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::connections::Handle;

/// Quiet that is not the client's doing: while a pardon is held, nothing needs to move on its connection.
#[derive(Clone, Debug, Default)]
pub struct Pardon(Arc<AtomicUsize>);

impl Pardon {
    /// Holds until what is given is dropped.
    pub(crate) fn hold(&self) -> Pardoned {
        self.0.fetch_add(1, Ordering::Relaxed);
        Pardoned(Arc::clone(&self.0))
    }

    fn is_held(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// See [`Pardon::hold`].
pub(crate) struct Pardoned(Arc<AtomicUsize>);

impl Drop for Pardoned {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that fails with [`io::ErrorKind::TimedOut`] when nothing moved on it, in either direction, for `patience`, and
/// no pardon is held.
pub(crate) struct Watched<T> {
    stream: T,
    patience: Duration,
    pardon: Pardon,
    moved: Instant,
    alarm: Pin<Box<Sleep>>,
    connection: Handle,
}

impl<T> Watched<T> {
    pub(crate) fn new(stream: T, patience: Duration, pardon: Pardon) -> Self {
        Self {
            stream,
            patience,
            pardon,
            moved: Instant::now(),
            alarm: Box::pin(sleep(patience)),
            connection: Handle::default(),
        }
    }

    /// Tells this connection whether bytes wait to be sent.
    pub(crate) fn of(self, connection: Handle) -> Self {
        Self { connection, ..self }
    }

    fn sent<R>(&mut self, done: Poll<io::Result<R>>, context: &mut Context<'_>) -> Poll<io::Result<R>> {
        self.connection.note_sending(done.is_pending());
        self.progress(done, context)
    }

    fn progress<R>(&mut self, done: Poll<io::Result<R>>, context: &mut Context<'_>) -> Poll<io::Result<R>> {
        if done.is_ready() {
            self.moved = Instant::now();
            return done;
        }
        // The alarm is set anew only when it rings, not for each byte.
        loop {
            ready!(self.alarm.as_mut().poll(context));
            if self.pardon.is_held() {
                self.moved = Instant::now();
            }
            let quiet_until = self.moved + self.patience;
            if quiet_until <= Instant::now() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.alarm.as_mut().reset(quiet_until);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.progress(read, context)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.sent(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.sent(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() {
            self.connection.note_sending(false);
            flushed
        } else {
            self.sent(flushed, context)
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.progress(shut, context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_stops_reading_is_given_up() {
        let (ours, theirs) = duplex(16);
        let mut ours = Watched::new(ours, PATIENCE, Pardon::default());
        let error = ours.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(theirs);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_somebody_else_is_not_while_that_lasts() {
        let (ours, theirs) = duplex(16);
        let pardon = Pardon::default();
        let mut ours = Watched::new(ours, PATIENCE, pardon.clone());
        let held = pardon.hold();
        let reading = tokio::spawn(async move { ours.read_u8().await });
        sleep(PATIENCE * 10).await;
        assert!(!reading.is_finished());
        drop(held);
        assert_eq!(
            reading.await.unwrap().unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        drop(theirs);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_peer_is_not() {
        let (ours, mut theirs) = duplex(16);
        let mut ours = Watched::new(ours, PATIENCE, Pardon::default());
        let writing = tokio::spawn(async move { ours.write_all(&[7; 64]).await });
        for _ in 0..64 {
            sleep(PATIENCE / 2).await;
            assert_eq!(theirs.read_u8().await.unwrap(), 7);
        }
        writing.await.unwrap().unwrap();
    }
}
