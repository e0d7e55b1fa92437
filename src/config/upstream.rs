//! Sections `[upstream."name"]`: well-known and configured upstreams.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::diagnostic::{Origin, Report, Reported};
use super::document::Document;
use super::files::{self, docker_config, password_file};
use super::schema::Section;
use super::table::Table;
use super::{address, parsers, validate};
use crate::oci::Repository;
use crate::policy::rules::PolicyOverrides;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// Parsed upstream with its locations, for checks across sections.
pub(super) struct ParsedUpstream {
    pub(super) name: Arc<str>,
    pub(super) table: Table,
    pub(super) changes: PolicyOverrides,
    pub(super) hosts: Vec<(Origin, String)>,
    pub(super) urls: Vec<(Origin, String)>,
    /// Result of parsing; errors are already reported.
    state: State,
}

enum State {
    Enabled(Box<UpstreamConfig>),
    Disabled,
    Invalid,
}

impl ParsedUpstream {
    pub(super) fn into_config(self) -> Option<UpstreamConfig> {
        match self.state {
            State::Enabled(config) => Some(*config),
            State::Disabled | State::Invalid => None,
        }
    }

    pub(super) fn token_host(&self) -> Option<&str> {
        match &self.state {
            State::Enabled(config) => config.token_host(),
            State::Disabled | State::Invalid => None,
        }
    }

    pub(super) fn is_disabled(&self) -> bool {
        matches!(self.state, State::Disabled)
    }
}

/// Well-known upstreams with the file's overrides, then the others in the order of the file.
pub(super) fn read_all(document: &Document, report: &mut Report<'_>) -> Vec<ParsedUpstream> {
    let untouched = |known: &WellKnown| Table::new(Section::Upstream, known.name, Origin::Default);
    let of_file = |known: &WellKnown| {
        document
            .upstreams
            .iter()
            .find(|table| table.name == known.name)
            .cloned()
    };
    let known = WELL_KNOWN
        .iter()
        .map(|known| of_file(known).unwrap_or_else(|| untouched(known)));
    let others = document
        .upstreams
        .iter()
        .filter(|table| well_known(&table.name).is_none())
        .cloned();
    let configured: Vec<_> = known.chain(others).map(|table| read(table, report)).collect();
    validate::check_hosts_unique(&configured, report);
    configured
}

fn well_known(name: &str) -> Option<&'static WellKnown> {
    WELL_KNOWN.iter().find(|known| known.name == name)
}

