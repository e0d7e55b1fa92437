//! Claims in the bucket: entering one, and the requests for it. The rules are in `claim`.
//!
//! A client waits for an answer at most as long as for the bucket's first byte, and for a blob and its claim at most twice
//! as long. If the bucket is slow, denies the requests or ignores conditions, there are no claims, and each cache asks its
//! upstream at once.

#[cfg(all(test, feature = "shared"))]
mod tests;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::active::{Active, Guarded, note};
use super::breaker::{Admission, Outcome, Transition};
use super::claim::{Alone, BootId, ClaimRecord, Entry, Look, RECORD_BYTES_MAX, Step, Watch, Written};
use super::follow::Follower;
use super::lease::Lease;
use super::manifest_claim::ManifestClaims;
use super::rate::Rate;
use super::{Arriving, SharedContent, SharedObject, SharedStorage, WRONG_PERIOD};
use crate::bucket::{BucketError, Fault, ObjectKey};
use crate::oci::{Digest, UpstreamFailure};

/// A blob of a known size below this is fetched without a claim: its requests would cost more than its bytes.
const CLAIMED_BYTES_MIN: u64 = 256 * 1024;

/// Entries of one download. Each break of a followed claim leads to another one.
const ENTRIES_MAX: u32 = 6;

/// Leases that upload parts at once. Each has a part in memory.
const PUBLISHERS_MAX: usize = 3;

/// Leases of one process, of blobs and manifests. Each has a task.
const LEASES_MAX: usize = 1024;

/// Longest time for a create. The client that waits for it goes on to the upstream before.
const CREATE_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval of reads of the claim while it is created.
const CREATE_LOOK: Duration = Duration::from_millis(250);

/// Longest time for handing over the claims at shutdown.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);

/// Memory of the claims of one download. Clones share it.
#[derive(Clone, Default)]
pub struct ClaimMemory(Arc<Mutex<Remembered>>);

#[derive(Default)]
struct Remembered {
    watch: Watch,
    is_barred: bool,
    entries: u32,
}

impl ClaimMemory {
    /// The download goes on from its upstream.
    pub(super) fn bar(&self) {
        self.0.lock().is_barred = true;
    }

    pub(super) fn watching<T>(&self, look: impl FnOnce(&mut Watch) -> T) -> T {
        look(&mut self.0.lock().watch)
    }

    /// Whether the download may enter a claim once more.
    fn admit(&self) -> bool {
        let mut remembered = self.0.lock();
        remembered.entries += 1;
        !remembered.is_barred && remembered.entries <= ENTRIES_MAX
    }
}

/// A read of a claim that began with the read of its blob. Dropping it ends it.
pub struct ClaimRead {
    reading: AbortOnDropHandle<Look>,
    active: Arc<Active>,
}

/// Result of entering a claim.
pub enum Entered {
    /// No claim: ask the upstream.
    Alone,
    /// This cache holds the claim: ask the upstream.
    Leads(Lease),
    /// Another cache holds it.
    Follows(Box<Follower>),
    /// The blob is in the bucket by now.
    Found(Box<SharedObject>),
}

/// The claims that this process holds.
pub(super) struct Leases {
    pub(super) me: BootId,
    held: Mutex<HashSet<SharedContent>>,
    /// Set at shutdown.
    closing: watch::Sender<bool>,
    ended: Notify,
}

/// A registered lease. Dropping it deregisters.
pub(super) struct LeaseGuard {
    leases: Arc<Leases>,
    content: SharedContent,
}

impl Default for Leases {
    fn default() -> Self {
        Self {
            me: BootId::random(),
            held: Mutex::default(),
            closing: watch::Sender::new(false),
            ended: Notify::new(),
        }
    }
}

impl Leases {
    /// Registers a lease. `None`: this process has one for the content, has too many, or is about to end.
    pub(super) fn register(self: &Arc<Self>, content: SharedContent) -> Option<LeaseGuard> {
        if *self.closing.borrow() {
            return None;
        }
        let mut held = self.held.lock();
        let is_new = held.len() < LEASES_MAX && held.insert(content);
        drop(held);
        is_new.then(|| LeaseGuard {
            leases: Arc::clone(self),
            content,
        })
    }

