//! Minimum age: collects the known ages of a tag's digests, and the older images that may be served instead.
//!
//! Ages are judged at the time of the request, but not later than the registry's clock allows ([`CheckedTime`]). A clock
//! of this host that was set ahead would otherwise make every digest old enough.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use quick_cache::sync::Cache;
use tokio::time::Instant;

use super::evidence::{CacheView, Candidates, Evidence, TagClient, TagFacts};
use super::log_store_error;
use super::manifest_fetch::UpstreamRequest;
use super::pipeline::ReadContext;
use super::prefetch::ContentKey;
use super::revalidate::Revalidated;
use super::{ProxyService, UpstreamRegistry};
use crate::age;
use crate::oci::{Digest, MediaType, Reference, Repository, Tag};
use crate::policy::min_age::{AgeEvidence, AgeLimit, Maturity, YoungDigest, evident_time};
use crate::policy::rules::EffectivePolicy;
use crate::policy::{AgeFacts, Completeness, OlderDigest, Presence, Revalidation};
use crate::store::manifests::StoredManifest;
use crate::store::tags::TagKey;
use crate::store::tags::sightings::{Seen, SightTime, SightingKey, Sightings};
use crate::upstream::{ResponseKind, UpstreamResponse};

/// Check of this host's clock by the `Date` of one registry's responses, and the time that has passed since. Each
/// registry has its own, so that a `Date` in the future concerns the images of its sender alone.
#[derive(Default)]
pub(super) struct CheckedTime(Mutex<DatesSeen>);

#[derive(Clone, Copy, Default)]
struct DatesSeen {
    latest: Option<DateSeen>,
    /// Of the last response.
    last: Option<DateSeen>,
}

/// A `Date`, and when it arrived.
#[derive(Clone, Copy)]
struct DateSeen {
    date: SystemTime,
    at: Instant,
}

impl DateSeen {
    /// The registry's time now; `None` if it cannot be represented.
    fn now(self) -> Option<SystemTime> {
        self.date.checked_add(self.at.elapsed())
    }
}

impl CheckedTime {
    /// Learns from the `Date` of a response that has just arrived.
    pub(super) fn learn(&self, date: SystemTime) {
        let at = Instant::now();
        let seen = Some(DateSeen { date, at });
        let mut dates = self.0.lock();
        dates.last = seen;
        let latest = dates.latest.and_then(DateSeen::now);
        if latest.is_none_or(|latest| date > latest) {
            dates.latest = seen;
        }
    }

    /// `now` to judge ages at, or the registry's time if `now` is more than [`age::AHEAD_MAX`] later. The latest `Date`
    /// applies, so that one server of the registry whose clock is behind makes no digest younger.
    pub(super) fn bound(&self, now: SystemTime) -> SystemTime {
        let latest = self.dates().latest;
        let Some(checked) = latest.and_then(DateSeen::now) else {
            return now;
        };
        match now.duration_since(checked) {
            Ok(ahead) if ahead > age::AHEAD_MAX => checked,
            _ => now,
        }
    }

    /// `now` to record a first sight at, or the registry's time if `now` is more than [`age::AHEAD_MAX`] earlier. If this
    /// host's clock is behind and then corrected, the digest would otherwise become older at once. The last `Date`
    /// applies, so that a wrong one has an effect for one response only.
    pub(super) fn time_of_sight(&self, now: SystemTime) -> SightTime {
        let last = self.dates().last.and_then(DateSeen::now);
        let is_later = |date: &SystemTime| {
            date.duration_since(now)
                .is_ok_and(|behind| behind > age::AHEAD_MAX)
        };
        SightTime {
            host: now,
            at: last.filter(is_later).unwrap_or(now),
        }
    }

    fn dates(&self) -> DatesSeen {
        *self.0.lock()
    }
}

/// Tags of which the last revalidation is remembered, and older digests that were deleted: some 2 MiB each.
const REMEMBERED_MAX: usize = 8_192;

/// When a revalidation last named a digest that was too young, for each tag. The older image was then the answer, so it
/// counts as confirmed. In memory only, because an unchanged tag costs no write.
pub(super) struct CooledTags(Cache<SightingKey, SystemTime>);

