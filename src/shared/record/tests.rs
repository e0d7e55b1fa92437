//! Tests of the exchange of records, over a bucket in memory with a clock of its own. Time is paused.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::{Instant, advance};

use super::key::Class;
use super::queue::{RecordId, Update};
use super::*;
use crate::bucket::over::Over;
use crate::bucket::{BucketError, BucketFuture, Object, ObjectKey, ObjectStorage, StorageClock, in_memory};
use crate::oci::{Algorithm, Digest, Tag, UpstreamFailure};
use crate::shared::maintenance::{BucketImages, TagRecordError};
use crate::shared::tests::settings_over;
use crate::shared::{Active, SharedSettings};
use crate::telemetry::Telemetry;

/// Time at the storage when it is made.
const START: u64 = 1_000_000;

/// A bucket in memory.
pub(in crate::shared) struct Timed {
    inner: Arc<dyn ObjectStorage>,
    /// A clock for each cache, as each learns by its own responses.
    clock: StorageClock,
    started: Instant,
    /// Objects cannot be read before this time.
    silent_until: Mutex<Option<Instant>>,
    /// What others write before the next writes of this cache.
    interlopers: Mutex<Vec<(ObjectKey, Option<Bytes>)>>,
    writes: Mutex<usize>,
    /// Writes that it still accepts.
    writes_left: Mutex<usize>,
}

impl Timed {
    fn tick(&self) {
        let now = Instant::now();
        let date = UNIX_EPOCH + Duration::from_secs(START) + (now - self.started);
        // A `Date` has no fraction.
        let date = UNIX_EPOCH + Duration::from_secs(date.duration_since(UNIX_EPOCH).unwrap().as_secs());
        self.clock.learn(date, now, now);
    }

    pub(in crate::shared) fn is_silent_for(&self, period: Duration) {
        *self.silent_until.lock() = Some(Instant::now() + period);
    }

    pub(in crate::shared) fn accepts_writes(&self, number: usize) {
        *self.writes_left.lock() = number;
    }

    pub(in crate::shared) fn writes(&self) -> usize {
        *self.writes.lock()
    }

    async fn interlope(&self) -> Result<(), BucketError> {
        *self.writes.lock() += 1;
        {
            let mut left = self.writes_left.lock();
            *left = left
                .checked_sub(1)
                .ok_or(BucketError::Silent(UpstreamFailure::Timeout))?;
        }
        let next = self.interlopers.lock().pop();
        match next {
            Some((key, Some(bytes))) => self.inner.put(&key, bytes, None).await.unwrap(),
            Some((key, None)) => self.inner.delete(&key).await.unwrap(),
            None => {}
        }
        Ok(())
    }
}

impl Over for Timed {
    fn inner(&self) -> &dyn ObjectStorage {
        &*self.inner
    }

    fn get<'a>(&'a self, key: &'a ObjectKey, from: u64) -> BucketFuture<'a, Object> {
        if self
            .silent_until
            .lock()
            .is_some_and(|until| Instant::now() < until)
        {
            return Box::pin(async { Err(BucketError::Silent(UpstreamFailure::Timeout)) });
        }
        self.tick();
        self.inner.get(key, from)
    }

    fn create<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, Option<String>> {
        Box::pin(async move {
            self.interlope().await?;
            self.inner.create(key, bytes, media_type).await
        })
    }

    fn update<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        etag: &'a str,
    ) -> BucketFuture<'a, Option<String>> {
        Box::pin(async move {
            self.interlope().await?;
            self.inner.update(key, bytes, etag).await
        })
    }

    fn clock(&self) -> Option<&StorageClock> {
        Some(&self.clock)
    }
}

struct Cache {
    bucket: Arc<Timed>,
    active: Arc<Active>,
}

/// A bucket of one cache over the objects of all, and the settings for it.
pub(in crate::shared) fn settings(
    inner: &Arc<dyn ObjectStorage>,
    digit: &str,
    prefix: &str,
    started: Instant,
) -> (Arc<Timed>, SharedSettings) {
    let bucket = Arc::new(Timed {
        inner: Arc::clone(inner),
        clock: StorageClock::default(),
        started,
        silent_until: Mutex::default(),
        interlopers: Mutex::default(),
        writes: Mutex::default(),
        writes_left: Mutex::new(usize::MAX),
    });
    let keys: Vec<String> = digit.split(',').map(|digit| digit.repeat(64)).collect();
    let settings = SharedSettings {
        records: Some(RecordSettings {
            keys: RecordKeys::parse(&keys.join("\n")).unwrap(),
            prefix: prefix.into(),
            grants: true,
        }),
        ..settings_over(Arc::clone(&bucket) as Arc<dyn ObjectStorage>)
    };
    (bucket, settings)
}

