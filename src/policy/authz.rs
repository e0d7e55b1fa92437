//! Authorization from remembered upstream responses. Pure: the proxy collects the evidence, [`authorize`]
//! evaluates it.
//!
//! A *principal* is a keyed hash of a credential, so a grant can be stored on disk without the credential. A
//! *grant* is the upstream's 2xx to that principal in one repository. It does not extend to another repository.
//! It does not extend to a digest either: a hostile manifest can name any digest. So bytes that were cached
//! through repository A are readable through repository B only after the upstream was *seen* to have them
//! there.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::age;
use crate::oci::digest::hmac_sha256;
use crate::policy::Authorization;

/// A requester, identified by HMAC-SHA-256 of its credential under the install secret. The hash reveals nothing
/// about the credential, and is useless on another installation.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Principal([u8; 32]);

impl Principal {
    /// Principal of a client's `Authorization` value, as sent.
    pub fn of_credential(secret: &[u8], authorization: &[u8]) -> Self {
        Self::of(secret, b"credential", authorization)
    }

    /// Principal of an account: the credential shown to a token service, independent of the issued token (see
    /// [`crate::oci::TokenRequest::credential`]).
    pub fn of_account(secret: &[u8], login: &[u8]) -> Self {
        Self::of(secret, b"account", login)
    }

    /// Principal of requests without a credential. A grant to it makes the repository public.
    pub fn anonymous(secret: &[u8]) -> Self {
        Self::of(secret, b"anonymous", b"")
    }

    /// Principal of the cache itself, for upstreams with `auth = "shared"`.
    pub fn proxy(secret: &[u8]) -> Self {
        Self::of(secret, b"proxy", b"")
    }

    /// The keyed hash, as key of maps and records.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The class is part of the message, so no credential hashes to a principal of another class.
    fn of(secret: &[u8], class: &[u8], authorization: &[u8]) -> Self {
        Self(hmac_sha256(secret, &[class, b"\0", authorization].concat()))
    }
}

/// Prints the first three bytes only, because the hash of a credential must not be logged either.
impl fmt::Debug for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, ..] = self.0;
        write!(f, "Principal({a:02x}{b:02x}{c:02x}…)")
    }
}

/// Time of a public mark that only the record of another cache proves: none of this cache's own. Such a mark grants
/// access in an outage alone. Later than that of an image that was imported as public.
pub fn public_by_record() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1)
}

/// Evidence for a principal's authorization to read one content in one repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GrantEvidence {
    /// The upstream is configured with `auth = "shared"`: every client of the listener is authorized.
    pub shared: bool,
    /// Time of the last 2xx to this principal in this repository.
    pub granted_at: Option<SystemTime>,
    /// If this principal's credential is a token: when the token service last issued a token to the account that
    /// this token was issued to. Recorded with `local_tokens` only.
    pub token_issued_at: Option<SystemTime>,
    /// Time of the last 2xx to any token of that account in this repository.
    pub account_granted_at: Option<SystemTime>,
    /// Time of the last 2xx to this principal or account in this repository by the record of another cache. It counts
    /// in an outage alone.
    pub recorded_at: Option<SystemTime>,
    /// Time of the last 2xx to the anonymous principal in this repository.
    pub anonymous_granted_at: Option<SystemTime>,
    /// Whether the content was seen in this repository. Always true for a tag, which is a name within the
    /// repository.
    pub is_in_repository: bool,
}

/// Lifetimes of a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantTtls {
    /// While the upstream is available.
    pub grant_ttl: Duration,
    /// While the upstream is unavailable. Also the time after which a public repository is probed again.
    pub grant_ttl_offline: Duration,
}

