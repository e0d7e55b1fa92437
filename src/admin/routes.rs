//! Which path is what.

use std::net::IpAddr;
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
use super::images::{self, Wanted};
use super::named::Named;
use super::reply::{Body, Problem, Reply, answer, whole, with_status};
use super::work::{Platforms, Wish, request};
use super::{Admin, keeping, page, status, transfers, upstreams, why};
use crate::oci::{Operation, Query, Reference};
use crate::proxy::Refreshed;

/// The largest body of a request.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// How long it may take to come.
const BODY_WITHIN: Duration = Duration::from_secs(30);

/// The description of the API.
pub(super) const OPENAPI: &str = include_str!("openapi.json");

/// The paths that can be changed, and how; for those who use the wrong method.
const METHODS: &[(&str, &str)] = &[
    ("/api/v1/images", "GET, HEAD, DELETE"),
    ("/api/v1/pulls", "GET, HEAD, POST"),
    ("/api/v1/pins", "GET, HEAD, POST"),
    ("/api/v1/refresh", "POST"),
    ("/api/v1/offline", "GET, HEAD, POST"),
    ("/api/v1/gc", "POST"),
    ("/api/v1/verify", "GET, HEAD, POST"),
    ("/api/v1/import", "POST"),
    ("/api/v1/why", "GET, HEAD, POST"),
];

impl Admin {
    /// A reply as its request wants it.
    pub(super) fn finished(head: &Parts, reply: Result<Reply, Problem>) -> Reply {
        let mut reply = reply.unwrap_or_else(|problem| Self::refusal(head, &problem));
        if head.method == Method::HEAD {
            *reply.body_mut() = Body::Whole(None);
        }
        reply
    }

    /// Answers what the guard has admitted.
    pub(super) async fn route(
        &self,
        head: &Parts,
        body: Incoming,
        client: Option<IpAddr>,
    ) -> Result<Reply, Problem> {
        let (query, _) = Query::parse(head.uri.query()).map_err(|error| Problem::bad(error.to_string()))?;
        let path = head.uri.path();
        match head.method.as_str() {
            "GET" | "HEAD" => self.read(path, &query, (head, client)).await,
            "DELETE" if path == "/api/v1/images" => self.remove(&query).await,
            "POST" if path == "/api/v1/import" => self.import(&query, body).await,
            "POST" => {
                let body = collect(body).await?;
                match path {
                    "/api/v1/why" => self.why_posted(&body).await,
                    "/api/v1/pulls" => self.pull_posted(&body),
                    "/api/v1/refresh" => self.refresh_posted(&body).await,
                    "/api/v1/offline" => self.offline_posted(&body).await,
                    "/api/v1/gc" => self.gc_posted(&body).await,
                    "/api/v1/verify" => self.verify_posted(&body).await,
                    "/api/v1/pins" => self.pin_posted(&body).await,
                    "/act" => page::act(self, &body).await,
                    _ => Err(Self::no_such(path, &head.method)),
                }
            }
            _ => Err(Self::no_such(path, &head.method)),
        }
    }

    async fn read(
        &self,
        path: &str,
        query: &Query,
        (head, client): (&Parts, Option<IpAddr>),
    ) -> Result<Reply, Problem> {
        let now = self.clock.now();
        if let Some(id) = path.strip_prefix("/api/v1/pulls/") {
            return self.pull_of(id);
        }
        let registry = self.registry.load_full();
        Ok(match path {
            "/" => page::page(self, query, head).await?,
            "/style.css" => whole(StatusCode::OK, "text/css; charset=utf-8", page::STYLE),
            "/live.js" => whole(StatusCode::OK, "text/javascript; charset=utf-8", page::SCRIPT),
            "/icon.svg" => whole(StatusCode::OK, "image/svg+xml", page::ICON),
            "/ca.pem" => self.ca().await?,
            "/api/openapi.json" => whole(StatusCode::OK, "application/json", OPENAPI),
            "/api/v1/status" => json_of(&self.status(now))?,
            "/api/v1/series" => {
                let span = match query.get("span").unwrap_or("hour") {
                    "hour" => status::HOUR,
                    "day" => status::DAY,
                    other => return Err(Problem::bad(format!("`span` is hour or day, not `{other}`"))),
                };
                answer(&json!({ "minutes": span.1, "points": self.series(span, now) }))
            }
            "/api/v1/images" => {
                let wanted = Wanted::read(query)?;
                blocking(move || Ok(images::listed(&registry, &wanted, now))).await?
            }
            "/api/v1/image" => {
                let named = Named::of_query(query, &registry)?;
                blocking(move || json_of(&images::in_full(&registry, &named, now)?)).await?
            }
            "/api/v1/why" => {
                let named = Named::of_query(query, &registry)?;
                json_of(&why::why(&registry, &named, None, now).await)?
            }
            "/api/v1/upstreams" => answer(&upstreams::listed(&registry, now)),
            "/api/v1/transfers" => answer(&json!({ "transfers": transfers::list(&registry) })),
            "/api/v1/events" => answer(&json!({ "events": self.told(&Filter::read(query)?) })),
            "/api/v1/events/stream" => self.watch(Filter::read(query)?, client)?,
            "/api/v1/clients" => answer(&json!({ "clients": self.clients_seen(now) })),
            "/api/v1/pulls" => answer(&json!({ "pulls": self.works.list(registry.pull.downloads()) })),
            "/api/v1/pins" => answer(&json!({ "pins": keeping::pins(&registry) })),
            "/api/v1/verify" => self.verification(),
            "/api/v1/export" => self.export(query).await?,
            "/api/v1/offline" => answer(&json!({ "offline": self.offline.is_on() })),
            _ => return Err(Self::no_such(path, &Method::GET)),
        })
    }