    pub(super) fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    pub(super) async fn close(&self) {
        self.closing.send_replace(true);
        let ended = async {
            loop {
                let mut ended = std::pin::pin!(self.ended.notified());
                ended.as_mut().enable();
                if self.held.lock().is_empty() {
                    return;
                }
                ended.await;
            }
        };
        // A claim that is left over is taken over when it has rested.
        let _ = timeout(HAND_OVER_TIMEOUT, ended).await;
    }
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        self.leases.held.lock().remove(&self.content);
        self.leases.ended.notify_waiters();
    }
}

/// State of claims in one bucket.
pub(super) struct Claims {
    pub(super) leases: Arc<Leases>,
    pub(super) publishers: Semaphore,
    guarded: Mutex<Guarded>,
    /// Cap of looks, apart from that of reads: waiting downloads must not take the reads of others.
    rate: Mutex<Rate>,
    is_probing: AtomicBool,
    pub(super) manifests: ManifestClaims,
}

impl Claims {
    pub(super) fn new(leases: &Arc<Leases>) -> Self {
        Self {
            leases: Arc::clone(leases),
            publishers: Semaphore::new(PUBLISHERS_MAX),
            guarded: Mutex::default(),
            rate: Mutex::new(Rate::new(Instant::now())),
            is_probing: AtomicBool::new(false),
            manifests: ManifestClaims::default(),
        }
    }

    /// Whether the cap of looks admits one more.
    pub(super) fn may_look(&self) -> bool {
        self.rate.lock().take(Instant::now())
    }
}

impl SharedStorage {
    /// Begins to read the claim of a blob of which the bucket probably lacks the content. `stated`: its size by a manifest.
    /// `None` if the claim would not be used.
    pub fn read_claim(&self, digest: Digest, stated: Option<u64>) -> Option<ClaimRead> {
        let active = self.readable()?;
        let are_kept = !active.settings.write || active.conditions.get().copied().unwrap_or(false);
        let is_stopped = active.claims.guarded.lock().breaker.open_since().is_some();
        if !are_kept || is_stopped || !active.is_claimed(&SharedContent::Blob(digest), stated) {
            return None;
        }
        Some(active.read_claim(digest))
    }

    /// Enters the claim of a blob that the bucket lacks, to read or fetch it from the byte `from` on. `stated`: its size by
    /// a manifest. `claim_read`: a read of the claim. `since`: when the client began to wait for the bucket.
    pub async fn enter(
        &self,
        (digest, from): (Digest, u64),
        (stated, claim_read): (Option<u64>, Option<ClaimRead>),
        (memory, arriving): (&ClaimMemory, Arc<dyn Arriving>),
        since: Instant,
    ) -> Entered {
        match self.readable() {
            Some(active) => {
                let entry = Entering {
                    content: SharedContent::Blob(digest),
                    from,
                    stated,
                    claim_read,
                    memory: memory.clone(),
                    arriving,
                };
                active.enter(entry, since).await
            }
            None => Entered::Alone,
        }
    }

    /// Reports that the parts of a blob had wrong bytes. Its claims are not followed for an hour.
    pub fn report_wrong_parts(&self, digest: Digest) {
        if let Some(active) = self.active.load_full() {
            let key = ObjectKey::claim(&digest);
            tracing::error!(bucket = %active.settings.name, claim = %key,
                "the parts of a blob in the shared storage do not match its digest, they are not used");
            active.telemetry.shared().record_wrong();
            active.refuse(&key, WRONG_PERIOD, false);
        }
    }

    /// Deletes the claims of running downloads, so that other caches take them over at once.
    pub async fn hand_over_claims(&self) {
        self.leases.close().await;
    }
}

/// A download that enters a claim.
struct Entering {
    content: SharedContent,
    from: u64,
    stated: Option<u64>,
    claim_read: Option<ClaimRead>,
    memory: ClaimMemory,
    arriving: Arc<dyn Arriving>,
}

impl Active {
    fn read_claim(self: Arc<Self>, digest: Digest) -> ClaimRead {
        let active = Arc::clone(&self);
        let reading = async move { active.look(&ObjectKey::claim(&digest)).await };
        ClaimRead {
            reading: AbortOnDropHandle::new(tokio::spawn(reading)),
            active: self,
        }
    }

    /// The result of a read that began before the lease was registered.
    async fn looked(self: &Arc<Self>, read: ClaimRead) -> Option<Look> {
        // A reload may have replaced the bucket.
        let is_same = Arc::ptr_eq(self, &read.active);
        let look = read.reading.await.ok().filter(|_| is_same)?;
        let me = &self.claims.leases.me;
        // A claim of an earlier download of this process may be about to be deleted.
        let is_own = matches!(&look, Look::Present { record: Some(record), .. } if record.is_of(me));
        (!is_own).then_some(look)
    }

