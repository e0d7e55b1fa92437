//! Upstream failures: why a registry gave no usable response.
//!
//! The log line, the metric label, `Warning` and `Cache-Status` all use this closed list. 401, 403 and 404 are
//! not among them, because they are usable responses.

use std::fmt;

/// Reason why a registry gave no usable response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UpstreamFailure {
    /// No process listens at its address.
    ConnectionRefused,
    /// The connection was closed before the response was complete.
    ConnectionReset,
    /// No route to its address.
    Unreachable,
    /// Its host name could not be resolved.
    Dns,
    /// No trusted TLS connection could be established.
    Tls(TlsFailure),
    /// No connection within `connect_timeout`.
    ConnectTimeout,
    /// Connected, but the response or its next bytes did not arrive in time.
    Timeout,
    /// A cached copy exists, and the revalidation exceeded `revalidate_timeout`.
    RevalidateTimeout,
    /// Its circuit breaker is open after repeated failures.
    BreakerOpen,
    /// It limits the request rate, by 429 or otherwise, or its `Retry-After` has not passed yet.
    RateLimited,
    /// It responded with a status that does not concern the image, mostly a 5xx.
    Status(u16),
    /// It sent the request back to this cache (508).
    Loop,
    /// Its token service issued no token.
    TokenService,
    /// Its challenge names a token service at an `http://` URL, where no credential is sent.
    InsecureRealm,
    /// The cache's own credential for it is unavailable.
    CacheCredential,
    /// Its response is malformed.
    Malformed,
    /// The response is not a registry's, but that of a login page, a captive portal or a firewall.
    NotRegistry,
    /// Its response exceeds the size limit.
    TooLarge,
    /// It redirected too often, or to a forbidden target.
    Redirects(RedirectFailure),
    /// The bytes do not match their digest.
    DigestMismatch,
    /// The manifest is docker's signed schema 1, whose digest is not that of its bytes. So it is forwarded and not
    /// cached.
    Unverifiable,
    /// The operator switched offline mode on.
    Offline,
    /// The policy `never` forbids requests to it, and the shared storage has failed.
    PolicyNever,
    /// The request was abandoned before its result was known.
    Abandoned,
    /// Too many requests of this client are queued for it.
    ClientQueueFull,
    /// Too many requests of all clients are queued for it.
    QueueFull,
}

impl UpstreamFailure {
    /// Label in the metrics and `Cache-Status`. Stable. It omits the status number of [`Self::Status`], because each
    /// value of a label is a time series of its own.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ConnectionRefused => "connection-refused",
            Self::ConnectionReset => "connection-reset",
            Self::Unreachable => "unreachable",
            Self::Dns => "dns",
            Self::Tls(_) => "tls",
            Self::ConnectTimeout => "connect-timeout",
            Self::Timeout => "timeout",
            Self::RevalidateTimeout => "revalidate-timeout",
            Self::BreakerOpen => "breaker-open",
            Self::RateLimited => "rate-limited",
            Self::Status(_) => "http-status",
            Self::Loop => "loop",
            Self::TokenService => "token-service",
            Self::InsecureRealm => "insecure-realm",
            Self::CacheCredential => "cache-credential",
            Self::Malformed => "malformed",
            Self::NotRegistry => "not-registry",
            Self::TooLarge => "too-large",
            Self::Redirects(_) => "redirects",
            Self::DigestMismatch => "digest-mismatch",
            Self::Unverifiable => "unverifiable",
            Self::Offline => "offline",
            Self::PolicyNever => "policy-never",
            Self::Abandoned => "abandoned",
            Self::ClientQueueFull => "client-queue-full",
            Self::QueueFull => "queue-full",
        }
    }

    /// The upstream setting that can prevent this failure.
    pub const fn setting(self) -> Option<&'static str> {
        match self {
            Self::Timeout => Some("first_byte_timeout"),
            Self::ConnectTimeout => Some("connect_timeout"),
            Self::Tls(TlsFailure::UnknownIssuer | TlsFailure::SelfSigned) => Some("ca_file"),
            Self::Tls(TlsFailure::ClientCertificate) => Some("client_certificate"),
            Self::Tls(TlsFailure::NotTls) | Self::Loop => Some("url"),
            Self::Redirects(RedirectFailure::Downgrade | RedirectFailure::NarrowerScope) => Some("redirects"),
            _ => None,
        }
    }
}

/// Reason why no trusted TLS connection was established. Hosts, names and dates go to the log only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsFailure {
    /// The certificate has no subject alternative name (RFC 5280 §4.2.1.6) for the host.
    WrongName,
    /// The certificate has expired.
    Expired,
    /// The certificate is not valid yet, or the local clock is slow.
    NotYetValid,
    /// No trusted certificate authority issued it.
    UnknownIssuer,
    /// It is self-signed and not trusted itself.
    SelfSigned,
    /// It is not a server certificate (extended key usage, or a CA's).
    WrongPurpose,
    /// No common protocol version and cipher suite.
    Version,
    /// The server requires a client certificate, or another one.
    ClientCertificate,
    /// The port does not speak TLS.
    NotTls,
    /// Any other TLS failure.
    Other,
}

