//! Read pipeline: one request for content of a repository, from its arrival to its response.
//!
//! A [`ReadContext`] is what all steps share: the request, its policy, its caller and the evidence of the caller's
//! authorization. They are looked up once. The steps of a manifest, a blob or a list are in the module of that name:
//! collect the evidence about the cached copy, decide, revalidate and decide again, serve.

use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderValue;
use tokio::time::Instant;

use super::manifest_fetch::UpstreamRequest;
use super::revalidate::Revalidated;
use super::shared_records::Given;
use super::{
    Denied, ProxyResponse, ProxyService, RATE_LIMIT_WAIT_MAX, Request, UpstreamCaches, UpstreamRegistry,
    invalidation,
};
use crate::oci::{Accept, Digest, Endpoint, RangeRequest, Reference, Repository};
use crate::policy::authz::{GrantEvidence, authorize, public_by_record};
use crate::policy::rules::EffectivePolicy;
use crate::policy::{
    AgeFacts, Authorization, CacheState, CachedEntry, ContentKind, CredentialOwner, Decision, DenyReason,
    Revalidation, decide,
};
use crate::queue::Peer;
use crate::store::access_times::ContentId;
use crate::trace_context::TraceContext;
use crate::upstream::{Caller, UpstreamResponse};

/// A read of one repository, and the rights of its client.
pub(super) struct ReadContext<'a> {
    pub(super) proxy: &'a Arc<ProxyService>,
    pub(super) request: &'a Request,
    pub(super) repository: &'a Repository,
    /// The policy of the tag; without a tag, that of requests by digest.
    pub(super) rule: &'a EffectivePolicy,
    pub(super) caller: Caller,
    grants: GrantEvidence,
}

impl ProxyService {
    /// Handles a request. Every failure becomes a [`Denied`] with its reason. An expired local token is removed from the
    /// request.
    pub async fn handle(self: &Arc<Self>, request: &mut Request) -> ProxyResponse {
        request
            .authorization
            .take_if(|shown| self.is_expired_local_token(&request.registry, shown));
        let Some(repository) = request.endpoint.repository() else {
            return ProxyResponse::Ping;
        };
        let read = ReadContext::new(self, request, repository).await;
        let outcome = read.dispatch().await;
        read.finish(outcome).await
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
        let request = Request {
            registry: Arc::clone(registry),
            endpoint: Endpoint::Manifest {
                repository: repository.clone(),
                reference: reference.clone(),
            },
            head: false,
            accept: Accept::manifests(),
            authorization: authorization.cloned(),
            host: None,
            now,
            since: Instant::now(),
            writes: invalidation::WriteSnapshot::default(),
            for_push: false,
            trace: TraceContext::new_root(),
            peer: Peer::Local,
            range: RangeRequest::None,
            needs_length: false,
            upstream_caches: UpstreamCaches::default(),
        };
        let read = ReadContext::new(self, &request, repository).await;
        let evidence = match reference {
            Reference::Tag(tag) => {
                let mut evidence = read.tag_evidence(tag, None).await;
                if let Some(cooling) = evidence.state.cooling {
                    let named = self.last_named(registry, repository, tag, read.rule, now).await;
                    evidence.state.cooling = Some(AgeFacts { named, ..cooling });
                }
                evidence
            }
            Reference::Digest(digest) => read.digest_evidence(digest).await,
        };
        let is_complete = match (reference, &evidence.candidates) {
            // It counts as incomplete in the decision, so that it is not served.
            (Reference::Tag(_), Some(found)) if found.is_blocked => {
                self.is_complete(registry, repository, &found.newest.manifest)
                    .await
            }
            _ => evidence.state.cached.is_some_and(|entry| entry.is_complete()),
        };
        let decision = decide(&evidence.state);
        (evidence.state, decision, Arc::clone(&read.rule.name), is_complete)
    }

    /// Caller of the request.
    pub(super) fn caller(&self, request: &Request) -> Caller {
        let reason = (request.peer, &request.trace);
        let mut caller = request
            .registry
            .caller(&self.principals, request.authorization.as_ref(), reason);
        caller.wait_deadline = Some(Instant::now() + RATE_LIMIT_WAIT_MAX);
        caller
    }
}

