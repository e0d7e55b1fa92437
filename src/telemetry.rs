//! What is worth telling: each answer becomes one log line, one count and, where something was decided, one line of
//! the journal, all from the same named reasons, and all when the answer has ended.
//!
//! Labels name the upstream, never a repository or a tag: their number would have no bound, and private names would
//! leave by the metrics. The journal and the clients seen name both; they are for the operator alone, in memory, and
//! bounded.
//!
//! * `spans`: parts of traces, for whoever records them.
//! * `connections`: those of the listeners. * `metrics`: the counts. * `levels`: what is read with them. * `exposition`: their older format. * `journal`: the last decisions. * `clients`: who came lately. * `series`: the last day.

mod clients;
mod connections;
mod decision_log;
mod gauges;
mod history;
mod metrics;
mod prometheus_text;
mod spans;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use tokio::sync::{broadcast, mpsc};

pub use clients::{Client, agent};
pub use connections::{CloseReason, ConnectionState, OpenConnection, TokenRejection};
pub use decision_log::DecisionRecord;
pub use gauges::{Gauges, QueueGauges, QuotaGauge};
pub use history::Totals;
pub use metrics::TunnelCounter;
pub use spans::{SPANS_WAITING_MAX, Span, SpanKind};

use crate::oci::{Digest, UpstreamFailure};
use crate::trace_context::TraceContext;
use metrics::Metrics;

/// The access record of one answer to a client, after its last byte.
#[derive(Debug)]
pub struct AccessRecord<'a> {
    /// When the request arrived.
    pub at: SystemTime,
    /// The upstream's name; `-` where none was reached.
    pub upstream: &'a str,
    /// Through which door the client came; `-` where it was turned away before.
    pub route: &'static str,
    /// What was asked for.
    pub kind: ResourceKind,
    /// What the client asked for: `repository:tag`, `repository@digest`, or the path where neither was understood.
    /// Never in a label.
    pub image: &'a str,
    /// Whether bytes came from the store, the upstream, or neither: as decided, however the answer then ended.
    pub result: CacheResult,
    /// The reason's name.
    pub reason: &'static str,
    /// Why the upstream gave no usable answer, where that matters.
    pub cause: Option<UpstreamFailure>,
    /// What the client was given.
    pub digest: Option<Digest>,
    /// How long ago the upstream confirmed the tag, where it is one.
    pub age: Option<Duration>,
    /// The status sent.
    pub status: u16,
    /// From the request's head to the answer's head.
    pub first_byte: Duration,
    /// From the request's head to the end of the answer.
    pub took: Duration,
    /// How the answer ended.
    pub ended: BodyEnd,
    /// Bytes of the body that were handed to the connection.
    pub bytes: u64,
    /// What broke it, in words.
    pub error: Option<&'a str>,
    /// Who asked.
    pub client: Option<IpAddr>,
    /// With which program, cleaned by [`agent`].
    pub agent: &'a str,
    /// Which trace the request belongs to.
    pub trace: &'a TraceContext,
}

impl AccessRecord<'_> {
    /// The result as it is counted: what did not reach its client whole is no hit.
    fn result(&self) -> CacheResult {
        match self.ended {
            BodyEnd::Complete => self.result,
            BodyEnd::Aborted => CacheResult::Aborted,
            BodyEnd::Upstream | BodyEnd::Disk | BodyEnd::Damage => CacheResult::Failed,
        }
    }
}

/// How the body of an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    /// Its last byte was handed to the connection.
    Complete,
    /// The connection or the stream ended before it.
    Aborted,
    /// The upstream broke off or sent wrong bytes.
    Upstream,
    /// The disk could not be read or written.
    Disk,
    /// The cached bytes were no longer those of their digest.
    Damage,
}

impl BodyEnd {
    /// All of them.
    const ALL: [Self; 5] = [
        Self::Complete,
        Self::Aborted,
        Self::Upstream,
        Self::Disk,
        Self::Damage,
    ];

    /// The name in the log, the metrics and the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Aborted => "aborted",
            Self::Upstream => "upstream-failed",
            Self::Disk => "disk-failed",
            Self::Damage => "damaged",
        }
    }

    /// Whether it broke here or upstream, and not at the client.
    pub fn is_failure(self) -> bool {
        matches!(self, Self::Upstream | Self::Disk | Self::Damage)
    }
}

/// One exchange with an upstream, after it.
#[derive(Clone, Debug)]
pub struct UpstreamRecord<'a> {
    /// The upstream's name.
    pub upstream: &'a str,
    /// What was asked.
    pub operation: &'static str,
    /// The status, or the kind of silence.
    pub code: &'a str,
    /// When the answer's head was there, or the silence was certain.
    pub ended: SystemTime,
    /// From asking until then.
    pub took: Duration,
    /// Its part of the trace.
    pub trace: &'a TraceContext,
}

/// What kind of thing was asked for.
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
    /// Tags or referrers.
    Listing,
    /// A push, a deletion, or a part of one.
    Write,
    /// `CONNECT`
    Connect,
    /// None of these.
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

/// How an answer came about, coarsely: what a hit ratio is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheResult {
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
    /// Not received whole: the client left.
    Aborted,
    /// Not sent whole: the upstream, the disk or the cached bytes failed.
    Failed,
}

impl CacheResult {
    /// The name in the log, the metrics and the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Stale => "stale",
            Self::Miss => "miss",
            Self::Coalesced => "collapsed",
            Self::Local => "local",
            Self::Passed => "forwarded",
            Self::Refused => "denied",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
        }
    }
}

/// Where response bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteSource {
    /// The store.
    Disk,
    /// A download that may be shared.
    Download,
    /// An answer that was handed back.
    Passed,
}

