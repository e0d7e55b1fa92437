//! The question put to the upstream, and what follows from its answer.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::invalidation::WriteSnapshot;
use super::local_tokens::is_local_token;
use super::manifest_fetch::UpstreamRequest;
use super::{AuthContext, ProxyService, Request, UpstreamRegistry};
use crate::oci::{Accept, AnyDigest, Digest, Endpoint, MediaType, Reference, Repository, UpstreamFailure};
use crate::policy::{
    Authorization, CacheState, ContentKind, CredentialOwner, Decision, Revalidation, decide,
};
use crate::queue::{Class, Demand};
use crate::single_flight::SharedCall;
use crate::store::membership::MembershipUpdate;
use crate::store::tags::{TagKey, Variant};
use crate::upstream::{Caller, ResponseKind, UpstreamResponse};

/// Shorter content proves nothing: an empty blob, an empty object and an empty layer are the same everywhere.
const EVIDENCE_BYTES_MIN: u64 = 64;

/// Which askers may share one question: same thing, same media types, same principal.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct CoalesceKey {
    upstream: Arc<str>,
    path: String,
    accept: u64,
    principal: [u8; 32],
    /// Who asks after a write does not wait for an answer from before it.
    writes: WriteSnapshot,
    /// Nor, after a reload, for one to other settings.
    settings: (u64, u64),
    for_push: bool,
    named: Option<Digest>,
    /// Nor, after a denial, for one from before it, whose answer may be an older yes.
    denied_at: Option<Instant>,
}

impl CoalesceKey {
    pub(super) fn new(pull: &ProxyService, wanted: &UpstreamRequest) -> Self {
        Self {
            upstream: wanted.site.name().into(),
            path: wanted.endpoint.path_and_query(),
            accept: wanted.accept.key(),
            principal: wanted.caller.principal,
            writes: wanted.writes,
            settings: wanted.site.upstream().settings_id(),
            for_push: wanted.for_push,
            named: wanted.named,
            denied_at: pull.denied_at(wanted),
        }
    }
}

/// What came of asking.
pub struct Revalidated {
    /// In the decision's words.
    pub revalidation: Revalidation,
    /// In the upstream's own, if it said anything.
    pub answer: Option<Arc<UpstreamResponse>>,
}

impl Revalidated {
    /// Whether the upstream may have said yes, and nothing proves that it was the registry.
    pub(super) fn is_unproven(&self) -> bool {
        let answer = self.answer.as_ref();
        matches!(
            self.revalidation,
            Revalidation::Unavailable(UpstreamFailure::NotRegistry)
        ) && answer.is_some_and(|answer| matches!(answer.kind, ResponseKind::UnprovenDigest(_)))
    }
}

