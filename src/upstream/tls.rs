//! TLS client: trust anchors, pinned certificates, client certificates, and descriptions of failures.
//!
//! * `verify`: verification of server certificates. * `failure`: classification and description of rustls errors.

mod failure;
mod verify;

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use http::Uri;
use http::uri::Authority;
use parking_lot::Mutex;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::dialer::{DialError, Stream};
use crate::oci::failure::{TlsFailure, UpstreamFailure};
use failure::classify;
pub(super) use verify::Trust;

/// The description of a TLS error inside an I/O error.
pub(super) fn reason(error: &io::Error) -> Option<String> {
    failure::of(error).map(|(_, detail)| detail)
}

/// The cause for an I/O error on a connection.
pub(super) fn io_cause(error: &io::Error) -> UpstreamFailure {
    let tls = error.get_ref().and_then(|error| error.downcast_ref());
    if let Some(tls) = tls {
        return UpstreamFailure::Tls(classify(tls).0);
    }
    match error.kind() {
        io::ErrorKind::ConnectionRefused => UpstreamFailure::ConnectionRefused,
        io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::NetworkDown
        | io::ErrorKind::AddrNotAvailable
        | io::ErrorKind::PermissionDenied => UpstreamFailure::Unreachable,
        io::ErrorKind::TimedOut => UpstreamFailure::Timeout,
        io::ErrorKind::InvalidData => UpstreamFailure::Tls(TlsFailure::Other),
        _ => UpstreamFailure::ConnectionReset,
    }
}

/// TLS cannot be set up: an error in the configuration or the build.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The n-th additional certificate (from 0) is unusable.
    #[error("certificate {0} is not a usable certificate")]
    Root(usize),
    /// The crypto provider supports no protocol version. Cannot happen with the one compiled in.
    #[error("TLS is unusable: {0}")]
    Provider(String),
}

/// Why a certificate and a key are no client certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientCertificateError {
    /// The certificate file contains no certificate.
    #[error("there is no certificate in the file")]
    NoCertificate,
    /// The key file contains no readable private key.
    #[error("there is no private key in the file, or it is encrypted")]
    NoKey,
    /// The key type is not supported.
    #[error("the private key cannot be used: {0}")]
    Key(String),
    /// The key belongs to another certificate.
    #[error("the private key is not that of the certificate")]
    Mismatch,
}

/// A certificate chain with its private key, sent to an upstream that requests one.
#[derive(Clone)]
pub struct ClientCertificate(Arc<CertifiedKey>);

impl ClientCertificate {
    /// Parses PEM: the chain, leaf first, and its private key.
    pub fn read(chain: &[u8], key: &[u8]) -> Result<ClientCertificate, ClientCertificateError> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<_, _>>()
            .map_err(|_| ClientCertificateError::NoCertificate)?;
        if chain.is_empty() {
            return Err(ClientCertificateError::NoCertificate);
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| ClientCertificateError::NoKey)?;
        match CertifiedKey::from_der(chain, key, &rustls::crypto::aws_lc_rs::default_provider()) {
            Ok(certified) => Ok(ClientCertificate(Arc::new(certified))),
            Err(rustls::Error::InconsistentKeys(_)) => Err(ClientCertificateError::Mismatch),
            Err(error) => Err(ClientCertificateError::Key(error.to_string())),
        }
    }
}

/// Compares the public certificates; a certificate has only one key.
impl PartialEq for ClientCertificate {
    fn eq(&self, other: &Self) -> bool {
        self.0.cert == other.0.cert
    }
}

impl Eq for ClientCertificate {}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificate")
            .field("chain", &self.0.cert.len())
            .finish_non_exhaustive()
    }
}

/// TLS client with the trust anchors of one upstream.
pub(super) struct Tls {
    connector: TlsConnector,
    client_auth: Arc<ClientAuth>,
}

impl Tls {
    /// Creates a client with these trust anchors and ALPN protocols. `certificate` is sent to servers that request
    /// one.
    pub(super) fn new(
        trust: &Trust,
        protocols: &[&[u8]],
        certificate: Option<ClientCertificate>,
    ) -> Result<Tls, TlsError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client_auth = Arc::new(ClientAuth {
            certificate,
            is_requested: AtomicBool::new(false),
            last_close: Mutex::default(),
        });
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::Provider(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(trust.verifier()?)
            .with_client_cert_resolver(Arc::clone(&client_auth) as Arc<dyn ResolvesClientCert>);
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let connector = TlsConnector::from(Arc::new(config));
        Ok(Tls {
            connector,
            client_auth,
        })
    }

