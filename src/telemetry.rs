//! Telemetry: access log, metrics, decision log and traces.
//!
//! Each finished response becomes one log line and one count. A pull, a write and a failed response also becomes one
//! entry of the decision log. All three use the same reason names.
//!
//! Metric labels name the upstream, never a repository or a tag: their number is unbounded, and metrics would expose
//! private names. The decision log and the client list contain image names. They are for the operator alone, in
//! memory and bounded.
//!
//! * `metrics`: counters and histograms; `metrics/register`: their names.
//! * `gauges`: values sampled at scrape time.
//! * `prometheus_text`: the Prometheus text format 0.0.4.
//! * `connections`: counts of the listeners' connections.
//! * `decision_log`: recent decisions. * `clients`: recent clients. * `history`: totals per minute for a day.
//! * `shared`: metrics of the shared storage.
//! * `spans`: trace spans for an exporter.

mod clients;
mod connections;
mod decision_log;
mod gauges;
mod history;
mod metrics;
mod prometheus_text;
mod shared;
mod spans;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use tokio::sync::{broadcast, mpsc};

pub use clients::{Agent, Client, LastAgent};
pub use connections::{CloseReason, ConnectionState, OpenConnection, TokenRejection};
pub use decision_log::DecisionRecord;
pub use gauges::{Gauges, QueueGauges, QuotaGauge};
pub use history::Totals;
pub use metrics::TunnelCounter;
pub use shared::SharedMetrics;
pub use spans::{SPANS_WAITING_MAX, Span, SpanKind};

use crate::oci::{Digest, UpstreamFailure};
use crate::trace_context::TraceContext;
use metrics::Metrics;

/// Access record of one response to a client, written after its last byte.
#[derive(Debug)]
pub struct AccessRecord<'a> {
    /// When the request arrived.
    pub at: SystemTime,
    /// The upstream's name; `-` if the request reached none.
    pub upstream: &'a Arc<str>,
    /// How the request was routed; `-` if it was rejected before routing.
    pub route: &'static str,
    /// The kind of resource requested.
    pub kind: ResourceKind,
    /// The requested image: `repository:tag`, `repository@digest`, or the path if it is neither. Never used as a
    /// label.
    pub image: &'a Arc<str>,
    /// The cache result as decided, before the body was sent.
    pub result: CacheResult,
    /// The name of the reason.
    pub reason: &'static str,
    /// Why the upstream was unavailable, if it was.
    pub cause: Option<UpstreamFailure>,
    /// The digest served.
    pub digest: Option<Digest>,
    /// Time since the upstream last confirmed the tag, for a request by tag.
    pub age: Option<Duration>,
    /// The response status.
    pub status: u16,
    /// From the request head to the response head.
    pub first_byte: Duration,
    /// From the request head to the end of the response body.
    pub took: Duration,
    /// How the body ended.
    pub ended: BodyEnd,
    /// Body bytes written to the connection.
    pub bytes: u64,
    /// The error that ended the body early.
    pub error: Option<&'a str>,
    /// The client's IP address.
    pub client: Option<IpAddr>,
    /// The client's `User-Agent`.
    pub agent: &'a Agent,
    /// The trace context of the request.
    pub trace: &'a TraceContext,
}

impl AccessRecord<'_> {
    /// The result as counted. A response that was not delivered in full does not count as a hit.
    fn result(&self) -> CacheResult {
        match self.ended {
            BodyEnd::Complete => self.result,
            BodyEnd::Aborted => CacheResult::Aborted,
            BodyEnd::Blocked => CacheResult::Denied,
            BodyEnd::Upstream | BodyEnd::Disk | BodyEnd::Damage => CacheResult::Failed,
        }
    }
}

/// How the body of a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    /// The last byte was written to the connection.
    Complete,
    /// The client closed the connection or the stream early.
    Aborted,
    /// The upstream closed the connection early, or sent wrong bytes.
    Upstream,
    /// A disk read or write failed.
    Disk,
    /// The cached bytes did not match their digest.
    Damage,
    /// The operator blocked the content.
    Blocked,
}

impl BodyEnd {
    /// All variants.
    pub const ALL: [Self; 6] = [
        Self::Complete,
        Self::Aborted,
        Self::Upstream,
        Self::Disk,
        Self::Damage,
        Self::Blocked,
    ];

