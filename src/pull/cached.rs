//! Cached content as the road of a request reads it: an error of the store is logged, and what cannot be read counts as
//! not cached.

use std::fmt::Display;
use std::sync::Arc;

use super::{Pull, Site};
use crate::oci::{Digest, Repository};
use crate::store::Fault;
use crate::store::manifests::HeldManifest;

impl Pull {
    /// What was read for `image`; nothing after an error, which is logged. (The store counts it.)
    pub(super) fn cached<T>(
        &self,
        site: &Site,
        image: &dyn Display,
        read: Result<Option<T>, Fault>,
    ) -> Option<T> {
        read.unwrap_or_else(|fault| {
            if let Some(skipped) = self.unreadable.admits() {
                tracing::warn!(upstream = site.name(), %image, %fault, skipped,
                    "the store could not be read for a request; the upstream is asked as if nothing were cached");
            }
            None
        })
    }

    pub(super) fn cached_manifest(
        &self,
        site: &Site,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<Arc<HeldManifest>> {
        let image = format_args!("{repository}@{digest}");
        self.cached(site, &image, self.store.manifest(digest))
    }
}
