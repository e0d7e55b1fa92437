//! Queued downloads: permits, the lookup before the lock, and abandoned transfers.

use super::*;
use crate::queue::AcquireError;

/// State after a process start, with this many permits.
fn downloads_of(places: usize) -> Downloads {
    let disk = Arc::new(MemoryFs::new()) as Arc<dyn FileSystem>;
    let store = Store::open(&Settings::default(), disk, SystemTime::UNIX_EPOCH).unwrap();
    Downloads::new(Arc::new(store), BufferPool::default(), places)
}

fn part() -> JoinOptions {
    JoinOptions {
        wants_complete: false,
        ..options()
    }
}

fn prefetch() -> JoinOptions {
    JoinOptions {
        demand: Demand::BACKGROUND,
        wants_complete: true,
    }
}

fn leader_for(downloads: &Downloads, digest: Digest, options: JoinOptions) -> Leader {
    match join_as(downloads, digest, options) {
        Joined::Leader(leader) => leader,
        _ => panic!("no transfer is running yet"),
    }
}

async fn until(what: impl Fn() -> bool) {
    while !what() {
        tokio::task::yield_now().await;
    }
}

/// Race: a transfer begins and ends between the store lookup and the lock.
#[tokio::test]
async fn t06_transfer_between_lookup_and_lock_repeats_the_lookup() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    let JoinStep::Lookup(lookup) = downloads.lookup(digest(&blob), &requester(), options()) else {
        panic!("no transfer is running")
    };
    assert!(downloads.shared.store.blob(&digest(&blob)).unwrap().is_none());
    script.ending(0, Some(1000), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(read_all(reader).await, blob);
    downloads.idle().await;
    assert!(
        lookup.enter(&requester(), options()).is_none(),
        "the lookup is repeated"
    );
    let joined = downloads.join(digest(&blob), requester(), options()).await;
    assert!(matches!(joined, Joined::Cached(_)));
    assert_eq!(script.offsets(), [0]);
    assert!(downloads.shared.running.lock().lookups.is_empty());
}

#[tokio::test]
async fn t06_concurrent_lookups_share_one_transfer() {
    let (downloads, blob) = (downloads(), content(1000));
    let mut looks = Vec::new();
    for _ in 0..2 {
        match downloads.lookup(digest(&blob), &requester(), options()) {
            JoinStep::Lookup(lookup) => looks.push(lookup),
            JoinStep::Joined(_) | JoinStep::Closing(_) => panic!("no transfer is running"),
        }
    }
    let joined: Vec<_> = looks
        .into_iter()
        .map(|lookup| lookup.enter(&requester(), options()).unwrap())
        .collect();
    assert!(matches!(
        joined.as_slice(),
        [Joined::Leader(_), Joined::Follower { .. }]
    ));
}

/// A transfer holds a thread only during a write step, so two threads suffice for any number of transfers.
#[test]
fn t12_transfers_hold_no_thread_between_write_steps() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .build()
        .unwrap();
    runtime.block_on(async {
        let downloads = downloads_of(64);
        let mut all = Vec::new();
        for number in 0..20 {
            let (script, blob) = (Script::default(), content(200_000 + number));
            let wire = script.stream(0, Some(blob.len()));
            let mut reader = leader(&downloads, digest(&blob)).start(script);
            send(&wire, &blob[..150_000]);
            take(&mut reader, 100_000).await;
            all.push((reader, wire, blob));
        }
        tokio::task::spawn_blocking(|| ()).await.unwrap();
        for (mut reader, wire, blob) in all {
            send(&wire, &blob[150_000..]);
            drop(wire);
            while let Some(bytes) = reader.next().await {
                bytes.unwrap();
            }
        }
    });
}

#[tokio::test(start_paused = true)]
async fn t02_queued_transfer_waits_without_a_timeout() {
    let downloads = downloads_of(1);
    let (first, second) = (content(1000), content(2000));
    let (holding, waiting) = (Script::default(), Script::default());
    let wire = holding.stream(0, Some(1000));
    let _first = leader(&downloads, digest(&first)).start(holding.clone());
    holding.was_opened(1).await;
    waiting.ending(0, Some(2000), &second);
    let reader = leader(&downloads, digest(&second)).start(waiting.clone());
    // Longer than the limit for a response head.
    tokio::time::sleep(Duration::from_secs(29)).await;
    assert!(reader.is_queued() && waiting.offsets().is_empty());
    send(&wire, &first);
    drop(wire);
    assert_eq!(read_all(reader).await, second);
}

#[tokio::test]
async fn t08_transfer_abandoned_in_the_queue_sends_no_request() {
    let downloads = downloads_of(1);
    let (first, second) = (content(1000), content(2000));
    let (holding, waiting) = (Script::default(), Script::default());
    let wire = holding.stream(0, Some(1000));
    let held = leader(&downloads, digest(&first)).start(holding.clone());
    holding.was_opened(1).await;
    let reader = leader(&downloads, digest(&second)).start(waiting.clone());
    let other = follower(&downloads, digest(&second));
    until(|| reader.is_queued()).await;
    drop(reader);
    assert_eq!(downloads.count(), 2, "another waits");
    drop(other);
    until(|| downloads.count() == 1).await;
    send(&wire, &first);
    drop(wire);
    assert_eq!(read_all(held).await, first);
    assert!(waiting.offsets().is_empty());
    assert_eq!(downloads.abandoned(), 1);
}

