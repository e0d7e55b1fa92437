//! Pull-through request handling: collect the [`CacheState`](crate::policy::CacheState), call [`decide`](crate::policy::decide),
//! execute the decision.
//!
//! Every function here works on one repository of one upstream. Routing has already chosen the upstream, and the
//! server later turns the [`ProxyResponse`] into HTTP. This module collects evidence; `policy` evaluates it.
//!
//! * `pipeline`: the steps of a read. `manifest`, `blob`, `listing`, `referrers`: those of each kind of resource.
//! * `revalidate`: the coalesced `HEAD` to the upstream and the state recorded from its response.
//! * `cooling`: ages of a tag's digests, and older images, for `min_age`. `storage_age`: their age by `Last-Modified`.
//!   `digest_age`: age of a manifest requested by digest.
//! * `evidence`: cached manifests that may be served; a read error is logged and counts as a miss.
//! * `manifest_fetch`: manifest `GET`, verification and storage. `source`: the upstream as a download source.
//!   `layer_probe`: availability of missing layers.
//! * `shared_read`: which requests may read the shared storage. `shared_records`: records there, written and read.
//! * `grants`: grants and denials from upstream responses. `possession`: proof by bytes where a `HEAD` proves
//!   nothing. `local_tokens`: tokens issued while the token service is unavailable.
//! * `api_challenge`: the registry's `/v2/` challenge. `challenge_template`: the 401 returned in an outage.
//! * `write_effect`, `invalidation`: cached content that a push or a deletion changes.
//! * `prefetch`, `attestations`: downloads started before a client requests them. `refresh`: revalidation requested
//!   by the operator; `scheduled_refresh`: revalidation in the background.
//! * `passthrough`: responses that are never stored. `streamed_list`, `list_page`, `list_name`: long, derived and
//!   renamed tag lists.
//! * `registry`: settings and learned state of one upstream. `concurrency`: detached tasks and locks by key.

mod api_challenge;
mod attestations;
mod blob;
mod challenge_template;
mod concurrency;
mod cooling;
mod deadline;
mod digest_age;
mod evidence;
mod grants;
pub mod invalidation;
mod layer_probe;
mod list_name;
mod list_page;
mod listing;
mod local_tokens;
mod manifest;
mod manifest_fetch;
pub mod passthrough;
mod pipeline;
mod possession;
mod prefetch;
mod referrers;
mod refresh;
mod registry;
mod revalidate;
mod scheduled_refresh;
mod shared_read;
mod shared_records;
mod source;
mod storage_age;
mod streamed_list;
mod write_effect;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::HeaderValue;
use http::uri::Authority;

pub use listing::Listing;
pub use local_tokens::{TokenOutcome, is_local_token};
pub use refresh::Refreshed;
pub use registry::{Access, RegistryState, RegistryStates, UpstreamRegistry};
pub use revalidate::Revalidated;
pub use scheduled_refresh::{
    RUNS_PER_MINUTE_MAX, RefreshPause, RefreshResult, RefreshStatus, TAGS_PER_MINUTE_MAX, TagRefresh,
    TagRefreshState,
};
pub use shared_records::RecordedImage;
pub use streamed_list::StreamedList;

use crate::clock::Clock;
use crate::download::{Downloads, Reader};
use crate::oci::{Accept, CacheHeaders, Digest, Endpoint, MediaType, RangeRequest, Reference, Tag};
use crate::policy::min_age::YoungDigest;
use crate::policy::{DenyReason, HitReason, MissReason};
use crate::queue::Peer;
use crate::shared::SharedStorage;
use crate::single_flight::SingleFlight;
use crate::store::blobs::BlobHandle;
use crate::store::challenges::StoredChallenge;
use crate::store::manifests::StoredManifest;
use crate::store::verdicts::VerdictNote;
use crate::store::{AsyncStore, LogLimit, Store, StoreError};
use crate::telemetry::Telemetry;
use crate::trace_context::TraceContext;
use crate::upstream::UpstreamResponse;

/// Longest wait for a rate limit to reset, for a client that has no cached fallback. Dockerd and containerd give up
/// on a response after 30 s, and the request after the wait needs part of that time.
const RATE_LIMIT_WAIT_MAX: Duration = Duration::from_secs(20);

