//! Blobs begun before anybody asks for them: who was given a manifest will want its config and layers next.
//!
//! What is begun here is an ordinary download that a client joins when it comes. It gives way to clients: a few at a
//! time, and none while the places for downloads run short. An index is not followed, for its reader names the
//! platform it wants with its next request.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::fetching::Wanted;
use super::source::Upstreamed;
use super::{LIMIT_WITHIN, Pull};
use crate::download::Joined;
use crate::oci::{AnyDigest, Digest, Operation};
use crate::store::manifests::HeldManifest;

/// Downloads begun ahead, at a time, of all images together.
const BLOBS_MAX: usize = 6;

/// Downloads begun ahead, at a time, of one image: as many as its own client would run.
const BLOBS_PER_IMAGE_MAX: usize = 3;

/// Images whose blobs wait to be begun. Those of further ones are begun by their clients.
const IMAGES_MAX: usize = 64;

/// What is being prefetched.
pub(super) struct Prefetching {
    images: Arc<Semaphore>,
    blobs: Arc<Semaphore>,
}

impl Default for Prefetching {
    fn default() -> Self {
        Self {
            images: Arc::new(Semaphore::new(IMAGES_MAX)),
            blobs: Arc::new(Semaphore::new(BLOBS_MAX)),
        }
    }
}

impl Pull {
    /// Begins to download what is missing of the image `manifest`, in a task of its own.
    pub(super) fn prefetch(self: &Arc<Self>, of: Wanted, manifest: &Arc<HeldManifest>) {
        let arriving = |digest: &Digest| self.is_arriving(&of.site, &of.repository, digest);
        let missing: Vec<Digest> = self
            .store
            .missing_blobs(of.site.name(), &of.repository, manifest, &arriving)
            .filter_map(|child| match child.digest {
                AnyDigest::Known(digest) => Some(digest),
                AnyDigest::Foreign(_) => None,
            })
            .collect();
        if missing.is_empty() {
            return;
        }
        let Ok(image) = Arc::clone(&self.prefetching.images).try_acquire_owned() else {
            tracing::debug!(digest = %manifest.digest, "too much is prefetched already");
            return;
        };
        let pull = Arc::clone(self);
        tokio::spawn(async move {
            let own = Arc::new(Semaphore::new(BLOBS_PER_IMAGE_MAX));
            for digest in missing {
                // Neither semaphore is ever closed.
                let Ok(place) = Arc::clone(&own).acquire_owned().await else {
                    break;
                };
                let Ok(blob) = Arc::clone(&pull.prefetching.blobs).acquire_owned().await else {
                    break;
                };
                let (pull, of) = (Arc::clone(&pull), of.clone());
                tokio::spawn(async move {
                    pull.prefetch_blob(of, digest).await;
                    drop((place, blob));
                });
            }
            drop(image);
        });
    }

    async fn prefetch_blob(self: &Arc<Self>, of: Wanted, digest: Digest) {
        let is_held = matches!(self.store.blob(&digest), Ok(Some(_)));
        if !is_held && !self.downloads.has_room() {
            return;
        }
        let operation = Operation::Blob {
            repository: of.repository.clone(),
            digest: AnyDigest::Known(digest),
        };
        let mut wanted = Wanted { operation, ..of };
        wanted.caller.waits_until = Some(Instant::now() + LIMIT_WITHIN);
        let settled = match self.downloads.join(digest, wanted.requester()) {
            Joined::Leader(leader) => {
                let source = Upstreamed::new(self, wanted.clone(), digest);
                leader.start(source).settled().await.map(drop)
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
        if !self
            .store
            .has_seen(wanted.site.name(), &wanted.repository, &digest)
        {
            self.question(&wanted).landed().await;
        }
    }
}
