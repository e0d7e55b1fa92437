//! Configured upstreams, and those that exist by default.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::address;
use crate::oci::Repository;
use crate::upstream::{ClientCertificate, HelperName, RedirectRule};

/// Upstream that exists by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WellKnown {
    /// Name in image references.
    pub name: &'static str,
    /// Registry URL.
    pub url: &'static str,
    /// Additional host names.
    pub hosts: &'static [&'static str],
    /// Hosts of the registry that it redirects to; their responses count as its own.
    pub token_hosts: &'static [&'static str],
}

/// Upstreams that exist by default.
#[rustfmt::skip] // One per line.
pub const WELL_KNOWN: &[WellKnown] = &[
    WellKnown { name: "docker.io", url: "https://registry-1.docker.io", hosts: &["index.docker.io", "registry-1.docker.io"], token_hosts: &[] },
    WellKnown { name: "ghcr.io", url: "https://ghcr.io", hosts: &[], token_hosts: &[] },
    WellKnown { name: "quay.io", url: "https://quay.io", hosts: &[], token_hosts: &[] },
    WellKnown { name: "registry.k8s.io", url: "https://registry.k8s.io", hosts: &[], token_hosts: &["*.pkg.dev"] },
    WellKnown { name: "gcr.io", url: "https://gcr.io", hosts: &[], token_hosts: &[] },
    WellKnown { name: "public.ecr.aws", url: "https://public.ecr.aws", hosts: &[], token_hosts: &[] },
    WellKnown { name: "mcr.microsoft.com", url: "https://mcr.microsoft.com", hosts: &[], token_hosts: &[] },
    WellKnown { name: "registry.gitlab.com", url: "https://registry.gitlab.com", hosts: &[], token_hosts: &[] },
];

/// Address of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// Absolute http(s) URL without user, query, fragment and trailing slash.
    pub address: String,
    /// Prefix of each repository name there.
    pub repository_prefix: Option<Repository>,
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.repository_prefix {
            Some(prefix) => write!(f, "{}/v2/{prefix}", self.address),
            None => f.write_str(&self.address),
        }
    }
}

/// Configured upstream registry.
#[derive(Clone, Debug)]
pub struct UpstreamConfig {
    /// Name in image references: `docker.io`, `registry.example.org:5000`.
    pub name: Arc<str>,
    /// URLs, tried in order; at least one.
    pub urls: Vec<Url>,
    /// Additional host names.
    pub hosts: Vec<String>,
    /// Authorization mode.
    pub auth: AuthMode,
    /// URL of its token service, if local tokens are enabled: https with a path. Only with [`AuthMode::PerClient`].
    pub local_tokens: Option<String>,
    /// Credential of the cache. Only with [`AuthMode::Shared`].
    pub credential: Option<Credential>,
    /// Additional hosts that may receive credentials for a token, besides its own host and site; with a port unless it is
    /// the default.
    pub token_hosts: Vec<String>,
    /// Certificates to trust in addition to the system's, DER.
    pub roots: Vec<Vec<u8>>,
    /// Client certificate for this upstream.
    pub client_certificate: Option<ClientCertificate>,
    /// Additional redirect targets, besides https to the same or a wider address scope.
    pub redirects: Vec<RedirectRule>,
    /// Proxy for upstream requests.
    pub proxy: Proxy,
    /// Timeout of a connection.
    pub connect_timeout: Duration,
    /// Timeout from a request to its response header, including redirects.
    pub first_byte_timeout: Duration,
}

impl UpstreamConfig {
    /// Host of its token service, with a port unless it is the default, if local tokens are enabled.
    pub fn token_host(&self) -> Option<&str> {
        let rest = self.local_tokens.as_deref()?.strip_prefix("https://")?;
        let host = rest.split('/').next()?;
        Some(host.strip_suffix(":443").unwrap_or(host))
    }

    /// Whether this is its name or one of its hosts, in any spelling.
    pub fn has_name(&self, name_or_host: &str) -> bool {
        let mut names = self.hosts.iter().map(String::as_str).chain([&*self.name]);
        names.any(|name| address::is_same_host(name, name_or_host))
    }
}

/// Authorization mode of an upstream.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", expecting = "a choice")]
pub enum AuthMode {
    /// The upstream authorizes each client by the client's credential.
    PerClient,
    /// Every client that reaches the listener is authorized.
    Shared,
}

/// Source of the cache's credential. Secrets are read at each use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// User name, and a file with the password or token.
    Password {
        /// User name.
        username: String,
        /// Password file.
        file: PathBuf,
    },
    /// Docker's `config.json`: credentials by host and path, and credential helpers.
    DockerConfig(PathBuf),
    /// Credential helper.
    Helper(HelperName),
}

/// Format of `ifnewer check`.
impl fmt::Display for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { username, .. } => f.write_str(username),
            Self::DockerConfig(path) => write!(f, "{} says", path.display()),
            Self::Helper(name) => write!(f, "{name} says"),
        }
    }
}

/// Proxy of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proxy {
    /// From `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`.
    Environment,
    /// Direct connection.
    None,
    /// Proxy URL without user and password.
    Url(String),
}
