//! Tests of inventory and garbage collection, over a scripted bucket whose objects have given ages. Time is paused.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::bucket::over::{Memory, Over};
use crate::bucket::{BucketFuture, Listed, Listing, ListingNext, ObjectInfo, ObjectKey, ObjectStorage};
use crate::oci::{Algorithm, Digest, UpstreamFailure};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

/// Time at the storage, in seconds since 1970.
const NOW: u64 = 100_000 * HOUR;

const SILENT: BucketError = BucketError::Silent(UpstreamFailure::Timeout);

/// The names in a listing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Order {
    #[default]
    Right,
    /// The listing begins again and again.
    Repeated,
    /// It begins at the first object, whatever was requested.
    IgnoresOffset,
    /// Names are listed twice, as those of an object and of a marker of a folder.
    WithMarkers,
}

/// A bucket of which objects are listed and deleted.
#[derive(Default)]
struct Scripted {
    /// Size and age in seconds.
    objects: Mutex<BTreeMap<String, (u64, Option<u64>)>>,
    /// After so many objects, a listing fails with this error. For each listing.
    listings: Mutex<VecDeque<(usize, BucketError)>>,
    order: Order,
    /// Results of the next deletions.
    deletions: Mutex<VecDeque<BucketError>>,
    /// Deletions are never answered.
    is_deaf: bool,
    /// Time from a deletion to its response.
    deletion_time: Duration,
    /// Objects that are written or deleted after they were listed: their ages then.
    later: Mutex<BTreeMap<String, Option<u64>>>,
    /// Seconds by which each `Date` is ahead.
    ahead: u64,
    /// Objects that were written.
    written: Mutex<Vec<String>>,
    /// Objects that no test lists.
    others: Memory,
}

impl Scripted {
    fn with(objects: &[(&str, u64, u64)]) -> Arc<Self> {
        let objects = objects
            .iter()
            .map(|(name, size, age)| ((*name).to_owned(), (*size, Some(*age))));
        Arc::new(Self {
            objects: Mutex::new(objects.collect()),
            ..Self::default()
        })
    }

    fn names(&self) -> Vec<String> {
        self.objects.lock().keys().cloned().collect()
    }
}

struct Page {
    objects: VecDeque<Listed>,
    again: Option<VecDeque<Listed>>,
    failure: Option<(usize, BucketError)>,
}

impl Listing for Page {
    fn next(&mut self) -> ListingNext<'_> {
        if let Some((left, error)) = &mut self.failure {
            if *left == 0 {
                let error = error.clone();
                return Box::pin(async { Some(Err(error)) });
            }
            *left -= 1;
        }
        if let (true, Some(again)) = (self.objects.is_empty(), &self.again) {
            self.objects = again.clone();
        }
        let next = self.objects.pop_front().map(Ok);
        Box::pin(async { next })
    }
}

impl Over for Scripted {
    fn inner(&self) -> &dyn ObjectStorage {
        &*self.others
    }

    fn head<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ObjectInfo> {
        Box::pin(async move {
            let listed = self.objects.lock().get(key.as_str()).copied();
            let (size, age) = listed.ok_or(BucketError::Absent)?;
            let age = match self.later.lock().get(key.as_str()) {
                Some(later) => Some((*later).ok_or(BucketError::Absent)?),
                None => age,
            };
            Ok(ObjectInfo {
                size,
                etag: None,
                age: age.map(|age| Duration::from_secs(age + self.ahead)),
                media_type: None,
            })
        })
    }

