//! A byte stream to an address, and why there is none.
//!
//! [`Dialer`] is the seam tests replace: it gives a raw stream to a host and port, and everything above it (TLS
//! included) stays ours. [`Transport`] is what all upstreams share.

use std::error::Error;
use std::fmt;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use tokio::io::{AsyncRead, AsyncWrite};

use super::redirect_rules::AddressLimit;
use crate::oci::failure::{RedirectFailure, UpstreamFailure};

/// Anything bytes go through.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection, before TLS.
pub struct DialedStream {
    /// The bytes.
    pub stream: Box<dyn Stream>,
    /// Who is at the other end, if there is an address.
    pub peer: Option<IpAddr>,
}

/// What [`Dialer::dial`] returns.
pub type DialFuture = Pin<Box<dyn Future<Output = Result<DialedStream, DialError>> + Send>>;

/// The network outwards: a host and port become a byte stream.
pub trait Dialer: Send + Sync + 'static {
    /// Connects to the host and port of `to` (its scheme's port if none is written). An address that `limit` does not
    /// allow must be refused by [`DialError::scope_denied`]. Gives up by itself after `timeout`.
    fn dial(&self, to: &Uri, limit: &AddressLimit, timeout: Duration) -> DialFuture;
}

/// Why there is no connection.
#[derive(Debug)]
pub struct DialError {
    /// For the decision.
    pub cause: UpstreamFailure,
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
    pub(super) fn new(cause: UpstreamFailure, source: impl Into<Box<dyn Error + Send + Sync>>) -> DialError {
        DialError {
            cause,
            detail: None,
            source: Some(source.into()),
        }
    }

    /// The address that `limit` did not allow.
    pub fn scope_denied(address: IpAddr) -> DialError {
        DialError {
            cause: UpstreamFailure::Redirects(RedirectFailure::NarrowerScope),
            detail: None,
            source: Some(ScopeDenied(address).into()),
        }
    }

    /// The address that was refused by [`DialError::scope_denied`].
    pub(super) fn denied_address(&self) -> Option<IpAddr> {
        let ScopeDenied(address) = self.source.as_ref()?.downcast_ref()?;
        Some(*address)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0} is nearer than the registry itself")]
struct ScopeDenied(IpAddr);

impl From<UpstreamFailure> for DialError {
    fn from(cause: UpstreamFailure) -> Self {
        DialError {
            cause,
            detail: None,
            source: None,
        }
    }
}
