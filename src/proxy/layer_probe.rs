//! Whether the upstream has the rest of an image whose manifest is held.
//!
//! Asked only where another image could be served instead: a tag that moved to an image which cannot be completed is
//! answered with the last complete one. Such a tag is in use here, so what is missing will be wanted: it is begun, and
//! the response to each `GET` is the check. What has to wait for its turn, or may not be begun, is asked for by `HEAD`,
//! with the client's own credential, so a yes is also the proof that the blob is in this repository.
//!
//! Of an index those images are looked at that were pulled of the earlier one: which platforms are in use here is best
//! known from what was pulled here.

use std::sync::Arc;
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::manifest_fetch::UpstreamRequest;
use super::prefetch::StartedDownloads;
use super::{ProxyService, UpstreamRegistry};
use crate::oci::{AnyDigest, Digest, Endpoint, Reference, Repository, UpstreamFailure};
use crate::store::manifests::StoredManifest;

/// Questions at a time about one image.
const QUESTIONS_MAX: usize = 8;

/// How long no download of an image begins until the check asks about those that wait for their turn.
const BEGINS_WITHIN: Duration = Duration::from_millis(300);

/// Blobs asked about. An image with more is taken to be as good as these.
const BLOBS_MAX: usize = 256;

/// Platforms of one index looked at.
const PLATFORMS_MAX: usize = 4;

/// How long a yes is good: those who only compare tags must not cost a question per layer each time.
const GOOD_FOR: Duration = Duration::from_secs(60);

/// Images remembered as found at the upstream.
const FOUND_MAX: usize = 4096;

type Image = (Arc<str>, Repository, Digest);

/// The images whose rest the upstream was lately seen to have.
pub(super) struct ProbedImages(Cache<Image, std::time::SystemTime>);

impl Default for ProbedImages {
    fn default() -> Self {
        Self(Cache::new(FOUND_MAX))
    }
}

impl ProxyService {
    /// `Ok` if nothing that `manifest` points to is known to be missing upstream; else how the upstream failed.
    /// `instead` is the image that would be served instead. `begin_for`: what is missing is begun, and for so long the
    /// check waits for its turn to come.
    pub(super) async fn check(
        self: &Arc<Self>,
        wanted: UpstreamRequest,
        begin_for: Option<Duration>,
        manifest: &Arc<StoredManifest>,
        instead: &Arc<StoredManifest>,
    ) -> Result<(), UpstreamFailure> {
        let (site, repository) = (&wanted.site, &wanted.repository);
        let image: Image = (site.name().into(), repository.clone(), manifest.digest);
        let now = self.clock.now();
        let is_good = |at| now.duration_since(at).is_ok_and(|age| age < GOOD_FOR);
        if self.found.0.get(&image).is_some_and(is_good) || self.is_whole(site, repository, manifest).await {
            return Ok(());
        }
        self.attestations.learn(site, repository, manifest);
        self.check_blobs(&wanted, begin_for, manifest).await?;
        for digest in self.platforms_in_use(site, repository, manifest, instead).await {
            let child = self.child(&wanted, digest).await?;
            self.check_blobs(&wanted, begin_for, &child).await?;
        }
        self.found.0.insert(image, now);
        Ok(())
    }

    /// The images of `index` for the platforms of which `instead` has been pulled.
    pub(super) async fn platforms_in_use(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        index: &StoredManifest,
        instead: &Arc<StoredManifest>,
    ) -> Vec<Digest> {
        let instead = Arc::clone(instead);
        let in_use = self.look_up(site, repository, move |cached| {
            let whole = cached
                .view
                .complete_children(cached.site.name(), cached.repository, &instead);
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
            .take(PLATFORMS_MAX)
            .collect()
    }

    pub(super) async fn child(
        self: &Arc<Self>,
        of: &UpstreamRequest,
        digest: Digest,
    ) -> Result<Arc<StoredManifest>, UpstreamFailure> {
        let held = self.look_up(&of.site, &of.repository, move |cached| {
            let held = cached.is_member(&digest).then(|| cached.manifest(&digest));
            held.flatten()
        });
        if let Some(manifest) = held.await {
            return Ok(manifest);
        }
        let endpoint = Endpoint::Manifest {
            repository: of.repository.clone(),
            reference: Reference::Digest(AnyDigest::Supported(digest)),
        };
        let wanted = UpstreamRequest {
            endpoint,
            ..of.clone()
        };
        self.fetch_manifest(wanted).await.map_err(|answer| answer.cause())
    }

    async fn check_blobs(
        self: &Arc<Self>,
        of: &UpstreamRequest,
        begin_for: Option<Duration>,
        manifest: &Arc<StoredManifest>,
    ) -> Result<(), UpstreamFailure> {
        let missing = self.missing(of, manifest).await;
        let mut begun = match begin_for {
            Some(_) => self.prefetch(of.clone(), manifest).await,
            None => StartedDownloads::default(),
        };
        let patience = Instant::now() + begin_for.unwrap_or_default();
        let progress = Arc::new(watch::Sender::new(Instant::now()));
        let mut questions = JoinSet::new();
        for (digest, _) in missing.into_iter().take(BLOBS_MAX) {
            if questions.len() >= QUESTIONS_MAX
                && let Some(question) = questions.join_next().await
            {
                question.unwrap_or(Err(UpstreamFailure::Busy))?;
            }
            let (pull, of, progress) = (Arc::clone(self), of.clone(), Arc::clone(&progress));
            let begun = begun.remove(&digest);
            questions.spawn(async move {
                if let Some(begun) = begun
                    && let Some(said) = said_to_get(begun, &progress, patience).await
                {
                    return said.inspect_err(|cause| lacks(&of, &digest, *cause));
                }
                pull.has_blob(of, digest).await
            });
        }
        while let Some(question) = questions.join_next().await {
            question.unwrap_or(Err(UpstreamFailure::Busy))?;
        }
        Ok(())
    }

    async fn has_blob(self: Arc<Self>, of: UpstreamRequest, digest: Digest) -> Result<(), UpstreamFailure> {
        let endpoint = Endpoint::Blob {
            repository: of.repository.clone(),
            digest: AnyDigest::Supported(digest),
        };
        let wanted = UpstreamRequest { endpoint, ..of };
        let Some(answer) = self.question(&wanted).wait().await else {
            return Err(UpstreamFailure::Busy);
        };
        if answer.kind.is_success() {
            Ok(())
        } else {
            lacks(&wanted, &digest, answer.cause());
            Err(answer.cause())
        }
    }
}

/// What the upstream said to the `GET` of a blob that was begun. `None` if that proves nothing for this caller, or if it is
/// not its turn yet and no other of its image has begun for a while.
async fn said_to_get(
    mut begun: oneshot::Receiver<Result<(), UpstreamFailure>>,
    progress: &watch::Sender<Instant>,
    patience: Instant,
) -> Option<Result<(), UpstreamFailure>> {
    loop {
        let until = patience.min(*progress.borrow() + BEGINS_WITHIN);
        match timeout_at(until, &mut begun).await {
            Ok(said) => {
                progress.send_replace(Instant::now());
                return said.ok();
            }
            Err(_) if until < patience && *progress.borrow() + BEGINS_WITHIN > until => {}
            Err(_) => return None,
        }
    }
}

/// A no to a blob of an image whose manifest it gave just now: that image is broken there.
fn lacks(of: &UpstreamRequest, digest: &Digest, cause: UpstreamFailure) {
    tracing::info!(upstream = of.site.name(), repository = %of.repository, blob = %digest, %cause,
        "the upstream names a newer image but cannot give this part of it; the last complete one is served");
}
