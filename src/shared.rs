//! Shared storage: a bucket behind the store, from which several caches read and to which they write.
//!
//! The bucket is an economy and never a condition. A read that fails, takes too long or brings wrong bytes is a miss, and
//! the upstream is asked instead. An upload that fails is dropped. The caller verifies every byte, as those of an
//! upstream, and has established the client's right before it looks anything up here.
//!
//! * `conditions`: the probe of conditional writes.
//! * `claim`: which of several caches fetches a blob; `claims` are the requests for that, `lease` keeps a claim, `follow`
//!   reads what another cache fetches. `manifest_claim`: which of them requests a manifest.
//! * `redirect`: presigned URLs for clients.
//! * `breaker`: when the bucket is not asked. `rate`: the cap of requests. `pace`: the minimum rate of a body. `upload`:
//!   the queue of uploads.
//! * `record`: what caches with one key tell each other beside the bytes. `revocations`: denials that the bucket lacks.
//! * `maintenance`: inventory and garbage collection, for the operator.

mod breaker;
mod claim;
mod claims;
mod conditions;
mod follow;
mod lease;
pub mod maintenance;
mod manifest_claim;
mod pace;
mod rate;
mod record;
mod redirect;
mod revocations;
#[cfg(all(test, feature = "shared"))]
mod tests;
mod upload;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep_until, timeout};

pub use self::claims::{ClaimMemory, ClaimRead, Entered};
pub use self::conditions::{Conditions, probe};
pub use self::follow::Follower;
pub use self::lease::{Arriving, ArrivingFuture, Lease};
pub use self::manifest_claim::{ManifestLease, ManifestTurn};
pub use self::record::{
    CHILDREN_MAX, ContentState, Dated, GrantState, KEYS_MAX, KeyFileError, PublicState, RecordKeys,
    RecordPlace, RecordPrincipal, RecordRead, RecordReader, RecordSettings, TagState, TagVariant,
};
pub use self::redirect::{
    REDIRECT_BYTES_MIN, RedirectClient, RedirectMode, RedirectSettings, forwards_credential,
};

use self::breaker::{Admission, Breaker, Outcome, Transition};
use self::claims::{Claims, Leases};
use self::pace::Pace;
use self::rate::Rate;
use self::record::Records;
use self::redirect::{Found, Redirects};
use self::revocations::Revocations;
use self::upload::{Item, Mode, Uploads};
use crate::bucket::{BucketError, Fault, Object, ObjectInfo, ObjectKey, ObjectStorage};
use crate::oci::{Digest, UpstreamFailure};
use crate::store::AsyncStore;
use crate::telemetry::Telemetry;

/// How long an object is not read after it had wrong bytes or could not be read.
const WRONG_PERIOD: Duration = Duration::from_secs(60 * 60);

/// How long an object is not read after its bytes stopped, so that the upstream continues it at once.
const STALLED_PERIOD: Duration = Duration::from_secs(30);

/// Most bytes that a probe of a body reads.
const PROBE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Longest time for a complete read, of which the first byte is a part.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Objects that are not read and are remembered.
const REFUSED_MAX: usize = 1024;

/// How long a blob that the bucket was seen to have counts as present.
const SEEN_PERIOD: Duration = Duration::from_secs(60);

/// Blobs that the bucket was seen to have and are remembered.
const SEEN_MAX: usize = 16_384;

/// Settings of the shared storage.
#[derive(Clone)]
pub struct SharedSettings {
    /// The bucket.
    pub bucket: Arc<dyn ObjectStorage>,
    /// Its name, for the operator.
    pub name: Arc<str>,
    /// Whether this cache writes to it.
    pub write: bool,
    /// Whether blobs and manifests are claimed, so that one of several caches fetches them.
    pub claims: bool,
    /// Longest time that a client waits for the bucket's first byte.
    pub wait_max: Duration,
    /// Age at which the bucket deletes objects.
    pub keep: Duration,
    /// Concurrent uploads.
    pub uploads_max: usize,
    /// Settings of the records; without them, only bytes are shared.
    pub records: Option<RecordSettings>,
    /// Redirects of clients.
    pub redirect: RedirectSettings,
}

