//! Manual revalidation of a tag, requested by the operator, regardless of freshness.

use std::sync::Arc;

use super::evidence::Candidates;
use super::layer_probe::ClaimWait;
use super::manifest_fetch::UpstreamRequest;
use super::revalidate::Revalidated;
use super::{ProxyService, Request};
use crate::oci::{Digest, Endpoint, UpstreamFailure};
use crate::policy::Revalidation;
use crate::policy::min_age::{Maturity, YoungDigest};
use crate::store::manifests::StoredManifest;

/// Result of a refresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// The tag still points to the cached manifest.
    Unchanged(Digest),
    /// The tag moved, and the new manifest is cached; its layers are prefetched if the policy says `prefetch`.
    Newer(Digest),
    /// The tag names a digest that is younger than `min_age`. It is not fetched.
    TooYoung(YoungDigest),
    /// The tag names a digest that the operator blocked. It is not fetched.
    Blocked(Digest),
    /// The tag does not exist upstream. It stays cached until a client's request confirms that.
    NotFound,
    /// The upstream denied the credential.
    Denied,
    /// The upstream was unavailable.
    Unavailable(UpstreamFailure),
    /// The tag moved, and the new manifest could not be fetched.
    FetchFailed(UpstreamFailure),
}

impl ProxyService {
    /// Revalidates the tag of `request` and fetches its manifest if it moved. A digest cannot change, so a request by
    /// digest returns [`Refreshed::Unavailable`] with `UpstreamFailure::Malformed`.
    pub async fn refresh(self: &Arc<Self>, request: &Request) -> Refreshed {
        let (Some(tag), Endpoint::Manifest { repository, .. }) = (request.tag(), &request.endpoint) else {
            return Refreshed::Unavailable(UpstreamFailure::Malformed);
        };
        let accept = Some(&request.accept);
        let candidates = self
            .candidates_for_tag(&request.registry, repository, tag, accept)
            .await;
        let entry = candidates.as_ref().map(Candidates::entry);
        let upstream_request = UpstreamRequest::of(request, repository, &self.caller(request));
        let Some(response) = self.coalesced_head(&upstream_request).wait().await else {
            return Refreshed::Unavailable(UpstreamFailure::Abandoned);
        };
        // The result goes to the operator, who is authorized for all cached content.
        let revalidation = self.classify_for(&upstream_request, &response, None).await;
        let revalidated = Revalidated {
            revalidation,
            response: Some(response),
        };
        if let Revalidation::Digest { digest, .. } = revalidated.revalidation {
            let limit = request.registry.rule(repository, Some(tag)).age_limit;
            let response = revalidated.response.as_deref();
            let shown = response.map(|response| (&upstream_request, response));
            let now = self.clock.now().max(request.now);
            let maturity = self.judge(&request.registry, repository, (tag, digest), &limit, (shown, now));
            if let Maturity::Young(youth) = maturity.await {
                return Refreshed::TooYoung(youth);
            }
        }
        match (revalidated.revalidation, entry) {
            (Revalidation::Digest { digest, .. }, Some(entry)) if digest == entry.digest => {
                Refreshed::Unchanged(digest)
            }
            (Revalidation::Digest { .. } | Revalidation::NoDigest, _) => {
                let refreshed = self.refetch(&upstream_request, &revalidated).await;
                // If the registry states no digest, only the fetched bytes show that it is blocked.
                if let Ok(manifest) = &refreshed
                    && self.is_blocked(&request.registry, repository, &manifest.digest)
                {
                    return Refreshed::Blocked(manifest.digest);
                }
                let whole = candidates.as_ref().and_then(Candidates::complete);
                if let (Ok(manifest), true) =
                    (&refreshed, request.registry.rule(repository, Some(tag)).prefetch)
                {
                    self.prefetch_platforms(
                        upstream_request,
                        Arc::clone(manifest),
                        whole.map(|copy| Arc::clone(&copy.manifest)),
                    );
                }
                match refreshed {
                    Ok(manifest) => Refreshed::Newer(manifest.digest),
                    Err(cause) => Refreshed::FetchFailed(cause),
                }
            }
            (Revalidation::Blocked(digest), _) => Refreshed::Blocked(digest),
            (Revalidation::NotFound, _) => Refreshed::NotFound,
            (Revalidation::Denied(_), _) => Refreshed::Denied,
            (Revalidation::Unavailable(cause) | Revalidation::FetchFailed(cause), _) => {
                Refreshed::Unavailable(cause)
            }
            (Revalidation::NotDone, _) => Refreshed::Unavailable(UpstreamFailure::Malformed),
        }
    }

    async fn refetch(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        revalidated: &Revalidated,
    ) -> Result<Arc<StoredManifest>, UpstreamFailure> {
        let brought = match &revalidated.response {
            Some(response) => self.take_inline_body(upstream_request, response).await,
            None => None,
        };
        match brought {
            Some(manifest) => Ok(manifest),
            None => self
                .fetch_manifest(upstream_request.clone().naming(revalidated.revalidation))
                .await
                .map_err(|response| response.cause()),
        }
    }

    /// Prefetches the missing blobs of a newer image. Of an index, it prefetches the platforms that clients pulled of
    /// the previous image.
    fn prefetch_platforms(
        self: &Arc<Self>,
        upstream_request: UpstreamRequest,
        manifest: Arc<StoredManifest>,
        fallback: Option<Arc<StoredManifest>>,
    ) {
        self.attestations.record(
            &upstream_request.registry,
            &upstream_request.repository,
            &manifest,
        );
        let proxy = Arc::clone(self);
        tokio::spawn(async move {
            proxy.prefetch(upstream_request.clone(), &manifest).await;
            let Some(fallback) = fallback else { return };
            let (registry, repository) = (&upstream_request.registry, &upstream_request.repository);
            for digest in proxy
                .platforms_in_use(registry, repository, &manifest, &fallback)
                .await
            {
                match proxy
                    .child_manifest(&upstream_request, digest, ClaimWait::Full)
                    .await
                {
                    Ok(child) => drop(proxy.prefetch(upstream_request.clone(), &child).await),
                    Err(cause) => {
                        tracing::debug!(%digest, %cause, "failed to prefetch platform");
                    }
                }
            }
        });
    }
}
