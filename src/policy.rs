//! Pull-policy decision: a pure function from the cache state to what the proxy does with a request.
//!
//! [`decide`] is called at most three times for one request. Before a revalidation it may return
//! [`Decision::Revalidate`]. The proxy then sends one `HEAD` **with the client's own credential** and calls it
//! again with the [`Revalidation`] result. That `HEAD` is both the freshness check and the authorization check,
//! so a cached copy cannot bypass a private registry's authentication. If the decision is [`Decision::Fetch`] or
//! [`Decision::ProbeLayers`] and that fails, the proxy calls it once more with [`Revalidation::FetchFailed`].
//!
//! A [`CacheState`] is plain data, and nothing here reads a clock or does I/O. So a state can be printed, copied into
//! a test or shown by the admin API, and always yields the same [`Decision`]. `policy/tests.rs` enumerates all states
//! and checks two kinds of laws: of safety (which responses are forbidden) and of economy (which upstream requests are
//! forbidden).

pub mod authz;
mod decision;
pub mod min_age;
pub mod refresh;
pub mod rules;

#[cfg(test)]
mod tests;

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::Deserialize;

pub use decision::{Decision, DenyReason, HitReason, MissReason};

use self::min_age::{Maturity, YoungDigest};
use crate::age;
use crate::oci::{Digest, UpstreamFailure};

/// Decides what to do with a request. Total: every state has a decision.
pub fn decide(state: &CacheState) -> Decision {
    let s = &state.with_invalidation_applied();
    let decision = match s.cooling {
        None => decide_by_policy(s),
        Some(cooling) => decide_by_age(s, &cooling),
    };
    s.blocked
        .map_or(decision, |digest| refuse_blocked(s, decision, digest))
}

fn decide_by_policy(s: &CacheState) -> Decision {
    match s.revalidation {
        Revalidation::NotDone => before_revalidation(s),
        Revalidation::Digest { digest, presence } => on_digest(s, digest, presence),
        Revalidation::Blocked(digest) => on_blocked_digest(s, digest),
        Revalidation::NoDigest => on_no_digest(s),
        Revalidation::NotFound => on_not_found(s),
        Revalidation::Denied(CredentialOwner::Client) => Decision::Deny(DenyReason::Forbidden),
        Revalidation::Denied(CredentialOwner::Proxy) => on_cache_credential_rejected(s),
        Revalidation::Unavailable(cause) => on_unavailable(s, cause, HitReason::StaleIfError(cause)),
        Revalidation::FetchFailed(cause) => on_unavailable(s, cause, HitReason::StaleOnFetchError(cause)),
    }
}

/// Input of the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheState {
    /// Pull policy of the matching rule.
    pub policy: Policy,
    /// Kind of the requested content.
    pub kind: ContentKind,
    /// Cached copy that can be served, if there is one.
    pub cached: Option<CachedEntry>,
    /// The digest that the operator blocked, if the request concerns one. For a tag, that is the digest of the cached
    /// copy. For a request by digest, it is the requested digest, cached or not. A blocked copy counts as incomplete:
    /// in its place, a previous complete image that is not blocked may be served ([`Completeness::Incomplete`]).
    pub blocked: Option<Digest>,
    /// Authorization of this principal, from remembered upstream responses.
    pub authorization: Authorization,
    /// Result of the revalidation, if one was made.
    pub revalidation: Revalidation,
    /// Action if the upstream answers 404 for the tag.
    pub on_not_found: OnNotFound,
    /// Time after a confirmation during which a tag is served without revalidation.
    pub max_age: Duration,
    /// Time after a confirmation during which a tag is served while the upstream is unavailable. `None`:
    /// unlimited.
    pub stale_if_error: Option<Duration>,
    /// Whether the digests that may be served are old enough; `None` if no minimum age applies to the request.
    pub cooling: Option<AgeFacts>,
    /// Time of the request.
    pub now: SystemTime,
}

