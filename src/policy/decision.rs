//! What can be decided, each with the reason's one name: in the log, the metrics, `Cache-Status` and the admin API.

use crate::oci::UpstreamFailure;

/// What to do, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Ask the upstream which digest the reference names now, then decide again.
    Revalidate,
    /// Serve the held copy.
    Serve(HitReason),
    /// The manifest that the tag names now is held, but not the rest: serve it if the upstream has the rest, else decide
    /// again, for an earlier image is held whole.
    ProbeLayers(HitReason),
    /// Fetch it from the upstream.
    Fetch(MissReason),
    /// Say no.
    Deny(DenyReason),
}

impl Decision {
    /// The reason's name, as it stands in the log, the metrics, `Cache-Status` and the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Revalidate => "revalidate",
            Self::Serve(reason) | Self::ProbeLayers(reason) => reason.name(),
            Self::Fetch(why) => why.name(),
            Self::Deny(refusal) => refusal.name(),
        }
    }
}

/// Why a held copy may be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HitReason {
    /// Confirmed less than `max_age` ago.
    Fresh,
    /// The upstream confirmed just now that the tag still names it.
    Revalidated,
    /// The tag names another digest now, which is held as well.
    TagMoved,
    /// Asked for by digest: it cannot change.
    Immutable,
    /// The policy says not to ask for a newer one.
    NotRevalidated,
    /// The upstream is silent; the tag may have moved since.
    StaleIfError(UpstreamFailure),
    /// The upstream is silent; asked for by digest, on a right shown before.
    ExpiredGrant(UpstreamFailure),
    /// There is a newer one, but it could not be had.
    StaleOnFetchError(UpstreamFailure),
    /// The tag's newest image is not held whole and the rest cannot be had: the last one that is whole instead.
    PreviousComplete(Option<UpstreamFailure>),
    /// Gone upstream, and the rule says to keep serving it.
    RetainedDeleted,
    /// The upstream refuses the proxy's own credential.
    CacheCredentialRejected,
}

impl HitReason {
    /// The name in logs, metrics and `Cache-Status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Revalidated => "revalidated",
            Self::TagMoved => "tag-moved",
            Self::Immutable => "immutable",
            Self::NotRevalidated => "not-revalidated",
            Self::StaleIfError(_) => "stale-if-error",
            Self::ExpiredGrant(_) => "expired-grant",
            Self::StaleOnFetchError(_) => "stale-fetch-failed",
            Self::PreviousComplete(_) => "previous-complete",
            Self::RetainedDeleted => "retained-deleted",
            Self::CacheCredentialRejected => "cache-credential-rejected",
        }
    }

    /// Whether what is served may no longer be what the upstream has: the client is told so (`Warning: 299`).
    pub fn may_be_outdated(self) -> bool {
        match self {
            Self::StaleIfError(_)
            | Self::StaleOnFetchError(_)
            | Self::PreviousComplete(_)
            | Self::RetainedDeleted
            | Self::CacheCredentialRejected => true,
            Self::Fresh
            | Self::Revalidated
            | Self::TagMoved
            | Self::Immutable
            | Self::NotRevalidated
            | Self::ExpiredGrant(_) => false,
        }
    }

    /// Why the upstream gave no usable answer, where that is the reason.
    pub fn cause(self) -> Option<UpstreamFailure> {
        match self {
            Self::StaleIfError(cause) | Self::ExpiredGrant(cause) | Self::StaleOnFetchError(cause) => {
                Some(cause)
            }
            Self::PreviousComplete(cause) => cause,
            _ => None,
        }
    }
}

/// Why something is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MissReason {
    /// It is not held.
    NotCached,
    /// The upstream names another digest than the one held.
    NewDigest,
    /// The upstream does not say which digest it is, so the bytes must.
    NoDigest,
}

impl MissReason {
    /// The name in logs, metrics and `Cache-Status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotCached => "not-cached",
            Self::NewDigest => "new-digest",
            Self::NoDigest => "no-digest",
        }
    }
}

/// Why the client is told no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// Policy `never`, and it is not held.
    NotCached,
    /// This principal was never shown to have the right, and the policy forbids asking, be there a copy or not: a stranger
    /// learns nothing.
    NotAuthorized,
    /// The upstream refused this credential.
    Forbidden,
    /// There is no credential, and the upstream is silent that could say whether one is needed: the client is asked for
    /// one, be there a copy or not, for those who had the right before are served with theirs.
    AuthRequired,
    /// The upstream says that there is no such thing.
    NotFound,
    /// The upstream is silent, and there is nothing that may be served instead.
    UpstreamUnavailable(UpstreamFailure),
    /// The upstream is silent, and the held copy was confirmed longer ago than `stale_if_error` allows.
    StaleLimitExceeded(UpstreamFailure),
    /// The upstream is silent, and of the image only a part is held.
    Incomplete(UpstreamFailure),
}

impl DenyReason {
    /// The name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotCached => "not-cached",
            Self::NotAuthorized => "not-authorized",
            Self::Forbidden => "forbidden",
            Self::AuthRequired => "auth-required",
            Self::NotFound => "not-found",
            Self::UpstreamUnavailable(_) => "upstream-unavailable",
            Self::StaleLimitExceeded(_) => "stale-limit-exceeded",
            Self::Incomplete(_) => "incomplete",
        }
    }
}
