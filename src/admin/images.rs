//! Cached images: list, details, removal and pins.

use std::cmp::Reverse;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use serde::Serialize;
use serde_json::json;

use super::format::{confirmed, describe_youth, rfc3339};
use super::image_ref::{ImageRef, Nearest, full_name};
use super::refreshes::RefreshView;
use super::response::{ApiResponse, Problem, json_response};
use crate::oci::manifest::{DescriptorKind, ManifestKind};
use crate::oci::{AnyDigest, Digest, Query, Reference, Repository};
use crate::server::ServingState;
use crate::store::Store;
use crate::store::access_times::ContentId;
use crate::store::manifests::StoredManifest;
use crate::store::pins::Pin;
use crate::store::tags::{HistoryEntry, NEVER_CONFIRMED, ResolvedTag, TagKey, TagReader, TagRecord};
use crate::store::usage_report::{ReferenceCounts, TagUsage};
use crate::store::verdicts::VerdictKind;

/// Maximum page size of the image list.
pub(super) const IMAGES_MAX: usize = 1_000;

/// One image of the list.
#[derive(Clone, Serialize)]
pub(super) struct Image {
    #[serde(rename = "image")]
    pub(super) name: String,
    pub(super) upstream: String,
    pub(super) repository: String,
    pub(super) tag: String,
    /// The digest of the tag, as last confirmed.
    pub(super) digest: String,
    pub(super) media_type: String,
    /// Platforms that are completely cached.
    pub(super) platforms: Vec<String>,
    /// Whether the image is completely cached.
    pub(super) complete: bool,
    pub(super) bytes: u64,
    /// Bytes of objects that no other image uses.
    pub(super) unique_bytes: u64,
    pub(super) confirmed_at: Option<String>,
    pub(super) confirmed_seconds_ago: Option<u64>,
    /// Time until which it is served without revalidation.
    pub(super) fresh_until: Option<String>,
    /// Time of the last pull of its manifest, or of its storage.
    pub(super) last_pulled_at: Option<String>,
    pub(super) rule: String,
    pub(super) policy: &'static str,
    /// Pinned: excluded from eviction.
    pub(super) pinned: bool,
    /// Its digest is blocked.
    pub(super) blocked: bool,
    /// The digest that the tag names, if it is younger than `min_age`: its age, and from when on it is served.
    pub(super) cooling: Option<String>,
    /// Its scheduled refreshes, if a rule has them.
    pub(super) refresh: Option<RefreshView>,
}

/// Details of one image.
#[derive(Serialize)]
pub(super) struct ImageDetails {
    #[serde(flatten)]
    pub(super) image: Image,
    /// One variant for each set of accepted media types.
    pub(super) variants: Vec<Variation>,
    /// Manifests, configs and layers of the image.
    pub(super) contents: Vec<Part>,
    /// Previous digests of the tag, most recent first.
    pub(super) history: Vec<PastImage>,
    pub(super) grants: usize,
    /// Time at which the repository was last confirmed to be public.
    pub(super) public_since: Option<String>,
}

#[derive(Serialize)]
pub(super) struct Variation {
    pub(super) digest: String,
    pub(super) media_type: String,
    pub(super) cached: bool,
    pub(super) complete: bool,
    pub(super) confirmed_at: Option<String>,
    pub(super) first_seen_at: String,
    /// The last complete image that the tag named before.
    pub(super) previous: Option<PreviousImage>,
}

#[derive(Serialize)]
pub(super) struct PastImage {
    pub(super) digest: String,
    pub(super) first_seen_at: String,
    pub(super) confirmed_at: String,
}

/// The last complete image before the current one.
#[derive(Serialize)]
pub(super) struct PreviousImage {
    pub(super) digest: String,
    pub(super) confirmed_at: Option<String>,
}

#[derive(Serialize)]
pub(super) struct Part {
    pub(super) digest: String,
    /// `manifest`, `config` or `layer`.
    pub(super) role: &'static str,
    pub(super) platform: Option<String>,
    pub(super) bytes: Option<u64>,
    pub(super) cached: bool,
    /// Number of other images that use it.
    pub(super) shared_with: usize,
}

