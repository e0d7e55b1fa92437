//! Tags by the records of other caches: brought in an outage, and confirmed before the upstream is asked.
//!
//! A confirmation is stored as that of an earlier response of the upstream, so the decision about it is the usual one. It
//! never replaces a later confirmation of this cache, and a client causes it only with a current grant.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::{Instant, timeout, timeout_at};

use super::{BRING_TIMEOUT, INDEX_DEPTH_MAX};
use crate::age;
use crate::oci::{Accept, AnyDigest, Digest, Reference, Tag};
use crate::policy::{Authorization, CachedEntry, DenyReason, Policy};
use crate::proxy::evidence::{Evidence, TagClient};
use crate::proxy::invalidation::WriteSnapshot;
use crate::proxy::manifest_fetch::UpstreamRequest;
use crate::proxy::pipeline::ReadContext;
use crate::proxy::{Denied, ProxyResponse, ProxyService, UpstreamRegistry, log_store_error};
use crate::shared::{Dated, RecordRead, RecordReader, TagState};
use crate::single_flight::{SharedCall, SingleFlight};
use crate::store::invalidations::InvalidationKey;
use crate::store::tags::sightings::{Seen, SightTime, SightingKey};
use crate::store::tags::{TagKey, TagReader, TagRecord, Variant};

/// Precision of an age by the storage's clock: two bounds, of two seconds each.
const PRECISION: Duration = Duration::from_secs(4);

/// Interval of reads of the record of a tag that is not cached.
const ABSENT_INTERVAL: Duration = Duration::from_secs(10);

/// Interval of reads of the record of a tag whose digest is too young by the evidence of this cache.
const AGE_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// Uses of tag records that run, one for all clients with the same tag and `Accept`. The result says whether the
/// evidence may have changed.
#[derive(Default)]
pub(in crate::proxy) struct TagRecordUses {
    running: SingleFlight<UseKey, bool>,
    /// When each began.
    began: Arc<Mutex<HashMap<UseKey, Instant>>>,
}

type UseKey = (TagKey, u64);

impl TagRecordUses {
    /// Joins the use, or begins it. Returns when it began.
    fn share<F>(&self, key: &UseKey, using: impl FnOnce() -> F) -> (SharedCall<bool>, Instant)
    where
        F: Future<Output = bool> + Send + 'static,
    {
        let call = self.running.share(key.clone(), || {
            self.began.lock().insert(key.clone(), Instant::now());
            let running = RunningUse {
                began: Arc::clone(&self.began),
                key: key.clone(),
            };
            let using = using();
            async move {
                let _running = running;
                using.await
            }
        });
        let began = self.began.lock().get(key).copied();
        (call, began.unwrap_or_else(Instant::now))
    }
}

/// Removes the beginning of a use at its end.
struct RunningUse {
    began: Arc<Mutex<HashMap<UseKey, Instant>>>,
    key: UseKey,
}

impl Drop for RunningUse {
    fn drop(&mut self) {
        self.began.lock().remove(&self.key);
    }
}

/// A use of a tag record before the upstream is asked.
struct TagRecordUse {
    registry: Arc<UpstreamRegistry>,
    key: TagKey,
    accept: Accept,
    /// Writes in the repository when the request arrived.
    writes: WriteSnapshot,
    reader: RecordReader,
    /// An older record confirms nothing.
    age_max: Duration,
    /// The record is read once in this time.
    interval: Duration,
    /// Digest of the copy, if it is complete.
    cached: Option<Digest>,
}

impl TagRecordUse {
    /// Whether no write in the repository could have changed the tag since the request arrived.
    fn is_current(&self) -> bool {
        self.writes.is_quiet() && self.registry.writes(&self.key.repository) == self.writes
    }
}

