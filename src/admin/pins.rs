//! Pins: `/api/v1/pins`.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Admin;
use super::extract::JsonBody;
use super::image_ref::ImageRef;
use super::response::{Problem, switching};
use crate::oci::{AnyDigest, Reference};
use crate::server::ServingState;
use crate::store::pins::Pin;

#[derive(Serialize, ToSchema)]
pub(super) struct Pins {
    /// Full names of tags, and digests.
    pins: Vec<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PinRequest {
    image: String,
    pinned: bool,
}

#[derive(Serialize, ToSchema)]
pub(super) struct PinResult {
    image: String,
    pinned: bool,
    /// Whether it was pinned before.
    was: bool,
}

/// List of pins.
#[utoipa::path(get, path = "/api/v1/pins", responses((status = 200, body = Pins)))]
pub(super) async fn pins(State(admin): State<Admin>) -> Json<Pins> {
    let pins = admin.registry.load().proxy.store().blocking().pins();
    Json(Pins {
        pins: pins.iter().map(Pin::to_string).collect(),
    })
}

/// Pin or unpin a tag or digest.
///
/// Pinned content is not evicted. A pinned tag protects the image that it names, now and later. The image need not be
/// cached.
#[utoipa::path(
    post,
    path = "/api/v1/pins",
    request_body = PinRequest,
    responses((status = 200, body = PinResult))
)]
pub(super) async fn pin(
    State(admin): State<Admin>,
    JsonBody(request): JsonBody<PinRequest>,
) -> Result<Json<PinResult>, Problem> {
    let (image, was) = admin.pin(&request.image, request.pinned).await?;
    Ok(Json(PinResult {
        image,
        pinned: request.pinned,
        was,
    }))
}

impl Admin {
    /// Pins or unpins an image. Returns its full name and the previous state.
    pub(super) async fn pin(&self, image: &str, pinned: bool) -> Result<(String, bool), Problem> {
        let registry = self.registry.load_full();
        let named = ImageRef::parse(image, &registry)?;
        let name = named.to_string();
        switching(move || {
            let was = set_pin(&registry, &named, pinned)?;
            // Here, because a client that leaves ends only the task that waits.
            tracing::info!(image = name, pinned, "pin changed on request");
            Ok((name, was))
        })
        .await
    }
}

/// Pins a tag or a digest, or removes the pin. A pinned tag protects its current and later images. Returns the
/// previous state. The image need not be cached yet.
fn set_pin(registry: &ServingState, named: &ImageRef, pinned: bool) -> Result<bool, Problem> {
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
