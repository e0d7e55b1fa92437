//! What is worth telling: each answer becomes one log line and one count, from the same named reasons.
//!
//! Labels name the upstream, never a repository or a tag: their number would have no bound, and private names would
//! leave by the metrics.

mod decisions;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

pub use decisions::{DECISIONS_MAX, Decision};

use decisions::Decisions;

/// One answer to a client.
#[derive(Debug)]
pub struct Answered<'a> {
    /// The upstream's name; `-` where none was reached.
    pub upstream: &'a str,
    /// Through which door the client came; `-` where it was turned away before.
    pub door: &'static str,
    /// What was asked for.
    pub kind: Kind,
    /// What the client asked for, as path. For the log only.
    pub path: &'a str,
    /// Whether bytes came from the store, the upstream, or neither.
    pub result: Outcome,
    /// The reason's name.
    pub reason: &'static str,
    /// The status sent.
    pub status: u16,
    /// From the request's head to the answer's head.
    pub took: Duration,
}

/// What kind of thing was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/v2/`
    Ping,
    /// A manifest by tag.
    Tag,
    /// A manifest by digest.
    Manifest,
    /// A blob.
    Blob,
    /// Tags or referrers.
    Listing,
    /// A push, a deletion, or a part of one.
    Write,
    /// `CONNECT`
    Connect,
    /// None of these.
    Other,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::Tag => "tag",
            Self::Manifest => "manifest",
            Self::Blob => "blob",
            Self::Listing => "listing",
            Self::Write => "write",
            Self::Connect => "connect",
            Self::Other => "other",
        }
    }
}

/// How an answer came about, coarsely: what a hit ratio is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Served from the store.
    Hit,
    /// Served from the store while the upstream could not be asked.
    Stale,
    /// Fetched for this client.
    Miss,
    /// Fetched in a transfer that another client had begun.
    Coalesced,
    /// Answered without bytes of an image.
    Local,
    /// Handed on to the upstream.
    Passed,
    /// Refused.
    Refused,
}

