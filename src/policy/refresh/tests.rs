#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use super::*;
use crate::oci::{Algorithm, Digest};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

fn phase(number: u64) -> Phase {
    let hash = Digest::of(Algorithm::Sha256, &number.to_be_bytes());
    Phase::of_hash(u64::from_be_bytes(*hash.as_bytes().first_chunk().unwrap()))
}

fn facts(phase: Phase) -> TagFacts {
    TagFacts {
        policy: RefreshPolicy {
            interval: Some(HOUR),
            used_within: 7 * DAY,
            quota_floor: QuotaFloor::new(25).unwrap(),
        },
        phase,
        confirmed_at: at(0) - 3 * DAY,
        used_at: Some(at(0) - DAY),
        failures: None,
    }
}

/// The times at which a tag is refreshed in this period, each run confirming it.
fn runs(mut facts: TagFacts, from: SystemTime, until: SystemTime) -> Vec<SystemTime> {
    let interval = facts.policy.interval.unwrap();
    let mut found = Vec::new();
    for slot in facts.phase.slots(interval, (from, until)) {
        if facts.is_due(slot.at, slot.at) {
            found.push(slot.at);
            facts.confirmed_at = slot.at;
        }
    }
    found
}

#[test]
fn every_interval_has_one_slot_of_each_tag() {
    for interval in [MINUTE, HOUR, DAY, INTERVAL_MAX, Duration::from_millis(61_001)] {
        for number in 0..200 {
            let slots: Vec<_> = phase(number)
                .slots(interval, (at(0), at(0) + interval * 5))
                .collect();
            assert_eq!(slots.len(), 5, "{interval:?} {number}");
            for pair in slots.windows(2) {
                assert_eq!(pair[1].at.duration_since(pair[0].at).unwrap(), interval);
                assert_eq!(pair[1].number, pair[0].number + 1);
            }
            assert!(slots[0].at >= at(0));
        }
    }
}

#[test]
fn slots_of_many_tags_are_spread_evenly() {
    let mut by_minute = [0_u32; 60];
    for number in 0..10_000 {
        let slot = phase(number).slot_from(HOUR, at(0));
        by_minute[usize::try_from(slot.at.duration_since(at(0)).unwrap().as_secs() / 60).unwrap()] += 1;
    }
    // 167 expected, with a standard deviation of 13.
    assert!(
        by_minute.iter().all(|count| (110..230).contains(count)),
        "{by_minute:?}"
    );
}

#[test]
fn restart_after_downtime_makes_no_burst() {
    // Every tag was last confirmed days ago, and the process starts now.
    let mut by_minute = [0_u32; 60];
    for number in 0..10_000 {
        let times = runs(facts(phase(number)), at(0), at(3600));
        assert_eq!(times.len(), 1, "each tag once in the first interval");
        by_minute[usize::try_from(times[0].duration_since(at(0)).unwrap().as_secs() / 60).unwrap()] += 1;
    }
    assert!(
        by_minute.iter().all(|count| (110..230).contains(count)),
        "{by_minute:?}"
    );
}

#[test]
fn restart_changes_no_slot() {
    for number in 0..100 {
        let whole = runs(facts(phase(number)), at(0), at(10 * 3600));
        for restarted in [at(1), at(3600), at(5 * 3600 + 17)] {
            let mut later = facts(phase(number));
            let before = runs(later, at(0), restarted);
            later.confirmed_at = before.last().copied().unwrap_or(later.confirmed_at);
            let after = runs(later, restarted, at(10 * 3600));
            assert_eq!([before, after].concat(), whole, "{number}");
        }
    }
}

#[test]
fn clock_step_makes_no_burst() {
    // The window of a plan is as long as the time since the last one, so a step skips or repeats slots only.
    for step in [DAY, 3 * HOUR, MINUTE] {
        for now in [at(0) + step, at(0) - step] {
            let due = |number: &u64| !runs(facts(phase(*number)), now, now + MINUTE).is_empty();
            let count = (0..10_000).filter(due).count();
            assert!((110..230).contains(&count), "{count}");
        }
    }
}

#[test]
fn confirmation_from_before_clock_was_set_back_is_ignored() {
    let facts = TagFacts {
        confirmed_at: at(0) + DAY,
        ..facts(phase(1))
    };
    assert!(facts.is_due(at(0), at(0)));
    let Outlook::Planned(next) = facts.outlook(at(0)) else {
        panic!("planned")
    };
    assert!(next < at(3600));
}

#[test]
fn interval_change_takes_effect_at_once() {
    for number in 0..100 {
        let mut facts = facts(phase(number));
        facts.policy.interval = Some(DAY);
        facts.confirmed_at = at(0) - 2 * HOUR;
        facts.policy.interval = Some(HOUR);
        assert_eq!(runs(facts, at(0), at(3600)).len(), 1);
        facts.policy.interval = None;
        assert!(!facts.is_due(at(0), at(0)));
        assert_eq!(facts.outlook(at(0)), Outlook::Off);
    }
}

#[test]
fn client_revalidation_replaces_refresh() {
    let slot = phase(7).slot_from(HOUR, at(0));
    for (ago, due) in [
        (Duration::ZERO, false),
        (29 * MINUTE, false),
        (30 * MINUTE, true),
        (HOUR, true),
        (DAY, true),
    ] {
        let facts = TagFacts {
            confirmed_at: slot.at - ago,
            ..facts(phase(7))
        };
        assert_eq!(facts.is_due(slot.at, slot.at), due, "{ago:?}");
    }
}

