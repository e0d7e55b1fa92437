//! Exchange of records with the bucket: reads, and updates by compare-and-swap.
//!
//! An update reads the record, merges with it, and writes if the bucket says less; the condition of the write is the
//! version that was read. If the write is refused, the cache reads again. So every record says at least what it said before.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout};

use super::grant::GrantReads;
use super::key::{Class, RECORD_BYTES_MAX, RecordKeys, Unusable};
use super::queue::{Denial, Pushed, RecordId, Update, Updates};
use super::recent::LimitedReads;
use super::state::{ContentState, Merge, PublicState, TagState};
use super::tag_reads::TagReads;
use crate::bucket::{BucketError, Fault, ObjectKey};
use crate::oci::{Digest, Repository, Tag, UpstreamFailure};
use crate::shared::breaker::Outcome;
use crate::shared::revocations::Revocations;
use crate::shared::upload::admitted;
use crate::shared::{Active, READ_TIMEOUT, SharedStorage};

/// Attempts of one compare-and-swap. Each loss means that another cache has written.
const SWAPS_MAX: usize = 4;

/// Attempts of an update that the bucket did not answer. A denial or a deletion has no limit.
const ATTEMPTS_MAX: u32 = 3;

/// Longest pause between the attempts of a denial or a deletion. They double from 2 s.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Interval of checks whether the bucket can be read again.
const READS_PAUSE: Duration = Duration::from_secs(1);

/// Age at which an unchanged tag is recorded again. The age matters in an outage, where limits are hours. At this age,
/// 1000 tags in constant use cost $1.44 a day for writes; at an age of a minute, five times as much.
const TAG_RENEWAL: Duration = Duration::from_secs(5 * 60);

/// Age at which an unchanged public repository is recorded again. It counts for `grant_ttl_offline`, 12 hours.
pub(in crate::shared) const PUBLIC_RENEWAL: Duration = Duration::from_secs(60 * 60);

/// Difference between the storage's clock and that of a host up to which times in records are compared with other times.
/// The clocks of hosts that synchronize them differ by less than a second.
const CLOCK_DIFFERENCE_MAX: Duration = Duration::from_secs(5 * 60);

/// Longest wait of a response to a write or a denial for its record.
pub(in crate::shared) const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);

/// Result of a read that was not made because of the limit of requests.
const CAPPED: &str = "capped";

/// Result of an update that is made again.
const RETRIED: &str = "retried";

/// Settings of records.
#[derive(Clone)]
pub struct RecordSettings {
    /// The keys.
    pub keys: RecordKeys,
    /// Prefix of the bucket, which the seals cover.
    pub prefix: Arc<str>,
    /// Whether there are grant records.
    pub grants: bool,
}

/// Records of one bucket.
pub(in crate::shared) struct Records {
    pub(super) settings: RecordSettings,
    pub(in crate::shared) updates: Updates,
    /// The time 1 of this cache. A reload keeps it, and so the times of the updates that are taken over.
    pub(in crate::shared) base: Instant,
    /// Public records have a cap of their own: what denies must be read while other reads are at the cap.
    public: LimitedReads<PublicState>,
    /// The storage's time of `base`, when its clock last agreed with that of this host.
    agreed: Mutex<Option<u64>>,
    /// Tag records that were read before the upstream was asked.
    pub(super) tags: TagReads,
    pub(super) grants: GrantReads,
    /// Denials that the bucket lacks. `None` in tests of one bucket.
    pub(in crate::shared) revocations: Option<Arc<Revocations>>,
}

impl Records {
    pub(in crate::shared) fn new(settings: RecordSettings) -> Self {
        Self {
            settings,
            updates: Updates::default(),
            base: Instant::now(),
            public: LimitedReads::new(),
            agreed: Mutex::default(),
            tags: TagReads::default(),
            grants: GrantReads::new(),
            revocations: None,
        }
    }

