//! The front gate: a request is understood whole, or turned away before anything else runs and any upstream is asked.
//!
//! hyper reads HTTP; what it lets through and a cache may not (two framings of one body, two hosts, a host that is not
//! the one asked for) ends here, because the parts that follow take every request to mean one thing.

use std::sync::Arc;
use std::time::SystemTime;

use http::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, RANGE, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};

use super::door::{Door, Doors, Peer, in_full, is_absolute, name_of};
use crate::oci::accept::AcceptError;
use crate::oci::path;
use crate::oci::query::{Query, QueryError};
use crate::oci::{Accept, Endpoint, ErrorCode, RangeRequest, Repository, RequestError, UpstreamFailure};
use crate::proxy::invalidation::{WriteEffect, WriteSnapshot};
use crate::proxy::{Request, UpstreamRegistry, is_local_token};
use crate::queue;
use crate::trace_context::TraceContext;
use crate::upstream::origin::Origin;

/// The largest body of a request that needs none; more is not read but answered with 413.
const IDLE_BODY_BYTES_MAX: u64 = 64 * 1024;

/// `:` in base64.
const LONE_COLON: &str = "Og==";

/// Why a request was turned away.
#[derive(Debug, thiserror::Error)]
pub(super) enum Turned {
    /// Not a request of the distribution specification.
    #[error("{0}")]
    RequestError(#[from] RequestError),
    /// The query cannot be read.
    #[error("{0}")]
    Query(#[from] QueryError),
    /// The `Accept` lines cannot be read.
    #[error("{0}")]
    Accept(#[from] AcceptError),
    /// RFC 9112 §3.2: exactly one `Host`.
    #[error("a request needs exactly one Host header")]
    Host,
    /// The hosts named by the connection (`CONNECT`, the server name in TLS) and by the request are not one.
    #[error("the connection, the request's target and its Host header name different hosts")]
    Misdirected,
    /// RFC 9112 §6.1: two framings of one body are an attack, and nothing that is read needs a chunked body.
    #[error(
        "a request with Transfer-Encoding is not accepted: nothing that is read here needs a chunked body"
    )]
    Framing,
    /// A body where none is needed.
    #[error("the body of a {0} request may not exceed 64 KiB")]
    Body(Method),
    /// Plain HTTP from where it is not accepted.
    #[error("plain HTTP is accepted from loopback only; use https://, or set listen.plain_http = \"any\"")]
    Plain,
    /// Nothing but TLS to an upstream, or to a host that is allowed, passes by `CONNECT`.
    #[error(
        "CONNECT to {0} is not allowed: it is no configured upstream; name it in [connect] tunnel if clients need it"
    )]
    NoTunnel(String),
    /// As many tunnels as there may be.
    #[error("as many tunnels are open as `tunnels_max` allows")]
    TunnelsBusy,
    /// The host cannot be reached, or not there.
    #[error("no tunnel to {0}: the host {1}")]
    TunnelFailed(String, UpstreamFailure),
    /// An upstream's own name cannot be served.
    #[error("{0}")]
    NoCertificate(String),
    /// No user of ours.
    #[error("this cache wants a user name and a password of its own; log in with: docker login")]
    Unauthenticated,
    /// The same, asked for by `CONNECT`.
    #[error(
        "this cache wants a user name and a password of its own before it is a proxy, as in \
         HTTPS_PROXY=https://user:password@cache:5000"
    )]
    ProxyUnauthenticated,
    /// A password of which bcrypt would not read all.
    #[error(
        "the password is longer than 72 bytes, and bcrypt reads no more than 72: it is refused, not cut. Set a shorter one, \
         as by: htpasswd -B FILE USER"
    )]
    PasswordTooLong {
        /// Whether it was shown in `Proxy-Authorization`.
        to_proxy: bool,
    },
    /// Only certificates open, and there is none.
    #[error(
        "this cache wants a client certificate, and so https://, of a CA that is named in its [access] client_ca; there \
         is none on this connection"
    )]
    NoClientCertificate,
    /// The certificate of this connection does not open any more.
    #[error("the client certificate of this connection is refused: {0}")]
    ClientCertificate(String),
    /// Too many passwords wait to be checked.
    #[error("too many passwords wait to be checked; try again")]
    EntryBusy,
    /// A user who may not pull this.
    #[error("you may not pull {0} through this cache")]
    NotAllowed(String),
    /// By an upstream's own name, where the credential would be the upstream's.
    #[error(
        "this cache has users of its own, and a password cannot be shown here: `Authorization` is the registry's. Name the \
         registry by the cache's own address (a mirror, ?ns= or a path prefix), come by HTTPS_PROXY with user and password, \
         or with a client certificate, where it takes them"
    )]
    NotByThisDoor,
    /// The registry of the upstream is another one's.
    #[error(
        "{0} is read through a project of another registry (its `repository_prefix`), and that is not where a push to {0} \
         belongs; push to the registry itself"
    )]
    ReadOnly(String),
    /// `?ns=` is no host.
    #[error(
        "ns names a registry by its host, as in ns=ghcr.io or ns=registry.example.org:5000; `{0}` is not a host"
    )]
    NoHostInNs(String),
    /// `?ns=` and another part of the request name different registries.
    #[error(
        "ns names `{namespace}`, and {at} names `{name}`: a request means one registry. For a repository of {namespace} that \
         begins with a registry's name, write both into the path, as in /v2/{namespace}/{name}/..., or leave one of them out"
    )]
    TwoUpstreams {
        /// The other part of the request.
        at: &'static str,
        /// The upstream there.
        name: String,
        /// What `ns` names.
        namespace: String,
    },
    /// `?ns=` names no configured upstream. No connection is made: otherwise this would be an open proxy.
    #[error("`{0}` is not a configured upstream")]
    UnknownUpstream(String),
}

