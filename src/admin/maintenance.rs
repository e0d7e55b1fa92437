//! Store maintenance endpoints: verification, garbage collection and index rebuild.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Admin;
use super::extract::JsonBody;
use super::response::{Problem, blocking, removing};
use crate::store::{EVICTION_MIN_AGE, Store};

/// Default of `unused_for`.
const UNUSED_FOR_DEFAULT: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GcRequest {
    dry_run: bool,
    /// Duration, for example 7d; at least one hour.
    unused_for: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct GcResult {
    dry_run: bool,
    unused_seconds: u64,
    manifests: u64,
    blobs: u64,
    bytes_freed: u64,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct VerifyRequest {
    /// Also rebuild the index from the files.
    #[serde(default)]
    rebuild_index: bool,
}

/// Progress of a verification.
#[derive(Serialize, ToSchema)]
pub(super) struct Verification {
    running: bool,
    complete: bool,
    objects: u64,
    bytes: u64,
    damaged: u64,
    damaged_digests: Vec<String>,
}

impl Verification {
    fn of(store: &Store) -> Json<Self> {
        let verification = store.verification().unwrap_or_default();
        let named = verification.damaged_digests.iter().map(ToString::to_string);
        Json(Self {
            running: verification.is_running,
            complete: verification.is_complete,
            objects: verification.objects,
            bytes: verification.bytes,
            damaged: verification.damaged,
            damaged_digests: named.collect(),
        })
    }
}

/// Delete content without a tag that was not used for `unused_for`.
///
/// With `dry_run`, only report what would be freed.
#[utoipa::path(
    post,
    path = "/api/v1/gc",
    request_body = GcRequest,
    responses((status = 200, body = GcResult))
)]
pub(super) async fn collect(
    State(admin): State<Admin>,
    JsonBody(request): JsonBody<GcRequest>,
) -> Result<Json<GcResult>, Problem> {
    let unused_for = match request.unused_for {
        None => UNUSED_FOR_DEFAULT,
        Some(text) => humantime::parse_duration(&text).map_err(|_| {
            Problem::bad_request(format!("`unused_for` must be a duration as in 7d, not `{text}`"))
        })?,
    };
    let (registry, dry_run) = (admin.registry.load_full(), request.dry_run);
    let freed = removing(move || Ok(registry.proxy.store().blocking().collect(unused_for, dry_run)?)).await?;
    Ok(Json(GcResult {
        dry_run,
        unused_seconds: unused_for.max(EVICTION_MIN_AGE).as_secs(),
        manifests: freed.manifests,
        blobs: freed.blobs,
        bytes_freed: freed.bytes,
    }))
}

/// Start a verification. Only one runs at a time.
///
/// It reads all content and quarantines what does not match its digest. It continues when the client disconnects.
#[utoipa::path(
    post,
    path = "/api/v1/verify",
    request_body = VerifyRequest,
    responses((status = 202, body = Verification))
)]
pub(super) async fn verify(
    State(admin): State<Admin>,
    JsonBody(request): JsonBody<VerifyRequest>,
) -> Result<(StatusCode, Json<Verification>), Problem> {
    let registry = admin.registry.load_full();
    blocking(move || {
        let store = registry.proxy.store().blocking();
        if request.rebuild_index {
            tracing::info!("index rebuild requested");
            store.rebuild_index();
        }
        store.start_verification()?;
        Ok((StatusCode::ACCEPTED, Verification::of(store)))
    })
    .await
}

/// Progress of the last verification.
#[utoipa::path(get, path = "/api/v1/verify", responses((status = 200, body = Verification)))]
pub(super) async fn verification(State(admin): State<Admin>) -> Json<Verification> {
    Verification::of(admin.registry.load().proxy.store().blocking())
}
