//! The road of a request: collect the [`CacheState`], let [`decide`] judge it, carry the verdict out.
//!
//! Everything here is about *one* repository of *one* upstream: which door the client came through was settled before,
//! and how the outcome looks in HTTP is settled after. The road never weighs evidence itself; it only gathers it.
//!
//! * `asking`: the question put to the upstream, shared by those who may share it, and what follows from the answer.
//! * `rights`: what its answers show of who may read, in `turns`. `logins`: whose a token is, and tokens of ours. `recalled`: how it asks for a credential, for when it is silent.
//! * `manifest`: by tag and by digest; `copies` of it that are held, `fetching` it, the `check` of what it points to.
//! * `blob`: held, joined or led; `possession`: the proof where a HEAD proves nothing; `source`: how a download reaches the upstream; `prefetch` begins before anybody asks. `attached`: attestations, and what refers to them. * `listing`: tags; `tag_list`, once for all who may share it; `long_list`, passed on as it arrives; `page`, cut from what is kept. * `referrers`: by their API and by their fallback tag.
//! * `cached`: what the store holds of it, or an error of the disk, logged. * `challenge`: how the registry itself answers `/v2/`. * `change`: what a write changes. `writing`: what follows from a write that passed.

mod api_challenge;
mod attestations;
mod blob;
mod cache_view;
mod candidates;
mod challenge_template;
mod detached;
mod grants;
pub mod invalidation;
mod keyed_lock;
mod layer_probe;
mod list_name;
mod listing;
mod local_tokens;
mod manifest;
mod manifest_fetch;
mod page;
pub mod passthrough;
mod possession;
mod prefetch;
mod referrers;
mod refresh;
mod registry;
mod revalidate;
mod sizes;
mod source;
mod streamed_list;
mod tag_list;
mod write_effect;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::HeaderValue;
use tokio::time::Instant;

pub use listing::Listing;
pub use local_tokens::{TokenOutcome, is_local_token};
pub use refresh::Refreshed;
pub use registry::{Access, RegistryState, RegistryStates, UpstreamRegistry};
pub use revalidate::Revalidated;
pub use streamed_list::StreamedList;

use crate::clock::Clock;
use crate::download::{Downloads, Reader};
use crate::oci::{Accept, Digest, Endpoint, MediaType, RangeRequest, Reference, Repository};
use crate::policy::authz::GrantEvidence;
use crate::policy::rules::EffectivePolicy;
use crate::policy::{CacheState, Decision, DenyReason, HitReason, MissReason, decide};
use crate::queue::Peer;
use crate::single_flight::SingleFlight;
use crate::store::access_times::ContentId;
use crate::store::blobs::BlobHandle;
use crate::store::challenges::StoredChallenge;
use crate::store::manifests::StoredManifest;
use crate::store::{AsyncStore, LogLimit, Store};
use crate::telemetry::Telemetry;
use crate::trace_context::TraceContext;
use crate::upstream::{Caller, UpstreamResponse};

/// How long a rate limit is waited out for a client that cannot be served from the cache. Dockerd and containerd give
/// up on a response after 30 s, of which the request that follows the pause needs some.
const LIMIT_WITHIN: Duration = Duration::from_secs(20);

/// What the road needs of the world, and what it has under way. One for the process: settings are the [`UpstreamRegistry`]'s, and a
/// reload exchanges those alone.
pub struct ProxyService {
    store: AsyncStore,
    downloads: Downloads,
    clock: Clock,
    telemetry: Telemetry,
    principals: registry::Principals,
    sizes: sizes::SizeHints,
    arriving: possession::ActiveDownloads,
    found: layer_probe::ProbedImages,
    prefetching: prefetch::Prefetching,
    list_copies: streamed_list::CopyPermits,
    attestations: attestations::Attestations,
    referrers_confirmed: referrers::ConfirmedReferrers,
    refused: grants::RecentDenials,
    logins: local_tokens::LocalTokens,
    questions: SingleFlight<revalidate::CoalesceKey, Arc<UpstreamResponse>>,
    /// By whether the response is kept as well: a caller without a right may have one by the time another joins.
    lists: SingleFlight<(revalidate::CoalesceKey, bool), listing::ListResult>,
    tag_lists: SingleFlight<(revalidate::CoalesceKey, bool), tag_list::SharedList>,
    unreadable: LogLimit,
    challenges:
        SingleFlight<api_challenge::ChallengeKey, Result<Arc<StoredChallenge>, Arc<UpstreamResponse>>>,
    manifests: SingleFlight<revalidate::CoalesceKey, Result<Arc<StoredManifest>, Arc<UpstreamResponse>>>,
}

