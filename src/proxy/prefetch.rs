//! Blobs begun before they are asked for: whoever asks for one layer of an image wants the others next.
//!
//! A manifest alone is no such wish. Many clients read those of every platform and pull one, and some only look. So the
//! config comes with its manifest, and the layers when the first of them is asked for. They come with the manifest where a
//! tag moved of which an earlier image was pulled here whole.
//!
//! What is begun here is an ordinary download that a client joins when it comes. It gives way to clients: it has a class of
//! its own in the queue of downloads, a few places of each upstream, and no more than its place if the upstream drips. After the layers come the image's attestation and what
//! refers to that: clients of today ask for them, and in an outage those that older clients left out must be here.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use quick_cache::sync::Cache;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use super::manifest_fetch::UpstreamRequest;
use super::source::UpstreamSource;
use super::{LIMIT_WITHIN, ProxyService, Request};
use crate::download::{Failure, Joined, Wish};
use crate::oci::manifest::DescriptorKind;
use crate::oci::{AnyDigest, Digest, Endpoint, Repository, UpstreamFailure};
use crate::queue::{Class, Peer};
use crate::store::manifests::StoredManifest;

/// Downloads begun ahead, at a time, of one image: as many as its own client would run.
const BLOBS_PER_IMAGE_MAX: usize = 3;

/// Images whose blobs wait to be begun. Those of further ones are begun by their clients.
const IMAGES_MAX: usize = 64;

/// Layers of which it is remembered whose they are.
const LAYERS_MAX: usize = 16_384;

/// A manifest or a blob in a repository of an upstream.
pub(super) type ContentKey = (Arc<str>, Repository, Digest);

/// What is being prefetched, and what would be.
pub(super) struct Prefetching {
    images: Arc<Semaphore>,
    running: Mutex<HashSet<ContentKey>>,
    /// The manifests given to clients that lack something here, by their layers.
    lacking: Cache<ContentKey, Parent>,
}

/// Which image a layer belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parent {
    One(Digest),
    /// Several: a request for the layer does not tell which of them is wanted.
    Several,
}

/// The downloads begun, each with what the upstream said to its `GET`. Dropped unanswered: nothing that concerns the
/// caller.
pub(super) type StartedDownloads = HashMap<Digest, oneshot::Receiver<Result<(), UpstreamFailure>>>;

impl Default for Prefetching {
    fn default() -> Self {
        Self {
            images: Arc::new(Semaphore::new(IMAGES_MAX)),
            running: Mutex::default(),
            lacking: Cache::new(LAYERS_MAX),
        }
    }
}

impl Prefetching {
    /// Whether the image was not under way, and is now.
    fn enter(&self, image: &ContentKey) -> bool {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.insert(image.clone())
    }

    fn leave(&self, image: &ContentKey) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.remove(image);
    }

    fn note_lacking(&self, layer: ContentKey, manifest: Digest) {
        let one = Parent::One(manifest);
        let parent = match self.lacking.get(&layer) {
            Some(known) if known != one => Parent::Several,
            _ => one,
        };
        self.lacking.insert(layer, parent);
    }
}

impl ProxyService {
    /// The blobs of `manifest` that are missing here, and what they are to it.
    pub(super) async fn missing(
        self: &Arc<Self>,
        of: &UpstreamRequest,
        manifest: &Arc<StoredManifest>,
    ) -> Vec<(Digest, DescriptorKind)> {
        let manifest = Arc::clone(manifest);
        self.look_up(&of.site, &of.repository, move |cached| {
            let arriving = |digest: &Digest| cached.is_arriving(digest);
            cached
                .view
                .missing_blobs(cached.site.name(), cached.repository, &manifest, &arriving)
                .filter_map(|child| match child.digest {
                    AnyDigest::Supported(digest) => Some((digest, child.kind)),
                    AnyDigest::Unsupported(_) => None,
                })
                .collect()
        })
        .await
    }

    /// A client was given a manifest: its config is begun, and its layers are remembered.
    pub(super) async fn note_manifest_given(
        self: &Arc<Self>,
        request: &Request,
        manifest: &Arc<StoredManifest>,
    ) {
        let Some(repository) = request.endpoint.repository().filter(|_| !request.head) else {
            return;
        };
        let site = &request.site;
        self.attestations.learn(site, repository, manifest);
        if !site.rule(repository, request.tag()).prefetch {
            return;
        }
        let lacks_blobs = !self.is_whole(site, repository, manifest).await;
        if !lacks_blobs && !self.attestations.lacks(site, repository, &manifest.digest) {
            return;
        }
        let of = UpstreamRequest::of(request, repository, &self.caller(request));
        let upstream: Arc<str> = site.name().into();
        for child in manifest
            .manifest
            .descriptors
            .iter()
            .filter(|child| child.kind == DescriptorKind::Layer)
        {
            if let AnyDigest::Supported(layer) = child.digest {
                let key = (Arc::clone(&upstream), repository.clone(), layer);
                self.prefetching.note_lacking(key, manifest.digest);
            }
        }
        let missing = self.missing(&of, manifest).await;
        if let Some((config, _)) = missing
            .into_iter()
            .find(|(_, role)| *role == DescriptorKind::Config)
            && let Ok(place) = Arc::clone(&self.prefetching.images).try_acquire_owned()
        {
            let pull = Arc::clone(self);
            tokio::spawn(async move {
                pull.prefetch_blob(of, config, None).await;
                drop(place);
            });
        }
    }