/// The pull-through handler: store, downloads, learned state and coalesced requests. The process has one; a reload
/// replaces only the [`UpstreamRegistry`] values.
pub struct ProxyService {
    store: AsyncStore,
    downloads: Downloads,
    shared: Arc<SharedStorage>,
    clock: Clock,
    telemetry: Telemetry,
    principals: registry::Principals,
    size_hints: manifest_fetch::SizeHints,
    storage_ages: storage_age::StorageAges,
    cooled_tags: cooling::CooledTags,
    gone_digests: cooling::GoneDigests,
    served_from: digest_age::ServedFrom,
    active_downloads: possession::ActiveDownloads,
    lacking: shared_read::Lacking,
    confirming: shared_read::Confirming,
    probed_images: layer_probe::ProbedImages,
    prefetching: prefetch::Prefetching,
    scheduled: scheduled_refresh::ScheduledRefresh,
    copy_permits: streamed_list::CopyPermits,
    attestations: attestations::Attestations,
    confirmed_referrers: referrers::ConfirmedReferrers,
    denials: grants::RecentDenials,
    noted_content: shared_records::NotedContent,
    tag_record_uses: shared_records::TagRecordUses,
    local_tokens: local_tokens::LocalTokens,
    revalidations: SingleFlight<manifest_fetch::CoalesceKey, Arc<UpstreamResponse>>,
    /// The flag says whether the response is stored. It is part of the key, because the same caller may obtain a
    /// grant between two requests.
    lists: SingleFlight<(manifest_fetch::CoalesceKey, bool), listing::ListResult>,
    tag_lists: SingleFlight<(manifest_fetch::CoalesceKey, bool), listing::SharedList>,
    unreadable: LogLimit,
    challenges:
        SingleFlight<api_challenge::ChallengeKey, Result<Arc<StoredChallenge>, Arc<UpstreamResponse>>>,
    manifests: SingleFlight<manifest_fetch::CoalesceKey, manifest_fetch::FetchedManifest>,
}

/// A parsed read request, independent of how it was routed.
pub struct Request {
    /// The upstream that serves it.
    pub registry: Arc<UpstreamRegistry>,
    /// The endpoint and its parameters.
    pub endpoint: Endpoint,
    /// Whether the method is `HEAD`.
    pub head: bool,
    /// The media types of the `Accept` header.
    pub accept: Accept,
    /// The client's `Authorization` header, if present and not empty.
    pub authorization: Option<HeaderValue>,
    /// The host and port by which the client addressed the cache, if it stated them.
    pub host: Option<Authority>,
    /// Arrival time.
    pub now: SystemTime,
    /// The same time by the monotonic clock. A response of the upstream to this request is not older.
    pub since: tokio::time::Instant,
    /// Writes seen in the repository at arrival ([`UpstreamRegistry::writes`]).
    pub writes: invalidation::WriteSnapshot,
    /// Whether a success may make the client skip an upload, so that the registry itself must confirm it.
    pub for_push: bool,
    /// Trace context.
    pub trace: TraceContext,
    /// Client connection.
    pub peer: Peer,
    /// Requested byte range of a blob.
    pub range: RangeRequest,
    /// Whether the client cannot detect a truncated body without a length, as in HTTP/1.0.
    pub needs_length: bool,
    /// What caches between the registry and this one say about the response, as far as it is known.
    pub upstream_caches: UpstreamCaches,
}

/// `Cache-Status` and age of the upstream's response to a request, if the upstream is a cache itself. The first response
/// counts: the one that named the digest. Clones share the value.
#[derive(Clone, Debug, Default)]
pub struct UpstreamCaches(Arc<OnceLock<CacheHeaders>>);

impl UpstreamCaches {
    fn record(&self, caches: Option<&CacheHeaders>) {
        if let Some(caches) = caches {
            self.0.get_or_init(|| caches.clone());
        }
    }

    /// What the upstream said, if it has responded.
    pub fn get(&self) -> Option<&CacheHeaders> {
        self.0.get()
    }
}

impl Request {
    /// The requested tag, if the request is by tag.
    pub(super) fn tag(&self) -> Option<&Tag> {
        match &self.endpoint {
            Endpoint::Manifest {
                reference: Reference::Tag(tag),
                ..
            } => Some(tag),
            _ => None,
        }
    }
}

/// Response of the proxy before its HTTP encoding.
pub enum ProxyResponse {
    /// `GET /v2/` with status 200.
    Ping,
    /// `GET /v2/` with status 401 and these `WWW-Authenticate` values.
    Challenged(Vec<HeaderValue>),
    /// A manifest with its bytes.
    Manifest(Arc<StoredManifest>, ServeInfo),
    /// Headers of a manifest that is not cached, from the upstream.
    ManifestHead {
        /// Digest of the manifest.
        digest: Digest,
        /// Its media type.
        media_type: MediaType,
        /// Its size in bytes.
        size: u64,
    },
    /// A blob.
    Blob {
        /// Digest of the blob.
        digest: Digest,
        /// Its size in bytes; unknown only during a fetch from an upstream that states no length.
        size: Option<u64>,
        /// Source of its bytes.
        content: BlobBody,
        /// Reason and confirmation time.
        info: ServeInfo,
    },
    /// A list of tags or referrers.
    Listing(Listing, ServeInfo),
    /// A list of tags, streamed as it arrives.
    StreamedList(Box<StreamedList>, ServeInfo),
    /// Content that is never stored, forwarded as it arrives.
    Passthrough(passthrough::Passthrough),
    /// A denial or an error.
    Denied(Denied),
}

