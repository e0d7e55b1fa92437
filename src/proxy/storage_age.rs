//! Age by the registry's storage: `Last-Modified` of the config, for a digest that is new to this cache.
//!
//! Few registries send `Last-Modified` with a manifest, but most redirect blobs to storage that does. The config of an
//! image lists its layers, and clients verify them, so another image cannot have it. The config of an artifact is no
//! evidence: a Helm chart with changed templates keeps its config. Of an index the newest config counts, because its
//! publisher could list an old image beside a new one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use tokio::time::timeout;

use super::ProxyService;
use super::manifest_fetch::UpstreamRequest;
use crate::oci::manifest::{Descriptor, DescriptorKind, ManifestKind, MediaType, Platform};
use crate::oci::{Digest, Endpoint, Reference};
use crate::policy::min_age::evident_time;
use crate::store::manifests::StoredManifest;
use crate::store::tags::sightings::{Seen, SightingKey};

/// Most images of an index of which the configs are requested. Each costs a pull of the registry's quota, so the age of
/// a larger index stays unknown.
const IMAGES_MAX: usize = 4;

/// Largest config read for its `created`.
const CONFIG_BYTES_MAX: usize = 1024 * 1024;

/// Media types of the config of an image.
const CONFIG_TYPES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

/// Size of the empty config `{}`, which lists no layers.
const EMPTY_CONFIG_BYTES: u64 = 2;

/// Longest wait for all of it. A client has given up after 30 s.
const STORAGE_AGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Digests of tags of which the storage is known to state nothing.
const SILENT_MAX: usize = 4_096;

/// Digests whose storage states no time, so that it is requested once, and whether `created` was read. In memory only.
pub(super) struct SilentStorage(Cache<(SightingKey, Digest, bool), ()>);

impl Default for SilentStorage {
    fn default() -> Self {
        Self(Cache::new(SILENT_MAX))
    }
}

/// What a config says about its age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ConfigAge {
    /// When the storage got it.
    pub(super) last_modified: Option<SystemTime>,
    /// Its own `created`, if that is trusted.
    pub(super) created_at: Option<SystemTime>,
}

impl ProxyService {
    /// Requests what the storage states about a digest that this tag or digest names, and records it with what the
    /// response showed.
    pub(super) async fn record_storage_age(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        reference: &Reference,
        seen: Seen,
        trust_created: bool,
    ) {
        let of = (reference, seen.digest);
        if let Some(stated) = self.storage_age(upstream_request, of, trust_created).await {
            let seen = Seen {
                last_modified: seen.last_modified.or(stated.last_modified),
                created_at: stated.created_at,
                ..seen
            };
            self.write_sighting(upstream_request, reference, seen).await;
        }
    }

    /// What the newest config of the image or index that this tag or digest names says about its age; `None` if that is
    /// nothing.
    async fn storage_age(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        (reference, digest): (&Reference, Digest),
        trust_created: bool,
    ) -> Option<ConfigAge> {
        let key = SightingKey {
            upstream: upstream_request.registry.name().into(),
            repository: upstream_request.repository.clone(),
            reference: reference.clone(),
        };
        let of = (key, digest, trust_created);
        if self.silent_storage.0.get(&of).is_some() {
            return None;
        }
        let upstream_request = upstream_request.clone().by_digest(digest);
        let requested = self.newest_config(&upstream_request, digest, trust_created);
        // `None`: an upstream that does not respond says nothing about its storage.
        let stated = timeout(STORAGE_AGE_TIMEOUT, requested).await.ok()??;
        if stated == ConfigAge::default() {
            self.silent_storage.0.insert(of, ());
            return None;
        }
        Some(stated)
    }

    /// `None` if a request failed.
    async fn newest_config(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
        trust_created: bool,
    ) -> Option<ConfigAge> {
        let manifest = self.child_manifest(upstream_request, digest).await.ok()?;
        let images = match manifest.manifest.kind {
            ManifestKind::Image => vec![manifest],
            ManifestKind::Index => {
                let images: Vec<&Descriptor> = manifest
                    .manifest
                    .descriptors
                    .iter()
                    .filter(|child| child.kind == DescriptorKind::Manifest && !is_attestation(child))
                    .collect();
                if images.is_empty() || images.len() > IMAGES_MAX {
                    return Some(ConfigAge::default());
                }
                let mut found = Vec::new();
                for image in images {
                    let digest = *image.digest.supported()?;
                    let upstream_request = upstream_request.clone().by_digest(digest);
                    found.push(self.child_manifest(&upstream_request, digest).await.ok()?);
                }
                found
            }
            ManifestKind::Other => return Some(ConfigAge::default()),
        };
        let mut newest: Option<ConfigAge> = None;
        for image in images {
            let stated = self.config_age(upstream_request, &image, trust_created).await?;
            newest = Some(newest.map_or(stated, |newest| newest.and(stated)));
        }
        newest
    }