    /// The name in the log, the metrics and the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Aborted => "aborted",
            Self::Upstream => "upstream-failed",
            Self::Disk => "disk-failed",
            Self::Damage => "damaged",
            Self::Blocked => "blocked",
        }
    }

    /// Whether the cache or the upstream caused the early end, and not the client.
    pub fn is_failure(self) -> bool {
        matches!(self, Self::Upstream | Self::Disk | Self::Damage | Self::Blocked)
    }
}

/// Record of one request to an upstream, written when it ends.
#[derive(Clone, Debug)]
pub struct UpstreamRecord<'a> {
    /// The upstream's name.
    pub upstream: &'a str,
    /// The kind of request.
    pub operation: &'static str,
    /// The status code, or the name of the failure.
    pub code: &'a str,
    /// When the response head arrived or the request failed.
    pub ended: SystemTime,
    /// From sending the request until then.
    pub took: Duration,
    /// The trace context of the request.
    pub trace: &'a TraceContext,
}

/// Kind of the requested resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResourceKind {
    /// `/v2/`
    Ping,
    /// A manifest by tag.
    Tag,
    /// A manifest by digest.
    Manifest,
    /// A blob.
    Blob,
    /// A list of tags or referrers.
    Listing,
    /// A push, a deletion, or a request of an upload session.
    Write,
    /// `CONNECT`
    Connect,
    /// Any other request.
    Other,
}

impl ResourceKind {
    /// The name in the log, the metrics and the admin API.
    pub fn name(self) -> &'static str {
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

/// Cache result of a response, as counted for the hit ratio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheResult {
    /// Served from the store.
    Hit,
    /// Served stale from the store because the upstream was unavailable.
    Stale,
    /// Fetched for this client.
    Miss,
    /// Fetched by a transfer that another client started.
    Collapsed,
    /// Answered locally, without image content.
    Local,
    /// Forwarded to the upstream.
    Forwarded,
    /// Denied.
    Denied,
    /// Incomplete because the client left.
    Aborted,
    /// Incomplete because the upstream or the disk failed, or the cached bytes were damaged.
    Failed,
}

impl CacheResult {
    /// The name in the log, the metrics and the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Stale => "stale",
            Self::Miss => "miss",
            Self::Collapsed => "collapsed",
            Self::Local => "local",
            Self::Forwarded => "forwarded",
            Self::Denied => "denied",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
        }
    }
}

/// Where the bytes of a response come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteSource {
    /// The store.
    Disk,
    /// A download, which several clients may share.
    Download,
    /// A forwarded response.
    Passed,
}

/// Telemetry facade. Cheap to clone; all clones share their counters.
#[derive(Clone, Default)]
pub struct Telemetry(Arc<Inner>);

#[derive(Default)]
struct Inner {
    metrics: Metrics,
    decision_log: decision_log::DecisionLog,
    clients: clients::Clients,
    history: history::History,
    spans: spans::Spans,
}

impl Telemetry {
    /// Creates it with all counters at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records a client when its request arrives.
    pub fn record_client(&self, client: IpAddr, agent: &Agent, at: SystemTime, pulled: Option<&Arc<str>>) {
        self.0.clients.record(client, agent, at, pulled);
    }

    /// Records a finished response. A pull by tag and a write are logged at `info` and added to the decision log, as
    /// are failures. All others are logged at `debug`.
    pub fn record_access(&self, record: &AccessRecord<'_>) {
        self.0.metrics.record_access(record);
        self.record_span(record.trace, || Span::of_access(record));
        log(record);
        let is_decision = matches!(
            record.kind,
            ResourceKind::Tag | ResourceKind::Manifest | ResourceKind::Write
        );
        if is_decision || record.status >= 400 || record.ended != BodyEnd::Complete {
            self.0.decision_log.push(DecisionRecord::of(record));
        }
    }

    /// The trace context of a client's request. A new root is sampled if a span exporter is set.
    pub fn trace(&self, headers: &HeaderMap) -> TraceContext {
        TraceContext::extract(headers, self.0.spans.has_sink())
    }

    /// Sets the channel to the span exporter. Sending never waits: spans that do not fit are dropped and counted.
    pub fn set_span_sink(&self, queue: mpsc::Sender<Span>) {
        self.0.spans.set_sink(queue);
    }

    /// Records a span if its trace is sampled. `span` is called only then.
    pub fn record_span(&self, trace: &TraceContext, span: impl FnOnce() -> Span) {
        if trace.is_sampled() && !self.0.spans.send(span) {
            self.0.metrics.span_dropped(1);
        }
    }

    /// Counts spans that could not be exported.
    pub fn record_spans_dropped(&self, count: u64) {
        self.0.metrics.span_dropped(count);
    }