impl ProxyService {
    /// Asks the upstream. Where the situation could be served without an answer, it waits no longer than `budget`, and
    /// shorter or not at all while the upstream is known not to respond.
    pub(super) async fn ask(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        context: &AuthContext,
        situation: &CacheState,
        budget: Duration,
    ) -> Revalidated {
        let silence =
            situation.with_revalidation(Revalidation::Unavailable(UpstreamFailure::RevalidateTimeout));
        let can_do_without = matches!(decide(&silence), Decision::Serve(_));
        let upstream = request.site.upstream();
        let mut wanted = UpstreamRequest::of(request, repository, &context.caller);
        let rule = request.site.rule(repository, request.tag());
        wanted.is_strangers = context.is_stranger(rule, request.now);
        let wait = if can_do_without {
            upstream.wait_limit(&wanted.caller, (&wanted.endpoint, true), budget)
        } else {
            Ok(budget)
        };
        let wait = match wait {
            Ok(wait) => wait,
            Err(cause) => {
                return Revalidated {
                    revalidation: Revalidation::Unavailable(cause),
                    answer: None,
                };
            }
        };
        if can_do_without {
            // The cached copy is the answer to a rate limit.
            wanted.caller.wait_deadline = None;
            wanted.caller.class = Class::Held;
        }
        let call = self.question(&wanted);
        let waiters = call.waiters().clone();
        let asking = self.proven_answer(call, &wanted, situation.authorization);
        let answer = if can_do_without {
            if let Ok(answer) = tokio::time::timeout(wait, asking).await {
                answer
            } else {
                // A request that is queued here says nothing of the upstream.
                if !waiters.is_queued() {
                    upstream.record_timeout(&wanted.caller, &wanted.endpoint, wait);
                }
                // The late answer still has its effects.
                waiters.detach();
                return Revalidated {
                    revalidation: Revalidation::Unavailable(UpstreamFailure::RevalidateTimeout),
                    answer: None,
                };
            }
        } else {
            asking.await
        };
        match answer {
            Some(answer) => {
                let revalidation = self.heard_by(&wanted, &answer, situation.authorization).await;
                // A no to the stranger who asked in the place of a token of ours: it sends the client for a better one,
                // if there is one to be had.
                let is_local = request.authorization.as_ref().is_some_and(is_local_token);
                if is_local && matches!(revalidation, Revalidation::Denied(_)) && upstream.has_failed_realm()
                {
                    return Revalidated {
                        revalidation: Revalidation::Unavailable(UpstreamFailure::TokenService),
                        answer: None,
                    };
                }
                Revalidated {
                    revalidation,
                    answer: Some(answer),
                }
            }
            None => Revalidated {
                revalidation: Revalidation::Unavailable(UpstreamFailure::Busy),
                answer: None,
            },
        }
    }

    /// The answer to the question. Of a manifest and for one who has no right of late, a yes that is not proven is proven
    /// by a GET, whose bytes tell; nothing is held against another question for it.
    async fn proven_answer(
        self: &Arc<Self>,
        call: SharedCall<Arc<UpstreamResponse>>,
        wanted: &UpstreamRequest,
        standing: Authorization,
    ) -> Option<Arc<UpstreamResponse>> {
        let answer = call.wait().await?;
        let is_manifest = matches!(wanted.endpoint, Endpoint::Manifest { .. });
        if !is_manifest
            || standing == Authorization::Granted
            || !matches!(answer.kind, ResponseKind::UnprovenDigest(_))
        {
            return Some(answer);
        }
        if answer.body.is_some() {
            return Some(answer);
        }
        Some(match self.fetch_manifest(wanted.clone()).await {
            Ok(manifest) => Arc::new(UpstreamResponse {
                kind: if self.is_vouched(wanted).await {
                    ResponseKind::Digest(manifest.digest)
                } else {
                    ResponseKind::UnprovenDigest(manifest.digest)
                },
                media_type: Some(manifest.media_type.clone()),
                length: Some(manifest.bytes.len() as u64),
                body: Some((manifest.bytes.clone(), manifest.media_type.clone())),
                ..answer.as_ref().clone()
            }),
            Err(answer) => answer,
        })
    }

    /// Whether a request may be made up: for a digest that no manifest here names. It comes last, and ends with the last
    /// that waits for it. Anything else goes on once it was sent: a registry that first fetches for itself takes longer
    /// than its clients wait, and they come again.
    pub(super) fn may_be_made_up(&self, wanted: &UpstreamRequest) -> bool {
        may_be_made_up(&wanted.endpoint, wanted.is_strangers, |digest| {
            self.is_named_there(wanted, digest)
        })
    }

    /// What is asked of admission for this request.
    pub(super) fn demand(&self, wanted: &UpstreamRequest) -> Demand {
        let demand = wanted.caller.demand(&wanted.endpoint);
        let is_last = demand.class == Class::Interactive && self.may_be_made_up(wanted);
        Demand {
            class: if is_last { Class::Bulk } else { demand.class },
            ..demand
        }
    }

