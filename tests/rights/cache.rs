//! The program under test: store and road in this process. What a client gets is read to its last byte.

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
    UpstreamRegistry,
};
use ifnewer::queue::Peer;
use ifnewer::store::file_read::BufferPool;
use ifnewer::store::fs::{DirectoryFs, FileSystem, MemoryFs};
use ifnewer::store::{Settings as StoreSettings, Store};
use ifnewer::telemetry::Telemetry;
use ifnewer::trace_context::TraceContext;
use ifnewer::upstream::forward::ForwardRequest;
use ifnewer::upstream::{ProxyChoice, Settings, Transport, Upstream, UpstreamCredential};

use super::registry::{CLIENT, OCI_MANIFEST, Registry, clock, now};

/// The site where each client needs a right of its own.
pub const PROVEN: &str = "registry.test";
/// The site where whoever reaches us is entitled.
pub const SHARED: &str = "shared.test";

pub struct Cache {
    pub pull: Arc<ProxyService>,
    pub proven: Arc<UpstreamRegistry>,
    pub shared: Arc<UpstreamRegistry>,
    store: Arc<Store>,
    states: Arc<RegistryStates>,
    parts: Parts,
}

#[derive(Clone)]
struct Parts {
    /// As in the program, one for all upstreams and reloads: to make it reads the system's certificates.
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

/// What a client got.
#[derive(Debug)]
pub enum Got {
    /// Content of this digest; of a HEAD without bytes.
    Content(Digest, Option<Bytes>),
    List,
    No(&'static str),
}

/// What a client asks for.
#[derive(Clone, Debug)]
pub struct Wish {
    pub site: &'static str,
    pub path: String,
    pub head: bool,
    /// The `Authorization` it shows; empty for none.
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

    /// On a disk of the test's own.
    pub fn over(registry: &Registry, rules: Rules, disk: &Arc<impl FileSystem>) -> Cache {
        Cache::start(Parts {
            connector: Transport::with_dialer(registry.dial()),
            rules,
            disk: Disk::Given(Arc::clone(disk) as Arc<dyn FileSystem>),
            gives_tokens: false,
        })
    }

    /// On a real folder, where grants outlive a restart.
    pub fn on_disk(registry: &Registry, rules: Rules) -> Cache {
        Cache::start(Parts {
            connector: Transport::with_dialer(registry.dial()),
            rules,
            disk: Disk::Folder(Arc::new(tempfile::tempdir().unwrap())),
            gives_tokens: false,
        })
    }

    /// On a real folder, with tokens of ours while the token service is silent.
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
        // On a thread that may block.
        let open = || Store::open(&StoreSettings::default(), fs, now()).unwrap();
        let store = std::thread::scope(|scope| scope.spawn(open).join().unwrap());
        let store = Arc::new(store);
        let downloads = Downloads::new(Arc::clone(&store), BufferPool::default(), 64);
        let pull = ProxyService::new(Arc::clone(&store), downloads, (clock(), Telemetry::new()));
        Cache::with_settings(Arc::new(pull), store, Arc::default(), parts, false)
    }

    /// The settings of `parts` over what is learned and under way. `opened`: whoever reaches the proven site is entitled.
    fn with_settings(
        pull: Arc<ProxyService>,
        store: Arc<Store>,
        states: Arc<RegistryStates>,
        parts: Parts,
        opened: bool,
    ) -> Cache {
        let rules = Arc::new(parts.rules.clone());
        let site = |name: &str, is_shared: bool| {
            let mut settings = Settings::new(name, vec![format!("http://{name}").parse().unwrap()]);
            settings.proxy = ProxyChoice::None;
            let own = is_shared.then(|| UpstreamCredential::new("service", "service-secret"));
            settings.credential = own.map(Into::into);
            let access = if is_shared {
                Access::Shared { own_credential: true }
            } else {
                Access::PerClient
            };
            let state = states.of(name);
            let upstream = Upstream::with_state(state.upstream(), settings, &parts.connector).unwrap();
            upstream.activate();
            UpstreamRegistry::new(Arc::new(upstream), access, Arc::clone(&rules), state)
        };
        let mut proven = site(PROVEN, opened);
        if parts.gives_tokens {
            proven = proven.with_local_tokens(format!("http://{PROVEN}/token").parse().unwrap());
        }
        Cache {
            pull,
            proven: Arc::new(proven),
            shared: Arc::new(site(SHARED, true)),
            store,
            states,
            parts,
        }
    }

    /// The same process with other settings, as after SIGHUP. Requests under way go on with this one.
    pub fn reload(&self, rules: Rules, opened: bool) -> Cache {
        let parts = Parts {
            rules,
            ..self.parts.clone()
        };
        let (pull, store) = (Arc::clone(&self.pull), Arc::clone(&self.store));
        Cache::with_settings(pull, store, Arc::clone(&self.states), parts, opened)
    }

