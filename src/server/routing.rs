//! Routing: the upstream that a request is for.
//!
//! A connection may name a host before any request (`CONNECT`, TLS server name), and each request names one (`Host`,
//! `:authority`, absolute-form target). All of them must agree. Otherwise a request could be authorized for one
//! upstream and served from another. Later code does not depend on the route.

use std::borrow::Cow;
use std::sync::Arc;

use http::Version;
use http::uri::Authority;

use super::auth::PeerCredentials;
use super::connections::Handle;
use super::error::Rejection;
use super::idle_timeout::IdlePause;
use super::sendfile::SendfileQueue;
use crate::config::{canonical, host_part};
use crate::fast_map::FastMap;
use crate::oci::query::Query;
use crate::oci::{Endpoint, Repository, RequestError};
use crate::proxy::UpstreamRegistry;
use crate::telemetry::LastAgent;
use crate::upstream::origin::Origin;

/// How the client named the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// No upstream named: the default one.
    Mirror,
    /// The `?ns=` query parameter.
    Namespace,
    /// The first component of the path.
    Prefix,
    /// The host of the request is that of an upstream, whose name resolves to the cache.
    Host,
    /// As [`Self::Host`], inside a `CONNECT`.
    Connect,
}

impl RouteKind {
    /// The name in the log and the metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::Namespace => "ns",
            Self::Prefix => "prefix",
            Self::Host => "host",
            Self::Connect => "connect",
        }
    }
}

/// Properties of a connection before any request.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Its IP address. `None` for a unix socket.
    pub address: Option<std::net::IpAddr>,
    /// Whether HTTP is accepted on this connection: over TLS, or plain from an allowed address.
    pub http_allowed: bool,
    /// Whether it uses TLS.
    pub is_tls: bool,
    /// Server name of the TLS handshake, in lower case.
    pub server_name: Option<Arc<str>>,
    /// The canonical upstream host of its `CONNECT`.
    pub connect: Option<Arc<str>>,
    /// Credentials established for the connection.
    pub(super) credentials: PeerCredentials,
    /// Pauses the idle timeout while the client waits for an upstream.
    pub idle_pause: IdlePause,
    /// Marks requests in flight, so that the connection is not closed to make room.
    pub(super) connection: Handle,
    /// Sends file ranges without copying them. `None` over TLS, where every byte is encrypted first.
    pub(super) sendfile: Option<SendfileQueue>,
    /// The client's last `User-Agent`.
    pub(super) agent: LastAgent,
}

/// The upstreams, and the names by which clients reach them.
pub struct Router {
    by_name: FastMap<String, Arc<UpstreamRegistry>>,
    /// By token service host, for upstreams with `local_tokens`.
    by_token_service: FastMap<String, Arc<UpstreamRegistry>>,
    all: Vec<Arc<UpstreamRegistry>>,
    default: Arc<UpstreamRegistry>,
    /// Whether an upstream is at port 80, which a `Host` header may omit.
    has_port_80: bool,
}

impl Router {
    /// `sites`, each with its further names. `default` is for requests that name none.
    pub fn new(
        upstream_registries: Vec<(Arc<UpstreamRegistry>, Vec<String>)>,
        default: Arc<UpstreamRegistry>,
    ) -> Self {
        let (mut by_name, mut by_token_service) = (FastMap::default(), FastMap::default());
        let mut all = Vec::new();
        for (upstream_registry, names) in upstream_registries {
            if let Some(realm) = upstream_registry.realm() {
                by_token_service.insert(
                    lookup_key(realm.authority().as_str()),
                    Arc::clone(&upstream_registry),
                );
            }
            for name in names.iter().map(String::as_str).chain([upstream_registry.name()]) {
                by_name.insert(lookup_key(name), Arc::clone(&upstream_registry));
            }
            all.push(upstream_registry);
        }
        let mut hosts = by_name.keys().chain(by_token_service.keys());
        Self {
            has_port_80: hosts.any(|host| host.ends_with(":80")),
            by_name,
            by_token_service,
            all,
            default,
        }
    }

    /// The upstream of this name, in any spelling.
    pub fn by_name(&self, name: &str) -> Option<&Arc<UpstreamRegistry>> {
        self.by_name.get(&*canonical(name)?)
    }

    /// The upstream of this host, or whose token service is on it.
    pub(super) fn by_host(&self, host: &str) -> Option<&Arc<UpstreamRegistry>> {
        self.by_name(host).or_else(|| self.by_token_service.get(host))
    }

