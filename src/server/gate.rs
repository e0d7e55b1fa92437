//! The front gate: a request is understood whole, or turned away before anything else runs and any upstream is asked.
//!
//! hyper reads HTTP; what it lets through and a cache may not (two framings of one body, two hosts, a host that is not
//! the one asked for) ends here, because the parts that follow take every request to mean one thing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};

use crate::oci::accept::AcceptError;
use crate::oci::query::{Query, QueryError};
use crate::oci::{Accept, ErrorCode, Malformed, Operation, Repository};
use crate::pull::{Request, Site};

/// The largest body of a request that needs none; more is not read but answered with 413.
const IDLE_BODY_BYTES_MAX: u64 = 64 * 1024;

/// Where a connection comes from, as far as it matters to the gate.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Whether this peer may speak on this connection as it is: over TLS, or plain from where that is allowed.
    pub may_speak: bool,
}

/// The upstreams there are, and how a client names them.
pub struct Doors {
    by_name: HashMap<String, Arc<Site>>,
    all: Vec<Arc<Site>>,
    default: Arc<Site>,
}

impl Doors {
    /// `sites` with the further names each is known by; `default` is meant where a client names none.
    pub fn new(sites: Vec<(Arc<Site>, Vec<String>)>, default: Arc<Site>) -> Self {
        let mut by_name = HashMap::new();
        let mut all = Vec::new();
        for (site, names) in sites {
            by_name.insert(site.name().to_owned(), Arc::clone(&site));
            for name in names {
                by_name.insert(name, Arc::clone(&site));
            }
            all.push(site);
        }
        Self {
            by_name,
            all,
            default,
        }
    }

    /// The upstream of this name.
    pub fn named(&self, name: &str) -> Option<&Arc<Site>> {
        self.by_name.get(name)
    }

    /// Every upstream.
    pub fn all(&self) -> &[Arc<Site>] {
        &self.all
    }

    /// The upstream meant by a client that names none.
    pub fn default_site(&self) -> &Arc<Site> {
        &self.default
    }

    /// Docker Hub has no namespace with a dot, so such a first component is the name of another registry.
    fn is_foreign(&self, repository: &Repository) -> bool {
        let first = repository.first_component();
        self.default.is_hub()
            && !repository.is_one_component()
            && (first.contains('.') || first == "localhost")
    }

    /// Through which door the client came: `?ns=`, a path that begins with an upstream's name, or the mirror.
    fn open(
        &self,
        operation: Operation,
        namespace: Option<String>,
    ) -> Result<(Arc<Site>, Operation), Turned> {
        let Some(repository) = operation.repository().cloned() else {
            return Ok((Arc::clone(&self.default), operation));
        };
        let (site, repository) = if let Some(name) = namespace {
            match self.named(&name) {
                Some(site) => (site, repository),
                None => return Err(Turned::UnknownUpstream(name)),
            }
        } else {
            let prefixed = self.named(repository.first_component()).and_then(|site| {
                repository
                    .strip_prefix(repository.first_component())
                    .map(|rest| (site, rest))
            });
            match prefixed {
                Some(prefixed) => prefixed,
                None if self.is_foreign(&repository) => {
                    return Err(Turned::UnknownUpstream(repository.first_component().to_owned()));
                }
                None => (&self.default, repository),
            }
        };
        let repository = site
            .full_name(repository)
            .map_err(|error| Turned::Malformed(Malformed::Repository(error)))?;
        Ok((Arc::clone(site), operation.with_repository(repository)))
    }
}

