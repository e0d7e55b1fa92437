//! Age by the registry's storage: `Last-Modified` of the config, for a digest that is new to this cache.
//!
//! Few registries send `Last-Modified` with a manifest, but most redirect blobs to storage that does. The config of an
//! image is part of its digest and rarely shared with another image. Of an index the newest config counts, because its
//! publisher could list an old image beside a new one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use tokio::time::timeout;

use super::ProxyService;
use super::manifest_fetch::UpstreamRequest;
use crate::oci::manifest::{Descriptor, DescriptorKind, ManifestKind};
use crate::oci::{Digest, Endpoint, Tag};
use crate::store::manifests::StoredManifest;
use crate::store::tags::sightings::SightingKey;

/// Most images of an index of which the configs are requested. Each costs a pull of the registry's quota, so the age of
/// a larger index stays unknown.
const IMAGES_MAX: usize = 4;

/// Longest wait for all of it. A client has given up after 30 s.
const STORAGE_AGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Digests of tags of which the storage is known to state nothing.
const SILENT_MAX: usize = 4_096;

/// Digests whose storage states no time, so that it is requested once. In memory only.
pub(super) struct SilentStorage(Cache<(SightingKey, Digest), ()>);

impl Default for SilentStorage {
    fn default() -> Self {
        Self(Cache::new(SILENT_MAX))
    }
}

impl ProxyService {
    /// When the storage got the newest config of the image or index that this tag names; `None` if it does not say.
    pub(super) async fn storage_age(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        tag: &Tag,
        digest: Digest,
    ) -> Option<SystemTime> {
        let key = SightingKey {
            upstream: upstream_request.registry.name().into(),
            repository: upstream_request.repository.clone(),
            reference: tag.clone().into(),
        };
        let of = (key, digest);
        if self.silent_storage.0.get(&of).is_some() {
            return None;
        }
        let requested = self.newest_config(upstream_request, digest);
        // `None`: an upstream that does not respond says nothing about its storage.
        let stated = timeout(STORAGE_AGE_TIMEOUT, requested).await.ok()??;
        if stated.is_none() {
            self.silent_storage.0.insert(of, ());
        }
        stated
    }

    /// `None` if a request failed; `Some(None)` if the storage states no time.
    async fn newest_config(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
    ) -> Option<Option<SystemTime>> {
        let manifest = self.child_manifest(upstream_request, digest).await.ok()?;
        let images = match manifest.manifest.kind {
            ManifestKind::Image => vec![manifest],
            ManifestKind::Index => {
                let images: Vec<&Descriptor> = manifest
                    .manifest
                    .descriptors
                    .iter()
                    .filter(|child| child.kind == DescriptorKind::Manifest && child.attests.is_none())
                    .collect();
                if images.is_empty() || images.len() > IMAGES_MAX {
                    return Some(None);
                }
                let mut found = Vec::new();
                for image in images {
                    let digest = *image.digest.supported()?;
                    found.push(self.child_manifest(upstream_request, digest).await.ok()?);
                }
                found
            }
            ManifestKind::Other => return Some(None),
        };
        let mut newest = None;
        for image in images {
            let Some(stated) = self.config_modified(upstream_request, &image).await? else {
                return Some(None);
            };
            newest = newest.max(Some(stated));
        }
        Some(newest)
    }

    /// `Last-Modified` of an image's config. The response must have the size that the manifest states: a page of a
    /// captive portal has not.
    async fn config_modified(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        image: &StoredManifest,
    ) -> Option<Option<SystemTime>> {
        let mut descriptors = image.manifest.descriptors.iter();
        let Some(config) = descriptors.find(|child| child.kind == DescriptorKind::Config) else {
            return Some(None);
        };
        let blob_request = UpstreamRequest {
            endpoint: Endpoint::Blob {
                repository: upstream_request.repository.clone(),
                digest: config.digest.clone(),
            },
            named: None,
            ..upstream_request.clone()
        };
        let response = self.coalesced_head(&blob_request).wait().await?;
        if !response.kind.is_success() {
            return None;
        }
        let is_config = config.size.is_some() && response.length == config.size;
        Some(response.last_modified.filter(|_| is_config))
    }
}
