//! Blob requests: serve from the store, follow a running download, or lead a new one.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use http::uri::Authority;
use tokio::time::Instant;

use super::evidence::CacheView;
use super::manifest_fetch::UpstreamRequest;
use super::pipeline::{ReadContext, denied, denied_after};
use super::possession::Sample;
use super::revalidate::Revalidated;
use super::shared_read::SharedRight;
use super::shared_records::Given;
use super::source::UpstreamSource;
use super::{BlobBody, ProxyResponse, Request, ServeInfo, ServeReason, passthrough};
use crate::download::{AHEAD_BYTES_MAX, DownloadError, JoinOptions, Joined, Reader, WITHHELD_BYTES};
use crate::oci::{AnyDigest, Digest, MediaType, RangeRequest, UpstreamFailure};
use crate::policy::{
    Authorization, CacheState, CachedEntry, Completeness, ContentKind, Decision, DenyReason, HitReason,
    MissReason, Policy, Revalidation, decide,
};
use crate::queue::{AcquireError, Class, Demand, Peer};
use crate::shared::{REDIRECT_BYTES_MIN, RedirectClient, SharedContent};
use crate::upstream::{RangeSpec, UpstreamResponse};

/// Joins after a leader failed on its own authorization. Each retry may become the leader.
const JOINS_MAX: usize = 4;

/// Longest wait for the first byte before the response head is sent. Clients give up after 30 s without a response.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest wait to learn the size of a blob before the response head is sent. Clients give up after 30 s without a
/// response.
const SIZE_WAIT_MAX: Duration = Duration::from_secs(5);

/// Longest wait for a queued download to start before the response head is sent. Clients give up after 30 s without a
/// response.
const QUEUE_WAIT_MAX: Duration = Duration::from_secs(5);

/// Larger blobs queue behind smaller ones.
const SMALL_BYTES_MAX: u64 = 1024 * 1024;

/// A blob with a larger size hint does not arrive within `SIZE_WAIT_MAX` at 50 Mbit/s. Its response head waits at
/// most `LARGE_SIZE_WAIT_MAX`.
const SIZE_WAIT_BYTES_MAX: u64 = 32 * 1024 * 1024;
/// Longest wait to learn the size of a large blob.
const LARGE_SIZE_WAIT_MAX: Duration = Duration::from_secs(1);

impl ReadContext<'_> {
    pub(super) async fn blob(&self, digest: &AnyDigest) -> ProxyResponse {
        let digest = match digest {
            AnyDigest::Supported(digest) => *digest,
            AnyDigest::Unsupported(_) => return Box::pin(self.fetch_uncached(u64::MAX)).await,
        };
        if self.proxy.shared.has_records() {
            // Boxed, so that the future of all other requests stays small.
            return Box::pin(self.blob_with_records(digest)).await;
        }
        self.blob_of_upstream(digest).await
    }

    /// The response from the shared storage if the upstream is unavailable and other caches have seen the blob.
    async fn blob_with_records(&self, digest: Digest) -> ProxyResponse {
        if let Some(cause) = self.known_outage()
            && let Some(recorded) = self.recorded_blob(digest, cause).await
        {
            return recorded;
        }
        let outcome = self.blob_of_upstream(digest).await;
        if let Some(read) = self.unmarked_if_revoked(Given::of(&outcome)).await {
            return read.blob_of_upstream(digest).await;
        }
        if self.may_use_records_alone() && matches!(outcome, ProxyResponse::Denied(_)) {
            return self.blob_without_upstream(digest).await.unwrap_or(outcome);
        }
        match self.outage(&outcome) {
            Some(cause) => self.recorded_blob(digest, cause).await.unwrap_or(outcome),
            None => outcome,
        }
    }

    async fn recorded_blob(&self, digest: Digest, cause: UpstreamFailure) -> Option<ProxyResponse> {
        if !self.is_permitted_by_records().await {
            return None;
        }
        // The grants may have changed.
        let read = ReadContext::new(self.proxy, self.request, self.repository).await;
        let read = read.with_recorded_grant().await;
        let revalidation = Revalidation::Unavailable(cause);
        BlobRequest { read: &read, digest }
            .serve_recorded(revalidation)
            .await
    }

    /// The blob from the shared storage, under the policy `never`.
    async fn blob_without_upstream(&self, digest: Digest) -> Option<ProxyResponse> {
        let read = self.permitted_by_records().await?;
        BlobRequest { read: &read, digest }
            .serve_recorded(Revalidation::NotDone)
            .await
    }

    async fn blob_of_upstream(&self, digest: Digest) -> ProxyResponse {
        let blob_request = BlobRequest { read: self, digest };
        if self.has_no_grant() {
            return Box::pin(blob_request.authorize_first()).await;
        }
        let (cached, is_in_repository) = blob_request.cached_content().await;
        let state = blob_request.state(cached.is_some(), is_in_repository);
        match (decide(&state), cached) {
            // Boxed, here and below: a request that goes upstream can afford it, and the future of all others stays
            // small.
            (Decision::Serve(served), Some((_, size))) if self.request.for_push => {
                Box::pin(blob_request.head_for_push(&state, size, served)).await
            }
            (Decision::Serve(served), Some((bytes, size))) => {
                if let Some(client) = blob_request.redirect_client(true)
                    && let Some(redirect) = Box::pin(blob_request.redirect(Some(size), client)).await
                {
                    return redirect;
                }
                blob_request.serve(bytes, size, served)
            }
            (Decision::Deny(refusal), _) => denied(refusal, None, false),
            (Decision::Revalidate, cached) => {
                Box::pin(blob_request.revalidate_and_serve(&state, cached)).await
            }
            (Decision::Fetch(_) | Decision::Serve(_) | Decision::ProbeLayers(_), _) => {
                Box::pin(blob_request.fetch(&state)).await
            }
        }
    }
}

