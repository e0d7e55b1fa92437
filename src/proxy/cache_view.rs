//! Cached content as the road of a request reads it: an error of the store is logged, and what cannot be read counts as
//! not cached.

use std::fmt::Display;
use std::sync::Arc;

use super::{ProxyService, UpstreamRegistry};
use crate::oci::{Digest, Repository};
use crate::store::manifests::StoredManifest;
use crate::store::{StoreError, View};

/// The cached content of one repository, through one view of the store.
pub(super) struct CacheView<'a> {
    pub(super) pull: &'a ProxyService,
    pub(super) view: &'a View<'a>,
    pub(super) site: &'a UpstreamRegistry,
    pub(super) repository: &'a Repository,
}

impl CacheView<'_> {
    pub(super) fn manifest(&self, digest: &Digest) -> Option<Arc<StoredManifest>> {
        let image = format_args!("{}@{digest}", self.repository);
        self.pull.cached(self.site, &image, self.view.manifest(digest))
    }

    /// Whether `digest` was seen in this repository.
    pub(super) fn is_member(&self, digest: &Digest) -> bool {
        self.view.is_member(self.site.name(), self.repository, digest)
    }
}

impl ProxyService {
    /// What was read for `image`; nothing after an error, which is logged. (The store counts it.)
    pub(super) fn cached<T>(
        &self,
        site: &UpstreamRegistry,
        image: &dyn Display,
        read: Result<Option<T>, StoreError>,
    ) -> Option<T> {
        read.unwrap_or_else(|fault| {
            if let Some(skipped) = self.unreadable.admits() {
                tracing::warn!(upstream = site.name(), %image, %fault, skipped,
                    "the store could not be read for a request; the upstream is asked as if nothing were cached");
            }
            None
        })
    }

    /// What `look` finds in this repository: from memory, or else from the disk, and then its caller waits. It has no
    /// effect but its result.
    pub(super) async fn look_up<T: Send + 'static>(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        look: impl Fn(&CacheView<'_>) -> T + Send + 'static,
    ) -> T {
        let found = self.store.in_memory(|view| {
            look(&CacheView {
                pull: self,
                view,
                site,
                repository,
            })
        });
        if let Some(found) = found {
            return found;
        }
        let (pull, site, repository) = (Arc::clone(self), Arc::clone(site), repository.clone());
        let on_disk = self.store.on_disk(move |view| {
            look(&CacheView {
                pull: &pull,
                view,
                site: &site,
                repository: &repository,
            })
        });
        // On the heap, so that the state of requests that are answered from memory stays as small as it is.
        Box::pin(on_disk).await
    }

    pub(super) async fn cached_manifest(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<Arc<StoredManifest>> {
        let digest = *digest;
        self.look_up(site, repository, move |cached| cached.manifest(&digest))
            .await
    }
}
