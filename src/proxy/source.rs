//! Download source: one blob from the shared storage or its upstream, from a given offset, or from the upstream in ranges
//! over further connections.

mod claim;

use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, Either, select};
use http::StatusCode;
use tokio::time::{Instant, timeout};

use super::ProxyService;
use super::manifest_fetch::UpstreamRequest;
use super::shared_read::{AHEAD_MAX, Lacking, SharedRight};
use crate::download::{self, ByteStream, DownloadError, Leader, Observer, RangeSource, Source, Stream};
use crate::oci::{CacheHeaders, Digest, UpstreamFailure};
use crate::queue::{Class, Demand, Waiters};
use crate::shared::{ClaimMemory, ClaimRead, Lease, SharedContent, SharedObject, Unread};
use crate::telemetry::{self, SpanKind};
use crate::upstream::{
    Caller, Credential, RangeSpec, ResponseKind, ResponseStream, UpstreamResponse, UrlIndex,
};

/// Longest wait for a rate limit during a download. Clients that have received bytes wait longer than for a response
/// head.
const RESUME_RATE_LIMIT_WAIT_MAX: Duration = Duration::from_secs(120);

/// A blob at its upstream. Requests carry the leader's own credential, and a success is recorded as the leader's grant.
pub(super) struct UpstreamSource {
    proxy: Arc<ProxyService>,
    upstream_request: UpstreamRequest,
    digest: Digest,
    /// Time of the first request. Its response is recorded once.
    sent_at: Option<Instant>,
    /// The caller of the first request, if its credential was dropped.
    first_caller: Option<Caller>,
    /// URL of the last successful request.
    last_url: Option<UrlIndex>,
    /// Whether the stream from it was not interrupted.
    keeps_url: bool,
    started_at: Instant,
    /// Requests waiting for this download.
    waiters: Option<Waiters>,
    /// Set in a source of ranges only: the size that the blob must have.
    total: Option<u64>,
    /// Whether the upstream may send the blob. Under the policy `never` it may not.
    may_ask_upstream: bool,
    /// Set unless only the upstream may send the blob.
    shared: Option<SharedReading>,
    /// Reads what arrives. Set in the source of a leader only.
    observer: Option<Observer>,
    /// The claim on this blob, if this cache holds it.
    lease: Option<Lease>,
}

/// Times that a blob is opened in the shared storage. After that the upstream continues it.
const SHARED_OPENS_MAX: u32 = 2;

/// The opening of a blob in the shared storage.
type Opening = BoxFuture<'static, Result<SharedObject, Unread>>;

/// The part of a download that is read from the shared storage.
#[derive(Default)]
struct SharedReading {
    /// Whether the caller's right to read there is established.
    is_permitted: bool,
    opens: u32,
    /// When the last opening began, until the bucket has answered it.
    unanswered_since: Option<Instant>,
    /// Whether the bytes since the last opening at byte 0 came from there.
    is_from_start: bool,
    /// Age of the object, if it was read and the storage states it.
    age: Option<Duration>,
    is_used: Arc<AtomicBool>,
    claims: ClaimMemory,
    /// A read of the claim that began with that of the blob.
    claim_read: Option<ClaimRead>,
    /// Whether bytes came from the parts of another cache.
    is_followed: bool,
}

impl SharedReading {
    fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Relaxed)
    }
}

impl UpstreamSource {
    pub(super) fn new(
        proxy: &Arc<ProxyService>,
        mut upstream_request: UpstreamRequest,
        digest: Digest,
    ) -> Self {
        upstream_request.caller.trace = upstream_request.caller.trace.child().shared();
        Self {
            proxy: Arc::clone(proxy),
            upstream_request,
            digest,
            sent_at: None,
            first_caller: None,
            last_url: None,
            keeps_url: false,
            started_at: Instant::now(),
            waiters: None,
            total: None,
            may_ask_upstream: true,
            shared: None,
            observer: None,
            lease: None,
        }
    }

    /// Reads the blob from the shared storage if it is there and the caller may read it there. Also returns the flag that
    /// says whether the shared storage has begun to send it.
    pub(super) fn with_shared(self) -> (Self, Arc<AtomicBool>) {
        let reading = SharedReading::default();
        let is_used = Arc::clone(&reading.is_used);
        let shared = self.proxy.shared.is_readable().then_some(reading);
        (Self { shared, ..self }, is_used)
    }