impl<'a> ReadContext<'a> {
    pub(super) async fn new(
        proxy: &'a Arc<ProxyService>,
        request: &'a Request,
        repository: &'a Repository,
    ) -> Self {
        let (registry, caller) = (&request.registry, proxy.caller(request));
        let account = proxy.account(registry, repository, request.authorization.as_ref());
        let grants = proxy
            .grants_of(registry, repository, caller.principal, account)
            .await;
        let read = Self {
            proxy,
            request,
            repository,
            rule: registry.rule(repository, request.tag()),
            caller,
            grants,
        };
        // Such a mark counts only with its record, which is read at each use.
        if grants.anonymous_granted_at == Some(public_by_record()) && !read.may_use_public_records() {
            return read.without_public_mark();
        }
        read
    }

    /// This read for a client to which the repository is not known to be public.
    pub(super) fn without_public_mark(self) -> Self {
        let grants = GrantEvidence {
            anonymous_granted_at: None,
            ..self.grants
        };
        Self { grants, ..self }
    }

    /// This read with the right that a record of another cache gave at this time.
    pub(super) fn granted_by_record(self, at: SystemTime) -> Self {
        let grants = GrantEvidence {
            recorded_at: Some(at),
            ..self.grants
        };
        Self { grants, ..self }
    }

    /// Time of the latest grant of this cache that the client has in the repository, by itself or by its account.
    pub(super) fn latest_grant(&self) -> Option<SystemTime> {
        self.grants.granted_at.max(self.grants.account_granted_at)
    }

    /// Time of the latest token that the token service issued to the client's account.
    pub(super) fn login_time(&self) -> Option<SystemTime> {
        self.grants.token_issued_at
    }

    /// This read without the rights of the client.
    pub(super) fn without_grants(self) -> Self {
        let grants = GrantEvidence {
            granted_at: None,
            token_issued_at: None,
            account_granted_at: None,
            recorded_at: None,
            ..self.grants
        };
        Self { grants, ..self }
    }

    /// The response before the checks of [`Self::finish`].
    pub(super) async fn dispatch(&self) -> ProxyResponse {
        match &self.request.endpoint {
            Endpoint::Ping => ProxyResponse::Ping,
            Endpoint::Manifest { reference, .. } => self.manifest(reference).await,
            Endpoint::Blob { digest, .. } => self.blob(digest).await,
            Endpoint::Tags { .. } => {
                let outcome = Box::pin(self.listing()).await;
                match self.unmarked_if_revoked(Given::of(&outcome)).await {
                    Some(read) => Box::pin(read.listing()).await,
                    None => outcome,
                }
            }
            Endpoint::Referrers { digest, query, .. } => {
                let outcome = Box::pin(self.referrers(digest, query)).await;
                match self.unmarked_if_revoked(Given::of(&outcome)).await {
                    Some(read) => Box::pin(read.referrers(digest, query)).await,
                    None => outcome,
                }
            }
        }
    }

    /// Checks the response by what it gives out, and records its use.
    async fn finish(&self, outcome: ProxyResponse) -> ProxyResponse {
        let outcome = self.refuse_blocked(outcome);
        let by_digest = self.request.registry.rule(self.repository, None);
        if by_digest.age_limit.is_on_by_digest() {
            self.record_served_from(&outcome);
        }
        match &outcome {
            ProxyResponse::Manifest(manifest, info) => {
                let content = ContentId::Manifest(manifest.digest);
                self.proxy.store.touch(content, self.request.now);
                self.on_manifest_served(manifest, info.reason).await;
            }
            ProxyResponse::Blob { digest, .. } => {
                self.proxy.store.touch(ContentId::Blob(*digest), self.request.now);
                self.on_blob_served(*digest);
            }
            ProxyResponse::Denied(refused) => {
                let challenge = self.challenge_instead_of_error(refused).await;
                return challenge.map_or(outcome, ProxyResponse::Denied);
            }
            _ => {}
        }
        outcome
    }

