//! Deletion of cached images.

use std::ops::ControlFlow;

use axum::Json;
use axum::extract::State;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::super::Admin;
use super::super::extract::{Params, flag};
use super::super::image_ref::{ImageRef, full_name};
use super::super::response::{Problem, removing};
use super::not_cached;
use crate::oci::{Reference, Repository};
use crate::server::ServingState;
use crate::store::tags::TagKey;
use crate::store::{DeleteError, Store};

#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(in crate::admin) struct DeleteQuery {
    /// Image reference, for example docker.io/library/alpine:3.20; docker's short forms are accepted.
    #[param(required = true)]
    image: String,
    /// Delete all tags of the image's repository.
    #[serde(deserialize_with = "flag")]
    all_tags: bool,
    /// Only report what would be freed.
    #[serde(deserialize_with = "flag")]
    dry_run: bool,
}

/// What a deletion freed.
#[derive(Serialize, ToSchema)]
pub(in crate::admin) struct Removed {
    dry_run: bool,
    images: Vec<String>,
    tags: u64,
    manifests: u64,
    blobs: u64,
    pub(in crate::admin) bytes_freed: u64,
}

/// Delete a tag, or all tags of a repository, with the content that no other image uses.
#[utoipa::path(
    delete,
    path = "/api/v1/images",
    params(DeleteQuery),
    responses(
        (status = 200, body = Removed),
        (status = 404, description = "Not found."),
        (status = 409, description = "The image or a part of it is pinned."),
    )
)]
pub(in crate::admin) async fn delete_image(
    State(admin): State<Admin>,
    Params(query): Params<DeleteQuery>,
) -> Result<Json<Removed>, Problem> {
    let registry = admin.registry.load_full();
    let named = ImageRef::parse(&query.image, &registry)?;
    removing(move || remove(&registry, &named, query.all_tags, query.dry_run).map(Json)).await
}

/// Removes a tag, or all tags of a repository. With `is_trial`, only reports what that would free.
pub(in crate::admin) fn remove(
    registry: &ServingState,
    named: &ImageRef,
    all_tags: bool,
    is_trial: bool,
) -> Result<Removed, Problem> {
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
    let freed = store.delete_images(&keys, is_trial)?;
    if !is_trial {
        tracing::info!(image = %named, tags = freed.tags, bytes = freed.bytes, "images removed on request");
    }
    Ok(Removed {
        dry_run: is_trial,
        images: keys.iter().map(full_name).collect(),
        tags: freed.tags,
        manifests: freed.manifests,
        blobs: freed.blobs,
        bytes_freed: freed.bytes,
    })
}

impl From<DeleteError> for Problem {
    fn from(error: DeleteError) -> Self {
        match error {
            DeleteError::Pinned(_) => Self::new(StatusCode::CONFLICT, error.to_string()),
            DeleteError::Store(fault) => fault.into(),
        }
    }
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