    /// A time of this cache. `None`: before the settings were loaded.
    pub(in crate::shared) fn time(&self, at: Instant) -> Option<u64> {
        Some(at.checked_duration_since(self.base)?.as_secs() + 1)
    }

    /// Removes a denial from the list of those that wait, if no later one was added since.
    fn finish(&self, id: &RecordId, denial: Denial) {
        if let Some(list) = self.revocations.as_ref().filter(|_| denial.number > 0) {
            list.finish(id, denial.number);
        }
    }

    /// A record that was read, with a denial that waits for the bucket. A denial of an earlier process may be among those that are
    /// not loaded.
    pub(super) async fn with_waiting_denial<S: Merge>(
        &self,
        id: &RecordId,
        read: RecordRead<S>,
        denial: impl FnOnce(u64) -> S,
    ) -> RecordRead<S> {
        let (RecordRead::Found(found), Some(list)) = (&read, &self.revocations) else {
            return read;
        };
        // A disk that hangs must not hold the clients of an outage.
        if !timeout(SETTLE_TIMEOUT, list.loaded()).await.unwrap_or(false) {
            return RecordRead::Unread { is_capped: false };
        }
        let Some(since) = list.waits_since(id) else {
            return read;
        };
        let at = found.now.saturating_sub(since.elapsed().as_secs());
        // Later than it was by as much as `now` may be remembered and rounded.
        let denial = denial(at.saturating_add(2));
        RecordRead::Found(Dated {
            state: found.state.clone().merge(denial, found.now),
            now: found.now,
        })
    }

    fn path(&self, key: &ObjectKey) -> String {
        match &*self.settings.prefix {
            "" => key.to_string(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    fn names(&self, id: &RecordId) -> Vec<ObjectKey> {
        self.settings.keys.names(id.class, id.place(), &id.item)
    }
}

/// The result of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordRead<S> {
    /// What the record says.
    Found(Dated<S>),
    /// There is no record, or the storage cannot keep records of this class.
    Absent,
    /// It is not known what the record says. `is_capped`: because of this cache's limit of requests.
    Unread {
        /// This cache has reached its limit of requests to the bucket.
        is_capped: bool,
    },
}

impl<S> RecordRead<S> {
    /// What the record says, if it was read.
    pub fn found(self) -> Option<Dated<S>> {
        match self {
            Self::Found(found) => Some(found),
            Self::Absent | Self::Unread { .. } => None,
        }
    }
}

/// A record that was read, and the time at the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dated<S> {
    /// Its content.
    pub state: S,
    now: u64,
}

impl<S> Dated<S> {
    /// Age of a time in the record, rounded up.
    pub fn age(&self, at: u64) -> Duration {
        Duration::from_secs(self.now.saturating_sub(at))
    }

    /// The same after this time.
    pub(in crate::shared) fn later(self, by: Duration) -> Self {
        let by = by.as_secs() + u64::from(by.subsec_nanos() > 0);
        Self {
            now: self.now.saturating_add(by),
            ..self
        }
    }
}

impl Dated<TagState> {
    /// Time since the tag was first seen to name this digest, by any cache. `None`: none has stated it.
    pub fn seen_for(&self, digest: &Digest) -> Option<Duration> {
        let variants = self.state.variants.iter();
        let naming = variants.filter(|variant| variant.digest == *digest && variant.at > 0);
        let seen = naming.filter_map(|variant| {
            let before = Duration::from_secs(variant.seen_for?);
            Some(self.age(variant.at).saturating_add(before))
        });
        seen.max()
    }
}

/// A repository in records.
#[derive(Clone, Debug)]
pub struct RecordPlace {
    /// Identity of the upstream: the same for every cache, whatever it calls the upstream.
    pub upstream: Arc<str>,
    /// The repository.
    pub repository: Repository,
}

impl RecordPlace {
    pub(in crate::shared) fn id(&self, class: Class, item: &str) -> RecordId {
        RecordId {
            class,
            upstream: Arc::clone(&self.upstream),
            repository: Some(self.repository.clone()),
            item: item.into(),
        }
    }
}

impl SharedStorage {
    /// Whether records can be read now.
    pub fn has_records(&self) -> bool {
        self.readable().is_some_and(|active| active.records.is_some())
    }

