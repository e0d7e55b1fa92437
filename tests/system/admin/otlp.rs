//! OTLP export: spans at the collector, and pulls without a collector.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, Upstream, within};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::net::SocketAddr;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// A collector that records the received spans.
struct Collector {
    address: SocketAddr,
    seen: watch::Sender<Vec<Span>>,
}

impl Collector {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = watch::Sender::new(Vec::new());
        let kept = seen.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let kept = kept.clone();
                let service = service_fn(move |request| take(request, kept.clone()));
                let serving = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                tokio::spawn(serving);
            }
        });
        Self { address, seen }
    }

    /// Waits for all of these spans and returns all that were received.
    async fn has(&self, names: &[&str]) -> Vec<Span> {
        let mut seen = self.seen.subscribe();
        let all = |spans: &Vec<Span>| {
            names
                .iter()
                .all(|name| spans.iter().any(|span| span.name == *name))
        };
        within("the traces", seen.wait_for(all)).await.unwrap().clone()
    }
}

async fn take(
    request: Request<Incoming>,
    kept: watch::Sender<Vec<Span>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    assert_eq!(request.uri().path(), "/v1/traces");
    assert_eq!(request.headers()["content-type"], "application/x-protobuf");
    let body = request.into_body().collect().await.unwrap().to_bytes();
    kept.send_modify(|all| all.extend(spans(&body)));
    Ok(Response::new(Full::default()))
}

/// The checked fields of a span.
#[derive(Clone, Debug)]
struct Span {
    service: String,
    trace: String,
    id: String,
    parent: String,
    name: String,
    kind: u64,
    facts: Vec<(String, String)>,
    failed: bool,
}

impl Span {
    fn fact(&self, name: &str) -> &str {
        let found = self.facts.iter().find(|(held, _)| held == name);
        &found.unwrap_or_else(|| panic!("no {name}: {self:#?}")).1
    }
}

/// `ExportTraceServiceRequest` of opentelemetry-proto's `trace_service.proto`, by its field numbers.
fn spans(request: &[u8]) -> Vec<Span> {
    let mut found = Vec::new();
    for resource_spans in Message::of(request).messages(1) {
        let service = resource_spans
            .messages(1)
            .iter()
            .flat_map(Message::facts)
            .find(|(name, _)| name == "service.name")
            .unwrap()
            .1;
        for span in resource_spans
            .messages(2)
            .iter()
            .flat_map(|scope| scope.messages(2))
        {
            found.push(Span {
                service: service.clone(),
                trace: hex(&span.bytes(1)),
                id: hex(&span.bytes(2)),
                parent: hex(&span.bytes(4)),
                name: String::from_utf8(span.bytes(5)).unwrap(),
                kind: span.number(6),
                facts: span.facts_at(9),
                failed: span.messages(15).iter().any(|status| status.number(3) == 2),
            });
        }
    }
    found
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// A protobuf message: its fields in wire order.
struct Message(Vec<(u64, Field)>);

enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

impl Message {
    fn of(mut rest: &[u8]) -> Self {
        let mut fields = Vec::new();
        while !rest.is_empty() {
            let key = varint(&mut rest);
            let field = match key & 7 {
                0 => Field::Number(varint(&mut rest)),
                1 => Field::Number(u64::from_le_bytes(taken(&mut rest, 8).try_into().unwrap())),
                2 => {
                    let length = usize::try_from(varint(&mut rest)).unwrap();
                    Field::Bytes(taken(&mut rest, length).to_vec())
                }
                5 => Field::Number(u64::from(u32::from_le_bytes(
                    taken(&mut rest, 4).try_into().unwrap(),
                ))),
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, field));
        }
        Self(fields)
    }

    fn all_bytes(&self, number: u64) -> Vec<Vec<u8>> {
        let of_it = self.0.iter().filter(|(held, _)| *held == number);
        of_it
            .filter_map(|(_, field)| match field {
                Field::Bytes(bytes) => Some(bytes.clone()),
                Field::Number(_) => None,
            })
            .collect()
    }

    fn messages(&self, number: u64) -> Vec<Message> {
        let all = self.all_bytes(number);
        all.iter().map(|bytes| Message::of(bytes)).collect()
    }

    fn bytes(&self, number: u64) -> Vec<u8> {
        self.all_bytes(number).pop().unwrap_or_default()
    }

    fn number(&self, number: u64) -> u64 {
        let mut of_it = self.0.iter().filter(|(held, _)| *held == number);
        of_it
            .find_map(|(_, field)| match field {
                Field::Number(value) => Some(*value),
                Field::Bytes(_) => None,
            })
            .unwrap_or(0)
    }

    /// `KeyValue`s with string values.
    fn facts_at(&self, number: u64) -> Vec<(String, String)> {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let pairs = self.messages(number);
        pairs
            .iter()
            .map(|pair| (text(pair.bytes(1)), text(pair.messages(2)[0].bytes(1))))
            .collect()
    }

    fn facts(&self) -> Vec<(String, String)> {
        self.facts_at(1)
    }
}

