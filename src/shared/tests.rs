//! Tests of reads, over a scripted bucket. Time is paused.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::sleep;

use super::breaker::Outcome;
use super::object::STALLED_PERIOD;
use super::redirect::RETRY_PERIOD;
use super::*;
use crate::bucket::over::{Memory, Over};
use crate::bucket::{BucketError, BucketFuture, Object, ObjectBody, ObjectChunk, ObjectInfo, StorageClock};
use crate::clock::Clock;
use crate::oci::{Algorithm, UpstreamFailure};

const MIB: u64 = 1024 * 1024;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Settings of a cache over this bucket, without claims, records and redirects.
pub(in crate::shared) fn settings_over(bucket: Arc<dyn ObjectStorage>) -> SharedSettings {
    SharedSettings {
        bucket,
        name: "s3://images".into(),
        write: true,
        claims: false,
        wait_max: Duration::from_secs(1),
        keep: 28 * DAY,
        uploads_max: 1,
        records: None,
        redirect: RedirectSettings::default(),
    }
}

/// Pauses, each with the bytes that follow. If they are fewer than the object has, nothing follows.
type Script = Vec<(u64, u64)>;

/// A bucket that has every object, of one size.
struct Scripted {
    size: u64,
    age: Duration,
    clock: StorageClock,
    /// Bodies of the next reads. The last one is repeated.
    bodies: Mutex<VecDeque<Result<Script, BucketError>>>,
    puts: Mutex<usize>,
    /// Objects that no test reads.
    others: Memory,
}

impl Scripted {
    /// Sets its clock behind that of this host.
    fn set_clock(&self, seconds_behind: u64) {
        let date = Clock::system().now() - Duration::from_secs(seconds_behind);
        self.clock.learn(date, Instant::now(), Instant::now());
    }
}

struct Body {
    script: VecDeque<(u64, u64)>,
    left: u64,
}

impl ObjectBody for Body {
    fn chunk(&mut self) -> ObjectChunk<'_> {
        Box::pin(async move {
            if self.left == 0 {
                return None;
            }
            let Some((pause, count)) = self.script.front().copied() else {
                return std::future::pending().await;
            };
            sleep(Duration::from_secs(pause)).await;
            self.script.pop_front();
            self.left -= count;
            Some(Ok(vec![0; usize::try_from(count).unwrap()].into()))
        })
    }
}

impl Over for Scripted {
    fn inner(&self) -> &dyn ObjectStorage {
        &*self.others
    }

    fn get<'a>(&'a self, key: &'a ObjectKey, from: u64) -> BucketFuture<'a, Object> {
        Box::pin(async move {
            let script = {
                let mut bodies = self.bodies.lock();
                match bodies.len() {
                    0 | 1 => bodies.front().cloned().unwrap(),
                    _ => bodies.pop_front().unwrap(),
                }
            };
            let body = Body {
                script: script?.into(),
                left: self.size - from,
            };
            Ok(Object {
                info: Over::head(self, key).await?,
                body: Box::new(body),
            })
        })
    }

    fn head<'a>(&'a self, _: &'a ObjectKey) -> BucketFuture<'a, ObjectInfo> {
        let info = ObjectInfo {
            size: self.size,
            etag: None,
            age: Some(self.age),
            media_type: None,
        };
        Box::pin(async move { Ok(info) })
    }

    fn create<'a>(
        &'a self,
        _: &'a ObjectKey,
        _: Bytes,
        _: Option<&'a str>,
    ) -> BucketFuture<'a, Option<String>> {
        Box::pin(async { Err(BucketError::Exists) })
    }

    fn put<'a>(&'a self, _: &'a ObjectKey, _: Bytes, _: Option<&'a str>) -> BucketFuture<'a, ()> {
        *self.puts.lock() += 1;
        Box::pin(async { Ok(()) })
    }

    fn clock(&self) -> Option<&StorageClock> {
        Some(&self.clock)
    }

    fn presign<'a>(&'a self, key: &'a ObjectKey, _: Duration) -> BucketFuture<'a, String> {
        Box::pin(async move { Ok(format!("https://bucket/{key}")) })
    }
}

