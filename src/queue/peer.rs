//! The client on whose behalf work is done, as admission tells clients apart.

use std::net::{IpAddr, Ipv6Addr};

/// The prefix that one IPv6 client commonly commands whole (RFC 6177, RFC 7421).
const IPV6_PREFIX_BITS: u32 = 64;

/// The client on whose behalf work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// A client at this address; of an IPv6 address the first 64 bits count.
    Address(IpAddr),
    /// A client on this host, through a unix socket or by the operator's API.
    Local,
    /// The cache itself: no client waits.
    Background,
}

impl Peer {
    /// The client at the other end of a connection; a unix socket has no address.
    pub fn of(address: Option<IpAddr>) -> Self {
        match address.map(|address| address.to_canonical()) {
            None => Self::Local,
            Some(IpAddr::V4(address)) => Self::Address(address.into()),
            Some(IpAddr::V6(address)) => {
                let prefix = address.to_bits() & (u128::MAX << (128 - IPV6_PREFIX_BITS));
                Self::Address(Ipv6Addr::from_bits(prefix).into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn t09_addresses_of_one_ipv6_prefix_are_one_client() {
        let of = |text: &str| Peer::of(Some(text.parse().unwrap()));
        assert_eq!(of("2001:db8:0:1::7"), of("2001:db8:0:1:ffff::8"));
        assert_ne!(of("2001:db8:0:1::7"), of("2001:db8:0:2::7"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(Peer::of(None), Peer::Local);
    }
}
