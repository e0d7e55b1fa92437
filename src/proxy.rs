//! Pull-through request handling: collect the [`CacheState`], call [`decide`], execute the decision.
//!
//! Every function here works on one repository of one upstream. Routing has already chosen the upstream, and the
//! server later turns the [`ProxyResponse`] into HTTP. This module collects evidence; `policy` evaluates it.
//!
//! * `manifest`, `blob`, `listing`, `referrers`: one pipeline for each kind of resource.
//! * `revalidate`: the coalesced `HEAD` to the upstream and the state recorded from its response.
//! * `cooling`: ages of a tag's digests, and older images, for `min_age`. `storage_age`: their age by `Last-Modified`.
//!   `digest_age`: age of a manifest requested by digest.
//! * `candidates`: cached manifests that may answer a tag. `cache_view`: store reads; a read error is logged and
//!   counts as a miss.
//! * `manifest_fetch`: manifest `GET`, verification and storage. `source`: the upstream as a download source.
//!   `layer_probe`: availability of missing layers.
//! * `grants`: grants and denials from upstream responses. `possession`: proof by bytes where a `HEAD` proves
//!   nothing. `local_tokens`: tokens issued while the token service is unavailable.
//! * `api_challenge`: the registry's `/v2/` challenge. `challenge_template`: the 401 returned in an outage.
//! * `write_effect`, `invalidation`: cached content that a push or a deletion changes.
//! * `blocks`: refuses digests that the operator blocked, whatever the way they were obtained.
//! * `prefetch`, `attestations`: downloads started before a client requests them. `refresh`: revalidation requested
//!   by the operator; `scheduled_refresh`: revalidation in the background.
//! * `passthrough`: responses that are never stored. `streamed_list`, `list_page`, `list_name`: long, derived and
//!   renamed tag lists.
//! * `registry`: settings and learned state of one upstream. `concurrency`: detached tasks and locks by key.

mod api_challenge;
mod attestations;
mod blob;
mod blocks;
mod cache_view;
mod candidates;
mod challenge_template;
mod concurrency;
mod cooling;
mod digest_age;
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
mod possession;
mod prefetch;
mod referrers;
mod refresh;
mod registry;
mod revalidate;
mod scheduled_refresh;
mod source;
mod storage_age;
mod streamed_list;
mod write_effect;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::HeaderValue;
use tokio::time::Instant;

pub use listing::Listing;
pub use local_tokens::{TokenOutcome, is_local_token};
pub use refresh::Refreshed;
pub use registry::{Access, RegistryState, RegistryStates, UpstreamRegistry};
pub use revalidate::Revalidated;
pub use scheduled_refresh::{
    RUNS_PER_MINUTE_MAX, RefreshPause, RefreshResult, RefreshStatus, TAGS_PER_MINUTE_MAX, TagRefresh,
    TagRefreshState,
};
pub use streamed_list::StreamedList;

use crate::clock::Clock;
use crate::download::{Downloads, Reader};
use crate::oci::{Accept, CacheHeaders, Digest, Endpoint, MediaType, RangeRequest, Reference, Repository};
use crate::policy::authz::GrantEvidence;
use crate::policy::min_age::YoungDigest;
use crate::policy::rules::EffectivePolicy;
use crate::policy::{CacheState, Decision, DenyReason, HitReason, MissReason, decide};
use crate::queue::Peer;
use crate::single_flight::SingleFlight;
use crate::store::access_times::ContentId;
use crate::store::blobs::BlobHandle;
use crate::store::challenges::StoredChallenge;
use crate::store::manifests::StoredManifest;
use crate::store::verdicts::VerdictNote;
use crate::store::{AsyncStore, LogLimit, Store};
use crate::telemetry::Telemetry;
use crate::trace_context::TraceContext;
use crate::upstream::{Caller, UpstreamResponse};

/// Longest wait for a rate limit to reset, for a client that has no cached fallback. Dockerd and containerd give up
/// on a response after 30 s, and the request after the wait needs part of that time.
const RATE_LIMIT_WAIT_MAX: Duration = Duration::from_secs(20);