impl Default for CooledTags {
    fn default() -> Self {
        Self(Cache::new(REMEMBERED_MAX))
    }
}

/// Time for which a 404 for an older digest is remembered, so that each pull does not request it again.
const GONE_TTL: Duration = Duration::from_secs(300);

/// Older digests for which the registry responded 404 to a client, with the time of that response. Another client may get
/// the manifest: some registries respond 404 to a client that does not list its media type, or lacks the permission.
pub(super) struct GoneDigests(Cache<GoneKey, Instant>);

/// Manifest, `Accept` ([`Accept::key`]) and principal.
type GoneKey = (ContentKey, u64, [u8; 32]);

impl Default for GoneDigests {
    fn default() -> Self {
        Self(Cache::new(REMEMBERED_MAX))
    }
}

impl GoneDigests {
    fn key(content: (&UpstreamRegistry, &Repository, Digest), client: &TagClient) -> GoneKey {
        let (registry, repository, digest) = content;
        let content = (registry.shared_name(), repository.clone(), digest);
        (content, client.accept.key(), client.principal)
    }

    pub(super) fn insert(&self, content: (&UpstreamRegistry, &Repository, Digest), client: &TagClient) {
        self.0.insert(Self::key(content, client), Instant::now());
    }

    pub(super) fn contains(
        &self,
        content: (&UpstreamRegistry, &Repository, Digest),
        client: &TagClient,
    ) -> bool {
        let found = self.0.get(&Self::key(content, client));
        found.is_some_and(|at| at.elapsed() < GONE_TTL)
    }
}

impl ReadContext<'_> {
    /// The evidence after a revalidation, with the maturity of the digest that the upstream named. The candidates are
    /// chosen again, because the response may have recorded a sighting and a `Date`. If an older image can be served at
    /// once, `deadline` bounds the wait for the age of a digest whose age is unknown.
    pub(super) async fn with_ages(
        &self,
        upstream_request: &UpstreamRequest,
        deadline: Instant,
        evidence: Evidence,
        revalidated: &Revalidated,
    ) -> Evidence {
        let (proxy, state, limit) = (self.proxy, evidence.state, self.rule.age_limit);
        // The sighting that this response recorded is later than the request.
        let now = proxy.clock.now().max(self.request.now);
        let response = revalidated.response.as_deref();
        let Some(tag) = self.request.tag() else {
            // Otherwise the age is known already, or the caller is not authorized: then nothing is looked up.
            if !matches!(
                revalidated.revalidation,
                Revalidation::Digest { .. } | Revalidation::Blocked(_) | Revalidation::NoDigest
            ) {
                return evidence;
            }
            let is_blocked = state.blocked.is_some();
            let judged = proxy.judge_confirmed_digest(upstream_request, &limit, (response, now), is_blocked);
            let facts = AgeFacts::of_digest(judged.await);
            return Evidence {
                state: state.with_cooling(Some(facts)),
                ..evidence
            };
        };
        let (mut candidates, mut cooling) = self.tag_facts(tag, Some(self.tag_client()), now).await;
        let is_blocked = matches!(revalidated.revalidation, Revalidation::Blocked(_));
        let named = match revalidated.revalidation {
            Revalidation::Digest { digest, .. } | Revalidation::Blocked(digest) => {
                let what = (tag, digest);
                let shown = (response.map(|response| (upstream_request, response)), now);
                let registry = &self.request.registry;
                let mut judged = proxy.judge(registry, self.repository, what, &limit, shown).await;
                let was_silent = || proxy.shared.was_silent_since(upstream_request.since);
                if !judged.is_mature() && !is_blocked && proxy.shared.has_records() && !was_silent() {
                    // Boxed, because few requests come here.
                    Box::pin(proxy.learn_first_sight(upstream_request, tag, digest)).await;
                    (candidates, cooling) = self.tag_facts(tag, Some(self.tag_client()), now).await;
                    judged = proxy.judge(registry, self.repository, what, &limit, shown).await;
                }
                match (judged, response) {
                    (Maturity::Young(youth), Some(response)) if youth.may_be_older && !is_blocked => {
                        let deadline = cooling
                            .is_some_and(|cooling| has_complete_older(candidates.as_ref(), &cooling))
                            .then_some(deadline);
                        let shown = (response, now);
                        proxy
                            .judge_by_storage(upstream_request, what, &limit, shown, deadline)
                            .await
                    }
                    (judged, _) => judged,
                }
            }
            Revalidation::NoDigest => limit.judge_unnamed(),
            _ => Maturity::Mature,
        };
        let cooling = cooling.map(|cooling| AgeFacts { named, ..cooling });
        Evidence::of_tag(&state, (candidates, cooling))
    }
}

