//! Places, the look before the lock, and transfers that nobody waits for.

use super::*;
use crate::queue::NoPlace;

/// As after a start of the process, with so many places.
fn downloads_of(places: usize) -> Downloads {
    let disk = Arc::new(MemoryFs::new()) as Arc<dyn FileSystem>;
    let store = Store::open(&Settings::default(), disk, SystemTime::UNIX_EPOCH).unwrap();
    Downloads::new(Arc::new(store), BufferPool::default(), places)
}

fn part() -> Wish {
    Wish {
        is_whole: false,
        ..wish()
    }
}

fn prefetch() -> Wish {
    Wish {
        demand: Demand::BACKGROUND,
        is_whole: true,
    }
}

fn leader_for(downloads: &Downloads, digest: Digest, wish: Wish) -> Leader {
    match join_as(downloads, digest, wish) {
        Joined::Leader(leader) => leader,
        _ => panic!("nobody leads yet"),
    }
}

async fn until(what: impl Fn() -> bool) {
    while !what() {
        tokio::task::yield_now().await;
    }
}

/// The bad interleaving: a whole transfer comes and goes between the look on the disk and the lock.
#[tokio::test]
async fn t06_transfer_between_look_and_lock_is_found_by_another_look() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    let Found::Look(look) = downloads.look(digest(&blob), &requester(), wish()) else {
        panic!("nobody fetches it")
    };
    assert!(downloads.shared.store.blob(&digest(&blob)).unwrap().is_none());
    script.ending(0, Some(1000), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    assert_eq!(whole(reader).await, blob);
    downloads.idle().await;
    assert!(look.enter(&requester(), wish()).is_none(), "it looks again");
    let joined = downloads.join(digest(&blob), requester(), wish()).await;
    assert!(matches!(joined, Joined::Held(_)));
    assert_eq!(script.asked(), [0]);
    assert!(downloads.shared.running().looking.is_empty());
}

#[tokio::test]
async fn t06_two_that_look_at_once_are_one_transfer() {
    let (downloads, blob) = (downloads(), content(1000));
    let mut looks = Vec::new();
    for _ in 0..2 {
        match downloads.look(digest(&blob), &requester(), wish()) {
            Found::Look(look) => looks.push(look),
            Found::Joined(_) | Found::Ending(_) => panic!("nobody fetches it"),
        }
    }
    let joined: Vec<_> = looks
        .into_iter()
        .map(|look| look.enter(&requester(), wish()).unwrap())
        .collect();
    assert!(matches!(
        joined.as_slice(),
        [Joined::Leader(_), Joined::Follower { .. }]
    ));
}

/// A transfer holds a thread for a step only: with two of them any number of transfers goes on.
#[test]
fn t12_transfers_hold_no_thread_between_their_steps() {
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
async fn t02_a_transfer_waits_for_its_place_without_a_limit() {
    let downloads = downloads_of(1);
    let (first, second) = (content(1000), content(2000));
    let (holding, waiting) = (Script::default(), Script::default());
    let wire = holding.stream(0, Some(1000));
    let _first = leader(&downloads, digest(&first)).start(holding.clone());
    holding.has_asked(1).await;
    waiting.ending(0, Some(2000), &second);
    let reader = leader(&downloads, digest(&second)).start(waiting.clone());
    // Longer than the head of an answer may take.
    tokio::time::sleep(Duration::from_secs(29)).await;
    assert!(reader.is_queued() && waiting.asked().is_empty());
    send(&wire, &first);
    drop(wire);
    assert_eq!(whole(reader).await, second);
}

#[tokio::test]
async fn t08_a_transfer_whose_readers_left_the_queue_asks_nothing() {
    let downloads = downloads_of(1);
    let (first, second) = (content(1000), content(2000));
    let (holding, waiting) = (Script::default(), Script::default());
    let wire = holding.stream(0, Some(1000));
    let held = leader(&downloads, digest(&first)).start(holding.clone());
    holding.has_asked(1).await;
    let reader = leader(&downloads, digest(&second)).start(waiting.clone());
    let other = follower(&downloads, digest(&second));
    until(|| reader.is_queued()).await;
    drop(reader);
    assert_eq!(downloads.count(), 2, "another waits");
    drop(other);
    until(|| downloads.count() == 1).await;
    send(&wire, &first);
    drop(wire);
    assert_eq!(whole(held).await, first);
    assert!(waiting.asked().is_empty());
    assert_eq!(downloads.given_up(), 1);
}

#[tokio::test]
async fn t08_a_small_part_that_was_read_leads_to_no_more() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let leader = leader_for(&downloads, digest(&blob), part());
    let reader = leader.start(script.clone()).within(0, 10);
    send(&wire, &blob[..MIB / 2]);
    assert_eq!(whole(reader).await, blob[..10]);
    send(&wire, &blob[MIB / 2..MIB - 1000]);
    downloads.idle().await;
    assert!(wire.is_closed(), "the transfer has ended");
    assert!(downloads.shared.store.blob(&digest(&blob)).unwrap().is_none());
    let partial = downloads.shared.store.take_partial(&digest(&blob)).unwrap();
    assert!(partial.bytes() > 0, "what came is gone on with");
}

