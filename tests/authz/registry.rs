//! In-memory registry, reached over pipes: a token service, access by user and repository, and all kinds of outages.
//! It records each response and its recipient, which is all the model knows.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, DATE, HOST, LAST_MODIFIED, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use ifnewer::clock::Clock;
use ifnewer::oci::{Algorithm, Digest, UpstreamFailure};
use ifnewer::upstream::{AddressLimit, DialError, DialFuture, DialedStream, Dialer};
use tokio::task::AbortHandle;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Header of a client's own token request; the cache's requests lack it.
pub const CLIENT: &str = "x-client";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

thread_local! {
    /// Wall clock in seconds. Per thread, so that parallel walks have separate clocks.
    static NOW: Cell<u64> = const { Cell::new(1_800_000_000) };
}

/// Wall clock of this thread.
pub fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(NOW.get())
}

/// Moves the clock by this many seconds.
pub fn jump(seconds: i64) {
    NOW.set(NOW.get().saturating_add_signed(seconds));
}

pub fn clock() -> Clock {
    Clock::from_fn(now)
}

/// Condition of the registry for all clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    Healthy,
    /// Connections are refused.
    Down,
    /// Requests are accepted, and answered only when the condition changes, with the state at their arrival.
    Stalled,
    /// As [`Condition::Stalled`], but only for requests with a token; the token service responds at once.
    HoldsTokenResponses,
    Status(u16),
    /// Only the token service is down.
    TokenServiceDown,
}

/// Form of a denial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum No {
    Unauthorized,
    Denied,
    /// 404, as for an unknown repository.
    Masked,
}

/// One response of the registry.
#[derive(Clone)]
pub struct RegistryResponse {
    /// Credential of the request as the client sent it; empty for none.
    pub to: String,
    /// Login for which the token service issued that credential, if known here.
    pub account: String,
    /// Requested host.
    pub site: String,
    /// Empty for the token service.
    pub repository: String,
    /// Digest of the content, if named.
    pub digest: Option<Digest>,
    /// For a manifest or a blob, not for a list.
    pub is_content: bool,
    pub yes: bool,
    /// Position among all decisions. Responses are stored in order of delivery.
    pub decided: usize,
    pub at: SystemTime,
}

/// One line, because walks are long.
impl fmt::Debug for RegistryResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = if self.yes { "yes" } else { "no" };
        let kind = if self.is_content { "content" } else { "list" };
        let at = self
            .at
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let digest = self
            .digest
            .map(|digest| digest.hex()[..8].to_owned())
            .unwrap_or_default();
        write!(
            f,
            "{at} {said} to `{}` for {kind} {digest} in {}/{}",
            self.to, self.site, self.repository
        )
    }
}

#[derive(Default)]
pub struct Shelf {
    pub tags: BTreeMap<String, Digest>,
    pub manifests: BTreeMap<Digest, Bytes>,
    pub blobs: BTreeMap<Digest, Bytes>,
}

pub struct State {
    pub condition: Condition,
    /// Front that responds instead of the registry.
    pub front: Option<super::hostile_fronts::Front>,
    pub no: No,
    pub shelves: BTreeMap<String, Shelf>,
    pub public: BTreeSet<String>,
    /// user, repository
    pub rights: BTreeSet<(String, String)>,
    /// May read lists only.
    pub lists: BTreeSet<(String, String)>,
    pub responses: Vec<RegistryResponse>,
    /// `Retry-After` of a status, in seconds.
    pub retry_after: u64,
    /// Pull quota and what remains of it, reported with each manifest.
    pub quota: Option<(u64, u64)>,
    /// Whether it ever sent a rate limit.
    pub has_limited: bool,
    /// Method and path of each request.
    pub request_log: Vec<String>,
    /// `Last-Modified` of content.
    pub last_modified: BTreeMap<Digest, SystemTime>,
    /// The registry's own time, if it is not that of the test.
    pub date: Option<SystemTime>,
    /// Requests whose method and path begin with one of these are answered only when they are released, with the state
    /// at their arrival.
    pub held: Vec<String>,
    /// Requests whose method and path begin with this are answered after this time.
    pub slow: Option<(String, Duration)>,
    /// Whether requests for manifests are redirected to another host, which sends them with their digest.
    pub redirects_manifests: bool,
    /// Manifests for which it responds 404 to a request whose `Accept` does not list their exact media type.
    pub needs_listed_type: BTreeSet<Digest>,
    /// Repositories for which it responds 500.
    pub broken: BTreeSet<String>,
    /// Whether it leaves out `Docker-Content-Digest`.
    pub states_no_digest: bool,
    decided: usize,
    passwords: BTreeMap<String, String>,
    tokens: BTreeMap<String, Token>,
    tokens_made: usize,
    connections: Vec<AbortHandle>,
}

