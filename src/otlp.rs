//! Traces to an OpenTelemetry collector, by OTLP over HTTP. Only in builds with the feature `otlp`.
//!
//! A pull never waits for it: what the collector does not take in time is dropped and counted. Bytes go out by our own
//! client, so there is no second HTTP stack and no second TLS, and a collector is reached through the same proxies and
//! with the same authorities as a registry. The ids are those of the log.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::{BodyExt as _, Full};
use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind as OtelKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::EnvResourceDetector;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::oci::UpstreamFailure;
use crate::telemetry::{SPANS_WAITING_MAX, Span, SpanKind, Telemetry};
use crate::upstream::forward::ForwardRequest;
use crate::upstream::{Origin, OriginError, Settings, SettingsError, Transport, Upstream};

/// Parts of traces sent together at most.
const BATCH_MAX: usize = 512;
/// How long a part waits for others to be sent with.
const BATCH_DELAY: Duration = Duration::from_secs(1);
/// How long the collector is waited for.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// The same, at the end of the process.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Answers of a collector are short.
const RESPONSE_BYTES_MAX: usize = 64 * 1024;

/// Why traces cannot be sent. The operator's fault.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// The address says nothing.
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT: `{url}`: {error}")]
    Url {
        /// As configured.
        url: String,
        /// Why.
        error: OriginError,
    },
    /// No client can be made.
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT: {0}")]
    Settings(#[from] SettingsError),
    /// Another of the variables is wrong.
    #[error("OTEL_EXPORTER_OTLP_…: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// Traces are sent until it is finished.
pub struct OtlpExporter {
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl OtlpExporter {
    /// Sends what waits, but not for long.
    pub async fn finish(self) {
        self.shutdown.cancel();
        if timeout(SHUTDOWN_TIMEOUT, self.task).await.is_err() {
            tracing::warn!("the last traces were not sent: the OTLP collector does not answer");
        }
    }
}

/// Sends what `telemetry` tells of traces to the collector at this URL (`http://…/v1/traces`), as this service.
pub fn start((url, service): &(String, String), telemetry: &Telemetry) -> Result<OtlpExporter, OtlpError> {
    let wrong = |error| OtlpError::Url {
        url: url.clone(),
        error,
    };
    let uri: Uri = url
        .parse()
        .map_err(|_| wrong(OriginError::RequestError(url.clone())))?;
    let base = url.strip_suffix(uri.path()).unwrap_or(url);
    let origin: Origin = base.parse().map_err(wrong)?;
    let collector = Upstream::new(
        Settings::new("OTLP collector", vec![origin]),
        &Transport::system(),
    )?;
    let mut exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(OtlpClient(collector))
        .with_endpoint(url)
        .with_protocol(Protocol::HttpBinary)
        .build()?;
    let resource = Resource::builder_empty()
        .with_detector(Box::new(EnvResourceDetector::new()))
        .with_service_name(service.clone())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    exporter.set_resource(&resource);
    let (queue, waiting) = mpsc::channel(SPANS_WAITING_MAX);
    telemetry.set_span_sink(queue);
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(send(exporter, waiting, telemetry.clone(), shutdown.clone()));
    tracing::info!(collector = %url, "traces are sent");
    Ok(OtlpExporter { shutdown, task })
}

async fn send(
    exporter: SpanExporter,
    mut waiting: mpsc::Receiver<Span>,
    telemetry: Telemetry,
    shutdown: CancellationToken,
) {
    let scope = InstrumentationScope::builder("ifnewer").build();
    let mut is_healthy = true;
    loop {
        let mut batch = Vec::new();
        let gathered = shutdown
            .run_until_cancelled(fill_batch(&mut waiting, &mut batch))
            .await;
        if gathered.is_none() {
            waiting.close();
        }
        while batch.len() < BATCH_MAX
            && let Ok(span) = waiting.try_recv()
        {
            batch.push(span);
        }
        if batch.is_empty() {
            return;
        }
        let count = batch.len() as u64;
        let batch = batch.into_iter().map(|span| span_data(span, &scope)).collect();
        let why = match timeout(EXPORT_TIMEOUT, exporter.export(batch)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(UpstreamFailure::Timeout.to_string()),
        };
        if why.is_some() {
            telemetry.record_spans_dropped(count);
        }
        match &why {
            None if !is_healthy => tracing::info!("the OTLP collector takes traces again"),
            Some(why) if is_healthy => {
                tracing::warn!(
                    why,
                    "the OTLP collector takes no traces; they are dropped and counted"
                );
            }
            _ => {}
        }
        is_healthy = why.is_none();
    }
}

/// Waits for one, and then a moment for more. Cut short, it leaves in `batch` what came.
async fn fill_batch(waiting: &mut mpsc::Receiver<Span>, batch: &mut Vec<Span>) {
    if waiting.recv_many(batch, BATCH_MAX).await == 0 {
        return;
    }
    let more = async {
        while batch.len() < BATCH_MAX && waiting.recv_many(batch, BATCH_MAX - batch.len()).await > 0 {}
    };
    // Enough time or enough of them: both are well.
    let _ = timeout(BATCH_DELAY, more).await;
}

fn span_data(span: Span, scope: &InstrumentationScope) -> SpanData {
    let trace = &span.trace;
    let (id, part) = (
        TraceId::from_bytes(trace.id().to_bytes()),
        SpanId::from_bytes(trace.span_id().get().to_be_bytes()),
    );
    let parent = trace.parent_span_id().map_or(SpanId::INVALID, |parent| {
        SpanId::from_bytes(parent.get().to_be_bytes())
    });
    SpanData {
        span_context: SpanContext::new(id, part, TraceFlags::SAMPLED, false, TraceState::NONE),
        parent_span_id: parent,
        parent_span_is_remote: span.kind == SpanKind::Server,
        span_kind: match span.kind {
            SpanKind::Server => OtelKind::Server,
            SpanKind::Client => OtelKind::Client,
            SpanKind::Internal => OtelKind::Internal,
        },
        name: span.name.into(),
        start_time: span.ended.checked_sub(span.took).unwrap_or(span.ended),
        end_time: span.ended,
        attributes: span
            .attributes
            .into_iter()
            .map(|(name, value)| KeyValue::new(name, value))
            .collect(),
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: span.error.map_or(Status::Unset, Status::error),
        instrumentation_scope: scope.clone(),
    }
}

/// The collector, reached as an upstream is.
#[derive(Debug)]
struct OtlpClient(Upstream);

#[async_trait::async_trait]
impl HttpClient for OtlpClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let forwarded = ForwardRequest {
            method: head.method,
            path_and_query: head
                .uri
                .path_and_query()
                .map_or("/", |path| path.as_str())
                .to_owned(),
            headers: head.headers,
            body: Full::new(body).map_err(|never| match never {}).boxed_unsync(),
            base: String::new(),
        };
        let mut answer = self
            .0
            .forward(forwarded)
            .await
            .map_err(|cause| cause.to_string())?;
        let mut bytes = Vec::new();
        while let Some(chunk) = answer.chunk().await {
            bytes.extend_from_slice(&chunk.map_err(|cause| cause.to_string())?);
            if bytes.len() > RESPONSE_BYTES_MAX {
                return Err("the collector's answer does not end".into());
            }
        }
        let mut response = Response::new(bytes.into());
        *response.status_mut() = answer.status;
        *response.headers_mut() = answer.headers;
        Ok(response)
    }
}
