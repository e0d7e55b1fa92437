//! Minimum age of manifests requested by digest (`min_age_by_digest`).
//!
//! A digest is as old as under the oldest tag of its repository that was seen to name it, or as its first request. A
//! client that pulls a tag continues by digest. So a digest also passes if it is old enough where it was served from: a
//! tag, by the rule of that tag, or an index that lists it.

use std::sync::Arc;
use std::time::SystemTime;

use quick_cache::sync::Cache;

use super::cooling::proven_last_modified;
use super::evidence::CacheView;
use super::manifest_fetch::UpstreamRequest;
use super::pipeline::ReadContext;
use super::prefetch::ContentKey;
use super::{ProxyResponse, ProxyService, UpstreamRegistry};
use crate::oci::manifest::{DescriptorKind, ManifestKind};
use crate::oci::{AnyDigest, Digest, Endpoint, Reference, Repository};
use crate::policy::AgeFacts;
use crate::policy::min_age::{AgeEvidence, AgeLimit, Maturity};
use crate::store::tags::sightings::{Seen, SightingKey};
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Digests of which the tag or index is remembered, over all repositories: some 5 MiB.
const SERVED_FROM_MAX: usize = 16_384;

/// Images of one index that are remembered. The largest multi-platform indexes list some thirty, with attestations.
const CHILDREN_MAX: usize = 128;

/// Most indexes around an image, each in the next.
const NESTING_MAX: usize = 3;

/// The tag or index from which each digest was last served. In memory only, because each pull by tag begins with it.
pub(super) struct ServedFrom(Cache<ContentKey, Reference>);

impl Default for ServedFrom {
    fn default() -> Self {
        Self(Cache::new(SERVED_FROM_MAX))
    }
}

impl ServedFrom {
    fn insert(&self, key: ContentKey, from: Reference) {
        if self.0.get(&key).as_ref() != Some(&from) {
            self.0.insert(key, from);
        }
    }
}

impl ReadContext<'_> {
    /// Remembers the tag of a served manifest, and the index of the images that it lists.
    pub(super) fn record_served_from(&self, outcome: &ProxyResponse) {
        let (registry, repository) = (&self.request.registry, self.repository);
        let (digest, manifest) = match outcome {
            ProxyResponse::Manifest(manifest, _) => (manifest.digest, Some(manifest)),
            ProxyResponse::ManifestHead { digest, .. } => (*digest, None),
            _ => return,
        };
        let upstream: Arc<str> = registry.shared_name();
        let key = |digest| (Arc::clone(&upstream), repository.clone(), digest);
        // Any client can pull a referrers tag at once, so it says nothing about the age of what it lists.
        if let Some(tag) = self.request.tag().filter(|tag| !tag.is_referrers_tag()) {
            self.proxy.served_from.insert(key(digest), tag.clone().into());
        }
        let Some(index) = manifest.filter(|manifest| manifest.manifest.kind == ManifestKind::Index) else {
            return;
        };
        let listed = index.manifest.descriptors.iter();
        for child in listed
            .filter(|child| child.kind == DescriptorKind::Manifest)
            .take(CHILDREN_MAX)
        {
            if let AnyDigest::Supported(child) = child.digest {
                self.proxy.served_from.insert(key(child), digest.into());
            }
        }
    }

    /// The age of a manifest that is requested by digest, if a minimum age applies.
    pub(super) async fn digest_facts(&self, digest: &AnyDigest) -> Option<AgeFacts> {
        let limit = self.rule.age_limit;
        if !limit.is_on_by_digest() {
            return None;
        }
        let maturity = match digest {
            AnyDigest::Supported(digest) => {
                let judging = self.proxy.judge_digest(
                    &self.request.registry,
                    self.repository,
                    (*digest, None),
                    &limit,
                    self.request.now,
                );
                // Boxed, so that the future of all other requests stays small.
                Box::pin(judging).await
            }
            // It is never stored, so nothing shows its age.
            AnyDigest::Unsupported(_) => limit.judge_unnamed(),
        };
        Some(AgeFacts::of_digest(maturity))
    }
}

