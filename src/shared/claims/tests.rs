//! Tests of claims between caches over one bucket in memory. Time is paused.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use bytes::Bytes;
use tokio::time::sleep;

use super::*;
use crate::bucket::over::Over;
use crate::bucket::{BucketFuture, Object, ObjectStorage, in_memory};
use crate::oci::Algorithm;
use crate::shared::tests::settings_over;
use crate::shared::upload::{Item, Mode};
use crate::shared::{ArrivingFuture, SharedSettings};
use crate::telemetry::Telemetry;

const SIZE: usize = 8 * 1024 * 1024;
const MIB: u64 = 1024 * 1024;
const WITHIN: Duration = Duration::from_secs(1);

/// A bucket in memory that fails requests for claims.
struct Faulty {
    inner: Arc<dyn ObjectStorage>,
    /// Writes of claims are denied.
    denies: bool,
    /// Time until a create takes effect, and then until its reply arrives, which is that of the upload of a part too.
    delays: (u64, u64),
    /// Time of each read, and of each create beside the delays.
    latency: Duration,
    /// Claims that were created.
    created: Mutex<usize>,
}

impl Faulty {
    fn denied(&self, key: &ObjectKey) -> Result<(), BucketError> {
        if self.denies && key.as_str().contains("/claims/") {
            return Err(BucketError::Denied("AccessDenied".into()));
        }
        Ok(())
    }
}

impl Over for Faulty {
    fn inner(&self) -> &dyn ObjectStorage {
        &*self.inner
    }

    fn get<'a>(&'a self, key: &'a ObjectKey, from: u64) -> BucketFuture<'a, Object> {
        Box::pin(async move {
            sleep(self.latency).await;
            self.inner.get(key, from).await
        })
    }

    fn create<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, Option<String>> {
        Box::pin(async move {
            self.denied(key)?;
            sleep(self.latency + Duration::from_secs(self.delays.0)).await;
            let created = self.inner.create(key, bytes, media_type).await;
            *self.created.lock() += usize::from(created.is_ok());
            sleep(Duration::from_secs(self.delays.1)).await;
            created
        })
    }

    fn put<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, ()> {
        Box::pin(async move {
            self.denied(key)?;
            if !key.as_str().contains("/parts/") {
                return self.inner.put(key, bytes, media_type).await;
            }
            // It takes effect without a waiting caller too.
            let (inner, key, delay) = (Arc::clone(&self.inner), key.clone(), self.delays.1);
            let putting = tokio::spawn(async move {
                sleep(Duration::from_secs(delay)).await;
                inner.put(&key, bytes, None).await
            });
            putting.await.unwrap()
        })
    }
}

/// One cache over a bucket.
fn cache_with(bucket: Arc<dyn ObjectStorage>, write: bool) -> Arc<Active> {
    let settings = SharedSettings {
        write,
        claims: true,
        wait_max: WITHIN,
        keep: Duration::from_secs(1000),
        ..settings_over(bucket)
    };
    let active = Arc::new(Active::new(settings, &Arc::default(), Telemetry::new()));
    active.conditions.set(true).unwrap();
    active
}

fn cache(bucket: &Arc<dyn ObjectStorage>) -> Arc<Active> {
    cache_with(Arc::clone(bucket), true)
}

/// A file that arrives as far as the test says.
struct File {
    bytes: Bytes,
    received: watch::Sender<usize>,
}

impl File {
    fn new() -> Arc<Self> {
        let bytes: Vec<u8> = (0..=250_u8)
            .cycle()
            .flat_map(|byte| [byte; 1000])
            .take(SIZE)
            .collect();
        Arc::new(Self {
            bytes: bytes.into(),
            received: watch::Sender::new(0),
        })
    }

    fn receive(&self, count: usize) {
        self.received.send_replace(count);
    }

    fn digest(&self) -> Digest {
        Digest::of(Algorithm::Sha256, &self.bytes)
    }
}

impl Arriving for File {
    fn received(&self) -> u64 {
        *self.received.borrow() as u64
    }

