//! Exhaustive tests of the decision: every state against every law, and the basic `if-newer` rule as a table.

mod cooling;

use std::time::{Duration, SystemTime};

use super::min_age::OnUnknownAge;
use super::*;
use crate::oci::Algorithm;

const FRESH: Duration = Duration::from_secs(60);
const STALE: Duration = Duration::from_secs(3_600);
const TOO_FAR_AHEAD: Duration = age::AHEAD_MAX.saturating_add(Duration::from_secs(1));

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)
}

fn old_digest() -> Digest {
    Digest::of(Algorithm::Sha256, b"old")
}

fn new_digest() -> Digest {
    Digest::of(Algorithm::Sha256, b"new")
}

const CAUSE: UpstreamFailure = UpstreamFailure::ConnectionRefused;

/// Completeness values: complete, or incomplete with and without a previous image.
fn completenesses() -> [Completeness; 4] {
    let missing = |previous| Completeness::Incomplete { previous };
    let (recently, long_ago) = (now() - Duration::from_secs(1), now() - 10 * STALE);
    [
        Completeness::Complete,
        missing(None),
        missing(Some(recently)),
        missing(Some(long_ago)),
    ]
}

fn digest_result(digest: Digest, presence: Presence) -> Revalidation {
    Revalidation::Digest { digest, presence }
}