#[derive(Clone)]
struct Token {
    user: String,
    /// Credential of the client.
    shown: String,
    /// Login for which it was issued, if the client fetched it.
    account: String,
}

#[derive(Clone)]
pub struct Registry {
    state: Arc<Mutex<State>>,
    changed: Arc<tokio::sync::watch::Sender<()>>,
}

impl Registry {
    pub fn new() -> Registry {
        let state = State {
            condition: Condition::Healthy,
            front: None,
            no: No::Unauthorized,
            shelves: BTreeMap::new(),
            public: BTreeSet::new(),
            rights: BTreeSet::new(),
            lists: BTreeSet::new(),
            responses: Vec::new(),
            retry_after: 1,
            quota: None,
            has_limited: false,
            request_log: Vec::new(),
            last_modified: BTreeMap::new(),
            date: None,
            held: Vec::new(),
            slow: None,
            redirects_manifests: false,
            needs_listed_type: BTreeSet::new(),
            broken: BTreeSet::new(),
            states_no_digest: false,
            decided: 0,
            passwords: BTreeMap::new(),
            tokens: BTreeMap::new(),
            tokens_made: 0,
            connections: Vec::new(),
        };
        Registry {
            state: Arc::new(Mutex::new(state)),
            changed: Arc::new(tokio::sync::watch::Sender::new(())),
        }
    }

