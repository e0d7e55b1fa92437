//! Redirect rules: networks (`10.0.0.0/8`), host patterns (`*.example.org:8443`), and the addresses that redirects
//! may lead to.

use std::fmt;
use std::net::IpAddr;

use globset::{GlobBuilder, GlobMatcher};
use http::Uri;

use super::ip_scope::IpScope;
use super::origin::{address, port_of};

/// A network in CIDR notation (RFC 4632, RFC 4291 §2.3), or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix_bits: u32,
}

/// Why a text is not a [`Network`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkError {
    /// The address is invalid.
    Address,
    /// The prefix length is invalid.
    Length,
}

impl Network {
    /// Parses `10.0.0.0/8`, `192.0.2.7`, `fd00::/8`.
    pub fn read(text: &str) -> Result<Network, NetworkError> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| NetworkError::Address)?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = match prefix.map(str::parse) {
            None => bits,
            Some(Ok(prefix_bits)) if prefix_bits <= bits => prefix_bits,
            Some(_) => return Err(NetworkError::Length),
        };
        Ok(Network { address, prefix_bits })
    }

    /// Whether the network contains an address. IPv4 inside IPv6 is unwrapped.
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

    /// Whether it contains every address of its family.
    pub fn is_everything(&self) -> bool {
        self.prefix_bits == 0
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

/// A host or a glob over hosts, in lower case and without brackets.
#[derive(Clone, Debug)]
pub struct HostPattern {
    text: String,
    glob: Option<GlobMatcher>,
}

impl HostPattern {
    /// Parses `example.org` or `*.example.org`. `None`: invalid glob.
    pub fn read(text: &str) -> Option<HostPattern> {
        let text = text.trim_start_matches('[').trim_end_matches(']').to_owned();
        let glob = if text.contains('*') {
            Some(GlobBuilder::new(&text).build().ok()?.compile_matcher())
        } else {
            None
        };
        Some(HostPattern { text, glob })
    }

    /// Whether it matches this host (lower case, without brackets).
    pub fn matches(&self, host: &str) -> bool {
        match &self.glob {
            Some(glob) => glob.is_match(host),
            None => self.text == host,
        }
    }

    /// Whether it names a single host.
    pub fn is_exact(&self) -> bool {
        self.glob.is_none()
    }
}

impl PartialEq for HostPattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for HostPattern {}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A redirect target that is allowed in addition to the default ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedirectRule {
    /// Written with `http://`: plain HTTP is allowed for this target although the registry uses https.
    pub plain: bool,
    /// The allowed hosts or addresses.
    pub to: RedirectTarget,
}

/// Hosts or addresses of a [`RedirectRule`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedirectTarget {
    /// A host at this port, or the scheme's default. An exact host name may have any address except link-local, which
    /// requires the address itself. A glob may lead to private addresses, not to loopback.
    Host(HostPattern, Option<u16>),
    /// All addresses of a network, with any host name and port.
    Network(Network),
}

impl RedirectRule {
    /// The narrowest scope to which the rule allows `to` by its host.
    fn zone(&self, to: &Uri) -> Option<IpScope> {
        let RedirectTarget::Host(host, port) = &self.to else {
            return None;
        };
        let name = to
            .host()?
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_ascii_lowercase();
        let usual = if is_plain(to) { 80 } else { 443 };
        if !host.matches(&name) || port.unwrap_or(usual) != port_of(to) {
            return None;
        }
        Some(match (address(&name), host.is_exact()) {
            (Some(_), true) => IpScope::LinkLocal,
            (None, true) => IpScope::Loopback,
            (_, false) => IpScope::Private,
        })
    }

    fn network(&self) -> Option<Network> {
        match self.to {
            RedirectTarget::Network(network) => Some(network),
            RedirectTarget::Host(..) => None,
        }
    }
}

fn is_plain(to: &Uri) -> bool {
    to.scheme_str() != Some("https")
}

/// The addresses that a connection may have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressLimit {
    /// All addresses no narrower than this scope.
    zone: Option<IpScope>,
    /// And the addresses of these networks.
    networks: Vec<Network>,
}

impl AddressLimit {
    /// Whether a connection to this address is allowed.
    pub fn allows(&self, address: IpAddr) -> bool {
        self.zone
            .is_some_and(|narrowest| IpScope::of(address) <= narrowest)
            || self.networks.iter().any(|network| network.contains(address))
    }