    /// One question for all who may share it, and what is learnt from its answer, late as it may come.
    pub(super) fn question(self: &Arc<Self>, wanted: &UpstreamRequest) -> SharedCall<Arc<UpstreamResponse>> {
        let key = CoalesceKey::new(self, wanted);
        let is_made_up = self.may_be_made_up(wanted);
        self.questions.share_for(key, self.demand(wanted), |waiters| {
            if !is_made_up {
                waiters.detach();
            }
            let (pull, wanted) = (Arc::clone(self), wanted.clone());
            async move {
                let UpstreamRequest {
                    site,
                    repository,
                    endpoint,
                    accept,
                    caller,
                    ..
                } = &wanted;
                let asked_at = Instant::now();
                let caller = Caller {
                    waiters: Some(waiters.clone()),
                    ..caller.clone()
                };
                let asking = async {
                    if wanted.for_push {
                        site.upstream().head_for_push(&caller, endpoint, accept).await
                    } else {
                        site.upstream().head(&caller, endpoint, accept).await
                    }
                };
                let answer = waiters.while_wanted(asking).await?;
                let (answer, is_evidence) = pull.weighed(&wanted, answer).await;
                if is_evidence || !answer.kind.is_success() {
                    pull.learn(&wanted, &answer, asked_at).await;
                }
                let is_believed = is_evidence || pull.is_vouched(&wanted).await;
                match (endpoint, answer.kind) {
                    (Endpoint::Manifest { reference, .. }, ResponseKind::Digest(digest)) if is_believed => {
                        if pull.may_name(site, repository, reference, accept, &digest).await {
                            let media_type = answer.media_type.as_ref();
                            pull.learn_name_unless_written(&wanted, reference, digest, media_type)
                                .await;
                        } else {
                            pull.add_member(site, repository, digest).await;
                        }
                    }
                    // Good for comparing where the digest is known to be here and the principal to be let in.
                    (Endpoint::Manifest { reference, .. }, ResponseKind::UnprovenDigest(digest))
                        if pull.is_member(site, repository, digest).await
                            && pull.is_vouched(&wanted).await
                            && pull.may_name(site, repository, reference, accept, &digest).await =>
                    {
                        let media_type = answer.media_type.as_ref();
                        pull.learn_name_unless_written(&wanted, reference, digest, media_type)
                            .await;
                    }
                    // The proof that the upstream has this blob here.
                    (
                        Endpoint::Blob {
                            digest: AnyDigest::Supported(digest),
                            ..
                        },
                        ResponseKind::Digest(_),
                    ) if is_believed => {
                        pull.add_member(site, repository, *digest).await;
                        pull.confirmed(&wanted, (*digest).into()).await;
                    }
                    _ => {}
                }
                Some(Arc::new(answer))
            }
        })
    }

    /// The answer to a question, and whether a yes is evidence of a right. Whoever asks by digest chooses it, so a front
    /// that says yes to everything, and repeats the digest, would pass. Where the content was seen here before and the
    /// length stated is right, it is the registry that knows it. Where it is cached or arriving and the length is not
    /// right, only the bytes can tell. What is neither has to come from the upstream anyway.
    async fn weighed(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        answer: UpstreamResponse,
    ) -> (UpstreamResponse, bool) {
        let (ResponseKind::Digest(digest), None) = (answer.kind, &answer.body) else {
            return (answer, true);
        };
        let cached = match &wanted.endpoint {
            Endpoint::Manifest {
                reference: Reference::Digest(_),
                ..
            } => self
                .cached_manifest(&wanted.site, &wanted.repository, &digest)
                .await
                .map(|manifest| manifest.bytes.len() as u64),
            Endpoint::Blob { .. } => {
                let found = self.store.read(move |view| view.blob(&digest)).await;
                let image = format_args!("{}@{digest}", wanted.repository);
                self.cached(&wanted.site, &image, found).map(|held| held.size)
            }
            _ => return (answer, true),
        };
        let is_evidence = match cached.filter(|size| answer.length == Some(*size)) {
            Some(size) => self.is_evidence(wanted, digest, size).await,
            None => false,
        };
        let shows_nothing = cached.is_none() && !self.downloads.is_arriving(&digest);
        if is_evidence || shows_nothing || self.is_vouched(wanted).await {
            return (answer, is_evidence);
        }
        let unproven = UpstreamResponse {
            kind: ResponseKind::UnprovenDigest(digest),
            ..answer
        };
        (unproven, false)
    }

