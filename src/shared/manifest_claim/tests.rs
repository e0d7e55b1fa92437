//! Tests of claims of manifests between caches over one bucket in memory. Time is paused.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

use std::time::SystemTime;

use bytes::Bytes;
use tokio::task::{JoinHandle, spawn_blocking};

use super::*;
use crate::bucket::over::Over;
use crate::bucket::{BucketError, BucketFuture, Object, ObjectInfo, ObjectStorage, in_memory};
use crate::oci::{Algorithm, UpstreamFailure};
use crate::shared::SharedSettings;
use crate::shared::claim::BootId;
use crate::shared::claims::Leases;
use crate::shared::tests::settings_over;
use crate::store::fs::MemoryFs;
use crate::store::{Settings, Store};
use crate::telemetry::Telemetry;

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}"#;

const MILLI: Duration = Duration::from_millis(1);

/// How a bucket answers.
#[derive(Clone, Copy, Default)]
struct Manner {
    /// Time until the create of a claim takes effect, and then until its reply arrives.
    create: (Duration, Duration),
    /// Time of each read.
    read: Duration,
    /// Age of all objects.
    age: Option<Duration>,
    /// Time of the create of a manifest.
    uploads: Duration,
}

/// A bucket in memory.
struct Scripted {
    inner: Arc<dyn ObjectStorage>,
    manner: Mutex<Manner>,
    /// Method and name of each request.
    requests: Mutex<Vec<String>>,
}

impl Scripted {
    fn new(manner: Manner) -> Arc<Self> {
        Arc::new(Self {
            inner: in_memory(),
            manner: Mutex::new(manner),
            requests: Mutex::default(),
        })
    }

    async fn read(&self, method: &str, key: &ObjectKey) -> Option<Duration> {
        self.requests.lock().push(format!("{method} {key}"));
        let manner = *self.manner.lock();
        sleep(manner.read).await;
        manner.age
    }

    fn count(&self, method: &str) -> usize {
        let requests = self.requests.lock();
        requests.iter().filter(|line| line.starts_with(method)).count()
    }

    async fn has_claim(&self) -> bool {
        self.inner
            .head(&ObjectKey::manifest_claim(&digest()))
            .await
            .is_ok()
    }

    async fn has_manifest(&self) -> bool {
        self.inner.head(&ObjectKey::manifest(&digest())).await.is_ok()
    }

    /// Another cache claims the manifest.
    async fn claim(&self) {
        let record = ClaimRecord::new(&BootId::random());
        let key = ObjectKey::manifest_claim(&digest());
        self.inner
            .put(&key, record.to_bytes().into(), None)
            .await
            .unwrap();
    }
}

impl Over for Scripted {
    fn inner(&self) -> &dyn ObjectStorage {
        &*self.inner
    }

    fn get<'a>(&'a self, key: &'a ObjectKey, from: u64) -> BucketFuture<'a, Object> {
        Box::pin(async move {
            let age = self.read("GET", key).await;
            let mut object = self.inner.get(key, from).await?;
            object.info.age = age;
            Ok(object)
        })
    }

    fn head<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ObjectInfo> {
        Box::pin(async move {
            self.read("HEAD", key).await;
            self.inner.head(key).await
        })
    }

    fn create<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, Option<String>> {
        Box::pin(async move {
            self.requests.lock().push(format!("CREATE {key}"));
            let is_claim = key.as_str().contains("/claims/");
            let Manner {
                create: (before, after),
                uploads,
                ..
            } = *self.manner.lock();
            sleep(if is_claim { before } else { uploads }).await;
            let created = self.inner.create(key, bytes, media_type).await;
            sleep(after * u32::from(is_claim)).await;
            created
        })
    }

    fn delete<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ()> {
        self.requests.lock().push(format!("DELETE {key}"));
        self.inner.delete(key)
    }
}

fn digest() -> Digest {
    Digest::of(Algorithm::Sha256, MANIFEST)
}

/// One cache over a bucket. No task works on its queue of uploads.
struct Cache {
    active: Arc<Active>,
    leases: Arc<Leases>,
    store: AsyncStore,
}