fn scripted(size: u64, bodies: Vec<Result<Script, BucketError>>) -> (Arc<Scripted>, Arc<Active>) {
    aged(size, Duration::ZERO, bodies)
}

fn aged(size: u64, age: Duration, bodies: Vec<Result<Script, BucketError>>) -> (Arc<Scripted>, Arc<Active>) {
    let bucket = Arc::new(Scripted {
        size,
        age,
        clock: StorageClock::default(),
        bodies: Mutex::new(bodies.into()),
        puts: Mutex::default(),
        others: Memory::default(),
    });
    bucket.set_clock(0);
    let settings = SharedSettings {
        redirect: RedirectSettings {
            mode: RedirectMode::Always,
            valid: Duration::from_secs(60),
            host: "storage.example.org".into(),
        },
        ..settings_over(Arc::clone(&bucket) as Arc<dyn ObjectStorage>)
    };
    (
        bucket,
        Arc::new(Active::new(settings, &Arc::default(), Telemetry::new())),
    )
}

fn content(number: u8) -> SharedContent {
    SharedContent::Blob(Digest::of(Algorithm::Sha256, &[number]))
}

/// Reads an object to its end, and takes this long for each chunk.
async fn consume(active: &Arc<Active>, number: u8, pause: Duration) -> Result<u64, BucketError> {
    let mut object = active.open(content(number), 0).await.unwrap();
    while let Some(chunk) = object.chunk().await {
        chunk?;
        sleep(pause).await;
    }
    Ok(object.offset)
}

fn is_open(active: &Active) -> bool {
    active.reads.lock().breaker.open_since().is_some()
}

const STALLED: Result<u64, BucketError> = Err(BucketError::Silent(UpstreamFailure::Timeout));

#[tokio::test(start_paused = true)]
async fn stalled_bodies_open_the_breaker_despite_answers() {
    let half = || Ok(vec![(0, 4)]);
    let (bucket, active) = scripted(8, vec![half(), half(), half(), Ok(vec![])]);
    for number in 0..3 {
        assert!(!is_open(&active));
        active.note_read(Outcome::Answered, None);
        assert_eq!(consume(&active, number, Duration::ZERO).await, STALLED);
        let again = active.open(content(number), 4).await;
        assert!(again.is_none(), "the upstream continues it at once");
    }
    assert!(is_open(&active));
    sleep(Duration::from_secs(300)).await;
    assert!(is_open(&active), "no probe of a head closes it");
    *bucket.bodies.lock() = VecDeque::from([half()]);
    sleep(Duration::from_secs(40)).await;
    assert!(!is_open(&active), "the rest of the body has arrived");
}

