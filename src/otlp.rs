//! OTLP exporter: sends trace spans to an OpenTelemetry collector over HTTP. Only in builds with the feature `otlp`.
//!
//! A pull never waits for it: spans that the collector does not accept in time are dropped and counted. It uses the
//! client for upstreams, so there is no second HTTP and TLS stack, and a collector is reached through the same
//! proxies and with the same trust anchors as a registry. The trace ids are those of the log.

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

/// Maximum number of spans in a batch.
const BATCH_MAX: usize = 512;
/// How long the first span of a batch waits for others.
const BATCH_DELAY: Duration = Duration::from_secs(1);
/// Timeout of an export.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout of the last export at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of a collector's response.
const RESPONSE_BYTES_MAX: usize = 64 * 1024;

/// Why the exporter cannot be set up. A configuration error.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// The URL is invalid.
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT: `{url}`: {error}")]
    Url {
        /// The URL as configured.
        url: String,
        /// The reason.
        error: OriginError,
    },
    /// The HTTP client cannot be set up.
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT: {0}")]
    Settings(#[from] SettingsError),
    /// Another variable is invalid.
    #[error("OTEL_EXPORTER_OTLP_…: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// A running exporter.
pub struct OtlpExporter {
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl OtlpExporter {
    /// Exports the queued spans, within a short timeout, and ends.
    pub async fn finish(self) {
        self.shutdown.cancel();
        if timeout(SHUTDOWN_TIMEOUT, self.task).await.is_err() {
            tracing::warn!("failed to export the last spans: the OTLP collector did not respond");
        }
    }
}

/// Starts exporting the spans of `telemetry` to the collector at this URL (`http://…/v1/traces`), as this service.
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
    tracing::info!(collector = %url, "OTLP exporter started");
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
            None if !is_healthy => tracing::info!("OTLP export recovered"),
            Some(why) if is_healthy => {
                tracing::warn!(why, "OTLP export failed, spans are dropped");
            }
            _ => {}
        }
        is_healthy = why.is_none();
    }
}

/// Waits for a span, and then briefly for more. If cancelled, `batch` has what arrived.
async fn fill_batch(waiting: &mut mpsc::Receiver<Span>, batch: &mut Vec<Span>) {
    if waiting.recv_many(batch, BATCH_MAX).await == 0 {
        return;
    }
    let more = async {
        while batch.len() < BATCH_MAX && waiting.recv_many(batch, BATCH_MAX - batch.len()).await > 0 {}
    };
    // Either the delay has passed or the batch is full.
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

/// HTTP client of the exporter, built on the upstream client.
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
        let mut received = self
            .0
            .forward(forwarded)
            .await
            .map_err(|cause| cause.to_string())?;
        let mut bytes = Vec::new();
        while let Some(chunk) = received.chunk().await {
            bytes.extend_from_slice(&chunk.map_err(|cause| cause.to_string())?);
            if bytes.len() > RESPONSE_BYTES_MAX {
                return Err("the collector's response is too large".into());
            }
        }
        let mut response = Response::new(bytes.into());
        *response.status_mut() = received.status;
        *response.headers_mut() = received.headers;
        Ok(response)
    }
}