    /// Whether content of this digest and size, given to this caller, shows a right to the repository: the digest is one
    /// of the repository's, so that the caller did not make it up, and it is longer than what is the same everywhere.
    pub(super) async fn is_evidence(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        digest: Digest,
        size: u64,
    ) -> bool {
        size >= EVIDENCE_BYTES_MIN
            && (self.is_named_there(wanted, digest)
                || self.is_member(&wanted.site, &wanted.repository, digest).await)
    }

    /// Whether a manifest that was given to somebody with a right to the repository names this content.
    pub(super) fn is_named_there(&self, wanted: &UpstreamRequest, digest: Digest) -> bool {
        self.sizes.of(&wanted.site, &wanted.repository, digest).is_some()
    }

    /// Whether this caller has shown a right in the repository lately.
    pub(super) async fn is_vouched(self: &Arc<Self>, wanted: &UpstreamRequest) -> bool {
        self.standing_of(wanted).await == Authorization::Granted
    }

    /// What this caller has shown by now of a right in the repository.
    pub(super) async fn standing_of(self: &Arc<Self>, wanted: &UpstreamRequest) -> Authorization {
        let UpstreamRequest {
            site,
            repository,
            caller,
            ..
        } = wanted;
        let tag = match &wanted.endpoint {
            Endpoint::Manifest {
                reference: Reference::Tag(tag),
                ..
            } => Some(tag),
            _ => None,
        };
        let rule = site.rule(repository, tag);
        let context = self
            .context_of(site, repository, wanted.shown(), (caller.peer, &caller.trace))
            .await;
        let situation = context.situation(rule, ContentKind::Tag, None, true, self.clock.now());
        situation.authorization
    }

    /// In the decision's words, what `answer` means for this repository to one of this standing: who has a right of late
    /// is given what the unproven yes to a manifest names, for the bytes will be held against it.
    pub(super) async fn heard_by(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        answer: &UpstreamResponse,
        standing: Authorization,
    ) -> Revalidation {
        let UpstreamRequest { site, repository, .. } = wanted;
        let is_manifest = matches!(wanted.endpoint, Endpoint::Manifest { .. });
        match answer.kind {
            ResponseKind::UnprovenDigest(digest) if is_manifest && standing == Authorization::Granted => {
                Revalidation::Digest {
                    digest,
                    presence: self.holding(site, repository, &digest).await,
                }
            }
            _ => self.heard(site, repository, answer).await,
        }
    }

    /// In the decision's words, what `answer` means for this repository.
    pub(super) async fn heard(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        answer: &UpstreamResponse,
    ) -> Revalidation {
        match answer.kind {
            ResponseKind::UnprovenDigest(_) | ResponseKind::NoDigest => {
                Revalidation::Unavailable(UpstreamFailure::NotRegistry)
            }
            ResponseKind::Digest(digest) => Revalidation::Digest {
                digest,
                presence: self.holding(site, repository, &digest).await,
            },
            ResponseKind::NotFound => Revalidation::NotFound,
            // Any other 4xx (451, 423, …) is a no of some kind too, and a held copy must never hide a no.
            ResponseKind::Denied | ResponseKind::Other(_) if site.has_own_credential() => {
                Revalidation::Denied(CredentialOwner::Proxy)
            }
            ResponseKind::Denied | ResponseKind::Other(_) => Revalidation::Denied(CredentialOwner::Client),
            ResponseKind::Unavailable(cause) => Revalidation::Unavailable(cause),
        }
    }

    /// Whether a tag may be said to name `digest` from now on: not while that is only a promise and another copy is
    /// held, for were the promise broken, the held copy could no longer be found by its tag.
    async fn may_name(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        reference: &Reference,
        accept: &Accept,
        digest: &Digest,
    ) -> bool {
        let Reference::Tag(tag) = reference else {
            return true;
        };
        self.cached_manifest(site, repository, digest).await.is_some()
            || self
                .copies_of_tag(site, repository, tag, Some(accept))
                .await
                .is_none()
    }

