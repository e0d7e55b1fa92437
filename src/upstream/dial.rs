//! A byte stream to an address, and TLS over it. The only file of this layer that names rustls.
//!
//! [`Dial`] is the seam tests replace: it gives a raw stream to a host and port, and everything above it (TLS
//! included) stays ours. [`Connector`] is what all upstreams share.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::tcp::Tcp;
use super::zone::Zone;
use crate::oci::cause::Cause;

/// Anything bytes go through.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection, before TLS.
pub struct Dialled {
    /// The bytes.
    pub stream: Box<dyn Stream>,
    /// Who is at the other end, if there is an address.
    pub peer: Option<IpAddr>,
}

/// What [`Dial::dial`] returns.
pub type Dialling = Pin<Box<dyn Future<Output = Result<Dialled, DialError>> + Send>>;

/// The network outwards: a host and port become a byte stream.
pub trait Dial: Send + Sync + 'static {
    /// Connects to the host and port of `to` (its scheme's port if none is written). An address nearer than `nearest`
    /// must be refused with [`Cause::Redirects`]. Gives up by itself after `patience`.
    fn dial(&self, to: &Uri, nearest: Zone, patience: Duration) -> Dialling;
}

/// Why there is no connection.
#[derive(Debug)]
pub struct DialError {
    /// For the decision.
    pub cause: Cause,
    /// For the log.
    pub source: Option<Box<dyn Error + Send + Sync>>,
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)
    }
}

impl Error for DialError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl DialError {
    pub(super) fn new(cause: Cause, source: impl Into<Box<dyn Error + Send + Sync>>) -> DialError {
        DialError {
            cause,
            source: Some(source.into()),
        }
    }
}

impl From<Cause> for DialError {
    fn from(cause: Cause) -> Self {
        DialError { cause, source: None }
    }
}

/// What all upstreams share: the way to dial and the trusted roots.
#[derive(Clone)]
pub struct Connector {
    dial: Arc<dyn Dial>,
    roots: Arc<RootCertStore>,
}

impl Connector {
    /// TCP, with the roots of the operating system, or the bundled ones where there are none (scratch images).
    /// Reads files; never touches the network.
    pub fn system() -> Connector {
        Connector {
            dial: Arc::new(Tcp),
            roots: Arc::new(system_roots()),
        }
    }

    /// As [`Connector::system`] with another way to dial, for tests.
    pub fn with_dial(dial: Arc<dyn Dial>) -> Connector {
        Connector {
            dial,
            roots: Arc::new(system_roots()),
        }
    }
}

impl Connector {
    pub(super) fn dial(&self) -> Arc<dyn Dial> {
        Arc::clone(&self.dial)
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("roots", &self.roots.len())
            .finish_non_exhaustive()
    }
}

fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    let (added, ignored) = roots.add_parsable_certificates(native.certs);
    tracing::debug!(
        added,
        ignored,
        errors = native.errors.len(),
        "read the system's certificate authorities"
    );
    if roots.is_empty() {
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    roots
}

/// TLS cannot be set up. The operator's fault, or the build's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The n-th further root (from 0) is no usable CA certificate.
    #[error("certificate {0} is not a usable CA certificate")]
    Root(usize),
    /// The provider knows no protocol version; cannot happen with the one compiled in.
    #[error("TLS is unusable: {0}")]
    Provider(String),
}

/// TLS with the roots of one upstream.
pub(super) struct Tls(TlsConnector);

impl Tls {
    /// Trusts the connector's roots and `further` ones (DER), and offers `protocols` by ALPN.
    pub(super) fn new(
        connector: &Connector,
        further: &[Vec<u8>],
        protocols: &[&[u8]],
    ) -> Result<Tls, TlsError> {
        let mut roots = Arc::clone(&connector.roots);
        if !further.is_empty() {
            let own = Arc::make_mut(&mut roots);
            for (position, der) in further.iter().enumerate() {
                own.add(CertificateDer::from(der.clone()))
                    .map_err(|_| TlsError::Root(position))?;
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::Provider(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Tls(TlsConnector::from(Arc::new(config))))
    }

    /// The handshake with the host of `to`. The flag says whether h2 was agreed on.
    pub(super) async fn secure(
        &self,
        to: &Uri,
        stream: Box<dyn Stream>,
    ) -> Result<(Box<dyn Stream>, bool), DialError> {
        let host = to
            .host()
            .unwrap_or_default()
            .trim_start_matches('[')
            .trim_end_matches(']');
        let name =
            ServerName::try_from(host.to_owned()).map_err(|error| DialError::new(Cause::Tls, error))?;
        let handshake = self.0.connect(name, stream).await;
        let stream = handshake.map_err(|error| DialError::new(io_cause(&error), error))?;
        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok((Box::new(stream), h2))
    }
}

/// What an I/O error on an open or opening connection says about the other end.
pub(super) fn io_cause(error: &io::Error) -> Cause {
    if error
        .get_ref()
        .is_some_and(<dyn Error + Send + Sync>::is::<rustls::Error>)
    {
        return Cause::Tls;
    }
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Cause::Refused,
        io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::NetworkDown
        | io::ErrorKind::AddrNotAvailable
        | io::ErrorKind::PermissionDenied => Cause::Unreachable,
        io::ErrorKind::TimedOut => Cause::Timeout,
        io::ErrorKind::InvalidData => Cause::Tls,
        _ => Cause::Reset,
    }
}

#[cfg(test)]
mod tests;