impl Cache {
    async fn new(bucket: &Arc<Scripted>) -> Self {
        Self::with(bucket, |_| {}).await
    }

    async fn with(bucket: &Arc<Scripted>, change: impl FnOnce(&mut SharedSettings)) -> Self {
        let mut settings = SharedSettings {
            claims: true,
            ..settings_over(Arc::clone(bucket) as Arc<dyn ObjectStorage>)
        };
        change(&mut settings);
        let leases = Arc::default();
        let active = Arc::new(Active::new(settings, &leases, Telemetry::new()));
        active.conditions.set(true).unwrap();
        let open = || {
            Store::open(
                &Settings::default(),
                Arc::new(MemoryFs::new()),
                SystemTime::UNIX_EPOCH,
            )
        };
        let store = AsyncStore::new(Arc::new(spawn_blocking(open).await.unwrap().unwrap()));
        Self {
            active,
            leases,
            store,
        }
    }

    async fn turn(&self) -> ManifestTurn {
        self.active.manifest_turn(digest(), &self.store).await
    }

    /// Its turn, and the time until then.
    async fn does(&self) -> (&'static str, Duration) {
        let began = Instant::now();
        let name = match self.turn().await {
            ManifestTurn::Leads(_) => "leads",
            ManifestTurn::Alone => "alone",
            ManifestTurn::Written => "reads",
        };
        (name, began.elapsed())
    }

    fn begins(self) -> JoinHandle<(&'static str, Duration)> {
        tokio::spawn(async move { self.does().await })
    }

    async fn leads(&self) -> ManifestLease {
        match self.turn().await {
            ManifestTurn::Leads(lease) => lease,
            ManifestTurn::Alone => panic!("without a claim"),
            ManifestTurn::Written => panic!("the bucket has it"),
        }
    }

    /// The manifest arrives.
    async fn stores(&self) {
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let (media_type, repository) = (media_type.parse().unwrap(), "team/demo".parse().unwrap());
        let bytes = Bytes::from_static(MANIFEST);
        let stored = self
            .store
            .write(move |store| store.put_manifest(bytes, media_type, digest(), "registry", &repository));
        stored.await.unwrap();
    }
}

/// Other tasks run until nothing is left to do at this time.
async fn settle() {
    sleep(MILLI).await;
}

#[tokio::test(start_paused = true)]
async fn one_cache_requests_a_manifest_and_others_read_it() {
    let bucket = Scripted::new(Manner::default());
    let owner = Cache::new(&bucket).await;
    let lease = owner.leads().await;
    assert_eq!(
        bucket.requests.lock().len(),
        1,
        "the create alone: {:?}",
        bucket.requests.lock()
    );
    let followers = [
        Cache::new(&bucket).await.begins(),
        Cache::new(&bucket).await.begins(),
    ];
    sleep(LOOK * 2).await;
    assert!(followers.iter().all(|follower| !follower.is_finished()));
    owner.stores().await;
    // Layers fill the queue, and no task works on it.
    assert!(lease.stored(digest()));
    for follower in followers {
        assert_eq!(follower.await.unwrap().0, "reads");
    }
    assert!(
        bucket.has_claim().await,
        "for caches that looked for the manifest before"
    );
    sleep(LINGER).await;
    assert!(!bucket.has_claim().await && bucket.has_manifest().await);
    assert_eq!(
        (bucket.count("CREATE v1/claims"), bucket.count("DELETE v1/claims")),
        (3, 1)
    );
    assert!(owner.active.uploads.waiting() == 0);
}

