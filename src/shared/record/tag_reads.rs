//! Tag records that are read before the upstream is asked: once in an interval, for all requests.
//!
//! A read runs to its end in a task of its own. A request waits for it until the time for the first byte has passed since
//! the read began, so that a slow bucket delays the requests for a tag once.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::time::{Instant, timeout_at};

use super::exchange::{Dated, RecordPlace, RecordRead};
use super::key::Class;
use super::queue::RecordId;
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
    /// Number of writes to the repository through this cache until then. A record that was read before the last one may be
    /// from before it, and does not count.
    pub writes: u64,
}

#[derive(Clone)]
struct TagRead {
    reader: RecordReader,
    began: Instant,
    /// The result, and when it was read. `None`: it is being read.
    found: Option<(Found, Instant)>,
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
    Known(Found, Instant),
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
        let last = last.filter(|last| reader.since.saturating_duration_since(last.reader.since) < interval);
        let began = match last {
            Some(last) if last.reader.writes != reader.writes => return Entered::Outdated,
            Some(TagRead {
                found: Some((found, at)),
                ..
            }) => return Entered::Known(found, at),
            Some(running) => running.began,
            None => {
                let began = Instant::now();
                let running = TagRead {
                    reader,
                    began,
                    found: None,
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
        };
        self.last.insert(id, ended);
    }
}

impl SharedStorage {
    /// The digests that other caches have seen a tag to name. The record is read once in `interval`. `None`: there is none, or it was not
    /// read in time.
    pub async fn recent_tag_record(
        &self,
        place: &RecordPlace,
        tag: &Tag,
        reader: RecordReader,
        interval: Duration,
    ) -> Option<Dated<TagState>> {
        let active = self.readable()?;
        let records = active.records.as_ref()?;
        let id = place.id(Class::Tag, tag.as_str());
        let (found, elapsed) = match records.tags.enter(&active, (&id, reader), interval) {
            Entered::Outdated => return None,
            Entered::Known(found, at) => (found, at.elapsed()),
            Entered::Reading(call, began) => {
                let deadline = began + active.settings.wait_max;
                let found = timeout_at(deadline, call.wait()).await.ok()??;
                (found, Duration::ZERO)
            }
        };
        // A reload may have replaced the bucket or the key in the meantime.
        let is_current = self
            .active
            .load()
            .as_ref()
            .is_some_and(|now| Arc::ptr_eq(now, &active));
        let found = is_current.then(|| found.as_ref().clone())?.found()?;
        Some(found.later(elapsed))
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

    /// Uses the record of a tag no more, until it is read again.
    pub fn discard_tag_record(&self, place: &RecordPlace, tag: &Tag, reader: RecordReader) {
        let active = self.active.load();
        if let Some(records) = active.as_ref().and_then(|active| active.records.as_ref()) {
            let id = place.id(Class::Tag, tag.as_str());
            records.tags.end(id, reader, &Arc::new(RecordRead::Absent));
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
