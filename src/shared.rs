//! Shared storage: a bucket behind the store, from which several caches read and to which they write.
//!
//! The bucket is an economy and never a condition. A read that fails, takes too long or brings wrong bytes is a miss, and
//! the upstream is asked instead. An upload that fails is dropped. The caller verifies every byte, as those of an
//! upstream, and has established the client's right before it looks anything up here.
//!
//! * `active`: the state of one bucket. `object`: an object that is being read.
//! * `conditions`: the probe of conditional writes.
//! * `claim`: which of several caches fetches a blob; `claims` are the requests for that, `lease` keeps a claim, `follow`
//!   reads what another cache fetches. `manifest_claim`: which of them requests a manifest.
//! * `redirect`: presigned URLs for clients.
//! * `breaker`: when the bucket is not asked. `rate`: the cap of requests. `pace`: the minimum rate of a body. `upload`:
//!   the queue of uploads.
//! * `record`: what caches with one key tell each other beside the bytes. `revocations`: denials that the bucket lacks.
//! * `maintenance`: inventory and garbage collection, for the operator.

mod active;
mod breaker;
mod claim;
mod claims;
mod conditions;
mod follow;
mod lease;
pub mod maintenance;
mod manifest_claim;
mod object;
mod pace;
mod rate;
mod record;
mod redirect;
mod revocations;
#[cfg(all(test, feature = "shared"))]
mod tests;
mod upload;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use tokio::time::Instant;

pub use self::claims::{ClaimMemory, ClaimRead, Entered};
pub use self::conditions::{Conditions, probe};
pub use self::follow::Follower;
pub use self::lease::{Arriving, ArrivingFuture, Lease};
pub use self::manifest_claim::{ManifestLease, ManifestTurn};
pub use self::object::SharedObject;
pub use self::record::{
    CHILDREN_MAX, ContentState, Dated, GrantState, KEYS_MAX, KeyFileError, PublicState, RecordKeys,
    RecordPlace, RecordPrincipal, RecordRead, RecordReader, RecordSettings, TagState, TagVariant,
};
pub use self::redirect::{
    REDIRECT_BYTES_MIN, RedirectClient, RedirectMode, RedirectSettings, forwards_credential,
};

use self::active::{Active, Guarded, WRONG_PERIOD};
use self::claims::Leases;
use self::redirect::Found;
use self::revocations::Revocations;
use self::upload::{Item, Mode};
use crate::bucket::{ObjectKey, ObjectStorage};
use crate::oci::Digest;
use crate::store::AsyncStore;
use crate::telemetry::Telemetry;

/// Longest time for a complete read, of which the first byte is a part.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a blob that the bucket was seen to have counts as present.
const SEEN_PERIOD: Duration = Duration::from_secs(60);

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

/// Why content was not read from the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// The bucket lacks it.
    Absent,
    /// The bucket was not asked, did not answer, or sent something else.
    Unavailable,
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
