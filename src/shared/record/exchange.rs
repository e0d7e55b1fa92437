//! Exchange of records with the bucket: reads, and updates by compare-and-swap.
//!
//! An update reads the record, merges with it, and writes if the bucket says less; the condition of the write is the
//! version that was read. If the write is refused, the cache reads again. So every record says at least what it said before.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use super::key::{Class, RECORD_BYTES_MAX, Unusable};
use super::queue::RecordId;
use super::records::{Dated, RecordRead};
use super::state::{Merge, TagState};
use crate::bucket::{BucketError, ObjectKey};
use crate::oci::UpstreamFailure;
use crate::shared::breaker::Outcome;
use crate::shared::{Active, READ_TIMEOUT};

/// Attempts of one compare-and-swap. Each loss means that another cache has written.
const SWAPS_MAX: usize = 4;

/// Result of a read that was not made because of the limit of requests.
const CAPPED: &str = "capped";

/// The result of an update.
#[derive(Debug, PartialEq)]
pub(super) enum Updated {
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
    pub(super) fn name(&self) -> &'static str {
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

    pub(super) fn are_reads_stopped(&self) -> bool {
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
    pub(super) async fn get_record<S: DeserializeOwned>(
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
    pub(super) async fn swap<S>(
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
}

/// What both say together. Merged with itself, a statement has no time in the future.
fn merged<S: Merge>(one: Option<S>, other: Option<S>, now: u64) -> Option<S> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.merge(other, now)),
        (Some(one), None) | (None, Some(one)) => Some(one.clone().merge(one, now)),
        (None, None) => None,
    }
}

pub(super) struct FoundRecord<S> {
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
