//! Tag records that are read before the upstream is asked: once in an interval, for all requests.
//!
//! A read runs to its end in a task of its own. A request waits for it until the time for the first byte has passed since
//! the read began, so that a slow bucket delays the requests for a tag once.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::time::{Instant, timeout_at};

use super::key::Class;
use super::queue::RecordId;
use super::records::{Dated, RecordPlace, RecordRead};
use super::state::TagState;
use crate::oci::Tag;
use crate::shared::{Active, SharedStorage};
use crate::single_flight::{SharedCall, SingleFlight};

/// Tags of which the last read is remembered.
const READ_MAX: usize = 4096;

type Found = Arc<RecordRead<TagState>>;

/// The last read of each tag record.
pub(super) struct TagReads {
    reading: SingleFlight<RecordId, Found>,
    last: Cache<RecordId, TagRead>,
    /// Locked between the look-up of a read and its beginning, so that one of simultaneous requests begins it.
    beginning: Mutex<()>,
}

/// The request for which a tag record is read.
#[derive(Clone, Copy)]
pub struct RecordReader {
    /// Its arrival.
    pub since: Instant,
    /// The same by the wall clock.
    pub now: SystemTime,
    /// Number of writes to the repository through this cache until then. A record that was read before the last one may be
    /// from before it, and does not count.
    pub writes: u64,
}

impl RecordReader {
    /// Time since an earlier request: the longer one, because the monotonic clock stands still while the host is suspended,
    /// and the wall clock may be set back.
    fn time_since(&self, earlier: &Self) -> Duration {
        let elapsed = self.since.saturating_duration_since(earlier.since);
        let by_wall_clock = self.now.duration_since(earlier.now).unwrap_or_default();
        elapsed.max(by_wall_clock)
    }
}

#[derive(Clone)]
struct TagRead {
    reader: RecordReader,
    began: Instant,
    /// The result, and when it was read. `None`: it is being read.
    found: Option<(Found, Instant)>,
    /// Whether it confirms nothing more. First sights remain.
    is_spent: bool,
}

impl Default for TagReads {
    fn default() -> Self {
        Self {
            reading: SingleFlight::default(),
            last: Cache::new(READ_MAX),
            beginning: Mutex::default(),
        }
    }
}

/// A read that ended, or one that runs.
enum Entered {
    /// With the time since then, and whether it confirms nothing.
    Known(Found, Duration, bool),
    Reading(SharedCall<Found>, Instant),
    /// It was read before a write.
    Outdated,
}

impl TagReads {
    /// The read that counts for this request. It is begun if the last one was `interval` ago.
    fn enter(
        &self,
        active: &Arc<Active>,
        (id, reader): (&RecordId, RecordReader),
        interval: Duration,
    ) -> Entered {
        let _beginning = self.beginning.lock();
        let last = self.last.get(id);
        let last = last.filter(|last| reader.time_since(&last.reader) < interval);
        let began = match last {
            Some(last) if last.reader.writes != reader.writes => return Entered::Outdated,
            Some(TagRead {
                reader: earlier,
                found: Some((found, at)),
                is_spent,
                ..
            }) => {
                let elapsed = at.elapsed().max(reader.time_since(&earlier));
                return Entered::Known(found, elapsed, is_spent);
            }
            Some(running) => running.began,
            None => {
                let began = Instant::now();
                let running = TagRead {
                    reader,
                    began,
                    found: None,
                    is_spent: false,
                };
                self.last.insert(id.clone(), running);
                began
            }
        };
        let (active, of) = (Arc::clone(active), id.clone());
        let reading = || async move {
            let found = Arc::new(active.read_record::<TagState>(&of).await);
            if let Some(records) = &active.records {
                records.tags.end(of, reader, &found);
            }
            found
        };
        Entered::Reading(self.reading.share(id.clone(), reading), began)
    }

