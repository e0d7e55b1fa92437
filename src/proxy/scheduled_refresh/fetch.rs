//! Download of an image in the background, as far as it is in use: its manifests, configs and layers.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::oneshot;

use super::run::Outcome;
use super::{ProxyService, RefreshResult};
use crate::oci::manifest::{DescriptorKind, ManifestKind};
use crate::oci::{Digest, UpstreamFailure};
use crate::proxy::evidence::Candidates;
use crate::proxy::layer_probe::ClaimWait;
use crate::proxy::manifest_fetch::UpstreamRequest;
use crate::store::View;
use crate::store::manifests::StoredManifest;
use crate::store::tags::TagKey;

/// Why the download of an image ended early.
enum FetchStop {
    /// The operator blocked the image.
    Blocked,
    /// Refreshes of the upstream are paused.
    Paused,
    /// Content could not be fetched.
    Failed(UpstreamFailure),
}

impl From<UpstreamFailure> for FetchStop {
    fn from(cause: UpstreamFailure) -> Self {
        Self::Failed(cause)
    }
}

impl From<FetchStop> for Outcome {
    fn from(stop: FetchStop) -> Self {
        match stop {
            FetchStop::Blocked => Self::of(RefreshResult::Blocked),
            FetchStop::Paused => Self::of(RefreshResult::FetchSkipped),
            FetchStop::Failed(cause) => Self::failed(RefreshResult::FetchFailed, cause),
        }
    }
}

impl ProxyService {
    /// Fetches the image that a tag moved to, or the rest of it. If the tag moved, a second `HEAD` then records the new
    /// digest.
    pub(super) async fn refresh_image(
        self: &Arc<Self>,
        key: &TagKey,
        (digest, candidates): (Digest, &Candidates),
        used_at: Option<SystemTime>,
    ) -> Outcome {
        let Some((request, _)) = self.current_request(key).await else {
            return Outcome::of(RefreshResult::FetchSkipped);
        };
        let was_cached = self
            .cached_manifest(&request.registry, &request.repository, &digest)
            .await
            .is_some();
        let manifest = match self.fetch_unblocked(&request, digest).await {
            Ok(manifest) => manifest,
            Err(stop) => return stop.into(),
        };
        // Read now, so that what clients do during the download counts as a later use.
        let used = move |view: &View<'_>| view.manifest_used_at(digest);
        let stored_at = if was_cached {
            None
        } else {
            self.store.on_disk(used).await
        };
        let whole = candidates.complete().unwrap_or(&candidates.newest);
        let fetched = self.fetch_content(&request, &manifest, &whole.manifest);
        let newest = candidates.newest.manifest.digest;
        let outcome = match fetched.await {
            Err(stop) => stop.into(),
            Ok(()) if newest == digest => Outcome::of(RefreshResult::Completed),
            Ok(()) => {
                let again = self.refresh_request(&request.registry, key, &request.caller);
                self.confirm_move(&again, digest, used_at).await
            }
        };
        // Also after a failure: the manifest is stored, and its storage counts as no use.
        self.keep_use((digest, stored_at), candidates, used_at).await;
        let image = format_args!("{}:{}", key.repository, key.tag);
        match outcome.result {
            RefreshResult::NewDigest => tracing::info!(
                upstream = &*key.upstream,
                %image,
                from = %newest,
                to = %digest,
                "tag moved, new image cached by scheduled refresh"
            ),
            RefreshResult::Completed => tracing::info!(
                upstream = &*key.upstream,
                %image,
                %digest,
                "incomplete image completed by scheduled refresh"
            ),
            _ => {}
        }
        outcome
    }

