//! Base URL of a registry: scheme, authority and path prefix. Not a general URL type.
//!
//! Also the comparisons that decide whether a credential may be sent to another URL: same origin, same site and
//! loopback.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use http::Uri;
use http::uri::{Authority, Scheme};

use crate::oci::name::Repository;

/// The base URL of an upstream's API, e.g. `https://registry-1.docker.io`.
///
/// Requests append `/v2/…`. The prefix is for registries below a path
/// (`https://art.example/artifactory/api/docker/hub`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    scheme: Scheme,
    authority: Authority,
    /// Without a trailing slash; empty for the root.
    prefix: String,
    /// Repository prefix: the project of another registry that proxies this one.
    repositories: Option<Repository>,
}

/// Why a text is not an [`Origin`]. A configuration error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OriginError {
    /// Not a URL.
    #[error("`{0}` is not a URL")]
    RequestError(String),
    /// Neither `http` nor `https`.
    #[error("`{0}` must begin with https:// or http://")]
    Scheme(String),
    /// `user:password@` belongs in the credential settings, because URLs are logged.
    #[error("a registry URL must not contain a user name or password")]
    Userinfo,
    /// A query or a fragment has no meaning here.
    #[error("`{0}` must not have a query or a fragment")]
    Query(String),
}

impl FromStr for Origin {
    type Err = OriginError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('@') {
            return Err(OriginError::Userinfo);
        }
        if text.contains(['?', '#']) {
            return Err(OriginError::Query(text.to_owned()));
        }
        if !text.contains("://") {
            return Err(OriginError::Scheme(text.to_owned()));
        }
        let uri: Uri = text
            .parse()
            .map_err(|_| OriginError::RequestError(text.to_owned()))?;
        let scheme = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS => scheme.clone(),
            _ => return Err(OriginError::Scheme(text.to_owned())),
        };
        let authority = match uri.authority() {
            Some(authority) if !authority.host().is_empty() => authority.clone(),
            _ => return Err(OriginError::RequestError(text.to_owned())),
        };
        let prefix = uri.path().trim_end_matches('/').to_owned();
        Ok(Origin {
            scheme,
            authority,
            prefix,
            repositories: None,
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.prefix)?;
        match &self.repositories {
            Some(prefix) => write!(f, "/v2/{prefix}"),
            None => Ok(()),
        }
    }
}

impl Origin {
    /// The origin of a URL, without its path.
    pub(super) fn of_uri(uri: &Uri) -> Option<Origin> {
        format!("{}://{}", uri.scheme()?, uri.authority()?).parse().ok()
    }

    /// The same registry with a repository prefix.
    #[must_use]
    pub fn with_repository_prefix(self, prefix: Repository) -> Origin {
        Origin {
            repositories: Some(prefix),
            ..self
        }
    }

    /// The repository prefix at this registry.
    pub fn repository_prefix(&self) -> Option<&Repository> {
        self.repositories.as_ref()
    }

    /// The name of `repository` at this registry.
    pub(super) fn name_of(&self, repository: &Repository) -> Repository {
        let prefix = self.repositories.as_ref();
        let named = prefix.map(|prefix| repository.with_prefix(prefix.as_str()));
        // If the name is too long with its prefix, the registry rejects it.
        named.and_then(Result::ok).unwrap_or_else(|| repository.clone())
    }

    /// The URI of `path_and_query` (which begins with `/v2/`) at this origin. `None` if the result is not a URI.
    pub fn join(&self, path_and_query: &str) -> Option<Uri> {
        let named = path_and_query
            .strip_prefix("/v2/")
            .filter(|rest| !rest.is_empty());
        let path = match (&self.repositories, named) {
            (Some(prefix), Some(rest)) => format!("{}/v2/{prefix}/{rest}", self.prefix),
            _ => format!("{}{path_and_query}", self.prefix),
        };
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query(path)
            .build()
            .ok()
    }

