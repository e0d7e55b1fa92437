use std::net::{IpAddr, Ipv4Addr};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

#[expect(clippy::unnecessary_wraps, reason = "the key of an account")]
fn address(last: u8) -> Address {
    Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, last)))
}

/// Admits bodies of an address and lets each read as much as the ledger allows. Returns their bytes.
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

/// The bytes of one minimum chunk for each body.
fn min_bytes(bodies: usize) -> usize {
    bodies.min(UNCROWDED_BODIES_MAX) * CHUNK_BYTES_MIN
        + bodies.saturating_sub(UNCROWDED_BODIES_MAX) * CHUNK_BYTES_MIN_CROWDED
}

#[test]
fn t03_one_address_leaves_half_of_the_budget_free() {
    let mut ledger = Ledger::default();
    let greedy = fill(&mut ledger, address(1), 2_000);
    assert!(greedy <= BYTES_MAX / 2 + min_bytes(2_000), "{greedy}");
    // 34 MiB; without a budget, the same took 2.5 GB.
    assert!(greedy < 36 * 1024 * 1024, "{greedy}");
    // Another address has large chunks.
    assert!(ledger.enter(address(2)));
    assert!(ledger.reserve(address(2), 0) >= Some(CHUNK_BYTES_MEDIUM));
    // A body of the greedy address with nothing outstanding continues with small ones.
    assert_eq!(ledger.reserve(address(1), 0), Some(CHUNK_BYTES_MIN_CROWDED));
    assert_eq!(ledger.reserve(address(1), CHUNK_BYTES_MIN_CROWDED), None);
}

#[test]
fn t03_ordinary_readers_have_large_steps() {
    let mut ledger = Ledger::<()>::default();
    for _ in 0..64 {
        assert!(ledger.enter(address(1)));
        assert_eq!(ledger.reserve(address(1), 0), Some(READ_CHUNK_BYTES));
    }
    // 10 jobs × 40 layers, each with one chunk outstanding.
    let mut ledger = Ledger::<()>::default();
    for _ in 0..400 {
        assert!(ledger.enter(address(1)));
        assert!(ledger.reserve(address(1), 0).unwrap() >= CHUNK_BYTES_MIN);
    }
    assert_eq!(ledger.waiting(), 0);
}

#[test]
fn t03_short_chunks_do_not_cost_a_body_its_turn() {
    let mut ledger = Ledger::<()>::default();
    fill(&mut ledger, address(1), 250);
    assert!(ledger.enter(address(1)));
    assert_eq!(ledger.reserve(address(1), 120), Some(CHUNK_BYTES_MIN - 120));
    assert_eq!(ledger.reserve(address(1), CHUNK_BYTES_MIN), None);
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
    // Half of all, then half of the remaining.
    assert_eq!(inside, [BODIES_MAX / 2, BODIES_MAX / 4]);
    let tickets: Vec<_> = (0..3).map(|name| ledger.queue(address(0), name)).collect();
    ledger.queue(address(1), 10);
    ledger.queue(address(1), 11);
    assert_eq!(ledger.admit(), None);
    assert!(!ledger.enter(address(1)), "a waiter precedes it");
    assert_eq!(ledger.cancel(address(0), tickets[0]), Some(0));
    assert_eq!(ledger.cancel(address(0), tickets[0]), None);
    // An address with more bodies than are free waits on.
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
enum Step {
    Enter(u8),
    Leave(u8),
    Read(u8),
    Written(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let client = 0..4_u8;
    prop_oneof![
        2 => client.clone().prop_map(Step::Enter),
        1 => client.clone().prop_map(Step::Leave),
        4 => client.clone().prop_map(Step::Read),
        2 => client.prop_map(Step::Written),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn t03_the_ledger_is_what_its_bodies_have(steps in vec(step(), 0..400)) {
        let mut ledger = Ledger::<()>::default();
        let mut bodies: Vec<(u8, Vec<usize>)> = Vec::new();
        for step in steps {
            match step {
                Step::Enter(client) => {
                    prop_assert!(ledger.enter(address(client)));
                    bodies.push((client, Vec::new()));
                }
                Step::Leave(client) => {
                    if let Some(place) = bodies.iter().position(|(of, _)| *of == client) {
                        let (_, chunks) = bodies.remove(place);
                        ledger.leave(address(client));
                        for bytes in chunks {
                            ledger.adjust(address(client), bytes, 0);
                        }
                    }
                }
                Step::Read(client) => {
                    for (_, chunks) in bodies.iter_mut().filter(|(of, _)| *of == client) {
                        let own = chunks.iter().sum();
                        let bytes = ledger.reserve(address(client), own);
                        prop_assert!(own > 0 || bytes.is_some(), "a body with nothing outstanding may read");
                        chunks.extend(bytes);
                    }
                }
                Step::Written(client) => {
                    for (_, chunks) in bodies.iter_mut().filter(|(of, _)| *of == client) {
                        if let Some(bytes) = chunks.pop() {
                            ledger.adjust(address(client), bytes, 0);
                        }
                    }
                }
            }
            let sum: usize = bodies.iter().flat_map(|(_, chunks)| chunks).sum();
            prop_assert_eq!(ledger.bytes(), sum);
            prop_assert!(sum <= BYTES_MAX + min_bytes(bodies.len()));
        }
        for (client, chunks) in bodies.drain(..) {
            ledger.leave(address(client));
            for bytes in chunks {
                ledger.adjust(address(client), bytes, 0);
            }
        }
        prop_assert!(ledger.accounts.is_empty());
    }
}
