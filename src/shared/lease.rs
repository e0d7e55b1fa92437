//! Owner of a claim: keeps it alive until the blob is in the bucket, and uploads parts of the file that arrives while
//! another cache reads them.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::claim::{Held, HeldStep, part_end};
use super::claims::LeaseGuard;
use super::{Active, SharedContent};
use crate::bucket::ObjectKey;

/// Attempts to upload one part, and the pause between them.
const PART_ATTEMPTS_MAX: u32 = 3;
const PART_PAUSE: Duration = Duration::from_secs(1);

/// A pending read of a file that arrives.
pub type ArrivingFuture<'a, T> = Pin<Box<dyn Future<Output = Option<T>> + Send + 'a>>;

/// The file of a blob that is being downloaded.
pub trait Arriving: Send + Sync + 'static {
    /// Number of bytes that have arrived.
    fn received(&self) -> u64;

    /// Waits until the bytes before `until` can be read, or the blob has ended. Returns the end of what can be read then.
    /// `None`: the download failed.
    fn reached(&self, until: u64) -> ArrivingFuture<'_, u64>;

    /// Reads bytes that can be read.
    fn read(&self, start: u64, length: usize) -> ArrivingFuture<'_, Bytes>;
}

/// State of the download.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Phase {
    /// Size of the blob, once the upstream has stated it.
    size: Option<u64>,
    /// Stored here and offered for upload.
    is_stored: bool,
}

/// A claim that this process holds. Dropping it deletes the claim, unless the blob was stored: then the claim lives until
/// the blob is in the bucket.
pub struct Lease(watch::Sender<Phase>);

impl Lease {
    pub(super) fn start(
        active: &Arc<Active>,
        content: SharedContent,
        (held, guard): (Held, LeaseGuard),
        arriving: Arc<dyn Arriving>,
    ) -> Self {
        let (sender, phase) = watch::channel(Phase::default());
        let owner = Owner {
            active: Arc::clone(active),
            content,
            claim: ObjectKey::claim(&content.digest()),
            held,
            phase,
            arriving,
            has_ended: false,
        };
        tokio::spawn(async move {
            owner.run().await;
            drop(guard);
        });
        Self(sender)
    }

    /// The upstream has stated the size of the blob.
    pub fn set_size(&self, size: u64) {
        self.0.send_modify(|phase| phase.size = Some(size));
    }

    /// The blob is stored, and was offered for upload.
    pub fn stored(&self) {
        self.0.send_modify(|phase| phase.is_stored = true);
    }
}

/// Result of the upload of a part.
enum Published {
    /// The bytes before this one are in parts.
    Until(u64),
    /// There are no more, or they cannot be uploaded.
    Ended,
}

type Publishing = Pin<Box<dyn Future<Output = Published> + Send>>;

struct Owner {
    active: Arc<Active>,
    content: SharedContent,
    claim: ObjectKey,
    held: Held,
    phase: watch::Receiver<Phase>,
    arriving: Arc<dyn Arriving>,
    /// There are no more parts, or they cannot be uploaded.
    has_ended: bool,
}

impl Owner {
    async fn run(mut self) {
        let mut closing = self.active.claims.leases.closing();
        let mut publishing: Option<Publishing> = None;
        let is_stored = loop {
            let phase = *self.phase.borrow_and_update();
            if let Some(size) = phase.size {
                self.held.set_size(size);
            }
            self.held.receive(self.arriving.received());
            let rest_until = match self.held.next(Instant::now()) {
                HeldStep::Write(record, etag) => {
                    let began = Instant::now();
                    let written = self.active.write_claim(&self.claim, &record, &etag).await;
                    self.held.written(&record, written, began);
                    continue;
                }
                HeldStep::Look => {
                    let look = self.active.look(&self.claim).await;
                    self.held.looked(look, Instant::now());
                    continue;
                }
                HeldStep::Rest(until) => until,
                HeldStep::Lost => {
                    tracing::debug!(claim = %self.claim, "lost a claim of the shared storage");
                    self.active.telemetry.shared().record_claim("lost");
                    return;
                }
            };
            if self.held.is_wanted() && publishing.is_none() && !self.has_ended {
                let (active, arriving) = (Arc::clone(&self.active), Arc::clone(&self.arriving));
                publishing = Some(Box::pin(publish(
                    active,
                    self.content,
                    arriving,
                    self.held.published(),
                )));
            }
            let is_stored = phase.is_stored;
            if is_stored && self.active.writes_open_since().is_some() {
                // The upload waits for an unknown time.
                break false;
            }
            tokio::select! {
                () = sleep_until(rest_until) => {}
                published = ending(&mut publishing) => {
                    publishing = None;
                    match published {
                        Published::Until(until) => self.held.publish(until),
                        Published::Ended => self.has_ended = true,
                    }
                }
                () = self.active.uploads.over(self.content), if is_stored => break true,
                changed = self.phase.changed(), if !is_stored => if changed.is_err() {
                    break false;
                },
                () = async { drop(closing.wait_for(|is_closing| *is_closing).await) } => break false,
            }
        };
        self.release(is_stored, publishing).await;
    }

    async fn release(mut self, is_stored: bool, publishing: Option<Publishing>) {
        if !self.held.is_current(Instant::now()) {
            return;
        }
        self.active.delete_of_claim(&self.claim).await;
        // Otherwise the next owner writes the same parts, perhaps already.
        if !is_stored {
            return;
        }
        // A part that is being uploaded would be left over.
        if let Some(publishing) = publishing
            && let Published::Until(until) = publishing.await
        {
            self.held.publish(until);
        }
        let (digest, mut start) = (self.content.digest(), 0);
        // What the owner before had published may be a lie.
        let published = self.held.published().min(self.arriving.received());
        while start < published {
            let part = ObjectKey::part(&digest, start);
            self.active.delete_of_claim(&part).await;
            start = part_end(start);
        }
    }
}

async fn ending(publishing: &mut Option<Publishing>) -> Published {
    match publishing {
        Some(publishing) => publishing.await,
        None => pending().await,
    }
}

/// Uploads the part that begins at `start`, as soon as its bytes have arrived.
async fn publish(
    active: Arc<Active>,
    content: SharedContent,
    arriving: Arc<dyn Arriving>,
    start: u64,
) -> Published {
    let until = part_end(start);
    let end = arriving.reached(until).await.unwrap_or(start).min(until);
    let length = usize::try_from(end.saturating_sub(start)).unwrap_or(0);
    if length == 0 {
        return Published::Ended;
    }
    // The semaphore is never closed.
    let _permit = active.claims.publishers.acquire().await;
    let Some(bytes) = arriving.read(start, length).await else {
        return Published::Ended;
    };
    let key = ObjectKey::part(&content.digest(), start);
    for _ in 0..PART_ATTEMPTS_MAX {
        let began = Instant::now();
        let put = active.settings.bucket.put(&key, bytes.clone(), None).await;
        active.record_claim("part-put", &put, began);
        if put.is_ok() {
            active.telemetry.shared().add_bytes("sent", length as u64);
            return Published::Until(end);
        }
        sleep(PART_PAUSE).await;
    }
    Published::Ended
}
