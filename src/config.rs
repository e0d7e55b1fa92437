//! Configuration: parses and validates all settings and reports all errors together.
//!
//! A TOML document becomes tables of known keys. Environment variables and flags override the file, then each value is
//! parsed once. This module binds no port, opens no connection and writes no file. It reads the files that settings name
//! (passwords, certificates), so that a wrong path is reported before any port is bound. Callers pass the environment in
//! [`Sources`].
//!
//! * `schema`: each key with its type, default and description.
//! * `document`: TOML sections with source locations. * `env`: variables and flags. * `setting`: typed values with origins.
//! * `value`: deserializer of one value. * `parsers`, `address`, `network`: types of values.
//! * `load`: sections, and checks across sections. * `limits`: the section `[limits]`. * `policy`: `[default]`, `[[rule]]`.
//! * `upstream`: upstreams, and those that exist by default. * `upstreams`: the sections `[upstream."name"]`.
//! * `validate`: unique host names, no request loop.
//! * `shared`: the section `[shared]`.
//! * `image`: image references by the configured upstreams.
//! * `access`: the sections `[access]` and `[[allow]]`. * `files`: files that settings name.
//! * `diagnostic`: errors with locations. * `summary`: output of `ifnewer check`. * `show`: output of `ifnewer config`.

mod access;
mod address;
mod diagnostic;
mod document;
mod env;
mod files;
mod image;
mod limits;
mod load;
mod network;
mod parsers;
mod policy;
mod schema;
mod setting;
mod shared;
mod show;
mod summary;
#[cfg(test)]
mod tests;
mod upstream;
mod upstreams;
mod validate;
mod value;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

pub use access::{AccessConfig, Allow, User};
pub use address::{canonical, host_part};
pub use diagnostic::Diagnostics;
pub use env::Flag;
pub use image::{ConfiguredImage, ImageError};
pub use network::{Network, TunnelRule};
pub use schema::{KEYS, Key, Section};
pub use shared::SharedConfig;
pub use show::{reference, show};
pub use summary::Summary;
pub use upstream::{AuthMode, Credential, Proxy, UpstreamConfig, WELL_KNOWN};

use crate::policy::rules::Rules;
use diagnostic::{Origin, Report, Subject};
use document::Document;

/// Maximum length of a configuration file in bytes.
pub const TEXT_BYTES_MAX: usize = 1024 * 1024;

/// Default cache directory of root. The command line finds the cache directory of other users.
pub const ROOT_DATA_DIR: &str = "/var/cache/ifnewer";

/// The validated configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Cache directory.
    pub data: PathBuf,
    /// Name of the upstream for requests that name none; one of `upstreams`.
    pub default_upstream: Arc<str>,
    /// Listeners for clients and operators.
    pub listen: Listen,
    /// Server certificate and CA.
    pub tls: Tls,
    /// Client authentication at the cache; `None`: every client that reaches the listener has access.
    pub access: Option<AccessConfig>,
    /// `CONNECT` targets besides the upstreams.
    pub tunnels: Vec<TunnelRule>,
    /// Size limits of the store.
    pub store: StoreLimits,
    /// Storage that several caches share; `None`: there is none.
    pub shared: Option<SharedConfig>,
    /// Configured registries. Their names and hosts are unique.
    pub upstreams: Vec<UpstreamConfig>,
    /// Effective policy by image.
    pub rules: Rules,
    /// Log level and format.
    pub log: Log,
    /// Limits of connections, requests and timeouts.
    pub limits: Limits,
}

/// Listeners for clients and operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Listen addresses of the registry, unique. `registry` and `sockets` together have at least one.
    pub registry: Vec<SocketAddr>,
    /// Unix sockets of the registry, unique.
    pub sockets: Vec<PathBuf>,
    /// Trusted senders of PROXY protocol headers.
    pub proxy_protocol_from: Vec<Network>,
    /// Clients that may connect without TLS.
    pub plain_http: PlainHttp,
    /// Address of the admin API.
    pub admin: Admin,
    /// File with the admin token. The admin listener reads it.
    pub admin_token_file: Option<PathBuf>,
}

/// Clients that may connect without TLS.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", expecting = "a choice")]
pub enum PlainHttp {
    /// Clients on this host.
    Loopback,
    /// Every client.
    Any,
    /// No client.
    Off,
}

/// Address of the admin API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admin {
    /// Disabled.
    Off,
    /// TCP address.
    Tcp(SocketAddr),
    /// Unix socket.
    Unix(PathBuf),
}

/// Server certificate and CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Directory of generated certificates.
    pub folder: PathBuf,
    /// Additional names in the server certificate.
    pub names: Vec<String>,
    /// Whether a new CA is limited by name constraints to the upstreams' hosts and the cache's names.
    pub constrained: bool,
    /// Server certificate of the operator, used instead of a generated one.
    pub certificate: Option<ServerCertificate>,
}

/// Server certificate of the operator. The TLS acceptor reads the files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerCertificate {
    /// Certificate chain, PEM.
    pub certificate: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
}

/// Size limits of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreLimits {
    /// Maximum size of the cache.
    pub bytes_max: u64,
    /// Minimum free disk space.
    pub free_bytes_min: u64,
    /// Scrub rate in bytes per second; 0 disables the scrub.
    pub scrub_rate: u64,
}

/// Log level and format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// Level, or a valid filter of `tracing_subscriber::EnvFilter`.
    pub level: String,
    /// Output format.
    pub format: LogFormat,
}

/// Log format.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", expecting = "a choice")]
pub enum LogFormat {
    /// Text for operators.
    Human,
    /// One JSON object per line.
    Json,
}

