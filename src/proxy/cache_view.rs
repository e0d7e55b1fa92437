//! Store reads of the request path. A read error is logged and counts as a miss.

use std::fmt::Display;
use std::sync::Arc;

use super::{ProxyService, UpstreamRegistry};
use crate::oci::{Digest, Repository};
use crate::store::manifests::StoredManifest;
use crate::store::{StoreError, View};

/// Cached content of one repository in one view of the store.
pub(super) struct CacheView<'a> {
    pub(super) proxy: &'a ProxyService,
    pub(super) view: &'a View<'a>,
    pub(super) registry: &'a UpstreamRegistry,
    pub(super) repository: &'a Repository,
}

impl CacheView<'_> {
    pub(super) fn manifest(&self, digest: &Digest) -> Option<Arc<StoredManifest>> {
        let image = format_args!("{}@{digest}", self.repository);
        self.proxy
            .cached(self.registry, &image, self.view.manifest(digest))
    }

    /// Whether the upstream is known to have `digest` in this repository.
    pub(super) fn is_member(&self, digest: &Digest) -> bool {
        self.view.is_member(self.registry.name(), self.repository, digest)
    }
}

impl ProxyService {
    /// The value read for `image`; `None` after an error, which is logged. The store counts the error.
    pub(super) fn cached<T>(
        &self,
        registry: &UpstreamRegistry,
        image: &dyn Display,
        read: Result<Option<T>, StoreError>,
    ) -> Option<T> {
        read.unwrap_or_else(|fault| {
            if let Some(skipped) = self.unreadable.admits() {
                tracing::warn!(upstream = registry.name(), %image, %fault, skipped,
                    "failed to read store, treating request as a miss");
            }
            None
        })
    }

    /// Runs `read` on this repository: from memory if possible, else on a blocking thread. `read` must have no side
    /// effects, because it may run twice.
    pub(super) async fn read_cache<T: Send + 'static>(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        read: impl Fn(&CacheView<'_>) -> T + Send + 'static,
    ) -> T {
        let found = self.store.in_memory(|view| {
            read(&CacheView {
                proxy: self,
                view,
                registry,
                repository,
            })
        });
        if let Some(found) = found {
            return found;
        }
        let (proxy, registry, repository) = (Arc::clone(self), Arc::clone(registry), repository.clone());
        let on_disk = self.store.on_disk(move |view| {
            read(&CacheView {
                proxy: &proxy,
                view,
                registry: &registry,
                repository: &repository,
            })
        });
        // Boxed, so that the future of a request served from memory stays small.
        Box::pin(on_disk).await
    }

    pub(super) async fn cached_manifest(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<Arc<StoredManifest>> {
        let digest = *digest;
        self.read_cache(registry, repository, move |cached| cached.manifest(&digest))
            .await
    }
}

/// Logs a failed store write. The request continues, because a lost write costs only a later upstream request.
pub(super) fn log_store_error<T>(done: Result<T, StoreError>, action: &str) {
    if let Err(fault) = done {
        tracing::warn!(%fault, "failed to {action}");
    }
}
