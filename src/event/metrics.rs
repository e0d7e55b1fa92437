//! The counts, in the conventions of Prometheus: base units, `_total`, one unit to a name.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::{Answered, BytesFrom, Client, Kind, Outcome, Totals};

type Level = Gauge<u64, AtomicU64>;

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
struct ExchangeLabels {
    registry: Arc<str>,
    op: &'static str,
    code: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AllowanceLabels {
    registry: Arc<str>,
    credential: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClientLabels {
    client: &'static str,
}

/// What is known only when someone looks: read at each scrape.
#[derive(Clone, Debug, Default)]
pub struct Levels {
    /// Bytes of blobs and manifests held.
    pub store_bytes: u64,
    /// Bytes that may be held.
    pub store_bytes_max: u64,
    /// Blobs and manifests evicted since the start, by the limit that asked for it.
    pub evicted: Vec<(&'static str, u64)>,
    /// Bytes of what was evicted.
    pub evicted_bytes: u64,
    /// Blobs passed through because the limits left no room for them.
    pub without_room: u64,
    /// Blobs and manifests that the scrub found damaged since the start.
    pub scrub_damaged: u64,
    /// Whether something keeps the store from storing.
    pub is_store_degraded: bool,
    /// Blobs and manifests held.
    pub store_objects: u64,
    /// Tags known.
    pub store_tags: u64,
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

/// Counts what a tunnel carries.
pub struct Tunnel {
    sent: Counter,
    received: Counter,
    open: Level,
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

/// Everything counted.
pub(super) struct Metrics {
    requests: Family<RequestLabels, Counter>,
    seconds: Histogram,
    stale_age_seconds: Histogram,
    disk_bytes: Counter,
    download_bytes: Counter,
    passed_bytes: Counter,
    tunnel_bytes: Family<DirectionLabels, Counter>,
    tunnels: Level,
    fetched_bytes: Counter,
    digest_mismatches: Counter,
    exchanges: Family<ExchangeLabels, Counter>,
    exchange_seconds: Family<UpstreamLabels, Histogram>,
    store_bytes: Level,
    store_bytes_max: Level,
    store_degraded: Level,
    evicted: Family<LimitLabels, Counter>,
    evicted_bytes: Counter,
    without_room: Counter,
    scrub_damaged: Counter,
    store_objects: Level,
    store_tags: Level,
    transfers: Level,
    waiters: Level,
    offline: Level,
    upstream_up: Family<UpstreamLabels, Level>,
    rate_limit: Family<AllowanceLabels, Level>,
    rate_limit_remaining: Family<AllowanceLabels, Level>,
    client_seen: Family<ClientLabels, Level>,
    totals: Counts,
    registry: Registry,
}

/// [`Totals`] as they are counted.
#[derive(Default)]
struct Counts {
    pulls: AtomicU64,
    hits: AtomicU64,
    stale: AtomicU64,
    refused: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Self {
        let bytes = Family::<SourceLabels, Counter>::default();
        let latency = || Histogram::new([0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0]);
        let mut metrics = Self {
            requests: Family::default(),
            seconds: latency(),
            stale_age_seconds: Histogram::new([60.0, 600.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0]),
            disk_bytes: bytes.get_or_create_owned(&SourceLabels { source: "disk" }),
            download_bytes: bytes.get_or_create_owned(&SourceLabels { source: "download" }),
            passed_bytes: bytes.get_or_create_owned(&SourceLabels { source: "passed" }),
            tunnel_bytes: Family::default(),
            tunnels: Level::default(),
            fetched_bytes: Counter::default(),
            digest_mismatches: Counter::default(),
            exchanges: Family::default(),
            exchange_seconds: Family::new_with_constructor(latency),
            store_bytes: Level::default(),
            store_bytes_max: Level::default(),
            store_degraded: Level::default(),
            evicted: Family::default(),
            evicted_bytes: Counter::default(),
            without_room: Counter::default(),
            scrub_damaged: Counter::default(),
            store_objects: Level::default(),
            store_tags: Level::default(),
            transfers: Level::default(),
            waiters: Level::default(),
            offline: Level::default(),
            upstream_up: Family::default(),
            rate_limit: Family::default(),
            rate_limit_remaining: Family::default(),
            client_seen: Family::default(),
            totals: Counts::default(),
            registry: Registry::with_prefix("ifnewer"),
        };
        metrics.register_front(bytes);
        metrics.register_upstreams();
        metrics.register_store();
        metrics
    }
}

impl Metrics {
    fn register_front(&mut self, bytes: Family<SourceLabels, Counter>) {
        let registry = &mut self.registry;
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program that runs", version);
        registry.register(
            "requests",
            "Answers to clients, by their reason",
            self.requests.clone(),
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
            self.tunnel_bytes.clone(),
        );
        registry.register("tunnels", "Tunnels open now", self.tunnels.clone());
        registry.register_with_unit(
            "request_duration",
            "From a request's head to its answer's head",
            Unit::Seconds,
            self.seconds.clone(),
        );
        registry.register_with_unit(
            "stale_age",
            "How long ago the upstream confirmed what was served while it was silent",
            Unit::Seconds,
            self.stale_age_seconds.clone(),
        );
        registry.register_with_unit(
            "client_last_request_timestamp",
            "When a client of this kind was last seen, in seconds since 1970",
            Unit::Seconds,
            self.client_seen.clone(),
        );
    }

    fn register_upstreams(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "upstream_requests",
            "Exchanges with upstreams: what was asked, and the status or the kind of silence that came of it",
            self.exchanges.clone(),
        );
        registry.register_with_unit(
            "upstream_request_duration",
            "From asking an upstream to its answer's head, tokens and redirects included",
            Unit::Seconds,
            self.exchange_seconds.clone(),
        );
        registry.register_with_unit(
            "fetched",
            "Bytes of blobs fetched from upstreams",
            Unit::Bytes,
            self.fetched_bytes.clone(),
        );
        registry.register(
            "digest_mismatch",
            "Transfers whose bytes were not those of their digest",
            self.digest_mismatches.clone(),
        );
        registry.register(
            "upstream_up",
            "1 while the upstream answers, 0 while its breaker is open",
            self.upstream_up.clone(),
        );
        registry.register(
            "offline",
            "1 while the operator has switched asking off",
            self.offline.clone(),
        );
        registry.register(
            "upstream_ratelimit_limit",
            "Pulls allowed in the upstream's window, where it says so, by whose they are",
            self.rate_limit.clone(),
        );
        registry.register(
            "upstream_ratelimit_remaining",
            "Pulls left in the upstream's window, where it says so; of several clients, the fewest",
            self.rate_limit_remaining.clone(),
        );
    }

    fn register_store(&mut self) {
        let registry = &mut self.registry;
        registry.register_with_unit(
            "store",
            "Bytes of blobs and manifests held",
            Unit::Bytes,
            self.store_bytes.clone(),
        );
        registry.register_with_unit(
            "store_limit",
            "Bytes that may be held",
            Unit::Bytes,
            self.store_bytes_max.clone(),
        );
        registry.register(
            "store_objects",
            "Blobs and manifests held",
            self.store_objects.clone(),
        );
        registry.register("store_tags", "Tags known", self.store_tags.clone());
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
        registry.register(
            "transfers_in_progress",
            "Downloads under way",
            self.transfers.clone(),
        );
        registry.register(
            "coalesced_waiters",
            "Clients that read from a download under way which another one began",
            self.waiters.clone(),
        );
    }

    pub(super) fn answered(&self, answered: &Answered<'_>) {
        let labels = RequestLabels {
            registry: answered.upstream.into(),
            door: answered.door,
            kind: answered.kind.name(),
            result: answered.result.name(),
            reason: answered.reason,
        };
        self.requests.get_or_create(&labels).inc();
        self.seconds.observe(answered.took.as_secs_f64());
        if let (Outcome::Stale, Some(age)) = (answered.result, answered.age) {
            self.stale_age_seconds.observe(age.as_secs_f64());
        }
        if answered.kind == Kind::Tag {
            let one = |count: &AtomicU64| count.fetch_add(1, Ordering::Relaxed);
            one(&self.totals.pulls);
            match answered.result {
                Outcome::Hit => one(&self.totals.hits),
                Outcome::Stale => one(&self.totals.stale),
                Outcome::Refused => one(&self.totals.refused),
                Outcome::Miss | Outcome::Coalesced | Outcome::Local | Outcome::Passed => 0,
            };
        }
    }

    pub(super) fn sent(&self, from: BytesFrom, bytes: u64) {
        match from {
            BytesFrom::Disk => self.disk_bytes.inc_by(bytes),
            BytesFrom::Download => self.download_bytes.inc_by(bytes),
            BytesFrom::Passed => self.passed_bytes.inc_by(bytes),
        };
    }

    pub(super) fn tunnel(&self) -> Tunnel {
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

    pub(super) fn exchanged(&self, upstream: &str, op: &'static str, code: &str, took: Duration) {
        let registry: Arc<str> = upstream.into();
        let labels = ExchangeLabels {
            registry: Arc::clone(&registry),
            op,
            code: code.into(),
        };
        self.exchanges.get_or_create(&labels).inc();
        let seconds = self.exchange_seconds.get_or_create(&UpstreamLabels { registry });
        seconds.observe(took.as_secs_f64());
    }

    /// All but the bytes fetched, which are counted elsewhere.
    pub(super) fn totals(&self) -> Totals {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Totals {
            pulls: read(&self.totals.pulls),
            hits: read(&self.totals.hits),
            stale: read(&self.totals.stale),
            refused: read(&self.totals.refused),
            sent_bytes: self.disk_bytes.get() + self.download_bytes.get(),
            fetched_bytes: 0,
        }
    }

    pub(super) fn text(&self, levels: &Levels, clients: &[Client]) -> String {
        self.store_bytes.set(levels.store_bytes);
        self.store_bytes_max.set(levels.store_bytes_max);
        self.store_degraded.set(u64::from(levels.is_store_degraded));
        for (limit, count) in &levels.evicted {
            raise(&self.evicted.get_or_create(&LimitLabels { limit }), *count);
        }
        raise(&self.evicted_bytes, levels.evicted_bytes);
        raise(&self.without_room, levels.without_room);
        raise(&self.scrub_damaged, levels.scrub_damaged);
        self.store_objects.set(levels.store_objects);
        self.store_tags.set(levels.store_tags);
        self.transfers.set(levels.transfers);
        self.waiters.set(levels.waiters);
        self.offline.set(u64::from(levels.offline));
        raise(&self.fetched_bytes, levels.fetched_bytes);
        raise(&self.digest_mismatches, levels.digest_mismatches);
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
        // The last seen come first, so the first of a kind is its last.
        for client in clients.iter().rev() {
            let at = client
                .last_at
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            let labels = ClientLabels { client: client.kind };
            self.client_seen.get_or_create(&labels).set(at.as_secs());
        }
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// A counter that is kept elsewhere: it never goes back.
fn raise(counter: &Counter, to: u64) {
    counter.inc_by(to.saturating_sub(counter.get()));
}
