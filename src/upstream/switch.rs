//! What an operator may do to all upstreams at once, and what hears of their answers.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::answer::Answer;
use crate::oci::Cause;
use crate::oci::operation::Operation;
use crate::trace_context::Trace;

/// While it is on, no upstream is asked anything: each is silent, because of [`Cause::Offline`]. Transfers under way go
/// on until they break. Clones are the same switch.
#[derive(Clone, Debug, Default)]
pub struct Offline(Arc<AtomicBool>);

impl Offline {
    /// Turns it on or off; says how it was before.
    pub fn set(&self, on: bool) -> bool {
        self.0.swap(on, Ordering::Relaxed)
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn cause(&self) -> Option<Cause> {
        self.is_on().then_some(Cause::Offline)
    }
}

/// One exchange with an upstream, after it.
#[derive(Clone, Debug)]
pub struct Exchanged<'a> {
    /// The upstream's name.
    pub upstream: &'a str,
    /// What was asked: `manifest-head`, `manifest-get`, `blob-head`, `blob-get`, `list`.
    pub operation: &'static str,
    /// The status, or the kind of silence.
    pub code: &'a str,
    /// From asking to the answer's head.
    pub took: Duration,
    /// Its part of the trace.
    pub trace: &'a Trace,
}

/// Hears of each exchange; nobody does by default.
#[derive(Clone, Default)]
pub struct Observer(Option<Arc<Hear>>);

type Hear = dyn Fn(&Exchanged<'_>) + Send + Sync;

impl Observer {
    /// Tells `hear`, which must not wait.
    pub fn new(hear: impl Fn(&Exchanged<'_>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hear)))
    }

    /// Tells of an answer, or that one began to come (`None`).
    pub(super) fn tell(
        &self,
        upstream: &str,
        (operation, is_head): (&Operation, bool),
        answer: Option<&Answer>,
        took: Duration,
        trace: &Trace,
    ) {
        let Some(hear) = &self.0 else { return };
        let status = answer.and_then(|answer| answer.status);
        let silence = answer.and_then(Answer::silence);
        let code = match (status, silence) {
            (Some(status), _) => status.as_str().to_owned(),
            (None, Some(cause)) => cause.name().to_owned(),
            (None, None) => "200".to_owned(),
        };
        hear(&Exchanged {
            upstream,
            operation: name(operation, is_head),
            code: &code,
            took,
            trace,
        });
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Observer"
        } else {
            "Observer(nobody)"
        })
    }
}

fn name(operation: &Operation, is_head: bool) -> &'static str {
    match operation {
        Operation::Manifest { .. } if is_head => "manifest-head",
        Operation::Manifest { .. } => "manifest-get",
        Operation::Blob { .. } if is_head => "blob-head",
        Operation::Blob { .. } => "blob-get",
        Operation::Ping | Operation::Tags { .. } | Operation::Referrers { .. } => "list",
    }
}
