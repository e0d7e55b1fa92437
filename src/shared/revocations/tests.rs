//! Tests of the list of denials, over a store and a bucket in memory. Time is paused.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::time::SystemTime;

use tokio::task::{spawn_blocking, yield_now};

use super::*;
use crate::bucket::in_memory;
use crate::shared::record::tests::{Timed, settings};
use crate::shared::{RecordPrincipal, RecordRead, SharedSettings};
use crate::store::fs::MemoryFs;
use crate::store::{Settings, Store};

/// A store in memory that outlives a process.
async fn store(disk: &Arc<MemoryFs>) -> AsyncStore {
    let disk = Arc::clone(disk);
    let open = move || Store::open(&Settings::default(), disk, SystemTime::UNIX_EPOCH).unwrap();
    AsyncStore::new(Arc::new(spawn_blocking(open).await.unwrap()))
}

async fn files(store: &AsyncStore) -> usize {
    store.write(|store| store.revocations().len()).await
}

fn id(number: usize) -> RecordId {
    RecordId {
        class: Class::Grant,
        upstream: "https://registry".into(),
        repository: "team/demo".parse().ok(),
        item: format!("key:{number}").into(),
    }
}

async fn list() -> (AsyncStore, Arc<Revocations>) {
    let store = store(&Arc::default()).await;
    let list = Revocations::new(store.clone(), Telemetry::new());
    (store, Arc::new(list))
}

/// Waits until removals in the background have had their turn.
async fn removed(list: &Revocations) {
    for _ in 0..10 {
        yield_now().await;
        drop(list.files.lock().await);
    }
}

/// The one bad interleaving: a second denial arrives while the bucket gets the first one.
#[tokio::test(start_paused = true)]
async fn later_denial_keeps_its_place_in_the_list() {
    let (store, list) = list().await;
    let first = list.add(&id(1), Instant::now(), true).await.unwrap();
    list.queued(&id(1), first);
    let taken = list.taken(&id(1)).unwrap();
    let second = list.add(&id(1), Instant::now(), true).await.unwrap();
    list.finish(&id(1), taken);
    removed(&list).await;
    assert_eq!((files(&store).await, list.status().unwrap().0), (1, 1));
    list.queued(&id(1), second);
    let taken = list.taken(&id(1)).unwrap();
    list.finish(&id(1), taken);
    removed(&list).await;
    assert_eq!((files(&store).await, list.status()), (0, None));
}

#[tokio::test(start_paused = true)]
async fn denial_that_is_not_queued_stays_in_the_list() {
    let (store, list) = list().await;
    list.add(&id(1), Instant::now(), true).await.unwrap();
    // An earlier update of the record ends.
    let taken = list.taken(&id(1)).unwrap();
    list.finish(&id(1), taken);
    removed(&list).await;
    assert_eq!(files(&store).await, 1);
}

#[tokio::test(start_paused = true)]
async fn guessed_passwords_fill_no_list_of_denials() {
    let (store, list) = list().await;
    for number in 0..UNKNOWN_MAX {
        assert!(list.add(&id(number), Instant::now(), false).await.is_some());
    }
    assert_eq!(list.add(&id(UNKNOWN_MAX), Instant::now(), false).await, None);
    assert!(list.add(&id(UNKNOWN_MAX), Instant::now(), true).await.is_some());
    assert_eq!(files(&store).await, UNKNOWN_MAX + 1);
}

/// The shared storage of one process.
fn shared(store: &AsyncStore, bucket: (&Arc<Timed>, SharedSettings)) -> SharedStorage {
    let shared = SharedStorage::new(store.clone(), Telemetry::new());
    shared.configure(Some(bucket.1));
    shared
}

const PLACE: &str = "https://registry";

async fn read(shared: &SharedStorage, principal: &RecordPrincipal) -> Option<GrantState> {
    // The result of an earlier read counts for a second.
    sleep(Duration::from_secs(2)).await;
    let place = (&Arc::from(PLACE), None);
    let found = shared.grant_record(place, principal, true).await.found()?;
    Some(found.state)
}

#[tokio::test(start_paused = true)]
async fn denial_waits_in_the_list_for_a_silent_bucket() {
    let (inner, started) = (in_memory(), Instant::now());
    let disk = Arc::default();
    let own = store(&disk).await;
    let (bucket, configured) = settings(&inner, "a", "p", started);
    let first = shared(&own, (&bucket, configured));
    let principal = first.principal(b"basic\0alice").unwrap();
    let place = Arc::from(PLACE);
    first.note_grant((&place, None), &principal, Instant::now());
    first.drain().await;
    let (theirs, configured) = settings(&inner, "a", "p", started);
    let other = shared(&store(&Arc::default()).await, (&theirs, configured));
    assert!(read(&other, &principal).await.unwrap().is_granted);

    bucket.is_silent_for(Duration::from_secs(600));
    let began = Instant::now();
    first
        .revoke_grant((&place, None), &principal, (began, true))
        .await;
    assert!(began.elapsed() <= Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(first.status().unwrap().revocations_waiting.unwrap().0, 1);
    assert!(read(&other, &principal).await.unwrap().is_granted);

    // The process ends, and another one starts over its disk.
    first.configure(None);
    drop((first, own));
    sleep(Duration::from_secs(120)).await;
    let (_, configured) = settings(&inner, "a", "p", started);
    let own = store(&disk).await;
    assert_eq!(files(&own).await, 1);
    let again = shared(&own, (&bucket, configured));
    within_an_hour(async || !read(&other, &principal).await.unwrap().is_granted).await;
    within_an_hour(async || again.status().unwrap().revocations_waiting.is_none()).await;
    assert_eq!(files(&own).await, 0);
}

async fn within_an_hour(is_reached: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !is_reached().await {
        assert!(began.elapsed() < Duration::from_secs(3600));
        sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn unknown_principals_use_up_no_reads_of_known_ones() {
    let (inner, started) = (in_memory(), Instant::now());
    let (bucket, configured) = settings(&inner, "a", "p", started);
    let shared = shared(&store(&Arc::default()).await, (&bucket, configured));
    let place = Arc::from(PLACE);
    let read = async |number: usize, is_known| {
        let principal = shared.principal(format!("basic\0{number}").as_bytes()).unwrap();
        shared.grant_record((&place, None), &principal, is_known).await
    };
    let mut number = 0;
    while read(number, false).await == RecordRead::Absent {
        number += 1;
    }
    let capped = RecordRead::Unread { is_capped: true };
    assert_eq!(read(number, false).await, capped);
    assert_eq!(read(number + 1, true).await, RecordRead::Absent);
}
