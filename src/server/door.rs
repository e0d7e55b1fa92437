//! The doors: how a client says which upstream it means, and how its answer to that becomes one upstream.
//!
//! A connection may name a host before any request (`CONNECT`, the server name of its TLS), and each request names one
//! (`Host`, `:authority`, an absolute target). All that are there must agree, or a request could be judged as one
//! upstream's and answered as another's. Behind the door nothing knows which one it was.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use http::Version;
use http::uri::Authority;

use super::connections::Handle;
use super::entry::Shown;
use super::gate::Turned;
use super::idle::Pardon;
use crate::config::{canonical, host_part};
use crate::oci::query::Query;
use crate::oci::{Endpoint, Repository, RequestError};
use crate::proxy::UpstreamRegistry;
use crate::upstream::origin::Origin;

/// A way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// Nothing is named: the default upstream.
    Mirror,
    /// `?ns=`
    Namespace,
    /// The first component of the path.
    Prefix,
    /// The host asked for is an upstream's: its name leads here, and the client believes to speak with it.
    Host,
    /// The same within a `CONNECT`.
    Connect,
}

impl Door {
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

/// What is known of a connection before any request on it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it is; `None` for one that comes through a unix socket.
    pub address: Option<std::net::IpAddr>,
    /// Whether this peer may speak on this connection as it is: over TLS, or plain from where that is allowed.
    pub may_speak: bool,
    /// Whether it speaks TLS.
    pub secure: bool,
    /// The server name in its TLS handshake, in lower case.
    pub server_name: Option<Arc<str>>,
    /// The upstream's host that its `CONNECT` named, as [`Doors::named`] knows it.
    pub connect: Option<Arc<str>>,
    /// What it has shown of who is at its other end.
    pub(super) shown: Shown,
    /// Held while the client waits for an upstream, and so is quiet without being stalled.
    pub pardon: Pardon,
    /// What a request holds while it is in flight, so that its connection is not closed to make room.
    pub(super) connection: Handle,
}

/// The upstreams there are, and how a client names them.
pub struct Doors {
    by_name: HashMap<String, Arc<UpstreamRegistry>>,
    /// By the hosts of their token services, where those are ours too.
    by_realm: HashMap<String, Arc<UpstreamRegistry>>,
    all: Vec<Arc<UpstreamRegistry>>,
    default: Arc<UpstreamRegistry>,
}

impl Doors {
    /// `sites` with the further names each is known by; `default` is meant where a client names none.
    pub fn new(
        upstream_registries: Vec<(Arc<UpstreamRegistry>, Vec<String>)>,
        default: Arc<UpstreamRegistry>,
    ) -> Self {
        let (mut by_name, mut by_realm) = (HashMap::new(), HashMap::new());
        let mut all = Vec::new();
        for (upstream_registry, names) in upstream_registries {
            if let Some(realm) = upstream_registry.realm() {
                by_realm.insert(key_of(realm.authority().as_str()), Arc::clone(&upstream_registry));
            }
            for name in names.iter().map(String::as_str).chain([upstream_registry.name()]) {
                by_name.insert(key_of(name), Arc::clone(&upstream_registry));
            }
            all.push(upstream_registry);
        }
        Self {
            by_name,
            by_realm,
            all,
            default,
        }
    }

    /// The upstream of this name, in whatever spelling.
    pub fn named(&self, name: &str) -> Option<&Arc<UpstreamRegistry>> {
        self.by_name.get(&*canonical(name)?)
    }

    /// The upstream of this name, or whose token service is there.
    pub(super) fn reached(&self, host: &str) -> Option<&Arc<UpstreamRegistry>> {
        self.named(host).or_else(|| self.by_realm.get(host))
    }

    /// The same for the `Host` of a request. Without TLS port 80 may be left out, and a front that ends TLS leaves out 443.
    fn reached_by(&self, host: &Authority, name: &str, secure: bool) -> Option<&Arc<UpstreamRegistry>> {
        let at_80 = || {
            let host = canonical(host.as_str())?;
            let host = host.strip_suffix(":80").unwrap_or(&host);
            self.named(&format!("{host}:80"))
        };
        if !secure && host.port_u16() == Some(80) {
            return at_80().or_else(|| self.reached(name));
        }
        let found = self.reached(name);
        if secure || host.port_u16().is_some() {
            found
        } else {
            found.or_else(at_80)
        }
    }

