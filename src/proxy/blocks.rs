//! Blocked digests on the request path.
//!
//! The decision denies a blocked digest before it is served or fetched. [`ProxyService::refuse_blocked`] checks each
//! response once more by the digest that it would give out: a tag's digest may be known only after its fetch, and a block
//! may be given while a request waits for the upstream.

use super::{Denied, ProxyResponse, ProxyService, Request, UpstreamRegistry, denied};
use crate::oci::{Digest, Repository};
use crate::policy::DenyReason;

impl ProxyService {
    /// Whether the operator blocked this digest in this repository. Reads memory only.
    pub(super) fn is_blocked(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        digest: &Digest,
    ) -> bool {
        self.store.block_of(registry.name(), repository, digest).is_some()
    }

    /// The digest, if it is blocked: input of the decision.
    pub(super) fn blocked(
        &self,
        registry: &UpstreamRegistry,
        repository: &Repository,
        digest: Digest,
    ) -> Option<Digest> {
        self.is_blocked(registry, repository, &digest).then_some(digest)
    }

    /// Replaces a response that would give out a blocked digest, and adds to the denial who blocked it. Only authorized
    /// clients get such a response or denial.
    pub(super) fn refuse_blocked(&self, request: &Request, outcome: ProxyResponse) -> ProxyResponse {
        let Some(repository) = request.endpoint.repository() else {
            return outcome;
        };
        let registry = &request.registry;
        let outcome = match digest_of(&outcome) {
            Some(digest) if self.is_blocked(registry, repository, &digest) => {
                denied(DenyReason::Blocked(digest), None, false)
            }
            _ => outcome,
        };
        match outcome {
            ProxyResponse::Denied(
                refused @ Denied {
                    reason: DenyReason::Blocked(digest),
                    ..
                },
            ) => ProxyResponse::Denied(Denied {
                block: self.store.block_of(registry.name(), repository, &digest),
                ..refused
            }),
            outcome => outcome,
        }
    }
}

/// The digest of the content in a response.
fn digest_of(outcome: &ProxyResponse) -> Option<Digest> {
    match outcome {
        ProxyResponse::Manifest(manifest, _) => Some(manifest.digest),
        ProxyResponse::ManifestHead { digest, .. } | ProxyResponse::Blob { digest, .. } => Some(*digest),
        ProxyResponse::Passthrough(passed) => passed.digest.as_ref()?.parse().ok(),
        ProxyResponse::Ping
        | ProxyResponse::Challenged(_)
        | ProxyResponse::Listing(..)
        | ProxyResponse::StreamedList(..)
        | ProxyResponse::Denied(_) => None,
    }
}
