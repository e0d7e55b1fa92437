//! Reads of the shared storage: which requests may use it, and manifests from there. Blobs: see `source`.
//!
//! The bucket decides nothing. A client gets bytes from there exactly where it would get the bytes of another client's
//! download: it has a current grant in the repository, and the upstream was seen to have the digest there. Anybody else
//! is requested from the upstream, and nothing is looked up in the bucket before.

use std::sync::Arc;

use super::ProxyService;
use super::manifest_fetch::{UpstreamRequest, verify};
use crate::oci::manifest::MANIFEST_BYTES_MAX;
use crate::oci::{AnyDigest, Digest, Endpoint, Reference};
use crate::shared::{SharedContent, SharedStorage};
use crate::store::manifests::StoredManifest;

impl ProxyService {
    /// The shared storage.
    pub fn shared(&self) -> &Arc<SharedStorage> {
        &self.shared
    }

    /// Whether the content of this request, which is by digest, may be read from the shared storage. If the caller has a
    /// grant in the repository and the digest was not seen there yet, the upstream is requested by `HEAD`, as for a
    /// follower of a download; but only if the bucket has the content.
    pub(super) async fn may_read_shared(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        content: SharedContent,
    ) -> bool {
        if !self.shared.is_readable() || !self.is_authorized(upstream_request).await {
            return false;
        }
        if self.is_seen(upstream_request, content.digest()).await {
            return true;
        }
        if !self.shared.has(content).await {
            return false;
        }
        self.coalesced_head(upstream_request).wait().await;
        self.is_seen(upstream_request, content.digest()).await && self.is_authorized(upstream_request).await
    }

    /// Whether the digest is known to be in the repository now.
    async fn is_seen(self: &Arc<Self>, upstream_request: &UpstreamRequest, digest: Digest) -> bool {
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        !self.is_invalidated(registry, repository, digest.into())
            && self.is_member(registry, repository, digest).await
    }

    /// The manifest of this request from the shared storage, verified. `None` if it must be fetched from the upstream.
    pub(super) async fn read_shared_manifest(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
    ) -> Option<StoredManifest> {
        if !self.shared.is_readable() {
            return None;
        }
        let digest = match &upstream_request.endpoint {
            Endpoint::Manifest {
                reference: Reference::Digest(AnyDigest::Supported(digest)),
                ..
            } => *digest,
            Endpoint::Manifest {
                reference: Reference::Tag(_),
                ..
            } => upstream_request.named?,
            _ => return None,
        };
        let content = SharedContent::Manifest(digest);
        let by_digest = upstream_request.clone().by_digest(digest);
        if !self.may_read_shared(&by_digest, content).await {
            return None;
        }
        let (bytes, object) = self.shared.read(content, MANIFEST_BYTES_MAX).await?;
        // The bucket's label does not count: the bytes say what they are.
        let Ok(manifest) = verify(bytes, None, None, &by_digest.endpoint) else {
            self.shared.report_wrong(content);
            return None;
        };
        self.shared.offer_renewal(content, object.info.age);
        Some(manifest)
    }
}