    /// Whether content of this size is fetched with a claim.
    fn is_claimed(&self, content: &SharedContent, stated: Option<u64>) -> bool {
        let is_small = stated.is_some_and(|stated| stated < CLAIMED_BYTES_MIN);
        self.settings.claims && !is_small && !self.is_refused(&content.key())
    }

    async fn enter(self: &Arc<Self>, entering: Entering, since: Instant) -> Entered {
        if !self.is_claimed(&entering.content, entering.stated) {
            return Entered::Alone;
        }
        // The client has waited for the blob in vain: it does not wait for the claim too.
        if since.elapsed() >= self.settings.wait_max {
            self.telemetry.shared().record_claim(Alone::Unavailable.name());
            return Entered::Alone;
        }
        if !entering.memory.admit() || !self.may_claim() {
            return Entered::Alone;
        }
        let Some(guard) = self.claims.leases.register(entering.content) else {
            return Entered::Alone;
        };
        let (sender, mut entered) = oneshot::channel();
        let (answered, mut answers) = watch::channel(());
        let active = Arc::clone(self);
        // In a task of its own, so that a claim that is won too late is deleted.
        tokio::spawn(async move {
            let entered = active.entered(entering, guard, answered).await;
            drop(sender.send(entered));
        });
        let (began, wait_max) = (Instant::now(), self.settings.wait_max);
        let mut silent_since = began;
        loop {
            let until = (silent_since + wait_max).min(since + wait_max * 2);
            tokio::select! {
                biased;
                entered = &mut entered => match entered {
                    Ok(entered) => return entered,
                    Err(_) => break,
                },
                Ok(()) = answers.changed() => silent_since = Instant::now(),
                () = sleep_until(until) => break,
            }
        }
        // So that only a few clients wait in vain.
        let silent = Err::<(), _>(BucketError::Silent(UpstreamFailure::Timeout));
        self.record_claim("claim-enter", &silent, began);
        self.telemetry.shared().record_claim(Alone::Unavailable.name());
        Entered::Alone
    }

    /// Tells `answered` each time that the bucket has answered.
    async fn entered(
        self: &Arc<Self>,
        entering: Entering,
        guard: LeaseGuard,
        answered: watch::Sender<()>,
    ) -> Entered {
        let (key, mut left) = (ObjectKey::claim(&entering.content.digest()), None);
        let entered = self.entered_with(entering, guard, answered, &mut left).await;
        if let Some(creating) = left {
            let active = Arc::clone(self);
            tokio::spawn(async move {
                // Created after all, when the other claim was gone.
                if let Ok(Written::Done(_)) = creating.await {
                    active.delete_of_claim(&key).await;
                }
            });
        }
        entered
    }

