//! Laws of `min_age`, over every state in which a minimum age applies.

use super::*;
use crate::policy::min_age::{AgeSource, Maturity, YoungDigest};

fn other_digest() -> Digest {
    Digest::of(Algorithm::Sha256, b"before")
}

fn youth(digest: Digest) -> YoungDigest {
    YoungDigest {
        digest: Some(digest),
        since: Some((now() - FRESH, AgeSource::FirstSeen)),
        may_be_older: false,
        served_from: Some(now() + STALE),
    }
}

/// Every combination of ages. `older` is old enough by construction: it is the cached digest or another one.
fn every_cooling() -> Vec<AgeFacts> {
    let maturities = |digest| [Maturity::Mature, Maturity::Young(youth(digest))];
    let older = |digest, presence| Some(OlderDigest { digest, presence });
    let mut all = Vec::new();
    for cached in maturities(old_digest()) {
        for previous in maturities(other_digest()) {
            for named in maturities(new_digest()) {
                let olders = [
                    None,
                    older(old_digest(), Presence::Complete),
                    older(other_digest(), Presence::None),
                    older(other_digest(), Presence::ManifestOnly),
                    older(other_digest(), Presence::Complete),
                ];
                all.extend(olders.map(|older| AgeFacts {
                    cached,
                    previous,
                    named,
                    older,
                }));
            }
        }
    }
    all
}

/// Whether the ages are consistent: one digest has one age, and an older digest is old enough.
fn is_consistent(s: &CacheState, cooling: &AgeFacts) -> bool {
    let Revalidation::Digest { digest, .. } = s.revalidation else {
        return true;
    };
    let is_same = s.cached.is_some_and(|cached| cached.digest == digest);
    let is_older = cooling.older.is_some_and(|older| older.digest == old_digest());
    (!is_same || cooling.cached.is_mature() == cooling.named.is_mature())
        && (!is_older || cooling.cached.is_mature())
        && (!is_older || digest != old_digest() || cooling.named.is_mature())
}

/// The states to which [`law_over`] adds ages, without those that differ only in what the laws do not depend on.
fn every_base() -> Vec<CacheState> {
    every_state()
        .into_iter()
        .filter(|s| s.kind == ContentKind::Tag && is_unblocked(s))
        // A setting is varied only in states whose decision reads it.
        .filter(|s| s.max_age.is_zero() || s.revalidation == Revalidation::NotDone)
        .filter(|s| s.on_not_found == OnNotFound::Refuse || s.revalidation == Revalidation::NotFound)
        .filter(|s| s.stale_if_error.is_none() || is_unavailable(s))
        .filter(|s| {
            s.cached.is_none_or(|cached| {
                !cached.is_moved
                    && [now() - Duration::from_secs(1), now() - STALE].contains(&cached.confirmed_at)
            })
        })
        .collect()
}

/// Whether the registry limits the rate of manifest requests: an exception to the laws that compare two states. An
/// incomplete image is then served if it has no previous complete one. If it has one that is older than
/// `stale_if_error`, the request is denied. So the state without a previous image serves more.
fn is_rate_limited(s: &CacheState) -> bool {
    s.revalidation == Revalidation::Unavailable(UpstreamFailure::RateLimited)
}

fn law_of_ages(name: &str, law: impl Fn(&CacheState, &AgeFacts, Decision) -> bool) {
    law_over(&every_base(), name, law);
}

/// Checks `law` in every state of `bases` with every combination of ages.
fn law_over(bases: &[CacheState], name: &str, law: impl Fn(&CacheState, &AgeFacts, Decision) -> bool) {
    let mut checked = 0_u64;
    for base in bases {
        for cooling in every_cooling()
            .iter()
            .filter(|cooling| is_consistent(base, cooling))
        {
            let state = CacheState {
                cooling: Some(*cooling),
                ..*base
            };
            let decision = decide(&state);
            assert!(
                law(&state, cooling, decision),
                "{name}: {state:#?} gave {decision:?}"
            );
            checked += 1;
        }
    }
    assert!(checked > 100_000, "{name}: {checked}");
}

