//! Blob prefetch: a client that requests one layer of an image will request the others.
//!
//! A manifest alone does not start the layers, because many clients read the manifests of every platform and pull
//! one, and some only compare. So the config is prefetched with its manifest, and the layers after the first layer
//! request. If a tag moved and its previous image was completely pulled here, the layers are prefetched with the
//! manifest.
//!
//! A prefetch is an ordinary download that a client joins later. It yields to clients: it has its own queue class,
//! few permits of each upstream, and no extra permit if the upstream is slow. After the layers come the image's
//! attestation and its referrers. Current clients request them, and during an outage they must be cached even if
//! earlier clients skipped them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use super::manifest_fetch::UpstreamRequest;
use super::pipeline::ReadContext;
use super::source::UpstreamSource;
use super::{ProxyService, RATE_LIMIT_WAIT_MAX, ServeReason, UpstreamCaches};
use crate::download::{DownloadError, JoinOptions, Joined};
use crate::oci::manifest::DescriptorKind;
use crate::oci::{AnyDigest, Digest, Endpoint, Repository, UpstreamFailure};
use crate::policy::{HitReason, Policy};
use crate::queue::{Class, Peer};
use crate::store::manifests::StoredManifest;

/// Concurrent prefetches of one image, as many as its own client would run.
const BLOBS_PER_IMAGE_MAX: usize = 3;

/// Images that are prefetched or queued. Further images are left to their clients.
const IMAGES_MAX: usize = 64;

/// Layers with a remembered image.
const LAYERS_MAX: usize = 16_384;

/// A manifest or a blob in one repository of an upstream.
pub(super) type ContentKey = (Arc<str>, Repository, Digest);

/// Running prefetches and candidates for prefetch.
pub(super) struct Prefetching {
    images: Arc<Semaphore>,
    running: Mutex<HashSet<ContentKey>>,
    /// Incomplete manifests that clients were served, by layer.
    incomplete: Cache<ContentKey, Parent>,
}

/// Image of a layer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parent {
    One(Digest),
    /// Several images: a request for the layer does not show which one the client pulls.
    Several,
}

/// Started downloads, each with the result of its `GET`. If the sender is dropped without a result, another caller
/// leads the download.
pub(super) type StartedDownloads = HashMap<Digest, oneshot::Receiver<Result<(), UpstreamFailure>>>;

impl Default for Prefetching {
    fn default() -> Self {
        Self {
            images: Arc::new(Semaphore::new(IMAGES_MAX)),
            running: Mutex::default(),
            incomplete: Cache::new(LAYERS_MAX),
        }
    }
}

impl Prefetching {
    /// Marks the image as running. Returns whether it was not running before.
    fn enter(&self, image: &ContentKey) -> bool {
        let mut running = self.running.lock();
        running.insert(image.clone())
    }

    fn is_running(&self, image: &ContentKey) -> bool {
        self.running.lock().contains(image)
    }

    fn leave(&self, image: &ContentKey) {
        let mut running = self.running.lock();
        running.remove(image);
    }

    fn record_incomplete(&self, layer: ContentKey, manifest: Digest) {
        let one = Parent::One(manifest);
        let parent = match self.incomplete.get(&layer) {
            Some(known) if known != one => Parent::Several,
            _ => one,
        };
        self.incomplete.insert(layer, parent);
    }
}

