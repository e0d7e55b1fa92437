//! State of one bucket: its breakers, the objects that are not read from it, and its counters.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep_until, timeout};

use super::breaker::{Admission, Breaker, Outcome, Transition};
use super::claims::{Claims, Leases};
use super::conditions::probe;
use super::object::SharedObject;
use super::pace::Pace;
use super::rate::Rate;
use super::record::Records;
use super::redirect::Redirects;
use super::upload::{Item, Mode, Uploads};
use super::{READ_TIMEOUT, SharedContent, SharedSettings, Unread};
use crate::bucket::{BucketError, Fault, ObjectKey};
use crate::oci::{Digest, UpstreamFailure};
use crate::telemetry::Telemetry;

/// How long an object is not read after it had wrong bytes or could not be read.
pub(super) const WRONG_PERIOD: Duration = Duration::from_secs(60 * 60);

/// Most bytes that a probe of a body reads.
const PROBE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Objects that are not read and are remembered.
const REFUSED_MAX: usize = 1024;

/// Blobs that the bucket was seen to have and are remembered.
const SEEN_MAX: usize = 16_384;

/// The state of one bucket. A reload that changes the settings replaces it; what runs over the old one ends there.
pub(super) struct Active {
    pub(super) settings: SharedSettings,
    pub(super) reads: Mutex<Guarded>,
    pub(super) writes: Mutex<Guarded>,
    pub(super) rate: Mutex<Rate>,
    /// Objects that are not read.
    pub(super) refused: Cache<ObjectKey, Refusal>,
    /// Blobs that the bucket was seen to have.
    pub(super) seen: Cache<Digest, Instant>,
    /// The object whose body failed last, and the first byte that did not arrive.
    pub(super) stalled: Mutex<Option<(ObjectKey, u64)>>,
    /// Bytes of all objects that were read.
    pub(super) received: AtomicU64,
    pub(super) uploads: Uploads,
    pub(super) claims: Claims,
    pub(super) records: Option<Records>,
    pub(super) redirects: Redirects,
    /// Whether the storage keeps conditions, by the probe before the first upload.
    pub(super) conditions: OnceCell<bool>,
    pub(super) telemetry: Telemetry,
}

/// Why an object is not read for some time.
#[derive(Clone, Copy)]
pub(super) struct Refusal {
    pub(super) until: Instant,
    /// Its bytes are wrong or cannot be read, so it is replaced when the right bytes are offered.
    pub(super) is_wrong: bool,
}

/// A breaker and the last failure.
#[derive(Default)]
pub(super) struct Guarded {
    pub(super) breaker: Breaker,
    pub(super) failure: Option<Arc<str>>,
}

impl Active {
    pub(super) fn new(settings: SharedSettings, leases: &Arc<Leases>, telemetry: Telemetry) -> Self {
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

    pub(super) async fn open(self: &Arc<Self>, content: SharedContent, from: u64) -> Option<SharedObject> {
        self.open_key(content.key(), from).await
    }

    pub(super) async fn open_key(self: &Arc<Self>, key: ObjectKey, from: u64) -> Option<SharedObject> {
        self.try_open(key, from).await.ok()
    }

    pub(super) async fn try_open(
        self: &Arc<Self>,
        key: ObjectKey,
        from: u64,
    ) -> Result<SharedObject, Unread> {
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

    pub(super) async fn read(
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

    pub(super) fn enqueue(&self, item: Item) {
        let dropped = self.uploads.push(item);
        if dropped {
            self.telemetry.shared().record_upload("dropped");
        }
        self.telemetry
            .shared()
            .set_uploads_waiting(self.uploads.waiting() as u64);
    }

    /// How this content is written: over an object that had wrong bytes, if there is one.
    pub(super) fn mode_for(&self, content: SharedContent, mode: Mode) -> Mode {
        let refusal = self.refused.get(&content.key());
        if refusal.is_some_and(|refusal| refusal.is_wrong) {
            Mode::Replace
        } else {
            mode
        }
    }

    pub(super) fn refuse(&self, key: &ObjectKey, period: Duration, is_wrong: bool) {
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

    pub(super) fn refuse_unreadable<T>(&self, key: &ObjectKey, result: &Result<T, BucketError>) {
        if let Err(error @ BucketError::Unreadable(_)) = result {
            tracing::warn!(bucket = %self.settings.name, object = %key, %error,
                "an object of the shared storage is not used");
            self.refuse(key, WRONG_PERIOD, true);
        }
    }

    pub(super) fn report_wrong(&self, key: &ObjectKey) {
        tracing::error!(bucket = %self.settings.name, object = %key,
            "an object of the shared storage does not match its digest, it is not used");
        self.telemetry.shared().record_wrong();
        self.refuse(key, WRONG_PERIOD, true);
    }

    /// Whether the object failed lately.
    pub(super) fn is_refused(&self, key: &ObjectKey) -> bool {
        let refusal = self.refused.get(key);
        refusal.is_some_and(|refusal| Instant::now() < refusal.until)
    }

    /// Whether a request for this object may be sent: the cap is not reached, and it did not fail lately.
    pub(super) fn may_read(&self, key: &ObjectKey) -> bool {
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
    pub(super) fn record_read<T>(
        self: &Arc<Self>,
        operation: &'static str,
        result: &Result<T, BucketError>,
        took: Duration,
    ) {
        self.record_request(operation, result, Some(took));
        self.note_read(Outcome::of(result), result.as_ref().err());
    }

    /// Records the outcome of a read, and starts the probes if the breaker opens.
    pub(super) fn note_read(self: &Arc<Self>, outcome: Outcome, error: Option<&BucketError>) {
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

    pub(super) fn set_up(&self, is_up: bool) {
        // Otherwise the settings were replaced.
        if !self.uploads.is_closed() {
            self.telemetry.shared().set_up(&self.settings.name, is_up);
        }
    }

    /// Records the result of a write.
    pub(super) fn record_write<T>(
        &self,
        operation: &'static str,
        result: &Result<T, BucketError>,
        took: Duration,
    ) {
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

    pub(super) fn record_request<T>(
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
    pub(super) async fn keeps_conditions(&self) -> Result<bool, BucketError> {
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

    pub(super) fn admit_write(&self) -> Admission {
        self.writes.lock().breaker.admit(Instant::now())
    }

    pub(super) fn writes_open_since(&self) -> Option<Instant> {
        self.writes.lock().breaker.open_since()
    }
}

pub(super) fn note(guarded: &Mutex<Guarded>, outcome: Outcome, error: Option<&BucketError>) -> Transition {
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
