//! A scripted bucket: S3's API over objects in memory, with faults.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::proxy::{Ask, Setup};
use crate::registry::within;

/// What the bucket does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// What S3 does.
    Normal,
    /// No response ever.
    Silent,
    /// This status and error code for each request.
    Status(u16, &'static str),
    /// Writes are denied.
    ReadOnly,
    /// Objects have other bytes of the same size.
    Corrupt,
    /// Bodies break off in the middle.
    Truncated,
    /// The first body breaks off in the middle, and then the object is gone.
    Eaten,
    /// Bodies stop in the middle and stay open.
    Stalled,
    /// Writes wait until the mode changes.
    HoldsWrites,
    /// Requests for claims are denied.
    DeniesClaims,
    /// Each write succeeds, whatever its conditions.
    IgnoresConditions,
    /// Parts have other bytes of the same size.
    CorruptsParts,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub object: String,
}

#[derive(Default)]
struct Objects {
    stored: BTreeMap<String, Bytes>,
    /// Number of writes, the version of the last one.
    writes: u64,
    versions: HashMap<String, u64>,
    uploads: HashMap<String, BTreeMap<u32, Bytes>>,
    asked: Vec<Asked>,
    /// Time of the bucket's clock in seconds, and of the last write of each object.
    now: u64,
    /// Since then, the bucket's clock runs. Before, it rests.
    runs_since: Option<Instant>,
    written: HashMap<String, u64>,
}

impl Objects {
    fn now(&self) -> u64 {
        self.now + self.runs_since.map_or(0, |since| since.elapsed().as_secs())
    }

    fn etag(&self, object: &str) -> String {
        format!("\"{}\"", self.versions.get(object).unwrap_or(&0))
    }
}

/// A running bucket.
#[derive(Clone)]
pub struct Bucket {
    address: String,
    objects: Arc<Mutex<Objects>>,
    mode: watch::Sender<Mode>,
    changed: watch::Sender<u64>,
}

type Reply = Response<BoxBody<Bytes, std::io::Error>>;