/// Content in the shared storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SharedContent {
    /// A blob.
    Blob(Digest),
    /// A manifest.
    Manifest(Digest),
}

impl SharedContent {
    fn key(self) -> ObjectKey {
        match self {
            Self::Blob(digest) => ObjectKey::blob(&digest),
            Self::Manifest(digest) => ObjectKey::manifest(&digest),
        }
    }

    /// Its digest.
    pub fn digest(self) -> Digest {
        match self {
            Self::Blob(digest) | Self::Manifest(digest) => digest,
        }
    }
}

/// State of the shared storage, for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedStatus {
    /// Name of the bucket.
    pub name: Arc<str>,
    /// Whether this cache writes to it.
    pub write: bool,
    /// Whether the storage lets one of simultaneous conditional writes win, if that was probed.
    pub conditions_kept: Option<bool>,
    /// How long reads have been stopped, and the last failure.
    pub reads_stopped: Option<(Duration, Arc<str>)>,
    /// How long writes have been stopped, and the last failure.
    pub writes_stopped: Option<(Duration, Arc<str>)>,
    /// Denials that the bucket does not have yet, and how long the first one has waited.
    pub revocations_waiting: Option<(usize, Duration)>,
}

/// The shared storage of the process. Without settings it is off, and every read is a miss.
pub struct SharedStorage {
    active: ArcSwapOption<Active>,
    leases: Arc<Leases>,
    revocations: Arc<Revocations>,
    store: AsyncStore,
    telemetry: Telemetry,
}

/// The state of one bucket. A reload that changes the settings replaces it; what runs over the old one ends there.
struct Active {
    settings: SharedSettings,
    reads: Mutex<Guarded>,
    writes: Mutex<Guarded>,
    rate: Mutex<Rate>,
    /// Objects that are not read.
    refused: Cache<ObjectKey, Refusal>,
    /// Blobs that the bucket was seen to have.
    seen: Cache<Digest, Instant>,
    /// The object whose body failed last, and the first byte that did not arrive.
    stalled: Mutex<Option<(ObjectKey, u64)>>,
    /// Bytes of all objects that were read.
    received: AtomicU64,
    uploads: Uploads,
    claims: Claims,
    records: Option<Records>,
    redirects: Redirects,
    /// Whether the storage keeps conditions, by the probe before the first upload.
    conditions: OnceCell<bool>,
    telemetry: Telemetry,
}

/// Why an object is not read for some time.
#[derive(Clone, Copy)]
struct Refusal {
    until: Instant,
    /// Its bytes are wrong or cannot be read, so it is replaced when the right bytes are offered.
    is_wrong: bool,
}

/// A breaker and the last failure.
#[derive(Default)]
struct Guarded {
    breaker: Breaker,
    failure: Option<Arc<str>>,
}

/// Why content was not read from the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// The bucket lacks it.
    Absent,
    /// The bucket was not asked, did not answer, or sent something else.
    Unavailable,
}

/// An object that is being read.
pub struct SharedObject {
    /// Its properties.
    pub info: ObjectInfo,
    key: ObjectKey,
    object: Object,
    active: Arc<Active>,
    pace: Pace,
    /// Offset of the next byte.
    offset: u64,
    /// It arrived completely, or failed.
    has_ended: bool,
}

impl SharedObject {
    /// The next bytes, or `None` at the end.
    pub async fn chunk(&mut self) -> Option<Result<Bytes, BucketError>> {
        let body = self.object.body.as_mut();
        let chunk = if self.has_ended {
            None
        } else {
            self.pace.chunk(body, &self.active.received).await
        };
        match &chunk {
            None => self.arrive(),
            Some(Ok(bytes)) => {
                let count = bytes.len() as u64;
                self.offset += count;
                self.active.telemetry.shared().add_bytes("received", count);
                if self.offset >= self.info.size {
                    // A reader that knows the size reads no further.
                    self.arrive();
                }
            }
            Some(Err(error)) => self.fail(error),
        }
        chunk
    }

