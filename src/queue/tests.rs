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
    Waiters::alone(demand(id, Class::Interactive))
}

fn group() -> Arc<str> {
    "registry.example".into()
}

#[tokio::test]
async fn t08_a_wait_that_is_dropped_leaves_the_queue_at_once() {
    let queue = Queue::new("test", 1);
    let (first, _stays) = alone(1);
    let place = queue.acquire(&group(), &first).await.unwrap();
    let (second, _stays) = alone(2);
    let group = group();
    {
        let mut waits = pin!(queue.acquire(&group, &second));
        assert!(poll(waits.as_mut()).await.is_pending());
        assert_eq!((queue.in_use(), queue.waiting()), (1, 1));
    }
    assert_eq!(queue.waiting(), 0);
    drop(place);
    assert_eq!(queue.in_use(), 0);
}

/// The bad interleaving: the place is granted, and the one it is for is dropped before it takes it.
#[tokio::test]
async fn t08_a_place_granted_to_a_dropped_wait_is_given_on() {
    let queue = Queue::new("test", 1);
    let (first, _stays) = alone(1);
    let place = queue.acquire(&group(), &first).await.unwrap();
    let ((second, _s), (third, _t)) = (alone(2), alone(3));
    let group = group();
    let mut third_waits = pin!(queue.acquire(&group, &third));
    {
        let mut second_waits = pin!(queue.acquire(&group, &second));
        assert!(poll(second_waits.as_mut()).await.is_pending());
        assert!(poll(third_waits.as_mut()).await.is_pending());
        drop(place);
    }
    let place = third_waits.await.unwrap();
    assert_eq!(queue.in_use(), 1);
    drop(place);
    assert_eq!(queue.in_use(), 0);
}

#[tokio::test(start_paused = true)]
async fn t08_queued_work_ends_with_the_last_that_waits() {
    let queue = Queue::new("test", 0);
    let (waiters, one) = alone(1);
    let other = waiters.join(demand(2, Class::Bulk));
    let group = group();
    let mut work = pin!(waiters.while_wanted(queue.acquire(&group, &waiters)));
    assert!(poll(work.as_mut()).await.is_pending());
    assert_eq!(queue.waiting(), 2);
    drop(one);
    assert!(poll(work.as_mut()).await.is_pending());
    assert_eq!(queue.waiting(), 1);
    let before = Instant::now();
    drop(other);
    assert!(
        waiters.join(demand(3, Class::Held)).is_none(),
        "it is over at once"
    );
    assert!(work.await.is_none());
    assert_eq!((queue.waiting(), before.elapsed()), (0, Duration::ZERO));
    assert_eq!(queue.counts().abandoned, 1);
}

#[tokio::test(start_paused = true)]
async fn t08_work_that_was_sent_goes_on_for_a_second_without_a_client() {
    let (waiters, waiter) = alone(1);
    let mut work = pin!(waiters.while_wanted(std::future::pending::<()>()));
    assert!(poll(work.as_mut()).await.is_pending());
    drop(waiter);
    tokio::time::sleep(ABANDONED_WITHIN / 2).await;
    assert!(poll(work.as_mut()).await.is_pending());
    // Another asks in time, and leaves.
    drop(waiters.join(demand(2, Class::Held)));
    tokio::time::sleep(ABANDONED_WITHIN * 3 / 4).await;
    assert!(poll(work.as_mut()).await.is_pending());
    assert_eq!(work.await, None);
    assert!(waiters.join(demand(3, Class::Held)).is_none(), "it has ended");
}

/// Who has a cached copy and no more patience: the late answer still has its effects, unless it was not asked for yet.
#[tokio::test(start_paused = true)]
async fn t08_work_without_its_patient_goes_on_once_it_has_begun() {
    let queue = Queue::new("test", 1);
    let group = group();
    let (waiters, waiter) = alone(1);
    let _place = queue.acquire(&group, &waiters).await.unwrap();
    {
        let mut work = pin!(waiters.while_wanted(std::future::pending::<()>()));
        assert!(poll(work.as_mut()).await.is_pending());
        waiters.detach();
        drop(waiter);
        tokio::time::sleep(100 * ABANDONED_WITHIN).await;
        assert!(poll(work.as_mut()).await.is_pending());
    }
    let (queued, waiter) = alone(2);
    let mut work = pin!(queued.while_wanted(queue.acquire(&group, &queued)));
    assert!(poll(work.as_mut()).await.is_pending());
    queued.detach();
    drop(waiter);
    assert!(work.await.is_none());
}