impl ReadContext<'_> {
    /// Whether records count without the upstream, under the policy `never`.
    pub(in crate::proxy) fn may_use_records_alone(&self) -> bool {
        self.rule.policy == Policy::Never && !self.request.for_push && self.proxy.shared.has_records()
    }

    /// The manifest under the policy `never`: from the store, or else by the records of other caches. For a client without a
    /// grant, the record of the repository is read whether or not the manifest is cached.
    pub(in crate::proxy) async fn manifest_without_upstream(&self, reference: &Reference) -> ProxyResponse {
        if self.authorization(true) != Authorization::Unknown {
            let outcome = self.manifest_of_upstream(reference).await;
            if !is_not_cached(&outcome) {
                return outcome;
            }
        }
        let Some(read) = self.permitted_by_records().await else {
            return self.manifest_of_upstream(reference).await;
        };
        match reference {
            Reference::Tag(tag) if !tag.is_referrers_tag() => {
                let evidence = read.tag_evidence(tag, Some(read.tag_client())).await;
                match evidence.state.cached {
                    // The blobs that the bucket was seen to have count for a minute.
                    Some(cached) if !cached.is_complete() => read.bring_again(cached.digest).await,
                    _ => drop(read.with_tag_record(tag, evidence).await),
                }
            }
            Reference::Digest(AnyDigest::Supported(digest)) => read.bring_again(*digest).await,
            Reference::Tag(_) | Reference::Digest(AnyDigest::Unsupported(_)) => {}
        }
        read.manifest_of_upstream(reference).await
    }

    /// Brings a manifest that the repository has, with its image. A manifest that cannot be read is not cached.
    async fn bring_again(&self, digest: Digest) {
        let registry = &self.request.registry;
        let bringing = self
            .proxy
            .bring_manifest(registry, self.repository, (digest, None), INDEX_DEPTH_MAX);
        let _is_there = timeout(BRING_TIMEOUT, bringing).await;
    }

    /// This read with the grants of now, if the client may read the repository by a right that this cache remembers, or by
    /// a public record.
    pub(in crate::proxy) async fn permitted_by_records(&self) -> Option<Self> {
        if !self.is_permitted_by_records().await {
            return None;
        }
        Some(ReadContext::new(self.proxy, self.request, self.repository).await)
    }

    /// The evidence after the record of other caches was read, if it confirms the tag.
    pub(in crate::proxy) async fn with_tag_record(&self, tag: &Tag, evidence: Evidence) -> Evidence {
        let (proxy, registry) = (self.proxy, &self.request.registry);
        let Some(age_max) = evidence.state.record_age_max() else {
            return evidence;
        };
        // No client waits for the bucket while a copy can be served in an outage.
        if self.request.for_push || self.known_outage().is_some() {
            return evidence;
        }
        let key = TagKey {
            upstream: registry.shared_name(),
            repository: self.repository.clone(),
            tag: tag.clone(),
        };
        let reader = RecordReader {
            since: self.request.since,
            now: self.request.now,
            writes: self.request.writes.ended(),
        };
        let interval = match self.rule.policy {
            Policy::IfNewer => age_max,
            _ => ABSENT_INTERVAL,
        };
        // For all reads of the bucket together.
        let until = Instant::now() + proxy.shared.wait_max();
        let opening = timeout_at(until, self.is_open_to_records(tag, reader, interval));
        if !opening.await.unwrap_or(false) {
            return evidence;
        }
        let using = || {
            let complete = evidence.state.cached.filter(CachedEntry::is_complete);
            let usage = TagRecordUse {
                registry: Arc::clone(registry),
                key: key.clone(),
                accept: self.request.accept.clone(),
                writes: self.request.writes,
                reader,
                age_max,
                interval,
                cached: complete.map(|cached| cached.digest),
            };
            let proxy = Arc::clone(proxy);
            async move { proxy.use_tag_record(&usage).await }
        };
        let (call, began) = proxy
            .tag_record_uses
            .share(&(key.clone(), self.request.accept.key()), using);
        // Of all requests that wait for this use, none waits longer than the first.
        match timeout_at(until.min(began + proxy.shared.wait_max()), call.wait()).await {
            Ok(Some(true)) => self.tag_evidence(tag, Some(self.tag_client())).await,
            Ok(_) => evidence,
            Err(_) => {
                // The next requests do not wait for it.
                let place = registry.record_place(self.repository);
                proxy.shared.discard_tag_record(&place, tag, reader);
                evidence
            }
        }
    }
}

