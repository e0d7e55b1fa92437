//! Checks of dockerd: configuration file, effective configuration and trust.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::Value;

use super::host::without_password;
use super::http_probe::{self, Target};
use super::{Check, CheckContext, canary};
use crate::setup::FileSource;

/// System CA bundles read by Go programs: Debian, RHEL, Alpine.
const BUNDLES: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

impl CheckContext<'_> {
    /// Whether a URL is an address of the cache. If the cache listens on every address, any address with its port may
    /// be.
    pub(super) fn is_ours(&self, url: &str) -> bool {
        let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
        let authority = authority.split('/').next().unwrap_or_default();
        let Ok(authority) = authority.parse::<http::uri::Authority>() else {
            return false;
        };
        if self
            .endpoint
            .as_ref()
            .is_ok_and(|endpoint| authority.as_str() == endpoint.host_port())
        {
            return true;
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = authority
            .port_u16()
            .unwrap_or(if url.starts_with("https") { 443 } else { 80 });
        let is_named = self.config.tls.names.iter().any(|name| name == host);
        let ip = host.parse::<IpAddr>().ok();
        let is_loopback = host == "localhost" || ip.is_some_and(|ip| ip.is_loopback());
        self.config.listen.registry.iter().any(|listener| {
            let reaches = match listener.ip() {
                every if every.is_unspecified() => is_loopback || ip.is_some(),
                one => ip == Some(one) || is_loopback && one.is_loopback(),
            };
            listener.port() == port && (is_named || reaches)
        })
    }

    fn socket(&self) -> PathBuf {
        self.root.resolve(&self.options.docker)
    }
}

pub(super) async fn examine(context: &CheckContext<'_>) -> Vec<Check> {
    let socket = context.socket();
    let info = http_probe::get(Target::Unix(&socket), "/info").await;
    let info = match info {
        Ok(reply) => reply
            .json()
            .ok_or_else(|| io::Error::other(format!("/info responds {}", reply.status))),
        Err(error) => Err(error),
    };
    let absent = info
        .as_ref()
        .is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    let mut checks = Vec::new();
    if absent
        && !context
            .root
            .resolve(Path::new("/etc/docker/daemon.json"))
            .exists()
    {
        checks.push(Check::skipped(
            "docker",
            format!("no Docker daemon found ({})", socket.display()),
        ));
        checks.push(canary::canary_skipped(
            "there is no Docker daemon for the test pull",
        ));
        return checks;
    }
    checks.push(file(context, info.as_ref().ok()));
    let info = match info {
        Ok(info) => info,
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::PermissionDenied => "run this as root",
                _ => "start it with systemctl start docker",
            };
            checks.push(Check::failed(
                "docker",
                format!("the daemon at {}: {error}", socket.display()),
                remedy,
            ));
            checks.push(canary::canary_skipped("the Docker daemon does not respond"));
            return checks;
        }
    };
    let uses = Uses::read(context, &info);
    checks.push(uses.check(&info));
    checks.push(trust(context, &uses).await);
    checks.push(detour(context, &info, &uses));
    checks.push(canary::pull_canary(context, &socket).await);
    checks
}

