//! Layer probe: whether the upstream has the missing layers of an image whose manifest is cached.
//!
//! The probe runs only if another image could be served instead. If a tag moved to an image that cannot be completed,
//! the previous complete image is served. Such a tag is in use here, so its missing blobs are prefetched, and the
//! response to each `GET` is the probe. A blob that waits in the queue, or must not be prefetched, is probed by
//! `HEAD` with the client's own credential. A success then also proves that the blob is in this repository.
//!
//! Of an index, the probe checks the platforms that were pulled of the previous image, because those are in use here.

use std::sync::Arc;
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::deadline::Deadline;
use super::manifest_fetch::UpstreamRequest;
use super::prefetch::StartedDownloads;
use super::{ProxyService, UpstreamRegistry};
use crate::oci::{AnyDigest, Digest, Endpoint, Repository, UpstreamFailure};
use crate::store::manifests::StoredManifest;

/// Concurrent probes for one image.
const PROBES_MAX: usize = 8;

/// If no prefetch of the image starts for this long, the queued blobs are probed by `HEAD`.
const PREFETCH_STALL_MAX: Duration = Duration::from_millis(300);

/// Maximum number of blobs probed. The remaining blobs of a larger image are assumed to exist.
const BLOBS_MAX: usize = 256;

/// Maximum number of platforms probed of one index.
const PLATFORMS_MAX: usize = 4;

/// Lifetime of a successful probe. Clients that only compare tags must not cost one request per layer each time.
const PROBE_TTL: Duration = Duration::from_secs(60);

/// Maximum number of remembered probes.
const PROBED_IMAGES_MAX: usize = 4096;

type Image = (Arc<str>, Repository, Digest);

/// Images whose missing layers the upstream recently had.
pub(super) struct ProbedImages(Cache<Image, std::time::SystemTime>);

impl Default for ProbedImages {
    fn default() -> Self {
        Self(Cache::new(PROBED_IMAGES_MAX))
    }
}

/// Wait for another cache that requests the same manifest from the upstream.
#[derive(Clone, Copy)]
pub(super) enum ClaimWait<'a> {
    /// As long as such a wait takes at most.
    Full,
    /// Of a client that gets an earlier image after this deadline.
    Within(&'a Deadline),
    None,
}

impl ProxyService {
    /// `Ok` unless the upstream is known to lack content of `manifest`; otherwise the failure. `fallback` is the
    /// image that would be served instead. With `prefetch_wait` the missing blobs are prefetched, and the probe waits
    /// at most this long for their responses.
    pub(super) async fn probe_layers(
        self: &Arc<Self>,
        upstream_request: UpstreamRequest,
        prefetch_wait: Option<Duration>,
        (manifest, fallback): (&Arc<StoredManifest>, &Arc<StoredManifest>),
        deadline: &Deadline,
    ) -> Result<(), UpstreamFailure> {
        let (registry, repository) = (&upstream_request.registry, &upstream_request.repository);
        let image: Image = (registry.shared_name(), repository.clone(), manifest.digest);
        let now = self.clock.now();
        let is_recent = |at| now.duration_since(at).is_ok_and(|age| age < PROBE_TTL);
        if self.probed_images.0.get(&image).is_some_and(is_recent)
            || self.is_complete(registry, repository, manifest).await
        {
            return Ok(());
        }
        self.attestations.record(registry, repository, manifest);
        self.probe_blobs(&upstream_request, prefetch_wait, manifest)
            .await?;
        for digest in self
            .platforms_in_use(registry, repository, manifest, fallback)
            .await
        {
            let child = self
                .child_manifest(&upstream_request, digest, ClaimWait::Within(deadline))
                .await?;
            self.probe_blobs(&upstream_request, prefetch_wait, &child).await?;
        }
        self.probed_images.0.insert(image, now);
        Ok(())
    }

    /// Images of `index` for the platforms of which `fallback` was pulled. A blocked one is left out: its clients are
    /// denied it, and it does not make the index incomplete.
    pub(super) async fn platforms_in_use(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        index: &StoredManifest,
        fallback: &Arc<StoredManifest>,
    ) -> Vec<Digest> {
        let fallback = Arc::clone(fallback);
        let in_use = self.read_cache(registry, repository, move |cached| {
            let whole = cached
                .view
                .complete_children(cached.registry.name(), cached.repository, &fallback);
            whole
                .filter_map(|child| child.platform.clone())
                .collect::<Vec<_>>()
        });
        let in_use = in_use.await;
        let children = index.manifest.descriptors.iter();
        children
            .filter(|child| child.platform.as_ref().is_some_and(|own| in_use.contains(own)))
            .filter_map(|child| match child.digest {
                AnyDigest::Supported(digest) => Some(digest),
                AnyDigest::Unsupported(_) => None,
            })
            .filter(|digest| !self.is_blocked(registry, repository, digest))
            .take(PLATFORMS_MAX)
            .collect()
    }

