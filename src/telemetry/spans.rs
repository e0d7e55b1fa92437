//! Parts of traces, handed to whoever records them and to nobody by default.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;

use super::{Answered, Exchange};
use crate::trace_context::Trace;

/// Parts of traces that wait to be recorded; further ones are dropped and counted.
pub const SPANS_WAITING_MAX: usize = 4096;

/// A part of a trace, after it.
#[derive(Debug)]
pub struct Span {
    /// Which part of which trace.
    pub trace: Trace,
    /// What was done, from a small set: a name of something asked for would have no bound.
    pub name: &'static str,
    /// Whose part it is.
    pub kind: SpanKind,
    /// When it was over.
    pub ended: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// What else there is to say, by the names of OpenTelemetry's conventions where it has one. No credential.
    pub facts: Vec<(&'static str, String)>,
    /// Why it went wrong.
    pub fault: Option<String>,
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
    pub(super) fn of_answer(answered: &Answered<'_>) -> Self {
        let mut facts = vec![
            ("http.response.status_code", answered.status.to_string()),
            ("ifnewer.upstream", answered.upstream.to_owned()),
            ("ifnewer.door", answered.door.to_owned()),
            ("ifnewer.image", answered.image.to_owned()),
            ("ifnewer.result", answered.result().name().to_owned()),
            ("ifnewer.reason", answered.reason.to_owned()),
            ("ifnewer.ended", answered.ended.name().to_owned()),
            ("http.response.body.size", answered.bytes.to_string()),
        ];
        facts.extend(
            answered
                .client
                .map(|client| ("client.address", client.to_string())),
        );
        facts.extend(
            answered
                .cause
                .map(|cause| ("ifnewer.cause", cause.name().to_owned())),
        );
        Self {
            trace: answered.trace.clone(),
            name: answered.kind.name(),
            kind: SpanKind::Server,
            ended: answered.at + answered.took,
            took: answered.took,
            facts,
            fault: fault(answered),
        }
    }

    pub(super) fn of_exchange(exchange: &Exchange<'_>) -> Self {
        let is_answer = exchange.code.bytes().all(|byte| byte.is_ascii_digit());
        let code = if is_answer {
            "http.response.status_code"
        } else {
            "error.type"
        };
        Self {
            trace: exchange.trace.clone(),
            name: exchange.operation,
            kind: SpanKind::Client,
            ended: exchange.ended,
            took: exchange.took,
            facts: vec![
                ("ifnewer.upstream", exchange.upstream.to_owned()),
                (code, exchange.code.to_owned()),
            ],
            fault: (!is_answer || exchange.code.starts_with('5')).then(|| exchange.code.to_owned()),
        }
    }
}

fn fault(answered: &Answered<'_>) -> Option<String> {
    if answered.ended.is_failure() {
        return Some(answered.ended.name().to_owned());
    }
    (answered.status >= 500).then(|| answered.reason.to_owned())
}

/// The way to whoever records. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Spans(Arc<OnceLock<mpsc::Sender<Span>>>);

impl Spans {
    pub(super) fn is_recorded(&self) -> bool {
        self.0.get().is_some()
    }

    pub(super) fn record(&self, queue: mpsc::Sender<Span>) {
        // Whoever came first stays: there is one recorder to a process.
        let _ = self.0.set(queue);
    }

    /// Says whether it fitted, or nobody records.
    pub(super) fn tell(&self, span: impl FnOnce() -> Span) -> bool {
        self.0.get().is_none_or(|queue| match queue.try_reserve() {
            Ok(place) => {
                place.send(span());
                true
            }
            Err(_) => false,
        })
    }
}
