//! Client, flow and class of a request, by which admission distinguishes requests.

use std::hash::{BuildHasher as _, Hash, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::LazyLock;

/// Priority class, the highest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Revalidation of cached content while a client waits.
    Revalidation,
    /// Manifests that are not cached, small blobs, lists.
    Interactive,
    /// Large blobs, and digests that no cached manifest refers to.
    Bulk,
    /// Prefetch and refresh.
    Background,
}

impl Class {
    /// All classes, the highest first.
    pub const ALL: [Self; 4] = [
        Self::Revalidation,
        Self::Interactive,
        Self::Bulk,
        Self::Background,
    ];

    /// Label in the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Revalidation => "revalidation",
            Self::Interactive => "interactive",
            Self::Bulk => "bulk",
            Self::Background => "background",
        }
    }
}

/// Admission key of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Demand {
    /// The waiting client.
    pub peer: Peer,
    /// Distinguishes the flows of one client: see [`flow`].
    pub flow: u64,
    /// Priority.
    pub class: Class,
}

impl Demand {
    /// Background work of the cache.
    pub const BACKGROUND: Self = Self {
        peer: Peer::Background,
        flow: 0,
        class: Class::Background,
    };
}

/// Flow identifier of these parts, for example of a principal in a repository. Two flows with the same hash
/// share a turn, which is harmless. The hash is keyed, so a client cannot choose another client's flow.
pub fn flow(parts: impl Hash) -> u64 {
    static KEYED: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    KEYED.hash_one(parts)
}

/// Prefix that one IPv6 client commonly controls (RFC 6177, RFC 7421).
const IPV6_PREFIX_BITS: u32 = 64;

/// The client that work is done for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// A client at this address. Of an IPv6 address the first 64 bits count.
    Address(IpAddr),
    /// A client on this host, through a unix socket or the admin API.
    Local,
    /// The cache itself; no client waits.
    Background,
}

impl Peer {
    /// The client at the other end of a connection. A unix socket has no address.
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
