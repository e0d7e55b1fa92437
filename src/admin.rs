//! What an operator can see: health, metrics, images, and why. Read-only, on a listener of its own.
//!
//! It names private repositories, so it is reachable from this machine only; and a page of another site that a browser
//! on this machine shows must not reach it either (DNS rebinding), so the host asked for is checked.

mod decisions;
pub mod probe;
mod upstreams;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HOST};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::event::{Events, Levels};
use crate::oci::{Query, Reference, Repository};
use crate::server::Registry;
use crate::store::refs::TagKey;

/// Images on one page of the list.
const IMAGES_MAX: usize = 1_000;

const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// The metrics' type: `OpenMetrics`, which Prometheus and its kin ask for.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers the operator.
#[derive(Clone)]
pub struct Admin {
    /// The registry now in effect.
    pub registry: Arc<ArcSwap<Registry>>,
    /// What was counted.
    pub events: Events,
    /// The time of day.
    pub clock: Clock,
}

impl Admin {
    /// Serves a TCP listener until the process ends.
    pub async fn run(self, listener: TcpListener, ending: CancellationToken) {
        loop {
            tokio::select! {
                () = ending.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.spawn(stream, true),
                    Err(error) => pause(&error).await,
                }
            }
        }
    }

    /// Serves a unix socket until the process ends.
    pub async fn run_unix(self, listener: UnixListener, ending: CancellationToken) {
        loop {
            tokio::select! {
                () = ending.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.spawn(stream, false),
                    Err(error) => pause(&error).await,
                }
            }
        }
    }

    fn spawn<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, stream: S, checks_host: bool) {
        let admin = self.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let response = admin.answer(&request, checks_host);
            async move { Ok::<_, Infallible>(response) }
        });
        tokio::spawn(async move {
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an admin connection ended badly");
            }
        });
    }

    fn answer(&self, request: &Request<Incoming>, checks_host: bool) -> Response<Full<Bytes>> {
        if checks_host && !asks_for_this_machine(request) {
            return problem(
                StatusCode::MISDIRECTED_REQUEST,
                "the Host header must name this machine: use http://127.0.0.1 or http://localhost",
            );
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return problem(StatusCode::METHOD_NOT_ALLOWED, "nothing here can be changed");
        }
        match request.uri().path() {
            "/healthz" => text(StatusCode::OK, "text/plain", "ok\n".to_owned()),
            "/readyz" => self.ready(),
            "/metrics" => text(StatusCode::OK, OPENMETRICS, self.events.text(&self.levels())),
            "/api/v1/status" => self.status(),
            "/api/v1/images" => self.images(request.uri().query()),
            "/api/v1/upstreams" => answer(&upstreams::listed(&self.registry.load())),
            "/api/v1/events" => decisions::list(&self.events, request.uri().query()),
            "/api/v1/why" => self.why(request.uri().query()),
            path => problem(StatusCode::NOT_FOUND, &format!("there is no {path} here")),
        }
    }

    /// Ready as long as requests are answered: a silent upstream or a broken index makes a slower cache, not a dead one.
    fn ready(&self) -> Response<Full<Bytes>> {
        let registry = self.registry.load();
        let mut lines = vec!["ready".to_owned()];
        for trouble in registry.pull.store().troubles() {
            lines.push(format!("degraded: {trouble}"));
        }
        for site in registry.doors.all() {
            if let Some((since, cause)) = site.upstream().state().open {
                lines.push(format!(
                    "{} {cause} (for {} s); serving what is held",
                    site.name(),
                    since.as_secs()
                ));
            }
        }
        lines.push(String::new());
        text(StatusCode::OK, "text/plain", lines.join("\n"))
    }

    fn levels(&self) -> Levels {
        let registry = self.registry.load();
        let store = registry.pull.store();
        let (usage, evicted) = (store.usage(), store.evictions());
        let upstreams = registry.doors.all().iter().map(|site| {
            let is_up = site.upstream().silent_now().is_none();
            (site.name().into(), is_up)
        });
        Levels {
            store_bytes: usage.blob_bytes + usage.manifest_bytes,
            store_objects: usage.blobs + usage.manifests,
            store_bytes_max: store.limits().bytes_max,
            evicted: vec![("size", evicted.for_size), ("free", evicted.for_free)],
            evicted_bytes: evicted.bytes,
            without_room: evicted.refused,
            scrub_damaged: store.scrubbed().damaged,
            is_store_degraded: !store.troubles().is_empty(),
            transfers: registry.pull.downloads().count() as u64,
            upstreams: upstreams.collect(),
            allowances: upstreams::allowances(&registry),
        }
    }

    /// The store in numbers: what is held, what may be, what went, and what is wrong.
    fn status(&self) -> Response<Full<Bytes>> {
        let registry = self.registry.load();
        let store = registry.pull.store();
        let (usage, limits, evicted) = (store.usage(), store.limits(), store.evictions());
        let scrubbed = store.scrubbed();
        let troubles: Vec<String> = store.troubles().iter().map(ToString::to_string).collect();
        answer(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "store": {
                "troubles": troubles,
                "blobs": usage.blobs,
                "blob_bytes": usage.blob_bytes,
                "manifests": usage.manifests,
                "manifest_bytes": usage.manifest_bytes,
                "tags": usage.tags,
                "is_counted": usage.is_complete,
                "size": limits.bytes_max,
                "free": limits.free_bytes_min,
                "disk_free_bytes": store.free_bytes().ok(),
                "pins": store.pins().len(),
                "scrubbed": {
                    "objects": scrubbed.objects,
                    "bytes": scrubbed.bytes,
                    "damaged": scrubbed.damaged,
                },
                "evicted": {
                    "for_size": evicted.for_size,
                    "for_free": evicted.for_free,
                    "tags": evicted.tags,
                    "bytes": evicted.bytes,
                    "without_room": evicted.refused,
                },
            },
            "transfers": registry.pull.downloads().count(),
        }))
    }

    /// `?after=` names the last image of the page before, as the page itself says in `next`.
    fn images(&self, query: Option<&str>) -> Response<Full<Bytes>> {
        let registry = self.registry.load();
        let after = match Query::parse(query).map(|(query, _)| query.get("after").map(str::to_owned)) {
            Ok(None) => None,
            Ok(Some(image)) => match Named::read(&image, &registry) {
                Ok(Named {
                    upstream,
                    repository,
                    reference: Reference::Tag(tag),
                }) => Some(TagKey {
                    upstream,
                    repository,
                    tag,
                }),
                _ => return problem(StatusCode::BAD_REQUEST, "`after` must be an image as listed"),
            },
            Err(error) => return problem(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let store = registry.pull.store();
        let page = store.tags(after.as_ref(), IMAGES_MAX);
        let next = (page.len() == IMAGES_MAX).then(|| page.last()).flatten();
        let next = next.map(|(key, _)| format!("{}/{}:{}", key.upstream, key.repository, key.tag));
        let images: Vec<Value> = page
            .iter()
            .map(|(key, record)| {
                let variants: Vec<Value> = record
                    .variants
                    .iter()
                    .map(|variant| {
                        json!({
                            "digest": variant.digest.to_string(),
                            "media_type": variant.media_type.as_str(),
                            "held": matches!(store.manifest(&variant.digest), Ok(Some(_))),
                            "confirmed_at": rfc3339(variant.confirmed_at),
                            "first_seen_at": rfc3339(variant.first_held_at),
                        })
                    })
                    .collect();
                json!({
                    "image": format!("{}/{}:{}", key.upstream, key.repository, key.tag),
                    "upstream": &*key.upstream,
                    "repository": key.repository.as_str(),
                    "tag": key.tag.as_str(),
                    "variants": variants,
                })
            })
            .collect();
        answer(&json!({ "images": images, "next": next }))
    }

    fn why(&self, query: Option<&str>) -> Response<Full<Bytes>> {
        let registry = self.registry.load();
        let image = match Query::parse(query) {
            Ok((query, _)) => query.get("image").unwrap_or_default().to_owned(),
            Err(error) => return problem(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let named = match Named::read(&image, &registry) {
            Ok(named) => named,
            Err(fault) => return problem(StatusCode::BAD_REQUEST, &fault),
        };
        let Some(site) = registry.doors.named(&named.upstream) else {
            return problem(StatusCode::NOT_FOUND, "no such upstream");
        };
        let now = self.clock.now();
        let (situation, verdict, rule) = registry.pull.why(site, &named.repository, &named.reference, now);
        let held = situation.held.map(
            |held| json!({ "digest": held.digest.to_string(), "confirmed_at": rfc3339(held.confirmed_at) }),
        );
        answer(&json!({
            "image": image,
            "rule": &*rule,
            "policy": situation.policy.name(),
            "held": held,
            "standing_of_anonymous": format!("{:?}", situation.standing).to_lowercase(),
            "fresh_seconds": situation.fresh.as_secs(),
            "stale_seconds": situation.stale.map(|stale| stale.as_secs()),
            "absent": situation.absent.name(),
            "upstream_silent": site.upstream().silent_now().map(super::oci::cause::Cause::name),
            "verdict": verdict.name(),
            "explanation": format!("{verdict:?}, given {situation:?}"),
        }))
    }
}

/// An image as people write it.
struct Named {
    upstream: Arc<str>,
    repository: Repository,
    reference: Reference,
}

impl Named {
    fn read(image: &str, registry: &Registry) -> Result<Self, String> {
        if image.is_empty() {
            return Err("say which image: ?image=docker.io/library/alpine:3.20".to_owned());
        }
        let (name, reference) = match (image.split_once('@'), image.rsplit_once(':')) {
            (Some((name, digest)), _) => (name, digest),
            (None, Some((name, tag))) if !tag.contains('/') => (name, tag),
            _ => (image, "latest"),
        };
        let (site, rest) = match name.split_once('/') {
            Some((first, rest)) => match registry.doors.named(first) {
                Some(site) => (site, rest),
                None if first.contains(['.', ':']) => {
                    return Err(format!("`{first}` is not a configured upstream"));
                }
                None => (registry.doors.default_site(), name),
            },
            None => (registry.doors.default_site(), name),
        };
        let repository: Repository = rest.parse().map_err(|error| format!("{error}"))?;
        let repository = site.full_name(repository).map_err(|error| error.to_string())?;
        let reference = reference.parse().map_err(|error| format!("{error}"))?;
        Ok(Self {
            upstream: site.name().into(),
            repository,
            reference,
        })
    }
}

fn asks_for_this_machine(request: &Request<Incoming>) -> bool {
    let Some(host) = request.headers().get(HOST).and_then(|host| host.to_str().ok()) else {
        return false;
    };
    let Ok(authority) = host.parse::<http::uri::Authority>() else {
        return false;
    };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(at).to_string()
}

fn answer(value: &Value) -> Response<Full<Bytes>> {
    text(StatusCode::OK, "application/json", value.to_string())
}

/// RFC 9457.
fn problem(status: StatusCode, detail: &str) -> Response<Full<Bytes>> {
    let title = status.canonical_reason().unwrap_or("error");
    let body = json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail });
    text(status, "application/problem+json", body.to_string())
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let length = body.len();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CONTENT_LENGTH, length.into());
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn pause(error: &std::io::Error) {
    tracing::warn!(%error, "an admin connection could not be accepted");
    tokio::time::sleep(Duration::from_millis(50)).await;
}