    /// `left`: a create whose result was not waited for.
    async fn entered_with(
        self: &Arc<Self>,
        entering: Entering,
        guard: LeaseGuard,
        answered: watch::Sender<()>,
        left: &mut Option<JoinHandle<Written>>,
    ) -> Entered {
        let Entering {
            content,
            from,
            stated,
            mut claim_read,
            memory,
            arriving,
        } = entering;
        let key = ObjectKey::claim(&content.digest());
        let mut entry = Entry::new(&self.claims.leases.me, self.settings.write, stated);
        let (mut step, mut is_takeover) = (Step::Look, false);
        // Whether the owner before has uploaded the blob since it was looked for. After the claim was absent, no cache is
        // about to upload the blob: so this is asked while the claim is written.
        let mut is_there = false;
        let held = loop {
            step = match step {
                Step::Look => {
                    let read = match claim_read.take() {
                        Some(read) => self.looked(read).await,
                        None => None,
                    };
                    let look = match read {
                        Some(look) => look,
                        None => self.look(&key).await,
                    };
                    answered.send_replace(());
                    memory.watching(|watch| entry.looked(look, watch, Instant::now()))
                }
                Step::Create(record) => {
                    let began = Instant::now();
                    let writing = self.create_claim(&key, &record, left);
                    let (written, found) = tokio::join!(writing, self.has(content));
                    answered.send_replace(());
                    (is_takeover, is_there) = (false, found);
                    entry.written(written, began)
                }
                Step::TakeOver(record, etag) => {
                    let began = Instant::now();
                    let writing = self.write_claim(&key, &record, &etag);
                    let (written, found) = tokio::join!(writing, self.has(content));
                    answered.send_replace(());
                    (is_takeover, is_there) = (true, found);
                    entry.written(written, began)
                }
                Step::Lead(held) => break held,
                Step::Follow(claim) => {
                    self.telemetry.shared().record_claim("followed");
                    let follower = Follower::new(self, (content, from), memory, claim);
                    return Entered::Follows(Box::new(follower));
                }
                Step::Alone(alone) => {
                    tracing::debug!(claim = %key, reason = alone.name(), "no claim of the shared storage is used");
                    self.telemetry.shared().record_claim(alone.name());
                    if alone == Alone::Invalid {
                        memory.bar();
                    }
                    return Entered::Alone;
                }
            };
        };
        let result = if is_takeover { "taken-over" } else { "won" };
        tracing::debug!(claim = %key, result, "holding a claim of the shared storage");
        self.telemetry.shared().record_claim(result);
        let lease = Lease::start(self, content, (held, guard), arriving);
        if !is_there {
            return Entered::Leads(lease);
        }
        drop(lease);
        match self.open(content, from).await {
            Some(object) => Entered::Found(Box::new(object)),
            None => Entered::Alone,
        }
    }

    /// Whether the bucket has this content by now.
    pub(super) async fn has(&self, content: SharedContent) -> bool {
        let began = Instant::now();
        let found = self.settings.bucket.head(&content.key()).await;
        self.record_claim_read("head", &found, began);
        found.is_ok()
    }

    /// Whether claims are used now. If the bucket is not known to keep conditions, or denied a claim before, that is found
    /// out in the background.
    pub(super) fn may_claim(self: &Arc<Self>) -> bool {
        let admission = self.claims.guarded.lock().breaker.admit(Instant::now());
        if matches!(admission, Admission::Later(_)) {
            return false;
        }
        // Followers that never write need no conditions.
        let are_kept = !self.settings.write || self.conditions.get().copied().unwrap_or(false);
        let is_known = !self.settings.write || self.conditions.get().is_some();
        if admission == Admission::Granted && is_known {
            return are_kept;
        }
        self.probe_claims();
        false
    }

    /// Finds out in the background whether the bucket keeps conditions and accepts claims.
    pub(super) fn probe_claims(self: &Arc<Self>) {
        if self.claims.is_probing.swap(true, Ordering::AcqRel) {
            return;
        }
        let active = Arc::clone(self);
        tokio::spawn(async move {
            let began = Instant::now();
            let probed = active.try_claim().await;
            active.record_claim("claim-probe", &probed, began);
            active.claims.is_probing.store(false, Ordering::Release);
        });
    }

    async fn try_claim(&self) -> Result<(), BucketError> {
        let bucket = &self.settings.bucket;
        let key = ObjectKey::claim_probe(self.claims.leases.me.as_str());
        if !self.settings.write {
            return match bucket.get(&key, 0).await {
                Err(error) if error.fault() != Fault::None => Err(error),
                _ => Ok(()),
            };
        }
        if !self.keeps_conditions().await? {
            return Ok(());
        }
        let record = ClaimRecord::new(&self.claims.leases.me);
        bucket.put(&key, record.to_bytes().into(), None).await?;
        bucket.delete(&key).await
    }

    /// Reads a claim.
    pub(super) async fn look(&self, key: &ObjectKey) -> Look {
        if self.is_refused(key) || !self.claims.may_look() {
            return Look::Failed;
        }
        let began = Instant::now();
        let reading = async {
            let mut object = self.settings.bucket.get(key, 0).await?;
            let mut bytes = Vec::new();
            if object.info.size <= RECORD_BYTES_MAX {
                while let Some(chunk) = object.body.chunk().await {
                    bytes.extend_from_slice(&chunk?);
                }
            }
            Ok((object.info, bytes))
        };
        let silent = Err(BucketError::Silent(UpstreamFailure::Timeout));
        let read = timeout(self.settings.wait_max, reading).await.unwrap_or(silent);
        self.record_claim_read("claim-get", &read, began);
        match read {
            Ok((info, bytes)) => match info.etag {
                Some(etag) => Look::Present {
                    etag,
                    age: info.age,
                    record: ClaimRecord::parse(&bytes),
                },
                None => Look::Failed,
            },
            Err(BucketError::Absent) => Look::Absent,
            Err(_) => Look::Failed,
        }
    }

