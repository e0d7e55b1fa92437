//! Blobs: held, joined, or led.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::cache_view::CacheView;
use super::manifest::refused;
use super::manifest_fetch::UpstreamRequest;
use super::possession::Sample;
use super::revalidate::Revalidated;
use super::source::UpstreamSource;
use super::{
    AuthContext, BlobBody, ProxyResponse, ProxyService, Request, ServeInfo, ServeReason, passthrough,
};
use crate::download::{AHEAD_BYTES_MAX, Failure, Joined, Reader, WITHHELD_BYTES, Wish};
use crate::oci::{AnyDigest, Digest, MediaType, RangeRequest, Repository, UpstreamFailure};
use crate::policy::rules::EffectivePolicy;
use crate::policy::{
    Authorization, CacheState, CachedEntry, Completeness, ContentKind, CredentialOwner, Decision, DenyReason,
    HitReason, MissReason, Revalidation, decide,
};
use crate::queue::{Class, Demand, NoPlace};
use crate::upstream::UpstreamResponse;

/// How often one joins again after a leader failed on a right that was its own. Each time another leads.
const JOINS_MAX: usize = 4;

/// How long the answer with a blob waits for its first byte. Clients give up on an answer after 30 s.
const BEGINS_WITHIN: Duration = Duration::from_secs(20);

/// How long the answer with a blob of unknown size is kept back, in the hope to learn it. Clients give up on an answer
/// after 30 s.
const UNSIZED_WITHIN: Duration = Duration::from_secs(5);

/// How long the answer with a blob whose download waits for a place is kept back, in the hope to learn its size. Clients
/// give up on an answer after 30 s.
const QUEUED_WITHIN: Duration = Duration::from_secs(5);

/// A larger blob waits behind smaller ones.
const SMALL_BYTES_MAX: u64 = 1024 * 1024;

/// A blob that is stated to be larger does not arrive within that time at 50 Mbit/s, so it is …
const UNSIZED_BYTES_MAX: u64 = 32 * 1024 * 1024;
/// … kept back for no longer than this.
const LARGE_WITHIN: Duration = Duration::from_secs(1);

impl ProxyService {
    pub(super) async fn blob(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        digest: AnyDigest,
    ) -> ProxyResponse {
        let context = self.context(request, repository).await;
        let digest = match digest {
            AnyDigest::Supported(digest) => digest,
            AnyDigest::Unsupported(_) => {
                return passthrough::unverifiable(self, request, repository, &context.caller, u64::MAX).await;
            }
        };
        let rule = request.site.rule(repository, None);
        let road = BlobRequest {
            pull: self,
            request,
            repository,
            context: &context,
            rule,
            digest,
        };
        if context.is_stranger(rule, request.now) {
            return road.introduced().await;
        }
        let (copy, seen) = self.held_content(request, repository, digest).await;
        let situation = road.situation(copy.is_some(), seen);
        match (decide(&situation), copy) {
            (Decision::Serve(served), Some((_, size))) if request.for_push => {
                road.for_push(&situation, size, served).await
            }
            (Decision::Serve(served), Some((bytes, size))) => road.serve(bytes, size, served),
            (Decision::Deny(refusal), _) => refused(refusal, None, false),
            (Decision::Revalidate, copy) => road.after_asking(situation, copy).await,
            (Decision::Fetch(_) | Decision::Serve(_) | Decision::ProbeLayers(_), _) => {
                road.fetch(situation).await
            }
        }
    }

    /// The content of a blob with its size, if it is held, and whether it was seen in the repository.
    async fn held_content(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        digest: Digest,
    ) -> (Option<(BlobBody, u64)>, bool) {
        let head = request.head;
        self.look_up(&request.site, repository, move |cached| {
            (cached.content(&digest, head), cached.is_member(&digest))
        })
        .await
    }
}

impl CacheView<'_> {
    fn content(&self, digest: &Digest, head: bool) -> Option<(BlobBody, u64)> {
        if let Some(bytes) = self.view.small_blob(digest) {
            let size = bytes.len() as u64;
            return Some((BlobBody::Memory(bytes), size));
        }
        let image = format_args!("{}@{digest}", self.repository);
        let blob = self.pull.cached(self.site, &image, self.view.blob(digest))?;
        let size = blob.size;
        let content = if head {
            BlobBody::Head
        } else {
            BlobBody::File(blob)
        };
        Some((content, size))
    }
}