    /// The URI of `path_and_query` at the origin's root, for requests outside the registry API.
    pub(super) fn join_root(&self, path_and_query: &str) -> Option<Uri> {
        self.root().join(path_and_query)
    }

    /// The same origin without its path.
    pub(super) fn root(&self) -> Origin {
        Origin {
            prefix: String::new(),
            repositories: None,
            ..self.clone()
        }
    }

    /// The path and query of `uri` without the prefix, if `uri` has this origin.
    pub(super) fn strip<'a>(&self, uri: &'a Uri) -> Option<&'a str> {
        let own = self.join("/")?;
        let path = uri.path_and_query()?.as_str();
        same_origin(&own, uri).then_some(path.strip_prefix(self.prefix.as_str()).unwrap_or(path))
    }

    /// Whether it uses plain HTTP.
    pub fn is_plain(&self) -> bool {
        self.scheme == Scheme::HTTP
    }

    /// The host, with brackets if it is an IPv6 address.
    pub fn host(&self) -> &str {
        self.authority.host()
    }

    /// The path prefix; empty for the root.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    /// Host and port as written.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }
}

/// Same scheme, host and port (RFC 6454 §4). `Authorization` must not leave this boundary (distribution-spec:
/// "clients MUST NOT forward `Authorization` across hosts").
pub(super) fn same_origin(a: &Uri, b: &Uri) -> bool {
    a.scheme() == b.scheme() && same_host(a, b) && port_of(a) == port_of(b)
}

/// Same host, at any port.
pub(super) fn same_host(a: &Uri, b: &Uri) -> bool {
    match (a.host(), b.host()) {
        (Some(a), Some(b)) => a.eq_ignore_ascii_case(b),
        _ => false,
    }
}

/// Whether `uri` has one of these hosts. The port must match, and is the scheme's default unless the entry has one.
/// `*.example.org` matches all hosts below `example.org`.
pub(super) fn is_one_of(hosts: &[String], uri: &Uri) -> bool {
    hosts.iter().any(|named| {
        if let Some(domain) = named.strip_prefix('*') {
            let host = uri.host().unwrap_or_default().to_ascii_lowercase();
            return uri.port_u16().is_none() && host.ends_with(domain);
        }
        let Ok(named) = format!("{}://{named}/", uri.scheme_str().unwrap_or("https")).parse() else {
            return false;
        };
        same_host(&named, uri) && port_of(&named) == port_of(uri)
    })
}

/// The explicit port, or the scheme's default.
pub(super) fn port_of(uri: &Uri) -> u16 {
    let default = match uri.scheme_str() {
        Some("http") => 80,
        Some("socks5" | "socks5h") => 1080,
        _ => 443,
    };
    uri.port_u16().unwrap_or(default)
}

/// Whether two hosts have the same registrable domain: the last two labels agree (`registry-1.docker.io`,
/// `auth.docker.io`), or the last three below suffixes like `co.uk`. Never true for IP addresses.
pub(super) fn same_site(a: &str, b: &str) -> bool {
    match (site(a), site(b)) {
        (Some(a), Some(b)) => a == b,
        _ => false,
    }
}

fn site(host: &str) -> Option<String> {
    if address(host).is_some() {
        return None;
    }
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let mut labels = host.rsplit('.');
    let (top, second) = (labels.next()?, labels.next()?);
    if top.is_empty() || second.is_empty() {
        return None;
    }
    let shared = top.len() == 2
        && matches!(
            second,
            "ac" | "co" | "com" | "edu" | "gov" | "ne" | "net" | "or" | "org"
        );
    if shared {
        return Some(format!("{}.{second}.{top}", labels.next()?));
    }
    Some(format!("{second}.{top}"))
}

/// Whether a host, as written, is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    match address(host) {
        Some(address) => address.to_canonical().is_loopback(),
        None => host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost"),
    }
}