impl ReadContext<'_> {
    /// Whether the record of the tag counts for this client: by a current grant of its own, or if the record of the
    /// repository is read and does not end the public mark. Otherwise the renewals of authorized clients of other caches
    /// would hide a denial. That record is read after the one of the tag, so that a slow bucket delays a tag once.
    async fn is_open_to_records(&self, tag: &Tag, reader: RecordReader, interval: Duration) -> bool {
        let (is_never, own) = (self.rule.policy == Policy::Never, self.authorization_of_client());
        if own == Authorization::Granted || is_never && own != Authorization::Unknown {
            return true;
        }
        let (shared, place) = (
            &self.proxy.shared,
            self.request.registry.record_place(self.repository),
        );
        let reading = shared.recent_tag_record(&place, tag, reader, interval);
        if reading.await.is_none() {
            return false;
        }
        let (began, read) = (Instant::now(), self.public_record().await);
        // The upstream responds, so a record that is not read costs one request to it.
        let is_unread = matches!(read, Some(RecordRead::Unread { .. }));
        (is_never || !is_unread) && self.is_public_by(read, began).await
    }
}

impl ProxyService {
    /// Brings a tag with its image.
    pub(super) async fn bring_tag(self: &Arc<Self>, read: &ReadContext<'_>, tag: &Tag) -> bool {
        let (registry, repository) = (&read.request.registry, read.repository);
        let began = Instant::now();
        let Some(found) = self
            .shared
            .tag_record(&registry.record_place(repository), tag)
            .await
        else {
            return false;
        };
        let is_current = |age| {
            let writes = registry.write_generations();
            !writes.may_predate_write(repository, (age, began), true)
        };
        let mut variants = variants_of(&found, self.clock.now(), is_current);
        let key = TagKey {
            upstream: registry.shared_name(),
            repository: repository.clone(),
            tag: tag.clone(),
        };
        let record = TagRecord {
            variants: variants.clone(),
        };
        let (client, place) = (read.tag_client(), key.clone());
        let resolved = self.store.read(move |view| {
            let reader = TagClient::reader(Some(&client));
            view.resolve_tag(&place, &record, reader)
        });
        let Some(named) = resolved.await else {
            return false;
        };
        if !self
            .bring_manifest(
                registry,
                repository,
                named_in(&found, named.digest),
                INDEX_DEPTH_MAX,
            )
            .await
        {
            return false;
        }
        variants.sort_by_key(|variant| variant.confirmed_at);
        let newest = variants.iter().rfind(|variant| variant.digest == named.digest);
        if let Some(newest) = newest {
            self.record_sight(registry, &key, newest, &found).await;
        }
        self.record_variants(&key, variants).await;
        true
    }

    /// Seconds since this cache first saw the tag name this digest, until the request was sent. `None`: the storage's clock
    /// shows another time, so that another cache could compare the first sight with nothing.
    pub(super) async fn seen_for(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        tag: &Tag,
        digest: Digest,
    ) -> Option<u64> {
        let (registry, repository) = (&upstream_request.registry, &upstream_request.repository);
        if !self.trusts_storage_clock(registry) {
            return None;
        }
        let key = SightingKey {
            upstream: registry.shared_name(),
            repository: repository.clone(),
            reference: tag.clone().into(),
        };
        let first = self.read_cache(registry, repository, move |cached| {
            let sightings = cached.view.sightings(&key);
            sightings.get(&digest).map(|sighting| sighting.first_seen_at)
        });
        // A clock that was set ahead makes no digest older for other caches.
        let (first, now) = (first.await, registry.checked_time().bound(self.clock.now()));
        let seen = first.and_then(|first| now.duration_since(first).ok());
        let seen = seen.unwrap_or_default();
        Some(seen.saturating_sub(upstream_request.since.elapsed()).as_secs())
    }

