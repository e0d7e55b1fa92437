//! Shared storage endpoint: state of the bucket, and its use since the start.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::Admin;

/// State of the shared storage.
#[derive(Serialize, ToSchema)]
pub(super) struct Shared {
    /// Null without a bucket.
    pub(super) storage: Option<SharedView>,
}

/// State of the bucket.
#[derive(Serialize, ToSchema)]
pub(super) struct SharedView {
    pub(super) name: String,
    /// Whether this cache writes to it.
    pub(super) write: bool,
    /// Whether the storage lets one of simultaneous conditional writes win. Null before the first upload.
    pub(super) conditions_kept: Option<bool>,
    /// Since when the circuit breaker stops reads, and why.
    pub(super) reads_stopped: Option<Stopped>,
    /// Since when the circuit breaker stops uploads, and why.
    pub(super) writes_stopped: Option<Stopped>,
    /// Uploads that are queued or running.
    pub(super) uploads_waiting: u64,
    /// Denials by an upstream that the bucket does not have yet. Null: none.
    pub(super) revocations_waiting: Option<Revocations>,
    pub(super) since_start: SharedCounters,
}

/// An open circuit breaker.
#[derive(Serialize, ToSchema)]
#[schema(as = SharedStopped)]
pub(super) struct Stopped {
    pub(super) seconds: u64,
    pub(super) failure: String,
}

/// Denials by an upstream that the bucket does not have yet. Until then, other caches may honour the ended rights in an outage.
#[derive(Serialize, ToSchema)]
#[schema(as = SharedRevocations)]
pub(super) struct Revocations {
    pub(super) count: u64,
    /// Age of the oldest one. After a restart it counts from the start of the process.
    pub(super) oldest_seconds: u64,
}

/// Use of the bucket since the start.
#[derive(Serialize, ToSchema)]
pub(super) struct SharedCounters {
    pub(super) objects_read: u64,
    pub(super) received_bytes: u64,
    pub(super) objects_uploaded: u64,
    pub(super) sent_bytes: u64,
    /// Uploads that failed, or were dropped because the queue was full.
    pub(super) uploads_lost: u64,
    /// Objects that did not match their digest.
    pub(super) wrong_objects: u64,
}

/// State of the shared storage, and its use since the start.
#[utoipa::path(get, path = "/api/v1/shared", responses((status = 200, body = Shared)))]
pub(super) async fn shared(State(admin): State<Admin>) -> Json<Shared> {
    Json(Shared {
        storage: view(&admin),
    })
}

/// State of the bucket, if there is one.
pub(super) fn view(admin: &Admin) -> Option<SharedView> {
    let status = admin.registry.load().proxy.shared().status()?;
    let counts = admin.telemetry.shared().counts();
    let stopped = |(since, failure): (Duration, Arc<str>)| Stopped {
        seconds: since.as_secs(),
        failure: failure.to_string(),
    };
    let waiting = |(count, oldest): (usize, Duration)| Revocations {
        count: count as u64,
        oldest_seconds: oldest.as_secs(),
    };
    Some(SharedView {
        name: status.name.to_string(),
        write: status.write,
        conditions_kept: status.conditions_kept,
        reads_stopped: status.reads_stopped.map(stopped),
        writes_stopped: status.writes_stopped.map(stopped),
        uploads_waiting: counts.uploads_waiting,
        revocations_waiting: status.revocations_waiting.map(waiting),
        since_start: SharedCounters {
            objects_read: counts.objects_read,
            received_bytes: counts.received_bytes,
            objects_uploaded: counts.objects_uploaded,
            sent_bytes: counts.sent_bytes,
            uploads_lost: counts.uploads_lost,
            wrong_objects: counts.wrong_objects,
        },
    })
}
