#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::net::{IpAddr, Ipv4Addr};

use super::*;

const NO_BOUNDS: Bounds = Bounds {
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

/// Serves one after the other from one place and gives it back at once.
fn order(core: &mut Core, of: &[(Ticket, &'static str)]) -> Vec<&'static str> {
    let mut served = Vec::new();
    while let Some(grant) = core.next() {
        let name = of.iter().find(|(ticket, _)| *ticket == grant.ticket);
        served.push(name.map_or("?", |(_, name)| *name));
        core.release(grant.taken);
    }
    served
}

#[test]
fn t09_clients_are_served_in_turn_whatever_each_of_them_asks() {
    let mut core = Core::new(1, false, NO_BOUNDS);
    let (all, mut of) = (group(""), Vec::new());
    for flow in 0..4000 {
        let ticket = core.enter(&all, [demand(1, flow, Class::Interactive)]);
        of.push((ticket, "greedy"));
    }
    for _ in 0..3 {
        let ticket = core.enter(&all, [demand(2, 0, Class::Interactive)]);
        of.push((ticket, "modest"));
    }
    let served = order(&mut core, &of);
    assert_eq!(served.len(), 4003);
    let last = served.iter().rposition(|name| *name == "modest").unwrap();
    assert!(
        last < 6,
        "each second turn is the modest client's: {:?}",
        served.get(..8)
    );
}

#[test]
fn t09_flows_of_one_client_are_served_in_turn_and_each_in_order() {
    let mut core = Core::new(1, false, NO_BOUNDS);
    let all = group("");
    let mut enter = |flow, name| (core.enter(&all, [demand(1, flow, Class::Bulk)]), name);
    let of = [
        enter(1, "a1"),
        enter(1, "a2"),
        enter(1, "a3"),
        enter(2, "b1"),
        enter(3, "c1"),
        enter(3, "c2"),
    ];
    assert_eq!(order(&mut core, &of), ["a1", "b1", "c1", "a2", "c2", "a3"]);
}

#[test]
fn t12_classes_go_in_order_and_a_lower_one_has_one_turn_in_five() {
    let mut core = Core::new(1, false, NO_BOUNDS);
    let (all, mut of) = (group(""), Vec::new());
    for _ in 0..20 {
        of.push((core.enter(&all, [demand(1, 0, Class::Interactive)]), "small"));
        of.push((core.enter(&all, [demand(1, 0, Class::Bulk)]), "large"));
    }
    of.push((core.enter(&all, [demand(2, 0, Class::Held)]), "held"));
    let served = order(&mut core, &of);
    assert_eq!(
        served.get(..11).unwrap(),
        [
            "held", "small", "small", "small", "large", "small", "small", "small", "small", "large", "small"
        ]
    );
    assert!(served.ends_with(&["large"; 10]));
}

/// No order of arrivals keeps a class that could be served from being served for longer than this many grants.
#[test]
fn t12_no_class_starves_under_any_of_many_random_loads() {
    let mut core = Core::new(3, false, NO_BOUNDS);
    let (all, mut random) = (group(""), Random(7));
    let mut since_served = [0_u32; CLASSES];
    for _ in 0..20_000 {
        for _ in 0..random.below(3) {
            let class = Class::ALL.get(random.below(4)).copied().unwrap();
            core.enter(&all, [demand(u8::try_from(random.below(5)).unwrap(), 0, class)]);
        }
        // One place at a time, so that no share is in the way of any class.
        let Some(grant) = core.next() else { continue };
        let (_, class) = core.taken.get(&grant.taken).cloned().unwrap();
        core.release(grant.taken);
        for other in Class::ALL {
            let since = since_served.get_mut(other as usize).unwrap();
            *since = if other == class || core.waiting_in(other) == 0 {
                0
            } else {
                *since + 1
            };
            assert!(*since <= PASSED_OVER_MAX + 3, "{other:?} starves");
        }
    }
}

#[test]
fn t12_large_and_background_leave_their_shares_to_others() {
    for max in 1..=64 {
        let mut core = Core::new(max, false, NO_BOUNDS);
        let all = group("");
        core.resize_group(&all, max);
        let mut fill = |class| {
            for _ in 0..=max {
                core.enter(&all, [demand(1, 0, class)]);
            }
            while core.next().is_some() {}
            core.in_use()
        };
        assert_eq!(fill(Class::Background), (max / 8).max(1), "background of {max}");
        let reserve = |part: usize| max / part;
        assert_eq!(fill(Class::Bulk), max - reserve(4), "large of {max}");
        assert_eq!(fill(Class::Interactive), max - reserve(8), "interactive of {max}");
        assert_eq!(fill(Class::Held), max);
    }
}

#[test]
fn t12_no_upstream_holds_all_places() {
    let mut core = Core::new(6, true, NO_BOUNDS);
    let (slow, other) = (group("slow.example"), group("other.example"));
    for _ in 0..20 {
        core.enter(&slow, [demand(1, 0, Class::Interactive)]);
    }
    while core.next().is_some() {}
    assert_eq!(core.in_use_of("slow.example"), 5);
    let ticket = core.enter(&other, [demand(2, 0, Class::Interactive)]);
    assert_eq!(core.next().unwrap().ticket, ticket);
}

#[test]
fn t13_prefetch_of_one_upstream_leaves_places_for_that_of_others() {
    let mut core = Core::new(256, true, NO_BOUNDS);
    let (slow, other) = (group("slow.example"), group("other.example"));
    core.resize_group(&slow, 64);
    core.resize_group(&other, 64);
    for _ in 0..100 {
        core.enter(&slow, [Demand::BACKGROUND]);
    }
    while core.next().is_some() {}
    assert_eq!(core.in_use_of("slow.example"), 8);
    let ticket = core.enter(&other, [Demand::BACKGROUND]);
    assert_eq!(core.next().unwrap().ticket, ticket);
}

#[test]
fn t13_a_background_place_that_a_client_waits_for_is_no_longer_one() {
    let mut core = Core::new(8, false, NO_BOUNDS);
    let all = group("");
    core.resize_group(&all, 8);
    core.enter(&all, [Demand::BACKGROUND]);
    let first = core.next().unwrap();
    core.enter(&all, [Demand::BACKGROUND]);
    assert_eq!(core.next(), None, "one of eight");
    core.raise(first.taken, Class::Bulk);
    assert!(core.next().is_some());
    core.raise(first.taken, Class::Background);
    core.release(first.taken);
    assert_eq!(core.in_use(), 1);
}

#[test]
fn t08_shared_work_waits_in_the_turn_of_each_who_waits_for_it() {
    let mut core = Core::new(1, false, NO_BOUNDS);
    let all = group("");
    let mut of: Vec<_> = (0..50)
        .map(|_| (core.enter(&all, [demand(1, 0, Class::Bulk)]), "greedy"))
        .collect();
    let (shared, _) = *of.last().unwrap();
    *of.last_mut().unwrap() = (shared, "shared");
    let joined = core.join(shared, demand(2, 0, Class::Bulk)).unwrap();
    // The turn of who joined comes before the 49 others of the client that began it.
    let served = order(&mut core, &of);
    assert!(served.get(..2).unwrap().contains(&"shared"));
    assert_eq!(served.len(), 50, "it is served once");
    assert_eq!(core.leave(joined), None, "and waits no longer");
    assert_eq!(core.join(shared, demand(3, 0, Class::Bulk)), None);
}

#[test]
fn o03_places_in_use_count_against_a_new_limit() {
    let mut core = Core::new(4, false, NO_BOUNDS);
    let all = group("");
    for _ in 0..10 {
        core.enter(&all, [demand(1, 0, Class::Held)]);
    }
    let taken: Vec<_> = std::iter::from_fn(|| core.next()).collect();
    assert_eq!(taken.len(), 4);
    core.resize(2);
    let mut taken = taken.into_iter();
    for in_use in [3, 2] {
        core.release(taken.next().unwrap().taken);
        assert_eq!((core.next(), core.in_use()), (None, in_use));
    }
    core.release(taken.next().unwrap().taken);
    assert!(core.next().is_some());
    assert_eq!(core.next(), None);
    core.resize(5);
    assert_eq!(std::iter::from_fn(|| core.next()).count(), 3);
}

#[test]
fn t02_the_bounds_are_by_client_and_in_all_the_largest_first() {
    let bounds = Bounds {
        waiting_max: 6,
        waiting_per_peer_max: 5,
    };
    let mut core = Core::new(0, false, bounds);
    let all = group("");
    for _ in 0..5 {
        core.enter(&all, [demand(1, 0, Class::Held)]);
    }
    assert!(!core.is_crowded_by(peer(1)));
    let sixth = core.enter(&all, [demand(1, 0, Class::Held)]);
    assert!(core.is_crowded_by(peer(1)) && !core.is_crowded_by(peer(2)));
    core.withdraw(sixth);
    core.enter(&all, [demand(2, 0, Class::Held)]);
    assert_eq!(core.surplus(), None);
    let third = core.enter(&all, [demand(3, 0, Class::Background)]);
    // The newest of the client with the most makes room, not the newest of all.
    let surplus = core.surplus().unwrap();
    let refused = core.leave(surplus).unwrap();
    assert_ne!(refused, third);
    assert_eq!((core.waiting_of(peer(1)), core.waiting_of(peer(3))), (4, 1));
    assert_eq!(core.surplus(), None);
}

/// A small generator with a fixed seed: a failure is the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// Over many random histories: nothing is forgotten, no limit is exceeded, no place stays empty that somebody may have,
/// and who leaves leaves nothing behind.
#[test]
fn t08_random_histories_keep_every_law() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let mut core = Core::new(1 + random.below(9), seed % 2 == 0, NO_BOUNDS);
        let groups = ["a", "b", "c"].map(group);
        let (mut waiting, mut taken): (Vec<Ticket>, Vec<Taken>) = Default::default();
        let mut entries: Vec<Entry> = Vec::new();
        for _ in 0..600 {
            let class = Class::ALL.get(random.below(4)).copied().unwrap();
            let wish = demand(
                u8::try_from(random.below(4)).unwrap(),
                random.below(3) as u64,
                class,
            );
            match random.below(8) {
                0..=2 => waiting.push(core.enter(groups.get(random.below(3)).unwrap(), [wish])),
                3 if !waiting.is_empty() => {
                    let ticket = waiting.get(random.below(waiting.len())).copied().unwrap();
                    entries.extend(core.join(ticket, wish));
                }
                4 if !entries.is_empty() => {
                    let left = core.leave(entries.swap_remove(random.below(entries.len())));
                    waiting.retain(|ticket| Some(*ticket) != left);
                }
                5 if !waiting.is_empty() => {
                    core.withdraw(waiting.swap_remove(random.below(waiting.len())));
                }
                6 => core.resize_group(groups.get(random.below(3)).unwrap(), 1 + random.below(6)),
                _ if !taken.is_empty() => core.release(taken.swap_remove(random.below(taken.len()))),
                _ => {}
            }
            while let Some(grant) = core.next() {
                let before = waiting.len();
                waiting.retain(|ticket| *ticket != grant.ticket);
                assert_eq!(waiting.len() + 1, before, "granted once, to one that waits");
                taken.push(grant.taken);
                assert!(core.in_use() <= core.places_max());
            }
            assert_eq!(core.in_use(), taken.len());
            let waits = |ticket: &Ticket| core.is_waiting(*ticket);
            assert!(waiting.iter().all(waits));
            assert_eq!(core.tickets.len(), waiting.len());
        }
        for ticket in waiting {
            core.withdraw(ticket);
        }
        assert!(core.entries.is_empty() && core.by_peer.is_empty());
        assert!(core.lines.iter().all(Ring::is_empty));
    }
}
