//! Scripted registry: a real server on a free port in the test process, with configurable faults.
//!
//! `let upstream = Upstream::start().await;` starts a well-behaved registry. The setters of `faults.rs` take effect
//! at once, also on open connections, and `recovers()` clears every fault. All requests are logged. It shares no code
//! with the program under test.

mod body;
mod faults;
mod fronts;
mod gate;
mod image;
mod limits;
mod lists;
mod rights;
mod selftest;
mod serve;
mod tls;
mod writes;

use body::{Piped, Plan};
pub use fronts::Front;
pub use gate::Gate;
pub use image::{Blob, DOCKER_LIST, DOCKER_MANIFEST, Image, OCI_INDEX, OCI_MANIFEST, noise, sha256, sha512};
pub use tls::Presented;

pub use limits::Scripted;

use bytes::Bytes;
use faults::Faults;
use http::HeaderMap;
use rights::Rights;
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpSocket;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Timeout of waiting for an event. Generous, because the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for an event, with a timeout.
pub async fn within<T>(what: &str, event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event)
        .await
        .unwrap_or_else(|_| panic!("waited {PATIENCE:?} for {what}"))
}

/// One request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// Without the query.
    pub path: String,
    pub query: Option<String>,
    pub headers: HeaderMap,
}

impl Seen {
    /// Every `Accept` line, in order.
    pub fn accept(&self) -> Vec<String> {
        self.headers
            .get_all("accept")
            .iter()
            .map(|line| line.to_str().unwrap().to_owned())
            .collect()
    }

    /// Whether an `Authorization` header was present.
    pub fn authorized(&self) -> bool {
        self.headers.contains_key("authorization")
    }

    /// The text of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    fn is(&self, method: &str, part: &str) -> bool {
        self.method == method && self.path.contains(part)
    }
}

/// A running registry, stopped on drop.
pub struct Upstream {
    shared: Arc<Shared>,
    address: SocketAddr,
    authority: Option<tls::Authority>,
    listener: Mutex<Option<AbortHandle>>,
    /// Bound and never listening, to reserve the port while the listener is closed.
    _reserved: TcpSocket,
}

struct Shared {
    state: Mutex<State>,
    log: watch::Sender<Vec<Seen>>,
    /// Notified on every change of settings.
    turned: watch::Sender<()>,
    base: String,
}

#[derive(Default)]
struct State {
    repositories: BTreeMap<String, Repository>,
    /// Blobs that redirects lead to.
    storage: BTreeMap<String, Bytes>,
    faults: Faults,
    rights: Rights,
    connections: Vec<AbortHandle>,
    connections_seen: usize,
    client_certificates: usize,
    uploads: writes::Uploads,
    bytes_sent: u64,
    tls: Option<Arc<rustls::ServerConfig>>,
}

#[derive(Default)]
struct Repository {
    /// The digest of each tag, and a second one for clients that do not accept the type of the first.
    tags: BTreeMap<String, Vec<String>>,
    manifests: BTreeMap<String, (String, Bytes)>,
    blobs: BTreeMap<String, Bytes>,
    /// subject, artifact type, digest
    attached: Vec<(String, String, String)>,
}