impl Turned {
    /// The status to answer with.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::RequestError(malformed) => malformed.status(),
            Self::Query(_)
            | Self::Accept(_)
            | Self::Host
            | Self::Framing
            | Self::NoHostInNs(_)
            | Self::TwoUpstreams { .. } => StatusCode::BAD_REQUEST,
            Self::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Self::Body(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unauthenticated | Self::PasswordTooLong { to_proxy: false } => StatusCode::UNAUTHORIZED,
            Self::ProxyUnauthenticated | Self::PasswordTooLong { to_proxy: true } => {
                StatusCode::PROXY_AUTHENTICATION_REQUIRED
            }
            Self::Plain
            | Self::NoClientCertificate
            | Self::ClientCertificate(_)
            | Self::NotAllowed(_)
            | Self::NotByThisDoor
            | Self::NoTunnel(_)
            | Self::NoCertificate(_)
            | Self::TunnelFailed(_, UpstreamFailure::Redirects(_)) => StatusCode::FORBIDDEN,
            Self::TunnelsBusy | Self::EntryBusy => StatusCode::SERVICE_UNAVAILABLE,
            Self::TunnelFailed(_, UpstreamFailure::Timeout | UpstreamFailure::ConnectTimeout) => {
                StatusCode::GATEWAY_TIMEOUT
            }
            Self::TunnelFailed(..) => StatusCode::BAD_GATEWAY,
            Self::ReadOnly(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::UnknownUpstream(_) => StatusCode::NOT_FOUND,
        }
    }

    /// The code of the distribution specification.
    pub(super) fn code(&self) -> ErrorCode {
        match self {
            Self::RequestError(malformed) => malformed.code(),
            Self::Unauthenticated | Self::ProxyUnauthenticated | Self::PasswordTooLong { .. } => {
                ErrorCode::Unauthorized
            }
            Self::Plain
            | Self::NoClientCertificate
            | Self::ClientCertificate(_)
            | Self::NotAllowed(_)
            | Self::NotByThisDoor
            | Self::NoTunnel(_)
            | Self::NoCertificate(_)
            | Self::TunnelFailed(_, UpstreamFailure::Redirects(_)) => ErrorCode::Denied,
            Self::TunnelsBusy | Self::EntryBusy | Self::TunnelFailed(..) => ErrorCode::Unavailable,
            Self::UnknownUpstream(_) => ErrorCode::NameUnknown,
            Self::NoHostInNs(_) | Self::TwoUpstreams { .. } => ErrorCode::NameInvalid,
            Self::ReadOnly(_)
            | Self::Query(_)
            | Self::Accept(_)
            | Self::Host
            | Self::Misdirected
            | Self::Framing
            | Self::Body(_) => ErrorCode::Unsupported,
        }
    }

