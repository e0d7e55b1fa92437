//! Why a registry gave no usable answer.
//!
//! One closed list from which the log line, the metric label, `Warning` and `Cache-Status` are all made. An
//! answer we dislike (401, 403, 404) is not among them: that is an answer.

use std::fmt;

/// Why a registry gave no usable answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UpstreamFailure {
    /// Nobody listens at its address.
    ConnectionRefused,
    /// The connection broke before the answer was whole.
    ConnectionReset,
    /// No route to its address.
    Unreachable,
    /// Its name was not resolved.
    Dns,
    /// No trusted TLS connection came about.
    Tls(TlsFailure),
    /// No connection within its time limit.
    ConnectTimeout,
    /// Connected, but the answer or the next part of it did not come in time.
    Timeout,
    /// A copy is held and the time set aside for asking is used up.
    RevalidateTimeout,
    /// It failed so often that it is left alone for a while.
    BreakerOpen,
    /// It limits the rate of requests: by 429 or otherwise, or it did so and the wait is not over.
    RateLimited,
    /// It answered with a status that says nothing about the image, a 5xx for the most part.
    Status(u16),
    /// Its token service gave no token.
    TokenService,
    /// It names its token service by http, where no credential is sent.
    PlaintextRealm,
    /// The cache's own credential for it could not be had.
    CacheCredential,
    /// Its answer cannot be understood.
    Malformed,
    /// What answered in its place is no registry: a login page, a captive portal, a firewall.
    NotRegistry,
    /// Its answer is larger than the limit.
    TooLarge,
    /// It redirected too often, or to where it must not.
    Redirects(RedirectFailure),
    /// The bytes are not those of the digest.
    DigestMismatch,
    /// Its digest is not that of its bytes: docker's signed schema 1. It can only be passed on.
    Unverifiable,
    /// The operator switched asking off.
    Offline,
    /// The work was given up before its outcome was known.
    Busy,
    /// Too many requests of this client wait for it.
    ClientQueueFull,
    /// Too many requests of all clients wait for it.
    QueueFull,
}

impl UpstreamFailure {
    /// The label for metrics and `Cache-Status`; stable, and without the status number to bound their count.
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
            Self::TokenService => "token-service",
            Self::PlaintextRealm => "insecure-realm",
            Self::CacheCredential => "cache-credential",
            Self::Malformed => "malformed",
            Self::NotRegistry => "not-registry",
            Self::TooLarge => "too-large",
            Self::Redirects(_) => "redirects",
            Self::DigestMismatch => "wrong-digest",
            Self::Unverifiable => "unverifiable",
            Self::Offline => "offline",
            Self::Busy => "busy",
            Self::ClientQueueFull => "client-queue-full",
            Self::QueueFull => "queue-full",
        }
    }

    /// The upstream's setting that has to do with it.
    pub const fn setting(self) -> Option<&'static str> {
        match self {
            Self::Timeout => Some("first_byte_timeout"),
            Self::ConnectTimeout => Some("connect_timeout"),
            Self::Tls(TlsFailure::UnknownIssuer | TlsFailure::SelfSigned) => Some("ca_file"),
            Self::Tls(TlsFailure::ClientCertificate) => Some("client_certificate"),
            Self::Tls(TlsFailure::NotTls) => Some("url"),
            Self::Redirects(RedirectFailure::Downgrade | RedirectFailure::NarrowerScope) => Some("redirects"),
            _ => None,
        }
    }
}

