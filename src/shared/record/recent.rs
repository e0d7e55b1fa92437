//! Memory of records that were read: one request reads a record for all, and a later denial counts after a second.

use std::future::Future;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

use super::exchange::RecordRead;
use super::queue::RecordId;

/// How long a record that was read counts. A denial that another cache records counts here after this time.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Records that were read and are remembered.
const READ_MAX: usize = 4096;

/// Concurrent reads.
const READERS_MAX: usize = 64;

/// Records of one class that were read lately.
pub(super) struct RecentReads<S> {
    /// Results of reads, and their time.
    read: Cache<RecordId, (RecordRead<S>, Instant)>,
    /// One reader of a record at a time, by a hash of the record.
    readers: [AsyncMutex<()>; READERS_MAX],
}

impl<S: Clone> Default for RecentReads<S> {
    fn default() -> Self {
        Self {
            read: Cache::new(READ_MAX),
            readers: std::array::from_fn(|_| AsyncMutex::default()),
        }
    }
}

impl<S: Clone> RecentReads<S> {
    /// The result of a read within the last second, else that of `reading`.
    pub(super) async fn get(
        &self,
        id: &RecordId,
        reading: impl Future<Output = RecordRead<S>>,
    ) -> RecordRead<S> {
        if let Some(found) = self.lately(id) {
            return found;
        }
        // One of the requests that need the record reads it.
        let Some(reader) = self.reader(id) else {
            return RecordRead::Unread { is_capped: false };
        };
        let _reading = reader.lock().await;
        if let Some(found) = self.lately(id) {
            return found;
        }
        let began = Instant::now();
        let found = reading.await;
        // The wait for the bucket does not make a denial count later.
        let at = match found {
            RecordRead::Unread { .. } => Instant::now(),
            _ => began,
        };
        self.read.insert(id.clone(), (found.clone(), at));
        found
    }

    /// The result of a read within the last second.
    pub(super) fn lately(&self, id: &RecordId) -> Option<RecordRead<S>> {
        let (found, at) = self.read.get(id)?;
        (at.elapsed() < READ_AGAIN_AFTER).then_some(found)
    }

    fn reader(&self, id: &RecordId) -> Option<&AsyncMutex<()>> {
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        let at = usize::try_from(hasher.finish() % READERS_MAX as u64).ok()?;
        self.readers.get(at)
    }
}