impl ProxyService {
    /// Maturity of the requested digest after a success of the registry. The first one is recorded. `is_blocked`: whether
    /// the operator blocked the digest, so that its storage is not requested.
    pub(super) async fn judge_confirmed_digest(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        limit: &AgeLimit,
        (response, now): (Option<&UpstreamResponse>, SystemTime),
        is_blocked: bool,
    ) -> Maturity {
        let Endpoint::Manifest {
            reference: Reference::Digest(AnyDigest::Supported(digest)),
            ..
        } = upstream_request.endpoint
        else {
            return limit.judge_unnamed();
        };
        let (registry, repository) = (&upstream_request.registry, &upstream_request.repository);
        let seen = response.and_then(|response| self.seen_digest(upstream_request, digest, response));
        if let Some(seen) = &seen {
            self.write_sighting(upstream_request, &digest.into(), seen.clone())
                .await;
        }
        // The sighting may be later than the response.
        let now = self.clock.now().max(now);
        let what = (digest, response);
        let judged = self.judge_digest(registry, repository, what, limit, now).await;
        match (judged, seen) {
            (Maturity::Young(youth), Some(seen)) if youth.may_be_older && !is_blocked => {
                let reference = digest.into();
                // Nothing else could be served, so it is waited for.
                self.record_storage_age(upstream_request, &reference, seen, limit.trust_created, None)
                    .await;
                self.judge_digest(registry, repository, what, limit, now).await
            }
            (judged, _) => judged,
        }
    }

    /// [`Self::proven_sight`] of a response to a request by digest, of which the `Date` is learned too.
    fn seen_digest(
        &self,
        upstream_request: &UpstreamRequest,
        digest: Digest,
        response: &UpstreamResponse,
    ) -> Option<Seen> {
        if response.kind == ResponseKind::Digest(digest)
            && let Some(date) = response.date
        {
            upstream_request.registry.checked_time().learn(date);
        }
        self.proven_sight(upstream_request, digest, response)
    }

    /// Maturity of a digest by the recorded evidence, by `Last-Modified` of the response, and by where it was served from.
    async fn judge_digest(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        (digest, response): (Digest, Option<&UpstreamResponse>),
        limit: &AgeLimit,
        now: SystemTime,
    ) -> Maturity {
        let (limit, now) = (*limit, registry.checked_time().bound(now));
        let last_modified = response.and_then(|response| proven_last_modified(response, now));
        self.read_cache(registry, repository, move |cached| {
            let evidence = cached.digest_evidence(&digest);
            let evidence = AgeEvidence {
                last_modified: evidence.last_modified.or(last_modified),
                ..evidence
            };
            match limit.judge(digest, &evidence, now) {
                Maturity::Young(_) if cached.is_mature_where_served(&digest, &limit, now, NESTING_MAX) => {
                    Maturity::Mature
                }
                judged => judged.by_digest(),
            }
        })
        .await
    }
}

impl CacheView<'_> {
    fn digest_evidence(&self, digest: &Digest) -> AgeEvidence {
        let key = self.sighting_key((*digest).into());
        self.evidence(&self.view.sightings(&key), digest)
    }

    fn sighting_key(&self, reference: Reference) -> SightingKey {
        SightingKey {
            upstream: self.registry.shared_name(),
            repository: self.repository.clone(),
            reference,
        }
    }

    /// Whether the tag or index from which the digest was served is old enough now. `nesting_max`: most indexes between
    /// it and a tag.
    fn is_mature_where_served(
        &self,
        digest: &Digest,
        limit: &AgeLimit,
        now: SystemTime,
        nesting_max: usize,
    ) -> bool {
        let key: ContentKey = (self.registry.shared_name(), self.repository.clone(), *digest);
        match self.proxy.served_from.0.get(&key) {
            Some(Reference::Tag(tag)) => {
                let limit = self.registry.rule(self.repository, Some(&tag)).age_limit;
                let sightings = self.view.sightings(&self.sighting_key(tag.into()));
                limit
                    .judge(*digest, &self.evidence(&sightings, digest), now)
                    .is_mature()
            }
            Some(Reference::Digest(AnyDigest::Supported(index))) => {
                let is_old = || limit.judge(index, &self.digest_evidence(&index), now).is_mature();
                let is_old_where_served =
                    || nesting_max > 0 && self.is_mature_where_served(&index, limit, now, nesting_max - 1);
                !self.is_blocked(&index) && (is_old() || is_old_where_served())
            }
            Some(Reference::Digest(AnyDigest::Unsupported(_))) | None => false,
        }
    }
}
