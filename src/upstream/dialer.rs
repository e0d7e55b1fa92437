//! Dialer interface: opens a byte stream to a host and port.
//!
//! Tests replace [`Dialer`]. All layers above it, TLS included, are the same for every dialer.

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

/// A byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// An established connection, before TLS.
pub struct DialedStream {
    /// The stream.
    pub stream: Box<dyn Stream>,
    /// The peer's address, if it has one.
    pub peer: Option<IpAddr>,
}

/// Result of [`Dialer::dial`].
pub type DialFuture = Pin<Box<dyn Future<Output = Result<DialedStream, DialError>> + Send>>;

/// Opens outbound connections.
pub trait Dialer: Send + Sync + 'static {
    /// Connects to the host and port of `to` (the scheme's port by default). An address that `limit` does not allow
    /// must fail with [`DialError::scope_denied`]. Fails after `timeout`.
    fn dial(&self, to: &Uri, limit: &AddressLimit, timeout: Duration) -> DialFuture;
}

/// Why a connection failed.
#[derive(Debug)]
pub struct DialError {
    /// For the decision.
    pub cause: UpstreamFailure,
    /// Description for the operator: it may contain hosts, addresses and certificate names.
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

    /// Fails because `limit` does not allow this address.
    pub fn scope_denied(address: IpAddr) -> DialError {
        DialError {
            cause: UpstreamFailure::Redirects(RedirectFailure::NarrowerScope),
            detail: None,
            source: Some(ScopeDenied(address).into()),
        }
    }

    /// The address of a [`DialError::scope_denied`].
    pub(super) fn denied_address(&self) -> Option<IpAddr> {
        let ScopeDenied(address) = self.source.as_ref()?.downcast_ref()?;
        Some(*address)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0} is in a narrower IP scope")]
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
