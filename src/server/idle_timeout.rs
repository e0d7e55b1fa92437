//! Idle timeout for connections, so that a stalled client does not keep a connection permit.

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

/// Pauses the idle timeout while the server itself waits for an upstream.
#[derive(Clone, Debug, Default)]
pub struct IdlePause(Arc<AtomicUsize>);

impl IdlePause {
    /// Pauses until the guard is dropped.
    pub(crate) fn pause(&self) -> IdlePauseGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        IdlePauseGuard(Arc::clone(&self.0))
    }

    fn is_paused(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// See [`IdlePause::pause`].
pub(crate) struct IdlePauseGuard(Arc<AtomicUsize>);

impl Drop for IdlePauseGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that fails with [`io::ErrorKind::TimedOut`] if no byte moves in either direction for `timeout`, unless
/// the timeout is paused.
pub(crate) struct IdleTimeoutStream<T> {
    stream: T,
    timeout: Duration,
    pause: IdlePause,
    last_progress: Instant,
    deadline: Pin<Box<Sleep>>,
    connection: Handle,
}

impl<T> IdleTimeoutStream<T> {
    pub(crate) fn new(stream: T, timeout: Duration, pause: IdlePause) -> Self {
        Self {
            stream,
            timeout,
            pause,
            last_progress: Instant::now(),
            deadline: Box::pin(sleep(timeout)),
            connection: Handle::default(),
        }
    }

    /// Reports to this connection whether bytes wait to be sent.
    pub(crate) fn of(self, connection: Handle) -> Self {
        Self { connection, ..self }
    }

    fn sent<R>(&mut self, done: Poll<io::Result<R>>, context: &mut Context<'_>) -> Poll<io::Result<R>> {
        self.connection.note_sending(done.is_pending());
        self.progress(done, context)
    }

    fn progress<R>(&mut self, done: Poll<io::Result<R>>, context: &mut Context<'_>) -> Poll<io::Result<R>> {
        if done.is_ready() {
            self.last_progress = Instant::now();
            return done;
        }
        // The timer is reset when it fires, and not for each byte.
        loop {
            ready!(self.deadline.as_mut().poll(context));
            if self.pause.is_paused() {
                self.last_progress = Instant::now();
            }
            let quiet_until = self.last_progress + self.timeout;
            if quiet_until <= Instant::now() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.deadline.as_mut().reset(quiet_until);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for IdleTimeoutStream<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.progress(read, context)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for IdleTimeoutStream<T> {
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

    const TIMEOUT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_stops_reading_is_given_up() {
        let (server, client) = duplex(16);
        let mut server = IdleTimeoutStream::new(server, TIMEOUT, IdlePause::default());
        let error = server.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_somebody_else_is_not_while_that_lasts() {
        let (server, client) = duplex(16);
        let pause = IdlePause::default();
        let mut server = IdleTimeoutStream::new(server, TIMEOUT, pause.clone());
        let paused = pause.pause();
        let reading = tokio::spawn(async move { server.read_u8().await });
        sleep(TIMEOUT * 10).await;
        assert!(!reading.is_finished());
        drop(paused);
        assert_eq!(
            reading.await.unwrap().unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        drop(client);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_peer_is_not() {
        let (server, mut client) = duplex(16);
        let mut server = IdleTimeoutStream::new(server, TIMEOUT, IdlePause::default());
        let writing = tokio::spawn(async move { server.write_all(&[7; 64]).await });
        for _ in 0..64 {
            sleep(TIMEOUT / 2).await;
            assert_eq!(client.read_u8().await.unwrap(), 7);
        }
        writing.await.unwrap().unwrap();
    }
}
