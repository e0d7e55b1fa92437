//! Cached images: the list. `order` has its orders, `details` one image, `delete` removes images.

mod delete;
mod details;
mod order;

use std::cmp::Reverse;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Admin;
use super::extract::{Params, lowercase, number};
use super::format::{confirmed, describe_youth, rfc3339};
use super::image_ref::{Nearest, full_name};
use super::names::PolicyName;
use super::refreshes::RefreshView;
use super::response::{Problem, blocking};
use crate::oci::manifest::ManifestKind;
use crate::server::ServingState;
use crate::store::Store;
use crate::store::access_times::ContentId;
use crate::store::manifests::StoredManifest;
use crate::store::pins::Pin;
use crate::store::tags::{NEVER_CONFIRMED, ResolvedTag, TagKey, TagReader};
use crate::store::usage_report::{ReferenceCounts, TagUsage};
use crate::store::verdicts::VerdictKind;

pub(super) use delete::*;
pub(super) use details::*;
pub(super) use order::Orders;
use order::{LastOrder, ORDERED_MAX, Order};

/// Maximum page size of the image list.
pub(super) const IMAGES_MAX: usize = 1_000;

/// One image of the list.
#[derive(Clone, Serialize, ToSchema)]
pub(super) struct Image {
    /// Full name, for example docker.io/library/alpine:3.20.
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
    /// Whether it can be pulled without the upstream.
    pub(super) complete: bool,
    /// Size of its cached content.
    pub(super) bytes: u64,
    /// Size of the content that no other image uses.
    pub(super) unique_bytes: u64,
    /// Null for an imported image that no upstream has confirmed.
    #[schema(format = DateTime)]
    pub(super) confirmed_at: Option<String>,
    pub(super) confirmed_seconds_ago: Option<u64>,
    /// End of its freshness (`max_age`). Null if the next pull revalidates it.
    #[schema(format = DateTime)]
    pub(super) fresh_until: Option<String>,
    /// Last time that a client got its manifest, or that the cache fetched it.
    #[schema(format = DateTime)]
    pub(super) last_pulled_at: Option<String>,
    pub(super) rule: String,
    #[schema(value_type = PolicyName)]
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

/// The page of images.
#[derive(Serialize, ToSchema)]
#[schema(as = Images)]
pub(super) struct ImageList {
    pub(super) images: Vec<Image>,
    pub(super) total: usize,
    /// `offset` of the next page.
    next: Option<usize>,
}

/// Filter, order and page of the image list.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Substring of the name.
    #[serde(deserialize_with = "lowercase")]
    filter: String,
    /// Only images of this upstream.
    upstream: String,
    /// Order: name, size (largest first) or confirmed (newest first). In a large store, an order by size or confirmed is
    /// reused for twenty times the time that it took, at most a minute.
    #[param(inline)]
    sort: Sort,
    /// Number of images to skip.
    #[serde(deserialize_with = "number")]
    #[param(value_type = usize, required = false)]
    offset: Option<usize>,
    /// Maximum number of images; default 1000.
    #[serde(deserialize_with = "number")]
    #[param(value_type = usize, required = false)]
    limit: Option<usize>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(try_from = "String")]
#[schema(rename_all = "lowercase")]
enum Sort {
    #[default]
    Name,
    Size,
    Confirmed,
}

impl TryFrom<String> for Sort {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match &*text {
            "name" => Ok(Self::Name),
            "size" => Ok(Self::Size),
            "confirmed" => Ok(Self::Confirmed),
            other => Err(format!("is name, size or confirmed, not `{other}`")),
        }
    }
}

/// List of the cached images.
#[utoipa::path(get, path = "/api/v1/images", params(ListQuery), responses((status = 200, body = ImageList)))]
pub(super) async fn list_images(
    State(admin): State<Admin>,
    Params(query): Params<ListQuery>,
) -> Result<Response, Problem> {
    let (registry, now) = (admin.registry.load_full(), admin.clock.now());
    // A long list is serialized on the blocking thread too.
    blocking(move || Ok(Json(list(&registry, &admin.orders, &query, now)).into_response())).await
}

