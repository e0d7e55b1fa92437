use std::net::{IpAddr, Ipv4Addr};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

#[expect(clippy::unnecessary_wraps, reason = "as the ledger knows it")]
fn address(last: u8) -> Address {
    Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, last)))
}

/// Bodies of an address, each with as much outstanding as it is given.
fn fill(ledger: &mut Ledger<()>, address: Address, bodies: usize) -> usize {
    let mut outstanding = 0;
    for _ in 0..bodies {
        assert!(ledger.enter(address));
        let mut own = 0;
        while let Some(step) = ledger.reserve(address, own) {
            own += step;
        }
        outstanding += own;
    }
    outstanding
}

/// Room for one least step of each of so many bodies.
fn least(bodies: usize) -> usize {
    bodies.min(ROOMY_BODIES_MAX) * STEP_BYTES_MIN
        + bodies.saturating_sub(ROOMY_BODIES_MAX) * STEP_BYTES_CROWDED
}

#[test]
fn t03_one_address_leaves_half_of_the_budget_free() {
    let mut ledger = Ledger::default();
    let greedy = fill(&mut ledger, address(1), 2_000);
    assert!(greedy <= BYTES_MAX / 2 + least(2_000), "{greedy}");
    // 34 MiB for what took 2.5 GB without a budget.
    assert!(greedy < 36 * 1024 * 1024, "{greedy}");
    // Another address has large steps.
    assert!(ledger.enter(address(2)));
    assert!(ledger.reserve(address(2), 0) >= Some(STEP_BYTES_SHORT));
    // One quiet body of the greedy address goes on, in small ones.
    assert_eq!(ledger.reserve(address(1), 0), Some(STEP_BYTES_CROWDED));
    assert_eq!(ledger.reserve(address(1), STEP_BYTES_CROWDED), None);
}

#[test]
fn t03_ordinary_readers_have_large_steps() {
    let mut ledger = Ledger::<()>::default();
    for _ in 0..64 {
        assert!(ledger.enter(address(1)));
        assert_eq!(ledger.reserve(address(1), 0), Some(READ_CHUNK_BYTES));
    }
    // 10 jobs × 40 layers, each with one step outstanding.
    let mut ledger = Ledger::<()>::default();
    for _ in 0..400 {
        assert!(ledger.enter(address(1)));
        assert!(ledger.reserve(address(1), 0).unwrap() >= STEP_BYTES_MIN);
    }
    assert_eq!(ledger.waiting(), 0);
}

#[test]
fn t03_short_chunks_do_not_cost_a_body_its_turn() {
    let mut ledger = Ledger::<()>::default();
    fill(&mut ledger, address(1), 250);
    assert!(ledger.enter(address(1)));
    assert_eq!(ledger.reserve(address(1), 120), Some(STEP_BYTES_MIN - 120));
    assert_eq!(ledger.reserve(address(1), STEP_BYTES_MIN), None);
}

#[test]
fn t03_waiting_bodies_enter_by_turns_of_addresses() {
    let mut ledger = Ledger::default();
    let mut inside = [0, 0];
    for (place, count) in (0..).zip(&mut inside) {
        while ledger.enter(address(place)) {
            *count += 1;
        }
    }
    // Half of all, and then half of the rest.
    assert_eq!(inside, [BODIES_MAX / 2, BODIES_MAX / 4]);
    let tickets: Vec<_> = (0..3).map(|name| ledger.queue(address(0), name)).collect();
    ledger.queue(address(1), 10);
    ledger.queue(address(1), 11);
    assert_eq!(ledger.admit(), None);
    assert!(!ledger.enter(address(1)), "nobody overtakes");
    assert_eq!(ledger.cancel(address(0), tickets[0]), Some(0));
    assert_eq!(ledger.cancel(address(0), tickets[0]), None);
    // The one with more than its share of what is free waits on.
    ledger.leave(address(1));
    assert_eq!(ledger.admit(), Some((address(1), 10)));
    assert_eq!(ledger.admit(), None);
    for _ in 0..BODIES_MAX / 4 {
        ledger.leave(address(0));
    }
    let order: Vec<_> = std::iter::from_fn(|| ledger.admit())
        .map(|(_, name)| name)
        .collect();
    assert_eq!(order, [1, 11, 2]);
    assert_eq!(ledger.waiting(), 0);
}

#[derive(Clone, Debug)]
enum Deed {
    Enter(u8),
    Leave(u8),
    Read(u8),
    Written(u8),
}

fn deed() -> impl Strategy<Value = Deed> {
    let who = 0..4_u8;
    prop_oneof![
        2 => who.clone().prop_map(Deed::Enter),
        1 => who.clone().prop_map(Deed::Leave),
        4 => who.clone().prop_map(Deed::Read),
        2 => who.prop_map(Deed::Written),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn t03_the_ledger_is_what_its_bodies_have(deeds in vec(deed(), 0..400)) {
        let mut ledger = Ledger::<()>::default();
        let mut bodies: Vec<(u8, Vec<usize>)> = Vec::new();
        for deed in deeds {
            match deed {
                Deed::Enter(who) => {
                    prop_assert!(ledger.enter(address(who)));
                    bodies.push((who, Vec::new()));
                }
                Deed::Leave(who) => {
                    if let Some(place) = bodies.iter().position(|(of, _)| *of == who) {
                        let (_, steps) = bodies.remove(place);
                        ledger.leave(address(who));
                        for step in steps {
                            ledger.adjust(address(who), step, 0);
                        }
                    }
                }
                Deed::Read(who) => {
                    for (_, steps) in bodies.iter_mut().filter(|(of, _)| *of == who) {
                        let own = steps.iter().sum();
                        let step = ledger.reserve(address(who), own);
                        prop_assert!(own > 0 || step.is_some(), "a body with nothing outstanding may read");
                        steps.extend(step);
                    }
                }
                Deed::Written(who) => {
                    for (_, steps) in bodies.iter_mut().filter(|(of, _)| *of == who) {
                        if let Some(step) = steps.pop() {
                            ledger.adjust(address(who), step, 0);
                        }
                    }
                }
            }
            let sum: usize = bodies.iter().flat_map(|(_, steps)| steps).sum();
            prop_assert_eq!(ledger.bytes(), sum);
            prop_assert!(sum <= BYTES_MAX + least(bodies.len()));
        }
        for (who, steps) in bodies.drain(..) {
            ledger.leave(address(who));
            for step in steps {
                ledger.adjust(address(who), step, 0);
            }
        }
        prop_assert!(ledger.accounts.is_empty());
    }
}
