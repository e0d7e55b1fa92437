//! What the operator has the store do: read everything again, let go of what is unused, make its index anew.

use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Admin;
use super::reply::{Problem, Reply, answer, with_status};
use super::routes::{blocking, parse};
use crate::store::{Store, YOUNG};

/// What was not used for so long goes, if nothing else is said.
const UNUSED_FOR: Duration = Duration::from_secs(7 * 24 * 3600);

impl Admin {
    /// `POST /api/v1/gc`.
    pub(super) async fn gc_posted(&self, body: &[u8]) -> Result<Reply, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Wanted {
            dry_run: bool,
            unused_for: Option<String>,
        }
        let wanted: Wanted = parse(body)?;
        let unused_for = match wanted.unused_for {
            None => UNUSED_FOR,
            Some(text) => humantime::parse_duration(&text)
                .map_err(|_| Problem::bad(format!("`unused_for` is a time as in 7d, not `{text}`")))?,
        };
        let (registry, is_trial) = (self.registry.load_full(), wanted.dry_run);
        let freed =
            blocking(move || Ok(registry.pull.store().blocking().collect(unused_for, is_trial)?)).await?;
        Ok(answer(&json!({
            "dry_run": is_trial,
            "unused_seconds": unused_for.max(YOUNG).as_secs(),
            "manifests": freed.manifests,
            "blobs": freed.blobs,
            "bytes_freed": freed.bytes,
        })))
    }

    /// `POST /api/v1/verify`. The reading goes on when whoever asked for it has gone.
    pub(super) async fn verify_posted(&self, body: &[u8]) -> Result<Reply, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Wanted {
            #[serde(default)]
            rebuild_index: bool,
        }
        let wanted: Wanted = parse(body)?;
        let registry = self.registry.load_full();
        blocking(move || {
            let store = registry.pull.store().blocking();
            if wanted.rebuild_index {
                tracing::info!("the index is made anew at the operator's wish");
                store.rebuild_index();
            }
            store.begin_verification()?;
            Ok(with_status(StatusCode::ACCEPTED, &progress(store)))
        })
        .await
    }

    /// `GET /api/v1/verify`.
    pub(super) fn verification(&self) -> Reply {
        answer(&progress(self.registry.load().pull.store().blocking()))
    }
}

fn progress(store: &Store) -> Value {
    let verification = store.verification().unwrap_or_default();
    let named = verification.named.iter().map(ToString::to_string);
    json!({
        "running": verification.is_running,
        "complete": verification.is_whole,
        "objects": verification.objects,
        "bytes": verification.bytes,
        "damaged": verification.damaged,
        "damaged_digests": named.collect::<Vec<_>>(),
    })
}