impl Cache {
    fn over(inner: &Arc<dyn ObjectStorage>, digit: &str, prefix: &str, started: Instant) -> Cache {
        let (bucket, settings) = settings(inner, digit, prefix, started);
        let active = Arc::new(Active::new(settings, &Arc::default(), Telemetry::new()));
        Cache { bucket, active }
    }

    fn names(&self, id: &RecordId) -> Vec<ObjectKey> {
        let records = self.active.settings.records.as_ref().unwrap();
        records.keys.names(id.class, id.place(), &id.item)
    }

    /// Records that the tag named this digest at this moment.
    async fn confirms(&self, number: u8) -> &'static str {
        let time = (Instant::now() - self.bucket.started).as_secs() + 1;
        self.confirmed(number, time).await
    }

    async fn confirmed(&self, number: u8, time: u64) -> &'static str {
        let state = TagState::naming(variant(number)).at(time);
        self.active.update_of(&tag(), Update::Tag(state)).await.unwrap()
    }

    async fn digest(&self) -> Option<(Digest, Duration)> {
        let found = self.active.read_of::<TagState>(&tag()).await?;
        let newest = found.state.variants.first()?;
        Some((newest.digest, found.age(newest.at)))
    }
}

fn digest(number: u8) -> Digest {
    Digest::of(Algorithm::Sha256, &[number])
}

fn variant(number: u8) -> TagVariant {
    TagVariant {
        accept: 7,
        digest: digest(number),
        media_type: "application/vnd.oci.image.manifest.v1+json".parse().unwrap(),
        accepts_indexes: true,
        at: 0,
        seen_for: None,
    }
}

fn tag() -> RecordId {
    let tag: Tag = "latest".parse().unwrap();
    RecordId {
        class: Class::Tag,
        upstream: "https://registry-1.docker.io".into(),
        repository: "library/demo".parse().ok(),
        item: tag.as_str().into(),
    }
}

fn caches(keys: [&str; 2], prefixes: [&str; 2]) -> [Cache; 2] {
    let (inner, now) = (in_memory(), Instant::now());
    let [a, b] =
        [0, 1].map(|at: usize| Cache::over(&inner, keys.get(at).unwrap(), prefixes.get(at).unwrap(), now));
    [a, b]
}

#[tokio::test(start_paused = true)]
async fn record_of_one_cache_is_read_by_another() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    assert_eq!(b.digest().await, None);
    assert_eq!(a.confirms(1).await, "written");
    advance(Duration::from_millis(90_500)).await;
    let (found, age) = b.digest().await.unwrap();
    assert_eq!(found, digest(1));
    assert!((91..=93).contains(&age.as_secs()), "{age:?}: rounded up");
    assert_eq!(a.confirms(1).await, "known", "renewed after five minutes only");
    advance(Duration::from_secs(300)).await;
    assert_eq!(b.confirms(1).await, "written");
    assert!(a.digest().await.unwrap().1 < Duration::from_secs(4));
}

#[tokio::test(start_paused = true)]
async fn slow_cache_brings_no_earlier_digest_back() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    assert_eq!(a.confirms(1).await, "written");
    let earlier = (Instant::now() - a.bucket.started).as_secs() + 1;
    advance(Duration::from_secs(60)).await;
    assert_eq!(b.confirms(2).await, "written");
    assert_eq!(a.confirmed(1, earlier).await, "superseded");
    assert_eq!(a.digest().await.unwrap().0, digest(2));
}

/// The one bad interleaving: another cache writes a later digest between the read and the write.
#[tokio::test(start_paused = true)]
async fn write_between_read_and_swap_is_not_lost() {
    for is_new in [true, false] {
        let [a, b] = caches(["a", "a"], ["p", "p"]);
        let earlier = (Instant::now() - a.bucket.started).as_secs() + 1;
        if !is_new {
            a.confirms(3).await;
        }
        advance(Duration::from_secs(60)).await;
        b.confirms(2).await;
        let key = b.names(&tag()).remove(0);
        let later = b.bucket.inner.get(&key, 0).await.unwrap();
        let later = collect(later).await;
        b.bucket.inner.delete(&key).await.unwrap();
        if !is_new {
            a.confirmed(3, earlier).await;
        }
        a.bucket.interlopers.lock().push((key, Some(later)));
        let time = earlier + 1;
        assert_eq!(a.confirmed(1, time).await, "superseded", "{is_new}");
        assert_eq!(a.digest().await.unwrap().0, digest(2), "{is_new}");
    }
}