/// Filter, order and page of the image list.
pub(super) struct ListQuery {
    filter: String,
    upstream: Option<String>,
    by: Sort,
    pub(super) offset: usize,
    pub(super) limit: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sort {
    Name,
    Size,
    Confirmed,
}

impl Default for ListQuery {
    fn default() -> Self {
        Self {
            filter: String::new(),
            upstream: None,
            by: Sort::Name,
            offset: 0,
            limit: IMAGES_MAX,
        }
    }
}

impl ListQuery {
    /// A page in name order, starting at `offset`.
    pub(super) fn by_name(filter: &str, offset: usize, limit: usize) -> Self {
        Self {
            filter: filter.to_lowercase(),
            offset,
            limit,
            ..Self::default()
        }
    }

    pub(super) fn read(query: &Query) -> Result<Self, Problem> {
        let number = |name: &str, otherwise: usize| match query.get(name) {
            None | Some("") => Ok(otherwise),
            Some(text) => text
                .parse::<usize>()
                .map_err(|_| Problem::bad_request(format!("`{name}` is a number, not `{text}`"))),
        };
        let by = match query.get("sort").unwrap_or("name") {
            "name" => Sort::Name,
            "size" => Sort::Size,
            "confirmed" => Sort::Confirmed,
            other => {
                return Err(Problem::bad_request(format!(
                    "`sort` is name, size or confirmed, not `{other}`"
                )));
            }
        };
        Ok(Self {
            filter: query.get("filter").unwrap_or_default().to_lowercase(),
            upstream: query
                .get("upstream")
                .filter(|name| !name.is_empty())
                .map(str::to_owned),
            by,
            offset: number("offset", 0)?,
            limit: number("limit", IMAGES_MAX)?.clamp(1, IMAGES_MAX),
        })
    }
}

impl ListQuery {
    fn is_all(&self) -> bool {
        self.filter.is_empty() && self.upstream.is_none()
    }

    fn matches(&self, key: &TagKey) -> bool {
        self.upstream.as_deref().is_none_or(|name| name == &*key.upstream)
            && (self.filter.is_empty() || full_name(key).to_lowercase().contains(&self.filter))
    }