impl Upstream {
    /// A plain HTTP registry.
    #[allow(
        clippy::unused_async,
        reason = "it needs a running runtime; awaiting it says so"
    )]
    pub async fn start() -> Upstream {
        Upstream::new("http")
    }

    /// A registry behind TLS (h2 and HTTP/1.1), with a CA of its own.
    #[allow(
        clippy::unused_async,
        reason = "it needs a running runtime; awaiting it says so"
    )]
    pub async fn start_tls() -> Upstream {
        Upstream::new("https")
    }

    fn new(scheme: &'static str) -> Upstream {
        let reserved = bound("127.0.0.1:0".parse().unwrap());
        let address = reserved.local_addr().unwrap();
        let authority = (scheme == "https").then(tls::Authority::new);
        let state = State {
            tls: authority.as_ref().map(tls::Authority::server_config),
            ..State::default()
        };
        let upstream = Upstream {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                log: watch::Sender::new(Vec::new()),
                turned: watch::Sender::new(()),
                base: format!("{scheme}://{address}"),
            }),
            address,
            authority,
            listener: Mutex::new(None),
            _reserved: reserved,
        };
        upstream.listen();
        upstream
    }

    /// Its URL: `http://127.0.0.1:…`.
    pub fn url(&self) -> String {
        self.shared.base.clone()
    }

    /// `127.0.0.1:…`
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The CA certificate that signs this upstream's certificate, as PEM.
    pub fn ca_pem(&self) -> &str {
        self.authority.as_ref().expect("a plain upstream has no CA").pem()
    }

    /// Pushes an image under this tag.
    pub fn push(&self, repository: &str, tag: &str, image: Image) -> Image {
        self.edit(repository, |held| {
            held.keep(&image);
            held.tags.insert(tag.to_owned(), vec![image.digest.clone()]);
        });
        image
    }

    /// `push`, for an existing tag.
    pub fn moves(&self, repository: &str, tag: &str, image: Image) -> Image {
        self.push(repository, tag, image)
    }

    /// Pushes an image under all of these tags.
    pub fn push_tags(&self, repository: &str, tags: &[String], image: &Image) {
        self.edit(repository, |held| {
            held.keep(image);
            for tag in tags {
                held.tags.insert(tag.clone(), vec![image.digest.clone()]);
            }
        });
    }

    /// Serves this image under the same tag to clients that do not accept the type of the first one.
    pub fn push_also(&self, repository: &str, tag: &str, image: Image) -> Image {
        self.edit(repository, |held| {
            held.keep(&image);
            held.tags
                .entry(tag.to_owned())
                .or_default()
                .push(image.digest.clone());
        });
        image
    }

    /// Stores an image without a tag.
    pub fn push_untagged(&self, repository: &str, image: Image) -> Image {
        self.edit(repository, |held| held.keep(&image));
        image
    }

    /// Stores a blob that no manifest references.
    pub fn push_blob(&self, repository: &str, bytes: &[u8]) -> Blob {
        let blob = Blob::of(bytes);
        self.edit(repository, |held| {
            held.blobs.insert(blob.digest.clone(), blob.bytes.clone())
        });
        blob
    }

    /// Stores these bytes under this digest, right or wrong.
    pub fn push_named(&self, repository: &str, digest: &str, bytes: &[u8]) {
        let bytes = Bytes::copy_from_slice(bytes);
        self.edit(repository, |held| held.blobs.insert(digest.to_owned(), bytes));
    }

    /// Deletes the tag and keeps the manifest.
    pub fn deletes_tag(&self, repository: &str, tag: &str) {
        self.edit(repository, |held| held.tags.remove(tag));
    }

    /// Deletes the blob from this repository.
    pub fn deletes_blob(&self, repository: &str, digest: &str) {
        self.edit(repository, |held| held.blobs.remove(digest));
    }

    /// Deletes the manifest from this repository and keeps its tags.
    pub fn deletes_manifest(&self, repository: &str, digest: &str) {
        self.edit(repository, |held| held.manifests.remove(digest));
    }

    /// Every request so far, oldest first.
    pub fn requests(&self) -> Vec<Seen> {
        self.shared.log.borrow().clone()
    }

    /// Clears the log.
    pub fn clear_log(&self) {
        self.shared.log.send_modify(Vec::clear);
        self.state(|state| {
            state.bytes_sent = 0;
            state.connections_seen = 0;
        });
    }

    /// `HEAD`s of manifests in this repository.
    pub fn heads(&self, repository: &str) -> usize {
        self.count("HEAD", &format!("/v2/{repository}/manifests/"))
    }

    /// `GET`s of manifests in this repository.
    pub fn manifest_gets(&self, repository: &str) -> usize {
        self.count("GET", &format!("/v2/{repository}/manifests/"))
    }

    /// `GET`s of this blob, in any repository.
    pub fn blob_gets(&self, digest: &str) -> usize {
        self.count("GET", &format!("/blobs/{digest}"))
    }

    /// `GET`s of any blob.
    pub fn all_blob_gets(&self) -> usize {
        self.count("GET", "/blobs/")
    }

    /// Requests to the token service.
    pub fn token_requests(&self) -> Vec<Seen> {
        self.requests()
            .into_iter()
            .filter(|seen| seen.path == "/token")
            .collect()
    }

    /// Body bytes sent.
    pub fn bytes_sent(&self) -> u64 {
        self.state(|state| state.bytes_sent)
    }

    /// Connections accepted.
    pub fn connections(&self) -> usize {
        self.state(|state| state.connections_seen)
    }

    /// Waits until the log satisfies the test.
    pub async fn until(&self, what: &str, enough: impl Fn(&[Seen]) -> bool) {
        let mut log = self.shared.log.subscribe();
        within(what, log.wait_for(|log| enough(log))).await.unwrap();
    }

    fn count(&self, method: &str, part: &str) -> usize {
        self.shared
            .log
            .borrow()
            .iter()
            .filter(|seen| seen.is(method, part))
            .count()
    }

    fn edit<T>(&self, repository: &str, change: impl FnOnce(&mut Repository) -> T) -> T {
        self.state(|state| change(state.repositories.entry(repository.to_owned()).or_default()))
    }

    fn state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        self.shared.state(change)
    }

    fn listen(&self) {
        let socket = bound(self.address);
        let listener = socket.listen(1024).unwrap();
        let task = tokio::spawn(serve::accept(listener, Arc::clone(&self.shared)));
        *self.listener.lock().unwrap() = Some(task.abort_handle());
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.lock().unwrap().take() {
            listener.abort();
        }
        self.shared.hang_up();
    }
}

impl Shared {
    fn state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    fn count_sent(&self, bytes: usize) {
        self.state(|state| state.bytes_sent += bytes as u64);
    }

    fn hang_up(&self) {
        for connection in self.state(|state| std::mem::take(&mut state.connections)) {
            connection.abort();
        }
    }
}

impl Repository {
    /// Digest, type and bytes of a reference for a client that accepts these types.
    fn manifest(&self, reference: &str, accept: &[String]) -> Option<(String, String, Bytes)> {
        let one = [reference.to_owned()];
        let digests = self.tags.get(reference).map_or(one.as_slice(), Vec::as_slice);
        let of = |digest: &String| {
            self.manifests
                .get(digest)
                .map(|(kind, bytes)| (digest.clone(), kind.clone(), bytes.clone()))
        };
        let accepted = |kind: &str| {
            accept
                .iter()
                .any(|line| line.contains(kind) || line.contains("*/*"))
        };
        match digests {
            [only] => of(only),
            several => several.iter().filter_map(of).find(|(_, kind, _)| accepted(kind)),
        }
    }

    fn keep(&mut self, image: &Image) {
        self.manifests.insert(
            image.digest.clone(),
            (image.media_type.clone(), image.manifest.clone()),
        );
        for blob in &image.blobs {
            self.blobs.insert(blob.digest.clone(), blob.bytes.clone());
        }
        if let Some((subject, kind)) = &image.attached {
            self.attached
                .push((subject.clone(), kind.clone(), image.digest.clone()));
        }
        image.children.iter().for_each(|child| self.keep(child));
    }
}

fn bound(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket
}