/// The complete input space: each field takes every value that the decision distinguishes.
fn every_state() -> Vec<CacheState> {
    let ages = [
        now() - Duration::from_secs(1),
        now() - FRESH,
        now() - STALE,
        now() - 10 * STALE,
        now() + Duration::from_secs(1),
        now() + TOO_FAR_AHEAD,
    ];
    let mut entries = vec![None];
    for confirmed_at in ages {
        for (is_moved, is_invalidated) in [(false, false), (true, false), (false, true), (true, true)] {
            entries.extend(completenesses().map(|completeness| {
                Some(CachedEntry {
                    digest: old_digest(),
                    confirmed_at,
                    is_moved,
                    completeness,
                    is_invalidated,
                })
            }));
        }
    }
    let results = [
        Revalidation::NotDone,
        digest_result(old_digest(), Presence::Complete),
        digest_result(old_digest(), Presence::ManifestOnly),
        digest_result(new_digest(), Presence::Complete),
        digest_result(new_digest(), Presence::ManifestOnly),
        digest_result(new_digest(), Presence::None),
        Revalidation::Blocked(old_digest()),
        Revalidation::Blocked(new_digest()),
        Revalidation::NoDigest,
        Revalidation::NotFound,
        Revalidation::Denied(CredentialOwner::Client),
        Revalidation::Denied(CredentialOwner::Proxy),
        Revalidation::Unavailable(CAUSE),
        Revalidation::Unavailable(UpstreamFailure::RateLimited),
        Revalidation::FetchFailed(CAUSE),
    ];
    let mut all = Vec::new();
    for policy in Policy::ALL {
        for kind in [ContentKind::Tag, ContentKind::Manifest, ContentKind::Blob] {
            for &cached in entries.iter().filter(|cached| is_possible(kind, **cached)) {
                for authorization in [
                    Authorization::Unknown,
                    Authorization::Expired,
                    Authorization::Granted,
                ] {
                    for (blocked, revalidation) in blocks(kind, cached, &results) {
                        for on_not_found in OnNotFound::ALL {
                            for max_age in [Duration::ZERO, FRESH] {
                                for stale_if_error in [None, Some(STALE)] {
                                    all.push(CacheState {
                                        policy,
                                        kind,
                                        cached,
                                        blocked,
                                        authorization,
                                        revalidation,
                                        on_not_found,
                                        max_age,
                                        stale_if_error,
                                        cooling: None,
                                        now: now(),
                                    });
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    all
}

/// Each revalidation result twice: without a block, and with a block of the tag's cached copy or of the requested
/// digest.
fn blocks(
    kind: ContentKind,
    cached: Option<CachedEntry>,
    results: &[Revalidation],
) -> Vec<(Option<Digest>, Revalidation)> {
    let may_be_blocked = kind != ContentKind::Tag || cached.is_some();
    let blocked = may_be_blocked.then_some(Some(old_digest()));
    let all = [None].into_iter().chain(blocked);
    all.flat_map(|blocked| results.iter().map(move |result| (blocked, *result)))
        .collect()
}

fn is_unblocked(s: &CacheState) -> bool {
    s.blocked.is_none() && !matches!(s.revalidation, Revalidation::Blocked(_))
}

/// Only a tag moves or has a previous image, and a blob refers to nothing.
fn is_possible(kind: ContentKind, cached: Option<CachedEntry>) -> bool {
    if kind != ContentKind::Tag && cached.is_some_and(|cached| cached.is_moved) {
        return false;
    }
    match (kind, cached.map(|cached| cached.completeness)) {
        (ContentKind::Tag, _) | (_, None | Some(Completeness::Complete)) => true,
        (ContentKind::Manifest, Some(Completeness::Incomplete { previous })) => previous.is_none(),
        (ContentKind::Blob, Some(Completeness::Incomplete { .. })) => false,
    }
}

fn is_complete(s: &CacheState) -> bool {
    s.cached
        .is_some_and(|cached| cached.completeness == Completeness::Complete)
}

fn has_complete(s: &CacheState) -> bool {
    s.cached
        .is_some_and(|cached| cached.completeness != Completeness::Incomplete { previous: None })
}

/// Checks `law` in every state where `applies` holds, and that there is at least one such state.
fn law(name: &str, applies: impl Fn(&CacheState) -> bool, law: impl Fn(&CacheState, Decision) -> bool) {
    let mut checked = 0;
    for state in every_state().into_iter().filter(|s| applies(s)) {
        let decision = decide(&state);
        assert!(law(&state, decision), "{name}: {state:#?} gave {decision:?}");
        checked += 1;
    }
    assert!(checked > 0, "{name}: applies to no situation");
}

/// Checks a law of availability or economy, as [`law`] does, in the states without a block. A block overrules it.
fn unblocked_law(
    name: &str,
    applies: impl Fn(&CacheState) -> bool,
    check: impl Fn(&CacheState, Decision) -> bool,
) {
    law(name, |s| is_unblocked(s) && applies(s), check);
}

fn invalidated(s: &CacheState) -> bool {
    s.cached.is_some_and(|cached| cached.is_invalidated)
}

fn serves(decision: Decision) -> bool {
    matches!(decision, Decision::Serve(_))
}

fn has_2xx(s: &CacheState) -> bool {
    matches!(
        s.revalidation,
        Revalidation::Digest { .. } | Revalidation::Blocked(_) | Revalidation::NoDigest
    )
}

fn is_unavailable(s: &CacheState) -> bool {
    matches!(
        s.revalidation,
        Revalidation::Unavailable(_) | Revalidation::FetchFailed(_)
    )
}

#[test]
fn input_space_is_enumerated_completely() {
    let entries_of_a_tag_a_manifest_and_a_blob = (1 + 2 * 6 * 2 * 4) + (1 + 2 * 6 * 2) + (1 + 2 * 6);
    // Each of them can be blocked, except an uncached tag.
    let blocked_ones = entries_of_a_tag_a_manifest_and_a_blob - 1;
    assert_eq!(
        every_state().len(),
        4 * (entries_of_a_tag_a_manifest_and_a_blob + blocked_ones) * 3 * 15 * 2 * 2 * 2
    );
}

// Safety: forbidden responses.

#[test]
fn uncached_content_is_never_a_hit() {
    law(
        "a hit needs a cached copy",
        |s| s.cached.is_none(),
        |s, v| {
            let has_2xx =
                matches!(s.revalidation, Revalidation::Digest { presence, .. } if presence != Presence::None);
            !serves(v) || has_2xx && s.kind == ContentKind::Tag
        },
    );
}

#[test]
fn presence_counts_only_where_it_is_looked_up() {
    law(
        "a presence that is not looked up changes nothing",
        |s| matches!(s.revalidation, Revalidation::Digest { digest, .. } if !s.needs_presence(&digest)),
        |s, v| {
            let Revalidation::Digest { digest, .. } = s.revalidation else {
                return false;
            };
            let unknown = digest_result(digest, Presence::None);
            decide(&s.with_revalidation(unknown)) == v
        },
    );
}

#[test]
fn client_denial_is_never_served_from_the_cache() {
    law(
        "401/403 is final",
        |s| s.revalidation == Revalidation::Denied(CredentialOwner::Client),
        |_, v| v == Decision::Deny(DenyReason::Forbidden),
    );
}

#[test]
fn no_grant_and_no_2xx_serves_nothing() {
    law(
        "a client without a grant is not served",
        |s| s.authorization == Authorization::Unknown && !has_2xx(s),
        |_, v| !serves(v),
    );
}

#[test]
fn r01_never_denies_without_a_grant_alike_cached_or_not() {
    law(
        "one refusal, held or not",
        |s| {
            s.authorization == Authorization::Unknown
                && s.policy == Policy::Never
                && s.revalidation == Revalidation::NotDone
        },
        |_, v| v == Decision::Deny(DenyReason::NotAuthorized),
    );
    law(
        "only clients without a grant get it",
        |s| s.authorization != Authorization::Unknown,
        |_, v| v != Decision::Deny(DenyReason::NotAuthorized),
    );
}

#[test]
fn expired_grant_serves_only_while_upstream_is_unavailable() {
    law(
        "an expired grant does not serve before revalidation",
        |s| {
            s.authorization == Authorization::Expired
                && s.revalidation == Revalidation::NotDone
                && s.policy != Policy::Never
        },
        |_, v| !serves(v),
    );
}

#[test]
fn always_serves_a_tag_only_after_a_2xx_now() {
    law(
        "always needs a 2xx",
        |s| s.policy == Policy::Always && s.kind == ContentKind::Tag && !has_2xx(s),
        |_, v| !serves(v),
    );
}

#[test]
fn never_sends_no_upstream_request() {
    law(
        "never neither revalidates nor fetches",
        |s| s.policy == Policy::Never && s.revalidation == Revalidation::NotDone,
        |_, v| !matches!(v, Decision::Revalidate | Decision::Fetch(_)),
    );
}

#[test]
fn t16_invalidated_copy_is_revalidated_except_under_never() {
    law(
        "in doubt, the upstream is asked",
        |s| invalidated(s) && s.revalidation == Revalidation::NotDone && s.policy != Policy::Never,
        |_, v| v == Decision::Revalidate,
    );
}

#[test]
fn t16_invalidated_tag_that_moved_never_serves_the_old_copy() {
    law(
        "in doubt, the newest word counts",
        |s| {
            invalidated(s)
                && s.kind == ContentKind::Tag
                && matches!(s.revalidation, Revalidation::Digest { digest, .. } if digest == new_digest())
        },
        |_, v| {
            matches!(
                v,
                Decision::Fetch(_)
                    | Decision::Serve(HitReason::TagMoved)
                    | Decision::ProbeLayers(HitReason::TagMoved)
            )
        },
    );
}

#[test]
fn t16_invalidation_denies_nothing_in_an_outage() {
    for state in every_state()
        .into_iter()
        .filter(|s| invalidated(s) && is_unavailable(s))
    {
        let cached = state.cached.map(|cached| CachedEntry {
            is_invalidated: false,
            ..cached
        });
        let without_invalidation = CacheState { cached, ..state };
        assert_eq!(decide(&state), decide(&without_invalidation), "{state:#?}");
    }
}

#[test]
fn tag_beyond_stale_if_error_is_not_served_in_an_outage() {
    law(
        "stale_if_error is a limit",
        |s| {
            let too_old = |at| at <= now() - STALE || at > now() + age::AHEAD_MAX;
            let old = s.cached.is_some_and(|cached| match cached.completeness {
                Completeness::Incomplete { previous: Some(at) } => too_old(at),
                _ => too_old(cached.confirmed_at),
            });
            s.stale_if_error.is_some() && old && is_unavailable(s) && s.kind == ContentKind::Tag
        },
        |_, v| !serves(v),
    );
}

#[test]
fn not_found_is_served_only_with_serve_stale() {
    law(
        "404 refuses",
        |s| s.revalidation == Revalidation::NotFound && s.on_not_found == OnNotFound::Refuse,
        |_, v| v == Decision::Deny(DenyReason::NotFound),
    );
}

#[test]
fn not_found_and_unavailable_are_never_confused() {
    law("unavailable is not a 404", is_unavailable, |_, v| {
        v != Decision::Deny(DenyReason::NotFound)
    });
    law(
        "a 404 is not unavailable",
        |s| s.revalidation == Revalidation::NotFound,
        |_, v| {
            !matches!(
                v,
                Decision::Deny(
                    DenyReason::UpstreamUnavailable(_)
                        | DenyReason::StaleLimitExceeded(_)
                        | DenyReason::Incomplete(_)
                )
            )
        },
    );
}

#[test]
fn at_most_one_revalidation_per_request() {
    law(
        "one question",
        |s| s.revalidation != Revalidation::NotDone,
        |_, v| v != Decision::Revalidate,
    );
}

#[test]
fn failed_fetch_is_not_repeated() {
    law("no second fetch", is_unavailable, |_, v| {
        !matches!(v, Decision::Fetch(_))
    });
}

#[test]
fn moved_tag_is_not_served_from_the_old_copy() {
    law(
        "newer wins",
        |s| {
            matches!(s.revalidation, Revalidation::Digest { digest, .. } if digest == new_digest())
                && s.kind == ContentKind::Tag
                && matches!(s.policy, Policy::Always | Policy::IfNewer)
        },
        |_, v| !matches!(v, Decision::Serve(reason) | Decision::ProbeLayers(reason) if reason != HitReason::TagMoved),
    );
}

#[test]
fn incomplete_image_is_served_only_after_a_2xx() {
    law(
        "an incomplete tag is not served while the upstream is unavailable",
        |s| {
            is_unavailable(s)
                && s.kind == ContentKind::Tag
                && s.revalidation != Revalidation::Unavailable(UpstreamFailure::RateLimited)
                && s.cached.is_some()
                && !has_complete(s)
        },
        |_, v| matches!(v, Decision::Deny(_)),
    );
    law(
        "nor before revalidation",
        |s| s.revalidation == Revalidation::NotDone && s.kind == ContentKind::Tag && !is_complete(s),
        |_, v| !matches!(v, Decision::Serve(reason) if reason != HitReason::PreviousComplete(None)),
    );
}

/// A manifest requested by digest is served whatever its completeness (M2). An earlier version required completeness
/// here. A client that reads the manifests of every platform but the layers of one was then denied manifests in an
/// outage.
#[test]
fn m02_manifest_by_digest_is_served_whatever_its_completeness() {
    unblocked_law(
        "completeness does not matter",
        |s| s.kind == ContentKind::Manifest && s.cached.is_some() && !is_complete(s),
        |s, v| {
            let completeness = Completeness::Complete;
            let cached = s.cached.map(|cached| CachedEntry {
                completeness,
                ..cached
            });
            v == decide(&CacheState { cached, ..*s })
        },
    );
    unblocked_law(
        "clients with a grant are served while the upstream is unavailable",
        |s| {
            s.kind == ContentKind::Manifest
                && matches!(s.revalidation, Revalidation::Unavailable(_))
                && s.cached.is_some()
                && s.authorization != Authorization::Unknown
                && s.policy != Policy::Always
        },
        |_, v| serves(v),
    );
}

#[test]
fn incomplete_image_is_not_served_beside_a_complete_one() {
    law(
        "checked, or the whole one",
        |s| has_complete(s) && !is_complete(s),
        |s, v| {
            let moved_to_complete = matches!(
                s.revalidation,
                Revalidation::Digest {
                    presence: Presence::Complete,
                    ..
                }
            );
            moved_to_complete
                || !matches!(v, Decision::Serve(reason) if !matches!(reason, HitReason::PreviousComplete(_)))
        },
    );
    law(
        "a new image is not assumed to be complete",
        |s| {
            has_complete(s)
                && s.revalidation == digest_result(new_digest(), Presence::ManifestOnly)
                && s.kind == ContentKind::Tag
        },
        |s, v| matches!(v, Decision::ProbeLayers(_)) || s.policy == Policy::IfNotPresent && is_complete(s),
    );
}

#[test]
fn complete_image_is_never_probed() {
    law(
        "a complete image is not probed",
        |s| {
            is_complete(s)
                && !matches!(
                    s.revalidation,
                    Revalidation::Digest {
                        presence: Presence::ManifestOnly,
                        ..
                    }
                )
        },
        |_, v| !matches!(v, Decision::ProbeLayers(_)),
    );
}

#[test]
fn possibly_outdated_responses_are_marked() {
    law(
        "a tag served while the upstream is unavailable is marked",
        |s| s.kind == ContentKind::Tag && (is_unavailable(s) || s.revalidation == Revalidation::NotFound),
        |_, v| !matches!(v, Decision::Serve(reason) if !reason.may_be_outdated()),
    );
}

// Blocks.

/// Whether the decision serves the blocked digest, or fetches content known to have it.
#[expect(
    clippy::match_same_arms,
    reason = "a table: rows that agree are still rows of their own"
)]
fn gives_out_blocked(s: &CacheState, decision: Decision) -> bool {
    let named = match s.revalidation {
        Revalidation::Digest { digest, .. } | Revalidation::Blocked(digest) => Some(digest),
        _ => None,
    };
    let given = match (s.kind, decision) {
        (_, Decision::Revalidate | Decision::Deny(_)) => None,
        (ContentKind::Manifest | ContentKind::Blob, _) => Some(old_digest()),
        // The previous image is another one, and the proxy chooses it among those that are not blocked.
        (ContentKind::Tag, Decision::Serve(HitReason::PreviousComplete(_))) => None,
        (
            ContentKind::Tag,
            Decision::Serve(HitReason::Cooling(_))
            | Decision::ProbeLayers(HitReason::Cooling(_))
            | Decision::Fetch(MissReason::Cooling(_)),
        ) => s.target(),
        (
            ContentKind::Tag,
            Decision::Serve(HitReason::TagMoved) | Decision::ProbeLayers(HitReason::TagMoved),
        ) => named,
        (ContentKind::Tag, Decision::Serve(_) | Decision::ProbeLayers(_)) => {
            s.cached.map(|cached| cached.digest)
        }
        (ContentKind::Tag, Decision::Fetch(_)) => named,
    };
    let is_blocked = |digest| s.blocked == Some(digest) || s.revalidation == Revalidation::Blocked(digest);
    given.is_some_and(is_blocked)
}

#[test]
fn blocked_digest_is_never_served_or_fetched() {
    law(
        "whatever policy, outage, age or grant",
        |s| !is_unblocked(s),
        |s, v| !gives_out_blocked(s, v),
    );
    law(
        "by digest",
        |s| s.kind != ContentKind::Tag && s.blocked.is_some(),
        |_, v| matches!(v, Decision::Deny(_) | Decision::Revalidate),
    );
}

#[test]
fn tag_that_names_a_blocked_digest_is_denied() {
    law(
        "an older copy is not served in its place",
        |s| matches!(s.revalidation, Revalidation::Blocked(_)),
        |s, v| {
            v == Decision::Deny(DenyReason::Blocked(match s.revalidation {
                Revalidation::Blocked(named) => named,
                _ => old_digest(),
            })) || s.kind == ContentKind::Tag && s.policy == Policy::IfNotPresent
        },
    );
    law(
        "a client with a grant learns why its blocked copy is not served",
        |s| {
            s.blocked.is_some()
                && matches!(s.revalidation, Revalidation::Unavailable(_))
                && s.cached.is_some()
                && s.authorization != Authorization::Unknown
                && s.policy != Policy::Always
        },
        |s, v| {
            v == Decision::Deny(DenyReason::Blocked(old_digest()))
                || matches!(v, Decision::Serve(HitReason::PreviousComplete(_))) && s.kind == ContentKind::Tag
        },
    );
}

#[test]
fn block_is_not_shown_without_authorization() {
    law(
        "before a 2xx, a client without a grant gets the same",
        |s| s.authorization == Authorization::Unknown && !has_2xx(s) && s.kind == ContentKind::Tag,
        |s, v| v == decide(&s.with_blocked(None)),
    );
    law(
        "no denial names a block",
        |s| s.authorization == Authorization::Unknown && !has_2xx(s),
        |_, v| !matches!(v, Decision::Deny(DenyReason::Blocked(_))),
    );
}

#[test]
fn blocked_copy_does_not_keep_a_tag_from_moving_on() {
    law(
        "a blocked copy is not fresh",
        |s| {
            s.blocked.is_some()
                && s.kind == ContentKind::Tag
                && s.revalidation == Revalidation::NotDone
                && s.policy != Policy::Never
        },
        |_, v| v == Decision::Revalidate,
    );
    law(
        "the new digest is served or fetched",
        |s| {
            s.blocked.is_some()
                && s.kind == ContentKind::Tag
                && matches!(s.revalidation, Revalidation::Digest { digest, .. } if digest == new_digest())
        },
        |_, v| {
            matches!(
                v,
                Decision::Serve(HitReason::TagMoved)
                    | Decision::ProbeLayers(HitReason::TagMoved)
                    | Decision::Fetch(MissReason::NewDigest)
            )
        },
    );
}

#[test]
fn block_never_serves_more() {
    law(
        "what is denied without a block is denied with one",
        |s| s.blocked.is_some(),
        |s, v| {
            !serves(v) || serves(decide(&s.with_blocked(None))) || v == Decision::Serve(HitReason::TagMoved)
        },
    );
}

// Economy: forbidden upstream requests.

#[test]
fn fresh_tag_is_not_revalidated() {
    unblocked_law(
        "a fresh tag is not revalidated",
        |s| {
            s.policy == Policy::IfNewer
                && s.kind == ContentKind::Tag
                && s.authorization == Authorization::Granted
                && s.max_age == FRESH
                && s.revalidation == Revalidation::NotDone
                && is_complete(s)
                && s.cached.is_some_and(|h| {
                    h.confirmed_at == now() - Duration::from_secs(1) && !h.is_moved && !h.is_invalidated
                })
        },
        |_, v| v == Decision::Serve(HitReason::Fresh),
    );
}

#[test]
fn o01_tag_that_moved_for_another_client_is_not_fresh() {
    law(
        "a moved tag is not fresh",
        |s| s.cached.is_some_and(|h| h.is_moved),
        |_, v| v != Decision::Serve(HitReason::Fresh),
    );
    law(
        "and nothing else changes",
        |s| s.cached.is_some_and(|h| h.is_moved),
        |s, v| {
            let is_moved = false;
            let cached = s.cached.map(|cached| CachedEntry { is_moved, ..cached });
            let unmoved = decide(&CacheState { cached, ..*s });
            v == unmoved || unmoved == Decision::Serve(HitReason::Fresh) && v == Decision::Revalidate
        },
    );
}

#[test]
fn clock_set_back_makes_nothing_fresh() {
    law(
        "a confirmation in the future is not fresh",
        |s| s.cached.is_some_and(|h| h.confirmed_at > now()),
        |_, v| v != Decision::Serve(HitReason::Fresh),
    );
}

#[test]
fn content_by_digest_with_a_grant_is_not_revalidated() {
    unblocked_law(
        "immutable",
        |s| {
            s.kind != ContentKind::Tag
                && s.cached.is_some()
                && s.authorization == Authorization::Granted
                && s.revalidation == Revalidation::NotDone
                && s.policy != Policy::Never
                && !invalidated(s)
        },
        |_, v| v == Decision::Serve(HitReason::Immutable),
    );
}

#[test]
fn cached_content_is_not_fetched() {
    unblocked_law(
        "an unchanged digest is served",
        |s| {
            matches!(s.revalidation, Revalidation::Digest { digest, .. } if digest == old_digest())
                && s.cached.is_some()
        },
        |_, v| serves(v) || matches!(v, Decision::ProbeLayers(_)),
    );
    unblocked_law(
        "a digest cached under another name is served",
        |s| {
            matches!(s.revalidation, Revalidation::Digest { presence, .. } if presence != Presence::None)
                && s.kind == ContentKind::Tag
        },
        |_, v| serves(v) || matches!(v, Decision::ProbeLayers(_)),
    );
}

#[test]
fn uncached_content_is_fetched_without_revalidation() {
    unblocked_law(
        "the fetch revalidates",
        |s| s.cached.is_none() && s.revalidation == Revalidation::NotDone && s.policy != Policy::Never,
        |_, v| v == Decision::Fetch(MissReason::NotCached),
    );
}

#[test]
fn if_not_present_never_fetches_cached_content() {
    unblocked_law(
        "a cached copy is enough",
        |s| s.policy == Policy::IfNotPresent && s.cached.is_some() && !invalidated(s),
        |_, v| !matches!(v, Decision::Fetch(_)),
    );
}

#[test]
fn clients_with_a_grant_are_served_through_an_outage() {
    unblocked_law(
        "clients with a grant are served while the upstream is unavailable",
        |s| {
            matches!(s.revalidation, Revalidation::Unavailable(_))
                && has_complete(s)
                && s.authorization != Authorization::Unknown
                && s.policy != Policy::Always
                && s.stale_if_error.is_none()
        },
        |_, v| serves(v),
    );
}

#[test]
fn rejected_cache_credential_still_serves_clients_with_a_grant() {
    unblocked_law(
        "the operator's mistake",
        |s| {
            s.revalidation == Revalidation::Denied(CredentialOwner::Proxy)
                && has_complete(s)
                && s.authorization != Authorization::Unknown
                && s.policy != Policy::Always
                && s.stale_if_error.is_none()
        },
        |_, v| serves(v),
    );
}

#[test]
fn weaker_authorization_never_serves_more() {
    for state in every_state() {
        for (less, more) in [
            (Authorization::Unknown, Authorization::Expired),
            (Authorization::Expired, Authorization::Granted),
        ] {
            let with_less = decide(&CacheState {
                authorization: less,
                ..state
            });
            let with_more = decide(&CacheState {
                authorization: more,
                ..state
            });
            assert!(
                !serves(with_less) || serves(with_more),
                "{state:#?}: {with_less:?} but {with_more:?}"
            );
        }
    }
}

// The basic rule.

/// (1) Is the image cached? (2) Take its digest. (3) Under `if-newer`, take the remote digest. (4) If they
/// differ, pull. (5) If the remote digest is unavailable, serve the cached image.
#[test]
fn if_newer_follows_the_five_basic_steps() {
    let state = CacheState {
        policy: Policy::IfNewer,
        kind: ContentKind::Tag,
        cached: Some(CachedEntry {
            digest: old_digest(),
            confirmed_at: now() - STALE,
            is_moved: false,
            completeness: Completeness::Complete,
            is_invalidated: false,
        }),
        blocked: None,
        authorization: Authorization::Granted,
        revalidation: Revalidation::NotDone,
        on_not_found: OnNotFound::Refuse,
        max_age: Duration::ZERO,
        stale_if_error: None,
        cooling: None,
        now: now(),
    };
    let not_cached = CacheState {
        cached: None,
        ..state
    };
    let same = digest_result(old_digest(), Presence::Complete);
    let other = digest_result(new_digest(), Presence::None);
    let table = [
        (
            "1. not held: pull",
            not_cached,
            Decision::Fetch(MissReason::NotCached),
        ),
        (
            "3. held: take the digest of the remote one",
            state,
            Decision::Revalidate,
        ),
        (
            "4. the same: use the held one",
            state.with_revalidation(same),
            Decision::Serve(HitReason::Revalidated),
        ),
        (
            "4. they differ: pull",
            state.with_revalidation(other),
            Decision::Fetch(MissReason::NewDigest),
        ),
        (
            "5. the remote digest cannot be had: use the held one",
            state.with_revalidation(Revalidation::Unavailable(UpstreamFailure::Timeout)),
            Decision::Serve(HitReason::StaleIfError(UpstreamFailure::Timeout)),
        ),
        (
            "and never bypass the authentication of a private registry",
            state.with_revalidation(Revalidation::Denied(CredentialOwner::Client)),
            Decision::Deny(DenyReason::Forbidden),
        ),
    ];
    for (step, state, expected) in table {
        assert_eq!(decide(&state), expected, "{step}");
    }
}

#[test]
fn policy_names_round_trip() {
    fn parse<'a, T: Deserialize<'a>>(name: &'a str) -> Option<T> {
        T::deserialize(serde::de::value::BorrowedStrDeserializer::<serde::de::value::Error>::new(name)).ok()
    }
    for policy in Policy::ALL {
        assert_eq!(parse(policy.name()), Some(policy));
    }
    assert_eq!(parse::<Policy>("If-Newer"), None);
    for action in OnNotFound::ALL {
        assert_eq!(parse(action.name()), Some(action));
    }
    for action in OnUnknownAge::ALL {
        assert_eq!(parse(action.name()), Some(action));
    }
}

/// A record may replace a revalidation that `max_age` allows to skip, or a copy that is not cached.
#[test]
fn record_counts_only_where_the_policy_allows() {
    for state in every_state() {
        let Some(age_max) = state.record_age_max() else {
            continue;
        };
        let is_granted = state.authorization == Authorization::Granted;
        let stale_limit = state.stale_if_error.unwrap_or(Duration::MAX);
        match (state.policy, decide(&state)) {
            (Policy::IfNewer, Decision::Revalidate | Decision::Fetch(_)) => {
                assert!(age_max == FRESH && is_granted, "{state:?}");
            }
            (Policy::IfNotPresent, Decision::Fetch(MissReason::NotCached)) => {
                assert!(age_max == stale_limit && is_granted, "{state:?}");
            }
            (Policy::Never, Decision::Deny(DenyReason::NotCached)) => {
                assert_eq!(age_max, stale_limit, "{state:?}");
            }
            (_, decision) => panic!("{decision:?}: {state:?}"),
        }
        let is_doubtful = state.blocked.is_some() || state.cached.is_some_and(|cached| cached.is_invalidated);
        assert!(!is_doubtful, "{state:?}");
        let is_fresh =
            |cached: CachedEntry| !cached.is_moved && age::is_within(cached.confirmed_at, FRESH, now());
        assert!(!state.cached.is_some_and(is_fresh), "{state:?}");
    }
    assert!(every_state().iter().any(|state| state.record_age_max().is_some()));
}