fn read(table: Table, report: &mut Report<'_>) -> ParsedUpstream {
    let name: Arc<str> = Arc::from(table.name.as_str());
    let is_named = check_name(&table, report);
    let enabled = table.bool(report, "enabled");
    let changes = super::load::changes(&table, report);
    let urls = urls(&table, report);
    let prefixes = repository_prefixes(&table, urls.as_ref().map_or(0, Vec::len), report);
    let hosts = hosts(&table, report);
    let auth = table.text(report, "auth", &parsers::AUTH);
    let credential = auth.and_then(|auth| credential(&table, auth, report));
    let local_tokens = auth.and_then(|auth| local_tokens(&table, auth, report));
    let token_hosts = table.list(report, "token_hosts", &parsers::HOST);
    // The well-known token hosts apply only to the well-known URL.
    let own_registry = well_known(&table.name)
        .filter(|known| {
            urls.as_ref()
                .is_ok_and(|urls| urls.iter().all(|(_, url)| *url == known.url))
        })
        .map(|known| known.token_hosts.iter().map(|&host| host.to_owned()));
    let roots = files::roots(&table, "ca_file", report);
    let client_certificate = files::client_certificate(&table, report);
    let redirects = table.list(report, "redirects", &parsers::REDIRECT);
    let proxy = table.text(report, "proxy", &parsers::PROXY);
    let connect_timeout = table.text(report, "connect_timeout", &parsers::TIMEOUT);
    let first_byte_timeout = table.text(report, "first_byte_timeout", &parsers::TIMEOUT);
    if let (Ok(connect), Ok(first_byte)) = (connect_timeout, first_byte_timeout) {
        super::limits::check_connect_timeout(&table, connect, first_byte, report);
    }

    let found_urls = urls.as_ref().map_or_else(|_| Vec::new(), Clone::clone);
    let found_hosts = hosts.as_ref().map_or_else(|_| Vec::new(), Clone::clone);
    let config = || {
        is_named?;
        Ok(UpstreamConfig {
            name: Arc::clone(&name),
            urls: std::iter::zip(urls?, prefixes?)
                .map(|((_, address), repository_prefix)| Url {
                    address,
                    repository_prefix,
                })
                .collect(),
            hosts: hosts?.into_iter().map(|(_, host)| host).collect(),
            auth: auth?,
            local_tokens: local_tokens?,
            credential: credential?,
            token_hosts: token_hosts?
                .into_iter()
                .map(|(_, host)| host)
                .chain(own_registry.into_iter().flatten())
                .collect(),
            roots: roots?,
            client_certificate: client_certificate?,
            redirects: redirects?.into_iter().map(|(_, rule)| rule).collect(),
            proxy: proxy?,
            connect_timeout: connect_timeout?,
            first_byte_timeout: first_byte_timeout?,
        })
    };
    let state = match (enabled, config()) {
        (Ok(false), _) => State::Disabled,
        (Ok(true), Ok::<_, Reported>(config)) => State::Enabled(Box::new(config)),
        _ => State::Invalid,
    };
    let changes = changes.unwrap_or_default();
    ParsedUpstream {
        name,
        table,
        changes,
        hosts: found_hosts,
        urls: found_urls,
        state,
    }
}

/// An upstream name must look like a host. Otherwise an image's first component is part of the repository name.
fn check_name(table: &Table, report: &mut Report<'_>) -> Result<(), Reported> {
    let name = table.name.as_str();
    let path = format!("upstream.\"{name}\"");
    match address::host(name) {
        Ok(_) if name.contains(['.', ':']) || name == "localhost" => Ok(()),
        Ok(_) => {
            let message = format!("`{name}` looks like a repository name");
            let help = "use a host name with a dot or a port, as in image names".to_owned();
            Err(report.emit(&table.at, path, message, Some(help)))
        }
        Err(error) => Err(report.emit(&table.at, path, error.message, error.help)),
    }
}

fn urls(table: &Table, report: &mut Report<'_>) -> Result<Vec<(Origin, String)>, Reported> {
    let Some(urls) = table.list_if_set(report, "url", &parsers::URL, true)? else {
        let url =
            well_known(&table.name).map_or_else(|| format!("https://{}", table.name), |k| k.url.to_owned());
        return Ok(vec![(Origin::Default, url)]);
    };
    if urls.is_empty() {
        let help = "remove the key to use https:// and the upstream's name".to_owned();
        return Err(report.emit(
            table.at("url"),
            table.path("url"),
            "an empty list of URLs",
            Some(help),
        ));
    }
    for (index, (at, url)) in urls.iter().enumerate() {
        if urls.iter().take(index).any(|(_, earlier)| earlier == url) {
            report.emit(at, table.path("url"), format!("`{url}` is listed twice"), None);
        }
    }
    Ok(urls)
}

/// Repository prefix of each URL: one for all URLs, or one per URL.
fn repository_prefixes(
    table: &Table,
    urls: usize,
    report: &mut Report<'_>,
) -> Result<Vec<Option<Repository>>, Reported> {
    const KEY: &str = "repository_prefix";
    let Some(prefixes) = table.list_if_set(report, KEY, &parsers::REPOSITORY_PREFIX, true)? else {
        return Ok(vec![None; urls]);
    };
    let count = prefixes.len();
    let mut prefixes = prefixes.into_iter().map(|(_, prefix)| prefix);
    match (count, prefixes.next()) {
        // The URL errors are already reported.
        _ if urls == 0 => Ok(Vec::new()),
        (1, Some(prefix)) => Ok(vec![prefix; urls]),
        (_, Some(first)) if count == urls => Ok(std::iter::once(first).chain(prefixes).collect()),
        _ => {
            let message = format!("{count} prefixes for {urls} URLs");
            let help = "write one for all of them, or one for each in the order of `url`: \"\" for none";
            Err(report.emit(table.at(KEY), table.path(KEY), message, Some(help.to_owned())))
        }
    }
}

