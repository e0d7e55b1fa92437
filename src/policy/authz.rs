//! Who may read what: the upstream's own word, remembered. Pure; the road collects the evidence, [`standing`] weighs it.
//!
//! A *principal* is a credential's keyed hash, so that a grant can be kept on disk while the credential is not. A
//! *grant* is the upstream's 2xx to that principal in one repository. It says nothing about another repository, and
//! nothing about a digest: a hostile manifest can name any digest, so bytes held because of repository A are readable
//! through repository B only once the upstream was *seen* to have them there.

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::age;
use crate::oci::digest::hmac_sha256;
use crate::policy::Authorization;

/// Who asks: HMAC-SHA-256 of the credential under the install secret. Tells nothing about the credential, and nothing
/// on another installation.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Principal([u8; 32]);

impl Principal {
    /// The principal of a client's `Authorization` value, as sent.
    pub fn of_credential(secret: &[u8], authorization: &[u8]) -> Self {
        Self::of(secret, b"credential", authorization)
    }

    /// Who shows this at a token service, whatever token is given for it (see [`crate::oci::TokenRequest::secret`]).
    pub fn of_account(secret: &[u8], login: &[u8]) -> Self {
        Self::of(secret, b"account", login)
    }

    /// Whoever asks without a credential. What the upstream shows to it, it shows to everyone.
    pub fn anonymous(secret: &[u8]) -> Self {
        Self::of(secret, b"anonymous", b"")
    }

    /// The proxy itself, where an upstream is configured with `auth = "shared"`.
    pub fn proxy(secret: &[u8]) -> Self {
        Self::of(secret, b"proxy", b"")
    }

    /// The keyed hash, for keys of maps and records.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The class is part of the message, so that no credential can be made to hash to another class's principal.
    fn of(secret: &[u8], class: &[u8], authorization: &[u8]) -> Self {
        Self(hmac_sha256(secret, &[class, b"\0", authorization].concat()))
    }
}

/// Even a hash of a credential has no business in a log in full.
impl fmt::Debug for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, ..] = self.0;
        write!(f, "Principal({a:02x}{b:02x}{c:02x}…)")
    }
}

/// What is known of a principal's right to read one thing in one repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GrantEvidence {
    /// The upstream is configured with `auth = "shared"`: whoever reaches the listener is entitled.
    pub shared: bool,
    /// When the upstream last said yes to this principal in this repository.
    pub granted_at: Option<SystemTime>,
    /// When the token service last gave a token for the credential that this principal's token was given for; only
    /// where that is kept (`local_tokens`).
    pub token_issued_at: Option<SystemTime>,
    /// When the upstream last said yes to any token of that credential in this repository.
    pub account_granted_at: Option<SystemTime>,
    /// When the upstream last said yes to the anonymous principal in this repository.
    pub anonymous_granted_at: Option<SystemTime>,
    /// Whether what is asked for was seen in this repository. Always true for a tag, which is a name *of* the repository.
    pub is_in_repository: bool,
}

/// How long the upstream's yes is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantTtls {
    /// While the upstream answers.
    pub grant_ttl: Duration,
    /// While it is silent. Also how long a repository counts as public before it is asked again.
    pub grant_ttl_offline: Duration,
}

/// Weighs the evidence.
pub fn authorize(evidence: &GrantEvidence, ttls: &GrantTtls, now: SystemTime) -> Authorization {
    if !evidence.is_in_repository {
        return Authorization::Unknown;
    }
    let recently = |at: Option<SystemTime>, ttl| at.is_some_and(|at| age::is_within(at, ttl, now));
    if evidence.shared
        || recently(evidence.anonymous_granted_at, ttls.grant_ttl_offline)
        || recently(evidence.granted_at, ttls.grant_ttl)
    {
        return Authorization::Granted;
    }
    // Good only while the upstream cannot be asked, so a clock that was set back takes nothing away.
    let in_outage = |at: Option<SystemTime>| {
        at.is_some_and(|at| age::is_within_or_ahead(at, ttls.grant_ttl_offline, now))
    };
    // Another token of the same credential may do: only while this one cannot be asked about.
    let account = in_outage(evidence.token_issued_at) && in_outage(evidence.account_granted_at);
    // What everyone could read once is no secret in an outage, however long ago that was.
    if evidence.anonymous_granted_at.is_some() || account || in_outage(evidence.granted_at) {
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
    fn standing_follows_the_evidence() {
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
    fn another_token_of_the_same_credential_is_good_in_an_outage_alone_and_only_while_that_is_taken() {
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
    fn a_principal_is_not_printed_in_full() {
        let printed = format!("{:?}", Principal::of_credential(b"one", b"Basic YTpi"));
        assert!(printed.len() < 24, "{printed}");
    }
}