    fn arrive(&mut self) {
        if !self.has_ended {
            self.has_ended = true;
            self.active.note_read(Outcome::Arrived, None);
        }
    }

    fn fail(&mut self, error: &BucketError) {
        if self.has_ended {
            return;
        }
        self.has_ended = true;
        tracing::debug!(object = %self.key, %error, "an object of the shared storage broke off");
        let active = &self.active;
        active.record_request("body", &Err::<(), _>(error.clone()), None);
        if matches!(error, BucketError::Silent(UpstreamFailure::Timeout)) {
            active.refuse(&self.key, STALLED_PERIOD, false);
        }
        *active.stalled.lock() = Some((self.key.clone(), self.offset));
        active.note_read(Outcome::Stalled, Some(error));
    }
}

impl SharedStorage {
    /// Shared storage that is off.
    pub fn new(store: AsyncStore, telemetry: Telemetry) -> Self {
        Self {
            active: ArcSwapOption::empty(),
            leases: Arc::default(),
            revocations: Arc::new(Revocations::new(store.clone(), telemetry.clone())),
            store,
            telemetry,
        }
    }

    /// Sets the bucket, or switches the shared storage off. Uploads to the previous bucket that run
    /// continue, and those in its queue are dropped.
    pub fn configure(&self, settings: Option<SharedSettings>) {
        let metrics = self.telemetry.shared();
        metrics.clear_up();
        if let Some(settings) = &settings {
            metrics.set_up(&settings.name, true);
        }
        let active = settings.map(|settings| {
            let mut active = Active::new(settings, &self.leases, self.telemetry.clone());
            let previous = self.active.load();
            let previous = previous.as_ref().and_then(|previous| previous.records.as_ref());
            if let Some(records) = &mut active.records {
                records.base = previous.map_or(records.base, |previous| previous.base);
                records.revocations = Some(Arc::clone(&self.revocations));
            }
            Arc::new(active)
        });
        if let Some(active) = active.as_ref().filter(|active| active.settings.write) {
            for _ in 0..active.settings.uploads_max {
                tokio::spawn(upload::work(Arc::clone(active), self.store.clone()));
            }
            if active.settings.claims {
                active.probe_claims();
            }
            tokio::spawn(record::work(Arc::clone(active)));
        }
        if let Some(active) = &active {
            tokio::spawn(revocations::work(Arc::clone(active)));
        }
        if let Some(previous) = self.active.swap(active) {
            for _ in 0..previous.uploads.close() {
                metrics.record_upload("dropped");
            }
            if let Some(records) = &previous.records {
                self.take_over(records.updates.close());
            }
        }
    }

    /// Takes over the denials and deletions of a queue that was closed.
    fn take_over(&self, closed: record::Closed) {
        let active = self.active.load_full().filter(|active| active.settings.write);
        let records = active.as_ref().and_then(|active| active.records.as_ref());
        let mut dropped = closed.dropped;
        for (id, update, denial) in closed.urgent {
            match records {
                Some(records) => {
                    records.updates.push_again(id, (update, denial), 0, None);
                }
                None => dropped.push(id),
            }
        }
        for id in dropped {
            self.telemetry.shared().record_record(id.class.name(), "dropped");
        }
    }

    /// Whether there is a bucket that can be read now.
    pub fn is_readable(&self) -> bool {
        self.readable().is_some()
    }

    fn readable(&self) -> Option<Arc<Active>> {
        let active = self.active.load_full()?;
        let is_open = active.reads.lock().breaker.open_since().is_some();
        (!is_open).then_some(active)
    }

    /// Opens this content at the byte `from`. Fails if the bucket lacks it or cannot be read now.
    pub async fn open(&self, content: SharedContent, from: u64) -> Result<SharedObject, Unread> {
        let active = self.readable().ok_or(Unread::Unavailable)?;
        active.try_open(content.key(), from).await
    }

