//! Networks and hosts that the operator names as a set: `10.0.0.0/8`, `*.example.org:8443`.

use std::fmt;
use std::net::IpAddr;

use globset::{GlobBuilder, GlobMatcher};

use super::address::host;
use super::value::{Wrong, wrong};

/// The port of a host that is named without one.
const HTTPS: u16 = 443;

/// A network in CIDR form (RFC 4632, RFC 4291 §2.3), or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix_bits: u32,
}

impl Network {
    /// Whether an address is in it. IPv4 within IPv6 is seen through.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let differing = own.to_bits() ^ other.to_bits();
                self.prefix_bits == 0 || differing >> (32 - self.prefix_bits) == 0
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let differing = own.to_bits() ^ other.to_bits();
                self.prefix_bits == 0 || differing >> (128 - self.prefix_bits) == 0
            }
            _ => false,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

pub(super) fn network(text: &str) -> Result<Network, Wrong> {
    let example = r#"write it as in "10.0.0.0/8", "192.0.2.7" or "fd00::/8""#;
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return wrong(format!("`{text}` is not a network"), example);
    };
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let prefix_bits = match prefix.map(str::parse) {
        None => bits,
        Some(Ok(prefix_bits)) if prefix_bits <= bits => prefix_bits,
        Some(_) => return wrong(format!("`{text}` has a wrong length after the `/`"), example),
    };
    let network = Network { address, prefix_bits };
    Ok(network)
}

/// Where a `CONNECT` may lead: a host or a glob over hosts, and a port.
#[derive(Clone, Debug)]
pub struct Tunnel {
    host: String,
    glob: Option<GlobMatcher>,
    port: u16,
}

impl PartialEq for Tunnel {
    fn eq(&self, other: &Self) -> bool {
        self.host == other.host && self.port == other.port
    }
}

impl Eq for Tunnel {}

impl Tunnel {
    /// Whether this host (lower case, without brackets) at this port is meant.
    pub fn allows(&self, host: &str, port: u16) -> bool {
        let meant = match &self.glob {
            Some(glob) => glob.is_match(host),
            None => self.host == host,
        };
        meant && self.port == port
    }

    /// Whether one host is named, and not a set of them.
    pub fn is_exact(&self) -> bool {
        self.glob.is_none()
    }
}

impl fmt::Display for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

pub(super) fn tunnel(text: &str) -> Result<Tunnel, Wrong> {
    let example = r#"write it as in "auth.example.org", "*.example.org" or "example.org:8443""#;
    // A star in the place of a label makes no difference to what a host may look like otherwise.
    host(&text.replace('*', "x"))?;
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => match port.parse() {
            Ok(port) => (name, port),
            Err(_) => return wrong(format!("`{text}` is not a host"), example),
        },
        _ => (text, HTTPS),
    };
    let name = name.trim_start_matches('[').trim_end_matches(']').to_owned();
    let glob = if name.contains('*') {
        match GlobBuilder::new(&name).build() {
            Ok(glob) => Some(glob.compile_matcher()),
            Err(_) => return wrong(format!("`{text}` is not a glob over hosts"), example),
        }
    } else {
        None
    };
    Ok(Tunnel {
        host: name,
        glob,
        port,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn a_network_contains_what_begins_like_it() {
        for (text, inside, outside) in [
            (
                "10.0.0.0/8",
                &["10.0.0.1", "10.255.255.255", "::ffff:10.1.1.1"][..],
                &["11.0.0.1", "::1"][..],
            ),
            ("192.0.2.7", &["192.0.2.7"], &["192.0.2.6"]),
            ("0.0.0.0/0", &["1.2.3.4"], &["::1"]),
            ("fd00::/8", &["fd12::1"], &["fe80::1", "253.0.0.1"]),
            ("::/0", &["::1"], &["127.0.0.1"]),
            ("::1", &["::1"], &["::2"]),
        ] {
            let network = network(text).unwrap();
            for address in inside {
                assert!(network.contains(address.parse().unwrap()), "{text} {address}");
            }
            for address in outside {
                assert!(!network.contains(address.parse().unwrap()), "{text} {address}");
            }
        }
        for text in [
            "",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "10.0.0.0/-1",
            "a/8",
            "10.0.0.0/8/8",
        ] {
            assert!(network(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_tunnel_leads_to_one_port() {
        for (text, host, port, allowed) in [
            ("auth.example.org", "auth.example.org", 443, true),
            ("auth.example.org", "auth.example.org", 22, false),
            ("auth.example.org", "evil.example.org", 443, false),
            ("*.example.org", "a.b.example.org", 443, true),
            ("*.example.org", "example.org", 443, false),
            ("*.example.org", "a.example.org.evil.example", 443, false),
            ("*.example.org:8443", "a.example.org", 8443, true),
            ("[::1]:8443", "::1", 8443, true),
            ("[::1]", "::1", 443, true),
        ] {
            assert_eq!(
                tunnel(text).unwrap().allows(host, port),
                allowed,
                "{text} {host} {port}"
            );
        }
        for text in ["", "https://a", "a/b", "a:b", "A.example", "a b"] {
            assert!(tunnel(text).is_err(), "{text}");
        }
    }
}