    /// Ends without an orderly close, and starts again on the same disk. The registry has cut all connections.
    pub async fn kill(self, rules: Rules) -> Cache {
        let Cache {
            pull, store, parts, ..
        } = self;
        drop(pull);
        Cache::start_again(store, Parts { rules, ..parts }).await
    }

    /// Ends, and starts again on the same disk.
    pub async fn restart(self, rules: Rules) -> Cache {
        let Cache {
            pull, store, parts, ..
        } = self;
        pull.downloads().idle().await;
        drop(pull);
        let closing = Arc::clone(&store);
        tokio::task::spawn_blocking(move || closing.close())
            .await
            .unwrap();
        Cache::start_again(store, Parts { rules, ..parts }).await
    }

    async fn start_again(store: Arc<Store>, parts: Parts) -> Cache {
        // Tasks that still hold it end with their turn.
        let mut store = Some(store);
        while Arc::strong_count(store.as_ref().unwrap()) > 1 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        drop(store.take());
        Cache::start(parts)
    }

    /// What a client that fetched a token with this `Authorization` (empty for none) for a repository shows then. `None`
    /// if it is refused.
    pub async fn log_in(&self, account: &str, repository: &str) -> Option<String> {
        let realm = self.proven.realm().unwrap();
        let query = format!("scope=repository:{repository}:pull");
        let mut headers = HeaderMap::new();
        headers.insert(CLIENT, HeaderValue::from_static("1"));
        if !account.is_empty() {
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(account).unwrap());
        }
        let asked = TokenRequest::read(headers.get(header::AUTHORIZATION), Some(&query), b"");
        let passing = ForwardRequest {
            method: Method::GET,
            path_and_query: format!("/token?{query}"),
            headers,
            body: Empty::new().map_err(|never| match never {}).boxed_unsync(),
            base: String::new(),
        };
        match self
            .pull
            .log_in(&self.proven, realm, asked, passing)
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

    pub async fn get(&self, wish: &Wish) -> Got {
        self.get_with_cause(wish).await.0
    }

    /// What a client gets, and why the upstream was not asked, or gave no usable answer, where that is the reason.
    pub async fn get_with_cause(&self, wish: &Wish) -> (Got, Option<UpstreamFailure>) {
        let method = if wish.head { Method::HEAD } else { Method::GET };
        let mut headers = HeaderMap::new();
        headers.append(header::ACCEPT, HeaderValue::from_static(OCI_MANIFEST));
        let site = if wish.site == SHARED {
            &self.shared
        } else {
            &self.proven
        };
        let authorization = (!wish.shows.is_empty()).then(|| HeaderValue::from_str(&wish.shows).unwrap());
        let endpoint = Endpoint::parse(&method, &wish.path, None).unwrap();
        let request = Request {
            writes: endpoint
                .repository()
                .map(|repository| site.writes(repository))
                .unwrap_or_default(),
            site: Arc::clone(site),
            endpoint,
            head: wish.head,
            accept: Accept::read(&headers).unwrap(),
            authorization,
            now: now(),
            for_push: false,
            trace: TraceContext::new_root(),
            peer: Peer::Local,
            range: RangeRequest::None,
            needs_length: false,
        };
        let outcome = self.pull.answer(request).await;
        let cause = match &outcome {
            ProxyResponse::Manifest(_, how)
            | ProxyResponse::Blob { how, .. }
            | ProxyResponse::Listing(_, how)
            | ProxyResponse::StreamedList(_, how) => match how.reason {
                ServeReason::Cached(served) => served.cause(),
                _ => None,
            },
            _ => None,
        };
        let got = match outcome {
            ProxyResponse::Manifest(manifest, _) => {
                Got::Content(manifest.digest, (!wish.head).then(|| manifest.bytes.clone()))
            }
            ProxyResponse::ManifestHead { digest, .. } => Got::Content(digest, None),
            ProxyResponse::Blob { digest, content, .. } => match whole(content).await {
                Ok(bytes) => Got::Content(digest, bytes),
                Err(why) => Got::No(why),
            },
            ProxyResponse::Listing(..) => Got::List,
            ProxyResponse::Denied(refused) => Got::No(refused.refusal.name()),
            _ => panic!("an outcome of another kind"),
        };
        (got, cause)
    }
}

async fn whole(content: BlobBody) -> Result<Option<Bytes>, &'static str> {
    let mut bytes = BytesMut::new();
    match content {
        BlobBody::Head => return Ok(None),
        BlobBody::Memory(held) => return Ok(Some(held)),
        BlobBody::File(held) => {
            bytes.resize(usize::try_from(held.size).unwrap(), 0);
            let mut at = 0;
            while at < bytes.len() {
                at += held.file.read_at(&mut bytes[at..], at as u64).unwrap();
            }
        }
        BlobBody::Download(mut reader) => {
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