impl ReadContext<'_> {
    /// After a manifest was served: prefetches its config and remembers its layers.
    pub(super) async fn on_manifest_served(&self, manifest: &Arc<StoredManifest>, reason: ServeReason) {
        if self.request.head {
            return;
        }
        let (proxy, registry, repository) = (self.proxy, &self.request.registry, self.repository);
        // Otherwise it may have been deleted since it was seen.
        let is_confirmed = matches!(
            reason,
            ServeReason::Fetched(_) | ServeReason::Cached(HitReason::Revalidated | HitReason::TagMoved)
        );
        let confirmed = is_confirmed.then_some(self.request.since);
        proxy
            .note_content(registry, repository, manifest, confirmed)
            .await;
        proxy.note_child(registry, repository, manifest.digest);
        proxy.attestations.record(registry, repository, manifest);
        if proxy.shared.is_readable() {
            // The shared storage states no size that is promised to clients. The hints of a manifest that is served from
            // the disk may be lost: they are in memory.
            proxy
                .size_hints
                .record_unless_known(registry, repository, &manifest.manifest);
        }
        if !self.may_prefetch() {
            return;
        }
        // Asked after the wait for the upstream: content may have been removed since.
        let misses_blobs = !proxy.is_complete(registry, repository, manifest).await;
        if !misses_blobs
            && proxy
                .attestations
                .pending(registry, repository, &manifest.digest)
                .is_none()
        {
            return;
        }
        let upstream_request = self.upstream_request();
        let upstream: Arc<str> = registry.shared_name();
        for child in manifest
            .manifest
            .descriptors
            .iter()
            .filter(|child| child.kind == DescriptorKind::Layer)
        {
            if let AnyDigest::Supported(layer) = child.digest {
                let key = (Arc::clone(&upstream), repository.clone(), layer);
                proxy.prefetching.record_incomplete(key, manifest.digest);
            }
        }
        let missing = proxy.missing_blobs_of(&upstream_request, manifest).await;
        if let Some((config, _)) = missing
            .into_iter()
            .find(|(_, role)| *role == DescriptorKind::Config)
            && let Ok(permit) = Arc::clone(&proxy.prefetching.images).try_acquire_owned()
        {
            let proxy = Arc::clone(proxy);
            tokio::spawn(async move {
                proxy.prefetch_blob(upstream_request, config, None).await;
                drop(permit);
            });
        }
    }

    /// The policy `never` sends no request to the upstream.
    fn may_prefetch(&self) -> bool {
        self.rule.prefetch && self.rule.policy != Policy::Never
    }

    /// After a blob was served: prefetches the rest of its image if the blob is a layer of exactly one incomplete
    /// image.
    pub(super) fn on_blob_served(&self, digest: Digest) {
        let (proxy, request) = (self.proxy, self.request);
        if request.head || self.rule.policy == Policy::Never {
            return;
        }
        let layer: ContentKey = (request.registry.shared_name(), self.repository.clone(), digest);
        let Some(Parent::One(image)) = proxy.prefetching.incomplete.get(&layer) else {
            return;
        };
        let upstream_request = UpstreamRequest::of(request, self.repository, &proxy.caller(request));
        let proxy = Arc::clone(proxy);
        proxy.prefetching.incomplete.remove(&layer);
        tokio::spawn(async move {
            if let Some(manifest) = proxy
                .cached_manifest(&upstream_request.registry, &upstream_request.repository, &image)
                .await
            {
                proxy.prefetch(upstream_request, &manifest).await;
            }
        });
    }
}

impl ProxyService {
    /// Missing blobs of `manifest`, with their role. Blocked ones are left out.
    pub(super) async fn missing_blobs_of(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        manifest: &Arc<StoredManifest>,
    ) -> Vec<(Digest, DescriptorKind)> {
        let manifest = Arc::clone(manifest);
        self.read_cache(
            &upstream_request.registry,
            &upstream_request.repository,
            move |cached| {
                let arriving = |digest: &Digest| cached.is_arriving(digest);
                cached
                    .view
                    .missing_blobs(cached.registry.name(), cached.repository, &manifest, &arriving)
                    .filter_map(|child| match child.digest {
                        AnyDigest::Supported(digest) => Some((digest, child.kind)),
                        AnyDigest::Unsupported(_) => None,
                    })
                    .filter(|(digest, _)| !cached.is_blocked(digest))
                    .collect()
            },
        )
        .await
    }

    /// Prefetches the missing blobs of the image `manifest` in a detached task.
    pub(super) async fn prefetch(
        self: &Arc<Self>,
        upstream_request: UpstreamRequest,
        manifest: &Arc<StoredManifest>,
    ) -> StartedDownloads {
        // A client requests many layers while they are prefetched, and to look for missing ones takes time for each of them.
        let image = (
            upstream_request.registry.shared_name(),
            upstream_request.repository.clone(),
            manifest.digest,
        );
        if self.prefetching.is_running(&image) {
            return StartedDownloads::default();
        }
        let missing = self.missing_blobs_of(&upstream_request, manifest).await;
        self.start_downloads(upstream_request, manifest, missing)
    }

