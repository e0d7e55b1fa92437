//! What is known only when someone looks, and so is read when the metrics are.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What is known only when someone looks: read at each scrape.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// Bytes of blobs and manifests held.
    pub store_bytes: u64,
    /// Bytes that may be held.
    pub store_bytes_max: u64,
    /// Blobs and manifests evicted since the start, by the limit that asked for it.
    pub evicted: Vec<(&'static str, u64)>,
    /// Bytes of what was evicted.
    pub evicted_bytes: u64,
    /// How long the image that would go next had not been used at the last eviction: a short time says that the store is
    /// too small.
    pub longest_idle: Option<Duration>,
    /// Blobs passed through because the limits left no room for them.
    pub without_room: u64,
    /// Blobs and manifests that the scrub found damaged since the start.
    pub scrub_damaged: u64,
    /// Errors of the store's disk since the start, by operation.
    pub store_errors: Vec<(&'static str, u64)>,
    /// Whether something keeps the store from storing.
    pub is_store_degraded: bool,
    /// Blobs and manifests held.
    pub store_objects: u64,
    /// Tags known.
    pub store_tags: u64,
    /// Response bytes in memory: read, and not yet written to a socket.
    pub egress_bytes: u64,
    /// Responses that wait for others to end before they read.
    pub egress_waiting: u64,
    /// The queues of requests and transfers.
    pub queues: Vec<QueueGauges>,
    /// Transfers given up, for no client waited for them.
    pub given_up: u64,
    /// Transfers under way.
    pub transfers: u64,
    /// Clients that read from a transfer under way which another one began.
    pub waiters: u64,
    /// Bytes of blobs fetched from upstreams since the start.
    pub fetched_bytes: u64,
    /// Transfers whose bytes were not those of their digest, since the start.
    pub digest_mismatches: u64,
    /// Whether asking is switched off.
    pub offline: bool,
    /// Whether each upstream responds, as its circuit breakers see it.
    pub upstreams: Vec<(Arc<str>, bool)>,
    /// Circuit breakers that are open, by upstream and kind of request.
    pub open_breakers: Vec<(Arc<str>, &'static str, u64)>,
    /// Until when each certificate shown to clients is good: the end of its chain that ends first.
    pub certificates: Vec<(&'static str, SystemTime)>,
    /// What is left of whose allowance.
    pub quotas: Vec<QuotaGauge>,
}

/// A queue, and what became of those that waited in it since the start.
#[derive(Clone, Debug)]
pub struct QueueGauges {
    /// `requests`, of all upstreams together, or `downloads`.
    pub queue: &'static str,
    /// Requests that wait, by class.
    pub waiting: Vec<(&'static str, u64)>,
    /// Places given.
    pub granted: u64,
    /// The waits for them, together.
    pub waited: Duration,
    /// Requests refused, by reason.
    pub refused: Vec<(&'static str, u64)>,
    /// Waits that ended because no client was left.
    pub abandoned: u64,
}

/// What an upstream last said of an allowance.
#[derive(Clone, Debug)]
pub struct QuotaGauge {
    /// The upstream's name.
    pub upstream: Arc<str>,
    /// Whose it is: `anonymous`, `cache`, or `client` for all clients with a credential of their own.
    pub credential: &'static str,
    /// Pulls allowed in a window.
    pub limit: Option<u64>,
    /// Pulls left in it.
    pub remaining: Option<u64>,
    /// When all of them are allowed again, at the latest.
    pub resets_at: Option<SystemTime>,
}