    /// Whether records are written.
    pub fn writes_records(&self) -> bool {
        let active = self.active.load();
        active
            .as_ref()
            .is_some_and(|active| active.settings.write && active.records.is_some())
    }

    /// Whether the storage's clock shows the time `own` of this host now, within five minutes.
    pub fn agrees_with_clock(&self, own: SystemTime) -> bool {
        let active = self.active.load();
        let clock = active.as_ref().and_then(|active| active.settings.bucket.clock());
        let difference = clock.and_then(|clock| clock.difference(own, Instant::now()));
        let agrees = difference.is_some_and(|difference| difference <= CLOCK_DIFFERENCE_MAX);
        if agrees && let Some(records) = active.as_ref().and_then(|active| active.records.as_ref()) {
            *records.agreed.lock() = clock.and_then(|clock| clock.earliest(records.base));
        }
        agrees
    }

    /// What other caches have seen a tag to name. `None` also if the record cannot be read.
    pub async fn tag_record(&self, place: &RecordPlace, tag: &Tag) -> Option<Dated<TagState>> {
        self.readable()?
            .read_record(&place.id(Class::Tag, tag.as_str()))
            .await
            .found()
    }

    /// What other caches have seen of a manifest.
    pub async fn content_record(&self, place: &RecordPlace, digest: Digest) -> RecordRead<ContentState> {
        let id = place.id(Class::Content, &digest.to_string());
        match self.readable() {
            Some(active) => active.read_record(&id).await,
            None => RecordRead::Unread { is_capped: false },
        }
    }

    /// Whether other caches have seen a repository to be public. `is_known`: it is for this cache.
    pub async fn public_record(&self, place: &RecordPlace, is_known: bool) -> RecordRead<PublicState> {
        let unread = RecordRead::Unread { is_capped: false };
        let (Some(active), id) = (self.readable(), place.id(Class::Public, "")) else {
            return unread;
        };
        let Some(records) = &active.records else {
            return unread;
        };
        let reading = records.public.get((&id, is_known), active.read_record(&id));
        let read = active.counted(reading.await);
        let denial = |at| PublicState { at, is_public: false };
        records.with_waiting_denial(&id, read, denial).await
    }

    /// Records what a response to a request sent at `since` says about a tag. The times in `state` are set.
    pub fn note_tag(&self, place: &RecordPlace, tag: &Tag, state: TagState, since: Instant) {
        self.note(&place.id(Class::Tag, tag.as_str()), since, TAG_RENEWAL, |at| {
            Update::Tag(state.at(at))
        });
    }

    /// Records that the repository has a manifest, and these children of it. `confirmed`: when the request was sent to which
    /// the upstream confirmed that; `None` for a copy of this cache, which passes no deletion.
    pub fn note_content(
        &self,
        place: &RecordPlace,
        digest: Digest,
        children: impl IntoIterator<Item = Digest>,
        confirmed: Option<Instant>,
    ) {
        let Some(keep) = self.active.load().as_ref().map(|active| active.settings.keep) else {
            return;
        };
        let id = place.id(Class::Content, &digest.to_string());
        let since = confirmed.unwrap_or_else(Instant::now);
        self.note(&id, since, keep / 2, |at| {
            Update::Content(ContentState {
                at: confirmed.map_or(0, |_| at),
                deleted_at: 0,
                children: children.into_iter().collect(),
            })
        });
    }