impl ProxyService {
    /// Maturity of a digest that the tag names, by the recorded evidence and by the response that named it. A response
    /// that is not proven to be the registry's is no sighting, but shows that the tag no longer names another digest.
    pub(super) async fn judge(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        (tag, digest): (&Tag, Digest),
        limit: &AgeLimit,
        (shown, now): (Option<(&UpstreamRequest, &UpstreamResponse)>, SystemTime),
    ) -> Maturity {
        let key = TagKey {
            upstream: registry.shared_name(),
            repository: repository.clone(),
            tag: tag.clone(),
        };
        let now = registry.checked_time().bound(now);
        let subject = SightingKey::from(&key);
        let seen = shown.and_then(|(upstream_request, response)| {
            Some(seen_by(upstream_request, digest, response.media_type.as_ref()?))
        });
        let evidence = self.read_cache(registry, repository, move |cached| {
            let sightings = cached.view.sightings(&SightingKey::from(&key));
            let evidence = cached.evidence(&sightings, &digest);
            if evidence.first_seen_at.is_some() {
                return evidence;
            }
            let image = format_args!("{}:{}", cached.repository, key.tag);
            let record = cached
                .proxy
                .cached(cached.registry, &image, cached.view.tag(&key));
            AgeEvidence {
                other_seen_at: sightings.other_seen_at(&digest, seen.as_ref(), record.as_deref(), now),
                ..evidence
            }
        });
        let evidence = evidence.await;
        let stated = shown.and_then(|(_, response)| proven_last_modified(response, now));
        let evidence = AgeEvidence {
            last_modified: evidence.last_modified.or(stated),
            ..evidence
        };
        let judged = limit.judge(digest, &evidence, now);
        if let (Some((upstream_request, _)), Maturity::Young(_)) = (shown, judged) {
            self.cooled_tags.0.insert(subject, upstream_request.arrived_at);
        }
        judged
    }

    /// Maturity of a digest of which the age is unknown, by the time that its storage states. That time is recorded.
    async fn judge_by_storage(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        (tag, digest): (&Tag, Digest),
        limit: &AgeLimit,
        (response, now): (&UpstreamResponse, SystemTime),
        deadline: Option<Instant>,
    ) -> Maturity {
        if let Some(seen) = self.proven_sight(upstream_request, digest, response) {
            let (reference, trust_created) = (tag.clone().into(), limit.trust_created);
            // Boxed, because few requests come here.
            let recording =
                self.record_storage_age(upstream_request, &reference, seen, trust_created, deadline);
            Box::pin(recording).await;
        }
        let (registry, repository) = (&upstream_request.registry, &upstream_request.repository);
        let shown = (Some((upstream_request, response)), now);
        self.judge(registry, repository, (tag, digest), limit, shown)
            .await
    }

    /// What a response that names this digest shows; `None` if the registry's headers do not prove it to be its own.
    pub(super) fn proven_sight(
        &self,
        upstream_request: &UpstreamRequest,
        digest: Digest,
        response: &UpstreamResponse,
    ) -> Option<Seen> {
        let media_type = response.media_type.as_ref()?;
        let now = upstream_request.registry.checked_time().bound(self.clock.now());
        (response.kind == ResponseKind::Digest(digest)).then(|| Seen {
            last_modified: proven_last_modified(response, now),
            ..seen_by(upstream_request, digest, media_type)
        })
    }