    fn end(&self) -> usize {
        self.offset.saturating_add(self.limit)
    }
}

/// The page of images and the total count. Without a filter, only the page is read from the store. Blocks.
pub(super) fn list(registry: &ServingState, query: &ListQuery, now: SystemTime) -> (Vec<Image>, usize) {
    let store = registry.proxy.store().blocking();
    let usage = store.usage();
    let (page, total) = if query.by == Sort::Name && query.is_all() && usage.is_complete {
        let page = store.tag_usages(query.offset, query.limit);
        let counted = usize::try_from(usage.tags).unwrap_or(usize::MAX);
        let seen = if page.is_empty() {
            0
        } else {
            query.offset + page.len()
        };
        (page, counted.max(seen))
    } else {
        let (keys, total) = match query.by {
            Sort::Name => first_by_name(store, query),
            Sort::Size => first_by(store, query, TagUsage::bytes),
            Sort::Confirmed => first_by(store, query, |image| {
                newest(registry, image).map(|named| named.confirmed_at)
            }),
        };
        let stocked = keys.iter().filter_map(|key| store.tag_usage(key).ok().flatten());
        (stocked.collect(), total)
    };
    if page.is_empty() {
        return (Vec::new(), total);
    }
    let shares = store.reference_counts();
    let lines = page
        .iter()
        .filter_map(|image| summary(registry, &shares, image, now));
    (lines.collect(), total)
}

/// The tags of the page in name order, and the total count.
fn first_by_name(store: &Store, query: &ListQuery) -> (Vec<TagKey>, usize) {
    let (mut page, mut total) = (Vec::new(), 0);
    store.each_tag(|key, _| {
        if query.matches(&key) {
            if (query.offset..query.end()).contains(&total) {
                page.push(key);
            }
            total += 1;
        }
        ControlFlow::Continue(())
    });
    (page, total)
}

/// The tags of the page by descending `weight`, and the total count. At most twice the tags of the pages up to this
/// one are in memory.
fn first_by<W: Ord>(
    store: &Store,
    query: &ListQuery,
    weight: impl Fn(&TagUsage) -> W,
) -> (Vec<TagKey>, usize) {
    let mut first: Vec<(Reverse<W>, TagKey)> = Vec::new();
    let (mut total, end) = (0, query.end());
    store.each_tag(|key, record| {
        if query.matches(&key) {
            total += 1;
            let image = store.usage_of(key, record);
            first.push((Reverse(weight(&image)), image.key));
            if first.len() / 2 > end {
                first.sort();
                first.truncate(end);
            }
        }
        ControlFlow::Continue(())
    });
    first.sort();
    let page = first.into_iter().take(end).skip(query.offset);
    (page.map(|(_, key)| key).collect(), total)
}

/// The list as a JSON response.
pub(super) fn list_response(registry: &ServingState, query: &ListQuery, now: SystemTime) -> ApiResponse {
    let (images, total) = list(registry, query, now);
    let end = query.offset + images.len();
    let next = (!images.is_empty() && end < total).then_some(end);
    json_response(&json!({ "images": images, "total": total, "next": next }))
}

/// The details of one image.
pub(super) fn details(
    registry: &ServingState,
    named: &ImageRef,
    now: SystemTime,
) -> Result<ImageDetails, Problem> {
    let Some(key) = named.tag_key() else {
        return Err(Problem::bad_request("a tag is required: a digest has no history"));
    };
    let store = registry.proxy.store().blocking();
    let Some(stocked) = store.tag_usage(&key)? else {
        return Err(not_cached(&key, store));
    };
    let (stocked, shares) = (&stocked, store.reference_counts());
    let image = summary(registry, &shares, stocked, now).ok_or_else(|| not_cached(&key, store))?;
    let held = |digest: &Digest| store.manifest(digest).ok().flatten();
    let whole = |manifest: &StoredManifest| {
        store.is_image_complete(&key.upstream, &key.repository, manifest, &|_| false)
    };
    let variants = stocked.record.variants.iter().map(|variant| {
        let manifest = held(&variant.digest);
        Variation {
            digest: variant.digest.to_string(),
            media_type: variant.media_type.as_str().to_owned(),
            cached: manifest.is_some(),
            complete: manifest.is_some_and(|manifest| whole(&manifest)),
            confirmed_at: confirmed(variant.confirmed_at),
            first_seen_at: rfc3339(variant.first_seen_at),
            previous: variant.previous.as_ref().map(|earlier| PreviousImage {
                digest: earlier.digest.to_string(),
                confirmed_at: confirmed(earlier.confirmed_at),
            }),
        }
    });
    let mut parts = Vec::new();
    if let Some(manifest) = newest(registry, stocked).and_then(|named| held(&named.digest)) {
        collect_parts(registry, &shares, stocked, &manifest, None, &mut parts);
    }
    Ok(ImageDetails {
        image,
        variants: variants.collect(),
        contents: parts,
        history: store
            .tag(&key)
            .ok()
            .flatten()
            .map_or_else(Vec::new, |record| history(&record)),
        grants: store.grants_count(&key.upstream, &key.repository),
        public_since: store.public_since(&key.upstream, &key.repository).map(rfc3339),
    })
}

pub(super) fn not_cached(key: &TagKey, store: &Store) -> Problem {
    let name = full_name(key);
    let mut near = Nearest::to(&name);
    store.each_tag(|key, _| {
        near.consider(full_name(&key));
        ControlFlow::Continue(())
    });
    Problem {
        nearest: near.names(),
        ..Problem::new(StatusCode::NOT_FOUND, format!("{name} is not cached"))
    }
}

/// Previous digests of all variants, most recent first.
fn history(record: &TagRecord) -> Vec<PastImage> {
    let mut all: Vec<&HistoryEntry> = record
        .variants
        .iter()
        .flat_map(|variant| &variant.history)
        .collect();
    all.sort_by_key(|past| Reverse(past.confirmed_at));
    let views = all.iter().map(|past| PastImage {
        digest: past.digest.to_string(),
        first_seen_at: rfc3339(past.first_seen_at),
        confirmed_at: rfc3339(past.confirmed_at),
    });
    views.collect()
}

/// The image that a current client gets for the tag.
fn newest(registry: &ServingState, image: &TagUsage) -> Option<ResolvedTag> {
    let store = registry.proxy.store().blocking();
    store.resolve_tag(&image.key, &image.record, TagReader::Operator)
}

fn summary(
    registry: &ServingState,
    shares: &ReferenceCounts,
    image: &TagUsage,
    now: SystemTime,
) -> Option<Image> {
    let (key, named) = (&image.key, newest(registry, image)?);
    let store = registry.proxy.store().blocking();
    let upstream_registry = registry.router.by_name(&key.upstream);
    let rule =
        upstream_registry.map(|upstream_registry| upstream_registry.rule(&key.repository, Some(&key.tag)));
    let fresh = rule.map_or(Duration::ZERO, |rule| rule.max_age);
    let fresh_until = named
        .confirmed_at
        .checked_add(fresh)
        .filter(|until| *until > now && !named.is_moved);
    let manifest = store.manifest(&named.digest).ok().flatten();
    let whole = manifest.as_ref().is_some_and(|manifest| {
        store.is_image_complete(&key.upstream, &key.repository, manifest, &|_| false)
    });
    let (bytes, unique_bytes) = shares.sizes(image);
    let cooling = upstream_registry.and_then(|upstream_registry| {
        let youth = registry.proxy.cooling_of(upstream_registry, key, now)?;
        Some(format!("{}: {}", describe_youth(&youth), youth.describe(now)))
    });
    Some(Image {
        name: full_name(key),
        upstream: key.upstream.to_string(),
        repository: key.repository.to_string(),
        tag: key.tag.to_string(),
        digest: named.digest.to_string(),
        media_type: named.media_type.as_str().to_owned(),
        platforms: manifest
            .map(|manifest| platforms(registry, key, &manifest))
            .unwrap_or_default(),
        complete: whole,
        bytes,
        unique_bytes,
        confirmed_at: confirmed(named.confirmed_at),
        confirmed_seconds_ago: (named.confirmed_at != NEVER_CONFIRMED).then(|| {
            let age = now.duration_since(named.confirmed_at);
            age.unwrap_or_default().as_secs()
        }),
        fresh_until: fresh_until.map(rfc3339),
        last_pulled_at: store.last_access(ContentId::Manifest(named.digest)).map(rfc3339),
        rule: rule.map_or_else(
            || "its upstream is no longer configured".to_owned(),
            |rule| rule.name.to_string(),
        ),
        policy: rule.map_or("never", |rule| rule.policy.name()),
        pinned: store.is_pinned(&Pin::Tag(key.clone())),
        blocked: store
            .verdict(
                VerdictKind::Blocked,
                &key.upstream,
                &key.repository,
                &named.digest,
            )
            .is_some(),
        cooling,
        refresh: upstream_registry
            .and_then(|upstream| RefreshView::read(&registry.proxy, upstream, &store.view(), key, now)),
    })
}

/// Platforms of an index that are completely cached.
fn platforms(registry: &ServingState, key: &TagKey, manifest: &Arc<StoredManifest>) -> Vec<String> {
    if manifest.manifest.kind != ManifestKind::Index {
        return Vec::new();
    }
    let store = registry.proxy.store().blocking();
    let view = store.view();
    let whole = view.complete_children(&key.upstream, &key.repository, manifest);
    let named = whole.filter_map(|child| child.platform.as_ref().map(ToString::to_string));
    named.collect()
}

/// Collects the children of a manifest. For an index, these are its manifests and the children of the cached ones.
fn collect_parts(
    registry: &ServingState,
    shares: &ReferenceCounts,
    image: &TagUsage,
    manifest: &StoredManifest,
    platform: Option<&str>,
    parts: &mut Vec<Part>,
) {
    for child in &manifest.manifest.descriptors {
        let known = match &child.digest {
            AnyDigest::Supported(digest) => Some(*digest),
            AnyDigest::Unsupported(_) => None,
        };
        let content = known.and_then(|digest| image.content.get(&digest));
        let own_platform = child.platform.as_ref().map(ToString::to_string);
        let platform = own_platform.as_deref().or(platform);
        parts.push(Part {
            digest: child.digest.to_string(),
            role: match child.kind {
                DescriptorKind::Manifest => "manifest",
                DescriptorKind::Config => "config",
                DescriptorKind::Layer => "layer",
            },
            platform: platform.map(str::to_owned),
            bytes: content.map(|content| content.bytes).or(child.size),
            cached: content.is_some(),
            shared_with: known.map_or(0, |digest| shares.count(&digest).saturating_sub(1)),
        });
        // Two levels cover an index and its images; deeper levels are not shown.
        let is_index = manifest.manifest.kind == ManifestKind::Index;
        if let (true, DescriptorKind::Manifest, Some(digest)) = (is_index, child.kind, known)
            && let Ok(Some(held)) = registry.proxy.store().blocking().manifest(&digest)
            && held.manifest.kind != ManifestKind::Index
        {
            collect_parts(registry, shares, image, &held, platform, parts);
        }
    }
}

/// Removes a tag, or all tags of a repository. With `is_trial`, only reports what that would free.
pub(super) fn remove(
    registry: &ServingState,
    named: &ImageRef,
    all_tags: bool,
    is_trial: bool,
) -> Result<ApiResponse, Problem> {
    let store = registry.proxy.store().blocking();
    let (upstream, repository) = (named.upstream_registry.name(), &named.repository);
    let keys: Vec<TagKey> = match (all_tags, &named.reference) {
        (true, _) => tags_of(store, upstream, repository),
        (false, Reference::Tag(_)) => {
            let key = named.tag_key();
            let held = key.filter(|key| matches!(store.tag(key), Ok(Some(_))));
            held.into_iter().collect()
        }
        (false, Reference::Digest(_)) => {
            return Err(Problem::bad_request(
                "a tag is required, or a repository with all_tags=true",
            ));
        }
    };
    if keys.is_empty() {
        return Err(match named.tag_key() {
            Some(key) => not_cached(&key, store),
            None => Problem::not_found(format!("no tag of {upstream}/{repository} is cached")),
        });
    }
    let pinned = keys.iter().find(|key| store.is_pinned(&Pin::Tag((*key).clone())));
    if let (Some(key), false) = (pinned, is_trial) {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            format!("{} is pinned; unpin it first", full_name(key)),
        ));
    }
    let freed = store.delete_images(&keys, is_trial)?;
    if !is_trial {
        tracing::info!(image = %named, tags = freed.tags, bytes = freed.bytes, "images removed on request");
    }
    Ok(json_response(&json!({
        "dry_run": is_trial,
        "images": keys.iter().map(full_name).collect::<Vec<_>>(),
        "tags": freed.tags,
        "manifests": freed.manifests,
        "blobs": freed.blobs,
        "bytes_freed": freed.bytes,
    })))
}