/// Source of the bytes of a blob.
pub enum BlobBody {
    /// None: the method is `HEAD`.
    Head,
    /// Memory.
    Memory(Bytes),
    /// The blob's file.
    File(BlobHandle),
    /// A running download.
    Download(Box<Reader>),
    /// The shared storage, at this URL.
    Redirect(HeaderValue),
    /// The upstream, because the disk cannot store the blob.
    Passthrough(Box<passthrough::VerifyingStream>),
}

/// Reason for a served response, and its age.
#[derive(Clone, Copy, Debug)]
pub struct ServeInfo {
    /// The reason.
    pub reason: ServeReason,
    /// When the upstream last confirmed the tag; `None` for a request by digest.
    pub confirmed_at: Option<SystemTime>,
}

/// Cache result of a served response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServeReason {
    /// Served from the store.
    Cached(HitReason),
    /// Fetched from the upstream for this client.
    Fetched(MissReason),
    /// Read from the shared storage for this client.
    Shared,
    /// Left to the shared storage, to which the client is redirected.
    Redirected,
    /// Joined a download that another client started.
    Collapsed,
    /// Forwarded from the upstream and not stored.
    Passthrough,
}

impl ServeReason {
    /// Name in the log, the metrics and `Cache-Status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cached(served) => served.name(),
            Self::Fetched(why) => why.name(),
            Self::Shared => "shared",
            Self::Redirected => "redirected",
            Self::Collapsed => "collapsed",
            Self::Passthrough => "passthrough",
        }
    }

    /// The digest that the tag names and that is too young, if an older one is served instead.
    pub fn youth(self) -> Option<YoungDigest> {
        match self {
            Self::Cached(served) => served.youth(),
            Self::Fetched(why) => why.youth(),
            Self::Shared | Self::Redirected | Self::Collapsed | Self::Passthrough => None,
        }
    }
}

/// A denied request, with the upstream response that caused it.
#[derive(Debug)]
pub struct Denied {
    /// Reason.
    pub reason: DenyReason,
    /// Upstream response, if the upstream was contacted.
    pub response: Option<Arc<UpstreamResponse>>,
    /// Whether the upstream rejected the proxy's own credential.
    pub proxy_credential: bool,
    /// Who blocked the digest, for [`DenyReason::Blocked`]. `None` if the block was taken back in the meantime.
    pub block: Option<Arc<VerdictNote>>,
}

impl ProxyService {
    /// A service over `store`, whose install secret keys the principals.
    pub fn new(store: Arc<Store>, downloads: Downloads, (clock, telemetry): (Clock, Telemetry)) -> Self {
        let principals = registry::Principals::new(*store.install_secret());
        let store = AsyncStore::new(store);
        Self {
            shared: Arc::new(SharedStorage::new(store.clone(), telemetry.clone())),
            store,
            downloads,
            clock,
            telemetry,
            principals,
            size_hints: manifest_fetch::SizeHints::default(),
            storage_ages: storage_age::StorageAges::default(),
            cooled_tags: cooling::CooledTags::default(),
            gone_digests: cooling::GoneDigests::default(),
            served_from: digest_age::ServedFrom::default(),
            active_downloads: possession::ActiveDownloads::default(),
            lacking: shared_read::Lacking::default(),
            confirming: shared_read::Confirming::default(),
            probed_images: layer_probe::ProbedImages::default(),
            prefetching: prefetch::Prefetching::default(),
            scheduled: scheduled_refresh::ScheduledRefresh::default(),
            copy_permits: streamed_list::CopyPermits::default(),
            attestations: attestations::Attestations::default(),
            confirmed_referrers: referrers::ConfirmedReferrers::default(),
            denials: grants::RecentDenials::default(),
            noted_content: shared_records::NotedContent::default(),
            tag_record_uses: shared_records::TagRecordUses::default(),
            local_tokens: local_tokens::LocalTokens::default(),
            revalidations: SingleFlight::default(),
            lists: SingleFlight::default(),
            tag_lists: SingleFlight::default(),
            unreadable: LogLimit::default(),
            challenges: SingleFlight::default(),
            manifests: SingleFlight::default(),
        }
    }

    /// The store, for callers outside the request path.
    pub fn store(&self) -> &AsyncStore {
        &self.store
    }

    /// Running downloads.
    pub fn downloads(&self) -> &Downloads {
        &self.downloads
    }
}

/// Logs a failed store write. The request continues, because a lost write costs only a later upstream request.
fn log_store_error<T>(done: Result<T, StoreError>, action: &str) {
    if let Err(fault) = done {
        tracing::warn!(%fault, "failed to {action}");
    }
}
