//! The server of the scripted registry: connections, routes and responses.

use super::body::{Piped, Plan};
use super::faults::{Applies, BadConnection, DigestHeader, Instead, Redirect};
use super::gate::Gate;
use super::{Seen, Shared, State, fronts, lists, writes};
use bytes::Bytes;
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RETRY_AFTER};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::json;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

pub(super) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let bad = shared.state(|state| {
            state.connections_seen += 1;
            state.faults.connection
        });
        let tls = shared.state(|state| state.tls.clone());
        let task = tokio::spawn(connection(stream, tls, bad, Arc::clone(&shared)));
        shared.state(|state| state.connections.push(task.abort_handle()));
    }
}

async fn connection(
    mut stream: TcpStream,
    tls: Option<Arc<rustls::ServerConfig>>,
    bad: Option<BadConnection>,
    shared: Arc<Shared>,
) {
    match (bad, tls) {
        (Some(BadConnection::Mute), _) => std::future::pending().await,
        (Some(BadConnection::Resets), _) => {
            stream.set_zero_linger().unwrap();
            let _ = stream.read(&mut [0; 1]).await;
        }
        (None, None) => speak(stream, shared).await,
        (None, Some(config)) => {
            if let Ok(stream) = tokio_rustls::TlsAcceptor::from(config).accept(stream).await {
                if stream.get_ref().1.peer_certificates().is_some() {
                    shared.state(|state| state.client_certificates += 1);
                }
                speak(stream, shared).await;
            }
        }
    }
}

