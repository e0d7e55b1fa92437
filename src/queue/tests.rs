#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::net::{IpAddr, Ipv4Addr};
use std::pin::{Pin, pin};
use std::task::Poll;

use super::*;

/// Polls once.
async fn poll<F: Future>(mut work: Pin<&mut F>) -> Poll<F::Output> {
    std::future::poll_fn(|context| Poll::Ready(work.as_mut().poll(context))).await
}

fn demand(id: u8, class: Class) -> Demand {
    Demand {
        peer: Peer::Address(IpAddr::V4(Ipv4Addr::new(192, 0, 2, id))),
        flow: 0,
        class,
    }
}

fn alone(id: u8) -> (Waiters, Option<Waiter>) {
    Waiters::with(demand(id, Class::Interactive))
}

fn group() -> Arc<str> {
    "registry.example".into()
}

#[tokio::test]
async fn t08_dropped_wait_leaves_the_queue_at_once() {
    let queue = Queue::new("test", 1);
    let (first, _stays) = alone(1);
    let permit = queue.acquire(&group(), &first).await.unwrap();
    let (second, _stays) = alone(2);
    let group = group();
    {
        let mut waits = pin!(queue.acquire(&group, &second));
        assert!(poll(waits.as_mut()).await.is_pending());
        assert_eq!((queue.in_use(), queue.waiting()), (1, 1));
    }
    assert_eq!(queue.waiting(), 0);
    drop(permit);
    assert_eq!(queue.in_use(), 0);
}