    /// The same for a caller that may read it there, because its upstream is unavailable.
    pub(super) fn with_permitted_shared(self) -> Self {
        let shared = self.proxy.shared.is_readable().then(|| SharedReading {
            is_permitted: true,
            ..SharedReading::default()
        });
        Self { shared, ..self }
    }

    /// The same, without any request to the upstream.
    pub(super) fn without_upstream(self) -> Self {
        Self {
            may_ask_upstream: false,
            ..self
        }
    }

    /// Establishes whether the blob may be read from the shared storage. `Err`: the upstream has refused it. Also returns
    /// the blob if it was opened there ahead.
    async fn permit_shared(&mut self, from: u64) -> Result<Option<Opening>, UpstreamResponse> {
        if self.shared.as_ref().is_none_or(|reading| reading.is_permitted) {
            return Ok(None);
        }
        let waiters = self.waiters.clone();
        let deciding = Box::pin(self.shared_right(from));
        let decided = match waiters {
            Some(waiters) => waiters.while_waited_for(deciding).await,
            None => Some(deciding.await),
        };
        match decided {
            Some((SharedRight::Granted, ahead)) => {
                if let Some(reading) = &mut self.shared {
                    reading.is_permitted = true;
                }
                Ok(ahead)
            }
            Some((SharedRight::UpstreamOnly, _)) => {
                self.shared = None;
                Ok(None)
            }
            Some((SharedRight::Refused(response), _)) => Err(response.as_ref().clone()),
            None => Err(UpstreamResponse::unavailable(UpstreamFailure::Abandoned)),
        }
    }

    async fn shared_right(&mut self, from: u64) -> (SharedRight, Option<Opening>) {
        let proxy = Arc::clone(&self.proxy);
        if let Some(known) = proxy.known_right(&self.upstream_request, self.digest).await {
            return (known, None);
        }
        let opening = if proxy.is_read_ahead(&self.upstream_request, self.digest) {
            self.begin_shared(from)
        } else {
            None
        };
        let deciding = Box::pin(proxy.requested_right(&self.upstream_request, self.digest));
        let Some(opening) = opening else {
            return (deciding.await, None);
        };
        let (right, ahead) = with_opening(deciding, opening).await;
        if ahead.is_none()
            && let Some(reading) = &mut self.shared
        {
            reading.opens -= 1;
            reading.claim_read = None;
        }
        (right, ahead)
    }

    /// Begins to open the blob in the shared storage. `None` if the upstream must send it, or the rest of it.
    fn begin_shared(&mut self, from: u64) -> Option<Opening> {
        let stated = Source::stated_size(self);
        let reading = self.shared.as_mut()?;
        if reading.opens >= SHARED_OPENS_MAX {
            return None;
        }
        reading.opens += 1;
        reading.unanswered_since = Some(Instant::now());
        let (content, shared) = (SharedContent::Blob(self.digest), Arc::clone(&self.proxy.shared));
        // The claim is needed if the blob is absent, and its read costs a round trip more afterwards.
        let place = Lacking::place(&self.upstream_request);
        if self.may_ask_upstream && self.proxy.lacking.is_likely(&place) {
            reading.claim_read = shared.read_claim(self.digest, stated);
        }
        Some(Box::pin(async move { shared.open(content, from).await }))
    }

    /// Opens the blob in the shared storage. `None` if the upstream must send it, or the rest of it.
    async fn open_shared(&mut self, from: u64, ahead: Option<Opening>) -> Option<Stream> {
        let opening = ahead.or_else(|| self.begin_shared(from))?;
        let opened = opening.await;
        let place = Lacking::place(&self.upstream_request);
        self.proxy
            .lacking
            .record(place, matches!(opened, Err(Unread::Absent)));
        let stated = Source::stated_size(self);
        let reading = self.shared.as_mut()?;
        if !matches!(opened, Err(Unread::Unavailable)) {
            reading.unanswered_since = None;
        }
        // An object of another size than stated is damaged, unless the manifest is wrong.
        let opened = opened
            .ok()
            .filter(|object| stated.is_none_or(|stated| stated == object.info.size));
        let Some(object) = opened else {
            reading.opens = SHARED_OPENS_MAX;
            return None;
        };
        reading.claim_read = None;
        Some(self.shared_stream(from, object))
    }