    /// Performs the handshake with the host of `to`. The flag tells whether h2 was negotiated.
    pub(super) async fn handshake(
        &self,
        to: &Uri,
        stream: Box<dyn Stream>,
    ) -> Result<(Box<dyn Stream>, bool), DialError> {
        let host = to
            .host()
            .unwrap_or_default()
            .trim_start_matches('[')
            .trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| DialError::new(UpstreamFailure::Tls(TlsFailure::WrongName), error))?;
        let connected = self.connector.connect(name, stream).await;
        let stream = connected.map_err(|error| self.client_auth.handshake_error(error))?;
        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let monitored = MonitoredStream {
            stream,
            to: to.authority().cloned(),
            has_read: false,
            client_auth: Arc::clone(&self.client_auth),
        };
        Ok((Box::new(monitored), h2))
    }

    /// Why the server at `to` closed a connection after the handshake, no earlier than `since`. In TLS 1.3 the server
    /// verifies a client certificate only after the client's handshake is complete (RFC 8446 §4.4.2.4).
    pub(super) fn close_reason(&self, to: &Uri, since: Instant) -> Option<(TlsFailure, String)> {
        let mut ended = self.client_auth.last_close.lock();
        let ended = ended.take_if(|ended| Some(&ended.by) == to.authority() && ended.at >= since)?;
        Some((ended.failure, ended.detail))
    }
}

/// TLS stream that records why the server closed it. To the HTTP client it is only a closed connection.
struct MonitoredStream {
    stream: TlsStream<Box<dyn Stream>>,
    to: Option<Authority>,
    has_read: bool,
    client_auth: Arc<ClientAuth>,
}

impl MonitoredStream {
    fn record_error<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &polled {
            self.record_close(failure::of(error));
        }
        polled
    }

    /// Without an alert, a rejection can only be inferred: the server requested a certificate and closed the
    /// connection before sending anything.
    fn record_close(&self, alert: Option<(TlsFailure, String)>) {
        let is_requested = self.client_auth.is_requested.load(Ordering::Relaxed);
        let inferred = || {
            (is_requested && !self.has_read)
                .then(|| self.client_auth.certificate_rejected("the connection was closed"))
        };
        let mut ended = self.client_auth.last_close.lock();
        if let (Some((failure, detail)), Some(by)) = (alert.or_else(inferred), self.to.clone()) {
            let at = Instant::now();
            *ended = Some(ServerClose {
                by,
                at,
                failure,
                detail,
            });
        }
    }
}

impl AsyncRead for MonitoredStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        match &polled {
            Poll::Ready(Ok(())) if buf.filled().len() > before => self.has_read = true,
            Poll::Ready(Ok(())) if !self.has_read => self.record_close(None),
            Poll::Ready(_) | Poll::Pending => {}
        }
        self.record_error(polled)
    }
}

impl AsyncWrite for MonitoredStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.record_error(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.record_error(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        self.record_error(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The client certificate, whether a server requested one, and the last close after a handshake.
#[derive(Debug)]
struct ClientAuth {
    certificate: Option<ClientCertificate>,
    is_requested: AtomicBool,
    last_close: Mutex<Option<ServerClose>>,
}

/// How a server closed a connection after the handshake.
#[derive(Debug)]
struct ServerClose {
    by: Authority,
    at: Instant,
    failure: TlsFailure,
    detail: String,
}

impl ClientAuth {
    /// Describes the failure after a server requested a client certificate.
    fn certificate_rejected(&self, then: &str) -> (TlsFailure, String) {
        let detail = match self.certificate {
            Some(_) => format!(
                "the server requested a client certificate, received `client_certificate` and rejected it ({then})"
            ),
            None => format!(
                "the server requested a client certificate ({then}); set `client_certificate` and `client_key`"
            ),
        };
        (TlsFailure::ClientCertificate, detail)
    }

    /// Many servers abort the handshake with an unspecific alert, or none, if a requested certificate is missing.
    fn handshake_error(&self, error: io::Error) -> DialError {
        let (mut cause, mut detail) = match failure::of(&error) {
            Some((failure, detail)) => (UpstreamFailure::Tls(failure), detail),
            None if error.kind() == io::ErrorKind::UnexpectedEof => (
                UpstreamFailure::ConnectionReset,
                "the connection was closed during the TLS handshake".to_owned(),
            ),
            None => (io_cause(&error), error.to_string()),
        };
        let is_unspecific = matches!(
            cause,
            UpstreamFailure::ConnectionReset | UpstreamFailure::Tls(TlsFailure::Version | TlsFailure::Other)
        );
        if self.is_requested.load(Ordering::Relaxed) && is_unspecific {
            let (failure, refused) = self.certificate_rejected(&detail);
            (cause, detail) = (UpstreamFailure::Tls(failure), refused);
        }
        DialError {
            cause,
            detail: Some(detail.into()),
            source: Some(error.into()),
        }
    }
}

impl ResolvesClientCert for ClientAuth {
    fn resolve(&self, _: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.is_requested.store(true, Ordering::Relaxed);
        let own = &self.certificate.as_ref()?.0;
        own.key.choose_scheme(schemes).map(|_| Arc::clone(own))
    }

    fn has_certs(&self) -> bool {
        self.certificate.is_some()
    }
}
