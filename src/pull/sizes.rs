//! How large blobs are, from the manifests that list them: for upstreams that send a blob without its length.
//!
//! A manifest is believed only for its own repository, and only about a length: a wrong one spoils nothing but the
//! pulls of the repository that stated it, since the digest is checked all the same.

use std::sync::Arc;

use quick_cache::sync::Cache;

use super::Site;
use crate::oci::{AnyDigest, Digest, Manifest, Repository};

/// Blobs whose size is remembered.
const SIZES_MAX: usize = 16_384;

pub(super) struct Sizes(Cache<(Arc<str>, Repository, Digest), u64>);

impl Default for Sizes {
    fn default() -> Self {
        Self(Cache::new(SIZES_MAX))
    }
}

impl Sizes {
    pub(super) fn learn(&self, site: &Site, repository: &Repository, manifest: &Manifest) {
        let upstream: Arc<str> = site.name().into();
        for child in &manifest.children {
            if let (AnyDigest::Known(digest), Some(size)) = (&child.digest, child.size) {
                self.0
                    .insert((Arc::clone(&upstream), repository.clone(), *digest), size);
            }
        }
    }

    pub(super) fn of(&self, site: &Site, repository: &Repository, digest: Digest) -> Option<u64> {
        self.0.get(&(site.name().into(), repository.clone(), digest))
    }
}