    /// The token service of `site`, if it is on this host.
    pub(super) fn realm_at<'a>(
        &self,
        host: &str,
        upstream_registry: &'a Arc<UpstreamRegistry>,
    ) -> Option<&'a Origin> {
        let here = self
            .by_realm
            .get(host)
            .is_some_and(|found| Arc::ptr_eq(found, upstream_registry));
        upstream_registry.realm().filter(|_| here)
    }

    /// Every upstream.
    pub fn all(&self) -> &[Arc<UpstreamRegistry>] {
        &self.all
    }

    /// The upstream meant by a client that names none.
    pub fn default_registry(&self) -> &Arc<UpstreamRegistry> {
        &self.default
    }

    /// The upstream that the host of a request means, if the request was meant for that host itself (`host`, `connect`);
    /// `None` if it was meant for the cache.
    pub(super) fn intercepted(
        &self,
        host: Option<&Authority>,
        absolute: bool,
        peer: &Peer,
    ) -> Result<Option<(&Arc<UpstreamRegistry>, Door)>, Turned> {
        let Some(host) = host else {
            // HTTP/1.0 without a Host can only mean the cache, so the connection must not say otherwise.
            let named =
                peer.connect.is_some() || peer.server_name.as_deref().is_some_and(|name| self.is_host(name));
            return if named { Err(Turned::Host) } else { Ok(None) };
        };
        let name = name_of(host, peer.secure).ok_or(Turned::Host)?;
        let upstream_registry = self.reached_by(host, &name, peer.secure);
        if let Some(connect) = &peer.connect {
            let server = peer.server_name.as_deref();
            if **connect != *name || server.is_some_and(|server| server != host_part(connect)) {
                return Err(Turned::Misdirected);
            }
            return upstream_registry
                .map(|upstream_registry| Some((upstream_registry, Door::Connect)))
                .ok_or_else(|| Turned::UnknownUpstream(name.into_owned()));
        }
        if let Some(server) = peer.server_name.as_deref()
            && server != host_part(&name)
            && (upstream_registry.is_some() || self.is_host(server))
        {
            return Err(Turned::Misdirected);
        }
        let meant_elsewhere = absolute
            || peer
                .server_name
                .as_deref()
                .is_some_and(|server| self.is_host(server));
        match upstream_registry {
            Some(upstream_registry) => Ok(Some((upstream_registry, Door::Host))),
            None if meant_elsewhere => Err(Turned::UnknownUpstream(name.into_owned())),
            None => Ok(None),
        }
    }

    /// Through which of the cache's own doors the client came: `?ns=`, a path that begins with an upstream's name, or
    /// the mirror.
    pub(super) fn open(
        &self,
        head: &http::request::Parts,
    ) -> Result<(Arc<UpstreamRegistry>, Endpoint, Door), Turned> {
        let (method, path, query) = (&head.method, head.uri.path(), head.uri.query());
        let (_, namespace) = Query::parse(query)?;
        let prefixed = self.prefixed(method, path, query);
        let Some(namespace) = namespace else {
            if let Some(prefixed) = prefixed {
                let (upstream_registry, endpoint) = prefixed?;
                return Ok((
                    Arc::clone(upstream_registry),
                    in_full(upstream_registry, endpoint)?,
                    Door::Prefix,
                ));
            }
            let endpoint = Endpoint::parse(method, path, query)?;
            if let Some(name) = endpoint.repository().and_then(|name| self.foreign(name)) {
                return Err(Turned::UnknownUpstream(name.to_owned()));
            }
            let upstream_registry = &self.default;
            return Ok((
                Arc::clone(upstream_registry),
                in_full(upstream_registry, endpoint)?,
                Door::Mirror,
            ));
        };
        if canonical(&namespace).is_none() {
            return Err(Turned::NoHostInNs(namespace));
        }
        let Some(upstream_registry) = self.named(&namespace) else {
            return Err(Turned::UnknownUpstream(namespace));
        };
        // containerd appends `ns` also where the path of its mirror (`override_path`) names the registry already.
        let endpoint = match prefixed.transpose()? {
            Some((other, endpoint)) if Arc::ptr_eq(upstream_registry, other) => endpoint,
            Some((other, _)) => {
                return Err(Turned::TwoUpstreams {
                    at: "the path",
                    name: other.name().to_owned(),
                    namespace,
                });
            }
            None => Endpoint::parse(method, path, query)?,
        };
        Ok((
            Arc::clone(upstream_registry),
            in_full(upstream_registry, endpoint)?,
            Door::Namespace,
        ))
    }

    /// What is asked for if the path begins with an upstream's name and goes on with a repository.
    fn prefixed(
        &self,
        method: &http::Method,
        path: &str,
        query: Option<&str>,
    ) -> Option<Result<(&Arc<UpstreamRegistry>, Endpoint), RequestError>> {
        let (first, rest) = path.strip_prefix("/v2/")?.split_once('/')?;
        let upstream_registry = self.named(first)?;
        match Endpoint::parse(method, &format!("/v2/{rest}"), query) {
            Ok(endpoint) if endpoint.repository().is_some() => Some(Ok((upstream_registry, endpoint))),
            // A name with a port is no repository's, so the path has no other reading.
            Err(malformed) if first.parse::<Repository>().is_err() => Some(Err(malformed)),
            _ => None,
        }
    }

    /// Refuses `ns` where the host of the request is an upstream's own, unless both name it: the registry may itself stand
    /// for others, and what it answers for one of them is not its own image.
    pub(super) fn agree(
        &self,
        upstream_registry: &Arc<UpstreamRegistry>,
        query: Option<&str>,
    ) -> Result<(), Turned> {
        let (_, namespace) = Query::parse(query)?;
        let Some(namespace) = namespace else { return Ok(()) };
        if self
            .named(&namespace)
            .is_some_and(|other| Arc::ptr_eq(upstream_registry, other))
        {
            return Ok(());
        }
        Err(Turned::TwoUpstreams {
            at: "the host of the request",
            name: upstream_registry.name().to_owned(),
            namespace,
        })
    }

    /// Docker Hub has no namespace with a dot, so such a first component is the name of another registry.
    fn foreign<'a>(&self, repository: &'a Repository) -> Option<&'a str> {
        let first = repository.first_component();
        let is_foreign = self.default.is_hub()
            && !repository.is_one_component()
            && (first.contains('.') || first == "localhost");
        is_foreign.then_some(first)
    }

    /// Whether an upstream is on this host, at whatever port: a server name in TLS has none.
    fn is_host(&self, server_name: &str) -> bool {
        let mut names = self.by_name.keys().chain(self.by_realm.keys());
        self.reached(server_name).is_some() || names.any(|name| host_part(name) == server_name)
    }
}