async fn collect(mut object: Object) -> Bytes {
    let mut bytes = Vec::new();
    while let Some(chunk) = object.body.chunk().await {
        bytes.extend_from_slice(&chunk.unwrap());
    }
    bytes.into()
}

#[tokio::test(start_paused = true)]
async fn swap_gives_up_after_four_losses() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    let key = a.names(&tag()).remove(0);
    // Each write finds that the object has appeared or disappeared.
    b.confirms(2).await;
    let theirs = collect(b.bucket.inner.get(&key, 0).await.unwrap()).await;
    let (there, gone) = ((key.clone(), Some(theirs)), (key.clone(), None));
    a.bucket
        .interlopers
        .lock()
        .extend([there.clone(), gone.clone(), there, gone]);
    advance(Duration::from_secs(10)).await;
    assert_eq!(a.confirms(1).await, "lost");
    assert_eq!(*a.bucket.writes.lock(), 4);
}

#[tokio::test(start_paused = true)]
async fn forged_moved_and_foreign_records_are_absent() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    a.confirms(1).await;
    let key = a.names(&tag()).remove(0);
    let sealed = collect(a.bucket.inner.get(&key, 0).await.unwrap()).await;
    // Under the name of another tag.
    let mut other = tag();
    other.item = "other".into();
    let moved = a.names(&other).remove(0);
    a.bucket.inner.put(&moved, sealed.clone(), None).await.unwrap();
    assert!(b.active.read_of::<TagState>(&other).await.is_none());
    // Another prefix or another key.
    let inner = &a.bucket.inner;
    for (digit, prefix) in [("a", "q"), ("b", "p")] {
        let foreign = Cache::over(inner, digit, prefix, a.bucket.started);
        let name = foreign.names(&tag()).remove(0);
        inner.put(&name, sealed.clone(), None).await.unwrap();
        assert_eq!(foreign.digest().await, None, "{digit} {prefix}");
        assert_eq!(foreign.confirms(2).await, "written", "what is forged is replaced");
        inner.put(&key, sealed.clone(), None).await.unwrap();
    }
    for garbage in [
        Vec::new(),
        b"{}".to_vec(),
        sealed.slice(1..).to_vec(),
        vec![b'x'; 10 * 1024 * 1024],
    ] {
        inner.put(&key, garbage.into(), None).await.unwrap();
        assert_eq!(b.digest().await, None);
    }
    assert_eq!(b.confirms(1).await, "written");
    assert!(b.digest().await.is_some());
}

#[tokio::test(start_paused = true)]
async fn key_is_replaced_while_caches_run() {
    // One cache signs with the new key, the other still with the old one.
    let [a, b] = caches(["a,b", "b,a"], ["p", "p"]);
    a.confirms(1).await;
    assert_eq!(b.digest().await.unwrap().0, digest(1));
    advance(Duration::from_secs(10)).await;
    b.confirms(2).await;
    assert_eq!(a.digest().await.unwrap().0, digest(2), "the later of both");
    advance(Duration::from_secs(10)).await;
    a.confirms(3).await;
    assert_eq!(b.digest().await.unwrap().0, digest(3));
}

fn public_id() -> RecordId {
    let mut id = tag();
    (id.class, id.item) = (Class::Public, "".into());
    id
}

fn content_id() -> RecordId {
    let mut id = tag();
    (id.class, id.item) = (Class::Content, digest(1).to_string().into());
    id
}

fn public(at: u64, is_public: bool) -> Update {
    Update::Public(PublicState { at, is_public })
}

fn content(at: u64, deleted_at: u64) -> Update {
    Update::Content(ContentState {
        at,
        deleted_at,
        children: [digest(9)].into(),
    })
}

#[tokio::test(start_paused = true)]
async fn denial_outlives_the_replacement_of_a_key() {
    let [old, new] = caches(["a,b", "b,a"], ["p", "p"]);
    old.confirms(1).await;
    for (id, update) in [(public_id(), public(1, true)), (content_id(), content(1, 0))] {
        assert_eq!(old.active.update_of(&id, update).await.unwrap(), "written");
    }
    advance(Duration::from_secs(10)).await;
    let unnamed = Update::Tag(TagState::unnamed(1).at(9));
    for (id, update) in [
        (tag(), unnamed),
        (public_id(), public(9, false)),
        (content_id(), content(0, 9)),
    ] {
        assert_eq!(new.active.update_of(&id, update).await.unwrap(), "written");
    }
    // Also without the old key.
    let last = Cache::over(&new.bucket.inner, "b", "p", new.bucket.started);
    for cache in [&old, &new, &last] {
        let active = &cache.active;
        let named = active.read_of::<TagState>(&tag()).await.unwrap();
        assert!(named.state.variants.is_empty());
        let public = active.read_of::<PublicState>(&public_id()).await.unwrap();
        assert!(!public.state.is_public);
        let content = active.read_of::<ContentState>(&content_id()).await.unwrap();
        assert!(!content.state.is_present());
    }
}