    /// Creates a claim. Storages are slow to refuse a create where many caches create at once, so the claim is looked for
    /// meanwhile. An earlier create that is `left` comes first: with two of them, this cache could delete its own claim.
    async fn create_claim(
        self: &Arc<Self>,
        key: &ObjectKey,
        record: &ClaimRecord,
        left: &mut Option<JoinHandle<Written>>,
    ) -> Written {
        let (active, its_key, its_record) = (Arc::clone(self), key.clone(), record.clone());
        let create = async move { active.send_create(&its_key, &its_record).await };
        let mut creating = left.take().unwrap_or_else(|| tokio::spawn(create));
        loop {
            let looking = async {
                sleep(CREATE_LOOK).await;
                self.look(key).await
            };
            let look = tokio::select! {
                biased;
                created = &mut creating => return created.unwrap_or(Written::Unknown),
                look = looking => look,
            };
            let Look::Present {
                etag,
                record: Some(found),
                ..
            } = look
            else {
                continue;
            };
            if found.is_of(&self.claims.leases.me) {
                return Written::Done(etag);
            }
            *left = Some(creating);
            return Written::Refused;
        }
    }

    /// Sends the request that creates a claim.
    pub(super) async fn send_create(&self, key: &ObjectKey, record: &ClaimRecord) -> Written {
        let (bytes, began) = (record.to_bytes().into(), Instant::now());
        let creating = self.settings.bucket.create(key, bytes, None);
        let silent = Err(BucketError::Silent(UpstreamFailure::Timeout));
        let created = timeout(CREATE_TIMEOUT, creating).await.unwrap_or(silent);
        self.record_claim("claim-put", &created, began);
        written(created)
    }

    /// Writes a claim over the version `over`.
    pub(super) async fn write_claim(&self, key: &ObjectKey, record: &ClaimRecord, over: &str) -> Written {
        let (bytes, began) = (record.to_bytes().into(), Instant::now());
        let writing = self.settings.bucket.update(key, bytes, over);
        let silent = Err(BucketError::Silent(UpstreamFailure::Timeout));
        let updated = timeout(self.settings.wait_max, writing).await.unwrap_or(silent);
        self.record_claim("claim-put", &updated, began);
        written(updated)
    }

    /// Deletes an object that belongs to a claim.
    pub(super) async fn delete_of_claim(&self, key: &ObjectKey) {
        let began = Instant::now();
        let deleted = self.settings.bucket.delete(key).await;
        self.record_claim("claim-delete", &deleted, began);
        if let Err(error) = deleted {
            tracing::debug!(object = %key, %error, "failed to delete an object of a claim");
        }
    }

    /// Records the result of a read for a claim.
    fn record_claim_read<T>(&self, operation: &'static str, result: &Result<T, BucketError>, began: Instant) {
        if self.settings.write && Outcome::of(result) == Outcome::Answered {
            // It does not show that claims can be written.
            self.record_request(operation, result, Some(began.elapsed()));
        } else {
            self.record_claim(operation, result, began);
        }
    }

    /// Records the result of a request for a claim. Failures switch off claims alone.
    pub(super) fn record_claim<T>(
        &self,
        operation: &'static str,
        result: &Result<T, BucketError>,
        began: Instant,
    ) {
        self.record_request(operation, result, Some(began.elapsed()));
        let error = result.as_ref().err();
        match (note(&self.claims.guarded, Outcome::of(result), error), error) {
            (Transition::Opened, Some(error)) => {
                tracing::warn!(bucket = %self.settings.name, %error,
                    "shared storage accepts no claims, several caches may fetch a blob or a manifest at once");
            }
            (Transition::Closed(after), _) => {
                tracing::info!(bucket = %self.settings.name, seconds = after.as_secs(),
                    "shared storage accepts claims again");
            }
            _ => {}
        }
    }
}

fn written(result: Result<Option<String>, BucketError>) -> Written {
    match result {
        Ok(Some(etag)) => Written::Done(etag),
        // Some storages report a claim that was deleted as absent.
        Err(BucketError::Exists | BucketError::Absent) => Written::Refused,
        Ok(None) | Err(_) => Written::Unknown,
    }
}
