//! Stated sizes of blobs: a hint from the manifests that list them.
//!
//! The digest vouches for the bytes of a blob, and nothing vouches for the `size` of a descriptor (OCI image spec,
//! "Descriptors"). So no response's length, no quota and no end of a transfer follows from it. It says where an
//! unannounced end is too early to be believed without a look at the digest, and whether a length is worth waiting for.

use std::sync::Arc;

use quick_cache::sync::Cache;

use super::UpstreamRegistry;
use crate::oci::{AnyDigest, Digest, Manifest, Repository};

/// Blobs whose size is remembered.
const SIZES_MAX: usize = 16_384;

pub(super) struct SizeHints(Cache<(Arc<str>, Repository, Digest), u64>);

impl Default for SizeHints {
    fn default() -> Self {
        Self(Cache::new(SIZES_MAX))
    }
}

impl SizeHints {
    pub(super) fn learn(&self, site: &UpstreamRegistry, repository: &Repository, manifest: &Manifest) {
        let upstream: Arc<str> = site.name().into();
        for child in &manifest.descriptors {
            if let (AnyDigest::Supported(digest), Some(size)) = (&child.digest, child.size) {
                self.0
                    .insert((Arc::clone(&upstream), repository.clone(), *digest), size);
            }
        }
    }

    pub(super) fn of(&self, site: &UpstreamRegistry, repository: &Repository, digest: Digest) -> Option<u64> {
        self.0.get(&(site.name().into(), repository.clone(), digest))
    }
}