#[test]
fn tag_is_confirmed_within_one_and_a_half_intervals() {
    for number in 0..100 {
        for minute in 0..60 {
            let confirmed_at = at(minute * 60);
            let facts = TagFacts {
                confirmed_at,
                ..facts(phase(number))
            };
            let Outlook::Planned(next) = facts.outlook(confirmed_at) else {
                panic!("planned")
            };
            let after = next.duration_since(confirmed_at).unwrap();
            assert!(after >= HOUR / 2 && after <= HOUR + HOUR / 2, "{after:?}");
            assert!(facts.is_due(next, next));
        }
    }
}

#[test]
fn unused_tag_is_not_refreshed() {
    let now = at(0);
    for (used_at, used) in [
        (None, false),
        (Some(now), true),
        (Some(now - 7 * DAY + MINUTE), true),
        (Some(now - 7 * DAY), false),
        (Some(SystemTime::UNIX_EPOCH), false),
        // The clock was set back by a moment, or by much.
        (Some(now + MINUTE), true),
        (Some(now + DAY), false),
    ] {
        let facts = TagFacts {
            used_at,
            ..facts(phase(3))
        };
        assert_eq!(facts.is_due(now, now), used, "{used_at:?}");
        assert_eq!(facts.outlook(now) != Outlook::Unused, used, "{used_at:?}");
    }
}

#[test]
fn failing_tag_uses_every_second_fourth_eighth_slot() {
    let mut facts = facts(phase(9));
    let (mut used, mut number) = (Vec::new(), 0);
    for slot in facts.phase.slots(HOUR, (at(0), at(40 * 3600))) {
        if facts.is_due(slot.at, slot.at) {
            used.push(number);
            facts.failures = Some(Failures {
                count: facts.failures.map_or(1, |failures| failures.count + 1),
                last_at: slot.at,
            });
        }
        number += 1;
    }
    assert_eq!(used, [0, 1, 3, 7, 15, 23, 31, 39]);
    // A day at most, and never less than the interval.
    facts.policy.interval = Some(12 * HOUR);
    let next = facts.outlook(facts.failures.unwrap().last_at);
    assert!(matches!(next, Outlook::Planned(next) if next < at(40 * 3600) + 36 * HOUR));
    assert_eq!(backoff(2 * DAY, u32::MAX), DAY);
}

#[test]
fn pull_ends_backoff_of_failing_tag() {
    let mut facts = facts(phase(9));
    facts.failures = Some(Failures {
        count: 4,
        last_at: at(0),
    });
    let Outlook::Planned(backed_off) = facts.outlook(at(60)) else {
        panic!("planned")
    };
    assert!(backed_off > at(7 * 3600));
    facts.confirmed_at = at(1);
    let Outlook::Planned(next) = facts.outlook(at(60)) else {
        panic!("planned")
    };
    assert!(next < at(2 * 3600));
}

#[test]
fn overload_refreshes_every_tag_less_often() {
    // 1,000 tags and 100 runs an interval: each tag in one of 16 slots.
    let mut count = [0_u32; 1000];
    for interval in 0..64 {
        let window = (at(interval * 3600), at((interval + 1) * 3600));
        let mut plan = Plan::new(100);
        for number in 0..1000 {
            for slot in phase(number).slots(HOUR, window) {
                plan.add(number, phase(number), slot);
            }
        }
        assert!(plan.stride() >= 8, "{}", plan.stride());
        let runs = plan.into_runs();
        assert!((20..=100).contains(&runs.len()), "{}", runs.len());
        assert!(runs.windows(2).all(|pair| pair[0].slot.at <= pair[1].slot.at));
        for run in runs {
            count[usize::try_from(run.tag).unwrap()] += 1;
        }
    }
    assert!(count.iter().all(|count| (1..=8).contains(count)), "{count:?}");
}

#[test]
fn plan_below_its_limit_uses_every_slot() {
    let mut plan = Plan::new(1000);
    for number in 0..1000 {
        plan.add(number, phase(number), phase(number).slot_from(HOUR, at(0)));
    }
    assert_eq!(plan.stride(), 1);
    assert_eq!(plan.into_runs().len(), 1000);
}

#[test]
fn quota_floor_compares_shares() {
    let quarter = QuotaFloor::new(25).unwrap();
    assert!(quarter.is_below(24, 100) && !quarter.is_below(25, 100) && !quarter.is_below(0, 0));
    assert!(quarter.is_below(u64::MAX / 5, u64::MAX));
    assert!(!QuotaFloor::new(0).unwrap().is_below(0, 100));
    assert!(QuotaFloor::new(100).unwrap().is_below(99, 100));
    assert_eq!(QuotaFloor::new(101), None);
}

#[test]
fn times_at_the_ends_of_the_clock_are_no_panic() {
    for from in [SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH - DAY, at(0)] {
        for hash in [0, 1, u64::MAX] {
            let slot = Phase::of_hash(hash).slot_from(HOUR, from);
            assert!(slot.at >= from);
        }
    }
}
