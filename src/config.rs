//! The configuration: from text to plain typed data, or to everything that is wrong with it, at once.
//!
//! The text becomes tables of known keys, the variables and flags are laid over them, and each value is read once by the
//! reader of its kind. Nothing here binds, connects or writes; it reads the files
//! that the configuration names (a password, certificates), because a wrong name is the operator's mistake as well and
//! should be told before any port is bound. The environment is not read here: [`Sources`] brings it.
//!
//! * `keys`: every key with its default and its meaning.
//! * `document`, `table`: what is written where; `variable`: what is laid over it.
//! * `value`, `address`: the readers of the values.
//! * `build`: the sections, and what concerns several of them.
//! * `upstream`: the well-known upstreams and what may be said about one; `names`: that each name means one.
//! * `files`: the files that are named. * `entry`: who may come in at all.
//! * `fault`: how a mistake is told; `summary`: what is in effect, in words; `effective`: key by key, and from where.

mod access;
mod address;
mod diagnostic;
mod document;
mod env;
mod files;
mod limits;
mod load;
mod network;
mod parsers;
mod schema;
mod show;
mod summary;
mod table;
#[cfg(test)]
mod tests;
mod upstream;
mod validate;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use access::{AccessConfig, Allow, User};
pub use address::{canonical, host_part};
pub use diagnostic::{Diagnostic, Diagnostics, Location};
pub use env::Flag;
pub use network::{Network, TunnelRule};
pub use schema::{KEYS, Key, Section};
pub use show::{Settings, reference};
pub use summary::Summary;
pub use upstream::{AuthMode, Credential, Proxy, UpstreamConfig, WELL_KNOWN};

use crate::policy::rules::Rules;
use diagnostic::{Origin, Report};
use document::Document;

/// A configuration longer than this is something else.
pub const TEXT_BYTES_MAX: usize = 1024 * 1024;

/// Where the cache is when nobody says so. A user's own cache folder is for the command line to find.
pub const ROOT_DATA_DIR: &str = "/var/cache/ifnewer";

/// Everything that can be configured, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cache's folder.
    pub data: PathBuf,
    /// The name of the upstream that is meant by a client that names none; one of `upstreams`.
    pub default_upstream: Arc<str>,
    /// Where clients and operators reach us.
    pub listen: Listen,
    /// Our certificates.
    pub tls: Tls,
    /// Who may come in at all; `None`: whoever reaches the listener.
    pub access: Option<AccessConfig>,
    /// Where `CONNECT` may lead besides the upstreams.
    pub tunnels: Vec<TunnelRule>,
    /// How much is kept.
    pub store: StoreLimits,
    /// The registries that exist. Their names and hosts are all different.
    pub upstreams: Vec<UpstreamConfig>,
    /// Which rule holds for an image.
    pub rules: Rules,
    /// What is told, and how.
    pub log: Log,
    /// The limits of the front and of the upstream side.
    pub limits: Limits,
}

/// Where clients and operators reach us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// The addresses of the registry, all different; at least one of these and `sockets` together.
    pub registry: Vec<SocketAddr>,
    /// The unix sockets of the registry, all different.
    pub sockets: Vec<PathBuf>,
    /// From where a connection begins with a PROXY protocol header, which is believed.
    pub proxy_protocol_from: Vec<Network>,
    /// Who may speak without TLS.
    pub plain_http: PlainHttp,
    /// Where the admin API is.
    pub admin: Admin,
    /// The file with the token that it asks for. Read where it is used.
    pub admin_token_file: Option<PathBuf>,
}

/// Who may speak without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlainHttp {
    /// Clients on this machine.
    Loopback,
    /// Everyone.
    Any,
    /// No client.
    Off,
}

/// Where the admin API is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admin {
    /// Nowhere.
    Off,
    /// On a TCP address.
    Tcp(SocketAddr),
    /// On a unix socket.
    Unix(PathBuf),
}

/// Our certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The folder of the certificates that we make ourselves.
    pub folder: PathBuf,
    /// Further names on the server certificate.
    pub names: Vec<String>,
    /// Whether a CA that is made may vouch only for the upstreams' hosts and our own names.
    pub constrained: bool,
    /// The operator's own server certificate, used instead of ours.
    pub certificate: Option<ServerCertificate>,
}

/// A server certificate brought by the operator. The files are read where the certificate is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerCertificate {
    /// The chain, PEM.
    pub certificate: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
}

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreLimits {
    /// How much the cache may hold.
    pub bytes_max: u64,
    /// How much is left free on the disk.
    pub free_bytes_min: u64,
    /// Bytes in a second that are read again in the background; 0 is none.
    pub scrub_rate: u64,
}