fn tags_of(store: &Store, upstream: &str, repository: &Repository) -> Vec<TagKey> {
    let mut keys = Vec::new();
    store.each_tag(|key, _| {
        if &*key.upstream == upstream && key.repository == *repository {
            keys.push(key);
        }
        ControlFlow::Continue(())
    });
    keys
}

/// Names of all pinned tags and digests.
pub(super) fn pins(registry: &ServingState) -> Vec<String> {
    let pins = registry.proxy.store().blocking().pins();
    let name = |pin: &Pin| match pin {
        Pin::Tag(key) => full_name(key),
        Pin::Digest(digest) => digest.to_string(),
    };
    pins.iter().map(name).collect()
}

/// Pins a tag or a digest, or removes the pin. A pinned tag protects its current and later images. Returns the
/// previous state. The image need not be cached yet.
pub(super) fn pin(registry: &ServingState, named: &ImageRef, pinned: bool) -> Result<bool, Problem> {
    let pin = match (named.tag_key(), &named.reference) {
        (Some(key), _) => Pin::Tag(key),
        (None, Reference::Digest(AnyDigest::Supported(digest))) => Pin::Digest(*digest),
        (None, _) => {
            return Err(Problem::bad_request(
                "digests of this algorithm cannot be verified, so they are not cached",
            ));
        }
    };
    let store = registry.proxy.store().blocking();
    let was_news = if pinned {
        store.pin(&pin)?
    } else {
        store.unpin(&pin)?
    };
    Ok(was_news != pinned)
}