impl CacheState {
    /// The digest that the response is to have, if the upstream named one: the named digest or, while that is too
    /// young, the newest one that is old enough.
    pub fn target(&self) -> Option<Digest> {
        match (self.revalidation, self.cooling) {
            (
                Revalidation::Digest { .. } | Revalidation::Blocked(_) | Revalidation::NoDigest,
                Some(cooling),
            ) if !cooling.named.is_mature() => cooling.older.map(|older| older.digest),
            (Revalidation::Digest { digest, .. }, _) => Some(digest),
            _ => None,
        }
    }

    /// Whether the cached copy would be served if the upstream did not respond.
    pub fn has_fallback(&self) -> bool {
        let unavailable = Revalidation::Unavailable(UpstreamFailure::RevalidateTimeout);
        matches!(decide(&self.with_revalidation(unavailable)), Decision::Serve(_))
    }

    /// Whether the decision depends on how much of `digest` is in the store, if the upstream names it. It does not if the
    /// tag is unchanged, or if the request is by digest.
    pub fn needs_presence(&self, digest: &Digest) -> bool {
        let is_cached = self.cached.is_some_and(|cached| cached.digest == *digest);
        self.kind == ContentKind::Tag && !(is_cached && self.cooling.is_none())
    }

    /// The age below which the record of another cache counts as a confirmation of the tag, before the upstream is asked.
    /// `None`: no record is read. A client without a grant must not cause a read, because its time would reveal the
    /// tags of other caches.
    pub fn record_age_max(&self) -> Option<Duration> {
        let s = self.with_invalidation_applied();
        if s.kind != ContentKind::Tag || s.revalidation != Revalidation::NotDone {
            return None;
        }
        let is_fresh = s.cached.is_some_and(|cached| s.is_fresh(cached));
        let stale_limit = s.stale_if_error.unwrap_or(Duration::MAX);
        match (s.policy, s.authorization) {
            (Policy::IfNewer, Authorization::Granted) => {
                (!is_fresh && !s.max_age.is_zero()).then_some(s.max_age)
            }
            (Policy::IfNotPresent, Authorization::Granted)
            | (Policy::Never, Authorization::Granted | Authorization::Expired) => {
                s.cached.is_none().then_some(stale_limit)
            }
            (Policy::Always | Policy::IfNewer | Policy::IfNotPresent | Policy::Never, _) => None,
        }
    }

    /// Returns the same state with a revalidation result.
    #[must_use]
    pub fn with_revalidation(self, revalidation: Revalidation) -> Self {
        Self { revalidation, ..self }
    }

    /// Returns the same state with the ages of the digests that may be served, if a minimum age applies.
    #[must_use]
    pub fn with_cooling(self, cooling: Option<AgeFacts>) -> Self {
        Self { cooling, ..self }
    }

    /// Returns the same state with the digest that the operator blocked, if it is.
    #[must_use]
    pub fn with_blocked(self, blocked: Option<Digest>) -> Self {
        Self { blocked, ..self }
    }

    /// A tag that a forwarded write invalidated is treated as under `if-newer` with `max_age` 0, as is one whose cached
    /// copy is blocked. The policy `never` is unaffected, because it forbids upstream requests.
    fn with_invalidation_applied(self) -> Self {
        if self.kind != ContentKind::Tag || !(self.is_invalidated() || self.blocked.is_some()) {
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

    /// Whether a cached tag is served without revalidation. A confirmation time in the future does not count, because
    /// one `HEAD` can confirm the tag now.
    fn is_fresh(&self, cached: CachedEntry) -> bool {
        !cached.is_moved && age::is_within(cached.confirmed_at, self.max_age, self.now)
    }

    /// Completeness that counts for the decision. It matters for tags only. A manifest requested by digest is served
    /// whether its content is cached or not: clients read the manifests and configs of every platform but the layers of
    /// one, and request each missing blob themselves.
    fn completeness(&self, cached: CachedEntry) -> Completeness {
        match self.kind {
            ContentKind::Tag if self.blocked.is_some() && cached.completeness == Completeness::Complete => {
                Completeness::Incomplete { previous: None }
            }
            ContentKind::Tag => cached.completeness,
            ContentKind::Manifest | ContentKind::Blob => Completeness::Complete,
        }
    }
}

/// Pull policies, named as in GitLab Runner and Kubernetes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case", expecting = "a policy")]
pub enum Policy {
    /// Serves nothing that the upstream has not confirmed during this request.
    Always,
    /// Revalidates. Serves the cached copy if it is unchanged or the upstream is unavailable.
    #[default]
    IfNewer,
    /// Serves the cached copy without revalidation.
    IfNotPresent,
    /// Serves cached copies only and never contacts the upstream.
    Never,
}

impl Policy {
    /// All policies, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Always, Self::IfNewer, Self::IfNotPresent, Self::Never];

    /// Name in the configuration.
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

/// Action for a cached tag that the upstream answers with 404.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case", expecting = "a choice")]
pub enum OnNotFound {
    /// Answers 404 as well.
    #[default]
    Refuse,
    /// Serves the cached copy to principals with a grant, so that the cache archives deleted tags.
    ServeStale,
}

impl OnNotFound {
    /// All variants.
    pub const ALL: [Self; 2] = [Self::Refuse, Self::ServeStale];

    /// Name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::ServeStale => "serve-stale",
        }
    }
}

/// Kind of the requested content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ContentKind {
    /// A manifest by tag. Only tags can be stale.
    Tag,
    /// A manifest by digest, immutable.
    Manifest,
    /// A blob, immutable. Requests for it share one download.
    Blob,
}