    /// `Last-Modified` of an image's config and, if it is trusted, the config's own `created`. The response must have the
    /// size that the manifest states: a page of a captive portal has not.
    async fn config_age(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        image: &StoredManifest,
        trust_created: bool,
    ) -> Option<ConfigAge> {
        let mut descriptors = image.manifest.descriptors.iter();
        let Some(config) = descriptors.find(|child| child.kind == DescriptorKind::Config) else {
            return Some(ConfigAge::default());
        };
        if !is_image_config(config) {
            return Some(ConfigAge::default());
        }
        let blob_request = UpstreamRequest {
            endpoint: Endpoint::Blob {
                repository: upstream_request.repository.clone(),
                digest: config.digest.clone(),
            },
            named: config.digest.supported().copied(),
            ..upstream_request.clone()
        };
        let response = self.coalesced_head(&blob_request).wait().await?;
        if !response.kind.is_success() {
            return None;
        }
        let is_config = config.size.is_some() && response.length == config.size;
        let created_at = match config.digest.supported() {
            Some(digest) if trust_created => self.created_of(&blob_request, digest).await?,
            _ => None,
        };
        let now = upstream_request.registry.checked_time().bound(self.clock.now());
        let evident = |stated: Option<SystemTime>| evident_time(stated?, now);
        Some(ConfigAge {
            last_modified: evident(response.last_modified.filter(|_| is_config)),
            created_at: evident(created_at),
        })
    }

    /// `created` of a config; `None` if the request failed.
    async fn created_of(
        &self,
        blob_request: &UpstreamRequest,
        digest: &Digest,
    ) -> Option<Option<SystemTime>> {
        let UpstreamRequest {
            registry,
            endpoint,
            accept,
            caller,
            ..
        } = blob_request;
        let fetched = registry
            .upstream()
            .get(caller, endpoint, accept, None)
            .await
            .ok()?;
        let bytes = fetched.collect(CONFIG_BYTES_MAX).await.ok()?;
        let is_config = Digest::of(digest.algorithm(), &bytes) == *digest;
        Some(is_config.then(|| created(&bytes)).flatten())
    }
}

/// Whether it lists the layers of an image.
fn is_image_config(config: &Descriptor) -> bool {
    let is_of_image = |media_type: &MediaType| CONFIG_TYPES.contains(&media_type.as_str());
    config.media_type.as_ref().is_some_and(is_of_image)
        && config.size.is_some_and(|size| size > EMPTY_CONFIG_BYTES)
}

/// Whether no client runs this child. Its publisher sets the annotation, so clients must not find a platform in it
/// either.
fn is_attestation(child: &Descriptor) -> bool {
    let is_unknown = |platform: &Platform| platform.os == "unknown" && platform.architecture == "unknown";
    child.attests.is_some() && child.platform.as_ref().is_some_and(is_unknown)
}

impl ConfigAge {
    /// The age of two images together: of each time the newer one, if both have it.
    fn and(self, other: Self) -> Self {
        let newer = |one: Option<SystemTime>, two: Option<SystemTime>| Some(one?.max(two?));
        Self {
            last_modified: newer(self.last_modified, other.last_modified),
            created_at: newer(self.created_at, other.created_at),
        }
    }
}

/// `created` of an image config (OCI image spec, "Properties"); `None` if it has none, or not in UTC.
fn created(config: &[u8]) -> Option<SystemTime> {
    #[derive(serde::Deserialize)]
    struct Config {
        created: Option<String>,
    }
    let config: Config = serde_json::from_slice(config).ok()?;
    humantime::parse_rfc3339(&config.created?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn created_is_read_in_utc_alone() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let read = |text: &str| created(format!(r#"{{"created":"{text}","rootfs":{{}}}}"#).as_bytes());
        assert_eq!(read("2024-01-01T00:00:00Z"), Some(at(1_704_067_200)));
        assert!(read("2024-01-01T00:00:00.123456789Z").is_some());
        for wrong in ["2024-01-01T00:00:00+02:00", "yesterday", ""] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert_eq!(created(b"{}"), None);
        assert_eq!(created(b"no json"), None);
    }

    #[test]
    fn index_is_as_old_as_its_newest_image() {
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let age = |last_modified, created_at| ConfigAge {
            last_modified,
            created_at,
        };
        assert_eq!(age(at(1), at(4)).and(age(at(2), at(3))), age(at(2), at(4)));
        assert_eq!(age(at(1), at(4)).and(age(None, at(3))), age(None, at(4)));
    }
}
