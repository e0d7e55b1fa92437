//! Trace spans, sent to an exporter if one is set.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;

use super::{AccessRecord, UpstreamRecord};
use crate::trace_context::TraceContext;

/// Spans waiting for export; further ones are dropped and counted.
pub const SPANS_WAITING_MAX: usize = 4096;

/// A finished span.
#[derive(Debug)]
pub struct Span {
    /// Its trace context.
    pub trace: TraceContext,
    /// Its name, from a small set: names of requested images would be unbounded.
    pub name: &'static str,
    /// Its kind.
    pub kind: SpanKind,
    /// When it ended.
    pub ended: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// Its attributes, named by OpenTelemetry's semantic conventions where they exist. Contains no credentials.
    pub attributes: Vec<(&'static str, String)>,
    /// The error, if it failed.
    pub error: Option<String>,
}

/// Kind of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// A response to a client.
    Server,
    /// A request to an upstream.
    Client,
    /// An internal operation.
    Internal,
}

impl Span {
    /// Span of a client's request, up to the end of the response body.
    pub(super) fn of_access(record: &AccessRecord<'_>) -> Self {
        let mut attributes = vec![
            ("http.response.status_code", record.status.to_string()),
            ("ifnewer.upstream", record.upstream.to_string()),
            ("ifnewer.route", record.route.to_owned()),
            ("ifnewer.image", record.image.to_string()),
            ("ifnewer.result", record.result().name().to_owned()),
            ("ifnewer.reason", record.reason.to_owned()),
            ("ifnewer.ended", record.ended.name().to_owned()),
            ("http.response.body.size", record.bytes.to_string()),
        ];
        attributes.extend(record.client.map(|client| ("client.address", client.to_string())));
        attributes.extend(
            record
                .cause
                .map(|cause| ("ifnewer.cause", cause.name().to_owned())),
        );
        Self {
            trace: record.trace.clone(),
            name: record.kind.name(),
            kind: SpanKind::Server,
            ended: record.at + record.took,
            took: record.took,
            attributes,
            error: error_of(record),
        }
    }

    pub(super) fn of_upstream(record: &UpstreamRecord<'_>) -> Self {
        let is_status = record.code.bytes().all(|byte| byte.is_ascii_digit());
        let code = if is_status {
            "http.response.status_code"
        } else {
            "error.type"
        };
        Self {
            trace: record.trace.clone(),
            name: record.operation,
            kind: SpanKind::Client,
            ended: record.ended,
            took: record.took,
            attributes: vec![
                ("ifnewer.upstream", record.upstream.to_string()),
                (code, record.code.to_owned()),
            ],
            error: (!is_status || record.code.starts_with('5')).then(|| record.code.to_owned()),
        }
    }
}

fn error_of(record: &AccessRecord<'_>) -> Option<String> {
    if record.ended.is_failure() {
        return Some(record.ended.name().to_owned());
    }
    (record.status >= 500).then(|| record.reason.to_owned())
}

/// Channel to the exporter.
#[derive(Default)]
pub(super) struct Spans(OnceLock<mpsc::Sender<Span>>);

impl Spans {
    pub(super) fn has_sink(&self) -> bool {
        self.0.get().is_some()
    }

    pub(super) fn set_sink(&self, queue: mpsc::Sender<Span>) {
        // The first exporter stays: a process has only one.
        let _ = self.0.set(queue);
    }

    /// Whether the span was queued, or no exporter is set.
    pub(super) fn send(&self, span: impl FnOnce() -> Span) -> bool {
        self.0.get().is_none_or(|queue| match queue.try_reserve() {
            Ok(place) => {
                place.send(span());
                true
            }
            Err(_) => false,
        })
    }
}