    /// Maturity of the digest that the tag was last seen to name.
    pub(super) async fn last_named(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        tag: &Tag,
        rule: &EffectivePolicy,
        now: SystemTime,
    ) -> Maturity {
        let key = SightingKey {
            upstream: registry.shared_name(),
            repository: repository.clone(),
            reference: tag.clone().into(),
        };
        let newest = self.read_cache(registry, repository, move |cached| {
            let sightings = cached.view.sightings(&key);
            sightings.newest().map(|sighting| sighting.seen.digest)
        });
        match newest.await {
            Some(digest) => {
                let what = (tag, digest);
                self.judge(registry, repository, what, &rule.age_limit, (None, now))
                    .await
            }
            None => Maturity::Mature,
        }
    }

    /// Records that the upstream named `digest` for the tag of this request. If a minimum age applies, the record is
    /// durable when this returns. Otherwise it is written in the background, because no decision depends on it.
    pub(super) async fn record_sighting(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        tag: &Tag,
        (digest, media_type): (Digest, &MediaType),
        response: Option<&UpstreamResponse>,
    ) {
        if let Some(date) = response.and_then(|response| response.date) {
            upstream_request.registry.checked_time().learn(date);
        }
        if tag.is_referrers_tag() {
            return;
        }
        let now = upstream_request.registry.checked_time().bound(self.clock.now());
        let seen = Seen {
            last_modified: response.and_then(|response| proven_last_modified(response, now)),
            ..seen_by(upstream_request, digest, media_type)
        };
        self.write_sighting(upstream_request, &tag.clone().into(), seen)
            .await;
    }

    /// Records what a response showed for this tag or digest.
    pub(super) async fn write_sighting(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        reference: &Reference,
        seen: Seen,
    ) {
        const ACTION: &str = "record when the digest was first seen";
        let UpstreamRequest {
            registry, repository, ..
        } = upstream_request;
        let key = SightingKey {
            upstream: registry.shared_name(),
            repository: repository.clone(),
            reference: reference.clone(),
        };
        let digest = seen.digest;
        let now = registry.checked_time().time_of_sight(self.clock.now());
        let store = self.store.clone();
        let recording = async move { store.record_sighting(key, seen, now).await };
        let limits = match reference {
            Reference::Tag(tag) => registry.rule(repository, Some(tag)).age_limit.is_on(),
            Reference::Digest(_) => false,
        };
        if !limits && !registry.rule(repository, None).age_limit.is_on_by_digest() {
            tokio::spawn(async move { log_store_error(recording.await, ACTION) });
            return;
        }
        let recorded = recording.await;
        match (&recorded, reference) {
            (Ok(true), Reference::Tag(tag)) => {
                tracing::info!(upstream = registry.name(), image = %format_args!("{repository}:{tag}"), %digest,
                    "first saw digest under its tag, its age counts from now");
            }
            (Ok(true), Reference::Digest(_)) => {
                tracing::info!(upstream = registry.name(), image = %format_args!("{repository}@{digest}"),
                    "first saw digest on a request by digest, its age counts from now");
            }
            _ => {}
        }
        log_store_error(recorded, ACTION);
    }

    /// The digest that a tag was last seen to name, if it is too young. Blocks.
    pub fn cooling_of(
        &self,
        registry: &UpstreamRegistry,
        key: &TagKey,
        now: SystemTime,
    ) -> Option<YoungDigest> {
        let limit = registry.rule(&key.repository, Some(&key.tag)).age_limit;
        if !limit.is_on() {
            return None;
        }
        let cached = CacheView {
            proxy: self,
            view: &self.store.blocking().view(),
            registry,
            repository: &key.repository,
        };
        let sightings = cached.view.sightings(&SightingKey::from(key));
        let digest = sightings.newest()?.seen.digest;
        let evidence = cached.evidence(&sightings, &digest);
        limit
            .judge(digest, &evidence, registry.checked_time().bound(now))
            .youth()
    }
}