    /// Like [`Self::by_host`], for a `Host` header. Without TLS, port 80 may be omitted; behind a TLS-terminating load
    /// balancer, port 443.
    fn by_request_host(&self, host: &Authority, name: &str, is_tls: bool) -> Option<&Arc<UpstreamRegistry>> {
        let at_80 = || {
            let host = canonical(host.as_str())?;
            let host = host.strip_suffix(":80").unwrap_or(&host);
            self.by_name(&format!("{host}:80"))
        };
        if !is_tls && self.has_port_80 && host.port_u16() == Some(80) {
            return at_80().or_else(|| self.by_host(name));
        }
        let found = self.by_host(name);
        if is_tls || !self.has_port_80 || host.port_u16().is_some() {
            found
        } else {
            found.or_else(at_80)
        }
    }

    /// The token service of `site`, if it is on this host.
    pub(super) fn token_service_at<'a>(
        &self,
        host: &str,
        upstream_registry: &'a Arc<UpstreamRegistry>,
    ) -> Option<&'a Origin> {
        let here = self
            .by_token_service
            .get(host)
            .is_some_and(|found| Arc::ptr_eq(found, upstream_registry));
        upstream_registry.realm().filter(|_| here)
    }

    /// Every upstream.
    pub fn all(&self) -> &[Arc<UpstreamRegistry>] {
        &self.all
    }

    /// The upstream for requests that name none.
    pub fn default_registry(&self) -> &Arc<UpstreamRegistry> {
        &self.default
    }

    /// The upstream named by the host of a request (`Host`, `Connect`). `None` if the request is for the cache
    /// itself.
    pub(super) fn intercept_target(
        &self,
        host: Option<&Authority>,
        absolute: bool,
        peer: &ConnectionInfo,
    ) -> Result<Option<(&Arc<UpstreamRegistry>, RouteKind)>, Rejection> {
        let Some(host) = host else {
            // HTTP/1.0 without Host is for the cache itself, so the connection must not name an upstream.
            let named = peer.connect.is_some()
                || peer
                    .server_name
                    .as_deref()
                    .is_some_and(|name| self.is_upstream_host(name));
            return if named {
                Err(Rejection::InvalidHost)
            } else {
                Ok(None)
            };
        };
        let name = canonical_host(host, peer.is_tls).ok_or(Rejection::InvalidHost)?;
        let upstream_registry = self.by_request_host(host, &name, peer.is_tls);
        if let Some(connect) = &peer.connect {
            let server = peer.server_name.as_deref();
            if **connect != *name || server.is_some_and(|server| server != host_part(connect)) {
                return Err(Rejection::Misdirected);
            }
            return upstream_registry
                .map(|upstream_registry| Some((upstream_registry, RouteKind::Connect)))
                .ok_or_else(|| Rejection::UnknownUpstream(name.into_owned()));
        }
        if let Some(server) = peer.server_name.as_deref()
            && server != host_part(&name)
            && (upstream_registry.is_some() || self.is_upstream_host(server))
        {
            return Err(Rejection::Misdirected);
        }
        let meant_elsewhere = absolute
            || peer
                .server_name
                .as_deref()
                .is_some_and(|server| self.is_upstream_host(server));
        match upstream_registry {
            Some(upstream_registry) => Ok(Some((upstream_registry, RouteKind::Host))),
            None if meant_elsewhere => Err(Rejection::UnknownUpstream(name.into_owned())),
            None => Ok(None),
        }
    }

    /// The upstream, operation and route of a request for the cache itself: by `?ns=`, by path prefix, or the mirror.
    pub(super) fn route(
        &self,
        head: &http::request::Parts,
    ) -> Result<(Arc<UpstreamRegistry>, Endpoint, RouteKind), Rejection> {
        let (method, path, query) = (&head.method, head.uri.path(), head.uri.query());
        let (_, namespace) = Query::parse(query)?;
        let by_prefix = self.by_prefix(method, path, query);
        let Some(namespace) = namespace else {
            if let Some(by_prefix) = by_prefix {
                let (upstream_registry, endpoint) = by_prefix?;
                return Ok((
                    Arc::clone(upstream_registry),
                    with_full_name(upstream_registry, endpoint)?,
                    RouteKind::Prefix,
                ));
            }
            let endpoint = Endpoint::parse(method, path, query)?;
            if let Some(name) = endpoint.repository().and_then(|name| self.other_registry(name)) {
                return Err(Rejection::UnknownUpstream(name.to_owned()));
            }
            let upstream_registry = &self.default;
            return Ok((
                Arc::clone(upstream_registry),
                with_full_name(upstream_registry, endpoint)?,
                RouteKind::Mirror,
            ));
        };
        if canonical(&namespace).is_none() {
            return Err(Rejection::NsNotAHost(namespace));
        }
        let Some(upstream_registry) = self.by_name(&namespace) else {
            return Err(Rejection::UnknownUpstream(namespace));
        };
        // containerd appends `ns` even if the mirror path (`override_path`) names the registry already.
        let endpoint = match by_prefix.transpose()? {
            Some((other, endpoint)) if Arc::ptr_eq(upstream_registry, other) => endpoint,
            Some((other, _)) => {
                return Err(Rejection::ConflictingUpstreams {
                    at: "the path",
                    name: other.name().to_owned(),
                    namespace,
                });
            }
            None => Endpoint::parse(method, path, query)?,
        };
        Ok((
            Arc::clone(upstream_registry),
            with_full_name(upstream_registry, endpoint)?,
            RouteKind::Namespace,
        ))
    }

    /// The upstream and operation, if the path begins with an upstream's name followed by a repository.
    fn by_prefix(
        &self,
        method: &http::Method,
        path: &str,
        query: Option<&str>,
    ) -> Option<Result<(&Arc<UpstreamRegistry>, Endpoint), RequestError>> {
        let (first, rest) = path.strip_prefix("/v2/")?.split_once('/')?;
        let upstream_registry = self.by_name(first)?;
        match Endpoint::parse(method, &format!("/v2/{rest}"), query) {
            Ok(endpoint) if endpoint.repository().is_some() => Some(Ok((upstream_registry, endpoint))),
            // A name with a port cannot be a repository, so no other parse is possible.
            Err(malformed) if first.parse::<Repository>().is_err() => Some(Err(malformed)),
            _ => None,
        }
    }

    /// Rejects `ns` under an upstream's host, unless both name the same upstream. The registry may itself be a proxy
    /// for others, and its response for another registry is not its own image.
    pub(super) fn check_ns(
        &self,
        upstream_registry: &Arc<UpstreamRegistry>,
        query: Option<&str>,
    ) -> Result<(), Rejection> {
        let (_, namespace) = Query::parse(query)?;
        let Some(namespace) = namespace else { return Ok(()) };
        if self
            .by_name(&namespace)
            .is_some_and(|other| Arc::ptr_eq(upstream_registry, other))
        {
            return Ok(());
        }
        Err(Rejection::ConflictingUpstreams {
            at: "the host of the request",
            name: upstream_registry.name().to_owned(),
            namespace,
        })
    }

    /// Docker Hub namespaces contain no dot, so such a first component names another registry.
    fn other_registry<'a>(&self, repository: &'a Repository) -> Option<&'a str> {
        let first = repository.first_component();
        let is_other = self.default.is_hub()
            && !repository.is_one_component()
            && (first.contains('.') || first == "localhost");
        is_other.then_some(first)
    }

    /// Whether an upstream is on this host, at any port. A TLS server name has no port.
    fn is_upstream_host(&self, server_name: &str) -> bool {
        let mut names = self.by_name.keys().chain(self.by_token_service.keys());
        self.by_host(server_name).is_some() || names.any(|name| host_part(name) == server_name)
    }
}

