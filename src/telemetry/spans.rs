//! Parts of traces, handed to whoever records them and to nobody by default.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;

use super::{AccessRecord, UpstreamRecord};
use crate::trace_context::TraceContext;

/// Parts of traces that wait to be recorded; further ones are dropped and counted.
pub const SPANS_WAITING_MAX: usize = 4096;

/// A part of a trace, after it.
#[derive(Debug)]
pub struct Span {
    /// Which part of which trace.
    pub trace: TraceContext,
    /// What was done, from a small set: a name of something asked for would have no bound.
    pub name: &'static str,
    /// Whose part it is.
    pub kind: SpanKind,
    /// When it was over.
    pub ended: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// What else there is to say, by the names of OpenTelemetry's conventions where it has one. No credential.
    pub attributes: Vec<(&'static str, String)>,
    /// Why it went wrong.
    pub error: Option<String>,
}

/// Whose part of a trace it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    /// An answer to a client.
    Server,
    /// A question to an upstream.
    Client,
    /// What is done here.
    Internal,
}

impl Span {
    /// An answer, up to the end of its body.
    pub(super) fn of_access(record: &AccessRecord<'_>) -> Self {
        let mut attributes = vec![
            ("http.response.status_code", record.status.to_string()),
            ("ifnewer.upstream", record.upstream.to_owned()),
            ("ifnewer.route", record.route.to_owned()),
            ("ifnewer.image", record.image.to_owned()),
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
                ("ifnewer.upstream", record.upstream.to_owned()),
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

/// The way to whoever records. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Spans(Arc<OnceLock<mpsc::Sender<Span>>>);

impl Spans {
    pub(super) fn has_sink(&self) -> bool {
        self.0.get().is_some()
    }

    pub(super) fn set_sink(&self, queue: mpsc::Sender<Span>) {
        // Whoever came first stays: there is one recorder to a process.
        let _ = self.0.set(queue);
    }

    /// Says whether it fitted, or nobody records.
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
