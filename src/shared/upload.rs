//! Uploads: a bounded queue of content that was stored, and the tasks that write it to the bucket.
//!
//! Nothing waits for an upload. If the queue is full, the oldest entry is dropped: its content is on the disk, and another
//! cache that fetches it offers it again.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::breaker::Admission;
use super::{Active, SharedContent};
use crate::blocking;
use crate::bucket::{BucketError, Fault, ObjectInfo, ObjectKey, PART_BYTES, part_bytes};
use crate::oci::{Digest, Hasher};
use crate::store::AsyncStore;
use crate::store::blobs::BlobHandle;

/// Entries in the queue.
const QUEUED_MAX: usize = 1024;

/// Attempts of one upload.
const ATTEMPTS_MAX: u32 = 3;

/// How an object is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Unless it exists.
    Create,
    /// Again, because it is old.
    Renew,
    /// Over one that had wrong bytes.
    Replace,
}

/// An entry of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) content: SharedContent,
    pub(super) mode: Mode,
    attempts: u32,
}

impl Item {
    pub(super) fn new(content: SharedContent, mode: Mode) -> Self {
        Self {
            content,
            mode,
            attempts: 0,
        }
    }
}

/// The queue of uploads.
#[derive(Default)]
pub(super) struct Uploads {
    state: Mutex<State>,
    /// An entry was added, or the queue was closed.
    added: Notify,
    /// An upload has ended.
    ended: Notify,
    /// The bucket accepts uploads again, or the queue was closed.
    resumed: Notify,
}

/// Result of taking an entry out of turn.
enum Start {
    Taken,
    /// Its content is being uploaded.
    Running,
    /// The settings were replaced, or the process ends.
    Closed,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Item>,
    running: Vec<SharedContent>,
    is_closed: bool,
}

impl State {
    fn is_queued(&self, content: SharedContent) -> bool {
        self.queue.iter().any(|queued| queued.content == content)
    }
}

impl Uploads {
    /// Adds an entry, unless its content is queued or running. Returns whether the oldest entry was dropped for it.
    pub(super) fn push(&self, item: Item) -> bool {
        let mut state = self.state.lock();
        if state.is_closed || state.is_queued(item.content) || state.running.contains(&item.content) {
            return false;
        }
        let is_full = state.queue.len() >= QUEUED_MAX;
        if is_full {
            state.queue.pop_front();
        }
        state.queue.push_back(item);
        drop(state);
        self.added.notify_one();
        is_full
    }

    /// Drops the queue and lets the tasks end. Returns how many entries were dropped.
    pub(super) fn close(&self) -> usize {
        let mut state = self.state.lock();
        state.is_closed = true;
        let dropped = std::mem::take(&mut state.queue).len();
        drop(state);
        self.added.notify_waiters();
        self.ended.notify_waiters();
        self.resumed.notify_waiters();
        dropped
    }

    /// Ends the waiting of uploads that the bucket did not accept.
    pub(super) fn resume(&self) {
        self.resumed.notify_waiters();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.lock().is_closed
    }

    /// Number of queued and running uploads.
    pub(super) fn waiting(&self) -> usize {
        let state = self.state.lock();
        state.queue.len() + state.running.len()
    }

    /// Waits until nothing is queued or running, or until `is_stopped`.
    pub(super) async fn drained(&self, is_stopped: impl Fn() -> bool) {
        self.until(|state| (state.queue.is_empty() && state.running.is_empty()) || is_stopped())
            .await;
    }

    /// Waits until this content is neither queued nor running.
    pub(super) async fn over(&self, content: SharedContent) {
        self.until(|state| !state.is_queued(content) && !state.running.contains(&content))
            .await;
    }

    /// Waits until this content is not being uploaded. After a failed attempt it is queued again, for an unknown time.
    async fn attempted(&self, content: SharedContent) {
        self.until(|state| !state.running.contains(&content)).await;
    }