impl CacheView<'_> {
    fn content(&self, digest: &Digest, head: bool) -> Option<(BlobBody, u64)> {
        if let Some(bytes) = self.view.small_blob(digest) {
            let size = bytes.len() as u64;
            return Some((BlobBody::Memory(bytes), size));
        }
        let image = format_args!("{}@{digest}", self.repository);
        let blob = self.proxy.cached(self.registry, &image, self.view.blob(digest))?;
        let size = blob.size;
        let content = if head {
            BlobBody::Head
        } else {
            BlobBody::File(blob)
        };
        Some((content, size))
    }
}

/// One request for a blob.
struct BlobRequest<'a> {
    read: &'a ReadContext<'a>,
    digest: Digest,
}

impl<'a> Deref for BlobRequest<'a> {
    type Target = ReadContext<'a>;

    fn deref(&self) -> &Self::Target {
        self.read
    }
}

impl BlobRequest<'_> {
    /// Cached content of the blob with its size, and whether the blob belongs to the repository.
    async fn cached_content(&self) -> (Option<(BlobBody, u64)>, bool) {
        let (digest, head) = (self.digest, self.request.head);
        self.proxy
            .read_cache(&self.request.registry, self.repository, move |cached| {
                (cached.content(&digest, head), cached.is_member(&digest))
            })
            .await
    }

    fn state(&self, is_cached: bool, is_in_repository: bool) -> CacheState {
        let (registry, digest) = (&self.request.registry, self.digest);
        let cached = is_cached.then(|| CachedEntry {
            digest,
            confirmed_at: self.request.now,
            is_moved: false,
            completeness: Completeness::Complete,
            is_invalidated: self
                .proxy
                .is_invalidated(registry, self.repository, digest.into()),
        });
        self.read
            .state(ContentKind::Blob, cached, is_in_repository)
            .with_blocked(self.blocked(digest))
    }

    /// Serves the blob without the upstream, which is unavailable or may not be asked: from the store or from the shared
    /// storage. `None`: it is not served.
    async fn serve_recorded(&self, revalidation: Revalidation) -> Option<ProxyResponse> {
        let (cached, is_in_repository) = self.cached_content().await;
        // As a cached copy, because the shared storage has it.
        let state = self.state(true, is_in_repository).with_revalidation(revalidation);
        let Decision::Serve(served) = decide(&state) else {
            return None;
        };
        if let Some((content, size)) = cached {
            return Some(self.serve(content, size, served));
        }
        let content = SharedContent::Blob(self.digest);
        if self.request.head {
            let size = self.proxy.shared.size_of(content).await?;
            return Some(self.respond(BlobBody::Head, Some(size), ServeReason::Shared));
        }
        if !self.proxy.shared.has(content).await {
            return None;
        }
        let (upstream_request, options) = (self.upstream_request(), self.options());
        let joining = self
            .proxy
            .downloads
            .join(self.digest, upstream_request.requester(), options);
        let (reader, reason) = match joining.await {
            Joined::Leader(leader) => {
                let source = UpstreamSource::new(self.proxy, upstream_request, self.digest);
                let source = source.for_leader(&leader).with_permitted_shared();
                let source = match revalidation {
                    Revalidation::NotDone => source.without_upstream(),
                    _ => source,
                };
                (leader.start(source), ServeReason::Shared)
            }
            Joined::Follower { reader, .. } => (reader, ServeReason::Collapsed),
            Joined::Cached(cached) => {
                let size = cached.size;
                return Some(self.respond(BlobBody::File(cached), Some(size), ServeReason::Collapsed));
            }
        };
        let leads = reason == ServeReason::Shared;
        self.read(reader, reason, &state, leads).await.ok()
    }

    /// For a caller without a grant: see [`ReadContext::has_no_grant`].
    async fn authorize_first(&self) -> ProxyResponse {
        let unseen = self.read.state(ContentKind::Blob, None, false);
        if let Decision::Deny(refusal) = decide(&unseen) {
            return denied(refusal, None, false);
        }
        let revalidated = self.revalidate(&unseen).await;
        if revalidated.is_unproven() {
            // Forward the upstream's own response, because it proves nothing. Cached content is not used.
            return if self.request.head {
                self.head_response(revalidated.response.and_then(|response| response.length))
            } else {
                self.pass_through(&unseen).await
            };
        }
        if !revalidated.is_success() {
            return deny_uncached(&unseen, revalidated);
        }
        let (cached, _) = self.cached_content().await;
        match cached {
            Some((content, size)) => self.serve(content, size, HitReason::Immutable),
            None if self.request.head => self.respond_to_head(&unseen, revalidated),
            None => {
                let authorization = Authorization::Granted;
                self.fetch(&CacheState {
                    authorization,
                    ..unseen
                })
                .await
            }
        }
    }

    async fn revalidate_and_serve(
        &self,
        state: &CacheState,
        content: Option<(BlobBody, u64)>,
    ) -> ProxyResponse {
        let mut revalidated = self.revalidate(state).await;
        if revalidated.is_unproven() && self.request.head {
            return self.head_response(revalidated.response.and_then(|response| response.length));
        }
        if revalidated.is_unproven()
            && let Some((content, _)) = &content
        {
            revalidated = self.prove_possession(Sample::of_content(content).await).await;
        }
        match (
            decide(&state.with_revalidation(revalidated.revalidation)),
            content,
        ) {
            (Decision::Serve(served), Some((content, size))) => self.serve(content, size, served),
            (Decision::Deny(refusal), _) => denied_after(refusal, revalidated),
            // The blob was evicted during the revalidation.
            _ => self.fetch(state).await,
        }
    }

    /// `HEAD` before a push. The registry may have garbage-collected a cached blob, and a push that skips its upload
    /// would fail. While the registry is unavailable, no push can succeed anyway.
    async fn head_for_push(&self, state: &CacheState, size: u64, served: HitReason) -> ProxyResponse {
        let revalidated = self.revalidate(state).await;
        match revalidated.revalidation {
            Revalidation::NotFound if state.authorization != Authorization::Granted => {
                denied(DenyReason::NotFound, revalidated.response, false)
            }
            Revalidation::NotFound => {
                let own = Arc::clone(&self.request.registry);
                let (repository, digest) = (self.repository.clone(), self.digest);
                let gone = self
                    .proxy
                    .store
                    .write(move |store| store.remove_member(own.name(), &repository, &digest))
                    .await;
                super::log_store_error(gone, "remove membership of deleted blob");
                denied(DenyReason::NotFound, revalidated.response, false)
            }
            Revalidation::Denied(_) => denied_after(DenyReason::Forbidden, revalidated),
            Revalidation::Blocked(digest) => denied(DenyReason::Blocked(digest), revalidated.response, false),
            _ => self.serve(BlobBody::Head, size, served),
        }
    }

    /// The client, if this request may be redirected to the shared storage. Only a `GET` over the network may: the storage
    /// rejects a `HEAD` of a URL that was signed for `GET`.
    fn redirect_client(&self, is_cached: bool) -> Option<RedirectClient<'_>> {
        let Peer::Address(address) = self.request.peer else {
            return None;
        };
        let client = RedirectClient {
            address,
            host: self.request.host.as_ref().map(Authority::host),
            has_credential: self.request.authorization.is_some(),
            is_resuming: self.request.range.is_resumption(),
        };
        let may = !self.request.head && self.proxy.shared.redirects(is_cached, &client);
        may.then_some(client)
    }

    /// The redirect of a client that may read the blob, if the shared storage has it.
    async fn redirect(&self, size: Option<u64>, client: RedirectClient<'_>) -> Option<ProxyResponse> {
        if size.is_some_and(|size| size < REDIRECT_BYTES_MIN) {
            return None;
        }
        let (shared, time) = (&self.proxy.shared, self.proxy.clock.now());
        let url = shared.presigned((self.digest, size), &client, time).await?;
        let location = HeaderValue::from_maybe_shared(Bytes::from(url)).ok()?;
        Some(self.respond(BlobBody::Redirect(location), size, ServeReason::Redirected))
    }

    /// The redirect for a blob that is not cached. `Some` also if the upstream refuses the blob to this client.
    async fn redirect_uncached(&self, state: &CacheState) -> Option<ProxyResponse> {
        let client = self.redirect_client(false)?;
        if self.proxy.downloads.is_arriving(&self.digest) {
            return None;
        }
        match self
            .proxy
            .shared_right(&self.upstream_request(), self.digest)
            .await
        {
            SharedRight::Granted => self.redirect(self.stated_size(), client).await,
            SharedRight::UpstreamOnly => None,
            SharedRight::Refused(response) => {
                let revalidated = Revalidated {
                    revalidation: self.classify(&response).await,
                    response: Some(response),
                };
                Some(deny_uncached(state, revalidated))
            }
        }
    }

    fn serve(&self, content: BlobBody, size: u64, served: HitReason) -> ProxyResponse {
        self.respond(content, Some(size), ServeReason::Cached(served))
    }

    fn respond(&self, content: BlobBody, size: Option<u64>, reason: ServeReason) -> ProxyResponse {
        let content = if self.request.head {
            BlobBody::Head
        } else {
            content
        };
        ProxyResponse::Blob {
            digest: self.digest,
            size,
            content,
            info: ServeInfo {
                reason,
                confirmed_at: None,
            },
        }
    }

    async fn fetch(&self, state: &CacheState) -> ProxyResponse {
        if self.request.head {
            return self.head(state).await;
        }
        if let Some(redirect) = self.redirect_uncached(state).await {
            return redirect;
        }
        let mut last = None;
        for _ in 0..JOINS_MAX {
            match self.join(state).await {
                Ok(outcome) => return outcome,
                // The leader was denied, not this caller: join again, perhaps as leader.
                Err(failure) => last = Some(failure),
            }
        }
        let cause = match last.as_deref() {
            Some(DownloadError::NotStarted(response)) => response.cause(),
            _ if !self.may_ask_upstream() => UpstreamFailure::PolicyNever,
            _ => UpstreamFailure::Abandoned,
        };
        denied(DenyReason::UpstreamUnavailable(cause), None, false)
    }

    async fn head(&self, state: &CacheState) -> ProxyResponse {
        // Verified, but not committed to the store yet.
        if state.authorization == Authorization::Granted
            && let Some(size) = self.proxy.downloads.verified_size(&self.digest)
        {
            return self.serve(BlobBody::Head, size, HitReason::Immutable);
        }
        let revalidated = self.revalidate(state).await;
        self.respond_to_head(state, revalidated)
    }

    fn respond_to_head(&self, state: &CacheState, revalidated: Revalidated) -> ProxyResponse {
        match (revalidated.revalidation, &revalidated.response) {
            (Revalidation::Digest { .. } | Revalidation::NoDigest, Some(response)) => {
                self.head_response(response.length)
            }
            // Forwarded unproven; nothing is recorded from it.
            (_, Some(response)) if revalidated.is_unproven() => self.head_response(response.length),
            _ => deny_uncached(state, revalidated),
        }
    }

    fn head_response(&self, size: Option<u64>) -> ProxyResponse {
        self.respond(BlobBody::Head, size, ServeReason::Fetched(MissReason::NotCached))
    }

    /// Result of the revalidation after the sample was requested from the upstream.
    async fn prove_possession(&self, sample: Option<Sample>) -> Revalidated {
        let Some(sample) = sample else {
            return Revalidated::unavailable(UpstreamFailure::NotRegistry);
        };
        match self
            .proxy
            .request_sample(&self.upstream_request(), self.digest, &sample)
            .await
        {
            Ok(()) => Revalidated {
                revalidation: Revalidation::NoDigest,
                response: None,
            },
            Err(response) => Revalidated {
                revalidation: self.classify(&response).await,
                response: Some(Arc::new(response)),
            },
        }
    }

    async fn join(&self, state: &CacheState) -> Result<ProxyResponse, Arc<DownloadError>> {
        let upstream_request = self.upstream_request();
        let options = self.options();
        match self
            .proxy
            .downloads
            .join(self.digest, upstream_request.requester(), options)
            .await
        {
            Joined::Leader(leader) => {
                let source = UpstreamSource::new(self.proxy, upstream_request, self.digest);
                let (source, is_shared) = source.for_leader(&leader).with_shared();
                let reader = leader.start(source);
                let reason = ServeReason::Fetched(MissReason::NotCached);
                let mut outcome = self.read(reader, reason, state, true).await;
                if let Ok(ProxyResponse::Blob { info, .. }) = &mut outcome
                    && is_shared.load(Ordering::Relaxed)
                {
                    info.reason = ServeReason::Shared;
                }
                outcome
            }
            Joined::Follower {
                reader,
                began_by_same: Some(started_at),
            } if self.is_still_authorized(&upstream_request, started_at) => {
                self.read(reader, ServeReason::Collapsed, state, true).await
            }
            Joined::Follower { reader, .. } => {
                if let Some(refusal) = self.authorize_follower(state, Sample::of_reader(&reader)).await {
                    return Ok(refusal);
                }
                self.read(reader, ServeReason::Collapsed, state, false).await
            }
            Joined::Cached(cached) => {
                if let Some(refusal) = self.authorize_follower(state, Sample::of_file(&cached)).await {
                    return Ok(refusal);
                }
                let size = cached.size;
                Ok(self.respond(BlobBody::File(cached), Some(size), ServeReason::Collapsed))
            }
        }
    }

    /// Priority and extent of the download: small blobs first, blobs without a size hint last.
    fn options(&self) -> JoinOptions {
        let class = match self.stated_size() {
            Some(size) if size <= SMALL_BYTES_MAX => Class::Interactive,
            _ => Class::Bulk,
        };
        let bytes = self.request.range.uncached_bytes_max();
        JoinOptions {
            demand: Demand {
                class,
                ..self.caller.demand(&self.request.endpoint)
            },
            wants_complete: bytes.is_none_or(|bytes| bytes > AHEAD_BYTES_MAX),
        }
    }

    /// Size hint from a manifest of this repository.
    fn stated_size(&self) -> Option<u64> {
        self.proxy
            .size_hints
            .get(&self.request.registry, self.repository, self.digest)
    }

    /// Whether the response head may be sent while the download is queued. The principal must be authorized, a
    /// manifest here must reference the blob, the request must start at byte 0, and the client must be able to detect
    /// a truncated body.
    fn may_respond_while_queued(&self) -> bool {
        !self.request.needs_length
            && self.is_authorized_here()
            && self.stated_size().is_some()
            && self.request.range == RangeRequest::None
    }

    /// Whether this principal may follow a download that it started itself. The `GET` of that download authorized it,
    /// unless a denial followed or the grant would have expired. A download from the shared storage had no `GET`.
    fn is_still_authorized(&self, upstream_request: &UpstreamRequest, started_at: Instant) -> bool {
        started_at.elapsed() < self.rule.grant_ttl && !self.proxy.denied_since(upstream_request, started_at)
    }

    /// Authorizes a follower by its own grant or by a revalidation of its own. `None` if authorized, else the denial.
    async fn authorize_follower(
        &self,
        state: &CacheState,
        sample: impl Future<Output = Option<Sample>>,
    ) -> Option<ProxyResponse> {
        if state.authorization == Authorization::Granted || self.may_join_download() {
            return None;
        }
        let mut revalidated = self.revalidate(state).await;
        if revalidated.is_unproven() {
            revalidated = self.prove_possession(sample.await).await;
        }
        (!revalidated.is_success()).then(|| deny_uncached(state, revalidated))
    }

    /// Whether the running download belongs to this repository and the principal is authorized there.
    fn may_join_download(&self) -> bool {
        let arriving = &self.proxy.active_downloads;
        self.is_authorized_here() && arriving.contains(&self.request.registry, self.repository, self.digest)
    }

    /// Whether this principal has a current grant in this repository.
    fn is_authorized_here(&self) -> bool {
        self.authorization(true) == Authorization::Granted
    }

    async fn read(
        &self,
        mut reader: Reader,
        reason: ServeReason,
        state: &CacheState,
        leads: bool,
    ) -> Result<ProxyResponse, Arc<DownloadError>> {
        let opened = async {
            if self.may_respond_while_queued() && is_still_queued(&mut reader).await {
                return Ok(None);
            }
            wait_for_size(&mut reader, self.stated_size()).await
        };
        let failure = match opened.await {
            Ok(size) => {
                if self.may_ask_upstream() {
                    let source = UpstreamSource::new(self.proxy, self.upstream_request(), self.digest);
                    reader = reader.with_range_source(source);
                }
                return Ok(self.respond(BlobBody::Download(Box::new(reader)), size, reason));
            }
            Err(failure) => failure,
        };
        match failure.as_ref() {
            DownloadError::NotStarted(response) if leads => {
                let revalidated = Revalidated {
                    revalidation: self.classify(response).await,
                    response: Some(Arc::new(response.as_ref().clone())),
                };
                Ok(deny_uncached(state, revalidated))
            }
            DownloadError::NotStarted(_) | DownloadError::Abandoned => Err(failure),
            DownloadError::Unstorable(_) | DownloadError::Store(_) | DownloadError::DiskFailed(_)
                if !self.may_ask_upstream() =>
            {
                tracing::warn!(digest = %self.digest, %failure, "failed to store blob, which policy forbids to forward");
                Err(failure)
            }
            DownloadError::Unstorable(fault) => {
                tracing::warn!(digest = %self.digest, %fault, "failed to store blob, forwarding it instead");
                Ok(self.pass_through(state).await)
            }
            DownloadError::QueueFull(full) => Ok(queue_full(AcquireError::Full(*full))),
            DownloadError::Interrupted(cause) => {
                Ok(denied(DenyReason::UpstreamUnavailable(*cause), None, false))
            }
            DownloadError::DigestMismatch(_) => Ok(denied(
                DenyReason::UpstreamUnavailable(UpstreamFailure::DigestMismatch),
                None,
                false,
            )),
            DownloadError::Store(_) | DownloadError::DiskFailed(_) => Ok(self.pass_through(state).await),
        }
    }

    /// Whether any request may reach the upstream.
    fn may_ask_upstream(&self) -> bool {
        self.rule.policy != Policy::Never
    }

    /// Forwards the upstream's bytes and verifies them in transit. Used if the disk cannot store the blob, or if only
    /// the bytes can prove access. The grant is recorded after verification.
    async fn pass_through(&self, state: &CacheState) -> ProxyResponse {
        let Request {
            registry,
            endpoint,
            accept,
            ..
        } = self.request;
        let permit = self
            .proxy
            .downloads
            .admit(registry.name(), self.options().demand)
            .await;
        let permit = match permit {
            Ok(permit) => permit,
            Err(denied) => return queue_full(denied),
        };
        let sent_at = Instant::now();
        let part = RangeSpec {
            is_client_paced: true,
            ..RangeSpec::default()
        };
        let fetched = registry
            .upstream()
            .get_part(&self.caller, endpoint, accept, part)
            .await;
        let fetched = match fetched {
            Ok(fetched) => fetched.holding(permit),
            Err(response) => {
                self.proxy
                    .record_response(&self.upstream_request(), &response, sent_at)
                    .await;
                let revalidated = Revalidated {
                    revalidation: self.classify(&response).await,
                    response: Some(Arc::new(response)),
                };
                return deny_uncached(state, revalidated);
            }
        };
        let is_page = fetched.media_type.as_ref().is_some_and(MediaType::is_page);
        let size = fetched.length;
        let (proxy, upstream_request, digest) =
            (Arc::clone(self.proxy), self.upstream_request(), self.digest);
        let mut passing = passthrough::VerifyingStream::new(digest, fetched).when_verified(async move {
            proxy
                .record_verified_blob(&upstream_request, (digest, size.unwrap_or(0)), sent_at)
                .await;
        });
        // A small blob is sent only after verification, so a mismatch can still become an error response.
        let content = if is_page || size.is_some_and(|size| size <= WITHHELD_BYTES) {
            match passing.next().await.transpose() {
                Ok(bytes) if passing.is_over() => BlobBody::Memory(bytes.unwrap_or_default()),
                failed => {
                    let cause = match failed {
                        Ok(_) | Err(UpstreamFailure::DigestMismatch) if is_page => {
                            UpstreamFailure::NotRegistry
                        }
                        Ok(_) => UpstreamFailure::Malformed,
                        Err(cause) => cause,
                    };
                    return deny_uncached(state, Revalidated::unavailable(cause));
                }
            }
        } else {
            BlobBody::Passthrough(Box::new(passing))
        };
        self.respond(content, size, ServeReason::Passthrough)
    }
}