/// A verified copy in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedEntry {
    /// Digest of the copy.
    pub digest: Digest,
    /// When the upstream last confirmed that the tag names this digest. Unused for requests by digest.
    pub confirmed_at: SystemTime,
    /// Whether a later upstream response, to any client, named another digest for this tag.
    pub is_moved: bool,
    /// Completeness of the image. A blob is always complete.
    pub completeness: Completeness,
    /// Whether a forwarded write may have changed it upstream, with no revalidation since (RFC 9111 §4.4).
    pub is_invalidated: bool,
}

impl CachedEntry {
    /// Whether the image is complete.
    pub fn is_complete(&self) -> bool {
        self.completeness == Completeness::Complete
    }

    /// Whether another complete image can be served if `digest` turns out to be unavailable.
    fn has_complete_fallback(&self, digest: Digest) -> bool {
        match self.completeness {
            Completeness::Complete => self.digest != digest,
            Completeness::Incomplete { previous } => previous.is_some(),
        }
    }
}

/// The digests that may be served for a request to which a minimum age applies, each with whether it is old enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgeFacts {
    /// Maturity of [`CacheState::cached`].
    pub cached: Maturity,
    /// Maturity of the previous complete image, if [`CachedEntry::completeness`] says that there is one.
    pub previous: Maturity,
    /// Maturity of the digest that the upstream named, after a revalidation.
    pub named: Maturity,
    /// The newest digest that is old enough and that the tag named before.
    pub older: Option<OlderDigest>,
}

impl AgeFacts {
    /// For a manifest requested by digest: cached or named, it is the same digest, and no other can stand in.
    pub fn of_digest(maturity: Maturity) -> Self {
        Self {
            cached: maturity,
            previous: Maturity::Mature,
            named: maturity,
            older: None,
        }
    }
}

/// A digest that a tag named before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OlderDigest {
    /// The digest.
    pub digest: Digest,
    /// How much of it is in the store.
    pub presence: Presence,
}

/// Completeness of a cached image: config, layers and child manifests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// Everything is cached or being downloaded: the image can be pulled without the upstream.
    Complete,
    /// Some content must still be fetched. A client that gets such a manifest while the upstream is unavailable
    /// fails halfway, and most clients cannot recover (see the docs of podman and kaniko). Denying the manifest
    /// is better.
    Incomplete {
        /// When the upstream last confirmed the previous complete image of this tag, if one is cached.
        previous: Option<SystemTime>,
    },
}

/// Authorization of a principal, as far as the upstream has shown it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Authorization {
    /// No grant, a revoked one, or one older than `grant_ttl_offline`.
    Unknown,
    /// A grant older than `grant_ttl`. It counts only while the upstream is unavailable.
    Expired,
    /// A grant recent enough to serve without revalidation.
    Granted,
}

