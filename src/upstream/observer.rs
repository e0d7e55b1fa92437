//! Observer of requests to upstreams, for logs, metrics and traces.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::response::UpstreamResponse;
use crate::oci::endpoint::Endpoint;
use crate::trace_context::TraceContext;

/// One request to an upstream, after it ended.
#[derive(Clone, Debug)]
pub struct ObservedRequest<'a> {
    /// The upstream's name.
    pub upstream: &'a str,
    /// The kind of request: `manifest-head`, `manifest-get`, `blob-head`, `blob-get`, `list`.
    pub endpoint: &'static str,
    /// The status code, or the name of the failure.
    pub code: &'a str,
    /// From sending the request to the response head.
    pub took: Duration,
    /// The trace context of the request.
    pub trace: &'a TraceContext,
}

/// Callback for each request; none by default.
#[derive(Clone, Default)]
pub struct Observer(Option<Arc<Callback>>);

type Callback = dyn Fn(&ObservedRequest<'_>) + Send + Sync;

impl Observer {
    /// Calls `callback` for each request. It must not block.
    pub fn new(callback: impl Fn(&ObservedRequest<'_>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(callback)))
    }

    /// Records a response. `None`: a GET succeeded, and its body follows.
    pub(super) fn record(
        &self,
        upstream: &str,
        (endpoint, is_head): (&Endpoint, bool),
        response: Option<&UpstreamResponse>,
        took: Duration,
        trace: &TraceContext,
    ) {
        let Some(callback) = &self.0 else { return };
        let status = response.and_then(|response| response.status);
        let failure = response.and_then(UpstreamResponse::failure);
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
            "Observer(none)"
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
