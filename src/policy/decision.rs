//! Decisions and their reasons. Each reason has one name in the log, the metrics, `Cache-Status` and the admin
//! API.

use super::min_age::YoungDigest;
use crate::oci::{Digest, UpstreamFailure};

/// Action for a request, with its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send a `HEAD` upstream for the current digest, then decide again.
    Revalidate,
    /// Serve the cached copy.
    Serve(HitReason),
    /// The tag's current manifest is cached, its layers are not. Serve it if the upstream has the layers;
    /// otherwise decide again, because a previous complete image is cached.
    ProbeLayers(HitReason),
    /// Fetch from the upstream.
    Fetch(MissReason),
    /// Deny the request.
    Deny(DenyReason),
}

impl Decision {
    /// Name of the reason in the log, the metrics, `Cache-Status` and the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Revalidate => "revalidate",
            Self::Serve(reason) | Self::ProbeLayers(reason) => reason.name(),
            Self::Fetch(reason) => reason.name(),
            Self::Deny(reason) => reason.name(),
        }
    }
}

/// Reason for serving a cached copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HitReason {
    /// Confirmed less than `max_age` ago.
    Fresh,
    /// The upstream confirmed during this request that the tag names this digest.
    Revalidated,
    /// The tag names another digest now, which is cached as well.
    TagMoved,
    /// Requested by digest, so it cannot change.
    Immutable,
    /// The policy forbids revalidation.
    NotRevalidated,
    /// The upstream is unavailable (RFC 5861 §4). The tag may have moved since.
    StaleIfError(UpstreamFailure),
    /// The upstream is unavailable. Served by digest to a principal whose grant has expired.
    ExpiredGrant(UpstreamFailure),
    /// A newer image exists, but fetching it failed.
    StaleOnFetchError(UpstreamFailure),
    /// The tag's newest image is incomplete and its missing layers are unavailable, so the previous complete
    /// image is served.
    PreviousComplete(Option<UpstreamFailure>),
    /// The upstream answers 404, and `on_not_found = "serve-stale"`.
    RetainedDeleted,
    /// The upstream rejects the cache's own credential.
    CacheCredentialRejected,
    /// The tag names a digest that is younger than `min_age`. The newest one that is old enough is served.
    Cooling(YoungDigest),
}

impl HitReason {
    /// Name in the log, the metrics and `Cache-Status`.
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
            Self::Cooling(_) => "cooling",
        }
    }

    /// Whether the copy may be outdated. If so, the response carries `Warning: 299`.
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
            | Self::ExpiredGrant(_)
            | Self::Cooling(_) => false,
        }
    }

    /// The digest that the tag names and that is too young, if that is the reason.
    pub fn youth(self) -> Option<YoungDigest> {
        match self {
            Self::Cooling(youth) => Some(youth),
            _ => None,
        }
    }

    /// Upstream failure that led to this reason, if any.
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

/// Reason for fetching from the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MissReason {
    /// Not cached.
    NotCached,
    /// The upstream names another digest than the cached one.
    NewDigest,
    /// The upstream states no digest, so it must be computed from the bytes.
    NoDigest,
    /// The tag names a digest that is younger than `min_age`. The newest one that is old enough is fetched.
    Cooling(YoungDigest),
}

impl MissReason {
    /// Name in the log, the metrics and `Cache-Status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotCached => "not-cached",
            Self::NewDigest => "new-digest",
            Self::NoDigest => "no-digest",
            Self::Cooling(_) => "cooling",
        }
    }

    /// The digest that the tag names and that is too young, if that is the reason.
    pub fn youth(self) -> Option<YoungDigest> {
        match self {
            Self::Cooling(youth) => Some(youth),
            _ => None,
        }
    }
}

/// Reason for denying a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// Policy `never`, and the content is not cached.
    NotCached,
    /// This principal has no grant, and the policy forbids a revalidation. The same denial is given whether a
    /// copy exists or not, so it reveals nothing.
    NotAuthorized,
    /// The upstream rejected this credential.
    Forbidden,
    /// The client sent no credential, and the unavailable upstream cannot say whether one is needed. The client
    /// gets a 401, so that it sends its credential, for which it may have a grant. It gets that whether a copy exists
    /// or not.
    AuthRequired,
    /// The upstream answered 404.
    NotFound,
    /// The upstream is unavailable, and no cached copy may be served.
    UpstreamUnavailable(UpstreamFailure),
    /// The upstream is unavailable, and the cached copy was confirmed longer ago than `stale_if_error` allows.
    StaleLimitExceeded(UpstreamFailure),
    /// The upstream is unavailable, and the cached image is incomplete.
    Incomplete(UpstreamFailure),
    /// The digest is younger than `min_age`, and nothing that is old enough can be served.
    TooYoung(YoungDigest),
    /// The operator blocked this digest. Only a principal that is authorized to read it gets this denial.
    Blocked(Digest),
}

impl DenyReason {
    /// Name in the log and the metrics.
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
            Self::TooYoung(_) => "too-young",
            Self::Blocked(_) => "blocked",
        }
    }
}