    /// A manifest that an index or a tag names, from the store or the upstream.
    pub(super) async fn child_manifest(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        digest: Digest,
        wait: ClaimWait<'_>,
    ) -> Result<Arc<StoredManifest>, UpstreamFailure> {
        let stored = self.read_cache(
            &upstream_request.registry,
            &upstream_request.repository,
            move |cached| {
                let stored = cached.is_member(&digest).then(|| cached.manifest(&digest));
                stored.flatten()
            },
        );
        if let Some(manifest) = stored.await {
            return Ok(manifest);
        }
        let by_digest = upstream_request.clone().by_digest(digest);
        let fetched = match wait {
            ClaimWait::Full => self.fetch_manifest(by_digest).await,
            ClaimWait::None => self.fetch_manifest_at_once(by_digest).await,
            ClaimWait::Within(deadline) => {
                let began = Instant::now();
                let within = deadline.at().saturating_duration_since(began);
                self.fetch_manifest_within(by_digest, (began, within), deadline)
                    .await
                    .ok_or(UpstreamFailure::RevalidateTimeout)?
            }
        };
        fetched.map_err(|response| response.cause())
    }

    async fn probe_blobs(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        prefetch_wait: Option<Duration>,
        manifest: &Arc<StoredManifest>,
    ) -> Result<(), UpstreamFailure> {
        let missing = self.missing_blobs_of(upstream_request, manifest).await;
        let mut begun = match prefetch_wait {
            Some(_) => self.prefetch(upstream_request.clone(), manifest).await,
            None => StartedDownloads::default(),
        };
        let deadline = Instant::now() + prefetch_wait.unwrap_or_default();
        let progress = Arc::new(watch::Sender::new(Instant::now()));
        let mut probes = JoinSet::new();
        for (digest, _) in missing.into_iter().take(BLOBS_MAX) {
            if probes.len() >= PROBES_MAX
                && let Some(probe) = probes.join_next().await
            {
                probe.unwrap_or(Err(UpstreamFailure::Abandoned))?;
            }
            let (proxy, upstream_request, progress) =
                (Arc::clone(self), upstream_request.clone(), Arc::clone(&progress));
            let begun = begun.remove(&digest);
            probes.spawn(async move {
                if let Some(begun) = begun
                    && let Some(result) = get_result(begun, &progress, deadline).await
                {
                    return result.inspect_err(|cause| log_missing_layer(&upstream_request, &digest, *cause));
                }
                proxy.head_blob(upstream_request, digest).await
            });
        }
        while let Some(probe) = probes.join_next().await {
            probe.unwrap_or(Err(UpstreamFailure::Abandoned))?;
        }
        Ok(())
    }

    async fn head_blob(
        self: Arc<Self>,
        upstream_request: UpstreamRequest,
        digest: Digest,
    ) -> Result<(), UpstreamFailure> {
        let endpoint = Endpoint::Blob {
            repository: upstream_request.repository.clone(),
            digest: AnyDigest::Supported(digest),
        };
        let upstream_request = UpstreamRequest {
            endpoint,
            ..upstream_request
        };
        let Some(response) = self.coalesced_head(&upstream_request).wait().await else {
            return Err(UpstreamFailure::Abandoned);
        };
        if response.kind.is_success() {
            Ok(())
        } else {
            log_missing_layer(&upstream_request, &digest, response.cause());
            Err(response.cause())
        }
    }
}

/// Result of the `GET` of a prefetched blob. `None` if the result proves nothing for this caller, or if the blob is
/// still queued and no other blob of the image has started for a while.
async fn get_result(
    mut begun: oneshot::Receiver<Result<(), UpstreamFailure>>,
    progress: &watch::Sender<Instant>,
    deadline: Instant,
) -> Option<Result<(), UpstreamFailure>> {
    loop {
        let until = deadline.min(*progress.borrow() + PREFETCH_STALL_MAX);
        match timeout_at(until, &mut begun).await {
            Ok(result) => {
                progress.send_replace(Instant::now());
                return result.ok();
            }
            Err(_) if until < deadline && *progress.borrow() + PREFETCH_STALL_MAX > until => {}
            Err(_) => return None,
        }
    }
}

/// The registry returned the manifest but not this blob, so the upstream image is incomplete.
fn log_missing_layer(upstream_request: &UpstreamRequest, digest: &Digest, cause: UpstreamFailure) {
    tracing::info!(upstream = upstream_request.registry.name(), repository = %upstream_request.repository, blob = %digest, %cause,
        "upstream image is incomplete, serving the previous complete one");
}