/// The bad interleaving: the manifest is written between a look for it and the create of the claim.
#[tokio::test(start_paused = true)]
async fn manifest_written_since_the_look_is_not_requested() {
    let bucket = Scripted::new(Manner::default());
    let (owner, other) = (Cache::new(&bucket).await, Cache::new(&bucket).await);
    let lease = owner.leads().await;
    owner.stores().await;
    assert!(lease.stored(digest()));
    while !bucket.has_manifest().await {
        settle().await;
    }
    settle().await;
    let (name, took) = other.does().await;
    assert_eq!(name, "reads");
    assert!(took < LOOK, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn wait_for_an_owner_ends_after_a_second_and_once() {
    let bucket = Scripted::new(Manner::default());
    std::mem::forget(Cache::new(&bucket).await.leads().await);
    let other = Cache::new(&bucket).await;
    assert_eq!(other.does().await, ("alone", FOLLOW_MAX));
    let (name, took) = other.does().await;
    assert!(name == "alone" && took < LOOK, "{took:?}");
    // Another claim is another cache at work.
    bucket.claim().await;
    assert_eq!(other.does().await, ("alone", FOLLOW_MAX));
}

#[tokio::test(start_paused = true)]
async fn wait_that_is_cut_off_is_not_repeated() {
    let bucket = Scripted::new(Manner::default());
    bucket.claim().await;
    let other = Cache::new(&bucket).await;
    assert!(timeout_at(Instant::now() + LOOK * 2, other.turn()).await.is_err());
    let (name, took) = other.does().await;
    assert!(name == "alone" && took < LOOK, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn claim_of_a_killed_cache_is_waited_for_by_no_cache() {
    for (age, waits) in [(5, true), (6, false)] {
        let bucket = Scripted::new(Manner {
            age: Some(Duration::from_secs(age)),
            ..Manner::default()
        });
        bucket.claim().await;
        let (name, took) = Cache::new(&bucket).await.does().await;
        assert_eq!((name, took >= FOLLOW_MAX), ("alone", waits), "{age} s: {took:?}");
        assert!(waits || took < LOOK, "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn claim_that_is_none_is_waited_for_by_no_cache() {
    let bucket = Scripted::new(Manner::default());
    let key = ObjectKey::manifest_claim(&digest());
    bucket.inner.put(&key, "no claim".into(), None).await.unwrap();
    let (name, took) = Cache::new(&bucket).await.does().await;
    assert!(name == "alone" && took < LOOK, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn failed_request_ends_the_claim_and_the_wait() {
    let bucket = Scripted::new(Manner::default());
    let lease = Cache::new(&bucket).await.leads().await;
    let follower = Cache::new(&bucket).await.begins();
    sleep(LOOK / 2).await;
    drop(lease);
    settle().await;
    assert!(!bucket.has_claim().await);
    let (name, took) = follower.await.unwrap();
    assert!(name == "alone" && took <= LOOK * 2, "{took:?}");
}

/// The tag moved between the `HEAD` and the `GET`.
#[tokio::test(start_paused = true)]
async fn claim_ends_if_another_manifest_arrives() {
    let bucket = Scripted::new(Manner::default());
    let lease = Cache::new(&bucket).await.leads().await;
    assert!(!lease.stored(Digest::of(Algorithm::Sha256, b"other")));
    settle().await;
    assert!(!bucket.has_claim().await);
}

/// The store failed, or does not keep the manifest because nothing proves that the registry sent it.
#[tokio::test(start_paused = true)]
async fn claim_ends_if_the_manifest_is_not_stored() {
    let bucket = Scripted::new(Manner::default());
    let owner = Cache::new(&bucket).await;
    assert!(owner.leads().await.stored(digest()));
    while bucket.has_claim().await {
        settle().await;
    }
    assert!(!bucket.has_manifest().await);
}

#[tokio::test(start_paused = true)]
async fn claim_of_a_request_that_has_ended_is_deleted() {
    // The reply arrives after the request has ended, and takes effect before and after that.
    for create in [(200, 0), (0, 200), (3000, 0), (50, 3000)] {
        let create = (MILLI * create.0, MILLI * create.1);
        let bucket = Scripted::new(Manner {
            create,
            ..Manner::default()
        });
        let cache = Cache::new(&bucket).await;
        let cancelled = timeout_at(Instant::now() + MILLI * 100, cache.turn()).await;
        assert!(cancelled.is_err());
        sleep(create.0 + create.1).await;
        assert!(!bucket.has_claim().await, "{create:?}");
        assert_eq!(bucket.count("DELETE v1/claims"), 1);
        assert!(!bucket.has_claim().await);
    }
}

#[tokio::test(start_paused = true)]
async fn slow_create_delays_by_300_ms_and_is_deleted() {
    let bucket = Scripted::new(Manner {
        create: (Duration::from_secs(2), Duration::ZERO),
        ..Manner::default()
    });
    let cache = Cache::new(&bucket).await;
    assert_eq!(cache.does().await, ("alone", CREATE_WAIT));
    assert!(!bucket.has_claim().await);
    sleep(Duration::from_secs(2)).await;
    assert!(!bucket.has_claim().await);
    assert_eq!(bucket.count("DELETE v1/claims"), 1, "it was won too late");
}

/// Three waits of 300 ms, and then none until a probe succeeds.
#[tokio::test(start_paused = true)]
async fn slow_creates_switch_claims_of_manifests_off() {
    let bucket = Scripted::new(Manner {
        create: (MILLI * 700, Duration::ZERO),
        ..Manner::default()
    });
    let cache = Cache::new(&bucket).await;
    let is_off = |cache: &Cache| {
        cache
            .active
            .claims
            .manifests
            .breaker
            .lock()
            .open_since()
            .is_some()
    };
    for _ in 0..3 {
        assert!(!is_off(&cache));
        assert_eq!(cache.does().await, ("alone", CREATE_WAIT));
        // The bucket answers the create meanwhile.
        sleep(Duration::from_secs(1)).await;
    }
    assert!(is_off(&cache));
    assert!(cache.active.may_claim(), "blobs are claimed as before");
    assert_eq!(cache.does().await, ("alone", CREATE_WAIT), "the probe");
    sleep(Duration::from_secs(1)).await;
    assert_eq!(cache.does().await, ("alone", Duration::ZERO));
    assert_eq!(bucket.count("CREATE v1/claims"), 4);
    *bucket.manner.lock() = Manner::default();
    sleep(Duration::from_secs(30)).await;
    assert_eq!(cache.does().await.0, "leads");
    assert!(!is_off(&cache));
}

/// Some storages take seconds to refuse all but one of many simultaneous creates.
#[tokio::test(start_paused = true)]
async fn slow_refusal_of_a_create_is_not_waited_for() {
    let bucket = Scripted::new(Manner::default());
    let owner = Cache::new(&bucket).await;
    let lease = owner.leads().await;
    bucket.manner.lock().create = (Duration::from_secs(5), Duration::ZERO);
    let follower = Cache::new(&bucket).await.begins();
    sleep(CREATE_WAIT).await;
    owner.stores().await;
    assert!(lease.stored(digest()));
    let (name, took) = follower.await.unwrap();
    assert!(name == "reads" && took < FOLLOW_MAX, "{took:?}");
    // The claim was gone when the create took effect.
    sleep(Duration::from_secs(5)).await;
    assert!(!bucket.has_claim().await);
}

/// Every read of the bucket takes as long as it may.
#[tokio::test(start_paused = true)]
async fn slow_reads_delay_by_a_second_at_most() {
    let bucket = Scripted::new(Manner {
        read: MILLI * 900,
        ..Manner::default()
    });
    bucket.claim().await;
    let (name, took) = Cache::new(&bucket).await.does().await;
    assert!(name == "alone" && took <= FOLLOW_MAX, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn claims_of_manifests_end_at_shutdown() {
    let bucket = Scripted::new(Manner::default());
    let owner = Cache::new(&bucket).await;
    let lease = owner.leads().await;
    owner.leases.close().await;
    assert!(!bucket.has_claim().await, "of a request that runs");
    assert!(!lease.stored(digest()));
    assert_eq!(owner.does().await.0, "alone");

    let owner = Cache::new(&bucket).await;
    let lease = owner.leads().await;
    owner.stores().await;
    assert!(lease.stored(digest()));
    while !bucket.has_manifest().await {
        settle().await;
    }
    let began = Instant::now();
    owner.leases.close().await;
    assert!(
        !bucket.has_claim().await && began.elapsed() < LINGER / 2,
        "of one that was uploaded"
    );
}

#[tokio::test(start_paused = true)]
async fn claim_ends_at_a_reload() {
    let bucket = Scripted::new(Manner::default());
    let owner = Cache::new(&bucket).await;
    let lease = owner.leads().await;
    owner.stores().await;
    owner.active.uploads.close();
    assert!(!lease.stored(digest()), "it is offered to the next bucket");
    settle().await;
    assert!(!bucket.has_claim().await);
}

#[tokio::test(start_paused = true)]
async fn no_claims_where_they_are_off_or_capped() {
    let bucket = Scripted::new(Manner::default());
    bucket.claim().await;
    let reads = Cache::with(&bucket, |settings| settings.write = false).await;
    let off = Cache::with(&bucket, |settings| settings.claims = false).await;
    let capped = Cache::new(&bucket).await;
    while capped.active.claims.may_look() {}
    let denied = Cache::new(&bucket).await;
    let refused = Err::<(), _>(BucketError::Denied("AccessDenied".into()));
    denied.active.record_claim("claim-put", &refused, Instant::now());
    for cache in [reads, off, capped, denied] {
        assert_eq!(cache.does().await, ("alone", Duration::ZERO));
    }
    assert_eq!(*bucket.requests.lock(), Vec::<String>::new());
}

/// The one bad interleaving: the reply to a create arrives while the claim is looked for.
#[tokio::test(start_paused = true)]
async fn create_that_is_answered_during_a_look_wins() {
    let bucket = Scripted::new(Manner {
        create: (MILLI * 160, Duration::ZERO),
        read: MILLI * 200,
        ..Manner::default()
    });
    let owner = Cache::new(&bucket).await;
    assert_eq!(owner.does().await, ("leads", MILLI * 160));
}

/// The queue has begun to upload the manifest for another request.
#[tokio::test(start_paused = true)]
async fn claim_lasts_while_the_queue_uploads_the_manifest() {
    let bucket = Scripted::new(Manner::default());
    let owner = Cache::new(&bucket).await;
    let lease = owner.leads().await;
    owner.stores().await;
    let (active, store) = (Arc::clone(&owner.active), owner.store.clone());
    bucket.manner.lock().uploads = Duration::from_secs(2);
    owner.active.enqueue(crate::shared::upload::Item::new(
        SharedContent::Manifest(digest()),
        crate::shared::upload::Mode::Create,
    ));
    let queue = tokio::spawn(crate::shared::upload::work(active, store));
    settle().await;
    assert!(lease.stored(digest()));
    sleep(Duration::from_secs(1)).await;
    assert!(bucket.has_claim().await && !bucket.has_manifest().await);
    sleep(Duration::from_secs(1) + LINGER / 2).await;
    assert!(bucket.has_claim().await && bucket.has_manifest().await);
    sleep(LINGER).await;
    assert!(!bucket.has_claim().await);
    queue.abort();
}

/// The bad interleaving: writes stop, or the settings are replaced, while a manifest waits for a permit.
#[tokio::test(start_paused = true)]
async fn upload_that_waited_heeds_a_bucket_without_writes() {
    for is_closed in [false, true] {
        let bucket = Scripted::new(Manner::default());
        let owner = Cache::new(&bucket).await;
        owner.stores().await;
        let (active, content) = (&owner.active, SharedContent::Manifest(digest()));
        let permits = Semaphore::new(0);
        let mut upload = std::pin::pin!(upload_at_once(active, &owner.store, content, &permits));
        assert!(futures_util::FutureExt::now_or_never(upload.as_mut()).is_none());
        if is_closed {
            active.uploads.close();
        } else {
            let silent = Err::<(), _>(BucketError::Silent(UpstreamFailure::Timeout));
            for _ in 0..3 {
                active.record_write("create", &silent, Duration::ZERO);
            }
        }
        permits.add_permits(1);
        assert!(!upload.await);
        assert_eq!(bucket.count("CREATE v1/manifests"), 0);
        assert_eq!(active.uploads.waiting(), usize::from(!is_closed));
    }
}