    /// Records that a manifest was deleted.
    pub fn note_content_deleted(&self, place: &RecordPlace, digest: Digest, since: Instant) {
        let id = place.id(Class::Content, &digest.to_string());
        self.note(&id, since, Duration::ZERO, |at| {
            Update::Content(ContentState {
                at: 0,
                deleted_at: at,
                children: std::collections::BTreeSet::new(),
            })
        });
    }

    /// Records whether a request without a credential, sent at `since`, was served.
    pub fn note_public(&self, place: &RecordPlace, is_public: bool, since: Instant) {
        self.note(&place.id(Class::Public, ""), since, PUBLIC_RENEWAL, |at| {
            Update::Public(PublicState { at, is_public })
        });
    }

    /// Waits until the updates of a tag are in the bucket, at most a second.
    pub async fn tag_settled(&self, place: &RecordPlace, tag: &Tag) {
        self.settled(&place.id(Class::Tag, tag.as_str())).await;
    }

    pub(in crate::shared) async fn settled(&self, id: &RecordId) {
        let Some(active) = self.active.load_full() else {
            return;
        };
        // While the bucket accepts nothing, no response waits for it.
        if let Some(records) = &active.records
            && !active.is_stopped()
        {
            // Afterwards it goes on in the background.
            let _late = timeout(SETTLE_TIMEOUT, records.updates.settled(id)).await;
        }
    }

    pub(in crate::shared) fn note(
        &self,
        id: &RecordId,
        since: Instant,
        renewal: Duration,
        update: impl FnOnce(u64) -> Update,
    ) {
        self.queue_update((id, since), update, |updates, update| {
            updates.push(id.clone(), update, renewal.as_secs())
        });
    }

    /// Queues an update by an observation at `since`.
    pub(in crate::shared) fn queue_update(
        &self,
        (id, since): (&RecordId, Instant),
        update: impl FnOnce(u64) -> Update,
        push: impl Fn(&Updates, Update) -> Pushed,
    ) {
        let current = || self.active.load_full().filter(|active| active.settings.write);
        let time = |active: &Arc<Active>| active.records.as_ref()?.time(since);
        let Some(at) = current().as_ref().and_then(time) else {
            return;
        };
        let (class, update) = (id.class, update(at));
        // Twice, because a reload may close the queue in between.
        for _ in 0..2 {
            let Some(active) = current() else { return };
            let Some(records) = &active.records else { return };
            match push(&records.updates, update.clone()) {
                Pushed::Queued => return,
                Pushed::Dropped => {
                    active.telemetry.shared().record_record(class.name(), "dropped");
                    return;
                }
                Pushed::Closed => {}
            }
        }
    }
}

/// The result of an update.
#[derive(Debug, PartialEq)]
enum Updated {
    /// The bucket says it now.
    Written,
    /// The bucket said it before.
    Known,
    /// The bucket says something later.
    Superseded,
    /// A later version of the program wrote the record.
    Later,
    /// Other caches wrote each time.
    Lost,
    /// There is no record that it would change.
    NotNeeded,
    /// This cache has created as many grant records as it may.
    Capped,
}

impl Updated {
    fn name(&self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Known => "known",
            Self::Superseded => "superseded",
            Self::Later => "later-version",
            Self::Lost => "lost",
            Self::NotNeeded => "not-needed",
            Self::Capped => CAPPED,
        }
    }
}

impl Active {
    /// Whether the bucket cannot be read, or accepts no writes.
    pub(in crate::shared) fn is_stopped(&self) -> bool {
        self.writes_open_since().is_some() || self.are_reads_stopped()
    }

    fn are_reads_stopped(&self) -> bool {
        self.reads.lock().breaker.open_since().is_some()
    }

    /// Whether a record may be read now. Public records and grant records have a limit of their own.
    fn may_read_record(&self, class: Class, key: &ObjectKey) -> bool {
        match class {
            Class::Tag | Class::Content => self.may_read(key),
            Class::Grant | Class::Public => true,
        }
    }

