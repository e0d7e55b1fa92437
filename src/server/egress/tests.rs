use std::future::poll_fn;
use std::net::Ipv6Addr;
use std::path::Path;
use std::task::Waker;
use std::time::Duration;

use http_body::Body as _;
use tokio::io::{AsyncReadExt as _, duplex};
use tokio::time::sleep;

use super::ledger::Ledger;
use super::*;
use crate::server::Body;
use crate::server::idle_timeout::{IdlePause, IdleTimeoutStream};
use crate::store::file_read::BufferPool;
use crate::store::fs::{FileSystem as _, MemoryFs};
use crate::telemetry::Telemetry;

fn reserve_now(account: &mut Account) -> Poll<Charge> {
    account.poll_reserve(&mut Context::from_waker(Waker::noop()))
}

/// Admits bodies of an address until one has to wait.
fn crowd(egress: &Egress) -> Vec<Account> {
    let mut accounts = Vec::new();
    loop {
        let mut account = egress.body(None);
        if reserve_now(&mut account).is_pending() {
            return accounts;
        }
        accounts.push(account);
    }
}

#[test]
fn ipv6_network_of_a_host_has_one_share() {
    let egress = Egress::default();
    let mut accounts = Vec::new();
    let mut admits = |address: Ipv6Addr| {
        let mut account = egress.body(Some(address.into()));
        let is_admitted = reserve_now(&mut account).is_ready();
        accounts.push(account);
        is_admitted
    };
    let network = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0).to_bits();
    let mut hosts = 1..=BODIES_MAX as u128 / 2 + 1;
    assert!(hosts.any(|host| !admits(Ipv6Addr::from_bits(network | host))));
    assert!(admits(Ipv6Addr::from_bits(network | 1 << 64)));
}

#[tokio::test]
async fn t03_a_body_waits_for_its_own_chunk_and_is_woken() {
    let egress = Egress::default();
    let mut account = egress.body(None);
    let mut chunks = Vec::new();
    while let Poll::Ready(charge) = reserve_now(&mut account) {
        let bytes = charge.bytes();
        chunks.push(charge.onto(Bytes::from_static(b"x"), bytes));
    }
    let waiting = tokio::spawn(async move { poll_fn(|context| account.poll_reserve(context)).await.bytes() });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    chunks.pop();
    assert!(waiting.await.unwrap() > 0);
    drop(chunks);
    assert_eq!(egress.outstanding().bytes, 0);
}

#[tokio::test]
async fn t03_a_chunk_counts_until_its_last_part_is_dropped() {
    let egress = Egress::default();
    let mut account = egress.body(None);
    let Poll::Ready(charge) = reserve_now(&mut account) else {
        panic!("nothing is outstanding");
    };
    let chunk = charge.onto(Bytes::from_static(b"abcdef"), 6);
    let part = chunk.slice(2..4);
    drop((chunk, account));
    assert_eq!(egress.outstanding().bytes, 6);
    assert_eq!(part, "cd");
    drop(part);
    assert_eq!(egress.outstanding().bytes, 0);
    assert!(egress.0.lock().is_idle());
}

#[tokio::test]
async fn t03_a_dropped_waiter_hands_its_place_on() {
    let egress = Egress::default();
    let mut inside = crowd(&egress);
    let mut waiters: Vec<_> = (0..3).map(|_| egress.body(None)).collect();
    for waiter in &mut waiters {
        assert!(reserve_now(waiter).is_pending());
    }
    assert_eq!(egress.outstanding().waiting, 3);
    // One leaves while it waits, one after a permit was sent to it and before it received it.
    drop(waiters.remove(0));
    assert_eq!(egress.outstanding().waiting, 2);
    inside.pop();
    inside.pop();
    drop(waiters.remove(0));
    assert!(reserve_now(&mut waiters[0]).is_ready());
    drop((inside, waiters));
    assert!(egress.0.lock().is_idle());
}

#[tokio::test(start_paused = true)]
async fn queued_body_pauses_the_idle_timeout() {
    const TIMEOUT: Duration = Duration::from_secs(60);
    let (egress, idle_pause) = (Egress::default(), IdlePause::default());
    let others = crowd(&egress);
    let file = MemoryFs::new().create(Path::new("blob")).unwrap();
    file.write_at(b"blob", 0).unwrap();
    let mut body = Body::file(file, 0, 4, BufferPool::default(), Telemetry::default());
    body.charge_to(egress.body(None));
    body.pause_idle_timeout_by(&idle_pause);
    let (near, far) = duplex(16);
    let mut stream = IdleTimeoutStream::new(near, TIMEOUT, idle_pause);
    let reading = tokio::spawn(async move { stream.read_u8().await });

    let mut context = Context::from_waker(Waker::noop());
    assert!(Pin::new(&mut body).poll_frame(&mut context).is_pending());
    sleep(TIMEOUT * 10).await;
    assert!(!reading.is_finished());
    drop(others);
    assert!(Pin::new(&mut body).poll_frame(&mut context).is_ready());
    let ended = reading.await.unwrap().unwrap_err();
    assert_eq!(ended.kind(), std::io::ErrorKind::TimedOut);
    drop(far);
}

impl<W> Ledger<W> {
    fn is_idle(&self) -> bool {
        self.bytes() == 0 && self.waiting() == 0
    }
}
