#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]
use std::net::Ipv4Addr;

use proptest::prelude::*;
use tokio::task::yield_now;

use super::victim::{GRACE, GRACE_AMONG_MANY, GRACE_FROM_FEW};
use super::*;

const LONG: Duration = Duration::from_secs(60);

#[expect(
    clippy::unnecessary_wraps,
    reason = "the key by which connections are counted"
)]
fn host(last: u8) -> Option<IpAddr> {
    Some(Ipv4Addr::new(192, 0, 2, last).into())
}

fn connections(places: usize, per_address: usize, waiting: usize) -> Connections {
    let bounds = Bounds {
        places,
        per_address,
        waiting,
        closes_at_address: false,
    };
    Connections::new("registry", bounds, Telemetry::new())
}

impl Connections {
    fn address_permit(&self, ip: Option<IpAddr>) -> AddressPermit {
        match self.enter(ip) {
            Entering::Admitted(permit) => permit,
            Entering::Waits(_) => panic!("it waits"),
            Entering::Refused(refused) => panic!("{refused:?}"),
        }
    }

    async fn open(&self, ip: Option<IpAddr>) -> Slot {
        self.place(self.address_permit(ip)).await
    }

    fn waits(&self, ip: Option<IpAddr>) -> Wait {
        match self.enter(ip) {
            Entering::Waits(wait) => wait,
            _ => panic!("it does not wait"),
        }
    }

    fn refuses(&self, ip: Option<IpAddr>) -> Option<Refused> {
        match self.enter(ip) {
            Entering::Refused(refused) => Some(refused),
            _ => None,
        }
    }

    fn is_empty(&self) -> bool {
        let registered = self.0.registered.lock();
        registered.addresses.is_empty()
            && registered.open.is_empty()
            && registered.waiting == 0
            && self.0.permits.free() == self.0.bounds.places
            && self.0.local.idle.load(Ordering::Relaxed) == 0
            && self.0.waiters.load(Ordering::Relaxed) == 0
    }
}

impl Slot {
    fn is_closing(&self) -> bool {
        self.entry.closing.is_cancelled()
    }
}

#[tokio::test(start_paused = true)]
async fn t10_waiting_connections_hold_no_place_of_the_process() {
    let connections = connections(3, 1, 8);
    let first = connections.open(host(1)).await;
    let waiting = connections.waits(host(1));
    assert_eq!(connections.refuses(host(1)), Some(Refused::Address));
    let others = [connections.open(host(2)).await, connections.open(host(3)).await];
    assert!(!first.is_closing() && others.iter().all(|other| !other.is_closing()));
    drop((first, others));
    assert!(waiting.slot(LONG).await.is_some());
    assert!(connections.is_empty());
}

#[tokio::test(start_paused = true)]
async fn t10_waiting_connections_of_all_addresses_have_a_bound() {
    let connections = connections(8, 1, 1);
    let _open = [connections.open(host(1)).await, connections.open(host(2)).await];
    let waiting = connections.waits(host(1));
    assert_eq!(connections.refuses(host(2)), Some(Refused::Waiting));
    drop(waiting);
    assert_eq!(connections.refuses(host(2)), None);
}

#[tokio::test(start_paused = true)]
async fn t10_a_wait_for_a_seat_ends_with_its_patience() {
    let connections = connections(8, 1, 8);
    let open = connections.open(host(1)).await;
    let before = Instant::now();
    assert!(connections.waits(host(1)).slot(LONG).await.is_none());
    assert_eq!(before.elapsed(), LONG);
    drop(open);
    assert!(connections.is_empty());
}

