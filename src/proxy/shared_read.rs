//! Reads of the shared storage: which requests may use it, and manifests from there. Blobs: see `source`.
//!
//! The bucket decides nothing. A client gets bytes from there exactly where it would get the bytes of another client's
//! download: it has a current grant in the repository, and the upstream was seen to have the digest there. Anything else
//! is requested from the upstream, and nothing is looked up in the bucket before. So neither the requests nor their
//! time tell a client what the bucket has. There is one exception: while the upstream is requested by `HEAD` for a blob
//! that a manifest of the repository references, the bucket is read ahead, if the upstream confirmed the last such request
//! at once. The client gets a denial without waiting for the bucket.

use std::sync::Arc;
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::ProxyService;
use super::manifest_fetch::{UpstreamRequest, verify};
use crate::oci::manifest::MANIFEST_BYTES_MAX;
use crate::oci::{AnyDigest, Digest, Endpoint, Reference, Repository, UpstreamFailure};
use crate::queue::Waiters;
use crate::shared::{ManifestLease, ManifestTurn, SharedContent, SharedStorage, Unread};
use crate::store::manifests::StoredManifest;
use crate::upstream::{ResponseKind, UpstreamResponse};

/// How long a repository of which the bucket lacked content probably has more such content.
const LACKING_PERIOD: Duration = Duration::from_secs(60);

/// Repositories that are remembered.
const LACKING_MAX: usize = 4096;

/// Longest time that a blob stays open in the bucket while the upstream has not confirmed it.
pub(super) const AHEAD_MAX: Duration = Duration::from_secs(1);

/// Upstreams that are remembered.
const CONFIRMING_MAX: usize = 256;

/// Repositories of which the bucket lacked the last content that was read: a pull that is cold everywhere.
pub(super) struct Lacking(Cache<(Arc<str>, Repository), Instant>);

impl Default for Lacking {
    fn default() -> Self {
        Self(Cache::new(LACKING_MAX))
    }
}

impl Lacking {
    pub(super) fn place(upstream_request: &UpstreamRequest) -> (Arc<str>, Repository) {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        (registry.shared_name(), repository.clone())
    }

    pub(super) fn record(&self, place: (Arc<str>, Repository), is_absent: bool) {
        if is_absent {
            self.0.insert(place, Instant::now());
        } else {
            self.0.remove(&place);
        }
    }

    pub(super) fn is_likely(&self, place: &(Arc<str>, Repository)) -> bool {
        let since = self.0.get(place);
        since.is_some_and(|since| since.elapsed() < LACKING_PERIOD)
    }
}

/// Upstreams whose last response to a `HEAD` for a right confirmed the digest within [`AHEAD_MAX`].
pub(super) struct Confirming(Cache<Arc<str>, ()>);

impl Default for Confirming {
    fn default() -> Self {
        Self(Cache::new(CONFIRMING_MAX))
    }
}

impl Confirming {
    fn record(&self, upstream: Arc<str>, right: &SharedRight, took: Duration) {
        if matches!(right, SharedRight::Granted) && took < AHEAD_MAX {
            self.0.insert(upstream, ());
        } else {
            self.0.remove(&upstream);
        }
    }

    fn is_likely(&self, upstream: &Arc<str>) -> bool {
        self.0.get(upstream).is_some()
    }
}

/// From where a request by digest may be served.
pub(super) enum SharedRight {
    /// From the shared storage.
    Granted,
    /// From the upstream only.
    UpstreamOnly,
    /// From nowhere: this response of the upstream is the result.
    Refused(Arc<UpstreamResponse>),
}

/// Result of a read of a manifest in the shared storage.
pub(super) enum SharedManifest {
    /// Verified, with the age of its object if the storage states it.
    Read(Box<StoredManifest>, Option<Duration>),
    /// It may be read there, and the bucket lacks it.
    Absent(Digest),
    /// It must be fetched from the upstream.
    Missing,
    /// This response of the upstream is the result.
    Refused(Arc<UpstreamResponse>),
}

impl ProxyService {
    /// The shared storage.
    pub fn shared(&self) -> &Arc<SharedStorage> {
        &self.shared
    }

    /// From where this request, which is for this digest, may be served. If the caller has a grant in the repository and
    /// the digest was not seen there yet, the upstream is requested by `HEAD`, whatever the bucket has. Its denial is
    /// final: another request would only double the wait.
    pub(super) async fn shared_right(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
    ) -> SharedRight {
        match self.known_right(upstream_request, digest).await {
            Some(right) => right,
            None => self.requested_right(upstream_request, digest).await,
        }
    }

    /// The same if no request to the upstream is needed.
    pub(super) async fn known_right(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
    ) -> Option<SharedRight> {
        if !self.shared.is_readable() || !self.is_authorized(upstream_request).await {
            return Some(SharedRight::UpstreamOnly);
        }
        if self.is_seen(upstream_request, digest).await {
            return Some(SharedRight::Granted);
        }
        let is_manifest = matches!(upstream_request.endpoint, Endpoint::Manifest { .. });
        if is_manifest && self.is_recorded(upstream_request, digest).await {
            return Some(SharedRight::Granted);
        }
        let was_silent = self.shared.was_silent_since(upstream_request.since);
        was_silent.then_some(SharedRight::UpstreamOnly)
    }

    /// The same after a `HEAD` to the upstream.
    pub(super) async fn requested_right(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
    ) -> SharedRight {
        let began = Instant::now();
        let right = self.right_by_head(upstream_request, digest).await;
        if self.is_referenced(upstream_request, digest) {
            self.confirming
                .record(upstream_request.registry.shared_name(), &right, began.elapsed());
        }
        right
    }