async fn speak(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, shared: Arc<Shared>) {
    let service = service_fn(move |request| answer(Arc::clone(&shared), request));
    let _ = auto::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// An error closes the connection without a response.
async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Piped>, io::Error> {
    let seen = Seen {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        query: request.uri().query().map(str::to_owned),
        headers: request.headers().clone(),
    };
    let mut turned = shared.turned.subscribe();
    shared.log.send_modify(|log| log.push(seen.clone()));
    loop {
        turned.mark_unchanged();
        match shared.state(|state| state.instead(&seen)) {
            Some(Instead::Hang) => turned.changed().await.map_err(io::Error::other)?,
            Some(Instead::Drop) => return Err(io::ErrorKind::ConnectionReset.into()),
            Some(Instead::Status(status)) => return Ok(failed(&shared, &seen, status, "UNKNOWN")),
            // A front-end sends none of the registry's headers.
            Some(Instead::Text(status)) => {
                let response = Response::builder()
                    .status(status)
                    .header(CONTENT_TYPE, "text/plain");
                let mut response = sent(
                    &shared,
                    &seen,
                    response,
                    text("a text of something in front\n".to_owned()),
                );
                response.headers_mut().remove("docker-distribution-api-version");
                return Ok(response);
            }
            Some(Instead::RateLimited(retry_after)) => {
                let mut response = failed(&shared, &seen, 429, "TOOMANYREQUESTS");
                if let Some(value) = retry_after {
                    response.headers_mut().insert(RETRY_AFTER, value.parse().unwrap());
                }
                return Ok(response);
            }
            Some(Instead::Scripted(scripted)) => {
                let mut response = Response::builder().status(scripted.status);
                for (name, value) in &scripted.headers {
                    response = response.header(name, value);
                }
                return Ok(sent(&shared, &seen, response, text(scripted.body)));
            }
            Some(Instead::Html) => {
                let page = Plan {
                    bytes: Bytes::from_static(b"<html>Please log in</html>"),
                    ..Plan::default()
                };
                return Ok(sent(
                    &shared,
                    &seen,
                    Response::builder().header(CONTENT_TYPE, "text/html"),
                    page,
                ));
            }
            Some(Instead::Front(front)) => return Ok(fronts::answer(&shared, &seen, front)),
            None => break,
        }
    }
    let find = |gates: &[(Applies, Gate)]| {
        let mut found = gates.iter();
        found
            .find(|(applies, _)| applies(&seen))
            .map(|(_, gate)| gate.clone())
    };
    let gates = shared.state(|state| (find(&state.faults.held_answers), find(&state.faults.late_answers)));
    let (held, late) = gates;
    if let Some(gate) = held {
        gate.pass().await;
    }
    let is_write = !matches!(seen.method.as_str(), "GET" | "HEAD") || seen.path.contains("/blobs/uploads/");
    match repository(&seen.path).filter(|_| is_write) {
        None => {
            let response = route(&shared, &seen);
            if let Some(gate) = late {
                gate.pass().await;
            }
            Ok(response)
        }
        Some(name) => {
            if let Some(response) = denied(&shared, &seen, Some(name)) {
                return Ok(response);
            }
            let rest = &seen.path["/v2/".len() + name.len()..];
            Ok(writes::write(&shared, &seen, name, rest, request.into_body()).await)
        }
    }
}

fn route(shared: &Arc<Shared>, seen: &Seen) -> Response<Piped> {
    let path = seen.path.as_str();
    if path == "/token" {
        let (status, body) = shared.state(|state| state.rights.token(seen));
        return sent(
            shared,
            seen,
            Response::builder()
                .status(status)
                .header(CONTENT_TYPE, "application/json"),
            text(body),
        );
    }
    if let Some(digest) = path.strip_prefix("/storage/") {
        return storage(shared, seen, digest);
    }
    if let Some((status, base)) = shared.state(|state| state.faults.redirect_all.clone()) {
        let query = seen.query.as_ref().map(|query| format!("?{query}"));
        let location = format!("{base}{path}{}", query.unwrap_or_default());
        let response = Response::builder().status(status).header(LOCATION, location);
        return sent(shared, seen, response, text(String::new()));
    }
    let name = repository(path);
    if let Some(response) = denied(shared, seen, name) {
        return response;
    }
    let Some(name) = name else {
        let known = matches!(path, "/v2/" | "/v2");
        return if known {
            sent(
                shared,
                seen,
                Response::builder().header(CONTENT_TYPE, "application/json"),
                text("{}".to_owned()),
            )
        } else {
            failed(shared, seen, 404, "NAME_UNKNOWN")
        };
    };
    let rest = &path["/v2/".len() + name.len()..];
    if let Some(reference) = rest.strip_prefix("/manifests/") {
        manifest(shared, seen, name, reference)
    } else if let Some(digest) = rest.strip_prefix("/blobs/") {
        blob(shared, seen, name, digest)
    } else if let Some(subject) = rest.strip_prefix("/referrers/") {
        lists::referrers(shared, seen, name, subject)
    } else {
        lists::tags(shared, seen, name)
    }
}

/// The denial of an unauthorized request.
fn denied(shared: &Arc<Shared>, seen: &Seen, name: Option<&str>) -> Option<Response<Piped>> {
    let denial = shared
        .state(|state| state.rights.check(&shared.base, seen, name))
        .err()?;
    let mut response = failed(shared, seen, denial.status.as_u16(), denial.code);
    for challenge in denial.challenges {
        response
            .headers_mut()
            .append("www-authenticate", challenge.parse().unwrap());
    }
    Some(response)
}

fn manifest(shared: &Arc<Shared>, seen: &Seen, name: &str, reference: &str) -> Response<Piped> {
    if seen.method == "HEAD" && shared.state(|state| state.faults.head_not_allowed) {
        return failed(shared, seen, 405, "UNSUPPORTED");
    }
    let found = shared.state(|state| state.repositories.get(name)?.manifest(reference, &seen.accept()));
    let Some((digest, media_type, mut bytes)) = found else {
        return failed(shared, seen, 404, "MANIFEST_UNKNOWN");
    };
    if let Some(size) = shared.state(|state| state.faults.oversize_manifest) {
        let mut padded = bytes.to_vec();
        padded.resize(size, b' ');
        bytes = padded.into();
    }
    let media_type = shared
        .state(|state| state.faults.manifest_type.clone())
        .unwrap_or(media_type);
    let response = Response::builder().header("etag", format!("\"{digest}\""));
    let response = if media_type.is_empty() {
        response
    } else {
        response.header(CONTENT_TYPE, media_type)
    };
    let plan = shared.state(|state| Plan {
        held_at: state.held_at(seen),
        unsized_body: state.faults.unsized_bodies,
        bytes,
        ..Plan::default()
    });
    sent(shared, seen, named(shared, seen, response, &digest), plan)
}

fn blob(shared: &Arc<Shared>, seen: &Seen, name: &str, digest: &str) -> Response<Piped> {
    if seen.method == "HEAD" && shared.state(|state| state.faults.blob_head_refused) {
        return failed(shared, seen, 401, "UNAUTHORIZED");
    }
    let bytes = shared.state(|state| state.repositories.get(name)?.blobs.get(digest).cloned());
    let Some(bytes) = bytes else {
        return failed(shared, seen, 404, "BLOB_UNKNOWN");
    };
    if let Some(Redirect { status, location }) = shared.state(|state| state.faults.redirect.clone()) {
        let location = location.replace("{digest}", digest);
        return Response::builder()
            .status(status)
            .header(LOCATION, location)
            .body(Piped::empty())
            .unwrap();
    }
    content(shared, seen, digest, bytes)
}

/// Storage behind redirects. Like S3, it rejects `Authorization`.
fn storage(shared: &Arc<Shared>, seen: &Seen, digest: &str) -> Response<Piped> {
    if seen.authorized() {
        return failed(shared, seen, 400, "Only one auth mechanism allowed");
    }
    match shared.state(|state| state.storage.get(digest).cloned()) {
        Some(bytes) => content(shared, seen, digest, bytes),
        None => failed(shared, seen, 404, "BLOB_UNKNOWN"),
    }
}

fn content(shared: &Arc<Shared>, seen: &Seen, digest: &str, bytes: Bytes) -> Response<Piped> {
    if seen.header("range").is_some()
        && let Some(status) = shared.state(|state| state.faults.range_failure())
    {
        return failed(shared, seen, status, "UNKNOWN");
    }
    let bytes = if shared.state(|state| state.faults.empty_blobs) {
        Bytes::new()
    } else {
        bytes
    };
    let kind = shared.state(|state| state.faults.blob_type.clone());
    let whole = bytes.len();
    let (span, plan) = shared.state(|state| {
        let faults = &mut state.faults;
        let bytes = match faults.wrong_byte_at {
            Some(at) => with_a_wrong_bit(&bytes, at),
            None => bytes,
        };
        let span = if faults.ignores_range {
            None
        } else {
            seen.header("range").and_then(|line| span(line, whole))
        };
        let left = faults.blob_cuts_left.as_mut();
        let cuts = seen.method == "GET" && left.as_ref().is_none_or(|left| **left > 0);
        if let Some(left) = left.filter(|_| cuts) {
            *left -= 1;
        }
        let plan = Plan {
            bytes: span.map_or(bytes.clone(), |(start, end)| bytes.slice(start..end)),
            unsized_body: faults.unsized_bodies,
            cut_at: faults.blob_cut_at.filter(|_| cuts),
            ends_at: faults.blob_ends_at,
            pace: faults.pace,
            held_at: state.held_at(seen),
        };
        (span, plan)
    });
    let response = Response::builder()
        .header(
            CONTENT_TYPE,
            kind.as_deref().unwrap_or("application/octet-stream"),
        )
        .header(ACCEPT_RANGES, "bytes");
    let response = match span {
        Some((start, end)) => response.status(StatusCode::PARTIAL_CONTENT).header(
            CONTENT_RANGE,
            format!("bytes {start}-{}/{whole}", end.saturating_sub(1)),
        ),
        None => response,
    };
    sent(shared, seen, named(shared, seen, response, digest), plan)
}

impl State {
    fn instead(&self, seen: &Seen) -> Option<Instead> {
        self.faults
            .instead
            .iter()
            .rev()
            .find(|(applies, _)| applies(seen))
            .map(|(_, what)| what.clone())
    }

    fn held_at(&self, seen: &Seen) -> Option<(usize, Gate)> {
        let held = self
            .faults
            .held_bodies
            .iter()
            .rev()
            .find(|(applies, ..)| applies(seen));
        held.filter(|_| seen.method == "GET")
            .map(|(_, at, gate)| (*at, gate.clone()))
    }
}

fn named(
    shared: &Shared,
    seen: &Seen,
    response: http::response::Builder,
    digest: &str,
) -> http::response::Builder {
    shared.state(|state| match &state.faults.digest {
        DigestHeader::Right => response.header("docker-content-digest", digest),
        DigestHeader::Omitted => response,
        DigestHeader::LieInHeads(_) if seen.method != "HEAD" => {
            response.header("docker-content-digest", digest)
        }
        DigestHeader::LieInGets(_) if seen.method != "GET" => {
            response.header("docker-content-digest", digest)
        }
        DigestHeader::Lie(lie) | DigestHeader::LieInHeads(lie) | DigestHeader::LieInGets(lie) => {
            response.header("docker-content-digest", lie)
        }
    })
}

pub(super) fn failed(shared: &Arc<Shared>, seen: &Seen, status: u16, code: &str) -> Response<Piped> {
    let body = json!({"errors": [{"code": code, "message": "the scripted upstream said so"}]}).to_string();
    let response = Response::builder()
        .status(status)
        .header(CONTENT_TYPE, "application/json");
    sent(shared, seen, response, text(body))
}

pub(super) fn text(body: String) -> Plan {
    Plan {
        bytes: body.into(),
        ..Plan::default()
    }
}

pub(super) fn sent(
    shared: &Arc<Shared>,
    seen: &Seen,
    response: http::response::Builder,
    plan: Plan,
) -> Response<Piped> {
    let length = plan.bytes.len();
    let (gzips, rate_limit) = shared.state(|state| (state.faults.gzips, state.faults.rate_limit));
    let head = seen.method == Method::HEAD.as_str();
    let with_length = head && !plan.unsized_body;
    let body = if head {
        Piped::empty()
    } else {
        Piped::send(plan, Arc::clone(shared))
    };
    let mut response = response
        .header("docker-distribution-api-version", "registry/2.0")
        .body(body)
        .unwrap();
    let headers = response.headers_mut();
    if with_length {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    if gzips {
        headers.insert("content-encoding", HeaderValue::from_static("gzip"));
    }
    if let Some((limit, remaining)) = rate_limit {
        headers.insert("docker-ratelimit-source", HeaderValue::from_static("192.0.2.7"));
        headers.insert("ratelimit-limit", format!("{limit};w=21600").parse().unwrap());
        headers.insert(
            "ratelimit-remaining",
            format!("{remaining};w=21600").parse().unwrap(),
        );
    }
    response
}

fn with_a_wrong_bit(bytes: &Bytes, at: usize) -> Bytes {
    let mut wrong = bytes.to_vec();
    let at = at.min(wrong.len().saturating_sub(10));
    if let Some(byte) = wrong.get_mut(at) {
        *byte ^= 1;
    }
    wrong.into()
}

/// Start and end (exclusive) of a single range within `size` bytes.
fn span(line: &str, size: usize) -> Option<(usize, usize)> {
    let (first, last) = line.strip_prefix("bytes=")?.split_once('-')?;
    let start = first.parse().ok().filter(|start| *start < size)?;
    let end = if last.is_empty() {
        size
    } else {
        last.parse::<usize>().ok()?.saturating_add(1).min(size)
    };
    Some((start, end))
}

/// The repository in a path under `/v2/`.
fn repository(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("/v2/")?;
    ["/manifests/", "/blobs/", "/referrers/", "/tags/list"]
        .iter()
        .filter_map(|marker| rest.rfind(marker))
        .max()
        .map(|at| &rest[..at])
}