#[tokio::test]
async fn t08_a_part_that_others_follow_is_fetched_whole() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let leader = leader_for(&downloads, digest(&blob), part());
    let reader = leader.start(script.clone()).within(0, 10);
    send(&wire, &blob[..MIB / 2]);
    assert_eq!(whole(reader).await, blob[..10]);
    let reader = follower(&downloads, digest(&blob));
    send(&wire, &blob[MIB / 2..]);
    drop(wire);
    assert_eq!(whole(reader).await, blob);
    assert_eq!(script.asked(), [0]);
}

#[tokio::test(start_paused = true)]
async fn t08_connection_of_an_unwanted_part_is_closed_first() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(MIB));
    let wire = script.stream(0, Some(MIB));
    let leader = leader_for(&downloads, digest(&blob), part());
    let reader = leader.start(script.clone()).within(0, 10);
    send(&wire, &blob[..MIB / 2]);
    assert_eq!(whole(reader).await, blob[..10]);
    wire.closed().await;
    script.ending(0, Some(MIB), &blob);
    // On a busy machine it is given up before that request comes, which then leads.
    let reader = match downloads.join(digest(&blob), requester(), wish()).await {
        Joined::Leader(leader) => leader.start(script.clone()),
        Joined::Follower { reader, .. } => reader,
        Joined::Held(_) => panic!("it has not arrived"),
    };
    assert_eq!(whole(reader).await, blob);
    assert_eq!(script.asked().len(), 2);
}

#[tokio::test]
async fn t08_a_transfer_whose_reader_left_at_once_asks_nothing() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    script.ending(0, Some(1000), &blob);
    drop(leader(&downloads, digest(&blob)).start(script.clone()));
    downloads.idle().await;
    assert!(script.asked().is_empty());
    assert_eq!(downloads.given_up(), 1);
}

/// The bad interleaving: the transfer has ended for want of waiters and is not gone yet when the next one asks.
#[tokio::test]
async fn t08_who_asks_as_a_transfer_is_given_up_leads_the_next() {
    let (downloads, script, blob) = (downloads(), Script::default(), content(1000));
    let ending = leader(&downloads, digest(&blob));
    let Leader { place, waiter } = ending;
    drop(waiter);
    assert!(place.download.waiters.close_unless_client());
    let joining = downloads.join(digest(&blob), requester(), wish());
    let mut joining = std::pin::pin!(joining);
    let early = tokio::time::timeout(Duration::from_millis(20), joining.as_mut()).await;
    assert!(early.is_err(), "nobody follows it");
    drop(place);
    let Joined::Leader(next) = joining.await else {
        panic!("nobody leads any more")
    };
    script.ending(0, Some(1000), &blob);
    assert_eq!(whole(next.start(script)).await, blob);
}

#[tokio::test(start_paused = true)]
async fn t13_prefetch_that_drips_gives_its_place_up() {
    for (joins, survives) in [(false, false), (true, true)] {
        let (downloads, script, blob) = (downloads(), Script::default(), content(8 * MIB));
        let wire = script.stream(0, Some(blob.len()));
        let mut reader = leader_for(&downloads, digest(&blob), prefetch()).start(script.clone());
        let client = joins.then(|| follower(&downloads, digest(&blob)));
        reader.opened().await.unwrap();
        // 16 KiB a second: more than the least for a client, less than that for prefetch. The clock moves on by itself
        // when nothing else is to be done.
        let dripping = async {
            for chunk in blob.chunks(16 * 1024).take(90) {
                let _taken = wire.send(Ok(Bytes::copy_from_slice(chunk)));
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let gave_up = tokio::select! {
            ended = reader.settled() => matches!(*ended.unwrap_err(), Failure::Abandoned),
            () = dripping => false,
        };
        assert_eq!((gave_up, downloads.count() == 1), (!survives, survives));
        drop(client);
    }
}

#[tokio::test]
async fn t02_transfers_that_pass_by_have_their_places_too() {
    let downloads = downloads_of(1);
    let place = downloads.admit("docker.io", wish().demand).await.unwrap();
    let (script, blob) = (Script::default(), content(1000));
    script.ending(0, Some(1000), &blob);
    let reader = leader(&downloads, digest(&blob)).start(script.clone());
    until(|| reader.is_queued()).await;
    drop(place);
    assert_eq!(whole(reader).await, blob);
    let waits = tokio::time::timeout(Duration::ZERO, downloads.admit("ghcr.io", wish().demand));
    assert!(!matches!(waits.await, Ok(Err(NoPlace::Full(_)))));
}