#[tokio::test]
async fn t08_work_whose_last_left_before_it_began_is_not_queued() {
    let queue = Queue::new("test", 1);
    let (waiters, waiter) = alone(1);
    drop(waiter);
    let refused = queue.acquire(&group(), &waiters).await;
    assert_eq!(refused.unwrap_err(), NoPlace::Abandoned);
    assert!(waiters.join(demand(2, Class::Held)).is_none());
}

#[tokio::test]
async fn t08_place_granted_as_the_last_leaves_is_given_back() {
    let queue = Queue::new("test", 0);
    let group = group();
    let (waiters, waiter) = alone(1);
    let mut work = pin!(queue.acquire(&group, &waiters));
    assert!(poll(work.as_mut()).await.is_pending());
    queue.resize(1);
    drop(waiter);
    assert_eq!(work.await.unwrap_err(), NoPlace::Abandoned);
    assert_eq!(queue.in_use(), 0);
}

#[tokio::test]
async fn t08_who_made_room_in_shared_work_is_told_that_it_is_full() {
    let queue = Queue::new("test", 0);
    let group = group();
    let (shared, _of_many) = alone(1);
    let other = shared.join(demand(2, Class::Interactive));
    let mut work = pin!(queue.acquire(&group, &shared));
    assert!(poll(work.as_mut()).await.is_pending());
    // The newest of the client that has the most makes room.
    let state = shared.entry_of(demand(1, Class::Interactive)).unwrap();
    queue.0.leave(state);
    drop(other);
    assert!(matches!(work.await, Err(NoPlace::Full(full)) if !full.is_clients_own));
}

#[tokio::test]
async fn t02_beyond_the_bound_of_a_client_the_answer_comes_at_once() {
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
    let NoPlace::Full(full) = queue.acquire(&group, &waiters).await.unwrap_err() else {
        unreachable!("the client is there")
    };
    assert!(full.is_clients_own && full.retry_after >= Duration::from_secs(1));
    let (others, _stays) = alone(2);
    let mut other = pin!(queue.acquire(&group, &others));
    assert!(
        poll(other.as_mut()).await.is_pending(),
        "another client has its own bound"
    );
    assert_eq!(queue.waiting(), WAITING_PER_PEER_MAX + 1);
    // With a place free nobody is refused, however many wait for others.
    queue.resize(1);
    assert_eq!(queue.in_use(), 1);
}

#[tokio::test]
async fn t02_a_burst_of_ten_jobs_of_forty_layers_meets_no_bound() {
    let queue = Queue::new("test", 1);
    let group = group();
    let burst: Vec<_> = (0..400).map(|_| alone(1)).collect();
    let mut waits = tokio::task::JoinSet::new();
    for (waiters, waiter) in burst {
        let (queue, group) = (queue.clone(), Arc::clone(&group));
        waits.spawn(async move {
            let place = queue.acquire(&group, &waiters).await.unwrap();
            tokio::task::yield_now().await;
            drop((place, waiter));
        });
    }
    waits.join_all().await;
    assert_eq!(queue.counts().granted, 400);
    assert_eq!((queue.in_use(), queue.waiting()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn t08_work_of_which_a_part_was_wanted_waits_a_little_and_ends() {
    let (waiters, waiter) = alone(1);
    drop(waiter);
    assert!(waiters.is_unwanted());
    assert!(!waiters.wanted_within(Duration::from_secs(2)).await);
    assert!(waiters.join(demand(1, Class::Bulk)).is_none());

    let (waiters, waiter) = alone(1);
    waiters.want_whole();
    drop(waiter);
    assert!(!waiters.is_unwanted());
    assert!(waiters.wanted_within(Duration::ZERO).await);
}

#[tokio::test]
async fn t13_a_client_that_joins_prefetch_keeps_it() {
    let (waiters, _prefetch) = Waiters::alone(Demand::BACKGROUND);
    let client = waiters.join(demand(1, Class::Bulk));
    assert!(!waiters.close_unless_client());
    drop(client);
    assert!(waiters.close_unless_client());
    assert!(waiters.join(demand(1, Class::Bulk)).is_none());
}
