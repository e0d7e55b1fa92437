//! A 2xx answer to a GET, and its body as it arrives.

use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::sync::OwnedSemaphorePermit;

use super::client::Body;
use crate::oci::cause::Cause;
use crate::oci::digest::Digest;
use crate::oci::header::RateLimit;
use crate::oci::manifest::MediaType;

/// What a GET brought. Dropping it ends the transfer. Nothing in it is verified: digest and length are promises.
pub struct Fetched {
    /// 200, or 206 if a range was asked for and given.
    pub status: StatusCode,
    /// `Docker-Content-Digest`, if there is one that can be computed.
    pub digest: Option<Digest>,
    /// `Content-Type`.
    pub media_type: Option<MediaType>,
    /// Length of this body in bytes.
    pub length: Option<u64>,
    /// Offset of this body's first byte; 0 for a 200, also where a range was asked for and not given.
    pub start: u64,
    /// Length of the whole in bytes.
    pub total: Option<u64>,
    /// What the upstream says is left of the caller's allowance.
    pub rate_limit: RateLimit,
    /// All headers of the answer. Only named ones may be passed on (`Link`, `OCI-Filters-Applied`).
    pub headers: HeaderMap,
    pub(super) body: Body,
    /// Held until the transfer ends.
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

impl Fetched {
    /// The next bytes; `None` at the end and only there. A body shorter than its `Content-Length` is an error
    /// ([`Cause::Reset`]), as is one that pauses for longer than the idle limit ([`Cause::Timeout`]).
    pub async fn chunk(&mut self) -> Option<Result<Bytes, Cause>> {
        self.body.chunk().await
    }

    /// The whole body; [`Cause::TooLarge`] as soon as it is known to be longer than `bytes_max`.
    pub async fn collect(self, bytes_max: usize) -> Result<Bytes, Cause> {
        let Fetched { body, permit, .. } = self;
        let collected = body.collect(bytes_max).await;
        drop(permit);
        collected
    }
}

impl fmt::Debug for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetched")
            .field("status", &self.status)
            .field("digest", &self.digest)
            .field("length", &self.length)
            .field("start", &self.start)
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}
