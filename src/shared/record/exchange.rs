//! Exchange of records with the bucket: reads, and updates by compare-and-swap.
//!
//! An update reads the record, merges with it, and writes if the bucket says less; the condition of the write is the
//! version that was read. Whoever loses reads again. So every record says at least what it said before.

use std::sync::Arc;
use std::time::Duration;

use quick_cache::sync::Cache;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use super::key::{Class, RECORD_BYTES_MAX, RecordKeys, Unusable};
use super::queue::{RecordId, Update, Updates};
use super::state::{ContentState, Merge, PublicState, TagState};
use crate::bucket::{BucketError, Fault, ObjectKey};
use crate::oci::{Digest, Repository, Tag, UpstreamFailure};
use crate::shared::breaker::Outcome;
use crate::shared::upload::admitted;
use crate::shared::{Active, READ_TIMEOUT, SharedStorage};

/// Attempts of one compare-and-swap. Each loss means that another cache has written.
const SWAPS_MAX: usize = 4;

/// Attempts of an update that the bucket did not answer.
const ATTEMPTS_MAX: u32 = 3;

/// Age at which an unchanged tag is recorded again. The age matters in an outage, where limits are hours. At this age,
/// 1000 tags in constant use cost $1.44 a day for writes, and a fifth of that is spent on a minute's precision that
/// nobody needs.
const TAG_RENEWAL: Duration = Duration::from_secs(5 * 60);

/// Age at which an unchanged public repository is recorded again. It counts for `grant_ttl_offline`, 12 hours.
const PUBLIC_RENEWAL: Duration = Duration::from_secs(60 * 60);

/// How long a public record that was read counts. A denial that another cache records counts here after this time.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Public records that were read and are remembered.
const READ_MAX: usize = 4096;

/// Longest wait of a response to a write or a denial for its record.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);

/// Settings of records.
#[derive(Clone)]
pub struct RecordSettings {
    /// The keys.
    pub keys: RecordKeys,
    /// Prefix of the bucket, which the seals cover.
    pub prefix: Arc<str>,
}

/// Records of one bucket.
pub(in crate::shared) struct Records {
    settings: RecordSettings,
    pub(in crate::shared) updates: Updates,
    /// The time 1 of this cache.
    base: Instant,
    /// Public records that were read, and when.
    read: Cache<RecordId, (Option<Dated<PublicState>>, Instant)>,
}

impl Records {
    pub(in crate::shared) fn new(settings: RecordSettings) -> Self {
        Self {
            settings,
            updates: Updates::default(),
            base: Instant::now(),
            read: Cache::new(READ_MAX),
        }
    }

    /// A time of this cache. `None`: before the settings were loaded.
    fn time(&self, at: Instant) -> Option<u64> {
        Some(at.checked_duration_since(self.base)?.as_secs() + 1)
    }

