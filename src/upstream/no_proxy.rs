//! `NO_PROXY` as read by Go (golang.org/x/net/http/httpproxy) and curl: hosts that are reached without the proxy.
//!
//! If the two differ, an entry matches if either matches. `host:port` and `*.domain` are Go's syntax; spaces between
//! entries and `.domain` for the domain itself are curl's.

use std::net::IpAddr;

use http::Uri;

use super::origin::{address, port_of};
use super::redirect_rules::Network;

/// The entries of one `NO_PROXY`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NoProxy(Vec<Entry>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    /// `*`
    Everything,
    /// `10.0.0.0/8`
    Network(Network),
    /// `192.0.2.7`, `[fd00::1]:443`
    Address(IpAddr, Option<u16>),
    /// `example.org`, `.example.org`, `*.example.org:8443`; in lower case, without the leading dot.
    Domain {
        name: String,
        port: Option<u16>,
        /// `*.example.org`: subdomains only.
        below_only: bool,
    },
}

impl NoProxy {
    pub(super) fn read(text: &str) -> NoProxy {
        let entries = text.split(|c: char| c == ',' || c.is_whitespace());
        NoProxy(entries.filter_map(entry).collect())
    }

    /// Whether `destination` is reached without the proxy.
    pub(super) fn contains(&self, destination: &Uri) -> bool {
        let host = destination.host().unwrap_or_default();
        let address = address(host).map(|address| address.to_canonical());
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let meant = |port: &Option<u16>| port.is_none_or(|port| port == port_of(destination));
        self.0.iter().any(|entry| match entry {
            Entry::Everything => true,
            Entry::Network(network) => address.is_some_and(|address| network.contains(address)),
            Entry::Address(own, port) => address == Some(*own) && meant(port),
            Entry::Domain {
                name,
                port,
                below_only,
            } => {
                let below = host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'));
                address.is_none() && (below || (!below_only && host == *name)) && meant(port)
            }
        })
    }
}

/// Parses one entry. `None`: empty or malformed, and ignored.
fn entry(text: &str) -> Option<Entry> {
    if text == "*" {
        return Some(Entry::Everything);
    }
    if text.contains('/') {
        return Network::read(text).ok().map(Entry::Network);
    }
    if let Some(own) = address(text) {
        return Some(Entry::Address(own.to_canonical(), None));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, Some(port.parse().ok()?)),
        None => (text, None),
    };
    if let Some(own) = address(host) {
        return Some(Entry::Address(own.to_canonical(), port));
    }
    let (name, below_only) = match host.strip_prefix("*.") {
        Some(name) => (name, true),
        None => (host.strip_prefix('.').unwrap_or(host), false),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    (!name.is_empty()).then_some(Entry::Domain {
        name,
        port,
        below_only,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    /// `NO_PROXY`, destinations reached without the proxy, and destinations reached through it.
    #[test]
    fn r11_no_proxy_matches_like_go_and_curl() {
        #[rustfmt::skip]
        let table: &[(&str, &[&str], &[&str])] = &[
            ("", &[], &["https://example.org/", "http://10.0.0.1/"]),
            ("*", &["https://example.org/", "http://10.0.0.1/", "https://[fd00::1]/"], &[]),
            ("example.org", &["https://example.org/", "https://a.example.org/", "https://a.b.example.org:8443/", "https://EXAMPLE.org/", "https://example.org./"],
                &["https://notexample.org/", "https://example.org.evil.example/", "https://org/"]),
            (".example.org", &["https://a.example.org/", "https://example.org/"], &["https://notexample.org/"]),
            ("*.example.org", &["https://a.example.org/", "https://a.b.example.org/"], &["https://example.org/", "https://notexample.org/"]),
            ("Example.ORG", &["https://a.example.org/"], &[]),
            ("example.org.", &["https://example.org/"], &[]),
            ("registry.corp:5000", &["https://registry.corp:5000/", "http://registry.corp:5000/", "https://a.registry.corp:5000/"], &["https://registry.corp/", "https://registry.corp:5001/"]),
            ("registry.corp:443", &["https://registry.corp/"], &["http://registry.corp/"]),
            ("registry.corp:80", &["http://registry.corp/"], &["https://registry.corp/"]),
            ("*.corp:8443", &["https://a.corp:8443/"], &["https://a.corp/", "https://corp:8443/"]),
            ("10.0.0.0/8", &["https://10.1.2.3/", "http://10.9.9.9:5000/"], &["https://11.0.0.1/", "https://10.example.org/"]),
            ("10.1.2.3", &["https://10.1.2.3/", "https://10.1.2.3:5000/", "https://[::ffff:10.1.2.3]/"], &["https://10.1.2.4/", "https://210.1.2.3/"]),
            ("10.1.2.3:5000", &["http://10.1.2.3:5000/"], &["http://10.1.2.3/"]),
            ("fd00::1", &["https://[fd00::1]/"], &["https://[fd00::2]/"]),
            ("[fd00::1]", &["https://[fd00::1]:5000/"], &["https://[fd00::2]/"]),
            ("[fd00::1]:443", &["https://[fd00::1]/"], &["https://[fd00::1]:5000/"]),
            ("fd00::/8", &["https://[fd12::9]/"], &["https://[2001:db8::1]/"]),
            (" a.example , b.example\tc.example,,", &["https://a.example/", "https://b.example/", "https://c.example/"], &["https://d.example/"]),
            // Malformed entries are ignored and do not affect others.
            (":5000,10.0.0.0/99,example.org:http,.,*.,ok.example", &["https://ok.example/"], &["https://example.org/", "http://10.0.0.1/", "http://x.example:5000/"]),
        ];
        for (text, without, with) in table {
            let rules = NoProxy::read(text);
            for destination in *without {
                assert!(
                    rules.contains(&destination.parse().unwrap()),
                    "{text:?} {destination}"
                );
            }
            for destination in *with {
                assert!(
                    !rules.contains(&destination.parse().unwrap()),
                    "{text:?} {destination}"
                );
            }
        }
    }
}