/// Whether what the decision serves or fetches is old enough.
fn is_old_enough(s: &CacheState, cooling: &AgeFacts, decision: Decision) -> bool {
    match decision {
        Decision::Revalidate | Decision::Deny(_) => true,
        Decision::Serve(HitReason::PreviousComplete(_)) => {
            cooling.cached.is_mature() && cooling.previous.is_mature()
        }
        // The digest that the upstream named.
        Decision::Serve(HitReason::TagMoved)
        | Decision::ProbeLayers(HitReason::TagMoved)
        | Decision::Fetch(MissReason::NewDigest | MissReason::NotCached | MissReason::NoDigest) => {
            cooling.named.is_mature() && s.revalidation != Revalidation::NotDone
        }
        // The older digest, or the cached one if it is that.
        Decision::Serve(HitReason::Cooling(_))
        | Decision::ProbeLayers(HitReason::Cooling(_))
        | Decision::Fetch(MissReason::Cooling(_)) => {
            cooling.older.is_some() && !cooling.named.is_mature() && s.target().is_some()
        }
        Decision::Serve(_) | Decision::ProbeLayers(_) => cooling.cached.is_mature(),
    }
}

#[test]
fn min_age_nothing_younger_is_served_by_tag() {
    law_of_ages("never younger than min_age", |s, cooling, v| {
        is_old_enough(s, cooling, v)
    });
}

#[test]
fn min_age_unnamed_content_is_not_fetched_before_a_head() {
    law_of_ages("a fetch follows a revalidation", |s, _, v| {
        s.revalidation != Revalidation::NotDone || !matches!(v, Decision::Fetch(_))
    });
}

#[test]
fn min_age_old_enough_changes_no_decision() {
    law_of_ages("without young content, the policy decides", |s, cooling, v| {
        let is_young = [cooling.cached, cooling.previous, cooling.named]
            .iter()
            .any(|maturity| !maturity.is_mature());
        let without = decide(&CacheState { cooling: None, ..*s });
        is_young
            || v == without
            || without == Decision::Fetch(MissReason::NotCached) && v == Decision::Revalidate
    });
}

#[test]
fn min_age_serves_no_one_whom_the_policy_denies() {
    law_of_ages("an age is no authorization", |s, _, v| {
        let without = decide(&CacheState { cooling: None, ..*s });
        !matches!(without, Decision::Deny(_)) || matches!(v, Decision::Deny(_)) || is_rate_limited(s)
    });
    law_of_ages("a denial or a 404 is not hidden by an age", |s, _, v| {
        let is_denied = matches!(
            s.revalidation,
            Revalidation::Denied(CredentialOwner::Client) | Revalidation::NotFound
        );
        !is_denied
            || !matches!(v, Decision::Deny(DenyReason::TooYoung(_)))
            || s.on_not_found == OnNotFound::ServeStale
    });
    law_of_ages("without a grant, an age is told only after a 2xx", |s, _, v| {
        has_2xx(s)
            || s.authorization != Authorization::Unknown
            || !matches!(v, Decision::Deny(DenyReason::TooYoung(_)))
    });
}

/// The same ages with an older digest, or with more of it in the store.
fn with_more_of_the_older(cooling: &AgeFacts) -> impl Iterator<Item = AgeFacts> {
    let presences = [Presence::None, Presence::ManifestOnly, Presence::Complete];
    let digests = [old_digest(), other_digest()];
    let olders = digests
        .into_iter()
        .flat_map(move |digest| presences.map(|presence| OlderDigest { digest, presence }));
    let cooling = *cooling;
    olders
        .filter(move |more| {
            cooling.older.is_none_or(|older| {
                let rank = |presence| presences.iter().position(|one| *one == presence);
                older.digest == more.digest && rank(older.presence) < rank(more.presence)
            })
        })
        .map(move |older| AgeFacts {
            older: Some(older),
            ..cooling
        })
}

