//! Running downloads: `/api/v1/transfers`.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::Admin;
use crate::server::ServingState;

/// A running download.
#[derive(Serialize, ToSchema)]
pub(super) struct TransferView {
    pub(super) digest: String,
    pub(super) size: Option<u64>,
    pub(super) received: u64,
    /// Average since the start of the download.
    pub(super) bytes_per_second: u64,
    pub(super) seconds: f64,
    /// Current readers.
    pub(super) readers: usize,
    /// Whether it waits for a download permit.
    pub(super) queued: bool,
}

/// Downloads in progress.
#[derive(Serialize, ToSchema)]
pub(super) struct Transfers {
    transfers: Vec<TransferView>,
}

/// Downloads in progress.
#[utoipa::path(get, path = "/api/v1/transfers", responses((status = 200, body = Transfers)))]
pub(super) async fn transfers(State(admin): State<Admin>) -> Json<Transfers> {
    Json(Transfers {
        transfers: running(&admin.registry.load()),
    })
}

/// Running downloads, longest running first.
pub(super) fn running(registry: &ServingState) -> Vec<TransferView> {
    let transfers = registry.proxy.downloads().statuses();
    transfers
        .into_iter()
        .map(|transfer| {
            let ms = u64::try_from(transfer.elapsed.as_millis())
                .unwrap_or(u64::MAX)
                .max(1);
            TransferView {
                digest: transfer.digest.to_string(),
                size: transfer.size,
                received: transfer.received,
                bytes_per_second: transfer.received.saturating_mul(1_000) / ms,
                seconds: transfer.elapsed.as_secs_f64(),
                readers: transfer.readers,
                queued: transfer.is_queued,
            }
        })
        .collect()
}
