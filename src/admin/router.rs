//! Request routing of the admin API: paths and methods.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_DISPOSITION, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::events::Filter;
use super::image_ref::ImageRef;
use super::images::{self, ListQuery};
use super::pull_jobs::{Platforms, PullSpec, request};
use super::response::{ApiResponse, Body, Problem, full, json_response, json_with_status};
use super::{Admin, explain, page, status, upstreams, verdicts};
use crate::oci::{Endpoint, Query, Reference};
use crate::proxy::Refreshed;
use crate::server::ServingState;
use crate::store::verdicts::VerdictKind;

/// Maximum size of a request body.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Timeout for reading a request body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// `OpenAPI` description.
pub(super) const OPENAPI: &str = include_str!("openapi.json");

/// Allowed methods of paths that take others than GET, for 405 responses.
const METHODS: &[(&str, &str)] = &[
    ("/api/v1/images", "GET, HEAD, DELETE"),
    ("/api/v1/pulls", "GET, HEAD, POST"),
    ("/api/v1/pins", "GET, HEAD, POST"),
    ("/api/v1/blocks", "GET, HEAD, POST"),
    ("/api/v1/approvals", "GET, HEAD, POST"),
    ("/api/v1/refresh", "POST"),
    ("/api/v1/offline", "GET, HEAD, POST"),
    ("/api/v1/gc", "POST"),
    ("/api/v1/verify", "GET, HEAD, POST"),
    ("/api/v1/import", "POST"),
    ("/api/v1/why", "GET, HEAD, POST"),
];

impl Admin {
    /// Finishes a response: renders a problem, and drops the body for HEAD.
    pub(super) fn finish(head: &Parts, reply: Result<ApiResponse, Problem>) -> ApiResponse {
        let mut reply = reply.unwrap_or_else(|problem| Self::problem_response(head, &problem));
        if head.method == Method::HEAD {
            *reply.body_mut() = Body::Full(None);
        }
        reply
    }

    /// Routes an authorized request.
    pub(super) async fn route(
        &self,
        head: &Parts,
        body: Incoming,
        client: Option<IpAddr>,
    ) -> Result<ApiResponse, Problem> {
        let (query, _) =
            Query::parse(head.uri.query()).map_err(|error| Problem::bad_request(error.to_string()))?;
        let path = head.uri.path();
        match head.method.as_str() {
            "GET" | "HEAD" => self.get(path, &query, (head, client)).await,
            "DELETE" if path == "/api/v1/images" => self.remove(&query).await,
            "POST" if path == "/api/v1/import" => self.import(&query, body).await,
            "POST" => {
                let body = read_body(body).await?;
                match path {
                    "/api/v1/why" => self.why_posted(&body).await,
                    "/api/v1/pulls" => self.pull_posted(&body),
                    "/api/v1/refresh" => self.refresh_posted(&body).await,
                    "/api/v1/offline" => self.offline_posted(&body).await,
                    "/api/v1/gc" => self.gc_posted(&body).await,
                    "/api/v1/verify" => self.verify_posted(&body).await,
                    "/api/v1/pins" => self.pin_posted(&body).await,
                    "/api/v1/blocks" => self.block_posted(&body).await,
                    "/api/v1/approvals" => self.approval_posted(&body).await,
                    "/act" => page::submit_form(self, &body).await,
                    _ => Err(Self::no_such_path(path, &head.method)),
                }
            }
            _ => Err(Self::no_such_path(path, &head.method)),
        }
    }

