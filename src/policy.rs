//! The decision: what to do with a request, given everything that is known. Pure; the product's heart.
//!
//! [`decide`] is called at most three times for one request. Before asking, it may say [`Decision::Revalidate`]; the road then
//! sends one `HEAD` **with the client's own credential** and calls it again with what was [`Revalidation`]. That `HEAD` is
//! both the freshness check and the authorisation check, which is how a held copy never becomes a way around a private
//! registry's authentication. Should what followed fail, a fetch or a [`Decision::ProbeLayers`], it is called once more with
//! [`Revalidation::FetchFailed`].
//!
//! There is no clock, no I/O and no handle here: a [`CacheState`] can be printed, kept in a failing test, or shown by
//! the admin API, and always yields the same [`Decision`]. `policy/tests.rs` enumerates every situation against laws of
//! safety (what may never be served) and of economy (what may never be asked or fetched).

pub mod authz;
mod decision;
pub mod rules;

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

pub use decision::{Decision, DenyReason, HitReason, MissReason};

use crate::age;
use crate::oci::{Digest, UpstreamFailure};

/// Decides what to do. Total: every situation has a verdict.
pub fn decide(state: &CacheState) -> Decision {
    let s = &state.with_invalidation_applied();
    match s.revalidation {
        Revalidation::NotDone => before_revalidation(s),
        Revalidation::Digest { digest, presence } => on_digest(s, digest, presence),
        Revalidation::NoDigest => on_no_digest(s),
        Revalidation::NotFound => on_not_found(s),
        Revalidation::Denied(CredentialOwner::Client) => Decision::Deny(DenyReason::Forbidden),
        Revalidation::Denied(CredentialOwner::Proxy) => on_cache_credential_rejected(s),
        Revalidation::Unavailable(cause) => on_unavailable(s, cause, HitReason::StaleIfError(cause)),
        Revalidation::FetchFailed(cause) => on_unavailable(s, cause, HitReason::StaleOnFetchError(cause)),
    }
}

/// Everything the decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheState {
    /// The policy of the rule that matched.
    pub policy: Policy,
    /// What is asked for.
    pub kind: ContentKind,
    /// The copy that could be served, if there is one.
    pub cached: Option<CachedEntry>,
    /// What the upstream has shown about this principal's right to read.
    pub authorization: Authorization,
    /// What the upstream said to the question, once it was put.
    pub revalidation: Revalidation,
    /// What to do when the upstream says that the tag is gone.
    pub on_not_found: OnNotFound,
    /// For how long after a confirmation a tag is served without asking.
    pub max_age: Duration,
    /// For how long after a confirmation a tag is served while the upstream is silent; `None`: forever.
    pub stale_if_error: Option<Duration>,
    /// The time of the request.
    pub now: SystemTime,
}

impl CacheState {
    /// The same situation after something was heard.
    #[must_use]
    pub fn with_revalidation(self, revalidation: Revalidation) -> Self {
        Self { revalidation, ..self }
    }

    /// A tag that a write may have changed is judged as under `if-newer`, and is fresh for nobody. Only `never`, which asks
    /// nobody, stays what it is.
    fn with_invalidation_applied(self) -> Self {
        if self.kind != ContentKind::Tag || !self.is_invalidated() {
            return self;
        }
        let policy = match self.policy {
            Policy::IfNotPresent => Policy::IfNewer,
            policy @ (Policy::Always | Policy::IfNewer | Policy::Never) => policy,
        };
        Self {
            policy,
            max_age: Duration::ZERO,
            ..self
        }
    }

    fn is_invalidated(&self) -> bool {
        self.cached.is_some_and(|cached| cached.is_invalidated)
    }

    /// Whether the copy of a tag may be served without asking. A copy that was confirmed in the future is none: asking
    /// costs one question.
    fn is_fresh(&self, cached: CachedEntry) -> bool {
        !cached.is_moved && age::is_within(cached.confirmed_at, self.max_age, self.now)
    }

