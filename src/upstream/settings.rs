//! What an upstream is told from outside: its settings, and on whose behalf it is asked. Secrets in here are never
//! shown.

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

/// What an upstream is, as configured.
pub struct Settings {
    /// Its name in references: `docker.io`.
    pub name: String,
    /// Its addresses, tried in order; at least one.
    pub urls: Vec<Origin>,
    /// Certificates trusted besides the system's, DER: as authorities, and each as a server's own.
    pub roots: Vec<Vec<u8>>,
    /// The proxy it is reached through.
    pub proxy: ProxyChoice,
    /// Where our own credential comes from, used for callers with [`Credential::Configured`].
    pub credential: Option<CredentialSource>,
    /// Further host names that mean this upstream, by which a credential may be found.
    pub hosts: Vec<String>,
    /// Hosts a token realm may be on besides the upstream's own host and site; with a port where it is not the usual one.
    pub token_hosts: Vec<String>,
    /// Where its redirects may lead besides https and addresses no nearer than its own.
    pub redirects: Vec<RedirectRule>,
    /// Shown to its own hosts and ports if they ask for one, and to no others.
    pub client_certificate: Option<ClientCertificate>,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// Longest manifest read, in bytes.
    pub manifest_bytes_max: usize,
    /// Questions (HEAD, manifests, lists) under way at once, and as many blob transfers.
    pub downloads_max: usize,
    /// The operator's switch.
    pub offline: Offline,
    /// Hears of each exchange.
    pub observer: Observer,
    /// Keeps which of several URLs have served which repositories.
    pub served: Option<Arc<dyn ServedStore>>,
}

impl Settings {
    /// An upstream with everything else at its default.
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

/// Questions under way at once, and as many transfers, unless the operator says otherwise.
pub const DOWNLOADS_MAX: usize = 64;

/// While it is on, no upstream is asked anything: each is silent, because of [`UpstreamFailure::Offline`]. Transfers under way go
/// on until they break. Clones are the same switch.
#[derive(Clone, Debug, Default)]
pub struct Offline(Arc<AtomicBool>);

impl Offline {
    /// Turns it on or off; says how it was before.
    pub fn set(&self, on: bool) -> bool {
        self.0.swap(on, Ordering::Relaxed)
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn cause(&self) -> Option<UpstreamFailure> {
        self.is_on().then_some(UpstreamFailure::Offline)
    }
}

/// How long to wait for an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// DNS, TCP, proxy and TLS together.
    pub connect: Duration,
    /// From a request to its answer's headers, redirects included. Also the longest wait for a free place.
    pub headers: Duration,
    /// Between two chunks of a body.
    pub idle: Duration,
    /// For a token.
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

/// On whose behalf the upstream is asked.
#[derive(Clone)]
pub struct Caller {
    /// HMAC of the credential. Tokens and their fetches are never shared between two principals.
    pub principal: [u8; 32],
    /// What the upstream is shown.
    pub credential: Credential,
    /// The client whose turn among others it is.
    pub peer: Peer,
    /// How urgent the request is.
    pub class: Class,
    /// The requests that wait for its outcome, where several share it.
    pub waiters: Option<Waiters>,
    /// Which trace its reason belongs to.
    pub trace: TraceContext,
    /// Until when a rate limit of the upstream may be waited out for it; `None`: not at all.
    pub wait_deadline: Option<Instant>,
}

impl Caller {
    /// What is asked of admission for `endpoint`: the flows of a client are its principals, repositories and kinds of
    /// request.
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

/// What the upstream is shown. An empty Basic credential (`Og==`) is [`Credential::Anonymous`]; callers see to that.
#[derive(Clone)]
pub enum Credential {
    /// Nothing.
    Anonymous,
    /// The client's `Authorization`, as it came.
    Client(HeaderValue),
    /// [`Settings::credential`].
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

/// Why an upstream cannot be set up. The operator's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// Nowhere to ask.
    #[error("the upstream has no URL")]
    NoUrl,
    /// TLS cannot be set up with these certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The proxy cannot be used.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
}