    /// Whether a proxy may resolve the name. It does not know the allowed networks.
    pub(super) fn is_for_names(&self) -> bool {
        self.zone.is_some()
    }
}

impl From<IpScope> for AddressLimit {
    fn from(narrowest: IpScope) -> AddressLimit {
        AddressLimit {
            zone: Some(narrowest),
            networks: Vec::new(),
        }
    }
}

/// The redirect rules of one upstream.
#[derive(Clone, Debug, Default)]
pub(super) struct RedirectRules(pub(super) Vec<RedirectRule>);

impl RedirectRules {
    /// Whether a redirect may leave https for `to`. Networks are checked against the address when connecting.
    pub(super) fn allow_plain(&self, to: &Uri) -> bool {
        let literal = to.host().and_then(address);
        self.0
            .iter()
            .filter(|rule| rule.plain)
            .any(|rule| match rule.network() {
                Some(network) => literal.is_none_or(|address| network.contains(address)),
                None => rule.zone(to).is_some(),
            })
    }

    /// The addresses that a connection to `to` may have: none narrower than `narrowest`, and those that the rules
    /// allow. A `downgrade` from https to http requires a rule that allows plain HTTP.
    pub(super) fn limit(&self, to: &Uri, narrowest: IpScope, downgrade: bool) -> AddressLimit {
        let rules = || self.0.iter().filter(|rule| rule.plain || !downgrade);
        let named = rules()
            .filter(|rule| !rule.plain || is_plain(to))
            .filter_map(|rule| rule.zone(to));
        AddressLimit {
            zone: named.chain((!downgrade).then_some(narrowest)).max(),
            networks: rules().filter_map(RedirectRule::network).collect(),
        }
    }
}

