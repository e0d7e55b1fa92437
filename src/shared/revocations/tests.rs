//! Tests of the list of denials, over a store and a bucket in memory. Time is paused.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::time::SystemTime;

use tokio::task::{spawn_blocking, yield_now};

use super::*;
use crate::bucket::in_memory;
use crate::shared::record::tests::{Timed, settings};
use crate::shared::{RecordPlace, RecordPrincipal, RecordRead, SharedSettings};
use crate::store::fs::MemoryFs;
use crate::store::{Settings, Store};
use crate::telemetry::Gauges;

/// A store in memory that outlives a process.
async fn store(disk: &Arc<MemoryFs>) -> AsyncStore {
    let disk = Arc::clone(disk);
    let open = move || Store::open(&Settings::default(), disk, SystemTime::UNIX_EPOCH).unwrap();
    AsyncStore::new(Arc::new(spawn_blocking(open).await.unwrap()))
}

async fn files(store: &AsyncStore) -> usize {
    store.write(|store| store.revocations().0.len()).await
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
        for file in &list.files {
            drop(file.lock().await);
        }
    }
}

/// The one bad interleaving: a second denial arrives while the bucket gets the first one.
#[tokio::test(start_paused = true)]
async fn later_denial_keeps_its_place_in_the_list() {
    let (store, list) = list().await;
    let first = list.add(&id(1), Instant::now(), true).await.unwrap();
    let second = list.add(&id(1), Instant::now(), true).await.unwrap();
    list.finish(&id(1), first);
    removed(&list).await;
    assert_eq!((files(&store).await, list.status().unwrap().0), (1, 1));
    list.finish(&id(1), second);
    removed(&list).await;
    assert_eq!((files(&store).await, list.status()), (0, None));
}

#[tokio::test(start_paused = true)]
async fn denial_waits_a_second_at_most_for_the_disk() {
    let (store, list) = list().await;
    let mut files_in_use = Vec::new();
    for file in &list.files {
        files_in_use.push(file.lock().await);
    }
    let began = Instant::now();
    assert_eq!(list.add_soon(&id(1), began, true).await, None);
    assert_eq!(began.elapsed(), Duration::from_secs(1));
    drop(files_in_use);
    removed(&list).await;
    assert_eq!((files(&store).await, list.all().len()), (1, 1), "added later");
}

/// The one bad interleaving: the denial is queued while an earlier update of the record waits for the bucket.
#[tokio::test(start_paused = true)]
async fn update_before_a_denial_does_not_remove_it() {
    let (inner, disk) = (in_memory(), Arc::default());
    let own = store(&disk).await;
    let (bucket, configured) = settings(&inner, "a", "p", Instant::now());
    let shared = shared(&own, (&bucket, configured));
    let active = shared.active.load_full().unwrap();
    let principal = shared.principal(b"basic\0alice").unwrap();
    let place: Arc<str> = Arc::from(PLACE);
    active.conditions.set(true).unwrap();
    bucket.is_silent_for(Duration::from_secs(60));
    within_an_hour(async || {
        read(&shared, &principal).await;
        active.is_stopped()
    })
    .await;
    shared.note_grant((&place, None), &principal, Instant::now());
    // The grant is taken from the queue, and waits until the bucket can be read.
    let updates = &active.records.as_ref().unwrap().updates;
    within_an_hour(async || updates.has_running()).await;
    assert!(active.is_stopped());
    bucket.accepts_writes(1);
    shared
        .revoke_grant((&place, None), &principal, (Instant::now(), true))
        .await;
    within_an_hour(async || bucket.writes() > 1).await;
    removed(&shared.revocations).await;
    assert_eq!(files(&own).await, 1, "the bucket has the grant only");
    bucket.accepts_writes(100);
    within_an_hour(async || shared.status().unwrap().revocations_waiting.is_none()).await;
    assert!(!read(&shared, &principal).await.unwrap().is_granted);
}

#[tokio::test(start_paused = true)]
async fn upstream_that_accepts_any_password_fills_no_bucket() {
    let (bucket, configured) = settings(&in_memory(), "a", "p", Instant::now());
    let shared = shared(&store(&Arc::default()).await, (&bucket, configured));
    shared.active.load_full().unwrap().conditions.set(true).unwrap();
    let place: Arc<str> = Arc::from(PLACE);
    for number in 0..400 {
        let principal = shared.principal(format!("basic\0{number}").as_bytes()).unwrap();
        shared.note_grant((&place, None), &principal, Instant::now());
    }
    shared.drain().await;
    assert!((200..220).contains(&bucket.writes()), "{}", bucket.writes());
}