    /// What counts of the rest. By digest nothing better exists than what is cached, and its reader asks for the parts it
    /// wants: clients read manifests and configs of every platform, and layers of one. Completeness is a rule for tags.
    fn completeness(&self, cached: CachedEntry) -> Completeness {
        match self.kind {
            ContentKind::Tag => cached.completeness,
            ContentKind::Manifest | ContentKind::Blob => Completeness::Complete,
        }
    }
}

/// The pull policies, in the words of GitLab Runner and Kubernetes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Nothing is served that the upstream has not confirmed now.
    Always,
    /// The upstream is asked; the held copy is served when it is unchanged or the upstream is silent.
    #[default]
    IfNewer,
    /// What is held is served without asking for a newer one.
    IfNotPresent,
    /// Only what is held; the upstream is never contacted.
    Never,
}

impl Policy {
    /// Every policy, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Always, Self::IfNewer, Self::IfNotPresent, Self::Never];

    /// The name as written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::IfNewer => "if-newer",
            Self::IfNotPresent => "if-not-present",
            Self::Never => "never",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Policy {
    type Err = UnknownValue;

    fn from_str(word: &str) -> Result<Self, UnknownValue> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.name() == word)
            .ok_or(UnknownValue)
    }
}

/// What to do with a held tag that the upstream says does not exist (404).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnNotFound {
    /// A tag deleted upstream is gone here too.
    #[default]
    Refuse,
    /// Keep serving it to those who have had the right to read it: an archive.
    ServeStale,
}

impl OnNotFound {
    /// Both choices.
    pub const ALL: [Self; 2] = [Self::Refuse, Self::ServeStale];

    /// The name as written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::ServeStale => "serve-stale",
        }
    }
}

impl FromStr for OnNotFound {
    type Err = UnknownValue;

    fn from_str(word: &str) -> Result<Self, UnknownValue> {
        Self::ALL
            .into_iter()
            .find(|absence| absence.name() == word)
            .ok_or(UnknownValue)
    }
}

/// A word that is none of the choices. The configuration reader adds where it stands and what the choices are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not one of the choices")]
pub struct UnknownValue;

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ContentKind {
    /// A manifest by tag: the only thing that can be stale.
    Tag,
    /// A manifest by digest: immutable.
    Manifest,
    /// A blob: immutable, and its download is shared.
    Blob,
}

/// A copy in the store, verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedEntry {
    /// What the copy is.
    pub digest: Digest,
    /// When the upstream last said that the tag names this digest. Without meaning for what is asked by digest.
    pub confirmed_at: SystemTime,
    /// Whether the tag was seen to name another digest since, in a response to any client.
    pub is_moved: bool,
    /// What the manifest points to. A blob points to nothing.
    pub completeness: Completeness,
    /// Whether a write that was handed on may have changed it upstream, and the upstream has not been asked since.
    pub is_invalidated: bool,
}

impl CachedEntry {
    /// Whether there is a whole image to serve, should this digest's own image turn out not to be had.
    fn has_complete_fallback(&self, digest: Digest) -> bool {
        match self.completeness {
            Completeness::Complete => self.digest != digest,
            Completeness::Incomplete { previous } => previous.is_some(),
        }
    }
}

/// The rest of a held manifest's image: config, layers, manifests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// Held, or arriving now: the image can be pulled whole without another word of the upstream.
    Complete,
    /// Some of it must still be fetched. A client given such a manifest while the upstream is silent fails halfway,
    /// with no way back for most (`docs` of podman, kaniko): better no manifest than half an image.
    Incomplete {
        /// When the upstream last confirmed the newest whole image that the tag named before, if one is held.
        previous: Option<SystemTime>,
    },
}

/// A principal's right to read, as far as the upstream has shown it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Authorization {
    /// Never shown, or withdrawn, or too long ago even for an outage.
    Unknown,
    /// Shown before, but longer ago than a grant lives: good only while the upstream is silent.
    Expired,
    /// Shown recently enough to serve without asking.
    Granted,
}