    /// The name in the log and the metrics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::RequestError(RequestError::Write { .. }) | Self::ReadOnly(_) => "write",
            Self::RequestError(_) | Self::Query(_) | Self::Accept(_) | Self::NoHostInNs(_) => "malformed",
            Self::TwoUpstreams { .. } => "two-upstreams",
            Self::Host => "bad-host",
            Self::Misdirected => "misdirected",
            Self::Framing => "bad-framing",
            Self::Body(_) => "body-too-large",
            Self::Plain => "plain-http",
            Self::NoTunnel(_) => "tunnel-not-allowed",
            Self::TunnelsBusy => "too-many-tunnels",
            Self::TunnelFailed(..) => "tunnel-failed",
            Self::NoCertificate(_) => "no-certificate",
            Self::Unauthenticated => "unauthenticated",
            Self::ProxyUnauthenticated => "proxy-unauthenticated",
            Self::PasswordTooLong { .. } => "password-too-long",
            Self::NoClientCertificate => "no-client-certificate",
            Self::ClientCertificate(_) => "client-certificate",
            Self::EntryBusy => "too-many-password-checks",
            Self::NotAllowed(_) => "not-allowed",
            Self::NotByThisDoor => "password-not-possible",
            Self::UnknownUpstream(_) => "unknown-upstream",
        }
    }

    /// Whether the connection is to be closed: what follows on it may not be what it seems.
    pub(super) fn closes(&self) -> bool {
        matches!(self, Self::Framing | Self::Body(_) | Self::Host)
    }
}

/// What a request is for.
pub(super) enum Wanted {
    /// Reading, through the cache.
    Read(Request, Door),
    /// Whether the registry itself is there and how it authenticates: it is its challenge that is asked for.
    Knock(Request, Door),
    /// Something for the registry alone, by a client that believes to speak with it.
    Pass(Passage),
    /// A token, from the service at this address.
    Login(Passage, Origin),
}

impl Wanted {
    /// Of which upstream, about which repository, and by which door.
    pub(super) fn subject(&self) -> (&Arc<UpstreamRegistry>, Option<&Repository>, Door) {
        match self {
            Self::Read(request, door) | Self::Knock(request, door) => {
                (&request.registry, request.endpoint.repository(), *door)
            }
            Self::Pass(passage) | Self::Login(passage, _) => (
                &passage.upstream_registry,
                passage.repository.as_ref(),
                passage.door,
            ),
        }
    }
}

/// A request that is handed on to the registry.
pub(super) struct Passage {
    pub(super) upstream_registry: Arc<UpstreamRegistry>,
    pub(super) door: Door,
    /// Where its path names one.
    pub(super) repository: Option<Repository>,
    /// The repositories from which it mounts a blob.
    pub(super) sources: Vec<Repository>,
    /// Whether its path may be about a repository that cannot be read from it.
    pub(super) is_unclear: bool,
    /// The token service, if it is for that one's host.
    pub(super) beside: Option<Origin>,
    /// Where the client thinks it is.
    pub(super) base: String,
    /// What will be different at the registry.
    pub(super) change: Option<WriteEffect>,
}

/// Reads a request's head.
pub(super) fn read(
    head: &Parts,
    peer: &Peer,
    doors: &Doors,
    (now, trace): (SystemTime, &TraceContext),
) -> Result<Wanted, Turned> {
    let host = host(head, peer.secure)?;
    let intercepted = doors.intercepted(host.as_ref(), is_absolute(head), peer)?;
    let passes = intercepted.is_some() && is_write(&head.method);
    framing(head, passes)?;
    if !peer.may_speak {
        return Err(Turned::Plain);
    }
    path::check(head.uri.path()).map_err(RequestError::from)?;
    let Some((upstream_registry, door)) = intercepted else {
        let (upstream_registry, endpoint, door) = doors.open(head)?;
        return Ok(Wanted::Read(
            request(head, upstream_registry, endpoint, (now, trace, peer))?,
            door,
        ));
    };
    // The host is the registry's own, so a prefix is part of a repository's name.
    let upstream_registry = Arc::clone(upstream_registry);
    let name = host
        .as_ref()
        .and_then(|host| name_of(host, peer.secure))
        .unwrap_or_default();
    if let Some(realm) = doors.realm_at(&name, &upstream_registry).cloned() {
        let asks = matches!(head.method, Method::GET | Method::POST) && head.uri.path() == realm.path();
        if asks || doors.named(&name).is_none() {
            let passage = pass(head, upstream_registry, door, host.as_ref(), peer)?;
            return Ok(if asks {
                Wanted::Login(passage, realm)
            } else {
                Wanted::Pass(Passage {
                    beside: Some(realm),
                    change: None,
                    ..passage
                })
            });
        }
    }
    let endpoint = match Endpoint::parse(&head.method, head.uri.path(), head.uri.query()) {
        Ok(endpoint) => endpoint,
        Err(RequestError::Path | RequestError::Write { .. }) => {
            return pass(head, upstream_registry, door, host.as_ref(), peer).map(Wanted::Pass);
        }
        Err(malformed) => return Err(malformed.into()),
    };
    if endpoint.repository().is_none() {
        // A login asks whether its credential is right, which only the registry knows.
        let shown = head.headers.get(AUTHORIZATION);
        if shown.is_some_and(|shown| !is_local_token(shown)) {
            return pass(head, upstream_registry, door, host.as_ref(), peer).map(Wanted::Pass);
        }
        return Ok(Wanted::Knock(
            request(head, upstream_registry, endpoint, (now, trace, peer))?,
            door,
        ));
    }
    doors.agree(&upstream_registry, head.uri.query())?;
    let endpoint = in_full(&upstream_registry, endpoint)?;
    let mut request = request(head, upstream_registry, endpoint, (now, trace, peer))?;
    // Who pushes asks so which layers the registry has already; who pulls has no need to.
    request.for_push = request.head && matches!(request.endpoint, Endpoint::Blob { .. });
    Ok(Wanted::Read(request, door))
}