    /// A stream of bytes that the bucket sends.
    fn stream_from_bucket(&mut self, from: u64, total: Option<u64>, body: Box<dyn ByteStream>) -> Stream {
        if let Some(reading) = &mut self.shared {
            reading.is_from_start |= from == 0;
            reading.is_used.store(true, Ordering::Relaxed);
        }
        let UpstreamRequest {
            registry, repository, ..
        } = &self.upstream_request;
        self.proxy
            .active_downloads
            .insert(registry, repository, self.digest);
        Stream {
            start: from,
            total,
            body,
        }
    }

    /// The source of this leader's download.
    pub(super) fn for_leader(mut self, leader: &Leader) -> Self {
        let waiters = leader.waiters().clone();
        if !self.proxy.may_be_fabricated(&self.upstream_request) {
            waiters.detach();
        }
        self.waiters = Some(waiters);
        self.observer = Some(leader.observer());
        self
    }

    /// Drops the client's credential, and returns whether there was one. When a download is resumed, the client's token
    /// may have expired. It authorized the download, so the rest may be fetched anonymously.
    fn drop_credential(&mut self) -> bool {
        let UpstreamRequest { registry, caller, .. } = &mut self.upstream_request;
        if !matches!(caller.credential, Credential::Client(_)) {
            return false;
        }
        let anonymous = registry.caller(&self.proxy.principals, None, (caller.peer, &caller.trace));
        self.first_caller = Some(std::mem::replace(caller, anonymous));
        true
    }

    /// A source of ranges of this blob.
    fn range_source(&self, total: u64) -> Self {
        let mut request = self.upstream_request.clone();
        // A rate limit is not waited out: the download goes on without this connection.
        request.caller.wait_deadline = Some(Instant::now());
        let mut source = Self::new(&self.proxy, request, self.digest);
        source.total = Some(total);
        source
    }

    async fn get(&self, part: RangeSpec) -> Result<ResponseStream, UpstreamResponse> {
        let UpstreamRequest {
            registry,
            endpoint,
            accept,
            caller,
            ..
        } = &self.upstream_request;
        registry.upstream().get_part(caller, endpoint, accept, part).await
    }

    /// Opens the complete blob on this connection. That is a download of its own, so it waits for a permit.
    async fn open_complete(&self, part: RangeSpec) -> Option<Box<dyn ByteStream>> {
        let UpstreamRequest {
            registry,
            endpoint,
            caller,
            ..
        } = &self.upstream_request;
        let demand = Demand {
            class: Class::Bulk,
            ..caller.demand(endpoint)
        };
        let permit = self.proxy.downloads.admit(registry.name(), demand).await.ok()?;
        let sent_at = Instant::now();
        match self.get(part).await {
            Ok(fetched) => Some(Box::new(fetched.holding(permit))),
            Err(response) => {
                self.proxy
                    .record_response(&self.upstream_request, &response, sent_at)
                    .await;
                None
            }
        }
    }
}