/// Whether an image that is old enough can be served without the upstream.
fn has_complete_older(candidates: Option<&Candidates>, cooling: &AgeFacts) -> bool {
    let is_cached = |candidates: &Candidates| candidates.completeness == Completeness::Complete;
    let is_older_complete = |older: OlderDigest| older.presence == Presence::Complete;
    cooling.older.is_some_and(is_older_complete)
        || cooling.cached.is_mature() && candidates.is_some_and(is_cached)
}

/// What a response to this request shows, without times.
pub(super) fn seen_by(upstream_request: &UpstreamRequest, digest: Digest, media_type: &MediaType) -> Seen {
    Seen {
        digest,
        media_type: media_type.clone(),
        accept: upstream_request.accept.key(),
        accepts_indexes: upstream_request.accept.lists_indexes(),
        last_modified: None,
        created_at: None,
    }
}

/// `Last-Modified` of a response that the registry itself is proven to have sent, if it can be evidence.
pub(super) fn proven_last_modified(response: &UpstreamResponse, now: SystemTime) -> Option<SystemTime> {
    let is_proven = matches!(response.kind, ResponseKind::Digest(_));
    let stated = response.last_modified.filter(|_| is_proven)?;
    evident_time(stated, now)
}

impl Candidates {
    /// Counts the newest manifest as confirmed at this time, when the upstream named a digest that was too young. It stays
    /// not fresh, because that digest may become old enough.
    fn confirm_at(&mut self, cooled_at: Option<SystemTime>) {
        if let Some(at) = cooled_at.filter(|at| *at > self.newest.confirmed_at) {
            self.newest.confirmed_at = at;
            self.is_moved = true;
        }
    }
}