fn hosts(table: &Table, report: &mut Report<'_>) -> Result<Vec<(Origin, String)>, Reported> {
    if let Some(hosts) = table.list_if_set(report, "hosts", &parsers::HOST, false)? {
        return Ok(hosts);
    }
    let hosts = well_known(&table.name).map_or(&[][..], |known| known.hosts);
    Ok(hosts
        .iter()
        .map(|host| (Origin::Default, (*host).to_owned()))
        .collect())
}

/// Keys of the cache's credential; at most one of three sources is allowed.
const CREDENTIAL_KEYS: [&str; 4] = ["username", "password_file", "docker_config", "credential_helper"];

fn credential(
    table: &Table,
    auth: AuthMode,
    report: &mut Report<'_>,
) -> Result<Option<Credential>, Reported> {
    let username = table.text_if_set(report, "username", &parsers::USERNAME);
    let file = table.text_if_set(report, "password_file", &parsers::PATH);
    let docker = table.text_if_set(report, "docker_config", &parsers::PATH);
    let helper = table.text_if_set(report, "credential_helper", &parsers::HELPER);
    let given = |key: &&str| table.is_set(key);
    match (username?, file?, docker?, helper?) {
        (None, None, None, None) => Ok(None),
        (Some(username), Some(file), None, None) => {
            require_shared_auth(table, auth, "username", report)?;
            let file = password_file(table, file, report)?;
            Ok(Some(Credential::Password { username, file }))
        }
        (None, None, Some(file), None) => {
            require_shared_auth(table, auth, "docker_config", report)?;
            docker_config(table, file, report).map(|file| Some(Credential::DockerConfig(file)))
        }
        (None, None, None, Some(helper)) => {
            require_shared_auth(table, auth, "credential_helper", report)?;
            Ok(Some(Credential::Helper(helper)))
        }
        (username, file, None, None) if username.is_some() != file.is_some() => {
            let (given, missing) = if username.is_some() {
                ("username", "password_file")
            } else {
                ("password_file", "username")
            };
            let message = format!("`{given}` without `{missing}`");
            let help = Some(format!("add `{missing}`"));
            Err(report.emit(table.at(given), table.path(given), message, help))
        }
        _ => {
            let keys: Vec<_> = CREDENTIAL_KEYS.into_iter().filter(given).collect();
            let last = keys.last().copied().unwrap_or_default();
            let message = format!("several credentials for one upstream: {}", keys.join(", "));
            let help = "keep one of: `username` with `password_file`, `docker_config`, `credential_helper`"
                .to_owned();
            Err(report.emit(table.at(last), table.path(last), message, Some(help)))
        }
    }
}

fn require_shared_auth(
    table: &Table,
    auth: AuthMode,
    key: &str,
    report: &mut Report<'_>,
) -> Result<(), Reported> {
    if auth == AuthMode::Shared {
        return Ok(());
    }
    let message =
        "a credential of the cache would make this upstream's private images readable by every client";
    let help = "if every client that reaches the listener may read them, add auth = \"shared\"; otherwise remove the \
                credential, and clients use their own";
    Err(report.emit(table.at(key), table.path(key), message, Some(help.to_owned())))
}

fn local_tokens(table: &Table, auth: AuthMode, report: &mut Report<'_>) -> Result<Option<String>, Reported> {
    const KEY: &str = "local_tokens";
    let realm = table.text_if_set(report, KEY, &parsers::REALM)?;
    if realm.is_some() && auth == AuthMode::Shared {
        let message = "with auth = \"shared\" no client needs a token";
        let help = Some("remove one of the two".to_owned());
        return Err(report.emit(table.at(KEY), table.path(KEY), message, help));
    }
    Ok(realm)
}
