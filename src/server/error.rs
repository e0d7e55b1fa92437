//! Errors of request parsing, routing and authentication, with status, error code and log name.

use http::{Method, StatusCode};

use crate::oci::accept::AcceptError;
use crate::oci::query::QueryError;
use crate::oci::{ErrorCode, RequestError, UpstreamFailure};

/// Why a request was rejected.
#[derive(Debug, thiserror::Error)]
pub(super) enum Rejection {
    /// Not a request of the OCI distribution specification.
    #[error("{0}")]
    Malformed(#[from] RequestError),
    /// Invalid query.
    #[error("{0}")]
    Query(#[from] QueryError),
    /// Invalid `Accept` headers.
    #[error("{0}")]
    Accept(#[from] AcceptError),
    /// Missing, repeated or invalid `Host` (RFC 9112 §3.2).
    #[error("a request needs exactly one Host header")]
    InvalidHost,
    /// The connection (`CONNECT`, TLS server name) and the request name different hosts.
    #[error("the connection, the request's target and its Host header name different hosts")]
    Misdirected,
    /// `Transfer-Encoding` on a request that needs no body. RFC 9112 §6.1: a body with two framings allows request
    /// smuggling.
    #[error("requests with Transfer-Encoding are not accepted: reads need no body")]
    Framing,
    /// The request has passed this cache before (RFC 8586).
    #[error(
        "request loop: this request has passed this cache before, or too many caches; correct the `url` of the upstream that \
         leads here"
    )]
    Loop,
    /// A large body on a request that needs none.
    #[error("the body of a {0} request may not exceed 64 KiB")]
    BodyTooLarge(Method),
    /// A form that did not arrive in time.
    #[error("the form of a token request must arrive within {0} s")]
    BodyTimeout(u64),
    /// A body that broke off, or whose framing is invalid.
    #[error("the body of the request is incomplete")]
    BodyIncomplete,
    /// Plain HTTP from an address that needs TLS.
    #[error("plain HTTP is accepted from loopback only; use https://, or set listen.plain_http = \"any\"")]
    PlainHttp,
    /// `CONNECT` to a host that is neither an upstream nor allowed by a rule.
    #[error(
        "CONNECT to {0} is not allowed: it is not a configured upstream; add it to [connect] tunnel if clients need it"
    )]
    TunnelNotAllowed(String),
    /// `tunnels_max` reached.
    #[error("the limit `tunnels_max` of open tunnels is reached")]
    TooManyTunnels,
    /// Limit of intercepted TLS sessions on one connection.
    #[error("a connection may have {0} TLS sessions by CONNECT; open another connection")]
    TooManySessions(usize),
    /// The target of a tunnel cannot be reached, or its address is not allowed.
    #[error("no tunnel to {0}: the host {1}")]
    TunnelFailed(String, UpstreamFailure),
    /// There is no leaf certificate for an upstream's host.
    #[error("{0}")]
    NoCertificate(String),
    /// No valid user and password.
    #[error("authentication to this cache required; log in with: docker login")]
    Unauthenticated,
    /// No valid user and password on a `CONNECT`.
    #[error(
        "proxy authentication required; set user and password, as in HTTPS_PROXY=https://user:password@cache:5000"
    )]
    ProxyUnauthenticated,
    /// A password longer than bcrypt reads.
    #[error(
        "the password is longer than 72 bytes, which bcrypt would cut; set a shorter one, as with: htpasswd -B FILE USER"
    )]
    PasswordTooLong {
        /// Whether it came in `Proxy-Authorization`.
        to_proxy: bool,
    },
    /// No client certificate where one is required.
    #[error(
        "client certificate required; connect by https:// with a certificate of a CA in [access] client_ca"
    )]
    NoClientCertificate,
    /// The client certificate is no longer valid.
    #[error("client certificate rejected: {0}")]
    ClientCertificateRejected(String),
    /// The wait for a password check timed out.
    #[error("too many password checks in progress; try again")]
    TooManyPasswordChecks,
    /// Denied by the allow lists.
    #[error("the allow list of this cache denies {0}")]
    NotAllowed(String),
    /// A cache password is required, and the request came under an upstream's host name, where `Authorization` belongs
    /// to the upstream.
    #[error(
        "authentication to this cache is not possible under a registry's host name, where `Authorization` \
         belongs to the registry. Use the cache's own address (mirror, ?ns= or path prefix), HTTPS_PROXY with user \
         and password, or a client certificate if one is accepted"
    )]
    PasswordNotPossible,
    /// A write to an upstream with a `repository_prefix`.
    #[error(
        "{0} is read through a project of another registry (`repository_prefix`), so the cache cannot forward a push; \
         push to the registry itself"
    )]
    ReadOnly(String),
    /// `?ns=` is not a host.
    #[error(
        "ns names a registry by its host, as in ns=ghcr.io or ns=registry.example.org:5000; `{0}` is not a host"
    )]
    NsNotAHost(String),
    /// `?ns=` and another part of the request name different upstreams.
    #[error(
        "ns names `{namespace}`, and {at} names `{name}`: a request is for one registry. For a repository of {namespace} that begins with a registry's name, put both into the path, as in /v2/{namespace}/{name}/..., or leave one of them out"
    )]
    ConflictingUpstreams {
        /// The other part of the request.
        at: &'static str,
        /// The upstream named there.
        name: String,
        /// The value of `ns`.
        namespace: String,
    },
    /// `?ns=` names no configured upstream. Connecting to it would make the cache an open proxy.
    #[error("`{0}` is not a configured upstream")]
    UnknownUpstream(String),
}