/// The operation with the repository's name as the upstream knows it.
pub(super) fn in_full(upstream_registry: &UpstreamRegistry, endpoint: Endpoint) -> Result<Endpoint, Turned> {
    let Some(repository) = endpoint.repository().cloned() else {
        return Ok(endpoint);
    };
    let repository = upstream_registry
        .full_name(repository)
        .map_err(|error| Turned::RequestError(RequestError::Repository(error)))?;
    Ok(endpoint.with_repository(repository))
}

/// Whether the target of a request has the form that is sent to a proxy. HTTP/2 has no other.
pub(super) fn is_absolute(head: &http::request::Parts) -> bool {
    head.version < Version::HTTP_2 && head.uri.authority().is_some()
}

/// A host as upstreams are named, without the port where it is the usual one; `None` for an authority that is no host, as
/// one with a user.
pub(super) fn name_of(host: &Authority, secure: bool) -> Option<Cow<'_, str>> {
    let name = canonical(host.as_str())?;
    if secure {
        return Some(name);
    }
    Some(match name {
        Cow::Borrowed(name) => Cow::Borrowed(name.strip_suffix(":80").unwrap_or(name)),
        Cow::Owned(name) => Cow::Owned(name.strip_suffix(":80").unwrap_or(&name).to_owned()),
    })
}

/// The key of an upstream's name or host.
fn key_of(name: &str) -> String {
    canonical(name).map_or_else(|| name.to_owned(), Cow::into_owned)
}