/// Denial for a full download queue.
fn queue_full(refused_place: AcquireError) -> ProxyResponse {
    let response = UpstreamResponse::not_admitted(refused_place);
    denied(
        DenyReason::UpstreamUnavailable(response.cause()),
        Some(Arc::new(response)),
        false,
    )
}

/// Waits for the upstream response. Returns whether the download is still queued instead.
async fn is_still_queued(reader: &mut Reader) -> bool {
    let opened = tokio::time::timeout(QUEUE_WAIT_MAX, reader.info()).await;
    opened.is_err() && reader.is_queued()
}

/// Waits until the response head can be sent. Returns the blob's size if it is known by then; the size hint `stated`
/// never counts as the size.
async fn wait_for_size(reader: &mut Reader, stated: Option<u64>) -> Result<Option<u64>, Arc<DownloadError>> {
    match reader.info().await?.size {
        // A small blob is sent only after verification, so a mismatch can still become an error response.
        Some(size) if size <= WITHHELD_BYTES => reader.settled().await.map(Some),
        Some(size) => wait_for_first_byte(reader).await.map(|()| Some(size)),
        // Many clients need a length that the upstream did not state. It is known if the download ends soon.
        None => {
            let is_large = stated.is_some_and(|stated| stated > SIZE_WAIT_BYTES_MAX);
            let within = if is_large {
                LARGE_SIZE_WAIT_MAX
            } else {
                SIZE_WAIT_MAX
            };
            match tokio::time::timeout(within, reader.settled()).await {
                Ok(settled) => settled.map(Some),
                Err(_) => wait_for_first_byte(reader).await.map(|()| None),
            }
        }
    }
}

/// Before the first byte, an upstream failure can still become an error response instead of a truncated 200.
async fn wait_for_first_byte(reader: &mut Reader) -> Result<(), Arc<DownloadError>> {
    tokio::time::timeout(FIRST_BYTE_TIMEOUT, reader.first_bytes())
        .await
        .unwrap_or(Ok(()))
}

fn deny_uncached(state: &CacheState, revalidated: Revalidated) -> ProxyResponse {
    let state = CacheState {
        cached: None,
        revalidation: revalidated.revalidation,
        ..*state
    };
    match decide(&state) {
        Decision::Deny(refusal) => denied_after(refusal, revalidated),
        // Success where a denial was expected: the upstream contradicts itself.
        _ => denied(
            DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
            revalidated.response,
            false,
        ),
    }
}