    fn put<'a>(&'a self, key: &'a ObjectKey, bytes: Bytes, _: Option<&'a str>) -> BucketFuture<'a, ()> {
        Box::pin(async move {
            let name = key.as_str().to_owned();
            self.written.lock().push(name.clone());
            self.objects.lock().insert(name, (bytes.len() as u64, Some(0)));
            Ok(())
        })
    }

    fn delete<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ()> {
        Box::pin(async move {
            let is_probe = self.written.lock().contains(&key.as_str().to_owned());
            if self.is_deaf && !is_probe {
                std::future::pending::<()>().await;
            }
            if !is_probe && let Some(error) = self.deletions.lock().pop_front() {
                return Err(error);
            }
            self.objects.lock().remove(key.as_str());
            if !is_probe {
                tokio::time::sleep(self.deletion_time).await;
            }
            Ok(())
        })
    }

    fn list(&self, folder: &str, after: Option<&ObjectKey>) -> Box<dyn Listing> {
        let objects = self.objects.lock();
        let listed = objects
            .iter()
            .filter(|(name, _)| name.starts_with(&format!("{folder}/")))
            .filter(|(name, _)| {
                self.order == Order::IgnoresOffset || after.is_none_or(|after| name.as_str() > after.as_str())
            })
            .map(|(name, (size, age))| Listed {
                key: ObjectKey::listed(name).unwrap(),
                size: *size,
                age: age.map(|age| Duration::from_secs(age + self.ahead)),
                date: Some(UNIX_EPOCH + Duration::from_secs(NOW)),
            });
        let times = 1 + usize::from(self.order == Order::WithMarkers);
        let objects: VecDeque<_> = listed
            .flat_map(|listed| std::iter::repeat_n(listed, times))
            .collect();
        Box::new(Page {
            again: (self.order == Order::Repeated).then(|| objects.clone()),
            objects,
            failure: self.listings.lock().pop_front(),
        })
    }
}

fn digest(number: u64) -> Digest {
    Digest::of(Algorithm::Sha256, &number.to_be_bytes())
}

fn blob(number: u64) -> String {
    ObjectKey::blob(&digest(number)).as_str().to_owned()
}

fn record(class: &str, number: u64) -> String {
    let Digest::Sha256(name) = digest(number) else {
        return String::new();
    };
    ObjectKey::record(class, &name).as_str().to_owned()
}

/// Objects of every kind, of this age in seconds.
fn of_every_kind(age: u64) -> Vec<(String, u64, u64)> {
    let names = [
        blob(1),
        ObjectKey::manifest(&digest(2)).as_str().to_owned(),
        record("tag", 3),
        ObjectKey::claim(&digest(4)).as_str().to_owned(),
        ObjectKey::part(&digest(4), 0).as_str().to_owned(),
        ObjectKey::probe(&[0; 16]).as_str().to_owned(),
        "v1/notes/readme".to_owned(),
    ];
    names.into_iter().map(|name| (name, 10, age)).collect()
}

fn bucket_of(objects: &[(String, u64, u64)]) -> Arc<Scripted> {
    let objects: Vec<_> = objects
        .iter()
        .map(|(name, size, age)| (name.as_str(), *size, *age))
        .collect();
    Scripted::with(&objects)
}

fn rules(older_days: Option<u64>, size_max: Option<u64>) -> GcRules {
    GcRules {
        older: older_days.map(|days| Duration::from_secs(days * DAY)),
        size_max,
        keep: Duration::from_secs(28 * DAY),
    }
}

async fn collect(bucket: &Arc<Scripted>, rules: &GcRules) -> (GarbageCollection, Result<(), ClockError>) {
    let mut collection = GarbageCollection::default();
    let storage: Arc<dyn ObjectStorage> = Arc::clone(bucket) as _;
    let never = std::future::pending();
    let result = collection.run(&storage, rules, false, |_| {}, never).await;
    (collection, result)
}

#[test]
fn kind_is_read_from_the_whole_name() {
    let of = |name: &str| ObjectKind::of(&ObjectKey::listed(name).unwrap());
    let names: Vec<_> = of_every_kind(0)
        .into_iter()
        .map(|(name, ..)| of(&name).name())
        .collect();
    let expected = [
        "blobs",
        "manifests",
        "records/tag",
        "claims",
        "parts",
        "probe",
        "other",
    ];
    assert_eq!(names, expected);
    assert_eq!(of(ObjectKey::claim_probe("ab12").as_str()), ObjectKind::Probe);
    assert_eq!(
        of(ObjectKey::manifest_claim(&digest(1)).as_str()),
        ObjectKind::Claim
    );
    assert_eq!(of(&record("later", 1)).name(), "records/other");
    let hex = digest(1).hex();
    for foreign in [
        "v1/blobs".to_owned(),
        format!("{}x", blob(1)),
        format!("{}/x", blob(1)),
        blob(1)
            .to_uppercase()
            .replace("V1/BLOBS/SHA256", "v1/blobs/sha256"),
        format!("v1/blobs/md5/{}/{hex}", &hex[..2]),
        format!("v1/blobs/sha256/zz/{hex}"),
        format!("v1/parts/sha256/{}/{hex}/", &hex[..2]),
        "v1/probe/a%2Fb".to_owned(),
        "v1/records/tag/00/00".to_owned(),
    ] {
        assert_eq!(of(&foreign), ObjectKind::Foreign, "{foreign}");
    }
}