#[tokio::test(start_paused = true)]
async fn waiting_denial_overrides_the_record_of_another() {
    let (inner, disk, started) = (in_memory(), Arc::default(), Instant::now());
    let (theirs, configured) = settings(&inner, "a", "p", started);
    let other = shared(&store(&Arc::default()).await, (&theirs, configured));
    let principal = other.principal(b"basic\0alice").unwrap();
    let place = Arc::from(PLACE);
    let public = RecordPlace {
        upstream: Arc::clone(&place),
        repository: "team/demo".parse().unwrap(),
    };
    other.note_grant((&place, None), &principal, Instant::now());
    other.note_public(&public, true, Instant::now());
    other.drain().await;
    sleep(Duration::from_secs(60)).await;

    let own = store(&disk).await;
    let (bucket, configured) = settings(&inner, "a", "p", started);
    let first = shared(&own, (&bucket, configured));
    assert!(read(&first, &principal).await.unwrap().is_granted);
    bucket.accepts_writes(0);
    let now = Instant::now();
    first.revoke_grant((&place, None), &principal, (now, true)).await;
    first.revoke_public(&public, now).await;
    let is_public = async |shared: &SharedStorage| {
        sleep(Duration::from_secs(2)).await;
        shared
            .public_record(&public, true)
            .await
            .found()
            .unwrap()
            .state
            .is_public
    };
    assert!(!read(&first, &principal).await.unwrap().is_granted);
    assert!(!is_public(&first).await);
    assert!(is_public(&other).await && read(&other, &principal).await.unwrap().is_granted);

    // After a restart that may write nothing.
    first.configure(None);
    drop((first, own));
    let (again, mut configured) = settings(&inner, "a", "p", started);
    configured.write = false;
    let born = shared(&store(&disk).await, (&again, configured));
    assert!(!read(&born, &principal).await.unwrap().is_granted);
    assert!(!is_public(&born).await);
    // Granted again later, at another cache.
    sleep(Duration::from_secs(7200)).await;
    other.note_grant((&place, None), &principal, Instant::now());
    other.drain().await;
    assert!(read(&born, &principal).await.unwrap().is_granted);
}

#[tokio::test(start_paused = true)]
async fn known_denial_creates_a_record_against_a_late_grant() {
    let (inner, started) = (in_memory(), Instant::now());
    let [first, other] = [(), ()].map(|()| settings(&inner, "a", "p", started));
    let first = shared(&store(&Arc::default()).await, (&first.0, first.1));
    let other = shared(&store(&Arc::default()).await, (&other.0, other.1));
    let principal = first.principal(b"basic\0alice").unwrap();
    let place = Arc::from(PLACE);
    let early = Instant::now();
    sleep(Duration::from_secs(60)).await;
    let denied = (Instant::now(), true);
    first.revoke_grant((&place, None), &principal, denied).await;
    sleep(Duration::from_secs(60)).await;
    other.note_grant((&place, None), &principal, early);
    other.drain().await;
    assert!(!read(&other, &principal).await.unwrap().is_granted);
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
    assert_eq!(unlisted(&list), [r#"reason="full-unknown"} 1"#]);
}

/// The list of known denials is full. The entry stays one of an unknown client, with the later time.
#[tokio::test(start_paused = true)]
async fn denial_that_cannot_become_known_raises_the_time() {
    let (_, list) = list().await;
    for number in 0..KNOWN_MAX {
        assert!(list.add(&id(number), Instant::now(), true).await.is_some());
    }
    let unknown = id(KNOWN_MAX);
    let number = list.add(&unknown, Instant::now(), false).await.unwrap();
    sleep(Duration::from_secs(10)).await;
    let now = Instant::now();
    assert_eq!(list.add(&unknown, now, true).await, None);
    assert_eq!(list.waits_since(&unknown), Some(now));
    list.finish(&unknown, number);
    assert_eq!(
        list.waits_since(&unknown),
        Some(now),
        "the bucket has the earlier one"
    );
}

/// The counts of denials that wait in memory only, by reason.
fn unlisted(list: &Revocations) -> Vec<String> {
    let text = list.telemetry.prometheus_text(&Gauges::default());
    let counts = text.lines().filter_map(|line| {
        let labels = line.strip_prefix("ifnewer_shared_revocations_unlisted_total{")?;
        (!labels.ends_with("} 0")).then(|| labels.to_owned())
    });
    counts.collect()
}

#[tokio::test(start_paused = true)]
async fn denial_that_is_not_on_the_disk_is_counted() {
    let disk = Arc::default();
    let list = Revocations::new(store(&disk).await, Telemetry::new());
    assert!(list.add(&id(0), Instant::now(), true).await.is_some());
    assert_eq!(unlisted(&list), Vec::<String>::new());
    disk.set_bytes_max(0);
    assert_eq!(list.add(&id(1), Instant::now(), true).await, None);
    assert_eq!(unlisted(&list), [r#"reason="disk"} 1"#]);
    disk.set_bytes_max(u64::MAX);
    for number in 1..KNOWN_MAX {
        assert!(list.add(&id(number), Instant::now(), true).await.is_some());
    }
    assert_eq!(list.add(&id(KNOWN_MAX), Instant::now(), true).await, None);
    let mut counts = unlisted(&list);
    counts.sort();
    assert_eq!(counts, [r#"reason="disk"} 1"#, r#"reason="full"} 1"#]);
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