#[tokio::test(start_paused = true)]
async fn renewal_takes_over_what_an_old_key_sealed() {
    let [old, new] = caches(["a,b", "b,a"], ["p", "p"]);
    let update = async |cache: &Cache, update| cache.active.update_of(&public_id(), update).await.unwrap();
    update(&new, public(1, true)).await;
    advance(Duration::from_secs(10)).await;
    update(&old, public(9, false)).await;
    assert_eq!(update(&new, public(5, true)).await, "superseded");
    let last = Cache::over(&new.bucket.inner, "b", "p", new.bucket.started);
    let found = last.active.read_of::<PublicState>(&public_id()).await.unwrap();
    assert!(!found.state.is_public);
}

#[tokio::test(start_paused = true)]
async fn copy_on_a_disk_passes_no_deletion() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    let is_present = async || {
        let found = b.active.read_of::<ContentState>(&content_id()).await.unwrap();
        found.state.is_present()
    };
    let update = async |update| a.active.update_of(&content_id(), update).await.unwrap();
    assert_eq!(update(content(0, 0)).await, "written");
    assert!(is_present().await);
    advance(Duration::from_secs(10)).await;
    update(content(0, 5)).await;
    advance(Duration::from_secs(10)).await;
    update(content(0, 0)).await;
    assert!(!is_present().await);
    assert_eq!(update(content(15, 0)).await, "written");
    assert!(is_present().await, "pushed again");
}

#[tokio::test(start_paused = true)]
async fn denial_waits_until_the_bucket_can_be_read() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    a.active.update_of(&public_id(), public(1, true)).await.unwrap();
    a.active.conditions.set(true).unwrap();
    let silent_until = Instant::now() + Duration::from_secs(600);
    *a.bucket.silent_until.lock() = Some(silent_until);
    let updates = &a.active.records.as_ref().unwrap().updates;
    updates.push(public_id(), public(5, false), 0);
    updates.push(tag(), Update::Tag(TagState::naming(variant(1)).at(5)), 0);
    tokio::spawn(work(Arc::clone(&a.active)));
    updates.drained(|| false).await;
    assert!(Instant::now() >= silent_until);
    let found = b.active.read_of::<PublicState>(&public_id()).await.unwrap();
    assert!(!found.state.is_public);
}

#[tokio::test(start_paused = true)]
async fn unread_record_is_told_from_an_absent_one() {
    let [a, _] = caches(["a", "a"], ["p", "p"]);
    let read = async || a.active.read_raw::<PublicState>(&public_id()).await;
    assert_eq!(read().await, RecordRead::Absent);
    // Reads of other records do not use up those of public ones.
    while a.digest().await.is_some() || a.active.may_read(&ObjectKey::probe(&[0; 16])) {}
    assert_eq!(read().await, RecordRead::Absent);
    *a.bucket.silent_until.lock() = Some(Instant::now() + Duration::from_secs(1));
    assert_eq!(read().await, RecordRead::Unread { is_capped: false });
}

#[tokio::test(start_paused = true)]
async fn record_from_the_future_counts_as_old() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    assert_eq!(
        a.confirmed(1, 3600).await,
        "written",
        "the storage's clock was ahead"
    );
    let (_, age) = b.digest().await.unwrap();
    assert!(age > Duration::from_secs(START), "{age:?}");
    assert_eq!(b.confirms(2).await, "written");
    assert_eq!(a.digest().await.unwrap().0, digest(2));
}

#[tokio::test(start_paused = true)]
async fn deletion_creates_no_record_and_ends_one() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    let delete = async |time| {
        let state = TagState::unnamed(1).at(time);
        a.active.update_of(&tag(), Update::Tag(state)).await.unwrap()
    };
    assert_eq!(delete(1).await, "not-needed");
    a.confirms(1).await;
    advance(Duration::from_secs(5)).await;
    assert_eq!(delete(5).await, "written");
    assert_eq!(b.digest().await, None);
    let denied = Update::Public(PublicState {
        at: 6,
        is_public: false,
    });
    let mut id = tag();
    (id.class, id.item) = (Class::Public, "".into());
    assert_eq!(a.active.update_of(&id, denied).await.unwrap(), "not-needed");
}