#[tokio::test]
async fn inventory_counts_objects_by_kind() {
    let mut objects = of_every_kind(DAY);
    objects.push((blob(7), 5, 2 * DAY));
    let bucket: Arc<dyn ObjectStorage> = bucket_of(&objects);
    let inventory = take_inventory(&bucket, |_| {}).await.unwrap();
    assert_eq!((inventory.objects(), inventory.bytes()), (8, 75));
    let (_, blobs) = inventory
        .kinds()
        .find(|(kind, _)| *kind == ObjectKind::Blob)
        .unwrap();
    let ages = Some((Duration::from_secs(2 * DAY), Duration::from_secs(DAY)));
    assert_eq!((blobs.objects, blobs.bytes, blobs.ages), (2, 15, ages));
}

#[tokio::test(start_paused = true)]
async fn gc_by_age_keeps_records_and_claims_in_use() {
    // Ages in hours, and the kinds that are deleted with `--older 2d` and `keep = "28d"`.
    let left_behind = vec!["claims", "parts", "probe"];
    for (hours, deleted) in [
        (24, vec![]),
        (25, left_behind.clone()),
        (48, left_behind.clone()),
        (49, vec!["blobs", "manifests", "claims", "parts", "probe"]),
        (28 * 24, vec!["blobs", "manifests", "claims", "parts", "probe"]),
        (
            28 * 24 + 1,
            vec!["blobs", "manifests", "records/tag", "claims", "parts", "probe"],
        ),
    ] {
        let bucket = bucket_of(&of_every_kind(hours * HOUR));
        let (collection, result) = collect(&bucket, &rules(Some(2), None)).await;
        result.unwrap();
        let kinds: Vec<_> = collection.deleted.kinds().map(|(kind, _)| kind.name()).collect();
        assert_eq!(kinds, deleted, "{hours} h");
        assert_eq!(bucket.names().len(), 7 - deleted.len(), "{hours} h");
        assert!(bucket.names().contains(&"v1/notes/readme".to_owned()));
    }
}

#[tokio::test(start_paused = true)]
async fn object_without_an_age_is_kept() {
    let bucket = Scripted::with(&[]);
    bucket.objects.lock().insert(blob(1), (10, None));
    let (collection, result) = collect(&bucket, &rules(Some(1), Some(0))).await;
    result.unwrap();
    assert_eq!(
        (collection.deleted.objects(), collection.listed.undated()),
        (0, 1)
    );
    assert_eq!(collection.excess(), 10);
}

#[tokio::test(start_paused = true)]
async fn gc_by_size_deletes_the_oldest() {
    let objects: Vec<_> = (0..20).map(|n| (blob(n), 100, n * HOUR)).collect();
    let bucket = bucket_of(&objects);
    let (collection, result) = collect(&bucket, &rules(None, Some(950))).await;
    result.unwrap();
    assert_eq!(collection.deleted.objects(), 11, "550 bytes would not be enough");
    let mut kept: Vec<_> = (0..9).map(blob).collect();
    kept.sort();
    assert_eq!(bucket.names(), kept);
}

#[tokio::test(start_paused = true)]
async fn size_below_that_of_records_is_reported() {
    let objects = [(record("tag", 1), 30, 9 * DAY), (blob(1), 70, DAY)];
    let bucket = bucket_of(&objects);
    let (collection, result) = collect(&bucket, &rules(None, Some(10))).await;
    result.unwrap();
    assert_eq!((collection.deleted.bytes(), collection.excess()), (70, 20));
}

