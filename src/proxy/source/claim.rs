//! Claims of a download source: a blob that the shared storage lacks is fetched by one of several caches, and the others
//! follow it.

use std::sync::Arc;

use tokio::time::Instant;

use super::{SharedBody, UpstreamSource};
use crate::bucket::BucketError;
use crate::download::{ByteStream, ChunkFuture, Observer, Source, Stream};
use crate::oci::UpstreamFailure;
use crate::shared::{Arriving, ArrivingFuture, Entered, Follower};
use crate::upstream::UpstreamResponse;

impl UpstreamSource {
    /// Enters the claim of this blob, which the shared storage lacks. `None`: the upstream must send it, or the rest of it.
    /// `began`: when the client's wait for the shared storage began.
    pub(super) async fn enter_claim(
        &mut self,
        from: u64,
        began: Instant,
    ) -> Result<Option<Stream>, UpstreamResponse> {
        if self.lease.is_some() || self.sent_at.is_some() {
            return Ok(None);
        }
        let waiters = self.waiters.clone();
        let entering = Box::pin(self.entered(from, began));
        let entered = match waiters {
            Some(waiters) => waiters.while_waited_for(entering).await,
            None => Some(entering.await),
        };
        entered.ok_or_else(|| UpstreamResponse::unavailable(UpstreamFailure::Abandoned))
    }

    async fn entered(&mut self, from: u64, mut began: Instant) -> Option<Stream> {
        let stated = Source::stated_size(self);
        let observer = self.observer.clone()?;
        loop {
            let reading = self.shared.as_mut()?;
            let arriving: Arc<dyn Arriving> = Arc::new(ArrivingBlob(observer.clone()));
            let claim_read = reading.claim_read.take();
            let entered = self
                .proxy
                .shared
                .enter(
                    (self.digest, from),
                    (stated, claim_read),
                    (&reading.claims, arriving),
                    began,
                )
                .await;
            match entered {
                Entered::Alone => return None,
                Entered::Leads(lease) => {
                    self.lease = Some(lease);
                    return None;
                }
                Entered::Found(object) => {
                    let fits = stated.is_none_or(|stated| stated == object.info.size);
                    return fits.then(|| self.shared_stream(from, *object));
                }
                Entered::Follows(mut follower) => {
                    if follower.opened().await.is_ok() {
                        reading.is_followed = true;
                        let total = follower.size().filter(|size| stated == Some(*size));
                        return Some(self.stream_from_bucket(from, total, Box::new(FollowedBody(follower))));
                    }
                    began = Instant::now();
                }
            }
        }
    }

    /// A stream of an object.
    pub(super) fn shared_stream(&mut self, from: u64, object: crate::shared::SharedObject) -> Stream {
        if let Some(reading) = &mut self.shared {
            reading.age = object.info.age;
        }
        let stated = Source::stated_size(self);
        // The size is promised to clients only if two sources agree on it.
        self.stream_from_bucket(from, stated, Box::new(SharedBody(object)))
    }
}

/// Bytes of a blob that another cache fetches.
struct FollowedBody(Box<Follower>);

impl ByteStream for FollowedBody {
    fn chunk(&mut self) -> ChunkFuture<'_> {
        Box::pin(async move {
            let chunk = self.0.chunk().await?;
            Some(chunk.map_err(|error| cause_of(&error)))
        })
    }
}

pub(super) fn cause_of(error: &BucketError) -> UpstreamFailure {
    match error {
        BucketError::Silent(cause) => *cause,
        _ => UpstreamFailure::ConnectionReset,
    }
}

/// The file of the download, for the parts that other caches read.
struct ArrivingBlob(Observer);

impl Arriving for ArrivingBlob {
    fn received(&self) -> u64 {
        self.0.received()
    }

    fn reached(&self, until: u64) -> ArrivingFuture<'_, u64> {
        Box::pin(self.0.reached(until))
    }

    fn read(&self, start: u64, length: usize) -> ArrivingFuture<'_, bytes::Bytes> {
        Box::pin(self.0.read(start, length))
    }
}