/// Why a request was turned away.
#[derive(Debug, thiserror::Error)]
pub(super) enum Turned {
    /// Not a request of the distribution specification.
    #[error("{0}")]
    Malformed(#[from] Malformed),
    /// The query cannot be read.
    #[error("{0}")]
    Query(#[from] QueryError),
    /// The `Accept` lines cannot be read.
    #[error("{0}")]
    Accept(#[from] AcceptError),
    /// RFC 9112 §3.2: exactly one `Host`.
    #[error("a request needs exactly one Host header")]
    Host,
    /// The host asked for is not the host named.
    #[error("the request's target and its Host header name different hosts")]
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
    #[error("plain HTTP is accepted from loopback only; use https://, or set listen.plain = \"any\"")]
    Plain,
    /// `?ns=` names no configured upstream. No connection is made: otherwise this would be an open proxy.
    #[error("`{0}` is not a configured upstream")]
    UnknownUpstream(String),
}

impl Turned {
    /// The status to answer with.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(malformed) => malformed.status(),
            Self::Query(_) | Self::Accept(_) | Self::Host | Self::Framing => StatusCode::BAD_REQUEST,
            Self::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Self::Body(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Plain => StatusCode::FORBIDDEN,
            Self::UnknownUpstream(_) => StatusCode::NOT_FOUND,
        }
    }

    /// The code of the distribution specification.
    pub(super) fn code(&self) -> ErrorCode {
        match self {
            Self::Malformed(malformed) => malformed.code(),
            Self::Plain => ErrorCode::Denied,
            Self::UnknownUpstream(_) => ErrorCode::NameUnknown,
            Self::Query(_)
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
            Self::Malformed(Malformed::Write { .. }) => "write",
            Self::Malformed(_) | Self::Query(_) | Self::Accept(_) => "malformed",
            Self::Host | Self::Misdirected => "host",
            Self::Framing => "framing",
            Self::Body(_) => "body",
            Self::Plain => "plain",
            Self::UnknownUpstream(_) => "unknown-upstream",
        }
    }

    /// Whether the connection is to be closed: what follows on it may not be what it seems.
    pub(super) fn closes(&self) -> bool {
        matches!(self, Self::Framing | Self::Body(_) | Self::Host)
    }
}

/// Reads a request's head.
pub(super) fn read(head: &Parts, peer: Peer, doors: &Doors, now: SystemTime) -> Result<Request, Turned> {
    framing(head)?;
    host(head)?;
    if !peer.may_speak {
        return Err(Turned::Plain);
    }
    let operation = Operation::parse(&head.method, head.uri.path(), head.uri.query())?;
    let (_, namespace) = Query::parse(head.uri.query())?;
    let (site, operation) = doors.open(operation, namespace)?;
    Ok(Request {
        site,
        operation,
        head: head.method == Method::HEAD,
        accept: Accept::read(&head.headers)?,
        authorization: authorization(&head.headers),
        now,
    })
}

fn framing(head: &Parts) -> Result<(), Turned> {
    let lengths = head.headers.get(CONTENT_LENGTH);
    // hyper has dropped a Content-Length beside it, so that the two together can no longer be told from one alone.
    if head.headers.contains_key(TRANSFER_ENCODING) {
        return Err(Turned::Framing);
    }
    let length = lengths.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > IDLE_BODY_BYTES_MAX) {
        return Err(Turned::Body(head.method.clone()));
    }
    Ok(())
}

/// Exactly one host, however the request names it.
fn host(head: &Parts) -> Result<(), Turned> {
    let mut lines = head.headers.get_all(HOST).iter();
    match (lines.next(), lines.next(), head.uri.authority()) {
        (Some(host), None, Some(authority)) => {
            if host
                .as_bytes()
                .eq_ignore_ascii_case(authority.as_str().as_bytes())
            {
                Ok(())
            } else {
                Err(Turned::Misdirected)
            }
        }
        (Some(host), None, None) if names_a_host(host) => Ok(()),
        // HTTP/2 names its host in `:authority`.
        (None, _, Some(_)) if head.version >= Version::HTTP_2 => Ok(()),
        // HTTP/1.0 knew no Host, and `ab` and health probes still speak it.
        (None, _, None) if head.version == Version::HTTP_10 => Ok(()),
        _ => Err(Turned::Host),
    }
}

fn names_a_host(host: &HeaderValue) -> bool {
    host.to_str()
        .is_ok_and(|host| !host.contains('@') && host.parse::<Authority>().is_ok())
}

/// The client's credential. podman sends an empty one (`Og==`, a lone colon) where it has none.
fn authorization(headers: &HeaderMap) -> Option<HeaderValue> {
    let value = headers.get(AUTHORIZATION)?;
    let (scheme, credential) = value.to_str().ok()?.split_once(' ')?;
    let credential = credential.trim();
    let empty = credential.is_empty()
        || scheme.eq_ignore_ascii_case("basic")
            && base64::engine::general_purpose::STANDARD
                .decode(credential)
                .is_ok_and(|plain| plain == b":");
    if empty {
        return None;
    }
    let mut value = value.clone();
    value.set_sensitive(true);
    Some(value)
}