    pub fn request_log(&self) -> Vec<String> {
        self.state().request_log.clone()
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn set_condition(&self, condition: Condition) {
        self.state().condition = condition;
        self.changed.send_replace(());
    }

    /// Holds the responses to requests whose method and path begin with `prefix`.
    pub fn hold(&self, prefix: &str) {
        self.state().held.push(prefix.to_owned());
    }

    /// Answers requests whose method and path begin with `prefix` after this time.
    pub fn slows(&self, prefix: &str, by: Duration) {
        self.state().slow = Some((prefix.to_owned(), by));
    }

    /// Sends the held responses, and holds no more.
    pub fn release(&self) {
        self.state().held.clear();
        self.changed.send_replace(());
    }

    /// Cuts every connection; unanswered requests stay unanswered.
    pub fn cut(&self) {
        for connection in self.state().connections.drain(..) {
            connection.abort();
        }
    }

    pub fn user(&self, name: &str, password: &str) {
        self.state()
            .passwords
            .insert(name.to_owned(), password.to_owned());
    }

    /// `Authorization` with a token as the user's own client fetches it.
    pub fn bearer(&self, user: &str) -> String {
        let (token, shown) = (format!("direct-{user}"), format!("Bearer direct-{user}"));
        let given = Token {
            user: user.to_owned(),
            shown: shown.clone(),
            account: String::new(),
        };
        self.state().tokens.insert(token, given);
        shown
    }

    /// From now on the token service denies the user's password.
    pub fn forgets(&self, user: &str) {
        self.state().passwords.remove(user);
    }

    pub fn lets(&self, user: &str, repository: &str) {
        self.state()
            .rights
            .insert((user.to_owned(), repository.to_owned()));
    }

    pub fn revokes(&self, user: &str, repository: &str) {
        self.state()
            .rights
            .remove(&(user.to_owned(), repository.to_owned()));
    }

    /// Pushes a new image under this tag with layers of the given sizes; `mark` makes its bytes unique.
    pub fn push(&self, repository: &str, tag: &str, mark: &str, sizes: &[usize]) -> Digest {
        let blobs: Vec<Bytes> = sizes
            .iter()
            .enumerate()
            .map(|(nth, size)| {
                let line = format!("{repository} {mark} layer {nth};");
                Bytes::from(
                    line.as_bytes()
                        .iter()
                        .copied()
                        .cycle()
                        .take((*size).max(line.len()))
                        .collect::<Vec<_>>(),
                )
            })
            .collect();
        let config = Bytes::from(format!(
            r#"{{"config":"{repository} {mark}","created":"2020-01-01T00:00:00Z"}}"#
        ));
        let manifest = manifest(&config, &blobs);
        let digest = of(&manifest);
        let mut state = self.state();
        let place = state.shelves.entry(repository.to_owned()).or_default();
        for blob in blobs.into_iter().chain([config]) {
            place.blobs.insert(of(&blob), blob);
        }
        place.manifests.insert(digest, manifest);
        place.tags.insert(tag.to_owned(), digest);
        digest
    }

    /// Pushes an index of one new image for each of these architectures. Returns the digests of the index and its images.
    pub fn push_index(&self, repository: &str, tag: &str, mark: &str, architectures: &[&str]) -> Vec<Digest> {
        let images: Vec<(Digest, usize)> = architectures
            .iter()
            .map(|architecture| {
                let of_it = format!("{mark} {architecture}");
                let digest = self.push(repository, "child", &of_it, &[100]);
                (digest, self.state().shelves[repository].manifests[&digest].len())
            })
            .collect();
        let children: Vec<_> = images
            .iter()
            .zip(architectures)
            .map(|((digest, size), architecture)| {
                serde_json::json!({"mediaType": OCI_MANIFEST, "digest": digest.to_string(), "size": size,
                    "platform": {"os": "linux", "architecture": architecture}})
            })
            .collect();
        let index = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children});
        let index = Bytes::from(index.to_string());
        let digest = of(&index);
        let mut state = self.state();
        let place = state.shelves.get_mut(repository).unwrap();
        place.tags.remove("child");
        place.manifests.insert(digest, index);
        place.tags.insert(tag.to_owned(), digest);
        std::iter::once(digest)
            .chain(images.into_iter().map(|(digest, _)| digest))
            .collect()
    }

    /// Pushes the manifest of another repository's image without its blobs.
    pub fn names_what_is_in(&self, repository: &str, tag: &str, other: &str, digest: Digest) {
        let mut state = self.state();
        let manifest = state.shelves[other].manifests[&digest].clone();
        let place = state.shelves.entry(repository.to_owned()).or_default();
        place.manifests.insert(digest, manifest);
        place.tags.insert(tag.to_owned(), digest);
    }

    pub fn dial(&self) -> Arc<dyn Dialer> {
        Arc::new(Pipes(self.clone()))
    }

    fn is_held(&self, line: &str) -> bool {
        let state = self.state();
        state.held.iter().any(|prefix| line.starts_with(prefix))
    }

    async fn act(self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let mut changed = self.changed.subscribe();
        changed.mark_unchanged();
        let ((answer, word), condition) = {
            let mut state = self.state();
            (state.answer(&request), state.condition)
        };
        let waits = condition == Condition::Stalled
            || (condition == Condition::HoldsTokenResponses && word.is_some());
        if waits {
            let _ = changed.changed().await;
        }
        let line = format!("{} {}", request.method(), request.uri().path());
        while self.is_held(&line) && changed.changed().await.is_ok() {}
        let slow = self.state().slow.clone();
        let by = slow
            .filter(|(prefix, _)| line.starts_with(prefix))
            .map(|(_, by)| by);
        // Lets other tasks run.
        tokio::time::sleep(by.unwrap_or_default().max(Duration::from_millis(1))).await;
        // A cancelled request never reaches this.
        self.state()
            .responses
            .extend(word.map(|word| RegistryResponse { at: now(), ..word }));
        Ok(answer)
    }
}

