//! Scripted upstream registry: a few images, one of them private, with rate limiting and shutdown.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::oci::header::DOCKER_CONTENT_DIGEST;
use crate::oci::{Algorithm, Digest};

/// `Retry-After` while rate limiting.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// A pushed image.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) digest: Digest,
}

/// The registry. Dropping it stops it.
pub(super) struct Registry {
    shared: Arc<Shared>,
    address: SocketAddr,
    alive: CancellationToken,
}

#[derive(Default)]
struct Shared(Mutex<State>);

#[derive(Default)]
struct State {
    manifests: HashMap<(String, String), Bytes>,
    blobs: HashMap<(String, String), Bytes>,
    /// Repositories that require this `Authorization`.
    private: HashMap<String, HeaderValue>,
    is_limiting: bool,
    requests: u64,
    bytes: u64,
}

impl Registry {
    pub(super) async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let (address, shared, alive) = (
            listener.local_addr()?,
            Arc::<Shared>::default(),
            CancellationToken::new(),
        );
        let registry = Self {
            shared: Arc::clone(&shared),
            address,
            alive: alive.clone(),
        };
        tokio::spawn(async move {
            loop {
                let stream = tokio::select! {
                    () = alive.cancelled() => return,
                    accepted = listener.accept() => match accepted {
                        Ok((stream, _)) => stream,
                        Err(_) => return,
                    },
                };
                let (shared, alive) = (Arc::clone(&shared), alive.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request: Request<Incoming>| {
                        let response = shared.answer(&request);
                        async move { Ok::<_, Infallible>(response) }
                    });
                    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                    tokio::select! {
                        () = alive.cancelled() => {}
                        _ = connection => {}
                    }
                });
            }
        });
        Ok(registry)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Pushes an image with layers of these sizes.
    pub(super) fn push(&self, repository: &str, tag: &str, layers: &[(&str, usize)]) -> Image {
        let mut inside = self.shared.0.lock();
        let mut keep = |bytes: Bytes| {
            let digest = Digest::of(Algorithm::Sha256, &bytes);
            let size = bytes.len();
            inside
                .blobs
                .insert((repository.to_owned(), digest.to_string()), bytes);
            (digest, size)
        };
        let config =
            json!({ "architecture": "amd64", "os": "linux", "image": format!("{repository}:{tag}") });
        let (config, config_size) = keep(config.to_string().into());
        let layers: Vec<_> = layers
            .iter()
            .map(|(name, size)| {
                let (digest, size) = keep(content(name, *size));
                let kind = "application/vnd.oci.image.layer.v1.tar";
                json!({ "mediaType": kind, "digest": digest.to_string(), "size": size })
            })
            .collect();
        let kind = "application/vnd.oci.image.config.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": { "mediaType": kind, "digest": config.to_string(), "size": config_size },
            "layers": layers,
        });
        let bytes = Bytes::from(manifest.to_string());
        let digest = Digest::of(Algorithm::Sha256, &bytes);
        for name in [tag.to_owned(), digest.to_string()] {
            inside
                .manifests
                .insert((repository.to_owned(), name), bytes.clone());
        }
        Image { digest }
    }

    /// Requires this credential for the repository.
    pub(super) fn require_auth(&self, repository: &str, authorization: &HeaderValue) {
        self.shared
            .0
            .lock()
            .private
            .insert(repository.to_owned(), authorization.clone());
    }

    /// Enables or disables 429 for every request.
    pub(super) fn set_rate_limit(&self, is_limiting: bool) {
        self.shared.0.lock().is_limiting = is_limiting;
    }

    /// Stops it; connections are refused from then on.
    pub(super) fn stop(&self) {
        self.alive.cancel();
    }

    /// Number of requests, and bytes of bodies sent.
    pub(super) fn sent(&self) -> (u64, u64) {
        let inside = self.shared.0.lock();
        (inside.requests, inside.bytes)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.alive.cancel();
    }
}

impl Shared {
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let mut inside = self.0.lock();
        inside.requests += 1;
        let path = request.uri().path();
        if inside.is_limiting {
            let mut response = refusal(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS");
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, RETRY_AFTER.as_secs().into());
            return response;
        }
        let Some((repository, kind, name)) = split(path) else {
            return respond(StatusCode::OK, "application/json", Bytes::from_static(b"{}"));
        };
        if let Some(expected) = inside.private.get(repository)
            && request.headers().get(AUTHORIZATION) != Some(expected)
        {
            let mut response = refusal(StatusCode::UNAUTHORIZED, "UNAUTHORIZED");
            let challenge = HeaderValue::from_static("Basic realm=\"demo\"");
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
            return response;
        }
        let key = (repository.to_owned(), name.to_owned());
        let found = match kind {
            "manifests" => inside
                .manifests
                .get(&key)
                .map(|bytes| (bytes.clone(), MANIFEST_TYPE)),
            "blobs" => inside
                .blobs
                .get(&key)
                .map(|bytes| (bytes.clone(), "application/octet-stream")),
            _ => None,
        };
        let Some((bytes, kind)) = found else {
            return refusal(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
        };
        let digest = Digest::of(Algorithm::Sha256, &bytes).to_string();
        if *request.method() != Method::HEAD {
            inside.bytes += bytes.len() as u64;
        }
        let mut response = respond(StatusCode::OK, kind, bytes);
        if let Ok(digest) = HeaderValue::from_str(&digest) {
            response.headers_mut().insert(DOCKER_CONTENT_DIGEST, digest);
        }
        response
    }
}

/// `/v2/<repository>/<kind>/<name>`.
fn split(path: &str) -> Option<(&str, &str, &str)> {
    let (rest, name) = path.strip_prefix("/v2/")?.rsplit_once('/')?;
    let (repository, kind) = rest.rsplit_once('/')?;
    Some((repository, kind, name))
}

fn respond(status: StatusCode, kind: &'static str, bytes: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(bytes));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn refusal(status: StatusCode, code: &str) -> Response<Full<Bytes>> {
    let body = json!({ "errors": [{ "code": code, "message": "as the demo's script says" }] });
    respond(status, "application/json", body.to_string().into())
}

/// Content that differs by name.
fn content(name: &str, size: usize) -> Bytes {
    let pairs = name.bytes().cycle().zip((0_u8..=250).cycle());
    pairs.map(|(one, other)| one ^ other).take(size).collect()
}