    /// Waits until the end of an upload leaves such a state.
    async fn until(&self, is_reached: impl Fn(&State) -> bool) {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            ended.as_mut().enable();
            if is_reached(&self.state.lock()) {
                return;
            }
            ended.await;
        }
    }

    /// Takes the next entry. `None`: the queue is closed.
    async fn next(&self) -> Option<Item> {
        loop {
            let mut added = std::pin::pin!(self.added.notified());
            added.as_mut().enable();
            {
                let mut state = self.state.lock();
                if let Some(item) = state.queue.pop_front() {
                    state.running.push(item.content);
                    return Some(item);
                }
                if state.is_closed {
                    return None;
                }
            }
            added.await;
        }
    }

    /// Takes an entry that may be queued out of turn.
    fn start(&self, item: Item) -> Start {
        let mut state = self.state.lock();
        if state.is_closed {
            return Start::Closed;
        }
        if state.running.contains(&item.content) {
            return Start::Running;
        }
        state.queue.retain(|queued| queued.content != item.content);
        state.running.push(item.content);
        Start::Taken
    }

    /// Ends an upload, and queues it again if `again`.
    fn end(&self, item: Item, again: bool) {
        let mut state = self.state.lock();
        state.running.retain(|content| *content != item.content);
        // Closed, it is tried no more: the settings were replaced.
        let again = again && !state.is_closed && state.queue.len() < QUEUED_MAX;
        if again {
            // At the end, so that the next probe is another one.
            state.queue.push_back(item);
        }
        drop(state);
        if again {
            self.added.notify_one();
        }
        self.ended.notify_waiters();
    }
}

/// Why an upload was not done.
#[derive(Debug)]
pub(super) enum UploadError {
    Bucket(BucketError),
    /// The content is not in the store any more, or cannot be read.
    Store,
    /// The file does not match its digest.
    Damaged,
}

impl From<BucketError> for UploadError {
    fn from(error: BucketError) -> Self {
        Self::Bucket(error)
    }
}

/// One task that uploads, until the queue is closed.
pub(super) async fn work(active: Arc<Active>, store: AsyncStore) {
    while let Some(mut item) = active.uploads.next().await {
        let Some(is_probe) = admitted(&active).await else {
            active.uploads.end(item, false);
            active.telemetry.shared().record_upload("dropped");
            return;
        };
        // While the bucket accepts nothing, an upload waits however often it is the probe.
        item.attempts += u32::from(!is_probe);
        attempt(&active, &store, item, is_probe).await;
    }
}

/// Uploads this content beside the queue, with one of these permits. Returns whether the bucket has it then. Otherwise it is in
/// the queue, unless no further attempt would succeed or the queue is closed.
pub(super) async fn upload_at_once(
    active: &Active,
    store: &AsyncStore,
    content: SharedContent,
    permits: &Semaphore,
) -> bool {
    let item = Item::new(content, active.mode_for(content, Mode::Create));
    if active.writes_open_since().is_some() {
        active.enqueue(item);
        return false;
    }
    match active.uploads.start(item) {
        Start::Taken => {}
        Start::Running => {
            active.uploads.attempted(content).await;
            return active.has(content).await;
        }
        Start::Closed => return false,
    }
    let item = Item { attempts: 1, ..item };
    // The semaphore is never closed. A shutdown waits for this upload too, because it counts as running.
    let _permit = permits.acquire().await;
    let is_closed = active.uploads.is_closed();
    if is_closed || active.writes_open_since().is_some() {
        active.uploads.end(item, true);
        let result = if is_closed { "dropped" } else { "retried" };
        active.telemetry.shared().record_upload(result);
        return false;
    }
    attempt(active, store, item, false).await
}

/// One attempt to upload an entry that is running. Returns whether the bucket has the content then.
async fn attempt(active: &Active, store: &AsyncStore, item: Item, is_probe: bool) -> bool {
    let result = upload(active, store, item).await;
    let (name, again) = match &result {
        Ok(()) => ("done", false),
        Err(UploadError::Bucket(BucketError::Exists)) => ("present", false),
        Err(UploadError::Store) => ("evicted", false),
        Err(UploadError::Damaged) => ("damaged", false),
        Err(UploadError::Bucket(error)) => {
            let again = error.fault() != Fault::None && (is_probe || item.attempts < ATTEMPTS_MAX);
            tracing::debug!(content = %item.content.key(), %error, again, "failed to upload to the shared storage");
            (if again { "retried" } else { "failed" }, again)
        }
    };
    active.telemetry.shared().record_upload(name);
    if result.is_ok() {
        // The right bytes are there now.
        active.refused.remove(&item.content.key());
    }
    active.uploads.end(item, again);
    // Otherwise the gauge is that of another bucket.
    if !active.uploads.is_closed() {
        let waiting = active.uploads.waiting() as u64;
        active.telemetry.shared().set_uploads_waiting(waiting);
    }
    matches!(name, "done" | "present")
}