impl State {
    #[expect(clippy::too_many_lines, reason = "one arm for each kind of request")]
    fn answer(&mut self, request: &Request<Incoming>) -> (Response<Full<Bytes>>, Option<RegistryResponse>) {
        let path = request.uri().path().to_owned();
        self.request_log.push(format!("{} {path}", request.method()));
        let site = request.headers()[HOST].to_str().unwrap().to_owned();
        let shown = request
            .headers()
            .get(AUTHORIZATION)
            .map(|value| value.to_str().unwrap().to_owned())
            .unwrap_or_default();
        if let Some(front) = self.front.clone() {
            let user = self
                .tokens
                .get(shown.trim_start_matches("Bearer "))
                .map(|token| token.user.clone());
            let repository = split(&path).map(|(repository, ..)| repository.to_owned());
            let may = user
                .zip(repository)
                .is_some_and(|right| self.rights.contains(&right));
            let is_free =
                matches!(path.as_str(), "/token" | "/v2/") && site != super::hostile_fronts::ELSEWHERE;
            if let Some(answer) = front.answer(&site, &path, may || is_free) {
                return (answer, None);
            }
        }
        if let Condition::Status(status) = self.condition {
            self.has_limited |= status == 429;
            let builder = Response::builder().status(status);
            return (
                builder
                    .header(RETRY_AFTER, self.retry_after)
                    .body(Full::default())
                    .unwrap(),
                None,
            );
        }
        if path == "/token" {
            let fetched = request.headers().contains_key(CLIENT);
            let answer = self.token(&shown, fetched);
            let decided = answer.status() == StatusCode::OK || answer.status() == StatusCode::UNAUTHORIZED;
            let word = (fetched && decided).then(|| RegistryResponse {
                to: shown,
                account: String::new(),
                site,
                repository: String::new(),
                digest: None,
                is_content: false,
                yes: answer.status() == StatusCode::OK,
                decided: self.decided,
                at: now(),
            });
            self.decided += 1;
            return (answer, word);
        }
        if path == "/v2/" {
            return (challenge(&site, None, None), None);
        }
        let Some((repository, kind, reference)) = split(&path) else {
            return (status(StatusCode::NOT_FOUND), None);
        };
        if self.broken.contains(repository) {
            return (status(StatusCode::INTERNAL_SERVER_ERROR), None);
        }
        if self.redirects_manifests && site == super::hostile_fronts::ELSEWHERE {
            let found = self.find(repository, kind, reference);
            let answer = found.map(|(digest, body)| self.content(kind, digest, body));
            return (answer.unwrap_or_else(|| status(StatusCode::NOT_FOUND)), None);
        }
        let token = shown
            .strip_prefix("Bearer ")
            .and_then(|token| self.tokens.get(token).cloned());
        let Some(Token { user, shown, account }) = token else {
            return (challenge(&site, Some(repository), None), None);
        };
        let is_content = matches!(kind, "manifests" | "blobs");
        let right = (user, repository.to_owned());
        let may = self.public.contains(repository)
            || self.rights.contains(&right)
            || (!is_content && self.lists.contains(&right));
        let mut word = RegistryResponse {
            to: shown,
            account,
            site: site.clone(),
            repository: repository.to_owned(),
            digest: None,
            is_content,
            yes: false,
            decided: self.decided,
            at: now(),
        };
        self.decided += 1;
        if !may {
            let answer = match self.no {
                No::Unauthorized => challenge(&site, Some(repository), Some("insufficient_scope")),
                No::Denied => status(StatusCode::FORBIDDEN),
                No::Masked => return (status(StatusCode::NOT_FOUND), None),
            };
            return (answer, Some(word));
        }
        let Some((digest, body)) = self.find(repository, kind, reference) else {
            return (status(StatusCode::NOT_FOUND), None);
        };
        if digest.is_some_and(|digest| self.needs_listed_type.contains(&digest)) {
            let listed = request.headers().get_all(ACCEPT).iter();
            if !listed.into_iter().any(|line| line == media_type_of(&body)) {
                return (status(StatusCode::NOT_FOUND), None);
            }
        }
        word.yes = true;
        word.digest = digest;
        if self.redirects_manifests && kind == "manifests" {
            let to = format!("http://{}{path}", super::hostile_fronts::ELSEWHERE);
            let builder = Response::builder().status(StatusCode::FOUND);
            let answer = builder.header(LOCATION, to).body(Full::default()).unwrap();
            return (answer, None);
        }
        (self.content(kind, digest, body), Some(word))
    }

    fn content(&self, kind: &str, digest: Option<Digest>, body: Bytes) -> Response<Full<Bytes>> {
        let mut builder = Response::builder().header(
            CONTENT_TYPE,
            match kind {
                "manifests" => media_type_of(&body),
                "referrers" => OCI_INDEX,
                "tags" => "application/json",
                _ => "application/octet-stream",
            },
        );
        builder = builder.header(DATE, httpdate::fmt_http_date(self.date.unwrap_or_else(now)));
        if let Some(digest) = digest.filter(|_| !self.states_no_digest) {
            builder = builder.header("docker-content-digest", digest.to_string());
            if let Some(at) = self.last_modified.get(&digest) {
                builder = builder.header(LAST_MODIFIED, httpdate::fmt_http_date(*at));
            }
        }
        if let Some((limit, remaining)) = self.quota.filter(|_| kind == "manifests") {
            builder = builder
                .header("ratelimit-limit", format!("{limit};w=21600"))
                .header("ratelimit-remaining", format!("{remaining};w=21600"));
        }
        builder.body(Full::new(body)).unwrap()
    }