    fn no_such(path: &str, method: &Method) -> Problem {
        if METHODS.iter().any(|(known, _)| *known == path) {
            return Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{method} is not what {path} takes"),
            );
        }
        if method == Method::GET {
            return Problem::absent(format!(
                "there is no {path} here; the API is described in /api/openapi.json"
            ));
        }
        Problem::new(
            StatusCode::METHOD_NOT_ALLOWED,
            format!("nothing can be changed at {path}"),
        )
    }

    fn refusal(head: &Parts, problem: &Problem) -> Reply {
        let mut reply = problem.reply();
        let headers = reply.headers_mut();
        if problem.status == StatusCode::UNAUTHORIZED {
            // A browser asks its user for the token as a password.
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

    async fn ca(&self) -> Result<Reply, Problem> {
        let Some(path) = self.ca.clone() else {
            return Err(Problem::absent(
                "the certificate is the operator's own; ask whoever made it for its CA",
            ));
        };
        let read = blocking(move || Ok(std::fs::read(path))).await?;
        let pem = read.map_err(|error| Problem::absent(format!("the CA cannot be read: {error}")))?;
        let mut reply = whole(StatusCode::OK, "application/x-pem-file", pem);
        let name = HeaderValue::from_static("attachment; filename=\"ifnewer-ca.pem\"");
        reply.headers_mut().insert(CONTENT_DISPOSITION, name);
        Ok(reply)
    }
}

/// `POST /api/v1/why`, `/refresh` and `/pulls`: an image, and with whose credential.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    image: String,
    username: Option<String>,
    password: Option<String>,
    /// A whole `Authorization` value instead.
    authorization: Option<String>,
    /// For pulls: as `linux/amd64`; `all` for every one.
    platforms: Option<Vec<String>>,
}