    /// Reads this content completely, if it has at most `bytes_max` bytes. Fails if the bucket lacks it or cannot be read
    /// now.
    pub async fn read(
        &self,
        content: SharedContent,
        bytes_max: usize,
    ) -> Result<(Bytes, SharedObject), Unread> {
        let active = self.readable().ok_or(Unread::Unavailable)?;
        active.read(content, bytes_max).await
    }

    /// Whether the bucket has this content. Presence is remembered for a minute, absence is not.
    pub async fn has(&self, content: SharedContent) -> bool {
        self.had_lately(&content.digest()) || self.size_of(content).await.is_some()
    }

    /// Whether a read of any request was not answered since then. A request that began at that time reads nothing more from
    /// the bucket, so that it waits once.
    pub fn was_silent_since(&self, since: Instant) -> bool {
        let active = self.active.load();
        active
            .as_ref()
            .is_some_and(|active| active.reads.lock().breaker.was_silent_since(since))
    }

    /// Whether the bucket was seen to have a blob within a minute.
    pub fn had_lately(&self, blob: &Digest) -> bool {
        let active = self.active.load();
        active.as_ref().is_some_and(|active| {
            let seen_at = active.seen.get(blob);
            seen_at.is_some_and(|at| at.elapsed() < SEEN_PERIOD)
        })
    }

    /// Size of this content, if the bucket has it.
    pub async fn size_of(&self, content: SharedContent) -> Option<u64> {
        let (active, key) = (self.readable()?, content.key());
        if !active.may_read(&key) {
            return None;
        }
        let began = Instant::now();
        let found = active.settings.bucket.head(&key).await;
        active.record_read("head", &found, began.elapsed());
        let found = found.ok()?;
        if let SharedContent::Blob(digest) = content {
            active.seen.insert(digest, Instant::now());
        }
        Some(found.size)
    }

    /// Whether this client is redirected to the bucket; `is_cached`: to blobs that are cached here.
    pub fn redirects(&self, is_cached: bool, client: &RedirectClient<'_>) -> bool {
        self.readable()
            .is_some_and(|active| active.redirects(is_cached, client))
    }

    /// The presigned URL of a blob. `None` if the bucket lacks it, has an object of another size, or may delete it soon; if
    /// this client was redirected to it a moment ago; or if the clock of this host, which shows `time` now and by which URLs
    /// are signed, is wrong.
    pub async fn presigned(
        &self,
        (digest, size): (Digest, Option<u64>),
        client: &RedirectClient<'_>,
        time: SystemTime,
    ) -> Option<String> {
        let active = self.readable()?;
        match active.find((digest, size), client, time).await {
            Found::Url(url) => Some(url),
            Found::Expiring(age) => {
                self.offer_renewal(SharedContent::Blob(digest), age);
                None
            }
            Found::Nothing => None,
        }
    }

    /// Reports that an object had wrong bytes. It is not read for an hour, and is replaced when the right bytes are
    /// offered.
    pub fn report_wrong(&self, content: SharedContent) {
        let Some(active) = self.active.load_full() else {
            return;
        };
        active.report_wrong(&content.key());
    }

    /// Offers content that was fetched and stored. It is uploaded in the background unless the bucket has it.
    pub fn offer(&self, content: SharedContent) {
        self.enqueue(content, Mode::Create);
    }

    /// Offers content that was read from the bucket and is stored now. If its object is old, it is written again, so that
    /// the lifecycle rule of the bucket deletes only what nobody reads.
    pub fn offer_renewal(&self, content: SharedContent, age: Option<Duration>) {
        let keep = self.active.load().as_ref().map(|active| active.settings.keep);
        if age.zip(keep).is_some_and(|(age, keep)| age > keep / 2) {
            self.enqueue(content, Mode::Renew);
        }
    }

    fn enqueue(&self, content: SharedContent, mode: Mode) {
        if let Some(active) = self.active.load_full().filter(|active| active.settings.write) {
            active.enqueue(Item::new(content, active.mode_for(content, mode)));
        }
    }