#[tokio::test(start_paused = true)]
async fn rewritten_object_does_not_count_as_freed() {
    // 60 objects of one hour in two batches. All of the first batch were rewritten.
    let mut names: Vec<_> = (0..60).map(blob).collect();
    names.sort();
    let objects: Vec<_> = names.iter().map(|name| (name.clone(), 100, DAY)).collect();
    let bucket = bucket_of(&objects);
    let rewritten = names.iter().take(50);
    *bucket.later.lock() = rewritten.map(|name| (name.clone(), Some(0))).collect();
    let (collection, result) = collect(&bucket, &rules(None, Some(1000))).await;
    result.unwrap();
    let counts = (collection.rewritten, collection.deleted.objects());
    assert_eq!(counts, (50, 10), "those after them are deleted instead");
    assert_eq!(collection.excess(), 4000);

    // An object that was not to remain, and remains.
    let bucket = bucket_of(&[(blob(1), 100, 90 * DAY), (blob(2), 100, 0)]);
    *bucket.later.lock() = [(blob(1), Some(0))].into();
    let (collection, result) = collect(&bucket, &rules(Some(28), Some(150))).await;
    result.unwrap();
    assert_eq!((collection.rewritten, collection.excess()), (1, 50));
}

#[tokio::test(start_paused = true)]
async fn storage_that_ignores_the_offset_ends_the_listing() {
    for (failed_after, expected) in [(1, Ok(9)), (2, Err(BucketError::Malformed))] {
        let objects: Vec<_> = (0..9).map(|n| (blob(n), 1, DAY)).collect();
        let bucket = Scripted {
            order: Order::IgnoresOffset,
            ..Arc::into_inner(bucket_of(&objects)).unwrap()
        };
        *bucket.listings.lock() = (0..100).map(|_| (failed_after, SILENT)).collect();
        if expected.is_ok() {
            bucket.listings.lock().truncate(1);
        }
        let bucket: Arc<dyn ObjectStorage> = Arc::new(bucket);
        let mut listed = 0;
        let result = take_inventory(&bucket, |_| listed += 1).await;
        assert_eq!(result.map(|inventory| inventory.objects()), expected);
        assert_eq!(listed, expected.unwrap_or(2), "no object is counted twice");
    }
    // The listing never comes further than its first name.
    let bucket = bucket_of(&[(blob(1), 1, DAY), (blob(2), 1, DAY)]);
    let bucket = Scripted {
        order: Order::IgnoresOffset,
        ..Arc::into_inner(bucket).unwrap()
    };
    *bucket.listings.lock() = (0..100).map(|_| (1, SILENT)).collect();
    let bucket: Arc<dyn ObjectStorage> = Arc::new(bucket);
    assert_eq!(take_inventory(&bucket, |_| {}).await, Err(SILENT));
}

#[tokio::test(start_paused = true)]
async fn trial_deletes_nothing() {
    let bucket = bucket_of(&of_every_kind(90 * DAY));
    let storage: Arc<dyn ObjectStorage> = Arc::clone(&bucket) as _;
    let mut trial = GarbageCollection::default();
    let never = std::future::pending();
    trial
        .run(&storage, &rules(Some(2), Some(0)), true, |_| {}, never)
        .await
        .unwrap();
    assert_eq!((trial.deleted.objects(), bucket.names().len()), (6, 7));
}