fn request(
    head: &Parts,
    upstream_registry: Arc<UpstreamRegistry>,
    endpoint: Endpoint,
    (now, trace, peer): (SystemTime, &TraceContext, &Peer),
) -> Result<Request, Turned> {
    let writes = endpoint
        .repository()
        .map_or_else(WriteSnapshot::default, |repository| {
            upstream_registry.writes(repository)
        });
    Ok(Request {
        registry: upstream_registry,
        endpoint,
        head: head.method == Method::HEAD,
        accept: Accept::read(&head.headers)?,
        authorization: authorization(&head.headers),
        now,
        writes,
        for_push: false,
        trace: trace.clone(),
        peer: queue::Peer::of(peer.address),
        range: RangeRequest::read(head.headers.get(RANGE)),
        needs_length: head.version <= Version::HTTP_10,
    })
}

fn pass(
    head: &Parts,
    upstream_registry: Arc<UpstreamRegistry>,
    door: Door,
    host: Option<&Authority>,
    peer: &Peer,
) -> Result<Passage, Turned> {
    let is_known = is_write(&head.method) || matches!(head.method, Method::GET | Method::HEAD);
    if !is_known {
        return Err(RequestError::Method.into());
    }
    let path = head.uri.path();
    // A path that climbs could leave the part of its host that is this registry.
    if path.split('/').any(|part| matches!(part, "." | "..")) || path.to_ascii_lowercase().contains("%2e") {
        return Err(RequestError::Path.into());
    }
    // Only what names no repository means the same there.
    let is_elsewhere = || {
        upstream_registry
            .upstream()
            .repository_prefixes()
            .any(|prefix| prefix.is_some())
    };
    let names_one = path.strip_prefix("/v2/").is_some_and(|rest| !rest.is_empty());
    if names_one && is_elsewhere() {
        return Err(Turned::ReadOnly(upstream_registry.name().to_owned()));
    }
    let scheme = if peer.secure { "https" } else { "http" };
    let repository = repository_in(path).and_then(|named| upstream_registry.full_name(named).ok());
    let sources = if head.method == Method::POST && names_one {
        mounted_from(head, &upstream_registry)?
    } else {
        Vec::new()
    };
    Ok(Passage {
        is_unclear: repository.is_none() && may_name_one(path),
        repository,
        sources,
        upstream_registry,
        door,
        beside: None,
        base: format!("{scheme}://{}", host.map_or("", Authority::as_str)),
        change: WriteEffect::of(&head.method, path, head.uri.query())?,
    })
}

/// The repositories from which a blob is to be mounted (spec, end-11).
fn mounted_from(head: &Parts, upstream_registry: &UpstreamRegistry) -> Result<Vec<Repository>, Turned> {
    let named = Query::values(head.uri.query(), "from")?;
    let named = named.iter().filter(|name| !name.is_empty());
    named
        .map(|name| {
            let source = name
                .parse()
                .and_then(|source| upstream_registry.full_name(source));
            source.map_err(|error| RequestError::Repository(error).into())
        })
        .collect()
}

