//! Settings of an upstream, and the caller of a request. Secrets are never printed.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::HeaderValue;
use tokio::time::Instant;

use super::credentials::CredentialSource;
use super::failover::ServedStore;
use super::observer::Observer;
use super::origin::Origin;
use super::proxy_rules::{ProxyChoice, ProxyError};
use super::redirect_rules::RedirectRule;
use super::tls::{ClientCertificate, TlsError};
use crate::oci::UpstreamFailure;
use crate::oci::endpoint::Endpoint;
use crate::queue::{Class, Demand, Peer, Waiters, flow};
use crate::trace_context::TraceContext;

/// Settings of one upstream.
pub struct Settings {
    /// Its name in image references, e.g. `docker.io`.
    pub name: String,
    /// Its URLs, tried in order; at least one.
    pub urls: Vec<Origin>,
    /// Certificates trusted besides the system's, DER: each as an authority and as a server certificate.
    pub roots: Vec<Vec<u8>>,
    /// The outbound proxy.
    pub proxy: ProxyChoice,
    /// Source of the configured credential, for callers with [`Credential::Configured`].
    pub credential: Option<CredentialSource>,
    /// Further host names of this upstream, for looking up a credential.
    pub hosts: Vec<String>,
    /// Further hosts that a token realm may have, with a port if it is not the scheme's default.
    pub token_hosts: Vec<String>,
    /// Further redirect targets, besides https URLs in a scope no narrower than the upstream's own.
    pub redirects: Vec<RedirectRule>,
    /// Client certificate, sent only to the configured hosts and ports.
    pub client_certificate: Option<ClientCertificate>,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// Maximum size of a manifest in bytes.
    pub manifest_bytes_max: usize,
    /// Maximum number of concurrent requests (HEAD, manifests, lists), and of concurrent blob transfers.
    pub downloads_max: usize,
    /// The operator's offline mode.
    pub offline: Offline,
    /// Observes each request.
    pub observer: Observer,
    /// Records which of several URLs have served which repositories.
    pub served: Option<Arc<dyn ServedStore>>,
}

impl Settings {
    /// Settings with a name and URLs, and defaults otherwise.
    pub fn new(name: impl Into<String>, urls: Vec<Origin>) -> Settings {
        Settings {
            name: name.into(),
            urls,
            roots: Vec::new(),
            proxy: ProxyChoice::default(),
            credential: None,
            hosts: Vec::new(),
            token_hosts: Vec::new(),
            redirects: Vec::new(),
            client_certificate: None,
            timeouts: Timeouts::default(),
            manifest_bytes_max: crate::oci::manifest::MANIFEST_BYTES_MAX,
            downloads_max: DOWNLOADS_MAX,
            offline: Offline::default(),
            observer: Observer::default(),
            served: None,
        }
    }
}

/// Default maximum of concurrent requests, and of concurrent blob transfers.
pub const DOWNLOADS_MAX: usize = 64;

/// Offline mode: no upstream gets a request, and each request fails with [`UpstreamFailure::Offline`]. Transfers under
/// way continue. Clones share the mode.
#[derive(Clone, Debug, Default)]
pub struct Offline(Arc<AtomicBool>);

impl Offline {
    /// Sets the mode and returns the previous one.
    pub fn set(&self, on: bool) -> bool {
        self.0.swap(on, Ordering::Relaxed)
    }

    /// Whether the mode is on.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn cause(&self) -> Option<UpstreamFailure> {
        self.is_on().then_some(UpstreamFailure::Offline)
    }
}

/// Timeouts of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For DNS, TCP, proxy and TLS together.
    pub connect: Duration,
    /// From sending a request to the response headers, redirects included.
    pub headers: Duration,
    /// Between two chunks of a body.
    pub idle: Duration,
    /// For a token request.
    pub token: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Timeouts {
            connect: seconds(3),
            headers: seconds(25),
            idle: seconds(30),
            token: seconds(10),
        }
    }
}

/// The caller of a request: whose credential, trace and deadline apply.
#[derive(Clone)]
pub struct Caller {
    /// HMAC of the credential. Tokens and token requests are never shared between two principals.
    pub principal: [u8; 32],
    /// The credential to send.
    pub credential: Credential,
    /// The client, for fair queueing.
    pub peer: Peer,
    /// The priority class of the request.
    pub class: Class,
    /// The callers that wait for the result, if several share the request.
    pub waiters: Option<Waiters>,
    /// The trace context of the request.
    pub trace: TraceContext,
    /// Until when a rate limit may be waited out. `None`: do not wait.
    pub wait_deadline: Option<Instant>,
}

impl Caller {
    /// The queue demand of `endpoint`. The flows of a client are its principals, repositories and kinds of request.
    pub fn demand(&self, endpoint: &Endpoint) -> Demand {
        let kind = std::mem::discriminant(endpoint);
        Demand {
            peer: self.peer,
            flow: flow((self.principal, endpoint.repository(), kind)),
            class: self.class,
        }
    }
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Caller({:?})", self.credential)
    }
}

/// The credential to send. Callers map an empty Basic credential (`Og==`) to [`Credential::Anonymous`].
#[derive(Clone)]
pub enum Credential {
    /// None.
    Anonymous,
    /// The client's `Authorization` header, unchanged.
    Client(HeaderValue),
    /// The configured one, [`Settings::credential`].
    Configured,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credential::Anonymous => "anonymous",
            Credential::Client(_) => "client",
            Credential::Configured => "cache",
        })
    }
}

/// Why an upstream cannot be set up. A configuration error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// No URL is configured.
    #[error("the upstream has no URL")]
    NoUrl,
    /// TLS cannot be set up with these certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The proxy cannot be used.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
}
