#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::net::{IpAddr, Ipv4Addr};

use super::*;

const NO_BOUNDS: Limits = Limits {
    waiting_max: usize::MAX,
    waiting_per_peer_max: usize::MAX,
};

fn peer(id: u8) -> Peer {
    Peer::Address(IpAddr::V4(Ipv4Addr::new(192, 0, 2, id)))
}

fn demand(id: u8, flow: u64, class: Class) -> Demand {
    Demand {
        peer: peer(id),
        flow,
        class,
    }
}

fn group(name: &str) -> Group {
    name.into()
}

/// Grants one permit after the other and releases each at once.
fn order(scheduler: &mut Scheduler, of: &[(Ticket, &'static str)]) -> Vec<&'static str> {
    let mut served = Vec::new();
    while let Some(grant) = scheduler.next() {
        let name = of.iter().find(|(ticket, _)| *ticket == grant.ticket);
        served.push(name.map_or("?", |(_, name)| *name));
        scheduler.release(grant.permit);
    }
    served
}

#[test]
fn t09_clients_are_served_round_robin() {
    let mut scheduler = Scheduler::new(1, false, NO_BOUNDS);
    let (all, mut of) = (group(""), Vec::new());
    for flow in 0..4000 {
        let ticket = scheduler.enter(&all, [demand(1, flow, Class::Interactive)]);
        of.push((ticket, "greedy"));
    }
    for _ in 0..3 {
        let ticket = scheduler.enter(&all, [demand(2, 0, Class::Interactive)]);
        of.push((ticket, "modest"));
    }
    let served = order(&mut scheduler, &of);
    assert_eq!(served.len(), 4003);
    let last = served.iter().rposition(|name| *name == "modest").unwrap();
    assert!(
        last < 6,
        "every second turn belongs to the client with few requests: {:?}",
        served.get(..8)
    );
}

#[test]
fn t09_flows_are_round_robin_and_fifo_within() {
    let mut scheduler = Scheduler::new(1, false, NO_BOUNDS);
    let all = group("");
    let mut enter = |flow, name| (scheduler.enter(&all, [demand(1, flow, Class::Bulk)]), name);
    let of = [
        enter(1, "a1"),
        enter(1, "a2"),
        enter(1, "a3"),
        enter(2, "b1"),
        enter(3, "c1"),
        enter(3, "c2"),
    ];
    assert_eq!(order(&mut scheduler, &of), ["a1", "b1", "c1", "a2", "c2", "a3"]);
}

#[test]
fn t12_lower_class_gets_one_turn_in_five() {
    let mut scheduler = Scheduler::new(1, false, NO_BOUNDS);
    let (all, mut of) = (group(""), Vec::new());
    for _ in 0..20 {
        of.push((scheduler.enter(&all, [demand(1, 0, Class::Interactive)]), "small"));
        of.push((scheduler.enter(&all, [demand(1, 0, Class::Bulk)]), "large"));
    }
    of.push((
        scheduler.enter(&all, [demand(2, 0, Class::Revalidation)]),
        "revalidation",
    ));
    let served = order(&mut scheduler, &of);
    assert_eq!(
        served.get(..11).unwrap(),
        [
            "revalidation",
            "small",
            "small",
            "small",
            "large",
            "small",
            "small",
            "small",
            "small",
            "large",
            "small"
        ]
    );
    assert!(served.ends_with(&["large"; 10]));
}

/// No order of arrivals keeps a servable class waiting for more than this many grants.
#[test]
fn t12_no_class_starves_under_random_loads() {
    let mut scheduler = Scheduler::new(3, false, NO_BOUNDS);
    let (all, mut random) = (group(""), Random(7));
    let mut since_served = [0_u32; CLASSES];
    for _ in 0..20_000 {
        for _ in 0..random.below(3) {
            let class = Class::ALL.get(random.below(4)).copied().unwrap();
            scheduler.enter(&all, [demand(u8::try_from(random.below(5)).unwrap(), 0, class)]);
        }
        // One permit at a time, so that no share limits a class.
        let Some(grant) = scheduler.next() else { continue };
        let (_, class) = scheduler.permit.get(&grant.permit).cloned().unwrap();
        scheduler.release(grant.permit);
        for other in Class::ALL {
            let since = since_served.get_mut(other as usize).unwrap();
            *since = if other == class || scheduler.waiting_in(other) == 0 {
                0
            } else {
                *since + 1
            };
            assert!(*since <= PASSED_OVER_MAX + 3, "{other:?} starves");
        }
    }
}

#[test]
fn t12_bulk_and_background_leave_shares_to_others() {
    for max in 1..=64 {
        let mut scheduler = Scheduler::new(max, false, NO_BOUNDS);
        let all = group("");
        scheduler.resize_group(&all, max);
        let mut fill = |class| {
            for _ in 0..=max {
                scheduler.enter(&all, [demand(1, 0, class)]);
            }
            while scheduler.next().is_some() {}
            scheduler.in_use()
        };
        assert_eq!(fill(Class::Background), (max / 8).max(1), "background of {max}");
        let reserve = |part: usize| max / part;
        assert_eq!(fill(Class::Bulk), max - reserve(4), "large of {max}");
        assert_eq!(fill(Class::Interactive), max - reserve(8), "interactive of {max}");
        assert_eq!(fill(Class::Revalidation), max);
    }
}

#[test]
fn t12_no_upstream_holds_all_permits() {
    let mut scheduler = Scheduler::new(6, true, NO_BOUNDS);
    let (slow, other) = (group("slow.example"), group("other.example"));
    for _ in 0..20 {
        scheduler.enter(&slow, [demand(1, 0, Class::Interactive)]);
    }
    while scheduler.next().is_some() {}
    assert_eq!(scheduler.in_use_of("slow.example"), 5);
    let ticket = scheduler.enter(&other, [demand(2, 0, Class::Interactive)]);
    assert_eq!(scheduler.next().unwrap().ticket, ticket);
}

#[test]
fn t13_prefetch_of_one_upstream_leaves_permits_for_others() {
    let mut scheduler = Scheduler::new(256, true, NO_BOUNDS);
    let (slow, other) = (group("slow.example"), group("other.example"));
    scheduler.resize_group(&slow, 64);
    scheduler.resize_group(&other, 64);
    for _ in 0..100 {
        scheduler.enter(&slow, [Demand::BACKGROUND]);
    }
    while scheduler.next().is_some() {}
    assert_eq!(scheduler.in_use_of("slow.example"), 8);
    let ticket = scheduler.enter(&other, [Demand::BACKGROUND]);
    assert_eq!(scheduler.next().unwrap().ticket, ticket);
}

#[test]
fn t13_background_permit_is_raised_for_a_waiting_client() {
    let mut scheduler = Scheduler::new(8, false, NO_BOUNDS);
    let all = group("");
    scheduler.resize_group(&all, 8);
    scheduler.enter(&all, [Demand::BACKGROUND]);
    let first = scheduler.next().unwrap();
    scheduler.enter(&all, [Demand::BACKGROUND]);
    assert_eq!(scheduler.next(), None, "one of eight");
    scheduler.raise(first.permit, Class::Bulk);
    assert!(scheduler.next().is_some());
    scheduler.raise(first.permit, Class::Background);
    scheduler.release(first.permit);
    assert_eq!(scheduler.in_use(), 1);
}

#[test]
fn t08_shared_work_waits_in_the_turn_of_each_waiter() {
    let mut scheduler = Scheduler::new(1, false, NO_BOUNDS);
    let all = group("");
    let mut of: Vec<_> = (0..50)
        .map(|_| (scheduler.enter(&all, [demand(1, 0, Class::Bulk)]), "greedy"))
        .collect();
    let (shared, _) = *of.last().unwrap();
    *of.last_mut().unwrap() = (shared, "shared");
    let joined = scheduler.join(shared, demand(2, 0, Class::Bulk)).unwrap();
    // The turn of the joined client comes before the 49 other requests of the first client.
    let served = order(&mut scheduler, &of);
    assert!(served.get(..2).unwrap().contains(&"shared"));
    assert_eq!(served.len(), 50, "the shared work is granted once");
    assert_eq!(scheduler.leave(joined), None, "and no longer waits");
    assert_eq!(scheduler.join(shared, demand(3, 0, Class::Bulk)), None);
}

#[test]
fn o03_permits_in_use_count_against_a_new_limit() {
    let mut scheduler = Scheduler::new(4, false, NO_BOUNDS);
    let all = group("");
    for _ in 0..10 {
        scheduler.enter(&all, [demand(1, 0, Class::Revalidation)]);
    }
    let permit: Vec<_> = std::iter::from_fn(|| scheduler.next()).collect();
    assert_eq!(permit.len(), 4);
    scheduler.resize(2);
    let mut permit = permit.into_iter();
    for in_use in [3, 2] {
        scheduler.release(permit.next().unwrap().permit);
        assert_eq!((scheduler.next(), scheduler.in_use()), (None, in_use));
    }
    scheduler.release(permit.next().unwrap().permit);
    assert!(scheduler.next().is_some());
    assert_eq!(scheduler.next(), None);
    scheduler.resize(5);
    assert_eq!(std::iter::from_fn(|| scheduler.next()).count(), 3);
}

#[test]
fn t02_limits_are_per_client_and_total_largest_first() {
    let limits = Limits {
        waiting_max: 6,
        waiting_per_peer_max: 5,
    };
    let mut scheduler = Scheduler::new(0, false, limits);
    let all = group("");
    for _ in 0..5 {
        scheduler.enter(&all, [demand(1, 0, Class::Revalidation)]);
    }
    assert!(!scheduler.is_over_client_limit(peer(1)));
    let sixth = scheduler.enter(&all, [demand(1, 0, Class::Revalidation)]);
    assert!(scheduler.is_over_client_limit(peer(1)) && !scheduler.is_over_client_limit(peer(2)));
    scheduler.withdraw(sixth);
    scheduler.enter(&all, [demand(2, 0, Class::Revalidation)]);
    assert_eq!(scheduler.entry_over_limit(), None);
    let third = scheduler.enter(&all, [demand(3, 0, Class::Background)]);
    // The newest entry of the client with the most is removed, not the newest of all.
    let entry_over_limit = scheduler.entry_over_limit().unwrap();
    let refused = scheduler.leave(entry_over_limit).unwrap();
    assert_ne!(refused, third);
    assert_eq!(
        (scheduler.waiting_of(peer(1)), scheduler.waiting_of(peer(3))),
        (4, 1)
    );
    assert_eq!(scheduler.entry_over_limit(), None);
}

/// Every order of four requests of two groups and three classes, with every small limit.
#[test]
fn t12_permit_is_awaited_if_its_return_starts_an_entry() {
    let [one, other] = ["one.example", "other.example"].map(group);
    let kinds = [Class::Interactive, Class::Bulk, Class::Background]
        .map(|class| [(&one, class), (&other, class)])
        .concat();
    let (mut awaited, mut idle) = (0, 0);
    for limits in 0..18 {
        let (max, of_one, of_other) = (2 + limits % 3, 1 + limits / 3 % 3, 1 + limits / 9);
        for order in 0..kinds.len().pow(4) {
            let mut scheduler = Scheduler::new(max, true, NO_BOUNDS);
            scheduler.resize_group(&one, of_one);
            scheduler.resize_group(&other, of_other);
            let mut held = Vec::new();
            for place in 0..4 {
                let (group, class) = kinds.get(order / kinds.len().pow(place) % kinds.len()).unwrap();
                scheduler.enter(group, [demand(1, 0, *class)]);
                held.extend(std::iter::from_fn(|| scheduler.next()).map(|grant| grant.permit));
            }
            let permit = *held.get(order % held.len()).unwrap();
            let is_awaited = scheduler.is_awaited(permit);
            let (group, class) = scheduler.permit.get(&permit).cloned().unwrap();
            if is_awaited {
                let like = scheduler.enter(&group, [demand(2, 0, class)]);
                assert_eq!(scheduler.next(), None, "another like it is free");
                scheduler.withdraw(like);
            }
            scheduler.release(permit);
            let starts = scheduler.next().is_some();
            assert_eq!(
                is_awaited, starts,
                "limits {max} {of_one} {of_other}, order {order}"
            );
            *if starts { &mut awaited } else { &mut idle } += 1;
        }
    }
    assert!(awaited > 1000 && idle > 1000, "{awaited} {idle}");
}

#[test]
fn t12_permits_above_a_lowered_limit_are_awaited() {
    let mut scheduler = Scheduler::new(16, true, NO_BOUNDS);
    let (lowered, other) = (group("lowered.example"), group("other.example"));
    scheduler.resize_group(&other, 1);
    for of in [&lowered, &lowered, &lowered, &other, &other] {
        scheduler.enter(of, [demand(1, 0, Class::Bulk)]);
    }
    let held: Vec<_> = std::iter::from_fn(|| scheduler.next()).collect();
    assert_eq!(held.len(), 4);
    let of_lowered = |scheduler: &Scheduler| {
        held.iter()
            .filter(|grant| scheduler.permit.get(&grant.permit).unwrap().0 == lowered)
            .map(|grant| scheduler.is_awaited(grant.permit))
            .collect::<Vec<_>>()
    };
    scheduler.resize_group(&lowered, 1);
    assert_eq!(of_lowered(&scheduler), [false; 3], "nobody waits for them");
    scheduler.enter(&lowered, [demand(2, 0, Class::Bulk)]);
    assert_eq!(scheduler.next(), None);
    assert_eq!(of_lowered(&scheduler), [true; 3], "one alone does not suffice");
}

/// A small generator with a fixed seed, so that a failure is reproducible.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// Over many random histories: nothing is lost, no limit is exceeded, no permit stays free that an entry may
/// have, and a withdrawn entry leaves no trace.
#[test]
fn t08_random_histories_keep_all_invariants() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let mut scheduler = Scheduler::new(1 + random.below(9), seed % 2 == 0, NO_BOUNDS);
        let groups = ["a", "b", "c"].map(group);
        let (mut waiting, mut permit): (Vec<Ticket>, Vec<PermitId>) = Default::default();
        let mut entries: Vec<Entry> = Vec::new();
        for _ in 0..600 {
            let class = Class::ALL.get(random.below(4)).copied().unwrap();
            let wish = demand(
                u8::try_from(random.below(4)).unwrap(),
                random.below(3) as u64,
                class,
            );
            match random.below(8) {
                0..=2 => waiting.push(scheduler.enter(groups.get(random.below(3)).unwrap(), [wish])),
                3 if !waiting.is_empty() => {
                    let ticket = waiting.get(random.below(waiting.len())).copied().unwrap();
                    entries.extend(scheduler.join(ticket, wish));
                }
                4 if !entries.is_empty() => {
                    let left = scheduler.leave(entries.swap_remove(random.below(entries.len())));
                    waiting.retain(|ticket| Some(*ticket) != left);
                }
                5 if !waiting.is_empty() => {
                    scheduler.withdraw(waiting.swap_remove(random.below(waiting.len())));
                }
                6 => scheduler.resize_group(groups.get(random.below(3)).unwrap(), 1 + random.below(6)),
                _ if !permit.is_empty() => scheduler.release(permit.swap_remove(random.below(permit.len()))),
                _ => {}
            }
            while let Some(grant) = scheduler.next() {
                let before = waiting.len();
                waiting.retain(|ticket| *ticket != grant.ticket);
                assert_eq!(waiting.len() + 1, before, "granted once, to one that waits");
                permit.push(grant.permit);
                assert!(scheduler.in_use() <= scheduler.permits_max());
            }
            assert_eq!(scheduler.in_use(), permit.len());
            let waits = |ticket: &Ticket| scheduler.is_waiting(*ticket);
            assert!(waiting.iter().all(waits));
            assert_eq!(scheduler.tickets.len(), waiting.len());
        }
        for ticket in waiting {
            scheduler.withdraw(ticket);
        }
        assert!(scheduler.entries.is_empty() && scheduler.by_peer.is_empty());
        assert!(scheduler.class_queues.iter().all(RoundRobin::is_empty));
        let mut usages = scheduler.groups.values();
        assert!(usages.all(|usage| usage.waiting == [0; CLASSES]));
    }
}