    /// Counts a read that was not made because of the limit.
    pub(super) fn counted<S>(&self, read: RecordRead<S>) -> RecordRead<S> {
        if let RecordRead::Unread { is_capped: true } = read {
            self.telemetry.shared().record_request("get", CAPPED, None);
        }
        read
    }

    /// Reads a record under each of its names.
    pub(in crate::shared) async fn read_record<S: Merge + DeserializeOwned>(
        self: &Arc<Self>,
        id: &RecordId,
    ) -> RecordRead<S> {
        let Some(records) = &self.records else {
            return RecordRead::Absent;
        };
        if id.class != Class::Content && self.conditions.get() == Some(&false) {
            return RecordRead::Absent;
        }
        let names = records.names(id);
        let reads = names.iter().map(|key| async move {
            if !self.may_read_record(id.class, key) {
                return Err(CAPPED);
            }
            let found = self.get_record::<S>(key).await;
            match found {
                Ok(found) => match found.state {
                    Some(Ok(state)) => Ok(Some(state)),
                    Some(Err(unusable)) => Err(unusable.name()),
                    None => Ok(None),
                },
                Err(error) => Err(error.name()),
            }
        });
        let found = futures_util::future::join_all(reads).await;
        let now = self
            .settings
            .bucket
            .clock()
            .and_then(|clock| clock.latest(Instant::now()));
        let (mut merged, mut failure) = (None::<S>, None);
        for found in found {
            match found {
                Ok(Some(state)) => {
                    // Merged with itself, it has no time in the future.
                    let other = merged.unwrap_or_else(|| state.clone());
                    merged = Some(state.merge(other, now.unwrap_or(0)));
                }
                Ok(None) => {}
                Err(result) => failure = Some(result),
            }
        }
        let (read, result) = match (merged, now, failure) {
            // A denial may be under the name that could not be read.
            (_, _, Some(failure)) => {
                let is_capped = failure == CAPPED;
                (RecordRead::Unread { is_capped }, failure)
            }
            (Some(state), Some(now), None) => (RecordRead::Found(Dated { state, now }), "read"),
            // Without the storage's time, no record has an age.
            (Some(_), None, None) => (RecordRead::Unread { is_capped: false }, "absent"),
            (None, _, None) => (RecordRead::Absent, "absent"),
        };
        self.telemetry.shared().record_record(id.class.name(), result);
        read
    }

    /// The object of a record, as far as it is one.
    async fn get_record<S: DeserializeOwned>(
        self: &Arc<Self>,
        key: &ObjectKey,
    ) -> Result<FoundRecord<S>, BucketError> {
        let began = Instant::now();
        let opened = self.settings.bucket.get(key, 0).await;
        self.record_read("record", &opened, began.elapsed());
        let mut object = match opened {
            Ok(object) => object,
            Err(BucketError::Absent) => return Ok(FoundRecord::default()),
            Err(error) => return Err(error),
        };
        let (etag, age) = (object.info.etag.take(), object.info.age);
        let mut bytes = Vec::new();
        let reading = async {
            while bytes.len() <= RECORD_BYTES_MAX
                && let Some(chunk) = object.body.chunk().await
            {
                bytes.extend_from_slice(&chunk?);
            }
            Ok(())
        };
        let read = timeout(READ_TIMEOUT, reading).await;
        let read = read.unwrap_or(Err(BucketError::Silent(UpstreamFailure::Timeout)));
        if let Err(error) = read {
            self.note_read(Outcome::Silent, Some(&error));
            return Err(error);
        }
        let records = self.records.as_ref();
        let state = records.map(|records| records.settings.keys.open(&records.path(key), &bytes));
        Ok(FoundRecord { state, etag, age })
    }