    /// Keeps which digest a tag names now, and that the digest was seen in this repository.
    pub(super) async fn learn_name(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        reference: &Reference,
        digest: Digest,
        media_type: Option<&MediaType>,
    ) {
        let UpstreamRequest {
            site,
            repository,
            accept,
            asked_at,
            ..
        } = wanted;
        self.add_member(site, repository, digest).await;
        let (Reference::Tag(tag), Some(media_type)) = (reference, media_type) else {
            return;
        };
        let key = TagKey {
            upstream: site.name().into(),
            repository: repository.clone(),
            tag: tag.clone(),
        };
        let now = self.clock.now();
        let variant = Variant {
            accept: accept.key(),
            digest,
            media_type: media_type.clone(),
            accepts_indexes: accept.lists_indexes(),
            confirmed_at: *asked_at,
            first_seen_at: now,
            previous: None,
            history: Vec::new(),
        };
        let kept = self.store.record_response(key, variant, now).await;
        report(kept, "keep which digest a tag names");
    }

    /// Keeps the proof that the upstream has `digest` in this repository.
    pub(super) async fn add_member(
        &self,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: Digest,
    ) {
        const DEED: &str = "keep that a digest was seen in a repository";
        match self.store.add_member(site.name(), repository, &digest) {
            MembershipUpdate::Known => {}
            // What follows finds it in memory, and nobody waits for the disk.
            MembershipUpdate::Pending(unwritten) => {
                let store = self.store.clone();
                tokio::spawn(async move { report(store.persist_membership(unwritten).await, DEED) });
            }
            MembershipUpdate::NotInMemory => {
                let (site, repository) = (Arc::clone(site), repository.clone());
                let noted = self
                    .store
                    .write(move |store| store.add_member(site.name(), &repository, &digest))
                    .await;
                report(noted, DEED);
            }
        }
    }

    /// Whether `digest` was seen in this repository.
    pub(super) async fn is_member(
        self: &Arc<Self>,
        site: &Arc<UpstreamRegistry>,
        repository: &Repository,
        digest: Digest,
    ) -> bool {
        self.look_up(site, repository, move |cached| cached.is_member(&digest))
            .await
    }
}

/// See [`ProxyService::may_be_made_up`]. Whether a digest is named here is no stranger's to find out by how soon, and for how
/// long, the upstream is asked about it.
fn may_be_made_up(endpoint: &Endpoint, is_strangers: bool, is_named: impl FnOnce(Digest) -> bool) -> bool {
    match endpoint {
        Endpoint::Manifest {
            reference: Reference::Digest(AnyDigest::Supported(digest)),
            ..
        }
        | Endpoint::Blob {
            digest: AnyDigest::Supported(digest),
            ..
        } => is_strangers || !is_named(*digest),
        Endpoint::Manifest {
            reference: Reference::Digest(AnyDigest::Unsupported(_)),
            ..
        }
        | Endpoint::Blob { .. } => true,
        _ => false,
    }
}

/// A cache that cannot remember is slower, not broken: tell it and go on.
pub(super) fn report<T>(done: Result<T, crate::store::StoreError>, deed: &str) {
    if let Err(fault) = done {
        tracing::warn!(%fault, "could not {deed}");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use http::Method;

    use super::*;

    #[test]
    fn r01_strangers_digest_is_made_up_whatever_is_named() {
        let digest = Digest::of(crate::oci::Algorithm::Sha256, b"layer");
        for (path, by_digest) in [
            (format!("/v2/team/demo/blobs/{digest}"), true),
            (format!("/v2/team/demo/manifests/{digest}"), true),
            ("/v2/team/demo/manifests/1".to_owned(), false),
        ] {
            let endpoint = Endpoint::parse(&Method::HEAD, &path, None).unwrap();
            let may_be = |is_strangers, is_named| may_be_made_up(&endpoint, is_strangers, |_| is_named);
            assert_eq!(may_be(true, true), may_be(true, false), "{path}");
            assert_eq!(may_be(true, true), by_digest, "{path}");
            assert_eq!((may_be(false, true), may_be(false, false)), (false, by_digest));
        }
    }
}
