//! Parsers of networks and host patterns: `10.0.0.0/8`, `*.example.org:8443`, `http://minio.internal:9000`.

use std::fmt;
use std::net::IpAddr;

use super::address::{host, host_part};
use super::value::{ValueError, invalid};
pub use crate::upstream::Network;
use crate::upstream::{HostPattern, NetworkError, RedirectRule, RedirectTarget};

/// Default port of a host pattern.
const HTTPS: u16 = 443;

pub(super) fn network(text: &str) -> Result<Network, ValueError> {
    let example = r#"write it as in "10.0.0.0/8", "192.0.2.7" or "fd00::/8""#;
    match Network::read(text) {
        Ok(network) => Ok(network),
        Err(NetworkError::Address) => invalid(format!("`{text}` is not a network"), example),
        Err(NetworkError::Length) => invalid(format!("`{text}` has an invalid prefix length"), example),
    }
}

/// Allowed `CONNECT` target: a host or a glob over hosts, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelRule {
    host: HostPattern,
    port: u16,
}

impl TunnelRule {
    /// Whether the rule matches this host (lower case, without brackets) and port.
    pub fn allows(&self, host: &str, port: u16) -> bool {
        self.host.matches(host) && self.port == port
    }

    /// Whether the rule names a single host.
    pub fn is_exact(&self) -> bool {
        self.host.is_exact()
    }
}

impl fmt::Display for TunnelRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

pub(super) fn tunnel(text: &str) -> Result<TunnelRule, ValueError> {
    let example = r#"write it as in "auth.example.org", "*.example.org" or "example.org:8443""#;
    let (host, port) = host_pattern(text, example)?;
    Ok(TunnelRule {
        host,
        port: port.unwrap_or(HTTPS),
    })
}

fn host_pattern(text: &str, example: &str) -> Result<(HostPattern, Option<u16>), ValueError> {
    // Validate the host syntax with each star replaced by a letter.
    host(&text.replace('*', "x"))?;
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => match port.parse() {
            Ok(port) => (name, Some(port)),
            Err(_) => return invalid(format!("`{text}` is not a host"), example),
        },
        _ => (text, None),
    };
    match HostPattern::read(name) {
        Some(host) => Ok((host, port)),
        None => invalid(format!("`{text}` is not a glob over hosts"), example),
    }
}

/// Parses a redirect target: a host, a glob over hosts or a network; `http://` allows plain HTTP.
pub(super) fn redirect(text: &str) -> Result<RedirectRule, ValueError> {
    let example = r#"write it as in "s3.example.org", "http://minio.internal:9000" or "10.20.0.0/16""#;
    let (plain, rest) = match text.split_once("://") {
        Some(("http", rest)) => (true, rest),
        Some(("https", rest)) => (false, rest),
        Some(_) => {
            return invalid("redirects are followed to http:// and https:// only", example);
        }
        None => (false, text),
    };
    let is_url = rest.len() < text.len();
    match Network::read(rest.trim_start_matches('[').trim_end_matches(']')) {
        // A URL with an address is a host, with the default port.
        Ok(_) if is_url && !rest.contains('/') => {}
        Ok(network) if network.is_everything() => {
            return invalid(
                format!("`{text}` includes every address"),
                r#"write the network of the storage, as in "10.20.0.0/16""#,
            );
        }
        Ok(network) => {
            let to = RedirectTarget::Network(network);
            return Ok(RedirectRule { plain, to });
        }
        Err(NetworkError::Length) => {
            return invalid(format!("`{text}` has an invalid prefix length"), example);
        }
        Err(NetworkError::Address) => {} // A host, perhaps.
    }
    if rest.contains('/') {
        return invalid(
            format!("`{text}` has a path"),
            "remove the path: only host and port count",
        );
    }
    let (host, port) = host_pattern(rest, example)?;
    let is_address = host_part(rest).parse::<IpAddr>().is_ok();
    if !is_address && !rest.contains(|c: char| c.is_ascii_alphabetic()) {
        return invalid(
            format!("`{text}` is neither a host nor a network"),
            r#"for addresses, write the network as in "10.20.0.0/16"; a glob needs a part of a name, as in "*.example.org""#,
        );
    }
    let to = RedirectTarget::Host(host, port);
    Ok(RedirectRule { plain, to })
}