    /// Why a record cannot be read, for the operator. `None`: the object under each of its names is usable.
    pub(in crate::shared) async fn unread_reason(self: &Arc<Self>, id: &RecordId) -> Option<Arc<str>> {
        for key in self.records.as_ref()?.names(id) {
            match self.get_record::<TagState>(&key).await {
                Ok(found) => match found.state {
                    Some(Err(Unusable::Later)) => {
                        return Some("a later version of ifnewer has written it".into());
                    }
                    Some(Err(Unusable::Unsealed)) => {
                        return Some("it is damaged, or another key has sealed it".into());
                    }
                    Some(Ok(_)) | None => {}
                },
                Err(error) => return Some(error.to_string().into()),
            }
        }
        None
    }

    /// The statement in an object that was read, if it is one.
    fn statement_of<S>(
        &self,
        class: Class,
        found: Option<Result<S, Unusable>>,
    ) -> Result<Option<S>, Updated> {
        match found {
            Some(Ok(known)) => Ok(Some(known)),
            Some(Err(Unusable::Later)) => Err(Updated::Later),
            Some(Err(unusable @ Unusable::Unsealed)) => {
                let metrics = self.telemetry.shared();
                metrics.record_record(class.name(), unusable.name());
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// Makes a record say `state`, whose times are those of the storage, too. `is_new`: also if there is no record.
    async fn swap<S>(
        self: &Arc<Self>,
        id: &RecordId,
        (state, is_new): (&S, bool),
        slack: u64,
    ) -> Result<Updated, BucketError>
    where
        S: Merge + Serialize + DeserializeOwned,
    {
        let Some(records) = &self.records else {
            return Ok(Updated::NotNeeded);
        };
        let mut names = records.names(id).into_iter();
        let Some(key) = names.next() else {
            return Ok(Updated::NotNeeded);
        };
        let is_granted = state.is_new();
        let latest = || self.settings.bucket.clock()?.latest(Instant::now());
        let now = || latest().unwrap_or(u64::MAX);
        // What the other keys have sealed is said under the first name too, before those keys are removed.
        let mut earlier = None::<S>;
        for name in names {
            let found = self.get_record::<S>(&name).await?;
            match self.statement_of(id.class, found.state) {
                Ok(found) => earlier = merged(earlier, found, now()),
                Err(updated) => return Ok(updated),
            }
        }
        for _ in 0..SWAPS_MAX {
            let found = self.get_record::<S>(&key).await?;
            let known = match self.statement_of(id.class, found.state) {
                Ok(known) => known,
                Err(updated) => return Ok(updated),
            };
            let all = merged(known.clone(), earlier.clone(), now());
            if all.is_none() && !is_new {
                return Ok(Updated::NotNeeded);
            }
            // A content record does not change for long, and the bucket deletes old objects.
            let is_aged =
                id.class == Class::Content && found.age.is_some_and(|age| age > self.settings.keep / 2);
            let next = match &all {
                Some(all) => all.clone().merge(state.clone(), now()),
                None => state.clone(),
            };
            if let Some(known) = known.filter(|_| !is_aged) {
                if known.covers(state, slack) && all.as_ref() == Some(&known) {
                    return Ok(Updated::Known);
                }
                if next == known {
                    return Ok(Updated::Superseded);
                }
            }
            if id.class == Class::Grant && is_granted && found.etag.is_none() && !records.may_create_grant() {
                return Ok(Updated::Capped);
            }
            let bytes = records.settings.keys.seal(&records.path(&key), &next).into();
            let began = Instant::now();
            let bucket = &self.settings.bucket;
            let written = match &found.etag {
                Some(etag) => bucket.update(&key, bytes, etag).await,
                None => bucket.create(&key, bytes, None).await,
            };
            let name = if found.etag.is_some() {
                "record-update"
            } else {
                "record-create"
            };
            self.record_write(name, &written, began.elapsed());
            match written {
                Ok(_) if id.class == Class::Content || next.covers(state, slack) => {
                    return Ok(Updated::Written);
                }
                // A time in the future was replaced.
                Ok(_) => return Ok(Updated::Superseded),
                // It was deleted, or another cache has written.
                Err(BucketError::Exists | BucketError::Absent) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Updated::Lost)
    }

    /// Makes a tag record say that the tag names nothing since now.
    pub(in crate::shared) async fn unname_tag(self: &Arc<Self>, id: &RecordId) -> Result<(), BucketError> {
        let now = self
            .settings
            .bucket
            .clock()
            .and_then(|clock| clock.latest(Instant::now()));
        match now {
            Some(now) => self.swap(id, (&TagState::unnamed(now), false), 0).await.map(drop),
            None => Err(BucketError::Malformed),
        }
    }

    /// `is_known`: the update records a denial of what this cache had granted.
    async fn update(
        self: &Arc<Self>,
        id: &RecordId,
        update: Update,
        is_known: bool,
    ) -> Result<Updated, BucketError> {
        let Some(records) = &self.records else {
            return Ok(Updated::NotNeeded);
        };
        let clock = || self.settings.bucket.clock();
        let earliest = || clock().and_then(|clock| clock.earliest(records.base));
        if earliest().is_none() {
            // Any response tells the time.
            self.get_record::<PublicState>(&ObjectKey::probe(&[0; 16]))
                .await?;
        }
        let Some(base) = earliest() else {
            return Ok(Updated::NotNeeded);
        };
        // A denial counts from its latest possible time, because a success that preceded it must not outlast it.
        let latest = clock().and_then(|clock| clock.latest(records.base));
        let base = match &update {
            Update::Public(_) | Update::Grant(_) if update.is_urgent() => latest.unwrap_or(base),
            _ => base,
        };
        let by = |at: u64| base.saturating_add(at).saturating_sub(1);
        match update {
            Update::Tag(state) => {
                // Otherwise the age of a digest would contain a step of the storage's clock while the update waited.
                let agreed = *records.agreed.lock();
                let has_stepped =
                    agreed.is_none_or(|agreed| agreed.abs_diff(base) > CLOCK_DIFFERENCE_MAX.as_secs());
                let state = if has_stepped {
                    state.without_sights()
                } else {
                    state
                };
                self.swap_shifted(id, state.shift(by), (is_known, TAG_RENEWAL))
                    .await
            }
            Update::Content(state) => {
                let renewal = self.settings.keep / 2;
                self.swap_shifted(id, state.shift(by), (is_known, renewal)).await
            }
            Update::Public(state) => {
                self.swap_shifted(id, state.shift(by), (is_known, PUBLIC_RENEWAL))
                    .await
            }
            Update::Grant(state) => {
                self.swap_shifted(id, state.shift(by), (is_known, PUBLIC_RENEWAL))
                    .await
            }
        }
    }

    async fn swap_shifted<S>(
        self: &Arc<Self>,
        id: &RecordId,
        state: S,
        (is_known, renewal): (bool, Duration),
    ) -> Result<Updated, BucketError>
    where
        S: Merge + Serialize + DeserializeOwned,
    {
        let is_new = is_known || state.is_new();
        self.swap(id, (&state, is_new), renewal.as_secs()).await
    }
}

/// What both say together. Merged with itself, a statement has no time in the future.
fn merged<S: Merge>(one: Option<S>, other: Option<S>, now: u64) -> Option<S> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.merge(other, now)),
        (Some(one), None) | (None, Some(one)) => Some(one.clone().merge(one, now)),
        (None, None) => None,
    }
}

#[cfg(all(test, feature = "shared"))]
impl Active {
    pub(super) async fn update_of(
        self: &Arc<Self>,
        id: &RecordId,
        update: Update,
    ) -> Result<&'static str, BucketError> {
        self.update(id, update, false).await.map(|updated| updated.name())
    }