/// Checks `daemon.json`. A missing file is not a failure if dockerd is configured by its command line or a proxy.
fn file(context: &CheckContext<'_>, info: Option<&Value>) -> Check {
    const NAME: &str = "docker-file";
    let path = Path::new("/etc/docker/daemon.json");
    let bytes = match context.root.read(path) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Check::skipped(NAME, format!("{} does not exist", path.display())),
        Err(refused) => return Check::failed(NAME, refused.to_string(), ""),
    };
    let value: Value = match serde_json::from_slice(&bytes) {
        Ok(value) => value,
        Err(error) => {
            return Check::failed(
                NAME,
                format!("{}: {error}", path.display()),
                "dockerd does not start with this file; correct it",
            );
        }
    };
    let mirrors = texts(value.get("registry-mirrors"));
    let in_effect = info
        .map(|info| texts(info.pointer("/RegistryConfig/Mirrors")))
        .unwrap_or_default();
    match mirrors.iter().find(|mirror| context.is_ours(mirror)) {
        Some(mirror) if info.is_some() && !in_effect.iter().any(|used| same(used, mirror)) => Check::failed(
            NAME,
            format!(
                "{} names {mirror}, but the daemon does not use it",
                path.display()
            ),
            "run kill -HUP $(cat /run/docker.pid); if that does not help, dockerd uses another --config-file",
        ),
        Some(mirror) => Check::ok(NAME, format!("{} names {mirror}", path.display())),
        None if in_effect.iter().any(|mirror| context.is_ours(mirror)) => Check::skipped(
            NAME,
            format!(
                "{} does not name this cache, but the daemon uses it: from its command line, or until its next start",
                path.display()
            ),
        ),
        None => Check::skipped(
            NAME,
            format!("{} does not name this cache as a mirror", path.display()),
        ),
    }
}

/// Whether dockerd uses a mirror, a proxy or neither.
#[derive(Debug, PartialEq, Eq)]
enum Uses {
    Mirror { url: String, position: usize },
    Proxy(String),
    Nothing,
}

impl Uses {
    fn read(context: &CheckContext<'_>, info: &Value) -> Self {
        let proxy = info.get("HttpsProxy").and_then(Value::as_str).unwrap_or_default();
        if context.is_ours(proxy) {
            return Self::Proxy(proxy.to_owned());
        }
        let mirrors = texts(info.pointer("/RegistryConfig/Mirrors"));
        let position = mirrors.iter().position(|mirror| context.is_ours(mirror));
        match position.and_then(|position| Some((position, mirrors.into_iter().nth(position)?))) {
            Some((position, url)) => Self::Mirror { url, position },
            None => Self::Nothing,
        }
    }

    fn check(&self, info: &Value) -> Check {
        const NAME: &str = "docker";
        let version = info.get("ServerVersion").and_then(Value::as_str).unwrap_or("?");
        match self {
            Self::Mirror { url, position: 0 } => {
                Check::ok(NAME, format!("dockerd {version} uses the mirror {url}"))
            }
            Self::Mirror { url, position } => Check::failed(
                NAME,
                format!("dockerd {version} requests {position} other mirrors before {url}"),
                "move it to the front of registry-mirrors",
            ),
            Self::Proxy(url) => Check::ok(NAME, format!("dockerd {version} uses the proxy {url}")),
            Self::Nothing => Check::failed(
                NAME,
                format!(
                    "dockerd {version} does not use this cache (its mirrors: {})",
                    match texts(info.pointer("/RegistryConfig/Mirrors")).join(", ") {
                        none if none.is_empty() => "none".to_owned(),
                        some => some,
                    }
                ),
                "run ifnewer setup docker --apply",
            ),
        }
    }
}

