//! How a client reaches us: the address, the scheme, and the certificate authority where it is needed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use http::uri::{Authority as HostAndPort, Uri};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::{Client, Options, SetupError};
use crate::config::{Config, PlainHttp, UpstreamConfig};

/// Whether the client speaks TLS with us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// It does not.
    Http,
    /// It does, and verifies our certificate.
    Https,
}

/// How a client reaches us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheEndpoint {
    /// Whether the client speaks TLS.
    pub scheme: Scheme,
    /// The host, an IPv6 address in brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// What the client has to trust; `None` where TLS is not spoken, or its certificate is the operator's own.
    pub ca: Option<CaBundle>,
    /// The registries that clients may ask us for.
    pub upstreams: Vec<Registry>,
    /// What the client should be warned of.
    pub warnings: Vec<String>,
}

/// A registry as clients know it without a mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registry {
    /// The upstream's name, with a port where it has one.
    pub name: Arc<str>,
    /// Whether the registry of that name speaks plain HTTP, so that a client may fall back to it only so.
    pub plain_http: bool,
}

impl Registry {
    /// The registry that an upstream stands for.
    fn of(upstream: &UpstreamConfig) -> Self {
        let name = Arc::clone(&upstream.name);
        let own = format!("http://{name}");
        let plain_http = upstream
            .urls
            .iter()
            .any(|url| url.address.trim_end_matches('/') == own);
        Self { name, plain_http }
    }
}

/// Certificates to trust, as PEM and nothing but certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaBundle(String);

impl CaBundle {
    /// Reads the certificates of a file; a private key beside them is left out.
    pub fn read(path: &Path) -> Result<Self, SetupError> {
        let unusable = |detail: String| SetupError::NoCa(format!("{}: {detail}", path.display()));
        let bytes = std::fs::read(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => unusable(
                "there is no certificate authority yet. It is made when `ifnewer` first starts. If its service has \
                 settings in its unit (IFNEWER_TLS_FOLDER), give this command the same; for a cache on another host, \
                 take the output of `ifnewer ca export` there and name it by --ca"
                    .to_owned(),
            ),
            _ => SetupError::file("cannot read", path, error),
        })?;
        Self::of(&bytes).ok_or_else(|| unusable("it holds no certificate (PEM)".to_owned()))
    }

    /// The certificates in a PEM text.
    pub fn of(pem: &[u8]) -> Option<Self> {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<_, _>>()
            .ok()?;
        let text: String = certificates.iter().map(|der| encode(der)).collect();
        (!text.is_empty()).then_some(Self(text))
    }

    /// As PEM.
    pub fn pem(&self) -> &str {
        &self.0
    }
}

/// RFC 7468: lines of 64 characters.
fn encode(der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, further) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = further;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

impl CacheEndpoint {
    /// From the configuration, or from the address given.
    pub fn from_config(config: &Config, options: &Options) -> Result<Self, SetupError> {
        let (scheme, host, port) = match &options.address {
            Some(address) => parse_address(address)?,
            None => listen_address(config, options)?,
        };
        let loopback = is_loopback(&host);
        if loopback && options.client.is_in_containers() {
            return Err(unreachable_from_containers(&host, port));
        }
        if host.starts_with('[') && !options.client.takes_ipv6() {
            return Err(SetupError::Address(format!(
                "{} cannot be told of a mirror that is an IPv6 address ({host}); give a name or an IPv4 address by \
                 --address",
                options.client.name()
            )));
        }
        let plain = match config.listen.plain_http {
            PlainHttp::Any => true,
            PlainHttp::Loopback => loopback,
            PlainHttp::Off => false,
        };
        let scheme = scheme.unwrap_or(if plain { Scheme::Http } else { Scheme::Https });
        // dockerd does not verify certificates of 127.0.0.0/8, where a CA would be of no use to it. Of ::1 it does.
        let is_trusted = loopback && !host.starts_with('[') && options.client == Client::Docker;
        let verifies = scheme == Scheme::Https && !is_trusted;
        let ca = match (&options.ca, &config.tls.certificate) {
            (Some(path), _) => Some(CaBundle::read(path)?),
            (None, None) if verifies => Some(CaBundle::read(&config.tls.folder.join("ca.pem"))?),
            _ => None,
        };
        let mut endpoint = Self {
            scheme,
            host,
            port,
            ca,
            upstreams: config.upstreams.iter().map(Registry::of).collect(),
            warnings: Vec::new(),
        };
        endpoint.warn(config, options);
        Ok(endpoint)
    }

