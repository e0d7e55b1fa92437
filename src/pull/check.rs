//! Whether the upstream has the rest of an image whose manifest is held.
//!
//! Asked only where another image could be served instead: a tag that moved to an image which cannot be completed is
//! answered with the last complete one. What is missing is asked for by HEAD, with the client's own credential, so a
//! yes is also the proof that the blob is in this repository.
//!
//! Of an index those images are looked at that were pulled of the earlier one: which platforms are in use here is best
//! known from what was pulled here.

use std::sync::Arc;
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::task::JoinSet;

use super::fetching::Wanted;
use super::{Pull, Request, Site};
use crate::oci::{AnyDigest, Cause, Digest, Operation, Reference, Repository};
use crate::store::manifests::HeldManifest;
use crate::upstream::Caller;

/// Questions at a time about one image.
const QUESTIONS_MAX: usize = 8;

/// Blobs asked about. An image with more is taken to be as good as these.
const BLOBS_MAX: usize = 256;

/// Platforms of one index looked at.
const PLATFORMS_MAX: usize = 4;

/// How long a yes is good: those who only compare tags must not cost a question per layer each time.
const GOOD_FOR: Duration = Duration::from_secs(60);

/// Images remembered as found at the upstream.
const FOUND_MAX: usize = 4096;

type Image = (Arc<str>, Repository, Digest);

/// The images whose rest the upstream was lately seen to have.
pub(super) struct Found(Cache<Image, std::time::SystemTime>);

impl Default for Found {
    fn default() -> Self {
        Self(Cache::new(FOUND_MAX))
    }
}

impl Pull {
    /// `Ok` if nothing that `manifest` points to is known to be missing upstream; else how the upstream failed.
    /// `instead` is the image that would be served instead.
    pub(super) async fn check(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        caller: &Caller,
        manifest: &Arc<HeldManifest>,
        instead: &HeldManifest,
    ) -> Result<(), Cause> {
        let site = &request.site;
        let image: Image = (site.name().into(), repository.clone(), manifest.digest);
        let now = self.clock.now();
        let is_good = |at| now.duration_since(at).is_ok_and(|age| age < GOOD_FOR);
        if self.is_whole(site, repository, manifest) || self.found.0.get(&image).is_some_and(is_good) {
            return Ok(());
        }
        let wanted = Wanted::of(request, repository, caller);
        self.check_blobs(&wanted, manifest).await?;
        for digest in self.platforms_in_use(site, repository, manifest, instead) {
            let child = self.child(&wanted, digest).await?;
            self.check_blobs(&wanted, &child).await?;
        }
        self.found.0.insert(image, now);
        Ok(())
    }

    /// The images of `index` for the platforms of which `instead` has been pulled.
    fn platforms_in_use(
        &self,
        site: &Site,
        repository: &Repository,
        index: &HeldManifest,
        instead: &HeldManifest,
    ) -> Vec<Digest> {
        let in_use: Vec<_> = self
            .store
            .whole_children(site.name(), repository, instead)
            .filter_map(|child| child.platform.as_ref())
            .collect();
        let children = index.manifest.children.iter();
        children
            .filter(|child| child.platform.as_ref().is_some_and(|own| in_use.contains(&own)))
            .filter_map(|child| match child.digest {
                AnyDigest::Known(digest) => Some(digest),
                AnyDigest::Foreign(_) => None,
            })
            .take(PLATFORMS_MAX)
            .collect()
    }

    async fn child(self: &Arc<Self>, of: &Wanted, digest: Digest) -> Result<Arc<HeldManifest>, Cause> {
        let held = self.store.has_seen(of.site.name(), &of.repository, &digest);
        if held && let Ok(Some(manifest)) = self.store.manifest(&digest) {
            return Ok(manifest);
        }
        let operation = Operation::Manifest {
            repository: of.repository.clone(),
            reference: Reference::Digest(AnyDigest::Known(digest)),
        };
        let wanted = Wanted {
            operation,
            ..of.clone()
        };
        self.fetch_manifest(wanted).await.map_err(|answer| answer.cause())
    }

    async fn check_blobs(self: &Arc<Self>, of: &Wanted, manifest: &HeldManifest) -> Result<(), Cause> {
        let arriving = |digest: &Digest| self.is_arriving(&of.site, &of.repository, digest);
        let missing: Vec<Digest> = self
            .store
            .missing_blobs(of.site.name(), &of.repository, manifest, &arriving)
            .filter_map(|child| match child.digest {
                AnyDigest::Known(digest) => Some(digest),
                AnyDigest::Foreign(_) => None,
            })
            .take(BLOBS_MAX)
            .collect();
        let mut questions = JoinSet::new();
        for digest in missing {
            if questions.len() >= QUESTIONS_MAX
                && let Some(question) = questions.join_next().await
            {
                question.unwrap_or(Err(Cause::Busy))?;
            }
            questions.spawn(Arc::clone(self).has_blob(of.clone(), digest));
        }
        while let Some(question) = questions.join_next().await {
            question.unwrap_or(Err(Cause::Busy))?;
        }
        Ok(())
    }

    async fn has_blob(self: Arc<Self>, of: Wanted, digest: Digest) -> Result<(), Cause> {
        let operation = Operation::Blob {
            repository: of.repository.clone(),
            digest: AnyDigest::Known(digest),
        };
        let wanted = Wanted { operation, ..of };
        let Some(answer) = self.question(&wanted).landed().await else {
            return Err(Cause::Busy);
        };
        // A no to a blob of an image whose manifest it gave just now: that image is broken there.
        if answer.said.is_yes() {
            Ok(())
        } else {
            tracing::info!(upstream = wanted.site.name(), repository = %wanted.repository, blob = %digest, cause = %answer.cause(),
                "the upstream names a newer image but cannot give this part of it; the last complete one is served");
            Err(answer.cause())
        }
    }
}
