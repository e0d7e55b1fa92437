//! Offline mode: `/api/v1/offline`.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Admin;
use super::extract::JsonBody;
use super::response::{Problem, switching};

/// State of offline mode.
#[derive(Serialize, ToSchema)]
pub(super) struct Offline {
    offline: bool,
}

/// State of offline mode, and the previous one.
#[derive(Serialize, ToSchema)]
pub(super) struct OfflineSwitched {
    offline: bool,
    was: bool,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OfflineRequest {
    offline: bool,
}

/// State of offline mode.
#[utoipa::path(get, path = "/api/v1/offline", responses((status = 200, body = Offline)))]
pub(super) async fn offline(State(admin): State<Admin>) -> Json<Offline> {
    Json(Offline {
        offline: admin.offline.is_on(),
    })
}

/// Switch offline mode on or off.
///
/// In offline mode, every upstream is treated as unavailable and cached images are served.
#[utoipa::path(
    post,
    path = "/api/v1/offline",
    request_body = OfflineRequest,
    responses((status = 200, body = OfflineSwitched))
)]
pub(super) async fn switch_offline(
    State(admin): State<Admin>,
    JsonBody(request): JsonBody<OfflineRequest>,
) -> Result<Json<OfflineSwitched>, Problem> {
    let was = admin.switch_offline(request.offline).await?;
    Ok(Json(OfflineSwitched {
        offline: request.offline,
        was,
    }))
}

impl Admin {
    /// Switches offline mode and persists it. Returns the previous state.
    pub(super) async fn switch_offline(&self, on: bool) -> Result<bool, Problem> {
        let was = self.offline.set(on);
        if was != on {
            tracing::warn!(offline = on, "offline mode switched by the operator");
        }
        let registry = self.registry.load_full();
        let persisting = switching(move || {
            if let Err(fault) = registry.proxy.store().blocking().persist_offline(on) {
                tracing::error!(%fault, offline = on, "failed to persist offline mode");
            }
            Ok(was)
        });
        // In a task of its own: the mode is set already, and the client may leave.
        let persisted = tokio::spawn(persisting).await;
        persisted.unwrap_or_else(|_| Err(Problem::task_failed()))
    }
}