/// Whether a path may be about a repository, of an endpoint that is unknown here. No repository's name begins with `_`, and
/// one component alone is a repository without an endpoint.
fn may_name_one(path: &str) -> bool {
    path.strip_prefix("/v2/")
        .is_some_and(|rest| !rest.starts_with('_') && rest.contains('/'))
}

/// The repository that a path of the distribution specification is about, of whatever endpoint. That of an extension begins
/// with `_`.
fn repository_in(path: &str) -> Option<Repository> {
    const ENDPOINTS: [&str; 5] = ["/blobs/", "/manifests/", "/tags/", "/referrers/", "/_"];
    let path = path.strip_prefix("/v2/")?;
    let end = ENDPOINTS
        .iter()
        .filter_map(|endpoint| path.rfind(endpoint))
        .max()?;
    path.get(..end)?.parse().ok()
}

fn is_write(method: &Method) -> bool {
    matches!(
        *method,
        Method::POST | Method::PUT | Method::PATCH | Method::DELETE
    )
}

/// RFC 9112 §6: one framing of the body, and where nothing needs one, none to speak of.
fn framing(head: &Parts, passes: bool) -> Result<(), Turned> {
    let mut codings = head.headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => {}
        // hyper has dropped a Content-Length beside it, so that the two together can no longer be told from one alone;
        // what is handed on is framed anew, and the connection ends with the answer (§6.3), so that nothing is hidden
        // behind the body.
        (Some(coding), None) if passes && coding.as_bytes().eq_ignore_ascii_case(b"chunked") => {}
        _ => return Err(Turned::Framing),
    }
    let length = head.headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if !passes && length.is_some_and(|length| length > IDLE_BODY_BYTES_MAX) {
        return Err(Turned::Body(head.method.clone()));
    }
    Ok(())
}

/// Whether the connection must end with the answer to this request, because where its body ends is a matter of opinion.
pub(super) fn ends_connection(head: &Parts) -> bool {
    head.version < Version::HTTP_2 && head.headers.contains_key(TRANSFER_ENCODING)
}

/// Exactly one host, however the request names it; none only in HTTP/1.0.
fn host(head: &Parts, secure: bool) -> Result<Option<Authority>, Turned> {
    let mut lines = head.headers.get_all(HOST).iter();
    match (lines.next(), lines.next(), head.uri.authority()) {
        (Some(host), None, Some(authority)) => {
            let host = named_by(host).ok_or(Turned::Host)?;
            let (host, target) = (name_of(&host, secure), name_of(authority, secure));
            if host.ok_or(Turned::Host)? == target.ok_or(Turned::Host)? {
                Ok(Some(authority.clone()))
            } else {
                Err(Turned::Misdirected)
            }
        }
        (Some(host), None, None) => named_by(host).map(Some).ok_or(Turned::Host),
        // HTTP/2 names its host in `:authority`.
        (None, _, Some(authority)) if head.version >= Version::HTTP_2 => Ok(Some(authority.clone())),
        // HTTP/1.0 knew no Host, and `ab` and health probes still speak it.
        (None, _, None) if head.version == Version::HTTP_10 => Ok(None),
        _ => Err(Turned::Host),
    }
}

/// The `Host` of a `CONNECT`, whose target is an authority in another place.
pub(super) fn host_line(head: &Parts) -> Result<Option<Authority>, Turned> {
    let mut lines = head.headers.get_all(HOST).iter();
    match (lines.next(), lines.next()) {
        (None, _) => Ok(None),
        (Some(host), None) => named_by(host).map(Some).ok_or(Turned::Host),
        _ => Err(Turned::Host),
    }
}

fn named_by(host: &HeaderValue) -> Option<Authority> {
    let host = host.to_str().ok().filter(|host| !host.contains('@'))?;
    host.parse().ok()
}

/// The client's credential. podman sends an empty one (`Og==`, a lone colon) where it has none.
fn authorization(headers: &HeaderMap) -> Option<HeaderValue> {
    let value = headers.get(AUTHORIZATION)?;
    let (scheme, credential) = value.to_str().ok()?.split_once(' ')?;
    let credential = credential.trim();
    // Not decoded: that would be a copy of a password.
    let empty = credential.is_empty() || scheme.eq_ignore_ascii_case("basic") && credential == LONE_COLON;
    if empty {
        return None;
    }
    let mut value = value.clone();
    value.set_sensitive(true);
    Some(value)
}
