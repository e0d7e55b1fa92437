//! Attestations: what buildx lists beside an image in its index, and what refers to that.
//!
//! A platform is pulled by its own digest, so that an index was read before is what tells which attestation is its own.

use std::sync::Arc;

use http::HeaderValue;
use quick_cache::sync::Cache;

use super::manifest_fetch::UpstreamRequest;
use super::prefetch::ContentKey;
use super::{ProxyResponse, ProxyService, Request, UpstreamRegistry};
use crate::oci::manifest::{Descriptor, DescriptorKind, ManifestKind};
use crate::oci::{Accept, AnyDigest, Digest, Endpoint, Manifest, Query, RangeRequest, Reference, Repository};
use crate::policy::DenyReason;
use crate::queue::Peer;
use crate::store::manifests::StoredManifest;
use crate::upstream::Credential;

/// Images of which it is remembered what attests them.
const ATTESTED_MAX: usize = 16_384;

/// Manifests brought along that refer to one attestation.
const REFERRERS_MAX: usize = 8;

/// A larger blob of an attestation, or of what refers to it, is left to the client that asks for it.
const BLOB_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// The attestations of images, by image.
pub(super) struct Attestations {
    known: Cache<ContentKey, Digest>,
    /// Those that were brought, with what refers to them.
    brought: Cache<ContentKey, ()>,
}

impl Default for Attestations {
    fn default() -> Self {
        Self {
            known: Cache::new(ATTESTED_MAX),
            brought: Cache::new(ATTESTED_MAX),
        }
    }
}

impl Attestations {
    /// Remembers what an index lists.
    pub(super) fn learn(&self, site: &UpstreamRegistry, repository: &Repository, index: &StoredManifest) {
        if index.manifest.kind != ManifestKind::Index {
            return;
        }
        let upstream: Arc<str> = site.name().into();
        for child in &index.manifest.descriptors {
            let (Some(image), AnyDigest::Supported(attestation)) = (child.attests, &child.digest) else {
                continue;
            };
            let key = (Arc::clone(&upstream), repository.clone(), image);
            if self.known.get(&key) == Some(*attestation) {
                return;
            }
            self.known.insert(key, *attestation);
        }
    }

    /// The attestation of this image, if it was not brought yet.
    fn lacking(
        &self,
        site: &UpstreamRegistry,
        repository: &Repository,
        image: &Digest,
    ) -> Option<(ContentKey, Digest)> {
        let key = (site.name().into(), repository.clone(), *image);
        let attestation = self.known.get(&key)?;
        self.brought.get(&key).is_none().then_some((key, attestation))
    }

    /// Whether an image has an attestation that was not brought yet.
    pub(super) fn lacks(&self, site: &UpstreamRegistry, repository: &Repository, image: &Digest) -> bool {
        self.lacking(site, repository, image).is_some()
    }
}

impl ProxyService {
    /// Brings the attestation of an image, with its blobs and with what refers to it, on the right of a client that was
    /// given the image.
    pub async fn bring_attestation(self: &Arc<Self>, request: &Request, image: &Digest) {
        if let Some(repository) = request.endpoint.repository() {
            let of = UpstreamRequest::of(request, repository, &self.caller(request));
            self.bring_attached(&of, image).await;
        }
    }

    pub(super) async fn bring_attached(self: &Arc<Self>, of: &UpstreamRequest, image: &Digest) {
        let Some((key, attestation)) = self.attestations.lacking(&of.site, &of.repository, image) else {
            return;
        };
        if self.bring_artifact(of, attestation).await && self.bring_referrers(of, attestation).await {
            self.attestations.brought.insert(key, ());
        }
    }

    /// Brings what refers to a manifest, or that nothing does. Says whether the upstream has answered.
    async fn bring_referrers(self: &Arc<Self>, of: &UpstreamRequest, subject: Digest) -> bool {
        let endpoint = Endpoint::Referrers {
            repository: of.repository.clone(),
            digest: AnyDigest::Supported(subject),
            query: Query::default(),
        };
        let listed = match self.ask_as(of, endpoint).await {
            ProxyResponse::Listing(listing, _) => Manifest::read(&listing.bytes).ok(),
            ProxyResponse::Denied(refused) if refused.refusal == DenyReason::NotFound => {
                let Ok(tag) = subject.to_string().replacen(':', "-", 1).parse() else {
                    return true;
                };
                let endpoint = Endpoint::Manifest {
                    repository: of.repository.clone(),
                    reference: Reference::Tag(tag),
                };
                match self.ask_as(of, endpoint).await {
                    ProxyResponse::Manifest(held, _) => Some(held.manifest.clone()),
                    ProxyResponse::Denied(refused) => return refused.refusal == DenyReason::NotFound,
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
                self.bring_artifact(of, digest).await;
            }
        }
        true
    }

    /// Brings a manifest that is no image, with its blobs. Says whether it is here.
    async fn bring_artifact(self: &Arc<Self>, of: &UpstreamRequest, digest: Digest) -> bool {
        let of = UpstreamRequest {
            accept: Accept::manifests(),
            ..of.clone()
        };
        let held = match self.child(&of, digest).await {
            Ok(held) => held,
            Err(cause) => {
                tracing::debug!(%digest, %cause, "an attestation could not be prefetched");
                return false;
            }
        };
        let missing = self.missing(&of, &held).await;
        let is_small = |child: &&Descriptor| child.size.is_some_and(|size| size <= BLOB_BYTES_MAX);
        for child in held.manifest.descriptors.iter().filter(is_small) {
            if let AnyDigest::Supported(blob) = child.digest
                && missing.iter().any(|(digest, _)| *digest == blob)
            {
                self.prefetch_blob(of.clone(), blob, None).await;
            }
        }
        true
    }

    /// The outcome of a client's request, put on its right by the cache itself.
    async fn ask_as(self: &Arc<Self>, of: &UpstreamRequest, endpoint: Endpoint) -> ProxyResponse {
        let authorization: Option<HeaderValue> = match &of.caller.credential {
            Credential::Client(shown) => Some(shown.clone()),
            Credential::Anonymous | Credential::Configured => None,
        };
        let request = Request {
            site: Arc::clone(&of.site),
            endpoint,
            head: false,
            accept: Accept::manifests(),
            authorization,
            now: self.clock.now(),
            writes: of.site.writes(&of.repository),
            for_push: false,
            trace: of.caller.trace.clone(),
            peer: Peer::Background,
            range: RangeRequest::None,
            needs_length: false,
        };
        Box::pin(self.outcome(&request)).await
    }
}