    fn start_downloads(
        self: &Arc<Self>,
        upstream_request: UpstreamRequest,
        manifest: &Arc<StoredManifest>,
        missing: Vec<(Digest, DescriptorKind)>,
    ) -> StartedDownloads {
        let image: ContentKey = (
            upstream_request.registry.shared_name(),
            upstream_request.repository.clone(),
            manifest.digest,
        );
        let misses_attestation = self
            .attestations
            .pending(
                &upstream_request.registry,
                &upstream_request.repository,
                &manifest.digest,
            )
            .is_some();
        if missing.is_empty() && !misses_attestation {
            return StartedDownloads::default();
        }
        let Ok(permit) = Arc::clone(&self.prefetching.images).try_acquire_owned() else {
            tracing::debug!(digest = %manifest.digest, "prefetch limit reached");
            return StartedDownloads::default();
        };
        if !self.prefetching.enter(&image) {
            return StartedDownloads::default();
        }
        let (mut begun, mut blobs) = (StartedDownloads::default(), Vec::new());
        for (digest, _) in missing {
            let (opened, receiver) = oneshot::channel();
            begun.insert(digest, receiver);
            blobs.push((digest, opened));
        }
        let (proxy, manifest) = (Arc::clone(self), Arc::clone(manifest));
        tokio::spawn(async move {
            proxy.prefetch_blobs(&upstream_request, blobs).await;
            if misses_attestation {
                proxy
                    .fetch_attestation_of(&upstream_request, &manifest.digest)
                    .await;
            }
            for child in &manifest.manifest.descriptors {
                if let AnyDigest::Supported(digest) = child.digest {
                    let key = (Arc::clone(&image.0), image.1.clone(), digest);
                    proxy.prefetching.incomplete.remove(&key);
                }
            }
            proxy.prefetching.leave(&image);
            drop(permit);
        });
        begun
    }

    /// Prefetches blobs of one image, with limited concurrency.
    pub(super) async fn prefetch_blobs(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        blobs: Vec<(Digest, oneshot::Sender<Result<(), UpstreamFailure>>)>,
    ) {
        let permits = Arc::new(Semaphore::new(BLOBS_PER_IMAGE_MAX));
        for (digest, opened) in blobs {
            // The semaphore is never closed.
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                break;
            };
            let (proxy, upstream_request) = (Arc::clone(self), upstream_request.clone());
            tokio::spawn(async move {
                proxy.prefetch_blob(upstream_request, digest, Some(opened)).await;
                drop(permit);
            });
        }
        // If all permits are free, all downloads have ended.
        let all = u32::try_from(BLOBS_PER_IMAGE_MAX).unwrap_or(u32::MAX);
        let _ended = permits.acquire_many(all).await;
    }

    /// Prefetches one blob. `opened` receives the result of the `GET` if this call was the leader.
    pub(super) async fn prefetch_blob(
        self: &Arc<Self>,
        upstream_request: UpstreamRequest,
        digest: Digest,
        opened: Option<oneshot::Sender<Result<(), UpstreamFailure>>>,
    ) {
        let endpoint = Endpoint::Blob {
            repository: upstream_request.repository.clone(),
            digest: AnyDigest::Supported(digest),
        };
        let mut upstream_request = UpstreamRequest {
            endpoint,
            // Not a response to the client's request.
            upstream_caches: UpstreamCaches::default(),
            ..upstream_request
        };
        upstream_request.caller.wait_deadline = Some(Instant::now() + RATE_LIMIT_WAIT_MAX);
        (upstream_request.caller.peer, upstream_request.caller.class) = (Peer::Background, Class::Background);
        let options = JoinOptions {
            demand: upstream_request.caller.demand(&upstream_request.endpoint),
            wants_complete: true,
        };
        let settled = match self
            .downloads
            .join(digest, upstream_request.requester(), options)
            .await
        {
            Joined::Leader(leader) => {
                let source = UpstreamSource::new(self, upstream_request.clone(), digest).for_leader(&leader);
                let (source, _) = source.with_shared();
                let mut reader = leader.start(source);
                if let Some(opened) = opened {
                    let result = reader.info().await.map(drop);
                    // The probe may have ended.
                    let _heard = opened.send(result.map_err(|failure| cause_of(&failure)));
                }
                reader.settled().await.map(drop)
            }
            Joined::Follower { mut reader, .. } => reader.settled().await.map(drop),
            Joined::Cached(_) => Ok(()),
        };
        if let Err(failure) = settled {
            tracing::debug!(%digest, %failure, "failed to prefetch blob");
            return;
        }
        // The blob was stored for another repository. Its client may also have it from there and never request it,
        // like a base layer that many images share. Without confirmation that this repository has it too, the image
        // would stay incomplete.
        if !self
            .is_member(&upstream_request.registry, &upstream_request.repository, digest)
            .await
        {
            self.coalesced_head(&upstream_request).wait().await;
        }
    }
}

fn cause_of(failure: &DownloadError) -> UpstreamFailure {
    match failure {
        DownloadError::NotStarted(response) => response.cause(),
        DownloadError::Interrupted(cause) => *cause,
        _ => UpstreamFailure::Abandoned,
    }
}