    /// Whether the storage's clock shows the time of this host, as checked by the registry's. A clock that was set ahead, or a
    /// storage that states a wrong time, would make digests older.
    fn trusts_storage_clock(&self, registry: &UpstreamRegistry) -> bool {
        let time = registry.checked_time();
        let now = time.time_of_sight(time.bound(self.clock.now())).at;
        self.shared.agrees_with_clock(now)
    }

    /// Records that the upstream named this digest to another cache, and since when. A sighting of this cache that is later
    /// than the record stays the last one.
    async fn record_sight(
        &self,
        registry: &UpstreamRegistry,
        key: &TagKey,
        variant: &Variant,
        found: &Dated<TagState>,
    ) {
        let seen = Seen {
            digest: variant.digest,
            media_type: variant.media_type.clone(),
            accept: variant.accept,
            accepts_indexes: variant.accepts_indexes,
            last_modified: None,
            created_at: None,
        };
        let time = self.time_of_record(registry, variant, found);
        let place = key.clone();
        let is_later = self.store.read(move |view| {
            let own = view.tag(&place).ok().flatten();
            let sightings = view.sightings(&SightingKey::from(&place));
            own.is_some_and(|own| own.confirmed_at() > time.host)
                || sightings
                    .iter()
                    .any(|other| other.named_at > time.at || other.named_at_by_host > time.host)
        });
        if !is_later.await {
            let sighted = self
                .store
                .record_sighting(SightingKey::from(key), seen, time)
                .await;
            log_store_error(sighted, "record when the digest was first seen");
        }
        self.record_earlier_sight(registry, key, variant.digest, found)
            .await;
    }

    /// When the upstream named a digest to another cache, at the latest, so that no digest is older than it is.
    fn time_of_record(
        &self,
        registry: &UpstreamRegistry,
        variant: &Variant,
        found: &Dated<TagState>,
    ) -> SightTime {
        let now = self.clock.now();
        let host = variant
            .confirmed_at
            .checked_add(PRECISION)
            .unwrap_or(now)
            .min(now);
        let age = now.duration_since(host).unwrap_or_default();
        let at = registry.checked_time().time_of_sight(now).at;
        // As a first sight: otherwise the digest counts as seen now.
        let is_dated = self.trusts_storage_clock(registry) && found.seen_for(&variant.digest).is_some();
        SightTime {
            host,
            at: at.checked_sub(age).filter(|_| is_dated).unwrap_or(at),
        }
    }

    /// Records since when other caches have seen the tag name this digest, of which this cache has a sighting.
    async fn record_earlier_sight(
        &self,
        registry: &UpstreamRegistry,
        key: &TagKey,
        digest: Digest,
        found: &Dated<TagState>,
    ) {
        if !self.trusts_storage_clock(registry) {
            return;
        }
        let time = registry.checked_time().time_of_sight(self.clock.now());
        let seen = found.seen_for(&digest).map(|seen| seen.saturating_sub(PRECISION));
        let Some(first) = seen.and_then(|seen| time.at.checked_sub(seen)) else {
            return;
        };
        let key = SightingKey::from(key);
        let recording = self
            .store
            .write(move |store| store.record_earlier_sight(&key, &digest, (first, time.at)));
        log_store_error(recording.await, "record when the digest was first seen");
    }

    /// Learns since when other caches have seen the tag name this digest, which the upstream has just named and which is too
    /// young by the evidence of this cache.
    pub(in crate::proxy) async fn learn_first_sight(
        &self,
        upstream_request: &UpstreamRequest,
        tag: &Tag,
        digest: Digest,
    ) {
        let (registry, repository) = (&upstream_request.registry, &upstream_request.repository);
        let reader = RecordReader {
            since: upstream_request.since,
            now: upstream_request.arrived_at,
            writes: upstream_request.writes.ended(),
        };
        let place = registry.record_place(repository);
        let reading = self.shared.recent_first_sights(&place, tag, reader, AGE_INTERVAL);
        if let Some(found) = reading.await {
            let key = TagKey {
                upstream: registry.shared_name(),
                repository: repository.clone(),
                tag: tag.clone(),
            };
            self.record_earlier_sight(registry, &key, digest, &found).await;
        }
    }

