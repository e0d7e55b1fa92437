//! The store as the durable memory of which URL has served which repository.

use std::sync::Arc;

use crate::oci::Repository;
use crate::store::Store;
use crate::upstream::ServedStore;

/// Kept beside the proofs of what a repository has, so that both are lost together or not at all.
pub(super) struct Proofs(pub(super) Arc<Store>);

impl ServedStore for Proofs {
    fn has_served(&self, upstream: &str, url: &str, repository: &Repository) -> bool {
        self.0.has_served(upstream, url, repository)
    }

    fn record_served(&self, upstream: &str, url: &str, repository: &Repository) {
        if let Err(fault) = self.0.record_served(upstream, url, repository) {
            tracing::warn!(upstream, url, %repository, %fault, "the note that a URL served a repository is lost");
        }
    }
}
