//! HTTP version of a connection, by its first bytes (RFC 9113 §3.3, prior knowledge).
//!
//! `hyper_util::server::conn::auto` does the same, and then returns the bytes that it read in a read of their own. hyper
//! takes them for an incomplete header and doubles its read buffer to 16 KiB, for as long as the connection lasts. Here the
//! next read returns them with the bytes that follow.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::timeout;

/// What a client sends first over HTTP/2 (RFC 9113 §3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The protocol of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HttpVersion {
    /// HTTP/1.0 or HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// A stream of which the first bytes were read. They are read again.
pub(super) struct Replayed<S> {
    stream: S,
    first: [u8; PREFACE.len()],
    /// The bytes `returned..read` of `first` are still to be returned.
    read: usize,
    returned: usize,
    /// A failed read after the first bytes, returned by the next one.
    failed: Option<io::Error>,
}

/// Reads the first bytes of `stream`: until they are the preface of HTTP/2, or cannot become it. Fails if that takes longer
/// than `within`.
pub(super) async fn detect<S: AsyncRead + Unpin>(
    stream: S,
    within: Duration,
) -> io::Result<(HttpVersion, Replayed<S>)> {
    let detected = timeout(within, detect_unlimited(stream)).await;
    detected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn detect_unlimited<S: AsyncRead + Unpin>(mut stream: S) -> io::Result<(HttpVersion, Replayed<S>)> {
    let (mut first, mut read) = ([0; PREFACE.len()], 0);
    let version = loop {
        if !PREFACE.starts_with(first.get(..read).unwrap_or_default()) {
            break HttpVersion::Http1;
        }
        let space = first.get_mut(read..).unwrap_or_default();
        if space.is_empty() {
            break HttpVersion::Http2;
        }
        match stream.read(space).await? {
            0 => break HttpVersion::Http1,
            more => read += more,
        }
    };
    let replayed = Replayed {
        stream,
        first,
        read,
        returned: 0,
        failed: None,
    };
    Ok((version, replayed))
}

impl<S: AsyncRead + Unpin> AsyncRead for Replayed<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(error) = this.failed.take() {
            return Poll::Ready(Err(error));
        }
        let first = this.first.get(this.returned..this.read).unwrap_or_default();
        if first.is_empty() {
            return Pin::new(&mut this.stream).poll_read(context, buffer);
        }
        let length = first.len().min(buffer.remaining());
        buffer.put_slice(first.get(..length).unwrap_or_default());
        this.returned += length;
        if buffer.remaining() > 0
            && let Poll::Ready(Err(error)) = Pin::new(&mut this.stream).poll_read(context, buffer)
        {
            this.failed = Some(error);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Replayed<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, duplex};
    use tokio::time::{Instant, sleep};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// The version by these bytes, sent in pieces of `piece` bytes, and all bytes as they are read then.
    async fn detected(bytes: &'static [u8], piece: usize) -> (HttpVersion, Vec<u8>) {
        let (mut client, server) = duplex(piece);
        let sending = tokio::spawn(async move { client.write_all(bytes).await });
        let (version, mut stream) = detect(server, TIMEOUT).await.unwrap();
        let mut read = Vec::new();
        stream.read_to_end(&mut read).await.unwrap();
        sending.await.unwrap().unwrap();
        (version, read)
    }

    #[tokio::test]
    async fn version_is_detected_in_pieces_of_any_size() {
        const H2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        for piece in [1, 2, 3, 23, 24, 25, 1024] {
            assert_eq!(detected(H2, piece).await, (HttpVersion::Http2, H2.to_vec()));
            for http1 in [
                &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..],
                b"POST / HTTP/1.1\r\nhost: a\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r",
                b"PRI * HTTP",
                b"",
            ] {
                assert_eq!(detected(http1, piece).await, (HttpVersion::Http1, http1.to_vec()));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn slow_preface_ends_with_the_header_timeout() {
        let (mut client, server) = duplex(64);
        let sending = tokio::spawn(async move {
            for byte in PREFACE {
                client.write_u8(*byte).await?;
                sleep(TIMEOUT / 3).await;
            }
            io::Result::Ok(())
        });
        let start = Instant::now();
        let error = detect(server, TIMEOUT).await.err().unwrap();
        assert_eq!(
            (error.kind(), start.elapsed()),
            (io::ErrorKind::TimedOut, TIMEOUT)
        );
        assert!(sending.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn first_read_returns_all_that_has_arrived() {
        let (mut client, server) = duplex(4096);
        let request = b"GET /v2/library/app/manifests/latest HTTP/1.1\r\nhost: a\r\n\r\n";
        client.write_all(request).await.unwrap();
        let (_, mut stream) = detect(server, TIMEOUT).await.unwrap();
        let mut buffer = vec![0; 4096];
        let read = stream.read(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..read], request);
    }
}
