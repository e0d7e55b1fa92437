//! Memory of records that were read: one request reads a record for all, and a later denial counts after a second. Reads
//! have a limit, and those for requests without a right at this cache one of their own.

use std::future::Future;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, timeout};

use super::queue::RecordId;
use super::records::RecordRead;
use crate::shared::rate::Rate;

/// How long a record that was read counts. A denial that another cache records counts here after this time.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Longest wait for the read of another request: for one that began before, and for its own.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// Records that were read and are remembered.
const READ_MAX: usize = 4096;

/// Concurrent reads.
const READERS_MAX: usize = 64;

/// Reads of one class. Requests that could guess names or passwords delay and use up only those of each other.
pub(super) struct LimitedReads<S> {
    known: RecentReads<S>,
    unknown: RecentReads<S>,
}

/// Records of one class that were read lately.
struct RecentReads<S> {
    /// Results of reads, and their time.
    read: Cache<RecordId, (RecordRead<S>, Instant)>,
    /// One reader of a record at a time, by a hash of the record.
    readers: [Reader; READERS_MAX],
    rate: Mutex<Rate>,
}

#[derive(Default)]
struct Reader {
    lock: AsyncMutex<()>,
    /// The record that is being read.
    current: Mutex<Option<RecordId>>,
}

impl<S: Clone> LimitedReads<S> {
    pub(super) fn new() -> Self {
        Self {
            known: RecentReads::new(),
            unknown: RecentReads::new(),
        }
    }

    /// The result of a read within the last second, else that of `reading`, unless the limit is reached. `is_known`: the
    /// record is about a right of this cache.
    pub(super) async fn get(
        &self,
        (id, is_known): (&RecordId, bool),
        reading: impl Future<Output = RecordRead<S>>,
    ) -> RecordRead<S> {
        let reads = if is_known { &self.known } else { &self.unknown };
        reads.get(id, reading).await
    }
}

impl<S: Clone> RecentReads<S> {
    fn new() -> Self {
        Self {
            read: Cache::new(READ_MAX),
            readers: std::array::from_fn(|_| Reader::default()),
            rate: Mutex::new(Rate::new(Instant::now())),
        }
    }

    async fn get(&self, id: &RecordId, reading: impl Future<Output = RecordRead<S>>) -> RecordRead<S> {
        let arrived = Instant::now();
        if let Some(found) = self.lately(id, arrived) {
            return found;
        }
        // One of the requests that need the record reads it.
        let Some(reader) = self.reader(id) else {
            return RecordRead::Unread { is_capped: false };
        };
        let Ok(_reading) = timeout(WAIT_MAX, reader.lock.lock()).await else {
            // A bucket that is slower counts as one that does not answer. But no client can make this read wait by reads of
            // other records.
            let is_capped = reader.current.lock().as_ref() != Some(id);
            return RecordRead::Unread { is_capped };
        };
        *reader.current.lock() = Some(id.clone());
        if let Some(found) = self.lately(id, arrived) {
            return found;
        }
        // Of the requests that wait for one read, one counts.
        if !self.rate.lock().take(Instant::now()) {
            return RecordRead::Unread { is_capped: true };
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

    /// The result of a read that began within the second before the request arrived, or after that.
    fn lately(&self, id: &RecordId, arrived: Instant) -> Option<RecordRead<S>> {
        let (found, at) = self.read.get(id)?;
        (arrived.saturating_duration_since(at) < READ_AGAIN_AFTER).then_some(found)
    }

    fn reader(&self, id: &RecordId) -> Option<&Reader> {
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        let at = usize::try_from(hasher.finish() % READERS_MAX as u64).ok()?;
        self.readers.get(at)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::future::join_all;

    use super::super::key::Class;
    use super::*;

    fn id(item: usize) -> RecordId {
        RecordId {
            class: Class::Grant,
            upstream: Arc::from("site"),
            repository: None,
            item: Arc::from(item.to_string()),
        }
    }

    async fn read(reads: &LimitedReads<u8>, item: usize, is_known: bool) -> (RecordRead<u8>, bool) {
        let mut is_read = false;
        let reading = async {
            tokio::task::yield_now().await;
            is_read = true;
            RecordRead::Absent
        };
        let found = reads.get((&id(item), is_known), reading).await;
        (found, is_read)
    }

    #[tokio::test(start_paused = true)]
    async fn simultaneous_requests_count_as_one_read() {
        let reads = LimitedReads::new();
        let all = join_all((0..300).map(|_| read(&reads, 1, true))).await;
        assert!(all.iter().all(|(found, _)| *found == RecordRead::Absent));
        assert_eq!(all.iter().filter(|(_, is_read)| *is_read).count(), 1);
    }

    /// The bucket answers no read.
    #[tokio::test(start_paused = true)]
    async fn request_waits_two_seconds_for_another_read() {
        let reads = Arc::new(LimitedReads::<u8>::new());
        let first = Arc::clone(&reads);
        tokio::spawn(async move { first.get((&id(1), true), std::future::pending()).await });
        tokio::task::yield_now().await;
        let began = Instant::now();
        let (found, is_read) = read(&reads, 1, true).await;
        assert_eq!((found, is_read), (RecordRead::Unread { is_capped: false }, false));
        assert_eq!(began.elapsed(), WAIT_MAX);
    }

    /// Another record with the same hash is read, and the bucket does not answer.
    #[tokio::test(start_paused = true)]
    async fn read_behind_another_record_is_capped() {
        let reads = Arc::new(LimitedReads::<u8>::new());
        let slot = |item| reads.known.reader(&id(item)).map(std::ptr::from_ref);
        let other = (2..10_000).find(|item| slot(*item) == slot(1)).unwrap();
        let first = Arc::clone(&reads);
        tokio::spawn(async move { first.get((&id(other), true), std::future::pending()).await });
        tokio::task::yield_now().await;
        let found = read(&reads, 1, true).await;
        assert_eq!(found, (RecordRead::Unread { is_capped: true }, false));
    }

    /// The read takes longer than its result counts. Requests that wait for it get the result.
    #[tokio::test(start_paused = true)]
    async fn slow_read_answers_those_that_wait_for_it() {
        let reads = Arc::new(LimitedReads::new());
        let first = Arc::clone(&reads);
        let slow = async {
            tokio::time::sleep(WAIT_MAX * 3 / 4).await;
            RecordRead::Absent
        };
        tokio::spawn(async move { first.get((&id(1), true), slow).await });
        tokio::task::yield_now().await;
        let all = join_all((0..20).map(|_| read(&reads, 1, true))).await;
        assert!(
            all.iter().all(|each| *each == (RecordRead::Absent, false)),
            "{all:?}"
        );
        assert_eq!(read(&reads, 1, true).await, (RecordRead::Absent, true));
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_names_use_up_only_their_own_limit() {
        let reads = LimitedReads::new();
        let capped = RecordRead::Unread { is_capped: true };
        let all = join_all((0..300).map(|item| read(&reads, item, false))).await;
        assert_eq!(all.iter().filter(|(_, is_read)| *is_read).count(), 200);
        assert_eq!(all.iter().filter(|(found, _)| *found == capped).count(), 100);
        assert_eq!(read(&reads, 1_000, true).await, (RecordRead::Absent, true));
        // A capped read is not remembered.
        tokio::time::advance(Duration::from_millis(500)).await;
        let item = all.iter().position(|(found, _)| *found == capped).unwrap();
        assert_eq!(read(&reads, item, false).await, (RecordRead::Absent, true));
    }
}