    async fn get(
        &self,
        path: &str,
        query: &Query,
        (head, client): (&Parts, Option<IpAddr>),
    ) -> Result<ApiResponse, Problem> {
        let now = self.clock.now();
        if let Some(id) = path.strip_prefix("/api/v1/pulls/") {
            return self.pull_of(id);
        }
        let registry = self.registry.load_full();
        Ok(match path {
            "/" => page::page(self, query, head).await?,
            "/style.css" => full(StatusCode::OK, "text/css; charset=utf-8", page::STYLE),
            "/live.js" => full(StatusCode::OK, "text/javascript; charset=utf-8", page::SCRIPT),
            "/icon.svg" => full(StatusCode::OK, "image/svg+xml", page::ICON),
            "/ca.pem" => self.ca().await?,
            "/api/openapi.json" => full(StatusCode::OK, "application/json", OPENAPI),
            "/api/v1/status" => json_of(&self.status(now))?,
            "/api/v1/series" => {
                let span = match query.get("span").unwrap_or("hour") {
                    "hour" => status::HOUR,
                    "day" => status::DAY,
                    other => {
                        return Err(Problem::bad_request(format!(
                            "`span` is hour or day, not `{other}`"
                        )));
                    }
                };
                json_response(&json!({ "minutes": span.1, "points": self.series(span, now) }))
            }
            "/api/v1/images" => {
                let list = ListQuery::read(query)?;
                blocking(move || Ok(images::list_response(&registry, &list, now))).await?
            }
            "/api/v1/image" => {
                let named = ImageRef::from_query(query, &registry)?;
                blocking(move || json_of(&images::details(&registry, &named, now)?)).await?
            }
            "/api/v1/why" => {
                let named = ImageRef::from_query(query, &registry)?;
                json_of(&explain::explain(&registry, &named, None, now).await)?
            }
            "/api/v1/upstreams" => json_response(&upstreams::to_json(&registry, now)),
            "/api/v1/transfers" => json_response(&json!({ "transfers": status::transfers(&registry) })),
            "/api/v1/events" => json_response(&json!({ "events": self.decisions(&Filter::read(query)?) })),
            "/api/v1/events/stream" => self.watch(Filter::read(query)?, client)?,
            "/api/v1/clients" => json_response(&json!({ "clients": self.clients_seen(now) })),
            "/api/v1/pulls" => {
                json_response(&json!({ "pulls": self.pull_jobs.list(registry.proxy.downloads()) }))
            }
            "/api/v1/pins" => json_response(&json!({ "pins": images::pins(&registry) })),
            "/api/v1/blocks" => list_verdicts(registry, ("blocks", VerdictKind::Blocked)).await?,
            "/api/v1/approvals" => list_verdicts(registry, ("approvals", VerdictKind::Approved)).await?,
            "/api/v1/verify" => self.verification(),
            "/api/v1/export" => self.export(query).await?,
            "/api/v1/offline" => json_response(&json!({ "offline": self.offline.is_on() })),
            _ => return Err(Self::no_such_path(path, &Method::GET)),
        })
    }

    fn no_such_path(path: &str, method: &Method) -> Problem {
        if METHODS.iter().any(|(known, _)| *known == path) {
            return Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{path} does not accept {method}"),
            );
        }
        if method == Method::GET {
            return Problem::not_found(format!(
                "unknown path {path}; the API is described in /api/openapi.json"
            ));
        }
        Problem::new(
            StatusCode::METHOD_NOT_ALLOWED,
            format!("{path} does not accept changes"),
        )
    }

    fn problem_response(head: &Parts, problem: &Problem) -> ApiResponse {
        let mut reply = problem.response();
        let headers = reply.headers_mut();
        if problem.status == StatusCode::UNAUTHORIZED {
            // A browser prompts for the token as a password.
            headers.append(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"ifnewer admin\""),
            );
            headers.append(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Basic realm=\"ifnewer admin\", charset=\"UTF-8\""),
            );
        }
        if problem.status == StatusCode::METHOD_NOT_ALLOWED {
            let path = head.uri.path();
            let methods = METHODS.iter().find(|(known, _)| *known == path);
            let methods = methods.map_or("GET, HEAD", |(_, methods)| methods);
            headers.insert(ALLOW, HeaderValue::from_static(methods));
        }
        reply
    }

    async fn ca(&self) -> Result<ApiResponse, Problem> {
        let Some(path) = self.ca.clone() else {
            return Err(Problem::not_found(
                "the certificate is configured by the operator; its CA is not known here",
            ));
        };
        let read = blocking(move || Ok(std::fs::read(path))).await?;
        let pem = read.map_err(|error| Problem::not_found(format!("the CA cannot be read: {error}")))?;
        let mut reply = full(StatusCode::OK, "application/x-pem-file", pem);
        let name = HeaderValue::from_static("attachment; filename=\"ifnewer-ca.pem\"");
        reply.headers_mut().insert(CONTENT_DISPOSITION, name);
        Ok(reply)
    }
}

/// Body of `POST /api/v1/why`, `/refresh` and `/pulls`: an image, and an optional credential.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImageRequest {
    image: String,
    username: Option<String>,
    password: Option<String>,
    /// A complete `Authorization` value, as an alternative.
    authorization: Option<String>,
    /// Pulls only: platforms as `linux/amd64`, or `all`.
    platforms: Option<Vec<String>>,
}