/// Waits until the bucket may be written to. Whether the upload is a probe; `None`: the queue was closed.
pub(super) async fn admitted(active: &Active) -> Option<bool> {
    loop {
        let mut resumed = std::pin::pin!(active.uploads.resumed.notified());
        resumed.as_mut().enable();
        if active.uploads.is_closed() {
            return None;
        }
        match active.admit_write() {
            Admission::Granted => return Some(false),
            Admission::Probe => return Some(true),
            Admission::Later(at) => {
                // A probe by another task may succeed before.
                let _due = timeout_at(at, resumed).await;
            }
        }
    }
}

async fn upload(active: &Active, store: &AsyncStore, item: Item) -> Result<(), UploadError> {
    let (key, digest) = (item.content.key(), item.content.digest());
    match item.content {
        SharedContent::Manifest(_) => {
            let stored = store.read(move |view| view.manifest(&digest)).await;
            let manifest = stored.ok().flatten().ok_or(UploadError::Store)?;
            let media_type = manifest.media_type.to_string();
            put(
                active,
                (&key, item.mode),
                manifest.bytes.clone(),
                Some(&media_type),
            )
            .await
        }
        SharedContent::Blob(_) => {
            let stored = store.read(move |view| view.blob(&digest)).await;
            let blob = stored.ok().flatten().ok_or(UploadError::Store)?;
            if blob.size > PART_BYTES as u64 {
                return put_parts(active, (&key, item.mode), &blob, digest).await;
            }
            let bytes = read_part(&blob, 0, PART_BYTES).await?;
            if Digest::of(digest.algorithm(), &bytes) != digest {
                return Err(UploadError::Damaged);
            }
            put(active, (&key, item.mode), bytes, None).await
        }
    }
}

pub(super) async fn put(
    active: &Active,
    (key, mode): (&ObjectKey, Mode),
    bytes: Bytes,
    media_type: Option<&str>,
) -> Result<(), UploadError> {
    let size = bytes.len() as u64;
    match mode {
        Mode::Create if !active.keeps_conditions().await? => check_absent(active, key, size).await?,
        Mode::Renew => check_old(active, key, size).await?,
        Mode::Create | Mode::Replace => {}
    }
    match write(active, (key, mode), bytes.clone(), media_type).await {
        Err(BucketError::Exists) if mode == Mode::Create => {
            check_absent(active, key, size).await?;
            Ok(write(active, (key, Mode::Replace), bytes, media_type).await?)
        }
        written => Ok(written?),
    }
}

async fn write(
    active: &Active,
    (key, mode): (&ObjectKey, Mode),
    bytes: Bytes,
    media_type: Option<&str>,
) -> Result<(), BucketError> {
    let (size, bucket) = (bytes.len() as u64, &active.settings.bucket);
    let began = Instant::now();
    let (operation, written) = match mode {
        Mode::Create => {
            let created = bucket.create(key, bytes, media_type).await;
            ("create", created.map(drop))
        }
        Mode::Renew | Mode::Replace => ("put", bucket.put(key, bytes, media_type).await),
    };
    active.record_write(operation, &written, began.elapsed());
    if written.is_ok() {
        active.telemetry.shared().add_bytes("sent", size);
    }
    written
}

/// Fails with [`BucketError::Exists`] if the bucket has the object. One of another size has wrong bytes.
async fn check_absent(active: &Active, key: &ObjectKey, size: u64) -> Result<(), UploadError> {
    match found(active, key, size).await? {
        Some(_) => Err(BucketError::Exists.into()),
        None => Ok(()),
    }
}

/// Fails with [`BucketError::Exists`] if another cache has renewed the object.
async fn check_old(active: &Active, key: &ObjectKey, size: u64) -> Result<(), UploadError> {
    let age = found(active, key, size).await?.and_then(|found| found.age);
    if age.is_some_and(|age| age <= active.settings.keep / 2) {
        return Err(BucketError::Exists.into());
    }
    Ok(())
}