/// Why no trusted TLS connection came about. Hosts, names and dates are told to the operator alone, beside the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsFailure {
    /// The certificate has no subject alternative name (RFC 5280 §4.2.1.6) for the host.
    WrongName,
    /// The certificate has expired.
    Expired,
    /// The certificate is not valid yet: its clock or ours is wrong.
    NotYetValid,
    /// No trusted certificate authority issued it.
    UnknownIssuer,
    /// It is signed with its own key, and is not itself trusted.
    SelfSigned,
    /// It is not one for servers (extended key usage, or a CA's).
    WrongPurpose,
    /// No protocol version and cipher suite in common.
    Version,
    /// The server wants a client certificate, or another one.
    ClientCertificate,
    /// The server does not speak TLS at that port.
    NotTls,
    /// Anything else.
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
            Self::ClientCertificate => "wants a TLS client certificate",
            Self::NotTls => "does not speak TLS at that port",
            Self::Other => "could not be trusted (TLS failed)",
        }
    }
}

/// Why a redirect is not followed. Its target is told to the operator alone, beside the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RedirectFailure {
    /// One redirect after the other.
    TooMany,
    /// No `Location`, or one that is no http(s) URL.
    Malformed,
    /// From https to plain http, and `redirects` names no such place.
    Downgrade,
    /// To an address nearer than the registry's own, and `redirects` does not name it.
    NarrowerScope,
    /// To another place, where only the same one makes sense.
    OtherHost,
}

impl RedirectFailure {
    const fn phrase(self) -> &'static str {
        match self {
            Self::TooMany => "redirected too often",
            Self::Malformed => "redirected to nowhere",
            Self::Downgrade => "redirected to plain http",
            Self::NarrowerScope => "redirected to an address that is not allowed",
            Self::OtherHost => "redirected to another host where that is not allowed",
        }
    }
}

/// The end of a sentence that begins with the upstream's name: "ghcr.io" + "refused the connection".
impl fmt::Display for UpstreamFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConnectionRefused => "refused the connection",
            Self::ConnectionReset => "broke the connection",
            Self::Unreachable => "cannot be reached",
            Self::Dns => "has a name that could not be resolved",
            Self::Tls(fault) => fault.phrase(),
            Self::ConnectTimeout => "did not take the connection in time",
            Self::Timeout => "did not answer in time",
            Self::RevalidateTimeout => "did not answer within the budget",
            Self::BreakerOpen => "failed repeatedly and is being left alone for a while",
            Self::RateLimited => "limits the rate of requests",
            Self::Status(status) => return write!(f, "answered {status}"),
            Self::TokenService => "has a token service that gave no token",
            Self::PlaintextRealm => {
                "names its token service by http://, where no credential is sent; its external URL should be https"
            }
            Self::CacheCredential => "could not be asked, for the cache's own credential could not be had",
            Self::Malformed => "gave an answer that makes no sense",
            Self::NotRegistry => {
                "gave an answer that is not a registry's (a login page, a captive portal or a firewall?)"
            }
            Self::TooLarge => "gave an answer larger than the limit",
            Self::Redirects(fault) => fault.phrase(),
            Self::DigestMismatch => "sent bytes that do not match their digest",
            Self::Unverifiable => "gave a manifest whose digest cannot be verified (docker's signed schema 1)",
            Self::Offline => "is not asked while offline mode is on",
            Self::Busy => "has too many requests of ours under way",
            Self::ClientQueueFull => "has too many requests of this client waiting for it here",
            Self::QueueFull => "has too many requests waiting for it here",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_ends_a_sentence_and_labels_a_metric() {
        for (cause, name, sentence) in [
            (
                UpstreamFailure::ConnectionRefused,
                "refused",
                "refused the connection",
            ),
            (UpstreamFailure::Status(503), "http-status", "answered 503"),
            (
                UpstreamFailure::Tls(TlsFailure::Expired),
                "tls",
                "could not be trusted: its TLS certificate has expired",
            ),
            (
                UpstreamFailure::RevalidateTimeout,
                "budget",
                "did not answer within the budget",
            ),
            (
                UpstreamFailure::ConnectTimeout,
                "connect-timeout",
                "did not take the connection in time",
            ),
        ] {
            assert_eq!((cause.name(), cause.to_string().as_str()), (name, sentence));
        }
    }
}
