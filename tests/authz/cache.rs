//! Program under test: store and proxy in this process. Response bodies are read to the end.

use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, header};
use http_body_util::{BodyExt as _, Empty};
use ifnewer::download::Downloads;
use ifnewer::oci::{Accept, Digest, Endpoint, RangeRequest, TokenRequest, UpstreamFailure};
use ifnewer::policy::rules::Rules;
use ifnewer::proxy::{
    Access, BlobBody, ProxyResponse, ProxyService, RegistryStates, Request, ServeReason, TokenOutcome,
    UpstreamCaches, UpstreamRegistry,
};
use ifnewer::queue::Peer;
use ifnewer::store::file_read::BufferPool;
use ifnewer::store::fs::{DirectoryFs, FileSystem, MemoryFs};
use ifnewer::store::{Settings as StoreSettings, Store};
use ifnewer::telemetry::Telemetry;
use ifnewer::trace_context::TraceContext;
use ifnewer::upstream::forward::ForwardRequest;
use ifnewer::upstream::{Offline, ProxyChoice, Settings, Transport, Upstream, UpstreamCredential};

use super::registry::{CLIENT, OCI_INDEX, OCI_MANIFEST, Registry, clock, now};

/// Upstream with per-client authorization.
pub const PROVEN: &str = "registry.test";
/// Upstream with shared access.
pub const SHARED: &str = "shared.test";

/// Size of the future that handles a request, at most, without optimization. It is copied to the heap for each request, so
/// what few requests need is boxed. With everything inline it had 12 KiB.
const HANDLING_BYTES_MAX: usize = 6 * 1024;

pub struct Cache {
    pub proxy: Arc<ProxyService>,
    pub proven: Arc<UpstreamRegistry>,
    pub shared: Arc<UpstreamRegistry>,
    store: Arc<Store>,
    states: Arc<RegistryStates>,
    parts: Parts,
    /// Whether clients accept indexes.
    pub takes_indexes: bool,
    /// Whether clients accept the media types that the cache's own requests do, so that both see one variant of a tag.
    pub accepts_all: bool,
    /// The whole `Accept` of clients, in place of the image type and of [`Self::takes_indexes`].
    pub accept: Option<&'static str>,
    /// The bytes of a download that clients read: from the first number up to, not including, the second.
    pub within: Option<(u64, u64)>,
    pub offline: Offline,
}

#[derive(Clone)]
struct Parts {
    /// One for all upstreams and reloads, as in the program, because creating it reads the system's certificates.
    connector: Transport,
    rules: Rules,
    disk: Disk,
    gives_tokens: bool,
}

#[derive(Clone)]
enum Disk {
    Memory(Arc<MemoryFs>),
    Given(Arc<dyn FileSystem>),
    Folder(Arc<tempfile::TempDir>),
}

/// What a client received.
#[derive(Debug)]
pub enum Got {
    /// Content with this digest; no bytes for `HEAD`.
    Content(Digest, Option<Bytes>),
    List,
    No(&'static str),
}

/// A client's request.
#[derive(Clone, Debug)]
pub struct ClientRequest {
    pub site: &'static str,
    pub path: String,
    pub head: bool,
    /// `Authorization` header; empty for none.
    pub shows: String,
}

impl Cache {
    pub fn new(registry: &Registry, rules: Rules) -> Cache {
        Cache::start(Parts {
            connector: Transport::with_dialer(registry.dial()),
            rules,
            disk: Disk::Memory(Arc::new(MemoryFs::new())),
            gives_tokens: false,
        })
    }

    /// On a file system of the test.
    pub fn over(registry: &Registry, rules: Rules, disk: &Arc<impl FileSystem>) -> Cache {
        Cache::start(Parts {
            connector: Transport::with_dialer(registry.dial()),
            rules,
            disk: Disk::Given(Arc::clone(disk) as Arc<dyn FileSystem>),
            gives_tokens: false,
        })
    }

    /// On a real folder, so that grants survive a restart.
    pub fn on_disk(registry: &Registry, rules: Rules) -> Cache {
        Cache::start(Parts {
            connector: Transport::with_dialer(registry.dial()),
            rules,
            disk: Disk::Folder(Arc::new(tempfile::tempdir().unwrap())),
            gives_tokens: false,
        })
    }

    /// On a real folder, with local tokens while the token service is unavailable.
    pub fn giving_tokens(registry: &Registry, rules: Rules) -> Cache {
        Cache::start(Parts {
            connector: Transport::with_dialer(registry.dial()),
            rules,
            disk: Disk::Folder(Arc::new(tempfile::tempdir().unwrap())),
            gives_tokens: true,
        })
    }