impl ImageRequest {
    fn authorization(&self) -> Result<Option<HeaderValue>, Problem> {
        use base64::Engine as _;
        let text = match (&self.authorization, &self.username) {
            (Some(_), Some(_)) => {
                return Err(Problem::bad_request(
                    "give either a username and password, or authorization",
                ));
            }
            (Some(text), None) => text.clone(),
            (None, Some(username)) => {
                let pair = format!("{username}:{}", self.password.as_deref().unwrap_or_default());
                format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
            }
            (None, None) => return Ok(None),
        };
        let mut value = HeaderValue::from_str(&text)
            .map_err(|_| Problem::bad_request("the credential is not a valid header value"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

impl Admin {
    async fn why_posted(&self, body: &[u8]) -> Result<ApiResponse, Problem> {
        let request: ImageRequest = parse_json(body)?;
        let registry = self.registry.load_full();
        let (named, authorization) = (
            ImageRef::parse(&request.image, &registry)?,
            request.authorization()?,
        );
        let now = self.clock.now();
        json_of(&explain::explain(&registry, &named, authorization.as_ref(), now).await)
    }

    fn pull_posted(&self, body: &[u8]) -> Result<ApiResponse, Problem> {
        let request: ImageRequest = parse_json(body)?;
        let authorization = request.authorization()?;
        let platforms = match request.platforms {
            None => Platforms::local(),
            Some(these) if these.iter().any(|one| one == "all") => Platforms::All,
            Some(these) => Platforms::Selected(these),
        };
        let id = self.begin_pull(&request.image, platforms, authorization)?;
        let view = self.pull_jobs.find(id, self.registry.load().proxy.downloads());
        Ok(json_with_status(StatusCode::ACCEPTED, &json!(view)))
    }

    /// Starts a pull job and returns its id.
    pub(super) fn begin_pull(
        &self,
        image: &str,
        platforms: Platforms,
        authorization: Option<HeaderValue>,
    ) -> Result<u64, Problem> {
        let registry = self.registry.load_full();
        let spec = PullSpec {
            named: ImageRef::parse(image, &registry)?,
            platforms,
            authorization,
        };
        let begun = self.pull_jobs.begin(&registry.proxy, spec, self.clock);
        begun.ok_or_else(|| {
            Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many unfinished pulls; try again later",
            )
        })
    }

    fn pull_of(&self, id: &str) -> Result<ApiResponse, Problem> {
        let id: u64 = id
            .parse()
            .map_err(|_| Problem::not_found(format!("there is no pull `{id}`")))?;
        let registry = self.registry.load();
        match self.pull_jobs.find(id, registry.proxy.downloads()) {
            Some(view) => json_of(&view),
            None => Err(Problem::not_found(format!("pull {id} is unknown or has expired"))),
        }
    }

    async fn refresh_posted(&self, body: &[u8]) -> Result<ApiResponse, Problem> {
        let request: ImageRequest = parse_json(body)?;
        let authorization = request.authorization()?;
        let (image, refreshed) = self.refresh(&request.image, authorization).await?;
        let (result, digest, cause) = match refreshed {
            Refreshed::Unchanged(digest) => ("revalidated", Some(digest), None),
            Refreshed::Newer(digest) => ("new-digest", Some(digest), None),
            Refreshed::TooYoung(youth) => ("too-young", youth.digest, None),
            Refreshed::Blocked(digest) => ("blocked", Some(digest), None),
            Refreshed::NotFound => ("not-found", None, None),
            Refreshed::Denied => ("denied", None, None),
            Refreshed::Unavailable(cause) => ("upstream-unavailable", None, Some(cause)),
            Refreshed::FetchFailed(cause) => ("fetch-failed", None, Some(cause)),
        };
        Ok(json_response(&json!({
            "image": image.to_string(),
            "result": result,
            "digest": digest.map(|digest| digest.to_string()),
            "cause": cause.map(crate::oci::UpstreamFailure::name),
            "sentence": page::describe_refresh(refreshed, image.upstream_registry.name()),
        })))
    }

    /// Revalidates a tag now.
    pub(super) async fn refresh(
        &self,
        image: &str,
        authorization: Option<HeaderValue>,
    ) -> Result<(ImageRef, Refreshed), Problem> {
        let registry = self.registry.load_full();
        let named = ImageRef::parse(image, &registry)?;
        if matches!(named.reference, Reference::Digest(_)) {
            return Err(Problem::bad_request("a tag is required: a digest is immutable"));
        }
        let endpoint = Endpoint::Manifest {
            repository: named.repository.clone(),
            reference: named.reference.clone(),
        };
        let spec = PullSpec {
            named: named.clone(),
            platforms: Platforms::local(),
            authorization,
        };
        let refreshed = registry
            .proxy
            .refresh(&request(&spec, endpoint, self.clock))
            .await;
        Ok((named, refreshed))
    }

    async fn pin_posted(&self, body: &[u8]) -> Result<ApiResponse, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct PinRequest {
            image: String,
            pinned: bool,
        }
        let request: PinRequest = parse_json(body)?;
        let (image, was) = self.pin(&request.image, request.pinned).await?;
        Ok(json_response(
            &json!({ "image": image, "pinned": request.pinned, "was": was }),
        ))
    }

    /// Pins or unpins an image. Returns its full name and the previous state.
    pub(super) async fn pin(&self, image: &str, pinned: bool) -> Result<(String, bool), Problem> {
        let registry = self.registry.load_full();
        let named = ImageRef::parse(image, &registry)?;
        let name = named.to_string();
        let was = blocking(move || images::pin(&registry, &named, pinned)).await?;
        tracing::info!(image = name, pinned, "pin changed on request");
        Ok((name, was))
    }

    async fn offline_posted(&self, body: &[u8]) -> Result<ApiResponse, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct OfflineRequest {
            offline: bool,
        }
        let request: OfflineRequest = parse_json(body)?;
        let was = self.switch_offline(request.offline).await?;
        Ok(json_response(&json!({ "offline": request.offline, "was": was })))
    }

    /// Switches offline mode and persists it. Returns the previous state.
    pub(super) async fn switch_offline(&self, on: bool) -> Result<bool, Problem> {
        let was = self.offline.set(on);
        let registry = self.registry.load_full();
        if let Err(fault) =
            blocking(move || Ok(registry.proxy.store().blocking().persist_offline(on))).await?
        {
            tracing::error!(%fault, offline = on, "failed to persist offline mode");
        }
        if was != on {
            tracing::warn!(offline = on, "offline mode switched by the operator");
        }
        Ok(was)
    }

    async fn remove(&self, query: &Query) -> Result<ApiResponse, Problem> {
        let (all_tags, is_trial) = (bool_param(query, "all_tags")?, bool_param(query, "dry_run")?);
        let registry = self.registry.load_full();
        let named = ImageRef::from_query(query, &registry)?;
        blocking(move || images::remove(&registry, &named, all_tags, is_trial)).await
    }
}

/// A boolean query parameter.
pub(super) fn bool_param(query: &Query, name: &str) -> Result<bool, Problem> {
    match query.get(name) {
        None | Some("" | "false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(Problem::bad_request(format!(
            "`{name}` is true or false, not `{other}`"
        ))),
    }
}

