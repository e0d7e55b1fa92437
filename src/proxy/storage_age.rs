//! Age by the registry's storage: `Last-Modified` of the config, for a digest that is new to this cache.
//!
//! Few registries send `Last-Modified` with a manifest, but most redirect blobs to storage that does. The config of an
//! image lists its layers, and clients verify them, so another image cannot have it. The config of an artifact is no
//! evidence: a Helm chart with changed templates keeps its config. Of an index the newest config counts, because its
//! publisher could list an old image beside a new one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quick_cache::sync::Cache;
use tokio::time::{Instant, timeout, timeout_at};

use super::ProxyService;
use super::layer_probe::ClaimWait;
use super::manifest_fetch::UpstreamRequest;
use crate::oci::manifest::{Descriptor, DescriptorKind, ManifestKind, MediaType, Platform};
use crate::oci::{Accept, Digest, Endpoint, Reference};
use crate::policy::min_age::evident_time;
use crate::single_flight::SingleFlight;
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

/// Longest time for all of it. A client has given up after 30 s.
const STORAGE_AGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for which a failure is remembered, so that it does not delay each pull.
const FAILED_TTL: Duration = Duration::from_secs(60);

/// Concurrent requests for ages. Beyond them the age stays unknown for the moment.
const RUNNING_MAX: usize = 256;

/// Remembered digests of tags of which the storage states nothing, and as many of which the request failed.
const REMEMBERED_MAX: usize = 4_096;

/// The digest that a tag or a request by digest names, and whether `created` is read.
type StatedKey = (SightingKey, Digest, bool);

/// One requester, with one set of settings. Without its `Accept`, which does not change the requests.
type FailedKey = (StatedKey, [u8; 32], (u64, u64));

/// Requests for ages of storages, and their results that are not recorded. In memory only.
pub(super) struct StorageAges {
    /// The storage states no time, so it is requested once.
    silent: Cache<StatedKey, ()>,
    /// When the last request failed.
    failed: Cache<FailedKey, Instant>,
    running: SingleFlight<FailedKey, ()>,
}

impl Default for StorageAges {
    fn default() -> Self {
        Self {
            silent: Cache::new(REMEMBERED_MAX),
            failed: Cache::new(REMEMBERED_MAX),
            running: SingleFlight::default(),
        }
    }
}

impl StorageAges {
    fn may_request(&self, key: &FailedKey) -> bool {
        let has_failed = |at: Instant| at.elapsed() < FAILED_TTL;
        self.silent.get(&key.0).is_none()
            && !self.failed.get(key).is_some_and(has_failed)
            && self.running.count() < RUNNING_MAX
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
    /// response showed. Waits until `deadline` at most, if there is one. The request continues, so that a late response
    /// counts for the next pull.
    pub(super) async fn record_storage_age(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        reference: &Reference,
        seen: Seen,
        trust_created: bool,
        deadline: Option<Instant>,
    ) {
        let subject = SightingKey {
            upstream: upstream_request.registry.shared_name(),
            repository: upstream_request.repository.clone(),
            reference: reference.clone(),
        };
        let key = (
            (subject, seen.digest, trust_created),
            upstream_request.caller.principal,
            upstream_request.registry.upstream().settings_id(),
        );
        if !self.storage_ages.may_request(&key) {
            return;
        }
        let call = self.storage_ages.running.share(key.clone(), || {
            let (proxy, mut upstream_request, reference) =
                (Arc::clone(self), upstream_request.clone(), reference.clone());
            upstream_request.caller.trace = upstream_request.caller.trace.shared();
            async move {
                if let Some(stated) = proxy.storage_age(&upstream_request, key).await {
                    let seen = Seen {
                        last_modified: seen.last_modified.or(stated.last_modified),
                        created_at: stated.created_at,
                        ..seen
                    };
                    proxy.write_sighting(&upstream_request, &reference, seen).await;
                }
            }
        });
        match deadline {
            Some(deadline) => _ = timeout_at(deadline, call.wait()).await,
            None => _ = call.wait().await,
        }
    }

    /// What the newest config of the image or index says about its age; `None` if that is nothing, or if a request
    /// failed.
    async fn storage_age(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        key: FailedKey,
    ) -> Option<ConfigAge> {
        let (_, digest, trust_created) = key.0;
        // Callers with any `Accept` share the result, and a registry may lack the manifest of a type that is not listed.
        let upstream_request = UpstreamRequest {
            accept: Accept::manifests(),
            ..upstream_request.clone().by_digest(digest)
        };
        let requested = self.newest_config(&upstream_request, digest, trust_created);
        match timeout(STORAGE_AGE_TIMEOUT, requested).await {
            Ok(Some(stated)) if stated != ConfigAge::default() => Some(stated),
            Ok(Some(_)) => {
                self.storage_ages.silent.insert(key.0, ());
                None
            }
            Ok(None) | Err(_) => {
                self.storage_ages.failed.insert(key, Instant::now());
                None
            }
        }
    }

    /// `None` if a request failed.
    async fn newest_config(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
        trust_created: bool,
    ) -> Option<ConfigAge> {
        let wait = ClaimWait::None;
        let manifest = self.child_manifest(upstream_request, digest, wait).await.ok()?;
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
                    let image = self.child_manifest(&upstream_request, digest, wait);
                    found.push(image.await.ok()?);
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
