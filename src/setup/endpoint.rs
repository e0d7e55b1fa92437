//! Endpoint of the cache for a client: address, scheme, and CA if needed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use http::uri::{Authority, Uri};
use pem::{EncodeConfig, LineEnding, Pem};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::{Client, Options, SetupError};
use crate::config::{Config, PlainHttp, UpstreamConfig};

/// Scheme of the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Plain HTTP.
    Http,
    /// HTTPS with certificate verification.
    Https,
}

/// Endpoint of the cache for a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheEndpoint {
    /// The scheme.
    pub scheme: Scheme,
    /// The host; an IPv6 address in brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The CA to trust; `None` for plain HTTP and for a certificate configured by the operator.
    pub ca: Option<CaBundle>,
    /// The registries that the cache serves.
    pub upstreams: Vec<Registry>,
    /// Warnings for the operator.
    pub warnings: Vec<String>,
}

/// A registry as clients name it without a mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registry {
    /// The upstream's name, with a port if it has one.
    pub name: Arc<str>,
    /// Whether the registry is plain HTTP, so that a client can fall back to it only by HTTP.
    pub plain_http: bool,
}

impl Registry {
    /// The registry of an upstream.
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

/// CA certificates as PEM, without anything else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaBundle(String);

impl CaBundle {
    /// Reads the certificates of a file; a private key in it is ignored.
    pub fn read(path: &Path) -> Result<Self, SetupError> {
        let unusable = |detail: String| SetupError::NoCa(format!("{} {detail}", path.display()));
        let bytes = std::fs::read(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => unusable(
                "does not exist; `ifnewer` creates the certificate authority at its first start. If its service has \
                 settings in its unit (IFNEWER_TLS_FOLDER), use the same for this command. For a cache on another \
                 host, copy the output of `ifnewer ca export` from there and set it with --ca"
                    .to_owned(),
            ),
            _ => SetupError::file("failed to read", path)(error),
        })?;
        Self::of(&bytes).ok_or_else(|| unusable("contains no certificate in PEM format".to_owned()))
    }

    /// The certificates in a PEM text.
    pub fn of(pem: &[u8]) -> Option<Self> {
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<_, _>>()
            .ok()?;
        let format = EncodeConfig::new().set_line_ending(LineEnding::LF);
        let encode = |der: &CertificateDer<'_>| pem::encode_config(&Pem::new("CERTIFICATE", &**der), format);
        let text: String = certificates.iter().map(encode).collect();
        (!text.is_empty()).then_some(Self(text))
    }

    /// As PEM.
    pub fn pem(&self) -> &str {
        &self.0
    }
}

impl CacheEndpoint {
    /// Determines the endpoint from the options or the configuration.
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
                "{} does not support a mirror with an IPv6 address ({host}); set a name or an IPv4 address with \
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
        // dockerd does not verify certificates of 127.0.0.0/8, so it needs no CA for them. It verifies those of ::1.
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
        let name = without_brackets(&self.host);
        let mut listening = config.listen.registry.iter();
        let is_named = is_loopback(&self.host)
            || config.tls.names.iter().any(|known| known == name)
            || listening.any(|known| known.ip().to_string() == name);
        if self.scheme == Scheme::Https && self.ca.is_some() && options.ca.is_none() && !is_named {
            self.warnings.push(format!(
                "the server certificate must contain {name}: unless it is this host's own name, add it to `names` of \
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

    /// Whether the endpoint is on loopback.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

/// `host:port`, or a URL without a path.
fn parse_address(address: &str) -> Result<(Option<Scheme>, String, u16), SetupError> {
    let wrong = || {
        SetupError::Address(format!(
            "--address {address} is invalid: use a host and a port, as in cache.example.org:5000, or a URL, as in \
             https://cache.example.org"
        ))
    };
    let (scheme, default_port) = match address.split_once("://") {
        Some(("http", _)) => (Some(Scheme::Http), Some(80)),
        Some(("https", _)) => (Some(Scheme::Https), Some(443)),
        Some(_) => return Err(wrong()),
        None => (None, None),
    };
    let url = scheme.map_or_else(|| format!("any://{address}"), |_| address.to_owned());
    let url: Uri = url.parse().map_err(|_| wrong())?;
    let is_all = |authority: &&Authority| address.trim_end_matches('/').ends_with(authority.as_str());
    let authority = url.authority().filter(is_all).ok_or_else(wrong)?;
    let port = match authority.port_u16() {
        None if authority.as_str() == authority.host() => default_port,
        port => port,
    };
    let port = port.filter(|port| *port != 0).ok_or_else(wrong)?;
    let host = authority.host().to_ascii_lowercase();
    let allowed =
        |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '-' | ':' | '[' | ']');
    if host.is_empty() || authority.as_str().contains('@') || !host.chars().all(allowed) {
        return Err(wrong());
    }
    Ok((scheme, host, port))
}

/// The listening address best suited for the client.
fn listen_address(config: &Config, options: &Options) -> Result<(Option<Scheme>, String, u16), SetupError> {
    let all = &config.listen.registry;
    let is_here = |address: &SocketAddr| address.ip().is_loopback() || address.ip().is_unspecified();
    let is_usable = |address: &SocketAddr| options.client.takes_ipv6() || address.is_ipv4();
    let chosen = if options.client.is_in_containers() {
        all.iter().find(|address| !is_here(address))
    } else {
        all.iter()
            .min_by_key(|address| (!is_usable(address), !is_here(address)))
    };
    let Some(chosen) = chosen else {
        let port = all.first().map_or(5000, SocketAddr::port);
        return Err(match all.iter().find(|address| address.ip().is_unspecified()) {
            Some(_) => SetupError::Address(format!(
                "the address at which containers reach this host is unknown; set it with --address. On Docker's \
                 default bridge it is 172.17.0.1:{port}"
            )),
            None => unreachable_from_containers("127.0.0.1", port),
        });
    };
    if chosen.port() == 0 {
        return Err(SetupError::Address(
            "listen.registry has port 0, so the system chooses the port; set the chosen one with --address"
                .to_owned(),
        ));
    }
    Ok((None, client_host(*chosen), chosen.port()))
}

/// The host for a listening address; loopback for the unspecified address.
fn client_host(address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
        // Linux usually accepts IPv4 on it too; the IPv6 loopback is accepted in any case.
        IpAddr::V6(ip) if ip.is_unspecified() => format!("[{}]", Ipv6Addr::LOCALHOST),
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

fn unreachable_from_containers(host: &str, port: u16) -> SetupError {
    SetupError::Address(format!(
        "inside a container, {host} is the container and not this host. Add an address that containers reach \
         (listen.registry = [\"127.0.0.1:{port}\", \"172.17.0.1:{port}\"] on Docker's default bridge), or set the \
         address with --address"
    ))
}

fn without_brackets(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

fn is_loopback(host: &str) -> bool {
    let name = without_brackets(host);
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