fn whole(bytes: impl Into<Bytes>) -> BoxBody<Bytes, std::io::Error> {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

fn status(code: u16, body: &str) -> Reply {
    let mut reply = Response::new(whole(body.to_owned()));
    *reply.status_mut() = StatusCode::from_u16(code).unwrap();
    reply
}

/// Start of the bucket's clock, decades behind those of the caches.
const START: u64 = 883_612_800;

/// A time of day on the bucket's clock.
fn date(seconds: u64) -> String {
    let time = UNIX_EPOCH + Duration::from_secs(START + seconds);
    httpdate::fmt_http_date(time)
}

fn error(code: u16, name: &str) -> Reply {
    status(code, &format!("<Error><Code>{name}</Code></Error>"))
}

impl Bucket {
    pub async fn start() -> Bucket {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bucket = Bucket {
            address: format!("http://{}", listener.local_addr().unwrap()),
            objects: Arc::default(),
            mode: watch::Sender::new(Mode::Normal),
            changed: watch::Sender::new(0),
        };
        let serving = bucket.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let bucket = serving.clone();
                let service = service_fn(move |request| {
                    let bucket = bucket.clone();
                    async move { Ok::<_, Infallible>(bucket.serve(request).await) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                tokio::spawn(connection);
            }
        });
        bucket
    }

    /// This cache with the bucket as its shared storage.
    pub fn behind(&self, setup: Setup) -> Setup {
        self.behind_with(setup, "")
    }

    /// The same with further keys.
    pub fn behind_with(&self, setup: Setup, keys: &str) -> Setup {
        setup
            .environment("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
            .environment("AWS_SECRET_ACCESS_KEY", "canary-secret")
            .tail(&self.section(keys))
    }

    pub fn section(&self, keys: &str) -> String {
        let address = &self.address;
        format!("[shared]\nbucket = \"s3://images/team-a\"\nendpoint = \"{address}\"\n{keys}\n")
    }

    /// The records of a class, by name.
    pub fn records(&self, class: &str) -> Vec<(String, Bytes)> {
        let below = format!("v1/records/{class}/");
        let objects = self.objects.lock().unwrap();
        let found = objects.stored.iter().filter(|(name, _)| name.starts_with(&below));
        found.map(|(name, bytes)| (name.clone(), bytes.clone())).collect()
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// The response to a URL to which a client was redirected.
    pub async fn follow(&self, url: &str) -> (u16, Bytes) {
        let path = url.strip_prefix(&self.address).expect("a URL of the bucket");
        let address = self.address.strip_prefix("http://").unwrap().parse().unwrap();
        let reply = Ask::new(address, "GET", path).unchecked().await;
        (reply.status, reply.body)
    }

    /// The requests, without those of probes.
    pub fn asked(&self) -> Vec<Asked> {
        let asked = self.asked_with_probes();
        let is_probe = |asked: &Asked| asked.object.contains("/probe/");
        asked.into_iter().filter(|asked| !is_probe(asked)).collect()
    }

    pub fn asked_with_probes(&self) -> Vec<Asked> {
        self.objects.lock().unwrap().asked.clone()
    }

    /// Waits until this many caches know that they can use claims.
    pub async fn has_claims_for(&self, caches: usize) {
        self.until("the probes of claims", |bucket| {
            let asked = bucket.asked_with_probes();
            let ends = asked
                .iter()
                .filter(|asked| asked.method == "DELETE" && asked.object.starts_with("v1/claims/probe/"));
            ends.count() >= caches
        })
        .await;
    }

    /// Names of the objects of this kind.
    pub fn names(&self, kind: &str) -> Vec<String> {
        let objects = self.objects.lock().unwrap();
        let names = objects
            .stored
            .keys()
            .filter(|name| name.starts_with(&format!("v1/{kind}/")));
        names.cloned().collect()
    }

    /// Writes an object by name.
    pub fn put(&self, name: &str, bytes: impl Into<Bytes>) {
        let mut objects = self.objects.lock().unwrap();
        objects.stored.insert(name.to_owned(), bytes.into());
        let now = objects.now();
        objects.written.insert(name.to_owned(), now);
    }

    /// Sets the bucket's clock forward.
    pub fn pass(&self, seconds: u64) {
        self.objects.lock().unwrap().now += seconds;
    }

    /// Sets the bucket's clock to the right time. Objects keep their age.
    #[expect(
        clippy::disallowed_methods,
        reason = "the caches under test read the same clock"
    )]
    pub fn set_clock_right(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() - START;
        let mut objects = self.objects.lock().unwrap();
        let by = now - objects.now;
        (objects.now, objects.runs_since) = (now, Some(Instant::now()));
        for written in objects.written.values_mut() {
            *written += by;
        }
    }

    pub fn forget_asked(&self) {
        self.objects.lock().unwrap().asked.clear();
    }

    /// How often the object of this digest was requested by this method.
    pub fn count(&self, method: &str, digest: &str) -> usize {
        let of_it = self.requests_of(digest).into_iter();
        let of_it = of_it.filter(|asked| !asked.object.contains("/claims/"));
        of_it.filter(|asked| asked.method == method).count()
    }

    /// The requests for the object or the claim of this digest.
    pub fn requests_of(&self, digest: &str) -> Vec<Asked> {
        let hex = digest.split(':').next_back().unwrap();
        let asked = self.asked().into_iter();
        asked.filter(|asked| asked.object.ends_with(hex)).collect()
    }

    /// The object with this digest.
    pub fn object(&self, digest: &str) -> Option<Bytes> {
        let hex = digest.split(':').next_back().unwrap();
        let objects = self.objects.lock().unwrap();
        let is_it = |name: &str| name.ends_with(hex) && !name.contains("/claims/");
        let found = objects.stored.iter().find(|(name, _)| is_it(name));
        found.map(|(_, bytes)| bytes.clone())
    }

    /// Changes the bytes of an object.
    pub fn replace(&self, digest: &str, bytes: impl Into<Bytes>) {
        let hex = digest.split(':').next_back().unwrap();
        let mut objects = self.objects.lock().unwrap();
        let is_it = |name: &str| name.ends_with(hex) && !name.contains("/claims/");
        let found = objects.stored.iter_mut().find(|(name, _)| is_it(name));
        *found.unwrap().1 = bytes.into();
    }

    /// Deletes the object of a digest.
    pub fn remove(&self, digest: &str) {
        let hex = digest.split(':').next_back().unwrap();
        let mut objects = self.objects.lock().unwrap();
        objects.stored.retain(|name, _| !name.ends_with(hex));
    }

    /// Waits until the bucket satisfies the test.
    pub async fn until(&self, what: &str, enough: impl Fn(&Bucket) -> bool) {
        let mut changed = self.changed.subscribe();
        within(what, async {
            while !enough(self) {
                changed.changed().await.unwrap();
            }
        })
        .await;
    }

    /// Waits until these digests are objects.
    pub async fn has<'a>(&self, digests: impl IntoIterator<Item = &'a str>) {
        for digest in digests {
            self.until("the upload", |bucket| bucket.object(digest).is_some())
                .await;
        }
    }

    /// Waits until no cache has a claim. Those of manifests outlive their uploads by a second.
    pub async fn has_no_claims(&self) {
        self.until("the end of all claims", |bucket| {
            bucket.names("claims").is_empty()
        })
        .await;
    }

    async fn serve(&self, request: Request<Incoming>) -> Reply {
        let (head, body) = request.into_parts();
        let query = head.uri.query().unwrap_or_default();
        assert!(
            head.headers.contains_key("authorization") != query.contains("X-Amz-Signature="),
            "every request is signed, in one way"
        );
        let object = head
            .uri
            .path()
            .strip_prefix("/images/team-a/")
            .unwrap()
            .to_owned();
        self.objects.lock().unwrap().asked.push(Asked {
            method: head.method.to_string(),
            object: object.clone(),
        });
        self.changed.send_modify(|count| *count += 1);
        let is_write = !matches!(head.method, Method::GET | Method::HEAD);
        let mode = *self.mode.borrow();
        match mode {
            Mode::Silent => std::future::pending().await,
            Mode::Status(code, name) => return error(code, name),
            Mode::DeniesClaims if object.starts_with("v1/claims/") => return error(403, "AccessDenied"),
            Mode::ReadOnly if is_write => return error(403, "AccessDenied"),
            Mode::HoldsWrites if is_write => {
                let mut mode = self.mode.subscribe();
                mode.wait_for(|mode| *mode != Mode::HoldsWrites).await.unwrap();
            }
            _ => {}
        }
        let Ok(body) = body.collect().await else {
            return error(400, "IncompleteBody");
        };
        let reply = if is_write {
            self.write((&head, mode), &object, body.to_bytes())
        } else {
            self.read(&head.headers, &object, mode)
        };
        let reply = self.dated(reply);
        self.changed.send_modify(|count| *count += 1);
        reply
    }

    fn dated(&self, mut reply: Reply) -> Reply {
        let now = date(self.objects.lock().unwrap().now());
        reply.headers_mut().insert("date", now.parse().unwrap());
        reply
    }

    fn read(&self, headers: &HeaderMap, object: &str, mode: Mode) -> Reply {
        let objects = self.objects.lock().unwrap();
        let Some(mut bytes) = objects.stored.get(object).cloned() else {
            return error(404, "NoSuchKey");
        };
        let range = headers.get("range").map(|range| range.to_str().unwrap());
        if mode == Mode::Eaten && range.is_some() {
            return error(404, "NoSuchKey");
        }
        if mode == Mode::Corrupt || mode == Mode::CorruptsParts && object.starts_with("v1/parts/") {
            bytes = bytes.iter().map(|byte| !byte).collect::<Vec<u8>>().into();
        }
        let size = bytes.len();
        let from: usize = range.map_or(0, |range| {
            range
                .trim_start_matches("bytes=")
                .trim_end_matches('-')
                .parse()
                .unwrap()
        });
        let bytes = bytes.slice(from..);
        let length = bytes.len();
        let body = if mode == Mode::Stalled {
            let half = Ok(Frame::data(bytes.slice(..length / 2)));
            let never = futures_util::stream::pending::<Result<_, std::io::Error>>();
            let frames = futures_util::StreamExt::chain(futures_util::stream::iter([half]), never);
            StreamBody::new(frames).boxed()
        } else if matches!(mode, Mode::Truncated | Mode::Eaten) && length > 1 {
            let frames = [
                Ok(Frame::data(bytes.slice(..length / 2))),
                Err(std::io::Error::other("broken off")),
            ];
            StreamBody::new(futures_util::stream::iter(frames)).boxed()
        } else {
            whole(bytes)
        };
        let mut reply = Response::builder()
            .header("etag", objects.etag(object))
            .header("content-length", length)
            .header(
                "last-modified",
                date(objects.written.get(object).copied().unwrap_or(0)),
            )
            .header("date", date(objects.now()));
        if from > 0 {
            let range = format!("bytes {from}-{}/{size}", size - 1);
            reply = reply.status(206).header("content-range", range);
        }
        reply.body(body).unwrap()
    }

    fn write(&self, (head, mode): (&http::request::Parts, Mode), object: &str, body: Bytes) -> Reply {
        let mut objects = self.objects.lock().unwrap();
        let query = head.uri.query().unwrap_or_default();
        let argument = |name: &str| {
            let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs
                .clone()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.to_owned())
        };
        match (&head.method, argument("uploadId")) {
            (&Method::POST, None) => {
                objects.uploads.insert(object.to_owned(), BTreeMap::new());
                status(
                    200,
                    &format!(
                        "<InitiateMultipartUploadResult><Bucket>images</Bucket><Key>{object}</Key>\
                         <UploadId>u</UploadId></InitiateMultipartUploadResult>"
                    ),
                )
            }
            (&Method::PUT, Some(_)) => {
                let number = argument("partNumber").unwrap().parse().unwrap();
                objects.uploads.get_mut(object).unwrap().insert(number, body);
                let mut reply = status(200, "");
                reply.headers_mut().insert("etag", "\"part\"".parse().unwrap());
                reply
            }
            (&Method::POST, Some(_)) => {
                let parts = objects.uploads.remove(object).unwrap();
                let bytes: Vec<u8> = parts.into_values().flatten().collect();
                objects.stored.insert(object.to_owned(), bytes.into());
                status(
                    200,
                    &format!(
                        "<CompleteMultipartUploadResult><Bucket>images</Bucket><Key>{object}</Key>\
                         <ETag>\"1\"</ETag></CompleteMultipartUploadResult>"
                    ),
                )
            }
            (&Method::DELETE, Some(_)) => {
                objects.uploads.remove(object);
                status(204, "")
            }
            (&Method::DELETE, None) => {
                objects.stored.remove(object);
                status(204, "")
            }
            (&Method::PUT, None) => {
                let etag = objects.etag(object);
                let is_create = head.headers.contains_key("if-none-match");
                let is_stale = head
                    .headers
                    .get("if-match")
                    .is_some_and(|version| *version != etag);
                let is_refused = is_stale || is_create && objects.stored.contains_key(object);
                if is_refused && mode != Mode::IgnoresConditions {
                    return error(412, "PreconditionFailed");
                }
                objects.writes += 1;
                let version = objects.writes;
                objects.versions.insert(object.to_owned(), version);
                let now = objects.now();
                objects.written.insert(object.to_owned(), now);
                objects.stored.insert(object.to_owned(), body);
                let mut reply = status(200, "");
                reply
                    .headers_mut()
                    .insert("etag", objects.etag(object).parse().unwrap());
                reply
            }
            _ => error(405, "MethodNotAllowed"),
        }
    }
}