    /// Stores the responses to other caches, unless this cache has confirmed the tag later.
    async fn record_variants(&self, key: &TagKey, variants: Vec<Variant>) {
        let key = key.clone();
        let stored = self.store.write(move |store| {
            let mut stored = Ok(());
            for variant in variants {
                stored = stored.and(store.record_earlier_response(&key, variant));
            }
            stored
        });
        log_store_error(stored.await, "store tag");
    }

    /// Reads the record of a tag and stores the digest that it confirms. Returns whether anything may have changed.
    async fn use_tag_record(self: Arc<Self>, usage: &TagRecordUse) -> bool {
        let TagRecordUse { registry, key, .. } = usage;
        let place = registry.record_place(&key.repository);
        let began = Instant::now();
        let reading = self
            .shared
            .recent_tag_record(&place, &key.tag, usage.reader, usage.interval);
        let Some(found) = reading.await else {
            return false;
        };
        let now = self.clock.now();
        let confirmed = self.confirm(usage, &found, (began, now)).await;
        if confirmed == Some(false) {
            self.shared.discard_tag_record(&place, &key.tag, usage.reader);
        }
        let is_ended = self.end_confirmation(key, &found, now).await;
        confirmed == Some(true) || is_ended
    }

    /// Stores the digest that the record names for this client. `None`: it names none of that age. `Some(false)`: its image
    /// is not there.
    async fn confirm(
        self: &Arc<Self>,
        usage: &TagRecordUse,
        found: &Dated<TagState>,
        (began, now): (Instant, SystemTime),
    ) -> Option<bool> {
        let TagRecordUse {
            registry,
            key,
            accept,
            age_max,
            ..
        } = usage;
        // A record from before a push must not undo it, after the push as little as during it.
        let is_current = |age| {
            let writes = registry.write_generations();
            !writes.may_predate_write(&key.repository, (age, began), false)
        };
        let variants = variants_of(found, now, is_current);
        let record = TagRecord {
            variants: variants.clone(),
        };
        let (accept, place) = (accept.clone(), key.clone());
        let resolving = self.store.read(move |view| {
            let named = view.resolve_tag(&place, &record, TagReader::Client(&accept))?;
            // This cache knows something later.
            let own = view.tag(&place).ok()?;
            let is_later = |own: &TagRecord| own.confirmed_at() > named.confirmed_at;
            // Sightings outlive an evicted tag.
            let sightings = view.sightings(&SightingKey::from(&place));
            let was_other_seen = sightings.iter().any(|other| {
                other.seen.digest != named.digest && other.named_at_by_host > named.confirmed_at
            });
            (!was_other_seen && !own.is_some_and(|own| is_later(&own))).then_some(named)
        });
        let named = resolving.await?;
        if named.is_moved || !age::is_within(named.confirmed_at, *age_max, now) || !usage.is_current() {
            return None;
        }
        let (digest, repository) = (named.digest, &key.repository);
        let is_there = usage.cached == Some(digest) || {
            let bringing =
                self.bring_manifest(registry, repository, named_in(found, digest), INDEX_DEPTH_MAX);
            timeout(BRING_TIMEOUT, bringing).await.unwrap_or(false)
        };
        if !is_there {
            return Some(false);
        }
        if !usage.is_current() {
            return None;
        }
        // A digest whose manifest was not brought must hide no copy.
        let mut same: Vec<_> = variants.into_iter().filter(|one| one.digest == digest).collect();
        same.sort_by_key(|variant| variant.confirmed_at);
        // Before the tag, so that its age is judged by what the tag named before.
        self.record_sight(registry, key, same.last()?, found).await;
        self.record_variants(key, same).await;
        if !usage.is_current() {
            self.end_overtaken(usage, now).await;
            return None;
        }
        self.telemetry.shared().record_record("tag", "used");
        tracing::debug!(upstream = registry.name(), image = %format_args!("{repository}:{}", key.tag), %digest,
            "tag confirmed by a record of another cache");
        Some(true)
    }