struct BlobRequest<'a> {
    pull: &'a Arc<ProxyService>,
    request: &'a Request,
    repository: &'a Repository,
    context: &'a AuthContext,
    rule: &'a EffectivePolicy,
    digest: Digest,
}

impl BlobRequest<'_> {
    fn situation(&self, is_held: bool, seen: bool) -> CacheState {
        let held = is_held.then_some(CachedEntry {
            digest: self.digest,
            confirmed_at: self.request.now,
            is_moved: false,
            completeness: Completeness::Complete,
            is_invalidated: self
                .pull
                .is_invalidated(&self.request.site, self.repository, self.digest.into()),
        });
        self.context
            .situation(self.rule, ContentKind::Blob, held, seen, self.request.now)
    }

    /// For one who has shown no right here: see [`AuthContext::is_stranger`].
    async fn introduced(&self) -> ProxyResponse {
        let now = self.request.now;
        let unseen = self
            .context
            .situation(self.rule, ContentKind::Blob, None, false, now);
        if let Decision::Deny(refusal) = decide(&unseen) {
            return refused(refusal, None, false);
        }
        let asked = self.ask(&unseen).await;
        if asked.is_unproven() {
            // The upstream's own words, and its own bytes: whatever is cached plays no part.
            return if self.request.head {
                self.head_given(asked.answer.and_then(|answer| answer.length))
            } else {
                self.pass_through(unseen).await
            };
        }
        if !matches!(
            asked.revalidation,
            Revalidation::Digest { .. } | Revalidation::NoDigest
        ) {
            return refuse_unheld(unseen, asked.revalidation, asked.answer);
        }
        let (held, _) = self
            .pull
            .held_content(self.request, self.repository, self.digest)
            .await;
        match held {
            Some((_, size)) if self.request.for_push => {
                self.serve(BlobBody::Head, size, HitReason::Immutable)
            }
            Some((content, size)) => self.serve(content, size, HitReason::Immutable),
            None if self.request.head => self.head_said(unseen, asked),
            None => {
                let standing = Authorization::Granted;
                self.fetch(CacheState {
                    authorization: standing,
                    ..unseen
                })
                .await
            }
        }
    }

    async fn after_asking(&self, situation: CacheState, content: Option<(BlobBody, u64)>) -> ProxyResponse {
        let mut asked = self.ask(&situation).await;
        if asked.is_unproven() && self.request.head {
            return self.head_given(asked.answer.and_then(|answer| answer.length));
        }
        if asked.is_unproven()
            && let Some((content, _)) = &content
        {
            asked = self.proven(Sample::of_content(content).await).await;
        }
        match (decide(&situation.with_revalidation(asked.revalidation)), content) {
            (Decision::Serve(served), Some((content, size))) => self.serve(content, size, served),
            (Decision::Deny(refusal), _) => refused(refusal, asked.answer, is_own(asked.revalidation)),
            // The copy went away while the question was out.
            _ => self.fetch(situation).await,
        }
    }

    /// A held blob may have been collected by the registry, and a push that leaves it out would fail there. While the
    /// registry is silent there is no push to spoil.
    async fn for_push(&self, situation: &CacheState, size: u64, served: HitReason) -> ProxyResponse {
        let asked = self.ask(situation).await;
        match asked.revalidation {
            Revalidation::NotFound => {
                let own = Arc::clone(&self.request.site);
                let (repository, digest) = (self.repository.clone(), self.digest);
                let gone = self
                    .pull
                    .store
                    .write(move |store| store.remove_member(own.name(), &repository, &digest))
                    .await;
                super::revalidate::report(gone, "forget a blob that the registry no longer has");
                refused(DenyReason::NotFound, asked.answer, false)
            }
            Revalidation::Denied(_) => {
                refused(DenyReason::Forbidden, asked.answer, is_own(asked.revalidation))
            }
            _ => self.serve(BlobBody::Head, size, served),
        }
    }

    /// Asks whether this principal may read this blob here. A yes is the proof that the upstream has it here.
    async fn ask(&self, situation: &CacheState) -> Revalidated {
        self.pull
            .ask(
                self.request,
                self.repository,
                self.context,
                situation,
                self.rule.revalidate_timeout,
            )
            .await
    }

    fn serve(&self, content: BlobBody, size: u64, served: HitReason) -> ProxyResponse {
        self.outcome(content, Some(size), ServeReason::Cached(served))
    }

    fn outcome(&self, content: BlobBody, size: Option<u64>, reason: ServeReason) -> ProxyResponse {
        let content = if self.request.head {
            BlobBody::Head
        } else {
            content
        };
        ProxyResponse::Blob {
            digest: self.digest,
            size,
            content,
            how: ServeInfo {
                reason,
                confirmed_at: None,
            },
        }
    }

    async fn fetch(&self, situation: CacheState) -> ProxyResponse {
        if self.request.head {
            return self.head(situation).await;
        }
        let mut last = None;
        for _ in 0..JOINS_MAX {
            match self.join(situation).await {
                Ok(outcome) => return outcome,
                // The leader's right was not ours: join again, perhaps to lead.
                Err(failure) => last = Some(failure),
            }
        }
        let cause = match last.as_deref() {
            Some(Failure::Refused(answer)) => answer.cause(),
            _ => UpstreamFailure::Busy,
        };
        refused(DenyReason::UpstreamUnavailable(cause), None, false)
    }

    async fn head(&self, situation: CacheState) -> ProxyResponse {
        // Verified and seen here, and not named yet.
        if situation.authorization == Authorization::Granted
            && let Some(size) = self.pull.downloads.verified_size(&self.digest)
        {
            return self.serve(BlobBody::Head, size, HitReason::Immutable);
        }
        let asked = self.ask(&situation).await;
        self.head_said(situation, asked)
    }

    fn head_said(&self, situation: CacheState, asked: Revalidated) -> ProxyResponse {
        match (asked.revalidation, &asked.answer) {
            (Revalidation::Digest { .. } | Revalidation::NoDigest, Some(answer)) => {
                self.head_given(answer.length)
            }
            // Passed on as the upstream's word: nothing is noted because of it.
            (_, Some(answer)) if asked.is_unproven() => self.head_given(answer.length),
            (revalidation, _) => refuse_unheld(situation, revalidation, asked.answer),
        }
    }

    fn head_given(&self, size: Option<u64>) -> ProxyResponse {
        self.outcome(BlobBody::Head, size, ServeReason::Fetched(MissReason::NotCached))
    }

    /// What asking comes to once the upstream was asked for the bytes as well.
    async fn proven(&self, sample: Option<Sample>) -> Revalidated {
        let Some(sample) = sample else {
            return Revalidated {
                revalidation: Revalidation::Unavailable(UpstreamFailure::NotRegistry),
                answer: None,
            };
        };
        let of = self.wanted();
        match self.pull.prove(&of, self.digest, &sample).await {
            Ok(()) => Revalidated {
                revalidation: Revalidation::NoDigest,
                answer: None,
            },
            Err(answer) => Revalidated {
                revalidation: self.pull.heard(&of.site, self.repository, &answer).await,
                answer: Some(Arc::new(answer)),
            },
        }
    }

    fn wanted(&self) -> UpstreamRequest {
        UpstreamRequest::of(self.request, self.repository, &self.context.caller)
    }

    async fn join(&self, situation: CacheState) -> Result<ProxyResponse, Arc<Failure>> {
        let of = self.wanted();
        let wish = self.wish();
        match self.pull.downloads.join(self.digest, of.requester(), wish).await {
            Joined::Leader(leader) => {
                let source = UpstreamSource::new(self.pull, of, self.digest).for_leader(&leader);
                let reader = leader.start(source);
                self.read(
                    reader,
                    ServeReason::Fetched(MissReason::NotCached),
                    situation,
                    true,
                )
                .await
            }
            Joined::Follower {
                reader,
                began_by_same: Some(began),
            } if self.still_holds(&of, began) => {
                self.read(reader, ServeReason::Collapsed, situation, true).await
            }
            Joined::Follower { reader, .. } => {
                if let Some(refusal) = self.own_right(situation, Sample::of_reader(&reader)).await {
                    return Ok(refusal);
                }
                self.read(reader, ServeReason::Collapsed, situation, false).await
            }
            Joined::Held(held) => {
                if let Some(refusal) = self.own_right(situation, Sample::of_file(&held)).await {
                    return Ok(refusal);
                }
                let size = held.size;
                Ok(self.outcome(BlobBody::File(held), Some(size), ServeReason::Collapsed))
            }
        }
    }

    /// What this request wants of the blob, and how urgently: what is small first, what no manifest here names last.
    fn wish(&self) -> Wish {
        let class = match self.stated_size() {
            Some(size) if size <= SMALL_BYTES_MAX => Class::Interactive,
            _ => Class::Bulk,
        };
        let bytes = self.request.range.bytes_max();
        Wish {
            demand: Demand {
                class,
                ..self.context.caller.demand(&self.request.endpoint)
            },
            is_whole: bytes.is_none_or(|bytes| bytes > AHEAD_BYTES_MAX),
        }
    }

    /// The size that a manifest of this repository states.
    fn stated_size(&self) -> Option<u64> {
        self.pull
            .sizes
            .of(&self.request.site, self.repository, self.digest)
    }

    /// Whether the answer may begin before the upstream was asked: this principal has a right to what a manifest here
    /// names, wants it from the start, and would notice if it broke off.
    fn may_begin_queued(&self) -> bool {
        !self.request.needs_length
            && self.may_read_here()
            && self.stated_size().is_some()
            && self.request.range == RangeRequest::None
    }

    /// Whether a transfer that this principal began here is still its own to read: the `GET` of the transfer is the
    /// question about its right, unless the upstream has refused it since or a grant would have lapsed by now.
    fn still_holds(&self, of: &UpstreamRequest, began: Instant) -> bool {
        began.elapsed() < self.rule.grant_ttl && !self.pull.refused_since(of, began)
    }

    /// Nobody follows on another's right: `None` if this principal has its own, else the refusal.
    async fn own_right(
        &self,
        situation: CacheState,
        sample: impl Future<Output = Option<Sample>>,
    ) -> Option<ProxyResponse> {
        if situation.authorization == Authorization::Granted || self.may_follow_here() {
            return None;
        }
        let mut asked = self.ask(&situation).await;
        if asked.is_unproven() {
            asked = self.proven(sample.await).await;
        }
        match asked.revalidation {
            Revalidation::Digest { .. } | Revalidation::NoDigest => None,
            revalidation => Some(refuse_unheld(situation, revalidation, asked.answer)),
        }
    }

    /// Whether what is arriving is the upstream's response for this very repository, in which this principal may read.
    fn may_follow_here(&self) -> bool {
        let arriving = &self.pull.arriving;
        self.may_read_here() && arriving.is_in(&self.request.site, self.repository, self.digest)
    }

    /// Whether this principal may read in this repository.
    fn may_read_here(&self) -> bool {
        let now = self.request.now;
        let here = self
            .context
            .situation(self.rule, ContentKind::Blob, None, true, now);
        here.authorization == Authorization::Granted
    }

    async fn read(
        &self,
        mut reader: Reader,
        reason: ServeReason,
        situation: CacheState,
        leads: bool,
    ) -> Result<ProxyResponse, Arc<Failure>> {
        let opened = async {
            if self.may_begin_queued() && is_still_queued(&mut reader).await {
                return Ok(None);
            }
            opened_with_size(&mut reader, self.stated_size()).await
        };
        let failure = match opened.await {
            Ok(size) => {
                let reader = reader.with_ahead(UpstreamSource::new(self.pull, self.wanted(), self.digest));
                return Ok(self.outcome(BlobBody::Download(reader), size, reason));
            }
            Err(failure) => failure,
        };
        match failure.as_ref() {
            Failure::Refused(answer) if leads => {
                let site = &self.request.site;
                let revalidation = self.pull.heard(site, self.repository, answer).await;
                let answer = Arc::new(answer.as_ref().clone());
                Ok(refuse_unheld(situation, revalidation, Some(answer)))
            }
            Failure::Refused(_) | Failure::Abandoned => Err(failure),
            Failure::Unstorable(fault) => {
                tracing::warn!(digest = %self.digest, %fault, "passing a blob through without storing it");
                Ok(self.pass_through(situation).await)
            }
            Failure::Crowded(full) => Ok(crowded(NoPlace::Full(*full))),
            Failure::Broken(cause) => Ok(refused(DenyReason::UpstreamUnavailable(*cause), None, false)),
            Failure::Wrong(_) => Ok(refused(
                DenyReason::UpstreamUnavailable(UpstreamFailure::DigestMismatch),
                None,
                false,
            )),
            Failure::Store(_) | Failure::Stranded(_) => Ok(self.pass_through(situation).await),
        }
    }

    /// The upstream's bytes as they come, verified on their way: where the disk cannot take them, and where nothing but
    /// the bytes can prove the right to them. What they prove is noted once they are verified.
    async fn pass_through(&self, situation: CacheState) -> ProxyResponse {
        let Request {
            site,
            endpoint,
            accept,
            ..
        } = self.request;
        let place = self.pull.downloads.admit(site.name(), self.wish().demand).await;
        let place = match place {
            Ok(place) => place,
            Err(refused) => return crowded(refused),
        };
        let asked_at = Instant::now();
        let fetched = site
            .upstream()
            .get(&self.context.caller, endpoint, accept, None)
            .await;
        let fetched = match fetched {
            Ok(fetched) => fetched.holding(place),
            Err(answer) => {
                self.pull.learn(&self.wanted(), &answer, asked_at).await;
                let revalidation = self.pull.heard(site, self.repository, &answer).await;
                return refuse_unheld(situation, revalidation, Some(Arc::new(answer)));
            }
        };
        let is_page = fetched.media_type.as_ref().is_some_and(MediaType::is_page);
        let size = fetched.length;
        let (pull, of, digest) = (Arc::clone(self.pull), self.wanted(), self.digest);
        let mut passing = passthrough::VerifyingStream::new(digest, fetched).when_verified(async move {
            pull.learn_blob(&of, (digest, size.unwrap_or(0)), asked_at).await;
        });
        // Nothing of a small blob is sent before it is verified, so its answer can still be an honest error.
        let content = if is_page || size.is_some_and(|size| size <= WITHHELD_BYTES) {
            match passing.next().await.transpose() {
                Ok(bytes) if passing.is_over() => BlobBody::Memory(bytes.unwrap_or_default()),
                Ok(_) | Err(UpstreamFailure::DigestMismatch) if is_page => {
                    return refuse_unheld(
                        situation,
                        Revalidation::Unavailable(UpstreamFailure::NotRegistry),
                        None,
                    );
                }
                Ok(_) => {
                    return refuse_unheld(
                        situation,
                        Revalidation::Unavailable(UpstreamFailure::Malformed),
                        None,
                    );
                }
                Err(cause) => return refuse_unheld(situation, Revalidation::Unavailable(cause), None),
            }
        } else {
            BlobBody::Passthrough(Box::new(passing))
        };
        self.outcome(content, size, ServeReason::Passthrough)
    }
}