#[tokio::test(start_paused = true)]
async fn slow_body_is_left_to_the_upstream() {
    let slow = vec![(1, MIB / 2); 64];
    let (_, active) = scripted(32 * MIB, vec![Ok(slow)]);
    let began = Instant::now();
    assert_eq!(consume(&active, 1, Duration::ZERO).await, STALLED);
    assert_eq!(began.elapsed(), Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn time_of_a_slow_consumer_does_not_count() {
    let body = vec![(1, 2 * MIB); 16];
    let (_, active) = scripted(32 * MIB, vec![Ok(body)]);
    let read = consume(&active, 1, Duration::from_secs(60)).await;
    assert_eq!(read, Ok(32 * MIB));
}

#[tokio::test(start_paused = true)]
async fn share_of_a_busy_link_is_not_slow() {
    let (_, active) = scripted(16 * MIB, vec![Ok(vec![(1, MIB / 2); 32])]);
    let reads = (0..20).map(|number| consume_owned(Arc::clone(&active), number));
    for read in futures_util::future::join_all(reads).await {
        assert_eq!(read, Ok(16 * MIB));
    }
}

async fn consume_owned(active: Arc<Active>, number: u8) -> Result<u64, BucketError> {
    consume(&active, number, Duration::ZERO).await
}

#[tokio::test(start_paused = true)]
async fn timeout_of_a_complete_read_is_a_silence() {
    let drip = vec![(1, 1); 8];
    let (_, active) = scripted(8, vec![Ok(drip)]);
    for number in 0..3 {
        assert!(active.read(content(number), 100).await.is_err());
    }
    assert!(is_open(&active));
}

#[tokio::test(start_paused = true)]
async fn missing_bucket_stays_closed_off() {
    let (bucket, active) = scripted(8, vec![Err(BucketError::NoBucket)]);
    assert!(active.open(content(1), 0).await.is_none());
    sleep(Duration::from_secs(300)).await;
    assert!(is_open(&active), "a head has no code of the error");
    *bucket.bodies.lock() = VecDeque::from([Err(BucketError::Absent)]);
    sleep(Duration::from_secs(40)).await;
    assert!(!is_open(&active));
}

#[tokio::test(start_paused = true)]
async fn reads_do_not_show_that_writes_are_accepted() {
    let (_, active) = scripted(3, vec![]);
    active.conditions.set(false).unwrap();
    active.record_write("put", &Err::<(), _>(BucketError::NoBucket), Duration::ZERO);
    let key = content(1).key();
    let put = upload::put(&active, (&key, Mode::Create), Bytes::from_static(b"abc"), None).await;
    assert!(put.is_err() && active.writes_open_since().is_some());
}

#[tokio::test(start_paused = true)]
async fn wrong_object_that_stalls_too_stays_wrong() {
    let (_, active) = scripted(8, vec![]);
    let key = content(1).key();
    active.report_wrong(&key);
    active.refuse(&key, STALLED_PERIOD, false);
    sleep(STALLED_PERIOD * 2).await;
    assert!(!active.may_read(&key) && active.refused.get(&key).unwrap().is_wrong);
}

#[tokio::test(start_paused = true)]
async fn unreadable_object_closes_off_no_bucket() {
    let archived = BucketError::Unreadable("InvalidObjectState".into());
    let (_, active) = scripted(8, vec![Err(archived)]);
    assert!(active.open(content(1), 0).await.is_none());
    assert!(!is_open(&active) && !active.may_read(&content(1).key()));
    let refusal = active.refused.get(&content(1).key()).unwrap();
    assert!(refusal.is_wrong, "the next offer replaces it");
}

#[tokio::test(start_paused = true)]
async fn object_of_another_size_is_replaced_and_renewed_once() {
    for (size, mode, puts) in [(8, Mode::Create, 1), (3, Mode::Create, 0), (3, Mode::Renew, 0)] {
        let (bucket, active) = scripted(size, vec![]);
        active.conditions.set(true).unwrap();
        let key = content(1).key();
        let put = upload::put(&active, (&key, mode), Bytes::from_static(b"abc"), None).await;
        assert_eq!(put.is_ok(), puts == 1, "{size} {mode:?}");
        assert_eq!(*bucket.puts.lock(), puts, "{size} {mode:?}");
    }
}

const CLIENT: RedirectClient<'_> = RedirectClient {
    address: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    host: Some("cache.example.org"),
    has_credential: true,
    is_resuming: false,
};

/// Another client, for each request.
fn client() -> RedirectClient<'static> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    RedirectClient {
        address: Ipv4Addr::from_bits(number).into(),
        ..CLIENT
    }
}

async fn find(active: &Arc<Active>, size: Option<u64>, client: RedirectClient<'_>) -> Found {
    let blob = (content(1).digest(), size);
    active.find(blob, &client, Clock::system().now()).await
}

/// A bucket with objects of 2 MiB, of which none is verified.
fn unverified() -> (Arc<Scripted>, Arc<Active>) {
    let (bucket, active) = scripted(2 * MIB, vec![]);
    active.redirects.is_verifying.store(true, Ordering::Relaxed);
    (bucket, active)
}

async fn url(active: &Arc<Active>, size: Option<u64>) -> Option<String> {
    url_for(active, size, client()).await
}

async fn url_for(active: &Arc<Active>, size: Option<u64>, client: RedirectClient<'_>) -> Option<String> {
    match find(active, size, client).await {
        Found::Url(url) => Some(url),
        Found::Expiring(_) | Found::Nothing => None,
    }
}