/// Race: the permit is granted, and its receiver is dropped before it takes the permit.
#[tokio::test]
async fn t08_permit_granted_to_a_dropped_wait_is_passed_on() {
    let queue = Queue::new("test", 1);
    let (first, _stays) = alone(1);
    let permit = queue.acquire(&group(), &first).await.unwrap();
    let ((second, _s), (third, _t)) = (alone(2), alone(3));
    let group = group();
    let mut third_waits = pin!(queue.acquire(&group, &third));
    {
        let mut second_waits = pin!(queue.acquire(&group, &second));
        assert!(poll(second_waits.as_mut()).await.is_pending());
        assert!(poll(third_waits.as_mut()).await.is_pending());
        drop(permit);
    }
    let permit = third_waits.await.unwrap();
    assert_eq!(queue.in_use(), 1);
    drop(permit);
    assert_eq!(queue.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn t08_queued_work_ends_with_its_last_waiter() {
    let queue = Queue::new("test", 0);
    let (waiters, one) = alone(1);
    let other = waiters.join(demand(2, Class::Bulk));
    let group = group();
    let mut work = pin!(waiters.while_waited_for(queue.acquire(&group, &waiters)));
    assert!(poll(work.as_mut()).await.is_pending());
    assert_eq!(queue.waiting(), 2);
    drop(one);
    assert!(poll(work.as_mut()).await.is_pending());
    assert_eq!(queue.waiting(), 1);
    let before = Instant::now();
    drop(other);
    assert!(
        waiters.join(demand(3, Class::Revalidation)).is_none(),
        "it ends at once"
    );
    assert!(work.await.is_none());
    assert_eq!((queue.waiting(), before.elapsed()), (0, Duration::ZERO));
    assert_eq!(queue.counts().abandoned, 1);
}

#[tokio::test(start_paused = true)]
async fn t08_sent_request_continues_for_the_abandon_grace() {
    let (waiters, waiter) = alone(1);
    let mut work = pin!(waiters.while_waited_for(std::future::pending::<()>()));
    assert!(poll(work.as_mut()).await.is_pending());
    drop(waiter);
    tokio::time::sleep(ABANDON_GRACE / 2).await;
    assert!(poll(work.as_mut()).await.is_pending());
    // Another request joins in time, and leaves.
    drop(waiters.join(demand(2, Class::Revalidation)));
    tokio::time::sleep(ABANDON_GRACE * 3 / 4).await;
    assert!(poll(work.as_mut()).await.is_pending());
    assert_eq!(work.await, None);
    assert!(
        waiters.join(demand(3, Class::Revalidation)).is_none(),
        "it has ended"
    );
}

/// A client with a cached copy whose revalidation timed out: the late response still takes effect, unless the
/// request was not sent yet.
#[tokio::test(start_paused = true)]
async fn t08_detached_work_continues_once_begun() {
    let queue = Queue::new("test", 1);
    let group = group();
    let (waiters, waiter) = alone(1);
    let _place = queue.acquire(&group, &waiters).await.unwrap();
    {
        let mut work = pin!(waiters.while_waited_for(std::future::pending::<()>()));
        assert!(poll(work.as_mut()).await.is_pending());
        waiters.detach();
        drop(waiter);
        tokio::time::sleep(100 * ABANDON_GRACE).await;
        assert!(poll(work.as_mut()).await.is_pending());
    }
    let (queued, waiter) = alone(2);
    let mut work = pin!(queued.while_waited_for(queue.acquire(&group, &queued)));
    assert!(poll(work.as_mut()).await.is_pending());
    queued.detach();
    drop(waiter);
    assert!(work.await.is_none());
}

#[tokio::test]
async fn t08_work_abandoned_before_its_start_is_not_queued() {
    let queue = Queue::new("test", 1);
    let (waiters, waiter) = alone(1);
    drop(waiter);
    let refused = queue.acquire(&group(), &waiters).await;
    assert_eq!(refused.unwrap_err(), AcquireError::Abandoned);
    assert!(waiters.join(demand(2, Class::Revalidation)).is_none());
}

#[tokio::test]
async fn t08_permit_granted_as_the_last_leaves_is_released() {
    let queue = Queue::new("test", 0);
    let group = group();
    let (waiters, waiter) = alone(1);
    let mut work = pin!(queue.acquire(&group, &waiters));
    assert!(poll(work.as_mut()).await.is_pending());
    queue.resize(1);
    drop(waiter);
    assert_eq!(work.await.unwrap_err(), AcquireError::Abandoned);
    assert_eq!(queue.in_use(), 0);
}

#[tokio::test]
async fn t08_entry_over_the_limit_in_shared_work_gets_queue_full() {
    let queue = Queue::new("test", 0);
    let group = group();
    let (shared, _of_many) = alone(1);
    let other = shared.join(demand(2, Class::Interactive));
    let mut work = pin!(queue.acquire(&group, &shared));
    assert!(poll(work.as_mut()).await.is_pending());
    // The newest entry of the client with the most entries is removed.
    let state = shared.entry_of(demand(1, Class::Interactive)).unwrap();
    queue.0.leave(state);
    drop(other);
    assert!(matches!(work.await, Err(AcquireError::Full(full)) if !full.is_client_limit));
}

#[tokio::test]
async fn t02_client_over_its_limit_is_denied_at_once() {
    let queue = Queue::new("test", 0);
    let group = group();
    let crowd: Vec<_> = (0..WAITING_PER_PEER_MAX).map(|_| alone(1)).collect();
    let mut waits: Vec<_> = crowd
        .iter()
        .map(|(waiters, _)| Box::pin(queue.acquire(&group, waiters)))
        .collect();
    for wait in &mut waits {
        assert!(poll(wait.as_mut()).await.is_pending());
    }
    let (waiters, _stays) = alone(1);
    let AcquireError::Full(full) = queue.acquire(&group, &waiters).await.unwrap_err() else {
        unreachable!("the client is there")
    };
    assert!(full.is_client_limit && full.retry_after >= Duration::from_secs(1));
    let (others, _stays) = alone(2);
    let mut other = pin!(queue.acquire(&group, &others));
    assert!(
        poll(other.as_mut()).await.is_pending(),
        "another client has its own limit"
    );
    assert_eq!(queue.waiting(), WAITING_PER_PEER_MAX + 1);
    // With a free permit no request is denied, however many wait for others.
    queue.resize(1);
    assert_eq!(queue.in_use(), 1);
}

#[tokio::test]
async fn t02_burst_of_ten_jobs_of_forty_layers_hits_no_limit() {
    let queue = Queue::new("test", 1);
    let group = group();
    let burst: Vec<_> = (0..400).map(|_| alone(1)).collect();
    let mut waits = tokio::task::JoinSet::new();
    for (waiters, waiter) in burst {
        let (queue, group) = (queue.clone(), Arc::clone(&group));
        waits.spawn(async move {
            let permit = queue.acquire(&group, &waiters).await.unwrap();
            tokio::task::yield_now().await;
            drop((permit, waiter));
        });
    }
    waits.join_all().await;
    assert_eq!(queue.counts().granted, 400);
    assert_eq!((queue.in_use(), queue.waiting()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn t08_range_only_work_waits_briefly_and_ends() {
    let (waiters, waiter) = alone(1);
    drop(waiter);
    assert!(waiters.is_abandoned());
    assert!(!waiters.rejoined_or_closed_within(Duration::from_secs(2)).await);
    assert!(waiters.join(demand(1, Class::Bulk)).is_none());

    let (waiters, waiter) = alone(1);
    waiters.want_complete();
    drop(waiter);
    assert!(!waiters.is_abandoned());
    assert!(waiters.rejoined_or_closed_within(Duration::ZERO).await);
}

#[tokio::test]
async fn t13_client_that_joins_prefetch_keeps_it_running() {
    let (waiters, _prefetch) = Waiters::with(Demand::BACKGROUND);
    let client = waiters.join(demand(1, Class::Bulk));
    assert!(!waiters.close_unless_client());
    drop(client);
    assert!(waiters.close_unless_client());
    assert!(waiters.join(demand(1, Class::Bulk)).is_none());
}

#[tokio::test]
async fn client_that_joins_queued_prefetch_starts_it_at_once() {
    let (queue, group) = (Queue::new("test", 8), group());
    // Background work may have one of the eight permits.
    let (running, _waiter) = Waiters::with(Demand::BACKGROUND);
    let _permit = queue.acquire(&group, &running).await.unwrap();
    let (prefetch, _waiter) = Waiters::with(Demand::BACKGROUND);
    let mut work = pin!(queue.acquire(&group, &prefetch));
    assert!(poll(work.as_mut()).await.is_pending());
    let _client = prefetch.join(demand(1, Class::Bulk));
    assert!(matches!(poll(work.as_mut()).await, Poll::Ready(Ok(_))));
}

#[tokio::test]
async fn work_that_does_not_wait_gets_only_spare_permits() {
    let (queue, group) = (Queue::new("test", 1), group());
    let permit = queue.try_acquire(&group, Class::Bulk).unwrap();
    assert!(queue.try_acquire(&group, Class::Bulk).is_none());
    assert_eq!((queue.in_use(), queue.waiting()), (1, 0));
    let (waiters, _waiter) = alone(1);
    let mut waits = pin!(queue.acquire(&group, &waiters));
    assert!(poll(waits.as_mut()).await.is_pending());
    drop(permit);
    assert!(queue.try_acquire(&group, Class::Bulk).is_none());
    drop(waits.await.unwrap());
    assert!(queue.try_acquire(&group, Class::Bulk).is_some());
    assert_eq!(queue.counts().abandoned, 0);
}