/// The CA as dockerd sees it: its folder for the cache's address, and the system bundle.
async fn trust(context: &CheckContext<'_>, uses: &Uses) -> Check {
    const NAME: &str = "docker-trust";
    let (address, by_proxy) = match uses {
        Uses::Mirror { url, .. } => match url.trim_end_matches('/').split_once("://") {
            Some(("https", address)) => (address, false),
            _ => return Check::ok(NAME, format!("{url} needs no certificate")),
        },
        Uses::Proxy(_) => ("", true),
        Uses::Nothing => return Check::skipped(NAME, "the daemon does not use this cache"),
    };
    let mut roots = Vec::new();
    for bundle in BUNDLES {
        roots.extend(certificates(context, Path::new(bundle)));
    }
    if by_proxy {
        let ca = CertificateDer::pem_file_iter(context.config.tls.folder.join("ca.pem"))
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .unwrap_or_default();
        return match ca.first() {
            Some(ca) if roots.contains(ca) => Check::ok(
                NAME,
                "the system trust store contains the CA of the cache; dockerd read it at its start",
            ),
            _ => Check::failed(
                NAME,
                "the system trust store lacks the CA of the cache, which issues the certificates that the proxy shows",
                "run ifnewer ca install, then systemctl restart docker",
            ),
        };
    }
    let folder = Path::new("/etc/docker/certs.d").join(address);
    for path in context.root.list(&folder).unwrap_or_default() {
        if path.extension().is_some_and(|extension| extension == "crt") {
            roots.extend(certificates(context, &path));
        }
    }
    let Ok(authority) = address.parse::<http::uri::Authority>() else {
        return Check::failed(
            NAME,
            format!("https://{address} is not a valid address"),
            "run ifnewer setup docker --apply",
        );
    };
    let port = authority.port_u16().unwrap_or(443);
    let loopback = authority.host().starts_with("127.") || authority.host() == "localhost";
    match http_probe::get(Target::Tls(authority.host(), port, &roots), "/v2/").await {
        Ok(_) => Check::ok(NAME, format!("dockerd's trusted CAs verify https://{address}")),
        Err(_) if loopback => Check::ok(
            NAME,
            format!("dockerd does not verify https://{address}, because it is loopback"),
        ),
        Err(error) => Check::failed(
            NAME,
            format!("https://{address}, verified with dockerd's trusted CAs: {error}"),
            "run ifnewer setup docker --apply, or ifnewer ca install --into docker",
        ),
    }
}

fn certificates(context: &CheckContext<'_>, path: &Path) -> Vec<CertificateDer<'static>> {
    let bytes = context.root.read(path).ok().flatten().unwrap_or_default();
    CertificateDer::pem_slice_iter(&bytes)
        .filter_map(Result::ok)
        .collect()
}

/// dockerd uses its proxy for a mirror that is not on loopback, unless `NO_PROXY` excludes it.
fn detour(context: &CheckContext<'_>, info: &Value, uses: &Uses) -> Check {
    const NAME: &str = "docker-proxy";
    let text = |name: &str| info.get(name).and_then(Value::as_str).unwrap_or_default();
    let Uses::Mirror { url, .. } = uses else {
        return Check::skipped(NAME, "no mirror is used");
    };
    let proxy = if url.starts_with("https") {
        text("HttpsProxy")
    } else {
        text("HttpProxy")
    };
    let address = url
        .split_once("://")
        .map_or("", |(_, rest)| rest.trim_end_matches('/'));
    let authority = address.parse::<http::uri::Authority>().ok();
    let host = authority.as_ref().map_or("", |authority| authority.host());
    let loopback = context
        .endpoint
        .as_ref()
        .is_ok_and(crate::setup::CacheEndpoint::is_loopback)
        || host.starts_with("127.");
    let exempt = text("NoProxy").split(',').map(str::trim).any(|rule| {
        let suffix = rule.trim_start_matches('.');
        rule == "*"
            || !suffix.is_empty()
                && (host == suffix || host.ends_with(&format!(".{suffix}")) || address == rule)
    });
    if proxy.is_empty() {
        Check::ok(NAME, "dockerd uses no proxy for the mirror")
    } else if loopback || exempt {
        Check::ok(
            NAME,
            format!(
                "dockerd does not use its proxy {} for {address}",
                without_password(proxy)
            ),
        )
    } else {
        Check::failed(
            NAME,
            format!("dockerd uses its proxy {} for {address}", without_password(proxy)),
            format!("add {host} to its NO_PROXY and restart it"),
        )
    }
}

fn texts(list: Option<&Value>) -> Vec<String> {
    let items = list.and_then(Value::as_array).into_iter().flatten();
    items
        .filter_map(|item| item.as_str().map(str::to_owned))
        .collect()
}

/// dockerd appends a slash to its mirrors.
fn same(one: &str, other: &str) -> bool {
    one.trim_end_matches('/') == other.trim_end_matches('/')
}