impl CacheView<'_> {
    /// The recorded evidence for the age of `digest`.
    pub(super) fn evidence(&self, sightings: &Sightings, digest: &Digest) -> AgeEvidence {
        let approved = self
            .proxy
            .store
            .approval_of(self.registry.name(), self.repository, digest);
        let sighting = sightings.get(digest);
        AgeEvidence {
            first_seen_at: sighting.map(|sighting| sighting.first_seen_at),
            other_seen_at: sighting.and_then(|sighting| sighting.other_seen_at),
            last_modified: sighting.and_then(|sighting| sighting.seen.last_modified),
            created_at: sighting.and_then(|sighting| sighting.seen.created_at),
            is_unreadable: sightings.is_unreadable(),
            is_approved: approved.is_some(),
        }
    }

    /// When a revalidation last named a digest of the tag that was too young. After a restart that is when it was first
    /// named.
    fn cooled_at(
        &self,
        key: &TagKey,
        sightings: &Sightings,
        is_mature: &dyn Fn(&Digest) -> bool,
    ) -> Option<SystemTime> {
        let remembered = self.proxy.cooled_tags.0.get(&SightingKey::from(key));
        let newest = sightings
            .newest()
            .filter(|newest| !is_mature(&newest.seen.digest));
        remembered.max(newest.map(|newest| newest.named_at_by_host))
    }

    /// Candidates that are old enough. If there are none, the newest manifest, marked as too young in [`AgeFacts`].
    pub(super) fn mature_candidates(
        &self,
        key: &TagKey,
        client: Option<&TagClient>,
        limit: &AgeLimit,
        now: SystemTime,
    ) -> TagFacts {
        let reader = TagClient::reader(client);
        let image = format_args!("{}:{}", self.repository, key.tag);
        let record = self.proxy.cached(self.registry, &image, self.view.tag(key));
        let sightings = self.view.sightings(&SightingKey::from(key));
        let judge = |digest: &Digest| limit.judge(*digest, &self.evidence(&sightings, digest), now);
        let is_mature = |digest: &Digest| judge(digest).is_mature();
        let may_stand_in = |digest: &Digest| is_mature(digest) && !self.is_blocked(digest);
        let newest_seen = |is_eligible: &dyn Fn(&Digest) -> bool| {
            self.view
                .newest_seen(&sightings, record.as_deref(), reader, is_eligible)
        };
        let is_gone = |digest: &Digest| {
            let content = (self.registry, self.repository, *digest);
            client.is_some_and(|client| self.proxy.gone_digests.contains(content, client))
                && self.presence_of(digest) != Presence::Complete
        };
        let older =
            newest_seen(&|digest| may_stand_in(digest) && !is_gone(digest)).map(|named| OlderDigest {
                digest: named.digest,
                presence: self.presence_of(&named.digest),
            });
        let facts = |cached, previous| AgeFacts {
            cached,
            previous,
            named: Maturity::Mature,
            older,
        };
        let mut by_record = self.candidates_for_tag(key, reader);
        let cooled_at = self.cooled_at(key, &sightings, &is_mature);
        let recorded = by_record
            .as_ref()
            .map(|candidates| candidates.newest.manifest.digest);
        let is_recorded = |digest: &Digest| recorded.as_ref() == Some(digest) && is_mature(digest);
        let is_whole = |manifest: Arc<StoredManifest>| self.is_complete(&manifest);
        let is_served = |digest: &Digest| {
            is_recorded(digest)
                || may_stand_in(digest)
                    && self.is_member(digest)
                    && self.manifest(digest).is_some_and(is_whole)
        };
        let stand_in = newest_seen(&is_served).filter(|named| Some(named.digest) != recorded);
        if let Some(named) = stand_in
            && let Some(newest) = self.candidate(&named)
        {
            let mut candidates = Candidates {
                newest,
                is_moved: named.is_moved,
                completeness: Completeness::Complete,
                earlier: None,
                is_invalidated: by_record.is_some_and(|candidates| candidates.is_invalidated),
                is_blocked: false,
            };
            candidates.confirm_at(cooled_at);
            return (Some(candidates), Some(facts(Maturity::Mature, Maturity::Mature)));
        }
        if let (Some(candidates), true) = (&mut by_record, recorded.as_ref().is_some_and(is_mature)) {
            candidates.confirm_at(cooled_at);
        }
        let maturity = |digest: Option<Digest>| digest.map_or(Maturity::Mature, |digest| judge(&digest));
        let previous = by_record
            .as_ref()
            .and_then(|candidates| candidates.earlier.as_ref())
            .map(|copy| copy.manifest.digest);
        let facts = facts(maturity(recorded), maturity(previous));
        (by_record, Some(facts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn t17_clock_set_ahead_is_bounded_by_date() {
        let time = CheckedTime::default();
        assert_eq!(time.bound(at(900_000)), at(900_000), "nothing is known");
        time.learn(at(0));
        assert_eq!(time.bound(at(900_000)), at(0));
        assert_eq!(time.bound(at(3_600)), at(3_600), "tolerated");
        tokio::time::advance(Duration::from_secs(50_000)).await;
        assert_eq!(time.bound(at(900_000)), at(50_000));
        time.learn(at(10));
        assert_eq!(time.bound(at(900_000)), at(50_000), "a server that is behind");
        time.learn(at(100_000));
        assert_eq!(time.bound(at(900_000)), at(100_000));
        assert_eq!(
            time.bound(at(7)),
            at(7),
            "a clock that is behind makes nothing older"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn t17_clock_behind_is_not_recorded_as_a_first_sight() {
        let time = CheckedTime::default();
        assert_eq!(time.time_of_sight(at(0)), at(0).into(), "nothing is known");
        time.learn(at(900_000));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(time.time_of_sight(at(0)).at, at(900_005));
        assert_eq!(time.time_of_sight(at(0)).host, at(0));
        assert_eq!(time.time_of_sight(at(899_000)), at(899_000).into(), "tolerated");
        assert_eq!(time.time_of_sight(at(950_000)), at(950_000).into());
        time.learn(at(7));
        assert_eq!(
            time.time_of_sight(at(10)),
            at(10).into(),
            "the wrong Date was for one response"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn date_at_the_end_of_time_does_not_panic() {
        let mut end = SystemTime::UNIX_EPOCH;
        for power in (0..64).rev() {
            end = end.checked_add(Duration::from_secs(1 << power)).unwrap_or(end);
        }
        let time = CheckedTime::default();
        time.learn(end);
        tokio::time::advance(Duration::from_secs(50_000)).await;
        time.learn(end);
        assert_eq!(time.bound(at(0)), at(0));
    }
}
