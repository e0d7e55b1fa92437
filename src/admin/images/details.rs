//! Details of one cached image.

use std::cmp::Reverse;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::super::Admin;
use super::super::extract::Params;
use super::super::format::{confirmed, rfc3339};
use super::super::image_ref::{ImageQuery, ImageRef};
use super::super::names::Role;
use super::super::response::{Problem, blocking};
use super::{Image, newest, not_cached, summary};
use crate::oci::manifest::{DescriptorKind, ManifestKind};
use crate::oci::{AnyDigest, Digest};
use crate::server::ServingState;
use crate::store::manifests::StoredManifest;
use crate::store::tags::{HistoryEntry, TagRecord};
use crate::store::usage_report::{ReferenceCounts, TagUsage};

/// Details of one image.
#[derive(Serialize, ToSchema)]
pub(in crate::admin) struct ImageDetails {
    #[serde(flatten)]
    image: Image,
    /// One variant for each set of accepted media types.
    variants: Vec<Variation>,
    /// Manifests, configs and layers of the image.
    contents: Vec<Part>,
    /// Previous digests of the tag, most recent first.
    history: Vec<PastImage>,
    /// Number of credentials with a grant in its repository.
    grants: usize,
    /// Time at which the repository was last confirmed to be public.
    #[schema(format = DateTime)]
    public_since: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::admin) struct Variation {
    digest: String,
    media_type: String,
    cached: bool,
    complete: bool,
    #[schema(format = DateTime)]
    confirmed_at: Option<String>,
    #[schema(format = DateTime)]
    first_seen_at: String,
    /// The last complete image that the tag named before.
    previous: Option<PreviousImage>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::admin) struct PastImage {
    digest: String,
    #[schema(format = DateTime)]
    first_seen_at: String,
    #[schema(format = DateTime)]
    confirmed_at: String,
}

/// The last complete image before the current one.
#[derive(Serialize, ToSchema)]
pub(in crate::admin) struct PreviousImage {
    digest: String,
    #[schema(format = DateTime)]
    confirmed_at: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::admin) struct Part {
    digest: String,
    #[schema(value_type = Role)]
    role: &'static str,
    platform: Option<String>,
    bytes: Option<u64>,
    cached: bool,
    /// Number of other images that use it.
    shared_with: usize,
}

/// Details of one image.
#[utoipa::path(
    get,
    path = "/api/v1/image",
    params(ImageQuery),
    responses(
        (status = 200, body = ImageDetails),
        (status = 404, description = "Not found."),
    )
)]
pub(in crate::admin) async fn image(
    State(admin): State<Admin>,
    Params(query): Params<ImageQuery>,
) -> Result<Json<ImageDetails>, Problem> {
    let (registry, now) = (admin.registry.load_full(), admin.clock.now());
    let named = ImageRef::parse(&query.image, &registry)?;
    blocking(move || details(&registry, &named, now).map(Json)).await
}

fn details(registry: &ServingState, named: &ImageRef, now: SystemTime) -> Result<ImageDetails, Problem> {
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
