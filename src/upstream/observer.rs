//! Observer of the requests to upstreams, for logs, metrics and traces.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::response::UpstreamResponse;
use crate::oci::endpoint::Endpoint;
use crate::trace_context::TraceContext;

/// One exchange with an upstream, after it.
#[derive(Clone, Debug)]
pub struct ObservedRequest<'a> {
    /// The upstream's name.
    pub upstream: &'a str,
    /// What was asked: `manifest-head`, `manifest-get`, `blob-head`, `blob-get`, `list`.
    pub endpoint: &'static str,
    /// The status, or the kind of silence.
    pub code: &'a str,
    /// From asking to the answer's head.
    pub took: Duration,
    /// Its part of the trace.
    pub trace: &'a TraceContext,
}

/// Hears of each exchange; nobody does by default.
#[derive(Clone, Default)]
pub struct Observer(Option<Arc<Callback>>);

type Callback = dyn Fn(&ObservedRequest<'_>) + Send + Sync;

impl Observer {
    /// Tells `callback`, which must not wait.
    pub fn new(callback: impl Fn(&ObservedRequest<'_>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(callback)))
    }

    /// Tells of an answer, or that one began to come (`None`).
    pub(super) fn record(
        &self,
        upstream: &str,
        (endpoint, is_head): (&Endpoint, bool),
        answer: Option<&UpstreamResponse>,
        took: Duration,
        trace: &TraceContext,
    ) {
        let Some(callback) = &self.0 else { return };
        let status = answer.and_then(|answer| answer.status);
        let failure = answer.and_then(UpstreamResponse::failure);
        let code = match (status, failure) {
            (Some(status), _) => status.as_str().to_owned(),
            (None, Some(cause)) => cause.name().to_owned(),
            (None, None) => "200".to_owned(),
        };
        callback(&ObservedRequest {
            upstream,
            endpoint: name(endpoint, is_head),
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

fn name(endpoint: &Endpoint, is_head: bool) -> &'static str {
    match endpoint {
        Endpoint::Manifest { .. } if is_head => "manifest-head",
        Endpoint::Manifest { .. } => "manifest-get",
        Endpoint::Blob { .. } if is_head => "blob-head",
        Endpoint::Blob { .. } => "blob-get",
        Endpoint::Ping | Endpoint::Tags { .. } | Endpoint::Referrers { .. } => "list",
    }
}