impl Source for UpstreamSource {
    /// The bucket ignores `until`: of a blob that it sends, no other connection fetches a part.
    async fn open(&mut self, from: u64, until: Option<u64>) -> Result<Stream, UpstreamResponse> {
        let ahead = self.permit_shared(from).await?;
        let permitted_at = Instant::now();
        if let Some(stream) = self.open_shared(from, ahead).await {
            return Ok(stream);
        }
        let unanswered_since = self.shared.as_ref().and_then(|reading| reading.unanswered_since);
        let began = unanswered_since.unwrap_or(permitted_at);
        if !self.may_ask_upstream {
            return Err(UpstreamResponse::unavailable(UpstreamFailure::PolicyNever));
        }
        if let Some(stream) = self.enter_claim(from, began).await? {
            return Ok(stream);
        }
        let part = RangeSpec {
            from,
            until,
            after: if std::mem::take(&mut self.keeps_url) {
                self.last_url.and_then(UrlIndex::previous)
            } else {
                self.last_url
            },
            is_optional: false,
            is_client_paced: false,
        };
        let first = self.sent_at.is_none();
        let now = Instant::now();
        let sent_at = *self.sent_at.get_or_insert(now);
        if !first {
            self.upstream_request.caller.wait_deadline = Some(now + RESUME_RATE_LIMIT_WAIT_MAX);
        }
        let mut response = match &self.waiters {
            // The first response is recorded even without a waiting request.
            Some(waiters) if first => match waiters.while_waited_for(self.get(part)).await {
                Some(response) => response,
                None => return Err(UpstreamResponse::unavailable(UpstreamFailure::Abandoned)),
            },
            _ => self.get(part).await,
        };
        if !first
            && matches!(&response, Err(response) if response.kind == ResponseKind::Denied)
            && self.drop_credential()
        {
            response = self.get(part).await;
        }
        let UpstreamRequest {
            registry, repository, ..
        } = &self.upstream_request;
        match response {
            Ok(fetched) => {
                self.last_url = Some(fetched.url);
                let caches = CacheHeaders::read(&fetched.headers);
                self.upstream_request.upstream_caches.record(caches.as_ref());
                if first {
                    self.proxy
                        .active_downloads
                        .insert(registry, repository, self.digest);
                }
                let start = fetched.start;
                // A response of `until` bytes may end before the blob does.
                let end = fetched.length.map(|length| start + length);
                let total = fetched.total.or(end.filter(|_| until.is_none()));
                if let Some((lease, total)) = self.lease.as_ref().zip(total) {
                    lease.set_size(total);
                }
                Ok(Stream {
                    start,
                    total,
                    body: Box::new(fetched),
                })
            }
            Err(response) => {
                if first {
                    // Another cache may fetch it.
                    self.lease = None;
                    self.proxy
                        .record_response(&self.upstream_request, &response, sent_at)
                        .await;
                }
                Err(response)
            }
        }
    }

    fn stated_size(&self) -> Option<u64> {
        let UpstreamRequest {
            registry, repository, ..
        } = &self.upstream_request;
        self.proxy.size_hints.get(registry, repository, self.digest)
    }

    fn ended_at_segment(&mut self) {
        self.keeps_url = true;
    }

    fn segments(&self, total: u64) -> Option<Box<dyn RangeSource>> {
        // Otherwise the shared storage sends the blob.
        self.sent_at?;
        Some(Box::new(self.range_source(total)))
    }

    /// Only verified bytes prove that the registry sent the response.
    async fn verified(&mut self, size: u64) {
        if let Some(lease) = &self.lease {
            lease.set_size(size);
        }
        // A mirror may have sent the rest without a credential, which does not make the repository public.
        if let Some(caller) = self.first_caller.take() {
            self.upstream_request.caller = caller;
        }
        if let Some(sent_at) = self.sent_at {
            self.proxy
                .record_verified_blob(&self.upstream_request, (self.digest, size), sent_at)
                .await;
        }
    }

    fn rejected(&mut self) -> bool {
        // Other caches may have read the wrong bytes.
        self.lease = None;
        let Some(reading) = self.shared.take().filter(SharedReading::is_used) else {
            return false;
        };
        // Otherwise a partial download or the upstream may have brought the wrong bytes.
        if reading.is_followed {
            self.proxy.shared.report_wrong_parts(self.digest);
        } else if reading.is_from_start && self.sent_at.is_none() {
            self.proxy.shared.report_wrong(SharedContent::Blob(self.digest));
        }
        true
    }

    fn is_led_by_upstream(&self) -> bool {
        self.sent_at.is_some()
    }