/// The `redirects` entry that would allow `to`, which was rejected at address `at`, if known.
pub(super) fn allow_entry(to: &Uri, at: Option<IpAddr>, downgrade: bool) -> String {
    let host = to.host().unwrap_or_default().to_ascii_lowercase();
    let scheme = if downgrade { "http://" } else { "" };
    match at {
        // A host name alone never allows a link-local address.
        Some(at) if IpScope::of(at) == IpScope::LinkLocal && address(&host).is_none() => {
            format!("{scheme}{at}/{}", if at.is_ipv4() { 32 } else { 128 })
        }
        _ => match to.port_u16() {
            Some(port) => format!("{scheme}{host}:{port}"),
            None => format!("{scheme}{host}"),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn host(text: &str, port: Option<u16>, plain: bool) -> RedirectRule {
        RedirectRule {
            plain,
            to: RedirectTarget::Host(HostPattern::read(text).unwrap(), port),
        }
    }

    fn network(text: &str, plain: bool) -> RedirectRule {
        RedirectRule {
            plain,
            to: RedirectTarget::Network(Network::read(text).unwrap()),
        }
    }

    #[test]
    fn network_contains_addresses_with_its_prefix() {
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
            let network = Network::read(text).unwrap();
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
            assert!(Network::read(text).is_err(), "{text}");
        }
    }

    /// Rules, redirect target, its address, and whether the redirect is allowed.
    #[test]
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn r13_redirects_follow_exactly_the_rules() {
        let table: &[(&[RedirectRule], &str, &str, bool)] = &[
            // Without rules: only https and public addresses.
            (&[], "https://cdn.example/x", "1.1.1.1", true),
            (&[], "https://cdn.example/x", "10.1.1.1", false),
            (&[], "http://cdn.example/x", "1.1.1.1", false),
            // A host at any address; the port must match.
            (
                &[host("s3.corp", None, false)],
                "https://s3.corp/x",
                "10.1.1.1",
                true,
            ),
            (
                &[host("s3.corp", None, false)],
                "https://S3.corp/x",
                "10.1.1.1",
                true,
            ),
            (
                &[host("s3.corp", None, false)],
                "https://s3.corp:9000/x",
                "10.1.1.1",
                false,
            ),
            (
                &[host("s3.corp", Some(9000), false)],
                "https://s3.corp:9000/x",
                "127.0.0.1",
                true,
            ),
            (
                &[host("s3.corp", None, false)],
                "https://evil.s3.corp/x",
                "10.1.1.1",
                false,
            ),
            (
                &[host("s3.corp", None, false)],
                "http://s3.corp/x",
                "10.1.1.1",
                false,
            ),
            // No host name leads to metadata services.
            (
                &[host("s3.corp", None, false)],
                "https://s3.corp/x",
                "169.254.169.254",
                false,
            ),
            (
                &[network("169.254.0.0/16", false)],
                "https://s3.corp/x",
                "169.254.1.1",
                true,
            ),
            (
                &[host("169.254.1.1", None, false)],
                "https://169.254.1.1/x",
                "169.254.1.1",
                true,
            ),
            // A glob allows private addresses, not loopback.
            (
                &[host("*.s3.corp", None, false)],
                "https://b.s3.corp/x",
                "10.1.1.1",
                true,
            ),
            (
                &[host("*.s3.corp", None, false)],
                "https://b.s3.corp/x",
                "127.0.0.1",
                false,
            ),
            (
                &[host("*.s3.corp", None, false)],
                "https://s3.corp.evil.example/x",
                "10.1.1.1",
                false,
            ),
            // A network, with any host name.
            (
                &[network("10.20.0.0/16", false)],
                "https://any.example:1234/x",
                "10.20.1.1",
                true,
            ),
            (
                &[network("10.20.0.0/16", false)],
                "https://any.example/x",
                "10.21.1.1",
                false,
            ),
            (
                &[network("10.20.0.0/16", false)],
                "http://10.20.1.1/x",
                "10.20.1.1",
                false,
            ),
            (
                &[network("fd00::/8", false)],
                "https://[fd00::7]/x",
                "fd00::7",
                true,
            ),
            // Plain HTTP only where the rule says so.
            (
                &[host("minio.corp", Some(9000), true)],
                "http://minio.corp:9000/x",
                "10.1.1.1",
                true,
            ),
            (
                &[host("minio.corp", Some(9000), true)],
                "http://minio.corp:9000/x",
                "1.1.1.1",
                true,
            ),
            (
                &[host("minio.corp", Some(9000), true)],
                "http://minio.corp/x",
                "10.1.1.1",
                false,
            ),
            (
                &[host("minio.corp", None, true)],
                "http://minio.corp/x",
                "10.1.1.1",
                true,
            ),
            (
                &[host("minio.corp", None, true)],
                "https://minio.corp/x",
                "10.1.1.1",
                false,
            ),
            (
                &[network("10.20.0.0/16", true)],
                "http://any.example/x",
                "10.20.1.1",
                true,
            ),
            (
                &[network("10.20.0.0/16", true)],
                "http://any.example/x",
                "1.1.1.1",
                false,
            ),
            (
                &[network("10.20.0.0/16", true)],
                "http://10.20.1.1/x",
                "10.20.1.1",
                true,
            ),
            (
                &[network("10.20.0.0/16", true)],
                "http://10.21.1.1/x",
                "10.21.1.1",
                false,
            ),
            // A rule for one host allows no other.
            (
                &[host("a.corp", None, true), host("b.corp", None, false)],
                "http://b.corp/x",
                "10.1.1.1",
                false,
            ),
        ];
        for (rules, target, at, allowed) in table {
            let rules = RedirectRules(rules.to_vec());
            let to: Uri = target.parse().unwrap();
            let downgrade = is_plain(&to);
            let follows = !downgrade || rules.allow_plain(&to);
            let reaches = rules
                .limit(&to, IpScope::Public, downgrade)
                .allows(at.parse().unwrap());
            assert_eq!(follows && reaches, *allowed, "{target} at {at} by {rules:?}");
        }
    }

    #[test]
    fn suggested_entry_allows_the_rejected_redirect() {
        for (target, at, downgrade, named) in [
            ("https://s3.corp/x", "10.1.1.1", false, "s3.corp"),
            ("https://s3.corp:9000/x", "10.1.1.1", false, "s3.corp:9000"),
            ("https://10.1.1.1:9000/x", "10.1.1.1", false, "10.1.1.1:9000"),
            ("https://[fd00::1]/x", "fd00::1", false, "[fd00::1]"),
            ("https://s3.corp/x", "169.254.1.1", false, "169.254.1.1/32"),
            (
                "http://minio.corp:9000/x",
                "10.1.1.1",
                true,
                "http://minio.corp:9000",
            ),
        ] {
            let (to, at) = (target.parse().unwrap(), at.parse().unwrap());
            assert_eq!(allow_entry(&to, Some(at), downgrade), named);
        }
        let to = "http://minio.corp:9000/x".parse().unwrap();
        assert_eq!(allow_entry(&to, None, true), "http://minio.corp:9000");
    }
}
