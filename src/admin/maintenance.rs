//! Store maintenance endpoints: verification, garbage collection and index rebuild.

use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Admin;
use super::response::{ApiResponse, Problem, json_response, json_with_status};
use super::router::{blocking, parse_json};
use crate::store::{EVICTION_MIN_AGE, Store};

/// Default of `unused_for`.
const UNUSED_FOR_DEFAULT: Duration = Duration::from_secs(7 * 24 * 3600);

impl Admin {
    /// `POST /api/v1/gc`.
    pub(super) async fn gc_posted(&self, body: &[u8]) -> Result<ApiResponse, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct GcRequest {
            dry_run: bool,
            unused_for: Option<String>,
        }
        let request: GcRequest = parse_json(body)?;
        let unused_for = match request.unused_for {
            None => UNUSED_FOR_DEFAULT,
            Some(text) => humantime::parse_duration(&text).map_err(|_| {
                Problem::bad_request(format!("`unused_for` must be a duration as in 7d, not `{text}`"))
            })?,
        };
        let (registry, is_trial) = (self.registry.load_full(), request.dry_run);
        let freed =
            blocking(move || Ok(registry.proxy.store().blocking().collect(unused_for, is_trial)?)).await?;
        Ok(json_response(&json!({
            "dry_run": is_trial,
            "unused_seconds": unused_for.max(EVICTION_MIN_AGE).as_secs(),
            "manifests": freed.manifests,
            "blobs": freed.blobs,
            "bytes_freed": freed.bytes,
        })))
    }

    /// `POST /api/v1/verify`. The verification continues when the client disconnects.
    pub(super) async fn verify_posted(&self, body: &[u8]) -> Result<ApiResponse, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct VerifyRequest {
            #[serde(default)]
            rebuild_index: bool,
        }
        let request: VerifyRequest = parse_json(body)?;
        let registry = self.registry.load_full();
        blocking(move || {
            let store = registry.proxy.store().blocking();
            if request.rebuild_index {
                tracing::info!("index rebuild requested");
                store.rebuild_index();
            }
            store.start_verification()?;
            Ok(json_with_status(StatusCode::ACCEPTED, &progress(store)))
        })
        .await
    }

    /// `GET /api/v1/verify`.
    pub(super) fn verification(&self) -> ApiResponse {
        json_response(&progress(self.registry.load().proxy.store().blocking()))
    }
}

fn progress(store: &Store) -> Value {
    let verification = store.verification().unwrap_or_default();
    let named = verification.damaged_digests.iter().map(ToString::to_string);
    json!({
        "running": verification.is_running,
        "complete": verification.is_complete,
        "objects": verification.objects,
        "bytes": verification.bytes,
        "damaged": verification.damaged,
        "damaged_digests": named.collect::<Vec<_>>(),
    })
}