    /// Ends a confirmation during which a write began. Only a write that the registry accepted removes the tag, so that a
    /// client without push access cannot evict it.
    async fn end_overtaken(&self, usage: &TagRecordUse, now: SystemTime) {
        let key = usage.key.clone();
        let writes = usage.registry.write_generations();
        let was_accepted = writes.was_accepted_since(&key.repository, usage.writes);
        let ending = self.store.write(move |store| {
            if was_accepted {
                store.remove_tag(&key)
            } else {
                store.invalidate(&InvalidationKey::from(&key), now)
            }
        });
        log_store_error(ending.await, "end a confirmation recorded during a write");
    }

    /// Marks the tag as invalidated if another cache has seen that it was deleted or changed since this one confirmed it.
    /// Returns whether it was marked.
    async fn end_confirmation(&self, key: &TagKey, found: &Dated<TagState>, now: SystemTime) -> bool {
        let TagState {
            unnamed_at,
            ref variants,
        } = found.state;
        // The digests in the record were seen later. Otherwise a confirmation of the same seconds does not count.
        let precision = if variants.is_empty() {
            PRECISION
        } else {
            Duration::ZERO
        };
        let age = found.age(unnamed_at).saturating_sub(precision);
        let Some(at) = now.checked_sub(age).filter(|_| unnamed_at > 0) else {
            return false;
        };
        let key = key.clone();
        let marking = self.store.write(move |store| match store.tag(&key)? {
            Some(own) if own.confirmed_at() < at => store.invalidate(&InvalidationKey::from(&key), at),
            _ => Ok(false),
        });
        let marked = marking.await;
        let is_marked = marked.as_ref().is_ok_and(|is_marked| *is_marked);
        log_store_error(marked, "store invalidation mark");
        is_marked
    }
}

/// The statements of a record about a tag, as responses of the upstream to this cache. A variant with a time in the future counts
/// as never confirmed. Those of an age that is not `is_current` are left out.
fn variants_of(
    found: &Dated<TagState>,
    now: SystemTime,
    is_current: impl Fn(Duration) -> bool,
) -> Vec<Variant> {
    let known = found.state.variants.iter();
    let known = known.filter(|variant| variant.at > 0 && is_current(found.age(variant.at)));
    let variants = known.map(|variant| Variant {
        accept: variant.accept,
        digest: variant.digest,
        media_type: variant.media_type.clone(),
        accepts_indexes: variant.accepts_indexes,
        confirmed_at: now
            .checked_sub(found.age(variant.at))
            .unwrap_or(SystemTime::UNIX_EPOCH),
        // The sightings have the time of the first sight.
        first_seen_at: now,
        previous: None,
        is_by_record: true,
        history: Vec::new(),
    });
    variants.collect()
}

/// A digest that the record names, and when it was last confirmed, by the storage's clock.
fn named_in(found: &Dated<TagState>, digest: Digest) -> (Digest, Option<u64>) {
    let naming = found
        .state
        .variants
        .iter()
        .filter(|variant| variant.digest == digest);
    (digest, naming.map(|variant| variant.at).max())
}

/// Whether a request under the policy `never` was denied because nothing is cached, or because this cache has not
/// seen the manifest in the public repository.
fn is_not_cached(outcome: &ProxyResponse) -> bool {
    matches!(
        outcome,
        ProxyResponse::Denied(Denied {
            reason: DenyReason::NotCached | DenyReason::NotAuthorized,
            ..
        })
    )
}