    fn find(&self, repository: &str, kind: &str, reference: &str) -> Option<(Option<Digest>, Bytes)> {
        let place = self.shelves.get(repository)?;
        let digest = place
            .tags
            .get(reference)
            .copied()
            .or_else(|| reference.parse().ok());
        match kind {
            "manifests" => Some((digest, place.manifests.get(&digest?)?.clone())),
            "blobs" => Some((digest, place.blobs.get(&digest?)?.clone())),
            "tags" => {
                let tags: Vec<_> = place.tags.keys().collect();
                let list = serde_json::json!({"name": repository, "tags": tags});
                Some((None, Bytes::from(list.to_string())))
            }
            _ => {
                let list = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []});
                Some((None, Bytes::from(list.to_string())))
            }
        }
    }

    /// `fetched`: by the client itself.
    fn token(&mut self, shown: &str, fetched: bool) -> Response<Full<Bytes>> {
        if self.condition == Condition::TokenServiceDown {
            return status(StatusCode::BAD_GATEWAY);
        }
        let user = if shown.is_empty() {
            String::new()
        } else {
            let pair = BASE64_STANDARD
                .decode(shown.trim_start_matches("Basic "))
                .unwrap_or_default();
            let pair = String::from_utf8(pair).unwrap();
            let (user, password) = pair.split_once(':').unwrap_or_default();
            if self.passwords.get(user).is_none_or(|right| right != password) {
                return status(StatusCode::UNAUTHORIZED);
            }
            user.to_owned()
        };
        self.tokens_made += 1;
        let token = format!("made-{}", self.tokens_made);
        let given = Token {
            user,
            shown: if fetched {
                format!("Bearer {token}")
            } else {
                shown.to_owned()
            },
            account: if fetched { shown.to_owned() } else { String::new() },
        };
        self.tokens.insert(token.clone(), given);
        let body = serde_json::json!({"token": token, "expires_in": 300}).to_string();
        Response::new(Full::new(Bytes::from(body)))
    }
}

fn media_type_of(manifest: &[u8]) -> &'static str {
    let is_index = manifest
        .windows(OCI_INDEX.len())
        .any(|part| part == OCI_INDEX.as_bytes());
    if is_index { OCI_INDEX } else { OCI_MANIFEST }
}

fn split(path: &str) -> Option<(&str, &str, &str)> {
    let (rest, reference) = path.strip_prefix("/v2/")?.rsplit_once('/')?;
    let (repository, kind) = rest.rsplit_once('/')?;
    Some((repository, kind, reference))
}

fn status(status: StatusCode) -> Response<Full<Bytes>> {
    let builder = Response::builder().status(status);
    builder
        .header("docker-distribution-api-version", "registry/2.0")
        .body(Full::default())
        .unwrap()
}

fn challenge(site: &str, repository: Option<&str>, error: Option<&str>) -> Response<Full<Bytes>> {
    let scope = repository
        .map(|name| format!(",scope=\"repository:{name}:pull\""))
        .unwrap_or_default();
    let error = error
        .map(|error| format!(",error=\"{error}\""))
        .unwrap_or_default();
    let line = format!("Bearer realm=\"http://{site}/token\",service=\"test\"{scope}{error}");
    let mut response = status(StatusCode::UNAUTHORIZED);
    response
        .headers_mut()
        .insert(WWW_AUTHENTICATE, line.try_into().unwrap());
    response
}

pub fn of(bytes: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, bytes)
}

fn manifest(config: &[u8], layers: &[Bytes]) -> Bytes {
    let descriptor = |kind: &str, bytes: &[u8]| serde_json::json!({"mediaType": kind, "digest": of(bytes).to_string(), "size": bytes.len()});
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", layer))
        .collect();
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": descriptor("application/vnd.oci.image.config.v1+json", config), "layers": layers});
    Bytes::from(manifest.to_string())
}

struct Pipes(Registry);

impl Dialer for Pipes {
    fn dial(&self, _: &Uri, _: &AddressLimit, _: Duration) -> DialFuture {
        let (registry, taken) = (self.0.clone(), self.0.clone());
        Box::pin(async move {
            if registry.state().condition == Condition::Down {
                return Err(DialError {
                    cause: UpstreamFailure::ConnectionRefused,
                    detail: None,
                    source: None,
                });
            }
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let connection = tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let registry = registry.clone();
                    // Connections from before the outage break.
                    async move {
                        if registry.state().condition == Condition::Down {
                            return Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
                        }
                        Ok(registry.act(request).await.unwrap_or_else(|never| match never {}))
                    }
                });
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(theirs), service)
                    .await;
            });
            let mut state = taken.state();
            state.connections.retain(|one| !one.is_finished());
            state.connections.push(connection.abort_handle());
            drop(state);
            Ok(DialedStream {
                stream: Box::new(ours),
                peer: None,
            })
        })
    }
}