impl Asked {
    fn authorization(&self) -> Result<Option<HeaderValue>, Problem> {
        use base64::Engine as _;
        let text = match (&self.authorization, &self.username) {
            (Some(_), Some(_)) => {
                return Err(Problem::bad(
                    "give a username and password, or authorization; not both",
                ));
            }
            (Some(text), None) => text.clone(),
            (None, Some(username)) => {
                let pair = format!("{username}:{}", self.password.as_deref().unwrap_or_default());
                format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
            }
            (None, None) => return Ok(None),
        };
        let mut value =
            HeaderValue::from_str(&text).map_err(|_| Problem::bad("the credential is no header value"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

impl Admin {
    async fn why_posted(&self, body: &[u8]) -> Result<Reply, Problem> {
        let asked: Asked = parse(body)?;
        let registry = self.registry.load_full();
        let (named, authorization) = (Named::read(&asked.image, &registry)?, asked.authorization()?);
        let now = self.clock.now();
        json_of(&why::why(&registry, &named, authorization.as_ref(), now).await)
    }

    fn pull_posted(&self, body: &[u8]) -> Result<Reply, Problem> {
        let asked: Asked = parse(body)?;
        let authorization = asked.authorization()?;
        let platforms = match asked.platforms {
            None => Platforms::own(),
            Some(these) if these.iter().any(|one| one == "all") => Platforms::All,
            Some(these) => Platforms::These(these),
        };
        let id = self.begin_pull(&asked.image, platforms, authorization)?;
        let view = self.works.find(id, self.registry.load().pull.downloads());
        Ok(with_status(StatusCode::ACCEPTED, &json!(view)))
    }

    /// Begins a pull; its number.
    pub(super) fn begin_pull(
        &self,
        image: &str,
        platforms: Platforms,
        authorization: Option<HeaderValue>,
    ) -> Result<u64, Problem> {
        let registry = self.registry.load_full();
        let wish = Wish {
            named: Named::read(image, &registry)?,
            platforms,
            authorization,
        };
        let begun = self.works.begin(&registry.pull, wish, self.clock);
        begun.ok_or_else(|| {
            Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many pulls are under way; wait until one has ended",
            )
        })
    }

    fn pull_of(&self, id: &str) -> Result<Reply, Problem> {
        let id: u64 = id
            .parse()
            .map_err(|_| Problem::absent(format!("there is no pull `{id}`")))?;
        let registry = self.registry.load();
        match self.works.find(id, registry.pull.downloads()) {
            Some(view) => json_of(&view),
            None => Err(Problem::absent(format!(
                "there is no pull {id}, or it was long ago"
            ))),
        }
    }

    async fn refresh_posted(&self, body: &[u8]) -> Result<Reply, Problem> {
        let asked: Asked = parse(body)?;
        let authorization = asked.authorization()?;
        let (image, refreshed) = self.refresh(&asked.image, authorization).await?;
        let (result, digest, cause) = match refreshed {
            Refreshed::Unchanged(digest) => ("unchanged", Some(digest), None),
            Refreshed::Newer(digest) => ("newer", Some(digest), None),
            Refreshed::Absent => ("absent", None, None),
            Refreshed::Refused => ("refused", None, None),
            Refreshed::Silent(cause) => ("silent", None, Some(cause)),
            Refreshed::Undelivered(cause) => ("undelivered", None, Some(cause)),
        };
        Ok(answer(&json!({
            "image": image.to_string(),
            "result": result,
            "digest": digest.map(|digest| digest.to_string()),
            "cause": cause.map(crate::oci::Cause::name),
            "sentence": page::refreshed(refreshed, image.site.name()),
        })))
    }

    /// Asks the upstream about a tag now.
    pub(super) async fn refresh(
        &self,
        image: &str,
        authorization: Option<HeaderValue>,
    ) -> Result<(Named, Refreshed), Problem> {
        let registry = self.registry.load_full();
        let named = Named::read(image, &registry)?;
        if matches!(named.reference, Reference::Digest(_)) {
            return Err(Problem::bad("name a tag: what is asked by digest cannot change"));
        }
        let operation = Operation::Manifest {
            repository: named.repository.clone(),
            reference: named.reference.clone(),
        };
        let wish = Wish {
            named: named.clone(),
            platforms: Platforms::own(),
            authorization,
        };
        let refreshed = registry
            .pull
            .refresh(&request(&wish, operation, self.clock))
            .await;
        Ok((named, refreshed))
    }

    async fn pin_posted(&self, body: &[u8]) -> Result<Reply, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Wanted {
            image: String,
            pinned: bool,
        }
        let wanted: Wanted = parse(body)?;
        let (image, was) = self.pin(&wanted.image, wanted.pinned).await?;
        Ok(answer(
            &json!({ "image": image, "pinned": wanted.pinned, "was": was }),
        ))
    }

    /// Pins or unpins; the full name, and how it was.
    pub(super) async fn pin(&self, image: &str, pinned: bool) -> Result<(String, bool), Problem> {
        let registry = self.registry.load_full();
        let named = Named::read(image, &registry)?;
        let name = named.to_string();
        let was = blocking(move || keeping::pin(&registry, &named, pinned)).await?;
        tracing::info!(image = name, pinned, "pinned or unpinned at the operator's wish");
        Ok((name, was))
    }

    async fn offline_posted(&self, body: &[u8]) -> Result<Reply, Problem> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Wanted {
            offline: bool,
        }
        let wanted: Wanted = parse(body)?;
        let was = self.switch_offline(wanted.offline).await?;
        Ok(answer(&json!({ "offline": wanted.offline, "was": was })))
    }

    /// Turns asking off or on, also for after a restart; says how it was.
    pub(super) async fn switch_offline(&self, on: bool) -> Result<bool, Problem> {
        let was = self.offline.set(on);
        let registry = self.registry.load_full();
        if let Err(fault) = blocking(move || Ok(registry.pull.store().blocking().keep_offline(on))).await? {
            tracing::error!(%fault, offline = on, "switched, and after a restart it will be as it was");
        }
        if was != on {
            tracing::warn!(offline = on, "switched by the operator");
        }
        Ok(was)
    }

    async fn remove(&self, query: &Query) -> Result<Reply, Problem> {
        let (all_tags, is_trial) = (flag(query, "all_tags")?, flag(query, "dry_run")?);
        let registry = self.registry.load_full();
        let named = Named::of_query(query, &registry)?;
        blocking(move || keeping::remove(&registry, &named, all_tags, is_trial)).await
    }
}

/// A parameter that is said or not.
pub(super) fn flag(query: &Query, name: &str) -> Result<bool, Problem> {
    match query.get(name) {
        None | Some("" | "false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(Problem::bad(format!("`{name}` is true or false, not `{other}`"))),
    }
}

async fn collect(body: Incoming) -> Result<Bytes, Problem> {
    let collected = timeout(BODY_WITHIN, Limited::new(body, BODY_BYTES_MAX).collect());
    let Ok(collected) = collected.await else {
        return Err(Problem::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not come within {} s", BODY_WITHIN.as_secs()),
        ));
    };
    match collected {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("a body may have {BODY_BYTES_MAX} bytes"),
        )),
        Err(error) => Err(Problem::bad(format!("the body could not be read: {error}"))),
    }
}

pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body)
        .map_err(|error| Problem::bad(format!("the body is not what is expected: {error}")))
}

/// Work that may touch the disk, on a thread that may wait.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(Problem::failed()))
}

fn json_of(value: &impl serde::Serialize) -> Result<Reply, Problem> {
    let value = serde_json::to_value(value);
    value.map(|value| answer(&value)).map_err(|error| {
        Problem::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the answer cannot be written: {error}"),
        )
    })
}
