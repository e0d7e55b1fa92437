//! `/metrics`: counters, and gauges sampled at scrape time.

use std::time::SystemTime;

use http::HeaderMap;
use http::header::ACCEPT;

use super::{Admin, upstreams};
use crate::queue::{Class, Counts, Queue};
use crate::server::ServingState;
use crate::telemetry::{Gauges, QueueGauges};

/// Content type of the Prometheus text format, for clients that do not accept `OpenMetrics`.
pub(super) const PLAIN_METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Content type of `OpenMetrics`, which Prometheus requests.
pub(super) const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether the client accepts `OpenMetrics`.
pub(super) fn wants_openmetrics(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT).iter();
    accepted
        .filter_map(|line| line.to_str().ok())
        .any(|line| line.contains("application/openmetrics-text"))
}

impl Admin {
    /// May block on locks.
    pub(super) fn metrics(&self, as_openmetrics: bool, now: SystemTime) -> String {
        let gauges = self.gauges(now);
        if as_openmetrics {
            self.telemetry.open_metrics_text(&gauges)
        } else {
            self.telemetry.prometheus_text(&gauges)
        }
    }

    fn gauges(&self, now: SystemTime) -> Gauges {
        let registry = self.registry.load();
        let (store, downloads) = (registry.proxy.store(), registry.proxy.downloads());
        let (usage, evicted) = (store.usage(), store.evictions());
        let upstreams = registry.router.all().iter().map(|upstream_registry| {
            let is_up = upstream_registry.upstream().unavailable_now().is_none();
            (upstream_registry.name().into(), is_up)
        });
        let open_breakers = registry.router.all().iter().flat_map(|upstream_registry| {
            let open = upstream_registry.upstream().open_breakers();
            open.into_iter()
                .map(|(scope, open)| (upstream_registry.name().into(), scope, open))
        });
        let waiters = downloads
            .statuses()
            .iter()
            .map(|transfer| transfer.readers.saturating_sub(1) as u64)
            .sum();
        let refreshes = registry.proxy.refresh_status(now);
        let outstanding = self.egress.outstanding();
        Gauges {
            egress_bytes: outstanding.bytes,
            egress_waiting: outstanding.waiting,
            store_bytes: usage.blob_bytes + usage.manifest_bytes,
            store_bytes_max: store.limits().bytes_max,
            evicted: vec![("size", evicted.for_size), ("free", evicted.for_free)],
            evicted_bytes: evicted.bytes,
            longest_idle: evicted.longest_idle,
            over_quota: evicted.refused,
            scrub_damaged: store.scrubbed().damaged,
            store_errors: store.errors(),
            is_store_degraded: !store.health_issues().is_empty(),
            store_objects: usage.blobs + usage.manifests,
            store_tags: usage.tags,
            queues: queues(&registry),
            refresh_runs: refreshes
                .results
                .iter()
                .map(|(result, count)| (result.name(), *count))
                .collect(),
            refresh_tags: vec![
                ("in-use", refreshes.tags),
                ("unused", refreshes.unused),
                ("private", refreshes.private),
            ],
            refresh_overdue: refreshes.overdue.unwrap_or_default(),
            downloads_abandoned: downloads.abandoned(),
            transfers: downloads.count() as u64,
            waiters,
            fetched_bytes: downloads.fetched_bytes(),
            digest_mismatches: downloads.digest_mismatches(),
            offline: self.offline.is_on(),
            open_breakers: open_breakers.collect(),
            upstreams: upstreams.collect(),
            quotas: upstreams::allowances(&registry, now),
            certificates: self.tls.load().expiries(),
        }
    }
}

/// The request queues of all upstreams combined, and the download queue.
fn queues(registry: &ServingState) -> Vec<QueueGauges> {
    let upstream_registries = registry.router.all().iter();
    let requests: Vec<&Queue> = upstream_registries
        .flat_map(|upstream_registry| upstream_registry.upstream().queues())
        .collect();
    vec![
        level("requests", &requests),
        level("downloads", &[registry.proxy.downloads().queue()]),
    ]
}

fn level(queue: &'static str, queues: &[&Queue]) -> QueueGauges {
    let sum = |count: &dyn Fn(&Counts) -> u64| queues.iter().map(|queue| count(&queue.counts())).sum();
    let waiting = |class| queues.iter().map(|queue| queue.waiting_in(class) as u64).sum();
    QueueGauges {
        queue,
        waiting: Class::ALL.map(|class| (class.name(), waiting(class))).to_vec(),
        granted: sum(&|counts| counts.granted),
        waited: queues.iter().map(|queue| queue.counts().waited).sum(),
        refused: vec![
            ("client-queue-full", sum(&|counts| counts.refused_by_client)),
            ("queue-full", sum(&|counts| counts.refused_in_all)),
        ],
        abandoned: sum(&|counts| counts.abandoned),
    }
}