#[test]
fn min_age_more_youth_never_serves_more() {
    let gets = |v| {
        matches!(
            v,
            Decision::Serve(_) | Decision::ProbeLayers(_) | Decision::Fetch(_)
        )
    };
    law_of_ages("an older digest or an approval only adds", |s, cooling, v| {
        let elder = [
            AgeFacts {
                cached: Maturity::Mature,
                ..*cooling
            },
            AgeFacts {
                previous: Maturity::Mature,
                ..*cooling
            },
            AgeFacts {
                named: Maturity::Mature,
                ..*cooling
            },
        ];
        elder
            .into_iter()
            .chain(with_more_of_the_older(cooling))
            .filter(|elder| is_consistent(s, elder))
            .all(|elder| {
                let with = decide(&CacheState {
                    cooling: Some(elder),
                    ..*s
                });
                !gets(v) || gets(with) || is_rate_limited(s)
            })
    });
}

#[test]
fn min_age_old_digest_stands_in_for_a_young_one() {
    law_of_ages(
        "while the tag's digest cools, the older one is the answer",
        |s, cooling, v| {
            let applies = matches!(s.revalidation, Revalidation::Digest { .. })
                && !cooling.named.is_mature()
                && s.policy != Policy::IfNotPresent;
            !applies
                || match cooling.older {
                    None => matches!(v, Decision::Deny(DenyReason::TooYoung(_))),
                    Some(_) => matches!(
                        v,
                        Decision::Serve(HitReason::Cooling(_))
                            | Decision::ProbeLayers(HitReason::Cooling(_))
                            | Decision::Fetch(MissReason::Cooling(_))
                    ),
                }
        },
    );
}

#[test]
fn min_age_young_copy_is_not_served_in_an_outage() {
    law_of_ages("silence makes nothing older", |s, cooling, v| {
        !(is_unavailable(s) && !cooling.cached.is_mature() && serves(v))
    });
}

#[test]
fn min_age_by_digest_denies_a_young_manifest() {
    for base in every_state()
        .into_iter()
        .filter(|s| s.kind == ContentKind::Manifest)
    {
        let young = Maturity::Young(youth(old_digest()));
        let state = CacheState {
            cooling: Some(AgeFacts::of_digest(young)),
            ..base
        };
        let decision = decide(&state);
        assert!(
            matches!(decision, Decision::Deny(_) | Decision::Revalidate),
            "{state:#?} gave {decision:?}"
        );
    }
}

/// The base states with the cached copy blocked, and those with the named digest blocked.
fn every_blocked_base() -> Vec<CacheState> {
    let mut all = Vec::new();
    for base in every_base() {
        if base.cached.is_some() {
            all.push(base.with_blocked(Some(old_digest())));
        }
        if let Revalidation::Digest { digest, .. } = base.revalidation
            && digest == new_digest()
        {
            all.push(base.with_revalidation(Revalidation::Blocked(digest)));
        }
    }
    all
}

#[test]
fn min_age_block_beats_age_and_approval() {
    // An approved digest is `Mature`, so the ages include approvals.
    law_over(&every_blocked_base(), "never a blocked one", |s, _, v| {
        !gives_out_blocked(s, v)
    });
}

#[test]
fn min_age_block_of_a_young_digest_keeps_the_older_one() {
    law_over(&every_blocked_base(), "the older one", |s, cooling, v| {
        let (Revalidation::Blocked(digest), Some(older)) = (s.revalidation, cooling.older) else {
            return true;
        };
        if cooling.named.is_mature() {
            return matches!(v, Decision::Deny(_)) || s.policy == Policy::IfNotPresent;
        }
        let presence = Presence::None;
        let unblocked = decide(&s.with_revalidation(Revalidation::Digest { digest, presence }));
        v == unblocked && (s.target() == Some(older.digest))
    });
}