/// The object, if it has the right size.
async fn found(active: &Active, key: &ObjectKey, size: u64) -> Result<Option<ObjectInfo>, UploadError> {
    let began = Instant::now();
    let found = active.settings.bucket.head(key).await;
    match &found {
        Err(error) if error.fault() != Fault::None => active.record_write("head", &found, began.elapsed()),
        // A read that succeeds does not show that writes are accepted.
        _ => active.record_request("head", &found, Some(began.elapsed())),
    }
    match found {
        Ok(found) if found.size == size => Ok(Some(found)),
        Ok(_) => {
            active.report_wrong(key);
            Ok(None)
        }
        Err(BucketError::Absent | BucketError::Unreadable(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Uploads a large blob. Two caches may do so at once; both write the same bytes.
async fn put_parts(
    active: &Active,
    (key, mode): (&ObjectKey, Mode),
    blob: &BlobHandle,
    digest: Digest,
) -> Result<(), UploadError> {
    let bucket = &active.settings.bucket;
    match mode {
        Mode::Create => check_absent(active, key, blob.size).await?,
        Mode::Renew => check_old(active, key, blob.size).await?,
        Mode::Replace => {}
    }
    let began = Instant::now();
    let opened = bucket.upload(key).await;
    active.record_write("upload", &opened, began.elapsed());
    let mut upload = opened?;
    let sent = async {
        let (mut hasher, mut offset) = (Hasher::new(digest.algorithm()), 0);
        let part_bytes = part_bytes(blob.size);
        while offset < blob.size {
            let bytes = read_part(blob, offset, part_bytes).await?;
            let size = bytes.len() as u64;
            hasher.update(&bytes);
            offset += size;
            let began = Instant::now();
            let part = upload.part(bytes).await;
            active.record_write("part", &part, began.elapsed());
            part?;
            active.telemetry.shared().add_bytes("sent", size);
        }
        if hasher.finish() != digest {
            return Err(UploadError::Damaged);
        }
        let began = Instant::now();
        let completed = upload.complete().await;
        active.record_write("complete", &completed, began.elapsed());
        Ok(completed?)
    };
    let sent: Result<(), UploadError> = sent.await;
    if sent.is_err()
        && let Err(error) = upload.abort().await
    {
        tracing::debug!(%key, %error, "failed to delete the parts of an upload");
    }
    sent
}

/// Reads up to `length` bytes of a blob at `offset`; at least one.
async fn read_part(blob: &BlobHandle, offset: u64, length: usize) -> Result<Bytes, UploadError> {
    let blob = blob.clone();
    let left = usize::try_from(blob.size.saturating_sub(offset)).unwrap_or(usize::MAX);
    let read = blocking::read_file(move || {
        let mut bytes = vec![0; length.min(left)];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match blob.file.read_at(rest, offset + filled as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    });
    match read.await {
        Ok(bytes) => Ok(Bytes::from(bytes)),
        _ => Err(UploadError::Store),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::oci::Algorithm;

    fn item(number: usize) -> Item {
        let digest = Digest::of(Algorithm::Sha256, &number.to_be_bytes());
        Item::new(SharedContent::Blob(digest), Mode::Create)
    }

    #[tokio::test]
    async fn full_queue_drops_the_oldest() {
        let uploads = Uploads::default();
        for number in 0..QUEUED_MAX {
            assert!(!uploads.push(item(number)));
        }
        assert!(uploads.push(item(QUEUED_MAX)));
        assert_eq!(uploads.waiting(), QUEUED_MAX);
        assert_eq!(uploads.next().await, Some(item(1)), "0 was dropped");
    }

    #[tokio::test]
    async fn content_is_queued_once_even_while_it_runs() {
        let uploads = Uploads::default();
        uploads.push(item(1));
        uploads.push(item(1));
        let running = uploads.next().await.unwrap();
        uploads.push(item(1));
        assert_eq!(uploads.waiting(), 1);
        uploads.end(running, false);
        assert_eq!(uploads.waiting(), 0);
    }

    #[tokio::test]
    async fn closed_queue_is_dropped_and_ends_its_tasks() {
        let uploads = Uploads::default();
        uploads.push(item(1));
        uploads.push(item(2));
        let running = uploads.next().await.unwrap();
        assert_eq!(uploads.close(), 1);
        uploads.end(running, true);
        assert_eq!(uploads.next().await, None, "a closed queue retries nothing");
        assert!(!uploads.push(item(2)) && uploads.waiting() == 0);
    }

    #[tokio::test]
    async fn drain_ends_with_the_last_upload_or_a_stop() {
        let uploads = Arc::new(Uploads::default());
        uploads.drained(|| false).await;
        uploads.push(item(1));
        uploads.drained(|| true).await;
        let running = uploads.next().await.unwrap();
        let drained = uploads.drained(|| false);
        let ended = async { uploads.end(running, false) };
        tokio::join!(drained, ended);
    }
}