    fn path(&self, key: &ObjectKey) -> String {
        match &*self.settings.prefix {
            "" => key.to_string(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    fn names(&self, id: &RecordId) -> Vec<ObjectKey> {
        self.settings.keys.names(id.class, &id.parts())
    }
}

/// A record that was read, and the time at the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dated<S> {
    /// What it says.
    pub state: S,
    now: u64,
}

impl<S> Dated<S> {
    /// Age of a time in the record, rounded up.
    pub fn age(&self, at: u64) -> Duration {
        Duration::from_secs(self.now.saturating_sub(at))
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
    fn id(&self, class: Class, item: &str) -> RecordId {
        RecordId {
            class,
            upstream: Arc::clone(&self.upstream),
            repository: self.repository.clone(),
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

    /// What other caches have seen a tag to name. `None` also if the record cannot be read.
    pub async fn tag_record(&self, place: &RecordPlace, tag: &Tag) -> Option<Dated<TagState>> {
        self.readable()?
            .read_record(&place.id(Class::Tag, tag.as_str()))
            .await
    }

    /// What other caches have seen of a manifest.
    pub async fn content_record(&self, place: &RecordPlace, digest: Digest) -> Option<Dated<ContentState>> {
        let id = place.id(Class::Content, &digest.to_string());
        self.readable()?.read_record(&id).await
    }

    /// Whether other caches have seen a repository to be public.
    pub async fn public_record(&self, place: &RecordPlace) -> Option<Dated<PublicState>> {
        let (active, id) = (self.readable()?, place.id(Class::Public, ""));
        let read = &active.records.as_ref()?.read;
        let now = Instant::now();
        if let Some((found, at)) = read.get(&id)
            && now.saturating_duration_since(at) < READ_AGAIN_AFTER
        {
            return found;
        }
        let found = active.read_record(&id).await;
        read.insert(id, (found.clone(), now));
        found
    }

    /// Records what a response to a request sent at `since` says about a tag. The times in `state` are set.
    pub fn note_tag(&self, place: &RecordPlace, tag: &Tag, state: TagState, since: Instant) {
        self.note(place.id(Class::Tag, tag.as_str()), since, TAG_RENEWAL, |at| {
            Update::Tag(state.at(at))
        });
    }

    /// Records that the repository has a manifest, and these children of it.
    pub fn note_content(
        &self,
        place: &RecordPlace,
        digest: Digest,
        children: impl IntoIterator<Item = Digest>,
        since: Instant,
    ) {
        let Some(keep) = self.active.load().as_ref().map(|active| active.settings.keep) else {
            return;
        };
        let id = place.id(Class::Content, &digest.to_string());
        self.note(id, since, keep / 2, |at| {
            Update::Content(ContentState {
                at,
                deleted_at: 0,
                children: children.into_iter().collect(),
            })
        });
    }

    /// Records that a manifest was deleted.
    pub fn note_content_deleted(&self, place: &RecordPlace, digest: Digest, since: Instant) {
        let id = place.id(Class::Content, &digest.to_string());
        self.note(id, since, Duration::ZERO, |at| {
            Update::Content(ContentState {
                at: 0,
                deleted_at: at,
                children: std::collections::BTreeSet::new(),
            })
        });
    }

    /// Records whether a request without a credential, sent at `since`, was served.
    pub fn note_public(&self, place: &RecordPlace, is_public: bool, since: Instant) {
        self.note(place.id(Class::Public, ""), since, PUBLIC_RENEWAL, |at| {
            Update::Public(PublicState { at, is_public })
        });
    }

    /// Waits until what was noted about a tag is in the bucket, at most a second.
    pub async fn tag_settled(&self, place: &RecordPlace, tag: &Tag) {
        self.settled(&place.id(Class::Tag, tag.as_str())).await;
    }

    /// Waits until what was noted about the visibility of a repository is in the bucket, at most a second.
    pub async fn public_settled(&self, place: &RecordPlace) {
        self.settled(&place.id(Class::Public, "")).await;
    }

    async fn settled(&self, id: &RecordId) {
        let Some(active) = self.active.load_full() else {
            return;
        };
        // While the bucket accepts nothing, nobody waits for it.
        if let Some(records) = &active.records
            && active.writes_open_since().is_none()
        {
            // Afterwards it goes on in the background.
            let _late = timeout(SETTLE_TIMEOUT, records.updates.settled(id)).await;
        }
    }

    fn note(&self, id: RecordId, since: Instant, renewal: Duration, update: impl FnOnce(u64) -> Update) {
        let Some(active) = self.active.load_full().filter(|active| active.settings.write) else {
            return;
        };
        let Some((records, at)) = active
            .records
            .as_ref()
            .and_then(|records| Some((records, records.time(since)?)))
        else {
            return;
        };
        let class = id.class;
        if records.updates.push(id, update(at), renewal.as_secs()) {
            active.telemetry.shared().record_record(class.name(), "dropped");
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
        }
    }
}

impl Active {
    /// Reads a record under each of its names.
    async fn read_record<S: Merge + DeserializeOwned>(self: &Arc<Self>, id: &RecordId) -> Option<Dated<S>> {
        let records = self.records.as_ref()?;
        if id.class != Class::Content && self.conditions.get() == Some(&false) {
            return None;
        }
        let names = records.names(id);
        let reads = names.iter().map(|key| async move {
            if !self.may_read(key) {
                return Err("capped");
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
        // A denial may be under the name that could not be read.
        let complete = merged.zip(now).filter(|_| failure.is_none());
        let result = match (&complete, failure) {
            (_, Some(failure)) => failure,
            (Some(_), None) => "read",
            (None, None) => "absent",
        };
        self.telemetry.shared().record_record(id.class.name(), result);
        complete.map(|(state, now)| Dated { state, now })
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
        let etag = object.info.etag.take();
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
        Ok(FoundRecord { state, etag })
    }

    /// Makes a record say `state`, whose times are those of the storage, too.
    async fn swap<S>(self: &Arc<Self>, id: &RecordId, state: &S, slack: u64) -> Result<Updated, BucketError>
    where
        S: Merge + Serialize + DeserializeOwned,
    {
        let Some((records, key)) = self
            .records
            .as_ref()
            .and_then(|records| Some((records, records.names(id).into_iter().next()?)))
        else {
            return Ok(Updated::NotNeeded);
        };
        for _ in 0..SWAPS_MAX {
            let found = self.get_record::<S>(&key).await?;
            let known = match found.state {
                Some(Ok(known)) => Some(known),
                Some(Err(Unusable::Later)) => return Ok(Updated::Later),
                Some(Err(unusable @ Unusable::Unsealed)) => {
                    self.telemetry
                        .shared()
                        .record_record(id.class.name(), unusable.name());
                    None
                }
                None => None,
            };
            if known.is_none() && !state.is_new() {
                return Ok(Updated::NotNeeded);
            }
            let now = self
                .settings
                .bucket
                .clock()
                .and_then(|clock| clock.latest(Instant::now()));
            let merged = match known {
                Some(known) => {
                    if known.covers(state, slack)
                        && known.clone().merge(known.clone(), now.unwrap_or(0)) == known
                    {
                        return Ok(Updated::Known);
                    }
                    let merged = known.clone().merge(state.clone(), now.unwrap_or(0));
                    if merged == known {
                        return Ok(Updated::Superseded);
                    }
                    merged
                }
                None => state.clone(),
            };
            let bytes = records.settings.keys.seal(&records.path(&key), &merged).into();
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
                Ok(_) => return Ok(Updated::Written),
                // It was deleted, or another cache has written.
                Err(BucketError::Exists | BucketError::Absent) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Updated::Lost)
    }

    async fn update(self: &Arc<Self>, id: &RecordId, update: Update) -> Result<Updated, BucketError> {
        let Some(records) = &self.records else {
            return Ok(Updated::NotNeeded);
        };
        let earliest = |at| self.settings.bucket.clock().and_then(|clock| clock.earliest(at));
        if earliest(records.base).is_none() {
            // Any response tells the time.
            self.get_record::<PublicState>(&ObjectKey::probe(&[0; 16]))
                .await?;
        }
        let Some(base) = earliest(records.base) else {
            return Ok(Updated::NotNeeded);
        };
        let by = |at: u64| base.saturating_add(at).saturating_sub(1);
        let slack = |renewal: Duration| renewal.as_secs();
        match update {
            Update::Tag(state) => self.swap(id, &state.shift(by), slack(TAG_RENEWAL)).await,
            Update::Content(state) => {
                self.swap(id, &state.shift(by), slack(self.settings.keep / 2))
                    .await
            }
            Update::Public(state) => self.swap(id, &state.shift(by), slack(PUBLIC_RENEWAL)).await,
        }
    }
}

#[cfg(all(test, feature = "shared"))]
impl Active {
    pub(super) async fn update_of(
        self: &Arc<Self>,
        id: &RecordId,
        update: Update,
    ) -> Result<&'static str, BucketError> {
        self.update(id, update).await.map(|updated| updated.name())
    }

    pub(super) async fn read_tag(self: &Arc<Self>, id: &RecordId) -> Option<Dated<TagState>> {
        self.read_record(id).await
    }

    pub(super) async fn read_of(self: &Arc<Self>, id: &RecordId) -> Option<Dated<ContentState>> {
        self.read_record(id).await
    }
}

struct FoundRecord<S> {
    /// `None`: there is no object.
    state: Option<Result<S, Unusable>>,
    etag: Option<String>,
}

impl<S> Default for FoundRecord<S> {
    fn default() -> Self {
        Self {
            state: None,
            etag: None,
        }
    }
}

/// The task that writes records, until the queue is closed.
pub(in crate::shared) async fn work(active: Arc<Active>) {
    let Some(records) = &active.records else { return };
    while let Some((id, update, attempts)) = records.updates.next().await {
        let Some(is_probe) = admitted(&active).await else {
            records.updates.end(id, None);
            return;
        };
        let attempts = attempts + u32::from(!is_probe);
        let done = if id.class == Class::Content {
            active.update(&id, update.clone()).await
        } else {
            match active.keeps_conditions().await {
                Ok(true) => active.update(&id, update.clone()).await,
                Ok(false) => {
                    // Simultaneous writers would bring an earlier statement back.
                    active
                        .telemetry
                        .shared()
                        .record_record(id.class.name(), "unconditional");
                    records.updates.end(id, None);
                    continue;
                }
                Err(error) => Err(error),
            }
        };
        let (result, written) = match &done {
            Ok(updated @ (Updated::Written | Updated::Known)) => (updated.name(), Some(update.clone())),
            Ok(updated) => (updated.name(), None),
            Err(error) if error.fault() != Fault::None && (is_probe || attempts < ATTEMPTS_MAX) => {
                tracing::debug!(class = id.class.name(), %error, "failed to write a record, trying again");
                records.updates.push_again(id.clone(), update, attempts);
                ("retried", None)
            }
            Err(error) => {
                tracing::debug!(class = id.class.name(), %error, "failed to write a record");
                ("failed", None)
            }
        };
        active.telemetry.shared().record_record(id.class.name(), result);
        records.updates.end(id, written);
    }
}