/// Counts and tells. Cheap to clone; every clone counts into the same.
#[derive(Clone, Default)]
pub struct Telemetry {
    metrics: Arc<Metrics>,
    decision_log: decision_log::DecisionLog,
    clients: clients::Clients,
    history: history::History,
    spans: spans::Spans,
}

impl Telemetry {
    /// Nothing counted yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes a client, as soon as its request is there.
    pub fn record_client(&self, client: IpAddr, agent: &str, at: SystemTime, pulled: Option<&str>) {
        self.clients.record(client, agent, at, pulled);
    }

    /// Tells of an answer that has ended. A pull is where a decision was made, so it is told at `info` and kept in the
    /// journal; so is what went wrong; the rest is told at `debug`.
    pub fn record_access(&self, record: &AccessRecord<'_>) {
        self.metrics.record_access(record);
        self.record_span(record.trace, || Span::of_access(record));
        log(record);
        let is_decision = matches!(
            record.kind,
            ResourceKind::Tag | ResourceKind::Manifest | ResourceKind::Write
        );
        if is_decision || record.status >= 400 || record.ended != BodyEnd::Complete {
            self.decision_log.push(DecisionRecord::of(record));
        }
    }

    /// Which trace a request belongs to. One that begins here is recorded where someone records.
    pub fn trace(&self, headers: &HeaderMap) -> TraceContext {
        TraceContext::extract(headers, self.spans.has_sink())
    }

    /// From now on, whoever holds the other end of `queue` records what is told with [`Telemetry::record_span`]. Never waited for:
    /// what does not fit is counted and dropped.
    pub fn set_span_sink(&self, queue: mpsc::Sender<Span>) {
        self.spans.set_sink(queue);
    }

    /// Tells of a part of a trace, if it is recorded. `span` is made only then.
    pub fn record_span(&self, trace: &TraceContext, span: impl FnOnce() -> Span) {
        if trace.is_sampled() && !self.spans.send(span) {
            self.metrics.span_dropped(1);
        }
    }

    /// Counts parts of traces that could not be handed to whoever records them.
    pub fn record_spans_dropped(&self, count: u64) {
        self.metrics.span_dropped(count);
    }

    /// Counts a connection that was closed because its address had too many.
    pub fn record_connection_refused(&self) {
        self.metrics.connection_refused();
    }

    /// Counts a connection of a listener until what is given is dropped.
    pub fn count_connection(&self, listener: &'static str, state: ConnectionState) -> OpenConnection {
        self.metrics.connections.open(listener, state)
    }

    /// Counts a connection that was closed to make room for another.
    pub fn record_connection_closed(&self, listener: &'static str, reason: CloseReason) {
        self.metrics.connections.closed(listener, reason);
    }

    /// Counts an admin token that was refused.
    pub fn record_admin_token_refused(&self, reason: TokenRejection) {
        self.metrics.connections.token_refused(reason);
    }

    /// Counts bytes of a blob sent.
    pub fn add_bytes_sent(&self, from: ByteSource, bytes: u64) {
        self.metrics.add_bytes_sent(from, bytes);
    }

    /// A tunnel is open until what is given is dropped.
    pub fn count_tunnel(&self) -> TunnelCounter {
        self.metrics.tunnel()
    }

    /// Tells of an exchange with an upstream.
    pub fn record_upstream(&self, record: &UpstreamRecord<'_>) {
        self.metrics.record_upstream(record);
        self.record_span(record.trace, || Span::of_upstream(record));
    }

    /// The metrics as text in the `OpenMetrics` format, with the levels of this moment.
    pub fn open_metrics_text(&self, gauges: &Gauges) -> String {
        self.metrics.open_metrics_text(gauges, &self.clients.seen())
    }

    /// The same in the format that is older than `OpenMetrics`, for those who do not ask for that.
    pub fn prometheus_text(&self, gauges: &Gauges) -> String {
        prometheus_text::plain(&self.open_metrics_text(gauges))
    }

    /// The decisions remembered, the newest first.
    pub fn decisions(&self) -> Vec<Arc<DecisionRecord>> {
        self.decision_log.newest_first()
    }

    /// Hears of each decision from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<DecisionRecord>> {
        self.decision_log.subscribe()
    }

    /// Who was seen, the last first.
    pub fn clients(&self) -> Vec<Client> {
        self.clients.seen()
    }

    /// What was counted since the start, of which upstreams sent `fetched_bytes`.
    pub fn totals(&self, fetched_bytes: u64) -> Totals {
        Totals {
            fetched_bytes,
            ..self.metrics.totals()
        }
    }

    /// Notes the totals of this moment for the plots. To be called a few times a minute.
    pub fn sample_history(&self, now: SystemTime, fetched_bytes: u64) {
        self.history.record(now, self.totals(fetched_bytes));
    }

    /// What came in each of the last `count` spans of so many minutes, the oldest first.
    pub fn history(&self, now: SystemTime, count: u64, minutes: u64, fetched_bytes: u64) -> Vec<Totals> {
        self.history
            .spans(now, count, minutes, self.totals(fetched_bytes))
    }
}

/// The line of the access log.
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
            error, %trace_id, "an answer broke off; the client was told by the connection's end");
    } else if is_pull || status >= 500 || record.ended == BodyEnd::Aborted {
        tracing::info!(upstream, route, image, status, result, reason, cause, ended, bytes, ms, first_byte_ms, client,
            %trace_id, "answered");
    } else {
        tracing::debug!(upstream, route, image, status, result, reason, cause, ended, bytes, ms, first_byte_ms, client,
            %trace_id, "answered");
    }
}

/// Three digits behind the point: a log is read by people.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
