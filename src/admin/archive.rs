//! Archive endpoints: `GET /api/v1/export` and `POST /api/v1/import`.

use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::IntoResponse;
use axum::{Extension, Json};
use http::StatusCode;
use http::header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use http_body_util::BodyExt as _;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use super::Admin;
use super::extract::{Params, flag, list};
use super::image_ref::ImageRef;
use super::pull_jobs::Platforms;
use super::response::{Pace, Problem, StreamBody, blocking, blocking_with};
use crate::archive::Image;
use crate::archive::export::{self, Plan};
use crate::archive::import::{self, ImportOptions, Imported};
use crate::archive::pipe::{PipeReader, PipeWriter, pipe};
use crate::server::ServingState;
use crate::store::StoreError;

/// Content type of an archive.
pub(super) const TAR: &str = "application/x-tar";

/// Maximum number of concurrent imports and exports.
pub(super) const ARCHIVES_MAX: usize = 2;

/// How long a rejected upload is still read. A client that is still sending may not have read the error response yet.
const DRAIN_MAX: Duration = Duration::from_secs(10);

#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query, style = Form)]
pub(super) struct ExportQuery {
    /// Image references, separated by commas, for example docker.io/library/alpine:3.20.
    #[serde(deserialize_with = "list")]
    #[param(required = true, explode = false)]
    image: Vec<String>,
    /// Platforms, for example linux/arm64; each must be complete. Default: the complete ones.
    #[serde(deserialize_with = "list")]
    #[param(explode = false)]
    platform: Vec<String>,
}

#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub(super) struct ImportQuery {
    /// Name of the imported image, if the archive contains only one. Default: the name in the archive.
    image: String,
    /// Mark the repositories as public until their upstream denies anonymous access.
    #[serde(deserialize_with = "flag")]
    public: bool,
}

/// The result of an import.
#[derive(Serialize, ToSchema)]
#[schema(as = Imported)]
pub(super) struct ImportResult {
    images: Vec<ImportedImage>,
    /// Manifests and blobs of the imported images.
    objects: u64,
    /// Manifests and blobs that were not cached before.
    new_objects: u64,
    new_bytes: u64,
    public: bool,
}

#[derive(Serialize, ToSchema)]
pub(super) struct ImportedImage {
    /// Full name.
    image: String,
    /// Digest that the tag names now.
    digest: String,
    /// Platforms of an index that the archive contained.
    platforms: Vec<String>,
    /// Whether all of its content was already cached.
    already_cached: bool,
}

/// Export images as an OCI image layout in a tar archive.
///
/// If content of an image is missing, the error names it. The same content gives the same bytes.
#[utoipa::path(
    get,
    path = "/api/v1/export",
    params(ExportQuery),
    responses(
        (
            status = 200,
            description = "The archive. It is incomplete if the connection ends before Content-Length is reached.",
            body = String,
            content_type = "application/x-tar",
        ),
        (status = 404, description = "Not found."),
        (status = 409, description = "The image is incomplete, or it contains a blocked digest."),
        (status = 503, description = "Too many imports or exports are running."),
    )
)]
pub(super) async fn export(
    State(admin): State<Admin>,
    Params(query): Params<ExportQuery>,
) -> Result<impl IntoResponse, Problem> {
    let registry = admin.registry.load_full();
    // Without an image, the error is that of an empty name.
    let names = Some(query.image).filter(|names| !names.is_empty());
    let names = names.unwrap_or_else(|| vec![String::new()]);
    let images = names
        .iter()
        .map(|name| Ok(image_of(ImageRef::parse(name, &registry)?)));
    let images = images.collect::<Result<Vec<Image>, Problem>>()?;
    let platforms = Some(query.platform).filter(|platforms| !platforms.is_empty());
    let platforms = platforms.map(Platforms::Selected);
    let permit = admin.acquire_archive_permit()?;
    let now = admin.clock.now();
    let (registry, plan) = blocking(move || {
        let want = |platform: &str| platforms.as_ref().is_some_and(|these| these.includes(platform));
        let wanted = match &platforms {
            Some(_) => export::Platforms::Selected(&want),
            None => export::Platforms::Cached,
        };
        let plan = Plan::new(registry.proxy.store().blocking(), &images, wanted, now)?;
        Ok((registry, plan))
    })
    .await?;
    let (chunks, body) = pipe();
    let bytes = plan.bytes();
    let mut writer = PipeWriter::new(chunks);
    spawn_blocking(move || {
        let _permit = permit;
        let written = plan.write(registry.proxy.store().blocking(), &mut writer);
        if let Err(error) = &written {
            tracing::warn!(%error, "export failed");
        }
        writer.finish(written);
    });
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static(TAR)),
        (
            CONTENT_DISPOSITION,
            HeaderValue::from_static("attachment; filename=\"images.tar\""),
        ),
        (CONTENT_LENGTH, bytes.into()),
    ];
    let body = Body::new(StreamBody::new(body, Some(bytes)));
    Ok((Extension(Pace::Archive), headers, body))
}