/// What is told, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// A level, or a filter of `tracing_subscriber::EnvFilter`; known to be readable.
    pub level: String,
    /// How it is written.
    pub format: LogFormat,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// The limits of the front and of the upstream side. None of them is zero but `drain`, which may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time.
    pub connections_max: usize,
    /// Connections at a time from one address.
    pub connections_per_peer_max: usize,
    /// Requests at a time on one HTTP/2 connection.
    pub streams_per_connection_max: u32,
    /// Tunnels at a time.
    pub tunnels_max: usize,
    /// Requests at a time to all upstreams together.
    pub downloads_max: usize,
    /// Requests at a time to one upstream.
    pub downloads_per_upstream_max: usize,
    /// For a TLS handshake.
    pub handshake_timeout: Duration,
    /// For a request's header.
    pub header_timeout: Duration,
    /// Without a request.
    pub idle_timeout: Duration,
    /// Without a byte of an answer being taken.
    pub write_timeout: Duration,
    /// For requests under way at the end.
    pub drain: Duration,
}

impl Limits {
    /// These limits, or lower ones where the process may open only so many files. Each connection finds the five that a
    /// pull takes at most (its own, that to the upstream, and the files of what is written); a tunnel takes one besides
    /// its connection. What is left is for connections that wait, for the store and for the admin listener.
    #[must_use]
    pub fn capped_to(self, descriptors: usize) -> Self {
        Self {
            connections_max: self.connections_max.min(descriptors / 5).max(1),
            tunnels_max: self.tunnels_max.min(descriptors / 10).max(1),
            downloads_max: self.downloads_max.min(descriptors / 10).max(1),
            ..self
        }
    }

    /// In words, where a process that may open only so many files has lower limits than these.
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

    /// Connections that may wait for a place of their address, of all addresses. Each holds a descriptor.
    pub fn connections_waiting_max(&self) -> usize {
        (self.connections_max / 2).max(1)
    }
}

/// All that a configuration is made of. What comes later here overrides what comes earlier.
#[derive(Clone, Debug)]
pub struct Sources<'a> {
    /// Where the cache is when nobody says so.
    pub data: PathBuf,
    /// The folder `certs` of the working directory, if there is one that may be ours: without a file, certificates are
    /// there, else in the cache's folder.
    pub working_dir_certs: Option<PathBuf>,
    /// The text of the file; empty without one.
    pub text: &'a str,
    /// The file's name, for the faults and for relative paths; empty without one: then relative paths start at the
    /// working directory.
    pub origin: &'a Path,
    /// The environment. Only what begins with `IFNEWER_` counts.
    pub variables: Vec<(String, String)>,
    /// The command line.
    pub flags: Vec<Flag>,
}

impl Config {
    /// Reads a text without environment and flags. `origin` names it in the faults; paths in it are relative to the
    /// folder of `origin`.
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

    /// Reads everything. All faults are told at once; only where the text is not TOML, or where values are wrong on
    /// which others depend, may mending them bring up more.
    pub fn gather(sources: &Sources<'_>) -> Result<Self, Diagnostics> {
        let mut report = Report::new(sources.text, sources.origin);
        if sources.text.len() > TEXT_BYTES_MAX {
            report.emit(
                &Origin::Span(0..0),
                "",
                format!("longer than {TEXT_BYTES_MAX} bytes"),
                None,
            );
            return Err(report.into_diagnostics());
        }
        let mut document = Document::read(sources.text, &mut report);
        if document.is_malformed {
            return Err(report.into_diagnostics());
        }
        env::apply_overrides(&mut document, sources, &mut report);
        match load::load(&document, sources, &mut report) {
            Ok(config) if report.is_empty() => Ok(config),
            _ => Err(report.into_diagnostics()),
        }
    }

    /// What is in effect, in words and without secrets.
    pub fn summary(&self) -> Summary<'_> {
        Summary(self)
    }

    /// The hosts of the upstreams, and of token services in whose place tokens are given, without ports: what certificates are made for.
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

    /// The CAs of client certificates, DER.
    pub fn client_roots(&self) -> &[Vec<u8>] {
        self.access
            .as_ref()
            .map_or(&[], |access| access.client_roots.as_slice())
    }

    /// The upstream of that name or host.
    pub fn upstream(&self, name_or_host: &str) -> Option<&UpstreamConfig> {
        self.upstreams
            .iter()
            .find(|upstream| upstream.has_name(name_or_host))
    }
}
