//! What can be decided, each with the reason's one name: in the log, the metrics, `Cache-Status` and the admin API.

use crate::oci::Cause;

/// What to do, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Ask the upstream which digest the reference names now, then decide again.
    Ask,
    /// Serve the held copy.
    Serve(Served),
    /// The manifest that the tag names now is held, but not the rest: serve it if the upstream has the rest, else decide
    /// again, for an earlier image is held whole.
    Check(Served),
    /// Fetch it from the upstream.
    Fetch(Why),
    /// Say no.
    Refuse(Refusal),
}

impl Verdict {
    /// The reason's name, as it stands in the log, the metrics, `Cache-Status` and the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ask => "ask",
            Self::Serve(served) | Self::Check(served) => served.name(),
            Self::Fetch(why) => why.name(),
            Self::Refuse(refusal) => refusal.name(),
        }
    }
}

/// Why a held copy may be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Served {
    /// Confirmed less than `fresh` ago.
    Fresh,
    /// The upstream confirmed just now that the tag still names it.
    Unchanged,
    /// The tag names another digest now, which is held as well.
    Moved,
    /// Asked for by digest: it cannot change.
    Immutable,
    /// The policy says not to ask for a newer one.
    Unasked,
    /// The upstream is silent; the tag may have moved since.
    Stale(Cause),
    /// The upstream is silent; asked for by digest, on a right shown before.
    PastGrant(Cause),
    /// There is a newer one, but it could not be had.
    NewUnavailable(Cause),
    /// The tag's newest image is not held whole and the rest cannot be had: the last one that is whole instead.
    LastComplete(Option<Cause>),
    /// Gone upstream, and the rule says to keep serving it.
    KeptAbsent,
    /// The upstream refuses the proxy's own credential.
    CredentialRefused,
}

impl Served {
    /// The name in logs, metrics and `Cache-Status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Unchanged => "unchanged",
            Self::Moved => "moved",
            Self::Immutable => "immutable",
            Self::Unasked => "unasked",
            Self::Stale(_) => "stale",
            Self::PastGrant(_) => "past-grant",
            Self::NewUnavailable(_) => "new-unavailable",
            Self::LastComplete(_) => "last-complete",
            Self::KeptAbsent => "kept-absent",
            Self::CredentialRefused => "credential-refused",
        }
    }

    /// Whether what is served may no longer be what the upstream has: the client is told so (`Warning: 299`).
    pub fn may_be_outdated(self) -> bool {
        match self {
            Self::Stale(_)
            | Self::NewUnavailable(_)
            | Self::LastComplete(_)
            | Self::KeptAbsent
            | Self::CredentialRefused => true,
            Self::Fresh
            | Self::Unchanged
            | Self::Moved
            | Self::Immutable
            | Self::Unasked
            | Self::PastGrant(_) => false,
        }
    }

    /// Why the upstream gave no usable answer, where that is the reason.
    pub fn cause(self) -> Option<Cause> {
        match self {
            Self::Stale(cause) | Self::PastGrant(cause) | Self::NewUnavailable(cause) => Some(cause),
            Self::LastComplete(cause) => cause,
            _ => None,
        }
    }
}

/// Why something is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// It is not held.
    NotHeld,
    /// The upstream names another digest than the one held.
    Newer,
    /// The upstream does not say which digest it is, so the bytes must.
    Unnamed,
}

impl Why {
    /// The name in logs, metrics and `Cache-Status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotHeld => "not-held",
            Self::Newer => "newer",
            Self::Unnamed => "unnamed",
        }
    }
}

/// Why the client is told no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Policy `never`, and it is not held.
    NotHeld,
    /// This principal was never shown to have the right, and the policy forbids asking, be there a copy or not: a stranger
    /// learns nothing.
    NotVouched,
    /// The upstream refused this credential.
    Forbidden,
    /// There is no credential, and the upstream is silent that could say whether one is needed: the client is asked for
    /// one, be there a copy or not, for those who had the right before are served with theirs.
    Challenged,
    /// The upstream says that there is no such thing.
    Absent,
    /// The upstream is silent, and there is nothing that may be served instead.
    Silent(Cause),
    /// The upstream is silent, and the held copy was confirmed longer ago than `stale` allows.
    TooStale(Cause),
    /// The upstream is silent, and of the image only a part is held.
    Incomplete(Cause),
}

impl Refusal {
    /// The name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotHeld => "not-held",
            Self::NotVouched => "not-vouched",
            Self::Forbidden => "forbidden",
            Self::Challenged => "challenged",
            Self::Absent => "absent",
            Self::Silent(_) => "silent",
            Self::TooStale(_) => "too-stale",
            Self::Incomplete(_) => "incomplete",
        }
    }
}