/// The pull-through handler: store, downloads, learned state and coalesced requests. The process has one; a reload
/// replaces only the [`UpstreamRegistry`] values.
pub struct ProxyService {
    store: AsyncStore,
    downloads: Downloads,
    clock: Clock,
    telemetry: Telemetry,
    principals: registry::Principals,
    size_hints: manifest_fetch::SizeHints,
    storage_ages: storage_age::StorageAges,
    cooled_tags: cooling::CooledTags,
    gone_digests: cooling::GoneDigests,
    served_from: digest_age::ServedFrom,
    active_downloads: possession::ActiveDownloads,
    probed_images: layer_probe::ProbedImages,
    prefetching: prefetch::Prefetching,
    scheduled: scheduled_refresh::ScheduledRefresh,
    copy_permits: streamed_list::CopyPermits,
    attestations: attestations::Attestations,
    confirmed_referrers: referrers::ConfirmedReferrers,
    denials: grants::RecentDenials,
    local_tokens: local_tokens::LocalTokens,
    revalidations: SingleFlight<manifest_fetch::CoalesceKey, Arc<UpstreamResponse>>,
    /// The flag says whether the response is stored. It is part of the key, because the same caller may obtain a
    /// grant between two requests.
    lists: SingleFlight<(manifest_fetch::CoalesceKey, bool), listing::ListResult>,
    tag_lists: SingleFlight<(manifest_fetch::CoalesceKey, bool), listing::SharedList>,
    unreadable: LogLimit,
    challenges:
        SingleFlight<api_challenge::ChallengeKey, Result<Arc<StoredChallenge>, Arc<UpstreamResponse>>>,
    manifests: SingleFlight<manifest_fetch::CoalesceKey, Result<Arc<StoredManifest>, Arc<UpstreamResponse>>>,
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
    /// Arrival time.
    pub now: SystemTime,
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
    Download(Reader),
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
            Self::Collapsed => "collapsed",
            Self::Passthrough => "passthrough",
        }
    }

    /// The digest that the tag names and that is too young, if an older one is served instead.
    pub fn youth(self) -> Option<YoungDigest> {
        match self {
            Self::Cached(served) => served.youth(),
            Self::Fetched(why) => why.youth(),
            Self::Collapsed | Self::Passthrough => None,
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
        Self {
            store: AsyncStore::new(store),
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
            probed_images: layer_probe::ProbedImages::default(),
            prefetching: prefetch::Prefetching::default(),
            scheduled: scheduled_refresh::ScheduledRefresh::default(),
            copy_permits: streamed_list::CopyPermits::default(),
            attestations: attestations::Attestations::default(),
            confirmed_referrers: referrers::ConfirmedReferrers::default(),
            denials: grants::RecentDenials::default(),
            local_tokens: local_tokens::LocalTokens::default(),
            revalidations: SingleFlight::default(),
            lists: SingleFlight::default(),
            tag_lists: SingleFlight::default(),
            unreadable: LogLimit::default(),
            challenges: SingleFlight::default(),
            manifests: SingleFlight::default(),
        }
    }

    /// Handles a request. Every failure becomes a [`Denied`] with its reason.
    pub async fn handle(self: &Arc<Self>, mut request: Request) -> ProxyResponse {
        let now = request.now;
        request
            .authorization
            .take_if(|shown| self.is_expired_local_token(&request.registry, shown));
        let outcome = self.dispatch(&request).await;
        let outcome = self.refuse_blocked(&request, outcome);
        self.record_served_from(&request, &outcome);
        match &outcome {
            ProxyResponse::Manifest(manifest, _) => {
                self.store.touch(ContentId::Manifest(manifest.digest), now);
                self.on_manifest_served(&request, manifest).await;
            }
            ProxyResponse::Blob { digest, .. } => {
                self.store.touch(ContentId::Blob(*digest), now);
                self.on_blob_served(&request, *digest);
            }
            _ => {}
        }
        self.challenge_instead_of_error(&request, outcome).await
    }

    async fn dispatch(self: &Arc<Self>, request: &Request) -> ProxyResponse {
        match request.endpoint.clone() {
            Endpoint::Ping => ProxyResponse::Ping,
            Endpoint::Manifest {
                repository,
                reference,
            } => self.manifest(request, &repository, reference).await,
            Endpoint::Blob { repository, digest } => self.blob(request, &repository, digest).await,
            Endpoint::Tags { repository, .. } => self.listing(request, &repository).await,
            Endpoint::Referrers {
                repository,
                digest,
                query,
            } => Box::pin(self.referrers(request, &repository, &digest, &query)).await,
        }
    }

    /// The decision that a client with this `Authorization` would get now, without any upstream request (`ifnewer
    /// why`), and whether the cached image is complete.
    pub async fn explain(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        reference: &Reference,
        authorization: Option<&HeaderValue>,
        now: SystemTime,
    ) -> (CacheState, Decision, Arc<str>, bool) {
        let tag = match reference {
            Reference::Tag(tag) => Some(tag),
            Reference::Digest(_) => None,
        };
        let rule = registry.rule(repository, tag);
        let reason = (Peer::Local, &TraceContext::new_root());
        let context = self.context_of(registry, repository, authorization, reason).await;
        let (state, is_complete) = match reference {
            Reference::Tag(tag) => {
                let what = (tag, None);
                let (candidates, cooling) = self.tag_facts(registry, repository, what, rule, now).await;
                let cooling = match cooling {
                    Some(cooling) => Some(crate::policy::AgeFacts {
                        named: self.last_named(registry, repository, tag, rule, now).await,
                        ..cooling
                    }),
                    None => None,
                };
                let entry = candidates.as_ref().map(candidates::Candidates::entry);
                let is_complete = match &candidates {
                    // It counts as incomplete in the decision, so that it is not served.
                    Some(found) if found.is_blocked => {
                        self.is_complete(registry, repository, &found.newest.manifest)
                            .await
                    }
                    _ => entry.is_some_and(|entry| entry.is_complete()),
                };
                let state = context
                    .state(rule, crate::policy::ContentKind::Tag, entry, true, now)
                    .with_blocked(candidates.and_then(|candidates| candidates.blocked()))
                    .with_cooling(cooling);
                (state, is_complete)
            }
            Reference::Digest(digest) => {
                let what = (&context, rule);
                let state = self.digest_state(registry, what, repository, digest, now).await;
                (state, state.cached.is_some_and(|entry| entry.is_complete()))
            }
        };
        (state, decide(&state), Arc::clone(&rule.name), is_complete)
    }

    /// The store, for callers outside the request path.
    pub fn store(&self) -> &AsyncStore {
        &self.store
    }

    /// Running downloads.
    pub fn downloads(&self) -> &Downloads {
        &self.downloads
    }

    /// Caller of the request and the evidence of its authorization in the repository.
    async fn context(self: &Arc<Self>, request: &Request, repository: &Repository) -> AuthContext {
        self.context_of(
            &request.registry,
            repository,
            request.authorization.as_ref(),
            (request.peer, &request.trace),
        )
        .await
    }

    async fn context_of(
        self: &Arc<Self>,
        registry: &Arc<UpstreamRegistry>,
        repository: &Repository,
        authorization: Option<&HeaderValue>,
        reason: (Peer, &TraceContext),
    ) -> AuthContext {
        let caller = self.caller_of(registry, authorization, reason);
        let account = self.account(registry, repository, authorization);
        let evidence = self
            .evidence(registry, repository, caller.principal, account)
            .await;
        AuthContext { caller, evidence }
    }

    /// Caller of the request.
    fn caller(&self, request: &Request) -> Caller {
        let reason = (request.peer, &request.trace);
        self.caller_of(&request.registry, request.authorization.as_ref(), reason)
    }

    fn caller_of(
        &self,
        registry: &UpstreamRegistry,
        authorization: Option<&HeaderValue>,
        reason: (Peer, &TraceContext),
    ) -> Caller {
        let mut caller = registry.caller(&self.principals, authorization, reason);
        caller.wait_deadline = Some(Instant::now() + RATE_LIMIT_WAIT_MAX);
        caller
    }
}