/// Result of a revalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revalidation {
    /// No upstream request was made yet.
    NotDone,
    /// 2xx with the digest that the reference names now.
    Digest {
        /// The digest.
        digest: Digest,
        /// How much of that image is in the store, if [`CacheState::needs_presence`].
        presence: Presence,
    },
    /// 2xx with the digest that the reference names now, which the operator blocked.
    Blocked(Digest),
    /// 2xx without a verifiable digest.
    NoDigest,
    /// 404.
    NotFound,
    /// 401 or 403 for this credential.
    Denied(CredentialOwner),
    /// No usable response. Distinct from a denial and from a 404.
    Unavailable(UpstreamFailure),
    /// The upstream named a new digest, but fetching it failed.
    FetchFailed(UpstreamFailure),
}

/// How much of an image is in the store, counting only content that the upstream was seen to have in this
/// repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Presence {
    /// The manifest is not cached.
    None,
    /// The manifest is cached, the rest is not.
    ManifestOnly,
    /// The manifest and everything it refers to is cached or being downloaded.
    Complete,
}

/// Owner of the credential that the upstream rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CredentialOwner {
    /// The client: it may not read.
    Client,
    /// The cache itself: an operator error that the client cannot fix.
    Proxy,
}

/// Decides as if content that is too young did not exist, and as if the tag still named the newest digest that is old
/// enough.
fn decide_by_age(s: &CacheState, cooling: &AgeFacts) -> Decision {
    let mature = &CacheState {
        cached: s.cached.and_then(|cached| without_young(cached, cooling)),
        ..*s
    };
    let decision = match (s.revalidation, cooling.named) {
        (Revalidation::Digest { .. } | Revalidation::NoDigest, Maturity::Young(youth)) => {
            return decide_with_older(youth, mature, cooling.older);
        }
        // If the digest is both blocked and too young, the older digest is served as if it were only too young.
        (Revalidation::Blocked(_), Maturity::Young(youth)) if cooling.older.is_some() => {
            return decide_with_older(youth, mature, cooling.older);
        }
        _ => decide_by_policy(mature),
    };
    match (decision, cooling.cached) {
        // The age of uncached content is known only after a `HEAD` has named its digest.
        (Decision::Fetch(MissReason::NotCached), _) if s.revalidation == Revalidation::NotDone => {
            Decision::Revalidate
        }
        // The denial gives the age as its reason only if the copy would be served at a greater age.
        (Decision::Deny(_), Maturity::Young(youth))
            if matches!(decide_by_policy(s), Decision::Serve(_) | Decision::ProbeLayers(_)) =>
        {
            Decision::Deny(DenyReason::TooYoung(youth))
        }
        (decision, _) => decision,
    }
}

/// The cached copy, without a previous image that is too young. `None` if the copy itself is too young.
fn without_young(cached: CachedEntry, cooling: &AgeFacts) -> Option<CachedEntry> {
    let completeness = match cached.completeness {
        Completeness::Incomplete { previous: Some(_) } if !cooling.previous.is_mature() => {
            Completeness::Incomplete { previous: None }
        }
        completeness => completeness,
    };
    cooling.cached.is_mature().then_some(CachedEntry {
        completeness,
        ..cached
    })
}

/// The decision while the digest that the upstream names is too young: about `older` in its place.
fn decide_with_older(youth: YoungDigest, s: &CacheState, older: Option<OlderDigest>) -> Decision {
    let Some(OlderDigest { digest, presence }) = older else {
        return Decision::Deny(DenyReason::TooYoung(youth));
    };
    let served = |reason| match reason {
        HitReason::Revalidated | HitReason::TagMoved => HitReason::Cooling(youth),
        other => other,
    };
    match decide_by_policy(&s.with_revalidation(Revalidation::Digest { digest, presence })) {
        Decision::Serve(reason) => Decision::Serve(served(reason)),
        Decision::ProbeLayers(reason) => Decision::ProbeLayers(served(reason)),
        Decision::Fetch(_) => Decision::Fetch(MissReason::Cooling(youth)),
        decision @ (Decision::Deny(_) | Decision::Revalidate) => decision,
    }
}