#[tokio::test(start_paused = true)]
async fn redirect_is_to_objects_of_the_right_size_alone() {
    let (_, active) = scripted(4 * MIB, vec![Ok(vec![(0, 4 * MIB)])]);
    assert!(url(&active, Some(4 * MIB)).await.unwrap().contains("v1/blobs/"));
    assert!(url(&active, None).await.is_some());
    assert_eq!(url(&active, Some(4 * MIB + 1)).await, None);
    let (_, small) = scripted(1000, vec![Ok(vec![(0, 1000)])]);
    assert_eq!(url(&small, None).await, None);
}

#[tokio::test(start_paused = true)]
async fn object_that_expires_soon_is_renewed_and_not_redirected_to() {
    for (keep, hours, is_expiring) in [
        (28, 25 * 24, false),
        (28, 27 * 24, true),
        (2, 35, false),
        (2, 37, true),
    ] {
        let (bucket, active) = aged(2 * MIB, DAY / 24 * hours, vec![Ok(vec![(0, 2 * MIB)])]);
        let settings = SharedSettings {
            bucket: bucket as Arc<dyn ObjectStorage>,
            keep: keep * DAY,
            ..active.settings.clone()
        };
        let active = Arc::new(Active::new(settings, &Arc::default(), Telemetry::new()));
        let found = find(&active, None, client()).await;
        assert_eq!(
            matches!(found, Found::Expiring(_)),
            is_expiring,
            "{hours} h of {keep} days"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn object_with_wrong_bytes_is_found_by_the_sample() {
    // The bytes are zeros, so they do not match the digest.
    let (_, active) = scripted(2 * MIB, vec![Ok(vec![(0, 2 * MIB)])]);
    assert!(url(&active, None).await.is_some(), "not known yet");
    sleep(Duration::from_secs(1)).await;
    assert_eq!(url(&active, None).await, None);
}

#[tokio::test(start_paused = true)]
async fn client_that_asks_again_is_served_from_here() {
    let (bucket, active) = unverified();
    let resuming = RedirectClient {
        is_resuming: true,
        ..CLIENT
    };
    let other = client();
    assert!(url_for(&active, None, CLIENT).await.is_some());
    assert!(url_for(&active, None, CLIENT).await.is_none(), "a retry");
    assert!(url_for(&active, None, other).await.is_some(), "another client");
    sleep(RETRY_PERIOD).await;
    bucket.set_clock(0);
    assert!(url_for(&active, None, CLIENT).await.is_some(), "long after it");
    assert!(url_for(&active, None, resuming).await.is_some(), "it broke off");
    assert!(
        url_for(&active, None, resuming).await.is_none(),
        "it broke off again"
    );
    assert!(url_for(&active, None, CLIENT).await.is_none());
}

#[tokio::test(start_paused = true)]
async fn object_is_looked_up_again_after_a_retry() {
    let (_, active) = unverified();
    let is_known = || active.redirects.present.get(&content(1).key()).is_some();
    assert!(url_for(&active, None, CLIENT).await.is_some() && is_known());
    assert!(url_for(&active, None, CLIENT).await.is_none() && !is_known());
}

#[tokio::test(start_paused = true)]
async fn wrong_clock_of_the_host_means_no_redirects() {
    let (bucket, active) = unverified();
    for (seconds, is_redirected) in [(12, true), (30, false), (0, true)] {
        bucket.set_clock(seconds);
        assert_eq!(url(&active, None).await.is_some(), is_redirected, "{seconds} s");
    }
}

#[tokio::test(start_paused = true)]
async fn credential_for_the_storages_name_means_no_redirect() {
    let (_, active) = scripted(2 * MIB, vec![]);
    for (host, has_credential, is_redirected) in [
        (Some("cache.example.org"), true, true),
        (Some("age.example.org"), true, true),
        (Some("a.storage.example.org"), true, true),
        (Some("storage.example.org"), true, false),
        (Some("EXAMPLE.org"), true, false),
        (None, true, false),
        (Some("storage.example.org"), false, true),
        (None, false, true),
    ] {
        let client = RedirectClient {
            host,
            has_credential,
            ..CLIENT
        };
        assert_eq!(active.redirects(true, &client), is_redirected, "{client:?}");
    }
}