/// The IP address if the host is one, with or without brackets.
pub(super) fn address(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn an_origin_is_scheme_authority_and_prefix() {
        for (text, shown) in [
            ("https://registry-1.docker.io", "https://registry-1.docker.io"),
            ("https://registry-1.docker.io/", "https://registry-1.docker.io"),
            ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
            ("http://[::1]:5000/", "http://[::1]:5000"),
            (
                "https://art.example/api/docker/hub/",
                "https://art.example/api/docker/hub",
            ),
        ] {
            assert_eq!(text.parse::<Origin>().unwrap().to_string(), shown);
        }
        let origin: Origin = "https://art.example/hub".parse().unwrap();
        assert_eq!(
            origin.join("/v2/a/tags/list?n=1").unwrap(),
            "https://art.example/hub/v2/a/tags/list?n=1"
        );
    }

    #[test]
    fn r15_repository_prefix_applies_to_names_only() {
        let plain: Origin = "https://harbor.example/sub".parse().unwrap();
        let origin = plain.with_repository_prefix("hub-proxy/eu".parse().unwrap());
        assert_eq!(origin.to_string(), "https://harbor.example/sub/v2/hub-proxy/eu");
        for (path, joined) in [
            ("/v2/", "/sub/v2/"),
            (
                "/v2/library/app/manifests/1",
                "/sub/v2/hub-proxy/eu/library/app/manifests/1",
            ),
            ("/v2/a/tags/list?n=1", "/sub/v2/hub-proxy/eu/a/tags/list?n=1"),
        ] {
            assert_eq!(
                origin.join(path).unwrap(),
                format!("https://harbor.example{joined}").as_str()
            );
        }
        assert_eq!(
            origin.join_root("/token").unwrap(),
            "https://harbor.example/token"
        );
        let named = origin.name_of(&"library/app".parse().unwrap());
        assert_eq!(named.as_str(), "hub-proxy/eu/library/app");
    }

    #[test]
    fn invalid_origin_reports_reason() {
        for (text, error) in [
            (
                "registry-1.docker.io",
                OriginError::Scheme("registry-1.docker.io".into()),
            ),
            ("ftp://a", OriginError::Scheme("ftp://a".into())),
            ("https://user:secret@a", OriginError::Userinfo),
            ("https://a?b", OriginError::Query("https://a?b".into())),
            ("https://a#b", OriginError::Query("https://a#b".into())),
            ("https:// a", OriginError::RequestError("https:// a".into())),
            ("https://", OriginError::RequestError("https://".into())),
        ] {
            assert_eq!(text.parse::<Origin>(), Err(error), "{text}");
        }
    }

    #[test]
    fn an_origin_differs_in_scheme_host_or_port() {
        let uri = |text: &'static str| Uri::from_static(text);
        assert!(same_origin(&uri("https://a/x"), &uri("https://A:443/y")));
        assert!(!same_origin(&uri("https://a/"), &uri("http://a/")));
        assert!(!same_origin(&uri("https://a/"), &uri("https://a:8443/")));
        assert!(!same_origin(&uri("https://a/"), &uri("https://b/")));
    }

    #[test]
    fn site_is_the_registrable_domain() {
        assert!(same_site("registry-1.docker.io", "auth.docker.io"));
        assert!(same_site("registry.gitlab.com", "GITLAB.com"));
        assert!(!same_site("registry.a.co.uk", "evil.co.uk"));
        assert!(!same_site("docker.io", "docker.io.evil.example"));
        assert!(!same_site("10.0.0.1", "11.0.0.1"));
        assert!(!same_site("localhost", "localhost"));
    }

    #[test]
    fn loopback_is_recognized_by_name_and_address() {
        for host in [
            "localhost",
            "a.localhost",
            "127.0.0.1",
            "127.9.9.9",
            "[::1]",
            "::1",
            "[::ffff:127.0.0.1]",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.evil.example", "10.0.0.1", "[::2]", "example.com"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