#[expect(
    clippy::match_same_arms,
    reason = "a table: rows that agree are still rows of their own"
)]
fn before_revalidation(s: &CacheState) -> Decision {
    // Checked before the cached copy, because a denial must not reveal to a client without a grant that a copy
    // exists.
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
        // An incomplete image needs the upstream for its missing layers, so the upstream must be available.
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

/// A 2xx with a digest authorizes this principal, so `s.authorization` is not read.
fn on_digest(s: &CacheState, digest: Digest, presence: Presence) -> Decision {
    match (s.kind, s.cached) {
        (ContentKind::Manifest | ContentKind::Blob, Some(_)) => Decision::Serve(HitReason::Immutable),
        (ContentKind::Tag, Some(cached)) if cached.digest == digest => {
            serve_or_probe_layers(cached, digest, HitReason::Revalidated)
        }
        // Under this policy, the `HEAD` was sent to check the authorization, or whether missing layers are available.
        // A newer digest is ignored.
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

/// The upstream has authorized this principal, so the denial may say that the digest is blocked. An older copy is not
/// served in its place, because the client would get an older image without noticing.
fn on_blocked_digest(s: &CacheState, digest: Digest) -> Decision {
    match (s.kind, s.cached) {
        // Under this policy, the `HEAD` was sent to check the authorization. A newer digest is ignored.
        (ContentKind::Tag, Some(cached)) if s.policy == Policy::IfNotPresent && cached.digest != digest => {
            serve_or_probe_layers(cached, cached.digest, HitReason::NotRevalidated)
        }
        _ => Decision::Deny(DenyReason::Blocked(digest)),
    }
}

/// Turns a decision that would serve or fetch the blocked digest into a denial. `decision` was made as if nothing were
/// blocked. If it is a revalidation, or a denial for lack of authorization, it stays, so that it reveals no block.
#[expect(
    clippy::match_same_arms,
    reason = "a table: rows that agree are still rows of their own"
)]
fn refuse_blocked(s: &CacheState, decision: Decision, digest: Digest) -> Decision {
    match (s.kind, decision) {
        (_, Decision::Revalidate) => decision,
        (
            ContentKind::Tag,
            Decision::Serve(HitReason::Cooling(_))
            | Decision::ProbeLayers(HitReason::Cooling(_))
            | Decision::Fetch(MissReason::Cooling(_)),
        ) if s.target() != Some(digest) => decision,
        // These serve or fetch another digest than the blocked one.
        (
            ContentKind::Tag,
            Decision::Serve(HitReason::PreviousComplete(_) | HitReason::TagMoved)
            | Decision::ProbeLayers(HitReason::TagMoved)
            | Decision::Fetch(MissReason::NotCached | MissReason::NewDigest | MissReason::NoDigest),
        ) => decision,
        // The fetch would have checked the authorization, so a `HEAD` does it.
        (ContentKind::Manifest | ContentKind::Blob, Decision::Fetch(_))
            if s.revalidation == Revalidation::NotDone && s.authorization != Authorization::Granted =>
        {
            Decision::Revalidate
        }
        // A copy is cached, so the block is the reason that it is not served.
        (
            ContentKind::Tag,
            Decision::Deny(
                DenyReason::Incomplete(_) | DenyReason::StaleLimitExceeded(_) | DenyReason::NotCached,
            ),
        )
        | (_, Decision::Serve(_) | Decision::ProbeLayers(_) | Decision::Fetch(_)) => {
            Decision::Deny(DenyReason::Blocked(digest))
        }
        (_, Decision::Deny(DenyReason::TooYoung(youth))) if youth.digest == Some(digest) => {
            Decision::Deny(DenyReason::Blocked(digest))
        }
        (_, Decision::Deny(_)) => decision,
    }
}

/// Probes the layers of an incomplete image only if a complete one can be served instead. Otherwise the
/// upstream, which has just responded, is assumed to have them.
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

/// Some registries answer 404 where they mean 403, so a 404 serves nothing to a principal without a grant.
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

/// A rejected credential of the cache is the operator's error. Clients that have a grant are still served.
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

/// No usable response: serves the cached copy to principals with a grant, within `stale_if_error`.
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
        // A registry that rate-limits manifests still serves blobs: Docker Hub counts manifest requests only.
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
