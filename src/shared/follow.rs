//! Follower of a claim: reads the parts that another cache uploads while it downloads a blob, then the rest of the object.
//!
//! A break is an error of the stream. The download then decides again: it takes over the claim of an owner that died, and
//! reads on from its upstream if the owner stalls.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::claim::{FollowStep, Followed, part_end, part_start};
use super::claims::ClaimMemory;
use super::{Active, SharedContent, SharedObject};
use crate::bucket::{BucketError, ObjectKey};
use crate::oci::UpstreamFailure;

/// Interval of reads of the claim.
const LOOK: Duration = Duration::from_millis(200);

/// Longest time before the first look. Each cache has its own, so that one of them asks for parts and the others see it.
const STAGGER: Duration = Duration::from_millis(150);

/// Parts that may be missing although they were published.
const MISSING_MAX: u32 = 1;

/// A blob that another cache downloads.
pub struct Follower {
    active: Arc<Active>,
    content: SharedContent,
    claim: ObjectKey,
    memory: ClaimMemory,
    followed: Followed,
    /// Offset of the next byte.
    position: u64,
    reading: Option<Reading>,
    missing: u32,
    began: Instant,
    is_first: bool,
    has_failed: bool,
    /// Time until the next look.
    pause: Duration,
    /// The write that asks for parts.
    asking: Option<JoinHandle<()>>,
}

/// A part, or the object itself, up to this byte.
struct Reading {
    object: SharedObject,
    end: Option<u64>,
}

impl Follower {
    pub(super) fn new(
        active: &Arc<Active>,
        (content, from): (SharedContent, u64),
        memory: ClaimMemory,
        followed: Followed,
    ) -> Self {
        Self {
            active: Arc::clone(active),
            content,
            claim: ObjectKey::claim(&content.digest()),
            memory,
            followed,
            position: from,
            reading: None,
            missing: 0,
            began: Instant::now(),
            is_first: true,
            has_failed: false,
            pause: STAGGER.mul_f64(active.claims.leases.me.share()),
            asking: None,
        }
    }

    /// Size of the blob, as the upstream has stated it to the owner.
    pub fn size(&self) -> Option<u64> {
        self.followed.size()
    }

    /// Waits until the size is known or bytes are there. Fails if the claim has to be left.
    pub async fn opened(&mut self) -> Result<(), BucketError> {
        while self.followed.size().is_none() && self.reading.is_none() {
            self.advance().await?;
        }
        Ok(())
    }

    /// The next bytes, or `None` at the end. Nothing follows an error.
    pub async fn chunk(&mut self) -> Option<Result<Bytes, BucketError>> {
        loop {
            if self.has_failed || self.followed.size().is_some_and(|size| self.position >= size) {
                return None;
            }
            if let Some(reading) = &mut self.reading {
                let chunk = reading.object.chunk().await;
                match (chunk, reading.end) {
                    (Some(Ok(bytes)), _) => {
                        self.position += bytes.len() as u64;
                        self.followed.progress(Instant::now());
                        if std::mem::take(&mut self.is_first) {
                            self.active
                                .telemetry
                                .shared()
                                .record_follow_wait(self.began.elapsed());
                        }
                        if reading.end == Some(self.position) {
                            self.reading = None;
                        }
                        return Some(Ok(bytes));
                    }
                    // The end of the object.
                    (None, None) => return None,
                    (failed, _) => {
                        let error = failed.and_then(Result::err);
                        return Some(Err(self.fail(error)));
                    }
                }
            }
            if let Err(error) = self.advance().await {
                return Some(Err(error));
            }
        }
    }

    fn fail(&mut self, error: Option<BucketError>) -> BucketError {
        self.has_failed = true;
        error.unwrap_or(BucketError::Silent(UpstreamFailure::ConnectionReset))
    }

    /// Opens the next part or the object, or reads the claim.
    async fn advance(&mut self) -> Result<(), BucketError> {
        if self.followed.published() > self.position && self.open_part().await {
            return Ok(());
        }
        if self.missing > MISSING_MAX {
            return Err(self.leave("missing parts"));
        }
        sleep(std::mem::replace(&mut self.pause, LOOK)).await;
        if self.active.reads.lock().breaker.open_since().is_some() {
            return Err(self.leave("bucket unavailable"));
        }
        let look = self.active.look(&self.claim).await;
        let (position, now) = (self.position, Instant::now());
        let followed = &mut self.followed;
        match self
            .memory
            .watching(|watch| followed.looked(look, position, watch, now))
        {
            FollowStep::Read | FollowStep::Wait => {
                self.ask();
                Ok(())
            }
            FollowStep::Gone => self.open_object().await,
            // The next entry takes over.
            FollowStep::Dead => Err(self.fail(None)),
            FollowStep::Stalled => Err(self.leave("no progress")),
            FollowStep::Invalid => Err(self.leave("invalid claim")),
        }
    }

    /// Asks the owner for parts, unless they are wanted already. The next look shows whether it succeeded: a refusal may
    /// take long.
    fn ask(&mut self) {
        let is_asking = self.asking.as_ref().is_some_and(|asking| !asking.is_finished());
        let etag = self.memory.watching(|watch| watch.etag());
        if let Some((wanted, etag)) = self.followed.wanted().zip(etag)
            && self.active.settings.write
            && !is_asking
        {
            let (active, claim) = (Arc::clone(&self.active), self.claim.clone());
            self.asking = Some(tokio::spawn(async move {
                let _ = active.write_claim(&claim, &wanted, &etag).await;
            }));
        }
    }

    /// The download goes on from its upstream.
    fn leave(&mut self, reason: &'static str) -> BucketError {
        tracing::debug!(claim = %self.claim, reason, "not following a claim of the shared storage any more");
        self.active.telemetry.shared().record_claim("left");
        self.memory.bar();
        self.fail(None)
    }

    /// Opens the part that has the next byte. `false`: it is missing, or is no such part.
    async fn open_part(&mut self) -> bool {
        let start = part_start(self.position);
        let end = part_end(start).min(self.followed.published());
        let key = ObjectKey::part(&self.content.digest(), start);
        let opened = self.active.open_key(key, self.position - start).await;
        let opened = opened.filter(|object| object.info.size == end - start);
        let is_open = opened.is_some();
        self.missing += u32::from(!is_open);
        self.reading = opened.map(|object| Reading {
            object,
            end: Some(end),
        });
        is_open
    }

    /// The claim is gone. The rest of the blob is in its object, or the owner gave up.
    async fn open_object(&mut self) -> Result<(), BucketError> {
        let size = self.followed.size();
        let opened = self.active.open(self.content, self.position).await;
        match opened.filter(|object| size.is_none_or(|size| size == object.info.size)) {
            Some(object) => {
                self.reading = Some(Reading { object, end: None });
                Ok(())
            }
            None if size.is_none() && self.is_at_the_end().await => {
                self.followed.end_at(self.position);
                Ok(())
            }
            None => Err(self.fail(None)),
        }
    }

    /// Whether the object ends at the position: the owner did not state the size, and nothing is left to read.
    async fn is_at_the_end(&mut self) -> bool {
        let head = self.active.settings.bucket.head(&self.content.key()).await;
        head.is_ok_and(|info| self.position > 0 && info.size == self.position)
    }
}