    fn reached(&self, until: u64) -> ArrivingFuture<'_, u64> {
        Box::pin(async move {
            let mut received = self.received.subscribe();
            let enough = |received: &usize| *received as u64 >= until || *received == SIZE;
            let received = received.wait_for(enough).await.ok()?;
            Some(*received as u64)
        })
    }

    fn read(&self, start: u64, length: usize) -> ArrivingFuture<'_, Bytes> {
        let start = usize::try_from(start).unwrap();
        let bytes = self.bytes.slice(start..start + length);
        Box::pin(async move { Some(bytes) })
    }
}

async fn enter(cache: &Arc<Active>, file: &Arc<File>, memory: &ClaimMemory) -> Entered {
    enter_since(Instant::now(), cache, file, memory).await
}

async fn enter_since(since: Instant, cache: &Arc<Active>, file: &Arc<File>, memory: &ClaimMemory) -> Entered {
    enter_with(None, since, cache, (file, memory)).await
}

async fn enter_with(
    claim_read: Option<ClaimRead>,
    since: Instant,
    cache: &Arc<Active>,
    (file, memory): (&Arc<File>, &ClaimMemory),
) -> Entered {
    let entering = Entering {
        content: SharedContent::Blob(file.digest()),
        from: 0,
        stated: Some(SIZE as u64),
        claim_read,
        memory: memory.clone(),
        arriving: Arc::clone(file) as Arc<dyn Arriving>,
    };
    cache.enter(entering, since).await
}

async fn lead(cache: &Arc<Active>, file: &Arc<File>) -> Lease {
    match enter(cache, file, &ClaimMemory::default()).await {
        Entered::Leads(lease) => lease,
        _ => panic!("it leads"),
    }
}

async fn follow(cache: &Arc<Active>, file: &Arc<File>, memory: &ClaimMemory) -> Follower {
    match enter(cache, file, memory).await {
        Entered::Follows(follower) => *follower,
        _ => panic!("it follows"),
    }
}

/// Reads up to `count` bytes.
async fn read(follower: &mut Follower, count: usize) -> Result<Vec<u8>, BucketError> {
    let mut bytes = Vec::new();
    while bytes.len() < count
        && let Some(chunk) = follower.chunk().await
    {
        bytes.extend_from_slice(&chunk?);
    }
    Ok(bytes)
}

