//! A tag asked about at the operator's wish, whatever the rule says about freshness.

use std::sync::Arc;

use super::candidates::Candidates;
use super::manifest_fetch::UpstreamRequest;
use super::revalidate::Revalidated;
use super::{ProxyService, Request};
use crate::oci::{Digest, Endpoint, UpstreamFailure};
use crate::policy::{Authorization, Revalidation};
use crate::store::manifests::StoredManifest;

/// What came of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// The tag still names what is held.
    Unchanged(Digest),
    /// It names something else, which is held now; its layers are on their way if the rule says `prefetch`.
    Newer(Digest),
    /// There is no such tag upstream. It is kept here until a client is told so.
    NotFound,
    /// The upstream refuses the credential used.
    Denied,
    /// The upstream gave no usable answer.
    Unavailable(UpstreamFailure),
    /// There is something newer, and it could not be had.
    FetchFailed(UpstreamFailure),
}

impl ProxyService {
    /// Asks the upstream what the tag of `request` names now, and fetches it if that is not held. What is asked about by
    /// digest cannot change: that is answered with [`Refreshed::Silent`] and [`UpstreamFailure::Malformed`].
    pub async fn refresh(self: &Arc<Self>, request: &Request) -> Refreshed {
        let (Some(tag), Endpoint::Manifest { repository, .. }) = (request.tag(), &request.endpoint) else {
            return Refreshed::Unavailable(UpstreamFailure::Malformed);
        };
        let context = self.context(request, repository).await;
        let accept = Some(&request.accept);
        let copies = self.copies_of_tag(&request.site, repository, tag, accept).await;
        let held = copies.as_ref().map(Candidates::held);
        let wanted = UpstreamRequest::of(request, repository, &context.caller);
        let Some(answer) = self.question(&wanted).wait().await else {
            return Refreshed::Unavailable(UpstreamFailure::Busy);
        };
        // Whoever could be told something is the operator, who is entitled to all that is held.
        let revalidation = self.heard_by(&wanted, &answer, Authorization::Granted).await;
        let asked = Revalidated {
            revalidation,
            answer: Some(answer),
        };
        match (asked.revalidation, held) {
            (Revalidation::Digest { digest, .. }, Some(held)) if digest == held.digest => {
                Refreshed::Unchanged(digest)
            }
            (Revalidation::Digest { .. } | Revalidation::NoDigest, _) => {
                let refreshed = self.refetch(&wanted, &asked).await;
                let whole = copies.as_ref().and_then(Candidates::whole);
                if let (Ok(manifest), true) = (&refreshed, request.site.rule(repository, Some(tag)).prefetch)
                {
                    self.prefetch_in_use(
                        wanted,
                        Arc::clone(manifest),
                        whole.map(|copy| Arc::clone(&copy.manifest)),
                    );
                }
                match refreshed {
                    Ok(manifest) => Refreshed::Newer(manifest.digest),
                    Err(cause) => Refreshed::FetchFailed(cause),
                }
            }
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
        wanted: &UpstreamRequest,
        asked: &Revalidated,
    ) -> Result<Arc<StoredManifest>, UpstreamFailure> {
        let brought = match &asked.answer {
            Some(answer) => self.brought(wanted, answer).await,
            None => None,
        };
        match brought {
            Some(manifest) => Ok(manifest),
            None => self
                .fetch_manifest(wanted.clone().naming(asked.revalidation))
                .await
                .map_err(|answer| answer.cause()),
        }
    }

    /// Begins what is missing of a newer image: of an index, of the platforms that were pulled of the earlier one.
    fn prefetch_in_use(
        self: &Arc<Self>,
        wanted: UpstreamRequest,
        manifest: Arc<StoredManifest>,
        instead: Option<Arc<StoredManifest>>,
    ) {
        self.attestations
            .learn(&wanted.site, &wanted.repository, &manifest);
        let pull = Arc::clone(self);
        tokio::spawn(async move {
            pull.prefetch(wanted.clone(), &manifest).await;
            let Some(instead) = instead else { return };
            let (site, repository) = (&wanted.site, &wanted.repository);
            for digest in pull.platforms_in_use(site, repository, &manifest, &instead).await {
                match pull.child(&wanted, digest).await {
                    Ok(child) => drop(pull.prefetch(wanted.clone(), &child).await),
                    Err(cause) => {
                        tracing::debug!(%digest, %cause, "a platform in use could not be prefetched");
                    }
                }
            }
        });
    }
}