/// Evaluates the evidence.
pub fn authorize(evidence: &GrantEvidence, ttls: &GrantTtls, now: SystemTime) -> Authorization {
    if !evidence.is_in_repository {
        return Authorization::Unknown;
    }
    let recently = |at: Option<SystemTime>, ttl| at.is_some_and(|at| age::is_within(at, ttl, now));
    let public = evidence.anonymous_granted_at;
    if evidence.shared
        || recently(
            public.filter(|at| *at != public_by_record()),
            ttls.grant_ttl_offline,
        )
        || recently(evidence.granted_at, ttls.grant_ttl)
    {
        return Authorization::Granted;
    }
    // Applies only while no request can be made, so a clock that was set back revokes nothing.
    let in_outage = |at: Option<SystemTime>| {
        at.is_some_and(|at| age::is_within_or_ahead(at, ttls.grant_ttl_offline, now))
    };
    // A grant to another token of the same account suffices only while this token cannot be checked.
    let account = in_outage(evidence.token_issued_at) && in_outage(evidence.account_granted_at);
    // Content that was public once may be served in an outage, however long ago that was.
    let recorded = in_outage(evidence.recorded_at);
    if public.is_some() || account || recorded || in_outage(evidence.granted_at) {
        return Authorization::Expired;
    }
    Authorization::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTLS: GrantTtls = GrantTtls {
        grant_ttl: Duration::from_secs(300),
        grant_ttl_offline: Duration::from_secs(43_200),
    };

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(10_000_000)
    }

    #[expect(
        clippy::unnecessary_wraps,
        reason = "evidence is optional, and so reads the table"
    )]
    fn ago(seconds: u64) -> Option<SystemTime> {
        Some(now() - Duration::from_secs(seconds))
    }

    #[test]
    fn authorization_follows_the_evidence() {
        let nothing = GrantEvidence {
            is_in_repository: true,
            ..GrantEvidence::default()
        };
        let ahead = |seconds| Some(now() + Duration::from_secs(seconds));
        let table = [
            ("no evidence", nothing, Authorization::Unknown),
            (
                "granted just now",
                GrantEvidence {
                    granted_at: ago(0),
                    ..nothing
                },
                Authorization::Granted,
            ),
            (
                "granted within the grant",
                GrantEvidence {
                    granted_at: ago(299),
                    ..nothing
                },
                Authorization::Granted,
            ),
            (
                "granted too long ago",
                GrantEvidence {
                    granted_at: ago(300),
                    ..nothing
                },
                Authorization::Expired,
            ),
            (
                "granted before any outage",
                GrantEvidence {
                    granted_at: ago(43_200),
                    ..nothing
                },
                Authorization::Unknown,
            ),
            (
                "granted in the future, the clock was set back by an hour",
                GrantEvidence {
                    granted_at: ahead(3600),
                    ..nothing
                },
                Authorization::Expired,
            ),
            (
                "granted in the future, by more than an hour",
                GrantEvidence {
                    granted_at: ahead(3601),
                    ..nothing
                },
                Authorization::Unknown,
            ),
            (
                "public in the future",
                GrantEvidence {
                    anonymous_granted_at: ahead(9),
                    ..nothing
                },
                Authorization::Expired,
            ),
            (
                "public",
                GrantEvidence {
                    anonymous_granted_at: ago(43_199),
                    ..nothing
                },
                Authorization::Granted,
            ),
            (
                "public long ago",
                GrantEvidence {
                    anonymous_granted_at: ago(9_000_000),
                    ..nothing
                },
                Authorization::Expired,
            ),
            (
                "shared",
                GrantEvidence {
                    shared: true,
                    ..nothing
                },
                Authorization::Granted,
            ),
        ];
        for (name, evidence, expected) in table {
            assert_eq!(authorize(&evidence, &TTLS, now()), expected, "{name}");
            let unseen = GrantEvidence {
                is_in_repository: false,
                ..evidence
            };
            assert_eq!(
                authorize(&unseen, &TTLS, now()),
                Authorization::Unknown,
                "{name}, never seen here"
            );
        }
    }

    #[test]
    fn grant_of_another_cache_counts_only_in_an_outage() {
        let recorded = |recorded_at| GrantEvidence {
            recorded_at,
            is_in_repository: true,
            ..GrantEvidence::default()
        };
        for (at, expected) in [
            (ago(0), Authorization::Expired),
            (ago(43_199), Authorization::Expired),
            (ago(43_200), Authorization::Unknown),
        ] {
            assert_eq!(authorize(&recorded(at), &TTLS, now()), expected, "{at:?}");
        }
    }

    #[test]
    fn other_token_of_the_account_counts_only_in_an_outage() {
        let table = [
            ("still taken", ago(43_199), ago(0), Authorization::Expired),
            ("refused since", None, ago(0), Authorization::Unknown),
            (
                "taken before any outage",
                ago(43_200),
                ago(0),
                Authorization::Unknown,
            ),
            (
                "read before any outage",
                ago(0),
                ago(43_200),
                Authorization::Unknown,
            ),
            ("never read here", ago(0), None, Authorization::Unknown),
        ];
        for (name, token_issued_at, account_granted_at, expected) in table {
            let evidence = GrantEvidence {
                is_in_repository: true,
                token_issued_at,
                account_granted_at,
                ..GrantEvidence::default()
            };
            assert_eq!(authorize(&evidence, &TTLS, now()), expected, "{name}");
        }
    }

    #[test]
    fn principals_differ_by_credential_class_and_installation() {
        let all = [
            Principal::anonymous(b"one"),
            Principal::proxy(b"one"),
            Principal::of_credential(b"one", b""),
            Principal::of_credential(b"one", b"Basic YTpi"),
            Principal::of_account(b"one", b"Basic YTpi"),
            Principal::of_credential(b"one", b"Bearer YTpi"),
            Principal::of_credential(b"two", b"Basic YTpi"),
        ];
        for (i, a) in all.iter().enumerate() {
            for b in all.iter().skip(i + 1) {
                assert_ne!(a, b);
            }
        }
        assert_eq!(
            Principal::of_credential(b"one", b"x"),
            Principal::of_credential(b"one", b"x")
        );
    }

    #[test]
    fn principal_debug_output_is_truncated() {
        let printed = format!("{:?}", Principal::of_credential(b"one", b"Basic YTpi"));
        assert!(printed.len() < 24, "{printed}");
    }
}