fn varint(rest: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = taken(rest, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

fn taken<'a>(rest: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, left) = rest.split_at(count);
    *rest = left;
    taken
}

fn sending_to(upstream: &Upstream, collector: SocketAddr) -> Setup {
    Setup::over(upstream)
        .environment("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://{collector}"))
        .environment("OTEL_SERVICE_NAME", "runner-7")
}

/// Dropped spans.
async fn dropped(proxy: &Proxy) -> u64 {
    let metrics = proxy.admin("/metrics").await;
    let text = String::from_utf8_lossy(&metrics.body).into_owned();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("ifnewer_spans_dropped_total "));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn cold_pull_exports_one_trace_of_request_and_download() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let collector = Collector::start().await;
    let proxy = sending_to(&upstream, collector.address).start().await;
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let traced = |ask: crate::proxy::Ask| ask.header("traceparent", parent);
    traced(proxy.manifest("library/demo", "latest"))
        .await
        .is_image(&image);
    let blob = &image.blobs[0];
    traced(proxy.blob("library/demo", &blob.digest))
        .await
        .is_blob(blob);

    let spans = collector
        .has(&["tag", "manifest-get", "blob", "blob-get", "download"])
        .await;
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    for span in &spans {
        assert_eq!(span.trace, "4bf92f3577b34da6a3ce929d0e0e4736", "{span:#?}");
        assert_eq!(span.service, "runner-7");
        assert!(!span.failed, "{span:#?}");
    }
    let (tag, blob) = (named("tag"), named("blob"));
    assert_eq!(
        (tag.kind, tag.parent.as_str()),
        (2, "00f067aa0ba902b7"),
        "{tag:#?}"
    );
    assert_eq!(tag.fact("ifnewer.reason"), "not-cached");
    assert_eq!(tag.fact("http.response.status_code"), "200");
    assert_eq!(tag.fact("ifnewer.image"), "library/demo:latest");
    assert_eq!(
        (named("manifest-get").kind, &named("manifest-get").parent),
        (3, &tag.id)
    );
    assert_eq!((named("download").kind, &named("download").parent), (1, &blob.id));
    assert_eq!(named("blob-get").parent, named("download").id);
    let asked = upstream.requests();
    let get = asked.iter().find(|seen| seen.path.contains("/blobs/")).unwrap();
    assert!(get.header("traceparent").unwrap().contains(&named("blob-get").id));
    assert_eq!(dropped(&proxy).await, 0);
}

#[tokio::test]
async fn sampled_flag_of_client_is_respected() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let collector = Collector::start().await;
    let proxy = sending_to(&upstream, collector.address).start().await;
    let unwanted = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
    let ask = proxy.manifest("library/demo", "latest");
    ask.header("traceparent", unwanted).await.is_image(&image);
    proxy.manifest("library/demo", "latest").await.is_image(&image);
    let spans = collector.has(&["tag", "manifest-head"]).await;
    assert!(
        spans.iter().all(|span| !span.trace.starts_with("4bf92f")),
        "{spans:#?}"
    );
}

#[tokio::test]
async fn a_silent_registry_is_a_fault_in_the_trace() {
    let upstream = Upstream::start().await;
    let collector = Collector::start().await;
    let proxy = sending_to(&upstream, collector.address).start().await;
    upstream.refuses();
    proxy.manifest("library/demo", "latest").await.is_unreachable();
    let spans = collector.has(&["tag", "manifest-get"]).await;
    assert!(spans.iter().all(|span| span.failed), "{spans:#?}");
    let question = spans.iter().find(|span| span.name == "manifest-get").unwrap();
    assert_eq!(question.fact("error.type"), "connection-refused");
}

#[tokio::test]
async fn unavailable_collector_is_counted_and_fails_no_pull() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let gone = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let mut proxy = sending_to(&upstream, gone).start().await;
    proxy.pull("library/demo", "latest", &image).await;
    proxy.program().says("OTLP export failed").await;
    assert!(dropped(&proxy).await > 0);
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
}