/// What the upstream answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revalidation {
    /// Nothing was asked yet.
    NotDone,
    /// 2xx, and the digest that the reference names now.
    Digest {
        /// The digest named.
        digest: Digest,
        /// How much of it is in the store.
        presence: Presence,
    },
    /// 2xx, but without a digest that can be verified.
    NoDigest,
    /// 404: there is no such thing.
    NotFound,
    /// 401 or 403 to this credential.
    Denied(CredentialOwner),
    /// No usable answer. Never a refusal and never an absence.
    Unavailable(UpstreamFailure),
    /// It named something new, but the fetch of it failed.
    FetchFailed(UpstreamFailure),
}

/// How much of an image is in the store, the upstream having been seen to have it in this repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Presence {
    /// Not even the manifest.
    None,
    /// The manifest.
    ManifestOnly,
    /// The manifest and all that it points to, or that much of it arriving.
    Complete,
}

/// Whose credential the upstream refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CredentialOwner {
    /// The client's: it may not read.
    Client,
    /// The proxy's own: the operator has something to mend, the client has done nothing wrong.
    Proxy,
}

#[expect(
    clippy::match_same_arms,
    reason = "a table: rows that agree are still rows of their own"
)]
fn before_revalidation(s: &CacheState) -> Decision {
    // Before the look at what is held: a refusal must not tell a stranger of it.
    if s.policy == Policy::Never && s.authorization == Authorization::Unknown {
        return Decision::Deny(DenyReason::NotAuthorized);
    }
    let Some(cached) = s.cached else {
        return match s.policy {
            Policy::Never => Decision::Deny(DenyReason::NotCached),
            Policy::Always | Policy::IfNewer | Policy::IfNotPresent => Decision::Fetch(MissReason::NotCached),
        };
    };
    match (s.policy, s.authorization, s.kind) {
        (Policy::Never, _, _) => match s.completeness(cached) {
            Completeness::Complete => Decision::Serve(HitReason::NotRevalidated),
            Completeness::Incomplete { previous: Some(_) } => {
                Decision::Serve(HitReason::PreviousComplete(None))
            }
            Completeness::Incomplete { previous: None } => Decision::Deny(DenyReason::NotCached),
        },
        (_, Authorization::Unknown | Authorization::Expired, _) => Decision::Revalidate,
        // Of use only if the upstream has the rest, so it must be there to be asked.
        (_, Authorization::Granted, _) if s.completeness(cached) != Completeness::Complete => {
            Decision::Revalidate
        }
        (_, Authorization::Granted, ContentKind::Manifest | ContentKind::Blob) if cached.is_invalidated => {
            Decision::Revalidate
        }
        (_, Authorization::Granted, ContentKind::Manifest | ContentKind::Blob) => {
            Decision::Serve(HitReason::Immutable)
        }
        (Policy::IfNotPresent, Authorization::Granted, ContentKind::Tag) => {
            Decision::Serve(HitReason::NotRevalidated)
        }
        (Policy::IfNewer, Authorization::Granted, ContentKind::Tag) if s.is_fresh(cached) => {
            Decision::Serve(HitReason::Fresh)
        }
        (Policy::Always | Policy::IfNewer, Authorization::Granted, ContentKind::Tag) => Decision::Revalidate,
    }
}

/// A 2xx with a digest: this principal may read, so standing plays no part any more.
fn on_digest(s: &CacheState, digest: Digest, presence: Presence) -> Decision {
    match (s.kind, s.cached) {
        (ContentKind::Manifest | ContentKind::Blob, Some(_)) => Decision::Serve(HitReason::Immutable),
        (ContentKind::Tag, Some(cached)) if cached.digest == digest => {
            serve_or_probe_layers(cached, digest, HitReason::Revalidated)
        }
        // It was asked for the right to read, or for the rest, not for something newer.
        (ContentKind::Tag, Some(cached)) if s.policy == Policy::IfNotPresent => {
            serve_or_probe_layers(cached, cached.digest, HitReason::NotRevalidated)
        }
        (ContentKind::Tag, Some(cached)) => match presence {
            Presence::Complete => Decision::Serve(HitReason::TagMoved),
            Presence::ManifestOnly => serve_or_probe_layers(cached, digest, HitReason::TagMoved),
            Presence::None => Decision::Fetch(MissReason::NewDigest),
        },
        (ContentKind::Tag, None) if presence != Presence::None => Decision::Serve(HitReason::TagMoved),
        (_, None) => Decision::Fetch(MissReason::NotCached),
    }
}

