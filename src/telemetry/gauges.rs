//! Gauges sampled at scrape time.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Gauges, and counters kept elsewhere, sampled at each scrape.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// Bytes of cached blobs and manifests.
    pub store_bytes: u64,
    /// Quota of the store in bytes.
    pub store_bytes_max: u64,
    /// Evicted blobs and manifests since the start, by the limit that required it.
    pub evicted: Vec<(&'static str, u64)>,
    /// Bytes of the evicted content.
    pub evicted_bytes: u64,
    /// Idle time of the next image to evict, at the last eviction. A short time means that the store is too small.
    pub longest_idle: Option<Duration>,
    /// Blobs passed through because they did not fit into the quota.
    pub over_quota: u64,
    /// Damaged blobs and manifests found by the scrub since the start.
    pub scrub_damaged: u64,
    /// Disk errors of the store since the start, by operation.
    pub store_errors: Vec<(&'static str, u64)>,
    /// Whether the store cannot store content.
    pub is_store_degraded: bool,
    /// Number of cached blobs and manifests.
    pub store_objects: u64,
    /// Number of cached tags.
    pub store_tags: u64,
    /// Response bytes read into memory and not yet written to a socket.
    pub egress_bytes: u64,
    /// Responses that wait for other responses to end.
    pub egress_waiting: u64,
    /// The queues of requests and transfers.
    pub queues: Vec<QueueGauges>,
    /// Transfers cancelled because no client waited for them.
    pub downloads_abandoned: u64,
    /// Transfers in progress.
    pub transfers: u64,
    /// Clients that read from a transfer started by another client.
    pub waiters: u64,
    /// Bytes of blobs fetched from upstreams since the start.
    pub fetched_bytes: u64,
    /// Transfers whose bytes did not match their digest, since the start.
    pub digest_mismatches: u64,
    /// Whether offline mode is on.
    pub offline: bool,
    /// Ended scheduled refreshes since the start, by result.
    pub refresh_runs: Vec<(&'static str, u64)>,
    /// Tags under a rule with `refresh`, by state.
    pub refresh_tags: Vec<(&'static str, u64)>,
    /// How long the refresh that is waiting longest is late.
    pub refresh_overdue: Duration,
    /// Whether each upstream responds, according to its circuit breakers.
    pub upstreams: Vec<(Arc<str>, bool)>,
    /// Open circuit breakers, by upstream and kind of request.
    pub open_breakers: Vec<(Arc<str>, &'static str, u64)>,
    /// Expiry of each certificate used for clients: the earliest in its chain.
    pub certificates: Vec<(&'static str, SystemTime)>,
    /// The pull quotas.
    pub quotas: Vec<QuotaGauge>,
}

/// A queue, with totals since the start.
#[derive(Clone, Debug)]
pub struct QueueGauges {
    /// `requests` (of all upstreams together) or `downloads`.
    pub queue: &'static str,
    /// Waiting requests, by class.
    pub waiting: Vec<(&'static str, u64)>,
    /// Permits granted.
    pub granted: u64,
    /// Total time waited for them.
    pub waited: Duration,
    /// Rejected requests, by reason.
    pub refused: Vec<(&'static str, u64)>,
    /// Waits that ended because no client was left.
    pub abandoned: u64,
}

/// A pull quota, as the upstream last reported it.
#[derive(Clone, Debug)]
pub struct QuotaGauge {
    /// The upstream's name.
    pub upstream: Arc<str>,
    /// Its owner: `anonymous`, `own`, or `client` for all clients with their own credential.
    pub credential: &'static str,
    /// Pulls allowed per window.
    pub limit: Option<u64>,
    /// Remaining pulls.
    pub remaining: Option<u64>,
    /// The latest time at which the full quota is available again.
    pub resets_at: Option<SystemTime>,
}