/// Too many downloads wait already.
fn crowded(refused_place: NoPlace) -> ProxyResponse {
    let answer = UpstreamResponse::not_admitted(refused_place);
    refused(
        DenyReason::UpstreamUnavailable(answer.cause()),
        Some(Arc::new(answer)),
        false,
    )
}

/// Waits for the upstream's answer, and says whether the download waits for a place instead.
async fn is_still_queued(reader: &mut Reader) -> bool {
    let opened = tokio::time::timeout(QUEUED_WITHIN, reader.opened()).await;
    opened.is_err() && reader.is_queued()
}

/// Waits until the blob's answer can begin: its size, where it is known by then. What a manifest `stated` is no size.
async fn opened_with_size(reader: &mut Reader, stated: Option<u64>) -> Result<Option<u64>, Arc<Failure>> {
    match reader.opened().await?.size {
        // Nothing of a small blob can be sent before it is verified, so its answer can still be an honest error.
        Some(size) if size <= WITHHELD_BYTES => reader.settled().await.map(Some),
        Some(size) => begun(reader).await.map(|()| Some(size)),
        // Many clients want a length, and the upstream has not said it: if the transfer ends soon, it is known.
        None => {
            let is_large = stated.is_some_and(|stated| stated > UNSIZED_BYTES_MAX);
            let within = if is_large { LARGE_WITHIN } else { UNSIZED_WITHIN };
            match tokio::time::timeout(within, reader.settled()).await {
                Ok(settled) => settled.map(Some),
                Err(_) => begun(reader).await.map(|()| None),
            }
        }
    }
}

/// As long as there is not a byte, an upstream that breaks off is still an honest error, and no 200 that cannot be kept.
async fn begun(reader: &mut Reader) -> Result<(), Arc<Failure>> {
    tokio::time::timeout(BEGINS_WITHIN, reader.begun())
        .await
        .unwrap_or(Ok(()))
}

fn refuse_unheld(
    situation: CacheState,
    revalidation: Revalidation,
    answer: Option<Arc<UpstreamResponse>>,
) -> ProxyResponse {
    let situation = CacheState {
        cached: None,
        ..situation
    }
    .with_revalidation(revalidation);
    match decide(&situation) {
        Decision::Deny(refusal) => refused(refusal, answer, is_own(revalidation)),
        // A yes where a no was expected: the upstream contradicts itself.
        _ => refused(
            DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
            answer,
            false,
        ),
    }
}

fn is_own(revalidation: Revalidation) -> bool {
    revalidation == Revalidation::Denied(CredentialOwner::Proxy)
}