    fn ended(&self, failure: Option<&DownloadError>) {
        let content = SharedContent::Blob(self.digest);
        if failure.is_none() {
            let UpstreamRequest {
                registry, repository, ..
            } = &self.upstream_request;
            self.proxy.note_child(registry, repository, self.digest);
        }
        match &self.shared {
            _ if failure.is_some() => {}
            Some(reading) if reading.is_used() && self.sent_at.is_none() => {
                self.proxy.shared.offer_renewal(content, reading.age);
            }
            _ => self.proxy.shared.offer(content),
        }
        if let Some(lease) = self.lease.as_ref().filter(|_| failure.is_none()) {
            lease.stored();
        }
        let UpstreamRequest {
            registry,
            repository,
            caller,
            ..
        } = &self.upstream_request;
        self.proxy
            .active_downloads
            .remove(registry, repository, self.digest);
        self.proxy
            .telemetry
            .record_span(&caller.trace, || telemetry::Span {
                trace: caller.trace.clone(),
                name: "download",
                kind: SpanKind::Internal,
                ended: self.proxy.clock.now(),
                took: self.started_at.elapsed(),
                attributes: vec![
                    ("ifnewer.upstream", registry.name().to_owned()),
                    ("ifnewer.image", format!("{repository}@{}", self.digest)),
                ],
                error: failure.map(ToString::to_string),
            });
    }
}

/// The right, and the opening that ran while it was established. An object that stayed open for [`AHEAD_MAX`] is dropped.
async fn with_opening<R, T: Send + 'static, E: Send + 'static>(
    deciding: impl Future<Output = R> + Unpin,
    opening: BoxFuture<'static, Result<T, E>>,
) -> (R, Option<BoxFuture<'static, Result<T, E>>>) {
    let (opened, mut deciding) = match select(deciding, opening).await {
        Either::Left((right, opening)) => return (right, Some(opening)),
        Either::Right((opened, deciding)) => (opened, deciding),
    };
    if opened.is_ok() {
        let Ok(right) = timeout(AHEAD_MAX, &mut deciding).await else {
            drop(opened);
            return (deciding.await, None);
        };
        return (right, Some(Box::pin(ready(opened))));
    }
    (deciding.await, Some(Box::pin(ready(opened))))
}

/// Bytes of a blob in the shared storage.
struct SharedBody(SharedObject);

impl ByteStream for SharedBody {
    fn chunk(&mut self) -> download::ChunkFuture<'_> {
        Box::pin(async move {
            let chunk = self.0.chunk().await?;
            Some(chunk.map_err(|error| claim::cause_of(&error)))
        })
    }
}

impl RangeSource for UpstreamSource {
    /// A complete response (200) is not used as a range: reading up to the offset would take as long as the download.
    fn open(&mut self, from: u64, until: Option<u64>) -> download::RangeFuture<'_> {
        Box::pin(async move {
            let is_whole = from == 0 && until.is_none();
            let part = RangeSpec {
                from,
                until,
                after: None,
                is_optional: self.total.is_some(),
                // Otherwise a further connection of the download.
                is_client_paced: self.total.is_none(),
            };
            if is_whole {
                return self.open_complete(part).await;
            }
            let fetched = self.get(part).await.ok()?;
            let is_part = fetched.status == StatusCode::PARTIAL_CONTENT
                && fetched.start == from
                && self.total.is_none_or(|total| fetched.total == Some(total));
            is_part.then(|| Box::new(fetched) as Box<dyn ByteStream>)
        })
    }

    fn another(&self) -> Option<Box<dyn RangeSource>> {
        Some(Box::new(self.range_source(self.total?)))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::time::sleep;

    use super::*;

    const BUCKET: Duration = Duration::from_millis(20);

    /// What the opening gives once the upstream has answered after this time.
    async fn opened_ahead(upstream: Duration, object: Result<u8, u8>) -> Option<Result<u8, u8>> {
        let opening = async move {
            sleep(BUCKET).await;
            object
        };
        let (answered, ahead) = with_opening(Box::pin(sleep(upstream)), opening.boxed()).await;
        assert_eq!(answered, ());
        Some(ahead?.await)
    }

    #[tokio::test(start_paused = true)]
    async fn opened_blob_is_dropped_if_the_upstream_is_slow() {
        let (soon, late) = (AHEAD_MAX / 2, AHEAD_MAX * 2);
        assert_eq!(opened_ahead(Duration::ZERO, Ok(1)).await, Some(Ok(1)));
        assert_eq!(opened_ahead(soon, Ok(1)).await, Some(Ok(1)));
        assert_eq!(opened_ahead(late, Ok(1)).await, None);
        // A failure keeps nothing open, and the bucket is not asked again.
        assert_eq!(opened_ahead(late, Err(2)).await, Some(Err(2)));
    }
}
