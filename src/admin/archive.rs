//! Archive endpoints: `GET /api/v1/export` and `POST /api/v1/import`.

use std::time::Duration;

use http::StatusCode;
use http::header::{CONTENT_DISPOSITION, CONTENT_LENGTH, HeaderValue};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::spawn_blocking;

use super::Admin;
use super::image_ref::ImageRef;
use super::pull_jobs::Platforms;
use super::response::{ApiResponse, Problem, json_response, stream};
use super::router::{blocking, bool_param};
use crate::archive::Image;
use crate::archive::export::{self, Plan};
use crate::archive::import::{self, ImportOptions, Imported};
use crate::archive::pipe::{PipeReader, PipeWriter, pipe};
use crate::oci::Query;
use crate::server::ServingState;
use crate::store::StoreError;

/// Content type of an archive.
pub(super) const TAR: &str = "application/x-tar";

/// Maximum number of concurrent imports and exports.
pub(super) const ARCHIVES_MAX: usize = 2;

/// How long a rejected upload is still read. A client that is still sending may not have read the error response yet.
const DRAIN_MAX: Duration = Duration::from_secs(10);

impl Admin {
    /// `GET /api/v1/export`.
    pub(super) async fn export(&self, query: &Query) -> Result<ApiResponse, Problem> {
        let registry = self.registry.load_full();
        let images = query.get("image").unwrap_or_default().split(',');
        let images = images.map(|image| Ok(image_of(ImageRef::parse(image, &registry)?)));
        let images = images.collect::<Result<Vec<Image>, Problem>>()?;
        let platforms = query.get("platform").filter(|platforms| !platforms.is_empty());
        let platforms =
            platforms.map(|these| Platforms::Selected(these.split(',').map(str::to_owned).collect()));
        let permit = self.acquire_archive_permit()?;
        let now = self.clock.now();
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
        let mut reply = stream(TAR, body, bytes);
        let name = HeaderValue::from_static("attachment; filename=\"images.tar\"");
        reply.headers_mut().insert(CONTENT_DISPOSITION, name);
        reply.headers_mut().insert(CONTENT_LENGTH, bytes.into());
        Ok(reply)
    }

    /// `POST /api/v1/import`.
    pub(super) async fn import(&self, query: &Query, body: Incoming) -> Result<ApiResponse, Problem> {
        let is_public = bool_param(query, "public")?;
        let name = query
            .get("image")
            .filter(|name| !name.is_empty())
            .map(str::to_owned);
        let permit = self.acquire_archive_permit()?;
        let (registry, now) = (self.registry.load_full(), self.clock.now());
        let (chunks, archive) = pipe();
        tokio::spawn(forward_body(body, chunks));
        let mut archive = PipeReader::new(archive);
        let imported = blocking(move || {
            let _permit = permit;
            let options = ImportOptions {
                resolve: &|name| resolve(name, &registry),
                name,
                is_public,
                now,
            };
            Ok(import::import(
                registry.proxy.store().blocking(),
                &mut archive,
                &options,
            )?)
        })
        .await?;
        for image in &imported.images {
            tracing::info!(image = image.name, digest = %image.digest, is_public, "image imported");
        }
        Ok(import_response(&imported, is_public))
    }

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
async fn forward_body(mut body: Incoming, chunks: tokio::sync::mpsc::Sender<crate::archive::pipe::Chunk>) {
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

fn import_response(imported: &Imported, is_public: bool) -> ApiResponse {
    let images = imported.images.iter().map(|image| {
        json!({
            "image": image.name,
            "digest": image.digest.to_string(),
            "platforms": image.platforms,
            "already_cached": image.was_cached,
        })
    });
    json_response(&json!({
        "images": images.collect::<Vec<_>>(),
        "objects": imported.objects,
        "new_objects": imported.new_objects,
        "new_bytes": imported.new_bytes,
        "public": is_public,
    }))
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
            import::ImportError::Store(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, refused.to_string())
            }
            _ => Self::new(StatusCode::UNPROCESSABLE_ENTITY, refused.to_string()),
        }
    }
}
