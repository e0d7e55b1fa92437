//! TLS stream whose unsent records count to the memory budget.
//!
//! rustls encrypts what it is given at once, up to [`RECORD_BYTES_MAX`], and sends what the socket takes. A chunk of a
//! response would leave the budget with its encryption, and stay in memory for as long as the client does not read: half a
//! megabyte for each connection. So the records are counted instead, and nothing is encrypted while earlier records are
//! unsent.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;

use crate::server::egress::Unsent;

/// Bytes encrypted at a time. rustls' default of 64 KiB would split reads of 256 KiB into four writes.
const RECORD_BYTES_MAX: usize = 512 * 1024;

/// A TLS stream after its handshake.
pub(in crate::server) struct RecordStream<S> {
    stream: TlsStream<S>,
    unsent: Unsent,
}

impl<S> RecordStream<S> {
    /// Charges the records of `stream` to `unsent`.
    pub(super) fn new(mut stream: TlsStream<S>, unsent: Unsent) -> Self {
        stream.get_mut().1.set_buffer_limit(Some(RECORD_BYTES_MAX));
        Self { stream, unsent }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> RecordStream<S> {
    fn has_unsent(&self) -> bool {
        self.stream.get_ref().1.wants_write()
    }

    /// Sends earlier records, then encrypts by `write`.
    fn poll_encrypt(
        &mut self,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut TlsStream<S>>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if self.has_unsent() {
            ready!(self.poll_sent(context))?;
        }
        self.unsent.set(0);
        let written = ready!(write(Pin::new(&mut self.stream), context))?;
        if self.has_unsent() {
            self.unsent.set(written);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_sent(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        self.unsent.set(0);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for RecordStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for RecordStream<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut()
            .poll_encrypt(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_encrypt(context, |stream, context| {
            stream.poll_write_vectored(context, slices)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_sent(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use std::collections::HashSet;
    use std::sync::Arc;

    use rustls::{ClientConfig, RootCertStore};
    use rustls_pki_types::ServerName;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::task::yield_now;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client;

    use super::*;
    use crate::clock::Clock;
    use crate::config::Tls;
    use crate::server::egress::Egress;
    use crate::server::tls::{Handshake, ServerTls, provider};

    const SOCKET_BYTES: usize = 16 * 1024;

    /// Both ends of a TLS connection over a socket with this little space.
    async fn connection(egress: &Egress) -> (client::TlsStream<DuplexStream>, RecordStream<DuplexStream>) {
        let folder = tempfile::tempdir().unwrap();
        let tls = Tls {
            folder: folder.path().to_owned(),
            names: Vec::new(),
            constrained: true,
            certificate: None,
        };
        let server = ServerTls::prepare(&tls, &[], HashSet::new(), &[], Clock::system()).unwrap();
        let mut roots = RootCertStore::empty();
        let ca = pem::parse(std::fs::read(folder.path().join("ca.pem")).unwrap()).unwrap();
        roots.add(ca.into_contents().into()).unwrap();
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let (near, far) = duplex(SOCKET_BYTES);
        let name = ServerName::try_from("localhost").unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let (client, server) = tokio::join!(
            connector.connect(name, near),
            server.accept(far, egress.unsent(None))
        );
        let Handshake { stream, .. } = server.unwrap();
        (client.unwrap(), stream)
    }

    #[tokio::test]
    async fn t03_unsent_records_count_and_block_further_ones() {
        let egress = Egress::default();
        let (mut client, mut server) = connection(&egress).await;
        server.flush().await.unwrap();
        assert_eq!(egress.outstanding().bytes, 0);
        let chunk = vec![7; 4 * SOCKET_BYTES];
        let written = server.write(&chunk).await.unwrap();
        assert!(written > SOCKET_BYTES, "{written}");
        assert_eq!(egress.outstanding().bytes, written as u64);

        // The client reads nothing, so nothing more is encrypted.
        let more = tokio::spawn(async move {
            server.write_all(&chunk).await.unwrap();
            server.flush().await.unwrap();
            server
        });
        for _ in 0..100 {
            yield_now().await;
        }
        assert!(!more.is_finished());
        assert_eq!(egress.outstanding().bytes, written as u64);

        let mut read = vec![0; written + 4 * SOCKET_BYTES];
        client.read_exact(&mut read).await.unwrap();
        let server = more.await.unwrap();
        assert!(read.iter().all(|byte| *byte == 7));
        assert_eq!(egress.outstanding().bytes, 0);
        drop(server);
    }

    #[tokio::test]
    async fn t03_records_of_a_closed_connection_do_not_count() {
        let egress = Egress::default();
        let (_client, mut server) = connection(&egress).await;
        let written = server.write(&vec![7; 4 * SOCKET_BYTES]).await.unwrap();
        assert!(written > SOCKET_BYTES, "{written}");
        assert!(egress.outstanding().bytes > 0);
        drop(server);
        assert_eq!(egress.outstanding().bytes, 0);
    }
}