    pub(super) async fn read_raw<S: Merge + DeserializeOwned>(
        self: &Arc<Self>,
        id: &RecordId,
    ) -> RecordRead<S> {
        self.read_record(id).await
    }

    pub(super) async fn read_of<S: Merge + DeserializeOwned>(
        self: &Arc<Self>,
        id: &RecordId,
    ) -> Option<Dated<S>> {
        self.read_record(id).await.found()
    }
}

struct FoundRecord<S> {
    /// `None`: there is no object.
    state: Option<Result<S, Unusable>>,
    etag: Option<String>,
    /// Time since it was written.
    age: Option<Duration>,
}

impl<S> Default for FoundRecord<S> {
    fn default() -> Self {
        Self {
            state: None,
            etag: None,
            age: None,
        }
    }
}

/// Pause after so many attempts of a denial or a deletion.
fn pause_after(attempts: u32) -> Duration {
    Duration::from_secs(1 << attempts.clamp(1, 5)).min(PAUSE_MAX)
}

/// Waits until the bucket can be read and written. Whether a write is a probe; `None`: the queue was closed.
async fn ready(active: &Active) -> Option<bool> {
    while active.are_reads_stopped() {
        if active.uploads.is_closed() {
            return None;
        }
        // Another task sends the probes.
        sleep(READS_PAUSE).await;
    }
    admitted(active).await
}