    /// Waits until no upload is queued or running, or until the bucket does not accept them.
    pub async fn drain(&self) {
        if let Some(active) = self.active.load_full() {
            active
                .uploads
                .drained(|| active.writes_open_since().is_some())
                .await;
            if let Some(records) = &active.records {
                records.updates.drained(|| active.is_stopped()).await;
            }
        }
    }

    /// State for the operator. `None`: off.
    pub fn status(&self) -> Option<SharedStatus> {
        let active = self.active.load_full()?;
        let now = Instant::now();
        let stopped = |guarded: &Guarded| {
            let since = guarded.breaker.open_since()?;
            let failure = guarded.failure.clone().unwrap_or_default();
            Some((now.saturating_duration_since(since), failure))
        };
        let (reads_stopped, writes_stopped) = (stopped(&active.reads.lock()), stopped(&active.writes.lock()));
        Some(SharedStatus {
            name: Arc::clone(&active.settings.name),
            write: active.settings.write,
            conditions_kept: active.conditions.get().copied(),
            reads_stopped,
            writes_stopped,
            revocations_waiting: self.revocations.status(),
        })
    }
}

impl Active {
    fn new(settings: SharedSettings, leases: &Arc<Leases>, telemetry: Telemetry) -> Self {
        Self {
            claims: Claims::new(leases),
            reads: Mutex::default(),
            writes: Mutex::default(),
            rate: Mutex::new(Rate::new(Instant::now())),
            refused: Cache::new(REFUSED_MAX),
            seen: Cache::new(SEEN_MAX),
            stalled: Mutex::default(),
            received: AtomicU64::new(0),
            uploads: Uploads::default(),
            records: settings.records.clone().map(Records::new),
            redirects: Redirects::default(),
            conditions: OnceCell::new(),
            telemetry,
            settings,
        }
    }

    async fn open(self: &Arc<Self>, content: SharedContent, from: u64) -> Option<SharedObject> {
        self.open_key(content.key(), from).await
    }

    async fn open_key(self: &Arc<Self>, key: ObjectKey, from: u64) -> Option<SharedObject> {
        self.try_open(key, from).await.ok()
    }

    async fn try_open(self: &Arc<Self>, key: ObjectKey, from: u64) -> Result<SharedObject, Unread> {
        if !self.may_read(&key) {
            return Err(Unread::Unavailable);
        }
        let began = Instant::now();
        let opened = self.settings.bucket.get(&key, from).await;
        match &opened {
            // Whether the bucket sends the bytes is not known yet.
            Ok(_) => self.record_request("get", &opened, Some(began.elapsed())),
            Err(_) => self.record_read("get", &opened, began.elapsed()),
        }
        self.refuse_unreadable(&key, &opened);
        let object = opened.map_err(|error| match error {
            BucketError::Absent => Unread::Absent,
            _ => Unread::Unavailable,
        })?;
        Ok(SharedObject {
            info: object.info.clone(),
            key,
            object,
            pace: Pace::new(&self.received),
            active: Arc::clone(self),
            offset: from,
            has_ended: false,
        })
    }

    async fn read(
        self: &Arc<Self>,
        content: SharedContent,
        bytes_max: usize,
    ) -> Result<(Bytes, SharedObject), Unread> {
        let mut object = self.try_open(content.key(), 0).await?;
        let size = usize::try_from(object.info.size)
            .ok()
            .filter(|size| *size <= bytes_max)
            .ok_or(Unread::Unavailable)?;
        let mut bytes = Vec::with_capacity(size);
        let reading = async {
            while let Some(chunk) = object.chunk().await {
                bytes.extend_from_slice(&chunk.ok()?);
            }
            Some(())
        };
        let Ok(read) = timeout(READ_TIMEOUT, reading).await else {
            object.fail(&BucketError::Silent(UpstreamFailure::Timeout));
            return Err(Unread::Unavailable);
        };
        read.ok_or(Unread::Unavailable)?;
        Ok((bytes.into(), object))
    }