impl Outcome {
    /// The name in the log, the metrics and the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Stale => "stale",
            Self::Miss => "miss",
            Self::Coalesced => "coalesced",
            Self::Local => "local",
            Self::Passed => "passed",
            Self::Refused => "refused",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    registry: Arc<str>,
    door: &'static str,
    kind: &'static str,
    result: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabels {
    limit: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabels {
    registry: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AllowanceLabels {
    registry: Arc<str>,
    credential: &'static str,
}

/// Where response bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BytesFrom {
    /// The store.
    Disk,
    /// A download that may be shared.
    Download,
    /// An answer that was handed back.
    Passed,
}

/// What is known only when someone looks: read at each scrape.
#[derive(Clone, Debug, Default)]
pub struct Levels {
    /// Bytes of blobs and manifests held.
    pub store_bytes: u64,
    /// Blobs and manifests held.
    pub store_objects: u64,
    /// How much the store may hold, in bytes.
    pub store_bytes_max: u64,
    /// Blobs and manifests evicted since the start, by the limit that asked for it.
    pub evicted: Vec<(&'static str, u64)>,
    /// Their bytes.
    pub evicted_bytes: u64,
    /// Blobs passed through since the start because the limits left no room for them.
    pub without_room: u64,
    /// Blobs and manifests that the scrub found damaged since the start.
    pub scrub_damaged: u64,
    /// Whether something keeps the store from storing.
    pub is_store_degraded: bool,
    /// Transfers under way.
    pub transfers: u64,
    /// Whether each upstream answers, as its breaker sees it.
    pub upstreams: Vec<(Arc<str>, bool)>,
    /// What is left of whose allowance.
    pub allowances: Vec<AllowanceLevel>,
}

/// What an upstream last said of an allowance.
#[derive(Clone, Debug)]
pub struct AllowanceLevel {
    /// The upstream's name.
    pub upstream: Arc<str>,
    /// Whose it is: `anonymous`, `own`, or `client` for all clients with a credential of their own.
    pub credential: &'static str,
    /// Pulls allowed in a window.
    pub limit: Option<u64>,
    /// Pulls left in it.
    pub remaining: Option<u64>,
}

/// Counts and tells.
#[derive(Clone)]
pub struct Events {
    requests: Family<RequestLabels, Counter>,
    seconds: Histogram,
    disk_bytes: Counter,
    download_bytes: Counter,
    passed_bytes: Counter,
    tunnel_bytes: Family<DirectionLabels, Counter>,
    tunnels: Gauge<u64, AtomicU64>,
    store_bytes: Gauge<u64, AtomicU64>,
    store_objects: Gauge<u64, AtomicU64>,
    store_bytes_max: Gauge<u64, AtomicU64>,
    store_degraded: Gauge<u64, AtomicU64>,
    evicted: Family<LimitLabels, Counter>,
    evicted_bytes: Counter,
    without_room: Counter,
    scrub_damaged: Counter,
    transfers: Gauge<u64, AtomicU64>,
    upstream_up: Family<UpstreamLabels, Gauge<u64, AtomicU64>>,
    rate_limit: Family<AllowanceLabels, Gauge<u64, AtomicU64>>,
    rate_limit_remaining: Family<AllowanceLabels, Gauge<u64, AtomicU64>>,
    decisions: Decisions,
    registry: Arc<Registry>,
}

/// Counts what a tunnel carries.
pub struct Tunnel {
    sent: Counter,
    received: Counter,
    open: Gauge<u64, AtomicU64>,
}

impl Tunnel {
    /// Counts bytes carried to the host.
    pub fn to_host(&self, bytes: u64) {
        self.sent.inc_by(bytes);
    }

    /// Counts bytes carried to the client.
    pub fn to_client(&self, bytes: u64) {
        self.received.inc_by(bytes);
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.open.dec();
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

impl Events {
    /// Nothing counted yet.
    pub fn new() -> Self {
        let bytes = Family::<SourceLabels, Counter>::default();
        let mut events = Self {
            requests: Family::default(),
            seconds: Histogram::new([0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0]),
            disk_bytes: bytes.get_or_create_owned(&SourceLabels { source: "disk" }),
            download_bytes: bytes.get_or_create_owned(&SourceLabels { source: "download" }),
            passed_bytes: bytes.get_or_create_owned(&SourceLabels { source: "passed" }),
            tunnel_bytes: Family::default(),
            tunnels: Gauge::default(),
            store_bytes: Gauge::default(),
            store_objects: Gauge::default(),
            store_bytes_max: Gauge::default(),
            store_degraded: Gauge::default(),
            evicted: Family::default(),
            evicted_bytes: Counter::default(),
            without_room: Counter::default(),
            scrub_damaged: Counter::default(),
            transfers: Gauge::default(),
            upstream_up: Family::default(),
            rate_limit: Family::default(),
            rate_limit_remaining: Family::default(),
            decisions: Decisions::default(),
            registry: Arc::default(),
        };
        let mut registry = Registry::with_prefix("ifnewer");
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program that runs", version);
        registry.register(
            "requests",
            "Answers to clients, by their reason",
            events.requests.clone(),
        );
        registry.register_with_unit(
            "response",
            "Bytes of blobs sent to clients, by where they came from",
            Unit::Bytes,
            bytes,
        );
        registry.register_with_unit(
            "tunnel",
            "Bytes carried unread by CONNECT, by their direction",
            Unit::Bytes,
            events.tunnel_bytes.clone(),
        );
        registry.register("tunnels", "Tunnels open now", events.tunnels.clone());
        registry.register_with_unit(
            "request_duration",
            "From a request's head to its answer's head",
            Unit::Seconds,
            events.seconds.clone(),
        );
        events.register_store(&mut registry);
        registry.register(
            "transfers_in_progress",
            "Downloads under way",
            events.transfers.clone(),
        );
        registry.register(
            "upstream_up",
            "1 while the upstream answers, 0 while its breaker is open",
            events.upstream_up.clone(),
        );
        registry.register(
            "upstream_ratelimit_limit",
            "Pulls allowed in the upstream's window, where it says so, by whose they are",
            events.rate_limit.clone(),
        );
        registry.register(
            "upstream_ratelimit_remaining",
            "Pulls left in the upstream's window, where it says so; of several clients, the fewest",
            events.rate_limit_remaining.clone(),
        );
        events.registry = Arc::new(registry);
        events
    }

    fn register_store(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "store",
            "Bytes of blobs and manifests held",
            Unit::Bytes,
            self.store_bytes.clone(),
        );
        registry.register(
            "store_objects",
            "Blobs and manifests held",
            self.store_objects.clone(),
        );
        registry.register_with_unit(
            "store_limit",
            "How much the store may hold",
            Unit::Bytes,
            self.store_bytes_max.clone(),
        );
        registry.register(
            "store_degraded",
            "1 while something keeps the store from storing; /readyz says what",
            self.store_degraded.clone(),
        );
        registry.register(
            "store_evicted",
            "Blobs and manifests evicted, by the limit that asked for it",
            self.evicted.clone(),
        );
        registry.register_with_unit(
            "store_evicted",
            "Bytes of what was evicted",
            Unit::Bytes,
            self.evicted_bytes.clone(),
        );
        registry.register(
            "store_without_room",
            "Blobs passed through because the limits left no room for them",
            self.without_room.clone(),
        );
        registry.register(
            "store_scrub_damaged",
            "Blobs and manifests that the disk had changed, found by reading them again",
            self.scrub_damaged.clone(),
        );
    }

    /// Tells of an answer. A pull by tag is where a decision was made, so it is told at `info`; the rest at `debug`.
    pub fn answered(&self, answered: &Answered<'_>) {
        let Answered {
            upstream,
            door,
            kind,
            path,
            result,
            reason,
            status,
            took,
        } = *answered;
        let labels = RequestLabels {
            registry: upstream.into(),
            door,
            kind: kind.name(),
            result: result.name(),
            reason,
        };
        self.requests.get_or_create(&labels).inc();
        self.seconds.observe(took.as_secs_f64());
        // Three digits behind the point: a log is read by people.
        let ms = (took.as_secs_f64() * 1e6).round() / 1e3;
        let result = result.name();
        if matches!(kind, Kind::Tag | Kind::Write | Kind::Connect) || status >= 500 {
            tracing::info!(upstream, door, path, status, result, reason, ms, "answered");
        } else {
            tracing::debug!(upstream, door, path, status, result, reason, ms, "answered");
        }
    }

    /// Keeps a decision for those who ask later. Its number is given here.
    pub fn decided(&self, decision: Decision) {
        self.decisions.keep(decision);
    }

    /// The decisions after `number`, the newest first, at most `limit`.
    pub fn decisions(&self, number: u64, limit: usize) -> Vec<Arc<Decision>> {
        self.decisions.after(number, limit)
    }

    /// Counts bytes of a blob sent.
    pub fn sent(&self, from: BytesFrom, bytes: u64) {
        match from {
            BytesFrom::Disk => self.disk_bytes.inc_by(bytes),
            BytesFrom::Download => self.download_bytes.inc_by(bytes),
            BytesFrom::Passed => self.passed_bytes.inc_by(bytes),
        };
    }

    /// A tunnel is open until what is given is dropped.
    pub fn tunnel(&self) -> Tunnel {
        self.tunnels.inc();
        let counter = |direction| {
            self.tunnel_bytes
                .get_or_create_owned(&DirectionLabels { direction })
        };
        Tunnel {
            sent: counter("to-host"),
            received: counter("to-client"),
            open: self.tunnels.clone(),
        }
    }

    /// The metrics as text, with the levels of this moment.
    pub fn text(&self, levels: &Levels) -> String {
        self.store_bytes.set(levels.store_bytes);
        self.store_objects.set(levels.store_objects);
        self.store_bytes_max.set(levels.store_bytes_max);
        self.store_degraded.set(u64::from(levels.is_store_degraded));
        for (limit, count) in &levels.evicted {
            let evicted = self.evicted.get_or_create(&LimitLabels { limit });
            evicted.inner().store(*count, Ordering::Relaxed);
        }
        let counted = |counter: &Counter, count| counter.inner().store(count, Ordering::Relaxed);
        counted(&self.evicted_bytes, levels.evicted_bytes);
        counted(&self.without_room, levels.without_room);
        counted(&self.scrub_damaged, levels.scrub_damaged);
        self.transfers.set(levels.transfers);
        for (name, up) in &levels.upstreams {
            let labels = UpstreamLabels {
                registry: Arc::clone(name),
            };
            self.upstream_up.get_or_create(&labels).set(u64::from(*up));
        }
        for level in &levels.allowances {
            let labels = AllowanceLabels {
                registry: Arc::clone(&level.upstream),
                credential: level.credential,
            };
            if let Some(limit) = level.limit {
                self.rate_limit.get_or_create(&labels).set(limit);
            }
            if let Some(remaining) = level.remaining {
                self.rate_limit_remaining.get_or_create(&labels).set(remaining);
            }
        }
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
