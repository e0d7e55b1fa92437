//! Attestation prefetch: attestations that buildx lists beside an image in its index, and their referrers.
//!
//! Clients pull a platform by its digest. So the attestation of that platform is known only from an index served
//! earlier.

use std::sync::Arc;

use http::HeaderValue;
use quick_cache::sync::Cache;

use super::layer_probe::ClaimWait;
use super::manifest_fetch::UpstreamRequest;
use super::pipeline::ReadContext;
use super::prefetch::ContentKey;
use super::{ProxyResponse, ProxyService, Request, UpstreamCaches, UpstreamRegistry};
use crate::oci::manifest::{Descriptor, DescriptorKind, ManifestKind};
use crate::oci::{Accept, AnyDigest, Digest, Endpoint, Manifest, Query, RangeRequest, Reference, Repository};
use crate::policy::DenyReason;
use crate::queue::Peer;
use crate::store::manifests::StoredManifest;
use crate::upstream::Credential;

/// Images whose attestation is remembered.
const ATTESTATIONS_MAX: usize = 16_384;

/// Referrers fetched for one attestation.
const REFERRERS_MAX: usize = 8;

/// Larger blobs of an attestation or a referrer are fetched only on a client's request.
const BLOB_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// Attestation digests by image.
pub(super) struct Attestations {
    by_image: Cache<ContentKey, Digest>,
    /// Images whose attestation and referrers were fetched.
    fetched: Cache<ContentKey, ()>,
}

impl Default for Attestations {
    fn default() -> Self {
        Self {
            by_image: Cache::new(ATTESTATIONS_MAX),
            fetched: Cache::new(ATTESTATIONS_MAX),
        }
    }
}

impl Attestations {
    /// Records the attestations that an index lists.
    pub(super) fn record(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        index: &StoredManifest,
    ) {
        if index.manifest.kind != ManifestKind::Index {
            return;
        }
        let upstream: Arc<str> = registry.shared_name();
        for child in &index.manifest.descriptors {
            let (Some(image), AnyDigest::Supported(attestation)) = (child.attests, &child.digest) else {
                continue;
            };
            let key = (Arc::clone(&upstream), repository.clone(), image);
            if self.by_image.get(&key) == Some(*attestation) {
                return;
            }
            self.by_image.insert(key, *attestation);
        }
    }

    /// The attestation of this image, if it was not fetched yet.
    pub(super) fn pending(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        image: &Digest,
    ) -> Option<(ContentKey, Digest)> {
        let key = (registry.shared_name(), repository.clone(), *image);
        let attestation = self.by_image.get(&key)?;
        self.fetched.get(&key).is_none().then_some((key, attestation))
    }
}

impl ProxyService {
    /// Fetches the attestation of an image, its blobs and its referrers, with the credential of a client that was
    /// served the image.
    pub async fn fetch_attestation(self: &Arc<Self>, request: &Request, image: &Digest) {
        if let Some(repository) = request.endpoint.repository() {
            let upstream_request = UpstreamRequest::of(request, repository, &self.caller(request));
            self.fetch_attestation_of(&upstream_request, image).await;
        }
    }

    pub(super) async fn fetch_attestation_of(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        image: &Digest,
    ) {
        let Some((key, attestation)) =
            self.attestations
                .pending(&upstream_request.registry, &upstream_request.repository, image)
        else {
            return;
        };
        if self.fetch_artifact(upstream_request, attestation).await
            && self.fetch_referrers(upstream_request, attestation).await
        {
            self.attestations.fetched.insert(key, ());
        }
    }

    /// Fetches the referrers of a manifest. Returns whether the upstream responded, also with an empty list or a 404.
    async fn fetch_referrers(self: &Arc<Self>, upstream_request: &UpstreamRequest, subject: Digest) -> bool {
        let endpoint = Endpoint::Referrers {
            repository: upstream_request.repository.clone(),
            digest: AnyDigest::Supported(subject),
            query: Query::default(),
        };
        let listed = match self.handle_as(upstream_request, endpoint).await {
            ProxyResponse::Listing(listing, _) => Manifest::read(&listing.bytes).ok(),
            ProxyResponse::Denied(denied) if denied.reason == DenyReason::NotFound => {
                let Ok(tag) = subject.to_string().replacen(':', "-", 1).parse() else {
                    return true;
                };
                let endpoint = Endpoint::Manifest {
                    repository: upstream_request.repository.clone(),
                    reference: Reference::Tag(tag),
                };
                match self.handle_as(upstream_request, endpoint).await {
                    ProxyResponse::Manifest(stored, _) => Some(stored.manifest.clone()),
                    ProxyResponse::Denied(denied) => return denied.reason == DenyReason::NotFound,
                    _ => None,
                }
            }
            _ => return false,
        };
        let children = listed.map(|listed| listed.descriptors).unwrap_or_default();
        let manifests = children
            .iter()
            .filter(|child| child.kind == DescriptorKind::Manifest);
        for child in manifests.take(REFERRERS_MAX) {
            if let AnyDigest::Supported(digest) = child.digest {
                self.fetch_artifact(upstream_request, digest).await;
            }
        }
        true
    }

    /// Fetches an artifact manifest and its blobs. Returns whether nothing is left to fetch: the manifest is available
    /// here, or blocked.
    async fn fetch_artifact(self: &Arc<Self>, upstream_request: &UpstreamRequest, digest: Digest) -> bool {
        if self.is_blocked(&upstream_request.registry, &upstream_request.repository, &digest) {
            return true;
        }
        let upstream_request = UpstreamRequest {
            accept: Accept::manifests(),
            ..upstream_request.clone()
        };
        let stored = match self
            .child_manifest(&upstream_request, digest, ClaimWait::Full)
            .await
        {
            Ok(stored) => stored,
            Err(cause) => {
                tracing::debug!(%digest, %cause, "failed to prefetch attestation");
                return false;
            }
        };
        let missing = self.missing_blobs_of(&upstream_request, &stored).await;
        let is_small = |child: &&Descriptor| child.size.is_some_and(|size| size <= BLOB_BYTES_MAX);
        for child in stored.manifest.descriptors.iter().filter(is_small) {
            if let AnyDigest::Supported(blob) = child.digest
                && missing.iter().any(|(digest, _)| *digest == blob)
            {
                self.prefetch_blob(upstream_request.clone(), blob, None).await;
            }
        }
        true
    }

    /// Handles a request that the cache itself makes with the client's credential.
    async fn handle_as(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        endpoint: Endpoint,
    ) -> ProxyResponse {
        let authorization: Option<HeaderValue> = match &upstream_request.caller.credential {
            Credential::Client(shown) => Some(shown.clone()),
            Credential::Anonymous | Credential::Configured => None,
        };
        let request = Request {
            registry: Arc::clone(&upstream_request.registry),
            endpoint,
            head: false,
            accept: Accept::manifests(),
            authorization,
            host: None,
            now: self.clock.now(),
            since: tokio::time::Instant::now(),
            writes: upstream_request.registry.writes(&upstream_request.repository),
            for_push: false,
            trace: upstream_request.caller.trace.clone(),
            peer: Peer::Background,
            range: RangeRequest::None,
            needs_length: false,
            upstream_caches: UpstreamCaches::default(),
        };
        // Boxed, because the request for which it is made is one too.
        Box::pin(async {
            let read = ReadContext::new(self, &request, &upstream_request.repository).await;
            read.dispatch().await
        })
        .await
    }
}