    /// Replaces a response that would give out a blocked digest, and adds to the denial who blocked it. A tag's digest may
    /// be known only after its fetch, and a block may be given while a request waits for the upstream. Only authorized
    /// clients get such a response or denial.
    fn refuse_blocked(&self, outcome: ProxyResponse) -> ProxyResponse {
        let outcome = match digest_of(&outcome) {
            Some(digest) if self.is_blocked(&digest) => denied(DenyReason::Blocked(digest), None, false),
            _ => outcome,
        };
        match outcome {
            ProxyResponse::Denied(
                refused @ Denied {
                    reason: DenyReason::Blocked(digest),
                    ..
                },
            ) => {
                let store = &self.proxy.store;
                let block = store.block_of(self.request.registry.name(), self.repository, &digest);
                ProxyResponse::Denied(Denied { block, ..refused })
            }
            outcome => outcome,
        }
    }

    /// The state before any upstream request.
    pub(super) fn state(
        &self,
        kind: ContentKind,
        cached: Option<CachedEntry>,
        is_in_repository: bool,
    ) -> CacheState {
        let rule = self.rule;
        CacheState {
            policy: rule.policy,
            kind,
            cached,
            blocked: None,
            authorization: self.authorization(is_in_repository),
            revalidation: Revalidation::NotDone,
            on_not_found: rule.on_not_found,
            max_age: rule.max_age,
            stale_if_error: rule.stale_if_error,
            cooling: None,
            now: self.request.now,
        }
    }

    /// Authorization of the caller. `is_in_repository`: whether the content was seen here.
    pub(super) fn authorization(&self, is_in_repository: bool) -> Authorization {
        let evidence = GrantEvidence {
            is_in_repository,
            ..self.grants
        };
        authorize(&evidence, &self.rule.grant_ttls(), self.request.now)
    }

    /// Authorization of the caller in the repository, whether or not that is public.
    pub(super) fn authorization_of_client(&self) -> Authorization {
        let evidence = GrantEvidence {
            is_in_repository: true,
            anonymous_granted_at: None,
            ..self.grants
        };
        authorize(&evidence, &self.rule.grant_ttls(), self.request.now)
    }

    /// When the repository was last seen to be public.
    pub(super) fn public_mark(&self) -> Option<SystemTime> {
        self.grants.anonymous_granted_at
    }

    /// True if the caller has no grant in the repository, not even an expired one. For such a caller a digest is
    /// looked up only after the upstream authorizes it, and the upstream request is the same whether or not the
    /// content is cached. So neither the time of a denial nor the upstream traffic reveals what is cached.
    pub(super) fn has_no_grant(&self) -> bool {
        self.authorization(true) == Authorization::Unknown
    }

    /// The digest, if the operator blocked it here: input of the decision.
    pub(super) fn blocked(&self, digest: Digest) -> Option<Digest> {
        self.is_blocked(&digest).then_some(digest)
    }

    /// Whether the operator blocked this digest here.
    pub(super) fn is_blocked(&self, digest: &Digest) -> bool {
        self.proxy
            .is_blocked(&self.request.registry, self.repository, digest)
    }

    /// The request to the upstream in the name of this client.
    pub(super) fn upstream_request(&self) -> UpstreamRequest {
        UpstreamRequest::of(self.request, self.repository, &self.caller)
    }

    /// Classification of an upstream response for this repository.
    pub(super) async fn classify(&self, response: &UpstreamResponse) -> Revalidation {
        self.proxy
            .classify(&self.request.registry, self.repository, response)
            .await
    }
}

pub(super) fn denied(
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

/// The denial after a revalidation.
pub(super) fn denied_after(refusal: DenyReason, revalidated: Revalidated) -> ProxyResponse {
    let is_proxy_credential = revalidated.revalidation == Revalidation::Denied(CredentialOwner::Proxy);
    denied(refusal, revalidated.response, is_proxy_credential)
}

/// The digest of the content in a response.
fn digest_of(outcome: &ProxyResponse) -> Option<Digest> {
    match outcome {
        ProxyResponse::Manifest(manifest, _) => Some(manifest.digest),
        ProxyResponse::ManifestHead { digest, .. } | ProxyResponse::Blob { digest, .. } => Some(*digest),
        ProxyResponse::Passthrough(passed) => passed.digest.as_ref()?.parse().ok(),
        ProxyResponse::Ping
        | ProxyResponse::Challenged(_)
        | ProxyResponse::Listing(..)
        | ProxyResponse::StreamedList(..)
        | ProxyResponse::Denied(_) => None,
    }
}