/// Opens a connection at the limit of the process. The connection chosen to be closed ends at once.
async fn opened_over(
    connections: &Connections,
    ip: Option<IpAddr>,
    mut open: Vec<Slot>,
) -> (Slot, Vec<Slot>) {
    let opening = connections.open(ip);
    let closing = async {
        loop {
            if let Some(at) = open.iter().position(Slot::is_closing) {
                drop(open.remove(at));
                return open;
            }
            sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::join!(opening, closing)
}

#[tokio::test(start_paused = true)]
async fn t10_the_connection_quiet_for_longest_makes_room() {
    let connections = connections(3, 3, 8);
    let mut open = Vec::new();
    for last in [1, 2, 3] {
        open.push(connections.open(host(last)).await);
        sleep(GRACE).await;
    }
    // The first has sent a request since.
    drop(open[0].handle().request());
    let (_newcomer, open) = opened_over(&connections, host(4), open).await;
    let left: Vec<_> = open.iter().map(|slot| slot.entry.ip).collect();
    assert_eq!(left, [host(1), host(3)]);
}

#[tokio::test(start_paused = true)]
async fn t10_the_address_with_most_quiet_connections_makes_room() {
    // After a grace, because a request may be under way.
    for (newcomer, grace) in [(host(2), GRACE_AMONG_MANY), (host(3), GRACE_FROM_FEW)] {
        let connections = connections(16, 32, 8);
        let mut open = vec![connections.open(host(1)).await];
        sleep(GRACE).await;
        for _ in 0..15 {
            open.push(connections.open(host(2)).await);
        }
        let before = Instant::now();
        let (slot, left) = opened_over(&connections, newcomer, open).await;
        assert!(before.elapsed() >= grace, "{:?}", before.elapsed());
        assert!(
            before.elapsed() < grace + GRACE_FROM_FEW,
            "{:?}",
            before.elapsed()
        );
        assert_eq!((left.len(), slot.entry.ip), (15, newcomer));
        assert_eq!(left[0].entry.ip, host(1));
    }
}

#[tokio::test(start_paused = true)]
async fn t10_connections_of_an_address_without_requests_have_no_grace() {
    let connections = connections(8, 32, 8);
    let mut open = Vec::new();
    for _ in 0..8 {
        open.push(connections.open(host(1)).await);
    }
    let waits = async |open: Vec<Slot>| {
        let before = Instant::now();
        let (slot, mut open) = opened_over(&connections, host(1), open).await;
        open.push(slot);
        (before.elapsed() >= GRACE_AMONG_MANY, open)
    };
    let (waited, open) = waits(open).await;
    assert!(waited);
    sleep(GRACE_AMONG_MANY).await;
    let (waited, open) = waits(open).await;
    assert!(!waited, "two have ended without a request");
    // The new connection is the youngest and has no grace either.
    let (waited, open) = waits(open.into_iter().rev().take(8).collect()).await;
    assert!(!waited);
    let address = Arc::clone(&open[0].entry.address);
    assert_eq!(address.unused.load(Ordering::Relaxed), 3);
    drop(open[0].handle().request());
    assert_eq!(address.unused.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn t10_a_burst_of_many_addresses_closes_no_handshake() {
    let connections = connections(64, 1, 8);
    let mut open = Vec::new();
    for last in 0..64 {
        open.push(connections.open(host(last)).await);
    }
    let before = Instant::now();
    let (_newcomer, _open) = opened_over(&connections, host(64), open).await;
    assert!(before.elapsed() >= GRACE, "{:?}", before.elapsed());
}

#[tokio::test(start_paused = true)]
async fn t10_a_busy_connection_is_never_closed_to_make_room() {
    let connections = connections(1, 1, 8);
    let busy = connections.open(host(1)).await;
    let requests = [busy.handle().request(), busy.handle().request()];
    let opening = tokio::spawn({
        let connections = connections.clone();
        async move { drop(connections.open(host(2)).await) }
    });
    sleep(10 * LONG).await;
    assert!(!busy.is_closing());
    let [one, other] = requests;
    drop(one);
    yield_now().await;
    assert!(!busy.is_closing());
    drop(other);
    sleep(GRACE).await;
    assert!(busy.is_closing());
    drop(busy);
    opening.await.unwrap();
    assert!(connections.is_empty());
}

#[tokio::test(start_paused = true)]
async fn t10_one_connection_is_closed_for_one_that_comes() {
    let connections = connections(4, 4, 8);
    let mut open = Vec::new();
    for last in 0..4 {
        open.push(connections.open(host(last)).await);
    }
    sleep(GRACE).await;
    let opening = tokio::spawn({
        let connections = connections.clone();
        async move { drop(connections.open(host(9)).await) }
    });
    sleep(CLOSE_TIMEOUT).await;
    // Another one becomes idle meanwhile.
    drop(open[3].handle().request());
    sleep(CLOSE_TIMEOUT / 2).await;
    assert_eq!(open.iter().filter(|slot| slot.is_closing()).count(), 1);
    drop(open);
    opening.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn t10_a_request_between_choice_and_close_is_answered() {
    let connections = connections(1, 1, 8);
    let slot = connections.open(host(1)).await;
    let handle = slot.handle();
    slot.entry.close(CloseReason::ConnectionLimit, Instant::now());
    // Its request arrives after it was chosen as idle and before it is closed.
    let request = handle.request();
    handle.closing().await;
    let answered = std::pin::pin!(async {
        sleep(LONG).await;
        drop(request);
        "answered"
    });
    assert_eq!(handle.ended(answered).await, Some("answered"));
}

#[tokio::test(start_paused = true)]
async fn t10_a_closing_connection_without_a_request_ends_at_once() {
    let connections = connections(2, 2, 8);
    let before = Instant::now();
    let unused = connections.open(host(1)).await;
    let endless = std::pin::pin!(std::future::pending::<()>());
    assert_eq!(unused.handle().ended(endless).await, None);
    assert_eq!(before.elapsed(), Duration::ZERO);
    // After a response, bytes of it may still have to be sent.
    let idle = connections.open(host(1)).await;
    drop(idle.handle().request());
    let endless = std::pin::pin!(std::future::pending::<()>());
    assert_eq!(idle.handle().ended(endless).await, None);
    assert_eq!(before.elapsed(), CLOSE_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn t10_a_closing_connection_sends_what_its_peer_still_takes() {
    let connections = connections(1, 1, 8);
    let slot = connections.open(host(1)).await;
    let handle = slot.handle();
    drop(handle.request());
    handle.note_sending(true);
    let sent = std::pin::pin!(async {
        sleep(LONG).await;
        "sent"
    });
    assert_eq!(handle.ended(sent).await, Some("sent"));
    handle.note_sending(false);
    let endless = std::pin::pin!(std::future::pending::<()>());
    assert_eq!(handle.ended(endless).await, None);
}

#[test]
fn ipv6_network_of_a_host_has_one_limit() {
    let connections = connections(8, 1, 8);
    let of = |address: &str| Some(address.parse().unwrap());
    let first = connections.address_permit(of("2001:db8::1"));
    let second = connections.waits(of("2001:db8::2"));
    let elsewhere = connections.address_permit(of("2001:db8:0:1::1"));
    assert_eq!(connections.refuses(of("2001:db8::3")), Some(Refused::Address));
    drop((first, second, elsewhere));
    assert!(connections.is_empty());
}

#[tokio::test(start_paused = true)]
async fn t10_a_client_behind_a_balancer_counts_under_its_own_address() {
    let connections = connections(2, 1, 8);
    let balancer = connections.open(host(1)).await;
    assert!(matches!(connections.enter(host(1)), Entering::Waits(_)));
    let client = balancer.announced(host(2).unwrap(), LONG).await.ok().unwrap();
    let next = connections.open(host(1)).await;
    // The client's second connection waits, and releases the permit with which it was accepted.
    let waiting = tokio::spawn(next.announced(host(2).unwrap(), LONG));
    yield_now().await;
    let other = connections.open(host(3)).await;
    assert!(!client.is_closing() && !other.is_closing());
    drop(client);
    assert!(waiting.await.unwrap().is_ok());
    drop(other);
    assert!(connections.is_empty());
}

#[tokio::test(start_paused = true)]
async fn t14_at_its_limit_an_address_makes_room_by_itself() {
    let bounds = Bounds {
        places: 16,
        per_address: 2,
        waiting: 8,
        closes_at_address: true,
    };
    let connections = Connections::new("admin", bounds, Telemetry::new());
    let other = connections.open(host(9)).await;
    let (old, young) = (connections.open(host(1)).await, connections.open(host(1)).await);
    let _busy = young.handle().request();
    let newcomer = tokio::spawn(connections.waits(host(1)).slot(LONG));
    yield_now().await;
    assert!(old.is_closing() && !young.is_closing() && !other.is_closing());
    drop(old);
    assert!(newcomer.await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn t10_a_unix_socket_has_no_limit_per_address() {
    let connections = connections(8, 1, 8);
    let mut open = Vec::new();
    for _ in 0..8 {
        open.push(connections.open(None).await);
    }
    let (_newcomer, open) = opened_over(&connections, None, open).await;
    assert_eq!(open.len(), 7);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Enter(u8),
    Leave(usize),
    Begin(usize),
    Answer(usize),
    Announce(usize, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4_u8).prop_map(Step::Enter),
        (0..8_usize).prop_map(Step::Leave),
        (0..8_usize).prop_map(Step::Begin),
        (0..8_usize).prop_map(Step::Answer),
        (0..8_usize, 0..4_u8).prop_map(|(at, host)| Step::Announce(at, host)),
    ]
}

proptest! {
    #[test]
    fn t10_every_place_is_given_back(steps in proptest::collection::vec(step(), 0..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let connections = connections(3, 2, 2);
            let (mut open, mut waiting, mut requests) = (Vec::new(), Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Enter(last) => match connections.enter(host(last)) {
                        Entering::Admitted(permit) => {
                            let slot = timeout(Duration::from_millis(1), connections.place(permit)).await;
                            open.extend(slot.ok());
                        }
                        Entering::Waits(wait) => waiting.push(wait),
                        Entering::Refused(_) => {}
                    },
                    Step::Leave(at) if at < open.len() => drop(open.remove(at)),
                    Step::Begin(at) if at < open.len() => requests.push(Slot::handle(&open[at]).request()),
                    Step::Answer(at) if at < requests.len() => drop(requests.remove(at)),
                    Step::Announce(at, last) if at < open.len() => {
                        let slot: Slot = open.remove(at);
                        let announced = slot.announced(host(last).unwrap(), Duration::from_millis(1)).await;
                        open.extend(announced.ok());
                    }
                    Step::Leave(_) | Step::Begin(_) | Step::Answer(_) | Step::Announce(..) => {}
                }
                for address in connections.0.registered.lock().addresses.values() {
                    let idle = open.iter().filter(|slot| {
                        Arc::ptr_eq(&slot.entry.address, address) && slot.entry.requests.load(Ordering::Relaxed) == 0
                    });
                    assert_eq!(address.idle.load(Ordering::Relaxed), idle.count());
                }
                assert!(open.len() <= 3);
            }
            drop((open, waiting, requests));
            assert!(connections.is_empty());
        });
    }

    #[test]
    fn t10_the_first_to_go_is_crowded_or_has_had_its_grace(
        idle in proptest::collection::vec((1..6_usize, 0..3_000_u64), 0..12),
        has_no_grace: bool,
        places in 1..40_usize,
        newcomer in prop_oneof![Just(Newcomer::SameAddress), Just(Newcomer::Few), Just(Newcomer::Many)],
    ) {
        let candidates = idle.iter().map(|&(of_address, ms)| Candidate {
            connection: (of_address, Duration::from_millis(ms)),
            of_address,
            idle_for: Duration::from_millis(ms),
            has_no_grace,
        });
        let has_many = |one: &&(usize, u64)| newcomer == Newcomer::SameAddress || one.0 > places / 8;
        let grace_of_many = match newcomer {
            _ if has_no_grace => 0,
            Newcomer::SameAddress => 0,
            Newcomer::Few => GRACE_FROM_FEW.as_millis(),
            Newcomer::Many => GRACE_AMONG_MANY.as_millis(),
        };
        let grace = |one: &(usize, u64)| if has_many(&one) { grace_of_many } else { GRACE.as_millis() };
        let has_had_it = |one: &&(usize, u64)| u128::from(one.1) >= grace(one);
        let first = match idle.iter().filter(has_many).max() {
            Some(crowded) => Some(crowded).filter(has_had_it),
            None => idle.iter().filter(has_had_it).max(),
        };
        match victim(candidates, places, newcomer) {
            Choice::Close((of_address, idle_for)) => {
                prop_assert_eq!(first, Some(&(of_address, u64::try_from(idle_for.as_millis()).unwrap())));
            }
            Choice::NotBefore(left) => {
                prop_assert!(first.is_none());
                let next = idle.iter().filter(has_many).max();
                let next = next.or_else(|| idle.iter().max_by_key(|one| one.1)).unwrap();
                prop_assert_eq!(left.as_millis(), grace(next) - u128::from(next.1));
            }
            Choice::NoneIdle => prop_assert!(idle.is_empty()),
        }
    }
}
