//! A byte stream to an address, and why there is none.
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
use tokio::io::{AsyncRead, AsyncWrite};

use super::target::Limit;
use super::tcp::Tcp;
use super::tls::{Trust, classify};
use crate::oci::cause::{Cause, RedirectFault, TlsFault};

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
    /// Connects to the host and port of `to` (its scheme's port if none is written). An address that `limit` does not
    /// allow must be refused by [`DialError::too_near`]. Gives up by itself after `patience`.
    fn dial(&self, to: &Uri, limit: &Limit, patience: Duration) -> Dialling;
}

/// Why there is no connection.
#[derive(Debug)]
pub struct DialError {
    /// For the decision.
    pub cause: Cause,
    /// The reason in words, for the operator: it may name hosts, addresses and certificates.
    pub detail: Option<Arc<str>>,
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
            detail: None,
            source: Some(source.into()),
        }
    }

    /// The address that `limit` did not allow.
    pub fn too_near(address: IpAddr) -> DialError {
        DialError {
            cause: Cause::Redirects(RedirectFault::TooNear),
            detail: None,
            source: Some(TooNear(address).into()),
        }
    }

    /// The address that was refused by [`DialError::too_near`].
    pub(super) fn refused_address(&self) -> Option<IpAddr> {
        let TooNear(address) = self.source.as_ref()?.downcast_ref()?;
        Some(*address)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0} is nearer than the registry itself")]
struct TooNear(IpAddr);

impl From<Cause> for DialError {
    fn from(cause: Cause) -> Self {
        DialError {
            cause,
            detail: None,
            source: None,
        }
    }
}

/// What all upstreams share: the way to dial and the certificates that the operating system trusts.
#[derive(Clone)]
pub struct Connector {
    dial: Arc<dyn Dial>,
    trust: Trust,
}

impl Connector {
    /// TCP, with the roots of the operating system, or the bundled ones where there are none (scratch images).
    /// Reads files; never touches the network.
    pub fn system() -> Connector {
        Connector {
            dial: Arc::new(Tcp),
            trust: Trust::system(),
        }
    }

    /// As [`Connector::system`] with another way to dial, for tests.
    pub fn with_dial(dial: Arc<dyn Dial>) -> Connector {
        Connector {
            dial,
            trust: Trust::system(),
        }
    }
}

impl Connector {
    pub(super) fn dial(&self) -> Arc<dyn Dial> {
        Arc::clone(&self.dial)
    }

    pub(super) fn trust(&self) -> &Trust {
        &self.trust
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("anchors", &self.trust.anchors())
            .finish_non_exhaustive()
    }
}

/// What an I/O error on an open or opening connection says about the other end.
pub(super) fn io_cause(error: &io::Error) -> Cause {
    let tls = error.get_ref().and_then(|error| error.downcast_ref());
    if let Some(tls) = tls {
        return Cause::Tls(classify(tls).0);
    }
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Cause::Refused,
        io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::NetworkDown
        | io::ErrorKind::AddrNotAvailable
        | io::ErrorKind::PermissionDenied => Cause::Unreachable,
        io::ErrorKind::TimedOut => Cause::Timeout,
        io::ErrorKind::InvalidData => Cause::Tls(TlsFault::Other),
        _ => Cause::Reset,
    }
}

#[cfg(test)]
mod tests;
