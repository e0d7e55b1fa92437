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

const CAUSE: Cause = Cause::Refused;

/// What can be missing of an image, and which earlier one may stand in.
fn rests() -> [Rest; 4] {
    let missing = |earlier| Rest::Missing { earlier };
    let (recently, long_ago) = (now() - Duration::from_secs(1), now() - 10 * STALE);
    [
        Rest::Held,
        missing(None),
        missing(Some(recently)),
        missing(Some(long_ago)),
    ]
}

fn names(digest: Digest, holding: Holding) -> Heard {
    Heard::Named { digest, holding }
}

/// The whole input space: each field takes every value that the decision can tell apart.
fn every_situation() -> Vec<Situation> {
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
        for (is_moved, is_in_doubt) in [(false, false), (true, false), (false, true), (true, true)] {
            helds.extend(rests().map(|rest| {
                Some(Held {
                    digest: old_digest(),
                    confirmed_at,
                    is_moved,
                    rest,
                    is_in_doubt,
                })
            }));
        }
    }
    let hearings = [
        Heard::Nothing,
        names(old_digest(), Holding::Whole),
        names(old_digest(), Holding::Manifest),
        names(new_digest(), Holding::Whole),
        names(new_digest(), Holding::Manifest),
        names(new_digest(), Holding::Nothing),
        Heard::Unnamed,
        Heard::Absent,
        Heard::Refused(Whose::Client),
        Heard::Refused(Whose::Proxy),
        Heard::Silent(CAUSE),
        Heard::Silent(Cause::RateLimited),
        Heard::Undelivered(CAUSE),
    ];
    let mut all = Vec::new();
    for policy in Policy::ALL {
        for subject in [Subject::Tag, Subject::Manifest, Subject::Blob] {
            for &held in helds.iter().filter(|held| can_be(subject, **held)) {
                for standing in [Standing::Unknown, Standing::Lapsed, Standing::Vouched] {
                    for heard in hearings {
                        for absent in Absence::ALL {
                            for fresh in [Duration::ZERO, FRESH] {
                                for stale in [None, Some(STALE)] {
                                    all.push(Situation {
                                        policy,
                                        subject,
                                        held,
                                        standing,
                                        heard,
                                        absent,
                                        fresh,
                                        stale,
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
fn can_be(subject: Subject, held: Option<Held>) -> bool {
    if subject != Subject::Tag && held.is_some_and(|held| held.is_moved) {
        return false;
    }
    match (subject, held.map(|held| held.rest)) {
        (Subject::Tag, _) | (_, None | Some(Rest::Held)) => true,
        (Subject::Manifest, Some(Rest::Missing { earlier })) => earlier.is_none(),
        (Subject::Blob, Some(Rest::Missing { .. })) => false,
    }
}

fn is_whole(s: &Situation) -> bool {
    s.held.is_some_and(|held| held.rest == Rest::Held)
}

fn has_whole(s: &Situation) -> bool {
    s.held
        .is_some_and(|held| held.rest != Rest::Missing { earlier: None })
}

/// Checks `law` in every situation where `applies` holds, and that there is at least one such situation.
fn law(name: &str, applies: impl Fn(&Situation) -> bool, law: impl Fn(&Situation, Verdict) -> bool) {
    let mut checked = 0;
    for situation in every_situation().into_iter().filter(|s| applies(s)) {
        let verdict = decide(&situation);
        assert!(
            law(&situation, verdict),
            "{name}: {situation:#?} gave {verdict:?}"
        );
        checked += 1;
    }
    assert!(checked > 0, "{name}: applies to no situation");
}

fn in_doubt(s: &Situation) -> bool {
    s.held.is_some_and(|held| held.is_in_doubt)
}

fn serves(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Serve(_))
}

fn named(s: &Situation) -> bool {
    matches!(s.heard, Heard::Named { .. } | Heard::Unnamed)
}

fn no_answer(s: &Situation) -> bool {
    matches!(s.heard, Heard::Silent(_) | Heard::Undelivered(_))
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
        |s| s.held.is_none(),
        |s, v| {
            let named = matches!(s.heard, Heard::Named { holding, .. } if holding != Holding::Nothing);
            !serves(v) || named && s.subject == Subject::Tag
        },
    );
}

#[test]
fn a_refusal_of_the_clients_credential_is_never_answered_from_the_cache() {
    law(
        "401/403 is final",
        |s| s.heard == Heard::Refused(Whose::Client),
        |_, v| v == Verdict::Refuse(Refusal::Forbidden),
    );
}

#[test]
fn a_stranger_gets_nothing_without_the_upstreams_yes() {
    law(
        "a stranger is not served",
        |s| s.standing == Standing::Unknown && !named(s),
        |_, v| !serves(v),
    );
}

#[test]
fn r01_under_never_a_refusal_tells_a_stranger_nothing() {
    law(
        "one refusal, held or not",
        |s| s.standing == Standing::Unknown && s.policy == Policy::Never && s.heard == Heard::Nothing,
        |_, v| v == Verdict::Refuse(Refusal::NotVouched),
    );
    law(
        "and only strangers get it",
        |s| s.standing != Standing::Unknown,
        |_, v| v != Verdict::Refuse(Refusal::NotVouched),
    );
}

#[test]
fn a_lapsed_grant_is_good_only_while_the_upstream_cannot_be_asked() {
    law(
        "a lapsed grant does not serve before asking",
        |s| s.standing == Standing::Lapsed && s.heard == Heard::Nothing && s.policy != Policy::Never,
        |_, v| !serves(v),
    );
}

#[test]
fn policy_always_serves_a_tag_only_on_a_yes_given_now() {
    law(
        "always needs a yes",
        |s| s.policy == Policy::Always && s.subject == Subject::Tag && !named(s),
        |_, v| !serves(v),
    );
}

#[test]
fn policy_never_contacts_nobody() {
    law(
        "never neither asks nor fetches",
        |s| s.policy == Policy::Never && s.heard == Heard::Nothing,
        |_, v| !matches!(v, Verdict::Ask | Verdict::Fetch(_)),
    );
}

#[test]
fn t16_what_is_in_doubt_is_served_unasked_under_no_policy_but_never() {
    law(
        "in doubt, the upstream is asked",
        |s| in_doubt(s) && s.heard == Heard::Nothing && s.policy != Policy::Never,
        |_, v| v == Verdict::Ask,
    );
}

#[test]
fn t16_a_tag_in_doubt_is_not_answered_with_the_old_copy_once_it_moved() {
    law(
        "in doubt, the newest word counts",
        |s| {
            in_doubt(s)
                && s.subject == Subject::Tag
                && matches!(s.heard, Heard::Named { digest, .. } if digest == new_digest())
        },
        |_, v| {
            matches!(
                v,
                Verdict::Fetch(_) | Verdict::Serve(Served::Moved) | Verdict::Check(Served::Moved)
            )
        },
    );
}

#[test]
fn t16_a_doubt_takes_nothing_away_in_an_outage() {
    for situation in every_situation()
        .into_iter()
        .filter(|s| in_doubt(s) && no_answer(s))
    {
        let held = situation.held.map(|held| Held {
            is_in_doubt: false,
            ..held
        });
        let without = Situation { held, ..situation };
        assert_eq!(decide(&situation), decide(&without), "{situation:#?}");
    }
}

#[test]
fn a_tag_older_than_stale_is_not_served_on_silence() {
    law(
        "stale is a limit",
        |s| {
            let too_old = |at| at <= now() - STALE || at > now() + age::AHEAD_MAX;
            let old = s.held.is_some_and(|held| match held.rest {
                Rest::Missing { earlier: Some(at) } => too_old(at),
                _ => too_old(held.confirmed_at),
            });
            s.stale.is_some() && old && no_answer(s) && s.subject == Subject::Tag
        },
        |_, v| !serves(v),
    );
}

#[test]
fn an_absent_thing_is_served_only_where_the_rule_keeps_it() {
    law(
        "404 refuses",
        |s| s.heard == Heard::Absent && s.absent == Absence::Refuse,
        |_, v| v == Verdict::Refuse(Refusal::Absent),
    );
}

#[test]
fn an_absence_and_a_silence_are_never_taken_for_each_other() {
    law("silence is not absence", no_answer, |_, v| {
        v != Verdict::Refuse(Refusal::Absent)
    });
    law(
        "absence is not silence",
        |s| s.heard == Heard::Absent,
        |_, v| {
            !matches!(
                v,
                Verdict::Refuse(Refusal::Silent(_) | Refusal::TooStale(_) | Refusal::Incomplete(_))
            )
        },
    );
}

#[test]
fn nothing_is_asked_twice() {
    law(
        "one question",
        |s| s.heard != Heard::Nothing,
        |_, v| v != Verdict::Ask,
    );
}

#[test]
fn a_failed_fetch_is_not_followed_by_another() {
    law("no second fetch", no_answer, |_, v| {
        !matches!(v, Verdict::Fetch(_))
    });
}

#[test]
fn a_moved_tag_is_not_answered_with_the_old_copy() {
    law(
        "newer wins",
        |s| {
            matches!(s.heard, Heard::Named { digest, .. } if digest == new_digest())
                && s.subject == Subject::Tag
                && matches!(s.policy, Policy::Always | Policy::IfNewer)
        },
        |_, v| !matches!(v, Verdict::Serve(served) | Verdict::Check(served) if served != Served::Moved),
    );
}

#[test]
fn half_an_image_is_served_only_on_the_upstreams_word() {
    law(
        "a tag that is not whole is not served on silence",
        |s| {
            no_answer(s)
                && s.subject == Subject::Tag
                && s.heard != Heard::Silent(Cause::RateLimited)
                && s.held.is_some()
                && !has_whole(s)
        },
        |_, v| matches!(v, Verdict::Refuse(_)),
    );
    law(
        "nor before asking",
        |s| s.heard == Heard::Nothing && s.subject == Subject::Tag && !is_whole(s),
        |_, v| !matches!(v, Verdict::Serve(served) if served != Served::LastComplete(None)),
    );
}

/// By digest nothing better exists than what is cached, so what a manifest points to changes nothing (M2). Completeness
/// was asked of it too: a client that reads the manifests of every platform and the layers of one was refused in an
/// outage what it needed no layer of.
#[test]
fn m02_by_digest_what_is_cached_is_served_whatever_its_parts() {
    law(
        "the rest plays no part",
        |s| s.subject == Subject::Manifest && s.held.is_some() && !is_whole(s),
        |s, v| {
            let rest = Rest::Held;
            let held = s.held.map(|held| Held { rest, ..held });
            v == decide(&Situation { held, ..*s })
        },
    );
    law(
        "silence serves the entitled",
        |s| {
            s.subject == Subject::Manifest
                && matches!(s.heard, Heard::Silent(_))
                && s.held.is_some()
                && s.standing != Standing::Unknown
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
                s.heard,
                Heard::Named {
                    holding: Holding::Whole,
                    ..
                }
            );
            moved_to_whole
                || !matches!(v, Verdict::Serve(served) if !matches!(served, Served::LastComplete(_)))
        },
    );
    law(
        "a new one is not believed whole",
        |s| has_whole(s) && s.heard == names(new_digest(), Holding::Manifest) && s.subject == Subject::Tag,
        |s, v| matches!(v, Verdict::Check(_)) || s.policy == Policy::IfNotPresent && is_whole(s),
    );
}

#[test]
fn a_whole_image_is_never_checked_again() {
    law(
        "no check of what is whole",
        |s| {
            is_whole(s)
                && !matches!(
                    s.heard,
                    Heard::Named {
                        holding: Holding::Manifest,
                        ..
                    }
                )
        },
        |_, v| !matches!(v, Verdict::Check(_)),
    );
}

#[test]
fn what_may_be_outdated_says_so() {
    law(
        "a tag served on silence is marked",
        |s| s.subject == Subject::Tag && (no_answer(s) || s.heard == Heard::Absent),
        |_, v| !matches!(v, Verdict::Serve(served) if !served.may_be_outdated()),
    );
}

// --- economy: what may never be wasted --------------------------------------------------------------------------

#[test]
fn a_fresh_tag_is_not_asked_about() {
    law(
        "fresh asks nothing",
        |s| {
            s.policy == Policy::IfNewer
                && s.subject == Subject::Tag
                && s.standing == Standing::Vouched
                && s.fresh == FRESH
                && s.heard == Heard::Nothing
                && is_whole(s)
                && s.held.is_some_and(|h| {
                    h.confirmed_at == now() - Duration::from_secs(1) && !h.is_moved && !h.is_in_doubt
                })
        },
        |_, v| v == Verdict::Serve(Served::Fresh),
    );
}

#[test]
fn o01_a_tag_that_another_client_saw_move_is_not_fresh() {
    law(
        "moved is not fresh",
        |s| s.held.is_some_and(|h| h.is_moved),
        |_, v| v != Verdict::Serve(Served::Fresh),
    );
    law(
        "and nothing else changes",
        |s| s.held.is_some_and(|h| h.is_moved),
        |s, v| {
            let is_moved = false;
            let held = s.held.map(|held| Held { is_moved, ..held });
            let unmoved = decide(&Situation { held, ..*s });
            v == unmoved || unmoved == Verdict::Serve(Served::Fresh) && v == Verdict::Ask
        },
    );
}

#[test]
fn a_clock_that_stepped_back_makes_nothing_fresh() {
    law(
        "the future is not fresh",
        |s| s.held.is_some_and(|h| h.confirmed_at > now()),
        |_, v| v != Verdict::Serve(Served::Fresh),
    );
}

#[test]
fn content_by_digest_is_not_asked_about_for_the_vouched() {
    law(
        "immutable",
        |s| {
            s.subject != Subject::Tag
                && s.held.is_some()
                && s.standing == Standing::Vouched
                && s.heard == Heard::Nothing
                && s.policy != Policy::Never
                && !in_doubt(s)
        },
        |_, v| v == Verdict::Serve(Served::Immutable),
    );
}

#[test]
fn what_is_held_is_not_fetched() {
    law(
        "an unchanged digest is served",
        |s| matches!(s.heard, Heard::Named { digest, .. } if digest == old_digest()) && s.held.is_some(),
        |_, v| serves(v) || matches!(v, Verdict::Check(_)),
    );
    law(
        "a digest held under another name is served",
        |s| {
            matches!(s.heard, Heard::Named { holding, .. } if holding != Holding::Nothing)
                && s.subject == Subject::Tag
        },
        |_, v| serves(v) || matches!(v, Verdict::Check(_)),
    );
}

#[test]
fn what_is_not_held_is_not_asked_about_first() {
    law(
        "the fetch is the question",
        |s| s.held.is_none() && s.heard == Heard::Nothing && s.policy != Policy::Never,
        |_, v| v == Verdict::Fetch(Why::NotHeld),
    );
}

#[test]
fn if_not_present_never_fetches_what_is_present() {
    law(
        "present is enough",
        |s| s.policy == Policy::IfNotPresent && s.held.is_some() && !in_doubt(s),
        |_, v| !matches!(v, Verdict::Fetch(_)),
    );
}

#[test]
fn the_entitled_are_served_through_an_outage() {
    law(
        "silence serves the entitled",
        |s| {
            matches!(s.heard, Heard::Silent(_))
                && has_whole(s)
                && s.standing != Standing::Unknown
                && s.policy != Policy::Always
                && s.stale.is_none()
        },
        |_, v| serves(v),
    );
}

#[test]
fn our_own_refused_credential_does_not_stop_the_entitled() {
    law(
        "the operator's mistake",
        |s| {
            s.heard == Heard::Refused(Whose::Proxy)
                && has_whole(s)
                && s.standing != Standing::Unknown
                && s.policy != Policy::Always
                && s.stale.is_none()
        },
        |_, v| serves(v),
    );
}

#[test]
fn less_standing_never_serves_more() {
    for situation in every_situation() {
        for (less, more) in [
            (Standing::Unknown, Standing::Lapsed),
            (Standing::Lapsed, Standing::Vouched),
        ] {
            let with_less = decide(&Situation {
                standing: less,
                ..situation
            });
            let with_more = decide(&Situation {
                standing: more,
                ..situation
            });
            assert!(
                !serves(with_less) || serves(with_more),
                "{situation:#?}: {with_less:?} but {with_more:?}"
            );
        }
    }
}

// --- the seed's own rule ----------------------------------------------------------------------------------------

/// (1) is the image held; (2) the digest of the held one; (3) if `if-newer`, the digest of the remote one; (4) if they
/// differ, pull; (5) if the remote digest cannot be had, use the held image.
#[test]
fn the_rule_as_it_was_asked_for() {
    let situation = Situation {
        policy: Policy::IfNewer,
        subject: Subject::Tag,
        held: Some(Held {
            digest: old_digest(),
            confirmed_at: now() - STALE,
            is_moved: false,
            rest: Rest::Held,
            is_in_doubt: false,
        }),
        standing: Standing::Vouched,
        heard: Heard::Nothing,
        absent: Absence::Refuse,
        fresh: Duration::ZERO,
        stale: None,
        now: now(),
    };
    let not_held = Situation {
        held: None,
        ..situation
    };
    let same = names(old_digest(), Holding::Whole);
    let other = names(new_digest(), Holding::Nothing);
    let table = [
        ("1. not held: pull", not_held, Verdict::Fetch(Why::NotHeld)),
        (
            "3. held: take the digest of the remote one",
            situation,
            Verdict::Ask,
        ),
        (
            "4. the same: use the held one",
            situation.having_heard(same),
            Verdict::Serve(Served::Unchanged),
        ),
        (
            "4. they differ: pull",
            situation.having_heard(other),
            Verdict::Fetch(Why::Newer),
        ),
        (
            "5. the remote digest cannot be had: use the held one",
            situation.having_heard(Heard::Silent(Cause::Timeout)),
            Verdict::Serve(Served::Stale(Cause::Timeout)),
        ),
        (
            "and never around the authentication of a private registry",
            situation.having_heard(Heard::Refused(Whose::Client)),
            Verdict::Refuse(Refusal::Forbidden),
        ),
    ];
    for (step, situation, expected) in table {
        assert_eq!(decide(&situation), expected, "{step}");
    }
}

#[test]
fn policies_are_read_back_from_their_names() {
    for policy in Policy::ALL {
        assert_eq!(policy.to_string().parse(), Ok(policy));
    }
    assert_eq!("If-Newer".parse::<Policy>(), Err(UnknownWord));
    for absence in Absence::ALL {
        assert_eq!(absence.name().parse(), Ok(absence));
    }
}