/// The operation with the upstream's full repository name.
pub(super) fn with_full_name(
    upstream_registry: &UpstreamRegistry,
    endpoint: Endpoint,
) -> Result<Endpoint, Rejection> {
    let Some(repository) = endpoint.repository().cloned() else {
        return Ok(endpoint);
    };
    let repository = upstream_registry
        .full_name(repository)
        .map_err(|error| Rejection::Malformed(RequestError::Repository(error)))?;
    Ok(endpoint.with_repository(repository))
}

/// Whether the request target is in absolute form, as sent to a proxy. HTTP/2 has only this form.
pub(super) fn is_absolute(head: &http::request::Parts) -> bool {
    head.version < Version::HTTP_2 && head.uri.authority().is_some()
}

/// The canonical host, without the default port. `None` for an authority that is not a host, such as one with
/// userinfo.
pub(super) fn canonical_host(host: &Authority, is_tls: bool) -> Option<Cow<'_, str>> {
    let name = canonical(host.as_str())?;
    if is_tls {
        return Some(name);
    }
    Some(match name {
        Cow::Borrowed(name) => Cow::Borrowed(name.strip_suffix(":80").unwrap_or(name)),
        Cow::Owned(name) => Cow::Owned(name.strip_suffix(":80").unwrap_or(&name).to_owned()),
    })
}

/// The map key of an upstream's name or host.
fn lookup_key(name: &str) -> String {
    canonical(name).map_or_else(|| name.to_owned(), Cow::into_owned)
}