impl ListQuery {
    /// A page in name order, starting at `offset`.
    pub(super) fn by_name(filter: &str, offset: usize, limit: usize) -> Self {
        Self {
            filter: filter.to_lowercase(),
            offset: Some(offset),
            limit: Some(limit),
            ..Self::default()
        }
    }

    fn is_all(&self) -> bool {
        self.filter.is_empty() && self.upstream.is_empty()
    }

    fn matches(&self, key: &TagKey) -> bool {
        (self.upstream.is_empty() || *self.upstream == *key.upstream)
            && (self.filter.is_empty() || full_name(key).to_lowercase().contains(&self.filter))
    }

    fn offset(&self) -> usize {
        self.offset.unwrap_or_default()
    }

    fn limit(&self) -> usize {
        self.limit.unwrap_or(IMAGES_MAX).clamp(1, IMAGES_MAX)
    }

    fn end(&self) -> usize {
        self.offset().saturating_add(self.limit())
    }
}

/// The page of images. In name order and without a filter, only the page is read from the store. Blocks.
pub(super) fn list(
    registry: &ServingState,
    orders: &Orders,
    query: &ListQuery,
    now: SystemTime,
) -> ImageList {
    let store = registry.proxy.store().blocking();
    let usage = store.usage();
    // Images that are removed while the page is made count too, so that the next page begins after them.
    let (page, count, total) = if query.sort == Sort::Name && query.is_all() && usage.is_complete {
        let page = store.tag_usages(query.offset(), query.limit());
        let counted = usize::try_from(usage.tags).unwrap_or(usize::MAX);
        let seen = if page.is_empty() {
            0
        } else {
            query.offset() + page.len()
        };
        let count = page.len();
        (page, count, counted.max(seen))
    } else {
        let (keys, total) = match query.sort {
            Sort::Name => first_by_name(store, query),
            Sort::Size => page_by(store, query, (&orders.by_size, usage.tags), TagUsage::bytes),
            Sort::Confirmed => page_by(store, query, (&orders.by_confirmation, usage.tags), |image| {
                newest(registry, image).map(|named| named.confirmed_at)
            }),
        };
        let stocked = keys.iter().filter_map(|key| store.tag_usage(key).ok().flatten());
        (stocked.collect(), keys.len(), total)
    };
    let images = if page.is_empty() {
        Vec::new()
    } else {
        let shares = store.reference_counts();
        let lines = page
            .iter()
            .filter_map(|image| summary(registry, &shares, image, now));
        lines.collect()
    };
    let end = query.offset() + count;
    ImageList {
        images,
        total,
        next: (count > 0 && end < total).then_some(end),
    }
}

/// The tags of the page in name order, and the total count.
fn first_by_name(store: &Store, query: &ListQuery) -> (Vec<TagKey>, usize) {
    let (mut page, mut total) = (Vec::new(), 0);
    store.each_tag(|key, _| {
        if query.matches(&key) {
            if (query.offset()..query.end()).contains(&total) {
                page.push(key);
            }
            total += 1;
        }
        ControlFlow::Continue(())
    });
    (page, total)
}

/// The tags of the page by descending `weight`, and the total count.
fn page_by<W: Ord>(
    store: &Store,
    query: &ListQuery,
    (last, tags): (&LastOrder, u64),
    weight: impl Fn(&TagUsage) -> W,
) -> (Vec<TagKey>, usize) {
    let Order { first, total } = if query.is_all() && query.end() <= ORDERED_MAX {
        last.get(tags, || first_by(store, query, ORDERED_MAX, weight))
    } else {
        first_by(store, query, query.end(), weight)
    };
    let page = first.iter().take(query.end()).skip(query.offset());
    (page.cloned().collect(), total)
}

/// The first `end` tags by descending `weight`. At most twice as many are in memory.
fn first_by<W: Ord>(store: &Store, query: &ListQuery, end: usize, weight: impl Fn(&TagUsage) -> W) -> Order {
    let mut first: Vec<(Reverse<W>, TagKey)> = Vec::new();
    let mut total = 0;
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
    Order {
        first: first.into_iter().take(end).map(|(_, key)| key).collect(),
        total,
    }
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