async fn exists(bucket: &Arc<dyn ObjectStorage>, key: ObjectKey) -> bool {
    bucket.head(&key).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn follower_reads_parts_while_the_owner_fetches() {
    let (bucket, file) = (in_memory(), File::new());
    let (owner, other) = (cache(&bucket), cache(&bucket));
    let lease = lead(&owner, &file).await;
    let mut follower = follow(&other, &file, &ClaimMemory::default()).await;
    lease.set_size(SIZE as u64);
    follower.opened().await.unwrap();
    assert_eq!(follower.size(), Some(SIZE as u64));
    let began = Instant::now();
    file.receive(2 * 1024 * 1024);
    let first = read(&mut follower, 1024 * 1024).await.unwrap();
    assert!(
        began.elapsed() < Duration::from_millis(800),
        "{:?}",
        began.elapsed()
    );
    file.receive(SIZE);
    let rest = read(&mut follower, SIZE).await.unwrap();
    assert_eq!(
        [first, rest].concat(),
        file.bytes,
        "the object is not uploaded yet"
    );
    let digest = file.digest();
    bucket
        .put(&ObjectKey::blob(&digest), file.bytes.clone(), None)
        .await
        .unwrap();
    lease.stored();
    sleep(Duration::from_secs(1)).await;
    for key in [
        ObjectKey::claim(&digest),
        ObjectKey::part(&digest, 0),
        ObjectKey::part(&digest, MIB),
    ] {
        assert!(!exists(&bucket, key.clone()).await, "{key}");
    }
    assert!(owner.claims.leases.held.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn claim_without_follower_publishes_nothing() {
    let (bucket, file) = (in_memory(), File::new());
    let lease = lead(&cache(&bucket), &file).await;
    file.receive(SIZE);
    sleep(Duration::from_secs(30)).await;
    assert!(
        exists(&bucket, ObjectKey::claim(&file.digest())).await,
        "it is alive"
    );
    assert!(!exists(&bucket, ObjectKey::part(&file.digest(), 0)).await);
    drop(lease);
}

#[tokio::test(start_paused = true)]
async fn late_follower_reads_the_rest_of_the_object() {
    let (bucket, file) = (in_memory(), File::new());
    let lease = lead(&cache(&bucket), &file).await;
    lease.set_size(SIZE as u64);
    let mut follower = follow(&cache(&bucket), &file, &ClaimMemory::default()).await;
    file.receive(1024 * 1024);
    let first = read(&mut follower, 1024 * 1024).await.unwrap();
    bucket
        .put(&ObjectKey::blob(&file.digest()), file.bytes.clone(), None)
        .await
        .unwrap();
    lease.stored();
    let rest = read(&mut follower, SIZE).await.unwrap();
    assert_eq!([first, rest].concat(), file.bytes);
}

#[tokio::test(start_paused = true)]
async fn given_up_claim_is_taken_by_a_follower() {
    let (bucket, file) = (in_memory(), File::new());
    let lease = lead(&cache(&bucket), &file).await;
    let (other, memory) = (cache(&bucket), ClaimMemory::default());
    let mut follower = follow(&other, &file, &memory).await;
    drop(lease);
    let began = Instant::now();
    assert!(follower.opened().await.is_err());
    assert!(began.elapsed() < WITHIN, "{:?}", began.elapsed());
    assert!(matches!(enter(&other, &file, &memory).await, Entered::Leads(_)));
}

#[tokio::test(start_paused = true)]
async fn frozen_owner_is_taken_over_within_12_s() {
    let (bucket, file) = (in_memory(), File::new());
    let key = ObjectKey::claim(&file.digest());
    let record = ClaimRecord::new(&BootId::random());
    bucket.create(&key, record.to_bytes().into(), None).await.unwrap();
    let (other, memory, began) = (cache(&bucket), ClaimMemory::default(), Instant::now());
    let mut follower = follow(&other, &file, &memory).await;
    assert!(follower.opened().await.is_err());
    assert!(matches!(enter(&other, &file, &memory).await, Entered::Leads(_)));
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
}

/// The owner beats, and its upstream sends nothing.
#[tokio::test(start_paused = true)]
async fn stalled_owner_is_left_after_12_s() {
    let (bucket, file) = (in_memory(), File::new());
    let lease = lead(&cache(&bucket), &file).await;
    let (other, memory, began) = (cache(&bucket), ClaimMemory::default(), Instant::now());
    let mut follower = follow(&other, &file, &memory).await;
    assert!(follower.opened().await.is_err());
    assert!(began.elapsed() < Duration::from_secs(13), "{:?}", began.elapsed());
    assert!(matches!(enter(&other, &file, &memory).await, Entered::Alone));
    // The same with a size.
    lease.set_size(SIZE as u64);
    let mut follower = follow(&other, &file, &ClaimMemory::default()).await;
    follower.opened().await.unwrap();
    assert!(follower.chunk().await.unwrap().is_err() && follower.chunk().await.is_none());
}

/// An upstream that sends 250 KiB/s is slow and not dead.
#[tokio::test(start_paused = true)]
async fn slow_owner_is_followed() {
    let (bucket, file) = (in_memory(), File::new());
    let lease = lead(&cache(&bucket), &file).await;
    lease.set_size(SIZE as u64);
    let mut follower = follow(&cache(&bucket), &file, &ClaimMemory::default()).await;
    let arriving = async {
        for second in 1..=40 {
            sleep(Duration::from_secs(1)).await;
            file.receive((second * 250 * 1024).min(SIZE));
        }
    };
    let (bytes, ()) = tokio::join!(read(&mut follower, SIZE), arriving);
    assert_eq!(bytes.unwrap(), file.bytes);
}

/// The owner's uploads fail, or its upstream is slower than a part in 25 s.
#[tokio::test(start_paused = true)]
async fn owner_that_delivers_nothing_is_left_after_25_s() {
    let (bucket, file) = (in_memory(), File::new());
    let lease = lead(&cache(&bucket), &file).await;
    lease.set_size(SIZE as u64);
    let (memory, began) = (ClaimMemory::default(), Instant::now());
    let mut follower = follow(&cache(&bucket), &file, &memory).await;
    let arriving = async {
        for second in 1..=40 {
            sleep(Duration::from_secs(1)).await;
            file.receive(second * 1000);
        }
    };
    let reading = async {
        assert!(follower.chunk().await.unwrap().is_err());
        began.elapsed()
    };
    let (took, ()) = tokio::join!(reading, arriving);
    assert!(took < Duration::from_secs(27), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn follower_without_a_size_ends_with_the_object() {
    let (bucket, file) = (in_memory(), File::new());
    let lease = lead(&cache(&bucket), &file).await;
    let mut follower = follow(&cache(&bucket), &file, &ClaimMemory::default()).await;
    file.receive(SIZE);
    let bytes = read(&mut follower, SIZE).await.unwrap();
    assert_eq!(bytes, file.bytes);
    let key = ObjectKey::blob(&file.digest());
    bucket.put(&key, file.bytes.clone(), None).await.unwrap();
    lease.stored();
    assert!(follower.chunk().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn size_that_comes_with_the_end_is_in_the_claim() {
    let (bucket, file) = (in_memory(), File::new());
    let active = cache(&bucket);
    let lease = lead(&active, &file).await;
    active
        .uploads
        .push(Item::new(SharedContent::Blob(file.digest()), Mode::Create));
    lease.set_size(SIZE as u64);
    lease.stored();
    sleep(Duration::from_secs(1)).await;
    let look = active.look(&ObjectKey::claim(&file.digest())).await;
    let Look::Present { record, .. } = look else {
        panic!("{look:?}");
    };
    assert_eq!(record.unwrap().size, Some(SIZE as u64));
}

#[tokio::test(start_paused = true)]
async fn frozen_owner_does_no_harm_when_it_continues() {
    let (bucket, file) = (in_memory(), File::new());
    let (owner, other) = (cache(&bucket), cache(&bucket));
    let lease = lead(&owner, &file).await;
    let key = ObjectKey::claim(&file.digest());
    // As if another cache had taken it over.
    let record = ClaimRecord::new(&other.claims.leases.me);
    bucket.put(&key, record.to_bytes().into(), None).await.unwrap();
    sleep(Duration::from_secs(4)).await;
    assert!(
        owner.claims.leases.held.lock().is_empty(),
        "it has lost the claim"
    );
    lease.stored();
    sleep(Duration::from_secs(4)).await;
    assert!(exists(&bucket, key).await, "the claim of the other one");
}

#[tokio::test(start_paused = true)]
async fn missing_or_foreign_parts_are_left() {
    for part in [None, Some(1_usize)] {
        let (bucket, file) = (in_memory(), File::new());
        let claim = ObjectKey::claim(&file.digest());
        let lie = format!(
            r#"{{"owner":"x","beat":0,"size":{SIZE},"received":0,"published":{SIZE},"wanted":true}}"#
        );
        bucket.create(&claim, lie.into(), None).await.unwrap();
        if let Some(length) = part {
            let part = ObjectKey::part(&file.digest(), 0);
            bucket.put(&part, vec![0; length].into(), None).await.unwrap();
        }
        let (other, memory, began) = (cache(&bucket), ClaimMemory::default(), Instant::now());
        let mut follower = follow(&other, &file, &memory).await;
        follower.opened().await.unwrap();
        assert!(follower.chunk().await.unwrap().is_err());
        assert!(began.elapsed() < WITHIN && matches!(enter(&other, &file, &memory).await, Entered::Alone));
    }
}

#[tokio::test(start_paused = true)]
async fn claims_that_are_none_delay_nobody() {
    let version_2 = r#"{"version":2}"#.to_owned();
    for claim in [
        String::new(),
        "no claim".to_owned(),
        "x".repeat(10 * 1024 * 1024),
        version_2,
    ] {
        let (bucket, file) = (in_memory(), File::new());
        bucket
            .create(&ObjectKey::claim(&file.digest()), claim.into(), None)
            .await
            .unwrap();
        let began = Instant::now();
        let entered = enter(&cache(&bucket), &file, &ClaimMemory::default()).await;
        assert!(matches!(entered, Entered::Alone) && began.elapsed() < WITHIN / 10);
    }
}

#[tokio::test(start_paused = true)]
async fn blob_that_is_there_is_read_under_the_claim() {
    let (bucket, file) = (in_memory(), File::new());
    bucket
        .put(&ObjectKey::blob(&file.digest()), file.bytes.clone(), None)
        .await
        .unwrap();
    let entered = enter(&cache(&bucket), &file, &ClaimMemory::default()).await;
    assert!(matches!(entered, Entered::Found(_)));
    sleep(WITHIN).await;
    assert!(!exists(&bucket, ObjectKey::claim(&file.digest())).await);
}

fn slow_to_create(delays: (u64, u64)) -> Arc<Faulty> {
    Arc::new(Faulty {
        inner: in_memory(),
        denies: false,
        delays,
        latency: Duration::ZERO,
        created: Mutex::default(),
    })
}

#[tokio::test(start_paused = true)]
async fn claim_won_too_late_is_deleted() {
    let (faulty, file) = (slow_to_create((5, 0)), File::new());
    let bucket = Arc::clone(&faulty) as Arc<dyn ObjectStorage>;
    let (cache, began) = (cache(&bucket), Instant::now());
    let entered = enter(&cache, &file, &ClaimMemory::default()).await;
    assert!(matches!(entered, Entered::Alone) && began.elapsed() == WITHIN);
    assert_eq!(*faulty.created.lock(), 0);
    sleep(Duration::from_secs(6)).await;
    let is_left = exists(&bucket, ObjectKey::claim(&file.digest())).await;
    assert_eq!((*faulty.created.lock(), is_left), (1, false));
}

/// It answers each request within the limit, and all of them together take longer.
/// The bad interleaving: the claim of another cache is found while a slow create is on its way, and then it is gone.
#[tokio::test(start_paused = true)]
async fn left_create_is_awaited_before_another_one() {
    let slow = slow_to_create((1, 0));
    let bucket: Arc<dyn ObjectStorage> = Arc::clone(&slow) as Arc<dyn ObjectStorage>;
    let (cache, file) = (cache(&bucket), File::new());
    let key = ObjectKey::claim(&file.digest());
    let foreign = ClaimRecord::new(&BootId::random());
    slow.inner
        .create(&key, foreign.to_bytes().into(), None)
        .await
        .unwrap();
    let (own, mut left) = (ClaimRecord::new(&cache.claims.leases.me), None);
    let refused = cache.create_claim(&key, &own, &mut left).await;
    assert!(matches!(refused, Written::Refused) && left.is_some());
    slow.inner.delete(&key).await.unwrap();
    let created = cache.create_claim(&key, &own, &mut left).await;
    assert!(matches!(created, Written::Done(_)) && left.is_none());
    sleep(Duration::from_secs(5)).await;
    assert!(exists(&bucket, key).await);
    assert_eq!(*slow.created.lock(), 1);
}

#[tokio::test(start_paused = true)]
async fn slow_bucket_that_answers_is_waited_for_twice_as_long() {
    for (millis, leads) in [(700, true), (1100, false)] {
        let faulty = Faulty {
            inner: in_memory(),
            denies: false,
            delays: (0, 0),
            latency: Duration::from_millis(millis),
            created: Mutex::default(),
        };
        let cache = cache_with(Arc::new(faulty), true);
        let (file, began) = (File::new(), Instant::now());
        let entered = enter(&cache, &file, &ClaimMemory::default()).await;
        assert_eq!(matches!(entered, Entered::Leads(_)), leads, "{millis} ms");
        assert!(began.elapsed() <= WITHIN * 2, "{:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn slow_lookup_of_the_blob_shortens_the_wait_for_its_claim() {
    for (looked_up, leads, waited) in [(900, true, 0), (1000, false, 0), (900, false, 600)] {
        let faulty = Faulty {
            inner: in_memory(),
            denies: false,
            delays: (0, 0),
            latency: Duration::from_millis(waited),
            created: Mutex::default(),
        };
        let (cache, file, since) = (cache_with(Arc::new(faulty), true), File::new(), Instant::now());
        sleep(Duration::from_millis(looked_up)).await;
        let entered = enter_since(since, &cache, &file, &ClaimMemory::default()).await;
        assert_eq!(
            matches!(entered, Entered::Leads(_)),
            leads,
            "{looked_up} and {waited} ms"
        );
        assert!(since.elapsed() <= WITHIN * 2, "{:?}", since.elapsed());
    }
}

/// Some storages take seconds to refuse all but one of many simultaneous creates.
#[tokio::test(start_paused = true)]
async fn slow_reply_to_a_create_delays_nobody() {
    let (bucket, file) = (slow_to_create((0, 5)) as Arc<dyn ObjectStorage>, File::new());
    let caches = [cache(&bucket), cache(&bucket), cache(&bucket)];
    let began = Instant::now();
    let (one, two, three) = (
        ClaimMemory::default(),
        ClaimMemory::default(),
        ClaimMemory::default(),
    );
    let entered = tokio::join!(
        enter(&caches[0], &file, &one),
        enter(&caches[1], &file, &two),
        enter(&caches[2], &file, &three),
    );
    assert!(began.elapsed() < WITHIN / 2, "{:?}", began.elapsed());
    let entered = [entered.0, entered.1, entered.2];
    let count = |is: fn(&Entered) -> bool| entered.iter().filter(|entered| is(entered)).count();
    assert_eq!(count(|entered| matches!(entered, Entered::Leads(_))), 1);
    assert_eq!(count(|entered| matches!(entered, Entered::Follows(_))), 2);
    sleep(Duration::from_secs(6)).await;
    assert!(
        exists(&bucket, ObjectKey::claim(&file.digest())).await,
        "no late reply deletes it"
    );
}

#[tokio::test(start_paused = true)]
async fn part_on_its_way_is_deleted_too() {
    let (bucket, file) = (slow_to_create((0, 2)) as Arc<dyn ObjectStorage>, File::new());
    let lease = lead(&cache(&bucket), &file).await;
    let _follower = follow(&cache(&bucket), &file, &ClaimMemory::default()).await;
    let key = ObjectKey::claim(&file.digest());
    let found = bucket.get(&key, 0).await.unwrap();
    let (etag, mut body) = (found.info.etag.unwrap(), found.body);
    let mut record = ClaimRecord::parse(&body.chunk().await.unwrap().unwrap()).unwrap();
    record.wanted = true;
    bucket
        .update(&key, record.to_bytes().into(), &etag)
        .await
        .unwrap();
    file.receive(SIZE);
    sleep(Duration::from_secs(1)).await;
    lease.stored();
    sleep(Duration::from_secs(9)).await;
    assert!(!exists(&bucket, key).await && !exists(&bucket, ObjectKey::part(&file.digest(), 0)).await);
}

#[tokio::test(start_paused = true)]
async fn denied_claims_switch_claims_off_and_nothing_else() {
    let faulty = Arc::new(Faulty {
        inner: in_memory(),
        denies: true,
        delays: (0, 0),
        latency: Duration::ZERO,
        created: Mutex::default(),
    });
    let (bucket, file) = (Arc::clone(&faulty) as Arc<dyn ObjectStorage>, File::new());
    let (cache, began) = (cache(&bucket), Instant::now());
    for _ in 0..10 {
        let entered = enter(&cache, &file, &ClaimMemory::default()).await;
        assert!(matches!(entered, Entered::Alone));
    }
    assert!(began.elapsed() < WITHIN / 10 && !cache.may_claim());
    assert!(cache.writes_open_since().is_none() && cache.reads.lock().breaker.open_since().is_none());
    // Allowed again, they are found out in the background.
    let allowed = cache_with(Arc::clone(&faulty.inner), true);
    allowed
        .claims
        .guarded
        .lock()
        .breaker
        .record(Outcome::Denied, Instant::now());
    sleep(Duration::from_secs(2)).await;
    assert!(matches!(
        enter(&allowed, &file, &ClaimMemory::default()).await,
        Entered::Alone
    ));
    sleep(WITHIN).await;
    assert!(matches!(
        enter(&allowed, &file, &ClaimMemory::default()).await,
        Entered::Leads(_)
    ));
}

#[tokio::test(start_paused = true)]
async fn unknown_or_ignored_conditions_mean_no_claims() {
    let (bucket, file) = (in_memory(), File::new());
    let ignoring = cache(&bucket);
    let settings = ignoring.settings.clone();
    let unknown = Arc::new(Active::new(settings.clone(), &Arc::default(), Telemetry::new()));
    assert!(matches!(
        enter(&unknown, &file, &ClaimMemory::default()).await,
        Entered::Alone
    ));
    sleep(WITHIN).await;
    assert_eq!(
        unknown.conditions.get(),
        Some(&true),
        "found out in the background"
    );
    let ignoring = Arc::new(Active::new(settings, &Arc::default(), Telemetry::new()));
    ignoring.conditions.set(false).unwrap();
    assert!(matches!(
        enter(&ignoring, &file, &ClaimMemory::default()).await,
        Entered::Alone
    ));
    assert!(!exists(&bucket, ObjectKey::claim(&file.digest())).await);
}

#[tokio::test(start_paused = true)]
async fn read_only_cache_follows_and_never_claims() {
    let (bucket, file) = (in_memory(), File::new());
    let reader = cache_with(Arc::clone(&bucket), false);
    assert!(matches!(
        enter(&reader, &file, &ClaimMemory::default()).await,
        Entered::Alone
    ));
    assert!(!exists(&bucket, ObjectKey::claim(&file.digest())).await);
    let lease = lead(&cache(&bucket), &file).await;
    lease.set_size(SIZE as u64);
    assert!(
        matches!(
            enter(&reader, &file, &ClaimMemory::default()).await,
            Entered::Alone
        ),
        "no parts"
    );
    let mut other = follow(&cache(&bucket), &file, &ClaimMemory::default()).await;
    file.receive(SIZE);
    read(&mut other, 1).await.unwrap();
    let mut follower = follow(&reader, &file, &ClaimMemory::default()).await;
    assert_eq!(read(&mut follower, SIZE).await.unwrap(), file.bytes);
}

#[tokio::test(start_paused = true)]
async fn claims_are_handed_over_at_shutdown() {
    let (bucket, file) = (in_memory(), File::new());
    let owner = cache(&bucket);
    let _lease = lead(&owner, &file).await;
    owner.claims.leases.close().await;
    assert!(!exists(&bucket, ObjectKey::claim(&file.digest())).await);
    assert!(matches!(
        enter(&owner, &file, &ClaimMemory::default()).await,
        Entered::Alone
    ));
}

#[tokio::test(start_paused = true)]
async fn wrong_parts_bar_the_claims_of_the_blob() {
    let (bucket, file) = (in_memory(), File::new());
    let cache = cache(&bucket);
    cache.refuse(&ObjectKey::claim(&file.digest()), WRONG_PERIOD, false);
    assert!(matches!(
        enter(&cache, &file, &ClaimMemory::default()).await,
        Entered::Alone
    ));
}

/// Its read began with that of the blob, so it takes no further round trip.
#[tokio::test(start_paused = true)]
async fn claim_that_was_read_before_is_not_read_again() {
    let (began, file) = (Instant::now(), File::new());
    let bucket: Arc<dyn ObjectStorage> = Arc::new(Faulty {
        latency: Duration::from_millis(100),
        ..Arc::into_inner(slow_to_create((0, 0))).unwrap()
    });
    let (owner, other) = (cache(&bucket), cache(&bucket));
    let read_of = |cache: &Arc<Active>| Some(Arc::clone(cache).read_claim(file.digest()));
    let claim_read = read_of(&owner);
    sleep(Duration::from_millis(100)).await;
    let memory = ClaimMemory::default();
    let entered = enter_with(claim_read, began, &owner, (&file, &memory)).await;
    assert!(matches!(entered, Entered::Leads(_)));
    assert_eq!(began.elapsed(), Duration::from_millis(200));
    let entered = enter_with(read_of(&other), Instant::now(), &other, (&file, &memory)).await;
    assert!(matches!(entered, Entered::Follows(_)));
    assert_eq!(began.elapsed(), Duration::from_millis(300));
}

/// The read began before the claim of an earlier download of this cache was deleted.
#[tokio::test(start_paused = true)]
async fn own_claim_that_was_read_before_is_read_again() {
    let (bucket, file) = (in_memory(), File::new());
    let cache = cache(&bucket);
    let earlier = lead(&cache, &file).await;
    let mut claim_read = Arc::clone(&cache).read_claim(file.digest());
    let look = (&mut claim_read.reading).await.unwrap();
    claim_read.reading = AbortOnDropHandle::new(tokio::spawn(async { look }));
    drop(earlier);
    sleep(WITHIN).await;
    assert!(!exists(&bucket, ObjectKey::claim(&file.digest())).await);
    let memory = ClaimMemory::default();
    let _lease = enter_with(Some(claim_read), Instant::now(), &cache, (&file, &memory)).await;
    sleep(WITHIN).await;
    assert!(exists(&bucket, ObjectKey::claim(&file.digest())).await);
}