#[tokio::test]
async fn t08_small_range_does_not_fetch_the_complete_blob() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let leader = leader_for(&downloads, digest(&blob), part());
    let reader = leader.start(script.clone()).within(0, 10);
    send(&wire, &blob[..MIB / 2]);
    assert_eq!(read_all(reader).await, blob[..10]);
    send(&wire, &blob[MIB / 2..MIB - 1000]);
    downloads.idle().await;
    assert!(wire.is_closed(), "the transfer has ended");
    assert!(downloads.shared.store.blob(&digest(&blob)).unwrap().is_none());
    let partial = downloads.shared.store.take_partial(&digest(&blob)).unwrap();
    assert!(partial.bytes() > 0, "the partial download is kept");
}

#[tokio::test]
async fn t08_range_with_followers_fetches_the_complete_blob() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let leader = leader_for(&downloads, digest(&blob), part());
    let reader = leader.start(script.clone()).within(0, 10);
    send(&wire, &blob[..MIB / 2]);
    assert_eq!(read_all(reader).await, blob[..10]);
    let reader = follower(&downloads, digest(&blob));
    send(&wire, &blob[MIB / 2..]);
    drop(wire);
    assert_eq!(read_all(reader).await, blob);
    assert_eq!(script.offsets(), [0]);
}

#[tokio::test(start_paused = true)]
async fn t08_abandoned_range_closes_its_connection_first() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let leader = leader_for(&downloads, digest(&blob), part());
    let reader = leader.start(script.clone()).within(0, 10);
    send(&wire, &blob[..MIB / 2]);
    assert_eq!(read_all(reader).await, blob[..10]);
    wire.closed().await;
    script.ending(0, Some(MIB), &blob);
    // On a busy machine the transfer is abandoned before that request arrives, which then leads.
    let reader = match downloads.join(digest(&blob), requester(), options()).await {
        Joined::Leader(leader) => leader.start(script.clone()),
        Joined::Follower { reader, .. } => reader,
        Joined::Cached(_) => panic!("it has not arrived"),
    };
    assert_eq!(read_all(reader).await, blob);
    assert_eq!(script.offsets().len(), 2);
}

#[tokio::test]
async fn t08_transfer_abandoned_at_once_sends_no_request() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.ending(0, Some(1000), &blob);
    drop(leader(&downloads, digest(&blob)).start(script.clone()));
    downloads.idle().await;
    assert!(script.offsets().is_empty());
    assert_eq!(downloads.abandoned(), 1);
}

/// Race: the transfer was abandoned and is still in the map when the next request arrives.
#[tokio::test]
async fn t08_request_during_abandonment_leads_the_next_transfer() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    let ending = leader(&downloads, digest(&blob));
    let Leader { guard, waiter } = ending;
    drop(waiter);
    assert!(guard.download.waiters.close_unless_client());
    let joining = downloads.join(digest(&blob), requester(), options());
    let mut joining = std::pin::pin!(joining);
    let early = tokio::time::timeout(Duration::from_millis(20), joining.as_mut()).await;
    assert!(early.is_err(), "it has no followers");
    drop(guard);
    let Joined::Leader(next) = joining.await else {
        panic!("no transfer is running any more")
    };
    script.ending(0, Some(1000), &blob);
    assert_eq!(read_all(next.start(script)).await, blob);
}

#[tokio::test(start_paused = true)]
async fn t13_slow_prefetch_releases_its_permit() {
    for (joins, survives) in [(false, false), (true, true)] {
        let (downloads, script, blob) = (downloads(), Script::default(), content(8 * MIB));
        let wire = script.stream(0, Some(blob.len()));
        let mut reader = leader_for(&downloads, digest(&blob), prefetch()).start(script.clone());
        let client = joins.then(|| follower(&downloads, digest(&blob)));
        reader.info().await.unwrap();
        // 16 KiB/s: above the minimum for a client, below that for prefetch. The clock advances by itself when
        // nothing else runs.
        let dripping = async {
            for chunk in blob.chunks(16 * 1024).take(90) {
                let _taken = wire.send(Ok(Bytes::copy_from_slice(chunk)));
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let gave_up = tokio::select! {
            ended = reader.settled() => matches!(*ended.unwrap_err(), DownloadError::Abandoned),
            () = dripping => false,
        };
        assert_eq!((gave_up, downloads.count() == 1), (!survives, survives));
        drop(client);
    }
}

#[tokio::test]
async fn t02_unstored_streams_need_permits_too() {
    let downloads = downloads_of(1);
    let place = downloads.admit("docker.io", options().demand).await.unwrap();
    let (script, blob) = (Script::default(), content(1000));
    script.ending(0, Some(1000), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    until(|| reader.is_queued()).await;
    drop(place);
    assert_eq!(read_all(reader).await, blob);
    let waits = tokio::time::timeout(Duration::ZERO, downloads.admit("ghcr.io", options().demand));
    assert!(!matches!(waits.await, Ok(Err(AcquireError::Full(_)))));
}