    fn start(parts: Parts) -> Cache {
        let fs: Arc<dyn FileSystem> = match &parts.disk {
            Disk::Memory(memory) => Arc::clone(memory) as Arc<dyn FileSystem>,
            Disk::Given(given) => Arc::clone(given),
            Disk::Folder(folder) => Arc::new(DirectoryFs::open(folder_path(folder)).unwrap()),
        };
        // On a blocking thread.
        let open = || Store::open(&StoreSettings::default(), fs, now()).unwrap();
        let store = std::thread::scope(|scope| scope.spawn(open).join().unwrap());
        let store = Arc::new(store);
        let downloads = Downloads::new(Arc::clone(&store), BufferPool::default(), 64);
        let proxy = ProxyService::new(Arc::clone(&store), downloads, (clock(), Telemetry::new()));
        Cache::with_settings(Arc::new(proxy), store, Arc::default(), parts, false)
    }

    /// New settings of `parts` over the learned state and running work. `opened`: the per-client upstream becomes
    /// shared.
    fn with_settings(
        proxy: Arc<ProxyService>,
        store: Arc<Store>,
        states: Arc<RegistryStates>,
        parts: Parts,
        opened: bool,
    ) -> Cache {
        let rules = Arc::new(parts.rules.clone());
        let offline = Offline::default();
        let site = |name: &str, is_shared: bool| {
            let mut settings = Settings::new(name, vec![format!("http://{name}").parse().unwrap()]);
            settings.proxy = ProxyChoice::None;
            settings.offline = offline.clone();
            let own = is_shared.then(|| UpstreamCredential::new("service", "service-secret"));
            settings.credential = own.map(Into::into);
            let access = if is_shared {
                Access::Shared {
                    proxy_credential: true,
                }
            } else {
                Access::PerClient
            };
            let state = states.of(name);
            let upstream = Upstream::with_state(state.upstream(), settings, &parts.connector).unwrap();
            upstream.activate();
            UpstreamRegistry::new(Arc::new(upstream), access, Arc::clone(&rules), state)
        };
        let mut proven = site(PROVEN, opened);
        let shared = Arc::new(site(SHARED, true));
        if parts.gives_tokens {
            proven = proven.with_local_tokens(format!("http://{PROVEN}/token").parse().unwrap());
        }
        let proven = Arc::new(proven);
        proxy.set_refreshed_upstreams(&[Arc::clone(&proven), Arc::clone(&shared)]);
        Cache {
            proxy,
            proven,
            shared,
            store,
            states,
            parts,
            takes_indexes: false,
            accepts_all: false,
            accept: None,
            within: None,
            offline,
        }
    }

    /// The same process with other settings, as after SIGHUP. Running requests continue with this value.
    pub fn reload(&self, rules: Rules, opened: bool) -> Cache {
        let parts = Parts {
            rules,
            ..self.parts.clone()
        };
        let (proxy, store) = (Arc::clone(&self.proxy), Arc::clone(&self.store));
        Cache::with_settings(proxy, store, Arc::clone(&self.states), parts, opened)
    }

    /// Kills the process and starts it again on the same disk. The registry has cut all connections.
    pub async fn kill(self, rules: Rules) -> Cache {
        let Cache {
            proxy, store, parts, ..
        } = self;
        drop(proxy);
        Cache::start_again(store, Parts { rules, ..parts }).await
    }

    /// Stops the process and starts it again on the same disk.
    pub async fn restart(self, rules: Rules) -> Cache {
        let Cache {
            proxy, store, parts, ..
        } = self;
        proxy.downloads().idle().await;
        drop(proxy);
        let closing = Arc::clone(&store);
        tokio::task::spawn_blocking(move || closing.close())
            .await
            .unwrap();
        Cache::start_again(store, Parts { rules, ..parts }).await
    }

    async fn start_again(store: Arc<Store>, parts: Parts) -> Cache {
        // Tasks that hold a reference end soon.
        let mut store = Some(store);
        while Arc::strong_count(store.as_ref().unwrap()) > 1 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        drop(store.take());
        Cache::start(parts)
    }

    /// `Authorization` of a client that fetched a token for the repository with this login (empty for none). `None`
    /// if the login was denied.
    pub async fn log_in(&self, account: &str, repository: &str) -> Option<String> {
        let realm = self.proven.realm().unwrap();
        let query = format!("scope=repository:{repository}:pull");
        let mut headers = HeaderMap::new();
        headers.insert(CLIENT, HeaderValue::from_static("1"));
        if !account.is_empty() {
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(account).unwrap());
        }
        let asked = TokenRequest::read(&Method::GET, &headers, Some(&query), b"");
        let passing = ForwardRequest {
            method: Method::GET,
            path_and_query: format!("/token?{query}"),
            headers,
            body: Empty::new().map_err(|never| match never {}).boxed_unsync(),
            base: String::new(),
        };
        match self
            .proxy
            .request_token(&self.proven, realm, asked, passing)
            .await
            .unwrap()
        {
            TokenOutcome::Upstream(reply) => reply.issued.map(|issued| issued.authorization.to_string()),
            TokenOutcome::Local(_, json) => {
                let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
                Some(format!("Bearer {}", json["token"].as_str().unwrap()))
            }
        }
    }