/// Import images from an OCI image layout in an uncompressed tar archive.
///
/// Every byte is verified, and the images appear only after all content is stored. Imported images are not confirmed by
/// an upstream, and the import grants access to no client.
#[utoipa::path(
    post,
    path = "/api/v1/import",
    params(ImportQuery),
    request_body(content = String, content_type = "application/x-tar"),
    responses(
        (status = 200, body = ImportResult),
        (status = 400, description = "An image has no name, or its registry is not a configured upstream."),
        (status = 409, description = "Content was deleted during the import."),
        (status = 415, description = "The Content-Type must be application/x-tar."),
        (status = 422, description = "The archive is not an OCI image layout, is damaged, or lacks content of an image."),
        (status = 500, description = "The disk failed."),
        (status = 503, description = "Too many imports or exports are running."),
        (status = 507, description = "The quota has no space for it."),
    )
)]
pub(super) async fn import(
    State(admin): State<Admin>,
    Params(query): Params<ImportQuery>,
    body: Body,
) -> Result<Json<ImportResult>, Problem> {
    let is_public = query.public;
    let name = Some(query.image).filter(|name| !name.is_empty());
    let permit = admin.acquire_archive_permit()?;
    let (registry, now) = (admin.registry.load_full(), admin.clock.now());
    let (chunks, archive) = pipe();
    tokio::spawn(forward_body(body, chunks));
    let mut archive = PipeReader::new(archive);
    let imported = blocking_with(permit, move || {
        let options = ImportOptions {
            resolve: &|name| resolve(name, &registry),
            name,
            is_public,
            now,
        };
        let imported = import::import(registry.proxy.store().blocking(), &mut archive, &options)?;
        // Here, because a client that leaves ends only the task that waits.
        for image in &imported.images {
            tracing::info!(image = image.name, digest = %image.digest, is_public, "image imported");
        }
        Ok(imported)
    })
    .await?;
    Ok(Json(ImportResult::of(imported, is_public)))
}

impl Admin {
    fn acquire_archive_permit(&self) -> Result<OwnedSemaphorePermit, Problem> {
        self.archive_permits.clone().try_acquire_owned().map_err(|_| {
            Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{ARCHIVES_MAX} imports or exports are already running; try again later"),
            )
        })
    }
}

fn image_of(named: ImageRef) -> Image {
    Image {
        name: named.to_string(),
        upstream: named.upstream_registry.name().into(),
        repository: named.repository,
        reference: named.reference,
    }
}

fn resolve(name: &str, registry: &ServingState) -> Result<Image, String> {
    let named = ImageRef::parse(name, registry);
    named.map(image_of).map_err(|problem| problem.detail)
}

/// Forwards a request body to the import thread. When the import stops, the remaining body is discarded for a while,
/// because closing the connection on a sender would lose the response.
async fn forward_body(mut body: Body, chunks: tokio::sync::mpsc::Sender<crate::archive::pipe::Chunk>) {
    while let Some(frame) = body.frame().await {
        let chunk = match frame {
            Ok(frame) => match frame.into_data() {
                Ok(bytes) => Ok(bytes),
                Err(_) => continue,
            },
            Err(error) => Err(std::io::Error::other(error)),
        };
        if chunks.send(chunk).await.is_err() {
            break;
        }
    }
    let drain = async { while let Some(Ok(_)) = body.frame().await {} };
    // After the timeout the connection is closed.
    let _ = tokio::time::timeout(DRAIN_MAX, drain).await;
}

impl ImportResult {
    fn of(imported: Imported, is_public: bool) -> Self {
        let images = imported.images.into_iter().map(|image| ImportedImage {
            image: image.name,
            digest: image.digest.to_string(),
            platforms: image.platforms,
            already_cached: image.was_cached,
        });
        Self {
            images: images.collect(),
            objects: imported.objects,
            new_objects: imported.new_objects,
            new_bytes: imported.new_bytes,
            public: is_public,
        }
    }
}

impl From<export::ExportError> for Problem {
    fn from(refused: export::ExportError) -> Self {
        match refused {
            export::ExportError::NotCached(_) => Self::not_found(refused.to_string()),
            export::ExportError::NoPlatform(_)
            | export::ExportError::Incomplete { .. }
            | export::ExportError::Blocked { .. } => Self::new(StatusCode::CONFLICT, refused.to_string()),
            export::ExportError::Store(fault) => fault.into(),
        }
    }
}

impl From<import::ImportError> for Problem {
    fn from(refused: import::ImportError) -> Self {
        match &refused {
            import::ImportError::Unnamed { .. } | import::ImportError::Unknown(_) => {
                Self::bad_request(refused.to_string())
            }
            import::ImportError::Store(StoreError::OverQuota { .. } | StoreError::Full { .. }) => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, refused.to_string())
            }
            import::ImportError::Removed(_) => Self::new(StatusCode::CONFLICT, refused.to_string()),
            import::ImportError::Store(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, refused.to_string())
            }
            _ => Self::new(StatusCode::UNPROCESSABLE_ENTITY, refused.to_string()),
        }
    }
}