impl TlsFailure {
    const fn phrase(self) -> &'static str {
        match self {
            Self::WrongName => "could not be trusted: its TLS certificate is for another name",
            Self::Expired => "could not be trusted: its TLS certificate has expired",
            Self::NotYetValid => "could not be trusted: its TLS certificate is not valid yet",
            Self::UnknownIssuer => "could not be trusted: an unknown authority issued its TLS certificate",
            Self::SelfSigned => "could not be trusted: its TLS certificate is self-signed",
            Self::WrongPurpose => "could not be trusted: its TLS certificate is not one for servers",
            Self::Version => "offers no TLS version and cipher suite that is accepted here",
            Self::ClientCertificate => "requires a TLS client certificate",
            Self::NotTls => "does not speak TLS at that port",
            Self::Other => "could not be trusted (TLS failed)",
        }
    }
}

/// Reason why a redirect is not followed. Its target goes to the log only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RedirectFailure {
    /// Too many redirects in a row.
    TooMany,
    /// No `Location`, or one that is not an http(s) URL.
    Malformed,
    /// From https to plain http, which `redirects` does not allow for that target.
    Downgrade,
    /// To an address of a narrower scope than the registry's, for example from a public to a private one, which
    /// `redirects` does not allow.
    NarrowerScope,
    /// To another host, in a case where only the same host is allowed.
    OtherHost,
}

impl RedirectFailure {
    const fn phrase(self) -> &'static str {
        match self {
            Self::TooMany => "redirected too often",
            Self::Malformed => "redirected without a valid Location",
            Self::Downgrade => "redirected to plain http",
            Self::NarrowerScope => "redirected to an address that is not allowed",
            Self::OtherHost => "redirected to another host where that is not allowed",
        }
    }
}

/// Predicate of a sentence that begins with the upstream's name: "ghcr.io" + "refused the connection".
impl fmt::Display for UpstreamFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConnectionRefused => "refused the connection",
            Self::ConnectionReset => "broke the connection",
            Self::Unreachable => "cannot be reached",
            Self::Dns => "has a name that could not be resolved",
            Self::Tls(fault) => fault.phrase(),
            Self::ConnectTimeout => "did not accept the connection in time",
            Self::Timeout => "did not respond in time",
            Self::RevalidateTimeout => "did not respond within `revalidate_timeout`",
            Self::BreakerOpen => "failed repeatedly, so its circuit breaker is open",
            Self::RateLimited => "limits the rate of requests",
            Self::Status(status) => return write!(f, "responded with status {status}"),
            Self::Loop => "leads back to this cache, directly or through other caches",
            Self::TokenService => "has a token service that issued no token",
            Self::InsecureRealm => {
                "has a token service at an http:// URL, where no credential is sent (its external URL should be https)"
            }
            Self::CacheCredential => "could not be contacted, because the cache's own credential is unavailable",
            Self::Malformed => "sent a malformed response",
            Self::NotRegistry => {
                "sent a response that is not a registry's (a login page, a captive portal or a firewall?)"
            }
            Self::TooLarge => "sent a response larger than the limit",
            Self::Redirects(fault) => fault.phrase(),
            Self::DigestMismatch => "sent bytes that do not match their digest",
            Self::Unverifiable => "sent a manifest whose digest cannot be verified (docker's signed schema 1)",
            Self::Offline => "is not contacted in offline mode",
            Self::PolicyNever => "is not contacted under the policy `never`",
            Self::Abandoned => "did not respond before the request was abandoned",
            Self::ClientQueueFull => "has too many queued requests of this client",
            Self::QueueFull => "has too many queued requests",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_has_a_phrase_and_a_label() {
        for (cause, name, sentence) in [
            (
                UpstreamFailure::ConnectionRefused,
                "connection-refused",
                "refused the connection",
            ),
            (
                UpstreamFailure::Status(503),
                "http-status",
                "responded with status 503",
            ),
            (
                UpstreamFailure::Tls(TlsFailure::Expired),
                "tls",
                "could not be trusted: its TLS certificate has expired",
            ),
            (
                UpstreamFailure::RevalidateTimeout,
                "revalidate-timeout",
                "did not respond within `revalidate_timeout`",
            ),
            (
                UpstreamFailure::ConnectTimeout,
                "connect-timeout",
                "did not accept the connection in time",
            ),
        ] {
            assert_eq!((cause.name(), cause.to_string().as_str()), (name, sentence));
        }
    }
}