    fn enqueue(&self, item: Item) {
        let dropped = self.uploads.push(item);
        if dropped {
            self.telemetry.shared().record_upload("dropped");
        }
        self.telemetry
            .shared()
            .set_uploads_waiting(self.uploads.waiting() as u64);
    }

    /// How this content is written: over an object that had wrong bytes, if there is one.
    fn mode_for(&self, content: SharedContent, mode: Mode) -> Mode {
        let refusal = self.refused.get(&content.key());
        if refusal.is_some_and(|refusal| refusal.is_wrong) {
            Mode::Replace
        } else {
            mode
        }
    }

    fn refuse(&self, key: &ObjectKey, period: Duration, is_wrong: bool) {
        let now = Instant::now();
        let mut refusal = Refusal {
            until: now + period,
            is_wrong,
        };
        if let Some(earlier) = self.refused.get(key).filter(|earlier| now < earlier.until) {
            refusal.until = refusal.until.max(earlier.until);
            refusal.is_wrong |= earlier.is_wrong;
        }
        self.refused.insert(key.clone(), refusal);
        self.forget_present(key);
    }

    fn refuse_unreadable<T>(&self, key: &ObjectKey, result: &Result<T, BucketError>) {
        if let Err(error @ BucketError::Unreadable(_)) = result {
            tracing::warn!(bucket = %self.settings.name, object = %key, %error,
                "an object of the shared storage is not used");
            self.refuse(key, WRONG_PERIOD, true);
        }
    }

    fn report_wrong(&self, key: &ObjectKey) {
        tracing::error!(bucket = %self.settings.name, object = %key,
            "an object of the shared storage does not match its digest, it is not used");
        self.telemetry.shared().record_wrong();
        self.refuse(key, WRONG_PERIOD, true);
    }

    /// Whether the object failed lately.
    fn is_refused(&self, key: &ObjectKey) -> bool {
        let refusal = self.refused.get(key);
        refusal.is_some_and(|refusal| Instant::now() < refusal.until)
    }

    /// Whether a request for this object may be sent: the cap is not reached, and it did not fail lately.
    fn may_read(&self, key: &ObjectKey) -> bool {
        if self.is_refused(key) {
            return false;
        }
        let may = self.rate.lock().take(Instant::now());
        if !may {
            self.telemetry.shared().record_request("get", "capped", None);
        }
        may
    }

    /// Records the result of a read.
    fn record_read<T>(
        self: &Arc<Self>,
        operation: &'static str,
        result: &Result<T, BucketError>,
        took: Duration,
    ) {
        self.record_request(operation, result, Some(took));
        self.note_read(Outcome::of(result), result.as_ref().err());
    }

    /// Records the outcome of a read, and starts the probes if the breaker opens.
    fn note_read(self: &Arc<Self>, outcome: Outcome, error: Option<&BucketError>) {
        match (note(&self.reads, outcome, error), error) {
            (Transition::Opened, Some(error)) => {
                tracing::warn!(bucket = %self.settings.name, %error,
                    "shared storage unavailable, content is fetched from the upstreams");
                self.set_up(false);
                tokio::spawn(probe_reads(Arc::clone(self)));
            }
            (Transition::Closed(after), _) => {
                tracing::info!(bucket = %self.settings.name, seconds = after.as_secs(), "shared storage available again");
                self.set_up(true);
            }
            _ => {}
        }
    }

    fn set_up(&self, is_up: bool) {
        // Otherwise the settings were replaced.
        if !self.uploads.is_closed() {
            self.telemetry.shared().set_up(&self.settings.name, is_up);
        }
    }

    /// Records the result of a write.
    fn record_write<T>(&self, operation: &'static str, result: &Result<T, BucketError>, took: Duration) {
        self.record_request(operation, result, Some(took));
        let error = result.as_ref().err();
        match (note(&self.writes, Outcome::of(result), error), error) {
            (Transition::Opened, Some(error)) => {
                tracing::warn!(bucket = %self.settings.name, %error, "shared storage accepts no uploads, they wait");
            }
            (Transition::Closed(after), _) => {
                tracing::info!(bucket = %self.settings.name, seconds = after.as_secs(),
                    "shared storage accepts uploads again");
                self.uploads.resume();
            }
            _ => {}
        }
    }