/// Limits of connections, requests and timeouts. Only `drain` may be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum concurrent connections.
    pub connections_max: usize,
    /// Maximum concurrent connections of one address.
    pub connections_per_peer_max: usize,
    /// Maximum concurrent requests on one HTTP/2 connection.
    pub streams_per_connection_max: u32,
    /// Maximum concurrent CONNECT tunnels.
    pub tunnels_max: usize,
    /// Maximum concurrent blob downloads from all upstreams.
    pub downloads_max: usize,
    /// Maximum concurrent requests to one upstream, and as many blob downloads.
    pub downloads_per_upstream_max: usize,
    /// Connections of the download of one large blob; 1 if it never uses further ones.
    pub parallel_connections: usize,
    /// Size from which a blob counts as large, in bytes.
    pub parallel_bytes_min: u64,
    /// Timeout of a TLS handshake.
    pub handshake_timeout: Duration,
    /// Timeout of a request header.
    pub header_timeout: Duration,
    /// Timeout of an idle connection.
    pub idle_timeout: Duration,
    /// Timeout of a response of which the client reads no byte.
    pub write_timeout: Duration,
    /// Time to complete requests in flight at shutdown.
    pub drain: Duration,
}

impl Limits {
    /// Lowers the limits to what `descriptors` file descriptors allow. A pull needs at most five: its connection, the
    /// upstream connection and the files being written. A tunnel needs one besides its connection. The remainder is for
    /// waiting connections, the store and the admin listener.
    #[must_use]
    pub fn capped_to(self, descriptors: usize) -> Self {
        Self {
            connections_max: self.connections_max.min(descriptors / 5).max(1),
            tunnels_max: self.tunnels_max.min(descriptors / 10).max(1),
            downloads_max: self.downloads_max.min(descriptors / 10).max(1),
            ..self
        }
    }

    /// Describes the lowered limits; `None` if `descriptors` suffice.
    pub fn describe_caps(&self, descriptors: usize) -> Option<String> {
        let few = self.capped_to(descriptors);
        (few != *self).then(|| {
            format!(
                "{descriptors} file descriptors allow {} connections (connections_max = {}), {} tunnels (tunnels_max = {}) \
                 and {} transfers (downloads_max = {})",
                few.connections_max,
                self.connections_max,
                few.tunnels_max,
                self.tunnels_max,
                few.downloads_max,
                self.downloads_max
            )
        })
    }

    /// Maximum connections, of all addresses, that wait for a permit of their address. Each uses a descriptor.
    pub fn connections_waiting_max(&self) -> usize {
        (self.connections_max / 2).max(1)
    }
}

/// Sources of the configuration. Later fields override earlier ones.
#[derive(Clone, Debug)]
pub struct Sources<'a> {
    /// Default cache directory.
    pub data: PathBuf,
    /// The directory `certs` in the working directory, if it is empty or holds a CA of this program. Without a
    /// configuration file, it overrides `certs` in the cache directory.
    pub working_dir_certs: Option<PathBuf>,
    /// Text of the file; empty without a file.
    pub text: &'a str,
    /// Path of the file, for diagnostics and relative paths. Without a file it is empty, and relative paths start at the
    /// working directory.
    pub origin: &'a Path,
    /// Environment variables; those without the prefix `IFNEWER_` are ignored, except for the credential of a bucket
    /// (`AWS_…`).
    pub variables: Vec<(String, String)>,
    /// Flags of the command line.
    pub flags: Vec<Flag>,
}

impl Config {
    /// Parses a text without environment and flags. Diagnostics name it `origin`; relative paths start at the directory
    /// of `origin`.
    pub fn read(text: &str, origin: &Path) -> Result<Self, Diagnostics> {
        let data = PathBuf::from(ROOT_DATA_DIR);
        Self::gather(&Sources {
            data,
            working_dir_certs: None,
            text,
            origin,
            variables: Vec::new(),
            flags: Vec::new(),
        })
    }

    /// Loads all sources and reports all errors together. Fixing invalid TOML, or a value on which others depend, can
    /// reveal further errors.
    pub fn gather(sources: &Sources<'_>) -> Result<Self, Diagnostics> {
        let mut report = Report::new(sources.text, sources.origin);
        if sources.text.len() > TEXT_BYTES_MAX {
            let start = Subject::new(Origin::Span(0..0), "");
            report.emit(&start, format!("longer than {TEXT_BYTES_MAX} bytes"), "");
            return Err(report.into_diagnostics());
        }
        let document = Document::read(sources, &mut report);
        match document.and_then(|document| load::load(&document, sources, &mut report)) {
            Ok(config) if report.is_empty() => Ok(config),
            _ => Err(report.into_diagnostics()),
        }
    }

    /// Summary of the effective settings, without secrets.
    pub fn summary(&self) -> Summary<'_> {
        Summary(self)
    }

    /// Hosts, without ports, for which leaf certificates are issued: upstreams, and token services with local tokens.
    pub fn hosts(&self) -> HashSet<String> {
        let names = self.upstreams.iter().flat_map(|upstream| {
            let hosts = upstream.hosts.iter().map(String::as_str);
            hosts.chain([&*upstream.name]).chain(upstream.token_host())
        });
        names
            .map(|name| canonical(name).unwrap_or(name.into()))
            .map(|name| host_part(&name).to_owned())
            .collect()
    }

    /// CA certificates of client certificates, DER.
    pub fn client_roots(&self) -> &[Vec<u8>] {
        self.access
            .as_ref()
            .map_or(&[], |access| access.client_roots.as_slice())
    }

    /// Finds an upstream by name or host.
    pub fn upstream(&self, name_or_host: &str) -> Option<&UpstreamConfig> {
        self.upstreams
            .iter()
            .find(|upstream| upstream.has_name(name_or_host))
    }
}