/// A caller and the evidence of its authorization in one repository.
struct AuthContext {
    caller: Caller,
    evidence: GrantEvidence,
}

impl AuthContext {
    /// True if the caller has no grant in the repository, not even an expired one. For such a caller a digest is
    /// looked up only after the upstream authorizes it, and the upstream request is the same whether or not the
    /// content is cached. So neither the time of a denial nor the upstream traffic reveals what is cached.
    fn has_no_grant(&self, rule: &EffectivePolicy, now: SystemTime) -> bool {
        let subject = crate::policy::ContentKind::Manifest;
        let state = self.state(rule, subject, None, true, now);
        state.authorization == crate::policy::Authorization::Unknown
    }

    fn state(
        &self,
        rule: &EffectivePolicy,
        subject: crate::policy::ContentKind,
        entry: Option<crate::policy::CachedEntry>,
        is_in_repository: bool,
        now: SystemTime,
    ) -> CacheState {
        let lifetimes = crate::policy::authz::GrantTtls {
            grant_ttl: rule.grant_ttl,
            grant_ttl_offline: rule.grant_ttl_offline,
        };
        let evidence = GrantEvidence {
            is_in_repository,
            ..self.evidence
        };
        CacheState {
            policy: rule.policy,
            kind: subject,
            cached: entry,
            blocked: None,
            authorization: crate::policy::authz::authorize(&evidence, &lifetimes, now),
            revalidation: crate::policy::Revalidation::NotDone,
            on_not_found: rule.on_not_found,
            max_age: rule.max_age,
            stale_if_error: rule.stale_if_error,
            cooling: None,
            now,
        }
    }
}

fn denied(
    refusal: DenyReason,
    response: Option<Arc<UpstreamResponse>>,
    proxy_credential: bool,
) -> ProxyResponse {
    ProxyResponse::Denied(Denied {
        reason: refusal,
        response,
        proxy_credential,
        block: None,
    })
}