    fn record_request<T>(
        &self,
        operation: &'static str,
        result: &Result<T, BucketError>,
        took: Option<Duration>,
    ) {
        let result = result.as_ref().err().map_or("ok", BucketError::name);
        self.telemetry.shared().record_request(operation, result, took);
    }

    /// Whether the storage keeps conditions. Otherwise an upload checks first whether the object exists, which two caches
    /// may do at once: both then write the same bytes.
    async fn keeps_conditions(&self) -> Result<bool, BucketError> {
        let probed = self.conditions.get_or_try_init(|| async {
            let began = Instant::now();
            let probed = probe(&self.settings.bucket).await;
            self.record_write("probe", &probed, began.elapsed());
            let found = probed?;
            if !found.are_kept() {
                tracing::warn!(bucket = %self.settings.name, creates_won = found.creates_won,
                    updates_won = found.updates_won,
                    "the bucket ignores conditions of simultaneous writes: objects may be uploaded twice, no blob is claimed, \
                     and of the records only those of content are used");
            }
            self.telemetry
                .shared()
                .set_conditions(&self.settings.name, found.are_kept());
            Ok::<_, BucketError>(found.are_kept())
        });
        probed.await.copied()
    }

    fn admit_write(&self) -> Admission {
        self.writes.lock().breaker.admit(Instant::now())
    }

    fn writes_open_since(&self) -> Option<Instant> {
        self.writes.lock().breaker.open_since()
    }
}

fn note(guarded: &Mutex<Guarded>, outcome: Outcome, error: Option<&BucketError>) -> Transition {
    let mut guarded = guarded.lock();
    if let Some(error) = error
        && outcome != Outcome::Answered
    {
        guarded.failure = Some(error.to_string().into());
    }
    guarded.breaker.record(outcome, Instant::now())
}

/// Probes the bucket while the breaker stays open. No client waits for it.
async fn probe_reads(active: Arc<Active>) {
    let key = ObjectKey::probe(&[0; 16]);
    let opened = active.reads.lock().breaker.open_since();
    loop {
        let due = active.reads.lock().breaker.next_probe();
        let Some(due) = due else { return };
        sleep_until(due).await;
        // A breaker that was opened again has probes of its own. The queue is closed if the settings were replaced.
        if active.reads.lock().breaker.open_since() != opened || active.uploads.is_closed() {
            return;
        }
        let needs_body = active.reads.lock().breaker.needs_body();
        let stalled = active.stalled.lock().clone().filter(|_| needs_body);
        let began = Instant::now();
        if let Some((key, from)) = stalled {
            let probed = probe_body(&active, &key, from).await;
            active.record_request("probe", &probed, Some(began.elapsed()));
            let outcome = match Outcome::of(&probed) {
                Outcome::Answered => Outcome::Arrived,
                outcome => outcome,
            };
            active.note_read(outcome, probed.as_ref().err());
            continue;
        }
        // By `GET`: only the body of an error tells a missing bucket from a missing object.
        let probed = active.settings.bucket.get(&key, 0).await;
        active.record_read("probe", &probed, began.elapsed());
    }
}

/// Reads from where a body failed. If the object is gone, the next reads must tell.
async fn probe_body(active: &Active, key: &ObjectKey, from: u64) -> Result<(), BucketError> {
    let mut object = match active.settings.bucket.get(key, from).await {
        Ok(object) => object,
        Err(error) if error.fault() == Fault::None => return Ok(()),
        Err(error) => return Err(error),
    };
    let (mut pace, mut received) = (Pace::new(&active.received), 0);
    while received < PROBE_BYTES_MAX
        && let Some(chunk) = pace.chunk(object.body.as_mut(), &active.received).await
    {
        received += chunk?.len() as u64;
    }
    Ok(())
}