    /// Sets the last use of the fetched image to that of the tag. A client may have got the previous image meanwhile.
    async fn keep_use(
        &self,
        (digest, stored_at): (Digest, Option<SystemTime>),
        candidates: &Candidates,
        used_at: Option<SystemTime>,
    ) {
        let previous = [Some(&candidates.newest), candidates.earlier.as_ref()];
        let previous =
            previous.map(|copy| copy.map(|copy| copy.manifest.digest).filter(|one| *one != digest));
        let last = move |view: &View<'_>| {
            let uses = previous.into_iter().flatten();
            uses.filter_map(|digest| view.manifest_used_at(digest)).max()
        };
        let used_at = self.store.on_disk(last).await.max(used_at);
        if let Some(used_at) = used_at {
            self.store.keep_last_use(digest, stored_at, used_at).await;
        }
    }

    /// Sends the second `HEAD`. The tag moved only if the upstream still names the fetched digest.
    async fn confirm_move(
        self: &Arc<Self>,
        request: &UpstreamRequest,
        fetched: Digest,
        used_at: Option<SystemTime>,
    ) -> Outcome {
        match self.tag_digest(request, used_at).await {
            Ok((digest, _)) if digest == fetched => Outcome::of(RefreshResult::NewDigest),
            // It moved again during the download.
            Ok(_) => Outcome::of(RefreshResult::FetchSkipped),
            Err(Outcome {
                result: RefreshResult::Unavailable,
                cause,
            }) => Outcome {
                result: RefreshResult::FetchFailed,
                cause,
            },
            Err(outcome) => outcome,
        }
    }

    /// Fetches this manifest, unless it is blocked or refreshes are paused: the run may have waited for other downloads,
    /// and manifests cost pull quota.
    async fn fetch_unblocked(
        self: &Arc<Self>,
        request: &UpstreamRequest,
        digest: Digest,
    ) -> Result<Arc<StoredManifest>, FetchStop> {
        if self.is_blocked(&request.registry, &request.repository, &digest) {
            return Err(FetchStop::Blocked);
        }
        if !self.may_refresh(request) {
            return Err(FetchStop::Paused);
        }
        Ok(self.child_manifest(request, digest, ClaimWait::Full).await?)
    }

    /// Fetches the content of an image, and of an index the platforms of which `previous` was pulled. The tag is not
    /// changed.
    async fn fetch_content(
        self: &Arc<Self>,
        request: &UpstreamRequest,
        manifest: &Arc<StoredManifest>,
        previous: &Arc<StoredManifest>,
    ) -> Result<(), FetchStop> {
        let (registry, repository) = (&request.registry, &request.repository);
        self.attestations.record(registry, repository, manifest);
        if manifest.manifest.kind != ManifestKind::Index {
            if self.was_pulled(request, previous).await {
                self.fetch_blobs(request, manifest).await?;
            }
            return Ok(());
        }
        for child in self
            .platforms_in_use(registry, repository, manifest, previous)
            .await
        {
            if self.is_blocked(registry, repository, &manifest.digest) {
                return Err(FetchStop::Blocked);
            }
            match self.fetch_unblocked(request, child).await {
                Ok(image) => self.fetch_blobs(request, &image).await?,
                // As a platform that was blocked before.
                Err(FetchStop::Blocked) => {}
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }

    /// Whether clients pulled content of this image, and not its manifest alone. Some only compare digests.
    async fn was_pulled(self: &Arc<Self>, request: &UpstreamRequest, image: &Arc<StoredManifest>) -> bool {
        let blobs = image.manifest.descriptors.iter();
        let blobs = blobs.filter(|child| child.kind != DescriptorKind::Manifest);
        self.missing_blobs_of(request, image).await.len() < blobs.count()
            || self
                .is_complete(&request.registry, &request.repository, image)
                .await
    }

    /// Fetches the missing blobs of an image, then its attestation.
    async fn fetch_blobs(
        self: &Arc<Self>,
        request: &UpstreamRequest,
        image: &Arc<StoredManifest>,
    ) -> Result<(), UpstreamFailure> {
        let missing = self.missing_blobs_of(request, image).await;
        let (mut blobs, mut opened) = (Vec::new(), Vec::new());
        for (digest, _) in missing {
            let (sender, receiver) = oneshot::channel();
            blobs.push((digest, sender));
            opened.push(receiver);
        }
        self.prefetch_blobs(request, blobs).await;
        if !self.missing_blobs_of(request, image).await.is_empty() {
            // The failure of a `GET`, if there was one; otherwise the transfer broke off or the disk is full.
            let failed = opened
                .into_iter()
                .find_map(|mut opened| opened.try_recv().ok()?.err());
            return Err(failed.unwrap_or(UpstreamFailure::ConnectionReset));
        }
        self.fetch_attestation_of(request, &image.digest).await;
        Ok(())
    }
}