/// The task that writes records, until the queue is closed.
pub(in crate::shared) async fn work(active: Arc<Active>) {
    let Some(records) = &active.records else { return };
    while let Some((id, update, attempts)) = records.updates.next().await {
        let Some(is_probe) = ready(&active).await else {
            // Who closed the queue has taken the update over.
            records.updates.end(id, None);
            return;
        };
        // Not a later denial, which may have been queued meanwhile.
        let denial = records.updates.running_denial();
        let attempts = attempts + u32::from(!is_probe);
        let done = if id.class == Class::Content {
            active.update(&id, update.clone(), denial.is_known).await
        } else {
            match active.keeps_conditions().await {
                Ok(true) => active.update(&id, update.clone(), denial.is_known).await,
                Ok(false) => {
                    // Simultaneous writers would bring an earlier statement back.
                    active
                        .telemetry
                        .shared()
                        .record_record(id.class.name(), "unconditional");
                    records.finish(&id, denial);
                    records.updates.end(id, None);
                    continue;
                }
                Err(error) => Err(error),
            }
        };
        let (result, written) = match &done {
            Ok(updated @ (Updated::Written | Updated::Known)) => (updated.name(), Some(update.clone())),
            Ok(Updated::Lost) if update.is_urgent() => {
                let due = Some(Instant::now() + pause_after(attempts));
                records
                    .updates
                    .push_again(id.clone(), (update, denial), attempts, due);
                (RETRIED, None)
            }
            Ok(updated) => (updated.name(), None),
            Err(error)
                if update.is_urgent()
                    || error.fault() != Fault::None && (is_probe || attempts < ATTEMPTS_MAX) =>
            {
                tracing::debug!(class = id.class.name(), %error, "failed to write a record, trying again");
                let due = update.is_urgent().then(|| Instant::now() + pause_after(attempts));
                records
                    .updates
                    .push_again(id.clone(), (update, denial), attempts, due);
                (RETRIED, None)
            }
            Err(error) => {
                tracing::debug!(class = id.class.name(), %error, "failed to write a record");
                ("failed", None)
            }
        };
        active.telemetry.shared().record_record(id.class.name(), result);
        if matches!(done, Ok(Updated::Later)) && denial != Denial::default() {
            tracing::error!(
                class = id.class.name(),
                "a record of a later version takes no denial of this version, other caches may not get it"
            );
        }
        // Whoever closed the queue has taken an urgent update over, perhaps to another bucket.
        if result != RETRIED && !active.uploads.is_closed() {
            records.finish(&id, denial);
        }
        records.updates.end(id, written);
    }
}
