//! Prometheus metrics: base units, `_total`, one unit per name. `register` has names and help texts.

mod register;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::RwLock;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::connections::Connections;
use super::shared::SharedMetrics;
use super::{
    AccessRecord, BodyEnd, ByteSource, CacheResult, Client, Gauges, ResourceKind, Totals, UpstreamRecord,
};
use crate::fast_map::FastMap;

type IntGauge = Gauge<u64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    upstream: Arc<str>,
    route: &'static str,
    kind: &'static str,
    result: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndedLabels {
    ended: &'static str,
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
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    op: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabels {
    upstream: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BreakerLabels {
    upstream: Arc<str>,
    scope: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamRequestLabels {
    upstream: Arc<str>,
    op: &'static str,
    code: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QuotaLabels {
    upstream: Arc<str>,
    credential: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CertificateLabels {
    certificate: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueueLabels {
    queue: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueueClassLabels {
    queue: &'static str,
    class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueueReasonLabels {
    queue: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClientLabels {
    client: &'static str,
}

/// Counts the bytes of a tunnel.
pub struct TunnelCounter {
    sent: Counter,
    received: Counter,
    open: IntGauge,
    carried: [AtomicU64; 2],
}

impl TunnelCounter {
    /// Counts bytes sent to the host.
    pub fn to_host(&self, bytes: u64) {
        self.sent.inc_by(bytes);
        let [to_host, _] = &self.carried;
        to_host.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes sent to the client.
    pub fn to_client(&self, bytes: u64) {
        self.received.inc_by(bytes);
        let [_, to_client] = &self.carried;
        to_client.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes so far: to the host, and to the client.
    pub fn carried(&self) -> (u64, u64) {
        let [to_host, to_client] = &self.carried;
        (to_host.load(Ordering::Relaxed), to_client.load(Ordering::Relaxed))
    }
}

impl Drop for TunnelCounter {
    fn drop(&mut self) {
        self.open.dec();
    }
}

/// All metrics.
pub(super) struct Metrics {
    requests: Family<RequestLabels, Counter>,
    /// The counters of `requests`, for a quick look-up.
    request_counters: RwLock<FastMap<RequestLabels, Counter>>,
    seconds: Histogram,
    response_seconds: Histogram,
    incomplete: Family<EndedLabels, Counter>,
    stale_age_seconds: Histogram,
    disk_bytes: Counter,
    download_bytes: Counter,
    passed_bytes: Counter,
    tunnel_bytes: Family<DirectionLabels, Counter>,
    tunnels: IntGauge,
    fetched_bytes: Counter,
    digest_mismatches: Counter,
    upstream_requests: Family<UpstreamRequestLabels, Counter>,
    upstream_seconds: Family<UpstreamLabels, Histogram>,
    store_bytes: IntGauge,
    store_bytes_max: IntGauge,
    store_degraded: IntGauge,
    store_errors: Family<OperationLabels, Counter>,
    evicted: Family<LimitLabels, Counter>,
    evicted_bytes: Counter,
    over_quota: Counter,
    scrub_damaged: Counter,
    store_objects: IntGauge,
    store_tags: IntGauge,
    refresh_runs: Family<ResultLabels, Counter>,
    refresh_tags: Family<StateLabels, IntGauge>,
    refresh_overdue: Gauge<f64, AtomicU64>,
    egress_bytes: IntGauge,
    egress_waiting: IntGauge,
    queue_waiting: Family<QueueClassLabels, IntGauge>,
    queue_granted: Family<QueueLabels, Counter>,
    queue_waited: Family<QueueLabels, Counter<f64, AtomicU64>>,
    queue_refused: Family<QueueReasonLabels, Counter>,
    queue_abandoned: Family<QueueLabels, Counter>,
    downloads_abandoned: Counter,
    transfers: IntGauge,
    waiters: IntGauge,
    offline: IntGauge,
    upstream_up: Family<UpstreamLabels, IntGauge>,
    open_breakers: Family<BreakerLabels, IntGauge>,
    rate_limit: Family<QuotaLabels, IntGauge>,
    rate_limit_remaining: Family<QuotaLabels, IntGauge>,
    rate_limit_reset: Family<QuotaLabels, IntGauge>,
    client_seen: Family<ClientLabels, IntGauge>,
    spans_dropped: Counter,
    connections_refused: Counter,
    pub(super) connections: Connections,
    pub(super) shared: SharedMetrics,
    longest_idle: Gauge<f64, AtomicU64>,
    certificates: Family<CertificateLabels, IntGauge>,
    totals: Counts,
    registry: Registry,
}

/// Counters for [`Totals`].
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
            request_counters: RwLock::default(),
            seconds: latency(),
            response_seconds: Histogram::new([0.005, 0.05, 0.5, 2.0, 10.0, 60.0, 300.0, 1_800.0]),
            incomplete: Family::default(),
            stale_age_seconds: Histogram::new([60.0, 600.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0]),
            disk_bytes: bytes.get_or_create_owned(&SourceLabels { source: "disk" }),
            download_bytes: bytes.get_or_create_owned(&SourceLabels { source: "download" }),
            passed_bytes: bytes.get_or_create_owned(&SourceLabels {
                source: "passthrough",
            }),
            tunnel_bytes: Family::default(),
            tunnels: IntGauge::default(),
            fetched_bytes: Counter::default(),
            digest_mismatches: Counter::default(),
            upstream_requests: Family::default(),
            upstream_seconds: Family::new_with_constructor(latency),
            store_bytes: IntGauge::default(),
            store_bytes_max: IntGauge::default(),
            store_degraded: IntGauge::default(),
            store_errors: Family::default(),
            evicted: Family::default(),
            evicted_bytes: Counter::default(),
            over_quota: Counter::default(),
            scrub_damaged: Counter::default(),
            store_objects: IntGauge::default(),
            store_tags: IntGauge::default(),
            refresh_runs: Family::default(),
            refresh_tags: Family::default(),
            refresh_overdue: Gauge::default(),
            egress_bytes: IntGauge::default(),
            egress_waiting: IntGauge::default(),
            queue_waiting: Family::default(),
            queue_granted: Family::default(),
            queue_waited: Family::default(),
            queue_refused: Family::default(),
            queue_abandoned: Family::default(),
            downloads_abandoned: Counter::default(),
            transfers: IntGauge::default(),
            waiters: IntGauge::default(),
            offline: IntGauge::default(),
            upstream_up: Family::default(),
            open_breakers: Family::default(),
            rate_limit: Family::default(),
            rate_limit_remaining: Family::default(),
            rate_limit_reset: Family::default(),
            client_seen: Family::default(),
            spans_dropped: Counter::default(),
            connections_refused: Counter::default(),
            connections: Connections::default(),
            shared: SharedMetrics::default(),
            longest_idle: Gauge::default(),
            certificates: Family::default(),
            totals: Counts::default(),
            registry: Registry::with_prefix("ifnewer"),
        };
        for ended in BodyEnd::ALL
            .into_iter()
            .filter(|ended| *ended != BodyEnd::Complete)
        {
            let _at_zero = metrics.incomplete_of(ended);
        }
        metrics.register_front(bytes);
        metrics.register_upstreams();
        metrics.register_store();
        metrics.shared.register(&mut metrics.registry);
        metrics
    }
}

impl Metrics {
    pub(super) fn record_access(&self, record: &AccessRecord<'_>) {
        let labels = RequestLabels {
            upstream: Arc::clone(record.upstream),
            route: record.route,
            kind: record.kind.name(),
            result: record.result().name(),
            reason: record.reason,
        };
        self.count_request(labels);
        self.seconds.observe(record.first_byte.as_secs_f64());
        self.response_seconds.observe(record.took.as_secs_f64());
        if record.ended != BodyEnd::Complete {
            self.incomplete_of(record.ended).inc();
        }
        if let (CacheResult::Stale, Some(age)) = (record.result, record.age) {
            self.stale_age_seconds.observe(age.as_secs_f64());
        }
        if record.kind == ResourceKind::Tag {
            let one = |count: &AtomicU64| count.fetch_add(1, Ordering::Relaxed);
            one(&self.totals.pulls);
            match record.result() {
                CacheResult::Hit => one(&self.totals.hits),
                CacheResult::Stale => one(&self.totals.stale),
                CacheResult::Denied => one(&self.totals.refused),
                CacheResult::Miss
                | CacheResult::Collapsed
                | CacheResult::Local
                | CacheResult::Forwarded
                | CacheResult::Aborted
                | CacheResult::Failed => 0,
            };
        }
    }

    fn count_request(&self, labels: RequestLabels) {
        if let Some(counter) = self.request_counters.read().get(&labels) {
            counter.inc();
            return;
        }
        let counter = self.requests.get_or_create_owned(&labels);
        counter.inc();
        self.request_counters.write().insert(labels, counter);
    }

    fn incomplete_of(&self, ended: BodyEnd) -> Counter {
        let labels = EndedLabels { ended: ended.name() };
        self.incomplete.get_or_create_owned(&labels)
    }

    pub(super) fn add_bytes_sent(&self, from: ByteSource, bytes: u64) {
        match from {
            ByteSource::Disk => self.disk_bytes.inc_by(bytes),
            ByteSource::Download => self.download_bytes.inc_by(bytes),
            ByteSource::Passed => self.passed_bytes.inc_by(bytes),
        };
    }

    pub(super) fn span_dropped(&self, count: u64) {
        self.spans_dropped.inc_by(count);
    }

    pub(super) fn connection_refused(&self) {
        self.connections_refused.inc();
    }

    pub(super) fn tunnel(&self) -> TunnelCounter {
        self.tunnels.inc();
        let counter = |direction| {
            self.tunnel_bytes
                .get_or_create_owned(&DirectionLabels { direction })
        };
        TunnelCounter {
            sent: counter("to-host"),
            received: counter("to-client"),
            open: self.tunnels.clone(),
            carried: Default::default(),
        }
    }

    pub(super) fn record_upstream(&self, record: &UpstreamRecord<'_>) {
        let upstream: Arc<str> = record.upstream.into();
        let labels = UpstreamRequestLabels {
            upstream: Arc::clone(&upstream),
            op: record.operation,
            code: record.code.into(),
        };
        self.upstream_requests.get_or_create(&labels).inc();
        let seconds = self.upstream_seconds.get_or_create(&UpstreamLabels { upstream });
        seconds.observe(record.took.as_secs_f64());
    }

    /// All totals except the bytes fetched, which are counted elsewhere.
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

    fn set_queue_gauges(&self, gauges: &Gauges) {
        raise_to(&self.downloads_abandoned, gauges.downloads_abandoned);
        for level in &gauges.queues {
            let queue = level.queue;
            for (class, count) in &level.waiting {
                let labels = QueueClassLabels { queue, class };
                self.queue_waiting.get_or_create(&labels).set(*count);
            }
            for (reason, count) in &level.refused {
                let labels = QueueReasonLabels { queue, reason };
                raise_to(&self.queue_refused.get_or_create(&labels), *count);
            }
            let labels = QueueLabels { queue };
            raise_to(&self.queue_granted.get_or_create(&labels), level.granted);
            let waited = self.queue_waited.get_or_create(&labels);
            waited.inc_by((level.waited.as_secs_f64() - waited.get()).max(0.0));
            raise_to(&self.queue_abandoned.get_or_create(&labels), level.abandoned);
        }
    }

    pub(super) fn open_metrics_text(&self, gauges: &Gauges, clients: &[Client]) -> String {
        self.store_bytes.set(gauges.store_bytes);
        self.store_bytes_max.set(gauges.store_bytes_max);
        self.store_degraded.set(u64::from(gauges.is_store_degraded));
        for (op, count) in &gauges.store_errors {
            raise_to(&self.store_errors.get_or_create(&OperationLabels { op }), *count);
        }
        for (limit, count) in &gauges.evicted {
            raise_to(&self.evicted.get_or_create(&LimitLabels { limit }), *count);
        }
        raise_to(&self.evicted_bytes, gauges.evicted_bytes);
        raise_to(&self.over_quota, gauges.over_quota);
        raise_to(&self.scrub_damaged, gauges.scrub_damaged);
        self.store_objects.set(gauges.store_objects);
        self.store_tags.set(gauges.store_tags);
        for (result, count) in &gauges.refresh_runs {
            raise_to(&self.refresh_runs.get_or_create(&ResultLabels { result }), *count);
        }
        for (state, tags) in &gauges.refresh_tags {
            self.refresh_tags.get_or_create(&StateLabels { state }).set(*tags);
        }
        self.refresh_overdue.set(gauges.refresh_overdue.as_secs_f64());
        self.egress_bytes.set(gauges.egress_bytes);
        self.egress_waiting.set(gauges.egress_waiting);
        self.set_queue_gauges(gauges);
        self.transfers.set(gauges.transfers);
        self.waiters.set(gauges.waiters);
        self.offline.set(u64::from(gauges.offline));
        raise_to(&self.fetched_bytes, gauges.fetched_bytes);
        raise_to(&self.digest_mismatches, gauges.digest_mismatches);
        for (name, up) in &gauges.upstreams {
            let labels = UpstreamLabels {
                upstream: Arc::clone(name),
            };
            self.upstream_up.get_or_create(&labels).set(u64::from(*up));
        }
        for (upstream, scope, open) in &gauges.open_breakers {
            let labels = BreakerLabels {
                upstream: Arc::clone(upstream),
                scope,
            };
            self.open_breakers.get_or_create(&labels).set(*open);
        }
        for level in &gauges.quotas {
            let labels = QuotaLabels {
                upstream: Arc::clone(&level.upstream),
                credential: level.credential,
            };
            if let Some(limit) = level.limit {
                self.rate_limit.get_or_create(&labels).set(limit);
            }
            if let Some(remaining) = level.remaining {
                self.rate_limit_remaining.get_or_create(&labels).set(remaining);
            }
            if let Some(at) = level.resets_at {
                self.rate_limit_reset.get_or_create(&labels).set(unix_seconds(at));
            }
        }
        // Clients are ordered by when they were last seen, so the most recent of a kind is set last.
        for client in clients.iter().rev() {
            let labels = ClientLabels { client: client.kind };
            let seen = self.client_seen.get_or_create(&labels);
            seen.set(unix_seconds(client.last_at));
        }
        // NaN means unknown.
        let idle = gauges.longest_idle.map_or(f64::NAN, |idle| idle.as_secs_f64());
        self.longest_idle.set(idle);
        for (certificate, good_until) in &gauges.certificates {
            let labels = CertificateLabels { certificate };
            let level = self.certificates.get_or_create(&labels);
            level.set(unix_seconds(*good_until));
        }
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

fn unix_seconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// Raises a counter to a total that is counted elsewhere and never decreases.
fn raise_to(counter: &Counter, to: u64) {
    counter.inc_by(to.saturating_sub(counter.get()));
}