    fn warn(&mut self, config: &Config, options: &Options) {
        let name = self.host.trim_start_matches('[').trim_end_matches(']');
        let is_address = name.parse::<IpAddr>().is_ok();
        let is_listen_address = || {
            config
                .listen
                .registry
                .iter()
                .any(|known| known.ip().to_string() == name)
        };
        let is_named = is_loopback(&self.host)
            || config.tls.names.iter().any(|known| known == name)
            || is_address && is_listen_address();
        if self.scheme == Scheme::Https && self.ca.is_some() && options.ca.is_none() && !is_named {
            self.warnings.push(format!(
                "{name} must stand on our certificate: unless it is this host's own name, write it into `names` of \
                 [tls] (names = [\"{name}\"]) and reload ifnewer by SIGHUP"
            ));
        }
    }

    /// `http://127.0.0.1:5000`
    pub fn url(&self) -> String {
        let scheme = match self.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        format!("{scheme}://{}", self.host_port())
    }

    /// `127.0.0.1:5000`
    pub fn host_port(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// Whether the client reaches us without a network.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

/// `host:port`, or a URL without a path.
fn parse_address(address: &str) -> Result<(Option<Scheme>, String, u16), SetupError> {
    let wrong = || {
        SetupError::Address(format!(
            "--address {address}: write a host and a port, as in cache.example.org:5000, or a URL, as in \
             https://cache.example.org"
        ))
    };
    let (scheme, host_port) = match address.split_once("://") {
        Some(("http", _)) => (Some(Scheme::Http), address),
        Some(("https", _)) => (Some(Scheme::Https), address),
        Some(_) => return Err(wrong()),
        None => (None, address),
    };
    let host_port: HostAndPort = if scheme.is_some() {
        let uri: Uri = host_port.parse().map_err(|_| wrong())?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong());
        }
        uri.authority().cloned().ok_or_else(wrong)?
    } else {
        host_port.parse().map_err(|_| wrong())?
    };
    let usual = match scheme {
        Some(Scheme::Http) => Some(80),
        Some(Scheme::Https) => Some(443),
        None => None,
    };
    let port = host_port
        .port_u16()
        .or(usual)
        .filter(|port| *port != 0)
        .ok_or_else(wrong)?;
    let host = host_port.host().to_ascii_lowercase();
    let allowed =
        |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '-' | ':' | '[' | ']');
    if host.is_empty() || host_port.as_str().contains('@') || !host.chars().all(allowed) {
        return Err(wrong());
    }
    Ok((scheme, host, port))
}

/// The address listened on that suits the client best.
fn listen_address(config: &Config, options: &Options) -> Result<(Option<Scheme>, String, u16), SetupError> {
    let all = &config.listen.registry;
    let usable =
        |address: &&SocketAddr| options.client.takes_ipv6() || !client_host(**address).starts_with('[');
    let chosen = if options.client.is_in_containers() {
        let from_outside =
            |address: &&SocketAddr| !address.ip().is_loopback() && !address.ip().is_unspecified();
        all.iter().find(from_outside)
    } else {
        let here = |address: &&SocketAddr| address.ip().is_loopback() || address.ip().is_unspecified();
        let suitable = || all.iter().filter(usable);
        suitable()
            .find(here)
            .or_else(|| suitable().next())
            .or(all.first())
    };
    let Some(chosen) = chosen else {
        let port = all.first().map_or(5000, SocketAddr::port);
        return Err(match all.iter().find(|address| address.ip().is_unspecified()) {
            Some(_) => SetupError::Address(format!(
                "which of this host's addresses containers reach is not known; give it by --address. On Docker's \
                 usual bridge it is 172.17.0.1:{port}"
            )),
            None => unreachable_from_containers("127.0.0.1", port),
        });
    };
    if chosen.port() == 0 {
        return Err(SetupError::Address(
            "listen.registry lets the system choose the port; give the one that it chose by --address"
                .to_owned(),
        ));
    }
    Ok((None, client_host(*chosen), chosen.port()))
}

/// The host to name for an address listened on: for "every address", the one that this host always has.
fn client_host(address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
        // Linux accepts IPv4 on it as well unless told otherwise; the IPv6 loopback is there either endpoint.
        IpAddr::V6(ip) if ip.is_unspecified() => format!("[{}]", Ipv6Addr::LOCALHOST),
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

fn unreachable_from_containers(host: &str, port: u16) -> SetupError {
    SetupError::Address(format!(
        "{host} inside a container is the container, not this host. Let ifnewer listen where containers reach it \
         (listen.registry = [\"127.0.0.1:{port}\", \"172.17.0.1:{port}\"] on Docker's usual bridge), or give the \
         address by --address"
    ))
}

fn is_loopback(host: &str) -> bool {
    let name = host.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