#[tokio::test(start_paused = true)]
async fn storage_without_conditions_gets_content_records_only() {
    let [a, _] = caches(["a", "a"], ["p", "p"]);
    a.confirms(1).await;
    a.active.conditions.set(false).unwrap();
    assert_eq!(a.digest().await, None, "it may be an earlier one");
    let records = a.active.records.as_ref().unwrap();
    tokio::spawn(work(Arc::clone(&a.active)));
    let (mut content, before) = (tag(), *a.bucket.writes.lock());
    (content.class, content.item) = (Class::Content, digest(1).to_string().into());
    records
        .updates
        .push(tag(), Update::Tag(TagState::naming(variant(2)).at(5)), 0);
    let seen = ContentState {
        at: 5,
        deleted_at: 0,
        children: [digest(9)].into(),
    };
    records
        .updates
        .push(content.clone(), Update::Content(seen.clone()), 0);
    records.updates.drained(|| false).await;
    assert_eq!(*a.bucket.writes.lock(), before + 1);
    let found: Dated<ContentState> = a.active.read_of(&content).await.unwrap();
    assert_eq!(found.state.children, seen.children);
}

#[tokio::test(start_paused = true)]
async fn removed_tag_record_takes_no_earlier_digest() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    let operator = BucketImages::new(b.active.settings.clone());
    let (place, name) = (place(), "latest".parse().unwrap());
    assert_eq!(operator.unname(&place, &name).await, Ok(false), "there is none");
    assert!(b.bucket.inner.get(&a.names(&tag()).remove(0), 0).await.is_err());
    a.confirms(1).await;
    let earlier = (Instant::now() - a.bucket.started).as_secs() + 1;
    advance(Duration::from_secs(60)).await;
    assert_eq!(operator.unname(&place, &name).await, Ok(true));
    assert_eq!(a.digest().await, None);
    assert_eq!(
        operator.unname(&place, &name).await,
        Ok(false),
        "it names nothing"
    );
    assert_eq!(
        a.confirmed(1, earlier).await,
        "superseded",
        "a cache that was cut off"
    );
    assert_eq!(a.digest().await, None);
    // Both times have a precision of two seconds.
    advance(Duration::from_secs(4)).await;
    assert_eq!(a.confirms(1).await, "written");
    assert_eq!(
        operator.tag(&place, &name).await.unwrap().unwrap().digests.len(),
        1
    );
}

/// The one bad interleaving: a cache names a digest between the read and the write of the operator.
#[tokio::test(start_paused = true)]
async fn tag_named_during_its_removal_is_removed() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    let operator = BucketImages::new(b.active.settings.clone());
    a.confirms(1).await;
    advance(Duration::from_secs(60)).await;
    a.confirms(2).await;
    let key = a.names(&tag()).remove(0);
    let later = collect(a.bucket.inner.get(&key, 0).await.unwrap()).await;
    b.bucket.interlopers.lock().push((key, Some(later)));
    assert_eq!(
        operator.unname(&place(), &"latest".parse().unwrap()).await,
        Ok(true)
    );
    assert_eq!(*b.bucket.writes.lock(), 2);
    assert_eq!(a.digest().await, None);
}

#[tokio::test(start_paused = true)]
async fn tag_record_that_cannot_be_read_has_a_reason() {
    let [a, b] = caches(["a", "a"], ["p", "p"]);
    a.confirms(1).await;
    let (operator, name) = (
        BucketImages::new(b.active.settings.clone()),
        "latest".parse().unwrap(),
    );
    let key = a.names(&tag()).remove(0);
    let bytes = Bytes::from_static(b"damaged");
    b.bucket.inner.put(&key, bytes, None).await.unwrap();
    let reason = |error: TagRecordError| error.to_string();
    let error = operator.tag(&place(), &name).await.map_err(reason).unwrap_err();
    assert!(error.contains("it is damaged"), "{error}");
    b.bucket.is_silent_for(Duration::from_secs(1));
    let error = operator.tag(&place(), &name).await.map_err(reason).unwrap_err();
    assert!(error.contains("the bucket"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn removal_of_a_tag_covers_every_key() {
    let [old, both] = caches(["a", "b,a"], ["p", "p"]);
    old.confirms(1).await;
    advance(Duration::from_secs(60)).await;
    let operator = BucketImages::new(both.active.settings.clone());
    assert_eq!(
        operator.unname(&place(), &"latest".parse().unwrap()).await,
        Ok(true)
    );
    assert_eq!(both.digest().await, None);
}

fn place() -> RecordPlace {
    let RecordId {
        upstream, repository, ..
    } = tag();
    let repository = repository.unwrap();
    RecordPlace { upstream, repository }
}