    /// Counts a connection closed because its address had too many.
    pub fn record_connection_refused(&self) {
        self.0.metrics.connection_refused();
    }

    /// Counts a listener's connection until the returned guard is dropped.
    pub fn count_connection(&self, listener: &'static str, state: ConnectionState) -> OpenConnection {
        self.0.metrics.connections.open(listener, state)
    }

    /// Counts an idle connection that was closed to free a permit for another.
    pub fn record_connection_closed(&self, listener: &'static str, reason: CloseReason) {
        self.0.metrics.connections.closed(listener, reason);
    }

    /// Counts a rejected admin token.
    pub fn record_admin_token_refused(&self, reason: TokenRejection) {
        self.0.metrics.connections.token_refused(reason);
    }

    /// Counts blob bytes sent.
    pub fn add_bytes_sent(&self, from: ByteSource, bytes: u64) {
        self.0.metrics.add_bytes_sent(from, bytes);
    }

    /// Counts a tunnel as open until the returned counter is dropped.
    pub fn count_tunnel(&self) -> TunnelCounter {
        self.0.metrics.tunnel()
    }

    /// Metrics of the shared storage.
    pub fn shared(&self) -> &SharedMetrics {
        &self.0.metrics.shared
    }

    /// Records a request to an upstream.
    pub fn record_upstream(&self, record: &UpstreamRecord<'_>) {
        self.0.metrics.record_upstream(record);
        self.record_span(record.trace, || Span::of_upstream(record));
    }

    /// The metrics in the `OpenMetrics` text format, with the current gauges.
    pub fn open_metrics_text(&self, gauges: &Gauges) -> String {
        self.0.metrics.open_metrics_text(gauges, &self.0.clients.seen())
    }

    /// The metrics in the Prometheus text format, for scrapers that do not accept `OpenMetrics`.
    pub fn prometheus_text(&self, gauges: &Gauges) -> String {
        prometheus_text::plain(&self.open_metrics_text(gauges))
    }

    /// The recorded decisions, newest first.
    pub fn decisions(&self) -> Vec<Arc<DecisionRecord>> {
        self.0.decision_log.newest_first()
    }

    /// Subscribes to new decisions.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<DecisionRecord>> {
        self.0.decision_log.subscribe()
    }

    /// The recent clients, the last seen first.
    pub fn clients(&self) -> Vec<Client> {
        self.0.clients.seen()
    }

    /// Totals since the start. Upstreams sent `fetched_bytes` of them.
    pub fn totals(&self, fetched_bytes: u64) -> Totals {
        Totals {
            fetched_bytes,
            ..self.0.metrics.totals()
        }
    }

    /// Records the current totals for the plots. Call this several times a minute.
    pub fn sample_history(&self, now: SystemTime, fetched_bytes: u64) {
        self.0.history.record(now, self.totals(fetched_bytes));
    }

    /// Totals of each of the last `count` intervals of `minutes` minutes, oldest first.
    pub fn history(&self, now: SystemTime, count: u64, minutes: u64, fetched_bytes: u64) -> Vec<Totals> {
        self.0
            .history
            .spans(now, count, minutes, self.totals(fetched_bytes))
    }
}

/// Writes the access log line.
fn log(record: &AccessRecord<'_>) {
    let AccessRecord {
        upstream,
        route,
        image,
        status,
        reason,
        bytes,
        error,
        ..
    } = *record;
    let (upstream, image) = (&**upstream, &**image);
    let (result, ended) = (record.result().name(), record.ended.name());
    let (cause, trace_id) = (record.cause.map(UpstreamFailure::name), record.trace.id());
    let client = record.client.map(tracing::field::display);
    let (ms, first_byte_ms) = (milliseconds(record.took), milliseconds(record.first_byte));
    let is_pull = matches!(
        record.kind,
        ResourceKind::Tag | ResourceKind::Write | ResourceKind::Connect
    );
    if record.ended.is_failure() {
        tracing::warn!(upstream, route, image, status, result, reason, cause, ended, bytes, ms, first_byte_ms, client,
            error, %trace_id, "response body failed");
    } else if is_pull || status >= 500 || record.ended == BodyEnd::Aborted {
        tracing::info!(upstream, route, image, status, result, reason, cause, ended, bytes, ms, first_byte_ms, client,
            %trace_id, "request served");
    } else {
        tracing::debug!(upstream, route, image, status, result, reason, cause, ended, bytes, ms, first_byte_ms, client,
            %trace_id, "request served");
    }
}

/// Rounded to three decimal places for readability.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