/// A request, whichever door it came through.
pub struct Request {
    /// The upstream it is about.
    pub site: Arc<UpstreamRegistry>,
    /// What is asked for.
    pub endpoint: Endpoint,
    /// Whether only the head of the answer is wanted.
    pub head: bool,
    /// The media types that the client takes.
    pub accept: Accept,
    /// The client's `Authorization`, if it sent one that is not empty.
    pub authorization: Option<HeaderValue>,
    /// When it arrived.
    pub now: SystemTime,
    /// Which writes there were in the repository by then ([`UpstreamRegistry::writes`]).
    pub writes: invalidation::WriteSnapshot,
    /// Whether a yes may lead the client to leave something out of a push, so that it must be the registry's.
    pub for_push: bool,
    /// Which trace it belongs to.
    pub trace: TraceContext,
    /// The client that sent it.
    pub peer: Peer,
    /// Which bytes of a blob are wanted.
    pub range: RangeRequest,
    /// Whether a body without a length that breaks off looks like a whole one to the client, as in HTTP/1.0.
    pub needs_length: bool,
}

/// What the client gets, before it is HTTP.
pub enum ProxyResponse {
    /// `GET /v2/`: here is a registry.
    Ping,
    /// `GET /v2/`: the registry wants a credential, and says how in these lines of `WWW-Authenticate`.
    Challenged(Vec<HeaderValue>),
    /// A manifest, whole.
    Manifest(Arc<StoredManifest>, ServeInfo),
    /// The head of a manifest that is not held: as the upstream gave it.
    ManifestHead {
        /// Which manifest.
        digest: Digest,
        /// Its media type.
        media_type: MediaType,
        /// Its size in bytes.
        size: u64,
    },
    /// A blob.
    Blob {
        /// Which blob.
        digest: Digest,
        /// Its size in bytes; unknown only while it is being fetched from an upstream that does not say it.
        size: Option<u64>,
        /// Where its bytes come from.
        content: BlobBody,
        /// Why it is served.
        how: ServeInfo,
    },
    /// A list of tags or referrers.
    Listing(Listing, ServeInfo),
    /// A list of tags that is passed on as it arrives.
    StreamedList(Box<StreamedList>, ServeInfo),
    /// Bytes of a kind that is never stored: passed through as they come.
    Passthrough(passthrough::Passthrough),
    /// No.
    Denied(Denied),
}

/// Where the bytes of a blob come from.
pub enum BlobBody {
    /// Only its head was asked for.
    Head,
    /// From memory.
    Memory(Bytes),
    /// From its file.
    File(BlobHandle),
    /// From a download under way.
    Download(Reader),
    /// From the upstream, because the disk cannot take it.
    Passthrough(Box<passthrough::VerifyingStream>),
}

/// Why a client gets bytes, and how old they are.
#[derive(Clone, Copy, Debug)]
pub struct ServeInfo {
    /// The reason.
    pub reason: ServeReason,
    /// When the upstream last confirmed the tag; `None` for what is asked by digest.
    pub confirmed_at: Option<SystemTime>,
}

/// The reason, from the cache's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServeReason {
    /// From the store.
    Cached(HitReason),
    /// From the upstream, for this client.
    Fetched(MissReason),
    /// From the upstream, in a transfer that another client had begun.
    Collapsed,
    /// From the upstream, not to be stored.
    Passthrough,
}

impl ServeReason {
    /// The name in the log, the metrics and `Cache-Status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cached(served) => served.name(),
            Self::Fetched(why) => why.name(),
            Self::Collapsed => "collapsed",
            Self::Passthrough => "passthrough",
        }
    }
}

/// A refusal, with what the upstream said where it was asked.
#[derive(Debug)]
pub struct Denied {
    /// Why.
    pub refusal: DenyReason,
    /// What the upstream answered.
    pub answer: Option<Arc<UpstreamResponse>>,
    /// Whether the credential refused was the proxy's own.
    pub own_credential: bool,
}

impl ProxyService {
    /// A road over `store`, whose install secret keys the principals.
    pub fn new(store: Arc<Store>, downloads: Downloads, (clock, telemetry): (Clock, Telemetry)) -> Self {
        let principals = registry::Principals::new(*store.install_secret());
        Self {
            store: AsyncStore::new(store),
            downloads,
            clock,
            telemetry,
            principals,
            sizes: sizes::SizeHints::default(),
            arriving: possession::ActiveDownloads::default(),
            found: layer_probe::ProbedImages::default(),
            prefetching: prefetch::Prefetching::default(),
            list_copies: streamed_list::CopyPermits::default(),
            attestations: attestations::Attestations::default(),
            referrers_confirmed: referrers::ConfirmedReferrers::default(),
            refused: grants::RecentDenials::default(),
            logins: local_tokens::LocalTokens::default(),
            questions: SingleFlight::default(),
            lists: SingleFlight::default(),
            tag_lists: SingleFlight::default(),
            unreadable: LogLimit::default(),
            challenges: SingleFlight::default(),
            manifests: SingleFlight::default(),
        }
    }