    /// Remembers a read.
    fn end(&self, id: RecordId, reader: RecordReader, found: &Found) {
        let now = Instant::now();
        let ended = TagRead {
            reader,
            began: now,
            found: Some((Arc::clone(found), now)),
            is_spent: false,
        };
        self.last.insert(id, ended);
    }

    /// Lets a read that ended confirm nothing more. For one that runs, no later request waits longer than the first.
    fn spend(&self, id: RecordId, reader: RecordReader) {
        let _beginning = self.beginning.lock();
        match self.last.get(&id) {
            Some(TagRead { found: None, .. }) => {}
            Some(ended) => self.last.insert(
                id,
                TagRead {
                    is_spent: true,
                    ..ended
                },
            ),
            None => self.end(id, reader, &Arc::new(RecordRead::Absent)),
        }
    }
}

impl SharedStorage {
    /// The digests that other caches have seen a tag to name, to confirm one. The record is read once in `interval`. `None`:
    /// there is none, it was not read in time, or it was discarded.
    pub async fn recent_tag_record(
        &self,
        place: &RecordPlace,
        tag: &Tag,
        reader: RecordReader,
        interval: Duration,
    ) -> Option<Dated<TagState>> {
        let (found, is_spent) = self.tag_record_within(place, tag, reader, interval).await?;
        (!is_spent).then_some(found)
    }

    /// The same for the first sights of digests. A record that was discarded has them.
    pub async fn recent_first_sights(
        &self,
        place: &RecordPlace,
        tag: &Tag,
        reader: RecordReader,
        interval: Duration,
    ) -> Option<Dated<TagState>> {
        let (found, _) = self.tag_record_within(place, tag, reader, interval).await?;
        Some(found)
    }

    async fn tag_record_within(
        &self,
        place: &RecordPlace,
        tag: &Tag,
        reader: RecordReader,
        interval: Duration,
    ) -> Option<(Dated<TagState>, bool)> {
        let active = self.readable()?;
        let records = active.records.as_ref()?;
        let id = place.id(Class::Tag, tag.as_str());
        let (found, elapsed, is_spent) = match records.tags.enter(&active, (&id, reader), interval) {
            Entered::Outdated => return None,
            Entered::Known(found, elapsed, is_spent) => (found, elapsed, is_spent),
            Entered::Reading(call, began) => {
                let deadline = began + active.settings.wait_max;
                let found = timeout_at(deadline, call.wait()).await.ok()??;
                (found, Duration::ZERO, false)
            }
        };
        // A reload may have replaced the bucket or the key in the meantime.
        let is_current = self
            .active
            .load()
            .as_ref()
            .is_some_and(|now| Arc::ptr_eq(now, &active));
        let found = is_current.then(|| found.as_ref().clone())?.found()?;
        Some((found.later(elapsed), is_spent))
    }

    /// Whether this cache has a key for records.
    pub fn has_record_key(&self) -> bool {
        let active = self.active.load();
        active.as_ref().is_some_and(|active| active.records.is_some())
    }

    /// The digests that other caches have seen a tag to name, read now.
    pub async fn read_tag_record(&self, place: &RecordPlace, tag: &Tag) -> RecordRead<TagState> {
        match self.readable() {
            Some(active) => active.read_record(&place.id(Class::Tag, tag.as_str())).await,
            None => RecordRead::Unread { is_capped: false },
        }
    }

    /// Confirms nothing by the record of a tag, until it is read again.
    pub fn discard_tag_record(&self, place: &RecordPlace, tag: &Tag, reader: RecordReader) {
        let active = self.active.load();
        if let Some(records) = active.as_ref().and_then(|active| active.records.as_ref()) {
            let id = place.id(Class::Tag, tag.as_str());
            records.tags.spend(id, reader);
        }
    }

    /// Longest time that a client waits for the first byte of the bucket.
    pub fn wait_max(&self) -> Duration {
        let active = self.active.load();
        active
            .as_ref()
            .map(|active| active.settings.wait_max)
            .unwrap_or_default()
    }
}