/// A manifest without its rest is checked where something better could be served instead; where not, the upstream that
/// has just answered is taken to have the rest.
fn serve_or_probe_layers(cached: CachedEntry, digest: Digest, reason: HitReason) -> Decision {
    if cached.has_complete_fallback(digest) {
        Decision::ProbeLayers(reason)
    } else {
        Decision::Serve(reason)
    }
}

fn on_no_digest(s: &CacheState) -> Decision {
    match (s.kind, s.cached) {
        (ContentKind::Manifest | ContentKind::Blob, Some(_)) => Decision::Serve(HitReason::Immutable),
        (ContentKind::Tag, Some(cached)) if s.policy == Policy::IfNotPresent => {
            serve_or_probe_layers(cached, cached.digest, HitReason::NotRevalidated)
        }
        (_, _) => Decision::Fetch(MissReason::NoDigest),
    }
}

/// Some registries answer 404 where they mean 403, so a 404 never helps a principal that was not vouched for before.
fn on_not_found(s: &CacheState) -> Decision {
    let keep = s.on_not_found == OnNotFound::ServeStale
        && s.authorization != Authorization::Unknown
        && s.policy != Policy::Always;
    match s.cached {
        Some(cached) if keep => Decision::Serve(match s.completeness(cached) {
            Completeness::Incomplete { previous: Some(_) } => HitReason::PreviousComplete(None),
            Completeness::Complete | Completeness::Incomplete { previous: None } => {
                HitReason::RetainedDeleted
            }
        }),
        _ => Decision::Deny(DenyReason::NotFound),
    }
}

/// The operator's mistake must not stop the builds of those who are entitled anyway.
fn on_cache_credential_rejected(s: &CacheState) -> Decision {
    match on_unavailable(
        s,
        UpstreamFailure::Status(403),
        HitReason::CacheCredentialRejected,
    ) {
        serve @ Decision::Serve(_) => serve,
        _ => Decision::Deny(DenyReason::Forbidden),
    }
}

/// The upstream gave no usable answer: the held copy, for those entitled, within `stale_if_error`.
fn on_unavailable(s: &CacheState, cause: UpstreamFailure, reason: HitReason) -> Decision {
    let Some(cached) = s.cached else {
        return Decision::Deny(DenyReason::UpstreamUnavailable(cause));
    };
    if s.policy == Policy::Always || s.authorization == Authorization::Unknown {
        return Decision::Deny(DenyReason::UpstreamUnavailable(cause));
    }
    let (confirmed_at, reason) = match s.completeness(cached) {
        Completeness::Complete => (cached.confirmed_at, reason),
        Completeness::Incomplete { previous: Some(at) } => (at, HitReason::PreviousComplete(Some(cause))),
        // Who limits the rate of questions still gives the bytes: the Hub counts manifests alone.
        Completeness::Incomplete { previous: None } if cause == UpstreamFailure::RateLimited => {
            (cached.confirmed_at, reason)
        }
        Completeness::Incomplete { previous: None } => return Decision::Deny(DenyReason::Incomplete(cause)),
    };
    match s.kind {
        ContentKind::Manifest | ContentKind::Blob => Decision::Serve(HitReason::ExpiredGrant(cause)),
        ContentKind::Tag => match s.stale_if_error {
            Some(limit) if !age::is_within_or_ahead(confirmed_at, limit, s.now) => {
                Decision::Deny(DenyReason::StaleLimitExceeded(cause))
            }
            _ => Decision::Serve(reason),
        },
    }
}