    /// Answers a request. Total: whatever fails becomes a refusal with its reason.
    pub async fn answer(self: &Arc<Self>, mut request: Request) -> ProxyResponse {
        let now = request.now;
        request
            .authorization
            .take_if(|shown| self.is_spent(&request.site, shown));
        let outcome = self.outcome(&request).await;
        match &outcome {
            ProxyResponse::Manifest(manifest, _) => {
                self.store.touch(ContentId::Manifest(manifest.digest), now);
                self.note_manifest_given(&request, manifest).await;
            }
            ProxyResponse::Blob { digest, .. } => {
                self.store.touch(ContentId::Blob(*digest), now);
                self.note_blob_given(&request, *digest);
            }
            _ => {}
        }
        self.or_challenge(&request, outcome).await
    }

    async fn outcome(self: &Arc<Self>, request: &Request) -> ProxyResponse {
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

    /// What would be decided now for a client with this `Authorization`, before asking anyone: for the operator's
    /// question "why".
    pub async fn why(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        reference: &Reference,
        authorization: Option<&HeaderValue>,
        now: SystemTime,
    ) -> (CacheState, Decision, Arc<str>) {
        let tag = match reference {
            Reference::Tag(tag) => Some(tag),
            Reference::Digest(_) => None,
        };
        let rule = site.rule(repository, tag);
        let reason = (Peer::Local, &TraceContext::new_root());
        let context = self.context_of(site, repository, authorization, reason).await;
        let situation = match reference {
            Reference::Tag(tag) => {
                let copies = self.copies_of_tag(site, repository, tag, None).await;
                let held = copies.as_ref().map(candidates::Candidates::held);
                context.situation(rule, crate::policy::ContentKind::Tag, held, true, now)
            }
            Reference::Digest(digest) => {
                self.digest_situation(site, (&context, rule), repository, digest, now)
                    .await
            }
        };
        (situation, decide(&situation), Arc::clone(&rule.name))
    }

    /// The store, for those who look rather than pull.
    pub fn store(&self) -> &AsyncStore {
        &self.store
    }

    /// The transfers under way.
    pub fn downloads(&self) -> &Downloads {
        &self.downloads
    }

    /// Who asks, and what is known of their right in this repository.
    async fn context(self: &Arc<Self>, request: &Request, repository: &Repository) -> AuthContext {
        self.context_of(
            &request.site,
            repository,
            request.authorization.as_ref(),
            (request.peer, &request.trace),
        )
        .await
    }

    async fn context_of(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        authorization: Option<&HeaderValue>,
        reason: (Peer, &TraceContext),
    ) -> AuthContext {
        let caller = self.caller_of(site, authorization, reason);
        let account = self.account(site, repository, authorization);
        let evidence = self.evidence(site, repository, caller.principal, account).await;
        AuthContext { caller, evidence }
    }

    /// Who asks.
    fn caller(&self, request: &Request) -> Caller {
        let reason = (request.peer, &request.trace);
        self.caller_of(&request.site, request.authorization.as_ref(), reason)
    }

    fn caller_of(
        &self,
        site: &UpstreamRegistry,
        authorization: Option<&HeaderValue>,
        reason: (Peer, &TraceContext),
    ) -> Caller {
        let mut caller = site.caller(&self.principals, authorization, reason);
        caller.wait_deadline = Some(Instant::now() + LIMIT_WITHIN);
        caller
    }
}

/// Who asks in which repository, and with what right.
struct AuthContext {
    caller: Caller,
    evidence: GrantEvidence,
}

impl AuthContext {
    /// Whether this caller has shown no right in the repository, not even one that has lapsed. What such a one asks for by
    /// digest is looked up only after the upstream's yes, and asked about in one way whatever is held: neither how long a
    /// no takes nor what the upstream sees of it tells what is held.
    fn is_stranger(&self, rule: &EffectivePolicy, now: SystemTime) -> bool {
        let subject = crate::policy::ContentKind::Manifest;
        let situation = self.situation(rule, subject, None, true, now);
        situation.authorization == crate::policy::Authorization::Unknown
    }

    fn situation(
        &self,
        rule: &EffectivePolicy,
        subject: crate::policy::ContentKind,
        held: Option<crate::policy::CachedEntry>,
        seen: bool,
        now: SystemTime,
    ) -> CacheState {
        let lifetimes = crate::policy::authz::GrantTtls {
            grant_ttl: rule.grant_ttl,
            grant_ttl_offline: rule.grant_ttl_offline,
        };
        let evidence = GrantEvidence {
            is_in_repository: seen,
            ..self.evidence
        };
        CacheState {
            policy: rule.policy,
            kind: subject,
            cached: held,
            authorization: crate::policy::authz::authorize(&evidence, &lifetimes, now),
            revalidation: crate::policy::Revalidation::NotDone,
            on_not_found: rule.on_not_found,
            max_age: rule.max_age,
            stale_if_error: rule.stale_if_error,
            now,
        }
    }
}