#[tokio::test(start_paused = true)]
async fn failed_page_is_requested_again_from_its_place() {
    let objects: Vec<_> = (0..9).map(|n| (blob(n), 1, 90 * DAY)).collect();
    let bucket = bucket_of(&objects);
    *bucket.listings.lock() = [(4, SILENT), (0, BucketError::Busy(503)), (2, SILENT)].into();
    let storage: Arc<dyn ObjectStorage> = Arc::clone(&bucket) as _;
    let inventory = take_inventory(&storage, |_| {}).await.unwrap();
    assert_eq!(inventory.objects(), 9);
    *bucket.listings.lock() = (0..4).map(|_| (0, SILENT)).collect();
    assert_eq!(take_inventory(&storage, |_| {}).await, Err(SILENT));
    *bucket.listings.lock() = [(1, BucketError::Denied("AccessDenied".into()))].into();
    assert!(
        take_inventory(&storage, |_| {}).await.is_err(),
        "no other attempt"
    );
    assert!(bucket.listings.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn storage_that_repeats_pages_ends_the_listing() {
    for count in [1, 2, 3, 1000] {
        let objects: Vec<_> = (0..count).map(|n| (blob(n), 1, DAY)).collect();
        let bucket = bucket_of(&objects);
        let bucket: Arc<dyn ObjectStorage> = Arc::new(Scripted {
            order: Order::Repeated,
            ..Arc::into_inner(bucket).unwrap()
        });
        let mut listed = 0;
        let result = take_inventory(&bucket, |_| listed += 1).await;
        assert_eq!(result, Err(BucketError::Malformed));
        assert!(listed < 4 * count, "{listed} of {count}");
    }
}

#[tokio::test(start_paused = true)]
async fn deletion_is_repeated_unless_it_is_denied() {
    let objects: Vec<_> = (0..120).map(|n| (blob(n), 1, 90 * DAY)).collect();
    let bucket = bucket_of(&objects);
    *bucket.deletions.lock() = [SILENT, BucketError::Busy(503), SILENT].into();
    let (collection, result) = collect(&bucket, &rules(Some(28), None)).await;
    result.unwrap();
    assert_eq!(collection.deleted.objects(), 120);

    let bucket = bucket_of(&objects);
    let denied = BucketError::Denied("AccessDenied".into());
    *bucket.deletions.lock() = (0..120).map(|_| denied.clone()).collect();
    let (collection, result) = collect(&bucket, &rules(Some(28), None)).await;
    assert_eq!((result, collection.deleted.objects()), (Err(denied.into()), 0));
    let tried = 120 - bucket.deletions.lock().len();
    assert!(tried <= 16, "{tried} deletions after the first was denied");
}

#[tokio::test(start_paused = true)]
async fn failure_hides_no_deletion_in_flight() {
    let objects: Vec<_> = (0..120).map(|n| (blob(n), 1, 90 * DAY)).collect();
    let bucket = Scripted {
        deletion_time: Duration::from_secs(1),
        ..Arc::into_inner(bucket_of(&objects)).unwrap()
    };
    let bucket = Arc::new(bucket);
    let denied = BucketError::Denied("AccessDenied".into());
    *bucket.deletions.lock() = [denied.clone()].into();
    let (collection, result) = collect(&bucket, &rules(Some(28), None)).await;
    assert_eq!(result, Err(denied.into()));
    let deleted = 120 - bucket.names().len() as u64;
    assert_eq!((collection.deleted.objects(), deleted), (15, 15));
}

#[tokio::test(start_paused = true)]
async fn deletions_have_a_bounded_rate() {
    let objects: Vec<_> = (0..1000).map(|n| (blob(n), 1, 90 * DAY)).collect();
    let began = tokio::time::Instant::now();
    let (collection, result) = collect(&bucket_of(&objects), &rules(Some(28), None)).await;
    result.unwrap();
    assert_eq!(collection.deleted.objects(), 1000);
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn interrupt_ends_gc_although_deletions_hang() {
    let objects: Vec<_> = (0..300).map(|n| (blob(n), 1, 90 * DAY)).collect();
    for is_deaf in [false, true] {
        let bucket = Arc::new(Scripted {
            is_deaf,
            ..Arc::into_inner(bucket_of(&objects)).unwrap()
        });
        let storage: Arc<dyn ObjectStorage> = Arc::clone(&bucket) as _;
        let (mut collection, rules) = (GarbageCollection::default(), rules(Some(28), None));
        let interrupt = tokio::time::sleep(Duration::from_millis(250));
        let began = tokio::time::Instant::now();
        let result = collection.run(&storage, &rules, false, |_| {}, interrupt).await;
        assert_eq!((result, collection.is_interrupted), (Ok(()), true));
        assert!(began.elapsed() < Duration::from_secs(3));
        let left = bucket.names().len() as u64;
        assert_eq!(
            collection.deleted.objects(),
            300 - left,
            "what was deleted is reported"
        );
        assert_eq!(left == 300, is_deaf);
    }
}

#[tokio::test(start_paused = true)]
async fn object_written_after_its_listing_is_kept() {
    let (denial, other) = (record("tag", 1), record("tag", 2));
    let gone = blob(3);
    let objects = [&denial, &other, &gone].map(|name| (name.clone(), 10, 90 * DAY));
    let bucket = bucket_of(&objects);
    *bucket.later.lock() = [(denial.clone(), Some(0)), (gone.clone(), None)].into();
    let (collection, result) = collect(&bucket, &rules(Some(28), None)).await;
    result.unwrap();
    assert_eq!(
        (collection.deleted.objects(), collection.rewritten),
        (1, 1),
        "an absent object is not counted"
    );
    let names = bucket.names();
    assert!(names.contains(&denial) && !names.contains(&other), "{names:?}");
}

#[tokio::test(start_paused = true)]
async fn wrong_time_of_the_storage_deletes_nothing() {
    for (ahead, is_refused) in [(60, false), (61, true), (90 * DAY, true)] {
        let bucket = Arc::new(Scripted {
            ahead,
            ..Arc::into_inner(bucket_of(&of_every_kind(90 * DAY))).unwrap()
        });
        let (collection, result) = collect(&bucket, &rules(Some(2), Some(0))).await;
        let refusal = Err(ClockError::Ahead(Duration::from_secs(ahead)));
        let expected = if is_refused { refusal } else { Ok(()) };
        assert_eq!(result, expected);
        assert_eq!(collection.deleted.objects() == 0, is_refused);
        assert_eq!(bucket.names().len(), if is_refused { 7 } else { 1 });
        assert_eq!(bucket.written.lock().len(), 1, "one probe");
    }
    let bucket = bucket_of(&of_every_kind(0));
    collect(&bucket, &rules(Some(2), None)).await.1.unwrap();
    assert!(bucket.written.lock().is_empty(), "nothing to delete");
}

#[tokio::test(start_paused = true)]
async fn object_with_a_marker_is_counted_once() {
    let objects: Vec<_> = (0..9).map(|n| (blob(n), 1, 90 * DAY)).collect();
    let bucket = Arc::new(Scripted {
        order: Order::WithMarkers,
        ..Arc::into_inner(bucket_of(&objects)).unwrap()
    });
    let (collection, result) = collect(&bucket, &rules(Some(28), None)).await;
    result.unwrap();
    assert_eq!(
        (collection.listed.objects(), collection.deleted.objects()),
        (9, 9)
    );
}

proptest! {
    #[test]
    fn gc_by_size_deletes_no_more_than_it_must(
        objects in proptest::collection::vec((1_u64..100, 0_u64..200 * HOUR), 1..60),
        size_max in 0_u64..3000,
    ) {
        let objects: Vec<_> = objects
            .into_iter()
            .zip(0..)
            .map(|((size, age), n)| (blob(n), size, age))
            .collect();
        let bucket = bucket_of(&objects);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let (collection, result) = runtime.block_on(collect(&bucket, &rules(None, Some(size_max))));
        prop_assert_eq!(result, Ok(()));
        let (kept, deleted): (Vec<_>, Vec<_>) = {
            let left = bucket.names();
            objects.iter().partition(|(name, ..)| left.contains(name))
        };
        let total: u64 = kept.iter().map(|(_, size, _)| size).sum();
        prop_assert!(total <= size_max);
        let largest = deleted.iter().map(|(_, size, _)| *size).max().unwrap_or(0);
        prop_assert!(deleted.is_empty() || total + largest > size_max, "{} of {}", total, size_max);
        let hour = |age: u64| (NOW - age) / HOUR;
        let newest = deleted.iter().map(|(.., age)| hour(*age)).max();
        let oldest = kept.iter().map(|(.., age)| hour(*age)).min();
        if let (Some(newest), Some(oldest)) = (newest, oldest) {
            prop_assert!(newest <= oldest);
        }
        prop_assert_eq!(collection.deleted.objects(), deleted.len() as u64);
    }
}