    /// Whether the bucket may be read while the upstream is requested: not for a digest that the client made up.
    pub(super) fn is_read_ahead(&self, upstream_request: &UpstreamRequest, digest: Digest) -> bool {
        let upstream = upstream_request.registry.shared_name();
        self.is_referenced(upstream_request, digest) && self.confirming.is_likely(&upstream)
    }

    async fn right_by_head(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
    ) -> SharedRight {
        let Some(response) = self.coalesced_head(upstream_request).wait().await else {
            let abandoned = UpstreamResponse::unavailable(UpstreamFailure::Abandoned);
            return SharedRight::Refused(Arc::new(abandoned));
        };
        match response.kind {
            // This registry may respond to a `GET` only.
            ResponseKind::Unavailable(UpstreamFailure::Malformed | UpstreamFailure::Status(501)) => {
                SharedRight::UpstreamOnly
            }
            ResponseKind::NotFound | ResponseKind::Denied | ResponseKind::Unavailable(_) => {
                SharedRight::Refused(response)
            }
            _ if self.is_seen(upstream_request, digest).await
                && self.is_authorized(upstream_request).await =>
            {
                SharedRight::Granted
            }
            _ => SharedRight::UpstreamOnly,
        }
    }

    /// Whether another cache has seen the manifest in the repository. It is a member then.
    async fn is_recorded(self: &Arc<Self>, upstream_request: &UpstreamRequest, digest: Digest) -> bool {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        if self
            .recorded_children(registry, repository, digest)
            .await
            .is_none()
        {
            return false;
        }
        self.add_member(registry, repository, digest).await;
        self.is_seen(upstream_request, digest).await
    }

    /// Whether the digest is known to be in the repository now.
    async fn is_seen(self: &Arc<Self>, upstream_request: &UpstreamRequest, digest: Digest) -> bool {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        !self.is_invalidated(registry, repository, digest.into())
            && self.is_member(registry, repository, digest).await
    }

    /// Reads the manifest of this request from the shared storage. If the bucket lacks it, this cache claims it, or waits for
    /// the cache that has claimed it, as long as all requests that wait for the result may. With a lease, this cache requests
    /// it from the upstream.
    pub(super) async fn read_or_claim_manifest(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        waiters: &Waiters,
    ) -> (SharedManifest, Option<ManifestLease>) {
        let digest = match self.read_shared_manifest(upstream_request).await {
            SharedManifest::Absent(digest) => digest,
            found => return (found, None),
        };
        let claiming = async {
            match self.shared.claim_manifest(digest).await {
                ManifestTurn::Leads(lease) => (SharedManifest::Missing, Some(lease)),
                ManifestTurn::Alone => (SharedManifest::Missing, None),
                // The right is established again: it may have ended meanwhile.
                ManifestTurn::Written => (self.read_shared_manifest(upstream_request).await, None),
            }
        };
        // Boxed, because most requests find the manifest.
        let claimed = waiters.pause().run(Box::pin(claiming)).await;
        claimed.unwrap_or((SharedManifest::Missing, None))
    }

    /// Reads the manifest of this request from the shared storage, if it may be read there.
    async fn read_shared_manifest(self: &Arc<Self>, upstream_request: &UpstreamRequest) -> SharedManifest {
        // A request that has waited for the bucket once asks it nothing more.
        if !self.shared.is_readable() || self.shared.was_silent_since(upstream_request.since) {
            return SharedManifest::Missing;
        }
        let (digest, is_by_tag) = match &upstream_request.endpoint {
            Endpoint::Manifest {
                reference: Reference::Digest(AnyDigest::Supported(digest)),
                ..
            } => (Some(*digest), false),
            Endpoint::Manifest {
                reference: Reference::Tag(_),
                ..
            } => (upstream_request.named, true),
            _ => (None, false),
        };
        let Some(digest) = digest else {
            return SharedManifest::Missing;
        };
        let by_digest = upstream_request.clone().by_digest(digest);
        match self.shared_right(&by_digest, digest).await {
            SharedRight::Granted => {}
            SharedRight::Refused(response) if !is_by_tag => return SharedManifest::Refused(response),
            // A denial of the digest is none of the tag.
            SharedRight::Refused(_) | SharedRight::UpstreamOnly => return SharedManifest::Missing,
        }
        let content = SharedContent::Manifest(digest);
        let read = self.shared.read(content, MANIFEST_BYTES_MAX).await;
        let place = Lacking::place(upstream_request);
        self.lacking.record(place, matches!(read, Err(Unread::Absent)));
        let (bytes, object) = match read {
            Ok(read) => read,
            Err(Unread::Absent) => return SharedManifest::Absent(digest),
            Err(Unread::Unavailable) => return SharedManifest::Missing,
        };
        // The media type is read from the bytes, and not from the bucket's label.
        if let Ok(manifest) = verify(bytes, None, None, &by_digest.endpoint) {
            SharedManifest::Read(Box::new(manifest), object.info.age)
        } else {
            self.shared.report_wrong(content);
            SharedManifest::Missing
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_is_read_ahead_after_a_quick_confirmation_only() {
        let (confirming, upstream) = (Confirming::default(), Arc::<str>::from("registry"));
        assert!(!confirming.is_likely(&upstream));
        for (right, took, expected) in [
            (SharedRight::Granted, AHEAD_MAX / 2, true),
            (SharedRight::Granted, AHEAD_MAX, false),
            (SharedRight::Granted, Duration::ZERO, true),
            (SharedRight::UpstreamOnly, Duration::ZERO, false),
        ] {
            confirming.record(Arc::clone(&upstream), &right, took);
            assert_eq!(confirming.is_likely(&upstream), expected);
        }
        assert!(!confirming.is_likely(&Arc::from("another")));
    }
}
