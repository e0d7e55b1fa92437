//! IP scope of an address, for protection against server-side request forgery (SSRF).
//!
//! A redirect or a token realm is a URL chosen by another party and requested from inside the operator's network. It
//! may lead to no scope narrower than that of the registry that sent it. A public registry may lead to public
//! addresses only, one in a private network also to private addresses, and one on this machine (tests, sidecars) also
//! to loopback.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Ordered from the widest to the narrowest scope; rules compare scopes by this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IpScope {
    /// Routed on the internet.
    Public,
    /// RFC 1918, RFC 6598 (carrier-grade NAT), RFC 4193 and other networks that are not routed.
    Private,
    /// This machine.
    Loopback,
    /// Link-local, where clouds run the metadata services that issue credentials; also multicast and broadcast.
    LinkLocal,
}

impl IpScope {
    /// The scope of an address. IPv4 inside IPv6 (mapped, NAT64) is unwrapped.
    pub fn of(address: IpAddr) -> IpScope {
        match address.to_canonical() {
            IpAddr::V4(v4) => of_v4(v4),
            IpAddr::V6(v6) => of_v6(v6),
        }
    }
}

fn of_v4(address: Ipv4Addr) -> IpScope {
    let [a, b, c, _] = address.octets();
    if address.is_link_local() || address.is_multicast() || a >= 240 {
        IpScope::LinkLocal
    } else if address.is_loopback() || a == 0 {
        // 0.0.0.0 connects to this machine on Linux.
        IpScope::Loopback
    } else if address.is_private()
        || (a == 100 && b & 0xc0 == 64)
        || (a == 198 && b & 0xfe == 18)
        || (a, b, c) == (192, 0, 0)
    {
        IpScope::Private
    } else {
        IpScope::Public
    }
}

fn of_v6(address: Ipv6Addr) -> IpScope {
    match address.octets() {
        _ if address.is_loopback() || address.is_unspecified() => IpScope::Loopback,
        // NAT64 (RFC 6052) and 6to4 (RFC 3056) carry an IPv4 destination.
        [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, v4 @ ..] => of_v4(v4.into()),
        // NAT64 for local use (RFC 8215), with a prefix of 96 bits as usual.
        [0, 0x64, 0xff, 0x9b, 0, 1, .., a, b, c, d] => of_v4([a, b, c, d].into()).max(IpScope::Private),
        [0x20, 0x02, a, b, c, d, ..] => of_v4([a, b, c, d].into()),
        [0xff, ..] => IpScope::LinkLocal,
        [0xfe, next, ..] if next & 0xc0 == 0x80 => IpScope::LinkLocal,
        [0xfe, next, ..] if next & 0xc0 == 0xc0 => IpScope::Private,
        [first, ..] if first & 0xfe == 0xfc => IpScope::Private,
        _ => IpScope::Public,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn every_address_has_its_ip_scope() {
        for (zone, addresses) in [
            (
                IpScope::Public,
                &[
                    "1.1.1.1",
                    "100.128.0.1",
                    "172.32.0.1",
                    "198.20.0.1",
                    "2606:4700::1",
                    "64:ff9b::101:101",
                ][..],
            ),
            (
                IpScope::Private,
                &[
                    "10.0.0.1",
                    "172.16.0.1",
                    "192.168.1.1",
                    "100.64.0.1",
                    "198.18.0.1",
                    "fd00::1",
                    "::ffff:10.0.0.1",
                    "64:ff9b:1::101:101",
                ],
            ),
            (
                IpScope::Loopback,
                &[
                    "127.0.0.1",
                    "127.9.9.9",
                    "0.0.0.0",
                    "::1",
                    "::",
                    "::ffff:127.0.0.1",
                    "2002:7f00:1::",
                ],
            ),
            (
                IpScope::LinkLocal,
                &[
                    "169.254.169.254",
                    "224.0.0.1",
                    "255.255.255.255",
                    "fe80::1",
                    "ff02::1",
                    "64:ff9b::a9fe:a9fe",
                    "64:ff9b:1::a9fe:a9fe",
                ],
            ),
        ] {
            for address in addresses {
                assert_eq!(IpScope::of(address.parse().unwrap()), zone, "{address}");
            }
        }
    }
}