    pub async fn get(&self, client_request: &ClientRequest) -> Got {
        self.get_with_cause(client_request).await.0
    }

    /// What a client receives, and why the upstream was unavailable, if it was.
    pub async fn get_with_cause(&self, client_request: &ClientRequest) -> (Got, Option<UpstreamFailure>) {
        let method = if client_request.head {
            Method::HEAD
        } else {
            Method::GET
        };
        let mut headers = HeaderMap::new();
        let accept = self.accept.unwrap_or(OCI_MANIFEST);
        headers.append(header::ACCEPT, HeaderValue::from_static(accept));
        if self.takes_indexes {
            headers.append(header::ACCEPT, HeaderValue::from_static(OCI_INDEX));
        }
        let site = if client_request.site == SHARED {
            &self.shared
        } else {
            &self.proven
        };
        let authorization =
            (!client_request.shows.is_empty()).then(|| HeaderValue::from_str(&client_request.shows).unwrap());
        let endpoint = Endpoint::parse(&method, &client_request.path, None).unwrap();
        let mut request = Request {
            writes: endpoint
                .repository()
                .map(|repository| site.writes(repository))
                .unwrap_or_default(),
            registry: Arc::clone(site),
            endpoint,
            head: client_request.head,
            accept: if self.accepts_all {
                Accept::manifests()
            } else {
                Accept::read(&headers).unwrap()
            },
            authorization,
            host: None,
            now: now(),
            since: tokio::time::Instant::now(),
            for_push: false,
            trace: TraceContext::new_root(),
            peer: Peer::Local,
            range: RangeRequest::None,
            needs_length: false,
            upstream_caches: UpstreamCaches::default(),
        };
        let handling = self.proxy.handle(&mut request);
        assert!(
            size_of_val(&handling) <= HANDLING_BYTES_MAX,
            "the future of each request has {} bytes",
            size_of_val(&handling)
        );
        let outcome = handling.await;
        let cause = match &outcome {
            ProxyResponse::Manifest(_, info)
            | ProxyResponse::Blob { info, .. }
            | ProxyResponse::Listing(_, info)
            | ProxyResponse::StreamedList(_, info) => match info.reason {
                ServeReason::Cached(served) => served.cause(),
                _ => None,
            },
            _ => None,
        };
        let got = match outcome {
            ProxyResponse::Manifest(manifest, _) => Got::Content(
                manifest.digest,
                (!client_request.head).then(|| manifest.bytes.clone()),
            ),
            ProxyResponse::ManifestHead { digest, .. } => Got::Content(digest, None),
            ProxyResponse::Blob { digest, content, .. } => match read_body(content, self.within).await {
                Ok(bytes) => Got::Content(digest, bytes),
                Err(why) => Got::No(why),
            },
            ProxyResponse::Listing(..) => Got::List,
            ProxyResponse::Denied(refused) => Got::No(refused.reason.name()),
            _ => panic!("unexpected kind of response"),
        };
        (got, cause)
    }
}

async fn read_body(content: BlobBody, within: Option<(u64, u64)>) -> Result<Option<Bytes>, &'static str> {
    let mut bytes = BytesMut::new();
    match content {
        // No shared storage is configured, so none is a redirect.
        BlobBody::Head | BlobBody::Redirect(_) => return Ok(None),
        BlobBody::Memory(held) => return Ok(Some(held)),
        BlobBody::File(held) => {
            bytes.resize(usize::try_from(held.size).unwrap(), 0);
            let mut at = 0;
            while at < bytes.len() {
                at += held.file.read_at(&mut bytes[at..], at as u64).unwrap();
            }
        }
        BlobBody::Download(reader) => {
            let mut reader = *reader;
            if let Some((start, end)) = within {
                reader = reader.within(start, end);
            }
            while let Some(chunk) = reader.next().await {
                bytes.extend_from_slice(&chunk.map_err(|_| "broken")?);
            }
        }
        BlobBody::Passthrough(mut passing) => {
            while let Some(chunk) = passing.next().await {
                bytes.extend_from_slice(&chunk.map_err(|_| "broken")?);
            }
        }
    }
    Ok(Some(bytes.freeze()))
}

fn folder_path(folder: &tempfile::TempDir) -> &Path {
    folder.path()
}