    /// A client was given a blob: if it is a layer of an image that lacks something, the rest is begun.
    pub(super) fn note_blob_given(self: &Arc<Self>, request: &Request, digest: Digest) {
        let Some(repository) = request.endpoint.repository().filter(|_| !request.head) else {
            return;
        };
        let layer: ContentKey = (request.site.name().into(), repository.clone(), digest);
        let Some(Parent::One(image)) = self.prefetching.lacking.get(&layer) else {
            return;
        };
        let of = UpstreamRequest::of(request, repository, &self.caller(request));
        let pull = Arc::clone(self);
        self.prefetching.lacking.remove(&layer);
        tokio::spawn(async move {
            if let Some(manifest) = pull.cached_manifest(&of.site, &of.repository, &image).await {
                pull.prefetch(of, &manifest).await;
            }
        });
    }

    /// Begins to download what is missing of the image `manifest`, in a task of its own.
    pub(super) async fn prefetch(
        self: &Arc<Self>,
        of: UpstreamRequest,
        manifest: &Arc<StoredManifest>,
    ) -> StartedDownloads {
        let missing = self.missing(&of, manifest).await;
        self.begin(of, manifest, missing)
    }

    fn begin(
        self: &Arc<Self>,
        of: UpstreamRequest,
        manifest: &Arc<StoredManifest>,
        missing: Vec<(Digest, DescriptorKind)>,
    ) -> StartedDownloads {
        let image: ContentKey = (of.site.name().into(), of.repository.clone(), manifest.digest);
        let lacks_attestation = self
            .attestations
            .lacks(&of.site, &of.repository, &manifest.digest);
        if missing.is_empty() && !lacks_attestation {
            return StartedDownloads::default();
        }
        let Ok(place) = Arc::clone(&self.prefetching.images).try_acquire_owned() else {
            tracing::debug!(digest = %manifest.digest, "too much is prefetched already");
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
        let (pull, manifest) = (Arc::clone(self), Arc::clone(manifest));
        tokio::spawn(async move {
            pull.prefetch_blobs(&of, blobs).await;
            if lacks_attestation {
                pull.bring_attached(&of, &manifest.digest).await;
            }
            for child in &manifest.manifest.descriptors {
                if let AnyDigest::Supported(digest) = child.digest {
                    let key = (Arc::clone(&image.0), image.1.clone(), digest);
                    pull.prefetching.lacking.remove(&key);
                }
            }
            pull.prefetching.leave(&image);
            drop(place);
        });
        begun
    }

    /// Downloads blobs of one image, a few at a time.
    async fn prefetch_blobs(
        self: &Arc<Self>,
        of: &UpstreamRequest,
        blobs: Vec<(Digest, oneshot::Sender<Result<(), UpstreamFailure>>)>,
    ) {
        let own = Arc::new(Semaphore::new(BLOBS_PER_IMAGE_MAX));
        for (digest, opened) in blobs {
            // The semaphore is never closed.
            let Ok(place) = Arc::clone(&own).acquire_owned().await else {
                break;
            };
            let (pull, of) = (Arc::clone(self), of.clone());
            tokio::spawn(async move {
                pull.prefetch_blob(of, digest, Some(opened)).await;
                drop(place);
            });
        }
        // Each place free is each download ended.
        let all = u32::try_from(BLOBS_PER_IMAGE_MAX).unwrap_or(u32::MAX);
        let _ended = own.acquire_many(all).await;
    }

    /// Downloads one blob. `opened` is told what the upstream said to the `GET`, if that was the caller's own.
    pub(super) async fn prefetch_blob(
        self: &Arc<Self>,
        of: UpstreamRequest,
        digest: Digest,
        opened: Option<oneshot::Sender<Result<(), UpstreamFailure>>>,
    ) {
        let endpoint = Endpoint::Blob {
            repository: of.repository.clone(),
            digest: AnyDigest::Supported(digest),
        };
        let mut wanted = UpstreamRequest { endpoint, ..of };
        wanted.caller.wait_deadline = Some(Instant::now() + LIMIT_WITHIN);
        (wanted.caller.peer, wanted.caller.class) = (Peer::Background, Class::Background);
        let wish = Wish {
            demand: wanted.caller.demand(&wanted.endpoint),
            is_whole: true,
        };
        let settled = match self.downloads.join(digest, wanted.requester(), wish).await {
            Joined::Leader(leader) => {
                let source = UpstreamSource::new(self, wanted.clone(), digest).for_leader(&leader);
                let mut reader = leader.start(source);
                if let Some(opened) = opened {
                    let said = reader.opened().await.map(drop);
                    // The check may have ended.
                    let _heard = opened.send(said.map_err(|failure| cause_of(&failure)));
                }
                reader.settled().await.map(drop)
            }
            Joined::Follower { mut reader, .. } => reader.settled().await.map(drop),
            Joined::Held(_) => Ok(()),
        };
        if let Err(failure) = settled {
            tracing::debug!(%digest, %failure, "a blob could not be prefetched; it will be fetched when asked for");
            return;
        }
        // It came here under another repository. Its client may have it from there as well and never ask: a base layer
        // that many images share. Without the upstream's word that this repository has it too, the image is not whole.
        if !self.is_member(&wanted.site, &wanted.repository, digest).await {
            self.question(&wanted).wait().await;
        }
    }
}

fn cause_of(failure: &Failure) -> UpstreamFailure {
    match failure {
        Failure::Refused(answer) => answer.cause(),
        Failure::Broken(cause) => *cause,
        _ => UpstreamFailure::Busy,
    }
}