impl Rejection {
    /// Status code of the response.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(malformed) => malformed.status(),
            Self::Query(_)
            | Self::Accept(_)
            | Self::InvalidHost
            | Self::Framing
            | Self::BodyIncomplete
            | Self::NsNotAHost(_)
            | Self::ConflictingUpstreams { .. } => StatusCode::BAD_REQUEST,
            Self::BodyTimeout(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Loop => StatusCode::LOOP_DETECTED,
            Self::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Self::BodyTooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unauthenticated | Self::PasswordTooLong { to_proxy: false } => StatusCode::UNAUTHORIZED,
            Self::ProxyUnauthenticated | Self::PasswordTooLong { to_proxy: true } => {
                StatusCode::PROXY_AUTHENTICATION_REQUIRED
            }
            Self::PlainHttp
            | Self::NoClientCertificate
            | Self::ClientCertificateRejected(_)
            | Self::NotAllowed(_)
            | Self::PasswordNotPossible
            | Self::TunnelNotAllowed(_)
            | Self::NoCertificate(_)
            | Self::TunnelFailed(_, UpstreamFailure::Redirects(_)) => StatusCode::FORBIDDEN,
            Self::TooManyTunnels | Self::TooManySessions(_) | Self::TooManyPasswordChecks => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::TunnelFailed(_, UpstreamFailure::Timeout | UpstreamFailure::ConnectTimeout) => {
                StatusCode::GATEWAY_TIMEOUT
            }
            Self::TunnelFailed(..) => StatusCode::BAD_GATEWAY,
            Self::ReadOnly(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::UnknownUpstream(_) => StatusCode::NOT_FOUND,
        }
    }

    /// Error code of the distribution specification.
    pub(super) fn code(&self) -> ErrorCode {
        match self {
            Self::Malformed(malformed) => malformed.code(),
            Self::Unauthenticated | Self::ProxyUnauthenticated | Self::PasswordTooLong { .. } => {
                ErrorCode::Unauthorized
            }
            Self::PlainHttp
            | Self::NoClientCertificate
            | Self::ClientCertificateRejected(_)
            | Self::NotAllowed(_)
            | Self::PasswordNotPossible
            | Self::TunnelNotAllowed(_)
            | Self::NoCertificate(_)
            | Self::TunnelFailed(_, UpstreamFailure::Redirects(_)) => ErrorCode::Denied,
            Self::TooManyTunnels
            | Self::TooManySessions(_)
            | Self::TooManyPasswordChecks
            | Self::TunnelFailed(..)
            | Self::Loop => ErrorCode::Unavailable,
            Self::UnknownUpstream(_) => ErrorCode::NameUnknown,
            Self::NsNotAHost(_) | Self::ConflictingUpstreams { .. } => ErrorCode::NameInvalid,
            Self::ReadOnly(_)
            | Self::Query(_)
            | Self::Accept(_)
            | Self::InvalidHost
            | Self::Misdirected
            | Self::Framing
            | Self::BodyTooLarge(_)
            | Self::BodyTimeout(_)
            | Self::BodyIncomplete => ErrorCode::Unsupported,
        }
    }

    /// Name in the log and the metrics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Malformed(RequestError::Write { .. }) | Self::ReadOnly(_) => "write",
            Self::Malformed(_) | Self::Query(_) | Self::Accept(_) | Self::NsNotAHost(_) => "malformed",
            Self::ConflictingUpstreams { .. } => "two-upstreams",
            Self::InvalidHost => "bad-host",
            Self::Misdirected => "misdirected",
            Self::Framing => "bad-framing",
            Self::Loop => "loop",
            Self::BodyTooLarge(_) => "body-too-large",
            Self::BodyTimeout(_) => "body-timeout",
            Self::BodyIncomplete => "body-incomplete",
            Self::PlainHttp => "plain-http",
            Self::TunnelNotAllowed(_) => "tunnel-not-allowed",
            Self::TooManyTunnels => "too-many-tunnels",
            Self::TooManySessions(_) => "too-many-sessions",
            Self::TunnelFailed(..) => "tunnel-failed",
            Self::NoCertificate(_) => "no-certificate",
            Self::Unauthenticated => "unauthenticated",
            Self::ProxyUnauthenticated => "proxy-unauthenticated",
            Self::PasswordTooLong { .. } => "password-too-long",
            Self::NoClientCertificate => "no-client-certificate",
            Self::ClientCertificateRejected(_) => "client-certificate",
            Self::TooManyPasswordChecks => "too-many-password-checks",
            Self::NotAllowed(_) => "not-allowed",
            Self::PasswordNotPossible => "password-not-possible",
            Self::UnknownUpstream(_) => "unknown-upstream",
        }
    }

    /// Whether the connection must be closed, because the boundary of the next request is not certain.
    pub(super) fn closes_connection(&self) -> bool {
        matches!(
            self,
            Self::Framing
                | Self::BodyTooLarge(_)
                | Self::BodyTimeout(_)
                | Self::BodyIncomplete
                | Self::InvalidHost
        )
    }
}
