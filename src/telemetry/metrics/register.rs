//! Under which names the counts are told, and what each means.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Unit;

use super::{Metrics, SourceLabels};

impl Metrics {
    pub(super) fn register_front(&mut self, bytes: Family<SourceLabels, Counter>) {
        let registry = &mut self.registry;
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program that runs", version);
        registry.register(
            "requests",
            "Answers to clients that have ended, by their reason; one that broke off is no hit",
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
            "response_duration",
            "From a request's head to the end of its answer's body",
            Unit::Seconds,
            self.response_seconds.clone(),
        );
        registry.register(
            "response_incomplete",
            "Answers whose body did not reach its end, by what ended it",
            self.incomplete.clone(),
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
        registry.register_with_unit(
            "cert_expiry_timestamp",
            "Until when a certificate shown to clients is good, in seconds since 1970",
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
            "Parts of traces that could not be handed to the OTLP collector",
            self.spans_dropped.clone(),
        );
    }

    pub(super) fn register_upstreams(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "upstream_requests",
            "Exchanges with upstreams: what was asked, and the status or the kind of silence that came of it",
            self.upstream_requests.clone(),
        );
        registry.register_with_unit(
            "upstream_request_duration",
            "From asking an upstream to its answer's head, tokens and redirects included",
            Unit::Seconds,
            self.upstream_seconds.clone(),
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
            "1 while the upstream responds, 0 while its circuit breaker is open",
            self.upstream_up.clone(),
        );
        registry.register(
            "upstream_circuit_breakers_open",
            "Circuit breakers that are open: of all connections, or of a kind of request, in repositories too",
            self.open_breakers.clone(),
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
        registry.register_with_unit(
            "upstream_ratelimit_reset_timestamp",
            "When all pulls of the upstream's window are allowed again at the latest, in seconds since 1970",
            Unit::Seconds,
            self.rate_limit_reset.clone(),
        );
    }

    pub(super) fn register_store(&mut self) {
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
            "store_errors",
            "Operations that the store's disk failed; a missing file is none",
            self.store_errors.clone(),
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
        registry.register_with_unit(
            "longest_idle",
            "How long the image that goes next had not been used, at the last eviction; a short time says that the store is too small",
            Unit::Seconds,
            self.longest_idle.clone(),
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
            "egress_buffered_bytes",
            "Response bytes in memory, read and not yet written to a socket",
            self.egress_bytes.clone(),
        );
        registry.register(
            "egress_waiting_responses",
            "Responses that read nothing until others from their address end",
            self.egress_waiting.clone(),
        );
        self.register_queues();
        let registry = &mut self.registry;
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

    fn register_queues(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "queue_waiting_requests",
            "Requests that wait for a place, by queue and class",
            self.queue_waiting.clone(),
        );
        registry.register(
            "queue_granted",
            "Places given, by queue",
            self.queue_granted.clone(),
        );
        registry.register(
            "queue_waited_seconds",
            "Time waited for the places given, by queue",
            self.queue_waited.clone(),
        );
        registry.register(
            "queue_refused",
            "Requests refused because too many wait already, by queue and reason",
            self.queue_refused.clone(),
        );
        registry.register(
            "queue_abandoned",
            "Waits that ended because no client was left, by queue",
            self.queue_abandoned.clone(),
        );
        registry.register(
            "downloads_given_up",
            "Downloads that ended because no client waited for them",
            self.given_up.clone(),
        );
    }
}
