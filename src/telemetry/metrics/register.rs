//! Registration of the metrics: names, help texts and units.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Unit;

use super::{Metrics, SourceLabels};

impl Metrics {
    pub(super) fn register_front(&mut self, bytes: Family<SourceLabels, Counter>) {
        let registry = &mut self.registry;
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "Version of the running program", version);
        registry.register(
            "requests",
            "Finished responses to clients, by result and reason. An incomplete response is no hit",
            self.requests.clone(),
        );
        registry.register_with_unit(
            "response",
            "Blob bytes sent to clients, by source",
            Unit::Bytes,
            bytes,
        );
        registry.register_with_unit(
            "tunnel",
            "Bytes tunnelled by CONNECT, by direction",
            Unit::Bytes,
            self.tunnel_bytes.clone(),
        );
        registry.register("tunnels", "Open tunnels", self.tunnels.clone());
        registry.register_with_unit(
            "request_duration",
            "Time from the request head to the response head",
            Unit::Seconds,
            self.seconds.clone(),
        );
        registry.register_with_unit(
            "response_duration",
            "Time from the request head to the end of the response body",
            Unit::Seconds,
            self.response_seconds.clone(),
        );
        registry.register(
            "response_incomplete",
            "Incomplete responses, by what ended the body",
            self.incomplete.clone(),
        );
        registry.register_with_unit(
            "stale_age",
            "Time since the last confirmation by the upstream, of stale responses",
            Unit::Seconds,
            self.stale_age_seconds.clone(),
        );
        registry.register_with_unit(
            "client_last_request_timestamp",
            "Unix time of the last request, by kind of client",
            Unit::Seconds,
            self.client_seen.clone(),
        );
        registry.register_with_unit(
            "cert_expiry_timestamp",
            "Unix time at which a certificate used for clients expires",
            Unit::Seconds,
            self.certificates.clone(),
        );
        registry.register(
            "connections_refused",
            "Connections closed because their address had too many",
            self.connections_refused.clone(),
        );
        self.connections.register(registry);
        registry.register(
            "spans_dropped",
            "Trace spans that were not exported to the OTLP collector",
            self.spans_dropped.clone(),
        );
    }

    pub(super) fn register_upstreams(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "upstream_requests",
            "Requests to upstreams, by kind and by status or failure",
            self.upstream_requests.clone(),
        );
        registry.register_with_unit(
            "upstream_request_duration",
            "Time from a request to an upstream to the response head, tokens and redirects included",
            Unit::Seconds,
            self.upstream_seconds.clone(),
        );
        registry.register_with_unit(
            "fetched",
            "Blob bytes fetched from upstreams",
            Unit::Bytes,
            self.fetched_bytes.clone(),
        );
        registry.register(
            "digest_mismatch",
            "Transfers whose bytes did not match their digest",
            self.digest_mismatches.clone(),
        );
        registry.register(
            "upstream_up",
            "1 while the upstream responds, 0 while its circuit breaker is open",
            self.upstream_up.clone(),
        );
        registry.register(
            "upstream_circuit_breakers_open",
            "Open circuit breakers: of all connections, or of a kind of request, repositories included",
            self.open_breakers.clone(),
        );
        registry.register("offline", "1 while offline mode is on", self.offline.clone());
        registry.register(
            "upstream_ratelimit_limit",
            "Pulls allowed per window, as reported by the upstream, by credential",
            self.rate_limit.clone(),
        );
        registry.register(
            "upstream_ratelimit_remaining",
            "Pulls remaining in the window, as reported by the upstream. The fewest of several clients",
            self.rate_limit_remaining.clone(),
        );
        registry.register_with_unit(
            "upstream_ratelimit_reset_timestamp",
            "Unix time at which the full pull quota is available again at the latest",
            Unit::Seconds,
            self.rate_limit_reset.clone(),
        );
    }

    pub(super) fn register_store(&mut self) {
        let registry = &mut self.registry;
        registry.register_with_unit(
            "store",
            "Bytes of cached blobs and manifests",
            Unit::Bytes,
            self.store_bytes.clone(),
        );
        registry.register_with_unit(
            "store_limit",
            "Quota of the store in bytes",
            Unit::Bytes,
            self.store_bytes_max.clone(),
        );
        registry.register(
            "store_objects",
            "Number of cached blobs and manifests",
            self.store_objects.clone(),
        );
        registry.register("store_tags", "Number of cached tags", self.store_tags.clone());
        registry.register(
            "refresh_runs",
            "Scheduled refreshes of tags, by result",
            self.refresh_runs.clone(),
        );
        registry.register(
            "refresh_tags",
            "Tags under a rule with refresh: in use, unused, or private and readable by clients only",
            self.refresh_tags.clone(),
        );
        registry.register_with_unit(
            "refresh_overdue",
            "How long the scheduled refresh that is waiting longest is late",
            Unit::Seconds,
            self.refresh_overdue.clone(),
        );
        registry.register(
            "store_degraded",
            "1 while the store cannot store content, see /readyz",
            self.store_degraded.clone(),
        );
        registry.register(
            "store_errors",
            "Failed disk operations of the store. A missing file is no failure",
            self.store_errors.clone(),
        );
        registry.register(
            "store_evicted",
            "Evicted blobs and manifests, by the limit that required it",
            self.evicted.clone(),
        );
        registry.register_with_unit(
            "store_evicted",
            "Bytes of evicted content",
            Unit::Bytes,
            self.evicted_bytes.clone(),
        );
        registry.register_with_unit(
            "longest_idle",
            "Idle time of the next image to evict, at the last eviction. A short time means that the store is too small",
            Unit::Seconds,
            self.longest_idle.clone(),
        );
        registry.register(
            "store_over_quota",
            "Blobs passed through because they did not fit into the quota",
            self.over_quota.clone(),
        );
        registry.register(
            "store_scrub_damaged",
            "Damaged blobs and manifests found by the scrub",
            self.scrub_damaged.clone(),
        );
        registry.register(
            "egress_buffered_bytes",
            "Response bytes in memory, read and not yet written to a socket",
            self.egress_bytes.clone(),
        );
        registry.register(
            "egress_waiting_responses",
            "Responses waiting for others of their address to end",
            self.egress_waiting.clone(),
        );
        self.register_queues();
        let registry = &mut self.registry;
        registry.register(
            "transfers_in_progress",
            "Downloads in progress",
            self.transfers.clone(),
        );
        registry.register(
            "coalesced_waiters",
            "Clients that read from a download started by another client",
            self.waiters.clone(),
        );
    }

    fn register_queues(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "queue_waiting_requests",
            "Requests waiting for a permit, by queue and class",
            self.queue_waiting.clone(),
        );
        registry.register(
            "queue_granted",
            "Permits granted, by queue",
            self.queue_granted.clone(),
        );
        registry.register(
            "queue_waited_seconds",
            "Total wait for granted permits, by queue",
            self.queue_waited.clone(),
        );
        registry.register(
            "queue_refused",
            "Requests rejected because the queue is full, by queue and reason",
            self.queue_refused.clone(),
        );
        registry.register(
            "queue_abandoned",
            "Waits that ended because no client was left, by queue",
            self.queue_abandoned.clone(),
        );
        registry.register(
            "downloads_abandoned",
            "Downloads cancelled because no client waited for them",
            self.downloads_abandoned.clone(),
        );
    }
}