async fn read_body(body: Incoming) -> Result<Bytes, Problem> {
    let collected = timeout(BODY_TIMEOUT, Limited::new(body, BODY_BYTES_MAX).collect());
    let Ok(collected) = collected.await else {
        return Err(Problem::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body was not received within {} s", BODY_TIMEOUT.as_secs()),
        ));
    };
    match collected {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is larger than {BODY_BYTES_MAX} bytes"),
        )),
        Err(error) => Err(Problem::bad_request(format!(
            "the body could not be read: {error}"
        ))),
    }
}

pub(super) fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body)
        .map_err(|error| Problem::bad_request(format!("the body is invalid: {error}")))
}

/// All verdicts of a kind. The list can be long, so it is written on a blocking thread.
async fn list_verdicts(
    registry: Arc<ServingState>,
    (name, kind): (&'static str, VerdictKind),
) -> Result<ApiResponse, Problem> {
    blocking(move || {
        let list = verdicts::list(&registry, kind, usize::MAX);
        Ok(json_response(&json!({ name: list.verdicts })))
    })
    .await
}

/// Runs blocking work on a blocking thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(Problem::task_failed()))
}

fn json_of(value: &impl serde::Serialize) -> Result<ApiResponse, Problem> {
    let value = serde_json::to_value(value);
    value.map(|value| json_response(&value)).map_err(|error| {
        Problem::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("failed to serialize the response: {error}"),
        )
    })
}
