//! Every situation, against every law; and the seed's own rule as a table.

use std::time::{Duration, SystemTime};

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

/// What can be missing of an image, and which earlier one may stand in.
fn rests() -> [Completeness; 4] {
    let missing = |previous| Completeness::Incomplete { previous };
    let (recently, long_ago) = (now() - Duration::from_secs(1), now() - 10 * STALE);
    [
        Completeness::Complete,
        missing(None),
        missing(Some(recently)),
        missing(Some(long_ago)),
    ]
}

fn names(digest: Digest, presence: Presence) -> Revalidation {
    Revalidation::Digest { digest, presence }
}

/// The whole input space: each field takes every value that the decision can tell apart.
fn every_situation() -> Vec<CacheState> {
    let ages = [
        now() - Duration::from_secs(1),
        now() - FRESH,
        now() - STALE,
        now() - 10 * STALE,
        now() + Duration::from_secs(1),
        now() + TOO_FAR_AHEAD,
    ];
    let mut helds = vec![None];
    for confirmed_at in ages {
        for (is_moved, is_invalidated) in [(false, false), (true, false), (false, true), (true, true)] {
            helds.extend(rests().map(|completeness| {
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
    let hearings = [
        Revalidation::NotDone,
        names(old_digest(), Presence::Complete),
        names(old_digest(), Presence::ManifestOnly),
        names(new_digest(), Presence::Complete),
        names(new_digest(), Presence::ManifestOnly),
        names(new_digest(), Presence::None),
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
            for &cached in helds.iter().filter(|cached| can_be(kind, **cached)) {
                for authorization in [
                    Authorization::Unknown,
                    Authorization::Expired,
                    Authorization::Granted,
                ] {
                    for revalidation in hearings {
                        for on_not_found in OnNotFound::ALL {
                            for max_age in [Duration::ZERO, FRESH] {
                                for stale_if_error in [None, Some(STALE)] {
                                    all.push(CacheState {
                                        policy,
                                        kind,
                                        cached,
                                        authorization,
                                        revalidation,
                                        on_not_found,
                                        max_age,
                                        stale_if_error,
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

/// Only a tag moves and has an earlier image, and a blob points to nothing.
fn can_be(kind: ContentKind, cached: Option<CachedEntry>) -> bool {
    if kind != ContentKind::Tag && cached.is_some_and(|cached| cached.is_moved) {
        return false;
    }
    match (kind, cached.map(|cached| cached.completeness)) {
        (ContentKind::Tag, _) | (_, None | Some(Completeness::Complete)) => true,
        (ContentKind::Manifest, Some(Completeness::Incomplete { previous })) => previous.is_none(),
        (ContentKind::Blob, Some(Completeness::Incomplete { .. })) => false,
    }
}

fn is_whole(s: &CacheState) -> bool {
    s.cached
        .is_some_and(|cached| cached.completeness == Completeness::Complete)
}

fn has_whole(s: &CacheState) -> bool {
    s.cached
        .is_some_and(|cached| cached.completeness != Completeness::Incomplete { previous: None })
}

/// Checks `law` in every situation where `applies` holds, and that there is at least one such situation.
fn law(name: &str, applies: impl Fn(&CacheState) -> bool, law: impl Fn(&CacheState, Decision) -> bool) {
    let mut checked = 0;
    for state in every_situation().into_iter().filter(|s| applies(s)) {
        let decision = decide(&state);
        assert!(law(&state, decision), "{name}: {state:#?} gave {decision:?}");
        checked += 1;
    }
    assert!(checked > 0, "{name}: applies to no situation");
}

fn invalidated(s: &CacheState) -> bool {
    s.cached.is_some_and(|cached| cached.is_invalidated)
}

fn serves(decision: Decision) -> bool {
    matches!(decision, Decision::Serve(_))
}

fn named(s: &CacheState) -> bool {
    matches!(
        s.revalidation,
        Revalidation::Digest { .. } | Revalidation::NoDigest
    )
}

fn no_answer(s: &CacheState) -> bool {
    matches!(
        s.revalidation,
        Revalidation::Unavailable(_) | Revalidation::FetchFailed(_)
    )
}

#[test]
fn the_space_is_enumerated_whole() {
    let copies_of_a_tag_a_manifest_and_a_blob = (1 + 2 * 6 * 2 * 4) + (1 + 2 * 6 * 2) + (1 + 2 * 6);
    assert_eq!(
        every_situation().len(),
        4 * copies_of_a_tag_a_manifest_and_a_blob * 3 * 13 * 2 * 2 * 2
    );
}

// --- safety: what may never happen -----------------------------------------------------------------------------

#[test]
fn nothing_is_served_that_is_not_held() {
    law(
        "serve needs a copy",
        |s| s.cached.is_none(),
        |s, v| {
            let named =
                matches!(s.revalidation, Revalidation::Digest { presence, .. } if presence != Presence::None);
            !serves(v) || named && s.kind == ContentKind::Tag
        },
    );
}

#[test]
fn a_refusal_of_the_clients_credential_is_never_answered_from_the_cache() {
    law(
        "401/403 is final",
        |s| s.revalidation == Revalidation::Denied(CredentialOwner::Client),
        |_, v| v == Decision::Deny(DenyReason::Forbidden),
    );
}

#[test]
fn a_stranger_gets_nothing_without_the_upstreams_yes() {
    law(
        "a stranger is not served",
        |s| s.authorization == Authorization::Unknown && !named(s),
        |_, v| !serves(v),
    );
}

#[test]
fn r01_under_never_a_refusal_tells_a_stranger_nothing() {
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
        "and only strangers get it",
        |s| s.authorization != Authorization::Unknown,
        |_, v| v != Decision::Deny(DenyReason::NotAuthorized),
    );
}

#[test]
fn a_lapsed_grant_is_good_only_while_the_upstream_cannot_be_asked() {
    law(
        "a lapsed grant does not serve before asking",
        |s| {
            s.authorization == Authorization::Expired
                && s.revalidation == Revalidation::NotDone
                && s.policy != Policy::Never
        },
        |_, v| !serves(v),
    );
}

#[test]
fn policy_always_serves_a_tag_only_on_a_yes_given_now() {
    law(
        "always needs a yes",
        |s| s.policy == Policy::Always && s.kind == ContentKind::Tag && !named(s),
        |_, v| !serves(v),
    );
}

#[test]
fn policy_never_contacts_nobody() {
    law(
        "never neither asks nor fetches",
        |s| s.policy == Policy::Never && s.revalidation == Revalidation::NotDone,
        |_, v| !matches!(v, Decision::Revalidate | Decision::Fetch(_)),
    );
}

#[test]
fn t16_what_is_in_doubt_is_served_unasked_under_no_policy_but_never() {
    law(
        "in doubt, the upstream is asked",
        |s| invalidated(s) && s.revalidation == Revalidation::NotDone && s.policy != Policy::Never,
        |_, v| v == Decision::Revalidate,
    );
}

#[test]
fn t16_a_tag_in_doubt_is_not_answered_with_the_old_copy_once_it_moved() {
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
fn t16_a_doubt_takes_nothing_away_in_an_outage() {
    for state in every_situation()
        .into_iter()
        .filter(|s| invalidated(s) && no_answer(s))
    {
        let cached = state.cached.map(|cached| CachedEntry {
            is_invalidated: false,
            ..cached
        });
        let without = CacheState { cached, ..state };
        assert_eq!(decide(&state), decide(&without), "{state:#?}");
    }
}

#[test]
fn a_tag_older_than_stale_is_not_served_on_silence() {
    law(
        "stale is a limit",
        |s| {
            let too_old = |at| at <= now() - STALE || at > now() + age::AHEAD_MAX;
            let old = s.cached.is_some_and(|cached| match cached.completeness {
                Completeness::Incomplete { previous: Some(at) } => too_old(at),
                _ => too_old(cached.confirmed_at),
            });
            s.stale_if_error.is_some() && old && no_answer(s) && s.kind == ContentKind::Tag
        },
        |_, v| !serves(v),
    );
}

#[test]
fn an_absent_thing_is_served_only_where_the_rule_keeps_it() {
    law(
        "404 refuses",
        |s| s.revalidation == Revalidation::NotFound && s.on_not_found == OnNotFound::Refuse,
        |_, v| v == Decision::Deny(DenyReason::NotFound),
    );
}

#[test]
fn an_absence_and_a_silence_are_never_taken_for_each_other() {
    law("silence is not absence", no_answer, |_, v| {
        v != Decision::Deny(DenyReason::NotFound)
    });
    law(
        "absence is not silence",
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
fn nothing_is_asked_twice() {
    law(
        "one question",
        |s| s.revalidation != Revalidation::NotDone,
        |_, v| v != Decision::Revalidate,
    );
}

#[test]
fn a_failed_fetch_is_not_followed_by_another() {
    law("no second fetch", no_answer, |_, v| {
        !matches!(v, Decision::Fetch(_))
    });
}

#[test]
fn a_moved_tag_is_not_answered_with_the_old_copy() {
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
fn half_an_image_is_served_only_on_the_upstreams_word() {
    law(
        "a tag that is not whole is not served on silence",
        |s| {
            no_answer(s)
                && s.kind == ContentKind::Tag
                && s.revalidation != Revalidation::Unavailable(UpstreamFailure::RateLimited)
                && s.cached.is_some()
                && !has_whole(s)
        },
        |_, v| matches!(v, Decision::Deny(_)),
    );
    law(
        "nor before asking",
        |s| s.revalidation == Revalidation::NotDone && s.kind == ContentKind::Tag && !is_whole(s),
        |_, v| !matches!(v, Decision::Serve(reason) if reason != HitReason::PreviousComplete(None)),
    );
}

/// By digest nothing better exists than what is cached, so what a manifest points to changes nothing (M2). Completeness
/// was asked of it too: a client that reads the manifests of every platform and the layers of one was refused in an
/// outage what it needed no layer of.
#[test]
fn m02_by_digest_what_is_cached_is_served_whatever_its_parts() {
    law(
        "the rest plays no part",
        |s| s.kind == ContentKind::Manifest && s.cached.is_some() && !is_whole(s),
        |s, v| {
            let completeness = Completeness::Complete;
            let cached = s.cached.map(|cached| CachedEntry {
                completeness,
                ..cached
            });
            v == decide(&CacheState { cached, ..*s })
        },
    );
    law(
        "silence serves the entitled",
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
fn half_an_image_is_not_served_where_a_whole_one_is_held() {
    law(
        "checked, or the whole one",
        |s| has_whole(s) && !is_whole(s),
        |s, v| {
            let moved_to_whole = matches!(
                s.revalidation,
                Revalidation::Digest {
                    presence: Presence::Complete,
                    ..
                }
            );
            moved_to_whole
                || !matches!(v, Decision::Serve(reason) if !matches!(reason, HitReason::PreviousComplete(_)))
        },
    );
    law(
        "a new one is not believed whole",
        |s| {
            has_whole(s)
                && s.revalidation == names(new_digest(), Presence::ManifestOnly)
                && s.kind == ContentKind::Tag
        },
        |s, v| matches!(v, Decision::ProbeLayers(_)) || s.policy == Policy::IfNotPresent && is_whole(s),
    );
}

#[test]
fn a_whole_image_is_never_checked_again() {
    law(
        "no check of what is whole",
        |s| {
            is_whole(s)
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
fn what_may_be_outdated_says_so() {
    law(
        "a tag served on silence is marked",
        |s| s.kind == ContentKind::Tag && (no_answer(s) || s.revalidation == Revalidation::NotFound),
        |_, v| !matches!(v, Decision::Serve(reason) if !reason.may_be_outdated()),
    );
}

// --- economy: what may never be wasted --------------------------------------------------------------------------

#[test]
fn a_fresh_tag_is_not_asked_about() {
    law(
        "fresh asks nothing",
        |s| {
            s.policy == Policy::IfNewer
                && s.kind == ContentKind::Tag
                && s.authorization == Authorization::Granted
                && s.max_age == FRESH
                && s.revalidation == Revalidation::NotDone
                && is_whole(s)
                && s.cached.is_some_and(|h| {
                    h.confirmed_at == now() - Duration::from_secs(1) && !h.is_moved && !h.is_invalidated
                })
        },
        |_, v| v == Decision::Serve(HitReason::Fresh),
    );
}

#[test]
fn o01_a_tag_that_another_client_saw_move_is_not_fresh() {
    law(
        "moved is not fresh",
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
fn a_clock_that_stepped_back_makes_nothing_fresh() {
    law(
        "the future is not fresh",
        |s| s.cached.is_some_and(|h| h.confirmed_at > now()),
        |_, v| v != Decision::Serve(HitReason::Fresh),
    );
}

#[test]
fn content_by_digest_is_not_asked_about_for_the_vouched() {
    law(
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
fn what_is_held_is_not_fetched() {
    law(
        "an unchanged digest is served",
        |s| {
            matches!(s.revalidation, Revalidation::Digest { digest, .. } if digest == old_digest())
                && s.cached.is_some()
        },
        |_, v| serves(v) || matches!(v, Decision::ProbeLayers(_)),
    );
    law(
        "a digest held under another name is served",
        |s| {
            matches!(s.revalidation, Revalidation::Digest { presence, .. } if presence != Presence::None)
                && s.kind == ContentKind::Tag
        },
        |_, v| serves(v) || matches!(v, Decision::ProbeLayers(_)),
    );
}

#[test]
fn what_is_not_held_is_not_asked_about_first() {
    law(
        "the fetch is the question",
        |s| s.cached.is_none() && s.revalidation == Revalidation::NotDone && s.policy != Policy::Never,
        |_, v| v == Decision::Fetch(MissReason::NotCached),
    );
}

#[test]
fn if_not_present_never_fetches_what_is_present() {
    law(
        "present is enough",
        |s| s.policy == Policy::IfNotPresent && s.cached.is_some() && !invalidated(s),
        |_, v| !matches!(v, Decision::Fetch(_)),
    );
}

#[test]
fn the_entitled_are_served_through_an_outage() {
    law(
        "silence serves the entitled",
        |s| {
            matches!(s.revalidation, Revalidation::Unavailable(_))
                && has_whole(s)
                && s.authorization != Authorization::Unknown
                && s.policy != Policy::Always
                && s.stale_if_error.is_none()
        },
        |_, v| serves(v),
    );
}

#[test]
fn our_own_refused_credential_does_not_stop_the_entitled() {
    law(
        "the operator's mistake",
        |s| {
            s.revalidation == Revalidation::Denied(CredentialOwner::Proxy)
                && has_whole(s)
                && s.authorization != Authorization::Unknown
                && s.policy != Policy::Always
                && s.stale_if_error.is_none()
        },
        |_, v| serves(v),
    );
}

#[test]
fn less_standing_never_serves_more() {
    for state in every_situation() {
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

// --- the seed's own rule ----------------------------------------------------------------------------------------

/// (1) is the image held; (2) the digest of the held one; (3) if `if-newer`, the digest of the remote one; (4) if they
/// differ, pull; (5) if the remote digest cannot be had, use the held image.
#[test]
fn the_rule_as_it_was_asked_for() {
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
        authorization: Authorization::Granted,
        revalidation: Revalidation::NotDone,
        on_not_found: OnNotFound::Refuse,
        max_age: Duration::ZERO,
        stale_if_error: None,
        now: now(),
    };
    let not_held = CacheState {
        cached: None,
        ..state
    };
    let same = names(old_digest(), Presence::Complete);
    let other = names(new_digest(), Presence::None);
    let table = [
        (
            "1. not held: pull",
            not_held,
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
            "and never around the authentication of a private registry",
            state.with_revalidation(Revalidation::Denied(CredentialOwner::Client)),
            Decision::Deny(DenyReason::Forbidden),
        ),
    ];
    for (step, state, expected) in table {
        assert_eq!(decide(&state), expected, "{step}");
    }
}

#[test]
fn policies_are_read_back_from_their_names() {
    for policy in Policy::ALL {
        assert_eq!(policy.to_string().parse(), Ok(policy));
    }
    assert_eq!("If-Newer".parse::<Policy>(), Err(UnknownValue));
    for absence in OnNotFound::ALL {
        assert_eq!(absence.name().parse(), Ok(absence));
    }
}
